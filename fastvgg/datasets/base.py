"""The small interface that every format has: Header, Source, Target."""

from __future__ import annotations

import errno
import math
import os
import stat
from contextlib import contextmanager
from dataclasses import dataclass
from typing import (
    TYPE_CHECKING,
    Any,
    Final,
    NamedTuple,
    Protocol,
    TypeAlias,
    runtime_checkable,
)

import numpy as np

from fastvgg.errors import SourceError, StoppedError
from fastvgg.storage import objects
from fastvgg.storage.location import is_remote
from fastvgg.transform import storage_dtype

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path
    from typing import BinaryIO

    from numpy.typing import NDArray

    from fastvgg.transform import Layout

__all__ = [
    "MAX_ELEMENTS",
    "READ_FLAGS",
    "SHOWN_CHARACTERS",
    "ArraySource",
    "Chunk",
    "Header",
    "ImageRecord",
    "PartialPages",
    "Payload",
    "SharedTarget",
    "Source",
    "Target",
    "bytes_of",
    "changed_during_run_error",
    "check_array",
    "inner_chunk_images",
    "open_regular",
    "open_sidecar",
    "read_at",
    "read_copy",
    "read_regular",
    "read_sidecar",
]


# 4 MiB are encoded at two thirds of the speed of 8, and more at hardly any more.
INNER_CHUNK_BYTES: Final = 8 * 1024 * 1024
MAX_ELEMENTS: Final = 2**63 - 1
SHOWN_CHARACTERS: Final = 100  # of a shape, which may be anything
READ_FLAGS: Final = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)
NO_LINKS: Final = getattr(os, "O_NOFOLLOW", 0)


def open_regular(path: Path) -> BinaryIO:
    """Open a file to read; refuse directories, sockets, and pipes, which would wait for ever.

    Or an object of a store.

    Raises
    ------
    OSError
        As the system gives it, or saying what the path is if not a file.
    """
    if is_remote(path):
        return objects.opened(path)
    descriptor = os.open(path, READ_FLAGS)
    try:
        _check_regular(os.fstat(descriptor))
    except OSError:
        os.close(descriptor)
        raise
    return os.fdopen(descriptor, "rb")


def read_regular(path: bytes, max_bytes: int) -> tuple[bytes, os.stat_result]:
    """Read a whole file; refuse links, and what `open_regular` refuses.

    Returns
    -------
    tuple
        What it holds, and its status before it was read.

    Raises
    ------
    OSError
        As the system gives it, with ELOOP for a link; or saying what the path is if not a file, and
        how long a file is that is longer than `max_bytes`.
    """
    descriptor = os.open(path, READ_FLAGS | NO_LINKS)
    try:
        status = os.fstat(descriptor)
        _check_regular(status)
        if status.st_size > max_bytes:
            raise OSError(f"it has {status.st_size} bytes, and an image at most {max_bytes}")
        return read_at(descriptor, status.st_size, 0), status
    finally:
        os.close(descriptor)


def read_at(descriptor: int, count: int, at: int) -> bytes:
    """Read so many bytes, fewer only at the end of the file."""
    data = os.pread(descriptor, count, at)
    while 0 < len(data) < count:
        more = os.pread(descriptor, count - len(data), at + len(data))
        if not more:
            break
        data += more
    return data


