"""Which loop is meant, which constants it reads, and when a reciprocal may stand for a division."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from batches import FLOATS, KERAS_MODES, LAYOUT_PAIRS, LAYOUTS, assert_same, bits
from by_hand import MODES, OWN, SMALL
from hypothesis import given, settings
from hypothesis import strategies as st

from fastvgg.kernels import recipe
from fastvgg.kernels.compile import processor
from fastvgg.kernels.recipe import ROW_LANES, ROWS, Recipe, constants, reciprocal_is_exact
from fastvgg.transform import Mode, Transform

fuses = pytest.mark.skipif(
    not processor().fuses, reason="the processor has no fused multiply-add, and divides"
)
BYTES = np.arange(256, dtype=np.float32)


def nearest_float32(exact, zero=0.0):
    """The float32 nearest to a fraction, half to even; `zero` where the fraction is none."""
    if exact == 0:
        return np.float32(zero)
    magnitude = abs(exact)
    exponent = magnitude.numerator.bit_length() - magnitude.denominator.bit_length()
    exponent -= magnitude < Fraction(2) ** exponent
    step = Fraction(2) ** max(exponent - 23, -149)
    rounded = round(magnitude / step) * step  # Python rounds half to even
    value = math.inf if rounded >= Fraction(2) ** 128 else float(rounded)
    return np.float32(math.copysign(value, exact))


def fused_exactly(a, b, c):
    """Finite a * b + c, rounded once from the exact number."""
    product = Fraction(float(a)) * Fraction(float(b))
    # Where all is zero, the sum of two zeros of different signs is the positive one.
    with np.errstate(under="ignore"):
        zero = float(np.float64(a) * np.float64(b)) + float(c) if product == 0 else 0.0
    return nearest_float32(product + Fraction(float(c)), zero)


def reciprocal_of(divisor):
    """The reciprocal and what rounding took from it; None where that is infinite."""
    with np.errstate(all="ignore"):
        reciprocal = np.float32(1) / divisor
    if not np.isfinite(reciprocal):
        return None
    rest = 1 / Fraction(float(divisor)) - Fraction(float(reciprocal))
    return reciprocal, nearest_float32(rest, math.copysign(0.0, divisor))


def divided_by_reciprocal(x, divisor):
    """The two operations on one number; None where the reciprocal is infinite."""
    if reciprocal_of(divisor) is None:
        return None
    reciprocal, rest = reciprocal_of(divisor)
    with np.errstate(all="ignore"):
        correction = x * rest
    if np.isinf(correction):
        return correction
    return fused_exactly(x, reciprocal, correction)


def test_the_exact_rounding_is_that_of_numpy():
    random = np.random.default_rng(0)
    doubles = random.uniform(1, 2, 4000) * 2.0 ** random.integers(-155, 130, 4000)
    doubles = np.concatenate([doubles, -doubles, [2.0**-150, 3 * 2.0**-150, 2.0**128 - 2.0**103]])
    with np.errstate(over="ignore"):
        expected = doubles.astype(np.float32)
    actual = np.array([nearest_float32(Fraction(float(x))) for x in doubles], np.float32)
    assert np.array_equal(bits(actual), bits(expected))


floats = st.integers(0, 2**32 - 1).map(lambda pattern: np.uint32(pattern).view(np.float32))
finite = floats.filter(np.isfinite)


@given(a=finite, b=finite, c=finite)
@settings(max_examples=500)
def test_the_fused_operation_rounds_once(a, b, c):
    check_fused(a, b, c)


@given(a=finite, b=finite, steps=st.integers(-3, 3), doubled=st.integers(-30, 30))
@settings(max_examples=500)
def test_the_fused_operation_rounds_once_where_nearly_everything_cancels(a, b, steps, doubled):
    with np.errstate(all="ignore"):
        near = -(a * b)
        pattern = (near.view(np.uint32).astype(np.int64) + steps) % 2**32
        c = np.uint32(pattern).view(np.float32) * np.float32(2.0**doubled)
    if np.isfinite(c):
        check_fused(a, b, c)


def check_fused(a, b, c):
    with np.errstate(all="ignore"):
        actual = recipe._fused(np.array([a]), b, np.array([c]))
    assert bits(actual) == bits(fused_exactly(a, b, c).reshape(1)), (a, b, c)


def test_the_fused_operation_rounds_once_where_twice_is_not_the_same():
    # The product is 64 but for 2**-40: next to 2**30 nearly half of the step to the next float.
    a, b = np.float32(8 + 2**-20), np.float32(8 - 2**-20)
    twice = []
    for sign in (1, -1):
        for number in (2.0**30, 2.0**30 + 128, 2.0**30 + 256):
            for c in (np.float32(number), np.float32(-number)):
                check_fused(a, sign * b, c)
                in_two_roundings = np.float32(float(a) * float(sign * b) + float(c))
                twice.append(in_two_roundings == fused_exactly(a, sign * b, c))
    assert not all(twice)


def agrees_with_exact_arithmetic(x, divisor):
    """Whether the recipe's answer for some numbers is that of exact arithmetic; and that answer."""
    with np.errstate(all="ignore"):
        quotients = x / divisor
    expected = [divided_by_reciprocal(number, divisor) for number in x]
    exact = all(
        got is not None and got.tobytes() == quotient.tobytes()
        for got, quotient in zip(expected, quotients, strict=True)
    )
    assert reciprocal_is_exact(x, divisor) == exact, (divisor, x)
    return exact


