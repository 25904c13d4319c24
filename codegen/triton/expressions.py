"""Scalar expressions as Triton: types, literals, operators with ONNX's meaning, index arithmetic.

Values are computed in the types that C computes them in; truth values are `int1`, and bytes in memory.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from apollo_fuse.dtypes import DType
from apollo_fuse.expressions import Constant, Op, identity
from apollo_fuse.index import Atom, Index, Indirect, Iterator, Maximum, Quotient, Symbol, non_negative

STORAGE = {
    DType.FLOAT32: "tl.float32",
    DType.FLOAT64: "tl.float64",
    DType.FLOAT16: "tl.float16",
    DType.BFLOAT16: "tl.bfloat16",
    DType.INT8: "tl.int8",
    DType.INT16: "tl.int16",
    DType.INT32: "tl.int32",
    DType.INT64: "tl.int64",
    DType.UINT8: "tl.uint8",
    DType.UINT16: "tl.uint16",
    DType.UINT32: "tl.uint32",
    DType.UINT64: "tl.uint64",
    DType.BOOL: "tl.uint8",
}

_INFIX = {
    Op.ADD: "+", Op.SUB: "-", Op.MUL: "*", Op.AND: "&", Op.OR: "|", Op.XOR: "^",
    Op.EQ: "==", Op.LT: "<", Op.LE: "<=",
}  # fmt: skip
_FUNCTIONS = {
    Op.EXP: "tl.exp", Op.EXP_NONPOSITIVE: "tl.exp",
    Op.LOG: "tl.log", Op.ERF: "tl.erf", Op.SIGMOID: "tl.sigmoid",
    Op.SIN: "tl.sin", Op.COS: "tl.cos", Op.FLOOR: "tl.floor", Op.CEIL: "tl.ceil",
    Op.SOFTPLUS: "af.softplus", Op.ROUND: "libdevice.rint", Op.POW: "libdevice.pow",
    Op.EXPM1: "libdevice.expm1", Op.LOG1P: "libdevice.log1p", Op.TANH: "libdevice.tanh",
    Op.TAN: "libdevice.tan", Op.ASIN: "libdevice.asin", Op.ACOS: "libdevice.acos",
    Op.ATAN: "libdevice.atan", Op.SINH: "libdevice.sinh", Op.COSH: "libdevice.cosh",
    Op.ASINH: "libdevice.asinh", Op.ACOSH: "libdevice.acosh", Op.ATANH: "libdevice.atanh",
}  # fmt: skip


def compute_type(dtype: DType) -> str:
    """The type that values are computed in."""
    return "tl.int1" if dtype is DType.BOOL else STORAGE[dtype.compute]


def load(dtype: DType, text: str) -> str:
    """What is read from memory, in its compute type."""
    match dtype:
        case DType.FLOAT16 | DType.BFLOAT16:
            return f"{text}.to(tl.float32)"
        case DType.BOOL:
            return f"({text} != 0)"
        case _:
            return text


def literal(constant: Constant) -> str:
    """A Python number, which takes the type of the operand beside it."""
    value, dtype = constant.value, constant.dtype
    if dtype.is_float:
        number = float(value)
        if not math.isfinite(number):
            return f'float("{number}")'
        text = repr(number) if dtype is DType.FLOAT64 else f"{number:.9g}"
        return text if any(c in text for c in ".e") else text + ".0"
    return str(bool(value)) if dtype is DType.BOOL else str(int(value))


def initial(op: Op, dtype: DType) -> str:
    """What an accumulator starts from."""
    return literal(identity(op, dtype))


def typed(constant: Constant) -> str:
    """A constant with a type of its own, for where nothing beside it has one."""
    return f"tl.full((), {literal(constant)}, {compute_type(constant.dtype)})"


def combine(op: Op, dtype: DType, left: str, right: str) -> str:
    """One more value in an accumulator."""
    extreme = "maximum" if op is Op.MAX else "minimum"
    match op:
        case Op.ADD | Op.MUL:
            return f"{left} {_INFIX[op]} {right}"
        case _ if dtype.is_float:
            return f"af.{extreme}({left}, {right})"
        case _ if dtype is DType.BOOL:
            return f"{left} {'|' if op is Op.MAX else '&'} {right}"
        case _:
            return f"tl.{extreme}({left}, {right})"


def reduce(op: Op, dtype: DType, block: str, in_rows: bool) -> str:
    """All values of a block combined, or of each of its rows."""
    extreme = "max" if op is Op.MAX else "min"
    axis = "1, keep_dims=True" if in_rows else "0"
    match op:
        case Op.ADD:
            return _narrow(dtype, f"tl.sum({block}, {axis})")
        case Op.MUL:
            return f"af.product({block}, {axis})"
        case _ if dtype.is_float:
            return f"af.{'greatest' if op is Op.MAX else 'least'}({block}, {axis})"
        case _ if dtype is DType.BOOL:
            return f"(tl.{extreme}({block}.to(tl.int32), {axis}) != 0)"
        case _:
            return _narrow(dtype, f"tl.{extreme}({block}, {axis})")


def apply(op: Op, operands: tuple[str, ...], constants: tuple[Constant | None, ...], source: DType) -> str:
    """One operation on operands that are names or constants; `source` is the type of the last operand."""
    source = source.compute
    beside = [constant for constant in constants[1 if op is Op.SELECT else 0 :]]
    takes_literals = op in _INFIX or op is Op.SELECT or (op in (Op.DIV, Op.QUOTIENT) and source.is_float)
    if not takes_literals or None not in beside:
        operands = tuple(o if c is None else typed(c) for o, c in zip(operands, constants, strict=True))
    first = operands[0]
    arguments = ", ".join(operands)
    unsigned = "" if source.is_signed else "unsigned_"
    match op:
        case _ if op in _INFIX:
            return f"{first} {_INFIX[op]} {operands[1]}"
        case Op.DIV | Op.QUOTIENT if source is DType.FLOAT32:
            return f"tl.div_rn({arguments})"
        case Op.DIV | Op.QUOTIENT if source.is_float:
            return f"{first} / {operands[1]}"
        case Op.DIV:
            return f"af.{unsigned}divide({arguments})"
        case Op.MAX | Op.MIN:
            return combine(op, source, first, operands[1])
        case Op.MULTIPLY_ADD:
            return f"tl.fma({arguments})"
        case Op.NOT:
            return f"~{first}"
        case Op.SELECT:
            return f"tl.where({arguments})"
        case Op.NEG:
            return f"-{first}"
        case Op.ABS:
            return f"tl.abs({first})"
        case Op.SIGN:
            return f"af.{'' if source.is_float else unsigned}sign({first})"
        case Op.FLOOR | Op.CEIL | Op.ROUND if not source.is_float:
            return first
        case Op.IS_NAN:
            return f"{first} != {first}"
        case Op.IS_INF:
            return f'tl.abs({first}) == float("inf")'
        case Op.FLOOR_MOD if source.is_float:
            return f"af.float_floor_mod({arguments})"
        case Op.TRUNC_MOD if source.is_float:
            return f"libdevice.fmod({arguments})"
        case Op.FLOOR_MOD | Op.TRUNC_MOD if unsigned:
            return f"af.unsigned_mod({arguments})"
        case Op.FLOOR_MOD | Op.TRUNC_MOD:
            return f"af.{op.value}({arguments})"
        case Op.SHL:
            return f"af.shift_left({arguments})"
        case Op.SHR:
            return f"af.{unsigned}shift_right({arguments})"
        case Op.SQRT:
            return f"tl.sqrt{'_rn' if source is DType.FLOAT32 else ''}({first})"
        case _:
            return f"{_FUNCTIONS[op]}({arguments})"


def bitcast(value: str, source: DType, target: DType) -> str:
    """The same bits in another type of as many."""
    stored = value if source.compute is source else f"{value}.to({STORAGE[source]})"
    return load(target, f"{stored}.to({STORAGE[target]}, bitcast=True)")


def cast(value: str, source: DType, target: DType) -> str:
    """A conversion with the meaning it has in C, also outside the target's range."""
    if target.compute is source.compute and target is target.compute:
        return value
    match target:
        case DType.BOOL:
            return f"{value} != 0"
        case DType.FLOAT16 | DType.BFLOAT16:
            number = value if source.compute is DType.FLOAT32 else f"{value}.to(tl.float32)"
            return f"{number}.to({STORAGE[target]}).to(tl.float32)"
        case _ if not (source.is_float and target.is_integer):
            return f"{value}.to({STORAGE[target]})"
        case DType.INT32 | DType.INT64 | DType.UINT64:
            return f"af.to_{target.value}({value})"
        case DType.UINT32:
            return f"af.to_int64({value}).to(tl.uint32)"
        case _:
            return f"af.to_int32({value}).to({STORAGE[target]})"


