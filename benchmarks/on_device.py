"""Runs every kernel of the model set on the GPU at hand: ``python -m benchmarks.on_device``.

Each distinct kernel is compiled, launched through the driver on what the model gives it, held against what
onnxruntime computes, and timed by the device.  Where there is no GPU, it says so and ends with status 77.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import onnx_ir as ir

import models
from apollo_fuse import onnx_io
from apollo_fuse.acceptance import needed_values
from apollo_fuse.capture import capture
from apollo_fuse.codegen.triton.compile import Binary
from apollo_fuse.codegen.triton.emit import Program, emit
from apollo_fuse.cost import bound, taken
from apollo_fuse.extents import evaluate
from apollo_fuse.fusion import Candidate
from apollo_fuse.gpu import KNOWN, GpuTarget
from apollo_fuse.gpu_tiles import tiled
from apollo_fuse.gpu_trials import best_of
from apollo_fuse.index import Index, Symbol
from apollo_fuse.options import Options
from apollo_fuse.partition import plan
from apollo_fuse.summary import solve
from apollo_fuse.symbolic import infer_shapes
from apollo_fuse.tolerance import Array, compare
from benchmarks.device import Device, DeviceError, Started
from benchmarks.table import grid

NO_DEVICE = 77
"""The status that build systems take for a test that was skipped."""
_SECONDS = 500.0  # after which no further model is begun
_ROUNDS, _LAUNCHES = 5, 20


@dataclass(frozen=True, slots=True)
class Row:
    """A kernel on the device. us: microseconds of a run, at best. bytes: of its inputs and outputs.

    share: of the device's bandwidth that these come to. problem: empty where it agrees with onnxruntime.
    """

    model: str
    kernel: str
    launches: int
    us: float
    bytes: int
    share: float
    problem: str


def target_for(architecture: int) -> GpuTarget:
    """The newest architecture that is compiled for and that the device runs, as code or from PTX."""
    fitting = [gpu for gpu in KNOWN if gpu.backend == "cuda" and int(gpu.architecture) <= architecture]
    if not fitting:
        raise DeviceError(f"the device has compute capability {architecture}, expected 80 or newer")
    return max(fitting, key=lambda gpu: int(gpu.architecture))


def code_of(binary: Binary, target: GpuTarget, architecture: int) -> bytes:
    """What the driver is given: code where it is for the device's generation, else text that it compiles."""
    same = int(target.architecture) // 10 == architecture // 10
    return binary.path.read_bytes() if same else binary.text.read_bytes() + b"\0"


def wanted(candidates: Iterable[Candidate]) -> list[str]:
    """The names of what the candidates read and of what they are to give."""
    every = list(candidates)
    outputs = (value.name or "" for x in every for value in x.part.outputs)
    return list(dict.fromkeys((*needed_values(every), *outputs)))


def rows_of(name: str, device: Device, options: Options) -> list[Row]:
    """The distinct kernels of a model of the set, worth it or not."""
    with tempfile.TemporaryDirectory() as folder:
        clean = onnx_io.load_clean(models.path(name), Path(folder))
        infer_shapes(clean)
        candidates = {x.variant: x for x in plan(clean, options).candidates}
        arrays = capture(clean, wanted(candidates.values()), models.feeds(name), 2).arrays
        return rows_for(name, list(candidates.values()), arrays, device, options)


def rows_for(
    name: str,
    candidates: Sequence[Candidate],
    arrays: Mapping[str, Array],
    device: Device,
    options: Options,
) -> list[Row]:
    """The candidates on what their model computes; those whose values are not known are left out."""

    def array(value: ir.Value) -> Array | None:
        return value.const_value.numpy() if value.const_value is not None else arrays.get(value.name or "")

    target = target_for(device.architecture)
    shapes = [
        (own, known.shape)
        for x in candidates
        for own, value in zip(x.micro_graph.inputs, x.part.inputs, strict=True)
        if (known := array(value)) is not None
    ]
    sizes = solve(shapes)
    groups = tiled(candidates, sizes, (target,))
    on_gpu = [replace(x, group=groups[x.name]) for x in candidates]
    programs = [(x, p) for x in on_gpu if isinstance(p := emit(x.group, x.name, x.name), Program)]
    rows: list[Row] = []
    for (x, program), kernels in zip(programs, best_of(programs, target, sizes, options), strict=True):
        inputs, outputs = ([array(v) for v in values] for values in (x.part.inputs, x.part.outputs))
        taken_in, given = ([v for v in values if v is not None] for values in (inputs, outputs))
        if (len(taken_in), len(given)) == (len(inputs), len(outputs)):
            binaries = [kernel.binary for kernel in kernels]
            rows.append(_row(name, x, program, binaries, taken_in, given, device, target))
    return rows


