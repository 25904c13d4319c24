"""Chains of reductions, each result of which is used all over the rows that it was made from."""

from __future__ import annotations

import math

import numpy as np
import onnx
from onnx import TensorProto

from models.writing import LAST_AXIS, Graph

_EPSILON = 1e-5
_MASKED = -10000.0


def log_softmax(rows: int | str = 512, columns: int | str = 1024) -> onnx.ModelProto:
    """LogSoftmax over the last axis, in primitives."""
    graph = Graph("log_softmax")
    x = graph.input("x", [rows, columns])
    graph.output(_log_softmax(graph, x), "out", [rows, columns])
    return graph.model()


def masked_softmax(
    batch: int | str = 8, heads: int = 12, queries: int | str = 128, keys: int | str = 128
) -> onnx.ModelProto:
    """The softmax of attention: scaled scores, a mask over the keys that is added to them."""
    graph = Graph("masked_softmax")
    scores = graph.input("scores", [batch, heads, queries, keys])
    mask = graph.input("mask", [batch, 1, 1, keys])
    scaled = graph.op("Mul", scores, 1 / math.sqrt(64))
    hidden = graph.op("Mul", graph.op("Sub", 1.0, mask), _MASKED)
    shifted_scores = graph.op("Add", scaled, hidden)
    shifted = graph.op("Sub", shifted_scores, graph.op("ReduceMax", shifted_scores, LAST_AXIS))
    exponential = graph.op("Exp", shifted)
    result = graph.op("Div", exponential, graph.op("ReduceSum", exponential, LAST_AXIS))
    graph.output(result, "out", [batch, heads, queries, keys])
    return graph.model()


def group_norm(
    batch: int | str = 4, channels: int = 64, height: int = 16, width: int = 16, groups: int = 32
) -> onnx.ModelProto:
    """Group normalisation as exporters write it: an InstanceNormalization over the groups as channels."""
    graph = Graph("group_norm")
    x = graph.input("x", [batch, channels, height, width])
    random = np.random.default_rng(0)
    scale = graph.weight("scale", (1 + 0.1 * random.standard_normal((channels, 1, 1))).astype(np.float32))
    bias = graph.weight("bias", (0.1 * random.standard_normal((channels, 1, 1))).astype(np.float32))
    grouped = graph.op("Reshape", x, np.array([0, groups, -1], np.int64))
    ones, zeros = np.ones(groups, np.float32), np.zeros(groups, np.float32)
    normal = graph.op("InstanceNormalization", grouped, ones, zeros, epsilon=_EPSILON)
    back = graph.op("Reshape", normal, np.array([-1, channels, height, width], np.int64))
    result = graph.op("Add", graph.op("Mul", back, scale), bias)
    graph.output(result, "out", [batch, channels, height, width])
    return graph.model()


def cross_entropy(rows: int | str = 512, classes: int | str = 1024) -> onnx.ModelProto:
    """The mean of the negative logarithms of the probabilities that softmax gives the labels."""
    graph = Graph("cross_entropy")
    x = graph.input("x", [rows, classes])
    labels = graph.input("labels", [rows], TensorProto.INT64)
    at = graph.op("Unsqueeze", labels, np.array([1], np.int64))
    chosen = graph.op("GatherElements", _log_softmax(graph, x), at, axis=1)
    loss = graph.op("ReduceMean", graph.op("Neg", chosen), np.array([0, 1], np.int64), keepdims=0)
    graph.output(loss, "out", [])
    return graph.model()


def batch_norm_training(
    batch: int | str = 8, channels: int = 64, height: int = 28, width: int = 28
) -> onnx.ModelProto:
    """Batch normalisation by the batch's own statistics, in primitives."""
    graph = Graph("batch_norm_training")
    x = graph.input("x", [batch, channels, height, width])
    random = np.random.default_rng(0)
    scale = graph.weight("scale", (1 + 0.1 * random.standard_normal((channels, 1, 1))).astype(np.float32))
    bias = graph.weight("bias", (0.1 * random.standard_normal((channels, 1, 1))).astype(np.float32))
    axes = np.array([0, 2, 3], np.int64)
    centred = graph.op("Sub", x, graph.op("ReduceMean", x, axes))
    variance = graph.op("ReduceMean", graph.op("Mul", centred, centred), axes)
    normal = graph.op("Div", centred, graph.op("Sqrt", graph.op("Add", variance, _EPSILON)))
    result = graph.op("Add", graph.op("Mul", normal, scale), bias)
    graph.output(result, "out", [batch, channels, height, width])
    return graph.model()


def _log_softmax(graph: Graph, x: str) -> str:
    shifted = graph.op("Sub", x, graph.op("ReduceMax", x, LAST_AXIS))
    total = graph.op("ReduceSum", graph.op("Exp", shifted), LAST_AXIS)
    return graph.op("Sub", shifted, graph.op("Log", total))
