"""Ways for a run to end: dying at any system call, losing power there, or being told no."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import threading
from pathlib import Path

from fastvgg.errors import StoppedError
from fastvgg.storage import local as storage_module
from fastvgg.storage.local import Storage


class Death(BaseException):
    """The end of the process; nothing may catch it, as nothing catches SIGKILL."""


class MortalStorage(Storage):
    """Real storage whose process dies at its n-th call.

    What runs on the way out of a real death is nothing, so from then on no call does anything. Who
    simulates one calls `bury`, for the system closes the files of a dead process, and its locks go.

    Parameters
    ----------
    dies_at
        The number of the call, from 1; 0 for never.
    half_done
        Die when the call is half done, where a half of it can be done, and not before it.
    graveyard
        A directory on the same file system, to lose power at the death: all that was not synced
        is then undone, names and bytes apart. Without it the system outlives the process.
    fsync
        As for `Storage`.
    """

    def __init__(self, dies_at=0, *, half_done=False, graveyard=None, fsync=True):
        super().__init__(fsync=fsync)
        self.calls = []
        self.divisible = []  # the numbers of the calls that can be half done
        self._dies_at = dies_at
        self._half_done = half_done
        self._graveyard = graveyard
        self._dead = False
        self._open_descriptors = set()
        self._undo = []  # (what a sync makes lasting, how to undo it)
        self._kept = {}  # inode -> a descriptor that outlives names and the run's own
        self._one_at_a_time = threading.RLock()

    def bury(self):
        for descriptor in self._open_descriptors:
            os.close(descriptor)
        self._open_descriptors.clear()
        if self._dead and self._graveyard is not None:
            for _, undo in reversed(self._undo):
                undo()
        for descriptor in self._kept.values():
            os.close(descriptor)
        self._kept.clear()

    def _call(self, name, do, half=None):
        with self._one_at_a_time:
            if self._dead:
                return None
            self.calls.append(name)
            if half is not None:
                self.divisible.append(len(self.calls))
            if len(self.calls) == self._dies_at:
                if self._half_done and half is not None:
                    half()
                self._dead = True
                raise Death
            return do()

    def _unsynced(self, what, undo):
        if self._graveyard is not None:
            self._undo.append((what, undo))

    def _synced(self, what):
        self._undo = [entry for entry in self._undo if entry[0] != what]

    def _inode(self, descriptor):
        inode = os.fstat(descriptor).st_ino
        if inode not in self._kept:
            # Opened anew, not duplicated, which would hold the lock too.
            self._kept[inode] = os.open(f"/proc/self/fd/{descriptor}", os.O_RDWR)
        return inode

    def _keep_bytes(self, descriptor, begin, end):
        """Remember what a file holds from `begin` to `end`, and how long it is."""
        if self._graveyard is None:
            return
        inode, size = self._inode(descriptor), os.fstat(descriptor).st_size
        kept, old = self._kept[inode], os.pread(descriptor, max(0, end - begin), begin)

        def undo():
            os.ftruncate(kept, size)
            os.pwrite(kept, old, begin)

        self._unsynced(("bytes", inode), undo)

    def _keep_name(self, path):
        """Remember what has a name, so that losing the change of it brings it back."""
        if self._graveyard is None:
            return
        old = self._graveyard / f"{len(self._undo)}-{len(self.calls)}"
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
        if not path.exists():
            self._keep_name(path)
        elif flags & os.O_TRUNC and self._graveyard is not None:
            with path.open("rb") as there:
                self._keep_bytes_of(there, path)
        file = super()._open(path, flags, call)
        self._open_descriptors.add(file.descriptor)
        return file

    def _keep_bytes_of(self, there, path):
        descriptor = os.open(path, os.O_RDWR)
        self._keep_bytes(descriptor, 0, len(there.read()))
        os.close(descriptor)

    def create(self, path):
        return self._call("create", lambda: super(MortalStorage, self).create(path))

    def open(self, path, *, create=False):
        return self._call("open", lambda: super(MortalStorage, self).open(path, create=create))

    def direct(self, file):
        def do():
            opened = super(MortalStorage, self).direct(file)
            if opened.direct is not None:
                self._open_descriptors.add(opened.direct)
            return opened

        return self._call("direct", do)

    def close(self, file):
        def do():
            self._open_descriptors -= {file.descriptor, file.direct}
            super(MortalStorage, self).close(file)

        return self._call("close", do)

    def lock(self, file):
        return self._call("lock", lambda: super(MortalStorage, self).lock(file))

    def size(self, file):
        return self._call("size", lambda: super(MortalStorage, self).size(file))

    def reserve(self, file, nbytes):
        def do(nbytes=nbytes):
            self._keep_bytes(file.descriptor, 0, 0)
            super(MortalStorage, self).reserve(file, nbytes)

        return self._call("reserve", do, half=lambda: do(nbytes // 2))

    def write(self, file, data, offset):
        data = memoryview(data).cast("B")

        def do(data=data):
            self._keep_bytes(file.descriptor, offset, offset + len(data))
            super(MortalStorage, self).write(file, data, offset)

        return self._call("write", do, half=lambda: do(data[: len(data) // 2]))

    def truncate(self, file, nbytes):
        def do():
            self._keep_bytes(file.descriptor, nbytes, os.fstat(file.descriptor).st_size)
            super(MortalStorage, self).truncate(file, nbytes)

        return self._call("truncate", do)

    def sync(self, file):
        def do():
            super(MortalStorage, self).sync(file)
            self._synced(("bytes", os.fstat(file.descriptor).st_ino))

        return self._call("sync", do)

    def sync_directory(self, path):
        def do():
            super(MortalStorage, self).sync_directory(path)
            self._synced(("names", path))

        return self._call("sync_directory", do)

    def syncfs(self, directory):
        def do():
            super(MortalStorage, self).syncfs(directory)
            self._undo.clear()

        return self._call("syncfs", do)

    def make_directory(self, path):
        def do():
            for directory in [*reversed(path.parents), path]:
                if not directory.exists():
                    self._keep_name(directory)
                    directory.mkdir()
            super(MortalStorage, self).make_directory(path)

        return self._call("make_directory", do)

    def rename(self, old, new):
        def do():
            if self._graveyard is not None:
                self._keep_name(new)
                self._keep_name(old)
            super(MortalStorage, self).rename(old, new)

        return self._call("rename", do)

    def remove(self, path):
        def do():
            if os.path.lexists(path):
                self._keep_name(path)
            super(MortalStorage, self).remove(path)

        def half():
            if path.is_dir() and not path.is_symlink():
                for file in sorted(path.rglob("*"))[::2]:
                    if file.is_file():
                        file.unlink()

        return self._call("remove", do, half)


class FaultyOs:
    """The os module as storage sees it, in which some call fails.

    Parameters
    ----------
    fails_at
        The number of the call that fails, from 1; 0 for none.
    number
        The error's number.
    for_ever
        Fail at every call after it too, as a disk that is gone does.
    """

    CALLS = (
        *("open", "close", "fstat", "posix_fallocate", "pread", "pwrite", "ftruncate", "fsync"),
        *("replace", "posix_fadvise"),
    )

    def __init__(self, fails_at=0, number=errno.EIO, *, for_ever=False):
        self.calls = []
        self._fails_at = fails_at
        self.number = number
        self._for_ever = for_ever
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
                count >= self._fails_at if self._for_ever else count == self._fails_at
            )
            if not fails:
                return real(*arguments, **options)
            if name == "close":  # a descriptor is gone even where closing it fails
                real(*arguments, **options)
            raise OSError(self.number, os.strerror(self.number))

        return call


class HalvingOs(FaultyOs):
    """The os module as storage sees it, in which a read or a write does half of what it is told.

    Parameters
    ----------
    halves_at
        The number of the call that does, from 1; 0 for every one.
    """

    def __init__(self, halves_at):
        super().__init__()
        self._halves_at = halves_at

    def __getattr__(self, name):
        if name not in ("pread", "pwrite"):
            return super().__getattr__(name)

        def call(descriptor, what, offset):
            if self._halves_at in (0, self._count(name)):
                half = what // 2 if name == "pread" else what[: len(what) // 2]
                what = half or what
            return getattr(os, name)(descriptor, what, offset)

        return call


class RefusingStorage(Storage):
    """Real storage whose n-th call of one of its methods is refused by the system."""

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


class CuttingStorage(Storage):
    """Real storage whose process dies, or ends otherwise, right after a sync of its journal.

    No more chunks are committed than were then, however far the rest of the run had come.

    Parameters
    ----------
    commits
        How many chunks of the run are committed when it ends.
    end
        What ends it; a death, if not given.
    """

    def __init__(self, commits, *, end=None):
        super().__init__()
        self._left = commits + 1  # and the header, which is synced under a temporary name
        self._end = end

    def sync(self, file):
        super().sync(file)
        self._left -= file.path.name.endswith((".fastvgg-journal", ".fastvgg-journal.tmp"))
        if self._left == 0:
            if self._end is not None:
                self._end()
            raise Death


@contextlib.contextmanager
def system_calls(faulty):
    """Let storage see a faulty system."""
    real = storage_module.os
    storage_module.os = faulty
    try:
        yield faulty
    finally:
        storage_module.os = real


def quick_directory():
    """Where a sync takes no time: memory, where there is such a file system."""
    memory = Path("/dev/shm")  # noqa: S108
    return memory if memory.is_dir() and os.access(memory, os.W_OK) else None
