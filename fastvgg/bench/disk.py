"""What a disk allows: a file written with the calls of a run, and read again from the disk."""

from __future__ import annotations

import mmap
import os
import shutil
import statistics
import tempfile
from functools import partial
from pathlib import Path
from typing import Any, Final

from fastvgg.bench.timing import time_interleaved
from fastvgg.errors import TargetError
from fastvgg.storage.local import Storage, StoredFile

__all__ = ["measured", "read_whole"]

CHUNK_BYTES: Final = 64 * 2**20
READ_BYTES: Final = 8 * 2**20


def measured(directory: Path, nbytes: int, rounds: int) -> dict[str, Any]:
    """Return the gigabytes a second that a directory's disk writes, durably, and reads.

    Each chunk is on the disk before the next is written, as in a run; what is read was forgotten
    by the system's memory before. The file is removed.

    Raises
    ------
    TargetError
        If the directory is missing, cannot be written to, or has no room.
    """
    try:
        free_bytes = shutil.disk_usage(directory).free
        with tempfile.TemporaryDirectory(prefix="fastvgg-bench-", dir=directory) as own:
            if free_bytes < 2 * nbytes:
                raise TargetError(
                    f"{directory} has room for {free_bytes} bytes, and {2 * nbytes} are wanted",
                    "free disk space, or give the directory of another disk",
                )
            return {"path": str(directory), **_measured(Path(own) / "data", nbytes, rounds)}
    except OSError as error:
        raise TargetError(
            f"{directory} cannot be measured: {error.strerror}",
            "give --disk a directory that exists and can be written to",
        ) from error


def _measured(path: Path, nbytes: int, rounds: int) -> dict[str, Any]:
    storage = Storage()
    chunk = mmap.mmap(-1, CHUNK_BYTES)  # begins where a page does
    chunk.write(os.urandom(CHUNK_BYTES))
    piece = bytearray(READ_BYTES)
    data = memoryview(chunk)
    written, _, read = time_interleaved(
        (
            partial(_write, storage, path, nbytes, data),
            partial(_forget, storage, path),
            partial(read_whole, path, piece),
        ),
        rounds,
    )
    gigabytes = nbytes / 1e9
    return {
        "bytes": nbytes,
        "write_gigabytes_per_second": round(gigabytes / statistics.median(written), 2),
        "read_gigabytes_per_second": round(gigabytes / statistics.median(read), 2),
    }


def _write(storage: Storage, path: Path, nbytes: int, data: memoryview) -> None:
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


def _forget(storage: Storage, path: Path) -> None:
    file: StoredFile = storage.open(path)
    try:
        storage.drop_cache(file)
    finally:
        storage.close(file)


def read_whole(path: Path, memory: bytearray) -> None:
    """Read a file from its beginning to its end, into the same memory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        offset = 0
        while count := os.preadv(descriptor, [memory], offset):
            offset += count
    finally:
        os.close(descriptor)
