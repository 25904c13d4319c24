"""Fills the rows of a tensor in blocks that stay near, where many lane loops write a column of them each.

Columns that are put together (a concatenation along a short axis) have stores that jump from row to row, each
loop all over the tensor: lines that hold a part of many columns come back from further away for each of them.
With so many rows at a time as the nearest cache holds, they are filled there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from apollo_fuse.index import Index, Iterator
from apollo_fuse.kernel import Compute, Kernel, Loop, LoopKind, Scope, Step, in_blocks_of

_FEWEST = 4  # columns
_NEAR = 16 * 1024  # bytes of rows, which leave room for what is read
_LANES = 16


@dataclass(frozen=True, slots=True)
class _Columns:
    """What loops have in common that each write a column of the same rows, of so many bytes each."""

    lane: Iterator
    limit: Index | None
    tensor: str
    row_bytes: int


def near_rows(kernel: Kernel) -> Kernel:
    return replace(kernel, body=_near(kernel, kernel.body))


def _near(kernel: Kernel, steps: Sequence[Step]) -> tuple[Step, ...]:
    done: list[Step] = []
    for columns, group in groupby(steps, lambda step: _columns(kernel, step)):
        run = list(group)
        if columns is None:
            done += [replace(s, body=_near(kernel, s.body)) if isinstance(s, Loop) else s for s in run]
            continue
        loops = [step for step in run if isinstance(step, Loop)]
        rows = max(_NEAR // columns.row_bytes // _LANES, 1) * _LANES
        known = columns.lane.extent.constant
        is_near = known is not None and known <= rows
        done += loops if is_near or len(loops) < _FEWEST else [_in_blocks(loops, rows)]
    return tuple(done)


def _columns(kernel: Kernel, step: Step) -> _Columns | None:
    if not isinstance(step, Loop) or step.kind is not LoopKind.LANE:
        return None
    written: set[tuple[str, int]] = set()
    for compute in step.body:
        if not isinstance(compute, Compute) or compute.combine is not None:
            return None
        for target in compute.targets:
            buffer, jump = kernel.buffer(target.buffer), target.offset.coefficient(step.iterator)
            elements = None if jump is None else jump.constant
            if buffer.scope is not Scope.GLOBAL or elements is None or elements < 2:
                return None
            written.add((buffer.name, elements * buffer.dtype.size))
    if len(written) != 1:
        return None
    ((tensor, row_bytes),) = written
    return _Columns(step.iterator, step.limit, tensor, row_bytes)


def _in_blocks(loops: Sequence[Loop], rows: int) -> Loop:
    parts = [in_blocks_of(loop, rows, "near") for loop in loops]
    block, _ = parts[0]  # alike for all
    return Loop(block, LoopKind.SEQUENTIAL, tuple(inner for _, inner in parts))
