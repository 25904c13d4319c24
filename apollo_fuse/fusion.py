"""The fusion phase for one micro-graph: Scop, schedule, kernels and C source, each distinct one once."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from time import perf_counter

import onnx_ir as ir

from apollo_fuse.codegen import c
from apollo_fuse.codegen.triton import emit as triton
from apollo_fuse.graph import MicroGraph, Refused, Value
from apollo_fuse.kernel import KernelGroup
from apollo_fuse.options import Options
from apollo_fuse.passes.build_scop import BuildScop
from apollo_fuse.passes.loop_fusion import Fused, LoopFusion, show
from apollo_fuse.passes.lower_scop import LowerScop
from apollo_fuse.passes.memory_stitching import RULE as MEMORY_STITCHING
from apollo_fuse.passes.tile_and_map import TileAndMap
from apollo_fuse.region import Interface, body_text, interface
from apollo_fuse.scop import Scop


@dataclass(frozen=True, slots=True)
class Candidate:
    """A micro-graph that became a kernel group. Candidates of one `name` share the kernel; those that have
    the same tensor shapes too share the `variant`, and are judged as one."""

    name: str
    micro_graph: MicroGraph
    part: Interface
    group: KernelGroup
    source: str

    @property
    def variant(self) -> str:
        values = (*self.micro_graph.inputs, *self.micro_graph.outputs)
        return f"{self.name}({'; '.join(', '.join(map(str, v.shape)) for v in values)})"


@dataclass(frozen=True, slots=True)
class _Lowered:
    """What a Scop became, with its schedule and its kernels as text."""

    group: KernelGroup
    schedule: str
    kernel: str


@dataclass(slots=True)
class FuseMicroGraph:
    """From a micro-graph to a candidate, or the refusal of whichever pass could not take it further.

    `names` gives the model's value for each tensor name of the opened graph. Equal Scops are lowered once,
    and a micro-graph that the feedback leaves as it was is not looked at again; `dumps` collects every
    intermediate form, by file name.
    """

    options: Options
    names: Mapping[str, ir.Value]
    dumps: dict[str, str] = field(default_factory=dict)
    isl_seconds: float = 0.0
    codegen_seconds: float = 0.0
    _lowered: dict[tuple[str, bool], _Lowered | Refused] = field(default_factory=dict)
    _fused: dict[tuple[tuple[int, ...], tuple[Value, ...]], Candidate | Refused] = field(default_factory=dict)

    def __call__(self, micro_graph: MicroGraph) -> Candidate | Refused:
        key = tuple(o.position for o in micro_graph.operators), micro_graph.outputs
        if key not in self._fused:
            self._fused[key] = self._fuse(micro_graph)
        return self._fused[key]

    def _fuse(self, micro_graph: MicroGraph) -> Candidate | Refused:
        scop = BuildScop()(micro_graph)
        if isinstance(scop, Refused):
            return scop
        text, alone = str(scop), len(micro_graph.operators) == 1
        if (text, alone) not in self._lowered:
            self._lowered[text, alone] = self._lower(scop, alone)
        lowered = self._lowered[text, alone]
        if isinstance(lowered, Refused):
            return lowered
        start = perf_counter()
        part = interface(micro_graph, self.names)
        digest = hashlib.sha256(f"{lowered.kernel}\n{body_text(part)}".encode()).hexdigest()[:12]
        op_types = [o.op_type for o in micro_graph.operators]
        name = "_".join([*list(dict.fromkeys(op_types))[:4], digest])
        if f"{name}.c" not in self.dumps:
            forms = {"scop": text, "schedule": lowered.schedule, "kernel": lowered.kernel}
            self.dumps |= {f"{name}.{form}.txt": content for form, content in forms.items()}
            comment = f"{name}: {' '.join(op_types)}"
            self.dumps[f"{name}.c"] = c.emit(lowered.group, name, comment)
            if self.options.dump is not None:
                self.dumps[f"{name}.triton.py"] = _triton_text(triton.emit(lowered.group, name, comment))
        self.codegen_seconds += perf_counter() - start
        return Candidate(name, micro_graph, part, lowered.group, self.dumps[f"{name}.c"])

    def _lower(self, scop: Scop, alone: bool) -> _Lowered | Refused:
        lowered = LowerScop(self._schedule, TileAndMap(alone))(scop)
        if isinstance(lowered, Refused):
            return lowered
        passes_on = lowered.group.stitches or (lowered.group.temporaries and not alone)
        if passes_on and not self.options.stitches_memory:
            names = tuple(s.name for s in scop.statements)
            return Refused(names, MEMORY_STITCHING, "Layer II is off", "a loop reads what another loop made")
        return _Lowered(lowered.group, show(lowered.fused.tree), str(lowered.group))

    def _schedule(self, scop: Scop) -> Fused | Refused:
        start = perf_counter()
        fused = LoopFusion(self.options.isl_max_operations)(scop)
        self.isl_seconds += perf_counter() - start
        return fused


def _triton_text(emitted: triton.Program | Refused) -> str:
    if isinstance(emitted, Refused):
        return f"# No Triton: {emitted.reason}: {emitted.evidence}\n"
    return emitted.text
