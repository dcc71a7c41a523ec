"""Where a dataset is: a path, a dataset within a file (``FILE.h5::/images``), or a URL."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Final, cast

from fastvgg.errors import UsageError

__all__ = [
    "container_of",
    "inner_name",
    "is_remote",
    "parse_location",
    "sidecar_path",
    "with_inner",
]

# The name of an HDF5 file, and that of a dataset within it.
IN_FILE: Final = re.compile(r"(.*?\.(?:h5|hdf5))(?:::(.*))?", re.DOTALL | re.IGNORECASE)
URL: Final = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
HERE: Final = "file://"


def parse_location(text: str | os.PathLike[str]) -> Path:
    """Return the one name that a dataset has from anywhere: a path, or that of objects in a store.

    The latter, a `upath.UPath`, is asked for names as a Path is, and for nothing else.

    Raises
    ------
    UsageError
        If it is a URL of a store that cannot be reached from here.

    Examples
    --------
    >>> parse_location("/data/../x.h5::images/"), parse_location("file:///x.npy")
    (PosixPath('/x.h5::/images'), PosixPath('/x.npy'))
    >>> str(parse_location("memory://bucket/x.zarr"))
    'memory://bucket/x.zarr'
    """
    path = str(text).removeprefix(HERE)
    if not URL.match(path):
        given = Path(path)
        return with_inner(Path(os.path.abspath(container_of(given))), inner_name(given))
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

    >>> is_remote(parse_location("memory://bucket/x.zarr")), is_remote(Path("x.zarr"))
    (True, False)
    """
    return not isinstance(path, Path)


def container_of(path: Path) -> Path:
    """Return the file that a dataset is in; all but one within an HDF5 file are one themselves.

    >>> container_of(Path("/data/x.h5::/group/images")), container_of(Path("/data/x.npy"))
    (PosixPath('/data/x.h5'), PosixPath('/data/x.npy'))
    """
    return path if is_remote(path) else Path(_split_edges(path)[0])


def sidecar_path(path: Path, ending: str) -> Path:
    """Return a name beside a dataset's file: its own, with an ending.

    >>> sidecar_path(Path("/data/x.h5::/images"), ".partial")
    PosixPath('/data/x.h5.partial')
    """
    file = container_of(path)
    return file.with_name(file.name + ending)


def inner_name(path: Path) -> str:
    """Return the name of a dataset within its file; "" where none is given.

    >>> inner_name(Path("/data/x.h5::group/images")), inner_name(Path("/data/x.h5"))
    ('/group/images', '')
    """
    name = "" if is_remote(path) else _split_edges(path)[1].strip("/")
    return f"/{name}" if name else ""


def with_inner(file: Path, dataset: str) -> Path:
    """Return where a dataset is; the file, where that has but one and its name is empty.

    >>> with_inner(Path("/data/x.h5"), "/images"), with_inner(Path("/data/x.npy"), "")
    (PosixPath('/data/x.h5::/images'), PosixPath('/data/x.npy'))
    """
    return Path(f"{file}::{dataset}") if dataset else file


def _split_edges(path: Path) -> tuple[str, str]:
    text = os.fspath(path)
    found = IN_FILE.fullmatch(text)
    return (found[1], found[2] or "") if found else (text, "")
