"""Collapses neighbouring loops that every access treats as one long axis."""

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
