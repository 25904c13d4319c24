"""Products with a matrix of weights, as MatMul and as Gemm."""

from __future__ import annotations

import onnx_ir as ir

_PLAIN = {"alpha": 1.0, "beta": 1.0, "transA": 0}


def is_product(node: ir.Node) -> bool:
    """Whether this multiplies its first operand, as it is, by its second, and may add a third."""
    if node.domain or node.op_type not in ("MatMul", "Gemm"):
        return False
    given = {name: node.attributes[name].value for name in _PLAIN if name in node.attributes}
    return all(value == _PLAIN[name] for name, value in given.items())


def is_transposed(node: ir.Node) -> bool:
    """Whether a product reads its second operand's columns as rows."""
    return bool(node.attributes.get_int("transB", 0))


def bias(node: ir.Node) -> ir.Value | None:
    """What a product adds."""
    return node.inputs[2] if len(node.inputs) > 2 else None
