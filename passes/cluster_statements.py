"""Joins statements that can only be wanted side by side, so that isl schedules few instead of many.

The cost of isl's integer programmes grows steeply with the number of statements, and what a
micro-graph adds in width (many results of one shape, computed from each other point by point) adds
nothing to decide. Such statements become one macro-statement, as in Mehta and Yew ("Improving compiler
scalability: optimizing large programs at small price", PLDI 2015), and are parted again behind isl.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from apollo_fuse.index import Atom, Index, Iterator
from apollo_fuse.passes.contraction import Contraction
from apollo_fuse.scop import Statement


@dataclass(frozen=True, slots=True)
class MacroStatement:
    """Statements over one domain, in order; each point of it runs all of them."""

    members: tuple[Statement, ...]

    @property
    def name(self) -> str:
        return self.members[0].name

    @property
    def domain(self) -> tuple[Iterator, ...]:
        return self.members[0].domain

    def renaming(self, member: Statement) -> dict[Atom, Index]:
        """The member's iterators in terms of the macro-statement's."""
        return {own: Index.of(first) for own, first in zip(member.domain, self.domain, strict=True)}


def cluster_statements(statements: Sequence[Statement]) -> tuple[MacroStatement, ...]:
    """The macro-statements, each after those that it needs; statements come in their original order."""
    writers: dict[str, list[int]] = {}
    for place, statement in enumerate(statements):
        writers.setdefault(statement.target.name, []).append(place)
    successors: list[set[int]] = [set() for _ in statements]
    for place, statement in enumerate(statements):
        for load in statement.block.loads:
            for writer in writers.get(load.tensor, ()):
                successors[writer].add(place)
    contraction = Contraction(successors)
    read = {load.tensor for statement in statements for load in statement.block.loads}
    domains: dict[tuple[Index, ...], list[int]] = {}
    for place, statement in enumerate(statements):
        # parts of one tensor lie apart, but who reads it reads parts that other points write
        in_parts = len(writers[statement.target.name]) > 1
        if statement.reduction is None and not (in_parts and statement.target.name in read):
            domains.setdefault(tuple(i.extent for i in statement.domain), []).append(place)
    for alike in domains.values():
        for place in alike[1:]:
            for earlier in dict.fromkeys(contraction.find(a) for a in alike if a < place):
                own = contraction.find(place)
                if (
                    earlier != own
                    and _pointwise(statements, contraction.members(earlier), contraction.members(own))
                    and not contraction.detour(earlier, own)
                    and not contraction.detour(own, earlier)
                ):
                    contraction.merge(earlier, own)
    return tuple(MacroStatement(tuple(statements[m] for m in g)) for g in _ordered(contraction))


def _pointwise(statements: Sequence[Statement], left: Sequence[int], right: Sequence[int]) -> bool:
    """Whether each point of either side reads of the other what the same point of that writes."""
    everything = [statements[place] for place in (*left, *right)]
    targets = {s.target.name: s for s in everything}
    for reader in everything:
        for load in reader.block.loads:
            writer = targets.get(load.tensor)
            if writer is None:
                continue
            same: dict[Atom, Index] = {
                own: Index.of(other) for own, other in zip(writer.domain, reader.domain, strict=True)
            }
            if load.indices != tuple(i.substitute(same) for i in writer.indices):
                return False
    return True


def _ordered(contraction: Contraction) -> list[list[int]]:
    """The groups in a topological order, by first member where that is free."""
    groups = {contraction.find(members[0]): members for members in contraction.groups()}
    missing = {root: len(contraction.predecessors(root)) for root in groups}
    result: list[list[int]] = []
    while missing:
        ready = min((r for r, count in missing.items() if count == 0), key=lambda r: groups[r][0])
        del missing[ready]
        result.append(groups[ready])
        for following in contraction.successors(ready):
            missing[following] -= 1
    return result
