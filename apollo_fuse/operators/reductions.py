"""Reductions, and the compound operators that are made of them: softmax and the normalisations."""

from __future__ import annotations

from collections.abc import Callable

from apollo_fuse.dtypes import DType
from apollo_fuse.expressions import Op
from apollo_fuse.graph import Shape
from apollo_fuse.index import ONE
from apollo_fuse.operators.opener import Opener, Tensor, Unsupported, floating
from apollo_fuse.operators.registry import DESCRIPTIONS, operator


def _identity(x: Tensor) -> Tensor:
    return x


def _square(x: Tensor) -> Tensor:
    return x * x


def _absolute(x: Tensor) -> Tensor:
    return x.call(Op.ABS)


def _exponential(x: Tensor) -> Tensor:
    return x.call(Op.EXP)


def _root(x: Tensor) -> Tensor:
    return _in_floats(x, Op.SQRT)


def _logarithm(x: Tensor) -> Tensor:
    return _in_floats(x, Op.LOG)


def _in_floats(x: Tensor, op: Op) -> Tensor:
    """Functions of integers are computed in doubles, and cut to integers again."""
    return x.call(op) if x.dtype.is_float else x.cast(DType.FLOAT64).call(op).cast(x.dtype)


# name: (what is applied to each element, how elements combine, what is applied to the result)
_REDUCTIONS: dict[str, tuple[Callable[[Tensor], Tensor], Op, Callable[[Tensor], Tensor]]] = {
    "ReduceSum": (_identity, Op.ADD, _identity),
    "ReduceProd": (_identity, Op.MUL, _identity),
    "ReduceMax": (_identity, Op.MAX, _identity),
    "ReduceMin": (_identity, Op.MIN, _identity),
    "ReduceL1": (_absolute, Op.ADD, _identity),
    "ReduceL2": (_square, Op.ADD, _root),
    "ReduceSumSquare": (_square, Op.ADD, _identity),
    "ReduceLogSum": (_identity, Op.ADD, _logarithm),
}


def _axes(o: Opener, rank: int) -> tuple[int, ...]:
    if o.has(1) or "axes" in o.node.attributes:
        axes = o.integers(1, "axes") or ()
    else:
        axes = ()
    if axes:
        return tuple(o.axis(axis, rank) for axis in axes)
    return () if o.integer("noop_with_empty_axes", 0) else tuple(range(rank))


def _reduction(o: Opener, name: str) -> Tensor:
    before, op, after = _REDUCTIONS[name]
    x = o.tensor(0)
    axes = _axes(o, len(x.shape))
    if not axes:
        raise Unsupported("a reduction over no axes")
    return after(before(x).reduce(op, axes, bool(o.integer("keepdims", 1))))


for _name in _REDUCTIONS:
    DESCRIPTIONS["", _name] = lambda o, name=_name: _reduction(o, name)  # type: ignore[misc]


@operator("ReduceMean")
def reduce_mean(o: Opener) -> Tensor:
    x = o.tensor(0)
    axes = _axes(o, len(x.shape))
    if not axes:
        raise Unsupported("a reduction over no axes")
    return x.mean(axes, bool(o.integer("keepdims", 1)))


@operator("ReduceLogSumExp")
def reduce_log_sum_exp(o: Opener) -> Tensor:
    """With the greatest element taken out first, where it is finite, so that no exponential overflows."""
    x = floating(o.tensor(0))
    axes = _axes(o, len(x.shape))
    greatest = x.reduce(Op.MAX, axes)
    shift = greatest.call(Op.IS_INF).select(0.0, greatest)
    result = (x - shift).call(Op.EXP).reduce(Op.ADD, axes).call(Op.LOG) + shift
    if o.integer("keepdims", 1):
        return result
    return result.reshape(tuple(e for a, e in enumerate(result.shape) if a not in axes))


@operator("GlobalAveragePool")
def global_average_pool(o: Opener) -> Tensor:
    x = o.tensor(0)
    return x.mean(range(2, len(x.shape)))


@operator("GlobalMaxPool")
def global_max_pool(o: Opener) -> Tensor:
    x = o.tensor(0)
    return x.reduce(Op.MAX, range(2, len(x.shape)))


@operator("GlobalLpPool")
def global_lp_pool(o: Opener) -> Tensor:
    x = floating(o.tensor(0))
    axes, p = range(2, len(x.shape)), float(o.integer("p", 2))
    if p == 2.0:
        return (x * x).reduce(Op.ADD, axes).call(Op.SQRT)
    powers = o.apply(Op.POW, x.call(Op.ABS), p).reduce(Op.ADD, axes)
    return o.apply(Op.POW, powers, 1.0 / p)


def _softmax_axes(o: Opener, rank: int) -> tuple[int, ...]:
    """From opset 13 one axis; before that everything from the axis on."""
    axis = o.axis(o.integer("axis", -1 if o.opset >= 13 else 1), rank)
    return (axis,) if o.opset >= 13 else tuple(range(axis, rank))


@operator("Softmax")
def softmax(o: Opener) -> Tensor:
    x = o.tensor(0)
    axes = _softmax_axes(o, len(x.shape))
    exponentials = (x - x.reduce(Op.MAX, axes)).call(Op.EXP_NONPOSITIVE)
    return exponentials / exponentials.reduce(Op.ADD, axes)


