"""A schedule tree as nests: common iterators for fused loops, and every access a linear offset.

Tensors that statements pass to each other are laid out anew: an axis that the grid fixes is gone,
since each work item sees one place of it only, and what remains is the work item's own memory.
"""

from __future__ import annotations

from collections.abc import Iterator as Generator
from dataclasses import dataclass, replace

from apollo_fuse.expressions import Apply, Block, Constant, Instruction, Load, Position
from apollo_fuse.graph import Refused
from apollo_fuse.index import Atom, Index, Indirect, Iterator, linearise, product
from apollo_fuse.passes.loop_fusion import Band, Leaf, Member, Sequence, Tree
from apollo_fuse.scop import Scop, Statement

RULE = "memory_stitching"


@dataclass(frozen=True, slots=True)
class Nest:
    """A loop with what is in it, or (without an iterator) one statement."""

    iterator: Iterator | None
    children: tuple[Nest, ...] = ()
    statement: str = ""


@dataclass(frozen=True, slots=True)
class Placed:
    """A statement whose accesses are linear: `offset` into its target, one index in each load."""

    statement: Statement
    offset: Index
    block: Block
    reduced: frozenset[Iterator]  # the loops its reduction runs over


@dataclass(frozen=True, slots=True)
class Nests:
    scop: Scop
    grid: tuple[Iterator, ...]
    body: tuple[Nest, ...]
    placed: dict[str, Placed]
    local_sizes: dict[str, Index]  # elements of each internal tensor in one work item

    @property
    def has_loops(self) -> bool:
        return any(nest.iterator is not None for nest in self.body)

    def offsets(self) -> Generator[Index]:
        """Offsets of all accesses to inputs and outputs."""
        for placed in self.placed.values():
            if placed.statement.target.name not in self.local_sizes:
                yield placed.offset
            for load in placed.block.loads:
                if load.tensor not in self.local_sizes:
                    yield load.indices[0]

    def all_offsets(self) -> Generator[Index]:
        for placed in self.placed.values():
            yield placed.offset
            for item in placed.block.instructions:
                if isinstance(item, Load):
                    yield item.indices[0]
                elif isinstance(item, Position):
                    yield item.index

    def innermost(self) -> list[Iterator]:
        """The loops with statements directly inside."""
        found: dict[Iterator, None] = {}

        def visit(nest: Nest) -> None:
            for child in nest.children:
                if child.iterator is None and nest.iterator is not None:
                    found[nest.iterator] = None
                visit(child)

        for nest in self.body:
            visit(nest)
        return list(found)

    def substitute(self, values: dict[Atom, Index]) -> Nests:
        placed = {
            name: replace(p, offset=p.offset.substitute(values), block=p.block.substitute(values))
            for name, p in self.placed.items()
        }
        return replace(self, placed=placed)


def build_nests(scop: Scop, tree: Tree, serial: bool = False) -> Nests | Refused:
    """One kernel's nests from the part of the tree that belongs to it.

    With `serial` a kernel may have no parallel loop, which otherwise is reason to group in another way.
    """
    names = statements_of(tree)
    statements = {s.name: s for s in scop.statements if s.name in names}
    values: dict[str, dict[Atom, Index]] = {name: {} for name in names}
    members: tuple[Member, ...] = ()
    inner = tree
    if isinstance(tree, Band):
        order = {i: place for s in statements.values() for place, i in enumerate(s.domain)}
        shared = [m for m in tree.members if m.coincident and len(m.iterators) == len(names)]
        left = tuple(m for m in tree.members if m not in shared)
        if not shared and not serial and any(s.reduction is None and s.domain for s in statements.values()):
            return Refused(
                names, RULE, "no loop can run in parallel", "the outer band has no coincident member"
            )
        if left and shared and not tree.permutable:
            return Refused(names, RULE, "a sequential loop lies outside a parallel one", str(left))
        members = tuple(sorted(shared, key=lambda m: order[m.iterators[-1][1]]))
        inner = Band(left, tree.permutable, tree.child) if left else tree.child
    grid = tuple(Iterator(f"g{place}", m.iterators[0][1].extent) for place, m in enumerate(members))
    for axis, member in zip(grid, members, strict=True):
        for name, own in member.iterators:
            values[name][own] = Index.of(axis)
    try:
        body = _convert(inner, statements, values, [0])
    except _Misplaced as problem:
        return Refused(names, RULE, "a statement stands in a loop that is not its own", problem.args[0])
    return _place(scop, grid, body, statements, values)


