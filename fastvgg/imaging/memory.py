"""What decoding an image takes, counted from its headers before anything is decoded.

A small file can claim much memory: by its number of pixels, by a tile that is larger than the
image, by compressed text, or by metadata that overlap or consist of many parts. Pillow reads
metadata when it opens a file, so `metadata_bytes` comes before that, and `pixel_bytes` after it.
"""

from __future__ import annotations

import math
import re
import struct
import zlib
from itertools import islice
from typing import TYPE_CHECKING, Final, NamedTuple

from PIL.JpegImagePlugin import MARKER
from PIL.PngImagePlugin import MAX_TEXT_CHUNK, MAX_TEXT_MEMORY

from fastvgg.imaging import avif, jpeg2000
from fastvgg.imaging.formats import DECODER_PIXEL_BYTES
from fastvgg.imaging.modes import RejectedError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from PIL import Image

# Measured peak bytes per pixel: decoded JPEG, and coefficients if it is progressive; Pillow's RGB,
# the image converted to it, and a transposed copy; scaled grayscale of more than 8 bits.
JPEG_PIXEL_BYTES: Final = 3
COEFFICIENT_PIXEL_BYTES: Final = 6
RGB_PIXEL_BYTES: Final = 4
CONVERTED_PIXEL_BYTES: Final = 5
TRANSPOSED_PIXEL_BYTES: Final = 4
SCALED_PIXEL_BYTES: Final = 12
UNRESIZED_PIXEL_BYTES: Final = 6
MAX_JPEG_PIXEL_BYTES: Final = 14  # the most a JPEG takes, including a compressed byte per pixel

JPEG_SIGNATURE: Final = b"\xff\xd8\xff"
# The starts of progressive frames, and of scans without all components, for which libjpeg holds the
# coefficients of the whole image. Compressed data cannot contain them: there, every ff byte is
# followed by 00.
PROGRESSIVE_MARKERS: Final = (b"\xff\xc2", b"\xff\xca")
PARTIAL_SCANS: Final = (b"\xff\xda\0\x08\1", b"\xff\xda\0\x0a\2", b"\xff\xda\0\x0c\3")
JPEG_FORMATS: Final = ("JPEG", "MPO")
JPEG_MARKER: Final = re.compile(rb"\xff[^\0\xff]")
JPEG_FRAME: Final = re.compile(rb"\xff[\xc0-\xcf]..\x08(..)(..)", re.DOTALL)
START_OF_SCAN: Final = 0xFFDA
EXIF_START: Final = b"Exif\0\0"
MULTI_PICTURE_START: Final = b"MPF\0"
AVIF_EXIF_START: Final = 4  # after an offset
PHOTOSHOP_RESOURCE: Final = b"8BIM"

# Pillow reads metadata in Python: so many chunks, segments or fractions take it a second.
MAX_PARTS: Final = 100_000
PART_BYTES: Final = 200  # of Python objects for a segment of a JPEG, or a block of a GIF
MAX_COPIED_BYTES: Final = 2**30  # Pillow copies the EXIF so far when it appends a segment

PNG_SIGNATURE: Final = b"\x89PNG\r\n\x1a\n"
PNG_CHUNK_BYTES: Final = 400  # of Python objects for a chunk that Pillow keeps
PNG_CHUNK_FRAME_BYTES: Final = 12
PNG_CRC_BYTES: Final = 4
INFLATE_BYTES: Final = 2**16
# Copies of text: as bytes, and as a string with up to four bytes per character.
PNG_TEXT_COPIES: Final = {b"tEXt": 3, b"zTXt": 3, b"iTXt": 7, b"iCCP": 3}
PNG_COMPRESSED: Final = (b"zTXt", b"iTXt", b"iCCP")
METADATA_COPIES: Final = 2
RAW_EXIF: Final = b"Raw profile type exif"  # the keyword of a text in hexadecimal
RAW_FRACTION_DIGITS: Final = 16

# Of a PPM: a number has up to ten digits, which comments may divide.
PPM_HEADER: Final = re.compile(rb"P(?:(?:\s|#[^\r\n]*)*+[^\s#]{1,10}){0,40}")
PPM_COMMENT: Final = re.compile(rb"#[^\r\n]*")
PLAIN_PPMS: Final = (b"1", b"2", b"3")
MAX_COMMENTS: Final = 1_000  # for each, Pillow copies a megabyte

