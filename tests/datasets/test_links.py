"""Symbolic links below directories of images and of parts: followed or counted, never a loop."""

from __future__ import annotations

import os
import shutil
from contextlib import closing

import numpy as np
import pytest
from PIL import Image

import fastvgg
from fastvgg.datasets.folders import FolderImageListing
from fastvgg.datasets.open import open_source
from fastvgg.errors import ResumeError, SourceError, StoppedError, TargetError
from fastvgg.storage.location import Location
from tests.helpers.datasets_on_disk import check_error, pixels, save_images, tree
from tests.helpers.runs import run


def names_of(listing):
    return [os.fsdecode(listing.name(row)) for row in range(len(listing))]


def listed(folder, **options):
    listing = FolderImageListing(folder, **options)
    return names_of(listing), listing.notes


def read(folder, **options):
    with closing(open_source(Location.parse(folder), **options)) as source:
        return source.read(0, source.header.images)


@pytest.fixture
def photos(tmp_path):
    save_images(tmp_path / "photos", pixels(3), [f"dog/{row}.png" for row in range(3)])
    return tmp_path / "photos"


@pytest.fixture
def disk(tmp_path):
    save_images(tmp_path / "disk2" / "cat", pixels(3, seed=2), [f"{row}.png" for row in range(3)])
    return tmp_path / "disk2"


def test_class_folder_linked_to_another_disk_is_read(photos, disk):
    (photos / "cat").symlink_to(disk / "cat")
    batch, records = read(photos)
    expected = [(f"{label}/{row}.png", label) for label in ("cat", "dog") for row in range(3)]
    assert [(record.path, record.label) for record in records] == expected
    assert batch.tobytes() == pixels(3, seed=2).tobytes() + pixels(3).tobytes()
    assert listed(photos)[1] == []


def test_hugging_face_cache_of_links_to_blobs_is_read(tmp_path):
    snapshot, blobs = tmp_path / "snapshots" / "abc", tmp_path / "blobs"
    save_images(blobs, pixels(3), [f"{row}.png" for row in range(3)])
    (snapshot / "train" / "cat").mkdir(parents=True)
    for row in range(3):
        (blobs / f"{row}.png").rename(blobs / f"e3b0c442{row}")
        (snapshot / "train" / "cat" / f"{row}.jpg").symlink_to(f"../../../../blobs/e3b0c442{row}")
    batch, records = read(snapshot)
    assert [record.path for record in records] == [f"train/cat/{row}.jpg" for row in range(3)]
    assert batch.tobytes() == pixels(3).tobytes()


def test_git_annex_and_dvc_of_links_to_read_only_objects_is_read(photos):
    objects = photos / ".git" / "annex" / "objects" / "Xk" / "SHA256E-s9--00.png"
    objects.mkdir(parents=True)
    target = objects / "SHA256E-s9--00.png"
    shutil.copy(photos / "dog" / "0.png", target)
    target.chmod(0o444)
    objects.chmod(0o555)
    try:
        (photos / "dog" / "annexed.png").symlink_to(os.path.relpath(target, photos / "dog"))
        batch, records = read(photos)
        assert [record.path for record in records][-1] == "dog/annexed.png"
        assert batch[-1].tobytes() == pixels(3)[0].tobytes()
        assert listed(photos)[1] == ["skipped hidden files and folders: 1"]
    finally:
        objects.chmod(0o755)


def test_name_of_the_link_decides_whether_it_is_an_image(photos):
    (photos / "notes").symlink_to("dog/0.png")
    (photos / ".hidden.png").symlink_to("dog/0.png")
    (photos / "seen.png").symlink_to("dog/0.png")
    assert listed(photos) == (
        ["dog/0.png", "dog/1.png", "dog/2.png", "seen.png"],
        ["skipped files without an image suffix: 1", "skipped hidden files and folders: 1"],
    )


def test_link_without_a_target_is_a_failed_row_or_counted(photos, tmp_path):
    (photos / "a.png").symlink_to("nowhere.png")
    (photos / "b.png").symlink_to("b.png")
    (photos / "c.png").symlink_to("dog/0.png/below a file")
    (photos / "cat").symlink_to(tmp_path / "an unmounted disk" / "cat")
    (photos / "self").symlink_to("self")
    reasons = {record.path: record.reason for record in read(photos).records if record.failed}
    assert reasons == {
        "a.png": "No such file or directory",
        "b.png": "Too many levels of symbolic links",
        "c.png": "Not a directory",
    }
    assert listed(photos)[1] == ["skipped dangling links: 2, e.g. cat"]


