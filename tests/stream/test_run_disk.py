"""The I/O of a run: syncs, the page cache, full disks and missing system calls."""

from __future__ import annotations

import errno
import mmap
import os
import shutil
import sys
import weakref

import numpy as np
import pytest

import fastvgg
from fastvgg.datasets.npy import NpySource
from fastvgg.errors import ResumeError, StoppedError, TargetError
from fastvgg.storage.local import Storage, file_system_type
from fastvgg.stream.journal import journal_path
from tests.helpers.datasets_on_disk import (
    check_error,
    count_cached_pages,
    data_tree,
    names_in,
    network_inputs,
    npy_bytes,
    pixels,
    plan_of,
    rows_by_name,
    save_images,
    save_npy,
    stdout_of,
    stdout_on_small_disk,
    tree,
)
from tests.helpers.faults import FaultyOs, InterruptedStorage, SimulatedCrash, system_calls
from tests.helpers.runs import interrupt_run, run

# Durability

DATASETS = {  # source, target, settings, minimum number of fsync calls
    "array": ("x.npy", "y.npy", {"mode": "caffe"}, 3 * 2),
    "folder": ("photos", "y.npy", {"mode": "caffe"}, 3 * 2),
    "files": ("stored.npy", "out", {"direction": "restore"}, 3 + 2),
    "in place": ("place/floats.npy", None, {"mode": "caffe", "in_place": True}, 3 + 2),
}


@pytest.mark.parametrize("kind", DATASETS)
def test_without_fsync_nothing_is_synced_and_output_is_the_same(tmp_path, kind):
    source, target, settings, least = DATASETS[kind]
    save_npy(tmp_path / "x.npy", pixels(11))
    save_images(tmp_path / "photos", pixels(11))
    plan_of(tmp_path / "x.npy", tmp_path / "stored.npy", mode="caffe").run()
    place = tmp_path / "place"
    syncs, files = {}, {}
    for fsync in (True, False):
        place.mkdir()
        if target is None:
            save_npy(tmp_path / source, pixels(11).astype(np.float32))
            os.utime(tmp_path / source, ns=(0, 1))
        plan = plan_of(
            tmp_path / source,
            None if target is None else place / target,
            images_per_chunk=4,
            fsync=fsync,
            **settings,
        )
        with system_calls(FaultyOs()) as system:
            assert plan.run().counts["computed_chunks"] == 3
        syncs[fsync] = system.calls.count("fsync")
        files[fsync] = data_tree(place)
        shutil.rmtree(place)
    assert syncs[False] == 0
    assert syncs[True] >= least
    assert files[False] == files[True]


def test_each_chunk_is_synced_before_its_commit(tmp_path, array):
    synced = []

    class RecordingStorage(Storage):
        def sync(self, file):
            super().sync(file)
            synced.append(file.path.name)

        def sync_directory(self, path):
            super().sync_directory(path)
            synced.append(path.name)

    run(
        plan_of(array, tmp_path / "y.npy", mode="caffe", images_per_chunk=4),
        storage=RecordingStorage(),
    )
    partial, journal, here = "y.npy.partial", "y.npy.fastvgg-journal", tmp_path.name
    assert synced == [
        *(here, f"{journal}.tmp", here),  # the run is begun
        here,  # the partial has its name
        *(partial, journal) * 3,
        here,  # the data has its name
        *("y.npy.fastvgg.json.tmp", here),
        here,  # the journal is gone
    ]


def test_files_of_a_chunk_are_synced_together_before_its_commit(tmp_path, array):
    plan_of(array, tmp_path / "stored.npy", mode="caffe").run()
    synced = []

    class RecordingStorage(Storage):
        def write(self, file, data, offset):
            super().write(file, data, offset)
            if file.path.suffix == ".png":
                synced.append("image")

        def sync(self, file):
            super().sync(file)
            synced.append(file.path.name)

        def syncfs(self, directory):
            super().syncfs(directory)
            synced.append(directory.name)

    plan = plan_of(
        tmp_path / "stored.npy", tmp_path / "out", direction="restore", images_per_chunk=11
    )
    run(plan, storage=RecordingStorage())
    assert synced == [
        "out.fastvgg-journal.tmp",
        *(["image"] * 11),
        *("out.partial", "out.fastvgg-journal", "out.fastvgg.json.tmp"),
    ]


def test_files_are_synced_individually_without_syncfs(tmp_path, array):
    plan_of(array, tmp_path / "stored.npy", mode="caffe").run()
    synced = []

    class NoSyncfsStorage(Storage):
        def has_syncfs(self, directory):
            assert directory == tmp_path / "out.partial"
            return False

        def sync(self, file):
            super().sync(file)
            synced.append(file.path.name)

    run(
        plan_of(tmp_path / "stored.npy", tmp_path / "out", direction="restore"),
        storage=NoSyncfsStorage(),
    )
    assert [name for name in synced if name.endswith(".png")] == names_in(tmp_path / "out")


