"""Parts of networks whose time goes into matrix products and convolutions, with the operators around them."""

from __future__ import annotations

import math

import numpy as np
import onnx
from onnx import TensorProto

from models.layers import Layers
from models.memory_bound import gelu
from models.writing import Graph


def bert_layer(
    batch: int | str = "batch", sequence: int | str = "sequence", hidden: int = 768, heads: int = 12
) -> onnx.ModelProto:
    """An encoder layer of BERT in the primitives that exporters write, with an attention mask of 0 and 1."""
    return _bert("bert_layer", 1, batch, sequence, hidden, heads)


def bert_large(
    batch: int | str = "batch",
    sequence: int | str = "sequence",
    hidden: int = 1024,
    heads: int = 16,
    layers: int = 24,
) -> onnx.ModelProto:
    """The encoder of BERT-large; its layers share their weights, so that its file stays small."""
    return _bert("bert_large", layers, batch, sequence, hidden, heads)


def _bert(
    name: str, count: int, batch: int | str, sequence: int | str, hidden: int, heads: int
) -> onnx.ModelProto:
    graph = Graph(name)
    states = graph.input("hidden_states", [batch, sequence, hidden])
    mask = graph.input("attention_mask", [batch, sequence], TensorProto.INT64)
    layers = Layers(graph)

    wide = graph.op("Unsqueeze", mask, np.array([1, 2], np.int64))
    blocked = graph.op("Sub", 1.0, graph.op("Cast", wide, to=TensorProto.FLOAT))
    bias = graph.op("Mul", blocked, -10000.0)
    for _ in range(count):
        states = _encoder_layer(graph, layers, states, bias, hidden, heads)
    graph.output(states, "out", [batch, sequence, hidden])
    return graph.model()


