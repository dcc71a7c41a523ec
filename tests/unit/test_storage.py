"""Durable storage calls: typed errors, complete writes, exclusive locks."""

from __future__ import annotations

import errno
import mmap
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fastvgg.errors import StoppedError, TargetError
from fastvgg.storage import local as storage_module
from fastvgg.storage.local import OpenFile, Storage, file_system_type
from tests.helpers.checkout import checkout_environment
from tests.helpers.datasets_on_disk import (
    check_error,
    count_cached_pages,
    names_in,
    stdout_of,
    tree,
)
from tests.helpers.faults import CrashingStorage, FaultyOs, ShortIoOs, SimulatedCrash, system_calls

PAGE = mmap.PAGESIZE


@pytest.fixture
def storage():
    return Storage()


@pytest.fixture
def file(tmp_path, storage):
    opened = storage.create(tmp_path / "file")
    yield opened
    storage.close(opened)


def test_writes_at_offsets_are_stored(file, storage):
    storage.write(file, b"world", 7)
    storage.write(file, memoryview(b"hello, "), 0)
    storage.write(file, b"", 100)
    storage.sync(file)
    assert file.path.read_bytes() == b"hello, world"
    assert storage.size(file) == 12
    storage.truncate(file, 5)
    assert file.path.read_bytes() == b"hello"


@pytest.mark.parametrize("part_bytes", [1, 3, 5, 100])
def test_short_reads_are_continued(file, storage, part_bytes):
    class PartialIoOs(FaultyOs):
        def __getattr__(self, name):
            if name != "pread":
                return getattr(os, name)
            return lambda file, count, offset: os.pread(file, min(count, part_bytes), offset)

    storage.write(file, b"hello, world", 0)
    with system_calls(PartialIoOs()):
        assert storage.read(file, 0, 12) == b"hello, world"
        assert storage.read(file, 7, 5) == b"world"
        assert storage.read(file, 12, 0) == b""


def test_reading_past_the_end_raises_with_the_offset(file, storage):
    storage.write(file, b"hello", 0)
    with pytest.raises(StoppedError) as caught:
        storage.read(file, 2, 4)
    check_error(caught.value, file.path, "read at offset 5", "truncated")


def test_sync_calls_fsync_only_if_enabled(tmp_path):
    for storage, expected in (
        (Storage(), ["fsync"]),
        (Storage(fsync=True), ["fsync"]),
        (Storage(fsync=False), []),
    ):
        file = storage.create(tmp_path / "file")
        storage.write(file, b"abc", 0)
        with system_calls(FaultyOs()) as system:
            storage.sync(file)
            assert system.calls == expected
            storage.sync_directory(tmp_path)
            assert system.calls.count("fsync") == 2 * len(expected)
            opened = system.calls.count("open")
            storage.syncfs(tmp_path)
            assert system.calls.count("open") == opened + len(expected)
        storage.close(file)
        assert file.path.read_bytes() == b"abc"


def test_disabled_fsync_never_fails(tmp_path):
    storage = Storage(fsync=False)
    storage.sync(closed_file(tmp_path))
    storage.sync_directory(tmp_path / "missing")
    storage.syncfs(tmp_path / "missing")


def test_failed_syncfs_raises():
    with pytest.raises(OSError, match=os.strerror(errno.EBADF)) as caught:
        storage_module._syncfs(-1)
    assert caught.value.errno == errno.EBADF


def test_drop_cache_evicts_pages(file, storage):
    if file_system_type(file.path) == "tmpfs":
        pytest.skip("a file in memory is nowhere else")
    storage.write(file, bytes(1_000_000), 0)
    storage.sync(file)
    assert count_cached_pages(file.descriptor)
    storage.drop_cache(file)
    assert not count_cached_pages(file.descriptor)
    assert storage.read(file, 0, 1_000_000) == bytes(1_000_000)