TIFF_BYTE_ORDERS: Final = {b"II": "<", b"MM": ">"}
BIG_TIFF: Final = 43
BIG_ENDIAN_BIG_TIFF: Final = b"MM\0+"
TIFF_SIZES: Final = {
    **dict.fromkeys((1, 2, 6, 7), 1),
    **dict.fromkeys((3, 8), 2),
    **dict.fromkeys((4, 9, 11, 13), 4),
    **dict.fromkeys((5, 10, 12, 16, 17, 18), 8),
}
TIFF_INTEGERS: Final = {1: "B", 3: "H", 4: "I", 6: "b", 8: "h", 9: "i", 13: "I", 16: "Q", 17: "q"}
TIFF_RATIONALS: Final = (5, 10)
TIFF_BYTES: Final = (1, 2, 7)
# What Python objects take for one number, for a fraction, and for a strip without compression.
NUMBER_BYTES: Final = 40
RATIONAL_BYTES: Final = 700
STRIP_BYTES: Final = 700
WIDTH, LENGTH, BITS, COMPRESSION, PHOTOMETRIC, STRIP_OFFSETS = 256, 257, 258, 259, 262, 273
SAMPLES, ROWS_PER_STRIP, PLANES = 277, 278, 284
TILE_WIDTH, TILE_LENGTH, TILE_OFFSETS = 322, 323, 324
SUBDIRECTORIES: Final = (34665, 34853, 40965)  # EXIF, GPS, interoperability
MAX_DEPTH: Final = 2
GEOMETRY: Final = (WIDTH, LENGTH, BITS, SAMPLES, ROWS_PER_STRIP, TILE_WIDTH, TILE_LENGTH)
# The tags that Pillow decodes to Python numbers when it opens a file.
DECODED: Final = frozenset(
    (
        *(*GEOMETRY, COMPRESSION, PHOTOMETRIC, STRIP_OFFSETS, PLANES, TILE_OFFSETS),
        *(266, 274, 279, 282, 283, 296, 320, 325, 338, 339, 530, *SUBDIRECTORIES),
    )
)
YCBCR: Final = 6
RAW: Final = 1
ORIENTATION: Final = 274
JPEG_COMPRESSIONS: Final = (6, 7)
RGBA_BYTES: Final = 4

# The radius in pixels of the resampling filters.
FILTER_RADII: Final = {"box": 0.5, "bilinear": 1, "hamming": 1, "bicubic": 2, "lanczos": 3}
COEFFICIENT_BYTES: Final = 8


def has_coefficients(data: bytes, components: int) -> bool:
    """Return whether libjpeg holds the coefficients of a whole image with so many components."""
    return any(marker in data for marker in PROGRESSIVE_MARKERS + PARTIAL_SCANS[: components - 1])


def metadata_bytes(data: bytes) -> int:
    """Return how much memory Pillow may take to open an image, in addition to the file.

    Raises
    ------
    RejectedError
        If reading the metadata would take seconds.
    """
    if data.startswith(PNG_SIGNATURE):
        return _png_bytes(data)
    if data[:2] in TIFF_BYTE_ORDERS:
        return _TiffHeader.parse(data).metadata_bytes
    if data.startswith(b"BM"):
        return 0
    return METADATA_COPIES * len(data) + _object_bytes(data)


def _object_bytes(data: bytes) -> int:
    """Return what metadata take as Python objects."""
    if data.startswith(JPEG_SIGNATURE):
        return _jpeg_bytes(data)
    if data.startswith(b"GIF8"):
        return _gif_bytes(data)
    if data.startswith(b"RIFF"):
        return _webp_bytes(data)
    if data.startswith(b"P"):
        _check_comments(data)
    total = 0
    if data.startswith(jpeg2000.SIGNATURES):
        for parts, _ in enumerate(jpeg2000.header_parts(data)):
            _check_parts(parts)
            total += PART_BYTES
    elif data.startswith(avif.SIGNATURE, 4):
        for parts, item in enumerate(avif.items(data)):
            _check_parts(parts)
            total += _exif_bytes(item[AVIF_EXIF_START:])
    return total


