"""Compare conversions of whole datasets with the limit of the disk, and measure their memory.

    python benchmarks/streams.py            # takes minutes, 18 GB of disk; writes a result
    python benchmarks/streams.py --quick    # 256 MiB, which fits in caches; writes nothing

The limit of a new file is a loop that writes the same number of bytes of one buffer with the same
calls: reserve space, write and sync each chunk, rename at the end. If the source is on disk, the
limit is this loop or reading the source only, whichever is slower. The limit of in-place runs is a
loop that writes every chunk twice, to a scratch file and to the data, with the same number of
syncs. The limit of a verification is reading the file only. No limit includes checksums, or small
files that a run writes besides the data. New files are written with direct I/O, as in a run; the
partial page at the end, less than 4 kB, is omitted.

Rounds of path and limit are interleaved, in alternating order, with new files each time. A share is
the median over the rounds of (seconds of the limit / seconds of the path), the spread is their
interquartile range. Before each call, the disk is synced, and as much memory as the files need is
touched and freed: otherwise the first call would page in memory that the hypervisor has reclaimed,
which is four times slower than the disk writes. The machine then rests, and calls with too much
steal time are repeated.

Memory is the peak resident memory in a separate process, above that after a small run of the same
kind, which loads Numba and compiles the kernel.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import json
import mmap
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from arrays import batch
from rows import number_of_rounds, print_row

import fastvgg
from fastvgg.bench.io import read_file
from fastvgg.bench.kernels import HEIGHT, WIDTH
from fastvgg.bench.memory import first_touch
from fastvgg.bench.timing import compare, machine
from fastvgg.parallel import available_cpus

if TYPE_CHECKING:
    from collections.abc import Callable

RESULT = Path(__file__).parent / "results" / "streams.json"
FILE_BYTES = 4 * 2**30
QUICK_BYTES = 256 * 2**20
READ_BYTES = 8 * 2**20
SLOTS = 4  # of the scratch file
CHUNKS_PER_CHECKPOINT = 3  # of an in-place run
MIN_SHARE = 0.90
REST_SECONDS = 1
MAX_STOLEN = 0.02
MAX_TRIES = 4
MEMORY = "256MiB"
MAX_PEAK_MIB = 256
MAX_PAGE_TABLES_MIB = 4
SMALL_IMAGES = 16

CHILD_SCRIPT = """
import json
import sys
import threading
import time
from pathlib import Path
import fastvgg


def mib(field):
    text = Path("/proc/self/status").read_text()
    return int(text.partition(field + ":")[2].split()[0]) / 1024


def sample():
    while not done.wait(0.02):
        page_tables.append(mib("VmPTE"))


small, large, options = json.loads(sys.argv[1])
fastvgg.plan(*small, backend="numba", **options).run()  # loads Numba
done, page_tables = threading.Event(), []
sampler = threading.Thread(target=sample)
sampler.start()
try:
    plan = fastvgg.plan(*large, **options)
    Path("/proc/self/clear_refs").write_text("5")
    idle = mib("VmRSS")
    start_seconds = time.perf_counter()
    plan.run()
    seconds = time.perf_counter() - start_seconds
    peak = mib("VmHWM") - idle
finally:
    done.set()
    sampler.join()
