"""Directories of images: the pixels that Keras loads, and a reason for every failed row."""

from __future__ import annotations

import os
import socket
import tracemalloc
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import keras
import numpy as np
import pytest
from PIL import Image

from fastvgg.datasets.files import read_regular
from fastvgg.datasets.folders import FolderImageListing, ImageFolder
from fastvgg.datasets.image_names import is_image_name
from fastvgg.datasets.open import open_source
from fastvgg.errors import SourceError, StoppedError
from fastvgg.imaging.decode import DecodeOptions, Decoder
from fastvgg.storage.location import Location
from tests.helpers.datasets_on_disk import (
    PHOTOGRAPHS,
    ascii_failures,
    check_error,
    permissions,
    pixels,
    save_images,
    stdout_of,
    tree,
)
from tests.helpers.faults import overwrite_while_read
from tests.helpers.formats import CHANGES

SIZE = (37, 53)
MEMORY_BYTES = 2**28


def open_folder(path, *, threads=1, listing=None, **settings):
    decoding = DecodeOptions(**settings)
    decoder = Decoder(decoding, memory_bytes=MEMORY_BYTES, threads=threads)
    return ImageFolder(path, decoding, decoder, threads=threads, listing=listing)


def read_folder(path, **settings):
    with closing(open_folder(path, **settings)) as source:
        return source.read(0, source.header.images)


def decode_in_threads(source, threads):
    """Decode every image of a source in a pool of threads."""
    batch = np.full(source.header.shape, 77, np.uint8)
    with ThreadPoolExecutor(threads) as pool:
        records = list(pool.map(lambda row: source.decode(row, batch[row]), range(len(batch))))
    return batch, records


def load_with_keras(path, size=None, interpolation="nearest"):
    image = keras.utils.load_img(path, target_size=size, interpolation=interpolation)
    return keras.utils.img_to_array(image).astype(np.uint8)


def load_photograph():
    with Image.open(PHOTOGRAPHS / "chelsea.png") as image:
        return image.convert("RGB").resize((61, 47))


def save_as(path, kind, image=None, **options):
    (image or load_photograph()).save(path, kind, **options)
    return path


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "photos").mkdir()
    return tmp_path / "photos"


@pytest.mark.parametrize("size", [None, SIZE], ids=["original size", "resized"])
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *(("a.jpg", "jpeg"), ("a.jpeg", "jpeg"), ("a.JPG", "jpeg"), ("a.png", "png")),
        *(("a.webp", "webp"), ("a.bmp", "bmp"), ("a.gif", "gif"), ("a.tif", "tiff")),
        *(("a.tiff", "tiff"), ("a.tIFF", "tiff"), ("png content.jpg", "png"), ("b.webp", "jpeg")),
        *(("a.avif", "avif"), ("avif content.jpg", "avif"), ("a.ppm", "ppm"), ("b.jfif", "jpeg")),
        *(("a.jp2", "jpeg2000"), ("jp2 content.png", "jpeg2000"), ("ppm content.bmp", "ppm")),
    ],
)
def test_images_of_every_format_match_keras(folder, name, kind, size):
    path = save_as(folder / name, kind)
    expected = load_with_keras(path, size)
    batch, (record,) = read_folder(folder, size=size)
    assert record == (name, "", 61, 47, False, "")
    assert batch.dtype == np.uint8
    assert batch.shape == (1, *expected.shape)
    assert batch[0].tobytes() == expected.tobytes()


