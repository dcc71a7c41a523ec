"""TIFF files about which libtiff complains on its standard error."""

from __future__ import annotations

from PIL import Image

from tests.helpers.datasets_on_disk import pixels

COMPLAINT = "LZWDecode"


def save_damaged_tiffs(directory):
    """Save LZW TIFFs with 30 bytes zeroed in the middle of all but one; return the directory."""
    directory.mkdir()
    for row, image in enumerate(pixels(6, 40, 40)):
        path = directory / f"{row}.tif"
        Image.fromarray(image).save(path, compression="tiff_lzw")
        if row:
            content = bytearray(path.read_bytes())
            middle = len(content) // 2
            content[middle : middle + 30] = bytes(30)
            path.write_bytes(content)
    return directory
