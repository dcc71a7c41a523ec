"""Directories of image files: Keras' pixels, every broken file a row with its reason."""

from __future__ import annotations

import io
import os
import signal
import socket
import warnings
import zlib
from contextlib import closing

import keras
import numpy as np
import pytest
from datasets_on_disk import (
    PHOTOGRAPHS,
    failing_in_ascii,
    must_say,
    names_in,
    permissions,
    pixels,
    printed_by,
    python,
    save_images,
    tree,
)
from PIL import Image

from fastvgg.datasets import images as images_module
from fastvgg.datasets import open_source, target_kind
from fastvgg.datasets.base import Chunk, Header
from fastvgg.datasets.images import INTERPOLATIONS, ImageFolder, ImageFolderTarget
from fastvgg.datasets.index import Record
from fastvgg.errors import ResumeError, SourceError, TargetError, UsageError
from fastvgg.stream.storage import Storage

SIZE = (37, 53)


def read_folder(path, **settings):
    with closing(ImageFolder(path, **settings)) as source:
        return source.read(0, source.header.images)


def as_keras_loads(path, size=None, interpolation="nearest"):
    image = keras.utils.load_img(path, target_size=size, interpolation=interpolation)
    loaded = keras.utils.img_to_array(image)
    return loaded.astype(np.uint8)


def a_photograph():
    with Image.open(PHOTOGRAPHS / "chelsea.png") as image:
        return image.convert("RGB").resize((61, 47))


def sixteen_bit_grey():
    return Image.fromarray((np.arange(47 * 61, dtype=np.uint16) * 23).reshape(47, 61))


def animated():
    frames = [a_photograph(), a_photograph().rotate(90), a_photograph().rotate(180)]
    written = io.BytesIO()
    frames[0].save(written, "gif", save_all=True, append_images=frames[1:])
    return written.getvalue()


def turned():
    """A JPEG that asks a viewer to turn it; Keras does not."""
    exif = Image.Exif()
    exif[0x0112] = 6
    written = io.BytesIO()
    a_photograph().save(written, "jpeg", exif=exif)
    return written.getvalue()


def encoded(image, kind, **options):
    written = io.BytesIO()
    image.save(written, kind, **options)
    return written.getvalue()


def see_through(mode):
    image = a_photograph().convert(mode)
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    return image


FORMATS = {
    "rgb.jpg": lambda: encoded(a_photograph(), "jpeg", quality=91),
    "progressive.jpeg": lambda: encoded(a_photograph(), "jpeg", progressive=True),
    "subsampled.jpg": lambda: encoded(a_photograph(), "jpeg", subsampling=2, quality=60),
    "grey.jpg": lambda: encoded(a_photograph().convert("L"), "jpeg"),
    "cmyk.jpg": lambda: encoded(a_photograph().convert("CMYK"), "jpeg"),
    "turned.jpg": turned,
    "from-a-phone.jpg": lambda: encoded(
        a_photograph(), "mpo", save_all=True, append_images=[a_photograph().rotate(180)]
    ),
    "upper.JPG": lambda: encoded(a_photograph(), "jpeg"),
    "rgb.png": lambda: encoded(a_photograph(), "png"),
    "grey.png": lambda: encoded(a_photograph().convert("L"), "png"),
    "palette.png": lambda: encoded(a_photograph().quantize(17), "png"),
    "palette-see-through.png": lambda: encoded(a_photograph().quantize(17), "png", transparency=3),
    "rgba.png": lambda: encoded(see_through("RGBA"), "png"),
    "grey-alpha.png": lambda: encoded(see_through("LA"), "png"),
    "one-bit.png": lambda: encoded(a_photograph().convert("1"), "png"),
    "sixteen-bit.png": lambda: encoded(sixteen_bit_grey(), "png"),
    "interlaced-size-1.png": lambda: encoded(a_photograph().resize((1, 1)), "png"),
    "lossy.webp": lambda: encoded(a_photograph(), "webp", quality=70),
    "lossless-see-through.webp": lambda: encoded(see_through("RGBA"), "webp", lossless=True),
    "rgb.bmp": lambda: encoded(a_photograph(), "bmp"),
    "palette.bmp": lambda: encoded(a_photograph().quantize(17), "bmp"),
    "animated.gif": animated,
    "rgb.tif": lambda: encoded(a_photograph(), "tiff"),
    "packed.tiff": lambda: encoded(a_photograph(), "tiff", compression="tiff_deflate"),
    "cmyk.tif": lambda: encoded(a_photograph().convert("CMYK"), "tiff"),
    "float.tif": lambda: encoded(a_photograph().convert("F"), "tiff"),
    "a-png-in-truth.jpg": lambda: encoded(a_photograph(), "png"),
}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "photos").mkdir()
    return tmp_path / "photos"


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("size", [None, SIZE], ids=["as it is", "resized"])
def test_every_format_has_the_pixels_that_keras_loads(folder, name, size):
    path = folder / name
    path.write_bytes(FORMATS[name]())
    expected = as_keras_loads(path, size)
    batch, (record,) = read_folder(folder, size=size)
    assert record.reason == ""
    assert record.path == name
    with Image.open(path) as image:
        assert (record.width, record.height) == image.size
    assert batch.dtype == np.uint8
    assert batch.shape == (1, *expected.shape)
    assert batch[0].tobytes() == expected.tobytes()


