"""Runs that are rejected: sources that change, wrong conversions, invalid targets."""

from __future__ import annotations

import os

import numpy as np
import pytest

import fastvgg
from fastvgg import oracle
from fastvgg.datasets.index import index_path
from fastvgg.errors import SourceError, StoppedError, TargetError, UsageError
from fastvgg.stream.manifest import manifest_path
from fastvgg.transform import Transform
from tests.helpers.batches import KERAS_MODES, assert_same
from tests.helpers.datasets_on_disk import (
    check_error,
    names_in,
    network_inputs,
    npy_bytes,
    permissions,
    pixels,
    plan_of,
    save_images,
    save_npy,
    stdout_of,
    tree,
)

# Sources that change
from tests.helpers.runs import preprocessed, run_with_event


def change_content(source):
    save_npy(source, pixels(11, seed=2))
    os.utime(source, ns=(0, 1))


def change_one_byte(source):
    with source.open("r+b") as file:
        file.seek(1000)
        file.write(bytes([file.read(1)[0] ^ 1]))


def change_one_byte_at_the_same_time(source):
    before = source.stat()
    change_one_byte(source)
    os.utime(source, ns=(before.st_atime_ns, before.st_mtime_ns))


CHANGES = {
    "other content": change_content,
    "another time": lambda source: os.utime(source, ns=(0, 1)),
    "one byte": change_one_byte,
}
DESCRIBED_CHANGES = {
    "size": (lambda source: save_npy(source, pixels(12)), "it had 2207 bytes and has 2396"),
    "time": (CHANGES["another time"], "it was modified at 1970-01-01 00:00:00 UTC"),
    "content": (change_one_byte_at_the_same_time, "its content differs"),
}
IMAGE_CHANGES = {
    "added": (
        lambda photos: save_images(photos, pixels(1), ["a/03.png"]),
        "it had 11 images and has 12; row 2 was a/04.png and is a/03.png",
    ),
    "removed": (
        lambda photos: (photos / "b" / "09.png").unlink(),
        "it had 11 images and has 10; row 10 was b/09.png and is no image",
    ),
    "replaced": (
        lambda photos: (
            save_images(photos, pixels(1, seed=9), ["a/new.png"])
            .joinpath("a/new.png")
            .rename(photos / "a" / "02.png")
        ),
        "a/02.png was changed",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_array_changed_during_a_run_is_not_published(tmp_path, array, change):
    target = tmp_path / "y.npy"
    plan = plan_of(array, target, mode="caffe", images_per_chunk=2)
    with pytest.raises(StoppedError) as caught:
        run_with_event(plan, lambda: CHANGES[change](array))
    check_error(caught.value, array, "changed while it was read", "restart")
    assert not target.exists()
    assert not manifest_path(target).exists()
    plan_of(array, target, mode="caffe", restart=True).run()
    assert target.read_bytes() == npy_bytes(network_inputs(np.load(array), "caffe"))


def test_array_truncated_during_a_run_stops_it(tmp_path, array):
    target = tmp_path / "y.npy"
    plan = plan_of(array, target, mode="caffe", images_per_chunk=2)
    with pytest.raises(StoppedError) as caught:
        run_with_event(plan, lambda: os.truncate(array, 128))
    check_error(caught.value, array, "truncated")
    assert not target.exists()


def test_folder_changed_during_a_run_is_not_published(tmp_path, photos):
    target = tmp_path / "y.npy"
    plan = plan_of(photos, target, mode="caffe", images_per_chunk=2)
    with pytest.raises(StoppedError) as caught:
        run_with_event(plan, lambda: save_images(photos, pixels(1), ["new.png"]))
    check_error(caught.value, photos, "changed while it was read", "row 11 was no image", "new.png")
    assert not target.exists()


@pytest.mark.parametrize("change", CHANGES)
def test_source_changed_before_the_run_is_rejected(tmp_path, array, change):
    plan = plan_of(array, tmp_path / "y.npy", mode="caffe")
    CHANGES[change](array)
    with pytest.raises(SourceError) as caught:
        plan.run()
    check_error(caught.value, array, "has changed since", "rerun the same command")
    assert names_in(tmp_path) == ["x.npy"]


@pytest.mark.parametrize("change", DESCRIBED_CHANGES)
@pytest.mark.parametrize("in_place", [False, True])
def test_change_of_a_file_is_described(tmp_path, change, in_place):
    source = save_npy(tmp_path / "x.npy", pixels(11))
    make, expected = DESCRIBED_CHANGES[change]
    if in_place:
        save_npy(source, pixels(11).astype(np.float32))
        expected = expected.replace("2207", "8444")
    target = None if in_place else tmp_path / "y.npy"
    plan = plan_of(source, target, mode="caffe", in_place=in_place)
    make(source)
    with pytest.raises(SourceError) as caught:
        plan.run()
    check_error(caught.value, source, expected)


@pytest.mark.parametrize("change", IMAGE_CHANGES)
def test_change_of_a_folder_names_the_first_image_that_differs(tmp_path, photos, change):
    make, expected = IMAGE_CHANGES[change]
    plan = plan_of(photos, tmp_path / "y.npy", mode="caffe", size=(7, 9))
    make(photos)
    with pytest.raises(SourceError) as caught:
        plan.run()
    check_error(caught.value, photos, "has changed since", expected)
    assert names_in(tmp_path) == ["photos"]


def test_image_changed_before_the_run_is_rejected_while_sizes_are_read(tmp_path, photos):
    plan = plan_of(photos, tmp_path / "y.npy", mode="caffe")
    (photos / "a" / "02.png").write_bytes(b"another image")
    with pytest.raises(SourceError) as caught:
        plan.run()
    check_error(caught.value, photos / "a" / "02.png", "changed after", "nothing was written")
    assert names_in(tmp_path) == ["photos"]


def test_source_removed_after_planning_is_rejected(tmp_path, array):
    plan = plan_of(array, tmp_path / "y.npy", mode="caffe")
    array.unlink()
    with pytest.raises(SourceError) as caught:
        plan.run()
    check_error(caught.value, array)
    assert names_in(tmp_path) == []


# Rejected conversions


@pytest.mark.parametrize("second_mode", KERAS_MODES)
def test_preprocessing_twice_is_rejected_by_the_manifest(tmp_path, second_mode):
    stored = preprocessed(tmp_path)
    before = tree(tmp_path)
    with pytest.raises(SourceError) as caught:
        plan_of(stored, tmp_path / "z.npy", mode=second_mode)
    check_error(caught.value, stored, "already preprocessed", "caffe")
    assert tree(tmp_path) == before


@pytest.mark.parametrize("mode", KERAS_MODES)
def test_preprocessing_twice_is_rejected_by_the_values(tmp_path, mode):
    stored = save_npy(tmp_path / "y.npy", network_inputs(pixels(67), mode))
    with pytest.raises(SourceError) as caught:
        plan_of(stored, tmp_path / "z.npy", mode=mode).run()
    check_error(caught.value, stored, "may be already preprocessed", "values from -")
    assert names_in(tmp_path) == ["y.npy"]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, -1.0, 255.5])
