"""Whole datasets beside what the disk allows, as shares of it in one run, and their memory.

    python benchmarks/streams.py            # some minutes, 18 GB of disk; writes a result
    python benchmarks/streams.py --quick    # 256 MiB, which fits into caches; writes nothing

The limit of a new file is a loop that writes as many bytes of one buffer with the same calls: the
space reserved, each chunk written and synced, the name given at the end. Where the source has to
come from the disk, it is that or reading it alone, whichever takes longer. The limit of work in
place is a loop that writes every chunk twice, to a scratch file and to the data, synced as often.
The limit of a verification is reading the file alone. Nothing small that a run writes beside the
data is in any limit, nor its checksums. New files are written past the system's cache, as by a run;
what they are short of whole pages, less than 4 kB, is left out.

Path and limit run in turn, in the opposite order each time, into files that are new each time; a
share is the median of (seconds of the limit / seconds of the path) over the rounds, and the spread
is the middle half of them. Before each, the disk settles and as much memory as the files take is
used and given back: what the owner of a virtual machine took back in the meantime would else be
fetched, four times slower than the disk writes, by whichever comes first. After that the machine
rests, and a call during which its owner took processors away is made again.

Memory is measured in a process of its own, in which a small run of the same kind loads Numba and
compiles the kernel first: the most that is resident, above what was resident then.
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
from rows import row

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
CHUNKS_PER_CHECKPOINT = 3  # chunks of a file that is changed in place
WANTED = 0.90
REST_SECONDS = 1
MAX_STOLEN = 0.02
MAX_TRIES = 4
MEMORY = "256MiB"
WANTED_PEAK_MIB = 256
WANTED_PAGE_TABLES_MIB = 4
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


def look():
    while not done.wait(0.02):
        page_tables.append(mib("VmPTE"))


small, large, options = json.loads(sys.argv[1])
fastvgg.plan(*small, backend="numba", **options).run()  # loads Numba
done, page_tables = threading.Event(), []
looking = threading.Thread(target=look)
looking.start()
try:
    plan = fastvgg.plan(*large, **options)
    Path("/proc/self/clear_refs").write_text("5")
    idle = mib("VmRSS")
    begun = time.perf_counter()
    plan.run()
    seconds = time.perf_counter() - begun
    peak = mib("VmHWM") - idle
finally:
    done.set()
    looking.join()
figures = {
    "peak_mib": peak,
    "planned_mib": plan.projected_bytes / 2**20,
    "page_tables_mib": max(page_tables),
    "idle_mib": idle,
    "seconds": seconds,
}
print(json.dumps({name: round(figure, 1) for name, figure in figures.items()}))
"""


class Part(NamedTuple):
    """A timed call and its preparation."""

    prepare: Callable[[], object]
    call: Callable[[], object]

    def seconds(self):
        """Return the time of an undisturbed call, or of the last of several disturbed calls."""
        for _ in range(MAX_TRIES):
            self.prepare()
            time.sleep(REST_SECONDS)
            stolen, started = stolen_seconds(), time.perf_counter()
            self.call()
            seconds = time.perf_counter() - started
            if stolen_seconds() - stolen <= MAX_STOLEN * seconds * os.cpu_count():
                break
        return seconds


def stolen_seconds():
    """Return the total steal time of all processors."""
    fields = Path("/proc/stat").read_text().split(maxsplit=9)
    return int(fields[8]) / os.sysconf("SC_CLK_TCK")


def time_interleaved(parts, rounds):
    """Return the seconds of every part in every round; the first of each is not counted."""
    seconds = [[] for _ in parts]
    for turn in range(rounds + 1):
        order = list(zip(parts, seconds, strict=True))
        for part, taken in order if turn % 2 else reversed(order):
            taken.append(part.seconds())
    return [taken[1:] for taken in seconds]


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
        """Create a file of images of known bytes, or a sparse file of zeros."""
        together = batch(SMALL_IMAGES, "NHWC", dtype)
        header = np.lib.format.header_data_from_array_1_0(together)
        header["shape"] = (images, HEIGHT, WIDTH, 3)
        with self.path(name).open("wb") as file:
            np.lib.format.write_array_header_1_0(file, header)
            if sparse:
                file.truncate(file.tell() + images * together[0].nbytes)
                return self.path(name)
            for first in range(0, images, SMALL_IMAGES):
                file.write(together[: images - first].data)
        return self.path(name)


def bytes_of_image(dtype):
    return HEIGHT * WIDTH * 3 * np.dtype(dtype).itemsize


def fetch(path, place, memory):
    """Make a file's bytes present only on disk, or also in the page cache.

    They are read again in any case: pages that came one by one, through a map, are written to at
    half the speed of those that came in large pieces.
    """
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(file)
    if place == "in memory":
        read_file(path, memory)


