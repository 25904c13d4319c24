"""Replaces expressions by cheaper ones of the same value and accuracy."""

from __future__ import annotations

from apollo_fuse.expressions import Apply, Block, BlockBuilder, Constant, Op

_SATURATED = 20.0  # tanh(softplus(x)) rounds to 1 from here on, in single and in half precision


def simplify(block: Block) -> Block:
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