def _check_regular(status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        is_directory = stat.S_ISDIR(status.st_mode)
        raise OSError("it is a directory" if is_directory else "it is not a file")


@contextmanager
def open_sidecar(path: Path) -> Iterator[BinaryIO | None]:
    """Open what lies beside a dataset: its index, manifest or journal; None if it is missing.

    Raises
    ------
    SourceError
        If it is there and cannot be read.
    """
    try:
        file = open_regular(path)
    except (FileNotFoundError, NotADirectoryError):
        file = None
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise _unreadable(path, error) from None
        file = None
    if file is None:
        yield None
        return
    with file:
        try:
            with objects.os_errors():
                yield file
        except OSError as error:
            raise _unreadable(path, error) from None


def _unreadable(path: Path, error: OSError) -> SourceError:
    return SourceError(f"{path} cannot be read: {error.strerror or error}", "check its permissions")


def read_sidecar(path: Path, at_most: int = -1) -> bytes | None:
    """Return what a file beside a dataset holds; None if it is missing.

    Of a long one no more than the first `at_most` bytes.

    Raises
    ------
    SourceError
        If it is there and cannot be read.
    """
    with open_sidecar(path) as file:
        # Memory is taken for all that is asked for, however short the file is.
        if file is None:
            return None
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        return file.read(min(at_most, size))


def changed_during_run_error(path: str) -> StoppedError:
    """Return the error that says so of an image, or a shard, that is read."""
    return StoppedError(
        f"{path} changed after the run was planned: the result may be a mixture",
        "let it be still, and run again with --restart",
    )


def inner_chunk_images(image_bytes: int) -> int:
    """Return how many images are best stored so that they can be read without others.

    >>> inner_chunk_images(602_112)
    13
    """
    return max(1, INNER_CHUNK_BYTES // image_bytes)


def check_array(path: Path, shape: tuple[int, ...]) -> None:
    """Refuse an array whose shape is not that of images.

    Raises
    ------
    SourceError
        With the shape, and that of a dataset.
    """
    shown = str(shape)[:SHOWN_CHARACTERS]
    if len(shape) != 4:
        raise SourceError(
            f"{path} has shape {shown}, of rank {len(shape)}",
            "a dataset has rank 4, (images, height, width, 3) or (images, 3, height, width): "
            "for one image write array[numpy.newaxis]",
        )
    if math.prod(shape) == 0:
        raise SourceError(f"{path} has shape {shown}: no images", "give images")
    if math.prod(shape) > MAX_ELEMENTS:
        raise SourceError(
            f"{path} has shape {shown}, of more numbers than there can be in an array",
            "it is damaged: get it again",
        )


def bytes_of(batch: NDArray[Any]) -> memoryview:
    """Return the bytes of a contiguous batch, of any type, where they lie."""
    return batch.view(np.uint8).reshape(-1).data


@dataclass(frozen=True)
class Header:
    """What a dataset holds, known without reading its pixels.

    >>> header = Header((10, 5, 7, 3), "float32", "NHWC")
    >>> header.images, header.image_bytes, header.nbytes
    (10, 420, 4200)
    """

    shape: tuple[int, ...]
    dtype: str
    layout: Layout

    @property
    def images(self) -> int:
        """How many images there are."""
        return self.shape[0]

    @property
    def image_bytes(self) -> int:
        """How many bytes one image takes."""
        return math.prod(self.shape[1:]) * storage_dtype(self.dtype).itemsize

    @property
    def nbytes(self) -> int:
        """How many bytes all images take."""
        return self.images * self.image_bytes


class ImageRecord(NamedTuple):
    """What is known of one image: where it came from, its size, whether it could be read."""

    path: str
    """Relative to the source, with forward slashes."""
    label: str
    """The first folder of the path, or what a tar's .cls file says."""
    width: int
    height: int
    failed: bool
    """Whether the image could not be read, so that its row is zeros."""
    reason: str
    """Why; or what a decoder warned of, and read it all the same."""


class Chunk(NamedTuple):
    """Some images of a source, as they were read."""

    batch: NDArray[Any]
    """Memory of its own, which stays valid while it is held."""
    records: list[ImageRecord]
    """What is known of each image; empty where the source is an array that never had names."""


Payload: TypeAlias = "Sequence[bytes | memoryview]"
"""What is written of some images: the bytes of a batch, or a file for each image."""


PartialPages: TypeAlias = "list[tuple[int, bytes]]"
"""Bytes, and where in its file each piece of them belongs."""


class Source(Protocol):
    """A dataset that is read."""

    kind: str
    path: Path
    header: Header
    stored_bytes: int
    """Bytes on disk."""
    settings: dict[str, Any]
    """What else decides the pixels, as JSON types."""
    notes: list[str]
    """What a person should know before the run."""
    read_granularity: int
    """How many images are stored as one piece, to be read once and whole."""
    records: Sequence[ImageRecord]
    """What is known of every image without reading it; empty where that is nothing."""

    def fingerprint(self) -> str:
        """Return a hash that changes when the source does, as it is now."""

    def read(self, start: int, stop: int) -> Chunk:
        """Read the images `start` to `stop`."""

    def close(self) -> None:
        """Let go of files and threads."""


class ArraySource(Source, Protocol):
    """An array that is read."""

    def read_into(self, start: int, out: NDArray[Any]) -> None:
        """Read as many images as `out` has, from row `start` on; many threads may."""


def read_copy(source: ArraySource, start: int, stop: int) -> Chunk:
    """Return images of an array in memory of their own."""
    shape = (stop - start, *source.header.shape[1:])
    batch = np.empty(shape, storage_dtype(source.header.dtype))
    source.read_into(start, batch)
    return Chunk(batch, [*source.records[start:stop]])


class Target(Protocol):
    """A dataset that is written, under a temporary name until it is published."""

    kind: str
    path: Path
    header: Header
    partial: Path
    """The name while unfinished."""

    def create(self) -> None:
        """Start from nothing: make the partial and reserve its space."""

    def reopen(self) -> None:
        """Go on with the partial that is there, after checking that it can be ours."""

    def offset(self, start: int) -> int:
        """Return where in its file a row begins; 0 where rows have files of their own.

        Memory that lies so within a page may be written without a copy.
        """

    def write(self, start: int, stored: Payload) -> None:
        """Write what is stored of the images from row `start` on."""

    def sync(self) -> None:
        """Make everything that is written survive a power cut, while more may be being written."""

    def read_unfinished(self, start: int, stop: int) -> Payload | None:
        """Read what is stored of some images that an unfinished run committed.

        None where the journal is believed without a look.
        """

    def read_stored(self, start: int, stop: int) -> Payload:
        """Read what is stored of some images of the published target."""

    def read_back(self, start: int, stop: int) -> NDArray[Any]:
        """Read images of the published target."""

    def publish(self) -> None:
        """Give the finished partial its name, at once and durably."""

    def close(self) -> None:
        """Let go of files."""


@runtime_checkable
class SharedTarget(Target, Protocol):
    """A target that many processes write at once, each a part."""

    def attach(self) -> None:
        """Write some of what another process has begun, after checking that it can be that."""

    def write_aligned(self, start: int, stored: Payload) -> PartialPages:
        """Write the same where others write, on other machines as well; return what is left.

        That shares a page with what others write, and one process writes all of it: by
        `write_unaligned`.
        """

    def write_unaligned(self, edges: PartialPages) -> None:
        """Write what `write_aligned` left, of any rows."""
