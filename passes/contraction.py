"""An acyclic graph whose nodes are merged step by step, and stays acyclic.

Groups are kept in a topological order that is mended locally at each merge, as Pearce and Kelly do it
("A dynamic topological sort algorithm for directed acyclic graphs", JEA 11, 2007); it bounds every search.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence


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
        self.members: list[list[int]] = [[node] for node in range(count)]

    def find(self, node: int) -> int:
        """The number that stands for the node's group."""
        root = node
        while self._parent[root] != root:
            root = self._parent[root]
        while self._parent[node] != root:
            self._parent[node], node = root, self._parent[node]
        return root

    def successors(self, group: int) -> set[int]:
        return self._current(self._successors, group)

    def predecessors(self, group: int) -> set[int]:
        return self._current(self._predecessors, group)

    def _current(self, neighbours: list[set[int]], group: int) -> set[int]:
        """The neighbours of a group, as the numbers that stand for them now; the sets stay small."""
        neighbours[group] = {self.find(node) for node in neighbours[group]} - {group}
        return neighbours[group]

    def detour(self, producer: int, user: int) -> bool:
        """Whether a path leads from one group to the other through a third: merging would close a cycle."""
        end = self._rank[user]
        first = [group for group in self.successors(producer) if group != user]
        between = _reached(first, self.successors, lambda group: self._rank[group] < end)
        return any(user in self.successors(group) for group in between)

    def merge(self, a: int, b: int) -> int:
        """Joins two groups without a detour between them, and gives the number that stands for both."""
        first, last = (a, b) if self._rank[a] < self._rank[b] else (b, a)
        low, high = self._rank[first], self._rank[last]
        others = (g for g in self.predecessors(last) if g != first)
        before = _reached(others, self.predecessors, lambda g: self._rank[g] > low)
        others = (g for g in self.successors(first) if g != last)
        behind = _reached(others, self.successors, lambda g: self._rank[g] < high)

        keep, drop = (a, b) if len(self.members[a]) >= len(self.members[b]) else (b, a)
        self._parent[drop] = keep
        self._successors[keep] |= self._successors[drop]
        self._predecessors[keep] |= self._predecessors[drop]
        self.members[keep] = sorted(self.members[keep] + self.members[drop])

        by_rank = self._rank.__getitem__
        order = [*sorted(before, key=by_rank), keep, *sorted(behind, key=by_rank)]
        ranks = sorted([low, high, *map(by_rank, before), *map(by_rank, behind)])
        for group, rank in zip(order, ranks, strict=False):  # one rank is left over
            self._rank[group] = rank
        return keep

    def groups(self) -> list[list[int]]:
        """The members of every group, each sorted, ordered by their first member."""
        roots = {self.find(node) for node in range(len(self._parent))}
        return sorted(self.members[root] for root in roots)


def _reached(
    start: Iterable[int], following: Callable[[int], set[int]], within: Callable[[int], bool]
) -> set[int]:
    """The groups that can be reached from `start`, itself included, over groups that lie within bounds."""
    pending = [group for group in start if within(group)]
    seen = set(pending)
    while pending:
        for group in following(pending.pop()):
            if group not in seen and within(group):
                seen.add(group)
                pending.append(group)
    return seen
