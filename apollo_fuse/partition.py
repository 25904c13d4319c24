"""From a clean graph to kernels, with the upward feedback: partition, fuse, regroup what was refused."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import onnx_ir as ir

from apollo_fuse.blocked import is_view
from apollo_fuse.bodies import graphs
from apollo_fuse.fusion import Candidate, FuseMicroGraph
from apollo_fuse.graph import MicroGraph, Operator, Pattern, Refused, Value
from apollo_fuse.index import product
from apollo_fuse.layout import Layout
from apollo_fuse.options import Options
from apollo_fuse.passes.aggregate_ops import AggregateOps, Limits
from apollo_fuse.passes.extract_clusters import ExtractClusters, operands
from apollo_fuse.passes.leave_to_convolution import left_to_convolution
from apollo_fuse.passes.leave_to_quantized import left_to_quantized
from apollo_fuse.passes.open_compound_ops import OpenCompoundOps
from apollo_fuse.symbolic import values_of

NOT_WORTH_IT = "aggregate_ops"  # the rule of refusals that no regrouping would help
_SLOW_ALONE = frozenset({"PRelu"})  # takes onnxruntime 40 times as long as Mul, whatever the threads
_SMALL = 32  # elements; below this a group computes shapes, not data


@dataclass(frozen=True, slots=True)
class Round:
    """One turn of the feedback: what was refused, and which pairs of operators are kept apart from then."""

    number: int
    refused: tuple[Refused, ...]
    forbidden: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Plan:
    candidates: tuple[Candidate, ...]
    refused: tuple[Refused, ...]
    rounds: tuple[Round, ...]
    dumps: Mapping[str, str]  # every intermediate form, by file name
    isl_seconds: float
    codegen_seconds: float


def plan(model: ir.Model, options: Options, layout: Layout = Layout.PORTABLE) -> Plan:
    """Every kernel that the model could have, before anything is compiled or measured.

    The bodies of If, Loop and Scan are partitioned as the graph around them is, each by itself.
    """
    planning = _Planning(model.opset_imports[""], options, layout, values_of(model.graph))
    for graph in graphs(model.graph):
        planning.add(graph)
    fusion = planning.fusion
    dumps = {
        "clusters.txt": _operators_text(planning.clusters),
        "micro_graphs.txt": _operators_text([x.micro_graph.operators for x in planning.candidates]),
    }
    return Plan(
        tuple(planning.candidates),
        tuple(planning.refused),
        tuple(planning.rounds),
        dumps | fusion.dumps,
        fusion.isl_seconds,
        fusion.codegen_seconds,
    )


@dataclass(slots=True)
class _Planning:
    """What was found in the graphs of a model so far; a body comes after the graph around it."""

    opset: int
    options: Options
    layout: Layout
    values: dict[ir.Value, Value]
    nodes: int = 0
    clusters: list[tuple[Operator, ...]] = field(default_factory=list)
    candidates: list[Candidate] = field(default_factory=list)
    refused: list[Refused] = field(default_factory=list)
    rounds: list[Round] = field(default_factory=list)
    fusion: FuseMicroGraph = field(init=False)
    _names: dict[str, ir.Value] = field(init=False)

    def __post_init__(self) -> None:
        self._names = {value.name: own for own, value in self.values.items()}
        self.fusion = FuseMicroGraph(self.options, self._names)

    def add(self, graph: ir.Graph) -> None:
        opened = self._open(graph)
        self.refused += [o for o in opened if isinstance(o, Refused)]
        bodied = tuple(node for node in graph if _has_body(node))
        for cluster in ExtractClusters()(graph, opened):
            self.clusters.append(cluster)
            self._fuse_cluster(cluster, _escaping(cluster, bodied))

    def _open(self, graph: ir.Graph) -> list[Operator | Refused]:
        opened = list(OpenCompoundOps(self.opset)(graph, self.values, self.nodes))
        self.nodes += len(opened)
        # behind all of its optimisations, onnxruntime has taken what it can into convolutions
        portable = self.layout is Layout.PORTABLE
        convolved = left_to_convolution(graph) if portable else frozenset()
        quantized = left_to_quantized(dict(zip(graph, opened, strict=True)))
        for place, node in enumerate(graph):
            if isinstance(opened[place], Refused):
                continue
            label = node.name or node.op_type
            if not portable and is_view(node):
                # costs nothing beside a kernel, and in one makes indices that are not affine
                opened[place] = Refused((label,), "keep_blocked", "a view of a blocked tensor")
            elif node in convolved:
                opened[place] = Refused((label,), "leave_to_convolution", "part of the convolution before it")
            elif node in quantized:
                opened[place] = Refused((label,), "leave_to_quantized", "part of the operator beside it")
        for o in opened:
            if isinstance(o, Operator):
                self.values |= o.results()  # what a body reads is known as well as it is out here
                self._names |= {value.name: own for own, value in o.results().items()}
        return opened

    def _fuse_cluster(self, cluster: tuple[Operator, ...], escaping: frozenset[str]) -> None:
        """Fuses what it can of a cluster, which is grouped anew around what was refused."""
        aggregate = AggregateOps(Limits(self.options.max_area_operators, self.options.max_depth_operators))
        forbidden: frozenset[tuple[int, int]] = frozenset()
        number = 0
        while True:
            results = [
                (m, _fuse(self.fusion, m, self.layout)) for m in aggregate(cluster, escaping, forbidden)
            ]
            problems = [(m, r) for m, r in results if isinstance(r, Refused) and r.rule != NOT_WORTH_IT]
            cuts = frozenset(pair for m, _ in problems for pair in _cuts(m)) - forbidden
            if not cuts:
                break
            number += 1
            self.rounds.append(Round(number, tuple(_named(r, m) for m, r in problems), tuple(sorted(cuts))))
            forbidden |= cuts
        self.candidates += [r for _, r in results if isinstance(r, Candidate)]
        self.refused += [_named(r, m) for m, r in results if isinstance(r, Refused)]


def _operators_text(groups: Iterable[tuple[Operator, ...]]) -> str:
    """One group a paragraph, one operator a line, with its pattern and the tensors it reads and makes."""
    paragraphs: list[str] = []
    for number, operators in enumerate(groups):
        lines = [f"{number}:"]
        for o in operators:
            reads, makes = (", ".join(map(str, values)) for values in (o.inputs, o.outputs))
            lines.append(f"  {o.op_type} [{o.pattern.name}] {reads} -> {makes}")
        paragraphs.append("\n".join(lines) + "\n")
    return "\n".join(paragraphs)


def _fuse(fusion: FuseMicroGraph, micro_graph: MicroGraph, layout: Layout) -> Candidate | Refused:
    """What is not worth a kernel is refused before any work goes into it."""
    nodes = tuple(o.op_type for o in micro_graph.operators)
    if not micro_graph.outputs:
        return Refused(nodes, NOT_WORTH_IT, "nothing uses the result")
    if fusion.options.fuse_all:
        return fusion(micro_graph)
    # between blocks, onnxruntime's own operators broadcast in loops as short as a block
    over_blocks = layout is Layout.ORT and micro_graph.pattern is Pattern.BROADCAST
    slow = micro_graph.operators[0].op_type in _SLOW_ALONE
    if len(micro_graph.operators) < 2 and not (_is_compound(micro_graph) or over_blocks or slow):
        return Refused(nodes, NOT_WORTH_IT, "a single operator", "nothing beside it can be fused with it")
    if micro_graph.pattern <= Pattern.RESHAPE:
        return Refused(nodes, NOT_WORTH_IT, "views only", "onnxruntime moves no data for them")
    sizes = [product(v.shape).constant for v in (*micro_graph.inputs, *micro_graph.outputs)]
    if all(size is not None and size <= _SMALL for size in sizes):
        return Refused(nodes, NOT_WORTH_IT, "too small", f"no tensor of more than {_SMALL} elements")
    return fusion(micro_graph)


def _is_compound(micro_graph: MicroGraph) -> bool:
    """Whether one operator is a reduction and more, so that fusing it with nothing can already win."""
    return micro_graph.pattern is Pattern.REDUCTION and len(micro_graph.primitives) > 2


def _named(refused: Refused, micro_graph: MicroGraph) -> Refused:
    """The refusal with the model's node names in place of statement numbers."""
    nodes = tuple(o.node.name or o.op_type for o in micro_graph.operators)
    return Refused(nodes, refused.rule, refused.reason, refused.evidence)


