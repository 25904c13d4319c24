"""Dimensions of onnx_ir, which are text to the inference package, as index polynomials and back.

The package computes with sympy, where every symbol is at least 1. What that would simplify wrongly for
empty tensors, minima and maxima above all, is shown to it under a name of its own.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import onnx_ir as ir
from onnx_shape_inference import ShapeInferenceContext

from apollo_fuse.extents import at_least_zero, base_symbols, quotient, substituted
from apollo_fuse.graph import Shape
from apollo_fuse.index import ONE, Extreme, Index, Symbol

_KEY = "apollo_fuse.dimensions"


@dataclass(slots=True)
class Dimensions:
    """What the names in the shapes of a model stand for, and which of them a valid run makes equal."""

    main: ir.Graph | None = None
    named: dict[str, Index] = field(default_factory=dict)
    equal: dict[Symbol, Index] = field(default_factory=dict)
    unknown: set[Symbol] = field(default_factory=set)  # elements of shape tensors that may hold anything
    _names: dict[Index, str] = field(default_factory=dict)
    _parsed: dict[str, Index] = field(default_factory=dict)

    @staticmethod
    def start(model: ir.Model) -> None:
        """Gives the graphs of a model an empty record in common."""
        record = Dimensions(model.graph)
        for graph in model.graphs():
            graph.meta[_KEY] = record

    @staticmethod
    def of(graph: ir.Graph | ir.Function | None) -> Dimensions:
        found = graph.meta.get(_KEY) if graph is not None else None
        return found if isinstance(found, Dimensions) else Dimensions()

    def index(self, dim: int | ir.SymbolicDim | str) -> Index:
        """The polynomial of a dimension; of one that is unknown and has no name there is none."""
        if isinstance(dim, int):
            return Index.of(dim)
        text = dim if isinstance(dim, str) else str(dim.value)
        if text not in self._parsed:
            self._parsed[text] = self._parse(text)
        return substituted(self._parsed[text], self.equal)

    def element(self, dim: int | ir.SymbolicDim | str) -> Index | None:
        """The polynomial of an element of a shape tensor, where it is one of extents."""
        if isinstance(dim, ir.SymbolicDim) and dim.value is None:
            return None
        index = self.index(dim)
        return None if self.unknown & index.symbols() else index

    def shape(self, shape: ir.Shape | None) -> Shape | None:
        if shape is None or any(isinstance(dim, ir.SymbolicDim) and dim.value is None for dim in shape):
            return None
        return tuple(map(self.index, shape))

    def dim(self, index: Index, context: ShapeInferenceContext) -> int | ir.SymbolicDim:
        """The index as the package takes it: polynomials of plain names as text, others as a new name."""
        if index.constant is not None:
            return index.constant
        if all(symbol.formula is None and symbol.name.isidentifier() for symbol in index.symbols()):
            return ir.SymbolicDim(str(index))
        if index not in self._names:
            new = str(context.new_symbolic_dim().value)
            self._names[index], self.named[new] = new, index
        return ir.SymbolicDim(self._names[index])

    def equate(self, left: Index, right: Index) -> None:
        """Takes note that every run in which the model is valid makes the two equal.

        A symbol gives way to a number, one with a formula to one without, and a later name to an earlier.
        """
        left, right = substituted(left, self.equal), substituted(right, self.equal)
        sides = [(_multiple(one), other) for one, other in ((left, right), (right, left))]
        found = [(*multiple, other) for multiple, other in sides if multiple is not None]
        for symbol, factor, other in sorted(found, key=lambda item: _newness(item[0]), reverse=True):
            value = other.exact_quotient(Index.of(factor))
            if value is not None and symbol not in _all_symbols(value):
                self.equal[symbol] = value
                return

    def _parse(self, text: str) -> Index:
        """A dimension's formula as a polynomial; what is beyond one becomes one symbol."""
        try:
            index = self._polynomial(ast.parse(text, mode="eval").body)
        except (SyntaxError, _NoPolynomial):
            return Index.of(Symbol(text))
        lone = [monomial for monomial, _ in index.terms if monomial]
        windows = any(isinstance(s.formula, Index) for s in index.symbols())
        if len(lone) == 1 and len(index.terms) == 2 and windows and text not in self.named:
            # the size of a window's result: only its value matters, not how it came about
            return Index.of(Symbol(f"({index})", index))
        return index

    def _polynomial(self, node: ast.expr) -> Index:
        numerator, denominator = self._fraction(node)
        found = numerator.exact_quotient(Index.of(denominator))
        if found is None:
            raise _NoPolynomial
        return found

    def _fraction(self, node: ast.expr) -> tuple[Index, int]:
        """Numerator and denominator of a formula of the package."""
        match node:
            case ast.Constant(value=int() as value):
                return Index.of(value), 1
            case ast.Name(id=name):
                return self.named.get(name, Index.of(Symbol(name))), 1
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                numerator, denominator = self._fraction(operand)
                return -numerator, denominator
            case ast.BinOp(left=left, op=ast.Pow(), right=ast.Constant(value=int() as power)):
                if not 0 < power < 9:
                    raise _NoPolynomial
                numerator, denominator = self._fraction(left)
                result = numerator
                for _ in range(power - 1):
                    result = result * numerator
                return result, denominator**power
            case ast.BinOp(left=left, op=op, right=right):
                return self._operation(op, self._fraction(left), self._fraction(right))
            case ast.Call(func=ast.Name(id="floor"), args=[argument]):
                return quotient(*self._fraction(argument)), 1
            case _:
                raise _NoPolynomial

    def _operation(
        self, op: ast.operator, left: tuple[Index, int], right: tuple[Index, int]
    ) -> tuple[Index, int]:
        (a, below_a), (b, below_b) = left, right
        match op:
            case ast.Add():
                return a * below_b + b * below_a, below_a * below_b
            case ast.Sub():
                return a * below_b - b * below_a, below_a * below_b
            case ast.Mult():
                return a * b, below_a * below_b
            case ast.Div() if below_b == 1 and b.constant is not None and b.constant > 0:
                return a, below_a * b.constant
            case _:
                raise _NoPolynomial


