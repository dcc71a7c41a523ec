"""The contract of every target; `tests.helpers.formats` describes the formats."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import numpy as np
import pytest

import fastvgg
from fastvgg.datasets.base import Header
from fastvgg.datasets.index import read_index
from fastvgg.datasets.open import open_source, open_target, target_format
from fastvgg.errors import FastvggError, ResumeError, SourceError, TargetError, VerificationError
from fastvgg.storage import objects
from fastvgg.storage.location import Location
from fastvgg.storage.objects import ObjectStorage
from fastvgg.stream.info import info
from fastvgg.stream.manifest import checksum, manifest_path, read_manifest
from tests.helpers.batches import KERAS_MODES, assert_same, dtype_of
from tests.helpers.datasets_on_disk import (
    check_error,
    commits_in,
    data_tree,
    images_in,
    names_in,
    network_inputs,
    pixels,
    plan_of,
    save_images,
    save_npy,
)
from tests.helpers.faults import InterruptedStorage, SimulatedCrash
from tests.helpers.formats import (
    TARGETS,
    change_byte,
    container,
    contents_of,
    data_files,
    payload_of,
)
from tests.helpers.runs import run
from tests.helpers.tar_on_disk import save_tar

CHUNK = 2
DTYPES = [(name, dtype) for name, form in TARGETS.items() for dtype in form.dtypes]
ARRAYS = [name for name, form in TARGETS.items() if form.is_array]
ON_DISK = [name for name, form in TARGETS.items() if not form.is_remote]

every_format = pytest.mark.parametrize("name", TARGETS)
every_array = pytest.mark.parametrize("name", ARRAYS)


def batch_of(dtype, images=7, height=7, width=9):
    return pixels(images, height, width).astype(dtype_of(dtype))


def make_target(location, name, batch):
    header = Header(batch.shape, str(batch.dtype), "NHWC")
    options = TARGETS[name].options
    return open_target(Location.parse(location), header, chunk_images=CHUNK, **options)


def write(target, batch, *starts):
    """Write chunks of a batch, each followed by a sync."""
    for start in starts or range(0, len(batch), CHUNK):
        target.write(start, payload_of(target, batch[start : start + CHUNK]))
        target.sync()


def publish_target(location, name, batch):
    target = make_target(location, name, batch)
    target.create()
    write(target, batch)
    target.publish()
    return target


def files_below(directory, name):
    """Return the content of every file or object in a directory, by name."""
    root = container(f"memory://{directory}") if TARGETS[name].is_remote else directory
    if TARGETS[name].is_remote:
        return {key: (root / key).read_bytes() for key in objects.list_objects(root)}
    return {
        str(file.relative_to(root)): file.read_bytes() for file in root.rglob("*") if file.is_file()
    }


# The interface


@pytest.mark.parametrize(("name", "dtype"), DTYPES)
def test_written_data_reads_back_and_matches_the_format_library(tmp_path, name, dtype):
    expected, form = batch_of(dtype), TARGETS[name]
    location = form.location(tmp_path)
    target = make_target(location, name, expected)
    assert target_format(Location.parse(location)) == form.kind
    target.create()
    write(target, expected, 4, 0, 6, 2)
    with pytest.raises(SourceError):
        open_source(Location.parse(location))
    if not form.is_remote:
        assert names_in(tmp_path) == [target.partial.name]
    target.publish()
    target.close()
    if not form.is_remote:
        assert names_in(tmp_path) == [target.path.name]
    actual = form.load(location, dtype)
    assert actual.tobytes() == expected.tobytes()
    assert actual.shape == expected.shape
    for start, stop in ((0, 7), (1, 4), (2, 4), (6, 7)):
        assert_same(target.read_back(start, stop), expected[start:stop])
        stored = b"".join(bytes(data) for data in target.stored_spans(start, stop, 100))
        written = b"".join(bytes(data) for data in payload_of(target, expected[start:stop]))
        assert stored == written


@every_format
def test_rows_can_be_rewritten(tmp_path, name):
    expected = batch_of("uint8")
    target = make_target(TARGETS[name].location(tmp_path), name, expected)
    target.create()
    write(target, expected[::-1].copy())
    write(target, expected)
    target.publish()
    assert_same(target.read_back(0, 7), expected)


@every_format
def test_interrupted_target_can_be_reopened(tmp_path, name):
    expected, location = batch_of("uint8"), TARGETS[name].location(tmp_path)
    first = make_target(location, name, expected)
    first.create()
    write(first, expected, 0, 4)
    first.close()
    second = make_target(location, name, expected)
    second.reopen()
    unfinished = b"".join(map(bytes, second.unfinished().stored_spans(4, 6, 100)))
    assert unfinished == b"".join(map(bytes, payload_of(second, expected[4:6])))
    write(second, expected, 2, 6)
    second.publish()
    assert_same(second.read_back(0, 7), expected)
    (tmp_path / "other").mkdir()
    publish_target(TARGETS[name].location(tmp_path / "other"), name, expected)
    found = files_below(tmp_path, name)
    assert {key: found[key] for key in found if not key.startswith("other/")} == files_below(
        tmp_path / "other", name
    )


@every_format
def test_create_discards_an_earlier_partial_target(tmp_path, name):
    location = TARGETS[name].location(tmp_path)
    longer = make_target(location, name, batch_of("uint8", 12))
    longer.create()
    write(longer, batch_of("uint8", 12))
    longer.close()
    publish_target(location, name, batch_of("uint8"))
    assert len(data_files(location)) == {"images": 7, "zarr": 4}.get(TARGETS[name].kind, 1)
    assert_same(TARGETS[name].load(location, "uint8"), batch_of("uint8"))


@pytest.mark.parametrize("name", ON_DISK)
def test_target_cannot_be_reopened_before_it_is_created(tmp_path, name):
    target = make_target(TARGETS[name].location(tmp_path), name, batch_of("uint8"))
    with pytest.raises(ResumeError) as caught:
        target.reopen()
    check_error(caught.value, target.partial, "restart")
    assert names_in(tmp_path) == []


@pytest.mark.parametrize("name", ON_DISK)
def test_publish_does_not_touch_similarly_named_files(tmp_path, name):
    location = TARGETS[name].location(tmp_path)
    neighbor = tmp_path / f"{container(location).name}.fastvgg-replaced"
    neighbor.mkdir()
    (neighbor / "keep.txt").write_text("precious")
    publish_target(location, name, batch_of("uint8"))
    assert (neighbor / "keep.txt").read_text() == "precious"


@every_array
@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_shared_writers_write_the_same_bytes_as_one_writer(tmp_path, name, dtype):
    # A chunk has several pages, and shares the pages at its ends with its neighbors.
    expected = batch_of(dtype, 11, 37, 41)
    single, shared = tmp_path / "single", tmp_path / "shared"
    single.mkdir()
    shared.mkdir()
    publish_target(TARGETS[name].location(single), name, expected)
    location = TARGETS[name].location(shared)
    first, second = (make_target(location, name, expected) for _ in range(2))
    first.create()
    second.attach()
    edges = []
    for start in range(0, 11, CHUNK):
        writer = second if start % (2 * CHUNK) else first
        edges += writer.write_aligned(start, payload_of(writer, expected[start : start + CHUNK]))
        writer.sync()
    assert (edges == []) == TARGETS[name].is_sharded
    assert sum(len(data) for _, data in edges) <= 12 * mmap.PAGESIZE
    second.close()
    first.write_unaligned(edges)
    first.sync()
    first.publish()
    assert files_below(shared, name) == files_below(single, name)
    assert_same(first.read_back(0, 11), expected)


@pytest.mark.parametrize("name", ["npy", "hdf5"])
@pytest.mark.parametrize(("height", "width"), [(7, 9), (37, 41)], ids=["a page", "several pages"])
def test_shared_writer_writes_only_whole_pages(tmp_path, name, height, width):
    expected = batch_of("uint8", 7, height, width)
    target = make_target(TARGETS[name].location(tmp_path), name, expected)
    target.create()
    edges = target.write_aligned(2, payload_of(target, expected[2:4]))
    target.sync()
    target.close()
    content = bytearray(target.partial.read_bytes())
    begin, end = target.offset(2), target.offset(4)
    first, last = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE, end // mmap.PAGESIZE * mmap.PAGESIZE
    assert not any(content[target.offset(0) : max(begin, first)])
    assert not any(content[max(begin, last) :])
    for offset, data in edges:
        content[offset : offset + len(data)] = data
    assert content[begin:end] == expected[2:4].tobytes()
    assert not any(content[target.offset(0) : begin])
    assert not any(content[end:])


# Runs


def save_source(directory, images=11, seed=1):
    return save_npy(directory / "x.npy", pixels(images, seed=seed))


def make_plan(directory, name, *, images_per_chunk=CHUNK, **settings):
    """Plan to preprocess x.npy, or to restore it if the target is image files."""
    form, source = TARGETS[name], directory / "x.npy"
    if not form.is_array:
        source = save_npy(directory / "z.npy", network_inputs(np.load(source), "tf"))
        os.utime(source, ns=(0, 0))  # the same fingerprint each time it is written
        settings = {"direction": "restore", "mode": "tf", **settings}
        settings["format"] = form.options["file_format"]
    settings = {"mode": "caffe", "fsync": False, **settings}
    return plan_of(source, form.location(directory), images_per_chunk=images_per_chunk, **settings)


def expected_of(directory, name, mode="caffe"):
    batch = np.load(directory / "x.npy")
    return network_inputs(batch, mode) if TARGETS[name].is_array else batch


def load_target(directory, name):
    dtype = "float32" if TARGETS[name].is_array else "uint8"
    return TARGETS[name].load(TARGETS[name].location(directory), dtype)


class InterruptedObjectStorage(ObjectStorage):
    """Object storage whose client crashes after a number of commits."""

    def __init__(self, commits):
        self._left = commits + 1  # and the header of the journal

    def put(self, path, data):
        self._left -= path.parent.name.endswith(".fastvgg-journal")
        if self._left < 0:
            raise SimulatedCrash
        super().put(path, data)


def interrupt_run(directory, name, commits=2, images=11):
    save_source(directory, images)
    storage = (InterruptedObjectStorage if TARGETS[name].is_remote else InterruptedStorage)(commits)
    with pytest.raises(SimulatedCrash):
        run(make_plan(directory, name), storage=storage)


@every_array
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("mode", KERAS_MODES)
def test_every_mode_and_dtype_round_trips(tmp_path, name, mode, dtype):
    if dtype not in TARGETS[name].dtypes:
        with pytest.raises(TargetError, match=dtype):
            plan_of(save_source(tmp_path), TARGETS[name].location(tmp_path), mode=mode, dtype=dtype)
        return
    form = TARGETS[name]
    forward, back = form.location(tmp_path), form.location(tmp_path, "back")
    settings = {"mode": mode, "dtype": dtype, "images_per_chunk": 4, "fsync": False}
    plan_of(save_source(tmp_path), forward, **settings).run()
    expected = network_inputs(pixels(11), mode, dtype=dtype)
    actual = form.load(forward, dtype)
    assert actual.tobytes() == expected.tobytes()
    assert actual.shape == expected.shape
    plan_of(forward, back, direction="restore", images_per_chunk=4, fsync=False).run()
    assert_same(form.load(back, "uint8"), pixels(11))
    for location in (forward, back):
        assert fastvgg.verify(location, full=True).recomputed_images == 11


@every_format
def test_run_writes_a_verified_dataset_and_its_manifest(tmp_path, name):
    save_source(tmp_path)
    location = TARGETS[name].location(tmp_path)
    make_plan(tmp_path, name).run()
    assert_same(load_target(tmp_path, name), expected_of(tmp_path, name))
    verified = fastvgg.verify(location, full=True)
    assert (verified.images, verified.chunks, verified.recomputed_images) == (11, 6, 11)
    manifest = read_manifest(container(location))
    target = open_target(
        Location.parse(location), manifest.header, chunk_images=CHUNK, **TARGETS[name].options
    )
    expected = [
        checksum(target.stored_spans(start, min(11, start + CHUNK), 100))
        for start in range(0, 11, CHUNK)
    ]
    assert [*manifest.checksums] == expected
    described = info(location)
    assert (described["state"], described["kind"]) == ("finished", TARGETS[name].kind)
    left = {key.split("/")[0] for key in files_below(tmp_path, name)} - {"x.npy", "z.npy"}
    path = container(location)
    assert left == {path.name, manifest_path(path).name}


@every_format
def test_rerun_of_a_finished_target_recomputes_nothing(tmp_path, name):
    save_source(tmp_path)
    make_plan(tmp_path, name).run()
    before = files_below(tmp_path, name)
    assert make_plan(tmp_path, name).run().counts["computed_chunks"] == 0
    assert files_below(tmp_path, name) == before


@every_format
def test_output_does_not_depend_on_chunks_or_threads(tmp_path, name):
    found = []
    for images_per_chunk, threads in ((2, 1), (2, 3), (4, 2), (11, 1)):
        if TARGETS[name].is_sharded and images_per_chunk != 2:
            continue  # a chunk is a shard
        directory = tmp_path / f"{images_per_chunk}-{threads}"
        directory.mkdir()
        save_source(directory)
        make_plan(directory, name, images_per_chunk=images_per_chunk, threads=threads).run()
        found.append(contents_of(TARGETS[name].location(directory)).values())
    assert all([*content] == [*found[0]] for content in found)


@every_format
def test_verify_reports_the_chunk_of_a_flipped_bit(tmp_path, name):
    save_source(tmp_path)
    location = TARGETS[name].location(tmp_path)
    make_plan(tmp_path, name).run()
    files = data_files(location)
    image_bytes = 7 * 9 * 3 * 4
    for number, file in enumerate(files):
        content = file.read_bytes()
        begin = len(content) - 11 * image_bytes if len(files) == 1 else 0
        step = max(1, (len(content) - begin) // (12 if len(files) == 1 else 3))
        for at in (*range(begin, len(content), step), len(content) - 1):
            change_byte(file, at)
            with pytest.raises((VerificationError, SourceError)) as caught:
                fastvgg.verify(location)
            check_error(caught.value, container(location))
            row = {1: (at - begin) // image_bytes, 11: number}.get(len(files), CHUNK * number)
            first = row - row % CHUNK
            rows = f"images {first} to {first + CHUNK - 1} " if first < 10 else "image 10 "
            assert rows in str(caught.value) or file.name in str(caught.value)
            file.write_bytes(content)
    fastvgg.verify(location, full=True)


@pytest.mark.parametrize(
    ("name", "damage"),
    # HDF5 ignores bytes after the end of its own structures.
    [
        (name, damage)
        for name in TARGETS
        for damage in ("missing", "empty", "a byte less", "a byte more")
        if (name, damage) != ("hdf5", "a byte more")
    ],
)
def test_damaged_finished_target_is_detected(tmp_path, name, damage):
    save_source(tmp_path)
    location = TARGETS[name].location(tmp_path)
    make_plan(tmp_path, name).run()
    file = data_files(location)[0]
    content = file.read_bytes()
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes({"empty": b"", "a byte less": content[:-1]}.get(damage, content + b"\0"))
    attempts = [lambda: fastvgg.verify(location)]
    # A rerun reads the header and the first image of an array; it creates a missing file.
    if TARGETS[name].is_array and (damage != "missing" or TARGETS[name].is_sharded):
        attempts.append(lambda: make_plan(tmp_path, name).run())
    for attempt in attempts:
        with pytest.raises((VerificationError, SourceError)) as caught:
            attempt()
        check_error(caught.value, container(location))


@every_array
def test_replaced_array_is_rejected_as_the_target(tmp_path, name):
    save_source(tmp_path)
    location = TARGETS[name].location(tmp_path)
    for other in (
        batch_of("float64", 11),
        batch_of("float32", 10),
        batch_of("float32", 11, 9, 7),
    ):
        make_plan(tmp_path, name, restart=True).run()
        for file in data_files(location):
            file.unlink()
        TARGETS[name].save(location, other, **({"overwrite": True} if "zarr" in name else {}))
        for attempt in (lambda: fastvgg.verify(location), lambda: make_plan(tmp_path, name).run()):
            with pytest.raises((SourceError, VerificationError)) as caught:
                attempt()
            check_error(caught.value, container(location), str(other.shape))
        for file in (container(location), manifest_path(container(location))):
            objects.remove(file) if TARGETS[name].is_remote else remove(file)


def remove(path):
    if path.is_dir():
        for file in sorted(path.rglob("*"), reverse=True):
            file.rmdir() if file.is_dir() else file.unlink()
        path.rmdir()
    else:
        path.unlink()


@every_format
def test_interrupted_run_publishes_nothing_and_resumes(tmp_path, name):
    interrupt_run(tmp_path, name)
    location = TARGETS[name].location(tmp_path)
    assert commits_of(location) == 2
    with pytest.raises(FastvggError):
        open_source(Location.parse(location))
    described = info(location)
    assert (described["state"], described["committed_chunks"], described["chunks"]) == (
        "unfinished",
        2,
        6,
    )
    assert make_plan(tmp_path, name).run().counts["computed_chunks"] == 4
    assert_same(load_target(tmp_path, name), expected_of(tmp_path, name))
    fastvgg.verify(location, full=True)


def commits_of(location):
    """The number of committed chunks of an unfinished run."""
    if Location.parse(location).is_remote:
        return info(location)["committed_chunks"]
    return commits_in(container(location))


@pytest.mark.parametrize(
    ("name", "damage"),
    [(name, damage) for name, form in TARGETS.items() for damage in form.damages],
)
def test_damaged_partial_target_is_rejected_and_restart_replaces_it(tmp_path, name, damage):
    interrupt_run(tmp_path, name)
    path = container(TARGETS[name].location(tmp_path))
    partial = path.with_name(f"{path.name}.partial")
    TARGETS[name].damages[damage](partial)
    before = files_below(tmp_path, name)
    with pytest.raises(ResumeError) as caught:
        make_plan(tmp_path, name).run()
    check_error(caught.value, partial, "restart")
    assert caught.value.exit_code == 3
    assert files_below(tmp_path, name) == before
    make_plan(tmp_path, name, restart=True).run()
    assert_same(load_target(tmp_path, name), expected_of(tmp_path, name))


@pytest.mark.parametrize(
    ("name", "damage"),
    [(name, damage) for name, form in TARGETS.items() for damage in form.repairable_damages],
)
def test_chunk_damaged_after_its_commit_is_recomputed(tmp_path, name, damage):
    interrupt_run(tmp_path, name, commits=3)
    path = container(TARGETS[name].location(tmp_path))
    partial = path if TARGETS[name].is_remote else path.with_name(f"{path.name}.partial")
    TARGETS[name].repairable_damages[damage](partial)
    seen = []
    report = run(make_plan(tmp_path, name), seen.append)
    assert (report.counts["computed_chunks"], report.damaged_chunks) == (4, 1)
    assert "1 chunk changed since, computed again" in str(report)
    computed = [progress.images for progress in seen if progress.computed_images]
    assert computed == [6, 8, 10, 11]
    assert {progress.images for progress in seen[: -len(computed)]} <= {*range(1, 7)}
    assert_same(load_target(tmp_path, name), expected_of(tmp_path, name))
    fastvgg.verify(TARGETS[name].location(tmp_path), full=True)


# Existing datasets


@pytest.mark.parametrize("restart", [False, True])
@every_format
def test_foreign_data_is_never_replaced(tmp_path, name, restart):
    save_source(tmp_path)
    location = TARGETS[name].location(tmp_path)
    if TARGETS[name].kind == "hdf5":  # another dataset of the file counts, too
        TARGETS[name].save(location.replace("deep", "other"), pixels(3, seed=2))
    else:
        TARGETS[name].save(location, pixels(3, seed=2))
    before = files_below(tmp_path, name)
    with pytest.raises(TargetError) as caught:
        make_plan(tmp_path, name, restart=restart)
    message = "did not write" if restart else "was not written by fastvgg"
    check_error(caught.value, container(location), message, "another name")
    found = files_below(tmp_path, name)
    assert {key: found[key] for key in before} == before


@every_format
def test_only_restart_replaces_a_finished_target(tmp_path, name):
    save_source(tmp_path)
    make_plan(tmp_path, name).run()
    save_source(tmp_path, 7, seed=3)
    with pytest.raises(TargetError) as caught:
        make_plan(tmp_path, name)
    check_error(caught.value, container(TARGETS[name].location(tmp_path)), "exists", "restart")
    make_plan(tmp_path, name, restart=True).run()
    assert_same(load_target(tmp_path, name), expected_of(tmp_path, name))
    manifest_path(container(TARGETS[name].location(tmp_path))).unlink()
    for restart in (False, True):
        with pytest.raises(TargetError):
            make_plan(tmp_path, name, restart=restart)


@every_format
def test_unfinished_run_resumes_only_with_the_same_settings(tmp_path, name):
    interrupt_run(tmp_path, name)
    before = files_below(tmp_path, name)
    with pytest.raises(ResumeError) as caught:
        make_plan(tmp_path, name, mode="torch")
    check_error(caught.value, "restart")
    assert files_below(tmp_path, name) == before


# Images


@pytest.fixture(params=["images", "tar"])
def photos(request, tmp_path):
    """Eleven images, one of them truncated, and a function that repairs it."""
    folder = tmp_path / "photos"
    names = [f"{'ab'[row // 6]}/{row:02d}.png" for row in range(11)]
    save_images(folder, pixels(11), names)
    torn = folder / names[4]
    whole = torn.read_bytes()
    torn.write_bytes(whole[:60])
    packed = tmp_path / "photos.tar"

    def repair():
        torn.write_bytes(whole)
        save_tar(packed, [(name, (folder / name).read_bytes()) for name in names])

    save_tar(packed, [(name, (folder / name).read_bytes()) for name in names])
    return (folder if request.param == "images" else packed), repair


def inodes(location):
    """The inode of every file of an array on disk, by name; empty for an object store."""
    path = container(location)
    files = [path, *path.rglob("*")] if isinstance(path, Path) else []
    return {file.name: file.stat().st_ino for file in files if file.is_file()}


@every_array
def test_images_keep_their_names_and_failures_are_retried(tmp_path, photos, name):
    source, repair = photos
    form, expected = TARGETS[name], pixels(11)
    expected[4] = 0
    packed, inputs = form.location(tmp_path, "packed-y"), form.location(tmp_path)
    settings = {"direction": "pack", "images_per_chunk": 3, "fsync": False}
    assert plan_of(source, packed, **settings).run().counts["failed"] == 1
    assert_same(form.load(packed, "uint8"), expected)
    index = [*read_index(container(packed), 11)]
    assert [record.failed for record in index] == [row == 4 for row in range(11)]
    plan_of(packed, inputs, mode="torch", images_per_chunk=4).run()
    assert [*read_index(container(inputs), 11)] == index
    plan_of(inputs, tmp_path / "out", direction="restore").run()
    found = images_in(tmp_path / "out")
    assert [*found] == [record.path for record in index if not record.failed]
    assert_same(np.stack([*found.values()]), expected[[*range(4), *range(5, 11)]])
    for location in (packed, inputs, tmp_path / "out"):
        fastvgg.verify(location, full=True)
    before = inodes(packed)
    repair()
    counts = plan_of(source, packed, retry_failed=True, **settings).run().counts
    # Every row's identity includes the mtime of its shard, so no row is known to be unchanged.
    computed = 1 if source.is_dir() else 4
    assert counts == {"images": 11, "failed": 0, "chunks": 4, "computed_chunks": computed}
    replaced = dict(inodes(packed).items() - before.items())  # a shard is a file of its own
    assert len(replaced) <= computed * form.is_sharded
    assert_same(form.load(packed, "uint8"), pixels(11))
    assert not any(record.failed for record in read_index(container(packed), 11))
    fastvgg.verify(packed, full=True)
    if not form.is_remote:
        (tmp_path / "fresh").mkdir()
        plan_of(source, form.location(tmp_path / "fresh", "packed-y"), **settings).run()
        left = {key: data for key, data in data_tree(tmp_path).items() if b"packed-y" in key}
        fresh = data_tree(tmp_path / "fresh")
        assert {key for key in left if not key.startswith(b"fresh/")} == fresh.keys()
        assert all(left[key] == fresh[key] for key in fresh if not key.endswith(b".json"))
