"""KernelSpec, constant tables, and when a reciprocal may replace a division."""

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
    is_reciprocal_exact,
)
from fastvgg.transform import Mode, Transform
from tests.helpers.batches import FLOATS, LAYOUT_PAIRS, LAYOUTS, assert_same, bits, dtype_of
from tests.helpers.kernel_harness import CUSTOM, MODES, SMALL

needs_fma = pytest.mark.skipif(
    not processor().has_fma, reason="the processor has no fused multiply-add"
)
BYTES = np.arange(256, dtype=np.float32)


def nearest_float32(exact, zero=0.0):
    """Return the float32 nearest to a fraction, half to even; `zero` if the fraction is zero."""
    if exact == 0:
        return np.float32(zero)
    magnitude = abs(exact)
    exponent = magnitude.numerator.bit_length() - magnitude.denominator.bit_length()
    exponent -= magnitude < Fraction(2) ** exponent
    step = Fraction(2) ** max(exponent - 23, -149)
    rounded = round(magnitude / step) * step  # Python rounds half to even
    value = math.inf if rounded >= Fraction(2) ** 128 else float(rounded)
    return np.float32(math.copysign(value, exact))


def exact_fused_multiply_add(a, b, c):
    """Return finite a * b + c, rounded once from the exact value."""
    product = Fraction(float(a)) * Fraction(float(b))
    # The sum of two zeros of different signs is positive zero.
    with np.errstate(under="ignore"):
        zero = float(np.float64(a) * np.float64(b)) + float(c) if product == 0 else 0.0
    return nearest_float32(product + Fraction(float(c)), zero)


def reciprocal_of(divisor):
    """Return the reciprocal and its rounding error; None if the reciprocal is infinite."""
    with np.errstate(all="ignore"):
        reciprocal = np.float32(1) / divisor
    if not np.isfinite(reciprocal):
        return None
    rest = 1 / Fraction(float(divisor)) - Fraction(float(reciprocal))
    return reciprocal, nearest_float32(rest, math.copysign(0.0, divisor))


def divided_by_reciprocal(x, divisor):
    """Divide one number by its reciprocal; None if the reciprocal is infinite."""
    if reciprocal_of(divisor) is None:
        return None
    reciprocal, rest = reciprocal_of(divisor)
    with np.errstate(all="ignore"):
        correction = x * rest
    if np.isinf(correction):
        return correction
    return exact_fused_multiply_add(x, reciprocal, correction)


def test_nearest_float32_rounds_like_numpy():
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
def test_fused_multiply_add_rounds_once(a, b, c):
    check_fused(a, b, c)


@given(a=finite, b=finite, steps=st.integers(-3, 3), doubled=st.integers(-30, 30))
@settings(max_examples=500)
def test_fused_multiply_add_rounds_once_under_cancellation(a, b, steps, doubled):
    with np.errstate(all="ignore"):
        near = -(a * b)
        pattern = (near.view(np.uint32).astype(np.int64) + steps) % 2**32
        c = np.uint32(pattern).view(np.float32) * np.float32(2.0**doubled)
    if np.isfinite(c):
        check_fused(a, b, c)


def check_fused(a, b, c):
    with np.errstate(all="ignore"):
        actual = spec._fma(np.array([a]), b, np.array([c]))
    assert bits(actual) == bits(exact_fused_multiply_add(a, b, c).reshape(1)), (a, b, c)


def test_fused_multiply_add_rounds_once_where_double_rounding_differs():
    # The product is 64 but for 2**-40: next to 2**30 nearly half of the step to the next float.
    a, b = np.float32(8 + 2**-20), np.float32(8 - 2**-20)
    twice = []
    for sign in (1, -1):
        for number in (2.0**30, 2.0**30 + 128, 2.0**30 + 256):
            for c in (np.float32(number), np.float32(-number)):
                check_fused(a, sign * b, c)
                in_two_roundings = np.float32(float(a) * float(sign * b) + float(c))
                twice.append(in_two_roundings == exact_fused_multiply_add(a, sign * b, c))
    assert not all(twice)


def agrees_with_exact_arithmetic(x, divisor):
    """Check `is_reciprocal_exact` against exact arithmetic, and return its result."""
    with np.errstate(all="ignore"):
        quotients = x / divisor
    expected = [divided_by_reciprocal(number, divisor) for number in x]
    exact = all(
        got is not None and got.tobytes() == quotient.tobytes()
        for got, quotient in zip(expected, quotients, strict=True)
    )
    assert is_reciprocal_exact(x, divisor) == exact, (divisor, x)
    return exact


