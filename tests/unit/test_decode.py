"""DecodeResult images match Keras' `load_img`, or fail with a reason."""

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
from fastvgg.imaging.decode import (
    INTERPOLATIONS,
    DecodeOptions,
    Decoder,
    DecodeResult,
    describe_error,
)
from tests.helpers.datasets_on_disk import PHOTOGRAPHS, check_error, stdout_of

# Pillow warns about each of them and decodes it; so does Keras.
pytestmark = pytest.mark.filterwarnings("ignore:Palette images with Transparency:UserWarning")

AMPLE_MEMORY_BYTES = 2**29
CANARY = 77
SIZE = (37, 53)
# Original size, smaller, larger, and smaller along one axis and larger along the other.
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


def decoded(data, shape, decoding=None, *, memory_bytes=AMPLE_MEMORY_BYTES, **settings):
    """Decode an image; check that nothing outside the output is written."""
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
        assert result == DecodeResult(*image.size, False, reason), decoding
    assert actual.tobytes() == expected.tobytes(), decoding


def failure(data, decoding, **settings):
    """Return the reason for which an image cannot be decoded."""
    shape = (*(decoding.size or (7, 9)), 3)
    result, _ = decoded(data, shape, decoding, **settings)
    assert result.failed
    assert len(result.reason.splitlines()) == 1
    return result.reason


@functools.cache
def photograph(height=47, width=61, name="chelsea.png"):
    with Image.open(PHOTOGRAPHS / name) as image:
        return image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)


def with_alpha(image, mode="RGBA"):
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
    """Yield the marker segments of a JPEG up to its first scan: marker, start, end."""
    at = 2
    while True:
        end = at + 2 + int.from_bytes(jpeg[at + 2 : at + 4])
        yield jpeg[at + 1], at, end
        if jpeg[at + 1] == 0xDA:
            return
        at = end


def without_segments(jpeg, *markers):
    """Remove segments from a JPEG."""
    kept = [(at, end) for marker, at, end in segments(jpeg) if marker not in markers]
    scan = list(segments(jpeg))[-1][2]
    return jpeg[:2] + b"".join(jpeg[at:end] for at, end in kept) + jpeg[scan:]


def segment(marker, content):
    return bytes([0xFF, marker]) + (len(content) + 2).to_bytes(2) + content


def with_segment(jpeg, marker, content):
    """Insert a segment before the others."""
    return jpeg[:2] + segment(marker, content) + jpeg[2:]


def with_component_ids(jpeg, names):
    """Change the component IDs of a JPEG."""
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
    """Encode a JPEG and change the transform in its Adobe marker."""
    jpeg = encoded(image.convert(mode), "jpeg", **options)
    return with_byte(jpeg, jpeg.index(b"Adobe") + 11, transform)


# DecodeResult by simplejpeg.
COMMON_JPEGS = {
    **{f"4{kind[0]}{kind[1]}": sampled(f"4{kind}") for kind in ("44", "22", "20", "40", "11")},
    "optimised": saved(optimize=True),
    "progressive": saved(progressive=True),
    "progressive 4:4:4": saved(progressive=True, subsampling=0, quality=93),
    "grey": saved("L"),
    "progressive grey": saved("L", progressive=True),
    "restart rows": saved(restart_marker_rows=1),
    "restart blocks": saved(restart_marker_blocks=3, subsampling=1),
    "no JFIF": lambda image: without_segments(saved()(image), 0xE0),
    "Adobe's own": lambda image: adobe(image, 1, "RGB", keep_rgb=True),
    "unusual component IDs": lambda image: with_component_ids(
        without_segments(saved()(image), 0xE0), (7, 8, 9)
    ),
    "more than one": lambda image: encoded(
        image, "mpo", save_all=True, append_images=[image.rotate(180)]
    ),
    "trailing data": lambda image: saved()(image) + b"\0" * 7 + b"trailer",
    "padded": lambda image: b"\xff\xd8\xff\xff\xff" + saved()(image)[2:],
    "comments": saved(comment=b"\xff\xda\xff\xc2 not a scan", icc_profile=b"no profile" * 7000),
    "broken EXIF": lambda image: with_segment(saved()(image), 0xE1, b"Exif\0\0MM\0*"),
}
# DecodeResult by Pillow.
UNCOMMON_JPEGS = {
    "CMYK": saved("CMYK"),
    "progressive CMYK": saved("CMYK", progressive=True),
    "YCCK": lambda image: adobe(image, 2),
    "CMYK without Adobe's marker": lambda image: without_segments(saved("CMYK")(image), 0xEE),
    "RGB": saved(keep_rgb=True),
    "RGB by its names": lambda image: without_segments(saved(keep_rgb=True)(image), 0xEE),
    "Adobe says RGB": lambda image: adobe(image, 0, "RGB", keep_rgb=True, quality=50),
}
JPEGS = COMMON_JPEGS | UNCOMMON_JPEGS
JPEG_SIZES = ((1, 1), (1, 9), (7, 1), (8, 8), (15, 17), (16, 16), (33, 31), (227, 149))


def unexpected_call(*_arguments, **_settings):
    raise AssertionError("the wrong decoder was used")


@pytest.mark.parametrize("kind", COMMON_JPEGS)
def test_common_jpegs_are_decoded_by_simplejpeg_and_match_keras(monkeypatch, kind):
    for height, width in JPEG_SIZES:
        data = COMMON_JPEGS[kind](photograph(height, width))
        for size in (None, SIZE):
            decoding = DecodeOptions(size)
            expected = as_keras_loads(data, decoding)
            with monkeypatch.context() as patch:
                patch.setattr(decode, "open_image", unexpected_call)
                result, actual = decoded(data, expected.shape, decoding)
            assert result == DecodeResult(width, height, False, "")
            assert actual.tobytes() == expected.tobytes(), (height, width, size)


@pytest.mark.parametrize("kind", UNCOMMON_JPEGS)
def test_uncommon_jpegs_are_decoded_by_pillow_and_match_keras(monkeypatch, kind):
    monkeypatch.setattr(simplejpeg, "decode_jpeg", unexpected_call)
    for height, width in JPEG_SIZES:
        data = UNCOMMON_JPEGS[kind](photograph(height, width))
        for size in (None, SIZE):
            check(data, DecodeOptions(size))


def test_jpeg_samples_have_the_properties_of_their_names():
    image = photograph()
    headers = {kind: simplejpeg.decode_jpeg_header(make(image)) for kind, make in JPEGS.items()}
    assert {height for height, *_ in headers.values()} == {47}
    for kind in ("444", "422", "420", "440", "411"):
        assert headers[kind][2:] == ("YCbCr", kind)
    color_type = {kind: header[2] for kind, header in headers.items()}
    assert {color_type[kind] for kind in UNCOMMON_JPEGS} == {"CMYK", "YCCK", "RGB"}
    assert {color_type[kind] for kind in COMMON_JPEGS} == {"YCbCr", "Gray"}
    for kind, make in JPEGS.items():
        first = {marker for marker, *_ in segments(make(image))} if kind != "padded" else {0xC0}
        assert (0xC2 in first) == ("progressive" in kind)
        assert (0xDD in first) == ("restart" in kind)
    with Image.open(io.BytesIO(COMMON_JPEGS["more than one"](image))) as opened:
        assert (opened.format, opened.n_frames) == ("MPO", 2)


