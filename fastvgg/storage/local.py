"""Every durable system call goes through here: the one place where faults can be put in.

A call that fails raises a typed error that names the call, the file and the offset. Nothing is
retried: after a failed fsync the kernel has already forgotten which pages it could not write
(https://wiki.postgresql.org/wiki/Fsync_Errors).
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import shutil
import weakref
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

from fastvgg.errors import StoppedError, TargetError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

__all__ = [
    "SharedStorage",
    "Storage",
    "StoredFile",
    "file_system",
    "is_networked",
]

"""What a commit survives: a power cut, or the end of the process alone."""

NETWORKED: Final = (
    *("9p", "afs", "ceph", "cifs", "coda", "glusterfs", "gpfs", "lustre", "ncpfs", "nfs", "nfs4"),
    *("ocfs2", "smb2", "smb3", "smbfs", "virtiofs"),
)

# What opening a file past the cache, or writing so, fails with where it is not possible.
NO_WAY_PAST: Final = (errno.EINVAL, errno.EOPNOTSUPP, errno.EACCES, errno.EPERM)
GATHERED_BYTES: Final = 2**20


def file_system(path: Path) -> str:
    """Return the kind of file system that a path is on; "" where the system does not tell."""
    device = path.stat().st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    try:
        with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as mounts:
            for mount in mounts:
                fields, _, kind = mount.partition(" - ")
                if fields.split(" ")[2] == number:
                    return kind.split(" ")[0]
    except (FileNotFoundError, PermissionError):  # not Linux, or in a sandbox
        pass
    return ""


def is_networked(system: str) -> bool:
    """Whether another machine may write there, or a lock or a sync may mean nothing."""
    return system in NETWORKED or system.startswith("fuse.")


class StoredFile(NamedTuple):
    """An open file, and its path for messages."""

    descriptor: int
    path: Path
    direct: int | None = None
    """A descriptor for writes past the system's cache, if there is one."""


