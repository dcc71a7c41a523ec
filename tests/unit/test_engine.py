"""The engine against the oracle: any shape, strides, type, partition and thread; and errors."""

from __future__ import annotations

import itertools
import sys
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fastvgg
from fastvgg import call_plan, engine, oracle
from fastvgg.errors import (
    DtypeError,
    FastvggError,
    ModeError,
    OutputError,
    ShapeError,
    UsageError,
)
from fastvgg.parallel import available_cpus, parallel_for
from fastvgg.transform import Mode, Transform
from tests.helpers.batches import (
    FLOATS,
    KERAS_MODES,
    LAYOUT_PAIRS,
    LAYOUTS,
    assert_same,
    bits,
    byte_swapped,
    cast,
    dtype_of,
    every_half,
    every_value,
    filled_with,
    frozen,
    in_layout,
    run_script,
    unaligned,
    unchanged,
    view_in_memory,
)
from tests.helpers.samples import sampled

pytestmark = pytest.mark.pixels

MODES = (*KERAS_MODES, "identity")


class Case(NamedTuple):
    """A transform and the dtype of its input."""

    transform: Transform
    source: str

    def __str__(self):
        t = self.transform
        return f"{t.direction}-{t.mode.name}-{self.source}-{t.dtype}-{t.layout}-{t.out_layout}"