figures = {
    "peak_mib": peak,
    "planned_mib": plan.projected_bytes / 2**20,
    "page_tables_mib": max(page_tables),
    "idle_mib": idle,
    "seconds": seconds,
}
print(json.dumps({name: round(figure, 1) for name, figure in figures.items()}))
"""


class TimedCall(NamedTuple):
    """A timed call and its preparation."""

    prepare: Callable[[], object]
    call: Callable[[], object]

    def seconds(self):
        """Return the time of an undisturbed call, or of the last if all were disturbed."""
        for _ in range(MAX_TRIES):
            self.prepare()
            time.sleep(REST_SECONDS)
            start_stolen, start_seconds = stolen_seconds(), time.perf_counter()
            self.call()
            seconds = time.perf_counter() - start_seconds
            if stolen_seconds() - start_stolen <= MAX_STOLEN * seconds * os.cpu_count():
                break
        return seconds


def stolen_seconds():
    """Return the total steal time of all CPUs."""
    fields = Path("/proc/stat").read_text().split(maxsplit=9)
    return int(fields[8]) / os.sysconf("SC_CLK_TCK")


def time_interleaved(timed_calls, rounds):
    """Return the seconds of every call in every round but the first, which is a warm-up."""
    seconds = [[] for _ in timed_calls]
    for number in range(rounds + 1):
        order = list(zip(timed_calls, seconds, strict=True))
        for timed_call, durations in order if number % 2 else reversed(order):
            durations.append(timed_call.seconds())
    return [durations[1:] for durations in seconds]


class Files:
    """The files of a measurement, in a directory that is removed afterwards."""

    def __init__(self, directory, threads):
        self.directory = directory
        self.threads = threads

    def settle(self, nbytes):
        """Sync the disk, and touch free memory so that the hypervisor backs it."""
        os.sync()
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        first_touch(min(nbytes, free * 3 // 4), self.threads)

    def path(self, name):
        return self.directory / name

    def remove(self, name):
        """Remove a file and its sidecars."""
        for path in self.directory.glob(f"{name}*"):
            path.unlink()

    def array(self, name, images, dtype, *, sparse=False):
        """Create a file of deterministic images, or a sparse file of zeros."""
        block = batch(SMALL_IMAGES, "NHWC", dtype)
        header = np.lib.format.header_data_from_array_1_0(block)
        header["shape"] = (images, HEIGHT, WIDTH, 3)
        with self.path(name).open("wb") as file:
            np.lib.format.write_array_header_1_0(file, header)
            if sparse:
                file.truncate(file.tell() + images * block[0].nbytes)
                return self.path(name)
            for first in range(0, images, SMALL_IMAGES):
                file.write(block[: images - first].data)
        return self.path(name)


def image_bytes(dtype):
    return HEIGHT * WIDTH * 3 * np.dtype(dtype).itemsize


def fetch(path, cache_state, memory):
    """Evict a file from the page cache; if `cache_state` is "in memory", read it back.

    Eviction also helps files that are read back: writes to pages that were faulted in one by one,
    through a memory map, are half as fast as to pages that were read in large blocks.
    """
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(file)
    if cache_state == "in memory":
        read_file(path, memory)


def write(file, data, offset):
    """Write all of the data in one call."""
    if os.pwrite(file, data, offset) != len(data):
        raise RuntimeError(f"short write: fewer than {len(data)} bytes at offset {offset}")


def split_buffer(nbytes, buffer):
    """Yield the offset and the data of each chunk, for the whole pages among `nbytes`."""
    nbytes -= nbytes % mmap.PAGESIZE
    for offset in range(0, nbytes, len(buffer)):
        yield offset, buffer[: nbytes - offset]


@contextlib.contextmanager
def publish(path, nbytes):
    """Open a new file with reserved space for direct I/O; rename and sync it at the end, as a run.

    Direct I/O requires whole, aligned pages.
    """
    partial = path.with_name(f"{path.name}.partial")
    file = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_DIRECT, 0o666)
    try:
        os.posix_fallocate(file, 0, nbytes)
        yield file
    finally:
        os.close(file)
    partial.rename(path)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def write_new(path, nbytes, buffer):
    """Write a new file from one buffer, chunk by chunk."""
    with publish(path, nbytes) as file:
        for offset, data in split_buffer(nbytes, buffer):
            write(file, data, offset)
            os.fsync(file)


def write_twice(path, scratch_path, nbytes, buffer):
    """Overwrite a file with one buffer, writing each chunk to slots of a scratch file first."""
    file, scratch = os.open(path, os.O_RDWR), os.open(scratch_path, os.O_RDWR)
    try:
        for chunk, (offset, data) in enumerate(split_buffer(nbytes, buffer)):
            write(scratch, data, chunk % SLOTS * len(buffer))
            os.fsync(scratch)
            write(file, data, offset)
            if chunk % CHUNKS_PER_CHECKPOINT == CHUNKS_PER_CHECKPOINT - 1:
                os.fsync(file)
        os.fsync(file)
    finally:
        os.close(file)
        os.close(scratch)


def chunk_buffer(plan):
    """Return a buffer of the size of a plan's chunk, in whole pages."""
    nbytes = plan.chunk_images * plan.result.image_bytes
    memory = mmap.mmap(-1, nbytes - nbytes % mmap.PAGESIZE)
    memory.write(np.random.default_rng(1).bytes(len(memory)))
    return memoryview(memory)


