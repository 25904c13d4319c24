"""Leaves out what a model computes of shapes where that is known: each takes the time of a small kernel.

Exporters ask every tensor for its extents anew. Where inference knows that the answers are equal, one is
enough; where it knows the numbers, none is needed. A target of Reshape that repeats extents of its operand
can say so with zeros, and nothing has to ask for them. Recurrent operators start from zeros by themselves.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from apollo_fuse.bodies import Names, add_weight, graphs, nodes
from apollo_fuse.branches import Infer, is_choice
from apollo_fuse.graph import Value
from apollo_fuse.index import Index
from apollo_fuse.symbolic import known_in, number_in

_RECURRENT = {"GRU": (5,), "RNN": (5,), "LSTM": (5, 6)}
"""The operands that are the state to start from."""


def remove_known_shapes(model: ir.Model, infer: Infer) -> None:
    """Rewrites the model in place."""
    if not any(node.op_type == "Shape" or node.op_type in _RECURRENT for node in nodes(model.graph)):
        return
    copy = infer(model)
    if any(is_choice(node) and number_in(node.inputs[0]) is not None for node in nodes(copy.graph)):
        return  # one that is decided and was left hides a rank, and would not if onnxruntime decided it
    known, names = known_in(model, copy), Names(model.graph)
    for graph in graphs(model.graph):
        for node in graph:
            if node.op_type == "Reshape" and not node.domain:
                _state_target(graph, node, known, names)
            elif node.op_type in _RECURRENT and not node.domain:
                _start_from_nothing(node)
        _ask_once(graph, known, names)
    RemoveUnusedNodesPass()(model)


def _state_target(graph: ir.Graph, node: ir.Node, known: Mapping[ir.Value, Value], names: Names) -> None:
    """Makes a constant of the target, where each extent is a number or the operand's in the same place.

    One that is neither may follow from the others, where these are no zeros.
    """
    operand, target = node.inputs[:2]
    if operand is None or target is None or operand not in known or target not in known:
        return
    elements, shape = known[target].elements, known[operand].shape
    zeros = node.attributes.get("allowzero")
    if elements is None or target.const_value is not None or (zeros is not None and zeros.as_int()):
        return
    stated = [_extent(element, shape[n] if n < len(shape) else None) for n, element in enumerate(elements)]
    if stated.count(None) > 1 or (None in stated and 0 in stated):
        return
    numbers = [-1 if extent is None else extent for extent in stated]
    held = np.array(numbers, np.int64)
    node.replace_input_with(1, add_weight(graph, names.like(target, "known"), held))


def _extent(element: Index | None, same: Index | None) -> int | None:
    """The number that stands for an extent, 0 for that of the operand in its place; None for another one."""
    known = None if element is None else element.constant
    if known is not None:
        return known if known > 0 else None
    return 0 if element is not None and element == same else None


def _start_from_nothing(node: ir.Node) -> None:
    for place in _RECURRENT[node.op_type]:
        state = node.inputs[place] if place < len(node.inputs) else None
        producer = None if state is None else state.producer()
        if producer is not None and producer.op_type == "ConstantOfShape" and not producer.domain:
            filled = producer.attributes.get("value")
            if filled is None or not filled.as_tensor().numpy().any():
                node.replace_input_with(place, None)


def _ask_once(graph: ir.Graph, known: Mapping[ir.Value, Value], names: Names) -> None:
    """Lets users of equal extents read the first that are computed, or constants where they are known."""
    first: dict[object, ir.Value] = {}
    for node in list(graph):
        for value in node.outputs:
            own = known.get(value)
            if own is None or own.elements is None or value.is_graph_output():
                continue
            elements = [element for element in own.elements if element is not None]
            numbers = [element.constant for element in elements if element.constant is not None]
            if len(elements) < len(own.elements):
                continue
            if len(numbers) == len(elements):
                array = np.array(numbers, own.dtype.numpy).reshape(len(own.shape) * (-1,))
                earlier = add_weight(graph, names.like(value, "known"), array)
            else:
                earlier = first.setdefault((own.dtype, own.shape, own.elements), value)
            if earlier is not value:
                ir.convenience.replace_all_uses_with(value, earlier)
