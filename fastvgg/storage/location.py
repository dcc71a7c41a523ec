"""Dataset locations: a path, a dataset within an HDF5 file (``FILE::/images``), or a URL."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Final, cast

from fastvgg.errors import SourceError, UsageError

# The path of an HDF5 file, and the name of a dataset within it. What has another suffix can be an
# HDF5 file, too (.mat, .nc); then the name must begin with a slash.
HDF5_LOCATION: Final = re.compile(r"(.*?\.(?:h5|hdf5))(?:::(.*))?", re.DOTALL | re.IGNORECASE)
NAMED_LOCATION: Final = re.compile(r"(.+?)::(/.*)", re.DOTALL)
URL_PATTERN: Final = re.compile(
    r"(?:[a-z0-9_-]+::)*([a-z][a-z0-9+._-]*)://", re.DOTALL | re.IGNORECASE
)
FILE_SCHEMES: Final = re.compile(r"(?:file|local)://(?:localhost(?=/))?", re.IGNORECASE)
# The packages of the stores whose objects can be listed, read in parts and written.
STORE_PACKAGES: Final = {
    **dict.fromkeys(("s3", "s3a"), "s3fs"),
    **dict.fromkeys(("gs", "gcs"), "gcsfs"),
    **dict.fromkeys(("az", "abfs", "abfss"), "adlfs"),
    "hf": "huggingface_hub",
    "memory": "",
}
ARCHIVE_SCHEMES: Final = ("zip", "tar", "libarchive")


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
            If it is empty or not a path.
        SourceError
            If it is a URL that is not of a store, or whose package is not installed; or if it is
            relative, and the current directory was removed.

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
            _check_scheme(str(text))
            return cls(cast("Path", text))
        try:
            path = os.fsdecode(text)
        except TypeError:
            raise UsageError(
                f"got {type(text).__name__}, which is not a path", "give a string or a path"
            ) from None
        path = FILE_SCHEMES.sub("", path, count=1) if FILE_SCHEMES.match(path) else path
        if URL_PATTERN.match(path):
            return cls(_parse_url(path))
        match = HDF5_LOCATION.fullmatch(path) or NAMED_LOCATION.fullmatch(path)
        file, name = (match[1], match[2] or "") if match else (path, "")
        if not file or "\0" in file:
            raise UsageError(f"{path!r} is not a path", "give the path of a dataset")
        inner = str(PurePosixPath("/", name.strip("/")))
        try:
            container = Path(os.path.abspath(file))
        except FileNotFoundError:
            raise SourceError(
                f"{file} is relative to the current directory, which does not exist any more",
                "change to a directory that exists, or give an absolute path",
            ) from None
        return cls(container, "" if inner == "/" else inner)

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


def _check_scheme(url: str) -> str:
    """Return the scheme of a URL, after checking that it is that of a store."""
    match = URL_PATTERN.match(url)
    scheme = match[1].lower() if match else ""
    if scheme in STORE_PACKAGES and "::" not in url.partition("://")[0]:
        return scheme
    if scheme in ARCHIVE_SCHEMES:
        raise SourceError(
            f"{url}: an array within an archive is not read",
            "unpack it, and give the directory: unzip FILE.zarr.zip -d FILE.zarr",
        )
    raise SourceError(
        f"{url}: {scheme}:// is not a store of arrays, such as s3:// or gs://",
        "download it, and give the local path",
    )


def _parse_url(url: str) -> Path:
    scheme = _check_scheme(url)
    try:
        from upath import UPath

        path = UPath(url)
        _ = path.fs
    except (ImportError, ValueError) as error:  # missing package, or invalid
        packages = " ".join(filter(None, ("'.[zarr]'", STORE_PACKAGES[scheme])))
        raise SourceError(
            f"{url} cannot be reached: {error}", f"in a clone of fastvgg: pip install {packages}"
        ) from None
    if not path.path.strip("/"):
        raise UsageError(f"{url} names no dataset in a store", "give a name: URL/NAME.zarr")
    return cast("Path", path)
