"""Vector blocks one by one, each in a loop of its own, against NumPy."""

from __future__ import annotations

import math

import numpy as np
import pytest
from batches import assert_same, cast, dtype_of, frozen
from llvmlite import ir
from numba.core.cgutils import for_range

from fastvgg import oracle
from fastvgg.kernels import blocks
from fastvgg.kernels.compile import machine_code, processor

CANARY = 0xA5
HALVES = frozen(np.arange(65536, dtype=np.uint16))
LANES = (1, 3, 16, 48)  # one value, one pixel, a plane, pixels in registers


@pytest.fixture(params=["its own instructions for halves", "none"])
def halves(request, monkeypatch):
    """Blocks for this processor, and for one that has no instructions for halves."""
    if request.param == "none":
        lesser = processor()._replace(converts_halves=False)
        monkeypatch.setattr(blocks, "processor", lambda: lesser)


def through(emit, source, result, *, steps=1, source_bytes=0, result_bytes=0):
    """Fill an array with what a block makes of another, so many bytes further with each step.

    `emit` takes a builder and the addresses of what is read and of what is written.
    """

    def over(b, x, y, steps):
        with for_range(b, steps) as step:
            here = b.add(x, b.mul(step.index, ir.Constant(x.type, source_bytes)))
            there = b.add(y, b.mul(step.index, ir.Constant(y.type, result_bytes)))
            emit(b, here, there)

    machine_code(over, 3)(source.ctypes.data, result.ctypes.data, steps)
    return result


