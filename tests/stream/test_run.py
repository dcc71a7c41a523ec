"""Runs from disk to disk: the same output as the oracle, and what is rejected."""

from __future__ import annotations

import datetime as dt
import errno
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import weakref
from importlib import metadata
from platform import python_version

import numpy as np
import pytest
import xxhash

import fastvgg
from fastvgg import engine, oracle
from fastvgg.datasets.base import ImageRecord
from fastvgg.datasets.index import INDEX_HEADER, format_records, index_path, read_index
from fastvgg.datasets.npy import NpySource
from fastvgg.errors import ResumeError, SourceError, StoppedError, TargetError, UsageError
from fastvgg.storage.local import Storage, file_system_type
from fastvgg.stream.commit_pipeline import CommitPipeline
from fastvgg.stream.journal import journal_path
from fastvgg.stream.manifest import manifest_path, read_manifest
from fastvgg.stream.run import run
from fastvgg.transform import Mode, Transform
from tests.helpers.batches import FLOATS, KERAS_MODES, every_value, in_layout
from tests.helpers.checkout import checkout_environment
from tests.helpers.datasets_on_disk import (
    ascii_failures,
    check_error,
    commits_in,
    count_cached_pages,
    data_tree,
    images_in,
    load,
    names_in,
    network_inputs,
    npy_bytes,
    permissions,
    pixels,
    plan_of,
    python,
    rows_by_name,
    save_images,
    save_npy,
    stdout_of,
    stdout_on_small_disk,
    tree,
)
from tests.helpers.faults import FaultyOs, InterruptedStorage, SimulatedCrash, system_calls


@pytest.fixture
def array(tmp_path):
    return save_npy(tmp_path / "x.npy", pixels(11))


@pytest.fixture
def photos(tmp_path):
    return save_images(tmp_path / "photos", pixels(11))


def folder_with_failures(directory):
    """Save five images and two unreadable ones; return all names and the expected batch."""
    batch = pixels(5)
    save_images(directory, batch, [f"{row}.png" for row in range(5)])
    (directory / "1-torn.png").write_bytes((directory / "1.png").read_bytes()[:-30])
    (directory / "3-text.jpg").write_text("not an image")
    expected = np.zeros((7, 7, 9, 3), np.uint8)
    expected[[0, 2, 3, 5, 6]] = batch
    names = ["0.png", "1-torn.png", "1.png", "2.png", "3-text.jpg", "3.png", "4.png"]
    return sorted(names), expected[[names.index(name) for name in sorted(names)]]


# A sample: each mode, dtype and layout occurs.
COMBINATIONS = [
    ("caffe", "NHWC", "float32"),
    ("caffe", "NCHW", "float16"),
    ("tf", "NCHW", "float32"),
    ("tf", "NHWC", "bfloat16"),
    ("torch", "NHWC", "float64"),
    ("torch", "NCHW", "bfloat16"),
]


@pytest.mark.parametrize(("mode", "out_layout", "dtype"), COMBINATIONS)
def test_array_output_matches_oracle(tmp_path, backend, mode, out_layout, dtype):
    batch = every_value()
    source = save_npy(tmp_path / "x.npy", batch)
    settings = {"mode": mode, "out_layout": out_layout, "dtype": dtype}
    plan = plan_of(source, tmp_path / "y.npy", images_per_chunk=1, backend=backend, **settings)
    report = plan.run()
    expected = network_inputs(batch, mode, out_layout=out_layout, dtype=dtype)
    assert (tmp_path / "y.npy").read_bytes() == npy_bytes(expected)
    assert report.counts == {"images": 2, "failed": 0, "chunks": 2, "computed_chunks": 2}
    assert report.failures == []


@pytest.mark.parametrize("layouts", [("NCHW", "NHWC"), ("NCHW", "NCHW")])
def test_channels_first_array_is_read(tmp_path, backend, layouts):
    layout, out_layout = layouts
    batch = pixels(5)
    source = save_npy(tmp_path / "x.npy", in_layout(batch, layout))
    settings = {"mode": "caffe", "layout": layout, "out_layout": out_layout}
    plan_of(source, tmp_path / "y.npy", images_per_chunk=2, backend=backend, **settings).run()
    expected = network_inputs(batch, "caffe", out_layout=out_layout)
    assert (tmp_path / "y.npy").read_bytes() == npy_bytes(expected)


@pytest.mark.parametrize(("mode", "out_layout", "dtype"), COMBINATIONS[::2])
def test_folder_output_matches_oracle(tmp_path, photos, backend, mode, out_layout, dtype):
    settings = {"mode": mode, "out_layout": out_layout, "dtype": dtype}
    plan_of(photos, tmp_path / "y.npy", images_per_chunk=4, backend=backend, **settings).run()
    batch = rows_by_name(photos, pixels(11))
    expected = network_inputs(batch, mode, out_layout=out_layout, dtype=dtype)
    assert (tmp_path / "y.npy").read_bytes() == npy_bytes(expected)


@pytest.mark.parametrize("name", ["float16", "float32", "float64"])
def test_images_stored_as_floats_are_preprocessed(tmp_path, name):
    batch = pixels(5).astype(name)
    source = save_npy(tmp_path / "x.npy", batch)
    plan_of(source, tmp_path / "y.npy", mode="torch", images_per_chunk=2).run()
    expected = oracle.apply(Transform("torch"), batch)
    assert (tmp_path / "y.npy").read_bytes() == npy_bytes(expected)


@pytest.mark.parametrize("kind", ["array", "folder"])
def test_output_does_not_depend_on_chunks_threads_or_backend(tmp_path, kind, backend):
    if kind == "array":
        source = save_npy(tmp_path / "x.npy", pixels(11, 37, 41))
    else:
        source = save_images(tmp_path / "photos", pixels(11, 37, 41))
        (source / "b" / "torn.png").write_bytes(b"torn")
    results = []
    for images_per_chunk, threads in (
        (1, 1),
        (1, 3),
        (2, 2),
        (4, 3),
        (5, 1),
        (11, 2),
        (50, 3),
        (None, 2),
    ):
        target = tmp_path / f"{images_per_chunk}-{threads}" / "y.npy"
        target.parent.mkdir()
        settings = {"mode": "caffe", "backend": backend, "threads": threads}
        plan = plan_of(source, target, images_per_chunk=images_per_chunk, **settings)
        report = plan.run()
        assert report.counts["computed_chunks"] == plan.chunks
        index = index_path(target)
        results.append((target.read_bytes(), index.read_bytes() if index.exists() else b""))
    assert len(set(results)) == 1
    assert len(results[0][1]) > 0 or kind == "array"


def test_plan_run_method_executes_the_plan(tmp_path, array):
    report = fastvgg.plan(array, tmp_path / "y.npy", mode="caffe", backend="numpy").run()
    assert report.target == str(tmp_path / "y.npy")
    assert str(report).startswith(f"{tmp_path / 'y.npy'}: 11 images in ")


def test_progress_is_reported_after_every_commit(tmp_path, array):
    reports = []
    plan = plan_of(array, tmp_path / "y.npy", mode="caffe", images_per_chunk=4)
    plan.run(reports.append)
    assert [at.images for at in reports] == [4, 8, 11]
    assert [at.computed_images for at in reports] == [4, 8, 11]
    assert {at.total_images for at in reports} == {11}
    assert reports[-1].read_bytes == array.stat().st_size
    assert [at.written_bytes for at in reports] == [n * 756 for n in (4, 8, 11)]


def test_progress_is_reported_on_the_calling_thread_after_the_commit(tmp_path, array):
    committed, threads = [], set()

    def progress(at):
        committed.append((at.images, commits_in(tmp_path / "y.npy")))
        threads.add(threading.get_ident())

    plan_of(array, tmp_path / "y.npy", mode="caffe", images_per_chunk=2).run(progress)
    assert len(committed) == 6
    assert all(images <= 2 * commits for images, commits in committed)
    assert threads == {threading.get_ident()}


def test_report_contains_byte_counts_time_and_peak_memory(tmp_path, array):
    report = plan_of(array, tmp_path / "y.npy", mode="caffe", images_per_chunk=4).run()
    assert report.read_bytes == array.stat().st_size
    assert report.written_bytes == 11 * 756
    assert report.seconds > 0
    assert report.peak_bytes > 0
    assert "already" not in str(report)


