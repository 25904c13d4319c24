"""Gives each statement a lane loop of its own where many write side by side into the rows of one tensor.

Columns that are put together (a concatenation along a short axis) have stores that jump from lane to lane.
A compiler makes vectors of one such store, and of a few that fill rows; of many in one loop it may or may
not, by their order.  The rows of a tile stay in the nearest cache from one loop to the next.
"""

from __future__ import annotations

from dataclasses import replace

from apollo_fuse.kernel import Compute, Kernel, Loop, Scope, Step, is_scattered, with_lane_loops

_TOGETHER = 4  # stores that jump, up to which one loop is left as it is


def distribute_lanes(kernel: Kernel) -> Kernel:
    def parts(loop: Loop) -> list[Step]:
        return [replace(loop, body=(one,)) for one in loop.body] if _parts(kernel, loop) else [loop]

    return replace(kernel, body=with_lane_loops(kernel.body, parts))


def _parts(kernel: Kernel, loop: Loop) -> bool:
    """Whether each step computes by itself, into memory, and many of their stores jump."""
    jumping = 0
    written: set[str] = set()
    read: set[str] = set()
    for step in loop.body:
        if not isinstance(step, Compute) or step.combine is not None:
            return False
        if any(kernel.buffer(t.buffer).scope is not Scope.GLOBAL for t in step.targets):
            return False
        jumping += any(is_scattered(target.offset, loop.iterator) for target in step.targets)
        written |= {target.buffer for target in step.targets}
        read |= {load.tensor for load in step.block.loads}
    return jumping > _TOGETHER and not written & read
