"""What a restart may replace: only what checksums prove to be as fastvgg wrote it."""

from __future__ import annotations

import os
import shutil

import h5py
import numpy as np
import pytest

from fastvgg.datasets.index import index_path
from fastvgg.errors import ResumeError, SourceError, StoppedError, TargetError
from fastvgg.storage.local import Storage
from fastvgg.stream.journal import journal_path
from fastvgg.stream.manifest import manifest_path
from tests.helpers.datasets_on_disk import (
    check_error,
    data_tree,
    names_in,
    pixels,
    plan_of,
    save_npy,
    tree,
)
from tests.helpers.faults import InterruptedStorage, SimulatedCrash
from tests.helpers.private_disks import mount, unmount
from tests.helpers.runs import interrupt_run, preprocessed, run, run_with_event


def check_kept(directory, *arguments, **settings):
    """Check that a restart is refused, and that every file is kept."""
    before = tree(directory)
    with pytest.raises(TargetError) as caught:
        plan_of(*arguments, restart=True, **settings).run()
    check_error(caught.value, "move it away")
    assert tree(directory) == before


def test_edited_array_is_never_replaced(tmp_path):
    stored = preprocessed(tmp_path)
    np.load(stored, mmap_mode="r+")[3, 2, 1, 0] = 42
    check_kept(tmp_path, tmp_path / "x.npy", stored, mode="tf")


def test_copied_manifest_proves_nothing_about_another_array(tmp_path):
    stored, own = preprocessed(tmp_path), tmp_path / "own.npy"
    np.save(own, np.load(stored) + 1)
    shutil.copy(manifest_path(stored), manifest_path(own))
    check_kept(tmp_path, tmp_path / "x.npy", own, mode="tf")


@pytest.mark.parametrize("commits", [1, 6], ids=["unfinished", "all committed"])
@pytest.mark.parametrize(
    ("name", "foreign"),
    [
        *(("y.npy", "target"), ("y.zarr", "target"), ("out", "target")),
        *(("y.npy", "partial"), ("y.zarr", "partial")),
    ],
)
def test_copied_journal_proves_nothing_about_another_name(tmp_path, commits, name, foreign):
    settings = {"mode": "caffe"}
    source = save_npy(tmp_path / "x.npy", pixels(11))
    if name == "out":
        plan_of(source, tmp_path / "inputs.npy", **settings).run()
        source, settings = tmp_path / "inputs.npy", {"direction": "restore"}
    plan = plan_of(source, tmp_path / name, images_per_chunk=2, **settings)
    with pytest.raises(SimulatedCrash):
        run(plan, storage=InterruptedStorage(commits))
    own = tmp_path / f"own-{name}"
    shutil.copy(journal_path(tmp_path / name), journal_path(own))
    content = own if foreign == "target" else own.with_name(f"{own.name}.partial")
    if name == "y.npy":
        content.write_bytes(b"precious")
    else:
        content.mkdir()
        (content / "notes.txt").write_text("precious")
    before = tree(tmp_path)
    with pytest.raises((TargetError, ResumeError)) as caught:
        plan_of(source, own, images_per_chunk=2, **settings).run()
    check_error(caught.value, own)
    assert tree(tmp_path) == before
    check_kept(tmp_path, source, own, images_per_chunk=2, **settings)


def test_edited_index_is_never_replaced(tmp_path, photos):
    plan_of(photos, tmp_path / "y.npy", mode="caffe").run()
    index = index_path(tmp_path / "y.npy")
    index.write_text(index.read_text().replace(",a,", ",my own label,"))
    check_kept(tmp_path, photos, tmp_path / "y.npy", mode="tf")


@pytest.mark.parametrize("name", ["out", "y.zarr"])
def test_files_added_to_a_directory_are_never_removed(tmp_path, name):
    stored = preprocessed(tmp_path)
    arguments = (
        (stored, tmp_path / name) if name == "out" else (tmp_path / "x.npy", tmp_path / name)
    )
    settings = {"direction": "restore"} if name == "out" else {"mode": "caffe"}
    plan_of(*arguments, **settings).run()
    (tmp_path / name / "notes.txt").write_text("precious")
    check_kept(tmp_path, *arguments, **settings)