def test_source_is_never_changed(tmp_path, array, photos):
    before = {path: (path.stat().st_mtime_ns, tree(photos)) for path in (array, photos)}
    content = array.read_bytes()
    plan_of(array, tmp_path / "y.npy", mode="caffe", images_per_chunk=4).run()
    plan_of(photos, tmp_path / "z.npy", mode="caffe", images_per_chunk=4).run()
    assert array.read_bytes() == content
    assert before == {path: (path.stat().st_mtime_ns, tree(photos)) for path in (array, photos)}


# One chunk is written while the next is computed


class ComputedChunks:
    """Events for each computed chunk, and storage whose writes wait for them."""

    def __init__(self, monkeypatch, chunks, until):
        self.chunks = [threading.Event() for _ in range(chunks)]
        self._computed = itertools.count()
        self._until = until
        self._apply = engine.apply
        monkeypatch.setattr(engine, "apply", self._apply_and_signal)

    def _apply_and_signal(self, *arguments, **settings):
        self._apply(*arguments, **settings)
        self.chunks[next(self._computed)].set()

    def storage(self):
        """Return storage that writes a chunk once `until` returns."""
        written, until = itertools.count(), self._until

        class Waiting(Storage):
            def write(self, file, data, offset):
                if file.path.name.endswith(".partial") and offset > 0:
                    until(next(written))
                super().write(file, data, offset)

        return Waiting()


def test_chunk_is_computed_while_the_previous_one_is_written(tmp_path, array, monkeypatch):
    def until(chunk):
        if chunk < 5:
            assert computed.chunks[chunk + 1].wait(60), "the next chunk is not computed"

    computed = ComputedChunks(monkeypatch, 6, until)
    plan = plan_of(array, tmp_path / "y.npy", mode="caffe", images_per_chunk=2)
    report = run(plan, storage=computed.storage())
    assert report.counts["computed_chunks"] == 6
    assert (tmp_path / "y.npy").read_bytes() == npy_bytes(network_inputs(pixels(11), "caffe"))


def main_thread_waits():
    """Whether the main thread waits for the commit pipeline."""
    codes, frame = set(), sys._current_frames()[threading.main_thread().ident]
    while frame is not None:
        codes.add(frame.f_code)
        frame = frame.f_back
    waits = threading.Condition.wait.__code__ in codes
    return waits and not codes.isdisjoint(
        {CommitPipeline.submit.__code__, CommitPipeline.drain.__code__}
    )


def test_buffer_is_not_reused_before_it_is_written(tmp_path, array, monkeypatch):
    def until(chunk):
        # Until the engine cannot continue without the buffer that is being written.
        while not (main_thread_waits() or computed.chunks[-1].is_set()):
            pass

    computed = ComputedChunks(monkeypatch, 6, until)
    run(
        plan_of(array, tmp_path / "y.npy", mode="tf", images_per_chunk=2),
        storage=computed.storage(),
    )
    assert (tmp_path / "y.npy").read_bytes() == npy_bytes(network_inputs(pixels(11), "tf"))
    fastvgg.verify(tmp_path / "y.npy", full=True)


# Durability


DATASETS = {  # source, target, settings, minimum number of fsync calls
    "array": ("x.npy", "y.npy", {"mode": "caffe"}, 3 * 2),
    "folder": ("photos", "y.npy", {"mode": "caffe"}, 3 * 2),
    "files": ("stored.npy", "out", {"direction": "restore"}, 3 + 2),
    "in place": ("place/floats.npy", None, {"mode": "caffe", "in_place": True}, 3 + 2),
}


@pytest.mark.parametrize("kind", DATASETS)
def test_without_fsync_nothing_is_synced_and_output_is_the_same(tmp_path, kind):
    source, target, settings, least = DATASETS[kind]
    save_npy(tmp_path / "x.npy", pixels(11))
    save_images(tmp_path / "photos", pixels(11))
    plan_of(tmp_path / "x.npy", tmp_path / "stored.npy", mode="caffe").run()
    place = tmp_path / "place"
    syncs, files = {}, {}
    for fsync in (True, False):
        place.mkdir()
        if target is None:
            save_npy(tmp_path / source, pixels(11).astype(np.float32))
            os.utime(tmp_path / source, ns=(0, 1))
        plan = plan_of(
            tmp_path / source,
            None if target is None else place / target,
            images_per_chunk=4,
            fsync=fsync,
            **settings,
        )
        with system_calls(FaultyOs()) as system:
            assert plan.run().counts["computed_chunks"] == 3
        syncs[fsync] = system.calls.count("fsync")
        files[fsync] = data_tree(place)
        shutil.rmtree(place)
    assert syncs[False] == 0
    assert syncs[True] >= least
    assert files[False] == files[True]


def test_each_chunk_is_synced_before_its_commit(tmp_path, array):
    synced = []

    class RecordingStorage(Storage):
        def sync(self, file):
            super().sync(file)
            synced.append(file.path.name)

        def sync_directory(self, path):
            super().sync_directory(path)
            synced.append(path.name)

    run(
        plan_of(array, tmp_path / "y.npy", mode="caffe", images_per_chunk=4),
        storage=RecordingStorage(),
    )
    partial, journal, here = "y.npy.partial", "y.npy.fastvgg-journal", tmp_path.name
    assert synced == [
        *(f"{journal}.tmp", here),  # the run is begun
        here,  # the partial has its name
        *(partial, journal) * 3,
        here,  # the data has its name
        *("y.npy.fastvgg.json.tmp", here),
        here,  # the journal is gone
    ]


def test_files_of_a_chunk_are_synced_together_before_its_commit(tmp_path, array):
    plan_of(array, tmp_path / "stored.npy", mode="caffe").run()
    synced = []

    class RecordingStorage(Storage):
        def write(self, file, data, offset):
            super().write(file, data, offset)
            if file.path.suffix == ".png":
                synced.append("image")

        def sync(self, file):
            super().sync(file)
            synced.append(file.path.name)

        def syncfs(self, directory):
            super().syncfs(directory)
            synced.append(directory.name)

    plan = plan_of(
        tmp_path / "stored.npy", tmp_path / "out", direction="restore", images_per_chunk=11
    )
    run(plan, storage=RecordingStorage())
    assert synced == [
        "out.fastvgg-journal.tmp",
        *(["image"] * 11),
        *("out.partial", "out.fastvgg-journal", "out.fastvgg.json.tmp"),
    ]


def test_files_are_synced_individually_without_syncfs(tmp_path, array):
    plan_of(array, tmp_path / "stored.npy", mode="caffe").run()
    synced = []

    class NoSyncfsStorage(Storage):
        def has_syncfs(self, directory):
            assert directory == tmp_path / "out.partial"
            return False

        def sync(self, file):
            super().sync(file)
            synced.append(file.path.name)

    run(
        plan_of(tmp_path / "stored.npy", tmp_path / "out", direction="restore"),
        storage=NoSyncfsStorage(),
    )
    assert [name for name in synced if name.endswith(".png")] == names_in(tmp_path / "out")


@pytest.mark.parametrize("then", [True, False])
def test_run_can_resume_with_or_without_fsync(tmp_path, array, then):
    target = interrupt_run(array, tmp_path / "y.npy", mode="caffe", fsync=not then)
    report = plan_of(array, target, mode="caffe", fsync=then).run()
    assert report.counts["computed_chunks"] == 5
    assert target.read_bytes() == npy_bytes(network_inputs(pixels(11), "caffe"))


# Restoring


@pytest.mark.parametrize("mode", [*KERAS_MODES, "identity"])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("out_layout", ["NHWC", "NCHW"])
def test_stored_arrays_restore_every_byte(tmp_path, mode, dtype, out_layout):
    batch = every_value()
    source, stored, back = (tmp_path / name for name in ("x.npy", "y.npy", "z.npy"))
    save_npy(source, batch)
    plan_of(source, stored, mode=mode, dtype=dtype, out_layout=out_layout, images_per_chunk=1).run()
    plan_of(stored, back, direction="restore", images_per_chunk=1).run()
    assert back.read_bytes() == source.read_bytes()


