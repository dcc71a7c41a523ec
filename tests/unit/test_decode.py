"""Encoded images become the pixels that Keras' `load_img` gives, or a reason why not."""

from __future__ import annotations

import dataclasses
import functools
import io
import json
import queue
import re
import struct
import threading
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import keras
import numpy as np
import pytest
import simplejpeg
import tifffile
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps

from fastvgg.errors import UsageError
from fastvgg.imaging import decode, resize
from fastvgg.imaging.decode import INTERPOLATIONS, Decoded, DecodeOptions, Decoder, describe_error
from tests.helpers.datasets_on_disk import PHOTOGRAPHS, must_say, printed_by

# Pillow says so of each, and reads it; so does Keras.
pytestmark = pytest.mark.filterwarnings("ignore:Palette images with Transparency:UserWarning")

PLENTY = 2**29
CANARY = 77
SIZE = (37, 53)
# As they are, smaller, larger, smaller one way and larger the other.
SIZES = (None, SIZE, (301, 263), (301, 20), (20, 301), (1, 1))


def as_keras_loads(data, decoding=None):
    """The oracle: Keras itself, on the same file."""
    decoding = decoding or DecodeOptions()
    image = keras.utils.load_img(
        io.BytesIO(data),
        target_size=decoding.size,
        interpolation=decoding.interpolation,
        keep_aspect_ratio=decoding.keep_aspect_ratio,
    )
    return keras.utils.img_to_array(image).astype(np.uint8)


def decoded(data, shape, decoding=None, *, memory_bytes=PLENTY, **settings):
    """What a decoder makes of an image, in memory of which nothing else may be touched."""
    memory = np.full((shape[0] + 2, *shape[1:]), CANARY, np.uint8)
    decoder = Decoder(decoding or DecodeOptions(), memory_bytes=memory_bytes, **settings)
    result = decoder.decode(data, memory[1:-1])
    assert (memory[0] == CANARY).all()
    assert (memory[-1] == CANARY).all()
    return result, memory[1:-1]


def check(data, decoding=None, *, reason="", **settings):
    """Decode an image and compare it with what Keras loads."""
    expected = as_keras_loads(data, decoding)
    result, actual = decoded(data, expected.shape, decoding, **settings)
    with Image.open(io.BytesIO(data)) as image:
        assert result == Decoded(*image.size, False, reason), decoding
    assert actual.tobytes() == expected.tobytes(), decoding


def failure(data, decoding, **settings):
    """Why an image cannot be read."""
    shape = (*(decoding.size or (7, 9)), 3)
    result, _ = decoded(data, shape, decoding, **settings)
    assert result.failed
    assert len(result.reason.splitlines()) == 1
    return result.reason


@functools.cache
def photograph(height=47, width=61, name="chelsea.png"):
    with Image.open(PHOTOGRAPHS / name) as image:
        return image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)


def see_through(image, mode="RGBA"):
    image = image.convert(mode)
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    return image


def encoded(image, kind, **options):
    written = io.BytesIO()
    image.save(written, kind, **options)
    return written.getvalue()


def with_byte(data, at, value):
    changed = bytearray(data)
    changed[at] = value
    return bytes(changed)


# ----------------------------------------------------------------------------- kinds of JPEG


def segments(jpeg):
    """Where the marker segments of a JPEG begin and end, up to its first scan."""
    at = 2
    while True:
        end = at + 2 + int.from_bytes(jpeg[at + 2 : at + 4])
        yield jpeg[at + 1], at, end
        if jpeg[at + 1] == 0xDA:
            return
        at = end


def without(jpeg, *markers):
    """A JPEG without some of its segments."""
    kept = [(at, end) for marker, at, end in segments(jpeg) if marker not in markers]
    scan = list(segments(jpeg))[-1][2]
    return jpeg[:2] + b"".join(jpeg[at:end] for at, end in kept) + jpeg[scan:]


def segment(marker, content):
    return bytes([0xFF, marker]) + (len(content) + 2).to_bytes(2) + content


def with_segment(jpeg, marker, content):
    """A JPEG with one more segment in front of the others."""
    return jpeg[:2] + segment(marker, content) + jpeg[2:]


def called(jpeg, names):
    """A JPEG whose components have other names."""
    changed = bytearray(jpeg)
    for marker, at, _ in segments(jpeg):
        first, step = {0xC0: (at + 10, 3), 0xDA: (at + 5, 2)}.get(marker, (0, 0))
        if first:
            changed[first : first + 3 * step : step] = names
    return bytes(changed)


def sampled(kind, quality=80):
    def make(image):
        pixels = np.ascontiguousarray(image)
        return simplejpeg.encode_jpeg(pixels, quality=quality, colorsubsampling=kind)

    return make


def saved(mode="RGB", **options):
    return lambda image: encoded(image.convert(mode), "jpeg", **options)


def adobe(image, transform, mode="CMYK", **options):
    """A JPEG whose Adobe marker says another transform than it was written with."""
    jpeg = encoded(image.convert(mode), "jpeg", **options)
    return with_byte(jpeg, jpeg.index(b"Adobe") + 11, transform)


# Those that simplejpeg decodes.
USUAL = {
    **{f"4{kind[0]}{kind[1]}": sampled(f"4{kind}") for kind in ("44", "22", "20", "40", "11")},
    "optimised": saved(optimize=True),
    "progressive": saved(progressive=True),
    "progressive 4:4:4": saved(progressive=True, subsampling=0, quality=93),
    "grey": saved("L"),
    "progressive grey": saved("L", progressive=True),
    "restart rows": saved(restart_marker_rows=1),
    "restart blocks": saved(restart_marker_blocks=3, subsampling=1),
    "no JFIF": lambda image: without(saved()(image), 0xE0),
    "Adobe's own": lambda image: adobe(image, 1, "RGB", keep_rgb=True),
    "names that mean nothing": lambda image: called(without(saved()(image), 0xE0), (7, 8, 9)),
    "more than one": lambda image: encoded(
        image, "mpo", save_all=True, append_images=[image.rotate(180)]
    ),
    "something behind": lambda image: saved()(image) + b"\0" * 7 + b"trailer",
    "padded": lambda image: b"\xff\xd8\xff\xff\xff" + saved()(image)[2:],
    "comments": saved(comment=b"\xff\xda\xff\xc2 not a scan", icc_profile=b"no profile" * 7000),
    "broken EXIF": lambda image: with_segment(saved()(image), 0xE1, b"Exif\0\0MM\0*"),
}
# Those that Pillow decodes.
UNUSUAL = {
    "CMYK": saved("CMYK"),
    "progressive CMYK": saved("CMYK", progressive=True),
    "YCCK": lambda image: adobe(image, 2),
    "CMYK without Adobe's marker": lambda image: without(saved("CMYK")(image), 0xEE),
    "RGB": saved(keep_rgb=True),
    "RGB by its names": lambda image: without(saved(keep_rgb=True)(image), 0xEE),
    "Adobe says RGB": lambda image: adobe(image, 0, "RGB", keep_rgb=True, quality=50),
}
JPEGS = USUAL | UNUSUAL
JPEG_SIZES = ((1, 1), (1, 9), (7, 1), (8, 8), (15, 17), (16, 16), (33, 31), (227, 149))


