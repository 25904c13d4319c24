"""Members of a stitch that share launches on a GPU (Layer III), and the table that tells them apart.

Kernels of a level that have blocks of equally many threads are one launch, of which each member has a
range of programs: few launches, however many tensors there are, and no kernel has threads that it has no
use for.  The arguments of all members are more than a launch can carry, so they lie in a table, in memory
that onnxruntime gives for the run.  Launches of a kernel that does nothing else carry them there, as
arguments by value: a captured graph keeps those, and no host memory has to outlive the run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from apollo_fuse.codegen.triton.compile import Job
from apollo_fuse.codegen.triton.emit import Launch
from apollo_fuse.dtypes import DType
from apollo_fuse.index import ONE

MEMBERS = 256
"""Most of a launch, as `triton/device.py` looks for one among them."""
WRITTEN = 480
"""Values that one launch writes to the table: of 4 KiB of arguments, which every device takes, almost all."""


@dataclass(frozen=True, slots=True)
class Run:
    """Kernels of a node that are one launch: the one at place `kernel` of each of these of its ops."""

    kernel: int
    members: tuple[int, ...]

    def kinds(self, ops: Sequence[str]) -> tuple[str, ...]:
        """The distinct ops among the members, which follow each other."""
        return tuple(dict.fromkeys(ops[place] for place in self.members))


def runs(ops: Sequence[str], launches: Mapping[str, Sequence[Launch]]) -> tuple[Run, ...]:
    """The launches of a node: shared ones where those are fewer, with those that write the table."""
    shared = tuple(_shared(ops, launches))
    alone = tuple(Run(run.kernel, (place,)) for run in shared for place in run.members)
    return shared if len(shared) + writes(shared, ops, launches) < len(alone) else alone


def _shared(ops: Sequence[str], launches: Mapping[str, Sequence[Launch]]) -> Iterator[Run]:
    """The first kernels of all ops, then the second ones, as on the CPU."""
    kind = {name: number for number, name in enumerate(dict.fromkeys(ops))}
    for stage in range(max(len(launches[name]) for name in ops)):
        by_warps: dict[int, list[int]] = {}
        for place, name in enumerate(ops):
            if stage < len(launches[name]):
                by_warps.setdefault(launches[name][stage].warps, []).append(place)
        for places in by_warps.values():
            places.sort(key=lambda place: kind[ops[place]])
            for start in range(0, len(places), MEMBERS):
                yield Run(stage, tuple(places[start : start + MEMBERS]))


def writes(shared: Sequence[Run], ops: Sequence[str], launches: Mapping[str, Sequence[Launch]]) -> int:
    """Launches that write the table of a node."""
    values = sum(
        2 + launches[ops[place]][run.kernel].width
        for run in shared
        if len(run.members) > 1
        for place in run.members
    )
    return -(-values // WRITTEN)


def writer() -> Job:
    """The kernel that writes a part of a table."""
    values = tuple(f"v{place}" for place in range(WRITTEN))
    lines = [
        f'"""Writes {WRITTEN} values to a table."""',
        "",
        "import triton",
        "import triton.language as tl",
        "",
        "",
        "@triton.jit",
        f"def write(table, {', '.join(values)}):",
        *(f"    tl.store(table + {place}, {value})" for place, value in enumerate(values)),
    ]
    launch = Launch("write", ("table",), (), values, None, 1, 1, ONE, 0)
    return Job("\n".join(lines) + "\n", launch, {"table": DType.INT64})
