"""The parts of the report that are computed from the plan: kernels with their traffic, refusals, versions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import onnx_ir as ir

from apollo_fuse import extents, onnx_files
from apollo_fuse.acceptance import Judgement
from apollo_fuse.bodies import nodes
from apollo_fuse.cpu import cpu_name
from apollo_fuse.graph import MicroGraph, Operator, Pattern, Value
from apollo_fuse.index import Index, Symbol
from apollo_fuse.partition import Plan
from apollo_fuse.report import FeedbackRound, GpuReport, KernelReport, RefusedReport
from apollo_fuse.stitching import Stitch, Swap, members
from apollo_fuse.versions import versions


@dataclass(frozen=True, slots=True)
class Summary:
    cpu: str
    versions: Mapping[str, str]
    nodes_before: int
    nodes_after: int
    kernels: tuple[KernelReport, ...]
    refused: tuple[RefusedReport, ...]
    rounds: tuple[FeedbackRound, ...]


def summarise(
    path: Path,
    output: Path,
    model: ir.Model,
    chosen: Plan,
    stitches: Sequence[Stitch],
    judgements: Mapping[str, Judgement],
    fused: Sequence[Swap],
    sizes: Mapping[Symbol, int] = MappingProxyType({}),
    gpus: Mapping[str, Mapping[str, GpuReport]] = MappingProxyType({}),
) -> Summary:
    """The parts of the report; `sizes` are the extents that traffic is counted for, as `solve` finds them.

    An extent that is not among them counts as 1. `gpus` is what variants of kernels would be on GPUs.
    """
    used = {kernel.variant: kernel for x in fused for kernel in members(x)}
    joined = {kernel.part.nodes[0] for x in fused for kernel in members(x)}
    left = [x for x in chosen.companions if x.candidate.part.nodes[0] not in joined]
    beside = [x.candidate for x in chosen.companions if x.candidate.variant in used]
    uses: dict[str, list[Swap]] = {}
    swaps: list[Swap] = [*chosen.candidates, *beside, *stitches]
    for candidate in swaps:
        uses.setdefault(candidate.variant, []).append(candidate)
    labels = [node.name or f"{node.op_type}_{place}" for place, node in enumerate(nodes(model.graph))]
    kept = {x.variant for x in fused} | used.keys()
    return Summary(
        cpu_name(),
        versions(),
        onnx_files.node_count(onnx_files.read(path).graph),
        onnx_files.node_count(onnx_files.read(output).graph),
        tuple(
            _kernel(same, judgements[key], key in kept, sizes, gpus.get(key, {}))
            for key, same in uses.items()
        ),
        tuple(
            RefusedReport(r.nodes, r.rule, r.reason, r.evidence)
            for r in (*chosen.refused, *(x.refused for x in left))
        ),
        tuple(
            FeedbackRound(
                number,
                tuple((labels[a], labels[b]) for a, b in r.forbidden),
                (f"{', '.join(r.refused.nodes)}: {r.refused.reason}",),
                RefusedReport(r.refused.nodes, r.refused.rule, r.refused.reason, r.refused.evidence),
            )
            for number, r in enumerate(chosen.rounds, start=1)
        ),
    )


def solve(values: Iterable[tuple[Value, tuple[int, ...]]]) -> dict[Symbol, int]:
    """The extents that were open, from tensors and the shapes that they had in a run.

    Each dimension is an equation; one that is linear in a single extent not known yet gives that extent.
    What no such equation reaches stays out.
    """
    equations = [
        (extent, size)
        for value, shape in values
        for extent, size in zip(value.shape, shape, strict=True)
        if extent.symbols()
    ]
    known: dict[Symbol, int] = {}
    progress = True
    while progress:
        progress = False
        for extent, size in equations:
            left = extent.substitute({symbol: Index.of(number) for symbol, number in known.items()})
            unknown = left.symbols()
            if len(unknown) != 1:
                continue
            (symbol,) = unknown
            factor = left.coefficient(symbol)
            if factor is None or not factor.constant:
                continue
            rest = (left - factor * Index.of(symbol)).constant
            if rest is not None and (size - rest) % factor.constant == 0:
                known[symbol] = (size - rest) // factor.constant
                progress = True
    return known


def _kernel(
    same: Sequence[Swap],
    judgement: Judgement,
    accepted: bool,
    sizes: Mapping[Symbol, int],
    gpu: Mapping[str, GpuReport],
) -> KernelReport:
    candidate = same[0]
    return KernelReport(
        name=candidate.name,
        layer=_layer(candidate),
        ops=tuple(o.op_type for o in candidate.micro_graph.operators),
        pattern=candidate.micro_graph.pattern.name,
        inputs=tuple(map(_shape_text, candidate.micro_graph.inputs)),
        outputs=tuple(map(_shape_text, candidate.micro_graph.outputs)),
        # the same kernel may work on larger tensors in one place than in another
        bytes_before=sum(bytes_unfused(x.micro_graph, sizes) for x in same) // len(same),
        bytes_after=sum(bytes_fused(x.micro_graph, sizes) for x in same) // len(same),
        unfused_us=None if judgement.unfused is None else judgement.unfused * 1e6,
        fused_us=None if judgement.fused is None else judgement.fused * 1e6,
        accepted=accepted,
        reason=_reason(judgement, accepted),
        instances=len(same),
        predicted_unfused_us=None
        if judgement.predicted_unfused is None
        else judgement.predicted_unfused * 1e6,
        predicted_us=None if judgement.predicted is None else judgement.predicted * 1e6,
        members=tuple(x.name for x in candidate.members) if isinstance(candidate, Stitch) else (),
        apart_us=None if judgement.apart is None else judgement.apart * 1e6,
        note=judgement.verdict.note,
        gpu=gpu,
    )


def _layer(candidate: Swap) -> int:
    if isinstance(candidate, Stitch):
        return 3
    return 2 if candidate.group.stitches else 1


def _reason(judgement: Judgement, accepted: bool) -> str:
    if judgement.unfused is None or judgement.fused is None:
        found = judgement.reason or (_unmeasured(judgement) if accepted else "left out")
    else:
        speed = f"{judgement.unfused / judgement.fused:.2f}x as fast as onnxruntime"
        found = f"{judgement.reason} ({speed})" if judgement.reason else speed
    return f"pays in a launch with others; alone: {found}" if accepted and judgement.reason else found


def _unmeasured(judgement: Judgement) -> str:
    if judgement.predicted is None or judgement.predicted_unfused is None:
        return "agrees with onnxruntime; not measured"
    speed = judgement.predicted_unfused / judgement.predicted
    return f"agrees with onnxruntime; predicted to be {speed:.2f}x as fast, not measured"


def _shape_text(value: Value) -> str:
    return f"{value.dtype.value}[{', '.join(map(str, value.shape))}]"


def bytes_unfused(micro_graph: MicroGraph, sizes: Mapping[Symbol, int]) -> int:
    """Bytes that the operators read and write where each runs by itself; views move nothing."""
    return sum(
        sum(_read(value, operator, sizes) for value in operator.inputs)
        + sum(_bytes(value, sizes) for value in operator.outputs)
        for operator in micro_graph.operators
        if operator.pattern is not Pattern.RESHAPE
    )


def bytes_fused(micro_graph: MicroGraph, sizes: Mapping[Symbol, int]) -> int:
    """Bytes that one kernel has to read and write in their stead, each once."""
    parts = Counter[Value]()
    for operator in micro_graph.operators:
        for value in set(operator.inputs):
            parts[value] += _read(value, operator, sizes)
    read = sum(min(parts[value], _bytes(value, sizes)) for value in micro_graph.inputs)
    return read + sum(_bytes(value, sizes) for value in micro_graph.outputs)


def _read(value: Value, operator: Operator, sizes: Mapping[Symbol, int]) -> int:
    """Bytes of an operand that are read: a slice or a gather reads no more elements than it writes."""
    whole = _bytes(value, sizes)
    if operator.pattern is not Pattern.INJECTIVE:
        return whole
    written = sum(_bytes(output, sizes) // output.dtype.size for output in operator.outputs)
    return min(whole, written * value.dtype.size)


def _bytes(value: Value, sizes: Mapping[Symbol, int]) -> int:
    total = value.dtype.size
    for dim in value.shape:
        total *= evaluate(dim, sizes)
    return total


def evaluate(index: Index, sizes: Mapping[Symbol, int]) -> int:
    """The number that a polynomial over extents comes to; an extent that is not in `sizes` counts as 1."""
    number = extents.evaluate(index, sizes)
    if number is not None:
        return number
    known = index.substitute({symbol: Index.of(sizes.get(symbol, 1)) for symbol in index.symbols()})
    return known.constant if known.constant is not None else 1