@pytest.mark.parametrize("name", ["astronaut.png", "chelsea.png", "rocket.jpg", "camera.png"])
@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_every_interpolation_of_keras_gives_keras_pixels_of_photographs(
    folder, name, interpolation
):
    (folder / name).write_bytes((PHOTOGRAPHS / name).read_bytes())
    for size in ((37, 53), (225, 223), (701, 11)):
        expected = as_keras_loads(folder / name, size, interpolation)
        actual = read_folder(folder, size=size, interpolation=interpolation).batch[0]
        assert actual.shape == (*size, 3)
        assert actual.tobytes() == expected.tobytes()


def test_the_interpolations_are_those_that_keras_names(folder):
    (folder / "a.png").write_bytes(FORMATS["rgb.png"]())
    with pytest.raises(ValueError, match="Supported") as caught:
        as_keras_loads(folder / "a.png", SIZE, "lanczos3")
    assert all(name in str(caught.value) for name in INTERPOLATIONS)
    assert str(caught.value).count(",") - 1 <= len(INTERPOLATIONS)


def test_photographs_of_different_sizes_become_one_batch_in_the_order_of_their_names(folder):
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
        assert image.tobytes() == as_keras_loads(folder / record.path, SIZE).tobytes()
        with Image.open(folder / record.path) as original:
            assert (record.width, record.height) == original.size


@failing_in_ascii()
def test_the_order_is_that_of_the_bytes_of_relative_paths(folder):
    names = [
        *(
            "a.png",
            "a/b.png",
            "a-b.png",
            "a b.png",
            "ab.png",
            "B.png",
            "z/a.png",
            "z.png",
            "10.png",
        ),
        *("9.png", "é.png", "e\u0301.png", "z/é/q.png", "\uff5e.png", "\U0001f600.png"),
    ]
    for row, name in enumerate(names):
        save_images(folder, pixels(1, seed=row), [name])
    # A byte that is no text: Python's own order of names puts it before U+FF5E, its bytes after.
    stray = os.fsencode(folder) + b"/\xff.png"
    with open(stray, "wb") as file:  # noqa: PTH123  # a name that is no text
        Image.fromarray(pixels(1, seed=77)[0]).save(file, "png")
    expected = sorted([os.fsencode(name) for name in names] + [b"\xff.png"])
    batch, records = read_folder(folder)
    assert [os.fsencode(record.path) for record in records] == expected
    assert expected.index(b"\xff.png") > expected.index("\uff5e.png".encode())
    for image, name in zip(batch, expected, strict=True):
        seed = 77 if name == b"\xff.png" else names.index(os.fsdecode(name))
        assert image.tobytes() == pixels(1, seed=seed)[0].tobytes()


