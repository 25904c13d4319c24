"""Operators that only move data: each is an access map from the result to the operand."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from apollo_fuse.dimensions import never_one
from apollo_fuse.extents import is_empty
from apollo_fuse.graph import Pattern
from apollo_fuse.index import ONE, ZERO, Index, product
from apollo_fuse.operators.opener import Opener, Tensor, Unsupported
from apollo_fuse.operators.registry import operator
from apollo_fuse.shape_rules import slice_bounds


@operator("Reshape")
def reshape(o: Opener) -> Tensor:
    """The result's shape is the one that shape inference proved."""
    require_known(o, 1)
    x = o.tensor(0)
    if o.has(1) and not o.integer("allowzero", 0):
        _require_no_copy(o, x)
    return x.reshape(o.output_shape())


def _require_no_copy(o: Opener, x: Tensor) -> None:
    """A target extent that is 0 in a run stands for the operand's extent there, which is another one."""
    for axis, extent in enumerate(o.extents(1, "shape") or ()):
        if extent is None or extent.constant is not None or axis >= len(x.shape):
            continue
        here = x.shape[axis]
        factors = extent.terms[0][0] if len(extent.terms) == 1 else ()
        if here != extent and not (factors and all(here.exact_quotient(Index.of(f)) for f in factors)):
            o.require_equal(is_empty(extent) * here, ZERO)


def require_known(o: Opener, place: int) -> None:
    """What a model states of a shape that its caller decides, by the operand at `place`, is no proof."""
    source = o.node.inputs[place] if len(o.node.inputs) > place else None
    if source is not None and source.const_value is None and source.producer() is None:
        raise Unsupported("the shape is an input of the model")


@operator("Flatten")
def flatten(o: Opener) -> Tensor:
    x = o.tensor(0)
    axis = o.integer("axis", 1)
    axis += len(x.shape) if axis < 0 else 0
    return x.reshape((product(x.shape[:axis]), product(x.shape[axis:])))


@operator("Unsqueeze")
def unsqueeze(o: Opener) -> Tensor:
    x = o.tensor(0)
    axes = o.integers(1, "axes")
    if axes is None:
        raise Unsupported("axes are missing")
    rank = len(x.shape) + len(axes)
    new = {o.axis(axis, rank) for axis in axes}
    extents = iter(x.shape)
    return x.reshape(tuple(ONE if axis in new else next(extents) for axis in range(rank)))


@operator("ExpandDims", domain="com.microsoft")
def expand_dims(o: Opener) -> Tensor:
    x = o.tensor(0)
    axis = o.axis(int(o.constant(1).reshape(-1)[0]), len(x.shape) + 1)
    return x.reshape((*x.shape[:axis], ONE, *x.shape[axis:]))


@operator("Squeeze")
def squeeze(o: Opener) -> Tensor:
    x = o.tensor(0)
    axes = o.integers(1, "axes")
    if axes is None:
        return x.reshape(o.output_shape())
    dropped = {o.axis(axis, len(x.shape)) for axis in axes}
    for axis in dropped:
        if not x.shape[axis].is_one:
            raise Unsupported(f"cannot prove that the squeezed extent {x.shape[axis]} is 1")
    return x.reshape(tuple(e for axis, e in enumerate(x.shape) if axis not in dropped))


@operator("Transpose")
def transpose(o: Opener) -> Tensor:
    x = o.tensor(0)
    rank = len(x.shape)
    permutation = o.numbers("perm", ()) or tuple(reversed(range(rank)))
    return permuted(x, permutation)


def permuted(x: Tensor, permutation: Sequence[int]) -> Tensor:
    """The tensor with its axes in this order."""
    places = [permutation.index(axis) for axis in range(len(permutation))]
    shape = tuple(x.shape[axis] for axis in permutation)
    return x.view(shape, lambda at: tuple(at[place] for place in places))


@operator("DepthToSpace")
def depth_to_space(o: Opener) -> Tensor:
    x = o.tensor(0)
    block = Index.of(o.integer("blocksize", 1))
    batch, channels, height, width = _image(x)
    depth = _quotient(channels, block * block)
    crd = o.text("mode", "DCR") == "CRD"
    blocks = (depth, block, block) if crd else (block, block, depth)
    order = (0, 1, 4, 2, 5, 3) if crd else (0, 3, 4, 1, 5, 2)
    split = x.reshape((batch, *blocks, height, width))
    return permuted(split, order).reshape((batch, depth, height * block, width * block))


@operator("SpaceToDepth")
def space_to_depth(o: Opener) -> Tensor:
    x = o.tensor(0)
    block = Index.of(o.integer("blocksize", 1))
    batch, channels, height, width = _image(x)
    rows, columns = _quotient(height, block), _quotient(width, block)
    order = (0, 1, 3, 5, 2, 4) if o.text("mode", "DCR") == "CRD" else (0, 3, 5, 1, 2, 4)
    split = permuted(x.reshape((batch, channels, rows, block, columns, block)), order)
    return split.reshape((batch, channels * block * block, rows, columns))