def test_another_dataset_of_an_hdf5_file_is_never_replaced(tmp_path):
    source = save_npy(tmp_path / "x.npy", pixels(5))
    plan_of(source, f"{tmp_path / 'y.h5'}::/a", mode="caffe").run()
    check_kept(tmp_path, source, f"{tmp_path / 'y.h5'}::/b", mode="caffe")
    with h5py.File(tmp_path / "y.h5", "a") as file:
        file["a"].attrs["note"] = "precious"
    check_kept(tmp_path, source, f"{tmp_path / 'y.h5'}::/a", mode="tf")


# What is edited or created after a run began


class Command:
    """A command whose finished result can be replaced, or that can be interrupted."""

    def __init__(self, tmp_path, name, photos=None):
        stored = preprocessed(tmp_path) if photos is None else tmp_path / "inputs.npy"
        if photos is not None:  # with an index, which names restored images
            plan_of(photos, stored, mode="caffe").run()
        is_array = name != "out"
        self.source, self.target = tmp_path / "x.npy" if is_array else stored, tmp_path / name
        self.settings = {"mode": "caffe"} if is_array else {"direction": "restore"}

    def plan(self, **settings):
        return plan_of(self.source, self.target, images_per_chunk=2, **self.settings, **settings)

    def interrupt(self, **settings):
        interrupt_run(self.source, self.target, **self.settings, **settings)

    def edit(self):
        """Change a byte of the finished result; return the file."""
        file = self.target
        if file.is_dir():
            file = max(path for path in file.rglob("*") if path.name != "zarr.json")
        content = bytearray(file.read_bytes())
        content[-20] ^= 1
        file.write_bytes(content)
        return file


NAMES = ("z.npy", "z.zarr", "out")


def check_refused(directory, command, *words, **settings):
    """Check that a rerun is refused before anything is written, and loses nothing."""
    before = tree(directory)
    with pytest.raises((TargetError, SourceError)) as caught:
        command.plan(**settings).run()
    check_error(caught.value, "move it away", *words)
    assert caught.value.exit_code == 3
    assert "restart" not in str(caught.value)
    assert tree(directory) == before


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_edit_after_an_interrupted_restart_is_never_replaced(tmp_path, name, restart):
    command = Command(tmp_path, name)
    command.plan().run()
    command.interrupt(restart=True)
    command.edit()
    check_refused(tmp_path, command, command.target, restart=restart)


@pytest.mark.parametrize("name", NAMES)
def test_edit_during_a_restart_is_never_replaced(tmp_path, name):
    command = Command(tmp_path, name)
    command.plan().run()
    expected = data_tree(tmp_path)
    with pytest.raises(StoppedError) as caught:
        run_with_event(command.plan(restart=True), command.edit)
    check_error(caught.value, command.target, "move it away, and rerun the same command")
    assert command.target.exists()
    own = command.target.rename(tmp_path.parent / f"{tmp_path.name}-own")
    assert command.plan().run().counts["computed_chunks"] == 0
    assert own.exists()
    assert data_tree(tmp_path) == expected


@pytest.mark.parametrize("name", NAMES)
def test_copy_of_what_an_interrupted_restart_replaces_is_recognized(tmp_path, name):
    command = Command(tmp_path, name)
    command.plan().run()
    expected = data_tree(tmp_path)
    command.interrupt(restart=True)
    moved = command.target.rename(tmp_path.parent / f"{tmp_path.name}-moved")
    (shutil.copytree if moved.is_dir() else shutil.copyfile)(moved, command.target)
    assert command.plan().run().counts["computed_chunks"] == 5
    assert data_tree(tmp_path) == expected


