"""Times what onnxruntime does: calls of a kernel, threads, and its own operators as models of one node."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper

from apollo_fuse.calibration.kernels import LANES, NARROW, WIDE
from apollo_fuse.machine import Machine, Runtime
from apollo_fuse.measure import session_options

_OPSET = 20
_READINGS = 15
_READING = (
    40e-6  # seconds of runs in a row that one reading takes, about: short, to fall between what others do
)
_AWAKE = 1e-3  # the same of threads, which wake at once in some runs and late in most
_CHAIN = 24  # nodes in a row
_ROWS, _COLUMNS = 64, 256  # of what operators are timed on: it stays in the second level of cache
_SPANS = 2048  # turns of a broadcast, over rows of 4
_LITTLE, _MUCH = 2 * 58, 6 * 22  # items of a probe that the plugin parts for 2 threads, and for 10 or more
DOMAIN = "apollo_fuse"


@dataclass(frozen=True, slots=True)
class Calls:
    """Seconds of a call of a kernel, and of each of its tensors; and onnxruntime's own operators."""

    node: float
    argument: float
    runtime: Runtime


def measure(library: Path, base: Machine) -> Calls:
    """Times the probes in `library` with onnxruntime, and its own operators."""
    assert base.runtime is not None
    node = _each("Mul", "", 3, None)
    calls = {tensors: _each(f"probe_{tensors}", DOMAIN, tensors, library) for tensors in (NARROW, WIDE)}
    argument = max((calls[WIDE] - calls[NARROW]) / (WIDE - NARROW), 0.0)
    call = max(
        calls[NARROW] - NARROW * argument, node
    )  # what onnxruntime does for any node, it does for ours
    return Calls(call, argument, _operators(base.runtime, node))


# -- calls and threads ----------------------------------------------------------------------


def _each(op_type: str, domain: str, tensors: int, library: Path | None) -> float:
    """Seconds of one node of a chain of them, on tensors of one element."""
    x = np.ones(1, np.float32)
    seconds: list[float] = []
    for length in (1, 1 + _CHAIN):
        names = ["x", *(f"t{place}" for place in range(length - 1)), "y"]
        nodes = [
            helper.make_node(
                op_type, [names[place]] + ["x"] * (tensors - 2), [names[place + 1]], domain=domain
            )
            for place in range(length)
        ]
        seconds.append(_seconds(_model(nodes, {"x": x}), {"x": x}, 1, library))
    return max((seconds[1] - seconds[0]) / _CHAIN, 0.0)


def parting(library: Path, threads: int) -> tuple[float, float]:
    """Seconds of parting a kernel among threads, and until the others have begun.

    Of little work, the thread that parts it has done all before another wakes; of much, the others lack what
    is done until they do. What they take in most runs, not what they take at best.
    """

    timed = []
    for name, items in (("probe_light", _LITTLE), ("probe_work", _MUCH)):
        x = np.full((items, LANES), 0.9, np.float32)
        model = _model([helper.make_node(name, ["x"], ["y"], domain=DOMAIN)], {"x": x})
        timed += [_Timed.of(model, {"x": x}, count, library, _AWAKE) for count in (1, threads)]
    # in turn, so that what others do meanwhile meets all of them
    readings = [[one.reading() for one in timed] for _ in range(_READINGS)]
    launch = max(median(parted - whole for whole, parted, *_ in readings), 0.0)
    lost = median(threads * shared - alone for *_, alone, shared in readings) - threads * launch
    return launch, max(lost / (threads - 1), 0.0)


# -- operators ------------------------------------------------------------------------------


def _operators(base: Runtime, node: float) -> Runtime:
    """onnxruntime's operators: seconds of an element by op type, less those of the node."""
    x = np.linspace(0.1, 0.9, _ROWS * _COLUMNS, dtype=np.float32).reshape(_ROWS, _COLUMNS)
    empty = _operator("Identity", [x[:1, :1]], {}) - node
    elements = dict(base.elements)
    for op_type, (operands, attributes) in _samples(x).items():
        try:
            found = _operator(op_type, operands, attributes) - empty - node
        except Exception:  # onnxruntime's own class: this version has no such operator
            continue
        elements[op_type] = max(found, 1e-9) / x.size
    rows = x.reshape(-1)[: 4 * _SPANS].reshape(_SPANS, 4)
    spans = _operator("Mul", [rows, rows[:, :1].copy()], {}) - empty - node
    span = max(spans / _SPANS, base.span / 10)
    return Runtime(max(node, base.node / 10), elements, span, base.parallel)


