"""The memory layout of batches, and their partition into tiles for many threads."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from fastvgg.transform import CHANNEL_AXES, LAYOUTS

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from fastvgg.transform import Layout

CACHE_LINE_BYTES: Final = 64


class Strides(NamedTuple):
    """The bytes between images, planes and pixels of a contiguous batch."""

    image: int
    plane: int
    pixel: int

    @classmethod
    def contiguous(cls, shape: tuple[int, ...], element_bytes: int, layout: Layout) -> Strides:
        """Return the strides of a C-contiguous batch, or of one image.

        >>> Strides.contiguous((2, 5, 7, 3), 4, "NHWC")
        Strides(image=420, plane=140, pixel=12)
        >>> Strides.contiguous((2, 3, 5, 7), 4, "NCHW")
        Strides(image=420, plane=140, pixel=4)
        """
        image_bytes = math.prod(shape[-3:]) * element_bytes
        return cls(image_bytes, image_bytes // 3, element_bytes * (3 if layout == "NHWC" else 1))

    def offset(self, image: int, pixel: int) -> int:
        """Return the byte offset of a pixel of an image; for NCHW, in the first plane."""
        return image * self.image + pixel * self.pixel


class ContiguousBase(NamedTuple):
    """The contiguous batch of which a transposed or channel-reversed array is a view."""

    layout: Layout
    is_reversed: bool
    """Whether the channels of the base are in the reverse of the order of the view."""
    offset: int
    """The bytes from the first element of the view to the first of the base; at most 0."""
    strides: Strides


def find_base(
    layout: Layout, dtype: np.dtype[Any], shape: tuple[int, ...], strides: tuple[int, ...]
) -> ContiguousBase | None:
    """Describe the contiguous array of which a batch or an image is a view; None if it has none.

    A view may be transposed to the other layout, and have its channels reversed.

    >>> import numpy as np
    >>> x = np.zeros((5, 7, 3), np.float32)
    >>> find_base("NHWC", x.dtype, x.shape, x[..., ::-1].strides).offset
    -8
    >>> find_base("NHWC", x.dtype, x[::2].shape, x[::2].strides)
    """
    if not dtype.isnative:
        return None
    sizes, other_strides, element = [*shape], [*strides], dtype.itemsize
    channel_stride = other_strides.pop(CHANNEL_AXES[layout])
    del sizes[CHANNEL_AXES[layout]]
    plane = sizes[-2] * sizes[-1] * element
    for base_layout in (layout, *(other for other in LAYOUTS if other != layout)):
        pixel, channel = (3 * element, element) if base_layout == "NHWC" else (element, plane)
        expected = (3 * plane, sizes[-1] * pixel, pixel)[-len(sizes) :]
        if abs(channel_stride) == channel and all(
            size == 1 or actual == stride
            for size, actual, stride in zip(sizes, other_strides, expected, strict=True)
        ):
            return ContiguousBase(
                layout=base_layout,
                is_reversed=channel_stride < 0,
                offset=min(0, 2 * channel_stride),
                strides=Strides(3 * plane, plane, pixel),
            )
    return None


def pixels_to_cache_line(address: int, pixel_bytes: int, layout: Layout) -> int:
    """Return the number of pixels from `address` to the first cache-line-aligned pixel."""
    channels = 3 if layout == "NHWC" else 1
    element_bytes = pixel_bytes // channels
    elements_in_line = CACHE_LINE_BYTES // element_bytes
    elements_before = -address // element_bytes
    return elements_before * pow(channels, -1, elements_in_line) % elements_in_line


class Tile(NamedTuple):
    """Consecutive whole images, or consecutive rows of one image.

    When a kernel runs on a contiguous base, each pixel counts as a row.
    """

    image: int
    images: int
    row: int
    rows: int

    def view(self, batch: NDArray[Any], layout: Layout) -> NDArray[Any]:
        """Return a view of the tile in a batch."""
        images = slice(self.image, self.image + self.images)
        rows = slice(self.row, self.row + self.rows)
        return batch[images, rows] if layout == "NHWC" else batch[images, :, rows]


def partition(
    images: int, rows: int, row_bytes: int, tile_bytes: int, *, lead: int = 0, multiple: int = 1
) -> list[Tile]:
    """Partition a batch into tiles of about `tile_bytes`, but at least `multiple` rows.

    An image larger than a tile is split `lead` rows past multiples of `multiple`.

    >>> [tuple(tile) for tile in partition(images=3, rows=4, row_bytes=10, tile_bytes=80)]
    [(0, 2, 0, 4), (2, 1, 0, 4)]
    >>> [tuple(tile) for tile in partition(images=1, rows=4, row_bytes=10, tile_bytes=30)]
    [(0, 1, 0, 3), (0, 1, 3, 1)]
    >>> [tuple(tile) for tile in partition(1, 20, 10, tile_bytes=90, lead=3, multiple=4)]
    [(0, 1, 0, 11), (0, 1, 11, 8), (0, 1, 19, 1)]
    """
    images_per_tile = tile_bytes // max(1, rows * row_bytes)
    if images_per_tile:
        return [
            Tile(image, min(images_per_tile, images - image), 0, rows)
            for image in range(0, images, images_per_tile)
        ]
    step = max(1, tile_bytes // (row_bytes * multiple)) * multiple
    starts = [0, *range(lead + step, rows, step)]
    spans = [*zip(starts, [*starts[1:], rows], strict=True)]
    return [Tile(image, 1, start, stop - start) for image in range(images) for start, stop in spans]