def refused(*_arguments, **_settings):
    raise RuntimeError("the other decoder was to be used")


@pytest.mark.parametrize("kind", USUAL)
def test_a_usual_jpeg_is_decoded_by_simplejpeg_to_keras_pixels(monkeypatch, kind):
    for height, width in JPEG_SIZES:
        data = USUAL[kind](photograph(height, width))
        for size in (None, SIZE):
            decoding = DecodeOptions(size)
            expected = as_keras_loads(data, decoding)
            with monkeypatch.context() as patch:
                patch.setattr(decode, "open_image", refused)
                result, actual = decoded(data, expected.shape, decoding)
            assert result == Decoded(width, height, False, "")
            assert actual.tobytes() == expected.tobytes(), (height, width, size)


@pytest.mark.parametrize("kind", UNUSUAL)
def test_an_unusual_jpeg_is_decoded_by_pillow_to_keras_pixels(monkeypatch, kind):
    monkeypatch.setattr(simplejpeg, "decode_jpeg", refused)
    for height, width in JPEG_SIZES:
        data = UNUSUAL[kind](photograph(height, width))
        for size in (None, SIZE):
            check(data, DecodeOptions(size))


def test_the_kinds_of_jpeg_are_what_they_are_called():
    image = photograph()
    headers = {kind: simplejpeg.decode_jpeg_header(make(image)) for kind, make in JPEGS.items()}
    assert {height for height, *_ in headers.values()} == {47}
    for kind in ("444", "422", "420", "440", "411"):
        assert headers[kind][2:] == ("YCbCr", kind)
    colours = {kind: header[2] for kind, header in headers.items()}
    assert {colours[kind] for kind in UNUSUAL} == {"CMYK", "YCCK", "RGB"}
    assert {colours[kind] for kind in USUAL} == {"YCbCr", "Gray"}
    for kind, make in JPEGS.items():
        first = {marker for marker, *_ in segments(make(image))} if kind != "padded" else {0xC0}
        assert (0xC2 in first) == ("progressive" in kind)
        assert (0xDD in first) == ("restart" in kind)
    with Image.open(io.BytesIO(USUAL["more than one"](image))) as opened:
        assert (opened.format, opened.n_frames) == ("MPO", 2)


@pytest.mark.parametrize("kind", ["444", "420", "progressive", "grey"])
def test_every_quality_of_a_jpeg_has_keras_pixels(kind):
    image = photograph(33, 31)
    for quality in range(1, 101):
        if kind.isdigit():
            data = sampled(kind, quality)(image)
        else:
            options = {"progressive": True} if kind == "progressive" else {}
            data = saved("L" if kind == "grey" else "RGB", quality=quality, **options)(image)
        check(data)


@pytest.mark.parametrize("name", ["rocket.jpg", "hubble_deep_field.jpg", "retina.jpg"])
def test_photographs_from_cameras_and_programs_have_keras_pixels(monkeypatch, name):
    data = (PHOTOGRAPHS / name).read_bytes()
    for decoding in (
        DecodeOptions(),
        DecodeOptions((224, 224)),
        DecodeOptions((97, 300), "bilinear"),
    ):
        check(data, decoding)
    monkeypatch.setattr(decode, "open_image", refused)
    assert not decoded(data, (224, 224, 3), DecodeOptions((224, 224)))[0].failed


# ---------------------------------------------------------------------------- other formats

INTERLACED = (
    *((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4)),
    *((0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)),
)
GREY, RGB, PALETTE, GREY_ALPHA, RGBA = 0, 2, 3, 4, 6
CHANNELS = {GREY: 1, RGB: 3, PALETTE: 1, GREY_ALPHA: 2, RGBA: 4}
DEPTHS = {GREY: (1, 2, 4, 8), RGB: (8, 16), PALETTE: (1, 2, 4, 8), GREY_ALPHA: (8, 16)}


def chunk(name, content):
    return len(content).to_bytes(4) + name + content + zlib.crc32(name + content).to_bytes(4)


def png_rows(samples, depth):
    """The rows of a PNG, each after the number of no filter."""
    for row in samples:
        if depth == 16:
            yield b"\0" + row.astype(">u2").tobytes()
        else:
            ones = np.unpackbits(row.astype(np.uint8).reshape(-1, 1), axis=1)
            yield b"\0" + np.packbits(ones[:, 8 - depth :]).tobytes()


def png(colours, depth, height=21, width=19, *, interlaced=False, transparency=b"", samples=None):
    """A PNG of a kind that Pillow may not write, with noise in it."""
    if samples is None:
        shape = height, width, CHANNELS[colours]
        samples = np.random.default_rng(depth).integers(0, 2**depth, shape)
    passes = INTERLACED if interlaced else [(0, 0, 1, 1)]
    parts = [samples[y::down, x::across] for x, y, across, down in passes]
    rows = b"".join(row for part in parts if part.size for row in png_rows(part, depth))
    size = width.to_bytes(4) + height.to_bytes(4)
    palette = np.random.default_rng(3).integers(0, 256, 3 * 2**depth, np.uint8).tobytes()
    return b"".join(
        [
            b"\x89PNG\r\n\x1a\n",
            chunk(b"IHDR", size + bytes([depth, colours, 0, 0, interlaced])),
            chunk(b"PLTE", palette) if colours == PALETTE else b"",
            chunk(b"tRNS", transparency) if transparency else b"",
            chunk(b"IDAT", zlib.compress(rows)),
            chunk(b"IEND", b""),
        ]
    )


def tiff(pixels, **options):
    """A TIFF of a kind that Pillow may not write."""
    written = io.BytesIO()
    tifffile.imwrite(written, pixels, **options)
    return written.getvalue()


def pixels_of(image):
    return np.ascontiguousarray(image)


def moving(image, kind, **options):
    others = [image.rotate(90), image.rotate(180)]
    return encoded(image, kind, save_all=True, append_images=others, **options)


