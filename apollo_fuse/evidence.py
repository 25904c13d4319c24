"""What compiled and measured kernels are sent back to the partitioner for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from apollo_fuse.acceptance import CLEAR_GAIN, Judgement, in_context
from apollo_fuse.codegen import link
from apollo_fuse.codegen.transposed import stack_bytes
from apollo_fuse.fusion import Candidate
from apollo_fuse.graph import Refused
from apollo_fuse.kernel import KernelGroup, Scope

MOST_SPILLED = 16 * 1024
"""Bytes of registers that a kernel may spill: half of a small first level cache, where they cost little."""
_WORTH_SPLITTING = 0.02  # share of all kernels' time below which a slow one is left alone


def spilled(
    candidates: Sequence[Candidate], build: link.Build, judgements: Mapping[str, Judgement]
) -> dict[int, Refused]:
    """The places of kernels that have more values alive at a time than the compiler finds room for.

    Those that were measured and win clearly all the same are left alone.
    """
    found: dict[int, Refused] = {}
    for place, candidate in enumerate(candidates):
        if judgements[candidate.variant].gain >= CLEAR_GAIN:
            continue
        frame = link.large_frame(build.objects[candidate.name])
        if frame > MOST_SPILLED and (excess := frame - _arrays(candidate.group)) > MOST_SPILLED:
            evidence = f"{excess} bytes of registers are spilled to the stack, at most {MOST_SPILLED} may be"
            found[place] = Refused((), "codegen", "too many live values", evidence)
    return found


def slower(candidates: Sequence[Candidate], judgements: Mapping[str, Judgement]) -> dict[int, Refused]:
    """The places of kernels that were measured to be slower than what they replace, and matter.

    Beside a convolution what a kernel costs is the change of layout, which its parts would cause as well.
    """
    unfused = {variant: j.unfused for variant, j in judgements.items() if j.unfused is not None}
    instances = Counter(x.variant for x in candidates)
    total = sum(seconds * instances[variant] for variant, seconds in unfused.items())
    found: dict[int, Refused] = {}
    for place, candidate in enumerate(candidates):
        judgement = judgements[candidate.variant]
        if judgement.accepted or judgement.unfused is None or judgement.fused is None:
            continue
        share = judgement.unfused * instances[candidate.variant] / total
        if share >= _WORTH_SPLITTING and not in_context(candidate):
            evidence = f"{judgement.fused * 1e6:.1f} us, {judgement.unfused * 1e6:.1f} us in onnxruntime"
            found[place] = Refused((), "acceptance", "measured slower", evidence)
    return found


def _arrays(group: KernelGroup) -> int:
    """Bytes of the largest kernel's arrays on the stack."""
    return max(
        (
            stack_bytes(kernel)
            + sum(
                size * b.dtype.compute.size
                for b in kernel.buffers
                if b.scope is not Scope.GLOBAL and (size := b.size.constant) is not None
            )
            for kernel in group.kernels
        ),
        default=0,
    )
