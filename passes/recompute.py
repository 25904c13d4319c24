"""Demotes edges inside a kernel to recomputation: readers compute again what no work item can hold.

What a softmax divides, say, is then made from the inputs twice: once for the sum, once for the result (the
two-pass form), and a row of any length needs no memory.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from apollo_fuse.expressions import BlockBuilder, Load
from apollo_fuse.passes.access_composition import point_of
from apollo_fuse.passes.simplify import simplify
from apollo_fuse.scop import Scop, Statement

DEAREST = 40  # cost (see Block.cost) up to which computing elements again beats a write and a read of memory


def recompute(scop: Scop, tensors: Iterable[str]) -> Scop | None:
    """The Scop without these tensors, or None where one of them is a reduction, written in parts, or dear.

    A point that reads several elements computes all of them.
    """
    wanted = frozenset(tensors)
    if not wanted <= {value.name for value in scop.kept}:
        return None
    statements = list(scop.statements)
    for name in [s.target.name for s in scop.statements if s.target.name in wanted]:
        writers = [s for s in statements if s.target.name == name]
        if len(writers) != 1 or writers[0].reduction is not None:
            return None
        reads = max(len({x for x in s.block.loads if x.tensor == name}) for s in statements)
        if reads * writers[0].block.cost > DEAREST:
            return None
        statements = [_without(s, writers[0]) for s in statements if s is not writers[0]]
    kept = tuple(value for value in scop.kept if value.name not in wanted)
    return replace(scop, kept=kept, statements=tuple(statements))


def _without(reader: Statement, writer: Statement) -> Statement:
    builder = BlockBuilder()

    def read(load: Load) -> int | None:
        if load.tensor != writer.target.name:
            return None
        return builder.append(writer.block, point_of(writer, load.indices))

    place = builder.append(reader.block, {}, read)
    return replace(reader, block=simplify(builder.build_at(place)))
