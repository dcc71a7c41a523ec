"""Disk throughput with the system calls of a run, and image decoding throughput."""

from __future__ import annotations

import io
import mmap
import os
import shutil
import statistics
import tempfile
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast

import numpy as np
from PIL import Image

from fastvgg.bench.timing import time_interleaved
from fastvgg.datasets.open import open_source
from fastvgg.errors import TargetError, VerificationError, option_name
from fastvgg.imaging.decode import DecodeOptions
from fastvgg.imaging.resize import gather_function
from fastvgg.parallel import parallel_for
from fastvgg.storage.local import OpenFile, Storage

if TYPE_CHECKING:
    from fastvgg.datasets.images import ImageSource
    from fastvgg.storage.location import Location

CHUNK_BYTES: Final = 64 * 2**20
READ_BYTES: Final = 8 * 2**20
SIZE: Final = (224, 224)
TASK_IMAGES: Final = 8
CHECKED_IMAGES: Final = 8


def measure_disk(directory: Path, nbytes: int, rounds: int) -> dict[str, Any]:
    """Return the GB/s at which the disk of `directory` is written durably, and read.

    Each chunk is synced before the next is written, as in a run. The file is dropped from the
    page cache before it is read, and removed afterwards. Raises `TargetError` if the directory is
    missing, cannot be written to, or has too little free space.
    """
    try:
        free_bytes = shutil.disk_usage(directory).free
        with tempfile.TemporaryDirectory(prefix="fastvgg-bench-", dir=directory) as own:
            if free_bytes < 2 * nbytes:
                raise TargetError(
                    f"{directory} has {free_bytes} bytes of free space, needs {2 * nbytes}",
                    "free disk space, or give a directory on another disk",
                )
            return {"path": str(directory), **_measure_file(Path(own) / "data", nbytes, rounds)}
    except OSError as error:
        raise TargetError(
            f"{directory} cannot be measured: {error.strerror}",
            f"give {option_name('disk')} an existing, writable directory",
        ) from error


def _measure_file(path: Path, nbytes: int, rounds: int) -> dict[str, Any]:
    storage = Storage()
    chunk = mmap.mmap(-1, CHUNK_BYTES)  # page-aligned, as direct I/O requires
    chunk.write(os.urandom(CHUNK_BYTES))
    buffer = bytearray(READ_BYTES)
    data = memoryview(chunk)
    write_seconds, _, read_seconds = time_interleaved(
        (
            partial(_write_file, storage, path, nbytes, data),
            partial(_drop_cache, storage, path),
            partial(read_file, path, buffer),
        ),
        rounds,
    )
    gigabytes = nbytes / 1e9
    return {
        "bytes": nbytes,
        "write_gigabytes_per_second": round(gigabytes / statistics.median(write_seconds), 2),
        "read_gigabytes_per_second": round(gigabytes / statistics.median(read_seconds), 2),
    }


def _write_file(storage: Storage, path: Path, nbytes: int, data: memoryview) -> None:
    storage.remove(path)
    file = storage.create(path)
    try:
        storage.reserve(file, nbytes)
        file = storage.direct(file)
        for offset in range(0, nbytes, len(data)):
            storage.write(file, data[: nbytes - offset], offset)
            storage.sync(file)
    finally:
        storage.close(file)


def _drop_cache(storage: Storage, path: Path) -> None:
    file: OpenFile = storage.open(path)
    try:
        storage.drop_cache(file)
    finally:
        storage.close(file)


def read_file(path: Path, buffer: bytearray) -> None:
    """Read a file from beginning to end, reusing one buffer."""
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def measure_decoding(
    location: Location, max_images: int, rounds: int, threads: int
) -> dict[str, Any]:
    """Return how many images per second are decoded and resized to 224x224.

    The result is discarded. The first images are compared with what Pillow decodes from the same
    files, and a difference raises `VerificationError`. All files are in the page cache, because a
    warm-up round decodes them first.
    """
    source = open_source(
        location,
        decoding=DecodeOptions(size=SIZE),
        threads=threads,
        gather=gather_function("numba"),
    )
    with closing(cast("ImageSource", source)) as images:  # arrays are rejected
        rows = range(min(max_images, images.header.images))
        for row in rows[:CHECKED_IMAGES]:
            _check_pixels(images, row)
        tasks = [rows[first : first + TASK_IMAGES] for first in rows[::TASK_IMAGES]]
        failed: set[int] = set()

        def decode(task: range) -> None:
            out = np.empty((*SIZE, 3), np.uint8)
            failed.update(row for row in task if images.decode(row, out).failed)

        (seconds,) = time_interleaved([lambda: parallel_for(tasks, decode, threads)], rounds)
    return {
        "path": str(location),
        "images": len(rows),
        "failed": len(failed),
        "images_per_second": round(len(rows) / statistics.median(seconds)),
    }


def _check_pixels(images: ImageSource, row: int) -> None:
    """Compare an image of 8 bits per channel with Pillow's nearest resize, as Keras uses it."""
    actual = np.empty((*SIZE, 3), np.uint8)
    record = images.decode(row, actual)
    if record.failed:
        return
    data = images.listing.read(row, images.decoding.max_bytes)
    with Image.open(io.BytesIO(data)) as image:
        if image.mode not in ("L", "RGB"):
            return
        expected = image.convert("RGB").resize(SIZE[::-1], Image.Resampling.NEAREST)
    if not np.array_equal(actual, np.asarray(expected)):
        raise VerificationError(
            f"{record.path}: the decoded pixels differ from Pillow's",
            "please report it with the file",
        )
