"""What failed is tried again: the same bytes, and the same index, as a run in which nothing did."""

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
from fastvgg.stream.manifest import manifest_path, read_manifest
from tests.helpers.datasets_on_disk import (
    data_tree,
    must_say,
    names_in,
    pixels,
    plan_of,
    save_images,
    tree,
)

TORN = ("a/02.png", "b/03.png", "b/09.png")  # rows 1, 7 and 10, in chunks 0, 2 and 3 of 3


@pytest.fixture
def photos(tmp_path):
    """A folder in which some images are torn, and what mends them."""
    folder = save_images(tmp_path / "photos", pixels(11))
    whole = {name: (folder / name).read_bytes() for name in TORN}
    for name in TORN:
        (folder / name).write_bytes(whole[name][:50])

    def mend(*names):
        for name in names or TORN:
            (folder / name).write_bytes(whole[name])

    return folder, mend


SETTINGS = {
    "preprocess": {"mode": "torch", "out_layout": "NCHW", "dtype": "float16"},
    "pack": {"direction": "pack"},
}


def first_run(folder, target, **settings):
    report = plan_of(folder, target, together=3, **settings).run()
    assert report.counts["failed"] == len(TORN)
    return target


def again(folder, target, **settings):
    return plan_of(folder, target, retry_failed=True, **settings)


@pytest.mark.parametrize("verb", SETTINGS)
def test_what_was_mended_is_what_a_run_without_failures_writes(tmp_path, photos, verb):
    folder, mend = photos
    (tmp_path / "retried").mkdir()
    (tmp_path / "fresh").mkdir()
    target = first_run(folder, tmp_path / "retried" / "y.npy", **SETTINGS[verb])
    mend()
    report = again(folder, target, **SETTINGS[verb]).run()
    assert report.counts == {"images": 11, "failed": 0, "chunks": 4, "computed_chunks": 3}
    assert report.failures == []
    plan_of(folder, tmp_path / "fresh" / "y.npy", together=3, **SETTINGS[verb]).run()
    assert data_tree(tmp_path / "retried") == data_tree(tmp_path / "fresh")
    fastvgg.verify(target, full=True)


def test_only_what_failed_is_read_again(tmp_path, photos):
    folder, mend = photos
    target = first_run(folder, tmp_path / "y.npy", mode="caffe")
    mend()
    # Of the others no byte can be read any more, and nothing else tells that they changed.
    for path in sorted(folder.rglob("*.png")):
        if str(path.relative_to(folder)) not in TORN:
            status = path.stat()
            path.write_bytes(bytes(status.st_size))
            os.utime(path, ns=(0, status.st_mtime_ns))
    report = again(folder, target, mode="caffe").run()
    assert report.counts["failed"] == 0
    expected = plan_of(
        save_images(tmp_path / "whole", pixels(11)), tmp_path / "expected.npy", mode="caffe"
    )
    expected.run()
    assert target.read_bytes() == (tmp_path / "expected.npy").read_bytes()


def test_what_is_still_torn_stays_a_failure_and_the_rest_is_mended(tmp_path, photos):
    folder, mend = photos
    target = first_run(folder, tmp_path / "y.npy", mode="caffe")
    mend(TORN[1])
    report = again(folder, target, mode="caffe").run()
    assert [failure.path for failure in report.failures] == [TORN[0], TORN[2]]
    assert read_manifest(target).counts == {"images": 11, "failed": 2}
    failed = [record.failed for record in read_index(target, 11)]
    assert failed == [row in (1, 10) for row in range(11)]
    stored = np.load(target)
    assert not stored[[1, 10]].any()
    assert stored[7].any()
    mend()
    assert again(folder, target, mode="caffe").run().counts["failed"] == 0


