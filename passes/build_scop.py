"""From a micro-graph to its Scop: inline what need not be kept, and name everything anew.

Fewer statements make isl faster and kernels better, so a producer is inlined into its users unless
it is an output, a reduction, written in parts, or too dear to compute more than once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from apollo_fuse.expressions import (
    Apply,
    Block,
    BlockBuilder,
    Constant,
    Instruction,
    Load,
    Position,
    Reduction,
)
from apollo_fuse.graph import MicroGraph, Primitive, Refused, Value
from apollo_fuse.index import (
    Atom,
    Index,
    Indirect,
    Iterator,
    Maximum,
    Monomial,
    Quotient,
    Symbol,
)
from apollo_fuse.passes.access_composition import point_of, without_index_views
from apollo_fuse.passes.bind_extents import bind_extents, needed_symbols
from apollo_fuse.passes.compute_in_parts import compute_in_parts
from apollo_fuse.passes.free_extents import free_extents, offset_of
from apollo_fuse.passes.simplify import simplify
from apollo_fuse.passes.split_axes import split_axes
from apollo_fuse.passes.write_as_made import write_as_made
from apollo_fuse.scop import LEAST_SAMPLE, Derived, Scop, Statement

RULE = "build_scop"


@dataclass(frozen=True, slots=True)
class BuildScop:
    """Gives the Scop, or says which extent or access cannot be expressed."""

    def __call__(self, micro_graph: MicroGraph) -> Scop | Refused:
        nodes = tuple(operator.op_type for operator in micro_graph.operators)
        try:
            results = frozenset(v.name for v in micro_graph.outputs)
            primitives = write_as_made(without_index_views(micro_graph.primitives), results)
            _require_given_indices(primitives)
            primitives = compute_in_parts(primitives, results)
            kept = _kept(primitives, results)
            statements = split_axes(_inline(primitives, kept), kept - results)
            statements = [s for s in statements if not _is_void(s)]
            if not statements:
                return Refused(nodes, RULE, "nothing to compute", "every result is empty")
            return _canonical(micro_graph, statements)
        except _NotExpressible as reason:
            return Refused(nodes, RULE, reason.args[0], reason.args[1])


_WORTH_KEEPING = 5  # cost (see Block.cost) of an element from which on loops that need it share it


class _NotExpressible(Exception):
    """Its arguments are the reason and the evidence."""


def _is_void(statement: Statement) -> bool:
    """Whether the statement has no point at all.  A reduction of nothing still has a result."""
    if any(i.extent.is_zero for i in statement.iterators):
        return True
    over = statement.reduction.iterators if statement.reduction is not None else ()
    if any(i.extent.is_zero for i in over):
        raise _NotExpressible("a reduction over an empty axis", statement.target.name)
    return False


def _require_given_indices(primitives: Sequence[Primitive]) -> None:
    loads = [load for p in primitives for load in p.block.loads]
    indirect = {
        a.tensor for load in loads for i in load.indices for a in i.atoms() if isinstance(a, Indirect)
    }
    made = indirect & {p.output.name for p in primitives}
    if made:
        raise _NotExpressible("index tensor computed in the kernel", ", ".join(sorted(made)))


def _kept(primitives: Sequence[Primitive], results: frozenset[str]) -> frozenset[str]:
    """The tensors that get statements of their own: the results, and what is not to be computed twice."""
    parts: dict[str, int] = {}
    readers: dict[str, list[Primitive]] = {}
    for primitive in primitives:
        parts[primitive.output.name] = parts.get(primitive.output.name, 0) + 1
        for load in primitive.block.loads:
            readers.setdefault(load.tensor, []).append(primitive)
    kept = set(results)
    cost = _costs(primitives)
    roots: dict[str, set[str]] = {}
    for primitive in reversed(primitives):
        name = primitive.output.name
        flows = set[str]()
        for reader in readers.get(name, []):
            target = reader.output.name
            flows |= {target} if target in kept else roots.get(target, set())
        roots[name] = flows
        repeated = len(flows) > 1 and cost[name] >= _WORTH_KEEPING
        worth = primitive.reduction is not None or primitive.row_axes is not None
        if worth or parts[name] > 1 or repeated:
            kept.add(name)
    return frozenset(kept)


def _costs(primitives: Sequence[Primitive]) -> dict[str, int]:
    """What an element of each tensor costs to compute from inputs and the results of reductions.

    What is alike along the innermost loop is computed before it, and costs next to nothing.
    """
    cost: dict[str, int] = {}
    again: dict[str, int] = {}  # to have one anew, where it may have been kept
    readers = Counter(load.tensor for p in primitives for load in set(p.block.loads))
    for primitive in primitives:
        reduced = primitive.reduction.iterators if primitive.reduction is not None else ()
        inner = (*primitive.iterators, *reduced)[-1:]
        varying = {
            load.tensor
            for load in primitive.block.loads
            if any(index.iterators().intersection(inner) for index in load.indices)
        }
        name, whole = primitive.output.name, primitive.block.cost + sum(again.get(v, 0) for v in varying)
        cost[name] = whole
        kept = primitive.reduction is not None or (whole >= _WORTH_KEEPING and readers[name] > 1)
        again[name] = 0 if kept else whole
    return cost


def _inline(primitives: Sequence[Primitive], kept: frozenset[str]) -> list[Statement]:
    """A statement for each tensor that is kept, with the others computed where they are read."""
    everything = enumerate(primitives)
    inlined = {p.output.name: (n, p) for n, p in everything if p.output.name not in kept}
    statements: list[Statement] = []
    for primitive in primitives:
        if primitive.output.name not in kept:
            continue
        statements.append(
            Statement(
                f"S{len(statements)}",
                primitive.output,
                primitive.indices,
                primitive.iterators,
                primitive.reduction,
                simplify(_expanded(primitive, inlined)),
            )
        )
    return statements


_Element: TypeAlias = tuple[str, tuple[Index, ...]]


def _expanded(primitive: Primitive, inlined: Mapping[str, tuple[int, Primitive]]) -> Block:
    """The primitive's block with the inlined tensors that it reads computed in it, each element once."""
    wanted: dict[_Element, tuple[int, Primitive, Mapping[Atom, Index]]] = {}
    pending: list[tuple[Primitive, Mapping[Atom, Index]]] = [(primitive, {})]
    while pending:
        reader, values = pending.pop()
        for load in reader.block.loads:
            element = (load.tensor, tuple(i.substitute(values) for i in load.indices))
            if load.tensor in inlined and element not in wanted:
                place, producer = inlined[load.tensor]
                at = point_of(producer, element[1])
                wanted[element] = (place, producer, at)
                pending.append((producer, at))
    builder = BlockBuilder()
    places: dict[_Element, int] = {}

    def read(load: Load) -> int | None:
        return places.get((load.tensor, load.indices))

    for element, (_, producer, at) in sorted(wanted.items(), key=lambda item: item[1][0]):
        places[element] = builder.append(producer.block, at, read)
    return builder.build_at(builder.append(primitive.block, {}, read))


