"""Scalar expressions in SSA form: what one point of an iteration space computes.

A `Block` is a list of instructions, each naming its operands by their place in the list; the last
one is the result.  Equal instructions of a block are one instruction, so a value used twice is
computed once, and inlining a producer is a copy with its iterators substituted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import TypeAlias

from apollo_fuse.dtypes import DType
from apollo_fuse.index import Atom, Index, Iterator


class Op(Enum):
    """A scalar operation; the value is the name in printed IR."""

    ADD = "add"
    SUB = "sub"
    MUL = "mul"
    DIV = "div"
    QUOTIENT = "quotient"  # a division whose last bit counts, and so never a product with the reciprocal
    MULTIPLY_ADD = "multiply_add"  # a * b + c, rounded once where the processor can
    POW = "pow"
    FLOOR_MOD = "floor_mod"
    TRUNC_MOD = "trunc_mod"
    MAX = "max"
    MIN = "min"
    EQ = "eq"
    LT = "lt"
    LE = "le"
    AND = "and"
    OR = "or"
    XOR = "xor"
    SHL = "shift_left"
    SHR = "shift_right"
    NOT = "not"
    SELECT = "select"
    CAST = "cast"
    BITCAST = "bitcast"  # the same bits in another type of as many
    NEG = "neg"
    ABS = "abs"
    SIGN = "sign"
    SQRT = "sqrt"
    EXP = "exp"
    EXP_NONPOSITIVE = "exp_nonpositive"  # of what is known to be at most 0; denormal results are 0
    EXPM1 = "expm1"
    LOG = "log"
    LOG1P = "log1p"
    TANH = "tanh"
    ERF = "erf"
    SIGMOID = "sigmoid"
    SOFTPLUS = "softplus"
    SIN = "sin"
    COS = "cos"
    TAN = "tan"
    ASIN = "asin"
    ACOS = "acos"
    ATAN = "atan"
    SINH = "sinh"
    COSH = "cosh"
    ASINH = "asinh"
    ACOSH = "acosh"
    ATANH = "atanh"
    FLOOR = "floor"
    CEIL = "ceil"
    ROUND = "round"
    IS_NAN = "is_nan"
    IS_INF = "is_inf"


_CHEAP = {
    Op.ADD, Op.SUB, Op.MUL, Op.MULTIPLY_ADD, Op.MAX, Op.MIN, Op.EQ, Op.LT, Op.LE, Op.AND, Op.OR, Op.XOR,
    Op.NOT, Op.SHL, Op.SHR, Op.SELECT, Op.CAST, Op.BITCAST, Op.NEG, Op.ABS, Op.SIGN, Op.FLOOR, Op.CEIL,
    Op.ROUND, Op.IS_NAN, Op.IS_INF,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Constant:
    value: float | int | bool
    dtype: DType

    def __hash__(self) -> int:
        return hash((repr(self.value), self.dtype))

    def __eq__(self, other: object) -> bool:  # tells -0.0 from 0.0, and lets a NaN equal itself
        return (
            isinstance(other, Constant)
            and repr(self.value) == repr(other.value)
            and self.dtype is other.dtype
        )


@dataclass(frozen=True, slots=True)
class Load:
    """An element of the tensor called `tensor`."""

    tensor: str
    indices: tuple[Index, ...]
    dtype: DType


@dataclass(frozen=True, slots=True)
class Position:
    """An index as a number, such as the length that a mean divides by."""

    index: Index
    dtype: DType


@dataclass(frozen=True, slots=True)
class Apply:
    op: Op
    operands: tuple[int, ...]
    dtype: DType


Instruction: TypeAlias = Constant | Load | Position | Apply


@dataclass(frozen=True, slots=True)
class Block:
    """Instructions in SSA order; the last is the result."""

    instructions: tuple[Instruction, ...]

    @property
    def dtype(self) -> DType:
        return self.instructions[-1].dtype

    @property
    def loads(self) -> tuple[Load, ...]:
        return tuple(i for i in self.instructions if isinstance(i, Load))

    @property
    def cost(self) -> int:
        """Arithmetic per point, in cheap operations, as `cost_of` counts them."""
        return sum(map(cost_of, self.instructions))

    def substitute(self, values: Mapping[Atom, Index]) -> Block:
        builder = BlockBuilder()
        builder.append(self, values)
        return builder.build()

    def part(self, place: int, reads: Mapping[int, Load] | None = None) -> Block:
        """What the instruction at a place computes; `reads` stand in the place of some before it.

        A negative place counts from the end.
        """
        held = reads or {}
        place %= len(self.instructions)
        needed = {place}
        for number in range(place, -1, -1):
            item = self.instructions[number]
            if number in needed and number not in held and isinstance(item, Apply):
                needed.update(item.operands)
        builder = BlockBuilder()
        places: dict[int, int] = {}
        for number in sorted(needed):
            item = held.get(number, self.instructions[number])
            if isinstance(item, Apply):
                item = Apply(item.op, tuple(places[o] for o in item.operands), item.dtype)
            places[number] = builder.add(item)
        return builder.build_at(places[place])

    def __str__(self) -> str:
        lines = [f"%{place} = {_text(item)}" for place, item in enumerate(self.instructions)]
        return "\n".join(lines)


@dataclass(slots=True)
class BlockBuilder:
    """Appends instructions to a block, reusing equal ones."""

    instructions: list[Instruction] = field(default_factory=list)
    _places: dict[Instruction, int] = field(default_factory=dict)

    def add(self, instruction: Instruction) -> int:
        place = self._places.get(instruction)
        if place is None:
            place = self._places[instruction] = len(self.instructions)
            self.instructions.append(instruction)
        return place

    def append(
        self,
        block: Block,
        values: Mapping[Atom, Index],
        load: Callable[[Load], int | None] = lambda _: None,
    ) -> int:
        """Copies a block with its indices substituted; `load` may give the place that stands for a read."""
        places: list[int] = []
        for item in block.instructions:
            match item:
                case Constant():
                    places.append(self.add(item))
                case Position(index, dtype):
                    places.append(self.add(Position(index.substitute(values), dtype)))
                case Load(tensor, indices, dtype):
                    read = Load(tensor, tuple(i.substitute(values) for i in indices), dtype)
                    known = load(read)
                    places.append(self.add(read) if known is None else known)
                case Apply(op, operands, dtype):
                    places.append(self.add(Apply(op, tuple(places[o] for o in operands), dtype)))
        return places[-1]

    def build(self) -> Block:
        """The block with what its last instruction does not need left out."""
        return Block(_reachable(self.instructions, len(self.instructions) - 1))

    def build_at(self, place: int) -> Block:
        return Block(_reachable(self.instructions, place))


@dataclass(frozen=True, slots=True)
class Reduction:
    """How the points along `iterators` are combined; the accumulator starts at the operation's identity."""

    op: Op  # ADD, MUL, MAX, MIN
    iterators: tuple[Iterator, ...]


