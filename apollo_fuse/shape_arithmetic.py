"""Integer arithmetic on extents, as ONNX's elementwise operators do it where a model computes shapes."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import TypeAlias

from apollo_fuse.extents import at_least_zero, greatest, least, quotient
from apollo_fuse.index import ONE, ZERO, Index

Elements: TypeAlias = Sequence[Index | None]
"""What a tensor of extents holds; None for elements that are not known."""


def decided(difference: Index, holds: Callable[[int, int], bool]) -> Index | None:
    """Whether a comparison with 0 holds, where one answer is proved."""
    if difference.constant is not None:
        return Index.of(int(holds(difference.constant, 0)))
    for sign, bound in ((1, difference - 1), (-1, -1 - difference)):
        if at_least_zero(bound):
            return Index.of(int(holds(sign, 0)))
    return None


def _truncated(a: Index, b: Index) -> Index | None:
    """Division as ONNX defines it for integers, towards 0."""
    if b.constant is not None and b.constant > 0 and at_least_zero(a):
        return quotient(a, b.constant)
    return a.exact_quotient(b)


def _remainder(a: Index, b: Index) -> Index | None:
    return None if b.constant is None or b.constant <= 0 else a - quotient(a, b.constant) * b


def _chosen(condition: Index | None, then: Index | None, otherwise: Index | None) -> Index | None:
    if then == otherwise or condition is None:
        return then if then == otherwise else None
    return then if condition.is_one else otherwise if condition.is_zero else None


def _both(a: Index | None, b: Index | None) -> Index | None:
    """Of truth values."""
    if any(x is not None and x.is_zero for x in (a, b)):
        return ZERO
    return a if a == b else None


def _not(a: Index | None) -> Index | None:
    return None if a is None else ONE - a


def _either(a: Index | None, b: Index | None) -> Index | None:
    return _not(_both(_not(a), _not(b)))


def _folded(function: Callable[[Index, Index], Index | None]) -> Callable[..., Index | None]:
    def fold(*operands: Index | None) -> Index | None:
        result = operands[0]
        for operand in operands[1:]:
            result = None if result is None or operand is None else function(result, operand)
        return result

    return fold


def _compared(holds: Callable[[int, int], bool]) -> Callable[..., Index | None]:
    return _folded(lambda a, b: decided(a - b, holds))


ELEMENTWISE: dict[str, Callable[..., Index | None]] = {
    "Add": _folded(operator.add),
    "Sum": _folded(operator.add),
    "Sub": _folded(operator.sub),
    "Mul": _folded(operator.mul),
    "Div": _folded(_truncated),
    "Mod": _folded(_remainder),
    "Min": _folded(least),
    "Max": _folded(greatest),
    "Equal": _compared(operator.eq),
    "Less": _compared(operator.lt),
    "Greater": _compared(operator.gt),
    "LessOrEqual": _compared(operator.le),
    "GreaterOrEqual": _compared(operator.ge),
    "Not": _not,
    "And": _both,
    "Or": _either,
    "Where": _chosen,
}
"""For each operator, the result in terms of the operands; None where no rule tells it."""


def aligned(operands: Sequence[Elements]) -> list[Elements] | None:
    """The elements broadcast to one length."""
    length = max(map(len, operands), default=0)
    if any(len(e) not in (1, length) for e in operands):
        return None
    return [e if len(e) == length else [e[0]] * length for e in operands]