OTHERS = {
    "1-bit PNG": lambda image: encoded(image.convert("1"), "png"),
    "grey PNG": lambda image: encoded(image.convert("L"), "png"),
    "grey PNG with alpha": lambda image: encoded(see_through(image, "LA"), "png"),
    "PNG": lambda image: encoded(image, "png"),
    "PNG with alpha": lambda image: encoded(see_through(image), "png"),
    "2-bit palette PNG": lambda image: encoded(image.quantize(4), "png"),
    "4-bit palette PNG": lambda image: encoded(image.quantize(13), "png"),
    "palette PNG": lambda image: encoded(image.quantize(200), "png"),
    "palette PNG with alpha": lambda image: encoded(
        image.quantize(17), "png", transparency=bytes(range(17))
    ),
    "PNG with a colour seen through": lambda image: encoded(image, "png", transparency=(1, 2, 3)),
    "lossy WebP": lambda image: encoded(image, "webp", quality=70),
    "lossless WebP": lambda image: encoded(image, "webp", lossless=True),
    "lossy WebP with alpha": lambda image: encoded(see_through(image), "webp"),
    "lossless WebP with alpha": lambda image: encoded(see_through(image), "webp", lossless=True),
    "moving WebP": lambda image: moving(image, "webp"),
    "moving WebP with alpha": lambda image: moving(see_through(image), "webp", lossless=True),
    "BMP": lambda image: encoded(image, "bmp"),
    "grey BMP": lambda image: encoded(image.convert("L"), "bmp"),
    "1-bit BMP": lambda image: encoded(image.convert("1"), "bmp"),
    "palette BMP": lambda image: encoded(image.quantize(17), "bmp"),
    "BMP with alpha": lambda image: encoded(see_through(image), "bmp"),
    "GIF": lambda image: encoded(image.quantize(100), "gif", interlace=False),
    "interlaced GIF": lambda image: encoded(image.convert("L"), "gif", interlace=True),
    "moving GIF": lambda image: moving(image, "gif"),
    "GIF with a colour seen through": lambda image: encoded(
        image.quantize(30), "gif", transparency=3
    ),
    "TIFF": lambda image: encoded(image, "tiff"),
    "LZW TIFF": lambda image: encoded(image, "tiff", compression="tiff_lzw"),
    "deflate TIFF": lambda image: encoded(image, "tiff", compression="tiff_deflate"),
    "packbits TIFF": lambda image: encoded(image, "tiff", compression="packbits"),
    "JPEG TIFF": lambda image: encoded(image, "tiff", compression="jpeg"),
    "fax TIFF": lambda image: encoded(image.convert("1"), "tiff", compression="group4"),
    "1-bit TIFF": lambda image: encoded(image.convert("1"), "tiff"),
    "grey TIFF": lambda image: encoded(image.convert("L"), "tiff"),
    "palette TIFF": lambda image: encoded(image.quantize(17), "tiff"),
    "TIFF with alpha": lambda image: encoded(see_through(image), "tiff"),
    "CMYK TIFF": lambda image: encoded(image.convert("CMYK"), "tiff"),
    "LAB TIFF": lambda image: encoded(image.convert("LAB"), "tiff"),
    "float TIFF": lambda image: encoded(image.convert("F"), "tiff"),
    "planar TIFF": lambda image: tiff(
        np.moveaxis(pixels_of(image), -1, 0), photometric="rgb", planarconfig="separate"
    ),
    "big-endian TIFF": lambda image: tiff(pixels_of(image), photometric="rgb", byteorder=">"),
    "16-bit RGB TIFF": lambda image: tiff(
        pixels_of(image).astype(np.uint16) * 199, photometric="rgb"
    ),
    "TIFF of several images": lambda image: encoded(
        image, "tiff", save_all=True, append_images=[image.rotate(180)]
    ),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_every_other_format_has_keras_pixels(kind):
    for height, width in ((47, 61), (1, 9), (7, 1), (1, 1)):
        data = OTHERS[kind](photograph(height, width))
        for decoding in (DecodeOptions(), DecodeOptions(SIZE), DecodeOptions((20, 301), "bicubic")):
            check(data, decoding)


@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize(
    ("colours", "depth"), [(colours, depth) for colours in DEPTHS for depth in DEPTHS[colours]]
)
def test_every_kind_of_png_has_keras_pixels(colours, depth, interlaced):
    for height, width in ((21, 19), (1, 1), (2, 5)):
        check(png(colours, depth, height, width, interlaced=interlaced))
    seen = {GREY: b"\0\1", RGB: b"\0\1\0\2\0\3", PALETTE: b"\0\x80"}.get(colours, b"")
    check(png(colours, depth, interlaced=interlaced, transparency=seen), DecodeOptions(SIZE))


def test_interlaced_pixels_are_those_of_the_plain_image():
    actual = decoded(png(RGB, 8, interlaced=True), (21, 19, 3))[1]
    expected = np.random.default_rng(8).integers(0, 2**8, (21, 19, 3))
    assert (actual == expected).all()


def test_of_a_moving_image_the_first_frame_is_read():
    for kind in ("gif", "webp"):
        first = moving(photograph(), kind, **({"lossless": True} if kind == "webp" else {}))
        with Image.open(io.BytesIO(first)) as image:
            assert image.n_frames == 3
        actual = decoded(first, (47, 61, 3))[1].astype(int)
        assert abs(actual - pixels_of(photograph())).mean() < (10 if kind == "gif" else 1e-9)


def test_other_formats_are_not_read_whatever_pillow_knows():
    # Pillow hands PostScript to Ghostscript where that is installed.
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 7\n%%EndComments\n(%stderr) print\n"
    others = [encoded(photograph(), kind) for kind in ("ppm", "tga", "pcx", "ico", "eps")]
    for data in (script, *others, b"", b"\xff", b"\xff\xd8\xff", b"this is not an image"):
        assert failure(data, DecodeOptions(SIZE)) == "not an image in a supported format"
        assert Decoder(DecodeOptions(), memory_bytes=PLENTY).size(data) == (
            "not an image in a supported format"
        )


# --------------------------------------------------------------------------------- resizing

RESIZED = {
    "a JPEG": USUAL["420"],
    "a progressive JPEG": USUAL["progressive"],
    "a grey JPEG": USUAL["grey"],
    "a CMYK JPEG": UNUSUAL["CMYK"],
    "a PNG with alpha": OTHERS["PNG with alpha"],
    "a palette PNG": OTHERS["palette PNG"],
    "a 1-bit TIFF": OTHERS["1-bit TIFF"],
}


@functools.cache
def resized_files():
    sizes = ((227, 149), (15, 17), (1, 9), (37, 53))
    return [make(photograph(*size)) for make in RESIZED.values() for size in sizes]


@pytest.mark.parametrize("keep_aspect_ratio", [False, True])
@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_every_way_to_resize_has_keras_pixels(backend, interpolation, keep_aspect_ratio):
    gather = resize.gather_function(backend)
    for data in resized_files():
        for size in SIZES[1:]:
            decoding = DecodeOptions(size, interpolation, keep_aspect_ratio)
            try:
                as_keras_loads(data, decoding)
            except ValueError:  # nothing is left of a line that is cut to such a shape
                assert "empty" in failure(data, decoding, gather=gather)
            else:
                check(data, decoding, gather=gather)


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_whole_photographs_have_keras_pixels_in_every_interpolation(interpolation):
    for name in ("astronaut.png", "chelsea.png", "rocket.jpg", "camera.png"):
        data = (PHOTOGRAPHS / name).read_bytes()
        for size in ((225, 223), (701, 11)):
            check(data, DecodeOptions(size, interpolation))


sides = st.integers(1, 60)


@given(sides, sides, st.tuples(sides, sides), st.sampled_from([*INTERPOLATIONS]), st.booleans())
def test_any_size_is_cut_and_resized_to_any_size_as_in_keras(height, width, size, how, keep):
    decoding = DecodeOptions(size, how, keep)
    for make in (USUAL["444"], OTHERS["PNG"]):
        data = make(photograph(height, width))
        try:
            as_keras_loads(data, decoding)
        except ValueError:
            assert failure(data, decoding)
        else:
            check(data, decoding)


def test_the_interpolations_are_those_that_keras_names():
    with pytest.raises(ValueError, match="Supported") as caught:
        as_keras_loads(USUAL["444"](photograph()), unchecked(size=SIZE, interpolation="lanczos3"))
    named = re.findall(r"\w+", str(caught.value).partition(" are ")[2])
    assert sorted(named) == sorted(INTERPOLATIONS)


def unchecked(**settings):
    """Settings that `DecodeOptions` would refuse."""
    decoding = DecodeOptions()
    for name, value in settings.items():
        object.__setattr__(decoding, name, value)
    return decoding


@pytest.mark.parametrize("make", [USUAL["444"], OTHERS["PNG"]], ids=["JPEG", "PNG"])
def test_an_image_of_another_size_than_all_others_fails(make):
    result, _ = decoded(make(photograph(11, 13)), (7, 9, 3))
    assert result == Decoded(13, 11, True, "the image is 11x13, expected 7x9")


def test_size_is_height_and_width_of_every_format():
    decoder = Decoder(DecodeOptions(), memory_bytes=PLENTY)
    for make in (*JPEGS.values(), *OTHERS.values()):
        assert decoder.size(make(photograph(7, 13))) == (7, 13)


def test_many_threads_decode_at_once_as_one_does():
    decoding = DecodeOptions(SIZE)
    kinds = [*USUAL.values(), *UNUSUAL.values(), *OTHERS.values()] * 3
    files = [make(photograph()) for make in kinds]
    expected = [as_keras_loads(data, decoding).tobytes() for data in files]
    # Some of them fit into the share of a thread, and some are read one at a time.
    decoder = Decoder(decoding, memory_bytes=400_000, threads=4)

    def read(data):
        out = np.empty((*SIZE, 3), np.uint8)
        return decoder.decode(data, out), out

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(read, files))
    assert [result.reason for result, _ in results] == [""] * len(files)
    assert [out.tobytes() for _, out in results] == expected


