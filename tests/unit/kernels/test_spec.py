"""Which loop is meant, which constants it reads, and when a reciprocal may stand for a division."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastvgg import oracle
from fastvgg.kernels import jit, spec
from fastvgg.kernels.jit import Processor, processor
from fastvgg.kernels.memory import TABLE_COLUMNS, Constants
from fastvgg.kernels.spec import (
    KernelSpec,
    affine_constants,
    constant_table,
    reciprocal_is_exact,
)
from fastvgg.transform import Mode, Transform
from tests.helpers.batches import FLOATS, LAYOUT_PAIRS, LAYOUTS, assert_same, bits, dtype_of
from tests.helpers.kernel_harness import MODES, OWN, SMALL

fuses = pytest.mark.skipif(
    not processor().has_fma, reason="the processor has no fused multiply-add"
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
        actual = spec._fused(np.array([a]), b, np.array([c]))
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
    """Whether the spec's answer for some numbers is that of exact arithmetic; and that answer."""
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
@pytest.mark.parametrize("divisor", [127.5, 255.0, 0.229, 3.0, -7.0, 1e300, 5e-324, 1.7e308])
def test_a_reciprocal_is_exact_in_float64_where_exact_arithmetic_says_so(divisor):
    x, number = np.arange(256, dtype=np.float64), np.float64(divisor)
    with np.errstate(all="ignore"):
        reciprocal = 1 / number
    expected = False
    if np.isfinite(reciprocal):
        remainder = float(1 / Fraction(divisor) - Fraction(float(reciprocal)))
        products = [n * remainder for n in x.tolist()]
        fused = [
            float(Fraction(n) * Fraction(float(reciprocal)) + Fraction(product))
            if n
            else n * divisor
            for n, product in zip(x.tolist(), products, strict=True)
        ]
        signs = [math.copysign(1, value) for value in fused]
        with np.errstate(all="ignore"):
            quotients = (x / number).tolist()
        same_signs = signs == [math.copysign(1, value) for value in quotients]
        # Of the two products with zero, that with the remainder may have the other sign.
        zero = 0.0 * float(reciprocal) + 0.0 * remainder
        expected = fused == quotients and same_signs
        expected &= math.copysign(1, zero) == math.copysign(1, quotients[0])
    assert reciprocal_is_exact(x, number) == expected


@fuses
def test_bytes_are_divided_by_reciprocals_in_float64():
    for mode, expected in ((Mode.TF, ("reciprocal", "none")), (Mode.TORCH, ("reciprocal",) * 2)):
        found = KernelSpec.of(Transform(mode, dtype="float64"), "uint8")
        assert (found.divide, found.scale) == expected


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


