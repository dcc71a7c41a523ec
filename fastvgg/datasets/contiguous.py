"""An array that is written into one piece of a file, at fixed offsets into reserved space."""

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
    """A file of some first bytes and, after them, an array.

    Parameters
    ----------
    path
        The name that the file gets when it is complete.
    header
        What the array will hold.
    storage
        What carries out the system calls.
    start
        The first bytes, which say what the array is.
    """

    kind: str

    def __init__(self, path: Path, header: Header, storage: Storage, start: bytes) -> None:
        self.path = path
        self.header = header
        self.partial = sidecar_path(path, ".partial")
        self._storage = storage
        self._file: StoredFile | None = None
        self._start = start
        self.stored_bytes = len(start) + header.nbytes

    @abstractmethod
    def published(self) -> ArraySource:
        """Open the published file."""

    def create(self) -> None:
        """Make the partial, reserve all of its space, and write its first bytes."""
        self._storage.remove(self.partial)
        self._file = self._storage.create(self.partial)
        self._file = self._storage.direct(self._file)
        try:
            self._storage.reserve(self._file, self.stored_bytes)
        except TargetError:
            self.close()
            self._storage.remove(self.partial)
            raise
        self._storage.write(self._file, self._start, 0)
        self._storage.sync_directory(self.path.parent)

    def reopen(self) -> None:
        """Go on with the partial; refuse one that cannot be ours."""
        if not self.partial.exists():
            raise ResumeError(f"{self.partial} is gone", "start again with --restart")
        self._file = self._storage.open(self.partial)
        self._file = self._storage.direct(self._file)
        found_bytes = self._storage.size(self._file)
        if found_bytes != self.stored_bytes:
            raise ResumeError(
                f"{self.partial} has {found_bytes} bytes, and the unfinished run reserved "
                f"{self.stored_bytes}",
                "it was changed in between: start again with --restart",
            )

    def attach(self) -> None:
        """Open the partial that another process has made."""
        self.reopen()

    def offset(self, start: int) -> int:
        """Return where in the file a row begins."""
        return len(self._start) + start * self.header.image_bytes

    def write(self, start: int, stored: Payload) -> None:
        """Write rows where they belong."""
        offset = self.offset(start)
        for data in stored:
            self._storage.write(self._open(), data, offset)
            offset += len(data)

    def write_aligned(self, start: int, stored: Payload) -> PartialPages:
        """Write the whole pages of some rows where they belong; return what lies before and after.

        Two machines that write parts of one page may each write what they know of the other's.
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
        """Write what `write_aligned` left."""
        for offset, data in edges:
            self._storage.write(self._open(), data, offset)

    def read_partial(self, start: int, out: NDArray[Any]) -> None:
        """Read rows of the partial into `out`, from row `start` on."""
        offset = self.offset(start)
        for image in out:
            data = self._storage.read(self._open(), offset, self.header.image_bytes)
            image[...] = np.frombuffer(data, out.dtype).reshape(image.shape)
            offset += len(data)

    def sync(self) -> None:
        """Make the rows written so far survive a power cut."""
        self._storage.sync(self._open())

    def read_unfinished(self, start: int, stop: int) -> Payload | None:  # noqa: ARG002
        """Return None: what is committed was synced in its place."""
        return None

    def read_stored(self, start: int, stop: int) -> Payload:
        """Read rows of the published file."""
        return [bytes_of(self.read_back(start, stop))]

    def read_back(self, start: int, stop: int) -> NDArray[Any]:
        """Read rows of the published file."""
        source = self.published()
        with contextlib.closing(source):
            if source.header != self.header:
                raise SourceError(
                    f"{self.path} holds {source.header.shape} of {source.header.dtype}, and was "
                    f"written as {self.header.shape} of {self.header.dtype}",
                    "it was changed since: make it again from its source",
                )
            return source.read(start, stop).batch

    def publish(self) -> None:
        """Rename the complete partial to its name."""
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
            raise RuntimeError(f"{self.partial} is written before it is created or reopened")
        return self._file
