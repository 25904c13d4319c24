"""Solves the inputs of a micro-graph for its symbols: which extent is read where, what follows from it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from apollo_fuse.extents import base_symbols
from apollo_fuse.graph import Value
from apollo_fuse.index import Atom, Extreme, Formula, Index, Monomial, Quotient, Symbol
from apollo_fuse.passes.split_axes import access_indices
from apollo_fuse.scop import Derived, Extent, Statement

Required: TypeAlias = tuple[tuple[Index, Index], ...]
"""Pairs of extents that a run has to have alike."""
_Equation: TypeAlias = tuple[int, int, bool, Index]  # input, axis, whether it is an element, what is there


@dataclass(slots=True)
class Binding:
    """Solves the inputs for the symbols of a micro-graph; each equation that is used becomes an extent."""

    extents: list[Extent | Derived] = field(default_factory=list)
    known: dict[Symbol, Index] = field(default_factory=dict)
    products: dict[Monomial, Symbol] = field(default_factory=dict)

    def solve(self, equations: list[_Equation], wanted: Callable[[Symbol], bool]) -> None:
        """Takes equations that are linear in one wanted symbol which is not known yet."""
        progress = True
        while progress:
            progress = any([self._take(equation, wanted) for equation in equations])

    def _take(self, equation: _Equation, wanted: Callable[[Symbol], bool]) -> bool:
        place, axis, is_element, dim = equation
        unknown = [s for s in dim.symbols() if s not in self.known]
        if len(unknown) != 1 or not wanted(unknown[0]) or any(isinstance(a, Quotient) for a in dim.atoms()):
            return False
        factor = dim.coefficient(unknown[0])
        if factor is None:
            return False
        rest = (dim - factor * Index.of(unknown[0])).substitute(_as_values(self.known))
        divisor = factor.substitute(_as_values(self.known))
        symbol = self.fresh()
        if divisor.is_one and not is_element:
            self.known[unknown[0]] = Index.of(symbol) - rest
            self.extents.append(Extent(symbol, place, axis, Index.of(1), Index.of(0)))
        else:
            self.known[unknown[0]] = Index.of(symbol)
            self.extents.append(Extent(symbol, place, axis, divisor, rest, is_element))
        return True

    def derive(self, symbols: Iterable[Symbol]) -> None:
        """Computes symbols by their formulas where all is known that these need."""
        for symbol in sorted(symbols, key=lambda s: s.name):
            self._derive(symbol)

    def _derive(self, symbol: Symbol) -> bool:
        if symbol in self.known:
            return True
        if symbol.formula is None or not all(
            [self._derive(s) for s in _by_name(base_symbols(symbol.formula))]
        ):
            return False
        own = self.fresh()
        self.extents.append(Derived(own, self.formula(symbol.formula)))
        self.known[symbol] = Index.of(own)
        return True

    def formula(self, formula: Formula) -> Formula:
        values = _as_values(self.known)
        if isinstance(formula, Index):
            return formula.substitute(values)
        return Extreme(formula.greatest, formula.left.substitute(values), formula.right.substitute(values))

    def take_products(self, equations: list[_Equation]) -> None:
        """A dimension that is a product of symbols which nothing has on their own is one extent by itself."""
        for place, axis, _, dim in equations:
            if len(dim.terms) != 1 or any(s in self.known for s in dim.symbols()):
                continue
            monomial, factor_number = dim.terms[0]
            if len(monomial) > 1 and monomial not in self.products:
                symbol = self.fresh()
                self.products[monomial] = symbol
                self.known[symbol] = Index.of(symbol)
                self.extents.append(Extent(symbol, place, axis, Index.of(factor_number), Index.of(0)))

    def fresh(self) -> Symbol:
        return Symbol(f"n{len(self.extents)}")


def bind_extents(inputs: tuple[Value, ...], needed: frozenset[Symbol]) -> Binding:
    """Dimensions come first, then what follows from them, then what tensors of extents hold."""
    dims = [
        (place, axis, False, dim)
        for place, value in enumerate(inputs)
        for axis, dim in enumerate(value.shape)
    ]
    elements = [
        (place, axis, True, element)
        for place, value in enumerate(inputs)
        for axis, element in enumerate(value.elements or ())
        if element is not None
    ]
    binding = Binding()
    binding.solve(dims, lambda symbol: symbol.formula is None)
    binding.derive(needed)
    binding.solve(dims, lambda symbol: True)
    binding.derive(needed)
    if not needed <= binding.known.keys():
        binding.solve(elements, lambda symbol: symbol in needed and symbol.formula is None)
        binding.derive(needed)
        binding.solve([*dims, *elements], lambda symbol: symbol in needed)
        binding.derive(needed)
    binding.take_products(dims)
    return binding


def needed_symbols(
    statements: list[Statement], values: Iterable[Value], required: Required
) -> frozenset[Symbol]:
    """The symbols that code is to be written in, and those that their formulas need."""
    found: set[Symbol] = set()
    for statement in statements:
        for index in (*access_indices(statement), *(i.extent for i in statement.domain)):
            found |= index.symbols()
    for value in (*values, *(s.target for s in statements)):
        for dim in value.shape:
            found |= dim.symbols()
    for pair in required:
        found |= pair[0].symbols() | pair[1].symbols()
    pending = list(found)
    while pending:
        formula = pending.pop().formula
        more = base_symbols(formula) - found if formula is not None else frozenset()
        found |= more
        pending += more
    return frozenset(found)


def _by_name(symbols: Iterable[Symbol]) -> list[Symbol]:
    return sorted(symbols, key=lambda symbol: symbol.name)


def _as_values(known: Mapping[Symbol, Index]) -> dict[Atom, Index]:
    return {symbol: value for symbol, value in known.items()}
