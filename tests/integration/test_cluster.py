"""Plans on a real two-process Dask cluster: the same output as one machine, despite failures."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pickle
import secrets
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from distributed import Client, LocalCluster
from typer.testing import CliRunner

import fastvgg
from fastvgg import cli
from fastvgg.errors import ClusterError, ResumeError, SourceError, StoppedError, UsageError
from fastvgg.executors import dask as cluster
from fastvgg.executors.worker import Task, run_task
from fastvgg.storage import objects
from fastvgg.storage.location import Location
from fastvgg.storage.objects import ObjectStorage
from fastvgg.stream import run as runs
from fastvgg.stream.compute import ChunkTask
from fastvgg.stream.manifest import read_manifest
from tests.campaigns import cluster_kills
from tests.helpers.checkout import checkout_environment
from tests.helpers.datasets_on_disk import (
    check_error,
    commits_in,
    names_in,
    pixels,
    plan_of,
    save_images,
    save_npy,
    tree,
)
from tests.helpers.faults import InterruptedStorage, SimulatedCrash
from tests.helpers.private_disks import NOT_ALLOWED
from tests.helpers.runs import run
from tests.helpers.samples import sampled
from tests.helpers.stores import BUCKET, serve_s3

IMAGES = 40
TARGETS = ("y.npy", "y.zarr", "y.h5::/images")


@pytest.fixture(scope="module")
def workers():
    """Two single-threaded worker processes, which are restarted if killed."""
    options = {"n_workers": 2, "threads_per_worker": 1, "dashboard_address": ":0"}
    with serve_s3() as s3, LocalCluster(**options, silence_logs=50) as started:
        started.s3 = s3
        yield started


@pytest.fixture
def client(workers):
    with Client(workers, set_as_default=False) as connect:
        connect.wait_for_workers(2, timeout=60)
        yield connect


@pytest.fixture
def two_tasks_in_flight(monkeypatch):
    """Limit the cluster to two tasks in flight, each committed when it is done."""
    monkeypatch.setattr(cluster, "MIN_IN_FLIGHT", 2)
    monkeypatch.setattr(cluster, "IN_FLIGHT_PER_THREAD", 1)
    monkeypatch.setattr(cluster, "GATHER_SECONDS", 0)
    monkeypatch.setattr(cluster, "MAX_CHUNKS_PER_TASK", 1)


@pytest.fixture
def array(tmp_path):
    return save_npy(tmp_path / "x.npy", pixels(IMAGES))


def contents(target):
    """The bytes of a finished target: a file's, or those of all files below a directory."""
    path = Location.parse(target).container
    if path.is_dir():
        return {file.name: file.read_bytes() for file in path.iterdir()}
    return path.read_bytes()


def single_machine_contents(plan, tmp_path):
    """Return the output of the same plan without a cluster."""
    directory = tmp_path / "alone"
    directory.mkdir()
    target = Location(directory / plan.target.container.name, plan.target.inner)
    dataclasses.replace(plan, target=target).run()
    expected = read_manifest(plan.target.container).checksums
    assert read_manifest(target.container).checksums == expected
    return contents(target)


def check(plan, tmp_path):
    """Check that a finished target equals the output of one machine and has no leftovers."""
    assert contents(plan.target) == single_machine_contents(plan, tmp_path)
    verified = fastvgg.verify(plan.target, full=True)
    assert (verified.chunks, verified.recomputed_images) == (plan.chunks, plan.header.images)
    name = plan.target.container.name
    left = {found for found in names_in(tmp_path) if found.startswith(name)}
    assert left <= {name, f"{name}.fastvgg.json", f"{name}.index.csv"}


@pytest.mark.parametrize("name", TARGETS)
def test_cluster_output_matches_a_single_machine(client, tmp_path, array, name):
    plan = plan_of(array, tmp_path / name, mode="caffe", images_per_chunk=3)
    reports = []
    report = plan.run(reports.append, client=client)
    assert report.counts == {"images": IMAGES, "failed": 0, "chunks": 14, "computed_chunks": 14}
    assert [progress.images for progress in reports][-1] == IMAGES
    assert len(reports) == 14
    check(plan, tmp_path)
    rerun = plan_of(array, tmp_path / name, mode="caffe", images_per_chunk=3).run(client=client)
    assert rerun.counts["computed_chunks"] == 0


