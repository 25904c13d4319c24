"""Opens ONNX nodes into primitives: what an operator's description says, applied to a whole graph.

A compound operator (a softmax, a layer normalisation) becomes several primitives and stays one
unit of partitioning, so that what is fused can always be swapped back node by node.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import onnx_ir as ir

from apollo_fuse.expressions import Block, Instruction, Load
from apollo_fuse.graph import Operator, Primitive, Refused, Value, used_outputs
from apollo_fuse.index import Index, Indirect
from apollo_fuse.operators import DESCRIPTIONS, Opener, Tensor, Unsupported
from apollo_fuse.operators.opener import unheld

RULE = "open_compound_ops"


@dataclass(frozen=True, slots=True)
class OpenCompoundOps:
    """From a graph with known shapes to its nodes in topological order, each opened or refused.

    `first` is the position in the model of the graph's first node.
    """

    opset: int

    def __call__(
        self, graph: ir.Graph, values: Mapping[ir.Value, Value], first: int = 0
    ) -> tuple[Operator | Refused, ...]:
        names = itertools.count()
        shapes = dict(values)
        result: list[Operator | Refused] = []
        for position, node in enumerate(graph, first):
            opened = self._open(position, node, shapes, names)
            if isinstance(opened, Operator):
                # what a description proves about its results is at least what inference knew
                shapes.update(opened.results())
            result.append(opened)
        return tuple(result)

    def _open(
        self, position: int, node: ir.Node, values: Mapping[ir.Value, Value], names: itertools.count[int]
    ) -> Operator | Refused:
        description = DESCRIPTIONS.get((node.domain, node.op_type))
        label = node.name or node.outputs[0].name or node.op_type
        if description is None:
            return Refused((label,), RULE, "no kernels for this operator", node.op_type)
        result_value = values.get(node.outputs[0])
        if result_value is not None and result_value.elements is not None:
            return Refused((label,), RULE, "computes a shape", node.op_type)
        opener = Opener(node, position, self.opset, values, names)
        try:
            found = description(opener)
            results = found if isinstance(found, tuple) else (found,)
            return _operator(position, node, opener, results, values)
        except Unsupported as reason:
            return Refused((label,), RULE, f"{node.op_type} not covered", str(reason))


def _operator(
    position: int,
    node: ir.Node,
    opener: Opener,
    results: Sequence[Tensor],
    values: Mapping[ir.Value, Value],
) -> Operator:
    primitives = tuple(opener.primitives)
    outputs: list[Value] = []
    for place in used_outputs(node):
        if place >= len(results):
            raise Unsupported(f"output {place} is used")
        result = results[place]
        if not isinstance(result.content, str) or result.content not in {p.output.name for p in primitives}:
            raise Unsupported("the result is a constant, or an operand as it is")
        known = values.get(node.outputs[place])
        name = f"o{position}_{place}" if known is None else known.name
        primitives = _rename(primitives, result.content, name)
        outputs.append(Value(name, result.dtype, result.shape))
    primitives = _needed(primitives, {value.name for value in outputs})
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
            raise Unsupported(f"input {place} {unheld(source)}")
    reads = [n for p in primitives for n in _reads(p) if n in by_name]
    inputs = {n: by_name[n] for n in (*reads, *unread)}
    return Operator(
        position,
        node.op_type,
        tuple(inputs.values()),
        tuple(outputs),
        primitives,
        node,
        tuple(opener.required),
        opener.maximum,
    )


def _needed(primitives: Sequence[Primitive], results: set[str]) -> tuple[Primitive, ...]:
    """Those that the results are made of."""
    wanted = set(results)
    kept: list[Primitive] = []
    for primitive in reversed(primitives):
        if primitive.output.name in wanted:
            wanted.update(_reads(primitive))
            kept.append(primitive)
    return tuple(reversed(kept))


def is_constant(value: ir.Value) -> bool:
    """Whether the value is a weight; that inference knows what a node computes does not make it one."""
    return value.const_value is not None and value.producer() is None


def _rename(primitives: Sequence[Primitive], old: str, new: str) -> tuple[Primitive, ...]:
    """Gives a result the name that the rest of the graph knows, where it is made and where it is read."""
    return tuple(
        replace(
            p,
            output=replace(p.output, name=new) if p.output.name == old else p.output,
            block=Block(tuple(_reading(item, old, new) for item in p.block.instructions)),
        )
        for p in primitives
    )


def _reading(item: Instruction, old: str, new: str) -> Instruction:
    return replace(item, tensor=new) if isinstance(item, Load) and item.tensor == old else item


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
