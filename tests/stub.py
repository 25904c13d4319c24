"""A process where libraries launch kernels on GPUs that are not there.

What is in tests/gpu stands in for drivers, and for the providers of an onnxruntime that has none for GPUs.
Triton's interpreter runs what is launched.
"""

from __future__ import annotations

import ctypes
import gc
import os
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort

from apollo_fuse import driver, gpu_kernels, gpu_tiles, gpu_trials, onnx_io
from apollo_fuse.acceptance import needed_values
from apollo_fuse.capture import capture
from apollo_fuse.codegen import link
from apollo_fuse.codegen.stitched import runs, writer, writes
from apollo_fuse.codegen.triton.compile import Binary, Job
from apollo_fuse.codegen.triton.emit import Launch, Program, emit, emit_stitched
from apollo_fuse.cost import bound, taken
from apollo_fuse.extents import evaluate
from apollo_fuse.fusion import Candidate
from apollo_fuse.gpu import GpuTarget
from apollo_fuse.index import Symbol
from apollo_fuse.kernel import KernelGroup
from apollo_fuse.measure import session_options
from apollo_fuse.options import InputShape, Options
from apollo_fuse.stitching import Swap, members
from apollo_fuse.trial import Trial
from tests import interpreter
from tests.fusing import reference_session
from tests.worker import Worker

Array = np.ndarray
GPU = Path(__file__).parent / "gpu"
WRITER = writer()
T = TypeVar("T")


class Launched(ctypes.Structure):
    """As in stub_driver.c."""

    _fields_ = (
        ("image", ctypes.c_void_p),
        ("name", ctypes.c_char_p),
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("device", ctypes.c_int),
        ("arguments", ctypes.POINTER(ctypes.c_void_p)),
    )


_Callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(Launched))


@dataclass(frozen=True, slots=True)
class Start:
    """A launch: of which kernel of which module, as how many programs, with which extents.

    Of a stitched kernel that is how many members it has, and of what writes their table, nothing.
    """

    kernel: str
    module: str
    programs: int
    extents: tuple[int, ...]


PROVIDERS = {
    "CUDAExecutionProvider": "cuda",
    "ROCMExecutionProvider": "hip",
    "MIGraphXExecutionProvider": "hip",
}
"""onnxruntime's for GPUs, and whose driver each runs on."""


