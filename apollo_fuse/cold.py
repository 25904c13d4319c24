"""What a run moves between a GPU and its memory where caches hold nothing at first.

A model's other operators run between its kernels, so what one run leaves in the caches is mostly gone before
the next.  Within a run of a group the last cache counts: what was read or written a moment ago is found there
as far as it fits. A second pass over a row rests on that, as does a kernel that reads what the one before has
written.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from apollo_fuse.codegen.triton.emit import Launch
from apollo_fuse.cost import missing, taken
from apollo_fuse.index import Symbol
from apollo_fuse.kernel import Kernel, KernelGroup, Scope, read_by
from apollo_fuse.machine import Machine
from apollo_fuse.strides import Numbers
from apollo_fuse.traffic import Traffic
from apollo_fuse.work import Work, work_of

_AT_ONCE = 8
"""Programs that a multiprocessor has in flight, about."""


@dataclass(frozen=True, slots=True)
class ColdTraffic:
    """Bytes from and to memory. compulsory: of the group's inputs and outputs, as far as they are touched."""

    moved: int
    compulsory: int


def cold_traffic(
    group: KernelGroup, launches: Iterable[Launch], sizes: Mapping[Symbol, int], machine: Machine
) -> ColdTraffic:
    """Of one run with these extents. `launches` are the group's, which say what lies in scratch."""
    near = machine.levels[-2].size
    assert near is not None, "a level nearer than memory has a size"
    scratch = {launch.kernel: launch.scratch for launch in launches}
    inputs, outputs = ({v.name for v in values} for values in (group.inputs, group.outputs))
    met: set[str] = set()
    moved = compulsory = 0.0
    for kernel in taken(group, sizes):
        work = work_of(kernel, sizes, machine)
        own = [traffic for traffic in work.traffic if traffic.scope is Scope.GLOBAL]
        share = missing(sum(traffic.lines for traffic in own), near)
        for traffic in own:
            is_first = traffic.buffer not in met and traffic.buffer in (
                outputs if traffic.is_write else inputs
            )
            moved += traffic.lines * (1.0 if is_first else share) + _again(kernel, work, traffic, machine)
            compulsory += traffic.touched if is_first else 0
        met |= {traffic.buffer for traffic in own}
        numbers = Numbers(sizes)
        left = sum(numbers.number(buffer.bytes) for buffer in scratch[kernel.name]) * work.items
        moved += left * missing(left, near)
    return ColdTraffic(round(moved), round(compulsory))


def _again(kernel: Kernel, work: Work, traffic: Traffic, machine: Machine) -> float:
    """Bytes that come back because a loop returns to them, or a later pass of the item does.

    Between two passes all items that are in flight have touched what they touch.
    """
    near = machine.levels[-2].size or 0
    returning = sum(again * missing(between, near) for between, again in traffic.again)
    if traffic.is_write:
        return returning
    passes = sum(traffic.buffer in read_by((step,)) for step in kernel.body)
    lines = sum(x.lines for x in work.traffic if x.scope is Scope.GLOBAL)
    flying = lines * min(1.0, _AT_ONCE * machine.cores / max(1, work.items))
    return returning + max(0, passes - 1) * traffic.lines * missing(round(flying), near)
