"""Compare fastvgg with its peers: same arrays, threads and process, as ratios within one run.

    python benchmarks/peers.py            # 20 minutes, 11 GiB of memory; writes peers.json
    python benchmarks/peers.py --quick    # a small batch, three rounds; writes nothing

    python -m pip install '.[bench]'      # the peers

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

The implementations are in contenders/. Keras has one backend per process, so its tensors are
measured in another process per backend, on arrays from the same seed; the ratio is to fastvgg in
that process.

Each peer is called in up to two styles: on the whole batch with its own threads, and image by image
on a pool of the same number of threads, its own threads set to one. The faster style counts, also
for fastvgg. Results in new and in reused memory are measured separately and compared with fastvgg's
of the same kind. Times in new memory include allocation, page faults and release, and thus depend
on whether a library requests huge pages, as NumPy does for large arrays. Image by image, the result
is also one batch: if a library returns each image in new memory, it is copied into its row while in
the cache. Notes below the table state the restrictions of each API.

Every round calls all contenders once, in a new random order; times exclude imports, compilation and
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
from contenders import CONTENDERS, KERAS_TENSORS, importable
from contenders.configurations import configurations
from contenders.task import ENVIRONMENT, difference, tasks
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


def seconds(configuration):
    configuration.prepare()
    start_seconds = time.perf_counter()
    configuration.call()  # including the release of the result
    return time.perf_counter() - start_seconds


def measure(task, contenders, rounds):
    """Return a row for each configuration of each contender."""
    all_configurations = []
    for contender in contenders:
        peer = contender.peer_for(task)
        if peer is not None:
            all_configurations += configurations(contender.name, peer, task)
    differences = []
    for configuration in all_configurations:
        configuration.prepare()
        task.out.fill(0)
        differences.append(difference(configuration.call(), task.expected))
    durations = [[] for _ in all_configurations]
    order = np.random.default_rng(0)
    for _ in range(rounds):
        for index in order.permutation(len(all_configurations)):
            time.sleep(SETTLE_SECONDS)
            durations[index].append(seconds(all_configurations[index]))
    measured = zip(all_configurations, durations, differences, strict=True)
    return with_ratios([row(task, *figures) for figures in measured])


def row(task, configuration, durations, differing_and_largest):
    median = statistics.median(durations)
    differing, largest = differing_and_largest
    return {
        "task": task.name,
        "contender": configuration.contender,
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


def with_ratios(rows):
    """Mark the faster style of each contender and memory, and add the ratio to fastvgg."""
    best = {}
    for one in rows:
        key = one["contender"], one["memory"]
        best[key] = min(best.get(key, one), one, key=lambda each: each["median_ms"])
    for one in rows:
        one["best"] = one is best[one["contender"], one["memory"]]
        own = best["fastvgg", one["memory"]]
        one["ratio"] = round(one["median_ms"] / own["median_ms"], 2)
    return rows


def table(title, rows):
    result = Table(title=title)
    for heading in ("contender", "memory", "style"):
        result.add_column(heading, no_wrap=True)
    for heading in ("images/s", "GB/s", "ms (min - max)", "ratio", "differing", "by up to"):
        result.add_column(heading, justify="right", no_wrap=True)
    order = sorted(rows, key=lambda one: (one["memory"], one["median_ms"]))
    for last, one in zip([None, *order], order, strict=False):
        if last is not None and last["memory"] != one["memory"]:
            result.add_section()
        result.add_row(
            one["contender"],
            one["memory"],
            one["style"],
            f"{one['images_per_second']:,}",
            f"{one['useful_gb_per_second']:.1f}",
            f"{one['median_ms']:.1f} ({one['least_ms']:.1f} - {one['most_ms']:.1f})",
            f"{one['ratio']:.2f}",
            f"{one['differing']:,}",
            f"{one['largest_difference']:.2g}",
        )
    return result


def options():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--images", type=int)
    parser.add_argument("--rounds", type=int)
    parser.add_argument(
        "--keras-backend",
        choices=list(KERAS_TENSORS.values()),
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


def measured(arguments, backend):
    """Measure the contenders of this process on all tasks."""
    restrict_cores(arguments.threads)
    os.environ.update(ENVIRONMENT | {"KERAS_BACKEND": backend})
    contenders, versions, missing = importable(backend)
    rows = []
    if len(contenders) > 1:
        for task in tasks(arguments.images, arguments.threads):
            rows += measure(task, contenders, arguments.rounds)
    return {"rows": rows, "peers": versions, "not_measured": missing}


def measured_tensors(arguments, backend):
    """Measure Keras on another backend in a separate process; return its rows without fastvgg's."""
    command = [sys.executable, __file__, "--keras-backend", backend]
    for name in ("threads", "images", "rounds"):
        command += [f"--{name}", str(getattr(arguments, name))]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    results = json.loads(done.stdout.splitlines()[-1])
    results["rows"] = [one for one in results["rows"] if one["contender"] != "fastvgg"]
    return results


def print_record(console, arguments, record):
    """Print a table for each task, the notes, and the peers that were not measured."""
    best = [one for one in record["rows"] if one["best"]]
    for name in dict.fromkeys(one["task"] for one in best):
        title = f"{name}: {arguments.images} images, {arguments.threads} threads"
        console.print(table(title, [one for one in best if one["task"] == name]))
    console.print("The ratio is a peer's time over fastvgg's in the same kind of memory.")
    for name, note in record["notes"].items():
        console.print(f"{name}: {note}", highlight=False)
    for name, reason in record["not_measured"].items():
        console.print(f"{name}: not measured, cannot be imported: {reason}", highlight=False)


def main():
    arguments = options()
    if arguments.keras_backend:
        print(json.dumps(measured(arguments, arguments.keras_backend)))
        return
    machine_record = machine()
    results = measured(arguments, "numpy")
    for backend in KERAS_TENSORS.values():
        tensors = measured_tensors(arguments, backend)
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
            one.name: one.note
            for one in CONTENDERS
            if one.note and one.name not in results["not_measured"]
        },
        "rows": results["rows"],
    }
    print_record(Console(width=max(TABLE_WIDTH, Console().width)), arguments, record)
    if not arguments.quick:
        RESULT.parent.mkdir(exist_ok=True)
        RESULT.write_text(json.dumps(record, indent=0) + "\n")


if __name__ == "__main__":
    main()
