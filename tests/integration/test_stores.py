"""Zarr arrays in object stores, S3 and in memory: killed runs and store errors."""

from __future__ import annotations

import signal
import uuid

import numpy as np
import pytest
import zarr

import fastvgg
from fastvgg import oracle
from fastvgg.datasets.open import open_source
from fastvgg.errors import (
    ResumeError,
    SourceError,
    StoppedError,
    TargetError,
    UsageError,
    VerificationError,
)
from fastvgg.storage import objects
from fastvgg.storage.location import Location
from fastvgg.storage.objects import ObjectStorage
from fastvgg.stream.info import info
from fastvgg.stream.lines import encode_line
from tests.helpers.datasets_on_disk import (
    check_error,
    names_in,
    pixels,
    plan_of,
    python,
    save_images,
    save_npy,
)
from tests.helpers.faults import SimulatedCrash
from tests.helpers.runs import run
from tests.helpers.samples import parts, sampled
from tests.helpers.stores import BUCKET, ENVIRONMENT, serve_s3

IMAGES, CHUNK_IMAGES = 11, 2
SHARDS = -(-IMAGES // CHUNK_IMAGES)
BATCH = pixels(IMAGES, height=5, width=7)
EXPECTED = oracle.apply(fastvgg.Transform("caffe"), BATCH)
FILES = ["y.zarr.fastvgg.json", *[f"y.zarr/c.{n}.0.0.0" for n in range(SHARDS)], "y.zarr/zarr.json"]


@pytest.fixture(scope="module")
def s3():
    with serve_s3() as served:
        yield served


@pytest.fixture
def empty_s3(s3):
    s3.work()
    s3.requests.clear()
    s3.clear()
    return s3


class Store:
    """A part of a store for a single test."""

    def __init__(self, url):
        self.url = url
        self.root = Location.parse(url).container

    def __truediv__(self, name):
        return self.root / name

    def names(self):
        return sorted(objects.list_objects(self.root))

    def array(self, name="y.zarr"):
        """Return the array as zarr-python reads it."""
        return zarr.open_array(f"{self.url}/{name}", mode="r")[:]


@pytest.fixture
def in_memory():
    return Store(f"memory://{uuid.uuid4()}")


@pytest.fixture(params=["memory", "s3"])
def store(request):
    if request.param == "memory":
        return request.getfixturevalue("in_memory")
    request.getfixturevalue("empty_s3")
    return Store(f"s3://{BUCKET}")


@pytest.fixture
def array(tmp_path):
    return save_npy(tmp_path / "x.npy", BATCH)


def make_plan(source, store, **settings):
    settings = {"mode": "caffe", "images_per_chunk": CHUNK_IMAGES, **settings}
    return plan_of(str(source), f"{store.url}/y.zarr", **settings)


class CountingStorage(ObjectStorage):
    """Object storage that counts its calls and can crash at one of them.

    Parameters
    ----------
    crash_at
        The number of the call, from 1; 0 for never.
    when
        Die "before" the call, "after" it, or "half way" through where it removes many objects.
    """

    def __init__(self, crash_at=0, *, when="before"):
        super().__init__()
        self.calls = []
        self._crash_at = crash_at
        self._when = when
        self._is_dead = False

    def _call(self, name, path, do, half=lambda: None):
        if self._is_dead:
            return
        self.calls.append((name, str(path).rpartition("y.zarr")[2]))
        dies = len(self.calls) == self._crash_at
        if dies and self._when == "half way":
            half()
        elif not dies or self._when == "after":
            do()
        if dies:
            self._is_dead = True
            raise SimulatedCrash

    def put(self, path, data):
        self._call("put", path, lambda: super(CountingStorage, self).put(path, data))

    def remove(self, path):
        def half():
            keys = sorted(objects.list_objects(path))
            for key in keys[: len(keys) // 2 + 1]:
                objects.remove(path / key)

        self._call("remove", path, lambda: super(CountingStorage, self).remove(path), half)


def shard_puts(storage):
    return [name for call, name in storage.calls if call == "put" and name.startswith("/c.")]


def test_run_stores_only_the_array_and_its_manifest(store, array):
    report = make_plan(array, store).run()
    assert report.counts["computed_chunks"] == SHARDS
    assert store.names() == FILES
    stored = store.array()
    assert stored.dtype == np.float32
    assert stored.tobytes() == EXPECTED.tobytes()


def test_stored_array_is_verified_and_described(store, array):
    make_plan(array, store).run()
    verified = fastvgg.verify(f"{store.url}/y.zarr", full=True)
    assert verified.recomputed_images == IMAGES
    known = info(f"{store.url}/y.zarr")
    assert (known["path"], known["state"]) == (f"{store.url}/y.zarr", "finished")
    assert (known["kind"], known["mode"], known["chunks"]) == ("zarr", "caffe", SHARDS)


def test_stored_array_is_restored_with_and_without_its_manifest(store, array, tmp_path):
    make_plan(array, store).run()
    plan_of(f"{store.url}/y.zarr", tmp_path / "1.npy", direction="restore").run()
    objects.remove(store / "y.zarr.fastvgg.json")
    assert info(f"{store.url}/y.zarr")["mode"] == "caffe"
    plan_of(f"{store.url}/y.zarr", tmp_path / "2.npy", direction="restore").run()
    for name in ("1.npy", "2.npy"):
        assert np.load(tmp_path / name).tobytes() == BATCH.tobytes()


def test_stored_array_is_restored_into_a_store(store, array):
    make_plan(array, store).run()
    plan_of(f"{store.url}/y.zarr", f"{store.url}/x.zarr", direction="restore").run()
    assert store.array("x.zarr").tobytes() == BATCH.tobytes()
    fastvgg.verify(f"{store.url}/x.zarr", full=True)


def test_stored_array_yields_batches(store, array):
    make_plan(array, store).run()
    for images, _, rows in fastvgg.batches(f"{store.url}/y.zarr", 4, threads=2):
        assert images.tobytes() == EXPECTED[rows].tobytes()


def test_foreign_array_is_a_source(store, tmp_path):
    zarr.save_array(f"{store.url}/others.zarr", BATCH)
    plan_of(f"{store.url}/others.zarr", tmp_path / "y.npy", mode="caffe").run()
    assert np.load(tmp_path / "y.npy").tobytes() == EXPECTED.tobytes()


def test_images_in_a_store_have_an_index_and_failures_are_retried(store, tmp_path):
    photos = save_images(tmp_path / "photos", BATCH, [f"{row:02d}.png" for row in range(IMAGES)])
    whole = (photos / "03.png").read_bytes()
    (photos / "03.png").write_bytes(whole[:50])
    report = make_plan(photos, store).run()
    assert [failure.row for failure in report.failures] == [3]
    expected = EXPECTED.copy()
    expected[3] = 0
    assert store.array().tobytes() == expected.tobytes()
    index = objects.read(store / "y.zarr.index.csv").decode().splitlines()
    assert len(index) == 1 + IMAGES
    assert "failed" in index[4]
    fastvgg.verify(f"{store.url}/y.zarr", full=True)
    (photos / "03.png").write_bytes(whole)
    storage = CountingStorage()
    run(make_plan(photos, store, retry_failed=True), storage=storage)
    assert shard_puts(storage) == ["/c.1.0.0.0"]
    assert store.array().tobytes() == EXPECTED.tobytes()
    assert len(store.names()) == len(FILES) + 1
    assert fastvgg.verify(f"{store.url}/y.zarr", full=True).recomputed_images == IMAGES


def test_index_in_a_store_names_the_restored_files(store, tmp_path):
    photos = save_images(tmp_path / "photos", BATCH, [f"a/{row:02d}.png" for row in range(IMAGES)])
    make_plan(photos, store).run()
    plan_of(f"{store.url}/y.zarr", tmp_path / "back", direction="restore").run()
    assert names_in(tmp_path / "back" / "a") == [f"{row:02d}.png" for row in range(IMAGES)]


def test_array_metadata_follows_all_shards_and_precedes_the_manifest(in_memory, array):
    storage = CountingStorage()
    run(make_plan(array, in_memory), storage=storage)
    puts = [name for call, name in storage.calls if call == "put"]
    assert puts[0] == ".fastvgg-journal/job"
    assert puts[-2:] == ["/zarr.json", ".fastvgg.json"]
    assert len(puts) == 3 + 2 * SHARDS
    for number in range(SHARDS):
        line = puts.index(f".fastvgg-journal/{number:09d}")
        assert puts.index(f"/c.{number}.0.0.0") < line


def test_finished_array_is_not_recomputed(store, array):
    make_plan(array, store).run()
    storage = CountingStorage()
    report = run(make_plan(array, store), storage=storage)
    assert storage.calls == []
    assert report.counts["computed_chunks"] == 0


@pytest.mark.parametrize("restart", [False, True])
def test_foreign_objects_under_the_journal_name_are_rejected(store, array, restart):
    objects.put(store / "y.zarr.fastvgg-journal" / "mine.txt", b"precious")
    before = store.names()
    with pytest.raises(TargetError, match="is not a journal of fastvgg"):
        make_plan(array, store, restart=restart)
    assert store.names() == before


def is_unreadable(store):
    try:
        zarr.open_array(f"{store.url}/y.zarr", mode="r")
    except FileNotFoundError:
        return True
    return False


WHEN = ("before", "half way", "after")


def call_numbers(counting, when, part):
    """Return the numbers of a third of the calls; "half way" applies only to removals.

    The thirds differ between "before" and "after", so that the first parts cover more calls.
    """
    names = [name for name, _ in counting.calls]
    numbers = [n for n, name in enumerate(names, 1) if when != "half way" or name == "remove"]
    return numbers[(part + WHEN.index(when)) % 3 :: 3]


@parts(3)
@pytest.mark.parametrize("when", WHEN)
def test_rerun_finishes_a_run_killed_at_any_call(array, when, part):
    calls = CountingStorage()
    run(make_plan(array, Store(f"memory://{uuid.uuid4()}")), storage=calls)
    assert len(calls.calls) > 2 * SHARDS
    for crash_at in call_numbers(calls, when, part):
        store = Store(f"memory://{uuid.uuid4()}")
        with pytest.raises(SimulatedCrash):
            run(make_plan(array, store), storage=CountingStorage(crash_at, when=when))
        if not is_unreadable(store):
            assert store.array().tobytes() == EXPECTED.tobytes()
        names = store.names()
        committed = sum("journal/0" in name for name in names)
        storage = CountingStorage()
        report = run(make_plan(array, store), storage=storage)
        assert report.counts["images"] == IMAGES
        if "y.zarr.fastvgg.json" not in names:
            assert len(shard_puts(storage)) == SHARDS - committed
        assert store.names() == FILES
        assert store.array().tobytes() == EXPECTED.tobytes()
        fastvgg.verify(f"{store.url}/y.zarr")


@parts(3)
@pytest.mark.parametrize("when", WHEN)
def test_rerun_finishes_a_restart_killed_at_any_call(array, when, part):
    def prepare():
        store = Store(f"memory://{uuid.uuid4()}")
        make_plan(array, store, mode="tf").run()
        return store

    calls, before = CountingStorage(), oracle.apply(fastvgg.Transform("tf"), BATCH)
    run(make_plan(array, prepare(), restart=True), storage=calls)
    for crash_at in call_numbers(calls, when, part):
        store = prepare()
        with pytest.raises(SimulatedCrash):
            run(make_plan(array, store, restart=True), storage=CountingStorage(crash_at, when=when))
        if not is_unreadable(store):  # complete: the old or the new array
            assert store.array().tobytes() in (before.tobytes(), EXPECTED.tobytes())
        run(make_plan(array, store, restart=True))
        assert store.names() == FILES
        assert store.array().tobytes() == EXPECTED.tobytes()


@parts(3)
@pytest.mark.parametrize("when", WHEN)
def test_rerun_finishes_a_retry_killed_at_any_call(tmp_path, when, part):
    photos = save_images(tmp_path / "photos", BATCH, [f"{row:02d}.png" for row in range(IMAGES)])
    whole = (photos / "03.png").read_bytes()

    def prepare():
        (photos / "03.png").write_bytes(b"torn")
        store = Store(f"memory://{uuid.uuid4()}")
        make_plan(photos, store).run()
        (photos / "03.png").write_bytes(whole)
        return store

    def retry(store, storage=None):
        return run(make_plan(photos, store, retry_failed=True), storage=storage)

    calls = CountingStorage()
    retry(prepare(), calls)
    assert shard_puts(calls) == ["/c.1.0.0.0"]
    for crash_at in call_numbers(calls, when, part):
        store = prepare()
        with pytest.raises(SimulatedCrash):
            retry(store, CountingStorage(crash_at, when=when))
        retry(store)
        assert store.names() == sorted([*FILES, "y.zarr.index.csv"])
        assert store.array().tobytes() == EXPECTED.tobytes()


def test_killed_restart_resumes_without_another_restart(in_memory, array):
    make_plan(array, in_memory, mode="tf").run()
    with pytest.raises(SimulatedCrash):
        run(make_plan(array, in_memory, restart=True), storage=CountingStorage(2 * SHARDS))
    run(make_plan(array, in_memory))
    assert in_memory.array().tobytes() == EXPECTED.tobytes()


KILL_SCRIPT = """
import os, signal, sys
from fastvgg.storage.objects import ObjectStorage
from tests.helpers.runs import run
from tests.helpers.datasets_on_disk import plan_of
source, target, images_per_chunk, left = sys.argv[1:]
class Killed(ObjectStorage):
    left = int(left)
    def put(self, path, data):
        Killed.left -= 1
        if Killed.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        super().put(path, data)
plan = plan_of(source, target, mode="caffe", images_per_chunk=int(images_per_chunk))
run(plan, storage=Killed())
"""


@sampled("puts", [1, 2 * SHARDS + 1, 4, 2 * SHARDS + 2, 7, 2 * SHARDS + 3], one_in=2)
def test_rerun_finishes_a_killed_process(empty_s3, array, puts):
    store = Store(f"s3://{BUCKET}")
    done = python(KILL_SCRIPT, array, f"{store.url}/y.zarr", str(CHUNK_IMAGES), str(puts))
    assert done.returncode == -signal.SIGKILL, done.stderr
    committed = sum("journal/0" in key for key in empty_s3.objects())
    shards = sum("/c." in key for key in empty_s3.objects())
    assert shards + committed == min(2 * SHARDS, max(0, puts - 2))
    empty_s3.requests.clear()
    report = make_plan(array, store).run()
    assert report.counts["computed_chunks"] == SHARDS - committed
    put = [path for method, path in empty_s3.requests if method == "PUT" and "/c." in path]
    assert len(put) == SHARDS - committed
    assert store.names() == FILES
    assert store.array().tobytes() == EXPECTED.tobytes()


def interrupt_run(array, store):
    """Leave a run unfinished, with four shards committed."""
    with pytest.raises(SimulatedCrash):
        run(make_plan(array, store), storage=CrashAfterFourShards())


class CrashAfterFourShards(CountingStorage):
    """Object storage that crashes once four shards are committed."""

    def put(self, path, data):
        if len([name for _, name in self.calls if "journal/0" in name]) == 4:
            self._crash_at = len(self.calls) + 1
        super().put(path, data)


def test_unfinished_run_is_described_and_cannot_be_opened(store, array):
    interrupt_run(array, store)
    known = info(f"{store.url}/y.zarr")
    assert (known["state"], known["committed_chunks"], known["chunks"]) == ("unfinished", 4, SHARDS)
    assert is_unreadable(store)


@pytest.mark.parametrize(
    ("store", "damage"),
    [
        *(("memory", damage) for damage in ("cut", "flipped", "gone", "another", "empty")),
        *(("s3", damage) for damage in ("cut", "gone")),
        *(
            pytest.param("s3", damage, marks=pytest.mark.slow)
            for damage in ("flipped", "another", "empty")
        ),
    ],
    indirect=["store"],
)
def test_shard_that_differs_from_its_commit_is_recomputed(store, array, damage):
    interrupt_run(array, store)
    shard, other = store / "y.zarr" / "c.2.0.0.0", store / "y.zarr" / "c.1.0.0.0"
    content = bytearray(objects.read(shard))
    content[len(content) // 2] ^= 4
    if damage == "gone":
        objects.remove(shard)
    else:
        damaged = {"cut": content[:-7], "flipped": content, "another": objects.read(other)}
        objects.put(shard, bytes(damaged.get(damage, b"")))
    storage, seen = CountingStorage(), []
    report = run(make_plan(array, store), storage=storage, progress=seen.append)
    assert shard_puts(storage) == ["/c.2.0.0.0", "/c.4.0.0.0", "/c.5.0.0.0"]
    assert (seen[-1].images, seen[-1].total_images) == (IMAGES, IMAGES)
    assert report.counts["computed_chunks"] == 3
    assert store.array().tobytes() == EXPECTED.tobytes()


@pytest.mark.parametrize("content", [b"", b"half a line", b"0123456789abcdef {}\n"])
def test_chunk_with_an_invalid_journal_line_is_recomputed(in_memory, array, content):
    interrupt_run(array, in_memory)
    objects.put(in_memory / "y.zarr.fastvgg-journal" / "000000001", content)
    storage = CountingStorage()
    run(make_plan(array, in_memory), storage=storage)
    assert shard_puts(storage) == ["/c.1.0.0.0", "/c.4.0.0.0", "/c.5.0.0.0"]
    assert in_memory.array().tobytes() == EXPECTED.tobytes()


def test_restart_discards_the_commits_of_an_unfinished_run(in_memory, array):
    with pytest.raises(SimulatedCrash):
        run(make_plan(array, in_memory, images_per_chunk=1), storage=CountingStorage(2 * IMAGES))
    assert any(name.endswith("journal/000000004") for name in in_memory.names())
    with pytest.raises(SimulatedCrash):
        run(
            make_plan(array, in_memory, images_per_chunk=4, restart=True),
            storage=CountingStorage(6),
        )
    make_plan(array, in_memory, images_per_chunk=4).run()
    assert [name for name in in_memory.names() if "/c." in name] == FILES[1:4]
    assert in_memory.array().tobytes() == EXPECTED.tobytes()


def test_restart_replaces_only_the_array_that_existed_when_it_started(in_memory, array):
    make_plan(array, in_memory, mode="tf").run()
    prepare = CountingStorage()
    run(make_plan(array, in_memory, mode="torch", restart=True), storage=prepare)
    first = prepare.calls.index(("put", ".fastvgg-journal/job")) + 1
    with pytest.raises(SimulatedCrash):
        run(make_plan(array, in_memory, restart=True), storage=CountingStorage(first, when="after"))
    metadata = objects.read(in_memory / "y.zarr" / "zarr.json")
    objects.put(in_memory / "y.zarr" / "zarr.json", metadata + b" ")
    with pytest.raises(TargetError) as caught:
        make_plan(array, in_memory)
    check_error(caught.value, f"{in_memory.url}/y.zarr", "exists")
    objects.put(in_memory / "y.zarr" / "zarr.json", metadata)
    make_plan(array, in_memory).run()
    assert in_memory.array().tobytes() == EXPECTED.tobytes()


def test_only_restart_replaces_an_unknown_journal(in_memory, array):
    interrupt_run(array, in_memory)
    objects.put(in_memory / "y.zarr.fastvgg-journal" / "job", encode_line({"fastvgg-journal": 99}))
    with pytest.raises(ResumeError) as caught:
        make_plan(array, in_memory)
    check_error(caught.value, "y.zarr.fastvgg-journal", "99", "restart")
    make_plan(array, in_memory, restart=True).run()
    assert in_memory.names() == FILES
    assert in_memory.array().tobytes() == EXPECTED.tobytes()


def test_unfinished_run_is_rejected_with_other_settings(store, array):
    interrupt_run(array, store)
    with pytest.raises(ResumeError) as caught:
        make_plan(array, store, mode="tf")
    check_error(caught.value, f"{store.url}/y.zarr", "caffe", "tf", "restart")
    make_plan(array, store, mode="tf", restart=True).run()
    assert fastvgg.verify(f"{store.url}/y.zarr", full=True)


def test_foreign_data_is_never_replaced(store, array):
    zarr.save_array(f"{store.url}/y.zarr", BATCH)
    before = store.names()
    with pytest.raises(TargetError) as caught:
        make_plan(array, store)
    check_error(caught.value, f"{store.url}/y.zarr", "was not written by fastvgg")
    with pytest.raises(TargetError) as caught:
        make_plan(array, store, restart=True)
    check_error(caught.value, f"{store.url}/y.zarr", "did not write")
    assert store.names() == before


def test_objects_that_are_not_an_array_are_never_replaced(store, array):
    objects.put(store / "y.zarr" / "notes" / "a.txt", b"mine")
    for settings in ({}, {"restart": True}):
        with pytest.raises(TargetError) as caught:
            make_plan(array, store, **settings)
        check_error(caught.value, f"{store.url}/y.zarr")
    assert store.names() == ["y.zarr/notes/a.txt"]


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("name", ["y.zarr/notes.txt", "y.zarr.index.csv", "y.zarr.fastvgg.json"])
def test_object_created_after_an_interrupted_run_is_never_removed(in_memory, array, name, restart):
    interrupt_run(array, in_memory)
    objects.put(in_memory / name, b"mine")
    before = in_memory.names()
    with pytest.raises(TargetError) as caught:
        make_plan(array, in_memory, restart=restart)
    check_error(caught.value, name.rpartition("/")[2], "move it away")
    assert in_memory.names() == before


def test_only_restart_replaces_a_finished_array_of_another_job(store, array):
    make_plan(array, store, mode="tf").run()
    with pytest.raises(TargetError) as caught:
        make_plan(array, store)
    check_error(caught.value, f"{store.url}/y.zarr", "with other settings", "restart")
    make_plan(array, store, restart=True).run()
    assert store.names() == FILES
    assert store.array().tobytes() == EXPECTED.tobytes()


def test_concurrently_written_foreign_objects_are_not_replaced(in_memory, array):
    interrupt_run(array, in_memory)
    objects.put(in_memory / "y.zarr" / "zarr.json", b"{}")
    with pytest.raises(TargetError) as caught:
        make_plan(array, in_memory)
    check_error(caught.value, "was not written by fastvgg")


def test_transient_store_error_is_retried(empty_s3, array):
    store = Store(f"s3://{BUCKET}")
    empty_s3.fail("PUT|GET|HEAD", r"/c\.|journal", 503, times=1)
    make_plan(array, store).run()
    assert store.array().tobytes() == EXPECTED.tobytes()


@pytest.fixture
def few_retries(monkeypatch):
    from s3fs import S3FileSystem

    monkeypatch.setattr(S3FileSystem, "retries", 2)


def test_persistent_store_error_stops_the_run_which_can_be_resumed(empty_s3, array, few_retries):
    store = Store(f"s3://{BUCKET}")
    plan = make_plan(array, store)
    empty_s3.fail("PUT", r"/c\.3", 503)
    with pytest.raises(StoppedError) as caught:
        plan.run()
    check_error(caught.value, f"s3://{BUCKET}/y.zarr/c.3.0.0.0", "put")
    assert caught.value.exit_code == 5
    empty_s3.work()
    assert is_unreadable(store)
    committed = info(f"{store.url}/y.zarr")["committed_chunks"]
    assert 0 < committed <= 3
    report = make_plan(array, store).run()
    assert report.counts["computed_chunks"] == SHARDS - committed
    assert store.array().tobytes() == EXPECTED.tobytes()


@pytest.mark.parametrize("path", ["/zarr.json", "y.zarr.fastvgg.json"])
def test_store_error_at_the_end_requires_no_recomputation(empty_s3, array, few_retries, path):
    store = Store(f"s3://{BUCKET}")
    plan = make_plan(array, store)
    empty_s3.fail("PUT", path, 503)
    with pytest.raises(StoppedError):
        plan.run()
    empty_s3.work()
    assert make_plan(array, store).run().counts["computed_chunks"] == 0
    assert store.names() == FILES


def test_read_only_store_is_rejected_before_writing(empty_s3, array):
    store = Store(f"s3://{BUCKET}")
    plan = make_plan(array, store)
    empty_s3.fail("PUT", "", 403)
    with pytest.raises(TargetError) as caught:
        plan.run()
    check_error(caught.value, f"s3://{BUCKET}/y.zarr", "nothing was written")
    assert caught.value.exit_code == 3
    empty_s3.work()
    assert store.names() == []


def test_persistent_source_error_stops_the_run_which_can_be_resumed(
    empty_s3, array, tmp_path, few_retries
):
    store = Store(f"s3://{BUCKET}")
    make_plan(array, store).run()
    settings = {"direction": "restore", "images_per_chunk": CHUNK_IMAGES}
    plan = plan_of(f"{store.url}/y.zarr", tmp_path / "x2.npy", **settings)
    empty_s3.fail("GET", r"/c\.3", 503)
    with pytest.raises(StoppedError) as caught:
        plan.run()
    check_error(caught.value, f"s3://{BUCKET}/y.zarr", "read")
    assert caught.value.exit_code == 5
    empty_s3.work()
    report = plan_of(f"{store.url}/y.zarr", tmp_path / "x2.npy", **settings).run()
    assert report.counts["computed_chunks"] < SHARDS
    assert np.load(tmp_path / "x2.npy").tobytes() == BATCH.tobytes()


UNREACHABLE_SCRIPT = """
import sys
from fastvgg.errors import SourceError, TargetError
from tests.helpers.datasets_on_disk import check_error, plan_of
for paths in (("s3://bucket/x.zarr", "y.npy"), (sys.argv[1], "s3://bucket/y.zarr")):
    try:
        plan_of(*paths, mode="tf")
    except (SourceError, TargetError) as error:
        check_error(error, "s3://bucket/", "127.0.0.1:9")
        print("refused")
"""


def test_unreachable_store_is_rejected(array):
    environment = {**ENVIRONMENT, "AWS_ENDPOINT_URL": "http://127.0.0.1:9"}
    done = python(UNREACHABLE_SCRIPT, array, env=environment)
    assert done.stdout.split() == ["refused", "refused"], done.stderr


def test_missing_bucket_is_rejected(empty_s3, array):
    with pytest.raises((SourceError, TargetError)) as caught:
        plan_of(array, "s3://nowhere/y.zarr", mode="tf").run()
    check_error(caught.value, "s3://nowhere/y.zarr", "bucket")


def test_missing_source_is_rejected(store, tmp_path):
    with pytest.raises(SourceError) as caught:
        plan_of(f"{store.url}/nothing.zarr", tmp_path / "y.npy", mode="tf")
    check_error(caught.value, f"{store.url}/nothing.zarr", "no Zarr array")


def test_missing_chunk_is_rejected(store, array, tmp_path):
    make_plan(array, store).run()
    objects.remove(store / "y.zarr" / "c.3.0.0.0")
    with pytest.raises(SourceError) as caught:
        plan_of(f"{store.url}/y.zarr", tmp_path / "x2.npy", direction="restore")
    check_error(caught.value, "1 of 6 chunks are missing", "c.3.0.0.0")


def test_chunk_removed_after_opening_stops_the_run(store, array):
    make_plan(array, store).run()
    source = open_source(Location.parse(f"{store.url}/y.zarr"))
    objects.remove(store / "y.zarr" / "c.3.0.0.0")
    assert source.read(0, 5).batch.tobytes() == EXPECTED[:5].tobytes()
    with pytest.raises(StoppedError) as caught:
        source.read(4, 8)
    check_error(caught.value, "c.3.0.0.0", "missing")
    source.close()


def test_verify_detects_a_changed_chunk(store, array):
    make_plan(array, store).run()
    shard = store / "y.zarr" / "c.3.0.0.0"
    content = bytearray(objects.read(shard))
    content[9] ^= 1
    objects.put(shard, bytes(content))
    with pytest.raises(VerificationError) as caught:
        fastvgg.verify(f"{store.url}/y.zarr")
    check_error(caught.value, "c.3.0.0.0", f"{store.url}/y.zarr")


def test_source_changed_after_planning_is_detected(store, array, tmp_path):
    make_plan(array, store).run()
    plan = plan_of(f"{store.url}/y.zarr", tmp_path / "x2.npy", direction="restore")
    objects.put(store / "y.zarr" / "c.3.0.0.0", objects.read(store / "y.zarr" / "c.2.0.0.0")[:-1])
    with pytest.raises(SourceError) as caught:
        plan.run()
    check_error(caught.value, "has changed since")


@pytest.mark.parametrize("name", ["x.npy", "x.h5", "x.h5::/images"])
def test_only_zarr_is_supported_in_stores(in_memory, array, tmp_path, name):
    with pytest.raises(SourceError) as caught:
        plan_of(f"{in_memory.url}/{name}", tmp_path / "y.npy", mode="tf")
    check_error(caught.value, f"{in_memory.url}/{name}", "Zarr")
    with pytest.raises(TargetError) as caught:
        plan_of(array, f"{in_memory.url}/{name}", mode="tf")
    check_error(caught.value, f"{in_memory.url}/{name}", ".zarr")


def test_array_cannot_be_written_into_its_source(in_memory, array):
    make_plan(array, in_memory).run()
    for name in ("y.zarr", "y.zarr/z.zarr"):
        with pytest.raises((TargetError, SourceError)):
            plan_of(f"{in_memory.url}/y.zarr", f"{in_memory.url}/{name}", direction="restore")


def test_stored_array_cannot_be_changed_in_place(in_memory, array):
    make_plan(array, in_memory).run()
    with pytest.raises(UsageError) as caught:
        fastvgg.plan(f"{in_memory.url}/y.zarr", in_place=True, direction="restore")
    check_error(caught.value, "in_place=True")


@pytest.mark.parametrize("url", ["nothing://bucket/x.zarr", "http+x://x"])
def test_unknown_url_scheme_is_rejected(tmp_path, url):
    with pytest.raises(SourceError) as caught:
        plan_of(url, tmp_path / "y.npy", mode="tf")
    check_error(caught.value, url, "is not a store of arrays", "download it")


def test_missing_url_dependency_is_named(tmp_path):
    script = """
import sys
sys.modules["upath"] = None
import fastvgg
try:
    fastvgg.plan("s3://bucket/x.zarr", "y.npy", mode="tf")
except fastvgg.errors.SourceError as error:
    print(error.remedy)
"""
    done = python(script)
    assert "pip install '.[zarr]'" in done.stdout, done.stderr


def test_command_line_accepts_urls(empty_s3, array, tmp_path):
    script = "import sys; from fastvgg.cli import main; main()"
    url = f"s3://{BUCKET}/y.zarr"
    commands = (
        ("preprocess", array, url, "--mode", "caffe", "--quiet"),
        ("verify", url),
        ("info", url),
        ("restore", url, tmp_path / "x2.npy", "--quiet"),
    )
    for command in commands:
        done = python(script, *command, env={"NUMBA_DISABLE_JIT": "0"})
        assert done.returncode == 0, done.stderr
    assert np.load(tmp_path / "x2.npy").tobytes() == BATCH.tobytes()


def test_file_url_is_a_local_path(array, tmp_path):
    plan_of(f"file://{array}", f"file://{tmp_path}/y.zarr", mode="caffe").run()
    assert zarr.open_array(tmp_path / "y.zarr", mode="r")[:].tobytes() == EXPECTED.tobytes()
    assert not Location.parse(f"file://{array}").is_remote


def test_objects_are_read_written_listed_and_removed(store):
    for key, content in {"a/1": b"one", "a/b/2": b"two", "ab": b"three"}.items():
        objects.put(store / key, content)
    assert objects.read(store / "a/1") == b"one"
    assert objects.read(store / "a/2") is None
    assert objects.exists(store / "a/b/2")
    assert objects.exists(store / "a")
    assert not objects.exists(store / "b")
    assert {key: size for key, (size, _) in objects.list_objects(store / "a").items()} == {
        "1": 3,
        "b/2": 3,
    }
    assert objects.read_all(store / "a") == {"1": b"one", "b/2": b"two"}
    assert objects.read_all(store / "b") == {}
    assert objects.list_objects(store / "ab") == {}
    with objects.open_object(store / "ab") as file:
        file.seek(2)
        assert file.read() == b"ree"
    before = objects.list_objects(store / "a")
    objects.put(store / "a/1", b"new")
    assert objects.list_objects(store / "a") != before
    objects.remove(store / "a")
    objects.remove(store / "b")
    assert store.names() == ["ab"]


def test_damaged_array_in_a_store_is_repaired(store, array):
    make_plan(array, store).run()
    before = objects.read_all(store.root)
    objects.remove(store / "y.zarr/c.1.0.0.0")
    shard = before["y.zarr/c.5.0.0.0"]
    objects.put(store / "y.zarr/c.5.0.0.0", shard[: len(shard) // 2])
    location = f"{store.url}/y.zarr"
    with pytest.raises(VerificationError) as caught:
        fastvgg.verify(location)
    assert [chunk.chunk for chunk in caught.value.damaged] == [1, 5]
    assert fastvgg.verify(location, repair=True).repaired_chunks == 2
    assert objects.read_all(store.root) == before
    fastvgg.verify(location, full=True)