class CrashAtPublishStorage(Storage):
    def rename(self, old, new):
        if old.name.endswith(".partial"):
            raise SimulatedCrash
        super().rename(old, new)


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("name", ["z.zarr", "out"])
def test_edit_of_what_a_killed_restart_set_aside_is_never_removed(tmp_path, name, restart):
    command = Command(tmp_path, name)
    command.plan().run()
    with pytest.raises(SimulatedCrash):
        run(command.plan(restart=True), storage=CrashAtPublishStorage())
    assert not command.target.exists()
    command.target = tmp_path / f"{name}.fastvgg-replaced"
    command.edit()
    command.target = tmp_path / name
    check_refused(tmp_path, command, f"{name}.fastvgg-replaced", restart=restart)


def edit_index(target):
    index = index_path(target)
    index.write_text(index.read_text().replace(",a,", ",my own label,"))


@pytest.mark.parametrize("restart", [False, True])
def test_index_edited_after_an_interrupted_restart_is_never_replaced(tmp_path, photos, restart):
    target, settings = tmp_path / "y.npy", {"mode": "caffe"}
    plan_of(photos, target, **settings).run()
    interrupt_run(photos, target, restart=True, **settings)
    edit_index(target)
    before = tree(tmp_path)
    with pytest.raises(TargetError) as caught:
        plan_of(photos, target, restart=restart, **settings)
    check_error(caught.value, index_path(target), "move it away")
    assert tree(tmp_path) == before


def test_index_edited_during_a_restart_is_never_replaced(tmp_path, photos):
    target, settings = tmp_path / "y.npy", {"mode": "caffe", "images_per_chunk": 2}
    plan_of(photos, target, **settings).run()
    with pytest.raises(StoppedError) as caught:
        run_with_event(
            plan_of(photos, target, restart=True, **settings), lambda: edit_index(target)
        )
    check_error(caught.value, index_path(target), "move it away, and rerun the same command")
    assert "my own label" in index_path(target).read_text()
    index_path(target).rename(tmp_path / "own.csv")
    plan_of(photos, target, **settings).run()
    assert "my own label" not in index_path(target).read_text()


SIDECARS = (
    *(".index.csv", ".fastvgg.json", ".index.csv.tmp", ".fastvgg.json.tmp"),
    *(".fastvgg-replaced", ".fastvgg-replaced.index.csv", ".fastvgg-replaced.fastvgg.json"),
)


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("suffix", SIDECARS)
def test_sidecar_created_after_an_interrupted_run_is_kept(tmp_path, suffix, restart):
    command = Command(tmp_path, "z.npy")
    command.interrupt()
    (tmp_path / f"z.npy{suffix}").write_text("my own")
    check_refused(tmp_path, command, f"z.npy{suffix}", restart=restart)


@pytest.mark.parametrize("suffix", SIDECARS)
def test_sidecar_created_during_a_run_is_kept(tmp_path, suffix):
    command, own = Command(tmp_path, "z.npy"), tmp_path / f"z.npy{suffix}"
    with pytest.raises(StoppedError) as caught:
        run_with_event(command.plan(), lambda: own.write_text("my own"))
    check_error(caught.value, own, "move it away, and rerun the same command")
    assert own.read_text() == "my own"
    own.unlink()
    assert command.plan().run().counts["computed_chunks"] == 0
    assert names_in(tmp_path) == [
        *("x.npy", "y.npy", "y.npy.fastvgg.json", "z.npy", "z.npy.fastvgg.json")
    ]


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("suffix", [*SIDECARS, ".partial", ".fastvgg-journal"])
def test_dangling_link_with_the_name_of_a_sidecar_is_kept(tmp_path, suffix, restart):
    command = Command(tmp_path, "z.npy")
    (tmp_path / f"z.npy{suffix}").symlink_to("nowhere")
    check_refused(tmp_path, command, f"z.npy{suffix}", restart=restart)


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("commits", [0, 1])
@pytest.mark.parametrize("name", ["z.zarr", "out", "out of an index"])
def test_files_added_to_a_partial_directory_are_never_removed(
    tmp_path, photos, name, commits, restart
):
    name, _, index = name.partition(" ")
    command = Command(tmp_path, name, photos if index else None)
    command.interrupt()
    journal, partial = (tmp_path / f"{name}{end}" for end in (".fastvgg-journal", ".partial"))
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines[: 1 + commits]))
    (partial / "notes.txt").write_text("my own")
    check_refused(tmp_path, command, partial, "notes.txt", restart=restart)
    (partial / "notes.txt").unlink()
    command.plan(restart=restart).run()


