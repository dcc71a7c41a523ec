"""Every kernel beside what the memory allows, as shares of it in one run.

    python benchmarks/kernels.py            # some minutes; writes results/kernels.json
    python benchmarks/kernels.py --quick    # small arrays, which fit into caches; writes nothing

The limit of a path is the faster of two loops that read and write the same bytes past the caches
with no arithmetic, one of which asks for memory ahead; of work in place, the same with a
multiplication; of a fresh result, the system that zeroes as many bytes of fresh memory. Path and
limit run in turn on the same arrays with the same threads; a share is the median of (seconds of the
limit / seconds of the path) over the rounds, and the spread is the middle half of them. Input and
result take over 1 GiB together.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import yardsticks
from machine import machine

import fastvgg
from fastvgg import Mode, Transform, engine
from fastvgg.kernels import loops
from fastvgg.kernels import recipe as recipes
from fastvgg.kernels.recipe import Recipe
from fastvgg.threads import usable_cores
from fastvgg.transform import storage_dtype

RESULT = Path(__file__).parent / "results" / "kernels.json"
WORKING_SET_BYTES = 1.1 * 2**30
HEIGHT = WIDTH = 224
PLAIN_CAFFE = Mode("caffe without the flip", mean=Mode.CAFFE.mean)

# What is measured, the transform, the type of its input, the least share of the limit.
PATHS = (
    ("uint8 to float32, caffe", Transform("caffe"), "uint8", 0.95),
    ("uint8 to float32, tf", Transform("tf"), "uint8", 0.95),
    ("uint8 to float32, torch", Transform("torch"), "uint8", 0.95),
    ("uint8 NHWC to float32 NCHW, caffe", Transform("caffe", out_layout="NCHW"), "uint8", 0.90),
    ("uint8 NHWC to float32 NCHW, torch", Transform("torch", out_layout="NCHW"), "uint8", 0.90),
    ("uint8 NCHW to float32 NHWC, caffe", Transform("caffe", layout="NCHW", out_layout="NHWC"),
     "uint8", None),
    ("uint8 NCHW to float32 NCHW, caffe", Transform("caffe", layout="NCHW"), "uint8", None),
    ("uint8 to float16, caffe", Transform("caffe", dtype="float16"), "uint8", 0.90),
    ("uint8 to bfloat16, caffe", Transform("caffe", dtype="bfloat16"), "uint8", 0.90),
    ("uint8 to float64, caffe", Transform("caffe", dtype="float64"), "uint8", None),
    ("float32 to float32, caffe", Transform("caffe"), "float32", None),
    ("restore float32, caffe", Transform("caffe", "restore"), "float32", 0.95),
    ("restore float32, tf", Transform("tf", "restore"), "float32", 0.95),
    ("restore float32, torch", Transform("torch", "restore"), "float32", 0.95),
    ("restore float32 NCHW to NHWC, caffe", Transform("caffe", "restore", "NCHW", "NHWC"),
     "float32", None),
    ("restore float32 NCHW to NCHW, caffe", Transform("caffe", "restore", "NCHW"),
     "float32", None),
    ("restore float16, caffe", Transform("caffe", "restore"), "float16", 0.90),
    ("restore bfloat16, caffe", Transform("caffe", "restore"), "bfloat16", None),
)  # fmt: skip

FIRST_CALL = """
import contextlib
import sys
import time
import numba
import numpy as np
if "scipy" in sys.argv:
    with contextlib.suppress(ImportError):
        import scipy.linalg
