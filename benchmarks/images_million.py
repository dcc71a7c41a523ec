"""Convert or plan a million images, each in a separate process: see images.py."""

from __future__ import annotations

import functools
import json
import os
import shutil
import statistics
import subprocess
import sys

from image_checks import check_rows
from photographs import SMALL, FilesAndDirectories, jpegs, shard_pattern, write_shard

from fastvgg import Transform
from fastvgg.parallel import available_cpus

IMAGES, QUICK_IMAGES = 1_000_000, 20_000
FEW_IMAGES, QUICK_FEW_IMAGES = 10_000, 2_000
DISTINCT_IMAGES, QUICK_DISTINCT_IMAGES = 20_000, 2_000
IMAGES_PER_SHARD, QUICK_IMAGES_PER_SHARD = 10_000, 2_000
WARMUP_IMAGES = 16
FEW_ROUNDS = 3  # before and after the million
MAX_PEAK_MIB = 512
MAX_RELATIVE_TIME = 1.05
MAX_PLANNING_SECONDS = 10
MAX_PLANNING_PEAK_MIB = 300
PLANNING_DIRECTORIES = (1, 100)
PLAN_OPTIONS = {"mode": "caffe", "dtype": "float16", "size": SMALL}

CHILD_SCRIPT = """
import json
import sys
import time
from pathlib import Path
import fastvgg

*runs, options, is_run = json.loads(sys.argv[1])
options["size"] = tuple(options["size"])
for source, target in runs:
    start_seconds = time.perf_counter()
    plan = fastvgg.plan(source, target, **options)
    planning_seconds = time.perf_counter() - start_seconds
    if is_run:
        plan.run()
    seconds = time.perf_counter() - start_seconds
status = Path("/proc/self/status").read_text()
figures = {
    "images": plan.header.images,
    "seconds": round(seconds, 3),
    "planning_seconds": round(planning_seconds, 3),
    "peak_mib": round(int(status.partition("VmHWM:")[2].split()[0]) / 1024, 1),
}
print(json.dumps(figures))
"""


def run_in_child_process(*runs, options, is_run):
    """Plan, and run if `is_run`, in a new process; return the figures of the last run."""
    arguments = json.dumps((*runs, options, is_run), default=str)
    command = [sys.executable, "-c", CHILD_SCRIPT, arguments]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    if process.returncode:
        raise RuntimeError(f"{runs}: {process.stderr}")
    return json.loads(process.stdout)


