"""Divides once a row and multiplies at each point, where a reduction's result is the divisor.

A division costs several multiplications on every machine, and the last step of a softmax or a
normalisation divides a whole row by one number.  The product with the reciprocal differs from the
quotient by one unit in the last place at most, less than the sum it follows is uncertain by;
kernels without a reduction keep their divisions.
"""

from __future__ import annotations

from dataclasses import replace

from apollo_fuse.expressions import Apply, Block, BlockBuilder, Constant, Load, Op
from apollo_fuse.index import Iterator
from apollo_fuse.passes.nests import Nest, Nests


def invert_divisors(nests: Nests) -> Nests:
    placed = dict(nests.placed)
    if not any(p.reduced for p in placed.values()):
        return nests
    for name, loop in _innermost(nests.body, None).items():
        if loop is not None:
            placed[name] = replace(placed[name], block=_inverted(placed[name].block, loop))
    return replace(nests, placed=placed)


def _innermost(body: tuple[Nest, ...], around: Iterator | None) -> dict[str, Iterator | None]:
    found: dict[str, Iterator | None] = {}
    for nest in body:
        if nest.iterator is None:
            found[nest.statement] = around
        else:
            found |= _innermost(nest.children, nest.iterator)
    return found


def _inverted(block: Block, loop: Iterator) -> Block:
    builder = BlockBuilder()
    places: list[int] = []
    varies: list[bool] = []
    for item in block.instructions:
        match item:
            case Apply(Op.DIV, (a, b), dtype) if (
                dtype.is_float and varies[a] and not varies[b] and _computed(block, b)
            ):
                one = builder.add(Constant(1.0, dtype))
                inverse = builder.add(Apply(Op.DIV, (one, places[b]), dtype))
                places.append(builder.add(Apply(Op.MUL, (places[a], inverse), dtype)))
                varies.append(True)
            case Apply(op, operands, dtype):
                places.append(builder.add(Apply(op, tuple(places[o] for o in operands), dtype)))
                varies.append(any(varies[o] for o in operands))
            case Load():
                places.append(builder.add(item))
                varies.append(loop in item.indices[0].iterators())
            case _:
                places.append(builder.add(item))
                varies.append(False)
    return builder.build_at(places[-1])


def _computed(block: Block, place: int) -> bool:
    """Whether the divisor is more than a number written in the model, which divides exactly as it says."""
    return not isinstance(block.instructions[place], Constant)
