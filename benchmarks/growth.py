"""How seconds and memory grow with the number of images, their size, threads and chunks.

    python benchmarks/growth.py            # a quarter of an hour, 17 GB of disk; writes a result
    python benchmarks/growth.py --quick    # 32 MiB at most, less than a minute; writes nothing

Each run plans uint8 `.npy` to float32 `.npy` on the disk, and carries the plan out, in a process of
its own. There a run of a few small images was made before: imports and compilation are not in the
time, nor in the memory, which is the most that is resident above what was resident before. Of all
rounds the one that took most counts.

Beside each is its limit: writing as many bytes of one buffer with the same calls, in chunks of the
same size. How path and limit take turns benchmarks/streams.py tells; the runs of a sweep take turns
with each other as well, and the source is in memory before each.

**Images** of one small size, a thousand to a million. A line is laid through their seconds as
benchmarks/cluster.py does. A chunk grows with the dataset, up to 256 MiB, and so does the memory.

**Image size**, of as many bytes in all. **Threads**, up to twice the cores: to the disk, and on a
batch in memory that was used before, where the limit is that of `fastvgg bench`.

**Chunks**, as the memory limit makes them. A plan takes no more than it has use for: the largest
limits leave its chunks as they are.
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
from cluster import line_through
from streams import READ_BYTES, Files, Part, chunk_of, fetch, write_new

import fastvgg
from fastvgg.bench import FULL, memory
from fastvgg.bench.kernels import HEIGHT, WIDTH
from fastvgg.bench.timing import compare, machine, time_interleaved
from fastvgg.parallel import available_cpus

RESULT = Path(__file__).parent / "results" / "growth.json"
MEMORY_ROUNDS = 11
SMALL_SIDE, SIDE = 32, 224
WARMING_IMAGES = 2
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


warming, measured, options = json.loads(sys.argv[1])
fastvgg.plan(*warming, **options).run()
Path("/proc/self/clear_refs").write_text("5")
idle = mib("VmRSS")
begun = time.perf_counter()
fastvgg.plan(*measured, **options).run()
seconds = time.perf_counter() - begun
print(json.dumps({"seconds": seconds, "idle_mib": idle, "peak_mib": mib("VmHWM") - idle}))
"""


class SweepSizes(NamedTuple):
    """The sizes of each sweep."""

    images: tuple[int, ...]
    """Of the small ones."""
    result_bytes: int
    """Of every other sweep."""
    sides: tuple[int, ...]
    threads: tuple[int, ...]
    limits_mib: tuple[int, ...]
    working_set_bytes: int
    """In memory."""


def sweep_sizes(cores):
    """Return the full lengths; threads are powers of two up to the cores, and twice the cores."""
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