@pytest.mark.parametrize("threads", [1, 3])
def test_restored_image_files_keep_their_names(tmp_path, photos, threads):
    stored, back = tmp_path / "y.npy", tmp_path / "back"
    plan_of(photos, stored, mode="caffe", dtype="bfloat16", images_per_chunk=4).run()
    plan_of(stored, back, direction="restore", images_per_chunk=2, threads=threads).run()
    assert sorted(images_in(back)) == sorted(images_in(photos))
    for name, expected in images_in(photos).items():
        assert images_in(back)[name].tobytes() == expected.tobytes()


def test_restored_image_files_preprocess_to_the_same_bytes(tmp_path, photos):
    stored, back, repacked = tmp_path / "y.npy", tmp_path / "back", tmp_path / "again.npy"
    plan_of(photos, stored, mode="torch", images_per_chunk=4).run()
    plan_of(stored, back, direction="restore").run()
    plan_of(back, repacked, mode="torch").run()
    assert repacked.read_bytes() == stored.read_bytes()


def test_images_without_names_are_numbered(tmp_path, array):
    stored, back = tmp_path / "y.npy", tmp_path / "back"
    plan_of(array, stored, mode="caffe").run()
    plan_of(stored, back, direction="restore").run()
    assert sorted(images_in(back)) == [f"{row:08d}.png" for row in range(11)]
    actual = np.stack([image for _, image in sorted(images_in(back).items())])
    assert actual.tobytes() == pixels(11).tobytes()


def test_restoring_arbitrary_floats_matches_oracle(tmp_path, backend):
    values = np.random.default_rng(1).normal(0, 200, (5, 7, 9, 3)).astype(np.float32)
    values[0, 0, :, 0] = [np.nan, np.inf, -np.inf, -0.0, 1e30, -1e30, 0.5, 1.5, 254.5]
    source = save_npy(tmp_path / "y.npy", values)
    for rounding in ("nearest", "truncate"):
        target = tmp_path / f"{rounding}.npy"
        settings = {"mode": "caffe", "direction": "restore", "rounding": rounding}
        plan_of(source, target, images_per_chunk=2, backend=backend, **settings).run()
        expected = oracle.apply(Transform("caffe", "restore", rounding=rounding), values)
        assert target.read_bytes() == npy_bytes(expected)


def test_foreign_array_is_restored_in_the_given_mode(tmp_path):
    batch = pixels(5)
    source = save_npy(tmp_path / "y.npy", network_inputs(batch, "tf", out_layout="NCHW"))
    settings = {"mode": "tf", "layout": "NCHW", "out_layout": "NHWC", "direction": "restore"}
    plan_of(source, tmp_path / "x.npy", **settings).run()
    assert (tmp_path / "x.npy").read_bytes() == npy_bytes(batch)


# Sidecars


NAMED_PACKAGES = ("fastvgg", "numpy", "numba", "pillow", "simplejpeg", "h5py", "zarr")


def test_manifest_records_job_counts_and_packages(tmp_path, photos):
    names, _ = folder_with_failures(tmp_path / "some")
    target = tmp_path / "y.npy"
    settings = {"mode": "torch", "dtype": "float16", "out_layout": "NCHW", "size": (11, 5)}
    plan = plan_of(tmp_path / "some", target, images_per_chunk=3, interpolation="box", **settings)
    plan.run()
    manifest = read_manifest(target)
    fields = json.loads(manifest_path(target).read_bytes())

    assert fields["fastvgg-manifest"] == 1
    assert manifest.job == plan.job
    assert manifest.job.source == str(tmp_path / "some")
    assert manifest.job.fingerprint == plan.job.fingerprint
    assert manifest.job.decoding.size == (11, 5)
    assert manifest.job.decoding.interpolation == "box"
    assert manifest.job.transform == Transform("torch", out_layout="NCHW", dtype="float16")
    assert manifest.job.transform.fingerprint() == plan.transform.fingerprint()
    assert manifest.header == plan.result
    assert manifest.header.shape == (len(names), 3, 11, 5)
    assert manifest.job.header == plan.header
    assert manifest.counts == {"images": 7, "failed": 2}
    assert dt.datetime.fromisoformat(manifest.created).tzinfo == dt.UTC
    assert manifest.packages == {
        "python": python_version(),
        **{name: metadata.version(name) for name in NAMED_PACKAGES},
    }


@pytest.mark.parametrize("images_per_chunk", [1, 2, 4, 11])
def test_manifest_checksums_match_the_chunk_bytes(tmp_path, array, images_per_chunk):
    target = tmp_path / "y.npy"
    plan_of(array, target, mode="caffe", images_per_chunk=images_per_chunk).run()
    manifest = read_manifest(target)
    assert manifest.chunk_images == images_per_chunk
    data = target.read_bytes()[128:]
    expected = [
        xxhash.xxh3_64_hexdigest(data[start : start + images_per_chunk * 756])
        for start in range(0, len(data), images_per_chunk * 756)
    ]
    assert manifest.checksums == expected
    assert len(set(expected)) == len(expected)


def test_custom_mode_round_trips_through_the_manifest(tmp_path, array):
    mode = Mode("mine", divide=3.0, mean=(1.0, 2.0, 4.0), std=(0.5, 2.0, 8.0), order="BGR")
    target, back = tmp_path / "y.npy", tmp_path / "z.npy"
    plan_of(array, target, mode=mode).run()
    assert read_manifest(target).job.transform.mode == mode
    plan_of(target, back, direction="restore").run()
    assert back.read_bytes() == array.read_bytes()


def test_index_lists_every_image_including_failures(tmp_path):
    names, _ = folder_with_failures(tmp_path / "some")
    target = tmp_path / "y.npy"
    plan_of(tmp_path / "some", target, mode="caffe", images_per_chunk=3).run()
    records = read_index(target, 7)
    assert [record.path for record in records] == names
    assert [record.failed for record in records] == ["-" in name for name in names]
    assert {(record.width, record.height) for record in records if not record.failed} == {(9, 7)}
    lines = index_path(target).read_text(encoding="utf-8").splitlines()
    assert lines[0] == "row,path,label,width,height,status,reason"
    assert lines[1 + names.index("1.png")] == f"{names.index('1.png')},1.png,,9,7,ok,"
    assert lines[1 + names.index("3-text.jpg")].startswith("4,3-text.jpg,,0,0,failed,not an image")


def test_array_without_names_has_no_index(tmp_path, array):
    plan_of(array, tmp_path / "y.npy", mode="caffe").run()
    assert names_in(tmp_path) == ["x.npy", "y.npy", "y.npy.fastvgg.json"]


@ascii_failures()
def test_names_are_preserved_from_folder_to_array_and_back(tmp_path):
    photos, stored, back = tmp_path / "photos", tmp_path / "y.npy", tmp_path / "z.npy"
    photos.mkdir()
    for row, name in enumerate(
        [b"a,b.png", b'"q".png', b"caf\xe9.png", b"new\nline.png", b"r\r.png"]
    ):
        image = save_images(tmp_path, pixels(1, seed=row), ["one.png"]) / "one.png"
        image.rename(os.fsdecode(os.fsencode(photos) + b"/" + name))
    plan_of(photos, stored, mode="caffe").run()
    plan_of(stored, back, direction="restore").run()
    assert index_path(back).read_bytes() == index_path(stored).read_bytes()
    plan_of(back, tmp_path / "again.npy", mode="caffe").run()
    plan_of(stored, tmp_path / "files", direction="restore").run()
    assert sorted(tree(tmp_path / "files")) == sorted(tree(photos))
    for path in photos.iterdir():
        actual = images_in(tmp_path / "files")[path.name]
        assert actual.tobytes() == images_in(photos)[path.name].tobytes()


def test_array_is_readable_without_its_sidecars(tmp_path, array):
    (tmp_path / "elsewhere").mkdir()
    for name in FLOATS:
        plan_of(array, tmp_path / f"{name}.npy", mode="caffe", dtype=name, images_per_chunk=4).run()
        alone = (tmp_path / f"{name}.npy").rename(tmp_path / "elsewhere" / "train.npy")
        expected = network_inputs(pixels(11), "caffe", dtype=name)
        assert load(alone, name).tobytes() == expected.tobytes()
        assert load(alone, name).dtype == expected.dtype


# Images that cannot be read


