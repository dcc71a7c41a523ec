"""Vector operations, each in a separate kernel, compared with NumPy."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fastvgg import oracle
from fastvgg.kernels import arithmetic, jit, memory, order, vector
from fastvgg.kernels.jit import always_inline, kernel, processor
from fastvgg.kernels.memory import TABLE_COLUMNS
from fastvgg.kernels.vector import ELEMENT_BYTES
from tests.helpers.batches import assert_same, cast, dtype_of, frozen, with_canonical_nan
from tests.helpers.samples import sampled

CANARY = 0xA5
HALVES = frozen(np.arange(65536, dtype=np.uint16))
LANES = (1, 16)  # a pixel or a value, and a block


@pytest.fixture(params=["F16C if available", "none"])
def halves(request, monkeypatch):
    """Test on this processor, and as if it had no F16C instructions."""
    if request.param == "none":
        restricted = processor()._replace(has_f16c=False)
        monkeypatch.setattr(jit, "processor", lambda: restricted)
    for made in (arithmetic.widen, arithmetic.narrow):
        made.cache_clear()
    yield
    for made in (arithmetic.widen, arithmetic.narrow):
        made.cache_clear()


def padded(values, lanes):
    """Repeat values until they fill complete vectors."""
    return np.resize(values, -(-len(values) // lanes) * lanes)


def apply_blocks(operation, values, source, target, lanes, vectors=1):
    """Apply an operation to blocks of values; return the padded values and the results."""
    values = padded(values, lanes * vectors)
    result = np.zeros(len(values), dtype_of(target))
    load, store = memory.load(source, lanes, vectors), memory.store(nontemporal=False)
    source_step, step = lanes * ELEMENT_BYTES[source], lanes * ELEMENT_BYTES[target]

    @kernel(3)
    def over(x, y, blocks):
        for _ in range(blocks):
            store(y, step, operation(load(x, source_step)))
            x += source_step * vectors
            y += step * vectors

    over(values.ctypes.data, result.ctypes.data, len(values) // (lanes * vectors))
    return values, result


def loaded(load, storage, lanes, vectors, address):
    """Return the vectors that an intrinsic loads from an address."""
    result = np.zeros((vectors, lanes), dtype_of(storage))
    store, step = memory.store(nontemporal=False), lanes * ELEMENT_BYTES[storage]

    @kernel(2)
    def once(x, y):
        store(y, step, load(x))

    once(address, result.ctypes.data)
    return result


def split(values, lanes):
    """Reorder each vector: even lanes before odd lanes."""
    vectors = values.reshape(-1, lanes)
    return np.concatenate([vectors[:, ::2], vectors[:, 1::2]], axis=1).ravel()


# Memory and the order of lanes


@pytest.mark.parametrize("storage", sorted(vector.ELEMENTS))
@pytest.mark.parametrize(("lanes", "vectors"), [(1, 1), (1, 3), (16, 1), (16, 3)])
def test_vectors_are_loaded_and_stored_at_any_alignment(storage, lanes, vectors):
    width = lanes * ELEMENT_BYTES[storage]
    source = np.arange(64 + 2 * vectors * width + 7, dtype=np.uint8)
    load, store = memory.load(storage, lanes, vectors), memory.store(nontemporal=False)

    @kernel(4)
    def move(x, source_step, y, step):
        store(y, step, load(x, source_step))

    for start in range(64):
        result = np.full((vectors, width + 5), CANARY, np.uint8)
        move(source.ctypes.data + start, width + 3, result.ctypes.data, width + 5)
        for number, row in enumerate(result):
            first = start + number * (width + 3)
            assert row.tolist() == [*source[first : first + width], *[CANARY] * 5]


def test_element_sizes_match_numpy():
    sizes = {name: dtype_of(name).itemsize for name in vector.ELEMENTS}
    assert sizes == ELEMENT_BYTES


@pytest.mark.parametrize("nbytes", [8, 16, 64, 256])
def test_load_line_repeats_or_combines_bytes(nbytes):
    source = np.random.default_rng(0).integers(0, 256, nbytes, np.uint8)
    load_line = memory.load_line(nbytes)
    load = always_inline(lambda address: load_line(address, 0))
    (line,) = loaded(load, "uint8", 64, 1, source.ctypes.data)
    if nbytes < 64:
        assert line.tolist() == np.tile(source, 64 // nbytes).tolist()
    else:
        assert line.tolist() == np.bitwise_xor.reduce(source.reshape(-1, 64)).tolist()


@pytest.mark.parametrize("lanes", [16, 32, 64])
@pytest.mark.parametrize("storage", ["bfloat16", "float32", "float64"])
def test_one_channel_of_interleaved_pixels_is_loaded(storage, lanes):
    source = cast(np.arange(1, 1 + 3 * lanes), storage)
    load_channel = memory.load_channel(storage, lanes)
    load = always_inline(lambda address: load_channel(address, 0))
    for channel in range(3):
        start = source.ctypes.data + channel * source.itemsize
        actual = loaded(load, storage, lanes, 1, start)
        assert_same(actual[0], np.ascontiguousarray(source[channel::3]))


@pytest.mark.parametrize("lanes", [16, 32])
@pytest.mark.parametrize("compute", ["float32", "float64"])
def test_bytes_are_loaded_in_any_order_of_channels(compute, lanes):
    source = np.random.default_rng(0).permutation(256).astype(np.uint8)[: 3 * lanes]
    numbers = np.arange(3 * lanes).reshape(lanes, 3)
    both = numbers.ravel(), numbers[:, ::-1].ravel()
    planes = numbers.T.ravel(), numbers.T[::-1].ravel()
    for offsets in (*both, *planes, *(split(values, lanes) for values in both)):
        load_bytes = memory.load_bytes(tuple(offsets.tolist()), lanes, 3 * lanes, compute)
        load = always_inline(lambda x, load_bytes=load_bytes: load_bytes(x, 0))
        actual = loaded(load, compute, lanes, 3, source.ctypes.data)
        assert_same(actual.ravel(), source[offsets].astype(compute))


def test_load_bytes_rejects_offsets_that_one_shuffle_cannot_reach():
    with pytest.raises(ValueError, match="15 bytes are less than a window of 16"):
        memory.load_bytes((0, 1, 2, 3), 4, 15, "float32")
    with pytest.raises(ValueError, match=r"16 bytes .* offsets 0, 6, 12, 18$"):
        memory.load_bytes(tuple(range(0, 96, 6)), 16, 96, "float32")


@pytest.mark.parametrize("lanes", [16, 32])
def test_bytes_are_loaded_from_three_planes(lanes):
    source = np.random.default_rng(0).permutation(256).astype(np.uint8)[: 3 * 35]
    offsets = split(np.arange(lanes), lanes)
    load_bytes = memory.load_bytes(tuple(offsets.tolist()), lanes, lanes, "float32", places=3)
    load = always_inline(lambda x: load_bytes(x, 35))
    actual = loaded(load, "float32", lanes, 3, source.ctypes.data)
    assert_same(actual, source.reshape(3, 35)[:, offsets].astype(np.float32))


@pytest.mark.parametrize("lanes", [16, 32, 64])
@pytest.mark.parametrize("compute", ["float32", "float64"])
def test_constants_are_loaded_interleaved_split_and_per_channel(compute, lanes):
    table = np.arange(9 * 3, dtype=compute).reshape(9, 3)
    table[:3] = table[:3, :1]  # the same for all channels
    rows = np.ascontiguousarray(np.tile(table, TABLE_COLUMNS // 3))
    one, step = rows.itemsize, lanes * rows.itemsize
    load_interleaved = memory.load_interleaved_constants(compute, lanes)
    load_split = memory.load_interleaved_constants(compute, lanes, split=True)
    load_channels = memory.load_channel_constants(compute, lanes, 3)
    load_channel = memory.load_channel_constants(compute, 1, 1)
    store = memory.store(nontemporal=False)
    interleaved, halved, channels, last = (np.zeros((9, 3, lanes), compute) for _ in range(4))

    @always_inline
    def store_all(y, step, c):
        store(y, step, c.divide)
        store(y + 3 * step, step, c.divide_reciprocal)
        store(y + 6 * step, step, c.divide_reciprocal_low)
        store(y + 9 * step, step, c.mean)
        store(y + 12 * step, step, c.std)
        store(y + 15 * step, step, c.std_reciprocal)
        store(y + 18 * step, step, c.std_reciprocal_low)
        store(y + 21 * step, step, c.slope)
        store(y + 24 * step, step, c.intercept)

    @kernel(5)
    def store_tables(table, a, b, c, d):
        store_all(a, step, load_interleaved(table))
        store_all(b, step, load_split(table))
        store_all(c, step, load_channels(table))
        store_all(d, step, load_channel(table + 2 * one))

    store_tables(*(part.ctypes.data for part in (rows, interleaved, halved, channels, last)))
    assert_same(interleaved.reshape(9, 3 * lanes), np.tile(table, lanes))
    assert_same(halved.ravel(), split(np.tile(table, lanes), lanes))
    assert_same(channels, np.repeat(table[:, :, np.newaxis], lanes, axis=2))
    assert_same(np.ascontiguousarray(last[:, 0, 0]), np.ascontiguousarray(table[:, 2]))


@sampled(
    "storage, lanes, min_permute_bytes",
    *(["uint8", "bfloat16", "float32", "float64"], [*LANES, 32, 64], [1, 16]),
    one_in=2,
)
def test_channels_are_reversed_and_planes_interleaved(
    monkeypatch, storage, lanes, min_permute_bytes
):
    changed = processor()._replace(min_permute_bytes=min_permute_bytes)
    monkeypatch.setattr(jit, "processor", lambda: changed)
    values = cast(np.arange(1, 1 + 3 * lanes), storage)
    pixels = values.reshape(lanes, 3)
    planes = values.reshape(3, lanes)
    for operation, expected in (
        (order.reverse_channels, pixels[:, ::-1]),
        (order.reverse_planes, planes[::-1]),
        (order.interleave, planes.T),
        (order.deinterleave, pixels.T),
    ):
        _, actual = apply_blocks(operation, values, storage, storage, lanes, vectors=3)
        assert_same(actual, np.ascontiguousarray(expected).ravel())


@pytest.mark.parametrize("lanes", [16, 32, 64])
def test_split_vectors_are_merged(lanes):
    values = np.arange(3 * lanes, dtype=np.uint8)
    _, actual = apply_blocks(order.merge, split(values, lanes), "uint8", "uint8", lanes, vectors=3)
    assert_same(actual, values)


# Types


@pytest.mark.parametrize("lanes", [16, 32])
def test_every_bfloat16_round_trips_through_split_vectors(lanes):
    widen = arithmetic.widen("bfloat16", "float32", split=True)
    values, actual = apply_blocks(
        always_inline(lambda block: arithmetic.canonical_nan(widen(block))),
        HALVES.view(dtype_of("bfloat16")),
        "bfloat16",
        "float32",
        lanes,
    )
    assert_same(actual, split(cast(values, "float32"), lanes))
    narrow = arithmetic.narrow("bfloat16", split=True)
    _, narrowed = apply_blocks(narrow, actual, "float32", "bfloat16", lanes)
    assert_same(narrowed, with_canonical_nan(values))


@pytest.mark.parametrize("compute", ["float32", "float64"])
@pytest.mark.parametrize("half", ["float16", "bfloat16"])
@pytest.mark.parametrize("lanes", LANES)
def test_every_16_bit_float_is_widened_like_numpy(halves, lanes, half, compute):
    widen, canonical_nan = arithmetic.widen(half, compute), arithmetic.canonical_nan

    @always_inline
    def operation(block):
        return canonical_nan(widen(block))

    values, actual = apply_blocks(
        operation,
        HALVES.view(dtype_of(half)),
        half,
        compute,
        lanes,
    )
    assert_same(actual, cast(values, compute))


def narrowed(values, half, lanes=16, compute="float32"):
    """Narrow values of the compute type; return the padded values and results."""
    narrow, canonical_nan = arithmetic.narrow(half), arithmetic.canonical_nan

    @always_inline
    def operation(block):
        return narrow(canonical_nan(block))

    return apply_blocks(operation, values, compute, half, lanes)


@pytest.mark.parametrize("half", ["float16", "bfloat16"])
@pytest.mark.parametrize("lanes", LANES)
def test_every_16_bit_float_is_narrowed_to_itself(halves, lanes, half):
    values = HALVES.view(dtype_of(half))
    _, actual = narrowed(cast(values, "float32"), half, lanes)
    assert_same(actual[: len(values)], with_canonical_nan(values.copy()))


@pytest.mark.parametrize("half", ["float16", "bfloat16"])
def test_floats_with_any_upper_16_bits_are_narrowed_like_numpy(halves, half):
    # The bits that are lost: just below, at and just above a tie, and the ends.
    ties = [0x1000, 0x2000, 0x8000]
    lowers = {0, 1, 0xFFFF, *ties, *(tie - 1 for tie in ties), *(tie + 1 for tie in ties)}
    lowers |= {0x1234, 0x3000, 0x5000, 0x7000, 0x9000, 0xB000, 0xD000, 0xF000, 0xEFFF, 0xF001}
    uppers = HALVES.astype(np.uint32) << 16
    values = np.concatenate([uppers | lower for lower in sorted(lowers)]).view(np.float32)
    _, actual = narrowed(values, half)
    assert_same(actual, cast(values, half))


@pytest.mark.parametrize("half", ["float16", "bfloat16"])
def test_midpoints_of_16_bit_floats_are_narrowed_half_to_even(halves, half):
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
def test_float64_is_narrowed_through_float32(halves, half):
    random = np.random.default_rng(0)
    # Doubles next to the ties of a half, where double rounding differs from single rounding.
    ties = HALVES.astype(np.uint32) << 16 | (0x1000 if half == "float16" else 0x8000)
    near = cast(ties.view(np.float32), "float64")
    values = np.concatenate([near * (1 + step * 2.0**-40) for step in (-1, 0, 1)])
    values = np.concatenate([values, random.uniform(-7e4, 7e4, 3328)])
    values, actual = narrowed(values, half, compute="float64")
    assert_same(actual, cast(cast(values, "float32"), half))


def test_narrowing_without_ties_rounds_to_the_nearest_bfloat16():
    uppers = HALVES.astype(np.uint32) << 16
    values = np.concatenate([uppers | lower for lower in (0, 1, 0x7FFF, 0x8001, 0xFFFF)])
    values = values.view(np.float32)
    values = values[np.isfinite(values)]
    values, actual = apply_blocks(
        arithmetic.narrow("bfloat16", has_ties=False), values, "float32", "bfloat16", 16
    )
    assert_same(actual, cast(values, "bfloat16"))


@pytest.mark.parametrize("target", ["float32", "float64"])
@pytest.mark.parametrize("source", ["uint8", "float32", "float64"])
@pytest.mark.parametrize("lanes", LANES)
def test_other_dtypes_are_converted_like_numpy(source, target, lanes):
    random = np.random.default_rng(0)
    values = padded(np.arange(256), 768).astype(source)
    if source != "uint8":
        values[256:] = random.uniform(-300, 300, 512)
        values[256:264] = [np.inf, -np.inf, 0.0, -0.0, 1e-45, -1e-40, np.nan, 1e30]
    values, actual = apply_blocks(arithmetic.widen(source, target), values, source, target, lanes)
    assert_same(actual, cast(values, target))
    if source != "uint8":
        values, actual = apply_blocks(arithmetic.narrow(target), values, source, target, lanes)
        assert_same(actual, cast(values, target))


# Arithmetic


def rounded(values, compute, rounding, target, lanes=16):
    """Saturate and round values of the compute type; return the padded values and results."""

    if target == "uint8":
        return apply_blocks(arithmetic.round_to_uint8(rounding), values, compute, target, lanes)
    return apply_blocks(arithmetic.round_to_float(rounding), values, compute, target, lanes)


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


@pytest.mark.parametrize("lanes", [*LANES, 32, 64])
@pytest.mark.parametrize("compute", ["float32", "float64"])
def test_saturate_and_round_blocks_follow_the_table(compute, lanes):
    values, nearest, truncated = np.array(TABLE).T
    for rounding, expected in (("nearest", nearest), ("truncate", truncated)):
        for target in ("uint8", compute):
            _, actual = rounded(values.astype(compute), compute, rounding, target, lanes)
            assert_same(actual, padded(expected, lanes).astype(target))


@pytest.mark.parametrize("rounding", ["nearest", "truncate"])
@pytest.mark.parametrize("compute", ["float32", "float64"])
@pytest.mark.parametrize("lanes", [16, 32, 64])
def test_values_next_to_rounding_boundaries_match_oracle(compute, rounding, lanes):
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
        values, actual = rounded(values, compute, rounding, target, lanes)
        assert_same(actual, oracle.saturate(values, rounding).astype(target))


DIVISORS = (127.5, 255.0, 0.229, 0.224, 0.225, 3.0, 1.9999999, 1e30, 1e-30)


@pytest.mark.parametrize("compute", ["float32", "float64"])
def test_reciprocal_division_without_fma_is_the_sum_of_two_products(compute, monkeypatch):
    restricted = processor()._replace(has_fma=False)
    monkeypatch.setattr(jit, "processor", lambda: restricted)
    x = np.random.default_rng(0).uniform(-1e3, 1e3, 256).astype(compute)
    number, rest = x.dtype.type(1 / 0.229), x.dtype.type(1e-4)
    assert_same(divided("reciprocal", x, x[0], number, rest), x * number + x * rest)


@pytest.mark.skipif(not processor().has_fma, reason="the processor has no fused multiply-add")
@pytest.mark.parametrize("divisor", DIVISORS)
def test_reciprocal_division_matches_true_division(divisor):
    x = np.arange(256, dtype=np.float32)
    number = np.float32(divisor)
    with np.errstate(over="ignore"):
        reciprocal = 1 / number
        remainder = (1 / np.float64(number) - reciprocal).astype(np.float32)
    assert_same(divided("reciprocal", x, number, reciprocal, remainder), x / number)


@pytest.mark.parametrize("compute", ["float32", "float64"])
def test_divide_supports_division_and_none(compute):
    x = np.random.default_rng(0).uniform(-1e3, 1e3, 256).astype(compute)
    number = x.dtype.type(0.229)
    assert_same(divided("division", x, number, x[1], x[2]), x / number)
    assert_same(divided("none", x, number, x[1], x[2]), x)


@pytest.mark.parametrize("restricted", [False, True])
def test_multiply_add_rounds_once_with_fma_and_twice_without(restricted, monkeypatch):
    x = np.arange(256, dtype=np.float32)
    slope, intercept = np.float32(1 / 255 / 0.229), np.float32(-0.485 / 0.229)
    if restricted:
        monkeypatch.setattr(jit, "processor", lambda: processor()._replace(has_fma=False))
    multiply_add = arithmetic.multiply_add
    actual = apply_with_constants(
        lambda x, a, b, _: multiply_add(x, a, b), x, (slope, intercept, slope)
    )
    once = (x.astype(np.float64) * slope + intercept).astype(np.float32)
    twice = x * slope + intercept
    assert (once != twice).any()
    assert_same(actual, twice if restricted or not processor().has_fma else once)


def divided(division, x, divisor, reciprocal, remainder):
    """Apply `divide` to numbers with a divisor, its reciprocal and its remainder."""
    divide = arithmetic.divide(division)
    return apply_with_constants(
        lambda x, a, b, c: divide(x, a, b, c), x, (divisor, reciprocal, remainder)
    )


def apply_with_constants(operation, x, numbers):
    """Apply an operation to an array and three broadcast constants."""
    operation, compute = always_inline(operation), x.dtype.name
    load, store, step = (
        memory.load(compute, 16, 1),
        memory.store(nontemporal=False),
        16 * x.itemsize,
    )
    rows = np.repeat(numbers, 16).astype(compute)
    result = np.zeros_like(x)

    @kernel(4)
    def over(x, rows, y, blocks):
        a, b, c = load(rows, 0), load(rows + step, 0), load(rows + 2 * step, 0)
        for _ in range(blocks):
            store(y, 0, operation(load(x, 0), a, b, c))
            x += step
            y += step

    over(x.ctypes.data, rows.ctypes.data, result.ctypes.data, len(x) // 16)
    return result


@pytest.mark.parametrize("compute", ["float32", "float64"])
def test_vector_operators_match_numpy(compute):
    random = np.random.default_rng(0)
    x, y = (random.uniform(-1e3, 1e3, 48).astype(compute) for _ in range(2))
    load, store, step = (
        memory.load(compute, 16, 3),
        memory.store(nontemporal=False),
        x.itemsize * 16,
    )
    result = np.zeros((4, 48), compute)

    @kernel(3)
    def operate(x, y, z):
        a, b = load(x, step), load(y, step)
        store(z, step, a + b)
        store(z + 3 * step, step, a - b)
        store(z + 6 * step, step, a * b)
        store(z + 9 * step, step, a / b)

    operate(x.ctypes.data, y.ctypes.data, result.ctypes.data)
    assert_same(result, np.stack([x + y, x - y, x * y, x / y]))


@pytest.mark.parametrize(("compute", "quiet"), [("float32", 0x7FC00000), ("float64", 0x7FF8 << 48)])
def test_canonical_nan_changes_only_nan(compute, quiet):
    bits = np.dtype(f"u{np.dtype(compute).itemsize}")
    digits = 8 * bits.itemsize
    random = np.random.default_rng(0)
    patterns = random.integers(0, 2**digits, 65536, bits, endpoint=False)
    infinity = int(np.array(np.inf, compute).view(bits))
    quarter = len(patterns) // 4
    patterns[:quarter] |= infinity  # NaN, quiet and signalling, of both signs
    patterns[0:2] = infinity, infinity | 1 << digits - 1
    x = patterns.view(compute)
    x, actual = apply_blocks(arithmetic.canonical_nan, x, compute, compute, 16)
    expected = np.where(np.isnan(x), quiet, patterns).astype(bits)
    assert (actual.view(bits) == expected).all()
    assert np.isnan(x).sum() > quarter - 10
