"""Long rows are added up in blocks, in lanes: which, at what lengths, and how near to the truth they come."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from apollo_fuse.kernel import Kernel, Loop, LoopKind, walk
from apollo_fuse.passes.cascade_lanes import BLOCK, cascade_lanes
from tests.fusing import fuse_to_session
from tests.test_end_to_end import text_model
from tests.test_memory_stitching import group_of

SQUARES = """g ({dtype}[N, {length}] x) => ({dtype}[N, 1] y) <int64[1] axes = {{-1}}>
  {{ m = Mul(x, x) y = {operator}(m, axes) }}"""
FUNCTIONS = SQUARES.replace("m = Mul(x, x)", "m = Tanh(x)")


def model_of(text: str, length: str, operator: str = "ReduceSum", dtype: str = "float") -> onnx.ModelProto:
    return text_model(text.format(length=length, operator=operator, dtype=dtype))


def blocks(kernel: Kernel) -> list[int | None]:
    """The lanes of each loop that is within one over blocks."""
    outer = [s for s in walk(kernel.body) if isinstance(s, Loop) and s.iterator.name.endswith("_block")]
    inner = [s for loop in outer for s in loop.body if isinstance(s, Loop) and s.kind is LoopKind.LANE]
    return [loop.iterator.extent.constant for loop in inner]


@pytest.mark.parametrize(
    ("text", "length", "operator", "dtype", "expected"),
    [
        (SQUARES, "5000", "ReduceSum", "float", [BLOCK]),
        (SQUARES, "5000", "ReduceSum", "double", [BLOCK]),
        (FUNCTIONS, "L", "ReduceMean", "float", [BLOCK]),
        (SQUARES, str(4 * BLOCK), "ReduceSum", "float", []),
        (SQUARES, "5000", "ReduceMax", "float", []),
        (SQUARES, "5000", "ReduceSum", "int32", []),
    ],
)
def test_which_rows_are_added_up_in_blocks(
    text: str, length: str, operator: str, dtype: str, expected: list[int], tmp_path: Path
) -> None:
    kernel = group_of(model_of(text, length, operator, dtype), tmp_path).kernels[0]
    assert blocks(cascade_lanes(kernel)) == expected


@pytest.mark.parametrize("text", [SQUARES, FUNCTIONS])
@pytest.mark.parametrize("length", [4 * BLOCK + 1, 5 * BLOCK, 6 * BLOCK - 7])
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
    for length in (0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 5 * BLOCK + 7):
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
