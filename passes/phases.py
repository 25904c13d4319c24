"""Takes short rows through a kernel together, a phase at a time.

What a row's reduction gives is waited for: its lanes are added up or compared one after the other, and a
division may follow, before the next loop of the row starts. A processor sees some 300 instructions ahead,
which for a row of a few vectors is no other work. So several work items go through the steps up to there, and
then all of them through the next ones: what one waits for, the others fill.
"""

from __future__ import annotations

from dataclasses import dataclass

from apollo_fuse.index import ONE, ZERO, Index
from apollo_fuse.kernel import (
    Initialise,
    Kernel,
    Loop,
    Scope,
    Step,
    indexed_by,
    read_by,
    walk,
    written_by,
)

_MOST = 8
VECTORS = 32
"""Of floats that go through a phase together.

What waits is hidden by then. With more, what comes from far takes longer: a phase that does little but read
waits for memory, and one that does not read leaves it idle.
"""


@dataclass(frozen=True, slots=True)
class Phase:
    """Steps of a work item.

    alone: the arrays of its own that no other phase touches; takes and leaves: registers that phases before
        have written to, and that phases behind read.
    """

    steps: tuple[Step, ...]
    alone: frozenset[str]
    takes: frozenset[str]
    leaves: frozenset[str]


def phases(kernel: Kernel) -> tuple[Phase, ...]:
    """The body in parts, each of which starts with a step that reads a register of the one before.

    One part where no such step is.
    """
    local = [buffer for buffer in kernel.buffers if buffer.scope is not Scope.GLOBAL]
    registers = {buffer.name for buffer in local if buffer.size.is_one}
    hosts = {buffer.host for buffer in local}
    arrays = {buffer.name for buffer in local if buffer.host is None} - hosts - registers
    parts: list[list[Step]] = [[]]
    waited: set[str] = set()
    starts: list[Step] = []
    for step in kernel.body:
        if _only_starts(step) and written_by((step,)) <= registers | arrays:
            starts.append(step)  # where it is needed
            continue
        read, written = _read((step,)), written_by((step,))
        if read & waited:
            parts.append([])
            waited = set()
        needed = [start for start in starts if written_by((start,)) & (read | written)]
        parts[-1] += [*needed, step]
        starts = [start for start in starts if start not in needed]
        waited |= written & registers
    touched = [_read(tuple(part)) | written_by(tuple(part)) for part in parts]
    filled = [written_by(tuple(part)) & registers for part in parts]
    if any(sum(name in names for names in filled) > 1 for name in registers):
        return (Phase(kernel.body, frozenset(arrays), frozenset(), frozenset()),)  # two parts write to it
    return tuple(
        Phase(
            tuple(part),
            frozenset((touched[n] & arrays).difference(*touched[:n], *touched[n + 1 :])),
            frozenset(touched[n].intersection(set().union(*filled[:n]))),
            frozenset(filled[n].intersection(set().union(*touched[n + 1 :]))),
        )
        for n, part in enumerate(parts)
    )


def _read(steps: tuple[Step, ...]) -> set[str]:
    return read_by(steps) | indexed_by(steps)


def _only_starts(step: Step) -> bool:
    """Whether it does nothing but give accumulators their first values."""
    return all(isinstance(inner, Initialise | Loop) for inner in walk((step,)))


def through_a_phase(kernel: Kernel, parts: tuple[Phase, ...]) -> Index:
    """Turns that innermost loops take for an item, on average over the phases."""
    return (_turns(kernel.body) + (len(parts) - 1)) // len(parts)


def _turns(steps: tuple[Step, ...]) -> Index:
    total = ZERO
    for step in steps:
        if isinstance(step, Loop):
            inner = _turns(step.body) if any(isinstance(s, Loop) for s in step.body) else ONE
            total = total + step.iterator.extent * inner
    return total


def items_together(turns: int, vector: int) -> int:
    """How many work items to take at a time, as `af_items_together` in kernel.h says it; 1 for long rows.

    turns: of an item through a phase; vector: bytes of one.
    """
    return max(min(_MOST, VECTORS * (vector // 4) // max(turns, 1)), 1)