def memory_for_offset(offset, nbytes, *, misaligned_by=0):
    """Return read-only bytes aligned like their offset in a file, or misaligned by some bytes."""
    memory = np.empty(nbytes + 2 * PAGE, np.uint8)
    begin = (offset - memory.ctypes.data) % PAGE + misaligned_by
    view = memory[begin : begin + nbytes]
    view[...] = np.random.default_rng(offset + nbytes).integers(0, 256, nbytes)
    view.flags.writeable = False
    return view.data


@pytest.fixture
def direct(file, storage):
    """The same file, also opened for direct I/O."""
    opened = storage.direct(file)
    if opened.direct is None:
        pytest.skip("the file system has no way past its cache")
    yield opened
    os.close(opened.direct)


WRITES = [
    *((0, PAGE), (0, 3 * PAGE), (PAGE, 2 * PAGE), (0, 1), (0, PAGE - 1), (5, PAGE - 6)),
    *((128, 3 * PAGE), (PAGE - 1, 2), (PAGE - 1, PAGE + 2), (2 * PAGE + 77, 5 * PAGE + 1000)),
]


@pytest.mark.parametrize("misaligned_by", [0, 1, 512])
@pytest.mark.parametrize("short_at", [None, 1, 2, 3, 0])
def test_direct_writes_store_the_right_bytes(direct, storage, misaligned_by, short_at):
    expected = bytearray(9 * PAGE)
    storage.write(direct, expected, 0)
    for offset, nbytes in WRITES:
        data = memory_for_offset(offset, nbytes, misaligned_by=misaligned_by)
        with system_calls(FaultyOs() if short_at is None else ShortIoOs(short_at)):
            storage.write(direct, data, offset)
        expected[offset : offset + nbytes] = data
        assert direct.path.read_bytes() == expected
        assert storage.read(direct, offset, nbytes) == bytes(data)


@pytest.mark.parametrize(("offset", "nbytes"), WRITES)
def test_aligned_pages_bypass_the_page_cache(direct, storage, offset, nbytes):
    if file_system_type(direct.path) == "tmpfs":
        pytest.skip("a file in memory is nowhere else")
    storage.reserve(direct, 9 * PAGE)
    storage.write(direct, memory_for_offset(offset, nbytes), offset)
    first, last = -(-offset // PAGE), (offset + nbytes) // PAGE
    touched = -(-(offset + nbytes) // PAGE) - offset // PAGE
    assert count_cached_pages(direct.descriptor) == touched - max(0, last - first)


def test_misaligned_memory_is_written_through_the_page_cache(direct, storage):
    data = memory_for_offset(0, 2 * PAGE, misaligned_by=1)
    with system_calls(FaultyOs()) as system:
        storage.write(direct, data, 0)
    assert system.calls == ["pwrite"]
    assert count_cached_pages(direct.descriptor) == 2


def test_direct_io_is_used_only_with_fsync_on_local_disks(tmp_path, monkeypatch):
    storage = Storage(fsync=False)
    file = storage.create(tmp_path / "file")
    assert storage.direct(file) == file
    monkeypatch.setattr(storage_module, "file_system_type", lambda path: "nfs4")
    assert Storage().direct(file) == file
    storage.close(file)


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EOPNOTSUPP, errno.EACCES, errno.EPERM])
def test_unsupported_direct_io_falls_back_to_the_page_cache(file, storage, number):
    with system_calls(FaultyOs(1, number)) as system:
        assert storage.direct(file) == file
    assert system.calls == ["open"]


def test_direct_rejects_a_file_that_was_replaced(tmp_path, storage):
    file = storage.create(tmp_path / "file")
    file.path.rename(tmp_path / "moved")
    file.path.write_bytes(b"another")
    before = len(names_in(Path("/proc/self/fd")))
    with pytest.raises(StoppedError) as caught:
        storage.direct(file)
    check_error(caught.value, file.path, "another file", "ESTALE")
    assert len(names_in(Path("/proc/self/fd"))) == before
    storage.close(file)


