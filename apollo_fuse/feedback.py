"""The upward feedback: a micro-graph that a lower layer refused is grouped anew, and nothing else is.

Each round forbids at least one pair of its operators to be together, so that it falls into smaller ones, and
rounds come to an end by themselves.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from apollo_fuse.fusion import Candidate
from apollo_fuse.graph import MicroGraph, Operator, Pattern, Refused
from apollo_fuse.passes.aggregate_ops import AggregateOps

NOT_WORTH_IT = "aggregate_ops"  # the rule of refusals that no regrouping would help


@dataclass(frozen=True, slots=True)
class Round:
    """One turn of the feedback: what was refused, and which pairs of operators are kept apart from then."""

    refused: Refused
    forbidden: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Left:
    """A micro-graph that becomes no kernel, and why."""

    micro_graph: MicroGraph
    refused: Refused


@dataclass(frozen=True, slots=True)
class Outcome:
    """What micro-graphs came to: kernels, what is left of them, and the rounds on the way there."""

    candidates: tuple[Candidate, ...]
    left: tuple[Left, ...]
    rounds: tuple[Round, ...]


@dataclass(frozen=True, slots=True)
class Feedback:
    """Fuses micro-graphs, and regroups those that are refused; with `enabled` False a refusal is final."""

    aggregate: AggregateOps
    fuse: Callable[[MicroGraph], Candidate | Refused]
    enabled: bool = True

    def __call__(self, micro_graphs: Iterable[tuple[MicroGraph, Refused | None]]) -> Outcome:
        """Each micro-graph comes with what it is refused for, or None where it is to be fused first."""
        candidates: list[Candidate] = []
        left: list[Left] = []
        rounds: list[Round] = []
        waiting = deque(micro_graphs)
        while waiting:
            micro_graph, problem = waiting.popleft()
            result = problem or self.fuse(micro_graph)
            if isinstance(result, Candidate):
                candidates.append(result)
                continue
            result = _named(result, micro_graph)
            forbidden = self.cuts(micro_graph, result)
            if not forbidden:
                left.append(Left(micro_graph, result))
                continue
            rounds.append(Round(result, tuple(sorted(forbidden))))
            needed = frozenset(v.name for v in micro_graph.outputs)
            parts = self.aggregate(micro_graph.operators, needed, forbidden)
            waiting.extendleft((part, None) for part in reversed(parts))
        return Outcome(tuple(candidates), tuple(left), tuple(rounds))

    def cuts(self, micro_graph: MicroGraph, refused: Refused) -> frozenset[tuple[int, int]]:
        """The pairs of operators that a refusal is to keep apart; none where it stands."""
        return _cuts(micro_graph) if self.enabled and refused.rule != NOT_WORTH_IT else frozenset()


def _named(refused: Refused, micro_graph: MicroGraph) -> Refused:
    """The refusal with the model's node names in place of statement numbers."""
    nodes = tuple(o.node.name or o.op_type for o in micro_graph.operators)
    return Refused(nodes, refused.rule, refused.reason, refused.evidence)


def _cuts(micro_graph: MicroGraph) -> frozenset[tuple[int, int]]:
    """Edges to cut after a refusal: behind the last reduction, else at what moves data, else halfway.

    Of many that one operator reads, as where a pool is written as slices, half are cut at once: a hundred of
    them would take a hundred rounds one by one.
    """
    makers = {v.name: o for o in micro_graph.operators for v in o.outputs}
    edges = [
        (makers[v.name], user) for user in micro_graph.operators for v in user.inputs if v.name in makers
    ]
    for pattern in (Pattern.REDUCTION, Pattern.INJECTIVE, Pattern.BROADCAST):
        behind = [(a, b) for a, b in edges if a.pattern is pattern]
        if behind:
            _, reader = max((a.position, b.position) for a, b in behind)
            beside = sorted({a.position for a, b in behind if b.position == reader})
            parted = beside[-max(len(beside) // 2, 1) :]
            return frozenset((a.position, b.position) for a, b in behind if a.position in parted)
        before = [(a, b) for a, b in edges if b.pattern is pattern]
        if before:
            last = max(b.position for _, b in before)
            return frozenset((a.position, b.position) for a, b in before if b.position == last)
    if edges:
        return _halves(micro_graph.operators, [(a.position, b.position) for a, b in edges])
    first, last_operator = micro_graph.operators[0], micro_graph.operators[-1]
    # siblings without an edge between them; a lone operator has nothing to be parted from
    return frozenset({(first.position, last_operator.position)} if first is not last_operator else set())


def _halves(operators: Sequence[Operator], edges: Sequence[tuple[int, int]]) -> frozenset[tuple[int, int]]:
    """The edges between two parts of the operators: the fewest in the middle third, nearest its middle."""
    places = [o.position for o in operators]
    third, middle = len(places) // 3, len(places) // 2
    cuts = sorted(range(max(third, 1), max(len(places) - third, 2)), key=lambda cut: abs(cut - middle))
    crossing = ([(a, b) for a, b in edges if a < places[cut] <= b] for cut in cuts)
    fewest = min((found for found in crossing if found), key=lambda found: len(found), default=edges)
    return frozenset(fewest)
