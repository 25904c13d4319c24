"""Collapses neighbouring loops that every access treats as one axis, and short ones where one access does."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from apollo_fuse.index import ZERO, Atom, Index, Iterator
from apollo_fuse.passes.nests import Nest, Nests, statements_in


def collapse_grid(nests: Nests) -> Nests:
    """Merges axes of the grid, innermost first."""
    grid = list(nests.grid)
    place = len(grid) - 2
    while place >= 0:
        outer, inner = grid[place], grid[place + 1]
        if collapsible(outer, inner, nests.all_offsets()):
            merged = Iterator(outer.name, outer.extent * inner.extent)
            nests = replace(nests.substitute(_merge(outer, inner, merged)), grid=())
            grid[place : place + 2] = [merged]
        place -= 1
    return replace(nests, grid=tuple(grid))


def collapse_loops(nests: Nests) -> Nests:
    """Merges loops that hold nothing but one other loop."""
    changed = True
    while changed:
        changed = False
        for nest in _all(nests.body):
            inner = nest.children[0] if len(nest.children) == 1 else None
            if nest.iterator is None or inner is None or inner.iterator is None:
                continue
            names = statements_in(inner)
            kinds = {
                (nest.iterator in nests.placed[n].reduced, inner.iterator in nests.placed[n].reduced)
                for n in names
            }
            alike = all(a == b for a, b in kinds)
            if alike and collapsible(nest.iterator, inner.iterator, nests.all_offsets()):
                merged = Iterator(nest.iterator.name, nest.iterator.extent * inner.iterator.extent)
                old = {nest.iterator, inner.iterator}
                nests = nests.substitute(_merge(nest.iterator, inner.iterator, merged))
                placed = {
                    n: replace(p, reduced=p.reduced - old | ({merged} if p.reduced & old else set()))
                    for n, p in nests.placed.items()
                }
                body = tuple(_replaced(n, nest, Nest(merged, inner.children)) for n in nests.body)
                nests = replace(nests, body=body, placed=placed)
                changed = True
                break
    return nests


def join_short_axes(nests: Nests, longest: int) -> Nests:
    """Merges axes of the grid that one access runs through where another runs along a longer axis.

    Both together make a tile to turn, of at most `longest` elements, where either alone would make a strip:
    the groups of a channel shuffle with their channels. Other accesses step through quotients then.
    """
    grid = list(nests.grid)
    for place in range(len(grid) - 2, -1, -1):
        outer, inner = grid[place : place + 2]
        if not _is_at_most(outer.extent * inner.extent, longest):
            continue
        others = [axis for axis in grid if axis not in (outer, inner)]
        if any(_turns(offset, outer, inner, axis, nests) for offset in nests.offsets() for axis in others):
            merged = Iterator(outer.name, outer.extent * inner.extent)
            whole = Index.of(merged)
            nests = nests.substitute({outer: whole // inner.extent, inner: whole % inner.extent})
            grid[place : place + 2] = [merged]
    return replace(nests, grid=tuple(grid))


def _is_at_most(extent: Index, limit: int) -> bool:
    return extent.constant is not None and extent.constant <= limit


def _turns(offset: Index, outer: Iterator, inner: Iterator, axis: Iterator, nests: Nests) -> bool:
    """Whether the access runs through both axes, and jumps along another that some access runs along."""
    along, across, jump = (offset.coefficient(i) for i in (inner, outer, axis))
    if along is None or not along.is_one or across != inner.extent or jump is None:
        return False
    if jump.is_zero or jump.is_one or _is_at_most(axis.extent, (outer.extent * inner.extent).constant or 0):
        return False
    steps = [other.coefficient(axis) for other in nests.offsets()]
    return all(step is not None for step in steps) and any(step is not None and step.is_one for step in steps)


def collapsible(outer: Iterator, inner: Iterator, offsets: Iterable[Index]) -> bool:
    """Whether a step of the outer loop always moves as far as a whole run of the inner one."""
    for offset in offsets:
        along, across = offset.coefficient(inner), offset.coefficient(outer)
        if along is None or across is None or across != along * inner.extent:
            return False
    return True


def _merge(outer: Iterator, inner: Iterator, merged: Iterator) -> dict[Atom, Index]:
    return {outer: ZERO, inner: Index.of(merged)}


def _all(nests: Iterable[Nest]) -> Iterable[Nest]:
    for nest in nests:
        yield nest
        yield from _all(nest.children)


def _replaced(nest: Nest, old: Nest, new: Nest) -> Nest:
    if nest is old:
        return new
    return replace(nest, children=tuple(_replaced(child, old, new) for child in nest.children))
