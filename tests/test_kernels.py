"""The compiled blocks one by one, what a loop may write, and what the compiler made of it."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import pytest
from batches import (
    LAYOUT_PAIRS,
    assert_same,
    byte_swapped,
    cast,
    dtype_of,
    every_value,
    frozen,
    in_layout,
    run_script,
    unaligned,
    unchanged,
)

from fastvgg import engine, oracle
from fastvgg.kernels import blocks, loops
from fastvgg.transform import Transform

CANARY = 0xA5
HALVES = np.arange(65536, dtype=np.uint16)

# Every remainder that a vector can leave, and both sides of where a tile ends and the next begins.
TILE = loops.TILE_PIXELS
WIDTHS = (*range(1, 41), TILE - 1, TILE, TILE + 1, 2 * TILE, 2 * TILE + 7)

CAFFE_FORWARD = loops.Recipe(
    restores=False,
    source="uint8",
    target="float32",
    compute="float32",
    planar_source=False,
    planar_target=False,
    flips=True,
    divides=False,
    scales=False,
    rounding="nearest",
)
CAFFE_MEAN = tuple(np.float32(value) for value in (103.939, 116.779, 123.68))
TORCH_FORWARD = CAFFE_FORWARD._replace(flips=False, divides=True, scales=True)


@pytest.mark.parametrize("half", ["float16", "bfloat16"])
def test_every_half_is_widened_as_numpy_widens_it(half):
    widen = blocks.load(half, "float32")
    expected = cast(HALVES.view(dtype_of(half)), "float32")
    actual = np.array([widen(pattern) for pattern in HALVES], np.float32)
    assert_same(actual, expected)


@pytest.mark.parametrize("half", ["float16", "bfloat16"])
def test_every_half_is_narrowed_to_itself(half):
    narrow = blocks.store(half)
    expected = HALVES.view(dtype_of(half))
    actual = np.array([narrow(value) for value in cast(expected, "float32")], np.uint16)
    assert_same(actual.view(expected.dtype), expected)


@pytest.mark.parametrize("half", ["float16", "bfloat16"])
@pytest.mark.parametrize("lower", [0x0000, 0x0001, 0x0FFF, 0x1000, 0x1001, 0x8000, 0x8001, 0xFFFF])
def test_floats_with_any_upper_half_are_narrowed_as_numpy_narrows_them(half, lower):
    narrow = blocks.store(half)
    values = ((HALVES.astype(np.uint32) << 16) | lower).view(np.float32)
    expected = cast(values, half)
    actual = np.array([narrow(value) for value in values], np.uint16)
    assert_same(actual.view(expected.dtype), expected)


@pytest.mark.parametrize("storage", ["uint8", "float32", "float64"])
@pytest.mark.parametrize("compute", ["float32", "float64"])
def test_whole_numbers_pass_through_every_other_type(storage, compute):
    load, store = blocks.load(storage, compute), blocks.store(storage)
    numbers = np.arange(256, dtype=storage)
    assert [load(number) for number in numbers] == [float(number) for number in range(256)]
    assert [store(number) for number in numbers.astype(compute)] == list(range(256))


@pytest.mark.parametrize(
    ("value", "nearest", "truncated"),
    [
        (math.nan, 0, 0),
        (-math.inf, 0, 0),
        (math.inf, 255, 255),
        (-1e30, 0, 0),
        (1e30, 255, 255),
        (-0.5, 0, 0),
        (-0.0, 0, 0),
        (2.0**-149, 0, 0),
        (0.5, 0, 0),
        (0.75, 1, 0),
        (1.5, 2, 1),
        (2.5, 2, 2),
        (254.5, 254, 254),
        (254.75, 255, 254),
        (255.5, 255, 255),
        (256.0, 255, 255),
    ],
)
@pytest.mark.parametrize("compute", ["float32", "float64"])
def test_the_block_that_saturates_follows_the_table(compute, value, nearest, truncated):
    scalar = np.dtype(compute).type(value)
    for rounding, expected in (("nearest", nearest), ("truncate", truncated)):
        actual = blocks.saturate(compute, rounding)(scalar)
        assert actual == expected
        assert math.copysign(1, actual) == 1


def surrounded(shape, dtype):
    """An array in the middle of canaries, and the bytes before and after it."""
    edge = 192
    size = int(np.prod(shape)) * dtype.itemsize
    memory = np.full(edge + size + edge, CANARY, np.uint8)
    return memory[edge : edge + size].view(dtype).reshape(shape), memory[:edge], memory[-edge:]


@pytest.mark.parametrize(
    ("direction", "source", "target"),
    [
        ("preprocess", "uint8", "float32"),
        ("preprocess", "uint8", "float64"),
        ("preprocess", "uint8", "float16"),
        ("preprocess", "bfloat16", "bfloat16"),
        ("restore", "float32", "uint8"),
        ("restore", "float16", "uint8"),
    ],
)
@pytest.mark.parametrize(("layout", "out_layout"), LAYOUT_PAIRS)
def test_nothing_is_written_beside_out_for_any_width(direction, source, target, layout, out_layout):
    transform = Transform("caffe", direction, layout, out_layout, target)
    for width in WIDTHS:
        batch = np.arange(2 * width * 3).reshape(2, 1, width, 3).astype(dtype_of(source))
        x = frozen(in_layout(batch, layout))
        expected = oracle.apply(transform, x)
        out, before, after = surrounded(expected.shape, expected.dtype)
        with unchanged(x):
            engine.apply(transform, x, out, backend="numba")
        assert_same(out, expected)
        assert (before == CANARY).all()
        assert (after == CANARY).all()


@pytest.mark.parametrize("planar_source", [False, True])
@pytest.mark.parametrize("planar_target", [False, True])
def test_a_loop_writes_the_pixels_asked_for_and_no_other(planar_source, planar_target):
    loop = loops.compiled(
        CAFFE_FORWARD._replace(planar_source=planar_source, planar_target=planar_target)
    )
    extent = WIDTHS[-1] + 20
    pixels = frozen(np.resize(every_value().reshape(-1, 3)[1:], (2, extent, 3)))
    source = frozen(pixels.swapaxes(1, 2).copy()) if planar_source else pixels
    wanted = pixels[..., ::-1].astype(np.float32) - np.array(CAFFE_MEAN)
    for count in WIDTHS:
        expected = np.full((4, extent, 3), CANARY, np.float32)
        expected[2, 11 : 11 + count] = wanted[1, 7 : 7 + count]
        target = np.full((4, 3, extent) if planar_target else expected.shape, CANARY, np.float32)
        loop(source, target, (1, 7), (2, 11), (1, count), np.float32(1), CAFFE_MEAN, CAFFE_MEAN)
        actual = target.swapaxes(1, 2) if planar_target else target
        assert np.array_equal(actual, expected)


@pytest.mark.parametrize("planar", [False, True])
@pytest.mark.parametrize("flips", [False, True])
def test_a_loop_works_in_place_for_any_width(flips, planar):
    loop = loops.compiled(
        CAFFE_FORWARD._replace(
            source="float32", planar_source=planar, planar_target=planar, flips=flips
        )
    )
    pixels = frozen(np.resize(every_value().reshape(-1, 3)[1:], (2, WIDTHS[-1], 3)))
    for count in WIDTHS:
        batch = pixels[:, :count].astype(np.float32)
        expected = batch[..., ::-1] if flips else batch
        expected = expected - np.array(CAFFE_MEAN)
        x = batch.swapaxes(1, 2).copy() if planar else batch
        loop(frozen(x[:]), x, (0, 0), (0, 0), (2, count), np.float32(1), CAFFE_MEAN, CAFFE_MEAN)
        actual = x.swapaxes(1, 2) if planar else x
        assert np.array_equal(actual, expected)


@pytest.mark.parametrize("count", [(0, 40), (2, 0), (0, 0)])
def test_a_loop_over_nothing_writes_nothing(count):
    source = np.zeros((2, 40, 3), np.uint8)
    target = np.full((2, 40, 3), CANARY, np.float32)
    loop = loops.compiled(CAFFE_FORWARD)
    loop(source, target, (0, 0), (0, 0), count, np.float32(1), CAFFE_MEAN, CAFFE_MEAN)
    assert (target == CANARY).all()


def test_one_recipe_is_one_loop_and_another_recipe_is_another():
    assert loops.compiled(CAFFE_FORWARD) is loops.compiled(CAFFE_FORWARD._replace())
    assert loops.compiled(CAFFE_FORWARD) is not loops.compiled(TORCH_FORWARD)


@pytest.mark.parametrize("compute", ["float32", "float64"])
@pytest.mark.parametrize("restores", [False, True])
@pytest.mark.parametrize("planar", [False, True])
def test_no_multiplication_and_addition_are_fused_and_no_quotient_is_approximated(
    planar, restores, compute
):
    source, target = (compute, "uint8") if restores else ("uint8", compute)
    loop = loops.compiled(
        TORCH_FORWARD._replace(
            restores=restores,
            source=source,
            target=target,
            compute=compute,
            planar_source=planar,
            planar_target=planar,
        )
    )
    shape = (2, 3, 40) if planar else (2, 40, 3)
    one = np.dtype(compute).type(1)
    x, out = np.ones(shape, source), np.ones(shape, target)
    loop(x, out, (0, 0), (0, 0), (2, 40), one, (one, one, one), (one, one, one))
    assembly = "\n".join(loop.inspect_asm().values())
    arithmetic = r"\bv?f?mul[ps][sd]?\b" if restores else r"\b(v?div[ps][sd]|fdiv)\b"
    assert re.search(arithmetic, assembly)
    assert not re.findall(r"\bv?(?:fn?m(?:add|sub)|fml[as]|rcp|frecp|rsqrt)\w*", assembly)


# In a process of its own, where no other test has compiled anything yet.
COMPILED_ONCE = """
import sys
sys.path.insert(0, {tests!r})
import numpy as np
from batches import byte_swapped, every_value, frozen, in_layout, unaligned
import fastvgg
from fastvgg.kernels import loops
from fastvgg.transform import Mode

