"""Rules of shape inference in place of the onnx-shape-inference package's, where that assumes or gives up.

It takes the first of two extents that are broadcast, an axis for longer than what is sliced off it, and does
not compute with quotients, minima and lengths that follow from shapes. Importing this module registers the
rules with the package.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from fractions import Fraction

import onnx_ir as ir
from onnx_shape_inference import ShapeInferenceContext, registry

from apollo_fuse.dimensions import Dimensions, broadcast_extent, implied_equal, wide_extents
from apollo_fuse.extents import greatest, quotient, sliced, substituted
from apollo_fuse.graph import Shape
from apollo_fuse.index import Index, Symbol, product
from apollo_fuse.shape_arithmetic import ELEMENTWISE, Elements, aligned, decided

_BEYOND_ANY_AXIS = 2**29
LARGEST_DIVISOR = 64
"""Of extents, by which an image gets smaller: a scale of a larger denominator is a rounded decimal."""
_Rule = Callable[[ShapeInferenceContext, ir.Node], None]

registry.collect()


def _after(*versions: tuple[str, int]) -> Callable[[Callable[[_Inference], None]], None]:
    """Runs a rule after the package's own for these operators, since these versions."""

    def register(refine: Callable[[_Inference], None]) -> None:
        for name, since in versions:
            before: _Rule | None = registry.get("", name, since)
            assert before is not None

            def rule(context: ShapeInferenceContext, node: ir.Node, before: _Rule = before) -> None:
                before(context, node)
                refine(_Inference(context, node, Dimensions.of(node.graph)))

            registry.register("", name, since_version=since)(rule)

    return register


class _Inference:
    """One node, after the package's rule for it."""

    def __init__(self, context: ShapeInferenceContext, node: ir.Node, dimensions: Dimensions) -> None:
        self.context, self.node, self.dimensions = context, node, dimensions

    @property
    def result(self) -> ir.Value:
        return self.node.outputs[0]

    @property
    def always_runs(self) -> bool:
        """Whether every run of the model runs the node, so that what its validity implies holds for all."""
        return self.node.graph is not None and self.node.graph is self.dimensions.main

    def operand(self, place: int) -> ir.Value | None:
        return self.node.inputs[place] if place < len(self.node.inputs) else None

    def has(self, place: int) -> bool:
        return self.operand(place) is not None

    def shape(self, place: int) -> Shape | None:
        value = self.node.inputs[place]
        return None if value is None else self.dimensions.shape(value.shape)

    def elements(self, place: int) -> Elements | None:
        """What an integer operand of rank 0 or 1 holds; None for elements that are not known."""
        value = self.operand(place)
        shape = None if value is None else self.dimensions.shape(value.shape)
        if value is None or shape is None or len(shape) > 1:
            return None
        if value.const_value is not None and value.dtype is ir.DataType.BOOL:
            return [Index.of(int(x)) for x in value.const_value.numpy().reshape(-1)]
        found = self.context.get_symbolic_value(value)
        if found is None or product(shape).constant != len(found):
            return None
        return [self.dimensions.element(dim) for dim in found]

    def extents_in(self, place: int) -> Elements | None:
        """What an operand holds that gives a shape: where that is not known, of how many axes it speaks.

        In bodies that is left open: what a Loop stacks has a rank that onnxruntime knows, where none runs.
        """
        shape, known = self.shape(place), self.elements(place)
        length = shape[0].constant if shape is not None and len(shape) == 1 else None
        return [None] * length if known is None and length is not None and self.always_runs else known

    def integers(self, place: int) -> list[int] | None:
        value = self.operand(place)
        if value is None:
            return None
        if value.const_value is not None:
            return [int(x) for x in value.const_value.numpy().reshape(-1)]
        elements = self.elements(place)
        known = [e.constant for e in elements or () if e is not None and e.constant is not None]
        return known if elements is not None and len(known) == len(elements) else None

    def give_shape(self, extents: Sequence[Index | None]) -> None:
        """Sets the result's shape; an extent that is None is one of its own."""
        self.result.shape = ir.Shape(
            [
                self.context.new_symbolic_dim() if e is None else self.dimensions.dim(e, self.context)
                for e in extents
            ]
        )

    def give_elements(self, elements: Elements) -> None:
        """Tells what the result holds; None stands for an element that is not known."""
        dims: list[int | ir.SymbolicDim] = []
        for element in elements:
            dims.append(self._unknown() if element is None else self.dimensions.dim(element, self.context))
        self.context.set_symbolic_value(self.result, dims)

    def forget_elements(self) -> None:
        """Takes back what the package claims that the result holds."""
        found = self.context.get_symbolic_value(self.result)
        if found is not None:
            self.result.const_value = None
            self.give_elements([None] * len(found))

    def _unknown(self) -> ir.SymbolicDim:
        new: ir.SymbolicDim = self.context.new_symbolic_dim()
        self.dimensions.unknown.add(Symbol(str(new.value)))
        return new