class Stub:
    """The drivers and the provider, in this process."""

    def __init__(self, folder: Path) -> None:
        self._drivers = {
            "cuda": _driver(folder / "libcuda.so.1"),
            "hip": _driver(folder / "libamdhip64.so.6", "-DHIP"),
        }
        self.provider_path = folder / "provider.so"
        self._provider = _compiled("gpu_provider.c", self.provider_path, f"-I{link._runtime()}", "-ldl")
        self.use("CUDAExecutionProvider")

    def use(self, provider: str) -> None:
        """Stands in for that provider, on its driver, which works, has no devices and has counted nothing."""
        for each in self._drivers.values():
            self._driver = each
            self.have()
            self.fail(None)
            self.call(None)
            self.counts()
        self._driver = self._drivers[PROVIDERS[provider]]
        (ctypes.c_char * 64).in_dll(self._provider, "provider").value = provider.encode()
        size = ctypes.sizeof(ctypes.c_int) * 2  # of a context, which is the device's stream too
        first = ctypes.addressof(ctypes.c_char.in_dll(self._driver, "contexts"))
        streams = (ctypes.c_void_p * 4).in_dll(self._provider, "streams")
        streams[:] = [first + size * device for device in range(4)]

    def have(self, *architectures: int) -> None:
        """The devices of the machine."""
        (ctypes.c_int * 4).in_dll(self._driver, "architectures")[: len(architectures)] = architectures
        self._set(self._driver, "device_count", len(architectures))

    def fail(self, function: str | None, failure: int = 0) -> None:
        """From now on that function of the driver fails; none does for None."""
        self._failing = None if function is None else function.encode()
        ctypes.c_char_p.in_dll(self._driver, "failing").value = self._failing
        self._set(self._driver, "failure", failure)

    def call(self, on_launch: Callable[[Launched], int] | None) -> None:
        """What each launch does; its result is the driver's."""
        self._callback = None if on_launch is None else _Callback(lambda launched: on_launch(launched[0]))
        pointer = None if self._callback is None else ctypes.cast(self._callback, ctypes.c_void_p).value
        ctypes.c_void_p.in_dll(self._driver, "on_launch").value = pointer

    def use_device(self, device: int) -> None:
        """Sessions that this thread makes, and runs, are on that device."""
        self._provider.use_device(device)

    def counts(self) -> dict[str, int]:
        """What was counted since the last time."""
        found: dict[str, int] = {}
        for library, names in (
            (self._driver, ("starts", "loads", "unloads", "retained", "released", "launches")),
            (
                self._provider,
                ("cpu_ops", "gpu_ops", "other_ops", "blocks_given", "blocks_back", "blocks_spoilt"),
            ),
        ):
            for name in names:
                found[name] = ctypes.c_int.in_dll(library, name).value
                self._set(library, name, 0)
        return found

    def memory_types(self) -> list[str]:
        """For each op for the provider that was registered since the last time, where its inputs lie."""
        buffer = (ctypes.c_char * 4096).in_dll(self._provider, "memory_types")
        text = buffer.value.decode()
        ctypes.memset(buffer, 0, 4096)
        return text.split()

    def session(
        self, model: Path, library: Path, *, with_cpu: bool = False, has_providers: bool = True
    ) -> ort.InferenceSession:
        """The model with nothing but the library's ops for the provider, or with those for the CPU too.

        has_providers: whether onnxruntime has any for GPUs.
        """
        # Over the old one, never emptied before: threads with the same library see it whole.
        (ctypes.c_char * 1024).in_dll(self._provider, "library").value = os.fsencode(library)
        self._set(self._provider, "registers_cpu_ops", int(with_cpu))
        self._set(self._provider, "has_providers", int(has_providers))
        options = session_options(2)
        options.register_custom_ops_library(str(self.provider_path))
        return ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])

    def _set(self, library: ctypes.CDLL, name: str, value: int) -> None:
        ctypes.c_int.in_dll(library, name).value = value


def _driver(path: Path, *flags: str) -> ctypes.CDLL:
    return _compiled("stub_driver.c", path, f"-Wl,-soname,{path.name}", *flags)


def _compiled(source: str, output: Path, *flags: str) -> ctypes.CDLL:
    command = [
        "cc",
        "-std=c11",
        "-D_GNU_SOURCE",
        "-shared",
        "-fPIC",
        str(GPU / source),
        *flags,
        "-o",
        str(output),
    ]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(output))


# ------------------------------------------------------------------------- kernels that are interpreted


class Pretended:
    """In the place of Triton's compiler: a binary names the job that it would have been made of.

    The first takes `shared` bytes of a block, and each next one more.
    """

    def __init__(self, shared: int = 47 * 1024) -> None:
        self._shared = shared
        self.jobs: dict[str, Job] = {}
        self.binaries: dict[str, Binary] = {}
        self._modules: dict[str, ModuleType] = {}
        self._number = count()

    def compile(self, jobs: Sequence[Job], target: GpuTarget, cache: Path, workers: int) -> list[Binary]:
        """As `compile_kernels`."""
        found: list[Binary] = []
        cache.mkdir(exist_ok=True)
        for job in jobs:
            number = next(self._number)
            name = f"job {number}"
            path = cache / f"pretended{number}"
            path.write_text(name)
            if target.backend == "cuda":
                path.with_suffix(".ptx").write_text(name)
            threads, rows = job.launch.warps * target.warp, job.launch.rows
            self.jobs[name] = job
            self.binaries[name] = Binary(path, threads, rows, 32, 0, self._shared + 64 * number)
            found.append(self.binaries[name])
        return found

    def run(self, launched: Launched) -> Start:
        """Interprets the kernel on the memory that the launch gives it."""
        name = ctypes.string_at(launched.image).decode()
        job = self.jobs[name]
        launch = job.launch
        alone = (*launch.tensors, *launch.scratch, *launch.extents)
        places = iter(range(2 + (2 if launch.stitched else len(alone))))

        def argument(kind: type) -> int:
            place = launched.arguments[next(places)]
            return ctypes.cast(place, ctypes.POINTER(kind))[0] or 0

        if launch.stitched:
            tensors = [_tensor(argument(ctypes.c_void_p), np.dtype(np.int64))]
            numbers = (argument(ctypes.c_int32),)
        else:
            tensors = [_tensor(argument(ctypes.c_void_p), job.types[x].numpy) for x in launch.tensors]
            tensors += [_tensor(argument(ctypes.c_void_p), b.dtype.compute.numpy) for b in launch.scratch]
            numbers = tuple(argument(ctypes.c_int64) for _ in launch.extents)
        assert [argument(ctypes.c_void_p) for _ in range(2)] == [0, 0]
        if job.text not in self._modules:
            self._modules[job.text] = interpreter._module(job.text)
        constants = {} if launch.block is None else {"BLOCK": launch.block}
        with np.errstate(all="ignore"):
            kernel = getattr(self._modules[job.text], launched.name.decode())
            kernel[launched.grid[0],](*tensors, *numbers, **constants)
        assert tuple(launched.grid)[1:] == (1, 1)
        assert tuple(launched.block) == (self.binaries[name].threads, 1, 1)
        assert launched.shared_bytes == self.binaries[name].shared_bytes
        if launch.kernel == WRITER.launch.kernel:
            numbers = ()  # addresses are others in each run
        return Start(launched.name.decode(), job.text, launched.grid[0], numbers)


