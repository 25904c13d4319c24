"""Takes the branches of If that shapes decide into the graph around them.

Exporters leave an If behind wherever a rank or an extent was not known to them: is this a batch, is there an
axis to squeeze? Often shape inference tells. Or the model runs with one branch alone: it asks whether an
extent is 1 and squeezes it, and what follows takes no operand that still has the axis. Squeeze by itself is
then as good: it, too, ends in an error where the extent is another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import permutations
from typing import TypeAlias

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass
from onnx_shape_inference import ShapeInferenceError

from apollo_fuse.bodies import nodes
from apollo_fuse.graph import Value
from apollo_fuse.index import Index
from apollo_fuse.symbolic import number_in, values_of

Infer: TypeAlias = Callable[[ir.Model], ir.Model]
"""Gives a copy of a model with shapes; its nodes are in the same order."""
_RECURRENT = frozenset({"LSTM", "GRU", "RNN"})
_RECURRENT_RANK = 3
"""Of what a recurrent operator reads; onnxruntime ends in an error at any other."""


def take_decided_branches(model: ir.Model, infer: Infer) -> None:
    """Takes in, in place, every branch that has to be the one that runs."""
    if not any(map(is_choice, nodes(model.graph))):
        return
    copy = _take_known(model, infer)
    tried: set[ir.Node] = set()
    while (choice := _without_choice(model, copy, infer, tried)) is not None:
        _take(choice, "then_branch")
        copy = _take_known(model, infer)


def _take_known(model: ir.Model, infer: Infer) -> ir.Model:
    """Takes in the branches of known conditions, in place; gives the model's copy with shapes.

    What branches leave behind may make more conditions known.
    """
    while True:
        RemoveUnusedNodesPass()(model)
        copy = infer(model)
        known = [
            (node, "then_branch" if number else "else_branch")
            for node, same in _pairs(model, copy)
            if is_choice(node) and (number := number_in(same.inputs[0])) is not None
            if not _hides_a_rank(same, "then_branch" if number else "else_branch")
        ]
        if not known:
            return copy
        for node, name in known:
            _take(node, name)


def _hides_a_rank(choice: ir.Node, name: str) -> bool:
    """Whether Range reads what the branch makes, and the branch makes no scalar.

    onnxruntime refuses that where it knows the rank beforehand, and takes the one element where it does not.
    """
    made = zip(choice.outputs, choice.attributes[name].as_graph().outputs, strict=True)
    return any(
        user.op_type == "Range" and (result.shape is None or result.shape.rank() > 0)
        for own, result in made
        for user, _ in own.uses()
    )


def _pairs(model: ir.Model, copy: ir.Model) -> Iterator[tuple[ir.Node, ir.Node]]:
    return zip(nodes(model.graph), nodes(copy.graph), strict=True)


def is_choice(node: ir.Node) -> bool:
    return node.op_type == "If" and not node.domain


def _without_choice(model: ir.Model, copy: ir.Model, infer: Infer, tried: set[ir.Node]) -> ir.Node | None:
    """An If that squeezes the extent of 1 that it asks for, where the model does not run otherwise.

    Each takes shapes to be inferred anew, and is tried once.
    """
    values = values_of(copy.graph)
    for place, (node, same) in enumerate(_pairs(model, copy)):
        if node in tried or not is_choice(node) or not _squeezes_as_asked(same, values):
            continue
        tried.add(node)
        other = model.clone()
        choice = next(x for number, x in enumerate(nodes(other.graph)) if number == place)
        around = choice.graph
        _take(choice, "else_branch")
        if _fails(other, around, infer):
            return node
    return None


def _fails(model: ir.Model, graph: ir.Graph | ir.Function | None, infer: Infer) -> bool:
    """Whether a node of this graph cannot run, by the shapes of what it reads; may change the model."""
    try:
        copy = _take_known(model, infer)
    except ShapeInferenceError as error:
        places = [node.graph for node in nodes(model.graph) if node.name == error.node_name]
        return bool(error.node_name) and all(place is graph for place in places)
    operands = [
        same.inputs[0]
        for node, same in _pairs(model, copy)
        if node.graph is graph and node.op_type in _RECURRENT
    ]
    shapes = [x.shape for x in operands if x is not None and x.shape is not None]
    return any(shape.rank() != _RECURRENT_RANK for shape in shapes)


def _squeezes_as_asked(choice: ir.Node, values: Mapping[ir.Value, Value]) -> bool:
    """Whether the If asks for an extent of 1, and where there is one squeezes that very axis."""
    extent = _asked_to_be_one(choice.inputs[0], values)
    return extent is not None and any(
        extent in _squeezed(node, values)
        for node in choice.attributes["then_branch"].as_graph()
        if node.op_type == "Squeeze"
    )


def _asked_to_be_one(condition: ir.Value | None, values: Mapping[ir.Value, Value]) -> Index | None:
    """The one extent that the condition compares with 1."""
    node = None if condition is None else condition.producer()
    if node is None or node.op_type != "Equal":
        return None
    for extent, other in permutations(node.inputs):
        found = values.get(extent) if extent is not None else None
        if number_in(other) == 1 and found is not None and found.elements is not None:
            return found.elements[0] if len(found.elements) == 1 else None
    return None


def _squeezed(node: ir.Node, values: Mapping[ir.Value, Value]) -> list[Index]:
    """The extents that a Squeeze needs to be 1."""
    operand, axes = node.inputs[0], node.inputs[1] if len(node.inputs) > 1 else None
    if operand is None or operand not in values or axes is None or axes.const_value is None:
        return []
    shape = values[operand].shape
    return [shape[axis] for axis in axes.const_value.numpy() if -len(shape) <= axis < len(shape)]


def _take(choice: ir.Node, name: str) -> None:
    """Puts a branch in the place of its If."""
    around, branch = choice.graph, choice.attributes[name].as_graph()
    assert isinstance(around, ir.Graph)
    results, inside = list(branch.outputs), list(branch)
    branch.outputs.clear()  # first: a weight that is a result belongs to the branch until then
    for weight in list(branch.initializers.values()):
        del branch.initializers[weight.name or ""]
        around.register_initializer(weight)
    branch.remove(inside)
    around.insert_before(choice, inside)
    for own, result in zip(choice.outputs, results, strict=True):
        producer = result.producer()
        if own.is_graph_output():  # keeps its name
            copied = ir.node("Identity", [result], outputs=[ir.Value(name=own.name, type=own.type)])
            around.insert_before(choice, copied)
            result = copied.outputs[0]
        elif producer is not None and producer.op_type == "Identity" and producer.inputs[0] is not None:
            result = producer.inputs[0]
        own.replace_all_uses_with(result, replace_graph_outputs=True)
    around.remove(choice, safe=True)
