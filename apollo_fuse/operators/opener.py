"""Opens one ONNX node into primitives: the small tensor language that operators are described in.

An operator's description is a function from an `Opener` to its result tensors.  It reads operands
with `Opener.tensor`, combines them with Python operators and the methods of `Tensor`, and each step
becomes one primitive; a description that meets a case it does not cover raises `Unsupported`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Iterator as Generator
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import numpy as np
import onnx_ir as ir

from apollo_fuse.dimensions import broadcast_extent, wide_extents
from apollo_fuse.dtypes import DType
from apollo_fuse.expressions import Apply, Block, BlockBuilder, Constant, Load, Op, Position, Reduction
from apollo_fuse.graph import Pattern, Primitive, Shape, Value
from apollo_fuse.index import ONE, ZERO, Index, Iterator, delinearise, linearise, minimum, product


class Unsupported(Exception):
    """A node that kernels do not cover; the message says which part of it."""


Scalar: TypeAlias = "Tensor | float | int | bool"


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor of the description: a value, or a constant that holds one number everywhere."""

    opener: Opener
    dtype: DType
    shape: Shape
    content: str | Constant

    def __add__(self, other: Scalar) -> Tensor:
        return self.opener.apply(Op.ADD, self, other)

    def __radd__(self, other: Scalar) -> Tensor:
        return self.opener.apply(Op.ADD, other, self)

    def __sub__(self, other: Scalar) -> Tensor:
        return self.opener.apply(Op.SUB, self, other)

    def __rsub__(self, other: Scalar) -> Tensor:
        return self.opener.apply(Op.SUB, other, self)

    def __mul__(self, other: Scalar) -> Tensor:
        return self.opener.apply(Op.MUL, self, other)

    def __rmul__(self, other: Scalar) -> Tensor:
        return self.opener.apply(Op.MUL, other, self)

    def __truediv__(self, other: Scalar) -> Tensor:
        return self.opener.apply(Op.DIV, self, other)

    def __rtruediv__(self, other: Scalar) -> Tensor:
        return self.opener.apply(Op.DIV, other, self)

    def __neg__(self) -> Tensor:
        return self.opener.apply(Op.NEG, self)

    def __lt__(self, other: Scalar) -> Tensor:
        return self.opener.apply(Op.LT, self, other)

    def __le__(self, other: Scalar) -> Tensor:
        return self.opener.apply(Op.LE, self, other)

    def __gt__(self, other: Scalar) -> Tensor:
        return self.opener.apply(Op.LT, other, self)

    def __ge__(self, other: Scalar) -> Tensor:
        return self.opener.apply(Op.LE, other, self)

    def quotient(self, other: Scalar) -> Tensor:
        """A division that no pass makes cheaper: what it gives is rounded to an integer, or compared."""
        return self.opener.apply(Op.QUOTIENT, self, other)

    def equal(self, other: Scalar) -> Tensor:
        return self.opener.apply(Op.EQ, self, other)

    def maximum(self, other: Scalar) -> Tensor:
        return self.opener.apply(Op.MAX, self, other)

    def minimum(self, other: Scalar) -> Tensor:
        return self.opener.apply(Op.MIN, self, other)

    def call(self, op: Op) -> Tensor:
        """A function of one argument."""
        return self.opener.apply(op, self)

    def select(self, then: Scalar, otherwise: Scalar) -> Tensor:
        """``then`` where this (bool) tensor holds, ``otherwise`` elsewhere."""
        return self.opener.apply(Op.SELECT, self, then, otherwise)

    def cast(self, dtype: DType) -> Tensor:
        return self if dtype is self.dtype else self.opener.cast(self, dtype)

    def reduce(self, op: Op, axes: Sequence[int], keepdims: bool = True) -> Tensor:
        return self.opener.reduce(op, self, axes, keepdims)

    def mean(self, axes: Sequence[int], keepdims: bool = True) -> Tensor:
        count = product(self.shape[axis] for axis in axes)
        total = self.reduce(Op.ADD, axes, keepdims)
        return total / self.opener.position(count, self.dtype.compute).cast(self.dtype)

    def view(
        self,
        shape: Shape,
        access: Callable[[tuple[Index, ...]], tuple[Index, ...]],
        pattern: Pattern = Pattern.INJECTIVE,
    ) -> Tensor:
        """The tensor of this shape whose element at ``i`` is this tensor's element at ``access(i)``."""
        return self.opener.view(self, shape, access, pattern)

    def reshape(self, shape: Shape) -> Tensor:
        if product(shape) != product(self.shape):
            raise Unsupported(
                f"cannot prove that {_text(self.shape)} and {_text(shape)} hold as many elements"
            )
        source = self.shape
        return self.view(shape, lambda at: delinearise(linearise(at, shape), source), Pattern.RESHAPE)


