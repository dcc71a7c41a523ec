"""The items of an AVIF image, and the sizes of its frames.

An AV1 frame is decoded at its own size, and then scaled to the size that the container claims. The
sizes may differ: a container of 64x64 pixels can hold a frame of 8000x8000.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from fastvgg.imaging.modes import RejectedError

if TYPE_CHECKING:
    from collections.abc import Iterator

SIGNATURE: Final = b"ftyp"  # at the fifth byte
ITEM_LOCATIONS: Final = re.compile(b"iloc")
ITEM_DATA: Final = re.compile(b"idat")
CHUNK_OFFSETS: Final = re.compile(rb"stco.{8}(.{4})|co64.{8}(.{8})", re.DOTALL)
IN_ITEM_DATA: Final = 1  # the method of construction of an item
MAX_COPIES: Final = 2
SEQUENCE_HEADER: Final = 1  # the type of a unit
MAX_LEVEL_WITHOUT_TIER: Final = 7


def frame_pixels(data: bytes) -> Iterator[int]:
    """Yield the number of pixels of each sequence header of AV1, and 0 for all else that is read.

    These are the headers of all items, and of what follows the first offset of a track.
    """
    for item in items(data):
        yield 0
        yield from _unit_pixels(item)
    for found in CHUNK_OFFSETS.finditer(data):
        yield from _unit_pixels(memoryview(data)[int.from_bytes(found[1] or found[2]) :])


def items(data: bytes) -> Iterator[memoryview]:
    """Yield the content of each item, and an empty item for each extent that is read.

    Raises
    ------
    RejectedError
        If the extents of items overlap.
    """
    view, copied_bytes = memoryview(data), 0
    bases = [found.end() for found in ITEM_DATA.finditer(data)]
    for found in ITEM_LOCATIONS.finditer(data):
        for is_in_item_data, extents in _item_extents(_Bits(view[found.end() :])):
            if not extents:
                yield view[:0]
            for base in bases if is_in_item_data else [0]:
                parts = [view[base:][begin:end] for begin, end in extents]
                if len(parts) == 1:
                    yield parts[0]
                    continue
                copied_bytes += sum(map(len, parts))
                if copied_bytes > MAX_COPIES * len(data):
                    raise RejectedError("an AVIF image whose items overlap")
                yield memoryview(b"".join(parts))


def _item_extents(bits: _Bits) -> Iterator[tuple[bool, list[tuple[int, int | None]]]]:
    """Yield where items are, and begin and end of their extents; no extents for each extent."""
    version = bits.read(8)
    bits.read(24)
    offset_bits, length_bits, base_bits, index_bits = (8 * bits.read(4) for _ in range(4))
    index_bits *= version > 0
    number_bits = 32 if version > 1 else 16
    for _ in range(bits.read(number_bits)):
        yield False, []
        if bits.is_at_end:
            return
        bits.read(number_bits)
        is_in_item_data = version > 0 and bits.read(16) & 15 == IN_ITEM_DATA
        bits.read(16)
        base = bits.read(base_bits)
        extents: list[tuple[int, int | None]] = []
        for _ in range(bits.read(16)):
            yield False, []
            bits.read(index_bits)
            begin, length = base + bits.read(offset_bits), bits.read(length_bits)
            extents.append((begin, begin + length if length else None))
        yield is_in_item_data, extents


def _unit_pixels(units: memoryview) -> Iterator[int]:
    """Yield the number of pixels of each sequence header, and 0 for each other unit of AV1."""
    bits = _Bits(units)
    while not bits.is_at_end:
        bits.read(1)
        kind, has_extension, has_length = bits.read(4), bits.read(1), bits.read(1)
        bits.read(1 + 8 * has_extension)
        length = bits.read_leb128() if has_length else len(units)
        content = units[bits.position : bits.position + length]
        yield _sequence_pixels(_Bits(content)) if kind == SEQUENCE_HEADER else 0
        bits.skip(8 * length)


def _sequence_pixels(bits: _Bits) -> int:
    """Return the largest number of pixels of a frame: AV1 specification, section 5.5.1."""
    bits.read(3 + 1)
    has_decoder_model, delay_bits = 0, 0
    if bits.read(1):  # a reduced header, of a still picture
        bits.read(5)
    else:
        if bits.read(1):
            bits.read(32 + 32)
            if bits.read(1):
                bits.read_exponential_golomb()
            has_decoder_model = bits.read(1)
            if has_decoder_model:
                delay_bits = bits.read(5) + 1
                bits.read(32 + 5 + 5)
        has_delays = bits.read(1)
        for _ in range(bits.read(5) + 1):
            bits.read(12)
            bits.read(bits.read(5) > MAX_LEVEL_WITHOUT_TIER)
            bits.read((2 * delay_bits + 1) * (has_decoder_model and bits.read(1)))
            bits.read(4 * (has_delays and bits.read(1)))
    width_bits, height_bits = bits.read(4) + 1, bits.read(4) + 1
    return (bits.read(width_bits) + 1) * (bits.read(height_bits) + 1)


class _Bits:
    """A reader of numbers of any number of bits, which are 0 after the end."""

    def __init__(self, data: memoryview) -> None:
        self._data = data
        self._at = 0

    @property
    def position(self) -> int:
        return self._at >> 3

    @property
    def is_at_end(self) -> bool:
        return self.position >= len(self._data)

    def skip(self, count: int) -> None:
        self._at += count

    def read(self, count: int) -> int:
        begin, self._at = self.position, self._at + count
        end = -(-self._at // 8)
        content = bytes(self._data[begin:end]).ljust(end - begin, b"\0")
        return int.from_bytes(content) >> 8 * end - self._at & (1 << count) - 1

    def read_leb128(self) -> int:
        number = 0
        for shift in range(0, 56, 7):
            has_more, digits = self.read(1), self.read(7)
            number |= digits << shift
            if not has_more:
                break
        return number

    def read_exponential_golomb(self) -> None:
        zeros = 0
        while zeros < 32 and not self.read(1):
            zeros += 1
        self.read(zeros)
