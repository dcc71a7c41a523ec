"""Power cuts at every boundary between durable calls, on a real ext4 that loses what it kept back.

    python -m tests.campaigns.power_cuts              # some minutes, as root; prints its counts
    python -m tests.campaigns.power_cuts --size 1000  # no less than so many cuts

The file system lies on a loop device. A cut is its ioctl to shut down at once: the page cache is
lost, and of the names what its journal has not committed; or, one time in three, names are kept
whose data was never written. Before it, and at any call, ranges of files are written out, as the
system does when it likes. Then it is mounted again, and the same command is given; one time in
three the power fails in that too, up to three deep. One time in four the first is no power cut: the
process is killed, and what it did not sync is there until the power fails. After a command that has
said that it is done the power fails as well, and all of it must be there.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import gc
import itertools
import os
import random
import shutil
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

from fastvgg.errors import FastvggError
from tests.campaigns.command import main
from tests.campaigns.kills import count_calls
from tests.helpers.faults import CrashingStorage, SimulatedCrash, memory_directory
from tests.helpers.jobs import (
    FORMAT_SETTINGS,
    LARGER,
    SETTINGS,
    FormatJob,
    IncorrectStateError,
    jobs,
)
from tests.helpers.private_disks import (
    NOT_ALLOWED,
    PrivateDiskUnavailable,
    call_libc,
    mount,
    unmount,
    use_private_mounts,
)

DISK_BYTES = 32 * 1024 * 1024
SHUT_DOWN = 0x8004587D  # EXT4_IOC_SHUTDOWN
FLUSH_BUFFERS = 0x1261  # BLKFLSBUF
WITH_COMMIT, NO_COMMIT = 1, 2  # whether ext4 commits its journal first
WRITE_OUT = 1 | 2 | 4  # of sync_file_range: wait, begin, and wait until it is done
MODES = ("errors=remount-ro,data=ordered", "errors=remount-ro,data=writeback,noauto_da_alloc")
MAX_DEPTH = 3
SYNCS = (
    "redo_log.commit",
    "redo_log.finish",
    "contiguous.sync",
    "zarr_writer._write",
    "local.write_atomic",
)


class Disk:
    """An ext4 in a file, mounted for this process alone.

    Parameters
    ----------
    directory
        Where the file and the mount point are made.
    draw
        Chooses how it is mounted, and what a cut leaves.
    """

    def __init__(self, directory, draw):
        self.place = directory / "mounted"
        self.place.mkdir()
        self._draw = draw
        image = directory / "image"
        with image.open("wb") as file:
            file.truncate(DISK_BYTES)
        made = "-J size=4 -E lazy_itable_init=0,lazy_journal_init=0,nodiscard"
        try:
            run_command("mkfs.ext4", "-q", *made.split(), image)
            self._device = run_command("losetup", "--find", "--show", image)
            self._device_descriptor = os.open(self._device, os.O_RDWR)
            run_command("losetup", "--detach", self._device)  # when the last user closes it
            self._mount()
        except OSError as error:
            raise PrivateDiskUnavailable(f"{NOT_ALLOWED} loop mounts: {error}") from error

    def _mount(self):
        mount(self._device, self.place, "ext4", options=self._draw.choice(MODES))

    def sync(self):
        """Make the whole disk durable."""
        self._with_descriptor(lambda descriptor: call_libc("syncfs", descriptor))

    def cut(self):
        """Cut the power."""
        how = struct.pack("I", self._draw.choice((WITH_COMMIT, NO_COMMIT, NO_COMMIT)))
        self._with_descriptor(lambda descriptor: fcntl.ioctl(descriptor, SHUT_DOWN, how))

    def _with_descriptor(self, do):
        descriptor = os.open(self.place, os.O_RDONLY)
        try:
            do(descriptor)
        finally:
            os.close(descriptor)

    def remount(self):
        """Mount the disk again after a cut."""
        try:
            unmount(self.place)
        except OSError:  # a dead run's frames may hold a mapped window in a cycle
            gc.collect()
            unmount(self.place)
        fcntl.ioctl(self._device_descriptor, FLUSH_BUFFERS)
        self._mount()

    def close(self):
        """Unmount the disk, now or when it is no longer in use."""
        unmount(self.place, at_once=False)
        os.close(self._device_descriptor)


def run_command(*command):
    """Return the output of a command; raise OSError if it failed."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except subprocess.CalledProcessError as error:
        raise OSError(f"{command[0]}: {error.stderr.strip()}") from error
    return done.stdout.strip()


