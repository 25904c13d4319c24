"""A whole model on one of onnxruntime's providers for GPUs: as it is, and fused, with the plugin's kernels.

Inputs and outputs stay on the device, so that no copy of them is measured.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnxruntime as ort

import apollo_fuse
import models
from apollo_fuse.gpu import GpuTarget
from apollo_fuse.measure import interleaved, session_options
from apollo_fuse.tolerance import Array, compare
from benchmarks.row import compile_options

PROVIDERS = {"cuda": "CUDAExecutionProvider", "hip": "ROCMExecutionProvider"}


@dataclass(frozen=True, slots=True)
class Whole:
    """A model on a provider, in microseconds at best. problem: empty where both give the same."""

    model: str
    unfused_us: float
    fused_us: float
    problem: str


def provider_for(target: GpuTarget) -> str | None:
    """The provider that runs on the device, where this onnxruntime has it."""
    name = PROVIDERS[target.backend]
    return name if name in ort.get_available_providers() else None


def whole(name: str, target: GpuTarget, provider: str, *, seconds: float, threads: int) -> Whole:
    """The model of the set, fused by the cost model, measured for so long."""
    feeds = models.feeds(name)
    with tempfile.TemporaryDirectory() as folder:
        fused = Path(folder, "fused.onnx")
        options = compile_options(name, feeds, fused, threads)
        report = apollo_fuse.fuse(
            models.path(name), fused, replace(options, measure=False, target=f"cpu,{target}")
        )
        return compared(name, models.path(name), fused, report.library, feeds, provider, seconds, threads)


def compared(
    name: str,
    model: Path,
    fused: Path,
    library: Path | None,
    feeds: Mapping[str, Array],
    provider: str,
    seconds: float,
    threads: int,
) -> Whole:
    sessions = []
    providers = list(dict.fromkeys((provider, "CPUExecutionProvider")))
    for path, own in ((model, None), (fused, library)):
        options = session_options(threads)
        if own is not None:
            options.register_custom_ops_library(str(own))
        sessions.append(ort.InferenceSession(str(path), options, providers=providers))
    outputs = [value.name for value in sessions[0].get_outputs()]
    expected, found = (session.run(outputs, dict(feeds)) for session in sessions)
    problems = [
        compare(output, np.asarray(a), np.asarray(b)).problem
        for output, a, b in zip(outputs, expected, found, strict=True)
    ]
    place = "cpu" if provider == "CPUExecutionProvider" else "cuda"  # what onnxruntime calls AMD's GPUs, too
    unfused, with_kernels = interleaved(sessions, feeds, seconds=seconds, device=place)
    return Whole(name, 1e6 * unfused.minimum, 1e6 * with_kernels.minimum, "; ".join(filter(None, problems)))
