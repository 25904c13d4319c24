"""Writes the steps of a kernel as statements of Triton, for one program of the grid."""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from apollo_fuse.codegen.triton import expressions as t
from apollo_fuse.codegen.triton.barriers import Barriers, shared_memory
from apollo_fuse.codegen.triton.blocks import are_rows, block_of, folded_by, rounded_up
from apollo_fuse.expressions import Apply, Block, Constant, Instruction, Load, Op, Position
from apollo_fuse.index import Index, Indirect, Iterator
from apollo_fuse.kernel import (
    Buffer,
    Compute,
    Copy,
    Initialise,
    Kernel,
    Loop,
    LoopKind,
    Scope,
    Step,
    Target,
    strides,
)


class NotEmitted(Exception):
    """Its arguments are the reason and the evidence."""


@dataclass(frozen=True, slots=True)
class _Axis:
    """An axis of the block that statements compute, and the iterators that run along it.

    size: a number, or BLOCK. inside: names which places lie on the axis, None where all do.
    """

    iterators: frozenset[Iterator]
    size: str
    inside: str | None


@dataclass(frozen=True, slots=True)
class _Names:
    """What has a name in the scope at hand.

    lanes: the iterators of blocks. indices: what was read from index tensors. at_hand: elements in memory
        that the lanes still hold the values of.
    """

    lanes: set[Iterator] = field(default_factory=set)
    indices: dict[Indirect, str] = field(default_factory=dict)
    at_hand: dict[Target, str] = field(default_factory=dict)

    def copy(self) -> _Names:
        return _Names(set(self.lanes), dict(self.indices), dict(self.at_hand))


