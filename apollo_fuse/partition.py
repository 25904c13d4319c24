"""From a clean graph to kernels, with the upward feedback: partition, fuse, regroup what was refused."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import onnx_ir as ir

from apollo_fuse.bodies import graphs
from apollo_fuse.feedback import NOT_WORTH_IT, Feedback, Left, Outcome, Round
from apollo_fuse.fusion import Candidate, FuseMicroGraph
from apollo_fuse.graph import MicroGraph, Operator, Pattern, Refused, Value
from apollo_fuse.index import product
from apollo_fuse.layout import Layout
from apollo_fuse.options import Options
from apollo_fuse.passes.aggregate_ops import CALLED, AggregateOps, Limits
from apollo_fuse.passes.extract_clusters import ExtractClusters, operands
from apollo_fuse.passes.leave_to_convolution import left_to_convolution
from apollo_fuse.passes.leave_to_quantized import left_to_quantized
from apollo_fuse.passes.open_compound_ops import OpenCompoundOps
from apollo_fuse.passes.parallelism_stitching import ParallelismStitching, Unit
from apollo_fuse.symbolic import values_of

_SLOW_ALONE = frozenset({"PRelu"})  # takes onnxruntime 40 times as long as Mul, whatever the threads
_SMALL = 32  # elements; below this a group computes shapes, not data


@dataclass(frozen=True, slots=True)
class Companion:
    """A kernel that pays where others share its launch, and why it does not pay alone."""

    candidate: Candidate
    refused: Refused


@dataclass(frozen=True, slots=True)
class Plan:
    """The kernels that a model could have.

    unknown: why nodes are part of no micro-graph. left: micro-graphs that became no kernel, or just
    companions. dumps: every intermediate form, by file name.
    """

    candidates: tuple[Candidate, ...]
    companions: tuple[Companion, ...]
    unknown: tuple[Refused, ...]
    left: tuple[Left, ...]
    rounds: tuple[Round, ...]
    dumps: Mapping[str, str]
    isl_seconds: float
    codegen_seconds: float

    @property
    def kernels(self) -> tuple[Candidate, ...]:
        """All kernels that the model could have."""
        return (*self.candidates, *(companion.candidate for companion in self.companions))

    @property
    def refused(self) -> tuple[Refused, ...]:
        """Why nodes are in no kernel, companions aside."""
        beside = {companion.candidate.micro_graph.operators[0].position for companion in self.companions}
        left = (x for x in self.left if x.micro_graph.operators[0].position not in beside)
        return (*self.unknown, *(x.refused for x in left))


def plan(model: ir.Model, options: Options, layout: Layout = Layout.PORTABLE) -> Plan:
    """Every kernel that the model could have, before anything is compiled or measured."""
    return Planner(model, options, layout).plan()


@dataclass(slots=True)
class Planner:
    """Plans the kernels of a model, then what becomes of those that turn out not to serve.

    The bodies of If, Loop and Scan are partitioned as the graph around them is, each by itself.
    """

    model: ir.Model
    options: Options
    layout: Layout
    _values: dict[ir.Value, Value] = field(init=False)
    _names: dict[str, ir.Value] = field(init=False)
    _fusion: FuseMicroGraph = field(init=False)
    _nodes: int = 0

    def __post_init__(self) -> None:
        self._values = values_of(self.model.graph)
        self._names = {value.name: own for own, value in self._values.items()}
        self._fusion = FuseMicroGraph(self.options, self._names)

    def plan(self) -> Plan:
        """Every kernel that the model could have."""
        unknown: list[Refused] = []
        clusters: list[tuple[Operator, ...]] = []
        areas: list[MicroGraph] = []
        for graph in graphs(self.model.graph):  # a body comes after the graph around it
            opened = self._open(graph)
            unknown += [o for o in opened if isinstance(o, Refused)]
            bodied = tuple(node for node in graph if _has_body(node))
            for cluster in ExtractClusters()(graph, opened):
                clusters.append(cluster)
                areas += self._aggregate(cluster, _escaping(cluster, bodied))
        outcome = self._feedback((area, None) for area in areas)
        dumps = {"clusters.txt": _operators_text(clusters)}
        return self._with(Plan((), (), tuple(unknown), (), (), dumps, 0.0, 0.0), outcome)

    def regroup(self, chosen: Plan, refused: Mapping[int, Refused]) -> Plan:
        """The plan with the candidates at these places grouped anew, or gone where nothing can be parted."""
        kept = (x for place, x in enumerate(chosen.candidates) if place not in refused)
        outcome = self._feedback((chosen.candidates[p].micro_graph, r) for p, r in refused.items())
        return self._with(replace(chosen, candidates=tuple(kept)), outcome)

    def splits(self, candidate: Candidate, refused: Refused) -> bool:
        """Whether refusing this candidate leads to others, and not just to operators left alone."""
        return bool(self._feedback([(candidate.micro_graph, refused)]).candidates)

    @property
    def _aggregate(self) -> AggregateOps:
        limits = Limits(self.options.max_area_operators, self.options.max_depth_operators)
        return AggregateOps(limits, self.options.stitches_memory)

    @property
    def _feedback(self) -> Feedback:
        return Feedback(self._aggregate, self._fuse, self.options.feedback)

    def _with(self, chosen: Plan, more: Outcome) -> Plan:
        candidates, left = (*chosen.candidates, *more.candidates), (*chosen.left, *more.left)
        companions = self._companions(candidates, left)
        groups = _operators_text([x.micro_graph.operators for x in candidates])
        return replace(
            chosen,
            candidates=candidates,
            companions=companions,
            left=left,
            rounds=(*chosen.rounds, *more.rounds),
            dumps={**chosen.dumps, "micro_graphs.txt": groups, **self._fusion.dumps},
            isl_seconds=self._fusion.isl_seconds,
            codegen_seconds=self._fusion.codegen_seconds,
        )

    def _companions(self, candidates: Sequence[Candidate], left: Sequence[Left]) -> tuple[Companion, ...]:
        """Kernels of what is too small for one, where many of a kind are ready together."""
        if not self.options.stitches_parallelism:
            return ()
        small = [x for x in left if x.refused.rule == NOT_WORTH_IT and _is_small(x.micro_graph)]
        if not small:
            return ()
        areas = [*(x.micro_graph for x in candidates), *(x.micro_graph for x in small)]
        found: list[Companion] = []
        for graph in graphs(self.model.graph):
            places = [n for n, area in enumerate(areas) if area.operators[0].node.graph is graph]
            units = [_unit(areas[n], n < len(candidates)) for n in places]
            for group in ParallelismStitching()(graph, units):
                joined = (
                    small[n - len(candidates)] for n in (places[m] for m in group) if n >= len(candidates)
                )
                for x in joined:
                    candidate = self._fusion(x.micro_graph)
                    if isinstance(candidate, Candidate):
                        found.append(Companion(candidate, x.refused))
        return tuple(found)

    def _open(self, graph: ir.Graph) -> list[Operator | Refused]:
        opened = list(OpenCompoundOps(self.model.opset_imports[""])(graph, self._values, self._nodes))
        self._nodes += len(opened)
        # behind all of its optimisations, onnxruntime has taken what it can into convolutions
        portable = self.layout is Layout.PORTABLE
        convolved = left_to_convolution(graph, opened) if portable else frozenset()
        quantized = left_to_quantized(dict(zip(graph, opened, strict=True)))
        for place, node in enumerate(graph):
            if isinstance(opened[place], Refused):
                continue
            label = node.name or node.op_type
            if node in convolved:
                opened[place] = Refused((label,), "leave_to_convolution", "part of a convolution")
            elif node in quantized:
                opened[place] = Refused((label,), "leave_to_quantized", "part of the operator beside it")
        for o in opened:
            if isinstance(o, Operator):
                self._values |= o.results()  # what a body reads is known as well as it is out here
                self._names |= {value.name: own for own, value in o.results().items()}
        return opened

    def _fuse(self, micro_graph: MicroGraph) -> Candidate | Refused:
        """What is not worth a kernel is refused before any work goes into it."""
        nodes = tuple(o.op_type for o in micro_graph.operators)
        if not micro_graph.outputs:
            return Refused(nodes, NOT_WORTH_IT, "nothing uses the result")
        if self.options.fuse_all:
            return self._fusion(micro_graph)
        # between blocks, onnxruntime's own operators broadcast in loops as short as a block
        over_blocks = self.layout is Layout.ORT and micro_graph.pattern is Pattern.BROADCAST
        slow = micro_graph.operators[0].op_type in _SLOW_ALONE
        if len(micro_graph.operators) < 2 and not (_is_compound(micro_graph) or over_blocks or slow):
            return Refused(nodes, NOT_WORTH_IT, "a single operator", "nothing beside it can be fused with it")
        if micro_graph.pattern <= Pattern.RESHAPE:
            return Refused(nodes, NOT_WORTH_IT, "views only", "onnxruntime moves no data for them")
        sizes = [product(v.shape).constant for v in (*micro_graph.inputs, *micro_graph.outputs)]
        if all(size is not None and size <= _SMALL for size in sizes):
            return Refused(nodes, NOT_WORTH_IT, "too small", f"no tensor of more than {_SMALL} elements")
        return self._fusion(micro_graph)


def _is_small(micro_graph: MicroGraph) -> bool:
    """Whether calling it is most of what an area costs, which others that are called with it could share."""
    sizes = [product(v.shape).constant for v in (*micro_graph.inputs, *micro_graph.outputs)]
    moves = bool(micro_graph.outputs) and micro_graph.pattern > Pattern.RESHAPE
    return moves and all(size is not None and size <= CALLED for size in sizes)


def _unit(micro_graph: MicroGraph, pays_alone: bool) -> Unit:
    values = (*micro_graph.inputs, *micro_graph.outputs)
    shapes = tuple((value.dtype, value.shape) for value in values)
    kind = tuple(o.op_type for o in micro_graph.operators), shapes
    return Unit(
        tuple(o.node for o in micro_graph.operators), kind, frozenset(v.name for v in values), pays_alone
    )


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


def _is_compound(micro_graph: MicroGraph) -> bool:
    """Whether one operator is a reduction and more, so that fusing it with nothing can already win."""
    return micro_graph.pattern is Pattern.REDUCTION and len(micro_graph.primitives) > 2


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
