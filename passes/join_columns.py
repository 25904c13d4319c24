"""Writes columns of a tensor in the work items that write the rest of their rows.

Where rows are put together of wide parts and of single columns (a concatenation of encoded features and
numbers), nothing makes isl share their loops, and a kernel of columns touches a line of memory for each
element. Beside the rest of the row, whose lines are near, one costs little, though it is computed alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from apollo_fuse.index import Atom, Index, Iterator
from apollo_fuse.kernel import Compute, Kernel, Loop, LoopKind, Scope, Step, substituted, walk

_CHEAP = 4  # cost (see Block.cost) of an element up to which it may be computed alone


def join_columns(kernels: Sequence[Kernel], by_items: Sequence[Kernel | None]) -> tuple[Kernel, ...]:
    """The kernels, none of which needs another; fewer where some are columns beside the rows of others.

    by_items: each kernel without lanes, where it is known and has no loops but its grid.
    """
    joined: dict[int, Kernel] = dict(enumerate(kernels))
    for place, columns in enumerate(by_items):
        if columns is None or joined[place] is not kernels[place]:  # what joined it is not in `columns`
            continue
        for other, rows in joined.items():
            steps = _beside(columns, rows) if other != place else None
            if steps is not None:
                joined[other] = replace(rows, body=(*rows.body, *steps))
                del joined[place]
                break
    return tuple(replace(kernel, name=f"k{n}") for n, kernel in enumerate(joined.values()))


def _beside(columns: Kernel, rows: Kernel) -> tuple[Step, ...] | None:
    """The steps of the columns in the items of the rows, if each is cheap and writes in a row of an item."""
    if [axis.extent for axis in columns.grid] != [axis.extent for axis in rows.grid]:
        return None
    values: dict[Atom, Index] = {old: Index.of(new) for old, new in zip(columns.grid, rows.grid, strict=True)}
    steps = tuple(substituted(step, values) for step in columns.body)
    cheap = [step for step in steps if isinstance(step, Compute) and step.block.cost <= _CHEAP]
    if len(cheap) < len(steps):
        return None
    written = _written_in_lanes(rows)
    for target in (target for step in cheap for target in step.targets):
        row = written.get(target.buffer) if columns.buffer(target.buffer).scope is Scope.GLOBAL else None
        if row is None or not _in_row(target.offset, *row, rows.grid):
            return None
    return steps


def _written_in_lanes(kernel: Kernel) -> dict[str, tuple[Index, Iterator]]:
    """Of what lanes write, where and with which lanes."""
    return {
        target.buffer: (target.offset, loop.iterator)
        for loop in walk(kernel.body)
        if isinstance(loop, Loop) and loop.kind is LoopKind.LANE
        for step in loop.body
        if isinstance(step, Compute)
        for target in step.targets
    }


def _in_row(column: Index, row: Index, lane: Iterator, grid: Sequence[Iterator]) -> bool:
    """Whether items step through both alike, over elements that lie side by side in an item of the rows."""
    along = row.coefficient(lane)
    if along is None or not along.is_one:
        return False
    steps = ((column.coefficient(axis), row.coefficient(axis)) for axis in grid)
    return all(own is not None and own == other for own, other in steps)
