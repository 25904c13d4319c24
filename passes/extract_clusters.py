"""Finds the largest convex sub-graphs of fusible operators (Apollo's cluster extraction)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from apollo_fuse.graph import Operator, Refused
from apollo_fuse.passes.contraction import Contraction


@dataclass(frozen=True, slots=True)
class ExtractClusters:
    """From opened nodes to clusters, each a list of operators in topological order.

    Edges between fusible operators are contracted unless a path leads around them through
    something that is not in the cluster, which would make the fused graph cyclic. The last ones come
    first, so that what thousands of nodes read is joined to few groups, late.
    """

    def __call__(
        self, graph: ir.Graph, opened: Sequence[Operator | Refused]
    ) -> tuple[tuple[Operator, ...], ...]:
        successors = node_successors(graph)
        contraction = Contraction(successors)
        for producer, users in reversed(list(enumerate(successors))):
            if not isinstance(opened[producer], Operator):
                continue
            for user in sorted(users):
                if not isinstance(opened[user], Operator):
                    continue
                a, b = contraction.find(producer), contraction.find(user)
                if a != b and not contraction.detour(a, b):
                    contraction.merge(a, b)
        clusters: list[tuple[Operator, ...]] = []
        for members in contraction.groups():
            operators = tuple(o for o in (opened[m] for m in members) if isinstance(o, Operator))
            if operators:
                clusters.append(operators)
        return tuple(clusters)


def node_successors(graph: ir.Graph) -> list[set[int]]:
    """For each node of the graph, in order, the positions of the nodes that need it."""
    position = {node: place for place, node in enumerate(graph)}
    successors: list[set[int]] = [set() for _ in position]
    for node, place in position.items():
        for value in operands(node):
            producer = value.producer()
            if producer is not None and producer in position:
                successors[position[producer]].add(place)
    return successors


def operands(node: ir.Node) -> set[ir.Value]:
    """The values a node needs: its inputs, and what the bodies of its attributes take from outside."""
    found = {value for value in node.inputs if value is not None}
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            found |= captured(attribute.as_graph())
        elif attribute.type == ir.AttributeType.GRAPHS:
            for body in attribute.as_graphs():
                found |= captured(body)
    return found


def captured(body: ir.Graph) -> set[ir.Value]:
    """The values of the graphs around it that a body needs."""
    own = {value for node in body for value in node.outputs} | set(body.inputs)
    needed = {value for node in body for value in operands(node)} | set(body.outputs)
    return needed - own - set(body.initializers.values())
