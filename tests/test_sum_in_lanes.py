"""Rows are added up in 32 sums side by side, and long ones in blocks: which, and how near to the truth."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from apollo_fuse.codegen import c
from apollo_fuse.kernel import Kernel, Loop, LoopKind, walk
from apollo_fuse.passes.cascade_sums import BLOCK
from apollo_fuse.passes.sum_in_lanes import SUMS, VECTOR, sum_in_lanes
from tests.fusing import fuse_to_session
from tests.test_end_to_end import normal, text_model
from tests.test_memory_stitching import group_of

SPREAD = """g (float[N, {length}] x) => (float[N, 1] y) <int64[1] axes = {{-1}}>
  {{ e = ReduceMean(x, axes) d = Sub(x, e) m = Mul(d, d) s = ReduceSum(m, axes) y = Neg(s) }}"""
HALVES = SPREAD.replace("float[", "float16[")
SQUARES = """g ({dtype}[N, {length}] x) => ({dtype}[N, 1] y) <int64[1] axes = {{-1}}>
  {{ m = Mul(x, x) y = {operator}(m, axes) }}"""
FUNCTIONS = SQUARES.replace("m = Mul(x, x)", "m = Tanh(x)")


def model_of(text: str, length: str, operator: str = "ReduceSum", dtype: str = "float") -> onnx.ModelProto:
    return text_model(text.format(length=length, operator=operator, dtype=dtype))


def sums(kernel: Kernel) -> set[str]:
    """The accumulators that have one sum for each of so many lanes."""
    return {buffer.name for buffer in kernel.buffers if buffer.size.constant in (VECTOR, SUMS)}


def blocks(kernel: Kernel) -> list[int | None]:
    """The steps of each block, of the loops that are in blocks."""
    outer = [s for s in walk(kernel.body) if isinstance(s, Loop) and s.iterator.name.endswith("_block")]
    inner = [s for loop in outer for s in loop.body if isinstance(s, Loop) and s.kind is LoopKind.SEQUENTIAL]
    return [loop.iterator.extent.constant for loop in inner]


@pytest.mark.parametrize(
    ("text", "length", "operator", "dtype", "rows", "in_blocks"),
    [
        (SQUARES, "1024", "ReduceSum", "float", 1, []),
        (SQUARES, "1023", "ReduceSum", "float", 1, []),
        (SQUARES, "64", "ReduceSum", "float", 1, []),
        (SQUARES, "63", "ReduceSum", "float", 1, []),
        (SQUARES, "15", "ReduceSum", "float", 0, []),  # no vector
        (SPREAD, "1024", "ReduceSum", "float", 2, []),
        (FUNCTIONS, "1024", "ReduceSum", "float", 1, []),
        (SQUARES, str(128 * SUMS), "ReduceSum", "float", 1, []),
        (SQUARES, "5000", "ReduceSum", "float", 2, [BLOCK]),
        (SQUARES, "5000", "ReduceSum", "double", 2, [BLOCK]),
        (FUNCTIONS, "L", "ReduceMean", "float", 2, [BLOCK]),
        (SQUARES, "5000", "ReduceMax", "float", 0, []),
        (SQUARES, "5000", "ReduceSum", "int32", 0, []),
    ],
)
def test_which_rows_have_sums_side_by_side(
    text: str, length: str, operator: str, dtype: str, rows: int, in_blocks: list[int], tmp_path: Path
) -> None:
    kernel = group_of(model_of(text, length, operator, dtype), tmp_path).kernels[0]
    assert not sums(kernel)
    in_lanes = sum_in_lanes(kernel)
    assert len(sums(in_lanes)) == rows
    assert blocks(in_lanes) == in_blocks


@pytest.mark.parametrize(("text", "in_order"), [(SQUARES, True), (FUNCTIONS, False)])
def test_rows_that_are_only_read_are_read_in_order(text: str, in_order: bool, tmp_path: Path) -> None:
    group = group_of(model_of(text, "128"), tmp_path)
    lines = [line.strip() for line in c.emit(group, "sums", "sums of rows").splitlines()]
    (steps,) = (place for place, line in enumerate(lines) if line.startswith("for (int64_t r0_step"))
    assert (lines[steps - 1] == "#pragma GCC unroll 1") == in_order


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


@pytest.mark.parametrize("text", [SQUARES, FUNCTIONS])
@pytest.mark.parametrize("length", [15, 16, 17, 33, 63, 65, 80, 100, 127, 4097, 5120, 6137])
def test_every_element_of_a_row_of_known_length_counts(
    text: str, length: int, tmp_path: Path, cache: Path
) -> None:
    fused = fuse_to_session(model_of(text, str(length)), tmp_path, cache)
    assert not fused.unfused_nodes
    x = np.linspace(-1, 2, 3 * length, dtype=np.float32).reshape(3, length)
    for expected, found in fused.run({"x": x}).values():
        np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_every_element_of_a_row_of_open_length_counts(tmp_path: Path, cache: Path) -> None:
    fused = fuse_to_session(model_of(SQUARES, "L"), tmp_path, cache, shapes={"x": (7, 300)})
    assert not fused.unfused_nodes
    for length in (0, 1, SUMS - 1, SUMS, SUMS + 1, BLOCK * SUMS, 5 * BLOCK * SUMS + 7):
        x = np.random.default_rng(length).integers(-8, 8, (3, length)).astype(np.float32)
        for expected, found in fused.run({"x": x}).values():
            np.testing.assert_array_equal(found, expected)  # sums of small integers are exact


def test_rounding_does_not_add_up_with_the_row(tmp_path: Path, cache: Path) -> None:
    length = 1 << 17
    x = np.full((2, length), np.float32(0.1) ** np.float32(0.5), np.float32)
    fused = fuse_to_session(model_of(SQUARES, str(length)), tmp_path, cache)
    assert not fused.unfused_nodes
    ((_, found),) = fused.run({"x": x}).values()
    truth = np.sum(np.square(x, dtype=np.float64), axis=1, keepdims=True)
    in_lanes = np.cumsum(np.square(x[:, : length // 16]), axis=1)[:, -1:] * 16
    assert np.abs(found - truth).max() * 10 < np.abs(in_lanes - truth).max()
