"""Change a source while a run reads it: truncate, overwrite, extend, replace or remove its files.

    python -m tests.campaigns.changing_sources             # takes minutes; prints counts
    python -m tests.campaigns.changing_sources --size 20   # number of runs of each kind of job

Each run is a process of its own, and the change comes at a random moment. The run must finish with
the bytes of the source that it was planned for, or fail with a typed error; it must never be killed
by a signal (SIGBUS), and never finish with other bytes. A restart on the intact source must then
write the expected bytes.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import multiprocessing
import os
import random
import shutil
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import fastvgg
from fastvgg.errors import FastvggError
from tests.campaigns.command import main
from tests.helpers.datasets_on_disk import network_inputs, pixels
from tests.helpers.faults import memory_directory
from tests.helpers.formats import SOURCES, TARGETS, files_of

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.synchronize import Event

IMAGES, HEIGHT, WIDTH = 600, 61, 67
PLAIN_SOURCES = (
    *("npy", "parts", "hdf5", "chunked hdf5", "zarr", "zarr version 2"),
    *("images", "tar", "tar shards"),
)
MEMORY_BYTES = 80 * 2**20
IMAGES_FAILED = 10  # not 1, the exit code of a process that raises an unexpected exception
OUTCOMES = {3: "refused", 5: "stopped", IMAGES_FAILED: "images failed"}
FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(
    ["h5py", "zarr", "fastvgg.stream.run", "fastvgg.loader", __name__]
)


@dataclasses.dataclass(frozen=True)
class Job:
    """A kind of job: its source, its target, and the arguments of its plan."""

    source: str
    target: str
    settings: dict[str, Any]

    @property
    def name(self) -> str:
        """Return a name for counts and messages."""
        return f"{self.source} to {self.target}"


JOBS = (
    *(Job(source, ".npy", {"mode": "caffe"}) for source in PLAIN_SOURCES),
    Job("npy", ".npy, restored", {"mode": "caffe", "direction": "restore"}),
    Job("npy", "zarr", {"mode": "caffe"}),
    Job("npy", "hdf5", {"mode": "caffe"}),
    Job("npy", "png images", {"mode": "caffe", "direction": "restore"}),
    Job("npy", "itself, in place", {"mode": "caffe", "in_place": True}),
    Job("npy", "batches", {}),
)


def save_source(job: Job, directory: Path) -> Any:
    """Write the source of a job, and return its location."""
    batch = pixels(IMAGES, HEIGHT, WIDTH)
    if job.settings.get("direction") == "restore":
        batch = network_inputs(batch, "caffe")
    elif job.settings.get("in_place"):
        batch = batch.astype(np.float32)
    return SOURCES[job.source].write(directory, batch)


def target_of(job: Job, directory: Path) -> str:
    """Return the location of the result."""
    return (
        TARGETS[job.target].location(directory) if job.target in TARGETS else f"{directory}/y.npy"
    )


def execute(job: Job, source: Any, target: str, log: str, restart: bool, planned: Event) -> None:
    """Run a job in this process, and exit with its exit code."""
    try:
        if job.target == "batches":
            batches = fastvgg.batches(source, 8)
            planned.set()
            total = sum(np.sum(batch.images, dtype=np.uint64) for batch in batches)
            Path(target).write_text(str(total))
        else:
            result = None if job.settings.get("in_place") else target
            settings = {"fsync": False, "memory": MEMORY_BYTES, "restart": restart}
            plan = fastvgg.plan(source, result, **settings, **job.settings)
            planned.set()
            if plan.run().counts["failed"]:
                os._exit(IMAGES_FAILED)
    except FastvggError as error:
        Path(log).write_text(str(error))
        os._exit(error.exit_code)
    os._exit(0)


def result_of(job: Job, source: Any, target: str) -> dict[str, bytes]:
    """Return the bytes of the result, by file name."""
    place = source if job.settings.get("in_place") else target
    return {Path(file).name: Path(file).read_bytes() for file in files_of(place)}


def truncate(file: Path, draw: random.Random) -> None:
    os.truncate(file, draw.choice([0, 4096, draw.randrange(file.stat().st_size)]))


def truncate_and_rewrite(file: Path, draw: random.Random) -> None:
    content = file.read_bytes()
    truncate(file, draw)
    file.write_bytes(content)


def overwrite(file: Path, draw: random.Random) -> None:
    nbytes = file.stat().st_size
    with file.open("r+b") as opened:
        opened.seek(draw.randrange(nbytes))
        opened.write(draw.randbytes(min(nbytes, 2**16)))


def extend(file: Path, draw: random.Random) -> None:
    with file.open("ab") as opened:
        opened.write(draw.randbytes(draw.choice([1, 4096])))


def replace(file: Path, draw: random.Random) -> None:
    other = file.with_name("other")
    other.write_bytes(draw.randbytes(file.stat().st_size))
    other.replace(file)


def remove(file: Path, _draw: random.Random) -> None:
    file.unlink()


CHANGES: tuple[Callable[[Path, random.Random], None], ...] = (
    truncate,
    truncate,
    truncate_and_rewrite,
    overwrite,
    extend,
    replace,
    remove,
)
# What another process writes into a file that is converted in place cannot be told from the result.
IN_PLACE_CHANGES = (truncate,)


class Runs:
    """The runs of one job, and what they must write."""

    def __init__(self, job: Job, directory: Path) -> None:
        self.job = job
        self.source = save_source(job, directory)
        self.log = f"{directory}/log"
        self._directory = directory
        self._contents = {file: file.read_bytes() for file in files_of(self.source)}
        self.target = target_of(job, directory)
        self._seconds = 0.0
        if self.run() != 0:
            raise RuntimeError(f"{job.name} fails: {Path(self.log).read_text()}")
        self._expected = result_of(job, self.source, self.target)

    def run(
        self,
        change: Callable[[], object] = lambda: None,
        delay: float = 0,
        *,
        restart: bool = False,
    ) -> int:
        """Run the job, apply a change after `delay` seconds, and return the exit code."""
        planned = FORKSERVER.Event()
        arguments = self.job, self.source, self.target, self.log, restart, planned
        process = FORKSERVER.Process(target=execute, args=arguments)
        process.start()
        while not planned.wait(0.1) and process.is_alive():
            pass
        planned_at = time.monotonic()
        process.join(delay)
        change()
        process.join()
        self._seconds = self._seconds or time.monotonic() - planned_at
        return process.exitcode

    def reset(self) -> None:
        """Restore the source, and remove everything else."""
        for path in [*self._directory.iterdir()]:
            if path not in self._contents and not any(
                path in file.parents for file in self._contents
            ):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        for file, content in self._contents.items():
            file.write_bytes(content)

    def change_and_check(self, draw: random.Random) -> str:
        """Run once while the source changes; return the outcome."""
        self.reset()
        file = draw.choice([*self._contents])
        in_place = self.job.settings.get("in_place")
        change = draw.choice(IN_PLACE_CHANGES if in_place else CHANGES)

        def apply() -> None:
            with contextlib.suppress(FileNotFoundError):
                change(file, draw)

        code = self.run(apply, draw.uniform(0, self._seconds))
        what = f"{self.job.name}, {change.__name__} {file.name}: exit code {code}"
        log = Path(self.log)
        message = log.read_text() if log.exists() else ""
        if code == 0:
            self._check_result(what, changed_in_place=in_place)
            return "finished"
        if code not in OUTCOMES:
            raise AssertionError(f"{what}: {message}")
        self._check_restart(what)
        return OUTCOMES[code]

    def _check_result(self, what: str, *, changed_in_place: bool) -> None:
        result, expected = result_of(self.job, self.source, self.target), self._expected
        if changed_in_place:  # truncated after the run: what is left is right
            expected = {
                name: content[: len(result[name])] for name, content in self._expected.items()
            }
            if result != expected:
                raise AssertionError(f"{what}: wrong bytes")
        elif result != self._expected:
            raise AssertionError(f"{what}: wrong bytes")

    def _check_restart(self, what: str) -> None:
        if self.job.settings.get("in_place"):
            return
        for file, content in self._contents.items():
            file.write_bytes(content)
        code = self.run(restart=True)
        if code != 0:
            raise AssertionError(f"{what}; restart: {code}: {Path(self.log).read_text()}")
        self._check_result(f"{what}; restart", changed_in_place=False)


def campaign(seed, size):
    """Run each kind of job `size` times."""
    draw = random.Random(seed)  # noqa: S311  # not for secrets
    counts = collections.Counter({"runs": 0, "finished": 0, "refused": 0, "stopped": 0})
    for job in JOBS:
        directory = Path(tempfile.mkdtemp(prefix="fastvgg-changes-", dir=memory_directory()))
        try:
            runs = Runs(job, directory)
            for _ in range(size):
                counts["runs"] += 1
                counts[runs.change_and_check(draw)] += 1
        finally:
            shutil.rmtree(directory)
    return {**counts, "wrong": 0}


if __name__ == "__main__":
    main(campaign, __doc__, size=200)