@pytest.mark.parametrize("then", [True, False])
def test_run_can_resume_with_or_without_fsync(tmp_path, array, then):
    target = interrupt_run(array, tmp_path / "y.npy", mode="caffe", fsync=not then)
    report = plan_of(array, target, mode="caffe", fsync=then).run()
    assert report.counts["computed_chunks"] == 5
    assert target.read_bytes() == npy_bytes(network_inputs(pixels(11), "caffe"))


# Disk space


@pytest.mark.parametrize("name", ["y.npy", "y.h5::/a"])
def test_insufficient_disk_space_is_rejected_with_both_numbers(tmp_path, name):
    save_npy(tmp_path / "x.npy", pixels(67, 37, 41))
    (tmp_path / "small").mkdir()
    actual = stdout_on_small_disk(
        tmp_path / "small",
        disk_bytes=256 * 1024,
        source=f"""
from tests.helpers.datasets_on_disk import names_in, plan_of
from fastvgg.errors import TargetError
try:
    plan_of({str(tmp_path / "x.npy")!r}, {str(tmp_path / "small" / name)!r}, mode="caffe")
except TargetError as error:
    print(error)
print(names_in({str(tmp_path / "small")!r}))
""",
    )
    needed_bytes = 67 * 37 * 41 * 3 * 4
    assert f"({needed_bytes} bytes)" in actual
    assert f"({256 * 1024} bytes) free" in actual
    assert "dtype='float16'" in actual
    assert actual.endswith("[]")


def test_disk_filled_after_planning_is_rejected_and_leaves_no_files(tmp_path):
    save_npy(tmp_path / "x.npy", pixels(11, 37, 41))
    (tmp_path / "small").mkdir()
    actual = stdout_on_small_disk(
        tmp_path / "small",
        disk_bytes=512 * 1024,
        source=f"""
import pathlib
from tests.helpers.datasets_on_disk import names_in, plan_of
from fastvgg.errors import FastvggError
small = pathlib.Path({str(tmp_path / "small")!r})
plan = plan_of({str(tmp_path / "x.npy")!r}, small / "y.npy", mode="caffe", images_per_chunk=2)
(small / "other").write_bytes(bytes(400 * 1024))
try:
    plan.run()
except FastvggError as error:
    print(type(error).__name__, error)
print(names_in(small))
(small / "other").unlink()
print(plan_of(plan.source, plan.target, mode="caffe", images_per_chunk=2).run().counts)
""",
    )
    lines = actual.splitlines()
    assert lines[0].startswith("TargetError ")
    assert str(11 * 37 * 41 * 3 * 4 + 128) in lines[0]
    assert "space" in lines[1]
    assert lines[2] == "['other']"
    assert "'computed_chunks': 6" in lines[3]


def test_full_disk_stops_an_image_run_which_resumes_with_free_space(tmp_path):
    plan_of(
        save_npy(tmp_path / "x.npy", pixels(11, 37, 41)), tmp_path / "y.npy", mode="caffe"
    ).run()
    (tmp_path / "small").mkdir()
    actual = stdout_on_small_disk(
        tmp_path / "small",
        disk_bytes=512 * 1024,
        source=f"""
import pathlib
from tests.helpers.datasets_on_disk import images_in, pixels, plan_of
from fastvgg.errors import FastvggError
small = pathlib.Path({str(tmp_path / "small")!r})
(small / "other").write_bytes(bytes(480 * 1024))
settings = dict(direction="restore", images_per_chunk=2)
try:
    plan_of({str(tmp_path / "y.npy")!r}, small / "out", **settings).run()
except FastvggError as error:
    print(error.exit_code, error)
print((small / "out").exists())
(small / "other").unlink()
report = plan_of({str(tmp_path / "y.npy")!r}, small / "out", **settings).run()
print(0 < report.counts["computed_chunks"] < 6)
found = [image for _, image in sorted(images_in(small / "out").items())]
print(b"".join(image.tobytes() for image in found) == pixels(11, 37, 41).tobytes())
""",
    )
    lines = actual.splitlines()
    assert lines[0].startswith("5 ")
    assert "No space left on device (ENOSPC)" in lines[0]
    assert lines[2:] == ["False", "True", "True"]


