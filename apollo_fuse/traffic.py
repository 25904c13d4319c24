"""What a kernel does to its buffers: distinct bytes, the cache lines they lie in, and what is read again.

All of it follows from the strides of the accesses and the loops around them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from apollo_fuse.codegen.expressions import compute_bytes
from apollo_fuse.index import Atom, Index, Iterator
from apollo_fuse.kernel import Kernel, Scope
from apollo_fuse.strides import Numbers


@dataclass(frozen=True, slots=True)
class Traffic:
    """What a kernel does to one buffer, in bytes.

    touched: distinct bytes. lines: of the cache lines that they lie in. accessed: all reads or writes.
    again: for each loop that comes back to the same lines, bytes touched between two of its turns and bytes
        that are then read once more, the outermost first.
    """

    buffer: str
    scope: Scope
    is_write: bool
    touched: int
    lines: int
    accessed: int
    again: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Access:
    """A read or write with the loops around it, the outermost first."""

    buffer: str
    size: int  # bytes of an element
    strides: Mapping[Atom, int]
    start: int
    loops: tuple[Iterator, ...]
    depends: frozenset[Iterator]
    is_write: bool


@dataclass(frozen=True, slots=True)
class Footprints:
    """The accesses of a kernel; `turns` of tiles that end early, `line` bytes of a cache line."""

    kernel: Kernel
    numbers: Numbers
    line: int
    accesses: Sequence[Access]
    turns: Mapping[Iterator, float]

    def of(self, name: str) -> list[Traffic]:
        """What is read of the buffer with this name, and what is written to it."""
        buffer = self.kernel.buffer(name)
        if buffer.scope is Scope.REGISTER:
            return []
        size = buffer.dtype.size if buffer.scope is Scope.GLOBAL else compute_bytes(buffer.dtype)
        whole = self.numbers.number(buffer.size) * size
        found: list[Traffic] = []
        for is_write in (False, True):
            own = [a for a in self.accesses if a.buffer == name and a.is_write == is_write]
            if not own:
                continue
            every = frozenset(i for a in own for i in a.loops)
            touched, lines = self._footprint(own, every, whole)
            accessed = round(
                sum(
                    a.size * math.prod(self.turns.get(i, self.numbers.extent(i)) for i in a.loops)
                    for a in own
                )
            )
            found.append(
                Traffic(
                    name, buffer.scope, is_write, touched, lines, accessed, self._again(own[0], lines, whole)
                )
            )
        return found

    def _footprint(self, accesses: list[Access], loops: frozenset[Iterator], whole: int) -> tuple[int, int]:
        """Distinct bytes that the accesses to one buffer touch in these loops, and those of their lines."""
        groups: dict[tuple[tuple[Atom, int], ...], set[int]] = {}
        for access in accesses:
            groups.setdefault(tuple(access.strides.items()), set()).add(access.start)
        size = accesses[0].size
        touched = lines = 0
        for strides, starts in groups.items():
            moving = dict(strides)
            span = self.numbers.span(moving, loops) + max(starts) - min(starts)
            counts = {atom: self.numbers.values(atom, loops) for atom in moving}
            under = frozenset(i for atom in moving for i in Index.of(atom).iterators()) & loops
            points = min(math.prod(counts.values()), math.prod(max(1, self.numbers.extent(i)) for i in under))
            distinct = min(points * len(starts), span)
            step = min((abs(s) for atom, s in moving.items() if counts[atom] > 1), default=1)
            each = min(max(1, step // len(starts)) * size, self.line)
            touched += distinct * size
            lines += max(
                min(distinct * each, -(-span * size // self.line) * self.line),
                distinct * size,
            )
        return min(touched, whole), min(lines, max(whole, self.line))

    def _again(self, access: Access, lines: int, whole: int) -> tuple[tuple[int, int], ...]:
        """Loops that the access does not depend on, around others that it does."""
        found: list[tuple[int, int]] = []
        times = 1
        for place, loop in enumerate(access.loops):
            turns = self.numbers.extent(loop)
            inner = access.loops[place + 1 :]
            if loop in access.depends or turns < 2 or not any(i in access.depends for i in inner):
                continue
            found.append((self._between(frozenset(inner)), lines * times * (turns - 1)))
            times *= turns
        return tuple(found)

    def _between(self, loops: frozenset[Iterator]) -> int:
        """Bytes of all buffers that are touched in one turn around these loops."""
        total = 0
        for name in {a.buffer for a in self.accesses}:
            own = [a for a in self.accesses if a.buffer == name and loops & set(a.loops)]
            if own:
                whole = self.numbers.number(self.kernel.buffer(name).size) * own[0].size
                total += self._footprint(own, loops, whole)[1]
        return total
