"""The oracle against expectations computed without NumPy's array arithmetic."""

from __future__ import annotations

import math
import struct
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest

from fastvgg import oracle
from fastvgg.errors import DtypeError, ShapeError
from fastvgg.transform import Mode, Transform
from tests.helpers.batches import (
    FLOATS,
    KERAS_MODES,
    LAYOUT_PAIRS,
    assert_same,
    dtype_of,
    every_value,
    filled_with,
    frozen,
    in_layout,
    unchanged,
)

NAN, INF = math.nan, math.inf
BELOW_HALF = math.nextafter(0.5, 0)
MIN_SUBNORMAL = {
    "float16": 2.0**-24,
    "bfloat16": 2.0**-133,
    "float32": 2.0**-149,
    "float64": 2.0**-1074,
}

# The pixels (0, 0, 0), (10, 20, 30), (255, 255, 255) in float32: exact fractions,
# rounded after every step. Hexadecimal literals are exact.
LITERALS = {
    "caffe": [
        ("-0x1.9fc18ap+6", "-0x1.d31db2p+6", "-0x1.eeb852p+6"),
        ("-0x1.27c18ap+6", "-0x1.831db2p+6", "-0x1.c6b852p+6"),
        ("0x1.2e1f3cp+7", "0x1.147128p+7", "0x1.06a3d8p+7"),
    ],
    "tf": [
        ("-0x1.000000p+0", "-0x1.000000p+0", "-0x1.000000p+0"),
        ("-0x1.d7d7d8p-1", "-0x1.afafb0p-1", "-0x1.878788p-1"),
        ("0x1.000000p+0", "0x1.000000p+0", "0x1.000000p+0"),
    ],
    "torch": [
        ("-0x1.0f177ap+1", "-0x1.049248p+1", "-0x1.cdf012p+0"),
        ("-0x1.f25814p+0", "-0x1.af81cap+0", "-0x1.4814e2p+0"),
        ("0x1.1fdc3ap+1", "0x1.36db6ep+1", "0x1.51eb86p+1"),
    ],
}


def rounded_to_float32(value):
    """A Python float, rounded to the nearest float32.

    Of two float32 numbers, the sum, difference, product or quotient that Python computes in double
    precision and this then rounds again is the correctly rounded one: 53 bits are more than twice
    24 and two, so the second rounding never meets a tie that the first one made.
    """
    return struct.unpack("<f", struct.pack("<f", value))[0]


def rounded_to_float64(value):
    return value


ROUNDED = {"float32": rounded_to_float32, "float64": rounded_to_float64}

# Divisor, means and deviations in the channel order of y, and the channel of x for each.
CONSTANTS = {
    "caffe": (None, (103.939, 116.779, 123.68), None, (2, 1, 0)),
    "tf": (127.5, (1.0, 1.0, 1.0), None, (0, 1, 2)),
    "torch": (255.0, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), (0, 1, 2)),
}


def network_input(pixel, mode, rounded):
    """Preprocess one pixel of three Python floats, rounding after every operation."""
    divide, mean, std, origins = CONSTANTS[mode]
    y = []
    for channel, origin in enumerate(origins):
        value = pixel[origin]
        if divide is not None:
            value = rounded(value / rounded(divide))
        value = rounded(value - rounded(mean[channel]))
        if std is not None:
            value = rounded(value / rounded(std[channel]))
        y.append(value)
    return y


def image_value(y, mode, rounded):
    """Invert one pixel of network input, without clipping and rounding to integers."""
    divide, mean, std, origins = CONSTANTS[mode]
    pixel = [0.0, 0.0, 0.0]
    for channel, origin in enumerate(origins):
        value = y[channel]
        if std is not None:
            value = rounded(value * rounded(std[channel]))
        value = rounded(value + rounded(mean[channel]))
        if divide is not None:
            value = rounded(value * rounded(divide))
        pixel[origin] = value
    return pixel


def is_correctly_rounded(actual, exact):
    """Return whether a float is nearest to the exact value, with ties to even."""
    value = Fraction(float(actual))
    for direction in (-np.inf, np.inf):
        neighbour = Fraction(float(np.nextafter(actual, actual.dtype.type(direction))))
        if abs(neighbour - exact) < abs(value - exact):
            return False
        if abs(neighbour - exact) == abs(value - exact):
            return int(actual.view(f"u{actual.itemsize}")) % 2 == 0
    return True


