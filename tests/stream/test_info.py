"""Descriptions of anything: no option is needed, nothing is refused, and the time is bounded."""

from __future__ import annotations

import json

import h5py
import numpy as np
import pytest
import zarr
from PIL import Image
from typer.testing import CliRunner

import fastvgg
from fastvgg import cli
from fastvgg.datasets.index import index_path
from fastvgg.errors import SourceError
from fastvgg.stream import describe
from fastvgg.stream.manifest import manifest_path
from tests.helpers.datasets_on_disk import (
    check_error,
    network_inputs,
    pixels,
    plan_of,
    save_images,
    save_npy,
    tree,
)
from tests.helpers.runs import interrupt_run
from tests.helpers.tar_on_disk import png, save_tar


@pytest.fixture
def photos(tmp_path):
    """A folder of images of two sizes, with labels, a link and files that are no images."""
    folder = save_images(tmp_path / "photos", pixels(8))
    Image.new("RGB", (40, 20)).save(folder / "a" / "wide.JPG")
    (folder / "a" / "torn.png").write_bytes(b"not an image")
    (folder / "labels.csv").write_text("a,b")
    elsewhere = save_images(tmp_path / "elsewhere", pixels(3), ["0.png", "1.png", "2.png"])
    (folder / "c").symlink_to(elsewhere)
    return folder


def finished_dataset(tmp_path, target):
    """Write a dataset of eight images."""
    is_restored = target.suffix == ""
    batch = network_inputs(pixels(8), "caffe") if is_restored else pixels(8)
    direction = "restore" if is_restored else "preprocess"
    plan_of(save_npy(tmp_path / "x.npy", batch), target, mode="caffe", direction=direction).run()


def test_folder_of_images_of_any_size_is_described_without_options(photos):
    found = fastvgg.info(photos)
    assert (found["state"], found["kind"], found["images"]) == ("source", "images", 13)
    assert found["formats"] == {".png": 12, ".jpg": 1}
    assert found["labels"] == 3
    assert found["images_by_label"] == {"a": 6, "b": 4, "c": 3}
    assert found["sizes"] == {
        "distinct": 2,
        "most common": "7 x 9",
        "smallest": "7 x 9",
        "largest": "20 x 40",
    }
    assert (found["unreadable"], found["unreadable_first"]) == (1, "a/torn.png")
    assert found["linked_folders"] == 1
    assert any(".csv" in note for note in found["notes"])
    assert found["bytes"] > 0
    json.dumps(found)


def test_only_a_sample_of_headers_is_read(photos, monkeypatch):
    monkeypatch.setattr(describe, "SAMPLED_HEADERS", 4)
    found = fastvgg.info(photos)
    assert (found["images"], found["sampled_headers"]) == (13, 4)


def test_ten_most_frequent_labels_are_shown(tmp_path):
    names = [f"{label:02d}/{row}.png" for label in range(15) for row in range(1 + (label == 14))]
    found = fastvgg.info(save_images(tmp_path / "photos", pixels(16), names))
    assert found["labels"] == 15
    assert list(found["images_by_label"].items())[:2] == [("14", 2), ("00", 1)]
    assert len(found["images_by_label"]) == 10


def test_empty_folder_is_described(tmp_path):
    (tmp_path / "empty").mkdir()
    assert fastvgg.info(tmp_path / "empty")["images"] == 0


def test_tar_of_images_of_several_sizes_is_described(tmp_path):
    entries = [("cat/a.png", png(pixels(1)[0])), ("dog/b.png", png(pixels(1, 11, 13)[0]))]
    found = fastvgg.info(save_tar(tmp_path / "x.tar", entries))
    assert (found["kind"], found["images"], found["labels"]) == ("tar", 2, 2)
    assert found["sizes"]["distinct"] == 2


def test_hdf5_file_without_a_name_lists_its_datasets(tmp_path):
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["a/images"] = pixels(4)
        file["labels"] = np.arange(4)
        layout = h5py.VirtualLayout((4,), "i8")
        layout[:] = h5py.VirtualSource("other.h5", "x", (4,))
        file.create_virtual_dataset("virtual", layout)
    found = fastvgg.info(tmp_path / "x.h5")
    assert found["datasets"] == [
        {"name": "/a/images", "shape": [4, 7, 9, 3], "dtype": "uint8", "images": True},
        {"name": "/labels", "shape": [4], "dtype": "int64", "images": False},
        {"name": "/virtual", "virtual": True, "images": False},
    ]
    assert found["next"].endswith("x.h5::/a/images")
    assert fastvgg.info(f"{tmp_path}/x.h5::/a/images")["shape"] == [4, 7, 9, 3]