@operator("LogSoftmax")
def log_softmax(o: Opener) -> Tensor:
    x = o.tensor(0)
    axes = _softmax_axes(o, len(x.shape))
    shifted = x - x.reduce(Op.MAX, axes)
    return shifted - shifted.call(Op.EXP_NONPOSITIVE).reduce(Op.ADD, axes).call(Op.LOG)


def widened(x: Tensor) -> Tensor:
    return x.cast(DType.FLOAT32) if x.dtype.size == 2 else x


def normalise(x: Tensor, axes: tuple[int, ...], epsilon: float) -> tuple[Tensor, Tensor, Tensor]:
    """The normalised tensor, the mean and the deviation.

    Two passes: the mean first, then the mean of squared distances from it.
    """
    mean = x.mean(axes)
    centred = x - mean
    deviation = ((centred * centred).mean(axes) + epsilon).call(Op.SQRT)
    return centred / deviation, mean, deviation


def scaled(o: Opener, normalised: Tensor, place: int, shape: Shape | None = None) -> Tensor:
    """Times the operand at `place`, plus the one behind it, if any; each of the shape, where that is given.

    Exporters scale by ones and add zeros where a network does neither, and in a norm of groups, behind which
    channels are scaled. These are left out.
    """
    if not o.holds_nothing_but(1.0, place):
        scale = o.tensor(place)
        normalised = normalised * (scale if shape is None else scale.reshape(shape))
    if o.has(place + 1) and not o.holds_nothing_but(0.0, place + 1):
        bias = o.tensor(place + 1)
        normalised = normalised + (bias if shape is None else bias.reshape(shape))
    return normalised


@operator("LayerNormalization")
def layer_normalization(o: Opener) -> tuple[Tensor, ...]:
    """With the mean and the inverse of the deviation as further results."""
    x = o.tensor(0)
    axes = tuple(range(o.axis(o.integer("axis", -1), len(x.shape)), len(x.shape)))
    result, mean, deviation = normalise(widened(x), axes, o.number("epsilon", 1e-5))
    return scaled(o, result.cast(x.dtype), 1), mean, 1.0 / deviation


@operator("SkipLayerNormalization", domain="com.microsoft")
def skip_layer_normalization(o: Opener) -> tuple[Tensor, ...]:
    """Of the sum of the operand, a residual and a bias, which is a result too."""
    total = o.tensor(0) + o.tensor(1)
    total = total + o.tensor(4) if o.has(4) else total
    axes = (len(total.shape) - 1,)
    result, mean, deviation = normalise(widened(total), axes, o.number("epsilon", 1e-12))
    return scaled(o, result.cast(total.dtype), 2), mean, 1.0 / deviation, total


@operator("RMSNormalization")
@operator("SimplifiedLayerNormalization")
@operator("SimplifiedLayerNormalization", domain="com.microsoft")
def rms_normalization(o: Opener) -> tuple[Tensor, ...]:
    x = o.tensor(0)
    axes = tuple(range(o.axis(o.integer("axis", -1), len(x.shape)), len(x.shape)))
    result, scale = divided_by_root_mean_square(x, axes, o.number("epsilon", 1e-5))
    return scaled(o, result, 1), 1.0 / scale


@operator("SkipSimplifiedLayerNormalization", domain="com.microsoft")
def skip_rms_normalization(o: Opener) -> tuple[Tensor, ...]:
    """The second and third result are onnxruntime's mean and inverse deviation."""
    total = o.tensor(0) + o.tensor(1)
    total = total + o.tensor(3) if o.has(3) else total
    result, scale = divided_by_root_mean_square(total, (len(total.shape) - 1,), o.number("epsilon", 1e-12))
    return result * o.tensor(2), scale, 1.0 / scale, total


def divided_by_root_mean_square(x: Tensor, axes: tuple[int, ...], epsilon: float) -> tuple[Tensor, Tensor]:
    wide = widened(x)
    scale = ((wide * wide).mean(axes) + epsilon).call(Op.SQRT)
    return (wide / scale).cast(x.dtype), scale


@operator("MeanVarianceNormalization")
def mean_variance_normalization(o: Opener) -> Tensor:
    x = floating(o.tensor(0))
    axes = o.numbers("axes", ()) or (0, 2, 3)
    centred = x - x.mean(axes)
    return centred / ((centred * centred).mean(axes).call(Op.SQRT) + 1e-9)


@operator("LpNormalization")
def lp_normalization(o: Opener) -> Tensor:
    x = floating(o.tensor(0))
    axes = (o.axis(o.integer("axis", -1), len(x.shape)),)
    if o.integer("p", 2) == 1:
        norm = x.call(Op.ABS).reduce(Op.ADD, axes)
    else:
        norm = (x * x).reduce(Op.ADD, axes).call(Op.SQRT)
    return norm.equal(0.0).select(0.0, x / norm)


@operator("InstanceNormalization")
def instance_normalization(o: Opener) -> Tensor:
    x = o.tensor(0)
    channels = (x.shape[1], *[ONE for _ in x.shape[2:]])
    normalised, _, _ = normalise(x, tuple(range(2, len(x.shape))), o.number("epsilon", 1e-5))
    return scaled(o, normalised, 1, channels)