def test_the_label_is_the_first_folder(folder):
    save_images(folder, pixels(4), ["top.png", "cat/a.png", "cat/old/b.png", "dog.x/c.png"])
    actual = [(record.path, record.label) for record in read_folder(folder).records]
    assert actual == [
        ("cat/a.png", "cat"),
        ("cat/old/b.png", "cat"),
        ("dog.x/c.png", "dog.x"),
        ("top.png", ""),
    ]


def test_only_some_images_are_read_where_only_some_are_asked_for(folder):
    expected = pixels(7)
    save_images(folder, expected, [f"{row}.png" for row in range(7)])
    with closing(ImageFolder(folder, threads=2)) as source:
        assert source.header == Header((7, 7, 9, 3), "uint8", "NHWC")
        for start, stop in ((0, 1), (2, 5), (6, 7), (0, 7)):
            batch, records = source.read(start, stop)
            assert batch.tobytes() == expected[start:stop].tobytes()
            assert [record.path for record in records] == [f"{n}.png" for n in range(start, stop)]


def test_size_is_height_and_width_in_that_order(folder):
    save_images(folder, pixels(1, height=40, width=20), ["a.png"])
    assert read_folder(folder, size=(11, 23)).batch.shape == (1, 11, 23, 3)


def test_images_of_one_size_need_no_size(folder):
    expected = pixels(5, height=11, width=23)
    save_images(folder, expected, [f"{row}.png" for row in range(5)])
    assert read_folder(folder).batch.tobytes() == expected.tobytes()


def test_images_of_different_sizes_without_a_size_are_refused_with_the_sizes(folder):
    save_images(folder, pixels(5, height=11, width=23), [f"a{row}.png" for row in range(5)])
    save_images(folder, pixels(2, height=13, width=29), [f"b{row}.png" for row in range(2)])
    with pytest.raises(SourceError) as caught:
        ImageFolder(folder)
    must_say(caught.value, folder, "2 sizes", "11x23 (5, as a0.png)", "13x29 (2, as b0.png)")
    assert "--size" in caught.value.remedy


def test_of_very_many_sizes_the_common_ones_are_named(folder):
    for height in range(1, 10):
        count = 2 if height == 9 else 1
        for row in range(count):
            save_images(folder, pixels(1, height=height, width=5), [f"{height}-{row}.png"])
    with pytest.raises(SourceError) as caught:
        ImageFolder(folder)
    must_say(caught.value, "9 sizes", "9x5 (2, as 9-0.png)", "and 4 more")


@pytest.mark.parametrize("size", [(0, 5), (5, 0), (-1, 5), (5,), (5, 7, 3)])
def test_an_impossible_size_is_refused(folder, size):
    save_images(folder, pixels(1), ["a.png"])
    with pytest.raises(UsageError) as caught:
        ImageFolder(folder, size=size)
    must_say(caught.value, size, "--size 224 224")


def test_an_unknown_interpolation_is_refused_with_the_known_ones(folder):
    save_images(folder, pixels(1), ["a.png"])
    with pytest.raises(UsageError) as caught:
        ImageFolder(folder, size=SIZE, interpolation="cubic")
    must_say(caught.value, "'cubic'", *INTERPOLATIONS)


@pytest.mark.parametrize("kind", ["empty", "text only", "broken only", "empty files only"])
def test_a_folder_without_an_image_is_refused(folder, kind):
    words = ["holds no images", "0 other files"]
    if kind == "text only":
        (folder / "labels.csv").write_text("a.jpg,cat\n")
        (folder / "notes").mkdir()
        (folder / "notes" / "README").write_text("about these")
        words = ["holds no images", "2 other files"]
    elif kind == "broken only":
        (folder / "a.jpg").write_text("not an image")
        (folder / "b.png").write_text("not an image either")
        words = ["none of the 2 images", "a.jpg", "not an image"]
    elif kind == "empty files only":
        (folder / "a.jpg").touch()
        words = ["none of the 1 images", "a.jpg"]
    before = tree(folder)
    with pytest.raises(SourceError) as caught:
        ImageFolder(folder)
    must_say(caught.value, folder, *words)
    assert tree(folder) == before


