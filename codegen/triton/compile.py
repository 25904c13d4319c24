"""Compiles emitted kernels ahead of time, for GPUs that need not be there; binaries are kept in the cache."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache as memoised
from importlib.metadata import version
from pathlib import Path

from apollo_fuse.atomic import write_bytes, write_text
from apollo_fuse.codegen.triton.emit import Launch
from apollo_fuse.dtypes import DType
from apollo_fuse.errors import CompilerError, NoTritonError
from apollo_fuse.gpu import GpuTarget

_TYPES = {
    DType.FLOAT32: "fp32",
    DType.FLOAT64: "fp64",
    DType.FLOAT16: "fp16",
    DType.BFLOAT16: "bf16",
    DType.BOOL: "u8",
    **{d: f"{'i' if d.is_signed else 'u'}{8 * d.size}" for d in DType if d.is_integer},
}
_MOST_WAVES = 16  # of 64 threads, in a group of 1,024


@dataclass(frozen=True, slots=True)
class Job:
    """A kernel to compile: its module's text, how it is launched, and the types of the group's tensors."""

    text: str
    launch: Launch
    types: Mapping[str, DType]


@dataclass(frozen=True, slots=True)
class Binary:
    """A compiled kernel.

    threads, items: of a block. registers: of a thread, 32 bits each. spills: bytes that a thread has no
        register for and writes to memory. shared_bytes: of a block.
    """

    path: Path
    threads: int
    items: int
    registers: int
    spills: int
    shared_bytes: int

    @property
    def bytes(self) -> int:
        return self.path.stat().st_size

    @property
    def text(self) -> Path:
        """PTX, of a kernel for CUDA."""
        return self.path.with_suffix(".ptx")


def require_triton() -> None:
    """Raises NoTritonError where Triton cannot be imported."""
    if importlib.util.find_spec("triton") is None:
        raise NoTritonError(
            "Triton is not installed, which compiles kernels for GPUs; pip install 'apollo-fuse[gpu]', "
            "or leave GPUs out of the target"
        )


def compile_kernels(jobs: Sequence[Job], target: GpuTarget, cache: Path, workers: int) -> list[Binary]:
    """The binary of each job, from `cache` or compiled by up to `workers` processes at once.

    Raises CompilerError with the first lines of what Triton says.
    """
    require_triton()
    folder = cache / str(target).replace(":", "-")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    described = [_description(job, target) for job in jobs]
    places = [folder / _key(description) for description in described]
    missing = {p: d for p, d in zip(places, described, strict=True) if not _facts(p).exists()}
    if missing:
        shares = [list(missing.items())[start::workers] for start in range(min(workers, len(missing)))]
        with ThreadPoolExecutor(len(shares)) as pool:
            list(pool.map(_compile, shares))
    return [_read(*found) for found in zip(places, jobs, described, strict=True)]


def _description(job: Job, target: GpuTarget) -> dict[str, object]:
    """All that a binary follows from."""
    launch, warp = job.launch, target.warp
    if launch.stitched:
        pointers, signature = 1, {"members": "*i64", "count": "i32"}
    else:
        signature = {name: f"*{_TYPES[job.types[name]]}" for name in launch.tensors}
        signature |= {buffer.name: f"*{_TYPES[buffer.dtype.compute]}" for buffer in launch.scratch}
        pointers = len(signature)
        signature |= dict.fromkeys(launch.extents, "i64")
    constants: dict[str, int] = {}
    if launch.block is not None:
        signature["BLOCK"], constants["BLOCK"] = "constexpr", launch.block
    return {
        "text": job.text,
        "kernel": launch.kernel,
        "signature": signature,
        "pointers": pointers,
        "constants": constants,
        "warps": launch.warps if warp == 32 else min(launch.warps, _MOST_WAVES),
        "warp": warp,
        "backend": target.backend,
        "architecture": target.architecture,
    }


def _key(description: Mapping[str, object]) -> str:
    compiler = [version("triton"), *_sources()]
    return hashlib.sha256(json.dumps([description, compiler]).encode()).hexdigest()


@memoised
def _sources() -> tuple[str, ...]:
    """What is compiled with every kernel, and what compiles it."""
    return tuple(Path(__file__).with_name(name).read_text() for name in ("device.py", "worker.py"))


def _compile(share: Sequence[tuple[Path, Mapping[str, object]]]) -> None:
    """Compiles one after the other in one process; each result appears whole, what is known of it last."""
    with tempfile.TemporaryDirectory() as folder:
        lines: list[str] = []
        for number, (_, description) in enumerate(share):
            text = str(description["text"])
            source = Path(folder, f"{hashlib.sha256(text.encode()).hexdigest()}.py")
            source.write_text(text)
            files = {"source": str(source), "output": str(Path(folder, f"{number}.bin"))}
            lines.append(json.dumps({**description, **files, "text": ""}))
        answers = _answers(folder, lines)
        for number, (answer, (place, description)) in enumerate(zip(answers, share, strict=False)):
            if "error" in answer:
                raise CompilerError(
                    f"Triton failed on the kernel {description['kernel']} for {description['backend']}:"
                    f"{description['architecture']}; report this with the model:\n{answer['error']}"
                )
            for made in Path(folder).glob(f"{number}.*"):
                write_bytes(
                    place.with_suffix("" if made.suffix == ".bin" else made.suffix), made.read_bytes()
                )
            write_text(_facts(place), json.dumps(answer))


def _answers(folder: str, lines: Sequence[str]) -> list[dict[str, object]]:
    """What the worker says of each job; the last is an error where it ends before it is done."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    environment.pop("TRITON_INTERPRET", None)  # which would put off compiling for good
    done = subprocess.run(
        [sys.executable, "-m", "apollo_fuse.codegen.triton.worker", folder],
        input="\n".join(lines),
        capture_output=True,
        text=True,
        env=environment,
    )
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    if len(answers) != len(lines):
        answers.append({"error": done.stderr.strip()[-400:] or f"it ended with status {done.returncode}"})
    return answers


def _facts(place: Path) -> Path:
    return place.with_suffix(".json")


def _read(place: Path, job: Job, description: Mapping[str, object]) -> Binary:
    facts = json.loads(_facts(place).read_text())
    warps, warp = description["warps"], description["warp"]
    assert isinstance(warps, int) and isinstance(warp, int)
    known = (facts[name] for name in ("registers", "spills", "shared_bytes"))
    return Binary(place, warps * warp, job.launch.rows, *known)
