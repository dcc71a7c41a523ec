"""Dataset locations: a path, a dataset within an HDF5 file (``FILE.h5::/images``), or a URL."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Final, cast

from fastvgg.errors import UsageError

# The path of an HDF5 file, and the name of a dataset within it.
HDF5_LOCATION: Final = re.compile(r"(.*?\.(?:h5|hdf5))(?:::(.*))?", re.DOTALL | re.IGNORECASE)
URL_PATTERN: Final = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
FILE_SCHEME: Final = "file://"


@dataclass(frozen=True)
class Location:
    """The location of a dataset, parsed once from the text that the user gave."""

    container: Path
    """The file or directory, absolute and normalized. In a store it is a `upath.UPath`; only the
    naming methods that it shares with `pathlib.Path` are used."""
    inner: str = ""
    """Name of the dataset within an HDF5 file, like "/images"; empty if the location has none."""

    @classmethod
    def parse(cls, text: str | os.PathLike[str]) -> Location:
        """Parse a path or a URL; a `upath.UPath` of a store is used as it is, with its options.

        Raises
        ------
        UsageError
            If it is empty, not a path, or a URL whose protocol no installed package supports.

        Examples
        --------
        >>> Location.parse("/data/../x.h5::images/")
        Location(container=PosixPath('/x.h5'), inner='/images')
        >>> str(Location.parse("file:///x.npy")), str(Location.parse("memory://bucket/x.zarr"))
        ('/x.npy', 'memory://bucket/x.zarr')
        """
        if isinstance(text, Location):
            return text
        if hasattr(text, "fs") and not isinstance(text, Path):  # a UPath
            return cls(cast("Path", text))
        try:
            path = os.fsdecode(text)
        except TypeError:
            raise UsageError(f"{text!r} is not a path", "give a string or a path") from None
        path = path.removeprefix(FILE_SCHEME)
        if URL_PATTERN.match(path):
            return cls(_parse_url(path))
        match = HDF5_LOCATION.fullmatch(path)
        file, name = (match[1], match[2] or "") if match else (path, "")
        if not file or "\0" in file:
            raise UsageError(f"{path!r} is not a path", "give the path of a dataset")
        inner = str(PurePosixPath("/", name.strip("/")))
        return cls(Path(os.path.abspath(file)), "" if inner == "/" else inner)

    @property
    def is_remote(self) -> bool:
        """Whether the dataset is in an object store rather than on a file system."""
        return is_remote(self.container)

    def with_inner(self, name: str) -> Location:
        """Return the location of a dataset in the same container.

        >>> str(Location(Path("/data/x.h5")).with_inner("/images"))
        '/data/x.h5::/images'
        """
        return replace(self, inner=name)

    def __fspath__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        return f"{self.container}::{self.inner}" if self.inner else str(self.container)


def is_remote(path: Path) -> bool:
    """Whether a path names an object of a store; see `Location.container`.

    >>> is_remote(Location.parse("memory://bucket/x.zarr").container), is_remote(Path("x.zarr"))
    (True, False)
    """
    return not isinstance(path, Path)


def sidecar_path(container: Path, suffix: str) -> Path:
    """Return the path of a sidecar file: that of the dataset's container plus a suffix.

    >>> sidecar_path(Path("/data/x.h5"), ".partial")
    PosixPath('/data/x.h5.partial')
    """
    return container.with_name(container.name + suffix)


def temporary_path(path: Path) -> Path:
    """Return the path of a file that is written to replace `path` atomically."""
    return sidecar_path(path, ".tmp")


def _parse_url(url: str) -> Path:
    try:
        from upath import UPath

        path = UPath(url)
        _ = path.fs
    except (ImportError, ValueError) as error:  # missing package, or unknown protocol
        raise UsageError(
            f"{url} cannot be reached: {error}",
            "in a clone of fastvgg: pip install '.[zarr]', and s3fs for s3:// or gcsfs for gs://",
        ) from None
    return cast("Path", path)
