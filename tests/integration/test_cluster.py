"""A plan on a real Dask cluster of two processes: the bytes of one machine, whatever happens."""

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
from fastvgg.errors import ClusterError, ResumeError, StoppedError, UsageError
from fastvgg.executors import dask as cluster
from fastvgg.executors.worker import Task, run_task
from fastvgg.storage import objects
from fastvgg.storage.location import Location
from fastvgg.storage.objects import StoreStorage
from fastvgg.stream.compute import ChunkTask
from fastvgg.stream.manifest import read_manifest
from fastvgg.stream.run import run
from tests.campaigns import cluster_kills
from tests.helpers.checkout import importing_checkout
from tests.helpers.datasets_on_disk import (
    commits_in,
    must_say,
    names_in,
    pixels,
    plan_of,
    save_images,
    save_npy,
    tree,
)
from tests.helpers.faults import CuttingStorage, Death
from tests.helpers.private_disks import NO
from tests.helpers.samples import sampled
from tests.helpers.stores import BUCKET, serving_s3

IMAGES = 40
TARGETS = ("y.npy", "y.zarr", "y.h5::/images")


@pytest.fixture(scope="module")
def workers():
    """Two processes of one thread each, which come back when they are killed."""
    options = {"n_workers": 2, "threads_per_worker": 1, "dashboard_address": ":0"}
    with serving_s3() as s3, LocalCluster(**options, silence_logs=50) as started:
        started.s3 = s3
        yield started


@pytest.fixture
def client(workers):
    with Client(workers, set_as_default=False) as connect:
        connect.wait_for_workers(2, timeout=60)
        yield connect


@pytest.fixture
def few_at_a_time(monkeypatch):
    """Two tasks under way, of which each is committed when it is done."""
    monkeypatch.setattr(cluster, "MIN_IN_FLIGHT", 2)
    monkeypatch.setattr(cluster, "IN_FLIGHT_PER_THREAD", 1)
    monkeypatch.setattr(cluster, "GATHERING_SECONDS", 0)
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


def as_on_one_machine(plan, tmp_path):
    """The bytes that the same plan gives without a cluster."""
    directory = tmp_path / "alone"
    directory.mkdir()
    target = Location(directory / plan.target.container.name, plan.target.inner)
    dataclasses.replace(plan, target=target).run()
    expected = read_manifest(plan.target.container).checksums
    assert read_manifest(target.container).checksums == expected
    return contents(target)


def check(plan, tmp_path):
    """Whether a finished target is what one machine makes, and nothing else is left."""
    assert contents(plan.target) == as_on_one_machine(plan, tmp_path)
    verified = fastvgg.verify(plan.target, full=True)
    assert (verified.chunks, verified.recomputed_images) == (plan.chunks, plan.header.images)
    name = plan.target.container.name
    left = {found for found in names_in(tmp_path) if found.startswith(name)}
    assert left <= {name, f"{name}.fastvgg.json", f"{name}.index.csv"}


@pytest.mark.parametrize("name", TARGETS)
def test_a_cluster_makes_the_bytes_of_one_machine(client, tmp_path, array, name):
    plan = plan_of(array, tmp_path / name, mode="caffe", together=3)
    told = []
    report = plan.run(told.append, client=client)
    assert report.counts == {"images": IMAGES, "failed": 0, "chunks": 14, "computed_chunks": 14}
    assert [progress.images for progress in told][-1] == IMAGES
    assert len(told) == 14
    check(plan, tmp_path)
    again = plan_of(array, tmp_path / name, mode="caffe", together=3).run(client=client)
    assert again.counts["computed_chunks"] == 0


@pytest.mark.parametrize("name", TARGETS)
def test_tasks_of_many_chunks_make_the_bytes_of_one_machine(client, tmp_path, name, monkeypatch):
    monkeypatch.setattr(cluster, "TASKS_PER_THREAD", 2)
    keys = []
    monkeypatch.setattr(
        client,
        "map",
        lambda *a, key: [*map(keys.extend, [key])] and Client.map(client, *a, key=key),
    )
    source = save_npy(tmp_path / "x.npy", pixels(29, height=61, width=65))
    plan = plan_of(source, tmp_path / name, mode="caffe", together=1)
    plan.run(client=client)
    firsts = [int(key.rpartition("-")[2]) for key in keys]
    assert firsts == [0, 7, 14, 21, 28]
    check(plan, tmp_path)


