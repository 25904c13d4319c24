"""Folds factors and shifts that stand beside convolutions into their weights.

Networks with learnt scales multiply by a number, and add one, behind every convolution and every activation.
onnxruntime folds such constants of one number a channel; those of one number for all stay, each a pass over
memory in rows, between convolutions that else hand on blocks of channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from apollo_fuse.bodies import Names, add_weight, nodes
from apollo_fuse.branches import Infer
from apollo_fuse.graph import Value
from apollo_fuse.symbolic import constant_in, known_in

_OPERATORS = frozenset({"Add", "Sub", "Mul", "Div"})


def fold_scales(model: ir.Model, infer: Infer) -> bool:
    """Rewrites the model in place; gives whether there was something to fold."""
    found = [node for node in nodes(model.graph) if node.op_type == "Conv" and not node.domain]
    convolutions = [_Convolution(node, weights) for node in found if (weights := _weights(node)) is not None]
    for each in convolutions:
        each.fold_behind()
    if any(each.affine_before() is not None for each in convolutions):
        known = known_in(model, infer(model))
        for each in convolutions:
            each.fold_before(known)
    names, changed = Names(model.graph), [each for each in convolutions if each.changed]
    for each in changed:
        each.write(model.graph, names)
    if changed:
        RemoveUnusedNodesPass()(model)
    return bool(changed)


def _weights(node: ir.Node) -> np.ndarray | None:
    """Those of a convolution whose weights and bias are known; in 16 bits, another rounding would show."""
    weights = constant_in(node.inputs[1])
    known = len(node.inputs) < 3 or node.inputs[2] is None or constant_in(node.inputs[2]) is not None
    return weights if known and weights is not None and weights.size and weights.dtype == np.float32 else None


@dataclass(frozen=True, slots=True)
class _Affine:
    """``factor * x + shift``, of shapes ``(channels,)`` or ``(1,)``, in doubles."""

    factor: np.ndarray
    shift: np.ndarray


class _Convolution:
    """A convolution whose weights ``[out, in / groups, ...]`` and bias ``[out]`` are about to change.

    What has changed is in doubles, until it is written.
    """

    def __init__(self, node: ir.Node, weights: np.ndarray) -> None:
        self.node, self.weights, self.changed = node, weights, False
        given = constant_in(node.inputs[2]) if len(node.inputs) > 2 else None
        self.bias = np.zeros(len(weights), weights.dtype) if given is None else given

    def fold_behind(self) -> None:
        """Takes in what alone reads the result."""
        result, graph = self.node.outputs[0], self.node.graph
        assert graph is not None
        while len(users := result.consumers()) == 1 and not result.is_graph_output():
            (node,) = users
            if node.graph is not graph:
                return
            affine = self._affine(node, result, len(self.weights))
            if affine is None or node.outputs[0].is_graph_output():
                return
            factor, shift = affine.factor, affine.shift
            if not self._change(
                self.weights * factor.reshape(-1, *self._ones(1)), self.bias * factor + shift
            ):
                return
            node.outputs[0].replace_all_uses_with(result)
            graph.remove(node, safe=True)

    def affine_before(self) -> tuple[ir.Node, ir.Value, _Affine] | None:
        """What makes the operand, for this convolution alone, and of which value."""
        operand = self.node.inputs[0]
        node = None if operand is None or operand.is_graph_output() else operand.producer()
        if node is None or node.graph is not self.node.graph or len(node.outputs[0].uses()) > 1:
            return None
        if _ends_gelu(node):
            return None  # without its half onnxruntime would know it no more, and take twice as long
        read = next((x for x in node.inputs if x is not None and constant_in(x) is None), None)
        affine = None if read is None else self._affine(node, read, self._channels)
        if read is None or affine is None or (affine.shift.any() and self._pads()):
            return None
        return node, read, affine

    def fold_before(self, known: Mapping[ir.Value, Value]) -> None:
        """Takes in what makes the operand, where that does not make channels or axes of one."""
        while (found := self.affine_before()) is not None:
            node, read, affine = found
            shape = known[read].shape if read in known else ()
            if len(shape) != self.weights.ndim or shape[1].constant != self._channels:
                return
            # the channels that each group of results reads
            factor, shift = (
                np.broadcast_to(x, (self._channels,)).reshape(self._groups, 1, -1, *self._ones(2))
                for x in (affine.factor, affine.shift)
            )
            grouped = self.weights.reshape(self._groups, -1, *self.weights.shape[1:])
            shifts = (grouped * shift).reshape(len(self.weights), -1).sum(1)
            if not self._change((grouped * factor).reshape(self.weights.shape), self.bias + shifts):
                return
            self.node.replace_input_with(0, read)
            assert node.graph is not None
            node.graph.remove(node, safe=True)

    def write(self, graph: ir.Graph, names: Names) -> None:
        """Gives the node its new weights."""
        self.node.resize_inputs(3)
        for place, ending, array in ((1, "weights", self.weights), (2, "bias", self.bias)):
            name = names.like(self.node.outputs[0], ending)
            written = np.ascontiguousarray(array, np.float32)
            self.node.replace_input_with(place, add_weight(graph, name, written))

    def _change(self, weights: np.ndarray, bias: np.ndarray) -> bool:
        """Takes new weights, in doubles, unless some of them would be lost in their own type."""
        limits, lost = np.finfo(np.float32), np.abs(weights)
        if max(lost.max(), np.abs(bias).max()) > limits.max or (lost[self.weights != 0] < limits.tiny).any():
            return False
        self.weights, self.bias, self.changed = weights, bias, True
        return True

    def _affine(self, node: ir.Node, read: ir.Value, channels: int) -> _Affine | None:
        """What the node does with the tensor it reads, where that is the same in all of a channel."""
        if node.domain or node.op_type not in _OPERATORS or len(node.inputs) != 2:
            return None
        first, second = node.inputs
        if node.op_type in ("Sub", "Div") and first is not read:
            return None
        array = constant_in(second if first is read else first)
        numbers = None if array is None else _by_channel(array, self.weights.ndim, channels)
        if numbers is None or not np.isfinite(numbers).all():
            return None
        one, zero = np.ones(1), np.zeros(1)
        if node.op_type in ("Add", "Sub"):
            return _Affine(one, numbers if node.op_type == "Add" else -numbers)
        if not numbers.all():
            return None  # what is infinite times zero is no number
        return _Affine(numbers if node.op_type == "Mul" else 1 / numbers, zero)

    @property
    def _channels(self) -> int:
        """Of the operand."""
        return int(self.weights.shape[1]) * self._groups

    @property
    def _groups(self) -> int:
        return self.node.attributes.get_int("group", 1)

    def _pads(self) -> bool:
        """Whether results at the border may see zeros that the shift does not reach."""
        attributes = self.node.attributes
        placed = attributes.get_string("auto_pad", "NOTSET")
        return placed not in ("NOTSET", "VALID") or any(attributes.get_ints("pads", ()))

    def _ones(self, less: int) -> tuple[int, ...]:
        return (1,) * (self.weights.ndim - less)


def _ends_gelu(node: ir.Node) -> bool:
    """Whether this is the last product of ``0.5 * (x * (1 + erf(x / sqrt 2)))``, or of that with a tanh."""
    products = [made for made in node.predecessors() if made.op_type == "Mul"]
    sums = [made for product in products for made in product.predecessors() if made.op_type == "Add"]
    return any(made.op_type in ("Erf", "Tanh") for total in sums for made in total.predecessors())


def _by_channel(array: np.ndarray, rank: int, channels: int) -> np.ndarray | None:
    """The constant's numbers, if it has one for each channel of tensors of this rank, or one for all."""
    shape = (1,) * (rank - array.ndim) + array.shape
    if len(shape) != rank or any(extent != 1 for axis, extent in enumerate(shape) if axis != 1):
        return None
    return array.reshape(-1).astype(np.float64) if array.size in (1, channels) else None
