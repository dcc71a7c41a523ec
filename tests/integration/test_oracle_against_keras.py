"""The oracle and the engine equal Keras for every value of an image."""

from __future__ import annotations

from pathlib import Path

import keras
import numpy as np
import pytest
import skimage
from keras.applications import densenet, resnet_v2, vgg19
from keras.applications.imagenet_utils import preprocess_input

import fastvgg
from fastvgg import oracle
from fastvgg.transform import Mode, Transform
from tests.helpers.batches import (
    CHANNEL_AXIS,
    DATA_FORMATS,
    FLOATS,
    KERAS_MODES,
    LAYOUT_PAIRS,
    LAYOUTS,
    assert_same,
    dtype_of,
    every_value,
    frozen,
    unchanged,
)
from tests.helpers.checkout import CHECKOUT
from tests.helpers.samples import sampled

pytestmark = pytest.mark.pixels
GOLDEN = CHECKOUT / "tests" / "golden" / "keras.npz"
PHOTOGRAPH = Path(skimage.data_dir) / "rocket.jpg"


def keras_result(x, mode, layout, dtype):
    """Return Keras's result for a copy of `x` in `dtype`; Keras writes to its input."""
    return preprocess_input(x.astype(dtype), data_format=DATA_FORMATS[layout], mode=mode)


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN) as arrays:
        return {name: frozen(arrays[name]) for name in arrays.files}


@pytest.fixture(scope="module")
def photograph():
    return keras.utils.load_img(PHOTOGRAPH, target_size=(256, 256))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("rank", [3, 4])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mode", KERAS_MODES)
def test_oracle_matches_keras_for_every_value(mode, layout, rank, dtype):
    x = frozen(every_value(layout, rank).astype(dtype))
    expected = keras_result(x, mode, layout, dtype)
    with unchanged(x):
        actual = oracle.apply(Transform(mode, layout=layout), x)
    assert_same(actual, expected)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("rank", [3, 4])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mode", KERAS_MODES)
def test_engine_matches_keras_for_every_value(backend, mode, layout, rank, dtype):
    x = frozen(every_value(layout, rank).astype(dtype))
    expected = keras_result(x, mode, layout, dtype)
    with unchanged(x):
        actual = fastvgg.preprocess(x, mode, layout=layout, backend=backend)
    assert_same(actual, expected)


@pytest.mark.parametrize("rank", [3, 4])
@pytest.mark.parametrize(("layout", "out_layout"), LAYOUT_PAIRS)
@pytest.mark.parametrize("mode", KERAS_MODES)
def test_uint8_images_match_keras_for_every_layout_pair(backend, mode, layout, out_layout, rank):
    x = every_value(layout, rank)
    result = keras_result(x, mode, layout, "float32")
    expected = np.moveaxis(result, CHANNEL_AXIS[layout], CHANNEL_AXIS[out_layout])
    with unchanged(x):
        actual = fastvgg.preprocess(x, mode, layout=layout, out_layout=out_layout, backend=backend)
    assert_same(actual, expected)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mode", KERAS_MODES)
def test_16_bit_results_are_float32_keras_results_rounded_once(backend, mode, layout, dtype):
    x = every_value(layout)
    expected = keras_result(x, mode, layout, "float32").astype(dtype_of(dtype))
    assert_same(oracle.apply(Transform(mode, layout=layout, dtype=dtype), x), expected)
    actual = fastvgg.preprocess(x, mode, layout=layout, dtype=dtype, backend=backend)
    assert_same(actual, expected)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("mode", KERAS_MODES)
def test_oracle_and_engine_match_golden_vectors(backend, golden, mode, dtype):
    expected = golden[f"{mode}_{dtype}"]
    assert_same(oracle.apply(Transform(mode, dtype=dtype), golden["x"]), expected)
    assert_same(fastvgg.preprocess(golden["x"], mode, dtype=dtype, backend=backend), expected)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("mode", KERAS_MODES)
def test_golden_vectors_restore_to_their_images(backend, golden, mode, dtype):
    actual = fastvgg.restore(golden[f"{mode}_{dtype}"], mode, backend=backend)
    assert_same(actual, golden["x"])


def test_golden_vectors_contain_every_value_and_record_versions(golden):
    for channel in range(3):
        assert sorted(golden["x"][..., channel].ravel()) == list(range(256))
    assert str(golden["keras_version"]).startswith("3.")
    assert str(golden["numpy_version"]).startswith("2.")


@sampled("mode, layouts, dtype", KERAS_MODES, LAYOUT_PAIRS, FLOATS, one_in=5)
def test_every_value_round_trips_through_every_storage_dtype(backend, mode, layouts, dtype):
    layout, out_layout = layouts
    x = every_value(layout)
    y = fastvgg.preprocess(
        x, mode, layout=layout, out_layout=out_layout, dtype=dtype, backend=backend
    )
    assert y.dtype == dtype_of(dtype)
    frozen(y)
    with unchanged(x, y):
        actual = fastvgg.restore(y, mode, layout=out_layout, out_layout=layout, backend=backend)
    assert_same(actual, x)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("mode", KERAS_MODES)
def test_every_value_round_trips_through_the_oracle(mode, dtype):
    x = every_value()
    preprocess = Transform(mode, dtype=dtype, out_layout="NCHW")
    assert_same(oracle.apply(preprocess.inverse(), oracle.apply(preprocess, x)), x)


@pytest.mark.parametrize(
    ("model", "module"), [("VGG19", vgg19), ("ResNet50V2", resnet_v2), ("DenseNet121", densenet)]
)
def test_photograph_preprocessed_by_keras_is_restored_exactly(backend, photograph, model, module):
    expected = np.asarray(photograph)
    x = keras.utils.img_to_array(photograph)
    y = frozen(module.preprocess_input(x.copy()))
    with unchanged(y):
        actual = fastvgg.restore(y, Mode.for_model(model), backend=backend)
    assert_same(actual, expected)


@pytest.mark.parametrize(
    ("model", "module"), [("VGG19", vgg19), ("ResNet50V2", resnet_v2), ("DenseNet121", densenet)]
)
def test_preprocessed_photograph_matches_keras(backend, photograph, model, module):
    x = frozen(keras.utils.img_to_array(photograph))
    expected = module.preprocess_input(x.copy())
    mode = Mode.for_model(model)
    with unchanged(x):
        assert_same(fastvgg.preprocess(x, mode, backend=backend), expected)
    assert_same(fastvgg.preprocess(np.asarray(photograph), mode, backend=backend), expected)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("mode", KERAS_MODES)
def test_photograph_round_trips_through_16_bit_storage(backend, photograph, mode, dtype):
    expected = np.asarray(photograph)
    x = keras.utils.img_to_array(photograph)
    y = preprocess_input(x, mode=mode).astype(dtype_of(dtype))
    assert_same(fastvgg.restore(y, mode, backend=backend), expected)
