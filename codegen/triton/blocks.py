"""How loops and local buffers become blocks: Triton computes with blocks of values, not with single ones.

A lane loop of known length is one block, its length rounded up to a power of two; a longer or open one goes
over its axis in blocks of `BLOCK`.  What a kernel keeps on chip is a value where each block finds in it what
it left there, lane by lane.  Anything else lies in memory: in the output that hosts it, or in scratch that
each program has for itself.
"""

from __future__ import annotations

from collections.abc import Iterator as Generator
from dataclasses import dataclass, replace

from apollo_fuse.expressions import Op
from apollo_fuse.index import Index
from apollo_fuse.kernel import (
    Buffer,
    Compute,
    Copy,
    Initialise,
    Kernel,
    Loop,
    LoopKind,
    Scope,
    Step,
    Target,
    walk,
)

WHOLE = 16384
"""Elements of the longest block: 16 for each thread of the largest group of threads."""
BLOCK = 1024
"""Elements of the blocks that go over a longer axis."""
_LANES = 256  # elements of a block for each warp, 8 a thread
_MOST_ROWS = 64
_PROGRAMS = 512  # that rows leave, so that all multiprocessors have some


def block_of(loop: Loop) -> int | None:
    """Elements of the one block that is the whole lane loop; None where it takes several."""
    known = loop.iterator.extent.constant
    return None if known is None or known > WHOLE else rounded_up(known)


def rounded_up(length: int) -> int:
    """To a power of two, as all blocks are."""
    return 1 << max(0, length - 1).bit_length()


