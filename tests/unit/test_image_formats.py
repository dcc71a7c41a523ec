"""Formats of images: recognized by content, decoded as by Keras, and named if they are not."""

from __future__ import annotations

import io
import subprocess

import keras
import numpy as np
import pytest
from PIL import EpsImagePlugin, Image, features

from fastvgg.datasets.folders import FolderImageListing
from fastvgg.imaging import formats
from fastvgg.imaging.decode import DecodeOptions, Decoder
from fastvgg.imaging.formats import IMAGE_SUFFIXES, PILLOW_FORMATS, supported_formats
from tests.helpers.datasets_on_disk import PHOTOGRAPHS

SIZE = (23, 31)
MEMORY_BYTES = 2**28
# Format, mode, and options of saving.
ENCODINGS = [
    *(("AVIF", "RGB", {}), ("AVIF", "RGBA", {}), ("AVIF", "L", {"subsampling": "4:0:0"})),
    ("AVIF", "RGB", {"quality": 95, "subsampling": "4:4:4"}),
    *(("JPEG2000", "RGB", {}), ("JPEG2000", "RGBA", {}), ("JPEG2000", "L", {})),
    ("JPEG2000", "LA", {"no_jp2": True}),
    ("JPEG2000", "RGB", {"irreversible": True, "quality_layers": [20], "tile_size": (16, 16)}),
    *(("PPM", "RGB", {}), ("PPM", "L", {}), ("PPM", "1", {}), ("PPM", "RGBA", {})),
]


def encode(kind, mode, options):
    with Image.open(PHOTOGRAPHS / "chelsea.png") as image:
        small = image.resize((61, 47)).convert(mode)
    data = io.BytesIO()
    small.save(data, kind, **options)
    return data.getvalue()


def decode(data, memory_bytes=MEMORY_BYTES):
    out = np.zeros((*SIZE, 3), np.uint8)
    result = Decoder(DecodeOptions(SIZE), memory_bytes=memory_bytes).decode(data, out)
    return out, result


@pytest.mark.parametrize(("kind", "mode", "options"), ENCODINGS)
def test_formats_are_decoded_as_keras_does(kind, mode, options):
    data = encode(kind, mode, options)
    actual, result = decode(data)
    assert result == (61, 47, False, "")
    expected = keras.utils.load_img(io.BytesIO(data), target_size=SIZE)
    assert actual.tobytes() == np.asarray(expected).tobytes()


@pytest.mark.parametrize("text", [b"P3 2 1 255\n255 0 0  0 0 9", b"P6 2 1 65535\n" + bytes(12)])
def test_plain_and_deep_pixmaps_are_decoded(text):
    actual, result = decode(text)
    assert not result.failed
    expected = keras.utils.load_img(io.BytesIO(text), target_size=SIZE)
    assert actual.tobytes() == np.asarray(expected).tobytes()


def test_suffixes_are_those_that_pillow_has_for_the_formats():
    Image.init()
    registered = {suffix for suffix, kind in Image.EXTENSION.items() if kind in PILLOW_FORMATS}
    assert registered - {".pfm"} == IMAGE_SUFFIXES


@pytest.mark.parametrize("suffix", sorted(IMAGE_SUFFIXES))
def test_every_suffix_is_listed(tmp_path, suffix):
    (tmp_path / f"a{suffix.upper()}").touch()
    (tmp_path / "a.pfm").touch()
    listing = FolderImageListing(tmp_path)
    assert len(listing) == 1
    assert listing.notes == ["skipped files without an image suffix: 1 (1 .pfm)"]


UNSUPPORTED = {
    "an EPS document": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n",
    "a HEIF image": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic",
    "a JPEG XL image": b"\xff\x0a\xfa\x1f",
    "a Photoshop document": b"8BPS\0\1" + bytes(30),
    "an icon": b"\0\0\1\0\1\0\x10\x10" + bytes(30),
    "an SVG drawing": b'<?xml version="1.0"?>\n<!-- a drawing -->\n<svg width="9">',
    "an HTML page": b"\n<!DOCTYPE html><html><body>404",
    "a pointer of Git LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:00",
    "a PDF document": b"%PDF-1.7\n",
    "a video": b"\0\0\0\x20ftypisom",
    "a zip archive": b"PK\3\4" + bytes(40),
    "a file compressed with gzip": b"\x1f\x8b\x08" + bytes(40),
    "an empty file": b"",
}


@pytest.mark.parametrize("what", UNSUPPORTED)
def test_other_content_is_named(what):
    _, result = decode(UNSUPPORTED[what])
    assert result.failed
    assert result.reason == f"{what}, not an image in a supported format"


def test_text_is_not_an_image():
    assert decode(b"a text\nof two lines")[1].reason == "not an image in a supported format"


@pytest.mark.parametrize("kind", ["GIF", "AVIF", "BMP"])
def test_damaged_header_is_named(kind):
    data = encode(kind, "RGB", {})
    _, result = decode(data[:16])
    assert result.failed
    assert kind in result.reason.upper()
    assert "that is damaged" in result.reason


@pytest.mark.parametrize("feature", ["avif", "jpg_2000", "webp"])
def test_format_that_pillow_lacks_is_named(monkeypatch, feature):
    """As with a Pillow that was built without a library, or is older than the format."""
    for known in (features.modules, features.codecs):
        monkeypatch.delitem(known, feature, raising=False)
    supported_formats.cache_clear()
    try:
        (kind,) = (name for name, needed in formats.FEATURES.items() if needed == feature)
        assert kind not in supported_formats()
        _, result = decode(encode(kind, "RGB", {}))
        what = {"avif": "an AVIF", "jpg_2000": "a JPEG 2000", "webp": "a WebP"}[feature]
        assert result.reason == f"{what} image, which the installed Pillow cannot decode"
        assert not decode(encode("PNG", "RGB", {}))[1].failed
    finally:
        supported_formats.cache_clear()


def test_no_program_is_run_for_a_document(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *args: calls.append(args))
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **options: calls.append(args))
    for data in UNSUPPORTED.values():
        decode(data)
    assert calls == []
