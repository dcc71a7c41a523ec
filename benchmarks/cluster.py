"""Compare a plan on a Dask cluster of this machine with the same plan in one process.

    python benchmarks/cluster.py            # takes half an hour, 40 GB of disk; writes a result
    python benchmarks/cluster.py --quick    # 256 MiB and 20,000 chunks; writes nothing

**Two workers** with one thread each against one process with two threads, in interleaved rounds as
in benchmarks/streams.py; the source is in the page cache. Memory is the largest increase of a
worker's resident memory during the run.

**Sizes** from 1 to 16 GiB; the source is on disk. A line is fitted to the seconds of all sizes by
relative least squares, and the relative residual of each size is reported. Disk throughput varies
between calls, so there are three times as many rounds.

**Empty chunks**: workers report chunks as done without computing them; everything else is real: a
million tasks, results, journal records, and the final manifest. Scheduler, workers and
coordinator are separate processes on one machine. With few threads, each mostly waits for messages;
with many, the scheduler is the limit.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from distributed import Client, LocalCluster
from formats import remove
from rows import number_of_rounds, print_row
from streams import (
    FILE_BYTES,
    QUICK_BYTES,
    READ_BYTES,
    Files,
    TimedCall,
    fetch,
    image_bytes,
    throughput,
    time_interleaved,
)

import fastvgg
from fastvgg.bench.timing import compare, machine

RESULT = Path(__file__).parent / "results" / "cluster.json"
WORKERS = 2
MIN_SHARE = 0.85
MAX_CHUNK_MS, MAX_COORDINATOR_MIB = 1, 1024
MAX_DEVIATION = 0.05
SIZES = (1, 2, 4, 8, 16)
CHUNKS, QUICK_CHUNKS = 10**6, 20_000
THREADS = (1, 8)  # per worker that reports empty chunks

COORDINATOR_SCRIPT = """
import dataclasses
import json
import sys
import time
from pathlib import Path
import fastvgg
from distributed import Client
from fastvgg.executors import dask
from fastvgg.executors.worker import ChunkCommit
from fastvgg.stream.journal import Commit


def skip_task(task):
    return [ChunkCommit(Commit(part.chunk, "0" * 16, "", []), 1, []) for part in task.chunks]


dask.run_task = skip_task
address, source, target = sys.argv[1:]
plan = dataclasses.replace(fastvgg.plan(source, target, mode="caffe"), chunk_images=1)
with Client(address) as client:
    start_seconds, start_cpu_seconds = time.perf_counter(), time.process_time()
    plan.run(client=client)
    seconds = time.perf_counter() - start_seconds
    cpu_seconds = time.process_time() - start_cpu_seconds