@pytest.mark.parametrize("name", TARGETS)
def test_multi_chunk_tasks_match_a_single_machine(client, tmp_path, name, monkeypatch):
    monkeypatch.setattr(cluster, "TASKS_PER_THREAD", 2)
    keys = []
    monkeypatch.setattr(
        client,
        "map",
        lambda *a, key: [*map(keys.extend, [key])] and Client.map(client, *a, key=key),
    )
    source = save_npy(tmp_path / "x.npy", pixels(29, height=61, width=65))
    plan = plan_of(source, tmp_path / name, mode="caffe", images_per_chunk=1)
    plan.run(client=client)
    firsts = [int(key.rpartition("-")[2]) for key in keys]
    assert firsts == [0, 7, 14, 21, 28]
    check(plan, tmp_path)


def test_chunks_that_share_or_span_pages_are_complete(client, tmp_path):
    for height, images_per_chunk in ((7, 1), (7, 30), (64, 1), (64, 7)):
        source = save_npy(tmp_path / f"{height}.npy", pixels(IMAGES, height=height, width=65))
        target = tmp_path / f"y{height}-{images_per_chunk}.npy"
        plan = plan_of(
            source, target, mode="torch", images_per_chunk=images_per_chunk, dtype="float16"
        )
        plan.run(client=client)
        assert contents(target) == single_machine_contents(plan, tmp_path)
        (tmp_path / "alone").rename(tmp_path / f"alone{height}-{images_per_chunk}")


@pytest.mark.parametrize("name", TARGETS)
def test_failed_images_are_zero_rows_and_index_lines(client, tmp_path, name):
    folder = save_images(tmp_path / "photos", pixels(9))
    (folder / "a" / "04.png").write_bytes(b"no image")
    plan = plan_of(folder, tmp_path / name, mode="tf", images_per_chunk=2)
    report = plan.run(client=client)
    assert report.counts["failed"] == 1
    assert [failure.path for failure in report.failures] == ["a/04.png"]
    index = tmp_path / f"{name.partition(':')[0]}.index.csv"
    check(plan, tmp_path)
    assert index.read_bytes() == (tmp_path / "alone" / index.name).read_bytes()


def test_strict_run_stops_at_an_unreadable_image(client, tmp_path):
    folder = save_images(tmp_path / "photos", pixels(9))
    (folder / "a" / "04.png").write_bytes(b"no image")
    with pytest.raises(StoppedError) as caught:
        plan_of(folder, tmp_path / "y.npy", mode="tf", images_per_chunk=2, strict=True).run(
            client=client
        )
    check_error(caught.value, "a/04.png", "row 2", "strict=True")


@pytest.mark.parametrize("restart", [False, True])
def test_run_in_which_every_image_fails_changes_nothing(client, tmp_path, restart):
    folder = save_images(tmp_path / "photos", pixels(11))
    settings = {"mode": "tf", "images_per_chunk": 2, "size": (7, 9)}
    if restart:
        plan_of(folder, tmp_path / "y.npy", **settings).run()
    for path in folder.rglob("*.png"):
        path.write_bytes(b"no image")
    before = tree(tmp_path)
    with pytest.raises(SourceError) as caught:
        plan_of(folder, tmp_path / "y.npy", restart=restart, **settings).run(client=client)
    check_error(caught.value, "no image in", folder)
    assert tree(tmp_path) == before


def test_restored_images_equal_the_originals(client, tmp_path, array):
    plan_of(array, tmp_path / "y.zarr", mode="caffe", images_per_chunk=3).run(client=client)
    plan_of(
        tmp_path / "y.zarr", tmp_path / "z.npy", mode=None, direction="restore", images_per_chunk=6
    ).run(client=client)
    assert (tmp_path / "z.npy").read_bytes() == array.read_bytes()


def test_all_workers_write_to_an_object_store(client, workers, tmp_path, array):
    target = f"s3://{BUCKET}/y.zarr"
    plan_of(array, target, mode="caffe", images_per_chunk=3).run(client=client)
    alone = plan_of(array, tmp_path / "y.zarr", mode="caffe", images_per_chunk=3)
    alone.run()
    found = workers.s3.objects()
    for name, content in contents(tmp_path / "y.zarr").items():
        assert found.pop(f"y.zarr/{name}") == content
    assert [*found] == ["y.zarr.fastvgg.json"]


