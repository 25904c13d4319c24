"""Finds kernels that may share a launch: those that do not need each other (Apollo's Layer III).

A kernel's level is the greatest number of nodes and kernels on a path that leads to it. Kernels of one level
do not need each other, and where those that share a launch are of one level, every path keeps its length: the
critical path does not grow, and no cycle can arise.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from apollo_fuse.passes.extract_clusters import node_successors

MOST_TENSORS = 2048
"""Inputs and outputs of a stitch that is judged; a larger one takes longer."""
FEW = 8
"""Of one kind; below this, what pays in a stitch alone is not worth a kernel."""


@dataclass(frozen=True, slots=True)
class Unit:
    """A kernel that there is, or could be.

    kind: equal for kernels that share code and shapes. tensors: inputs and outputs, whatever stands for them.
    pays_alone: False for what is too small to be a kernel by itself.
    """

    nodes: tuple[ir.Node, ...]
    kind: Hashable
    tensors: frozenset[Hashable]
    pays_alone: bool = True


@dataclass(frozen=True, slots=True)
class ParallelismStitching:
    """From the kernels in a graph to those that are to share launches: places in `units`, two or more each.

    Groups are as alike as can be: equal ones are judged once, and equal kernels balance each other.
    """

    most_tensors: int = MOST_TENSORS

    def __call__(self, graph: ir.Graph, units: Sequence[Unit]) -> tuple[tuple[int, ...], ...]:
        return tuple(group for level in self.by_level(graph, units) for group in level)

    def by_level(self, graph: ir.Graph, units: Sequence[Unit]) -> tuple[tuple[tuple[int, ...], ...], ...]:
        """The groups of each level, which do not need each other."""
        levels: dict[int, list[int]] = {}
        for place, level in enumerate(_levels(graph, units)):
            levels.setdefault(level, []).append(place)
        return tuple(
            tuple(tuple(group) for group in self._dealt(ready, units) if len(group) > 1)
            for _, ready in sorted(levels.items())
        )

    def _dealt(self, ready: Sequence[int], units: Sequence[Unit]) -> list[list[int]]:
        """Groups of units that are ready together, the same number of each kind in as many as possible."""
        counts = Counter(units[place].kind for place in ready)
        kinds: dict[Hashable, list[int]] = {}
        for place in ready:
            if units[place].pays_alone or counts[units[place].kind] >= FEW:
                kinds.setdefault(units[place].kind, []).append(place)
        groups: list[list[int]] = []
        while kinds:
            uses = Counter(t for places in kinds.values() for place in places for t in units[place].tensors)
            shared = sum(1 for count in uses.values() if count > 1)
            number = -(-(len(uses) - shared) // max(1, self.most_tensors - shared))
            each = {kind: len(places) // number for kind, places in kinds.items()}
            if not any(each.values()):
                left = [place for places in kinds.values() for place in places]
                full = filled_up([units[place].tensors for place in left], self.most_tensors)
                return groups + [[left[n] for n in group] for group in full]
            for turn in range(number):
                groups.append([p for kind, n in each.items() for p in kinds[kind][turn * n : (turn + 1) * n]])
            kinds = {k: rest for k, places in kinds.items() if (rest := places[number * each[k] :])}
        return groups


def filled_up(tensors: Sequence[frozenset[Hashable]], most: int) -> list[list[int]]:
    """Places in `tensors`, in their order, in groups that have no more than `most` tensors, or one place."""
    groups: list[list[int]] = []
    together: frozenset[Hashable] = frozenset()
    for place, own in enumerate(tensors):
        if not groups or len(together | own) > most:
            groups.append([])
            together = frozenset()
        groups[-1].append(place)
        together |= own
    return groups


def _levels(graph: ir.Graph, units: Sequence[Unit]) -> list[int]:
    """The level of each unit, where every unit counts as one node of the graph."""
    successors = node_successors(graph)
    position = {node: place for place, node in enumerate(graph)}
    owner = list(range(len(successors)))
    for unit in units:
        for node in unit.nodes:
            owner[position[node]] = position[unit.nodes[0]]
    following: dict[int, set[int]] = {own: set() for own in owner}
    for place, users in enumerate(successors):
        following[owner[place]] |= {owner[user] for user in users if owner[user] != owner[place]}
    waits_for = Counter(user for users in following.values() for user in users)
    level = dict.fromkeys(following, 0)
    ready = deque(own for own in following if not waits_for[own])
    while ready:
        own = ready.popleft()
        for user in following[own]:
            level[user] = max(level[user], level[own] + 1)
            waits_for[user] -= 1
            if not waits_for[user]:
                ready.append(user)
    return [level[position[unit.nodes[0]]] for unit in units]
