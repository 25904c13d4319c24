"""Where the threads of a program have to wait for each other: between steps that meet in memory.

What one thread writes, another reads or overwrites behind a barrier alone, and what one reads, another
overwrites behind one.  The lanes of one loop do not meet, whatever they touch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from apollo_fuse.kernel import Compute, Copy, Initialise, Loop, Step, Target, walk


@dataclass(slots=True)
class Barriers:
    """`memory` names the tensor or scratch that each buffer lies in; a value of the program is in none.

    `is_at_hand` tells whether an element is still a value, and need not be read.
    """

    memory: Mapping[str, str]
    shared: frozenset[str]  # the memory that the kernel both reads and writes
    is_at_hand: Callable[[Target], bool]
    _written: set[str] = field(default_factory=set)  # since the last barrier
    _read: set[str] = field(default_factory=set)

    def needed_before(self, step: Step) -> bool:
        """Whether the step has to wait; a loop, for what was touched before it."""
        touched = [self._touched(leaf) for leaf in walk((step,))]
        meet = any((read | written) & self._written or written & self._read for read, written in touched)
        if meet:
            self._written, self._read = set(), set()
        if not isinstance(step, Loop):
            self._note(touched)
        return meet

    def foresee(self, loop: Loop) -> None:
        """The turns of a loop follow each other: what one touches was touched by the one before."""
        self._note([self._touched(leaf) for leaf in walk(loop.body)])

    def _note(self, touched: Iterable[tuple[set[str], set[str]]]) -> None:
        for read, written in touched:
            self._read |= read
            self._written |= written

    def _touched(self, step: Step) -> tuple[set[str], set[str]]:
        read, written = _accesses(step)
        elsewhere = {target.buffer for target in read if not self.is_at_hand(target)}
        return self._places(elsewhere) & self.shared, self._places(written) & self.shared

    def _places(self, buffers: set[str]) -> set[str]:
        return {self.memory[name] for name in buffers if name in self.memory}


def shared_memory(steps: tuple[Step, ...], memory: Mapping[str, str]) -> frozenset[str]:
    """The memory that some of the steps read and some write."""
    read: set[str] = set()
    written: set[str] = set()
    for step in walk(steps):
        sources, targets = _accesses(step)
        read |= {memory[source.buffer] for source in sources if source.buffer in memory}
        written |= {memory[name] for name in targets if name in memory}
    return frozenset(read & written)


def _accesses(step: Step) -> tuple[set[Target], set[str]]:
    """The elements that a step itself reads, and the buffers that it writes."""
    match step:
        case Compute(_, block, targets, combine):
            read = {Target(load.tensor, load.indices[0]) for load in block.loads}
            return read | set(targets if combine is not None else ()), {x.buffer for x in targets}
        case Copy(source, target):
            return {source}, {target.buffer}
        case Initialise(target, _):
            return set(), {target.buffer}
        case Loop():
            return set(), set()