_BROADCASTING = (
    ("Add", 7), ("Sub", 7), ("Mul", 7), ("Div", 7), ("Mod", 10), ("Pow", 7), ("BitShift", 11),
    ("BitwiseAnd", 18), ("BitwiseOr", 18), ("BitwiseXor", 18), ("Equal", 7), ("Less", 7), ("Greater", 7),
    ("LessOrEqual", 12), ("GreaterOrEqual", 12), ("And", 7), ("Or", 7), ("Xor", 7), ("Max", 8), ("Mean", 8),
    ("Min", 8), ("Sum", 8), ("Where", 9),
)  # fmt: skip


@_after(*_BROADCASTING)
def _broadcast(at: _Inference) -> None:
    shapes = [at.shape(place) for place in range(len(at.node.inputs))]
    known = [shape for shape in shapes if shape is not None]
    if len(known) == len(shapes):
        _broadcast_to(at, known)
    _compute(at)


def _broadcast_to(at: _Inference, shapes: Sequence[Shape]) -> None:
    """Keeps the extents that broadcasting proves, where the package took the first of several."""
    shape = at.result.shape
    if shape is None or shape.is_static() or len(shape) != max(map(len, shapes)):
        return
    axes = range(-len(shape), 0)
    for axis in axes if at.always_runs else ():
        wide = wide_extents(shapes, axis)
        if len(wide) == 2 and implied_equal(*wide):
            at.dimensions.equate(*wide)
    equal = at.dimensions.equal
    shapes = [tuple(substituted(extent, equal) for extent in s) for s in shapes]
    extents: list[Index | None] = []
    for axis in axes:
        wide = wide_extents(shapes, axis)
        known = shape[axis] if isinstance(shape[axis], int) else None
        if known is not None:
            extents.append(at.dimensions.index(known))
        else:
            extents.append(broadcast_extent(wide))
    at.give_shape(extents)


_INTEGERS = (ir.DataType.INT64, ir.DataType.INT32, ir.DataType.BOOL)


def _compute(at: _Inference) -> None:
    """What the result holds, where it is computed from extents."""
    operands = [at.elements(place) for place in range(len(at.node.inputs))]
    known = [e for e in operands if e is not None]
    integers = at.result.dtype in _INTEGERS
    numbers = all(index is not None and index.constant is not None for e in known for index in e)
    if numbers and integers and at.context.get_symbolic_value(at.result) is not None:
        return  # the package has computed with them
    rows = aligned(known) if len(known) == len(operands) else None
    fmod = at.node.attributes.get("fmod")
    function = ELEMENTWISE.get(at.node.op_type)
    if rows is None or function is None or not integers or (fmod is not None and fmod.as_int()):
        at.forget_elements()
        return
    at.give_elements([function(*row) for row in zip(*rows, strict=True)])


@_after(("Not", 1))
def _not(at: _Inference) -> None:
    _compute(at)


