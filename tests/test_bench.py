"""`benchmarks`: shares from onnxruntime's profile, and the arithmetic of rows, means and gains."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import parser

from apollo_fuse.measure import Timing
from benchmarks.memory_share import KernelTime, memory_bound_share, runs_of, share_of
from benchmarks.row import Comparison, comparison_from, speedup_at
from benchmarks.table import Row, gains, to_json, to_markdown

MACHINE = {"CPU": "any"}
SETTINGS = {"seconds": 1.0, "threads": 2.0}


def comparison(unfused: float, fused: float, share: float) -> Comparison:
    times = (Timing(seconds, 2 * seconds, 5) for seconds in (unfused, fused))
    return Comparison(*times, 1.01, share, 0.0, 10, 4, 2, 2, 1.5)


def row(name: str, unfused: float, fused: float, share: float, real: bool = True) -> Row:
    return Row(name, real, False, not real, comparison(unfused, fused, share))


def node(operator: str, duration: float) -> KernelTime:
    return KernelTime(operator, 0.0, duration)


def event(name: str, start: int, duration: int, **arguments: str) -> dict[str, object]:
    return {"name": name, "ts": start, "dur": duration, "cat": "any", "args": arguments}


def test_the_share_is_what_no_compute_bound_operator_takes() -> None:
    nodes = [node("Conv", 60), node("FusedMatMul", 10), node("Add", 20), node("Softmax", 10)]
    assert share_of(nodes) == pytest.approx(0.3)


def test_control_flow_counts_by_the_nodes_in_its_bodies() -> None:
    assert share_of([node("If", 100), node("LSTM", 60), node("Relu", 20)]) == pytest.approx(0.25)


def test_what_the_profiler_adds_to_each_node_is_taken_off() -> None:
    nodes = [node("Gemm", 34), *[node("Add", 5)] * 5]
    assert share_of(nodes, floor=4) == pytest.approx(5 / 35)
    assert share_of([node("Gemm", 34), node("Add", 3)], floor=4) == 0
    assert share_of([node("Add", 4)], floor=4) == 1


def test_nodes_are_told_apart_by_the_run_that_they_lie_in() -> None:
    events = [
        event("model_run", 100, 50),
        event("model_run", 10, 50),
        event("session_initialization", 0, 9),
        event("b_kernel_time", 120, 10, op_name="Relu"),
        event("a_kernel_time", 20, 30, op_name="Conv"),
        event("SequentialExecutor::Execute", 15, 40),
        event("a_kernel_time", 101, 15, op_name="Conv"),
    ]
    assert runs_of(events) == [
        [KernelTime("Conv", 20, 30)],
        [KernelTime("Conv", 101, 15), KernelTime("Relu", 120, 10)],
    ]


def test_a_profile_tells_products_from_the_rest(tmp_path: Path) -> None:
    text = "g (float[256, 256] x) => (float[256, 256] y) {{ {} }}"
    products = "a = MatMul(x, x) b = MatMul(a, x) c = MatMul(b, x) y = MatMul(c, x)"
    mixed = "a = MatMul(x, x) b = Erf(a) c = Erf(b) d = Erf(c) y = Tanh(d)"
    shares = []
    for name, nodes in (("products", products), ("mixed", mixed), ("rest", "a = Erf(x) y = Tanh(a)")):
        model = parser.parse_model(f'<ir_version: 8, opset_import: ["": 18]> {text.format(nodes)}')
        onnx.save(model, tmp_path / f"{name}.onnx")
        feeds = {"x": np.eye(256, dtype=np.float32)}
        shares.append(memory_bound_share(tmp_path / f"{name}.onnx", feeds, seconds=0.05, threads=1))
    products_share, mixed_share, rest_share = shares
    assert products_share == 0
    assert 0 < mixed_share < 1
    assert rest_share == 1


def test_amdahl_gives_bound_and_target() -> None:
    assert speedup_at(0.5, None) == pytest.approx(2)
    assert speedup_at(0.5, 3) == pytest.approx(1.5)
    assert speedup_at(0.0, 3) == 1
    assert speedup_at(1.0, 3) == pytest.approx(3)
    assert speedup_at(1.0, None) is None


def test_what_was_won_is_the_time_saved_over_the_memory_bound_time() -> None:
    found = comparison(0.010, 0.008, 0.4)
    assert found.bound == pytest.approx(1 / 0.6)
    assert found.won == pytest.approx(0.5)
    assert comparison(0.010, 0.011, 0.4).won == pytest.approx(-0.25)
    assert comparison(0.010, 0.010, 0.0).won is None


def test_gains_are_those_of_real_models_with_something_to_win() -> None:
    rows = [
        row("won", 0.010, 0.008, 0.5),
        row("lost", 0.010, 0.010, 0.5),
        row("convolutions", 0.010, 0.010, 0.2),
        row("builder", 0.010, 0.001, 0.9, real=False),
        Row("failed", True, False, False, error="no"),
    ]
    won, lost, mean = gains(rows)
    assert (won.name, won.target, won.fraction) == ("won", pytest.approx(1.5), pytest.approx(0.5))
    assert (lost.name, lost.fraction) == ("lost", 0)
    assert mean.speedup == pytest.approx(1.25**0.5)
    assert mean.fraction == pytest.approx((1.25**0.5 - 1) / 0.5)
    assert gains(rows[2:]) == ()


def test_a_model_under_the_bar_is_marked() -> None:
    rows = [
        row("slower", 0.0979, 0.1, 0.5),
        row("even", 0.0981, 0.1, 0.5),
        row("builder", 1.0, 0.1, 1.0, False),
    ]
    cells = [line.split(" | ") for line in to_markdown(rows, MACHINE, SETTINGS).splitlines()]
    marked = {line[0].removeprefix("| "): line[3] for line in cells if len(line) > 10}
    assert (marked["slower"], marked["even"], marked["builder"]) == ("0.98x (!)", "0.98x", "10.00x")
    records = to_json(rows, MACHINE, SETTINGS)["rows"]
    assert isinstance(records, list)
    assert [record["slower"] for record in records] == [True, False, False]


def test_the_tables_show_share_bound_and_what_was_won() -> None:
    text = to_markdown([row("model", 0.010, 0.008, 0.5)], MACHINE, SETTINGS)
    assert (
        "| model | 10.000 | 8.000 | 1.25x | 1.25x | - | 1.01x | 50% | 2.00x | 40% | 10 -> 4 | 2 | 1.5 |"
        in text
    )
    assert "| model | 50% | 1.25x | 1.50x | 50% |" in text
    assert "| geometric mean | 50% | 1.25x | 1.50x | 50% |" in text


def test_the_record_survives_json() -> None:
    rows = [
        row("model", 0.010, 0.008, 0.5),
        row("builder", 1.0, 0.1, 1.0, real=False),
        Row("failed", True, False, False),
    ]
    record = json.loads(json.dumps(to_json(rows, MACHINE, SETTINGS), allow_nan=False))
    model, builder, failed = record["rows"]
    assert (model["bound"], model["won"]) == (pytest.approx(2), pytest.approx(0.4))
    assert builder["bound"] is None
    assert failed["won"] is None
    assert [gain["name"] for gain in record["gains"]] == ["model", "geometric mean"]
    assert comparison_from(model["comparison"]) == rows[0].comparison