def test_chunks_that_share_pages_or_fill_many_are_whole(client, tmp_path):
    for height, together in ((7, 1), (7, 30), (64, 1), (64, 7)):
        source = save_npy(tmp_path / f"{height}.npy", pixels(IMAGES, height=height, width=65))
        target = tmp_path / f"y{height}-{together}.npy"
        plan = plan_of(source, target, mode="torch", together=together, dtype="float16")
        plan.run(client=client)
        assert contents(target) == as_on_one_machine(plan, tmp_path)
        (tmp_path / "alone").rename(tmp_path / f"alone{height}-{together}")


@pytest.mark.parametrize("name", TARGETS)
def test_images_that_fail_have_rows_of_zeros_and_lines_of_the_index(client, tmp_path, name):
    folder = save_images(tmp_path / "photos", pixels(9))
    (folder / "a" / "04.png").write_bytes(b"no image")
    plan = plan_of(folder, tmp_path / name, mode="tf", together=2)
    report = plan.run(client=client)
    assert report.counts["failed"] == 1
    assert [failure.path for failure in report.failures] == ["a/04.png"]
    index = tmp_path / f"{name.partition(':')[0]}.index.csv"
    check(plan, tmp_path)
    assert index.read_bytes() == (tmp_path / "alone" / index.name).read_bytes()


def test_a_strict_run_stops_at_an_image_that_cannot_be_read(client, tmp_path):
    folder = save_images(tmp_path / "photos", pixels(9))
    (folder / "a" / "04.png").write_bytes(b"no image")
    with pytest.raises(StoppedError) as caught:
        plan_of(folder, tmp_path / "y.npy", mode="tf", together=2, strict=True).run(client=client)
    must_say(caught.value, "a/04.png", "row 2", "--strict")


def test_restored_images_are_those_that_were(client, tmp_path, array):
    plan_of(array, tmp_path / "y.zarr", mode="caffe", together=3).run(client=client)
    plan_of(
        tmp_path / "y.zarr", tmp_path / "z.npy", mode=None, direction="restore", together=6
    ).run(client=client)
    assert (tmp_path / "z.npy").read_bytes() == array.read_bytes()


def test_a_store_is_written_by_all_workers(client, workers, tmp_path, array):
    target = f"s3://{BUCKET}/y.zarr"
    plan_of(array, target, mode="caffe", together=3).run(client=client)
    alone = plan_of(array, tmp_path / "y.zarr", mode="caffe", together=3)
    alone.run()
    found = workers.s3.objects()
    for name, content in contents(tmp_path / "y.zarr").items():
        assert found.pop(f"y.zarr/{name}") == content
    assert [*found] == ["y.zarr.fastvgg.json"]


def test_an_executor_runs_one_plan_after_another(client, tmp_path, array):
    executor = cluster.DaskExecutor(client)
    for number, name in enumerate(TARGETS):
        place = tmp_path / str(number)
        place.mkdir()
        plan = plan_of(array, place / name, mode="caffe", together=3)
        run(plan, executor=executor)
        assert contents(plan.target) == as_on_one_machine(plan, place)


# What dies


@pytest.mark.parametrize("name", TARGETS)
def test_workers_that_die_cost_nothing(client, few_at_a_time, tmp_path, array, name):
    plan = plan_of(array, tmp_path / name, mode="caffe", together=1)
    pids = [*client.run(os.getpid).values()]

    def kill(progress):
        if progress.images >= 5 and pids:
            os.kill(pids[0], signal.SIGKILL)
            pids.clear()

    plan.run(kill, client=client)
    assert not pids
    check(plan, tmp_path)


def test_a_task_whose_workers_all_die_stops_the_run_in_words(
    client, few_at_a_time, workers, tmp_path, array, monkeypatch
):
    monkeypatch.setattr(workers.scheduler, "allowed_failures", 0)
    plan = plan_of(array, tmp_path / "y.npy", mode="caffe", together=1)

    def kill(progress):
        for pid in client.run(os.getpid, on_error="ignore").values():  # some may be dying
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    with pytest.raises(StoppedError) as caught:
        plan.run(kill, client=client)
    must_say(caught.value, "every worker that ran the task preprocess-", "--memory")
    client.wait_for_workers(2, timeout=60)
    plan.run(client=client)
    check(plan, tmp_path)


