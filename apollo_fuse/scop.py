"""The polyhedral form of a micro-graph: statements with their iteration domains and access maps.

The names are canonical (``in0``, ``out0``, ``t0``, ``n0``, ``i0`` ...), so equal sub-graphs give
equal Scops whatever a model calls its tensors.
"""

from __future__ import annotations

import math
from collections.abc import Iterator as Generator
from dataclasses import dataclass

from apollo_fuse.expressions import Block, Reduction
from apollo_fuse.graph import Value
from apollo_fuse.index import Atom, Formula, Index, Indirect, Iterator, Maximum, Monomial, Quotient, Symbol

LEAST_SAMPLE = 37  # the least extent that a schedule is sought for


@dataclass(frozen=True, slots=True)
class Extent:
    """How a run-time extent is found: ``(shape of input[axis] - rest) / divisor``.

    With `is_element` it is the element at `axis` of the input, a tensor of extents, in place of its shape.
    """

    symbol: Symbol
    input: int
    axis: int
    divisor: Index
    rest: Index
    is_element: bool = False

    def __str__(self) -> str:
        source = "" if self.is_element else ".shape"
        return f"{self.symbol} = (in{self.input}{source}[{self.axis}] - {self.rest}) / {self.divisor}"


@dataclass(frozen=True, slots=True)
class Derived:
    """An extent that is computed from others."""

    symbol: Symbol
    formula: Formula

    def __str__(self) -> str:
        return f"{self.symbol} = {self.formula}"


@dataclass(frozen=True, slots=True)
class Statement:
    """``target[indices] = block``, for all iterators; combined over those of the reduction."""

    name: str
    target: Value
    indices: tuple[Index, ...]
    iterators: tuple[Iterator, ...]
    reduction: Reduction | None
    block: Block

    @property
    def domain(self) -> tuple[Iterator, ...]:
        return self.iterators + (self.reduction.iterators if self.reduction is not None else ())

    def __str__(self) -> str:
        loops = ", ".join(f"{i.name} < {i.extent}" for i in self.domain)
        over = (
            f" {self.reduction.op.value} over {', '.join(map(str, self.reduction.iterators))}"
            if self.reduction
            else ""
        )
        body = "\n".join("    " + line for line in str(self.block).splitlines())
        return f"{self.name}[{loops}] {self.target.name}[{', '.join(map(str, self.indices))}]{over}:\n{body}"


@dataclass(frozen=True, slots=True)
class Scop:
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    kept: tuple[Value, ...]  # intermediates that statements pass to each other inside a kernel
    statements: tuple[Statement, ...]
    extents: tuple[Extent | Derived, ...]
    temporaries: tuple[Value, ...] = ()  # intermediates that one kernel passes to the next, through memory
    required: tuple[tuple[Index, Index], ...] = ()  # extents that are equal wherever the model is valid

    def value(self, name: str) -> Value:
        return next(v for v in (*self.inputs, *self.outputs, *self.kept, *self.temporaries) if v.name == name)

    def __str__(self) -> str:
        lines = [f"extent {e}" for e in self.extents]
        lines += [f"require {a} = {b}" for a, b in self.required]
        roles = {"input": self.inputs, "output": self.outputs, "kept": self.kept}
        for role, values in (roles | {"temporary": self.temporaries}).items():
            lines += [f"{role} {value}" for value in values]
        return "\n".join([*lines, *map(str, self.statements)]) + "\n"


@dataclass(slots=True)
class Parameters:
    """Names for isl of what is constant while a kernel runs: one parameter for each product of extents."""

    names: dict[Monomial, str]

    def affine(self, index: Index) -> str | None:
        """The index in isl's notation, or None where it is not (quasi-)affine."""
        pieces: list[str] = []
        for monomial, coefficient in index.terms:
            if not monomial:
                pieces.append(str(coefficient))
            elif all(isinstance(atom, Symbol) for atom in monomial):
                name = self.names.setdefault(monomial, f"p{len(self.names)}")
                pieces.append(f"{coefficient}*{name}")
            elif len(monomial) == 1:
                (atom,) = monomial
                text = self._atom(atom)
                if text is None:
                    return None
                pieces.append(f"{coefficient}*{text}")
            else:
                return None
        return " + ".join(pieces) or "0"

    def _atom(self, atom: Atom) -> str | None:
        match atom:
            case Iterator(name, _):
                return name
            case Quotient(numerator, divisor):
                inner, number = self.affine(numerator), divisor.constant
                return None if inner is None or number is None else f"floor(({inner})/{number})"
            case Maximum(left, right):
                one, other = self.affine(left), self.affine(right)
                return None if one is None or other is None else f"max({one}, {other})"
            case Symbol() | Indirect():
                return None

    def declaration(self) -> str:
        return f"[{', '.join(self.names.values())}] -> "

    def sample(self) -> str:
        """One choice of the parameters as an isl set: primes, so that no extents seem to be related.

        Small ones, since isl's time grows with the numbers that it has to carry.
        """
        chosen = (f"{name} = {prime}" for name, prime in zip(self.names.values(), _primes(), strict=False))
        return f"{self.declaration()}{{ : {' and '.join(chosen) or '1 = 1'} }}"


def _primes() -> Generator[int]:
    """The primes from `LEAST_SAMPLE` on."""
    number = LEAST_SAMPLE
    while True:
        if all(number % divisor for divisor in range(2, math.isqrt(number) + 1)):
            yield number
        number += 2


def tensor_size(value: Value) -> Index:
    """Elements of a tensor."""
    total = Index.of(1)
    for extent in value.shape:
        total = total * extent
    return total