def test_failed_image_is_a_row_of_zeros_in_the_network_input(tmp_path, backend):
    names, batch = folder_with_failures(tmp_path / "some")
    target = tmp_path / "y.npy"
    settings = {"mode": "caffe", "images_per_chunk": 3, "backend": backend}
    report = plan_of(tmp_path / "some", target, **settings).run()
    expected = network_inputs(batch, "caffe")
    failed = [row for row, name in enumerate(names) if "-" in name]
    expected[failed] = 0
    assert target.read_bytes() == npy_bytes(expected)
    assert report.counts == {"images": 7, "failed": 2, "chunks": 3, "computed_chunks": 3}
    assert [(f.row, f.path) for f in report.failures] == [(row, names[row]) for row in failed]
    assert all(failure.reason for failure in report.failures)
    assert "2 could not be read" in str(report)


def test_failed_image_stays_failed_after_restoring(tmp_path):
    names, batch = folder_with_failures(tmp_path / "some")
    stored, back, files = (tmp_path / name for name in ("y.npy", "z.npy", "files"))
    plan_of(tmp_path / "some", stored, mode="caffe", images_per_chunk=3).run()
    for target in (back, files):
        report = plan_of(stored, target, direction="restore", images_per_chunk=2).run()
        assert report.counts["failed"] == 2
        assert [failure.path for failure in report.failures] == ["1-torn.png", "3-text.jpg"]
    assert back.read_bytes() == npy_bytes(batch)
    assert sorted(images_in(files)) == sorted(name for name in names if "-" not in name)
    for row, name in enumerate(names):
        if "-" not in name:
            assert images_in(files)[name].tobytes() == batch[row].tobytes()


@pytest.mark.parametrize("first", ["1-torn.png", "3-text.jpg"])
def test_strict_stops_at_the_first_unreadable_image(tmp_path, first):
    names, _ = folder_with_failures(tmp_path / "some")
    if first == "3-text.jpg":
        (tmp_path / "some" / "1-torn.png").unlink()
        names.remove("1-torn.png")
    target = tmp_path / "y.npy"
    reports = []
    with pytest.raises(StoppedError) as caught:
        plan_of(tmp_path / "some", target, mode="caffe", images_per_chunk=1, strict=True).run(
            reports.append
        )
    row = names.index(first)
    check_error(caught.value, tmp_path / "some" / first, f"row {row}")
    # The two preceding chunks were still in the pipeline when this one was read.
    assert [at.images for at in reports] == list(range(1, row - 1))
    assert commits_in(target) == row
    assert not target.exists()
    assert not manifest_path(target).exists()
    report = plan_of(tmp_path / "some", target, mode="caffe", images_per_chunk=1).run()
    assert report.counts == {
        "images": len(names),
        "failed": sum("-" in name for name in names),
        "chunks": len(names),
        "computed_chunks": len(names) - row,
    }


def test_strict_accepts_a_folder_without_failures(tmp_path, photos):
    report = plan_of(photos, tmp_path / "y.npy", mode="caffe", strict=True).run()
    assert report.counts["failed"] == 0


def test_strict_stops_at_failures_of_an_earlier_run(tmp_path):
    folder_with_failures(tmp_path / "some")
    target = tmp_path / "y.npy"

    def stop_after_failures(progress):
        if progress.images == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        plan_of(tmp_path / "some", target, mode="caffe", images_per_chunk=1).run(
            stop_after_failures
        )
    with pytest.raises(StoppedError, match=r"1-torn\.png"):
        plan_of(tmp_path / "some", target, mode="caffe", images_per_chunk=1, strict=True).run()
    assert not target.exists()


def test_no_decoding_thread_is_left_after_a_failed_run(tmp_path):
    names, _ = folder_with_failures(tmp_path / "some")
    plan = plan_of(
        tmp_path / "some",
        tmp_path / "y.npy",
        mode="caffe",
        images_per_chunk=1,
        strict=True,
        size=(7, 9),
    )
    with pytest.raises(StoppedError) as caught:
        plan.run()
    assert any(name in caught.value.problem for name in names)
    left = [thread.name for thread in threading.enumerate() if "fastvgg-tasks" in thread.name]
    assert left == []


# Killed and resumed runs

KILL_SCRIPT = """
import os, signal, sys
from tests.helpers.datasets_on_disk import plan_of
from tests.helpers.faults import InterruptedStorage
from fastvgg.stream.run import run
source, target, direction, commits = sys.argv[1:]
def kill():
    os.kill(os.getpid(), signal.SIGKILL)
mode = "caffe" if direction == "preprocess" else None
plan = plan_of(source, target, mode=mode, direction=direction, images_per_chunk=2, threads=2)
run(plan, storage=InterruptedStorage(int(commits), end=kill))
"""


@pytest.mark.parametrize("commits", [1, 2, 5, 6])
@pytest.mark.parametrize("kind", ["array", "folder", "files"])
def test_killed_run_resumes_after_its_last_commit(tmp_path, array, photos, kind, commits):
    source, name, direction = array, "y.npy", "preprocess"
    settings = {"images_per_chunk": 2, "mode": "caffe"}
    if kind == "folder":
        source = photos
    elif kind == "files":
        source, name, direction = tmp_path / "inputs.npy", "out", "restore"
        plan_of(photos, source, mode="caffe").run()
        settings = {"images_per_chunk": 2, "direction": "restore"}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    whole.mkdir()
    cut.mkdir()
    plan_of(source, whole / name, **settings).run()

    died = python(KILL_SCRIPT, source, cut / name, direction, str(commits))
    assert died.returncode == -signal.SIGKILL, died.stderr
    assert not (cut / name).exists()
    assert not manifest_path(cut / name).exists()
    resumed = plan_of(source, cut / name, **settings)
    assert resumed.committed_chunks == commits
    reports = []
    report = resumed.run(reports.append)
    assert report.counts["chunks"] == 6
    assert report.counts["computed_chunks"] == 6 - commits
    assert len(reports) == 6 - commits
    assert data_tree(cut) == data_tree(whole)


def test_run_whose_progress_callback_raised_resumes(tmp_path, array):
    target = tmp_path / "y.npy"

    def fail(progress):
        raise RuntimeError("a bug in the caller")

    committed = 0
    while committed < 6:
        plan = plan_of(array, target, mode="caffe", images_per_chunk=2)
        assert plan.committed_chunks == committed
        with pytest.raises(RuntimeError, match="a bug in the caller"):
            plan.run(fail)
        # The reported chunk, and the two submitted after it.
        assert commits_in(target) - committed == 3
        committed = commits_in(target)
    report = plan_of(array, target, mode="caffe", images_per_chunk=2).run()
    assert report.counts["computed_chunks"] == 0
    assert target.read_bytes() == npy_bytes(network_inputs(pixels(11), "caffe"))


def test_resumed_run_keeps_its_chunk_size(tmp_path, array):
    target = tmp_path / "y.npy"
    python(KILL_SCRIPT, array, target, "preprocess", "2")
    plan = plan_of(array, target, mode="caffe", images_per_chunk=5)
    assert plan.chunk_images == 2
    assert plan.run().counts["computed_chunks"] == 4
    assert target.read_bytes() == npy_bytes(network_inputs(pixels(11), "caffe"))
    fastvgg.verify(target, full=True)


# What another command finds


def interrupt_run(source, target, **settings):
    """Crash a run after its first commit; return the target."""
    with pytest.raises(SimulatedCrash):
        run(plan_of(source, target, images_per_chunk=2, **settings), storage=InterruptedStorage(1))
    return target


@pytest.mark.parametrize(
    ("now", "words"),
    [
        ({"mode": "tf"}, ["transform.mode", "'caffe'", "'tf'"]),
        ({"mode": "caffe", "dtype": "float16"}, ["result.dtype", "'float32'", "'float16'"]),
        ({"mode": "caffe", "out_layout": "NCHW"}, ["result.layout", "'NHWC'", "'NCHW'"]),
    ],
)
def test_unfinished_run_with_other_settings_is_rejected_with_both(tmp_path, array, now, words):
    target = interrupt_run(array, tmp_path / "y.npy", mode="caffe")
    before = tree(tmp_path)
    with pytest.raises(ResumeError) as caught:
        plan_of(array, target, **now)
    check_error(caught.value, target, *words, "--restart")
    assert tree(tmp_path) == before
    plan_of(array, target, restart=True, **now).run()
    expected = network_inputs(
        pixels(11),
        now["mode"],
        dtype=now.get("dtype", "float32"),
        out_layout=now.get("out_layout", "NHWC"),
    )
    assert target.read_bytes() == npy_bytes(expected)
    assert not journal_path(target).exists()


