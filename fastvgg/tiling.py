"""Tiles of a batch: where its pixels lie in memory, and how it is cut for many threads."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from fastvgg.transform import CHANNEL_AXES, LAYOUTS

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from fastvgg.transform import Layout

__all__ = ["LINE_BYTES", "Base", "Steps", "Tile", "base_of", "cut", "pixels_before_a_line"]

LINE_BYTES: Final = 64


class Steps(NamedTuple):
    """The bytes from one image, plane and pixel of a contiguous batch to the next."""

    image: int
    plane: int
    pixel: int

    @classmethod
    def of(cls, shape: tuple[int, ...], element_bytes: int, layout: Layout) -> Steps:
        """Return those of a batch, or of one image.

        >>> Steps.of((2, 5, 7, 3), 4, "NHWC"), Steps.of((2, 3, 5, 7), 4, "NCHW")
        (Steps(image=420, plane=140, pixel=12), Steps(image=420, plane=140, pixel=4))
        """
        image_bytes = math.prod(shape[-3:]) * element_bytes
        return cls(image_bytes, image_bytes // 3, element_bytes * (3 if layout == "NHWC" else 1))

    def to(self, image: int, pixel: int) -> int:
        """Return the bytes to a pixel of an image; where planes differ, in the first plane."""
        return image * self.image + pixel * self.pixel


class Base(NamedTuple):
    """A contiguous batch that a view shows in the other layout, or with its channels reversed."""

    layout: Layout
    reverses: bool
    """Whether its channels are in the reverse of the order that the view shows."""
    offset: int
    """The bytes from the first element of the view to that of the base; 0 or less."""
    steps: Steps


def base_of(
    layout: Layout, dtype: np.dtype[Any], shape: tuple[int, ...], strides: tuple[int, ...]
) -> Base | None:
    """Return the contiguous batch of which a batch or an image is a view; None if there is none.

    >>> import numpy as np
    >>> x = np.zeros((5, 7, 3), np.float32)
    >>> base_of("NHWC", x.dtype, x.shape, x[..., ::-1].strides).offset
    -8
    >>> base_of("NHWC", x.dtype, x[::2].shape, x[::2].strides)
    """
    if not dtype.isnative:
        return None
    sizes, others, element = [*shape], [*strides], dtype.itemsize
    channel = others.pop(CHANNEL_AXES[layout])
    del sizes[CHANNEL_AXES[layout]]
    plane = sizes[-2] * sizes[-1] * element
    for found in (layout, *(other for other in LAYOUTS if other != layout)):
        pixel, between = (3 * element, element) if found == "NHWC" else (element, plane)
        wanted = (3 * plane, sizes[-1] * pixel, pixel)[-len(sizes) :]
        if abs(channel) == between and all(
            size == 1 or stride == step
            for size, stride, step in zip(sizes, others, wanted, strict=True)
        ):
            return Base(found, channel < 0, min(0, 2 * channel), Steps(3 * plane, plane, pixel))
    return None


def pixels_before_a_line(address: int, pixel_bytes: int, layout: Layout) -> int:
    """Return after how many pixels from an address one begins where a cache line does."""
    channels = 3 if layout == "NHWC" else 1
    element_bytes = pixel_bytes // channels
    elements_in_line = LINE_BYTES // element_bytes
    elements_before = -address // element_bytes
    return elements_before * pow(channels, -1, elements_in_line) % elements_in_line


class Tile(NamedTuple):
    """Some whole images, or some rows of one image; to a kernel, each pixel is a row."""

    image: int
    images: int
    row: int
    rows: int

    def of(self, batch: NDArray[Any], layout: Layout) -> NDArray[Any]:
        """Return the tile's view of a batch."""
        images = slice(self.image, self.image + self.images)
        rows = slice(self.row, self.row + self.rows)
        return batch[images, rows] if layout == "NHWC" else batch[images, :, rows]


def cut(
    images: int, rows: int, row_bytes: int, tile_bytes: int, *, lead: int = 0, multiple: int = 1
) -> list[Tile]:
    """Cut a batch into tiles of about `tile_bytes`, but no less than `multiple` rows.

    An image that is larger is cut `lead` rows past the multiples of `multiple`.

    >>> [tuple(tile) for tile in cut(images=3, rows=4, row_bytes=10, tile_bytes=80)]
    [(0, 2, 0, 4), (2, 1, 0, 4)]
    >>> [tuple(tile) for tile in cut(images=1, rows=4, row_bytes=10, tile_bytes=30)]
    [(0, 1, 0, 3), (0, 1, 3, 1)]
    >>> [tuple(tile) for tile in cut(1, 20, 10, tile_bytes=90, lead=3, multiple=4)]
    [(0, 1, 0, 11), (0, 1, 11, 8), (0, 1, 19, 1)]
    """
    together = tile_bytes // max(1, rows * row_bytes)
    if together:
        return [
            Tile(image, min(together, images - image), 0, rows)
            for image in range(0, images, together)
        ]
    step = max(1, tile_bytes // (row_bytes * multiple)) * multiple
    starts = [0, *range(lead + step, rows, step)]
    stretches = [*zip(starts, [*starts[1:], rows], strict=True)]
    return [
        Tile(image, 1, start, stop - start) for image in range(images) for start, stop in stretches
    ]
