"""Kernels as C11: one translation unit for each kernel group, written to be read.

The grid becomes the range ``[begin, end)`` that onnxruntime's thread pool hands out, lane loops
become ``#pragma omp simd`` loops (a directive only; no OpenMP runtime is used), SHARED buffers
become arrays on the stack or, when their size is known at run time only, scratch memory.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from functools import reduce

from apollo_fuse.codegen import expressions as c
from apollo_fuse.codegen.interface import item_count, op_interface, unpack
from apollo_fuse.codegen.maxima import chains
from apollo_fuse.codegen.transposed import Transposed, in_blocks, moved, transposed
from apollo_fuse.dtypes import DType
from apollo_fuse.expressions import Apply, Block, Constant, Instruction, Load, Op, Position
from apollo_fuse.index import Index, Indirect, Iterator
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
    buffers_of,
    lane_loops_of,
    strides,
    walk,
    work,
    written_by,
)
from apollo_fuse.passes.hoist_lanes import hoist_lanes
from apollo_fuse.passes.jam_rows import jam_rows
from apollo_fuse.passes.near_rows import near_rows
from apollo_fuse.passes.overlap_tails import overlap_tails, overwrites
from apollo_fuse.passes.part_streams import part_streams
from apollo_fuse.passes.phases import VECTORS, Phase, items_together, phases, through_a_phase
from apollo_fuse.passes.split_borders import split_borders
from apollo_fuse.passes.sum_columns import sum_columns
from apollo_fuse.passes.sum_in_lanes import sum_in_lanes
from apollo_fuse.passes.tile_rows import tile_rows

_WIDEST = 64  # bytes of a vector, on any processor
STACK_BYTES = 32 * 1024  # greatest buffer that is put on the stack
_READING = 9
"""Cost (see Block.cost) of an element up to which a loop waits for what it reads."""
_LOWERING: tuple[Callable[[Kernel], Kernel], ...] = (
    hoist_lanes,
    sum_columns,
    jam_rows,
    split_borders,
    near_rows,
    sum_in_lanes,
    part_streams,
    overlap_tails,
    in_blocks,
)
"""What is done for a compiler of C alone, in this order."""


def emit(group: KernelGroup, name: str, comment: str) -> str:
    """The translation unit that defines ``const af_op AF_OP(NAME)``; `comment` says what it computes."""
    # no part of the lowering: it changes what an item is, and so the grid and the work of one
    kernels = [_kernel(group, tile_rows(kernel)) for kernel in group.kernels]
    headers = ["kernel.h", "scalar.h"]
    if any("af_transpose_" in kernel for kernel in kernels):
        headers.append("transpose.h")
    includes = [f'#include "{header}"' for header in headers]
    head = [f"/* {comment} */", *includes, "#include <stdio.h>", ""]
    return "\n".join([*head, *kernels, op_interface(group, name)])


@dataclass(slots=True)
class _Writer:
    kernel: Kernel
    scalars: frozenset[str]  # buffers that are plain variables
    lines: list[str] = field(default_factory=list)
    depth: int = 1
    hoisted: dict[Load, str] = field(default_factory=dict)  # reads that a variable outside of the loop holds
    turned: dict[Target, str] = field(default_factory=dict)  # accesses that tiles serve, and where there
    unordered: dict[str, str] = field(default_factory=dict)  # maxima and minima: whether a NaN was met
    far: str | None = None  # in a loop that holds for near angles alone: whether another was met

    def line(self, text: str) -> None:
        self.lines.append("  " * self.depth + text)

    def steps(self, steps: tuple[Step, ...]) -> None:
        for step in steps:
            match step:
                case Loop():
                    self.loop(step)
                case Initialise(target, op):
                    buffer = self.kernel.buffer(target.buffer)
                    start = c.initial(op, buffer.dtype)
                    if target.buffer in self.scalars:
                        self.line(f"{c.compute_type(buffer.dtype)} {target.buffer} = {start};")
                    else:
                        self.line(f"{self.place(target)} = {start};")
                case Copy(source, target):
                    self.write(target, self.place(source))
                case Compute():
                    self.compute(step)

    def loop(self, loop: Loop) -> None:
        name, end = loop.iterator.name, c.index(loop.iterator.extent)
        if loop.kind is LoopKind.UNROLLED:
            for value in range(loop.iterator.extent.constant or 0):
                self.line("{")
                self.depth += 1
                self.line(f"const int64_t {name} = {value};")
                self.steps(loop.body)
                self.depth -= 1
                self.line("}")
            return
        move = moved(self.kernel, loop)
        if move is not None:
            for line in move.lines(_turns(loop), _turns(move.lane)):
                self.line(line)
            return
        invariant = self.invariant(loop) if loop.kind is LoopKind.LANE else []
        extremes = self.extremes(loop) if loop.kind is LoopKind.LANE else {}
        tiles = transposed(self.kernel, loop)
        near = _has_near_form(self.kernel, loop)
        scoped = near or loop.limit is not None or bool(invariant) or bool(extremes) or tiles is not None
        if scoped:
            self.line("{")
            self.depth += 1
        if loop.limit is not None:
            self.line(f"const int64_t {name}_left = {c.index(loop.limit)};")
            end = f"({name}_left < {end} ? {name}_left : {end})"
        for load in invariant:
            self.hoisted[load] = f"{load.tensor}_{len(self.hoisted)}"
            text = self.read(Target(load.tensor, load.indices[0]))
            self.line(f"const {c.compute_type(load.dtype)} {self.hoisted[load]} = {text};")
        for accumulator, dtype in extremes.items():
            self.unordered[accumulator] = f"{accumulator}_nan"
            kind = "int64_t" if dtype is DType.FLOAT64 else "int32_t"
            self.line(f"{kind} {self.unordered[accumulator]} = 0;")
        if tiles is not None:
            end = self.turn(tiles, name, end)
        if near:
            self.far = f"{name}_far"
            self.line(f"int32_t {self.far} = 0;")
            self.iterate(loop, end)
            self.line(f"if ({self.far}) {{")
            self.far = None
            self.depth += 1
            self.iterate(loop, end)
            self.depth -= 1
            self.line("}")
        else:
            self.iterate(loop, end)
        if tiles is not None:
            self.turn_back(tiles)
        for accumulator in extremes:
            self.line(f"{accumulator} = {self.unordered.pop(accumulator)} ? NAN : {accumulator};")
        for load in invariant:
            del self.hoisted[load]
        if scoped:
            self.depth -= 1
            self.line("}")

    def iterate(self, loop: Loop, end: str) -> None:
        """The loop itself, without what stands around it."""
        if loop.kind is LoopKind.LANE:
            self.line("#pragma omp simd" + "".join(self.clauses(loop)))
        elif _reads_for_lanes(loop):
            self.line("#pragma GCC unroll 1")
        name = loop.iterator.name
        self.line(f"for (int64_t {name} = 0; {name} < {end}; {name}++) {{")
        self.depth += 1
        self.steps(loop.body)
        self.depth -= 1
        self.line("}")

    def turn(self, tiles: Transposed, rows: str, end: str) -> str:
        """Declares the tiles and fills those that are read; gives the name of how many rows there are."""
        self.line(f"const int64_t {rows}_rows = {end};")
        self.line(f"const int64_t {rows}_columns = {_turns(tiles.lane)};")
        for access, tile in (*tiles.reads.items(), *tiles.writes.items()):
            self.line(tile.declaration)
            self.turned[access] = tile.place
        for tile in tiles.reads.values():
            self.line(tile.read(f"{rows}_rows", f"{rows}_columns"))
        return f"{rows}_rows"

    def turn_back(self, tiles: Transposed) -> None:
        for access, tile in tiles.writes.items():
            self.line(tile.write(f"{tile.row.name}_rows", f"{tile.row.name}_columns"))
            del self.turned[access]
        for access in tiles.reads:
            del self.turned[access]

    def invariant(self, loop: Loop) -> list[Load]:
        """Reads alike for all lanes; under a condition, one keeps a loop from being vectorised.

        Of tensors that the kernel writes too, where it does so before the loop.
        """
        inside = {loop.iterator} | {step.iterator for step in walk(loop.body) if isinstance(step, Loop)}
        changing = self.scalars | written_by(loop.body)
        loads = (load for step in walk(loop.body) if isinstance(step, Compute) for load in step.block.loads)
        alike = (x for x in loads if not _tensors(x) & changing and not x.indices[0].iterators() & inside)
        return list(dict.fromkeys(alike))

    def extremes(self, loop: Loop) -> dict[str, DType]:
        """The accumulators of floats that the lanes share for a maximum or a minimum.

        Whether there was a NaN is noted beside them: each turn waits for one instruction of the one before,
        where a maximum that passes NaNs on takes four.
        """
        return {
            step.targets[0].buffer: step.block.dtype.compute
            for step in walk(loop.body)
            if isinstance(step, Compute)
            and step.combine in (Op.MAX, Op.MIN)
            and step.targets[0].buffer in self.scalars
            and step.block.dtype.compute.is_float
        }

    def clauses(self, loop: Loop) -> list[str]:
        """A reduction clause for each accumulator that the lanes share, and for what they note."""
        found: dict[str, None] = {} if self.far is None else {f" reduction(| : {self.far})": None}
        for step in walk(loop.body):
            if isinstance(step, Compute) and step.combine is not None:
                (target,) = step.targets
                if target.buffer in self.scalars:
                    dtype = self.kernel.buffer(target.buffer).dtype
                    found[f" reduction({_combiner(step.combine, dtype)} : {target.buffer})"] = None
                    if target.buffer in self.unordered:
                        found[f" reduction(| : {self.unordered[target.buffer]})"] = None
        return list(found)

    def compute(self, step: Compute) -> None:
        prefix = step.statement.lower()
        texts: list[str] = []
        block = step.block
        maxima = chains(block)
        for place, item in enumerate(block.instructions):
            if place in maxima.inner or place in maxima.values:
                text = _among_numbers(item, texts)
            else:
                text = self.instruction(block, item, texts)
            if place in maxima.values:
                self.line(f"const {c.compute_type(item.dtype)} {prefix}_{place}_number = {text};")
                operands = [texts[value] for value in maxima.values[place]]
                text = f"{_any_nan(operands)} ? NAN : {prefix}_{place}_number"
            last = place == len(block.instructions) - 1
            named = isinstance(item, Load) and item in self.hoisted
            if named or isinstance(item, Constant) or (last and not isinstance(item, Load)):
                texts.append(text)
                continue
            name = f"{prefix}_{place}"
            self.line(f"const {c.compute_type(item.dtype)} {name} = {text};")
            texts.append(name)
        result, dtype = texts[-1], block.dtype
        if step.combine is not None:
            (target,) = step.targets
            place_text = self.place(target)
            if target.buffer in self.unordered:
                name, sign = f"{prefix}_next", ">" if step.combine is Op.MAX else "<"
                self.line(f"const {c.compute_type(dtype)} {name} = {result};")
                self.line(f"{self.unordered[target.buffer]} |= {name} != {name};")
                self.line(f"{place_text} = {name} {sign} {place_text} ? {name} : {place_text};")
                return
            value = c.apply(step.combine, (place_text, f"({result})"), (dtype, dtype), dtype)
            if step.combine is Op.ADD:
                self.line(f"{place_text} += {result};")
            else:
                self.line(f"{place_text} = {value};")
            return
        if len(step.targets) > 1 or step.targets[0].buffer in self.scalars:
            first, *others = step.targets
            if first.buffer in self.scalars:
                self.line(f"const {c.compute_type(dtype)} {first.buffer} = {result};")
                result = first.buffer
            else:
                others = [first, *others]
            for target in others:
                self.write(target, result)
            return
        self.write(step.targets[0], result)

    def instruction(self, block: Block, item: Instruction, texts: list[str]) -> str:
        match item:
            case Constant():
                return c.literal(item)
            case Position(index, dtype):
                return f"({c.STORAGE[dtype.compute]})({c.index(index)})"
            case Load() if item in self.hoisted:
                return self.hoisted[item]
            case Load(tensor, indices, dtype):
                return self.read(Target(tensor, indices[0]))
            case Apply(Op.MAX | Op.MIN, (_, b), dtype) if dtype.is_float and _is_number(block, b):
                return _among_numbers(item, texts)  # a NaN in the operand passes through
            case Apply(op, (angle,), dtype) if self.far is not None and _has_near(item):
                self.line(f"{self.far} |= af_is_far({texts[angle]});")
                return f"af_near_{op.value}f({texts[angle]})"
            case Apply(op, operands, dtype):
                sources = tuple(block.instructions[o].dtype for o in operands)
                return c.apply(op, tuple(texts[o] for o in operands), sources, dtype)

    def place(self, target: Target) -> str:
        if target.buffer in self.scalars:
            return target.buffer
        if target in self.turned:
            return self.turned[target]
        return f"{target.buffer}[{c.index(target.offset)}]"

    def read(self, target: Target) -> str:
        buffer = self.kernel.buffer(target.buffer)
        place = self.place(target)
        return c.load(buffer.dtype, place) if buffer.scope is Scope.GLOBAL else place

    def write(self, target: Target, value: str) -> None:
        buffer = self.kernel.buffer(target.buffer)
        stored = c.store(buffer.dtype, value) if buffer.scope is Scope.GLOBAL else value
        self.line(f"{self.place(target)} = {stored};")


def _among_numbers(item: Instruction, texts: list[str]) -> str:
    """A maximum or minimum in one instruction on every machine; of a NaN as second operand, the first."""
    assert isinstance(item, Apply)
    a, b = (texts[operand] for operand in item.operands)
    return f"{b} {'>' if item.op is Op.MAX else '<'} {a} ? {b} : {a}"


def _any_nan(values: list[str]) -> str:
    """Whether one of them is no number, asked of two at a time."""
    pairs = zip(values[::2], [*values[1::2], values[-1]], strict=False)
    return f"({' | '.join(f'__builtin_isunordered({a}, {b})' for a, b in pairs)})"


def _has_near_form(kernel: Kernel, loop: Loop) -> bool:
    """Whether lanes compute sines of floats, and can do so once more where an angle turns out to be far.

    vmath.h says what is far.
    """
    if loop.kind is not LoopKind.LANE or overwrites(kernel, loop.body, loop.body):
        return False
    computes = [step for step in walk(loop.body) if isinstance(step, Compute)]
    has_near = any(_has_near(item) for step in computes for item in step.block.instructions)
    return has_near and all(step.combine is None for step in computes)


def _has_near(item: Instruction) -> bool:
    is_sine = isinstance(item, Apply) and item.op in (Op.SIN, Op.COS)
    return is_sine and item.dtype.compute is DType.FLOAT32


def _reads_for_lanes(loop: Loop) -> bool:
    """Whether all it does is to combine what it reads, lane by lane, and so waits for memory.

    Unrolled by gcc, every second line of a row would be read before the ones between, and prefetchers
    follow lines in order. Elementary functions leave time for either.
    """
    computes = [step for lanes in lane_loops_of(loop) for step in lanes.body if isinstance(step, Compute)]
    is_cheap = all(step.block.cost <= _READING for step in computes)
    return is_cheap and any(step.combine is not None for step in computes)


def _turns(loop: Loop) -> str:
    """How often a loop turns."""
    most = c.index(loop.iterator.extent)
    if loop.limit is None:
        return most
    left = c.index(loop.limit)
    return f"{left} < {most} ? {left} : {most}"


def _tensors(load: Load) -> set[str]:
    """What a read reads, index tensors included."""
    return {load.tensor} | {a.tensor for a in load.indices[0].atoms() if isinstance(a, Indirect)}


def _is_number(block: Block, place: int) -> bool:
    item = block.instructions[place]
    return isinstance(item, Constant) and item.value == item.value


def _combiner(op: Op, dtype: DType) -> str:
    match op:
        case Op.ADD:
            return "+"
        case Op.MUL:
            return "*"
        case _ if dtype.compute.is_float:
            return f"af_{'greatest' if op is Op.MAX else 'least'}_{c.SUFFIX[dtype.compute]}"
        case _:
            return str(op.value)


def _kernel(group: KernelGroup, kernel: Kernel) -> str:
    lowered = reduce(lambda done, lower: lower(done), _LOWERING, kernel)
    local = [b for b in lowered.buffers if b.scope is not Scope.GLOBAL]
    scalars = frozenset(b.name for b in local if b.size.is_one)
    arrays = [b for b in local if b.name not in scalars]
    written = {b.name for b in kernel.buffers if b.scope is Scope.GLOBAL}
    in_outputs = [b for b in arrays if b.host in written]
    hosted = [b for b in arrays if b.host is not None and b not in in_outputs]
    owners = [b for b in arrays if b.host is None]
    stack = [b for b in owners if (bytes_ := b.bytes.constant) is not None and bytes_ <= STACK_BYTES]
    scratch = [b for b in owners if b not in stack]
    writer = _Writer(lowered, scalars)
    used = buffers_of(kernel.body)
    outputs = {v.name for v in (*group.outputs, *group.temporaries)}
    for place, value in enumerate((*group.inputs, *group.outputs, *group.temporaries)):
        if value.name in used:
            const = "" if value.name in outputs else "const "
            writer.line(f"{const}{c.STORAGE[value.dtype]} *restrict {value.name} = buffers[{place}];")
    offset = Index.of(0)
    for buffer in scratch:
        kind = c.compute_type(buffer.dtype)
        writer.line(f"{kind} *restrict {buffer.name} = ({kind} *)((char *)scratch + {c.index(offset)});")
        offset = offset + _aligned(buffer)
    parts = phases(lowered)
    turns = through_a_phase(kernel, parts)
    most = 1 if scratch or len(parts) == 1 else items_together(turns.constant or 1, _WIDEST)
    alone: set[str] = set().union(*(part.alone for part in parts))
    kept = [buffer for buffer in stack if buffer.name not in alone]
    if most > 1 and most * sum(_aligned(buffer).constant or 0 for buffer in kept) <= STACK_BYTES:
        together = f"af_items_together({c.index(turns)}, {VECTORS}, {most})"
        _write_phases(writer, parts, most, together, _Places(stack, kept, hosted, in_outputs))
    else:
        for buffer in stack:
            writer.line(_array(buffer))
        for buffer in hosted:
            writer.line(_pointer(buffer, str(buffer.host)))
        writer.line("for (int64_t item = begin; item < end; item++) {")
        writer.depth += 1
        _grid(writer, kernel.grid)
        for buffer in in_outputs:
            writer.line(_in_output(buffer))
        writer.steps(lowered.body)
        writer.depth -= 1
        writer.line("}")
    every = _symbols(kernel)
    cost, bytes_needed = work(kernel.body), offset
    body = "\n".join(writer.lines)
    prefix = kernel.name
    return f"""{item_count(group, kernel.form, kernel.items, f"{prefix}_grid")}
