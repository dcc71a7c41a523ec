"""Retries of failed images: the same array and index as a run without failures."""

from __future__ import annotations

import io
import os
import tarfile

import numpy as np
import pytest
from PIL import Image

import fastvgg
from fastvgg.datasets.index import read_index
from fastvgg.errors import ResumeError, StoppedError, TargetError, UsageError
from fastvgg.storage.local import Storage
from fastvgg.stream.manifest import manifest_path, read_manifest
from tests.helpers.datasets_on_disk import (
    check_error,
    commits_in,
    data_tree,
    pixels,
    plan_of,
    save_images,
    tree,
)
from tests.helpers.faults import InterruptedStorage, SimulatedCrash
from tests.helpers.runs import folder_with_failures, run

TORN_IMAGES = ("a/02.png", "b/03.png", "b/09.png")  # rows 1, 7 and 10, in chunks 0, 2 and 3 of 3


@pytest.fixture
def photos(tmp_path):
    """A folder with truncated images, and a function that repairs them."""
    folder = save_images(tmp_path / "photos", pixels(11))
    whole = {name: (folder / name).read_bytes() for name in TORN_IMAGES}
    for name in TORN_IMAGES:
        (folder / name).write_bytes(whole[name][:50])

    def repair(*names):
        for name in names or TORN_IMAGES:
            (folder / name).write_bytes(whole[name])

    return folder, repair


SETTINGS = {
    "preprocess": {"mode": "torch", "out_layout": "NCHW", "dtype": "float16"},
    "pack": {"direction": "pack"},
}


def first_run(folder, target, **settings):
    report = plan_of(folder, target, images_per_chunk=3, **settings).run()
    assert report.counts["failed"] == len(TORN_IMAGES)
    return target


def retry(folder, target, **settings):
    return plan_of(folder, target, retry_failed=True, **settings)


@pytest.mark.parametrize("command", SETTINGS)
def test_retry_matches_a_run_without_failures(tmp_path, photos, command):
    folder, repair = photos
    (tmp_path / "retried").mkdir()
    (tmp_path / "fresh").mkdir()
    target = first_run(folder, tmp_path / "retried" / "y.npy", **SETTINGS[command])
    repair()
    report = retry(folder, target, **SETTINGS[command]).run()
    assert report.counts == {"images": 11, "failed": 0, "chunks": 4, "computed_chunks": 3}
    assert report.failures == []
    plan_of(folder, tmp_path / "fresh" / "y.npy", images_per_chunk=3, **SETTINGS[command]).run()
    assert data_tree(tmp_path / "retried") == data_tree(tmp_path / "fresh")
    fastvgg.verify(target, full=True)


def test_retry_reads_only_failed_images(tmp_path, photos):
    folder, repair = photos
    target = first_run(folder, tmp_path / "y.npy", mode="caffe")
    repair()
    # The other images become unreadable, with the same size and mtime.
    for path in sorted(folder.rglob("*.png")):
        if str(path.relative_to(folder)) not in TORN_IMAGES:
            status = path.stat()
            path.write_bytes(bytes(status.st_size))
            os.utime(path, ns=(0, status.st_mtime_ns))
    report = retry(folder, target, mode="caffe").run()
    assert report.counts["failed"] == 0
    expected = plan_of(
        save_images(tmp_path / "whole", pixels(11)), tmp_path / "expected.npy", mode="caffe"
    )
    expected.run()
    assert target.read_bytes() == (tmp_path / "expected.npy").read_bytes()


def test_retry_keeps_images_that_still_fail(tmp_path, photos):
    folder, repair = photos
    target = first_run(folder, tmp_path / "y.npy", mode="caffe")
    repair(TORN_IMAGES[1])
    report = retry(folder, target, mode="caffe").run()
    assert [failure.path for failure in report.failures] == [TORN_IMAGES[0], TORN_IMAGES[2]]
    assert read_manifest(target).counts == {"images": 11, "failed": 2}
    failed = [record.failed for record in read_index(target, 11)]
    assert failed == [row in (1, 10) for row in range(11)]
    stored = np.load(target)
    assert not stored[[1, 10]].any()
    assert stored[7].any()
    repair()
    assert retry(folder, target, mode="caffe").run().counts["failed"] == 0


