"""The durable system calls: typed where they fail, whole where they succeed, locked by one."""

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
from fastvgg.storage.local import Storage, StoredFile, file_system
from tests.helpers.checkout import importing_checkout
from tests.helpers.datasets_on_disk import must_say, names_in, pages_in_memory, printed_by, tree
from tests.helpers.faults import Death, FaultyOs, HalvingOs, MortalStorage, system_calls

PAGE = mmap.PAGESIZE


@pytest.fixture
def storage():
    return Storage()


@pytest.fixture
def file(tmp_path, storage):
    opened = storage.create(tmp_path / "file")
    yield opened
    storage.close(opened)


def test_what_is_written_at_offsets_is_there(file, storage):
    storage.write(file, b"world", 7)
    storage.write(file, memoryview(b"hello, "), 0)
    storage.write(file, b"", 100)
    storage.sync(file)
    assert file.path.read_bytes() == b"hello, world"
    assert storage.size(file) == 12
    storage.truncate(file, 5)
    assert file.path.read_bytes() == b"hello"


@pytest.mark.parametrize("part_bytes", [1, 3, 5, 100])
def test_what_is_read_is_all_that_was_asked_for(file, storage, part_bytes):
    class Hesitant(FaultyOs):
        def __getattr__(self, name):
            if name != "pread":
                return getattr(os, name)
            return lambda file, count, offset: os.pread(file, min(count, part_bytes), offset)

    storage.write(file, b"hello, world", 0)
    with system_calls(Hesitant()):
        assert storage.read(file, 0, 12) == b"hello, world"
        assert storage.read(file, 7, 5) == b"world"
        assert storage.read(file, 12, 0) == b""


def test_reading_past_the_end_is_an_error_that_names_the_offset_it_came_to(file, storage):
    storage.write(file, b"hello", 0)
    with pytest.raises(StoppedError) as caught:
        storage.read(file, 2, 4)
    must_say(caught.value, file.path, "read at offset 5", "truncated")


def test_only_for_power_a_sync_asks_the_system_for_one(tmp_path):
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


def test_for_the_process_alone_nothing_is_tried_that_a_sync_could_fail_at(tmp_path):
    storage = Storage(fsync=False)
    storage.sync(closed(tmp_path))
    storage.sync_directory(tmp_path / "missing")
    storage.syncfs(tmp_path / "missing")


def test_a_sync_of_a_disk_that_the_system_refuses_is_an_error():
    with pytest.raises(OSError, match=os.strerror(errno.EBADF)) as caught:
        storage_module._syncfs(-1)
    assert caught.value.errno == errno.EBADF


def test_what_is_forgotten_is_read_from_the_disk_again(file, storage):
    if file_system(file.path) == "tmpfs":
        pytest.skip("a file in memory is nowhere else")
    storage.write(file, bytes(1_000_000), 0)
    storage.sync(file)
    assert pages_in_memory(file.descriptor)
    storage.drop_cache(file)
    assert not pages_in_memory(file.descriptor)
    assert storage.read(file, 0, 1_000_000) == bytes(1_000_000)


def bytes_at(offset, nbytes, *, amiss=0):
    """Read-only bytes that lie within a page as they will at an offset of a file, or not quite."""
    memory = np.empty(nbytes + 2 * PAGE, np.uint8)
    begin = (offset - memory.ctypes.data) % PAGE + amiss
    view = memory[begin : begin + nbytes]
    view[...] = np.random.default_rng(offset + nbytes).integers(0, 256, nbytes)
    view.flags.writeable = False
    return view.data


@pytest.fixture
def direct(file, storage):
    """The same file, with a way past the system's cache."""
    opened = storage.direct(file)
    if opened.direct is None:
        pytest.skip("the file system has no way past its cache")
    yield opened
    os.close(opened.direct)


PIECES = [
    *((0, PAGE), (0, 3 * PAGE), (PAGE, 2 * PAGE), (0, 1), (0, PAGE - 1), (5, PAGE - 6)),
    *((128, 3 * PAGE), (PAGE - 1, 2), (PAGE - 1, PAGE + 2), (2 * PAGE + 77, 5 * PAGE + 1000)),
]


