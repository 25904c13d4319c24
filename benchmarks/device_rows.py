"""The kernels of a model on a GPU: each alone, and all of them as a chain, beside torch where it is there."""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import onnx_ir as ir

from apollo_fuse.acceptance import needed_values
from apollo_fuse.codegen.triton.compile import Binary
from apollo_fuse.codegen.triton.emit import Program, emit
from apollo_fuse.cost import bound, taken
from apollo_fuse.extents import evaluate
from apollo_fuse.fusion import Candidate
from apollo_fuse.gpu_tiles import tiled
from apollo_fuse.gpu_trials import best_of
from apollo_fuse.index import Index, Symbol
from apollo_fuse.options import Options
from apollo_fuse.summary import solve
from apollo_fuse.tolerance import Array, compare
from benchmarks.device import Device, Started

ROUNDS, LAUNCHES = 5, 20
MOST_COMPILED = 400
"""Operators of the longest chain that torch is asked to compile, which takes seconds for each hundred."""


@dataclass(frozen=True, slots=True)
class Row:
    """A kernel on the device, or the chain of all of a model. Microseconds are those of a run, at best.

    bytes: of the inputs and outputs of kernels. share: of the device's bandwidth that these come to.
    problem: empty where it agrees with onnxruntime. eager_us, compiled_us: of the same operators in torch,
    None where that cannot be told.
    """

    model: str
    kernel: str
    launches: int
    us: float
    bytes: int
    share: float
    problem: str
    eager_us: float | None = None
    compiled_us: float | None = None
    is_chain: bool = False


@dataclass(frozen=True, slots=True)
class _Ready:
    """A kernel with its tensors on the device, and what it is to compute."""

    candidate: Candidate
    started: Sequence[Started]
    outputs: Sequence[ctypes.c_void_p]
    inputs: Sequence[Array]
    expected: Sequence[Array]

    @property
    def bytes(self) -> int:
        return sum(x.nbytes for x in (*self.inputs, *self.expected))


def wanted(candidates: Iterable[Candidate]) -> list[str]:
    """The names of what the candidates read and of what they are to give."""
    every = list(candidates)
    outputs = (value.name or "" for x in every for value in x.part.outputs)
    return list(dict.fromkeys((*needed_values(every), *outputs)))


def rows_for(
    name: str,
    candidates: Sequence[Candidate],
    arrays: Mapping[str, Array],
    device: Device,
    options: Options,
) -> list[Row]:
    """The distinct ones among the candidates on what their model computes, and the chain of all of them.

    Those whose values are not known are left out.  In the chain equal kernels work on the same tensors.
    """
    distinct = {x.variant: x for x in reversed(candidates)}
    try:
        ready = {x.candidate.variant: x for x in _ready(list(distinct.values()), arrays, device, options)}
        rows = [_row(name, x, device) for x in ready.values()]
        chain = [ready[x.variant] for x in candidates if x.variant in ready]
        return [*rows, _chain(name, chain, device, rows)] if chain else rows
    finally:
        device.free()


def _ready(
    candidates: Sequence[Candidate], arrays: Mapping[str, Array], device: Device, options: Options
) -> Iterable[_Ready]:
    def array(value: ir.Value) -> Array | None:
        return value.const_value.numpy() if value.const_value is not None else arrays.get(value.name or "")

    shapes = [
        (own, known.shape)
        for x in candidates
        for own, value in zip(x.micro_graph.inputs, x.part.inputs, strict=True)
        if (known := array(value)) is not None
    ]
    sizes = solve(shapes)
    groups = tiled(candidates, sizes, (device.target,))
    on_gpu = [replace(x, group=groups[x.name]) for x in candidates]
    programs = [(x, p) for x in on_gpu if isinstance(p := emit(x.group, x.name, x.name), Program)]
    for (x, program), kernels in zip(programs, best_of(programs, device.target, sizes, options), strict=True):
        inputs, outputs = ([array(v) for v in values] for values in (x.part.inputs, x.part.outputs))
        taken_in, given = ([v for v in values if v is not None] for values in (inputs, outputs))
        if (len(taken_in), len(given)) == (len(inputs), len(outputs)):
            started, pointers = _started(x, program, [kernel.binary for kernel in kernels], taken_in, device)
            results = [pointers[value.name] for value in x.group.outputs]
            yield _Ready(x, started, results, taken_in, given)


