"""Elementwise operators: arithmetic, comparison, logic, casts, mathematics and activations.

Semantics follow the ONNX operator specification; where that leaves a case open (NaN in a
maximum, say) they follow onnxruntime's CPU kernels.
"""

from __future__ import annotations

import math
from functools import reduce

import onnx_ir as ir

from apollo_fuse.dtypes import DType
from apollo_fuse.expressions import Op
from apollo_fuse.index import ONE
from apollo_fuse.operators.opener import Opener, Tensor, Unsupported, floating
from apollo_fuse.operators.registry import DESCRIPTIONS, operator

_FUNCTIONS = {
    "Abs": Op.ABS, "Neg": Op.NEG, "Floor": Op.FLOOR, "Ceil": Op.CEIL, "Round": Op.ROUND,
    "Not": Op.NOT,
}  # fmt: skip
_FLOAT_FUNCTIONS = {
    "Sqrt": Op.SQRT, "Log": Op.LOG, "Tanh": Op.TANH, "Erf": Op.ERF, "Sigmoid": Op.SIGMOID,
    "Softplus": Op.SOFTPLUS, "Sin": Op.SIN, "Cos": Op.COS, "Tan": Op.TAN, "Asin": Op.ASIN, "Acos": Op.ACOS,
    "Atan": Op.ATAN, "Sinh": Op.SINH, "Cosh": Op.COSH, "Asinh": Op.ASINH, "Acosh": Op.ACOSH,
    "Atanh": Op.ATANH, "IsNaN": Op.IS_NAN,
}  # fmt: skip
_BITWISE = {"BitwiseAnd": Op.AND, "BitwiseOr": Op.OR, "BitwiseXor": Op.XOR}
_BINARY = {
    "Add": Op.ADD, "Sub": Op.SUB, "Mul": Op.MUL, "Equal": Op.EQ, "Less": Op.LT, "LessOrEqual": Op.LE,
    "And": Op.AND, "Or": Op.OR, "Xor": Op.XOR,
}  # fmt: skip


for _name, _op in _FUNCTIONS.items():
    DESCRIPTIONS["", _name] = lambda o, op=_op: o.tensor(0).call(op)  # type: ignore[misc]
for _name, _op in _FLOAT_FUNCTIONS.items():
    DESCRIPTIONS["", _name] = lambda o, op=_op: floating(o.tensor(0)).call(op)  # type: ignore[misc]
for _name, _op in _BINARY.items():
    DESCRIPTIONS["", _name] = lambda o, op=_op: o.apply(op, o.tensor(0), o.tensor(1))  # type: ignore[misc]


def _integer(x: Tensor) -> Tensor:
    if not x.dtype.is_integer:
        raise Unsupported(f"defined for integers only, not {x.dtype.value}")
    return x


for _name, _op in _BITWISE.items():
    DESCRIPTIONS["", _name] = lambda o, op=_op: o.apply(op, _integer(o.tensor(0)), o.tensor(1))  # type: ignore[misc]


@operator("Exp")
def exponential(o: Opener) -> Tensor:
    value = o.node.inputs[0]
    o.maximum = None if value is None else _maximum(value)
    return floating(o.tensor(0)).call(Op.EXP if o.maximum is None else Op.EXP_NONPOSITIVE)


def _maximum(value: ir.Value) -> ir.Node | None:
    """The node whose maximum of a tensor was taken from that tensor, as the softmax of exporters does."""
    difference = value.producer()
    if difference is None or difference.op_type != "Sub":
        return None
    whole, greatest = difference.inputs
    maximum = None if greatest is None else greatest.producer()
    taken = maximum is not None and maximum.op_type == "ReduceMax" and maximum.inputs[0] is whole
    return maximum if taken else None


@operator("BitwiseNot")
def bitwise_not(o: Opener) -> Tensor:
    """All ones, less the number: -1 - x where there is a sign."""
    x = _integer(o.tensor(0))
    ones = -1 if x.dtype.is_signed else x.dtype.integer_range[1]
    return o.apply(Op.XOR, x, ones)


@operator("BitShift")
def bit_shift(o: Opener) -> Tensor:
    """Shifts by the width of the type or more, or by negative numbers, leave nothing but the sign."""
    return o.apply(
        Op.SHL if o.text("direction", "LEFT") == "LEFT" else Op.SHR, _integer(o.tensor(0)), o.tensor(1)
    )


@operator("Shrink")
def shrink(o: Opener) -> Tensor:
    """Towards 0 by the bias outside of the threshold, 0 within; computed in floats, as in onnxruntime."""
    x, bias, threshold = o.tensor(0), o.number("bias", 0.0), o.number("lambd", 0.5)
    wide = x.cast(DType.FLOAT32)
    low, high = wide < -threshold, wide > threshold
    return low.select(wide + bias, high.select(wide - bias, 0.0)).cast(x.dtype)


