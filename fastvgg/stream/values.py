"""Look at some values of a source, and refuse what they show to be the wrong thing to do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from fastvgg.errors import SourceError
from fastvgg.storage.location import parse_location
from fastvgg.stream.manifest import read_transform

if TYPE_CHECKING:
    from pathlib import Path

    from fastvgg.datasets.base import Source
    from fastvgg.stream.plan import Plan
    from fastvgg.transform import Direction, Transform

__all__ = ["check_not_already_done", "check_values"]

CHECKED_IMAGES: Final = 16


def check_not_already_done(path: Path, done: Transform, direction: Direction) -> None:
    """Refuse to do with a dataset what its manifest says was done.

    Raises
    ------
    SourceError
        Saying so.
    """
    if done.direction != direction:
        return
    if direction == "preprocess":
        raise SourceError(
            f"{path} is preprocessed already, in mode {done.mode.name}: doing it twice would "
            "destroy it",
            "preprocess the images it was made from, or restore it first",
        )
    raise SourceError(
        f"{path} is restored already: it holds images, not network inputs",
        "give the dataset that it was restored from",
    )


def check_values(plan: Plan, source: Source) -> None:
    """Look at some images of a floating source before anything is written.

    Images have values 0..255. Network inputs are negative in all but bright images, and hold
    fractions; in tf mode an all white image is all ones.

    Raises
    ------
    SourceError
        If network inputs would be preprocessed again, or images restored.
    """
    if plan.header.dtype == "uint8":
        return  # which tells
    done = read_transform(parse_location(plan.source))
    if done is not None:  # which tells, and which another process may have just written
        check_not_already_done(parse_location(plan.source), done, plan.transform.direction)
        return
    images, looked_at = plan.header.images, min(CHECKED_IMAGES, plan.header.images)
    rows = sorted({image * images // looked_at for image in range(looked_at)})
    values = [source.read(row, row + 1).batch.astype(np.float64) for row in rows]
    least = float(np.min([image.min() for image in values]))  # NaN wins, unlike with min()
    most = float(np.max([image.max() for image in values]))
    is_image = least >= 0 and most <= 255  # false for NaN
    found = (
        f"{plan.source}: {len(rows)} images looked at hold values from {least:.6g} to {most:.6g}"
    )
    if plan.transform.direction == "preprocess" and not is_image:
        raise SourceError(
            f"{found}: not images (0 to 255), but perhaps preprocessed already",
            "preprocess the images themselves, or restore this dataset first",
        )
    whole = all(np.array_equal(image, np.trunc(image)) for image in values)
    if plan.transform.direction == "restore" and is_image and whole and most > 1:
        raise SourceError(
            f"{found}, all whole numbers: images, which were never preprocessed",
            "there is nothing to restore; to store images as uint8 convert their type",
        )