def write_all_shards(directory, count, distinct, images_per_shard):
    """Write shards of `count` JPEGs, which repeat `distinct` ones; return the distinct ones."""
    images = list(jpegs(distinct, SMALL))
    directory.mkdir()
    write_shard(directory / "warmup.tar", enumerate(images[:WARMUP_IMAGES]))
    for shard in range(count // images_per_shard):
        rows = range(shard * images_per_shard, (shard + 1) * images_per_shard)
        members = ((row, images[row % distinct]) for row in rows)
        write_shard(directory / f"{shard:04d}.tar", members)
    return images


def measure_million(directory, arguments):
    """Measure a million images, end to end, against ten thousand of them."""
    quick = arguments.quick
    count, few_images = (QUICK_IMAGES, QUICK_FEW_IMAGES) if quick else (IMAGES, FEW_IMAGES)
    distinct = QUICK_DISTINCT_IMAGES if quick else DISTINCT_IMAGES
    images_per_shard = QUICK_IMAGES_PER_SHARD if quick else IMAGES_PER_SHARD
    files, shards = FilesAndDirectories(directory, arguments.threads), directory / "shards"
    images = write_all_shards(shards, count, distinct, images_per_shard)
    readers = [functools.partial(bytes, data) for data in images]

    def measure(shard_count, name, options):
        for target in ("ours", "warmup"):
            files.remove(target)
        os.sync()
        return run_in_child_process(
            (shards / "warmup.tar", directory / "warmup.npy"),
            (shard_pattern(shards, shard_count), directory / name),
            options={**options, "size": SMALL, "threads": arguments.threads},
            is_run=True,
        )

    rows = []
    for label, options, transform in (
        ("uint8", {"direction": "pack"}, None),
        ("float16", {"mode": "caffe", "dtype": "float16"}, Transform("caffe", dtype="float16")),
    ):
        few_results = [
            measure(few_images // images_per_shard, "ours.npy", options) for _ in range(FEW_ROUNDS)
        ]
        many_result = measure(count // images_per_shard, "ours.npy", options)
        check_rows(directory / "ours.npy", readers, SMALL, transform)
        few_results += [
            measure(few_images // images_per_shard, "ours.npy", options) for _ in range(FEW_ROUNDS)
        ]
        rows.append(print_row(label, many_result, few_results))
    return {
        "threads": arguments.threads,
        "images": count,
        "different": distinct,
        "kilobytes_of_a_file": round(sum(map(len, images)) / distinct / 1e3, 2),
        "rows": rows,
    }


def print_row(label, many_result, few_results):
    """Print and return a row with the cost of many images relative to few."""
    few_seconds_per_image = statistics.median(one["seconds"] / one["images"] for one in few_results)
    row = {
        "path": f"shards of {SMALL[1]}x{SMALL[0]} JPEGs to {label}",
        "wanted_peak_mib": MAX_PEAK_MIB,
        "wanted_time": MAX_RELATIVE_TIME,
        **many_result,
        "images_per_second": round(many_result["images"] / many_result["seconds"]),
        "few_images": few_results[0]["images"],
        "few_images_per_second": round(1 / few_seconds_per_image),
        "few_peak_mib": max(one["peak_mib"] for one in few_results),
        "time_of_an_image": round(
            many_result["seconds"] / many_result["images"] / few_seconds_per_image, 3
        ),
    }
    print(row, flush=True)
    missed = row["peak_mib"] > MAX_PEAK_MIB or row["time_of_an_image"] > MAX_RELATIVE_TIME
    print(f"{row['path']}: {'missed' if missed else 'met'} the target")
    return row


def create_files(directory, count, directories):
    """Create a folder of sparse files and one JPEG.

    The JPEG is the largest, because planning opens the largest file.
    """
    (data,) = jpegs(1, SMALL)
    for number in range(directories):
        (directory / f"class_{number:02d}").mkdir(parents=True)
    for index in range(count):
        path = directory / f"class_{index % directories:02d}" / f"{index:07d}.jpg"
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        if index:
            os.ftruncate(file, 1 + index % (len(data) - 1))
        else:
            os.write(file, data)
        os.close(file)


def measure_planning(directory, arguments):
    """Measure planning only, for folders of a million files whose inodes are cached."""
    count = QUICK_IMAGES if arguments.quick else IMAGES
    rows = []
    for directories in PLANNING_DIRECTORIES:
        source = directory / f"photos_{directories}"
        create_files(source, count, directories)
        os.sync()
        figures = [
            run_in_child_process(
                (source, directory / "ours.npy"), options=PLAN_OPTIONS, is_run=False
            )
            for _ in range(arguments.rounds + 1)
        ][1:]
        shutil.rmtree(source)
        seconds = sorted(one["planning_seconds"] for one in figures)
        row = {
            "path": f"folder, directories: {directories}",
            "files": count,
            "wanted_seconds": MAX_PLANNING_SECONDS,
            "wanted_peak_mib": MAX_PLANNING_PEAK_MIB,
            "seconds": round(statistics.median(seconds), 2),
            "least_and_most_seconds": (round(seconds[0], 2), round(seconds[-1], 2)),
            "peak_mib": max(one["peak_mib"] for one in figures),
        }
        print(row, flush=True)
        missed = row["seconds"] > MAX_PLANNING_SECONDS or row["peak_mib"] > MAX_PLANNING_PEAK_MIB
        print(f"{row['path']}: {'missed' if missed else 'met'} the target")
        rows.append(row)
    return {"threads": available_cpus(), "rounds": arguments.rounds, "rows": rows}
