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


def in_doubles(model: ir.Model, feeds: Mapping[str, Array]) -> list[Doubles]:
    """The outputs as doubles; the floats of the model become doubles too, which changes it.

    Raises NotInDoublesError.
    """
    largest = max((array.size for array in feeds.values()), default=0)
    if 8 * largest * len(model.graph) > LARGEST:
        raise NotInDoublesError(f"{len(model.graph)} operators on {largest} elements take too much memory")
    _widen(model.graph)
    wide = {name: array.astype(np.float64) if _is_narrow(array) else array for name, array in feeds.items()}
    try:
        with np.errstate(all="ignore"):
            evaluator = ReferenceEvaluator(ir.to_proto(model), new_ops=[Erf])
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


def _widened(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    return ir.tensor(tensor.numpy().astype(np.float64)) if tensor.dtype in _NARROW else tensor
