"""Mode and Transform: values, validation, serialization and shape rules."""

from __future__ import annotations

import dataclasses
import json
import pickle

import ml_dtypes
import numpy as np
import pytest

from fastvgg.errors import DtypeError, ModeError, ShapeError, UsageError
from fastvgg.transform import (
    CHANNEL_AXES,
    STORAGE_TYPES,
    Mode,
    Transform,
    storage_dtype,
    storage_type,
)
from tests.helpers.batches import (
    FLOATS,
    KERAS_MODES,
    LAYOUT_PAIRS,
    LAYOUTS,
    assert_same,
    dtype_of,
    every_value,
    run_script,
)

CUSTOM = Mode("own", divide=255, mean=[0.5, 0.25, 0.125], std=(1, 2, 4), order="BGR")

TRANSFORMS = [
    Transform("caffe"),
    Transform("tf", "restore", "NCHW"),
    Transform("torch", "preprocess", "NHWC", "NCHW", "float16"),
    Transform("identity", "restore", "NCHW", "NHWC", "bfloat16", "truncate"),
    Transform(CUSTOM, dtype="float64"),
    Transform(CUSTOM, "restore", dtype="uint8"),
]

# Each differs from Transform("caffe") in one field of the transform, or of its mode.
ONE_FIELD_CHANGED = {
    "mode": Transform("tf"),
    "direction": Transform("caffe", "restore"),
    "layout": Transform("caffe", layout="NCHW", out_layout="NHWC"),
    "out_layout": Transform("caffe", out_layout="NCHW"),
    "dtype": Transform("caffe", dtype="float16"),
    "rounding": Transform("caffe", rounding="truncate"),
    "mode.name": Transform(dataclasses.replace(Mode.CAFFE, name="caffe too")),
    "mode.divide": Transform(dataclasses.replace(Mode.CAFFE, divide=1.0)),
    "mode.mean": Transform(dataclasses.replace(Mode.CAFFE, mean=(103.939, 116.779, 123.6800001))),
    "mode.std": Transform(dataclasses.replace(Mode.CAFFE, std=(1.0, 1.0, 1.0))),
    "mode.order": Transform(dataclasses.replace(Mode.CAFFE, order="RGB")),
}


@pytest.mark.parametrize("name", STORAGE_TYPES)
def test_storage_dtype_and_storage_name_round_trip_in_any_byte_order(name):
    dtype = storage_dtype(name)
    assert dtype == dtype_of(name)
    assert storage_type(dtype) == name
    assert storage_type(dtype.newbyteorder("S")) == name
    assert storage_type(dtype.type) == name
    assert storage_type(name) == name


@pytest.mark.parametrize(
    "dtype",
    ["int32", np.int8, np.complex64, object, np.longdouble, bool, "U3", "M8[s]", "nonsense"],
)
def test_unsupported_dtype_is_rejected_by_name(dtype):
    with pytest.raises(DtypeError) as caught:
        storage_type(dtype)
    shown = dtype if dtype == "nonsense" else np.dtype(dtype).name
    assert shown in caught.value.problem
    assert all(name in caught.value.remedy for name in STORAGE_TYPES)


def test_storage_dtype_rejects_unknown_name():
    with pytest.raises(DtypeError, match="'int32' is not a storage type"):
        storage_dtype("int32")


def test_keras_modes_have_keras_constants():
    assert dataclasses.astuple(Mode.CAFFE) == (
        "caffe",
        None,
        (103.939, 116.779, 123.68),
        None,
        "BGR",
    )
    assert dataclasses.astuple(Mode.TF) == ("tf", 127.5, (1.0, 1.0, 1.0), None, "RGB")
    assert dataclasses.astuple(Mode.TORCH) == (
        "torch",
        255.0,
        (0.485, 0.456, 0.406),
        (0.229, 0.224, 0.225),
        "RGB",
    )
    assert dataclasses.astuple(Mode.IDENTITY) == ("identity", None, None, None, "RGB")


@pytest.mark.parametrize("mode", [Mode.CAFFE, Mode.TF, Mode.TORCH, Mode.IDENTITY])
def test_a_mode_is_found_by_its_name(mode):
    assert Mode.from_name(mode.name) is mode


