"""Operators that choose elements by index tensors, or that compute with the places of elements."""

from __future__ import annotations

from apollo_fuse.dtypes import DType
from apollo_fuse.expressions import Op
from apollo_fuse.graph import Shape
from apollo_fuse.index import ONE, ZERO, Index, Indirect, clamped, maximum
from apollo_fuse.operators.movement import require_known
from apollo_fuse.operators.opener import Opener, Tensor, Unsupported
from apollo_fuse.operators.registry import operator

_LONGEST_SCAN = 64  # elements; a prefix sum adds up each of its prefixes anew
_NO_PLACE = 2**63 - 1
_NO_BOUND = 2**31  # of a place that is taken around an axis


@operator("Gather")
def gather(o: Opener) -> Tensor:
    """Indices are read from memory; negative ones count from the end, as the specification says."""
    x, indices = o.tensor(0), o.tensor(1)
    axis = o.axis(o.integer("axis", 0), len(x.shape))
    rank, extent = len(indices.shape), x.shape[axis]
    shape = (*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :])
    if not isinstance(indices.content, str):
        known = int(indices.content.value)
        place = Index.of(known) if known >= 0 else extent + known
        return x.view(shape, lambda at: (*at[:axis], place, *at[axis + rank :]))
    name, _ = index_tensor(o, 1)

    def access(at: tuple[Index, ...]) -> tuple[Index, ...]:
        chosen = Index.of(Indirect(name, at[axis : axis + rank], extent))
        return (*at[:axis], chosen, *at[axis + rank :])

    return x.view(shape, access)


@operator("GatherElements")
def gather_elements(o: Opener) -> Tensor:
    """Each element of the result has its own index along the axis; other axes may be shorter there."""
    x = o.tensor(0)
    name, shape = index_tensor(o, 1)
    axis = o.axis(o.integer("axis", 0), len(x.shape))

    def access(at: tuple[Index, ...]) -> tuple[Index, ...]:
        return (*at[:axis], Index.of(Indirect(name, at, x.shape[axis])), *at[axis + 1 :])

    for place, (wanted, extent) in enumerate(zip(shape, x.shape, strict=True)):
        if place != axis and wanted != extent:
            known = wanted.constant, extent.constant
            if known[0] is None or known[1] is None or known[0] > known[1]:
                raise Unsupported(f"cannot prove that {wanted} indices fit the extent {extent}")
    return x.view(shape, access)


@operator("GatherND")
@operator("GatherND", domain="com.microsoft")
def gather_nd(o: Opener) -> Tensor:
    """The last axis of the indices holds one number for each leading axis of the operand."""
    x = o.tensor(0)
    name, shape = index_tensor(o, 1)
    batches, count = o.integer("batch_dims", 0), shape[-1].constant
    if count is None:
        raise Unsupported(f"index tuples of unknown length {shape[-1]}")
    rank = len(shape) - 1

    def access(at: tuple[Index, ...]) -> tuple[Index, ...]:
        chosen = (
            Index.of(Indirect(name, (*at[:rank], Index.of(n)), x.shape[batches + n])) for n in range(count)
        )
        return (*at[:batches], *chosen, *at[rank:])

    if x.shape[:batches] != shape[:batches]:
        raise Unsupported("batch axes that cannot be proved equal")
    return x.view((*shape[:-1], *x.shape[batches + count :]), access)


def index_tensor(o: Opener, place: int) -> tuple[str, Shape]:
    """The name and the shape of an operand that holds indices."""
    indices = o.tensor(place, as_operand=True)
    assert isinstance(indices.content, str)
    if not indices.dtype.is_integer:
        raise Unsupported(f"indices of type {indices.dtype.value}")
    return indices.content, indices.shape


@operator("OneHot")
def one_hot(o: Opener) -> Tensor:
    """Indices outside of the depth are hot nowhere; negative ones count from the end."""
    indices, values = o.tensor(0), o.tensor(2, as_operand=True)
    if not indices.dtype.is_integer:
        raise Unsupported(f"indices of type {indices.dtype.value}")
    depth = int(o.constant(1).reshape(-1)[0])
    axis = o.axis(o.integer("axis", -1), len(indices.shape) + 1)
    places = indices.cast(DType.INT64).reshape((*indices.shape[:axis], ONE, *indices.shape[axis:]))
    shape = (*indices.shape[:axis], Index.of(depth), *indices.shape[axis:])
    hot = (places < 0).select(places + depth, places).equal(o.coordinate(shape, axis))
    off, on = (values.view((), lambda at, n=n: (Index.of(n),)) for n in (0, 1))  # type: ignore[misc]
    return hot.select(on, off)


@operator("Range")
@operator("Range", domain="com.microsoft")
def range_(o: Opener) -> Tensor:
    for place in range(len(o.node.inputs)):
        require_known(o, place)
    start = o.tensor(0)
    (extent,) = o.output_shape()
    steps = o.coordinate((extent,), 0).cast(start.dtype)
    return (steps * o.tensor(2).reshape(()) if o.has(2) else steps) + start.reshape(())


@operator("ConstantOfShape")
def constant_of_shape(o: Opener) -> Tensor:
    require_known(o, 0)
    given = o.node.attributes.get("value")
    value = 0.0 if given is None else given.as_tensor().numpy().reshape(-1)[0].item()
    return o.filled(o.output_shape(), value, o.output_dtype())


@operator("EyeLike")
def eye_like(o: Opener) -> Tensor:
    shape = o.tensor(0).shape
    distance = o.coordinate(shape, 1) - o.coordinate(shape, 0)
    return distance.equal(o.integer("k", 0)).cast(o.output_dtype())


