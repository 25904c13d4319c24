"""Tiles whose reads or writes run along another axis than the lanes: moved as a whole, by transpose.h.

A lane loop whose accesses jump from lane to lane gathers or scatters element by element, and where the jump
is a power of two the elements of a tile push each other out of the cache.  Where the loop around the lanes
runs along the memory of such an access, the tile lies turned in an array on the stack instead: what is read
is moved there before the loop, what is written is moved from there behind it, and the lanes run along it.
"""

from __future__ import annotations

from collections.abc import Iterator as Generator
from dataclasses import dataclass, field

from apollo_fuse.codegen import expressions as c
from apollo_fuse.index import ZERO, Atom, Index, Iterator
from apollo_fuse.kernel import (
    Buffer,
    Compute,
    Kernel,
    Loop,
    LoopKind,
    Scope,
    Target,
    read_by,
    walk,
    written_by,
)

_FEWEST = 4  # elements along an axis that are worth turning
_MOST_BYTES = 32 * 1024  # of one loop's tiles, to stay in the nearest cache or close to it


@dataclass(frozen=True, slots=True)
class Tile:
    """An array in which element ``[r][c]`` is that at ``base + r + c*jump`` of the buffer."""

    name: str
    buffer: Buffer
    base: Index
    jump: Index
    row: Iterator  # runs along the buffer's memory
    column: Iterator  # the lanes

    @property
    def bytes(self) -> int:
        return _size(self.row) * _size(self.column) * self.buffer.dtype.size

    @property
    def declaration(self) -> str:
        elements = _size(self.row) * _size(self.column)
        return f"_Alignas(64) {c.STORAGE[self.buffer.dtype]} {self.name}[{elements}];"

    @property
    def place(self) -> str:
        """The element of the iteration at hand."""
        return f"{self.name}[{self.row.name} * {_size(self.column)} + {self.column.name}]"

    def read(self, rows: str, columns: str) -> str:
        return self._turn(f"{self.name}, {_size(self.column)}, {self._memory}, {rows}, {columns}")

    def write(self, rows: str, columns: str) -> str:
        return self._turn(f"{self._memory}, {self.name}, {_size(self.column)}, {columns}, {rows}")

    @property
    def _memory(self) -> str:
        return f"{self.buffer.name} + {c.index(self.base)}, {c.index(self.jump)}"

    def _turn(self, arguments: str) -> str:
        return f"af_transpose_{8 * self.buffer.dtype.size}({arguments});"


@dataclass(frozen=True, slots=True)
class Transposed:
    """The tiles of a loop, by the accesses that they serve; `lane` is a loop inside, alike to the others."""

    lane: Loop
    reads: dict[Target, Tile] = field(default_factory=dict)
    writes: dict[Target, Tile] = field(default_factory=dict)


def transposed(kernel: Kernel, loop: Loop) -> Transposed | None:
    """What runs along the memory of `loop` and jumps along the lane loops in it, if anything does."""
    lane = _lanes(loop)
    if lane is None:
        return None
    found, left = Transposed(lane), _MOST_BYTES
    written, read = written_by(loop.body), read_by(loop.body)
    for is_read, access in _accesses(loop):
        buffer, tiles = kernel.buffer(access.buffer), found.reads if is_read else found.writes
        shared = access.buffer in (written if is_read else read)
        if access in tiles or shared or buffer.scope is not Scope.GLOBAL:
            continue
        jump = _jump(access.offset, loop, lane.iterator)
        if jump is None:
            continue
        base = access.offset.substitute({loop.iterator: ZERO, lane.iterator: ZERO})
        number = len(found.reads) + len(found.writes)
        tile = Tile(f"{buffer.name}_tile{number}", buffer, base, jump, loop.iterator, lane.iterator)
        if tile.bytes <= left:
            left -= tile.bytes
            tiles[access] = tile
    return found if found.reads or found.writes else None


def stack_bytes(kernel: Kernel) -> int:
    """Bytes of the largest loop's tiles."""
    loops = (transposed(kernel, step) for step in walk(kernel.body) if isinstance(step, Loop))
    return max(
        (sum(tile.bytes for tile in (*t.reads.values(), *t.writes.values())) for t in loops if t), default=0
    )


def _lanes(loop: Loop) -> Loop | None:
    """The lane loop that is all that `loop` holds, or the first of several that run alike."""
    inner = [step for step in loop.body if isinstance(step, Loop) and step.kind is LoopKind.LANE]
    if loop.kind is not LoopKind.SEQUENTIAL or not inner or len(inner) < len(loop.body):
        return None
    lane = inner[0]
    alike = all(other.iterator == lane.iterator and other.limit == lane.limit for other in inner)
    depends = lane.limit is not None and loop.iterator in lane.limit.atoms()
    worth_it = all((i.extent.constant or 0) >= _FEWEST for i in (loop.iterator, lane.iterator))
    return lane if alike and not depends and worth_it else None


def _accesses(loop: Loop) -> Generator[tuple[bool, Target]]:
    """Each read (True) and each write (False) in the lanes."""
    for step in walk(loop.body):
        if isinstance(step, Compute) and step.combine is None:
            yield from ((True, Target(load.tensor, load.indices[0])) for load in step.block.loads)
            yield from ((False, target) for target in step.targets)


def _jump(offset: Index, loop: Loop, lane: Iterator) -> Index | None:
    """Elements from lane to lane, where the loop runs along memory and nothing inside the lanes matters."""
    inside: set[Atom] = {s.iterator for s in walk(loop.body) if isinstance(s, Loop) and s.iterator != lane}
    along, jump = offset.coefficient(loop.iterator), offset.coefficient(lane)
    if along is None or not along.is_one or jump is None or inside & offset.atoms():
        return None
    return None if jump.is_zero or jump.is_one or loop.iterator in jump.atoms() else jump


def _size(axis: Iterator) -> int:
    size = axis.extent.constant
    assert size is not None, "a tile's axes have known lengths"
    return size
