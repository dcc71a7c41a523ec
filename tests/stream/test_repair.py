"""Repairs of damaged datasets: the bytes that were written before, or a refusal; never worse."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import fastvgg
from fastvgg import cli
from fastvgg.datasets import contiguous
from fastvgg.errors import FastvggError, SourceError, TargetError, VerificationError
from fastvgg.storage.location import Location
from fastvgg.stream.manifest import manifest_path, read_manifest
from fastvgg.stream.verify import verify_with
from tests.helpers.datasets_on_disk import (
    check_error,
    names_in,
    npy_bytes,
    pixels,
    plan_of,
    save_images,
    save_npy,
    tree,
)
from tests.helpers.faults import (
    CrashingStorage,
    SimulatedCrash,
    UnreadableFileOs,
    memory_directory,
)
from tests.helpers.runs import interrupt_run

CHUNKS = 6  # of two images each


def make_npy(directory):
    source = save_npy(directory / "x.npy", pixels(11))
    return finish(source, directory / "y.npy", mode="caffe")


def make_hdf5(directory):
    source = save_npy(directory / "x.npy", pixels(11))
    return finish(source, f"{directory}/y.h5::/a/images", mode="tf", dtype="float16")


def make_zarr(directory):
    source = save_npy(directory / "x.npy", pixels(11))
    return finish(source, directory / "y.zarr", mode="torch")


def make_images(directory):
    finish(save_images(directory / "photos", pixels(11)), directory / "x.npy", mode="caffe")
    return finish(directory / "x.npy", directory / "out", direction="restore")


def make_failed(directory):
    """A dataset of images, one of which failed and was never retried."""
    photos = save_images(directory / "photos", pixels(11))
    (photos / "b" / "03.png").write_bytes(b"torn")
    return finish(photos, directory / "y.npy", mode="caffe")


def make_retried(directory):
    photos = save_images(directory / "photos", pixels(11))
    whole = (photos / "b" / "03.png").read_bytes()
    (photos / "b" / "03.png").write_bytes(b"torn")
    finish(photos, directory / "y.npy", mode="caffe")
    (photos / "b" / "03.png").write_bytes(whole)
    plan_of(photos, directory / "y.npy", mode="caffe", retry_failed=True).run()
    return Location.parse(directory / "y.npy")


def finish(source, target, **settings):
    plan_of(source, target, images_per_chunk=2, **settings).run()
    return Location.parse(target)


MAKERS = {
    "npy": make_npy,
    "hdf5": make_hdf5,
    "zarr": make_zarr,
    "images": make_images,
    "failed": make_failed,
    "retried": make_retried,
}


def data_files(location):
    """Return the files of a dataset that contain rows, in the order of their chunks."""
    path = location.container
    if path.is_file():
        return [path]
    return sorted(file for file in path.rglob("*") if file.is_file() and file.name != "zarr.json")


def damage(location):
    """Damage the second and the last chunk; return their numbers."""
    files = data_files(location)
    if len(files) == 1:
        content = bytearray(files[0].read_bytes())
        manifest = read_manifest(location.container)
        begin = len(content) - manifest.header.nbytes
        for row in (2, 10):
            content[begin + row * manifest.header.image_bytes + 5] ^= 16
        files[0].write_bytes(content)
        return [1, 5]
    files[1 if len(files) == CHUNKS else 2].unlink()  # a file per chunk, or per image
    torn = files[-1].read_bytes()
    files[-1].write_bytes(torn[: len(torn) // 2])
    return [1, 5]


def damaged_chunks(location):
    try:
        fastvgg.verify(location)
    except VerificationError as error:
        return [chunk.chunk for chunk in error.damaged]
    return []


@pytest.mark.parametrize("kind", MAKERS)
def test_repair_restores_the_bytes_that_were_written(tmp_path, kind):
    location = MAKERS[kind](tmp_path)
    before = tree(tmp_path)
    expected = damage(location)
    assert damaged_chunks(location) == expected
    repaired = fastvgg.verify(location, repair=True, full=True)
    assert repaired.repaired_chunks == len(expected)
    assert tree(tmp_path) == before
    assert fastvgg.verify(location, repair=True).repaired_chunks == 0


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("partially_done", [False, True])
def test_repair_killed_at_any_call_leaves_nothing_worse_and_resumes(kind, partially_done):
    with directory_in_memory() as directory:
        origin = directory / "origin"
        origin.mkdir()
        location = MAKERS[kind](origin)
        before = tree(origin)
        expected, damaged = damage(location), tree(origin)
        calls = count_calls(origin, location)
        for crash_at in range(1, calls + 1):
            place = working_copy(origin)
            storage = CrashingStorage(crash_at, partially_done=partially_done)
            with pytest.raises(SimulatedCrash):
                verify_with(storage, location, 1, 2**29, full=False, repair=True)
            storage.finish_crash()
            check_not_worse(tree(origin), before, damaged)
            assert set(damaged_chunks(location)) <= set(expected)
            fastvgg.verify(location, repair=True)
            assert tree(origin) == before, f"after a crash at call {crash_at}"
            restore_copy(place, origin)


def test_power_failure_during_a_repair_leaves_nothing_worse(tmp_path):
    with directory_in_memory() as directory:
        origin = directory / "origin"
        origin.mkdir()
        location = make_zarr(origin)
        before = tree(origin)
        expected = damage(location)
        calls = count_calls(origin, location)
        for crash_at in range(1, calls + 1):
            place = working_copy(origin)
            snapshots = directory / "snapshots"
            snapshots.mkdir()
            storage = CrashingStorage(crash_at, snapshot_directory=snapshots)
            with pytest.raises(SimulatedCrash):
                verify_with(storage, location, 1, 2**29, full=False, repair=True)
            storage.finish_crash()
            assert set(damaged_chunks(location)) <= set(expected)
            fastvgg.verify(location, repair=True)
            assert tree(origin) == before
            shutil.rmtree(snapshots)
            restore_copy(place, origin)


def check_not_worse(actual, before, damaged):
    """Check that every byte of one file, or every one of many files, is as it was or repaired."""
    for name, expected in before.items():
        states = expected, damaged.get(name)
        if name.endswith((b".npy", b".h5")):
            pairs = zip(actual[name], *states, strict=True)
            assert all(byte in then for byte, *then in pairs), name
        else:
            assert actual.get(name) in states, name


def count_calls(origin, location):
    place = working_copy(origin)
    storage = CrashingStorage()
    verify_with(storage, location, 1, 2**29, full=False, repair=True)
    restore_copy(place, origin)
    return len(storage.calls)


def working_copy(origin):
    copy = origin.with_name("copy")
    shutil.copytree(origin, copy)
    return copy


def restore_copy(copy, origin):
    shutil.rmtree(origin)
    copy.rename(origin)


@contextlib.contextmanager
def directory_in_memory():
    """Make a temporary directory where syncs are fast, if there is one."""
    with tempfile.TemporaryDirectory(dir=memory_directory()) as path:
        yield Path(path)


@pytest.mark.parametrize("kind", ["npy", "zarr", "images"])
def test_repair_writes_only_what_is_damaged(tmp_path, kind):
    location = MAKERS[kind](tmp_path)
    intact = {path: path.stat().st_mtime_ns for path in data_files(location)}
    content = location.container.read_bytes() if kind == "npy" else b""
    damage(location)
    storage = CrashingStorage()
    verify_with(storage, location, 1, 2**29, full=False, repair=True)
    if kind == "npy":
        assert storage.calls.count("write") == 2
        assert location.container.read_bytes() == content
    else:
        changed = [path for path, then in intact.items() if path.stat().st_mtime_ns != then]
        assert len(changed) == 2


@pytest.mark.parametrize("nbytes", [1, 700, 756 * 4 + 3])
@pytest.mark.parametrize("kind", ["npy", "hdf5", "failed"])
def test_truncated_file_is_repaired(tmp_path, kind, nbytes):
    location = MAKERS[kind](tmp_path)
    before = tree(tmp_path)
    os.truncate(location.container, location.container.stat().st_size - nbytes)
    assert fastvgg.verify(location, repair=True).repaired_chunks >= 1
    assert tree(tmp_path) == before


@pytest.mark.parametrize("kind", ["npy", "hdf5", "zarr"])
@pytest.mark.parametrize("also_rows", [False, True])
def test_damaged_header_is_repaired_after_all_chunks(tmp_path, kind, also_rows):
    location = MAKERS[kind](tmp_path)
    before = tree(tmp_path)
    if also_rows:
        damage(location)
    path = location.container
    with (path if path.is_file() else path / "zarr.json").open("r+b") as file:
        file.write(b"\0\0\0\0")
    with pytest.raises(VerificationError) as caught:
        fastvgg.verify(location)
    assert len(caught.value.differences) == 1
    assert len(caught.value.damaged) == (2 if also_rows else 0)
    assert fastvgg.verify(location, repair=True).repaired_chunks == (2 if also_rows else 0)
    assert tree(tmp_path) == before


def test_bytes_after_the_end_are_kept(tmp_path):
    location = make_npy(tmp_path)
    damage(location)
    with location.container.open("ab") as file:
        file.write(b"someone else's")
    with pytest.raises(VerificationError) as caught:
        fastvgg.verify(location, repair=True)
    assert caught.value.damaged == []
    check_error(caught.value, "followed by other bytes", "repaired 2 chunks", "head -c")
    assert location.container.read_bytes().endswith(b"someone else's")


def test_advised_copy_without_what_follows_is_the_dataset(tmp_path):
    folder = tmp_path / "with spaces; and 'quotes'"
    folder.mkdir()
    location = make_npy(folder)
    intact = location.container.read_bytes()
    with location.container.open("ab") as file:
        file.write(b"someone else's")
    with pytest.raises(VerificationError) as caught:
        fastvgg.verify(location)
    copy = caught.value.remedy.partition(": ")[2]
    subprocess.run(["/bin/sh", "-c", copy], cwd=tmp_path, check=True)
    assert (tmp_path / "COPY").read_bytes() == intact


def test_damaged_header_before_rows_that_were_added_is_kept(tmp_path):
    location = make_npy(tmp_path)
    with location.container.open("r+b") as file:
        file.write(b"\0\0\0\0")
        file.seek(0, os.SEEK_END)
        file.write(b"someone else's")
    before = location.container.read_bytes()
    with pytest.raises(VerificationError) as caught:
        fastvgg.verify(location, repair=True)
    header, length = caught.value.differences
    assert "header" in header
    assert "followed by other bytes" in length
    assert location.container.read_bytes() == before
    os.truncate(location.container, len(before) - len(b"someone else's"))
    fastvgg.verify(location, repair=True)
    fastvgg.verify(location)


def test_dataset_added_to_an_hdf5_file_is_kept(tmp_path):
    location = make_hdf5(tmp_path)
    with h5py.File(location.container, "r+") as file:
        file["theirs"] = np.arange(100)
        file[location.inner][3] += 1
    before = location.container.read_bytes()
    with pytest.raises(VerificationError) as caught:
        fastvgg.verify(location, repair=True)
    assert [chunk.chunk for chunk in caught.value.damaged] == [1]
    check_error(caught.value, "not repaired", "another header")
    assert location.container.read_bytes() == before


@pytest.mark.parametrize("kind", ["npy", "images", "failed"])
def test_repair_with_a_changed_source_is_refused(tmp_path, kind):
    location = MAKERS[kind](tmp_path)
    expected = damage(location)
    if kind == "failed":
        Image.fromarray(pixels(1, seed=5)[0]).save(tmp_path / "photos" / "a" / "04.png")
    else:
        stored = np.load(tmp_path / "x.npy")
        stored[2:4] += 1
        stored[10] += 1
        save_npy(tmp_path / "x.npy", stored)
    before = tree(tmp_path)
    with pytest.raises(VerificationError) as caught:
        fastvgg.verify(location, repair=True)
    refused = [chunk.chunk for chunk in caught.value.damaged if "not repaired" in chunk.reason]
    assert refused == ([1] if kind == "failed" else expected)
    check_error(caught.value, "recomputed from", "has changed")
    if kind != "failed":
        assert tree(tmp_path) == before


def test_repair_from_a_copied_source_with_the_same_pixels_is_possible(tmp_path):
    location = make_npy(tmp_path)
    before = location.container.read_bytes()
    damage(location)
    os.utime(tmp_path / "x.npy", ns=(0, 1))
    assert fastvgg.verify(location, repair=True).repaired_chunks == 2
    assert location.container.read_bytes() == before


def test_failed_image_that_is_readable_now_stays_a_row_of_zeros(tmp_path):
    photos = save_images(tmp_path / "photos", pixels(11))
    whole = (photos / "a" / "04.png").read_bytes()
    (photos / "a" / "04.png").write_bytes(b"torn")
    location = finish(photos, tmp_path / "y.npy", mode="caffe")  # row 2, in a damaged chunk
    before = location.container.read_bytes()
    damage(location)
    (photos / "a" / "04.png").write_bytes(whole)
    assert fastvgg.verify(location, repair=True).repaired_chunks == 2
    assert location.container.read_bytes() == before


def test_image_that_became_unreadable_is_named(tmp_path):
    location = make_failed(tmp_path)
    damage(location)
    (tmp_path / "photos" / "a" / "04.png").write_bytes(b"torn")
    with pytest.raises(VerificationError) as caught:
        fastvgg.verify(location, repair=True)
    assert [chunk.chunk for chunk in caught.value.damaged] == [1]
    check_error(caught.value, "a/04.png", "cannot be read any more")


def test_repair_without_the_source_is_refused(tmp_path):
    location = make_npy(tmp_path)
    expected = damage(location)
    (tmp_path / "x.npy").unlink()
    before = tree(tmp_path)
    with pytest.raises(VerificationError) as caught:
        fastvgg.verify(location, repair=True)
    assert [chunk.chunk for chunk in caught.value.damaged] == expected
    check_error(caught.value, "it cannot be repaired", tmp_path / "x.npy", "does not exist")
    assert tree(tmp_path) == before


def test_dataset_that_was_converted_in_place_cannot_be_repaired(tmp_path):
    source = save_npy(tmp_path / "x.npy", pixels(11).astype(np.float32))
    plan_of(source, None, in_place=True, mode="caffe").run()
    with source.open("r+b") as file:
        file.seek(500)
        file.write(b"\1\2\3\4")
    before = tree(tmp_path)
    for repair in (False, True):
        with pytest.raises(VerificationError) as caught:
            fastvgg.verify(source, repair=repair)
        assert "repair=True" not in caught.value.remedy
    check_error(caught.value, "its source was overwritten in place")
    assert tree(tmp_path) == before


@pytest.mark.parametrize("content", ["noise", "zeros", "another array"])
def test_file_that_is_not_what_the_manifest_describes_is_kept(tmp_path, content):
    location = make_npy(tmp_path)
    stored = np.load(location.container)
    others = {
        "noise": np.random.default_rng(3).bytes(location.container.stat().st_size),
        "zeros": npy_bytes(np.zeros_like(stored)),
        "another array": npy_bytes(stored + 1),
    }
    location.container.write_bytes(others[content])
    with pytest.raises(VerificationError) as caught:
        fastvgg.verify(location, repair=True)
    assert len(caught.value.damaged) == CHUNKS
    check_error(caught.value, "it cannot be repaired", "another dataset")
    assert location.container.read_bytes() == others[content]


def test_single_chunk_with_an_intact_image_is_repaired(tmp_path):
    source = save_npy(tmp_path / "x.npy", pixels(5))
    plan_of(source, tmp_path / "y.npy", mode="caffe").run()
    before = tree(tmp_path)
    with (tmp_path / "y.npy").open("r+b") as file:
        file.seek(500)
        file.write(b"\1\2\3\4")
    assert fastvgg.verify(tmp_path / "y.npy", repair=True).repaired_chunks == 1
    assert tree(tmp_path) == before


def test_dataset_that_a_run_is_writing_is_not_repaired(tmp_path):
    source = save_npy(tmp_path / "x.npy", pixels(11))
    target = interrupt_run(source, tmp_path / "y.npy", mode="caffe")
    before = tree(tmp_path)
    with pytest.raises(SourceError):
        fastvgg.verify(target, repair=True)
    assert tree(tmp_path) == before


def test_repair_waits_for_no_other_repair(tmp_path):
    location = make_npy(tmp_path)
    damage(location)

    def repair_too(_progress):
        with pytest.raises(TargetError) as caught:
            fastvgg.verify(location, repair=True)
        check_error(caught.value, "is being written by another process")

    assert fastvgg.verify(location, repair=True, progress=repair_too).repaired_chunks == 2


def test_link_to_a_dataset_is_not_repaired(tmp_path):
    location = make_npy(tmp_path)
    damage(location)
    real = tmp_path / "real.npy"
    location.container.rename(real)
    location.container.symlink_to(real)
    with pytest.raises(TargetError) as caught:
        fastvgg.verify(location, repair=True)
    check_error(caught.value, "is a symbolic link", real)


def test_damaged_manifest_or_index_is_not_repaired(tmp_path):
    location = make_failed(tmp_path)
    damage(location)
    index = tmp_path / "y.npy.index.csv"
    for path in (index, manifest_path(location.container)):
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
        before = tree(tmp_path)
        with pytest.raises(FastvggError) as caught:
            fastvgg.verify(location, repair=True)
        check_error(caught.value, path)
        assert tree(tmp_path) == before
        path.write_bytes(content)


def test_repair_with_too_little_memory_is_refused_with_what_is_needed(tmp_path):
    location = make_npy(tmp_path)
    damage(location)
    with pytest.raises(VerificationError) as caught:
        fastvgg.verify(location, repair=True, memory="1MiB", threads=1)
    check_error(caught.value, "it cannot be repaired", "memory")


def test_command_line_repairs_and_lists(tmp_path):
    location = make_npy(tmp_path)
    damage(location)
    found = CliRunner().invoke(cli.app, ["verify", str(location), "--json"])
    assert found.exit_code == 4
    assert '"chunk": 1' in found.stdout
    assert f"fastvgg verify {location} --repair" in found.stderr
    repaired = CliRunner().invoke(cli.app, ["verify", str(location), "--repair", "--threads", "1"])
    assert repaired.exit_code == 0, repaired.stderr
    assert "repaired 2 chunks" in repaired.stdout
    assert names_in(tmp_path) == ["x.npy", "y.npy", "y.npy.fastvgg.json"]


def test_repair_from_a_source_that_cannot_be_read_lists_what_is_still_damaged(
    tmp_path, monkeypatch
):
    location = make_npy(tmp_path)
    expected = damage(location)
    before = tree(tmp_path)
    monkeypatch.setattr(contiguous, "os", UnreadableFileOs(tmp_path / "x.npy"))
    with pytest.raises(VerificationError) as caught:
        fastvgg.verify(location, repair=True)
    assert [chunk.chunk for chunk in caught.value.damaged] == expected
    assert all("not repaired" in chunk.reason for chunk in caught.value.damaged)
    check_error(caught.value, tmp_path / "x.npy", "EIO")
    assert tree(tmp_path) == before


@pytest.mark.parametrize("kind", ["npy", "failed"])
def test_progress_counts_the_images_of_repaired_chunks(tmp_path, kind):
    location = MAKERS[kind](tmp_path)
    damage(location)
    reported = []
    fastvgg.verify(location, repair=True, full=True, threads=1, progress=reported.append)
    images = [at.images for at in reported]
    assert images == sorted(images)
    assert images[-1] == reported[-1].total_images == 11 + 3 + 11
    assert 11 + 2 in images  # after the first chunk that was repaired