def test_photographs_of_different_sizes_are_resized_in_path_order(folder):
    names = ["rocket.jpg", "camera.png", "coffee.png", "astronaut.png", "retina.jpg"]
    for number, name in enumerate(names):
        directory = folder / f"class {number % 2}"
        directory.mkdir(exist_ok=True)
        (directory / name).write_bytes((PHOTOGRAPHS / name).read_bytes())
    batch, records = read_folder(folder, size=SIZE, threads=2)
    actual = [(record.path, record.label) for record in records]
    assert actual == [
        ("class 0/coffee.png", "class 0"),
        ("class 0/retina.jpg", "class 0"),
        ("class 0/rocket.jpg", "class 0"),
        ("class 1/astronaut.png", "class 1"),
        ("class 1/camera.png", "class 1"),
    ]
    for image, record in zip(batch, records, strict=True):
        assert image.tobytes() == load_with_keras(folder / record.path, SIZE).tobytes()
        with Image.open(folder / record.path) as original:
            assert (record.width, record.height) == original.size


@ascii_failures()
def test_images_are_sorted_by_path_bytes(folder):
    names = [
        *("a.png", "a/b.png", "a-b.png", "a b.png", "ab.png", "B.png", "z/a.png", "z.png"),
        *("10.png", "9.png", "é.png", "e\u0301.png", "z/é/q.png", "\uff5e.png", "\U0001f600.png"),
        *("x.jpg/a.png", "x.jpg/-/b.png", "x.jpg0/a.png", "x.jpg-/a.png", "x.jpg.png", "x/a.png"),
    ]
    for row, name in enumerate(names):
        save_images(folder, pixels(1, seed=row), [name])
    # Not UTF-8: as text it sorts before U+FF5E, as bytes after it.
    stray = os.fsencode(folder) + b"/\xff.png"
    with open(stray, "wb") as file:  # noqa: PTH123  # the name is not text
        Image.fromarray(pixels(1, seed=77)[0]).save(file, "png")
    expected = sorted([os.fsencode(name) for name in names] + [b"\xff.png"])
    batch, records = read_folder(folder)
    assert [os.fsencode(record.path) for record in records] == expected
    assert expected.index(b"\xff.png") > expected.index("\uff5e.png".encode())
    for image, name in zip(batch, expected, strict=True):
        seed = 77 if name == b"\xff.png" else names.index(os.fsdecode(name))
        assert image.tobytes() == pixels(1, seed=seed)[0].tobytes()


def test_label_is_the_folder_of_the_image(folder):
    save_images(folder, pixels(4), ["top.png", "train/cat/a.png", "train/b.png", "dog.x/c.png"])
    actual = [(record.path, record.label) for record in read_folder(folder).records]
    assert actual == [
        ("dog.x/c.png", "dog.x"),
        ("top.png", ""),
        ("train/b.png", "train"),
        ("train/cat/a.png", "train/cat"),
    ]


def test_settings_are_the_decode_options(folder):
    save_images(folder, pixels(2), ["a.png", "cat/b.png"])
    given = {"interpolation": "bicubic", "fast_jpeg": True, "scale_to_uint8": True}
    with closing(open_folder(folder, size=SIZE, **given)) as source:
        assert source.kind == "images"
        stored = (folder / "a.png").stat().st_size + (folder / "cat" / "b.png").stat().st_size
        assert source.stored_bytes == stored
        assert source.settings == DecodeOptions(size=SIZE, **given).to_dict()
        assert source.settings["fast_jpeg"] is True
        assert len(source.records) == 0


def test_size_is_height_then_width(folder):
    save_images(folder, pixels(1, height=40, width=20), ["a.png"])
    assert read_folder(folder, size=(11, 23)).batch.shape == (1, 11, 23, 3)


def test_size_is_optional_if_all_images_have_one_size(folder):
    expected = pixels(200, height=11, width=23)
    save_images(folder, expected, [f"{row:03d}.png" for row in range(200)])
    for threads in (1, 3):
        assert read_folder(folder, threads=threads).batch.tobytes() == expected.tobytes()


def test_exif_rotation_precedes_the_size_check(folder):
    exif = Image.Exif()
    exif[0x0112] = 6
    save_as(folder / "a.jpg", "jpeg")
    save_as(folder / "b.jpg", "jpeg", load_photograph().rotate(90, expand=True), exif=exif)
    batch, records = read_folder(folder, exif=True)
    assert batch.shape == (2, 47, 61, 3)
    assert [(record.width, record.height) for record in records] == [(61, 47), (47, 61)]
    with pytest.raises(SourceError, match="2 sizes"):
        open_folder(folder)