class _NoPolynomial(Exception):
    pass


def _multiple(index: Index) -> tuple[Symbol, int] | None:
    """A symbol and the number that it is multiplied with, where an index is no more than that."""
    match index:
        case Index(terms=(((Symbol() as symbol,), factor),)):
            return symbol, factor
        case _:
            return None


def _newness(symbol: Symbol) -> tuple[bool, int, str]:
    return symbol.formula is not None, len(symbol.name), symbol.name


def _lone(index: Index) -> Symbol | None:
    found = _multiple(index)
    return None if found is None or found[1] != 1 else found[0]


def _all_symbols(index: Index) -> set[Symbol]:
    """The symbols of an index and of the formulas in it."""
    found: set[Symbol] = set()
    pending = list(index.symbols())
    while pending:
        symbol = pending.pop()
        if symbol not in found:
            found.add(symbol)
            pending += base_symbols(symbol.formula) if symbol.formula is not None else ()
    return found


def wide_extents(shapes: Sequence[Shape], axis: int) -> list[Index]:
    """The different extents along an axis, counted from the last, less those that are always 1."""
    return list(dict.fromkeys(s[axis] for s in shapes if len(s) >= -axis and not s[axis].is_one))


def broadcast_extent(wide: Sequence[Index]) -> Index | None:
    """What different extents, none of them the number 1, are broadcast to; None where that is not known.

    Of several it is one which never is 1 (an even number, for one): all others have it unless they are 1.
    """
    if len(wide) <= 1:
        return wide[0] if wide else ONE
    return next((extent for extent in wide if never_one(extent)), None)


def never_one(extent: Index) -> bool:
    """Whether an extent is proved to be another number than 1."""
    common = math.gcd(*(factor for _, factor in extent.terms))
    return common != 1 or at_least_zero(extent - 2)


def implied_equal(left: Index, right: Index) -> bool:
    """Whether two different extents, neither the number 1, can only be broadcast where they agree.

    So do two of which neither can be 1. Of ``min(k, s)`` beside ``s``: where ``s > k >= 2`` neither is 1, and
    the model is not valid.
    """
    if never_one(left) and never_one(right):
        return True
    for one, other in ((left, right), (right, left)):
        symbol = _lone(one)
        if symbol is not None and isinstance(symbol.formula, Extreme) and not symbol.formula.greatest:
            sides = [symbol.formula.left, symbol.formula.right]
            if other in sides:
                bound = sides[1 - sides.index(other)].constant
                if bound is not None and bound >= 2:
                    return True
    return False
