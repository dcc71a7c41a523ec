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
from photographs import SMALL, ImageFolderTarget, jpegs, shards_of, write_shard

from fastvgg import Transform
from fastvgg.parallel import available_cpus

MILLION, QUICK_MILLION = 1_000_000, 20_000
FEW, QUICK_FEW = 10_000, 2_000
DIFFERENT, QUICK_DIFFERENT = 20_000, 2_000
IMAGES_PER_SHARD, QUICK_IMAGES_PER_SHARD = 10_000, 2_000
WARMING_IMAGES = 16
FEW_ROUNDS = 3  # before and again after the million
MAX_PEAK_MIB = 512
MAX_RELATIVE_TIME = 1.05
MAX_PLANNING_SECONDS = 10
MAX_PLANNING_PEAK_MIB = 300
PLANNING_DIRECTORIES = (1, 100)
PLANNED = {"mode": "caffe", "dtype": "float16", "size": SMALL}

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
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{runs}: {done.stderr}")
    return json.loads(done.stdout)


def million_shards(directory, count, different, images_per_shard):
    """Write shards of `count` JPEGs, `different` of them distinct; return the distinct ones."""
    images = list(jpegs(different, SMALL))
    directory.mkdir()
    write_shard(directory / "warming.tar", enumerate(images[:WARMING_IMAGES]))
    for shard in range(count // images_per_shard):
        rows = range(shard * images_per_shard, (shard + 1) * images_per_shard)
        members = ((row, images[row % different]) for row in rows)
        write_shard(directory / f"{shard:04d}.tar", members)
    return images


def million(directory, arguments):
    """Measure a million images, end to end, against ten thousand of them."""
    quick = arguments.quick
    count, few = (QUICK_MILLION, QUICK_FEW) if quick else (MILLION, FEW)
    different = QUICK_DIFFERENT if quick else DIFFERENT
    images_per_shard = QUICK_IMAGES_PER_SHARD if quick else IMAGES_PER_SHARD
    files, shards = ImageFolderTarget(directory, arguments.threads), directory / "shards"
    images = million_shards(shards, count, different, images_per_shard)
    reads = [functools.partial(bytes, data) for data in images]

    def measured(shard_count, name, options):
        for target in ("ours", "warmed"):
            files.remove(target)
        os.sync()
        return run_in_child_process(
            (shards / "warming.tar", directory / "warmed.npy"),
            (shards_of(shards, shard_count), directory / name),
            options={**options, "size": SMALL, "threads": arguments.threads},
            is_run=True,
        )

    rows = []
    for label, options, transform in (
        ("uint8", {"direction": "pack"}, None),
        ("float16", {"mode": "caffe", "dtype": "float16"}, Transform("caffe", dtype="float16")),
    ):
        short = [measured(few // images_per_shard, "ours.npy", options) for _ in range(FEW_ROUNDS)]
        long = measured(count // images_per_shard, "ours.npy", options)
        check_rows(directory / "ours.npy", reads, SMALL, transform)
        short += [measured(few // images_per_shard, "ours.npy", options) for _ in range(FEW_ROUNDS)]
        rows.append(million_row(label, long, short))
    return {
        "threads": arguments.threads,
        "images": count,
        "different": different,
        "kilobytes_of_a_file": round(sum(map(len, images)) / different / 1e3, 2),
        "rows": rows,
    }


def million_row(label, long, short):
    """Print and return a row with the cost of many images relative to few."""
    each = statistics.median(one["seconds"] / one["images"] for one in short)
    line = {
        "path": f"shards of {SMALL[1]}x{SMALL[0]} JPEGs to {label}",
        "wanted_peak_mib": MAX_PEAK_MIB,
        "wanted_time": MAX_RELATIVE_TIME,
        **long,
        "images_per_second": round(long["images"] / long["seconds"]),
        "few_images": short[0]["images"],
        "few_images_per_second": round(1 / each),
        "few_peak_mib": max(one["peak_mib"] for one in short),
        "time_of_an_image": round(long["seconds"] / long["images"] / each, 3),
    }
    print(line, flush=True)
    missed = line["peak_mib"] > MAX_PEAK_MIB or line["time_of_an_image"] > MAX_RELATIVE_TIME
    print(f"{line['path']}: {'missed' if missed else 'met'} the target")
    return line


def many_files(directory, count, directories):
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


def planning(directory, arguments):
    """Measure planning only, for folders of a million files whose inodes are cached."""
    count = QUICK_MILLION if arguments.quick else MILLION
    rows = []
    for directories in PLANNING_DIRECTORIES:
        source = directory / f"photos_{directories}"
        many_files(source, count, directories)
        os.sync()
        figures = [
            run_in_child_process((source, directory / "ours.npy"), options=PLANNED, is_run=False)
            for _ in range(arguments.rounds + 1)
        ][1:]
        shutil.rmtree(source)
        seconds = sorted(one["planning_seconds"] for one in figures)
        line = {
            "path": f"folder, directories: {directories}",
            "files": count,
            "wanted_seconds": MAX_PLANNING_SECONDS,
            "wanted_peak_mib": MAX_PLANNING_PEAK_MIB,
            "seconds": round(statistics.median(seconds), 2),
            "least_and_most_seconds": (round(seconds[0], 2), round(seconds[-1], 2)),
            "peak_mib": max(one["peak_mib"] for one in figures),
        }
        print(line, flush=True)
        missed = line["seconds"] > MAX_PLANNING_SECONDS or line["peak_mib"] > MAX_PLANNING_PEAK_MIB
        print(f"{line['path']}: {'missed' if missed else 'met'} the target")
        rows.append(line)
    return {"threads": available_cpus(), "rounds": arguments.rounds, "rows": rows}
