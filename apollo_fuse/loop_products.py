"""Takes out of loops what need not be computed in each iteration.

Exporters write recurrent networks as a Loop or a Scan whose iteration reads a row of the input and multiplies
it by weights, and so reads all weights for one row. The rows are there before the loop starts: one product of
all of them reads the weights once, and an iteration reads a row of the result. What an iteration makes of its
own state stays inside, but weights are read from outside of the loop instead of being handed on by each
iteration: onnxruntime then knows them, and packs them beforehand. And what each iteration computes anew of
the same tensors (the keys that a decoder attends to) is computed once, where it cannot fail: a loop may run
no iteration.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from apollo_fuse.bodies import Names, bodies, nodes, of_scanned
from apollo_fuse.branches import Infer
from apollo_fuse.graph import Shape, Value
from apollo_fuse.products import bias, is_product, is_transposed
from apollo_fuse.symbolic import constant_in, known_in

_MOST_GROWTH = 32
"""How many times as large as the rows their product may be, since it lies in memory as a whole."""
_SAME_NUMBER = frozenset({"Cast", "Identity", "Reshape", "Squeeze", "Unsqueeze"})
_NEVER_FAIL = frozenset({"Cast", "Identity"})
"""Of numbers."""
_POINTWISE = frozenset(
    {"Abs", "Add", "Div", "Erf", "Exp", "Mul", "Neg", "Relu", "Sigmoid", "Softplus", "Sqrt", "Sub", "Tanh"}
)
"""Never fail on floats whose shapes fit."""
_ONCE = _NEVER_FAIL | _POINTWISE | {"Transpose"}
_MOST_UNREAD = 8
"""How many rows for each that is read may be multiplied: a product of many takes less time for each."""


def take_out_of_loops(model: ir.Model, infer: Infer) -> bool:
    """Rewrites the model in place; gives whether there was something to take out."""
    found = [_loop(node) for node in nodes(model.graph) if node.op_type in ("Loop", "Scan") and bodies(node)]
    loops = found[::-1]  # what leaves one loop may leave the one around it
    if not loops:
        return False
    names = Names(model.graph)
    changed = any([loop.read_outside() for loop in loops])
    if any(map(_Loop.may_give, loops)):
        known = known_in(model, infer(model))
        changed |= any([loop.take_same_out(known, names) for loop in loops])
        changed |= any([loop.take_products_out(known, names) for loop in loops])
    if changed:
        RemoveUnusedNodesPass()(model)
    return changed


@dataclass(frozen=True, slots=True)
class _Row:
    """What an iteration reads of a tensor: one along `axis`; `place` says which, in the loop's own way."""

    of: ir.Value
    axis: int
    place: ir.Value