def test_other_errors_of_direct_open_are_raised(file, storage):
    with system_calls(FaultyOs(1, errno.EMFILE)), pytest.raises(StoppedError) as caught:
        storage.direct(file)
    check_error(caught.value, file.path, "open", "EMFILE")


def test_rejected_direct_write_falls_back_to_the_page_cache(direct, storage):
    data = memory_for_offset(0, 2 * PAGE)
    with system_calls(FaultyOs(1, errno.EINVAL)) as system:
        storage.write(direct, data, 0)
    assert system.calls == ["pwrite", "pwrite"]
    assert direct.path.read_bytes() == data


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_failed_direct_write_is_not_retried(direct, storage, number):
    data = memory_for_offset(PAGE - 10, PAGE + 20)
    with system_calls(FaultyOs(2, number)) as system, pytest.raises(StoppedError) as caught:
        storage.write(direct, data, PAGE - 10)
    check_error(caught.value, direct.path, f"write at offset {PAGE}", errno.errorcode[number])
    assert system.calls == ["pwrite", "pwrite"]


@pytest.mark.parametrize("fails_at", [0, 1, 2])
def test_close_closes_both_descriptors(tmp_path, storage, fails_at):
    file = storage.direct(storage.create(tmp_path / "file"))
    if file.direct is None:
        pytest.skip("the file system has no way past its cache")
    with system_calls(FaultyOs(fails_at)):
        if fails_at:
            with pytest.raises(StoppedError):
                storage.close(file)
        else:
            storage.close(file)
    for descriptor in (file.descriptor, file.direct):
        with pytest.raises(OSError, match=os.strerror(errno.EBADF)):
            os.fstat(descriptor)


def test_create_truncates_and_open_does_not(tmp_path, storage):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    storage.close(storage.open(path))
    storage.close(storage.open(path, create=True))
    assert path.read_bytes() == b"old"
    storage.close(storage.create(path))
    assert path.read_bytes() == b""
    storage.close(storage.open(tmp_path / "new", create=True))
    assert (tmp_path / "new").read_bytes() == b""


def test_file_descriptors_are_not_inheritable(file):
    assert not os.get_inheritable(file.descriptor)


def test_reserve_allocates_space_without_changing_bytes(file, storage):
    storage.write(file, b"abc", 0)
    storage.reserve(file, 1_000_001)
    assert storage.size(file) == 1_000_001
    assert os.fstat(file.descriptor).st_blocks * 512 >= 1_000_001
    assert file.path.read_bytes() == b"abc" + bytes(999_998)


def test_make_directory_rename_and_remove(tmp_path, storage):
    storage.make_directory(tmp_path / "a" / "b")
    storage.make_directory(tmp_path / "a" / "b")
    (tmp_path / "a" / "b" / "file").write_bytes(b"1")
    (tmp_path / "a" / "other").write_bytes(b"2")
    storage.rename(tmp_path / "a" / "other", tmp_path / "a" / "b" / "file")
    assert tree(tmp_path)[b"a/b/file"] == b"2"
    storage.sync_directory(tmp_path / "a")
    (tmp_path / "link").symlink_to("a")
    storage.remove(tmp_path / "link")
    assert (tmp_path / "a" / "b" / "file").exists()
    storage.remove(tmp_path / "a")
    storage.remove(tmp_path / "a")
    assert tree(tmp_path) == {}


@pytest.mark.parametrize("call", ["create", "open"])
def test_symlinks_are_not_followed(tmp_path, storage, call):
    (tmp_path / "precious").write_bytes(b"precious")
    (tmp_path / "link").symlink_to("precious")
    with pytest.raises(StoppedError) as caught:
        getattr(storage, call)(tmp_path / "link")
    check_error(caught.value, tmp_path / "link", call, "ELOOP")
    assert (tmp_path / "precious").read_bytes() == b"precious"


@pytest.mark.parametrize("call", ["create", "open"])
def test_dangling_symlink_creates_nothing(tmp_path, storage, call):
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(StoppedError):
        storage.open(tmp_path / "link", create=True) if call == "open" else storage.create(
            tmp_path / "link"
        )
    assert names_in(tmp_path) == ["link"]


