"""An acyclic graph whose nodes are merged step by step, and stays acyclic.

Groups are kept in a topological order that is mended locally at each merge, as Pearce and Kelly do it
("A dynamic topological sort algorithm for directed acyclic graphs", JEA 11, 2007); it bounds every search.
A node with thousands of neighbours stays cheap: a merge renames the group that has fewer, and a search starts
at the end of an edge where fewer lie.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Set


class Contraction:
    """Groups of nodes ``0 .. n-1`` numbered in topological order; every edge goes to a greater number."""

    def __init__(self, successors: Sequence[Iterable[int]]) -> None:
        count = len(successors)
        self._parent = list(range(count))
        self._successors: list[set[int]] = [set(users) for users in successors]
        self._predecessors: list[set[int]] = [set() for _ in range(count)]
        for node, users in enumerate(self._successors):
            for user in users:
                self._predecessors[user].add(node)
        self._rank = list(range(count))  # less than that of every group which needs it
        self._group_at: list[int | None] = list(range(count))  # by rank
        self._members: list[list[int]] = [[node] for node in range(count)]

    def find(self, node: int) -> int:
        """The number that stands for the node's group."""
        root = node
        while self._parent[root] != root:
            root = self._parent[root]
        while self._parent[node] != root:
            self._parent[node], node = root, self._parent[node]
        return root

    def members(self, group: int) -> list[int]:
        """The nodes of a group, in order."""
        return sorted(self._members[group])

    def successors(self, group: int) -> Set[int]:
        return self._successors[group]

    def predecessors(self, group: int) -> Set[int]:
        return self._predecessors[group]

    def detour(self, producer: int, user: int) -> bool:
        """Whether a path leads from one group to the other through a third: merging would close a cycle."""
        if len(self._successors[producer]) <= len(self._predecessors[user]):
            between = self._between(producer, user, self._successors)
            return any(user in self._successors[group] for group in between)
        between = self._between(producer, user, self._predecessors, backward=True)
        return any(producer in self._predecessors[group] for group in between)

    def merge(self, a: int, b: int) -> int:
        """Joins two groups without a detour between them, and gives the number that stands for both."""
        first, last = (a, b) if self._rank[a] < self._rank[b] else (b, a)
        before = self._between(first, last, self._predecessors, backward=True)
        behind = self._between(first, last, self._successors)

        keep, drop = (a, b) if self._degree(a) >= self._degree(b) else (b, a)
        self._parent[drop] = keep
        self._rename(drop, keep, self._successors, self._predecessors)
        self._rename(drop, keep, self._predecessors, self._successors)
        one, other = sorted((self._members[keep], self._members[drop]), key=len)
        other.extend(one)
        self._members[keep], self._members[drop] = other, []

        by_rank = self._rank.__getitem__
        order = [*sorted(before, key=by_rank), keep, *sorted(behind, key=by_rank)]
        ranks = sorted([by_rank(first), by_rank(last), *map(by_rank, before), *map(by_rank, behind)])
        self._group_at[ranks[-1]] = None  # one rank is left over
        for group, rank in zip(order, ranks, strict=False):
            self._rank[group] = rank
            self._group_at[rank] = group
        return keep

    def groups(self) -> list[list[int]]:
        """The members of every group, each sorted, ordered by their first member."""
        roots = {self.find(node) for node in range(len(self._parent))}
        return sorted(self.members(root) for root in roots)

    def _between(self, first: int, last: int, neighbours: list[set[int]], backward: bool = False) -> set[int]:
        """The groups ranked between two that are reached from the first, or backward from the last."""
        low, high = self._rank[first], self._rank[last]
        pending = [last if backward else first]
        seen: set[int] = set()
        while pending:
            near = neighbours[pending.pop()]
            if len(near) < high - low:
                found = [g for g in near if low < self._rank[g] < high and g not in seen]
            else:
                ranked = self._group_at[low + 1 : high]
                found = [g for g in ranked if g is not None and g in near and g not in seen]
            seen.update(found)
            pending += found
        return seen

    def _degree(self, group: int) -> int:
        return len(self._successors[group]) + len(self._predecessors[group])

    @staticmethod
    def _rename(drop: int, keep: int, neighbours: list[set[int]], back: list[set[int]]) -> None:
        """Hands one group's edges of a direction to another; an edge between the two is gone."""
        for group in neighbours[drop]:
            back[group].discard(drop)
            if group != keep:
                back[group].add(keep)
                neighbours[keep].add(group)
        neighbours[drop] = set()
        neighbours[keep].discard(drop)
