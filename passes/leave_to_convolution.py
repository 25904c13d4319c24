"""Finds the operators that onnxruntime computes inside a convolution, where they cost next to nothing.

onnxruntime's fused and blocked (NCHWc) convolutions apply an activation and add a residual tensor
as they write their result. Taking such an operator away would cost a pass over memory and a change
of layout on both sides.
"""

from __future__ import annotations

import onnx_ir as ir

from apollo_fuse.blocked import DOMAIN

_ACTIVATIONS = frozenset({"Relu", "Sigmoid", "Tanh", "LeakyRelu", "HardSigmoid", "Clip"})
_CONVOLUTIONS = frozenset({"Conv", "FusedConv"})


def left_to_convolution(graph: ir.Graph) -> frozenset[ir.Node]:
    """The nodes that become part of the convolution before them."""
    left: set[ir.Node] = set()
    for node in graph:
        if node.op_type in _ACTIVATIONS and _constant_operands(node) and _only_user(node.inputs[0], left):
            left.add(node)
        elif node.op_type in ("Add", "Sum") and len(node.inputs) == 2:
            a, b = node.inputs
            both_images = all(v is not None and v.shape is not None and len(v.shape) == 4 for v in (a, b))
            if both_images and a.shape == b.shape and (_is_convolution(a) or _is_convolution(b)):  # type: ignore[union-attr]
                left.add(node)
    return frozenset(left)


def _constant_operands(node: ir.Node) -> bool:
    return all(value is None or value.const_value is not None for value in node.inputs[1:])


def _only_user(value: ir.Value | None, left: set[ir.Node]) -> bool:
    if value is None or len(value.uses()) != 1:
        return False
    producer = value.producer()
    if producer is None:
        return False
    return _convolves(producer) or (producer in left and producer.op_type in ("Add", "Sum"))


def _is_convolution(value: ir.Value | None) -> bool:
    producer = None if value is None else value.producer()
    return producer is not None and _convolves(producer) and len(value.uses()) == 1  # type: ignore[union-attr]


def _convolves(node: ir.Node) -> bool:
    """A convolution in blocks has taken what it can already, when onnxruntime made it."""
    return node.op_type in _CONVOLUTIONS and node.domain != DOMAIN
