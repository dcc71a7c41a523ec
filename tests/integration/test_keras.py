"""The drop-in functions match the originals in dtype and bits, without side effects."""

from __future__ import annotations

import keras
import ml_dtypes
import numpy as np
import pytest
from keras.applications import imagenet_utils

import fastvgg
from fastvgg.errors import DtypeError, FastvggError, ShapeError, UsageError
from fastvgg.keras import deprocess_img, preprocess_input, restore_original_image_from_array
from tests.helpers.batches import (
    CHANNEL_AXIS,
    KERAS_MODES,
    LAYOUTS,
    assert_same,
    byte_swapped,
    dtype_of,
    every_half,
    every_value,
    frozen,
    in_layout,
    run_script,
    unaligned,
    unchanged,
)

pytestmark = pytest.mark.pixels

CAFFE_MEANS = (103.939, 116.779, 123.68)
LAYOUT_OF = {"channels_last": "NHWC", "channels_first": "NCHW"}
TYPES = ("uint8", "int32", "bool", "float16", "bfloat16", "float32", "float64")
SHAPES = {3: (5, 7), 4: (2, 5, 7)}


def add_means_and_reverse(y, layout):
    """Return the result of the StackOverflow function, which changes its argument."""
    x = y.copy()
    axis = CHANNEL_AXIS[layout]
    for channel, mean in enumerate(CAFFE_MEANS):
        # A Python float does not change the dtype, as in the original.
        np.moveaxis(x, axis, 0)[channel] += mean
    return np.flip(x, axis)


def truncated_image(y):
    """Return the result of the function in style-transfer tutorials."""
    x = add_means_and_reverse(np.squeeze(y, 0) if y.ndim == 4 else y, "NHWC")
    return np.clip(x, 0, 255).astype(np.uint8)


def random_batch(dtype, rank=4, layout="NHWC", seed=0):
    """Return a read-only batch for `preprocess_input`, beyond 0..255 if the dtype allows."""
    shape = (*SHAPES[rank], 3)
    random = np.random.default_rng(seed)
    if dtype in ("uint8", "bool"):
        batch = random.integers(0, 256 if dtype == "uint8" else 2, shape).astype(dtype)
    else:
        batch = random.uniform(-50, 300, shape).astype(dtype_of(dtype))
    return frozen(in_layout(batch, layout))


def noisy_input(dtype, rank=4, layout="NHWC", seed=0):
    """Return a read-only batch like an optimizer's output: caffe network input with noise."""
    random = np.random.default_rng(seed)
    batch = random.uniform(-160, 190, (*SHAPES[rank], 3)) + random.normal(0, 0.2, 3)
    return frozen(in_layout(batch.astype(dtype), layout))


@pytest.fixture
def keras_config():
    """Yield the Keras settings, and restore them afterwards."""
    floatx, data_format = keras.config.floatx(), keras.config.image_data_format()
    yield keras.config
    keras.config.set_floatx(floatx)
    keras.config.set_image_data_format(data_format)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("rank", [3, 4])
@pytest.mark.parametrize("data_format", ["channels_last", "channels_first", None])
@pytest.mark.parametrize("mode", KERAS_MODES)
def test_preprocess_input_matches_keras_dtype_and_bits(mode, data_format, rank, dtype):
    layout = LAYOUT_OF[data_format or keras.config.image_data_format()]
    x = random_batch(dtype, rank, layout)
    expected = imagenet_utils.preprocess_input(x.copy(), data_format, mode)
    with unchanged(x):
        actual = preprocess_input(x, data_format, mode)
    assert_same(actual, expected)
    assert not np.shares_memory(actual, x)


def test_preprocess_input_defaults_match_keras():
    x = random_batch("uint8")
    assert_same(preprocess_input(x), imagenet_utils.preprocess_input(x.copy()))


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mode", KERAS_MODES)
def test_preprocess_input_matches_keras_for_every_value(mode, layout, dtype):
    x = frozen(every_value(layout).astype(dtype))
    data_format = {"NHWC": "channels_last", "NCHW": "channels_first"}[layout]
    expected = imagenet_utils.preprocess_input(x.copy(), data_format, mode)
    with unchanged(x):
        actual = preprocess_input(x, data_format=data_format, mode=mode)
    assert_same(actual, expected)


@pytest.mark.parametrize("mode", KERAS_MODES)
def test_preprocess_input_matches_keras_for_all_65536_float16(mode):
    x = every_half("float16")
    with np.errstate(over="ignore", invalid="ignore"):
        expected = imagenet_utils.preprocess_input(x.copy(), mode=mode)
        actual = preprocess_input(x, mode=mode)
    assert_same(actual, expected)


@pytest.mark.parametrize("dtype", ["int32", "uint16", "float16", "float32", "float64"])
@pytest.mark.parametrize("mode", KERAS_MODES)
def test_preprocess_input_matches_keras_for_swapped_byte_order(mode, dtype):
    x = frozen(byte_swapped(random_batch("uint8").astype(dtype)))
    expected = imagenet_utils.preprocess_input(x.copy(), mode=mode)
    with unchanged(x):
        actual = preprocess_input(x, mode=mode)
    assert_same(actual, expected.astype(expected.dtype.newbyteorder("=")))


