"""Operators between floating-point numbers and the small integers that stand for them."""

from __future__ import annotations

from apollo_fuse.dtypes import DType
from apollo_fuse.expressions import Op
from apollo_fuse.index import ONE
from apollo_fuse.operators.opener import Opener, Tensor, Unsupported, floating
from apollo_fuse.operators.registry import operator


@operator("QuantizeLinear")
@operator("QuantizeLinear", domain="com.microsoft")
def quantize_linear(o: Opener) -> Tensor:
    """Divided, rounded half to even, moved by the zero point, and clamped to the range of the integers."""
    x = floating(o.tensor(0))
    scale = _per_axis(o, 1, x)
    dtype = o.tensor(2).dtype if o.has(2) else o.output_dtype()
    if not dtype.is_integer:
        raise Unsupported(f"quantisation to {dtype.value}")
    zero = _per_axis(o, 2, x).cast(DType.FLOAT32) if o.has(2) else None
    return quantized(x, scale, zero, dtype)


def quantized(x: Tensor, scale: Tensor, zero: Tensor | None, dtype: DType) -> Tensor:
    if dtype.size > 2:
        raise Unsupported(f"quantisation to {dtype.value}")
    # the quotient of half types is rounded to their precision first, as onnxruntime has it
    quotient = x.cast(DType.FLOAT32).quotient(scale.cast(DType.FLOAT32)).cast(x.dtype).cast(DType.FLOAT32)
    rounded = quotient.call(Op.ROUND)
    moved = rounded if zero is None else rounded + zero
    low, high = dtype.integer_range
    return moved.maximum(float(low)).minimum(float(high)).cast(dtype)


@operator("DequantizeLinear")
@operator("DequantizeLinear", domain="com.microsoft")
def dequantize_linear(o: Opener) -> Tensor:
    """The distance from the zero point, in 32-bit integers, times the scale."""
    x = o.tensor(0)
    if not x.dtype.is_integer:
        raise Unsupported(f"dequantisation of {x.dtype.value}")
    scale = floating(_per_axis(o, 1, x))
    distance = x.cast(DType.INT32)
    if o.has(2):
        distance = distance - _per_axis(o, 2, x).cast(DType.INT32)
    return (distance.cast(DType.FLOAT32) * scale.cast(DType.FLOAT32)).cast(scale.dtype)


def _per_axis(o: Opener, place: int, x: Tensor) -> Tensor:
    """A scale or a zero point: one for all, or one for each element of an axis."""
    operand = o.tensor(place)
    if len(operand.shape) == 0 or operand.shape == (ONE,):
        return operand.reshape(())
    if len(operand.shape) != 1 or o.integer("block_size", 0):
        raise Unsupported("scales of blocks")
    axis = o.axis(o.integer("axis", 1), len(x.shape))
    if operand.shape[0] != x.shape[axis]:
        raise Unsupported(f"{operand.shape[0]} scales for an axis of {x.shape[axis]}")
    return operand.reshape(tuple(e if n == axis else ONE for n, e in enumerate(x.shape)))


@operator("DynamicQuantizeLinear")
def dynamic_quantize_linear(o: Opener) -> tuple[Tensor, ...]:
    """Scale and zero point follow from the range of the numbers, which is made to hold 0."""
    x = floating(o.tensor(0))
    axes = range(len(x.shape))
    least = x.reduce(Op.MIN, axes, keepdims=False).minimum(0.0)
    greatest = x.reduce(Op.MAX, axes, keepdims=False).maximum(0.0)
    width = greatest - least
    scale = width.equal(0.0).select(1.0, width.quotient(255.0))
    zero = (0.0 - least.quotient(scale)).maximum(0.0).minimum(255.0).call(Op.ROUND)
    return quantized(x, scale, zero, DType.UINT8), scale, zero.cast(DType.UINT8)
