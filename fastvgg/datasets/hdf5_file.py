"""Open HDF5 files for reading, with a limit on what HDF5 reads at once.

HDF5 trusts the sizes that a file claims for its structures: a header of a few bytes in a sparse
file makes it read gigabytes into memory. It gets memory for a structure right before it reads it,
and the memory is not used before, so that a limit on reads is one on memory.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import os
from typing import TYPE_CHECKING, Final

import h5py

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import BinaryIO

# A group of a million datasets has a heap of this size; other structures have kilobytes.
MAX_STRUCTURE_BYTES: Final = 16 * 1024 * 1024
MAX_OFFSET: Final = 2**63 - 1
# The errors of a lock on a file system that has none.
UNLOCKABLE_ERRORS: Final = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL)


class BoundedReader(io.RawIOBase):
    """A file from which no read is longer than a structure, or a chunk, can be.

    As in HDF5's own driver, what lies beyond the end of the file is zeros.
    """

    def __init__(self, descriptor: int) -> None:
        self._max_bytes = MAX_STRUCTURE_BYTES
        self._descriptor = descriptor
        self._position = 0

    def allow(self, chunk_bytes: int) -> None:
        """Allow reads of a chunk, whose memory the caller has accounted for."""
        self._max_bytes = max(self._max_bytes, chunk_bytes)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Set the position."""
        end = os.fstat(self._descriptor).st_size if whence == os.SEEK_END else 0
        self._position = end + offset
        return self._position

    def tell(self) -> int:
        """Return the position."""
        return self._position

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        """Fill a buffer.

        Raises
        ------
        OSError
            From the operating system, or if the buffer is too long, or no file can have it.
        """
        if not 0 <= self._position <= MAX_OFFSET - len(buffer):
            raise OSError(f"a structure at offset {self._position}")
        if len(buffer) > self._max_bytes:
            raise OSError(
                f"a structure of {len(buffer)} bytes at offset {self._position}; the limit is "
                f"{self._max_bytes}"
            )
        memory, offset = buffer, self._position
        while memory and (count := os.preadv(self._descriptor, [memory], offset)):
            memory, offset = memory[count:], offset + count
        memory[:] = bytes(len(memory))
        return len(buffer)


@contextlib.contextmanager
def open_hdf5(file: BinaryIO) -> Iterator[tuple[h5py.File, BoundedReader]]:
    """Open an HDF5 file, and lock out writers, as HDF5's own driver does.

    Raises
    ------
    OSError
        If HDF5 cannot read it, or another process is writing it.
    """
    descriptor = file.fileno()
    if os.environ.get("HDF5_USE_FILE_LOCKING", "").upper() not in ("FALSE", "0"):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OSError("another process has locked it") from None
        except OSError as error:
            if error.errno not in UNLOCKABLE_ERRORS:
                raise
    reader = BoundedReader(descriptor)
    with h5py.File(reader, "r") as opened:
        yield opened, reader