def _row(
    name: str,
    candidate: Candidate,
    program: Program,
    binaries: Sequence[Binary],
    inputs: Sequence[Array],
    expected: Sequence[Array],
    device: Device,
    target: GpuTarget,
) -> Row:
    results = [np.empty(x.shape, x.dtype) for x in expected]
    try:
        kernels, pointers = _started(candidate, program, binaries, inputs, device, target)
        device.launch(kernels)
        device.wait()
        for value, result in zip(candidate.group.outputs, results, strict=True):
            device.read(pointers[value.name], result)
        seconds = _fastest(device, kernels)
    finally:
        device.free()
    problems = [
        compare(value.name, a, b).problem
        for value, a, b in zip(candidate.group.outputs, expected, results, strict=True)
    ]
    moved = sum(x.nbytes for x in (*inputs, *expected))
    share = moved / seconds / device.peak if seconds else 0.0
    return Row(
        name, candidate.name, len(kernels), 1e6 * seconds, moved, share, "; ".join(filter(None, problems))
    )


def _started(
    candidate: Candidate,
    program: Program,
    binaries: Sequence[Binary],
    inputs: Sequence[Array],
    device: Device,
    target: GpuTarget,
) -> tuple[list[Started], dict[str, ctypes.c_void_p]]:
    """The launches of a run in order, and where its tensors lie."""
    group = candidate.group
    elements = {place: array.reshape(-1).tolist() for place, array in enumerate(inputs) if array.ndim < 2}
    sizes = bound(group, [array.shape for array in inputs], elements)

    def number(index: Index) -> int:
        found = evaluate(index, sizes)
        if found is None:
            raise ValueError(f"the extent {index} of {candidate.name} is not known")
        return found

    pointers = {}
    for value, array in zip(group.inputs, inputs, strict=True):
        pointers[value.name] = device.array(array.nbytes)
        device.write(pointers[value.name], array)
    for value in (*group.outputs, *group.temporaries):
        elements_of = 1
        for extent in value.shape:
            elements_of *= number(extent)
        pointers[value.name] = device.array(elements_of * value.dtype.size)
    run = {kernel.name for kernel in taken(group, sizes)}
    started: list[Started] = []
    for launch, binary in zip(program.launches, binaries, strict=True):
        items = number(launch.items)
        if launch.kernel in run and items:
            scratch = [device.array(items * number(buffer.bytes)) for buffer in launch.scratch]
            own = [*(pointers[tensor] for tensor in launch.tensors), *scratch]
            extents = [sizes[Symbol(extent)] for extent in launch.extents]
            code = code_of(binary, target, device.architecture)
            started.append(device.start(binary, code, launch.kernel, -(-items // launch.rows), own, extents))
    return started, pointers


def _fastest(device: Device, kernels: Sequence[Started]) -> float:
    """Seconds of a run, the least of several rounds of many."""

    def run() -> None:
        for _ in range(_LAUNCHES):
            device.launch(kernels)

    run()  # warms up
    return min(device.seconds(run) for _ in range(_ROUNDS)) / _LAUNCHES


def to_markdown(rows: Sequence[Row], facts: Mapping[str, str], left: Sequence[str]) -> str:
    wrong = [row for row in rows if row.problem]
    sections = [
        "# Kernels on a GPU",
        "\n".join(f"- {key}: {value}" for key, value in facts.items()),
        f"{len(rows)} kernels ran, {len(wrong)} of them do not agree with onnxruntime. Microseconds: the "
        f"least of {_ROUNDS} rounds of {_LAUNCHES} runs. Share: what the bytes of inputs and outputs come "
        "to, of the peak bandwidth of memory; above 1 they come from a cache.",
        grid(
            ("model", "kernel", "launches", "us", "MB", "share", "agrees"),
            [
                (
                    x.model,
                    x.kernel,
                    str(x.launches),
                    f"{x.us:.1f}",
                    f"{x.bytes / 1e6:.2f}",
                    f"{x.share:.0%}",
                    x.problem or "yes",
                )
                for x in rows
            ],
        ),
    ]
    if left:
        sections.append(f"No time was left for {', '.join(left)}.")
    return "\n\n".join(sections) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.on_device", description=__doc__)
    parser.add_argument("--only", action="append", choices=models.names(), metavar="NAME")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--markdown", type=Path, metavar="FILE")
    chosen = parser.parse_args(arguments)
    try:
        device = Device()
    except DeviceError as error:
        print(f"skipped, there is no GPU: {error}", file=sys.stderr)
        return NO_DEVICE
    start = time.monotonic()
    rows: list[Row] = []
    waiting = list(chosen.only or models.names())
    while waiting and time.monotonic() - start < _SECONDS:
        rows += rows_of(waiting.pop(0), device, replace(Options(), threads=None))
        print(f"{rows[-1].model}: {len(rows)} kernels so far" if rows else "no kernels", file=sys.stderr)
    facts = {"compute capability": str(device.architecture), "peak GB/s": f"{device.peak / 1e9:.0f}"}
    markdown = to_markdown(rows, facts, waiting)
    if chosen.json:
        record = {"device": facts, "rows": [asdict(row) for row in rows], "left": waiting}
        chosen.json.write_text(json.dumps(record, indent=2) + "\n")
    if chosen.markdown:
        chosen.markdown.write_text(markdown)
    print(markdown)
    return 1 if any(row.problem for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
