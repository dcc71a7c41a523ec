"""Image file targets: names, encoding and damage."""

from __future__ import annotations

import io
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

import numpy as np
import pytest
import simplejpeg
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fastvgg.datasets.base import Header, ImageRecord
from fastvgg.datasets.image_writer import FORMAT_SUFFIXES, ImageFolderTarget, check_format, is_lossy
from fastvgg.datasets.index import INDEX_HEADER, format_records, index_path, read_index
from fastvgg.datasets.open import open_target, target_format
from fastvgg.errors import ResumeError, SourceError, StoppedError, TargetError, UsageError
from fastvgg.storage.local import Storage
from fastvgg.storage.location import Location
from tests.helpers.batches import frozen
from tests.helpers.datasets_on_disk import ascii_failures, check_error, names_in, pixels, tree

LOSSLESS = ("png", "webp")
PILLOW_FORMATS = {"png": "PNG", "webp": "WEBP", "jpeg": "JPEG"}


def record(path, reason="", *, failed=False):
    return ImageRecord(path, "", 9, 7, failed, reason)


def failed_record(path):
    return record(path, "truncated", failed=True)


def encode_batch(target, batch, records=()):
    """Return the payload of a batch; a failed row is empty."""
    failed = [found.failed for found in records] or [False] * len(batch)
    return [b"" if bad else target.encode(image) for image, bad in zip(batch, failed, strict=True)]


def make_target(path, batch, records=(), **settings):
    return ImageFolderTarget(
        path, Header(batch.shape, "uint8", "NHWC"), Storage(), records, **settings
    )


def write_target(path, batch, records=(), **settings):
    target = make_target(path, batch, records, **settings)
    target.create()
    target.write(0, encode_batch(target, batch, records))
    target.sync()
    return target


def files_in(directory):
    return {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}


@pytest.mark.parametrize("named", [False, True])
def test_files_can_be_written_in_any_order_and_rewritten(tmp_path, named):
    expected = pixels(9)
    records = [record(f"{'ab'[row % 2]}/{row}.jpg") for row in range(9)] if named else []
    target = make_target(tmp_path / "out", expected, records)
    target.create()
    stored = encode_batch(target, expected)
    for start, stop in ((5, 9), (0, 3), (3, 5), (3, 5), (0, 9)):
        target.write(start, stored[start:stop])
        target.sync()
    target.publish()
    for start, stop in ((0, 9), (2, 3), (4, 8), (8, 9)):
        assert [*target.stored_spans(start, stop, 2**20)] == stored[start:stop]
        assert target.read_back(start, stop).tobytes() == expected[start:stop].tobytes()
    assert len(files_in(tmp_path / "out")) == 9


@pytest.mark.parametrize("file_format", PILLOW_FORMATS)
@pytest.mark.parametrize(
    ("paths", "stems"),
    [
        (None, ["00000000", "00000001"]),
        (["b.jpg", "a.bmp"], ["b", "a"]),
        (["a.gif", "a.bmp"], ["a.gif", "a.bmp"]),
        (["a.tif", "a.TIF"], ["a.tif", "a.TIF"]),
        (["x/y/a.gif", "x/a.gif"], ["x/y/a", "x/a"]),
        (["x.jpg/a.gif", "x.y/a.b.gif"], ["x.jpg/a", "x.y/a.b"]),
        (["noend", "..gif"], ["noend", "."]),
        (["caf\udce9.gif", "é\n,.gif"], ["caf\udce9", "é\n,"]),
    ],
    ids=["no names", "names", "same stem", "same but for case", "nested", "dots", "odd", "no text"],
)
@ascii_failures()
def test_files_are_named_after_records_or_rows(tmp_path, paths, stems, file_format):
    expected = pixels(2)
    records = [record(path) for path in paths or ()]
    target = write_target(tmp_path / "out", expected, records, file_format=file_format)
    assert not (tmp_path / "out").exists()
    target.publish()
    assert not target.partial.exists()
    names = [stem + FORMAT_SUFFIXES[file_format] for stem in stems]
    assert files_in(tmp_path / "out") == set(names)
    for name, image in zip(names, expected, strict=True):
        with Image.open(tmp_path / "out" / name) as stored:
            assert stored.format == PILLOW_FORMATS[file_format]
            assert file_format == "jpeg" or np.asarray(stored).tobytes() == image.tobytes()
    stored = [*target.stored_spans(0, 2, 2**20)]
    assert stored == [(tmp_path / "out" / name).read_bytes() for name in names]


