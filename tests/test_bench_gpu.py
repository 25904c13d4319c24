"""The static benchmark for GPUs: what counts as a launch, and what its tables say of rows."""

from __future__ import annotations

import importlib.util
import json

import pytest

from apollo_fuse.dtypes import DType
from apollo_fuse.unfused import Ran, Tensor
from benchmarks.gpu_row import Compiled, OnGpu, compiled, compiled_from, launched
from benchmarks.gpu_table import Row, missed, to_json, to_markdown, totals

MATRIX = Tensor(DType.FLOAT32, (64, 64))
SHAPE = Tensor(DType.INT64, (2,))


def on_gpu(before: int = 10, after: int = 1, moved: int = 100, spills: int = 0) -> OnGpu:
    return OnGpu(1, before + 1, after + 1, before, after, moved, 100, spills, 25.0, 5.0)


def row(name: str, memory_bound: bool, **figures: int) -> Row:
    return Row(name, memory_bound, Compiled({"cuda:90": on_gpu(**figures)}, 2.0, 0.5, {"cuda:90": "k 1.00x"}))


def test_views_control_flow_and_shapes_are_no_launches() -> None:
    nodes = [
        Ran("Add", (MATRIX, MATRIX), (MATRIX,)),
        Ran("Reshape", (MATRIX, SHAPE), (MATRIX,)),
        Ran("If", (), (MATRIX,)),
        Ran("Gather", (SHAPE,), (SHAPE,)),
        Ran("NonZero", (MATRIX,), (Tensor(DType.INT64, (2, 64)),)),
    ]
    assert [node.op_type for node in launched(nodes)] == ["Add", "NonZero"]


def test_rows_that_miss_what_is_asked_say_so() -> None:
    assert missed(row("good", True)) == ()
    assert missed(row("few", True, before=8, after=2)) == ("4.00x fewer launches",)
    assert missed(row("one", True, before=1)) == ()
    assert missed(row("moving", True, moved=110)) == ("1.10x traffic on cuda:90 (k 1.00x)",)
    assert missed(row("real", False, before=4, moved=200, spills=8)) == ("8 bytes spilled on cuda:90",)
    assert missed(Row("broken", True, error="no result")) == ("no result",)


def test_sums_are_over_bytes_and_launches_of_all_models_of_a_kind() -> None:
    rows = [row("a", True, before=9, moved=100), row("b", True, before=3, moved=130), row("c", False)]
    bound, others = totals(rows)
    assert (bound.group, bound.traffic, bound.fewer_launches) == ("memory-bound", 1.15, 6.0)
    assert others.traffic == 1.0


def test_tables_hold_failures_too() -> None:
    rows = [row("good", True), Row("broken", True, error="no result")]
    text = to_markdown(rows, {"CPU": "any"})
    assert "| good | cuda:90 | 1 | 10 -> 1 | 10.00x | 1.00x | 0 | 25.0 | 5.0 | 5.00x | 2.0 | 0.50 |" in text
    assert "| broken | failed: no result |" in text and "| broken | no result |" in text
    record = json.loads(json.dumps(to_json(rows, {})))
    assert compiled_from(record["rows"][0]["compiled"]) == rows[0].compiled


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_a_softmax_is_one_launch_in_place_of_five_and_moves_each_byte_once() -> None:
    found = compiled("softmax", "cpu,cuda:90", threads=1)
    (softmax,) = found.gpus.values()
    assert (softmax.memory_launches_before, softmax.memory_launches_after, softmax.kernels) == (5, 1, 1)
    assert (softmax.moved, softmax.spills) == (softmax.compulsory, 0)
    assert found.warm_seconds < found.cold_seconds and softmax.fused_us < softmax.unfused_us
