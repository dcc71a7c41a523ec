"""Floats that were scaled to 0..1 or -1..1 are rejected in memory, and images are not."""

from __future__ import annotations

import keras
import ml_dtypes
import numpy as np
import pytest

import fastvgg
from fastvgg import keras as dropin
from fastvgg.errors import ArrayError
from tests.helpers.batches import FLOATS, dtype_of

pytestmark = pytest.mark.pixels

PIXELS = np.random.default_rng(4).integers(0, 256, (3, 25, 31, 3), np.uint8)
SCALED = {"0..1": (PIXELS / 255.0, "multiply by 255"), "-1..1": (PIXELS / 127.5 - 1, "127.5")}


def calls(x, **options):
    """Yield the public calls that preprocess an array."""
    yield lambda: fastvgg.preprocess(x, "caffe", **options)
    yield lambda: fastvgg.Transform("tf", dtype="float32")(x, **options)


@pytest.mark.parametrize("dtype", [*FLOATS, ">f4", ">f8"])
@pytest.mark.parametrize("name", SCALED)
def test_floats_that_were_scaled_are_rejected_with_the_factor(name, dtype):
    values, factor = SCALED[name]
    dtype = dtype_of(dtype) if dtype in FLOATS else np.dtype(dtype)
    for x in (values, values[0], values[:1, ::-1, ::3], values[:, :1, :1]):
        for call in calls(x.astype(dtype)):
            with pytest.raises(ArrayError) as caught:
                call()
            assert f"lie within {name}" in caught.value.problem
            assert factor in caught.value.remedy
            assert "check_values=False" in caught.value.remedy
        for call in calls(x.astype(dtype), check_values=False):
            call()


def test_the_remedies_restore_the_images():
    for values, _ in SCALED.values():
        scaled = values * 255 if values.min() >= 0 else (values + 1) * 127.5
        actual = fastvgg.restore(fastvgg.preprocess(scaled, "caffe"), "caffe")
        assert (actual == PIXELS).all()


@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
def test_planar_floats_that_were_scaled_are_rejected(layout):
    shape = (2, 9, 7, 3) if layout == "NHWC" else (2, 3, 9, 7)
    x = np.full(shape, 0.5, np.float32)
    with pytest.raises(ArrayError):
        fastvgg.preprocess(x, "torch", layout=layout)


@pytest.mark.parametrize("value", [1.5, -1.5, 255.0, np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("at", [(0, 0, 0, 0), (2, 24, 30, 2), (1, 11, 13, 1)])
def test_one_value_outside_of_the_range_is_enough(at, value):
    x = PIXELS / np.float32(255)
    x[at] = value
    for call in calls(x):
        call()


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, ml_dtypes.bfloat16])
def test_whole_numbers_within_the_range_are_rejected_unless_all_are_zero(dtype):
    one = np.zeros_like(PIXELS)
    one[2, 24, 30, 2] = 1
    for x in (PIXELS % 2, PIXELS % 2 * 2.0 - 1, np.ones_like(PIXELS), one, -one.astype(np.int8)):
        for call in calls(x.astype(dtype)):
            with pytest.raises(ArrayError):
                call()
        for call in calls(x.astype(dtype), check_values=False):
            call()
    for x in (np.zeros_like(PIXELS), np.empty((0, 5, 7, 3))):
        for call in calls(x.astype(dtype)):
            call()


def test_nothing_is_written_before_scaled_floats_are_rejected():
    x = (PIXELS / 255).astype(np.float32)
    before = x.copy()
    with pytest.raises(ArrayError):
        fastvgg.preprocess(x, "caffe", out=x)
    assert (x == before).all()


def test_restore_accepts_any_floats():
    fastvgg.restore(PIXELS / 255, "caffe")
    fastvgg.Transform("caffe", "restore")(PIXELS / 255)


def test_drop_in_returns_what_keras_returns_for_scaled_floats():
    x = (PIXELS / 255).astype(np.float32)
    expected = keras.applications.imagenet_utils.preprocess_input(x.copy(), mode="caffe")
    assert (dropin.preprocess_input(x) == expected).all()