ADVERSARIAL = [
    *(127.5, 255.0, 0.229, 0.224, 0.225, 1.0, -1.0, 3.0, 2.0**100, 2.0**-100),
    *(np.nextafter(np.float32(2.0**power), np.float32(0)) for power in (-20, 0, 1, 30)),
    *(np.nextafter(np.float32(2.0**power), np.float32(9e9)) for power in (-20, 0, 1, 30)),
    *(3.4e38, 3e38, 1e38, 8.5e37, 2.0**126, 2.0**127, 1e-45, 1e-40, 1.17e-38, 1e-37, 1e-36),
]


@needs_fma
@pytest.mark.parametrize("divisor", ADVERSARIAL, ids=str)
def test_reciprocal_is_exact_for_bytes_agrees_with_exact_arithmetic(divisor):
    agrees_with_exact_arithmetic(BYTES, np.float32(divisor))


@needs_fma
def test_adversarial_divisors_include_exact_and_inexact_reciprocals():
    answers = [agrees_with_exact_arithmetic(BYTES[::5], np.float32(d)) for d in ADVERSARIAL]
    assert 0 < sum(answers) < len(answers)


@needs_fma
@given(divisor=finite.filter(bool), x=st.lists(finite, min_size=1, max_size=20))
@settings(max_examples=300)
def test_reciprocal_is_exact_for_any_values_agrees_with_exact_arithmetic(divisor, x):
    agrees_with_exact_arithmetic(np.array(x, np.float32), divisor)


@needs_fma
@pytest.mark.parametrize("divisor", [127.5, 255.0, 0.229, 3.0, -7.0, 1e300, 5e-324, 1.7e308])
def test_reciprocal_is_exact_in_float64_agrees_with_exact_arithmetic(divisor):
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
    assert is_reciprocal_exact(x, number) == expected


@needs_fma
def test_float64_divides_bytes_by_reciprocals():
    for mode, expected in ((Mode.TF, ("reciprocal", "none")), (Mode.TORCH, ("reciprocal",) * 2)):
        found = KernelSpec.of(Transform(mode, dtype="float64"), "uint8")
        assert (found.divide, found.scale) == expected


@needs_fma
@pytest.mark.parametrize(
    ("x", "divisor"),
    [
        ([1.0], 2e-39),  # the reciprocal is infinite
        (BYTES, 3e38),  # the rounding error of the reciprocal is subnormal
        ([-0.0], 3.0),  # results in +0.0
        ([0.0], -3.0),  # so does this
    ],
)
def test_reciprocal_is_not_exact_on_overflow_underflow_or_negative_zero(x, divisor):
    assert not agrees_with_exact_arithmetic(np.array(x, np.float32), np.float32(divisor))