@dataclass(slots=True)
class _Renaming:
    """Maps a micro-graph's tensors, extents and iterators to canonical ones."""

    tensors: dict[str, str]
    symbols: dict[Symbol, Index]
    products: dict[Monomial, Symbol]
    constants: dict[int, Index]
    first_free: int  # number of the first name that no extent has
    iterators: dict[Atom, Index] = field(default_factory=dict)
    taken: int = 0
    differences: dict[Index, Derived] = field(default_factory=dict)

    def index(self, index: Index) -> Index:
        offset = offset_of(index)
        if offset and offset in self.constants:
            return self.index(index - offset) + self.constants[offset]
        for monomial, symbol in self.products.items():
            whole, rest = index.divide(Index(((monomial, 1),)))
            index = whole * Index.of(symbol) + rest
        return index.rewrite(self._atom)

    def extent(self, extent: Index) -> Index:
        number = extent.constant
        if number in self.constants:
            return self.constants[number]
        found = self.index(extent)
        if all(coefficient > -LEAST_SAMPLE if not m else coefficient > 0 for m, coefficient in found.terms):
            return found
        # the sample of extents that is scheduled could make a difference negative, and drop its loop
        if found not in self.differences:
            symbol = Symbol(f"n{self.first_free + len(self.differences)}")
            self.differences[found] = Derived(symbol, found)
        return Index.of(self.differences[found].symbol)

    def iterator(self, old: Iterator) -> Iterator:
        new = Iterator(f"i{self.taken}", self.extent(old.extent))
        self.taken += 1
        self.iterators[old] = Index.of(new)
        return new

    def value(self, value: Value) -> Value:
        return Value(self.tensors[value.name], value.dtype, tuple(map(self.extent, value.shape)))

    def instruction(self, item: Instruction) -> Instruction:
        match item:
            case Load(tensor, indices, dtype):
                return Load(self.tensors[tensor], tuple(self.index(i) for i in indices), dtype)
            case Position(index, dtype):
                return Position(self.index(index), dtype)
            case Constant() | Apply():
                return item

    def _atom(self, atom: Atom) -> Index | None:
        match atom:
            case Symbol():
                if atom not in self.symbols:
                    raise _NotExpressible("extent cannot be computed from the inputs' shapes", str(atom))
                return self.symbols[atom]
            case Iterator():
                return self.iterators[atom]
            case Indirect(tensor, indices, extent):
                name = self.tensors[tensor]
                return Index.of(Indirect(name, tuple(map(self.index, indices)), self.index(extent)))
            case Quotient() | Maximum():
                return None


