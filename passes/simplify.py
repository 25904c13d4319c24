"""Replaces expressions by cheaper ones of the same value and accuracy."""

from __future__ import annotations

from dataclasses import replace

from apollo_fuse.expressions import Apply, Block, BlockBuilder, Constant, Op, Position
from apollo_fuse.index import Index, non_negative

_SATURATED = 20.0  # tanh(softplus(x)) rounds to 1 from here on, in single and in half precision


def simplify(block: Block) -> Block:
    return decided(_without_softplus(block))


def decided(block: Block) -> Block:
    """The block without choices that the ranges of its iterators settle, and what only the others need."""
    builder = BlockBuilder()
    places: list[int] = []
    for item in block.instructions:
        if isinstance(item, Apply):
            operands = tuple(places[o] for o in item.operands)
            known = [builder.instructions[o] for o in operands]
            match item.op, known:
                case Op.EQ, [Position(index, _), Constant(int(number), _)] if (
                    answer := _is_zero(index - number)
                ) is not None:
                    places.append(builder.add(Constant(answer, item.dtype)))
                    continue
                case Op.SELECT, [Constant(answer, _), _, _]:
                    places.append(operands[1 if answer else 2])
                    continue
            item = replace(item, operands=operands)
        places.append(builder.add(item))
    return builder.build_at(places[-1])


def _is_zero(index: Index) -> bool | None:
    """None where that depends on the point."""
    if index.constant is not None:
        return index.is_zero
    return False if non_negative(index - 1) or non_negative(-index - 1) else None


def _without_softplus(block: Block) -> Block:
    """``tanh(softplus(x))``, the inner part of Mish, with one exponential instead of three functions.

    With ``e = exp(x)`` and ``n = e (e + 2)`` it is ``n / (n + 2)``: (1 + e)^2 - 1 over (1 + e)^2 + 1.
    """
    builder = BlockBuilder()
    places: list[int] = []
    for item in block.instructions:
        if not isinstance(item, Apply):
            places.append(builder.add(item))
            continue
        inner = block.instructions[item.operands[0]]
        dtype = item.dtype
        if item.op is Op.TANH and isinstance(inner, Apply) and inner.op is Op.SOFTPLUS and dtype.size <= 4:
            two = builder.add(Constant(2.0, dtype))
            limit = builder.add(Constant(_SATURATED, dtype))
            bounded = builder.add(Apply(Op.MIN, (places[inner.operands[0]], limit), dtype))
            e = builder.add(Apply(Op.EXP, (bounded,), dtype))
            sum_ = builder.add(Apply(Op.ADD, (e, two), dtype))
            n = builder.add(Apply(Op.MUL, (e, sum_), dtype))
            below = builder.add(Apply(Op.ADD, (n, two), dtype))
            places.append(builder.add(Apply(Op.DIV, (n, below), dtype)))
        else:
            places.append(builder.add(Apply(item.op, tuple(places[o] for o in item.operands), dtype)))
    return builder.build_at(places[-1])