# ------------------------------------------------------------------------------------- EXIF

TURNED = {
    "jpeg": {},
    "jpeg, grey": {},
    "jpeg, progressive": {"progressive": True},
    "png": {},
    "webp": {"lossless": True},
    "tiff": {},
    "tiff, packed": {"compression": "tiff_lzw"},
    "mpo": {"save_all": True},
}


def turned(kind, orientation, image=None):
    """An image that asks a viewer to turn it."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = image or photograph(25, 40)
    image = image.convert("L") if "grey" in kind else image
    return encoded(image, kind.partition(",")[0], exif=exif, **TURNED[kind])


def as_a_viewer_loads(data, decoding):
    """The oracle: Pillow turns the image, and Keras takes it from there."""
    with Image.open(io.BytesIO(data)) as image:
        upright = ImageOps.exif_transpose(image).convert("RGB")
    return as_keras_loads(encoded(upright, "png"), decoding)


ORIENTATIONS = (*range(10), 65535)


@pytest.mark.parametrize("kind", TURNED)
def test_orientations_are_ignored_as_keras_does_unless_they_are_asked_for(kind):
    differ = set()
    for orientation in range(1, 9) if "tiff" in kind else ORIENTATIONS:
        data = turned(kind, orientation)
        for decoding in (
            *(DecodeOptions(), DecodeOptions(SIZE), DecodeOptions((11, 29), "bilinear")),
            DecodeOptions((31, 17), keep_aspect_ratio=True),
        ):
            check(data, decoding)
            asked = dataclasses.replace(decoding, exif=True)
            expected = as_a_viewer_loads(data, asked)
            result, actual = decoded(data, expected.shape, asked)
            assert not result.failed
            assert result.reason == ""
            assert actual.tobytes() == expected.tobytes(), (orientation, asked)
            if actual.tobytes() != decoded(data, expected.shape, decoding)[1].tobytes():
                differ.add(orientation)
    # Pillow turns every TIFF that it opens, and so does Keras.
    assert differ == (set() if "tiff" in kind else set(range(2, 9)))


@pytest.mark.parametrize("kind", TURNED)
def test_the_size_that_is_told_is_that_of_what_is_read(kind):
    for orientation in range(1, 9):
        data = turned(kind, orientation)
        for exif in (False, True):
            decoding = DecodeOptions(exif=exif)
            load = as_a_viewer_loads if exif else as_keras_loads
            size = Decoder(decoding, memory_bytes=PLENTY).size(data)
            assert size == load(data, decoding).shape[:2], (orientation, exif)


def test_each_orientation_is_what_exif_says_it_is():
    image = pixels_of(photograph(5, 8))
    expected = {
        1: image,
        2: image[:, ::-1],
        3: image[::-1, ::-1],
        4: image[::-1],
        5: image.swapaxes(0, 1),
        6: np.rot90(image, -1),
        7: image[::-1, ::-1].swapaxes(0, 1),
        8: np.rot90(image),
    }
    for orientation, upright in expected.items():
        data = turned("png", orientation, photograph(5, 8))
        result, actual = decoded(data, upright.shape, DecodeOptions(exif=True))
        assert result == Decoded(8, 5, False, "")
        assert (actual == upright).all()


def test_an_upright_jpeg_is_decoded_by_simplejpeg_where_orientations_count(monkeypatch):
    monkeypatch.setattr(simplejpeg, "decode_jpeg", refused)
    decoding = DecodeOptions(SIZE, exif=True)
    for data in (turned("jpeg", 1), USUAL["444"](photograph())):
        with pytest.raises(RuntimeError, match="the other decoder"):
            decoded(data, (*SIZE, 3), decoding)
    assert not decoded(turned("jpeg", 6), (*SIZE, 3), decoding)[0].failed


def test_damaged_exif_is_read_as_a_viewer_reads_it_or_is_a_failure():
    random = np.random.default_rng(1)
    decoding = DecodeOptions(SIZE, exif=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of some of it, and goes on
        for number in range(120):
            kind = ["jpeg", "png", "webp", "mpo"][number % 4]
            data = bytearray(turned(kind, 6))
            # Its entries: Pillow's PNG and WebP have a sum behind, or none.
            begin = max(data.find(b"II*\0"), data.find(b"MM\0*"))
            for _ in range(random.integers(1, 4)):
                data[begin + random.integers(0, 26)] = random.integers(256)
            if kind == "png":
                at = data.index(b"eXIf")
                length = int.from_bytes(data[at - 4 : at])
                data[at + 4 + length : at + 8 + length] = zlib.crc32(
                    data[at : at + 4 + length]
                ).to_bytes(4)
            check(bytes(data), DecodeOptions(SIZE))
            try:
                expected = as_a_viewer_loads(bytes(data), decoding)
            except decode.DECODING_ERRORS:
                assert failure(bytes(data), decoding)
            else:
                result, actual = decoded(bytes(data), (*SIZE, 3), decoding)
                assert not result.failed
                assert actual.tobytes() == expected.tobytes()


# ---------------------------------------------------------------------------------- 16 bits

EVERY_16_BITS = np.arange(65536, dtype=np.uint16).reshape(256, 256)
REFUSED_16 = "16-bit grayscale, which Keras clips to white; use --gray16 scale to scale it"
SIXTEEN = {
    "PNG": encoded(Image.fromarray(EVERY_16_BITS), "png"),
    "interlaced PNG": png(
        *(GREY, 16, 256, 256), interlaced=True, samples=EVERY_16_BITS[:, :, np.newaxis]
    ),
    "TIFF": encoded(Image.fromarray(EVERY_16_BITS), "tiff"),
    "packed TIFF": encoded(Image.fromarray(EVERY_16_BITS), "tiff", compression="tiff_lzw"),
    "big-endian TIFF": tiff(EVERY_16_BITS, byteorder=">"),
}


@pytest.mark.parametrize("kind", SIXTEEN)
def test_a_grey_of_16_bits_is_refused_or_scaled_in_every_value(kind):
    for size in (None, (256, 256), SIZE):
        result, _ = decoded(SIXTEEN[kind], (*(size or (256, 256)), 3), DecodeOptions(size))
        assert result == Decoded(256, 256, True, REFUSED_16)
    # 65535 is 257 times 255: no value lies in the middle between two.
    expected = np.rint(EVERY_16_BITS * 255.0 / 65535.0)
    result, actual = decoded(SIXTEEN[kind], (256, 256, 3), DecodeOptions(gray16="scale"))
    assert result == Decoded(256, 256, False, "")
    assert (actual == expected[:, :, np.newaxis]).all()


def test_the_two_byte_orders_of_a_tiff_are_two_kinds_of_image():
    modes = set()
    for kind in ("TIFF", "big-endian TIFF"):
        with Image.open(io.BytesIO(SIXTEEN[kind])) as image:
            modes.add(image.mode)
    assert modes == {"I;16", "I;16B"}


def test_a_scaled_grey_is_resized_and_turned_like_any_other():
    samples = np.random.default_rng(1).integers(0, 65536, (25, 40), np.uint16)
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(Image.fromarray(samples), "png", exif=exif)
    eight = np.rint(samples / 257).astype(np.uint8)
    for decoding, pixels in (
        (DecodeOptions(SIZE, "bicubic", gray16="scale"), eight),
        (DecodeOptions(SIZE, keep_aspect_ratio=True, gray16="scale"), eight),
        (DecodeOptions(SIZE, exif=True, gray16="scale"), np.rot90(eight, -1)),
    ):
        expected = as_keras_loads(encoded(Image.fromarray(pixels.copy()), "png"), decoding)
        result, actual = decoded(data, (*SIZE, 3), decoding)
        assert result == Decoded(40, 25, False, "")
        assert actual.tobytes() == expected.tobytes()


@pytest.mark.parametrize("gray16", ["error", "scale"])
def test_a_grey_of_32_bits_is_refused(gray16):
    data = encoded(Image.fromarray(np.arange(63, dtype=np.int32).reshape(7, 9) * 77_777), "tiff")
    reason = failure(data, DecodeOptions(gray16=gray16))
    assert reason == "32-bit grayscale, which Keras clips to white"


def test_colours_of_16_bits_are_what_keras_makes_of_them():
    for data in (png(RGB, 16), png(GREY_ALPHA, 16), png(RGBA, 16)):
        for gray16 in ("error", "scale"):
            check(data, DecodeOptions(SIZE, gray16=gray16))


# -------------------------------------------------------------------------------- fast JPEG


def reduced(data, decoding):
    """The size to which a JPEG is decoded before its pixels are gathered."""
    shapes = []

    def gather(pixels, index, out):
        shapes.append(pixels.shape)
        resize.gather(pixels, index, out)

    result, _ = decoded(data, (*decoding.size, 3), decoding, gather=gather)
    assert not result.failed
    return shapes[0][:2] if shapes else decoding.size  # that is what it was decoded to


@pytest.mark.parametrize("name", ["rocket.jpg", "retina.jpg"])
def test_fast_jpeg_gives_nearly_the_same_image_of_large_photographs(name):
    data = (PHOTOGRAPHS / name).read_bytes()
    for size in ((96, 128), (31, 53)):
        for interpolation, most in (("bilinear", 2), ("nearest", 12)):
            usual, fast = (
                decoded(data, (*size, 3), DecodeOptions(size, interpolation, fast_jpeg=fast))
                for fast in (False, True)
            )
            assert usual[0] == fast[0]
            assert not fast[0].failed
            assert usual[1].tobytes() != fast[1].tobytes()
            assert abs(usual[1].astype(int) - fast[1]).mean() < most


def test_fast_jpeg_halves_as_often_as_it_can():
    data = sampled("420")(photograph(321, 483))
    sizes = [(321, 483), (161, 242), (121, 182), (81, 121), (41, 61)]
    for target in (*((161, 242), (160, 200), (100, 242), (121, 182), (81, 122)), (81, 121), (9, 7)):
        fitting = [size for size in sizes if size[0] >= target[0] and size[1] >= target[1]]
        assert reduced(data, DecodeOptions(target, fast_jpeg=True)) == fitting[-1]


@pytest.mark.parametrize("keep_aspect_ratio", [False, True])
def test_fast_jpeg_never_decodes_to_less_than_is_wanted(keep_aspect_ratio):
    random = np.random.default_rng(5)
    smaller = 0
    for _ in range(150):
        height, width, *size = (
            int(side) for side in random.integers((60, 60, 1, 1), (140, 140, 80, 80))
        )
        data = sampled("420")(photograph(height, width))
        decoding = DecodeOptions(tuple(size), "nearest", keep_aspect_ratio, True)
        if tuple(size) == (height, width):
            continue
        high, wide = reduced(data, decoding)
        parts = []
        for sides in ((height, width), (high, wide)):
            part = list(sides)
            if keep_aspect_ratio:
                part[0] = min(sides[0], sides[1] * size[0] // size[1])
                part[1] = min(sides[1], sides[0] * size[1] // size[0])
            parts.append(part)
        for before, after, target in zip(*parts, size, strict=True):
            assert after >= min(before, target), (height, width, size, high, wide)
        if (high, wide) != (height, width):
            smaller += 1
            assert high <= -(-height // 2)
            assert wide <= -(-width // 2)
    assert smaller > 20


def test_fast_jpeg_changes_nothing_where_an_image_is_not_shrunk_to_a_half():
    for make in (USUAL["420"], USUAL["444"]):
        data = make(photograph(60, 80))
        for size in ((60, 80), (31, 40), (30, 41), (99, 99)):
            check(data, DecodeOptions(size, fast_jpeg=True))


def test_fast_jpeg_leaves_other_formats_and_unusual_jpegs_alone():
    for make in (*UNUSUAL.values(), OTHERS["PNG"], OTHERS["lossy WebP"], OTHERS["JPEG TIFF"]):
        check(make(photograph(90, 120)), DecodeOptions((9, 7), fast_jpeg=True))


# ----------------------------------------------------------------------------------- limits


def claiming(jpeg, height, width):
    """A JPEG that says that it is larger than it is."""
    changed = bytearray(jpeg)
    at = next(at for marker, at, _ in segments(jpeg) if marker in (0xC0, 0xC2))
    changed[at + 5 : at + 9] = height.to_bytes(2) + width.to_bytes(2)
    return bytes(changed)


LIMITED = {
    "JPEG": USUAL["420"],
    "progressive JPEG": USUAL["progressive"],
    "CMYK JPEG": UNUSUAL["CMYK"],
    **{kind: OTHERS[kind] for kind in ("PNG", "GIF", "lossy WebP", "BMP", "TIFF")},
}


@pytest.mark.parametrize("kind", LIMITED)
def test_an_image_of_more_pixels_than_the_limit_is_refused(kind):
    data = LIMITED[kind](photograph(7, 9))
    check(data, DecodeOptions(SIZE, max_pixels=63))
    result, _ = decoded(data, (*SIZE, 3), DecodeOptions(SIZE, max_pixels=62))
    assert result == Decoded(9, 7, True, "the image has 63 pixels; --max-pixels is 62")


def test_an_image_of_very_many_pixels_is_refused_before_it_is_decoded(monkeypatch):
    jpegs = [USUAL[kind](photograph(7, 9)) for kind in ("444", "progressive", "grey")]
    monkeypatch.setattr(simplejpeg, "decode_jpeg", refused)
    monkeypatch.setattr(Image.Image, "convert", refused)
    for jpeg in jpegs:
        result, _ = decoded(claiming(jpeg, 65_000, 65_001), (*SIZE, 3), DecodeOptions(SIZE))
        assert result.failed
        assert result.reason == "the image has 4225065000 pixels; --max-pixels is 89478485"
    zeros = chunk(b"IDAT", zlib.compress(bytes(2**20)))
    for height, width in ((40_001, 30_001), (9_000, 8_999)):
        head = width.to_bytes(4) + height.to_bytes(4) + bytes([1, GREY, 0, 0, 0])
        bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + zeros + chunk(b"IEND", b"")
        reason = failure(bomb, DecodeOptions(SIZE, max_pixels=10_000_000))
        assert "pixels" in reason


BOMBS = """
import io, resource, sys, zlib
import numpy as np
from tests.helpers.datasets_on_disk import PHOTOGRAPHS
from PIL import Image
from fastvgg.imaging.decode import Decoder, DecodeOptions