def unheld(value: ir.Value) -> str:
    """Why kernels cannot hold a value that is none of `Opener.values`."""
    if value.dtype is not None and DType.of_onnx(value.dtype.value) is None:
        return f"is of type {value.dtype.name.lower()}"
    return "has an unknown shape or type"


def floating(x: Tensor) -> Tensor:
    """The tensor, where its type is a floating-point one; raises Unsupported elsewhere."""
    if not x.dtype.is_float:
        raise Unsupported(f"defined for floating-point types only, not {x.dtype.value}")
    return x


@dataclass(slots=True)
class Opener:
    """One node being opened. Raises `Unsupported` from any method where the node goes beyond kernels."""

    node: ir.Node
    position_in_graph: int
    opset: int
    values: Mapping[ir.Value, Value]
    names: Generator[int] = field(default_factory=itertools.count)
    primitives: list[Primitive] = field(default_factory=list)
    required: list[tuple[Index, Index]] = field(default_factory=list)
    maximum: ir.Node | None = None  # what the exponents of the description are known to be below

    # -- operands ---------------------------------------------------------------------------

    def has(self, place: int) -> bool:
        return place < len(self.node.inputs) and self.node.inputs[place] is not None

    def tensor(self, place: int, as_operand: bool = False) -> Tensor:
        """The operand at `place`; a constant that belongs to the operation becomes part of the expression.

        With `as_operand` it is read from memory in any case, as an index tensor has to be.
        """
        source = self._input(place)
        value = self.values.get(source)
        if value is None:
            raise Unsupported(f"input {place} {unheld(source)}")
        constant = source.const_value
        if not as_operand and constant is not None and constant.size == 1 and _is_structural(constant):
            number = constant.numpy().reshape(-1)[0].item()
            return Tensor(self, value.dtype, value.shape, Constant(number, value.dtype))
        return Tensor(self, value.dtype, value.shape, value.name)

    def constant(self, place: int) -> np.ndarray[tuple[int, ...], np.dtype[np.generic]]:
        """The operand's value, where it is known when compiling."""
        constant = self._input(place).const_value
        if constant is None:
            raise Unsupported(f"input {place} is not a constant")
        array: np.ndarray[tuple[int, ...], np.dtype[np.generic]] = constant.numpy()
        return array

    def holds_nothing_but(self, number: float, place: int) -> bool:
        """Whether the operand is known when compiling, and each of its elements is this number."""
        constant = self._input(place).const_value
        return constant is not None and bool((constant.numpy() == number).all())

    def integers(self, place: int, attribute: str) -> tuple[int, ...] | None:
        """A list of integers given as an operand in newer opsets and as an attribute in older ones."""
        if self.has(place):
            return tuple(int(x) for x in self.constant(place).reshape(-1))
        found = self.node.attributes.get(attribute)
        return None if found is None else tuple(found.as_ints())

    def extents(self, place: int, attribute: str) -> tuple[Index | None, ...] | None:
        """The same where the integers may follow from shapes; None for one that inference does not know."""
        value = self.values.get(self._input(place)) if self.has(place) else None
        if value is not None and value.elements is not None and self._input(place).const_value is None:
            return value.elements
        known = self.integers(place, attribute)
        return None if known is None else tuple(map(Index.of, known))

    def integer(self, name: str, default: int) -> int:
        found = self.node.attributes.get(name)
        return default if found is None else int(found.as_int())

    def number(self, name: str, default: float) -> float:
        """A float attribute; ONNX stores it in single precision, and so does the result."""
        found = self.node.attributes.get(name)
        return float(np.float32(default if found is None else found.as_float()))

    def numbers(self, name: str, default: tuple[int, ...]) -> tuple[int, ...]:
        """A list of integers that is an attribute in every opset."""
        found = self.node.attributes.get(name)
        return default if found is None else tuple(found.as_ints())

    def text(self, name: str, default: str) -> str:
        found = self.node.attributes.get(name)
        return default if found is None else str(found.as_string())

    def output_shape(self, place: int = 0) -> Shape:
        """The shape that shape inference found."""
        value = self.values.get(self.node.outputs[place])
        if value is None:
            raise Unsupported(f"the output {unheld(self.node.outputs[place])}")
        return value.shape

    def output_dtype(self, place: int = 0) -> DType:
        dtype = self.node.outputs[place].dtype
        found = None if dtype is None else DType.of_onnx(dtype.value)
        if found is None:
            raise Unsupported(f"the output {unheld(self.node.outputs[place])}")
        return found

    def require_equal(self, found: Index, expected: Index) -> None:
        """States what every valid run of the model implies; a kernel checks it before it runs."""
        if found != expected:
            self.required.append((found, expected))

    def axis(self, axis: int, rank: int) -> int:
        if not -rank <= axis < rank:
            raise Unsupported(f"axis {axis} lies outside rank {rank}")
        return axis % rank

    # -- primitives -------------------------------------------------------------------------

    def scalar(self, value: float | int | bool, dtype: DType) -> Tensor:
        if dtype is DType.FLOAT32:
            value = float(np.float32(value))
        return Tensor(self, dtype, (), Constant(value, dtype))

    def position(self, index: Index, dtype: DType) -> Tensor:
        """An extent as a number."""
        known = index.constant
        if known is not None:
            return self.scalar(float(known) if dtype.is_float else known, dtype)
        block = Block((Position(index, dtype),))
        return self._define((), (), (), None, block, Pattern.ELEMENTWISE)

    def computed(self, shape: Shape, index: Callable[[tuple[Index, ...]], Index]) -> Tensor:
        """The int64 tensor of this shape that holds ``index(i)`` at ``i``."""
        iterators, at = self._iterators(shape)
        block = Block((Position(index(at), DType.INT64),))
        return self._define(shape, iterators, at, None, block, Pattern.ELEMENTWISE)

    def filled(self, shape: Shape, value: float | int | bool, dtype: DType) -> Tensor:
        """The tensor of this shape that holds one number everywhere."""
        iterators, at = self._iterators(shape)
        return self._define(shape, iterators, at, None, Block((Constant(value, dtype),)), Pattern.ELEMENTWISE)

    def coordinate(self, shape: Shape, axis: int) -> Tensor:
        """For each place of a tensor of this shape, where along the axis it lies; an int64 tensor."""
        return self.computed(shape, lambda at: at[axis])

    def apply(self, op: Op, *arguments: Scalar, dtype: DType | None = None) -> Tensor:
        """An elementwise operation with broadcasting; numbers take the type of the tensors beside them."""
        tensors = [a for a in arguments if isinstance(a, Tensor)]
        like = tensors[-1].dtype
        operands = [a if isinstance(a, Tensor) else self.scalar(a, like) for a in arguments]
        data = operands[1:] if op is Op.SELECT else operands
        if len({t.dtype for t in data}) != 1:
            raise Unsupported(f"operands of different types: {', '.join(t.dtype.value for t in data)}")
        comparison = op in (Op.EQ, Op.LT, Op.LE, Op.IS_NAN, Op.IS_INF)
        result = dtype or (DType.BOOL if comparison else data[0].dtype)
        shape = _broadcast([t.shape for t in operands])
        iterators, at = self._iterators(shape)
        builder = BlockBuilder()
        places = tuple(self._read(builder, t, self.aligned(at, shape, t.shape)) for t in operands)
        builder.add(Apply(op, places, result))
        same = all(t.shape == shape for t in operands if not isinstance(t.content, Constant))
        pattern = Pattern.ELEMENTWISE if same else Pattern.BROADCAST
        return self._define(shape, iterators, at, None, builder.build(), pattern)

    def cast(self, tensor: Tensor, dtype: DType) -> Tensor:
        return self.apply(Op.CAST, tensor, dtype=dtype)

    def reduce(self, op: Op, tensor: Tensor, axes: Sequence[int], keepdims: bool) -> Tensor:
        """Combines the elements along `axes`; half types accumulate in single precision."""
        reduced = {self.axis(axis, len(tensor.shape)) for axis in axes}
        iterators, at = self._iterators(tensor.shape)
        over = tuple(i for i in iterators if any(at[a] == Index.of(i) for a in reduced))
        kept = tuple(i for i in iterators if i not in over)
        builder = BlockBuilder()
        place = self._read(builder, tensor, at)
        if tensor.dtype is not tensor.dtype.compute:
            builder.add(Apply(Op.CAST, (place,), tensor.dtype.compute))
        axes = [axis for axis in range(len(tensor.shape)) if keepdims or axis not in reduced]
        shape = tuple(ONE if axis in reduced else tensor.shape[axis] for axis in axes)
        target = tuple(ZERO if axis in reduced else at[axis] for axis in axes)
        reduction = Reduction(op, over)
        result = self._define(shape, kept, target, reduction, builder.build(), Pattern.REDUCTION)
        return result.cast(tensor.dtype)

    def view(
        self,
        tensor: Tensor,
        shape: Shape,
        access: Callable[[tuple[Index, ...]], tuple[Index, ...]],
        pattern: Pattern,
    ) -> Tensor:
        if isinstance(tensor.content, Constant):
            return Tensor(self, tensor.dtype, shape, tensor.content)
        iterators, at = self._iterators(shape)
        builder = BlockBuilder()
        self._read(builder, tensor, access(at))
        return self._define(shape, iterators, at, None, builder.build(), pattern)

    def kept(self, tensor: Tensor, row_axes: int) -> Tensor:
        """What was defined last, as a tensor that is made once, row by row, for windows over it."""
        last = self.primitives.pop()
        assert last.output.name == tensor.content
        self.primitives.append(replace(last, pattern=Pattern.REDUCTION, row_axes=row_axes))
        return tensor

    def concatenate(self, tensors: Sequence[Tensor], axis: int) -> Tensor:
        """The tensors one after the other along the axis."""
        first = tensors[0].shape
        parts: list[tuple[Tensor, Shape]] = []
        offset = ZERO
        for tensor in tensors:
            if any(a != b for n, (a, b) in enumerate(zip(tensor.shape, first, strict=True)) if n != axis):
                raise Unsupported(f"cannot prove that {_text(tensor.shape)} and {_text(first)} fit together")
            parts.append((tensor, tuple(offset if n == axis else ZERO for n in range(len(first)))))
            offset = offset + tensor.shape[axis]
        return self.assemble((*first[:axis], offset, *first[axis + 1 :]), parts)

    def assemble(self, shape: Shape, parts: Sequence[tuple[Tensor, Shape]]) -> Tensor:
        """A tensor written in parts: each with the place of its first element. They must cover it all."""
        output = Value(f"t{self.position_in_graph}_{len(self.primitives)}", parts[0][0].dtype, shape)
        for tensor, origin in parts:
            iterators, at = self._iterators(tensor.shape)
            builder = BlockBuilder()
            self._read(builder, tensor, at)
            target = tuple(index + start for index, start in zip(at, origin, strict=True))
            primitive = Primitive(output, iterators, target, None, builder.build(), Pattern.INJECTIVE)
            self.primitives.append(primitive)
        return Tensor(self, output.dtype, shape, output.name)

    def aligned(self, at: tuple[Index, ...], shape: Shape, operand: Shape) -> tuple[Index, ...]:
        """The indices at which an operand is read when the broadcast result is computed at `at`.

        An extent that may turn out to be 1, or else is the result's, is read no further than it goes.
        """
        skipped = len(shape) - len(operand)
        places: list[Index] = []
        for index, extent, result in zip(at[skipped:], operand, shape[skipped:], strict=True):
            if extent.is_one:
                places.append(ZERO)
            elif extent == result:
                places.append(index)
            else:
                self.require_equal((extent - 1) * (extent - result), ZERO)
                places.append(minimum(index, extent - 1))
        return tuple(places)

    # -- internals --------------------------------------------------------------------------

    def _input(self, place: int) -> ir.Value:
        source = self.node.inputs[place] if place < len(self.node.inputs) else None
        if source is None:
            raise Unsupported(f"input {place} is missing")
        return source

    def _iterators(self, shape: Shape) -> tuple[tuple[Iterator, ...], tuple[Index, ...]]:
        iterators: list[Iterator] = []
        at: list[Index] = []
        for extent in shape:
            if extent.is_one:
                at.append(ZERO)
            else:
                iterators.append(Iterator(f"i{next(self.names)}", extent))
                at.append(Index.of(iterators[-1]))
        return tuple(iterators), tuple(at)

    def _read(self, builder: BlockBuilder, tensor: Tensor, indices: tuple[Index, ...]) -> int:
        if isinstance(tensor.content, Constant):
            return builder.add(tensor.content)
        return builder.add(Load(tensor.content, indices, tensor.dtype))

    def _define(
        self,
        shape: Shape,
        iterators: tuple[Iterator, ...],
        indices: tuple[Index, ...],
        reduction: Reduction | None,
        block: Block,
        pattern: Pattern,
    ) -> Tensor:
        name = f"t{self.position_in_graph}_{len(self.primitives)}"
        output = Value(name, block.dtype, shape)
        self.primitives.append(Primitive(output, iterators, indices, reduction, block, pattern))
        return Tensor(self, output.dtype, shape, name)


def _is_structural(constant: ir.TensorProtocol) -> bool:
    """Tells the numbers of a formula (2, 0.5, 6) from learnt ones, which stay operands.

    Kernels that differ in learnt numbers only are then one kernel.
    """
    number = constant.numpy().reshape(-1)[0].item()
    return not isinstance(number, float) or not math.isfinite(number) or number * 2 == round(number * 2)


def _broadcast(shapes: Sequence[Shape]) -> Shape:
    rank = max(len(shape) for shape in shapes)
    result: list[Index] = []
    for axis in range(-rank, 0):
        wide = wide_extents(shapes, axis)
        extent = broadcast_extent(wide)
        if extent is None:
            found = " and ".join(sorted(map(str, wide)))
            raise Unsupported(f"cannot prove that the extents {found} are equal")
        result.append(extent)
    return tuple(result)


def _text(shape: Shape) -> str:
    return f"[{', '.join(map(str, shape))}]"
