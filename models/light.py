"""The networks of the onnx package's test data, with weights drawn by a seed in place of the ones left out.

Their file keeps the shape of a weight and a ConstantOfShape node that fills it.  The few weights that are
kept are drawn anew too: means and variances that were learnt for others would not fit.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from apollo_fuse.errors import ModelError

IR_VERSION = 8
"""From 4 on, an initialiser need not be an input of the graph."""

_THROUGH = ("Unsqueeze", "Reshape", "Identity")
_LINEAR = ("Conv", "BatchNormalization")


@dataclass(frozen=True, slots=True)
class _Use:
    """Where a weight goes: an input of an operator.

    rectified: whether what it meets there may have gone through a Relu, which halves the second moment.
    summed: whether the operator's result is a term of a sum.
    """

    operator: str
    position: int
    rectified: bool
    summed: bool


def light_file(network: str) -> Path:
    """The network's file in the installed onnx package.  Raises ModelError where it is not there."""
    path = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light" / f"light_{network}.onnx"
    if not path.exists():
        raise ModelError(
            f"model {network!r}: {path} is missing; install an onnx package that has its test data"
        )
    return path


def light_model(network: str) -> onnx.ModelProto:
    """The network with its weights drawn; activations stay finite through its whole depth."""
    model = onnx.load(light_file(network))
    graph = model.graph
    uses = _uses(graph)
    initializers = {tensor.name: tensor for tensor in graph.initializer}
    filled = {node.output[0]: node for node in graph.node if node.op_type == "ConstantOfShape"}
    weights = dict(_shapes(initializers, filled))
    drawn = [
        numpy_helper.from_array(_draw(name, shape, uses[name]), name)
        for name, shape in weights.items()
        if name in uses
    ]
    nodes = [node for node in graph.node if node.op_type != "ConstantOfShape"]
    used = {name for node in nodes for name in node.input}
    kept = [tensor for name, tensor in initializers.items() if name in used and name not in weights]
    inputs = [value for value in graph.input if value.name not in initializers]
    drawn_graph = onnx.helper.make_graph(nodes, graph.name, inputs, graph.output, initializer=kept + drawn)
    return onnx.helper.make_model(
        drawn_graph,
        opset_imports=model.opset_import,
        ir_version=IR_VERSION,
        producer_name="apollo-fuse models",
    )


def _shapes(
    initializers: Mapping[str, TensorProto], filled: Mapping[str, onnx.NodeProto]
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The name and shape of each weight, left out or kept."""
    for name, tensor in initializers.items():
        if tensor.data_type == TensorProto.FLOAT:
            yield name, tuple(tensor.dims)
    for name, node in filled.items():
        yield name, tuple(int(size) for size in numpy_helper.to_array(initializers[node.input[0]]))


def _uses(graph: onnx.GraphProto) -> dict[str, _Use]:
    """The use of each value, seen through the nodes that only reshape it."""
    uses: dict[str, _Use] = {}
    linear = {node.output[0] for node in graph.node if node.op_type in _LINEAR}
    for node in reversed(graph.node):
        following = uses.get(node.output[0])
        for position, name in enumerate(node.input):
            if node.op_type in _THROUGH and position == 0:
                if following is not None:
                    uses[name] = following
            else:
                summed = following is not None and following.operator == "Sum"
                uses[name] = _Use(node.op_type, position, node.input[0] not in linear, summed)
    return uses


def _draw(name: str, shape: tuple[int, ...], use: _Use) -> np.ndarray:
    """A weight that keeps activations about 1 in size.

    Products after He et al. 2015, section 2.2; scales and variances about 1, but scales of the terms of a
    residual sum 0.4, as each sum adds their variances; the rest small.
    """
    generator = np.random.default_rng(zlib.crc32(name.encode()))

    def around(centre: float) -> np.ndarray:
        return generator.uniform(0.8 * centre, 1.2 * centre, shape).astype(np.float32)

    match use.operator, use.position:
        case "Conv", 1:
            return _normal(generator, shape, math.sqrt((2 if use.rectified else 1) / math.prod(shape[1:])))
        case "Gemm", 1:
            return _normal(generator, shape, math.sqrt(1 / math.prod(shape[1:])))
        case ("BatchNormalization", 1) | ("Mul", 1):
            return around(0.4 if use.summed else 1.0)
        case "BatchNormalization", 4:
            return around(1.0)
        case _:
            return _normal(generator, shape, 0.05)


def _normal(generator: np.random.Generator, shape: tuple[int, ...], deviation: float) -> np.ndarray:
    values = generator.standard_normal(shape, np.float32)
    values *= np.float32(deviation)
    return values
