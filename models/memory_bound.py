"""Graphs whose time goes into moving tensors: element by element, over rows, or over many small tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import onnx
from onnx import TensorProto

from models.writing import LAST_AXIS, Graph

_EPSILON = 1e-5
_IMAGE_MEAN = np.array([0.485, 0.456, 0.406], np.float32)
_IMAGE_STD = np.array([0.229, 0.224, 0.225], np.float32)
_PARAMETER_SHAPES = ((256, 256), (256,), (256, 512), (512,), (128, 64, 3, 3))
VECTOR_SHAPES = ((64,), (128,), (256,), (512,), (768,), (1024,), (2048,), (3072,))
"""Of small parameters: the lengths that the scales and biases of ResNet-50 and of BERT-base have."""
_DECAYS = (0.9, 0.999)
_WEIGHT_DECAY = 0.01


def chain20(rows: int, columns: int) -> onnx.ModelProto:
    """Twenty cheap elementwise operators in a row, on two inputs and a bias."""
    graph = Graph("chain20")
    x = graph.input("x", [rows, columns])
    y = graph.input("y", [rows, columns])
    bias = graph.weight("bias", _normal(1, columns))
    value = graph.op("Add", x, bias)
    value = graph.op("Mul", value, y)
    value = graph.op("Relu", value)
    value = graph.op("Sub", value, 0.5)
    value = graph.op("Abs", value)
    value = graph.op("Add", value, y)
    value = graph.op("Neg", value)
    value = graph.op("Mul", value, 0.25)
    value = graph.op("Max", value, -2.0)
    value = graph.op("Min", value, 2.0)
    value = graph.op("Sub", x, value)
    value = graph.op("Mul", value, value)
    value = graph.op("Add", value, 1.0)
    value = graph.op("Sqrt", value)
    value = graph.op("Div", y, value)
    value = graph.op("LeakyRelu", value, alpha=0.1)
    value = graph.op("Sub", value, bias)
    value = graph.op("HardSigmoid", value, alpha=0.2, beta=0.5)
    value = graph.op("Mul", value, x)
    value = graph.op("Clip", value, -6.0, 6.0)
    graph.output(value, "out", [rows, columns])
    return graph.model()


def softmax(rows: int | str = 512, columns: int = 1024) -> onnx.ModelProto:
    """Softmax over the last axis, in primitives."""
    graph = Graph("softmax")
    x = graph.input("x", [rows, columns])
    shifted = graph.op("Sub", x, graph.op("ReduceMax", x, LAST_AXIS))
    exponential = graph.op("Exp", shifted)
    result = graph.op("Div", exponential, graph.op("ReduceSum", exponential, LAST_AXIS))
    graph.output(result, "out", [rows, columns])
    return graph.model()


def layernorm(rows: int | str = 512, columns: int = 1024) -> onnx.ModelProto:
    """LayerNormalization over the last axis, in the primitives that exporters write."""
    graph = Graph("layernorm")
    x = graph.input("x", [rows, columns])
    scale = graph.weight("scale", 1 + 0.1 * _normal(1, columns))
    bias = graph.weight("bias", 0.1 * _normal(2, columns))
    graph.output(normalized(graph, x, scale, bias), "out", [rows, columns])
    return graph.model()


def normalized(graph: Graph, x: str, scale: str, bias: str) -> str:
    """Adds the nine nodes of a LayerNormalization over the last axis."""
    centred = graph.op("Sub", x, graph.op("ReduceMean", x, LAST_AXIS))
    variance = graph.op("ReduceMean", graph.op("Pow", centred, 2.0), LAST_AXIS)
    deviation = graph.op("Sqrt", graph.op("Add", variance, _EPSILON))
    return graph.op("Add", graph.op("Mul", graph.op("Div", centred, deviation), scale), bias)


def rmsnorm(rows: int | str = 512, columns: int = 1024, divided: bool = False) -> onnx.ModelProto:
    """RMS normalisation over the last axis, in primitives.

    The inverse root is a Reciprocal, or 1 divided by the root: exporters write either, and onnxruntime
    1.32 has a kernel for the second only.
    """
    graph = Graph("rmsnorm")
    x = graph.input("x", [rows, columns])
    scale = graph.weight("scale", 1 + 0.1 * _normal(1, columns))
    mean = graph.op("ReduceMean", graph.op("Pow", x, 2.0), LAST_AXIS)
    root = graph.op("Sqrt", graph.op("Add", mean, _EPSILON))
    inverse = graph.op("Div", 1.0, root) if divided else graph.op("Reciprocal", root)
    result = graph.op("Mul", scale, graph.op("Mul", x, inverse))
    graph.output(result, "out", [rows, columns])
    return graph.model()


def gelu_erf(rows: int | str = 1024, columns: int = 3072) -> onnx.ModelProto:
    """A bias and Gelu by the error function."""
    graph = Graph("gelu_erf")
    x = graph.input("x", [rows, columns])
    biased = graph.op("Add", x, graph.weight("bias", _normal(1, columns)))
    graph.output(gelu(graph, biased), "out", [rows, columns])
    return graph.model()


def gelu(graph: Graph, x: str) -> str:
    """Adds the five nodes of a Gelu by the error function."""
    error = graph.op("Erf", graph.op("Div", x, math.sqrt(2)))
    return graph.op("Mul", graph.op("Mul", x, graph.op("Add", error, 1.0)), 0.5)


def gelu_tanh(rows: int | str = 1024, columns: int = 3072) -> onnx.ModelProto:
    """A bias and Gelu by its tanh approximation."""
    graph = Graph("gelu_tanh")
    x = graph.input("x", [rows, columns])
    biased = graph.op("Add", x, graph.weight("bias", _normal(1, columns)))
    graph.output(tanh_gelu(graph, biased), "out", [rows, columns])
    return graph.model()


def tanh_gelu(graph: Graph, x: str) -> str:
    """Adds the eight nodes of a Gelu by its tanh approximation."""
    cubic = graph.op("Mul", graph.op("Pow", x, 3.0), 0.044715)
    inner = graph.op("Mul", graph.op("Add", x, cubic), math.sqrt(2 / math.pi))
    factor = graph.op("Add", graph.op("Tanh", inner), 1.0)
    return graph.op("Mul", graph.op("Mul", x, 0.5), factor)


def mish(rows: int | str = 1024, columns: int = 3072) -> onnx.ModelProto:
    """A bias and Mish: x * tanh(softplus(x))."""
    graph = Graph("mish")
    x = graph.input("x", [rows, columns])
    biased = graph.op("Add", x, graph.weight("bias", _normal(1, columns)))
    gate = graph.op("Tanh", graph.op("Softplus", biased))
    graph.output(graph.op("Mul", biased, gate), "out", [rows, columns])
    return graph.model()


def reduce_sum_square(rows: int | str = 4096, columns: int = 1024) -> onnx.ModelProto:
    """The distance of each row from a centre: ReduceSumSquare is slower than its parts in onnxruntime."""
    graph = Graph("reduce_sum_square")
    x = graph.input("x", [rows, columns])
    difference = graph.op("Sub", x, graph.weight("centre", _normal(1, columns)))
    squares = graph.op("ReduceSumSquare", difference, LAST_AXIS, keepdims=0)
    graph.output(graph.op("Sqrt", squares), "out", [rows])
    return graph.model()


def image_preprocessing(height: int | str = 1080, width: int | str = 1920) -> onnx.ModelProto:
    """A picture of bytes, HWC, to the normalised floats that a network takes, NCHW."""
    graph = Graph("image_preprocessing")
    image = graph.input("image", [height, width, 3], TensorProto.UINT8)
    scaled = graph.op("Div", graph.op("Cast", image, to=TensorProto.FLOAT), 255.0)
    normal = graph.op("Div", graph.op("Sub", scaled, _IMAGE_MEAN), _IMAGE_STD)
    planes = graph.op("Transpose", normal, perm=[2, 0, 1])
    batch = graph.op("Unsqueeze", planes, np.array([0], np.int64))
    graph.output(batch, "out", [1, 3, height, width])
    return graph.model()


def wide_deep(rows: int | str = 1024, columns: int = 50) -> onnx.ModelProto:
    """Wide & Deep: numeric feature columns, each normalised by constants of its own, side by side."""
    graph = Graph("wide_deep")
    generator = np.random.default_rng(0)
    features = []
    for index in range(columns):
        x = graph.input(f"feature_{index}", [rows, 1])
        mean, std, low, high, weight, bias = generator.normal(size=6).astype(np.float32)
        known = graph.op("Where", graph.op("IsNaN", x), _one(mean), x)
        normal = graph.op("Div", graph.op("Sub", known, _one(mean)), _one(1 + abs(std)))
        capped = graph.op("Min", graph.op("Max", normal, _one(-3 - abs(low))), _one(3 + abs(high)))
        magnitude = graph.op("Log", graph.op("Add", graph.op("Abs", capped), _one(1.0)))
        signed = graph.op("Mul", magnitude, graph.op("Sign", capped))
        crossed = graph.op("Add", graph.op("Mul", signed, _one(weight)), _one(bias))
        features.append(graph.op("Sigmoid", crossed))
    graph.output(graph.op("Concat", *features, axis=1), "out", [rows, columns])
    return graph.model()


def adam(
    parameters: int = 50, divisor: int = 1, shapes: Sequence[tuple[int, ...]] = _PARAMETER_SHAPES
) -> onnx.ModelProto:
    """One step of Adam over parameters of `shapes` in turn; `divisor` makes their first extent smaller."""
    graph = Graph("adam")
    rate = graph.input("learning_rate", [])
    corrections = _corrections(graph)
    for index in range(parameters):
        shape = _parameter_shape(index, divisor, shapes)
        parameter = graph.input(f"parameter_{index}", shape)
        direction = _direction(graph, index, shape, corrections)
        updated = graph.op("Sub", parameter, graph.op("Mul", direction, rate))
        graph.output(updated, f"new_parameter_{index}", shape)
    return graph.model()


def lamb(parameters: int = 50, divisor: int = 1) -> onnx.ModelProto:
    """One step of LAMB (You et al. 2020, algorithm 2): Adam's direction, scaled by two norms a tensor."""
    graph = Graph("lamb")
    rate = graph.input("learning_rate", [])
    corrections = _corrections(graph)

    def norm(value: str) -> str:
        return graph.op("Sqrt", graph.op("ReduceSum", graph.op("Mul", value, value), keepdims=0))

    for index in range(parameters):
        shape = _parameter_shape(index, divisor, _PARAMETER_SHAPES)
        parameter = graph.input(f"parameter_{index}", shape)
        direction = _direction(graph, index, shape, corrections)
        update = graph.op("Add", direction, graph.op("Mul", parameter, _WEIGHT_DECAY))
        length, step_length = norm(parameter), norm(update)
        both = graph.op("And", graph.op("Greater", length, 0.0), graph.op("Greater", step_length, 0.0))
        trust = graph.op("Where", both, graph.op("Div", length, step_length), 1.0)
        scaled = graph.op("Mul", update, graph.op("Mul", trust, rate))
        graph.output(graph.op("Sub", parameter, scaled), f"new_parameter_{index}", shape)
    return graph.model()