@_after(("Expand", 8))
def _expand(at: _Inference) -> None:
    shape, target = at.shape(0), at.extents_in(1)
    if shape is not None and target is not None:
        if at.result.shape is None:
            at.give_shape([None] * max(len(shape), len(target)))
        # an element that is not known may be 1, and then the operand's extent is the result's
        new = [
            e if e is not None else Index.of(Symbol(str(at.context.new_symbolic_dim().value))) for e in target
        ]
        _broadcast_to(at, [shape, tuple(new)])


@_after(("Reshape", 5))
def _reshape(at: _Inference) -> None:
    """An element that is not known may be -1 or 0, which stand for other extents."""
    shape = at.dimensions.shape(at.result.shape)
    if shape is not None and any(at.dimensions.unknown & extent.symbols() for extent in shape):
        at.give_shape([None if at.dimensions.unknown & extent.symbols() else extent for extent in shape])


@_after(("Slice", 10))
def _slice(at: _Inference) -> None:
    shape = at.shape(0)
    if shape is None or at.result.shape is None:
        return
    if at.result.shape.is_static() and all(extent.constant is not None for extent in shape):
        return
    bounds = slice_bounds(
        shape,
        at.elements(1),
        at.elements(2),
        at.integers(3) if at.has(3) else None,
        at.integers(4) if at.has(4) else None,
    )
    axes = at.integers(3) if at.has(3) else None
    if bounds is not None:
        at.give_shape([extent for _, extent, _ in bounds])
    elif axes is not None:
        taken = {axis % len(shape) for axis in axes}
        at.give_shape([None if axis in taken else extent for axis, extent in enumerate(shape)])
    else:
        at.give_shape([None] * len(shape))


@registry.register("", "Slice", since_version=1)  # type: ignore[untyped-decorator]
def _slice_by_attributes(context: ShapeInferenceContext, node: ir.Node) -> None:
    """The package knows none of those before opset 10."""
    at = _Inference(context, node, Dimensions.of(node.graph))
    shape, x = at.shape(0), node.inputs[0]
    context.set_shape_and_dtype(at.result, None, None if x is None else x.dtype)
    starts, ends = ([Index.of(n) for n in node.attributes[name].as_ints()] for name in ("starts", "ends"))
    bounds = shape and slice_bounds(shape, starts, ends, node.attributes.get_ints("axes"), None)
    if bounds:
        at.give_shape([extent for _, extent, _ in bounds])


def slice_bounds(
    shape: Shape,
    starts: Elements | None,
    ends: Elements | None,
    axes: Sequence[int] | None,
    steps: Sequence[int] | None,
) -> list[tuple[Index, Index | None, int]] | None:
    """For each axis the first index, the length and the step of a slice; None for an unknown length."""
    if starts is None or ends is None or len(starts) != len(ends):
        return None
    if axes is None:
        axes = range(len(starts))
    bounds: list[tuple[Index, Index | None, int]] = [(Index.of(0), extent, 1) for extent in shape]
    for place, axis in enumerate(axes):
        step = 1 if steps is None else steps[place]
        if not -len(shape) <= axis < len(shape) or step == 0:
            return None
        bounds[axis] = (*_taken(shape[axis], starts[place], ends[place], step), step)
    return bounds


def _taken(extent: Index, start: Index | None, end: Index | None, step: int) -> tuple[Index, Index | None]:
    if start is None or end is None:
        return Index.of(0), None
    known, first, last = extent.constant, start.constant, end.constant
    if known is not None and first is not None and last is not None:
        places = range(known)[slice(first, last, step)]
        return Index.of(places.start), Index.of(len(places))
    whole = last is not None and (last >= _BEYOND_ANY_AXIS if step > 0 else last <= -_BEYOND_ANY_AXIS)
    if step < 0 and first is not None and first >= _BEYOND_ANY_AXIS:
        start = Index.of(-1)
    found = sliced(extent, start, None if whole else end, step)
    return (Index.of(0), None) if found is None else found


