"""Operators of transformers: rotary positions, embeddings, and the gated forms of activations and norms."""

from __future__ import annotations

from collections.abc import Callable

from apollo_fuse.dtypes import DType
from apollo_fuse.expressions import Op
from apollo_fuse.graph import Shape
from apollo_fuse.index import ONE, ZERO, Index, Indirect, clamped, minimum
from apollo_fuse.operators.indexing import index_tensor
from apollo_fuse.operators.movement import permuted
from apollo_fuse.operators.opener import Opener, Tensor, Unsupported, floating
from apollo_fuse.operators.quantized import MICROSOFT
from apollo_fuse.operators.reductions import divided_by_root_mean_square, normalise, widened
from apollo_fuse.operators.registry import operator

_TWO = Index.of(2)


@operator("RotaryEmbedding")
def rotary_embedding(o: Opener) -> Tensor:
    """Angles are those of each token, or of the position that it has."""
    x = _heads(o, o.integer("num_heads", 0))
    if not o.has(3):
        return _rotated(o, x, *(_beside(o.tensor(place), x, lambda at: at) for place in (1, 2)))
    return _rotated(o, x, *(_of_positions(o, x, place, 3) for place in (1, 2)))


@operator("RotaryEmbedding", domain=MICROSOFT)
def microsoft_rotary_embedding(o: Opener) -> Tensor:
    if o.integer("is_packed_batching", 0) or o.number("scale", 1.0) != 1.0:
        raise Unsupported("packed batches, or a scale")
    width = o.tensor(2).shape[1]
    heads = o.integer("num_heads", 0)
    if not heads and len(o.tensor(0).shape) == 3:
        found = o.tensor(0).shape[2].exact_quotient(width * 2)
        if found is None or found.constant is None:
            raise Unsupported(f"heads of {width * 2} in {o.tensor(0).shape[2]} elements")
        heads = found.constant
    x = _heads(o, heads)
    return _rotated(o, x, *(_of_positions(o, x, place, 1) for place in (2, 3)))


def _heads(o: Opener, count: int) -> Tensor:
    """The operand as batch, sequence, heads and what is in a head."""
    x = floating(o.tensor(0))
    if len(x.shape) == 4:
        return permuted(x, (0, 2, 1, 3))
    batch, sequence, hidden = x.shape
    size = hidden.exact_quotient(Index.of(count)) if count else None
    if size is None:
        raise Unsupported(f"{count} heads in {hidden} elements")
    return x.reshape((batch, sequence, Index.of(count), size))


def _beside(table: Tensor, x: Tensor, access: Callable[[Shape], Shape]) -> Tensor:
    """What `access` makes of batch, sequence and place, for all heads."""
    batch, sequence, _, _ = x.shape
    return table.view((batch, sequence, ONE, table.shape[-1]), lambda at: access((at[0], at[1], at[3])))


def _of_positions(o: Opener, x: Tensor, table: int, positions: int) -> Tensor:
    """The rows of a table that positions choose: each token's own, or one, which is the first token's."""
    rows = o.tensor(table)
    name, shape = index_tensor(o, positions)
    extent = rows.shape[0]

    def access(at: Shape) -> Shape:
        if len(shape) == 2:
            return Index.of(Indirect(name, (at[0], at[1]), extent)), at[2]
        first = Index.of(Indirect(name, (ZERO,), extent))
        return minimum(first + at[1], extent - 1), at[2]

    return _beside(rows, x, access)