@pytest.mark.parametrize("name", ["", "Caffe", "vgg99"])
def test_unknown_mode_is_rejected_with_the_known_modes(name):
    with pytest.raises(ModeError) as caught:
        Mode.from_name(name)
    assert repr(name) in caught.value.problem
    assert all(known in caught.value.remedy for known in (*KERAS_MODES, "identity"))
    with pytest.raises(ModeError):
        Transform(name)


@pytest.mark.parametrize("mode", [None, 7, Mode, ("caffe",)])
def test_value_that_is_neither_a_mode_nor_a_name_is_rejected(mode):
    with pytest.raises(ModeError) as caught:
        Transform(mode)
    assert repr(mode) in caught.value.problem


def test_only_caffe_is_bgr():
    assert [mode.is_bgr for mode in (Mode.CAFFE, Mode.TF, Mode.TORCH)] == [True, False, False]


def test_mode_constants_are_converted_to_float_tuples():
    assert dataclasses.astuple(CUSTOM) == (
        "own",
        255.0,
        (0.5, 0.25, 0.125),
        (1.0, 2.0, 4.0),
        "BGR",
    )
    assert isinstance(CUSTOM.divide, float)
    assert all(type(part) is tuple for part in (CUSTOM.mean, CUSTOM.std))
    assert all(type(value) is float for value in CUSTOM.mean + CUSTOM.std)
    numpy_numbers = Mode("own", np.float32(255), np.array([0.5, 0.25, 0.125]), (1, 2, 4), "BGR")
    assert numpy_numbers == CUSTOM
    assert hash(numpy_numbers) == hash(CUSTOM)


@pytest.mark.parametrize(
    ("parts", "shown"),
    [
        ({"order": "GBR"}, "'GBR'"),
        ({"order": "rgb"}, "'rgb'"),
        ({"mean": (1.0, 2.0)}, "mean has 2 values"),
        ({"mean": ()}, "mean has 0 values"),
        ({"std": (1.0, 1.0, 1.0, 1.0)}, "std has 4 values"),
        ({"divide": 0}, "0.0"),
        ({"divide": -0.0}, "-0.0"),
        ({"divide": float("nan")}, "nan"),
        ({"divide": float("inf")}, "inf"),
        ({"divide": 1e-46}, "1e-46"),
        ({"divide": 1e39}, "1e+39"),
        ({"std": (1.0, 0.0, 1.0)}, "0.0"),
        ({"std": (1.0, 1.0, 1e-50)}, "1e-50"),
        ({"std": (float("-inf"), 1.0, 1.0)}, "-inf"),
        ({"mean": (0.0, float("nan"), 0.0)}, "nan"),
        ({"mean": (0.0, 0.0, -1e300)}, "-1e+300"),
    ],
)
def test_mode_with_unusable_constants_is_rejected(parts, shown):
    with pytest.raises(ModeError) as caught:
        Mode("mine", **parts)
    assert "mine" in caught.value.problem
    assert shown in caught.value.problem
    assert caught.value.remedy
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    "parts",
    [
        {"mean": (0.0, 0.0, 0.0)},
        {"mean": (-1.0, 1e-50, 3e38)},
        {"divide": -2.0},
        {"divide": 1e-45},
        {"std": (1e-45, -1.0, 3e38)},
    ],
)
def test_mode_with_finite_constants_and_nonzero_divisors_is_accepted(parts):
    mode = Mode("mine", **parts)
    assert {name: getattr(mode, name) for name in parts} == parts


@pytest.mark.parametrize(
    ("value", "field"), [(Mode.CAFFE, "divide"), (Transform("caffe"), "layout")]
)
def test_modes_and_transforms_are_frozen(value, field):
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(value, field, None)


@pytest.mark.parametrize("transform", TRANSFORMS, ids=repr)
def test_copies_have_equal_value_hash_and_fingerprint(transform):
    fields = {name: getattr(transform, name) for name in transform.to_dict()}
    copies = [Transform(**fields), pickle.loads(pickle.dumps(transform))]  # noqa: S301, our own
    copies.append(Transform.from_dict(json.loads(json.dumps(transform.to_dict()))))
    for copy in copies:
        assert copy == transform
        assert hash(copy) == hash(transform)
        assert copy.fingerprint() == transform.fingerprint()
        assert repr(copy) == repr(transform)


