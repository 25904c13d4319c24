"""Random ONNX models of the operators that can be fused, as a hypothesis strategy."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx
from hypothesis import assume
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

# no rounding to integers: a last bit before it is a whole number behind it
UNARY = ("Relu", "Tanh", "Sigmoid", "Abs", "Neg", "Softplus", "Erf", "HardSwish")
BINARY = ("Add", "Sub", "Mul", "Max", "Min")
REDUCTIONS = ("ReduceSum", "ReduceMean", "ReduceMax", "ReduceL2")
EXTENTS = (1, 2, 3, 5, 8, 17)
OPEN = {5: "five", 17: "seventeen"}
"""Extents that a model may leave open, with the names they get."""

Shape = tuple[int, ...]


@dataclass
class Writer:
    """A graph that grows by one node at a time; `tensors` are floats, by name."""

    open_extents: frozenset[int]
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    inputs: dict[str, Shape] = field(default_factory=dict)
    constants: list[onnx.TensorProto] = field(default_factory=list)
    tensors: dict[str, Shape] = field(default_factory=dict)

    def input(self, shape: Shape) -> str:
        name = f"x{len(self.inputs)}"
        self.inputs[name] = self.tensors[name] = shape
        return name

    def constant(self, array: np.ndarray) -> str:
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(array, name))
        return name

    def op(self, op_type: str, reads: list[str], shape: Shape, **attributes: object) -> str:
        name = f"t{len(self.nodes)}"
        self.nodes.append(helper.make_node(op_type, reads, [name], f"n{len(self.nodes)}", **attributes))
        self.tensors[name] = shape
        return name

    def model(self, outputs: list[str]) -> onnx.ModelProto:
        inputs = [
            helper.make_tensor_value_info(
                name, TensorProto.FLOAT, [OPEN[e] if e in self.open_extents else e for e in shape]
            )
            for name, shape in self.inputs.items()
        ]
        results = [onnx.ValueInfoProto(name=name) for name in outputs]
        graph = helper.make_graph(self.nodes, "random", inputs, results, self.constants)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


@dataclass(frozen=True)
class RandomModel:
    """A model with the shapes of its inputs; `feeds` are those that random numbers will not do for."""

    proto: onnx.ModelProto
    shapes: dict[str, Shape]
    feeds: dict[str, np.ndarray] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"inputs {self.shapes} of\n{onnx.printer.to_text(self.proto.graph)}"


@st.composite
def models(draw: st.DrawFn, most_nodes: int = 10) -> RandomModel:
    writer = Writer(draw(st.frozensets(st.sampled_from(sorted(OPEN)))))
    shape = tuple(draw(st.lists(st.sampled_from(EXTENTS), min_size=1, max_size=3)))
    for _ in range(draw(st.integers(1, 2))):
        writer.input(shape)
    steps = st.sampled_from((_unary, _unary, _binary, _binary, _reduce, _move, _softmax, _concat, _slide))
    for _ in range(draw(st.integers(1, most_nodes))):
        draw(steps)(draw, writer)
    made = [node.output[0] for node in writer.nodes]
    assume(made)
    others = draw(st.lists(st.sampled_from(made), max_size=2))
    return RandomModel(writer.model(list(dict.fromkeys([made[-1], *others]))), writer.inputs)


@st.composite
def tables(draw: st.DrawFn, most_parts: int = 24) -> RandomModel:
    """Rows that are put together of columns, wide parts, and columns that are coded over several places."""
    writer = Writer(draw(st.frozensets(st.sampled_from(sorted(OPEN)))))
    rows = draw(st.sampled_from((*EXTENTS, 40, 130)))
    parts: list[str] = []
    for _ in range(draw(st.integers(2, most_parts))):
        width = draw(st.sampled_from((1, 1, 2, 3, 8)))
        if width > 1 and draw(st.booleans()):
            column = _column(draw, writer, (rows, 1))
            bounds = writer.constant(np.linspace(-1, 1, width, dtype=np.float32)[None])
            below = writer.op("Less", [column, bounds], (rows, width))
            parts.append(writer.op("Cast", [below], (rows, width), to=TensorProto.FLOAT))
            del writer.tensors[below]
        else:
            parts.append(_column(draw, writer, (rows, width)))
    whole = sum(writer.tensors[part][1] for part in parts)
    result = writer.op("Concat", parts, (rows, whole), axis=1)
    if draw(st.booleans()):
        result = writer.op(draw(st.sampled_from(UNARY)), [result], (rows, whole))
    made = [part for part in parts if part not in writer.inputs]
    others = draw(st.lists(st.sampled_from(made), max_size=2)) if made else []
    return RandomModel(writer.model(list(dict.fromkeys([result, *others]))), writer.inputs)


def _column(draw: st.DrawFn, writer: Writer, shape: Shape) -> str:
    """A tensor of this shape: an input, or what is computed from one."""
    alike = [name for name, other in writer.tensors.items() if other == shape]
    name = draw(st.sampled_from(alike)) if alike and draw(st.booleans()) else writer.input(shape)
    for op_type in draw(st.lists(st.sampled_from(UNARY), max_size=2)):
        name = writer.op(op_type, [name], shape)
    return name


@st.composite
def models_with_bodies(draw: st.DrawFn, most_nodes: int = 10) -> RandomModel:
    """A random graph whose last nodes lie in a branch of an If, or in the body of a Loop or a Scan."""
    model = draw(models(most_nodes))
    put = draw(st.sampled_from((_in_branch, _in_loop, _in_scan)))
    first = draw(st.integers(0, len(model.proto.graph.node) - 1))
    return put(model, first, draw(st.integers(0, 3)))


def _in_branch(model: RandomModel, first: int, number: int) -> RandomModel:
    body = _body(model, first, {})
    other = [helper.make_node("Neg", ["x0"], [f"neg{n}"]) for n in range(len(body.output))]
    results = [onnx.ValueInfoProto(name=node.output[0]) for node in other]
    branches = {"then_branch": body, "else_branch": helper.make_graph(other, "other", [], results)}
    node = helper.make_node("If", ["c"], _results(model), **branches)
    condition = helper.make_tensor_value_info("c", TensorProto.BOOL, [])
    return _around(model, first, node, [condition], {"c": np.array(number > 0)})


def _in_loop(model: RandomModel, first: int, number: int) -> RandomModel:
    """The body reads what the Loop carries where it read the first input, and halves it."""
    body = _body(model, first, {"x0": "carried"})
    body.node.append(helper.make_node("Mean", ["carried", "x0"], ["next"]))
    body.node.append(helper.make_node("Identity", ["go_on"], ["more"]))
    body.input.extend(
        helper.make_tensor_value_info(name, kind, [])
        for name, kind in (("step", TensorProto.INT64), ("go_on", TensorProto.BOOL))
    )
    body.input.append(onnx.ValueInfoProto(name="carried"))
    results = [onnx.ValueInfoProto(name=name) for name in ("more", "next")]
    results += list(body.output)
    del body.output[:]
    body.output.extend(results)
    node = helper.make_node("Loop", ["count", "", "x0"], ["last", *_results(model)], body=body)
    count = helper.make_tensor_value_info("count", TensorProto.INT64, [])
    return _around(model, first, node, [count], {"count": np.array(number)})


def _in_scan(model: RandomModel, first: int, number: int) -> RandomModel:
    """The body reads one slice where it read the first input."""
    body = _body(model, first, {"x0": "slice"})
    body.input.append(onnx.ValueInfoProto(name="slice"))
    node = helper.make_node("Scan", ["slices"], _results(model), num_scan_inputs=1, body=body)
    extents = [d.dim_param or d.dim_value for d in model.proto.graph.input[0].type.tensor_type.shape.dim]
    slices = helper.make_tensor_value_info("slices", TensorProto.FLOAT, ["steps", *extents])
    wrapped = _around(model, first, node, [slices], {})
    wrapped.shapes["slices"] = (number + 1, *model.shapes["x0"])
    return wrapped


def _results(model: RandomModel) -> list[str]:
    return [f"result{n}" for n in range(len(model.proto.graph.output))]


def _body(model: RandomModel, first: int, names: dict[str, str]) -> onnx.GraphProto:
    """The nodes from the `first` on as a graph without inputs, in which `names` have other ones."""
    nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in model.proto.graph.node[first:]]
    for node in nodes:
        node.input[:] = [names.get(name, name) for name in node.input]
    outputs = [value.name for value in model.proto.graph.output]
    made = [f"out{n}" for n in range(len(outputs))]
    nodes += [helper.make_node("Identity", [a], [b]) for a, b in zip(outputs, made, strict=True)]
    return helper.make_graph(nodes, "body", [], [onnx.ValueInfoProto(name=name) for name in made])


def _around(
    model: RandomModel,
    first: int,
    node: onnx.NodeProto,
    inputs: list[onnx.ValueInfoProto],
    feeds: dict[str, np.ndarray],
) -> RandomModel:
    """The model with this node in place of those from the `first` on."""
    proto = onnx.ModelProto.FromString(model.proto.SerializeToString())
    del proto.graph.node[first:]
    proto.graph.node.append(node)
    proto.graph.input.extend(inputs)
    del proto.graph.output[:]
    proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in _results(model))
    return RandomModel(proto, dict(model.shapes), feeds)


def _any(draw: st.DrawFn, writer: Writer) -> str:
    """A tensor, one of the last rather than one of the first."""
    names = list(writer.tensors)
    return names[-1 - min(draw(st.integers(0, 3)), len(names) - 1)]


def _unary(draw: st.DrawFn, writer: Writer) -> None:
    x = _any(draw, writer)
    writer.op(draw(st.sampled_from(UNARY)), [x], writer.tensors[x])


def _binary(draw: st.DrawFn, writer: Writer) -> None:
    x = _any(draw, writer)
    shape = writer.tensors[x]
    fitting = [name for name, other in writer.tensors.items() if _broadcast(shape, other) is not None]
    other = draw(st.sampled_from(fitting))
    result = _broadcast(shape, writer.tensors[other])
    if draw(st.booleans()) and not writer.open_extents:
        weight = draw(st.sampled_from([shape, shape[-1:], (1,), ()]))
        other, result = writer.constant(np.full(weight, 0.75, np.float32)), shape
    assert result is not None
    reads = [x, other] if draw(st.booleans()) else [other, x]
    writer.op(draw(st.sampled_from(BINARY)), reads, result)


def _broadcast(a: Shape, b: Shape) -> Shape | None:
    rank = max(len(a), len(b))
    pairs = list(zip((1,) * (rank - len(a)) + a, (1,) * (rank - len(b)) + b, strict=True))
    return tuple(map(max, pairs)) if all(x == y or 1 in (x, y) for x, y in pairs) else None


def _reduce(draw: st.DrawFn, writer: Writer) -> None:
    x = _any(draw, writer)
    shape = writer.tensors[x]
    if not shape:
        return
    axes = sorted(draw(st.sets(st.integers(0, len(shape) - 1), min_size=1)))
    keep = draw(st.booleans())
    result = tuple(1 if a in axes else e for a, e in enumerate(shape) if keep or a not in axes)
    over = writer.constant(np.array(axes, np.int64))
    writer.op(draw(st.sampled_from(REDUCTIONS)), [x, over], result, keepdims=int(keep))


def _softmax(draw: st.DrawFn, writer: Writer) -> None:
    x = _any(draw, writer)
    shape = writer.tensors[x]
    if shape:
        op = draw(st.sampled_from(("Softmax", "LogSoftmax")))
        writer.op(op, [x], shape, axis=draw(st.integers(0, len(shape) - 1)))


def _slide(draw: st.DrawFn, writer: Writer) -> None:
    """A window of three over the last axis, of which each channel has one by itself."""
    images = [name for name, shape in writer.tensors.items() if len(shape) == 3 and shape[-1] > 1]
    if not images:
        return
    x = draw(st.sampled_from(images))
    shape = writer.tensors[x]
    op = draw(st.sampled_from(("Conv", "MaxPool", "AveragePool")))
    padded = {"kernel_shape": [3], "pads": [1, 1]}
    if op != "Conv":
        writer.op(op, [x], shape, **padded)
    elif shape[1] not in writer.open_extents:
        weights = writer.constant(np.linspace(-0.5, 1, 3 * shape[1], dtype=np.float32).reshape(-1, 1, 3))
        writer.op(op, [x, weights], shape, group=shape[1], **padded)


def _concat(draw: st.DrawFn, writer: Writer) -> None:
    x = _any(draw, writer)
    shape = writer.tensors[x]
    alike = [name for name, other in writer.tensors.items() if other == shape]
    if shape:
        axis = draw(st.integers(0, len(shape) - 1))
        reads = [x, draw(st.sampled_from(alike))]
        result = tuple(2 * e if a == axis else e for a, e in enumerate(shape))
        if result[axis] < 40:
            writer.op("Concat", reads, result, axis=axis)


def _move(draw: st.DrawFn, writer: Writer) -> None:
    x = _any(draw, writer)
    shape = writer.tensors[x]
    rank = len(shape)
    kind = draw(st.sampled_from(("Transpose", "Unsqueeze", "Flatten", "Slice", "Gather")))
    if kind == "Unsqueeze" and rank < 4:
        axis = draw(st.integers(0, rank))
        at = writer.constant(np.array([axis], np.int64))
        writer.op(kind, [x, at], (*shape[:axis], 1, *shape[axis:]))
    if not rank:
        return
    axis = draw(st.integers(0, rank - 1))
    extent = shape[axis]
    match kind:
        case "Transpose":
            permutation = draw(st.permutations(range(rank)))
            writer.op(kind, [x], tuple(shape[p] for p in permutation), perm=permutation)
        case "Flatten":
            result = (int(np.prod(shape[:axis])), int(np.prod(shape[axis:])))
            writer.op(kind, [x], result, axis=axis)
        case "Slice" if extent > 1:
            start, step = draw(st.integers(0, extent - 1)), draw(st.sampled_from((1, 2)))
            places = [writer.constant(np.array([n], np.int64)) for n in (start, extent, axis, step)]
            result = (*shape[:axis], len(range(start, extent, step)), *shape[axis + 1 :])
            writer.op(kind, [x, *places], result)
        case "Gather":
            indices = draw(st.lists(st.integers(-extent, extent - 1), min_size=1, max_size=4))
            at = writer.constant(np.array(indices, np.int64))
            writer.op(kind, [x, at], (*shape[:axis], len(indices), *shape[axis + 1 :]), axis=axis)
        case _:
            pass
