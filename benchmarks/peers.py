"""fastvgg beside its peers: the same arrays, the same threads, one process, as ratios in one run.

    python benchmarks/peers.py            # 20 minutes, 11 GiB of memory; writes peers.json
    python benchmarks/peers.py --quick    # a small batch, three rounds; writes nothing

    python -m pip install '.[bench]'      # the peers

On Linux, `torch` from PyPI brings CUDA packages of several GB: a CPU build that is installed first
satisfies the extra, with which torchvision works if it is one too. Two peers are not in the extra:
Keras on TensorFlow, which takes `tensorflow-cpu`, and DALI (Linux alone), which requires CUDA
libraries that its CPU operators never load; this goes without them:

    python -m pip install --no-deps nvidia-dali-cuda120
    python -m pip install astunparse gast libcst makefun nvtx optree packaging six

torch.compile needs a C++ compiler. What cannot be imported is listed, and why.

Four tasks: uint8 to float32 in caffe mode (flip the channels, subtract the means), the same in
torch mode (divide by 255, subtract, divide), caffe mode back to uint8 (add the means, flip, round,
saturate), and that again for float32 that was stored as float16, which truncating does not bring
back. NHWC on both sides, except where a name says NCHW.

What the contenders do is in contenders/. Keras has one backend in a process, so its tensors are
measured in a further process for each backend, on arrays of the same seed with fastvgg beside them:
their ratio is to fastvgg there.

Each peer is called in up to two styles, on the whole batch with its own threads, and image by image
on a pool of as many threads, its own threads set to one. The faster style counts, for fastvgg too.
A result in new memory is told apart from one in memory that was used before, and compared with
fastvgg's of the same kind. In new memory, allocation, page faults and release are in the time, and
so is whether a library asks the system for huge pages, as NumPy does for large arrays.
Image by image the result is one batch as well: a library that returns each image in new memory
has it copied into its row while it is in the cache. What an API forces is said below the table.

Every contender is called once a round, in an order drawn anew for each round; compilation, imports
and one call to warm up are not in the times. Useful bytes are those of the input and of the result,
each counted once. `differing` counts the elements whose bits are not those of Keras' NumPy path,
or, when restoring, of the original image.

With fewer threads than cores the process is confined to as many cores, because XLA has no setting
for the size of its pool.
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
from contenders.task import ENVIRONMENT, difference, tasks
from contenders.ways import ways
from rich.console import Console
from rich.table import Table

from fastvgg.bench.timing import machine
from fastvgg.parallel import available_cpus

RESULT = Path(__file__).parent / "results" / "peers.json"
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
IMAGES = 1536  # 1.08 GiB of input and result together: no cache holds them
QUICK_IMAGES = 64
ROUNDS = 7
QUICK_ROUNDS = 3
TABLE_WIDTH = 150
SETTLE_SECONDS = 0.02  # OpenMP's threads spin for some milliseconds after they have worked


def seconds(way):
    way.prepare()
    started = time.perf_counter()
    way.call()  # and the release of what it returns
    return time.perf_counter() - started


def measure(task, contenders, rounds):
    """Return a row for each way of each contender."""
    calls = []
    for contender in contenders:
        peer = contender.peer_for(task)
        if peer is not None:
            calls += ways(contender.name, peer, task)
    differences = []
    for way in calls:
        way.prepare()
        task.out.fill(0)
        differences.append(difference(way.call(), task.expected))
    taken = [[] for _ in calls]
    order = np.random.default_rng(0)
    for _ in range(rounds):
        for index in order.permutation(len(calls)):
            time.sleep(SETTLE_SECONDS)
            taken[index].append(seconds(calls[index]))
    return with_ratios(
        [row(task, *measured) for measured in zip(calls, taken, differences, strict=True)]
    )


def row(task, way, taken, differing_and_largest):
    median = statistics.median(taken)
    differing, largest = differing_and_largest
    return {
        "task": task.name,
        "contender": way.contender,
        "memory": way.memory,
        "style": way.style,
        "median_ms": round(median * 1e3, 2),
        "least_ms": round(min(taken) * 1e3, 2),
        "most_ms": round(max(taken) * 1e3, 2),
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
    for heading in ("images/s", "GB/s", "ms (least - most)", "ratio", "differing", "by up to"):
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
        help="measure Keras' tensors beside fastvgg, and print the rows as JSON",
    )
    given = parser.parse_args()
    given.images = given.images or (QUICK_IMAGES if given.quick else IMAGES)
    given.rounds = given.rounds or (QUICK_ROUNDS if given.quick else ROUNDS)
    cores = available_cpus()
    if not 1 <= given.threads <= cores:
        parser.error(f"--threads is {given.threads}, and this process may use {cores} cores")
    return given


def confine(threads):
    """Take as many cores as threads, before any library counts them."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])


def measured(given, backend):
    """Measure the contenders of this process on all tasks."""
    confine(given.threads)
    os.environ.update(ENVIRONMENT | {"KERAS_BACKEND": backend})
    contenders, versions, missing = importable(backend)
    rows = []
    if len(contenders) > 1:
        for task in tasks(given.images, given.threads):
            rows += measure(task, contenders, given.rounds)
    return {"rows": rows, "peers": versions, "not_measured": missing}


def measured_tensors(given, backend):
    """Measure Keras on another backend, in a process of its own; return the rows that are new."""
    command = [sys.executable, __file__, "--keras-backend", backend]
    for name in ("threads", "images", "rounds"):
        command += [f"--{name}", str(getattr(given, name))]
    ran = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(ran.stdout.splitlines()[-1])
    found["rows"] = [one for one in found["rows"] if one["contender"] != "fastvgg"]
    return found


def print_record(console, given, record):
    """Print a table for each task, the notes, and what is not measured."""
    best = [one for one in record["rows"] if one["best"]]
    for name in dict.fromkeys(one["task"] for one in best):
        title = f"{name}: {given.images} images, {given.threads} threads"
        console.print(table(title, [one for one in best if one["task"] == name]))
    console.print("The ratio is a peer's time over fastvgg's in the same kind of memory.")
    for name, note in record["notes"].items():
        console.print(f"{name}: {note}", highlight=False)
    for name, reason in record["not_measured"].items():
        console.print(f"{name}: not measured, it cannot be imported: {reason}", highlight=False)


def main():
    given = options()
    if given.keras_backend:
        print(json.dumps(measured(given, given.keras_backend)))
        return
    where = machine()
    found = measured(given, "numpy")
    for backend in KERAS_TENSORS.values():
        others = measured_tensors(given, backend)
        found["rows"] += others["rows"]
        found["peers"] |= others["peers"]
        found["not_measured"] |= others["not_measured"]
    record = {
        "machine": where,
        "transparent_huge_pages": HUGE_PAGES.read_text().strip() if HUGE_PAGES.exists() else "",
        "peers": found["peers"],
        "threads": given.threads,
        "images": given.images,
        "rounds": given.rounds,
        "not_measured": found["not_measured"],
        "notes": {
            one.name: one.note
            for one in CONTENDERS
            if one.note and one.name not in found["not_measured"]
        },
        "rows": found["rows"],
    }
    print_record(Console(width=max(TABLE_WIDTH, Console().width)), given, record)
    if not given.quick:
        RESULT.parent.mkdir(exist_ok=True)
        RESULT.write_text(json.dumps(record, indent=0) + "\n")


if __name__ == "__main__":
    main()
