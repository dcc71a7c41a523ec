"""A run in which every image fails is refused, and changes nothing."""

from __future__ import annotations

import os
import shutil

import numpy as np
import pytest
from PIL import Image

import fastvgg
from fastvgg.cli.errors import SOME_INPUTS_FAILED
from fastvgg.datasets.base import ImageRecord
from fastvgg.datasets.index import INDEX_HEADER, format_records, index_path, read_index
from fastvgg.errors import SourceError
from tests.helpers.datasets_on_disk import check_error, pixels, save_images, save_npy, tree
from tests.helpers.runs import interrupt_run, run
from tests.helpers.tar_on_disk import save_tar

SETTINGS = {"mode": "caffe", "size": (5, 7), "threads": 2}


def break_images(folder):
    for path in folder.rglob("*.png"):
        status = path.stat()
        path.write_bytes(bytes(status.st_size))
        # As where a disk fails: the same names, sizes and times.
        os.utime(path, ns=(status.st_mtime_ns, status.st_mtime_ns))


@pytest.fixture
def photos(tmp_path):
    return save_images(tmp_path / "photos", pixels(40), [f"{row:02d}.png" for row in range(40)])


def refused(plan):
    with pytest.raises(SourceError) as caught:
        run(plan)
    assert caught.value.exit_code == 3
    return caught.value


@pytest.mark.parametrize("target", ["y.npy", "y.zarr", "y.h5::/x"])
def test_fresh_run_leaves_no_file(tmp_path, photos, target):
    break_images(photos)
    before = tree(tmp_path)
    error = refused(fastvgg.plan(photos, f"{tmp_path}/{target}", **SETTINGS))
    check_error(error, "no image in", photos, "00.png: not an image", "02.png", "; ...")
    assert tree(tmp_path) == before


def test_links_that_lead_nowhere_are_named(tmp_path):
    (tmp_path / "photos").mkdir()
    for row in range(3):
        (tmp_path / "photos" / f"{row}.jpg").symlink_to(f"../../blobs/{row}")
    before = tree(tmp_path)
    error = refused(fastvgg.plan(tmp_path / "photos", tmp_path / "y.npy", **SETTINGS))
    check_error(error, "no image in", "0.jpg: No such file or directory")
    assert tree(tmp_path) == before


def test_option_that_scales_images_is_named_where_it_helps(tmp_path):
    (tmp_path / "photos").mkdir()
    deep = np.full((5, 7), 60_000, np.uint16)
    Image.fromarray(deep).save(tmp_path / "photos" / "a.png")
    error = refused(fastvgg.plan(tmp_path / "photos", tmp_path / "y.npy", **SETTINGS))
    assert error.remedy.startswith("give scale_to_uint8=True")
    save_images(tmp_path / "photos", pixels(1), ["b.png"])
    report = run(fastvgg.plan(tmp_path / "photos", tmp_path / "y.npy", **SETTINGS))
    assert report.counts["failed"] == 1
    assert "retry_failed=True" in report.remedy
    assert "scale_to_uint8=True" in report.remedy
    retried = fastvgg.plan(
        tmp_path / "photos",
        tmp_path / "y.npy",
        retry_failed=True,
        scale_to_uint8=True,
        **SETTINGS,
    )
    assert run(retried).counts["failed"] == 0


def test_tar_without_a_readable_image_is_refused(tmp_path):
    path = save_tar(tmp_path / "a.tar", [(f"{row}.jpg", b"torn") for row in range(5)])
    before = tree(tmp_path)
    check_error(refused(fastvgg.plan(path, tmp_path / "y.npy", **SETTINGS)), "no image in")
    assert tree(tmp_path) == before


@pytest.mark.parametrize("option", ["restart", "retry_failed"])
def test_finished_dataset_is_kept(tmp_path, photos, option):
    whole = (photos / "07.png").read_bytes()
    (photos / "07.png").write_bytes(whole[:50])
    assert run(fastvgg.plan(photos, tmp_path / "y.npy", **SETTINGS)).counts["failed"] == 1
    break_images(photos)
    before = tree(tmp_path)
    refused(fastvgg.plan(photos, tmp_path / "y.npy", **{option: True}, **SETTINGS))
    assert tree(tmp_path) == before


def test_unfinished_run_is_kept(tmp_path, photos):
    settings = {"mode": "caffe", "size": (5, 7)}
    target = interrupt_run(photos, tmp_path / "y.npy", **settings)
    intact = tmp_path / "intact"
    shutil.copytree(photos, intact)
    break_images(photos)
    before = tree(tmp_path)
    refused(fastvgg.plan(photos, target, **settings))
    assert tree(tmp_path) == before
    shutil.rmtree(photos)
    intact.rename(photos)
    assert run(fastvgg.plan(photos, target, **settings)).counts["failed"] == 0


@pytest.mark.parametrize("threads", [1, 3])
def test_single_readable_image_suffices(tmp_path, photos, threads):
    whole = (photos / "39.png").read_bytes()
    break_images(photos)
    (photos / "39.png").write_bytes(whole)
    settings = {**SETTINGS, "threads": threads}
    report = run(fastvgg.plan(photos, tmp_path / "y.npy", **settings))
    assert (report.counts["failed"], SOME_INPUTS_FAILED) == (39, 1)
    assert [record.failed for record in read_index(tmp_path / "y.npy", 40)] == [True] * 39 + [False]
    assert np.load(tmp_path / "y.npy")[39].any()


def test_image_that_changed_after_planning_is_refused(tmp_path, photos):
    plan = fastvgg.plan(photos, tmp_path / "y.npy", **SETTINGS)
    (photos / "00.png").write_bytes(b"another")
    before = tree(tmp_path)
    check_error(refused(plan), photos, "changed")
    assert tree(tmp_path) == before


@pytest.mark.parametrize("direction", ["preprocess", "restore"])
def test_array_made_of_unreadable_images_is_refused(tmp_path, direction):
    source = save_npy(tmp_path / "x.npy", np.zeros((2, 5, 7, 3), np.uint8))
    failed = [ImageRecord(f"{row}.png", "", 0, 0, True, "not an image") for row in range(2)]
    index_path(source).write_text(INDEX_HEADER + format_records(failed))
    before = tree(tmp_path)
    with pytest.raises(SourceError) as caught:
        fastvgg.plan(source, tmp_path / "y.npy", mode="caffe", direction=direction)
    check_error(caught.value, source, "0.png: not an image", "retry_failed=True")
    assert tree(tmp_path) == before
