"""Fuses neighbouring loops of a kernel that isl kept apart for the sake of parallelism.

Inside a work item all loops run one after the other, so a loop that fills an intermediate and the
reduction right behind it can be one loop, as long as each iteration reads what it wrote itself.
"""

from __future__ import annotations

from dataclasses import replace

from apollo_fuse.index import Atom, Index
from apollo_fuse.passes.nests import Nest, Nests, Placed, statements_in


def fuse_nests(nests: Nests) -> Nests:
    """The nests with legal neighbours joined, the first with the second, then the result with the third."""
    changed = True
    while changed:
        changed = False
        for place in range(len(nests.body) - 1):
            first, second = nests.body[place], nests.body[place + 1]
            fused = _fused(nests, first, second)
            if fused is not None:
                nests = replace(fused, body=(*nests.body[:place], *fused.body, *nests.body[place + 2 :]))
                changed = True
                break
    return nests


def _fused(nests: Nests, first: Nest, second: Nest) -> Nests | None:
    """The nests with `body` holding just the fused pair, or None where that would change a result."""
    if first.iterator is None or second.iterator is None or first.iterator.extent != second.iterator.extent:
        return None
    values: dict[Atom, Index] = {second.iterator: Index.of(first.iterator)}
    placed = dict(nests.placed)
    for name in statements_in(second):
        old = placed[name]
        reduced = frozenset(first.iterator if i == second.iterator else i for i in old.reduced)
        placed[name] = replace(
            old, offset=old.offset.substitute(values), block=old.block.substitute(values), reduced=reduced
        )
    written = {placed[n].statement.target.name: placed[n] for n in statements_in(first)}
    for name in statements_in(second):
        if not _reads_own_iteration(placed[name], written):
            return None
    if not (_flat(first) and _flat(second)):
        return None
    joined = Nest(first.iterator, (*first.children, *second.children))
    return replace(nests, placed=placed, body=(joined,))


def _reads_own_iteration(reader: Placed, written: dict[str, Placed]) -> bool:
    for load in reader.block.loads:
        writer = written.get(load.tensor)
        if writer is not None and (writer.reduced or load.indices[0] != writer.offset):
            return False
    return True


def _flat(nest: Nest) -> bool:
    return all(child.iterator is None for child in nest.children)
