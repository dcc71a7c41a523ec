"""Where a dataset is: a path, a dataset within a file (``FILE.h5::/images``), or a URL."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Final, cast

from fastvgg.errors import UsageError

__all__ = ["beside_path", "dataset_of", "file_of", "is_remote", "located", "path_within"]

# The name of an HDF5 file, and that of a dataset within it.
IN_FILE: Final = re.compile(r"(.*?\.(?:h5|hdf5))(?:::(.*))?", re.DOTALL | re.IGNORECASE)
URL: Final = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
HERE: Final = "file://"


def located(text: str | os.PathLike[str]) -> Path:
    """Return the one name that a dataset has from anywhere: a path, or that of objects in a store.

    The latter, a `upath.UPath`, is asked for names as a Path is, and for nothing else.

    Raises
    ------
    UsageError
        If it is a URL of a store that cannot be reached from here.

    Examples
    --------
    >>> located("/data/../x.h5::images/"), located("file:///x.npy")
    (PosixPath('/x.h5::/images'), PosixPath('/x.npy'))
    >>> str(located("memory://bucket/x.zarr"))
    'memory://bucket/x.zarr'
    """
    path = str(text).removeprefix(HERE)
    if not URL.match(path):
        given = Path(path)
        return path_within(Path(os.path.abspath(file_of(given))), dataset_of(given))
    try:
        from upath import UPath

        location = UPath(path)
        _ = location.fs
    except (ImportError, ValueError) as error:  # of the package for its protocol, or no protocol
        raise UsageError(
            f"{path} cannot be reached: {error}",
            "install what reads such URLs: pip install 'fastvgg[zarr]', and s3fs for s3://, or "
            "gcsfs for gs://",
        ) from None
    return cast("Path", location)


def is_remote(path: Path) -> bool:
    """Whether a dataset is in a store, where there is no file to open.

    >>> is_remote(located("memory://bucket/x.zarr")), is_remote(Path("x.zarr"))
    (True, False)
    """
    return not isinstance(path, Path)


def file_of(path: Path) -> Path:
    """Return the file that a dataset is in; all but one within an HDF5 file are one themselves.

    >>> file_of(Path("/data/x.h5::/group/images")), file_of(Path("/data/x.npy"))
    (PosixPath('/data/x.h5'), PosixPath('/data/x.npy'))
    """
    return path if is_remote(path) else Path(_parted(path)[0])


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
    name = "" if is_remote(path) else _parted(path)[1].strip("/")
    return f"/{name}" if name else ""


def path_within(file: Path, dataset: str) -> Path:
    """Return where a dataset is; the file, where that has but one and its name is empty.

    >>> path_within(Path("/data/x.h5"), "/images"), path_within(Path("/data/x.npy"), "")
    (PosixPath('/data/x.h5::/images'), PosixPath('/data/x.npy'))
    """
    return Path(f"{file}::{dataset}") if dataset else file


def _parted(path: Path) -> tuple[str, str]:
    text = os.fspath(path)
    found = IN_FILE.fullmatch(text)
    return (found[1], found[2] or "") if found else (text, "")
