"""Makes fixed extents run-time ones where code need not know them, so that more nodes share a kernel."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from apollo_fuse.graph import Value
from apollo_fuse.index import Index, Symbol
from apollo_fuse.passes.split_axes import access_indices
from apollo_fuse.scop import Extent, Statement

_SHORT = 16  # greatest extent that stays a number where the others become symbols


@dataclass(frozen=True, slots=True)
class Freed:
    """The extents that become run-time ones, and what stands for their numbers and for sums of these."""

    extents: tuple[Extent, ...]
    names: dict[int, Index]


def free_extents(inputs: tuple[Value, ...], statements: list[Statement], taken: int) -> Freed:
    """The fixed extents that the code need not know, so that layers of different widths share a kernel.

    Where accesses compute with extents these stay fixed, and in reductions, whose loops gain from a known
    length. So do short axes, which are unrolled, and those of parts that lie side by side in a row.
    """
    found: dict[int, Extent] = {}
    for place, value in enumerate(inputs):
        for axis, dim in enumerate(value.shape):
            number = dim.constant
            if number is not None and number > _SHORT and number not in found:
                symbol = Symbol(f"n{taken + len(found)}")
                found[number] = Extent(symbol, place, axis, Index.of(1), Index.of(0))
    names = {number: Index.of(extent.symbol) for number, extent in found.items()}
    _name_ends(names, statements)
    free = bool(found) and all(_needs_no_extent(s, names) for s in statements)
    return Freed(tuple(found.values()), names) if free else Freed((), {})


def _name_ends(names: dict[int, Index], statements: list[Statement]) -> None:
    """Names where the parts of tensors that are written in parts end, as they follow one another."""
    parts = {
        (offset_of(index), iterator.extent.constant)
        for s in statements
        for index in s.indices
        for iterator in index.iterators()
    }
    for start, extent in sorted((start, extent) for start, extent in parts if extent is not None):
        if start == 0 or start in names:
            end = names.get(start, Index.of(start)) + names.get(extent, Index.of(extent))
            names.setdefault(start + extent, end)


def _needs_no_extent(statement: Statement, offsets: Collection[int]) -> bool:
    """Whether no access computes with extents, but for where loops around the innermost one start."""
    innermost = set(statement.iterators[-1:])
    return statement.reduction is None and all(
        _is_plain(index, () if index.iterators() & innermost else offsets)
        for index in access_indices(statement)
    )


def _is_plain(index: Index, offsets: Collection[int]) -> bool:
    """0, or one iterator, from one of the offsets on or from 0."""
    start = offset_of(index)
    plain = any(index - start == Index.of(iterator) for iterator in index.iterators())
    return index.is_zero or (plain and (start == 0 or start in offsets))


def offset_of(index: Index) -> int:
    """The number in a polynomial."""
    return sum(factor for monomial, factor in index.terms if not monomial)