def test_arrays_are_described(tmp_path):
    save_npy(tmp_path / "x.npy", pixels(4))
    assert fastvgg.info(tmp_path / "x.npy")["shape"] == [4, 7, 9, 3]
    (tmp_path / "parts").mkdir()
    for number in range(2):
        save_npy(tmp_path / "parts" / f"part-{number}.npy", pixels(4))
    found = fastvgg.info(tmp_path / "parts")
    assert (found["kind"], found["shape"], found["notes"]) == ("parts", [8, 7, 9, 3], ["2 parts"])
    array = zarr.create_array(tmp_path / "x.zarr", shape=(4, 7, 9, 3), dtype="u1")
    array[:] = pixels(4)
    assert fastvgg.info(tmp_path / "x.zarr")["kind"] == "zarr"


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("notes.txt", b"hello, world", "text"),
        ("empty", b"", "not a directory of images"),
        ("x.npz", b"PK\x03\x04" + bytes(26), "zip"),
        ("torn.npy", b"\x93NUMPY", "torn.npy"),
        ("torn.h5", b"\x89HDF\r\n\x1a\n" + bytes(100), "torn.h5"),
    ],
)
def test_file_that_is_no_dataset_is_described(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    found = fastvgg.info(tmp_path / name)
    assert found["state"] == "not a dataset"
    assert words in found["reason"]
    assert found["next"]


def test_array_of_another_rank_group_and_damaged_manifest_are_described(tmp_path):
    np.save(tmp_path / "v.npy", np.zeros((5, 7)))
    assert "rank 2" in fastvgg.info(tmp_path / "v.npy")["reason"]
    zarr.open_group(tmp_path / "g.zarr", mode="w")["a"] = pixels(2)
    assert "its arrays are: a" in fastvgg.info(tmp_path / "g.zarr")["reason"]
    save_npy(tmp_path / "x.npy", pixels(4))
    (tmp_path / "x.npy.fastvgg.json").write_text("{")
    assert "is not a manifest" in fastvgg.info(tmp_path / "x.npy")["reason"]


def test_finished_dataset_shows_failed_images_and_labels(photos, tmp_path):
    plan_of(photos, tmp_path / "y.npy", mode="caffe", size=(7, 9)).run()
    found = fastvgg.info(tmp_path / "y.npy")
    assert (found["state"], found["images"], found["failed"]) == ("finished", 13, 1)
    assert found["images_by_label"] == {"a": 6, "b": 4, "c": 3}


@pytest.mark.parametrize("name", ["y.npy", "out", "y.zarr", "y.h5::/x"])
def test_manifest_of_a_missing_dataset_is_no_dataset(tmp_path, name):
    target, container = tmp_path / name, tmp_path / name.partition("::")[0]
    finished_dataset(tmp_path, target)
    container.rename(tmp_path / "moved")
    with pytest.raises(SourceError) as caught:
        fastvgg.info(target)
    check_error(caught.value, container, "does not exist", manifest_path(container))


def write_text(path):
    path.write_text("no array")


def append(path):
    with path.open("ab") as file:
        file.write(b"more")


def save_another(path):
    path.unlink()
    save_npy(path, pixels(3))


def make_directory(path):
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (write_text, "not a .npy file"),
        (append, "followed by other bytes"),
        (save_another, "(3, 7, 9, 3) of uint8"),
        (make_directory, "directory"),
    ],
)
def test_dataset_that_is_not_what_its_manifest_says_has_changed(tmp_path, change, words):
    target = tmp_path / "y.npy"
    finished_dataset(tmp_path, target)
    assert fastvgg.info(target)["state"] == "finished"
    change(target)
    found = fastvgg.info(target)
    assert found["state"] == "changed"
    assert words in " ".join(found["differences"])
    assert "verify" in found["next"]


def test_removed_index_is_a_difference(photos, tmp_path):
    target = tmp_path / "y.npy"
    plan_of(photos, target, mode="caffe", size=(7, 9)).run()
    index_path(target).unlink()
    found = fastvgg.info(target)
    assert found["state"] == "changed"
    assert "index" in found["differences"][0]


def test_line_feeds_of_names_forge_no_line(tmp_path):
    folder = save_images(tmp_path / "a\nstate forged", pixels(1), ["b\nstate forged/0.png"])
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["c\nstate forged"] = pixels(2)
    for path in (folder, tmp_path / "x.h5"):
        shown = CliRunner().invoke(cli.app, ["info", str(path)]).stdout
        assert "\\nstate forged" in shown
        assert [line for line in shown.splitlines() if line.startswith("state")] == [
            "state            source"
        ]


def test_unfinished_dataset_shows_its_progress(tmp_path):
    source = save_npy(tmp_path / "x.npy", pixels(5))
    target = interrupt_run(source, tmp_path / "y.npy", mode="caffe")
    found = fastvgg.info(target)
    assert (found["state"], found["committed_chunks"], found["chunks"]) == ("unfinished", 1, 3)


def test_missing_path_is_an_error(tmp_path):
    with pytest.raises(SourceError) as caught:
        fastvgg.info(tmp_path / "nothing")
    check_error(caught.value, tmp_path / "nothing", "does not exist")


def test_info_writes_nothing(photos, tmp_path):
    before = tree(tmp_path)
    fastvgg.info(photos)
    assert tree(tmp_path) == before


def test_command_line_prints_one_screen(photos):
    result = CliRunner().invoke(cli.app, ["info", str(photos)])
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    assert len(lines) < 25
    assert "images_by_label  a 6" in lines
    assert "                 b 4" in lines
