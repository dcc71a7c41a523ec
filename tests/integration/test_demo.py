"""The demo: real photographs, every byte back, and a picture that shows it."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras.applications import vgg19
from PIL import Image

import fastvgg
from fastvgg import demo
from fastvgg.datasets.index import read_index
from fastvgg.demo import demonstrate
from fastvgg.errors import TargetError
from tests.helpers.batches import assert_same
from tests.helpers.datasets_on_disk import PHOTOGRAPHS, images_in, must_say, tree

pytestmark = pytest.mark.pixels

SIDE = 224


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """A demo that was run once: its directory, what it said, what it showed."""
    directory = tmp_path_factory.mktemp("demo") / "new"
    said = []
    return directory, said, demonstrate(directory, said.append)


def test_every_byte_of_every_photograph_comes_back(shown):
    _, said, demonstration = shown
    assert demonstration.images == len(demo.PHOTOGRAPHS) >= 5
    assert demonstration.compared_bytes == demonstration.images * SIDE * SIDE * 3
    assert len(said) >= 4
    assert any("match the NumPy reference" in line for line in said)


def test_the_reported_files_exist(shown):
    directory, said, demonstration = shown
    assert demonstration.contact_sheet == directory / "contact-sheet.png"
    assert {path.name for path in directory.iterdir()} == {
        *("photos", "train.npy", "train.npy.fastvgg.json", "train.npy.index.csv", "restored"),
        *("restored.fastvgg.json", "restored.index.csv", "contact-sheet.png"),
    }
    for path in ("photos", "train.npy", "restored", "contact-sheet.png"):
        assert any(str(directory / path) in line for line in said)


def test_the_photographs_are_real_and_of_several_formats_and_sizes(shown):
    directory = shown[0] / "photos"
    found = []
    for path in directory.rglob("*.*"):
        with Image.open(path) as image:
            found.append((image.format, image.mode, image.size))
    formats, modes, sizes = (set(kinds) for kinds in zip(*found, strict=True))
    assert formats == {"JPEG", "PNG"}
    assert modes == {"RGB", "L"}
    assert len(sizes) > 3
    assert any(path.is_dir() for path in directory.iterdir())
    (rocket,) = directory.rglob("rocket.jpg")
    assert rocket.read_bytes() == (PHOTOGRAPHS / "rocket.jpg").read_bytes()


def test_the_network_input_is_what_keras_makes_of_the_photographs(shown):
    directory = shown[0]
    stored = np.load(directory / "train.npy")
    records = read_index(directory / "train.npy", len(stored))
    for row, record in zip(stored, records, strict=True):
        loaded = keras.utils.load_img(directory / "photos" / record.path, target_size=(SIDE, SIDE))
        expected = vgg19.preprocess_input(keras.utils.img_to_array(loaded))
        assert_same(row, np.ascontiguousarray(expected))


def test_the_restored_files_are_the_resized_photographs(shown):
    directory = shown[0]
    restored = images_in(directory / "restored")
    assert len(restored) == len(demo.PHOTOGRAPHS)
    for relative in demo.PHOTOGRAPHS.values():
        loaded = keras.utils.load_img(directory / "photos" / relative, target_size=(SIDE, SIDE))
        name = relative.rpartition(".")[0] + ".png"
        assert restored[name].tobytes() == np.asarray(loaded).tobytes()


def test_the_contact_sheet_shows_originals_inputs_restored_and_black_differences(shown):
    directory, _, demonstration = shown
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


def test_it_runs_a_second_time_in_its_own_directory(shown):
    directory, _, expected = shown
    before = (directory / "train.npy").read_bytes()
    actual = demonstrate(directory, lambda line: None)
    assert actual == expected
    assert (directory / "train.npy").read_bytes() == before
    fastvgg.verify(directory / "restored", full=True)


@pytest.mark.parametrize(
    "name", ["notes.txt", "photos-of-my-own", "train.npy.backup", "restored-by-hand.png", ".git"]
)
def test_a_directory_with_other_files_is_rejected_and_unchanged(tmp_path, name):
    (tmp_path / name).write_text("precious")
    before = tree(tmp_path)
    with pytest.raises(TargetError) as caught:
        demonstrate(tmp_path, lambda line: None)
    must_say(caught.value, tmp_path, name, "fastvgg demo")
    assert tree(tmp_path) == before


@pytest.mark.parametrize("name", ["photos/my own.jpg", "train.npy", "restored/a.png"])
def test_what_only_has_the_names_of_a_demo_is_rejected_and_unchanged(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("precious")
    before = tree(tmp_path)
    with pytest.raises(TargetError) as caught:
        demonstrate(tmp_path, lambda line: None)
    must_say(caught.value, tmp_path)
    assert tree(tmp_path) == before


def test_a_file_in_place_of_the_directory_is_rejected(tmp_path):
    (tmp_path / "file").write_text("precious")
    with pytest.raises(TargetError) as caught:
        demonstrate(tmp_path / "file", lambda line: None)
    must_say(caught.value, tmp_path / "file", "fastvgg demo")
    assert (tmp_path / "file").read_text() == "precious"
