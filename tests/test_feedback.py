"""What a lower layer refuses comes back, and regroups the micro-graph that it touches and no other."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apollo_fuse import InputShape, Options, driver, evidence, fuse, onnx_io
from apollo_fuse.acceptance import Judgement
from apollo_fuse.codegen import link
from apollo_fuse.feedback import NOT_WORTH_IT, Feedback
from apollo_fuse.fusion import Candidate
from apollo_fuse.graph import MicroGraph, Operator, Refused
from apollo_fuse.partition import Planner
from apollo_fuse.passes.aggregate_ops import AggregateOps
from apollo_fuse.report import Report
from apollo_fuse.symbolic import infer_shapes
from tests.test_end_to_end import normal, text_model

TWO_ROWS = """g (float[N, 64] x, float[N, 64] z) => (float[N, 64] y, float[N, 64] v) {
  a = Mul(x, w) b = Tanh(a) c = Add(b, w) y = Mul(c, x)
  k = Constant <value_ints = [-1]> () m = ReduceMean (z, k) d = Sub(z, m) s = Mul(d, d) v = Add(s, w)
}"""


def planner(text: str, folder: Path, options: Options) -> Planner:
    onnx.save(text_model(text, w=normal(64)), folder / "net.onnx")
    clean = onnx_io.load_clean(folder / "net.onnx", folder)
    infer_shapes(clean)
    return Planner(clean, options, driver.Layout.PORTABLE)


def op_types(candidate: Candidate) -> list[str]:
    return [o.op_type for o in candidate.micro_graph.operators]


def fused(text: str, folder: Path, options: Options) -> Report:
    onnx.save(text_model(text, w=normal(64)), folder / "net.onnx")
    shapes = tuple(InputShape(x.name, (16, 64)) for x in onnx.load(folder / "net.onnx").graph.input)
    chosen = dataclasses.replace(options, shapes=shapes, cache_dir=folder / "cache", threads=1, strict=True)
    return fuse(folder / "net.onnx", options=chosen)


def test_isl_that_runs_out_of_operations_sends_its_micro_graph_back(tmp_path: Path) -> None:
    chosen = Options(isl_max_operations=4000, measure=False)
    report = fused(TWO_ROWS, tmp_path, chosen)
    reasons = {(r.refused.rule, r.refused.reason, r.refused.evidence) for r in report.feedback_rounds}
    assert reasons == {("loop_fusion", "isl ran out of operations", "limit 4000")}
    assert report.distinct_kernels == 2
    whole = fused(TWO_ROWS, tmp_path, Options(measure=False))
    assert not whole.feedback_rounds and whole.distinct_kernels == 2


def test_many_reductions_that_one_operator_reads_are_parted_in_few_rounds(tmp_path: Path) -> None:
    slices = [
        f"b{i} = Constant <value_ints = [{i}]> () e{i} = Constant <value_ints = [{i + 3}]> () "
        f"s{i} = Slice (x, b{i}, e{i}, k) r{i} = ReduceMean (s{i}, k)"
        for i in range(40)
    ]
    pooled = ", ".join(f"r{i}" for i in range(40))
    text = f"""g (float[N, 64] x) => (float[N, 40] y) {{
      k = Constant <value_ints = [-1]> () {" ".join(slices)} y = Concat <axis = -1> ({pooled})
    }}"""
    report = fused(text, tmp_path, Options(isl_max_operations=10_000, measure=False))
    assert 2 <= len(report.feedback_rounds) <= 6
    assert report.verification.passed


def many_live_values(count: int) -> onnx.ModelProto:
    """A chain whose values are all needed again once their sum is complete."""
    made = [f"c{i} = Add(x, w{i}) e{i} = Sqrt(c{i})" for i in range(count)]
    summed = ["s0 = Identity(e0)"] + [f"s{i} = Add(s{i - 1}, e{i})" for i in range(1, count)]
    again = [f"p0 = Add(s{count - 1}, e0)"] + [f"p{i} = Sub(p{i - 1}, e{i})" for i in range(1, count)]
    text = f"g (float[N, 64] x) => (float[N, 64] p{count - 1}) {{ {' '.join([*made, *summed, *again])} }}"
    return text_model(text, **{f"w{i}": np.float32(i + 1) for i in range(count)})


def test_more_live_values_than_the_compiler_has_room_for_send_a_kernel_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link, "LARGE_FRAME", 1024)  # a test of the real limit compiles for many seconds
    monkeypatch.setattr(evidence, "MOST_SPILLED", 1024)
    model = many_live_values(120)
    onnx.save(model, tmp_path / "net.onnx")
    options = Options((InputShape("x", (16, 64)),), max_area_operators=2000, measure=False, threads=1)
    report = fuse(tmp_path / "net.onnx", options=dataclasses.replace(options, cache_dir=tmp_path / "cache"))
    refused = [r.refused for r in report.feedback_rounds]
    assert refused and {(r.rule, r.reason) for r in refused} == {("codegen", "too many live values")}
    assert "bytes of registers are spilled" in refused[0].evidence
    assert report.distinct_kernels >= 2 and report.verification.passed


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_more_live_values_than_a_gpu_has_registers_for_send_a_kernel_back(tmp_path: Path) -> None:
    onnx.save(many_live_values(80), tmp_path / "net.onnx")
    options = Options(
        target="cpu,cuda:90",
        shapes=(InputShape("x", (4096, 64)),),
        measure=False,
        max_area_operators=1000,
        cache_dir=tmp_path / "cache",
    )
    report = fuse(tmp_path / "net.onnx", options=options)
    refused = [r.refused for r in report.feedback_rounds]
    assert refused and {(r.rule, r.reason) for r in refused} == {("codegen.triton", "too many live values")}
    assert "bytes of registers are spilled by a thread on cuda:90" in refused[0].evidence
    kept = [kernel for kernel in report.kernels if kernel.accepted]
    assert len(kept) >= 2 and all(kernel.gpu["cuda:90"].spills == 0 for kernel in kept)
    assert report.verification.passed


@pytest.fixture
def slow_tails(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels that compute a Tanh and more than one other operator are measured to be slow."""
    judge = driver.judge

    def measured(candidate: Candidate, *rest: object) -> Judgement:
        found: Judgement = judge(candidate, *rest)  # type: ignore[arg-type]
        ops = op_types(candidate)
        slow = "Tanh" in ops and len(ops) > 2
        return dataclasses.replace(
            found, unfused=1.0, fused=2.0 if slow else 0.5, reason="slow" if slow else ""
        )

    monkeypatch.setattr(driver, "judge", measured)