@pytest.mark.parametrize("file_format", LOSSLESS)
@pytest.mark.parametrize("size", [(1, 1), (1, 300), (257, 1), (7, 9), (64, 64), (33, 130)])
def test_png_and_webp_are_lossless(tmp_path, file_format, size):
    noise = pixels(3, *size, seed=5)
    noise[2] = np.arange(noise[2].size, dtype=np.uint8).reshape(noise[2].shape)  # smooth
    target = write_target(tmp_path / "out", frozen(noise), file_format=file_format)
    target.publish()
    assert target.read_back(0, 3).tobytes() == noise.tobytes()
    for row, image in enumerate(noise):
        with Image.open(tmp_path / "out" / f"{row:08d}{FORMAT_SUFFIXES[file_format]}") as stored:
            assert stored.mode == "RGB"
            assert np.asarray(stored).tobytes() == image.tobytes()
    assert not is_lossy(file_format)


def test_jpeg_matches_simplejpeg_at_quality_95(tmp_path):
    batch = pixels(2, 37, 53)
    batch[1] = np.linspace(0, 255, 37 * 53 * 3).reshape(37, 53, 3)
    target = write_target(tmp_path / "out", frozen(batch), file_format="jpeg")
    target.publish()
    for row, image in enumerate(batch):
        expected = simplejpeg.encode_jpeg(image, quality=95, colorsubsampling="444")
        assert (tmp_path / "out" / f"{row:08d}.jpg").read_bytes() == expected
    actual = target.read_back(0, 2)
    assert actual.shape == batch.shape
    assert actual.tobytes() != batch.tobytes()
    assert abs(actual[1].astype(int) - batch[1]).max() < 12
    assert is_lossy("jpeg")


@pytest.mark.parametrize("file_format", PILLOW_FORMATS)
def test_encoding_does_not_depend_on_threads(tmp_path, file_format):
    batch = pixels(40, 31, 17)
    target = make_target(tmp_path / "out", batch, file_format=file_format)
    expected = encode_batch(target, batch)
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(target.encode, batch)) == expected
    assert len(set(expected)) == 40


LIMITS = {"png": 2**31 - 1, "jpeg": 65_500, "webp": 16_383}


@pytest.mark.parametrize("name", LIMITS)
def test_images_too_large_for_a_format_are_rejected(name):
    max_side = LIMITS[name]
    for sides in ((max_side, 1), (1, max_side), (1, 1)):
        check_format(name, *sides)
    for sides in ((max_side + 1, 1), (1, max_side + 1)):
        with pytest.raises(TargetError) as caught:
            check_format(name, *sides)
        check_error(caught.value, f"{sides[0]}x{sides[1]}", name, max_side, "format='png'")


@pytest.mark.parametrize("name", ["jpeg", "webp"])
def test_format_encodes_images_up_to_its_maximum_side(tmp_path, name):
    max_side = LIMITS[name]
    image = pixels(1, 1, max_side)
    target = write_target(tmp_path / "out", image, file_format=name)
    target.publish()
    assert target.read_back(0, 1).shape == (1, 1, max_side, 3)
    with pytest.raises(ValueError, match=r"."):  # of the encoder
        target.encode(pixels(1, 1, 65_536)[0])


@pytest.mark.parametrize("name", ["gif", "", "PNG", "jpg", ".png"])
def test_unknown_format_is_rejected(name):
    with pytest.raises(UsageError) as caught:
        check_format(name, 7, 9)
    check_error(caught.value, repr(name), "'png', 'jpeg', 'webp'")


def test_file_and_directory_names_do_not_collide(tmp_path):
    paths = ["a.jpg", "a.bmp", "x.png", "./x.png.png/y.jpg"]
    expected = pixels(4)
    target = write_target(tmp_path / "out", expected, [record(path) for path in paths])
    target.publish()
    assert target.read_back(0, 4).tobytes() == expected.tobytes()


short = st.lists(st.sampled_from(["a", "b", "a.png", "a.jpg", "b.png.png"]), min_size=1, max_size=3)


@given(st.lists(short.map("/".join), unique=True, min_size=1, max_size=9))
def test_any_paths_get_names_that_can_coexist(paths):
    header = Header((len(paths), 7, 9, 3), "uint8", "NHWC")
    target = ImageFolderTarget(Path("out"), header, Storage(), [record(path) for path in paths])
    names = list(target._names(0, len(paths)))
    assert len(set(names)) == len(paths)
    folders = {str(folder) for name in names for folder in PurePosixPath(name).parents}
    assert folders.isdisjoint(names)
    stems = [str(PurePosixPath(path).with_suffix(".png")) for path in paths]
    ends = [name.removeprefix(path) for name, path in zip(names, paths, strict=True)]
    kept = len(set(ends)) == 1 and set(ends[0].split(".png")) == {""}
    assert names == stems or kept
    if names != stems:  # only if necessary
        parents = {str(folder) for path in paths for folder in PurePosixPath(path).parents}
        assert len(set(stems)) < len(paths) or not parents.isdisjoint(stems)