def test_a_scheduler_that_goes_stops_the_run_which_another_goes_on_with(
    client, few_at_a_time, tmp_path, array
):
    plan = plan_of(array, tmp_path / "y.zarr", mode="caffe", together=1)
    alone = cluster_kills.Workers(tmp_path)
    with contextlib.closing(alone):
        alone.connect().close()  # once it has begun
        with alone.connect(timeout=2) as its_client, pytest.raises(StoppedError) as caught:
            plan.run(lambda _: alone.close(), client=its_client)
    must_say(caught.value, "the scheduler tcp://", "is gone", "rerun the same command")
    done = commits_in(tmp_path / "y.zarr")
    assert plan.run(client=client).counts["computed_chunks"] == IMAGES - done < IMAGES
    check(plan, tmp_path)


def test_workers_hold_nothing_of_a_run_that_has_ended(client, tmp_path, array):
    def held():
        return [os.path.realpath(file) for file in Path("/proc/self/fd").iterdir()]

    def kept():
        from fastvgg.executors import worker

        return sum(str(tmp_path).encode() in plan for plan in worker._runs)

    for name in TARGETS:
        plan_of(array, tmp_path / name, mode="caffe", together=3).run(client=client)
        assert {*client.run(kept).values()} == {0}
        for files in client.run(held).values():
            assert not [file for file in files if str(tmp_path) in file]


@pytest.mark.parametrize("name", TARGETS)
def test_a_run_that_was_cut_off_goes_on_with_a_cluster_and_one_of_a_cluster_without(
    client, few_at_a_time, tmp_path, array, name
):
    plan = plan_of(array, tmp_path / name, mode="caffe", together=2)

    class Stopped(BaseException):
        pass

    def stop(progress):
        if progress.images >= 10:
            raise Stopped

    with pytest.raises(Stopped):
        plan.run(stop, client=client)
    done = commits_in(Location.parse(tmp_path / name).container)
    assert 5 <= done < 20
    with pytest.raises(Stopped):  # a few more, on one machine
        plan_of(array, tmp_path / name, mode="caffe", together=2).run(
            lambda progress: stop(progress._replace(images=progress.computed_images + 6))
        )
    more = commits_in(Location.parse(tmp_path / name).container)
    assert done < more < 20
    report = plan_of(array, tmp_path / name, mode="caffe", together=2).run(client=client)
    assert report.counts["computed_chunks"] == 20 - more
    check(plan, tmp_path)


def test_a_shard_that_was_damaged_meanwhile_is_made_again(client, tmp_path, array):
    plan = plan_of(array, tmp_path / "y.zarr", mode="caffe", together=2)
    with pytest.raises(Death):
        run(plan, storage=CuttingStorage(10))
    done = commits_in(tmp_path / "y.zarr")
    damaged = tmp_path / "y.zarr.partial" / "c.0.0.0.0"
    content = bytearray(damaged.read_bytes())
    content[100] ^= 1
    damaged.write_bytes(content)
    report = plan.run(client=client)
    assert report.counts["computed_chunks"] == 20 - done + 1
    check(plan, tmp_path)


# Tasks that run twice, or too late


def begun(plan):
    """Begin a run, which commits one chunk, and return the tasks of it."""
    with pytest.raises(Death):
        run(plan, storage=CuttingStorage(1))
    assert commits_in(plan.target.container) == 1
    shared = pickle.dumps((secrets.token_hex(8), dataclasses.replace(plan, threads=1)))
    rows = [*enumerate(plan.chunk_rows())]
    return [Task(shared, (ChunkTask(chunk, *span),)) for chunk, span in rows]


def as_written(plan, dones):
    """What tasks have written, after what they left to one process was."""
    partial = Location.parse(f"{plan.target.container}.partial").container
    if partial.is_dir():
        assert not any(done.edges for done in dones)
        return {file.name: file.read_bytes() for file in partial.iterdir()}
    content = bytearray(partial.read_bytes())
    for done in dones:
        for offset, data in done.edges:
            content[offset : offset + len(data)] = data
    return bytes(content)


@pytest.mark.parametrize("name", TARGETS)
def test_a_task_that_two_workers_do_at_once_gives_the_same_bytes(client, tmp_path, name):
    source = save_npy(tmp_path / "x.npy", pixels(6, height=61, width=65))
    plan = plan_of(source, tmp_path / name, mode="caffe", together=2)
    tasks = begun(plan)
    addresses = [*client.nthreads()]
    for _ in range(2):
        twice = [
            client.submit(run_task, task, workers=[address], pure=False)
            for task in tasks
            for address in addresses
        ]
        dones = [done for (done,) in client.gather(twice)]
        assert dones[::2] == dones[1::2]
        left = sum(len(data) for done in dones[::2] for _, data in done.edges)
        assert left < 3 * 2 * 4096
        for done in dones if name != "y.zarr" else ():  # what is between is whole pages
            (before, first), (after, last) = done.edges
            assert (before + len(first)) % 4096 == after % 4096 == 0
            assert 0 < len(first) < 4096 > len(last) > 0
    written = as_written(plan, dones[::2])
    plan.run()
    assert written == contents(tmp_path / name)
    check(plan, tmp_path)