class _Loop:
    """A Loop: its iterations read rows by Gather, at a place that moves on."""

    def __init__(self, node: ir.Node) -> None:
        assert isinstance(node.graph, ir.Graph)
        self.node, self.around = node, node.graph
        (self.body,) = bodies(node)

    # -- what a Scan has otherwise ------------------------------------------------------------------

    @property
    def states(self) -> range:
        """The places of what is carried on, among the operands and the body's inputs alike."""
        return range(2, len(self.node.inputs))

    @property
    def results(self) -> list[ir.Value]:
        """What the body makes of its states."""
        return list(self.body.outputs[1:])

    def row(self, value: ir.Value) -> _Row | None:
        """What `value` is a row of, where each iteration reads another one."""
        node = value.producer()
        if node is None or node.graph is not self.body or node.op_type != "Gather" or node.domain:
            return None
        data, place = node.inputs
        assert data is not None and place is not None
        if not self._is_outside(data) or not self._moves_on(place):
            return None
        return _Row(data, node.attributes.get_int("axis", 0), place)

    def reads_few(self, row: _Row, known: Mapping[ir.Value, Value]) -> bool:
        """Whether the loop is known to end long before the rows do."""
        trips, shape = constant_in(self.node.inputs[0]), known[row.of].shape
        rows = shape[row.axis % len(shape)].constant
        return trips is not None and rows is not None and rows > _MOST_UNREAD * trips.item()

    def read_row(self, made: ir.Value, like: _Row, names: Names) -> ir.Node:
        """A node that gives the row of `made` at the place of another row."""
        return ir.node("Gather", [made, like.place], {"axis": like.axis})

    # -- what stays the same ------------------------------------------------------------------------

    def read_outside(self) -> bool:
        """Lets the body read from outside what iterations only hand on; gives whether there was any."""
        results, changed = self.results, False
        for place in self.states:
            state, operand = self.body.inputs[place], self.node.inputs[place]
            if operand is not None and _original(results[place - self.states[0]]) is state:
                for user, number in state.uses():
                    user.replace_input_with(number, operand)
                    changed = True
        return changed

    def may_give(self) -> bool:
        """Whether there is something in the body that may leave it, as far as one can tell without shapes."""
        return any(is_product(node) or self._is_same(node) for node in self.body)

    def _is_same(self, node: ir.Node) -> bool:
        """Whether each iteration computes the same here, and the loop alone needs it."""
        operands = [x for x in node.inputs if x is not None]
        return (
            (node.op_type in _ONCE or is_product(node))
            and not node.domain
            and not node.outputs[0].is_graph_output()
            and not all(x.graph is self.body for x in operands)  # made of the body's own weights alone
            and all(map(self._is_outside, operands))
        )

    def take_same_out(self, known: Mapping[ir.Value, Value], names: Names) -> bool:
        """Computes before the loop what is the same in all iterations; gives whether there was any."""
        changed = False
        for node in list(self.body):
            if self._is_same(node) and _cannot_fail(node, known):
                for operand in filter(None, node.inputs):
                    self._moved_out(operand)
                self.body.remove(node)
                node.name = names.like(node.outputs[0], "outside")  # another loop's may have the same
                self.around.insert_before(self.node, node)
                changed = True
        return changed

    def _is_outside(self, value: ir.Value) -> bool:
        """Whether the value is there before the loop, or is a weight of the body that can be."""
        if value.graph is not self.body:
            return True
        return value.is_initializer() and not value.is_graph_input() and not value.is_graph_output()

    def _moved_out(self, value: ir.Value) -> ir.Value:
        """The value, which is moved out of the body if it is a weight there."""
        if value.is_initializer() and value.graph is self.body:
            del self.body.initializers[value.name or ""]
            self.around.register_initializer(value)
        return value

    # -- products -----------------------------------------------------------------------------------

    def take_products_out(self, known: Mapping[ir.Value, Value], names: Names) -> bool:
        """Gives whether there were any; `known` may lack tensors that this makes."""
        changed = False
        for node in list(self.body):
            row, weights = node.inputs[:2] if is_product(node) else (None, None)
            read = None if row is None else self.row(row)
            if read is None or weights is None or not self._is_outside(weights):
                continue
            if read.of not in known or weights not in known or not _is_one_of_rows(node, read, known):
                continue
            if not self.reads_few(read, known):
                self._take_out(node, read, self._moved_out(weights), names)
                changed = True
        return changed

    def _take_out(self, node: ir.Node, row: _Row, weights: ir.Value, names: Names) -> None:
        """Multiplies all rows before the loop, and reads the product's row in the place of `node`."""
        result = node.outputs[0]

        def made(node: ir.Node, ending: str) -> ir.Value:
            made = node.outputs[0]
            node.name = made.name = names.like(result, ending)
            made.type = result.type
            return made

        if is_transposed(node):
            turned = ir.node("Transpose", [weights], {"perm": [1, 0]})
            self.around.insert_before(self.node, turned)
            weights = made(turned, "weights")
        product = ir.node("MatMul", [self._moved_out(row.of), weights])
        self.around.insert_before(self.node, product)
        read = self.read_row(made(product, "rows"), row, names)
        self.body.insert_before(node, read)
        taken = made(read, "row")
        added = bias(node)
        if added is not None:
            biased = ir.node("Add", [taken, added])
            self.body.insert_before(node, biased)
            taken = made(biased, "biased")
        taken.shape = result.shape
        result.replace_all_uses_with(taken, replace_graph_outputs=True)
        self.body.remove(node, safe=True)

    # -- places -------------------------------------------------------------------------------------

    def _moves_on(self, value: ir.Value) -> bool:
        """Whether this is a counter, or its distance from what stays: another place in each iteration.

        Rows whose place is computed some other way (a token's in an embedding) may be few of very many.
        """
        if value in self.body.inputs:
            place = self.body.inputs.index(value)
            return place == 0 or (place in self.states and self._counts(place))
        node = value.producer()
        if node is None or node.graph is not self.body or node.domain:
            return False
        operands = [x for x in node.inputs if x is not None]
        if node.op_type in _SAME_NUMBER:
            return self._moves_on(operands[0])
        if node.op_type not in ("Add", "Sub"):
            return False
        moving = [x for x in operands if not self._is_outside(x)]
        return len(moving) == 1 and self._moves_on(moving[0])

    def _counts(self, place: int) -> bool:
        """Whether the state at `place` moves by 1 in an iteration."""
        state = self.body.inputs[place]
        node = _original(self.results[place - self.states[0]]).producer()
        if node is None or node.op_type not in ("Add", "Sub") or node.domain or state not in node.inputs:
            return False
        if node.op_type == "Sub" and node.inputs[0] is not state:
            return False
        steps = [constant_in(x) for x in node.inputs if x is not state]
        return any(step is not None and step.size == 1 and abs(step.item()) == 1 for step in steps)


