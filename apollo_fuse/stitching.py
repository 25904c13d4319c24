"""Kernels that share launches, as one custom op (Apollo's parallelism stitching)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import onnx_ir as ir

from apollo_fuse.codegen.table import Node, alone
from apollo_fuse.fusion import Candidate
from apollo_fuse.graph import MicroGraph, Value
from apollo_fuse.region import Interface, body_text


@dataclass(frozen=True, slots=True)
class Stitch:
    """Candidates that do not need each other, as one candidate. Those of one `name` share a custom op.

    inputs: of each member one after the other, the places of its inputs among all.
    """

    name: str
    members: tuple[Candidate, ...]
    micro_graph: MicroGraph
    part: Interface
    inputs: tuple[int, ...]

    @property
    def variant(self) -> str:
        return f"{self.name}({'; '.join(member.variant for member in self.members)})"

    def __str__(self) -> str:
        lines = [f"stitch {self.name}"]
        places = iter(self.inputs)
        for member in self.members:
            read = ", ".join(f"input {next(places)}" for _ in member.part.inputs)
            lines.append(f"  {member.name} of {read}")
        return "\n".join(lines) + "\n"


Swap: TypeAlias = Candidate | Stitch
"""What takes the place of operators in a fused model: one node that calls kernels."""


def stitch(members: Sequence[Candidate]) -> Stitch:
    """The candidates as one, equal kernels side by side; they must not need each other."""
    first = {member.name: place for place, member in reversed(list(enumerate(members)))}
    members = sorted(members, key=lambda member: first[member.name])
    inputs: dict[ir.Value, Value] = {}
    for member in members:
        inputs |= dict(zip(member.part.inputs, member.micro_graph.inputs, strict=True))
    place = {value: number for number, value in enumerate(inputs)}
    places = tuple(place[value] for member in members for value in member.part.inputs)
    part = Interface(
        tuple(node for member in members for node in member.part.nodes),
        tuple(inputs),
        tuple(value for member in members for value in member.part.outputs),
    )
    text = "\n".join([*(member.name for member in members), repr(places), body_text(part)])
    return Stitch(
        f"Stitched_{len(members)}_{hashlib.sha256(text.encode()).hexdigest()[:12]}",
        tuple(members),
        MicroGraph(
            tuple(operator for member in members for operator in member.micro_graph.operators),
            tuple(inputs.values()),
            tuple(value for member in members for value in member.micro_graph.outputs),
        ),
        part,
        places,
    )


def members(swap: Swap) -> tuple[Candidate, ...]:
    """The candidates whose kernels it calls."""
    return swap.members if isinstance(swap, Stitch) else (swap,)


def entry(swap: Swap) -> Node:
    """What the library's table says of it."""
    if isinstance(swap, Stitch):
        return Node(swap.name, tuple(x.name for x in swap.members), swap.inputs, len(swap.part.inputs))
    return alone(swap.name, len(swap.part.inputs))