@_after(("Concat", 4))
def _concat(at: _Inference) -> None:
    """The other axes agree in every valid run; shapes are put together element by element."""
    parts = [at.elements(place) for place in range(len(at.node.inputs))]
    if any(part is not None for part in parts) and at.result.dtype in _INTEGERS:
        lengths = [at.shape(place) for place in range(len(parts))]
        known = [s[0].constant if s is not None and len(s) == 1 else None for s in lengths]
        if all(length is not None for length in known):
            unknown: list[Elements] = [[None] * (length or 0) for length in known]
            at.give_elements([e for part, u in zip(parts, unknown, strict=True) for e in part or u])
        else:
            at.forget_elements()
    shapes = [at.shape(place) for place in range(len(at.node.inputs))]
    first = shapes[0]
    if not at.always_runs or first is None:
        return
    axis = at.node.attributes["axis"].as_int() % max(len(first), 1)
    for shape in shapes[1:]:
        for place, (a, b) in enumerate(zip(first, shape or first, strict=False)):
            if place != axis and a != b:
                at.dimensions.equate(a, b)


@_after(("MatMul", 1))
def _matmul(at: _Inference) -> None:
    """The extents that a product sums over agree in every valid run."""
    a, b = at.shape(0), at.shape(1)
    if at.always_runs and a and b and a[-1] != b[-2 if len(b) > 1 else 0]:
        at.dimensions.equate(a[-1], b[-2 if len(b) > 1 else 0])


@_after(("Range", 11))
def _range(at: _Inference) -> None:
    start, limit, delta = (at.elements(place) for place in range(3))
    if not at.result.dtype or at.result.shape is None or at.result.shape.is_static():
        return
    step = delta[0].constant if delta and delta[0] is not None else None
    if start and limit and start[0] is not None and limit[0] is not None and step is not None and step > 0:
        at.give_shape([greatest(Index.of(0), quotient(limit[0] - start[0] + (step - 1), step))])
    else:
        at.give_shape([None])


@_after(("ConstantOfShape", 9))
def _constant_of_shape(at: _Inference) -> None:
    shape = at.extents_in(0)
    if at.result.shape is None and shape is not None:
        at.give_shape(shape)


@_after(("Tile", 6))
def _tile(at: _Inference) -> None:
    shape, repeats = at.shape(0), at.elements(1)
    if at.result.shape is None and shape is not None and at.always_runs:
        times = repeats if repeats is not None and len(repeats) == len(shape) else [None] * len(shape)
        at.give_shape([None if n is None else extent * n for extent, n in zip(shape, times, strict=True)])


@_after(("Resize", 11), ("Upsample", 9))
def _resize(at: _Inference) -> None:
    """The package has an extent times a scale as it is in exact arithmetic, and none by an aspect ratio."""
    shape, known = at.shape(0), at.dimensions.shape(at.result.shape)
    if shape is None or known is None:
        return
    if at.node.attributes.get_string("keep_aspect_ratio_policy", "stretch") != "stretch":
        at.give_shape([None] * len(shape))
        return
    scales = at.operand(1 if at.node.op_type == "Upsample" else 2)
    if scales is None or scales.const_value is None:
        return
    extents: list[Index | None] = list(known)
    axes = at.node.attributes.get_ints("axes", range(len(shape)))
    for axis, scale in zip(axes, scales.const_value.numpy().reshape(-1).tolist(), strict=False):
        if shape[axis].constant is None and not is_exact(scale):
            extents[axis] = None
    at.give_shape(extents)


def is_exact(scale: float) -> bool:
    """Whether an open extent times this is what onnxruntime has, which multiplies in single precision."""
    return Fraction(scale).denominator <= LARGEST_DIVISOR