def test_different_transforms_are_distinct_set_members():
    assert len(set(TRANSFORMS)) == len(TRANSFORMS)
    assert Transform("caffe") != "caffe"


@pytest.mark.parametrize("mode", [Mode.CAFFE, Mode.TF, Mode.TORCH, Mode.IDENTITY])
def test_keras_mode_read_from_json_is_the_same_object(mode):
    assert Mode.from_dict(json.loads(json.dumps(mode.to_dict()))) is mode


def test_custom_mode_with_a_keras_name_keeps_its_constants():
    borrowed = Mode("caffe", mean=(1.0, 2.0, 3.0))
    assert Mode.from_dict(borrowed.to_dict()) == borrowed
    assert borrowed != Mode.CAFFE


@pytest.mark.parametrize("field", sorted(ONE_FIELD_CHANGED))
def test_every_field_affects_equality_and_fingerprint(field):
    changed = ONE_FIELD_CHANGED[field]
    assert changed != Transform("caffe")
    assert changed.fingerprint() != Transform("caffe").fingerprint()


def test_fingerprints_of_single_field_changes_are_distinct():
    fingerprints = {transform.fingerprint() for transform in ONE_FIELD_CHANGED.values()}
    assert len(fingerprints) == len(ONE_FIELD_CHANGED)


def test_equivalent_arguments_share_a_fingerprint():
    written_out = Transform(Mode.CAFFE, "preprocess", "NHWC", "NHWC", np.dtype(">f4"), "nearest")
    assert written_out.fingerprint() == Transform("caffe", dtype="float32").fingerprint()


def test_a_fingerprint_is_the_same_in_another_process():
    expected = [transform.fingerprint() for transform in TRANSFORMS]
    script = (
        "import base64, pickle, sys\n"
        f"transforms = pickle.loads({pickle.dumps(TRANSFORMS)!r})\n"
        "print(*[transform.fingerprint() for transform in transforms])\n"
    )
    for seed in ("1", "2"):
        assert run_script(script, PYTHONHASHSEED=seed).split() == expected


@pytest.mark.parametrize(("layout", "out_layout"), LAYOUT_PAIRS)
@pytest.mark.parametrize("mode", ["caffe", CUSTOM])
def test_inverse_swaps_direction_and_layouts(mode, layout, out_layout):
    forward = Transform(mode, "preprocess", layout, out_layout)
    back = forward.inverse()
    assert back == Transform(mode, "restore", out_layout, layout)
    assert back.inverse() == forward


@pytest.mark.parametrize("dtype", [None, "float16"])
def test_inverse_transform_restores_the_batch(dtype):
    x = every_value()
    transform = Transform("torch", out_layout="NCHW", dtype=dtype)
    y = transform(x)
    assert y.shape == (2, 3, 5, 27)
    assert y.dtype == dtype_of(dtype or "float32")
    out = np.empty_like(x)
    assert transform.inverse()(y, out=out) is out
    assert_same(out, x)


@pytest.mark.parametrize(
    ("transform", "expected"),
    [
        (Transform("caffe"), "Transform('caffe', 'preprocess', 'NHWC' -> 'NHWC')"),
        (Transform("tf", "restore", "NCHW"), "Transform('tf', 'restore', 'NCHW' -> 'NCHW')"),
        (
            Transform("torch", out_layout="NCHW", dtype=np.float16),
            "Transform('torch', 'preprocess', 'NHWC' -> 'NCHW', dtype='float16')",
        ),
        (
            Transform("caffe", "restore", dtype="uint8", rounding="truncate"),
            "Transform('caffe', 'restore', 'NHWC' -> 'NHWC', dtype='uint8', rounding='truncate')",
        ),
        (
            Transform(Mode("caffe", divide=2)),
            (
                "Transform(Mode(name='caffe', divide=2.0, mean=None, std=None, order='RGB'), "
                "'preprocess', 'NHWC' -> 'NHWC')"
            ),
        ),
    ],
)
def test_repr_shows_non_default_fields(transform, expected):
    assert repr(transform) == expected


