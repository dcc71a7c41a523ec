"""Read a contiguous C-ordered array in a file through memory-mapped windows."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
from typing import TYPE_CHECKING, Any, BinaryIO, Final

import numpy as np
import xxhash

from fastvgg.datasets.base import bytes_of
from fastvgg.errors import StoppedError
from fastvgg.transform import storage_dtype

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from fastvgg.datasets.base import Header

__all__ = ["MappedNpy"]

SAMPLES: Final = 16
SAMPLE_BYTES: Final = 64 * 1024
# Populating a mapping before it is read reports a truncated file as an error. Otherwise the first
# access to a missing page kills the process (SIGBUS). Requires Linux 5.14.
MADV_POPULATE_READ: Final = 22


class MappedNpy:
    """A contiguous array in a file that the caller opens and closes.

    Parameters
    ----------
    file
        The open file.
    path
        Its path, for error messages.
    header
        Shape, dtype and layout of the array.
    offset
        Offset of the array in the file.
    """

    def __init__(self, file: BinaryIO, path: Path, header: Header, offset: int) -> None:
        self._file = file
        self._path = path
        self._header = header
        self._offset = offset

    def fingerprint(self) -> str:
        """Return a hash of the file's current size, modification time and samples."""
        descriptor = self._file.fileno()
        status = os.fstat(descriptor)
        digest = xxhash.xxh3_128(f"{status.st_size} {status.st_mtime_ns}".encode())
        last = max(0, status.st_size - SAMPLE_BYTES)
        for step in range(SAMPLES):
            offset = last * step // (SAMPLES - 1)
            try:
                digest.update(os.pread(descriptor, SAMPLE_BYTES, offset))
            except OSError as error:
                raise StoppedError.from_os_error(error, "read", str(self._path), offset) from error
        return digest.hexdigest()

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Return images as a read-only view of a mapped window, valid while it is referenced.

        Raises
        ------
        StoppedError
            If the file was truncated, or cannot be read.
        """
        begin = self._offset + start * self._header.image_bytes
        nbytes = (stop - start) * self._header.image_bytes
        shape = (stop - start, *self._header.shape[1:])
        batch = self._window(begin, nbytes).view(storage_dtype(self._header.dtype)).reshape(shape)
        self._prefetch(begin + nbytes, nbytes)
        return batch

    def read_into(self, start: int, out: NDArray[Any]) -> None:
        """Fill the contiguous `out` with images, starting at row `start`; thread-safe.

        Raises
        ------
        StoppedError
            If the file was truncated, or cannot be read.
        """
        memory, offset = bytes_of(out), self._offset + start * self._header.image_bytes
        while memory:
            try:
                count = os.preadv(self._file.fileno(), [memory], offset)
            except OSError as error:
                raise StoppedError.from_os_error(error, "read", str(self._path), offset) from error
            if not count:
                raise self._truncated_error(offset)
            memory, offset = memory[count:], offset + count

    def _window(self, begin: int, nbytes: int) -> NDArray[np.uint8]:
        page = begin - begin % mmap.ALLOCATIONGRANULARITY
        try:
            if self._file_bytes() < begin + nbytes:
                raise self._truncated_error(begin)
            window = mmap.mmap(
                self._file.fileno(), begin - page + nbytes, access=mmap.ACCESS_READ, offset=page
            )
            self._populate(window)
        except ValueError:  # truncated between the check above and mmap's own
            raise self._truncated_error(begin) from None
        except OSError as error:
            raise StoppedError.from_os_error(error, "read", str(self._path), begin) from error
        return np.frombuffer(window, np.uint8, nbytes, begin - page)

    def _prefetch(self, begin: int, nbytes: int) -> None:
        """Ask the system to read the next window in the background."""
        if hasattr(os, "posix_fadvise"):
            with contextlib.suppress(OSError):  # a kernel may be built without it
                os.posix_fadvise(self._file.fileno(), begin, nbytes, os.POSIX_FADV_WILLNEED)

    def _file_bytes(self) -> int:
        return os.fstat(self._file.fileno()).st_size

    def _truncated_error(self, offset: int) -> StoppedError:
        error = OSError(errno.ENODATA, "the file was truncated")
        return StoppedError.from_os_error(error, "read", str(self._path), offset)

    @staticmethod
    def _populate(window: mmap.mmap) -> None:
        try:
            window.madvise(MADV_POPULATE_READ)
        except (AttributeError, ValueError):  # no madvise on this system
            return
        except OSError as error:
            if error.errno != errno.EINVAL:  # a kernel before 5.14
                raise