@operator("BiasGelu", "FastGelu", domain="com.microsoft")
def bias_gelu(o: Opener) -> Tensor:
    """Gelu behind an optional bias; FastGelu by its approximation with tanh."""
    x = floating(o.tensor(0))
    biased = x + o.tensor(1) if o.has(1) else x
    return _gelu_tanh(biased) if o.node.op_type == "FastGelu" else _gelu(biased)


@operator("Sign")
def sign(o: Opener) -> Tensor:
    """onnxruntime passes a NaN on, but gives 0 for that of a half type."""
    x = o.tensor(0)
    if x.dtype is x.dtype.compute:
        return x.call(Op.SIGN)
    return (x > 0.0).cast(x.dtype) - (x < 0.0).cast(x.dtype)


@operator("Div")
def div(o: Opener) -> Tensor:
    return o.tensor(0) / o.tensor(1)


@operator("Greater")
def greater(o: Opener) -> Tensor:
    return o.tensor(0) > o.tensor(1)


@operator("GreaterOrEqual")
def greater_or_equal(o: Opener) -> Tensor:
    return o.tensor(0) >= o.tensor(1)


@operator("Mod")
def mod(o: Opener) -> Tensor:
    return o.apply(Op.TRUNC_MOD if o.integer("fmod", 0) else Op.FLOOR_MOD, o.tensor(0), o.tensor(1))


@operator("Pow")
def power(o: Opener) -> Tensor:
    """onnxruntime multiplies for exponents 2 and 3; one half is a root, correctly rounded."""
    x, exponent = o.tensor(0), o.tensor(1)
    if not isinstance(exponent.content, str):
        match float(exponent.content.value):
            case 2.0:
                return _with_rank(x * x, exponent)
            case 3.0:
                return _with_rank(x * x * x, exponent)
            case 1.0:
                return _with_rank(x * 1, exponent)
            case _:
                pass
    varies = isinstance(exponent.content, str)
    if x.dtype.is_integer or (varies and exponent.dtype is not x.dtype):  # in doubles, as C++ has it
        return o.apply(Op.POW, x.cast(DType.FLOAT64), exponent.cast(DType.FLOAT64)).cast(x.dtype)
    return o.apply(Op.POW, x, exponent.cast(x.dtype))


def _with_rank(result: Tensor, other: Tensor) -> Tensor:
    if len(other.shape) > len(result.shape):
        raise Unsupported("a constant exponent of higher rank than the base")
    return result


@operator("Max")
def maximum(o: Opener) -> Tensor:
    return reduce(Tensor.maximum, [o.tensor(i) for i in range(len(o.node.inputs))])


@operator("Min")
def minimum(o: Opener) -> Tensor:
    return reduce(Tensor.minimum, [o.tensor(i) for i in range(len(o.node.inputs))])


@operator("Sum")
def total(o: Opener) -> Tensor:
    return reduce(Tensor.__add__, [o.tensor(i) for i in range(len(o.node.inputs))])


@operator("Mean")
def mean(o: Opener) -> Tensor:
    count = len(o.node.inputs)
    return reduce(Tensor.__add__, [o.tensor(i) for i in range(count)]) / float(count)


@operator("Where")
def where(o: Opener) -> Tensor:
    return o.tensor(0).select(o.tensor(1), o.tensor(2))


@operator("Cast", "CastLike")
def cast(o: Opener) -> Tensor:
    return o.apply(Op.CAST, o.tensor(0), dtype=o.output_dtype())


@operator("BitCast")
def bit_cast(o: Opener) -> Tensor:
    x, dtype = o.tensor(0), o.output_dtype()
    if x.dtype.size != dtype.size or DType.BOOL in (x.dtype, dtype):
        raise Unsupported(f"bits of {x.dtype.value} as {dtype.value}")
    return o.apply(Op.BITCAST, x, dtype=dtype)


@operator("Identity", "Dropout")
def identity(o: Opener) -> Tensor:
    if len(o.node.outputs) > 1:
        raise Unsupported("a mask output")
    if o.has(2) and o.constant(2).any():
        raise Unsupported("training mode")
    return o.tensor(0).reshape(o.tensor(0).shape)


@operator("Clip")
def clip(o: Opener) -> Tensor:
    """Bounds are applied in the order of the specification: the upper one wins where they cross."""
    x = o.tensor(0)
    for place, name, bound, sign in ((1, "min", Tensor.maximum, -1), (2, "max", Tensor.minimum, 1)):
        if o.has(place):
            x = bound(x, o.tensor(place))
        elif name in o.node.attributes:
            x = bound(x, o.number(name, 0.0))
        elif x.dtype.is_float:  # the default bounds are finite
            x = bound(x, sign * x.dtype.greatest)
    return x if o.primitives else x.reshape(x.shape)


