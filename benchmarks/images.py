"""Compare image files to arrays, and back, with decoding or encoding only, and with peers.

    python benchmarks/images.py            # half an hour, 8 GB of disk; writes results/images.json
    python benchmarks/images.py --quick    # few photographs; writes nothing
    python benchmarks/images.py --million  # a million JPEGs, 35 GB of disk; images_million.json
    python benchmarks/images.py --planning # a folder of a million files; images_planning.json

    python benchmarks/images.py --peer-python tf=tf/bin/python --peer-python keras=tf/bin/python

The photographs are different crops of those that scikit-image ships, flipped and resized, as JPEGs
of quality 90 in class folders or tar shards. The files are in the page cache before each call.

The limit of an array is reading and decoding the same files with simplejpeg into reused memory on
the same threads, discarding the pixels, while the same number of bytes of one buffer is written
with the calls and the overlap of a run: reserve space, write each chunk with direct I/O and sync it
on separate threads, rename at the end. uint8 arrays are also compared with decoding only. Offsets
of shard members are known in advance. The limit of restored files is encoding images in memory with
the same encoder on the same threads; a second limit also writes the files from these threads and
syncs the disk at the end. No limit includes the small files that a run writes besides the data.

Rounds of path and limit are interleaved, in alternating order, with new files each time. A share is
the median over the rounds of (seconds of the limit / seconds of the path), the spread is their
interquartile range; see streams.py for the protection against disturbance. Peers, in separate
processes, are timed in the same way against complete runs of fastvgg to a float32 file, although
they write nothing: see image_peers.py. A peer that its interpreter cannot import is not measured.

Rows of every result are compared with Pillow's decoding and resizing, as in Keras, and with the
oracle. A million images and their planning are measured in separate processes; their memory is the
peak resident memory of the whole process.
"""

from __future__ import annotations

import argparse
import functools
import json
import shutil
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from image_checks import check_files, check_rows, mean_difference
from image_limits import ENCODERS, decode, decode_and_write, encode_all, encode_and_write
from images_million import measure_million, measure_planning
from peer_process import PeerError, PeerProcess
from photographs import LARGE, PHOTOGRAPH, SIZE, FilesAndDirectories, write_folder, write_shards
from rows import number_of_rounds, print_row
from streams import READ_BYTES, TimedCall, chunk_buffer, fetch, time_interleaved

import fastvgg
from fastvgg import Transform
from fastvgg.bench.timing import compare, machine
from fastvgg.parallel import available_cpus

RESULTS = Path(__file__).parent / "results"
IMAGES, QUICK_IMAGES = 4000, 240
LARGE_IMAGES, QUICK_LARGE_IMAGES = 200, 16

MIN_SHARE = 0.92
MIN_THREAD_SPEEDUP = 1.85
MIN_FAST_JPEG_SPEEDUP = 3.0

# The name in image_peers.py and in the results, the mode, and the target speedup.
PEER_TARGETS = (
    ("torch", "PyTorch DataLoader", "torch", 3.5),
    ("webdataset", "WebDataset", "torch", None),
    ("tf", "tf.data", "caffe", 3.5),
    ("keras", "Keras image_dataset_from_directory", "caffe", 3.5),
    ("loop", "Pillow and Keras in a loop", "caffe", None),
    ("ffcv", "FFCV, its own file of JPEGs", "torch", 2.5),
)


def image_rate(images, seconds):
    return round(images / seconds)


def image_rates(images, seconds, **others):
    """Return images per second, ours and those of the alternatives."""
    figures = {"images_per_second": image_rate(images, seconds)}
    for name, other_seconds in others.items():
        figures[f"{name}_images_per_second"] = image_rate(images, statistics.median(other_seconds))
    return figures


def print_speedup_row(path, target_value, times, spread, **figures):
    """Print and return a row with a speedup."""
    row = {"path": path, "wanted": target_value, "times": times, "spread": spread, **figures}
    print(f"{path:44s} {times:6.2f} times as fast ({spread[0]}..{spread[1]})", figures, flush=True)
    return row