@pytest.mark.parametrize("amiss", [0, 1, 512])
@pytest.mark.parametrize("halves_at", [None, 1, 2, 3, 0])
def test_what_is_written_directly_is_what_is_written(direct, storage, amiss, halves_at):
    expected = bytearray(9 * PAGE)
    storage.write(direct, expected, 0)
    for offset, nbytes in PIECES:
        data = bytes_at(offset, nbytes, amiss=amiss)
        with system_calls(FaultyOs() if halves_at is None else HalvingOs(halves_at)):
            storage.write(direct, data, offset)
        expected[offset : offset + nbytes] = data
        assert direct.path.read_bytes() == expected
        assert storage.read(direct, offset, nbytes) == bytes(data)


@pytest.mark.parametrize(("offset", "nbytes"), PIECES)
def test_whole_pages_that_lie_right_are_written_past_the_systems_cache(
    direct, storage, offset, nbytes
):
    if file_system(direct.path) == "tmpfs":
        pytest.skip("a file in memory is nowhere else")
    storage.reserve(direct, 9 * PAGE)
    storage.write(direct, bytes_at(offset, nbytes), offset)
    first, last = -(-offset // PAGE), (offset + nbytes) // PAGE
    touched = -(-(offset + nbytes) // PAGE) - offset // PAGE
    assert pages_in_memory(direct.descriptor) == touched - max(0, last - first)


def test_memory_that_lies_amiss_is_written_through_the_cache(direct, storage):
    data = bytes_at(0, 2 * PAGE, amiss=1)
    with system_calls(FaultyOs()) as system:
        storage.write(direct, data, 0)
    assert system.calls == ["pwrite"]
    assert pages_in_memory(direct.descriptor) == 2


def test_only_for_power_a_file_is_written_directly(tmp_path, monkeypatch):
    storage = Storage(fsync=False)
    file = storage.create(tmp_path / "file")
    assert storage.direct(file) == file
    monkeypatch.setattr(storage_module, "file_system", lambda path: "nfs4")
    assert Storage().direct(file) == file
    storage.close(file)


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EOPNOTSUPP, errno.EACCES, errno.EPERM])
def test_where_there_is_no_way_past_the_cache_a_file_is_written_through_it(file, storage, number):
    with system_calls(FaultyOs(1, number)) as system:
        assert storage.direct(file) == file
    assert system.calls == ["open"]


def test_another_file_of_its_name_is_never_written(tmp_path, storage):
    file = storage.create(tmp_path / "file")
    file.path.rename(tmp_path / "moved")
    file.path.write_bytes(b"another")
    before = len(names_in(Path("/proc/self/fd")))
    with pytest.raises(StoppedError) as caught:
        storage.direct(file)
    must_say(caught.value, file.path, "another file", "ESTALE")
    assert len(names_in(Path("/proc/self/fd"))) == before
    storage.close(file)


def test_another_error_than_that_is_one(file, storage):
    with system_calls(FaultyOs(1, errno.EMFILE)), pytest.raises(StoppedError) as caught:
        storage.direct(file)
    must_say(caught.value, file.path, "open", "EMFILE")


def test_a_disk_that_wants_more_than_pages_is_written_through_the_cache(direct, storage):
    data = bytes_at(0, 2 * PAGE)
    with system_calls(FaultyOs(1, errno.EINVAL)) as system:
        storage.write(direct, data, 0)
    assert system.calls == ["pwrite", "pwrite"]
    assert direct.path.read_bytes() == data


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_a_direct_write_that_fails_is_not_tried_again(direct, storage, number):
    data = bytes_at(PAGE - 10, PAGE + 20)
    with system_calls(FaultyOs(2, number)) as system, pytest.raises(StoppedError) as caught:
        storage.write(direct, data, PAGE - 10)
    must_say(caught.value, direct.path, f"write at offset {PAGE}", errno.errorcode[number])
    assert system.calls == ["pwrite", "pwrite"]


@pytest.mark.parametrize("fails_at", [0, 1, 2])
def test_closing_closes_both_ways_into_a_file(tmp_path, storage, fails_at):
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


def test_creating_empties_and_opening_does_not(tmp_path, storage):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    storage.close(storage.open(path))
    storage.close(storage.open(path, create=True))
    assert path.read_bytes() == b"old"
    storage.close(storage.create(path))
    assert path.read_bytes() == b""
    storage.close(storage.open(tmp_path / "new", create=True))
    assert (tmp_path / "new").read_bytes() == b""