def test_file_named_like_an_image_except_for_case_is_never_removed(tmp_path):
    command = Command(tmp_path, "out")
    command.interrupt()
    partial = tmp_path / "out.partial"
    own = partial / "00000000.PNG"
    own.write_text("my own")
    check_refused(tmp_path, command, partial, own.name, restart=True)


@pytest.mark.parametrize("name", ["z.zarr", "out"])
def test_files_added_to_a_partial_directory_during_a_run_are_kept(tmp_path, name):
    command, own = Command(tmp_path, name), tmp_path / f"{name}.partial" / "notes.txt"
    with pytest.raises(StoppedError) as caught:
        run_with_event(command.plan(), lambda: own.write_text("my own"))
    check_error(caught.value, own.parent, own.name, "move it away, and rerun the same command")
    own.rename(tmp_path / own.name)
    assert command.plan().run().counts["computed_chunks"] == 0


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("content", [b"my own", None, "link"])
def test_other_file_with_the_name_of_a_partial_is_kept(tmp_path, content, restart):
    command, partial = Command(tmp_path, "z.npy"), tmp_path / "z.npy.partial"
    command.interrupt()
    if content is None:
        with partial.open("ab") as file:
            file.write(b"my own")
    else:
        moved = partial.rename(tmp_path / "moved")
        partial.symlink_to(moved) if content == "link" else partial.write_bytes(content)
    check_refused(tmp_path, command, partial, restart=restart)


def test_journal_removed_during_a_run_stops_it_before_it_publishes(tmp_path):
    command = Command(tmp_path, "z.npy")
    with pytest.raises(StoppedError) as caught:
        run_with_event(command.plan(), journal_path(command.target).unlink)
    partial = tmp_path / "z.npy.partial"
    check_error(caught.value, journal_path(command.target), f"move {partial} away", "rerun")
    assert not command.target.exists()
    partial.unlink()
    command.plan().run()


@pytest.mark.parametrize("suffix", [".fastvgg.json", ".index.csv", ".fastvgg-journal"])
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir], ids=["pipe", "directory"])
def test_what_is_no_file_with_the_name_of_a_sidecar_is_to_be_moved_away(tmp_path, make, suffix):
    command = Command(tmp_path, "z.npy")
    make(tmp_path / f"z.npy{suffix}")
    check_refused(tmp_path, command, f"z.npy{suffix}", restart=True)


class CrashBeforePartialStorage(Storage):
    def make_directory(self, path):
        raise SimulatedCrash


def test_killed_restart_of_a_run_with_other_names_is_resumed(tmp_path, photos):
    stored, target = tmp_path / "y.npy", tmp_path / "out"
    plan_of(photos, stored, mode="tf").run()
    interrupt_run(stored, target, direction="restore")
    settings = {"direction": "restore", "format": "webp"}
    plan = plan_of(stored, target, restart=True, **settings)
    with pytest.raises(SimulatedCrash):  # with the journal of the new run
        run(plan, storage=CrashBeforePartialStorage())
    plan_of(stored, target, **settings).run()
    assert {path.suffix for path in target.rglob("*.*")} == {".webp"}


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount")
@pytest.mark.parametrize("name", ["out", "y.npy"])
def test_mount_point_is_refused_before_anything_is_written(tmp_path, name):
    stored, target = preprocessed(tmp_path), tmp_path / "at" / name
    target.parent.mkdir()
    if name == "out":
        target.mkdir()
        mount("none", target, "tmpfs")
    else:
        target.touch()
        (tmp_path / "own.npy").write_bytes(b"precious")
        mount(tmp_path / "own.npy", target, "none", 0x1000)
    try:
        with pytest.raises(TargetError) as caught:
            plan_of(stored, target, direction="restore")
        check_error(caught.value, target, "mount point", "give")
        assert names_in(target.parent) == [name]
    finally:
        unmount(target, at_once=False)
