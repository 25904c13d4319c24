"""Finds the tensors that can be had in onnxruntime's blocked layout, and those that it pays to have so.

Whether an operator may work on blocks is read off its description: each element of its result has to be made
from those of its own place, or from ones that are broadcast along channels or places.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto

import onnx_ir as ir

from apollo_fuse.blocked import DOMAIN
from apollo_fuse.dtypes import DType
from apollo_fuse.expressions import Apply, Constant, Load
from apollo_fuse.graph import Operator, Primitive, Refused, Shape, Value
from apollo_fuse.index import ONE
from apollo_fuse.symbolic import constant_in

# With 0 in what fills a block up these give a finite number there, which zero weights take away again.
_FINITE_AT_ZERO = frozenset({
    "Abs", "Add", "Celu", "Clip", "Elu", "Erf", "FastGelu", "Gelu", "HardSigmoid", "HardSwish", "Identity",
    "LeakyRelu", "Max", "Mean", "Min", "Mish", "Mul", "Neg", "PRelu", "QuickGelu", "Relu", "Selu",
    "Sigmoid", "Softplus", "Softsign", "Sub", "Sum", "Swish", "Tanh", "ThresholdedRelu",
})  # fmt: skip
_GLOBAL_POOLS = frozenset({"GlobalAveragePool", "GlobalMaxPool"})
_REORDERED_CHANNELS = 4  # ReorderInput takes multiples of this


class Unblockable(Exception):
    """Why a node has to have its operands in rows."""


@dataclass(frozen=True, slots=True)
class Blockable:
    """Finds the tensors in rows that could be had in blocks."""

    block: int
    values: Mapping[ir.Value, Value]
    found: set[ir.Value] = field(default_factory=set)

    def find(
        self, graph: ir.Graph, opened: Sequence[Operator | Refused]
    ) -> tuple[set[ir.Value], tuple[Refused, ...]]:
        refused: list[Refused] = []
        for node, operator in zip(graph, opened, strict=True):
            out = node.outputs[0]
            if reorders(node, "ReorderOutput"):
                if out in self.values:
                    self.found.add(out)
            elif node.domain != DOMAIN and not self.found.isdisjoint(node.inputs):
                try:
                    self._check(node, operator)
                    self.found.add(out)
                except Unblockable as reason:
                    label = node.name or out.name or node.op_type
                    refused.append(
                        Refused((label,), "keep_blocked", f"{node.op_type} needs rows", str(reason))
                    )
        return self.found, tuple(refused)

    def _check(self, node: ir.Node, operator: Operator | Refused) -> None:
        out = self.values.get(node.outputs[0])
        if out is None or len(out.shape) != 4 or out.dtype is not DType.FLOAT32:
            raise Unblockable("the result is no image of float32")
        if out.shape[1].constant is None:
            raise Unblockable(f"the number of channels, {out.shape[1]}, is open")
        if pool(node) is not None:
            return
        if node.op_type == "Concat":
            self._check_concat(node)
        elif node.op_type == "Resize":
            upsampling(node)
        elif isinstance(operator, Refused):
            raise Unblockable(operator.reason)
        else:
            self._check_pointwise(node, operator, out.shape)

    def _check_concat(self, node: ir.Node) -> None:
        if node.attributes["axis"].as_int() not in (1, -3):
            raise Unblockable("it joins along another axis than the channels")
        for value in node.inputs:
            if value not in self.found or not self._is_whole(self.values[value].shape):
                raise Unblockable("an operand is not blocked, or does not fill whole blocks")

    def _is_whole(self, shape: Shape) -> bool:
        channels = shape[1].constant
        return channels is not None and channels % self.block == 0

    def _check_pointwise(self, node: ir.Node, operator: Operator, shape: Shape) -> None:
        if not all(_is_pointwise(primitive) for primitive in operator.primitives):
            raise Unblockable("an element of the result depends on others than those of its place")
        if len(operator.outputs) > 1:
            raise Unblockable("it has several results")
        kinds = [self._kind(value, shape) for value in node.inputs if value is not None]
        read = {load.tensor for primitive in operator.primitives for load in primitive.block.loads}
        for value, kind in zip([v for v in node.inputs if v is not None], kinds, strict=True):
            if kind is not Kind.SCALAR and self.values[value].name not in read:
                raise Unblockable(f"{value.name} is a shape or the like")
        if Kind.WHOLE not in kinds:
            raise Unblockable("no operand has the shape of the result")
        divides = node.op_type == "Div" and kinds[1] is Kind.SCALAR
        if not self._is_whole(shape) and node.op_type not in _FINITE_AT_ZERO and not divides:
            raise Unblockable(f"{shape[1]} channels do not fill blocks of {self.block}")

    def _kind(self, value: ir.Value, shape: Shape) -> Kind:
        known = self.values.get(value)
        if known is None:
            raise Unblockable(f"the shape of {value.name} is unknown")
        kind = kind_of(known.shape, shape)
        if kind is Kind.WHOLE and value not in self.found:
            raise Unblockable(f"{value.name} is not blocked")
        if kind is Kind.CHANNELS and not is_weight(value) and value not in self.found:
            if len(known.shape) != 4 or not self._can_reorder(known):
                raise Unblockable(f"{value.name} cannot be reordered")
        return kind

    def _can_reorder(self, value: Value) -> bool:
        """Whether onnxruntime's ReorderInput takes the tensor."""
        channels = value.shape[-3].constant
        return value.dtype is DType.FLOAT32 and channels is not None and channels % _REORDERED_CHANNELS == 0