def test_a_file_is_not_passed_on_to_other_programs(file):
    assert not os.get_inheritable(file.descriptor)


def test_reserving_takes_the_space_and_changes_no_byte(file, storage):
    storage.write(file, b"abc", 0)
    storage.reserve(file, 1_000_001)
    assert storage.size(file) == 1_000_001
    assert os.fstat(file.descriptor).st_blocks * 512 >= 1_000_001
    assert file.path.read_bytes() == b"abc" + bytes(999_998)


def test_names_are_made_changed_and_removed(tmp_path, storage):
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
def test_a_link_is_not_followed(tmp_path, storage, call):
    (tmp_path / "precious").write_bytes(b"precious")
    (tmp_path / "link").symlink_to("precious")
    with pytest.raises(StoppedError) as caught:
        getattr(storage, call)(tmp_path / "link")
    must_say(caught.value, tmp_path / "link", call, "ELOOP")
    assert (tmp_path / "precious").read_bytes() == b"precious"


@pytest.mark.parametrize("call", ["create", "open"])
def test_a_link_to_nowhere_makes_nothing(tmp_path, storage, call):
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(StoppedError):
        storage.open(tmp_path / "link", create=True) if call == "open" else storage.create(
            tmp_path / "link"
        )
    assert names_in(tmp_path) == ["link"]


def closed(tmp_path):
    """A file whose descriptor no call can use."""
    storage = Storage()
    file = storage.create(tmp_path / "closed")
    storage.close(file)
    return StoredFile(1_000_000 + file.descriptor, file.path)


FAILING = {
    "create": lambda s, p: s.create(p / "missing" / "file"),
    "open": lambda s, p: s.open(p / "missing"),
    "close": lambda s, p: s.close(closed(p)),
    "lock": lambda s, p: s.lock(closed(p)),
    "fstat": lambda s, p: s.size(closed(p)),
    "reserve": lambda s, p: s.reserve(closed(p), 10),
    "write": lambda s, p: s.write(closed(p), b"abc", 4711),
    "read": lambda s, p: s.read(closed(p), 4711, 3),
    "truncate": lambda s, p: s.truncate(closed(p), 4711),
    "fsync": lambda s, p: s.sync(closed(p)),
    "fsync of a directory": lambda s, p: s.sync_directory(p / "missing"),
    "fadvise": lambda s, p: s.drop_cache(closed(p)),
    "syncfs": lambda s, p: s.syncfs(p / "missing"),
    "mkdir": lambda s, p: s.make_directory(p / "file" / "below"),
    "rename": lambda s, p: s.rename(p / "missing", p / "new"),
    "remove": lambda s, p: s.remove(p / "file" / "below"),
}


@pytest.mark.parametrize("call", FAILING)
def test_a_call_that_the_system_refuses_is_named_with_its_file_and_offset(tmp_path, storage, call):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StoppedError) as caught:
        FAILING[call](storage, tmp_path)
    offset = 4711 if call in ("write", "read", "truncate") else 0
    must_say(caught.value, tmp_path, call.split()[0], f"offset {offset}")
    assert isinstance(caught.value.__cause__, OSError)
    assert errno.errorcode[caught.value.__cause__.errno] in str(caught.value)


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_a_write_that_fails_half_way_is_named_with_the_offset_it_came_to(file, storage, number):
    class Hesitant(FaultyOs):
        CALLS = ("pwrite",)

        def __getattr__(self, name):
            call = super().__getattr__(name)
            return (lambda d, b, o: call(d, b[:10], o)) if name == "pwrite" else call

    with system_calls(Hesitant(3, number)), pytest.raises(StoppedError) as caught:
        storage.write(file, bytes(100), 1000)
    must_say(caught.value, file.path, "write at offset 1020", errno.errorcode[number])


def test_a_failed_sync_is_not_tried_again(file, storage):
    class Once(FaultyOs):
        CALLS = ("fsync",)

    with system_calls(Once(1)) as system, pytest.raises(StoppedError):
        storage.sync(file)
    assert system.calls == ["fsync"]


