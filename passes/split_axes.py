"""Splits the axes of statements where reshapes need it, and the same way on both sides of a tensor.

A reshape inside a micro-graph leaves quotients and remainders of an iterator behind.  Splitting the
iterator turns them into plain iterators again: ``i`` becomes ``d*o + r``, ``i // d`` becomes ``o``.
Statements that meet in a tensor are split alike, and an internal tensor's axis with them, so that isl
sees identities.
"""

from __future__ import annotations

from dataclasses import replace

from apollo_fuse.expressions import Apply, Block, Constant, Instruction, Load, Position, Reduction
from apollo_fuse.graph import Value
from apollo_fuse.index import Atom, Index, Iterator, Quotient, mixes_axes
from apollo_fuse.scop import Statement


def split_axes(statements: list[Statement], internal: frozenset[str]) -> list[Statement]:
    """The statements with their axes split; `internal` names the tensors whose layout is free."""
    result = [_split_by_quotients(s) for s in statements]
    read = {load.tensor for s in statements for load in s.block.loads}
    tensors = sorted(read & {s.target.name for s in statements})
    changed = True
    while changed:
        changed = False
        for tensor in tensors:
            for axis, divisor in _divisors(result, tensor):
                aligned = [_split_access(s, tensor, axis, divisor) for s in result]
                changed |= any(a is not b for a, b in zip(aligned, result, strict=True))
                result = aligned
    for tensor in sorted(internal):
        axes = dict(_divisors(result, tensor))
        for axis in sorted(axes, reverse=True):
            result = _split_tensor(result, tensor, axis, axes[axis])
    return result


def _split_by_quotients(statement: Statement) -> Statement:
    count = 0
    while True:
        for iterator in statement.domain:
            divisor = _quotient_divisor(statement, iterator)
            if divisor is not None and iterator.extent.exact_quotient(divisor) is not None:
                statement = split(statement, iterator, divisor, str(count))
                count += 1
                break
        else:
            return statement


def _quotient_divisor(statement: Statement, iterator: Iterator) -> Index | None:
    """The greatest divisor of the iterator in the statement's quotients."""
    own = Index.of(iterator)
    found = [
        atom.divisor
        for indices in _all_accesses(statement)
        if not any(map(mixes_axes, indices))  # such quotients cancel out in an offset
        for index in indices
        for atom in index.atoms()
        if isinstance(atom, Quotient) and atom.numerator == own
    ]
    return max(found, key=_size, default=None)


def _size(divisor: Index) -> tuple[int, int, str]:
    return (max((len(m) for m, _ in divisor.terms), default=0), divisor.constant or 0, str(divisor))


def access_indices(statement: Statement) -> list[Index]:
    """All indices of a statement: of what it writes, what it reads, and what it uses as numbers."""
    return [index for indices in _all_accesses(statement) for index in indices]


def _all_accesses(statement: Statement) -> list[tuple[Index, ...]]:
    found = [statement.indices]
    for item in statement.block.instructions:
        if isinstance(item, Load):
            found.append(item.indices)
        elif isinstance(item, Position):
            found.append((item.index,))
    return found


def split(statement: Statement, old: Iterator, divisor: Index, label: str) -> Statement:
    """The statement with ``old`` replaced by ``divisor * outer + inner``."""
    quotient = old.extent.exact_quotient(divisor)
    assert quotient is not None, "an axis is split by a divisor of its extent"
    outer = Iterator(f"{old.name}_{label}o", quotient)
    inner = Iterator(f"{old.name}_{label}i", divisor)
    values: dict[Atom, Index] = {old: Index.of(outer) * divisor + Index.of(inner)}

    def parts(iterators: tuple[Iterator, ...]) -> tuple[Iterator, ...]:
        return tuple(n for i in iterators for n in ((outer, inner) if i == old else (i,)))

    reduction = statement.reduction
    return replace(
        statement,
        indices=tuple(i.substitute(values) for i in statement.indices),
        iterators=parts(statement.iterators),
        reduction=None if reduction is None else Reduction(reduction.op, parts(reduction.iterators)),
        block=statement.block.substitute(values),
    )


def _accesses(statement: Statement, tensor: str) -> list[tuple[Index, ...]]:
    found = [statement.indices] if statement.target.name == tensor else []
    return found + [load.indices for load in statement.block.loads if load.tensor == tensor]


def _divisors(statements: list[Statement], tensor: str) -> list[tuple[int, Index]]:
    """The axes of the tensor that some access sees split, with the divisor."""
    found: dict[int, Index] = {}
    for statement in statements:
        for indices in _accesses(statement, tensor):
            for axis, index in enumerate(indices):
                pair = _pair(index)
                if pair is not None:
                    found.setdefault(axis, pair[1].extent)
    return list(found.items())


def _pair(index: Index) -> tuple[Iterator, Iterator] | None:
    """``(outer, inner)`` of an index ``inner.extent * outer + inner``."""
    iterators = index.iterators()
    if len(index.terms) != 2 or len(iterators) != 2:
        return None
    for inner in iterators:
        (outer,) = iterators - {inner}
        if index == Index.of(outer) * inner.extent + Index.of(inner):
            return outer, inner
    return None


def _split_access(statement: Statement, tensor: str, axis: int, divisor: Index) -> Statement:
    for indices in _accesses(statement, tensor):
        index = indices[axis]
        for iterator in statement.domain:
            if index == Index.of(iterator) and iterator.extent.exact_quotient(divisor) is not None:
                return split(statement, iterator, divisor, "a")
    return statement


def _split_tensor(statements: list[Statement], tensor: str, axis: int, divisor: Index) -> list[Statement]:
    """Replaces an axis by two, if every access sees it so."""
    for statement in statements:
        for indices in _accesses(statement, tensor):
            pair = _pair(indices[axis])
            if pair is None or pair[1].extent != divisor:
                return statements

    def access(indices: tuple[Index, ...]) -> tuple[Index, ...]:
        pair = _pair(indices[axis])
        assert pair is not None
        return (*indices[:axis], Index.of(pair[0]), Index.of(pair[1]), *indices[axis + 1 :])

    def instruction(item: Instruction) -> Instruction:
        match item:
            case Load(name, indices, dtype) if name == tensor:
                return Load(name, access(indices), dtype)
            case Constant() | Load() | Position() | Apply():
                return item

    def target(value: Value) -> Value:
        quotient = value.shape[axis].exact_quotient(divisor)
        assert quotient is not None
        return replace(value, shape=(*value.shape[:axis], quotient, divisor, *value.shape[axis + 1 :]))

    return [
        replace(
            s,
            target=target(s.target) if s.target.name == tensor else s.target,
            indices=access(s.indices) if s.target.name == tensor else s.indices,
            block=Block(tuple(map(instruction, s.block.instructions))),
        )
        for s in statements
    ]
