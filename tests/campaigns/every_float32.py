"""Restore every float32 to uint8 in each mode, and compare with the oracle.

    python -m tests.campaigns.every_float32  # all 2**32 bit patterns in each of three channels
    python -m tests.campaigns.every_float32 --every 4099

Prints the number of compared patterns; the exit code is 1 if any differ.
"""

from __future__ import annotations

import argparse
import sys
import time

import numpy as np

from fastvgg import Transform, engine, oracle
from fastvgg.parallel import available_cpus, parallel_for
from tests.helpers.batches import KERAS_MODES

PATTERNS = 2**32
TILE_PATTERNS = 2**15  # fits in the L2 cache together with the oracle's result


def count_differences(mode, first, step):
    """Return the numbers of patterns in a tile and of bytes that differ from the oracle."""
    patterns = np.arange(first, min(first + TILE_PATTERNS * step, PATTERNS), step, dtype=np.uint64)
    floats = patterns.astype(np.uint32).view(np.float32)
    y = np.repeat(floats, 3).reshape(1, -1, 3)
    y.flags.writeable = False
    restore = Transform(mode, "restore")
    actual = engine.apply(restore, y, threads=1, backend="numba")
    return len(floats), int((actual != oracle.apply(restore, y)).sum())


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--every", type=int, default=1, help="check one pattern in EVERY")
    step = parser.parse_args().every
    wrong = 0
    for mode in (*KERAS_MODES, "identity"):
        start_seconds = time.perf_counter()
        results = []
        parallel_for(
            range(0, PATTERNS, TILE_PATTERNS * step),
            lambda first, mode=mode, into=results: into.append(
                count_differences(mode, first, step)
            ),
            available_cpus(),
        )
        count, differ = (sum(column) for column in zip(*results, strict=True))
        wrong += differ
        seconds = time.perf_counter() - start_seconds
        print(f"{mode}: {count} patterns in 3 channels, {differ} bytes differ, {seconds:.0f} s")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