def _encoder_layer(graph: Graph, layers: Layers, states: str, bias: str, hidden: int, heads: int) -> str:
    to_heads = np.array([0, -1, heads, hidden // heads], np.int64)
    query, key, value = (
        graph.op("Reshape", layers.dense(states, name, hidden, hidden), to_heads)
        for name in ("query", "key", "value")
    )
    query = graph.op("Transpose", query, perm=[0, 2, 1, 3])
    key = graph.op("Transpose", key, perm=[0, 2, 3, 1])
    value = graph.op("Transpose", value, perm=[0, 2, 1, 3])
    scores = graph.op("Div", graph.op("MatMul", query, key), math.sqrt(hidden // heads))
    attention = graph.op("Softmax", graph.op("Add", scores, bias), axis=-1)
    context = graph.op("Transpose", graph.op("MatMul", attention, value), perm=[0, 2, 1, 3])
    merged = graph.op("Reshape", context, np.array([0, -1, hidden], np.int64))

    attended = graph.op("Add", layers.dense(merged, "attention_output", hidden, hidden), states)
    attended = layers.norm(attended, "attention_norm", hidden)
    inner = gelu(graph, layers.dense(attended, "intermediate", hidden, 4 * hidden))
    outer = graph.op("Add", layers.dense(inner, "output", 4 * hidden, hidden), attended)
    return layers.norm(outer, "output_norm", hidden)


def matmul_add_gelu(
    batch: int | str = "batch", tokens: int | str = "tokens", inputs: int = 768, outputs: int = 3072
) -> onnx.ModelProto:
    """A dense layer and Gelu with a product by 1/sqrt(2) where onnxruntime 1.32 looks for a quotient."""
    graph = Graph("matmul_add_gelu")
    x = graph.input("x", [batch, tokens, inputs])
    biased = Layers(graph).dense(x, "dense", inputs, outputs)
    error = graph.op("Erf", graph.op("Mul", biased, math.sqrt(0.5)))
    doubled = graph.op("Mul", biased, graph.op("Add", error, 1.0))
    graph.output(graph.op("Mul", doubled, 0.5), "out", [batch, tokens, outputs])
    return graph.model()


def levit_hardswish(
    batch: int | str = "batch", tokens: int = 196, channels: int = 256, expansion: int = 2
) -> onnx.ModelProto:
    """The feed-forward block of LeViT as it is exported: Linear, BatchNorm over the tokens of all pictures,
    HardSwish in its two operators."""
    graph = Graph("levit_hardswish")
    x = graph.input("x", [batch, tokens, channels])
    layers = Layers(graph)
    wide = channels * expansion

    def linear_norm(value: str, name: str, inputs: int, outputs: int) -> str:
        product = layers.product(value, name, inputs, outputs)
        shape = graph.op("Shape", product)
        flat = graph.op("Reshape", product, np.array([-1, outputs], np.int64))
        return graph.op("Reshape", layers.batch_norm(flat, f"{name}_norm", outputs), shape)

    inner = linear_norm(x, "up", channels, wide)
    inner = graph.op("Mul", inner, graph.op("HardSigmoid", inner, alpha=1 / 6, beta=0.5))
    graph.output(
        graph.op("Add", x, linear_norm(inner, "down", wide, channels)), "out", [batch, tokens, channels]
    )
    return graph.model()


def mbconv(
    batch: int | str = 1, channels: int = 40, size: int | str = 56, expansion: int = 6
) -> onnx.ModelProto:
    """An inverted residual block of EfficientNet: squeeze-and-excitation, Swish, normalisation folded."""
    graph = Graph("mbconv")
    x = graph.input("x", [batch, channels, size, size])
    layers = Layers(graph)
    wide, narrow = channels * expansion, max(1, channels // 4)

    def swish(value: str) -> str:
        return graph.op("Mul", value, graph.op("Sigmoid", value))

    expanded = swish(layers.convolution(x, "expand", channels, wide, 1))
    deep = swish(layers.convolution(expanded, "depthwise", wide, wide, 5, group=wide))
    squeezed = graph.op("GlobalAveragePool", deep)
    reduced = swish(layers.convolution(squeezed, "squeeze", wide, narrow, 1))
    gate = graph.op("Sigmoid", layers.convolution(reduced, "excite", narrow, wide, 1))
    projected = layers.convolution(graph.op("Mul", deep, gate), "project", wide, channels, 1)
    graph.output(graph.op("Add", projected, x), "out", [batch, channels, size, size])
    return graph.model()


def silu_net(
    batch: int | str = 1, channels: int = 48, size: int | str = 56, blocks: int = 4
) -> onnx.ModelProto:
    """Residual blocks of convolutions with SiLU, as detectors of the YOLO family stack them."""
    graph = Graph("silu_net")
    layers = Layers(graph)

    def layer(x: str, name: str, inputs: int, kernel: int) -> str:
        y = layers.convolution(x, name, inputs, channels, kernel)
        return graph.op("Mul", y, graph.op("Sigmoid", y))

    x = layer(graph.input("x", [batch, 3, size, size]), "stem", 3, 3)
    for block in range(blocks):
        inner = layer(x, f"{block}.reduce", channels, 1)
        x = graph.op("Add", x, layer(inner, f"{block}.expand", channels, 3))
    graph.output(layers.convolution(x, "head", channels, 16, 1), "out", [batch, 16, size, size])
    return graph.model()


def hardswish_se_net(
    batch: int | str = 1, channels: int = 32, size: int | str = 56, blocks: int = 3, expansion: int = 3
) -> onnx.ModelProto:
    """Inverted residual blocks of MobileNetV3: HardSwish in primitives, squeeze-and-excitation in each."""
    graph = Graph("hardswish_se_net")
    layers = Layers(graph)
    wide, narrow = channels * expansion, channels * expansion // 4

    def hard_swish(x: str) -> str:
        bounded = graph.op("Clip", graph.op("Add", x, 3.0), 0.0, 6.0)
        return graph.op("Div", graph.op("Mul", x, bounded), 6.0)

    x = hard_swish(layers.convolution(graph.input("x", [batch, 3, size, size]), "stem", 3, channels, 3))
    for block in range(blocks):
        expanded = hard_swish(layers.convolution(x, f"{block}.expand", channels, wide, 1))
        deep = hard_swish(layers.convolution(expanded, f"{block}.depthwise", wide, wide, 3, group=wide))
        squeezed = graph.op("GlobalAveragePool", deep)
        reduced = graph.op("Relu", layers.convolution(squeezed, f"{block}.squeeze", wide, narrow, 1))
        gate = graph.op("HardSigmoid", layers.convolution(reduced, f"{block}.excite", narrow, wide, 1))
        gated = graph.op("Mul", deep, gate)
        x = graph.op("Add", x, layers.convolution(gated, f"{block}.project", wide, channels, 1))
    graph.output(layers.convolution(x, "head", channels, 16, 1), "out", [batch, 16, size, size])
    return graph.model()
