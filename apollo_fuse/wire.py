"""Models around their weights, which stay in files: read without them, and written with them streamed in.

Follows protobuf's wire format (https://protobuf.dev/programming-guides/encoding/) as far as it takes to find
the `raw_data` of initialisers, and to put one together; everything else is protobuf's own work.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from onnx import GraphProto, ModelProto, TensorProto

from apollo_fuse.errors import ModelError

KEPT = 1024  # bytes up to which a weight stays in the outline itself
_GRAPH, _INITIALIZER, _RAW_DATA = 7, 5, 9  # field numbers in ModelProto, GraphProto and TensorProto
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # wire types
_PIECE = 1 << 24  # bytes that are compared or written at once


@dataclass(frozen=True, slots=True)
class Span:
    """Bytes `offset` to `offset + length` of a file."""

    file: Path
    offset: int
    length: int

    def pieces(self) -> Iterator[memoryview]:
        """The bytes in order, a piece at a time, which is good until the next.

        Raises ModelError where the file ends before them.
        """
        if not self.length:
            return
        with self.file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, prot=mmap.PROT_READ) as mapped:
            end = self.offset + self.length
            if end > len(mapped):
                raise ModelError(
                    f"{self.file}: ends at {len(mapped)} bytes, where {end} were expected; "
                    "put the whole file there"
                )
            with memoryview(mapped) as whole:
                for start in range(self.offset, end, _PIECE):
                    with whole[start : min(start + _PIECE, end)] as piece:
                        yield piece

    def holds_what(self, other: Span) -> bool:
        """Whether the bytes of both are the same."""
        if self.length != other.length:
            return False
        pairs = zip(self.pieces(), other.pieces(), strict=True)
        return all(bytes(a) == bytes(b) for a, b in pairs)

    def __bytes__(self) -> bytes:
        return b"".join(map(bytes, self.pieces()))


def outline(path: Path) -> bytes:
    """The serialised model at `path` in which larger weights are tensors outside, at location "".

    Their offset and length are those of their bytes in `path`. What is no protobuf is returned as it is.
    """
    if not path.stat().st_size:
        return b""
    with path.open("rb") as opened, mmap.mmap(opened.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        try:
            return b"".join(_without_weights(mapped, 0, len(mapped), (_GRAPH, _INITIALIZER)))
        except (IndexError, ValueError):
            return mapped[:]


def span(tensor: TensorProto, file: Callable[[str], Path]) -> Span:
    """Where a tensor outside lies; `file` finds what its location names."""
    facts = {entry.key: entry.value for entry in tensor.external_data}
    place, offset = file(facts["location"]), int(facts.get("offset") or 0)
    return Span(place, offset, int(facts.get("length") or place.stat().st_size - offset))


def is_outside(tensor: TensorProto) -> bool:
    return bool(tensor.data_location == TensorProto.EXTERNAL)


def point(tensor: TensorProto, location: str, offset: int, length: int) -> None:
    """Makes a tensor one outside, at this place."""
    tensor.ClearField("raw_data")
    tensor.ClearField("external_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", str(offset)), ("length", str(length))):
        tensor.external_data.add(key=key, value=value)


def embed(model: ModelProto, file: Callable[[str], Path], output: BinaryIO) -> None:
    """Writes the model with those of its initialisers in it that lie outside; `file` as for `span`."""
    graph, rest = GraphProto(), ModelProto()
    graph.CopyFrom(model.graph)
    rest.CopyFrom(model)
    graph.ClearField("initializer")
    rest.ClearField("graph")
    parts: list[bytes | Span] = [graph.SerializeToString()]
    for tensor in model.graph.initializer:
        if not is_outside(tensor) and not tensor.HasField("raw_data"):
            content = tensor.SerializeToString()
            parts += [_header(_INITIALIZER, len(content)), content]
            continue
        own = TensorProto()
        own.CopyFrom(tensor)
        for name in ("raw_data", "external_data", "data_location"):
            own.ClearField(name)
        raw = span(tensor, file) if is_outside(tensor) else tensor.raw_data
        length = raw.length if isinstance(raw, Span) else len(raw)
        head = own.SerializeToString() + _header(_RAW_DATA, length)
        parts += [_header(_INITIALIZER, len(head) + length) + head, raw]
    size = sum(part.length if isinstance(part, Span) else len(part) for part in parts)
    output.write(rest.SerializeToString() + _header(_GRAPH, size))
    for part in parts:
        if isinstance(part, Span):
            output.writelines(part.pieces())
        else:
            output.write(part)


def _without_weights(data: mmap.mmap, start: int, end: int, inside: tuple[int, ...]) -> Iterator[bytes]:
    """The fields of a message, of which the field `inside` leads on to tensors."""
    for number, wire, place, content, after in _fields(data, start, end):
        if wire == _BYTES and inside and number == inside[0]:
            inner = b"".join(_without_weights(data, content, after, inside[1:]))
            yield _header(number, len(inner)) + inner
        elif wire == _BYTES and not inside and number == _RAW_DATA and after - content > KEPT:
            outside = TensorProto()
            point(outside, "", content, after - content)
            yield outside.SerializeToString()
        else:
            yield data[place:after]


def _fields(data: mmap.mmap, start: int, end: int) -> Iterator[tuple[int, int, int, int, int]]:
    """Of each field: its number, its wire type, and where it, its content and the next one begin."""
    place = start
    while place < end:
        key, content = _varint(data, place)
        wire = key & 7
        if wire == _BYTES:
            length, content = _varint(data, content)
            after = content + length
        elif wire == _VARINT:
            _, after = _varint(data, content)
        elif wire in (_FIXED64, _FIXED32):
            after = content + (8 if wire == _FIXED64 else 4)
        else:
            raise ValueError(f"no wire type of protobuf: {wire}")
        if after > end:
            raise ValueError("a field ends behind the message that it is in")
        yield key >> 3, wire, place, content, after
        place = after


def _varint(data: mmap.mmap, place: int) -> tuple[int, int]:
    """The number that begins at `place`, and where it ends."""
    number = shift = 0
    while True:
        byte = data[place]
        place += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return number, place
        shift += 7


def _header(number: int, length: int) -> bytes:
    """What stands before the content of a field of `length` bytes."""
    return _encoded(number << 3 | _BYTES) + _encoded(length)


def _encoded(number: int) -> bytes:
    groups = bytearray()
    while number > 0x7F:
        groups.append(number & 0x7F | 0x80)
        number >>= 7
    groups.append(number)
    return bytes(groups)
