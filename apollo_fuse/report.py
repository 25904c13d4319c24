"""What one compilation did, as values; `to_json` writes them as `report.schema.json` documents them.

A field of these classes has the name of its JSON key, and its docstring line is the key's meaning.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import TypeAlias

Json: TypeAlias = "str | int | float | bool | list[Json] | dict[str, Json] | None"
"""A value that JSON can hold."""

SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True)
class GpuReport:
    """A kernel on a GPU: as compiled ahead of time, and as predicted for the measured run. It never ran.

    launches: kernels of the GPU that one run starts; the figures below are of these. Of a stitch, with those
        that only tell the others their tensors.
    registers, shared_bytes: the most that a thread and a block take. spills: bytes that threads have no
        registers for.
    num_warps, occupancy: of a block, and the share of a multiprocessor's threads in flight, of the one that
        takes longest.
    dram_bytes: predicted to be moved, run after run, so that what the last cache holds is not.
    cold_bytes: the same where caches hold nothing at first.
    compulsory_bytes: of the tensors that it takes and gives, what has to be moved.
    predicted_us: microseconds, launches included. binary_bytes: of their code.
    """

    launches: int
    registers: int
    spills: int
    shared_bytes: int
    num_warps: int
    occupancy: float
    dram_bytes: int
    cold_bytes: int
    compulsory_bytes: int
    predicted_us: float
    binary_bytes: int


@dataclass(frozen=True, slots=True)
class KernelReport:
    """One distinct kernel, or kernels that share a launch.

    layer: the fusion layer that made it: 1 loop fusion, 2 memory stitching, 3 parallelism stitching.
    ops: the ONNX op types it computes, in execution order.
    inputs, outputs: its tensors, each as `name: dtype[dims]`.
    bytes_before, bytes_after: bytes that one run of it moves to and from memory, unfused and fused, with the
        extents of the run that was measured; the mean over its places.
    unfused_us, fused_us: microseconds of one run, in onnxruntime with all its optimisations and in the
        kernel; None where nothing was measured.
    predicted_unfused_us, predicted_us: what the cost model says of the operators and of the kernel alone,
        without the call of onnxruntime and the convolutions beside them that measured times include; None
        where the kernel did not come so far.
    accepted: whether the written model uses it.
    reason: why it was accepted or not, in one sentence.
    instances: how many places of the model it computes, or would compute.
    members: of a launch that kernels share, their names, which are reported too; its bytes are theirs.
    apart_us: microseconds of one run with each of the members called by itself; None where not measured.
    note: where an output differs from onnxruntime's by more than the tolerance and is right by what it is in
        float64, both errors; else empty.
    gpu: what it is on the GPUs of the target, by name.
    """

    name: str
    layer: int
    ops: tuple[str, ...]
    pattern: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    bytes_before: int
    bytes_after: int
    unfused_us: float | None
    fused_us: float | None
    accepted: bool
    reason: str
    instances: int = 1
    predicted_unfused_us: float | None = None
    predicted_us: float | None = None
    members: tuple[str, ...] = ()
    apart_us: float | None = None
    note: str = ""
    gpu: Mapping[str, GpuReport] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class RefusedReport:
    """Nodes that stay as they were: their names, the rule that refused them, why, and the evidence for it."""

    nodes: tuple[str, ...]
    rule: str
    reason: str
    evidence: str = ""


@dataclass(frozen=True, slots=True)
class FeedbackRound:
    """One turn of the upward feedback.

    round: counts from 1.
    forbidden_edges: the producer and consumer nodes that this round forbade to be fused together.
    regrouped: the names of the micro-graphs that were grouped anew for it.
    refused: why: the refusal that came back from a lower layer.
    """

    round: int
    forbidden_edges: tuple[tuple[str, str], ...]
    regrouped: tuple[str, ...]
    refused: RefusedReport


@dataclass(frozen=True, slots=True)
class VerificationReport:
    """The fused model against the original in onnxruntime, over `cases` sets of inputs."""

    passed: bool = True
    cases: int = 0
    max_abs_error: float = 0.0
    max_rel_error: float = 0.0


@dataclass(frozen=True, slots=True)
class LatencyReport:
    """The whole model, unfused with all of onnxruntime's optimisations and fused; None where not measured.

    unfused_ms, fused_ms: least time of one run, in milliseconds. speedup: their quotient.
    runs: how often each was run. threads: the threads of both sessions.
    """

    unfused_ms: float | None = None
    fused_ms: float | None = None
    speedup: float | None = None
    runs: int = 0
    threads: int | None = None


@dataclass(frozen=True, slots=True)
class LayoutReport:
    """One layout that was tried for `auto`: nodes that called a kernel, and the latency of the whole model.

    fused_ms: least time of one run, all layouts and the unfused model measured in turn.
    """

    layout: str
    fused_nodes: int
    unfused_ms: float
    fused_ms: float


@dataclass(frozen=True, slots=True)
class CompileSeconds:
    """Wall time of the compilation and of its parts, which are parts of no other, in seconds.

    load: reading and cleaning the model. shapes: inferring them. partition: everything between those and the
        kernels that isl and codegen do not account for.
    inputs: opening the original and finding inputs that it runs on. cc: compiling and linking kernels.
    gpu: compiling them for GPUs.
    judge: verifying, and measuring, each distinct kernel; verify and measure: the same for the whole model.
    write: writing the result and summing it up.
    """

    total: float = 0.0
    load: float = 0.0
    shapes: float = 0.0
    partition: float = 0.0
    isl: float = 0.0
    codegen: float = 0.0
    inputs: float = 0.0
    cc: float = 0.0
    gpu: float = 0.0
    judge: float = 0.0
    verify: float = 0.0
    measure: float = 0.0
    write: float = 0.0

    @property
    def parts(self) -> dict[str, float]:
        """All but the total, in order."""
        return {entry.name: getattr(self, entry.name) for entry in fields(self) if entry.name != "total"}


@dataclass(frozen=True, slots=True)
class Report:
    """What `apollo_fuse.fuse` returns and `--json` writes.

    library: the custom-op library, or None when nothing was fused. Then the model was written unchanged,
        unless `without_kernels` says that it gains by its layout, or by other operators, alone.
    target, cpu: what the library is for, as --target names it, and the processor it was compiled on.
    cpu_targets: what the library's kernels were compiled for, the lowest level first; none without a library.
    verified_cpu: what they were compiled for when they were verified and measured: the best of the targets
        that the machine runs, or else the machine's own.
    versions: apollo-fuse and what its result depends on, by name.
    nodes_before, nodes_after: nodes of the original and of the written model, bodies of If, Loop and Scan
        included, Constant nodes left out.
    layout: the cut that was taken, `portable` or `ort`; layouts: those that were measured to choose it.
    made_for: the onnxruntime and processors that the written model is bound to, or None for any.
    remembered: whether an earlier run of the same compilation verified and measured; these are its figures.
    beside_convolutions: places of kernels, kept or not, where a convolution's layout may have to be changed.
    fused_nodes: nodes of the written model that call a kernel; distinct_kernels: how many kernels they share.
    """

    model: Path
    output: Path
    library: Path | None
    target: str
    cpu: str
    cpu_targets: tuple[str, ...]
    verified_cpu: str
    versions: Mapping[str, str]
    nodes_before: int
    nodes_after: int
    fused_nodes: int
    distinct_kernels: int
    kernels: tuple[KernelReport, ...] = ()
    refused: tuple[RefusedReport, ...] = ()
    feedback_rounds: tuple[FeedbackRound, ...] = ()
    verification: VerificationReport = field(default_factory=VerificationReport)
    latency: LatencyReport = field(default_factory=LatencyReport)
    layout: str = "portable"
    made_for: str | None = None
    without_kernels: bool = False
    layouts: tuple[LayoutReport, ...] = ()
    beside_convolutions: int = 0
    remembered: bool = False
    compile_seconds: CompileSeconds = field(default_factory=CompileSeconds)
    warnings: tuple[str, ...] = ()

    @property
    def accepted(self) -> tuple[KernelReport, ...]:
        """The kernels that the written model uses."""
        return tuple(kernel for kernel in self.kernels if kernel.accepted)

    @property
    def bytes_before(self) -> int:
        """Bytes that one run of the fused parts moved before they were fused."""
        return sum(k.bytes_before * k.instances for k in self.accepted if not k.members)

    @property
    def bytes_after(self) -> int:
        """Bytes that one run of the fused parts moves now."""
        return sum(k.bytes_after * k.instances for k in self.accepted if not k.members)

    def to_json(self) -> dict[str, Json]:
        """The report as JSON values. Numbers that JSON has no form for (infinite, NaN) become null."""
        return {"schema_version": SCHEMA_VERSION, **_members(self)}


def _members(record: object) -> dict[str, Json]:
    assert is_dataclass(record)
    return {entry.name: _json(getattr(record, entry.name)) for entry in fields(record)}


def _json(value: object) -> Json:
    match value:
        case float():
            return value if math.isfinite(value) else None
        case None | bool() | int() | str():
            return value
        case Path():
            return str(value)
        case tuple():
            return [_json(element) for element in value]
        case Mapping():
            return {str(name): _json(element) for name, element in value.items()}
        case _ if is_dataclass(value):
            return _members(value)
    raise TypeError(f"a report holds a {type(value).__name__}, which JSON has no form for: {value!r}")
