"""Parts long lane loops, so that a processor has several of their iterations under way (loop fission).

Operations that need each other wait for each other: a processor hides that behind other iterations, of which
it sees a few hundred instructions ahead.  A loop with a chain about as long runs at its speed.  So it becomes
several loops, which hand values on through on-chip memory.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace

from apollo_fuse.dtypes import DType
from apollo_fuse.expressions import Apply, Block, Load, cost_of
from apollo_fuse.index import Index
from apollo_fuse.kernel import (
    Buffer,
    Compute,
    Kernel,
    Loop,
    Scope,
    Step,
    Target,
    buffers_of,
    with_lane_loops,
    written_by,
)

BODY = 20
"""Cheap operations of a body's longest chain (see `cost_of`): 60 instructions or fewer, a function of 10
being 20 to 35."""
_MOST_BYTES = 64 * 1024  # that one loop's parts hand on, to stay in the nearer caches


def fission_lanes(kernel: Kernel) -> Kernel:
    """The kernel with each lane loop that has a chain of more than twice `BODY` in parts."""
    fission = _Fission(kernel)
    body = with_lane_loops(kernel.body, fission.parts)
    kept = tuple(b for b in kernel.buffers if b.name not in fission.widened)
    return replace(kernel, buffers=(*kept, *fission.buffers), body=body)


@dataclass(slots=True)
class _Fission:
    """`buffers` are those of the parts; `widened` are scalars of a lane, each a buffer of all lanes now."""

    kernel: Kernel
    buffers: list[Buffer] = field(default_factory=list)
    widened: set[str] = field(default_factory=set)

    def parts(self, loop: Loop) -> list[Step]:
        """The loop as several; lanes are independent, so that each may run after all of the one before.

        As it is where it is short, or what they would hand on is too much.
        """
        lanes = loop.iterator.extent.constant
        computes = _long_body(loop)
        if lanes is None or computes is None:
            return [loop]
        lane, slots = Index.of(loop.iterator), _Slots(f"part{len(self.buffers)}", loop.iterator.extent)
        short = [part for compute in computes for part in _shorter(compute, lane, slots)]
        if sum(lanes * max(4, b.dtype.compute.size) for b in slots.buffers) > _MOST_BYTES:
            return [loop]
        self.buffers += slots.buffers
        bodies: list[list[Compute]] = [[]]
        cost = 0
        for part in short:
            longest = max(_chains(part.block))
            if bodies[-1] and cost + longest > BODY:
                bodies.append([])
                cost = 0
            bodies[-1].append(part)
            cost += longest
        return self._widen([replace(loop, body=tuple(body)) for body in bodies], lane)

    def _widen(self, loops: list[Loop], lane: Index) -> list[Step]:
        """The loops with a place for each lane in every scalar that passes from one to another."""
        local = {b.name: b for b in self.kernel.buffers if b.scope is not Scope.GLOBAL and b.size.is_one}
        mentions = Counter(name for loop in loops for name in buffers_of(loop.body) & local.keys())
        written = {name for loop in loops for name in written_by(loop.body)}
        crossing = {name for name in written if mentions[name] > 1}
        for name in crossing:
            self.widened.add(name)
            self.buffers.append(replace(local[name], size=loops[0].iterator.extent, scope=Scope.SHARED))
        return [replace(loop, body=tuple(_at(step, crossing, lane) for step in loop.body)) for loop in loops]


@dataclass(slots=True)
class _Slots:
    """Buffers of all lanes for values that pass from part to part; those of dead values are taken again."""

    prefix: str
    lanes: Index
    buffers: list[Buffer] = field(default_factory=list)
    free: list[Buffer] = field(default_factory=list)

    def take(self, dtype: DType) -> Buffer:
        found = next((b for b in self.free if b.dtype is dtype), None)
        if found is not None:
            self.free.remove(found)
            return found
        self.buffers.append(Buffer(f"{self.prefix}_{len(self.buffers)}", dtype, self.lanes, Scope.SHARED))
        return self.buffers[-1]


def _shorter(compute: Compute, lane: Index, slots: _Slots) -> list[Compute]:
    """The statement as several of about `BODY`, which leave what the next ones need in slots."""
    left = _Left(compute.block)
    owned: dict[int, Buffer] = {}
    parts: list[Compute] = []
    while (cut := left.cut()) is not None:
        dead = [place for place in owned if not left.needs(place, cut)]
        for place in left.live(cut):
            owned[place] = slots.take(left.block.instructions[place].dtype)
            target, value = Target(owned[place].name, lane), left.value(place)
            left.held[place] = Load(target.buffer, (lane,), value.dtype)
            parts.append(Compute(f"{compute.statement}p{len(parts)}", value, (target,)))
        slots.free += [owned.pop(place) for place in dead]  # only now: this part has read them
        left.done = cut
    slots.free += owned.values()
    return [*parts, replace(compute, block=left.value(len(left.block.instructions) - 1))]


@dataclass(slots=True)
class _Left:
    """A block whose instructions before `done` are computed; `held` are reads of those that are kept."""

    block: Block
    done: int = 0
    held: dict[int, Load] = field(default_factory=dict)

    def cut(self) -> int | None:
        """Where the next part ends: where it is neither long nor short, and the fewest values are live."""
        longest, best, fewest = 0, None, None
        for place, chain in enumerate(_chains(self.block, self.done)[self.done :], self.done):
            longest = max(longest, chain)
            if longest > BODY and best is not None:
                return best
            if 2 * longest > BODY:
                live = len(self.live(place + 1))
                if fewest is None or live <= fewest:
                    best, fewest = place + 1, live
        return None

    def live(self, cut: int) -> list[int]:
        """Results of the part before `cut` that are needed behind it, other than what can be read again."""
        found: dict[int, None] = {}
        for item in self.block.instructions[cut:]:
            if isinstance(item, Apply):
                for place in item.operands:
                    if self.done <= place < cut and isinstance(self.block.instructions[place], Apply):
                        found[place] = None
        return sorted(found)

    def needs(self, place: int, cut: int) -> bool:
        """Whether a result is read behind `cut`."""
        return any(isinstance(x, Apply) and place in x.operands for x in self.block.instructions[cut:])

    def value(self, place: int) -> Block:
        """The instruction at a place, from inputs and what is held."""
        return self.block.part(place, self.held)


def _long_body(loop: Loop) -> list[Compute] | None:
    """The statements of a lane loop that is to be parted."""
    computes = [step for step in loop.body if isinstance(step, Compute) and step.combine is None]
    long = sum(max(_chains(compute.block)) for compute in computes) > 2 * BODY
    return computes if long and len(computes) == len(loop.body) else None


def _chains(block: Block, done: int = 0) -> list[int]:
    """For each instruction what has to be computed one after the other for it, by those behind `done`."""
    chains: list[int] = []
    for place, item in enumerate(block.instructions):
        waits = max((chains[o] for o in item.operands), default=0) if isinstance(item, Apply) else 0
        chains.append(waits + cost_of(item) if place >= done else 0)
    return chains


def _at(step: Step, widened: set[str], lane: Index) -> Step:
    """The step with the lane's own place in each of these buffers."""
    assert isinstance(step, Compute), "a body of statements alone"
    instructions = (
        replace(item, indices=(lane,)) if isinstance(item, Load) and item.tensor in widened else item
        for item in step.block.instructions
    )
    targets = (Target(t.buffer, lane) if t.buffer in widened else t for t in step.targets)
    return replace(step, block=Block(tuple(instructions)), targets=tuple(targets))
