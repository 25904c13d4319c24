"""Layers with seeded weights, scaled so that activations keep their size."""

from __future__ import annotations

import math

import numpy as np

from models.memory_bound import normalized
from models.writing import Graph


class Layers:
    """The layers of one graph; two of one name share their weights."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._generator = np.random.default_rng(0)
        self._made: set[str] = set()

    def dense(self, x: str, name: str, inputs: int, outputs: int) -> str:
        product = self.product(x, name, inputs, outputs)
        return self._graph.op("Add", self._bias(name, outputs), product)

    def product(self, x: str, name: str, inputs: int, outputs: int) -> str:
        """A dense layer without its bias."""
        return self._graph.op("MatMul", x, self._normal(f"{name}.weight", (inputs, outputs), inputs**-0.5))

    def gemm(self, x: str, name: str, inputs: int, outputs: int) -> str:
        """A dense layer of a matrix, in one operator."""
        weight = self._normal(f"{name}.weight", (inputs, outputs), inputs**-0.5)
        return self._graph.op("Gemm", x, weight, self._bias(name, outputs))

    def norm(self, x: str, name: str, size: int) -> str:
        scale = self._normal(f"{name}.scale", (size,), 0.1, mean=1.0)
        return normalized(self._graph, x, scale, self._bias(name, size))

    def batch_norm(self, x: str, name: str, size: int) -> str:
        """As it is at inference, over axis 1."""
        scale = self._normal(f"{name}.scale", (size,), 0.1, mean=1.0)
        mean = self._normal(f"{name}.mean", (size,), 0.1)
        variance = self._normal(f"{name}.variance", (size,), 0.05, mean=1.0)
        return self._graph.op("BatchNormalization", x, scale, self._bias(name, size), mean, variance)

    def convolution(self, x: str, name: str, inputs: int, outputs: int, kernel: int, group: int = 1) -> str:
        shape = (outputs, inputs // group, kernel, kernel)
        weight = self._normal(f"{name}.weight", shape, (2 / math.prod(shape[1:])) ** 0.5)
        pads = [kernel // 2] * 4
        return self._graph.op(
            "Conv",
            x,
            weight,
            self._bias(name, outputs),
            kernel_shape=[kernel, kernel],
            pads=pads,
            group=group,
        )

    def _bias(self, name: str, size: int) -> str:
        return self._normal(f"{name}.bias", (size,), 0.1)

    def _normal(self, name: str, shape: tuple[int, ...], std: float, mean: float = 0.0) -> str:
        if name in self._made:
            return name
        self._made.add(name)
        values = self._generator.standard_normal(shape, np.float32)
        return self._graph.weight(name, np.float32(mean) + np.float32(std) * values)
