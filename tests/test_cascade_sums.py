"""Long columns are added up in blocks: where, at which lengths, and how near to the truth the sums come."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from apollo_fuse.kernel import Kernel, Loop, LoopKind, walk
from apollo_fuse.passes.cascade_sums import BLOCK
from models.writing import Graph
from tests.fusing import fuse_to_session
from tests.test_memory_stitching import group_of

ROWS = np.array([0], np.int64)


def squares(
    rows: int | str, columns: int | str, operator: str = "ReduceSum", dtype: int = 1
) -> onnx.ModelProto:
    """The sum of the squares in each column."""
    graph = Graph("squares")
    x = graph.input("x", [rows, columns], dtype)
    graph.output(graph.op(operator, graph.op("Mul", x, x), ROWS, keepdims=0), "out", [columns], dtype)
    return graph.model()


def normalised() -> onnx.ModelProto:
    """Columns less their mean over their deviation, with the variance as the difference of two sums."""
    graph = Graph("normalised")
    x = graph.input("x", [4, 512, 64])
    mean = graph.op("ReduceMean", x, np.array([1], np.int64))
    squared = graph.op("ReduceMean", graph.op("Mul", x, x), np.array([1], np.int64))
    variance = graph.op("Sub", squared, graph.op("Mul", mean, mean))
    deviation = graph.op("Sqrt", graph.op("Add", variance, 1e-6))
    graph.output(graph.op("Div", graph.op("Sub", x, mean), deviation), "out", [4, 512, 64])
    return graph.model()


def loops(kernel: Kernel) -> list[str]:
    """The names of the loops that run one turn after the other."""
    found = (s for s in walk(kernel.body) if isinstance(s, Loop))
    return [loop.iterator.name for loop in found if loop.kind is LoopKind.SEQUENTIAL]


def test_a_long_column_is_added_up_in_blocks_and_a_short_one_as_it_is(tmp_path: Path) -> None:
    assert loops(group_of(squares(1000, 64), tmp_path).kernels[0]) == ["r0_block", "r0"]
    assert loops(group_of(squares("rows", 64), tmp_path).kernels[0]) == ["r0_block", "r0"]
    assert loops(group_of(squares(BLOCK, 64), tmp_path).kernels[0]) == ["r0"]


def test_what_is_exact_or_added_up_in_many_parts_is_left_as_it_is(tmp_path: Path) -> None:
    assert loops(group_of(squares(1000, 64, dtype=onnx.TensorProto.INT32), tmp_path).kernels[0]) == ["r0"]
    assert loops(group_of(squares(1000, 64, "ReduceMax"), tmp_path).kernels[0]) == ["r0"]
    shared = [k for k in group_of(squares(1000, 1), tmp_path).kernels if "_block" in str(k)]
    assert not shared


def test_rounding_does_not_add_up_with_the_rows(tmp_path: Path, cache: Path) -> None:
    rows = 8192
    x = np.full((rows, 16), np.float32(0.1) ** np.float32(0.5), np.float32)
    fused = fuse_to_session(squares(rows, 16), tmp_path, cache)
    assert not fused.unfused_nodes
    ((_, found),) = fused.run({"x": x}).values()
    truth = np.sum(np.square(x, dtype=np.float64), axis=0)
    one_after_the_other = np.cumsum(np.square(x), axis=0)[-1]
    assert np.abs(found - truth).max() * 10 < np.abs(one_after_the_other - truth).max()


@pytest.mark.parametrize("rows", [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 5 * BLOCK, 5 * BLOCK + 7])
def test_every_number_of_rows_is_added_up_whole(rows: int, tmp_path: Path, cache: Path) -> None:
    x = np.random.default_rng(rows).integers(-8, 8, (rows, 37)).astype(np.float32)  # whose sums are exact
    fused = fuse_to_session(squares("rows", "columns"), tmp_path, cache, shapes={"x": (7, 37)})
    assert not fused.unfused_nodes
    for expected, found in fused.run({"x": x}).values():
        np.testing.assert_array_equal(found, expected)


def test_parts_of_columns_are_added_up_whole(tmp_path: Path, cache: Path) -> None:
    """Of few columns each thread takes some rows, and adds up those in blocks."""
    graph = Graph("columns")
    x = graph.input("x", [70_001, 16])
    graph.output(graph.op("ReduceSum", graph.op("Mul", x, x), ROWS, keepdims=0), "out", [16])
    fused = fuse_to_session(graph.model(), tmp_path, cache)
    assert not fused.unfused_nodes
    feeds = {"x": np.random.default_rng(0).integers(-2, 3, (70_001, 16)).astype(np.float32)}
    for expected, found in fused.run(feeds).values():
        np.testing.assert_array_equal(found, expected)


def test_a_variance_that_cancels_is_as_near_as_in_onnxruntime(tmp_path: Path, cache: Path) -> None:
    x = np.random.default_rng(0).normal(1.0, 0.1, (4, 512, 64)).astype(np.float32)
    fused = fuse_to_session(normalised(), tmp_path, cache)
    assert not fused.unfused_nodes
    ((expected, found),) = fused.run({"x": x}).values()
    wide = x.astype(np.float64)
    truth = (wide - wide.mean(1, keepdims=True)) / np.sqrt(wide.var(1, keepdims=True) + 1e-6)
    assert np.abs(found - truth).max() <= np.abs(expected - truth).max()