@pytest.mark.parametrize("threads", [1, 3])
def test_different_image_sizes_are_rejected_with_the_sizes(folder, threads):
    save_images(folder, pixels(150, height=11, width=23), [f"a{row:03d}.png" for row in range(150)])
    save_images(folder, pixels(2, height=13, width=29), [f"b{row}.png" for row in range(2)])
    with pytest.raises(SourceError) as caught:
        open_folder(folder, threads=threads)
    check_error(
        caught.value, folder, "2 sizes", "11x23 (150, e.g. a000.png)", "13x29 (2, e.g. b0.png)"
    )
    assert "size=(224, 224)" in caught.value.remedy


def test_most_common_sizes_are_listed_first(folder):
    for height in range(1, 10):
        count = 2 if height == 9 else 1
        for row in range(count):
            save_images(folder, pixels(1, height=height, width=5), [f"{height}-{row}.png"])
    with pytest.raises(SourceError) as caught:
        open_folder(folder)
    check_error(caught.value, "9 sizes", "9x5 (2, e.g. 9-0.png)", "and 4 more")


@pytest.mark.parametrize("kind", ["empty", "text only", "broken only", "empty files only"])
def test_folder_without_readable_images_is_rejected(folder, kind):
    words = ["contains no images: no files"]
    if kind == "text only":
        (folder / "labels.csv").write_text("a.jpg,cat\n")
        (folder / "notes").mkdir()
        (folder / "notes" / "README").write_text("about these")
        words = ["contains no images: skipped files without an image suffix: 2"]
    elif kind == "broken only":
        (folder / "a.jpg").write_text("not an image")
        (folder / "b.png").write_text("not an image either")
        words = ["no image in", "the first is a.jpg", "not an image"]
    elif kind == "empty files only":
        (folder / "a.jpg").touch()
        words = ["no image in", "a.jpg"]
    before = tree(folder)
    with pytest.raises(SourceError) as caught:
        open_folder(folder)
    check_error(caught.value, folder, *words)
    assert tree(folder) == before


def test_folder_of_broken_images_is_read_if_a_size_is_given(folder):
    (folder / "a.jpg").write_text("not an image")
    batch, (record,) = read_folder(folder, size=SIZE)
    assert not batch.any()
    assert record.failed


SKIPPED = {
    "files without an image suffix: 7 (2 .txt, 1 .csv, 1 .heic, ...)": (
        *("labels.csv", "b.txt", "cat/png", "c.png~", "d.jpg.txt", "cat/e.json", "f.HEIC"),
    ),
    "hidden files and folders: 4": (".jpg", ".hidden.png", ".git/a.png", "cat/.cache/b.png"),
    "macOS resource files: 4": ("._a.png", "cat/._a.png", "__MACOSX/cat/._a.png", ".DS_Store"),
    "sockets, pipes and devices: 1": ("pipe",),
    "system folders: 2": ("$RECYCLE.BIN/a.png", "lost+found/b.png"),
    "thumbnails: 4": ("Thumbs.db", "@eaDir/a.png/x.png", ".thumbnails/a.png", "cat/thumbs.DB"),
}


