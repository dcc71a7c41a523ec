"""What a restart may replace: only what checksums prove to be as fastvgg wrote it."""

from __future__ import annotations

import os
import shutil

import h5py
import numpy as np
import pytest

from fastvgg.datasets.index import index_path
from fastvgg.errors import ResumeError, TargetError
from fastvgg.stream.journal import journal_path
from fastvgg.stream.manifest import manifest_path
from tests.helpers.datasets_on_disk import check_error, names_in, pixels, plan_of, save_npy, tree
from tests.helpers.faults import InterruptedStorage, SimulatedCrash
from tests.helpers.private_disks import mount, unmount
from tests.helpers.runs import interrupt_run, preprocessed, run


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
    if foreign == "target" or content.is_dir():
        check_kept(tmp_path, source, own, images_per_chunk=2, **settings)


@pytest.mark.parametrize("name", ["y.zarr", "out"])
@pytest.mark.parametrize("indexed", [False, True])
def test_file_added_to_the_partial_of_an_unfinished_run_is_never_removed(
    tmp_path, photos, name, indexed
):
    settings = {"mode": "caffe"}
    source = photos if indexed else save_npy(tmp_path / "x.npy", pixels(11))
    if name == "out":
        plan_of(source, tmp_path / "inputs.npy", **settings).run()
        source, settings = tmp_path / "inputs.npy", {"direction": "restore"}
    target = interrupt_run(source, tmp_path / name, **settings)
    notes = tmp_path / f"{name}.partial" / "notes.txt"
    notes.write_text("precious")
    check_kept(tmp_path, source, target, **settings)
    notes.unlink()
    plan_of(source, target, restart=True, **settings).run()


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