@operator("Reciprocal")
def reciprocal(o: Opener) -> Tensor:
    return 1.0 / floating(o.tensor(0))


@operator("Relu")
def relu(o: Opener) -> Tensor:
    return o.tensor(0).maximum(0)


@operator("LeakyRelu")
def leaky_relu(o: Opener) -> Tensor:
    x = floating(o.tensor(0))
    return (x >= 0.0).select(x, x * o.number("alpha", 0.01))


@operator("PRelu")
def prelu(o: Opener) -> Tensor:
    x = floating(o.tensor(0))
    return (x >= 0.0).select(x, x * o.tensor(1))


@operator("ThresholdedRelu")
def thresholded_relu(o: Opener) -> Tensor:
    x = floating(o.tensor(0))
    return (x > o.number("alpha", 1.0)).select(x, 0.0)


@operator("Elu")
def elu(o: Opener) -> Tensor:
    x = floating(o.tensor(0))
    return (x >= 0.0).select(x, x.call(Op.EXPM1) * o.number("alpha", 1.0))


@operator("Celu")
def celu(o: Opener) -> Tensor:
    x, alpha = floating(o.tensor(0)), o.number("alpha", 1.0)
    return x.maximum(0.0) + ((x / alpha).call(Op.EXPM1) * alpha).minimum(0.0)


@operator("Selu")
def selu(o: Opener) -> Tensor:
    x = floating(o.tensor(0))
    alpha, gamma = o.number("alpha", 1.67326319217681884765625), o.number("gamma", 1.05070102214813232421875)
    return (x > 0.0).select(x, x.call(Op.EXPM1) * alpha) * gamma


@operator("HardSigmoid")
def hard_sigmoid(o: Opener) -> Tensor:
    x = floating(o.tensor(0))
    return (x * o.number("alpha", 0.2) + o.number("beta", 0.5)).maximum(0.0).minimum(1.0)


@operator("HardSwish")
def hard_swish(o: Opener) -> Tensor:
    x = floating(o.tensor(0))
    return x * (x * (1.0 / 6.0) + 0.5).maximum(0.0).minimum(1.0)


@operator("Softsign")
def softsign(o: Opener) -> Tensor:
    x = floating(o.tensor(0))
    return x / (x.call(Op.ABS) + 1.0)


@operator("Mish")
def mish(o: Opener) -> Tensor:
    x = floating(o.tensor(0))
    return x * x.call(Op.SOFTPLUS).call(Op.TANH)


@operator("Swish", "Silu")
def swish(o: Opener) -> Tensor:
    x = floating(o.tensor(0))
    return x * (x * o.number("alpha", 1.0)).call(Op.SIGMOID)


@operator("SwiGLU")
def swiglu(o: Opener) -> Tensor:
    gate = floating(o.tensor(0))
    return gate * (gate * o.number("alpha", 1.0)).call(Op.SIGMOID) * o.tensor(1)


@operator("QuickGelu", domain="com.microsoft")
def quick_gelu(o: Opener) -> Tensor:
    x = floating(o.tensor(0))
    return x * (x * o.number("alpha", 1.702)).call(Op.SIGMOID)


@operator("Gelu")
@operator("Gelu", domain="com.microsoft")
def gelu(o: Opener) -> Tensor:
    x = floating(o.tensor(0))
    return _gelu_tanh(x) if o.text("approximate", "none") == "tanh" else _gelu(x)


def _gelu(x: Tensor) -> Tensor:
    return x * 0.5 * ((x * math.sqrt(0.5)).call(Op.ERF) + 1.0)


def _gelu_tanh(x: Tensor) -> Tensor:
    inner = (x * x * x * 0.044715 + x) * math.sqrt(2.0 / math.pi)
    return x * 0.5 * (inner.call(Op.TANH) + 1.0)


@operator("IsInf")
def is_inf(o: Opener) -> Tensor:
    x = floating(o.tensor(0))
    positive, negative = o.integer("detect_positive", 1), o.integer("detect_negative", 1)
    infinite = x.call(Op.IS_INF)
    if positive and negative:
        return infinite
    if not positive and not negative:
        return o.apply(Op.AND, infinite, False)
    return o.apply(Op.AND, infinite, (x > 0.0) if positive else (x < 0.0))


@operator("BatchNormalization")
def batch_normalization(o: Opener) -> Tensor:
    """Inference form; scale, bias, mean and variance lie along axis 1."""
    if o.integer("training_mode", 0) or sum(1 for out in o.node.outputs if out.name) > 1:
        raise Unsupported("training mode")
    x = floating(o.tensor(0))
    channels = (x.shape[1], *[ONE for _ in x.shape[2:]])
    scale, bias, average, variance = (o.tensor(place).reshape(channels) for place in (1, 2, 3, 4))
    deviation = (variance + o.number("epsilon", 1e-5)).call(Op.SQRT)
    return (x - average) * (scale / deviation) + bias