def write(file, data, offset):
    """Write all of the data in one call."""
    if os.pwrite(file, data, offset) != len(data):
        raise RuntimeError(f"less than {len(data)} bytes were written at {offset}")


def split_buffer(nbytes, buffer):
    """Return where each chunk begins, and as much of the buffer as it takes, in whole pages."""
    nbytes -= nbytes % mmap.PAGESIZE
    for offset in range(0, nbytes, len(buffer)):
        yield offset, buffer[: nbytes - offset]


@contextlib.contextmanager
def published(path, nbytes):
    """Open a new file of reserved space, which gets its name at the end, durably as by a run.

    It is written past the system's cache: in whole pages, from where pages begin.
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
    """Write a new file of one buffer, chunk by chunk."""
    with published(path, nbytes) as file:
        for offset, data in split_buffer(nbytes, buffer):
            write(file, data, offset)
            os.fsync(file)


def write_twice(path, scratch_path, nbytes, buffer):
    """Write one buffer over a file, each chunk to a ring in another file first."""
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


def chunk_of(plan):
    """Return a buffer of the bytes that a plan writes at a time, in whole pages."""
    nbytes = plan.chunk_images * plan.result.image_bytes
    memory = mmap.mmap(-1, nbytes - nbytes % mmap.PAGESIZE)
    memory.write(np.random.default_rng(1).bytes(len(memory)))
    return memoryview(memory)


def throughput(nbytes, seconds, **limits):
    """Return gigabytes a second of a file, and of what limits it."""
    figures = {"gigabytes_per_second": round(nbytes / seconds / 1e9, 2)}
    for name, (limit_bytes, taken) in limits.items():
        figures[f"{name}_gigabytes_per_second"] = round(
            limit_bytes / statistics.median(taken) / 1e9, 2
        )
    return figures


def measured_new(files, arguments):
    """Measure a new file, from a source in memory and from one on the disk."""
    images = arguments.bytes // bytes_of_image("float32")
    source = files.array("source.npy", images, "uint8")
    planned = functools.partial(
        fastvgg.plan, source, files.path("ours.npy"), mode="caffe", threads=arguments.threads
    )
    plan = planned()
    nbytes, buffer = plan.write_bytes, chunk_of(plan)
    memory = bytearray(READ_BYTES)

    def prepare(source_is):
        files.remove("ours.npy")
        files.remove("plain.npy")
        files.settle(nbytes * 3 // 2)
        fetch(source, source_is, memory)

    def time_against_writing(source_is, *others):
        before = functools.partial(prepare, source_is)
        calls = (
            lambda: planned().run(),
            lambda: write_new(files.path("plain.npy"), nbytes, buffer),
            *others,
        )
        return time_interleaved([Part(before, call) for call in calls], arguments.rounds)

    ours, written = time_against_writing("in memory")
    share, spread, seconds = compare(ours, written)
    figures = throughput(nbytes, seconds, writing=(nbytes, written))
    yield row("uint8 to float32, source in memory", WANTED, share, spread, **figures)

    ours, written, read = time_against_writing("on disk", lambda: read_file(source, memory))
    share, spread, seconds = compare(ours, [max(pair) for pair in zip(written, read, strict=True)])
    limits = {"writing": (nbytes, written), "reading": (source.stat().st_size, read)}
    figures = throughput(nbytes, seconds, **limits)
    yield row("uint8 to float32, source on disk", WANTED, share, spread, **figures)
    for left in ("source.npy", "ours.npy", "plain.npy"):
        files.remove(left)


def measured_in_place(files, arguments):
    """Measure work in place, there and back in turn, and the verification of what it left."""
    images = arguments.bytes // bytes_of_image("float32")
    ours_path = files.array("ours.npy", images, "float32")
    plain_path = files.array("plain.npy", images, "float32")
    planned = functools.partial(
        fastvgg.plan, ours_path, in_place=True, mode="caffe", threads=arguments.threads
    )
    plan = planned()
    nbytes, buffer = plan.write_bytes, chunk_of(plan)
    scratch_bytes, memory = SLOTS * len(buffer), bytearray(READ_BYTES)

    def prepare(path):
        files.remove("scratch")
        files.settle(nbytes)
        with files.path("scratch").open("wb") as scratch:
            os.posix_fallocate(scratch.fileno(), 0, scratch_bytes)
            os.fsync(scratch.fileno())
        fetch(path, "in memory", memory)

    directions = itertools.cycle(("preprocess", "restore"))
    ours, twice = time_interleaved(
        (
            Part(lambda: prepare(ours_path), lambda: planned(direction=next(directions)).run()),
            Part(
                lambda: prepare(plain_path),
                lambda: write_twice(plain_path, files.path("scratch"), nbytes, buffer),
            ),
        ),
        2 * arguments.rounds,
    )
    share, spread, seconds = compare(ours, twice)
    figures = throughput(nbytes, seconds, writing_twice=(nbytes, twice))
    yield row("float32 in place, there and back", WANTED, share, spread, **figures)
    files.remove("plain.npy")
    files.remove("scratch")
    yield from measured_verification(files, arguments, ours_path)
    files.remove("ours.npy")


def measured_verification(files, arguments, path):
    """Measure verifying a file that was changed in place: its checksums alone."""
    nbytes, memory = path.stat().st_size, bytearray(READ_BYTES)

    def prepare(file_is):
        files.settle(nbytes * 5 // 4)
        fetch(path, file_is, memory)

    for file_is in ("in memory", "on disk"):
        before = functools.partial(prepare, file_is)
        ours, read = time_interleaved(
            (
                Part(before, lambda: fastvgg.verify(path)),
                Part(before, lambda: read_file(path, memory)),
            ),
            arguments.rounds,
        )
        share, spread, seconds = compare(ours, read)
        figures = throughput(nbytes, seconds, reading=(nbytes, read))
        yield row(f"verify float32, {file_is}", None, share, spread, **figures)


def peak(name, small, large, **options):
    """Measure the memory of a run in a new process."""
    arguments = json.dumps((small, large, options), default=str)
    command = [sys.executable, "-c", CHILD_SCRIPT, arguments]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    if ran.returncode:
        raise RuntimeError(f"{name}: {ran.stderr}")
    line = {
        "path": name,
        "wanted_peak_mib": WANTED_PEAK_MIB,
        "wanted_page_tables_mib": WANTED_PAGE_TABLES_MIB,
        **json.loads(ran.stdout),
    }
    print(f"{name:36s} {line['peak_mib']:6.1f} MiB at most", line, flush=True)
    return line


def measured_memory(files, arguments):
    """Measure the memory of a dataset four times as large as the others, and of work in place."""
    images = 4 * arguments.bytes // bytes_of_image("float32")
    options = {"mode": "caffe", "memory": MEMORY, "threads": arguments.threads}
    for name, dtype, result, direction in (
        ("restore float32 to uint8", "float32", "uint8", "restore"),
        ("uint8 to float32", "uint8", "float32", "preprocess"),
    ):
        if shutil.disk_usage(files.directory).free < 1.1 * images * bytes_of_image(result):
            print(f"{name}: not enough disk space")
            continue
        sources = [
            files.array("small.npy", SMALL_IMAGES, dtype, sparse=True),
            files.array("large.npy", images, dtype, sparse=True),
        ]
        targets = [files.path("small_result.npy"), files.path("large_result.npy")]
        small, large = zip(sources, targets, strict=True)
        yield peak(name, small, large, direction=direction, **options)
        files.remove("small")
        files.remove("large")
    sources = [
        files.array("small.npy", SMALL_IMAGES, "float32"),
        files.array("large.npy", images // 4, "float32"),
    ]
    yield peak("float32 in place", *([path] for path in sources), in_place=True, **options)
    files.remove("small")
    files.remove("large")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--threads", type=int, default=available_cpus())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--directory", type=Path, default=Path(), help="on the disk to measure")
    arguments = parser.parse_args()
    arguments.bytes = QUICK_BYTES if arguments.quick else FILE_BYTES
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # files are removed
    with tempfile.TemporaryDirectory(prefix="streams-", dir=arguments.directory) as directory:
        files = Files(Path(directory).absolute(), arguments.threads)
        rows = [
            line
            for measurement in (measured_new, measured_in_place)
            for line in measurement(files, arguments)
        ]
        memory = list(measured_memory(files, arguments))
    missed = [line["path"] for line in rows if line["wanted"] and line["share"] < line["wanted"]]
    print("below what is wanted:", ", ".join(missed) or "none")
    missed = [
        line["path"]
        for line in memory
        if line["peak_mib"] > line["wanted_peak_mib"]
        or line["page_tables_mib"] > line["wanted_page_tables_mib"]
    ]
    print("more memory than is wanted:", ", ".join(missed) or "none")
    if not arguments.quick:
        RESULT.parent.mkdir(exist_ok=True)
        record = {"machine": machine(), "threads": arguments.threads, "rounds": arguments.rounds}
        RESULT.write_text(json.dumps(record | {"rows": rows, "memory": memory}, indent=1) + "\n")


if __name__ == "__main__":
    main()