ADVERSARIAL = [
    *(127.5, 255.0, 0.229, 0.224, 0.225, 1.0, -1.0, 3.0, 2.0**100, 2.0**-100),
    *(np.nextafter(np.float32(2.0**power), np.float32(0)) for power in (-20, 0, 1, 30)),
    *(np.nextafter(np.float32(2.0**power), np.float32(9e9)) for power in (-20, 0, 1, 30)),
    *(3.4e38, 3e38, 1e38, 8.5e37, 2.0**126, 2.0**127, 1e-45, 1e-40, 1.17e-38, 1e-37, 1e-36),
]


@fuses
@pytest.mark.parametrize("divisor", ADVERSARIAL, ids=str)
def test_a_reciprocal_is_exact_for_bytes_where_exact_arithmetic_says_so(divisor):
    agrees_with_exact_arithmetic(BYTES, np.float32(divisor))


@fuses
def test_exact_arithmetic_says_both_of_reciprocals():
    answers = [agrees_with_exact_arithmetic(BYTES[::5], np.float32(d)) for d in ADVERSARIAL]
    assert 0 < sum(answers) < len(answers)


@fuses
@given(divisor=finite.filter(bool), x=st.lists(finite, min_size=1, max_size=20))
@settings(max_examples=300)
def test_a_reciprocal_is_exact_for_any_numbers_where_exact_arithmetic_says_so(divisor, x):
    agrees_with_exact_arithmetic(np.array(x, np.float32), divisor)


@fuses
@pytest.mark.parametrize(
    ("x", "divisor"),
    [
        ([1.0], 2e-39),  # the reciprocal is infinite
        (BYTES, 3e38),  # what rounding took from the reciprocal has too few places
        ([-0.0], 3.0),  # comes out as +0.0
        ([0.0], -3.0),  # so does this
    ],
)
def test_a_reciprocal_is_not_exact_where_a_step_leaves_the_numbers_with_all_places(x, divisor):
    assert not agrees_with_exact_arithmetic(np.array(x, np.float32), np.float32(divisor))


def test_without_a_fused_operation_no_reciprocal_is_taken(monkeypatch):
    lesser = processor()._replace(fuses=False)
    monkeypatch.setattr(recipe, "processor", lambda: lesser)
    assert not reciprocal_is_exact(BYTES, np.float32(127.5))
    for mode in KERAS_MODES:
        assert "reciprocal" not in Recipe.of(Transform(mode), "uint8")


@fuses
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_bytes_are_divided_by_reciprocals_where_those_are_exact(dtype):
    divisions = {
        mode: Recipe.of(Transform(mode, dtype=dtype), "uint8")[7:9]
        for mode in (Mode.IDENTITY, *MODES)
    }
    assert divisions == {
        Mode.IDENTITY: ("none", "none"),
        Mode.CAFFE: ("none", "none"),
        Mode.TF: ("reciprocal", "none"),
        Mode.TORCH: ("reciprocal", "reciprocal"),
        OWN: ("reciprocal", "reciprocal"),
        SMALL: ("division", "division"),
    }


@pytest.mark.parametrize("direction", ["preprocess", "restore"])
@pytest.mark.parametrize(
    ("source", "target"),
    [("uint8", "float64"), *((source, target) for source in FLOATS for target in FLOATS)],
)
def test_floats_and_doubles_are_divided(direction, source, target):
    if direction == "restore" and source == "uint8":
        return
    for mode, expected in ((Mode.TF, ("division", "none")), (Mode.TORCH, ("division",) * 2)):
        found = Recipe.of(Transform(mode, direction, dtype=target), source)
        assert (found.divides, found.scales) == expected


@fuses
def test_one_std_without_an_exact_reciprocal_is_enough_to_divide_all():
    for at in range(3):
        std = [0.5, 0.3, 0.7]
        std[at] = 1e-39
        found = Recipe.of(Transform(Mode("own", std=tuple(std))), "uint8")
        assert (found.divides, found.scales) == ("none", "division")


@fuses
def test_what_a_std_divides_is_what_the_divisor_and_the_mean_have_left():
    # Of whole numbers 0 alone is divided wrongly by a negative number: it comes out as +0.0.
    std = (-3.0,) * 3
    means = {"a": (0.0, 255.0, 17.0), "b": (0.5, -1.0, 256.0)}
    found = {
        name: Recipe.of(Transform(Mode(name, mean=mean, std=std)), "uint8").scales
        for name, mean in means.items()
    }
    assert found == {"a": "division", "b": "reciprocal"}
    halves = Mode("c", divide=2.0, mean=means["b"], std=std)
    assert Recipe.of(Transform(halves), "uint8").scales == "division"