@pytest.mark.parametrize("kind", ["444", "420", "progressive", "grey"])
def test_every_jpeg_quality_matches_keras(kind):
    image = photograph(33, 31)
    for quality in range(1, 101):
        if kind.isdigit():
            data = sampled(kind, quality)(image)
        else:
            options = {"progressive": True} if kind == "progressive" else {}
            data = saved("L" if kind == "grey" else "RGB", quality=quality, **options)(image)
        check(data)


@pytest.mark.parametrize("name", ["rocket.jpg", "hubble_deep_field.jpg", "retina.jpg"])
def test_real_photographs_match_keras(monkeypatch, name):
    data = (PHOTOGRAPHS / name).read_bytes()
    for decoding in (
        DecodeOptions(),
        DecodeOptions((224, 224)),
        DecodeOptions((97, 300), "bilinear"),
    ):
        check(data, decoding)
    monkeypatch.setattr(decode, "open_image", unexpected_call)
    assert not decoded(data, (224, 224, 3), DecodeOptions((224, 224)))[0].failed


# ---------------------------------------------------------------------------- other formats

INTERLACED = (
    *((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4)),
    *((0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)),
)
GRAY, RGB, PALETTE, GRAY_ALPHA, RGBA = 0, 2, 3, 4, 6
CHANNELS = {GRAY: 1, RGB: 3, PALETTE: 1, GRAY_ALPHA: 2, RGBA: 4}
DEPTHS = {GRAY: (1, 2, 4, 8), RGB: (8, 16), PALETTE: (1, 2, 4, 8), GRAY_ALPHA: (8, 16)}


def chunk(name, content):
    return len(content).to_bytes(4) + name + content + zlib.crc32(name + content).to_bytes(4)


def png_rows(samples, depth):
    """Yield the rows of a PNG, each with filter type 0."""
    for row in samples:
        if depth == 16:
            yield b"\0" + row.astype(">u2").tobytes()
        else:
            ones = np.unpackbits(row.astype(np.uint8).reshape(-1, 1), axis=1)
            yield b"\0" + np.packbits(ones[:, 8 - depth :]).tobytes()


def png(
    color_type, depth, height=21, width=19, *, interlaced=False, transparency=b"", samples=None
):
    """Encode noise as a kind of PNG that Pillow may not write."""
    if samples is None:
        shape = height, width, CHANNELS[color_type]
        samples = np.random.default_rng(depth).integers(0, 2**depth, shape)
    passes = INTERLACED if interlaced else [(0, 0, 1, 1)]
    parts = [samples[y::down, x::across] for x, y, across, down in passes]
    rows = b"".join(row for part in parts if part.size for row in png_rows(part, depth))
    size = width.to_bytes(4) + height.to_bytes(4)
    palette = np.random.default_rng(3).integers(0, 256, 3 * 2**depth, np.uint8).tobytes()
    return b"".join(
        [
            b"\x89PNG\r\n\x1a\n",
            chunk(b"IHDR", size + bytes([depth, color_type, 0, 0, interlaced])),
            chunk(b"PLTE", palette) if color_type == PALETTE else b"",
            chunk(b"tRNS", transparency) if transparency else b"",
            chunk(b"IDAT", zlib.compress(rows)),
            chunk(b"IEND", b""),
        ]
    )


def tiff(pixels, **options):
    """Encode a kind of TIFF that Pillow may not write."""
    written = io.BytesIO()
    tifffile.imwrite(written, pixels, **options)
    return written.getvalue()


def pixels_of(image):
    return np.ascontiguousarray(image)


def animated(image, kind, **options):
    others = [image.rotate(90), image.rotate(180)]
    return encoded(image, kind, save_all=True, append_images=others, **options)


