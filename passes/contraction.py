"""An acyclic graph whose nodes are merged step by step, and stays acyclic."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


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
        self._first = list(range(count))  # least and greatest number in the group
        self._last = list(range(count))
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
        return {self.find(node) for node in self._successors[group]} - {group}

    def predecessors(self, group: int) -> set[int]:
        return {self.find(node) for node in self._predecessors[group]} - {group}

    def detour(self, producer: int, user: int) -> bool:
        """Whether a path leads from one group to the other through a third: merging would close a cycle.

        A group can only lie on such a path when one of its members comes before the user's last.
        """
        end = self._last[user]
        pending = [group for group in self.successors(producer) if group != user]
        seen = {producer, *pending}
        while pending:
            group = pending.pop()
            if group == user:
                return True
            if self._first[group] >= end:
                continue
            for following in self.successors(group):
                if following == user:
                    return True
                if following not in seen:
                    seen.add(following)
                    pending.append(following)
        return False

    def merge(self, a: int, b: int) -> int:
        """Joins two groups and gives the number that stands for both."""
        keep, drop = (a, b) if len(self.members[a]) >= len(self.members[b]) else (b, a)
        self._parent[drop] = keep
        self._successors[keep] |= self._successors[drop]
        self._predecessors[keep] |= self._predecessors[drop]
        self._first[keep] = min(self._first[keep], self._first[drop])
        self._last[keep] = max(self._last[keep], self._last[drop])
        self.members[keep] = sorted(self.members[keep] + self.members[drop])
        return keep

    def groups(self) -> list[list[int]]:
        """The members of every group, each sorted, ordered by their first member."""
        roots = {self.find(node) for node in range(len(self._parent))}
        return sorted(self.members[root] for root in roots)
