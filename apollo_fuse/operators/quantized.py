"""onnxruntime's operators on small integers: each computes in floats, and gives integers again.

Its optimiser makes them of an operator between DequantizeLinear and QuantizeLinear.  They follow its kernels
for x86-64 step by step, since a difference in the last bit becomes a step of the integers where a value lies
between two of them.
"""

from __future__ import annotations

from apollo_fuse.dtypes import DType
from apollo_fuse.expressions import Op
from apollo_fuse.graph import Shape
from apollo_fuse.index import product
from apollo_fuse.operators.opener import Opener, Tensor
from apollo_fuse.operators.quantization import quantized
from apollo_fuse.operators.registry import operator

MICROSOFT = "com.microsoft"


def scale_at(o: Opener, place: int) -> Tensor:
    """The scale at this place, one for all elements."""
    return o.tensor(place).reshape(())


def zero_at(o: Opener, place: int, dtype: DType) -> Tensor:
    """A zero point as a 32-bit integer."""
    return (o.tensor(place).reshape(()) if o.has(place) else o.scalar(0, dtype)).cast(DType.INT32)


def _distance(o: Opener, place: int, zero: int) -> Tensor:
    """How far the operand at `place` is from its zero point."""
    x = o.tensor(place)
    return x.cast(DType.INT32) - zero_at(o, zero, x.dtype)


def numbers_at(o: Opener, place: int) -> Tensor:
    """The numbers that the operand at `place` stands for; its scale and zero point are the next operands."""
    return _distance(o, place, place + 2).cast(DType.FLOAT32) * scale_at(o, place + 1)


def rounded_to(x: Tensor, dtype: DType) -> Tensor:
    """The nearest integers, or the least and the greatest of the type."""
    low, high = dtype.integer_range
    return x.call(Op.ROUND).maximum(float(low)).minimum(float(high)).cast(dtype)


@operator("QLinearAdd", domain=MICROSOFT)
def qlinear_add(o: Opener) -> Tensor:
    """Two products and sums that are rounded once each, where the processor can.

    Of two operands the one that is repeated along a row is added first.
    """
    places = (0, 3) if not _is_repeated(o.tensor(0).shape, o.tensor(3).shape) else (3, 0)
    zero = zero_at(o, 7, o.tensor(0).dtype).cast(DType.FLOAT32)
    ratios = [scale_at(o, place + 1).quotient(scale_at(o, 6)) for place in places]
    zeros = [zero_at(o, place + 2, o.tensor(place).dtype).cast(DType.FLOAT32) for place in places]
    total = zero - o.apply(Op.MULTIPLY_ADD, ratios[0], zeros[0], ratios[1] * zeros[1])
    for place, ratio in reversed(list(zip(places, ratios, strict=True))):
        total = o.apply(Op.MULTIPLY_ADD, o.tensor(place).cast(DType.FLOAT32), ratio, total)
    return rounded_to(total, o.tensor(0).dtype)


def _is_repeated(shape: Shape, other: Shape) -> bool:
    """Whether a tensor is broadcast along the innermost axis on which there is more than one element."""
    for axis in range(-1, -max(len(shape), len(other)) - 1, -1):
        one, other_one = (len(s) < -axis or s[axis].is_one for s in (shape, other))
        if not (one and other_one):
            return one
    return False


@operator("QLinearMul", domain=MICROSOFT)
def qlinear_mul(o: Opener) -> Tensor:
    distance = (_distance(o, 0, 2) * _distance(o, 3, 5)).cast(DType.FLOAT32)
    ratio = (scale_at(o, 1) * scale_at(o, 4)).quotient(scale_at(o, 6))
    dtype = o.tensor(0).dtype
    return rounded_to(distance * ratio + zero_at(o, 7, dtype).cast(DType.FLOAT32), dtype)


def _requantized(o: Opener, numbers: Tensor, scale: int, dtype: DType) -> Tensor:
    """Integers by the scale at this place and the zero point behind it."""
    return quantized(numbers, scale_at(o, scale), zero_at(o, scale + 1, dtype).cast(DType.FLOAT32), dtype)


@operator("QLinearSigmoid", domain=MICROSOFT)
def qlinear_sigmoid(o: Opener) -> Tensor:
    return _requantized(o, numbers_at(o, 0).call(Op.SIGMOID), 3, o.tensor(0).dtype)


@operator("QLinearLeakyRelu", domain=MICROSOFT)
def qlinear_leaky_relu(o: Opener) -> Tensor:
    x = numbers_at(o, 0)
    return _requantized(o, (x >= 0.0).select(x, x * o.number("alpha", 0.01)), 3, o.tensor(0).dtype)


@operator("QLinearWhere", domain=MICROSOFT)
def qlinear_where(o: Opener) -> Tensor:
    return o.tensor(0).select(_moved(o, 1, 7), _moved(o, 4, 7))


@operator("QLinearConcat", domain=MICROSOFT)
def qlinear_concat(o: Opener) -> Tensor:
    parts = [_moved(o, place, 0) for place in range(2, len(o.node.inputs), 3)]
    return o.concatenate(parts, o.axis(o.integer("axis", 0), len(parts[0].shape)))


def _moved(o: Opener, place: int, scale: int) -> Tensor:
    """The operand at `place` by another scale and zero point; as it is where they are its own."""
    own, other = ([o.tensor(at + n).content for n in (0, 1)] for at in (place + 1, scale))
    x = o.tensor(place)
    return x if own == other else _requantized(o, numbers_at(o, place), scale, x.dtype)


@operator("QLinearSoftmax", domain=MICROSOFT)
def qlinear_softmax(o: Opener) -> Tensor:
    """In whole steps: the inverse of the result's scale is cut to an integer."""
    x, since_13 = o.tensor(0), o.integer("opset", 0) >= 13
    axis = o.axis(o.integer("axis", -1 if since_13 else 1), len(x.shape))
    axes = (axis,) if since_13 else tuple(range(axis, len(x.shape)))
    distance = x.cast(DType.INT32) - x.reduce(Op.MAX, axes).cast(DType.INT32)
    exponentials = (distance.cast(DType.FLOAT32) * scale_at(o, 1)).call(Op.EXP_NONPOSITIVE)
    steps = (1.0 / scale_at(o, 3)).call(Op.FLOOR)
    found = (
        (exponentials * steps).quotient(exponentials.reduce(Op.ADD, axes)).call(Op.ROUND).cast(DType.INT32)
    )
    return (found + zero_at(o, 4, x.dtype)).minimum(x.dtype.integer_range[1]).cast(x.dtype)


@operator("QLinearGlobalAveragePool", domain=MICROSOFT)
def qlinear_global_average_pool(o: Opener) -> Tensor:
    """The sum is of integers, and exact."""
    x, rank = o.tensor(0), len(o.tensor(0).shape)
    axes = range(1, rank - 1) if o.integer("channels_last", 0) else range(2, rank)
    count = o.position(product(x.shape[axis] for axis in axes), DType.INT32)
    total = x.cast(DType.INT32).reduce(Op.ADD, axes) - zero_at(o, 2, x.dtype) * count
    mean = total.cast(DType.FLOAT32) * scale_at(o, 1).quotient(scale_at(o, 3) * count.cast(DType.FLOAT32))
    low, high = (float(bound) for bound in x.dtype.integer_range)
    zero = zero_at(o, 4, x.dtype).cast(DType.FLOAT32)
    clamped = mean.maximum(low - zero).minimum(high - zero)
    return (clamped.call(Op.ROUND) + zero).cast(x.dtype)
