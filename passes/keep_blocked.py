"""Keeps tensors in onnxruntime's blocked layout through operators that do not care about it.

onnxruntime's own layout optimisation keeps few operators beside convolutions blocked: around all others it
reorders to rows and back. Here what lies between a ReorderOutput and a ReorderInput is done on the blocked
tensors as they lie, so that both go away.

A blocked tensor's memory is the row-major [N, C / block, H, W, block], of which onnxruntime knows the shape
[N, C, H, W], C in whole blocks. An operator that combines elements of the same place is right on that. One
operand that is broadcast along some axes, the gate of a squeeze-and-excitation say, makes it and what is
around it operators on the true shape, between Reshapes that move nothing. Nodes are rewritten from
ReorderInputs backwards, so none is where no reorder goes away.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from apollo_fuse.blocked import DOMAIN, whole_blocks
from apollo_fuse.bodies import add_weight
from apollo_fuse.graph import Operator, Refused, Value
from apollo_fuse.passes.blockable import (
    Blockable,
    Kind,
    in_true_shape,
    is_weight,
    kind_of,
    pool,
    reorders,
    upsampling,
    wanted_in_blocks,
)

_OPSET = 7  # the first in which operators broadcast as they do now


@dataclass(frozen=True, slots=True)
class KeepBlocked:
    """Rewrites the graph in place; gives the nodes beside blocked tensors that need rows, with the reasons.

    `values` are the tensors whose shapes are known, `opened` the graph's nodes in order.
    """

    block: int

    def __call__(
        self, graph: ir.Graph, values: Mapping[ir.Value, Value], opened: Sequence[Operator | Refused]
    ) -> tuple[Refused, ...]:
        if self.block < 2 or graph.opset_imports[""] < _OPSET:
            return ()
        able, refused = Blockable(self.block, values).find(graph, opened)
        wanted = wanted_in_blocks(graph, able)
        rewriting = _Rewriting(graph, self.block, values, able, in_true_shape(graph, values, wanted))
        for node in [node for node in graph if node.outputs[0] in wanted]:
            rewriting.rewrite(node)
        rewriting.finish([node for node in graph if node.outputs[0] in wanted])
        return refused


@dataclass(slots=True)
class _Blocked:
    """A tensor in blocks: as onnxruntime's operators know it, and in its true shape."""

    flat: ir.Value | None
    true: ir.Value | None = None