def index(value: Index, indirect: Mapping[Indirect, str]) -> str:
    """An index; `indirect` names what was read from index tensors."""
    return value.written(lambda atom: _atom(atom, indirect))


def factor(value: Index, indirect: Mapping[Indirect, str]) -> str:
    """The same, in parentheses where it is more than a number or a name."""
    text = index(value, indirect)
    (monomial, coefficient), *others = value.terms or (((), 0),)
    simple = not others and coefficient >= 0 and (not monomial or (len(monomial) == 1 and coefficient == 1))
    return text if simple else f"({text})"


def _atom(atom: Atom, indirect: Mapping[Indirect, str]) -> str:
    match atom:
        case Symbol(name) | Iterator(name, _):
            return name
        case Quotient(numerator, divisor):
            if non_negative(numerator) and non_negative(divisor):
                return f"({factor(numerator, indirect)} // {factor(divisor, indirect)})"
            return f"af.floor_divide({index(numerator, indirect)}, {index(divisor, indirect)})"
        case Maximum(left, right):
            return f"tl.maximum({index(left, indirect)}, {index(right, indirect)})"
        case Indirect():
            return indirect[atom]


def _narrow(dtype: DType, text: str) -> str:
    """Triton reduces small integers as wider ones."""
    small = dtype.is_integer and dtype.size < 4
    return f"{text}.to({STORAGE[dtype]})" if small else text