@pytest.mark.parametrize("name", ["b/01.png", "a/08.png"], ids=["same chunk", "other chunk"])
def test_retry_recomputes_chunks_with_other_changed_images(tmp_path, photos, name):
    folder, repair = photos
    target = first_run(folder, tmp_path / "y.npy", mode="caffe")
    repair()
    changed = pixels(1, seed=9)[0]
    Image.fromarray(changed).save(folder / name)
    retry(folder, target, mode="caffe").run()
    plan_of(folder, tmp_path / "fresh.npy", mode="caffe").run()
    assert target.read_bytes() == (tmp_path / "fresh.npy").read_bytes()


def test_retry_plan_shows_the_failed_images_and_writes_nothing(tmp_path, photos):
    folder, repair = photos
    target = first_run(folder, tmp_path / "y.npy", mode="caffe")
    repair()
    before = tree(tmp_path)
    plan = retry(folder, target, mode="caffe", memory="1GiB")
    assert tree(tmp_path) == before
    assert "failed images to retry: 3" in str(plan)
    assert (plan.chunk_images, plan.committed_chunks, plan.chunks) == (3, 1, 4)


def test_retry_without_failures_does_nothing(tmp_path):
    folder = save_images(tmp_path / "photos", pixels(5))
    target = tmp_path / "y.npy"
    plan_of(folder, target, mode="caffe").run()
    before = tree(tmp_path)
    report = retry(folder, target, mode="caffe").run()
    assert report.counts["computed_chunks"] == 0
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    ("option", "wider_value"), [("scale_to_uint8", True), ("max_pixels", 10_000)], ids=str
)
def test_retry_with_wider_options_reads_rejected_images(tmp_path, option, wider_value):
    folder = save_images(tmp_path / "photos", pixels(5, height=3, width=3))
    grey = Image.fromarray(np.arange(4800, dtype=np.uint16).reshape(60, 80) * 13)
    grey.save(folder / "a" / "deep.png")
    if option == "max_pixels":
        grey.convert("L").convert("RGB").save(folder / "a" / "deep.png")
    target, settings = tmp_path / "y.npy", {"mode": "caffe", "size": (7, 5)}
    narrow = {} if option == "scale_to_uint8" else {option: 100}
    assert plan_of(folder, target, **settings, **narrow).run().counts["failed"] == 1
    report = retry(folder, target, **settings, **{option: wider_value}).run()
    assert report.counts["failed"] == 0
    plan_of(folder, tmp_path / "fresh.npy", **settings, **{option: wider_value}).run()
    assert target.read_bytes() == (tmp_path / "fresh.npy").read_bytes()
    assert read_manifest(target).job == read_manifest(tmp_path / "fresh.npy").job


@pytest.mark.parametrize(
    ("wide", "narrow"), [({"scale_to_uint8": True}, {}), ({}, {"max_pixels": 100})], ids=str
)
def test_retry_with_narrower_options_is_rejected(tmp_path, photos, wide, narrow):
    folder, repair = photos
    target = first_run(folder, tmp_path / "y.npy", mode="caffe", **wide)
    repair()
    with pytest.raises(ResumeError) as caught:
        retry(folder, target, mode="caffe", **narrow)
    check_error(caught.value, target, *(wide or narrow), "restart=True")


def test_retry_plan_made_before_the_first_run_uses_its_chunks(tmp_path, photos):
    folder, _ = photos
    plan = retry(folder, tmp_path / "y.npy", mode="caffe")
    first_run(folder, tmp_path / "y.npy", mode="caffe")
    before = data_tree(tmp_path)
    assert plan.chunk_images != 3
    assert plan.run().counts == {"images": 11, "failed": 3, "chunks": 4, "computed_chunks": 3}
    assert data_tree(tmp_path) == before


