"""Indices as numbers, once the extents are known: their values, strides, spans and how many they take."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from apollo_fuse.extents import evaluate
from apollo_fuse.index import Atom, Index, Indirect, Iterator, Maximum, Quotient, Symbol

Sizes = Mapping[Symbol, int]


@dataclass(slots=True)
class Numbers:
    """Indices as numbers: extents are known, iterators are not."""

    sizes: Sizes
    _extents: dict[Iterator, int] = field(default_factory=dict)
    _values: dict[Symbol, int] = field(default_factory=dict)

    def symbol(self, symbol: Symbol) -> int:
        found = self._values.get(symbol)
        if found is None:
            known = self.sizes.get(symbol)
            found = known if known is not None else evaluate(Index.of(symbol), self.sizes)
            self._values[symbol] = found = 1 if found is None else found
        return found

    def extent(self, iterator: Iterator) -> int:
        found = self._extents.get(iterator)
        if found is None:
            found = self._extents[iterator] = max(0, self.number(iterator.extent))
        return found

    def number(self, index: Index, iterator: int = 0) -> int:
        """The index with every iterator at `iterator`."""
        total = 0
        for monomial, coefficient in index.terms:
            product = coefficient
            for atom in monomial:
                product *= self._atom(atom, iterator)
            total += product
        return total

    def _atom(self, atom: Atom, iterator: int) -> int:
        match atom:
            case Symbol():
                return self.symbol(atom)
            case Iterator():
                return iterator
            case Quotient(numerator, divisor):
                by = self.number(divisor, iterator)
                return self.number(numerator, iterator) // by if by else 0
            case Maximum(left, right):
                return max(self.number(left, iterator), self.number(right, iterator))
            case Indirect():
                return 0

    def strides(self, index: Index) -> dict[Atom, int]:
        """The distance that a step of each atom other than an extent makes."""
        found: dict[Atom, int] = {}
        for monomial, coefficient in index.terms:
            moving = [atom for atom in monomial if not isinstance(atom, Symbol)]
            if not moving:
                continue
            for atom in monomial:
                if isinstance(atom, Symbol):
                    coefficient *= self.symbol(atom)
            for atom in moving:
                found[atom] = found.get(atom, 0) + coefficient
        return {atom: stride for atom, stride in found.items() if stride}

    def values(self, atom: Atom, loops: frozenset[Iterator]) -> int:
        """How many values the atom takes in these loops."""
        match atom:
            case Symbol():
                return 1
            case Iterator():
                return max(1, self.extent(atom)) if atom in loops else 1
            case Quotient(numerator, divisor):
                by = max(1, self.number(divisor))
                return 1 + (self.span(self.strides(numerator), loops) - 1) // by
            case Maximum(left, right):
                return max(self.span(self.strides(x), loops) for x in (left, right))
            case Indirect(_, indices, extent):
                reads = math.prod(max(1, self.extent(i)) for x in indices for i in x.iterators() & loops)
                return max(1, min(reads, self.number(extent)))

    def span(self, strides: Mapping[Atom, int], loops: frozenset[Iterator]) -> int:
        """Elements from the first to the last that is touched."""
        return 1 + sum(abs(stride) * (self.values(atom, loops) - 1) for atom, stride in strides.items())
