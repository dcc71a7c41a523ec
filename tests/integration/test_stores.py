"""Zarr arrays in stores: a real S3 API, and one in memory; killed runs, and stores that fail."""

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
from fastvgg.storage.objects import StoreStorage
from fastvgg.stream.info import info
from fastvgg.stream.lines import encode_line
from fastvgg.stream.run import run
from tests.helpers.datasets_on_disk import (
    must_say,
    names_in,
    pixels,
    plan_of,
    python,
    save_images,
    save_npy,
)
from tests.helpers.faults import Death
from tests.helpers.samples import parts, sampled
from tests.helpers.stores import BUCKET, ENVIRONMENT, serving_s3

IMAGES, TOGETHER = 11, 2
SHARDS = -(-IMAGES // TOGETHER)
BATCH = pixels(IMAGES, height=5, width=7)
EXPECTED = oracle.apply(fastvgg.Transform("caffe"), BATCH)
FILES = ["y.zarr.fastvgg.json", *[f"y.zarr/c.{n}.0.0.0" for n in range(SHARDS)], "y.zarr/zarr.json"]


@pytest.fixture(scope="module")
def s3():
    with serving_s3() as served:
        yield served


@pytest.fixture
def emptied(s3):
    s3.work()
    s3.requests.clear()
    s3.clear()
    return s3


class Store:
    """The part of a store that a test has for itself."""

    def __init__(self, url):
        self.url = url
        self.root = Location.parse(url).container

    def __truediv__(self, name):
        return self.root / name

    def names(self):
        return sorted(objects.listing(self.root))

    def array(self, name="y.zarr"):
        """What plain zarr-python reads."""
        return zarr.open_array(f"{self.url}/{name}", mode="r")[:]


@pytest.fixture
def in_memory():
    return Store(f"memory://{uuid.uuid4()}")


@pytest.fixture(params=["memory", "s3"])
def store(request):
    if request.param == "memory":
        return request.getfixturevalue("in_memory")
    request.getfixturevalue("emptied")
    return Store(f"s3://{BUCKET}")


@pytest.fixture
def array(tmp_path):
    return save_npy(tmp_path / "x.npy", BATCH)


def planned(source, store, **settings):
    settings = {"mode": "caffe", "together": TOGETHER, **settings}
    return plan_of(str(source), f"{store.url}/y.zarr", **settings)


class Counting(StoreStorage):
    """A store's calls, which are counted, and of which one may be the process' last.

    Parameters
    ----------
    dies_at
        The number of the call, from 1; 0 for never.
    when
        Die "before" the call, "after" it, or "half way" through where it removes many objects.
    """

    def __init__(self, dies_at=0, *, when="before"):
        super().__init__()
        self.calls = []
        self._dies_at = dies_at
        self._when = when
        self._is_dead = False

    def _call(self, name, path, do, half=lambda: None):
        if self._is_dead:
            return
        self.calls.append((name, str(path).rpartition("y.zarr")[2]))
        dies = len(self.calls) == self._dies_at
        if dies and self._when == "half way":
            half()
        elif not dies or self._when == "after":
            do()
        if dies:
            self._is_dead = True
            raise Death

    def put(self, path, data):
        self._call("put", path, lambda: super(Counting, self).put(path, data))

    def remove(self, path):
        def half():
            keys = sorted(objects.listing(path))
            for key in keys[: len(keys) // 2 + 1]:
                objects.remove(path / key)

        self._call("remove", path, lambda: super(Counting, self).remove(path), half)


def puts_of_shards(storage):
    return [name for call, name in storage.calls if call == "put" and name.startswith("/c.")]


def test_what_is_stored_is_the_array_and_its_manifest(store, array):
    report = planned(array, store).run()
    assert report.counts["computed_chunks"] == SHARDS
    assert store.names() == FILES
    stored = store.array()
    assert stored.dtype == np.float32
    assert stored.tobytes() == EXPECTED.tobytes()


def test_it_is_verified_and_described(store, array):
    planned(array, store).run()
    verified = fastvgg.verify(f"{store.url}/y.zarr", full=True)
    assert verified.recomputed_images == IMAGES
    known = info(f"{store.url}/y.zarr")
    assert (known["path"], known["state"]) == (f"{store.url}/y.zarr", "finished")
    assert (known["kind"], known["mode"], known["chunks"]) == ("zarr", "caffe", SHARDS)


def test_it_is_restored_and_says_itself_what_was_done(store, array, tmp_path):
    planned(array, store).run()
    plan_of(f"{store.url}/y.zarr", tmp_path / "1.npy", direction="restore").run()
    objects.remove(store / "y.zarr.fastvgg.json")
    assert info(f"{store.url}/y.zarr")["mode"] == "caffe"
    plan_of(f"{store.url}/y.zarr", tmp_path / "2.npy", direction="restore").run()
    for name in ("1.npy", "2.npy"):
        assert np.load(tmp_path / name).tobytes() == BATCH.tobytes()


def test_it_is_restored_into_a_store(store, array):
    planned(array, store).run()
    plan_of(f"{store.url}/y.zarr", f"{store.url}/x.zarr", direction="restore").run()
    assert store.array("x.zarr").tobytes() == BATCH.tobytes()
    fastvgg.verify(f"{store.url}/x.zarr", full=True)


def test_it_gives_batches(store, array):
    planned(array, store).run()
    for images, rows in fastvgg.batches(f"{store.url}/y.zarr", 4, threads=2):
        assert images.tobytes() == EXPECTED[rows].tobytes()


def test_an_array_of_others_is_a_source(store, tmp_path):
    zarr.save_array(f"{store.url}/others.zarr", BATCH)
    plan_of(f"{store.url}/others.zarr", tmp_path / "y.npy", mode="caffe").run()
    assert np.load(tmp_path / "y.npy").tobytes() == EXPECTED.tobytes()


def test_images_have_an_index_and_failures_which_are_tried_again(store, tmp_path):
    photos = save_images(tmp_path / "photos", BATCH, [f"{row:02d}.png" for row in range(IMAGES)])
    whole = (photos / "03.png").read_bytes()
    (photos / "03.png").write_bytes(whole[:50])
    report = planned(photos, store).run()
    assert [failure.row for failure in report.failures] == [3]
    expected = EXPECTED.copy()
    expected[3] = 0
    assert store.array().tobytes() == expected.tobytes()
    index = objects.read(store / "y.zarr.index.csv").decode().splitlines()
    assert len(index) == 1 + IMAGES
    assert "failed" in index[4]
    fastvgg.verify(f"{store.url}/y.zarr", full=True)
    (photos / "03.png").write_bytes(whole)
    storage = Counting()
    run(planned(photos, store, retry_failed=True), storage=storage)
    assert puts_of_shards(storage) == ["/c.1.0.0.0"]
    assert store.array().tobytes() == EXPECTED.tobytes()
    assert len(store.names()) == len(FILES) + 1
    assert fastvgg.verify(f"{store.url}/y.zarr", full=True).recomputed_images == IMAGES


def test_an_index_in_a_store_names_the_files_that_are_restored(store, tmp_path):
    photos = save_images(tmp_path / "photos", BATCH, [f"a/{row:02d}.png" for row in range(IMAGES)])
    planned(photos, store).run()
    plan_of(f"{store.url}/y.zarr", tmp_path / "back", direction="restore").run()
    assert names_in(tmp_path / "back" / "a") == [f"{row:02d}.png" for row in range(IMAGES)]


def test_what_makes_it_an_array_comes_after_all_shards_and_the_manifest_last(in_memory, array):
    storage = Counting()
    run(planned(array, in_memory), storage=storage)
    puts = [name for call, name in storage.calls if call == "put"]
    assert puts[0] == ".fastvgg-journal/job"
    assert puts[-2:] == ["/zarr.json", ".fastvgg.json"]
    assert len(puts) == 3 + 2 * SHARDS
    for number in range(SHARDS):
        line = puts.index(f".fastvgg-journal/{number:09d}")
        assert puts.index(f"/c.{number}.0.0.0") < line


def test_what_is_finished_is_not_done_again(store, array):
    planned(array, store).run()
    storage = Counting()
    report = run(planned(array, store), storage=storage)
    assert storage.calls == []
    assert report.counts["computed_chunks"] == 0


@pytest.mark.parametrize("restart", [False, True])
def test_foreign_objects_below_the_name_of_the_journal_are_refused(store, array, restart):
    objects.put(store / "y.zarr.fastvgg-journal" / "mine.txt", b"precious")
    before = store.names()
    with pytest.raises(TargetError, match="is not a journal of fastvgg"):
        planned(array, store, restart=restart)
    assert store.names() == before


def nobody_can_open(store):
    try:
        zarr.open_array(f"{store.url}/y.zarr", mode="r")
    except FileNotFoundError:
        return True
    return False


WHEN = ("before", "half way", "after")


def calls_of(counting, when, part):
    """The numbers of a third of the calls; half way, only a removal differs from before.

    The thirds differ between before and after, so that the first parts have more of the calls.
    """
    names = [name for name, _ in counting.calls]
    numbers = [n for n, name in enumerate(names, 1) if when != "half way" or name == "remove"]
    return numbers[(part + WHEN.index(when)) % 3 :: 3]


@parts(3)
@pytest.mark.parametrize("when", WHEN)
def test_a_run_that_is_killed_at_any_call_is_finished_by_the_next(array, when, part):
    calls = Counting()
    run(planned(array, Store(f"memory://{uuid.uuid4()}")), storage=calls)
    assert len(calls.calls) > 2 * SHARDS
    for dies_at in calls_of(calls, when, part):
        store = Store(f"memory://{uuid.uuid4()}")
        with pytest.raises(Death):
            run(planned(array, store), storage=Counting(dies_at, when=when))
        if not nobody_can_open(store):
            assert store.array().tobytes() == EXPECTED.tobytes()
        names = store.names()
        committed = sum("journal/0" in name for name in names)
        storage = Counting()
        report = run(planned(array, store), storage=storage)
        assert report.counts["images"] == IMAGES
        if "y.zarr.fastvgg.json" not in names:
            assert len(puts_of_shards(storage)) == SHARDS - committed
        assert store.names() == FILES
        assert store.array().tobytes() == EXPECTED.tobytes()
        fastvgg.verify(f"{store.url}/y.zarr")


@parts(3)
@pytest.mark.parametrize("when", WHEN)
def test_a_restart_that_is_killed_at_any_call_is_finished_by_the_next(array, when, part):
    def begun():
        store = Store(f"memory://{uuid.uuid4()}")
        planned(array, store, mode="tf").run()
        return store

    calls, before = Counting(), oracle.apply(fastvgg.Transform("tf"), BATCH)
    run(planned(array, begun(), restart=True), storage=calls)
    for dies_at in calls_of(calls, when, part):
        store = begun()
        with pytest.raises(Death):
            run(planned(array, store, restart=True), storage=Counting(dies_at, when=when))
        if not nobody_can_open(store):  # it is whole, the one or the other
            assert store.array().tobytes() in (before.tobytes(), EXPECTED.tobytes())
        run(planned(array, store, restart=True))
        assert store.names() == FILES
        assert store.array().tobytes() == EXPECTED.tobytes()


@parts(3)
@pytest.mark.parametrize("when", WHEN)
def test_a_retry_that_is_killed_at_any_call_is_finished_by_the_next(tmp_path, when, part):
    photos = save_images(tmp_path / "photos", BATCH, [f"{row:02d}.png" for row in range(IMAGES)])
    whole = (photos / "03.png").read_bytes()

    def begun():
        (photos / "03.png").write_bytes(b"torn")
        store = Store(f"memory://{uuid.uuid4()}")
        planned(photos, store).run()
        (photos / "03.png").write_bytes(whole)
        return store

    def again(store, storage=None):
        return run(planned(photos, store, retry_failed=True), storage=storage)

    calls = Counting()
    again(begun(), calls)
    assert puts_of_shards(calls) == ["/c.1.0.0.0"]
    for dies_at in calls_of(calls, when, part):
        store = begun()
        with pytest.raises(Death):
            again(store, Counting(dies_at, when=when))
        again(store)
        assert store.names() == sorted([*FILES, "y.zarr.index.csv"])
        assert store.array().tobytes() == EXPECTED.tobytes()


def test_a_run_that_was_restarted_and_killed_goes_on_without_another_restart(in_memory, array):
    planned(array, in_memory, mode="tf").run()
    with pytest.raises(Death):
        run(planned(array, in_memory, restart=True), storage=Counting(2 * SHARDS))
    run(planned(array, in_memory))
    assert in_memory.array().tobytes() == EXPECTED.tobytes()


KILLED = """
import os, signal, sys
from fastvgg.storage.objects import StoreStorage
from fastvgg.stream.run import run
from tests.helpers.datasets_on_disk import plan_of
source, target, together, left = sys.argv[1:]
class Killed(StoreStorage):
    left = int(left)
    def put(self, path, data):
        Killed.left -= 1
        if Killed.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        super().put(path, data)
plan = plan_of(source, target, mode="caffe", together=int(together))
run(plan, storage=Killed())
"""


@sampled("puts", [1, 2 * SHARDS + 1, 4, 2 * SHARDS + 2, 7, 2 * SHARDS + 3], one_in=2)
def test_a_process_that_is_killed_leaves_what_the_next_one_finishes(emptied, array, puts):
    store = Store(f"s3://{BUCKET}")
    done = python(KILLED, array, f"{store.url}/y.zarr", str(TOGETHER), str(puts))
    assert done.returncode == -signal.SIGKILL, done.stderr
    committed = sum("journal/0" in key for key in emptied.objects())
    shards = sum("/c." in key for key in emptied.objects())
    assert shards + committed == min(2 * SHARDS, max(0, puts - 2))
    emptied.requests.clear()
    report = planned(array, store).run()
    assert report.counts["computed_chunks"] == SHARDS - committed
    put = [path for method, path in emptied.requests if method == "PUT" and "/c." in path]
    assert len(put) == SHARDS - committed
    assert store.names() == FILES
    assert store.array().tobytes() == EXPECTED.tobytes()


def cut_off(array, store):
    """Leave a run unfinished, with four shards committed."""
    with pytest.raises(Death):
        run(planned(array, store), storage=DyingAfterFour())


class DyingAfterFour(Counting):
    """A store that dies when four shards are committed."""

    def put(self, path, data):
        if len([name for _, name in self.calls if "journal/0" in name]) == 4:
            self._dies_at = len(self.calls) + 1
        super().put(path, data)


def test_an_unfinished_run_is_described_and_cannot_be_opened(store, array):
    cut_off(array, store)
    known = info(f"{store.url}/y.zarr")
    assert (known["state"], known["committed_chunks"], known["chunks"]) == ("unfinished", 4, SHARDS)
    assert nobody_can_open(store)


@pytest.mark.parametrize(
    ("store", "damage"),
    [
        *(("memory", damage) for damage in ("cut", "flipped", "gone", "another", "empty")),
        *(("s3", damage) for damage in ("cut", "gone")),
    ],
    indirect=["store"],
)
def test_a_shard_that_is_not_what_was_committed_is_done_again(store, array, damage):
    cut_off(array, store)
    shard, other = store / "y.zarr" / "c.2.0.0.0", store / "y.zarr" / "c.1.0.0.0"
    content = bytearray(objects.read(shard))
    content[len(content) // 2] ^= 4
    if damage == "gone":
        objects.remove(shard)
    else:
        damaged = {"cut": content[:-7], "flipped": content, "another": objects.read(other)}
        objects.put(shard, bytes(damaged.get(damage, b"")))
    storage, seen = Counting(), []
    report = run(planned(array, store), storage=storage, progress=seen.append)
    assert puts_of_shards(storage) == ["/c.2.0.0.0", "/c.4.0.0.0", "/c.5.0.0.0"]
    assert (seen[-1].images, seen[-1].total_images) == (IMAGES, IMAGES)
    assert report.counts["computed_chunks"] == 3
    assert store.array().tobytes() == EXPECTED.tobytes()


@pytest.mark.parametrize("content", [b"", b"half a line", b"0123456789abcdef {}\n"])
def test_a_line_of_the_journal_that_is_not_whole_is_of_a_chunk_to_be_done_again(
    in_memory, array, content
):
    cut_off(array, in_memory)
    objects.put(in_memory / "y.zarr.fastvgg-journal" / "000000001", content)
    storage = Counting()
    run(planned(array, in_memory), storage=storage)
    assert puts_of_shards(storage) == ["/c.1.0.0.0", "/c.4.0.0.0", "/c.5.0.0.0"]
    assert in_memory.array().tobytes() == EXPECTED.tobytes()


def test_a_restart_forgets_what_an_unfinished_run_committed(in_memory, array):
    with pytest.raises(Death):
        run(planned(array, in_memory, together=1), storage=Counting(2 * IMAGES))
    assert any(name.endswith("journal/000000004") for name in in_memory.names())
    with pytest.raises(Death):
        run(planned(array, in_memory, together=4, restart=True), storage=Counting(6))
    planned(array, in_memory, together=4).run()
    assert [name for name in in_memory.names() if "/c." in name] == FILES[1:4]
    assert in_memory.array().tobytes() == EXPECTED.tobytes()


def test_a_restart_replaces_what_was_there_when_it_began_and_nothing_else(in_memory, array):
    planned(array, in_memory, mode="tf").run()
    begun = Counting()
    run(planned(array, in_memory, mode="torch", restart=True), storage=begun)
    first = begun.calls.index(("put", ".fastvgg-journal/job")) + 1
    with pytest.raises(Death):
        run(planned(array, in_memory, restart=True), storage=Counting(first, when="after"))
    metadata = objects.read(in_memory / "y.zarr" / "zarr.json")
    objects.put(in_memory / "y.zarr" / "zarr.json", metadata + b" ")
    with pytest.raises(TargetError) as caught:
        planned(array, in_memory)
    must_say(caught.value, f"{in_memory.url}/y.zarr", "exists")
    objects.put(in_memory / "y.zarr" / "zarr.json", metadata)
    planned(array, in_memory).run()
    assert in_memory.array().tobytes() == EXPECTED.tobytes()


def test_a_journal_of_something_else_is_replaced_by_a_restart_alone(in_memory, array):
    cut_off(array, in_memory)
    objects.put(in_memory / "y.zarr.fastvgg-journal" / "job", encode_line({"fastvgg-journal": 99}))
    with pytest.raises(ResumeError) as caught:
        planned(array, in_memory)
    must_say(caught.value, "y.zarr.fastvgg-journal", "99", "--restart")
    planned(array, in_memory, restart=True).run()
    assert in_memory.names() == FILES
    assert in_memory.array().tobytes() == EXPECTED.tobytes()


def test_other_settings_do_not_go_on_with_an_unfinished_run(store, array):
    cut_off(array, store)
    with pytest.raises(ResumeError) as caught:
        planned(array, store, mode="tf")
    must_say(caught.value, f"{store.url}/y.zarr", "caffe", "tf", "--restart")
    planned(array, store, mode="tf", restart=True).run()
    assert fastvgg.verify(f"{store.url}/y.zarr", full=True)


def test_what_fastvgg_did_not_write_is_never_replaced(store, array):
    zarr.save_array(f"{store.url}/y.zarr", BATCH)
    before = store.names()
    with pytest.raises(TargetError) as caught:
        planned(array, store)
    must_say(caught.value, f"{store.url}/y.zarr", "was not written by fastvgg")
    with pytest.raises(TargetError) as caught:
        planned(array, store, restart=True)
    must_say(caught.value, f"{store.url}/y.zarr", "did not write")
    assert store.names() == before


def test_objects_that_are_no_array_are_never_replaced(store, array):
    objects.put(store / "y.zarr" / "notes" / "a.txt", b"mine")
    for settings in ({}, {"restart": True}):
        with pytest.raises(TargetError) as caught:
            planned(array, store, **settings)
        must_say(caught.value, f"{store.url}/y.zarr")
    assert store.names() == ["y.zarr/notes/a.txt"]


def test_a_finished_array_of_another_job_is_replaced_by_a_restart_alone(store, array):
    planned(array, store, mode="tf").run()
    with pytest.raises(TargetError) as caught:
        planned(array, store)
    must_say(caught.value, f"{store.url}/y.zarr", "with other settings", "--restart")
    planned(array, store, restart=True).run()
    assert store.names() == FILES
    assert store.array().tobytes() == EXPECTED.tobytes()


def test_what_others_put_there_meanwhile_is_not_replaced(in_memory, array):
    cut_off(array, in_memory)
    objects.put(in_memory / "y.zarr" / "zarr.json", b"{}")
    with pytest.raises(TargetError) as caught:
        planned(array, in_memory)
    must_say(caught.value, "was not written by fastvgg")


def test_a_store_that_fails_now_and_then_is_asked_again(emptied, array):
    store = Store(f"s3://{BUCKET}")
    emptied.fail("PUT|GET|HEAD", r"/c\.|journal", 503, times=1)
    planned(array, store).run()
    assert store.array().tobytes() == EXPECTED.tobytes()


@pytest.fixture
def impatient(monkeypatch):
    from s3fs import S3FileSystem

    monkeypatch.setattr(S3FileSystem, "retries", 2)


def test_a_store_that_fails_for_long_stops_the_run_which_goes_on_later(emptied, array, impatient):
    store = Store(f"s3://{BUCKET}")
    plan = planned(array, store)
    emptied.fail("PUT", r"/c\.3", 503)
    with pytest.raises(StoppedError) as caught:
        plan.run()
    must_say(caught.value, f"s3://{BUCKET}/y.zarr/c.3.0.0.0", "put")
    assert caught.value.exit_code == 5
    emptied.work()
    assert nobody_can_open(store)
    committed = info(f"{store.url}/y.zarr")["committed_chunks"]
    assert 0 < committed <= 3
    report = planned(array, store).run()
    assert report.counts["computed_chunks"] == SHARDS - committed
    assert store.array().tobytes() == EXPECTED.tobytes()


@pytest.mark.parametrize("path", ["/zarr.json", "y.zarr.fastvgg.json"])
def test_a_store_that_fails_at_the_end_leaves_little_to_do(emptied, array, impatient, path):
    store = Store(f"s3://{BUCKET}")
    plan = planned(array, store)
    emptied.fail("PUT", path, 503)
    with pytest.raises(StoppedError):
        plan.run()
    emptied.work()
    assert planned(array, store).run().counts["computed_chunks"] == 0
    assert store.names() == FILES


def test_a_store_that_cannot_be_written_to_is_refused_before_anything_is_done(emptied, array):
    store = Store(f"s3://{BUCKET}")
    plan = planned(array, store)
    emptied.fail("PUT", "", 403)
    with pytest.raises(TargetError) as caught:
        plan.run()
    must_say(caught.value, f"s3://{BUCKET}/y.zarr", "nothing was written")
    assert caught.value.exit_code == 3
    emptied.work()
    assert store.names() == []


def test_a_source_that_fails_for_long_stops_the_run_which_goes_on_later(
    emptied, array, tmp_path, impatient
):
    store = Store(f"s3://{BUCKET}")
    planned(array, store).run()
    settings = {"direction": "restore", "together": TOGETHER}
    plan = plan_of(f"{store.url}/y.zarr", tmp_path / "x2.npy", **settings)
    emptied.fail("GET", r"/c\.3", 503)
    with pytest.raises(StoppedError) as caught:
        plan.run()
    must_say(caught.value, f"s3://{BUCKET}/y.zarr", "read")
    assert caught.value.exit_code == 5
    emptied.work()
    report = plan_of(f"{store.url}/y.zarr", tmp_path / "x2.npy", **settings).run()
    assert report.counts["computed_chunks"] < SHARDS
    assert np.load(tmp_path / "x2.npy").tobytes() == BATCH.tobytes()


NOT_ANSWERING = """
import sys
from fastvgg.errors import SourceError, TargetError
from tests.helpers.datasets_on_disk import must_say, plan_of
for paths in (("s3://bucket/x.zarr", "y.npy"), (sys.argv[1], "s3://bucket/y.zarr")):
    try:
        plan_of(*paths, mode="tf")
    except (SourceError, TargetError) as error:
        must_say(error, "s3://bucket/", "127.0.0.1:9")
        print("refused")
"""


def test_a_store_that_does_not_answer_is_refused(array):
    environment = {**ENVIRONMENT, "AWS_ENDPOINT_URL": "http://127.0.0.1:9"}
    done = python(NOT_ANSWERING, array, env=environment)
    assert done.stdout.split() == ["refused", "refused"], done.stderr


def test_a_bucket_that_is_not_there_is_refused(emptied, array):
    with pytest.raises((SourceError, TargetError)) as caught:
        plan_of(array, "s3://nowhere/y.zarr", mode="tf").run()
    must_say(caught.value, "s3://nowhere/y.zarr", "bucket")


def test_a_source_that_is_not_there_is_refused(store, tmp_path):
    with pytest.raises(SourceError) as caught:
        plan_of(f"{store.url}/nothing.zarr", tmp_path / "y.npy", mode="tf")
    must_say(caught.value, f"{store.url}/nothing.zarr", "no Zarr array")


def test_a_chunk_that_is_missing_is_refused(store, array, tmp_path):
    planned(array, store).run()
    objects.remove(store / "y.zarr" / "c.3.0.0.0")
    with pytest.raises(SourceError) as caught:
        plan_of(f"{store.url}/y.zarr", tmp_path / "x2.npy", direction="restore")
    must_say(caught.value, "1 of 6 chunks are missing", "c.3.0.0.0")


def test_a_chunk_that_goes_missing_stops_the_run(store, array):
    planned(array, store).run()
    source = open_source(Location.parse(f"{store.url}/y.zarr"))
    objects.remove(store / "y.zarr" / "c.3.0.0.0")
    assert source.read(0, 5).batch.tobytes() == EXPECTED[:5].tobytes()
    with pytest.raises(StoppedError) as caught:
        source.read(4, 8)
    must_say(caught.value, "c.3.0.0.0", "missing")
    source.close()


def test_a_chunk_that_changed_is_found_by_verifying(store, array):
    planned(array, store).run()
    shard = store / "y.zarr" / "c.3.0.0.0"
    content = bytearray(objects.read(shard))
    content[9] ^= 1
    objects.put(shard, bytes(content))
    with pytest.raises(VerificationError) as caught:
        fastvgg.verify(f"{store.url}/y.zarr")
    must_say(caught.value, "c.3.0.0.0", f"{store.url}/y.zarr")


def test_a_source_that_changes_while_it_is_read_is_seen(store, array, tmp_path):
    planned(array, store).run()
    plan = plan_of(f"{store.url}/y.zarr", tmp_path / "x2.npy", direction="restore")
    objects.put(store / "y.zarr" / "c.3.0.0.0", objects.read(store / "y.zarr" / "c.2.0.0.0")[:-1])
    with pytest.raises(SourceError) as caught:
        plan.run()
    must_say(caught.value, "has changed since")


@pytest.mark.parametrize("name", ["x.npy", "x.h5", "x.h5::/images"])
def test_of_a_store_zarr_alone_is_read_and_written(in_memory, array, tmp_path, name):
    with pytest.raises(SourceError) as caught:
        plan_of(f"{in_memory.url}/{name}", tmp_path / "y.npy", mode="tf")
    must_say(caught.value, f"{in_memory.url}/{name}", "Zarr")
    with pytest.raises(TargetError) as caught:
        plan_of(array, f"{in_memory.url}/{name}", mode="tf")
    must_say(caught.value, f"{in_memory.url}/{name}", ".zarr")


def test_an_array_is_not_written_into_its_source(in_memory, array):
    planned(array, in_memory).run()
    for name in ("y.zarr", "y.zarr/z.zarr"):
        with pytest.raises((TargetError, SourceError)):
            plan_of(f"{in_memory.url}/y.zarr", f"{in_memory.url}/{name}", direction="restore")


def test_nothing_in_a_store_is_changed_in_place(in_memory, array):
    planned(array, in_memory).run()
    with pytest.raises(UsageError) as caught:
        fastvgg.plan(f"{in_memory.url}/y.zarr", in_place=True, direction="restore")
    must_say(caught.value, "--in-place")


@pytest.mark.parametrize("url", ["nothing://bucket/x.zarr", "http+x://x"])
def test_a_url_of_no_known_store_is_refused(tmp_path, url):
    with pytest.raises(UsageError) as caught:
        plan_of(url, tmp_path / "y.npy", mode="tf")
    must_say(caught.value, url, "pip install '.[zarr]'")


def test_what_is_needed_for_urls_is_named_where_it_is_missing(tmp_path):
    script = """
import sys
sys.modules["upath"] = None
import fastvgg
try:
    fastvgg.plan("s3://bucket/x.zarr", "y.npy", mode="tf")
except fastvgg.errors.UsageError as error:
    print(error.remedy)
"""
    done = python(script)
    assert "pip install '.[zarr]'" in done.stdout, done.stderr


def test_the_command_line_takes_urls(emptied, array, tmp_path):
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


def test_a_path_of_this_machine_may_be_given_as_a_url(array, tmp_path):
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
    assert {key: size for key, (size, _) in objects.listing(store / "a").items()} == {
        "1": 3,
        "b/2": 3,
    }
    assert objects.read_all(store / "a") == {"1": b"one", "b/2": b"two"}
    assert objects.read_all(store / "b") == {}
    assert objects.listing(store / "ab") == {}
    with objects.opened(store / "ab") as file:
        file.seek(2)
        assert file.read() == b"ree"
    before = objects.listing(store / "a")
    objects.put(store / "a/1", b"new")
    assert objects.listing(store / "a") != before
    objects.remove(store / "a")
    objects.remove(store / "b")
    assert store.names() == ["ab"]
