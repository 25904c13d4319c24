"""How much of a run goes into memory-bound operators, by onnxruntime's own profile."""

from __future__ import annotations

import json
import statistics
import tempfile
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import numpy as np
import onnxruntime as ort

from apollo_fuse.measure import session_options
from models.writing import Graph

COMPUTE_BOUND = frozenset(
    {
        *("Conv", "FusedConv", "NhwcFusedConv", "ConvTranspose", "ConvInteger", "QLinearConv"),
        *("Gemm", "FusedGemm", "QGemm", "MatMul", "FusedMatMul", "MatMulNBits", "Einsum"),
        *("MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "QLinearMatMul"),
        *("LSTM", "DynamicQuantizeLSTM", "GRU", "RNN"),
        *("Attention", "QAttention", "MultiHeadAttention", "GroupQueryAttention", "DecoderAttention"),
        *("DecoderMaskedMultiHeadAttention", "SparseAttention"),
    }
)
"""Convolutions, matrix products, recurrent layers, attention, and their fused and quantised forms."""
CONTROL_FLOW = frozenset({"If", "Loop", "Scan"})
"""Their time is that of the nodes in their bodies, which the profile lists too."""

_WARM_UP_RUNS = 3
_FEWEST_RUNS = 5
_MOST_RUNS = 50
_FLOOR_NODES = 30
_FLOOR_SECONDS = 0.1


@dataclass(frozen=True, slots=True)
class KernelTime:
    """One execution of a node: `start` and `duration` in microseconds."""

    operator: str
    start: float
    duration: float


def memory_bound_share(
    model: Path, feeds: Mapping[str, np.ndarray], *, seconds: float, threads: int
) -> float:
    """The median over several runs of the share of node time outside of `COMPUTE_BOUND`, 0 to 1."""
    floor = _floor(threads)
    runs = _profiled(str(model), feeds, session_options(threads), seconds)
    return statistics.median(share_of(run, floor) for run in runs)


def share_of(nodes: Iterable[KernelTime], floor: float = 0.0) -> float:
    """The share of one run; 1 where nothing took longer than the floor.

    floor: microseconds that the profiler adds to each node, with which a network of many small nodes would
    seem more memory-bound than it is.
    """
    memory = compute = 0.0
    for node in nodes:
        if node.operator in COMPUTE_BOUND:
            compute += node.duration - floor
        elif node.operator not in CONTROL_FLOW:
            memory += node.duration - floor
    if compute <= 0:
        return 1.0
    return max(memory, 0.0) / (max(memory, 0.0) + compute)


def runs_of(events: Sequence[Mapping[str, object]]) -> list[list[KernelTime]]:
    """The nodes of each run in a profile, in the order of the runs."""
    nodes = sorted(_nodes(events), key=lambda node: node.start)
    starts = [node.start for node in nodes]
    spans = sorted(_span(event) for event in events if event["name"] == "model_run")
    return [
        nodes[bisect_left(starts, start) : bisect_right(starts, start + duration)]
        for start, duration in spans
    ]


def _nodes(events: Sequence[Mapping[str, object]]) -> Iterable[KernelTime]:
    for event in events:
        arguments = event.get("args")
        if str(event["name"]).endswith("_kernel_time") and isinstance(arguments, dict):
            yield KernelTime(str(arguments["op_name"]), *_span(event))


def _span(event: Mapping[str, object]) -> tuple[float, float]:
    """Start and duration in microseconds."""
    return float(str(event["ts"])), float(str(event["dur"]))


def _floor(threads: int) -> float:
    """The time that the profile gives to a node that does next to nothing, in microseconds."""
    graph = Graph("floor")
    value = graph.input("x", [1])
    for _ in range(_FLOOR_NODES):
        value = graph.op("Neg", value)
    graph.output(value, "out", [1])
    options = session_options(threads)
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    runs = _profiled(
        graph.model().SerializeToString(), {"x": np.ones(1, np.float32)}, options, _FLOOR_SECONDS
    )
    return statistics.median(statistics.mean(node.duration for node in run) for run in runs)


def _profiled(
    model: str | bytes, feeds: Mapping[str, np.ndarray], options: ort.SessionOptions, seconds: float
) -> list[list[KernelTime]]:
    """The nodes of the runs that fit in `seconds`, without the first ones, which do what is done once."""
    with tempfile.TemporaryDirectory() as folder:
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "profile")
        session = ort.InferenceSession(model, options)
        for _ in range(_WARM_UP_RUNS):
            session.run(None, dict(feeds))
        end, done = perf_counter() + seconds, 0
        while done < _FEWEST_RUNS or (done < _MOST_RUNS and perf_counter() < end):
            session.run(None, dict(feeds))
            done += 1
        events: list[dict[str, object]] = json.loads(Path(session.end_profiling()).read_text())
    return runs_of(events)[_WARM_UP_RUNS:]
