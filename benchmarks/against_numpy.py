"""Compare every supported combination on Numba with NumPy, as ratios within one run.

    python benchmarks/against_numpy.py            # all combinations, takes minutes
    python benchmarks/against_numpy.py --quick    # the most common types

The NumPy path is the faster of two: the oracle on the whole batch, and the NumPy backend, which
runs the oracle in tiles on the same threads. Both backends reuse `out`; the oracle allocates its
result, as NumPy code does. Rounds are interleaved, and the ratio is that of the medians, without
compilation. A combination is slower if the NumPy path takes less than 0.95 of Numba's time: these
ratios repeat within 5 %. An apparently slower one is measured twice more, and the median of the
three ratios counts, because another process may have used the core.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from pathlib import Path

import numpy as np

from fastvgg import Transform, engine, oracle
from fastvgg.bench.timing import machine
from fastvgg.parallel import available_cpus
from fastvgg.transform import STORAGE_TYPES, storage_dtype

RESULT = Path(__file__).parent / "results" / "against_numpy.json"
MODES = ("caffe", "tf", "torch")
LAYOUTS = ("NHWC", "NCHW")
FLOATS = STORAGE_TYPES[1:]
SHAPES = {
    "a batch": (16, 224, 224, 3),
    "one image": (1, 224, 224, 3),
    "a thumbnail": (1, 32, 32, 3),
}
ROUNDS = 7
MIN_RATIO = 0.95


def combinations(quick):
    inputs = ("uint8", "float32") if quick else STORAGE_TYPES
    results = ("float16", "float32") if quick else FLOATS
    for mode, layout, out_layout in itertools.product(MODES, LAYOUTS, LAYOUTS):
        for source, result in itertools.product(inputs, results):
            yield Transform(mode, "preprocess", layout, out_layout, result), source
        for source, result in itertools.product(results, inputs):
            yield Transform(mode, "restore", layout, out_layout, result), source


def batch(shape, layout, dtype):
    images, height, width, channels = shape
    shape = shape if layout == "NHWC" else (images, channels, height, width)
    values = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    return values.astype(storage_dtype(dtype))


def copy_unaligned(x):
    memory = np.zeros(x.nbytes + 1, np.uint8)
    copy = memory[1:].view(x.dtype).reshape(x.shape)
    copy[...] = x
    return copy


VIEWS = {
    "contiguous": lambda x: x,
    "channels reversed": lambda x: x[..., ::-1],
    "rows reversed": lambda x: x[:, ::-1],
    "every second pixel": lambda x: x[:, ::2, ::2],
    "transposed": lambda x: np.moveaxis(np.ascontiguousarray(np.moveaxis(x, -1, 1)), 1, -1),
    "broadcast": lambda x: np.broadcast_to(x[:1], x.shape),
    "other byte order": lambda x: x.astype(x.dtype.newbyteorder("S")),
    "unaligned": copy_unaligned,
}


def cases(quick):
    """Yield every combination on contiguous batches, and the common ones on other views."""
    for transform, source in combinations(quick):
        for shape in SHAPES:
            yield transform, source, shape, "contiguous"
    for mode, source, shape, view in itertools.product(
        MODES, ("uint8", "float32"), SHAPES, list(VIEWS)[1:]
    ):
        yield Transform(mode, dtype="float32"), source, shape, view


def time_call(call, repeats):
    start_seconds = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start_seconds) / repeats


def measure(transform, x, threads):
    """Return the median seconds of Numba and of the faster NumPy path."""
    out = engine.apply(transform, x, threads=threads)
    calls = (
        lambda: engine.apply(transform, x, out, threads=threads, backend="numba"),
        lambda: engine.apply(transform, x, out, threads=threads, backend="numpy"),
        lambda: oracle.apply(transform, x),
    )
    repeats = [max(1, int(2e-3 / max(time_call(call, 1), 1e-9))) for call in calls]
    durations = [
        [time_call(call, n) for call, n in zip(calls, repeats, strict=True)] for _ in range(ROUNDS)
    ]
    numba_seconds, numpy_seconds, oracle_seconds = (
        statistics.median(column) for column in zip(*durations, strict=True)
    )
    return numba_seconds, min(numpy_seconds, oracle_seconds)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--threads", type=int, default=available_cpus())
    arguments = parser.parse_args()
    rows = []
    for transform, source, shape, view in cases(arguments.quick):
        x = VIEWS[view](batch(SHAPES[shape], transform.layout, source))
        numba_seconds, numpy_seconds = measure(transform, x, arguments.threads)
        if numpy_seconds / numba_seconds < MIN_RATIO:
            repetitions = [measure(transform, x, arguments.threads) for _ in range(2)]
            numba_seconds, numpy_seconds = sorted(
                [(numba_seconds, numpy_seconds), *repetitions], key=lambda pair: pair[1] / pair[0]
            )[1]
        ratio = numpy_seconds / numba_seconds
        rows.append(
            {
                "direction": transform.direction,
                "mode": transform.mode.name,
                "types": f"{source} -> {transform.output_type(source)}",
                "layouts": f"{transform.layout} -> {transform.out_layout}",
                "batch": shape,
                "view": view,
                "numba_us": round(numba_seconds * 1e6, 1),
                "numpy_us": round(numpy_seconds * 1e6, 1),
                "ratio": round(ratio, 2),
            }
        )
        if ratio < MIN_RATIO:
            print("slower:", rows[-1], flush=True)
    ratios = sorted(row["ratio"] for row in rows)
    slower = sum(ratio < MIN_RATIO for ratio in ratios)
    print(
        f"{len(rows)} combinations on {arguments.threads} threads: {slower} slower than NumPy, "
        f"ratio min {ratios[0]}, median {statistics.median(ratios):.2f}, max {ratios[-1]}"
    )
    if not arguments.quick:
        RESULT.parent.mkdir(exist_ok=True)
        record = {"machine": machine(), "threads": arguments.threads, "rows": rows}
        RESULT.write_text(json.dumps(record, indent=0) + "\n")
    sys.exit(bool(slower))


if __name__ == "__main__":
    main()