def test_executor_runs_multiple_plans_in_sequence(client, tmp_path, array):
    executor = cluster.DaskExecutor(client)
    for number, name in enumerate(TARGETS):
        place = tmp_path / str(number)
        place.mkdir()
        plan = plan_of(array, place / name, mode="caffe", images_per_chunk=3)
        runs.run(plan, executor)
        assert contents(plan.target) == single_machine_contents(plan, place)


# Killed processes


@pytest.mark.parametrize("name", TARGETS)
def test_killed_worker_loses_nothing(client, two_tasks_in_flight, tmp_path, array, name):
    plan = plan_of(array, tmp_path / name, mode="caffe", images_per_chunk=1)
    pids = [*client.run(os.getpid).values()]

    def kill(progress):
        if progress.images >= 5 and pids:
            os.kill(pids[0], signal.SIGKILL)
            pids.clear()

    plan.run(kill, client=client)
    assert not pids
    check(plan, tmp_path)


def test_task_whose_workers_all_die_stops_the_run_with_a_message(
    client, two_tasks_in_flight, workers, tmp_path, array, monkeypatch
):
    monkeypatch.setattr(workers.scheduler, "allowed_failures", 0)
    plan = plan_of(array, tmp_path / "y.npy", mode="caffe", images_per_chunk=1)

    def kill(progress):
        for pid in client.run(os.getpid, on_error="ignore").values():  # some may be exiting
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    with pytest.raises(StoppedError) as caught:
        plan.run(kill, client=client)
    check_error(caught.value, "every worker that ran the task preprocess-", "memory=")
    client.wait_for_workers(2, timeout=60)
    plan.run(client=client)
    check(plan, tmp_path)


def test_lost_scheduler_stops_the_run_which_another_cluster_resumes(
    client, two_tasks_in_flight, tmp_path, array
):
    plan = plan_of(array, tmp_path / "y.zarr", mode="caffe", images_per_chunk=1)
    alone = cluster_kills.Workers(tmp_path)
    with contextlib.closing(alone):
        alone.connect().close()  # once the scheduler is running
        with alone.connect(timeout=2) as its_client, pytest.raises(StoppedError) as caught:
            plan.run(lambda _: alone.close(), client=its_client)
    check_error(caught.value, "the scheduler tcp://", "is gone", "rerun the same command")
    done = commits_in(tmp_path / "y.zarr")
    assert plan.run(client=client).counts["computed_chunks"] == IMAGES - done < IMAGES
    check(plan, tmp_path)


def test_workers_release_files_and_plans_after_a_run(client, tmp_path, array):
    def held():
        return [os.path.realpath(file) for file in Path("/proc/self/fd").iterdir()]

    def kept():
        from fastvgg.executors import worker

        return sum(str(tmp_path).encode() in plan for plan in worker._runs)

    for name in TARGETS:
        plan_of(array, tmp_path / name, mode="caffe", images_per_chunk=3).run(client=client)
        assert {*client.run(kept).values()} == {0}
        for files in client.run(held).values():
            assert not [file for file in files if str(tmp_path) in file]


@pytest.mark.parametrize("name", TARGETS)
def test_interrupted_run_resumes_with_and_without_a_cluster(
    client, two_tasks_in_flight, tmp_path, array, name
):
    plan = plan_of(array, tmp_path / name, mode="caffe", images_per_chunk=2)

    class Stopped(BaseException):
        pass

    def stop(progress):
        if progress.images >= 10:
            raise Stopped

    with pytest.raises(Stopped):
        plan.run(stop, client=client)
    done = commits_in(Location.parse(tmp_path / name).container)
    assert 5 <= done < 20
    with pytest.raises(Stopped):  # more chunks, on one machine
        plan_of(array, tmp_path / name, mode="caffe", images_per_chunk=2).run(
            lambda progress: stop(progress._replace(images=progress.computed_images + 6))
        )
    more = commits_in(Location.parse(tmp_path / name).container)
    assert done < more < 20
    report = plan_of(array, tmp_path / name, mode="caffe", images_per_chunk=2).run(client=client)
    assert report.counts["computed_chunks"] == 20 - more
    check(plan, tmp_path)


