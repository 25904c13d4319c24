"""The tables of a library: which custom ops it has, and which kernel groups each of them runs, as C."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Node:
    """A custom op: `ops` are the kernel groups that it runs side by side, by name.

    inputs: of each group one after the other, the places of its inputs among the node's.
    """

    name: str
    ops: tuple[str, ...]
    inputs: tuple[int, ...]
    input_count: int


def alone(name: str, input_count: int) -> Node:
    """The custom op that runs the one kernel group of its name."""
    return Node(name, (name,), tuple(range(input_count)), input_count)


def tables(nodes: Sequence[Node], levels: Iterable[int]) -> str:
    """The translation unit with the library's tables: the same nodes for each x86-64 level (0 elsewhere)."""
    lines = ['#include "kernel.h"']
    names = list(dict.fromkeys(name for node in nodes for name in node.ops))
    for number, node in enumerate(nodes):
        lines.append(f"static const int32_t inputs_{number}[] = {{{listed(node.inputs)}}};")
    found: list[str] = []
    for level in sorted(levels, reverse=True):  # the plugin takes the first that fits
        lines += [f"extern const af_op {name}_v{level};" for name in names]
        for number, node in enumerate(nodes):
            ops = listed(f"&{name}_v{level}" for name in node.ops)
            counts = f"{node.input_count}, {len(node.ops)}"
            lines += [
                f"static const af_op *const ops_{number}_v{level}[] = {{{ops}}};",
                f"static const af_node node_{number}_v{level} = "
                f'{{"{node.name}", {counts}, ops_{number}_v{level}, inputs_{number}}};',
            ]
        entries = listed([*(f"&node_{number}_v{level}" for number in range(len(nodes))), "NULL"])
        lines.append(f"static const af_node *const nodes_v{level}[] = {{{entries}}};")
        found.append(f"{{{level}, nodes_v{level}}}")
    lines.append(f"const af_table af_tables[] = {{{', '.join(found)}, {{0, NULL}}}};")
    return "\n".join(lines) + "\n"


def listed(items: Iterable[object]) -> str:
    """An initialiser's items; C has none that are empty."""
    return ", ".join(map(str, items)) or "0"
