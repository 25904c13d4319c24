"""Makes fixed extents run-time ones where code need not know them, so that more nodes share a kernel."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from apollo_fuse.graph import Value
from apollo_fuse.index import Index, Symbol
from apollo_fuse.passes.split_axes import access_indices
from apollo_fuse.scop import Extent, Statement

_SHORT = 16  # greatest extent that stays a number where the others become symbols


def free_extents(inputs: tuple[Value, ...], statements: list[Statement], taken: int) -> dict[int, Extent]:
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
    offsets = found.keys() | _ends(statements, found.keys())
    return found if all(_needs_no_extent(s, offsets) for s in statements) else {}


def _needs_no_extent(statement: Statement, offsets: Collection[int]) -> bool:
    """Whether no access computes with extents, but for where loops around the innermost one start."""
    innermost = set(statement.iterators[-1:])
    starts = (() if index.iterators() & innermost else offsets for index in access_indices(statement))
    plain = all(map(_is_plain, access_indices(statement), starts))
    return plain and statement.reduction is None


def names_of(freed: Mapping[int, Extent], statements: list[Statement]) -> dict[int, Index]:
    """What stands for the freed numbers, and for those that are sums of them as parts follow one another."""
    names = {number: Index.of(extent.symbol) for number, extent in freed.items()}
    for end, (start, extent) in _ends(statements, freed.keys()).items() if freed else ():
        names.setdefault(end, names.get(start, Index.of(start)) + names.get(extent, Index.of(extent)))
    return names


def _ends(statements: list[Statement], freed: Collection[int]) -> dict[int, tuple[int, int]]:
    """Where the parts of tensors that are written in parts end, each with its start and its extent."""
    found: dict[int, tuple[int, int]] = {}
    parts = {
        (offset_of(index), iterator.extent.constant)
        for s in statements
        for index in s.indices
        for iterator in index.iterators()
    }
    for start, extent in sorted((start, extent) for start, extent in parts if extent is not None):
        if start == 0 or start in freed or start in found:
            found.setdefault(start + extent, (start, extent))
    return found


def _is_plain(index: Index, offsets: Collection[int]) -> bool:
    """0, or one iterator, from one of the offsets on or from 0."""
    start = offset_of(index)
    plain = any(index - start == Index.of(iterator) for iterator in index.iterators())
    return index.is_zero or (plain and (start == 0 or start in offsets))


def offset_of(index: Index) -> int:
    """The number in a polynomial."""
    return sum(factor for monomial, factor in index.terms if not monomial)
