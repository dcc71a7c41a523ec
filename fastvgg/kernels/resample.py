"""Nearest-neighbour resampling: a gather of pixels by row and column.

From 500x375 to 224x224 it takes 20 us, beside 550 us for decoding.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Final

from fastvgg.kernels import memory
from fastvgg.kernels.jit import kernel

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["gather"]

PIXEL_BYTES: Final = 3
ROW_NUMBER_BYTES: Final = 8


@functools.cache
def gather() -> Callable[..., None]:
    """Return the kernel that gathers interleaved uint8 pixels.

    It takes the addresses of source and target; the addresses of the row numbers and the column
    numbers, as int64; how many rows and columns the target has; the width of the source in pixels;
    and how many columns may be copied with the byte after the pixel, because neither that byte nor
    the one that it overwrites lies outside of an image.
    """
    load_number = memory.load_int64
    load_four, load_pixel = memory.load("uint8", 4, 1), memory.load("uint8", PIXEL_BYTES, 1)
    store = memory.store(nontemporal=False)

    @kernel(8)
    def gather_pixels(source, target, rows, columns, row_count, column_count, width, wide_columns):
        y = target
        for row in range(row_count):
            x = source + load_number(rows + row * ROW_NUMBER_BYTES) * (width * PIXEL_BYTES)
            for column in range(wide_columns):
                at = load_number(columns + column * ROW_NUMBER_BYTES) * PIXEL_BYTES
                store(y, 0, load_four(x + at, 0))
                y += PIXEL_BYTES
            for column in range(wide_columns, column_count):
                at = load_number(columns + column * ROW_NUMBER_BYTES) * PIXEL_BYTES
                store(y, 0, load_pixel(x + at, 0))
                y += PIXEL_BYTES

    return gather_pixels
