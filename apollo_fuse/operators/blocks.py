"""onnxruntime's operators on blocked tensors (`apollo_fuse/blocked.py`) that move, scale or pool elements.

A blocked tensor has the shape [N, C, H, W] in the graph, and [N, C / block, H, W, block] in memory: a view
between the two moves nothing, and behind it a reorder is a transpose.
"""

from __future__ import annotations

import math

from apollo_fuse.blocked import DOMAIN, block_size
from apollo_fuse.expressions import Op
from apollo_fuse.graph import Shape
from apollo_fuse.index import ONE, ZERO, Index
from apollo_fuse.operators.opener import Opener, Tensor, Unsupported
from apollo_fuse.operators.registry import operator


@operator("ReorderInput", domain=DOMAIN)
def reorder_input(o: Opener) -> Tensor:
    """From rows, or from channels last, to blocks; 0 is what fills the last block up."""
    x, last = o.tensor(0), bool(o.integer("channels_last", 0))
    batch, height, width, channels = _channels_last(_sizes(x), last)
    if channels.constant is None:
        raise Unsupported(f"the open number of channels {channels}")
    block = block_size()
    whole, rest = divmod(channels.constant, block)

    def blocks(first: int, count: int, size: int) -> Tensor:
        """As many blocks of this size, from the channel on that is the first of them."""

        def access(at: Shape) -> Shape:
            sample, number, row, column, inner = at
            channel = number * size + inner + first
            return (sample, row, column, channel) if last else (sample, channel, row, column)

        return x.view((batch, Index.of(count), height, width, Index.of(size)), access)

    def place(number: int, inner: int) -> Shape:
        return (ZERO, Index.of(number), ZERO, ZERO, Index.of(inner))

    parts = [(blocks(0, whole, block), place(0, 0))] if whole else []
    if rest:
        parts.append((blocks(whole * block, 1, rest), place(whole, 0)))
        nothing = o.filled((batch, ONE, height, width, Index.of(block - rest)), 0.0, x.dtype)
        parts.append((nothing, place(whole, rest)))
    number = whole + bool(rest)
    found = o.assemble((batch, Index.of(number), height, width, Index.of(block)), parts)
    return found.reshape((batch, Index.of(number * block), height, width))


@operator("ReorderOutput", domain=DOMAIN)
def reorder_output(o: Opener) -> Tensor:
    """From blocks to rows, or to channels last, without what fills the last block up.

    Channels are taken in runs that no end of a block parts.
    """
    x, last = o.tensor(0), bool(o.integer("channels_last", 0))
    count, block = o.integer("channels", 0), block_size()
    batch, height, width, filled = _channels_last(_sizes(x), False)
    run = math.gcd(count, block)
    blocks = x.reshape((batch, filled // block, height, width, Index.of(block)))

    def access(at: Shape) -> Shape:
        sample, runs, inner, row, column = (at[0], *at[3:], *at[1:3]) if last else at
        return (sample, runs * run // block, row, column, runs * run % block + inner)

    channels = (Index.of(count // run), Index.of(run))
    split = (batch, height, width, *channels) if last else (batch, *channels, height, width)
    rows = (batch, height, width, Index.of(count)) if last else (batch, Index.of(count), height, width)
    return blocks.view(split, access).reshape(rows)


@operator("Conv", domain=DOMAIN)
def scale(o: Opener) -> Tensor:
    """A factor for each channel, of a normalisation say, that onnxruntime writes as a convolution."""
    x, factors = o.tensor(0), o.tensor(1)
    batch, filled, height, width = _sizes(x)
    window = factors.shape[1:]
    if (
        factors.shape[0] != filled
        or Index.of(o.integer("group", 1)) != filled
        or any(e != ONE for e in window)
    ):
        raise Unsupported("a convolution")
    if any(o.numbers("pads", ())) or any(step != 1 for step in o.numbers("strides", ())):
        raise Unsupported("a convolution with pads or strides")
    block = Index.of(block_size())
    blocks = (filled // block, ONE, ONE, block)
    result = x.reshape((batch, filled // block, height, width, block)) * factors.reshape(blocks)
    if o.has(2):
        result = result + o.tensor(2).reshape(blocks)
    if o.has(3):
        result = result + o.tensor(3).reshape((batch, filled // block, height, width, block))
    match o.text("activation", ""):
        case "":
            pass
        case "Relu":
            result = result.maximum(0)
        case activation:
            raise Unsupported(f"{activation} behind it")
    return result.reshape(x.shape)


@operator("GlobalAveragePool", "GlobalMaxPool", domain=DOMAIN)
def global_pool(o: Opener) -> Tensor:
    x = o.tensor(0)
    batch, filled, height, width = _sizes(x)
    block = Index.of(block_size())
    blocks = x.reshape((batch, filled // block, height, width, block))
    averages = o.node.op_type == "GlobalAveragePool"
    pooled = blocks.mean((2, 3)) if averages else blocks.reduce(Op.MAX, (2, 3))
    return pooled.reshape((batch, filled, ONE, ONE))


def _channels_last(axes: tuple[Index, Index, Index, Index], last: bool) -> tuple[Index, Index, Index, Index]:
    """Batch, height, width and channels."""
    if last:
        batch, height, width, channels = axes
    else:
        batch, channels, height, width = axes
    return batch, height, width, channels


def _sizes(x: Tensor) -> tuple[Index, Index, Index, Index]:
    if len(x.shape) != 4:
        raise Unsupported(f"rank {len(x.shape)}, where a tensor beside blocks has rank 4")
    first, second, third, fourth = x.shape
    return first, second, third, fourth
