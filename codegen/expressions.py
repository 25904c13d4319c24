"""Scalar expressions as C: types, literals, operators with ONNX's meaning, index arithmetic."""

from __future__ import annotations

import math

from apollo_fuse.dtypes import DType
from apollo_fuse.expressions import Constant, Op, identity
from apollo_fuse.index import Atom, Formula, Index, Indirect, Iterator, Maximum, Quotient, Symbol

STORAGE = {
    DType.FLOAT32: "float",
    DType.FLOAT64: "double",
    DType.FLOAT16: "uint16_t",
    DType.BFLOAT16: "uint16_t",
    DType.INT8: "int8_t",
    DType.INT16: "int16_t",
    DType.INT32: "int32_t",
    DType.INT64: "int64_t",
    DType.UINT8: "uint8_t",
    DType.UINT16: "uint16_t",
    DType.UINT32: "uint32_t",
    DType.UINT64: "uint64_t",
    DType.BOOL: "uint8_t",
}

SUFFIX = {
    DType.FLOAT32: "f32",
    DType.FLOAT64: "f64",
    DType.INT8: "i8",
    DType.INT16: "i16",
    DType.INT32: "i32",
    DType.INT64: "i64",
    DType.UINT8: "u8",
    DType.UINT16: "u16",
    DType.UINT32: "u32",
    DType.UINT64: "u64",
    DType.BOOL: "u8",
}

_INFIX = {Op.ADD: "+", Op.SUB: "-", Op.MUL: "*", Op.AND: "&", Op.OR: "|", Op.XOR: "^"}
_COMPARE = {Op.EQ: "==", Op.LT: "<", Op.LE: "<="}
_VMATH = {
    Op.EXP: "exp", Op.EXP_NONPOSITIVE: "exp_nonpositive",
    Op.EXPM1: "expm1", Op.LOG: "log", Op.LOG1P: "log1p", Op.TANH: "tanh", Op.ERF: "erf",
    Op.SIGMOID: "sigmoid", Op.SOFTPLUS: "softplus", Op.SIN: "sin", Op.COS: "cos", Op.POW: "pow",
    Op.FLOOR: "floor", Op.CEIL: "ceil", Op.ROUND: "rint",
}  # fmt: skip
_LIBM = {
    Op.SQRT: "sqrt", Op.ABS: "fabs", Op.TAN: "tan", Op.ASIN: "asin", Op.ACOS: "acos", Op.ATAN: "atan",
    Op.SINH: "sinh", Op.COSH: "cosh", Op.ASINH: "asinh", Op.ACOSH: "acosh", Op.ATANH: "atanh",
}  # fmt: skip


def compute_type(dtype: DType) -> str:
    """The C type that values are computed in; truth values are as wide as the floats beside them."""
    return "int32_t" if dtype is DType.BOOL else STORAGE[dtype.compute]


def compute_bytes(dtype: DType) -> int:
    """Bytes of the compute type."""
    return 4 if dtype is DType.BOOL else dtype.compute.size


def load(dtype: DType, text: str) -> str:
    """What is read from memory, in its compute type."""
    match dtype:
        case DType.FLOAT16:
            return f"af_half_to_float({text})"
        case DType.BFLOAT16:
            return f"af_bfloat16_to_float({text})"
        case _:
            return text


def store(dtype: DType, text: str) -> str:
    """A value of the compute type as it is written to memory."""
    match dtype:
        case DType.FLOAT16:
            return f"af_float_to_half({text})"
        case DType.BFLOAT16:
            return f"af_float_to_bfloat16({text})"
        case _:
            return text


def initial(op: Op, dtype: DType) -> str:
    """What an accumulator starts from."""
    return literal(identity(op, dtype))


def literal(constant: Constant) -> str:
    value, dtype = constant.value, constant.dtype
    if dtype.is_float:
        number = float(value)
        double = dtype is DType.FLOAT64
        if math.isnan(number):
            return "NAN"
        if math.isinf(number):
            return "INFINITY" if number > 0 else "-INFINITY"
        text = repr(number) if double else f"{number:.9g}"
        text = text if any(c in text for c in ".en") else text + ".0"
        return text if double else text + "f"
    number = int(value)
    if dtype in (DType.INT64, DType.UINT64):
        if number == -(2**63):
            return "INT64_MIN"
        return f"{'INT64_C' if dtype is DType.INT64 else 'UINT64_C'}({number})"
    if number == -(2**31):
        return "INT32_MIN"
    return f"{number}u" if dtype is DType.UINT32 else str(number)


