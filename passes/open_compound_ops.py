"""Opens ONNX nodes into primitives: what an operator's description says, applied to a whole graph.

A compound operator (a softmax, a layer normalisation) becomes several primitives and stays one
unit of partitioning, so that what is fused can always be swapped back node by node.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir

from apollo_fuse.expressions import Load
from apollo_fuse.graph import Operator, Primitive, Refused, Value
from apollo_fuse.index import Index, Indirect
from apollo_fuse.operators import DESCRIPTIONS, Opener, Tensor, Unsupported

RULE = "open_compound_ops"


@dataclass(frozen=True, slots=True)
class OpenCompoundOps:
    """From a graph with known shapes to its nodes in topological order, each opened or refused."""

    opset: int

    def __call__(self, graph: ir.Graph, values: Mapping[ir.Value, Value]) -> tuple[Operator | Refused, ...]:
        names = itertools.count()
        shapes = dict(values)
        result: list[Operator | Refused] = []
        for position, node in enumerate(graph):
            opened = self._open(position, node, shapes, names)
            if isinstance(opened, Operator):
                # what a description proves about its result is at least what inference knew
                shapes[node.outputs[0]] = opened.outputs[0]
            result.append(opened)
        return tuple(result)

    def _open(
        self, position: int, node: ir.Node, values: Mapping[ir.Value, Value], names: itertools.count[int]
    ) -> Operator | Refused:
        description = DESCRIPTIONS.get((node.domain, node.op_type))
        label = node.name or node.outputs[0].name or node.op_type
        if description is None:
            return Refused((label,), RULE, "left to onnxruntime", f"no description of {node.op_type}")
        opener = Opener(node, position, self.opset, values, names)
        try:
            result = description(opener)
            target = values.get(node.outputs[0])
            name = f"o{position}" if target is None else target.name
            return _operator(position, node, opener, result, name, values)
        except Unsupported as reason:
            return Refused((label,), RULE, f"{node.op_type} not covered", str(reason))


def _operator(
    position: int,
    node: ir.Node,
    opener: Opener,
    result: Tensor,
    name: str,
    values: Mapping[ir.Value, Value],
) -> Operator:
    if not opener.primitives or not isinstance(result.content, str):
        raise Unsupported("the result is a constant")
    primitives = _rename(opener.primitives, result.content, name)
    by_name: dict[str, Value] = {}
    unread: list[str] = []  # shapes and the like: the kernel does not need them, but the function's body does
    for place, source in enumerate(node.inputs):
        if source is None:
            continue
        value = values.get(source)
        if value is not None:
            by_name[value.name] = value
            unread += [] if is_constant(source) else [value.name]
        elif not is_constant(source):
            raise Unsupported(f"input {place} has an unknown shape or an unsupported type")
    reads = [n for p in primitives for n in _reads(p) if n in by_name]
    inputs = {n: by_name[n] for n in (*reads, *unread)}
    outputs = (Value(name, result.dtype, result.shape),)
    return Operator(position, node.op_type, tuple(inputs.values()), outputs, primitives, node)


def is_constant(value: ir.Value) -> bool:
    """Whether the value is a weight; that inference knows what a node computes does not make it one."""
    return value.const_value is not None and value.producer() is None


def _rename(primitives: list[Primitive], old: str, new: str) -> tuple[Primitive, ...]:
    """Gives the primitives that define the result the name that the rest of the graph knows."""
    renamed: list[Primitive] = []
    for p in primitives:
        output = Value(new, p.output.dtype, p.output.shape) if p.output.name == old else p.output
        renamed.append(Primitive(output, p.iterators, p.indices, p.reduction, p.block, p.pattern))
    return tuple(renamed)


def _reads(primitive: Primitive) -> list[str]:
    """The tensors a primitive reads, index tensors included, each once and in order."""
    names: dict[str, None] = {}
    for item in primitive.block.instructions:
        if isinstance(item, Load):
            for index in item.indices:
                names.update(dict.fromkeys(tensors_in(index)))
            names[item.tensor] = None
    return list(names)


def tensors_in(index: Index) -> list[str]:
    """The index tensors that an index reads."""
    return sorted({atom.tensor for atom in index.atoms() if isinstance(atom, Indirect)})