def statements_of(tree: Tree) -> tuple[str, ...]:
    match tree:
        case Leaf(statements):
            return statements
        case Sequence(children, _):
            return tuple(name for child in children for name in statements_of(child))
        case Band(_, _, child):
            return statements_of(child)


def _convert(
    tree: Tree,
    statements: dict[str, Statement],
    values: dict[str, dict[Atom, Index]],
    counter: list[int],
) -> tuple[Nest, ...]:
    match tree:
        case Leaf(names):
            return tuple(Nest(None, (), name) for name in names)
        case Sequence(children, _):
            return tuple(n for child in children for n in _convert(child, statements, values, counter))
        case Band(members, permutable, child):
            if permutable:  # loops that are kept go outside those that are reduced
                members = tuple(sorted(members, key=lambda m: _reduces(m, statements)))
            if not members:
                return _convert(child, statements, values, counter)
            member, inner = members[0], Band(members[1:], permutable, child)
            # what is no part of the loop runs with its first turn, and needs no loop to do so
            inside = frozenset(name for name, _ in member.iterators)
            names = statements_of(child)
            before = tuple(name for name in names if name not in inside)
            if names[: len(before)] != before:
                raise _Misplaced(", ".join(before))
            iterator = Iterator(f"r{counter[0]}", member.iterators[0][1].extent)
            counter[0] += 1
            for name, own in member.iterators:
                values[name][own] = Index.of(iterator)
            hoisted = _convert(_restricted(inner, frozenset(before)), statements, values, counter)
            nests = _convert(_restricted(inner, inside), statements, values, counter)
            return (*hoisted, Nest(iterator, nests))


class _Misplaced(Exception):
    """Its argument names the statements."""


def _restricted(tree: Tree, names: frozenset[str]) -> Tree:
    """The part of the tree that runs these statements."""
    match tree:
        case Leaf(statements):
            return Leaf(tuple(name for name in statements if name in names))
        case Sequence(children, ordered):
            return Sequence(tuple(_restricted(child, names) for child in children), ordered)
        case Band(members, permutable, child):
            kept = (
                Member(tuple(pair for pair in m.iterators if pair[0] in names), m.coincident) for m in members
            )
            return Band(tuple(m for m in kept if m.iterators), permutable, _restricted(child, names))


def _reduces(member: Member, statements: dict[str, Statement]) -> bool:
    reductions = ((statements[name].reduction, own) for name, own in member.iterators)
    return any(reduction is not None and own in reduction.iterators for reduction, own in reductions)


def _place(
    scop: Scop,
    grid: tuple[Iterator, ...],
    body: tuple[Nest, ...],
    statements: dict[str, Statement],
    values: dict[str, dict[Atom, Index]],
) -> Nests | Refused:
    written = {
        s.target.name: tuple(i.substitute(values[n]) for i in s.indices) for n, s in statements.items()
    }
    around = _common_loops(body, statements, values, written)
    local: dict[str, tuple[int, ...]] = {}  # axes of an internal tensor that remain
    sizes: dict[str, Index] = {}
    for value in scop.kept:
        if value.name in written:
            at = written[value.name]
            fixed = around.get(value.name, frozenset()) | frozenset(grid)
            axes = tuple(a for a, index in enumerate(at) if index.iterators() - fixed)
            if any(at[a].iterators() & fixed for a in axes):
                return Refused(
                    tuple(statements), RULE, "an axis mixes parallel and sequential loops", value.name
                )
            local[value.name] = axes
            sizes[value.name] = product(value.shape[a] for a in axes)
    placed: dict[str, Placed] = {}
    for name, statement in statements.items():
        try:
            placed[name] = _linear(scop, statement, values[name], local, written)
        except _Crossing as crossing:
            return Refused(tuple(statements), RULE, "a value would cross work items", crossing.args[0])
    return Nests(scop, grid, body, placed, sizes)