def resize_bytes(source: tuple[int, int], target: tuple[int, int], interpolation: str) -> int:
    """Return how much memory Pillow takes to resize an RGB image from and to a height and width.

    It computes coefficients for both directions, and resizes the columns before the rows.
    """
    (height, width), (target_height, target_width) = source, target
    rgb_bytes = RGB_PIXEL_BYTES * target_width * target_height
    if interpolation not in FILTER_RADII:
        return rgb_bytes
    rgb_bytes += RGB_PIXEL_BYTES * min(target_width * height, width * target_height)
    for length, result in ((width, target_width), (height, target_height)):
        radius = math.ceil(FILTER_RADII[interpolation] * max(1, length / result))
        rgb_bytes += COEFFICIENT_BYTES * result * (2 * radius + 2)
    return rgb_bytes


def pixel_bytes(image: Image.Image, data: bytes, *, exif: bool, is_resized: bool) -> int:
    """Return how much memory Pillow may take to decode and convert an opened image."""
    is_jpeg = image.format in JPEG_FORMATS
    tiff = _TiffHeader.parse(data) if image.format == "TIFF" else None
    is_transposed = exif or (tiff is not None and tiff.geometry.get(ORIENTATION, 1) != 1)
    pixels = image.width * image.height
    per_pixel = (
        RGB_PIXEL_BYTES
        + CONVERTED_PIXEL_BYTES * (image.mode != "RGB")
        + TRANSPOSED_PIXEL_BYTES * is_transposed
        + SCALED_PIXEL_BYTES * image.mode.startswith(("I", "F"))
        + COEFFICIENT_PIXEL_BYTES * (is_jpeg and has_coefficients(data, len(image.getbands())))
        + UNRESIZED_PIXEL_BYTES * (not is_resized)
    )
    decoded_pixels = pixels
    if image.format == "AVIF":
        for parts, frame_pixels in enumerate(avif.frame_pixels(data)):
            _check_parts(parts)
            decoded_pixels = max(decoded_pixels, frame_pixels)
    total = per_pixel * pixels
    total += DECODER_PIXEL_BYTES.get(image.format or "", 0) * decoded_pixels
    if image.format == "JPEG2000":
        total += jpeg2000.structure_bytes(data)
    return total if tiff is None else total + tiff.block_bytes(data)


def _check_parts(parts: int) -> None:
    if parts > MAX_PARTS:
        raise RejectedError(f"the metadata have more than {MAX_PARTS} parts")


def _exif_bytes(exif: bytes | memoryview) -> int:
    while exif[: len(EXIF_START)] == EXIF_START:
        exif = exif[len(EXIF_START) :]
    is_exif = bytes(exif[:2]) in TIFF_BYTE_ORDERS
    return _TiffHeader.parse(bytes(exif)).metadata_bytes if is_exif else 0


def _jpeg_bytes(data: bytes) -> int:
    """Return what the segments before the pixels take as Python objects."""
    parts, multi_picture_bytes = 0, 0
    exif_segments, exif_bytes = [], 0
    at = len(JPEG_SIGNATURE) - 1
    while (found := JPEG_MARKER.search(data, at)) is not None:
        parts += 1 + found.start() - at  # Pillow skips other bytes one by one
        _check_parts(parts)
        at = found.end()
        marker = int.from_bytes(found[0])
        if marker == START_OF_SCAN or marker not in MARKER:
            break
        if MARKER[marker][-1] is None:
            continue  # of a marker without a segment
        begin = at + 2
        at = max(begin, at + int.from_bytes(data[at:begin]))
        if data.startswith(EXIF_START, begin):
            exif_segments.append(memoryview(data)[begin + len(EXIF_START) : at])
            exif_bytes += at - begin
            if exif_bytes * len(exif_segments) > MAX_COPIED_BYTES:
                raise RejectedError(f"the EXIF has more than {len(exif_segments)} segments")
        if data.startswith(MULTI_PICTURE_START, begin):
            multi_picture_bytes = max(multi_picture_bytes, at - begin)
        parts += data.count(PHOTOSHOP_RESOURCE, begin, at)
    fraction_bytes = RATIONAL_BYTES * multi_picture_bytes // TIFF_SIZES[TIFF_RATIONALS[0]]
    return PART_BYTES * parts + fraction_bytes + _exif_bytes(b"".join(exif_segments))


