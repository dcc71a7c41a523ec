"""The image formats that are decoded, the suffixes of their files, and names for other content.

Of the formats that Pillow opens, these are the ones that image datasets contain, that decode in
bounded memory, and that no file of another kind is taken for. Others are off on purpose: for EPS
Pillow runs Ghostscript, for WMF it calls Windows; TGA has no signature, so that any file may be
one; ICO, CUR and ICNS contain images whose size their header need not state.
"""

from __future__ import annotations

import functools
import re
from typing import Final

from PIL import features

# In the order in which they are tried: the most common first. Pillow imports all of its plugins for
# the first file that is none of the first five.
PILLOW_FORMATS: Final = (
    *("JPEG", "PNG", "GIF", "BMP", "PPM"),
    *("TIFF", "WEBP", "AVIF", "JPEG2000"),
)
# Formats that Pillow decodes only if it was built with a library.
FEATURES: Final = {"WEBP": "webp", "AVIF": "avif", "JPEG2000": "jpg_2000"}

# All suffixes of these formats but .pfm: floats, such as the depth maps next to images.
IMAGE_SUFFIXES: Final = frozenset(
    (
        *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".gif", ".bmp"),
        *(".pbm", ".pgm", ".pnm", ".ppm", ".tif", ".tiff", ".webp", ".avif", ".avifs"),
        *(".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx"),
    )
)

# Measured peak bytes per pixel beyond those of the decoded image. AVIF: 7 for 8 bits, and twice the
# planes plus a copy for film grain for 12. BMP: run lengths, which Pillow decodes in Python.
DECODER_PIXEL_BYTES: Final = {"WEBP": 18, "AVIF": 22, "JPEG2000": 21, "PPM": 7, "BMP": 4}

HEAD_BYTES: Final = 256
# What an image begins with, as a regular expression; the name of its format in Pillow, if it may be
# read; and what to call it.
IMAGES: Final = (
    (rb"\xff\xd8\xff", "JPEG", "a JPEG image"),
    (rb"\x89PNG", "PNG", "a PNG image"),
    (rb"GIF8", "GIF", "a GIF image"),
    (rb"BM....\0\0\0\0", "BMP", "a BMP image"),
    (rb"P[1-6]\s", "PPM", "a PPM image"),
    (rb"II[*+]\0|MM\0[*+]", "TIFF", "a TIFF image"),
    (rb"....ftypavi[fs]", "AVIF", "an AVIF image"),
    (rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51", "JPEG2000", "a JPEG 2000 image"),
    (rb"RIFF....WEBP", "WEBP", "a WebP image"),
    (rb"....ftyp(hei[cxms]|hev[cx]|mif1|msf1)", "", "a HEIF image"),
    (rb"\xff\x0a|\0\0\0\x0cJXL ", "", "a JPEG XL image"),
    (rb"8BPS", "", "a Photoshop document"),
    (rb"\0\0[\x01\x02]\0.\0", "", "an icon"),
)
OTHER_CONTENT: Final = (
    (rb"%!PS|\xc5\xd0\xd3\xc6", "", "an EPS document"),
    (rb"%PDF", "", "a PDF document"),
    (rb"(?i)\s*(<[?!][^>]*>\s*)*<svg", "", "an SVG drawing"),
    (rb"(?i)\s*<(!doctype html|html)", "", "an HTML page"),
    (rb"version https://git-lfs", "", "a pointer of Git LFS"),
    (rb"....ftyp|RIFF....AVI |\x1aE\xdf\xa3", "", "a video"),
    (rb"PK\x03\x04", "", "a zip archive"),
    (rb"\x1f\x8b", "", "a file compressed with gzip"),
    (rb"\Z", "", "an empty file"),
)


@functools.cache
def supported_formats() -> tuple[str, ...]:
    """Return those of `PILLOW_FORMATS` that the installed Pillow decodes."""
    return tuple(name for name in PILLOW_FORMATS if _is_supported(name))


def _is_supported(name: str) -> bool:
    feature = FEATURES.get(name)
    if feature is None:
        return True
    is_known = feature in features.modules or feature in features.codecs  # not to older versions
    return is_known and bool(features.check(feature))


def describe_content(head: bytes) -> str:
    """Return why a file that begins with `head` is not decoded.

    >>> describe_content(b"<!DOCTYPE html>")
    'an HTML page, not an image in a supported format'
    """
    for start, name, what in IMAGES + OTHER_CONTENT:
        if re.match(start, head, re.DOTALL):
            if name in supported_formats():
                return f"{what} that is damaged"
            if name:
                return f"{what}, which the installed Pillow cannot decode"
            return f"{what}, not an image in a supported format"
    return "not an image in a supported format"


def is_image(head: bytes) -> bool:
    r"""Whether a file that begins with `head` is an image, whether it is decoded or not.

    >>> is_image(b"\xff\xd8\xff\xe0"), is_image(b"%PDF-1.7")
    (True, False)
    """
    return any(re.match(start, head, re.DOTALL) for start, _, _ in IMAGES)