def test_unfinished_run_with_another_size_is_rejected_with_both(tmp_path, photos):
    target = interrupt_run(photos, tmp_path / "y.npy", mode="caffe", size=(5, 11))
    with pytest.raises(ResumeError) as caught:
        plan_of(photos, target, mode="caffe", size=(11, 5))
    check_error(caught.value, "source.size", "[5, 11]", "[11, 5]", "--restart")
    with pytest.raises(ResumeError, match=r"source\.interpolation: 'nearest' then, 'box' now"):
        plan_of(photos, target, mode="caffe", size=(5, 11), interpolation="box")


def test_unfinished_run_of_another_source_is_rejected_with_both(tmp_path, array):
    target = interrupt_run(array, tmp_path / "y.npy", mode="caffe")
    other = save_npy(tmp_path / "other.npy", pixels(11, seed=2))
    with pytest.raises(ResumeError) as caught:
        plan_of(other, target, mode="caffe")
    check_error(caught.value, "source.path", array, other, "source.fingerprint")


def test_unfinished_run_of_a_changed_source_is_rejected(tmp_path, array):
    target = interrupt_run(array, tmp_path / "y.npy", mode="caffe")
    save_npy(array, pixels(11, seed=2))
    os.utime(array, ns=(0, 1))
    with pytest.raises(ResumeError) as caught:
        plan_of(array, target, mode="caffe")
    check_error(caught.value, "source.fingerprint", "--restart")
    plan_of(array, target, mode="caffe", restart=True).run()
    assert target.read_bytes() == npy_bytes(network_inputs(pixels(11, seed=2), "caffe"))


@pytest.mark.parametrize("change", [-1, 1, 4096])
def test_partial_target_of_wrong_size_is_rejected(tmp_path, array, change):
    target = interrupt_run(array, tmp_path / "y.npy", mode="caffe")
    partial = tmp_path / "y.npy.partial"
    size = partial.stat().st_size
    os.truncate(partial, size + change)
    with pytest.raises(ResumeError) as caught:
        plan_of(array, target, mode="caffe").run()
    check_error(caught.value, partial, size, size + change, "--restart")
    assert not target.exists()
    plan_of(array, target, mode="caffe", restart=True).run()
    assert target.read_bytes() == npy_bytes(network_inputs(pixels(11), "caffe"))


def test_partial_target_without_a_journal_is_rejected_and_kept(tmp_path, array):
    partial = tmp_path / "y.npy.partial"
    partial.write_text("someone's own")
    with pytest.raises(TargetError) as caught:
        plan_of(array, tmp_path / "y.npy", mode="caffe")
    check_error(caught.value, partial, "move it away")
    assert partial.read_text() == "someone's own"


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("kind", ["file", "empty file", "link", "dangling link"])
def test_foreign_target_is_rejected_and_kept(tmp_path, array, kind, restart):
    target = tmp_path / "y.npy"
    if kind == "file":
        save_npy(target, pixels(1))
    elif kind == "empty file":
        target.touch()
    else:
        save_npy(tmp_path / "other.npy", pixels(1))
        target.symlink_to("other.npy" if kind == "link" else "nowhere")
    before = tree(tmp_path)
    with pytest.raises(TargetError) as caught:
        plan_of(array, target, mode="caffe", restart=restart)
    check_error(caught.value, target, "move it away", "another name")
    assert "--restart" not in str(caught.value)
    assert tree(tmp_path) == before


FOREIGN = {
    "y.npy": (
        *("", ".partial", ".index.csv", ".fastvgg-replaced", ".fastvgg.json"),
        ".fastvgg-journal",
    ),
    "y.h5": ("", ".partial", ".index.csv", ".fastvgg-journal"),
    "y.zarr": ("", "/0.bin", ".partial/0.bin", ".index.csv", ".fastvgg-journal"),
    "out": ("", "/0.png", ".partial/0.png", ".index.csv", ".fastvgg-journal"),
}


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize(
    ("target", "suffix"), [(target, suffix) for target in FOREIGN for suffix in FOREIGN[target]]
)
def test_foreign_data_is_never_replaced(tmp_path, photos, target, suffix, restart):
    source, settings = photos, {"mode": "caffe"}
    if target == "out":
        source, settings = preprocessed(tmp_path), {"direction": "restore"}
    foreign = tmp_path / (target + suffix)
    foreign.parent.mkdir(exist_ok=True)
    foreign.write_text("precious")
    before = tree(tmp_path)
    location = f"{tmp_path / target}{'::/images' if target == 'y.h5' else ''}"
    with pytest.raises((TargetError, SourceError)) as caught:
        plan_of(source, location, restart=restart, **settings)
    check_error(caught.value, foreign.parent if "/" in suffix else foreign)
    assert "--restart" not in str(caught.value)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("suffix", FOREIGN["y.npy"])
def test_foreign_file_created_after_planning_is_never_replaced(tmp_path, array, suffix, restart):
    plan = plan_of(array, tmp_path / "y.npy", mode="caffe", restart=restart)
    foreign = tmp_path / f"y.npy{suffix}"
    foreign.write_text("precious")
    before = tree(tmp_path)
    with pytest.raises((TargetError, SourceError)) as caught:
        plan.run()
    check_error(caught.value, foreign)
    assert "--restart" not in str(caught.value)
    assert tree(tmp_path) == before


def test_rejected_restart_leaves_the_unfinished_run_resumable(tmp_path, array):
    target = tmp_path / "y.npy"
    with pytest.raises(SimulatedCrash):
        run(plan_of(array, target, mode="caffe", images_per_chunk=2), storage=InterruptedStorage(2))
    inputs = save_npy(tmp_path / "inputs.npy", network_inputs(pixels(11), "caffe"))
    restart = plan_of(inputs, target, mode="caffe", restart=True)
    before = tree(tmp_path)
    with pytest.raises(SourceError, match="not images"):
        restart.run()
    assert tree(tmp_path) == before
    report = plan_of(array, target, mode="caffe", images_per_chunk=2).run()
    assert report.counts["computed_chunks"] == 4


def test_damaged_journal_is_kept_if_a_run_is_rejected(tmp_path, array):
    target = tmp_path / "y.npy"
    late = plan_of(array, target, mode="caffe", images_per_chunk=2)
    with pytest.raises(SimulatedCrash):
        run(plan_of(array, target, mode="caffe", images_per_chunk=2), storage=InterruptedStorage(2))
    journal = tmp_path / "y.npy.fastvgg-journal"
    content = bytearray(journal.read_bytes())
    content[100] ^= 1  # in the header line
    journal.write_bytes(content)
    before = tree(tmp_path)
    with pytest.raises(TargetError, match="--restart"):
        late.run()
    assert tree(tmp_path) == before
    plan_of(array, target, mode="caffe", restart=True).run()
    assert target.read_bytes() == npy_bytes(network_inputs(pixels(11), "caffe"))


@pytest.mark.parametrize("change", [-1, 1])
def test_finished_target_changed_later_is_not_replaced(tmp_path, array, change):
    target = tmp_path / "y.npy"
    plan_of(array, target, mode="caffe").run()
    os.truncate(target, target.stat().st_size + change)
    before = tree(tmp_path)
    for restart in (False, True):
        with pytest.raises(TargetError) as caught:
            plan_of(array, target, mode="tf", restart=restart)
        check_error(caught.value, target, "move it away")
        assert "--restart" not in str(caught.value)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("kind", ["empty", "full"])
def test_directory_with_the_name_of_an_array_is_rejected_before_computing(
    tmp_path, array, kind, restart
):
    (tmp_path / "y.npy").mkdir()
    if kind == "full":
        (tmp_path / "y.npy" / "keep.txt").write_text("precious")
    before = tree(tmp_path)
    with pytest.raises(TargetError) as caught:
        plan_of(array, tmp_path / "y.npy", mode="caffe", restart=restart)
    check_error(caught.value, tmp_path / "y.npy")
    assert tree(tmp_path) == before


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("suffix", [".partial", ".index.csv", ".fastvgg-replaced"])
@pytest.mark.parametrize("journal", [b"", b"0123456789ab", b"0" * 16 + b' {"fastv', bytes(100)])
def test_incomplete_journal_does_not_prove_ownership(tmp_path, array, suffix, restart, journal):
    (tmp_path / "y.npy.fastvgg-journal").write_bytes(journal)
    (tmp_path / f"y.npy{suffix}").write_text("precious")
    before = tree(tmp_path)
    with pytest.raises(TargetError) as caught:
        plan_of(array, tmp_path / "y.npy", mode="caffe", restart=restart)
    check_error(caught.value, tmp_path / f"y.npy{suffix}", "move it away")
    assert tree(tmp_path) == before


