"""Grows micro-graphs inside a cluster by rules, to a fix-point (Apollo's operator aggregation).

Each operator starts as an area of its own.  The rules run in order; a rule looks at an edge from a
producing area to a using one, or at two areas that read the same tensor, and says whether the two
may become one kernel.  Rules are optimistic about schedules: the loop optimiser has the last word,
and what it refuses comes back as forbidden edges.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum

from apollo_fuse.graph import MicroGraph, Operator, Pattern, Primitive, Shape, Value
from apollo_fuse.index import ZERO, Index, Iterator, product
from apollo_fuse.passes.compute_in_parts import followed, pointwise
from apollo_fuse.passes.contraction import Contraction

CALLED = 16 * 1024  # elements that take less time to move than an operator takes to be called
_OPEN = 16  # what an open extent counts for beside that
PARTS = 5
"""Times the limit of an area that a concatenation reaches with elementwise parts: loops side by side."""
_READ = 500  # tensors that such an area may read; a GPU's launch has room for some more addresses
EXPENSIVE = 10  # cost (see Block.cost) from which computing a value again is worse than keeping it


class Relation(Enum):
    """How the elements that cross an edge relate to the points of the using area."""

    ONE_TO_ONE = "one-to-one"
    BROADCAST = "broadcast"
    GENERAL = "general"


@dataclass(frozen=True, slots=True)
class Limits:
    operators: int = 200  # of an area
    depth: int = 20  # operators absorbed below a broadcast or a reduction


@dataclass(frozen=True, slots=True)
class Area:
    """What the rules know about a group of operators."""

    pattern: Pattern
    operators: int
    domain: Index  # points of the largest iteration space
    rows: Index | None  # points that reductions keep; None without reductions
    cost: int
    in_parts: bool  # an operator writes its result in parts, as a concatenation does
    followed: Shape | None  # the shape of such a result, where others can be written in the same parts
    pointwise: Shape | None  # of all results, where each element is made of those at its own place

    @staticmethod
    def of(operator: Operator, followed: Shape | None = None, pointwise: Shape | None = None) -> Area:
        domain, rows = Index.of(0), None
        moving = [p for p in operator.primitives if p.pattern is not Pattern.RESHAPE]
        for primitive in moving or operator.primitives:
            size, kept = _extents(primitive)
            domain = _larger(domain, size)
            rows = kept if primitive.reduction is not None else rows
        for axes, shape in ((p.row_axes, p.output.shape) for p in operator.primitives):
            if axes is not None:  # in rows with padding, of which only its result's points count
                domain, rows = product(operator.outputs[0].shape), product(shape[:axes])
        results = [p.output.name for p in operator.primitives]
        in_parts = len(set(results)) < len(results)
        return Area(operator.pattern, 1, domain, rows, operator.cost, in_parts, followed, pointwise)

    def joined(self, other: Area) -> Area:
        return Area(
            max(self.pattern, other.pattern),
            self.operators + other.operators,
            _larger(self.domain, other.domain),
            self.rows if self.rows is not None else other.rows,
            self.cost + other.cost,
            self.in_parts or other.in_parts,
            self.followed or other.followed,
            self.pointwise if self.pointwise == other.pointwise else None,
        )

    def may_read(self, producer: Area) -> bool:
        """Whether a kernel can hold both: parts have no loop in common with whoever reads all of them."""
        return not producer.in_parts or (
            producer.followed is not None and producer.followed == self.pointwise
        )


@dataclass(frozen=True, slots=True)
class Edge:
    producer: Area
    user: Area
    relation: Relation
    windowed: bool  # the user takes several elements side by side of what crosses
    is_part: bool  # the producer is elementwise, and the user puts together what it makes


@dataclass(frozen=True, slots=True)
class Rule:
    name: str
    allows: Callable[[Edge, Limits], bool]
    only_sole_user: bool = False


def _reshape(edge: Edge, limits: Limits) -> bool:
    """A view costs nothing inside a kernel, whichever side it joins."""
    lone = min(edge.producer.pattern, edge.user.pattern) is Pattern.RESHAPE
    return lone and edge.relation is Relation.ONE_TO_ONE


def _elementwise(edge: Edge, limits: Limits) -> bool:
    both = max(edge.producer.pattern, edge.user.pattern) <= Pattern.ELEMENTWISE
    return both and edge.relation is Relation.ONE_TO_ONE


def _broadcast(edge: Edge, limits: Limits) -> bool:
    """Cheap producers are computed again at each point; dear ones only join users of their own size."""
    if max(edge.producer.pattern, edge.user.pattern) > Pattern.BROADCAST:
        return False
    if edge.relation is Relation.ONE_TO_ONE:
        return True
    return (
        edge.relation is Relation.BROADCAST
        and edge.producer.operators <= limits.depth
        and edge.producer.cost < EXPENSIVE
    )


def _select(edge: Edge, limits: Limits) -> bool:
    """Where few elements of a result are taken (the labels' probabilities), no others need to be computed."""
    producer, user = edge.producer, edge.user
    return (
        max(producer.pattern, user.pattern) is Pattern.INJECTIVE
        and not edge.windowed
        and not user.domain.is_zero
        and producer.domain != user.domain
        and producer.domain.exact_quotient(user.domain) is not None
        and min(producer.operators, user.operators) <= limits.depth
    )


def _reduce(edge: Edge, limits: Limits) -> bool:
    """A reduction takes in what computes its operand."""
    return _reduce_selected(edge, limits) and (
        edge.relation is Relation.BROADCAST or edge.producer.domain == edge.user.domain
    )


def _reduce_selected(edge: Edge, limits: Limits) -> bool:
    """As above, with what was taken from a larger tensor."""
    return (
        edge.user.pattern is Pattern.REDUCTION
        and edge.producer.pattern <= Pattern.INJECTIVE
        and edge.producer.operators <= limits.depth
        and (
            edge.relation is Relation.ONE_TO_ONE
            or (edge.relation is Relation.BROADCAST and edge.producer.cost < EXPENSIVE)
        )
    )


def _stitch(edge: Edge, limits: Limits) -> bool:
    """A reduction and what is computed from it, row by row: one loop over the rows holds both (Layer II).

    A window over the results needs those of the rows beside it too, which no loop over the rows has.
    """
    producer, user = edge.producer, edge.user
    if producer.rows is None or user.pattern > Pattern.REDUCTION or edge.windowed:
        return False
    same_rows = user.rows is None or user.rows == producer.rows
    return same_rows and user.domain in (producer.domain, producer.rows)


def _reduce_again(edge: Edge, limits: Limits) -> bool:
    """A reduction of what reductions left of each row, as a loss is the mean of one number a row."""
    producer, user = edge.producer, edge.user
    return (
        producer.rows is not None
        and user.pattern is Pattern.REDUCTION
        and user.domain == producer.rows
        and edge.relation is Relation.ONE_TO_ONE
    )


def _injective(edge: Edge, limits: Limits) -> bool:
    """Transposes, slices and gathers are access maps of their user, or of what they read."""
    return (
        max(edge.producer.pattern, edge.user.pattern) is Pattern.INJECTIVE
        and not edge.windowed
        and edge.relation is Relation.ONE_TO_ONE
        and (edge.is_part or min(edge.producer.operators, edge.user.operators) <= limits.depth)
    )


RULES: tuple[Rule, ...] = (
    Rule("reshape", _reshape),
    Rule("elementwise depth", _elementwise, only_sole_user=True),
    Rule("elementwise width", _elementwise),
    Rule("broadcast depth", _broadcast, only_sole_user=True),
    Rule("broadcast width", _broadcast),
    Rule("select", _select, only_sole_user=True),
    Rule("reduce depth", _reduce, only_sole_user=True),
    Rule("reduce width", _reduce),
    Rule("injective depth", _injective, only_sole_user=True),
    Rule("stitch", _stitch),
    Rule("reduce again", _reduce_again, only_sole_user=True),
    Rule("reduce selected", _reduce_selected),
    Rule("injective width", _injective),
)


@dataclass(frozen=True, slots=True)
class AggregateOps:
    """From a cluster to its micro-graphs; `forbidden` holds pairs of operator positions to keep apart.

    `stitches` says whether a reduction may be joined with what is computed from it (Layer II).
    """

    limits: Limits = Limits()
    stitches: bool = True

    def __call__(
        self,
        cluster: Sequence[Operator],
        escaping: frozenset[str],
        forbidden: frozenset[tuple[int, int]] = frozenset(),
    ) -> tuple[MicroGraph, ...]:
        """`escaping` names the values that are needed outside the cluster."""
        growth = _Growth(cluster, self.limits, forbidden)
        rules = RULES if self.stitches else [r for r in RULES if r.allows not in (_stitch, _reduce_again)]
        changed = True
        while changed:
            changed = False
            for rule in rules:
                changed |= growth.apply(rule)
            changed |= growth.join_siblings()
        return tuple(
            growth.micro_graph(part, escaping)
            for group in growth.groups()
            for part in growth.without_views(group, escaping)
        )


class _Growth:
    def __init__(
        self, cluster: Sequence[Operator], limits: Limits, forbidden: frozenset[tuple[int, int]]
    ) -> None:
        self.cluster = cluster
        self.limits = limits
        self.producer_of = {v.name: place for place, o in enumerate(cluster) for v in o.outputs}
        self.readers: dict[str, list[int]] = {}
        for place, operator in enumerate(cluster):
            for value in operator.inputs:
                self.readers.setdefault(value.name, []).append(place)
        successors: list[set[int]] = [set() for _ in cluster]
        for name, producer in self.producer_of.items():
            successors[producer].update(self.readers.get(name, ()))
        self.contraction = Contraction(successors)
        parts = [followed(operator) for operator in cluster]
        alike = list(map(pointwise, cluster)) if any(parts) else [None] * len(cluster)
        self.areas = {
            place: Area.of(*facts) for place, facts in enumerate(zip(cluster, parts, alike, strict=True))
        }
        self.made = [{v.name for v in operator.outputs} for operator in cluster]
        self.parted = [_parted(operator) for operator in cluster]
        self.put_together = [
            _assembled(operator) if self.areas[place].in_parts else set[str]()
            for place, operator in enumerate(cluster)
        ]
        self.assembled = [
            set() if shape is None else set(together)
            for together, shape in zip(self.put_together, parts, strict=True)
        ]
        self.windows = [_windowed(operator) - self.parted[n] for n, operator in enumerate(cluster)]
        self.read = [{v.name for v in operator.inputs} for operator in cluster]
        self.sizes = {v.name: product(v.shape) for operator in cluster for v in operator.inputs}
        self.apart: list[set[int]] = [set() for _ in cluster]
        places = {operator.position: place for place, operator in enumerate(cluster)}
        for a, b in forbidden:
            if a in places and b in places:
                self.apart[places[a]].add(places[b])
                self.apart[places[b]].add(places[a])

    def groups(self) -> list[list[int]]:
        return self.contraction.groups()

    def without_views(self, group: Sequence[int], escaping: frozenset[str]) -> list[list[int]]:
        """The group, and alone each view at its end of what is needed outside as it is, too.

        In the kernel the view would be written beside it; outside, onnxruntime moves no data for one, but it
        calls an operator, in which time a small one is written.
        """
        rest, views = set(group), set[int]()
        while loose := {place for place in rest if self._is_loose_view(place, rest, escaping)}:
            views |= loose
            rest -= loose
        return [sorted(rest), *([place] for place in sorted(views))]

    def _is_loose_view(self, place: int, group: set[int], escaping: frozenset[str]) -> bool:
        operator = self.cluster[place]
        if operator.pattern is not Pattern.RESHAPE or operator.op_type == "Identity" or len(group) == 1:
            return False
        if not any(_is_large(v) for v in operator.outputs):
            return False
        ends = all(group.isdisjoint(self.readers.get(v.name, ())) for v in operator.outputs)
        made = (v.name for v in operator.inputs if self.producer_of.get(v.name) in group)
        return ends and any(n in escaping or not group.issuperset(self.readers[n]) for n in made)

    def micro_graph(self, group: Sequence[int], escaping: frozenset[str]) -> MicroGraph:
        operators, inside = [self.cluster[place] for place in group], set(group)
        made = {v.name for o in operators for v in o.outputs}
        inputs = {v.name: v for o in operators for v in o.inputs if v.name not in made}
        needed = (
            v
            for o in operators
            for v in o.outputs
            if v.name in escaping or any(place not in inside for place in self.readers.get(v.name, ()))
        )
        return MicroGraph(tuple(operators), tuple(inputs.values()), tuple(needed))

    def apply(self, rule: Rule) -> bool:
        changed = False
        done: set[int] = set()  # areas with all that they read
        for place in range(len(self.cluster)):
            merged = self.contraction.find(place) not in done
            while merged:
                user = self.contraction.find(place)
                candidates = sorted(self.contraction.predecessors(user))
                merged = any(self._try(rule, producer, user) for producer in candidates)
                changed |= merged
            done.add(self.contraction.find(place))
        return changed

    def join_siblings(self) -> bool:
        """Areas of one size that read the same tensor share one pass over it."""
        changed = False
        for readers in self.readers.values():
            for a, b in zip(readers, readers[1:], strict=False):
                left, right = self.contraction.find(a), self.contraction.find(b)
                if left == right:
                    continue
                one, two = self.areas[left], self.areas[right]
                alike = (
                    max(one.pattern, two.pattern) <= Pattern.BROADCAST
                    and one.domain == two.domain
                    and one.operators + two.operators <= self.limits.operators
                )
                if alike and self._apart_allowed(left, right) and not self._connected(left, right):
                    self._merge(left, right)
                    changed = True
        return changed

    def _try(self, rule: Rule, producer: int, user: int) -> bool:
        a, b = self.areas[producer], self.areas[user]
        if a.operators + b.operators > self.limits.operators and not self._is_taken_in(producer, user):
            return False
        if not b.may_read(a):
            return False
        if rule.only_sole_user and self.contraction.successors(producer) != {user}:
            return False
        windowed = not self.made[producer].isdisjoint(self.windows[user])
        edge = Edge(a, b, self._relation(producer, user), windowed, self._is_part(producer, user))
        if not rule.allows(edge, self.limits) or not self._apart_allowed(producer, user):
            return False
        if self.contraction.detour(producer, user):
            return False
        if self._crossing(producer, user) <= self.assembled[user]:  # so is what a part is made of, one to one
            self.assembled[user] |= {name for name in self.read[producer] if self.sizes[name] == a.domain}
        self._merge(producer, user)
        return True

    def _is_taken_in(self, producer: int, user: int) -> bool:
        """Whether areas that are too large for one may be, as parts and what puts them together."""
        if not self._is_part(producer, user):
            return False
        operators = self.areas[producer].operators + self.areas[user].operators
        read, made = (facts[producer] | facts[user] for facts in (self.read, self.made))
        return operators <= PARTS * self.limits.operators and len(read - made) <= _READ

    def _is_part(self, producer: int, user: int) -> bool:
        """Whether the producer is elementwise, and all that crosses is put together by the user."""
        elementwise = self.areas[producer].pattern <= Pattern.BROADCAST
        return elementwise and self._crossing(producer, user) <= self.put_together[user]

    def _merge(self, a: int, b: int) -> None:
        joined = self.areas.pop(a).joined(self.areas.pop(b))
        keep = self.contraction.merge(a, b)
        drop = b if keep == a else a
        self.areas[keep] = joined
        for facts in (self.made, self.read, self.windows, self.parted, self.put_together, self.assembled):
            facts[keep] |= facts[drop]
        self.apart[keep] |= self.apart[drop]

    def _apart_allowed(self, a: int, b: int) -> bool:
        return all(self.contraction.find(place) != b for place in self.apart[a])

    def _connected(self, a: int, b: int) -> bool:
        return (
            b in self.contraction.successors(a)
            or a in self.contraction.successors(b)
            or self.contraction.detour(a, b)
            or self.contraction.detour(b, a)
        )

    def _crossing(self, producer: int, user: int) -> set[str]:
        return self.made[producer] & self.read[user]

    def _relation(self, producer: int, user: int) -> Relation:
        """The most general relation of the tensors that cross from one area to the other."""
        size = self.areas[user].domain
        crossing = self._crossing(producer, user)
        sizes = {self.sizes[name] for name in crossing}
        if sizes == {size} or crossing <= self.parted[user] | self.assembled[user]:
            return Relation.ONE_TO_ONE
        smaller = all(s == size or size.exact_quotient(s) is not None for s in sizes)
        return Relation.BROADCAST if smaller else Relation.GENERAL


def _extents(primitive: Primitive) -> tuple[Index, Index]:
    kept = product(i.extent for i in primitive.iterators)
    over = primitive.reduction.iterators if primitive.reduction is not None else ()
    return kept * product(i.extent for i in over), kept


def _windowed(operator: Operator) -> set[str]:
    """The inputs of which a result takes several elements side by side.

    They have an axis that several loops walk together, other than to split it into parts, or that one result
    walks at several places at a time.
    """
    extents = {v.name: v.shape for v in operator.inputs}
    found: set[str] = set()
    places: dict[tuple[str, str, int], Index] = {}
    results = {v.name: {v.name} for v in operator.outputs}  # those that a tensor goes into
    for primitive in reversed(operator.primitives):
        reached = results.get(primitive.output.name, set())
        for load in primitive.block.loads:
            results.setdefault(load.tensor, set()).update(reached)
            for axis, index in enumerate(load.indices if load.tensor in extents else ()):
                walked = index.iterators()
                if len(walked) > 1 and product(i.extent for i in walked) != extents[load.tensor][axis]:
                    found.add(load.tensor)
                place = index.substitute({i: Index.of(Iterator("i", i.extent)) for i in walked})
                seen = (places.setdefault((n, load.tensor, axis), place) for n in reached if walked)
                if any(other != place for other in seen):
                    found.add(load.tensor)
    return found


def _parted(operator: Operator) -> set[str]:
    """The inputs that the operator takes apart: each element is read once, by one of several primitives."""
    points: dict[str, list[Index]] = {}
    for primitive in operator.primitives:
        for load in primitive.block.loads:
            points.setdefault(load.tensor, []).append(_extents(primitive)[0])
    sizes = {v.name: product(v.shape) for v in operator.inputs}
    return {
        name
        for name, size in sizes.items()
        if len(read := points.get(name, ())) > 1 and sum(read, ZERO) == size
    }


def _assembled(operator: Operator) -> set[str]:
    """The inputs that an operator puts together: all of each is one of the parts that it writes."""
    sizes = {v.name: product(v.shape) for v in operator.inputs}
    loads = ((load.tensor, _extents(p)[0]) for p in operator.primitives for load in p.block.loads)
    return {name for name, points in loads if sizes.get(name) == points}


def _is_large(value: Value) -> bool:
    """Whether writing it takes longer than calling an operator, open extents being `_OPEN`."""
    size = product(value.shape)
    known = size.substitute({symbol: Index.of(_OPEN) for symbol in size.symbols()}).constant
    return known is None or known > CALLED


def _larger(a: Index, b: Index) -> Index:
    """The one that is a multiple of the other; by constant part where neither is known to be."""
    if a.is_zero or (not b.is_zero and b.exact_quotient(a) is not None):
        return b
    known_a, known_b = a.constant, b.constant
    if known_a is not None and known_b is not None:
        return a if known_a >= known_b else b
    return a
