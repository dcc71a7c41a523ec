"""Runs on file systems other than that of the tests: what they name, rename and refuse."""

from __future__ import annotations

import numpy as np
import pytest

import fastvgg
from fastvgg.datasets.index import index_path
from fastvgg.errors import TargetError
from fastvgg.storage.file_systems import file_system_type
from tests.campaigns import file_systems
from tests.helpers.datasets_on_disk import (
    check_error,
    images_in,
    names_in,
    pixels,
    plan_of,
    save_images,
    tree,
)
from tests.helpers.file_systems import FileSystemUnavailable, mounted
from tests.helpers.runs import interrupt_run


@pytest.fixture
def disk(request, tmp_path):
    """A disk with the file system that the test names."""
    (tmp_path / "disk").mkdir()
    try:
        with mounted(request.param, tmp_path / "disk") as root:
            yield root
    except FileSystemUnavailable as reason:
        pytest.skip(f"{request.param}: {reason}")


def on(*names):
    return pytest.mark.parametrize("disk", names, indirect=True)


@on("btrfs", "overlay", "tmpfs")
def test_type_of_a_mounted_file_system_is_known(request, disk):
    name = request.node.callspec.params["disk"]
    (disk / "a b").mkdir()
    (disk / "a b" / "link").symlink_to("/proc")
    assert [file_system_type(path) for path in (disk, disk / "a b")] == [name] * 2
    assert file_system_type(disk / "a b" / "link" / "self") == "proc"


def stored_with_names(tmp_path, names):
    """Preprocess images of these names; return the array, whose index has them."""
    photos = save_images(tmp_path / "photos", pixels(len(names)), names)
    plan_of(photos, tmp_path / "y.npy", mode="caffe").run()
    return tmp_path / "y.npy"


ALIKE = [
    *(["A.png", "a.png"], ["cat/a.png", "Cat/A.png"]),
    *(["\u00e9.png", "\u00c9.png", "x.png"], ["o.png", "A.png", "a.png"]),
    *(["a.jpg", "b.png", "c/x.png", "A.png/x.png"], ["Cat.png/d/x.png", "b.png", "cat.png"]),
]


@on("ntfs", "exfat")
@pytest.mark.parametrize("names", ALIKE, ids="|".join)
def test_names_that_a_disk_does_not_distinguish_are_refused_and_none_is_lost(tmp_path, disk, names):
    stored = stored_with_names(tmp_path, names)
    with pytest.raises(TargetError) as caught:
        plan_of(stored, disk / "out", direction="restore").run()
    check_error(caught.value, disk / "out", "does not distinguish", "index")
    assert names_in(disk) == []
    index_path(stored).rename(tmp_path / "moved")  # as the message advises
    plan_of(stored, disk / "out", direction="restore").run()
    assert names_in(disk / "out") == [f"{row:08d}.png" for row in range(len(names))]
    fastvgg.verify(disk / "out")


@on("ntfs", "exfat")
def test_names_that_a_disk_distinguishes_are_kept(tmp_path, disk):
    names = [
        "a.png",
        "b/a.png",
        "cafe\u0301.png",
        "caf\u00e9.png",
        "stra\u00dfe.png",
        "strasse.png",
    ]
    stored = stored_with_names(tmp_path, names)
    plan_of(stored, disk / "out", direction="restore", images_per_chunk=2).run()
    found = images_in(disk / "out")
    assert sorted(found) == sorted(names)
    for name, image in zip(names, pixels(6), strict=True):
        assert np.array_equal(found[name], image)


@on("ntfs")
def test_unfinished_restore_resumes_where_case_is_ignored(tmp_path, disk):
    stored = stored_with_names(tmp_path, [f"{'aB'[row % 2]}/{row}.png" for row in range(7)])
    target = interrupt_run(stored, disk / "out", direction="restore")
    assert plan_of(stored, target, direction="restore").run().counts["images"] == 7
    assert len(images_in(target)) == 7
    fastvgg.verify(target)


@pytest.mark.parametrize("name", ["overlay", "fuse-overlayfs"])
def test_directory_in_a_lower_layer_is_replaced_or_refused_at_the_start(tmp_path, name):
    stored, disk = stored_with_names(tmp_path, ["a.png", "b.png"]), tmp_path / "disk"
    (disk / "lower").mkdir(parents=True)
    plan_of(stored, disk / "lower" / "out", direction="restore").run()
    try:
        with mounted(name, disk) as root:
            before = tree(root)
            plan = plan_of(stored, root / "out", direction="restore", format="webp", restart=True)
            try:
                plan.run()
            except TargetError as error:
                check_error(error, root / "out", "cannot be replaced", "move it away")
                assert tree(root) == before
            else:
                assert names_in(root / "out") == ["a.webp", "b.webp"]
            fastvgg.verify(root / "out")
    except FileSystemUnavailable as reason:
        pytest.skip(f"{name}: {reason}")


# The short form of a campaign


@pytest.mark.parametrize("name", ["overlay", "ntfs"])
def test_killed_processes_lose_nothing(name):
    counts = file_systems.campaign(seed=5, size=10, names=[name])
    if len(counts) == 1:
        pytest.skip(f"{name} is not available here")
    assert counts[f"kills on {name}"] >= 5
