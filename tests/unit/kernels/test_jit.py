"""Kernels compiled for other processors: the same bits without AVX2, F16C and FMA."""

from __future__ import annotations

import pytest
from llvmlite import binding

from fastvgg.kernels.jit import processor
from tests.helpers.batches import run_script
from tests.helpers.samples import parts

needs_x86 = pytest.mark.skipif(
    not processor().is_x86, reason="compiles for named x86-64 processors"
)

# The features of this processor, ignoring the environment.
FEATURES = binding.get_host_cpu_features().flatten().split(",")

# Every pair of types, each in one rotating pair of layouts; both store types.
EXACT_RESULTS_SCRIPT = """
import re
import numpy as np
from tests.helpers.batches import assert_same, every_half
from tests.helpers.kernel_harness import LINE, TYPE_PAIRS, check, rotating_tasks
from fastvgg import engine, oracle
from fastvgg.kernels import convert
from fastvgg.kernels.vector import ELEMENT_BYTES
from fastvgg.kernels.jit import processor
from fastvgg.kernels.spec import KernelSpec
from fastvgg.transform import Mode, Transform

assert processor()[:3] == (True, False, False), processor()
for number in range({first}, len(TYPE_PAIRS), {step}):
    task = list(rotating_tasks(number))[(number + number // 4) % 4]
    size = ELEMENT_BYTES[task.target]
    check(task, 2, range(0, LINE + LINE // size, 3), range(0, LINE, max(8, size)))
    check(task, 1, [convert.TILE_PIXELS + 37], [0, size])
    check(task, 256, [1], [0])
    (assembly,) = convert.compile_kernel(task.spec).inspect_asm().values()
    assert not re.search({forbidden!r}, assembly), task
    assert re.search({expected!r}, assembly), task
if {first}:
    raise SystemExit  # the first part does the rest
x = np.repeat(np.arange(256, dtype=np.uint8), 3).reshape(1, 256, 3)
for mode in ("tf", "torch"):
    for dtype in ("float32", "float64"):
        transform = Transform(mode, dtype=dtype)
        assert KernelSpec.of(transform, "uint8").divide == "reciprocal"
        assert_same(engine.apply(transform, x, backend="numba"), oracle.apply(transform, x))
for half in ("float16", "bfloat16"):
    y = every_half(half)
    for mode in ("caffe", "torch"):
        for transform in (Transform(mode), Transform(mode, "restore")):
            assert_same(engine.apply(transform, y, backend="numba"), oracle.apply(transform, y))
    identity = Transform("identity", dtype="float32")
    wide = oracle.apply(identity, y)
    assert_same(engine.apply(identity, y, backend="numba"), wide)
    steps = (np.arange(wide.size, dtype=np.uint32) * 2654435761 >> 8).reshape(wide.shape)
    for low in (steps & 0xFFFF, 0x1000 + steps % 3 - 1, 0x8000 + steps % 3 - 1):
        x = (wide.view(np.uint32) & 0xFFFF0000 | low).astype(np.uint32).view(np.float32)
        narrow = Transform("identity", dtype=half)
        assert_same(engine.apply(narrow, x, backend="numba"), oracle.apply(narrow, x))
"""

FUSED = r"fn?m(?:add|sub)\d|rcp|rsqrt"
HALVES = r"vcvtph2ps|vcvtps2ph"


@needs_x86
@parts(8)
def test_results_are_exact_on_baseline_x86_64(part):
    forbidden = rf"{FUSED}|{HALVES}|%[yz]mm"
    script = EXACT_RESULTS_SCRIPT.format(first=part, step=8, forbidden=forbidden, expected="%xmm")
    run_script(script, NUMBA_CPU_NAME="generic", NUMBA_CPU_FEATURES="")


@needs_x86
@pytest.mark.skipif("+avx2" not in FEATURES, reason="this processor has no AVX2")
@parts(5)
def test_results_are_exact_with_avx2_but_without_f16c_and_fma(part):
    forbidden = rf"{FUSED}|{HALVES}|%zmm"
    script = EXACT_RESULTS_SCRIPT.format(
        first=3 * part, step=15, forbidden=forbidden, expected="%ymm"
    )
    features = "+sse3,+ssse3,+sse4.1,+sse4.2,+popcnt,+avx,+avx2"
    run_script(script, NUMBA_CPU_NAME="generic", NUMBA_CPU_FEATURES=features)
