"""Small files that claim much memory, take odd turns in decoders, or are refused for a reason."""

from __future__ import annotations

import functools
import io
import struct
import tempfile
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from fastvgg.datasets.index import read_index
from tests.helpers.datasets_on_disk import python

SHORT, LONG, RATIONAL, ASCII, UNDEFINED, LONG8 = 3, 4, 5, 2, 7, 16
DEFLATE, LZW, PACKBITS, JPEG, LZMA, ZSTD, WEBP = 8, 5, 32773, 7, 34925, 50000, 50001
SIDE = 20_000


def tiff(tags, blocks=(), *, big=False, order="<", offset=None):
    """Encode a TIFF with these tags: (tag, kind, values), or (tag, kind, count, offset).

    The tags 273 or 324 with the value None become the offsets of `blocks`, and 279 or 325 their
    sizes.
    """
    data = bytearray(struct.pack(order + ("2sHHHQ" if big else "2sHI"), *head(order, big)))
    starts = []
    for block in blocks:
        starts.append(len(data))
        data += block + bytes(-len(block) % 2)
    entries = []
    for tag, kind, *rest in tags:
        values = rest[0]
        if values is None:
            values = starts if tag in (273, 324) else [len(block) for block in blocks]
        if len(rest) == 2:
            entries.append((tag, kind, *rest))
            continue
        letter = {SHORT: "H", LONG: "I", LONG8: "Q", RATIONAL: "I", ASCII: "B", UNDEFINED: "B"}[
            kind
        ]
        content = struct.pack(f"{order}{len(values)}{letter}", *values)
        count = len(values) // (2 if kind == RATIONAL else 1)
        if len(content) > (8 if big else 4):
            entries.append((tag, kind, count, len(data)))
            data += content + bytes(-len(content) % 2)
        else:
            padded = content.ljust(8 if big else 4, b"\0")
            entries.append(
                (tag, kind, count, struct.unpack(order + ("Q" if big else "I"), padded)[0])
            )
    at = len(data) if offset is None else offset
    struct.pack_into(order + ("Q" if big else "I"), data, 8 if big else 4, at)
    data += struct.pack(order + ("Q" if big else "H"), len(entries))
    for entry in entries:
        data += struct.pack(order + ("HHQQ" if big else "HHII"), *entry)
    return bytes(data + bytes(8))


def head(order, big):
    mark = b"II" if order == "<" else b"MM"
    return (mark, 43, 8, 0, 0) if big else (mark, 42, 0)


def tiled(
    width=SIDE,
    length=SIDE,
    *,
    compression=DEFLATE,
    samples=1,
    bits=8,
    photo=1,
    planes=1,
    block=None,
    side=64,
    extra=(),
    **options,
):
    """Encode a TIFF of 64x64 whose tiles have another size."""
    block = zlib.compress(bytes(2_000_000), 9) if block is None else block
    tags = [
        *((256, LONG, [side]), (257, LONG, [side]), (258, SHORT, [bits] * samples)),
        *((259, SHORT, [compression]), (262, SHORT, [photo]), (277, SHORT, [samples])),
        *((284, SHORT, [planes]), (322, LONG, [width]), (323, LONG, [length])),
        *((324, LONG, None), (325, LONG, None), *extra),
    ]
    return tiff(
        sorted(tags, key=lambda tag: tag[0]), [block] * (samples if planes == 2 else 1), **options
    )


def striped(
    width=64,
    length=64,
    *,
    compression=1,
    block=None,
    extra=(),
    rows=None,
    bits=(8,),
    samples=1,
    photo=1,
    **options,
):
    block = bytes(width * length) if block is None else block
    tags = [
        *((256, LONG, [width]), (257, LONG, [length]), (258, SHORT, list(bits))),
        *((259, SHORT, [compression]), (262, SHORT, [photo]), (273, LONG, None)),
        *((277, SHORT, [samples]), (278, LONG, [rows or length]), (279, LONG, None), *extra),
    ]
    return tiff(sorted(tags, key=lambda tag: tag[0]), [block], **options)


