"""Nearest-neighbor resizing: a gather of rows and columns.

Pillow computes the indices, because its rule accumulates rounded steps: a rule that is nearly the
same selects a different pixel in some places.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fastvgg import backend as backends
from fastvgg.fork_lock import fork_lock
from fastvgg.interop import address_of

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypeAlias

    from numpy.typing import NDArray

    from fastvgg.backend import ResolvedBackend

    Gather: TypeAlias = "Callable[[NDArray[Any], NearestIndex, NDArray[Any]], None]"


@dataclass(frozen=True, eq=False)
class NearestIndex:
    """The row indices and column indices of a gather."""

    rows: NDArray[np.int64]
    columns: NDArray[np.int64]


def nearest_index(
    height: int, width: int, box: tuple[int, int, int, int], size: tuple[int, int]
) -> NearestIndex:
    """Return the indices that Pillow selects for a nearest-neighbor resize.

    Parameters
    ----------
    height, width
        The size of the source image in pixels.
    box
        The part of the image to resize: left, upper, right, lower.
    size
        The height and width of the result.

    Examples
    --------
    >>> index = nearest_index(4, 6, (0, 0, 6, 4), (2, 3))
    >>> index.rows.tolist(), index.columns.tolist()
    ([1, 3], [1, 3, 5])
    """
    left, upper, right, lower = box
    return NearestIndex(
        _positions(height, upper, lower, size[0]), _positions(width, left, right, size[1])
    )


def _positions(length: int, begin: int, end: int, target: int) -> NDArray[np.int64]:
    """Return the selected positions along an axis, by having Pillow resize a row of indices."""
    from PIL import Image

    line = Image.fromarray(np.arange(length, dtype=np.int32)[np.newaxis])
    selected = line.resize((target, 1), Image.Resampling.NEAREST, box=(begin, 0, end, 1))
    positions: NDArray[np.int64] = np.asarray(selected, np.int64)[0]
    return positions


def gather(pixels: NDArray[Any], index: NearestIndex, out: NDArray[Any]) -> None:
    """Copy the selected pixels of an interleaved image into `out`, with NumPy.

    >>> pixels, out = np.arange(72).reshape(4, 6, 3), np.zeros((2, 3, 3), int)
    >>> gather(pixels, nearest_index(4, 6, (0, 0, 6, 4), (2, 3)), out)
    >>> out[:, :, 0].tolist()
    [[21, 27, 33], [57, 63, 69]]
    """
    out[...] = pixels.take(index.rows, axis=0).take(index.columns, axis=1)


def gather_function(backend: ResolvedBackend) -> Gather:
    """Return the function equal to `gather` that runs on a backend.

    Images must be contiguous, interleaved uint8.
    """
    backends.check_backend(backend)
    if backend == "numpy":
        return gather
    with fork_lock:
        from fastvgg.kernels import resample

        kernel = resample.gather()

    def gather_pixels(pixels: NDArray[Any], index: NearestIndex, out: NDArray[Any]) -> None:
        width, columns = pixels.shape[1], len(index.columns)
        # The kernel may read 4 bytes for a pixel in columns before the last of source and result.
        wide = min(int(index.columns.searchsorted(width - 1)), columns - 1)
        addresses = [address_of(array) for array in (pixels, out, index.rows, index.columns)]
        kernel(*addresses, len(index.rows), columns, width, wide)

    return gather_pixels