@pytest.mark.parametrize(
    ("layout", "out_layout", "shape", "expected"),
    [
        ("NHWC", "NHWC", (2, 5, 7, 3), (2, 5, 7, 3)),
        ("NHWC", "NCHW", (2, 5, 7, 3), (2, 3, 5, 7)),
        ("NCHW", "NHWC", (2, 3, 5, 7), (2, 5, 7, 3)),
        ("NCHW", "NCHW", (2, 3, 5, 7), (2, 3, 5, 7)),
        ("NHWC", "NHWC", (5, 7, 3), (5, 7, 3)),
        ("NHWC", "NCHW", (5, 7, 3), (3, 5, 7)),
        ("NCHW", "NHWC", (3, 5, 7), (5, 7, 3)),
        ("NCHW", "NCHW", (3, 5, 7), (3, 5, 7)),
        ("NHWC", "NCHW", (0, 5, 7, 3), (0, 3, 5, 7)),
    ],
)
def test_output_shape_follows_out_layout(layout, out_layout, shape, expected):
    assert Transform("tf", "preprocess", layout, out_layout).output_shape(shape) == expected
    assert Transform("tf", "restore", layout, out_layout).output_shape(shape) == expected


@pytest.mark.parametrize("layout", LAYOUTS)
def test_out_layout_defaults_to_layout(layout):
    assert Transform("tf", layout=layout).out_layout == layout


def test_channel_axes_are_negative_to_fit_rank_3_and_4():
    assert CHANNEL_AXES == {"NHWC": -1, "NCHW": -3}


@pytest.mark.parametrize(
    ("direction", "dtype", "source", "expected"),
    [
        ("preprocess", None, "uint8", "float32"),
        ("preprocess", None, "float16", "float16"),
        ("preprocess", None, "bfloat16", "bfloat16"),
        ("preprocess", None, "float32", "float32"),
        ("preprocess", None, "float64", "float64"),
        ("preprocess", "float16", "uint8", "float16"),
        ("preprocess", "float32", "float64", "float32"),
        ("restore", None, "float16", "uint8"),
        ("restore", None, "float64", "uint8"),
        ("restore", "uint8", "float32", "uint8"),
        ("restore", "float64", "float16", "float64"),
    ],
)
def test_output_dtype_is_requested_or_default(direction, dtype, source, expected):
    assert Transform("tf", direction, dtype=dtype).output_type(source) == expected


@pytest.mark.parametrize("source", ["uint8", *FLOATS])
@pytest.mark.parametrize("target", FLOATS)
def test_preprocess_uses_float64_only_without_narrower_floats(source, target):
    expected = "float64" if target == "float64" and source in ("uint8", "float64") else "float32"
    assert Transform("tf", dtype=target).compute_type(source) == expected


@pytest.mark.parametrize("source", FLOATS)
@pytest.mark.parametrize("target", [None, "uint8", *FLOATS])
def test_restore_uses_float64_only_without_narrower_floats(source, target):
    wide = source == "float64" and target in (None, "uint8", "float64")
    expected = "float64" if wide else "float32"
    assert Transform("tf", "restore", dtype=target).compute_type(source) == expected


@pytest.mark.parametrize("dtype", [np.float16, "f2", ">f2", np.dtype("float16"), "float16"])
def test_dtype_argument_is_normalized_to_its_name(dtype):
    assert Transform("tf", dtype=dtype).dtype == "float16"


def test_bfloat16_class_is_accepted():
    assert Transform("tf", dtype=ml_dtypes.bfloat16) == Transform("tf", dtype="bfloat16")


@pytest.mark.parametrize(
    ("argument", "value", "choices"),
    [
        ("direction", "forward", ("'preprocess'", "'restore'")),
        ("layout", "nhwc", ("'NHWC'", "'NCHW'")),
        ("layout", None, ("'NHWC'", "'NCHW'")),
        ("out_layout", "HWC", ("'NHWC'", "'NCHW'")),
        ("rounding", "up", ("'nearest'", "'truncate'")),
    ],
)
def test_invalid_choice_is_rejected_with_the_valid_choices(argument, value, choices):
    with pytest.raises(UsageError) as caught:
        Transform("tf", **{argument: value})
    assert f"unknown {argument.replace('_', ' ')} {value!r}" in caught.value.problem
    assert all(choice in caught.value.remedy for choice in choices)
    assert "None" not in caught.value.remedy


def test_preprocess_to_uint8_is_rejected():
    with pytest.raises(UsageError) as caught:
        Transform("tf", dtype="uint8")
    assert all(name in caught.value.remedy for name in FLOATS)


