"""Parts of a graph as models of their own, and fused operators swapped into a graph.

A fused operator is one node of the domain ``apollo_fuse`` together with a model-local function of
the same name, whose body is the sub-graph that it stands for.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from apollo_fuse.graph import MicroGraph, Value

DOMAIN = "apollo_fuse"
_INLINED_BYTES = 4096  # greatest constant that is copied into a function body


@dataclass(frozen=True, slots=True)
class Interface:
    """A micro-graph in terms of the model's own values."""

    nodes: tuple[ir.Node, ...]
    inputs: tuple[ir.Value, ...]
    outputs: tuple[ir.Value, ...]


def interface(micro_graph: MicroGraph, names: Mapping[str, ir.Value]) -> Interface:
    """`names` gives the model's value for each tensor name of the opened graph."""
    return Interface(
        tuple(o.node for o in micro_graph.operators),
        tuple(names[v.name] for v in micro_graph.inputs),
        tuple(names[v.name] for v in micro_graph.outputs),
    )


def relocated(part: Interface, copies: Mapping[ir.Node, ir.Node]) -> Interface:
    """The interface in another copy of its graph; `copies` gives the copy of each node."""
    values: dict[ir.Value, ir.Value] = {}
    for old in part.nodes:
        new = copies[old]
        for a, b in zip((*old.inputs, *old.outputs), (*new.inputs, *new.outputs), strict=True):
            if a is not None and b is not None:
                values[a] = b
    return Interface(
        tuple(copies[node] for node in part.nodes),
        tuple(values[v] for v in part.inputs),
        tuple(values[v] for v in part.outputs),
    )


def body_text(part: Interface) -> str:
    """The sub-graph without names: equal texts are equal functions."""
    places = {value: f"i{n}" for n, value in enumerate(part.inputs)}
    lines: list[str] = []
    for node in part.nodes:
        operands = [_operand(value, places) for value in node.inputs]
        for number, value in enumerate(node.outputs):
            places[value] = f"v{len(lines)}.{number}"
        attributes = sorted(f"{a.name}={_attribute(a)}" for a in node.attributes.values())
        lines.append(f"{node.domain}:{node.op_type}({', '.join(operands)}) {attributes}")
    return "\n".join([*lines, *(places[value] for value in part.outputs)])


def _operand(value: ir.Value | None, places: Mapping[ir.Value, str]) -> str:
    if value is None:
        return "-"
    if value in places:
        return places[value]
    constant = value.const_value
    assert constant is not None, "an operand is an input, a result or a constant"
    digest = hashlib.sha256(constant.tobytes()).hexdigest()
    return f"{constant.dtype.name}{list(constant.shape.numpy())}:{digest}"


def _attribute(attribute: ir.Attr) -> str:
    if isinstance(attribute.value, ir.TensorProtocol):
        return hashlib.sha256(attribute.value.tobytes()).hexdigest()
    return repr(attribute.value)


def function(part: Interface, name: str, opsets: Mapping[str, int]) -> ir.Function:
    """The model-local function with the sub-graph as its body; constants become Constant nodes."""
    values: dict[ir.Value, ir.Value] = {v: ir.Value(name=f"i{n}") for n, v in enumerate(part.inputs)}
    nodes: list[ir.Node] = []
    for node in part.nodes:
        for value in node.inputs:
            if value is not None and value not in values and value.const_value is not None:
                constant = ir.tensor(value.const_value.numpy())
                holder = ir.node("Constant", [], {"value": constant})
                holder.outputs[0].name = f"c{len(values)}"
                values[value] = holder.outputs[0]
                nodes.append(holder)
        nodes.append(_copy(node, values, prefix="v"))
    used = {"": opsets[""], **{n.domain: opsets.get(n.domain, 1) for n in part.nodes if n.domain}}
    graph = ir.Graph(
        [values[v] for v in part.inputs],
        [values[v] for v in part.outputs],
        nodes=nodes,
        opset_imports=used,
        name=name,
    )
    return ir.Function(DOMAIN, name, "", graph=graph, attributes=[])


