"""Compare fastvgg with its peers: same arrays, threads and process, as ratios within one run.

    python benchmarks/compare_peers.py            # 20 minutes, 11 GiB of memory; writes peers.json
    python benchmarks/compare_peers.py --quick    # a small batch, three rounds; writes nothing

    python -m pip install '.[bench]'              # the peers

On Linux, `torch` from PyPI installs several GB of CUDA packages; a CPU build that is installed
first satisfies the extra, and torchvision then also needs a CPU build. Two peers are not in the
extra: Keras on TensorFlow, which needs `tensorflow-cpu`, and DALI (Linux only), which requires CUDA
libraries that its CPU operators never load. To install it without them:

    python -m pip install --no-deps nvidia-dali-cuda120
    python -m pip install astunparse gast libcst makefun nvtx optree packaging six

torch.compile needs a C++ compiler. Peers that cannot be imported are listed with the reason.

Four tasks: uint8 to float32 in caffe mode (flip the channels, subtract the means), the same in
torch mode (divide by 255, subtract, divide), caffe mode back to uint8 (add the means, flip, round,
saturate), and the latter for float32 that was stored as float16, which truncation does not restore.
NHWC for input and result, unless a name says NCHW.

The implementations are in peers/. Keras has one backend per process, so its tensors are
measured in another process per backend, on arrays from the same seed; the ratio is to fastvgg in
that process.

Each peer is called in up to two styles: on the whole batch with its own threads, and image by image
on a pool of the same number of threads, its own threads set to one. The faster style counts, also
for fastvgg. Results in new and in reused memory are measured separately and compared with fastvgg's
of the same kind. Times in new memory include allocation, page faults and release, and thus depend
on whether a library requests huge pages, as NumPy does for large arrays. Image by image, the result
is also one batch: if a library returns each image in new memory, it is copied into its row while in
the cache. Notes below the table state the restrictions of each API.

Every round calls all peers once, in a new random order; times exclude imports, compilation and
one warm-up call. Useful bytes are those of the input and the result, each counted once. `differing`
counts the elements whose bits are not those of Keras' NumPy path or, when restoring, of the
original image.

With fewer threads than cores, the process is restricted to that number of cores, because XLA has no
setting for the size of its thread pool.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from peers import KERAS_BACKENDS, PEERS, import_peers
from peers.configurations import configurations
from peers.task import ENVIRONMENT, difference, tasks
from rich.console import Console
from rich.table import Table

from fastvgg.bench.timing import machine
from fastvgg.parallel import available_cpus

RESULT = Path(__file__).parent / "results" / "peers.json"
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
IMAGES = 1536  # 1.08 GiB of input and result in total, larger than any cache
QUICK_IMAGES = 64
ROUNDS = 7
QUICK_ROUNDS = 3
TABLE_WIDTH = 150
SETTLE_SECONDS = 0.02  # OpenMP threads busy-wait for some milliseconds after work


def time_call(configuration):
    configuration.prepare()
    start_seconds = time.perf_counter()
    configuration.call()  # including the release of the result
    return time.perf_counter() - start_seconds


def measure(task, peers, rounds):
    """Return a row for each configuration of each peer."""
    all_configurations = []
    for peer in peers:
        implementation = peer.implementation_for(task)
        if implementation is not None:
            all_configurations += configurations(peer.name, implementation, task)
    differences = []
    for configuration in all_configurations:
        configuration.prepare()
        task.out.fill(0)
        differences.append(difference(configuration.call(), task.expected))
    durations = [[] for _ in all_configurations]
    random = np.random.default_rng(0)
    for _ in range(rounds):
        for index in random.permutation(len(all_configurations)):
            time.sleep(SETTLE_SECONDS)
            durations[index].append(time_call(all_configurations[index]))
    measurements = zip(all_configurations, durations, differences, strict=True)
    return add_ratios([result_row(task, *figures) for figures in measurements])


def result_row(task, configuration, durations, differing_and_largest):
    median = statistics.median(durations)
    differing, largest = differing_and_largest
    return {
        "task": task.name,
        "contender": configuration.peer,
        "memory": configuration.memory,
        "style": configuration.style,
        "median_ms": round(median * 1e3, 2),
        "least_ms": round(min(durations) * 1e3, 2),
        "most_ms": round(max(durations) * 1e3, 2),
        "images_per_second": round(len(task.x) / median),
        "useful_gb_per_second": round(task.useful_bytes / median / 1e9, 2),
        "differing": differing,
        "largest_difference": largest,
    }


def add_ratios(rows):
    """Mark the faster style of each peer and memory, and add the ratio to fastvgg."""
    best = {}
    for row in rows:
        key = row["contender"], row["memory"]
        best[key] = min(best.get(key, row), row, key=lambda each: each["median_ms"])
    for row in rows:
        row["best"] = row is best[row["contender"], row["memory"]]
        fastvgg_row = best["fastvgg", row["memory"]]
        row["ratio"] = round(row["median_ms"] / fastvgg_row["median_ms"], 2)
    return rows


def table(title, rows):
    result = Table(title=title)
    for heading in ("peer", "memory", "style"):
        result.add_column(heading, no_wrap=True)
    for heading in ("images/s", "GB/s", "ms (min - max)", "ratio", "differing", "by up to"):
        result.add_column(heading, justify="right", no_wrap=True)
    order = sorted(rows, key=lambda row: (row["memory"], row["median_ms"]))
    for previous, row in zip([None, *order], order, strict=False):
        if previous is not None and previous["memory"] != row["memory"]:
            result.add_section()
        result.add_row(
            row["contender"],
            row["memory"],
            row["style"],
            f"{row['images_per_second']:,}",
            f"{row['useful_gb_per_second']:.1f}",
            f"{row['median_ms']:.1f} ({row['least_ms']:.1f} - {row['most_ms']:.1f})",
            f"{row['ratio']:.2f}",
            f"{row['differing']:,}",
            f"{row['largest_difference']:.2g}",
        )
    return result


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--images", type=int)
    parser.add_argument("--rounds", type=int)
    parser.add_argument(
        "--keras-backend",
        choices=list(KERAS_BACKENDS.values()),
        help="measure Keras' tensors and fastvgg, and print the rows as JSON",
    )
    arguments = parser.parse_args()
    arguments.images = arguments.images or (QUICK_IMAGES if arguments.quick else IMAGES)
    arguments.rounds = arguments.rounds or (QUICK_ROUNDS if arguments.quick else ROUNDS)
    cores = available_cpus()
    if not 1 <= arguments.threads <= cores:
        parser.error(f"--threads is {arguments.threads}, but this process may use {cores} cores")
    return arguments


def restrict_cores(threads):
    """Restrict the process to `threads` cores, before any library counts them."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])