def test_what_a_folder_without_images_contains_is_named(tmp_path):
    (tmp_path / "cat").symlink_to("/an unmounted disk/cat")
    (tmp_path / "a.HEIC").touch()
    with pytest.raises(SourceError) as caught:
        read(tmp_path)
    check_error(caught.value, "contains no images", "dangling links: 1, e.g. cat", "1 .heic")


def test_links_in_a_loop_are_cut_and_counted(photos):
    (photos / "dog" / "up").symlink_to("..")
    (photos / "dog" / "here").symlink_to(".")
    (photos / "all.png").symlink_to(photos)  # named like an image
    expected = [f"dog/{row}.png" for row in range(3)]
    loops = "skipped links to a folder that contains them: 3, e.g. all.png"
    assert listed(photos) == (expected, [loops])


def test_loop_through_a_folder_outside_is_cut(photos, disk):
    (photos / "cat").symlink_to(disk / "cat")
    (disk / "cat" / "back").symlink_to(photos.parent)  # contains photos
    names, notes = listed(photos)
    assert [name for name in names if "back" not in name] == [
        *(f"cat/{row}.png" for row in range(3)),
        *(f"dog/{row}.png" for row in range(3)),
    ]
    # The parent of photos, but neither photos nor disk2/cat below it.
    assert [name for name in names if "back" in name] == []
    loops = "skipped links to a folder that contains them: 2, e.g. cat/back/disk2/cat"
    assert notes == [loops]


def test_folder_that_is_reached_by_two_names_is_listed_under_both(photos):
    (photos / "wolf").symlink_to("dog")
    (photos / "fox").symlink_to("wolf")
    names, notes = listed(photos)
    assert names == [f"{name}/{row}.png" for name in ("dog", "fox", "wolf") for row in range(3)]
    assert notes == []


def test_two_folders_that_link_to_each_other_are_each_listed_under_both_names(photos, disk):
    (photos / "cat").symlink_to(disk / "cat")
    (photos / "dog" / "alike").symlink_to(disk / "cat")
    (disk / "cat" / "alike").symlink_to(photos / "dog")
    names, notes = listed(photos)
    expected = ["cat", "cat/alike", "dog", "dog/alike"]
    assert names == [f"{name}/{row}.png" for name in expected for row in range(3)]
    assert notes == ["skipped links to a folder that contains them: 2, e.g. cat/alike/alike"]


@pytest.mark.parametrize("count", [6, 12])
def test_many_folders_that_link_to_each_other_are_refused_at_once(tmp_path, count):
    folders = [tmp_path / "photos" / f"{number}" for number in range(count)]
    for folder in folders:
        save_images(folder, pixels(1), ["a.png"])
        for other in folders:
            (folder / other.name).symlink_to(other)
    with pytest.raises(SourceError) as caught:
        listed(tmp_path / "photos")
    check_error(caught.value, f"{tmp_path}/photos/", "same folders", "follow_links=False")
    assert len(listed(tmp_path / "photos", follow_links=False)[0]) == len(folders)


def test_folder_that_many_links_lead_to_is_listed_under_every_name(tmp_path):
    save_images(tmp_path / "one", pixels(1), ["a.png"])
    for number in range(1100):
        (tmp_path / f"name{number}").symlink_to("one")
    assert len(listed(tmp_path)[0]) == 1101
    (tmp_path / "photos").mkdir()
    for name in ("current", "latest"):
        (tmp_path / "photos" / name).symlink_to("..")
    assert len(listed(tmp_path / "photos")[0]) == 2 * 1101


def test_linked_entries_sort_by_their_names(photos, disk):
    for name in ("a.png", "a.png0", "a-", "a0"):
        (photos / f"{name}.png").symlink_to(disk / "cat" / "0.png")
    for name in ("a", "a.png-", "dog.x", "dog-"):
        (photos / name).symlink_to(disk / "cat")
    names, _ = listed(photos)
    assert names == sorted(names, key=os.fsencode)
    assert len(names) == 3 + 4 + 4 * 3


def test_links_are_skipped_and_counted_on_request(photos, disk):
    (photos / "cat").symlink_to(disk / "cat")
    (photos / "seen.png").symlink_to("dog/0.png")
    (photos / "gone.png").symlink_to("nowhere")
    assert listed(photos, follow_links=False) == (
        [f"dog/{row}.png" for row in range(3)],
        ["skipped dangling links: 1, e.g. gone.png", "skipped links: 2"],
    )


def test_file_replaced_by_a_link_stops_a_run_that_follows_none(photos, disk):
    with closing(open_source(Location.parse(photos), follow_links=False)) as source:
        (photos / "dog" / "0.png").unlink()
        (photos / "dog" / "0.png").symlink_to(disk / "cat" / "0.png")
        with pytest.raises(StoppedError, match=r"dog/0.png changed"):
            source.read(0, 1)