batch = in_layout(every_value().astype({source!r}), {layout!r})
big = np.zeros((4, *batch.shape[1:]), batch.dtype)
inputs = [batch, frozen(batch.copy()), big[::2], unaligned(batch), byte_swapped(batch), batch[0]]
for mode in (Mode.CAFFE, Mode("other means", mean=(1.0, 2.0, 3.0), order="BGR")):
    for x in inputs:
        fastvgg.preprocess(x, mode, layout={layout!r}, backend="numba")
if {source!r} == "float32":
    fastvgg.preprocess(batch, "caffe", layout={layout!r}, out=batch, backend="numba")
planar = {layout!r} == "NCHW"
recipe = loops.Recipe(
    restores=False, source={source!r}, target="float32", compute="float32",
    planar_source=planar, planar_target=planar,
    flips=True, divides=False, scales=False, rounding="nearest",
)
loop = loops.compiled(recipe)
assert loops.compiled.cache_info().currsize == 1, loops.compiled.cache_info()
assert len(loop.signatures) == 1, loop.signatures
"""


@pytest.mark.parametrize(("source", "layout"), [("uint8", "NHWC"), ("float32", "NCHW")])
def test_a_loop_is_compiled_once_for_whatever_input_it_is_given(source, layout):
    tests = str(Path(__file__).parent)
    run_script(COMPILED_ONCE.format(tests=tests, source=source, layout=layout))


@pytest.mark.parametrize(
    ("view", "expected"),
    [
        (np.array, False),
        (unaligned, True),
        (byte_swapped, True),
        (lambda x: x[:, ::-1], True),
        (lambda x: x[:, ::2], True),
    ],
    ids=["contiguous", "unaligned", "byte-swapped", "reversed", "stepped"],
)
def test_no_loop_is_given_what_it_cannot_read_where_it_lies(view, expected):
    x = view(every_value().astype(np.float32))
    job = engine._kernel_job(Transform("caffe"), x, np.empty(x.shape, np.float32))
    assert job.gathers is expected


def test_loops_are_compiled_with_ieee_arithmetic_and_without_the_interpreter_lock():
    for recipe in (TORCH_FORWARD, TORCH_FORWARD._replace(planar_source=True, planar_target=True)):
        options = loops.compiled(recipe).targetoptions
        assert options["nogil"]
        assert options["error_model"] == "numpy"
        assert not options.get("fastmath")
        assert not options.get("parallel")