def test_skipped_files_are_counted_by_kind_in_the_notes(folder):
    save_images(folder, pixels(1), ["cat/a.png"])
    for name in (name for names in SKIPPED.values() for name in names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        os.mkfifo(path) if name == "pipe" else path.write_bytes(b"")
    with closing(open_folder(folder)) as source:
        assert [source.listing.name(row) for row in range(source.header.images)] == [b"cat/a.png"]
        assert source.notes == [f"skipped {note}" for note in SKIPPED]


def test_folder_whose_own_name_is_hidden_is_read(tmp_path):
    save_images(tmp_path / ".cache" / "photos", pixels(2), ["a.png", "b.png"])
    assert len(read_folder(tmp_path / ".cache").records) == 2


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        *((b"a.jpg", True), (b"a.JpEg", True), (b"x/.a.png", True), (b"x.y/a.b.webp", True)),
        *((b"\xff.tif", True), (b" .bmp", True), (b"..gif", True), (b"a.tiff", True)),
        *((b".jpg", False), (b"x/.jpg", False), (b"jpg", False), (b"x.jpg/a", False)),
        *((b"a.jpg.txt", False), (b"a.jp", False), (b"a.", False), (b"", False), (b"a.svg", False)),
        *((b"a.jpg\n", False), (b"a.jpg ", False), (b"a.heic", False), (b"a.\xe9", False)),
    ],
)
def test_images_are_recognized_by_suffix(name, expected):
    assert is_image_name(name) is expected


