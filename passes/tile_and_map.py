"""From a schedule tree to kernels: grid axes, lanes, tiles, and buffers in their scopes.

The outer coincident band becomes the grid.  What lies below it becomes loop nests, one after the
other; tensors that pass between nests live in the work item's own memory (memory stitching).  The
lane axis is the one along which most accesses are contiguous: an axis of the grid, tiled, or the
innermost loop of each nest.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from apollo_fuse.graph import Refused
from apollo_fuse.index import ONE, ZERO, Atom, Index, Iterator, product, unclamped
from apollo_fuse.kernel import SCATTERED, Kernel, KernelGroup, LoopKind, is_scattered
from apollo_fuse.passes.collapse_axes import collapse_grid, collapse_loops, join_short_axes
from apollo_fuse.passes.distribute_lanes import distribute_lanes
from apollo_fuse.passes.fuse_nests import fuse_nests
from apollo_fuse.passes.invert_divisors import invert_divisors
from apollo_fuse.passes.join_columns import join_columns
from apollo_fuse.passes.loop_fusion import Fused, Sequence, Tree
from apollo_fuse.passes.memory_stitching import Lanes, MemoryStitching, Overflow
from apollo_fuse.passes.nests import Nests, build_nests, statements_of
from apollo_fuse.passes.split_reductions import FEW
from apollo_fuse.scop import Scop

RULE = "tile_and_map"
_REDUCED = 8  # elements that become one, from which on writing that one to memory costs little
GRAIN = 1 << 19
"""Cheap operations that are worth a thread of a CPU, as runtime/compute.c has it."""
_VECTOR = 4  # elements that are worth a vector
_NEARLY = 1.01  # of a norm that reads along one axis and writes along another, its weights are the rest
_OPEN = 256  # what an open extent counts for where axes are compared


@dataclass(frozen=True, slots=True)
class Tiles:
    """Tile sizes in elements. A tile is what one work item covers of an axis."""

    lanes: int = 1024  # of an elementwise kernel
    accumulators: int = 128  # lanes that each keep an accumulator
    transposed: int = 32  # of an axis that reads run along while writes run along another
    unrolled: int = 8  # greatest extent of an axis that is unrolled inside the lanes
    whole: int = 4096  # an axis known to be at most this long is not tiled


@dataclass(frozen=True, slots=True)
class TileAndMap:
    """From a schedule to its kernels.

    Where statements share no outer loop, kernels pass the results of reductions to each other through memory.
    Anything larger is refused, or could be computed again. `alone` says that the statements are those of
    one operator, which cannot be grouped in another way: then everything may pass through memory, and a
    kernel may run serially.
    """

    alone: bool = False
    tiles: Tiles = Tiles()
    memory_stitching: MemoryStitching = MemoryStitching()

    def __call__(self, fused: Fused) -> KernelGroup | Overflow | Refused:
        scop = fused.scop
        parts = fused.tree.children if isinstance(fused.tree, Sequence) else (fused.tree,)
        crossing = _crossing(scop, parts)
        whole = _not_reduced(scop, crossing)
        if whole and not self.alone:
            names = tuple(s.name for s in scop.statements)
            evidence = f"{', '.join(whole)} would pass through memory"
            refused = Refused(names, RULE, "statements do not share an outer loop", evidence)
            return Overflow(tuple(whole), refused)
        temporaries = tuple(v for v in scop.kept if v.name in crossing)
        scop = replace(
            scop, kept=tuple(v for v in scop.kept if v.name not in crossing), temporaries=temporaries
        )
        kernels: list[Kernel] = []
        by_items: list[Kernel | None] = []
        for number, tree in enumerate(parts):
            nests = build_nests(scop, tree, serial=self.alone)
            if isinstance(nests, Refused):
                return nests
            nests = join_short_axes(collapse_grid(nests), self.tiles.transposed)
            nests = invert_divisors(fuse_nests(collapse_loops(nests)))
            kernel = self._map(f"k{number}", nests)
            if not isinstance(kernel, Kernel):
                return kernel
            kernels.append(distribute_lanes(kernel))
            by_items.append(self._by_items(nests) if len(parts) > 1 else None)
        ordered = isinstance(fused.tree, Sequence) and fused.tree.ordered
        joined = tuple(kernels) if ordered else join_columns(kernels, by_items)
        return KernelGroup(scop.inputs, scop.outputs, temporaries, scop.extents, joined, scop.required)

    def _by_items(self, nests: Nests) -> Kernel | None:
        """The kernel without lanes, where it has no loops but its grid."""
        kernel = None if nests.has_loops else self.memory_stitching("", nests, nests.grid, Lanes())
        return kernel if isinstance(kernel, Kernel) else None

    def _map(self, name: str, nests: Nests) -> Kernel | Overflow | Refused:
        lane = _lane(nests)
        if lane is None:
            return self.memory_stitching(name, nests, nests.grid, Lanes())
        rest = [axis for axis in nests.grid if axis != lane]
        if nests.has_loops:
            return self._lanes(name, nests, rest, lane, self.tiles.accumulators)
        unrolled = self._interleaved(nests, lane, rest)
        if unrolled is None and self._short(lane):
            longer = next((a for a in reversed(rest) if not self._short(a)), None)
            if longer is not None and not _fills_vectors(nests, lane, longer):
                if _is_turned(nests, lane, longer):
                    lane = longer
                else:
                    lane, unrolled = longer, lane
            rest = [axis for axis in nests.grid if axis != lane]
        if unrolled is not None:
            rest = [axis for axis in rest if axis != unrolled]
            tile = self._worth_a_thread(nests, lane, self.tiles.lanes, unrolled)
            return self._lanes(name, nests, rest, lane, tile, unrolled=unrolled)
        across = _transposed(nests, lane, rest)
        if across is not None:
            rest = [axis for axis in rest if axis != across]
            return self._lanes(name, nests, rest, lane, 2 * self.tiles.transposed, across=across)
        tile = self.tiles.lanes
        known = lane.extent.constant
        if known is not None and known <= self.tiles.whole:
            tile, items = max(known, 1), product(axis.extent for axis in rest).constant
            if items is not None and items < FEW:
                tile = self._worth_a_thread(nests, lane, tile)
        return self._lanes(name, nests, rest, lane, tile)

    def _lanes(
        self,
        name: str,
        nests: Nests,
        rest: list[Iterator],
        lane: Iterator,
        tile: int,
        *,
        unrolled: Iterator | None = None,
        across: Iterator | None = None,
    ) -> Kernel | Overflow | Refused:
        """Takes lanes from an axis of the grid, and puts the other loops of a work item around them."""
        grid = list(rest)
        values: dict[Atom, Index] = {}
        loops: list[tuple[Iterator, LoopKind, Index | None]] = []
        if across is not None:
            loops.append(self._tile(across, self.tiles.transposed, LoopKind.SEQUENTIAL, grid, values))
        loops.append(self._tile(lane, tile, LoopKind.LANE, grid, values))
        inside = loops[-1][0]
        if unrolled is not None:
            loops.append((unrolled, LoopKind.UNROLLED, None))
        lanes = Lanes(tuple(loops), Index.of(inside), inside.extent)
        return self.memory_stitching(name, nests.substitute(values), tuple(grid), lanes)

    def _tile(
        self, axis: Iterator, tile: int, kind: LoopKind, grid: list[Iterator], values: dict[Atom, Index]
    ) -> tuple[Iterator, LoopKind, Index | None]:
        """Splits an axis into blocks, which join the grid, and the loop over a block."""
        known = axis.extent.constant
        if known is not None and known <= tile:
            return axis, kind, None
        block = Iterator(f"{axis.name}_block", (axis.extent + (tile - 1)) // tile)
        inner = Iterator(axis.name, Index.of(tile))
        grid.append(block)
        values[axis] = Index.of(block) * tile + Index.of(inner)
        whole = known is not None and known % tile == 0
        return inner, kind, None if whole else axis.extent - Index.of(block) * tile

    def _worth_a_thread(
        self, nests: Nests, lane: Iterator, tile: int, unrolled: Iterator | None = None
    ) -> int:
        """Lanes of a work item, at most `tile`: fewer where they do so much that threads could share it."""
        inner = () if unrolled is None else (unrolled,)
        placed = nests.placed.values()
        scattered = sum(is_scattered(p.offset, lane, inner) for p in placed if p.statement.reduction is None)
        point = sum(p.block.cost + 2 for p in placed) + SCATTERED * scattered
        lanes = point * (product(i.extent for i in inner).constant or 1)
        while tile > self.tiles.accumulators and tile * lanes > GRAIN:
            tile = -(-tile // 2)
        return tile

    def _short(self, axis: Iterator) -> bool:
        known = axis.extent.constant
        return known is not None and known <= self.tiles.unrolled

    def _interleaved(self, nests: Nests, lane: Iterator, rest: list[Iterator]) -> Iterator | None:
        """A short axis that some read has innermost, with the lanes around it: pixels and their channels."""
        for axis in rest:
            if not self._short(axis):
                continue
            for offset in nests.offsets():
                along, around = offset.coefficient(axis), offset.coefficient(lane)
                if along is not None and along.is_one and around == axis.extent:
                    return axis
        return None


def _is_turned(nests: Nests, short: Iterator, longer: Iterator) -> bool:
    """Whether some accesses run along a short axis and others along a longer one: a tile, if a narrow one."""
    known = short.extent.constant
    runs = any(offset.coefficient(longer) == ONE for offset in nests.offsets())
    return known is not None and known >= _VECTOR and runs and _transposed(nests, longer, [short]) is not None


def _fills_vectors(nests: Nests, short: Iterator, longer: Iterator) -> bool:
    """Whether lanes along a short axis write whole vectors, where those along a longer one would scatter.

    As with columns that are put together: neighbours along the longer axis lie further apart than the short
    one is long. Where they lie side by side, a compiler puts vectors of theirs together in registers.
    """
    known = short.extent.constant
    if known is None or known % _VECTOR:
        return False
    local = nests.local_sizes
    writes = [p.offset for p in nests.placed.values() if p.statement.target.name not in local]
    runs = (offset.coefficient(short) for offset in nests.offsets())
    apart = (offset.coefficient(longer) for offset in writes)
    return all(run is not None and (run.is_one or run.is_zero) for run in runs) and all(
        gap is not None and (gap.constant is None or gap.constant > known) for gap in apart
    )


def _crossing(scop: Scop, parts: tuple[Tree, ...]) -> list[str]:
    """Tensors that one part of the tree writes and another reads."""
    part_of = {name: place for place, tree in enumerate(parts) for name in statements_of(tree)}
    writer = {s.target.name: part_of[s.name] for s in scop.statements}
    found = {
        load.tensor: None
        for s in scop.statements
        for load in s.block.loads
        if writer.get(load.tensor, part_of[s.name]) != part_of[s.name]
    }
    return list(found)


def _not_reduced(scop: Scop, tensors: list[str]) -> list[str]:
    """The tensors that are not the results of reductions to a small part of what they read."""
    writers = {s.target.name: s for s in scop.statements}
    found: list[str] = []
    for name in tensors:
        reduction = writers[name].reduction
        over = product(i.extent for i in reduction.iterators) if reduction is not None else ONE
        known = over.constant
        if known is not None and known < _REDUCED:
            found.append(name)
    return found


def _lane(nests: Nests) -> Iterator | None:
    """The grid axis to take lanes from, or None where the innermost loops serve better."""
    contiguous = {axis: _contiguous(nests, axis) for axis in nests.grid}
    order = {axis: (contiguous[axis], _linear(nests, axis), n) for n, axis in enumerate(nests.grid)}
    best = max(nests.grid, key=lambda axis: order[axis], default=None)
    if best is None or not nests.has_loops:
        return best
    inner = sum(_contiguous(nests, loop) for loop in nests.innermost())
    return best if contiguous[best] * _NEARLY > inner else None


def _contiguous(nests: Nests, iterator: Iterator) -> int:
    """The elements of all accesses that run along memory with the iterator."""
    along = 0
    for offset in nests.offsets():
        factor = unclamped(offset, iterator).coefficient(iterator)
        if factor is not None and factor.is_one:
            along += math.prod(_size(i.extent) for i in offset.iterators())
    return along


def _linear(nests: Nests, iterator: Iterator) -> bool:
    """Whether each access moves as far with each step of the iterator, as one that is clamped does not."""
    return all(offset.coefficient(iterator) is not None for offset in nests.all_offsets())


def _size(extent: Index) -> int:
    known = extent.constant
    return _OPEN if known is None else known


def _transposed(nests: Nests, lane: Iterator, rest: list[Iterator]) -> Iterator | None:
    """The axis that reads run along which jump along the lanes."""
    for offset in nests.offsets():
        jump = offset.coefficient(lane)
        if jump is None or jump == ZERO or jump.is_one:
            continue
        for axis in rest:
            along = offset.coefficient(axis)
            if along is not None and along.is_one:
                return axis
    return None