def _row(model: str, ready: _Ready, device: Device) -> Row:
    results = [np.empty(x.shape, x.dtype) for x in ready.expected]
    device.launch(ready.started)
    device.wait()
    for pointer, result in zip(ready.outputs, results, strict=True):
        device.read(pointer, result)
    names = [value.name for value in ready.candidate.group.outputs]
    problems = [
        compare(name, a, b).problem for name, a, b in zip(names, ready.expected, results, strict=True)
    ]
    row = _timed(model, ready.candidate.name, [ready], device)
    return replace(row, problem="; ".join(filter(None, problems)))


def _chain(model: str, chain: Sequence[_Ready], device: Device, rows: Sequence[Row]) -> Row:
    wrong = [row.kernel for row in rows if row.problem]
    row = _timed(model, f"all {len(chain)}", chain, device)
    return replace(row, problem=f"{', '.join(wrong)} do not agree" if wrong else "", is_chain=True)


def _timed(model: str, kernel: str, chain: Sequence[_Ready], device: Device) -> Row:
    started = [x for ready in chain for x in ready.started]
    seconds = _fastest(device, started)
    moved = sum(x.bytes for x in chain)
    share = moved / seconds / device.peak if seconds else 0.0
    eager, compiled = _in_torch(chain)
    return Row(model, kernel, len(started), 1e6 * seconds, moved, share, "", eager, compiled)


def _fastest(device: Device, kernels: Sequence[Started]) -> float:
    """Seconds of a run, the least of several rounds of many."""
    run = device.recorded(kernels, LAUNCHES)
    run()  # warms up
    return min(device.seconds(run) for _ in range(ROUNDS)) / LAUNCHES


def _started(
    candidate: Candidate,
    program: Program,
    binaries: Sequence[Binary],
    inputs: Sequence[Array],
    device: Device,
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
            started.append(device.start(binary, launch.kernel, -(-items // launch.rows), own, extents))
    return started, pointers


# ------------------------------------------------------------------------------------------------- torch


def _in_torch(chain: Sequence[_Ready]) -> tuple[float | None, float | None]:
    """Microseconds of the chain's operators in torch on a GPU, as they are and compiled."""
    if importlib.util.find_spec("torch") is None:
        return None, None
    import torch

    return in_torch(chain, "cuda") if torch.cuda.is_available() else (None, None)


def in_torch(chain: Sequence[_Ready], place: str) -> tuple[float | None, float | None]:
    import torch
    from torch.utils.benchmark import Timer

    from benchmarks.in_torch import NotInTorch, function_of

    runs: dict[str, Callable[[], object]] = {}
    compiled: dict[str, Callable[[], object]] = {}
    small = sum(len(x.candidate.part.nodes) for x in chain) <= MOST_COMPILED
    for x in chain:
        part, variant = x.candidate.part, x.candidate.variant
        if variant in runs:
            continue
        try:
            function = function_of(part.nodes, part.inputs, part.outputs, place)
            given = [torch.from_numpy(np.array(array)).to(place) for array in x.inputs]
        except (NotInTorch, TypeError):  # the latter of types that numpy alone does not have
            return None, None
        runs[variant] = partial(function, *given)
        if small:
            compiled[variant] = partial(torch.compile(function), *given)

    def microseconds(of: Mapping[str, Callable[[], object]]) -> float:
        run = Timer("for run in runs: run()", globals={"runs": [of[x.candidate.variant] for x in chain]})
        return 1e6 * min(run.timeit(LAUNCHES).mean for _ in range(ROUNDS))

    return microseconds(runs), microseconds(compiled) if small else None
