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
from apollo_fuse.kernel import Buffer, Compute, Copy, Initialise, Kernel, Loop, LoopKind, Scope, Step, Target

WHOLE = 16384
"""Elements of the longest block: 16 for each thread of the largest group of threads."""
BLOCK = 1024
"""Elements of the blocks that go over a longer axis."""
_LANES = 256  # elements of a block for each warp, 8 a thread


def block_of(loop: Loop) -> int | None:
    """Elements of the one block that is the whole lane loop; None where it takes several."""
    known = loop.iterator.extent.constant
    return None if known is None or known > WHOLE else 1 << max(0, known - 1).bit_length()


def warps_for(kernel: Kernel) -> int:
    """Warps of a program, by the longest block that it computes with."""
    lanes = [loop for loop, _ in _loops(kernel.body, ()) if loop.kind is LoopKind.LANE]
    longest = max((block_of(loop) or BLOCK for loop in lanes), default=1)
    return min(32, max(1, longest // _LANES))


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


def _loops(steps: tuple[Step, ...], around: tuple[Loop, ...]) -> Generator[tuple[Loop, tuple[Loop, ...]]]:
    for step in steps:
        if isinstance(step, Loop):
            yield step, around
            yield from _loops(step.body, (*around, step))


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