def test_file_size_limit_is_rejected_and_leaves_no_files(tmp_path, array):
    actual = stdout_of(
        """
import os, resource, sys
from tests.helpers.datasets_on_disk import names_in, plan_of
from fastvgg.errors import FastvggError
plan = plan_of(sys.argv[1], sys.argv[2], mode="caffe", images_per_chunk=2)
resource.setrlimit(resource.RLIMIT_FSIZE, (6000, resource.RLIM_INFINITY))
try:
    plan.run()
except FastvggError as error:
    print(type(error).__name__, error)
print(names_in(os.path.dirname(sys.argv[2])))
""",
        array,
        tmp_path / "y.npy",
    )
    lines = actual.splitlines()
    assert lines[0].startswith("TargetError ")
    assert str(11 * 756 + 128) in lines[0]
    assert "too large" in lines[0]
    assert lines[-1] == "['x.npy']"


def test_failed_allocation_is_rejected_and_leaves_no_files(tmp_path, array):
    class FullDiskOs(FaultyOs):
        CALLS = ("posix_fallocate",)

    plan = plan_of(array, tmp_path / "y.npy", mode="caffe")
    with system_calls(FullDiskOs(1, errno.ENOSPC)), pytest.raises(TargetError) as caught:
        plan.run()
    check_error(caught.value, tmp_path / "y.npy", 11 * 756 + 128)
    assert names_in(tmp_path) == ["x.npy"]


def test_short_writes_are_continued(tmp_path, photos):
    class PartialIoOs(FaultyOs):
        def __getattr__(self, name):
            if name != "pwrite":
                return getattr(os, name)
            return lambda file, data, offset: os.pwrite(file, data[:1013], offset)

    stored, back = tmp_path / "y.npy", tmp_path / "back"
    with system_calls(PartialIoOs()):
        plan_of(photos, stored, mode="caffe", images_per_chunk=4).run()
        plan_of(stored, back, direction="restore", images_per_chunk=4).run()
    batch = rows_by_name(photos, pixels(11))
    assert stored.read_bytes() == npy_bytes(network_inputs(batch, "caffe"))
    fastvgg.verify(stored, full=True)
    fastvgg.verify(back, full=True)


def test_zero_length_writes_raise_instead_of_looping(tmp_path, array):
    class ZeroWriteOs(FaultyOs):
        def __getattr__(self, name):
            if name != "pwrite":
                return getattr(os, name)
            self.calls.append(name)
            assert len(self.calls) < 1000, "an endless loop"
            return lambda file, data, offset: 0

    with system_calls(ZeroWriteOs()), pytest.raises(TargetError, match="EIO"):
        plan_of(array, tmp_path / "y.npy", mode="caffe").run()


def test_output_is_the_same_without_optional_system_calls(tmp_path, array, monkeypatch):
    class MinimalOs(FaultyOs):
        def __getattr__(self, name):
            if name in ("posix_fallocate", "O_DIRECT"):
                raise AttributeError(name)
            return getattr(os, name)

    monkeypatch.setitem(sys.modules, "fcntl", None)
    with system_calls(MinimalOs()):
        plan_of(array, tmp_path / "y.npy", mode="caffe", images_per_chunk=4).run()
    assert (tmp_path / "y.npy").read_bytes() == npy_bytes(network_inputs(pixels(11), "caffe"))


