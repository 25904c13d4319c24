"""Decides which kernels stay: each distinct one is verified and measured against onnxruntime, in its context.

A kernel's context is the convolutions right before and after it: onnxruntime runs those in a blocked
layout when it can, and what a kernel costs includes the change of layout that it causes.  What the cost
model predicts is the kernel's own time and that of the operators that it replaces, without either; where
nothing is measured, that decides.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import onnx_ir as ir
import onnxruntime as ort

from apollo_fuse import onnx_io
from apollo_fuse.blocked import DOMAIN
from apollo_fuse.capture import Captures
from apollo_fuse.doubles import in_doubles
from apollo_fuse.errors import what_onnxruntime_says
from apollo_fuse.expressions import Apply, Block, Op
from apollo_fuse.fusion import Candidate
from apollo_fuse.gpu_worth import pays_on
from apollo_fuse.graph import Pattern
from apollo_fuse.machine import Machine
from apollo_fuse.measure import interleaved, session_options
from apollo_fuse.options import Options
from apollo_fuse.predicted import extents_of, predicted
from apollo_fuse.region import extract, region_inputs, relocated, swap
from apollo_fuse.stitching import Swap
from apollo_fuse.tolerance import Array, Doubles
from apollo_fuse.unfused import Ran, ran
from apollo_fuse.verify import (
    NOTHING,
    OriginalFailsError,
    Verdict,
    coarsest,
    edge_case,
    failed,
    verify,
)

_CONTEXT = frozenset({"Conv", "ConvTranspose", "MaxPool", "AveragePool"})
_NAN_VARIES = frozenset({"MaxPool", "GlobalMaxPool", "ReduceMax", "ReduceMin", "LRN"})
CLEAR_GAIN = 1.3  # from this speed-up on a kernel is a clear winner
WINS = 0.97  # share of the unfused time that a kernel has to stay below
_PREDICTED = "predicted to take {:.1f} us, and onnxruntime {:.1f} us without it"


@dataclass(frozen=True, slots=True)
class Judgement:
    """What was found of a distinct kernel; times in seconds, None where it was not measured or predicted."""

    verdict: Verdict
    unfused: float | None
    fused: float | None
    reason: str  # why it is left out; empty when it stays
    predicted_unfused: float | None = None
    predicted: float | None = None
    apart: float | None = None  # of a stitch: with each of its kernels called by itself

    @property
    def accepted(self) -> bool:
        return not self.reason

    @property
    def gain(self) -> float:
        """The speed-up that was measured; 0 where none was."""
        return 0.0 if self.unfused is None or self.fused is None else self.unfused / self.fused

    def joined(self, other: Judgement) -> Judgement:
        """That of both, one after the other."""

        def both(one: float | None, two: float | None) -> float | None:
            return None if one is None or two is None else one + two

        return Judgement(
            self.verdict.joined(other.verdict),
            both(self.unfused, other.unfused),
            both(self.fused, other.fused),
            self.reason or other.reason,
            both(self.predicted_unfused, other.predicted_unfused),
            both(self.predicted, other.predicted),
            both(self.apart, other.apart),
        )

    @property
    def is_sound(self) -> bool:
        """Whether it was found to compute what it should, whatever it gains."""
        return self.verdict.passed and self.predicted is not None


def context(candidate: Swap) -> tuple[ir.Node, ...]:
    """The kernel's nodes and the neighbouring convolutions, in topological order."""
    own = set(candidate.part.nodes)
    before = {v.producer() for v in candidate.part.inputs}
    after = {user for v in candidate.part.outputs for user, _ in v.uses()}
    graph = candidate.part.nodes[0].graph
    around = {n for n in before | after if n is not None and _in_context(n) and n.graph is graph} - own
    wanted = own | around
    assert isinstance(graph, ir.Graph)
    return tuple(node for node in graph if node in wanted)


def in_context(candidate: Candidate) -> bool:
    """Whether the kernel lies beside convolutions that onnxruntime may want in a layout of its own."""
    return len(context(candidate)) > len(candidate.part.nodes)


def _in_context(node: ir.Node) -> bool:
    """Tensors beside what is in onnxruntime's blocked layout by name are in it for good."""
    return node.op_type in _CONTEXT and node.domain != DOMAIN


def needed_values(candidates: Iterable[Swap]) -> list[str]:
    """Names of the values to capture from a run, so that every candidate can run on its own."""
    found: dict[str, None] = {}
    for candidate in candidates:
        around = region_inputs(context(candidate))
        own = (value for value in candidate.part.inputs if value.const_value is None)
        found |= {value.name or "": None for value in (*around, *own)}
    return list(found)