def identity(op: Op, dtype: DType) -> Constant:
    """What an accumulator of ADD, MUL, MAX or MIN starts from."""
    if op in (Op.ADD, Op.MUL):
        return Constant(0 if op is Op.ADD else 1, dtype)
    least = op is Op.MAX
    if dtype.is_float:
        return Constant(-math.inf if least else math.inf, dtype)
    if dtype is DType.BOOL:
        return Constant(not least, dtype)
    low, high = dtype.integer_range
    return Constant(low if least else high, dtype)


def _reachable(instructions: list[Instruction], result: int) -> tuple[Instruction, ...]:
    needed = {result}
    for place in range(result, -1, -1):
        item = instructions[place]
        if place in needed and isinstance(item, Apply):
            needed.update(item.operands)
    order = {old: new for new, old in enumerate(sorted(needed))}
    kept: Iterable[Instruction] = (
        Apply(item.op, tuple(order[o] for o in item.operands), item.dtype)
        if isinstance(item, Apply)
        else item
        for item in (instructions[old] for old in sorted(needed))
    )
    return tuple(kept)


def cost_of(item: Instruction) -> int:
    """Cheap operations that an instruction counts as: divisions and roots 4, functions 10."""
    if not isinstance(item, Apply):
        return 0
    if item.op in (Op.DIV, Op.QUOTIENT, Op.SQRT, Op.FLOOR_MOD, Op.TRUNC_MOD):
        return 4
    return 1 if item.op in _CHEAP else 10


def _text(item: Instruction) -> str:
    match item:
        case Constant(value, dtype):
            return f"{dtype.value} {value!r}"
        case Load(tensor, indices, _):
            return f"{tensor}[{', '.join(map(str, indices))}]"
        case Position(index, dtype):
            return f"{dtype.value}({index})"
        case Apply(op, operands, dtype):
            return f"{op.value}.{dtype.value} " + ", ".join(f"%{o}" for o in operands)