def warps_for(kernel: Kernel, rows: int) -> int:
    """Warps of a program, by the longest block that it computes with."""
    return min(32, max(1, rows * _longest(kernel) // _LANES))


def rows_for(kernel: Kernel) -> int:
    """Items that one program computes side by side, as the rows of its blocks, so that short ones fill warps.

    Loops have to be as long for all of them, and no memory may be both read and written.
    """
    loops = list(_loops(kernel.body))
    lanes = [loop for loop in loops if loop.kind is LoopKind.LANE]
    grid = set(kernel.grid)
    lengths = [i for loop in loops for i in (loop.iterator.extent, loop.limit) if i is not None]
    read, written = _tensors(kernel)
    if (
        not lanes
        or not grid
        or any(block_of(loop) is None for loop in lanes)
        or any(are_rows(loop) for loop in loops)
        or any(grid & length.iterators() for length in lengths)
        or any(not grid & target.offset.iterators() for target in written)
        or read & {target.buffer for target in written}
    ):
        return 1
    most = min(_MOST_ROWS, BLOCK // _longest(kernel))
    known = kernel.items.constant
    if known is not None:
        most = min(most, known // _PROGRAMS)
    return 1 << max(0, most.bit_length() - 1)


def are_rows(loop: Loop) -> bool:
    """Whether the loop and the lanes in it are the two axes of one block: what moves elements between both.

    Reads that run along one and writes that run along the other can then both run along memory.  No turn of
    the loop may read what another wrote.
    """
    known = loop.iterator.extent.constant
    match loop.kind, loop.body:
        case LoopKind.SEQUENTIAL, (Loop() as lanes,) if lanes.kind is LoopKind.LANE and known is not None:
            size = block_of(lanes)
        case _:
            return False
    targets: list[Target] = []
    read: set[str] = set()
    for step in lanes.body:
        if not isinstance(step, Compute) or step.combine is not None:
            return False
        targets += step.targets
        read |= {load.tensor for load in step.block.loads}
    axes = {loop.iterator, lanes.iterator}
    even = lanes.limit is None or loop.iterator not in lanes.limit.iterators()
    small = size is not None and 2 <= known <= _MOST_ROWS and known * size <= 4 * BLOCK
    apart = all(axes <= target.offset.iterators() and target.buffer not in read for target in targets)
    return even and small and apart


def _longest(kernel: Kernel) -> int:
    """Elements of the longest block that an item is computed with."""

    def elements(loop: Loop) -> int:
        if loop.kind is LoopKind.LANE:
            return block_of(loop) or BLOCK
        rows = loop.iterator.extent.constant or 1
        return rounded_up(rows) * max(map(elements, _loops(loop.body))) if are_rows(loop) else 1

    return max(map(elements, _loops(kernel.body)), default=1)


def _tensors(kernel: Kernel) -> tuple[set[str], list[Target]]:
    """The tensors that the kernel reads, and the elements that it writes."""
    local = {b.name for b in kernel.buffers if b.scope is not Scope.GLOBAL}
    read: set[str] = set()
    written: list[Target] = []
    for step in walk(kernel.body):
        match step:
            case Compute(_, block, targets, _):
                read |= {load.tensor for load in block.loads}
                written += targets
            case Copy(source, target):
                read.add(source.buffer)
                written.append(target)
            case Loop() | Initialise():
                pass
    return read - local, [target for target in written if target.buffer not in local]


def with_folds_in_lanes(kernel: Kernel) -> Kernel:
    """The kernel with lanes where a loop folds values into one, as those that its parts have left."""

    def folds(loop: Loop) -> bool:
        match loop.kind, loop.body:
            case LoopKind.SEQUENTIAL, (Compute(_, block, (target,), op),) if op is not None:
                alone = all(load.tensor != target.buffer for load in block.loads)
                return alone and kernel.buffer(target.buffer).size.is_one
            case _:
                return False

    def rewritten(step: Step) -> Step:
        if not isinstance(step, Loop):
            return step
        body = tuple(map(rewritten, step.body))
        return replace(step, kind=LoopKind.LANE if folds(step) else step.kind, body=body)

    return replace(kernel, body=tuple(map(rewritten, kernel.body)))


def local_values(kernel: Kernel) -> frozenset[str]:
    """The local buffers that are values of the program; the others need memory."""
    local = {b.name: b for b in kernel.buffers if b.scope is not Scope.GLOBAL}
    mentions: dict[str, list[_Mention]] = {name: [] for name in local}
    for mention in _mentions(kernel.body, ()):
        if mention.target.buffer in local:
            mentions[mention.target.buffer].append(mention)
    return frozenset(
        name for name, buffer in local.items() if buffer.size.is_one or _is_block(buffer, mentions[name])
    )


@dataclass(frozen=True, slots=True)
class _Mention:
    """An access to an element, and the loops around it."""

    target: Target
    around: tuple[Loop, ...]

    @property
    def turns(self) -> tuple[Loop, ...]:
        return tuple(loop for loop in self.around if loop.kind is not LoopKind.LANE)


def _is_block(buffer: Buffer, mentions: list[_Mention]) -> bool:
    """Whether each access is to the lane's own element, of a block as long as the buffer.

    What a loop leaves must not be read outside of it, where it is no value any more.
    """
    for mention in mentions:
        lanes = [loop for loop in mention.around if loop.kind is LoopKind.LANE]
        if len(lanes) != 1 or block_of(lanes[0]) is None:
            return False
        if lanes[0].iterator.extent != buffer.size or mention.target.offset != Index.of(lanes[0].iterator):
            return False
    first = mentions[0].turns if mentions else ()
    return all(mention.turns[: len(first)] == first for mention in mentions)


def _mentions(steps: tuple[Step, ...], around: tuple[Loop, ...]) -> Generator[_Mention]:
    for step in steps:
        match step:
            case Loop():
                yield from _mentions(step.body, (*around, step))
            case Initialise(target, _):
                yield _Mention(target, around)
            case Copy(source, target):
                yield _Mention(source, around)
                yield _Mention(target, around)
            case Compute(_, block, targets, _):
                for load in block.loads:
                    yield _Mention(Target(load.tensor, load.indices[0]), around)
                for target in targets:
                    yield _Mention(target, around)


def _loops(steps: tuple[Step, ...]) -> Generator[Loop]:
    yield from (step for step in walk(steps) if isinstance(step, Loop))


def folded_by(loop: Loop) -> dict[str, tuple[Op, str]]:
    """The accumulators into which the loop folds blocks of one length, and does nothing else with them."""
    folds: dict[str, set[tuple[Op, str] | None]] = {}

    def visit(steps: tuple[Step, ...], block: str | None) -> None:
        for step in steps:
            match step:
                case Loop():
                    lanes = step.kind is LoopKind.LANE
                    visit(step.body, str(block_of(step) or "BLOCK") if lanes else block)
                case Compute(_, expression, targets, combine):
                    for load in expression.loads:
                        folds.setdefault(load.tensor, set()).add(None)
                    for target in targets:
                        fold = None if combine is None or block is None else (combine, block)
                        folds.setdefault(target.buffer, set()).add(fold)
                case Copy(source, target):
                    folds.setdefault(source.buffer, set()).add(None)
                    folds.setdefault(target.buffer, set()).add(None)
                case Initialise(target, _):
                    folds.setdefault(target.buffer, set()).add(None)

    visit((loop,), None)
    found: dict[str, tuple[Op, str]] = {}
    for name, kinds in folds.items():
        if len(kinds) == 1 and (kind := next(iter(kinds))) is not None:
            found[name] = kind
    return found
