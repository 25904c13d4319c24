"""Index arithmetic simplifies without changing any value."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from apollo_fuse.index import Atom, Index, Iterator, Quotient, Symbol, delinearise, linearise, non_negative

EXTENTS = st.integers(1, 6)


@given(EXTENTS, EXTENTS, EXTENTS, st.integers(1, 40), st.integers(1, 40), st.data())
def test_quotients_of_quotients_keep_their_value(
    a: int, b: int, c: int, divisor: int, outer: int, data: st.DataObject
) -> None:
    axes = [Iterator(name, Index.of(extent)) for name, extent in (("i", a), ("j", b), ("k", c))]
    offset = linearise(tuple(map(Index.of, axes)), tuple(axis.extent for axis in axes))
    values = {axis: data.draw(st.integers(0, (axis.extent.constant or 1) - 1)) for axis in axes}
    at: dict[Atom, Index] = {axis: Index.of(value) for axis, value in values.items()}
    number = (values[axes[0]] * b + values[axes[1]]) * c + values[axes[2]]
    assert (offset // divisor).substitute(at).constant == number // divisor
    assert ((offset // divisor) // outer).substitute(at).constant == number // divisor // outer
    assert ((offset // divisor) % outer).substitute(at).constant == number // divisor % outer


def test_the_group_of_a_place_is_the_group_of_its_channel() -> None:
    channel, place = Iterator("c", Index.of(64)), Iterator("p", Index.of(256))
    group = linearise((Index.of(channel), Index.of(place)), (channel.extent, place.extent)) // 512
    assert group == Index.of(Quotient(Index.of(channel), Index.of(2)))


def test_groups_of_planes_of_any_size_are_groups_of_channels() -> None:
    size = Index.of(Symbol("s"))
    channel, place = Iterator("c", Index.of(64)), Iterator("p", size)
    offset = linearise((Index.of(channel), Index.of(place)), (channel.extent, size))
    assert offset // (size * 2) == Index.of(Quotient(Index.of(channel), Index.of(2)))


def test_places_of_a_shape_in_another_keep_their_bounds() -> None:
    batch, channel = Iterator("n", Index.of(Symbol("b"))), Iterator("c", Index.of(64))
    offset = linearise((Index.of(batch), Index.of(channel)), (batch.extent, channel.extent))
    at = delinearise(offset // 2, (batch.extent, Index.of(32)))
    assert at == (Index.of(batch), Index.of(Quotient(Index.of(channel), Index.of(2))))


def test_bounds_of_quotients_are_known() -> None:
    half = Index.of(Iterator("i", Index.of(10))) // 2
    assert non_negative(4 - half)
    assert not non_negative(3 - half)
    assert non_negative(half)
