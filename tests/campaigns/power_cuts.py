"""Cut the power before every call that changes the disk, on a real ext4 that loses unsynced data.

    python -m tests.campaigns.power_cuts              # takes minutes, as root; prints counts
    python -m tests.campaigns.power_cuts --size 1000  # minimum number of cuts

The file system is on a loop device. A cut is ext4's shutdown ioctl: the page cache is lost, and so
are names that its journal has not committed; in one cut in three, names persist whose data was
never written. Ranges of files are written back before the cut and at random calls, as the kernel
may do at any time. The file system is then remounted and the command rerun; with a probability of
1/3 the power fails again, up to three deep. With a probability of 1/4 the first crash is a killed
process, whose unsynced data survive until the power fails. The power also fails after a command
reports success, and everything must persist.
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
import tempfile
from pathlib import Path

from fastvgg.errors import FastvggError
from tests.campaigns.command import main
from tests.campaigns.kills import count_calls
from tests.helpers.faults import (
    CrashingStorage,
    SimulatedCrash,
    frame_that_syncs,
    memory_directory,
)
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
WITH_COMMIT, NO_COMMIT = 1, 2  # whether ext4 commits its journal before the shutdown
WRITE_BACK = 1 | 2 | 4  # flags of sync_file_range: wait before, write, wait after
MODES = ("errors=remount-ro,data=ordered", "errors=remount-ro,data=writeback,noauto_da_alloc")
MAX_DEPTH = 3
SYNCS = (
    "redo_log.commit",
    "redo_log.finish",
    "contiguous.sync",
    "zarr_writer._store",
    "local.replace_file",
)


class Disk:
    """An ext4 image, mounted only for this process.

    Parameters
    ----------
    directory
        Where the image and the mount point are created.
    draw
        Chooses the mount options and the kind of power cut.
    """

    def __init__(self, directory, draw):
        self.mount_point = directory / "mounted"
        self.mount_point.mkdir()
        self._draw = draw
        image = directory / "image"
        with image.open("wb") as file:
            file.truncate(DISK_BYTES)
        options = "-J size=4 -E lazy_itable_init=0,lazy_journal_init=0,nodiscard"
        try:
            run_command("mkfs.ext4", "-q", *options.split(), image)
            self._device = run_command("losetup", "--find", "--show", image)
            self._device_descriptor = os.open(self._device, os.O_RDWR)
            run_command("losetup", "--detach", self._device)  # when the last user closes it
            self._mount()
        except OSError as error:
            raise PrivateDiskUnavailable(f"{NOT_ALLOWED} loop mounts: {error}") from error

    def _mount(self):
        mount(self._device, self.mount_point, "ext4", options=self._draw.choice(MODES))

    def sync(self):
        """`syncfs` the file system."""
        self._with_descriptor(lambda descriptor: call_libc("syncfs", descriptor))

    def cut(self):
        """Cut the power."""
        how = struct.pack("I", self._draw.choice((WITH_COMMIT, NO_COMMIT, NO_COMMIT)))
        self._with_descriptor(lambda descriptor: fcntl.ioctl(descriptor, SHUT_DOWN, how))

    def _with_descriptor(self, do):
        descriptor = os.open(self.mount_point, os.O_RDONLY)
        try:
            do(descriptor)
        finally:
            os.close(descriptor)

    def remount(self):
        """Mount the disk again after a cut."""
        try:
            unmount(self.mount_point)
        except OSError:  # a dead run's frames may hold a mapped window in a cycle
            gc.collect()
            unmount(self.mount_point)
        fcntl.ioctl(self._device_descriptor, FLUSH_BUFFERS)
        self._mount()

    def close(self):
        """Unmount the disk, now or when it is no longer in use."""
        unmount(self.mount_point, at_once=False)
        os.close(self._device_descriptor)


def run_command(*command):
    """Return the output of a command; raise OSError if it failed."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except subprocess.CalledProcessError as error:
        raise OSError(f"{command[0]}: {error.stderr.strip()}") from error
    return done.stdout.strip()


