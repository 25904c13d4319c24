"""What onnxruntime takes for a sub-graph with its own operators: the other side of the comparison.

Which operators those are, after all of its optimisations, onnxruntime says itself: its profile names each
node that ran, with the shapes it ran on.  Of these, each costs its dispatch, its elements, and the memory
that it moves; a broadcast costs each run of neighbouring elements too, which makes short ones scalar loops.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from apollo_fuse.cost import missing
from apollo_fuse.dtypes import DType
from apollo_fuse.machine import Machine, Runtime

VIEWS = frozenset({"Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity", "Shape", "Size"})
"""Operators that move nothing."""
_BROADCASTING = frozenset(
    {
        *("Add", "Sub", "Mul", "Div", "Pow", "Max", "Min", "Mean", "Sum", "Mod", "Where", "PRelu"),
        *("Equal", "Less", "Greater", "LessOrEqual", "GreaterOrEqual", "And", "Or", "Xor"),
    }
)
_PARTS = frozenset({"Slice", "Gather", "GatherND", "GatherElements", "Split"})
"""Operators that read no more of their first operand than they write."""
_LIKE = {
    "FastGelu": "Gelu",
    "BiasGelu": "Gelu",
    "QuickGelu": "Sigmoid",
    "SimplifiedLayerNormalization": "LayerNormalization",
    "SkipLayerNormalization": "LayerNormalization",
    "SkipSimplifiedLayerNormalization": "LayerNormalization",
    "InstanceNormalization": "LayerNormalization",
    "LogSoftmax": "Softmax",
    "BiasSoftmax": "Softmax",
    "ReduceMin": "ReduceMax",
    "ReduceL2": "ReduceSumSquare",
    "ReduceL1": "ReduceSumSquare",
    "ReduceProd": "ReduceSum",
    "ArgMin": "ArgMax",
    "Less": "Greater",
    "LessOrEqual": "Greater",
    "GreaterOrEqual": "Greater",
    "Split": "Concat",
    "Ceil": "Floor",
    "Round": "Floor",
    "Elu": "Exp",
    "HardSwish": "HardSigmoid",
}
"""Operators that take about as long as one that is timed."""
_BUFFERS = 2
"""Nodes in a row write to buffers in turn, so that more than one node's lies between two uses of one."""
_DTYPES = {str(dtype.numpy): dtype for dtype in DType} | {dtype.value: dtype for dtype in DType}


@dataclass(frozen=True, slots=True)
class Tensor:
    dtype: DType
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.elements * self.dtype.size


@dataclass(frozen=True, slots=True)
class Ran:
    """A node as onnxruntime ran it; tensors of types that kernels do not know are left out."""

    op_type: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]


def ran(events: Sequence[Mapping[str, object]]) -> tuple[Ran, ...]:
    """The nodes of the first run in a profile of onnxruntime."""
    found: dict[str, Ran] = {}
    for event in events:
        arguments, name = event.get("args"), str(event.get("name"))
        if event.get("cat") == "Node" and name.endswith("_kernel_time") and isinstance(arguments, dict):
            inputs, outputs = (_tensors(arguments.get(f"{end}_type_shape")) for end in ("input", "output"))
            key = f"{name} {arguments.get('node_index')}"
            found.setdefault(key, Ran(str(arguments.get("op_name")), inputs, outputs))
    return tuple(found.values())


def _tensors(described: object) -> tuple[Tensor, ...]:
    """``[{"float": [2, 3]}, ...]`` as onnxruntime writes it."""
    if not isinstance(described, list):
        return ()
    pairs = [pair for entry in described if isinstance(entry, dict) for pair in entry.items()]
    return tuple(Tensor(_DTYPES[name], tuple(map(int, dims))) for name, dims in pairs if name in _DTYPES)


def unfused_seconds(nodes: Sequence[Ran], machine: Machine, threads: int) -> float:
    """Seconds of the nodes one after the other, without those of the call of a session.

    Raises ValueError for a machine of which nothing is known of onnxruntime.
    """
    if machine.runtime is None:
        raise ValueError(f"{machine.name} has no description of onnxruntime's operators")
    used = max(1, min(threads, machine.cores))
    around = 1 if len(nodes) == 1 else _BUFFERS
    return sum(_node(node, machine, machine.runtime, used, around) for node in nodes)


def _node(node: Ran, machine: Machine, runtime: Runtime, threads: int, around: int) -> float:
    if node.op_type in VIEWS or not node.outputs:
        return runtime.node
    written = max(tensor.elements for tensor in node.outputs)
    read = node.inputs[0].elements if node.inputs and node.op_type not in _PARTS else 0
    width = max(tensor.dtype.size for tensor in (*node.outputs, *node.inputs[:1])) / 4
    each = runtime.elements.get(_LIKE.get(node.op_type, node.op_type), runtime.elements[""])
    seconds = max(read, written) * each * width
    if node.op_type in _BROADCASTING:
        seconds += written / _span(node) * runtime.span
    seconds = max(seconds, _memory(node, machine, 1, around))
    if threads > 1 and seconds > runtime.parallel:
        parted = machine.launch + (seconds + (threads - 1) * machine.wake) / threads
        seconds = min(seconds, max(parted, _memory(node, machine, threads, around)))
    return runtime.node + seconds


def _span(node: Ran) -> int:
    """Neighbouring elements of the result that a broadcast makes in one go.

    That is as far as each operand either moves along or stays where it is. An axis of 1 that all operands
    have counts as one along which they move: behind it, ``[1024, 1] * [1]`` is 1,024 turns of one element.
    """
    shape = node.outputs[0].shape
    span, alike = 1, None
    for axis in range(1, len(shape) + 1):
        extents = [t.shape[-axis] if axis <= len(t.shape) else None for t in node.inputs]
        if shape[-axis] == 1 and None in extents:
            continue
        moving = tuple(extent == shape[-axis] for extent in extents)
        if alike is not None and moving != alike:
            break
        alike = moving
        span *= shape[-axis]
    return max(1, span)


def moving_seconds(node: Ran, machine: Machine) -> float:
    """Seconds of moving the node's tensors and nothing else, with the whole machine, among other nodes."""
    return _memory(node, machine, machine.cores, _BUFFERS)


def _memory(node: Ran, machine: Machine, threads: int, around: int) -> float:
    """Seconds of moving the node's tensors; between its turns, `around` times as many bytes are touched."""
    written = sum(tensor.bytes for tensor in node.outputs)
    read = sum(tensor.bytes for tensor in node.inputs)
    if node.op_type in _PARTS:
        read = min(read, written)
    longest = 0.0
    for nearer, level in pairwise(machine.levels):
        assert nearer.size is not None
        room = nearer.size if nearer.shared else nearer.size * threads
        reading, writing = (level.bandwidth(rate, threads) for rate in (level.read, level.write))
        share = missing(around * (read + written), room)
        longest = max(longest, share * (read / reading + written / writing))
    return longest