def apply(op: Op, operands: tuple[str, ...], sources: tuple[DType, ...], dtype: DType) -> str:
    """One operation on operands that are names or literals; `sources` are their types."""
    source = sources[-1].compute
    first = operands[0]
    match op:
        case Op.ADD | Op.SUB | Op.MUL | Op.AND | Op.OR | Op.XOR:
            return _narrow(dtype, f"{first} {_INFIX[op]} {operands[1]}")
        case Op.DIV | Op.QUOTIENT if source.is_float:
            return f"{first} / {operands[1]}"
        case Op.DIV:
            return f"af_div_{SUFFIX[source]}({first}, {operands[1]})"
        case Op.EQ | Op.LT | Op.LE:
            return f"{first} {_COMPARE[op]} {operands[1]}"
        case Op.NOT:
            return f"!{first}"
        case Op.SELECT:
            return f"{first} ? {operands[1]} : {operands[2]}"
        case Op.CAST:
            return cast(first, sources[0], dtype)
        case Op.BITCAST:
            bits = f"AF_BITCAST({STORAGE[sources[0]]}, {STORAGE[dtype]}, {store(sources[0], first)})"
            return load(dtype, bits)
        case Op.NEG:
            return _narrow(dtype, f"-{first}" if not first.startswith("-") else f"-({first})")
        case Op.ABS if not source.is_float:
            return first if not source.is_signed else _narrow(dtype, f"{first} < 0 ? -{first} : {first}")
        case Op.FLOOR | Op.CEIL | Op.ROUND if not source.is_float:
            return first
        case Op.MULTIPLY_ADD:
            return f"AF_FMA{'' if source is DType.FLOAT64 else 'F'}({', '.join(operands)})"
        case Op.IS_NAN:
            return f"{first} != {first}"
        case Op.IS_INF:
            return f"{first} == INFINITY || {first} == -INFINITY"
        case Op.MAX | Op.MIN | Op.SIGN | Op.FLOOR_MOD | Op.TRUNC_MOD | Op.SHL | Op.SHR:
            return f"af_{op.value}_{SUFFIX[source]}({', '.join(operands)})"
        case _:
            ending = "" if source is DType.FLOAT64 else "f"
            name = f"af_{_VMATH[op]}" if op in _VMATH else _LIBM[op]
            return f"{name}{ending}({', '.join(operands)})"


def cast(value: str, source: DType, target: DType) -> str:
    """A conversion with the meaning it has in onnxruntime, on x86-64 also outside the target's range."""
    if target.compute is source.compute and target is target.compute:
        return value
    match target:
        case DType.BOOL:
            return f"{value} != 0"
        case DType.FLOAT16 | DType.BFLOAT16:
            number = value if source.compute is DType.FLOAT32 else f"(float){value}"
            return load(target, store(target, number))
        case _:
            kind = STORAGE[target]
    if source is DType.INT64 and target is DType.FLOAT32:
        return f"af_i64_to_f32({value})"
    if source.is_float and target.is_integer:
        if target.size < 4:
            return f"({kind})(int32_t){value}"
        if target is DType.UINT32:
            return f"({kind})(int64_t){value}"
        if target is DType.UINT64:
            return f"af_{SUFFIX[source.compute]}_to_u64({value})"
    return f"({kind}){value}"


def index(value: Index) -> str:
    """An index as an int64_t expression."""
    return value.written(_atom)


def formula(value: Formula) -> str:
    """What an extent is computed by."""
    if isinstance(value, Index):
        return index(value)
    left, right = index(value.left), index(value.right)
    return f"({left}) {'>' if value.greatest else '<'} ({right}) ? ({left}) : ({right})"


def _atom(atom: Atom) -> str:
    match atom:
        case Symbol(name) | Iterator(name, _):
            return name
        case Quotient(numerator, divisor):
            return f"af_floor_div({index(numerator)}, {index(divisor)})"
        case Maximum(left, right):
            return f"af_max_i64({index(left)}, {index(right)})"
        case Indirect(tensor, indices, extent):
            return f"af_wrap({tensor}[{index(indices[0])}], {index(extent)})"


def _narrow(dtype: DType, text: str) -> str:
    """C computes small integers in int; the result wraps to its own type again."""
    small = dtype.is_integer and dtype.size < 4
    return f"({STORAGE[dtype]})({text})" if small else text