def _cuts(micro_graph: MicroGraph) -> frozenset[tuple[int, int]]:
    """Edges to cut after a refusal: behind the last reduction, else at what moves data, else the last one."""
    makers = {v.name: o for o in micro_graph.operators for v in o.outputs}
    edges = [
        (makers[v.name], user) for user in micro_graph.operators for v in user.inputs if v.name in makers
    ]
    for pattern in (Pattern.REDUCTION, Pattern.INJECTIVE, Pattern.BROADCAST):
        behind = [(a, b) for a, b in edges if a.pattern is pattern]
        if behind:
            last = max(a.position for a, _ in behind)
            return frozenset((a.position, b.position) for a, b in behind if a.position == last)
        before = [(a, b) for a, b in edges if b.pattern is pattern]
        if before:
            last = max(b.position for _, b in before)
            return frozenset((a.position, b.position) for a, b in before if b.position == last)
    if edges:
        a, b = edges[-1]
        return frozenset({(a.position, b.position)})
    first, last_operator = micro_graph.operators[0], micro_graph.operators[-1]
    # siblings without an edge between them; a lone operator has nothing to be parted from
    return frozenset({(first.position, last_operator.position)} if first is not last_operator else set())


def _escaping(cluster: tuple[Operator, ...], bodied: Sequence[ir.Node]) -> frozenset[str]:
    """Names of the cluster's results that are needed outside of it; `bodied` are all nodes with bodies."""
    members = {o.node for o in cluster}
    captured = {v for node in bodied if node not in members for v in operands(node)}
    return frozenset(
        own.name
        for o in cluster
        for value, own in o.results().items()
        if value.is_graph_output()
        or value in captured
        or any(user not in members for user, _ in value.uses())
    )


def _has_body(node: ir.Node) -> bool:
    kinds = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
    return any(attribute.type in kinds for attribute in node.attributes.values())
