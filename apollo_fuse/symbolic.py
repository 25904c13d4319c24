"""Symbolic shapes: the dimensions of every tensor of a model as index polynomials.

Inference is the onnx-shape-inference package's, with the rules of `shape_rules`; this module gives input
dimensions names of our own first, so that no text of a model is ever interpreted, and reads the results back.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable

import numpy as np
import onnx_ir as ir
from onnx_shape_inference import SYM_DATA_KEY, ShapeInferenceContext, infer_symbolic_shapes, registry

import apollo_fuse.shape_rules  # noqa: F401 (registers its rules)
from apollo_fuse.bodies import graphs
from apollo_fuse.dimensions import Dimensions
from apollo_fuse.dtypes import DType
from apollo_fuse.graph import Value
from apollo_fuse.index import Index
from apollo_fuse.loop_shapes import infer_with_loops

_INPUT = re.compile(r"s[0-9]+")  # the name of an extent that the model's inputs leave open
_STATED = "apollo_fuse.stated_shape"  # of a body's output: its shape as the model states it
_INTEGERS = (ir.DataType.INT64, ir.DataType.INT32)
_WIDE = (*_INTEGERS, ir.DataType.FLOAT, ir.DataType.DOUBLE)
"""Types that hold a number of elements, or nearly so."""
_infer_if = registry.get("", "If", 13)
assert _infer_if is not None


@registry.register("", "If", since_version=1)  # type: ignore[untyped-decorator]
def _infer_if_soundly(context: ShapeInferenceContext, node: ir.Node) -> None:
    """The package's inference, less its assumption that a branch of unknown shape has the other's."""
    _infer_if(context, node)
    branches = [node.attributes[name].as_graph() for name in ("then_branch", "else_branch")]
    for place, output in enumerate(node.outputs):
        if any(branch.outputs[place].shape is None for branch in branches):
            output.shape = None


@registry.register("", "Loop", since_version=1)  # type: ignore[untyped-decorator]
def _infer_loop_soundly(context: ShapeInferenceContext, node: ir.Node) -> None:
    """Inference for a Loop that may run no iteration, or fewer than it could.

    With none, what it carries has the shape of the initial value, and what it stacks has extents of 0 where
    the body's type leaves them open. That an iteration runs is known where only an extent of 0 of the model's
    inputs could keep it from that.
    """
    runs = _runs(context, node)
    body = node.attributes["body"].as_graph()
    carried = len(node.inputs) - 2
    for place, output in enumerate(node.outputs):
        made = body.outputs[place + 1]
        if made.type is not None and not isinstance(made.type, ir.TensorType):
            context.set_type(output, made.type)
            continue
        initial = node.inputs[place + 2] if place < carried else None
        shape = _either(context, initial, made) if place < carried else _stacked(context, made, runs)
        context.set_shape_and_dtype(output, shape, made.dtype or (None if initial is None else initial.dtype))


def _either(context: ShapeInferenceContext, a: ir.Value | None, b: ir.Value) -> ir.Shape | None:
    """The shape of what is one value or the other."""
    if a is None or a.shape is None or b.shape is None or len(a.shape) != len(b.shape):
        return None
    pairs = zip(a.shape, b.shape, strict=True)
    return ir.Shape([x if x == y else context.new_symbolic_dim() for x, y in pairs])


def _stacked(context: ShapeInferenceContext, made: ir.Value, runs: bool) -> ir.Shape | None:
    """The shape of the values of all iterations."""
    if made.shape is None:
        return None
    stated = made.meta.get(_STATED)
    if stated is None or len(stated) != len(made.shape):
        stated = [None] * len(made.shape)
    dims: list[int | ir.SymbolicDim] = []
    for claim, dim in zip(stated, made.shape, strict=True):
        if isinstance(claim, int):
            dims.append(claim)
        else:
            dims.append(dim if runs and _is_of_inputs(dim) else context.new_symbolic_dim())
    return ir.Shape([context.new_symbolic_dim(), *dims])


def _is_of_inputs(dim: int | ir.SymbolicDim) -> bool:
    """Whether an extent is a number, or one of the model's inputs, and so the same in all iterations."""
    return isinstance(dim, int) or (dim.value is not None and _INPUT.fullmatch(dim.value) is not None)


def _runs(context: ShapeInferenceContext, node: ir.Node) -> bool:
    """Whether a Loop runs an iteration wherever no extent of the model's inputs is 0."""
    trips, condition = (*node.inputs, None, None)[:2]
    if trips is not None and not _is_positive(_number(context, trips)):
        return False
    if condition is None:
        return True
    if condition.const_value is not None:
        return bool(condition.const_value.numpy().all())
    producer = condition.producer()
    if producer is None or producer.op_type not in ("Less", "Greater"):
        return False
    operands = [_number(context, value) for value in producer.inputs]
    less, more = operands if producer.op_type == "Less" else reversed(operands)
    return less is not None and more is not None and _is_positive(more - less)


def _number(context: ShapeInferenceContext, value: ir.Value | None) -> Index | None:
    """The integer that a tensor of one element holds, as a float or not, where it follows from extents."""
    if value is None:
        return None
    producer = value.producer()
    if producer is not None and producer.op_type == "Cast" and value.dtype in _WIDE:
        return _number(context, producer.inputs[0])
    elements = context.get_symbolic_value(value)
    if elements is not None and len(elements) == 1:
        return Dimensions.of(None if producer is None else producer.graph).element(elements[0])
    if value.const_value is not None and value.const_value.size == 1:
        number = float(value.const_value.numpy().item())
        return Index.of(int(number)) if number.is_integer() else None
    return None