@pytest.mark.parametrize("mode", KERAS_MODES)
def test_three_pixels_match_literal_values(mode):
    x = frozen(np.array([[[0, 0, 0], [10, 20, 30], [255, 255, 255]]], np.uint8))
    literals = [[float.fromhex(value) for value in pixel] for pixel in LITERALS[mode]]
    expected = np.array([literals], np.float32)
    assert expected.tolist() == [literals]
    assert_same(oracle.apply(Transform(mode), x), expected)
    assert_same(oracle.apply(Transform(mode, "restore"), frozen(expected)), x)


def test_caffe_mode_is_bgr_with_bgr_means():
    x = frozen(np.array([[[10, 20, 30]]], np.float64))
    expected = np.array([[[30 - 103.939, 20 - 116.779, 10 - 123.68]]])
    assert_same(oracle.apply(Transform("caffe"), x), expected)


@pytest.mark.parametrize("compute", ["float32", "float64"])
@pytest.mark.parametrize("mode", KERAS_MODES)
def test_forward_matches_stepwise_rounded_python_arithmetic(mode, compute):
    x = every_value()
    pixels = x.reshape(-1, 3).tolist()
    expected = [network_input(pixel, mode, ROUNDED[compute]) for pixel in pixels]
    actual = oracle.apply(Transform(mode, dtype=compute), x)
    assert_same(actual, np.array(expected, compute).reshape(x.shape))


@pytest.mark.parametrize("compute", ["float32", "float64"])
@pytest.mark.parametrize("mode", KERAS_MODES)
def test_inverse_matches_stepwise_rounded_python_arithmetic(mode, compute):
    y = oracle.forward(every_value().astype(compute), Mode.from_name(mode))
    # Neither integers nor in range, like the values of an optimized image.
    y = frozen(y * y.dtype.type(1.37))
    expected = [image_value(pixel, mode, ROUNDED[compute]) for pixel in y.reshape(-1, 3).tolist()]
    with unchanged(y):
        actual = oracle.inverse(y, Mode.from_name(mode))
    assert np.array_equal(actual, np.array(expected, compute).reshape(y.shape))
    assert actual.dtype == y.dtype


@pytest.mark.parametrize("compute", ["float32", "float64"])
def test_each_forward_step_is_correctly_rounded(compute):
    scalar = np.dtype(compute).type
    divide, mean, std, _ = CONSTANTS["torch"]
    x = every_value().astype(compute)
    quotient = oracle.forward(x, Mode("a", divide))
    difference = oracle.forward(x, Mode("b", divide, mean))
    result = oracle.forward(x, Mode("c", divide, mean, std))
    assert np.array_equal(result, oracle.forward(x, Mode.TORCH))
    for at in np.ndindex(x.shape):
        c = at[-1]
        over = [Fraction(float(scalar(value))) for value in (divide, mean[c], std[c])]
        before = [Fraction(float(step[at])) for step in (x, quotient, difference)]
        assert is_correctly_rounded(quotient[at], before[0] / over[0])
        assert is_correctly_rounded(difference[at], before[1] - over[1])
        assert is_correctly_rounded(result[at], before[2] / over[2])


@pytest.mark.parametrize("compute", ["float32", "float64"])
def test_each_inverse_step_is_correctly_rounded(compute):
    scalar = np.dtype(compute).type
    divide, mean, std, _ = CONSTANTS["torch"]
    y = oracle.forward(every_value().astype(compute), Mode.TORCH)
    product = oracle.inverse(y, Mode("a", std=std))
    total = oracle.inverse(y, Mode("b", mean=mean, std=std))
    result = oracle.inverse(y, Mode.TORCH)
    for at in np.ndindex(y.shape):
        c = at[-1]
        by = [Fraction(float(scalar(value))) for value in (std[c], mean[c], divide)]
        before = [Fraction(float(step[at])) for step in (y, product, total)]
        assert is_correctly_rounded(product[at], before[0] * by[0])
        assert is_correctly_rounded(total[at], before[1] + by[1])
        assert is_correctly_rounded(result[at], before[2] * by[2])


def test_is_correctly_rounded_detects_neighbors_and_odd_ties():
    one = np.float32(1)
    above = np.nextafter(one, np.float32(2))
    tie = (Fraction(float(one)) + Fraction(float(above))) / 2
    assert is_correctly_rounded(one, Fraction(1))
    assert not is_correctly_rounded(above, Fraction(1))
    assert is_correctly_rounded(one, tie)
    assert not is_correctly_rounded(above, tie)


