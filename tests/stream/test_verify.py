"""Verification: valid datasets pass, and any wrong byte is detected and located."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import xxhash
from PIL import Image

import fastvgg
from fastvgg.datasets import contiguous
from fastvgg.datasets.index import index_path
from fastvgg.errors import FastvggError, SourceError, VerificationError
from fastvgg.storage.location import Location
from fastvgg.stream.manifest import manifest_path, read_manifest
from fastvgg.stream.recompute import SAMPLED_IMAGES
from tests.helpers.batches import KERAS_MODES
from tests.helpers.checkout import checkout_environment
from tests.helpers.datasets_on_disk import (
    check_error,
    images_in,
    npy_bytes,
    pixels,
    plan_of,
    save_images,
    save_npy,
)
from tests.helpers.faults import UnreadableFileOs
from tests.helpers.runs import interrupt_run, preprocessed


@pytest.fixture
def stored(tmp_path):
    """Eleven images in chunks of four."""
    source = save_npy(tmp_path / "x.npy", pixels(11))
    plan_of(source, tmp_path / "y.npy", mode="caffe", images_per_chunk=4).run()
    return tmp_path / "y.npy"


@pytest.fixture
def restored(tmp_path, stored):
    plan_of(stored, tmp_path / "out", direction="restore", images_per_chunk=4).run()
    return tmp_path / "out"


@pytest.mark.parametrize("full", [False, True])
def test_valid_dataset_passes_verification(stored, full):
    actual = fastvgg.verify(stored, full=full)
    assert actual.path == str(stored)
    assert (actual.images, actual.chunks) == (11, 3)
    assert actual.recomputed_images == 11
    assert actual.note == ""
    assert "11 images in 3 chunks" in str(actual)


@pytest.mark.parametrize("images", [1, 2, 16, 17, 67])
def test_verify_recomputes_sixteen_images_or_all_if_full(tmp_path, images):
    source = save_npy(tmp_path / "x.npy", pixels(images))
    plan_of(source, tmp_path / "y.npy", mode="tf", images_per_chunk=5).run()
    sampled = fastvgg.verify(tmp_path / "y.npy").recomputed_images
    assert sampled == min(SAMPLED_IMAGES, images)
    assert fastvgg.verify(tmp_path / "y.npy", full=True).recomputed_images == images


@pytest.mark.parametrize("mode", KERAS_MODES)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
def test_every_mode_dtype_and_layout_can_be_verified(tmp_path, mode, dtype, layout):
    source = save_npy(tmp_path / "x.npy", pixels(5))
    settings = {"mode": mode, "dtype": dtype, "out_layout": layout}
    plan_of(source, tmp_path / "y.npy", images_per_chunk=2, **settings).run()
    assert fastvgg.verify(tmp_path / "y.npy", full=True).recomputed_images == 5
    plan_of(tmp_path / "y.npy", tmp_path / "z.npy", images_per_chunk=2, direction="restore").run()
    assert fastvgg.verify(tmp_path / "z.npy", full=True).recomputed_images == 5


def test_dataset_with_failed_images_can_be_verified(tmp_path):
    photos = save_images(tmp_path / "photos", pixels(5, 11, 13))
    (photos / "a" / "0.png").write_bytes(b"torn")
    plan_of(photos, tmp_path / "y.npy", mode="torch", size=(7, 9), images_per_chunk=2).run()
    assert fastvgg.verify(tmp_path / "y.npy", full=True).recomputed_images == 6
    for target in ("z.npy", "out"):
        plan_of(
            tmp_path / "y.npy", tmp_path / target, images_per_chunk=4, direction="restore"
        ).run()
        assert fastvgg.verify(tmp_path / target, full=True).recomputed_images == 6


def flip(path, bit):
    with path.open("r+b") as file:
        file.seek(bit // 8)
        byte = file.read(1)[0]
        file.seek(bit // 8)
        file.write(bytes([byte ^ 1 << bit % 8]))


@pytest.mark.parametrize("full", [False, True])
def test_flipped_data_bit_is_reported_with_its_chunk(stored, full):
    size = stored.stat().st_size
    chunks = {0: "images 0 to 3 ", 1: "images 4 to 7 ", 2: "images 8 to 10 "}
    bits = [128 * 8, size * 8 - 1, *range(128 * 8 + 5, size * 8, 1009)]
    for bit in bits:
        flip(stored, bit)
        with pytest.raises(VerificationError) as caught:
            fastvgg.verify(stored, full=full)
        check_error(caught.value, stored, chunks[(bit // 8 - 128) // (4 * 756)])
        assert caught.value.exit_code == 4
        flip(stored, bit)
    fastvgg.verify(stored, full=full)


def test_flipped_header_bit_is_detected_or_harmless(stored):
    expected = stored.read_bytes()
    for bit in range(0, 128 * 8, 3):
        flip(stored, bit)
        try:
            fastvgg.verify(stored)
        except FastvggError as error:
            check_error(error, stored)
        else:  # one white-space character became another
            assert np.load(stored).tobytes() == expected[128:]
        flip(stored, bit)
    assert stored.read_bytes() == expected


def test_same_bytes_with_another_shape_are_rejected(stored):
    stored.write_bytes(npy_bytes(np.load(stored).reshape(11, 9, 7, 3)))
    with pytest.raises(FastvggError) as caught:
        fastvgg.verify(stored)
    check_error(caught.value, stored, "(11, 9, 7, 3)", "(11, 7, 9, 3)")


def test_same_bytes_with_another_dtype_are_rejected(tmp_path, stored):
    (tmp_path / "x.npy").unlink()  # so that nothing can be recomputed
    stored.write_bytes(npy_bytes(np.load(stored).view(np.float16).reshape(11, 14, 9, 3)))
    with pytest.raises(FastvggError):
        fastvgg.verify(stored)


@pytest.mark.parametrize(("nbytes", "damaged"), [(1, []), (-1, [2]), (-5000, [1, 2])])
def test_dataset_of_wrong_length_is_reported_with_what_is_damaged(stored, nbytes, damaged):
    size = stored.stat().st_size
    os.truncate(stored, size + nbytes)
    with pytest.raises(VerificationError) as caught:
        fastvgg.verify(stored)
    check_error(caught.value, stored, size, size + nbytes)
    assert [chunk.chunk for chunk in caught.value.damaged] == damaged
    (difference,) = caught.value.differences
    assert ("truncated" if nbytes < 0 else "followed by other bytes") in difference


def test_wrong_checksums_are_detected(stored):
    manifest = json.loads(manifest_path(stored).read_bytes())
    manifest["checksums"][2] = "0" * 16
    manifest_path(stored).write_text(json.dumps(manifest))
    with pytest.raises(VerificationError, match="images 8 to 10 "):
        fastvgg.verify(stored)


@pytest.mark.parametrize("change", ["fewer", "more", "none"])
def test_manifest_with_a_wrong_number_of_checksums_is_rejected(stored, change):
    manifest = json.loads(manifest_path(stored).read_bytes())
    checksums = manifest["checksums"]
    manifest["checksums"] = {"fewer": checksums[:-1], "more": [*checksums, "0" * 16], "none": []}[
        change
    ]
    manifest_path(stored).write_text(json.dumps(manifest))
    with pytest.raises(FastvggError):
        fastvgg.verify(stored)


def test_source_with_another_mtime_is_reported_as_not_compared(tmp_path, stored):
    os.utime(tmp_path / "x.npy", ns=(0, 1))
    actual = fastvgg.verify(stored)
    assert actual.recomputed_images == 0
    assert str(tmp_path / "x.npy") in actual.note
    assert "has changed" in actual.note
    assert "has changed" in str(actual)
    assert fastvgg.verify(stored, full=True).recomputed_images == 11


def test_full_verify_detects_a_changed_source_image(tmp_path, stored):
    batch = pixels(11)
    batch[6, 3, 5, 1] ^= 1
    save_npy(tmp_path / "x.npy", batch)
    os.utime(tmp_path / "x.npy", ns=(0, 1))
    assert fastvgg.verify(stored).recomputed_images == 0
    with pytest.raises(VerificationError) as caught:
        fastvgg.verify(stored, full=True)
    check_error(caught.value, stored, "image 6 ", tmp_path / "x.npy")


@pytest.mark.parametrize("full", [False, True])
def test_missing_source_is_reported_as_not_compared(tmp_path, stored, full):
    (tmp_path / "x.npy").unlink()
    actual = fastvgg.verify(stored, full=full)
    assert (actual.chunks, actual.recomputed_images) == (3, 0)
    assert "not compared" in actual.note
    assert str(tmp_path / "x.npy") in actual.note


def test_sidecars_of_the_source_are_ignored(tmp_path, stored):
    manifest_path(tmp_path / "x.npy").write_bytes(b"not a manifest")
    assert fastvgg.verify(stored).recomputed_images == 11


def test_source_of_another_shape_is_reported_as_not_compared(tmp_path, stored):
    save_npy(tmp_path / "x.npy", pixels(5))
    assert "has changed" in fastvgg.verify(stored, full=True).note


def test_moved_dataset_can_be_verified(tmp_path, stored):
    (tmp_path / "elsewhere").mkdir()
    for path in (stored, manifest_path(stored)):
        path.rename(tmp_path / "elsewhere" / path.name)
    assert fastvgg.verify(tmp_path / "elsewhere" / "y.npy", full=True).recomputed_images == 11


def test_wrong_bytes_with_matching_checksums_are_detected_by_recomputation(stored):

    flip(stored, (128 + 5 * 756) * 8)
    chunk = stored.read_bytes()[128:][4 * 756 : 8 * 756]
    manifest = json.loads(manifest_path(stored).read_bytes())
    manifest["checksums"][1] = xxhash.xxh3_64_hexdigest(chunk)
    manifest_path(stored).write_text(json.dumps(manifest))
    with pytest.raises(VerificationError) as caught:
        fastvgg.verify(stored)
    check_error(caught.value, stored, "image 5 ", "differs in 1 of 756 bytes")


@pytest.mark.parametrize("full", [False, True])
def test_directory_of_images_is_verified(restored, full):
    actual = fastvgg.verify(restored, full=full)
    assert (actual.images, actual.chunks, actual.recomputed_images) == (11, 3, 11)


def test_changed_pixel_of_an_image_file_is_reported_with_its_chunk(restored):
    image = images_in(restored)["00000009.png"].copy()
    image[6, 8, 2] ^= 1
    Image.fromarray(image).save(restored / "00000009.png")
    with pytest.raises(VerificationError) as caught:
        fastvgg.verify(restored)
    check_error(caught.value, restored, "images 8 to 10 ")


def test_reencoded_image_file_is_detected(restored):
    image = images_in(restored)["00000009.png"]
    Image.fromarray(image).save(restored / "00000009.png", compress_level=1)
    with pytest.raises(VerificationError) as caught:
        fastvgg.verify(restored)
    check_error(caught.value, restored, "images 8 to 10 ")


@pytest.mark.parametrize("change", ["removed", "torn", "grey", "smaller", "one pixel"])
def test_changed_or_missing_image_file_is_detected(restored, change):
    path = restored / "00000009.png"
    image = Image.open(path)
    image.load()
    if change == "removed":
        path.unlink()
    elif change == "torn":
        path.write_bytes(path.read_bytes()[:100])
    elif change == "grey":
        image.convert("L").save(path)
    else:
        image.resize((5, 5) if change == "smaller" else (1, 1)).save(path)
    with pytest.raises(FastvggError) as caught:
        fastvgg.verify(restored)
    check_error(caught.value, restored)


def test_missing_file_of_a_black_image_is_detected(tmp_path):
    source = save_npy(tmp_path / "x.npy", np.zeros((5, 7, 9, 3), np.uint8))
    plan_of(source, tmp_path / "y.npy", mode="caffe").run()
    plan_of(tmp_path / "y.npy", tmp_path / "out", direction="restore").run()
    (tmp_path / "out" / "00000002.png").unlink()
    with pytest.raises(FastvggError) as caught:
        fastvgg.verify(tmp_path / "out")
    check_error(caught.value, tmp_path / "out")


@pytest.mark.parametrize("name", ["x.npy", "nothing.npy", "nothing"])
def test_dataset_without_a_manifest_cannot_be_verified(tmp_path, stored, name):
    with pytest.raises(SourceError) as caught:
        fastvgg.verify(tmp_path / name)
    words = "has no manifest" if name == "x.npy" else "does not exist"
    check_error(caught.value, tmp_path / name, words)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 100,
        b"[]",
        b'{"fastvgg-manifest": 1}',
        b'{"fastvgg-manifest": 3}',
        b'{"fastvgg-manifest": 3, "job": {}}',
        b"\xff\xfe",
        "half",
    ],
)
def test_damaged_manifest_is_rejected(stored, content):
    path = manifest_path(stored)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] if content == "half" else content)
    with pytest.raises(SourceError) as caught:
        fastvgg.verify(stored)
    check_error(caught.value, path)


def test_malformed_manifest_field_raises_only_typed_errors(stored):
    path = manifest_path(stored)
    whole = json.loads(path.read_bytes())

    def places(value, place=()):
        yield place
        if isinstance(value, dict):
            for key in value:
                yield from places(value[key], (*place, key))

    for place in list(places(whole))[1:]:
        for wrong in (None, -1, "x", [], {}, [1, 2], 0):
            fields = json.loads(json.dumps(whole))
            inside = fields
            for key in place[:-1]:
                inside = inside[key]
            inside[place[-1]] = wrong
            path.write_text(json.dumps(fields))
            try:
                fastvgg.verify(stored)
            except FastvggError as error:
                check_error(error)


def test_missing_dataset_fails_verification(stored, restored):
    stored.unlink()
    with pytest.raises(SourceError) as caught:
        fastvgg.verify(stored)
    check_error(caught.value, stored)
    shutil.rmtree(restored)
    with pytest.raises(FastvggError):
        fastvgg.verify(restored)


def test_index_of_wrong_length_is_rejected(tmp_path):
    photos = save_images(tmp_path / "photos", pixels(5))
    plan_of(photos, tmp_path / "y.npy", mode="caffe").run()
    lines = index_path(tmp_path / "y.npy").read_text(encoding="utf-8").splitlines()
    index_path(tmp_path / "y.npy").write_text("\n".join(lines[:-1]) + "\n", encoding="utf-8")
    with pytest.raises(SourceError) as caught:
        fastvgg.verify(tmp_path / "y.npy")
    check_error(caught.value, index_path(tmp_path / "y.npy"))


def test_verify_writes_nothing(tmp_path, stored, restored):
    before = {path: path.stat().st_mtime_ns for path in [tmp_path, *tmp_path.rglob("*")]}
    fastvgg.verify(stored, full=True)
    fastvgg.verify(restored, full=True)
    assert {path: path.stat().st_mtime_ns for path in [tmp_path, *tmp_path.rglob("*")]} == before


def many_chunks(tmp_path, name="y.npy", images=25):
    """Return a dataset with a chunk per image."""
    source = save_npy(tmp_path / "x.npy", pixels(images))
    plan_of(source, tmp_path / name, mode="caffe", images_per_chunk=1).run()
    return Location.parse(tmp_path / name).container


@pytest.mark.parametrize("threads", [1, 2])
def test_all_damaged_chunks_are_listed_and_ten_are_shown(tmp_path, threads):
    stored = many_chunks(tmp_path)
    damaged = [0, 3, *range(5, 19)]
    for row in damaged:
        flip(stored, (128 + row * 756 + 7) * 8)
    with pytest.raises(VerificationError) as caught:
        fastvgg.verify(stored, threads=threads)
    found = caught.value.damaged
    assert [(chunk.chunk, chunk.start, chunk.stop) for chunk in found] == [
        (row, row, row + 1) for row in damaged
    ]
    assert all(chunk.reason.startswith("checksum ") for chunk in found)
    check_error(caught.value, stored, "16 of 25 chunks", "image 12 ", "and 6 more")
    assert "image 13 " not in caught.value.problem


@pytest.mark.parametrize("name", ["y.zarr", "out"])
def test_missing_and_unreadable_files_are_damaged_chunks(tmp_path, name):
    stored = many_chunks(tmp_path, "y.zarr")
    if name == "out":
        plan_of(stored, tmp_path / name, direction="restore", images_per_chunk=1).run()
        stored = tmp_path / name
    files = [f"c.{row}.0.0.0" if name == "y.zarr" else f"{row:08d}.png" for row in range(25)]
    (stored / files[3]).unlink()
    (stored / files[7]).unlink()
    (stored / files[7]).mkdir()
    (stored / files[9]).write_bytes((stored / files[9]).read_bytes()[:100])
    os.truncate(stored / files[11], 0)
    with pytest.raises(VerificationError) as caught:
        fastvgg.verify(stored, full=True)
    assert [chunk.chunk for chunk in caught.value.damaged] == [3, 7, 9, 11]


def test_images_that_differ_from_the_source_are_all_listed(tmp_path, stored):
    batch = pixels(11)
    for row in (1, 2, 6, 10):
        batch[row, 3, 5] ^= 1
    save_npy(tmp_path / "x.npy", batch)
    with pytest.raises(VerificationError) as caught:
        fastvgg.verify(stored, full=True)
    rows = [(chunk.chunk, chunk.start, chunk.stop) for chunk in caught.value.damaged]
    assert rows == [(0, 1, 3), (1, 6, 7), (2, 10, 11)]
    check_error(
        caught.value, "images 1 to 2 (2 of them differ; image 1 differs in ", "image 6 (differs in"
    )


def folder_dataset(tmp_path, target="y.npy"):
    """Return a dataset of images of which row 2 failed."""
    photos = save_images(tmp_path / "photos", pixels(7))
    (photos / "a" / "04.png").write_bytes(b"torn")
    plan_of(photos, tmp_path / target, mode="torch", images_per_chunk=2).run()
    return tmp_path / target


@pytest.mark.parametrize("target", ["y.npy", "y.zarr"])
def test_failed_rows_are_counted(tmp_path, target):
    actual = fastvgg.verify(folder_dataset(tmp_path, target), full=True)
    assert (actual.failed, actual.images) == (1, 7)
    assert "1 of them zeros, because decoding failed" in str(actual)


def test_failed_rows_that_are_not_zeros_are_damage(tmp_path):
    stored = folder_dataset(tmp_path)
    flip(stored, (128 + 2 * 756) * 8)
    manifest = json.loads(manifest_path(stored).read_bytes())
    manifest["checksums"][1] = xxhash.xxh3_64_hexdigest(stored.read_bytes()[128:][1512:3024])
    manifest_path(stored).write_text(json.dumps(manifest))
    shutil.rmtree(tmp_path / "photos")
    with pytest.raises(VerificationError) as caught:
        fastvgg.verify(stored)
    check_error(caught.value, "image 2 failed when it was made, but its row is not zeros")


def test_index_that_contradicts_the_manifest_is_a_difference(tmp_path):
    stored = folder_dataset(tmp_path)
    index = index_path(stored)
    whole = index.read_text()
    index.write_text(whole.replace(",failed,", ",ok,"))
    with pytest.raises(VerificationError) as caught:
        fastvgg.verify(stored)
    check_error(caught.value, index, "lists 0 failed images, but the manifest 1")
    index.unlink()
    with pytest.raises(VerificationError) as caught:
        fastvgg.verify(stored)
    assert caught.value.damaged == []
    check_error(caught.value, index, "is missing")


def test_progress_counts_every_check_up_to_the_total(stored):
    seen = []
    fastvgg.verify(stored, full=True, progress=seen.append, threads=2)
    assert max(progress.images for progress in seen) == 22
    assert {progress.total_images for progress in seen} == {22}
    assert seen[-1].read_bytes >= 11 * 756


def test_unfinished_dataset_is_reported_with_the_next_command(tmp_path):
    source = save_npy(tmp_path / "x.npy", pixels(5))
    target = interrupt_run(source, tmp_path / "y.npy", mode="caffe")
    with pytest.raises(SourceError) as caught:
        fastvgg.verify(target)
    check_error(caught.value, target, "is unfinished", "rerun the command that writes it")


def test_memory_bounds_what_verification_holds(tmp_path):
    source = tmp_path / "x.npy"
    np.lib.format.open_memmap(source, "w+", np.uint8, (160, 256, 256, 3))[:] = 7
    plan_of(source, tmp_path / "y.npy", mode="identity", dtype="float32").run()
    manifest = read_manifest(tmp_path / "y.npy")
    chunk_mib = manifest.chunk_images * manifest.header.image_bytes / 2**20
    limits = "memory='16MiB', threads=2, full=True"
    assert peak_mib(f"fastvgg.verify({str(tmp_path / 'y.npy')!r}, {limits})") < 25 < chunk_mib


def peak_mib(statement):
    """Return by how much a statement raises the peak memory of a process."""
    code = (
        "import resource, numpy, fastvgg, fastvgg.stream.verify\n"
        "def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024\n"
        f"before = peak()\n{statement}\nprint(peak() - before)"
    )
    environment = checkout_environment()
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    return float(done.stdout)


def test_memory_that_is_too_small_is_rejected_with_what_is_needed(tmp_path):
    stored = many_chunks(tmp_path, "y.zarr")
    with pytest.raises(SourceError) as caught:
        fastvgg.verify(stored, memory=1000)
    check_error(caught.value, stored, "memory", "MiB")


@pytest.mark.parametrize("full", [False, True])
def test_image_that_cannot_be_read_any_more_is_named_and_not_called_different(tmp_path, full):
    photos = save_images(tmp_path / "photos", pixels(11))
    plan_of(photos, tmp_path / "y.npy", mode="caffe", images_per_chunk=2).run()
    torn = photos / "b" / "03.png"
    before = torn.stat()
    torn.write_bytes(torn.read_bytes()[:60].ljust(before.st_size, b"?"))
    os.utime(torn, ns=(before.st_atime_ns, before.st_mtime_ns))
    found = fastvgg.verify(tmp_path / "y.npy", full=full)
    assert found.recomputed_images == 10
    assert "1 images that cannot be read any more" in found.note
    assert "image 7, b/03.png" in found.note


@pytest.mark.parametrize("full", [False, True])
def test_dataset_is_verified_without_a_source_that_cannot_be_read(tmp_path, monkeypatch, full):
    stored = preprocessed(tmp_path)
    monkeypatch.setattr(contiguous, "os", UnreadableFileOs(tmp_path / "x.npy"))
    found = fastvgg.verify(stored, full=full)
    assert found.recomputed_images == 0
    assert "compared with the source" in found.note
    assert "EIO" in found.note