def save_equal(path, value):
    """Save an image whose size and time do not depend on the value."""
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(np.full((4, 5, 3), value, np.uint8)).save(path, "bmp")
    os.utime(path, ns=(0, 0))


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_fingerprint_notices_that_a_link_leads_elsewhere(photos, tmp_path, kind):
    for name, value in (("old", 1), ("new", 2)):
        save_equal(tmp_path / name / "a.bmp", value)
        os.utime(tmp_path / name, ns=(0, 0))
    link, end = (photos / "a.bmp", "/a.bmp") if kind == "file" else (photos / "cat", "")
    link.symlink_to(f"{tmp_path}/old{end}")
    listing = FolderImageListing(photos)
    before, identity = listing.fingerprint(), listing.identity(0)
    assert FolderImageListing(photos).fingerprint() == before
    link.unlink()
    link.symlink_to(f"{tmp_path}/new{end}")
    changed = FolderImageListing(photos)
    assert listing.fingerprint() == changed.fingerprint() != before
    if kind == "file":
        assert changed.identity(0) != identity


def test_fingerprint_notices_a_changed_target_of_a_link(photos, disk):
    (photos / "cat").symlink_to(disk / "cat")
    (photos / "z.png").symlink_to(disk / "z.png")
    save_images(disk, pixels(1), ["z.png"])
    prints = [FolderImageListing(photos).fingerprint()]
    os.utime(disk / "cat" / "1.png", ns=(0, 0))
    prints.append(FolderImageListing(photos).fingerprint())
    os.utime(disk / "z.png", ns=(0, 0))
    prints.append(FolderImageListing(photos).fingerprint())
    assert len({*prints}) == 3


def test_listing_makes_one_system_call_per_regular_file(tmp_path, monkeypatch):
    names = [f"{folder}/{row}.png" for folder in ("cat", "dog") for row in range(50)]
    for name in names:
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "photos" / name).touch()
    calls = []
    for name in ("stat", "lstat", "readlink"):
        call = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, call=call: (calls.append(args), call(*args))[1])
    assert listed(tmp_path / "photos") == (names_of_sorted(names), [])
    assert len(calls) == len(names) + 3  # a stat of every folder


def names_of_sorted(names):
    return sorted(names, key=os.fsencode)


SETTINGS = {"direction": "pack", "size": (5, 7), "threads": 1}


@pytest.mark.parametrize("target", ["cat/y.npy", "y.npy", "cat"])
def test_target_in_a_linked_folder_is_rejected(photos, disk, target):
    (photos / "cat").symlink_to(disk / "cat")
    before = tree(disk)
    if target == "y.npy":
        (disk / "cat" / "inside").mkdir()
        (photos / "dog" / "inside").symlink_to(disk / "cat" / "inside")
        (photos / "cat").unlink()
        path = disk / "cat" / "inside" / "y.npy"
    else:
        path = disk / target if target.endswith(".npy") else disk / "cat.zarr"
        if target == "cat":
            (disk / "cat").rename(disk / "cat.zarr")
            (photos / "cat").unlink()
            (photos / "cat").symlink_to(disk / "cat.zarr")
    before = tree(disk)
    for restart in (False, True):
        with pytest.raises(TargetError) as caught:
            fastvgg.plan(photos, path, restart=restart, **SETTINGS)
        check_error(caught.value, "overlaps", photos, "to which a link leads")
    assert tree(disk) == before


@pytest.mark.parametrize("name", ["y.npy", "y.npy.index.csv", "y.npy.partial"])
def test_target_that_is_a_link_to_itself_is_rejected(photos, tmp_path, name):
    (tmp_path / name).symlink_to(name)
    before = tree(photos)
    with pytest.raises((TargetError, SourceError)) as caught:
        fastvgg.plan(photos, tmp_path / "y.npy", **SETTINGS)
    check_error(caught.value, tmp_path / name)
    assert (tmp_path / name).is_symlink()
    assert tree(photos) == before


def test_following_links_is_part_of_the_job(photos, disk, tmp_path):
    (photos / "cat").symlink_to(disk / "cat")
    target = tmp_path / "y.npy"
    report = run(fastvgg.plan(photos, target, follow_links=False, **SETTINGS))
    assert (report.counts["images"], report.counts["failed"]) == (3, 0)
    verification = fastvgg.verify(target, full=True)
    assert (verification.recomputed_images, verification.note) == (3, "")
    assert run(fastvgg.plan(photos, target, follow_links=False, **SETTINGS)).counts["images"] == 3
    with pytest.raises(TargetError, match="other settings"):
        fastvgg.plan(photos, target, **SETTINGS)
    with pytest.raises(ResumeError, match="follow_links=False then, follow_links=True now"):
        fastvgg.plan(photos, target, retry_failed=True, **SETTINGS)