def test_floats_outside_the_image_range_are_not_preprocessed(tmp_path, value):
    batch = pixels(5).astype(np.float32)
    batch[2, 3, 4, 1] = value
    source = save_npy(tmp_path / "x.npy", batch)
    with pytest.raises(SourceError) as caught:
        plan_of(source, tmp_path / "y.npy", mode="caffe").run()
    check_error(caught.value, source, f"{value:g}".replace("-inf", "inf"))
    assert names_in(tmp_path) == ["x.npy"]


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize(("low", "factor"), [(0, "multiply by 255"), (-1, "(x + 1) * 127.5")])
def test_stored_floats_that_were_scaled_are_not_preprocessed(tmp_path, dtype, low, factor):
    scaled = np.linspace(low, 1, 5 * 4 * 6 * 3, dtype=dtype).reshape(5, 4, 6, 3)
    source = save_npy(tmp_path / "x.npy", scaled)
    with pytest.raises(SourceError) as caught:
        plan_of(source, tmp_path / "y.npy", mode="caffe").run()
    check_error(caught.value, source, f"from {low} to 1", factor, "check_values=False")
    assert names_in(tmp_path) == ["x.npy"]
    plan_of(source, tmp_path / "y.npy", mode="caffe", check_values=False).run()
    assert_same(np.load(tmp_path / "y.npy"), oracle.apply(Transform("caffe"), scaled))


@pytest.mark.parametrize("value", [np.nan, np.inf, -77.0])
def test_any_floats_are_preprocessed_and_verified_when_they_are_meant(tmp_path, value):
    batch = pixels(5).astype(np.float32)
    batch[2, 3, 4, 1] = value
    batch.view(np.uint32)[1, 2, 3] = [0x7F800001, 0xFF800001, 0xFFC12345]  # any kind of NaN
    source = save_npy(tmp_path / "x.npy", batch)
    plan_of(source, tmp_path / "y.npy", mode="identity", check_values=False).run()
    assert fastvgg.verify(tmp_path / "y.npy", full=True)
    stored = np.load(tmp_path / "y.npy").view(np.uint32)
    assert (stored[1, 2, 3] == 0x7FC00000).all()