def divided_without_fma(x, divisor):
    """What two products and their sum make of bytes, each rounded by itself."""
    with np.errstate(all="ignore"):
        reciprocal = np.float32(1) / divisor
        if not np.isfinite(reciprocal):
            return None
        shortened = (reciprocal.view(np.int32) // 256 * 256).view(np.float32)
        rest = 1 / Fraction(float(divisor)) - Fraction(float(shortened))
        rest = nearest_float32(rest, math.copysign(0.0, divisor))
        return x * shortened + x * rest


@pytest.mark.parametrize("divisor", ADVERSARIAL, ids=str)
def test_without_a_fused_operation_a_reciprocal_is_exact_where_three_others_are(
    monkeypatch, divisor
):
    lesser = processor()._replace(has_fma=False)
    monkeypatch.setattr(jit, "processor", lambda: lesser)
    found = divided_without_fma(BYTES, np.float32(divisor))
    with np.errstate(all="ignore"):
        exact = found is not None and found.tobytes() == (BYTES / np.float32(divisor)).tobytes()
    assert reciprocal_is_exact(BYTES, np.float32(divisor)) == exact
    assert exact or divisor not in (127.5, 255.0, 0.229, 0.224, 0.225)


def test_without_a_fused_operation_only_bytes_are_divided_by_reciprocals(monkeypatch):
    lesser = processor()._replace(has_fma=False)
    monkeypatch.setattr(jit, "processor", lambda: lesser)
    for dtype in ("float32", "float64"):
        for mode, scale in ((Mode.TF, "none"), (Mode.TORCH, "division")):
            found = KernelSpec.of(Transform(mode, dtype=dtype), "uint8")
            assert (found.divide, found.scale) == ("reciprocal", scale)


@fuses
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_bytes_are_divided_by_reciprocals_where_those_are_exact(dtype):
    divisions = {
        mode: (found.divide, found.scale)
        for mode in (Mode.IDENTITY, *MODES)
        if not (found := KernelSpec.of(Transform(mode, dtype=dtype), "uint8")).affine
    }
    expected = {
        Mode.IDENTITY: ("none", "none"),
        Mode.CAFFE: ("none", "none"),
        Mode.TF: ("reciprocal", "none"),
        Mode.TORCH: ("reciprocal", "reciprocal"),
        OWN: ("reciprocal", "reciprocal"),
        SMALL: ("division", "division"),
    }
    assert divisions == {mode: expected[mode] for mode in divisions}
    affine = {
        "float16": {Mode.TF, Mode.TORCH, OWN, SMALL},
        "bfloat16": {Mode.TF, Mode.TORCH, OWN},
        "float32": set(),
    }[dtype]
    assert set(divisions) == set(expected) - affine


MEANS, STDS = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
CLIP = Mode("clip", divide=255.0, mean=MEANS, std=STDS)


@pytest.mark.parametrize("half", ["float16", "bfloat16"])
@pytest.mark.parametrize("mode", [Mode.TF, Mode.TORCH, CLIP], ids=lambda mode: mode.name)
def test_one_multiplication_and_addition_has_the_results_of_the_oracle_for_every_input(mode, half):
    x = np.repeat(np.arange(256, dtype=np.uint8), 3).reshape(1, 256, 3)
    y = np.repeat(np.arange(65536, dtype=np.uint16), 3).view(dtype_of(half)).reshape(1, 65536, 3)
    for restores, values in ((False, x), (True, y)):
        transform = Transform(
            mode, "restore" if restores else "preprocess", dtype=None if restores else half
        )
        assert KernelSpec.of(transform, values.dtype.name).affine
        slope, intercept = affine_constants(mode, half, restores=restores)
        with np.errstate(all="ignore"):
            wide = values.astype(np.float32)
            if processor().has_fma:
                result = spec._fused(wide, slope, intercept)
            else:
                result = wide * slope + intercept
            if restores:
                result = oracle.saturate(result, "nearest").astype(np.uint8)
            else:
                result = result.astype(dtype_of(half))
        assert_same(np.ascontiguousarray(result), oracle.apply(transform, values))


def test_no_affine_formula_is_taken_where_it_has_other_results():
    assert affine_constants(OWN, "float16", restores=True) is None
    assert affine_constants(SMALL, "bfloat16", restores=False) is None
    assert not KernelSpec.of(Transform(OWN, "restore"), "float16").affine
    assert not KernelSpec.of(Transform(SMALL, dtype="bfloat16"), "uint8").affine
    for transform, source in (
        (Transform(Mode.TORCH, dtype="float16"), "float32"),
        (Transform(Mode.TORCH), "uint8"),
        (Transform(Mode.TORCH, "restore", rounding="truncate"), "float16"),
        (Transform(Mode.TORCH, "restore", dtype="float32"), "float16"),
        (Transform(Mode.TORCH, "restore"), "float32"),
    ):
        assert not KernelSpec.of(transform, source).affine


def test_ties_are_expected_where_a_byte_becomes_one():
    tying = Mode("tying", mean=(-256.0, 0.0, 0.0))  # 256 + 1 lies halfway between two of bfloat16
    assert KernelSpec.of(Transform(tying, dtype="bfloat16"), "uint8").may_tie
    assert not KernelSpec.of(Transform(Mode.CAFFE, dtype="bfloat16"), "uint8").may_tie
    assert KernelSpec.of(Transform(Mode.CAFFE, dtype="bfloat16"), "float32").may_tie


@pytest.mark.parametrize("direction", ["preprocess", "restore"])
@pytest.mark.parametrize("source", FLOATS)
@pytest.mark.parametrize("target", FLOATS)
def test_floats_are_divided(direction, source, target):
    for mode, expected in ((Mode.TF, ("division", "none")), (Mode.TORCH, ("division",) * 2)):
        found = KernelSpec.of(Transform(mode, direction, dtype=target), source)
        assert (found.divide, found.scale) == expected


@fuses
def test_one_std_without_an_exact_reciprocal_is_enough_to_divide_all():
    for at in range(3):
        std = [0.5, 0.3, 0.7]
        std[at] = 1e-39
        found = KernelSpec.of(Transform(Mode("own", std=tuple(std))), "uint8")
        assert (found.divide, found.scale) == ("none", "division")


@fuses
def test_what_a_std_divides_is_what_the_divisor_and_the_mean_have_left():
    # Of whole numbers 0 alone is divided wrongly by a negative number: it comes out as +0.0.
    std = (-3.0,) * 3
    means = {"a": (0.0, 255.0, 17.0), "b": (0.5, -1.0, 256.0)}
    found = {
        name: KernelSpec.of(Transform(Mode(name, mean=mean, std=std)), "uint8").scale
        for name, mean in means.items()
    }
    assert found == {"a": "division", "b": "reciprocal"}
    halves = Mode("c", divide=2.0, mean=means["b"], std=std)
    assert KernelSpec.of(Transform(halves), "uint8").scale == "division"


def test_a_spec_says_what_a_transform_does():
    transform = Transform("caffe", "restore", "NCHW", "NHWC", "float16", "truncate")
    assert KernelSpec.of(transform, "float64", nontemporal=True) == KernelSpec(
        restores=True,
        source="float64",
        target="float16",
        compute="float32",
        planar_source=True,
        planar_target=False,
        reverses_channels=True,
        affine=False,
        divide="none",
        scale="none",
        may_tie=False,
        rounding="truncate",
        nontemporal=True,
        plane_by_plane=False,
    )


def test_transforms_that_differ_in_numbers_alone_have_one_spec():
    other = Mode("other means", mean=(1.0, 2.0, 3.0), order="BGR")
    assert KernelSpec.of(Transform(other), "uint8") == KernelSpec.of(Transform("caffe"), "uint8")
    truncating = Transform("caffe", rounding="truncate")  # nothing is rounded forwards
    assert KernelSpec.of(truncating, "uint8") == KernelSpec.of(Transform("caffe"), "uint8")


@pytest.mark.parametrize("mode", ["caffe", "torch"])
@pytest.mark.parametrize("direction", ["preprocess", "restore"])
def test_channels_stored_in_reverse_are_reversed_where_others_are_not(direction, mode):
    for layouts in LAYOUT_PAIRS:
        transform = Transform(mode, direction, *layouts, "float32")
        plain = KernelSpec.of(transform, "float32")
        reversed_ = KernelSpec.of(transform, "float32", reversed_input=True)
        assert plain.reverses_channels == (mode == "caffe")
        assert reversed_.reverses_channels != plain.reverses_channels
        assert reversed_._replace(reverses_channels=plain.reverses_channels) == plain


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
def test_lanes_are_shuffled_where_their_elements_are_smaller(source, target, late):
    for layout, out_layout in LAYOUT_PAIRS:
        transform = Transform("caffe", "restore", layout, out_layout, target)
        found = KernelSpec.of(transform, source)
        plane_by_plane = (layout, out_layout) == ("NCHW", "NCHW")
        assert found.plane_by_plane == plane_by_plane
        assert found.shuffles_results == (late and not plane_by_plane)
        assert found.computes_planes == ((layout if late else out_layout) == "NCHW")


@pytest.mark.parametrize(
    ("source", "target", "out_layouts"),
    [
        ("float64", "uint8", ("NHWC", "NCHW")),
        ("float32", "uint8", ("NHWC", "NCHW")),
        ("float16", "uint8", ("NHWC",)),
        ("float64", "float32", ("NHWC",)),
        ("bfloat16", "float16", ()),
        ("uint8", "float32", ()),
    ],
)
def test_interleaved_pixels_are_taken_from_two_places_where_most_traffic_is_reads(
    source, target, out_layouts
):
    for layout, out_layout in LAYOUT_PAIRS:
        direction = "restore" if target == "uint8" else "preprocess"
        transform = Transform("caffe", direction, layout, out_layout, target)
        found = KernelSpec.of(transform, source)
        assert found.two_streams == (layout == "NHWC" and out_layout in out_layouts)
    plane_by_plane = KernelSpec.of(
        Transform("caffe", "restore", "NHWC", "NCHW"), "float32", nontemporal=True
    )
    assert plane_by_plane.plane_by_plane
    assert not plane_by_plane.two_streams


SSE = Processor(True, has_f16c=False, has_fma=False, vector_bytes=16, permuted_bytes=16)
AVX2 = Processor(True, has_f16c=True, has_fma=True, vector_bytes=32, permuted_bytes=16)
AVX512 = Processor(True, has_f16c=True, has_fma=True, vector_bytes=64, permuted_bytes=2)
NEON = Processor(False, has_f16c=True, has_fma=True, vector_bytes=16, permuted_bytes=1)


@pytest.mark.parametrize(
    ("source", "target", "lanes"),
    [
        # On SSE, AVX2, AVX-512 and NEON.
        ("uint8", "float32", (16, 16, 16, 16)),
        ("uint8", "float16", (16, 16, 32, 16)),
        ("float32", "uint8", (16, 32, 64, 32)),
        ("float64", "uint8", (16, 16, 64, 32)),
    ],
)
def test_results_fill_a_store_and_three_vectors_fit_into_registers(
    monkeypatch, source, target, lanes
):
    direction = "restore" if target == "uint8" else "preprocess"
    spec = KernelSpec.of(Transform("caffe", direction, dtype=target), source)
    for one, expected in zip((SSE, AVX2, AVX512, NEON), lanes, strict=True):
        monkeypatch.setattr(jit, "processor", lambda one=one: one)
        assert spec.lanes == expected


@pytest.mark.parametrize("layouts", LAYOUT_PAIRS, ids="-".join)
@pytest.mark.parametrize("half", ["float16", "bfloat16"])
def test_halves_are_shuffled_rather_than_planes_of_bytes(layouts, half):
    found = KernelSpec.of(Transform("caffe", "preprocess", *layouts, half), "uint8")
    assert found.shuffles_results == (layouts == ("NCHW", "NHWC"))


@pytest.mark.parametrize("layouts", LAYOUT_PAIRS, ids="-".join)
@pytest.mark.parametrize("half", ["float16", "bfloat16"])
@pytest.mark.parametrize("permuted_bytes", [1, 2, 16])
def test_blocks_are_split_between_bytes_and_bfloat16(monkeypatch, layouts, half, permuted_bytes):
    changed = processor()._replace(permuted_bytes=permuted_bytes)
    monkeypatch.setattr(jit, "processor", lambda: changed)
    bytes_to_half = KernelSpec.of(Transform("caffe", "preprocess", *layouts, half), "uint8")
    half_to_bytes = KernelSpec.of(Transform("caffe", "restore", *layouts), half)
    splits = half == "bfloat16" and permuted_bytes == 16
    assert half_to_bytes.splits == splits
    assert bytes_to_half.splits == (splits and layouts != ("NHWC", "NCHW"))


@pytest.mark.parametrize("layouts", LAYOUT_PAIRS, ids="-".join)
@pytest.mark.parametrize(
    ("source", "target", "together"), [("float32", "uint8", True), ("uint8", "float32", False)]
)
def test_planes_are_aligned_by_themselves_where_non_temporal_stores_need_it(
    layouts, source, target, together
):
    direction = "restore" if target == "uint8" else "preprocess"
    transform = Transform("tf", direction, *layouts, target)
    for nontemporal, aligned in itertools.product([True, False], repeat=2):
        found = KernelSpec.of(transform, source, nontemporal=nontemporal, aligned_planes=aligned)
        needed = not (aligned and together) and (layouts[0] == "NCHW" or nontemporal)
        assert found.plane_by_plane == (layouts[1] == "NCHW" and needed)
    in_place = KernelSpec.of(Transform("tf", layout="NCHW"), "float32", in_place=True)
    assert not in_place.plane_by_plane


# What each row holds of a mode, in the channel order of y.
def rows_of(mode):
    means, std = mode.mean or (0, 0, 0), mode.std or (1, 1, 1)
    divide = 1 if mode.divide is None else mode.divide
    return {"divide": (divide,) * 3, "mean": means, "std": std}


@pytest.mark.parametrize("mode", [Mode.IDENTITY, *MODES], ids=lambda mode: mode.name)
@pytest.mark.parametrize(
    ("direction", "source", "target", "reversed_input"),
    [
        ("preprocess", "uint8", "float32", False),
        ("preprocess", "float64", "float64", True),
        ("restore", "float32", "uint8", False),
        ("restore", "float64", "float64", True),
    ],
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_rows_of_constants_are_in_the_order_that_the_loop_computes_in(
    mode, direction, source, target, reversed_input, layout
):
    found = KernelSpec.of(
        Transform(mode, direction, layout, layout, target), source, reversed_input=reversed_input
    )
    table = constant_table(mode, found)
    assert table.dtype == found.compute
    assert table.shape == (len(Constants._fields), TABLE_COLUMNS)
    assert table.flags.c_contiguous
    # y has the order of the mode, x the order RGB; and what is reversed later is computed before.
    late = found.reverses_channels and found.shuffles_results
    reversed_ = (direction == "restore" and mode.is_bgr) != late
    scalar = np.dtype(found.compute).type
    for name, values in rows_of(mode).items():
        with np.errstate(all="ignore"):
            expected = np.array(values, scalar)[:: -1 if reversed_ else 1]
            reciprocals = scalar(1) / expected
            if not processor().has_fma:
                bits_of = np.dtype(f"i{expected.itemsize}")
                reciprocals = (reciprocals.view(bits_of) // 256 * 256).view(scalar)
        rows = {name: expected}
        if name != "mean":
            rows[f"{name}_reciprocal"] = reciprocals
        if name != "mean" and scalar is np.float32 and np.isfinite(reciprocals).all():
            rests = [
                nearest_float32(1 / Fraction(float(number)) - Fraction(float(reciprocal)))
                for number, reciprocal in zip(expected, reciprocals, strict=True)
            ]
            rows[f"{name}_remainder"] = np.array(rests)
        for row, numbers in rows.items():
            assert_same(
                table[Constants._fields.index(row)].reshape(-1, 3),
                np.tile(numbers, (TABLE_COLUMNS // 3, 1)),
            )


def test_a_mode_of_tiny_numbers_does_not_raise_the_callers_errors():
    tiny = Mode("tiny", divide=1e-39, mean=(1e-40, 0.0, 1e-45), std=(1e3, 1e-39, 7.0))
    for source, dtype in (("uint8", "float32"), ("float64", "float64")):
        with np.errstate(all="raise"):
            found = KernelSpec.of(Transform(tiny, dtype=dtype), source)
            assert np.isinf(constant_table(tiny, found)[1]).all() == (dtype == "float32")