@pytest.mark.parametrize("change", ["renamed", "removed", "new"])
def test_retry_with_other_names_is_rejected(tmp_path, photos, change):
    folder, repair = photos
    target = first_run(folder, tmp_path / "y.npy", mode="caffe")
    repair()
    if change == "renamed":
        (folder / "b" / "01.png").rename(folder / "b" / "02.png")
    elif change == "removed":
        (folder / "b" / "01.png").unlink()
    else:
        save_images(folder, pixels(1), ["b/02.png"])
    before = tree(tmp_path)
    with pytest.raises(ResumeError) as caught:
        retry(folder, target, mode="caffe")
    words = ["b/01.png", "b/02.png"] if change == "renamed" else ["shape"]
    check_error(caught.value, target, *words, "restart=True")
    assert tree(tmp_path) == before


def test_retry_of_another_job_is_rejected(tmp_path, photos):
    folder, repair = photos
    target = first_run(folder, tmp_path / "y.npy", mode="caffe")
    repair()
    with pytest.raises(ResumeError) as caught:
        retry(folder, target, mode="tf")
    check_error(caught.value, target, "mode", "caffe", "tf")


def test_retry_without_a_finished_target_is_a_first_run(tmp_path, photos):
    folder, _ = photos
    report = retry(folder, tmp_path / "y.npy", mode="caffe").run()  # as any first run
    assert report.counts["failed"] == 3


def test_retry_rejects_a_foreign_target(tmp_path, photos):
    folder, _ = photos
    (tmp_path / "y.npy").write_bytes(b"precious")
    with pytest.raises(TargetError):
        retry(folder, tmp_path / "y.npy", mode="caffe")
    assert (tmp_path / "y.npy").read_bytes() == b"precious"


def test_retry_conflicts_with_restart_and_array_sources(tmp_path, photos):
    folder, _ = photos
    target = first_run(folder, tmp_path / "y.npy", mode="caffe")
    with pytest.raises(UsageError) as caught:
        retry(folder, target, mode="caffe", restart=True)
    check_error(caught.value, "retry", "restart")
    with pytest.raises(UsageError) as caught:
        retry(target, tmp_path / "x.npy", direction="restore")
    check_error(caught.value, "retry")


@pytest.mark.parametrize("row", [0, 1, 4], ids=["beside a failed row", "failed", "other chunk"])
def test_retry_of_an_edited_target_is_refused_and_keeps_it(tmp_path, photos, row):
    folder, repair = photos
    target = first_run(folder, tmp_path / "y.npy", mode="caffe")
    repair()
    np.load(target, mmap_mode="r+")[row, 0, 0] = 42
    before = tree(tmp_path)
    with pytest.raises(TargetError) as caught:
        retry(folder, target, mode="caffe").run()
    check_error(caught.value, target, "differ", "move it away")
    assert "restart" not in str(caught.value)
    assert tree(tmp_path) == before


class CrashBeforeRenameStorage(Storage):
    def rename(self, old, new):
        if new.name.endswith(".partial"):
            raise SimulatedCrash
        super().rename(old, new)


def test_target_edited_before_a_killed_retry_renamed_it_is_kept(tmp_path, photos):
    folder, repair = photos
    target = first_run(folder, tmp_path / "y.npy", mode="caffe")
    repair()
    with pytest.raises(SimulatedCrash):
        run(retry(folder, target, mode="caffe"), storage=CrashBeforeRenameStorage())
    np.load(target, mmap_mode="r+")[1, 0, 0] = 42
    before = tree(tmp_path)
    with pytest.raises(TargetError) as caught:
        retry(folder, target, mode="caffe").run()
    check_error(caught.value, target, "differ", "move it away")
    assert tree(tmp_path) == before