def test_black_images_stored_as_floats_are_preprocessed(tmp_path):
    source = save_npy(tmp_path / "x.npy", np.zeros((5, 4, 6, 3), np.float32))
    plan_of(source, tmp_path / "y.npy", mode="caffe").run()


@pytest.mark.parametrize("values", [[0, 1], [1], [-1, 1], [-1, 0, 1]], ids=str)
def test_stored_whole_numbers_within_the_scaled_range_are_not_preprocessed(tmp_path, values):
    source = save_npy(tmp_path / "x.npy", np.resize(np.array(values, np.float32), (5, 4, 6, 3)))
    with pytest.raises(SourceError) as caught:
        plan_of(source, tmp_path / "y.npy", mode="caffe").run()
    check_error(caught.value, source, "to 1:", "check_values=False")
    assert names_in(tmp_path) == ["x.npy"]


def test_values_are_checked_in_place_too(tmp_path):
    source = save_npy(tmp_path / "x.npy", np.full((5, 4, 6, 3), 0.5, np.float32))
    before = source.read_bytes()
    with pytest.raises(SourceError, match="multiply by 255"):
        plan_of(source, None, in_place=True, mode="caffe").run()
    assert source.read_bytes() == before
    plan_of(source, None, in_place=True, mode="caffe", check_values=False).run()
    assert source.read_bytes() != before


def test_restoring_images_is_rejected_by_their_dtype(tmp_path, array):
    with pytest.raises(SourceError) as caught:
        plan_of(array, tmp_path / "z.npy", mode="caffe", direction="restore")
    check_error(caught.value, array, "uint8", "nothing to restore")


@pytest.mark.parametrize("mode", ["caffe", None])
def test_restoring_image_files_is_rejected_before_they_are_opened(tmp_path, photos, mode):
    save_images(photos, pixels(1, height=99), ["large.png"])
    with pytest.raises(SourceError) as caught:
        plan_of(photos, tmp_path / "z.npy", mode=mode, direction="restore")
    check_error(caught.value, photos, "contains images", "restore takes an array")


@pytest.mark.parametrize("name", ["float16", "float32", "float64"])
def test_restoring_images_stored_as_floats_is_rejected_by_their_values(tmp_path, name):
    source = save_npy(tmp_path / "x.npy", pixels(5).astype(name))
    with pytest.raises(SourceError) as caught:
        plan_of(source, tmp_path / "z.npy", mode="caffe", direction="restore").run()
    check_error(caught.value, source, "never preprocessed", "from 0 to 255")
    assert names_in(tmp_path) == ["x.npy"]


@pytest.mark.parametrize("kind", ["z.npy", "back", "float.npy"])
def test_restoring_twice_is_rejected(tmp_path, kind):
    stored = preprocessed(tmp_path)
    dtype = "float32" if kind == "float.npy" else None
    plan_of(stored, tmp_path / kind, direction="restore", dtype=dtype).run()
    with pytest.raises(SourceError) as caught:
        plan_of(tmp_path / kind, tmp_path / "again.npy", direction="restore")
    check_error(caught.value, tmp_path / kind, "already restored")


def test_mode_that_conflicts_with_the_manifest_is_rejected(tmp_path):
    stored = preprocessed(tmp_path)
    with pytest.raises(UsageError) as caught:
        plan_of(stored, tmp_path / "z.npy", mode="torch", direction="restore")
    check_error(caught.value, stored, "caffe", "torch")
    plan_of(stored, tmp_path / "z.npy", mode="caffe", direction="restore").run()


def test_layout_that_conflicts_with_the_manifest_is_rejected(tmp_path):
    stored = preprocessed(tmp_path, out_layout="NCHW")
    with pytest.raises(UsageError) as caught:
        plan_of(stored, tmp_path / "z.npy", layout="NHWC", direction="restore")
    check_error(caught.value, stored, "NCHW", "NHWC")


def test_mode_is_required_without_a_manifest(tmp_path):
    stored = preprocessed(tmp_path)
    manifest_path(stored).unlink()
    with pytest.raises(UsageError) as caught:
        plan_of(stored, tmp_path / "z.npy", direction="restore")
    check_error(caught.value, stored, "mode=", "no manifest")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"{}", b'{"fastvgg-manifest": 3}'])
def test_damaged_manifest_is_rejected_and_not_ignored(tmp_path, content):
    stored = preprocessed(tmp_path)
    manifest_path(stored).write_bytes(content)
    with pytest.raises(SourceError) as caught:
        plan_of(stored, tmp_path / "z.npy", mode="caffe", direction="restore")
    check_error(caught.value, manifest_path(stored))


