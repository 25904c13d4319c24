"""Cheap sums over long rows are added up in four places at a time, whatever the length of the row."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from apollo_fuse.kernel import Compute, Kernel, Loop, LoopKind, walk
from apollo_fuse.passes.interleave_sums import interleave_sums
from tests.fusing import fuse_to_session
from tests.test_end_to_end import normal, text_model
from tests.test_memory_stitching import group_of

SPREAD = """g (float[N, {length}] x) => (float[N, 1] y) <int64[1] axes = {{-1}}>
  {{ e = ReduceMean(x, axes) d = Sub(x, e) m = Mul(d, d) s = ReduceSum(m, axes) y = Neg(s) }}"""
FUNCTIONS = SPREAD.replace("m = Mul(d, d)", "m = Exp(d)")
HALVES = SPREAD.replace("float[", "float16[")
SQUARES = SPREAD.replace("e = ReduceMean(x, axes) d = Sub(x, e) m = Mul(d, d)", "m = Mul(x, x)")


def widest_sum(kernel: Kernel) -> int:
    """The accumulators of the lane loop that has most."""
    loops = (s for s in walk(kernel.body) if isinstance(s, Loop) and s.kind is LoopKind.LANE)
    folds = ([s for s in loop.body if isinstance(s, Compute) and s.combine] for loop in loops)
    return max(len({s.targets[0].buffer for s in found}) for found in folds)


@pytest.mark.parametrize(
    ("text", "length", "accumulators"),
    [
        (SPREAD, "1024", 4),
        (SPREAD, "1023", 4),
        (SPREAD, "L", 4),
        (SPREAD, "200", 1),  # over before it matters
        (FUNCTIONS, "1024", 1),  # takes longer than an addition does
        (SQUARES, "1024", 1),  # comes from memory
    ],
)
def test_sums_that_wait_for_additions_have_four(
    text: str, length: str, accumulators: int, tmp_path: Path
) -> None:
    (kernel,) = group_of(text_model(text.format(length=length)), tmp_path).kernels[:1]
    assert widest_sum(interleave_sums(kernel)) == accumulators


def check(
    model: onnx.ModelProto, lengths: tuple[int, ...], tolerance: float, folder: Path, cache: Path
) -> None:
    fused = fuse_to_session(model, folder, cache, shapes={"x": (3, lengths[0])})
    assert not fused.unfused_nodes
    for length in lengths:
        x = normal(3, length)
        kind = np.float16 if fused.original.get_inputs()[0].type == "tensor(float16)" else np.float32
        ((_, found),) = fused.run({"x": x.astype(kind)}).values()
        wide = x.astype(kind).astype(np.float64)
        exact = -np.square(wide - wide.mean(-1, keepdims=True)).sum(-1, keepdims=True)
        np.testing.assert_allclose(found, exact, rtol=tolerance, atol=1e-7)


@pytest.mark.parametrize("length", [1022, 1023, 1024, 1025])
def test_a_known_length(length: int, tmp_path: Path, cache: Path) -> None:
    check(text_model(SPREAD.format(length=length)), (length,), 1e-6, tmp_path, cache)


def test_an_open_length(tmp_path: Path, cache: Path) -> None:
    check(text_model(SPREAD.format(length="L")), (700, 1, 2, 3, 4, 5, 255, 257, 1026), 1e-6, tmp_path, cache)


def test_halves_are_added_up_in_single_precision(tmp_path: Path, cache: Path) -> None:
    check(text_model(HALVES.format(length="L")), (1000, 1, 1021), 1e-3, tmp_path, cache)


def test_an_infinity_and_a_nan_stay_in_their_rows(tmp_path: Path, cache: Path) -> None:
    fused = fuse_to_session(text_model(SPREAD.format(length=1030)), tmp_path, cache)
    x = normal(4, 1030)
    x[0, 3], x[1, 700], x[2, 1029] = np.inf, np.nan, -np.inf
    ((_, found),) = fused.run({"x": x}).values()
    assert np.isnan(found[:3]).all() and np.isfinite(found[3])