def test_row_edited_after_a_killed_retry_is_not_lost(tmp_path, photos):
    folder, repair = photos
    target = first_run(folder, tmp_path / "y.npy", mode="caffe")
    repair()
    with pytest.raises(SimulatedCrash):
        run(retry(folder, target, mode="caffe"), storage=InterruptedStorage(1))
    partial = target.with_name("y.npy.partial")
    stored = np.memmap(partial, np.float32, "r+", 128, (11, 7, 9, 3))
    stored[9] = 42  # in the last chunk, whose row 10 failed
    stored.flush()
    with pytest.raises(ResumeError) as caught:
        retry(folder, target, mode="caffe").run()
    check_error(caught.value, partial, "images 9 to 10", "move it away", "restart=True")
    partial.rename(tmp_path / "own")
    plan_of(folder, target, mode="caffe", restart=True).run()
    fastvgg.verify(target, full=True)


def test_image_changed_during_a_retry_stops_it_and_requires_a_restart(tmp_path, photos):
    folder, repair = photos
    settings = {"mode": "caffe", "size": (7, 5)}
    target = first_run(folder, tmp_path / "y.npy", **settings)
    repair()
    plan = retry(folder, target, **settings)
    (folder / TORN_IMAGES[0]).write_bytes(b"not an image")
    with pytest.raises(StoppedError) as caught:
        plan.run()
    check_error(caught.value, folder / TORN_IMAGES[0], "changed", "start over")
    assert not target.exists()
    repair()
    with pytest.raises(ResumeError) as caught:
        retry(folder, target, **settings)
    check_error(caught.value, target, "before its source changed", "restart=True")
    plan_of(folder, target, restart=True, **settings).run()
    plan_of(folder, tmp_path / "fresh.npy", **settings).run()
    assert target.read_bytes() == (tmp_path / "fresh.npy").read_bytes()


def test_retry_of_a_changed_shard_reads_all_its_rows(tmp_path):
    photos = save_images(tmp_path / "photos", pixels(5))

    def shard(torn):
        with tarfile.open(tmp_path / "s.tar", "w") as members:
            for path in sorted(photos.rglob("*.png")):
                member = tarfile.TarInfo(str(path.relative_to(photos)))
                content = path.read_bytes()[: 50 if torn and path.name == "02.png" else None]
                member.size = len(content)
                members.addfile(member, io.BytesIO(content))

    shard(torn=True)
    target = tmp_path / "y.npy"
    assert plan_of(tmp_path / "s.tar", target, mode="caffe").run().counts["failed"] == 1
    shard(torn=False)
    assert retry(tmp_path / "s.tar", target, mode="caffe").run().counts["failed"] == 0
    plan_of(tmp_path / "s.tar", tmp_path / "fresh.npy", mode="caffe").run()
    assert target.read_bytes() == (tmp_path / "fresh.npy").read_bytes()
    assert manifest_path(target).exists()


@pytest.mark.parametrize("damaged", range(4))
def test_damaged_chunk_of_an_interrupted_retry_is_recomputed(tmp_path, damaged):
    photos, settings = tmp_path / "photos", {"mode": "caffe", "size": (7, 9)}
    folder_with_failures(photos)
    target, whole = tmp_path / "y.npy", tmp_path / "whole.npy"
    plan_of(photos, target, images_per_chunk=2, **settings).run()
    for name in ("1-torn.png", "3-text.jpg"):
        (photos / name).write_bytes((photos / "1.png").read_bytes())
    plan_of(photos, whole, **settings).run()
    with pytest.raises(SimulatedCrash):  # two chunks need no retry
        run(
            plan_of(photos, target, retry_failed=True, **settings),
            storage=InterruptedStorage(2),
        )
    assert commits_in(target) == 4
    partial = tmp_path / "y.npy.partial"
    content = bytearray(partial.read_bytes())
    content[128 + damaged * 2 * 7 * 9 * 3 * 4] ^= 1
    partial.write_bytes(content)
    report = plan_of(photos, target, retry_failed=True, **settings).run()
    assert report.damaged_chunks == 1
    assert target.read_bytes() == whole.read_bytes()
    assert fastvgg.verify(target, full=True).failed == 0