def add_unreadable_entries(folder):
    """Add one unreadable entry of every kind to a folder; return their names.

    Except a pipe: opening one may block forever, which needs a separate process to test.
    """
    jpeg = save_as(folder / "x.jpg", "jpeg").read_bytes()
    png = save_as(folder / "x.png", "png").read_bytes()
    (folder / "x.jpg").unlink()
    (folder / "x.png").unlink()
    broken = {
        "jpeg cut in half.jpg": jpeg[: len(jpeg) // 2],
        "jpeg header.jpg": jpeg[:20],
        "png cut in half.png": png[: len(png) // 2],
        "png header.png": png[:30],
        "png with a bad sum.png": png[:60] + bytes([png[60] ^ 255]) + png[61:],
        "text.jpg": b"this is not an image",
        "empty.jpg": b"",
        "one byte.png": b"\x89",
    }
    for name, content in broken.items():
        (folder / name).write_bytes(content)
    (folder / "dangling.png").symlink_to("nowhere.png")
    (folder / "circle.png").symlink_to("circle.png")
    (folder / "device.png").symlink_to("/dev/zero")
    # The address of a socket must be short; its file keeps the name.
    here = os.open(folder, os.O_RDONLY)
    try:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(f"/proc/self/fd/{here}/socket.jpg")
    finally:
        os.close(here)
    return sorted([*broken, "dangling.png", "circle.png", "device.png", "socket.jpg"])


@pytest.mark.parametrize("size", [None, SIZE], ids=["original size", "resized"])
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_unreadable_image_is_a_row_of_zeros_with_a_reason(folder, size, threads):
    # The size that the broken images claim: a header can be intact where the data is not.
    good = [f"{row} good.png" for row in range(5)]
    save_images(folder, pixels(5, height=47, width=61), good)
    bad = add_unreadable_entries(folder)
    with closing(open_folder(folder, size=size, threads=threads)) as source:
        batch, records = decode_in_threads(source, threads)
    assert [record.path for record in records] == sorted(good + bad)
    for image, record in zip(batch, records, strict=True):
        if record.path in bad:
            assert record.failed, record
            assert len(record.reason.splitlines()) == 1
            assert not image.any()
        else:
            assert not record.failed
            assert record.reason == ""
            assert image.tobytes() == load_with_keras(folder / record.path, size).tobytes()


def test_failure_reasons_name_the_cause(folder):
    add_unreadable_entries(folder)
    reasons = {record.path: record.reason for record in read_folder(folder, size=SIZE).records}
    for name, cause in {
        "text.jpg": "not an image",
        "empty.jpg": "not an image",
        "jpeg cut in half.jpg": "truncated",
        "device.png": "not a regular file",
        "socket.jpg": "No such device or address",
        "dangling.png": "No such file",
        "circle.png": "symbolic link",
    }.items():
        assert cause in reasons[name]


def test_results_do_not_depend_on_the_number_of_threads(folder):
    save_images(folder, pixels(17), [f"{row}.png" for row in range(17)])
    add_unreadable_entries(folder)
    expected = read_folder(folder, size=SIZE)
    for threads in (1, 2, 5, 2):
        with closing(open_folder(folder, size=SIZE, threads=threads)) as source:
            batch, records = decode_in_threads(source, threads)
        assert batch.tobytes() == expected.batch.tobytes()
        assert records == expected.records


def test_decoder_warning_is_the_reason_of_a_successful_row(folder):
    jpeg = save_as(folder / "a.jpg", "jpeg").read_bytes()
    (folder / "b.jpg").write_bytes(jpeg[:20] + b"abc" + jpeg[20:])
    batch, records = read_folder(folder)
    assert [record.failed for record in records] == [False, False]
    assert records[0].reason == ""
    assert "extraneous bytes" in records[1].reason
    assert batch[0].tobytes() == batch[1].tobytes() == load_with_keras(folder / "b.jpg").tobytes()


def test_single_image_of_another_size_is_rejected(folder):
    save_images(folder, pixels(2), ["a.png", "b.png"])
    save_images(folder, pixels(1, height=11), ["c.png"])
    with pytest.raises(SourceError, match="2 sizes"):
        open_folder(folder)


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("linked", [False, True])
def test_image_changed_after_listing_stops_the_run(folder, change, linked):
    save_images(folder, pixels(3), ["a.png", "b.png", "c.png"])
    if linked:
        (folder / "b.png").rename(folder / "other")
        (folder / "b.png").symlink_to("other")
    listing = FolderImageListing(folder)
    with closing(open_folder(folder, size=SIZE, listing=listing)) as source:
        change((folder / "b.png").resolve())
        assert not source.decode(0, np.empty((*SIZE, 3), np.uint8)).failed
        for read in (
            lambda: source.read(0, 3),
            lambda: source.decode(1, np.empty((*SIZE, 3), np.uint8)),
            lambda: open_folder(folder, listing=listing),  # reads the sizes
        ):
            with pytest.raises(StoppedError) as caught:
                read()
            check_error(caught.value, folder / "b.png", "changed", "start over")
            assert caught.value.exit_code == 5


def bitmaps(tmp_path):
    return [
        save_as(tmp_path / f"{row}.bmp", "bmp", Image.fromarray(image)).read_bytes()
        for row, image in enumerate(pixels(4))
    ]


def test_image_overwritten_while_it_is_read_stops_the_run(tmp_path, folder, monkeypatch):
    old, new, *_ = bitmaps(tmp_path)
    (folder / "a.bmp").write_bytes(old)
    with closing(open_folder(folder, size=SIZE)) as source:
        overwrite_while_read(monkeypatch, folder / "a.bmp", [new])
        with pytest.raises(StoppedError) as caught:
            source.read(0, 1)
    check_error(caught.value, folder / "a.bmp", "changed")


def test_image_overwritten_while_it_is_read_is_never_a_mixture(tmp_path, folder, monkeypatch):
    """The time of the file is set back, so that only the read itself can tell."""
    old, new, *others = bitmaps(tmp_path)
    (folder / "a.bmp").write_bytes(old)
    with closing(open_folder(folder)) as source:
        with monkeypatch.context() as context:
            overwrite_while_read(context, folder / "a.bmp", [new], keeps_time=True)
            assert source.read(0, 1).batch.tobytes() == pixels(4)[1].tobytes()
        overwrite_while_read(monkeypatch, folder / "a.bmp", others, keeps_time=True)
        batch, (record,) = source.read(0, 1)
    assert record.reason == "the file changed while it was read"
    assert record.failed
    assert not batch.any()


def test_removed_image_is_a_failed_row(folder):
    save_images(folder, pixels(2), ["a.png", "b.png"])
    with closing(open_folder(folder)) as source:
        (folder / "a.png").unlink()
        batch, records = source.read(0, 2)
    assert [record.reason for record in records] == ["No such file or directory", ""]
    assert [record.failed for record in records] == [True, False]
    assert not batch[0].any()


def test_directory_named_like_an_image_is_no_row(folder):
    save_images(folder, pixels(2), ["x.jpg/a.png", "x.jpg/deep.png/b.png"])
    batch, records = read_folder(folder)
    assert [(record.path, record.label, record.failed) for record in records] == [
        ("x.jpg/a.png", "x.jpg", False),
        ("x.jpg/deep.png/b.png", "x.jpg/deep.png", False),
    ]
    assert batch.tobytes() == pixels(2).tobytes()


def test_file_above_max_bytes_fails_without_being_read(folder):
    """One of the files is sparse and larger than memory."""
    png = save_as(folder / "a.png", "png", Image.new("RGB", (3, 2))).read_bytes()
    limit = DecodeOptions(max_pixels=6).max_bytes
    (folder / "b.png").write_bytes(png + bytes(limit - len(png)))
    (folder / "c.png").write_bytes(png + bytes(limit - len(png) + 1))
    with (folder / "d.png").open("wb") as file:
        file.truncate(2**40)
    (folder / "e.png").symlink_to("d.png")
    for size in (None, SIZE):
        records = read_folder(folder, size=size, max_pixels=6).records
        assert [record.reason for record in records] == [
            *("", ""),
            f"the file has {limit + 1} bytes; the limit is {limit}",
            *[f"the file has {2**40} bytes; the limit is {limit}"] * 2,
        ]


def test_read_regular_returns_content_and_status(tmp_path):
    content = np.random.default_rng(1).bytes(70_001)
    path = tmp_path / "a.png"
    path.write_bytes(content)
    for max_bytes in (70_001, 10**9):
        data, status = read_regular(os.fsencode(path), max_bytes)
        assert data == content
        assert status.st_mtime_ns == path.stat().st_mtime_ns
    with pytest.raises(OSError, match="70001 bytes"):
        read_regular(os.fsencode(path), 70_000)


def test_file_with_zero_size_in_its_status_is_empty():
    data, status = read_regular(b"/proc/self/status", 100)
    assert (data, status.st_size) == (b"", 0)


def test_image_above_max_pixels_is_a_failed_row(folder):
    save_images(folder, pixels(1), ["a.png"])
    save_as(folder / "b.jpg", "jpeg", Image.new("RGB", (60, 70)))
    save_as(folder / "c.webp", "webp", Image.new("RGB", (60, 70)))
    _, records = read_folder(folder, size=SIZE, max_pixels=4_199)
    assert [record.failed for record in records] == [False, True, True]
    assert (
        records[1].reason
        == records[2].reason
        == "the image has 4200 pixels, more than the limit of 4199"
    )
    assert (records[1].width, records[1].height) == (60, 70)


@pytest.mark.parametrize("kind", ["jpeg", "png", "tiff"])
def test_damaged_image_does_not_affect_other_rows(folder, kind):
    whole = save_as(folder / "0 whole.png", kind).read_bytes()
    random = np.random.default_rng(len(kind))
    for number in range(60):
        damaged = bytearray(whole)
        # Mostly near the front, where the lengths and offsets are.
        for _ in range(random.integers(1, 4)):
            damaged[int(len(whole) * random.random() ** 4)] = random.integers(256)
        (folder / f"{number:03d}.png").write_bytes(damaged)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow only warns of some damage
        with closing(open_folder(folder, size=SIZE, threads=2)) as source:
            batch, records = decode_in_threads(source, 2)
    assert len(records) == 61
    assert batch[0].tobytes() == load_with_keras(folder / "0 whole.png", SIZE).tobytes()
    assert {record.failed for record in records} == {True, False}
    for image, record in zip(batch, records, strict=True):
        assert not (record.failed and image.any())


@ascii_failures()
def test_non_utf8_name_is_preserved(folder):
    expected = pixels(1)
    with open(os.fsencode(folder) + b"/caf\xe9.png", "wb") as file:  # noqa: PTH123
        Image.fromarray(expected[0]).save(file, "png")
    batch, (record,) = read_folder(folder)
    assert os.fsencode(record.path) == b"caf\xe9.png"
    assert batch.tobytes() == expected.tobytes()


READ_WITHOUT_PRIVILEGES = """
import sys
from fastvgg.storage.location import Location
from tests.helpers.datasets_on_disk import drop_permission_override
from fastvgg.datasets.open import open_source
from fastvgg.errors import FastvggError
drop_permission_override()
try:
    source = open_source(Location.parse(sys.argv[1]))
except FastvggError as error:
    print(type(error).__name__, error)
else:
    batch, records = source.read(0, source.header.images)
    for image, record in zip(batch, records):
        print(record.path, record.reason or "ok", image.any())
    source.close()
"""


def test_file_without_read_permission_is_a_failed_row(folder):
    save_images(folder, pixels(2), ["a.png", "b.png"])
    with permissions(folder / "a.png", 0):
        actual = stdout_of(READ_WITHOUT_PRIVILEGES, folder)
    assert actual.splitlines() == ["a.png Permission denied False", "b.png ok True"]


@pytest.mark.parametrize("closed", ["cat", "."])
def test_directory_without_permission_is_rejected(folder, closed):
    save_images(folder, pixels(2), ["a.png", "cat/b.png"])
    with permissions(folder / closed, 0):
        actual = stdout_of(READ_WITHOUT_PRIVILEGES, folder)
    assert actual.startswith("SourceError ")
    assert str(folder / closed) in actual
    assert "Permission denied" in actual
    assert "check the permissions" in actual


def test_folder_with_a_path_that_is_too_long_for_the_system_is_to_be_shortened(tmp_path):
    deepest = os.open(tmp_path, os.O_RDONLY)
    for _ in range(20):
        os.mkdir("d" * 250, dir_fd=deepest)
        above, deepest = deepest, os.open("d" * 250, os.O_RDONLY, dir_fd=deepest)
        os.close(above)
    os.close(deepest)
    with pytest.raises(SourceError, match="File name too long\nchoose a shorter name"):
        open_folder(tmp_path, size=SIZE)


def folder_fingerprint(path):
    with closing(open_folder(path, size=SIZE)) as source:
        return source.fingerprint()


def test_fingerprint_ignores_non_image_files(folder):
    save_images(folder, pixels(5))
    expected = folder_fingerprint(folder)
    (folder / "labels.csv").write_text("a,b\n")
    assert folder_fingerprint(folder) == expected


def add(folder):
    save_images(folder, pixels(1), ["a/new.png"])


def add_in_a_folder(folder):
    save_images(folder, pixels(1), ["a/deep/new.png"])


def delete(folder):
    (folder / "b" / "01.png").unlink()


def rename(folder):
    (folder / "b" / "01.png").rename(folder / "b" / "1.png")


def replace(folder):
    save_images(folder, pixels(1, seed=8), ["a/spare.txt.png"])
    os.utime(folder / "a" / "spare.txt.png", ns=(0, 1))
    (folder / "a" / "spare.txt.png").replace(folder / "a" / "00.png")


@pytest.mark.parametrize("change", [add, add_in_a_folder, delete, rename, replace])
def test_fingerprint_of_an_open_source_detects_renamed_added_and_removed_images(folder, change):
    save_images(folder, pixels(5))
    for directory in (folder, folder / "a", folder / "b"):
        os.utime(directory, ns=(0, 0))  # long ago: file system clocks are coarse
    with closing(open_folder(folder, size=SIZE)) as source:
        expected = source.fingerprint()
        assert source.fingerprint() == expected
        change(folder)
        assert source.fingerprint() == folder_fingerprint(folder) != expected


def test_fingerprint_of_an_open_source_ignores_other_files(folder):
    save_images(folder, pixels(5))
    os.utime(folder, ns=(0, 0))
    with closing(open_folder(folder, size=SIZE)) as source:
        expected = source.fingerprint()
        (folder / "labels.csv").write_text("a,b\n")  # lists the directory anew
        assert source.fingerprint() == expected


def test_identity_checksum_covers_only_successful_images(folder):
    save_images(folder, pixels(4), [f"{row}.png" for row in range(4)])
    with closing(open_folder(folder)) as source:
        before = [source.identity_checksum(row, row + 1, ()) for row in range(4)]
        both = source.identity_checksum(1, 3, ())
        assert source.identity_checksum(1, 4, {3}) == source.identity_checksum(0, 3, {0}) == both
        assert source.identity_checksum(1, 3, [2]) == before[1]
    assert (
        len({*before, both, source.identity_checksum(0, 4, ()), source.identity_checksum(1, 1, ())})
        == 7
    )
    os.utime(folder / "2.png", ns=(0, 1))
    with closing(open_folder(folder)) as source:
        after = [source.identity_checksum(row, row + 1, ()) for row in range(4)]
        assert [a == b for a, b in zip(before, after, strict=True)] == [True, True, False, True]
        assert source.identity_checksum(1, 3, ()) != both
        assert source.identity_checksum(1, 3, {2}) == before[1]


def test_given_listing_is_reused(folder):
    save_images(folder, pixels(2), ["a.png", "b.png"])
    listing = FolderImageListing(folder)
    save_images(folder, pixels(1), ["c.png"])
    with closing(open_folder(folder, listing=listing)) as source:
        assert source.listing is listing
        assert source.header.images == 2
    with closing(open_source(Location.parse(folder), listing=listing)) as source:
        assert source.listing is listing
    assert len(FolderImageListing(folder)) == 3


def test_listing_takes_less_than_70_bytes_per_file(folder):
    for number in range(20):
        (folder / f"class {number:03d}").mkdir()
    (folder / "first.jpg").touch()
    for number in range(19_999):
        os.link(folder / "first.jpg", folder / f"class {number % 20:03d}" / f"{number:08d}.jpg")
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        listing = FolderImageListing(folder)
        used = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert len(listing) == 20_000
    assert used < 20_000 * 70  # 22 of them are the name's
    assert listing.name(0) == b"class 000/00000000.jpg"
    assert listing.name(19_999) == b"first.jpg"
    assert listing.label(19_998) == b"class 019"
    (folder / "class 003" / "00000003.jpg").write_bytes(b"all are one file")
    assert listing.stored_bytes == 0
    assert FolderImageListing(folder).stored_bytes == 16 * 20_000


def test_images_support_only_channels_last(folder):
    save_images(folder, pixels(1), ["a.png"])
    with pytest.raises(SourceError) as caught:
        open_source(Location.parse(folder), layout="NCHW")
    check_error(caught.value, folder, "NCHW", "layout=")


@pytest.mark.parametrize("name", ["a.jpg", "a", "a.npz"])
def test_single_image_is_rejected(tmp_path, name):
    save_as(tmp_path / name, "jpeg")
    with pytest.raises(SourceError) as caught:
        open_source(Location.parse(tmp_path / name))
    check_error(caught.value, tmp_path / name, "is a single image", "directory")


def test_open_source_passes_decode_options_gather_and_memory_limit(folder):
    save_as(folder / "a.jpg", "jpeg")
    gathered = []

    def gather(image, picks, out):
        gathered.append(image.shape)
        out[...] = 5

    with closing(
        open_source(Location.parse(folder), decoding=DecodeOptions(SIZE), gather=gather)
    ) as source:
        batch, (record,) = source.read(0, 1)
    assert gathered == [(47, 61, 3)]
    assert (batch == 5).all()
    assert not record.failed
    with closing(
        open_source(Location.parse(folder), decoding=DecodeOptions(SIZE), decoding_bytes=900)
    ) as source:
        assert "the limit is" in source.read(0, 1).records[0].reason