def _gif_bytes(data: bytes) -> int:
    """Return what the extensions before the first frame take as Python objects."""
    has_palette = data[10:11] >= b"\x80"
    at = 13 + has_palette * (6 << (data[10] & 7))
    parts = 0
    while at < len(data) and data[at] not in b",;":
        if data[at] == ord("!"):
            at += 2
            while at < len(data) and data[at]:
                parts += 1
                _check_parts(parts)
                at += 1 + data[at]
        parts += 1
        _check_parts(parts)
        at += 1
    return PART_BYTES * parts


def _check_comments(data: bytes) -> None:
    """Refuse a PPM whose header is long, which Pillow reads byte by byte, or with many comments."""
    header = PPM_HEADER.match(data)
    _check_parts(header.end() if header else 0)
    is_plain = data[1:2] in PLAIN_PPMS
    if is_plain and len([*islice(PPM_COMMENT.finditer(data), MAX_COMMENTS + 1)]) > MAX_COMMENTS:
        raise RejectedError(f"the image has more than {MAX_COMMENTS} comments")


def _webp_bytes(data: bytes) -> int:
    """Return what the first EXIF takes as Python objects."""
    at, parts = len(b"RIFF....WEBP"), 0
    end = min(len(data), 8 + int.from_bytes(data[4:8], "little"))
    while at + 8 <= end:
        parts += 1
        _check_parts(parts)
        kind, length = struct.unpack_from("<4sI", data, at)
        at += 8 + length + length % 2
        if kind == b"EXIF":
            return _exif_bytes(data[at - length - length % 2 : at])
    return 0


def _png_bytes(data: bytes) -> int:
    """Return an upper bound of what the chunks other than the pixels take in memory."""
    total, at = 0, len(PNG_SIGNATURE)
    parts = inflated_bytes = 0
    while at + 8 <= len(data):
        parts += 1
        _check_parts(parts)
        length, kind = struct.unpack_from(">I4s", data, at)
        at += length + PNG_CHUNK_FRAME_BYTES
        if kind == b"IEND":
            break
        if kind == b"IDAT":
            continue
        content = data[at - length - PNG_CRC_BYTES : at - PNG_CRC_BYTES]
        text_bytes = len(content)
        if kind in PNG_COMPRESSED:
            inflated_bytes += (inflated := _inflated_bytes(kind, content))
            text_bytes += inflated
            if inflated_bytes > MAX_TEXT_MEMORY:
                raise RejectedError(f"the compressed text has more than {MAX_TEXT_MEMORY} bytes")
        if kind == b"eXIf":
            total += _exif_bytes(content)
        if content.startswith(RAW_EXIF):
            total += RATIONAL_BYTES * text_bytes // RAW_FRACTION_DIGITS
        total += PNG_CHUNK_BYTES + PNG_TEXT_COPIES.get(kind, METADATA_COPIES) * text_bytes
    return total


def _inflated_bytes(kind: bytes, content: bytes) -> int:
    """Return the size of the text in a chunk, up to the limit above which Pillow rejects it."""
    _, _, text = content.partition(b"\0")
    is_compressed = kind != b"iTXt" or text[:1] != b"\0"
    text = text[2:].split(b"\0", 2)[-1] if kind == b"iTXt" else text[1:]
    inflate, inflated_bytes = zlib.decompressobj(), 0
    try:
        while is_compressed and text and inflated_bytes < MAX_TEXT_CHUNK:
            inflated_bytes += len(inflate.decompress(text, INFLATE_BYTES))
            text = inflate.unconsumed_tail
    except zlib.error:
        pass  # Pillow drops the text
    return inflated_bytes