SATURATED = [
    # value, nearest, truncated
    (NAN, 0, 0),
    (-NAN, 0, 0),
    (-INF, 0, 0),
    (INF, 255, 255),
    (-1e30, 0, 0),
    (1e30, 255, 255),
    (-1.0, 0, 0),
    (-0.75, 0, 0),
    (-0.5, 0, 0),
    (-0.0, 0, 0),
    (0.0, 0, 0),
    (0.25, 0, 0),
    (BELOW_HALF, 0, 0),
    (0.5, 0, 0),
    (math.nextafter(0.5, 1), 1, 0),
    (1.0, 1, 1),
    (1.25, 1, 1),
    (1.5, 2, 1),
    (2.5, 2, 2),
    (2.75, 3, 2),
    (3.5, 4, 3),
    (126.5, 126, 126),
    (127.5, 128, 127),
    (253.5, 254, 253),
    (254.49, 254, 254),
    (254.5, 254, 254),
    (254.51, 255, 254),
    (255.0, 255, 255),
    (255.49, 255, 255),
    (255.5, 255, 255),
    (255.51, 255, 255),
    (256.0, 255, 255),
    (511.0, 255, 255),
]


@pytest.mark.parametrize(("rounding", "column"), [("nearest", 1), ("truncate", 2)])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_saturation_follows_the_table(dtype, rounding, column):
    table = SATURATED
    if dtype == "float32":  # equal to 0.5 in float32
        table = [row for row in table if row[0] not in (BELOW_HALF, math.nextafter(0.5, 1))]
    x = frozen(np.array([row[0] for row in table], dtype))
    expected = np.array([row[column] for row in table], dtype)
    with unchanged(x):
        actual = oracle.saturate(x, rounding)
    assert_same(actual, expected)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_values_next_to_a_tie_round_to_the_nearest_integer(dtype):
    scalar = np.dtype(dtype).type
    halves = np.arange(255, dtype=dtype) + scalar(0.5)
    below, above = np.nextafter(halves, scalar(0)), np.nextafter(halves, scalar(256))
    whole = np.arange(255, dtype=dtype)
    assert_same(oracle.saturate(below, "nearest"), whole)
    assert_same(oracle.saturate(above, "nearest"), whole + 1)
    assert_same(oracle.saturate(halves, "nearest"), whole + whole % 2)
    assert_same(oracle.saturate(above, "truncate"), whole)


def is_representable(value, dtype):
    with np.errstate(over="ignore"):
        return math.isnan(value) or float(dtype_of(dtype).type(value)) == value


@pytest.mark.parametrize("target", ["uint8", *FLOATS])
@pytest.mark.parametrize("source", FLOATS)
def test_restore_saturates_for_every_dtype_pair(source, target):
    # If the dtypes differ, values are first rounded to float32.
    representable = [
        row
        for row in SATURATED
        if is_representable(row[0], source) and is_representable(row[0], "float32")
    ]
    tiny = MIN_SUBNORMAL[source]
    y = filled_with(np.array([row[0] for row in representable] + [tiny, -tiny], dtype_of(source)))
    expected = filled_with(np.array([row[1] for row in representable] + [0, 0], dtype_of(target)))
    with unchanged(y):
        actual = oracle.apply(Transform("identity", "restore", dtype=target), y)
    assert len(representable) > 20
    assert_same(actual, expected)


@pytest.mark.parametrize("target", ["uint8", *FLOATS])
def test_no_restored_zero_is_negative(target):
    y = filled_with(np.array([-0.0, -0.25, -1e-45, -INF, NAN], np.float32))
    actual = oracle.apply(Transform("identity", "restore", dtype=target), y)
    assert_same(actual, np.zeros(y.shape, dtype_of(target)))


def test_preprocess_keeps_the_sign_of_zero_and_infinities():
    x = filled_with(np.array([-0.0, 0.0, INF, -INF, NAN, 2.0**-149], np.float32))
    assert_same(oracle.apply(Transform("identity"), x), x)


# In double precision 103.9390001 is above the mean; in float32 the two are the same number.
NEAR_MEAN = 103.9390001


@pytest.mark.parametrize(
    ("source", "target", "expected"),
    [
        ("float64", "float64", NEAR_MEAN - 103.939),
        ("float64", "float32", 0.0),
        ("float64", "float16", 0.0),
        ("float32", "float64", 0.0),
        ("float32", "float32", 0.0),
    ],
)
def test_preprocess_computes_in_the_narrower_dtype(source, target, expected):
    x = frozen(np.full((5, 7, 3), NEAR_MEAN, source))
    actual = oracle.apply(Transform("caffe", dtype=target), x)
    assert actual.dtype == target
    assert float(actual[0, 0, 0]) == expected