def _parameter_shape(index: int, divisor: int, shapes: Sequence[tuple[int, ...]]) -> list[int]:
    first, *rest = shapes[index % len(shapes)]
    return [first // divisor, *rest]


def _corrections(graph: Graph) -> tuple[str, str]:
    """What the two moments are divided by, as they start from 0 (Kingma & Ba 2015, section 3)."""
    step = graph.input("step", [])
    first, second = (graph.op("Sub", 1.0, graph.op("Pow", decay, step)) for decay in _DECAYS)
    return first, second


def _direction(graph: Graph, index: int, shape: list[int], corrections: tuple[str, str]) -> str:
    """Adam's step for one parameter, whose new moments become outputs."""
    first_decay, second_decay = _DECAYS
    gradient = graph.input(f"gradient_{index}", shape)
    first = graph.input(f"first_{index}", shape)
    second = graph.input(f"second_{index}", shape)
    new_first = graph.op(
        "Add", graph.op("Mul", first, first_decay), graph.op("Mul", gradient, 1 - first_decay)
    )
    new_first = graph.output(new_first, f"new_first_{index}", shape)
    squared = graph.op("Mul", graph.op("Mul", gradient, gradient), 1 - second_decay)
    new_second = graph.op("Add", graph.op("Mul", second, second_decay), squared)
    new_second = graph.output(new_second, f"new_second_{index}", shape)
    deviation = graph.op("Sqrt", graph.op("Div", new_second, corrections[1]))
    return graph.op("Div", graph.op("Div", new_first, corrections[0]), graph.op("Add", deviation, 1e-8))


def _normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def _one(value: float) -> np.ndarray:
    """A constant of shape [1]."""
    return np.array([value], np.float32)