@pytest.mark.parametrize("name", TARGETS)
def test_a_task_that_fails_leaves_nothing_to_the_next_of_its_process(tmp_path, name):
    folder = save_images(tmp_path / "photos", pixels(9))
    (folder / "a" / "04.png").write_bytes(b"no image")
    tasks = begun(plan_of(folder, tmp_path / name, mode="tf", together=1, strict=True))
    fails = [number for number, task in enumerate(tasks) if refuses(task)]
    assert len(fails) == 1
    both = Task(tasks[0].plan, tasks[0].chunks + tasks[fails[0]].chunks)
    assert refuses(both)
    assert [done.commit.chunk for done in run_task(tasks[1])] == [1]


def refuses(task):
    try:
        run_task(task)
    except StoppedError as error:
        must_say(error, "a/04.png", "--strict")
        return True
    return False


@pytest.mark.parametrize("name", TARGETS)
def test_a_task_of_a_run_that_was_replaced_changes_nothing(tmp_path, array, name):
    tasks = begun(plan_of(array, tmp_path / name, mode="caffe", together=2))
    run_task(tasks[0])  # and so this process has its directory, or its file, open
    other = plan_of(array, tmp_path / name, mode="tf", together=2, restart=True)
    with pytest.raises(Death):
        run(other, storage=CuttingStorage(10))
    before = tree(tmp_path)
    for task in (tasks[1], dataclasses.replace(tasks[2], plan=renamed(tasks[2].plan))):
        with contextlib.suppress(ResumeError, StoppedError):
            run_task(task)
        assert tree(tmp_path) == before
    with pytest.raises((ResumeError, StoppedError)):
        run_task(dataclasses.replace(tasks[2], plan=renamed(tasks[2].plan)))
    other = plan_of(array, tmp_path / name, mode="tf", together=2)
    other.run()
    check(other, tmp_path)


def renamed(shared):
    """The same plan, as a process has it that has not opened anything of it."""
    return pickle.dumps((secrets.token_hex(8), pickle.loads(shared)[1]))  # noqa: S301  # our own


@pytest.mark.parametrize("name", TARGETS)
def test_a_task_that_comes_after_the_end_changes_nothing(tmp_path, array, name):
    plan = plan_of(array, tmp_path / name, mode="caffe", together=2)
    tasks = begun(plan)
    run_task(tasks[0])
    plan.run()
    before = tree(tmp_path)
    with contextlib.suppress(ResumeError, StoppedError):
        run_task(tasks[1])
    with pytest.raises((ResumeError, StoppedError)):
        run_task(dataclasses.replace(tasks[2], plan=renamed(tasks[2].plan)))
    assert tree(tmp_path) == before
    check(plan, tmp_path)


def test_a_task_for_a_store_whose_run_was_replaced_changes_nothing(array):
    store = f"memory://{secrets.token_hex(8)}"
    plan = plan_of(array, f"{store}/y.zarr", mode="caffe", together=2)
    with contextlib.suppress(Death):
        run(plan, storage=MortalStore(3))
    shared = pickle.dumps((secrets.token_hex(8), plan))
    run_task(Task(shared, (ChunkTask(0, 0, 2),)))
    other = plan_of(array, f"{store}/y.zarr", mode="tf", together=2, restart=True)
    with contextlib.suppress(Death):
        run(other, storage=MortalStore(9))
    before = objects.read_all(Location.parse(store).container)
    assert len(before) > 3
    with pytest.raises(StoppedError, match="belongs to another run"):
        run_task(Task(shared, (ChunkTask(1, 2, 4), ChunkTask(2, 4, 6))))
    assert objects.read_all(Location.parse(store).container) == before


class MortalStore(StoreStorage):
    """A store's calls, of which so many objects are put before the process dies."""

    def __init__(self, left):
        super().__init__()
        self._left = left

    def put(self, path, data):
        if not self._left:
            raise Death
        self._left -= 1
        super().put(path, data)


