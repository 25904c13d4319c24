"""Predicts what a candidate takes and saves, at the shapes that its inputs have in a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from apollo_fuse.cost import bound, cost_of
from apollo_fuse.fusion import Candidate
from apollo_fuse.index import Symbol
from apollo_fuse.machine import Machine
from apollo_fuse.scop import Extent
from apollo_fuse.tolerance import Array
from apollo_fuse.unfused import Ran, unfused_seconds


def predicted(
    candidate: Candidate,
    operators: Sequence[Ran],
    arrays: Mapping[str, Array],
    machine: Machine,
    threads: int | None,
) -> tuple[float, float]:
    """Seconds of the operators that onnxruntime runs, and of the kernel, calls included.

    arrays: what the candidate's inputs hold, by name. threads: all of the machine's cores where None.
    """
    used = threads or machine.cores
    return (
        unfused_seconds(operators, machine, used),
        cost_of(candidate.group, extents_of(candidate, arrays), machine, used).seconds,
    )


def extents_of(candidate: Candidate, arrays: Mapping[str, Array]) -> dict[Symbol, int]:
    """The extents of the candidate's kernels on these inputs."""
    values = [
        arrays[value.name or ""] if value.const_value is None else value.const_value.numpy()
        for value in candidate.part.inputs
    ]
    read = {e.input for e in candidate.group.extents if isinstance(e, Extent) and e.is_element}
    elements = {place: [int(element) for element in values[place].reshape(-1)] for place in read}
    return bound(candidate.group, [value.shape for value in values], elements)