class Storage:
    """The system calls that make data last.

    Every method raises `StoppedError` where the system refuses, unless it says otherwise.

    Parameters
    ----------
    fsync
        Whether a sync waits until the data is on the disk. Without it data survives the death of
        the process, but not a power cut.
    """

    def __init__(self, *, fsync: bool = True) -> None:
        self._syncs = fsync

    def create(self, path: Path) -> StoredFile:
        """Make a new, empty file, or empty the one that is there."""
        return self._open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, "create")

    def open(self, path: Path, *, create: bool = False) -> StoredFile:
        """Open a file for reading and writing."""
        return self._open(path, os.O_RDWR | (os.O_CREAT if create else 0), "open")

    def _open(self, path: Path, flags: int, call: str) -> StoredFile:
        with _io_errors(call, path):
            return StoredFile(self._descriptor(path, flags), path)

    def _descriptor(self, path: Path, flags: int) -> int:
        return os.open(path, flags | _always(), 0o666)

    def direct(self, file: StoredFile) -> StoredFile:
        """Return a file so that whole pages are written to it past the system's cache.

        What has to be on the disk anyway needs no copy there: that takes 0.05 s of a processor for
        a GiB, and 0.2 to 2.4 s with the copy, the more the newer the system's memory is. Pages are
        whole where memory lies within a page as it will in the file; the rest takes the usual way,
        as all does where there is no other.
        """
        if not (self._syncs and hasattr(os, "O_DIRECT")):
            return file
        with _io_errors("open", file.path):
            if is_networked(file_system(file.path)):
                return file
            try:
                direct = self._descriptor(file.path, os.O_WRONLY | os.O_DIRECT)
            except OSError as error:
                if error.errno not in NO_WAY_PAST:
                    raise
                return file
            if not os.path.samestat(os.fstat(direct), os.fstat(file.descriptor)):
                os.close(direct)
                raise OSError(errno.ESTALE, "another file has its name")
            return file._replace(direct=direct)

    def close(self, file: StoredFile) -> None:
        """Close a file; some file systems report a failed write only now."""
        with _io_errors("close", file.path):
            try:
                if file.direct is not None:
                    os.close(file.direct)
            finally:
                os.close(file.descriptor)

    def lock(self, file: StoredFile) -> bool:
        """Take the file for this process alone; False if another one has it.

        The lock goes when the process does, however it ends.
        """
        try:
            import fcntl
        except ImportError:  # no such locks on this system
            return True
        try:
            fcntl.flock(file.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            raise StoppedError.from_os_error(error, "lock", str(file.path), 0) from error
        try:  # the one that had it may have removed the file since it was opened here
            return os.path.samestat(os.fstat(file.descriptor), os.stat(file.path))
        except FileNotFoundError:
            return False
        except OSError as error:
            raise StoppedError.from_os_error(error, "stat", str(file.path), 0) from error

    def size(self, file: StoredFile) -> int:
        """Return a file's length in bytes."""
        with _io_errors("fstat", file.path):
            return os.fstat(file.descriptor).st_size

    def reserve(self, file: StoredFile, nbytes: int) -> None:
        """Take the disk space for the whole file now.

        Raises
        ------
        TargetError
            If there is no room.
        """
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.descriptor, 0, nbytes)
            else:
                os.truncate(file.descriptor, nbytes)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise StoppedError.from_os_error(error, "reserve", str(file.path), 0) from error
            raise TargetError(
                f"{file.path}: no room for {nbytes} bytes: {error.strerror}",
                "free disk space or choose another disk; nothing was written",
            ) from error

    def write(self, file: StoredFile, data: bytes | memoryview, offset: int) -> None:
        """Write all of `data` at `offset`."""
        remaining = memoryview(data).cast("B")
        while remaining:
            with _io_errors("write", file.path, offset):
                written = _write_some(file, remaining, offset)
                if written == 0:
                    raise OSError(errno.EIO, "nothing was written")
            offset += written
            remaining = remaining[written:]

    def truncate(self, file: StoredFile, nbytes: int) -> None:
        """Cut a file to a length."""
        with _io_errors("truncate", file.path, nbytes):
            os.ftruncate(file.descriptor, nbytes)

    def read(self, file: StoredFile, offset: int, nbytes: int) -> bytes:
        """Return all of the `nbytes` at `offset`."""
        parts = []
        while nbytes:
            with _io_errors("read", file.path, offset):
                part = os.pread(file.descriptor, nbytes, offset)
                if not part:
                    raise OSError(errno.ENODATA, "the file has become shorter")
            parts.append(part)
            offset += len(part)
            nbytes -= len(part)
        return b"".join(parts)

    def sync(self, file: StoredFile) -> None:
        """Make what was written to a file survive a power cut."""
        if not self._syncs:
            return
        with _io_errors("fsync", file.path):
            os.fsync(file.descriptor)

    def sync_directory(self, path: Path) -> None:
        """Make the names in a directory survive a power cut."""
        if not self._syncs:
            return
        with _io_errors("fsync", path):
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    def syncfs(self, directory: Path) -> None:
        """Make all that anyone wrote to the disk of a directory survive a power cut.

        What a killed process wrote is there for all to see, and yet may not be on the disk.
        """
        if not self._syncs:
            return
        with _io_errors("syncfs", directory):
            descriptor = os.open(directory, os.O_RDONLY)
            try:
                _syncfs(descriptor)
            finally:
                os.close(descriptor)

    def has_syncfs(self, directory: Path) -> bool:
        """Whether `syncfs` can be relied on there: elsewhere files are synced one by one."""
        with _io_errors("stat", directory):
            return not is_networked(file_system(directory))

    def drop_cache(self, file: StoredFile) -> None:
        """Have a file read from the disk again.

        After a write that failed, the system's memory holds what the disk does not.
        """
        if hasattr(os, "posix_fadvise"):
            with _io_errors("fadvise", file.path):
                os.posix_fadvise(file.descriptor, 0, 0, os.POSIX_FADV_DONTNEED)

    def make_directory(self, path: Path) -> None:
        """Make a directory and those above it, where they are missing."""
        with _io_errors("mkdir", path):
            path.mkdir(parents=True, exist_ok=True)

    def rename(self, old: Path, new: Path) -> None:
        """Give a file or directory another name, at once."""
        with _io_errors("rename", old):
            os.replace(old, new)

    def remove(self, path: Path) -> None:
        """Remove a file, or a directory with all that is in it; missing is fine."""
        with _io_errors("remove", path):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    def write_atomic(self, path: Path, pieces: Iterable[bytes]) -> None:
        """Write a file so that its name holds the old bytes or the new ones, never a part."""
        temporary = path.with_name(path.name + ".tmp")
        file = self.create(temporary)
        try:
            offset = 0
            for data in _gather(pieces):
                self.write(file, data, offset)
                offset += len(data)
            self.sync(file)
        finally:
            self.close(file)
        self.rename(temporary, path)
        self.sync_directory(path.parent)