class Kind(Enum):
    """How an operand is broadcast to the shape of the result."""

    SCALAR = auto()  # one element
    WHOLE = auto()  # not at all
    CHANNELS = auto()  # one element a channel, or one a channel and a sample
    PLACES = auto()  # the same for all channels


def kind_of(operand: Shape, result: Shape) -> Kind:
    if all(extent.is_one for extent in operand) and len(operand) <= len(result):
        return Kind.SCALAR
    if operand == result:
        return Kind.WHOLE
    batch, channels, *places = [*[ONE] * (4 - len(operand)), *operand]
    if len(operand) <= 4 and batch in (ONE, result[0]):
        if channels == result[1] and all(extent.is_one for extent in places):
            return Kind.CHANNELS
        if channels.is_one:
            return Kind.PLACES
    raise Unblockable(f"an operand of shape [{', '.join(map(str, operand))}] is broadcast")


def _is_pointwise(primitive: Primitive) -> bool:
    """Whether each element is made from elements at its own place alone, or from ones that are broadcast."""
    own = primitive.indices

    def is_own(load: Load) -> bool:
        read = load.indices
        aligned = own[len(own) - len(read) :]
        return len(read) <= len(own) and all(a == b or a.is_zero for a, b in zip(read, aligned, strict=True))

    return primitive.reduction is None and all(
        is_own(item) if isinstance(item, Load) else isinstance(item, Apply | Constant)
        for item in primitive.block.instructions
    )


def wanted_in_blocks(graph: ir.Graph, able: set[ir.Value]) -> set[ir.Value]:
    """The results of nodes that reach a ReorderInput in blocks, or a pool that makes them small."""
    wanted: set[ir.Value] = set()
    for node in reversed(list(graph)):
        out = node.outputs[0]
        if (
            out in able
            and not reorders(node, "ReorderOutput")
            and (
                _shrinks(node)
                or any(u.outputs[0] in wanted or reorders(u, "ReorderInput") for u, _ in out.uses())
            )
        ):
            wanted.add(out)
    return wanted


