"""Workers and coordinators of a Dask cluster are killed at random, and tasks run twice at once.

    python tests/cluster_kills.py               # some minutes; prints its counts
    python tests/cluster_kills.py --size 10     # so many workers; a quarter of that, coordinators

A coordinator is killed when it has committed a drawn number of chunks, and another goes on: it
computes those that were not committed, and no others. What two workers are made to do at once is
done beside the run that wants the same tasks. Each run is compared with what one machine writes.
"""

from __future__ import annotations

import contextlib
import dataclasses
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

import dask
from campaigning import main
from datasets_on_disk import commits_in, pixels, plan_of, save_npy
from distributed import Client, LocalCluster, wait
from faults import quick_directory

from fastvgg.datasets.locations import file_of
from fastvgg.stream.task import Task, work_on

CHUNKS = 60
NAMES = ("y.npy", "y.zarr", "y.h5::/images")
SECONDS = 0.1  # between kills, at most: a run takes 0.15 s
PATIENCE = 60
COORDINATE = """
import sys
from datasets_on_disk import plan_of
from distributed import Client
address, source, target = sys.argv[1:]
with Client(address) as client:
    plan_of(source, target, mode="caffe", together=2).run(client=client)
"""


class Runs:
    """Runs of one plan into one of three formats, each of which is to end alike."""

    def __init__(self, place, cluster, client, draw):
        self._cluster = cluster
        self._client = client
        self._draw = draw
        self._place = place
        self._source = save_npy(place / "x.npy", pixels(2 * CHUNKS - 1, height=61, width=65))
        self._expected = {}
        for name in NAMES:
            self._target = self._place / name
            self._planned().run()
            self._expected[name] = self._contents()
            self._remove()
        self._name = NAMES[0]

    def begin(self):
        """Choose a format, of which nothing is there."""
        self._name = self._draw.choice(NAMES)
        self._target = self._place / self._name

    def _planned(self):
        return plan_of(self._source, self._target, mode="caffe", together=2)

    def _contents(self):
        path = file_of(self._target)
        if path.is_dir():
            return {file.name: file.read_bytes() for file in path.iterdir()}
        return path.read_bytes()

    def _remove(self):
        for path in self._place.glob(f"{file_of(self._target).name}*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def finish(self, computed=None):
        """Run to the end, and check that all is as it should be."""
        report = self._planned().run(client=self._client)
        self._check(report, computed)

    def _check(self, report, computed):
        assert report.counts["images"] == 2 * CHUNKS - 1
        assert computed is None or report.counts["computed_chunks"] == computed, report.counts
        assert self._contents() == self._expected[self._name], self._name
        left = {path.name for path in self._place.glob(f"{file_of(self._target).name}*")}
        assert left == {file_of(self._target).name, f"{file_of(self._target).name}.fastvgg.json"}
        self._remove()

    def kill_workers(self):
        """Kill workers while a run goes on; return how many."""
        killed, ended = [], threading.Event()

        def kill():
            while not ended.wait(self._draw.uniform(0, SECONDS)):
                nanny = self._draw.choice([*self._cluster.workers.values(), None])
                # One that dies before it has joined is given up by its nanny.
                if nanny and nanny.worker_address in self._cluster.scheduler.workers:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(nanny.pid, signal.SIGKILL)
                        killed.append(nanny.pid)

        killer = threading.Thread(target=kill)
        killer.start()
        try:
            report = self._planned().run(client=self._client)
        finally:
            ended.set()
            killer.join()
        self._check(report, None)
        return len({*killed})

    def kill_coordinator(self):
        """Kill a coordinator at work, and have another go on; return how many were killed."""
        wanted = self._draw.randrange(1, CHUNKS)
        arguments = [self._cluster.scheduler_address, str(self._source), str(self._target)]
        command = [sys.executable, "-c", COORDINATE, *arguments]
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
        with subprocess.Popen(command, env=environment) as process:
            given_up = time.monotonic() + PATIENCE
            while process.poll() is None and self._committed() < wanted:
                assert time.monotonic() < given_up, "a coordinator does nothing"
                time.sleep(0.001)
            process.send_signal(signal.SIGKILL)
        killed = process.returncode == -signal.SIGKILL
        assert killed or process.returncode == 0
        done = self._committed() if self._begun() else 0
        self.finish(CHUNKS - done if killed and self._begun() else None)
        return int(killed)

    def _begun(self):
        return Path(f"{file_of(self._target)}.fastvgg-journal").exists()

    def _committed(self):
        try:
            return max(0, commits_in(file_of(self._target)))
        except FileNotFoundError:
            return 0

    def run_twice(self):
        """Have workers do tasks at once that a run has them do as well; return how many."""
        plan = dataclasses.replace(self._planned(), threads=1)
        shared = pickle.dumps((secrets.token_hex(8), plan))
        rows = [*enumerate(plan.chunk_rows())]
        futures = []

        def again(progress):
            if futures or progress.images > CHUNKS:
                return
            tasks = [Task(shared, chunk, *span) for chunk, span in self._draw.sample(rows, 20)]
            futures.extend(
                self._client.submit(work_on, task, workers=[address], pure=False, priority=10)
                for task in tasks
                for address in self._client.nthreads()
            )

        report = plan.run(again, client=self._client)
        wait(futures)
        done = sum(future.status == "finished" for future in futures)
        self._check(report, CHUNKS)
        return done // 2


def campaign(seed, size):
    """Kill `size` workers, a quarter as many coordinators, and run as many tasks twice."""
    draw = random.Random(seed)  # noqa: S311  # not for secrets
    counts = {"workers killed": 0, "coordinators killed": 0, "tasks run twice": 0, "runs": 0}
    place = Path(tempfile.mkdtemp(prefix="fastvgg-cluster-", dir=quick_directory()))
    options = {"n_workers": 2, "threads_per_worker": 1, "dashboard_address": ":0"}
    many = {"distributed.scheduler.allowed-failures": 10**6}
    wanted = {
        "workers killed": size,
        "coordinators killed": size // 4,
        "tasks run twice": size,
    }
    try:
        with (
            dask.config.set(many),
            LocalCluster(**options, silence_logs=100) as cluster,
            Client(cluster) as client,
        ):
            cluster.adapt(minimum=2, maximum=2)  # in place of one that was given up
            runs = Runs(place, cluster, client, draw)
            ways = (runs.kill_workers, runs.kill_coordinator, runs.run_twice)
            for (name, least), way in zip(wanted.items(), ways, strict=True):
                while counts[name] < least:
                    runs.begin()
                    counts[name] += way()
                    counts["runs"] += 1
                    client.wait_for_workers(2, timeout=PATIENCE)
    finally:
        shutil.rmtree(place)
    return {**counts, "wrong": 0}


if __name__ == "__main__":
    main(campaign, __doc__, size=220)