class _TiffHeader(NamedTuple):
    """The numbers in a TIFF that determine how much memory it takes."""

    metadata_bytes: int
    geometry: dict[int, int]
    """The largest value of each tag, also if it is repeated: readers differ in which they use."""

    @classmethod
    def parse(cls, data: bytes) -> _TiffHeader:
        """Parse the first directory, and the directories of its metadata as Pillow follows them.

        What lies outside of the file is omitted: Pillow does so too, or rejects it.
        """
        order, head = TIFF_BYTE_ORDERS[data[:2]], data[:16].ljust(16, b"\0")
        is_big = BIG_TIFF in head[2:4]
        offset, big_offset = struct.unpack(f"{order}4xIQ", head)
        pending = [(big_offset if is_big else offset, 0, is_big)]
        if head.startswith(BIG_ENDIAN_BIG_TIFF):  # Pillow reads it like other TIFFs, libtiff not
            pending += [(offset, 0, True), (offset, 0, False)]
        stored = decoded = entries = 0
        geometry: dict[int, int] = {}
        while pending:
            offset, depth, is_big = pending.pop()
            subdirectories: dict[int, int] = {}  # the last counts
            for tag, kind, size, values in _tiff_entries(data, order, is_big, offset):
                entries += 1
                _check_parts(entries + decoded // RATIONAL_BYTES)
                count = size // TIFF_SIZES.get(kind, 1)
                stored += size
                if kind in TIFF_RATIONALS:
                    decoded += RATIONAL_BYTES * count
                elif kind not in TIFF_BYTES and (tag in DECODED or depth):
                    decoded += NUMBER_BYTES * count
                if depth == 0 and tag in (STRIP_OFFSETS, TILE_OFFSETS):
                    decoded += STRIP_BYTES * count
                if depth == 0 and values:
                    geometry[tag] = max(geometry.get(tag, 0), *values)
                if values and tag in SUBDIRECTORIES and depth < MAX_DEPTH:
                    subdirectories[tag] = values[0]
            pending += [(offset, depth + 1, is_big) for offset in subdirectories.values()]
        return cls(2 * METADATA_COPIES * stored + decoded, geometry)

    def block_bytes(self, data: bytes) -> int:
        """Return what libtiff allocates for a tile or a strip, and for the list of them."""
        tags = self.geometry
        if tags.get(COMPRESSION, RAW) == RAW:
            return 0  # Pillow reads these itself, line by line
        width, length = tags.get(WIDTH, 0), tags.get(LENGTH, 0)
        block_width, block_length = width, min(tags.get(ROWS_PER_STRIP, length) or length, length)
        if TILE_WIDTH in tags or TILE_LENGTH in tags:
            block_width, block_length = tags.get(TILE_WIDTH, width), tags.get(TILE_LENGTH, length)
        samples = max(1, tags.get(SAMPLES, 1))
        pixel_bits = samples * max(8, tags.get(BITS, 1))
        pixels = block_width * block_length
        if tags.get(PHOTOMETRIC) == YCBCR:
            pixel_bits += 3 * 8 * RGBA_BYTES  # of upsampled colors, and a copy
        if tags[COMPRESSION] in JPEG_COMPRESSIONS and has_coefficients(data, samples):
            pixel_bits += 8 * 2 * samples
            pixels = max(pixels, *_jpeg_frames(data))  # the last strip may be taller
        blocks = -(-width // max(1, block_width)) * -(-length // max(1, block_length)) * samples
        return pixels * pixel_bits // 8 + NUMBER_BYTES * blocks


def _jpeg_frames(data: bytes) -> list[int]:
    """Return the numbers of pixels that the headers of JPEG frames claim within other data."""
    frames = JPEG_FRAME.findall(data)
    return [int.from_bytes(height) * int.from_bytes(width) for height, width in frames]


def _tiff_entries(
    data: bytes, order: str, is_big: bool, offset: int
) -> Iterator[tuple[int, int, int, tuple[int, ...]]]:
    """Yield tag, type and bytes of the entries of a directory, and up to 8 of their integers."""
    count_format, entry_format, inline_bytes = ("Q", "HHQ", 8) if is_big else ("H", "HHI", 4)
    if offset + struct.calcsize(order + count_format) > len(data):
        return
    (entries,) = struct.unpack_from(order + count_format, data, offset)
    offset += struct.calcsize(order + count_format)
    head_bytes = struct.calcsize(order + entry_format)
    for _ in range(min(entries, (len(data) - offset) // (head_bytes + inline_bytes))):
        tag, kind, count = struct.unpack_from(order + entry_format, data, offset)
        at = offset + head_bytes
        offset = at + inline_bytes
        if count * TIFF_SIZES.get(kind, 1) > inline_bytes:
            at = struct.unpack_from(order + ("Q" if is_big else "I"), data, at)[0]
        size = max(0, min(count * TIFF_SIZES.get(kind, 1), len(data) - at))
        number, values = TIFF_INTEGERS.get(kind), ()
        if number is not None and size >= struct.calcsize(number):
            shown = min(8, size // struct.calcsize(number))
            values = struct.unpack_from(f"{order}{shown}{number}", data, at)
        yield tag, kind, size, values
