"""Kernels in Triton are compiled for GPUs that need not be there; what compilers say of them is read."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
from elftools.elf.elffile import ELFFile

import models
from apollo_fuse.codegen.triton.compile import Job, compile_kernels
from apollo_fuse.codegen.triton.emit import Launch
from apollo_fuse.dtypes import DType
from apollo_fuse.errors import CompilerError, NoTritonError
from apollo_fuse.gpu import KNOWN, GpuTarget
from apollo_fuse.gpu_trials import best_of
from apollo_fuse.options import Options
from models import chains, memory_bound
from tests.interpreted import candidates_of, emitted

HEAD = "import triton\nimport triton.language as tl\n\n\n"
SPILLING = HEAD + (
    "@triton.jit\n"
    "def k0(in0, out0):\n"
    "    lanes = tl.arange(0, {size})\n"
    "    first = tl.load(in0 + lanes)\n"
    "    second = tl.load(in0 + {size} + lanes)\n"
    "    third = tl.load(in0 + 2 * {size} + lanes)\n"
    "    tl.debug_barrier()\n"
    "    tl.store(out0 + lanes, first * tl.sum(third) + second)\n"
    "    tl.store(out0 + {size} + lanes, second * first + third)\n"
)


def jobs(folder: Path) -> list[Job]:
    """A chain of reductions with forms and gathers, and a kernel with functions of libdevice."""
    chain, functions = chains.cross_entropy("rows", 100), memory_bound.gelu_tanh("rows", 64)
    return [*jobs_of(chain, folder), *jobs_of(functions, folder)]


def jobs_of(model: onnx.ModelProto, folder: Path) -> list[Job]:
    """Every kernel that the model can have."""
    found: list[Job] = []
    for candidate in candidates_of(model, folder)[1]:
        group, program = candidate.group, emitted(candidate)
        types = {v.name: v.dtype for v in (*group.inputs, *group.outputs, *group.temporaries)}
        found += [Job(program.text, launch, types) for launch in program.launches]
    return found


def spilling(launch: Launch, size: int, warps: int) -> Job:
    """Three values for each lane, more than one warp has registers for."""
    own = replace(
        launch, kernel="k0", tensors=("in0", "out0"), scratch=(), extents=(), block=None, warps=warps
    )
    return Job(SPILLING.format(size=size), own, {"in0": DType.FLOAT32, "out0": DType.FLOAT32})


@pytest.fixture(scope="module")
def binaries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("binaries")


@pytest.mark.parametrize("target", KNOWN, ids=str)
def test_binaries_are_elf_files_for_the_target(target: GpuTarget, tmp_path: Path, binaries: Path) -> None:
    every = jobs(tmp_path)
    compiled = compile_kernels(every, target, binaries, 2)
    assert len(compiled) == len(every) > 3
    for job, binary in zip(every, compiled, strict=True):
        with binary.path.open("rb") as file:
            elf = ELFFile(file)
            assert elf["e_machine"] == {"cuda": "EM_CUDA", "hip": "EM_AMDGPU"}[target.backend]
            names = {symbol.name for symbol in elf.get_section_by_name(".symtab").iter_symbols()}
            assert job.launch.kernel in names
        assert binary.spills == 0 and 0 < binary.registers < 128
        assert binary.threads == job.launch.warps * target.warp
        assert binary.bytes == binary.path.stat().st_size


def test_a_second_compilation_reads_the_first(tmp_path: Path, binaries: Path) -> None:
    every = jobs(tmp_path)
    target = KNOWN[0]
    first = compile_kernels(every, target, binaries, 1)
    dates = [binary.path.stat().st_mtime_ns for binary in first]
    assert compile_kernels(every, target, binaries, 1) == first
    assert [binary.path.stat().st_mtime_ns for binary in first] == dates


@pytest.mark.parametrize(
    ("target", "size"),
    [
        (GpuTarget("cuda", "90"), 4096),
        pytest.param(GpuTarget("hip", "gfx942"), 16384, marks=pytest.mark.slow),
    ],
)
def test_what_a_thread_has_no_register_for_is_counted(
    target: GpuTarget, size: int, tmp_path: Path, binaries: Path
) -> None:
    (job, *_) = jobs(tmp_path)
    few, many = compile_kernels([spilling(job.launch, size, w) for w in (1, 8)], target, binaries, 2)
    assert few.spills > 0 and many.spills == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", models.names())
def test_every_kernel_of_the_model_set_is_compiled_and_spills_nothing(
    name: str, tmp_path: Path, binaries: Path
) -> None:
    programs = [(x, emitted(x)) for x in candidates_of(models.load(name), tmp_path)[1]]
    options = Options(cache_dir=binaries, threads=2)
    compiled = best_of(programs, GpuTarget("cuda", "90"), {}, options)
    for (_, program), kernels in zip(programs, compiled, strict=True):
        assert all(kernel.binary.spills == 0 for kernel in kernels), program.text


def test_what_triton_refuses_names_the_kernel_and_the_target(tmp_path: Path, binaries: Path) -> None:
    (job, *_) = jobs(tmp_path)
    wrong = replace(job, text=HEAD + f"@triton.jit\ndef {job.launch.kernel}(*a):\n    nothing\n")
    with pytest.raises(CompilerError, match=rf"Triton failed on the kernel {job.launch.kernel} for cuda:90"):
        compile_kernels([wrong], GpuTarget("cuda", "90"), binaries, 1)


def test_without_triton_a_sentence_says_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(NoTritonError, match=r"Triton is not installed.*apollo-fuse\[gpu\]"):
        compile_kernels([], KNOWN[0], tmp_path, 1)
