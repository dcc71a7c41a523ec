"""Kill workers and coordinators of a Dask cluster at random, and run tasks twice concurrently.

    python -m tests.campaigns.cluster_kills            # takes minutes; prints counts
    python -m tests.campaigns.cluster_kills --size 10  # workers to kill; 1/4 as many coordinators

A coordinator is killed after it has committed a random number of chunks. Its successor must compute
exactly the uncommitted chunks. Duplicate tasks run on every worker, concurrently with the run that
submits the same tasks. Each result is compared with the output of one machine.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import pickle
import random
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from distributed import Client

from fastvgg.executors.worker import Task, run_task
from fastvgg.storage.location import Location
from fastvgg.stream.compute import ChunkTask
from tests.campaigns.command import main
from tests.helpers.checkout import checkout_environment
from tests.helpers.datasets_on_disk import commits_in, pixels, plan_of, save_npy
from tests.helpers.faults import memory_directory

WORKERS = 2
CHUNKS = 100  # three per task
NAMES = ("y.npy", "y.zarr", "y.h5::/images")
MAX_KILL_INTERVAL_SECONDS = 0.5  # a worker takes two seconds to start working
TIMEOUT_SECONDS = 60
COORDINATOR_SCRIPT = """
import sys
from tests.helpers.datasets_on_disk import plan_of
from distributed import Client
address, source, target = sys.argv[1:]
with Client(address) as client:
    plan_of(source, target, mode="caffe", images_per_chunk=2).run(client=client)