def expected(
    swap: Swap, inputs: Sequence[Sequence[Array]], groups: Mapping[str, KernelGroup]
) -> Iterator[Start]:
    """What emit says that a run of the node launches, from the inputs of each of its kernels.

    groups: what the kernels are on a GPU.
    """
    every = [replace(member, group=groups[member.name]) for member in members(swap)]
    names = [member.name for member in every]
    programs: dict[str, Program] = {}
    for member in every:
        program = emit(member.group, member.name, member.name)
        assert isinstance(program, Program)
        programs[member.name] = program
    launches = {name: program.launches for name, program in programs.items()}
    found = runs(names, launches)
    yield from [Start("write", WRITER.text, 1, ())] * writes(found, names, launches)
    groups = {member.name: member.group for member in every}
    for run in found:
        starts = [_start(every[p], launches[names[p]][kernel], inputs[p]) for p, kernel in run.members]
        total = sum(programs for programs, _ in starts)
        if total and len(run.members) > 1:
            kernels, warps = run.kinds(names)
            stitched = emit_stitched([(name, groups[name], kernel) for name, kernel in kernels], warps)
            yield Start("stitch", stitched.text, total, (len(run.members),))
        elif total:
            ((place, kernel),) = run.members
            name = names[place]
            yield Start(launches[name][kernel].kernel, programs[name].text, total, starts[0][1])