def raw_exif(exif):
    """Return a chunk of text with EXIF in hexadecimal."""
    text = f"\nexif\n{len(exif):8}\n{exif.hex()}\n"
    return chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(text.encode(), 9))


def overlapping(count, region, kind=UNDEFINED):
    """Return tags that all have the same region of a file as their content."""
    return [(40_000 + number, kind, region, 8) for number in range(count)]


def chunk(name, content):
    return len(content).to_bytes(4) + name + content + zlib.crc32(name + content).to_bytes(4)


def png(before=b"", after=b"", *, width=64, height=64, depth=8, color=2, rows=None, interlaced=0):
    size = width.to_bytes(4) + height.to_bytes(4) + bytes([depth, color, 0, 0, interlaced])
    if rows is None:
        rows = bytes(height * (1 + 3 * width))
    return b"".join(
        [
            *(b"\x89PNG\r\n\x1a\n", chunk(b"IHDR", size), before),
            *(chunk(b"IDAT", zlib.compress(rows)), after, chunk(b"IEND", b"")),
        ]
    )


def text_chunks(kind, count, character="a", size=1_000_000):
    text = zlib.compress((character * (size // len(character.encode()))).encode(), 9)
    frames = {b"zTXt": b"k%d\0\0", b"iTXt": b"k%d\0\1\0\0\0", b"iCCP": b"k%d\0\0"}
    return b"".join(chunk(kind, frames[kind] % number + text) for number in range(count))


@functools.cache
def noise(side=64):
    return Image.fromarray(np.random.default_rng(1).integers(0, 256, (side, side, 3), np.uint8))


def saved(kind, image=None, **options):
    written = io.BytesIO()
    (image or noise()).save(written, kind, **options)
    return written.getvalue()


def flat(width, height, kind, mode="L", **options):
    return saved(kind, Image.new(mode, (width, height)), **options)


def with_segments(jpeg, count, marker=0xE1, head=b"Exif\0\0", size=65_000):
    """Insert application segments into a JPEG."""
    content = head.ljust(size, b"x")
    segment = bytes([0xFF, marker]) + (len(content) + 2).to_bytes(2) + content
    return jpeg[:2] + segment * count + jpeg[2:]


def with_empty_segments(jpeg, count, marker):
    return jpeg[:2] + (b"\xff" + bytes([marker]) + b"\0\2") * count + jpeg[2:]


def with_exif(jpeg, exif):
    """Insert EXIF into a JPEG, in as many segments as it takes, in place of its JFIF header."""
    starts = range(0, len(exif), 65_000)
    segments = [b"Exif\0\0" + exif[start : start + 65_000] for start in starts]
    head = b"".join(b"\xff\xe1" + (len(segment) + 2).to_bytes(2) + segment for segment in segments)
    return jpeg[:2] + head + jpeg[4 + int.from_bytes(jpeg[4:6]) :]


def exif_fractions(count, tag=282):
    """Encode EXIF with a unit and with so many fractions as the resolution, or another tag."""
    content = struct.pack("<II", 1, 3) * count
    entries = sorted([(tag, RATIONAL, count, 8), (296, SHORT, 1, 3)])
    directory = b"".join(struct.pack("<HHII", *entry) for entry in entries) + bytes(4)
    return b"II*\0" + struct.pack("<I", 8 + len(content)) + content + b"\2\0" + directory


def exif_overlapping(count=5_000, region=60_000):
    start = b"II*\0" + struct.pack("<I", 8 + region) + bytes(region)
    return start + sub_directory(UNDEFINED, count, region)


def tall_strip(jpeg, width):
    """Encode a TIFF of 8 rows whose only strip is a JPEG of more rows."""
    return striped(width, 8, compression=JPEG, samples=3, bits=(8, 8, 8), photo=2, block=jpeg)


def with_claimed_size(jpeg, height, width):
    changed = bytearray(jpeg)
    at = next(at for at in range(len(jpeg)) if jpeg[at : at + 2] in (b"\xff\xc0", b"\xff\xc2"))
    changed[at + 5 : at + 9] = height.to_bytes(2) + width.to_bytes(2)
    return bytes(changed)


def sequential_jpeg(height, width):
    """Encode a sequential JPEG whose components have a scan each."""
    small = flat(16, 16, "jpeg", "RGB", subsampling=0)
    jpeg = bytearray(with_claimed_size(small, height, width))
    at = jpeg.rindex(b"\xff\xda")
    scan = b"".join(
        b"\xff\xda\0\x08\1" + bytes([number, 0x11 if number > 1 else 0, 0, 63, 0]) + bytes(64)
        for number in (1, 2, 3)
    )
    return bytes(jpeg[:at]) + scan + b"\xff\xd9"


def gif(width, height, frame_width, frame_height, comment=b""):
    pixels = saved("gif", Image.new("L", (frame_width, frame_height)))
    at = pixels.index(b"\x2c\0\0\0\0")
    return (
        b"GIF89a"
        + struct.pack("<HHBBB", width, height, 0xF0, 0, 0)
        + bytes(6)
        + comment
        + pixels[at:]
    )


def bmp(width, height, data, compression=1, bits=8):
    """Encode a BMP, by default with run lengths."""
    palette = bytes(4 * 256) if bits == 8 else b""
    at = 14 + 40 + len(palette)
    info = struct.pack(
        "<IiiHHIIiiII",
        40,
        width,
        height,
        1,
        bits,
        compression,
        len(data),
        0,
        0,
        256 if palette else 0,
        0,
    )
    return b"BM" + struct.pack("<IHHI", at + len(data), 0, 0, at) + info + palette + data


def riff(chunks):
    body = b"WEBP" + b"".join(
        name + struct.pack("<I", len(data)) + data + b"\0" * (len(data) % 2)
        for name, data in chunks
    )
    return b"RIFF" + struct.pack("<I", len(body)) + body


def webp(canvas, metadata=b""):
    """Encode an extended WebP whose canvas is larger than its only frame."""
    simple = saved("webp")
    frame = simple[12:]
    side = (canvas - 1).to_bytes(3, "little")
    chunks = [(b"VP8X", bytes([0x02 | 0x04 * bool(metadata), 0, 0, 0]) + side * 2)]
    chunks += [(b"ANIM", bytes(6))]
    small = (63).to_bytes(3, "little")
    chunks += [(b"ANMF", bytes(6) + small * 2 + bytes(4) + frame)]
    chunks += [(b"XMP ", metadata)] if metadata else []
    return riff(chunks)


def with_jpeg2000_tiles(data, side):
    """Claim larger tiles in the first segment of a JPEG 2000 image."""
    at = data.index(b"\xff\x51") + 6  # the sizes of the grid, its offsets, the tiles
    return data[: at + 16] + struct.pack(">II", side, side) + data[at + 24 :]


def with_jpeg2000_size(data, side):
    """Claim a larger grid than the header of the container does."""
    at = data.index(b"\xff\x51") + 6
    return data[:at] + struct.pack(">II", side, side) + data[at + 8 :]


def jpeg2000(side, precinct=None, *, of_component=None, in_tile=False):
    """Encode a black image of one resolution, whose precincts have a size of a power of two.

    The precincts are those of all components in the main header, or in that of the tile, or those
    of one component.
    """
    data = flat(side, side, "jpeg2000", "RGB", num_resolutions=1)
    start = data.index(b"\xff\x4f\xff\x51")
    codestream = data[start:]
    if precinct is None:
        return codestream
    at = codestream.index(b"\xff\x52")
    end = at + 2 + int.from_bytes(codestream[at + 2 : at + 4])
    flags, *others = codestream[at + 4 : end]
    exponents = precinct | precinct << 4
    content = bytes([flags | 1, *others, exponents])
    if of_component is not None:
        content = bytes([of_component, 1, *others[4:], exponents])
    marker = b"\xff\x52" if of_component is None else b"\xff\x53"
    segment = marker + (len(content) + 2).to_bytes(2) + content
    if in_tile:
        tile = codestream.index(b"\xff\x90")
        head = codestream[tile : tile + 6] + bytes(4) + codestream[tile + 10 : tile + 12]
        return codestream[:tile] + head + segment + codestream[tile + 12 :]
    return codestream[: at if of_component is None else end] + segment + codestream[end:]


def with_avif_size(data, side):
    """Claim another size in the property of an AVIF image than in its frame."""
    at = data.index(b"ispe") + 8
    return data[:at] + struct.pack(">II", side, side) + data[at + 8 :]


def with_track_size(data, side):
    """Claim another size in the header of a track than in its frames."""
    at = data.index(b"tkhd")
    end = at - 4 + int.from_bytes(data[at - 4 : at])
    data = data[: end - 8] + struct.pack(">II", side << 16, side << 16) + data[end:]
    return with_avif_size(data, side)


def with_extents(data):
    """Divide the item of an AVIF image into two extents, within the header of its sequence."""
    at = data.index(b"iloc")
    offset, length = struct.unpack_from(">II", data, at + 18)
    changed = bytearray(data)
    changed[at + 16 : at + 26] = struct.pack(">HIIII", 2, offset + 8, 5, offset + 13, length - 5)
    for box in (at, data.index(b"meta")):
        changed[box - 4 : box] = (int.from_bytes(data[box - 4 : box]) + 8).to_bytes(4)
    return bytes(changed)


def pnm(magic, width, height, maximum, data):
    return b"%b\n%d %d\n%d\n" % (magic, width, height, maximum) + data


def sub_directory(kind, count, region):
    """Return a directory of overlapping tags, to be placed at a known offset."""
    entries = [(40_000 + number, kind, region, 8) for number in range(count)]
    return (
        struct.pack("<H", count)
        + b"".join(struct.pack("<HHII", *entry) for entry in entries)
        + bytes(4)
    )


REGION = 300_000


@functools.cache
def hostile_images():
    """Return functions that build hostile images, by name."""
    zeros = bytes(REGION)
    nested = zeros + sub_directory(RATIONAL, 60, REGION // 8)
    fractions = [(34665, LONG, [8 + len(zeros)])]
    jpeg, cmyk = saved("jpeg"), saved("jpeg", noise().convert("CMYK"))
    words = bytes(range(97, 123))
    return {
        # Tiles and strips that are larger than the image.
        "tile.tif": lambda: tiled(),
        "tile-lzw.tif": lambda: tiled(compression=LZW, block=b"\x80\0\0\0"),
        "tile-packbits.tif": lambda: tiled(compression=PACKBITS, block=b"\x81\0" * 9999),
        "tile-jpeg.tif": lambda: tiled(
            compression=JPEG, samples=3, photo=6, block=with_claimed_size(jpeg, SIDE, SIDE)
        ),
        "tile-lzma.tif": lambda: tiled(compression=LZMA),
        "tile-zstd.tif": lambda: tiled(compression=ZSTD),
        "tile-webp.tif": lambda: tiled(
            8_000, 8_000, compression=WEBP, samples=3, photo=2, block=saved("webp")
        ),
        "tile-wide.tif": lambda: tiled(2**20, 256),
        "tile-wider.tif": lambda: tiled(2**31, 16),
        "tile-long.tif": lambda: tiled(16, 2**22),
        "tile-planes.tif": lambda: tiled(9_000, 9_000, samples=3, photo=2, planes=2),
        "tile-samples.tif": lambda: tiled(
            5_000, 5_000, samples=4, photo=2, extra=[(338, SHORT, [2])]
        ),
        "tile-ycbcr.tif": lambda: tiled(4_000, 4_000, samples=3, photo=6),
        "tile-16.tif": lambda: tiled(9_000, 9_000, bits=16),
        "tile-float.tif": lambda: tiled(5_000, 5_000, bits=32, extra=[(339, SHORT, [3])]),
        "tile-1bit.tif": lambda: tiled(60_000, 60_000, bits=1),
        "tile-big.tif": lambda: tiled(big=True),
        "tile-motorola.tif": lambda: tiled(order=">"),
        "tile-twice.tif": lambda: tiled(64, 64, extra=[(322, LONG, [SIDE]), (323, LONG, [SIDE])]),
        "tile-long8.tif": lambda: tiled(
            64, 64, big=True, extra=[(322, LONG8, [SIDE]), (323, LONG8, [SIDE])]
        ),
        "tile-raw.tif": lambda: tiled(compression=1),
        "tile-many.tif": lambda: tiled(1, 1, side=9_000),
        "tile-none.tif": lambda: tiled(0, 0),
        "strips-of-a-row.tif": lambda: striped(
            1, 20_000_000, compression=DEFLATE, block=b"x", rows=1
        ),
        "strip-huge-rows.tif": lambda: striped(
            compression=DEFLATE, rows=2**32 - 1, block=zlib.compress(bytes(4096))
        ),
        "strip-ycbcr.tif": lambda: striped(
            4_000,
            4_000,
            compression=DEFLATE,
            photo=6,
            samples=3,
            bits=(8, 8, 8),
            block=zlib.compress(bytes(48_000_000)),
        ),
        "fax.tif": lambda: flat(9_000, 9_000, "tiff", "1", compression="group4"),
        "progressive-jpeg.tif": lambda: striped(
            3_000,
            3_000,
            compression=JPEG,
            samples=3,
            bits=(8, 8, 8),
            photo=2,
            block=flat(3_000, 3_000, "jpeg", "RGB", progressive=True),
        ),
        "strip-tall.tif": lambda: tall_strip(sequential_jpeg(3_900, 4_000), 4_000),
        "strip-tall-progressive.tif": lambda: tall_strip(
            flat(4_000, 3_900, "jpeg", "RGB", progressive=True, subsampling=0), 4_000
        ),
        # Tags.
        "tags-overlap.tif": lambda: striped(block=zeros, extra=overlapping(3_000, REGION)),
        "tags-of-exif-overlap.tif": lambda: striped(block=nested, extra=fractions),
        "tag-huge-count.tif": lambda: striped(extra=[(270, ASCII, 2**31, 8)]),
        "tag-huge-count.big.tif": lambda: striped(extra=[(270, ASCII, 2**62, 8)], big=True),
        "tag-outside.tif": lambda: striped(extra=[(270, ASCII, 2**20, 2**32 - 9)]),
        "tag-bits.tif": lambda: striped(bits=[8] * 4_000_000),
        "tag-fractions.tif": lambda: striped(extra=[(282, RATIONAL, [1, 3] * 600_000)]),
        "tag-offsets.tif": lambda: striped(block=zeros, extra=[(273, LONG, [8] * 2_000_000)]),
        "tag-description.tif": lambda: striped(extra=[(270, ASCII, [97] * 12_000_000)]),
        "directory-outside.tif": lambda: striped(offset=2**31),
        "directory-itself.tif": lambda: striped(offset=4),
        # Text and other chunks.
        "zTXt.png": lambda: png(text_chunks(b"zTXt", 60)),
        "zTXt-after.png": lambda: png(after=text_chunks(b"zTXt", 60)),
        "iTXt.png": lambda: png(text_chunks(b"iTXt", 60)),
        "iTXt-wide.png": lambda: png(text_chunks(b"iTXt", 24, "a" * 99_999 + "\U0001f600")),
        "iCCP.png": lambda: png(text_chunks(b"iCCP", 60)),
        "iCCP-bomb.png": lambda: png(text_chunks(b"iCCP", 1, size=200_000_000)),
        "tEXt.png": lambda: png(chunk(b"tEXt", b"k\0" + words * 600_000)),
        "eXIf.png": lambda: png(chunk(b"eXIf", b"MM\0*" + words * 600_000)),
        "private.png": lambda: png(chunk(b"prVt", b"") * 400_000),
        "small-IDATs.png": lambda: png(chunk(b"IDAT", b"") * 2_000_000),
        "palette.png": lambda: png(chunk(b"PLTE", bytes(18_000_000)), color=3, rows=bytes(64 * 65)),
        "animated.png": lambda: saved(
            "png", save_all=True, append_images=[noise().rotate(90)] * 40
        ),
        "interlaced.png": lambda: png(
            width=5_000, height=5_000, depth=1, color=0, rows=bytes(4_000_000), interlaced=1
        ),
        "wide.png": lambda: png(width=2**31 - 1, height=1, depth=1, color=0, rows=b"0"),
        "tall.png": lambda: png(width=1, height=80_000_000, depth=1, color=0, rows=b"0"),
        "bomb.png": lambda: png(
            width=9_000, height=9_000, depth=1, color=0, rows=bytes(10_134_000)
        ),
        "bomb-rgba.png": lambda: png(width=2_200, height=2_200, color=6, rows=bytes(2_200 * 8_801)),
        "bomb-16.png": lambda: png(
            width=1_500, height=1_500, depth=16, color=0, rows=bytes(1_500 * 3_001)
        ),
        # The other formats.
        "screen.gif": lambda: gif(65_535, 65_535, 64, 64),
        "screen-large.gif": lambda: gif(8_000, 8_000, 64, 64),
        "frame-large.gif": lambda: gif(64, 64, 6_000, 6_000),
        "comments.gif": lambda: gif(
            64, 64, 64, 64, (b"\x21\xfe" + (b"\xff" + b"c" * 255) * 200 + b"\0") * 300
        ),
        "small-comments.gif": lambda: gif(
            64, 64, 64, 64, b"\x21\xfe" + b"\2cc" * 2_500_000 + b"\0"
        ),
        "empty-extensions.gif": lambda: gif(64, 64, 64, 64, b"\x21\xfe\0" * 4_000_000),
        "frames.gif": lambda: saved("gif", save_all=True, append_images=[noise().rotate(90)] * 40),
        "canvas.webp": lambda: webp(16_383),
        "canvas-small.webp": lambda: webp(1_500),
        "metadata.webp": lambda: webp(64, words * 500_000),
        "lossless.webp": lambda: flat(3_000, 3_000, "webp", "RGB", lossless=True),
        "lossy.webp": lambda: flat(2_000, 2_000, "webp", "RGB"),
        "progressive.jpg": lambda: flat(4_000, 4_000, "jpeg", "RGB", progressive=True),
        "progressive-claimed.jpg": lambda: with_claimed_size(
            saved("jpeg", progressive=True), 9_000, 9_000
        ),
        "sequential.jpg": lambda: sequential_jpeg(2_500, 2_500),
        "cmyk.jpg": lambda: flat(2_500, 2_500, "jpeg", "CMYK"),
        "large.jpg": lambda: flat(3_500, 3_500, "jpeg", "RGB"),
        "claimed.jpg": lambda: with_claimed_size(jpeg, 65_000, 65_000),
        "exif.jpg": lambda: with_segments(jpeg, 200),
        "exif-cmyk.jpg": lambda: with_segments(cmyk, 250),
        "profile-cmyk.jpg": lambda: with_segments(cmyk, 250, 0xE2, b"ICC_PROFILE\0\1\1"),
        "comments-cmyk.jpg": lambda: with_segments(cmyk, 250, 0xFE, b"x"),
        "segments-cmyk.jpg": lambda: with_empty_segments(cmyk, 1_500_000, 0xE1),
        "empty-comments-cmyk.jpg": lambda: with_empty_segments(cmyk, 1_500_000, 0xFE),
        "filled-cmyk.jpg": lambda: cmyk[:2] + bytes(12_000_000) + cmyk[2:],
        "exif-segments-cmyk.jpg": lambda: with_segments(cmyk, 90_000, size=80),
        "resources-cmyk.jpg": lambda: with_segments(
            cmyk, 150, 0xED, b"Photoshop 3.0\0" + (b"8BIM\4\4" + bytes(6)) * 5_000
        ),
        "fractions-cmyk.jpg": lambda: with_exif(cmyk, exif_fractions(1_000_000)),
        "exif-overlaps-cmyk.jpg": lambda: with_exif(cmyk, exif_overlapping()),
        "frames.jpg": lambda: saved("mpo", save_all=True, append_images=[noise().rotate(90)] * 40),
        "runs.bmp": lambda: bmp(3_000, 3_000, b"\xff\0" * 36_000 + b"\0\1"),
        "runs-delta.bmp": lambda: bmp(16_000, 250, b"\0\2\xff\xff" * 9 + b"\0\1"),
        "runs-short.bmp": lambda: bmp(8_000, 8_000, b"\0\1"),
        "size.bmp": lambda: bmp(2**31 - 1, 1, b"", 0, 24),
        "negative.bmp": lambda: bmp(-5, -5, b"", 0, 24),
        "header.bmp": lambda: (
            b"BM" + struct.pack("<IHHI", 70, 0, 0, 54) + struct.pack("<I", 2**31) + bytes(60)
        ),
        "plain-ppm.jpg": lambda: pnm(b"P3", 2_500, 2_500, 255, b"0 " * 999),
        "number-ppm.jpg": lambda: pnm(b"P3", 64, 64, 255, b"9" * 8_000_000),
        "claimed-ppm.jpg": lambda: pnm(b"P6", 30_000, 30_000, 255, b""),
        "scaled-ppm.jpg": lambda: pnm(b"P6", 1_500, 1_500, 100, bytes(6_750_000)),
        "sixteen-pgm.jpg": lambda: pnm(b"P5", 1_500, 1_500, 65_535, bytes(4_500_000)),
        "comment-ppm.jpg": lambda: pnm(b"P6\n#" + b"c" * 8_000_000, 64, 64, 255, bytes(12_288)),
        "comments-ppm.jpg": lambda: pnm(b"P3", 64, 64, 255, b"0 " * 99 + b"#\n" * 60_000),
        "large.jp2": lambda: flat(2_500, 2_500, "jpeg2000", "RGB"),
        "medium.jp2": lambda: flat(900, 900, "jpeg2000", "RGB"),
        "tiles.jp2": lambda: with_jpeg2000_tiles(flat(64, 64, "jpeg2000", "RGB"), 30_000),
        "components.jp2": lambda: with_jpeg2000_size(flat(64, 64, "jpeg2000", "RGB"), 60_000),
        "tiles-of-a-pixel.jp2": lambda: with_jpeg2000_tiles(jpeg2000(250), 1),
        "precincts-of-a-pixel.jp2": lambda: jpeg2000(400, 0),
        "small-precincts.jp2": lambda: jpeg2000(1_100, 1),
        "precincts-of-a-component.jp2": lambda: jpeg2000(800, 0, of_component=1),
        "precincts-of-a-tile.jp2": lambda: jpeg2000(400, 0, in_tile=True),
        "small-blocks.jp2": lambda: flat(900, 900, "jpeg2000", "RGB", codeblock_size=(4, 4)),
        "segments.jp2": lambda: jpeg2000(64)[:-2].replace(
            b"\xff\x52", b"\xff\x64\0\2" * 1_000_000 + b"\xff\x52"
        ),
        "boxes.jp2": lambda: (
            b"\0\0\0\x0cjP  \r\n\x87\n" + b"\0\0\0\x08free" * 1_000_000 + jpeg2000(64)
        ),
        "large.avif": lambda: flat(2_500, 2_500, "avif", "RGB", speed=10),
        "medium.avif": lambda: flat(800, 800, "avif", "RGB", speed=10),
        "claimed.avif": lambda: with_avif_size(flat(64, 64, "avif", "RGB", speed=10), 9_000),
        "large-frame.avif": lambda: with_avif_size(flat(8_000, 8_000, "avif", "L", speed=10), 64),
        "large-frame-in-extents.avif": lambda: with_extents(
            with_avif_size(flat(8_000, 8_000, "avif", "L", speed=10), 64)
        ),
        "large-frames.avif": lambda: with_track_size(
            saved(
                "avif",
                Image.new("L", (8_000, 8_000)),
                speed=10,
                save_all=True,
                append_images=[Image.new("L", (8_000, 8_000), 9)],
            ),
            64,
        ),
        "oriented.avif": lambda: saved("avif", exif=exif_fractions(1_000_000), speed=10).replace(
            struct.pack("<HH", 282, RATIONAL), struct.pack("<HH", 274, RATIONAL)
        ),
        # Neither one thing nor the other.
        "empty.jpg": lambda: b"",
        "two-bytes.tif": lambda: b"II",
        "signature.png": lambda: b"\x89PNG\r\n\x1a\n",
        "longer-than-memory.png": lambda: png(after=bytes(40_000_000)),
    }


def hostile_images_with_options():
    """Return functions that build images that are hostile with `OPTIONS`, by name."""
    jpeg = saved("jpeg")
    return {
        "oriented.jpg": lambda: with_exif(jpeg, exif_fractions(1_000_000, 274)),
        "oriented.png": lambda: png(chunk(b"eXIf", exif_fractions(1_000_000, 274))),
        "oriented.webp": lambda: saved("webp", exif=exif_fractions(1_000_000, 274)),
        "exif-overlaps.jpg": lambda: with_exif(jpeg, exif_overlapping()),
        "exif-overlaps.png": lambda: png(chunk(b"eXIf", exif_overlapping())),
        "exif-overlaps.webp": lambda: saved("webp", exif=exif_overlapping()),
        "exif-text.png": lambda: png(raw_exif(exif_fractions(60_000, 274))),
        "wide.png": lambda: png(width=2_000_000, height=1, rows=bytes(6_000_001)),
        "tall.png": lambda: png(width=1, height=2_000_000, rows=bytes(8_000_000)),
        "wide-1.png": lambda: png(width=2_500_000, height=1, depth=1, color=0, rows=bytes(312_501)),
        "wide.jpg": lambda: flat(65_000, 1, "jpeg"),
    }


OPTIONS = ("--exif", "--interpolation", "lanczos")


class ImageRun(NamedTuple):
    """The outcome of a command on a directory of images."""

    code: int
    peak_bytes: int
    stderr: str
    rows: dict[str, tuple[bool, str]]
    """Whether each image failed, and the reason."""


COMMAND = """
import pathlib, re, sys
from fastvgg.cli import main

try:
    main()
finally:
    peak = re.search(r"VmHWM:\\s+([0-9]+)", pathlib.Path("/proc/self/status").read_text())
    pathlib.Path(sys.argv[3] + ".peak").write_text(peak[1])
"""


def run_on_images(images, *options, memory="64MiB", threads=2):
    """Pack images with the command line, in a process of its own."""
    with tempfile.TemporaryDirectory() as directory:
        source, target = Path(directory) / "in", Path(directory) / "out.npy"
        source.mkdir()
        for name, data in images.items():
            (source / name).write_bytes(data)
        options = (
            *("--size", "32", "32", "--memory", memory, "--threads", str(threads), "--quiet"),
            *options,
        )
        done = python(COMMAND, "pack", source, target, *options, errors="replace")
        peak = Path(f"{target}.peak")
        assert peak.exists(), f"exit code {done.returncode}\n{done.stderr}"
        records = read_index(target, len(images))
        rows = {record.path: (record.failed, record.reason) for record in records}
        return ImageRun(done.returncode, int(peak.read_text()) * 1024, done.stderr, rows)


def tiny_image():
    return saved("png", Image.new("RGB", (32, 32)))
