"""The demo: real photographs, an exact round trip, and a contact sheet."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras.applications import vgg19
from PIL import Image

import fastvgg
from fastvgg import demo
from fastvgg.datasets.index import read_index
from fastvgg.demo import run_demo
from fastvgg.errors import TargetError
from tests.helpers.batches import assert_same
from tests.helpers.datasets_on_disk import PHOTOGRAPHS, check_error, images_in, tree

pytestmark = pytest.mark.pixels

SIDE = 224


@pytest.fixture(scope="module")
def demo_run(tmp_path_factory):
    """Run the demo once; return its directory, its messages and its result."""
    directory = tmp_path_factory.mktemp("demo") / "new"
    messages = []
    return directory, messages, run_demo(directory, messages.append)


def test_every_byte_of_every_photograph_is_restored(demo_run):
    _, messages, demonstration = demo_run
    assert demonstration.images == len(demo.PHOTOGRAPHS) >= 5
    assert demonstration.compared_bytes == demonstration.images * SIDE * SIDE * 3
    assert len(messages) >= 4
    assert any("matched the NumPy reference" in line for line in messages)


def test_reported_files_exist(demo_run):
    directory, messages, demonstration = demo_run
    assert demonstration.contact_sheet == directory / "contact-sheet.png"
    assert {path.name for path in directory.iterdir()} == {
        *("photos", "train.npy", "train.npy.fastvgg.json", "train.npy.index.csv", "restored"),
        *("restored.fastvgg.json", "restored.index.csv", "contact-sheet.png"),
    }
    for path in ("photos", "train.npy", "restored", "contact-sheet.png"):
        assert any(str(directory / path) in line for line in messages)


def test_photographs_are_real_and_vary_in_format_and_size(demo_run):
    directory = demo_run[0] / "photos"
    found = []
    for path in directory.rglob("*.*"):
        with Image.open(path) as image:
            found.append((image.format, image.mode, image.size))
    formats, modes, sizes = (set(kinds) for kinds in zip(*found, strict=True))
    assert formats == {"JPEG", "PNG"}
    assert modes == {"RGB", "L"}
    assert len(sizes) > 3
    assert all(path.is_dir() for path in directory.iterdir())  # the classes
    (rocket,) = directory.rglob("rocket.jpg")
    assert rocket.read_bytes() == (PHOTOGRAPHS / "rocket.jpg").read_bytes()


def test_network_input_matches_keras(demo_run):
    directory = demo_run[0]
    stored = np.load(directory / "train.npy")
    records = read_index(directory / "train.npy", len(stored))
    for row, record in zip(stored, records, strict=True):
        loaded = keras.utils.load_img(directory / "photos" / record.path, target_size=(SIDE, SIDE))
        expected = vgg19.preprocess_input(keras.utils.img_to_array(loaded))
        assert_same(row, np.ascontiguousarray(expected))


def test_restored_files_match_the_resized_photographs(demo_run):
    directory = demo_run[0]
    restored = images_in(directory / "restored")
    assert len(restored) == len(demo.PHOTOGRAPHS)
    for relative in demo.PHOTOGRAPHS.values():
        loaded = keras.utils.load_img(directory / "photos" / relative, target_size=(SIDE, SIDE))
        name = relative.rpartition(".")[0] + ".png"
        assert restored[name].tobytes() == np.asarray(loaded).tobytes()


def test_contact_sheet_shows_original_input_restored_and_zero_difference(demo_run):
    directory, _, demonstration = demo_run
    sheet = np.asarray(Image.open(demonstration.contact_sheet))
    rows, margin, caption = demonstration.images, demo.MARGIN, demo.CAPTION_HEIGHT
    cell_width, cell_height = SIDE + margin, SIDE + margin + caption
    columns = len(demo.COLUMNS)
    assert sheet.shape == (margin + rows * cell_height, margin + columns * cell_width, 3)

    records = read_index(directory / "train.npy", rows)
    restored = images_in(directory / "restored")
    for row, record in enumerate(records):
        top = margin + row * cell_height + caption
        cells = [
            sheet[top : top + SIDE, left : left + SIDE]
            for left in (margin + column * cell_width for column in range(columns))
        ]
        expected = restored[record.path.rpartition(".")[0] + ".png"]
        original, network_input, back, difference = cells
        assert original.tobytes() == back.tobytes() == expected.tobytes()
        assert not difference.any()
        assert network_input.std() > 10
        captions = sheet[top - caption : top, : cell_width * columns]
        assert (captions < 128).any()


def test_demo_can_be_rerun_in_its_own_directory(demo_run):
    directory, _, expected = demo_run
    before = (directory / "train.npy").read_bytes()
    actual = run_demo(directory, lambda line: None)
    assert actual == expected
    assert (directory / "train.npy").read_bytes() == before
    fastvgg.verify(directory / "restored", full=True)


@pytest.mark.parametrize(
    "name", ["notes.txt", "photos-of-my-own", "train.npy.backup", "restored-by-hand.png", ".git"]
)
def test_directory_with_other_files_is_rejected_and_unchanged(tmp_path, name):
    (tmp_path / name).write_text("precious")
    before = tree(tmp_path)
    with pytest.raises(TargetError) as caught:
        run_demo(tmp_path, lambda line: None)
    check_error(caught.value, tmp_path, name, "new directory")
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    "name",
    [
        *("photos/my own.jpg", "photos/cat/chelsea.png", "contact-sheet.png"),
        *("train.npy", "restored/a.png"),
    ],
)
def test_foreign_files_with_demo_names_are_rejected_and_unchanged(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
    (tmp_path / name).write_text("precious")
    before = tree(tmp_path)
    with pytest.raises(TargetError) as caught:
        run_demo(tmp_path, lambda line: None)
    check_error(caught.value, tmp_path)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("name", ["photos", "photos/cat", "photos/cat/chelsea.png", "restored"])
def test_links_to_other_places_are_rejected_and_unchanged(tmp_path, name):
    (tmp_path / "mine").mkdir()
    (tmp_path / "demo" / name).parent.mkdir(parents=True)
    (tmp_path / "demo" / name).symlink_to(tmp_path / "mine")
    before = tree(tmp_path)
    with pytest.raises(TargetError) as caught:
        run_demo(tmp_path / "demo", lambda line: None)
    check_error(caught.value, tmp_path / "demo", "new directory")
    assert tree(tmp_path) == before


def test_file_at_the_directory_path_is_rejected(tmp_path):
    (tmp_path / "file").write_text("precious")
    with pytest.raises(TargetError) as caught:
        run_demo(tmp_path / "file", lambda line: None)
    check_error(caught.value, tmp_path / "file", "new directory")
    assert (tmp_path / "file").read_text() == "precious"
