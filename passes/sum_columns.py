"""Adds up the rows of a loop over rows column by column, and the columns behind it.

A sum that lanes share ends in each row with their partial sums being added to one, which for a short row
takes as long as the row.  Here each lane has a sum of its own for all rows, and there is one end for all.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from apollo_fuse.expressions import Block, Load
from apollo_fuse.index import ZERO, Index, Iterator
from apollo_fuse.kernel import (
    Buffer,
    Compute,
    Initialise,
    Kernel,
    Loop,
    LoopKind,
    Scope,
    Step,
    Target,
    buffers_of,
    walk,
)

_MOST = 256  # lanes; behind a longer row, its end is a small part of it


def sum_columns(kernel: Kernel) -> Kernel:
    columns = _Columns(kernel)
    body = columns.steps(kernel.body)
    return replace(kernel, buffers=(*kernel.buffers, *columns.sums), body=body)


@dataclass(slots=True)
class _Columns:
    kernel: Kernel
    sums: list[Buffer] = field(default_factory=list)

    def steps(self, steps: tuple[Step, ...]) -> tuple[Step, ...]:
        result: list[Step] = []
        for step in steps:
            if isinstance(step, Loop) and step.kind is LoopKind.SEQUENTIAL:
                result += self._rows(step)
            else:
                result.append(step)
        return tuple(result)

    def _rows(self, rows: Loop) -> list[Step]:
        """The loop over rows with sums of columns, as far as possible, and what is before and behind it."""
        before: list[Step] = []
        after: list[Step] = []
        for lanes in [s for s in walk(rows.body) if isinstance(s, Loop) and s.kind is LoopKind.LANE]:
            for fold in [s for s in lanes.body if isinstance(s, Compute) and _may_be_spread(s, lanes, rows)]:
                assert fold.combine is not None
                (total,) = fold.targets
                name, dtype = f"{total.buffer}_columns", self.kernel.buffer(total.buffer).dtype
                column = Iterator(lanes.iterator.name, lanes.iterator.extent)
                own = Target(name, Index.of(column))
                self.sums.append(Buffer(name, dtype, column.extent, Scope.SHARED))
                before.append(Loop(column, LoopKind.LANE, (Initialise(own, fold.combine),)))
                each = Compute(
                    fold.statement, Block((Load(name, (own.offset,), dtype),)), (total,), fold.combine
                )
                after.append(Loop(column, LoopKind.LANE, (each,)))
                rows = _with(rows, fold, replace(fold, targets=(Target(name, Index.of(lanes.iterator)),)))
        return [*before, replace(rows, body=self.steps(rows.body)), *after]


def _may_be_spread(fold: Compute, lanes: Loop, rows: Loop) -> bool:
    """Whether it adds to one sum, in a register, that nothing else in the loop over rows is about."""
    if (
        fold.combine is None
        or lanes.limit is not None
        or (lanes.iterator.extent.constant or _MOST + 1) > _MOST
    ):
        return False
    (total,) = fold.targets
    others = tuple(s for s in walk(rows.body) if not isinstance(s, Loop) and s is not fold)
    return total.offset == ZERO and total.buffer not in buffers_of(others)


def _with(loop: Loop, old: Step, new: Step) -> Loop:
    """The loop with one step in it for another."""

    def changed(step: Step) -> Step:
        return _with(step, old, new) if isinstance(step, Loop) else new if step is old else step

    return replace(loop, body=tuple(map(changed, loop.body)))
