"""The graph the partitioner works on: ONNX nodes opened into primitives over typed, symbolic tensors.

A `Primitive` is one tensor defined point by point over its index space, in the manner of tensor
expressions: elementwise operators, broadcasts, views, reductions and contractions all have this
one form and differ only in their access maps.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import IntEnum

import onnx_ir as ir

from apollo_fuse.dtypes import DType
from apollo_fuse.expressions import Apply, Block, Op, Reduction
from apollo_fuse.index import Index, Iterator

Shape = tuple[Index, ...]


class Pattern(IntEnum):
    """What an operator does with its index space; a group has the greatest pattern of its members."""

    RESHAPE = 0  # a view: moves no data by itself
    ELEMENTWISE = 1
    BROADCAST = 2
    INJECTIVE = 3  # transposes, slices, concatenations, gathers: affine or indirect reads
    REDUCTION = 4
    CONTRACTION = 5  # compute-bound; not fused yet
    OPAQUE = 6  # left to onnxruntime


@dataclass(frozen=True, slots=True)
class Value:
    """A tensor; `name` is unique within the graph, row-major, no strides.

    `elements` is what it holds, where shape inference knows that as extents; None for one that it does not.
    """

    name: str
    dtype: DType
    shape: Shape
    elements: tuple[Index | None, ...] | None = None

    def __str__(self) -> str:
        return f"{self.name}: {self.dtype.value}[{', '.join(map(str, self.shape))}]"


@dataclass(frozen=True, slots=True)
class Primitive:
    """``output[indices] = block`` for all `iterators`, combined over those of the reduction.

    An output that several primitives define (a concatenation) is written in parts.

    row_axes: of a tensor that windows slide over, and that is made once for all of them, how many axes, the
        first ones, they stay in one row of; None for any other.
    """

    output: Value
    iterators: tuple[Iterator, ...]
    indices: tuple[Index, ...]
    reduction: Reduction | None
    block: Block
    pattern: Pattern
    row_axes: int | None = None


@dataclass(frozen=True, slots=True)
class Operator:
    """An ONNX node opened into primitives; the unit that the partitioner moves, and swaps back whole."""

    position: int  # place in topological order, over the nodes of all graphs of the model
    op_type: str
    inputs: tuple[Value, ...]  # tensors the primitives read; scalar constants are part of the blocks
    outputs: tuple[Value, ...]  # those of the node's results that something uses
    primitives: tuple[Primitive, ...]
    node: ir.Node
    required: tuple[tuple[Index, Index], ...] = ()  # extents that are equal wherever the model is valid
    maximum: ir.Node | None = None  # the node by which exponents are at most 0, where that is another one

    def results(self) -> dict[ir.Value, Value]:
        """The node's own values for the outputs."""
        own = (self.node.outputs[place] for place in used_outputs(self.node))
        return dict(zip(own, self.outputs, strict=True))

    @property
    def pattern(self) -> Pattern:
        return max(primitive.pattern for primitive in self.primitives)

    @property
    def cost(self) -> int:
        return sum(primitive.block.cost for primitive in self.primitives)


def used_outputs(node: ir.Node) -> tuple[int, ...]:
    """The places of the node's results that are needed; the first is always counted."""
    return tuple(
        place
        for place, value in enumerate(node.outputs)
        if place == 0 or (value.name and (value.uses() or value.is_graph_output()))
    )


@dataclass(frozen=True, slots=True)
class MicroGraph:
    """A convex set of operators that is to become one kernel."""

    operators: tuple[Operator, ...]  # in topological order
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]

    @property
    def pattern(self) -> Pattern:
        return max(operator.pattern for operator in self.operators)

    @property
    def primitives(self) -> tuple[Primitive, ...]:
        nodes = {operator.node for operator in self.operators}
        return tuple(
            primitive
            if operator.maximum is None or operator.maximum in nodes
            else _of_any_exponent(primitive)
            for operator in self.operators
            for primitive in operator.primitives
        )


def _of_any_exponent(primitive: Primitive) -> Primitive:
    """The primitive where the maximum of its exponents comes from outside, and is whatever it is there."""
    instructions = tuple(
        replace(item, op=Op.EXP) if isinstance(item, Apply) and item.op is Op.EXP_NONPOSITIVE else item
        for item in primitive.block.instructions
    )
    return replace(primitive, block=Block(instructions))


@dataclass(frozen=True, slots=True)
class Refused:
    """Why a step could not be taken. The same value is the feedback, the explanation and the report."""

    nodes: tuple[str, ...]
    rule: str
    reason: str
    evidence: str = ""