# What is refused


def test_what_tasks_could_do_wrong_is_refused(client, tmp_path, array):
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
        (plan_of(folder, tmp_path / "y.npy", mode="tf", retry_failed=True), "--retry-failed"),
    ):
        with pytest.raises(UsageError) as caught:
            plan.run(client=client)
        must_say(caught.value, word, "--dask")
        assert tree(tmp_path) == before


def test_workers_that_could_not_do_it_are_refused_before_anything_is_written(
    client, tmp_path, array, monkeypatch
):
    plan = plan_of(array, tmp_path / "y.npy", mode="caffe")
    before = tree(tmp_path)

    def refused(*words):
        with pytest.raises(ClusterError) as caught:
            plan.run(client=client)
        must_say(caught.value, "the worker tcp://", "nothing was written", *words)
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
    refused("its 1 threads need", "--memory")


def test_a_worker_that_cannot_see_the_source_is_refused(tmp_path, array, workers):
    hidden = python_without(tmp_path, workers)
    with hidden, Client(workers, set_as_default=False) as client:
        client.wait_for_workers(3, timeout=60)
        with pytest.raises(ClusterError) as caught:
            plan_of(array, tmp_path / "y.npy", mode="caffe").run(client=client)
        must_say(caught.value, "the worker tcp://", "x.npy", "retire the worker")
        assert names_in(tmp_path) == ["x.npy"]


@sampled("name", TARGETS, one_in=len(TARGETS))
def test_a_worker_that_cannot_see_the_target_is_refused_as_if_nothing_had_begun(
    tmp_path, array, workers, name
):
    (tmp_path / "out").mkdir()
    plan = plan_of(array, tmp_path / "out" / name, mode="caffe", together=2)

    def refused():
        hidden = python_without(tmp_path / "out", workers)
        with hidden, Client(workers, set_as_default=False) as client:
            client.wait_for_workers(3, timeout=60)
            with pytest.raises(ClusterError) as caught:
                plan.run(client=client)
            must_say(caught.value, "the worker tcp://", "out/y", "retire the worker")

    refused()
    assert names_in(tmp_path / "out") == []
    with pytest.raises(Death):  # what has begun is left as it is
        run(plan, storage=CuttingStorage(10))
    before = tree(tmp_path / "out")
    assert commits_in(plan.target.container) > 0
    refused()
    assert tree(tmp_path / "out") == before


HIDING = """
import sys
from tests.helpers.private_disks import NotAllowed, mount, private_mounts
private_mounts()
mount("none", sys.argv[1], "tmpfs")
from distributed.cli.dask_worker import main
sys.argv = ["worker", sys.argv[2], "--nthreads", "1", "--no-nanny", "--no-dashboard"]
main()
"""


@contextlib.contextmanager
def python_without(directory, workers):
    """A worker that has another disk where a directory is."""
    arguments = [sys.executable, "-c", HIDING, str(directory), workers.scheduler_address]
    environment = importing_checkout()
    with subprocess.Popen(
        arguments, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            yield
        finally:
            process.terminate()
            if NO in process.stderr.read():
                pytest.skip(f"{NO} mounts of one's own")


def invoke(*arguments):
    return CliRunner().invoke(cli.app, [*map(str, arguments)])


def test_the_command_line_runs_a_plan_on_a_cluster(workers, tmp_path, array):
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
def test_an_address_that_does_not_answer_is_refused(tmp_path, array, address, monkeypatch):
    monkeypatch.setattr(cluster, "CONNECT_SECONDS", 1)
    result = invoke("preprocess", array, tmp_path / "y.npy", "--mode", "tf", "--dask", address)
    assert result.exit_code == 3
    assert f"no scheduler responds at {address}" in result.stderr
    assert "--dask local" in result.stderr
    assert names_in(tmp_path) == ["x.npy"]


def test_a_cluster_without_workers_is_refused(tmp_path, array, monkeypatch):
    monkeypatch.setattr(cluster, "JOIN_SECONDS", 1)
    options = {"n_workers": 0, "dashboard_address": ":0", "silence_logs": 50}
    with LocalCluster(**options) as empty, Client(empty, set_as_default=False) as client:
        with pytest.raises(ClusterError) as caught:
            plan_of(array, tmp_path / "y.npy", mode="caffe").run(client=client)
        must_say(caught.value, empty.scheduler_address, "no workers", "dask worker")
    assert names_in(tmp_path) == ["x.npy"]