def decoded(data, **settings):
    decoder = Decoder(DecodeOptions((31, 53), **settings), memory_bytes=40 * 2**20, threads=2)
    return decoder.decode(data, np.empty((31, 53, 3), np.uint8))

written = io.BytesIO()
Image.new("L", (9_000, 8_999)).save(written, "png")
assert len(written.getvalue()) < 200_000
small = (PHOTOGRAPHS / "rocket.jpg").read_bytes()
assert not decoded(small).failed
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 40 * 2**20, -1))
print(decoded(written.getvalue()).reason)
print(decoded(written.getvalue(), max_pixels=80_000_000).reason)
assert not decoded(small).failed
"""


def test_a_bomb_is_refused_without_the_memory_that_it_would_take():
    memory, pixels = printed_by(BOMBS).splitlines()
    assert "bytes of memory" in memory
    assert "increase --memory" in memory
    assert pixels == "the image has 80991000 pixels; --max-pixels is 80000000"


def memory_needed(data, decoding, memory_bytes=2):
    """The memory that decoding an image is reported to take where there is too little."""
    reason = failure(data, decoding, memory_bytes=memory_bytes)
    needed, there = map(int, re.findall(r"[0-9]+", reason))
    assert reason == (
        f"decoding takes {needed} bytes of memory, but only {there} are available: "
        "increase --memory"
    )
    assert there == memory_bytes // 2
    return needed


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear"])
@pytest.mark.parametrize("kind", LIMITED)
def test_an_image_that_takes_more_than_half_of_the_memory_is_refused(kind, interpolation):
    decoding = DecodeOptions(SIZE, interpolation)
    data = LIMITED[kind](photograph())
    needed = memory_needed(data, decoding)
    assert needed >= len(data) + 47 * 61 * 3
    for threads in (1, 2, 7):
        check(data, decoding, memory_bytes=2 * needed, threads=threads)
    assert memory_needed(data, decoding, 2 * needed - 2) == needed


def test_a_progressive_jpeg_takes_the_memory_of_its_coefficients():
    decoding = DecodeOptions(SIZE)
    baseline, progressive = (
        memory_needed(data, decoding) - len(data)
        for data in (USUAL["420"](photograph()), USUAL["progressive"](photograph()))
    )
    assert baseline == 47 * 61 * 3
    assert progressive >= baseline + 2 * 47 * 61 * 3


class Watched:
    """A lock that tells who comes to it."""

    def __init__(self):
        self._lock = threading.Lock()
        self.seen = queue.SimpleQueue()

    def __enter__(self):
        self.seen.put("comes to the lock")
        self._lock.acquire()

    def __exit__(self, *_error):
        self._lock.release()


def watched(decoding, **settings):
    decoder = Decoder(decoding, **settings)
    decoder._one_large = Watched()
    return decoder, decoder._one_large.seen


@pytest.mark.parametrize("kind", LIMITED)
def test_an_image_that_does_not_fit_into_a_thread_s_share_is_a_large_one(kind):
    decoding = DecodeOptions(SIZE, "bilinear")
    data = LIMITED[kind](photograph())
    needed = memory_needed(data, decoding)
    for threads in (1, 2, 7):
        out = np.empty((*SIZE, 3), np.uint8)
        for share, comes in ((needed, False), (needed - 1, True)):
            # A half is for large ones; of an odd number the other half has one more.
            memory_bytes = 2 * threads * share
            if comes:
                memory_bytes = max(memory_bytes, 2 * needed)
                if threads == 1:  # a share as large as the half for large ones
                    continue
            decoder, seen = watched(decoding, memory_bytes=memory_bytes, threads=threads)
            result = decoder.decode(data, out)
            assert not result.failed, result
            assert seen.empty() != comes


def test_large_images_are_decoded_one_at_a_time():
    large, small = USUAL["420"](photograph(227, 149)), USUAL["420"](photograph(33, 31))
    others, order = [], []

    def decode_it(data):
        return decoder.decode(data, np.empty((*SIZE, 3), np.uint8)).reason

    def gather(pixels, index, out):
        if len(pixels) == 227:
            seen.put("picks")
            if not others:
                assert decode_it(small) == ""  # a small one does not wait for it
                others.append(pool.submit(decode_it, large))
                order.extend(seen.get(timeout=20) for _ in range(3))
        resize.gather(pixels, index, out)

    memory_bytes = 2 * memory_needed(large, DecodeOptions(SIZE))
    decoder, seen = watched(
        DecodeOptions(SIZE), memory_bytes=memory_bytes, threads=4, gather=gather
    )
    with ThreadPoolExecutor(1) as pool:
        assert decode_it(large) == ""
        assert others[0].result() == ""
    assert order == ["comes to the lock", "picks", "comes to the lock"]
    assert seen.get_nowait() == "picks"
    assert seen.empty()


@pytest.mark.parametrize("kind", LIMITED)
def test_a_large_image_that_fails_lets_the_next_one_in(kind):
    data = LIMITED[kind](photograph())
    needed = memory_needed(data, DecodeOptions(SIZE))
    decoder = Decoder(DecodeOptions(SIZE), memory_bytes=2 * needed, threads=3)
    out = np.empty((*SIZE, 3), np.uint8)
    for damaged in (data[: len(data) // 2], data):
        result = decoder.decode(damaged, out)
    assert not result.failed


PEAK = """
import io, pathlib, re, sys
import numpy as np
from PIL import Image
from fastvgg.imaging.decode import Decoder, DecodeOptions