@pytest.mark.parametrize(
    ("paths", "expected"),
    [
        (["a.jpg", "b/a.jpg", "B/c.jpg"], []),
        (["o.jpg", "A.jpg", "a.jpg"], ["A.png", "a.png"]),
        (["A.jpg", "o.jpg", "a.png/x/y.jpg", "a.png/z.jpg"], ["A.png", "a.png/x/y.png"]),
        (["b/X.png/a.jpg", "B/x.jpg"], ["b/X.png/a.png", "B/x.png"]),
    ],
)
def test_names_that_a_disk_may_not_distinguish_are_probed(tmp_path, paths, expected):
    target = make_target(tmp_path / "out", pixels(len(paths)), [record(path) for path in paths])
    assert target._similar_names() == expected


def test_failed_row_has_no_file_and_reads_back_as_zeros(tmp_path):
    expected = pixels(4)
    expected[[1, 3]] = 0
    records = [
        record("a.jpg", "libjpeg warned"),
        failed_record("x/b.jpg"),
        record("c.jpg"),
        failed_record("d.jpg"),
    ]
    target = write_target(tmp_path / "out", expected, records)
    target.publish()
    assert names_in(tmp_path / "out") == ["a.png", "c.png"]
    assert target.read_back(0, 4).tobytes() == expected.tobytes()
    assert target.read_back(1, 3).tobytes() == expected[1:3].tobytes()
    assert len([*target.stored_spans(0, 4, 2**20)]) == 2


def test_target_files_are_named_after_the_index(tmp_path):
    expected = pixels(3)
    records = [record("cat/é\n.jpg"), failed_record("cat/b.jpg"), record("dog/a.jpg", "warned")]
    text = INDEX_HEADER + format_records(records)
    index_path(tmp_path / "train.npy").write_text(text, encoding="utf-8")
    index = read_index(tmp_path / "train.npy", 3)
    expected[1] = 0
    header = Header(expected.shape, "uint8", "NHWC")
    named = {"records": index, "file_format": "webp"}
    target = open_target(
        Location.parse(tmp_path / "out"), header, Storage(), chunk_images=1, **named
    )
    target.create()
    target.write(0, encode_batch(target, expected, records))
    target.publish()
    assert files_in(tmp_path / "out") == {"cat/é\n.webp", "dog/a.webp"}
    assert target.read_back(0, 3).tobytes() == expected.tobytes()


def test_index_with_duplicate_paths_is_rejected(tmp_path):
    records = [record("y.jpg"), record("x/a.jpg"), failed_record("z.jpg"), record("x/a.jpg")]
    with pytest.raises(SourceError) as caught:
        make_target(tmp_path / "out", pixels(4), records)
    check_error(caught.value, "x/a.jpg", "twice")
    assert names_in(tmp_path) == []


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"not an image", id="text"),
        pytest.param(None, id="missing"),
        pytest.param(b"", id="empty"),
    ],
)
def test_damaged_published_image_is_reported_by_path(tmp_path, content):
    target = write_target(tmp_path / "out", pixels(2))
    target.publish()
    path = tmp_path / "out" / "00000001.png"
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SourceError) as caught:
        target.read_back(0, 2)
    check_error(caught.value, path)
    assert target.read_back(0, 1).tobytes() == pixels(2)[:1].tobytes()


def test_truncated_published_image_is_reported_by_path(tmp_path):
    target = write_target(tmp_path / "out", pixels(2, 37, 53))
    target.publish()
    path = tmp_path / "out" / "00000000.png"
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(SourceError) as caught:
        target.read_back(0, 2)
    check_error(caught.value, path, "truncated")
    assert len(next(target.stored_spans(0, 2, 2**20))) == path.stat().st_size


class RecordingStorage(Storage):
    """Storage that records its syncs."""

    def __init__(self, *, has_reliable_syncfs):
        super().__init__()
        self.calls = []
        self._has_reliable_syncfs = has_reliable_syncfs

    def has_syncfs(self, directory):
        return self._has_reliable_syncfs

    def sync(self, file):
        self.calls.append(file.path.name)
        super().sync(file)

    def syncfs(self, directory):
        self.calls.append("the disk")
        super().syncfs(directory)


@pytest.mark.parametrize("start_method", ["create", "reopen"])
def test_files_are_synced_individually_where_syncfs_is_unreliable(tmp_path, start_method):
    batch = pixels(2)
    for has_reliable_syncfs, calls in (
        (True, ["the disk"]),
        (False, ["00000000.png", "00000001.png", "the disk"]),
    ):
        storage = RecordingStorage(has_reliable_syncfs=has_reliable_syncfs)
        target = ImageFolderTarget(tmp_path / "out", Header(batch.shape, "uint8", "NHWC"), storage)
        if start_method == "create":
            target.create()
        else:
            target.partial.mkdir(exist_ok=True)
            target.reopen()
        target.write(0, encode_batch(target, batch))
        target.sync()
        assert storage.calls == calls