def test_manifest_of_other_data_is_rejected(tmp_path):
    stored = preprocessed(tmp_path)
    save_npy(stored, network_inputs(pixels(5), "torch"))
    with pytest.raises(SourceError) as caught:
        plan_of(stored, tmp_path / "z.npy", direction="restore")
    check_error(caught.value, stored, "(5, 7, 9, 3)", "(11, 7, 9, 3)")


# Invalid target locations


def test_target_inside_the_source_is_rejected(tmp_path, photos):
    before = tree(tmp_path)
    for place in (photos, photos / "a"):
        with pytest.raises(TargetError) as caught:
            plan_of(photos, place / "y.npy", mode="caffe")
        check_error(caught.value, place / "y.npy", photos)
    assert tree(tmp_path) == before


def test_source_inside_the_target_is_rejected(tmp_path):
    (tmp_path / "back").mkdir()
    stored = preprocessed(tmp_path / "back")
    before = tree(tmp_path)
    for restart in (False, True):
        with pytest.raises(TargetError) as caught:
            plan_of(stored, tmp_path / "back", direction="restore", restart=restart)
        check_error(caught.value, tmp_path / "back")
    assert tree(tmp_path) == before


@pytest.mark.parametrize("kind", ["same", "dots", "link", "link to directory"])
def test_target_that_is_the_source_is_rejected(tmp_path, array, kind):
    target = array
    if kind == "dots":
        (tmp_path / "sub").mkdir()
        target = tmp_path / "sub" / ".." / "x.npy"
    elif kind == "link":
        target = tmp_path / "link.npy"
        target.symlink_to(array)
    elif kind == "link to directory":
        (tmp_path / "again").symlink_to(tmp_path)
        target = tmp_path / "again" / "x.npy"
    before = tree(tmp_path)
    for restart in (False, True) if kind != "link" else (False,):
        with pytest.raises(TargetError) as caught:
            plan_of(array, target, mode="caffe", restart=restart)
        check_error(caught.value, "is the source itself")
    assert tree(tmp_path) == before


def test_target_inside_the_source_through_a_link_is_rejected(tmp_path, photos):
    (tmp_path / "link").symlink_to(photos / "a")
    with pytest.raises(TargetError):
        plan_of(photos, tmp_path / "link" / "y.npy", mode="caffe")
    assert sorted(tree(tmp_path / "link")) == sorted(tree(photos / "a"))


WITHOUT_PRIVILEGES = """
import sys
from tests.helpers.datasets_on_disk import drop_permission_override, plan_of
from fastvgg.errors import FastvggError
drop_permission_override()
try:
    plan_of(sys.argv[1], sys.argv[2], mode="caffe")
except FastvggError as error:
    print(type(error).__name__, error)
"""


@pytest.mark.parametrize("direction", ["preprocess", "pack"])
def test_only_restore_writes_image_files(tmp_path, photos, direction):
    before, settings = tree(tmp_path), {"mode": "caffe"} if direction == "preprocess" else {}
    with pytest.raises(TargetError) as caught:
        plan_of(photos, tmp_path / "out", direction=direction, **settings)
    check_error(caught.value, tmp_path / "out", "only restore writes", ".npy")
    assert tree(tmp_path) == before


def test_read_only_target_directory_is_rejected(tmp_path, array):
    (tmp_path / "closed").mkdir()
    with permissions(tmp_path / "closed", 0o555):
        actual = stdout_of(WITHOUT_PRIVILEGES, array, tmp_path / "closed" / "y.npy")
    assert actual.startswith("TargetError ")
    assert f"{tmp_path / 'closed'} is not writable" in actual
    assert "permissions" in actual
    assert names_in(tmp_path / "closed") == []


@pytest.mark.parametrize("closed", ["source", "directory above", "manifest", "index"])
def test_unreadable_source_or_sidecar_is_rejected(tmp_path, closed):
    (tmp_path / "in").mkdir()
    source = save_npy(tmp_path / "in" / "x.npy", pixels(5))
    place = {
        "source": source,
        "directory above": tmp_path / "in",
        "manifest": manifest_path(source),
        "index": index_path(source),
    }[closed]
    if not place.exists():
        place.write_text("anything")
    with permissions(place, 0):
        actual = stdout_of(WITHOUT_PRIVILEGES, source, tmp_path / "z.npy")
    assert actual.startswith("SourceError ")
    assert str(place) in actual
    assert "Permission denied" in actual
