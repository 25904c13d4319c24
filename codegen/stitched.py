"""Members of a stitch that share launches on a GPU (Layer III), and the table that tells them apart.

Each run of equal kernels is one launch, of which each member has a range of programs: as many launches as
there are kernels, however many tensors.  The arguments of all members are more than a launch can carry, so
they lie in a table, in memory that onnxruntime gives for the run.  Launches of a kernel that does nothing
else carry them there, as arguments by value: a captured graph keeps those, and no host memory has to
outlive the run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby

from apollo_fuse.codegen.triton.compile import Job
from apollo_fuse.codegen.triton.emit import Launch
from apollo_fuse.dtypes import DType
from apollo_fuse.index import ONE

MEMBERS = 256
"""Most of a launch, as `triton/device.py` looks for one among them."""
WRITTEN = 480
"""Values that one launch writes to the table: of 4 KiB of arguments, which every device takes, almost all."""


def runs(ops: Sequence[str]) -> Iterator[tuple[str, int]]:
    """The kernel groups of a node that are launched together, by name, each with its members."""
    for name, equal in groupby(ops):
        left = len(list(equal))
        while left:
            yield name, min(left, MEMBERS)
            left -= min(left, MEMBERS)


def writes(ops: Sequence[str], launches: Mapping[str, Sequence[Launch]]) -> int:
    """Launches that write the table of a node."""
    values = (count * (1 + k.width) for name, count in runs(ops) if count > 1 for k in launches[name])
    return -(-sum(values) // WRITTEN)


def shares(ops: Sequence[str], launches: Mapping[str, Sequence[Launch]]) -> bool:
    """Whether a node takes fewer launches where its members share them."""
    together = sum(len(launches[name]) for name, _ in runs(ops))
    return together + writes(ops, launches) < sum(len(launches[name]) for name in ops)


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