def _rotated(o: Opener, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Pairs of elements turned by their angles; what lies behind the pairs stays.

    The two of a pair lie beside each other, or half of all apart: one axis of two, the other of all pairs.
    """
    size, rotary = x.shape[3], Index.of(o.integer("rotary_embedding_dim", 0))
    turned = size if rotary.is_zero else rotary
    half, beside = turned.exact_quotient(_TWO), bool(o.integer("interleaved", 0))
    if half is None or turned.constant is None:
        raise Unsupported(f"pairs of {turned} elements")
    side, place = (4, 3) if beside else (3, 4)
    pairs = x.view((*x.shape[:3], turned), lambda at: at).reshape(
        (*x.shape[:3], *((half, _TWO) if beside else (_TWO, half)))
    )
    others = pairs.view(pairs.shape, lambda at: tuple(1 - i if n == side else i for n, i in enumerate(at)))
    angles = (*cosine.shape[:3], *((half, ONE) if beside else (ONE, half)))
    cosine, sine = (t.view(angles, lambda at: (*at[:3], at[place])) for t in (cosine, sine))
    first = o.coordinate(tuple(_TWO if n == side else ONE for n in range(5)), side).equal(0)
    result = (pairs * cosine + others * first.select(-sine, sine)).reshape((*x.shape[:3], turned))
    if turned != size:
        wide = result.view(x.shape, lambda at: (*at[:3], clamped(at[3], turned)))
        result = (o.coordinate((ONE, ONE, ONE, size), 3) < turned.constant).select(wide, x)
    original = o.tensor(0).shape
    return permuted(result, (0, 2, 1, 3)) if len(original) == 4 else result.reshape(original)


@operator("EmbedLayerNormalization", domain=MICROSOFT)
def embed_layer_normalization(o: Opener) -> tuple[Tensor, ...]:
    """What words, positions and segments choose, added up and normalised; the length of the mask; the sum."""
    name, (batch, sequence) = index_tensor(o, 0)
    word, position = o.tensor(2), o.tensor(3)
    shape = (batch, sequence, word.shape[1])

    def chosen(table: Tensor, place: int) -> Tensor:
        index, (rows, _) = index_tensor(o, place)
        row = ZERO if rows.is_one else None

        def access(at: Shape) -> Shape:
            return Index.of(Indirect(index, (at[0] if row is None else row, at[1]), table.shape[0])), at[2]

        return table.view(shape, access)

    if o.has(8):
        total = chosen(word, 0) + chosen(position, 8)
    else:
        total = chosen(word, 0) + position.view((ONE, *shape[1:]), lambda at: (at[1], at[2]))
    if o.has(1):
        total = total + chosen(o.tensor(4), 1)
    result, _, _ = normalise(widened(total), (2,), o.number("epsilon", 1e-12))
    result = result.cast(total.dtype) * o.tensor(5) + o.tensor(6)
    if o.has(7):
        length = o.tensor(7).equal(1).cast(DType.INT32).reduce(Op.ADD, (1,), keepdims=False)
    else:
        length = o.scalar(0, DType.INT32)
    return result, length, total


@operator("GatedAdd", domain=MICROSOFT)
def gated_add(o: Opener) -> Tensor:
    if o.has(3):
        raise Unsupported("a projected gate")
    x, scaled = o.tensor(0), o.tensor(1).cast(DType.FLOAT32) * o.tensor(2).cast(DType.FLOAT32)
    return x + scaled.cast(x.dtype)


@operator("ScaledSiLU", domain=MICROSOFT)
def scaled_silu(o: Opener) -> Tensor:
    """Rounded to the operand's type after each step."""
    x = floating(o.tensor(0))
    scale = o.tensor(1).reshape(()).cast(DType.FLOAT32) if o.has(1) else o.number("alpha", 1.0)
    scaled = (x.cast(DType.FLOAT32) * scale).cast(x.dtype)
    return scaled * scaled.cast(DType.FLOAT32).call(Op.SIGMOID).cast(x.dtype)


@operator("GatedRMSNorm", domain=MICROSOFT)
def gated_rms_norm(o: Opener) -> Tensor:
    """Of groups of as many elements as there are scales; all in single precision."""
    x, scale = floating(o.tensor(0)), o.tensor(1)
    groups = x.shape[-1].exact_quotient(scale.shape[0])
    if groups is None:
        raise Unsupported(f"groups of {scale.shape[0]} in {x.shape[-1]} elements")
    rows = x.reshape((*x.shape[:-1], groups, scale.shape[0]))
    gate = o.tensor(2).cast(DType.FLOAT32)
    opened = (
        gate.call(Op.SIGMOID) if o.text("activation", "silu") == "sigmoid" else gate * gate.call(Op.SIGMOID)
    )
    result, _ = divided_by_root_mean_square(
        rows.cast(DType.FLOAT32), (len(rows.shape) - 1,), o.number("epsilon", 1e-5)
    )
    return ((result * scale.cast(DType.FLOAT32)).reshape(x.shape) * opened).cast(x.dtype)


@operator("BranchwiseRMSNorm", domain=MICROSOFT)
def branchwise_rms_norm(o: Opener) -> Tensor:
    """Of each branch by itself, whether branches have an axis or lie side by side."""
    x, count = floating(o.tensor(0)), o.integer("num_branches", 0)
    branches = x
    if count:
        size = x.shape[-1].exact_quotient(Index.of(count))
        if size is None:
            raise Unsupported(f"{count} branches of {x.shape[-1]} elements")
        branches = x.reshape((*x.shape[:-1], Index.of(count), size))
    result, _ = divided_by_root_mean_square(
        branches.cast(DType.FLOAT32), (len(branches.shape) - 1,), o.number("epsilon", 1e-5)
    )
    if o.has(1):
        scale = o.tensor(1).cast(DType.FLOAT32)
        wide = len(scale.shape) == 1 and scale.shape[0] != branches.shape[-1]
        result = result * (scale.reshape(branches.shape[-2:]) if wide else scale)
    return result.reshape(x.shape).cast(x.dtype) if count else result.cast(x.dtype)