def test_damaged_committed_shard_is_recomputed(client, tmp_path, array):
    plan = plan_of(array, tmp_path / "y.zarr", mode="caffe", images_per_chunk=2)
    with pytest.raises(SimulatedCrash):
        run(plan, storage=InterruptedStorage(10))
    done = commits_in(tmp_path / "y.zarr")
    damaged = tmp_path / "y.zarr.partial" / "c.0.0.0.0"
    content = bytearray(damaged.read_bytes())
    content[100] ^= 1
    damaged.write_bytes(content)
    report = plan.run(client=client)
    assert report.counts["computed_chunks"] == 20 - done + 1
    check(plan, tmp_path)


# Tasks that run twice, or too late


def start_run(plan):
    """Start a run, interrupt it after its first commit, and return its tasks."""
    with pytest.raises(SimulatedCrash):
        run(plan, storage=InterruptedStorage(1))
    assert commits_in(plan.target.container) == 1
    shared = pickle.dumps((secrets.token_hex(8), dataclasses.replace(plan, threads=1)))
    rows = [*enumerate(plan.chunk_rows())]
    return [Task(shared, (ChunkTask(chunk, *span),)) for chunk, span in rows]


def written_contents(plan, results):
    """Return what tasks wrote, with the edges that they leave to the coordinator."""
    partial = Location.parse(f"{plan.target.container}.partial").container
    if partial.is_dir():
        assert not any(done.edges for done in results)
        return {file.name: file.read_bytes() for file in partial.iterdir()}
    content = bytearray(partial.read_bytes())
    for done in results:
        for offset, data in done.edges:
            content[offset : offset + len(data)] = data
    return bytes(content)


@pytest.mark.parametrize("name", TARGETS)
def test_duplicate_execution_of_a_task_writes_the_same_bytes(client, tmp_path, name):
    source = save_npy(tmp_path / "x.npy", pixels(6, height=61, width=65))
    plan = plan_of(source, tmp_path / name, mode="caffe", images_per_chunk=2)
    tasks = start_run(plan)
    addresses = [*client.nthreads()]
    for _ in range(2):
        twice = [
            client.submit(run_task, task, workers=[address], pure=False)
            for task in tasks
            for address in addresses
        ]
        results = [done for (done,) in client.gather(twice)]
        assert results[::2] == results[1::2]
        left = sum(len(data) for done in results[::2] for _, data in done.edges)
        assert left < 3 * 2 * 4096
        for done in results if name != "y.zarr" else ():  # only whole pages lie in between
            (before, first), (after, last) = done.edges
            assert (before + len(first)) % 4096 == after % 4096 == 0
            assert 0 < len(first) < 4096 > len(last) > 0
    written = written_contents(plan, results[::2])
    plan.run()
    assert written == contents(tmp_path / name)
    check(plan, tmp_path)


@pytest.mark.parametrize("name", TARGETS)
def test_failed_task_does_not_affect_the_next_one_in_its_process(tmp_path, name):
    folder = save_images(tmp_path / "photos", pixels(9))
    (folder / "a" / "04.png").write_bytes(b"no image")
    tasks = start_run(plan_of(folder, tmp_path / name, mode="tf", images_per_chunk=1, strict=True))
    fails = [number for number, task in enumerate(tasks) if is_rejected(task)]
    assert len(fails) == 1
    both = Task(tasks[0].plan, tasks[0].chunks + tasks[fails[0]].chunks)
    assert is_rejected(both)
    assert [done.commit.chunk for done in run_task(tasks[1])] == [1]


def is_rejected(task):
    try:
        run_task(task)
    except StoppedError as error:
        check_error(error, "a/04.png", "strict=True")
        return True
    return False


@pytest.mark.parametrize("name", TARGETS)
def test_task_of_a_replaced_run_changes_nothing(tmp_path, array, name):
    tasks = start_run(plan_of(array, tmp_path / name, mode="caffe", images_per_chunk=2))
    run_task(tasks[0])  # this process now has the target open
    other = plan_of(array, tmp_path / name, mode="tf", images_per_chunk=2, restart=True)
    with pytest.raises(SimulatedCrash):
        run(other, storage=InterruptedStorage(10))
    before = tree(tmp_path)
    for task in (tasks[1], dataclasses.replace(tasks[2], plan=with_new_run_id(tasks[2].plan))):
        with contextlib.suppress(ResumeError, StoppedError):
            run_task(task)
        assert tree(tmp_path) == before
    with pytest.raises((ResumeError, StoppedError)):
        run_task(dataclasses.replace(tasks[2], plan=with_new_run_id(tasks[2].plan)))
    other = plan_of(array, tmp_path / name, mode="tf", images_per_chunk=2)
    other.run()
    check(other, tmp_path)


