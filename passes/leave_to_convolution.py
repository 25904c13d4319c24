"""Finds the operators that onnxruntime computes inside a convolution, where they cost next to nothing.

onnxruntime's fused and blocked (NCHWc) convolutions apply an activation and add a residual tensor
as they write their result. Taking such an operator away would cost a pass over memory and a change
of layout on both sides.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from apollo_fuse.blocked import DOMAIN
from apollo_fuse.graph import Operator, Refused

_ACTIVATIONS = frozenset({"Relu", "Sigmoid", "Tanh", "LeakyRelu", "HardSigmoid", "Clip"})
_CONVOLUTIONS = frozenset({"Conv", "FusedConv"})


def left_to_convolution(graph: ir.Graph, opened: Sequence[Operator | Refused]) -> frozenset[ir.Node]:
    """The nodes that become part of the convolution before them.

    With them those convolutions that could be opened, of one channel each, and have nothing beside them that
    stays in a kernel: between others, that is, whose layout they share. Lines have no other layout.
    """
    able = {o.node for o in opened if isinstance(o, Operator)}
    convolutions = frozenset(node for node in graph if _convolves(node))
    joined = _joined(graph, convolutions)
    images = {node for node in convolutions & able if not _is_along_lines(node)}
    left = {node for node in images if not _beside(node, joined) & (able - convolutions)}
    return _joined(graph, convolutions - able | left) | left


def _is_along_lines(node: ir.Node) -> bool:
    x = node.inputs[0]
    return x is not None and x.shape is not None and len(x.shape) == 3


def _beside(node: ir.Node, joined: frozenset[ir.Node]) -> set[ir.Node]:
    """The nodes before and behind the convolution and what becomes part of one."""
    source = node.inputs[0]
    producer = None if source is None else source.producer()
    found = {user for user, _ in node.outputs[0].uses()}
    while parts := found & joined:
        found = found - parts | {user for part in parts for user, _ in part.outputs[0].uses()}
    return found if producer is None or producer in joined else found | {producer}


def _joined(graph: ir.Graph, convolutions: frozenset[ir.Node]) -> frozenset[ir.Node]:
    """What becomes part of these."""
    joined: set[ir.Node] = set()
    for node in graph:
        if node.op_type in _ACTIVATIONS and _constant_operands(node):
            producer = _only_producer(node.inputs[0])
            sums = producer in joined and producer.op_type in ("Add", "Sum")
            if producer is not None and (producer in convolutions or sums):
                joined.add(node)
        elif node.op_type in ("Add", "Sum") and len(node.inputs) == 2:
            a, b = node.inputs
            if _alike_images(a, b) and convolutions & {_only_producer(a), _only_producer(b)}:
                joined.add(node)
    return frozenset(joined)


def _alike_images(a: ir.Value | None, b: ir.Value | None) -> bool:
    if a is None or b is None or a.shape is None or b.shape is None:
        return False
    return len(a.shape) == len(b.shape) == 4 and a.shape == b.shape


def _constant_operands(node: ir.Node) -> bool:
    return all(value is None or value.const_value is not None for value in node.inputs[1:])


def _only_producer(value: ir.Value | None) -> ir.Node | None:
    """The node that makes the value, where one node alone uses it."""
    return None if value is None or len(value.uses()) != 1 else value.producer()


def _convolves(node: ir.Node) -> bool:
    """A convolution in blocks has taken what it can already, when onnxruntime made it."""
    return node.op_type in _CONVOLUTIONS and node.domain != DOMAIN
