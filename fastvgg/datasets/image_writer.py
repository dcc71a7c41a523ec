"""Image files that are written, one for each row, on all cores: PNG, WebP without loss, or JPEG."""

from __future__ import annotations

import io
import itertools
import os
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias, get_args

import numpy as np
import simplejpeg
from PIL import Image

from fastvgg.datasets.base import open_regular
from fastvgg.datasets.packed import first_repeated, name_hashes
from fastvgg.errors import ResumeError, SourceError, TargetError, UsageError
from fastvgg.imaging.decode import DECODING_ERRORS, describe_error, open_image
from fastvgg.storage.location import sidecar_path

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from numpy.typing import NDArray

    from fastvgg.datasets.base import Header, ImageRecord, Payload
    from fastvgg.storage.local import Storage

__all__ = ["FileFormat", "ImageFolderTarget", "check_format", "is_lossy"]

FileFormat: TypeAlias = Literal["png", "jpeg", "webp"]

ENDINGS: Final[dict[str, str]] = {"png": ".png", "jpeg": ".jpg", "webp": ".webp"}
MAX_SIDES: Final = {"png": 2**31 - 1, "jpeg": 65_500, "webp": 16_383}
MAX_NAME_BYTES: Final = 255
JPEG_QUALITY: Final = 95


def check_format(name: str, height: int, width: int) -> None:
    """Refuse a format that there is not, or that images of a size do not fit into.

    Raises
    ------
    UsageError, TargetError
        Saying which there are, or which do fit.
    """
    if name not in get_args(FileFormat):
        raise UsageError(f"format is {name!r}", f"give one of {', '.join(get_args(FileFormat))}")
    if max(height, width) > MAX_SIDES[name]:
        raise TargetError(
            f"images of {height}x{width} do not fit into {name}, whose longest side is "
            f"{MAX_SIDES[name]}",
            "give --format png",
        )


def is_lossy(name: str) -> bool:
    """Whether the images that are read back are others than those that were written."""
    return name == "jpeg"