def measure_all(arguments, backend):
    """Measure the peers of this process on all tasks."""
    restrict_cores(arguments.threads)
    os.environ.update(ENVIRONMENT | {"KERAS_BACKEND": backend})
    peers, versions, missing = import_peers(backend)
    rows = []
    if len(peers) > 1:
        for task in tasks(arguments.images, arguments.threads):
            rows += measure(task, peers, arguments.rounds)
    return {"rows": rows, "peers": versions, "not_measured": missing}


def measure_tensors(arguments, backend):
    """Measure Keras on another backend in a separate process; return its rows without fastvgg's."""
    command = [sys.executable, __file__, "--keras-backend", backend]
    for name in ("threads", "images", "rounds"):
        command += [f"--{name}", str(getattr(arguments, name))]
    process = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    results = json.loads(process.stdout.splitlines()[-1])
    results["rows"] = [row for row in results["rows"] if row["contender"] != "fastvgg"]
    return results


def print_record(console, arguments, record):
    """Print a table for each task, the notes, and the peers that were not measured."""
    best = [row for row in record["rows"] if row["best"]]
    for name in dict.fromkeys(row["task"] for row in best):
        title = f"{name}: {arguments.images} images, {arguments.threads} threads"
        console.print(table(title, [row for row in best if row["task"] == name]))
    console.print("The ratio is a peer's time over fastvgg's in the same kind of memory.")
    for name, note in record["notes"].items():
        console.print(f"{name}: {note}", highlight=False)
    for name, reason in record["not_measured"].items():
        console.print(f"{name}: not measured, cannot be imported: {reason}", highlight=False)


def main():
    arguments = parse_arguments()
    if arguments.keras_backend:
        print(json.dumps(measure_all(arguments, arguments.keras_backend)))
        return
    machine_record = machine()
    results = measure_all(arguments, "numpy")
    for backend in KERAS_BACKENDS.values():
        tensors = measure_tensors(arguments, backend)
        results["rows"] += tensors["rows"]
        results["peers"] |= tensors["peers"]
        results["not_measured"] |= tensors["not_measured"]
    record = {
        "machine": machine_record,
        "transparent_huge_pages": HUGE_PAGES.read_text().strip() if HUGE_PAGES.exists() else "",
        "peers": results["peers"],
        "threads": arguments.threads,
        "images": arguments.images,
        "rounds": arguments.rounds,
        "not_measured": results["not_measured"],
        "notes": {
            peer.name: peer.note
            for peer in PEERS
            if peer.note and peer.name not in results["not_measured"]
        },
        "rows": results["rows"],
    }
    print_record(Console(width=max(TABLE_WIDTH, Console().width)), arguments, record)
    if not arguments.quick:
        RESULT.parent.mkdir(exist_ok=True)
        RESULT.write_text(json.dumps(record, indent=0) + "\n")


if __name__ == "__main__":
    main()
