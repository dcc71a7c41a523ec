"""How fast images are read and decoded, on all threads, with what they become dropped."""

from __future__ import annotations

import io
import statistics
from typing import TYPE_CHECKING, Any, Final, cast

import numpy as np
from PIL import Image

from fastvgg.bench.timing import time_interleaved
from fastvgg.datasets.open import open_source
from fastvgg.errors import VerificationError
from fastvgg.imaging.decode import DecodeOptions
from fastvgg.imaging.resize import gather_function
from fastvgg.parallel import parallel_for

if TYPE_CHECKING:
    from pathlib import Path

    from fastvgg.datasets.images import ImageSource

__all__ = ["measured"]

SIZE: Final = (224, 224)
TAKEN_TOGETHER: Final = 8
CHECKED_IMAGES: Final = 8


def measured(source_path: Path, max_images: int, rounds: int, threads: int) -> dict[str, Any]:
    """Return how many images a second are decoded and resized to 224x224.

    The first of them are compared with what Pillow makes of the same files. All are in the
    system's memory, for they were decoded once before.

    Raises
    ------
    SourceError
        If there are no images, or that is an array.
    VerificationError
        If pixels differ from Pillow's.
    """
    opened = open_source(
        source_path,
        decoding=DecodeOptions(size=SIZE),
        threads=threads,
        gather=gather_function("numba"),
    )
    images = cast("ImageSource", opened)  # an array would have been refused: it has no decoding
    try:
        rows = range(min(max_images, images.header.images))
        for row in rows[:CHECKED_IMAGES]:
            _check(images, row)
        pieces = [rows[first : first + TAKEN_TOGETHER] for first in rows[::TAKEN_TOGETHER]]
        failed: set[int] = set()

        def decode(piece: range) -> None:
            out = np.empty((*SIZE, 3), np.uint8)
            failed.update(row for row in piece if images.decode(row, out).failed)

        (taken,) = time_interleaved([lambda: parallel_for(pieces, decode, threads)], rounds)
    finally:
        images.close()
    return {
        "path": str(source_path),
        "images": len(rows),
        "failed": len(failed),
        "images_per_second": round(len(rows) / statistics.median(taken)),
    }


def _check(images: ImageSource, row: int) -> None:
    """Compare an image of 8 bits a channel with what Pillow reads and resizes, as Keras does."""
    pixels = np.empty((*SIZE, 3), np.uint8)
    record = images.decode(row, pixels)
    if record.failed:
        return
    data = images.listing.read(row, images.decoding.max_bytes)
    with Image.open(io.BytesIO(data)) as image:
        if image.mode not in ("L", "RGB"):
            return
        expected = image.convert("RGB").resize(SIZE[::-1], Image.Resampling.NEAREST)
    if not np.array_equal(pixels, np.asarray(expected)):
        raise VerificationError(
            f"{record.path}: its pixels are not those that Pillow decodes",
            "please report it, with the file",
        )
