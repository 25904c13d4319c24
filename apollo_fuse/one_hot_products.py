"""Reads the row that a product with a one-hot matrix picks, instead of multiplying the others by 0.

JAX writes a small embedding as a comparison with 0, 1, 2, ... and a product, other exporters as OneHot and a
product. Where all weights are finite both are the same bits: what is multiplied by 0 adds nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import permutations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from apollo_fuse.bodies import Names, add_weight, nodes
from apollo_fuse.branches import Infer
from apollo_fuse.dtypes import DType
from apollo_fuse.graph import Value
from apollo_fuse.products import bias, is_product, is_transposed
from apollo_fuse.symbolic import constant_in, known_in

_SINCE = 13
"""The opset from which Clip takes integers, and Squeeze its axes as an operand."""
_MOST_BYTES = 2**28
"""Of weights; the table is a copy of them that is held in memory, and is part of the model's message."""


@dataclass(frozen=True, slots=True)
class _OneHot:
    """Rows of zeros with a one at `index`, where that is in range; a matrix along the last axis.

    rank: the least of `index`.
    compared: whether `index` has an axis of extent 1 for the rows; else a negative one counts from the end.
    """

    index: ir.Value
    rank: int
    compared: bool

    def is_made_of(self, index: Value) -> bool:
        """Whether rows are made so of an index that is like this."""
        if not index.dtype.is_integer or len(index.shape) < self.rank:
            return False
        return not self.compared or index.shape[-1].constant == 1


def read_one_hot_rows(model: ir.Model, infer: Infer) -> bool:
    """Rewrites the model in place; gives whether there was such a product."""
    if model.opset_imports[""] < _SINCE:
        return False
    products = [node for node in nodes(model.graph) if _of_product(node) is not None]
    if not products:
        return False
    known, names, changed = known_in(model, infer(model)), Names(model.graph), False
    for node in products:
        one_hot = _of_product(node)  # anew: an index may be a result that is another by now, and not known
        index = None if one_hot is None else known.get(one_hot.index)
        if one_hot is not None and index is not None and one_hot.is_made_of(index):
            _Rewriting(model.graph, node, names).read(one_hot, index.dtype)
            changed = True
    if changed:
        RemoveUnusedNodesPass()(model)
    return changed


def _of_product(node: ir.Node) -> _OneHot | None:
    """The one-hot matrix that is multiplied by constant, finite weights."""
    if not is_product(node) or node.inputs[0] is None:
        return None
    made = node.inputs[0].producer()
    if made is not None and made.op_type == "Cast" and not made.domain and made.inputs[0] is not None:
        made = made.inputs[0].producer()
    if made is None or made.domain or made.op_type not in ("Equal", "OneHot"):
        return None
    weights = constant_in(node.inputs[1])
    if weights is None or weights.ndim != 2 or not 0 < weights.nbytes <= _MOST_BYTES:
        return None
    count = weights.shape[1 if is_transposed(node) else 0]
    one_hot = _compared(made, count) or _written(made, count)
    return one_hot if one_hot is not None and np.isfinite(weights).all() else None


def _compared(node: ir.Node, count: int) -> _OneHot | None:
    """What is compared with 0, 1, ..., count - 1 along the last axis."""
    for index, other in permutations(node.inputs) if node.op_type == "Equal" else ():
        numbers = constant_in(other)
        if index is None or numbers is None or numbers.shape[-1:] != (count,) or numbers.size != count:
            continue
        if (numbers.ravel() == np.arange(count)).all():
            return _OneHot(index, numbers.ndim, compared=True)
    return None


def _written(node: ir.Node, count: int) -> _OneHot | None:
    """What OneHot writes along the last axis, ones among zeros."""
    if node.op_type != "OneHot" or node.inputs[0] is None:
        return None
    depth, values = map(constant_in, node.inputs[1:])
    if depth is None or values is None or node.attributes.get_int("axis", -1) != -1:
        return None
    if depth.ravel().tolist() != [count] or values.tolist() != [0, 1]:
        return None
    return _OneHot(node.inputs[0], 0, compared=False)


@dataclass(frozen=True, slots=True)
class _Rewriting:
    """Puts a Gather in the place of a product."""

    graph: ir.Graph
    product: ir.Node
    names: Names

    def read(self, one_hot: _OneHot, dtype: DType) -> None:
        rows = constant_in(self.product.inputs[1])
        assert rows is not None
        if is_transposed(self.product):
            rows = rows.T
        count, place = len(rows), one_hot.index
        # what is out of range reads zeros; -0.0 is 0.0 as a sum
        table = self._constant(np.concatenate([rows + rows.dtype.type(0), np.zeros_like(rows[:1])]))
        if one_hot.compared:
            place = self._made("Squeeze", place, self._constant(np.array([-1])))
        if dtype is not DType.INT64:
            place = self._made("Cast", place, to=ir.DataType.INT64)
        if not one_hot.compared:
            from_end = self._made("Add", place, self._constant(np.array(count)))
            negative = self._made("Less", place, self._constant(np.array(0)))
            place = self._made("Where", negative, from_end, place)
        place = self._made("Clip", place, self._constant(np.array(-1)), self._constant(np.array(count)))
        row, added = self._made("Gather", table, place), bias(self.product)
        if added is not None:
            row = self._made("Add", row, added)
        result = self.product.outputs[0]
        row.type, row.shape = result.type, result.shape
        result.replace_all_uses_with(row, replace_graph_outputs=True)
        assert self.product.graph is not None
        self.product.graph.remove(self.product, safe=True)
        if row.is_graph_output():
            row.name = result.name

    def _made(self, op_type: str, *operands: ir.Value, **attributes: int) -> ir.Value:
        node = ir.node(op_type, operands, attributes)
        made = node.outputs[0]
        node.name = made.name = self.names.like(self.product.outputs[0], op_type.lower())
        assert isinstance(self.product.graph, ir.Graph)
        self.product.graph.insert_before(self.product, node)
        return made

    def _constant(self, array: np.ndarray) -> ir.Value:
        return add_weight(self.graph, self.names.like(self.product.outputs[0], "constant"), array)
