"""Where a dataset is: a file or directory, or a dataset within a file (``FILE.h5::/images``)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

__all__ = ["WITHIN", "beside_path", "dataset_of", "file_of"]

WITHIN: Final = "::"
"""Between the name of an HDF5 file and that of a dataset within it."""
FILE_ENDINGS: Final = (".h5", ".hdf5")


def file_of(path: Path) -> Path:
    """Return the file that a dataset is in; all but one within an HDF5 file are one themselves.

    >>> file_of(Path("/data/x.h5::/group/images")), file_of(Path("/data/x.npy"))
    (PosixPath('/data/x.h5'), PosixPath('/data/x.npy'))
    """
    return Path(_parted(path)[0])


def beside_path(path: Path, ending: str) -> Path:
    """Return a name beside a dataset's file: its own, with an ending.

    >>> beside_path(Path("/data/x.h5::/images"), ".partial")
    PosixPath('/data/x.h5.partial')
    """
    file = file_of(path)
    return file.with_name(file.name + ending)


def dataset_of(path: Path) -> str:
    """Return the name of a dataset within its file; "" where none is given.

    >>> dataset_of(Path("/data/x.h5::group/images")), dataset_of(Path("/data/x.h5"))
    ('/group/images', '')
    """
    name = _parted(path)[1].strip("/")
    return f"/{name}" if name else ""


def _parted(path: Path) -> tuple[str, str]:
    text = os.fspath(path)
    file, _, name = text.partition(WITHIN)
    return (file, name) if file.lower().endswith(FILE_ENDINGS) else (text, "")
