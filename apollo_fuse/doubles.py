"""What a sub-graph comes to in double precision: the judge where two results in a narrower one differ.

onnx's reference evaluator computes it, an implementation that is neither onnxruntime's nor ours, with every
float of the sub-graph a double.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from apollo_fuse import blocked
from apollo_fuse.dtypes import DType
from apollo_fuse.errors import ApolloFuseError
from apollo_fuse.tolerance import Array, Doubles

LARGEST = 1 << 30
"""Bytes that the evaluator may hold: it keeps every value until it is done."""
_NARROW = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16})
_TYPE_ATTRIBUTES = ("to", "dtype", "output_dtype")


class NotInDoublesError(ApolloFuseError):
    """The sub-graph cannot be computed in doubles; the message says why."""


class Erf(OpRun):
    """In place of the evaluator's own, whose results are of single precision."""

    def _run(self, x: Doubles) -> tuple[Doubles]:
        return (np.vectorize(math.erf, otypes=[np.float64])(x),)


class DequantizeLinear(OpRun):
    """In place of the evaluator's own, which has none for opsets before 19."""

    def _run(self, x: Array, scale: Doubles, zero: Array | None = None, **attributes: int) -> tuple[Doubles]:
        distance = x.astype(np.float64)
        if zero is not None:
            distance -= _along(zero.astype(np.float64), x, attributes)
        return (distance * _along(scale, x, attributes),)


class QuantizeLinear(OpRun):
    """As above."""

    def _run(self, x: Doubles, scale: Doubles, zero: Array | None = None, **attributes: int) -> tuple[Array]:
        kind = DType.UINT8 if zero is None else next(d for d in DType if d.numpy == zero.dtype)
        moved = np.rint(x / _along(scale, x, attributes))
        if zero is not None:
            moved += _along(zero.astype(np.float64), x, attributes)
        return (np.clip(moved, *kind.integer_range).astype(kind.numpy),)


class GlobalAveragePool(OpRun):
    """That of blocks (`blocked.py`), where the evaluator knows no operator; its own is for rows."""

    op_domain = blocked.DOMAIN

    def _run(self, x: Doubles) -> tuple[Doubles]:
        return (_in_blocks(x).mean(axis=(2, 3)).reshape(*x.shape[:2], 1, 1),)


class ReorderOutput(OpRun):
    """As above: from blocks to rows, less what fills the last one up."""

    op_domain = blocked.DOMAIN

    def _run(self, x: Doubles, channels: int, channels_last: int = 0) -> tuple[Doubles]:
        rows = np.moveaxis(_in_blocks(x), 4, 2).reshape(x.shape)[:, :channels]
        return (np.moveaxis(rows, 1, 3) if channels_last else rows,)


def _in_blocks(x: Doubles) -> Doubles:
    """A blocked tensor with the axes that it has in memory."""
    samples, filled, height, width = x.shape
    block = blocked.block_size()
    return x.reshape(samples, filled // block, height, width, block)


def _along(parameter: Doubles, x: Array, attributes: Mapping[str, int]) -> Doubles:
    """Scales or zero points as they are broadcast: one, or one for each element of an axis."""
    if attributes.get("block_size"):
        raise NotInDoublesError("scales of blocks")
    if parameter.size == 1:
        return parameter.reshape(())
    shape = [1] * x.ndim
    shape[attributes.get("axis", 1)] = -1
    return parameter.reshape(shape)


_NEW = [Erf, DequantizeLinear, QuantizeLinear, GlobalAveragePool, ReorderOutput]


def in_doubles(model: ir.Model, feeds: Mapping[str, Array]) -> list[Doubles]:
    """The outputs as doubles; the floats of the model become doubles too, which changes it.

    What a quantisation gives is as it is before it is rounded to integers. Raises NotInDoublesError.
    """
    largest = max((array.size for array in feeds.values()), default=0)
    if 8 * largest * len(model.graph) > LARGEST:
        raise NotInDoublesError(f"{len(model.graph)} operators on {largest} elements take too much memory")
    _widen(model.graph)
    _leave_unrounded(model.graph)
    wide = {name: array.astype(np.float64) if _is_narrow(array) else array for name, array in feeds.items()}
    try:
        with np.errstate(all="ignore"):
            evaluator = ReferenceEvaluator(ir.to_proto(model), new_ops=_NEW)
            outputs = [np.asarray(array) for array in evaluator.run(None, wide)]
    except Exception as error:  # the evaluator raises whatever numpy does, and classes of its own
        raise NotInDoublesError(f"onnx's reference evaluator does not run it: {error}") from error
    if narrow := [str(array.dtype) for array in outputs if _is_narrow(array)]:
        raise NotInDoublesError(f"onnx's reference evaluator makes {', '.join(narrow)} of doubles")
    return [array.astype(np.float64) for array in outputs]


def _is_narrow(array: Array) -> bool:
    return ir.DataType.from_numpy(array.dtype) in _NARROW


def _widen(graph: ir.Graph) -> None:
    for value in (*graph.inputs, *graph.outputs, *graph.initializers.values()):
        if value.const_value is not None:
            value.const_value = _widened(value.const_value)
        if value.dtype in _NARROW:
            value.type = ir.TensorType(ir.DataType.DOUBLE)  # not in place: graphs share types
    for node in graph:
        for name, attribute in tuple(node.attributes.items()):
            if isinstance(attribute.value, ir.TensorProtocol):
                node.attributes[name] = ir.AttrTensor(name, _widened(attribute.value))
            elif name in _TYPE_ATTRIBUTES and attribute.value in _NARROW:
                node.attributes[name] = ir.AttrInt64(name, ir.DataType.DOUBLE)


def _leave_unrounded(graph: ir.Graph) -> None:
    """Leaves the last step of a quantisation out where it makes an output, and there is one scale."""
    for place, output in enumerate(tuple(graph.outputs)):
        node = output.producer()
        found = None if node is None else _scale_and_zero(node, output)
        if node is None or found is None:
            continue
        scale, zero = found
        made = [ir.Node("", "Div", [node.inputs[0], scale])]
        if zero is not None:
            wide = ir.Node("", "Cast", [zero], [ir.AttrInt64("to", ir.DataType.DOUBLE)])
            made += [wide, ir.Node("", "Add", [made[0].outputs[0], wide.outputs[0]])]
        result = made[-1].outputs[0]
        result.type = ir.TensorType(ir.DataType.DOUBLE)
        graph.insert_after(node, made)
        graph.outputs[place] = result


def _scale_and_zero(node: ir.Node, output: ir.Value) -> tuple[ir.Value, ir.Value | None] | None:
    """What a quantisation divides by and adds; None for a node that is none, or has several scales."""
    if node.op_type == "DynamicQuantizeLinear" and output is node.outputs[0]:
        return node.outputs[1], node.outputs[2]
    scale = node.inputs[1] if node.op_type == "QuantizeLinear" else None
    if scale is None:
        return None
    constant, shape = scale.const_value, scale.shape
    one = constant.size == 1 if constant is not None else shape is not None and not shape
    return (scale, node.inputs[2] if len(node.inputs) > 2 else None) if one else None


def _widened(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    return ir.tensor(tensor.numpy().astype(np.float64)) if tensor.dtype in _NARROW else tensor
