"""Integer index arithmetic: polynomials over extents and loop iterators, closed under floor division.

Shapes, strides, offsets and access maps are all values of one type, `Index`: a sum of integer
multiples of monomials over atoms.  Equal polynomials are equal values, so "these two extents are
the same" is a comparison, and ``(i // w) * w + i % w`` cancels to ``i`` because a remainder is
never stored, only ``i - w * (i // w)``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeAlias, Union


@dataclass(frozen=True, slots=True)
class Symbol:
    """An extent that is known at run time only; at least 0.

    Arithmetic sees a name. `formula` says how it comes out of other extents, where that is known.
    """

    name: str
    formula: Formula | None = field(default=None, compare=False, repr=False)

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, slots=True)
class Iterator:
    """A loop iterator, ``0 <= iterator < extent``. Names are unique within a kernel."""

    name: str
    extent: Index

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, slots=True)
class Quotient:
    """``floor(numerator / divisor)`` that no rule could simplify."""

    numerator: Index
    divisor: Index

    def __str__(self) -> str:
        return f"floord({self.numerator}, {self.divisor})"


@dataclass(frozen=True, slots=True)
class Maximum:
    """The greater of two indices, where no rule tells which one it is."""

    left: Index
    right: Index

    def __str__(self) -> str:
        return f"max({self.left}, {self.right})"


@dataclass(frozen=True, slots=True)
class Indirect:
    """An index read from an integer tensor; negative values count from the end of `extent`."""

    tensor: str
    indices: tuple[Index, ...]
    extent: Index

    def __str__(self) -> str:
        return f"{self.tensor}[{', '.join(map(str, self.indices))}]"


@dataclass(frozen=True, slots=True)
class Extreme:
    """The least or the greatest of two indices."""

    greatest: bool
    left: Index
    right: Index

    def __str__(self) -> str:
        return f"{'max' if self.greatest else 'min'}({self.left}, {self.right})"


Formula: TypeAlias = Union["Index", Extreme]
Atom: TypeAlias = Symbol | Iterator | Quotient | Maximum | Indirect
Monomial: TypeAlias = tuple[Atom, ...]
IndexLike: TypeAlias = Union["Index", int]


def _order(monomial: Monomial) -> tuple[int, str]:
    return (-len(monomial), "*".join(map(str, monomial)))


@dataclass(frozen=True, eq=False)
class Index:
    """A polynomial with integer coefficients; `terms` is canonical: sorted, no zero coefficients."""

    terms: tuple[tuple[Monomial, int], ...]

    @staticmethod
    def of(value: IndexLike | Atom) -> Index:
        if isinstance(value, Index):
            return value
        if isinstance(value, int):
            return Index(()) if value == 0 else Index((((), value),))
        return Index((((value,), 1),))

    @staticmethod
    def _collect(terms: Iterable[tuple[Monomial, int]]) -> Index:
        total: dict[Monomial, int] = {}
        for monomial, coefficient in terms:
            total[monomial] = total.get(monomial, 0) + coefficient
        kept = [item for item in total.items() if item[1] != 0]
        kept.sort(key=lambda item: _order(item[0]))
        return Index(tuple(kept))

    @cached_property
    def _hash(self) -> int:
        return hash(self.terms)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Index) and self._hash == other._hash and self.terms == other.terms

    @property
    def constant(self) -> int | None:
        """The value when the polynomial is a number, else None."""
        if not self.terms:
            return 0
        if len(self.terms) == 1 and not self.terms[0][0]:
            return self.terms[0][1]
        return None

    @property
    def is_zero(self) -> bool:
        return not self.terms

    @property
    def is_one(self) -> bool:
        return self.constant == 1

    def __add__(self, other: IndexLike) -> Index:
        return Index._collect((*self.terms, *Index.of(other).terms))

    def __neg__(self) -> Index:
        return Index(tuple((monomial, -coefficient) for monomial, coefficient in self.terms))

    def __sub__(self, other: IndexLike) -> Index:
        return self + -Index.of(other)

    def __mul__(self, other: IndexLike) -> Index:
        right = Index.of(other)
        return Index._collect(
            (tuple(sorted(a + b, key=str)), x * y) for a, x in self.terms for b, y in right.terms
        )

    __radd__ = __add__
    __rmul__ = __mul__

    def __rsub__(self, other: IndexLike) -> Index:
        return Index.of(other) - self

    def __floordiv__(self, other: IndexLike) -> Index:
        divisor = Index.of(other)
        if divisor.is_one:
            return self
        if self.constant is not None and divisor.constant:
            return Index.of(self.constant // divisor.constant)
        whole, rest = self.divide(divisor)
        if rest.is_zero or _within(rest, divisor):
            return whole
        nested = _nested_quotient(rest, divisor)
        return whole + (Index.of(Quotient(rest, divisor)) if nested is None else nested)

    def __mod__(self, other: IndexLike) -> Index:
        return self - (self // other) * other

    def divide(self, divisor: Index) -> tuple[Index, Index]:
        """``(q, r)`` with ``self == q * divisor + r``: the terms that divide exactly, and the rest."""
        if len(divisor.terms) != 1:
            return (Index.of(1), Index.of(0)) if self == divisor else (Index.of(0), self)
        (by, factor) = divisor.terms[0]
        whole: list[tuple[Monomial, int]] = []
        rest: list[tuple[Monomial, int]] = []
        for monomial, coefficient in self.terms:
            left = _remove(monomial, by)
            if left is None:
                rest.append((monomial, coefficient))
            elif coefficient % factor == 0:
                whole.append((left, coefficient // factor))
            elif by:
                rest.append((monomial, coefficient))
            else:
                whole.append((left, coefficient // factor))
                rest.append((monomial, coefficient % factor))
        return Index._collect(whole), Index._collect(rest)

    def exact_quotient(self, divisor: Index) -> Index | None:
        """``self / divisor`` when it divides without a rest for all values, else None."""
        if divisor.is_zero:
            return None
        whole, rest = self.divide(divisor)
        return whole if rest.is_zero else None

    def atoms(self) -> frozenset[Atom]:
        """Every atom, those inside quotients and indirect reads too."""
        found: set[Atom] = set()
        for monomial, _ in self.terms:
            for atom in monomial:
                found.add(atom)
                for part in _parts(atom):
                    found |= part.atoms()
        return frozenset(found)

    def iterators(self) -> frozenset[Iterator]:
        return frozenset(atom for atom in self.atoms() if isinstance(atom, Iterator))

    def symbols(self) -> frozenset[Symbol]:
        return frozenset(atom for atom in self.atoms() if isinstance(atom, Symbol))

    def coefficient(self, atom: Atom) -> Index | None:
        """The factor of `atom` where the polynomial is linear in it, else None."""
        linear: list[tuple[Monomial, int]] = []
        for monomial, coefficient in self.terms:
            if monomial.count(atom) == 1:
                linear.append((tuple(a for a in monomial if a != atom), coefficient))
            elif atom in monomial:
                return None
        factor = Index._collect(linear)
        rest = self - factor * Index.of(atom)
        return None if atom in rest.atoms() or atom in factor.atoms() else factor

    def substitute(self, values: Mapping[Atom, Index]) -> Index:
        """Replaces atoms by polynomials, and simplifies again."""
        if not values or not self.terms:
            return self
        return self.rewrite(lambda atom: values.get(atom))

    def rewrite(self, replace: Callable[[Atom], Index | None]) -> Index:
        """Rebuilds the polynomial with `replace(atom)` for each atom where that is not None."""
        total = Index.of(0)
        for monomial, coefficient in self.terms:
            product = Index.of(coefficient)
            for atom in monomial:
                product = product * _rewrite_atom(atom, replace)
            total = total + product
        return total

    def __str__(self) -> str:
        if not self.terms:
            return "0"
        pieces: list[str] = []
        for monomial, coefficient in self.terms:
            factors = [str(atom) for atom in monomial]
            size = abs(coefficient)
            if size != 1 or not factors:
                factors.insert(0, str(size))
            sign = "-" if coefficient < 0 else "+"
            pieces.append(f"{sign} {'*'.join(factors)}")
        text = " ".join(pieces)
        return text[2:] if text.startswith("+ ") else "-" + text[2:]

    __repr__ = __str__

    def written(self, atom: Callable[[Atom], str]) -> str:
        """As an expression of a programming language, in which atoms are written as `atom` does."""
        if not self.terms:
            return "0"
        pieces: list[str] = []
        for monomial, coefficient in self.terms:
            factors = list(map(atom, monomial))
            if abs(coefficient) != 1 or not factors:
                factors.append(str(abs(coefficient)))
            pieces.append(("- " if coefficient < 0 else "+ ") + " * ".join(factors))
        text = " ".join(pieces)
        return text[2:] if text.startswith("+ ") else "-" + text[2:]


ZERO = Index.of(0)
ONE = Index.of(1)


def product(factors: Iterable[Index]) -> Index:
    return math.prod(factors, start=ONE)


def linearise(indices: tuple[Index, ...], shape: tuple[Index, ...]) -> Index:
    """The row-major offset of an element, in elements."""
    offset = ZERO
    for index, extent in zip(indices, shape, strict=True):
        offset = offset * extent + index
    return offset


def delinearise(offset: Index, shape: tuple[Index, ...]) -> tuple[Index, ...]:
    """The indices of the element at a row-major offset that lies within the shape."""
    indices: list[Index] = []
    for extent in reversed(shape[1:]):
        quotient = offset // extent
        indices.append(offset - quotient * extent)
        offset = quotient
    return (*((offset,) if shape else ()), *reversed(indices))


def divides_a_sum(index: Index) -> bool:
    """Whether some quotient is of more than an iterator, so that splitting a loop would not make it plain."""
    numerators = (atom.numerator for atom in index.atoms() if isinstance(atom, Quotient))
    return any(n.iterators() and all(n != Index.of(i) for i in n.iterators()) for n in numerators)


def mixes_axes(index: Index) -> bool:
    """Whether it joins quotients of several axes.

    So do those of a view whose axes begin and end within one another's: blocks of channels, and the image
    that they are taken for. Where one extent divides the next, all axes could be split until no quotient is
    left: few loops would become many.
    """
    parted = (atom.numerator.iterators() for atom in index.atoms() if isinstance(atom, Quotient))
    return len(set().union(*parted)) > 1


def maximum(left: Index, right: Index) -> Index:
    if non_negative(left - right):
        return left
    if non_negative(right - left):
        return right
    return Index.of(Maximum(left, right))


def minimum(left: Index, right: Index) -> Index:
    return -maximum(-left, -right)


def clamped(index: Index, extent: Index) -> Index:
    """The index of the axis that is nearest to `index`, for an axis that is not empty."""
    return minimum(maximum(index, ZERO), extent - 1)


def unclamped(index: Index, along: Iterator) -> Index:
    """The index as it is where no choice holds it back from following the iterator."""
    for atom in index.atoms():
        if isinstance(atom, Maximum):
            left, right = (along in side.atoms() for side in (atom.left, atom.right))
            if left != right:
                return unclamped(index.substitute({atom: atom.left if left else atom.right}), along)
    return index


def non_negative(value: Index) -> bool:
    """True when the polynomial is >= 0 for every value its atoms can take."""
    return _least(value) is not None


def _least(value: Index) -> Index | None:
    """A lower bound of `value` over the ranges of its iterators, if that is >= 0."""
    bound = _bound(value, greatest=False)
    if bound is None:
        return None
    signs_known = all(c >= 0 and all(isinstance(a, (Symbol, Iterator)) for a in m) for m, c in bound.terms)
    return bound if signs_known else None


def _bound(value: Index, greatest: bool) -> Index | None:
    """`value` with each quotient, then each iterator, at the end of its range that makes it extreme."""
    for atom in sorted((a for m, _ in value.terms for a in m if isinstance(a, Quotient)), key=str):
        rising = _is_rising(value, atom)
        if rising is None or not atom.divisor.constant or atom.divisor.constant < 0:
            return None
        end = _bound(atom.numerator, greatest if rising else not greatest)
        if end is None:
            return None
        value = value.substitute({atom: end // atom.divisor})
    for iterator in sorted(value.iterators(), key=str):
        rising = _is_rising(value, iterator)
        if rising is None:
            return None
        value = value.substitute({iterator: iterator.extent - 1 if rising == greatest else ZERO})
    return value


def _is_rising(value: Index, atom: Atom) -> bool | None:
    """Whether the value grows with the atom; None where that is not known."""
    factor = value.coefficient(atom)
    if factor is None:
        return None
    if all(c >= 0 for _, c in factor.terms):
        return True
    return False if all(c <= 0 for _, c in factor.terms) else None


def _nested_quotient(value: Index, divisor: Index) -> Index | None:
    """``floor((g*a + b) / (g*d))`` as ``floor(a / d)``, where ``0 <= b < g``: rows of a shape within rows."""
    if len(divisor.terms) != 1:
        return None
    (by, factor) = divisor.terms[0]
    for monomial, coefficient in value.terms:
        common = math.gcd(coefficient, factor)
        if _remove(monomial, by) is None or common in (0, factor) or (common == 1 and not by):
            continue
        unit = Index(((by, common),))
        whole, rest = value.divide(unit)
        if _within(rest, unit):
            return whole // (factor // common)
    return None


def _within(value: Index, extent: Index) -> bool:
    return non_negative(value) and non_negative(extent - 1 - value)


def _remove(monomial: Monomial, factor: Monomial) -> Monomial | None:
    left = list(monomial)
    for atom in factor:
        if atom not in left:
            return None
        left.remove(atom)
    return tuple(left)


def _parts(atom: Atom) -> tuple[Index, ...]:
    """The indices that an atom is made of."""
    match atom:
        case Symbol() | Iterator():
            return ()
        case Quotient(numerator, divisor):
            return (numerator, divisor)
        case Maximum(left, right):
            return (left, right)
        case Indirect(_, indices, _):
            return indices


def _rewrite_atom(atom: Atom, replace: Callable[[Atom], Index | None]) -> Index:
    found = replace(atom)
    if found is not None:
        return found
    match atom:
        case Symbol() | Iterator():
            return Index.of(atom)
        case Quotient(numerator, divisor):
            return numerator.rewrite(replace) // divisor.rewrite(replace)
        case Maximum(left, right):
            return maximum(left.rewrite(replace), right.rewrite(replace))
        case Indirect(tensor, indices, extent):
            rewritten = tuple(index.rewrite(replace) for index in indices)
            return Index.of(Indirect(tensor, rewritten, extent.rewrite(replace)))
