"""The fusion phase for one micro-graph: Scop, schedule, kernels and C source, each distinct one once."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from time import perf_counter

import onnx_ir as ir

from apollo_fuse.codegen import c
from apollo_fuse.graph import MicroGraph, Refused
from apollo_fuse.kernel import KernelGroup
from apollo_fuse.options import Options
from apollo_fuse.passes.build_scop import BuildScop
from apollo_fuse.passes.loop_fusion import Fused, LoopFusion, show
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
    """What a Scop became, with its schedule as text."""

    group: KernelGroup
    schedule: str


@dataclass(slots=True)
class FuseMicroGraph:
    """From a micro-graph to a candidate, or the refusal of whichever pass could not take it further.

    `names` gives the model's value for each tensor name of the opened graph. Equal Scops are lowered once;
    `dumps` collects every intermediate form, by file name.
    """

    options: Options
    names: Mapping[str, ir.Value]
    dumps: dict[str, str] = field(default_factory=dict)
    isl_seconds: float = 0.0
    codegen_seconds: float = 0.0
    _known: dict[tuple[str, bool], _Lowered | Refused] = field(default_factory=dict)

    def __call__(self, micro_graph: MicroGraph) -> Candidate | Refused:
        scop = BuildScop()(micro_graph)
        if isinstance(scop, Refused):
            return scop
        key, alone = str(scop), len(micro_graph.operators) == 1
        if (key, alone) not in self._known:
            self._known[key, alone] = self._lower(scop, alone)
        lowered = self._known[key, alone]
        if isinstance(lowered, Refused):
            return lowered
        part = interface(micro_graph, self.names)
        start = perf_counter()
        digest = hashlib.sha256(f"{lowered.group}\n{body_text(part)}".encode()).hexdigest()[:12]
        op_types = [o.op_type for o in micro_graph.operators]
        name = "_".join([*list(dict.fromkeys(op_types))[:4], digest])
        source = c.emit(lowered.group, name, f"{name}: {' '.join(op_types)}")
        forms = {"scop": key, "schedule": lowered.schedule, "kernel": str(lowered.group)}
        for form, text in forms.items():
            self.dumps.setdefault(f"{name}.{form}.txt", text)
        self.dumps.setdefault(f"{name}.c", source)
        self.codegen_seconds += perf_counter() - start
        return Candidate(name, micro_graph, part, lowered.group, source)

    def _lower(self, scop: Scop, alone: bool) -> _Lowered | Refused:
        start = perf_counter()
        fused = LoopFusion(self.options.isl_max_operations)(scop)
        self.isl_seconds += perf_counter() - start
        if not isinstance(fused, Fused):
            return fused
        group = TileAndMap(alone)(fused)
        return group if isinstance(group, Refused) else _Lowered(group, show(fused.tree))