def divided_without_fma(x, divisor):
    """Divide bytes by the sum of two products, rounding each operation."""
    with np.errstate(all="ignore"):
        reciprocal = np.float32(1) / divisor
        if not np.isfinite(reciprocal):
            return None
        shortened = (reciprocal.view(np.int32) // 256 * 256).view(np.float32)
        rest = 1 / Fraction(float(divisor)) - Fraction(float(shortened))
        rest = nearest_float32(rest, math.copysign(0.0, divisor))
        return x * shortened + x * rest


@pytest.mark.parametrize("divisor", ADVERSARIAL, ids=str)
def test_reciprocal_without_fma_is_exact_where_split_products_are(monkeypatch, divisor):
    restricted = processor()._replace(has_fma=False)
    monkeypatch.setattr(jit, "processor", lambda: restricted)
    found = divided_without_fma(BYTES, np.float32(divisor))
    with np.errstate(all="ignore"):
        exact = found is not None and found.tobytes() == (BYTES / np.float32(divisor)).tobytes()
    assert is_reciprocal_exact(BYTES, np.float32(divisor)) == exact
    assert exact or divisor not in (127.5, 255.0, 0.229, 0.224, 0.225)


def test_without_fma_only_bytes_are_divided_by_reciprocals(monkeypatch):
    restricted = processor()._replace(has_fma=False)
    monkeypatch.setattr(jit, "processor", lambda: restricted)
    for dtype in ("float32", "float64"):
        for mode, scale in ((Mode.TF, "none"), (Mode.TORCH, "division")):
            found = KernelSpec.of(Transform(mode, dtype=dtype), "uint8")
            assert (found.divide, found.scale) == ("reciprocal", scale)


@needs_fma
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_bytes_are_divided_by_reciprocals_only_where_exact(dtype):
    divisions = {
        mode: (found.divide, found.scale)
        for mode in (Mode.IDENTITY, *MODES)
        if not (found := KernelSpec.of(Transform(mode, dtype=dtype), "uint8")).is_affine
    }
    expected = {
        Mode.IDENTITY: ("none", "none"),
        Mode.CAFFE: ("none", "none"),
        Mode.TF: ("reciprocal", "none"),
        Mode.TORCH: ("reciprocal", "reciprocal"),
        CUSTOM: ("reciprocal", "reciprocal"),
        SMALL: ("division", "division"),
    }
    assert divisions == {mode: expected[mode] for mode in divisions}
    is_affine = {
        "float16": {Mode.TF, Mode.TORCH, CUSTOM, SMALL},
        "bfloat16": {Mode.TF, Mode.TORCH, CUSTOM},
        "float32": set(),
    }[dtype]
    assert set(divisions) == set(expected) - is_affine


MEANS, STDS = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
CLIP = Mode("clip", divide=255.0, mean=MEANS, std=STDS)


@pytest.mark.parametrize("half", ["float16", "bfloat16"])
@pytest.mark.parametrize("mode", [Mode.TF, Mode.TORCH, CLIP], ids=lambda mode: mode.name)
def test_affine_formula_matches_oracle_for_every_input(mode, half):
    x = np.repeat(np.arange(256, dtype=np.uint8), 3).reshape(1, 256, 3)
    y = np.repeat(np.arange(65536, dtype=np.uint16), 3).view(dtype_of(half)).reshape(1, 65536, 3)
    for is_restore, values in ((False, x), (True, y)):
        transform = Transform(
            mode, "restore" if is_restore else "preprocess", dtype=None if is_restore else half
        )
        assert KernelSpec.of(transform, values.dtype.name).is_affine
        slope, intercept = affine_constants(mode, half, is_restore=is_restore)
        with np.errstate(all="ignore"):
            wide = values.astype(np.float32)
            if processor().has_fma:
                result = spec._fma(wide, slope, intercept)
            else:
                result = wide * slope + intercept
            if is_restore:
                result = oracle.saturate(result, "nearest").astype(np.uint8)
            else:
                result = result.astype(dtype_of(half))
        assert_same(np.ascontiguousarray(result), oracle.apply(transform, values))


def test_affine_formula_is_not_used_where_results_would_differ():
    assert affine_constants(CUSTOM, "float16", is_restore=True) is None
    assert affine_constants(SMALL, "bfloat16", is_restore=False) is None
    assert not KernelSpec.of(Transform(CUSTOM, "restore"), "float16").is_affine
    assert not KernelSpec.of(Transform(SMALL, dtype="bfloat16"), "uint8").is_affine
    for transform, source in (
        (Transform(Mode.TORCH, dtype="float16"), "float32"),
        (Transform(Mode.TORCH), "uint8"),
        (Transform(Mode.TORCH, "restore", rounding="truncate"), "float16"),
        (Transform(Mode.TORCH, "restore", dtype="float32"), "float16"),
        (Transform(Mode.TORCH, "restore"), "float32"),
    ):
        assert not KernelSpec.of(transform, source).is_affine


def test_may_tie_is_set_only_where_an_input_byte_can_tie():
    tying = Mode("tying", mean=(-256.0, 0.0, 0.0))  # 256 + 1 lies halfway between two of bfloat16
    assert KernelSpec.of(Transform(tying, dtype="bfloat16"), "uint8").has_ties
    assert not KernelSpec.of(Transform(Mode.CAFFE, dtype="bfloat16"), "uint8").has_ties
    assert KernelSpec.of(Transform(Mode.CAFFE, dtype="bfloat16"), "float32").has_ties


@pytest.mark.parametrize("direction", ["preprocess", "restore"])
@pytest.mark.parametrize("source", FLOATS)
@pytest.mark.parametrize("target", FLOATS)
def test_floats_are_divided_without_reciprocals(direction, source, target):
    for mode, expected in ((Mode.TF, ("division", "none")), (Mode.TORCH, ("division",) * 2)):
        found = KernelSpec.of(Transform(mode, direction, dtype=target), source)
        assert (found.divide, found.scale) == expected


@needs_fma
def test_one_std_without_exact_reciprocal_disables_reciprocals():
    for at in range(3):
        std = [0.5, 0.3, 0.7]
        std[at] = 1e-39
        found = KernelSpec.of(Transform(Mode("own", std=tuple(std))), "uint8")
        assert (found.divide, found.scale) == ("none", "division")


@needs_fma
def test_std_reciprocal_is_checked_for_the_values_after_divide_and_mean():
    # Among integers, only 0 is wrong with a negative divisor: it results in +0.0.
    std = (-3.0,) * 3
    means = {"a": (0.0, 255.0, 17.0), "b": (0.5, -1.0, 256.0)}
    found = {
        name: KernelSpec.of(Transform(Mode(name, mean=mean, std=std)), "uint8").scale
        for name, mean in means.items()
    }
    assert found == {"a": "division", "b": "reciprocal"}
    halves = Mode("c", divide=2.0, mean=means["b"], std=std)
    assert KernelSpec.of(Transform(halves), "uint8").scale == "division"


def test_spec_describes_the_transform():
    transform = Transform("caffe", "restore", "NCHW", "NHWC", "float16", "truncate")
    assert KernelSpec.of(transform, "float64", nontemporal=True) == KernelSpec(
        is_restore=True,
        source="float64",
        target="float16",
        compute="float32",
        is_source_planar=True,
        is_target_planar=False,
        has_reversed_channels=True,
        is_affine=False,
        divide="none",
        scale="none",
        has_ties=False,
        rounding="truncate",
        nontemporal=True,
        is_plane_by_plane=False,
    )


def test_transforms_that_differ_only_in_constants_share_a_spec():
    other = Mode("other means", mean=(1.0, 2.0, 3.0), order="BGR")
    assert KernelSpec.of(Transform(other), "uint8") == KernelSpec.of(Transform("caffe"), "uint8")
    truncating = Transform("caffe", rounding="truncate")  # preprocess does not round
    assert KernelSpec.of(truncating, "uint8") == KernelSpec.of(Transform("caffe"), "uint8")


@pytest.mark.parametrize("mode", ["caffe", "torch"])
@pytest.mark.parametrize("direction", ["preprocess", "restore"])
def test_reversed_input_inverts_reverses_channels(direction, mode):
    for layouts in LAYOUT_PAIRS:
        transform = Transform(mode, direction, *layouts, "float32")
        plain = KernelSpec.of(transform, "float32")
        reversed_ = KernelSpec.of(transform, "float32", has_reversed_input=True)
        assert plain.has_reversed_channels == (mode == "caffe")
        assert reversed_.has_reversed_channels != plain.has_reversed_channels
        assert reversed_._replace(has_reversed_channels=plain.has_reversed_channels) == plain


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
def test_lanes_are_shuffled_in_the_smaller_element_type(source, target, late):
    for layout, out_layout in LAYOUT_PAIRS:
        transform = Transform("caffe", "restore", layout, out_layout, target)
        found = KernelSpec.of(transform, source)
        is_plane_by_plane = (layout, out_layout) == ("NCHW", "NCHW")
        assert found.is_plane_by_plane == is_plane_by_plane
        assert found.is_result_shuffled == (late and not is_plane_by_plane)
        assert found.is_compute_planar == ((layout if late else out_layout) == "NCHW")


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
def test_two_streams_are_used_for_read_heavy_interleaved_input(source, target, out_layouts):
    for layout, out_layout in LAYOUT_PAIRS:
        direction = "restore" if target == "uint8" else "preprocess"
        transform = Transform("caffe", direction, layout, out_layout, target)
        found = KernelSpec.of(transform, source)
        assert found.has_two_streams == (layout == "NHWC" and out_layout in out_layouts)
    is_plane_by_plane = KernelSpec.of(
        Transform("caffe", "restore", "NHWC", "NCHW"), "float32", nontemporal=True
    )
    assert is_plane_by_plane.is_plane_by_plane
    assert not is_plane_by_plane.has_two_streams


SSE = Processor(True, has_f16c=False, has_fma=False, vector_bytes=16, min_permute_bytes=16)
AVX2 = Processor(True, has_f16c=True, has_fma=True, vector_bytes=32, min_permute_bytes=16)
AVX512 = Processor(True, has_f16c=True, has_fma=True, vector_bytes=64, min_permute_bytes=2)
NEON = Processor(False, has_f16c=True, has_fma=True, vector_bytes=16, min_permute_bytes=1)


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
def test_lanes_fill_a_store_and_fit_three_vectors_in_registers(monkeypatch, source, target, lanes):
    direction = "restore" if target == "uint8" else "preprocess"
    spec = KernelSpec.of(Transform("caffe", direction, dtype=target), source)
    for one, expected in zip((SSE, AVX2, AVX512, NEON), lanes, strict=True):
        monkeypatch.setattr(jit, "processor", lambda one=one: one)
        assert spec.lanes == expected


@pytest.mark.parametrize("layouts", LAYOUT_PAIRS, ids="-".join)
@pytest.mark.parametrize("half", ["float16", "bfloat16"])
def test_16_bit_results_are_shuffled_instead_of_byte_planes(layouts, half):
    found = KernelSpec.of(Transform("caffe", "preprocess", *layouts, half), "uint8")
    assert found.is_result_shuffled == (layouts == ("NCHW", "NHWC"))


@pytest.mark.parametrize("layouts", LAYOUT_PAIRS, ids="-".join)
@pytest.mark.parametrize("half", ["float16", "bfloat16"])
@pytest.mark.parametrize("min_permute_bytes", [1, 2, 16])
def test_blocks_are_split_only_for_bytes_and_bfloat16_without_byte_permutes(
    monkeypatch, layouts, half, min_permute_bytes
):
    changed = processor()._replace(min_permute_bytes=min_permute_bytes)
    monkeypatch.setattr(jit, "processor", lambda: changed)
    bytes_to_half = KernelSpec.of(Transform("caffe", "preprocess", *layouts, half), "uint8")
    half_to_bytes = KernelSpec.of(Transform("caffe", "restore", *layouts), half)
    is_split = half == "bfloat16" and min_permute_bytes == 16
    assert half_to_bytes.is_split == is_split
    assert bytes_to_half.is_split == (is_split and layouts != ("NHWC", "NCHW"))


@pytest.mark.parametrize("layouts", LAYOUT_PAIRS, ids="-".join)
@pytest.mark.parametrize(
    ("source", "target", "planes_share_alignment"),
    [("float32", "uint8", True), ("uint8", "float32", False)],
)
def test_planes_are_aligned_individually_where_nontemporal_stores_need_it(
    layouts, source, target, planes_share_alignment
):
    direction = "restore" if target == "uint8" else "preprocess"
    transform = Transform("tf", direction, *layouts, target)
    for nontemporal, aligned in itertools.product([True, False], repeat=2):
        found = KernelSpec.of(
            transform, source, nontemporal=nontemporal, has_aligned_planes=aligned
        )
        needed = not (aligned and planes_share_alignment) and (layouts[0] == "NCHW" or nontemporal)
        assert found.is_plane_by_plane == (layouts[1] == "NCHW" and needed)
    in_place = KernelSpec.of(Transform("tf", layout="NCHW"), "float32", in_place=True)
    assert not in_place.is_plane_by_plane


# The expected rows for a mode, in the channel order of y.
def rows_of(mode):
    means, std = mode.mean or (0, 0, 0), mode.std or (1, 1, 1)
    divide = 1 if mode.divide is None else mode.divide
    return {"divide": (divide,) * 3, "mean": means, "std": std}


@pytest.mark.parametrize("mode", [Mode.IDENTITY, *MODES], ids=lambda mode: mode.name)
@pytest.mark.parametrize(
    ("direction", "source", "target", "has_reversed_input"),
    [
        ("preprocess", "uint8", "float32", False),
        ("preprocess", "float64", "float64", True),
        ("restore", "float32", "uint8", False),
        ("restore", "float64", "float64", True),
    ],
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_constant_table_rows_are_in_kernel_channel_order(
    mode, direction, source, target, has_reversed_input, layout
):
    found = KernelSpec.of(
        Transform(mode, direction, layout, layout, target),
        source,
        has_reversed_input=has_reversed_input,
    )
    table = constant_table(mode, found)
    assert table.dtype == found.compute
    assert table.shape == (len(Constants._fields), TABLE_COLUMNS)
    assert table.flags.c_contiguous
    # y has the order of the mode, x the order RGB; and what is reversed later is computed before.
    late = found.has_reversed_channels and found.is_result_shuffled
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
            rows[f"{name}_reciprocal_low"] = np.array(rests)
        for row, numbers in rows.items():
            assert_same(
                table[Constants._fields.index(row)].reshape(-1, 3),
                np.tile(numbers, (TABLE_COLUMNS // 3, 1)),
            )


def test_subnormal_constants_ignore_errstate_when_building_the_spec():
    tiny = Mode("tiny", divide=1e-39, mean=(1e-40, 0.0, 1e-45), std=(1e3, 1e-39, 7.0))
    for source, dtype in (("uint8", "float32"), ("float64", "float64")):
        with np.errstate(all="raise"):
            found = KernelSpec.of(Transform(tiny, dtype=dtype), source)
            assert np.isinf(constant_table(tiny, found)[1]).all() == (dtype == "float32")