@pytest.mark.parametrize("name", ["b/01.png", "a/08.png"], ids=["beside a torn one", "elsewhere"])
def test_a_chunk_of_which_another_image_changed_is_read_again_as_a_whole(tmp_path, photos, name):
    folder, mend = photos
    target = first_run(folder, tmp_path / "y.npy", mode="caffe")
    mend()
    changed = pixels(1, seed=9)[0]
    Image.fromarray(changed).save(folder / name)
    again(folder, target, mode="caffe").run()
    plan_of(folder, tmp_path / "fresh.npy", mode="caffe").run()
    assert target.read_bytes() == (tmp_path / "fresh.npy").read_bytes()


def test_the_plan_says_how_many_are_tried_again_and_nothing_is_written_by_it(tmp_path, photos):
    folder, mend = photos
    target = first_run(folder, tmp_path / "y.npy", mode="caffe")
    mend()
    before = tree(tmp_path)
    plan = again(folder, target, mode="caffe", memory="1GiB")
    assert tree(tmp_path) == before
    assert "failed images to retry: 3" in str(plan)
    assert (plan.chunk_images, plan.committed_chunks, plan.chunks) == (3, 1, 4)


def test_nothing_is_done_where_nothing_failed(tmp_path):
    folder = save_images(tmp_path / "photos", pixels(5))
    target = tmp_path / "y.npy"
    plan_of(folder, target, mode="caffe").run()
    before = tree(tmp_path)
    report = again(folder, target, mode="caffe").run()
    assert report.counts["computed_chunks"] == 0
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    ("option", "wider"), [("gray16", "scale"), ("max_pixels", 10_000)], ids=str
)
def test_what_was_refused_is_read_where_it_is_allowed_then(tmp_path, option, wider):
    folder = save_images(tmp_path / "photos", pixels(5, height=3, width=3))
    grey = Image.fromarray(np.arange(4800, dtype=np.uint16).reshape(60, 80) * 13)
    grey.save(folder / "a" / "deep.png")
    if option == "max_pixels":
        grey.convert("L").convert("RGB").save(folder / "a" / "deep.png")
    target, settings = tmp_path / "y.npy", {"mode": "caffe", "size": (7, 5)}
    narrow = {} if option == "gray16" else {option: 100}
    assert plan_of(folder, target, **settings, **narrow).run().counts["failed"] == 1
    report = again(folder, target, **settings, **{option: wider}).run()
    assert report.counts["failed"] == 0
    plan_of(folder, tmp_path / "fresh.npy", **settings, **{option: wider}).run()
    assert target.read_bytes() == (tmp_path / "fresh.npy").read_bytes()
    assert read_manifest(target).job == read_manifest(tmp_path / "fresh.npy").job


@pytest.mark.parametrize(
    ("wide", "narrow"), [({"gray16": "scale"}, {}), ({}, {"max_pixels": 100})], ids=str
)
def test_what_could_be_read_then_is_not_refused_now(tmp_path, photos, wide, narrow):
    folder, mend = photos
    target = first_run(folder, tmp_path / "y.npy", mode="caffe", **wide)
    mend()
    with pytest.raises(ResumeError) as caught:
        again(folder, target, mode="caffe", **narrow)
    must_say(caught.value, target, *(wide or narrow), "--restart")


def test_a_plan_that_finds_failures_of_a_run_made_since_goes_on_in_its_chunks(tmp_path, photos):
    folder, _ = photos
    plan = again(folder, tmp_path / "y.npy", mode="caffe")
    first_run(folder, tmp_path / "y.npy", mode="caffe")
    before = data_tree(tmp_path)
    assert plan.chunk_images != 3
    assert plan.run().counts == {"images": 11, "failed": 3, "chunks": 4, "computed_chunks": 3}
    assert data_tree(tmp_path) == before


