"""Extents that are no polynomials of others: quotients, minima and maxima, each a symbol with its formula.

To all arithmetic such an extent is one name, so that equal ones cancel and kernels stay simple; the formula
is computed once a run, and only where no input has the extent as a dimension.
"""

from __future__ import annotations

from collections.abc import Mapping

from apollo_fuse.index import Atom, Extreme, Formula, Index, Quotient, Symbol, non_negative

_DEPTH = 4  # nested formulas that a proof looks into


def quotient(numerator: Index, divisor: int) -> Index:
    """``floor(numerator / divisor)`` for a divisor above 0."""
    whole, rest = numerator.divide(Index.of(divisor))
    if rest.constant is not None:
        return whole
    # what `divide` leaves has coefficients from 1 to divisor - 1, so the symbol is at least 0
    formula = Index.of(Quotient(rest, Index.of(divisor)))
    return whole + Index.of(Symbol(f"floor(({rest}) / {divisor})", formula))


def least(left: Index, right: Index) -> Index | None:
    """The smaller of two extents; None where it might be below 0."""
    if at_least_zero(right - left):
        return left
    if at_least_zero(left - right):
        return right
    if at_least_zero(left) and at_least_zero(right):
        return _extreme(False, left, right)
    return None


def greatest(left: Index, right: Index) -> Index | None:
    """The larger of two indices; None where it might be below 0."""
    if at_least_zero(right - left):
        return right
    if at_least_zero(left - right):
        return left
    if at_least_zero(left) or at_least_zero(right):
        return _extreme(True, left, right)
    return None


def is_empty(extent: Index) -> Index:
    """1 where an axis has no elements, else 0."""
    found = greatest(Index.of(0), 1 - extent)
    assert found is not None, "0 is not below 0"
    return found


def _extreme(greatest: bool, left: Index, right: Index) -> Index:
    first, second = sorted((left, right), key=str)
    formula = Extreme(greatest, first, second)
    return Index.of(Symbol(str(formula), formula))


def sliced(extent: Index, start: Index, end: Index | None, step: int) -> tuple[Index, Index] | None:
    """``(first index, length)`` of a slice of an axis as ONNX clamps it; None where that is not expressible.

    `end` is None for "to the far end". What is said of the first index holds where the slice is not empty.
    """
    if step < 0:
        backwards = end is None and start == Index.of(-1)
        return (extent - 1, quotient(extent - step - 1, -step)) if backwards else None
    begin = _from_front(extent, start)
    beyond = extent if end is None else _from_front(extent, end)
    if begin is None or beyond is None:
        return None
    last = extent if end is None else least(beyond, extent)
    if last is None:
        return None
    length = greatest(Index.of(0), quotient(last - begin + (step - 1), step))
    return None if length is None else (begin, length)


def _from_front(extent: Index, place: Index) -> Index | None:
    """A place counted from the front; it may lie beyond the end."""
    if at_least_zero(place):
        return place
    return greatest(Index.of(0), extent + place) if at_least_zero(-1 - place) else None


def at_least_zero(index: Index) -> bool:
    """Whether the polynomial is proved to be >= 0, looking into the formulas of its symbols."""
    return _proved(index, _DEPTH)


def _proved(index: Index, depth: int) -> bool:
    if non_negative(index):
        return True
    if depth == 0:
        return False
    symbols = [s for s in index.symbols() if s.formula is not None]
    return any(
        all(_proved(bound, depth - 1) for bound in bounds) for s in symbols for bounds in _lowered(index, s)
    )


def _lowered(index: Index, symbol: Symbol) -> list[list[Index]]:
    """Sets of indices, with bounds in the symbol's place: where all of one set are >= 0, so is the index."""
    factor = index.coefficient(symbol)
    if factor is None:
        return []
    rises, falls = non_negative(factor), non_negative(-factor)
    rest = index - factor * Index.of(symbol)
    match symbol.formula:
        case Extreme(above, left, right) if rises or falls:
            bounds = [rest + factor * left, rest + factor * right]
            return [bounds[:1], bounds[1:]] if above == rises else [bounds]
        case Index(terms=(((Quotient(numerator, divisor),), 1),)) if falls:
            return [[rest * divisor + factor * numerator]]
        case _:
            return []


def substituted(index: Index, values: Mapping[Symbol, Index]) -> Index:
    """The index with symbols replaced, in formulas too, and simplified again."""
    if not values:
        return index

    def replace(atom: Atom) -> Index | None:
        if not isinstance(atom, Symbol):
            return None
        if atom in values:
            return substituted(values[atom], values)
        return None if atom.formula is None else _simplified(atom.formula, values)

    return index.rewrite(replace)


def _simplified(formula: Formula, values: Mapping[Symbol, Index]) -> Index | None:
    """A formula with symbols replaced, or None where nothing changes."""
    match formula:
        case Extreme(above, left, right):
            new = substituted(left, values), substituted(right, values)
            return None if new == (left, right) else (greatest(*new) if above else least(*new))
        case Index(terms=(((Quotient(numerator, divisor),), 1),)) if divisor.constant:
            inner = substituted(numerator, values)
            return None if inner == numerator else quotient(inner, divisor.constant)
        case _:
            return None


def base_symbols(formula: Formula) -> frozenset[Symbol]:
    """The symbols that a formula is computed from."""
    parts = (formula.left, formula.right) if isinstance(formula, Extreme) else (formula,)
    return frozenset(symbol for part in parts for symbol in part.symbols())


def evaluate(index: Index, sizes: Mapping[Symbol, int]) -> int | None:
    """The number that an index comes to; None where an extent is neither in `sizes` nor follows from it."""
    values: dict[Atom, Index] = {}
    for symbol in index.symbols():
        number = sizes.get(symbol)
        if number is None and symbol.formula is not None:
            number = evaluate_formula(symbol.formula, sizes)
        if number is None:
            return None
        values[symbol] = Index.of(number)
    return index.substitute(values).constant


def evaluate_formula(formula: Formula, sizes: Mapping[Symbol, int]) -> int | None:
    """The number that a formula comes to, likewise."""
    if isinstance(formula, Index):
        return evaluate(formula, sizes)
    left, right = evaluate(formula.left, sizes), evaluate(formula.right, sizes)
    if left is None or right is None:
        return None
    return max(left, right) if formula.greatest else min(left, right)
