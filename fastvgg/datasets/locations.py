"""Where a dataset is: a file or directory, or a dataset within a file (``FILE.h5::/images``)."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Final

__all__ = ["absolute_path", "beside_path", "dataset_of", "file_of", "path_within"]

# The name of an HDF5 file, and that of a dataset within it.
IN_FILE: Final = re.compile(r"(.*?\.(?:h5|hdf5))(?:::(.*))?", re.DOTALL | re.IGNORECASE)


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


def path_within(file: Path, dataset: str) -> Path:
    """Return where a dataset is; the file, where that has but one and its name is empty.

    >>> path_within(Path("/data/x.h5"), "/images"), path_within(Path("/data/x.npy"), "")
    (PosixPath('/data/x.h5::/images'), PosixPath('/data/x.npy'))
    """
    return Path(f"{file}::{dataset}") if dataset else file


def absolute_path(path: str | os.PathLike[str]) -> Path:
    """Return the one name that a dataset has from anywhere.

    >>> absolute_path("/data/../x.h5::images/"), absolute_path("/data/x.npy")
    (PosixPath('/x.h5::/images'), PosixPath('/data/x.npy'))
    """
    path = Path(path)
    return path_within(Path(os.path.abspath(file_of(path))), dataset_of(path))


def _parted(path: Path) -> tuple[str, str]:
    text = os.fspath(path)
    found = IN_FILE.fullmatch(text)
    return (found[1], found[2] or "") if found else (text, "")
