"""Kernels that share launches on a GPU (Layer III), and the table that tells them apart.

Kernels that do not need each other, of one op or of the members of a stitch, are one launch where their
blocks have equally many threads.  Each has a range of programs: few launches, however many tensors there are.
Where programs are few, idle threads matter less than a launch.  The arguments of all members are more than a
launch can carry, so they lie in a table, in memory that onnxruntime gives for the run.  Launches of a kernel
that does nothing else carry them there, as arguments by value: a captured graph keeps those, and no host
memory has to outlive the run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from apollo_fuse.codegen.triton.compile import Job
from apollo_fuse.codegen.triton.emit import Launch
from apollo_fuse.dtypes import DType
from apollo_fuse.index import ONE

MEMBERS = 256
"""Most of a launch, as `triton/device.py` looks for one among them."""
WRITTEN = 480
"""Values that one launch writes to the table: of 4 KiB of arguments, which every device takes, almost all."""


_FEW = 4096
"""Warps that do not fill a GPU, so that it is of no matter how many threads of them are idle."""

Kinds: TypeAlias = tuple[tuple[tuple[str, int], ...], int]
"""Kernels that share a launch, each by its group's name and its place there, and the warps of all blocks."""


@dataclass(frozen=True, slots=True)
class Run:
    """Kernels of a node that are one launch: each by the place of its op, and its own place there."""

    members: tuple[tuple[int, int], ...]
    warps: int

    def kinds(self, ops: Sequence[str]) -> Kinds:
        """The distinct kernels among the members, which follow each other."""
        return tuple(dict.fromkeys((ops[place], kernel) for place, kernel in self.members)), self.warps


def runs(ops: Sequence[str], launches: Mapping[str, Sequence[Launch]]) -> tuple[Run, ...]:
    """The launches of a node: shared ones where those are fewer, with those that write the table."""
    shared = tuple(_shared(ops, launches))
    alone = tuple(Run((member,), run.warps) for run in shared for member in run.members)
    taken = sum(max(Counter(x.form for x in launches[name]).values(), default=0) for name in ops)
    return shared if len(shared) + writes(shared, ops, launches) < taken else alone


def _shared(ops: Sequence[str], launches: Mapping[str, Sequence[Launch]]) -> Iterator[Run]:
    """Those of the first stage of all ops, then of the second one."""
    kind = {name: number for number, name in enumerate(dict.fromkeys(ops))}
    every = [(place, kernel) for place, name in enumerate(ops) for kernel in range(len(launches[name]))]
    of = {(place, kernel): launches[ops[place]][kernel] for place, kernel in every}
    for stage in range(1 + max((launch.stage for launch in of.values()), default=-1)):
        here = [member for member in every if of[member].stage == stage]
        by_warps = _by_warps({member: of[member] for member in here})
        for warps, members in by_warps.items():
            members.sort(key=lambda member: (kind[ops[member[0]]], member[1]))
            for start in range(0, len(members), MEMBERS):
                yield Run(tuple(members[start : start + MEMBERS]), warps)


def _by_warps(launches: Mapping[tuple[int, int], Launch]) -> dict[int, list[tuple[int, int]]]:
    """The kernels by the warps of blocks; those of few programs take the nearest that others have."""
    taken = {launch.warps for launch in launches.values() if not _is_small(launch)}
    taken = taken or {max(launch.warps for launch in launches.values())}
    found: dict[int, list[tuple[int, int]]] = {}
    for member, launch in launches.items():
        nearest = min(taken, key=lambda warps: max(warps, launch.warps) / min(warps, launch.warps))
        found.setdefault(nearest, []).append(member)
    return found


def _is_small(launch: Launch) -> bool:
    known = launch.items.constant
    return known is not None and -(-known // launch.rows) * launch.warps <= _FEW


def writes(shared: Sequence[Run], ops: Sequence[str], launches: Mapping[str, Sequence[Launch]]) -> int:
    """Launches that write the table of a node."""
    values = sum(
        2 + launches[ops[place]][kernel].width
        for run in shared
        if len(run.members) > 1
        for place, kernel in run.members
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