@dataclass(slots=True)
class Writer:
    """`values` are the local buffers that are values of the program; `wide` offsets take 64 bits.

    memory: the tensor or scratch that each other buffer lies in. places: what elements are offset from, where
    that is not the start of it. extents: those that the text mentions; has_block: whether it mentions BLOCK.
    """

    kernel: Kernel
    values: frozenset[str]
    memory: Mapping[str, str]
    wide: bool
    places: dict[str, str] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)
    extents: set[str] = field(default_factory=set)
    has_block: bool = False
    _depth: int = 1
    _row: _Axis | None = None  # the first axis of two
    _lane: _Axis | None = None
    _names: _Names = field(default_factory=lambda: _Names())
    _taken: Counter[str] = field(default_factory=Counter)  # how often a name was given
    _varying: set[str] = field(default_factory=set)  # values that are blocks
    _partial: dict[str, str] = field(default_factory=dict)  # accumulators of which each lane has one
    _barriers: Barriers = field(init=False)

    def __post_init__(self) -> None:
        shared = shared_memory(self.kernel.body, self.memory)
        self._barriers = Barriers(self.memory, shared, lambda target: target in self._names.at_hand)

    def line(self, text: str) -> None:
        self.lines.append("    " * self._depth + text)

    def program(self, rows: int, number: str) -> str:
        """The axes of the grid, the last one running fastest; gives the name of the program's `number`.

        Of several `rows` there is one item in each.
        """
        grid = self.kernel.grid
        own = number + (".to(tl.int64)" if self.wide else "")
        if rows > 1:
            self.line(f"program = {own} * {rows} + tl.arange(0, {rows})[:, None]")
            self.line(f"program_inside = program < {self.index(self.kernel.items)}")
            self._row = _Axis(frozenset(grid), str(rows), "program_inside")
        elif len(grid) == 1:
            self.line(f"{grid[0].name} = {own}")
            return grid[0].name
        elif grid:
            self.line(f"program = {own}")
        for axis, stride in strides(grid):
            quotient = "program" if stride.is_one else f"program // {self.factor(stride)}"
            rest = "" if axis is grid[0] else f" % {self.factor(axis.extent)}"
            self.line(f"{axis.name} = {quotient}{rest}")
        return "program" if grid else "0"

    def place(self, buffer: Buffer, start: str) -> None:
        """Gives the program's own part of memory a name."""
        self.places[buffer.name] = f"{buffer.name}_own"
        self.line(f"{buffer.name}_own = {start}")

    def index(self, value: Index) -> str:
        """The index as text, behind lines that read what it needs of index tensors."""
        self.extents |= {symbol.name for symbol in value.symbols()}
        for atom in sorted((a for a in value.atoms() if isinstance(a, Indirect)), key=str):
            self._read_index(atom)
        return t.index(value, self._names.indices)

    def factor(self, value: Index) -> str:
        """The index as text that something can be multiplied with."""
        self.index(value)
        return t.factor(value, self._names.indices)

    def _read_index(self, atom: Indirect) -> None:
        if atom in self._names.indices:
            return
        place = self.index(atom.indices[0])
        self._taken[atom.tensor] += 1
        name = f"{atom.tensor}_{self._taken[atom.tensor]}"
        mask = self._mask(atom.indices[0])
        default = ", other=0" if mask else ""
        kind = "tl.int64" if self.wide else "tl.int32"
        read = f"tl.load({atom.tensor} + {place}{mask}{default})"
        self.line(f"{name} = af.wrap({read}, {self.index(atom.extent)}).to({kind})")
        self._names.indices[atom] = name

    # -- loops ------------------------------------------------------------------------------

    def steps(self, steps: tuple[Step, ...]) -> None:
        for step in steps:
            is_lanes = isinstance(step, Loop) and step.kind is LoopKind.LANE
            if (is_lanes or not isinstance(step, Loop)) and self._barriers.needed_before(step):
                self.line("tl.debug_barrier()")
            match step:
                case Loop():
                    self._loop(step)
                case Initialise(target, op):
                    self._initialise(target, op)
                case Copy(source, target):
                    self._write(target, self._element(source), self._varies(source.offset))
                case Compute():
                    self._compute(step)

    def _loop(self, loop: Loop) -> None:
        name, extent = loop.iterator.name, loop.iterator.extent
        if loop.kind is LoopKind.LANE:
            self._lanes(loop)
            return
        if are_rows(loop) and self._row is None:
            self._rows(loop)
            return
        if loop.kind is LoopKind.UNROLLED:
            self.line(f"for {name} in tl.static_range({extent.constant}):")
            with self._scope(1):
                self.steps(loop.body)
            return
        self._barriers.foresee(loop)
        folded = self._begin_folding(loop)
        end = self._least([extent] if loop.limit is None else [extent, loop.limit])
        cast = self.wide and extent.constant is not None and loop.limit is None
        self.line(f"for {name}{'_turn' if cast else ''} in range(0, {end}):")
        with self._scope(1):
            if cast:
                self.line(f"{name} = tl.cast({name}_turn, tl.int64)")
            self.steps(loop.body)
        self._end_folding(folded)

    def _lanes(self, loop: Loop) -> None:
        """The loop as one block, or as several."""
        name, extent = loop.iterator.name, loop.iterator.extent
        ends = [extent] if loop.limit is None else [extent, loop.limit]
        whole = block_of(loop)
        if whole is None:
            self.has_block = True
            folded = self._begin_folding(loop)
            end = self._least(ends)
            self.line(f"for {name}_start in range(0, {end}, BLOCK):")
            with self._scope(1):
                self.line(f"{name} = {name}_start + tl.arange(0, BLOCK){self._cast}")
                self.line(f"{name}_inside = {name} < {end}")
                self._in_lane(_Axis(frozenset({loop.iterator}), "BLOCK", f"{name}_inside"), loop)
            self._end_folding(folded)
            return
        ends = [end for end in ends if end.constant != whole]
        inside = f"{name}_inside" if ends else None
        if loop.iterator not in self._names.lanes:
            self._names.lanes.add(loop.iterator)
            across = "[None, :]" if self._row is not None else ""
            self.line(f"{name} = tl.arange(0, {whole}){across}{self._cast}")
            if inside is not None:
                self.line(f"{inside} = {name} < {self._least(ends)}")
        self._in_lane(_Axis(frozenset({loop.iterator}), str(whole), inside), loop)

    def _rows(self, loop: Loop) -> None:
        """The loop as the first axis of blocks, of which the lanes in it are the second."""
        name, size = loop.iterator.name, rounded_up(loop.iterator.extent.constant or 1)
        ends = [loop.iterator.extent] if loop.limit is None else [loop.iterator.extent, loop.limit]
        ends = [end for end in ends if end.constant != size]
        self.line(f"{name} = tl.arange(0, {size})[:, None]{self._cast}")
        if ends:
            self.line(f"{name}_inside = {name} < {self._least(ends)}")
        self._row = _Axis(frozenset({loop.iterator}), str(size), f"{name}_inside" if ends else None)
        with self._scope(0):
            self.steps(loop.body)
        self._row = None

    @property
    def _cast(self) -> str:
        return ".to(tl.int64)" if self.wide else ""

    def _shape(self, lanes: bool) -> str:
        """Of a value of each row, and of each lane if it has `lanes`."""
        if self._row is None:
            return f"({self._lane.size},)" if lanes and self._lane is not None else "()"
        return f"({self._row.size}, {self._lane.size if lanes and self._lane is not None else 1})"

    def _least(self, ends: list[Index]) -> str:
        texts = ", ".join(self.index(end) for end in ends)
        return texts if len(ends) == 1 else f"tl.minimum({texts})"

    def _in_lane(self, lane: _Axis, loop: Loop) -> None:
        if self._lane is not None:
            raise NotEmitted("a lane loop lies in another", str(loop.iterator))
        self._lane = lane
        with self._scope(0):
            self.steps(loop.body)
        self._lane = None

    @contextmanager
    def _scope(self, deeper: int) -> Generator[None]:
        """The body of a loop: what is named there is not known behind it."""
        names = self._names.copy()
        self._depth += deeper
        yield
        self._depth -= deeper
        self._names = names

    # -- reductions -------------------------------------------------------------------------

    def _begin_folding(self, loop: Loop) -> list[tuple[str, Op]]:
        """Starts an accumulator for each lane, where the whole loop does nothing but fold blocks into one."""
        folded: list[tuple[str, Op]] = []
        for name, (op, block) in folded_by(loop).items():
            if name in self.values and self.kernel.buffer(name).size.is_one and name not in self._partial:
                dtype = self.kernel.buffer(name).dtype
                self._partial[name] = f"{name}_lanes"
                shape = f"({block},)" if self._row is None else f"({self._row.size}, {block})"
                start = t.initial(op, dtype)
                self.line(f"{name}_lanes = tl.full({shape}, {start}, {t.compute_type(dtype)})")
                folded.append((name, op))
        return folded

    def _end_folding(self, folded: list[tuple[str, Op]]) -> None:
        for name, op in folded:
            dtype = self.kernel.buffer(name).dtype.compute
            reduced = t.reduce(op, dtype, self._partial.pop(name), self._row is not None)
            self.line(f"{name} = {t.combine(op, dtype, name, reduced)}")

    def _fold(self, target: Target, op: Op, value: str, varies: bool) -> None:
        """Combines a value with an accumulator, of which each lane may have its own."""
        name, dtype = target.buffer, self.kernel.buffer(target.buffer).dtype.compute
        lane, own = self._lane, name in self._varying if name in self.values else self._varies(target.offset)
        if lane is not None and not own:
            if lane.inside is not None:
                value = f"tl.where({lane.inside}, {value}, {t.initial(op, dtype)})"
            elif not varies:
                value = f"tl.broadcast_to({value}, {self._shape(True)})"
            if name in self._partial:
                partial = self._partial[name]
                self.line(f"{partial} = {t.combine(op, dtype, partial, value)}")
                return
            value = t.reduce(op, dtype, value, self._row is not None)
        self._write(target, t.combine(op, dtype, self._element(target), value), own)

    # -- statements -------------------------------------------------------------------------

    def _initialise(self, target: Target, op: Op) -> None:
        dtype = self.kernel.buffer(target.buffer).dtype
        lanes = self._lane is not None and not target.offset.is_zero
        start = f"tl.full({self._shape(lanes)}, {t.initial(op, dtype)}, {t.compute_type(dtype)})"
        self._write(target, start, lanes)

    def _compute(self, step: Compute) -> None:
        self._taken[step.statement] += 1
        count = self._taken[step.statement]
        prefix = step.statement.lower() + (f"_{count}" if count > 1 else "")
        operator = "" if step.combine is None else step.combine.value
        places = ", ".join(f"{target.buffer}[{target.offset}]" for target in step.targets)
        self.line(f"# {step.statement}: {places} {operator}=")
        block = step.block
        texts: list[str] = []
        varying: list[bool] = []
        for place, item in enumerate(block.instructions):
            text, varies = self._instruction(block, item, texts, varying)
            last = place == len(block.instructions) - 1
            if not last and not isinstance(item, Constant) and not text.isidentifier():
                self.line(f"{prefix}_{place} = {text}")
                text = f"{prefix}_{place}"
            texts.append(text)
            varying.append(varies)
        last_item = block.instructions[-1]
        result = t.typed(last_item) if isinstance(last_item, Constant) else texts[-1]
        if step.combine is not None:
            (target,) = step.targets
            named = result.isidentifier()
            if not named:
                self.line(f"{prefix} = {result}")
            self._fold(target, step.combine, result if named else prefix, varying[-1])
            return
        again = len(step.targets) > 1 or self._is_kept(step.targets[0])
        if again and not result.isidentifier():
            self.line(f"{prefix} = {result}")
            result = prefix
        for target in step.targets:
            self._write(target, result, varying[-1])

    def _instruction(
        self, block: Block, item: Instruction, texts: list[str], varying: list[bool]
    ) -> tuple[str, bool]:
        """The text of an instruction, and whether it gives a block rather than a single value."""
        match item:
            case Constant():
                return t.literal(item), False
            case Position(index, dtype):
                return f"tl.cast({self.index(index)}, {t.compute_type(dtype)})", self._varies(index)
            case Load(tensor, indices, _):
                varies = tensor in self._varying if tensor in self.values else self._varies(indices[0])
                return self._element(Target(tensor, indices[0])), varies
            case Apply(op, operands, dtype):
                items = [block.instructions[o] for o in operands]
                constants = tuple(i if isinstance(i, Constant) else None for i in items)
                names = tuple(texts[o] for o in operands)
                if op in (Op.CAST, Op.BITCAST):
                    value = names[0] if constants[0] is None else t.typed(constants[0])
                    convert = t.cast if op is Op.CAST else t.bitcast
                    return convert(value, items[0].dtype, dtype), varying[operands[0]]
                text = t.apply(op, names, constants, items[-1].dtype)
                return text, any(varying[o] for o in operands)

    # -- memory -----------------------------------------------------------------------------

    def _varies(self, index: Index) -> bool:
        return self._lane is not None and not self._lane.iterators.isdisjoint(index.iterators())

    def _mask(self, index: Index, own: bool = False) -> str:
        """Keeps an access inside; each row has `own` memory from another place on."""
        axes = (axis for axis in (self._row, self._lane) if axis is not None)
        along = [
            axis
            for axis in axes
            if (own and axis is self._row) or not axis.iterators.isdisjoint(index.iterators())
        ]
        masks = [axis.inside for axis in along if axis.inside is not None]
        return f", mask={' & '.join(masks)}" if masks else ""

    def _place(self, target: Target) -> str:
        name, offset = self.places.get(target.buffer, target.buffer), self.index(target.offset)
        if offset == "0":
            return name
        return f"{name} - {offset[1:]}" if offset.startswith("-") else f"{name} + {offset}"

    def _element(self, target: Target) -> str:
        if target.buffer in self.values:
            return target.buffer
        if target in self._names.at_hand:
            return self._names.at_hand[target]
        buffer = self.kernel.buffer(target.buffer)
        place = self._place(target)
        return t.load(
            buffer.dtype, f"tl.load({place}{self._mask(target.offset, target.buffer in self.places)})"
        )

    def _write(self, target: Target, value: str, varies: bool) -> None:
        """Stores convert to the type of the memory, as halves are, and truth values to bytes."""
        if target.buffer in self.values:
            if not varies and not target.offset.is_zero:
                assert self._lane is not None, "a block is written by lanes"
                value, varies = f"tl.broadcast_to({value}, {self._shape(True)})", True
            if varies:
                self._varying.add(target.buffer)
            if value != target.buffer:
                self.line(f"{target.buffer} = {value}")
            return
        if varies and not self._varies(target.offset):
            raise NotEmitted("the lanes of a block write one element", f"{target.buffer}[{target.offset}]")
        place = self._place(target)
        mask = self._mask(target.offset, target.buffer in self.places)
        self.line(f"tl.store({place}, {value}{mask})")
        for stale in [x for x in self._names.at_hand if x.buffer == target.buffer]:
            del self._names.at_hand[stale]
        if varies and self._is_kept(target):
            self._names.at_hand[target] = value  # what a lane reads back need not come from memory

    def _is_kept(self, target: Target) -> bool:
        """Whether the target is what a kernel keeps for itself, in memory."""
        local = self.kernel.buffer(target.buffer).scope is not Scope.GLOBAL
        return local and target.buffer not in self.values