@pytest.mark.parametrize("journal", [b"", b"0123456789ab", b"0" * 16 + b' {"fastv', bytes(100)])
def test_incomplete_journal_is_replaced(tmp_path, array, journal):
    (tmp_path / "y.npy.fastvgg-journal").write_bytes(journal)
    plan_of(array, tmp_path / "y.npy", mode="caffe").run()
    assert names_in(tmp_path) == ["x.npy", "y.npy", "y.npy.fastvgg.json"]


class CrashBeforeManifestStorage(Storage):
    def write_atomic(self, path, buffers):
        raise SimulatedCrash


@pytest.mark.parametrize("restart", [False, True])
def test_file_replaced_after_publish_is_never_replaced(tmp_path, array, restart):
    target = tmp_path / "y.npy"
    with pytest.raises(SimulatedCrash):
        run(plan_of(array, target, mode="caffe"), storage=CrashBeforeManifestStorage())
    assert target.exists()
    target.write_text("precious")
    with pytest.raises((SourceError, TargetError)):
        plan_of(array, target, mode="caffe", restart=restart).run()
    assert target.read_text() == "precious"


def test_empty_directory_can_become_the_target(tmp_path, photos):
    stored, back = tmp_path / "y.npy", tmp_path / "back"
    plan_of(photos, stored, mode="caffe").run()
    back.mkdir()
    plan_of(stored, back, direction="restore").run()
    assert sorted(images_in(back)) == sorted(images_in(photos))


@pytest.mark.parametrize("restart", [False, True])
def test_foreign_directory_is_never_replaced(tmp_path, array, restart):
    stored, back = tmp_path / "y.npy", tmp_path / "back"
    plan_of(array, stored, mode="caffe").run()
    back.mkdir()
    (back / "keep.txt").write_text("precious")
    before = tree(tmp_path)
    with pytest.raises(TargetError) as caught:
        plan_of(stored, back, direction="restore", restart=restart)
    check_error(caught.value, back)
    assert tree(tmp_path) == before


def test_restart_replaces_a_directory_written_by_fastvgg(tmp_path, array):
    stored, back = tmp_path / "y.npy", tmp_path / "back"
    plan_of(array, stored, mode="caffe").run()
    plan_of(stored, back, direction="restore").run()
    (back / "00000000.png").unlink()
    report = plan_of(stored, back, direction="restore", restart=True).run()
    assert report.counts["computed_chunks"] == 1
    assert len(images_in(back)) == 11


@pytest.mark.parametrize("kind", ["array", "files"])
def test_rerun_of_a_finished_run_does_nothing(tmp_path, array, kind):
    stored, target = tmp_path / "y.npy", tmp_path / "y.npy"
    settings = {"mode": "caffe"}
    plan_of(array, stored, images_per_chunk=2, **settings).run()
    source = array
    if kind == "files":
        source, target, settings = stored, tmp_path / "back", {"direction": "restore"}
        plan_of(source, target, images_per_chunk=2, **settings).run()
    before = tree(tmp_path)
    report = plan_of(source, target, images_per_chunk=2, **settings).run()
    assert report.counts["computed_chunks"] == 0
    assert report.counts["chunks"] == 6
    assert report.counts["images"] == 11
    assert report.written_bytes == 0
    assert "already" in str(report)
    assert tree(tmp_path) == before


def test_rerun_of_a_finished_run_reports_failures(tmp_path):
    folder_with_failures(tmp_path / "some")
    expected = plan_of(tmp_path / "some", tmp_path / "y.npy", mode="caffe").run()
    actual = plan_of(tmp_path / "some", tmp_path / "y.npy", mode="caffe").run()
    assert actual.failures == expected.failures
    assert actual.counts == {**expected.counts, "computed_chunks": 0}