def test_a_folder_of_broken_images_alone_is_read_where_a_size_is_given(folder):
    (folder / "a.jpg").write_text("not an image")
    batch, (record,) = read_folder(folder, size=SIZE)
    assert not batch.any()
    assert record.failed


def test_what_is_left_out_is_counted_in_a_note(folder):
    save_images(folder, pixels(1), ["a.png"])
    (folder / "labels.csv").touch()
    (folder / "b.txt").touch()
    with closing(ImageFolder(folder)) as source:
        assert source.header.images == 1
        (note,) = source.notes
        assert "left out" in note
        assert "2" in note


def test_a_folder_of_images_alone_has_no_note(folder):
    save_images(folder, pixels(5))
    with closing(ImageFolder(folder)) as source:
        assert source.notes == []


def test_a_missing_directory_is_refused(tmp_path):
    with pytest.raises(SourceError) as caught:
        ImageFolder(tmp_path / "photos")
    must_say(caught.value, tmp_path / "photos")


def spoil(folder):
    """Put one of every kind of unreadable entry in a folder; return their names.

    All but a pipe: who opens one may wait for ever, which a process of its own has to try.
    """
    jpeg, png = FORMATS["rgb.jpg"](), FORMATS["rgb.png"]()
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
    (folder / "directory.jpg").mkdir()
    (folder / "dangling.png").symlink_to("nowhere.png")
    (folder / "circle.png").symlink_to("circle.png")
    (folder / "device.png").symlink_to("/dev/zero")
    (folder / "to a directory.png").symlink_to("directory.jpg")
    # A socket's address is short; the name is what it keeps.
    here = os.open(folder, os.O_RDONLY)
    try:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(f"/proc/self/fd/{here}/socket.jpg")
    finally:
        os.close(here)
    others = ["directory.jpg", "dangling.png", "circle.png", "device.png", "to a directory.png"]
    return sorted([*broken, *others, "socket.jpg"])


@pytest.mark.parametrize("size", [None, SIZE], ids=["as they are", "resized"])
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_what_cannot_be_read_is_a_row_of_zeros_with_a_reason_and_the_others_are_right(
    folder, size, threads
):
    # As large as the broken ones say that they are: a header can be whole where the rest is not.
    good = [f"{row} good.png" for row in range(5)]
    save_images(folder, pixels(5, height=47, width=61), good)
    bad = spoil(folder)
    batch, records = read_folder(folder, size=size, threads=threads)
    assert [record.path for record in records] == sorted(good + bad)
    for image, record in zip(batch, records, strict=True):
        if record.path in bad:
            assert record.failed, record
            assert len(record.reason.splitlines()) == 1
            assert not image.any()
        else:
            assert record.reason == ""
            assert image.tobytes() == as_keras_loads(folder / record.path, size).tobytes()


def test_reasons_name_the_cause(folder):
    spoil(folder)
    reasons = {record.path: record.reason for record in read_folder(folder, size=SIZE).records}
    for name, cause in {
        "text.jpg": "not an image",
        "empty.jpg": "not an image",
        "jpeg cut in half.jpg": "truncated",
        "directory.jpg": "a directory",
        "to a directory.png": "a directory",
        "device.png": "not a file",
        "dangling.png": "No such file",
        "circle.png": "symbolic link",
    }.items():
        assert cause in reasons[name]


def test_reading_is_the_same_for_any_number_of_threads_and_any_repetition(folder):
    save_images(folder, pixels(17), [f"{row}.png" for row in range(17)])
    spoil(folder)
    expected = read_folder(folder, size=SIZE, threads=1)
    for threads in (1, 2, 5, 2):
        actual = read_folder(folder, size=SIZE, threads=threads)
        assert actual.batch.tobytes() == expected.batch.tobytes()
        assert actual.records == expected.records


