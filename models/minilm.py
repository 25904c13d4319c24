"""The sentence encoder all-MiniLM-L6-v2 from its released weights, in two forms that exporters write.

The network is BERT's encoder (Devlin et al. 2019).  Which operators a layer becomes depends on the exporter's
age: both forms are those of PyTorch's, with the shapes that reshapes need computed from the batch at hand.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import onnx
from onnx import TensorProto

from models.memory_bound import gelu
from models.writing import Graph

_HEADS = 12
_EPSILON = 1e-12
_LOWEST = float(np.finfo(np.float32).min)
_LAYER_NORMALIZATION = 17
"""The opset that brought the operator; exporters write primitives before."""

Weights = Mapping[str, np.ndarray]


def encoder(weights: Weights, opset: int, heads: int = _HEADS) -> onnx.ModelProto:
    """The model for any batch and length: token ids to the last hidden state.

    Below opset 17, layer norms are primitives, and scores are divided and added a mask of numbers.  From then
    on, layer norms are operators, query and key are each scaled by the root of the scale, and the mask is
    expanded and chosen by Where: the two forms of attention, "eager" and "sdpa".
    """
    graph = Graph("minilm", opset)
    ids, mask, types = (
        graph.input(name, ["batch", "sequence"], TensorProto.INT64)
        for name in ("input_ids", "attention_mask", "token_type_ids")
    )
    network = _Encoder(graph, weights, heads, opset < _LAYER_NORMALIZATION)
    states = network.embedded(ids, types)
    bias = network.mask(mask)
    count = len({name.split(".")[2] for name in weights if name.startswith("encoder.layer.")})
    for layer in range(count):
        states = network.layer(states, bias, f"encoder.layer.{layer}")
    hidden = weights["embeddings.LayerNorm.weight"].size
    graph.output(states, "last_hidden_state", ["batch", "sequence", hidden])
    return graph.model()


class _Encoder:
    """The parts of the network, written into a graph."""

    def __init__(self, graph: Graph, weights: Weights, heads: int, eager: bool) -> None:
        self._graph = graph
        self._weights = weights
        self._heads = heads
        self._eager = eager

    def embedded(self, ids: str, types: str) -> str:
        """Tokens, their types and their places, normalised."""
        graph = self._graph
        words, kinds, places = (
            self._weight(f"embeddings.{name}_embeddings.weight")
            for name in ("word", "token_type", "position")
        )
        count = self._weights["embeddings.position_embeddings.weight"].shape[0]
        position = graph.op(
            "Slice",
            np.arange(count)[None],
            np.array([0], np.int64),
            self._extent(ids, 1),
            np.array([1], np.int64),
        )
        token = graph.op("Add", graph.op("Gather", words, ids), graph.op("Gather", kinds, types))
        return self._norm(
            graph.op("Add", token, graph.op("Gather", places, position)), "embeddings.LayerNorm"
        )

    def mask(self, mask: str) -> str:
        """What is added to scores, `[batch, 1, 1 or sequence, sequence]`."""
        graph = self._graph
        wide = self._unsqueeze(self._unsqueeze(mask, 1), 2)
        if self._eager:
            blocked = graph.op("Sub", 1.0, graph.op("Cast", wide, to=TensorProto.FLOAT))
            return graph.op("Mul", blocked, _LOWEST)
        batch, length = self._extent(mask, 0), self._extent(mask, 1)
        shape = graph.op("Concat", batch, np.array([1], np.int64), length, length, axis=0)
        seen = graph.op("Cast", graph.op("Expand", wide, shape), to=TensorProto.FLOAT)
        blocked = graph.op("Sub", 1.0, seen)
        return graph.op("Where", graph.op("Cast", blocked, to=TensorProto.BOOL), _LOWEST, blocked)

    def layer(self, states: str, bias: str, name: str) -> str:
        graph = self._graph
        context = self._attention(states, bias, f"{name}.attention.self")
        attended = self._dense(context, f"{name}.attention.output.dense")
        attended = self._norm(graph.op("Add", attended, states), f"{name}.attention.output.LayerNorm")
        inner = gelu(graph, self._dense(attended, f"{name}.intermediate.dense"))
        outer = self._dense(inner, f"{name}.output.dense")
        return self._norm(graph.op("Add", outer, attended), f"{name}.output.LayerNorm")

    def _attention(self, states: str, bias: str, name: str) -> str:
        graph = self._graph
        hidden = self._weights[f"{name}.query.weight"].shape[0]
        size = hidden // self._heads
        query, key, value = (
            graph.op(
                "Transpose",
                self._reshaped(self._dense(states, f"{name}.{part}"), self._heads, size),
                perm=perm,
            )
            for part, perm in (("query", [0, 2, 1, 3]), ("key", [0, 2, 3, 1]), ("value", [0, 2, 1, 3]))
        )
        if self._eager:
            scores = graph.op("Div", graph.op("MatMul", query, key), math.sqrt(size))
        else:
            last = np.array([-1], np.int64)
            extent = graph.op("Slice", graph.op("Shape", query), last, np.array([2**63 - 1], np.int64))
            root = graph.op("Sqrt", graph.op("Cast", extent, to=TensorProto.FLOAT))
            scale = graph.op("Sqrt", graph.op("Div", np.ones(1, np.float32), root))
            scores = graph.op("MatMul", graph.op("Mul", query, scale), graph.op("Mul", key, scale))
        likely = graph.op("Softmax", graph.op("Add", scores, bias), axis=-1)
        context = graph.op("Transpose", graph.op("MatMul", likely, value), perm=[0, 2, 1, 3])
        return self._reshaped(context, hidden)

    def _dense(self, x: str, name: str) -> str:
        weight = self._graph.weight(f"{name}.weight", np.ascontiguousarray(self._weights[f"{name}.weight"].T))
        return self._graph.op("Add", self._weight(f"{name}.bias"), self._graph.op("MatMul", x, weight))

    def _norm(self, x: str, name: str) -> str:
        graph = self._graph
        scale, bias = self._weight(f"{name}.weight"), self._weight(f"{name}.bias")
        if not self._eager:
            return graph.op("LayerNormalization", x, scale, bias, axis=-1, epsilon=_EPSILON)
        centred = graph.op("Sub", x, graph.op("ReduceMean", x, axes=[-1]))
        variance = graph.op("ReduceMean", graph.op("Pow", centred, 2.0), axes=[-1])
        deviation = graph.op("Sqrt", graph.op("Add", variance, _EPSILON))
        return graph.op("Add", graph.op("Mul", graph.op("Div", centred, deviation), scale), bias)

    def _reshaped(self, x: str, *inner: int) -> str:
        """`x` with its first two extents kept."""
        extents = [self._extent(x, axis) for axis in (0, 1)]
        shape = self._graph.op("Concat", *extents, np.array(inner, np.int64), axis=0)
        return self._graph.op("Reshape", x, shape)

    def _extent(self, x: str, axis: int) -> str:
        """An extent as a tensor of shape [1]."""
        extent = self._graph.op("Gather", self._graph.op("Shape", x), np.array(axis, np.int64), axis=0)
        return self._unsqueeze(extent, 0)

    def _unsqueeze(self, x: str, axis: int) -> str:
        return self._graph.op("Unsqueeze", x, np.array([axis], np.int64))

    def _weight(self, name: str) -> str:
        return self._graph.weight(name, self._weights[name])