def closed_file(tmp_path):
    """Return a file with an invalid descriptor."""
    storage = Storage()
    file = storage.create(tmp_path / "closed")
    storage.close(file)
    return OpenFile(1_000_000 + file.descriptor, file.path)


FAILING_CALLS = {
    "create": lambda s, p: s.create(p / "missing" / "file"),
    "open": lambda s, p: s.open(p / "missing"),
    "close": lambda s, p: s.close(closed_file(p)),
    "lock": lambda s, p: s.lock(closed_file(p)),
    "fstat": lambda s, p: s.size(closed_file(p)),
    "reserve": lambda s, p: s.reserve(closed_file(p), 10),
    "write": lambda s, p: s.write(closed_file(p), b"abc", 4711),
    "read": lambda s, p: s.read(closed_file(p), 4711, 3),
    "truncate": lambda s, p: s.truncate(closed_file(p), 4711),
    "fsync": lambda s, p: s.sync(closed_file(p)),
    "fsync of a directory": lambda s, p: s.sync_directory(p / "missing"),
    "fadvise": lambda s, p: s.drop_cache(closed_file(p)),
    "syncfs": lambda s, p: s.syncfs(p / "missing"),
    "mkdir": lambda s, p: s.make_directory(p / "file" / "below"),
    "rename": lambda s, p: s.rename(p / "missing", p / "new"),
    "remove": lambda s, p: s.remove(p / "file" / "below"),
}


@pytest.mark.parametrize("call", FAILING_CALLS)
def test_failed_system_call_is_reported_with_file_and_offset(tmp_path, storage, call):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StoppedError) as caught:
        FAILING_CALLS[call](storage, tmp_path)
    offset = 4711 if call in ("write", "read", "truncate") else 0
    check_error(caught.value, tmp_path, call.split()[0], f"offset {offset}")
    assert isinstance(caught.value.__cause__, OSError)
    assert errno.errorcode[caught.value.__cause__.errno] in str(caught.value)


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_partial_write_failure_is_reported_with_the_offset_reached(file, storage, number):
    class PartialIoOs(FaultyOs):
        CALLS = ("pwrite",)

        def __getattr__(self, name):
            call = super().__getattr__(name)
            return (lambda d, b, o: call(d, b[:10], o)) if name == "pwrite" else call

    with system_calls(PartialIoOs(3, number)), pytest.raises(StoppedError) as caught:
        storage.write(file, bytes(100), 1000)
    check_error(caught.value, file.path, "write at offset 1020", errno.errorcode[number])


def test_failed_sync_is_not_retried(file, storage):
    class FailingFsyncOs(FaultyOs):
        CALLS = ("fsync",)

    with system_calls(FailingFsyncOs(1)) as system, pytest.raises(StoppedError):
        storage.sync(file)
    assert system.calls == ["fsync"]


def test_failed_reserve_raises_target_error_and_allocates_nothing(tmp_path, storage):
    file = storage.create(tmp_path / "file")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(TargetError) as caught:
            storage.reserve(file, 1001)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    check_error(caught.value, file.path, "1001 bytes", "ulimit -f")
    storage.close(file)
    assert file.path.stat().st_size == 0


