"""Measure how time and memory grow with the number and size of images, threads and chunk size.

    python benchmarks/growth.py            # takes 15 minutes, 17 GB of disk; writes a result
    python benchmarks/growth.py --quick    # up to 32 MiB, less than a minute; writes nothing

Each run plans and converts uint8 `.npy` to float32 `.npy` on disk, in a separate process. A run of
a few small images precedes it, so that neither time nor memory include imports and compilation.
Memory is the peak resident memory above that before the run, the maximum over all rounds.

The limit of each run is writing the same number of bytes of one buffer with the same calls, in
chunks of the same size. Path and limit are interleaved as in benchmarks/streams.py, and so are the
runs of a sweep. The source is in the page cache before each.

**Images** of one small size, a thousand to a million, with a linear fit of the seconds as in
benchmarks/cluster.py. Chunks grow with the dataset, up to 256 MiB, and the memory with them.

**Image size**, at a constant total size. **Threads**, up to twice the cores: to disk, and on a
batch in memory with a reused result, where the limit is that of `fastvgg bench`.

**Chunk size**, set by the memory limit. A plan uses only as much memory as it can benefit from, so
the largest limits do not change its chunks.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import signal
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import streams
from arrays import batch
from cluster import fit_line
from rows import number_of_rounds
from streams import READ_BYTES, Files, TimedCall, chunk_buffer, fetch, write_new

import fastvgg
from fastvgg.bench import FULL, memory
from fastvgg.bench.kernels import HEIGHT, WIDTH
from fastvgg.bench.timing import compare, machine, time_interleaved
from fastvgg.parallel import available_cpus

RESULT = Path(__file__).parent / "results" / "growth.json"
MEMORY_ROUNDS = 11
SMALL_SIDE, SIDE = 32, 224
WARMUP_IMAGES = 2
WRITE_BYTES = 8 * 2**20

CHILD_SCRIPT = """
import json
import sys
import time
from pathlib import Path
import fastvgg


def mib(field):
    text = Path("/proc/self/status").read_text()
    return int(text.partition(field + ":")[2].split()[0]) / 1024


