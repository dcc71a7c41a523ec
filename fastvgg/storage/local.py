"""Durable local I/O. All of it goes through this module, where tests inject faults.

A failed call raises a typed error that names the call, the file and the offset. Nothing is retried:
after a failed fsync the kernel has already dropped the pages that it could not write
(https://wiki.postgresql.org/wiki/Fsync_Errors).
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import shutil
import weakref
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

from fastvgg.errors import StoppedError, TargetError, argument
from fastvgg.storage.location import temporary_path

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

NETWORK_FILE_SYSTEMS: Final = (
    *("9p", "afs", "ceph", "cifs", "coda", "glusterfs", "gpfs", "lustre", "ncpfs", "nfs", "nfs4"),
    *("ocfs2", "smb2", "smb3", "smbfs", "virtiofs"),
)

# The errors of open and write with O_DIRECT where direct I/O is not possible.
DIRECT_IO_ERRORS: Final = (errno.EINVAL, errno.EOPNOTSUPP, errno.EACCES, errno.EPERM)
WRITE_BUFFER_BYTES: Final = 2**20
NO_FOLLOW: Final = getattr(os, "O_NOFOLLOW", 0)


def file_system_type(path: Path) -> str:
    """Return the type of the file system that contains a path, or "" if it is not known."""
    device = path.stat().st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    try:
        with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as mounts:
            for mount in mounts:
                fields, _, rest = mount.partition(" - ")
                if fields.split(" ")[2] == number:
                    return rest.split(" ")[0]
    except (FileNotFoundError, PermissionError):  # not Linux, or in a sandbox
        pass
    return ""


def is_network_file_system(system: str) -> bool:
    """Whether other machines may write to it, or its locks and syncs may have no effect."""
    return system in NETWORK_FILE_SYSTEMS or system.startswith("fuse.")


def check_in_place_supported(path: Path) -> None:
    """Check that a file can be overwritten in place safely; raise TargetError otherwise."""
    status, system = path.lstat(), file_system_type(path)
    if path.is_symlink():
        problem, remedy = "is a symbolic link", f"give the file itself: {path.resolve()}"
    elif status.st_nlink > 1:
        problem = f"has {status.st_nlink} hard links, and would change under all of their names"
        remedy = "copy it, or remove the other links"
    elif status.st_blocks * 512 < status.st_size:
        problem = (
            f"is sparse: it has {status.st_size} bytes, but only {status.st_blocks * 512} of them "
            "are allocated on disk"
        )
        remedy = "make a copy without holes: cp --sparse=never"
    elif is_network_file_system(system):
        problem = f"is on {system}, where another machine may write it at the same time"
        remedy = f"write a new file: give a {argument('target')}"
    elif not os.access(path, os.R_OK | os.W_OK):
        problem, remedy = "is not writable", "check its permissions"
    else:
        return
    raise TargetError(f"{path} {problem}", remedy)


class OpenFile(NamedTuple):
    """An open file, and its path for error messages."""

    descriptor: int
    path: Path
    direct: int | None = None
    """A second descriptor for direct I/O (O_DIRECT), if available."""


class Storage:
    """The system calls that write data durably.

    Every method raises `StoppedError` if the system call fails, unless documented otherwise.

    Parameters
    ----------
    fsync
        Whether a sync waits until the data is on the disk. Without it, data survives a crash of the
        process but not a power failure.
    """

    def __init__(self, *, fsync: bool = True) -> None:
        self.fsync = fsync

    def create(self, path: Path) -> OpenFile:
        """Create an empty file, truncating an existing one."""
        return self._open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, "create")

    def open(self, path: Path, *, create: bool = False) -> OpenFile:
        """Open a file for reading and writing."""
        return self._open(path, os.O_RDWR | (os.O_CREAT if create else 0), "open")

    def _open(self, path: Path, flags: int, call: str) -> OpenFile:
        with io_errors(call, path):
            return OpenFile(self._descriptor(path, flags), path)

    def _descriptor(self, path: Path, flags: int) -> int:
        return os.open(path, flags | NO_FOLLOW, 0o666)

    def direct(self, file: OpenFile) -> OpenFile:
        """Enable direct I/O for the whole pages written to a file, where the system supports it.

        Direct I/O avoids a copy into the page cache: a GiB takes 0.05 s of CPU time instead of 0.2
        to 2.4 s, which depends on how many page-cache pages are newly allocated. It applies to
        pages whose buffer and file offset are equally aligned; all other writes go through the
        page cache.
        """
        if not (self.fsync and hasattr(os, "O_DIRECT")):
            return file
        with io_errors("open", file.path):
            if is_network_file_system(file_system_type(file.path)):
                return file
            try:
                direct = self._descriptor(file.path, os.O_WRONLY | os.O_DIRECT)
            except OSError as error:
                if error.errno not in DIRECT_IO_ERRORS:
                    raise
                return file
            with ExitStack() as opened:
                opened.callback(os.close, direct)
                if not os.path.samestat(os.fstat(direct), os.fstat(file.descriptor)):
                    raise OSError(errno.ESTALE, "another file has replaced it")
                opened.pop_all()
            return file._replace(direct=direct)

    def close(self, file: OpenFile) -> None:
        """Close a file; some file systems report a failed write only here."""
        with io_errors("close", file.path):
            try:
                if file.direct is not None:
                    os.close(file.direct)
            finally:
                os.close(file.descriptor)

    def lock(self, file: OpenFile) -> bool:
        """Lock the file exclusively; return False if another process holds the lock.

        The system releases the lock when the process ends, however it ends.
        """
        try:
            import fcntl
        except ImportError:  # not a POSIX system
            return True
        with io_errors("lock", file.path):
            try:
                fcntl.flock(file.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # The previous holder may have removed the file since it was opened here.
                return os.path.samestat(os.fstat(file.descriptor), os.stat(file.path))
            except (BlockingIOError, FileNotFoundError):
                return False

    def size(self, file: OpenFile) -> int:
        """Return the size of a file in bytes."""
        with io_errors("fstat", file.path):
            return os.fstat(file.descriptor).st_size

    def has_holes(self, file: OpenFile, nbytes: int) -> bool:
        """Whether a synced file has another size than `nbytes`, or parts that are not allocated.

        A file that is truncated while it is written again has the latter.
        """
        with io_errors("fstat", file.path):
            status = os.fstat(file.descriptor)
        return status.st_size != nbytes or status.st_blocks * 512 < nbytes

    def reserve(self, file: OpenFile, nbytes: int) -> None:
        """Allocate disk space for the whole file.

        Raises
        ------
        TargetError
            If the disk or quota is full, or the file would be too large.
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
                f"{file.path}: cannot allocate {nbytes} bytes: {error.strerror}",
                "free disk space or choose another disk; nothing was written",
            ) from error

    def write(self, file: OpenFile, data: bytes | memoryview, offset: int) -> None:
        """Write all of `data` at `offset`."""
        remaining = memoryview(data).cast("B")
        while remaining:
            with io_errors("write", file.path, offset):
                written = _write_some(file, remaining, offset)
                if written == 0:
                    raise OSError(errno.EIO, "nothing was written")
            offset += written
            remaining = remaining[written:]

    def truncate(self, file: OpenFile, nbytes: int) -> None:
        """Set the length of a file."""
        with io_errors("truncate", file.path, nbytes):
            os.ftruncate(file.descriptor, nbytes)

    def read(self, file: OpenFile, offset: int, nbytes: int) -> bytes:
        """Read exactly `nbytes` at `offset`."""
        parts = []
        while nbytes:
            with io_errors("read", file.path, offset):
                part = os.pread(file.descriptor, nbytes, offset)
                if not part:
                    raise OSError(errno.ENODATA, "the file was truncated")
            parts.append(part)
            offset += len(part)
            nbytes -= len(part)
        return b"".join(parts)

    def sync(self, file: OpenFile) -> None:
        """Flush a file's data to the disk (fsync)."""
        if not self.fsync:
            return
        with io_errors("fsync", file.path):
            os.fsync(file.descriptor)

    def sync_directory(self, path: Path) -> None:
        """Flush a directory's entries to the disk (fsync)."""
        if not self.fsync:
            return
        with io_errors("fsync", path), _directory(path) as descriptor:
            os.fsync(descriptor)

    def syncfs(self, directory: Path) -> None:
        """`syncfs` the file system that contains `directory`, whoever wrote the data.

        Data that a killed process wrote is visible, but may not be on the disk yet.
        """
        if not self.fsync:
            return
        with io_errors("syncfs", directory), _directory(directory) as descriptor:
            _syncfs(descriptor)

    def has_syncfs(self, directory: Path) -> bool:
        """Whether `syncfs` is reliable there; if not, every file must be synced separately."""
        with io_errors("stat", directory):
            return not is_network_file_system(file_system_type(directory))

    def drop_cache(self, file: OpenFile) -> None:
        """Drop a file's pages from the page cache, so that it is read from the disk.

        After a failed write the cache may differ from the disk.
        """
        if hasattr(os, "posix_fadvise"):
            with io_errors("fadvise", file.path):
                os.posix_fadvise(file.descriptor, 0, 0, os.POSIX_FADV_DONTNEED)

    def make_directory(self, path: Path) -> None:
        """Create a directory and any missing parents."""
        with io_errors("mkdir", path):
            path.mkdir(parents=True, exist_ok=True)

    def rename(self, old: Path, new: Path) -> None:
        """Rename a file or directory atomically."""
        with io_errors("rename", old):
            os.replace(old, new)

    def remove(self, path: Path) -> None:
        """Remove a file, or a directory tree; do nothing if it does not exist."""
        with io_errors("remove", path):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    def write_file(
        self,
        path: Path,
        buffers: Iterable[bytes | memoryview],
        *,
        direct: bool = False,
        sync: bool = True,
    ) -> None:
        """Write the buffers as a whole file; see `create`, `direct` and `sync`."""
        file = self.create(path)
        try:
            if direct:
                file = self.direct(file)
            offset = 0
            for data in buffers:
                self.write(file, data, offset)
                offset += len(data)
            if sync:
                self.sync(file)
        finally:
            self.close(file)

    def write_atomic(self, path: Path, buffers: Iterable[bytes]) -> None:
        """Replace a file atomically with many small buffers; see `replace_file`."""
        self.replace_file(path, _coalesce(buffers))

    def replace_file(self, path: Path, buffers: Iterable[bytes | memoryview]) -> None:
        """Replace a file atomically: readers see the old or the new content, never a mixture."""
        temporary = temporary_path(path)
        self.write_file(temporary, buffers)
        self.rename(temporary, path)
        self.sync_directory(path.parent)


