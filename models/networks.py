"""Parts of networks whose time goes into matrix products and convolutions, with the operators around them."""

from __future__ import annotations

import math

import numpy as np
import onnx
from onnx import TensorProto

from models.memory_bound import gelu, normalized
from models.writing import Graph


def bert_layer(
    batch: int | str = "batch", sequence: int | str = "sequence", hidden: int = 768, heads: int = 12
) -> onnx.ModelProto:
    """An encoder layer of BERT in the primitives that exporters write, with an attention mask of 0 and 1."""
    graph = Graph("bert_layer")
    states = graph.input("hidden_states", [batch, sequence, hidden])
    mask = graph.input("attention_mask", [batch, sequence], TensorProto.INT64)
    weights = _Weights(graph)

    wide = graph.op("Unsqueeze", mask, np.array([1, 2], np.int64))
    blocked = graph.op("Sub", 1.0, graph.op("Cast", wide, to=TensorProto.FLOAT))
    bias = graph.op("Mul", blocked, -10000.0)

    to_heads = np.array([0, -1, heads, hidden // heads], np.int64)
    query, key, value = (
        graph.op("Reshape", weights.dense(states, name, hidden, hidden), to_heads)
        for name in ("query", "key", "value")
    )
    query = graph.op("Transpose", query, perm=[0, 2, 1, 3])
    key = graph.op("Transpose", key, perm=[0, 2, 3, 1])
    value = graph.op("Transpose", value, perm=[0, 2, 1, 3])
    scores = graph.op("Div", graph.op("MatMul", query, key), math.sqrt(hidden // heads))
    attention = graph.op("Softmax", graph.op("Add", scores, bias), axis=-1)
    context = graph.op("Transpose", graph.op("MatMul", attention, value), perm=[0, 2, 1, 3])
    merged = graph.op("Reshape", context, np.array([0, -1, hidden], np.int64))

    attended = graph.op("Add", weights.dense(merged, "attention_output", hidden, hidden), states)
    attended = weights.norm(attended, "attention_norm", hidden)
    inner = gelu(graph, weights.dense(attended, "intermediate", hidden, 4 * hidden))
    outer = graph.op("Add", weights.dense(inner, "output", 4 * hidden, hidden), attended)
    graph.output(weights.norm(outer, "output_norm", hidden), "out", [batch, sequence, hidden])
    return graph.model()


def mbconv(
    batch: int | str = 1, channels: int = 40, size: int | str = 56, expansion: int = 6
) -> onnx.ModelProto:
    """An inverted residual block of EfficientNet: squeeze-and-excitation, Swish, normalisation folded."""
    graph = Graph("mbconv")
    x = graph.input("x", [batch, channels, size, size])
    weights = _Weights(graph)
    wide, narrow = channels * expansion, max(1, channels // 4)

    def swish(value: str) -> str:
        return graph.op("Mul", value, graph.op("Sigmoid", value))

    expanded = swish(weights.convolution(x, "expand", channels, wide, 1))
    deep = swish(weights.convolution(expanded, "depthwise", wide, wide, 5, group=wide))
    squeezed = graph.op("GlobalAveragePool", deep)
    reduced = swish(weights.convolution(squeezed, "squeeze", wide, narrow, 1))
    gate = graph.op("Sigmoid", weights.convolution(reduced, "excite", narrow, wide, 1))
    projected = weights.convolution(graph.op("Mul", deep, gate), "project", wide, channels, 1)
    graph.output(graph.op("Add", projected, x), "out", [batch, channels, size, size])
    return graph.model()


class _Weights:
    """Layers of a graph with seeded weights, scaled so that activations keep their size."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._generator = np.random.default_rng(0)

    def dense(self, x: str, name: str, inputs: int, outputs: int) -> str:
        weight = self._normal(f"{name}.weight", (inputs, outputs), inputs**-0.5)
        product = self._graph.op("MatMul", x, weight)
        return self._graph.op("Add", self._normal(f"{name}.bias", (outputs,), 0.1), product)

    def norm(self, x: str, name: str, size: int) -> str:
        scale = self._normal(f"{name}.scale", (size,), 0.1, mean=1.0)
        return normalized(self._graph, x, scale, self._normal(f"{name}.bias", (size,), 0.1))

    def convolution(self, x: str, name: str, inputs: int, outputs: int, kernel: int, group: int = 1) -> str:
        shape = (outputs, inputs // group, kernel, kernel)
        weight = self._normal(f"{name}.weight", shape, (2 / math.prod(shape[1:])) ** 0.5)
        bias = self._normal(f"{name}.bias", (outputs,), 0.1)
        pads = [kernel // 2] * 4
        return self._graph.op("Conv", x, weight, bias, kernel_shape=[kernel, kernel], pads=pads, group=group)

    def _normal(self, name: str, shape: tuple[int, ...], std: float, mean: float = 0.0) -> str:
        values = self._generator.standard_normal(shape, np.float32)
        return self._graph.weight(name, np.float32(mean) + np.float32(std) * values)