def with_new_run_id(shared):
    """Return the same plan with another run token, as in a process that has nothing open."""
    return pickle.dumps((secrets.token_hex(8), pickle.loads(shared)[1]))  # noqa: S301  # our own


@pytest.mark.parametrize("name", TARGETS)
def test_late_task_after_the_run_changes_nothing(tmp_path, array, name):
    plan = plan_of(array, tmp_path / name, mode="caffe", images_per_chunk=2)
    tasks = start_run(plan)
    run_task(tasks[0])
    plan.run()
    before = tree(tmp_path)
    with contextlib.suppress(ResumeError, StoppedError):
        run_task(tasks[1])
    with pytest.raises((ResumeError, StoppedError)):
        run_task(dataclasses.replace(tasks[2], plan=with_new_run_id(tasks[2].plan)))
    assert tree(tmp_path) == before
    check(plan, tmp_path)


def test_object_store_task_of_a_replaced_run_changes_nothing(array):
    store = f"memory://{secrets.token_hex(8)}"
    plan = plan_of(array, f"{store}/y.zarr", mode="caffe", images_per_chunk=2)
    with contextlib.suppress(SimulatedCrash):
        run(plan, storage=CrashingObjectStorage(3))
    shared = pickle.dumps((secrets.token_hex(8), plan))
    run_task(Task(shared, (ChunkTask(0, 0, 2),)))
    other = plan_of(array, f"{store}/y.zarr", mode="tf", images_per_chunk=2, restart=True)
    with contextlib.suppress(SimulatedCrash):
        run(other, storage=CrashingObjectStorage(9))
    before = objects.read_all(Location.parse(store).container)
    assert len(before) > 3
    with pytest.raises(StoppedError, match="belongs to another run"):
        run_task(Task(shared, (ChunkTask(1, 2, 4), ChunkTask(2, 4, 6))))
    assert objects.read_all(Location.parse(store).container) == before


class CrashingObjectStorage(ObjectStorage):
    """Object storage that crashes after a number of puts."""

    def __init__(self, left):
        super().__init__()
        self._left = left

    def put(self, path, data):
        if not self._left:
            raise SimulatedCrash
        self._left -= 1
        super().put(path, data)


# Rejections


def test_non_idempotent_plans_are_rejected(client, tmp_path, array):
    floats = save_npy(tmp_path / "f.npy", pixels().astype("float32"))
    folder = save_images(tmp_path / "photos", pixels())
    plan_of(folder, tmp_path / "y.npy", mode="tf").run()
    before = tree(tmp_path)
    for plan, word in (
        (plan_of(floats, None, in_place=True, mode="tf"), "twice"),
        (
            plan_of(floats, tmp_path / "out", mode="tf", direction="restore"),
            "differ in their bytes",
        ),
        (plan_of(folder, tmp_path / "y.npy", mode="tf", retry_failed=True), "retry_failed=True"),
    ):
        with pytest.raises(UsageError) as caught:
            plan.run(client=client)
        check_error(caught.value, word, "client=")
        assert tree(tmp_path) == before


def test_unsuitable_workers_are_rejected_before_writing(client, tmp_path, array, monkeypatch):
    plan = plan_of(array, tmp_path / "y.npy", mode="caffe")
    before = tree(tmp_path)

    def refused(*words):
        with pytest.raises(ClusterError) as caught:
            plan.run(client=client)
        check_error(caught.value, "the worker tcp://", "nothing was written", *words)
        assert caught.value.exit_code == 3
        assert tree(tmp_path) == before

    versions = cluster.package_versions()
    monkeypatch.setattr(cluster, "package_versions", lambda: {**versions, "fastvgg": "9.9"})
    refused(f"it has fastvgg {fastvgg.__version__} instead of 9.9")
    monkeypatch.setattr(cluster, "package_versions", lambda: {**versions, "python": "9.9"})
    assert plan.run(client=client).counts["images"] == IMAGES
    (tmp_path / "y.npy").unlink()
    (tmp_path / "y.npy.fastvgg.json").unlink()
    plan = dataclasses.replace(plan, memory_bytes=2**40, chunk_images=2**30)
    refused("for 1 thread", "memory=")


