"""Gives each statement a lane loop of its own where many write side by side into the rows of one tensor.

Columns that are put together (a concatenation along a short axis) have stores that jump from lane to lane.
A compiler makes vectors of one such store, and of a few that fill rows; of many in one loop it may or may
not, by their order.  The rows of a tile stay in the nearest cache from one loop to the next.
"""

from __future__ import annotations

from dataclasses import replace

from apollo_fuse.kernel import (
    Compute,
    Kernel,
    Loop,
    Scope,
    Step,
    is_scattered,
    read_by,
    with_lane_loops,
    written_by,
)

_TOGETHER = 4  # stores that jump, up to which one loop is left as it is


def distribute_lanes(kernel: Kernel) -> Kernel:
    def parts(loop: Loop) -> list[Step]:
        return one_each(loop) if _jumps_much(kernel, loop) else [loop]

    return replace(kernel, body=with_lane_loops(kernel.body, parts))


def one_each(loop: Loop) -> list[Step]:
    """A loop for each statement; the loop as it is where one combines, or reads what the loop writes."""
    alone = all(isinstance(step, Compute) and step.combine is None for step in loop.body)
    if not alone or written_by(loop.body) & read_by(loop.body):
        return [loop]
    return [replace(loop, body=(step,)) for step in loop.body]


def _jumps_much(kernel: Kernel, loop: Loop) -> bool:
    """Whether the loop writes memory alone, and many of its stores jump."""
    if any(kernel.buffer(name).scope is not Scope.GLOBAL for name in written_by(loop.body)):
        return False
    computes = [step for step in loop.body if isinstance(step, Compute)]
    jumping = [
        any(is_scattered(target.offset, loop.iterator) for target in step.targets) for step in computes
    ]
    return sum(jumping) > _TOGETHER