@pytest.mark.usefixtures("slow_tails")
def test_a_fusion_that_is_measured_slower_is_grouped_anew_and_the_rest_stays(tmp_path: Path) -> None:
    before = planner(TWO_ROWS, tmp_path, Options()).plan()
    report = fused(TWO_ROWS, tmp_path, Options(measure=False))
    assert {r.refused.rule for r in report.feedback_rounds} == {"acceptance"}
    assert report.feedback_rounds[0].refused.evidence == "2000000.0 us, 1000000.0 us in onnxruntime"
    untouched = {x.name for x in before.candidates if "Tanh" not in op_types(x)}
    assert untouched and untouched <= {k.name for k in report.kernels}
    assert all("Tanh" not in k.ops or len(k.ops) <= 2 for k in report.kernels)
    assert (
        json.loads(json.dumps(report.to_json()))["feedback_rounds"][0]["refused"]["reason"]
        == "measured slower"
    )


@pytest.mark.usefixtures("slow_tails")
def test_what_was_grouped_anew_is_remembered(tmp_path: Path) -> None:
    first = fused(TWO_ROWS, tmp_path, Options(measure=False))
    assert first.library is not None
    written = first.output.read_bytes(), first.library.read_bytes()
    second = fused(TWO_ROWS, tmp_path, Options(measure=False))
    assert second.remembered and second.library is not None
    assert (second.output.read_bytes(), second.library.read_bytes()) == written
    assert second.feedback_rounds == first.feedback_rounds and second.kernels == first.kernels


@pytest.mark.usefixtures("slow_tails")
def test_without_feedback_what_is_refused_stays_unfused(tmp_path: Path) -> None:
    report = fused(TWO_ROWS, tmp_path, Options(measure=False, feedback=False))
    assert not report.feedback_rounds
    assert [k.accepted for k in report.kernels if "Tanh" in k.ops] == [False]
    report = fused(TWO_ROWS, tmp_path, Options(measure=False, feedback=False, isl_max_operations=500))
    assert not report.feedback_rounds
    assert "isl ran out of operations" in {r.reason for r in report.refused}


