"""Lets a work item write several rows where each takes an element from many columns.

Columns lie in memory as they come, often at the same place of a page each: their lines push each other out of
the nearest cache, which holds eight of them or twelve.  An item of one row reads a line of each for one
element, and finds none of them again.  With as many rows as a line holds elements, each line is read once.
Rows that are work for a thread each hide that, and stay apart.
"""

from __future__ import annotations

from collections.abc import Iterator as Generator
from collections.abc import Sequence
from dataclasses import replace

from apollo_fuse.index import ONE, Iterator
from apollo_fuse.kernel import (
    Compute,
    Kernel,
    Loop,
    LoopKind,
    Scope,
    Step,
    in_blocks_of,
    read_by,
    walk,
    work,
    written_by,
)
from apollo_fuse.passes.tile_and_map import GRAIN

_ROWS = 16  # elements of 4 bytes in a line
_MANY = 8  # lines that every nearest cache holds of one place in a page
_TOGETHER = 4
"""Columns that one loop takes from. Loops of one run no faster, and take a compiler four times as long."""


def tile_rows(kernel: Kernel) -> Kernel:
    if not kernel.grid or not all(_is_alone(kernel, step) for step in kernel.body):
        return kernel
    if read_by(kernel.body) & written_by(kernel.body):
        return kernel
    *outer, row = kernel.grid
    if len(_columns(kernel, row)) <= _MANY:
        return kernel
    cheap = work(kernel.body).constant
    if cheap is None or _ROWS * cheap > GRAIN:
        return kernel
    tiles = [in_blocks_of(Loop(row, LoopKind.SEQUENTIAL, steps), _ROWS) for steps in _parts(kernel.body)]
    block, _ = tiles[0]  # alike for all
    return replace(kernel, grid=(*outer, block), body=tuple(loop for _, loop in tiles))


def _is_alone(kernel: Kernel, step: Step) -> bool:
    """Whether it writes elements of tensors and nothing else."""
    match step:
        case Loop(_, LoopKind.LANE, body):
            return all(isinstance(one, Compute) and _is_alone(kernel, one) for one in body)
        case Compute(_, _, targets, None):
            return all(kernel.buffer(target.buffer).scope is Scope.GLOBAL for target in targets)
        case _:
            return False


def _parts(body: Sequence[Step]) -> Generator[tuple[Step, ...]]:
    """The steps, a few at a time, in any order."""
    single: list[Step] = []
    for step in body:
        if isinstance(step, Loop):
            yield from ((replace(step, body=few),) for few in _few(step.body))
        else:
            single.append(step)
    yield from _few(single)


def _few(steps: Sequence[Step]) -> list[tuple[Step, ...]]:
    return [tuple(steps[start : start + _TOGETHER]) for start in range(0, len(steps), _TOGETHER)]


def _columns(kernel: Kernel, row: Iterator) -> set[str]:
    """The tensors of which neighbouring rows read neighbouring elements."""
    loads = (load for step in walk(kernel.body) if isinstance(step, Compute) for load in step.block.loads)
    offsets = ((load.tensor, load.indices[0]) for load in loads)
    return {
        tensor for tensor, offset in offsets if offset.iterators() == {row} and offset.coefficient(row) == ONE
    }