def field(name):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

how = sys.argv[2]
size = (1_501, 2_003) if how == "as it is" else (31, 53)
decoding = DecodeOptions(size, "nearest" if how == "as it is" else how)
small, out = np.empty((5, 7, 3), np.uint8), np.full((*size, 3), 7, np.uint8)
for kind in ("jpeg", "png", "webp"):  # what is loaded once
    written = io.BytesIO()
    Image.new("RGB", (9, 9)).save(written, kind)
    Decoder(DecodeOptions((5, 7)), memory_bytes=2**30).decode(written.getvalue(), small)
data = pathlib.Path(sys.argv[1]).read_bytes()
reason = Decoder(decoding, memory_bytes=4).decode(data, out).reason
decoder = Decoder(decoding, memory_bytes=2**30)
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")
before = field("VmRSS")
assert not decoder.decode(data, out).failed
print(re.search("[0-9]+", reason)[0], field("VmHWM") - before + len(data))
"""


@functools.cache
def large_file(kind):
    image = photograph(1_501, 2_003)
    if kind == "WebP":
        return encoded(image, "webp", method=0)
    if "PNG" in kind:
        image = see_through(image) if "alpha" in kind else image
        return encoded(image, "png", compress_level=1)
    return encoded(image, "jpeg", progressive=kind == "progressive JPEG")


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux tells the peak")
@pytest.mark.parametrize(
    ("kind", "how"),
    [
        ("JPEG", "nearest"),
        ("JPEG", "bilinear"),
        ("progressive JPEG", "nearest"),
        ("PNG with alpha", "bilinear"),
        ("PNG", "as it is"),
        ("PNG with alpha", "as it is"),
        ("WebP", "nearest"),
    ],
)
def test_an_image_takes_no_more_memory_than_it_is_counted_with(tmp_path, kind, how):
    (tmp_path / "image").write_bytes(large_file(kind))
    counted, used = map(int, printed_by(PEAK, tmp_path / "image", how).split())
    assert used < counted + 3 * 2**20  # what Python and its memory's pages add


# ----------------------------------------------------------------------------------- damage

DAMAGED = {
    "JPEG": USUAL["444"],
    "subsampled JPEG": USUAL["420"],
    "progressive JPEG": USUAL["progressive"],
    "grey JPEG": USUAL["grey"],
    "restart JPEG": USUAL["restart blocks"],
    "CMYK JPEG": UNUSUAL["CMYK"],
    "MPO": USUAL["more than one"],
    **{kind: OTHERS[kind] for kind in ("PNG", "palette PNG with alpha", "GIF", "moving GIF")},
    "interlaced PNG": lambda image: png(RGB, 8, interlaced=True),
    **{kind: OTHERS[kind] for kind in ("lossy WebP", "lossless WebP with alpha", "moving WebP")},
    **{kind: OTHERS[kind] for kind in ("BMP", "palette BMP", "TIFF", "LZW TIFF", "JPEG TIFF")},
}


def check_damaged(data, decoding):
    """Compare with Keras what may not be readable; return whether it is."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of some damage and goes on
        try:
            expected = as_keras_loads(data, decoding)
        except Exception:  # noqa: BLE001  # whatever Pillow raises
            assert failure(data, decoding)
            return False
        result, actual = decoded(data, expected.shape, decoding)
        if "-bit grayscale, which" in result.reason:
            assert result.failed
        else:
            assert not result.failed
            assert actual.tobytes() == expected.tobytes()
        return True


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_file_that_was_cut_off_fails_exactly_where_keras_fails(kind):
    data = DAMAGED[kind](photograph())
    random = np.random.default_rng(len(data))
    lengths = {
        *(len(data) * tenth // 10 for tenth in range(11)),
        *(int(length) for length in random.integers(0, len(data), 20)),
        *range(len(data) - 12, len(data)),
    }
    outcomes = {check_damaged(data[:length], DecodeOptions(SIZE)) for length in lengths}
    assert outcomes == {True, False}


@pytest.mark.parametrize("kind", DAMAGED)
def test_any_damage_is_a_failure_with_a_reason_or_gives_keras_pixels(kind):
    data = DAMAGED[kind](photograph())
    random = np.random.default_rng(len(data))
    outcomes = set()
    for number in range(60):
        damaged = bytearray(data)
        for _ in range(random.integers(1, 4)):
            # Mostly near the front, where the lengths and offsets are.
            damaged[int(len(data) * random.random() ** (1 + number % 4))] = random.integers(256)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            size = Decoder(DecodeOptions(), memory_bytes=PLENTY).size(bytes(damaged))
        if isinstance(size, str) or size[0] * size[1] < 10**6:
            outcomes.add(check_damaged(bytes(damaged), DecodeOptions(SIZE)))
    assert False in outcomes


JUNK = {
    "junk before a marker": (lambda jpeg: after(jpeg, 0xE0, b"abc"), "3 extraneous bytes before"),
    "a stuffed byte": (lambda jpeg: jpeg[:2] + b"\xff\x00" + jpeg[2:], "extraneous bytes before"),
    "a lost restart": (lambda jpeg: jpeg.replace(b"\xff\xd3", b"\xff\xd5", 1), "found marker 0xd5"),
    "a scan cut short": (
        lambda jpeg: jpeg[: len(jpeg) * 2 // 3] + b"\xff\xd9",
        "premature end of data segment",
    ),
}


def after(jpeg, marker, junk):
    end = next(end for found, _, end in segments(jpeg) if found == marker)
    return jpeg[:end] + junk + jpeg[end:]


@pytest.mark.parametrize("kind", JUNK)
def test_what_libjpeg_warns_of_is_read_as_keras_reads_it_and_told(kind):
    damage, warning = JUNK[kind]
    data = damage(USUAL["restart blocks"](photograph()))
    for decoding in (
        DecodeOptions(),
        DecodeOptions(SIZE),
        DecodeOptions(SIZE, "bilinear", fast_jpeg=True),
    ):
        expected = as_keras_loads(data, dataclasses.replace(decoding, fast_jpeg=False))
        result, actual = decoded(data, expected.shape, decoding)
        assert not result.failed
        assert warning in result.reason
        assert actual.tobytes() == expected.tobytes()


def test_a_warning_is_a_failure_where_warnings_are_errors_and_nothing_elsewhere():
    data = OTHERS["palette PNG with alpha"](photograph())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "Transparency" in failure(data, DecodeOptions(SIZE))
    with pytest.warns(UserWarning, match="Transparency"):
        assert not decoded(data, (*SIZE, 3), DecodeOptions(SIZE))[0].failed


def test_what_pillow_may_raise_is_caught():
    for error in (
        *(Image.UnidentifiedImageError, Image.DecompressionBombError, struct.error, zlib.error),
        *(OSError, SyntaxError, ValueError, TypeError, IndexError, KeyError, EOFError),
        *(OverflowError, UserWarning, Image.DecompressionBombWarning),
    ):
        assert issubclass(error, decode.DECODING_ERRORS)
    assert not issubclass(MemoryError, decode.DECODING_ERRORS)
    assert not issubclass(KeyboardInterrupt, decode.DECODING_ERRORS)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (FileNotFoundError(2, "No such file or directory", "a.png"), "No such file or directory"),
        (OSError("image file is truncated"), "image file is truncated"),
        (Image.UnidentifiedImageError("cannot identify image file <x>"), "not an image in"),
        (SyntaxError("broken\n  PNG\tfile"), "broken PNG file"),
        (EOFError(), "EOFError"),
        (ValueError(" \n"), "ValueError"),
    ],
)
def test_a_reason_is_one_line_that_says_something(error, reason):
    assert describe_error(error).startswith(reason)
    assert "\n" not in describe_error(error)


