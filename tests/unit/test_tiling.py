"""Tiles cover every row of every image once; a base locates the pixels of a view."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastvgg import tiling
from tests.helpers.batches import FLOATS, LAYOUTS, dtype_of, in_layout, view_in_memory

CHANNELS_LAST = {"NHWC": (0, 1, 2, 3), "NCHW": (0, 2, 3, 1)}


@given(
    images=st.integers(1, 40),
    rows=st.integers(1, 400),
    row_bytes=st.integers(1, 500),
    tile_bytes=st.integers(1, 20_000),
    multiple=st.integers(1, 64),
    lead=st.integers(0, 63),
)
@settings(max_examples=500)
def test_tiles_cover_every_row_of_every_image_once(
    images, rows, row_bytes, tile_bytes, multiple, lead
):
    lead %= multiple
    seen = np.zeros((images, rows), int)
    for tile in tiling.partition(images, rows, row_bytes, tile_bytes, lead=lead, multiple=multiple):
        assert tile.images > 0
        assert tile.rows > 0
        assert tile.images == 1 or tile.rows == rows
        assert tile.row == 0 or tile.row % multiple == lead
        tile_rows = tile.images * tile.rows
        max_bytes = max(multiple * row_bytes, tile_bytes) + (
            lead * row_bytes if not tile.row else 0
        )
        assert tile_rows * row_bytes <= max_bytes
        assert tile.image + tile.images <= images
        assert tile.row + tile.rows <= rows
        seen[tile.image : tile.image + tile.images, tile.row : tile.row + tile.rows] += 1
    assert (seen == 1).all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tile_view_selects_its_images_and_rows(layout):
    batch = in_layout(np.arange(4 * 5 * 7 * 3).reshape(4, 5, 7, 3), layout)
    part = tiling.Tile(image=1, images=2, row=3, rows=2).view(batch, layout)
    assert np.shares_memory(part, batch)
    part, whole = (x.transpose(CHANNELS_LAST[layout]) for x in (part, batch))
    assert np.array_equal(part, whole[1:3, 3:5])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["uint8", *FLOATS])
def test_pixels_to_cache_line_reaches_the_first_aligned_pixel(dtype, layout):
    size = dtype_of(dtype).itemsize
    pixel_bytes = size * (3 if layout == "NHWC" else 1)
    for address in range(2**40, 2**40 + 256, size):
        starts = [pixel for pixel in range(64) if (address + pixel * pixel_bytes) % 64 == 0]
        assert tiling.pixels_to_cache_line(address, pixel_bytes, layout) == starts[0]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("reverses", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_find_base_locates_the_pixels_of_a_view(layout, transposed, reverses):
    for shape in itertools.product((1, 2), (1, 3, 5), (1, 3, 7)):
        batch = in_layout(np.zeros((*shape, 3), np.float32), layout)
        view, _ = view_in_memory(batch, layout, transposed, reverses, start=0)
        for x in (view, view[0]):
            base = tiling.find_base(layout, x.dtype, x.shape, x.strides)
            between = 4 if base.layout == "NHWC" else base.strides.plane
            strides = view.transpose(CHANNELS_LAST[layout]).strides
            for index in np.ndindex(shape if x.ndim == 4 else (1, *shape[1:])):
                image, row, column = index
                first = base.offset + base.strides.offset(image, row * shape[2] + column)
                channels = [first + channel * between for channel in range(3)]
                expected = [np.dot((*index, channel), strides) for channel in range(3)]
                assert channels[:: -1 if base.is_reversed else 1] == expected
            if min(shape) > 1:
                assert (base.layout != layout) == transposed
                assert base.is_reversed == reverses