@operator("Trilu")
@operator("Trilu", domain="com.microsoft")
def trilu(o: Opener) -> Tensor:
    """What lies on the far side of the diagonal becomes 0."""
    x = o.tensor(0)
    diagonal = int(o.constant(1).reshape(-1)[0]) if o.has(1) else 0
    distance = o.coordinate(x.shape, -1) - o.coordinate(x.shape, -2)
    kept = distance >= diagonal if o.integer("upper", 1) else distance <= diagonal
    return kept.select(x, 0)


@operator("ReverseSequence")
def reverse_sequence(o: Opener) -> Tensor:
    """The leading elements of each sequence, as many as its length says, in reverse order."""
    x = o.tensor(0)
    lengths, _ = index_tensor(o, 1)
    time, batch = o.integer("time_axis", 0), o.integer("batch_axis", 1)

    def backwards(at: tuple[Index, ...]) -> tuple[Index, ...]:
        length = Index.of(Indirect(lengths, (at[batch],), x.shape[time] + 1))
        return (*at[:time], maximum(length - 1 - at[time], ZERO), *at[time + 1 :])

    along_batch = tuple(extent if axis == batch else ONE for axis, extent in enumerate(x.shape))
    ends = o.tensor(1, as_operand=True).cast(DType.INT64).reshape(along_batch)
    turned = o.coordinate(x.shape, time) < ends
    return turned.select(x.view(x.shape, backwards), x)


@operator("TensorScatter")
def tensor_scatter(o: Opener) -> Tensor:
    """A cache with an update written over it, from an index on that each batch has for itself."""
    past, update = o.tensor(0), o.tensor(1)
    axis = o.axis(o.integer("axis", -2), len(past.shape))
    extent, length = past.shape[axis], update.shape[axis]
    around = o.text("mode", "linear") == "circular"
    name = index_tensor(o, 2)[0] if o.has(2) else None
    bound = Index.of(_NO_BOUND) if around else extent - length + 1

    def place(at: Shape) -> Index:
        """Where in the update the element lies; beside it for one that is kept."""
        first = ZERO if name is None else Index.of(Indirect(name, (at[0],), bound))
        return (at[axis] - first) % extent if around else at[axis] - first

    def access(at: Shape) -> Shape:
        return (*at[:axis], clamped(place(at), length), *at[axis + 1 :])

    beside = o.computed(past.shape, lambda at: place(at) - clamped(place(at), length))
    return beside.equal(0).select(update.view(past.shape, access), past)


@operator("ArgMax", "ArgMin")
def arg_max(o: Opener) -> Tensor:
    """The place of the greatest element, in two passes; onnxruntime looks past NaN, but for a leading one."""
    x = o.tensor(0)
    axis = o.axis(o.integer("axis", 0), len(x.shape))
    op = Op.MAX if o.node.op_type == "ArgMax" else Op.MIN
    leading_nan = None
    if x.dtype.is_float:
        first = (*x.shape[:axis], ONE, *x.shape[axis + 1 :])
        leading_nan = x.view(first, lambda at: at).call(Op.IS_NAN)
        worst = float("-inf") if op is Op.MAX else float("inf")
        x = x.call(Op.IS_NAN).select(worst, x)
    best = x.equal(x.reduce(op, (axis,)))
    place = o.coordinate(x.shape, axis)
    if o.integer("select_last_index", 0):
        found = best.select(place, -1).reduce(Op.MAX, (axis,))
    else:
        found = best.select(place, _NO_PLACE).reduce(Op.MIN, (axis,))
    if leading_nan is not None:
        found = leading_nan.select(0, found)
    if o.integer("keepdims", 1):
        return found
    return found.reshape((*found.shape[:axis], *found.shape[axis + 1 :]))


@operator("Hardmax")
def hardmax(o: Opener) -> Tensor:
    """One at the first of the greatest elements of each row, zero elsewhere."""
    x = o.tensor(0)
    if o.opset < 13:
        raise Unsupported("the form of opsets before 13, which looks at several axes at once")
    axis = o.axis(o.integer("axis", -1), len(x.shape))
    place = o.coordinate(x.shape, axis)
    best = x.equal(x.reduce(Op.MAX, (axis,)))
    first = best.select(place, _NO_PLACE).reduce(Op.MIN, (axis,))
    return place.equal(first).cast(x.dtype)


@operator("CumSum", "CumProd")
def cum_sum(o: Opener) -> Tensor:
    """Each prefix is added up, or multiplied, by itself, so that all of them can be at once."""
    x = o.tensor(0)
    axis = o.axis(int(o.constant(1).reshape(-1)[0]), len(x.shape))
    extent = x.shape[axis]
    if extent.constant is None or extent.constant > _LONGEST_SCAN:
        raise Unsupported(f"prefix sums of {extent} elements, more than {_LONGEST_SCAN}")
    terms = x.view((*x.shape, extent), lambda at: (*at[:axis], at[-1], *at[axis + 1 : -1]))
    place, other = o.coordinate(terms.shape, axis), o.coordinate(terms.shape, len(x.shape))
    if o.integer("reverse", 0):
        place, other = other, place
    counted = other < place if o.integer("exclusive", 0) else other <= place
    op, neutral = (Op.ADD, 0) if o.node.op_type == "CumSum" else (Op.MUL, 1)
    return counted.select(terms, neutral).reduce(op, (len(x.shape),), keepdims=False)