@_after(("Pad", 11))
def _pad(at: _Inference) -> None:
    shape, pads = at.shape(0), at.elements(1)
    axes = at.integers(3) if at.has(3) else None
    if shape is None or pads is None or at.result.shape is None or at.result.shape.is_static():
        return
    if at.has(3) and axes is None:
        return
    places = range(len(shape)) if axes is None else [axis % len(shape) for axis in axes]
    if len(pads) == 2 * len(places):
        extents: list[Index | None] = list(shape)
        for number, axis in enumerate(places):
            before, after = pads[number], pads[number + len(places)]
            padded = None if before is None or after is None else shape[axis] + before + after
            extents[axis] = padded
        at.give_shape(extents)


@_after(("Squeeze", 1))
def _squeeze(at: _Inference) -> None:
    """Without axes every extent that is 1 at run time goes, so the rank is open as long as one extent is."""
    value = at.node.inputs[0]
    without_axes = not at.has(1) and "axes" not in at.node.attributes
    if without_axes and value is not None and (value.shape is None or not value.shape.is_static()):
        at.result.shape = None


@_after(("Cast", 1))
def _cast(at: _Inference) -> None:
    """What is cast to bool is no longer the number that it was, and a float is no number of elements."""
    elements = at.elements(0)
    if elements is None:
        return
    if at.result.dtype is ir.DataType.BOOL:
        at.give_elements([None if e is None else decided(e, operator.ne) for e in elements])
    elif at.result.dtype not in _INTEGERS and any(e is None or e.constant is None for e in elements):
        at.forget_elements()


@_after(("ReduceProd", 1))
def _reduce_prod(at: _Inference) -> None:
    elements = at.elements(0)
    noop = at.node.attributes.get("noop_with_empty_axes")
    one = at.result.shape is not None and len(at.result.shape) <= 1
    if elements is not None and one and not (noop is not None and noop.as_int()):
        known = [e for e in elements if e is not None]
        at.give_elements([product(known) if len(known) == len(elements) else None])


@registry.register("com.microsoft", "QLinearAveragePool", since_version=1)  # type: ignore[untyped-decorator]
def _qlinear_average_pool(context: ShapeInferenceContext, node: ir.Node) -> None:
    """The package takes the result for as large as the operand."""
    like: _Rule | None = registry.get("", "AveragePool", 22)
    assert like is not None
    if not _channels_last(node):
        like(context, node)


@registry.register("com.microsoft", "QLinearGlobalAveragePool", since_version=1)  # type: ignore[untyped-decorator]
def _qlinear_global_average_pool(context: ShapeInferenceContext, node: ir.Node) -> None:
    """As above."""
    x = node.inputs[0]
    if x is not None and x.shape is not None:
        channels = len(x.shape) - 1 if _channels_last(node) else 1
        dims = [dim if axis in (0, channels) else 1 for axis, dim in enumerate(x.shape)]
        context.set_shape_and_dtype(node.outputs[0], ir.Shape(dims), x.dtype)


def _channels_last(node: ir.Node) -> bool:
    return "channels_last" in node.attributes and bool(node.attributes["channels_last"].as_int())


for _name, _since in (("GatherND", 12), ("Pad", 13), ("Range", 11), ("Trilu", 14)):
    _like: _Rule | None = registry.get("", _name, _since)
    assert _like is not None
    registry.register("com.microsoft", _name, since_version=1)(_like)


@registry.register("com.microsoft", "ExpandDims", since_version=1)  # type: ignore[untyped-decorator]
def _expand_dims(context: ShapeInferenceContext, node: ir.Node) -> None:
    x, axis = node.inputs[0], node.inputs[1]
    if x is not None and x.shape is not None and axis is not None and axis.const_value is not None:
        dims = list(x.shape)
        place = int(axis.const_value.numpy().reshape(-1)[0])
        dims.insert(place if place >= 0 else place + len(dims) + 1, 1)
        context.set_shape_and_dtype(node.outputs[0], ir.Shape(dims), x.dtype)