def test_layer_one_alone_cuts_between_a_reduction_and_what_is_computed_from_it(tmp_path: Path) -> None:
    both = planner(TWO_ROWS, tmp_path, Options()).plan()
    assert [x.group.stitches for x in both.candidates if "ReduceMean" in op_types(x)] == [True]
    alone = planner(TWO_ROWS, tmp_path, Options(layers="I")).plan()
    assert alone.candidates and not any(x.group.stitches for x in alone.candidates)
    assert not any({"ReduceMean", "Sub"} <= set(op_types(x)) for x in alone.candidates)


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_rounds_end_and_lose_no_operator(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    planned = planner(TWO_ROWS, tmp_path_factory.mktemp("net"), Options())
    start = planned.plan()
    areas = [x.micro_graph for x in start.candidates]
    draws: dict[tuple[int, ...], bool] = {}

    def fuse_some(micro_graph: MicroGraph) -> Candidate | Refused:
        places = positions(micro_graph.operators)
        if places not in draws:
            draws[places] = data.draw(st.booleans())
        if draws[places]:
            return dataclasses.replace(start.candidates[0], micro_graph=micro_graph)
        return Refused((), "loop_fusion", "no")

    outcome = Feedback(AggregateOps(), fuse_some)([(area, None) for area in areas])
    kept = [positions(x.micro_graph.operators) for x in outcome.candidates]
    left = sum(len(r.refused.nodes) for r in outcome.left)
    every = sorted(p for area in areas for p in positions(area.operators))
    assert sorted(p for places in kept for p in places) == sorted(set(p for places in kept for p in places))
    assert {p for places in kept for p in places} <= set(every)
    assert sum(map(len, kept)) + left == len(every)
    assert all(len(r.refused.nodes) == 1 for r in outcome.left)
    assert all(r.forbidden for r in outcome.rounds)


def positions(operators: tuple[Operator, ...]) -> tuple[int, ...]:
    return tuple(o.position for o in operators)


def test_what_is_not_worth_a_kernel_is_not_grouped_anew(tmp_path: Path) -> None:
    areas = [x.micro_graph for x in planner(TWO_ROWS, tmp_path, Options()).plan().candidates]
    outcome = Feedback(AggregateOps(), lambda _: Refused((), NOT_WORTH_IT, "too small"))(
        [(a, None) for a in areas]
    )
    assert len(outcome.left) == len(areas) and not outcome.rounds


ROWS = """g (float[B, S, 8, 64] x) => ({outputs}float[M, 512] y) <int64[2] rows = {{-1, 512}}> {{
  a = Add(x, w) b = Mul(a, a) c = Tanh(b) d = Mul(c, a) y = Reshape(d, rows) }}"""
"""Rows of a batch go into a matrix product as one matrix."""


def test_no_affine_index_writes_open_rows_in_another_shape_and_none_has_to(tmp_path: Path) -> None:
    planned = planner(ROWS.format(outputs=""), tmp_path, Options()).plan()
    assert [op_types(x) for x in planned.candidates] == [["Add", "Mul", "Tanh", "Mul", "Reshape"]]
    assert not planned.rounds


def test_a_view_beside_its_operand_is_not_written_twice(tmp_path: Path) -> None:
    planned = planner(ROWS.format(outputs="float[B, S, 8, 64] d, "), tmp_path, Options()).plan()
    assert [op_types(x) for x in planned.candidates] == [["Add", "Mul", "Tanh", "Mul"]]
    assert [x.refused.reason for x in planned.left] == ["a single operator"]


def test_rows_in_another_shape_hold_what_they_held(tmp_path: Path) -> None:
    onnx.save(text_model(ROWS.format(outputs=""), w=normal(64)), tmp_path / "net.onnx")
    shapes = (InputShape("x", (3, 5, 8, 64)),)
    report = fuse(tmp_path / "net.onnx", options=Options(shapes=shapes, measure=False, strict=True))
    assert report.distinct_kernels == 1


@pytest.mark.parametrize(
    "text",
    [
        """g (float[N, 64] x) => (float[N, 32] y)
        { a = Mul(x, w) b, c = Split <axis = 1, num_outputs = 2> (a) d = Sigmoid(b) y = Mul(d, c) }""",
        "g (float[N, 64] x) => (int64[N, 1] y) { a = Mul(x, w) b = Softmax(a) y = ArgMax <axis = 1> (b) }",
    ],
    ids=["parts of a row", "a row and its first element"],
)
def test_what_is_read_at_several_places_but_in_no_window_is_computed_in_the_kernel(
    text: str, tmp_path: Path
) -> None:
    (candidate,) = planner(text, tmp_path, Options()).plan().candidates
    assert op_types(candidate)[0] == "Mul" and len(op_types(candidate)) > 2
