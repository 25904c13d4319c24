"""Finds the conversions that onnxruntime folds into quantised operators.

A convolution or a matrix product between DequantizeLinear and QuantizeLinear is one operator on small
integers to onnxruntime, and many times faster.  Taking a conversion away from it would undo that.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from apollo_fuse.graph import Operator, Refused


def left_to_quantized(opened: Mapping[ir.Node, Operator | Refused]) -> frozenset[ir.Node]:
    """The conversions right before and right behind operators that kernels do not cover."""

    def covered(node: ir.Node | None) -> bool:
        return node is not None and isinstance(opened.get(node), Operator)

    left: set[ir.Node] = set()
    for node in opened:
        if node.op_type == "DequantizeLinear":
            if not all(covered(user) for user, _ in node.outputs[0].uses()):
                left.add(node)
        elif node.op_type == "QuantizeLinear" and node.inputs[0] is not None:
            producer = node.inputs[0].producer()
            if producer is not None and not covered(producer):
                left.add(node)
    return frozenset(left)
