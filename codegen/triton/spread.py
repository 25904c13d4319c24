"""Loops that become axes of the grid: what a CPU does one after the other, a GPU needs side by side.

Work items are those of the CPU, which has few cores.  Where the turns of a loop in an item do not need each
other, they can be programs of their own, some turns in each.  What an item does beside the loop, each of
these programs does again: all of them write the same there.
"""

from __future__ import annotations

from collections.abc import Iterator as Generator
from collections.abc import Set
from dataclasses import replace

from apollo_fuse.index import Atom, Index, Indirect, Iterator
from apollo_fuse.kernel import (
    Compute,
    Copy,
    Initialise,
    Kernel,
    Loop,
    LoopKind,
    Scope,
    Step,
    Target,
    buffers_of,
    substituted,
    walk,
    written_by,
)

_TURNS = (16, 4)
"""Of the loop in a program, where it is not one alone."""


def spreads(kernel: Kernel) -> Generator[Kernel]:
    """The kernel with one of its outermost loops in the grid, or that and loops in it, in every way."""
    for place, loop in enumerate(kernel.body):
        if isinstance(loop, Loop) and _is_free(kernel, place, loop):
            known = loop.iterator.extent.constant
            for turns in _TURNS:
                if known is None or turns < known:
                    yield _in_parts(kernel, place, loop, turns)
            alone = _with(kernel, place, loop.iterator, loop.body)
            yield alone
            yield from spreads(alone)


def _in_parts(kernel: Kernel, place: int, loop: Loop, turns: int) -> Kernel:
    """With so many turns of the loop at the place in a program."""
    extent = loop.iterator.extent
    part = Iterator(f"{loop.iterator.name}_part", (extent + turns - 1) // turns)
    inner = Iterator(loop.iterator.name, Index.of(turns))
    first = Index.of(part) * turns
    values: dict[Atom, Index] = {loop.iterator: first + Index.of(inner)}
    body = tuple(substituted(step, values) for step in loop.body)
    return _with(kernel, place, part, (Loop(inner, loop.kind, body, extent - first),))


def _with(kernel: Kernel, place: int, axis: Iterator, steps: tuple[Step, ...]) -> Kernel:
    """With one axis more, and the steps in the place of a loop."""
    body = (*kernel.body[:place], *steps, *kernel.body[place + 1 :])
    return replace(kernel, grid=(*kernel.grid, axis), body=body)


def _is_free(kernel: Kernel, place: int, loop: Loop) -> bool:
    """Whether programs can share the turns of the loop: no turn needs another, nor does the rest."""
    around = (*kernel.body[:place], *kernel.body[place + 1 :])
    local = {b.name: b for b in kernel.buffers if b.scope is not Scope.GLOBAL}
    loops = [step.iterator for step in walk(kernel.body) if isinstance(step, Loop)]
    return (
        loop.kind is LoopKind.SEQUENTIAL
        and loop.limit is None
        and not any(iterator.extent.iterators() for iterator in loops)
        and [iterator.name for iterator in loops].count(loop.iterator.name) == 1
        and all(buffer.host is None or buffer.host in local for buffer in local.values())
        and not written_by((loop,)) & buffers_of(around)
        and all(_is_repeatable(step, local.keys()) for step in walk(around))
        and _is_own(loop, local.keys())
    )


def _is_repeatable(step: Step, local: Set[str]) -> bool:
    """Whether several programs may do it, each of which has what is on chip for itself."""
    match step:
        case Compute(_, _, targets, combine):
            return combine is None or all(target.buffer in local for target in targets)
        case Initialise(target, _):
            return target.buffer in local
        case Copy() | Loop():
            return True


def _is_own(loop: Loop, local: Set[str]) -> bool:
    """Whether turns write elements of their own, and of what the loop writes read no other ones.

    What lies on chip is at the same places in all turns, so that each has to write it before it reads it.
    """
    read: set[Target] = set()
    written: set[Target] = set()
    folded: set[Target] = set()
    for step in walk(loop.body):
        match step:
            case Compute(_, block, targets, combine):
                read |= {Target(load.tensor, load.indices[0]) for load in block.loads}
                written |= set(targets)
                folded |= set(targets) if combine is not None else set()
            case Copy(source, target):
                read.add(source)
                written.add(target)
            case Initialise(target, _):
                written.add(target)
                folded.add(target)
            case Loop():
                pass
    names = {target.buffer for target in written}
    outputs = {target for target in written if target.buffer not in local}
    return (
        all(loop.iterator in target.offset.iterators() for target in outputs)
        and not any(loop.iterator in target.offset.iterators() for target in written - outputs)
        and not outputs & folded
        and not any(isinstance(atom, Indirect) for target in written for atom in target.offset.atoms())
        and all(x in outputs for x in read if x.buffer in names - local)
        and not any(
            isinstance(atom, Indirect) and atom.tensor in names for x in read for atom in x.offset.atoms()
        )
    )
