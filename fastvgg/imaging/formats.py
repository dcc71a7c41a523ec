"""The image formats that are decoded, and the suffixes of their files."""

from __future__ import annotations

from typing import Final

# The suffixes of keras.utils.image_dataset_from_directory, and others that Pillow reads.
IMAGE_SUFFIXES: Final = frozenset(
    (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
)

PILLOW_FORMATS: Final = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