def test_resumed_run_bypasses_the_page_cache(tmp_path):
    if file_system_type(tmp_path) == "tmpfs":
        pytest.skip("a file in memory is nowhere else")
    batch = pixels(12, 67, 71)
    plan = plan_of(
        save_npy(tmp_path / "x.npy", batch), tmp_path / "y.npy", mode="tf", images_per_chunk=3
    )
    with pytest.raises(SimulatedCrash):
        run(plan, storage=InterruptedStorage(1))
    plan.run()
    checked = -(-3 * plan.result.image_bytes // mmap.PAGESIZE)  # the first chunk is read
    with (tmp_path / "y.npy").open("r+b") as file:
        assert count_cached_pages(file.fileno()) <= checked + 1 + plan.chunks
    assert (tmp_path / "y.npy").read_bytes() == npy_bytes(network_inputs(batch, "tf"))


@pytest.mark.parametrize("kind", ["array", "folder"])
def test_whole_pages_of_every_chunk_bypass_the_page_cache(tmp_path, kind):
    if file_system_type(tmp_path) == "tmpfs":
        pytest.skip("a file in memory is nowhere else")
    batch = pixels(11, 67, 71)
    source = tmp_path / ("photos" if kind == "folder" else "x.npy")
    if kind == "folder":
        save_images(source, batch)
        batch = rows_by_name(source, batch)
    else:
        save_npy(source, batch)
    for images_per_chunk in (2, 4, 11):  # no chunk starts or ends at a page boundary
        target = tmp_path / f"{images_per_chunk}.npy"
        plan_of(source, target, mode="caffe", images_per_chunk=images_per_chunk).run()
        with target.open("r+b") as file:
            held = count_cached_pages(file.fileno())
        assert held <= 1 + -(-11 // images_per_chunk)
        assert target.read_bytes() == npy_bytes(network_inputs(batch, "caffe"))


def test_complete_target_is_reported_without_creating_a_journal(array, tmp_path):
    class NoOpenStorage(Storage):
        def open(self, path, *, create=False):
            raise AssertionError(path)

    plan_of(array, tmp_path / "y.npy", mode="caffe").run()
    report = run(plan_of(array, tmp_path / "y.npy", mode="caffe"), storage=NoOpenStorage())
    assert report.counts["computed_chunks"] == 0


def test_empty_journal_next_to_a_complete_target_is_removed(array, tmp_path):
    plan_of(array, tmp_path / "y.npy", mode="caffe").run()
    finished = tree(tmp_path)
    journal_path(tmp_path / "y.npy").write_bytes(b"")
    report = plan_of(array, tmp_path / "y.npy", mode="caffe").run()
    assert report.counts["computed_chunks"] == 0
    assert tree(tmp_path) == finished


def test_two_chunks_of_the_source_are_held_while_image_files_are_encoded(tmp_path, monkeypatch):
    y = save_npy(tmp_path / "x.npy", network_inputs(pixels(12), "caffe"))
    chunks, held = [], []
    read = NpySource.read

    def recording_read(source, start, stop):
        chunk = read(source, start, stop)
        chunks.append(weakref.ref(chunk.batch))
        held.append(sum(batch() is not None for batch in chunks))
        return chunk

    monkeypatch.setattr(NpySource, "read", recording_read)
    plan = plan_of(y, tmp_path / "images", images_per_chunk=2, direction="restore", mode="caffe")
    plan.run()
    assert len(chunks) >= plan.chunks == 6
    assert max(held) == 2


@pytest.mark.parametrize("nbytes", [0, 5000])
@pytest.mark.parametrize("chunk", [1, 3, 6])
@pytest.mark.parametrize("name", ["y.npy", "y.h5::/x"])
def test_target_truncated_during_a_run_is_not_published(tmp_path, name, chunk, nbytes):
    source = save_npy(tmp_path / "x.npy", pixels(12, 61, 67))
    plan_of(source, tmp_path / "whole.npy", mode="caffe").run()
    settings = {"mode": "caffe", "images_per_chunk": 2}
    target = tmp_path / name.partition("::")[0]

    def truncate(progress):
        if progress.images == 2 * chunk:
            os.truncate(f"{target}.partial", nbytes)

    with pytest.raises(StoppedError) as caught:
        plan_of(source, tmp_path / name, **settings).run(truncate)
    check_error(caught.value, f"{target}.partial", "truncated by another process", "restart=True")
    assert not target.exists()
    resumed = plan_of(source, tmp_path / name, **settings)
    try:
        report = resumed.run()
    except ResumeError as error:  # nothing was written behind the truncated end
        assert chunk == 6
        check_error(error, target, "restart=True")
        plan_of(source, tmp_path / name, **settings, restart=True).run()
    else:
        assert 0 < report.counts["computed_chunks"] == report.damaged_chunks < 6
    fastvgg.verify(tmp_path / name, full=True)
    if name == "y.npy":
        assert target.read_bytes() == (tmp_path / "whole.npy").read_bytes()


def test_target_on_a_disk_that_compresses_is_published(tmp_path, array):
    class CompressingStorage(Storage):
        def has_holes(self, file, nbytes):
            return True

    plan = plan_of(array, tmp_path / "y.npy", mode="caffe", images_per_chunk=2)
    run(plan, storage=CompressingStorage())
    fastvgg.verify(tmp_path / "y.npy", full=True)


@pytest.mark.parametrize("name", ["y.npy", "y.h5::/x", "y.zarr", "out"])
def test_power_failure_without_fsync_is_recovered_from(tmp_path, array, name):
    """What a file system may leave of files that were never synced: their lengths, and zeros."""
    plan_of(array, tmp_path / "inputs.npy", mode="caffe").run()
    source = tmp_path / "inputs.npy" if name == "out" else array
    settings = {"images_per_chunk": 2, "fsync": False}
    settings["mode" if source == array else "direction"] = "tf" if source == array else "restore"
    with pytest.raises(SimulatedCrash):
        run(plan_of(source, tmp_path / name, **settings), storage=InterruptedStorage(4))
    partial = tmp_path / f"{name.partition('::')[0]}.partial"
    files = [partial] if partial.is_file() else [*partial.iterdir()]
    for file in files:
        if file.name != "zarr.json":
            file.write_bytes(bytes(file.stat().st_size))
    report = plan_of(source, tmp_path / name, **settings).run()
    assert (report.counts["computed_chunks"], report.damaged_chunks) == (6, 4)
    fastvgg.verify(tmp_path / name, full=True)
