"""Layer I: polyhedral loop fusion inside a micro-graph, with isl.

Dependences are computed exactly, isl's scheduler (Bondhugula et al.'s Pluto algorithm, as isl
implements it) looks for a schedule that keeps producers and users close, and the schedule is
checked against the dependences before anything else sees it.  No loop is shifted
(``max_constant_term`` 0), so that a reduction and its broadcast consumers share their outer
coincident band with one inner loop each: the shape that memory stitching needs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Iterator as Generator
from dataclasses import dataclass
from functools import reduce
from types import MappingProxyType
from typing import TypeAlias, TypeVar

import islpy as isl

from apollo_fuse.graph import Refused
from apollo_fuse.index import Atom, Index, Iterator, divides_a_sum, mixes_axes
from apollo_fuse.passes.cluster_statements import MacroStatement, cluster_statements
from apollo_fuse.scop import Parameters, Scop

RULE = "loop_fusion"
_DEPENDENCES = 3
"""Operations of dependences for one of a schedule: most of those allocate, and this turns whole tableaus."""


@dataclass(frozen=True, slots=True)
class Member:
    """One loop of a band: the iterator that each statement contributes, and whether it runs in parallel."""

    iterators: tuple[tuple[str, Iterator], ...]  # (statement, its iterator)
    coincident: bool

    def of(self, statement: str) -> Iterator | None:
        return next((i for name, i in self.iterators if name == statement), None)


@dataclass(frozen=True, slots=True)
class Band:
    members: tuple[Member, ...]
    permutable: bool
    child: Tree


@dataclass(frozen=True, slots=True)
class Sequence:
    """Children one after the other; `ordered` is False where nothing depends on the order."""

    children: tuple[Tree, ...]
    ordered: bool


@dataclass(frozen=True, slots=True)
class Leaf:
    """The statements that run at this point, in order."""

    statements: tuple[str, ...]


Tree: TypeAlias = Band | Sequence | Leaf


@dataclass(frozen=True, slots=True)
class Fused:
    scop: Scop
    tree: Tree


def show(tree: Tree, indent: str = "") -> str:
    """The schedule tree as text, one node a line."""
    match tree:
        case Leaf(statements):
            return f"{indent}{'; '.join(statements)}\n"
        case Sequence(children, ordered):
            inner = "".join(show(child, indent + "  ") for child in children)
            return f"{indent}{'sequence' if ordered else 'set'}:\n{inner}"
        case Band(members, permutable, child):
            loops = ", ".join(
                "/".join(i.name for _, i in m.iterators) + ("" if m.coincident else " (sequential)")
                for m in members
            )
            return (
                f"{indent}band [{loops}]{' permutable' if permutable else ''}\n{show(child, indent + '  ')}"
            )


@dataclass(frozen=True, slots=True)
class LoopFusion:
    """From a Scop to its schedule tree.

    isl_operations: what isl may spend on a schedule, and `_DEPENDENCES` times on what it is computed from;
        reaching it is a refusal.
    """

    isl_operations: int = 100_000

    def __call__(self, scop: Scop) -> Fused | Refused:
        nodes = tuple(s.name for s in scop.statements)
        context = isl.Context()
        context.set_schedule_max_constant_term(0)
        context.set_schedule_treat_coalescing(0)
        context.set_schedule_max_coefficient(1)
        try:
            return _schedule(context, scop, self.isl_operations)
        except isl.Error as error:
            if "operations" in str(error):
                return Refused(nodes, RULE, "isl ran out of operations", f"limit {self.isl_operations}")
            return Refused(nodes, RULE, "isl failed", str(error).splitlines()[0])


def _schedule(context: isl.Context, scop: Scop, isl_operations: int) -> Fused | Refused:
    nodes = tuple(s.name for s in scop.statements)
    parameters = Parameters({})
    macros = cluster_statements(scop.statements)
    windows = _windows(macros)
    relations = _relations(macros, windows, parameters)
    if isinstance(relations, Refused):
        return relations
    domain_text, reads_text, writes_text, inputs_text, order_text = relations
    domain = isl.UnionSet.read_from_str(context, domain_text)
    reads, writes, inputs, order = (
        isl.UnionMap.read_from_str(context, text).intersect_domain(domain)
        for text in (reads_text, writes_text, inputs_text, order_text)
    )
    # from here on: reading what is broken off ends as a syntax error
    context.set_max_operations(_DEPENDENCES * isl_operations)
    chained, free = _row_order(context, macros, windows, domain)
    flow = _dependences(reads, writes, order).subtract(chained).union(free)
    validity = flow.union(_dependences(writes, reads.union(writes), order).subtract(chained)).coalesce()
    sample = isl.Set.read_from_str(context, parameters.sample())
    statements = {m.name: m for m in macros}

    def attempt(validity: isl.UnionMap, coincidence: isl.UnionMap, proximity: isl.UnionMap) -> Tree | Refused:
        constraints = (
            isl.ScheduleConstraints.on_domain(_at(domain, sample))
            .set_validity(_at(validity, sample))
            .set_coincidence(_at(coincidence, sample))
            .set_proximity(_at(proximity, sample))
        )
        context.reset_operations()
        context.set_max_operations(isl_operations)
        schedule = constraints.compute_schedule()
        context.set_max_operations(_DEPENDENCES * isl_operations)
        if not _legal(schedule, validity):
            return Refused(nodes, RULE, "isl gave a schedule that breaks a dependence", schedule.to_str())
        return _tree(schedule.get_root().child(0), statements, tuple(statements))

    found: list[Tree | Refused] = []
    for proximity in _proximities(flow, inputs, order, len(macros)):
        found.append(attempt(validity, validity, proximity))
        if not isinstance(found[-1], (Refused, Sequence)):
            return Fused(scop, found[-1])
    if isinstance(found[0], Refused) and not free.is_empty():
        # isl may skew reductions over four loops or more; here no point waits for its neighbours, and the
        # loops run one after the other, since otherwise isl would turn them round
        context.set_schedule_serialize_sccs(1)
        found.insert(0, attempt(validity.subtract(free), validity, flow))
    return found[0] if isinstance(found[0], Refused) else Fused(scop, found[0])


def _row_order(
    context: isl.Context,
    macros: tuple[MacroStatement, ...],
    windows: Mapping[str, set[int]],
    domain: isl.UnionSet,
) -> tuple[isl.UnionMap, isl.UnionMap]:
    """The dependences of reductions over several loops on themselves, and what takes their place.

    What is combined may be combined in any order, so a point waits for its neighbour along each loop
    only, and not for all that came before it in the program. That leaves the loops free to be interchanged,
    and isl without a reason to skew them.

    What `windows` slide over waits in the same way: see there.
    """
    chained, free = ["{ }"], ["{ }"]
    for macro in macros:
        reduction = macro.members[0].reduction
        names = [i.name for i in macro.domain]
        here, there = f"{macro.name}[{', '.join(names)}]", ", ".join(f"{name}_" for name in names)
        along = {
            i.name
            for s in macro.members
            for axis in windows.get(s.target.name, ())
            for i in s.indices[axis].substitute(macro.renaming(s)).iterators()
        }
        if reduction is not None and len(reduction.iterators) > 1:
            chained.append(f"{{ {here} -> {macro.name}[{there}] }}")
            along |= {i.name for i in reduction.iterators}
        for name in sorted(along):
            after = ", ".join(f"{n} + 1" if n == name else n for n in names)
            free.append(f"{{ {here} -> {macro.name}[{after}] }}")
    before, instead = (
        reduce(isl.UnionMap.union, (isl.UnionMap.read_from_str(context, text) for text in texts))
        for texts in (chained, free)
    )
    return before, instead.intersect_domain(domain).intersect_range(domain)


def _windows(macros: tuple[MacroStatement, ...]) -> dict[str, set[int]]:
    """Of each tensor that is read, the axes along which some point reads several elements.

    All of a row along these is made before any of it is read, as where it is reduced. Else isl, which may not
    shift a loop by the length of a window, runs the two loops towards each other, or shares none of them.
    """
    found: dict[str, set[int]] = {}
    for macro in macros:
        places: dict[str, list[tuple[Index, ...]]] = {}
        for statement in macro.members:
            own = macro.renaming(statement)
            for load in statement.block.loads:
                place = tuple(index.substitute(own) for index in load.indices)
                places.setdefault(load.tensor, []).append(place)
        for tensor, indices in places.items():
            several = (n for n, along in enumerate(zip(*indices, strict=True)) if len(set(along)) > 1)
            found.setdefault(tensor, set()).update(several)
    return found


def _proximities(
    flow: isl.UnionMap, inputs: isl.UnionMap, order: isl.UnionMap, statements: int
) -> Generator[isl.UnionMap]:
    """What to keep close: users with their producers, then readers of one input with each other too.

    In this order, since what readers have in common (a mask that is broadcast, say) may weigh more with isl
    than the row that a reduction and its consumers share.
    """
    if not flow.is_empty() or statements == 1:
        yield flow
    if statements > 1:
        yield flow.union(_dependences(inputs, inputs, order)).coalesce()


_Relation = TypeVar("_Relation", isl.UnionSet, isl.UnionMap)


def _at(relation: _Relation, sample: isl.Set) -> _Relation:
    """The relation for one choice of the run-time extents.

    Scheduled symbolically, isl may shift a loop by a whole extent, which no bound on constants
    forbids. A schedule found for a sample has no such shifts; it is proved for all extents after.
    """
    return relation.intersect_params(sample).project_out_all_params()


def _relations(
    macros: tuple[MacroStatement, ...], windows: Mapping[str, set[int]], parameters: Parameters
) -> tuple[str, str, str, str, str] | Refused:
    """Domain, reads and writes of kept and output tensors, reads of inputs, original order; as isl text."""
    domains: list[str] = []
    reads: list[str] = []
    writes: list[str] = []
    inputs: dict[str, list[tuple[str, str]]] = {}
    order: list[str] = []
    depth = max(len(m.domain) for m in macros)
    # what nobody reads is written at any time: each element once, unless it is combined from several
    read = {load.tensor for m in macros for s in m.members for load in s.block.loads}
    written = {s.target.name: s.target.shape for m in macros for s in m.members}
    for number, macro in enumerate(macros):
        instance = f"{macro.name}[{', '.join(i.name for i in macro.domain)}]"
        bounds = [f"0 <= {i.name} < {parameters.affine(i.extent)}" for i in macro.domain]
        domains.append(f"{instance} : {' and '.join(bounds)}" if bounds else instance)
        padded = [i.name for i in macro.domain] + ["0"] * (depth - len(macro.domain))
        order.append(f"{instance} -> [{', '.join([str(number), *padded])}]")
        for statement in macro.members:
            own = macro.renaming(statement)
            if statement.target.name in read or statement.reduction is not None:
                target = _access(statement.target.name, statement.indices, own, parameters)
                if target is None:
                    return Refused((statement.name,), RULE, "access is not affine", str(statement.indices))
                writes.append(f"{instance} -> {target}")
                if statement.reduction is not None:
                    reads.append(f"{instance} -> {target}")
            for load in statement.block.loads:
                source = _access(load.tensor, load.indices, own, parameters)
                if load.tensor in written:
                    if source is None:
                        return Refused((statement.name,), RULE, "access is not affine", str(load.indices))
                    row = {axis: written[load.tensor][axis] for axis in windows[load.tensor]}
                    whole = _access(load.tensor, load.indices, own, parameters, row)
                    reads.append(f"{instance} -> {whole}")
                elif source is not None and load.indices:
                    inputs.setdefault(load.tensor, []).append((instance, source.removeprefix(load.tensor)))
    # inputs that are read alike bring the same points together: one stands for all
    alike = {tuple(dict.fromkeys(accesses)): tensor for tensor, accesses in inputs.items()}
    read_alike = [
        f"{at} -> {tensor}{element}" for accesses, tensor in alike.items() for at, element in accesses
    ]
    head = parameters.declaration()

    def text(parts: list[str]) -> str:
        return f"{head}{{ {'; '.join(dict.fromkeys(parts))} }}"

    return text(domains), text(reads), text(writes), text(read_alike), text(order)


def _access(
    tensor: str,
    indices: tuple[Index, ...],
    own: dict[Atom, Index],
    parameters: Parameters,
    row: Mapping[int, Index] = MappingProxyType({}),
) -> str | None:
    """The element at `indices`, or all those along the axes of `row`, which have these extents."""
    if any(divides_a_sum(i) or mixes_axes(i) for i in indices):  # affine at best, which costs isl minutes
        return None
    texts = [
        f"a{axis}" if axis in row else parameters.affine(index.substitute(own))
        for axis, index in enumerate(indices)
    ]
    known = [text for text in texts if text is not None]
    if len(known) < len(texts):
        return None
    bounds = [f"0 <= a{axis} < {parameters.affine(extent)}" for axis, extent in row.items()]
    return f"{tensor}[{', '.join(known)}]" + (f" : {' and '.join(bounds)}" if bounds else "")


def _dependences(sink: isl.UnionMap, source: isl.UnionMap, order: isl.UnionMap) -> isl.UnionMap:
    access = isl.UnionAccessInfo.from_sink(sink).set_may_source(source).set_schedule_map(order)
    return access.compute_flow().get_may_dependence()


def _legal(schedule: isl.Schedule, validity: isl.UnionMap) -> bool:
    """Every dependence goes forward in time."""
    time = schedule.get_map()
    backward = validity.apply_domain(time).apply_range(time)
    if backward.is_empty():
        return True
    spaces: list[isl.Map] = []
    backward.foreach_map(spaces.append)
    for moved in spaces:
        not_after = isl.Map.lex_ge(moved.get_space().domain())
        if not moved.intersect(not_after).is_empty():
            return False
    return True


def _tree(
    node: isl.ScheduleNode, statements: dict[str, MacroStatement], active: tuple[str, ...]
) -> Tree | Refused:
    kind = isl.schedule_node_type(node.get_type())
    types = isl.schedule_node_type
    if kind == types.leaf:
        return Leaf(tuple(member.name for name in active for member in statements[name].members))
    if kind in (types.sequence, types.set):
        children: list[Tree] = []
        for place in range(node.n_children()):
            child = node.child(place)
            names = _names(child.filter_get_filter())
            inner = _tree(child.child(0), statements, tuple(n for n in active if n in names))
            if isinstance(inner, Refused):
                return inner
            children.append(inner)
        return Sequence(tuple(children), kind == types.sequence)
    if kind == types.band:
        inner = _tree(node.child(0), statements, active)
        members = [_member(node, place, statements, active) for place in range(node.band_n_member())]
        if isinstance(inner, Refused):
            return inner
        if any(isinstance(m, Refused) for m in members):
            return next(m for m in members if isinstance(m, Refused))
        loops = tuple(m for m in members if isinstance(m, Member) and m.iterators)
        permutable = bool(node.band_get_permutable())
        return Band(loops, permutable, inner) if loops else inner
    return Refused(active, RULE, "schedule has a node of an unknown kind", str(kind))


def _names(filter_: isl.UnionSet) -> set[str]:
    found: set[str] = set()
    note: Callable[[isl.Set], None] = lambda s: found.add(str(s.get_tuple_name()))  # noqa: E731
    filter_.foreach_set(note)
    return found


def _member(
    node: isl.ScheduleNode, place: int, statements: dict[str, MacroStatement], active: tuple[str, ...]
) -> Member | Refused:
    """The band member as one plain iterator of each statement; anything else is refused."""
    partial = node.band_get_partial_schedule().get_union_pw_aff(place)
    found: dict[str, int] = {}  # the place of the iterator in the domain
    refused: list[str] = []

    def read(function: isl.PwAff) -> None:
        name = str(function.domain().get_tuple_name())
        domain = statements[name].domain
        pieces: list[isl.Aff] = []
        function.foreach_piece(lambda _, aff: pieces.append(aff))
        if len(pieces) != 1:
            refused.append(str(function))
            return
        aff = pieces[0]
        coefficients = [aff.get_coefficient_val(isl.dim_type.in_, i).to_python() for i in range(len(domain))]
        plain = aff.get_constant_val().is_zero() and aff.dim(isl.dim_type.div) == 0
        if plain and sorted(coefficients) == [0] * (len(domain) - 1) + [1]:
            found[name] = coefficients.index(1)
        elif not (plain and all(c == 0 for c in coefficients)):
            refused.append(str(function))

    partial.foreach_pw_aff(read)
    if refused:
        return Refused(active, RULE, "schedule is not a plain loop order", "; ".join(refused))
    iterators = tuple(
        (member.name, member.domain[found[name]])
        for name in active
        if name in found
        for member in statements[name].members
    )
    extents = {i.extent for _, i in iterators}
    if len(extents) > 1:
        return Refused(
            active, RULE, "loops of different extents cannot be fused", ", ".join(sorted(map(str, extents)))
        )
    return Member(iterators, bool(node.band_member_get_coincident(place)))