@pytest.mark.parametrize("dtype", ["int32", complex, object])
def test_unsupported_output_dtype_is_rejected(dtype):
    with pytest.raises(UsageError):
        Transform("tf", dtype=dtype)
    with pytest.raises(UsageError):
        Transform("tf", "restore", dtype=dtype)


@pytest.mark.parametrize("shape", [(), (3,), (5, 3), (2, 2, 5, 7, 3)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_wrong_rank_is_rejected_with_the_shape(layout, shape):
    with pytest.raises(ShapeError) as caught:
        Transform("tf", layout=layout).check_input(shape, "uint8")
    assert f"shape {shape} has rank {len(shape)}" in caught.value.problem
    assert "rank 4" in caught.value.remedy
    assert "rank 3" in caught.value.remedy


@pytest.mark.parametrize(
    ("layout", "shape", "read_as", "found"),
    [
        ("NHWC", (2, 5, 7, 4), "NHWC", 4),
        ("NHWC", (2, 5, 7, 1), "NHWC", 1),
        ("NHWC", (3, 5, 7, 4), "NHWC", 4),
        ("NHWC", (5, 7, 1), "HWC", 1),
        ("NHWC", (5, 3, 4), "HWC", 4),
        ("NCHW", (2, 4, 5, 7), "NCHW", 4),
        ("NCHW", (3, 1, 5, 7), "NCHW", 1),
        ("NCHW", (1, 5, 7), "CHW", 1),
        ("NHWC", (0, 5, 7, 0), "NHWC", 0),
    ],
)
def test_channel_count_other_than_three_is_rejected_with_the_shape(layout, shape, read_as, found):
    with pytest.raises(ShapeError) as caught:
        Transform("tf", layout=layout).check_input(shape, "uint8")
    assert f"shape {shape} read as {read_as}:" in caught.value.problem
    assert f"has length {found}, expected 3" in caught.value.problem
    assert "3 channels" in caught.value.remedy


@pytest.mark.parametrize(
    ("layout", "shape", "remedy"),
    [
        ("NHWC", (2, 3, 5, 7), "axis -3 has length 3: give layout='NCHW'"),
        ("NHWC", (3, 5, 7), "axis -3 has length 3: give layout='NCHW'"),
        ("NCHW", (2, 5, 7, 3), "axis -1 has length 3: give layout='NHWC'"),
        ("NCHW", (5, 7, 3), "axis -1 has length 3: give layout='NHWC'"),
    ],
)
def test_batch_in_the_other_layout_is_rejected_with_the_layout(layout, shape, remedy):
    with pytest.raises(ShapeError) as caught:
        Transform("tf", layout=layout).check_input(shape, "uint8")
    assert str(shape) in caught.value.problem
    assert caught.value.remedy == remedy


@pytest.mark.parametrize("shape", [(2, 5, 7, 3), (5, 7, 3), (0, 5, 7, 3), (3, 3, 3), (3, 3, 3, 3)])
def test_a_batch_with_three_channels_is_accepted(shape):
    Transform("tf").check_input(shape, "uint8")


def test_restore_from_uint8_is_rejected():
    with pytest.raises(DtypeError, match="uint8 is the dtype of images"):
        Transform("tf", "restore").check_input((2, 5, 7, 3), "uint8")


@pytest.mark.parametrize(
    "constants",
    [
        {"mean": 5},
        {"mean": (None, 1, 2)},
        {"mean": "123"},
        {"std": "123"},
        {"std": ("1", 2, 3)},
        {"std": np.array(["1", "2", "3"])},
        {"divide": "255"},
    ],
)
def test_a_constant_that_is_not_a_number_is_a_mode_error(constants):
    with pytest.raises(ModeError, match="not a number"):
        Mode("own", **constants)


@pytest.mark.parametrize("name", [["x"], None, 7])
def test_the_name_of_a_mode_is_a_string(name):
    with pytest.raises(ModeError, match="name of a mode is"):
        Mode(name, divide=2.0)


def test_constant_too_large_for_float_is_a_mode_error():
    with pytest.raises(ModeError, match="big: a constant is not a number"):
        Mode("big", divide=10**400)


@pytest.mark.parametrize("name", [["caffe"], None, 7])
def test_mode_of_wrong_type_is_a_mode_error(name):
    with pytest.raises(ModeError, match="unknown mode"):
        Transform(name)
