"""The values that tensors have in a run, in the graph of a model and in the bodies in it.

A body runs as a model of its own, whether the run comes to it or not: what it reads from around it was
captured there, and a Loop or Scan is at its first iteration. So both branches of an If are seen, and the
body of a Loop that stops before it starts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
from onnx import helper

from apollo_fuse import onnx_io
from apollo_fuse.bodies import bodies, graphs, of_scanned
from apollo_fuse.errors import what_onnxruntime_says
from apollo_fuse.measure import session_options
from apollo_fuse.passes.extract_clusters import captured, operands
from apollo_fuse.running import run
from apollo_fuse.tolerance import Array

Captured: TypeAlias = Array | list[Array] | None
"""A tensor, a sequence of them, or an optional value that is absent."""
_FATAL = 4
"""onnxruntime's log level that shows fatal errors only: that a body does not run is an answer."""


@dataclass(frozen=True, slots=True)
class Captures:
    """Tensors by name; for names of which no run gave a tensor, why not."""

    arrays: Mapping[str, Array]
    problems: Mapping[str, str]


def capture(model: ir.Model, wanted: Iterable[str], feeds: Mapping[str, Array], threads: int) -> Captures:
    """The values of the tensors with these names in one run of the model, in which names are unique."""
    run = _Run(model, frozenset(wanted), threads)
    run.visit(model.graph, feeds)
    arrays = {n: v for n, v in run.values.items() if n in run.wanted and isinstance(v, np.ndarray)}
    return Captures(arrays, run.problems)


@dataclass(slots=True)
class _Run:
    """One run of a model and of the bodies in it; `values` and `problems` grow from the outside inwards."""

    model: ir.Model
    wanted: frozenset[str]
    threads: int
    values: dict[str, Captured] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)

    def visit(self, graph: ir.Graph, feeds: Mapping[str, Captured]) -> None:
        """Captures what is wanted of the graph and of the bodies in it; raises as onnxruntime does."""
        inside = [(node, body) for node in graph for body in bodies(node) if self._holds(body)]
        read = {value for node, body in inside for value in _read(node, body)}
        outputs = [v for node in graph for v in node.outputs if v in read or v.name in self.wanted]
        self.values |= feeds
        if outputs:
            found = run(self._session(graph, outputs, feeds), feeds)
            self.values |= {v.name or "": array for v, array in zip(outputs, found, strict=True)}  # type: ignore[misc]
        for node, body in inside:
            try:
                self.visit(body, self._first_feeds(node, body))
            except Exception as error:  # onnxruntime raises classes of its own for each status
                where = f"graph {body.name!r} of {node.op_type} node {node.name or node.outputs[0].name!r}"
                self._give_up(body, f"{where} does not run by itself: {what_onnxruntime_says(error)}")

    def _holds(self, body: ir.Graph) -> bool:
        return any(name in self.wanted for part in graphs(body) for name in _own(part))

    def _give_up(self, body: ir.Graph, problem: str) -> None:
        names = (name for part in graphs(body) for name in _own(part))
        self.problems |= {n: problem for n in names if n in self.wanted and n not in self.values}

    def _session(
        self, graph: ir.Graph, outputs: Iterable[ir.Value], feeds: Mapping[str, Captured]
    ) -> ort.InferenceSession:
        """What these outputs need of the graph as a model; nothing else of it has a chance to fail."""
        needed = dict.fromkeys(outputs)
        nodes: list[ir.Node] = []
        for node in reversed(graph):
            if any(value in needed for value in node.outputs):
                nodes.append(node)
                needed |= dict.fromkeys(operands(node))
        types = {value.name: value.type for value in (*needed, *graph.inputs)}
        weights = [
            v for v in needed if v.producer() is None and v.name not in feeds and v.const_value is not None
        ]
        model = helper.make_model(
            helper.make_graph(
                [ir.to_proto(node) for node in reversed(nodes)],
                graph.name or "",
                [_input(name, types.get(name), value) for name, value in feeds.items()],
                [_of_any_shape(value.name, value.type) for value in outputs],
                list(map(_weight, weights)),
            ),
            opset_imports=[helper.make_opsetid(*entry) for entry in self.model.opset_imports.items()],
            functions=[ir.to_proto(function) for function in self.model.functions.values()],
            ir_version=self.model.ir_version,
        )
        settings = onnx_io.beside_weights(session_options(self.threads), self.model)
        settings.log_severity_level = _FATAL
        settings.add_session_config_entry("session.disable_prepacking", "1")  # it runs once
        return ort.InferenceSession(model.SerializeToString(), settings, providers=["CPUExecutionProvider"])

    def _first_feeds(self, node: ir.Node, body: ir.Graph) -> dict[str, Captured]:
        """What a body is given: values of the graphs around it, and what its first iteration starts from."""
        around = [value for value in captured(body) if value.name in self.values]
        feeds = {value.name or "": self._value(value) for value in around}
        if not body.inputs:
            return feeds
        starts: list[Captured] = [None if v is None else self._value(v) for v in node.inputs]
        if node.op_type == "Loop":
            starts[:2] = [
                np.full((1,) * len(value.shape or ()), start)
                for value, start in zip(body.inputs[:2], (np.int64(0), np.True_), strict=True)
            ]
        if node.op_type == "Scan":
            axes, backwards = (of_scanned(node, what) for what in ("axes", "directions"))
            for place, axis, last in zip(range(-len(axes), 0), axes, backwards, strict=True):
                starts[place] = np.asarray(np.take(np.asarray(starts[place]), -1 if last else 0, axis))
        return feeds | {v.name or "": s for v, s in zip(body.inputs, starts, strict=False)}

    def _value(self, value: ir.Value) -> Captured:
        name = value.name or ""
        if name in self.values or value.const_value is None:
            return self.values[name]
        array: Array = value.const_value.numpy()
        return array


def _own(graph: ir.Graph) -> Iterable[str | None]:
    """Names of the values that are defined in the graph itself."""
    return (value.name for value in (*graph.inputs, *(v for node in graph for v in node.outputs)))


def _read(node: ir.Node, body: ir.Graph) -> set[ir.Value]:
    """What it takes to run a body of the node: what the body reads, and what its inputs come from."""
    return captured(body) | {value for value in node.inputs if value is not None and body.inputs}


def _input(name: str, kind: ir.TypeProtocol | None, value: Captured) -> onnx.ValueInfoProto:
    """Of a tensor its rank, without which onnxruntime takes the sizes of a Resize for none."""
    if kind is None:
        kind = ir.TensorType(ir.DataType.from_numpy(np.asarray(value).dtype))
    if isinstance(kind, ir.TensorType) and isinstance(value, np.ndarray):
        return helper.make_tensor_value_info(name, kind.dtype, [None] * value.ndim)
    return _of_any_shape(name, kind)


def _of_any_shape(name: str | None, kind: ir.TypeProtocol | None) -> onnx.ValueInfoProto:
    return onnx.ValueInfoProto(name=name, type=None if kind is None else ir.to_proto(kind))


def _weight(value: ir.Value) -> onnx.TensorProto:
    assert value.const_value is not None, "what is read is fed or a weight"
    proto = ir.to_proto(value.const_value)
    proto.name = value.name or ""
    return proto