def _samples(x: np.ndarray) -> dict[str, tuple[list[np.ndarray], dict[str, int | list[int]]]]:
    """Operands and attributes of each operator that is timed."""
    one = np.ones(_COLUMNS, np.float32)
    last = np.array([-1], np.int64)
    channels = x.reshape(1, _ROWS, -1, 16)
    each = np.ones(_ROWS, np.float32)
    bounds = np.array(0.2, np.float32), np.array(0.8, np.float32)
    unary = (
        *("Abs", "Neg", "Sqrt", "Exp", "Log", "Erf", "Tanh", "Sigmoid", "HardSigmoid", "Softplus", "Relu"),
        *("LeakyRelu", "Reciprocal", "Floor", "Sign", "Sin", "Cos", "IsNaN"),
    )
    found: dict[str, tuple[list[np.ndarray], dict[str, int | list[int]]]] = {
        name: ([x], {}) for name in unary
    }
    found |= {name: ([x, x], {}) for name in ("Add", "Sub", "Mul", "Div", "Max", "Min", "Greater", "Equal")}
    found |= {name: ([x, last], {}) for name in ("ReduceSum", "ReduceMean", "ReduceMax", "ReduceSumSquare")}
    found |= {name: ([channels], {}) for name in ("GlobalAveragePool", "GlobalMaxPool")}
    window: dict[str, int | list[int]] = {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}
    found |= {name: ([channels], window) for name in ("MaxPool", "AveragePool")}
    return found | {
        "Pow": ([x, np.array(3, np.float32)], {}),
        "Clip": ([x, *bounds], {}),
        "Softmax": ([x], {"axis": -1}),
        "ArgMax": ([x], {"axis": -1}),
        "LayerNormalization": ([x, one, one], {}),
        "BatchNormalization": ([channels, *(each for _ in range(4))], {}),
        "Gelu": ([x], {}),
        "Cast": ([x], {"to": TensorProto.INT32}),
        "Where": ([x > 0.5, x, x], {}),
        "Transpose": ([x.reshape(4, 16, 16, 16)], {"perm": [0, 2, 1, 3]}),
        "Concat": ([x[:32], x[32:]], {"axis": 0}),
        "Slice": ([x, np.array([0]), np.array([_COLUMNS - 1]), np.array([1])], {}),
        "Gather": ([x, np.arange(_ROWS)[::-1].copy()], {"axis": 0}),
        "Expand": ([x[:, :1].copy(), np.array(x.shape)], {}),
        "Pad": ([x, np.array([0, 1, 0, 1])], {}),
        "LRN": ([channels], {"size": 5}),
    }


def _operator(op_type: str, operands: list[np.ndarray], attributes: Mapping[str, int | list[int]]) -> float:
    """Seconds of a run of a model of one node, on one thread; its first operand is fed, the others too."""
    feeds = {f"x{place}": operand for place, operand in enumerate(operands)}
    node = helper.make_node(op_type, list(feeds), ["y"])
    node.attribute.extend(helper.make_attribute(name, value) for name, value in attributes.items())
    return _seconds(_model([node], feeds), feeds, 1, None)


# -- models ---------------------------------------------------------------------------------


def _model(nodes: list[onnx.NodeProto], feeds: Mapping[str, np.ndarray]) -> bytes:
    """A model that takes `feeds`, of tensors but for what says how an operator works, to the value ``y``."""
    inputs: list[onnx.ValueInfoProto] = []
    weights: list[onnx.TensorProto] = []
    for name, array in feeds.items():
        if name != "x" and name != "x0" and (array.dtype.kind == "i" or not array.shape):
            weights.append(onnx.numpy_helper.from_array(array, name))
        else:
            kind = helper.np_dtype_to_tensor_dtype(array.dtype)
            inputs.append(helper.make_tensor_value_info(name, kind, array.shape))
    graph = helper.make_graph(nodes, "timed", inputs, [onnx.ValueInfoProto(name="y")], weights)
    opsets = [helper.make_opsetid("", _OPSET), helper.make_opsetid(DOMAIN, 1)]
    written: bytes = helper.make_model(graph, opset_imports=opsets, ir_version=8).SerializeToString()
    return written


def _seconds(model: bytes, feeds: Mapping[str, np.ndarray], threads: int, library: Path | None) -> float:
    """The least seconds of a run."""
    timed = _Timed.of(model, feeds, threads, library, _READING)
    return min(timed.reading() for _ in range(_READINGS))


@dataclass(frozen=True, slots=True)
class _Timed:
    """A session, and of how many runs in a row a reading is."""

    run: Callable[[], object]
    runs: int

    @classmethod
    def of(
        cls, model: bytes, feeds: Mapping[str, np.ndarray], threads: int, library: Path | None, seconds: float
    ) -> _Timed:
        """Of readings of so many seconds about."""
        options = session_options(threads)
        if library is not None:
            options.register_custom_ops_library(str(library))
        session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        binding = session.io_binding()
        for argument in session.get_inputs():
            value = ort.OrtValue.ortvalue_from_numpy(feeds[argument.name])
            binding.bind_ortvalue_input(argument.name, value)
        binding.bind_output("y", "cpu")
        run = partial(session.run_with_iobinding, binding)
        run()
        once = cls(run, 1).reading()
        return cls(run, max(1, round(seconds / once)))

    def reading(self) -> float:
        """Seconds of a run."""
        start = perf_counter()
        for _ in range(self.runs):
            self.run()
        return (perf_counter() - start) / self.runs