def test_rerun_rejects_a_truncated_result(tmp_path, array):
    target = tmp_path / "y.npy"
    plan_of(array, target, mode="caffe").run()
    os.truncate(target, target.stat().st_size // 2)
    with pytest.raises((TargetError, SourceError)):
        plan_of(array, target, mode="caffe").run()


def test_finished_target_of_another_job_is_rejected(tmp_path, array):
    target = tmp_path / "y.npy"
    plan_of(array, target, mode="caffe").run()
    before = tree(tmp_path)
    with pytest.raises(TargetError) as caught:
        plan_of(array, target, mode="tf")
    check_error(caught.value, target, "with other settings", "--restart")
    assert tree(tmp_path) == before
    plan_of(array, target, mode="tf", restart=True).run()
    assert target.read_bytes() == npy_bytes(network_inputs(pixels(11), "tf"))
    assert read_manifest(target).job.transform.mode is Mode.TF


def test_restart_recomputes_every_chunk(tmp_path, array):
    target = tmp_path / "y.npy"
    plan_of(array, target, mode="caffe", images_per_chunk=2).run()
    report = plan_of(array, target, mode="caffe", images_per_chunk=2, restart=True).run()
    assert report.counts["computed_chunks"] == 6


def test_restart_removes_the_index_of_the_replaced_array(tmp_path, array, photos):
    target = tmp_path / "y.npy"
    plan_of(photos, target, mode="caffe").run()
    assert index_path(target).exists()
    plan_of(array, target, mode="caffe", restart=True).run()
    assert not index_path(target).exists()
    assert plan_of(target, tmp_path / "z.npy", direction="restore").run().failures == []


@pytest.mark.parametrize("where", ["partial", "inside partial", "replaced"])
def test_restart_never_removes_the_source(tmp_path, where):
    """The source may have the name of a sidecar."""
    place = {"partial": "y.npy.partial", "inside partial": "y.npy.partial/photos"}
    source = save_images(tmp_path / place.get(where, "y.npy.fastvgg-replaced"), pixels(5))
    before = tree(source)
    try:
        plan_of(source, tmp_path / "y.npy", mode="caffe", restart=True).run()
    except TargetError as error:
        check_error(error, tmp_path / "y.npy")
    assert tree(source) == before


def run_with_event(plan, make):
    """Run a plan, and call `make` after its first chunk."""

    def progress(at):
        nonlocal make
        if make is not None:
            make()
            make = None

    return plan.run(progress)


def test_file_created_during_a_run_is_not_replaced(tmp_path, array):
    target = tmp_path / "y.npy"
    plan = plan_of(array, target, mode="caffe", images_per_chunk=2)
    with pytest.raises(TargetError) as caught:
        run_with_event(plan, lambda: target.write_text("precious"))
    check_error(caught.value, target, "was not written by fastvgg")
    assert target.read_text() == "precious"
    target.unlink()
    report = plan_of(array, target, mode="caffe", images_per_chunk=2).run()
    assert report.counts["computed_chunks"] == 0
    assert target.read_bytes() == npy_bytes(network_inputs(pixels(11), "caffe"))


def test_file_created_after_an_interrupted_run_is_not_replaced(tmp_path, array):
    target = interrupt_run(array, tmp_path / "y.npy", mode="caffe")
    target.write_text("precious")
    before = tree(tmp_path)
    with pytest.raises(TargetError) as caught:
        plan_of(array, target, mode="caffe", images_per_chunk=2)
    check_error(caught.value, target, "was not written by fastvgg")
    assert tree(tmp_path) == before


def test_directory_created_during_a_run_is_never_replaced(tmp_path, array):
    stored, back = tmp_path / "y.npy", tmp_path / "back"
    plan_of(array, stored, mode="caffe").run()
    plan = plan_of(stored, back, images_per_chunk=2, direction="restore", restart=True)

    def appear():
        back.mkdir()
        (back / "keep.txt").write_text("precious")

    with pytest.raises(TargetError):
        run_with_event(plan, appear)
    assert (back / "keep.txt").read_text() == "precious"


@pytest.mark.parametrize("restart", [False, True])
def test_directory_created_after_an_interrupted_run_is_never_replaced(tmp_path, array, restart):
    stored, back = tmp_path / "y.npy", tmp_path / "back"
    plan_of(array, stored, mode="caffe").run()
    interrupt_run(stored, back, direction="restore", restart=True)
    back.mkdir()
    (back / "keep.txt").write_text("precious")
    with pytest.raises(TargetError):
        plan_of(stored, back, direction="restore", restart=restart).run()
    assert (back / "keep.txt").read_text() == "precious"


@pytest.mark.parametrize("restart", [False, True])
def test_directory_recreated_after_an_interrupted_restart_is_never_replaced(
    tmp_path, array, restart
):
    stored, back = tmp_path / "y.npy", tmp_path / "back"
    plan_of(array, stored, mode="caffe").run()
    plan_of(stored, back, direction="restore").run()
    interrupt_run(stored, back, direction="restore", restart=True)
    shutil.rmtree(back)
    manifest_path(back).unlink()
    back.mkdir()  # may reuse the inode of the removed directory
    (back / "keep.txt").write_text("precious")
    with pytest.raises(TargetError):
        plan_of(stored, back, direction="restore", restart=restart).run()
    assert (back / "keep.txt").read_text() == "precious"


def test_index_paths_outside_the_target_directory_are_never_written(tmp_path, array):
    stored = tmp_path / "y.npy"
    plan_of(array, stored, mode="caffe").run()
    outside = tmp_path / "outside.png"
    names = [f"{row}.png" for row in range(10)]
    for escaping_path in (str(outside), f"/{outside}", "../outside.png", "x/../../outside.png"):
        records = [ImageRecord(name, "", 9, 7, False, "") for name in [*names, escaping_path]]
        index_path(stored).write_text(INDEX_HEADER + format_records(records), encoding="utf-8")
        with pytest.raises(SourceError):
            plan_of(stored, tmp_path / "back", direction="restore").run()
        assert not outside.exists()


# Concurrent runs

WAITING_RUN_SCRIPT = """
import sys
from tests.helpers.datasets_on_disk import plan_of
def progress(at):
    print("committed", flush=True)
    sys.stdin.readline()
plan_of(sys.argv[1], sys.argv[2], mode="caffe", images_per_chunk=2).run(progress)
"""


def running_process(source, target):
    """Start a process, and wait until it is in the middle of a run."""
    process = subprocess.Popen(
        [sys.executable, "-c", WAITING_RUN_SCRIPT, source, target],
        env=checkout_environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "committed\n"
    return process


def test_concurrent_run_of_the_same_target_is_rejected(tmp_path, array):
    target = tmp_path / "y.npy"
    with running_process(array, target) as first:
        for settings in ({}, {"restart": True}):
            with pytest.raises(TargetError) as caught:
                plan_of(array, target, mode="caffe", images_per_chunk=2, **settings).run()
            check_error(caught.value, target, "another process")
        first.communicate("\n" * 6)
    assert first.returncode == 0
    assert target.read_bytes() == npy_bytes(network_inputs(pixels(11), "caffe"))
    assert not journal_path(target).exists()
    fastvgg.verify(target, full=True)


def test_rerun_resumes_after_a_concurrent_run_is_killed(tmp_path, array):
    target = tmp_path / "y.npy"
    with running_process(array, target) as first:
        first.kill()
        first.communicate()
    committed = commits_in(target)
    assert 1 <= committed <= 3  # one was reported, and up to two more were in the pipeline
    report = plan_of(array, target, mode="caffe", images_per_chunk=2).run()
    assert report.counts["computed_chunks"] == 6 - committed
    assert target.read_bytes() == npy_bytes(network_inputs(pixels(11), "caffe"))


def test_two_targets_can_be_written_concurrently(tmp_path, array):
    with running_process(array, tmp_path / "y.npy") as first:
        plan_of(array, tmp_path / "z.npy", mode="caffe").run()
        first.communicate("\n" * 6)
    assert (tmp_path / "y.npy").read_bytes() == (tmp_path / "z.npy").read_bytes()


# Sources that change


def change_content(source):
    save_npy(source, pixels(11, seed=2))
    os.utime(source, ns=(0, 1))


def change_one_byte(source):
    with source.open("r+b") as file:
        file.seek(1000)
        file.write(bytes([file.read(1)[0] ^ 1]))


CHANGES = {
    "other content": change_content,
    "another time": lambda source: os.utime(source, ns=(0, 1)),
    "one byte": change_one_byte,
}


@pytest.mark.parametrize("change", CHANGES)
def test_array_changed_during_a_run_is_not_published(tmp_path, array, change):
    target = tmp_path / "y.npy"
    plan = plan_of(array, target, mode="caffe", images_per_chunk=2)
    with pytest.raises(StoppedError) as caught:
        run_with_event(plan, lambda: CHANGES[change](array))
    check_error(caught.value, array, "changed while it was read", "--restart")
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
    check_error(caught.value, photos, "changed while it was read")
    assert not target.exists()


@pytest.mark.parametrize("change", CHANGES)
def test_source_changed_before_the_run_is_rejected(tmp_path, array, change):
    plan = plan_of(array, tmp_path / "y.npy", mode="caffe")
    CHANGES[change](array)
    with pytest.raises(SourceError) as caught:
        plan.run()
    check_error(caught.value, array, "has changed since", "rerun the same command")
    assert names_in(tmp_path) == ["x.npy"]


def test_source_removed_after_planning_is_rejected(tmp_path, array):
    plan = plan_of(array, tmp_path / "y.npy", mode="caffe")
    array.unlink()
    with pytest.raises(SourceError) as caught:
        plan.run()
    check_error(caught.value, array)
    assert names_in(tmp_path) == []


# Rejected conversions


def preprocessed(tmp_path, mode="caffe", **settings):
    stored = tmp_path / "y.npy"
    plan_of(save_npy(tmp_path / "x.npy", pixels(11)), stored, mode=mode, **settings).run()
    return stored


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


@pytest.mark.parametrize("kind", ["array", "photos"])
def test_restoring_images_is_rejected_by_their_dtype(tmp_path, request, kind):
    source = request.getfixturevalue(kind)
    with pytest.raises(SourceError) as caught:
        plan_of(source, tmp_path / "z.npy", mode="caffe", direction="restore")
    check_error(caught.value, source, "uint8", "nothing to restore")


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
    check_error(caught.value, stored, "--mode", "no manifest")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"{}", b'{"fastvgg-manifest": 1}'])
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


# Disk space


@pytest.mark.parametrize("name", ["y.npy", "y.h5::/a"])
def test_insufficient_disk_space_is_rejected_with_both_numbers(tmp_path, name):
    save_npy(tmp_path / "x.npy", pixels(67, 37, 41))
    (tmp_path / "small").mkdir()
    actual = stdout_on_small_disk(
        tmp_path / "small",
        disk_bytes=256 * 1024,
        source=f"""
from tests.helpers.datasets_on_disk import names_in, plan_of
from fastvgg.errors import TargetError
try:
    plan_of({str(tmp_path / "x.npy")!r}, {str(tmp_path / "small" / name)!r}, mode="caffe")
except TargetError as error:
    print(error)
print(names_in({str(tmp_path / "small")!r}))
""",
    )
    needed_bytes = 67 * 37 * 41 * 3 * 4
    assert f"({needed_bytes} bytes)" in actual
    assert f"({256 * 1024} bytes) free" in actual
    assert "--dtype float16" in actual
    assert actual.endswith("[]")


def test_disk_filled_after_planning_is_rejected_and_leaves_no_files(tmp_path):
    save_npy(tmp_path / "x.npy", pixels(11, 37, 41))
    (tmp_path / "small").mkdir()
    actual = stdout_on_small_disk(
        tmp_path / "small",
        disk_bytes=512 * 1024,
        source=f"""
import pathlib
from tests.helpers.datasets_on_disk import names_in, plan_of
from fastvgg.errors import FastvggError
small = pathlib.Path({str(tmp_path / "small")!r})
plan = plan_of({str(tmp_path / "x.npy")!r}, small / "y.npy", mode="caffe", images_per_chunk=2)
(small / "other").write_bytes(bytes(400 * 1024))
try:
    plan.run()
except FastvggError as error:
    print(type(error).__name__, error)
print(names_in(small))
(small / "other").unlink()
print(plan_of(plan.source, plan.target, mode="caffe", images_per_chunk=2).run().counts)
""",
    )
    lines = actual.splitlines()
    assert lines[0].startswith("TargetError ")
    assert str(11 * 37 * 41 * 3 * 4 + 128) in lines[0]
    assert "space" in lines[1]
    assert lines[2] == "['other']"
    assert "'computed_chunks': 6" in lines[3]