class _Scan(_Loop):
    """A Scan: its iterations are given rows as inputs of the body."""

    @property
    def _scanned(self) -> int:
        return self.node.attributes["num_scan_inputs"].as_int()

    @property
    def states(self) -> range:
        return range(len(self.node.inputs) - self._scanned)

    @property
    def results(self) -> list[ir.Value]:
        return list(self.body.outputs)

    def row(self, value: ir.Value) -> _Row | None:
        if value not in self.body.inputs:
            return None
        place = self.body.inputs.index(value)
        operand = self.node.inputs[place]
        if place in self.states or operand is None:
            return None
        return _Row(operand, of_scanned(self.node, "axes")[place - len(self.states)], value)

    def reads_few(self, row: _Row, known: Mapping[ir.Value, Value]) -> bool:
        return False

    def read_row(self, made: ir.Value, like: _Row, names: Names) -> ir.Node:
        number = self.body.inputs.index(like.place) - len(self.states)
        for what in ("axes", "directions"):
            numbers, name = of_scanned(self.node, what), f"scan_input_{what}"
            self.node.attributes[name] = ir.AttrInt64s(name, [*numbers, numbers[number]])
        self.node.attributes["num_scan_inputs"] = ir.AttrInt64("num_scan_inputs", self._scanned + 1)
        self.node.resize_inputs(len(self.node.inputs) + 1)
        self.node.replace_input_with(len(self.node.inputs) - 1, made)
        row = ir.Value(name=names.like(made, "scanned"), type=made.type)
        self.body.inputs.append(row)
        return ir.node("Identity", [row])  # the row may be a result, which no input of a body can be


def _loop(node: ir.Node) -> _Loop:
    return _Loop(node) if node.op_type == "Loop" else _Scan(node)


def _original(value: ir.Value) -> ir.Value:
    """What this is a copy of."""
    while (copied := value.producer()) is not None and copied.op_type == "Identity" and not copied.domain:
        assert copied.inputs[0] is not None
        value = copied.inputs[0]
    return value


def _cannot_fail(node: ir.Node, known: Mapping[ir.Value, Value]) -> bool:
    """Whether what the node reads fits together, and it makes about as much as it reads."""
    operands = [x for x in node.inputs if x is not None]
    if node.op_type in _NEVER_FAIL:
        return operands[0] in known or operands[0].dtype not in (None, ir.DataType.STRING)
    if any(x not in known for x in (*operands, node.outputs[0])):
        return False
    shapes, made = [known[x].shape for x in operands], known[node.outputs[0]]
    if node.op_type == "Transpose":
        axes = range(len(shapes[0]))
        return sorted(node.attributes.get_ints("perm", axes)) == [*axes]
    if node.op_type in _POINTWISE:
        whole = next((x for x, shape in zip(operands, shapes, strict=True) if shape == made.shape), None)
        others = (shape for x, shape in zip(operands, shapes, strict=True) if x is not whole)
        return whole is not None and made.dtype.is_float and all(_fits(x, made.shape) for x in others)
    first, second, *added = shapes
    if not first or not _is_matrix(node, second) or (node.op_type == "Gemm" and len(first) != 2):
        return False
    return first[-1] == second[1 if is_transposed(node) else 0] and all(_fits(x, made.shape) for x in added)


def _fits(shape: Shape, made: Shape) -> bool:
    """Whether a tensor is broadcast to a shape, by numbers: extents of one name may differ in a run."""
    return len(shape) <= len(made) and all(
        own.is_one or (own == extent and own.constant is not None)
        for own, extent in zip(shape, made[len(made) - len(shape) :], strict=True)
    )


def _is_matrix(node: ir.Node, weights: Shape) -> bool:
    """Whether a product is by a matrix that makes rows none too wide of them."""
    extents = [x.constant for x in weights]
    if len(extents) != 2:
        return False
    summed, kept = reversed(extents) if is_transposed(node) else extents
    return summed is not None and kept is not None and kept <= _MOST_GROWTH * summed


def _is_one_of_rows(node: ir.Node, row: _Row, known: Mapping[ir.Value, Value]) -> bool:
    """Whether all rows can be multiplied at once: by a matrix that leaves their axis alone, none too wide."""
    assert node.inputs[1] is not None
    rank = len(known[row.of].shape)
    return rank > 1 and row.axis % rank != rank - 1 and _is_matrix(node, known[node.inputs[1]].shape)