def throughput(nbytes, seconds, **limits):
    """Return the gigabytes per second of a path and of its limits."""
    figures = {"gigabytes_per_second": round(nbytes / seconds / 1e9, 2)}
    for name, (limit_bytes, limit_seconds) in limits.items():
        figures[f"{name}_gigabytes_per_second"] = round(
            limit_bytes / statistics.median(limit_seconds) / 1e9, 2
        )
    return figures


def measure_new(files, arguments):
    """Measure a new file, from a source in the page cache and from one on disk."""
    images = arguments.bytes // image_bytes("float32")
    source = files.array("source.npy", images, "uint8")
    make_plan = functools.partial(
        fastvgg.plan, source, files.path("ours.npy"), mode="caffe", threads=arguments.threads
    )
    plan = make_plan()
    nbytes, buffer = plan.write_bytes, chunk_buffer(plan)
    memory = bytearray(READ_BYTES)

    def prepare(cache_state):
        files.remove("ours.npy")
        files.remove("plain.npy")
        files.settle(nbytes * 3 // 2)
        fetch(source, cache_state, memory)

    def time_against_writing(cache_state, *others):
        prepare_call = functools.partial(prepare, cache_state)
        calls = (
            lambda: make_plan().run(),
            lambda: write_new(files.path("plain.npy"), nbytes, buffer),
            *others,
        )
        return time_interleaved([TimedCall(prepare_call, call) for call in calls], arguments.rounds)

    ours, written = time_against_writing("in memory")
    share, spread, seconds = compare(ours, written)
    figures = throughput(nbytes, seconds, writing=(nbytes, written))
    yield print_row("uint8 to float32, source in memory", MIN_SHARE, share, spread, **figures)

    ours, written, read = time_against_writing("on disk", lambda: read_file(source, memory))
    share, spread, seconds = compare(ours, [max(pair) for pair in zip(written, read, strict=True)])
    limits = {"writing": (nbytes, written), "reading": (source.stat().st_size, read)}
    figures = throughput(nbytes, seconds, **limits)
    yield print_row("uint8 to float32, source on disk", MIN_SHARE, share, spread, **figures)
    for name in ("source.npy", "ours.npy", "plain.npy"):
        files.remove(name)


def measure_in_place(files, arguments):
    """Measure in-place runs in alternating directions, and the verification of their result."""
    images = arguments.bytes // image_bytes("float32")
    ours_path = files.array("ours.npy", images, "float32")
    plain_path = files.array("plain.npy", images, "float32")
    make_plan = functools.partial(
        fastvgg.plan, ours_path, in_place=True, mode="caffe", threads=arguments.threads
    )
    plan = make_plan()
    nbytes, buffer = plan.write_bytes, chunk_buffer(plan)
    scratch_bytes, memory = SLOTS * len(buffer), bytearray(READ_BYTES)

    def prepare(path):
        files.remove("scratch")
        files.settle(nbytes)
        with files.path("scratch").open("wb") as scratch:
            os.posix_fallocate(scratch.fileno(), 0, scratch_bytes)
            os.fsync(scratch.fileno())
        fetch(path, "in memory", memory)

    directions = itertools.cycle(("preprocess", "restore"))
    ours, written_twice = time_interleaved(
        (
            TimedCall(
                lambda: prepare(ours_path), lambda: make_plan(direction=next(directions)).run()
            ),
            TimedCall(
                lambda: prepare(plain_path),
                lambda: write_twice(plain_path, files.path("scratch"), nbytes, buffer),
            ),
        ),
        2 * arguments.rounds,
    )
    share, spread, seconds = compare(ours, written_twice)
    figures = throughput(nbytes, seconds, writing_twice=(nbytes, written_twice))
    yield print_row("float32 in place, there and back", MIN_SHARE, share, spread, **figures)
    files.remove("plain.npy")
    files.remove("scratch")
    yield from measure_verification(files, arguments, ours_path)
    files.remove("ours.npy")


def measure_verification(files, arguments, path):
    """Measure verifying the checksums of a file that was changed in place."""
    nbytes, memory = path.stat().st_size, bytearray(READ_BYTES)

    def prepare(cache_state):
        files.settle(nbytes * 5 // 4)
        fetch(path, cache_state, memory)

    for cache_state in ("in memory", "on disk"):
        prepare_call = functools.partial(prepare, cache_state)
        ours, read = time_interleaved(
            (
                TimedCall(prepare_call, lambda: fastvgg.verify(path)),
                TimedCall(prepare_call, lambda: read_file(path, memory)),
            ),
            arguments.rounds,
        )
        share, spread, seconds = compare(ours, read)
        figures = throughput(nbytes, seconds, reading=(nbytes, read))
        yield print_row(f"verify float32, {cache_state}", None, share, spread, **figures)


def measure_peak(name, small, large, **options):
    """Measure the memory of a run in a new process."""
    arguments = json.dumps((small, large, options), default=str)
    command = [sys.executable, "-c", CHILD_SCRIPT, arguments]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    if process.returncode:
        raise RuntimeError(f"{name}: {process.stderr}")
    row = {
        "path": name,
        "wanted_peak_mib": MAX_PEAK_MIB,
        "wanted_page_tables_mib": MAX_PAGE_TABLES_MIB,
        **json.loads(process.stdout),
    }
    print(f"{name:36s} peak {row['peak_mib']:6.1f} MiB", row, flush=True)
    return row


def measure_memory(files, arguments):
    """Measure the memory of runs on a dataset four times as large, and of in-place runs."""
    images = 4 * arguments.bytes // image_bytes("float32")
    options = {"mode": "caffe", "memory": MEMORY, "threads": arguments.threads}
    for name, dtype, result, direction in (
        ("restore float32 to uint8", "float32", "uint8", "restore"),
        ("uint8 to float32", "uint8", "float32", "preprocess"),
    ):
        if shutil.disk_usage(files.directory).free < 1.1 * images * image_bytes(result):
            print(f"{name}: not enough disk space")
            continue
        sources = [
            files.array("small.npy", SMALL_IMAGES, dtype, sparse=True),
            files.array("large.npy", images, dtype, sparse=True),
        ]
        targets = [files.path("small_result.npy"), files.path("large_result.npy")]
        small, large = zip(sources, targets, strict=True)
        yield measure_peak(name, small, large, direction=direction, **options)
        files.remove("small")
        files.remove("large")
    sources = [
        files.array("small.npy", SMALL_IMAGES, "float32"),
        files.array("large.npy", images // 4, "float32"),
    ]
    yield measure_peak("float32 in place", *([path] for path in sources), in_place=True, **options)
    files.remove("small")
    files.remove("large")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--threads", type=int, default=available_cpus())
    parser.add_argument("--rounds", type=number_of_rounds, default=5)
    parser.add_argument(
        "--directory", type=Path, default=Path(), help="directory on the disk to measure"
    )
    arguments = parser.parse_args()
    arguments.bytes = QUICK_BYTES if arguments.quick else FILE_BYTES
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # removes the files
    with tempfile.TemporaryDirectory(prefix="streams-", dir=arguments.directory) as directory:
        files = Files(Path(directory).absolute(), arguments.threads)
        rows = [
            row
            for measurement in (measure_new, measure_in_place)
            for row in measurement(files, arguments)
        ]
        memory = list(measure_memory(files, arguments))
    missed = [row["path"] for row in rows if row["wanted"] and row["share"] < row["wanted"]]
    print("below target:", ", ".join(missed) or "none")
    missed = [
        row["path"]
        for row in memory
        if row["peak_mib"] > row["wanted_peak_mib"]
        or row["page_tables_mib"] > row["wanted_page_tables_mib"]
    ]
    print("above target memory:", ", ".join(missed) or "none")
    if not arguments.quick:
        RESULT.parent.mkdir(exist_ok=True)
        record = {"machine": machine(), "threads": arguments.threads, "rounds": arguments.rounds}
        RESULT.write_text(json.dumps(record | {"rows": rows, "memory": memory}, indent=1) + "\n")


if __name__ == "__main__":
    main()