def test_an_image_of_another_size_among_images_of_one_size_is_refused_before_anything(folder):
    save_images(folder, pixels(2), ["a.png", "b.png"])
    save_images(folder, pixels(1, height=11), ["c.png"])
    with pytest.raises(SourceError, match="2 sizes"):
        ImageFolder(folder)


def test_an_image_that_changed_its_size_after_the_look_is_a_row_with_a_reason(folder):
    save_images(folder, pixels(2), ["a.png", "b.png"])
    with closing(ImageFolder(folder)) as source:
        save_images(folder, pixels(1, height=11, width=13), ["b.png"])
        batch, records = source.read(0, 2)
    assert [record.failed for record in records] == [False, True]
    assert "11x13, not 7x9" in records[1].reason
    assert not batch[1].any()


def test_an_image_that_vanished_after_the_look_is_a_row_with_a_reason(folder):
    save_images(folder, pixels(2), ["a.png", "b.png"])
    with closing(ImageFolder(folder)) as source:
        (folder / "a.png").unlink()
        batch, records = source.read(0, 2)
    assert [record.reason for record in records] == ["No such file or directory", ""]
    assert not batch[0].any()


def test_images_inside_a_directory_that_is_named_like_an_image_are_rows_too(folder):
    save_images(folder, pixels(2), ["x.jpg/a.png", "x.jpg/deep.png/b.png"])
    batch, records = read_folder(folder)
    actual = [(record.path, record.label, record.failed) for record in records]
    assert actual == [
        ("x.jpg", "", True),
        ("x.jpg/a.png", "x.jpg", False),
        ("x.jpg/deep.png", "x.jpg", True),
        ("x.jpg/deep.png/b.png", "x.jpg", False),
    ]
    assert batch[[1, 3]].tobytes() == pixels(2).tobytes()


def test_links_to_images_are_images_and_links_to_directories_are_not_walked(folder, tmp_path):
    save_images(tmp_path / "elsewhere", pixels(2), ["a.png", "b.png"])
    (folder / "link.png").symlink_to(tmp_path / "elsewhere" / "a.png")
    (folder / "directory").symlink_to(tmp_path / "elsewhere")
    (folder / "self").symlink_to(folder)
    batch, records = read_folder(folder)
    assert [record.path for record in records] == ["link.png"]
    assert batch.tobytes() == pixels(2)[:1].tobytes()


