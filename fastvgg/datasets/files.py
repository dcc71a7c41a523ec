"""Regular files and sidecars, opened so that no pipe blocks, and read whole or at an offset."""

from __future__ import annotations

import errno
import os
import stat
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Final

from fastvgg.errors import SourceError, remedy_for
from fastvgg.storage import objects
from fastvgg.storage.descriptors import above_standard_streams
from fastvgg.storage.local import NO_FOLLOW
from fastvgg.storage.location import is_remote

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager
    from pathlib import Path
    from typing import BinaryIO

CHANGE_FIELDS: Final = ("st_size", "st_mtime_ns", "st_ctime_ns")
READ_FLAGS: Final = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file, or an object of a store, for reading.

    Directories, sockets and pipes are rejected: opening a pipe could block forever.

    Raises
    ------
    OSError
        From the operating system, or if `path` is not a regular file.
    """
    if is_remote(path):
        return objects.open_object(path)
    return os.fdopen(_open_descriptor(path, READ_FLAGS), "rb")


def read_regular(
    path: bytes, max_bytes: int, *, follow_links: bool = True
) -> tuple[bytes, os.stat_result]:
    """Read a whole regular file.

    Returns
    -------
    tuple
        The content, and the file's status, which was the same before and after the read.

    Raises
    ------
    OSError
        From the operating system, with ELOOP for a symbolic link that is not followed; or if `path`
        is not a regular file, is longer than `max_bytes`, or keeps changing.
    """

    def read(status: os.stat_result) -> bytes:
        if status.st_size > max_bytes:
            raise OSError(f"the file has {status.st_size} bytes; the limit is {max_bytes}")
        return read_at(descriptor, status.st_size, 0)

    flags = READ_FLAGS if follow_links else READ_FLAGS | NO_FOLLOW
    descriptor = _open_descriptor(path, flags)
    try:
        return read_unchanged(descriptor, read)
    finally:
        os.close(descriptor)


def read_unchanged(
    descriptor: int, read: Callable[[os.stat_result], bytes]
) -> tuple[bytes, os.stat_result]:
    """Call `read` with the status of a file, and once more if the file changed meanwhile.

    A file that is overwritten while it is read may return old bytes, then new ones.

    Raises
    ------
    OSError
        From `read`, or if the file changed again.
    """
    status = os.fstat(descriptor)
    for _ in range(2):
        data, before = read(status), status
        status = os.fstat(descriptor)
        if all(getattr(status, name) == getattr(before, name) for name in CHANGE_FIELDS):
            return data, status
    raise OSError("the file changed while it was read")


def read_at(descriptor: int, count: int, offset: int) -> bytes:
    """Read `count` bytes at `offset`; fewer only at the end of the file."""
    data = os.pread(descriptor, count, offset)
    while 0 < len(data) < count:
        more = os.pread(descriptor, count - len(data), offset + len(data))
        if not more:
            break
        data += more
    return data


def _open_descriptor(path: Path | bytes, flags: int) -> int:
    """Open a regular file, for the same reasons as `open_regular`."""
    descriptor = above_standard_streams(os.open(path, flags))
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return descriptor
    os.close(descriptor)
    raise OSError("it is a directory" if stat.S_ISDIR(mode) else "it is not a regular file")


@contextmanager
def open_sidecar(path: Path) -> Iterator[BinaryIO | None]:
    """Open a sidecar file (index, manifest or journal); yield None if it does not exist.

    Raises
    ------
    SourceError
        If it exists but cannot be read.
    """
    try:
        try:
            file: AbstractContextManager[BinaryIO | None] = open_regular(path)
        except OSError as error:
            is_missing = isinstance(error, FileNotFoundError | NotADirectoryError)
            if not is_missing and error.errno != errno.ENAMETOOLONG:
                raise
            file = nullcontext()
        with file as opened, objects.os_errors():
            yield opened
    except OSError as error:
        remedy = remedy_for(error) if error.errno else "move it away"
        raise SourceError(f"{path} cannot be read: {error.strerror or error}", remedy) from None


def read_sidecar(path: Path, max_bytes: int = -1) -> bytes | None:
    """Return the content of a sidecar file, or None if it does not exist.

    Reads at most `max_bytes` bytes, or the whole file if that is negative.

    Raises
    ------
    SourceError
        If it exists but cannot be read.
    """
    with open_sidecar(path) as file:
        if file is None:
            return None
        # `read` allocates the whole requested size, however short the file is.
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        return file.read(min(max_bytes, size))
