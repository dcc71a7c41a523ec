"""Nearest neighbour resizing: which pixels are picked, and the picking of them in plain NumPy.

Which ones is asked of Pillow, not computed again: its rule adds up rounded steps, and one that is
nearly the same picks another pixel here and there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Picks", "pick", "picks"]


@dataclass(frozen=True, eq=False)
class Picks:
    """Which rows and columns of an image a smaller or larger one is made of."""

    rows: NDArray[np.int64]
    columns: NDArray[np.int64]


def picks(
    height: int, width: int, box: tuple[int, int, int, int], wanted: tuple[int, int]
) -> Picks:
    """Return what Pillow picks when it resizes.

    Parameters
    ----------
    height, width
        Of the image.
    box
        The part of it that is resized: left, upper, right, lower.
    wanted
        Height and width of the result.

    Examples
    --------
    >>> found = picks(4, 6, (0, 0, 6, 4), (2, 3))
    >>> found.rows.tolist(), found.columns.tolist()
    ([1, 3], [1, 3, 5])
    """
    left, upper, right, lower = box
    return Picks(
        _positions(height, upper, lower, wanted[0]), _positions(width, left, right, wanted[1])
    )


def _positions(length: int, begin: int, end: int, wanted: int) -> NDArray[np.int64]:
    """Have Pillow resize a line of numbers that say where they are."""
    from PIL import Image

    line = Image.fromarray(np.arange(length, dtype=np.int32)[np.newaxis])
    picked = line.resize((wanted, 1), Image.Resampling.NEAREST, box=(begin, 0, end, 1))
    positions: NDArray[np.int64] = np.asarray(picked, np.int64)[0]
    return positions


def pick(pixels: NDArray[Any], picked: Picks, out: NDArray[Any]) -> None:
    """Write the picked pixels of an image into `out`, both woven.

    >>> pixels, out = np.arange(72).reshape(4, 6, 3), np.zeros((2, 3, 3), int)
    >>> pick(pixels, picks(4, 6, (0, 0, 6, 4), (2, 3)), out)
    >>> out[:, :, 0].tolist()
    [[21, 27, 33], [57, 63, 69]]
    """
    out[...] = pixels.take(picked.rows, axis=0).take(picked.columns, axis=1)