def test_full_disk_stops_an_image_run_which_resumes_with_free_space(tmp_path):
    plan_of(
        save_npy(tmp_path / "x.npy", pixels(11, 37, 41)), tmp_path / "y.npy", mode="caffe"
    ).run()
    (tmp_path / "small").mkdir()
    actual = stdout_on_small_disk(
        tmp_path / "small",
        disk_bytes=512 * 1024,
        source=f"""
import pathlib
from tests.helpers.datasets_on_disk import images_in, pixels, plan_of
from fastvgg.errors import FastvggError
small = pathlib.Path({str(tmp_path / "small")!r})
(small / "other").write_bytes(bytes(480 * 1024))
settings = dict(direction="restore", images_per_chunk=2)
try:
    plan_of({str(tmp_path / "y.npy")!r}, small / "out", **settings).run()
except FastvggError as error:
    print(error.exit_code, error)
print((small / "out").exists())
(small / "other").unlink()
report = plan_of({str(tmp_path / "y.npy")!r}, small / "out", **settings).run()
print(0 < report.counts["computed_chunks"] < 6)
found = [image for _, image in sorted(images_in(small / "out").items())]
print(b"".join(image.tobytes() for image in found) == pixels(11, 37, 41).tobytes())
""",
    )
    lines = actual.splitlines()
    assert lines[0].startswith("5 ")
    assert "No space left on device (ENOSPC)" in lines[0]
    assert lines[2:] == ["False", "True", "True"]


def test_file_size_limit_is_rejected_and_leaves_no_files(tmp_path, array):
    actual = stdout_of(
        """
import os, resource, sys
from tests.helpers.datasets_on_disk import names_in, plan_of
from fastvgg.errors import FastvggError
plan = plan_of(sys.argv[1], sys.argv[2], mode="caffe", images_per_chunk=2)
resource.setrlimit(resource.RLIMIT_FSIZE, (6000, resource.RLIM_INFINITY))
try:
    plan.run()
except FastvggError as error:
    print(type(error).__name__, error)
print(names_in(os.path.dirname(sys.argv[2])))
""",
        array,
        tmp_path / "y.npy",
    )
    lines = actual.splitlines()
    assert lines[0].startswith("TargetError ")
    assert str(11 * 756 + 128) in lines[0]
    assert "too large" in lines[0]
    assert lines[-1] == "['x.npy']"


def test_failed_allocation_is_rejected_and_leaves_no_files(tmp_path, array):
    class FullDiskOs(FaultyOs):
        CALLS = ("posix_fallocate",)

    plan = plan_of(array, tmp_path / "y.npy", mode="caffe")
    with system_calls(FullDiskOs(1, errno.ENOSPC)), pytest.raises(TargetError) as caught:
        plan.run()
    check_error(caught.value, tmp_path / "y.npy", 11 * 756 + 128)
    assert names_in(tmp_path) == ["x.npy"]


def test_short_writes_are_continued(tmp_path, photos):
    class PartialIoOs(FaultyOs):
        def __getattr__(self, name):
            if name != "pwrite":
                return getattr(os, name)
            return lambda file, data, offset: os.pwrite(file, data[:1013], offset)

    stored, back = tmp_path / "y.npy", tmp_path / "back"
    with system_calls(PartialIoOs()):
        plan_of(photos, stored, mode="caffe", images_per_chunk=4).run()
        plan_of(stored, back, direction="restore", images_per_chunk=4).run()
    batch = rows_by_name(photos, pixels(11))
    assert stored.read_bytes() == npy_bytes(network_inputs(batch, "caffe"))
    fastvgg.verify(stored, full=True)
    fastvgg.verify(back, full=True)


def test_zero_length_writes_raise_instead_of_looping(tmp_path, array):
    class ZeroWriteOs(FaultyOs):
        def __getattr__(self, name):
            if name != "pwrite":
                return getattr(os, name)
            self.calls.append(name)
            assert len(self.calls) < 1000, "an endless loop"
            return lambda file, data, offset: 0

    with system_calls(ZeroWriteOs()), pytest.raises(StoppedError):
        plan_of(array, tmp_path / "y.npy", mode="caffe").run()


def test_output_is_the_same_without_optional_system_calls(tmp_path, array, monkeypatch):
    class MinimalOs(FaultyOs):
        def __getattr__(self, name):
            if name in ("posix_fallocate", "O_DIRECT"):
                raise AttributeError(name)
            return getattr(os, name)

    monkeypatch.setitem(sys.modules, "fcntl", None)
    with system_calls(MinimalOs()):
        plan_of(array, tmp_path / "y.npy", mode="caffe", images_per_chunk=4).run()
    assert (tmp_path / "y.npy").read_bytes() == npy_bytes(network_inputs(pixels(11), "caffe"))


def test_resumed_run_bypasses_the_page_cache(tmp_path):
    if file_system_type(tmp_path) == "tmpfs":
        pytest.skip("a file in memory is nowhere else")
    batch = pixels(12, 67, 71)
    plan = plan_of(
        save_npy(tmp_path / "x.npy", batch), tmp_path / "y.npy", mode="tf", images_per_chunk=3
    )
    with pytest.raises(SimulatedCrash):
        run(plan, storage=InterruptedStorage(1))
    plan.run()
    with (tmp_path / "y.npy").open("r+b") as file:
        assert count_cached_pages(file.fileno()) <= 1 + plan.chunks
    assert (tmp_path / "y.npy").read_bytes() == npy_bytes(network_inputs(batch, "tf"))


@pytest.mark.parametrize("kind", ["array", "folder"])
def test_whole_pages_of_every_chunk_bypass_the_page_cache(tmp_path, kind):
    if file_system_type(tmp_path) == "tmpfs":
        pytest.skip("a file in memory is nowhere else")
    batch = pixels(11, 67, 71)
    source = tmp_path / ("photos" if kind == "folder" else "x.npy")
    if kind == "folder":
        save_images(source, batch)
        batch = rows_by_name(source, batch)
    else:
        save_npy(source, batch)
    for images_per_chunk in (2, 4, 11):  # no chunk starts or ends at a page boundary
        target = tmp_path / f"{images_per_chunk}.npy"
        plan_of(source, target, mode="caffe", images_per_chunk=images_per_chunk).run()
        with target.open("r+b") as file:
            held = count_cached_pages(file.fileno())
        assert held <= 1 + -(-11 // images_per_chunk)
        assert target.read_bytes() == npy_bytes(network_inputs(batch, "caffe"))


def test_complete_target_is_reported_without_creating_a_journal(array, tmp_path):
    class NoOpenStorage(Storage):
        def open(self, path, *, create=False):
            raise AssertionError(path)

    plan_of(array, tmp_path / "y.npy", mode="caffe").run()
    report = run(plan_of(array, tmp_path / "y.npy", mode="caffe"), storage=NoOpenStorage())
    assert report.counts["computed_chunks"] == 0


def test_empty_journal_next_to_a_complete_target_is_removed(array, tmp_path):
    plan_of(array, tmp_path / "y.npy", mode="caffe").run()
    finished = tree(tmp_path)
    journal_path(tmp_path / "y.npy").write_bytes(b"")
    report = plan_of(array, tmp_path / "y.npy", mode="caffe").run()
    assert report.counts["computed_chunks"] == 0
    assert tree(tmp_path) == finished


@pytest.mark.parametrize(("target", "max_windows"), [("y.npy", 1), ("images", 2)])
def test_live_source_windows_do_not_exceed_the_planned_number(
    tmp_path, monkeypatch, target, max_windows
):
    y = save_npy(tmp_path / "x.npy", network_inputs(pixels(12), "caffe"))
    windows, held = [], []
    read = NpySource.read

    def recording_read(source, start, stop):
        chunk = read(source, start, stop)
        windows.append(weakref.ref(chunk.batch))
        held.append(sum(window() is not None for window in windows))
        return chunk

    monkeypatch.setattr(NpySource, "read", recording_read)
    plan = plan_of(y, tmp_path / target, images_per_chunk=2, direction="restore", mode="caffe")
    plan.run()
    assert len(windows) >= plan.chunks == 6
    assert max(held) == max_windows
