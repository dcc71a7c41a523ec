"""Fault injection: crashes, power failures and errors at any system call."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import sys
import threading
from pathlib import Path

from fastvgg.errors import StoppedError
from fastvgg.storage import local as storage_module
from fastvgg.storage.local import Storage


class SimulatedCrash(BaseException):
    """A simulated process death; like SIGKILL, nothing may catch it."""


class CrashingStorage(Storage):
    """Real storage that simulates the death of the process at its n-th call.

    A killed process runs no cleanup, so all later calls do nothing. The caller then calls
    `finish_crash`, which closes the files and thereby releases their locks.

    Parameters
    ----------
    crash_at
        The 1-based number of the call; 0 for never.
    partially_done
        Crash halfway through the call instead of before it, if the call can be split.
    snapshot_directory
        A directory on the same file system. If given, the crash is a power failure: all unsynced
        changes are undone, names and bytes independently. Otherwise only the process dies.
    fsync
        As for `Storage`.
    """

    def __init__(self, crash_at=0, *, partially_done=False, snapshot_directory=None, fsync=True):
        super().__init__(fsync=fsync)
        self.calls = []
        self.divisible_calls = []  # the numbers of the calls that can be split
        self._crash_at = crash_at
        self._partially_done = partially_done
        self._snapshot_directory = snapshot_directory
        self._dead = False
        self._open_descriptors = set()
        self._undo = []  # (key of what a sync makes durable, function that undoes the change)
        self._snapshot_descriptors = {}  # inode -> a descriptor that outlives those of the run
        self._call_lock = threading.RLock()

    def finish_crash(self):
        for descriptor in self._open_descriptors:
            os.close(descriptor)
        self._open_descriptors.clear()
        if self._dead and self._snapshot_directory is not None:
            for _, undo in reversed(self._undo):
                undo()
        for descriptor in self._snapshot_descriptors.values():
            os.close(descriptor)
        self._snapshot_descriptors.clear()

    def _call(self, name, do, half=None):
        with self._call_lock:
            if self._dead:
                return None
            self.calls.append(name)
            if half is not None:
                self.divisible_calls.append(len(self.calls))
            if len(self.calls) == self._crash_at:
                if self._partially_done and half is not None:
                    half()
                self._dead = True
                raise SimulatedCrash
            return do()

    def _unsynced(self, key, undo):
        if self._snapshot_directory is not None:
            self._undo.append((key, undo))

    def _synced(self, key):
        self._undo = [entry for entry in self._undo if entry[0] != key]

    def _inode(self, descriptor):
        inode = os.fstat(descriptor).st_ino
        if inode not in self._snapshot_descriptors:
            # Reopened instead of duplicated: a duplicate would share the lock.
            self._snapshot_descriptors[inode] = os.open(f"/proc/self/fd/{descriptor}", os.O_RDWR)
        return inode

    def _snapshot_bytes(self, descriptor, begin, end):
        """Record the bytes of a file from `begin` to `end`, and its size."""
        if self._snapshot_directory is None:
            return
        inode, size = self._inode(descriptor), os.fstat(descriptor).st_size
        snapshot_descriptor = self._snapshot_descriptors[inode]
        old = os.pread(descriptor, max(0, end - begin), begin)

        def undo():
            os.ftruncate(snapshot_descriptor, size)
            os.pwrite(snapshot_descriptor, old, begin)

        self._unsynced(("bytes", inode), undo)

    def _snapshot_name(self, path):
        """Record what a name refers to, so that an unsynced change can be undone."""
        if self._snapshot_directory is None:
            return
        old = self._snapshot_directory / f"{len(self._undo)}-{len(self.calls)}"
        if path.is_dir() and not path.is_symlink():
            shutil.copytree(path, old, copy_function=os.link)
        elif os.path.lexists(path):
            os.link(path, old, follow_symlinks=False)

        def undo():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
            if os.path.lexists(old):
                old.rename(path)

        self._unsynced(("names", path.parent), undo)

    def _open(self, path, flags, call):
        if not path.exists() or flags & os.O_TRUNC:  # which gives the name to a new file
            self._snapshot_name(path)
        file = super()._open(path, flags, call)
        self._open_descriptors.add(file.descriptor)
        return file

    def create(self, path, *, exclusive=False):
        create = super().create
        return self._call("create", lambda: create(path, exclusive=exclusive))

    def open(self, path, *, create=False):
        return self._call("open", lambda: super(CrashingStorage, self).open(path, create=create))

    def direct(self, file):
        def do():
            opened = super(CrashingStorage, self).direct(file)
            if opened.direct is not None:
                self._open_descriptors.add(opened.direct)
            return opened

        return self._call("direct", do)

    def close(self, file):
        def do():
            self._open_descriptors -= {file.descriptor, file.direct}
            super(CrashingStorage, self).close(file)

        return self._call("close", do)

    def lock(self, file):
        return self._call("lock", lambda: super(CrashingStorage, self).lock(file))

    def size(self, file):
        return self._call("size", lambda: super(CrashingStorage, self).size(file))

    def reserve(self, file, nbytes):
        def do(nbytes=nbytes):
            self._snapshot_bytes(file.descriptor, 0, 0)
            super(CrashingStorage, self).reserve(file, nbytes)

        return self._call("reserve", do, half=lambda: do(nbytes // 2))

    def write(self, file, data, offset):
        data = memoryview(data).cast("B")

        def do(data=data):
            self._snapshot_bytes(file.descriptor, offset, offset + len(data))
            super(CrashingStorage, self).write(file, data, offset)

        return self._call("write", do, half=lambda: do(data[: len(data) // 2]))

    def truncate(self, file, nbytes):
        def do():
            self._snapshot_bytes(file.descriptor, nbytes, os.fstat(file.descriptor).st_size)
            super(CrashingStorage, self).truncate(file, nbytes)

        return self._call("truncate", do)

    def sync(self, file):
        def do():
            super(CrashingStorage, self).sync(file)
            self._synced(("bytes", os.fstat(file.descriptor).st_ino))

        return self._call("sync", do)

    def sync_directory(self, path):
        def do():
            super(CrashingStorage, self).sync_directory(path)
            self._synced(("names", path))

        return self._call("sync_directory", do)

    def syncfs(self, directory):
        def do():
            super(CrashingStorage, self).syncfs(directory)
            self._undo.clear()

        return self._call("syncfs", do)

    def make_directory(self, path):
        def do():
            for directory in [*reversed(path.parents), path]:
                if not directory.exists():
                    self._snapshot_name(directory)
                    directory.mkdir()
            super(CrashingStorage, self).make_directory(path)

        return self._call("make_directory", do)

    def rename(self, old, new):
        def do():
            if self._snapshot_directory is not None:
                self._snapshot_name(new)
                self._snapshot_name(old)
            super(CrashingStorage, self).rename(old, new)

        return self._call("rename", do)

    def remove(self, path):
        def do():
            if os.path.lexists(path):
                self._snapshot_name(path)
            super(CrashingStorage, self).remove(path)

        def half():
            if path.is_dir() and not path.is_symlink():
                for file in sorted(path.rglob("*"))[::2]:
                    if file.is_file():
                        file.unlink()

        return self._call("remove", do, half)


class FaultyOs:
    """A stand-in for the os module of the storage, in which one call fails.

    Parameters
    ----------
    fails_at
        The 1-based number of the call that fails; 0 for none.
    number
        The errno of the failure.
    persistent
        Also fail at every later call, like a disconnected disk.
    """

    CALLS = (
        *("open", "close", "fstat", "posix_fallocate", "pread", "pwrite", "ftruncate", "fsync"),
        *("replace", "posix_fadvise"),
    )

    def __init__(self, fails_at=0, number=errno.EIO, *, persistent=False):
        self.calls = []
        self._fails_at = fails_at
        self.number = number
        self._persistent = persistent
        self._counting = threading.Lock()

    def _count(self, name):
        with self._counting:
            self.calls.append(name)
            return len(self.calls)

    def __getattr__(self, name):
        real = getattr(os, name)
        if name not in self.CALLS:
            return real

        def call(*arguments, **options):
            count = self._count(name)
            fails = self._fails_at and (
                count >= self._fails_at if self._persistent else count == self._fails_at
            )
            if not fails:
                return real(*arguments, **options)
            if name == "close":  # close releases the descriptor even if it fails
                real(*arguments, **options)
            raise OSError(self.number, os.strerror(self.number))

        return call


class UnreadableFileOs:
    """A stand-in for the os module of a format, in which no byte of one file can be read."""

    def __init__(self, path):
        self._file = path.stat()

    def __getattr__(self, name):
        real = getattr(os, name)
        if name not in ("pread", "preadv"):
            return real

        def call(descriptor, *arguments):
            if os.path.samestat(os.fstat(descriptor), self._file):
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return real(descriptor, *arguments)

        return call


class ShortIoOs(FaultyOs):
    """A stand-in for the os module of the storage, in which a read or write is short.

    Parameters
    ----------
    short_at
        The 1-based number of the short call; 0 for every call.
    """

    def __init__(self, short_at):
        super().__init__()
        self._short_at = short_at

    def __getattr__(self, name):
        if name not in ("pread", "pwrite"):
            return super().__getattr__(name)

        def call(descriptor, argument, offset):
            if self._short_at in (0, self._count(name)):
                half = argument // 2 if name == "pread" else argument[: len(argument) // 2]
                argument = half or argument
            return getattr(os, name)(descriptor, argument, offset)

        return call


class FailingStorage(Storage):
    """Real storage in which the n-th call of one method fails with EIO."""

    def __init__(self, name, fails_at):
        super().__init__()
        self.calls = 0
        self._name = name
        self._fails_at = fails_at

    def _fails(self, name, path):
        if name != self._name:
            return
        self.calls += 1
        if self.calls == self._fails_at:
            error = OSError(errno.EIO, os.strerror(errno.EIO))
            raise StoppedError.from_os_error(error, name, str(path), 0)

    def make_directory(self, path):
        self._fails("make_directory", path)
        super().make_directory(path)

    def rename(self, old, new):
        self._fails("rename", old)
        super().rename(old, new)

    def remove(self, path):
        self._fails("remove", path)
        super().remove(path)


class InterruptedStorage(Storage):
    """Real storage that simulates a crash, or calls `end`, right after a sync of the journal.

    No further chunks are committed, regardless of the progress of the rest of the run.

    Parameters
    ----------
    commits
        The number of chunks committed by then.
    end
        Called instead of the simulated crash, if given.
    """

    def __init__(self, commits, *, end=None):
        super().__init__()
        self._remaining_syncs = (
            commits + 1
        )  # plus the header, which is synced under a temporary name
        self._end = end

    def sync(self, file):
        super().sync(file)
        self._remaining_syncs -= file.path.name.endswith(
            (".fastvgg-journal", ".fastvgg-journal.tmp")
        )
        if self._remaining_syncs == 0:
            if self._end is not None:
                self._end()
            raise SimulatedCrash


def frame_that_syncs():
    """Return the frame that calls a method of a storage which calls this function's caller.

    `Storage.write_file` syncs for its callers.
    """
    frame = sys._getframe(3)
    return frame.f_back if frame.f_code.co_name == "write_file" else frame


@contextlib.contextmanager
def system_calls(faulty):
    """Replace the os module of the storage temporarily."""
    real = storage_module.os
    storage_module.os = faulty
    try:
        yield faulty
    finally:
        storage_module.os = real


def memory_directory():
    """Return a directory on a memory file system, where syncs are fast; None if there is none."""
    memory = Path("/dev/shm")  # noqa: S108
    return memory if memory.is_dir() and os.access(memory, os.W_OK) else None


def overwrite_while_read(monkeypatch, path, contents, *, keeps_time=False):
    """Overwrite a file in place, with the next of `contents`, in the middle of each read of it.

    A read starts where the first one did. With `keeps_time`, the modification time is set back.
    """
    pread, remaining, starts = os.pread, iter(contents), []

    def torn(descriptor, count, offset):
        if not os.path.samestat(os.fstat(descriptor), path.stat()):
            return pread(descriptor, count, offset)
        starts.append(offset)
        content = next(remaining, None) if offset == starts[0] else None
        if content is None:
            return pread(descriptor, count, offset)
        half = pread(descriptor, count // 2, offset)
        changed_ns = path.stat().st_mtime_ns + (0 if keeps_time else 10**9)
        with path.open("r+b") as file:
            file.write(content)
        os.utime(path, ns=(changed_ns, changed_ns))
        return half

    monkeypatch.setattr(os, "pread", torn)