@pytest.mark.parametrize("name", ["rgb.jpg", "progressive.jpeg", "rgb.png", "animated.gif"])
def test_a_truncated_image_fails_exactly_where_keras_fails(folder, name):
    whole = FORMATS[name]()
    lengths = [1, 2, 10, 33, 100, len(whole) // 2, *range(len(whole) - 40, len(whole) + 1)]
    for length in lengths:
        (folder / f"{length:06d}{name}").write_bytes(whole[:length])
    batch, records = read_folder(folder, size=SIZE)
    outcomes = set()
    for image, record in zip(batch, records, strict=True):
        outcomes.add(record.failed)
        try:
            expected = as_keras_loads(folder / record.path, SIZE)
        except Exception:  # noqa: BLE001  # whatever Pillow raises
            assert record.failed, record
            assert not image.any()
        else:
            assert not record.failed, record
            assert image.tobytes() == expected.tobytes()
    assert outcomes == {True, False}


@pytest.mark.parametrize("name", ["rgb.jpg", "rgb.png", "rgb.bmp", "animated.gif", "lossy.webp"])
def test_no_damage_to_an_image_stops_the_reading_of_the_others(folder, name):
    whole = FORMATS[name]()
    random = np.random.default_rng(len(name))
    for number in range(120):
        damaged = bytearray(whole)
        # Mostly near the front, where the lengths and offsets are.
        for _ in range(random.integers(1, 4)):
            damaged[int(len(whole) * random.random() ** 4)] = random.integers(256)
        (folder / f"{number:03d}{name}").write_bytes(damaged)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of some damage and goes on
        batch, records = read_folder(folder, size=SIZE, threads=2)
    assert len(records) == 120
    for image, record in zip(batch, records, strict=True):
        assert not (record.failed and image.any())


@pytest.mark.parametrize("name", ["rgb.tif", "packed.tiff"])
def test_no_damage_to_a_tiff_stops_the_reading_of_the_others(folder, name):
    whole = FORMATS[name]()
    with Image.open(io.BytesIO(whole)) as image:
        directory = int.from_bytes(whole[4:8], "little")
        entries = len(image.tag_v2)
    random = np.random.default_rng(len(name))
    for number in range(200):
        damaged = bytearray(whole)
        damaged[directory + random.integers(2 + 12 * entries)] = random.integers(256)
        (folder / f"{number:03d}{name}").write_bytes(damaged)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        records = read_folder(folder, size=SIZE, threads=2).records
    assert len(records) == 200
    assert any(record.failed for record in records)


def test_an_image_that_claims_a_billion_pixels_is_a_row_with_a_reason(folder):
    save_images(folder, pixels(1), ["a.png"])
    png = bytearray(FORMATS["rgb.png"]())
    png[16:24] = (40_001).to_bytes(4) + (30_001).to_bytes(4)
    png[29:33] = zlib.crc32(png[12:29]).to_bytes(4)
    (folder / "bomb.png").write_bytes(png)
    _, records = read_folder(folder, size=SIZE)
    assert [record.failed for record in records] == [False, True]
    assert "pixels" in records[1].reason


def test_a_program_in_an_image_s_clothes_is_not_run(folder):
    # Pillow hands PostScript to Ghostscript where that is installed.
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 7\n%%EndComments\n(%stderr) print\n"
    (folder / "a.png").write_bytes(FORMATS["rgb.png"]())
    (folder / "b.jpg").write_bytes(script)
    _, records = read_folder(folder, size=SIZE)
    assert "not an image that" in records[1].reason


@failing_in_ascii()
def test_a_name_that_is_no_text_is_kept_byte_for_byte(folder):
    expected = pixels(1)
    with open(os.fsencode(folder) + b"/caf\xe9.png", "wb") as file:  # noqa: PTH123
        Image.fromarray(expected[0]).save(file, "png")
    batch, (record,) = read_folder(folder)
    assert os.fsencode(record.path) == b"caf\xe9.png"
    assert batch.tobytes() == expected.tobytes()


READ_WITHOUT_PRIVILEGES = """
import pathlib, sys
from datasets_on_disk import obey_permissions
from fastvgg.datasets.images import ImageFolder
from fastvgg.errors import FastvggError
obey_permissions()
try:
    source = ImageFolder(pathlib.Path(sys.argv[1]))
except FastvggError as error:
    print(type(error).__name__, error)
else:
    batch, records = source.read(0, source.header.images)
    for image, record in zip(batch, records):
        print(record.path, record.reason or "ok", image.any())
    source.close()
"""


def test_a_file_that_may_not_be_read_is_a_row_with_a_reason(folder):
    save_images(folder, pixels(2), ["a.png", "b.png"])
    with permissions(folder / "a.png", 0):
        actual = printed_by(READ_WITHOUT_PRIVILEGES, folder)
    assert actual.splitlines() == ["a.png Permission denied False", "b.png ok True"]


@pytest.mark.parametrize("closed", ["cat", "."])
def test_a_directory_that_may_not_be_listed_is_refused(folder, closed):
    save_images(folder, pixels(2), ["a.png", "cat/b.png"])
    with permissions(folder / closed, 0):
        actual = printed_by(READ_WITHOUT_PRIVILEGES, folder)
    assert actual.startswith("SourceError ")
    assert str(folder / closed) in actual
    assert "Permission denied" in actual
    assert "check its permissions" in actual


def test_a_listing_does_not_wait_for_pipes(folder):
    save_images(folder, pixels(1), ["a.png"])
    os.mkfifo(folder / "0.jpg")
    os.mkfifo(folder / "pipe without the name")
    done = python(
        "import pathlib, signal, sys\n"
        "from fastvgg.datasets.images import ImageFolder\n"
        "signal.alarm(5)\n"
        "source = ImageFolder(pathlib.Path(sys.argv[1]))\n"
        "print([r.reason for r in source.read(0, 2).records])",
        folder,
    )
    assert done.returncode != -signal.SIGALRM, "waited for someone to write into a pipe"
    assert "not a file" in done.stdout


def folder_fingerprint(path):
    with closing(ImageFolder(path, size=SIZE)) as source:
        return source.fingerprint()


def test_a_fingerprint_is_stable_and_changes_with_any_name_size_or_time(folder):
    save_images(folder, pixels(5))
    expected = folder_fingerprint(folder)
    assert folder_fingerprint(folder) == expected
    path = folder / "a" / "00.png"
    status, content = path.stat(), path.read_bytes()
    seen = {expected}

    os.utime(path, ns=(0, status.st_mtime_ns + 1))
    seen.add(folder_fingerprint(folder))
    path.write_bytes(content + b"\0")
    os.utime(path, ns=(0, status.st_mtime_ns))
    seen.add(folder_fingerprint(folder))
    path.write_bytes(content)
    os.utime(path, ns=(0, status.st_mtime_ns))
    assert folder_fingerprint(folder) == expected
    path.rename(folder / "a" / "0.png")
    seen.add(folder_fingerprint(folder))
    (folder / "a" / "0.png").unlink()
    seen.add(folder_fingerprint(folder))
    save_images(folder, pixels(1), ["new.png"])
    seen.add(folder_fingerprint(folder))
    assert len(seen) == 6


def test_a_fingerprint_does_not_change_with_files_that_are_no_images(folder):
    save_images(folder, pixels(5))
    expected = folder_fingerprint(folder)
    (folder / "labels.csv").write_text("a,b\n")
    assert folder_fingerprint(folder) == expected


def test_images_have_one_layout(folder):
    save_images(folder, pixels(1), ["a.png"])
    with pytest.raises(SourceError) as caught:
        open_source(folder, layout="NCHW")
    must_say(caught.value, folder, "NCHW", "--layout")


@pytest.mark.parametrize("name", ["a.jpg", "a.tar", "a", "a.npz"])
def test_what_is_neither_a_folder_nor_an_array_is_refused(tmp_path, name):
    (tmp_path / name).write_bytes(FORMATS["rgb.jpg"]())
    with pytest.raises(SourceError) as caught:
        open_source(tmp_path / name)
    must_say(caught.value, tmp_path / name, "neither a directory of images nor a .npy")


def test_a_path_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(SourceError) as caught:
        open_source(tmp_path / "photos")
    must_say(caught.value, tmp_path / "photos", "does not exist")


def folder_target(path, batch, records=()):
    target = ImageFolderTarget(path, Header(batch.shape, "uint8", "NHWC"), Storage(), records)
    target.create()
    target.write(0, Chunk(batch, list(records)))
    target.sync()
    return target


def record(path, reason=""):
    return Record(path, "", 9, 7, reason)


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (None, ["00000000.png", "00000001.png"]),
        (["b.jpg", "a.png"], ["b.png", "a.png"]),
        (["a.jpg", "a.bmp"], ["a.jpg.png", "a.bmp.png"]),
        (["a.png", "a.PNG"], ["a.png.png", "a.PNG.png"]),
        (["x/y/a.jpg", "x/a.jpg"], ["x/y/a.png", "x/a.png"]),
        (["x.jpg/a.jpg", "x.y/a.b.jpg"], ["x.jpg/a.png", "x.y/a.b.png"]),
        (["noend", "..jpg"], ["noend.png", "..png"]),
        (["caf\udce9.jpg", "é\n,.jpg"], ["caf\udce9.png", "é\n,.png"]),
    ],
    ids=["no names", "names", "same stem", "same stem, png", "nested", "dots", "odd", "no text"],
)
@failing_in_ascii()
def test_files_are_named_by_the_records_or_by_row(tmp_path, paths, names):
    expected = pixels(2)
    records = [record(path) for path in paths or ()]
    target = folder_target(tmp_path / "out", expected, records)
    assert not (tmp_path / "out").exists()
    target.publish()
    assert not target.partial.exists()
    found = {str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*.png")}
    assert found == set(names)
    for name, image in zip(names, expected, strict=True):
        with Image.open(tmp_path / "out" / name) as stored:
            assert stored.format == "PNG"
            assert np.asarray(stored).tobytes() == image.tobytes()
    assert target.read_back(0, 2).tobytes() == expected.tobytes()


def test_a_file_and_a_folder_never_get_the_same_name(tmp_path):
    paths = ["a.jpg", "a.bmp", "x.png", "x.png.png/y.jpg"]
    expected = pixels(4)
    target = folder_target(tmp_path / "out", expected, [record(path) for path in paths])
    target.publish()
    assert target.read_back(0, 4).tobytes() == expected.tobytes()


def test_a_failed_row_has_no_file_and_reads_back_as_zeros(tmp_path):
    expected = pixels(2)
    expected[1] = 0
    target = folder_target(tmp_path / "out", expected, [record("a.jpg"), record("b.jpg", "torn")])
    target.publish()
    assert names_in(tmp_path / "out") == ["a.png"]
    assert target.read_back(0, 2).tobytes() == expected.tobytes()


def test_an_index_that_names_one_file_twice_is_refused(tmp_path):
    with pytest.raises(SourceError) as caught:
        folder_target(tmp_path / "out", pixels(2), [record("x/a.jpg"), record("x/a.jpg")])
    must_say(caught.value, "x/a.jpg", "twice")
    assert names_in(tmp_path) == []


def test_a_published_image_that_was_damaged_is_named(tmp_path):
    target = folder_target(tmp_path / "out", pixels(2))
    target.publish()
    (tmp_path / "out" / "00000001.png").write_bytes(b"not an image")
    with pytest.raises(SourceError) as caught:
        target.read_back(0, 2)
    must_say(caught.value, tmp_path / "out" / "00000001.png")


def test_reopening_a_directory_that_is_gone_is_refused(tmp_path):
    target = ImageFolderTarget(tmp_path / "out", Header((1, 7, 9, 3), "uint8", "NHWC"), Storage())
    with pytest.raises(ResumeError) as caught:
        target.reopen()
    must_say(caught.value, target.partial, "--restart")


def test_publishing_leaves_a_neighbour_with_a_similar_name_alone(tmp_path):
    neighbour = tmp_path / "out.replaced"
    neighbour.mkdir()
    (neighbour / "keep.txt").write_text("precious")
    folder_target(tmp_path / "out", pixels(2)).publish()
    assert (neighbour / "keep.txt").read_text() == "precious"


@pytest.mark.parametrize(("name", "kind"), [("a.npy", "npy"), ("A.NPY", "npy"), ("out", "images")])
def test_a_target_is_what_its_name_says(tmp_path, name, kind):
    assert target_kind(tmp_path / name) == kind


def test_an_existing_directory_is_one_whatever_its_name_ends_in(tmp_path):
    (tmp_path / "v1.0").mkdir()
    assert target_kind(tmp_path / "v1.0") == "images"


def test_a_target_of_no_known_format_is_refused(tmp_path):
    with pytest.raises(TargetError) as caught:
        target_kind(tmp_path / "out.zarr")
    must_say(caught.value, tmp_path / "out.zarr", "'.zarr'", ".npy")


def test_what_pillow_may_raise_is_caught():
    assert issubclass(Image.UnidentifiedImageError, images_module.DECODING_ERRORS)
    assert issubclass(Image.DecompressionBombError, images_module.DECODING_ERRORS)