def _copy(node: ir.Node, values: dict[ir.Value, ir.Value], prefix: str) -> ir.Node:
    copy = ir.Node(
        node.domain,
        node.op_type,
        [None if v is None else values[v] for v in node.inputs],
        [ir.Attr(a.name, a.type, a.value) for a in node.attributes.values()],
        num_outputs=len(node.outputs),
        version=node.version,
    )
    for old, new in zip(node.outputs, copy.outputs, strict=True):
        new.name = f"{prefix}{len(values)}" if old.name else ""
        new.type, new.shape = old.type, old.shape
        values[old] = new
    return copy


def extract(nodes: Sequence[ir.Node], opsets: Mapping[str, int], outputs: Iterable[ir.Value]) -> ir.Model:
    """A model of just these nodes (in topological order), with weights as initialisers.

    Inputs are called ``x0, x1, ...`` in order of first use and outputs ``y0, y1, ...``.
    """
    values: dict[ir.Value, ir.Value] = {}
    inputs: list[ir.Value] = []
    weights: list[ir.Value] = []
    made = {value for node in nodes for value in node.outputs}
    for node in nodes:
        for value in node.inputs:
            if value is None or value in made or value in values:
                continue
            if value.const_value is not None:
                new = ir.Value(name=f"w{len(weights)}", const_value=value.const_value)
                new.type, new.shape = value.type, value.shape
                weights.append(new)
            else:
                new = ir.Value(name=f"x{len(inputs)}", type=value.type)
                new.shape = _open(value)
                inputs.append(new)
            values[value] = new
    copies = [_copy(node, values, prefix="v") for node in nodes]
    for copy in copies:
        for output in copy.outputs:
            output.shape = None  # symbols mean nothing outside of their graph
    results: list[ir.Value] = []
    for number, value in enumerate(outputs):
        values[value].name = f"y{number}"
        results.append(values[value])
    graph = ir.Graph(
        inputs, results, nodes=copies, initializers=weights, opset_imports=dict(opsets), name="region"
    )
    return ir.Model(graph, ir_version=10)


def _open(value: ir.Value) -> ir.Shape | None:
    """The shape of an input with all extents open, but for the number of what may be extents.

    onnxruntime wants to know how many sizes there are when it loads a Resize.
    """
    if value.shape is None:
        return None
    kept = value.dtype is ir.DataType.INT64 and len(value.shape) == 1
    return ir.Shape([dim if kept and isinstance(dim, int) else None for dim in value.shape])


def region_inputs(nodes: Sequence[ir.Node]) -> list[ir.Value]:
    """The values that become the inputs of `extract(nodes, ...)`, in its order."""
    made = {value for node in nodes for value in node.outputs}
    found: dict[ir.Value, None] = {}
    for node in nodes:
        for value in node.inputs:
            if value is not None and value not in made and value.const_value is None:
                found[value] = None
    return list(found)


def swap(model: ir.Model, part: Interface, name: str, made: Sequence[Value]) -> None:
    """Replaces the nodes, in whichever graph they lie, by one fused node, and attaches its function.

    made: what the outputs are. Where extents are open the library cannot tell onnxruntime what it makes when
        the model is loaded, and without their rank that takes the sizes of a Resize for none. In bodies it is
        not told: what a Loop stacks has other extents where no iteration runs if they are known.
    """
    key = (DOMAIN, name, "")
    if key not in model.functions:
        model.functions[key] = function(part, name, model.opset_imports)
    graph = part.nodes[-1].graph
    assert isinstance(graph, ir.Graph), "the nodes lie in a graph"
    fused = ir.Node(DOMAIN, name, list(part.inputs), num_outputs=len(part.outputs), name=part.nodes[-1].name)
    graph.insert_after(part.nodes[-1], fused)
    for old, new, tensor in zip(part.outputs, fused.outputs, made, strict=True):
        new.name, new.type, new.shape = old.name, old.type, old.shape
        if new.shape is None and graph is model.graph and not old.is_graph_output():
            # without symbols, which are no names of the model's
            new.type = ir.TensorType(ir.DataType(tensor.dtype.onnx))
            new.shape = ir.Shape([extent.constant for extent in tensor.shape])
        old.name = f"{old.name}_unfused"
        for node, place in tuple(old.uses()):
            node.replace_input_with(place, new)
        if old.is_graph_output():  # the body of a Loop may name a result twice
            for number, value in enumerate(tuple(graph.outputs)):
                if value is old:
                    graph.outputs[number] = new
    graph.remove(part.nodes, safe=True)
    model.opset_imports[DOMAIN] = 1
    model.graph.opset_imports[DOMAIN] = 1
