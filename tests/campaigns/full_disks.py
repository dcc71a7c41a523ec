"""Disks of every size from much too small to large enough, and every command ends in words or well.

    python -m tests.campaigns.full_disks             # a minute; prints its counts
    python -m tests.campaigns.full_disks --size 100  # about so many sizes

The disk is one in memory that only this process sees, and has the sizes one after another, a page
apart. A command on it comes to its end; or it is refused, and nothing has changed; or it is
stopped, when every byte of its data is there and its manifest finds no room. When the disk has room
again the same command comes to its end. What kills a process, as writing to a mapped page does
where there is no room for it, ends the campaign: each job has a process of its own.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import tempfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from fastvgg.errors import StoppedError, TargetError
from fastvgg.storage.local import Storage
from tests.campaigns.command import main
from tests.helpers.faults import quick_directory
from tests.helpers.jobs import LARGER, SETTINGS, Job, jobs
from tests.helpers.private_disks import REMOUNT, mount, private_mounts, unmount

PAGE_BYTES = 4096
PLENTY_BYTES = 64 * 1024 * 1024
BEYOND = 8  # pages more than what suffices
NEAR = slice(-BEYOND - 5, -BEYOND + 1)  # the sizes that are never left out
WIDE = (
    {"in_place": True, "images": 7, "together": 1, "width": 6011},
    {"in_place": True, "images": 7, "together": 2, "width": 6011},
    {"in_place": False, "images": 11, "together": 2, "width": 6011},
)
OUTCOMES = ("ended well", "refused", "stopped at the manifest")


class OnSmallDisk(Job):
    """A job in a directory that is a disk of its own; of a new file, the source lies outside."""

    def __init__(self, directory, **settings):
        mount("none", directory, "tmpfs", options=f"size={PLENTY_BYTES}")
        super().__init__(directory, **settings)
        self.min_bytes = self.used_bytes()

    def resize(self, nbytes=PLENTY_BYTES):
        """Let the disk have another size."""
        mount("none", self.directory, "none", REMOUNT, f"size={nbytes}")

    def reset(self):
        self.resize()
        super().reset()
        self.expect(self.used_bytes() == self.min_bytes, "what was removed is still open")

    def used_bytes(self):
        """How much of the disk is taken."""
        found = os.statvfs(self.directory)
        return (found.f_blocks - found.f_bfree) * found.f_bsize


class WatchingStorage(Storage):
    """Real storage that knows how much of a job's disk was taken at most."""

    def __init__(self, job):
        super().__init__()
        self.max_bytes = 0
        self._job = job

    def reserve(self, file, nbytes):
        super().reserve(file, nbytes)
        self.max_bytes = max(self.max_bytes, self._job.used_bytes())

    def write(self, file, data, offset):
        super().write(file, data, offset)
        self.max_bytes = max(self.max_bytes, self._job.used_bytes())


def sizes_for(job):
    """Sizes of a disk, from one with no room for anything new to one with more than suffices."""
    job.reset()
    storage = WatchingStorage(job)
    job.command(storage)
    min_bytes = max(PAGE_BYTES, job.min_bytes)  # 0 would mean that there is no limit
    return range(min_bytes, storage.max_bytes + (BEYOND + 1) * PAGE_BYTES, PAGE_BYTES)


def outcome(job, disk_bytes):
    """What becomes of a command on a disk of some size, and of the same one on a large disk."""
    job.reset()
    before = job.contents()
    job.resize(disk_bytes)
    try:
        job.command()
    except TargetError:
        ended = "refused"
        job.expect(job.contents() == before, "something is left of what was refused")
    except StoppedError:
        ended = "stopped at the manifest"
        contents = job.contents()
        job.check_in_between(contents)
        job.expect(contents.get(job.target.name) == job.expected, "no room was kept for its data")
    else:
        ended = "ended well"
        job.check_end()
    job.expect(job.in_place or job.source.read_bytes() == job.original, "changed source")
    job.resize()
    job.command()
    job.check_end()
    return ended


def outcomes(job, sizes):
    """How often a command ended how."""
    return Counter(outcome(job, disk_bytes) for disk_bytes in sizes)


def campaign(seed, size):
    """Try about `size` sizes of all that there are, and those near to what is needed."""
    draw = random.Random(seed)  # noqa: S311  # not for secrets
    private_mounts()
    forking = multiprocessing.get_context("fork")
    place = Path(tempfile.mkdtemp(prefix="fastvgg-full-", dir=quick_directory()))
    total = Counter(dict.fromkeys(OUTCOMES, 0))
    try:
        every = {job: sizes_for(job) for job in jobs(place, OnSmallDisk, SETTINGS + LARGER + WIDE)}
        share = size / sum(map(len, every.values()))
        for job, of_job in every.items():
            sizes = [each for each in of_job if each in of_job[NEAR] or draw.random() < share]
            with ProcessPoolExecutor(1, forking) as process:  # an error here too if it is killed
                total += process.submit(outcomes, job, sizes).result()
    finally:
        for directory in place.glob("*/"):
            unmount(directory, at_once=False)
        shutil.rmtree(place)
    return {"sizes": total.total(), **{name: total[name] for name in OUTCOMES}, "wrong": 0}


if __name__ == "__main__":
    main(campaign, __doc__, size=1_000)
