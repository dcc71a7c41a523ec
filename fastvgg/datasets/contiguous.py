"""A contiguous C-ordered array in one file: reads and writes at fixed offsets."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import weakref
from abc import abstractmethod
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import xxhash

from fastvgg.datasets.base import ArraySource, DiskTarget, SharedTarget, byte_view
from fastvgg.datasets.files import open_regular
from fastvgg.errors import FastvggError, ResumeError, SourceError, StoppedError, TargetError, option
from fastvgg.storage.local import io_errors
from fastvgg.transform import storage_dtype

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from numpy.typing import NDArray

    from fastvgg.datasets.base import Header, PartialPages, Payload
    from fastvgg.storage.local import OpenFile, Storage
    from fastvgg.storage.location import Location

SAMPLE_COUNT: Final = 16
SAMPLE_BYTES: Final = 64 * 1024


class ContiguousSource(ArraySource):
    """An array at `_offset` in a file, which a format's own class finds and validates.

    The file is read, not memory-mapped: if it is truncated meanwhile, a read reports that, but the
    first access to a missing page of a mapping kills the process (SIGBUS).

    Raises
    ------
    SourceError
        If the file cannot be opened.
    """

    has_random_access = True
    _offset: int

    def __init__(self, location: Location) -> None:
        super().__init__(location)
        try:
            self._file = open_regular(self.path)
        except OSError as error:
            raise SourceError(
                f"{self.path} cannot be opened: {error.strerror or error}",
                "check its path and permissions",
            ) from None

    def fingerprint(self) -> str:
        """Return a hash of the file's current size, modification time and samples."""
        descriptor = self._file.fileno()
        status = os.fstat(descriptor)
        digest = xxhash.xxh3_128(f"{status.st_size} {status.st_mtime_ns}".encode())
        last = max(0, status.st_size - SAMPLE_BYTES)
        for step in range(SAMPLE_COUNT):
            offset = last * step // (SAMPLE_COUNT - 1)
            try:
                digest.update(os.pread(descriptor, SAMPLE_BYTES, offset))
            except OSError as error:
                raise self._read_error(error, offset) from error
        return digest.hexdigest()

    def prefetch(self, start: int, stop: int) -> None:
        if hasattr(os, "posix_fadvise"):
            begin, end = (self._offset + row * self.header.image_bytes for row in (start, stop))
            with contextlib.suppress(OSError):  # a kernel may be built without it
                os.posix_fadvise(self._file.fileno(), begin, end - begin, os.POSIX_FADV_WILLNEED)

    def read_into(self, start: int, out: NDArray[Any]) -> None:
        memory, offset = byte_view(out), self._offset + start * self.header.image_bytes
        while memory:
            try:
                count = os.preadv(self._file.fileno(), [memory], offset)
            except OSError as error:
                raise self._read_error(error, offset) from error
            if not count:
                raise self._truncated_error(offset)
            memory, offset = memory[count:], offset + count

    def close(self) -> None:
        self._file.close()

    def close_with_last_reference(self) -> None:
        """Close the file when the source is no longer referenced."""
        weakref.finalize(self, self._file.close)

    def _file_bytes(self) -> int:
        return os.fstat(self._file.fileno()).st_size

    def _truncated_error(self, offset: int) -> StoppedError:
        return self._read_error(OSError(errno.ENODATA, "the file was truncated"), offset)

    def _read_error(self, error: OSError, offset: int) -> StoppedError:
        return StoppedError.from_os_error(error, "read", str(self.path), offset)


