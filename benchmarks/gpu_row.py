"""Compiles one model for GPUs, in a process of its own: ``python -m benchmarks.gpu_row``; none is needed.

The model is fused by the cost model, as `--no-measure` does, with a cache that is empty, and once more with
what that left.  What would be launched is what onnxruntime's profile says that it ran: its own nodes, and
kernels, of which the report tells the launches.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import onnxruntime as ort

import apollo_fuse
import models
from apollo_fuse.dtypes import DType
from apollo_fuse.gpu import KNOWN, gpus_of
from apollo_fuse.machine import Machine
from apollo_fuse.measure import session_options
from apollo_fuse.report import GpuReport, KernelReport, Report
from apollo_fuse.unfused import VIEWS, Ran, Tensor, moving_seconds, ran
from benchmarks.memory_share import COMPUTE_BOUND, CONTROL_FLOW
from benchmarks.row import compile_options

_HOST_ELEMENTS = 8
"""Integers of at most so many elements are shapes and the like, which onnxruntime computes on the host."""


@dataclass(frozen=True, slots=True)
class OnGpu:
    """A model on one GPU, as compiled and predicted; times are in microseconds.

    kernels: distinct ones. launches: of all nodes. memory_launches: of those that are not compute-bound.
    moved, compulsory: bytes from and to memory of the fused kernels with cold caches.
    unfused_us, fused_us: of all that is not compute-bound.
    """

    kernels: int
    launches_before: int
    launches_after: int
    memory_launches_before: int
    memory_launches_after: int
    moved: int
    compulsory: int
    spills: int
    unfused_us: float
    fused_us: float


@dataclass(frozen=True, slots=True)
class Compiled:
    """What became of a model on each GPU by name, and the seconds of compiling for all of them.

    worst: for each GPU the kernel that moves most beside what it has to, and how many times as much.
    """

    gpus: Mapping[str, OnGpu]
    cold_seconds: float
    warm_seconds: float
    worst: Mapping[str, str]


def compiled(name: str, target: str, *, threads: int) -> Compiled:
    """Fuses the model twice and counts."""
    model, feeds = models.path(name), models.feeds(name)
    with tempfile.TemporaryDirectory() as folder:
        fused = Path(folder, "fused.onnx")
        options = replace(
            compile_options(name, feeds, fused, threads),
            measure=False,
            target=target,
            cache_dir=Path(folder, "cache"),
        )
        report = apollo_fuse.fuse(model, fused, options)
        again = apollo_fuse.fuse(model, fused, options)
        before = launched(_profiled(model, None, feeds, folder))
        after = launched(_profiled(fused, report.library, feeds, folder))
    gpus = {str(gpu): _on_gpu(report, str(gpu), gpu.machine, before, after) for gpu in gpus_of(target)}
    worst = {str(gpu): _worst(report, str(gpu)) for gpu in gpus_of(target)}
    return Compiled(gpus, report.compile_seconds.gpu, again.compile_seconds.gpu, worst)


def launched(nodes: Sequence[Ran]) -> list[Ran]:
    """The nodes that a GPU would be given: no views, control flow, or integers that are shapes."""
    return [
        node
        for node in nodes
        if node.op_type not in VIEWS | CONTROL_FLOW and not all(map(_is_shape, node.outputs))
    ]


def _is_shape(tensor: Tensor) -> bool:
    return tensor.dtype is DType.INT64 and tensor.elements <= _HOST_ELEMENTS


def _profiled(model: Path, library: Path | None, feeds: Mapping[str, np.ndarray], folder: str) -> list[Ran]:
    """The nodes that one run takes, behind the optimisations of onnxruntime that are for no processor."""
    options = session_options(1)
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.enable_profiling = True
    options.profile_file_prefix = str(Path(folder, "profile"))
    if library is not None:
        options.register_custom_ops_library(str(library))
    session = ort.InferenceSession(str(model), options)
    session.run(None, dict(feeds))
    return list(ran(json.loads(Path(session.end_profiling()).read_text())))


def _on_gpu(report: Report, gpu: str, machine: Machine, before: Sequence[Ran], after: Sequence[Ran]) -> OnGpu:
    calls = Counter(node.op_type for node in after)
    variants: dict[str, list[KernelReport]] = {}
    for kernel in report.kernels:
        if kernel.accepted and kernel.name in calls and gpu in kernel.gpu:
            variants.setdefault(kernel.name, []).append(kernel)

    def total(figure: Callable[[GpuReport], float]) -> float:
        """Over all calls; those of one name are shared among its variants as their places are."""
        return sum(
            calls[name] * sum(figure(x.gpu[gpu]) * x.instances for x in own) / sum(x.instances for x in own)
            for name, own in variants.items()
        )

    others = [node for node in after if node.op_type not in variants]
    memory_before, memory_others = (
        [node for node in nodes if node.op_type not in COMPUTE_BOUND] for nodes in (before, others)
    )
    launches = round(total(lambda x: x.launches))
    return OnGpu(
        kernels=len(variants),
        launches_before=len(before),
        launches_after=len(others) + launches,
        memory_launches_before=len(memory_before),
        memory_launches_after=len(memory_others) + launches,
        moved=round(total(lambda x: x.cold_bytes)),
        compulsory=round(total(lambda x: x.compulsory_bytes)),
        spills=max((x.gpu[gpu].spills for own in variants.values() for x in own), default=0),
        unfused_us=_alone(memory_before, machine),
        fused_us=_alone(memory_others, machine) + total(lambda x: x.predicted_us),
    )


def _alone(nodes: Sequence[Ran], machine: Machine) -> float:
    """Microseconds of the nodes one after the other, each a launch that does nothing but move its tensors."""
    return 1e6 * sum(machine.node + moving_seconds(node, machine) for node in nodes)


def _worst(report: Report, gpu: str) -> str:
    """The kernel that moves most bytes beside what it has to, and how many times as much."""
    own = [(x, x.gpu[gpu]) for x in report.kernels if x.accepted and gpu in x.gpu]
    if not own:
        return ""
    kernel, found = max(
        own, key=lambda pair: pair[0].instances * (pair[1].cold_bytes - pair[1].compulsory_bytes)
    )
    return f"{kernel.name} {found.cold_bytes / max(1, found.compulsory_bytes):.2f}x"


def compiled_from(record: Mapping[str, object]) -> Compiled:
    """The value that asdict made `record` of."""
    fields = dict(record)
    fields["gpus"] = {name: OnGpu(**found) for name, found in fields["gpus"].items()}  # type: ignore[attr-defined]
    return Compiled(**fields)  # type: ignore[arg-type]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_row", description=__doc__)
    parser.add_argument("name", choices=models.names(), metavar="NAME")
    parser.add_argument("--result", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--target", default=",".join(("cpu", *map(str, KNOWN))))
    parser.add_argument("--threads", type=int, default=2)
    chosen = parser.parse_args(arguments)
    found = compiled(chosen.name, chosen.target, threads=chosen.threads)
    chosen.result.write_text(json.dumps(asdict(found)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