def images_of(side, result_bytes):
    """Return how many images of a side there are in so many bytes of float32."""
    return max(1, result_bytes // (side * side * 12))


def source_of(files, images, side):
    """Return a file of images of known bytes, creating it if necessary."""
    path = files.path(f"images-{images}-{side}.npy")
    if path.exists():
        return path
    together = min(images, max(1, WRITE_BYTES // (side * side * 3)))
    shape = (together, side, side, 3)
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    header = np.lib.format.header_data_from_array_1_0(pixels)
    header["shape"] = (images, *shape[1:])
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for first in range(0, images, together):
            file.write(pixels[: images - first].data)
    return path


class Run:
    """A plan that runs in a separate process, and its write limit."""

    def __init__(self, files, images, side, **options: Any):
        self.options = {"mode": "caffe", **options}
        self.side = side
        self._files = files
        self._warming = source_of(files, WARMING_IMAGES, SMALL_SIDE)
        self._source = source_of(files, images, side)
        self._target = files.path("ours.npy")
        self._found = []
        self.plan = fastvgg.plan(self._source, self._target, **self.options)

    def prepare(self):
        for name in ("ours", "plain"):
            self._files.remove(name)
        self._files.settle(self.plan.write_bytes * 3 // 2)
        fetch(self._source, "in memory", bytearray(READ_BYTES))

    def call(self):
        pairs = (self._warming, self._files.path("ours-warming.npy")), (self._source, self._target)
        arguments = json.dumps((*pairs, self.options), default=str)
        command = [sys.executable, "-c", CHILD_SCRIPT, arguments]
        ran = subprocess.run(command, capture_output=True, text=True, check=False)
        if ran.returncode:
            raise RuntimeError(f"{self._source}: {ran.stderr}")
        self._found.append(json.loads(ran.stdout))

    def seconds(self):
        """Return the time of the plan in an undisturbed call, without process startup."""
        Part(self.prepare, self.call).seconds()
        return self._found[-1]["seconds"]

    def limit(self):
        """Return the limit: only writing the same number of bytes."""
        nbytes, buffer = self.plan.write_bytes, chunk_of(self.plan)
        path = self._files.path("plain.npy")
        return Part(self.prepare, functools.partial(write_new, path, nbytes, buffer))

    def line(self, ours, limit):
        """Return a line of the result, of the seconds of all rounds, printed as well."""
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
            "idle_mib": round(max(one["idle_mib"] for one in self._found), 1),
            "peak_mib": round(max(one["peak_mib"] for one in self._found), 1),
            "planned_mib": round(plan.projected_bytes / 2**20, 1),
        }
        print(line, flush=True)
        return line


def measured(runs, rounds):
    """Return a line of every run of a sweep."""
    parts = [part for run in runs for part in (run, run.limit())]
    taken = iter(streams.time_interleaved(parts, rounds))
    return [run.line(ours, limit) for run, ours, limit in zip(runs, taken, taken, strict=True)]


def add_deviations_from_linear_fit(rows):
    """Add the deviation of each row from the linear fit, and return the fit."""
    start, slope = line_through([row["images"] for row in rows], [row["seconds"] for row in rows])
    for row in rows:
        row["deviation"] = round(row["seconds"] / (start + slope * row["images"]) - 1, 3)
    return {"start_ms": round(start * 1e3, 1), "microseconds_an_image": round(slope * 1e6, 2)}


def measured_in_memory(sweep_sizes, rounds):
    """Return a line for each number of threads on a batch in memory that was used before."""
    x = batch(max(1, sweep_sizes.working_set_bytes // (HEIGHT * WIDTH * 15)), "NHWC", "uint8")
    out = fastvgg.preprocess(x, "caffe")

    def calls(threads):
        yield functools.partial(fastvgg.preprocess, x, "caffe", out=out, threads=threads)
        for prefetch in (False, True):
            yield functools.partial(memory.copy, x, out, threads, prefetch=prefetch)

    taken = iter(
        time_interleaved([c for threads in sweep_sizes.threads for c in calls(threads)], rounds)
    )
    for threads, ours, *limits in zip(sweep_sizes.threads, taken, taken, taken, strict=True):
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


def runs_of(files, sweep_sizes, threads):
    """Return the name of each sweep, and an iterator over its runs, which makes their sources."""
    sizes = {side: images_of(side, sweep_sizes.result_bytes) for side in (*sweep_sizes.sides, SIDE)}
    run = functools.partial(Run, files)
    usual = functools.partial(run, sizes[SIDE], SIDE)
    return {
        "images": (run(images, SMALL_SIDE, threads=threads) for images in sweep_sizes.images),
        "side": (run(sizes[side], side, threads=threads) for side in sweep_sizes.sides),
        "threads": (usual(threads=count) for count in sweep_sizes.threads),
        "chunk": (usual(threads=threads, memory=f"{mib}MiB") for mib in sweep_sizes.limits_mib),
    }


def measured_sweeps(files, sweep_sizes, threads, rounds):
    """Measure all sweeps one after another; each removes its files."""
    sweeps = {}
    for name, runs in runs_of(files, sweep_sizes, threads).items():
        sweeps[name] = measured(list(runs), rounds)
        files.remove("")  # everything
    return sweeps


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--threads", type=int, default=available_cpus())
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--directory", type=Path, default=Path(), help="on the disk to measure")
    arguments = parser.parse_args()
    rounds = arguments.rounds or (2 if arguments.quick else 3)
    chosen_sizes = (quick_sweep_sizes if arguments.quick else sweep_sizes)(available_cpus())
    if arguments.quick:
        streams.REST_SECONDS = 0  # half of a minute in all
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # files are removed
    with tempfile.TemporaryDirectory(prefix="growth-", dir=arguments.directory) as directory:
        files = Files(Path(directory).absolute(), arguments.threads)
        sweeps = measured_sweeps(files, chosen_sizes, arguments.threads, rounds)
    found = {
        "sweeps": sweeps,
        "line": add_deviations_from_linear_fit(sweeps["images"]),
        "in_memory": list(measured_in_memory(chosen_sizes, MEMORY_ROUNDS)),
    }
    rows = list(itertools.chain.from_iterable(sweeps.values()))
    missed = [row for row in rows if row["peak_mib"] > row["planned_mib"]]
    print(f"more memory than was planned: {len(missed)} of {len(rows)}", *missed)
    if not arguments.quick:
        record = {"machine": machine(), "threads": arguments.threads, "rounds": rounds}
        RESULT.write_text(json.dumps(record | found, indent=1) + "\n")


if __name__ == "__main__":
    main()