class ContiguousTarget(DiskTarget, SharedTarget):
    """A file that consists of `preamble`, which describes the array, followed by the array.

    Its space is reserved before anything is written.
    """

    def __init__(self, path: Path, header: Header, storage: Storage, preamble: bytes) -> None:
        super().__init__(path, header, storage)
        self._file: OpenFile | None = None
        self.preamble = preamble
        self.stored_bytes = len(preamble) + header.nbytes
        self.is_extended = False
        """Whether `inspect_published` found bytes after the array, which are not fastvgg's."""
        self._has_other_header = False
        """Whether the published file is valid, but does not begin with `preamble`."""

    @abstractmethod
    def open_published(self) -> ArraySource:
        """Open the published file."""

    def create(self) -> None:
        self._storage.remove(self.partial)
        self._file = self._storage.create(self.partial)
        self._file = self._storage.direct(self._file)
        try:
            self._storage.reserve(self._file, self.stored_bytes)
        except TargetError:
            self.close()
            self._storage.remove(self.partial)
            raise
        self._storage.write(self._file, self.preamble, 0)
        self._storage.sync_directory(self.path.parent)

    def reopen(self) -> None:
        if not self.partial.exists():
            raise ResumeError(
                f"{self.partial} does not exist", f"start over with {option('restart')}"
            )
        self._file = self._storage.open(self.partial)
        self._file = self._storage.direct(self._file)
        actual_bytes = self._storage.size(self._file)
        if actual_bytes != self.stored_bytes:
            raise ResumeError(
                f"{self.partial} has {actual_bytes} bytes, but the unfinished run reserved "
                f"{self.stored_bytes}",
                f"the file was changed in the meantime: start over with {option('restart')}",
            )
        if self._storage.read(self._file, 0, len(self.preamble)) != self.preamble:
            self._storage.write(self._file, self.preamble, 0)
            self._storage.sync(self._file)

    def has_holes(self) -> bool:
        return self._storage.has_holes(self._open(), self.stored_bytes)

    def offset(self, start: int) -> int:
        return len(self.preamble) + start * self.header.image_bytes

    def write(self, start: int, stored: Payload) -> None:
        offset = self.offset(start)
        for data in stored:
            self._storage.write(self._open(), data, offset)
            offset += len(data)

    def write_aligned(self, start: int, stored: Payload) -> PartialPages:
        (data,) = stored
        begin = self.offset(start)
        pages = slice(-begin % mmap.PAGESIZE, len(data) - (begin + len(data)) % mmap.PAGESIZE)
        if pages.start >= pages.stop:
            return [(begin, bytes(data))]
        self._storage.write(self._open(), memoryview(data)[pages], begin + pages.start)
        edges = (begin, data[: pages.start]), (begin + pages.stop, data[pages.stop :])
        return [(offset, bytes(edge)) for offset, edge in edges if len(edge)]

    def write_unaligned(self, edges: PartialPages) -> None:
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
        self._storage.sync(self._open())

    def publish(self) -> None:
        """Give the partial its name, after checking that it is the file that was written."""
        self._storage.check_same(self._open())
        super().publish()

    def read_back(self, start: int, stop: int) -> NDArray[Any]:
        with contextlib.closing(self.open_published()) as source:
            self._check_published(source.header)
            return source.read(start, stop).batch

    def inspect_published(self) -> list[str]:
        with open_regular(self.path) as file:
            start, nbytes = file.read(len(self.preamble)), os.fstat(file.fileno()).st_size
        differences = []
        if start != self.preamble:
            # Another version, or another program, may have written an equivalent header.
            try:
                with contextlib.closing(self.open_published()) as source:
                    self._check_published(source.header)
            except FastvggError as error:
                reason = error.problem.removeprefix(f"{self.path} ")
                differences.append(f"its header differs: {reason}")
            else:
                self._has_other_header = True
                return []
        self.is_extended = nbytes > self.stored_bytes
        if nbytes != self.stored_bytes:
            state = "followed by other bytes" if self.is_extended else "truncated"
            differences.append(f"it is {state}: it has {nbytes} bytes, not {self.stored_bytes}")
        return differences

    def stored_spans(self, start: int, stop: int, max_bytes: int) -> Iterator[bytes | memoryview]:
        if self._has_other_header:
            yield from self._spans_of_source(start, stop, max_bytes)
            return
        offset, end = self.offset(start), self.offset(stop)
        buffer = memoryview(bytearray(min(max_bytes, end - offset)))
        with open_regular(self.path) as file:
            while offset < end:
                with io_errors("read", self.path, offset):
                    count = os.preadv(file.fileno(), [buffer[: end - offset]], offset)
                    if not count:
                        raise OSError(errno.ENODATA, "the file was truncated")
                yield buffer[:count]
                offset += count

    def _spans_of_source(self, start: int, stop: int, max_bytes: int) -> Iterator[memoryview]:
        rows = max(1, max_bytes // self.header.image_bytes)
        with contextlib.closing(self.open_published()) as source:
            for row in range(start, stop, rows):
                shape = (min(rows, stop - row), *self.header.shape[1:])
                batch = np.empty(shape, storage_dtype(self.header.dtype))
                source.read_into(row, batch)
                yield byte_view(batch)

    def repair_header(self) -> list[str]:
        """Write the header, unless the file has another length: the rest may describe that."""
        found = self.inspect_published()
        if not found:
            return []
        with self._opened_published() as file:
            if self._storage.size(file) != self.stored_bytes:
                return found
            self._storage.write(file, self.preamble, 0)
            self._storage.sync(file)
        return self.inspect_published()

    def repair(self, start: int, stored: Payload) -> None:
        if self._has_other_header:
            raise TargetError(
                f"{self.path} has another header than this version of fastvgg writes",
                "use the version that its manifest names",
            )
        with self._opened_published() as file:
            offset = self.offset(start)
            if self._storage.size(file) < offset:  # zeros before it would look like images
                raise TargetError(
                    f"{self.path} is truncated, and images before these cannot be recomputed",
                    "recreate the dataset from its source",
                )
            for data in stored:
                self._storage.write(file, data, offset)
                offset += len(data)
            self._storage.sync(file)

    @contextlib.contextmanager
    def _opened_published(self) -> Iterator[OpenFile]:
        file = self._storage.open(self.path)
        try:
            yield file
        finally:
            self._storage.close(file)

    def close(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            self._storage.close(file)

    def _open(self) -> OpenFile:
        if self._file is None:
            raise RuntimeError(f"{self.partial} must be created or reopened before it is written")
        return self._file
