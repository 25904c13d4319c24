"""A block of GPT-2 in the primitives that exporters write: over a whole text, and for one token more."""

from __future__ import annotations

import math

import numpy as np
import onnx

from models.layers import Layers
from models.memory_bound import tanh_gelu
from models.writing import Graph

_LOWEST = float(np.finfo(np.float32).min)


def gpt2_block(
    batch: int | str = "batch",
    sequence: int | str = "sequence",
    hidden: int = 768,
    heads: int = 12,
    positions: int = 1024,
) -> onnx.ModelProto:
    """A block over a text of at most `positions` tokens, each of which sees those before it."""
    graph = Graph("gpt2_block")
    states = graph.input("hidden_states", [batch, sequence, hidden])
    block = _Block(graph, hidden, heads, positions)
    query, key, value = block.heads(states)
    graph.output(block.after(states, query, key, value), "out", [batch, sequence, hidden])
    return graph.model()


def gpt2_decode(
    batch: int | str = "batch",
    past: int | str = "past",
    hidden: int = 768,
    heads: int = 12,
    positions: int = 1024,
) -> onnx.ModelProto:
    """A block for the next token: keys and values of the `past` ones are inputs, and grow by one."""
    graph = Graph("gpt2_decode")
    states = graph.input("hidden_states", [batch, 1, hidden])
    cached = [batch, heads, past, hidden // heads]
    past_key, past_value = graph.input("past_key", cached), graph.input("past_value", cached)
    block = _Block(graph, hidden, heads, positions)
    query, key, value = block.heads(states)
    grown = [batch, heads, past + 1 if isinstance(past, int) else f"{past} + 1", hidden // heads]
    key = graph.output(graph.op("Concat", past_key, key, axis=2), "present_key", grown)
    value = graph.output(graph.op("Concat", past_value, value, axis=2), "present_value", grown)
    graph.output(block.after(states, query, key, value), "out", [batch, 1, hidden])
    return graph.model()


class _Block:
    """The parts of a block, in the order in which they are called."""

    def __init__(self, graph: Graph, hidden: int, heads: int, positions: int) -> None:
        self._graph = graph
        self._layers = Layers(graph)
        self._hidden = hidden
        self._heads = heads
        below = np.tril(np.ones((1, 1, positions, positions), np.bool_))
        self._causal = graph.weight("attention.bias", below)

    def heads(self, states: str) -> tuple[str, str, str]:
        """Query, key and value, each `[batch, heads, sequence, hidden / heads]`."""
        graph, hidden = self._graph, self._hidden
        joined = self._dense(self._layers.norm(states, "ln_1", hidden), "c_attn", hidden, 3 * hidden)
        parts = graph.ops("Split", 3, joined, np.full(3, hidden, np.int64), axis=2)
        query, key, value = (
            graph.op("Transpose", self._reshaped(part, self._heads, hidden // self._heads), perm=[0, 2, 1, 3])
            for part in parts
        )
        return query, key, value

    def after(self, states: str, query: str, key: str, value: str) -> str:
        """The block's result: attention and the feed-forward part, each added to what it got."""
        graph, layers, hidden = self._graph, self._layers, self._hidden
        product = graph.op("MatMul", query, graph.op("Transpose", key, perm=[0, 1, 3, 2]))
        scores = graph.op("Div", product, math.sqrt(hidden // self._heads))
        seen = graph.op("Where", self._mask(query, key), scores, _LOWEST)
        context = graph.op("MatMul", graph.op("Softmax", seen, axis=-1), value)
        merged = self._reshaped(graph.op("Transpose", context, perm=[0, 2, 1, 3]), hidden)
        attended = graph.op("Add", self._dense(merged, "c_proj", hidden, hidden), states)
        inner = self._dense(layers.norm(attended, "ln_2", hidden), "mlp_c_fc", hidden, 4 * hidden)
        outer = self._dense(tanh_gelu(graph, inner), "mlp_c_proj", 4 * hidden, hidden)
        return graph.op("Add", attended, outer)

    def _mask(self, query: str, key: str) -> str:
        """The rows of the triangle for the tokens of the query, the columns for those of the key."""
        graph = self._graph
        rows, columns = (
            graph.op("Unsqueeze", self._extent(value, 2), np.array([0], np.int64)) for value in (query, key)
        )
        first = graph.op("Sub", columns, rows)
        seen = graph.op("Slice", self._causal, first, columns, np.array([2], np.int64))
        return graph.op("Slice", seen, np.array([0], np.int64), columns, np.array([3], np.int64))

    def _dense(self, x: str, name: str, inputs: int, outputs: int) -> str:
        """A Conv1D: a Gemm between two reshapes."""
        flat = self._graph.op("Reshape", x, np.array([-1, inputs], np.int64))
        product = self._layers.gemm(flat, name, inputs, outputs)
        return self._graph.op("Reshape", product, self._shape(x, outputs))

    def _reshaped(self, x: str, *inner: int) -> str:
        return self._graph.op("Reshape", x, self._shape(x, *inner))

    def _shape(self, x: str, *inner: int) -> str:
        """The first two extents of `x`, and `inner`."""
        extents = [
            self._graph.op("Unsqueeze", self._extent(x, axis), np.array([0], np.int64)) for axis in (0, 1)
        ]
        return self._graph.op("Concat", *extents, np.array(inner, np.int64), axis=0)

    def _extent(self, x: str, axis: int) -> str:
        return self._graph.op("Gather", self._graph.op("Shape", x), np.array(axis, np.int64), axis=0)