def test_uint8_to_float64_is_computed_in_float64():
    x = frozen(np.full((5, 7, 3), 100, np.uint8))
    actual = oracle.apply(Transform("torch", dtype="float64"), x)
    assert actual[0, 0].tolist() == [
        (100 / 255 - 0.485) / 0.229,
        (100 / 255 - 0.456) / 0.224,
        (100 / 255 - 0.406) / 0.225,
    ]


def test_restore_to_uint8_computes_float64_in_float64():
    # One part in 2**52 below a half: float32 would round it up to the half, and then to even.
    below = math.nextafter(1.5, 0)
    y = frozen(np.full((5, 7, 3), below))
    assert_same(oracle.apply(Transform("identity", "restore"), y), np.full((5, 7, 3), 1, np.uint8))
    narrowed = oracle.apply(Transform("identity", "restore", dtype="float32"), y)
    assert_same(narrowed, np.full((5, 7, 3), 2, np.float32))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_16_bit_results_are_computed_in_float32_and_rounded_once(dtype):
    x = every_value()
    values = [
        network_input(pixel, "torch", rounded_to_float32) for pixel in x.reshape(-1, 3).tolist()
    ]
    expected = np.array(values, np.float32).astype(dtype_of(dtype)).reshape(x.shape)
    assert_same(oracle.apply(Transform("torch", dtype=dtype), x), expected)
    # Computing in the half dtype loses bits; otherwise this test could not fail.
    lossy = oracle.forward(x.astype(dtype_of(dtype)), Mode.TORCH)
    assert (lossy != expected).any()


def test_float16_overflow_becomes_infinity_without_a_warning():
    x = filled_with(np.array([65519.0, 65520.0, -65520.0, 1e30], np.float32))
    expected = filled_with(np.array([65504.0, INF, -INF, INF], np.float16))
    assert_same(oracle.apply(Transform("identity", dtype="float16"), x), expected)


@pytest.mark.parametrize(("layout", "out_layout"), LAYOUT_PAIRS)
def test_layouts_only_move_the_channel_axis(layout, out_layout):
    pixels = np.arange(2 * 5 * 7 * 3, dtype=np.uint8).reshape(2, 5, 7, 3)
    x = frozen(in_layout(pixels, layout))
    transform = Transform("identity", "preprocess", layout, out_layout)
    with unchanged(x):
        actual = oracle.apply(transform, x)
    assert_same(actual, in_layout(pixels, out_layout).astype(np.float32))
    for n in range(2):
        assert_same(oracle.apply(transform, x[n]), actual[n])


def test_identity_transform_returns_a_new_array():
    x = frozen(every_value().astype(np.float32))
    actual = oracle.apply(Transform("identity"), x)
    assert_same(actual, x)
    assert not np.shares_memory(actual, x)


@pytest.mark.parametrize("shape", [(0, 5, 7, 3), (2, 0, 7, 3), (2, 5, 0, 3), (0, 7, 3)])
def test_empty_batch_returns_an_empty_result(shape):
    assert_same(oracle.apply(Transform("torch"), np.empty(shape, np.uint8)), np.empty(shape, "f4"))


@pytest.mark.parametrize("direction", ["preprocess", "restore"])
@pytest.mark.parametrize("dtype", ["int32", "complex64", "object", "bool"])
def test_unsupported_dtype_is_rejected(direction, dtype):
    with pytest.raises(DtypeError):
        oracle.apply(Transform("tf", direction, dtype="float32"), np.zeros((5, 7, 3), dtype))


def test_wrong_shape_is_rejected():
    with pytest.raises(ShapeError):
        oracle.apply(Transform("tf"), np.zeros((2, 5, 7, 4), np.uint8))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("mode", ["caffe", "tf", "torch", "identity"])
def test_built_in_modes_are_restorable_in_every_storage_dtype(mode, dtype):
    assert oracle.unrestorable(Mode.from_name(mode), dtype) == 0


def test_unrestorable_counts_the_values_lost_by_custom_modes():
    # bfloat16 next to -1 has steps of 2**-8: all 256 values become -1, and -1 becomes 0.
    squeezed = Mode("squeezed", divide=2.0**20, mean=(1.0, 1.0, 1.0))
    assert oracle.unrestorable(squeezed, "bfloat16") == 3 * 255
    assert oracle.unrestorable(squeezed, "float64") == 0
    one_channel = Mode("one channel", mean=(0.0, 2.0**40, 0.0))
    assert oracle.unrestorable(one_channel, "float32") == 255


def test_oracle_bfloat16_is_the_ml_dtypes_type():
    x = every_value()
    assert oracle.apply(Transform("tf", dtype="bfloat16"), x).dtype == ml_dtypes.bfloat16