OTHER_FORMATS = {
    "1-bit PNG": lambda image: encoded(image.convert("1"), "png"),
    "grey PNG": lambda image: encoded(image.convert("L"), "png"),
    "grey PNG with alpha": lambda image: encoded(with_alpha(image, "LA"), "png"),
    "PNG": lambda image: encoded(image, "png"),
    "PNG with alpha": lambda image: encoded(with_alpha(image), "png"),
    "2-bit palette PNG": lambda image: encoded(image.quantize(4), "png"),
    "4-bit palette PNG": lambda image: encoded(image.quantize(13), "png"),
    "palette PNG": lambda image: encoded(image.quantize(200), "png"),
    "palette PNG with alpha": lambda image: encoded(
        image.quantize(17), "png", transparency=bytes(range(17))
    ),
    "PNG with a transparent color": lambda image: encoded(image, "png", transparency=(1, 2, 3)),
    "lossy WebP": lambda image: encoded(image, "webp", quality=70),
    "lossless WebP": lambda image: encoded(image, "webp", lossless=True),
    "lossy WebP with alpha": lambda image: encoded(with_alpha(image), "webp"),
    "lossless WebP with alpha": lambda image: encoded(with_alpha(image), "webp", lossless=True),
    "animated PNG": lambda image: animated(image, "png"),
    "animated AVIF": lambda image: animated(image, "avif"),
    "animated WebP": lambda image: animated(image, "webp"),
    "animated WebP with alpha": lambda image: animated(with_alpha(image), "webp", lossless=True),
    "BMP": lambda image: encoded(image, "bmp"),
    "grey BMP": lambda image: encoded(image.convert("L"), "bmp"),
    "1-bit BMP": lambda image: encoded(image.convert("1"), "bmp"),
    "palette BMP": lambda image: encoded(image.quantize(17), "bmp"),
    "BMP with alpha": lambda image: encoded(with_alpha(image), "bmp"),
    "GIF": lambda image: encoded(image.quantize(100), "gif", interlace=False),
    "interlaced GIF": lambda image: encoded(image.convert("L"), "gif", interlace=True),
    "animated GIF": lambda image: animated(image, "gif"),
    "GIF with a transparent color": lambda image: encoded(
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
    "TIFF with alpha": lambda image: encoded(with_alpha(image), "tiff"),
    "CMYK TIFF": lambda image: encoded(image.convert("CMYK"), "tiff"),
    "LAB TIFF": lambda image: encoded(image.convert("LAB"), "tiff"),
    "float TIFF": lambda image: encoded(image.convert("L").convert("F"), "tiff"),
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


@pytest.mark.parametrize("kind", OTHER_FORMATS)
def test_every_other_format_matches_keras(kind):
    for height, width in ((47, 61), (1, 9), (7, 1), (1, 1)):
        data = OTHER_FORMATS[kind](photograph(height, width))
        for decoding in (DecodeOptions(), DecodeOptions(SIZE), DecodeOptions((20, 301), "bicubic")):
            check(data, decoding)


@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize(
    ("color_type", "depth"),
    [(color_type, depth) for color_type in DEPTHS for depth in DEPTHS[color_type]],
)
def test_every_png_color_type_and_depth_matches_keras(color_type, depth, interlaced):
    for height, width in ((21, 19), (1, 1), (2, 5)):
        check(png(color_type, depth, height, width, interlaced=interlaced))
    seen = {GRAY: b"\0\1", RGB: b"\0\1\0\2\0\3", PALETTE: b"\0\x80"}.get(color_type, b"")
    check(png(color_type, depth, interlaced=interlaced, transparency=seen), DecodeOptions(SIZE))


def test_interlaced_png_has_the_same_pixels_as_plain_png():
    actual = decoded(png(RGB, 8, interlaced=True), (21, 19, 3))[1]
    expected = np.random.default_rng(8).integers(0, 2**8, (21, 19, 3))
    assert (actual == expected).all()


def test_first_frame_of_an_animation_is_decoded():
    for kind in ("gif", "webp"):
        first = animated(photograph(), kind, **({"lossless": True} if kind == "webp" else {}))
        with Image.open(io.BytesIO(first)) as image:
            assert image.n_frames == 3
        actual = decoded(first, (47, 61, 3))[1].astype(int)
        assert abs(actual - pixels_of(photograph())).mean() < (10 if kind == "gif" else 1e-9)


def test_unsupported_pillow_formats_are_rejected():
    # Pillow hands PostScript to Ghostscript where that is installed.
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 7\n%%EndComments\n(%stderr) print\n"
    others = [encoded(photograph(), kind) for kind in ("tga", "pcx", "ico", "eps")]
    for data in (script, *others, b"", b"\xff", b"this is not an image"):
        reason = failure(data, DecodeOptions(SIZE))
        assert reason.endswith("not an image in a supported format")
        assert Decoder(DecodeOptions(), memory_bytes=AMPLE_MEMORY_BYTES).size(data) == reason


# --------------------------------------------------------------------------------- resizing

RESIZED = {
    "a JPEG": COMMON_JPEGS["420"],
    "a progressive JPEG": COMMON_JPEGS["progressive"],
    "a grey JPEG": COMMON_JPEGS["grey"],
    "a CMYK JPEG": UNCOMMON_JPEGS["CMYK"],
    "a PNG with alpha": OTHER_FORMATS["PNG with alpha"],
    "a palette PNG": OTHER_FORMATS["palette PNG"],
    "a 1-bit TIFF": OTHER_FORMATS["1-bit TIFF"],
}


@functools.cache
def resized_files():
    sizes = ((227, 149), (15, 17), (1, 9), (37, 53))
    return [make(photograph(*size)) for make in RESIZED.values() for size in sizes]


@pytest.mark.parametrize("keep_aspect_ratio", [False, True])
@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_every_resize_option_matches_keras(backend, interpolation, keep_aspect_ratio):
    gather = resize.gather_function(backend)
    for data in resized_files():
        for size in SIZES[1:]:
            decoding = DecodeOptions(size, interpolation, keep_aspect_ratio)
            try:
                as_keras_loads(data, decoding)
            except ValueError:  # the crop of a line to this shape is empty
                assert "empty" in failure(data, decoding, gather=gather)
            else:
                check(data, decoding, gather=gather)


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_full_photographs_match_keras_in_every_interpolation(interpolation):
    for name in ("astronaut.png", "chelsea.png", "rocket.jpg", "camera.png"):
        data = (PHOTOGRAPHS / name).read_bytes()
        for size in ((225, 223), (701, 11)):
            check(data, DecodeOptions(size, interpolation))


sides = st.integers(1, 60)


@given(sides, sides, st.tuples(sides, sides), st.sampled_from([*INTERPOLATIONS]), st.booleans())
def test_any_size_is_cropped_and_resized_like_keras(height, width, size, how, keep):
    decoding = DecodeOptions(size, how, keep)
    for make in (COMMON_JPEGS["444"], OTHER_FORMATS["PNG"]):
        data = make(photograph(height, width))
        try:
            as_keras_loads(data, decoding)
        except ValueError:
            assert failure(data, decoding)
        else:
            check(data, decoding)


def test_interpolations_are_those_of_keras():
    with pytest.raises(ValueError, match="Supported") as caught:
        as_keras_loads(
            COMMON_JPEGS["444"](photograph()), unchecked(size=SIZE, interpolation="lanczos3")
        )
    named = re.findall(r"\w+", str(caught.value).partition(" are ")[2])
    assert sorted(named) == sorted(INTERPOLATIONS)


def unchecked(**settings):
    """Build options that `DecodeOptions` would reject."""
    decoding = DecodeOptions()
    for name, value in settings.items():
        object.__setattr__(decoding, name, value)
    return decoding


@pytest.mark.parametrize("make", [COMMON_JPEGS["444"], OTHER_FORMATS["PNG"]], ids=["JPEG", "PNG"])
def test_image_of_a_different_size_is_a_failure(make):
    result, _ = decoded(make(photograph(11, 13)), (7, 9, 3))
    assert result == DecodeResult(13, 11, True, "the image is 11x13, expected 7x9")


def test_size_returns_height_and_width_for_every_format():
    decoder = Decoder(DecodeOptions(), memory_bytes=AMPLE_MEMORY_BYTES)
    for make in (*JPEGS.values(), *OTHER_FORMATS.values()):
        assert decoder.size(make(photograph(7, 13))) == (7, 13)


def test_concurrent_decoding_matches_keras():
    decoding = DecodeOptions(SIZE)
    kinds = [*COMMON_JPEGS.values(), *UNCOMMON_JPEGS.values(), *OTHER_FORMATS.values()] * 3
    files = [make(photograph()) for make in kinds]
    expected = [as_keras_loads(data, decoding).tobytes() for data in files]
    # Some fit into a thread's share of the memory, and some are decoded one at a time.
    decoder = Decoder(decoding, memory_bytes=400_000, threads=4)

    def read(data):
        out = np.empty((*SIZE, 3), np.uint8)
        return decoder.decode(data, out), out

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(read, files))
    assert [result.reason for result, _ in results] == [""] * len(files)
    assert [out.tobytes() for _, out in results] == expected


# ------------------------------------------------------------------------------------- EXIF

ORIENTED_FORMATS = {
    "jpeg": {},
    "jpeg, grey": {},
    "jpeg, progressive": {"progressive": True},
    "png": {},
    "webp": {"lossless": True},
    "tiff": {},
    "tiff, packed": {"compression": "tiff_lzw"},
    "mpo": {"save_all": True},
}


def oriented(kind, orientation, image=None):
    """Encode an image with an EXIF orientation."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = image or photograph(25, 40)
    image = image.convert("L") if "grey" in kind else image
    return encoded(image, kind.partition(",")[0], exif=exif, **ORIENTED_FORMATS[kind])


def as_a_viewer_loads(data, decoding):
    """The oracle: Pillow applies the EXIF orientation, then Keras loads the image."""
    with Image.open(io.BytesIO(data)) as image:
        upright = ImageOps.exif_transpose(image).convert("RGB")
    return as_keras_loads(encoded(upright, "png"), decoding)


ORIENTATIONS = (*range(10), 65535)


@pytest.mark.parametrize("kind", ORIENTED_FORMATS)
def test_exif_orientation_is_ignored_like_keras_unless_requested(kind):
    differ = set()
    for orientation in range(1, 9) if "tiff" in kind else ORIENTATIONS:
        data = oriented(kind, orientation)
        for decoding in (
            *(DecodeOptions(), DecodeOptions(SIZE), DecodeOptions((11, 29), "bilinear")),
            DecodeOptions((31, 17), keep_aspect_ratio=True),
        ):
            check(data, decoding)
            requested = dataclasses.replace(decoding, exif=True)
            expected = as_a_viewer_loads(data, requested)
            result, actual = decoded(data, expected.shape, requested)
            assert not result.failed
            assert result.reason == ""
            assert actual.tobytes() == expected.tobytes(), (orientation, requested)
            if actual.tobytes() != decoded(data, expected.shape, decoding)[1].tobytes():
                differ.add(orientation)
    # Pillow, and hence Keras, applies the orientation of every TIFF.
    assert differ == (set() if "tiff" in kind else set(range(2, 9)))


@pytest.mark.parametrize("kind", ORIENTED_FORMATS)
def test_reported_size_matches_the_decoded_size(kind):
    for orientation in range(1, 9):
        data = oriented(kind, orientation)
        for exif in (False, True):
            decoding = DecodeOptions(exif=exif)
            load = as_a_viewer_loads if exif else as_keras_loads
            size = Decoder(decoding, memory_bytes=AMPLE_MEMORY_BYTES).size(data)
            assert size == load(data, decoding).shape[:2], (orientation, exif)


def test_each_exif_orientation_is_applied():
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
        data = oriented("png", orientation, photograph(5, 8))
        result, actual = decoded(data, upright.shape, DecodeOptions(exif=True))
        assert result == DecodeResult(8, 5, False, "")
        assert (actual == upright).all()


def test_upright_jpeg_is_decoded_by_simplejpeg_with_exif_enabled(monkeypatch):
    monkeypatch.setattr(simplejpeg, "decode_jpeg", unexpected_call)
    decoding = DecodeOptions(SIZE, exif=True)
    for data in (oriented("jpeg", 1), COMMON_JPEGS["444"](photograph())):
        with pytest.raises(AssertionError, match="the wrong decoder"):
            decoded(data, (*SIZE, 3), decoding)
    assert not decoded(oriented("jpeg", 6), (*SIZE, 3), decoding)[0].failed


def test_damaged_exif_is_decoded_like_pillow_or_is_a_failure():
    random = np.random.default_rng(1)
    decoding = DecodeOptions(SIZE, exif=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns about some damage and continues
        for number in range(120):
            kind = ["jpeg", "png", "webp", "mpo"][number % 4]
            data = bytearray(oriented(kind, 6))
            # Damage the EXIF entries; a PNG has a checksum after them.
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

ALL_16_BIT_VALUES = np.arange(65536, dtype=np.uint16).reshape(256, 256)
GRAY16_REASON = "16-bit grayscale, and scaling to 8 bits is off: Keras would clip it to white"
GRAY16_FILES = {
    "PNG": encoded(Image.fromarray(ALL_16_BIT_VALUES), "png"),
    "interlaced PNG": png(
        *(GRAY, 16, 256, 256), interlaced=True, samples=ALL_16_BIT_VALUES[:, :, np.newaxis]
    ),
    "TIFF": encoded(Image.fromarray(ALL_16_BIT_VALUES), "tiff"),
    "packed TIFF": encoded(Image.fromarray(ALL_16_BIT_VALUES), "tiff", compression="tiff_lzw"),
    "big-endian TIFF": tiff(ALL_16_BIT_VALUES, byteorder=">"),
}


@pytest.mark.parametrize("kind", GRAY16_FILES)
def test_16_bit_grayscale_is_rejected_or_scaled_for_every_value(kind):
    for size in (None, (256, 256), SIZE):
        result, _ = decoded(GRAY16_FILES[kind], (*(size or (256, 256)), 3), DecodeOptions(size))
        assert result == DecodeResult(256, 256, True, GRAY16_REASON)
    # 65535 is 257 * 255, so there are no ties.
    expected = np.rint(ALL_16_BIT_VALUES * 255.0 / 65535.0)
    result, actual = decoded(GRAY16_FILES[kind], (256, 256, 3), DecodeOptions(scale_to_uint8=True))
    assert result == DecodeResult(256, 256, False, "")
    assert (actual == expected[:, :, np.newaxis]).all()


def test_tiff_byte_orders_have_different_pillow_modes():
    modes = set()
    for kind in ("TIFF", "big-endian TIFF"):
        with Image.open(io.BytesIO(GRAY16_FILES[kind])) as image:
            modes.add(image.mode)
    assert modes == {"I;16", "I;16B"}


def test_scaled_grayscale_is_resized_and_rotated_like_8_bit_images():
    samples = np.random.default_rng(1).integers(0, 65536, (25, 40), np.uint16)
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(Image.fromarray(samples), "png", exif=exif)
    eight = np.rint(samples / 257).astype(np.uint8)
    for decoding, pixels in (
        (DecodeOptions(SIZE, "bicubic", scale_to_uint8=True), eight),
        (DecodeOptions(SIZE, keep_aspect_ratio=True, scale_to_uint8=True), eight),
        (DecodeOptions(SIZE, exif=True, scale_to_uint8=True), np.rot90(eight, -1)),
    ):
        expected = as_keras_loads(encoded(Image.fromarray(pixels.copy()), "png"), decoding)
        result, actual = decoded(data, (*SIZE, 3), decoding)
        assert result == DecodeResult(40, 25, False, "")
        assert actual.tobytes() == expected.tobytes()


BOTH = [DecodeOptions(scale_to_uint8=False), DecodeOptions(scale_to_uint8=True)]


def grayscale_tiff(numbers, dtype, **options):
    """Encode numbers as a grayscale TIFF of 7x9, repeating them."""
    return tiff(np.resize(np.array(numbers, dtype), (7, 9)), photometric="minisblack", **options)


@pytest.mark.parametrize("numbers", [[0], [0, 1], [0, 255], range(256)], ids=str)
@pytest.mark.parametrize("dtype", ["int16", ">i2", "int32", ">i4", "uint32"])
def test_integers_that_are_all_bytes_match_keras_whether_scaled_or_not(dtype, numbers):
    for compression in (None, "zlib"):
        for decoding in BOTH:
            check(grayscale_tiff(numbers, dtype, compression=compression), decoding)


@pytest.mark.parametrize("dtype", ["int16", "int32"])
def test_integers_of_more_than_8_bits_are_rejected_or_scaled_as_16_bits(dtype):
    data = grayscale_tiff([0, 256, 32767], dtype)
    assert failure(data, BOTH[0]) == GRAY16_REASON
    _, actual = decoded(data, (7, 9, 3), BOTH[1])
    assert np.unique(actual).tolist() == [0, 1, 127]


@pytest.mark.parametrize("high", [255, 4095, 65535])
def test_16_bit_pnm_is_rejected_or_scaled_although_pillow_opens_it_as_integers(high):
    samples = np.resize(np.array([0, high]), (7, 9))
    data = b"P5 9 7 65535\n" + samples.astype(">u2").tobytes()
    assert failure(data, BOTH[0]) == GRAY16_REASON
    _, actual = decoded(data, (7, 9, 3), BOTH[1])
    assert (actual == np.rint(samples / 257)[:, :, np.newaxis]).all()


@pytest.mark.parametrize(
    ("dtype", "numbers"), [("int16", [-1, 5]), ("int32", [0, 65536]), ("int32", [-70_000, 70_000])]
)
def test_integers_outside_of_16_bits_are_rejected_with_their_range(dtype, numbers):
    for decoding in BOTH:
        assert failure(grayscale_tiff(numbers, dtype), decoding) == (
            f"grayscale with integers from {numbers[0]} to {numbers[1]}, outside of 16 bits"
        )


def test_16_bit_file_is_scaled_although_all_of_its_numbers_are_bytes():
    # A dark image among others; and a retry that enables scaling must not change good rows.
    data = grayscale_tiff([0, 200], "uint16")
    assert failure(data, BOTH[0]) == GRAY16_REASON
    assert np.unique(decoded(data, (7, 9, 3), BOTH[1])[1]).tolist() == [0, 1]


@pytest.mark.parametrize("byteorder", ["<", ">"])
def test_floats_from_0_to_1_are_rejected_or_scaled_half_to_even(byteorder):
    numbers = [0.0, 0.25, 0.5 / 255, 1.5 / 255, 2.5 / 255, 1.0]
    data = grayscale_tiff(numbers, "float32", byteorder=byteorder)
    assert failure(data, BOTH[0]) == (
        "floating-point grayscale with numbers from 0 to 1, and scaling to 8 bits is off: "
        "Keras would make it black"
    )
    result, actual = decoded(data, (7, 9, 3), BOTH[1])
    assert result == DecodeResult(9, 7, False, "")
    expected = np.rint(np.resize(np.array(numbers, np.float32), (7, 9)) * np.float32(255))
    assert (actual == expected[:, :, np.newaxis]).all()
    assert actual.max() == 255


@pytest.mark.parametrize("numbers", [[0.0], [-0.0, 2.0], [0.0, 255.0], range(256)], ids=str)
def test_floats_that_are_all_bytes_match_keras_whether_scaled_or_not(numbers):
    for decoding in BOTH:
        check(grayscale_tiff(numbers, "float32"), decoding)


def test_black_and_white_floats_are_scaled_only_on_request():
    data = grayscale_tiff([0.0, 1.0], "float32")
    assert "from 0 to 1, and scaling" in failure(data, BOTH[0])
    assert np.unique(decoded(data, (7, 9, 3), BOTH[1])[1]).tolist() == [0, 255]


@pytest.mark.parametrize(
    ("numbers", "reason"),
    [
        ([0.5, 77.0], "from 0.5 to 77: neither 0 to 1, nor whole numbers from 0 to 255"),
        ([-1.0, 1.0], "from -1 to 1: neither 0 to 1, nor whole numbers from 0 to 255"),
        ([0.0, 256.0], "from 0 to 256: neither 0 to 1, nor whole numbers from 0 to 255"),
        ([0.0, np.inf], "from 0 to inf: neither 0 to 1, nor whole numbers from 0 to 255"),
        ([0.0, np.nan, 1.0], "floating-point grayscale with NaN"),
    ],
)
def test_other_floats_are_rejected_with_what_was_found(numbers, reason):
    for decoding in BOTH:
        assert failure(grayscale_tiff(numbers, "float32"), decoding).endswith(reason)


def twelve_bit_tiff():
    """Encode zeros as an uncompressed TIFF of 7x9 with 12 bits."""
    strip = bytes(7 * 14)
    tags = (
        (256, 9),
        (257, 7),
        (258, 12),
        (259, 1),
        (262, 1),
        (273, 8),
        (277, 1),
        (279, len(strip)),
    )
    entries = b"".join(struct.pack("<HHIHH", tag, 3, 1, value, 0) for tag, value in tags)
    directory = struct.pack("<H", len(tags)) + entries + bytes(4)
    return b"II*\0" + struct.pack("<I", 8 + len(strip)) + strip + directory


MISREAD_TIFFS = {
    "16-bit grayscale in which 0 is white, which Pillow inverts": tiff(
        np.zeros((7, 9), np.uint16), photometric="miniswhite"
    ),
    "32-bit grayscale in which 0 is white, which Pillow inverts": tiff(
        np.zeros((7, 9), np.float32), photometric="miniswhite"
    ),
    "12-bit grayscale, which is not supported": twelve_bit_tiff(),
    "16-bit planes without compression, which Pillow scrambles": tiff(
        np.zeros((3, 7, 9), np.uint16), photometric="rgb", planarconfig="separate"
    ),
    "8-bit grayscale with negative numbers": grayscale_tiff([-1, 5], "int8"),
}


@pytest.mark.parametrize("reason", MISREAD_TIFFS)
def test_tiff_that_pillow_misreads_is_rejected(reason):
    with Image.open(io.BytesIO(MISREAD_TIFFS[reason])) as image:
        image.convert("RGB")  # without an error
    for decoding in BOTH:
        assert failure(MISREAD_TIFFS[reason], decoding) == reason


def test_tiff_whose_signed_bytes_are_not_negative_matches_keras():
    check(grayscale_tiff(range(128), "int8"))


def test_compressed_planes_of_16_bits_match_keras():
    planes = np.random.default_rng(3).integers(0, 65536, (3, 7, 9), np.uint16)
    data = tiff(planes, photometric="rgb", planarconfig="separate", compression="zlib")
    check(data)
    assert (decoded(data, (7, 9, 3))[1] == np.moveaxis(planes >> 8, 0, -1)).all()


def test_16_bit_color_matches_keras_which_keeps_the_upper_bytes():
    for data in (png(RGB, 16), png(GRAY_ALPHA, 16), png(RGBA, 16)):
        for scale_to_uint8 in (False, True):
            check(data, DecodeOptions(SIZE, scale_to_uint8=scale_to_uint8))
    samples = np.random.default_rng(16).integers(0, 2**16, (21, 19, 3))
    assert (decoded(png(RGB, 16), (21, 19, 3))[1] == samples >> 8).all()


# -------------------------------------------------------------------------------- fast JPEG


def decoded_size(data, decoding):
    """Return the size to which a JPEG is decoded before pixels are gathered."""
    shapes = []

    def gather(pixels, index, out):
        shapes.append(pixels.shape)
        resize.gather(pixels, index, out)

    result, _ = decoded(data, (*decoding.size, 3), decoding, gather=gather)
    assert not result.failed
    return shapes[0][:2] if shapes else decoding.size  # gather is not called if the sizes are equal


@pytest.mark.parametrize("name", ["rocket.jpg", "retina.jpg"])
def test_fast_jpeg_is_close_to_the_exact_result_for_large_photographs(name):
    data = (PHOTOGRAPHS / name).read_bytes()
    for size in ((96, 128), (31, 53)):
        for interpolation, most in (("bilinear", 2), ("nearest", 12)):
            default, fast = (
                decoded(data, (*size, 3), DecodeOptions(size, interpolation, fast_jpeg=fast))
                for fast in (False, True)
            )
            assert default[0] == fast[0]
            assert not fast[0].failed
            assert default[1].tobytes() != fast[1].tobytes()
            assert abs(default[1].astype(int) - fast[1]).mean() < most


def test_fast_jpeg_uses_the_smallest_sufficient_scale():
    data = sampled("420")(photograph(321, 483))
    sizes = [(321, 483), (161, 242), (121, 182), (81, 121), (41, 61)]
    for target in (*((161, 242), (160, 200), (100, 242), (121, 182), (81, 122)), (81, 121), (9, 7)):
        fitting = [size for size in sizes if size[0] >= target[0] and size[1] >= target[1]]
        assert decoded_size(data, DecodeOptions(target, fast_jpeg=True)) == fitting[-1]


@pytest.mark.parametrize("keep_aspect_ratio", [False, True])
def test_fast_jpeg_never_decodes_below_the_target_size(keep_aspect_ratio):
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
        high, wide = decoded_size(data, decoding)
        parts = []
        for sides in ((height, width), (high, wide)):
            part = list(sides)
            if keep_aspect_ratio:
                part[0] = min(sides[0], sides[1] * size[0] // size[1])
                part[1] = min(sides[1], sides[0] * size[1] // size[0])
            parts.append(part)
        for before, with_junk_after, target in zip(*parts, size, strict=True):
            assert with_junk_after >= min(before, target), (height, width, size, high, wide)
        if (high, wide) != (height, width):
            smaller += 1
            assert high <= -(-height // 2)
            assert wide <= -(-width // 2)
    assert smaller > 20


def test_fast_jpeg_has_no_effect_unless_the_image_shrinks_by_half():
    for make in (COMMON_JPEGS["420"], COMMON_JPEGS["444"]):
        data = make(photograph(60, 80))
        for size in ((60, 80), (31, 40), (30, 41), (99, 99)):
            check(data, DecodeOptions(size, fast_jpeg=True))


def test_fast_jpeg_has_no_effect_on_other_formats_and_uncommon_jpegs():
    for make in (
        *UNCOMMON_JPEGS.values(),
        OTHER_FORMATS["PNG"],
        OTHER_FORMATS["lossy WebP"],
        OTHER_FORMATS["JPEG TIFF"],
    ):
        check(make(photograph(90, 120)), DecodeOptions((9, 7), fast_jpeg=True))


# ----------------------------------------------------------------------------------- limits


def with_claimed_size(jpeg, height, width):
    """Change the size in the header of a JPEG."""
    changed = bytearray(jpeg)
    at = next(at for marker, at, _ in segments(jpeg) if marker in (0xC0, 0xC2))
    changed[at + 5 : at + 9] = height.to_bytes(2) + width.to_bytes(2)
    return bytes(changed)


LIMITED = {
    "JPEG": COMMON_JPEGS["420"],
    "progressive JPEG": COMMON_JPEGS["progressive"],
    "CMYK JPEG": UNCOMMON_JPEGS["CMYK"],
    **{kind: OTHER_FORMATS[kind] for kind in ("PNG", "GIF", "lossy WebP", "BMP", "TIFF")},
}


@pytest.mark.parametrize("kind", LIMITED)
def test_image_above_max_pixels_is_rejected(kind):
    data = LIMITED[kind](photograph(7, 9))
    check(data, DecodeOptions(SIZE, max_pixels=63))
    result, _ = decoded(data, (*SIZE, 3), DecodeOptions(SIZE, max_pixels=62))
    assert result == DecodeResult(9, 7, True, "the image has 63 pixels, more than the limit of 62")


def test_image_above_max_pixels_is_rejected_before_decoding(monkeypatch):
    jpegs = [COMMON_JPEGS[kind](photograph(7, 9)) for kind in ("444", "progressive", "grey")]
    monkeypatch.setattr(simplejpeg, "decode_jpeg", unexpected_call)
    monkeypatch.setattr(Image.Image, "convert", unexpected_call)
    for jpeg in jpegs:
        result, _ = decoded(
            with_claimed_size(jpeg, 65_000, 65_001), (*SIZE, 3), DecodeOptions(SIZE)
        )
        assert result.failed
        assert result.reason == "the image has 4225065000 pixels, more than the limit of 89478485"
    zeros = chunk(b"IDAT", zlib.compress(bytes(2**20)))
    for height, width in ((40_001, 30_001), (9_000, 8_999)):
        head = width.to_bytes(4) + height.to_bytes(4) + bytes([1, GRAY, 0, 0, 0])
        bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + zeros + chunk(b"IEND", b"")
        reason = failure(bomb, DecodeOptions(SIZE, max_pixels=10_000_000))
        assert "pixels" in reason


BOMB_SCRIPT = """
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


def test_decompression_bomb_is_rejected_without_allocating_memory():
    memory, pixels = stdout_of(BOMB_SCRIPT).splitlines()
    assert "bytes of memory" in memory
    assert pixels == "the image has 80991000 pixels, more than the limit of 80000000"


def memory_needed(data, decoding, memory_bytes=2):
    """Return the memory that the error for insufficient memory reports."""
    reason = failure(data, decoding, memory_bytes=memory_bytes)
    needed, there = map(int, re.findall(r"[0-9]+", reason))
    assert reason == (f"decoding takes {needed} bytes of memory, but only {there} are available")
    assert there == memory_bytes // 2
    # The metadata count before the image is opened, and its pixels after that.
    result, _ = decoded(data, (*decoding.size, 3), decoding, memory_bytes=2 * needed)
    return memory_needed(data, decoding, 2 * needed) if result.failed else needed


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear"])
@pytest.mark.parametrize("kind", LIMITED)
def test_image_that_needs_more_than_half_the_memory_is_rejected(kind, interpolation):
    decoding = DecodeOptions(SIZE, interpolation)
    data = LIMITED[kind](photograph())
    needed = memory_needed(data, decoding)
    assert needed >= len(data) + 47 * 61 * 3
    for threads in (1, 2, 7):
        check(data, decoding, memory_bytes=2 * needed, threads=threads)
    assert memory_needed(data, decoding, 2 * needed - 2) == needed


def test_progressive_jpeg_memory_includes_its_coefficients():
    decoding = DecodeOptions(SIZE)
    baseline, progressive = (
        memory_needed(data, decoding) - len(data)
        for data in (COMMON_JPEGS["420"](photograph()), COMMON_JPEGS["progressive"](photograph()))
    )
    assert baseline == 47 * 61 * 3
    assert progressive >= baseline + 2 * 47 * 61 * 3


class RecordingLock:
    """A lock that records every acquisition attempt."""

    def __init__(self):
        self._lock = threading.RLock()
        self.seen = queue.SimpleQueue()

    def __enter__(self):
        self.seen.put("waits for the lock")
        self._lock.acquire()

    def __exit__(self, *_error):
        self._lock.release()


def decoder_with_recording_lock(decoding, **settings):
    decoder = Decoder(decoding, **settings)
    decoder._large_image_lock = RecordingLock()
    return decoder, decoder._large_image_lock.seen


@pytest.mark.parametrize("kind", LIMITED)
def test_image_larger_than_a_thread_share_takes_the_large_image_lock(kind):
    decoding = DecodeOptions(SIZE, "bilinear")
    data = LIMITED[kind](photograph())
    needed = memory_needed(data, decoding)
    for threads in (1, 2, 7):
        out = np.empty((*SIZE, 3), np.uint8)
        for share, waits in ((needed, False), (needed - 1, True)):
            # Half of the memory is reserved for large images.
            memory_bytes = 2 * threads * share
            if waits:
                memory_bytes = max(memory_bytes, 2 * needed)
                if threads == 1:  # the share equals the half for large images
                    continue
            decoder, seen = decoder_with_recording_lock(
                decoding, memory_bytes=memory_bytes, threads=threads
            )
            result = decoder.decode(data, out)
            assert not result.failed, result
            assert seen.empty() != waits


def test_large_images_are_decoded_one_at_a_time():
    large, small = (
        COMMON_JPEGS["420"](photograph(227, 149)),
        COMMON_JPEGS["420"](photograph(33, 31)),
    )
    others, order = [], []

    def decode_it(data):
        return decoder.decode(data, np.empty((*SIZE, 3), np.uint8)).reason

    def gather(pixels, index, out):
        if len(pixels) == 227:
            seen.put("gathers")
            if not others:
                assert decode_it(small) == ""  # a small image does not wait
                others.append(pool.submit(decode_it, large))
                order.extend(seen.get(timeout=20) for _ in range(3))
        resize.gather(pixels, index, out)

    memory_bytes = 2 * memory_needed(large, DecodeOptions(SIZE))
    decoder, seen = decoder_with_recording_lock(
        DecodeOptions(SIZE), memory_bytes=memory_bytes, threads=4, gather=gather
    )
    with ThreadPoolExecutor(1) as pool:
        assert decode_it(large) == ""
        assert others[0].result() == ""
    assert order == ["waits for the lock", "gathers", "waits for the lock"]
    assert seen.get_nowait() == "gathers"
    assert seen.empty()


@pytest.mark.parametrize("kind", LIMITED)
def test_failed_large_image_releases_the_lock(kind):
    data = LIMITED[kind](photograph())
    needed = memory_needed(data, DecodeOptions(SIZE))
    decoder = Decoder(DecodeOptions(SIZE), memory_bytes=2 * needed, threads=3)
    out = np.empty((*SIZE, 3), np.uint8)
    for damaged in (data[: len(data) // 2], data):
        result = decoder.decode(damaged, out)
    assert not result.failed


PEAK_MEMORY_SCRIPT = """
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
for kind in ("jpeg", "png", "webp", "avif", "jpeg2000", "ppm"):  # what is loaded once
    written = io.BytesIO()
    Image.new("RGB", (9, 9)).save(written, kind)
    Decoder(DecodeOptions((5, 7)), memory_bytes=2**30).decode(written.getvalue(), small)
data = pathlib.Path(sys.argv[1]).read_bytes()
needed = 2
while reason := Decoder(decoding, memory_bytes=2 * needed).decode(data, out).reason:
    needed = int(re.search("[0-9]+", reason)[0])
decoder = Decoder(decoding, memory_bytes=2**30)
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")
before = field("VmRSS")
assert not decoder.decode(data, out).failed
print(needed, field("VmHWM") - before + len(data))
"""


@functools.cache
def large_file(kind):
    image = photograph(1_501, 2_003)
    if kind == "WebP":
        return encoded(image, "webp", method=0)
    if kind == "AVIF":
        return encoded(image, "avif", speed=10, subsampling="4:4:4")
    if "JPEG 2000" in kind:
        return encoded(with_alpha(image) if "alpha" in kind else image, "jpeg2000")
    if "PNG" in kind:
        image = with_alpha(image) if "alpha" in kind else image
        return encoded(image, "png", compress_level=1)
    return encoded(image, "jpeg", progressive=kind == "progressive JPEG")


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux only")
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
        ("AVIF", "nearest"),
        ("JPEG 2000 with alpha", "nearest"),
    ],
)
def test_decoding_uses_no_more_memory_than_estimated(tmp_path, kind, how):
    (tmp_path / "image").write_bytes(large_file(kind))
    counted, used = map(int, stdout_of(PEAK_MEMORY_SCRIPT, tmp_path / "image", how).split())
    assert used < counted + 3 * 2**20  # overhead of Python and of page granularity


# ----------------------------------------------------------------------------------- damage

DAMAGED = {
    "JPEG": COMMON_JPEGS["444"],
    "subsampled JPEG": COMMON_JPEGS["420"],
    "progressive JPEG": COMMON_JPEGS["progressive"],
    "grey JPEG": COMMON_JPEGS["grey"],
    "restart JPEG": COMMON_JPEGS["restart blocks"],
    "CMYK JPEG": UNCOMMON_JPEGS["CMYK"],
    "MPO": COMMON_JPEGS["more than one"],
    **{
        kind: OTHER_FORMATS[kind]
        for kind in ("PNG", "palette PNG with alpha", "GIF", "animated GIF")
    },
    "interlaced PNG": lambda image: png(RGB, 8, interlaced=True),
    **{
        kind: OTHER_FORMATS[kind]
        for kind in ("lossy WebP", "lossless WebP with alpha", "animated WebP")
    },
    **{
        kind: OTHER_FORMATS[kind]
        for kind in ("BMP", "palette BMP", "TIFF", "LZW TIFF", "JPEG TIFF")
    },
}


def check_damaged(data, decoding):
    """Compare a possibly undecodable file with Keras; return whether it is decodable."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns about some damage and goes on
        try:
            expected = as_keras_loads(data, decoding)
        except Exception:  # noqa: BLE001  # whatever Pillow raises
            assert failure(data, decoding)
            return False
        result, actual = decoded(data, expected.shape, decoding)
        if "grayscale" in result.reason:
            assert result.failed
        else:
            assert not result.failed
            assert actual.tobytes() == expected.tobytes()
        return True


@pytest.mark.parametrize("kind", DAMAGED)
def test_truncated_file_fails_exactly_where_keras_fails(kind):
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
def test_damaged_file_is_a_failure_with_a_reason_or_matches_keras(kind):
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
            size = Decoder(DecodeOptions(), memory_bytes=AMPLE_MEMORY_BYTES).size(bytes(damaged))
        if isinstance(size, str) or size[0] * size[1] < 10**6:
            outcomes.add(check_damaged(bytes(damaged), DecodeOptions(SIZE)))
    assert False in outcomes


LIBJPEG_WARNINGS = {
    "junk before a marker": (
        lambda jpeg: with_junk_after(jpeg, 0xE0, b"abc"),
        "3 extraneous bytes before",
    ),
    "a stuffed byte": (lambda jpeg: jpeg[:2] + b"\xff\x00" + jpeg[2:], "extraneous bytes before"),
    "a lost restart": (lambda jpeg: jpeg.replace(b"\xff\xd3", b"\xff\xd5", 1), "found marker 0xd5"),
    "a scan cut short": (
        lambda jpeg: jpeg[: len(jpeg) * 2 // 3] + b"\xff\xd9",
        "premature end of data segment",
    ),
}


def with_junk_after(jpeg, marker, junk):
    end = next(end for found, _, end in segments(jpeg) if found == marker)
    return jpeg[:end] + junk + jpeg[end:]


@pytest.mark.parametrize("kind", LIBJPEG_WARNINGS)
def test_libjpeg_warnings_are_reported_and_pixels_match_keras(kind):
    damage, warning = LIBJPEG_WARNINGS[kind]
    data = damage(COMMON_JPEGS["restart blocks"](photograph()))
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


def test_pillow_warning_is_a_failure_only_when_warnings_are_errors():
    data = OTHER_FORMATS["palette PNG with alpha"](photograph())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "Transparency" in failure(data, DecodeOptions(SIZE))
    with pytest.warns(UserWarning, match="Transparency"):
        assert not decoded(data, (*SIZE, 3), DecodeOptions(SIZE))[0].failed


def test_damaged_avif_is_a_failure_with_a_reason():
    data = bytearray(encoded(photograph(), "avif", speed=10))
    at = data.index(b"mdat") + 4
    data[at : at + 4] = bytes(4)
    with pytest.raises(RuntimeError):
        as_keras_loads(bytes(data))
    assert "Failed to decode" in failure(bytes(data), DecodeOptions(SIZE))


def test_decoding_errors_cover_everything_pillow_raises():
    for error in (
        *(Image.UnidentifiedImageError, Image.DecompressionBombError, struct.error, zlib.error),
        *(OSError, SyntaxError, ValueError, TypeError, IndexError, KeyError, EOFError),
        *(OverflowError, RuntimeError, UserWarning, Image.DecompressionBombWarning),
    ):
        assert issubclass(error, decode.DECODING_ERRORS)
    assert not issubclass(MemoryError, decode.DECODING_ERRORS)
    assert not issubclass(KeyboardInterrupt, decode.DECODING_ERRORS)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (FileNotFoundError(2, "No such file or directory", "a.png"), "No such file or directory"),
        (OSError("image file is truncated"), "image file is truncated"),
        (SyntaxError("broken\n  PNG\tfile"), "broken PNG file"),
        (EOFError(), "EOFError"),
        (ValueError(" \n"), "ValueError"),
    ],
)
def test_failure_reason_is_one_nonempty_line(error, reason):
    assert describe_error(error).startswith(reason)
    assert "\n" not in describe_error(error)


# --------------------------------------------------------------------------------- settings

NON_DEFAULT = DecodeOptions((37, 53), "bicubic", True, True, True, True, 12_345)


def test_decode_options_round_trip_through_json_with_extra_keys():
    for decoding in (DecodeOptions(), NON_DEFAULT):
        fields = json.loads(json.dumps({"path": "photos", **decoding.to_dict(), "kind": "images"}))
        assert DecodeOptions.from_dict(fields) == decoding
    assert DecodeOptions.from_dict(json.loads(json.dumps(NON_DEFAULT.to_dict()))).size == (37, 53)


def test_to_dict_contains_every_option():
    default, non_default = DecodeOptions().to_dict(), NON_DEFAULT.to_dict()
    assert {name for name in default if default[name] != non_default[name]} == {
        *("size", "interpolation", "keep_aspect_ratio", "fast_jpeg", "exif", "scale_to_uint8"),
        "max_pixels",
    }
    json.dumps(non_default)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        *(({"size": size}, [size, "size=(224, 224)"]) for size in ((0, 5), (5, 0), (-1, 5), (5,))),
        ({"size": (5, 7, 3)}, ["(5, 7, 3)", "size=(5, 7)"]),
        ({"size": SIZE, "interpolation": "cubic"}, ["'cubic'", *INTERPOLATIONS]),
        ({"interpolation": ""}, ["''", *INTERPOLATIONS]),
        ({"max_pixels": 0}, ["invalid max_pixels=0"]),
        ({"max_pixels": -1}, ["invalid max_pixels=-1"]),
        ({"max_pixels": 1.5}, ["invalid max_pixels=1.5"]),
        ({"max_pixels": True}, ["invalid max_pixels=True"]),
        ({"keep_aspect_ratio": True}, ["keep_aspect_ratio=True requires", "size=(224, 224)"]),
        ({"fast_jpeg": True}, ["fast_jpeg=True requires a size", "size=(224, 224)"]),
    ],
)
def test_invalid_decode_options_are_rejected(settings, words):
    with pytest.raises(UsageError) as caught:
        Decoder(DecodeOptions(**settings), memory_bytes=AMPLE_MEMORY_BYTES)
    check_error(caught.value, *words)


def test_max_bytes_admits_every_image_within_max_pixels():
    for height, width in ((7, 9), (1, 300), (800, 801)):
        data = png(RGBA, 16, height, width)  # noise, which no compression makes shorter
        assert len(data) > 8 * height * width
        assert len(data) <= DecodeOptions(max_pixels=height * width).max_bytes
    assert DecodeOptions(max_pixels=10**6).max_bytes < 10 * 10**6