def rotating_cases():
    """Yield every legal pair of dtypes once, covering every mode in every pair of layouts."""
    pairs = [("preprocess", *pair) for pair in itertools.product(("uint8", *FLOATS), FLOATS)]
    pairs += [("restore", *pair) for pair in itertools.product(FLOATS, ("uint8", *FLOATS))]
    for number, (direction, source, target) in enumerate(pairs):
        mode = MODES[number % len(MODES)]
        layouts = LAYOUT_PAIRS[(number + number // len(MODES)) % len(LAYOUT_PAIRS)]
        yield Case(Transform(mode, direction, *layouts, target), source)


CASES = list(rotating_cases())


def stepped(batch):
    """Return a strided view: every second element of a larger batch along every axis."""
    memory = np.zeros([2 * extent + 1 for extent in batch.shape], batch.dtype)
    view = memory[tuple(slice(1, None, 2) for _ in batch.shape)]
    view[...] = batch
    return view


def window(batch):
    """Return a view of the interior of a larger batch."""
    memory = np.ones([extent + 3 for extent in batch.shape], batch.dtype)
    view = memory[tuple(slice(1, 1 + extent) for extent in batch.shape)]
    view[...] = batch
    return view


def planar_memory_as_channels_last(batch):
    """Return a channels-last view of a contiguous channels-first batch."""
    return np.moveaxis(np.moveaxis(batch, -1, -3).copy(), -3, -1)


def interleaved_memory_as_channels_first(batch):
    """Return a channels-first view of a contiguous channels-last batch."""
    return np.moveaxis(np.moveaxis(batch, -3, -1).copy(), -1, -3)


def channels_reversed(batch):
    """Return a view that reverses the channels of a contiguous batch."""
    axis = -1 if batch.shape[-1] == 3 else -3
    return np.flip(np.flip(batch, axis).copy(), axis)


VIEWS = {
    "contiguous": np.array,
    "in Fortran order": np.asfortranarray,
    "reversed": lambda batch: np.flip(np.flip(batch).copy()),
    "mirrored": lambda batch: batch[..., ::-1, :].copy()[..., ::-1, :],
    "stepped": stepped,
    "a window": window,
    "rows and columns exchanged": lambda batch: batch.swapaxes(-2, -3).copy().swapaxes(-2, -3),
    "planes seen as pixels": planar_memory_as_channels_last,
    "pixels seen as planes": interleaved_memory_as_channels_first,
    "channels reversed": channels_reversed,
    "planes seen as pixels, reversed": lambda x: planar_memory_as_channels_last(x[..., ::-1])[
        ..., ::-1
    ],
    "pixels seen as planes, reversed": lambda x: np.flip(
        interleaved_memory_as_channels_first(np.flip(x, -3)), -3
    ),
    "unaligned": unaligned,
    "byte-swapped": byte_swapped,
    "planes seen as pixels and byte-swapped": lambda x: planar_memory_as_channels_last(
        byte_swapped(x)
    ),
    "pixels seen as planes and byte-swapped": lambda x: interleaved_memory_as_channels_first(
        byte_swapped(x)
    ),
    "unaligned and byte-swapped": lambda batch: unaligned(byte_swapped(batch)),
    "stepped and byte-swapped": lambda batch: stepped(byte_swapped(batch)),
}


def random_batch(seed, shape, source, layout):
    """Return a random batch in `layout` of shape (..., H, W): any bits, or plausible values."""
    random = np.random.default_rng(seed)
    dtype = dtype_of(source)
    shape = (*shape, 3)
    if seed % 2 or source == "uint8":
        size = int(np.prod(shape)) * dtype.itemsize
        batch = np.frombuffer(random.bytes(size), dtype).reshape(shape)
    else:
        batch = random.uniform(-200, 400, shape).astype(dtype)
    return in_layout(batch, layout)


extents = st.integers(0, 9)
image_shapes = st.tuples(extents, extents) | st.tuples(extents, extents, extents)
seeds = st.integers(0, 2**32 - 1)


@sampled("case", CASES, one_in=5)  # every fifth has every mode, pair of layouts, and type
@given(shape=image_shapes, view=st.sampled_from(sorted(VIEWS)), seed=seeds)
@settings(max_examples=12)
def test_engine_matches_oracle_for_any_shape_and_strides(backend, case, shape, view, seed):
    transform = case.transform
    batch = random_batch(seed, shape, case.source, transform.layout)
    expected = oracle.apply(transform, batch)
    x = frozen(VIEWS[view](batch))
    with unchanged(x):
        actual = engine.apply(transform, x, backend=backend)
    assert_same(actual, expected)


@pytest.mark.parametrize("view", sorted(VIEWS))
@pytest.mark.parametrize("layout", LAYOUTS)
@given(shape=image_shapes, seed=seeds)
@settings(max_examples=12)
def test_every_kind_of_view_is_read_correctly(backend, layout, view, shape, seed):
    forward = Transform("caffe", "preprocess", layout, "NHWC", "bfloat16")
    batch = random_batch(seed, shape, "float16", layout)
    x = frozen(VIEWS[view](batch))
    assert np.array_equal(bits(x), bits(batch))
    with unchanged(x):
        actual = engine.apply(forward, x, backend=backend)
    assert_same(actual, oracle.apply(forward, batch))


@pytest.mark.parametrize("case", CASES[::8], ids=str)
@given(shape=st.tuples(extents, extents, extents), seed=seeds, axes=st.sets(st.integers(0, 3)))
@settings(max_examples=20)
def test_broadcast_batches_match_oracle(backend, case, shape, seed, axes):
    transform = case.transform
    batch = random_batch(seed, shape, case.source, transform.layout)
    narrow = batch[tuple(slice(0, 1) if axis in axes else slice(None) for axis in range(4))]
    x = np.broadcast_to(narrow, batch.shape) if batch.size else batch
    expected = oracle.apply(transform, x.copy())
    with unchanged(x):
        actual = engine.apply(transform, frozen(x), backend=backend)
    assert_same(actual, expected)


constants = st.floats(-300, 300, width=32).filter(lambda value: abs(value) > 1e-3)
own_modes = st.builds(
    Mode,
    st.just("own"),
    divide=st.none() | constants,
    mean=st.none() | st.tuples(constants, constants, constants),
    std=st.none() | st.tuples(constants, constants, constants),
    order=st.sampled_from(["RGB", "BGR"]),
)


@given(mode=own_modes, seed=seeds)
def test_custom_modes_match_oracle(backend, mode, seed):
    x = frozen(random_batch(seed, (2, 5, 7), "float32", "NHWC"))
    forward, back = Transform(mode), Transform(mode, "restore")
    with unchanged(x):
        assert_same(engine.apply(forward, x, backend=backend), oracle.apply(forward, x))
        assert_same(engine.apply(back, x, backend=backend), oracle.apply(back, x))


@pytest.mark.parametrize("zeros", [(0.0, -0.0), (-0.0, 0.0)])
def test_modes_with_positive_and_negative_zero_match_oracle_in_any_order(backend, zeros):
    x = filled_with(np.array([-0.0, 0.0], np.float32))
    transforms = [Transform(Mode(f"zeros {zeros}", mean=(zero,) * 3)) for zero in zeros]
    first, second = (engine.apply(transform, x, backend=backend) for transform in transforms)
    assert_same(first, oracle.apply(transforms[0], x))
    assert_same(second, oracle.apply(transforms[1], x))
    assert transforms[0] != transforms[1] or np.array_equal(bits(first), bits(second))


def special_values(name):
    """Return special values of a dtype: limits, ties, zeros, subnormals, infinities and NaN."""
    dtype = dtype_of(name)
    info = ml_dtypes.finfo(dtype)
    whole = np.arange(-2, 258, dtype=np.float64)
    places = np.concatenate([whole, whole + 0.5, [254.49, 255.49, -1e30, 1e30, 65519, 65520]])
    # The same values as network inputs, for which restoring hits a tie or its neighbors.
    inputs = [places, *(places - mean for mean in (103.939, 116.779, 123.68)), places / 127.5 - 1]
    for mean, std in ((0.485, 0.229), (0.456, 0.224), (0.406, 0.225)):
        inputs.append((places / 255 - mean) / std)
    near = cast(np.concatenate(inputs), name)
    patterns = near.view(f"u{dtype.itemsize}")
    one = patterns.dtype.type(1)
    ends = np.array(
        [np.nan, -np.nan, np.inf, -np.inf, 0.0, -0.0, info.max, info.min, info.tiny, -info.tiny],
        dtype,
    )
    subnormal = np.array([1, 2, 3, 0x35], patterns.dtype).view(dtype)
    below, above = (patterns - one).view(dtype), (patterns + one).view(dtype)
    return np.concatenate([ends, subnormal, -subnormal, near, below, above])


@sampled("mode, dtype", MODES, FLOATS, one_in=2)
def test_preprocess_matches_oracle_for_special_values(backend, mode, dtype):
    x = filled_with(special_values(dtype))
    with unchanged(x):
        actual = fastvgg.preprocess(x, mode, backend=backend)
    assert_same(actual, oracle.apply(Transform(mode), x))


@sampled("mode, dtype", MODES, FLOATS, one_in=2)
def test_restore_matches_oracle_for_special_values(backend, mode, dtype):
    y = filled_with(special_values(dtype))
    with unchanged(y):
        actual = fastvgg.restore(y, mode, backend=backend)
    assert_same(actual, oracle.apply(Transform(mode, "restore"), y))


@pytest.mark.parametrize("dtype", FLOATS)
def test_restore_with_truncation_matches_oracle_for_special_values(backend, dtype):
    y = filled_with(special_values(dtype))
    with unchanged(y):
        actual = fastvgg.restore(y, "caffe", rounding="truncate", backend=backend)
    assert_same(actual, oracle.apply(Transform("caffe", "restore", rounding="truncate"), y))


@pytest.mark.parametrize(
    ("value", "nearest", "truncated"),
    [
        (np.nan, 0, 0),
        (-np.inf, 0, 0),
        (np.inf, 255, 255),
        (-0.5, 0, 0),
        (-0.0, 0, 0),
        (0.5, 0, 0),
        (0.75, 1, 0),
        (1.5, 2, 1),
        (2.5, 2, 2),
        (62.75, 63, 62),
        (127.5, 128, 127),
        (256.0, 255, 255),
        (4096.0, 255, 255),
    ],
)
@pytest.mark.parametrize("dtype", FLOATS)
def test_restored_values_are_saturated_and_rounded_half_to_even(
    backend, dtype, value, nearest, truncated
):
    y = frozen(np.full((2, 5, 7, 3), value, dtype_of(dtype)))
    rounded = fastvgg.restore(y, "identity", backend=backend)
    assert_same(rounded, np.full(y.shape, nearest, np.uint8))
    cut = fastvgg.restore(y, "identity", rounding="truncate", backend=backend)
    assert_same(cut, np.full(y.shape, truncated, np.uint8))


@pytest.mark.parametrize("half", ["float16", "bfloat16"])
@pytest.mark.parametrize("mode", KERAS_MODES)
def test_restore_matches_oracle_for_all_65536_16_bit_floats(backend, mode, half):
    y = every_half(half)
    with unchanged(y):
        actual = fastvgg.restore(y, mode, backend=backend)
    assert_same(actual, oracle.apply(Transform(mode, "restore"), y))


@pytest.mark.parametrize("half", ["float16", "bfloat16"])
@pytest.mark.parametrize("mode", KERAS_MODES)
def test_preprocess_matches_oracle_for_all_65536_16_bit_floats(backend, mode, half):
    x = every_half(half)
    with unchanged(x):
        actual = fastvgg.preprocess(x, mode, backend=backend)
    assert_same(actual, oracle.apply(Transform(mode), x))


@pytest.mark.parametrize("half", ["float16", "bfloat16"])
def test_all_65536_16_bit_floats_are_widened_like_numpy(backend, half):
    x = every_half(half)
    actual = fastvgg.preprocess(x, "identity", dtype="float32", backend=backend)
    assert_same(actual, cast(x, "float32"))


def midpoints(half):
    """Return for each of the 65,536 halves the float32 midpoint to the next half."""
    patterns = np.arange(65536, dtype=np.uint16)
    here = cast(patterns.view(dtype_of(half)), "float64")
    after = cast((patterns + np.uint16(1)).view(dtype_of(half)), "float64")
    # The next value after the largest number would be a power of two that the dtype cannot
    # represent; infinity replaces it.
    beyond = 65536.0 if half == "float16" else 2.0**128
    after = np.where(np.isinf(after), np.copysign(beyond, here), after)
    with np.errstate(invalid="ignore"):  # infinity and the NaN after it
        middle = cast((here + after) / 2, "float32")
    assert np.isfinite(middle).sum() > 63_000
    return middle


@pytest.mark.parametrize("steps", [-1, 0, 1])
@pytest.mark.parametrize("half", ["float16", "bfloat16"])
def test_values_between_two_16_bit_floats_are_rounded_like_numpy(backend, half, steps):
    patterns = midpoints(half).view(np.uint32) + np.uint32(steps % 2**32)
    x = filled_with(patterns.view(np.float32))
    expected = cast(x, half)
    with unchanged(x):
        actual = fastvgg.preprocess(x, "identity", dtype=half, backend=backend)
    assert_same(actual, expected)


@pytest.mark.parametrize("half", ["float16", "bfloat16"])
def test_nan_with_any_payload_stays_nan_in_16_bits(backend, half):
    payloads = [1 << bit for bit in range(23)] + [0x7FFFFF, 0x007FFF, 0x00FFFF, 0x400001]
    patterns = [sign | 0x7F800000 | payload for sign in (0, 1 << 31) for payload in payloads]
    x = filled_with(np.array(patterns, np.uint32).view(np.float32))
    actual = fastvgg.preprocess(x, "identity", dtype=half, backend=backend)
    assert np.isnan(x).all()
    assert np.isnan(actual).all()


CANONICAL_NAN = {
    "float16": 0x7E00,
    "bfloat16": 0x7FC0,
    "float32": 0x7FC00000,
    "float64": 0x7FF8000000000000,
}


def every_kind_of_nan(name):
    """Return signaling and quiet NaNs of both signs, with each bit of the payload alone."""
    infinity = np.array([np.inf, -np.inf], dtype_of(name))
    patterns = infinity.view(f"u{infinity.itemsize}").astype(np.uint64)
    payload_bits = int(patterns[0] & (~patterns[0] + np.uint64(1))).bit_length() - 1
    alone = np.uint64(1) << np.arange(payload_bits, dtype=np.uint64)
    full = np.uint64((1 << payload_bits) - 1)
    payloads = np.concatenate([alone, alone | alone[-1], [full, full >> np.uint64(1)]])
    nan = (patterns[:, np.newaxis] | payloads).ravel()
    values = nan.astype(f"u{infinity.itemsize}").view(dtype_of(name))
    with np.errstate(invalid="ignore"):  # isnan of a signaling NaN raises the invalid flag
        assert np.isnan(values).all()
    return values


@sampled("mode, source, target, layouts", MODES, FLOATS, FLOATS, LAYOUT_PAIRS, one_in=16)
def test_every_nan_becomes_the_canonical_quiet_nan(backend, mode, source, target, layouts):
    layout, out_layout = layouts
    pixels = np.resize(every_kind_of_nan(source), (2, 5, 27, 3))
    x = frozen(in_layout(pixels, layout))
    with unchanged(x):
        actual = fastvgg.preprocess(
            x, mode, layout=layout, out_layout=out_layout, dtype=target, backend=backend
        )
    patterns = actual.view(f"u{actual.itemsize}")
    assert (patterns == CANONICAL_NAN[target]).all()
    assert_same(actual, oracle.apply(Transform(mode, "preprocess", *layouts, target), x))


@pytest.mark.parametrize("dtype", FLOATS)
def test_nan_in_place_and_in_strided_input_is_canonical(backend, dtype):
    wide = np.resize(every_kind_of_nan(dtype), (2, 10, 27, 3))
    x = wide[:, ::2, ::-1].copy()
    expected = np.full(x.shape, CANONICAL_NAN[dtype])
    swapped = [] if dtype == "bfloat16" else [byte_swapped(x)]
    for batch in (wide[:, ::2, ::-1], *swapped):
        actual = fastvgg.preprocess(batch, "identity", backend=backend)
        assert (actual.view(f"u{actual.itemsize}") == expected).all()
    fastvgg.preprocess(x, "identity", out=x, backend=backend)
    assert (x.view(f"u{x.itemsize}") == expected).all()


@pytest.mark.parametrize("dtype", FLOATS)
def test_nan_is_restored_as_zero_in_every_type(backend, dtype):
    y = frozen(np.resize(every_kind_of_nan(dtype), (2, 5, 27, 3)))
    for target in ("uint8", dtype):
        actual = fastvgg.restore(y, "torch", dtype=target, backend=backend)
        assert_same(actual, np.zeros(y.shape, dtype_of(target)))


@pytest.mark.parametrize("target", FLOATS)
@pytest.mark.parametrize("source", FLOATS)
def test_infinities_and_zeros_keep_their_sign(backend, source, target):
    values = [np.inf, -np.inf, 0.0, -0.0]
    x = filled_with(np.array(values, dtype_of(source)))
    with unchanged(x):
        actual = fastvgg.preprocess(x, "identity", dtype=target, backend=backend)
    assert_same(actual, filled_with(np.array(values, dtype_of(target))))


@given(seed=seeds)
@pytest.mark.parametrize("target", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("source", ["float32", "float64"])
def test_narrowing_matches_oracle_for_any_bits(backend, source, target, seed):
    x = frozen(random_batch(seed | 1, (2, 5, 7), source, "NHWC"))
    actual = fastvgg.preprocess(x, "identity", dtype=target, backend=backend)
    assert_same(actual, oracle.apply(Transform("identity", dtype=target), x))


def boundaries(mode, places):
    """Return every float32 near an input that restores to one of `places`, in any channel."""
    inputs = oracle.forward(np.stack([places] * 3, axis=-1), Mode.from_name(mode)).astype(
        np.float32
    )
    offsets = np.arange(-64, 65)
    patterns = inputs.ravel().view(np.uint32).astype(np.int64)[:, np.newaxis] + offsets
    return (patterns % 2**32).astype(np.uint32).ravel()


@pytest.mark.parametrize("rounding", ["nearest", "truncate"])
@pytest.mark.parametrize("mode", KERAS_MODES)
def test_restore_matches_oracle_for_a_sample_of_all_float32(backend, mode, rounding):
    """One in 4,099 of all bit patterns, and all near a point where the result changes."""
    step = 4099 if rounding == "nearest" else 65537
    places = np.arange(257) - 0.5 if rounding == "nearest" else np.arange(257.0)
    every = np.arange(0, 2**32, step, dtype=np.int64).astype(np.uint32)
    patterns = np.concatenate([every, boundaries(mode, places)])
    y = filled_with(patterns.view(np.float32))
    transform = Transform(mode, "restore", rounding=rounding)
    with unchanged(y):
        actual = engine.apply(transform, y, backend=backend)
    expected = oracle.apply(transform, y)
    assert len(np.unique(expected)) == 256
    assert np.array_equal(actual, expected)


@pytest.mark.parametrize("case", CASES[::8], ids=str)
def test_out_can_be_reused_and_is_returned(backend, case):
    transform = case.transform
    batches = [
        frozen(random_batch(seed, (2, 5, 7), case.source, transform.layout))
        for seed in (10, 11, 12)
    ]
    first = oracle.apply(transform, batches[0])
    out = np.full(first.nbytes, 0xAA, np.uint8).view(first.dtype).reshape(first.shape)
    for batch in batches:
        with unchanged(batch):
            assert engine.apply(transform, batch, out, backend=backend) is out
        assert_same(out, oracle.apply(transform, batch))


# From the smallest images to planes longer than the tiles of a kernel.
SHAPES = (
    *((1, 1), (5, 1), (5, 27)),
    *((1, 511), (2, 256), (27, 19), (23, 89), (1, 2048), (89, 47), (1, 6151)),
)


@sampled(
    "case, layout",
    *([("torch", "float32"), *(("caffe", dtype) for dtype in FLOATS)], LAYOUTS),
    one_in=2,
)
def test_in_place_preprocess_and_restore_keep_the_dtype(backend, case, layout):
    mode, dtype = case
    for shape in SHAPES:
        x = cast(random_batch(3, (2, *shape), "uint8", layout), dtype)
        expected = oracle.apply(Transform(mode, layout=layout), x)
        batch = x.copy()
        assert fastvgg.preprocess(batch, mode, layout=layout, out=batch, backend=backend) is batch
        assert_same(batch, expected)
        assert fastvgg.restore(batch, mode, layout=layout, out=batch, backend=backend) is batch
        assert_same(batch, x)


@pytest.mark.parametrize(("layout", "out_layout"), LAYOUT_PAIRS)
@pytest.mark.parametrize("mode", ["caffe", "torch"])
def test_images_of_any_size_round_trip(backend, mode, layout, out_layout):
    forward = Transform(mode, "preprocess", layout, out_layout)
    for shape in SHAPES:
        x = frozen(random_batch(3, (2, *shape), "uint8", layout))
        with unchanged(x):
            y = engine.apply(forward, x, backend=backend)
        assert_same(y, oracle.apply(forward, x))
        assert_same(engine.apply(forward.inverse(), frozen(y), backend=backend), x)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_in_place_round_trip_is_exact_with_many_tiles(backend, monkeypatch, layout):
    monkeypatch.setattr(call_plan, "MIN_TILE_BYTES", 64)
    expected = every_value(layout).astype(np.float32)
    batch = expected.copy()
    fastvgg.preprocess(batch, "caffe", layout=layout, out=batch, threads=3, backend=backend)
    assert not np.array_equal(batch, expected)
    fastvgg.restore(batch, "caffe", layout=layout, out=batch, threads=3, backend=backend)
    assert_same(batch, expected)


@pytest.mark.parametrize("dtype", FLOATS)
def test_one_image_works_in_place(backend, dtype):
    x = every_value(rank=3).astype(dtype_of(dtype))
    expected = oracle.apply(Transform("caffe"), x.copy())
    assert_same(fastvgg.preprocess(x, "caffe", out=x, backend=backend), expected)


def float_batch(shape=(2, 5, 7, 3)):
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


def shifted_by_one_element():
    memory = np.zeros(211, np.float32)
    return memory[:210].reshape(2, 5, 7, 3), memory[1:].reshape(2, 5, 7, 3), {}


def shifted_by_one_image():
    memory = np.zeros((5, 5, 7, 3), np.float32)
    return memory[1:], memory[:-1], {}


def overlapping_single_image():
    memory = float_batch()
    return memory[0], memory.reshape(-1)[105 - 1 :][:105].reshape(5, 7, 3), {}


def same_memory_in_other_layout():
    memory = float_batch()
    return memory, memory.reshape(2, 3, 5, 7), {"out_layout": "NCHW"}


def same_cube_in_other_layout():
    memory = float_batch((2, 3, 3, 3))
    return memory, memory, {"out_layout": "NCHW"}


def same_memory_in_other_dtype():
    memory = float_batch()
    return memory.view(np.uint8)[..., :3], memory, {}


def same_memory_reversed():
    memory = float_batch()
    return memory[::-1], memory, {}


def same_memory_with_rows_and_columns_swapped():
    memory = float_batch((2, 7, 7, 3))
    return memory.swapaxes(1, 2), memory, {}


def broadcast_of_one_image():
    memory = float_batch()
    return np.broadcast_to(memory[:1], memory.shape), memory, {}


def same_memory_in_other_byte_order():
    memory = float_batch()
    return memory.view(memory.dtype.newbyteorder("S")), memory, {}


OVERLAPPING = [
    shifted_by_one_element,
    shifted_by_one_image,
    overlapping_single_image,
    same_memory_in_other_layout,
    same_cube_in_other_layout,
    same_memory_in_other_dtype,
    same_memory_reversed,
    same_memory_with_rows_and_columns_swapped,
    broadcast_of_one_image,
    same_memory_in_other_byte_order,
]


@pytest.mark.parametrize("make", OVERLAPPING, ids=lambda make: make.__name__)
def test_out_that_overlaps_the_input_is_rejected_before_writing(backend, make):
    x, out, layouts = make()
    assert np.shares_memory(x, out)
    with unchanged(x, out), pytest.raises(OutputError, match="overlaps the input") as caught:
        fastvgg.preprocess(x, "caffe", out=out, backend=backend, **layouts)
    assert "out=x" in caught.value.remedy


def test_out_inside_a_gap_of_the_input_is_accepted(backend):
    memory = np.zeros((2, 6, 5, 7, 3), np.float32)
    x, out = memory[:, 0], memory[0, 1:3]
    x[...] = every_value()[:, :, :7]
    expected = oracle.apply(Transform("caffe"), x.copy())
    assert np.may_share_memory(x, out)
    assert_same(fastvgg.preprocess(x, "caffe", out=out, backend=backend), expected)
    assert np.array_equal(x, every_value()[:, :, :7])
    assert not memory[0, 3:].any()
    assert not memory[1, 1:].any()


def test_out_adjacent_to_the_input_is_accepted(backend):
    memory = np.zeros((4, 5, 7, 3), np.float32)
    memory[:2] = every_value()[:, :, :7]
    x = memory[:2].copy()
    expected = oracle.apply(Transform("caffe"), x)
    actual = fastvgg.preprocess(memory[:2], "caffe", out=memory[2:], backend=backend)
    assert_same(actual, expected)
    assert_same(memory[:2], x)


def read_only():
    return frozen(np.zeros((2, 5, 7, 3), np.float32))


def different_shape():
    return np.zeros((2, 7, 5, 3), np.float32)


def extra_image():
    return np.zeros((3, 5, 7, 3), np.float32)


def missing_batch_axis():
    return np.zeros((5, 7, 3), np.float32)


def different_dtype():
    return np.zeros((2, 5, 7, 3), np.float64)


def integer_dtype():
    return np.zeros((2, 5, 7, 3), np.int32)


def different_byte_order():
    return byte_swapped(np.zeros((2, 5, 7, 3), np.float32))


def not_contiguous():
    return stepped(np.zeros((2, 5, 7, 3), np.float32))


def in_fortran_order():
    return np.asfortranarray(np.zeros((2, 5, 7, 3), np.float32))


def reversed_channels():
    return np.zeros((2, 5, 7, 3), np.float32)[..., ::-1]


def misaligned():
    return unaligned(np.zeros((2, 5, 7, 3), np.float32))


UNSUITABLE = {
    read_only: "read-only",
    different_shape: "(2, 7, 5, 3)",
    extra_image: "(3, 5, 7, 3)",
    missing_batch_axis: "(5, 7, 3)",
    different_dtype: "float64",
    integer_dtype: "int32",
    different_byte_order: "f4",
    not_contiguous: "not contiguous",
    in_fortran_order: "not contiguous",
    reversed_channels: "not contiguous",
    misaligned: "out is not aligned",
}


@pytest.mark.parametrize("make", UNSUITABLE, ids=lambda make: make.__name__)
def test_unsuitable_out_is_rejected_before_writing(backend, make):
    x = frozen(np.full((2, 5, 7, 3), 9, np.uint8))
    out = make()
    with unchanged(x, out), pytest.raises(OutputError) as caught:
        fastvgg.preprocess(x, "caffe", out=out, backend=backend)
    assert UNSUITABLE[make] in caught.value.problem
    assert caught.value.remedy


@pytest.mark.parametrize("make", [different_shape, different_dtype], ids=lambda make: make.__name__)
def test_out_error_suggests_a_suitable_array(backend, make):
    x = np.full((2, 5, 7, 3), 9, np.uint8)
    with pytest.raises(OutputError, match=r"np\.empty\(\(2, 5, 7, 3\), 'float32'\)"):
        fastvgg.preprocess(x, "caffe", out=make(), backend=backend)


@pytest.mark.parametrize("out", [[0.0], "out.npy", 7, b"bytes"])
def test_out_that_is_not_an_array_is_rejected(backend, out):
    x = np.full((2, 5, 7, 3), 9, np.uint8)
    with pytest.raises(OutputError, match=type(out).__name__):
        fastvgg.preprocess(x, "caffe", out=out, backend=backend)


def test_read_only_input_is_rejected_in_place(backend):
    x = frozen(float_batch())
    with unchanged(x), pytest.raises(OutputError, match="read-only"):
        fastvgg.preprocess(x, "caffe", out=x, backend=backend)


def test_strided_input_is_rejected_in_place(backend):
    x = stepped(float_batch())
    with unchanged(x), pytest.raises(OutputError, match="not contiguous"):
        fastvgg.preprocess(x, "caffe", out=x, backend=backend)


def test_in_place_restore_to_uint8_is_rejected(backend):
    y = float_batch()
    with unchanged(y), pytest.raises(OutputError, match="uint8"):
        fastvgg.restore(y, "caffe", dtype="uint8", out=y, backend=backend)


@pytest.mark.parametrize("direction", [fastvgg.preprocess, fastvgg.restore])
@pytest.mark.parametrize(
    ("x", "shown"),
    [
        ([[[0, 0, 0]]], "list"),
        (None, "NoneType"),
        (np.ma.masked_array(float_batch(), mask=False), "masked"),
        (float_batch().astype(np.int32), "int32"),
        (float_batch().astype(np.uint16), "uint16"),
        (float_batch().astype(bool), "bool"),
        (float_batch().astype(np.complex64), "complex64"),
        (float_batch().astype(np.longdouble), np.dtype(np.longdouble).name),
        (float_batch().astype(object), "object"),
        (float_batch().astype("U3"), "str"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_unsupported_dtype_is_rejected_by_name(backend, direction, x, shown):
    out = np.full((2, 5, 7, 3), 7, np.float32)
    with unchanged(out), pytest.raises(DtypeError) as caught:
        direction(x, "caffe", dtype="float32", out=out, backend=backend)
    assert shown in caught.value.problem
    assert isinstance(caught.value, TypeError)
    assert isinstance(caught.value, ValueError)


def test_restore_rejects_uint8_input(backend):
    with pytest.raises(DtypeError, match="nothing to restore"):
        fastvgg.restore(every_value(), "caffe", backend=backend)


def test_preprocess_rejects_uint8_output(backend):
    with pytest.raises(UsageError, match="uint8"):
        fastvgg.preprocess(every_value(), "caffe", dtype="uint8", backend=backend)


@pytest.mark.parametrize("direction", [fastvgg.preprocess, fastvgg.restore])
@pytest.mark.parametrize(
    ("shape", "layout", "remedy"),
    [
        ((2, 3, 5, 7), "NHWC", "NCHW"),
        ((2, 5, 7, 3), "NCHW", "NHWC"),
        ((2, 5, 7, 4), "NHWC", "3 channels"),
        ((5, 7), "NHWC", "rank 4"),
        ((1, 2, 5, 7, 3), "NHWC", "rank 4"),
        ((), "NHWC", "rank 4"),
    ],
)
def test_wrong_shape_is_rejected_with_the_shape_and_a_remedy(
    backend, direction, shape, layout, remedy
):
    x = np.zeros(shape, np.float32)
    out = np.full(shape, 7, np.float32)
    with unchanged(out), pytest.raises(ShapeError) as caught:
        direction(x, "caffe", layout=layout, dtype="float32", out=out, backend=backend)
    assert str(shape) in caught.value.problem
    assert remedy in caught.value.remedy


@pytest.mark.parametrize("direction", [fastvgg.preprocess, fastvgg.restore])
@pytest.mark.parametrize(
    ("argument", "error"),
    [
        ({"mode": "vgg"}, ModeError),
        ({"layout": "HWC"}, UsageError),
        ({"out_layout": "CHW"}, UsageError),
        ({"dtype": "int8"}, UsageError),
        ({"threads": 0}, UsageError),
        ({"threads": -1}, UsageError),
        ({"backend": "cuda"}, UsageError),
        ({"backend": ""}, UsageError),
    ],
    ids=str,
)
def test_invalid_arguments_are_rejected_before_writing(direction, argument, error):
    x = float_batch()
    out = np.full(x.shape, 7, np.float32)
    arguments = {"mode": "caffe", "dtype": "float32", "out": out} | argument
    with unchanged(x, out), pytest.raises(error) as caught:
        direction(x, **arguments)
    assert isinstance(caught.value, FastvggError)
    assert str(next(iter(argument.values()))) in caught.value.problem


def test_an_unknown_rounding_is_rejected(backend):
    with pytest.raises(UsageError, match="'up'"):
        fastvgg.restore(float_batch(), "caffe", rounding="up", backend=backend)


@pytest.mark.parametrize("shape", [(0, 5, 7, 3), (2, 0, 7, 3), (2, 5, 0, 3), (0, 7, 3), (5, 0, 3)])
def test_empty_batch_returns_an_empty_result(backend, shape):
    x = np.empty(shape, np.uint8)
    y = fastvgg.preprocess(x, "caffe", dtype="float16", backend=backend)
    assert_same(y, np.empty(shape, np.float16))
    out = np.empty(shape, np.uint8)
    assert fastvgg.restore(y, "caffe", out=out, backend=backend) is out


def test_empty_batch_is_validated(backend):
    with pytest.raises(ShapeError):
        fastvgg.preprocess(np.empty((0, 5, 7, 4), np.uint8), "caffe", backend=backend)
    out = np.empty((0, 5, 7, 3), np.float64)
    with pytest.raises(OutputError):
        fastvgg.preprocess(np.empty((0, 5, 7, 3), np.uint8), "caffe", out=out, backend=backend)


def test_memory_mapped_input_is_not_modified(backend, tmp_path):
    path = tmp_path / "images.npy"
    np.save(path, every_value())
    before = path.read_bytes()
    x = np.load(path, mmap_mode="r")
    actual = fastvgg.preprocess(x, "caffe", backend=backend)
    assert_same(actual, oracle.apply(Transform("caffe"), every_value()))
    assert path.read_bytes() == before


def test_memory_mapped_out_is_written(backend, tmp_path):
    path = tmp_path / "inputs.npy"
    x = every_value()
    out = np.lib.format.open_memmap(path, "w+", np.float16, (2, 3, 5, 27))
    actual = fastvgg.preprocess(
        x, "torch", out_layout="NCHW", dtype="float16", out=out, backend=backend
    )
    assert actual is out
    out.flush()
    expected = oracle.apply(Transform("torch", out_layout="NCHW", dtype="float16"), x)
    assert_same(np.load(path), expected)


def test_memory_mapped_array_is_processed_in_place(backend, tmp_path):
    path = tmp_path / "inputs.npy"
    np.save(path, every_value().astype(np.float32))
    x = np.lib.format.open_memmap(path, "r+")
    assert fastvgg.preprocess(x, "caffe", out=x, backend=backend) is x
    x.flush()
    assert_same(np.load(path), oracle.apply(Transform("caffe"), every_value()))


def test_result_is_a_new_plain_ndarray(backend, tmp_path):
    path = tmp_path / "images.npy"
    np.save(path, every_value().astype(np.float32))
    x = np.load(path, mmap_mode="r")
    actual = fastvgg.preprocess(x, "identity", backend=backend)
    assert type(actual) is np.ndarray
    assert actual.flags.owndata
    assert actual.flags.writeable


@pytest.fixture
def tiny_tiles(monkeypatch):
    """Use tiles of a row or two, so that a small batch is split like a huge one."""
    monkeypatch.setattr(call_plan, "MIN_TILE_BYTES", 300)
    monkeypatch.setattr(call_plan, "COPIED_TILE_BYTES", 500)


@pytest.fixture
def force_nontemporal(monkeypatch):
    """Write every result with non-temporal stores, like a huge one."""
    monkeypatch.setattr(engine, "MIN_NONTEMPORAL_BYTES", 1)


@pytest.fixture
def recorded_partitions(monkeypatch):
    """Record the tiles of each batch and the number of threads."""
    seen = []

    def recording(tiles, fn, threads):
        seen.append((tiles, threads))
        parallel_for(tiles, fn, threads)

    monkeypatch.setattr(call_plan, "parallel_for", recording)
    return seen


@pytest.mark.parametrize(
    "view",
    [
        "contiguous",
        "channels reversed",
        "stepped",
        "byte-swapped",
        "planes seen as pixels",
        "pixels seen as planes",
    ],
)
@pytest.mark.parametrize("threads", [1, 2, 3, 7])
@pytest.mark.parametrize(("layout", "out_layout"), LAYOUT_PAIRS)
def test_results_do_not_depend_on_the_number_of_threads(
    backend, tiny_tiles, recorded_partitions, layout, out_layout, threads, view
):
    forward = Transform("caffe", "preprocess", layout, out_layout, "float16")
    batch = random_batch(1, (11, 13, 17), "uint8", layout)
    x = frozen(VIEWS[view](batch))
    with unchanged(x):
        y = engine.apply(forward, x, threads=threads, backend=backend)
    ((tiles, used_threads),) = recorded_partitions
    assert len(tiles) > 2 * threads
    assert used_threads == threads
    assert_same(y, oracle.apply(forward, batch))
    back = engine.apply(forward.inverse(), y, threads=threads, backend=backend)
    assert_same(back, batch)


@sampled("case", CASES[::3], one_in=2)
def test_nontemporal_stores_are_correct_with_any_number_of_threads(
    backend, tiny_tiles, force_nontemporal, case
):
    transform = case.transform
    for threads, shape in ((1, (11, 13, 17)), (2, (1, 61, 43)), (3, (3, 23, 29)), (7, (131, 97))):
        x = frozen(random_batch(2 * threads, shape, case.source, transform.layout))
        expected = oracle.apply(transform, x)
        for start in range(0, 64, 8):  # a cache line can start at any pixel
            memory = np.full(start + expected.nbytes + 64, 0xAA, np.uint8)
            out = memory[start : start + expected.nbytes].view(expected.dtype)
            out = out.reshape(expected.shape)
            with unchanged(x):
                engine.apply(transform, x, out, threads=threads, backend=backend)
            assert_same(out, expected)
            assert (memory[:start] == 0xAA).all()
            assert (memory[start + expected.nbytes :] == 0xAA).all()


@pytest.mark.parametrize("view", ["contiguous", "reversed", "unaligned and byte-swapped"])
@pytest.mark.parametrize(("layout", "out_layout"), LAYOUT_PAIRS)
@pytest.mark.parametrize("rank", [3, 4])
def test_image_larger_than_a_tile_is_split_into_rows(
    backend, tiny_tiles, recorded_partitions, layout, out_layout, view, rank
):
    transform = Transform("torch", "restore", layout, out_layout)
    shape = (2, 23, 19) if rank == 4 else (23, 19)
    batch = random_batch(2, shape, "float32", layout)
    x = VIEWS[view](batch)
    actual = engine.apply(transform, x, threads=2, backend=backend)
    ((tiles, _),) = recorded_partitions
    assert any(tile.row > 0 for tile in tiles)
    assert_same(actual, oracle.apply(transform, batch))


def test_default_threads_is_the_number_of_available_cpus(backend, tiny_tiles, recorded_partitions):
    x = random_batch(1, (11, 13, 17), "uint8", "NHWC")
    actual = fastvgg.preprocess(x, "caffe", threads=None, backend=backend)
    assert_same(actual, oracle.apply(Transform("caffe"), x))
    ((_, threads),) = recorded_partitions
    assert threads == available_cpus()


def test_copied_tiles_have_a_bounded_size_for_large_batches(backend, recorded_partitions):
    shape = (128, 224, 224, 3)
    x, out = np.broadcast_to(np.uint8(7), shape), np.empty(shape, np.float16)
    engine.apply(Transform("identity", dtype="float16"), x, out, threads=2, backend=backend)
    ((tiles, _),) = recorded_partitions
    assert sum(tile.images for tile in tiles) == len(x)
    assert max(tile.images for tile in tiles) * (x[0].nbytes + out[0].nbytes) <= 2**20
    assert (out == 7).all()


class Call(NamedTuple):
    """One kernel call: its variant and arguments."""

    layout: str
    reverses: bool
    in_place: bool
    nontemporal: bool
    source: int
    target: int
    images: int
    pixels: int


@pytest.fixture
def calls(monkeypatch):
    """Record the kernel calls of the engine; the calls still run, on this thread."""
    made = []
    kernel_of = call_plan.bind_kernel

    def recording(plan, *, in_place, nontemporal):
        kernel = kernel_of(plan, in_place=in_place, nontemporal=nontemporal)
        layout, reverses = plan.base[:2] if plan.base else (plan.transform.layout, False)

        def loop(source, target, constants, images, pixels, *steps):
            made.append(
                Call(layout, reverses, in_place, nontemporal, source, target, images, pixels)
            )
            kernel.loop(source, target, constants, images, pixels, *steps)

        return kernel._replace(loop=loop)

    monkeypatch.setattr(call_plan, "bind_kernel", recording)
    return made


BASES = {
    # View -> (whether its memory has the other layout, whether its channels are reversed).
    "contiguous": (False, False),
    "unaligned": (False, False),
    "channels reversed": (False, True),
    "transposed": (True, False),
    "transposed, reversed": (True, True),
}


@pytest.mark.compiled
@pytest.mark.parametrize("view", BASES)
@pytest.mark.parametrize(("layout", "out_layout"), LAYOUT_PAIRS)
def test_transposed_and_reversed_views_are_read_without_a_copy(calls, layout, out_layout, view):
    transposed, reverses = BASES[view]
    for number, (direction, source) in enumerate(
        (("preprocess", "uint8"), ("preprocess", "float16"), ("restore", "float32"))
    ):
        transform = Transform("caffe", direction, layout, out_layout)
        for start in range(1 if view == "unaligned" else 0, 8):
            batch = random_batch(number, (3, 5, 7), source, layout)
            x, stored = view_in_memory(batch, layout, transposed, reverses, start)
            assert np.array_equal(bits(x), bits(batch))
            assert x.flags.c_contiguous == (not transposed and not reverses)
            with unchanged(frozen(x)):
                actual = engine.apply(transform, x, threads=1, backend="numba")
            assert_same(actual, oracle.apply(transform, batch))
            (call,) = calls
            assert call.source == stored.ctypes.data
            assert call.layout == (layout if not transposed else LAYOUTS[layout == "NHWC"])
            assert call.reverses == reverses
            calls.clear()


COPIED_VIEWS = (
    *("in Fortran order", "reversed", "mirrored", "stepped", "a window"),
    *("rows and columns exchanged", "byte-swapped", "planes seen as pixels and byte-swapped"),
)


@pytest.mark.compiled
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("view", COPIED_VIEWS)
def test_other_views_are_copied_in_bounded_tiles(calls, monkeypatch, view, layout):
    tile_bytes = 32 * 1024
    monkeypatch.setattr(call_plan, "COPIED_TILE_BYTES", tile_bytes)
    batch = random_batch(0, (7, 64, 48), "float32", layout)
    x = frozen(VIEWS[view](batch))
    transform = Transform("caffe", layout=layout)
    out = np.empty(batch.shape, np.float32)
    engine.apply(transform, x, out, threads=1, backend="numba")
    assert_same(out, oracle.apply(transform, batch))
    assert len(calls) >= 2 * batch.nbytes / tile_bytes
    assert max(call.images * call.pixels * 24 for call in calls) <= tile_bytes
    begin, end = np.lib.array_utils.byte_bounds(x)
    assert not any(begin <= call.source < end for call in calls)
    tracemalloc.start()
    engine.apply(transform, x, out, threads=1, backend="numba")
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 2 * tile_bytes


@pytest.mark.compiled
@pytest.mark.parametrize("out_layout", LAYOUTS)
@pytest.mark.parametrize("target", FLOATS)
def test_large_image_is_split_at_cache_lines_of_the_result(
    calls, tiny_tiles, force_nontemporal, target, out_layout
):
    transform = Transform("torch", out_layout=out_layout, dtype=target)
    x = frozen(random_batch(1, (61, 43), "uint8", "NHWC"))
    expected = oracle.apply(transform, x)
    pixel_bytes = expected.itemsize * (3 if out_layout == "NHWC" else 1)
    for start in range(0, 64, expected.itemsize):
        memory = np.zeros(expected.nbytes + 128, np.uint8)
        start += -memory.ctypes.data % 64
        out = memory[start : start + expected.nbytes].view(expected.dtype).reshape(expected.shape)
        engine.apply(transform, x, out, threads=1, backend="numba")
        assert_same(out, expected)
        assert len(calls) > 3
        assert calls[0].target == out.ctypes.data
        assert not [call for call in calls[1:] if call.target % 64]
        at = [(call.target - out.ctypes.data) // pixel_bytes for call in calls]
        assert at == [sum(call.pixels for call in calls[:number]) for number in range(len(calls))]
        assert sum(call.pixels for call in calls) == 61 * 43
        calls.clear()


def used_nontemporal_stores(calls):
    """Return whether all kernel calls used non-temporal stores; a mix is an error."""
    (found,) = {call.nontemporal for call in calls}
    calls.clear()
    return found


@pytest.mark.compiled
@pytest.mark.parametrize("view", ["contiguous", "planes seen as pixels", "stepped"])
def test_nontemporal_stores_are_used_only_for_large_reused_outputs(calls, monkeypatch, view):
    transform = Transform("caffe", dtype="float32")
    batch = random_batch(2, (3, 5, 7), "float32", "NHWC")
    x, expected = VIEWS[view](batch), oracle.apply(transform, batch)
    out = np.empty_like(expected)
    for smallest, large in ((batch.nbytes, True), (batch.nbytes + 1, False)):
        monkeypatch.setattr(engine, "MIN_NONTEMPORAL_BYTES", smallest)
        assert_same(engine.apply(transform, x, out, backend="numba"), expected)
        assert used_nontemporal_stores(calls) == large
        # Not if the result should stay cached, nor for newly allocated memory.
        assert_same(engine.apply(transform, x, out, backend="numba", cached_output=True), expected)
        assert not used_nontemporal_stores(calls)
        assert_same(engine.apply(transform, x, backend="numba"), expected)
        assert not used_nontemporal_stores(calls)


@pytest.mark.compiled
@pytest.mark.parametrize("layout", LAYOUTS)
def test_in_place_results_use_ordinary_stores(calls, force_nontemporal, layout):
    transform = Transform("caffe", layout=layout)
    x = random_batch(2, (3, 5, 7), "float32", layout)
    expected = oracle.apply(transform, x)
    engine.apply(transform, x, x, backend="numba")
    assert_same(x, expected)
    assert [call.in_place for call in calls] == [True]
    assert not used_nontemporal_stores(calls)
    engine.apply(transform, x, x.copy(), backend="numba")
    assert [call.in_place for call in calls] == [False]
    assert used_nontemporal_stores(calls)


PAGE_FAULTS_SCRIPT = """
import mmap, resource
import numpy as np
from fastvgg import Transform, engine

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

for layouts in (("NHWC", "NHWC"), ("NHWC", "NCHW"), ("NCHW", "NCHW")):
    transform = Transform("caffe", "preprocess", *layouts)
    x = np.ones((37, 3, 388, 388) if layouts[0] == "NCHW" else (37, 388, 388, 3), np.uint8)
    out = np.zeros(transform.output_shape(x.shape), np.float32)
    out[...] = 1  # touch its pages
    assert out.nbytes >= 2**26 - 2**20
    engine.apply(transform, x, out, backend="numba")
    for repeat in range(3):
        before = faults()
        engine.apply(transform, x, out, backend="numba")
        taken = faults() - before
        assert taken < out.nbytes // mmap.PAGESIZE // 100, (layouts, taken)
"""


@pytest.mark.compiled
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts page faults as Linux does")
def test_writing_into_a_touched_out_causes_no_page_faults():
    run_script(PAGE_FAULTS_SCRIPT)


def test_concurrent_calls_are_correct(backend, tiny_tiles):
    batches = [random_batch(seed, (2 + seed % 3, 11, 13), "uint8", "NHWC") for seed in range(16)]
    expected = [oracle.apply(Transform("caffe"), batch) for batch in batches]

    def round_trip(number):
        y = fastvgg.preprocess(batches[number], "caffe", threads=3, backend=backend)
        return y, fastvgg.restore(y, "caffe", threads=3, backend=backend)

    numbers = [*range(16)] * 6
    with ThreadPoolExecutor(max_workers=8) as callers:
        results = list(callers.map(round_trip, numbers))
    for number, (y, x) in zip(numbers, results, strict=True):
        assert_same(y, expected[number])
        assert_same(x, batches[number])


def test_concurrent_first_calls_are_correct():
    # In a separate process: in this one, other tests have already compiled these kernels.
    run_script(
        "import numpy as np\n"
        "from concurrent.futures import ThreadPoolExecutor\n"
        "import fastvgg\n"
        "x = np.arange(2 * 5 * 7 * 3, dtype=np.uint8).reshape(2, 5, 7, 3)\n"
        "modes = ['caffe', 'torch'] * 4\n"
        "def round_trip(mode):\n"
        "    return fastvgg.restore(fastvgg.preprocess(x, mode, threads=2), mode, threads=2)\n"
        "with ThreadPoolExecutor(max_workers=8) as callers:\n"
        "    for actual in callers.map(round_trip, modes):\n"
        "        assert (actual == x).all()\n"
    )


FORK = """
import os, signal
import numpy as np
import fastvgg
from fastvgg import call_plan, engine, oracle
from fastvgg.transform import Transform

call_plan.MIN_TILE_BYTES = 300
x = np.random.default_rng(0).integers(0, 256, (11, 13, 17, 3), dtype=np.uint8)
expected = oracle.apply(Transform("torch"), x)
assert (fastvgg.preprocess(x, "torch", threads=4) == expected).all()

child = os.fork()
if child == 0:
    signal.alarm(60)  # a child that waits for a thread that it does not have would wait forever
    code = 1
    try:
        right = (fastvgg.preprocess(x, "torch", threads=4) == expected).all()
        code = 0 if right else 2
    finally:
        os._exit(code)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert (fastvgg.preprocess(x, "torch", threads=4) == expected).all()
"""


def test_results_are_correct_in_a_forked_child():
    run_script(FORK)


WITHOUT_NUMBA = """
import sys
sys.modules["numba"] = None
import warnings
import numpy as np
import fastvgg
from fastvgg import oracle
from fastvgg.errors import BackendError
from fastvgg.transform import Transform

x = np.arange(2 * 5 * 7 * 3, dtype=np.uint8).reshape(2, 5, 7, 3)
"""


def test_without_numba_auto_warns_once_and_falls_back_to_numpy():
    run_script(
        WITHOUT_NUMBA
        + "with warnings.catch_warnings(record=True) as caught:\n"
        + "    warnings.simplefilter('always')\n"
        + "    y = fastvgg.preprocess(x, 'caffe')\n"
        + "    back = fastvgg.restore(y, 'caffe', backend='auto')\n"
        + "assert [warning.category for warning in caught] == [UserWarning], caught\n"
        + "assert 'Numba is not usable' in str(caught[0].message)\n"
        + "assert 'pip install numba' in str(caught[0].message)\n"
        + "assert (y == oracle.apply(Transform('caffe'), x)).all()\n"
        + "assert (back == x).all()\n"
    )


def test_without_numba_the_numpy_backend_does_not_warn():
    run_script(
        WITHOUT_NUMBA
        + "warnings.simplefilter('error')\n"
        + "y = fastvgg.preprocess(x, 'caffe', backend='numpy')\n"
        + "assert (fastvgg.restore(y, 'caffe', backend='numpy') == x).all()\n"
    )


def test_without_numba_the_numba_backend_is_rejected():
    run_script(
        WITHOUT_NUMBA
        + "out = np.full(x.shape, 7, np.float32)\n"
        + "try:\n"
        + "    fastvgg.preprocess(x, 'caffe', backend='numba', out=out)\n"
        + "except BackendError as error:\n"
        + "    assert 'not installed' in error.problem\n"
        + "    assert error.remedy == 'pip install numba'\n"
        + "    assert isinstance(error, RuntimeError)\n"
        + "else:\n"
        + "    raise AssertionError('nothing was refused')\n"
        + "assert (out == 7).all()\n"
    )


DISABLED = """
import warnings
import numpy as np
import fastvgg
from fastvgg import backend, oracle
from fastvgg.errors import BackendError
from fastvgg.transform import Transform

x = np.arange(2 * 5 * 7 * 3, dtype=np.uint8).reshape(2, 5, 7, 3)
backend.NUMBA_START_SECONDS = backend.COMPILE_SECONDS = 0.0  # as if a kernel paid off at once
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    y = fastvgg.preprocess(x, "caffe")
    back = fastvgg.restore(y, "caffe", backend="auto")
assert [warning.category for warning in caught] == [UserWarning], caught
assert "NUMBA_DISABLE_JIT" in str(caught[0].message)
assert (y == oracle.apply(Transform("caffe"), x)).all()
assert (back == x).all()
out = np.full(x.shape, 7, np.float32)
try:
    fastvgg.preprocess(x, "caffe", backend="numba", out=out)
except BackendError as error:
    assert "NUMBA_DISABLE_JIT" in error.problem
else:
    raise AssertionError("nothing was refused")
assert (out == 7).all()
"""


@pytest.mark.compiled
def test_with_compilation_disabled_auto_warns_once_and_numba_is_rejected():
    run_script(DISABLED, NUMBA_DISABLE_JIT="1")


@pytest.mark.parametrize("direction", [fastvgg.preprocess, fastvgg.restore])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_results_do_not_depend_on_errstate(backend, direction, dtype):
    x = filled_with(special_values("float32"))
    expected = direction(x, "torch", dtype=dtype, threads=1, backend=backend)
    with np.errstate(all="raise"):
        actual = direction(x, "torch", dtype=dtype, threads=1, backend=backend)
    assert_same(actual, expected)


@sampled("dtype", FLOATS, one_in=2)
def test_subnormal_constants_ignore_errstate(backend, dtype):
    tiny = Mode("tiny", divide=1e-39, mean=(1e-40, 0.0, 1e-45), std=(1e3, 1e-39, 7.0), order="BGR")
    x = every_value()
    forward, back = Transform(tiny, dtype=dtype), Transform(tiny, "restore")
    expected = oracle.apply(forward, x)
    with np.errstate(all="raise"):
        y = engine.apply(forward, x, threads=1, backend=backend)
        image = engine.apply(back, y, threads=1, backend=backend)
    assert_same(y, expected)
    assert_same(image, oracle.apply(back, expected))


def test_threads_accepts_numpy_integers(backend):
    x = every_value()
    actual = fastvgg.preprocess(x, "caffe", threads=np.int64(2), backend=backend)
    assert_same(actual, oracle.apply(Transform("caffe"), x))


class MisreportingArray(np.ndarray):
    """An array whose interface reports other memory than its own."""

    other_memory = np.zeros(10_000, np.float32)
    __array_struct__ = property(lambda self: self.other_memory.__array_struct__)


def test_array_interface_of_a_subclass_is_ignored(backend):
    x = every_value()
    expected = oracle.apply(Transform("caffe"), x)
    out = np.zeros(x.shape, np.float32)
    fastvgg.preprocess(
        x.view(MisreportingArray), "caffe", out=out.view(MisreportingArray), backend=backend
    )
    assert_same(out, expected)
    assert not MisreportingArray.other_memory.any()


def test_packing_rejects_unknown_backend():
    with pytest.raises(UsageError, match="unknown backend 'cuda'"):
        engine.apply(Transform("identity", "pack"), every_value(), backend="cuda")


@pytest.mark.parametrize("layout", [np.array(["NHWC", "NCHW"]), ["NHWC"], 4])
def test_layout_that_is_not_a_string_is_rejected(layout):
    with pytest.raises(UsageError, match="unknown layout"):
        fastvgg.preprocess(every_value(), "caffe", layout=layout)


@pytest.mark.parametrize("threads", [True, 1.5, "2", 0, -1])
def test_threads_must_be_an_integer(backend, threads):
    with pytest.raises(UsageError, match="integer"):
        fastvgg.preprocess(every_value(), "caffe", threads=threads, backend=backend)


def test_masked_out_is_rejected(backend):
    x = every_value()
    out = np.ma.masked_array(np.zeros(x.shape, np.float32))
    with pytest.raises(OutputError, match="MaskedArray"):
        fastvgg.preprocess(x, "caffe", out=out, backend=backend)
    assert not out.data.any()


@pytest.mark.parametrize("arguments", [{"dtype": "int32"}, {"dtype": ["f4"]}, {"layout": ["NHWC"]}])
def test_rejections_have_no_exception_context(arguments):
    with pytest.raises(UsageError) as refused:
        fastvgg.preprocess(np.zeros((2, 3, 3), np.uint8), "tf", **arguments)
    assert refused.value.__context__ is None or refused.value.__suppress_context__
