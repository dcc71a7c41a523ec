"""Run on disks of every size; every command succeeds or fails with a typed error.

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
from tests.helpers.faults import memory_directory
from tests.helpers.jobs import LARGER, SETTINGS, Job, jobs
from tests.helpers.private_disks import REMOUNT, mount, unmount, use_private_mounts

PAGE_BYTES = 4096
AMPLE_BYTES = 64 * 1024 * 1024
EXTRA_PAGES = 8  # pages beyond the sufficient size
ALWAYS_TESTED = slice(-EXTRA_PAGES - 5, -EXTRA_PAGES + 1)  # sizes that are always tested
WIDE = (
    {"in_place": True, "images": 7, "images_per_chunk": 1, "width": 6011},
    {"in_place": True, "images": 7, "images_per_chunk": 2, "width": 6011},
    {"in_place": False, "images": 11, "images_per_chunk": 2, "width": 6011},
)
OUTCOMES = ("ended well", "refused", "stopped at the manifest")


class OnSmallDisk(Job):
    """A job in a directory that is a disk of its own; of a new file, the source lies outside."""

    def __init__(self, directory, **settings):
        mount("none", directory, "tmpfs", options=f"size={AMPLE_BYTES}")
        super().__init__(directory, **settings)
        self.min_bytes = self.used_bytes()

    def resize(self, nbytes=AMPLE_BYTES):
        """Change the size of the disk."""
        mount("none", self.directory, "none", REMOUNT, f"size={nbytes}")

    def reset(self):
        self.resize()
        super().reset()
        self.check(self.used_bytes() == self.min_bytes, "what was removed is still open")

    def used_bytes(self):
        """Return the used space of the disk."""
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
    return range(min_bytes, storage.max_bytes + (EXTRA_PAGES + 1) * PAGE_BYTES, PAGE_BYTES)


def run_and_rerun(job, disk_bytes):
    """Run on a disk of some size, rerun on a large one, and return how the first run ended."""
    job.reset()
    before = job.contents()
    job.resize(disk_bytes)
    try:
        job.command()
    except TargetError:
        ended = "refused"
        job.check(job.contents() == before, "something is left of what was refused")
    except StoppedError:
        ended = "stopped at the manifest"
        contents = job.contents()
        job.check_intermediate_state(contents)
        job.check(contents.get(job.target.name) == job.expected, "no room was kept for its data")
    else:
        ended = "ended well"
        job.check_final_state()
    job.check(job.in_place or job.source.read_bytes() == job.original, "changed source")
    job.resize()
    job.command()
    job.check_final_state()
    return ended


def count_outcomes(job, sizes):
    """Count how runs on disks of several sizes ended."""
    return Counter(run_and_rerun(job, disk_bytes) for disk_bytes in sizes)


def campaign(seed, size):
    """Try about `size` sizes of all that there are, and those near to what is needed."""
    draw = random.Random(seed)  # noqa: S311  # not for secrets
    use_private_mounts()
    forking = multiprocessing.get_context("fork")
    place = Path(tempfile.mkdtemp(prefix="fastvgg-full-", dir=memory_directory()))
    total = Counter(dict.fromkeys(OUTCOMES, 0))
    try:
        every = {job: sizes_for(job) for job in jobs(place, OnSmallDisk, SETTINGS + LARGER + WIDE)}
        share = size / sum(map(len, every.values()))
        for job, job_settings in every.items():
            sizes = [
                each
                for each in job_settings
                if each in job_settings[ALWAYS_TESTED] or draw.random() < share
            ]
            with ProcessPoolExecutor(1, forking) as process:  # an error here too if it is killed
                total += process.submit(count_outcomes, job, sizes).result()
    finally:
        for directory in place.glob("*/"):
            unmount(directory, at_once=False)
        shutil.rmtree(place)
    return {"sizes": total.total(), **{name: total[name] for name in OUTCOMES}, "wrong": 0}


if __name__ == "__main__":
    main(campaign, __doc__, size=1_000)
