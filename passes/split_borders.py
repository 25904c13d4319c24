"""Parts lane loops where an index stops being clamped (index-set splitting): borders, and what lies between.

An index that is held within its axis, as at the border of a padded window, is a choice for each lane, and
reads through it are gathers.  Between the lanes at either end that need it the index is affine: there the
choice is left out, and the lanes run along memory.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator as Generator
from dataclasses import dataclass, replace

from apollo_fuse.expressions import Load, Position
from apollo_fuse.index import ZERO, Atom, Index, Indirect, Iterator, Maximum, maximum, minimum
from apollo_fuse.kernel import (
    Compute,
    Kernel,
    Loop,
    LoopKind,
    Step,
    part_of,
    substituted,
    walk,
    with_lane_loops,
)
from apollo_fuse.passes.simplify import decided

_FEWEST = 4  # lanes between the borders that are worth loops of their own, where their number is known
_MOST_TURNS = 8  # of loops inside on whose iterators a choice depends
_OPEN = 1 << 16  # what an open extent counts for: more than tiles hold, so that the middle lies in one
_EARLY = 64  # of how many parts of such a loop the first one is left out


def split_borders(kernel: Kernel) -> Kernel:
    return replace(kernel, body=with_lane_loops(kernel.body, _parts))


def _parts(loop: Loop) -> list[Step]:
    """The loop as one over each border and one between them, or as it is."""
    between = _between(loop)
    if between is None:
        return [loop]
    end = loop.turns
    first = minimum(maximum(between.first, ZERO), end)
    last = maximum(minimum(between.last, end), first)
    inside = (last - first).constant
    if inside is not None and inside < _FEWEST:
        return [loop]

    def part(kind: LoopKind, start: Index, extent: Index, body: tuple[Step, ...]) -> list[Step]:
        if extent.is_zero:
            return []
        whole = part_of(Loop(loop.iterator, kind, body), start, extent)
        return [replace(whole, body=tuple(map(_settled, whole.body)))]

    return [
        *part(LoopKind.SEQUENTIAL, ZERO, first, loop.body),
        *part(LoopKind.LANE, first, last - first, between.body),
        *part(LoopKind.SEQUENTIAL, last, end - last, loop.body),
    ]


def _settled(step: Step) -> Step:
    """The step without the choices that are none over the lanes of its part."""
    return replace(step, block=decided(step.block)) if isinstance(step, Compute) else step


@dataclass(frozen=True, slots=True)
class _Between:
    """The lanes from `first` up to `last`, for which `body` computes what the loop does."""

    first: Index
    last: Index
    body: tuple[Step, ...]


def _between(loop: Loop) -> _Between | None:
    """Decides one clamp after the other, those inside others first; None where there is none to decide."""
    lane = loop.iterator
    inside = frozenset(s.iterator for s in walk(loop.body) if isinstance(s, Loop))
    first, last, body = ZERO, lane.extent, loop.body
    decided = False
    while (choice := _choice(body, lane, inside)) is not None:
        decided = True
        body = tuple(substituted(step, {choice.atom: choice.taken}) for step in body)
        for rest in choice.rests:
            if choice.factor > 0:
                first = maximum(first, -(rest // choice.factor))
            else:
                last = minimum(last, rest // -choice.factor + 1)
    return _Between(first, last, body) if decided else None


@dataclass(frozen=True, slots=True)
class _Choice:
    """`taken` is the greater of the atom's two for the lanes where no ``factor*lane + rest`` is negative.

    rests: of each turn of the loops inside, where these count.
    """

    atom: Maximum
    taken: Index
    factor: int
    rests: tuple[Index, ...]


def _choice(body: tuple[Step, ...], lane: Iterator, inside: frozenset[Iterator]) -> _Choice | None:
    for index in _indices(body):
        for atom in index.atoms():
            if isinstance(atom, Maximum) and (found := _decided(atom, lane, inside)) is not None:
                return found
    return None


def _decided(atom: Maximum, lane: Iterator, inside: frozenset[Iterator]) -> _Choice | None:
    """The side that is the greater one in the middle, where the difference is linear in the lane."""
    difference = atom.left - atom.right
    factor = difference.coefficient(lane)
    known = None if factor is None else factor.constant
    if not known or any(isinstance(a, Maximum | Indirect) for a in difference.atoms()):
        return None
    rests = _in_turns(difference - Index.of(lane) * known, inside)
    if not rests:
        return None
    if _middle(difference) < 0:
        return _Choice(atom, atom.right, -known, tuple(-rest for rest in rests))
    return _Choice(atom, atom.left, known, rests)


def _in_turns(rest: Index, inside: frozenset[Iterator]) -> tuple[Index, ...]:
    """What it is in each turn of the loops inside; nothing where there are too many."""
    turning = [iterator for iterator in inside if iterator in rest.iterators()]
    counts = [iterator.extent.constant for iterator in turning]
    known = [count for count in counts if count is not None]
    if len(known) < len(counts) or math.prod(known) > _MOST_TURNS:
        return ()
    turns = itertools.product(*map(range, known))
    values = (zip(turning, map(Index.of, turn), strict=True) for turn in turns)
    return tuple(dict.fromkeys(rest.substitute(dict(turn)) for turn in values))


def _middle(index: Index) -> int:
    """What it comes to in the middle of all loops, and early in those of open extents, which are `_OPEN`.

    Not in their middle, since of two such extents one may be some times the other in every run.
    """
    places: dict[Atom, Index] = {
        i: (i.extent - 1) // (2 if i.extent.constant is not None else _EARLY) for i in index.iterators()
    }
    index = index.substitute(places)
    found = index.substitute({symbol: Index.of(_OPEN) for symbol in index.symbols()}).constant
    assert found is not None, "iterators and symbols are all that there is"
    return found


def _indices(body: tuple[Step, ...]) -> Generator[Index]:
    for step in walk(body):
        if isinstance(step, Compute):
            yield from (target.offset for target in step.targets)
            for item in step.block.instructions:
                if isinstance(item, Load):
                    yield item.indices[0]
                elif isinstance(item, Position):
                    yield item.index