class PoweredStorage(CrashingStorage):
    """Storage whose process dies at its n-th call, on a system that writes files out by itself.

    Parameters
    ----------
    directory
        Where the files are.
    draw
        Chooses what is written out.
    omitted_sync
        A function whose syncs are omitted, to test that the omission is detected.
    """

    def __init__(self, crash_at, directory, draw, *, omitted_sync=None):
        super().__init__(crash_at, partially_done=draw.random() < 0.5)
        self._directory = directory
        self._draw = draw
        self._omitted_sync = omitted_sync
        self._write_out_at = (draw.randrange(1, crash_at + 1), draw.choice((0, crash_at)))

    def _call(self, name, do, half=None):
        with self._call_lock:
            if len(self.calls) + 1 in self._write_out_at and not self._dead:
                self._write_out()
            return super()._call(name, do, half)

    def _write_out(self):
        for path in sorted(self._directory.rglob("*")):
            if path.is_dir():
                continue
            begin = self._draw.randrange(path.stat().st_size + 1)
            nbytes = self._draw.choice((0, 4096, 16384, path.stat().st_size))
            if nbytes:
                with path.open("rb") as file:
                    where = ctypes.c_int64(begin), ctypes.c_int64(nbytes)
                    call_libc("sync_file_range", file.fileno(), *where, WRITE_OUT)

    def _is_synced(self):
        """Whether a sync in the calling function is not omitted."""
        frame = sys._getframe(2)
        function = f"{Path(frame.f_code.co_filename).stem}.{frame.f_code.co_name}"
        return function != self._omitted_sync

    def sync(self, file):
        if self._is_synced():
            super().sync(file)

    def sync_directory(self, path):
        if self._is_synced():
            super().sync_directory(path)

    def syncfs(self, directory):
        if self._is_synced():
            super().syncfs(directory)


def cut_and_recover(disk, job, first, draw, omitted_sync=None):
    """Cut the power at a call, and perhaps in what comes after; return how many cuts there were."""
    job.reset()
    disk.sync()
    numbers = [first]
    killed = draw.random() < 1 / 4
    while len(numbers) < MAX_DEPTH and draw.random() < (
        1 if killed and len(numbers) == 1 else 1 / 3
    ):
        numbers.append(draw.randrange(1, numbers[-1] + 10))
    for depth, number in enumerate(numbers):
        storage = PoweredStorage(number, job.directory, draw, omitted_sync=omitted_sync)
        is_cut = depth > 0 or not killed
        ended = run_and_cut(disk, job, storage, is_cut=is_cut)
        if is_cut:
            disk.remount()
        job.check_intermediate_state(job.contents())
        if ended:
            job.check_final_state()
    job.command()
    job.check_final_state()
    return len(numbers) - killed


def run_and_cut(disk, job, storage, *, is_cut):
    """Whether a command does its work before it dies; the power fails in any case, or in none."""
    try:
        return job.command(storage)
    except SimulatedCrash:
        return False
    finally:
        if is_cut:
            disk.cut()
        storage.finish_crash()


def moments(made):
    """Every call of every job, and the moment after its last."""
    return [(job, number) for job in made for number in range(1, count_calls(job) + 2)]


@contextlib.contextmanager
def powered_jobs(draw):
    """A disk, and jobs on it."""
    use_private_mounts()
    directory = Path(tempfile.mkdtemp(prefix="fastvgg-power-", dir=memory_directory()))
    try:
        disk = Disk(directory, draw)
        try:
            yield disk, jobs(disk.place, settings=SETTINGS + LARGER + FORMAT_SETTINGS)
        finally:
            disk.close()
    finally:
        shutil.rmtree(directory)


def campaign(seed, size):
    """Cut the power `size` times or a little more, and by turns at every moment."""
    draw = random.Random(seed)  # noqa: S311  # not for secrets
    with powered_jobs(draw) as (disk, made):
        every = moments(made)
        chosen = every[seed % 7 :: max(1, 4 * len(every) // (3 * size))]
        gc.freeze()  # what is there now stays
        cuts = 0
        for job, number in itertools.cycle(chosen):
            cuts += cut_and_recover(disk, job, number, draw)
            if cuts >= size:
                break
    return {"power cuts": cuts, "moments": len(chosen), "wrong": 0}


def is_affected(job, omitted_sync):
    """Whether a job calls the function whose syncs are omitted."""
    is_zarr = isinstance(job, FormatJob) and job.form == "zarr"
    if omitted_sync == "zarr_writer._write":
        return is_zarr
    return not is_zarr if omitted_sync == "contiguous.sync" else job.in_place


def count_detected_omissions(seed, size, stop_after=1_000_000):
    """Omit the syncs of one function at a time; return how many of `size` runs went wrong.

    Stops after that many detections.
    """
    draw = random.Random(seed)  # noqa: S311  # not for secrets
    wrong = dict.fromkeys(SYNCS, 0)
    with powered_jobs(draw) as (disk, made):
        every = moments(made)
        for omitted_sync in SYNCS:
            of_these = [moment for moment in every if is_affected(moment[0], omitted_sync)]
            for job, number in draw.choices(of_these, k=size):
                wrong[omitted_sync] += is_detected(disk, job, number, draw, omitted_sync)
                if wrong[omitted_sync] == stop_after:
                    break
    return wrong


def is_detected(disk, job, number, draw, omitted_sync):
    """Whether power cuts lead to a wrong result with an omitted sync."""
    try:
        cut_and_recover(disk, job, number, draw, omitted_sync)
    except (IncorrectStateError, FastvggError):
        pass
    else:
        return False
    disk.remount()
    return True


if __name__ == "__main__":
    main(campaign, __doc__, size=12_000)
