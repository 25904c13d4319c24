"""Writes columns of a tensor in the work items that write the rest of their rows.

Where rows are put together of wide parts and of single columns (a concatenation of encoded features and
numbers), nothing makes isl share their loops, and a kernel of columns touches a line of memory for each
element. Beside the rest of the row, whose lines are near, one costs little, though it is computed alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from apollo_fuse.index import Atom, Index
from apollo_fuse.kernel import Compute, Kernel, Loop, LoopKind, Scope, Target, substituted, walk

_CHEAP = 4  # cost (see Block.cost) of an element up to which it may be computed alone


def join_columns(kernels: Sequence[Kernel], by_items: Sequence[Kernel | None]) -> tuple[Kernel, ...]:
    """The kernels, none of which needs another; fewer where some are columns beside the rows of others.

    by_items: each kernel without lanes, where it is known and has no loops but its grid.
    """
    joined: dict[int, Kernel] = dict(enumerate(kernels))
    for place, columns in enumerate(by_items):
        for rows in range(len(kernels)):
            if columns is None or rows == place or rows not in joined or not _belong(columns, joined[rows]):
                continue
            values: dict[Atom, Index] = {
                old: Index.of(new) for old, new in zip(columns.grid, joined[rows].grid, strict=True)
            }
            inside = tuple(substituted(step, values) for step in columns.body)
            joined[rows] = replace(joined[rows], body=(*joined[rows].body, *inside))
            del joined[place]
            break
    return tuple(replace(kernel, name=f"k{n}") for n, kernel in enumerate(joined.values()))


def _belong(columns: Kernel, rows: Kernel) -> bool:
    """Whether each element of the columns is cheap, and stands in a row that an item of the other writes."""
    extents = [[axis.extent for axis in kernel.grid] for kernel in (columns, rows)]
    if extents[0] != extents[1] or not all(isinstance(step, Compute) for step in columns.body):
        return False
    steps = {
        target.buffer: (target, loop)
        for loop in walk(rows.body)
        if isinstance(loop, Loop) and loop.kind is LoopKind.LANE
        for step in loop.body
        if isinstance(step, Compute)
        for target in step.targets
    }
    return all(
        isinstance(step, Compute)
        and step.block.cost <= _CHEAP
        and all(
            columns.buffer(t.buffer).scope is Scope.GLOBAL
            and t.buffer in steps
            and _in_row(t, columns, *steps[t.buffer], rows)
            for t in step.targets
        )
        for step in columns.body
    )


def _in_row(column: Target, columns: Kernel, row: Target, loop: Loop, rows: Kernel) -> bool:
    """Whether items step through both alike, over elements that lie side by side in an item of the rows."""
    along = row.offset.coefficient(loop.iterator)
    steps = [
        (column.offset.coefficient(own), row.offset.coefficient(other))
        for own, other in zip(columns.grid, rows.grid, strict=True)
    ]
    alike = all(own is not None and own == other for own, other in steps)
    return alike and along is not None and along.is_one