def _is_positive(number: Index | None) -> bool:
    """Whether a polynomial of extents of the model's inputs is above 0 where these are."""
    if number is None or not all(
        s.formula is None and _INPUT.fullmatch(s.name) is not None for s in number.symbols()
    ):
        return False
    factors = [factor for _, factor in number.terms]
    return bool(factors) and all(factor > 0 for factor in factors)


@registry.register("", "Scan", since_version=8)  # type: ignore[untyped-decorator]
def _infer_no_scan_of_batches(context: ShapeInferenceContext, node: ir.Node) -> None:
    """The package takes the body of the Scan of opset 8 for one without a batch."""


def infer_shapes(model: ir.Model) -> dict[str, str]:
    """Annotates every value of the model, in place; gives our name of each input dimension's own name.

    Dimensions that the model's inputs leave open become ``s0, s1, ...``; equal names stay equal.
    Shapes that the model claims for intermediate values are inferred again.
    """
    names: dict[str, str] = {}
    for place, value in enumerate(model.graph.inputs):
        if value.shape is not None:
            value.shape = ir.Shape(
                [_named(dim, names, f"{place}.{axis}") for axis, dim in enumerate(value.shape)]
            )
    outputs = {value: value.shape for value in model.graph.outputs}
    inputs = set(model.graph.inputs)
    every = tuple(graphs(model.graph))
    for graph in every:
        for value in graph.outputs:
            value.meta[_STATED] = value.shape
        for value in (value for node in graph for value in node.outputs):
            if value not in inputs and value.shape is not None and not value.shape.is_static():
                value.shape = None
            value.metadata_props.pop(SYM_DATA_KEY, None)  # what a tool left in the file is no inference
    logging.getLogger("onnx_shape_inference").setLevel(logging.ERROR)

    def infer() -> None:
        Dimensions.start(model)  # what was deduced from a wrong guess does not hold
        infer_symbolic_shapes(model, warn_on_missing=False, adopt_declared_symbols=False)

    infer_with_loops(every, infer)
    for value, shape in outputs.items():
        if value.shape is None:
            value.shape = shape
    return {own: original for original, own in names.items()}


def values_of(graph: ir.Graph) -> dict[ir.Value, Value]:
    """The tensors of a graph and its bodies whose type and rank are known, by order named ``v0, v1, ...``."""
    dimensions = Dimensions.of(graph)
    result: dict[ir.Value, Value] = {}
    for number, value in enumerate(value for part in graphs(graph) for value in _values(part)):
        dtype = None if value.dtype is None else DType.of_onnx(value.dtype.value)
        shape = dimensions.shape(value.shape)
        if shape is None and value.const_value is not None and not value.const_value.shape:
            shape = ()
        if dtype is not None and shape is not None:
            result[value] = Value(f"v{number}", dtype, shape, _elements(value, dimensions))
    return result


def known_in(model: ir.Model, copy: ir.Model) -> dict[ir.Value, Value]:
    """The tensors of a model that has no shapes, by what is known in its copy, which has them."""
    known = values_of(copy.graph)
    pairs = zip(_tensors(model), _tensors(copy), strict=True)
    return {value: known[twin] for value, twin in pairs if twin in known}


def _tensors(model: ir.Model) -> Iterable[ir.Value]:
    """Inputs, weights that are no inputs, and results, in an order that copies share."""
    for graph in graphs(model.graph):
        yield from graph.inputs
        yield from (value for value in graph.initializers.values() if not value.is_graph_input())
        yield from (value for node in graph for value in node.outputs)


def number_in(value: ir.Value | None) -> int | None:
    """The one integer or truth value that a tensor of a graph with shapes holds, where inference knows it."""
    if value is None or value.dtype not in (*_INTEGERS, ir.DataType.BOOL):
        return None
    if value.const_value is not None:
        return int(value.const_value.numpy().item()) if value.const_value.size == 1 else None
    data = json.loads(value.metadata_props.get(SYM_DATA_KEY, "[]"))
    found = Dimensions.of(value.graph).element(data[0]) if len(data) == 1 else None
    return None if found is None else found.constant


def constant_in(value: ir.Value | None) -> np.ndarray | None:
    """What a weight holds; None for another value, an input with a default among them."""
    if value is None or value.const_value is None or value.is_graph_input():
        return None
    return value.const_value.numpy()


def _elements(value: ir.Value, dimensions: Dimensions) -> tuple[Index | None, ...] | None:
    """What a tensor of extents holds, where inference knows."""
    data = value.metadata_props.get(SYM_DATA_KEY)
    if data is None or value.shape is None or len(value.shape) > 1:
        return None
    if value.producer() is None or value.dtype not in _INTEGERS:
        return None
    found = tuple(map(dimensions.element, json.loads(data)))
    return found if value.shape == (len(found),) or not len(value.shape) and len(found) == 1 else None


def _values(graph: ir.Graph) -> Iterable[ir.Value]:
    seen: set[ir.Value] = set()
    for value in (*graph.inputs, *graph.initializers.values()):
        if value not in seen:
            seen.add(value)
            yield value
    for node in graph:
        yield from node.outputs


def _named(dim: int | ir.SymbolicDim, names: dict[str, str], place: str) -> int | ir.SymbolicDim:
    if isinstance(dim, int) and dim >= 0:
        return dim
    name = dim.value if isinstance(dim, ir.SymbolicDim) else None
    # exporters write "?" and "unk" style names for dimensions that nothing relates
    key = name if name and name.strip("?") else place
    return ir.SymbolicDim(names.setdefault(key, f"s{len(names)}"))