x = np.zeros((1, 224, 224, 3), np.uint8)
begun = time.perf_counter()
import fastvgg
fastvgg.preprocess(x, "caffe")
print(time.perf_counter() - begun)
"""


def batch(images, layout, dtype):
    """Return images of known bytes, as the type and layout has them."""
    shape = (HEIGHT, WIDTH, 3) if layout == "NHWC" else (3, HEIGHT, WIDTH)
    one = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    x = np.empty((images, *shape), storage_dtype(dtype))
    x[:] = one.astype(x.dtype)
    return x


def in_turn(calls, rounds):
    """Return the seconds of every call in every round; the first of each is not counted."""
    seconds = [[] for _ in calls]
    for call in calls:
        call()
    for _ in range(rounds):
        for call, taken in zip(calls, seconds, strict=True):
            begun = time.perf_counter()
            call()
            taken.append(time.perf_counter() - begun)
    return seconds


def compared(ours, limit):
    """Return the share of the limit, its spread, and our median seconds."""
    shares = [b / a for a, b in zip(ours, limit, strict=True)]
    low, middle, high = statistics.quantiles(shares, n=4)
    return round(middle, 3), (round(low, 3), round(high, 3)), statistics.median(ours)


def row(path, wanted, share, spread, **figures):
    """Return a line of the result, printed as well."""
    line = {"path": path, "wanted": wanted, "share": share, "spread": spread, **figures}
    print(f"{path:36s} {share:6.3f} of the limit ({spread[0]}..{spread[1]})", figures, flush=True)
    return line


def throughput(x, out, seconds):
    """Return images and gigabytes a second."""
    return {
        "images_per_second": round(len(x) / seconds),
        "gigabytes_per_second": round((x.nbytes + out.nbytes) / seconds / 1e9, 1),
    }


def measured_paths(arguments):
    for path, transform, dtype, wanted in PATHS:
        pixel_bytes = 3 * storage_dtype(dtype).itemsize
        pixel_bytes += 3 * storage_dtype(transform.output_name(dtype)).itemsize
        images = int(arguments.bytes // (HEIGHT * WIDTH * pixel_bytes))
        x = batch(images, transform.layout, dtype)
        out = engine.apply(transform, x, threads=arguments.threads)
        ours, *limits = in_turn(
            (
                lambda t=transform, x=x, o=out: engine.apply(t, x, o, threads=arguments.threads),
                *(
                    lambda x=x, o=out, f=fetches: yardsticks.copy_on_threads(
                        x, o, arguments.threads, fetches=f
                    )
                    for fetches in (False, True)
                ),
            ),
            arguments.rounds,
        )
        limit = min(limits, key=statistics.median)
        share, spread, seconds = compared(ours, limit)
        yield row(path, wanted, share, spread, **throughput(x, out, seconds))


def measured_in_place(arguments):
    images = int(arguments.bytes // (HEIGHT * WIDTH * 12))
    for layout in ("NHWC", "NCHW"):
        y = batch(images, layout, "float32")
        ours, *limits = in_turn(
            (
                lambda y=y, layout=layout: fastvgg.preprocess(
                    y, "caffe", layout=layout, out=y, threads=arguments.threads
                ),
                *(
                    lambda y=y, f=fetches: yardsticks.scale_on_threads(
                        y, arguments.threads, fetches=f
                    )
                    for fetches in (False, True)
                ),
            ),
            arguments.rounds,
        )
        limit = min(limits, key=statistics.median)
        share, spread, seconds = compared(ours, limit)
        name = f"float32 in place, {layout}, caffe"
        yield row(name, 0.97, share, spread, **throughput(y, y, seconds))


def measured_flip(arguments):
    images = int(arguments.bytes // (HEIGHT * WIDTH * 15))
    x = batch(images, "NHWC", "uint8")
    out = np.empty(x.shape, np.float32)
    flipped, plain = in_turn(
        (
            lambda: fastvgg.preprocess(x, "caffe", out=out, threads=arguments.threads),
            lambda: fastvgg.preprocess(x, PLAIN_CAFFE, out=out, threads=arguments.threads),
        ),
        arguments.rounds,
    )
    share, spread, seconds = compared(flipped, plain)
    yield row("with the flip, against without", 0.98, share, spread, **throughput(x, out, seconds))


def measured_fresh(arguments):
    images = int(arguments.bytes // (HEIGHT * WIDTH * 15))
    x = batch(images, "NHWC", "uint8")
    size = x.size * 4
    ours, huge, small = in_turn(
        (
            lambda: fastvgg.preprocess(x, "caffe", threads=arguments.threads),
            lambda: yardsticks.zeroed_by_the_system(size, arguments.threads),
            lambda: yardsticks.zeroed_by_the_system(size, arguments.threads, huge=False),
        ),
        arguments.rounds,
    )
    for name, limit, wanted in (
        ("fresh result, against zeroing huge pages", huge, 0.90),
        ("fresh result, against zeroing 4 KiB pages", small, None),
    ):
        share, spread, seconds = compared(ours, limit)
        yield row(name, wanted, share, spread, images_per_second=round(images / seconds))


def call_overhead(rounds):
    """Return the microseconds that a call takes above its kernel, for one image."""
    x = batch(1, "NHWC", "uint8")
    out = np.empty(x.shape, np.float32)
    recipe = Recipe.of(Transform("caffe"), "uint8")
    kernel, constants = loops.compiled(recipe), recipes.constants(Mode.CAFFE, recipe)
    pixels = HEIGHT * WIDTH
    addresses = (x.ctypes.data, out.ctypes.data, constants.ctypes.data)

    def whole():
        for _ in range(200):
            fastvgg.preprocess(x, "caffe", out=out)

    def alone():
        for _ in range(200):
            kernel(*addresses, 1, pixels, 0, 0, 0, 0)

    seconds = in_turn((whole, alone), rounds)
    return statistics.median(a - b for a, b in zip(*seconds, strict=True)) / 200 * 1e6


def first_call(rounds, *imported):
    """Return the seconds of the first call in a new process, after Numba was imported.

    Numba imports SciPy, where it is installed, when it compiles for the first time. That is in the
    time unless SciPy is said to be imported as well.
    """
    command = [sys.executable, "-c", FIRST_CALL, *imported]
    taken = [
        float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        for _ in range(rounds)
    ]
    return statistics.median(taken)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--rounds", type=int, default=11)
    arguments = parser.parse_args()
    arguments.bytes = WORKING_SET_BYTES / 16 if arguments.quick else WORKING_SET_BYTES
    measurements = (measured_paths, measured_in_place, measured_flip, measured_fresh)
    rows = [line for measurement in measurements for line in measurement(arguments)]
    latency = {
        "call_overhead_us": round(call_overhead(arguments.rounds), 1),
        "first_call_seconds": round(first_call(7), 3),
        "first_call_after_scipy_seconds": round(first_call(7, "scipy"), 3),
    }
    print(latency)
    missed = [line["path"] for line in rows if line["wanted"] and line["share"] < line["wanted"]]
    print("below what is wanted:", ", ".join(missed) or "none")
    if not arguments.quick:
        RESULT.parent.mkdir(exist_ok=True)
        record = {"machine": machine(), "threads": arguments.threads, "rounds": arguments.rounds}
        RESULT.write_text(json.dumps(record | {"rows": rows, **latency}, indent=1) + "\n")


if __name__ == "__main__":
    main()
