"""Runs from disk to disk: the same output as the oracle, its sidecars, and failed images."""

from __future__ import annotations

import datetime as dt
import itertools
import json
import os
import sys
import threading
from importlib import metadata
from platform import python_version

import numpy as np
import pytest
import xxhash

import fastvgg
from fastvgg import oracle
from fastvgg.datasets.index import index_path, read_index
from fastvgg.errors import StoppedError
from fastvgg.executors import threads as executor
from fastvgg.storage.local import Storage
from fastvgg.stream.commit_pipeline import CommitPipeline
from fastvgg.stream.manifest import manifest_path, read_manifest
from fastvgg.transform import Mode, Transform
from tests.helpers.batches import FLOATS, KERAS_MODES, every_value, in_layout
from tests.helpers.datasets_on_disk import (
    ascii_failures,
    check_error,
    commits_in,
    images_in,
    load,
    names_in,
    network_inputs,
    npy_bytes,
    pixels,
    plan_of,
    rows_by_name,
    save_images,
    save_npy,
    tree,
)
from tests.helpers.runs import folder_with_failures, run

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
        self._make_commit = executor.make_commit
        monkeypatch.setattr(executor, "make_commit", self._signal_and_make_commit)

    def _signal_and_make_commit(self, *arguments):
        self.chunks[next(self._computed)].set()
        return self._make_commit(*arguments)

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

    assert fields["fastvgg-manifest"] == 3
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