static int64_t {prefix}_work(const int64_t *n) {{
  (void)n;
{unpack(group, {s.name for s in cost.symbols()})}  return 1 + {c.index(cost)};
}}

static int64_t {prefix}_scratch(const int64_t *n) {{
  (void)n;
{unpack(group, {s.name for s in bytes_needed.symbols()})}  return {c.index(bytes_needed)};
}}

static void {prefix}_run(void *const *buffers, const int64_t *n, void *scratch, int64_t begin, int64_t end) {{
  (void)n;
  (void)scratch;
{unpack(group, every)}{body}
}}

static const af_kernel {prefix} = {{{prefix}_grid, {prefix}_work, {prefix}_scratch, {prefix}_run}};
"""


@dataclass(frozen=True, slots=True)
class _Places:
    """Arrays of a work item.

    stack: those that have memory on the stack; kept: those of them that one phase leaves for another; hosted:
        those in the memory of such a one; in_outputs: those in outputs.
    """

    stack: Sequence[Buffer]
    kept: Sequence[Buffer]
    hosted: Sequence[Buffer]
    in_outputs: Sequence[Buffer]


def _write_phases(writer: _Writer, parts: Sequence[Phase], most: int, together: str, places: _Places) -> None:
    """Takes so many work items at a time through each phase; what they keep lies side by side.

    most: how many these are at most.
    """
    for buffer in places.kept:
        size = c.index((buffer.size + 15) // 16 * 16)
        writer.line(f"_Alignas(64) {c.compute_type(buffer.dtype)} {buffer.name}_of[{most}][{size}];")
    for name in sorted(set().union(*(part.leaves for part in parts))):
        writer.line(f"{c.compute_type(writer.kernel.buffer(name).dtype)} {name}_of[{most}];")
    writer.line(f"const int64_t together = {together};")
    writer.line("for (int64_t first = begin; first < end; first += together) {")
    writer.depth += 1
    writer.line("const int64_t count = end - first < together ? end - first : together;")
    for part in parts:
        writer.line("for (int64_t one = 0; one < count; one++) {")
        writer.depth += 1
        _write_phase(writer, part, places)
        writer.depth -= 1
        writer.line("}")
    writer.depth -= 1
    writer.line("}")


def _write_phase(writer: _Writer, part: Phase, places: _Places) -> None:
    """The steps of one item in a phase, behind what they mention."""
    before = len(writer.lines)
    writer.steps(part.steps)
    for name in sorted(part.leaves):
        writer.line(f"{name}_of[one] = {name};")
    steps = writer.lines[before:]
    del writer.lines[before:]
    mentioned = _words(steps)
    in_outputs = [_in_output(buffer) for buffer in places.in_outputs if buffer.name in mentioned]
    hosted = [buffer for buffer in places.hosted if buffer.name in mentioned]
    mentioned |= _words(in_outputs) | {str(buffer.host) for buffer in hosted}
    if any(axis.name in mentioned for axis in writer.kernel.grid):
        writer.line("const int64_t item = first + one;")
        _grid(writer, writer.kernel.grid, mentioned)
    for buffer in places.stack:
        if buffer.name in part.alone:
            writer.line(_array(buffer))
        elif buffer.name in mentioned:
            writer.line(_pointer(buffer, f"{buffer.name}_of[one]"))
    for buffer in hosted:
        writer.line(_pointer(buffer, str(buffer.host)))
    for line in in_outputs:
        writer.line(line)
    for name in sorted(part.takes):
        kind = c.compute_type(writer.kernel.buffer(name).dtype)
        writer.line(f"const {kind} {name} = {name}_of[one];")
    writer.lines += steps


def _words(lines: Iterable[str]) -> set[str]:
    return {word for line in lines for word in re.findall(r"\w+", line)}


def _array(buffer: Buffer) -> str:
    return f"_Alignas(64) {c.compute_type(buffer.dtype)} {buffer.name}[{c.index(buffer.size)}];"


def _pointer(buffer: Buffer, place: str) -> str:
    return f"{c.compute_type(buffer.dtype)} *{buffer.name} = {place};"


def _in_output(buffer: Buffer) -> str:
    return _pointer(buffer, f"{buffer.host} + {c.index(buffer.base)}")


def _grid(writer: _Writer, grid: tuple[Iterator, ...], mentioned: Collection[str] | None = None) -> None:
    """The axes of a work item, the last one running fastest; those that are mentioned, where that is told."""
    if not grid:
        return
    if len(grid) == 1:
        writer.line(f"const int64_t {grid[0].name} = item;")
        return
    for axis, stride in strides(grid):
        if mentioned is not None and axis.name not in mentioned:
            continue
        quotient = "item" if stride.is_one else f"item / ({c.index(stride)})"
        rest = "" if axis is grid[0] else f" % ({c.index(axis.extent)})"
        writer.line(f"const int64_t {axis.name} = {quotient}{rest};")


def _symbols(kernel: Kernel) -> set[str]:
    """The extents that the body of the kernel mentions."""
    found: set[Index] = {axis.extent for axis in kernel.grid}
    found |= {index for b in kernel.buffers if b.scope is not Scope.GLOBAL for index in (b.size, b.base)}
    for step in walk(kernel.body):
        match step:
            case Loop(iterator, _, _, limit):
                found |= {iterator.extent} | ({limit} if limit is not None else set())
            case Compute(_, block, targets, _):
                found |= {t.offset for t in targets}
                for item in block.instructions:
                    if isinstance(item, Load):
                        found.add(item.indices[0])
                        for atom in item.indices[0].atoms():
                            if isinstance(atom, Indirect):
                                found.add(atom.extent)
                    elif isinstance(item, Position):
                        found.add(item.index)
            case Copy(source, target):
                found |= {source.offset, target.offset}
            case Initialise(target, _):
                found.add(target.offset)
    return {s.name for index in found for s in index.symbols()}


def _aligned(buffer: Buffer) -> Index:
    """Bytes of a scratch buffer, in whole cache lines."""
    return (buffer.bytes + 63) // 64 * 64
