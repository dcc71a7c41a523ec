"""Dataset locations: a path, a dataset within an HDF5 file (``FILE.h5::/images``), or a URL."""

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

# The path of an HDF5 file, and the name of a dataset within it.
IN_FILE: Final = re.compile(r"(.*?\.(?:h5|hdf5))(?:::(.*))?", re.DOTALL | re.IGNORECASE)
URL: Final = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
FILE_SCHEME: Final = "file://"


def parse_location(text: str | os.PathLike[str]) -> Path:
    """Return the normalized absolute location of a dataset: a path, or a name in a store.

    A URL of a store becomes a `upath.UPath`; only the naming methods that it shares with
    `pathlib.Path` are used.

    Raises
    ------
    UsageError
        If no installed package supports the URL's protocol.

    Examples
    --------
    >>> parse_location("/data/../x.h5::images/"), parse_location("file:///x.npy")
    (PosixPath('/x.h5::/images'), PosixPath('/x.npy'))
    >>> str(parse_location("memory://bucket/x.zarr"))
    'memory://bucket/x.zarr'
    """
    path = str(text).removeprefix(FILE_SCHEME)
    if not URL.match(path):
        local = Path(path)
        return with_inner(Path(os.path.abspath(container_of(local))), inner_name(local))
    try:
        from upath import UPath

        location = UPath(path)
        _ = location.fs
    except (ImportError, ValueError) as error:  # missing package, or unknown protocol
        raise UsageError(
            f"{path} cannot be reached: {error}",
            "in a clone of fastvgg: pip install '.[zarr]', and s3fs for s3:// or gcsfs for gs://",
        ) from None
    return cast("Path", location)


def is_remote(path: Path) -> bool:
    """Whether a dataset is in an object store rather than on a file system.

    >>> is_remote(parse_location("memory://bucket/x.zarr")), is_remote(Path("x.zarr"))
    (True, False)
    """
    return not isinstance(path, Path)


def container_of(path: Path) -> Path:
    """Return the file that contains a dataset: the path itself, except within an HDF5 file.

    >>> container_of(Path("/data/x.h5::/group/images")), container_of(Path("/data/x.npy"))
    (PosixPath('/data/x.h5'), PosixPath('/data/x.npy'))
    """
    return path if is_remote(path) else Path(_split(path)[0])


def sidecar_path(path: Path, suffix: str) -> Path:
    """Return the path of a sidecar file: that of the dataset's file plus a suffix.

    >>> sidecar_path(Path("/data/x.h5::/images"), ".partial")
    PosixPath('/data/x.h5.partial')
    """
    file = container_of(path)
    return file.with_name(file.name + suffix)


def inner_name(path: Path) -> str:
    """Return the name of a dataset within its file, or "" if the location has none.

    >>> inner_name(Path("/data/x.h5::group/images")), inner_name(Path("/data/x.h5"))
    ('/group/images', '')
    """
    name = "" if is_remote(path) else _split(path)[1].strip("/")
    return f"/{name}" if name else ""


def with_inner(file: Path, dataset: str) -> Path:
    """Return the location of a dataset within a file; the file itself if the name is empty.

    >>> with_inner(Path("/data/x.h5"), "/images"), with_inner(Path("/data/x.npy"), "")
    (PosixPath('/data/x.h5::/images'), PosixPath('/data/x.npy'))
    """
    return Path(f"{file}::{dataset}") if dataset else file


def _split(path: Path) -> tuple[str, str]:
    text = os.fspath(path)
    match = IN_FILE.fullmatch(text)
    return (match[1], match[2] or "") if match else (text, "")