def judge(
    candidate: Candidate,
    opsets: Mapping[str, int],
    captures: Captures,
    library: Path,
    options: Options,
    threads: int,
    machine: Machine,
    not_alone: str = "",
) -> Judgement:
    """Verifies the kernel alone, on captured and edge inputs, then measures it in its context if wanted.

    `machine` is what both ways are predicted for. `not_alone` is why it is no kernel by itself, and not
    measured, where it is not.
    """
    for name in needed_values([candidate]):
        if name in captures.problems:
            return Judgement(NOTHING, None, None, captures.problems[name])
    arrays = captures.arrays
    try:
        alone = Region(candidate, candidate.part.nodes, opsets, library, threads, profiled=True)
    except Exception as error:  # onnxruntime raises classes of its own for each status
        verdict = failed(what_onnxruntime_says(error))
        return Judgement(verdict, None, None, f"does not load: {verdict.problem}")
    feeds = alone.feeds(arrays)
    precision = coarsest([candidate.micro_graph])
    try:
        verdict = verify(alone.unfused, alone.fused, [feeds], precision, alone.in_doubles)
    except OriginalFailsError as error:  # in a branch that never runs, what does not fit is no error
        return Judgement(NOTHING, None, None, f"onnxruntime does not run what it replaces: {error}")
    if not verdict.passed:
        return Judgement(verdict, None, None, f"does not verify: {verdict.problem}")
    sparse = candidate.micro_graph.pattern >= Pattern.REDUCTION
    # what integer NaN or inf becomes is open in ONNX, and in onnxruntime varies with its vector loops;
    # so does whether the greatest of many numbers passes a NaN on; its LRN moves a sum along the channels,
    # where what is no number stays, and by definition is in the sums of a few channels
    finite = any(_makes_integers(p.block) for p in candidate.micro_graph.primitives) or any(
        o.op_type in _NAN_VARIES for o in candidate.micro_graph.operators
    )
    special = edge_case(feeds, options.seed, sparse=sparse, finite=finite)
    edges = verify(alone.unfused, alone.fused, [special], precision, alone.in_doubles)
    if not edges.passed:
        return Judgement(edges, None, None, f"does not verify on edge values: {edges.problem}")
    verdict = verdict.joined(edges)
    operators = alone.operators()
    before, after = predicted(candidate, operators, arrays, machine, options.threads)
    if not_alone:
        return Judgement(verdict, None, None, not_alone, before, after)
    if not options.measure:
        on_gpus = pays_on(options.gpus, operators, (candidate.group, extents_of(candidate, arrays)))
        loses = after >= before and not options.fuse_all and not on_gpus
        reason = _PREDICTED.format(after * 1e6, before * 1e6) if loses else ""
        return Judgement(verdict, None, None, reason, before, after)
    nodes = context(candidate)
    region = (
        alone
        if len(nodes) == len(candidate.part.nodes)
        else Region(candidate, nodes, opsets, library, threads)
    )
    feeds = region.feeds(arrays)
    unfused, fused = interleaved([region.unfused, region.fused], feeds, seconds=options.measure_seconds * 2)
    slower = fused.share > WINS or fused.minimum > WINS * unfused.minimum
    reason = "not faster than onnxruntime" if slower else ""
    return Judgement(verdict, unfused.minimum, fused.minimum, reason, before, after)


def _makes_integers(block: Block) -> bool:
    """Whether the block converts floating-point numbers to integers."""
    return any(
        isinstance(item, Apply)
        and item.op is Op.CAST
        and item.dtype.is_integer
        and block.instructions[item.operands[0]].dtype.is_float
        for item in block.instructions
    )


class Region:
    """A sub-graph as sessions: as onnxruntime runs it, and with the candidate's kernel in it.

    apart: with these candidates in it, which are parts of the other one.
    """

    def __init__(
        self,
        candidate: Swap,
        nodes: Sequence[ir.Node],
        opsets: Mapping[str, int],
        library: Path,
        threads: int,
        profiled: bool = False,
        apart: Sequence[Candidate] = (),
    ) -> None:
        inside = set(nodes)
        self._inputs = region_inputs(nodes)
        own = set(candidate.part.outputs)
        outputs = [
            v
            for node in nodes
            for v in node.outputs
            if v in own or (node not in candidate.part.nodes and not all(u in inside for u, _ in v.uses()))
        ]
        outputs = [
            v
            for v in outputs
            if v.is_graph_output() or not v.uses() or any(u not in inside for u, _ in v.uses())
        ] or outputs
        self._extracted: Callable[[], ir.Model] = partial(extract, nodes, opsets, outputs)
        profile = library.parent / "profile" if profiled else None
        self.unfused = _session(self._extracted(), threads, None, profile)

        def with_kernels(swaps: Sequence[Swap]) -> ort.InferenceSession:
            model = self._extracted()
            copies = dict(zip(nodes, model.graph, strict=True))
            for part in swaps:
                swap(model, relocated(part.part, copies), part.name, part.micro_graph.outputs)
            model.graph.sort()
            return _session(model, threads, library if swaps else None)

        self.fused = with_kernels([candidate])
        self.apart = with_kernels(apart) if apart else self.unfused

    def feeds(self, arrays: Mapping[str, Array]) -> dict[str, Array]:
        return {f"x{n}": arrays[v.name or ""] for n, v in enumerate(self._inputs)}

    def in_doubles(self, feeds: Mapping[str, Array]) -> list[Doubles]:
        """What the outputs are in double precision; raises NotInDoublesError."""
        return in_doubles(self._extracted(), feeds)

    def operators(self) -> tuple[Ran, ...]:
        """What onnxruntime ran unfused; ends the profile of a region that was made to have one."""
        profile = Path(self.unfused.end_profiling())
        events = json.loads(profile.read_text())
        profile.unlink()
        return ran(events)


def _session(
    model: ir.Model, threads: int, library: Path | None, profile: Path | None = None
) -> ort.InferenceSession:
    options = onnx_io.beside_weights(session_options(threads), model)
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    if library is not None:
        options.register_custom_ops_library(str(library))
    proto = ir.to_proto(model)
    return ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
