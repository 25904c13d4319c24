"""Computes what is elementwise on a concatenation in the same parts, each where its operand is.

What reads all of a tensor that is written in parts has no loop in common with any of them. But an element
of an elementwise result needs one element of one part: written in the same parts, each is computed beside its
operand, and the concatenation is made only where something else reads it.
"""

from __future__ import annotations

from collections.abc import Iterator as Generator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count

from apollo_fuse.expressions import Block, Instruction, Load
from apollo_fuse.graph import Operator, Pattern, Primitive, Shape, Value
from apollo_fuse.index import ONE, ZERO, Atom, Index, Iterator, product

_MOST_PARTS = 8  # what follows is written once for each
_SHORTEST = 16  # elements side by side in a part that is worth loops of its own


def compute_in_parts(primitives: Sequence[Primitive], results: frozenset[str]) -> tuple[Primitive, ...]:
    """The primitives with those that follow a tensor in parts written in parts, too."""
    makers: dict[str, list[Primitive]] = {}
    for primitive in primitives:
        makers.setdefault(primitive.output.name, []).append(primitive)
    for name, parts in makers.items():
        boxes = _boxes(parts)
        followers = _followers(makers, parts[0].output) if boxes else frozenset()
        if followers:
            others = (p for p in primitives if p.output.name not in followers)
            needed = results | {load.tensor for p in others for load in p.block.loads}
            return tuple(_Parting(name, boxes, followers, needed).written(primitives))
    return tuple(primitives)


def followed(operator: Operator) -> Shape | None:
    """The shape of the operator's result where that is written in parts which others may follow."""
    (result, *others) = operator.outputs
    whole = not others and all(p.output.name == result.name for p in operator.primitives)
    return result.shape if whole and _boxes(operator.primitives) else None


def pointwise(operator: Operator) -> Shape | None:
    """The shape of all its results, where each element of them is made of those at its own place."""
    shape = operator.outputs[0].shape
    large = [p for p in operator.primitives if product(p.output.shape) == product(shape)]
    plain = operator.pattern <= Pattern.BROADCAST and all(_is_pointwise(p, shape) for p in large)
    return shape if plain and all(v.shape == shape for v in operator.outputs) else None


def _is_pointwise(primitive: Primitive, shape: Shape) -> bool:
    """Whether its result has this shape, and its loops are the axes in order."""
    plain = primitive.reduction is None and primitive.row_axes is None and primitive.output.shape == shape
    return plain and _box(primitive) == _Box(tuple(ZERO for _ in shape), shape)


@dataclass(frozen=True, slots=True)
class _Box:
    """A part of a tensor: where its first element lies, and its extents."""

    origin: Shape
    shape: Shape


def _boxes(parts: Sequence[Primitive]) -> tuple[_Box, ...]:
    """The places of a tensor's parts; none where these are too many or too small to be followed."""
    if not 1 < len(parts) <= _MOST_PARTS:
        return ()
    boxes = tuple(box for box in map(_box, parts) if box is not None)
    runs = (_run(box, parts[0].output.shape).constant for box in boxes)
    long = all(run is None or run >= _SHORTEST for run in runs)
    return boxes if long and len(boxes) == len(parts) else ()


def _run(box: _Box, whole: Shape) -> Index:
    """How many elements of the box lie side by side in the tensor."""
    length = ONE
    for extent, all_ in zip(reversed(box.shape), reversed(whole), strict=True):
        length = length * extent
        if extent != all_:
            break
    return length


def _box(part: Primitive) -> _Box | None:
    """Where the primitive writes, if it walks a box of the tensor, an axis with each loop, in order."""
    walked = [sorted(index.iterators(), key=str) for index in part.indices]
    if part.reduction is not None or [i for own in walked for i in own] != list(part.iterators):
        return None
    at = tuple(Index.of(own[0]) if own else ZERO for own in walked)
    origin = tuple(index - place for index, place in zip(part.indices, at, strict=True))
    if any(start.iterators() for start in origin):
        return None
    return _Box(origin, tuple(own[0].extent if own else ONE for own in walked))


def _followers(makers: Mapping[str, Sequence[Primitive]], whole: Value) -> frozenset[str]:
    """The tensors that are pointwise on the whole, or on another one of them."""
    found = {whole.name}
    for name, (primitive, *others) in makers.items():
        read = [load for load in primitive.block.loads if load.tensor in found]
        alike = bool(read) and all(load.indices == primitive.indices for load in read)
        if alike and not others and _is_pointwise(primitive, whole.shape):
            found.add(name)
    return frozenset(found - {whole.name})


@dataclass(frozen=True, slots=True)
class _Parting:
    """Each of the tensors, `whole` and those that follow, becomes one tensor a box, called with its number.

    Where one is needed as it was, its elements are copied there, which costs no more than writing them.
    """

    whole: str
    boxes: tuple[_Box, ...]
    followers: frozenset[str]
    needed: frozenset[str]

    def written(self, primitives: Sequence[Primitive]) -> Generator[Primitive]:
        numbers = count()
        for primitive in primitives:
            if primitive.output.name == self.whole:
                yield from self._part(primitive, next(numbers))
            elif primitive.output.name in self.followers:
                for place in range(len(self.boxes)):
                    yield from self._part(self._within(primitive, place), place)
            else:
                yield primitive

    def _part(self, primitive: Primitive, place: int) -> Generator[Primitive]:
        """What writes part of a tensor as one that does so by way of the part on its own."""
        box, whole = self.boxes[place], primitive.output
        own = _less(primitive.indices, box.origin)
        part = Value(_name(whole.name, place), whole.dtype, box.shape)
        yield Primitive(part, primitive.iterators, own, None, primitive.block, primitive.pattern)
        if whole.name in self.needed:
            copy = Block((Load(part.name, own, whole.dtype),))
            yield Primitive(whole, primitive.iterators, primitive.indices, None, copy, Pattern.INJECTIVE)

    def _within(self, primitive: Primitive, place: int) -> Primitive:
        """A follower in the loops of one of the boxes."""
        box = self.boxes[place]
        values: dict[Atom, Index] = {}
        iterators: list[Iterator] = []
        for index, start, extent in zip(primitive.indices, box.origin, box.shape, strict=True):
            for old in index.iterators():
                new = Iterator(_name(old.name, place), extent)
                iterators += [] if extent.is_one else [new]
                values[old] = start if extent.is_one else start + Index.of(new)
        indices = tuple(index.substitute(values) for index in primitive.indices)
        own, parted = _less(indices, box.origin), {self.whole, *self.followers}

        def instruction(item: Instruction) -> Instruction:
            if isinstance(item, Load) and item.indices == indices and item.tensor in parted:
                return Load(_name(item.tensor, place), own, item.dtype)
            return item

        block = Block(tuple(map(instruction, primitive.block.substitute(values).instructions)))
        return Primitive(primitive.output, tuple(iterators), indices, None, block, primitive.pattern)


def _less(indices: Shape, origin: Shape) -> Shape:
    return tuple(index - start for index, start in zip(indices, origin, strict=True))


def _name(name: str, place: int) -> str:
    return f"{name}_{place}"
