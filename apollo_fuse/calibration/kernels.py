"""The kernels that calibration times, in the kernel IR: what is timed is what the code generator writes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from apollo_fuse.codegen import c
from apollo_fuse.dtypes import DType
from apollo_fuse.expressions import Apply, Block, BlockBuilder, Constant, Load, Op
from apollo_fuse.graph import Value
from apollo_fuse.index import Index, Iterator, Symbol, clamped
from apollo_fuse.kernel import (
    Buffer,
    Compute,
    Copy,
    Initialise,
    Kernel,
    KernelGroup,
    Loop,
    LoopKind,
    Scope,
    Step,
    Target,
)
from apollo_fuse.machine import Unit
from apollo_fuse.scop import Extent, tensor_size

LANES = 512
"""Elements of one item, which with all that it reads and writes stays in the nearest cache."""
CHAIN = 16
"""Simple operations in a row where one would hide behind the reads and writes around it."""
MANY = 8
"""Operations side by side, where one in a row with others would wait for them."""
STREAMS = 8
"""Rows that are read side by side and added up; what is written besides is little of it."""
SHORT = 64
"""Turns of a loop whose start is looked for, beside one of twice as many."""
APART = 7
"""Elements from one read to the next where reads are apart: a compiler has no shuffle for it."""

ROW, TILE = 768, 2048
"""Elements of a row of a tensor that is transposed, and of the tiles by which it is."""

NARROW, WIDE = 2, 9
"""Tensors of the ops with which calls are timed."""
WORK_FUNCTIONS = 8
"""Functions in a row on each element of the op with which threads are timed."""

_TYPES = (DType.FLOAT32, DType.FLOAT64, DType.UINT8, DType.INT64, DType.FLOAT16)
_ITEMS = Symbol("n0")
_EXTENTS = (Extent(_ITEMS, 0, 0, Index.of(1), Index.of(0)),)
_FUNCTIONS = {
    Unit.EXP: Op.EXP,
    Unit.EXPM1: Op.EXPM1,
    Unit.LOG: Op.LOG,
    Unit.LOG1P: Op.LOG1P,
    Unit.TANH: Op.TANH,
    Unit.ERF: Op.ERF,
    Unit.SIGMOID: Op.SIGMOID,
    Unit.SOFTPLUS: Op.SOFTPLUS,
    Unit.SINE: Op.SIN,
    Unit.LIBRARY: Op.TAN,
    Unit.SQRT: Op.SQRT,
    Unit.ROUND: Op.FLOOR,
}


@dataclass(frozen=True, slots=True)
class Timed:
    """A kernel with what it measures: `operations` of the unit on each element, `size` bytes wide.

    simple: operations of the simplest kind beside them.
    """

    unit: Unit
    size: int
    operations: int
    kernel: Kernel
    simple: int = 0


@dataclass(frozen=True, slots=True)
class Timeable:
    """The kernels that measure units, and all kernels as one group."""

    units: tuple[Timed, ...]
    group: KernelGroup

    def place(self, name: str) -> int:
        return next(place for place, kernel in enumerate(self.group.kernels) if kernel.name == name)


def timeable() -> Timeable:
    """A group over one tensor of each type, ``[n0, LANES]``, in and out."""
    units = tuple(_units())
    kernels = [timed.kernel for timed in units]
    kernels += [_loads("loads"), _loads("loads_across", 1), _fill("fill"), _fill("fill_across", 1)]
    kernels += [_copy(), _strip(), _rows(SHORT), _rows(2 * SHORT)]
    kernels += [_elementwise("divided", DType.FLOAT32, DType.FLOAT32, _divided)]
    kernels += [_apart("strided", True, 2), _apart("gathered", True), _apart("scattered", False)]
    kernels += [_clamped(), _transposed("far_gathered", True), _transposed("far_scattered", False)]
    shape = (Index.of(_ITEMS), Index.of(LANES))
    inputs = tuple(Value(f"in{place}", dtype, shape) for place, dtype in enumerate(_TYPES))
    outputs = tuple(Value(f"out{place}", dtype, shape) for place, dtype in enumerate(_TYPES))
    return Timeable(units, KernelGroup(inputs, outputs, (), _EXTENTS, tuple(kernels)))


def source() -> str:
    """The kernels as C."""
    return c.emit(timeable().group, "calibration", "what calibration times")


def probes() -> dict[str, KernelGroup]:
    """Ops that onnxruntime calls: of two and of nine tensors, with next to nothing to do, and two of work.

    Items of work are parted among threads, by what is counted of it: simple operations take a vector of lanes
    less time than functions do.
    """
    item, _ = _iterators()
    flat = (Index.of(_ITEMS),)
    found: dict[str, KernelGroup] = {}
    for count in (NARROW, WIDE):
        inputs = tuple(Value(f"in{place}", DType.FLOAT32, flat) for place in range(count - 1))
        output = Value("out0", DType.FLOAT32, flat)
        buffers = tuple(Buffer(v.name, v.dtype, tensor_size(v), Scope.GLOBAL) for v in (*inputs, output))
        read = Block((Load("in0", (Index.of(item),), DType.FLOAT32),))
        compute = Compute("S0", read, (Target("out0", Index.of(item)),))
        kernel = Kernel("k0", buffers, (item,), (compute,))
        found[f"probe_{count}"] = KernelGroup(inputs, (output,), (), _EXTENTS, (kernel,))
    shape = (Index.of(_ITEMS), Index.of(LANES))
    ends = tuple(Value(name, DType.FLOAT32, shape) for name in ("in0", "out0"))
    for name, body in (("probe_light", _chain), ("probe_work", _functions)):
        kernel = _elementwise(name, DType.FLOAT32, DType.FLOAT32, body)
        found[name] = KernelGroup(ends[:1], ends[1:], (), _EXTENTS, (kernel,))
    return found


def _units() -> list[Timed]:
    found = [
        _timed(Unit.SIMPLE, dtype, CHAIN, _chain)
        for dtype in (DType.FLOAT32, DType.FLOAT64, DType.UINT8, DType.INT64)
    ]
    for dtype in (DType.FLOAT32, DType.FLOAT64):
        found.append(_timed(Unit.BOUND, dtype, MANY, _summed(_bounded), MANY - 1))
        found.append(_timed(Unit.EXTREME, dtype, MANY, _summed(_extreme), 2 * MANY - 1))
        found.append(_timed(Unit.CHOOSE, dtype, 2 * MANY, _summed(_chosen), MANY - 1))
        found += [_timed(unit, dtype, 1, _once(op)) for unit, op in _FUNCTIONS.items()]
        found.append(_timed(Unit.DIVIDE, dtype, 1, _with_constant(Op.DIV)))
        found.append(_timed(Unit.POW, dtype, 1, _with_constant(Op.POW)))
        found += [_chained(unit, op, dtype) for unit, op in _CHAINS.items()]
    found.append(_timed(Unit.REMAINDER, DType.INT64, 1, _with_constant(Op.FLOOR_MOD)))
    found.append(_converting(DType.UINT8, DType.FLOAT32))
    found.append(_converting(DType.INT64, DType.FLOAT32))
    found.append(_timed(Unit.CONVERT, DType.FLOAT16, 2, lambda builder, place, _: place))
    return found


_CHAINS = {Unit.CHAIN_ADD: Op.ADD, Unit.CHAIN_MAX: Op.MAX}
_Body = Callable[[BlockBuilder, int, DType], int]


def _chain(builder: BlockBuilder, place: int, dtype: DType, length: int = CHAIN) -> int:
    for step in range(length):
        factor = builder.add(Constant(3 + step, dtype))
        other = Op.MUL if dtype.is_float else Op.XOR  # products of integers a compiler makes one of
        place = builder.add(Apply(other if step % 2 else Op.ADD, (place, factor), dtype))
    return place


def _divided(builder: BlockBuilder, place: int, dtype: DType) -> int:
    """A division with `MANY` simple operations beside it."""
    return _chain(builder, _with_constant(Op.DIV)(builder, place, dtype), dtype, MANY)


def _functions(builder: BlockBuilder, place: int, dtype: DType) -> int:
    for _ in range(WORK_FUNCTIONS):
        place = builder.add(Apply(Op.TANH, (place,), dtype))
    return place


def _summed(step: Callable[[BlockBuilder, int, int, DType], int]) -> _Body:
    """A sum over `MANY` values that each come of the one read: none of them waits for another."""

    def body(builder: BlockBuilder, place: int, dtype: DType) -> int:
        found = [step(builder, place, number, dtype) for number in range(MANY)]
        total = found[0]
        for other in found[1:]:
            total = builder.add(Apply(Op.ADD, (total, other), dtype))
        return total

    return body


def _bounded(builder: BlockBuilder, place: int, number: int, dtype: DType) -> int:
    bound = builder.add(Constant(number, dtype))
    return builder.add(Apply(Op.MAX if number % 2 else Op.MIN, (place, bound), dtype))


def _extreme(builder: BlockBuilder, place: int, number: int, dtype: DType) -> int:
    factor = builder.add(Constant(2 + number, dtype))
    other = builder.add(Apply(Op.MUL, (place, factor), dtype))
    return builder.add(Apply(Op.MIN if number % 2 else Op.MAX, (place, other), dtype))


def _chosen(builder: BlockBuilder, place: int, number: int, dtype: DType) -> int:
    bound = builder.add(Constant(number, dtype))
    smaller = builder.add(Apply(Op.LE, (place, bound), DType.BOOL))
    return builder.add(Apply(Op.SELECT, (smaller, place, bound), dtype))


def _once(op: Op) -> _Body:
    return lambda builder, place, dtype: builder.add(Apply(op, (place,), dtype))


def _with_constant(op: Op) -> _Body:
    """With 3 as the divisor, or exponent, which is read so that no compiler knows it."""

    def body(builder: BlockBuilder, place: int, dtype: DType) -> int:
        other = builder.add(Load(_in(dtype), (Index.of(0),), dtype))
        return builder.add(Apply(op, (place, other), dtype))

    return body


def _in(dtype: DType) -> str:
    return f"in{_TYPES.index(dtype)}"


def _out(dtype: DType) -> str:
    return f"out{_TYPES.index(dtype)}"


def _timed(unit: Unit, dtype: DType, operations: int, body: _Body, simple: int = 0) -> Timed:
    kernel = _elementwise(f"{unit.value}_{dtype.value}", dtype, dtype, body)
    return Timed(unit, dtype.size, operations, kernel, simple)


def _converting(source: DType, target: DType) -> Timed:
    def body(builder: BlockBuilder, place: int, _: DType) -> int:
        return builder.add(Apply(Op.CAST, (place,), target))

    kernel = _elementwise(f"convert_{source.value}", source, target, body)
    return Timed(Unit.CONVERT, max(source.size, target.size), 1, kernel)


def _elementwise(name: str, source: DType, target: DType, body: _Body) -> Kernel:
    item, lane = _iterators()
    offset = Index.of(item) * LANES + Index.of(lane)
    builder = BlockBuilder()
    body(builder, builder.add(Load(_in(source), (offset,), source)), source)
    compute = Compute("S0", builder.build(), (Target(_out(target), offset),))
    return _kernel(name, (item,), (Loop(lane, LoopKind.LANE, (compute,)),))


def _chained(unit: Unit, op: Op, dtype: DType) -> Timed:
    item, lane = _iterators()
    read = Block((Load(_in(dtype), (Index.of(item) * LANES + Index.of(lane),), dtype),))
    total = Target("total", Index.of(0))
    body = (
        Initialise(total, op),
        Loop(lane, LoopKind.LANE, (Compute("S0", read, (total,), op),)),
        Copy(total, Target(_out(dtype), Index.of(item))),
    )
    local = Buffer("total", dtype, Index.of(1), Scope.REGISTER)
    return Timed(unit, dtype.size, 1, _kernel(f"{unit.value}_{dtype.value}", (item,), body, local))


def _copy() -> Kernel:
    return _elementwise("copy", DType.FLOAT32, DType.FLOAT32, lambda builder, place, dtype: place)


def _loads(name: str, first: int = 0) -> Kernel:
    """Sums of streams, so that reading is what it waits for; each from so many elements behind a line on."""
    item, lane = _iterators(LANES // 2)
    builder = BlockBuilder()
    offset = Index.of(item) * (STREAMS * LANES // 2) + Index.of(lane)
    starts = [offset + (first + part * (LANES // 2)) for part in range(STREAMS)]
    sums = [builder.add(Load("in0", (start,), DType.FLOAT32)) for start in starts]
    while len(sums) > 1:
        pairs = zip(sums[::2], sums[1::2], strict=True)
        sums = [builder.add(Apply(Op.ADD, pair, DType.FLOAT32)) for pair in pairs]
    compute = Compute("S0", builder.build(), (Target("out0", offset),))
    return _kernel(name, (item,), (Loop(lane, LoopKind.LANE, (compute,)),))


def _fill(name: str, first: int = 0) -> Kernel:
    item, lane = _iterators()
    target = Target("out0", Index.of(item) * LANES + Index.of(lane) + first)
    block = Block((Load("in0", (Index.of(item),), DType.FLOAT32),))
    return _kernel(name, (item,), (Loop(lane, LoopKind.LANE, (Compute("S0", block, (target,)),)),))


def _rows(turns: int) -> Kernel:
    """Short rows of loops that each wait for the one before, as those of a softmax."""
    item, lane = _iterators(turns)
    second, third = (Iterator(f"r{place}", Index.of(turns)) for place in (1, 2))
    offset = Index.of(item) * LANES
    greatest, total = Target("greatest", Index.of(0)), Target("total", Index.of(0))
    out = Buffer("row", DType.FLOAT32, Index.of(turns), Scope.SHARED)
    read = Block((Load("in0", (offset + Index.of(lane),), DType.FLOAT32),))
    body: tuple[Step, ...] = (
        Initialise(greatest, Op.MAX),
        Loop(lane, LoopKind.LANE, (Compute("S0", read, (greatest,), Op.MAX),)),
        Initialise(total, Op.ADD),
    )
    builder = BlockBuilder()
    place = builder.add(Load("in0", (offset + Index.of(second),), DType.FLOAT32))
    other = builder.add(Load("greatest", (Index.of(0),), DType.FLOAT32))
    place = builder.add(Apply(Op.SUB, (place, other), DType.FLOAT32))
    builder.add(Apply(Op.EXP, (place,), DType.FLOAT32))
    power = Compute("S1", builder.build(), (Target("row", Index.of(second)),))
    read = Block((Load("row", (Index.of(second),), DType.FLOAT32),))
    summed = Compute("S2", read, (total,), Op.ADD)
    builder = BlockBuilder()
    place = builder.add(Load("row", (Index.of(third),), DType.FLOAT32))
    other = builder.add(Load("total", (Index.of(0),), DType.FLOAT32))
    builder.add(Apply(Op.SUB, (place, other), DType.FLOAT32))
    write = Compute("S3", builder.build(), (Target("out0", offset + Index.of(third)),))
    loops = (Loop(second, LoopKind.LANE, (power, summed)), Loop(third, LoopKind.LANE, (write,)))
    locals_ = (
        *(Buffer(t.buffer, DType.FLOAT32, Index.of(1), Scope.REGISTER) for t in (greatest, total)),
        out,
    )
    return _kernel(f"rows_{turns}", (item,), (*body, *loops), *locals_)


def _strip() -> Kernel:
    """Short rows of a copy."""
    item, lane = _iterators(SHORT)
    offset = Index.of(item) * LANES + Index.of(lane)
    block = Block((Load("in0", (offset,), DType.FLOAT32),))
    return _kernel(
        "strips", (item,), (Loop(lane, LoopKind.LANE, (Compute("S0", block, (Target("out0", offset),)),)),)
    )


def _apart(name: str, is_read: bool, distance: int = APART) -> Kernel:
    """Elements that are no neighbours, read into ones that are, or the other way round."""
    item, lane = _iterators(LANES // 2)
    together, apart = Index.of(item) + Index.of(lane), Index.of(item) + Index.of(lane) * distance
    block = Block((Load("in0", (apart if is_read else together,), DType.FLOAT32),))
    compute = Compute("S0", block, (Target("out0", together if is_read else apart),))
    return _kernel(name, (item,), (Loop(lane, LoopKind.LANE, (compute,)),))


def _clamped() -> Kernel:
    """Every second element, and the nearest one where that lies outside, as windows over a padded tensor."""
    item, lane = _iterators(LANES // 2)
    within = clamped(Index.of(lane) * 2 - 1, Index.of(LANES))
    block = Block((Load("in0", (Index.of(item) * LANES + within,), DType.FLOAT32),))
    target = Target("out0", Index.of(item) * LANES + Index.of(lane))
    return _kernel("clamped", (item,), (Loop(lane, LoopKind.LANE, (Compute("S0", block, (target,)),)),))


def _transposed(name: str, is_read: bool) -> Kernel:
    """Tiles of 32 rows by 64 elements, in which the elements of a column lie in a row of the other tensor."""
    rows, columns = 32, TILE // 32
    item, lane = _iterators(columns)
    row = Iterator("r1", Index.of(rows))
    inside = Index.of(item) * TILE + Index.of(row) * columns + Index.of(lane)
    across = Index.of(item) * rows + Index.of(row) + Index.of(lane) * ROW
    block = Block((Load("in0", (across if is_read else inside,), DType.FLOAT32),))
    compute = Compute("S0", block, (Target("out0", inside if is_read else across),))
    loop = Loop(row, LoopKind.SEQUENTIAL, (Loop(lane, LoopKind.LANE, (compute,)),))
    return _kernel(name, (item,), (loop,))


def _iterators(lanes: int = LANES) -> tuple[Iterator, Iterator]:
    return Iterator("g0", Index.of(_ITEMS)), Iterator("r0", Index.of(lanes))


def _kernel(name: str, grid: tuple[Iterator, ...], body: tuple[Step, ...], *local: Buffer) -> Kernel:
    shape = (Index.of(_ITEMS), Index.of(LANES))
    tensors = tuple(
        Buffer(f"{role}{place}", dtype, tensor_size(Value("", dtype, shape)), Scope.GLOBAL)
        for role in ("in", "out")
        for place, dtype in enumerate(_TYPES)
    )
    return Kernel(name, (*tensors, *local), grid, body)
