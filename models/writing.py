"""A writer of ONNX graphs: each call adds a node and gives back the name of its output."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

OPSET = 18
IR_VERSION = 8
"""The one that came with opset 18."""
LAST_AXIS = np.array([-1], np.int64)

Operand: TypeAlias = str | float | np.ndarray
"""The name of a value, a float32 constant, or an array that becomes an initialiser."""

Shape: TypeAlias = Sequence[int | str]


class Graph:
    """A graph that is being written; names are counted, so equal calls give equal models."""

    def __init__(self, name: str, opset: int = OPSET) -> None:
        self._name = name
        self._opset = opset
        self._counts: Counter[str] = Counter()
        self._nodes: list[onnx.NodeProto] = []
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []
        self._initializers: list[onnx.TensorProto] = []
        self._constants: dict[tuple[str, tuple[int, ...], bytes], str] = {}

    def input(self, name: str, shape: Shape, dtype: int = TensorProto.FLOAT) -> str:
        self._inputs.append(helper.make_tensor_value_info(name, dtype, shape))
        return name

    def output(self, value: str, name: str, shape: Shape, dtype: int = TensorProto.FLOAT) -> str:
        """Gives `value`, the output of the node that was added last, the name of a graph output."""
        if list(self._nodes[-1].output) != [value]:
            raise ValueError(f"{value!r} is not the output of the last node, {self._nodes[-1].output}")
        self._nodes[-1].output[0] = name
        self._outputs.append(helper.make_tensor_value_info(name, dtype, shape))
        return name

    def weight(self, name: str, value: np.ndarray) -> str:
        """An initialiser under its own name."""
        self._initializers.append(numpy_helper.from_array(value, name))
        return name

    def op(self, op_type: str, *operands: Operand, **attributes: int | float | list[int]) -> str:
        """Adds a node with one output."""
        return self.ops(op_type, 1, *operands, **attributes)[0]

    def ops(
        self, op_type: str, outputs: int, *operands: Operand, **attributes: int | float | list[int]
    ) -> tuple[str, ...]:
        """Adds a node with several outputs."""
        names = tuple(self._fresh(op_type) for _ in range(outputs))
        inputs = [operand if isinstance(operand, str) else self._constant(operand) for operand in operands]
        node = helper.make_node(op_type, inputs, names, name=f"/{names[0]}")
        node.attribute.extend(helper.make_attribute(name, value) for name, value in attributes.items())
        self._nodes.append(node)
        return names

    def model(self) -> onnx.ModelProto:
        graph = helper.make_graph(
            self._nodes, self._name, self._inputs, self._outputs, initializer=self._initializers
        )
        return helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", self._opset)],
            ir_version=IR_VERSION,
            producer_name="apollo-fuse models",
        )

    def _constant(self, operand: float | np.ndarray) -> str:
        value = np.asarray(operand, np.float32) if isinstance(operand, (int, float)) else operand
        key = (value.dtype.str, value.shape, value.tobytes())
        if key not in self._constants:
            self._constants[key] = self.weight(self._fresh("constant"), value)
        return self._constants[key]

    def _fresh(self, stem: str) -> str:
        self._counts[stem] += 1
        return f"{stem}_{self._counts[stem]}"