def save_part(path, images, seed):
    path.parent.mkdir(exist_ok=True)
    np.save(path, pixels(images, seed=seed))


@pytest.fixture
def parts(tmp_path):
    save_part(tmp_path / "parts" / "part-0.npy", 2, 1)
    save_part(tmp_path / "disk2" / "other.npy", 3, 2)
    (tmp_path / "parts" / "part-1.npy").symlink_to(tmp_path / "disk2" / "other.npy")
    return tmp_path / "parts"


def test_linked_part_is_read_or_rejected(parts):
    expected = np.concatenate([pixels(2, seed=1), pixels(3, seed=2)])
    assert read(parts).batch.tobytes() == expected.tobytes()
    with pytest.raises(SourceError) as caught:
        fastvgg.plan(parts, parts.parent / "y.npy", mode="tf", follow_links=False)
    check_error(caught.value, parts / "part-1.npy", "is a link", "follow_links=False")


def test_linked_part_is_not_replaced(parts):
    linked = parts.parent / "disk2" / "other.npy"
    before = linked.read_bytes()
    for restart in (False, True):
        with pytest.raises(TargetError, match="overlaps"):
            fastvgg.plan(parts, linked, mode="tf", restart=restart)
    assert linked.read_bytes() == before


def test_fingerprint_of_parts_notices_that_a_link_leads_elsewhere(parts):
    disk = parts.parent / "disk2"
    with closing(open_source(Location.parse(parts))) as source:
        before = source.fingerprint()
    save_part(disk / "copy.npy", 3, 3)
    (parts / "part-1.npy").unlink()
    (parts / "part-1.npy").symlink_to(disk / "copy.npy")
    for path in (disk / "copy.npy", disk / "other.npy"):
        os.utime(path, ns=(0, 0))
    with closing(open_source(Location.parse(parts))) as source:
        assert source.fingerprint() != before


def test_other_files_next_to_parts_are_counted(parts):
    (parts / "_SUCCESS").touch()
    (parts / "._a.jpg").touch()
    (parts / "part-0.npy.index.csv.txt").touch()  # named like a sidecar
    with closing(open_source(Location.parse(parts))) as source:
        assert source.notes == ["2 parts", "skipped files and folders not named part-*.npy: 2"]


def save_linked_zarr(directory, key):
    """Write an array of which `key`, a chunk or a directory, is a link to ``disk2/linked``."""
    zarr = pytest.importorskip("zarr")
    path, linked = directory / "x.zarr", directory / "disk2" / "linked"
    zarr.save_array(path, pixels(2))
    linked.parent.mkdir()
    (path / key).rename(linked)
    (path / key).symlink_to(linked)
    return path, linked


@pytest.mark.parametrize(
    ("key", "target"), [("c", "linked/y.npy"), ("c/0/0", "linked/y.zarr"), ("c/0", ".zarr")]
)
def test_target_that_overlaps_what_a_zarr_links_to_is_rejected(tmp_path, key, target):
    path, linked = save_linked_zarr(tmp_path, key)
    if target == ".zarr":
        linked.parent.rename(tmp_path / "y.zarr")
        (tmp_path / "disk2").symlink_to("y.zarr")
        target = tmp_path / "y.zarr"
    else:
        target = linked.parent / target
    before = tree(tmp_path)
    for restart in (False, True):
        with pytest.raises(TargetError) as caught:
            fastvgg.plan(path, target, mode="tf", restart=restart)
        check_error(caught.value, "overlaps", path, "to which a link leads")
    assert tree(tmp_path) == before
    run(fastvgg.plan(path, tmp_path / "elsewhere.npy", mode="tf"))


@pytest.mark.parametrize("key", ["c", "c/0/0/0/0"])
def test_fingerprint_of_zarr_notices_that_a_link_leads_elsewhere(tmp_path, key):
    path, linked = save_linked_zarr(tmp_path, key)
    with closing(open_source(Location.parse(path))) as source:
        before = source.fingerprint()
        assert source.fingerprint() == before
        linked.rename(linked.with_name("moved"))
        (path / key).unlink()
        (path / key).symlink_to(linked.with_name("moved"))
        assert source.fingerprint() != before


@pytest.mark.parametrize("name", ["x.npy", "x.zarr"])
def test_not_following_links_is_rejected_for_other_arrays(tmp_path, name):
    path = tmp_path / name
    if name == "x.npy":
        np.save(path, pixels(2))
    else:
        zarr = pytest.importorskip("zarr")
        zarr.save_array(path, pixels(2))
    with pytest.raises(SourceError) as caught:
        fastvgg.plan(path, tmp_path / "y.npy", mode="tf", follow_links=False)
    check_error(caught.value, path, "follow_links=False", "part-*.npy")
