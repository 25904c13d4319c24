"""Pad: what a tensor is continued with beyond its edges."""

from __future__ import annotations

from collections.abc import Sequence

from apollo_fuse.graph import Shape
from apollo_fuse.index import ZERO, Index, clamped, maximum
from apollo_fuse.operators.opener import Opener, Tensor, Unsupported
from apollo_fuse.operators.registry import operator


@operator("Pad")
@operator("Pad", domain="com.microsoft")
def pad(o: Opener) -> Tensor:
    """A constant border is written in parts; every other one reads an element of the operand."""
    x = o.tensor(0)
    before, after = _widths(o, len(x.shape))
    shape = tuple(e + a + b for e, a, b in zip(x.shape, before, after, strict=True))
    for extent, a, b in zip(x.shape, before, after, strict=True):
        if min(a, b) < 0 and (extent.constant is None or extent.constant + min(a, 0) + min(b, 0) < 0):
            raise Unsupported(f"cannot prove that {-min(a, b)} elements can be cut from the extent {extent}")
    match o.text("mode", "constant"):
        case "constant":
            return _bordered(o, x, shape, before, after)
        case "edge":
            nearest = clamped
        case "reflect":
            nearest = _reflected
        case "wrap":
            nearest = _wrapped
        case mode:
            raise Unsupported(f"mode {mode}")

    def access(at: Shape) -> Shape:
        return tuple(
            i if a == b == 0 else nearest(i - a, e)
            for i, e, a, b in zip(at, x.shape, before, after, strict=True)
        )

    return x.view(shape, access)


def _widths(o: Opener, rank: int) -> tuple[list[int], list[int]]:
    widths = o.integers(1, "pads")
    if widths is None:
        raise Unsupported("pads are missing")
    chosen = o.constant(3).reshape(-1).tolist() if o.has(3) else range(rank)
    axes = [o.axis(int(axis), rank) for axis in chosen]
    before, after = [0] * rank, [0] * rank
    for place, axis in enumerate(axes):
        before[axis], after[axis] = widths[place], widths[place + len(axes)]
    return before, after


def _reflected(index: Index, extent: Index) -> Index:
    """Mirrored at the first and at the last element, which are not repeated."""
    from_start = maximum(index, -index)
    from_end = extent - 1 - from_start
    return extent - 1 - maximum(from_end, -from_end)


def _wrapped(index: Index, extent: Index) -> Index:
    return index % extent


def _bordered(o: Opener, x: Tensor, shape: Shape, before: Sequence[int], after: Sequence[int]) -> Tensor:
    """The operand, less what negative widths cut off, between slabs of one value along each axis."""
    value = o.tensor(2).reshape(()) if o.has(2) else o.scalar(o.number("value", 0.0), x.dtype)
    rank = len(shape)
    cut = [-min(width, 0) for width in before]
    inner = tuple(e - max(a, 0) - max(b, 0) for e, a, b in zip(shape, before, after, strict=True))
    origin = tuple(Index.of(max(width, 0)) for width in before)
    core = x.view(inner, lambda at: tuple(i + c for i, c in zip(at, cut, strict=True)))
    parts = [(core, origin)]
    for axis in range(rank):
        for width, start in ((before[axis], ZERO), (after[axis], origin[axis] + inner[axis])):
            if width > 0:
                slab = (*inner[:axis], Index.of(width), *shape[axis + 1 :])
                place = (*origin[:axis], start, *(ZERO for _ in range(axis + 1, rank)))
                parts.append((value.view(slab, lambda at: ()), place))
    return o.assemble(shape, parts) if len(parts) > 1 else core