@pytest.mark.parametrize("dtype", ["uint8", "float16", "float32"])
@pytest.mark.parametrize(
    "view",
    [lambda x: x[:, ::-1, ::2], lambda x: np.flip(np.flip(x).copy()), np.asfortranarray, unaligned],
    ids=["stepped", "reversed", "in Fortran order", "unaligned"],
)
def test_preprocess_input_supports_any_strides(view, dtype):
    x = frozen(view(random_batch(dtype)))
    expected = imagenet_utils.preprocess_input(x.copy())
    with unchanged(x):
        actual = preprocess_input(x)
    assert_same(actual, expected)


@pytest.mark.parametrize("floatx", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("mode", KERAS_MODES)
def test_preprocess_input_follows_the_floatx_of_keras(keras_config, mode, dtype, floatx):
    keras_config.set_floatx(floatx)
    x = random_batch(dtype)
    expected = imagenet_utils.preprocess_input(x.copy(), mode=mode)
    with unchanged(x):
        actual = preprocess_input(x, mode=mode)
    assert_same(actual, expected)


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
def test_preprocess_input_follows_the_image_data_format_of_keras(keras_config, data_format):
    keras_config.set_image_data_format(data_format)
    x = random_batch("uint8", layout=LAYOUT_OF[data_format])
    assert_same(preprocess_input(x), imagenet_utils.preprocess_input(x.copy()))
    assert_same(preprocess_input(x), preprocess_input(x, data_format))


def test_without_keras_the_defaults_are_the_same_and_keras_is_not_imported():
    run_script(
        "import sys\n"
        "import numpy as np\n"
        "from fastvgg.keras import preprocess_input\n"
        "y = preprocess_input(np.full((5, 7, 3), 100, np.int64))\n"
        "assert y.dtype == np.float32 and y.shape == (5, 7, 3)\n"
        "assert y[0, 0].tolist() == [np.float32(100) - np.float32(mean)\n"
        "                            for mean in (103.939, 116.779, 123.68)]\n"
        "assert 'keras' not in sys.modules\n"
    )


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        ({"mode": "vgg"}, "'vgg'"),
        ({"mode": "identity"}, "'identity'"),
        ({"mode": None}, "None"),
        ({"data_format": "NHWC"}, "'NHWC'"),
        ({"data_format": ""}, "''"),
    ],
)
def test_preprocess_input_rejects_what_keras_rejects(arguments, shown):
    x = random_batch("float32")
    with pytest.raises(ValueError, match=r"(?i)expected|invalid"):
        imagenet_utils.preprocess_input(x.copy(), **arguments)
    with unchanged(x), pytest.raises(UsageError) as caught:
        preprocess_input(x, **arguments)
    assert shown in caught.value.problem
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("dtype", ["uint8", "float16", "float32"])
@pytest.mark.parametrize(
    "shape", [(5, 7), (2, 5, 7, 1), (2, 5, 7, 4), (2, 3, 5, 7), (1, 2, 5, 7, 3), (7,)]
)
def test_preprocess_input_rejects_wrong_shapes_before_writing(shape, dtype):
    x = np.zeros(shape, dtype)
    with unchanged(x), pytest.raises(ShapeError) as caught:
        preprocess_input(x)
    assert str(shape) in caught.value.problem


@pytest.mark.parametrize("dtype", ["uint8", "float16", "float32"])
def test_masked_array_is_rejected_for_every_dtype(dtype):
    x = np.ma.masked_array(random_batch(dtype), mask=True)
    with pytest.raises(DtypeError, match="masked"):
        preprocess_input(x)


@pytest.mark.parametrize(
    "drop_in", [preprocess_input, restore_original_image_from_array, deprocess_img]
)
@pytest.mark.parametrize("x", [[[[0.0, 0.0, 0.0]]], None, "photo.jpg"], ids=["list", "None", "str"])
def test_non_array_is_rejected_by_type_name(drop_in, x):
    with pytest.raises(DtypeError, match=type(x).__name__):
        drop_in(x)


@pytest.mark.parametrize(
    "drop_in", [preprocess_input, restore_original_image_from_array, deprocess_img]
)
def test_long_double_is_rejected(drop_in):
    shape = (3, 5, 3)  # either format
    with pytest.raises(DtypeError, match=np.dtype(np.longdouble).name):
        drop_in(np.zeros(shape, np.longdouble))


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("rank", [3, 4])
@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
def test_restore_original_image_from_array_adds_means_and_reverses_channels(
    data_format, rank, dtype
):
    layout = LAYOUT_OF[data_format]
    y = noisy_input(dtype, rank, layout)
    expected = add_means_and_reverse(y, layout)
    with unchanged(y):
        actual = restore_original_image_from_array(y, data_format)
    assert_same(actual, expected)
    assert not np.shares_memory(actual, y)


