"""What decoding a JPEG 2000 image takes beyond its pixels, counted from its headers.

OpenJPEG allocates structures for every tile of an image, and for every precinct, code block and
coding pass of a tile. Headers can claim one of each for every pixel.
"""

from __future__ import annotations

import re
import struct
from typing import TYPE_CHECKING, Final

from fastvgg.imaging.modes import RejectedError

if TYPE_CHECKING:
    from collections.abc import Iterator

SIGNATURES: Final = (b"\0\0\0\x0cjP  ", b"\xff\x4f\xff\x51")
# The start of a codestream: the length of its first segment, the sizes of the image and of its
# tiles, and the number of components.
CODESTREAM: Final = re.compile(rb"\xff\x4f\xff\x51(..)..(.{32})(..)", re.DOTALL)
# The coding style of an image, a tile, or a component of these: flags; for all components, the
# number of layers; the number of levels; the exponents of the width and height of code blocks, less
# two; flags; and the exponents of precincts. Compressed data contain one by chance once in a
# terabyte.
CODING_STYLE: Final = re.compile(
    rb"\xff(?:\x52\0[\x0c-\x2d](?P<flags>[\0-\7]).(?P<layers>..)[\0\1]"
    rb"|\x53\0[\x09-\x2a].(?P<component_flags>.))"
    rb"(?P<style>[\0-\x20][\0-\x08][\0-\x08][\0-\x7f][\0\1])(?=(?P<precincts>.{0,33}))",
    re.DOTALL,
)
HAS_PRECINCTS: Final = 1
TERMINATED_PASSES: Final = 0x45  # flags with which a pass can be a segment of its own
PASSES: Final = 164  # of a code block in a layer
SEGMENTS: Final = 2  # of a code block in a layer, without these flags
SIZES_BYTES, COMPONENT_SIZES_BYTES = 38, 3
MAX_COMPONENTS: Final = 4
SEGMENT_BITS: Final = 3

# Measured bytes of structures of OpenJPEG 2.5.
TILE_BYTES: Final = 10_000
TILE_COMPONENT_BYTES: Final = 1_200
PRECINCT_BYTES: Final = 600
BLOCK_BYTES: Final = 500
SEGMENT_BYTES: Final = 64
PACKET_BYTES: Final = 2

START_OF_TILE, END_OF_CODESTREAM = 0x90, 0xD9
BOXES_OF_BOXES: Final = (b"jp2h", b"res ")


def header_parts(data: bytes) -> Iterator[int]:
    """Yield the position of each box and each segment that Pillow reads when it opens an image."""
    at = 0
    while at + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        yield at
        if kind in BOXES_OF_BOXES:
            length = 8
        elif length == 1:
            length = int.from_bytes(data[at + 8 : at + 16])
        if length < 8:
            break
        at += length
    for found in CODESTREAM.finditer(data):
        at = found.start() + 2
        while at + 4 <= len(data) and data[at + 1] not in (START_OF_TILE, END_OF_CODESTREAM):
            yield at
            at += 2 + max(2, int.from_bytes(data[at + 2 : at + 4]))


def structure_bytes(data: bytes) -> int:
    """Return how much memory the structures of an image may take.

    Raises
    ------
    RejectedError
        If the image has more components than Pillow decodes.
    """
    styles = [*CODING_STYLE.finditer(data)]
    layers = max((int.from_bytes(style["layers"] or b"") for style in styles), default=0)
    total = 0
    for found in CODESTREAM.finditer(data):
        sizes = struct.unpack(">8I", found[2])
        right, lower, left, upper, tile_width, tile_height, tiles_left, tiles_upper = sizes
        components = int.from_bytes(found[3])
        if int.from_bytes(found[1]) != SIZES_BYTES + COMPONENT_SIZES_BYTES * components:
            continue  # compressed data
        if components > MAX_COMPONENTS:
            raise RejectedError(f"a JPEG 2000 image with {components} components")
        if min(tile_width, tile_height, right - left, lower - upper) <= 0:
            continue  # OpenJPEG rejects it
        tiles = -(-(right - tiles_left) // tile_width) * -(-(lower - tiles_upper) // tile_height)
        tile_size = min(tile_width, right - left), min(tile_height, lower - upper)
        component_bytes = max(
            (_component_bytes(style, layers, tile_size, len(data)) for style in styles), default=0
        )
        tiles_bytes = tiles * (TILE_BYTES + TILE_COMPONENT_BYTES * components)
        total = max(total, tiles_bytes + components * component_bytes)
    return total


def _component_bytes(
    style: re.Match[bytes], layers: int, tile_size: tuple[int, int], data_bytes: int
) -> int:
    """Return what a component of a tile takes; its precincts and blocks may lie across edges."""
    levels, *block_exponents, flags, _ = style["style"]
    has_precincts = HAS_PRECINCTS & (style["flags"] or style["component_flags"])[0]
    precinct_exponents = style["precincts"] if has_precincts else b""
    precincts = blocks = 0
    for level, exponents in enumerate(precinct_exponents[: levels + 1].ljust(levels + 1, b"\xff")):
        bands, halving = (3, 1) if level else (1, 0)
        level_precincts = level_blocks = bands
        for side, shift, block in zip(tile_size, (0, 4), block_exponents, strict=True):
            length = -(-side >> levels - level)
            precinct = exponents >> shift & 15
            level_precincts *= (length >> precinct) + 2
            level_blocks *= (length >> halving + min(block + 2, max(0, precinct - halving))) + 2
        precincts += level_precincts
        blocks += level_blocks
    passes = PASSES if flags & TERMINATED_PASSES else SEGMENTS
    segments = min(blocks * layers * passes, 8 * data_bytes // SEGMENT_BITS)
    return (
        (PRECINCT_BYTES + PACKET_BYTES * layers) * precincts
        + BLOCK_BYTES * blocks
        + SEGMENT_BYTES * segments
    )
