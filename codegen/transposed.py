"""Tiles whose reads or writes run along another axis than the lanes: moved as a whole, by transpose.h.

A lane loop whose accesses jump from lane to lane gathers or scatters element by element, and where the jump
is a power of two the elements of a tile push each other out of the cache.  Where the loop around the lanes
runs along the memory of such an access, the tile lies turned in an array on the stack instead: what is read
is moved there before the loop, what is written is moved from there behind it, and the lanes run along it.  A
tile that is only moved goes straight from memory to memory.
"""

from __future__ import annotations

from collections.abc import Iterator as Generator
from dataclasses import dataclass, field, replace

from apollo_fuse.codegen import expressions as c
from apollo_fuse.index import ZERO, Atom, Index, Iterator
from apollo_fuse.kernel import (
    Buffer,
    Compute,
    Kernel,
    Loop,
    LoopKind,
    Scope,
    Step,
    Target,
    lane_loops_of,
    part_of,
    read_by,
    walk,
    written_by,
)

_FEWEST = 4  # elements along an axis that are worth turning
_BLOCK = 32  # turns of a loop whose tiles would be too large, or are of open length
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
    if lane is None or not _is_worth_it(loop, lane) or moved(kernel, loop) is not None:
        return None
    found, left = Transposed(lane), _MOST_BYTES
    for is_read, access, jump in _turned(kernel, loop, lane):
        buffer, tiles = kernel.buffer(access.buffer), found.reads if is_read else found.writes
        base = access.offset.substitute({loop.iterator: ZERO, lane.iterator: ZERO})
        number = len(found.reads) + len(found.writes)
        tile = Tile(f"{buffer.name}_tile{number}", buffer, base, jump, loop.iterator, lane.iterator)
        if tile.bytes <= left:
            left -= tile.bytes
            tiles[access] = tile
    return found if found.reads or found.writes else None


def in_blocks(kernel: Kernel) -> Kernel:
    """The kernel with loops in blocks where the tiles of a whole loop would not stay near."""
    return replace(kernel, body=tuple(done for step in kernel.body for done in _in_blocks(kernel, step)))