class Bench:
    """The shared state of all measurements of a run."""

    def __init__(self, files, arguments):
        self.files = files
        self.arguments = arguments
        self.photographs = write_folder(files.path("photos"), arguments.images, PHOTOGRAPH)
        self.versions = {}
        self.missing = {}

    def plan(self, photographs, *, target="ours.npy", threads=None, **options):
        """Plan a run into a new file."""
        return fastvgg.plan(
            photographs.source,
            self.files.path(target),
            size=SIZE,
            threads=threads or self.arguments.threads,
            **options,
        )

    def time_interleaved(self, photographs, nbytes, transform, *calls, wait=lambda: None):
        """Time calls that read files in the page cache and write `nbytes`.

        `wait` is called before each and not timed. fastvgg's results are checked, and all results
        are removed before the next call.
        """

        def check_and_remove():
            result = self.files.path("ours.npy")
            if result.exists():
                check_rows(result, photographs.readers, SIZE, transform)
            for name in ("ours", "plain", "fast"):
                self.files.remove(name)

        def prepare():
            wait()
            check_and_remove()
            self.files.settle(nbytes * 3 // 2)
            photographs.fetch()

        seconds = time_interleaved(
            [TimedCall(prepare, call) for call in calls], self.arguments.rounds
        )
        check_and_remove()
        return seconds


def measure_arrays(bench, photographs, label):
    """Measure float32 and uint8 arrays from a folder or from shards."""
    images, threads = len(photographs.readers), bench.arguments.threads
    plain = bench.files.path("plain.npy")

    plan = bench.plan(photographs, mode="caffe")
    ours, limit = bench.time_interleaved(
        photographs,
        plan.write_bytes,
        Transform("caffe"),
        lambda: bench.plan(photographs, mode="caffe").run(),
        functools.partial(decode_and_write, photographs, plain, plan, chunk_buffer(plan)),
    )
    share, spread, seconds = compare(ours, limit)
    figures = image_rates(images, seconds, limit=limit)
    yield print_row(f"{label} to float32", MIN_SHARE, share, spread, **figures)

    plan = bench.plan(photographs, direction="pack")
    ours, decoding_only, written = bench.time_interleaved(
        photographs,
        plan.write_bytes,
        None,
        lambda: bench.plan(photographs, direction="pack").run(),
        lambda: decode(photographs, threads),
        functools.partial(decode_and_write, photographs, plain, plan, chunk_buffer(plan)),
    )
    for against, limit, target_value in (
        ("decoding", decoding_only, MIN_SHARE),
        ("decoding, writing", written, None),
    ):
        share, spread, seconds = compare(ours, limit)
        figures = image_rates(images, seconds, limit=limit)
        yield print_row(
            f"{label} to uint8, against {against}", target_value, share, spread, **figures
        )


def measure_folder(bench):
    yield from measure_arrays(bench, bench.photographs, "folder")


def measure_shards(bench):
    with write_shards(bench.files.path("shards"), bench.photographs) as photographs:
        yield from measure_arrays(bench, photographs, "shards")
    bench.files.remove("shards")


def measure_restoring(bench):
    """Measure float32 to files against encoding only, and against encoding and writing files."""
    images = len(bench.photographs.readers)
    source, target = bench.files.path("restorable.npy"), bench.files.path("ours")
    plain = bench.files.path("plain")
    threads, memory = bench.arguments.threads, bytearray(READ_BYTES)
    fastvgg.plan(bench.photographs.source, source, mode="caffe", size=SIZE).run()
    pixels = fastvgg.restore(np.load(source, mmap_mode="r"), "caffe")

    def check_and_remove(image_format):
        if target.exists():
            check_files(target, pixels, image_format)
        for name in ("ours", "plain"):
            bench.files.remove(name)

    def prepare(image_format):
        check_and_remove(image_format)
        bench.files.settle(pixels.nbytes)
        fetch(source, "in memory", memory)

    for image_format in ENCODERS:
        prepare_format = functools.partial(prepare, image_format)
        make_plan = functools.partial(
            fastvgg.plan, source, target, direction="restore", format=image_format, threads=threads
        )
        encoding = (pixels, image_format, threads)
        calls = (
            lambda make_plan=make_plan: make_plan().run(),
            functools.partial(encode_all, *encoding),
            functools.partial(encode_and_write, *encoding, plain),
        )
        ours, encoding_only, written = time_interleaved(
            [TimedCall(prepare_format, call) for call in calls], bench.arguments.rounds
        )
        check_and_remove(image_format)
        for against, limit, target_value in (
            ("encoding", encoding_only, MIN_SHARE),
            ("encoding, writing", written, None),
        ):
            share, spread, seconds = compare(ours, limit)
            figures = image_rates(images, seconds, limit=limit)
            name = f"float32 to {image_format.upper()} files, against {against}"
            yield print_row(name, target_value, share, spread, **figures)
    bench.files.remove("restorable")


def measure_threads(bench):
    """Measure the speedup of a second thread, for a run and for decoding only."""
    photographs = bench.photographs
    images = len(photographs.readers)
    two, one, two_decoding, one_decoding = bench.time_interleaved(
        photographs,
        bench.plan(photographs, mode="caffe").write_bytes,
        Transform("caffe"),
        lambda: bench.plan(photographs, mode="caffe", threads=2).run(),
        lambda: bench.plan(photographs, mode="caffe", threads=1).run(),
        lambda: decode(photographs, 2),
        lambda: decode(photographs, 1),
    )
    for name, target_value, ours, other in (
        ("folder to float32", MIN_THREAD_SPEEDUP, two, one),
        ("decoding alone", None, two_decoding, one_decoding),
    ):
        times, spread, seconds = compare(ours, other)
        figures = image_rates(images, seconds, other=other)
        yield print_speedup_row(
            f"{name}, two threads against one", target_value, times, spread, **figures
        )


def measure_fast_jpeg(bench):
    """Measure decoding at reduced resolution against full decoding."""
    arguments = bench.arguments
    photographs = write_folder(bench.files.path("large"), arguments.large_images, LARGE)
    make_plan = functools.partial(bench.plan, photographs, mode="caffe")

    def run_fast():
        make_plan(target="fast.npy", fast_jpeg=True).run()

    fast, full = bench.time_interleaved(
        photographs,
        make_plan().write_bytes,
        Transform("caffe"),
        run_fast,
        lambda: make_plan().run(),
    )
    times, spread, seconds = compare(fast, full)
    figures = image_rates(len(photographs.readers), seconds, other=full)
    run_fast()
    figures["mean_difference"] = mean_difference(bench.files.path("fast.npy"), photographs.readers)
    name = f"fast_jpeg, {LARGE[1]}x{LARGE[0]} to {SIZE[1]}x{SIZE[0]}"
    yield print_speedup_row(name, MIN_FAST_JPEG_SPEEDUP, times, spread, **figures)
    bench.files.remove("large")


def measure_peer(bench, name, label, mode, target_value):
    """Measure one peer and fastvgg, interleaved, or record why it cannot be measured."""
    photographs, arguments = bench.photographs, bench.arguments
    scratch = bench.files.path("scratch")
    scratch.mkdir()
    python = arguments.peer_pythons.get(name, sys.executable)
    try:
        with PeerProcess(name, python, photographs, scratch, arguments.threads) as peer:
            versions = peer.wait_until_ready()
            ours, theirs = bench.time_interleaved(
                photographs,
                bench.plan(photographs, mode=mode).write_bytes,
                Transform(mode),
                lambda: bench.plan(photographs, mode=mode).run(),
                peer.run_epoch,
                wait=peer.wait_until_idle,
            )
    except PeerError as error:
        print(f"{label}: not measured: {error}", flush=True)
        bench.missing[label] = str(error)
        return
    finally:
        bench.files.remove("scratch")
    bench.versions |= versions
    times, spread, seconds = compare(ours, theirs)
    figures = image_rates(arguments.images, seconds, other=theirs)
    yield print_speedup_row(f"{label}, {mode} mode", target_value, times, spread, **figures)


def measure_peers(bench):
    for peer in PEER_TARGETS:
        yield from measure_peer(bench, *peer)


SHARE_MEASUREMENTS = {
    "folder": measure_folder,
    "shards": measure_shards,
    "restoring": measure_restoring,
}
SPEEDUP_MEASUREMENTS = {
    "threads": measure_threads,
    "fast_jpeg": measure_fast_jpeg,
    "peers": measure_peers,
}


def measure_comparisons(directory, arguments):
    """Measure the selected comparisons, and return their record."""
    bench = Bench(FilesAndDirectories(directory, arguments.threads), arguments)
    nbytes = bench.photographs.fetch()
    rows = {
        kind: [
            row
            for name, measurement in measurements.items()
            if name in arguments.only
            for row in measurement(bench)
        ]
        for kind, measurements in (("rows", SHARE_MEASUREMENTS), ("times", SPEEDUP_MEASUREMENTS))
    }
    missed = [
        row["path"]
        for kind, figure in (("rows", "share"), ("times", "times"))
        for row in rows[kind]
        if row["wanted"] and row[figure] < row["wanted"]
    ]
    print("below target:", ", ".join(missed) or "none")
    return {
        "threads": arguments.threads,
        "rounds": arguments.rounds,
        "images": arguments.images,
        "kilobytes_of_a_file": round(nbytes / arguments.images / 1e3, 1),
        "large_images": arguments.large_images,
        "peers": bench.versions,
        "not_measured": bench.missing,
        **rows,
    }


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--million", action="store_true")
    parser.add_argument("--planning", action="store_true")
    parser.add_argument("--threads", type=int, default=available_cpus())
    parser.add_argument("--rounds", type=number_of_rounds, default=5)
    parser.add_argument("--images", type=int)
    parser.add_argument(
        "--directory", type=Path, default=Path(), help="directory on the disk to measure"
    )
    parser.add_argument(
        "--only",
        nargs="+",
        choices=[*SHARE_MEASUREMENTS, *SPEEDUP_MEASUREMENTS],
        help="run only these parts; writes nothing",
    )
    parser.add_argument(
        "--peer-python",
        action="append",
        default=[],
        metavar="PEER=PYTHON",
        help=f"an interpreter for one of {', '.join(peer[0] for peer in PEER_TARGETS)}",
    )
    arguments = parser.parse_args()
    arguments.writes_result = not (arguments.quick or arguments.only)
    arguments.only = arguments.only or [*SHARE_MEASUREMENTS, *SPEEDUP_MEASUREMENTS]
    arguments.images = arguments.images or (QUICK_IMAGES if arguments.quick else IMAGES)
    arguments.large_images = QUICK_LARGE_IMAGES if arguments.quick else LARGE_IMAGES
    arguments.peer_pythons = dict(one.partition("=")[::2] for one in arguments.peer_python)
    for name, python in arguments.peer_pythons.items():
        if name not in [peer[0] for peer in PEER_TARGETS] or shutil.which(python) is None:
            parser.error(f"--peer-python {name}={python}: no such peer, or no such program")
    return arguments


def main():
    arguments = parse_arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # removes the files
    measurement, name = measure_comparisons, "images"
    if arguments.million:
        measurement, name = measure_million, "images_million"
    elif arguments.planning:
        measurement, name = measure_planning, "images_planning"
    with tempfile.TemporaryDirectory(prefix="images-", dir=arguments.directory) as directory:
        start_seconds = time.perf_counter()
        record = measurement(Path(directory).absolute(), arguments)
        print(f"{time.perf_counter() - start_seconds:.0f} s")
    if arguments.writes_result:
        RESULTS.mkdir(exist_ok=True)
        text = json.dumps({"machine": machine()} | record, indent=1) + "\n"
        (RESULTS / f"{name}.json").write_text(text)


if __name__ == "__main__":
    main()
