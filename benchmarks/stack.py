"""Time the same call at 256 stack offsets: kernels must not depend on the depth of the caller.

    python benchmarks/stack.py            # takes minutes; writes results/stack.json
    python benchmarks/stack.py --quick    # fewer offsets and kernels; writes nothing

Accesses to a spilled register that crossed a page used to wait for non-temporal stores, and one
call in ten or twenty took up to 60 times as long. A compiled caller reserves a number of stack
bytes before it calls the kernel; the offsets are 16 bytes apart and cover a page.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import numba
import numpy as np
from llvmlite import ir
from numba.extending import intrinsic

from fastvgg.bench.kernels import COMMON_PATHS, example
from fastvgg.bench.timing import machine
from fastvgg.kernels import convert
from fastvgg.kernels.jit import processor
from fastvgg.kernels.spec import KernelSpec, constant_table

RESULT = Path(__file__).parent / "results" / "stack.json"
OFFSETS, STEP_BYTES = 256, 16
IMAGES, ROUNDS = 8, 15  # of 224x224: larger than the L2 cache
MAX_RATIO = 1.3


@intrinsic
def reserve(_context, _nbytes):
    """Reserve bytes of the stack until the function returns."""

    def emit(_, b, __, arguments):
        buffer = b.alloca(ir.IntType(8), size=arguments[0])
        kind = ir.FunctionType(ir.VoidType(), [ir.PointerType()])
        b.asm(kind, "", "r,~{memory}", [buffer], side_effect=True)

    return numba.void(numba.int64), emit


def caller_of(kernel):
    """Return a function that reserves bytes of the stack and then calls a kernel."""
    signature = numba.void(*[numba.int64] * (1 + convert.ARGUMENT_COUNT))

    @numba.njit(signature, nogil=True)
    def call(nbytes, x, y, table, images, pixels, a, b, c, d):
        reserve(nbytes)
        kernel(x, y, table, images, pixels, a, b, c, d)

    return call


def measure(path, offsets):
    """Return the minimum seconds over all rounds of a kernel at each stack offset."""
    example_image, result = example(path.transform, path.dtype)
    x = np.stack([example_image] * IMAGES)
    memory = np.zeros(IMAGES * result.nbytes + 64, np.uint8)
    start = memory.ctypes.data + -memory.ctypes.data % 64
    spec = KernelSpec.of(path.transform, path.dtype, nontemporal=True, has_aligned_planes=True)
    table = constant_table(path.transform.mode, spec)
    call = caller_of(convert.compile_kernel(spec))
    pixels = example_image.size // 3
    sizes = (example_image.nbytes, example_image.nbytes // 3, result.nbytes, result.nbytes // 3)
    seconds = [[] for _ in offsets]
    for _ in range(ROUNDS):
        for offset, durations in zip(offsets, seconds, strict=True):
            start_seconds = time.perf_counter()
            call(offset, x.ctypes.data, start, table.ctypes.data, IMAGES, pixels, *sizes)
            durations.append(time.perf_counter() - start_seconds)
    return [min(durations) for durations in seconds]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    offsets = [STEP_BYTES * number for number in range(OFFSETS)][:: 8 if quick else 1]
    paths = [path for path in COMMON_PATHS if path.out == "used"][:: 3 if quick else 1]
    rows = []
    for path in paths:
        seconds = measure(path, offsets)
        ratio = max(seconds) / statistics.median(seconds)
        print(
            f"{path.name:36s} slowest of {len(offsets)} offsets / median: {ratio:.2f}", flush=True
        )
        rows.append({"path": path.name, "slowest_of_median": round(ratio, 3)})
    slow = [row["path"] for row in rows if row["slowest_of_median"] > MAX_RATIO]
    print(f"above {MAX_RATIO}:", ", ".join(slow) or "none")
    if not quick:
        record = {"machine": machine(), "instruction_set": processor().name}
        record |= {"places": OFFSETS, "step_bytes": STEP_BYTES, "rows": rows}
        RESULT.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