"""


class Workers:
    """A scheduler and worker processes, without nannies that would restart them.

    Parameters
    ----------
    directory
        Where the scheduler writes its address.
    """

    def __init__(self, directory):
        self._file = directory / "scheduler.json"
        self._scheduler = self._start("scheduler", "--port", "0")
        self._workers = [self._start_worker() for _ in range(WORKERS)]

    def _start_worker(self):
        return self._start("worker", "--nthreads", "1", "--no-nanny")

    def _start(self, kind, *options):
        module = f"distributed.cli.dask_{kind}"
        command = [sys.executable, "-m", module, "--scheduler-file", self._file, *options]
        environment = {**os.environ, "DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES": "1000000"}
        silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        return subprocess.Popen([*command, "--no-dashboard"], env=environment, **silent)

    def connect(self, timeout=TIMEOUT_SECONDS):
        """Connect to the scheduler; reconnect for `timeout` seconds if it is lost."""
        return Client(scheduler_file=self._file, timeout=timeout, set_as_default=False)

    def kill(self, pid):
        """Kill a worker and start another; return the number of killed workers."""
        for number, process in enumerate(self._workers):
            if process.pid == pid and process.poll() is None:
                process.kill()
                process.wait()
                self._workers[number] = self._start_worker()
                return 1
        return 0

    def close(self):
        """Kill the workers and the scheduler."""
        for process in (*self._workers, self._scheduler):
            process.kill()
            process.wait()


class Runs:
    """Runs of one plan into one of three formats, each with an expected result."""

    def __init__(self, directory, workers, client, draw):
        self._workers = workers
        self._client = client
        self._draw = draw
        self._directory = directory
        self._source = save_npy(directory / "x.npy", pixels(2 * CHUNKS - 1, height=61, width=65))
        self._expected = {}
        for name in NAMES:
            self._target = self._directory / name
            self._make_plan().run()
            self._expected[name] = self._contents()
            self._remove()
        self._name = NAMES[0]

    def begin(self):
        """Choose a format; its target does not exist."""
        self._name = self._draw.choice(NAMES)
        self._target = self._directory / self._name

    def _make_plan(self):
        return plan_of(self._source, self._target, mode="caffe", images_per_chunk=2)

    def _contents(self):
        path = Location.parse(self._target).container
        if path.is_dir():
            return {file.name: file.read_bytes() for file in path.iterdir()}
        return path.read_bytes()

    def _remove(self):
        for path in self._directory.glob(f"{Location.parse(self._target).container.name}*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def finish(self, computed=None):
        """Run to completion, and check the result."""
        report = self._make_plan().run(client=self._client)
        self._check(report, computed)

    def _check(self, report, computed):
        assert report.counts["images"] == 2 * CHUNKS - 1
        assert computed is None or report.counts["computed_chunks"] == computed, report.counts
        assert self._contents() == self._expected[self._name], self._name
        name = Location.parse(self._target).container.name
        names = {path.name for path in self._directory.glob(f"{name}*")}
        assert names == {name, f"{name}.fastvgg.json"}
        self._remove()

    def kill_workers(self):
        """Kill workers during a run; return the number of killed workers."""
        killed, ended = [], threading.Event()

        def kill():
            while not ended.wait(self._draw.uniform(0, MAX_KILL_INTERVAL_SECONDS)):
                pids = self._client.run(os.getpid, on_error="ignore")
                if pids:
                    killed.append(self._workers.kill(self._draw.choice([*pids.values()])))

        killer = threading.Thread(target=kill)
        killer.start()
        try:
            report = self._make_plan().run(client=self._client)
        finally:
            ended.set()
            killer.join()
        self._check(report, None)
        return sum(killed)

    def kill_coordinator(self):
        """Kill a coordinator and resume with another; return the number of killed ones."""
        commits_before_kill = self._draw.randrange(1, CHUNKS)
        arguments = [self._client.scheduler.address, str(self._source), str(self._target)]
        command = [sys.executable, "-c", COORDINATOR_SCRIPT, *arguments]
        environment = checkout_environment()
        with subprocess.Popen(command, env=environment) as process:
            deadline = time.monotonic() + TIMEOUT_SECONDS
            while process.poll() is None and self._count_commits() < commits_before_kill:
                assert time.monotonic() < deadline, "the coordinator makes no progress"
                time.sleep(0.001)
            process.send_signal(signal.SIGKILL)
        killed = process.returncode == -signal.SIGKILL
        assert killed or process.returncode == 0
        committed = self._count_commits() if self._has_journal() else 0
        self.finish(CHUNKS - committed if killed and self._has_journal() else None)
        return int(killed)

    def _has_journal(self):
        return Path(f"{Location.parse(self._target).container}.fastvgg-journal").exists()

    def _count_commits(self):
        try:
            return max(0, commits_in(Location.parse(self._target).container))
        except FileNotFoundError:
            return 0

    def run_twice(self):
        """Submit tasks of a run a second time; return the number of chunks computed twice."""
        plan = dataclasses.replace(self._make_plan(), threads=1)
        shared = pickle.dumps((secrets.token_hex(8), plan))
        rows = [*enumerate(plan.chunk_rows())]
        futures = []

        def submit_duplicates(progress):
            if futures or progress.images > CHUNKS:
                return
            chunks = [ChunkTask(chunk, *span) for chunk, span in self._draw.sample(rows, 20)]
            tasks = [Task(shared, tuple(chunks[at : at + 2])) for at in range(0, 20, 2)]
            futures.extend(
                self._client.submit(run_task, task, workers=[address], pure=False, priority=10)
                for task in tasks
                for address in self._client.nthreads()
            )

        report = plan.run(submit_duplicates, client=self._client)
        done = self._client.gather(futures, errors="skip")  # some are too late
        self._check(report, CHUNKS)
        return sum(map(len, done)) // 2


def campaign(seed, size):
    """Kill `size` workers, a quarter as many coordinators, and run as many tasks twice."""
    draw = random.Random(seed)  # noqa: S311  # not for secrets
    logging.getLogger("distributed.client").setLevel(logging.CRITICAL)  # it warns of each kill
    counts = {"workers killed": 0, "coordinators killed": 0, "chunks computed twice": 0, "runs": 0}
    directory = Path(tempfile.mkdtemp(prefix="fastvgg-cluster-", dir=memory_directory()))
    minimums = {
        "workers killed": size,
        "coordinators killed": size // 4,
        "chunks computed twice": size,
    }
    workers = Workers(directory)
    try:
        with workers.connect() as client:
            client.wait_for_workers(WORKERS, timeout=TIMEOUT_SECONDS)
            runs = Runs(directory, workers, client, draw)
            actions = (runs.kill_workers, runs.kill_coordinator, runs.run_twice)
            for (name, minimum), action in zip(minimums.items(), actions, strict=True):
                while counts[name] < minimum:
                    runs.begin()
                    counts[name] += action()
                    counts["runs"] += 1
                    client.wait_for_workers(WORKERS, timeout=TIMEOUT_SECONDS)
    finally:
        workers.close()
        shutil.rmtree(directory)
    return {**counts, "wrong": 0}


if __name__ == "__main__":
    main(campaign, __doc__, size=220)
