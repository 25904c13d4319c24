"""Which kernels of a group can run side by side: those that read nothing that another of them writes.

Each element of an output is written once, so that kernels may write parts of one tensor together.  Where one
adds up in a tensor, or keeps something of its own in what it has not yet written, it has that for itself.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from apollo_fuse.kernel import (
    Compute,
    Copy,
    Initialise,
    Kernel,
    KernelGroup,
    Loop,
    Scope,
    indexed_by,
    read_by,
    walk,
    written_by,
)


@dataclass(frozen=True, slots=True)
class _Touched:
    """Tensors that a kernel reads, writes, and has for itself."""

    read: frozenset[str]
    written: frozenset[str]
    own: frozenset[str]

    def precedes(self, other: _Touched) -> bool:
        """Whether the other kernel, which stands behind it, has to wait for it."""
        every, others = (x.read | x.written | x.own for x in (self, other))
        apart = not (self.own & others or other.own & every)
        return not apart or bool(self.written & other.read or self.read & other.written)


def stages(group: KernelGroup) -> tuple[int, ...]:
    """For each kernel the stage that it runs in, behind all of those before it.

    No stage has kernels of two forms: those of a form that a run does not take are no launch of it.
    """
    touched = [_touched(kernel) for kernel in group.kernels]
    found: list[int] = []
    for place, kernel in enumerate(group.kernels):
        before = (
            found[k]
            for k in range(place)
            if group.kernels[k].form != kernel.form or touched[k].precedes(touched[place])
        )
        found.append(1 + max(before, default=-1))
    return tuple(found)


def _touched(kernel: Kernel) -> _Touched:
    local = {b.name: b for b in kernel.buffers if b.scope is not Scope.GLOBAL}
    hosts = {b.host for b in local.values() if b.host is not None} - local.keys()
    written = written_by(kernel.body) - local.keys()
    folded = set(_folded(kernel)) - local.keys()
    read = (read_by(kernel.body) | indexed_by(kernel.body)) - local.keys()
    return _Touched(frozenset(read), frozenset(written), frozenset(hosts | folded))


def _folded(kernel: Kernel) -> Iterable[str]:
    """What the kernel sets to a start, or adds to."""
    for step in walk(kernel.body):
        match step:
            case Compute(_, _, targets, combine) if combine is not None:
                yield from (target.buffer for target in targets)
            case Initialise(target, _):
                yield target.buffer
            case Compute() | Copy() | Loop():
                pass