def padded(values, lanes):
    """The values, repeated until they fill whole vectors."""
    return np.resize(values, -(-len(values) // lanes) * lanes)


def each(make, values, source, target, lanes):
    """What `make`, a function of a builder and a vector, makes of values of a storage type."""
    values = padded(values, lanes)
    result = np.zeros(len(values), dtype_of(target))

    def emit(b, source_address, result_address):
        vector = blocks.load(b, source_address, source, lanes)
        blocks.store(b, make(b, vector), result_address)

    sizes = {"source_bytes": lanes * values.itemsize, "result_bytes": lanes * result.itemsize}
    return values, through(emit, values, result, steps=len(values) // lanes, **sizes)


# Memory and the order of lanes


@pytest.mark.parametrize("storage", sorted(blocks.ELEMENTS))
@pytest.mark.parametrize("lanes", LANES)
def test_what_is_loaded_is_stored_wherever_either_begins(storage, lanes):
    width = lanes * blocks.ELEMENT_BYTES[storage]
    source = np.arange(64 + width, dtype=np.uint8)
    result = np.full((64, width + 1), CANARY, np.uint8)

    def emit(b, source_address, result_address):
        blocks.store(b, blocks.load(b, source_address, storage, lanes), result_address)

    through(emit, source, result, steps=64, source_bytes=1, result_bytes=width + 1)
    for start in range(64):
        assert result[start].tolist() == [*source[start : start + width], CANARY]


def test_the_sizes_of_elements_are_those_of_numpy():
    sizes = {name: dtype_of(name).itemsize for name in blocks.ELEMENTS}
    assert sizes == blocks.ELEMENT_BYTES


@pytest.mark.parametrize("storage", ["uint8", "float16", "float32", "float64"])
@pytest.mark.parametrize("lanes", [1, 16])
def test_one_element_is_loaded_into_every_lane(storage, lanes):
    source = cast(np.array([77, 99]), storage)
    result = np.zeros(lanes, source.dtype)

    def emit(b, source_address, result_address):
        second = blocks.past(b, source_address, blocks.ELEMENT_BYTES[storage])
        blocks.store(b, blocks.load_everywhere(b, second, storage, lanes), result_address)

    through(emit, source, result)
    assert result.tolist() == [99] * lanes


@pytest.mark.parametrize("storage", ["uint8", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("pixels", [1, 2, 4, 8, 16])
def test_every_third_element_is_one_channel(storage, pixels):
    source = cast(np.arange(100, 100 + 3 * pixels), storage)
    result = np.zeros((3, pixels), source.dtype)
    size = blocks.ELEMENT_BYTES[storage]

    def emit(b, source_address, result_address):
        for channel in range(3):
            start = blocks.past(b, source_address, channel * size)
            vector = blocks.load_every_third(b, start, storage, pixels)
            blocks.store(b, vector, blocks.past(b, result_address, channel * pixels * size))

    through(emit, source, result)
    assert np.array_equal(result, source.reshape(pixels, 3).T)


@pytest.mark.parametrize("pixels", [1, 2, 4, 8, 16])
def test_three_planes_are_woven_into_pixels_and_pixels_are_flipped(pixels):
    planes = np.arange(1, 1 + 3 * pixels, dtype=np.uint8)
    woven, flipped = np.zeros_like(planes), np.zeros_like(planes)

    def weave(b, source_address, result_address):
        starts = [blocks.past(b, source_address, channel * pixels) for channel in range(3)]
        vectors = [blocks.load(b, start, "uint8", pixels) for start in starts]
        blocks.store(b, blocks.weave(b, vectors), result_address)

    def flip(b, source_address, result_address):
        vector = blocks.load(b, source_address, "uint8", 3 * pixels)
        blocks.store(b, blocks.flip(b, vector), result_address)

    through(weave, planes, woven)
    expected = planes.reshape(3, pixels).T
    assert np.array_equal(woven.reshape(pixels, 3), expected)
    through(flip, woven, flipped)
    assert np.array_equal(flipped.reshape(pixels, 3), expected[:, ::-1])


@pytest.mark.parametrize("parts", [1, 2, 4, 8])
def test_vectors_are_joined_one_behind_the_other(parts):
    source = np.arange(5 * parts, dtype=np.uint8)
    result = np.zeros_like(source)

    def emit(b, source_address, result_address):
        starts = [blocks.past(b, source_address, 5 * part) for part in range(parts)]
        vectors = [blocks.load(b, start, "uint8", 5) for start in starts]
        blocks.store(b, blocks.join(b, vectors), result_address)

    assert np.array_equal(through(emit, source, result), source)


# Types


@pytest.mark.parametrize("compute", ["float32", "float64"])
@pytest.mark.parametrize("half", ["float16", "bfloat16"])
@pytest.mark.parametrize("lanes", LANES)
def test_every_half_is_widened_as_numpy_widens_it(halves, lanes, half, compute):
    values, actual = each(
        lambda b, vector: blocks.widen(b, vector, half, compute),
        HALVES.view(dtype_of(half)),
        half,
        compute,
        lanes,
    )
    assert_same(actual, cast(values, compute))


def narrowed(values, half, lanes=16, compute="float32"):
    """Values of the compute type, and what the block that narrows makes of them."""
    return each(lambda b, vector: blocks.narrow(b, vector, half), values, compute, half, lanes)


@pytest.mark.parametrize("half", ["float16", "bfloat16"])
@pytest.mark.parametrize("lanes", LANES)
def test_every_half_is_narrowed_to_itself(halves, lanes, half):
    values = HALVES.view(dtype_of(half))
    _, actual = narrowed(cast(values, "float32"), half, lanes)
    assert_same(actual[: len(values)], values)


@pytest.mark.parametrize("half", ["float16", "bfloat16"])
def test_floats_with_any_upper_half_are_narrowed_as_numpy_narrows_them(halves, half):
    # The bits that are lost: just below, at and just above a tie, and the ends.
    ties = [0x1000, 0x2000, 0x8000]
    lowers = {0, 1, 0xFFFF, *ties, *(tie - 1 for tie in ties), *(tie + 1 for tie in ties)}
    lowers |= {0x1234, 0x3000, 0x5000, 0x7000, 0x9000, 0xB000, 0xD000, 0xF000, 0xEFFF, 0xF001}
    uppers = HALVES.astype(np.uint32) << 16
    values = np.concatenate([uppers | lower for lower in sorted(lowers)]).view(np.float32)
    _, actual = narrowed(values, half)
    assert_same(actual, cast(values, half))


@pytest.mark.parametrize("half", ["float16", "bfloat16"])
def test_what_lies_between_two_halves_is_narrowed_to_the_nearer_or_the_even_one(halves, half):
    patterns = HALVES[:-1]
    here = cast(patterns.view(dtype_of(half)), "float64")
    after = cast((patterns + np.uint16(1)).view(dtype_of(half)), "float64")
    with np.errstate(invalid="ignore"):
        middle = ((here + after) / 2)[np.isfinite(here + after)].astype(np.float32)
    assert len(middle) > 63_000
    assert len(np.unique(middle)) == len(middle)
    for steps in (-1, 0, 1):
        values = (middle.view(np.uint32) + np.uint32(steps % 2**32)).view(np.float32)
        values, actual = narrowed(values, half)
        assert_same(actual, cast(values, half))


@pytest.mark.parametrize("half", ["float16", "bfloat16"])
def test_a_double_is_rounded_to_float_first_and_then_to_half(halves, half):
    random = np.random.default_rng(0)
    # Doubles beside what a half is rounded at, where once is not the same as twice.
    ties = HALVES.astype(np.uint32) << 16 | (0x1000 if half == "float16" else 0x8000)
    near = cast(ties.view(np.float32), "float64")
    values = np.concatenate([near * (1 + step * 2.0**-40) for step in (-1, 0, 1)])
    values = np.concatenate([values, random.uniform(-7e4, 7e4, 3328)])
    values, actual = narrowed(values, half, compute="float64")
    assert_same(actual, cast(cast(values, "float32"), half))


def test_a_bfloat16_that_cannot_be_nan_is_narrowed_like_any_other():
    values = (HALVES.astype(np.uint32) << 16 | 0x8001).view(np.float32)
    values = values[~np.isnan(values)]
    values, actual = each(
        lambda b, vector: blocks.narrow(b, vector, "bfloat16", may_be_nan=False),
        values,
        "float32",
        "bfloat16",
        16,
    )
    assert_same(actual, cast(values, "bfloat16"))


@pytest.mark.parametrize("target", ["float32", "float64"])
@pytest.mark.parametrize("source", ["uint8", "float32", "float64"])
@pytest.mark.parametrize("lanes", LANES)
def test_other_types_are_converted_as_numpy_converts_them(source, target, lanes):
    random = np.random.default_rng(0)
    values = padded(np.arange(256), 768).astype(source)
    if source != "uint8":
        values[256:] = random.uniform(-300, 300, 512)
        values[256:264] = [np.inf, -np.inf, 0.0, -0.0, 1e-45, -1e-40, np.nan, 1e30]
    values, actual = each(
        lambda b, vector: blocks.widen(b, vector, source, target), values, source, target, lanes
    )
    assert_same(actual, cast(values, target))
    if source != "uint8":
        values, actual = each(
            lambda b, vector: blocks.narrow(b, vector, target), values, source, target, lanes
        )
        assert_same(actual, cast(values, target))


# Arithmetic


def rounded(values, compute, rounding, target, lanes=16):
    """What saturating and rounding make of values of the compute type."""

    def make(b, vector):
        round_to = blocks.round_to_bytes if target == "uint8" else blocks.round_to_floats
        return round_to(b, vector, rounding)

    return each(make, values, compute, target, lanes)


TABLE = [  # a value, what it is rounded to, and what it is truncated to
    (math.nan, 0, 0),
    (-math.nan, 0, 0),
    (-math.inf, 0, 0),
    (math.inf, 255, 255),
    (-1e30, 0, 0),
    (1e30, 255, 255),
    (-0.5, 0, 0),
    (-0.0, 0, 0),
    (2.0**-149, 0, 0),
    (0.25, 0, 0),
    (0.5, 0, 0),
    (0.75, 1, 0),
    (1.5, 2, 1),
    (2.5, 2, 2),
    (254.5, 254, 254),
    (254.75, 255, 254),
    (255.5, 255, 255),
    (256.0, 255, 255),
]


@pytest.mark.parametrize("lanes", LANES)
@pytest.mark.parametrize("compute", ["float32", "float64"])
def test_the_blocks_that_saturate_and_round_follow_the_table(compute, lanes):
    values, nearest, truncated = np.array(TABLE).T
    for rounding, expected in (("nearest", nearest), ("truncate", truncated)):
        for target in ("uint8", compute):
            _, actual = rounded(values.astype(compute), compute, rounding, target, lanes)
            assert_same(actual, padded(expected, lanes).astype(target))


@pytest.mark.parametrize("rounding", ["nearest", "truncate"])
@pytest.mark.parametrize("compute", ["float32", "float64"])
def test_every_value_beside_a_boundary_is_saturated_and_rounded_as_by_the_oracle(compute, rounding):
    scalar = np.dtype(compute).type
    places = np.arange(-4, 262, 0.25, dtype=compute)
    near = [places, np.nextafter(places, scalar(np.inf)), np.nextafter(places, scalar(-np.inf))]
    tiny = np.finfo(compute).smallest_subnormal
    ends = [
        np.nan,
        -np.nan,
        np.inf,
        -np.inf,
        0.0,
        -0.0,
        tiny,
        -tiny,
        2**23,
        2.0**31,
        2.0**32,
        2.0**52,
    ]
    values = np.concatenate([*near, np.array(ends, compute)])
    for target in ("uint8", compute):
        values, actual = rounded(values, compute, rounding, target)
        assert_same(actual, oracle.saturate(values, rounding).astype(target))


DIVISORS = (127.5, 255.0, 0.229, 0.224, 0.225, 3.0, 1.9999999, 1e30, 1e-30)


@pytest.mark.skipif(not processor().fuses, reason="the processor has no fused multiply-add")
@pytest.mark.parametrize("divisor", DIVISORS)
def test_to_divide_by_a_reciprocal_has_the_bits_of_a_division(divisor):
    x = np.arange(256, dtype=np.float32)
    number = np.float32(divisor)
    reciprocal = np.array([1 / number])
    rest = (1 / np.float64(number) - reciprocal).astype(np.float32)

    def make(b, vector):
        at = [blocks.ir.Constant(blocks.I64, row.ctypes.data) for row in (reciprocal, rest)]
        return blocks.divide_by_reciprocal(
            b, vector, *(blocks.load_everywhere(b, row, "float32", 16) for row in at)
        )

    _, actual = each(make, x, "float32", "float32", 16)
    assert_same(actual, x / number)
