"""What lies on disk: a file for each format, none of which knows what is done to the pixels.

`open_source` and `open_target` choose the format by what a path is: a directory holds images, a
name that ends in .npy is an array.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from fastvgg.datasets.images import INTERPOLATIONS, ImageFolder, ImageFolderTarget
from fastvgg.datasets.npy import NpySource, NpyTarget
from fastvgg.errors import SourceError, TargetError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from fastvgg.datasets.base import Header, Source, Target
    from fastvgg.datasets.index import Record
    from fastvgg.stream.storage import Storage
    from fastvgg.transform import Layout

__all__ = ["INTERPOLATIONS", "open_source", "open_target", "target_kind"]


def open_source(
    path: Path,
    *,
    layout: Layout = "NHWC",
    stored_as: str | None = None,
    size: tuple[int, int] | None = None,
    interpolation: str = "nearest",
    threads: int = 1,
) -> Source:
    """Open a dataset for reading; headers are read, pixels are not.

    Parameters
    ----------
    path
        A directory of images, or a .npy file.
    layout
        The layout of an array; images are NHWC.
    stored_as
        The storage type of an array whose own header cannot name it (bfloat16), from its manifest.
    size, interpolation
        Height and width to resize images to, and how, as Keras' `load_img` does.
    threads
        How many threads decode.

    Raises
    ------
    SourceError
        If the path is missing, empty, damaged, or of no format that fastvgg reads.
    """
    if os.path.isdir(path):  # noqa: PTH112  # Path.is_dir raises where a name is too long
        if layout != "NHWC":
            raise SourceError(f"{path}: images have no layout {layout}", "leave --layout away")
        return ImageFolder(path, size=size, interpolation=interpolation, threads=threads)
    if not os.path.lexists(path):
        raise SourceError(f"{path} does not exist", "check the path; nothing was written")
    if path.suffix.lower() == ".npy":
        if size is not None:
            raise SourceError(
                f"{path}: --size resizes image files, and this is an array",
                "leave --size away, or give the directory of images",
            )
        return NpySource(path, layout=layout, stored_as=stored_as)
    raise SourceError(
        f"{path} is neither a directory of images nor a .npy file",
        "for a single image give the directory that it is in",
    )


def target_kind(path: Path) -> str:
    """Return the format that a target's name asks for: "npy" or "images"."""
    if path.suffix.lower() == ".npy":
        return "npy"
    if path.suffix == "" or path.is_dir():
        return "images"
    raise TargetError(
        f"{path}: no format is known that ends in {path.suffix!r}",
        "give a name that ends in .npy, or a directory to restore image files into",
    )


def open_target(
    path: Path, header: Header, storage: Storage, records: Sequence[Record] = ()
) -> Target:
    """Return the target of a name; nothing is written before its `create`.

    `records` names the image files, one for each row, where they are known.
    """
    if target_kind(path) == "npy":
        return NpyTarget(path, header, storage)
    return ImageFolderTarget(path, header, storage, records)
