"""Rows of several results are written one after the other where they begin within a line of the cache."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from apollo_fuse.dtypes import DType
from apollo_fuse.expressions import Apply, BlockBuilder, Constant, Load, Op
from apollo_fuse.index import Index, Iterator, Symbol
from apollo_fuse.kernel import Buffer, Compute, Kernel, Loop, LoopKind, Scope, Target, walk
from apollo_fuse.passes.part_streams import part_streams
from tests.fusing import fuse_to_session
from tests.test_end_to_end import normal, text_model

JOINED = """g (float[1, N, {rows}, {columns}] x, float[1, 4, {rows}, {columns}] w, float[K, 1, 1] s)
  => (float[1, K, {rows}, {columns}] y, float[1, K, {rows}, {columns}] z) {{
    y = Concat<axis = 1>(x, w) m = Mul(y, s) z = Relu(m) }}"""
OPEN = Index.of(Symbol("n1"))


def rows(length: Index, dtype: DType = DType.FLOAT32, shared: Op | None = None) -> Kernel:
    """Two results of rows of one tensor, both of which may be behind the same function."""
    row, lane = Iterator("g0", Index.of(Symbol("n0"))), Iterator("r0", length)
    place = Index.of(row) * length + Index.of(lane)
    statements = []
    for number, op in enumerate((Op.ADD, Op.MUL)):
        builder = BlockBuilder()
        value = builder.add(Load("in0", (place,), dtype))
        if shared is not None:
            value = builder.add(Apply(shared, (value,), dtype))
        builder.add(Apply(op, (value, builder.add(Constant(3, dtype))), dtype))
        statements.append(Compute(f"S{number}", builder.build(), (Target(f"out{number}", place),)))
    size = row.extent * length
    buffers = tuple(Buffer(name, dtype, size, Scope.GLOBAL) for name in ("in0", "out0", "out1"))
    return Kernel("k0", buffers, (row,), (Loop(lane, LoopKind.LANE, tuple(statements)),))


def statements(kernel: Kernel) -> list[list[str]]:
    """Those of each lane loop."""
    loops = [step for step in walk(kernel.body) if isinstance(step, Loop)]
    return [[step.statement for step in loop.body if isinstance(step, Compute)] for loop in loops]


@pytest.mark.parametrize(
    "kernel",
    [rows(Index.of(196)), rows(Index.of(49)), rows(Index.of(196), DType.FLOAT64)]
    + [rows(Index.of(196), shared=Op.NEG)],
)
def test_rows_that_begin_anywhere_are_written_one_after_the_other(kernel: Kernel) -> None:
    assert statements(part_streams(kernel)) == [["S0"], ["S1"]]


@pytest.mark.parametrize(
    "kernel",
    [
        rows(Index.of(192)),  # each begins with a line
        rows(Index.of(8)),  # no vector
        rows(Index.of(6001)),  # no longer in the nearest cache when it is read again
        rows(OPEN),
        rows(Index.of(196), shared=Op.EXP),
    ],
)
def test_rows_for_which_it_is_no_gain_are_written_side_by_side(kernel: Kernel) -> None:
    assert part_streams(kernel) == kernel


def test_what_reads_the_other_result_stays_with_it() -> None:
    kernel = rows(Index.of(196))
    (loop,) = kernel.body
    assert isinstance(loop, Loop)
    first, second = loop.body
    assert isinstance(second, Compute) and isinstance(first, Compute)
    block = BlockBuilder()
    block.add(Load("out0", (first.targets[0].offset,), DType.FLOAT32))
    body = (first, replace(second, block=block.build()))
    kernel = replace(kernel, body=(replace(loop, body=body),))
    assert part_streams(kernel) == kernel


@pytest.mark.parametrize(("height", "width"), [(1, 17), (7, 7), (14, 14), (5, 205)])
def test_both_results_are_whole(height: int, width: int, tmp_path: Path, cache: Path) -> None:
    model = text_model(JOINED.format(rows=height, columns=width))
    shapes = {"x": (1, 3, height, width), "w": (1, 4, height, width), "s": (7, 1, 1)}
    fused = fuse_to_session(model, tmp_path, cache, shapes=shapes)
    assert not fused.unfused_nodes
    for expected, found in fused.run({name: normal(*shape) for name, shape in shapes.items()}).values():
        np.testing.assert_array_equal(found, expected)