def _in_blocks(kernel: Kernel, step: Step) -> list[Step]:
    if not isinstance(step, Loop) or step.kind is LoopKind.LANE:
        return [step]
    lane, extent = _lanes(step), step.iterator.extent
    if lane is None or step.limit is not None or not _are_too_large(kernel, step, lane):
        body = tuple(done for inner in step.body for done in _in_blocks(kernel, inner))
        return [replace(step, body=body)]
    block = Iterator(f"{step.iterator.name}_tile", extent // _BLOCK)
    inside = part_of(step, Index.of(block) * _BLOCK, Index.of(_BLOCK))
    steps: list[Step] = [Loop(block, LoopKind.SEQUENTIAL, (inside,))]
    done = block.extent * _BLOCK
    return steps if (extent - done).is_zero else [*steps, part_of(step, done, extent - done)]


def _are_too_large(kernel: Kernel, loop: Loop, lane: Loop) -> bool:
    """Whether tiles of the loop would be, and those of a block are not."""
    turns = loop.iterator.extent.constant
    if lane.iterator.extent.constant is None or turns is not None and turns <= _BLOCK:
        return False
    if moved(kernel, loop) is not None:
        return False
    turned = {(is_read, access) for is_read, access, _ in _turned(kernel, loop, lane)}
    row = sum(kernel.buffer(access.buffer).dtype.size for _, access in turned) * _size(lane.iterator)
    return 0 < row <= _MOST_BYTES // _BLOCK and (turns is None or turns * row > _MOST_BYTES)


@dataclass(frozen=True, slots=True)
class Side:
    """Where a tile lies in memory: each row begins `row` elements behind the one before.

    Where the loop's turns are rows that no such number lies between, as in a channel shuffle, it is None, and
    `base` is where the row of the turn at hand begins.
    """

    buffer: Buffer
    base: Index
    row: Index | None


@dataclass(frozen=True, slots=True)
class Move:
    """A tile that goes from memory to memory as it is, and so through no array.

    One side runs along the lanes, and the turns of the loop are its rows; the other runs along the loop.
    """

    loop: Loop
    lane: Loop
    to: Side
    source: Side
    writes_lanes: bool

    def lines(self, turns: str, lanes: str) -> list[str]:
        """C that moves this many turns of the loop, of so many lanes each."""
        name, bits = self.loop.iterator.name, 8 * self.to.buffer.dtype.size
        rows, columns = (turns, lanes) if self.writes_lanes else (lanes, turns)
        tables = any(side.row is None for side in (self.to, self.source))
        places: list[str] = []
        head: list[str] = []
        for side in (self.to, self.source):
            if side.row is None:
                head.append(f"int64_t {name}_at[{_size(self.loop.iterator)}];")
                each = f"for (int64_t {name} = 0; {name} < {turns}; {name}++)"
                head.append(f"{each} {name}_at[{name}] = {c.index(side.base)};")
                places += [side.buffer.name, "0", f"{name}_at"]
            else:
                places += [f"{side.buffer.name} + {c.index(side.base)}", c.index(side.row)]
                places += ["0"] if tables else []
        function = f"af_transpose_at_{bits}" if tables else f"af_transpose_{bits}"
        call = f"{function}({', '.join(places)}, {rows}, {columns});"
        return ["{", *(f"  {line}" for line in (*head, call)), "}"] if tables else [call]


def moved(kernel: Kernel, loop: Loop) -> Move | None:
    """The tile that is all that `loop` moves, if it moves one."""
    lane = _lanes(loop)
    if lane is not None and not _is_worth_it(loop, lane):
        return None
    step = lane.body[0] if lane is not None and len(loop.body) == len(lane.body) == 1 else None
    if lane is None or not isinstance(step, Compute) or step.combine is not None or len(step.targets) > 1:
        return None
    (target,), loads = step.targets, step.block.loads
    if not loads or len(step.block.instructions) > 1:
        return None
    to, source = kernel.buffer(target.buffer), kernel.buffer(loads[0].tensor)
    if to == source or {to.scope, source.scope} != {Scope.GLOBAL} or to.dtype != source.dtype:
        return None
    ends = (to, target.offset), (source, loads[0].indices[0])
    for writes_lanes, (along, across) in ((True, ends), (False, ends[::-1])):
        one, other = _along(*along, loop, lane), _across(*across, loop, lane)
        if one is not None and other is not None:
            return Move(loop, lane, *((one, other) if writes_lanes else (other, one)), writes_lanes)
    return None


def _along(buffer: Buffer, offset: Index, loop: Loop, lane: Loop) -> Side | None:
    """The side that runs along the lanes."""
    one, step = offset.coefficient(lane.iterator), offset.coefficient(loop.iterator)
    if one is None or not one.is_one or (step is not None and step.is_one):
        return None
    start = offset.substitute({lane.iterator: ZERO})
    if step is None or lane.iterator in step.atoms():
        return Side(buffer, start, None)
    return Side(buffer, start.substitute({loop.iterator: ZERO}), step)


def _across(buffer: Buffer, offset: Index, loop: Loop, lane: Loop) -> Side | None:
    """The side that runs along the loop."""
    jump = _jump(offset, loop, lane.iterator)
    start: dict[Atom, Index] = {lane.iterator: ZERO, loop.iterator: ZERO}
    return None if jump is None else Side(buffer, offset.substitute(start), jump)


def stack_bytes(kernel: Kernel) -> int:
    """Bytes of the largest loop's tiles."""
    loops = (transposed(kernel, step) for step in walk(kernel.body) if isinstance(step, Loop))
    return max(
        (sum(tile.bytes for tile in (*t.reads.values(), *t.writes.values())) for t in loops if t), default=0
    )


def _lanes(loop: Loop) -> Loop | None:
    """The lane loop that is all that `loop` holds, or the first of several that run alike."""
    inner = lane_loops_of(loop)
    if loop.kind is not LoopKind.SEQUENTIAL or not inner:
        return None
    lane = inner[0]
    alike = all(other.iterator == lane.iterator and other.limit == lane.limit for other in inner)
    depends = lane.limit is not None and loop.iterator in lane.limit.atoms()
    return lane if alike and not depends else None


def _is_worth_it(loop: Loop, lane: Loop) -> bool:
    return all((i.extent.constant or 0) >= _FEWEST for i in (loop.iterator, lane.iterator))


def _turned(kernel: Kernel, loop: Loop, lane: Loop) -> Generator[tuple[bool, Target, Index]]:
    """Each read (True) and write (False) of memory that runs along the loop, once, and its jump by lanes."""
    written, read = written_by(loop.body), read_by(loop.body)
    for is_read, access in dict.fromkeys(_accesses(loop)):
        shared = access.buffer in (written if is_read else read)
        jump = _jump(access.offset, loop, lane.iterator)
        if jump is not None and not shared and kernel.buffer(access.buffer).scope is Scope.GLOBAL:
            yield is_read, access, jump


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