def _common_loops(
    body: tuple[Nest, ...],
    statements: dict[str, Statement],
    values: dict[str, dict[Atom, Index]],
    written: dict[str, tuple[Index, ...]],
) -> dict[str, frozenset[Iterator]]:
    """For each tensor, the loops around all that write and read it, where a turn reads what it wrote itself.

    A place of the tensor is enough for each turn then (Darte and Huard, "New complexity results on array
    contraction", 2005, treat the general problem).
    """
    loops: dict[str, frozenset[Iterator]] = {}

    def visit(nests: tuple[Nest, ...], outside: frozenset[Iterator]) -> None:
        for nest in nests:
            if nest.iterator is None:
                loops[nest.statement] = outside
            else:
                visit(nest.children, outside | {nest.iterator})

    visit(body, frozenset())
    found = {s.target.name: loops[n] for n, s in statements.items() if _is_whole(s)}
    for name, statement in statements.items():
        for load in statement.block.loads:
            if load.tensor not in found:
                continue
            at = tuple(i.substitute(values[name]) for i in load.indices)
            pairs = zip(at, written[load.tensor], strict=True)
            moved = frozenset(i for here, there in pairs if here != there for i in there.iterators())
            found[load.tensor] = (found[load.tensor] & loops[name]) - moved
    return found


def _is_whole(statement: Statement) -> bool:
    """Whether each index of the target is an iterator or a number."""
    return all(len(i.terms) <= 1 and len(i.iterators()) <= 1 for i in statement.indices)


class _Crossing(Exception):
    """Its argument names the access."""


def _linear(
    scop: Scop,
    statement: Statement,
    values: dict[Atom, Index],
    local: dict[str, tuple[int, ...]],
    written: dict[str, tuple[Index, ...]],
) -> Placed:
    def linear_read(atom: Atom) -> Index | None:
        """The atom's own indices, those into the index tensor, as one offset."""
        if not isinstance(atom, Indirect):
            return None
        return Index.of(Indirect(atom.tensor, (offset(atom.tensor, atom.indices),), atom.extent))

    def offset(tensor: str, indices: tuple[Index, ...]) -> Index:
        at = tuple(i.rewrite(linear_read).substitute(values) for i in indices)
        shape = scop.value(tensor).shape
        if tensor not in local:
            return linearise(at, shape)
        axes = local[tensor]
        for axis, (index, target) in enumerate(zip(at, written[tensor], strict=True)):
            if axis not in axes and index != target:
                raise _Crossing(f"{tensor}[{', '.join(map(str, at))}]")
        return linearise(tuple(at[a] for a in axes), tuple(shape[a] for a in axes))

    def instruction(item: Instruction) -> Instruction:
        match item:
            case Load(tensor, indices, dtype):
                return Load(tensor, (offset(tensor, indices),), dtype)
            case Position(index, dtype):
                return Position(index.substitute(values), dtype)
            case Constant() | Apply():
                return item

    block = Block(tuple(map(instruction, statement.block.instructions)))
    over = statement.reduction.iterators if statement.reduction is not None else ()
    reduced = frozenset(i for own in over for i in values[own].iterators())
    return Placed(statement, offset(statement.target.name, statement.indices), block, reduced)


def statements_in(nest: Nest) -> list[str]:
    """The statements of a nest, in order."""
    if nest.iterator is None:
        return [nest.statement]
    return [name for child in nest.children for name in statements_in(child)]