@dataclass(slots=True)
class _Rewriting:
    graph: ir.Graph
    block: int
    values: Mapping[ir.Value, Value]
    able: set[ir.Value]
    in_true_shape: set[ir.Value]
    blocked: dict[ir.Value, _Blocked] = field(default_factory=dict)
    count: int = 0  # of new names

    def rewrite(self, node: ir.Node) -> None:
        """Writes the node's twin on blocked tensors before it."""
        out = node.outputs[0]
        pooling = pool(node)
        if pooling is not None:
            windows = [
                a for name, a in _copied(node).items() if pooling == node.op_type and name != "dilations"
            ]
            twin = self._put(node, pooling, [self._flat(node.inputs[0])], windows, DOMAIN)
        elif node.op_type == "Concat":
            twin = self._put(
                node, "Concat", [self._flat(v) for v in node.inputs], [ir.AttrInt64("axis", 1)], ""
            )
        elif node.op_type == "Resize":
            attributes = [ir.AttrInt64s("scales", upsampling(node)), ir.AttrString("mode", "nearest")]
            twin = self._put(node, "Upsample", [self._flat(node.inputs[0])], attributes, DOMAIN)
        else:
            self._rewrite_pointwise(node)
            return
        self.blocked[out] = _Blocked(twin)

    def _rewrite_pointwise(self, node: ir.Node) -> None:
        out = node.outputs[0]
        shape = self.values[out].shape
        kinds = {v: kind_of(self.values[v].shape, shape) for v in node.inputs if v is not None}
        true = out in self.in_true_shape
        operands: list[ir.Value | None] = []
        for value in node.inputs:
            if value is None:
                operands.append(None)
                continue
            match kinds[value]:
                case Kind.SCALAR:
                    operands.append(value)
                case Kind.WHOLE:
                    operands.append(self._true(value) if true else self._flat(value))
                case Kind.CHANNELS:
                    operands.append(self._gate(value))
                case Kind.PLACES:
                    rank = len(self.values[value].shape)
                    operands.append(self._reshape(value, [0] * rank + [1]))
        twin = self._put(node, node.op_type, operands, list(_copied(node).values()), node.domain)
        self.blocked[out] = _Blocked(None, twin) if true else _Blocked(twin)

    def _put(
        self,
        node: ir.Node,
        op_type: str,
        operands: Sequence[ir.Value | None],
        attributes: Sequence[ir.Attr],
        domain: str,
    ) -> ir.Value:
        return self._insert(op_type, operands, attributes, domain, node, node.outputs[0].name)

    def finish(self, rewritten: Sequence[ir.Node]) -> None:
        """Lets users read blocked tensors in place of reordered ones, and removes what nothing reads then."""
        dead = set(rewritten)
        for node in [node for node in self.graph if reorders(node, "ReorderInput")]:
            source = node.inputs[0]
            if source in self.blocked:
                ir.convenience.replace_all_uses_with(node.outputs[0], self._flat(source))
                self.graph.remove(node, safe=True)
        for node in reversed(rewritten):
            out = node.outputs[0]
            if out.is_graph_output() or any(user not in dead for user, _ in out.uses()):
                self._reorder_output(out)
            self.graph.remove(node, safe=True)
        for node in [node for node in self.graph if reorders(node, "ReorderOutput")]:
            if not node.outputs[0].uses() and not node.outputs[0].is_graph_output():
                self.graph.remove(node, safe=True)
        for value, form in self.blocked.items():
            self._write_once(value, form)

    def _write_once(self, value: ir.Value, form: _Blocked) -> None:
        """Lets those that come behind the flat tensor, as a gate behind its pool, see that in the true shape.

        No kernel can hold them together with what makes the tensor, which then is written in one shape only.
        """
        view = form.flat.producer() if form.flat is not None else None
        if form.flat is None or form.true is None or view is None or form.true not in view.inputs:
            return
        behind = _behind(form.flat)
        users = [(user, place) for user, place in form.true.uses() if user in behind]
        if users:
            again = self._reshape(form.flat, self._true_shape(value))
            for user, place in users:
                user.replace_input_with(place, again)

    # -- the forms of a tensor --------------------------------------------------------------

    def _form(self, value: ir.Value | None) -> _Blocked:
        assert value is not None
        if value not in self.blocked:
            reorder = value.producer()
            assert reorder is not None and reorders(reorder, "ReorderOutput")
            self.blocked[value] = _Blocked(reorder.inputs[0])
        return self.blocked[value]

    def _flat(self, value: ir.Value | None) -> ir.Value:
        form = self._form(value)
        if form.flat is None:
            assert value is not None and form.true is not None
            channels = whole_blocks(self._channels(value), self.block)
            form.flat = self._reshape(form.true, [0, channels, 0, 0])
        return form.flat

    def _true(self, value: ir.Value) -> ir.Value:
        form = self._form(value)
        if form.true is None:
            assert form.flat is not None
            form.true = self._reshape(form.flat, self._true_shape(value))
        return form.true

    def _true_shape(self, value: ir.Value) -> list[int]:
        return [0, whole_blocks(self._channels(value), self.block) // self.block, 0, 0, self.block]

    def _gate(self, value: ir.Value) -> ir.Value:
        """The true shape of a tensor that holds one element a channel, [C, 1, 1] or [N, C, 1, 1]."""
        if value in self.able:
            return self._true(value)
        channels = self._channels(value)
        blocks = whole_blocks(channels, self.block) // self.block
        if not is_weight(value):
            if channels % self.block:
                value = self._insert("ReorderInput", [value], [], DOMAIN, value.producer(), value.name)
            # whole blocks of one element a channel lie there as they do in rows
            return self._reshape(value, [0, blocks, 0, 0, self.block])
        assert value.const_value is not None
        array = value.const_value.numpy()
        rows = array.reshape(*array.shape[:-3], channels)
        filled = np.pad(rows, [(0, 0)] * (rows.ndim - 1) + [(0, blocks * self.block - channels)])
        return self._constant(filled.reshape(*array.shape[:-3], blocks, 1, 1, self.block), value.name)

    def _channels(self, value: ir.Value) -> int:
        channels = self.values[value].shape[-3].constant
        assert channels is not None
        return channels

    # -- new nodes --------------------------------------------------------------------------

    def _reshape(self, value: ir.Value, shape: list[int]) -> ir.Value:
        """The tensor in another shape, in which 0 stands for the extent that it has there."""
        target = self._constant(np.array(shape, np.int64), f"{value.name}_shape")
        return self._insert("Reshape", [value, target], [], "", value.producer(), value.name)

    def _reorder_output(self, value: ir.Value) -> None:
        flat, name = self._flat(value), value.name
        attributes = [ir.AttrInt64("channels", self._channels(value)), ir.AttrInt64("channels_last", 0)]
        value.name = self._name(name)
        rows = self._insert("ReorderOutput", [flat], attributes, DOMAIN, flat.producer(), name)
        ir.convenience.replace_all_uses_with(value, rows, replace_graph_outputs=True)
        rows.shape, rows.type, rows.name = value.shape, value.type, name

    def _constant(self, array: np.ndarray, name: str | None) -> ir.Value:
        return add_weight(self.graph, self._name(name), array)

    def _insert(
        self,
        op_type: str,
        operands: Sequence[ir.Value | None],
        attributes: Sequence[ir.Attr],
        domain: str,
        after: ir.Node | None,
        name: str | None,
    ) -> ir.Value:
        """A new node of one result right after another one, or in front of all."""
        node = ir.Node(domain, op_type, operands, attributes, num_outputs=1, name=self._name(op_type))
        node.outputs[0].name = self._name(name)
        node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
        if after is None:
            self.graph.insert_before(self.graph[0], node)
        else:
            self.graph.insert_after(after, node)
        return node.outputs[0]

    def _name(self, base: str | None) -> str:
        """A name that is not taken."""
        self.count += 1
        return f"{base}_blocked_{self.count}"


def _behind(value: ir.Value) -> set[ir.Node]:
    """The nodes that cannot be computed before the value."""
    found: set[ir.Node] = set()
    front = [value]
    while front:
        new = {user for user, _ in front.pop().uses()} - found
        found |= new
        front += [output for user in new for output in user.outputs]
    return found


def _copied(node: ir.Node) -> dict[str, ir.Attr]:
    return {name: ir.Attr(a.name, a.type, a.value) for name, a in node.attributes.items()}
