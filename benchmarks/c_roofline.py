"""Validate the roofline of the kernels against an independent loop in C.

    python benchmarks/c_roofline.py            # takes two minutes; writes results/c_roofline.json
    python benchmarks/c_roofline.py --quick    # few rounds; writes nothing

The C loop is compiled for this processor with `cc -O3 -march=native`. For each ratio of bytes read
to bytes written its rounds are interleaved with those of `fastvgg.bench.memory.copy`, both with and
without prefetching, on the same memory and threads. If the faster C loop took less than 0.97 of the
time of the faster Numba loop, the roofline would be too low.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import subprocess
import tempfile
from functools import partial
from pathlib import Path

import numpy as np

from fastvgg.bench import memory
from fastvgg.bench.timing import machine, time_interleaved
from fastvgg.kernels.jit import processor
from fastvgg.parallel import available_cpus, parallel_for

RESULT = Path(__file__).parent / "results" / "c_roofline.json"
MAX_C_SPEEDUP = 1.03
LINE_BYTES = 64
BLOCKS_PER_THREAD = 8
# Bytes read and written per value, as for pairs of the supported storage types.
RATIOS = {"1:8": (1, 8), "1:4": (1, 4), "1:2": (1, 2), "1:1": (4, 4), "2:1": (2, 1), "4:1": (4, 1)}
RATIOS |= {"8:1": (8, 1)}

SOURCE = r"""
#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>

/* Write cache lines with non-temporal stores, each from `read` bytes: fewer than a line are
   repeated, more are combined by xor. */
void stream(const char *x, char *y, int64_t lines, int64_t read, int prefetches)
{
    for (int64_t line = 0; line < lines; line++, x += read, y += 64) {
        __m128i a, b, c, d;
        if (prefetches)
            for (int64_t at = 0; at < read; at += 64)
                _mm_prefetch(x + 3072 + at, _MM_HINT_NTA);
        if (read == 8) {
            a = b = c = d = _mm_set1_epi64x(*(const int64_t *)x);
        } else if (read == 16) {
            a = b = c = d = _mm_loadu_si128((const __m128i *)x);
        } else if (read == 32) {
            a = c = _mm_loadu_si128((const __m128i *)x);
            b = d = _mm_loadu_si128((const __m128i *)x + 1);
        } else {
            a = b = c = d = _mm_setzero_si128();
            for (const __m128i *p = (const __m128i *)x; p < (const __m128i *)(x + read); p += 4) {
                a = _mm_xor_si128(a, _mm_loadu_si128(p));
                b = _mm_xor_si128(b, _mm_loadu_si128(p + 1));
                c = _mm_xor_si128(c, _mm_loadu_si128(p + 2));
                d = _mm_xor_si128(d, _mm_loadu_si128(p + 3));
            }
        }
#ifdef __AVX__
        _mm256_stream_si256((__m256i *)y, _mm256_set_m128i(b, a));
        _mm256_stream_si256((__m256i *)y + 1, _mm256_set_m128i(d, c));
#else
        _mm_stream_si128((__m128i *)y, a);
        _mm_stream_si128((__m128i *)y + 1, b);
        _mm_stream_si128((__m128i *)y + 2, c);
        _mm_stream_si128((__m128i *)y + 3, d);
#endif
    }
    _mm_sfence();
}
"""


def compile_loop(directory):
    """Compile the loop and return it; ctypes releases the GIL while it runs."""
    source, library = directory / "stream.c", directory / "stream.so"
    source.write_text(SOURCE)
    command = ["cc", "-O3", "-march=native", "-funroll-loops", "-shared", "-fPIC", source]
    subprocess.run([*command, "-o", library], check=True)
    loop = ctypes.CDLL(str(library)).stream
    loop.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int]
    return loop


def copy(loop, x, out, threads, *, prefetches):
    """Copy the bytes of one array into another, split among threads."""
    lines, read = out.nbytes // LINE_BYTES, LINE_BYTES * x.nbytes // out.nbytes
    size = -(-lines // (threads * BLOCKS_PER_THREAD))

    def copy_block(first):
        count = min(size, lines - first)
        source, target = x.ctypes.data + first * read, out.ctypes.data + first * LINE_BYTES
        loop(source, target, count, read, prefetches)

    parallel_for(range(0, lines, size), copy_block, threads)


def measure(loop, arena, ratio, rounds, threads):
    """Compare the C loop with Numba's for a ratio of bytes read to bytes written."""
    read, written = RATIOS[ratio]
    source, result = np.zeros(3 * 4096 * read, np.uint8), np.zeros(3 * 4096 * written, np.uint8)
    x, out = arena.pair(arena.nbytes // (source.nbytes + result.nbytes), source, result)
    x, out = x.view(f"u{read}").reshape(-1, 3), out.view(f"u{written}").reshape(-1, 3)
    calls = [
        partial(copy_once, prefetch)
        for prefetch in (False, True)
        for copy_once in (
            lambda prefetch: memory.copy(x, out, threads, prefetch=prefetch),
            lambda prefetch: copy(loop, x, out, threads, prefetches=prefetch),
        )
    ]
    seconds = time_interleaved(calls, rounds)
    ours = min(seconds[0::2], key=statistics.median)
    theirs = min(seconds[1::2], key=statistics.median)
    ratios = sorted(mine / other for mine, other in zip(ours, theirs, strict=True))
    low, middle, high = statistics.quantiles(ratios, n=4)
    gigabytes = (x.nbytes + out.nbytes) / 1e9
    row = {"read:written": ratio, "c_of_ours": round(middle, 3)}
    row |= {"spread": [round(low, 3), round(high, 3)]}
    row |= {"gigabytes_per_second": round(gigabytes / statistics.median(ours), 1)}
    print(f"{ratio:6s} C at {middle:.3f} of ours ({low:.2f} to {high:.2f}), "
          f"{row['gigabytes_per_second']} GB/s", flush=True)  # fmt: skip
    return row


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    rounds, threads = 5 if arguments.quick else 31, available_cpus()
    arena = memory.Arena(400 * 2**20)
    with tempfile.TemporaryDirectory() as directory:
        loop = compile_loop(Path(directory))
        rows = [measure(loop, arena, ratio, rounds, threads) for ratio in RATIOS]
    faster = [row["read:written"] for row in rows if row["c_of_ours"] > MAX_C_SPEEDUP]
    print("C is faster by more than 3 %:", ", ".join(faster) or "none")
    if not arguments.quick:
        record = {"machine": machine(), "instruction_set": processor().name, "threads": threads}
        RESULT.write_text(json.dumps(record | {"rounds": rounds, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