def _canonical(micro_graph: MicroGraph, statements: list[Statement]) -> Scop:
    outputs = {v.name for v in micro_graph.outputs}
    kept = {s.target.name: s.target for s in statements if s.target.name not in outputs}
    tensors = {v.name: f"in{n}" for n, v in enumerate(micro_graph.inputs)}
    tensors |= {v.name: f"out{n}" for n, v in enumerate(micro_graph.outputs)}
    tensors |= {name: f"t{n}" for n, name in enumerate(kept)}
    required = tuple(dict.fromkeys(pair for o in micro_graph.operators for pair in o.required))
    binding = bind_extents(micro_graph.inputs, needed_symbols(statements, micro_graph.outputs, required))
    freed = free_extents(micro_graph.inputs, statements, len(binding.extents))
    taken = len(binding.extents) + len(freed.extents)
    renaming = _Renaming(tensors, binding.known, binding.products, freed.names, taken)
    sources, results, internal = (
        tuple(map(renaming.value, values))
        for values in (micro_graph.inputs, micro_graph.outputs, kept.values())
    )
    renamed = tuple(_rename(s, renaming) for s in statements)
    return Scop(
        sources,
        results,
        internal,
        renamed,
        (*binding.extents, *freed.extents, *renaming.differences.values()),
        required=tuple((renaming.index(a), renaming.index(b)) for a, b in required),
    )


def _rename(statement: Statement, renaming: _Renaming) -> Statement:
    renaming.taken = 0
    iterators = tuple(map(renaming.iterator, statement.iterators))
    reduction = statement.reduction
    if reduction is not None:
        reduction = Reduction(reduction.op, tuple(map(renaming.iterator, reduction.iterators)))
    # iterators of different statements must differ: they carry the statement's number
    number = statement.name.removeprefix("S")
    own = {
        Iterator(i.name, i.extent): Iterator(f"{i.name}_{number}", i.extent)
        for i in (*iterators, *(reduction.iterators if reduction else ()))
    }
    for old, index in list(renaming.iterators.items()):
        (atom,) = index.atoms()
        if isinstance(atom, Iterator) and atom in own:
            renaming.iterators[old] = Index.of(own[atom])
    block = Block(tuple(map(renaming.instruction, statement.block.instructions)))
    return Statement(
        statement.name,
        renaming.value(statement.target),
        tuple(map(renaming.index, statement.indices)),
        tuple(own[i] for i in iterators),
        None if reduction is None else Reduction(reduction.op, tuple(own[i] for i in reduction.iterators)),
        block,
    )