class ImageFolderTarget:
    """A directory of image files, one for each row, named by the records where there are any.

    A row that failed in the source has no file. While unfinished, the directory has another name.

    Parameters
    ----------
    path
        The directory that the images get when they are complete.
    header
        What will be in it: uint8 images, NHWC.
    storage
        What carries out the system calls.
    records
        One for each row, or none: then files are named by row.
    file_format
        "png" and "webp" give back what was written; "jpeg" is lossy.

    Raises
    ------
    SourceError
        If the records name a file twice.
    TargetError
        If a file's name would be too long.
    """

    kind = "images"

    def __init__(
        self,
        path: Path,
        header: Header,
        storage: Storage,
        records: Sequence[ImageRecord] = (),
        file_format: FileFormat = "png",
    ) -> None:
        self.path = path
        self.header = header
        self.partial = sidecar_path(path, ".partial")
        self._storage = storage
        self._records = records
        self._format = file_format
        self._times = _suffix_repeats(self._paths, ENDINGS[file_format]) if records else 0
        self._made: Path | None = None
        self._syncs_each = False

    def _paths(self) -> Iterator[str]:
        return (record.path for record in self._records)

    def create(self) -> None:
        """Make the empty directory."""
        self._storage.remove(self.partial)
        self._storage.make_directory(self.partial)
        self._storage.sync_directory(self.path.parent)
        self._syncs_each = not self._storage.has_syncfs(self.partial)

    def reopen(self) -> None:
        """Go on with the directory that is there."""
        if not self.partial.is_dir():
            raise ResumeError(f"{self.partial} is gone", "start again with --restart")
        self._syncs_each = not self._storage.has_syncfs(self.partial)

    def encode(self, image: NDArray[np.uint8]) -> bytes:
        """Return an image's file; many threads may."""
        if self._format == "jpeg":
            encoded: bytes = simplejpeg.encode_jpeg(
                image, quality=JPEG_QUALITY, colorsubsampling="444"
            )
            return encoded
        written = io.BytesIO()
        options = {"lossless": True} if self._format == "webp" else {}
        Image.fromarray(image).save(written, self._format, **options)
        return written.getvalue()

    def offset(self, start: int) -> int:  # noqa: ARG002  # a row's file begins with it
        """Return 0."""
        return 0

    def write(self, start: int, stored: Payload) -> None:
        """Write the files of some rows, of which those that failed are empty and have none."""
        for name, data in zip(self._names(start, start + len(stored)), stored, strict=True):
            if not len(data):
                continue
            path = self.partial / name
            if path.parent != self._made:
                self._storage.make_directory(path.parent)
                self._made = path.parent
            file = self._storage.create(path)
            try:
                self._storage.write(file, data, 0)
                if self._syncs_each:
                    self._storage.sync(file)
            finally:
                self._storage.close(file)

    def sync(self) -> None:
        """Make the files written so far survive a power cut, and their names."""
        self._storage.syncfs(self.partial)

    def read_unfinished(self, start: int, stop: int) -> Payload | None:  # noqa: ARG002
        """Return None: what is committed was synced."""
        return None

    def read_stored(self, start: int, stop: int) -> Payload:
        """Read the files of some rows; a row that failed has none."""
        return [b"" if name is None else self._content(name) for name in self._files(start, stop)]

    def read_back(self, start: int, stop: int) -> NDArray[Any]:
        """Decode rows of the published directory; a row that failed is zeros."""
        batch = np.zeros((stop - start, *self.header.shape[1:]), np.uint8)
        for image, name in zip(batch, self._files(start, stop), strict=True):
            if name is None:
                continue
            try:
                with open_image(io.BytesIO(self._content(name))) as decoded:
                    image[...] = np.asarray(decoded)
            except DECODING_ERRORS as error:
                raise self._unreadable(name, error) from None
        return batch

    def _content(self, name: str) -> bytes:
        try:
            with open_regular(self.path / name) as file:
                return file.read()
        except OSError as error:
            raise self._unreadable(name, error) from None

    def _unreadable(self, name: str, error: BaseException) -> SourceError:
        return SourceError(
            f"{self.path / name} cannot be read: {describe_error(error)}",
            "restore the dataset again",
        )

    def publish(self) -> None:
        """Rename the complete directory to its name."""
        self._storage.rename(self.partial, self.path)
        self._storage.sync_directory(self.path.parent)

    def close(self) -> None:
        """Nothing stays open."""

    def _files(self, start: int, stop: int) -> Iterator[str | None]:
        """Return the name of each row's file; None where the row failed."""
        names = self._names(start, stop)
        if not self._records:
            return names
        records = self._records[start:stop]
        return (
            None if record.failed else name for name, record in zip(names, records, strict=True)
        )

    def _names(self, start: int, stop: int) -> Iterator[str]:
        ending = ENDINGS[self._format]
        if not self._records:
            return (f"{row:08d}{ending}" for row in range(start, stop))
        paths = (record.path for record in self._records[start:stop])
        return (_named(path, ending, self._times) for path in paths)


def _checked(name: str) -> bytes:
    """Return the bytes of a file's name; refuse one that is too long for a disk."""
    encoded = os.fsencode(name)
    if len(encoded) > MAX_NAME_BYTES and max(map(len, encoded.split(b"/"))) > MAX_NAME_BYTES:
        raise TargetError(
            f"the file {name!r} would have a name of more than {MAX_NAME_BYTES} bytes",
            "leave the index away, so that files are named by their rows",
        )
    return encoded


def _named(path: str, ending: str, times: int) -> str:
    """Return a path with its end replaced, or with the ending so many times behind it."""
    if times:
        return path + ending * times
    folder, slash, name = path.rpartition("/")
    stem = name.rpartition(".")[0] or name
    return folder + slash + stem + ending


def _suffix_repeats(paths: Callable[[], Iterable[str]], ending: str) -> int:
    """Return how many endings are put behind all paths; 0 where theirs can be replaced.

    They cannot where two paths differ only in how they end, or a file would take a folder's name.

    >>> _suffix_repeats(lambda: ["cat/a.jpg", "cat/b.jpg"], ".png")
    0
    >>> _suffix_repeats(lambda: ["a.jpg", "a.bmp"], ".png")
    1
    """
    repeated = first_repeated(os.fsencode(path) for path in paths())
    if repeated is not None:
        path = next(itertools.islice(paths(), repeated[0], None))
        raise SourceError(f"the index names {path!r} twice", "put back the index as it was written")
    folders = np.unique(
        name_hashes(
            os.fsencode(str(folder)) for path in paths() for folder in PurePosixPath(path).parents
        )
    )
    times = 0
    while True:
        names = name_hashes(_checked(_named(path, ending, times)) for path in paths())
        if len(np.unique(names)) == len(names) and not np.isin(names, folders).any():
            return times
        times += 1