def _image(x: Tensor) -> tuple[Index, Index, Index, Index]:
    if len(x.shape) != 4:
        raise Unsupported(f"rank {len(x.shape)}, where an image has rank 4")
    batch, channels, height, width = x.shape
    return batch, channels, height, width


def _quotient(extent: Index, divisor: Index) -> Index:
    found = extent.exact_quotient(divisor)
    if found is None:
        raise Unsupported(f"cannot prove that {divisor} divides the extent {extent}")
    return found


@operator("Tile")
def tile(o: Opener) -> Tensor:
    """Each axis becomes two, of which the outer one only repeats."""
    x = o.tensor(0)
    repeats = o.integers(1, "repeats")
    if repeats is None or len(repeats) != len(x.shape):
        raise Unsupported("repeats that are not one number an axis")
    wide = tuple(e for count, extent in zip(repeats, x.shape, strict=True) for e in (Index.of(count), extent))
    repeated = x.view(wide, lambda at: at[1::2], Pattern.BROADCAST)
    return repeated.reshape(tuple(e * count for e, count in zip(x.shape, repeats, strict=True)))


@operator("Expand")
def expand(o: Opener) -> Tensor:
    require_known(o, 1)
    x, shape = o.tensor(0), o.output_shape()
    for found, wanted in zip(x.shape, shape[len(shape) - len(x.shape) :], strict=True):
        if not found.is_one and found != wanted and not never_one(wanted):
            raise Unsupported(f"cannot prove that the extents {found} and {wanted} are equal")
    return x.view(shape, lambda at: o.aligned(at, shape, x.shape), Pattern.BROADCAST)


@operator("Slice")
def slice_(o: Opener) -> Tensor:
    """Bounds may follow from shapes; they are clamped to the axis as the specification says."""
    x = o.tensor(0)
    starts, ends = o.extents(1, "starts"), o.extents(2, "ends")
    if starts is None or ends is None:
        raise Unsupported("starts or ends are missing")
    steps = o.integers(4, "steps") if o.has(4) else None
    bounds = slice_bounds(x.shape, starts, ends, o.integers(3, "axes"), steps)
    if bounds is None:
        raise Unsupported(f"starts, ends, axes and steps that do not fit rank {len(x.shape)}")
    inferred = o.values.get(o.node.outputs[0])  # not where the bounds are attributes
    shape: list[Index] = []
    for axis, (_, length, _) in enumerate(bounds):
        if length is None:
            raise Unsupported(f"a slice from {starts} to {ends} along the dynamic extent {x.shape[axis]}")
        expected = length if inferred is None else inferred.shape[axis]
        o.require_equal(length, expected)
        shape.append(expected)
    return x.view(
        tuple(shape),
        lambda at: tuple(i * step + start for i, (start, _, step) in zip(at, bounds, strict=True)),
    )


@operator("Concat")
def concat(o: Opener) -> Tensor:
    tensors = [o.tensor(place) for place in range(len(o.node.inputs))]
    return o.concatenate(tensors, o.axis(o.integer("axis", 0), len(tensors[0].shape)))


@operator("Split")
def split(o: Opener) -> tuple[Tensor, ...]:
    """Each result is a window of the operand; without sizes, all but the last are of one size."""
    x = o.tensor(0)
    axis = o.axis(o.integer("axis", 0), len(x.shape))
    sizes = o.integers(1, "split")
    extents = _equal_parts(o, x.shape[axis]) if sizes is None else tuple(map(Index.of, sizes))
    results: list[Tensor] = []
    offset = ZERO
    for extent in extents:
        shape = (*x.shape[:axis], extent, *x.shape[axis + 1 :])
        results.append(x.view(shape, partial(_shifted, axis=axis, by=offset)))
        offset = offset + extent
    if offset != x.shape[axis]:
        raise Unsupported(f"cannot prove that the parts hold all {x.shape[axis]} elements of the axis")
    return tuple(results)


def _equal_parts(o: Opener, extent: Index) -> tuple[Index, ...]:
    count = len(o.node.outputs)
    even = extent.exact_quotient(Index.of(count))
    if even is not None:
        return (even,) * count
    if extent.constant is None:
        raise Unsupported(f"cannot prove that {count} divides the extent {extent}")
    size = -(-extent.constant // count)
    return (*(Index.of(size) for _ in range(count - 1)), extent - size * (count - 1))


def _shifted(at: tuple[Index, ...], axis: int, by: Index) -> tuple[Index, ...]:
    return (*at[:axis], at[axis] + by, *at[axis + 1 :])
