"""The EXIF orientation of an image, and how to undo it.

Pillow's `exif_transpose` also decodes all other tags; a hostile file has a million of them.
"""

from __future__ import annotations

from typing import Final

from PIL import ExifTags, Image

TRANSPOSES: Final = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SWAPPING_ORIENTATIONS: Final = (5, 6, 7, 8)


def orientation(image: Image.Image) -> int:
    """Return the EXIF orientation of an image, or 1 if it has none."""
    found: int = image.getexif().get(ExifTags.Base.Orientation, 1)
    return found


def is_transposed(image: Image.Image) -> bool:
    """Return whether the EXIF of an image says that it is rotated or mirrored."""
    return orientation(image) in TRANSPOSES


def swaps_sides(image: Image.Image) -> bool:
    """Return whether height and width are swapped when the orientation is undone."""
    return orientation(image) in SWAPPING_ORIENTATIONS


def upright(image: Image.Image) -> Image.Image:
    """Return an image whose EXIF orientation is undone, with the pixels of `exif_transpose`."""
    image.load()  # of a PNG, also the EXIF that follows the pixels
    method = TRANSPOSES.get(orientation(image))
    return image if method is None else image.transpose(method)