def test_write_beyond_the_file_size_limit_raises_without_a_signal(tmp_path, storage):
    file = storage.create(tmp_path / "file")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(StoppedError) as caught:
            storage.write(file, bytes(2000), 0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        storage.close(file)
    check_error(caught.value, file.path, "write at offset 1000", "EFBIG")


@pytest.mark.parametrize("existing", [None, b"old"], ids=["new", "replacing another"])
def test_write_atomic_is_all_or_nothing(tmp_path, existing):
    counting = CrashingStorage()
    counting.write_atomic(tmp_path / "counted", [b"new" * 1000])
    counting.finish_crash()
    (tmp_path / "snapshot_directory").mkdir()
    for partially_done in (False, True):
        for snapshot_directory in (None, tmp_path / "snapshot_directory"):
            for number in range(1, len(counting.calls) + 1):
                path = tmp_path / f"{partially_done}-{snapshot_directory is None}-{number}" / "file"
                path.parent.mkdir()
                if existing is not None:
                    path.write_bytes(existing)
                storage = CrashingStorage(
                    number, partially_done=partially_done, snapshot_directory=snapshot_directory
                )
                with pytest.raises(SimulatedCrash):
                    storage.write_atomic(path, [b"new" * 1000])
                storage.finish_crash()
                actual = path.read_bytes() if path.exists() else None
                assert actual in (existing, b"new" * 1000)
                Storage().write_atomic(path, [b"newer"])
                assert tree(path.parent) == {b"file": b"newer"}


def test_write_atomic_survives_a_power_cut(tmp_path):
    counting = CrashingStorage()
    counting.write_atomic(tmp_path / "counted", [b"new"])
    (tmp_path / "snapshot_directory").mkdir()
    (tmp_path / "here").mkdir()
    storage = CrashingStorage(
        len(counting.calls) + 1, snapshot_directory=tmp_path / "snapshot_directory"
    )
    storage.write_atomic(tmp_path / "here" / "file", [b"new"])
    with pytest.raises(SimulatedCrash):
        storage.remove(tmp_path / "here" / "nothing")
    storage.finish_crash()
    assert tree(tmp_path / "here") == {b"file": b"new"}


def test_lock_is_exclusive(tmp_path, storage):
    first, second = (storage.open(tmp_path / "file", create=True) for _ in range(2))
    assert storage.lock(first)
    assert storage.lock(first)
    assert not storage.lock(second)
    storage.close(first)
    assert storage.lock(second)
    storage.close(second)


LOCK_SCRIPT = """
import pathlib, sys
from fastvgg.storage.local import Storage
storage = Storage()
file = storage.open(pathlib.Path(sys.argv[1]), create=True)
print(storage.lock(file), flush=True)
if len(sys.argv) > 2:
    sys.stdin.readline()
"""


@pytest.mark.parametrize("end", ["exit", "kill"])
def test_lock_is_released_when_its_process_exits_or_is_killed(tmp_path, storage, end):
    path = tmp_path / "file"
    with subprocess.Popen(
        [sys.executable, "-c", LOCK_SCRIPT, path, "wait"],
        env=checkout_environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdout.readline() == "True\n"
        file = storage.open(path)
        assert not storage.lock(file)
        assert stdout_of(LOCK_SCRIPT, path) == "False"
        if end == "kill":
            other.kill()
        other.communicate("\n")
    assert storage.lock(file)
    storage.close(file)


@pytest.mark.parametrize("change", ["removed", "replaced"])
def test_lock_fails_if_the_file_was_removed_or_replaced(tmp_path, storage, change):
    path = tmp_path / "file"
    file = storage.open(path, create=True)
    path.unlink()
    if change == "replaced":
        path.write_bytes(b"")
    assert not storage.lock(file)
    storage.close(file)


def test_failed_write_atomic_closes_its_file(tmp_path, storage):
    def opened():
        return len(list(Path("/proc/self/fd").iterdir()))

    before = opened()
    for number in range(2, 5):
        with system_calls(FaultyOs(number)), pytest.raises(StoppedError):
            storage.write_atomic(tmp_path / "file", [b"new"])
    assert opened() == before


@pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="needs direct I/O")
@pytest.mark.parametrize("fails_at", [2, 3])  # opening for direct I/O, and what follows
def test_file_that_cannot_be_written_is_closed(tmp_path, fails_at):
    with system_calls(FaultyOs(fails_at)), pytest.raises(StoppedError):
        Storage().write_file(tmp_path / "x", [b"data"], direct=True)
    opened = [descriptor.resolve() for descriptor in Path("/proc/self/fd").iterdir()]
    assert tmp_path / "x" not in opened
