"""Columns that are put together are written in blocks of rows that stay in the nearest cache."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from apollo_fuse.kernel import Kernel, Loop, LoopKind, work
from apollo_fuse.passes.near_rows import near_rows
from apollo_fuse.passes.tile_and_map import GRAIN
from models import memory_bound
from models.writing import Graph
from tests.fusing import fuse_to_session, kernels


def side_by_side(rows: int | str, columns: int, width: int = 1) -> onnx.ModelProto:
    """Functions of columns of `width` each, one behind the other in each row."""
    graph = Graph("side_by_side")
    parts = [graph.op("Neg", graph.input(f"x{n}", [rows, width])) for n in range(columns)]
    graph.output(graph.op("Concat", *parts, axis=1), "out", [rows, columns * width])
    return graph.model()


def blocks(kernel: Kernel) -> list[tuple[int, int | None]]:
    """Of each loop over blocks how many lane loops it holds, and of how many rows."""
    loops = [step for step in near_rows(kernel).body if isinstance(step, Loop)]
    found = [
        [s for s in loop.body if isinstance(s, Loop)] for loop in loops if loop.kind is not LoopKind.LANE
    ]
    return [(len(inner), inner[0].iterator.extent.constant) for inner in found]


@pytest.mark.parametrize(
    ("rows", "columns", "expected"),
    [
        (1024, 50, [(50, 80)]),  # 80 rows of 200 bytes are the most below 16 KiB that are whole vectors
        ("rows", 50, [(50, 80)]),
        (64, 50, []),  # all of them are near
        (1024, 4, []),  # written side by side, as rows
    ],
)
def test_which_columns_are_written_in_blocks(
    rows: int | str, columns: int, expected: list[tuple[int, int]], tmp_path: Path
) -> None:
    (kernel,) = kernels(side_by_side(rows, columns), tmp_path)
    assert blocks(kernel) == expected


def test_columns_are_shared_among_threads(tmp_path: Path) -> None:
    """Few elements, but each of them touches a line of memory."""
    (kernel,) = kernels(side_by_side(1024, 50), tmp_path)
    items, each = kernel.items.constant, work(kernel.body).constant
    assert items is not None and each is not None
    assert items >= 4 and items * each >= 2 * GRAIN


def test_a_kernel_without_columns_stays(tmp_path: Path) -> None:
    (kernel,) = kernels(memory_bound.softmax(8, 64), tmp_path)
    assert near_rows(kernel) == kernel


@pytest.mark.parametrize("rows", [0, 1, 79, 80, 81, 1000, 1024])
def test_every_row_is_written(rows: int, tmp_path: Path, cache: Path) -> None:
    fused = fuse_to_session(side_by_side("rows", 50), tmp_path, cache, shapes={"x0": (1024, 1)})
    assert not fused.unfused_nodes
    x = np.random.default_rng(rows).standard_normal((50, rows, 1)).astype(np.float32)
    for expected, found in fused.run({f"x{n}": column for n, column in enumerate(x)}).values():
        np.testing.assert_array_equal(found, expected)
