"""Write a contiguous array into preallocated space of a file, at fixed offsets."""

from __future__ import annotations

import contextlib
import mmap
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import numpy as np

from fastvgg.datasets.base import bytes_of
from fastvgg.errors import ResumeError, SourceError, TargetError
from fastvgg.storage.location import sidecar_path

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from fastvgg.datasets.base import ArraySource, Header, PartialPages, Payload
    from fastvgg.storage.local import Storage, StoredFile

__all__ = ["ContiguousTarget"]


class ContiguousTarget(ABC):
    """A file that consists of a preamble followed by an array.

    Parameters
    ----------
    path
        The path of the published file.
    header
        Shape, dtype and layout of the array.
    storage
        Performs the system calls.
    preamble
        The bytes before the array, which describe it in the file's format.
    """

    kind: str

    def __init__(self, path: Path, header: Header, storage: Storage, preamble: bytes) -> None:
        self.path = path
        self.header = header
        self.partial = sidecar_path(path, ".partial")
        self._storage = storage
        self._file: StoredFile | None = None
        self._preamble = preamble
        self.stored_bytes = len(preamble) + header.nbytes

    @abstractmethod
    def published(self) -> ArraySource:
        """Open the published file."""

    def create(self) -> None:
        """Create the partial, reserve all of its space, and write the preamble."""
        self._storage.remove(self.partial)
        self._file = self._storage.create(self.partial)
        self._file = self._storage.direct(self._file)
        try:
            self._storage.reserve(self._file, self.stored_bytes)
        except TargetError:
            self.close()
            self._storage.remove(self.partial)
            raise
        self._storage.write(self._file, self._preamble, 0)
        self._storage.sync_directory(self.path.parent)

    def reopen(self) -> None:
        """Open the existing partial, after checking its size."""
        if not self.partial.exists():
            raise ResumeError(f"{self.partial} does not exist", "start over with --restart")
        self._file = self._storage.open(self.partial)
        self._file = self._storage.direct(self._file)
        actual_bytes = self._storage.size(self._file)
        if actual_bytes != self.stored_bytes:
            raise ResumeError(
                f"{self.partial} has {actual_bytes} bytes, but the unfinished run reserved "
                f"{self.stored_bytes}",
                "the file was changed in the meantime: start over with --restart",
            )

    def attach(self) -> None:
        """Open the partial that another process created."""
        self.reopen()

    def offset(self, start: int) -> int:
        """Return the offset of a row in the file."""
        return len(self._preamble) + start * self.header.image_bytes

    def write(self, start: int, stored: Payload) -> None:
        """Write rows at their offset."""
        offset = self.offset(start)
        for data in stored:
            self._storage.write(self._open(), data, offset)
            offset += len(data)

    def write_aligned(self, start: int, stored: Payload) -> PartialPages:
        """Write the whole pages of some rows, and return the partial pages at both ends.

        If two machines write to the same page, each may overwrite the other's part with stale data.
        """
        (data,) = stored
        begin = self.offset(start)
        pages = slice(-begin % mmap.PAGESIZE, len(data) - (begin + len(data)) % mmap.PAGESIZE)
        if pages.start >= pages.stop:
            return [(begin, bytes(data))]
        self._storage.write(self._open(), memoryview(data)[pages], begin + pages.start)
        edges = (begin, data[: pages.start]), (begin + pages.stop, data[pages.stop :])
        return [(offset, bytes(edge)) for offset, edge in edges if len(edge)]

    def write_unaligned(self, edges: PartialPages) -> None:
        """Write partial pages that `write_aligned` returned."""
        for offset, data in edges:
            self._storage.write(self._open(), data, offset)

    def read_partial(self, start: int, out: NDArray[Any]) -> None:
        """Fill `out` with rows of the partial, starting at row `start`."""
        offset = self.offset(start)
        for image in out:
            data = self._storage.read(self._open(), offset, self.header.image_bytes)
            image[...] = np.frombuffer(data, out.dtype).reshape(image.shape)
            offset += len(data)

    def sync(self) -> None:
        """Make the rows written so far durable."""
        self._storage.sync(self._open())

    def read_unfinished(self, start: int, stop: int) -> Payload | None:  # noqa: ARG002
        """Return None: committed rows were synced in place."""
        return None

    def read_stored(self, start: int, stop: int) -> Payload:
        """Return the bytes of rows of the published file."""
        return [bytes_of(self.read_back(start, stop))]

    def read_back(self, start: int, stop: int) -> NDArray[Any]:
        """Read rows of the published file."""
        source = self.published()
        with contextlib.closing(source):
            if source.header != self.header:
                raise SourceError(
                    f"{self.path} contains {source.header.shape} of {source.header.dtype}, but was "
                    f"written as {self.header.shape} of {self.header.dtype}",
                    "the file was changed since then: recreate it from its source",
                )
            return source.read(start, stop).batch

    def publish(self) -> None:
        """Rename the complete partial to the published path."""
        self.close()
        self._storage.rename(self.partial, self.path)
        self._storage.sync_directory(self.path.parent)

    def close(self) -> None:
        """Close the partial."""
        if self._file is not None:
            self._storage.close(self._file)
            self._file = None

    def _open(self) -> StoredFile:
        if self._file is None:
            raise RuntimeError(f"{self.partial} must be created or reopened before it is written")
        return self._file