class PoweredStorage(CrashingStorage):
    """Storage whose process dies at its n-th call, with simulated write-back by the kernel.

    Parameters
    ----------
    directory
        The directory of the files.
    draw
        Chooses the ranges to write back.
    omitted_sync
        A function whose syncs are omitted, to test that the omission is detected.
    """

    def __init__(self, crash_at, directory, draw, *, omitted_sync=None):
        super().__init__(crash_at, partially_done=draw.random() < 0.5)
        self._directory = directory
        self._draw = draw
        self._omitted_sync = omitted_sync
        self._write_back_at = (draw.randrange(1, crash_at + 1), draw.choice((0, crash_at)))

    def _call(self, name, do, half=None):
        with self._call_lock:
            if len(self.calls) + 1 in self._write_back_at and not self._dead:
                self._write_back()
            return super()._call(name, do, half)

    def _write_back(self):
        for path in sorted(self._directory.rglob("*")):
            if path.is_dir():
                continue
            begin = self._draw.randrange(path.stat().st_size + 1)
            nbytes = self._draw.choice((0, 4096, 16384, path.stat().st_size))
            if nbytes:
                with path.open("rb") as file:
                    span = ctypes.c_int64(begin), ctypes.c_int64(nbytes)
                    call_libc("sync_file_range", file.fileno(), *span, WRITE_BACK)

    def _is_synced(self):
        """Return whether the calling sync is to be performed."""
        frame = frame_that_syncs()
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
    """Cut the power at a call, and perhaps during the reruns; return the number of cuts."""
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
        finished = run_and_cut(disk, job, storage, is_cut=is_cut)
        if is_cut:
            disk.remount()
        job.check_intermediate_state(job.contents())
        if finished:
            job.check_final_state()
    job.command()
    job.check_final_state()
    return len(numbers) - killed


def run_and_cut(disk, job, storage, *, is_cut):
    """Run, cut the power if `is_cut`, and return whether the command finished before its crash."""
    try:
        return job.command(storage)
    except SimulatedCrash:
        return False
    finally:
        if is_cut:
            disk.cut()
        storage.finish_crash()


def crash_points(all_jobs):
    """Return every call of every job, and the point after the last call."""
    return [(job, number) for job in all_jobs for number in range(1, count_calls(job) + 2)]


@contextlib.contextmanager
def powered_jobs(draw):
    """Provide a disk and jobs on it."""
    use_private_mounts()
    directory = Path(tempfile.mkdtemp(prefix="fastvgg-power-", dir=memory_directory()))
    try:
        disk = Disk(directory, draw)
        try:
            yield disk, jobs(disk.mount_point, settings=SETTINGS + LARGER + FORMAT_SETTINGS)
        finally:
            disk.close()
    finally:
        shutil.rmtree(directory)


def campaign(seed, size):
    """Cut the power at least `size` times, cycling through the crash points."""
    draw = random.Random(seed)  # noqa: S311  # not for secrets
    with powered_jobs(draw) as (disk, all_jobs):
        every = crash_points(all_jobs)
        chosen = every[seed % 7 :: max(1, 4 * len(every) // (3 * size))]
        gc.freeze()  # exclude all current objects from collection
        cuts = 0
        for job, number in itertools.cycle(chosen):
            cuts += cut_and_recover(disk, job, number, draw)
            if cuts >= size:
                break
    return {"power cuts": cuts, "distinct points in time": len(chosen), "wrong": 0}


def is_affected(job, omitted_sync):
    """Return whether a job calls the function whose syncs are omitted."""
    is_zarr = isinstance(job, FormatJob) and job.form == "zarr"
    if omitted_sync == "zarr_writer._store":
        return is_zarr
    return not is_zarr if omitted_sync == "contiguous.sync" else job.in_place


def count_detected_omissions(seed, size, stop_after=1_000_000):
    """Omit the syncs of one function at a time; return how many of `size` runs detect it.

    Stops after `stop_after` detections.
    """
    draw = random.Random(seed)  # noqa: S311  # not for secrets
    wrong = dict.fromkeys(SYNCS, 0)
    with powered_jobs(draw) as (disk, all_jobs):
        every = crash_points(all_jobs)
        for omitted_sync in SYNCS:
            affected = [(job, number) for job, number in every if is_affected(job, omitted_sync)]
            for job, number in draw.choices(affected, k=size):
                wrong[omitted_sync] += is_detected(disk, job, number, draw, omitted_sync)
                if wrong[omitted_sync] == stop_after:
                    break
    return wrong


def is_detected(disk, job, number, draw, omitted_sync):
    """Return whether power cuts lead to a wrong result with an omitted sync."""
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
