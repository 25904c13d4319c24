"""Rows that are put together of many columns are written several at a time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from apollo_fuse.kernel import Compute, Kernel, Loop, LoopKind, walk, work
from apollo_fuse.passes import tile_rows as pass_
from apollo_fuse.passes.tile_rows import tile_rows
from models import memory_bound
from tests.fusing import fuse_to_session, kernels
from tests.test_join_columns import encoded, inputs

MANY = 9
"""Parts of a row, each of two columns."""


def tiled(rows: int | str, count: int, tmp_path: Path) -> tuple[Kernel, Kernel]:
    """The kernel that puts so many parts together, and what becomes of it."""
    (kernel,) = kernels(encoded(rows, count), tmp_path)
    return kernel, tile_rows(kernel)


@pytest.mark.parametrize(("rows", "blocks"), [(1024, 64), (1000, 63), ("rows", None)])
def test_a_few_parts_are_written_in_several_rows_each(
    rows: int | str, blocks: int | None, tmp_path: Path
) -> None:
    _, found = tiled(rows, MANY, tmp_path)
    (axis,) = found.grid
    assert axis.extent.constant == blocks
    loops = [step for step in found.body if isinstance(step, Loop)]
    assert len(loops) == len(found.body) and {loop.kind for loop in loops} == {LoopKind.SEQUENTIAL}
    computes = [[step for step in walk(loop.body) if isinstance(step, Compute)] for loop in loops]
    assert sum(map(len, computes)) == 2 * MANY and max(map(len, computes)) == 4
    assert {loop.iterator.extent.constant for loop in loops} == {16}
    assert {loop.limit is None for loop in loops} == {rows == 1024}


def test_a_few_columns_stay_in_the_nearest_cache(tmp_path: Path) -> None:
    kernel, found = tiled(1024, 3, tmp_path)
    assert found == kernel


def test_rows_that_are_work_for_a_thread_each_stay_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel, found = tiled(1024, MANY, tmp_path)
    each = work(kernel.body).constant
    assert found != kernel and each is not None
    monkeypatch.setattr(pass_, "GRAIN", 16 * each - 1)
    assert tile_rows(kernel) == kernel


def test_a_kernel_that_passes_values_on_stays(tmp_path: Path) -> None:
    (kernel,) = kernels(memory_bound.softmax(8, 64), tmp_path)
    assert tile_rows(kernel) == kernel


@pytest.mark.parametrize("rows", [0, 1, 15, 16, 17, 1000, 1024])
def test_every_element_is_written(rows: int, tmp_path: Path, cache: Path) -> None:
    shapes = {name: array.shape for name, array in inputs(100, MANY).items()}
    fused = fuse_to_session(encoded("rows", MANY), tmp_path, cache, shapes=shapes)
    assert not fused.unfused_nodes
    for expected, found in fused.run(inputs(rows, MANY)).values():
        np.testing.assert_array_equal(found, expected)
