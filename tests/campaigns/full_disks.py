"""Run on disks of every size; every command succeeds or raises a typed error.

    python -m tests.campaigns.full_disks             # takes a minute; prints counts
    python -m tests.campaigns.full_disks --size 100  # approximate number of sizes

The disk is a tmpfs in a private mount namespace, whose size varies in steps of a page. A command
completes; or it is rejected and changes nothing; or it stops after writing all data because there
is no space for the manifest. A rerun with enough space completes. Each job has its own process, so
that anything that kills one, such as writing to a mapped page without free space, ends the
campaign.
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
WIDE_SETTINGS = (
    {"in_place": True, "images": 7, "images_per_chunk": 1, "width": 6011},
    {"in_place": True, "images": 7, "images_per_chunk": 2, "width": 6011},
    {"in_place": False, "images": 11, "images_per_chunk": 2, "width": 6011},
)
OUTCOMES = ("completed", "refused", "stopped at the manifest")


class SmallDiskJob(Job):
    """A job in a directory with its own file system; the source of a new file is outside it."""

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
        self.check(self.used_bytes() == self.min_bytes, "a removed file is still open")

    def used_bytes(self):
        """Return the used space of the disk."""
        stats = os.statvfs(self.directory)
        return (stats.f_blocks - stats.f_bfree) * stats.f_bsize


class WatchingStorage(Storage):
    """Real storage that records the peak usage of a job's disk."""

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
    """Return disk sizes, from one without free space to one larger than sufficient."""
    job.reset()
    storage = WatchingStorage(job)
    job.command(storage)
    min_bytes = max(PAGE_BYTES, job.min_bytes)  # 0 would mean no limit
    return range(min_bytes, storage.max_bytes + (EXTRA_PAGES + 1) * PAGE_BYTES, PAGE_BYTES)


def run_and_rerun(job, disk_bytes):
    """Run on a disk of a given size, rerun on a large one, and return the first run's outcome."""
    job.reset()
    before = job.contents()
    job.resize(disk_bytes)
    try:
        job.command()
    except TargetError:
        outcome = "refused"
        job.check(job.contents() == before, "a rejected command changed the directory")
    except StoppedError:
        outcome = "stopped at the manifest"
        contents = job.contents()
        job.check_intermediate_state(contents)
        job.check(
            contents.get(job.target.name) == job.expected, "no space was reserved for the data"
        )
    else:
        outcome = "completed"
        job.check_final_state()
    job.check(job.in_place or job.source.read_bytes() == job.original, "changed source")
    job.resize()
    job.command()
    job.check_final_state()
    return outcome


def count_outcomes(job, sizes):
    """Count the outcomes of runs on disks of several sizes."""
    return Counter(run_and_rerun(job, disk_bytes) for disk_bytes in sizes)


def campaign(seed, size):
    """Test a sample of about `size` disk sizes, and those near the sufficient size."""
    draw = random.Random(seed)  # noqa: S311  # not for secrets
    use_private_mounts()
    forking = multiprocessing.get_context("fork")
    directory = Path(tempfile.mkdtemp(prefix="fastvgg-full-", dir=memory_directory()))
    total = Counter(dict.fromkeys(OUTCOMES, 0))
    try:
        every = {
            job: sizes_for(job)
            for job in jobs(directory, SmallDiskJob, SETTINGS + LARGER + WIDE_SETTINGS)
        }
        share = size / sum(map(len, every.values()))
        for job, job_sizes in every.items():
            sizes = [
                each
                for each in job_sizes
                if each in job_sizes[ALWAYS_TESTED] or draw.random() < share
            ]
            with ProcessPoolExecutor(1, forking) as process:  # also raises if it is killed
                total += process.submit(count_outcomes, job, sizes).result()
    finally:
        for mount_point in directory.glob("*/"):
            unmount(mount_point, at_once=False)
        shutil.rmtree(directory)
    return {"disk sizes": total.total(), **{name: total[name] for name in OUTCOMES}, "wrong": 0}


if __name__ == "__main__":
    main(campaign, __doc__, size=1_000)