def _start(candidate: Candidate, launch: Launch, inputs: Sequence[Array]) -> tuple[int, tuple[int, ...]]:
    """How many programs the kernel takes, and with which extents."""
    group = candidate.group
    elements = {place: array.reshape(-1).tolist() for place, array in enumerate(inputs) if array.ndim < 2}
    sizes = bound(group, [array.shape for array in inputs], elements)
    taking = launch.kernel in {kernel.name for kernel in taken(group, sizes)}
    items = evaluate(launch.items, sizes) if taking else 0
    assert items is not None
    extents = tuple(sizes[Symbol(name)] for name in launch.extents)
    return -(-items // launch.rows), extents


def _tensor(address: int, dtype: np.dtype) -> interpreter._Tensor:
    memory = (ctypes.c_char * 1).from_address(address) if address else (ctypes.c_char * 1)()
    return interpreter._Tensor(np.frombuffer(memory, np.uint8), interpreter._kind(dtype))


# --------------------------------------------------------------------------------- what the process does


@dataclass(frozen=True, slots=True)
class Ran:
    """A model whose kernels were launched, and its session gone.

    outputs: what is expected of each, and what came out.
    """

    outputs: Sequence[tuple[Array, Array]]
    launched: Counter[Start]
    expected: Counter[Start]
    counts: Mapping[str, int]
    memory_types: Sequence[str]


_stub: Stub


class Process:
    """Calls functions in such a process, with its Stub and what else they take."""

    def __init__(self, folder: Path) -> None:
        self._worker = Worker(_begin, folder)

    def __call__(self, function: Callable[..., T], *arguments: object) -> T:
        return self._worker(_with_stub, function, arguments)

    def close(self) -> None:
        self._worker.close()


def _begin(folder: Path) -> None:
    global _stub
    interpreter._begin()
    _stub = Stub(folder)


def _with_stub(function: Callable[..., T], arguments: Sequence[object]) -> T:
    gc.collect()
    _stub.use("CUDAExecutionProvider")
    _stub.use_device(0)
    _stub.memory_types()
    return function(_stub, *arguments)


def fused(
    model: onnx.ModelProto,
    folder: Path,
    feeds: Mapping[str, Array],
    pretended: Pretended | None = None,
    gpu: str = "cuda:80",
) -> tuple[Path, Path, Counter[Start]]:
    """The fused model without functions and its library for a GPU, and what one run is to launch."""
    seen: list[Swap] = []
    groups: dict[str, KernelGroup] = {}
    write = Trial.write

    def noted(trial: Trial, chosen: Sequence[Swap], *rest: object) -> Path:
        seen.extend(chosen)
        return write(trial, chosen, *rest)

    def tiled(*arguments: Any) -> dict[str, KernelGroup]:
        groups.update(gpu_tiles.tiled(*arguments))
        return groups

    pretended = pretended or Pretended()
    onnx.save(model, folder / "net.onnx")
    options = Options(
        shapes=tuple(InputShape(name, array.shape) for name, array in feeds.items() if array.shape),
        target=f"cpu,{gpu}",
        measure=False,
        strict=True,
        fuse_all=True,
        cache_dir=folder / "cache",
    )
    with (
        patched(gpu_kernels, "compile_kernels", pretended.compile),
        patched(gpu_trials, "compile_kernels", pretended.compile),
        patched(gpu_kernels, "tiled", tiled),
        patched(Trial, "write", noted),
    ):
        report = driver.fuse(folder / "net.onnx", options=options)
    assert report.library is not None
    written = onnx.load(report.output)
    del written.functions[:]
    onnx.save(written, report.output)
    clean = onnx_io.load_clean(folder / "net.onnx", folder)
    arrays = capture(clean, needed_values(seen), feeds, 2).arrays

    def array(value: ir.Value) -> Array:
        return value.const_value.numpy() if value.const_value is not None else arrays[value.name or ""]

    starts = (
        start
        for x in seen
        for start in expected(
            x, [[array(value) for value in kernel.part.inputs] for kernel in members(x)], groups
        )
    )
    return report.output, report.library, Counter(starts)


@contextmanager
def patched(owner: object, name: str, value: object) -> Iterator[None]:
    old = getattr(owner, name)
    setattr(owner, name, value)
    yield
    setattr(owner, name, old)


def run_on_hip(
    stub: Stub, model: onnx.ModelProto, feeds: Mapping[str, Array], folder: Path, provider: str
) -> Ran:
    """As `run`, on a provider of AMD's GPUs."""
    stub.use(provider)
    stub.have(0x942)
    return _run(stub, model, feeds, folder, "hip:gfx942")


def run(stub: Stub, model: onnx.ModelProto, feeds: Mapping[str, Array], folder: Path) -> Ran:
    """Fuses the model and runs it, every kernel of it on the first device."""
    stub.have(80)
    return _run(stub, model, feeds, folder, "cuda:80")


def _run(stub: Stub, model: onnx.ModelProto, feeds: Mapping[str, Array], folder: Path, gpu: str) -> Ran:
    pretended, launched, problems = Pretended(), Counter[Start](), list[BaseException]()

    def on_launch(what: Launched) -> int:
        try:
            launched[pretended.run(what)] += 1
        except BaseException as problem:  # which a callback cannot raise
            problems.append(problem)
            return 1
        return 0

    path, library, due = fused(model, folder, feeds, pretended, gpu)
    stub.call(on_launch)
    session = stub.session(path, library)
    try:
        found = session.run(None, dict(feeds))
    finally:
        if problems:
            raise problems[0]
    del session
    gc.collect()
    right = reference_session(model).run(None, dict(feeds))
    outputs = [(np.asarray(a), np.asarray(b)) for a, b in zip(right, found, strict=True)]
    return Ran(outputs, launched, due, stub.counts(), stub.memory_types())