class SharedStorage(Storage):
    """I/O in one directory, whose files other processes may be writing concurrently.

    The directory is held open, so that a new directory of the same name is never written to.
    Existing files are never truncated: data that another process wrote may be committed.
    """

    def __init__(self, directory: Path, *, fsync: bool = True) -> None:
        super().__init__(fsync=fsync)
        with io_errors("open", directory):
            self._directory = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | NO_FOLLOW)
        weakref.finalize(self, os.close, self._directory)

    def create(self, path: Path) -> OpenFile:
        """Create a file, or open an existing one without truncating it."""
        return self.open(path, create=True)

    def _descriptor(self, path: Path, flags: int) -> int:
        return os.open(path.name, flags | NO_FOLLOW, 0o666, dir_fd=self._directory)

    def sync_directory(self, path: Path) -> None:
        """Flush the directory's entries to the disk (fsync)."""
        if self.fsync:
            with io_errors("fsync", path):
                os.fsync(self._directory)


def _write_some(file: OpenFile, data: memoryview, offset: int) -> int:
    """Write a prefix of the data in one call, and return its length.

    Whole pages in an equally aligned buffer use direct I/O; the bytes before and after them do not.
    """
    if file.direct is None:
        return os.pwrite(file.descriptor, data, offset)
    before = -offset % mmap.PAGESIZE
    pages = (len(data) - before) // mmap.PAGESIZE * mmap.PAGESIZE
    is_aligned = (np.frombuffer(data, np.uint8).ctypes.data - offset) % mmap.PAGESIZE == 0
    if pages <= 0 or not is_aligned:
        return os.pwrite(file.descriptor, data, offset)
    if before:
        return os.pwrite(file.descriptor, data[:before], offset)
    try:
        return os.pwrite(file.direct, data[:pages], offset)
    except OSError as error:
        if error.errno not in DIRECT_IO_ERRORS:  # some disks require more than page alignment
            raise
        return os.pwrite(file.descriptor, data[:pages], offset)


def _coalesce(buffers: Iterable[bytes]) -> Iterator[bytes]:
    buffer = bytearray()
    for data in buffers:
        buffer += data
        if len(buffer) >= WRITE_BUFFER_BYTES:
            yield bytes(buffer)
            buffer.clear()
    yield bytes(buffer)


@contextmanager
def _directory(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _syncfs(descriptor: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "syncfs"):  # not Linux
        os.sync()
    elif libc.syncfs(descriptor):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


@contextmanager
def io_errors(call: str, path: Path, offset: int = 0) -> Iterator[None]:
    """Convert an OSError to the StoppedError of a failed call."""
    try:
        yield
    except OSError as error:
        raise StoppedError.from_os_error(error, call, str(path), offset) from error
