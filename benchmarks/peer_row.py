"""Measures one model in another compiler, in a process of its own: ``python -m benchmarks.peer_row``.

Each runs with the threads given, its weights and inputs in its own memory. The least time is written as JSON.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

import models
from apollo_fuse.measure import session_options
from benchmarks.row import require_agreement

Array = np.ndarray
_REPETITIONS = 9
"""Of IREE's own measuring, which gives the mean of each: the least of them counts."""
_OLDEST_OPSET = "17"
"""What IREE's importer lifts older models to."""


class Peer:
    """A model in another compiler."""

    def outputs(self) -> list[Array]:
        raise NotImplementedError

    def least_seconds(self, seconds: float) -> float:
        """The least latency met within about so many seconds."""
        raise NotImplementedError


class OpenVino(Peer):
    """In float32, as the model states it: OpenVINO would take bfloat16 where a processor is fast at that."""

    def __init__(self, model: Path, feeds: Mapping[str, Array], threads: int, folder: Path) -> None:
        openvino: Any = importlib.import_module("openvino")
        hints = {
            "INFERENCE_NUM_THREADS": threads,
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": "f32",
        }
        self._request = openvino.Core().compile_model(str(model), "CPU", hints).create_infer_request()
        self._inputs = {name: np.array(array, order="C") for name, array in feeds.items()}
        for name, array in self._inputs.items():
            self._request.set_tensor(name, openvino.Tensor(array, shared_memory=True))
        self._request.infer()

    def outputs(self) -> list[Array]:
        return [np.array(output.data) for output in self._request.output_tensors]

    def least_seconds(self, seconds: float) -> float:
        return _least(self._request.infer, seconds)


class Iree(Peer):
    """Compiled for this machine, and run by IREE's own tools, which keep inputs and freed memory at hand."""

    def __init__(self, model: Path, feeds: Mapping[str, Array], threads: int, folder: Path) -> None:
        imported, self._module = folder / "model.mlir", folder / "model.vmfb"
        _run("iree-import-onnx", str(model), "--opset-version", _OLDEST_OPSET, "-o", str(imported))
        target = (
            "--iree-hal-target-backends=llvm-cpu",
            "--iree-llvmcpu-target-cpu=host",
            "--iree-opt-level=O3",
        )
        _run("iree-compile", str(imported), *target, "-o", str(self._module))
        found = re.search(r"func\.func @([\w$.-]+)\(", imported.read_text())
        assert found is not None, "the importer writes one function"
        self._arguments = [
            f"--module={self._module}",
            f"--function={found.group(1)}",
            "--device=local-task",
            "--device_allocator=caching",
            f"--task_topology_group_count={threads}",
        ]
        for place, array in enumerate(feeds.values()):
            np.save(folder / f"input{place}.npy", array)
            self._arguments.append(f"--input=@{folder}/input{place}.npy")
        self._folder, self._results = folder, len(onnx.load(model, load_external_data=False).graph.output)

    def outputs(self) -> list[Array]:
        paths = [self._folder / f"output{place}.npy" for place in range(self._results)]
        _run("iree-run-module", *self._arguments, *(f"--output=@{path}" for path in paths))
        return [np.load(path) for path in paths]

    def least_seconds(self, seconds: float) -> float:
        each = f"--benchmark_min_time={seconds / _REPETITIONS:g}s"
        printed = _run(
            "iree-benchmark-module",
            *self._arguments,
            each,
            f"--benchmark_repetitions={_REPETITIONS}",
            "--benchmark_format=json",
        )
        return least_of(json.loads(printed[printed.index("{") :]))


PEERS: Mapping[str, type[OpenVino] | type[Iree]] = {"OpenVINO": OpenVino, "IREE": Iree}


def least_of(report: Mapping[str, Any]) -> float:
    """The least seconds of a run, of a report in google-benchmark's format."""
    units = {"ns": 1e-9, "us": 1e-6, "ms": 1e-3, "s": 1.0}
    runs = [entry for entry in report["benchmarks"] if entry["run_type"] == "iteration"]
    return min(entry["real_time"] * units[entry["time_unit"]] for entry in runs)


def _least(run: Callable[[], object], seconds: float) -> float:
    least, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        run()
        least = min(least, time.perf_counter() - start)
    return least


def _run(tool: str, *arguments: str) -> str:
    """What a tool beside this interpreter prints. Raises RuntimeError with the first error that it tells."""
    command = [str(Path(sys.executable).with_name(tool)), *arguments]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    if process.returncode != 0:
        lines = [line for line in process.stderr.splitlines() if "error" in line] or [process.stderr]
        raise RuntimeError(f"{tool}: {lines[0][:200]}")
    return process.stdout


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peer_row", description=__doc__)
    parser.add_argument("peer", choices=PEERS)
    parser.add_argument("name", choices=models.names())
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--result", type=Path, required=True)
    chosen = parser.parse_args(arguments)
    model, feeds = models.path(chosen.name), models.feeds(chosen.name)
    reference = ort.InferenceSession(str(model), session_options(chosen.threads)).run(None, feeds)
    with tempfile.TemporaryDirectory() as folder:
        peer = PEERS[chosen.peer](model, feeds, chosen.threads, Path(folder))
        require_agreement(reference, peer.outputs())
        chosen.result.write_text(json.dumps({"seconds": peer.least_seconds(chosen.seconds)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