status = Path("/proc/self/status").read_text()
peak = int(status.partition("VmHWM:")[2].split()[0]) / 1024
print(json.dumps({"seconds": seconds, "cpu_seconds": cpu_seconds, "peak_mib": peak}))
"""


def create_images(files, name, images):
    """Create a file of images."""
    return files.array(name, images, "uint8")


def create_network_inputs(files, name, images):
    """Create a file of network inputs."""
    source = create_images(files, "packed.npy", images)
    fastvgg.plan(source, files.path(name), mode="caffe").run()
    files.remove("packed.npy")
    return files.path(name)


CREATE_SOURCE = {"uint8": create_images, "float32": create_network_inputs}


def mib(field, process="self"):
    """Return a memory field of /proc/PID/status, in MiB."""
    text = Path(f"/proc/{process}/status").read_text()
    return int(text.partition(f"{field}:")[2].split()[0]) / 1024


def reset_peak_memory():
    """Reset the peak memory of this process, and return its current memory."""
    Path("/proc/self/clear_refs").write_text("5")
    return mib("VmRSS")


def measure_workers(files, client, arguments):
    """Measure two workers against two threads, in both directions."""
    for name, dtype, direction in (
        ("uint8 to Zarr float32", "uint8", "preprocess"),
        ("float32 to Zarr uint8", "float32", "restore"),
    ):
        images = arguments.bytes // image_bytes(dtype)
        memory = bytearray(READ_BYTES)
        source = CREATE_SOURCE[dtype](files, "source.npy", images)
        make_plan = functools.partial(
            fastvgg.plan,
            source,
            files.path("ours.zarr"),
            mode="caffe",
            direction=direction,
            threads=WORKERS,
        )
        plan = make_plan()

        def prepare(source=source, memory=memory, plan=plan):
            remove(files, "ours.zarr")
            files.settle(plan.write_bytes * 3 // 2)
            fetch(source, "in memory", memory)

        calls = (lambda p=make_plan: p().run(client=client), lambda p=make_plan: p().run())
        ours, local = time_interleaved(
            [TimedCall(prepare, call) for call in calls], arguments.rounds
        )
        share, spread, seconds = compare(ours, local)
        figures = throughput(plan.read_bytes, seconds, alone=(plan.read_bytes, local))
        prepare()
        before = client.run(reset_peak_memory)
        calls[0]()
        after = client.run(functools.partial(mib, "VmHWM"))
        figures["planned_mib"] = round(plan.projected_bytes / 2**20, 1)
        figures["peak_mib"] = round(max(after[worker] - before[worker] for worker in after), 1)
        yield print_row(f"two workers, {name}", MIN_SHARE, share, spread, **figures)
        remove(files, "ours.zarr")
        remove(files, "source.npy")


def measure_sizes(files, client, arguments):
    """Measure sources on disk, each twice as large as the previous one."""
    unit = arguments.bytes // 4
    memory, timed_calls = bytearray(READ_BYTES), []
    for size in SIZES:
        images = size * unit // image_bytes("float32")
        source = create_network_inputs(files, f"{size}.npy", images)
        target = files.path("ours.zarr")

        def prepare(source=source):
            remove(files, "ours.zarr")
            files.settle(2 * arguments.bytes)
            fetch(source, "on disk", memory)

        def call(source=source, target=target):
            plan = fastvgg.plan(source, target, mode="caffe", direction="restore")
            plan.run(client=client)

        timed_calls.append(TimedCall(prepare, call))
    durations = time_interleaved(timed_calls, 3 * arguments.rounds)
    gib = [size * unit / 2**30 for size in SIZES]
    seconds = [statistics.median(each) for each in durations]
    start, slope = fit_line(gib, seconds)
    for size, median, each in zip(gib, seconds, durations, strict=True):
        expected = start + slope * size
        low, _, high = statistics.quantiles(each, n=4)
        yield {
            "gib": size,
            "seconds": round(median, 3),
            "middle_half": [round(low, 3), round(high, 3)],
            "on_the_line": round(expected, 3),
            "deviation": round(median / expected - 1, 3),
            "wanted": MAX_DEVIATION,
        }
    remove(files, "ours.zarr")
    for size in SIZES:
        files.remove(f"{size}.npy")


def fit_line(sizes, seconds):
    """Return the intercept and the slope of a fit by relative least squares."""
    weights = 1 / np.array(seconds)
    points = np.stack([np.ones(len(sizes)), np.array(sizes)], axis=1) * weights[:, None]
    (start, slope), *_ = np.linalg.lstsq(points, np.ones(len(sizes)), rcond=None)
    return float(start), float(slope)


@contextlib.contextmanager
def start_processes(threads, directory):
    """Start a scheduler and workers as processes; yield the address and the processes."""
    file, processes = directory / "scheduler.json", []

    def start(kind, *options):
        command = [sys.executable, "-m", f"distributed.cli.dask_{kind}", "--scheduler-file", file]
        command += [*options, "--no-dashboard"]
        processes.append(subprocess.Popen(command, stderr=subprocess.DEVNULL))

    try:
        start("scheduler", "--port", "0")
        for _ in range(WORKERS):
            start("worker", "--nthreads", str(threads), "--no-nanny")
        with Client(scheduler_file=file, timeout=60) as client:
            client.wait_for_workers(WORKERS, timeout=60)
            address = client.scheduler.address
        yield address, processes
    finally:
        for process in reversed(processes):
            process.kill()
            process.wait()
        file.unlink(missing_ok=True)


def cpu_seconds(process):
    """Return the CPU time of a process."""
    fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure_chunks(files, arguments):
    """Measure the overhead per empty chunk."""
    for threads in THREADS:
        chunks = arguments.chunks if threads == max(THREADS) else arguments.chunks // 10
        images = files.path("tiny.npy")
        header = {"descr": "|u1", "fortran_order": False, "shape": (chunks, 5, 7, 3)}
        with images.open("wb") as file:
            np.lib.format.write_array_header_1_0(file, header)
            file.truncate(file.tell() + chunks * 5 * 7 * 3)
        with start_processes(threads, files.directory) as (address, (scheduler, *workers)):
            command = [
                sys.executable,
                "-c",
                COORDINATOR_SCRIPT,
                address,
                images,
                files.path("tiny.zarr"),
            ]
            completed = subprocess.run(command, capture_output=True, text=True, check=False)
            if completed.returncode:
                raise RuntimeError(completed.stderr)
            figures = json.loads(completed.stdout)
            row = {
                "threads": WORKERS * threads,
                "chunks": chunks,
                "ms": round(figures["seconds"] / chunks * 1e3, 3),
                "wanted_ms": MAX_CHUNK_MS,
                "coordinator_ms": round(figures["cpu_seconds"] / chunks * 1e3, 3),
                "scheduler_ms": round(cpu_seconds(scheduler) / chunks * 1e3, 3),
                "worker_ms": round(sum(map(cpu_seconds, workers)) / chunks * 1e3, 3),
                "coordinator_mib": round(figures["peak_mib"]),
                "scheduler_mib": round(mib("VmHWM", scheduler.pid)),
                "wanted_mib": MAX_COORDINATOR_MIB,
            }
        print(f"{chunks:,} chunks", row, flush=True)
        yield row
        remove(files, "tiny")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rounds", type=number_of_rounds, default=5)
    parser.add_argument(
        "--directory", type=Path, default=Path(), help="directory on the disk to measure"
    )
    arguments = parser.parse_args()
    arguments.bytes = QUICK_BYTES if arguments.quick else FILE_BYTES
    arguments.chunks = QUICK_CHUNKS if arguments.quick else CHUNKS
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # removes the files
    with tempfile.TemporaryDirectory(prefix="cluster-", dir=arguments.directory) as directory:
        files = Files(Path(directory).absolute(), WORKERS)
        options = {"n_workers": WORKERS, "threads_per_worker": 1, "dashboard_address": ":0"}
        with LocalCluster(**options) as cluster, Client(cluster) as client:
            rows = list(measure_workers(files, client, arguments))
            sizes = list(measure_sizes(files, client, arguments))
        for row in sizes:
            print(row, flush=True)
        chunks = list(measure_chunks(files, arguments))
    if not arguments.quick:
        record = {"machine": machine(), "threads": WORKERS, "rounds": arguments.rounds}
        record |= {"rows": rows, "sizes": sizes, "chunks": chunks}
        RESULT.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