class SharedStorage(Storage):
    """Calls in one directory, in which others write the same bytes at the same time.

    The directory stays the one that it was, whatever gets its name later; and no file is emptied,
    for what another has written there may be committed.

    Parameters
    ----------
    directory
        Where all of the files are.
    fsync
        As for `Storage`.
    """

    def __init__(self, directory: Path, *, fsync: bool = True) -> None:
        super().__init__(fsync=fsync)
        with _io_errors("open", directory):
            self._directory = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | _always())
        weakref.finalize(self, os.close, self._directory)

    def create(self, path: Path) -> StoredFile:
        """Make a new file, or open the one that is there."""
        return self.open(path, create=True)

    def _descriptor(self, path: Path, flags: int) -> int:
        return os.open(path.name, flags | _always(), 0o666, dir_fd=self._directory)

    def sync_directory(self, path: Path) -> None:
        """Make the names in the directory survive a power cut."""
        if self._syncs:
            with _io_errors("fsync", path):
                os.fsync(self._directory)


def _always() -> int:
    """Return the flags that every file is opened with, where the system has them."""
    return getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOFOLLOW", 0)


def _write_some(file: StoredFile, data: memoryview, offset: int) -> int:
    """Write the beginning of the data in one call, and return how much that was.

    Whole pages that lie right are written directly, and what is before and after them is not.
    """
    if file.direct is None:
        return os.pwrite(file.descriptor, data, offset)
    before = -offset % mmap.PAGESIZE
    pages = (len(data) - before) // mmap.PAGESIZE * mmap.PAGESIZE
    lies_right = (_address(data) - offset) % mmap.PAGESIZE == 0
    if pages <= 0 or not lies_right:
        return os.pwrite(file.descriptor, data, offset)
    if before:
        return os.pwrite(file.descriptor, data[:before], offset)
    try:
        return os.pwrite(file.direct, data[:pages], offset)
    except OSError as error:
        if error.errno not in NO_WAY_PAST:  # of a disk that wants more than pages
            raise
        return os.pwrite(file.descriptor, data[:pages], offset)


def _address(data: memoryview) -> int:
    address: int = np.frombuffer(data, np.uint8).__array_interface__["data"][0]
    return address


def _gather(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """Return the same bytes in larger pieces."""
    gathered = bytearray()
    for piece in pieces:
        gathered += piece
        if len(gathered) >= GATHERED_BYTES:
            yield bytes(gathered)
            gathered.clear()
    yield bytes(gathered)


def _syncfs(descriptor: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "syncfs"):  # not Linux
        os.sync()
    elif libc.syncfs(descriptor):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


@contextmanager
def _io_errors(call: str, path: Path, offset: int = 0) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StoppedError.from_os_error(error, call, str(path), offset) from error