def test_no_room_to_reserve_is_a_target_error_and_takes_none(tmp_path, storage):
    file = storage.create(tmp_path / "file")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(TargetError) as caught:
            storage.reserve(file, 1001)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    must_say(caught.value, file.path, "1001 bytes", "disk space")
    storage.close(file)
    assert file.path.stat().st_size == 0


def test_a_write_over_the_limit_of_a_file_is_an_error_and_no_signal(tmp_path, storage):
    file = storage.create(tmp_path / "file")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(StoppedError) as caught:
            storage.write(file, bytes(2000), 0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        storage.close(file)
    must_say(caught.value, file.path, "write at offset 1000", "EFBIG")


@pytest.mark.parametrize("there", [None, b"old"], ids=["new", "in place of another"])
def test_a_small_file_is_written_whole_or_not_at_all(tmp_path, there):
    counting = MortalStorage()
    counting.write_atomic(tmp_path / "counted", [b"new" * 1000])
    counting.bury()
    (tmp_path / "graveyard").mkdir()
    for half_done in (False, True):
        for graveyard in (None, tmp_path / "graveyard"):
            for number in range(1, len(counting.calls) + 1):
                path = tmp_path / f"{half_done}-{graveyard is None}-{number}" / "file"
                path.parent.mkdir()
                if there is not None:
                    path.write_bytes(there)
                storage = MortalStorage(number, half_done=half_done, graveyard=graveyard)
                with pytest.raises(Death):
                    storage.write_atomic(path, [b"new" * 1000])
                storage.bury()
                actual = path.read_bytes() if path.exists() else None
                assert actual in (there, b"new" * 1000)
                Storage().write_atomic(path, [b"newer"])
                assert tree(path.parent) == {b"file": b"newer"}


def test_a_small_file_that_was_written_whole_outlives_a_power_cut(tmp_path):
    counting = MortalStorage()
    counting.write_atomic(tmp_path / "counted", [b"new"])
    (tmp_path / "graveyard").mkdir()
    (tmp_path / "here").mkdir()
    storage = MortalStorage(len(counting.calls) + 1, graveyard=tmp_path / "graveyard")
    storage.write_atomic(tmp_path / "here" / "file", [b"new"])
    with pytest.raises(Death):
        storage.remove(tmp_path / "here" / "nothing")
    storage.bury()
    assert tree(tmp_path / "here") == {b"file": b"new"}


def test_only_one_has_the_lock(tmp_path, storage):
    first, second = (storage.open(tmp_path / "file", create=True) for _ in range(2))
    assert storage.lock(first)
    assert storage.lock(first)
    assert not storage.lock(second)
    storage.close(first)
    assert storage.lock(second)
    storage.close(second)


LOCKS = """
import pathlib, sys
from fastvgg.storage.local import Storage
storage = Storage()
file = storage.open(pathlib.Path(sys.argv[1]), create=True)
print(storage.lock(file), flush=True)
if len(sys.argv) > 2:
    sys.stdin.readline()
"""


@pytest.mark.parametrize("end", ["exit", "kill"])
def test_another_process_has_the_lock_until_it_ends_however_it_ends(tmp_path, storage, end):
    path = tmp_path / "file"
    with subprocess.Popen(
        [sys.executable, "-c", LOCKS, path, "wait"],
        env=importing_checkout(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdout.readline() == "True\n"
        file = storage.open(path)
        assert not storage.lock(file)
        assert printed_by(LOCKS, path) == "False"
        if end == "kill":
            other.kill()
        other.communicate("\n")
    assert storage.lock(file)
    storage.close(file)


@pytest.mark.parametrize("change", ["removed", "replaced"])
def test_a_lock_on_a_file_that_no_longer_has_the_name_is_none(tmp_path, storage, change):
    path = tmp_path / "file"
    file = storage.open(path, create=True)
    path.unlink()
    if change == "replaced":
        path.write_bytes(b"")
    assert not storage.lock(file)
    storage.close(file)


def test_a_small_file_that_cannot_be_written_is_not_left_open(tmp_path, storage):
    def opened():
        return len(list(Path("/proc/self/fd").iterdir()))

    before = opened()
    for number in range(2, 5):
        with system_calls(FaultyOs(number)), pytest.raises(StoppedError):
            storage.write_atomic(tmp_path / "file", [b"new"])
    assert opened() == before