def in_true_shape(graph: ir.Graph, values: Mapping[ir.Value, Value], wanted: set[ir.Value]) -> set[ir.Value]:
    """The results that are to be had in their true shape: those of broadcasts, and all beside such ones."""
    beside: dict[ir.Value, set[ir.Value]] = {}
    front: list[ir.Value] = []
    for node in graph:
        out = node.outputs[0]
        if out not in wanted or not _is_pointwise_node(node):
            continue
        kinds = {v: kind_of(values[v].shape, values[out].shape) for v in node.inputs if v is not None}
        if not {Kind.CHANNELS, Kind.PLACES}.isdisjoint(kinds.values()):
            front.append(out)
        for value, kind in kinds.items():
            producer = value.producer()
            if kind is Kind.WHOLE and value in wanted and producer and _is_pointwise_node(producer):
                beside.setdefault(out, set()).add(value)
                beside.setdefault(value, set()).add(out)
    found = set(front)
    while front:
        new = beside.get(front.pop(), set()) - found
        found |= new
        front += new
    return found


def _is_pointwise_node(node: ir.Node) -> bool:
    """Whether a node that can be had in blocks is none of the operators that have a form of their own."""
    return pool(node) is None and node.op_type not in ("Concat", "Resize") and node.domain != DOMAIN


def reorders(node: ir.Node, op_type: str) -> bool:
    """Whether the node reorders from or to rows of a channel; there are forms for channels last too."""
    return node.domain == DOMAIN and node.op_type == op_type and not node.attributes.get_int("channels_last")


def pool(node: ir.Node) -> str | None:
    """The operator on blocked tensors that this node's one is on images, where it is a pool."""
    if node.domain:
        return None
    if node.op_type in ("GlobalAveragePool", "GlobalMaxPool"):
        return node.op_type
    if node.op_type in ("AveragePool", "MaxPool"):
        # neither where a maximum is, nor windows with gaps, which the average on blocks does not have
        plain = len(node.outputs) == 1 and all(step == 1 for step in _ints(node, "dilations"))
        return node.op_type if plain else None
    if node.op_type == "ReduceMean":
        axes: Sequence[float] | None = None
        if "axes" in node.attributes:
            axes = node.attributes["axes"].as_ints()
        elif len(node.inputs) > 1:
            axes = _numbers(node.inputs[1])
        keeps = node.attributes.get("keepdims")
        if (
            axes is not None
            and sorted(axis % 4 for axis in axes) == [2, 3]
            and (keeps is None or keeps.as_int())
        ):
            return "GlobalAveragePool"
    return None


def _shrinks(node: ir.Node) -> bool:
    """Whether the node is a pool that leaves a few elements, or one, of many."""
    if node.op_type in ("AveragePool", "MaxPool"):
        return pool(node) is not None and any(step > 1 for step in _ints(node, "strides"))
    return pool(node) is not None


def _ints(node: ir.Node, name: str) -> Sequence[int]:
    return node.attributes[name].as_ints() if name in node.attributes else ()


def upsampling(node: ir.Node) -> list[int]:
    """The factors by which the node repeats rows and columns."""
    attributes = {
        "mode": "nearest",
        "nearest_mode": "round_prefer_floor",
        "coordinate_transformation_mode": "half_pixel",
    }
    found = [node.attributes[n].as_string() if n in node.attributes else d for n, d in attributes.items()]
    scales = node.inputs[2] if len(node.inputs) == 3 else None
    factors = _numbers(scales)
    if found != ["nearest", "floor", "asymmetric"] or factors is None:
        raise Unblockable("it does more than repeat rows and columns")
    if len(factors) != 4 or factors[:2] != [1, 1] or any(f != round(f) or f < 1 for f in factors):
        raise Unblockable(f"its scales are {factors}")
    return [round(factor) for factor in factors]


def _numbers(value: ir.Value | None) -> list[float] | None:
    """What a weight of one axis holds."""
    held = constant_in(value)
    return None if held is None else held.reshape(-1).tolist()


def is_weight(value: ir.Value) -> bool:
    """Whether no caller can give the tensor another value, as it can one that is an input too."""
    return value.is_initializer() and not value.is_graph_input()