def test_a_recipe_says_what_a_transform_does():
    transform = Transform("caffe", "restore", "NCHW", "NHWC", "float16", "truncate")
    assert Recipe.of(transform, "float64", streams=True) == Recipe(
        restores=True,
        source="float64",
        target="float16",
        compute="float32",
        planar_source=True,
        planar_target=False,
        flips=True,
        divides="none",
        scales="none",
        rounding="truncate",
        in_place=False,
        streams=True,
    )


def test_transforms_that_differ_in_numbers_alone_have_one_recipe():
    other = Mode("other means", mean=(1.0, 2.0, 3.0), order="BGR")
    assert Recipe.of(Transform(other), "uint8") == Recipe.of(Transform("caffe"), "uint8")
    truncating = Transform("caffe", rounding="truncate")  # nothing is rounded forwards
    assert Recipe.of(truncating, "uint8") == Recipe.of(Transform("caffe"), "uint8")


@pytest.mark.parametrize("mode", ["caffe", "torch"])
@pytest.mark.parametrize("direction", ["preprocess", "restore"])
def test_channels_that_lie_reversed_are_flipped_where_others_are_not(direction, mode):
    for layouts in LAYOUT_PAIRS:
        transform = Transform(mode, direction, *layouts, "float32")
        plain = Recipe.of(transform, "float32")
        reversed_ = Recipe.of(transform, "float32", reverses=True)
        assert plain.flips == (mode == "caffe")
        assert reversed_.flips != plain.flips
        assert reversed_._replace(flips=plain.flips) == plain


@pytest.mark.parametrize(
    ("source", "target", "late"),
    [
        ("float32", "uint8", True),
        ("float16", "uint8", True),
        ("float64", "bfloat16", True),
        ("float16", "bfloat16", False),
        ("float32", "float32", False),
        ("float16", "float32", False),
    ],
)
def test_woven_pixels_are_flipped_where_their_elements_are_smaller(source, target, late):
    for layouts in LAYOUT_PAIRS:
        transform = Transform("caffe", "restore", *layouts, target)
        assert Recipe.of(transform, source).flips_late == (late and "NCHW" not in layouts)
        assert not Recipe.of(transform, source, reverses=True).flips_late


# What each row holds of a mode, in the channel order of y.
def rows_of(mode):
    means, std = mode.mean or (0, 0, 0), mode.std or (1, 1, 1)
    divide = 1 if mode.divide is None else mode.divide
    return {"divide": (divide,) * 3, "mean": means, "std": std}


@pytest.mark.parametrize("mode", [Mode.IDENTITY, *MODES], ids=lambda mode: mode.name)
@pytest.mark.parametrize(
    ("direction", "source", "target", "reverses"),
    [
        ("preprocess", "uint8", "float32", False),
        ("preprocess", "float64", "float64", True),
        ("restore", "float32", "uint8", False),
        ("restore", "float64", "float64", True),
    ],
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_rows_of_constants_are_in_the_order_that_the_loop_computes_in(
    mode, direction, source, target, reverses, layout
):
    found = Recipe.of(Transform(mode, direction, layout, layout, target), source, reverses=reverses)
    table = constants(mode, found)
    assert table.dtype == found.compute
    assert table.shape == (len(ROWS), ROW_LANES)
    assert table.flags.c_contiguous
    # y has the order of the mode, x the order RGB; and what is flipped late is computed before.
    reversed_ = (direction == "restore" and mode.flips) != found.flips_late
    scalar = np.dtype(found.compute).type
    for name, values in rows_of(mode).items():
        with np.errstate(all="ignore"):
            expected = np.array(values, scalar)[:: -1 if reversed_ else 1]
            reciprocals = scalar(1) / expected
        rows = {name: expected}
        if name != "mean":
            rows[f"1 / {name}"] = reciprocals
        if name != "mean" and scalar is np.float32 and np.isfinite(reciprocals).all():
            rests = [reciprocal_of(number)[1] for number in expected]
            rows[f"rest of 1 / {name}"] = np.array(rests)
        for row, numbers in rows.items():
            assert_same(table[ROWS.index(row)].reshape(-1, 3), np.tile(numbers, (16, 1)))


def test_a_mode_of_tiny_numbers_does_not_raise_the_callers_errors():
    tiny = Mode("tiny", divide=1e-39, mean=(1e-40, 0.0, 1e-45), std=(1e3, 1e-39, 7.0))
    for source, dtype in (("uint8", "float32"), ("float64", "float64")):
        with np.errstate(all="raise"):
            found = Recipe.of(Transform(tiny, dtype=dtype), source)
            assert np.isinf(constants(tiny, found)[1]).all() == (dtype == "float32")