@pytest.mark.parametrize(("name", "kind"), [("a.npy", "npy"), ("A.NPY", "npy"), ("out", "images")])
def test_target_suffix_selects_the_format(tmp_path, name, kind):
    assert target_format(Location.parse(tmp_path / name)) == kind


def test_existing_directory_is_an_image_target_regardless_of_its_suffix(tmp_path):
    (tmp_path / "v1.0").mkdir()
    assert target_format(Location.parse(tmp_path / "v1.0")) == "images"


def test_unknown_target_suffix_is_rejected(tmp_path):
    with pytest.raises(TargetError) as caught:
        target_format(Location.parse(tmp_path / "out.zip"))
    check_error(caught.value, tmp_path / "out.zip", "'.zip'", ".npy")


def test_encoded_image_is_a_complete_file(tmp_path):
    target = make_target(tmp_path / "out", pixels(2))
    data = target.encode(frozen(pixels(1, 5, 8)[0]))
    assert type(data) is bytes
    with Image.open(io.BytesIO(data)) as image:
        assert image.size == (8, 5)
    assert tree(tmp_path) == {}


# The directory of an unfinished run


def swap_for_link(partial, victim):
    partial.rename(partial.with_name("moved"))
    partial.symlink_to(victim)


def remove_tree(partial, victim):
    shutil.rmtree(partial)


def remove_and_recreate(partial, victim):
    shutil.rmtree(partial)
    partial.mkdir()


def swap_folder_for_link(partial, victim):
    shutil.rmtree(partial / "a")
    (partial / "a").symlink_to(victim)


def remove_one_file(partial, victim):
    next(path for path in partial.rglob("*.png")).unlink()


def replace_one_file_by_a_link(partial, victim):
    file = next(path for path in partial.rglob("*.png"))
    file.unlink()
    file.symlink_to(victim / "0.png")


INTERFERENCES = (
    *(swap_for_link, remove_tree, remove_and_recreate, swap_folder_for_link),
    *(remove_one_file, replace_one_file_by_a_link),
)


@pytest.mark.parametrize("resumed", [False, True], ids=["new", "resumed"])
@pytest.mark.parametrize("interfere", INTERFERENCES)
def test_directory_changed_while_it_is_written_is_an_error_and_no_other_file_is(
    tmp_path, interfere, resumed
):
    victim = tmp_path / "victim"
    victim.mkdir()
    for row in range(6):
        (victim / f"{row}.png").write_bytes(b"precious")
    before = tree(victim)
    batch, records = pixels(6), [record(f"a/{row}.jpg") for row in range(6)]
    target = make_target(tmp_path / "out", batch, records)
    target.create()
    stored = encode_batch(target, batch)
    target.write(0, stored[:2])
    if resumed:
        target.close()
        target = make_target(tmp_path / "out", batch, records)
        target.reopen()
    interfere(target.partial, victim)

    def finish():
        target.write(2, stored[2:])
        target.sync()
        target.publish()

    with pytest.raises(StoppedError):
        finish()
    target.close()
    assert tree(victim) == before
    assert not (tmp_path / "out").exists()


def test_link_in_place_of_the_partial_is_not_resumed(tmp_path):
    batch = pixels(2)
    write_target(tmp_path / "out", batch).close()
    (tmp_path / "victim").mkdir()
    swap_for_link(tmp_path / "out.partial", tmp_path / "victim")
    with pytest.raises((ResumeError, StoppedError)):
        make_target(tmp_path / "out", batch).reopen()
    assert names_in(tmp_path / "victim") == []


def test_hard_link_in_the_partial_is_replaced_and_its_file_is_unchanged(tmp_path):
    batch = pixels(2)
    write_target(tmp_path / "out", batch).close()
    (tmp_path / "precious").write_bytes(b"precious")
    file = tmp_path / "out.partial" / "00000001.png"
    file.unlink()
    os.link(tmp_path / "precious", file)
    target = make_target(tmp_path / "out", batch)
    target.reopen()
    target.write(0, encode_batch(target, batch))
    target.publish()
    assert (tmp_path / "precious").read_bytes() == b"precious"
    assert target.read_back(0, 2).tobytes() == batch.tobytes()


def test_file_that_already_exists_in_a_new_directory_is_never_overwritten(tmp_path):
    batch = pixels(2)
    target = make_target(tmp_path / "out", batch)
    target.create()
    (target.partial / "00000001.png").write_bytes(b"precious")
    with pytest.raises(StoppedError) as caught:
        target.write(0, encode_batch(target, batch))
    check_error(caught.value, "00000001.png", "EEXIST")
    assert (target.partial / "00000001.png").read_bytes() == b"precious"
