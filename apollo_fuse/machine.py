"""A machine as the cost model sees it: what moving bytes, an operation and a start cost on it.

All times are in seconds, all sizes in bytes and all rates in bytes or operations a second.  Where the figures
come from is the matter of `descriptions` (public ones) and of `calibration` (measured ones).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from apollo_fuse.dtypes import DType
from apollo_fuse.errors import ApolloFuseError
from apollo_fuse.expressions import Op


class Unit(Enum):
    """What operations have in common that take about as long as each other."""

    SIMPLE = "simple"  # additions, products
    BOUND = "bound"  # the greater or the less of a value and a constant
    EXTREME = "extreme"  # of two values, either of which may be NaN
    CHOOSE = "choose"  # comparisons and choices
    ROUND = "round"
    DIVIDE = "divide"
    SQRT = "sqrt"
    REMAINDER = "remainder"
    CONVERT = "convert"
    EXP = "exp"
    EXPM1 = "expm1"
    LOG = "log"
    LOG1P = "log1p"
    TANH = "tanh"
    ERF = "erf"
    SIGMOID = "sigmoid"
    SOFTPLUS = "softplus"
    POW = "pow"
    SINE = "sine"
    LIBRARY = "library"  # functions that are calls of the C library
    LOAD = "load"  # of neighbouring elements into one vector
    STORE = "store"
    LOAD_ACROSS = "load_across"  # the same, where vectors begin within a line of the cache
    STORE_ACROSS = "store_across"
    STRIDED = "strided"  # of elements so near each other that they are shuffled out of vectors
    GATHER = "gather"  # of elements that are no neighbours
    SCATTER = "scatter"
    FAR_GATHER = "far_gather"  # of so many lines of the same few sets that the nearest cache loses them
    FAR_SCATTER = "far_scatter"
    CLAMPED = "clamped"  # a read whose index is kept within bounds
    CHAIN_ADD = "chain_add"  # one step of a sum that has to wait for the one before
    CHAIN_MAX = "chain_max"


UNITS: Mapping[Op, Unit] = {op: Unit.SIMPLE for op in Op} | {
    **dict.fromkeys((Op.MAX, Op.MIN), Unit.EXTREME),
    **dict.fromkeys((Op.EQ, Op.LT, Op.LE, Op.SELECT, Op.SIGN, Op.IS_NAN, Op.IS_INF), Unit.CHOOSE),
    Op.DIV: Unit.DIVIDE,
    Op.QUOTIENT: Unit.DIVIDE,
    Op.SQRT: Unit.SQRT,
    Op.FLOOR_MOD: Unit.REMAINDER,
    Op.TRUNC_MOD: Unit.REMAINDER,
    Op.NOT: Unit.CHOOSE,
    Op.CAST: Unit.CONVERT,
    Op.EXP: Unit.EXP,
    Op.EXP_NONPOSITIVE: Unit.EXP,
    Op.EXPM1: Unit.EXPM1,
    Op.LOG: Unit.LOG,
    Op.LOG1P: Unit.LOG1P,
    Op.TANH: Unit.TANH,
    Op.ERF: Unit.ERF,
    Op.SIGMOID: Unit.SIGMOID,
    Op.SOFTPLUS: Unit.SOFTPLUS,
    Op.POW: Unit.POW,
    Op.SIN: Unit.SINE,
    Op.COS: Unit.SINE,
    Op.FLOOR: Unit.ROUND,
    Op.CEIL: Unit.ROUND,
    Op.ROUND: Unit.ROUND,
    **dict.fromkeys(
        (Op.TAN, Op.ASIN, Op.ACOS, Op.ATAN, Op.SINH, Op.COSH, Op.ASINH, Op.ACOSH, Op.ATANH), Unit.LIBRARY
    ),
}
"""The unit of each operation."""

MOVES = frozenset(
    {
        *(Unit.LOAD, Unit.STORE, Unit.LOAD_ACROSS, Unit.STORE_ACROSS, Unit.STRIDED, Unit.GATHER),
        *(Unit.SCATTER, Unit.FAR_GATHER, Unit.FAR_SCATTER, Unit.CLAMPED),
    }
)
"""Reads and writes."""

ACROSS: Mapping[Unit, Unit] = {Unit.LOAD: Unit.LOAD_ACROSS, Unit.STORE: Unit.STORE_ACROSS}
"""What moves of vectors are where these lie across lines of the cache."""

FUNCTIONS = frozenset(
    {
        *(Unit.EXP, Unit.EXPM1, Unit.LOG, Unit.LOG1P, Unit.TANH, Unit.ERF, Unit.SIGMOID, Unit.SOFTPLUS),
        *(Unit.POW, Unit.SINE, Unit.LIBRARY),
    }
)
"""Special functions. In double precision they are calls of the C library, which no loop of vectors holds."""


class MachineError(ApolloFuseError):
    """A description of a machine contradicts itself."""


@dataclass(frozen=True, slots=True)
class Level:
    """A level of memory, the nearest first; the last holds everything.

    size: bytes that one core has of it, or all together where it is `shared`; None for the last.
    read, write: bytes a second that one thread moves.
    most: bytes a second that all cores together read, None where each has its own.
    """

    name: str
    size: int | None
    shared: bool
    read: float
    write: float
    most: float | None = None

    def bandwidth(self, rate: float, threads: int) -> float:
        """Bytes a second of `threads` threads that move `rate` each, alone."""
        if self.most is None:
            return threads * rate
        return min(threads * rate, max(rate, self.most * rate / self.read))


@dataclass(frozen=True, slots=True)
class Gpu:
    """What a GPU has beside memory and arithmetic units; the limits are those of one multiprocessor.

    launch: from the start of one kernel to the start of the next on a stream.
    registers: of 32 bits. flops: of float32 multiply-adds counted as two, without matrix units.
    special: special function results a second.
    """

    multiprocessors: int
    warp: int
    most_threads: int
    most_blocks: int
    most_threads_a_block: int
    registers: int
    shared_bytes: int
    flops: float
    special: float
    launch: float


@dataclass(frozen=True, slots=True)
class Runtime:
    """onnxruntime's own operators on the machine: what `unfused` computes with.

    node: of each node, whatever it does. elements: of an element, by op type, one thread, from the nearest
        cache; "" is an operator of which nothing is known.
    span: of each run of neighbouring elements between two turns of a broadcast.
    parallel: seconds of work from which onnxruntime parts an operator among threads.
    """

    node: float
    elements: Mapping[str, float]
    span: float
    parallel: float


@dataclass(frozen=True, slots=True)
class Machine:
    """What kernels run on.

    source: where the figures are from.
    vector: bytes of the widest vector; line: of a cache line.
    seconds: of one operation on one element in a loop of vectors, by unit and by bytes of the element.
    hidden: the share of additions, products and choices that divisions beside them hide, from 0 to 1.
    loop: of starting an innermost loop. drain: of a loop that sums or seeks a maximum, until what needs its
        result goes on. item: of starting a work item.
    node: of a call of a kernel by onnxruntime; argument: of each tensor of the call.
    launch: of parting a kernel among threads; wake: until another thread has begun, or would have.
    """

    name: str
    source: str
    cores: int
    vector: int
    line: int
    ways: int
    levels: tuple[Level, ...]
    seconds: Mapping[tuple[Unit, int], float]
    hidden: float
    loop: float
    drain: float
    item: float
    node: float
    argument: float
    launch: float
    wake: float
    runtime: Runtime | None = None
    gpu: Gpu | None = None

    def __post_init__(self) -> None:
        sizes = [level.size for level in self.levels]
        known = [size for size in sizes if size is not None]
        if not sizes or sizes[-1] is not None or None in sizes[:-1] or known != sorted(known):
            raise MachineError(
                f"{self.name}: the levels of memory hold {sizes} bytes; expected growing sizes and then None"
            )
        rates = [rate for level in self.levels for rate in (level.read, level.write)]
        if min(rates) <= 0 or self.cores < 1 or self.vector < 1 or self.line < 1:
            raise MachineError(f"{self.name}: a bandwidth, the cores, the vector or the line is not above 0")

    def of(self, unit: Unit, size: int) -> float:
        """Seconds of one operation on an element of `size` bytes; of the nearest size that is known."""
        found = self.seconds.get((unit, size))
        if found is not None:
            return found
        sizes = [known for one, known in self.seconds if one is unit]
        if not sizes:
            raise MachineError(f"{self.name}: nothing is known of the unit {unit.value!r}")
        nearest = min(sizes, key=lambda known: abs(known - size))
        return self.seconds[unit, nearest] * size / nearest

    def is_crowded(self, apart: int, count: int) -> bool:
        """Whether so many lines, so many bytes apart, are more than their sets of the nearest cache hold."""
        nearest = self.levels[0].size
        if nearest is None or apart < self.line:
            return False
        sets = max(1, nearest // (self.line * self.ways))
        reached = sets // math.gcd(apart // self.line, sets) if apart % self.line == 0 else sets
        return count >= reached * self.ways

    def lanes(self, size: int) -> int:
        """Elements of `size` bytes in a vector."""
        return max(1, self.vector // size)


def is_vectorised(op: Op, source: DType) -> bool:
    """Whether a loop with this operation on operands of this type becomes a loop of vectors."""
    unit = UNITS[op]
    if unit in (Unit.LIBRARY, Unit.REMAINDER):
        return False
    if unit in FUNCTIONS:
        return source is not DType.FLOAT64
    return not (unit is Unit.DIVIDE and not source.is_float)