# --------------------------------------------------------------------------------- settings

GIVEN = DecodeOptions((37, 53), "bicubic", True, True, True, "scale", 12_345)


def test_settings_come_back_from_json_whatever_stands_beside_them():
    for decoding in (DecodeOptions(), GIVEN):
        fields = json.loads(json.dumps({"path": "photos", **decoding.to_dict(), "kind": "images"}))
        assert DecodeOptions.from_dict(fields) == decoding
    assert DecodeOptions.from_dict(json.loads(json.dumps(GIVEN.to_dict()))).size == (37, 53)


def test_every_setting_is_told():
    usual, given_ = DecodeOptions().to_dict(), GIVEN.to_dict()
    assert {name for name in usual if usual[name] != given_[name]} == {
        *("size", "interpolation", "keep_aspect_ratio", "fast_jpeg", "exif", "gray16"),
        "max_pixels",
    }
    json.dumps(given_)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        *(({"size": size}, [size, "--size 224 224"]) for size in ((0, 5), (5, 0), (-1, 5), (5,))),
        ({"size": (5, 7, 3)}, ["(5, 7, 3)", "--size 224 224"]),
        ({"size": SIZE, "interpolation": "cubic"}, ["'cubic'", *INTERPOLATIONS]),
        ({"interpolation": ""}, ["''", *INTERPOLATIONS]),
        ({"gray16": "clip"}, ["'clip'", "'error'", "'scale'"]),
        ({"max_pixels": 0}, ["invalid max_pixels 0"]),
        ({"max_pixels": -1}, ["invalid max_pixels -1"]),
        ({"max_pixels": 1.5}, ["invalid max_pixels 1.5"]),
        ({"max_pixels": True}, ["invalid max_pixels True"]),
        ({"keep_aspect_ratio": True}, ["keep_aspect_ratio", "requires a size", "--size 224 224"]),
        ({"fast_jpeg": True}, ["fast_jpeg", "requires a size", "--size 224 224"]),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, words):
    with pytest.raises(UsageError) as caught:
        DecodeOptions(**settings)
    must_say(caught.value, *words)


def test_no_image_of_as_many_pixels_as_are_allowed_has_a_file_that_is_too_long():
    for height, width in ((7, 9), (1, 300), (800, 801)):
        data = png(RGBA, 16, height, width)  # noise, which no compression makes shorter
        assert len(data) > 8 * height * width
        assert len(data) <= DecodeOptions(max_pixels=height * width).max_bytes
    assert DecodeOptions(max_pixels=10**6).max_bytes < 10 * 10**6