@pytest.mark.parametrize("rank", [3, 4])
def test_restore_original_image_from_array_defaults_to_channels_first(rank):
    y = noisy_input("float32", rank, "NCHW")
    assert_same(restore_original_image_from_array(y), add_means_and_reverse(y, "NCHW"))


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_restore_original_image_from_array_keeps_nan_and_does_not_clip(dtype):
    values = np.array([np.nan, np.inf, -np.inf, -0.0, 1e4, -1e4, 1e-7, 0.5], dtype)
    y = frozen(np.resize(values, (2, 5, 7, 3)))
    actual = restore_original_image_from_array(y, "channels_last")
    assert_same(actual, add_means_and_reverse(y, "NHWC"))
    assert np.isnan(actual).any()
    assert np.nanmin(actual) < 0 < 255 < np.nanmax(actual)


def test_restore_original_image_from_array_inverts_keras_for_every_value():
    x = frozen(every_value().astype(np.float32))
    y = imagenet_utils.preprocess_input(x.copy(), mode="caffe")
    assert y.strides[-1] < 0
    assert_same(restore_original_image_from_array(y, "channels_last"), x)


@pytest.mark.parametrize("data_format", ["NCHW", "", "channels"])
def test_restore_original_image_from_array_rejects_unknown_data_format(data_format):
    with pytest.raises(UsageError, match="channels_first"):
        restore_original_image_from_array(noisy_input("float32"), data_format)


def test_restore_original_image_from_array_rejects_the_other_layout_by_name():
    y = noisy_input("float32", layout="NHWC")
    with unchanged(y), pytest.raises(ShapeError) as caught:
        restore_original_image_from_array(y, "channels_first")
    assert str(y.shape) in caught.value.problem
    assert "data_format='channels_last'" in caught.value.remedy


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("rank", [3, 4])
def test_deprocess_img_truncates_like_the_tutorials(rank, dtype):
    y = noisy_input(dtype, rank)
    y = y[:1] if rank == 4 else y
    expected = truncated_image(y)
    with unchanged(y):
        actual = deprocess_img(y)
    assert_same(actual, expected)
    assert actual.shape == (5, 7, 3)
    assert {0, 255} < set(actual.ravel().tolist())


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_deprocess_img_truncates_every_value_like_the_tutorials(dtype):
    x = every_value(rank=3)
    y = frozen(imagenet_utils.preprocess_input(x.astype(dtype), mode="caffe"))
    with unchanged(y):
        actual = deprocess_img(y)
    assert_same(actual, truncated_image(y))


def test_deprocess_img_loses_values_that_restore_preserves():
    x = every_value(rank=3)
    y = fastvgg.preprocess(x, "caffe", dtype="float16").astype(np.float32)
    assert (deprocess_img(y) != x).any()
    assert_same(deprocess_img(y), fastvgg.restore(y, "caffe", rounding="truncate"))
    assert_same(fastvgg.restore(y, "caffe"), x)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_deprocess_img_saturates_nan_and_infinities(dtype):
    for value, expected in ((np.nan, 0), (-np.nan, 0), (-np.inf, 0), (np.inf, 255)):
        y = frozen(np.full((5, 7, 3), value, dtype))
        assert_same(deprocess_img(y), np.full((5, 7, 3), expected, np.uint8))


def test_deprocess_img_is_correct_for_all_65536_float16():
    y = frozen(every_half("float16").reshape(256, 256, 3))
    number = ~np.isnan(y)
    with np.errstate(over="ignore", invalid="ignore"):
        expected = truncated_image(np.where(number, y, np.float16(-1e3)))
        actual = deprocess_img(y)
    assert_same(actual, expected)


@pytest.mark.parametrize("images", [0, 2, 5])
def test_deprocess_img_rejects_a_batch_and_suggests_restore(images):
    y = np.zeros((images, 5, 7, 3), np.float32)
    with unchanged(y), pytest.raises(ShapeError) as caught:
        deprocess_img(y)
    assert str(y.shape) in caught.value.problem
    assert "fastvgg.restore" in caught.value.remedy


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 4), (3, 5, 7), (1, 3, 5, 7), (1, 1, 5, 7, 3)])
def test_deprocess_img_rejects_wrong_shapes(shape, dtype):
    with pytest.raises(ShapeError):
        deprocess_img(np.zeros(shape, dtype))


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.bool_, ml_dtypes.bfloat16, np.complex64])
@pytest.mark.parametrize("drop_in", [restore_original_image_from_array, deprocess_img])
def test_dtypes_that_preprocess_input_never_returns_are_rejected(drop_in, dtype):
    x = np.zeros((3, 5, 3), dtype)
    with unchanged(x), pytest.raises(DtypeError) as caught:
        drop_in(x)
    assert np.dtype(dtype).name in caught.value.problem
    assert isinstance(caught.value, FastvggError)


def test_drop_ins_round_trip_in_float32():
    x = every_value(rank=3)
    y = preprocess_input(x)
    assert_same(deprocess_img(y), x)
    assert_same(restore_original_image_from_array(y, "channels_last"), x.astype(np.float32))