@pytest.mark.parametrize("change", ["renamed", "removed", "new"])
def test_other_names_are_refused_with_the_first(tmp_path, photos, change):
    folder, mend = photos
    target = first_run(folder, tmp_path / "y.npy", mode="caffe")
    mend()
    if change == "renamed":
        (folder / "b" / "01.png").rename(folder / "b" / "02.png")
    elif change == "removed":
        (folder / "b" / "01.png").unlink()
    else:
        save_images(folder, pixels(1), ["b/02.png"])
    before = tree(tmp_path)
    with pytest.raises(ResumeError) as caught:
        again(folder, target, mode="caffe")
    words = ["b/01.png", "b/02.png"] if change == "renamed" else ["shape"]
    must_say(caught.value, target, *words, "--restart")
    assert tree(tmp_path) == before


def test_another_job_is_refused(tmp_path, photos):
    folder, mend = photos
    target = first_run(folder, tmp_path / "y.npy", mode="caffe")
    mend()
    with pytest.raises(ResumeError) as caught:
        again(folder, target, mode="tf")
    must_say(caught.value, target, "mode", "caffe", "tf")


def test_without_a_finished_target_there_is_nothing_to_try_again(tmp_path, photos):
    folder, _ = photos
    report = again(folder, tmp_path / "y.npy", mode="caffe").run()  # as any first run
    assert report.counts["failed"] == 3


def test_a_file_that_fastvgg_did_not_write_is_not_taken_up(tmp_path, photos):
    folder, _ = photos
    (tmp_path / "y.npy").write_bytes(b"precious")
    with pytest.raises(TargetError):
        again(folder, tmp_path / "y.npy", mode="caffe")
    assert (tmp_path / "y.npy").read_bytes() == b"precious"


def test_it_contradicts_a_restart_and_an_array(tmp_path, photos):
    folder, _ = photos
    target = first_run(folder, tmp_path / "y.npy", mode="caffe")
    with pytest.raises(UsageError) as caught:
        again(folder, target, mode="caffe", restart=True)
    must_say(caught.value, "--retry-failed", "--restart")
    with pytest.raises(UsageError) as caught:
        again(target, tmp_path / "x.npy", direction="restore")
    must_say(caught.value, "--retry-failed")


def test_a_kept_row_that_was_damaged_is_never_described(tmp_path, photos):
    folder, mend = photos
    target = first_run(folder, tmp_path / "y.npy", mode="caffe")
    mend()
    content = bytearray(target.read_bytes())
    content[128 + 5] ^= 1  # in row 0, which is kept
    target.write_bytes(content)
    with pytest.raises(ResumeError) as caught:
        again(folder, target, mode="caffe").run()
    must_say(caught.value, "images 0 to 2", "--restart")
    assert not target.exists()
    assert "y.npy.fastvgg-journal" in names_in(tmp_path)


def test_an_image_that_changes_while_it_is_read_ends_the_run_and_a_restart_begins_it_again(
    tmp_path, photos
):
    folder, mend = photos
    settings = {"mode": "caffe", "size": (7, 5)}
    target = first_run(folder, tmp_path / "y.npy", **settings)
    mend()
    plan = again(folder, target, **settings)
    (folder / TORN[0]).write_bytes(b"torn again")
    with pytest.raises(StoppedError) as caught:
        plan.run()
    must_say(caught.value, folder / TORN[0], "changed", "--restart")
    assert not target.exists()
    mend()
    with pytest.raises(ResumeError) as caught:
        again(folder, target, **settings)
    must_say(caught.value, target, "fingerprint", "--restart")
    plan_of(folder, target, restart=True, **settings).run()
    plan_of(folder, tmp_path / "fresh.npy", **settings).run()
    assert target.read_bytes() == (tmp_path / "fresh.npy").read_bytes()


def test_of_a_shard_that_was_mended_all_rows_are_read_again(tmp_path):
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
    assert again(tmp_path / "s.tar", target, mode="caffe").run().counts["failed"] == 0
    plan_of(tmp_path / "s.tar", tmp_path / "fresh.npy", mode="caffe").run()
    assert target.read_bytes() == (tmp_path / "fresh.npy").read_bytes()
    assert manifest_path(target).exists()