def test_worker_that_cannot_see_the_source_is_rejected(tmp_path, array, workers):
    hidden = worker_without(tmp_path, workers)
    with hidden, Client(workers, set_as_default=False) as client:
        client.wait_for_workers(3, timeout=60)
        with pytest.raises(ClusterError) as caught:
            plan_of(array, tmp_path / "y.npy", mode="caffe").run(client=client)
        check_error(caught.value, "the worker tcp://", "x.npy", "retire the worker")
        assert names_in(tmp_path) == ["x.npy"]


@sampled("name", TARGETS, one_in=len(TARGETS))
def test_worker_that_cannot_see_the_target_is_rejected_without_changes(
    tmp_path, array, workers, name
):
    (tmp_path / "out").mkdir()
    plan = plan_of(array, tmp_path / "out" / name, mode="caffe", images_per_chunk=2)

    def refused():
        hidden = worker_without(tmp_path / "out", workers)
        with hidden, Client(workers, set_as_default=False) as client:
            client.wait_for_workers(3, timeout=60)
            with pytest.raises(ClusterError) as caught:
                plan.run(client=client)
            check_error(caught.value, "the worker tcp://", "out/y", "retire the worker")

    refused()
    assert names_in(tmp_path / "out") == []
    with pytest.raises(SimulatedCrash):  # an unfinished run is left unchanged
        run(plan, storage=InterruptedStorage(10))
    before = tree(tmp_path / "out")
    assert commits_in(plan.target.container) > 0
    refused()
    assert tree(tmp_path / "out") == before


HIDING_WORKER_SCRIPT = """
import sys
from tests.helpers.private_disks import PrivateDiskUnavailable, mount, use_private_mounts
use_private_mounts()
mount("none", sys.argv[1], "tmpfs")
from distributed.cli.dask_worker import main
sys.argv = ["worker", sys.argv[2], "--nthreads", "1", "--no-nanny", "--no-dashboard"]
main()
"""


@contextlib.contextmanager
def worker_without(directory, workers):
    """Run a worker that sees another disk mounted over a directory."""
    arguments = [
        sys.executable,
        "-c",
        HIDING_WORKER_SCRIPT,
        str(directory),
        workers.scheduler_address,
    ]
    environment = checkout_environment()
    with subprocess.Popen(
        arguments, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            yield
        finally:
            process.terminate()
            if NOT_ALLOWED in process.stderr.read():
                pytest.skip(f"{NOT_ALLOWED} mounts of one's own")


def invoke(*arguments):
    return CliRunner().invoke(cli.app, [*map(str, arguments)])


def test_command_line_runs_plans_on_a_cluster(workers, tmp_path, array):
    address = workers.scheduler_address
    options = ["--mode", "caffe", "--dask", address]
    result = invoke("preprocess", array, tmp_path / "y.zarr", *options, "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["counts"]["images"] == IMAGES
    result = invoke("restore", tmp_path / "y.zarr", tmp_path / "z.npy", "--dask", address)
    assert result.exit_code == 0, result.stderr
    assert (tmp_path / "z.npy").read_bytes() == array.read_bytes()
    folder = save_images(tmp_path / "photos", pixels(3))
    result = invoke("pack", folder, tmp_path / "p.npy", "--dask", address)
    assert result.exit_code == 0, result.stderr


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:1", "nonsense://x", "not an address"])
def test_unreachable_scheduler_address_is_rejected(tmp_path, array, address, monkeypatch):
    monkeypatch.setattr(cluster, "CONNECT_SECONDS", 1)
    result = invoke("preprocess", array, tmp_path / "y.npy", "--mode", "tf", "--dask", address)
    assert result.exit_code == 3
    assert f"no scheduler responds at {address}" in result.stderr
    assert "--dask local" in result.stderr
    assert names_in(tmp_path) == ["x.npy"]


def test_cluster_without_workers_is_rejected(tmp_path, array, monkeypatch):
    monkeypatch.setattr(cluster, "JOIN_SECONDS", 1)
    options = {"n_workers": 0, "dashboard_address": ":0", "silence_logs": 50}
    with LocalCluster(**options) as empty, Client(empty, set_as_default=False) as client:
        with pytest.raises(ClusterError) as caught:
            plan_of(array, tmp_path / "y.npy", mode="caffe").run(client=client)
        check_error(caught.value, empty.scheduler_address, "no workers", "dask worker")
    assert names_in(tmp_path) == ["x.npy"]