warmup, measured, options = json.loads(sys.argv[1])
fastvgg.plan(*warmup, **options).run()
Path("/proc/self/clear_refs").write_text("5")
idle = mib("VmRSS")
start_seconds = time.perf_counter()
fastvgg.plan(*measured, **options).run()
seconds = time.perf_counter() - start_seconds
print(json.dumps({"seconds": seconds, "idle_mib": idle, "peak_mib": mib("VmHWM") - idle}))
"""


class SweepSizes(NamedTuple):
    """The sizes of each sweep."""

    images: tuple[int, ...]
    """Numbers of small images."""
    result_bytes: int
    """Size of the result in every other sweep."""
    sides: tuple[int, ...]
    threads: tuple[int, ...]
    limits_mib: tuple[int, ...]
    working_set_bytes: int
    """Of the sweep in memory."""


def sweep_sizes(cores):
    """Return the full sizes; threads are powers of two up to the cores, and twice the cores."""
    powers = {2**power for power in range(cores.bit_length())}
    return SweepSizes(
        images=(10**3, 10**4, 10**5, 10**6),
        result_bytes=2 * 2**30,
        sides=(16, 64, 256, 1024, 2048),
        threads=tuple(sorted(powers | {cores, 2 * cores})),
        limits_mib=(8, 16, 32, 64, 1024),
        working_set_bytes=FULL.working_set_bytes,
    )


def quick_sweep_sizes(cores):
    return SweepSizes(
        images=(10**2, 10**3),
        result_bytes=32 * 2**20,
        sides=(16, 1024),
        threads=(1, 2 * cores),
        limits_mib=(8, 64),
        working_set_bytes=64 * 2**20,
    )


def image_count(side, result_bytes):
    """Return how many float32 images with this side fit in `result_bytes`."""
    return max(1, result_bytes // (side * side * 12))


def create_source(files, images, side):
    """Return a file of deterministic images, creating it if necessary."""
    path = files.path(f"images-{images}-{side}.npy")
    if path.exists():
        return path
    block_images = min(images, max(1, WRITE_BYTES // (side * side * 3)))
    shape = (block_images, side, side, 3)
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    header = np.lib.format.header_data_from_array_1_0(pixels)
    header["shape"] = (images, *shape[1:])
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for first in range(0, images, block_images):
            file.write(pixels[: images - first].data)
    return path


class Run:
    """A plan that runs in a separate process, and its write limit."""

    def __init__(self, files, images, side, **options: Any):
        self.options = {"mode": "caffe", **options}
        self.side = side
        self._files = files
        self._warmup_source = create_source(files, WARMUP_IMAGES, SMALL_SIDE)
        self._source = create_source(files, images, side)
        self._target = files.path("ours.npy")
        self._figures = []
        self.plan = fastvgg.plan(self._source, self._target, **self.options)

    def prepare(self):
        for name in ("ours", "plain"):
            self._files.remove(name)
        self._files.settle(self.plan.write_bytes * 3 // 2)
        fetch(self._source, "in memory", bytearray(READ_BYTES))

    def call(self):
        pairs = (
            (self._warmup_source, self._files.path("ours-warmup.npy")),
            (self._source, self._target),
        )
        arguments = json.dumps((*pairs, self.options), default=str)
        command = [sys.executable, "-c", CHILD_SCRIPT, arguments]
        process = subprocess.run(command, capture_output=True, text=True, check=False)
        if process.returncode:
            raise RuntimeError(f"{self._source}: {process.stderr}")
        self._figures.append(json.loads(process.stdout))

    def seconds(self):
        """Return the time of the plan in an undisturbed call, without process startup."""
        TimedCall(self.prepare, self.call).seconds()
        return self._figures[-1]["seconds"]

    def limit(self):
        """Return the limit: only writing the same number of bytes."""
        nbytes, buffer = self.plan.write_bytes, chunk_buffer(self.plan)
        path = self._files.path("plain.npy")
        return TimedCall(self.prepare, functools.partial(write_new, path, nbytes, buffer))

    def line(self, ours, limit):
        """Print and return a row of the result, from the seconds of all rounds."""
        share, spread, seconds = compare(ours, limit)
        low, _, high = statistics.quantiles(ours, n=4)
        plan = self.plan
        line = {
            "images": plan.header.images,
            "side": self.side,
            "threads": plan.threads,
            "memory_limit_mib": plan.memory_bytes / 2**20,
            "chunk_images": plan.chunk_images,
            "chunk_mib": round(plan.chunk_images * plan.result.image_bytes / 2**20, 2),
            "written_bytes": plan.write_bytes,
            "seconds": round(seconds, 4),
            "middle_half": [round(low, 4), round(high, 4)],
            "limit_seconds": round(statistics.median(limit), 4),
            "share": share,
            "spread": spread,
            "idle_mib": round(max(one["idle_mib"] for one in self._figures), 1),
            "peak_mib": round(max(one["peak_mib"] for one in self._figures), 1),
            "planned_mib": round(plan.projected_bytes / 2**20, 1),
        }
        print(line, flush=True)
        return line


def measure_runs(runs, rounds):
    """Return a row for every run of a sweep."""
    timed_calls = [timed_call for run in runs for timed_call in (run, run.limit())]
    seconds = iter(streams.time_interleaved(timed_calls, rounds))
    return [run.line(ours, limit) for run, ours, limit in zip(runs, seconds, seconds, strict=True)]


def add_deviations_from_linear_fit(rows):
    """Add the deviation of each row from the linear fit, and return the fit."""
    start, slope = fit_line([row["images"] for row in rows], [row["seconds"] for row in rows])
    for row in rows:
        row["deviation"] = round(row["seconds"] / (start + slope * row["images"]) - 1, 3)
    return {"start_ms": round(start * 1e3, 1), "microseconds_an_image": round(slope * 1e6, 2)}


def measure_in_memory(sweep_sizes, rounds):
    """Yield a row for each number of threads, for a batch in memory with a reused result."""
    x = batch(max(1, sweep_sizes.working_set_bytes // (HEIGHT * WIDTH * 15)), "NHWC", "uint8")
    out = fastvgg.preprocess(x, "caffe")

    def calls(threads):
        yield functools.partial(fastvgg.preprocess, x, "caffe", out=out, threads=threads)
        for prefetch in (False, True):
            yield functools.partial(memory.copy, x, out, threads, prefetch=prefetch)

    durations = iter(
        time_interleaved(
            [call for threads in sweep_sizes.threads for call in calls(threads)], rounds
        )
    )
    for threads, ours, *limits in zip(sweep_sizes.threads, *[durations] * 3, strict=True):
        limit = min(limits, key=statistics.median)
        share, spread, seconds = compare(ours, limit)
        low, _, high = statistics.quantiles(ours, n=4)
        line = {
            "threads": threads,
            "written_bytes": out.nbytes,
            "seconds": round(seconds, 5),
            "middle_half": [round(low, 5), round(high, 5)],
            "limit_seconds": round(statistics.median(limit), 5),
            "share": share,
            "spread": spread,
        }
        print("in memory:", line, flush=True)
        yield line


def create_runs(files, sweep_sizes, threads):
    """Return an iterator over the runs of each sweep, by name; it creates their sources."""
    sizes = {
        side: image_count(side, sweep_sizes.result_bytes) for side in (*sweep_sizes.sides, SIDE)
    }
    run = functools.partial(Run, files)
    create_standard_run = functools.partial(run, sizes[SIDE], SIDE)
    return {
        "images": (run(images, SMALL_SIDE, threads=threads) for images in sweep_sizes.images),
        "side": (run(sizes[side], side, threads=threads) for side in sweep_sizes.sides),
        "threads": (create_standard_run(threads=count) for count in sweep_sizes.threads),
        "chunk": (
            create_standard_run(threads=threads, memory=f"{mib}MiB")
            for mib in sweep_sizes.limits_mib
        ),
    }


def measure_sweeps(files, sweep_sizes, threads, rounds):
    """Measure all sweeps one after another; each removes its files."""
    sweeps = {}
    for name, runs in create_runs(files, sweep_sizes, threads).items():
        sweeps[name] = measure_runs(list(runs), rounds)
        files.remove("")  # everything
    return sweeps


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--threads", type=int, default=available_cpus())
    parser.add_argument("--rounds", type=number_of_rounds)
    parser.add_argument(
        "--directory", type=Path, default=Path(), help="directory on the disk to measure"
    )
    arguments = parser.parse_args()
    rounds = arguments.rounds or (2 if arguments.quick else 3)
    sizes = (quick_sweep_sizes if arguments.quick else sweep_sizes)(available_cpus())
    if arguments.quick:
        streams.REST_SECONDS = 0  # saves half a minute
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # removes the files
    with tempfile.TemporaryDirectory(prefix="growth-", dir=arguments.directory) as directory:
        files = Files(Path(directory).absolute(), arguments.threads)
        sweeps = measure_sweeps(files, sizes, arguments.threads, rounds)
    results = {
        "sweeps": sweeps,
        "line": add_deviations_from_linear_fit(sweeps["images"]),
        "in_memory": list(measure_in_memory(sizes, MEMORY_ROUNDS)),
    }
    rows = list(itertools.chain.from_iterable(sweeps.values()))
    missed = [row for row in rows if row["peak_mib"] > row["planned_mib"]]
    print(f"above the planned memory: {len(missed)} of {len(rows)}", *missed)
    if not arguments.quick:
        record = {"machine": machine(), "threads": arguments.threads, "rounds": rounds}
        RESULT.write_text(json.dumps(record | results, indent=1) + "\n")


if __name__ == "__main__":
    main()
