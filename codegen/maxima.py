"""Finds the chains of maxima and minima in a block: what is combined of more than two values in one go.

A maximum passes a NaN on.  In a chain each one would have to, and that costs as much as the maxima.  So
values are compared as if all were numbers, one instruction each, and once for the chain it is asked whether
any was none, of two values at a time.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from apollo_fuse.expressions import Apply, Block, Constant, Op

_FEWEST = 3  # values from which on looking for NaNs beside them takes fewer instructions


@dataclass(frozen=True, slots=True)
class Chains:
    """`inner` are the places whose results are wanted by a chain alone; `values`, for the last place of each,
    what it combines, other than constants."""

    inner: frozenset[int]
    values: dict[int, tuple[int, ...]]


def chains(block: Block) -> Chains:
    items = block.instructions
    uses = Counter(o for item in items if isinstance(item, Apply) for o in item.operands)
    uses[len(items) - 1] += 1
    parts: dict[int, tuple[int, ...]] = {}  # the values that each maximum combines, by its place
    inside: dict[int, tuple[int, ...]] = {}  # the maxima within it
    for place, item in enumerate(items):
        if not isinstance(item, Apply) or item.op not in (Op.MAX, Op.MIN) or not item.dtype.is_float:
            continue
        values, within = list[int](), list[int]()
        for operand in dict.fromkeys(item.operands):
            own = items[operand]
            if operand in parts and isinstance(own, Apply) and own.op is item.op and uses[operand] == 1:
                values += parts.pop(operand)
                within += (*inside.pop(operand), operand)
            elif not (isinstance(own, Constant) and own.value == own.value):
                values.append(operand)
        parts[place], inside[place] = tuple(dict.fromkeys(values)), tuple(within)
    long = {place: values for place, values in parts.items() if len(values) >= _FEWEST}
    return Chains(frozenset(inner for place in long for inner in inside[place]), long)
