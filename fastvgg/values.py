"""Detect floats that are not images of 0 to 255, because they were scaled to 0..1 or -1..1."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np

from fastvgg.errors import ArrayError, option
from fastvgg.transform import CHANNEL_AXES

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from fastvgg.transform import Layout

SAMPLES_PER_AXIS: Final = 8


def scaling_remedy(low: float) -> str:
    """Return how to scale images whose values begin at `low` to 0..255.

    >>> scaling_remedy(0.0), scaling_remedy(-0.9)
    ('multiply by 255', 'compute (x + 1) * 127.5')
    """
    return "multiply by 255" if low >= 0 else "compute (x + 1) * 127.5"


def check_image_values(x: NDArray[Any], layout: Layout) -> None:
    """Check that a floating batch was not scaled to 0..1 or -1..1, which would look black.

    A batch of zeros passes, because it is black. Examines a few hundred values, and the others
    only if all of those lie within -1..1, image by image until one does not.

    Raises
    ------
    ArrayError
        If all values lie within -1..1, and not all are zero.
    """
    images = x.reshape(1, *x.shape) if x.ndim == 3 else x
    sides = [len(images), *images.shape[1:]]
    steps = [slice(None, None, side // SAMPLES_PER_AXIS or 1) for side in sides]
    steps[CHANNEL_AXES[layout]] = slice(None)
    if not x.size or not _is_within_unit(images[tuple(steps)]):
        return
    is_black, low = True, 0.0
    for image in images:
        if not _is_within_unit(image):
            return
        is_black = is_black and not image.any()
        low = min(low, float(image.min()))
    if not is_black:
        raise ArrayError(
            f"all values lie within {'0' if low >= 0 else '-1'}..1, but images have 0..255",
            f"{scaling_remedy(low)}; if the values are meant, give {option('check_values', False)}",
        )


def _is_within_unit(values: NDArray[Any]) -> bool:
    """Whether all values lie within -1..1; false if one is NaN."""
    with np.errstate(invalid="ignore"):  # a signaling NaN would warn
        return bool(((values >= -1) & (values <= 1)).all())  # min() of bfloat16 skips NaN
