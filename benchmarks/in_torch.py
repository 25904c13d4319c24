"""Nodes of a model as a function of torch's tensors, which torch runs as it is, or compiles.

That is what kernels are held against: the same operators as one would write them in torch.  The table has
those that are bound by memory.  Where a node is none of them, or has axes or a shape that are only known in a
run, there is no such function.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from typing import TYPE_CHECKING, Any

import onnx_ir as ir
import torch
from torch import Tensor, nn

from apollo_fuse.errors import ApolloFuseError

if TYPE_CHECKING:
    from collections.abc import Mapping


class NotInTorch(ApolloFuseError):
    """A node that the table does not have."""


@dataclass(frozen=True, slots=True)
class _Node:
    """A node and what of it is written down."""

    node: ir.Node

    def number(self, name: str, default: float) -> float:
        found = self.node.attributes.get(name)
        return default if found is None else float(found.value)

    def integer(self, name: str, default: int) -> int:
        found = self.node.attributes.get(name)
        return default if found is None else found.as_int()

    def integers(self, name: str, place: int | None = None) -> list[int] | None:
        """An attribute, or else the input at the place, which has to be constant."""
        found = self.node.attributes.get(name)
        if found is not None:
            return list(found.as_ints())
        given = None if place is None or place >= len(self.node.inputs) else self.node.inputs[place]
        if given is None:
            return None
        if given.const_value is None:
            raise NotInTorch(f"{self.node.op_type} with {name} that are no constant")
        return [int(x) for x in given.const_value.numpy().reshape(-1)]


def function_of(
    nodes: Sequence[ir.Node], inputs: Sequence[ir.Value], outputs: Sequence[ir.Value], device: str
) -> Callable[..., list[Tensor]]:
    """A function from tensors for `inputs` to those of `outputs`; what else is read lies on the device.

    The nodes are in an order that they can run in.  Raises NotInTorch.
    """
    places = {value: place for place, value in enumerate(inputs)}
    constants: list[Tensor] = []
    steps: list[tuple[Callable[..., Any], tuple[int, ...]]] = []

    def place(value: ir.Value) -> int:
        if value not in places:
            if value.const_value is None:
                raise NotInTorch(f"{value.name} is no constant")
            places[value] = -1 - len(constants)  # behind all others, where they are looked up from the end
            constants.append(torch.from_numpy(value.const_value.numpy().copy()).to(device))
        return places[value]

    made = len(inputs)
    for node in nodes:
        if node.op_type not in _TABLE:
            raise NotInTorch(node.op_type)
        count, function = _TABLE[node.op_type]
        operands = [value for value in node.inputs[:count] if value is not None]
        steps.append((function(_Node(node)), tuple(map(place, operands))))
        places |= {value: made + number for number, value in enumerate(node.outputs)}
        made += len(node.outputs)
    results = [place(value) for value in outputs]
    known = constants[::-1]

    def run(*given: Tensor) -> list[Tensor]:
        values = list(given)

        def value(place: int) -> Tensor:
            return values[place] if place >= 0 else known[place]

        for function, operands in steps:
            found = function(*map(value, operands))
            values += [found] if isinstance(found, Tensor) else found
        return [value(place) for place in results]

    return run


def _plain(function: Callable[..., Any]) -> tuple[None, Callable[[_Node], Callable[..., Any]]]:
    """Of all inputs, and nothing else."""
    return None, lambda _: function


def _folded(function: Callable[..., Any]) -> tuple[None, Callable[[_Node], Callable[..., Any]]]:
    """Of two tensors, for any number of them."""
    return None, lambda _: lambda *x: reduce(function, x)


def _reduction(function: Callable[..., Any]) -> tuple[int, Callable[[_Node], Callable[..., Any]]]:
    def of(node: _Node) -> Callable[..., Any]:
        axes, keeps = node.integers("axes", 1), bool(node.integer("keepdims", 1))
        return lambda x: function(x, dim=list(range(x.ndim)) if axes is None else axes, keepdim=keeps)

    return 1, of


def _sum_of_squares(x: Tensor, dim: list[int], keepdim: bool) -> Tensor:
    return x.square().sum(dim, keepdim=keepdim)


def _cast(node: _Node) -> Callable[..., Any]:
    dtype = getattr(torch, _TYPES[ir.DataType(node.integer("to", 1))])
    return lambda x: x.to(dtype)


def _clip(node: _Node) -> Callable[..., Any]:
    low, high = len(node.node.inputs) > 1 and node.node.inputs[1] is not None, len(node.node.inputs) > 2

    def clip(x: Tensor, *ends: Tensor) -> Tensor:
        return torch.clamp(x, ends[0] if low else None, ends[-1] if high else None)

    return clip


def _split(node: _Node) -> Callable[..., Any]:
    sizes, axis, count = node.integers("split", 1), node.integer("axis", 0), len(node.node.outputs)
    return lambda x: torch.split(x, sizes or math.ceil(x.shape[axis] / count), axis)


def _reshape(node: _Node) -> Callable[..., Any]:
    shape = node.integers("shape", 1) or []
    return lambda x: x.reshape([x.shape[k] if size == 0 else size for k, size in enumerate(shape)])


def _unsqueeze(node: _Node) -> Callable[..., Any]:
    axes = node.integers("axes", 1) or []

    def unsqueeze(x: Tensor) -> Tensor:
        rank = x.ndim + len(axes)
        return reduce(torch.unsqueeze, sorted(axis % rank for axis in axes), x)

    return unsqueeze


def _layer_norm(node: _Node) -> Callable[..., Any]:
    axis, epsilon = node.integer("axis", -1), node.number("epsilon", 1e-5)

    def layer_norm(x: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
        return nn.functional.layer_norm(x, x.shape[axis:], scale, bias, epsilon)

    return layer_norm


_TYPES = {
    ir.DataType.FLOAT: "float32",
    ir.DataType.DOUBLE: "float64",
    ir.DataType.FLOAT16: "float16",
    ir.DataType.BFLOAT16: "bfloat16",
    ir.DataType.INT32: "int32",
    ir.DataType.INT64: "int64",
    ir.DataType.UINT8: "uint8",
    ir.DataType.BOOL: "bool",
}

_TABLE: Mapping[str, tuple[int | None, Callable[[_Node], Callable[..., Any]]]] = {
    "Abs": _plain(torch.abs),
    "Add": _plain(torch.add),
    "And": _plain(torch.logical_and),
    "Cast": (1, _cast),
    "Clip": (3, _clip),
    "Concat": (None, lambda node: lambda *x: torch.cat(x, node.integer("axis", 0))),
    "Div": _plain(torch.div),
    "Equal": _plain(torch.eq),
    "Erf": _plain(torch.erf),
    "Exp": _plain(torch.exp),
    "Gelu": (1, lambda node: partial(nn.functional.gelu, approximate=_approximate(node))),
    "Greater": _plain(torch.gt),
    "GreaterOrEqual": _plain(torch.ge),
    "HardSigmoid": (
        1,
        lambda node: lambda x: torch.clamp(x * node.number("alpha", 0.2) + node.number("beta", 0.5), 0, 1),
    ),
    "HardSwish": _plain(nn.functional.hardswish),
    "IsNaN": _plain(torch.isnan),
    "LayerNormalization": (3, _layer_norm),
    "LeakyRelu": (
        1,
        lambda node: partial(nn.functional.leaky_relu, negative_slope=node.number("alpha", 0.01)),
    ),
    "Less": _plain(torch.lt),
    "Log": _plain(torch.log),
    "LogSoftmax": (1, lambda node: partial(torch.log_softmax, dim=node.integer("axis", -1))),
    "Max": _folded(torch.maximum),
    "Min": _folded(torch.minimum),
    "Mul": _plain(torch.mul),
    "Neg": _plain(torch.neg),
    "Not": _plain(torch.logical_not),
    "Or": _plain(torch.logical_or),
    "Pow": _plain(torch.pow),
    "Reciprocal": _plain(torch.reciprocal),
    "ReduceMax": _reduction(torch.amax),
    "ReduceMean": _reduction(torch.mean),
    "ReduceMin": _reduction(torch.amin),
    "ReduceSum": _reduction(torch.sum),
    "ReduceSumSquare": _reduction(_sum_of_squares),
    "Relu": _plain(torch.relu),
    "Reshape": (1, _reshape),
    "Sigmoid": _plain(torch.sigmoid),
    "Sign": _plain(torch.sign),
    "Softmax": (1, lambda node: partial(torch.softmax, dim=node.integer("axis", -1))),
    "Softplus": _plain(nn.functional.softplus),
    "Split": (1, _split),
    "Sqrt": _plain(torch.sqrt),
    "Sub": _plain(torch.sub),
    "Tanh": _plain(torch.tanh),
    "Transpose": (1, lambda node: lambda x: x.permute(node.integers("perm") or list(range(x.ndim))[::-1])),
    "Unsqueeze": (1, _unsqueeze),
    "Where": _plain(torch.where),
}
"""For each operator how many of its inputs are tensors, None for all, and what function a node stands for."""


def _approximate(node: _Node) -> str:
    found = node.node.attributes.get("approximate")
    return "none" if found is None else found.as_string()
