"""Unknown values of options: what was meant is suggested, as the caller writes it."""

from __future__ import annotations

import inspect

import numpy as np
import pytest

import fastvgg
from fastvgg import keras
from fastvgg.choices import check_choice, suggest
from fastvgg.errors import FastvggError, UsageError, command_line_vocabulary
from fastvgg.models import mode_name
from fastvgg.transform import LAYOUTS, ROUNDINGS, STORAGE_TYPES, Transform
from tests.helpers.datasets_on_disk import names_in

IMAGE = np.zeros((2, 4, 4, 3), np.uint8)

CASES = {
    "mode in capitals": (lambda: Transform("CAFFE"), "mode", "caffe"),
    "mode of a framework": (lambda: Transform("PyTorch"), "mode", "torch"),
    "mode of ImageNet": (lambda: fastvgg.preprocess(IMAGE, "imagenet"), "mode", "torch"),
    "mode with a typo": (lambda: Transform("cafe"), "mode", "caffe"),
    "model as a mode": (lambda: fastvgg.preprocess(IMAGE, "vgg-19"), "mode", "caffe"),
    "fp16": (lambda: Transform("tf", dtype="fp16"), "dtype", "float16"),
    "bf16": (lambda: Transform("tf", dtype="bf16"), "dtype", "bfloat16"),
    "float_32": (lambda: fastvgg.preprocess(IMAGE, "tf", dtype="Float_32"), "dtype", "float32"),
    "torch.float16": (lambda: Transform("tf", dtype="torch.float16"), "dtype", "float16"),
    "channels_first": (lambda: Transform("tf", layout="channels_first"), "layout", "NCHW"),
    "out layout": (lambda: Transform("tf", out_layout="nchw"), "out_layout", "NCHW"),
    "rounding": (lambda: Transform("tf", "restore", rounding="trunc"), "rounding", "truncate"),
    "direction": (lambda: Transform("tf", "Restore"), "direction", "restore"),
    "backend": (lambda: fastvgg.preprocess(IMAGE, "tf", backend="Numba"), "backend", "numba"),
    "mode as a model": (lambda: mode_name("Caffe"), "mode", "caffe"),
    "model": (lambda: mode_name("vg19"), "model", "VGG19"),
    "Keras mode": (lambda: keras.preprocess_input(IMAGE, mode="TF"), "mode", "tf"),
    "Keras layout": (
        lambda: keras.preprocess_input(IMAGE, "NCHW"),
        "data_format",
        "channels_first",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_near_miss_is_refused_with_the_spelling_to_use(case):
    call, name, meant = CASES[case]
    with pytest.raises(FastvggError) as caught:
        call()
    assert f"{name}={meant!r}" in caught.value.remedy
    assert "--" not in str(caught.value)
    with command_line_vocabulary(), pytest.raises(FastvggError) as caught:
        call()
    assert f"--{name.replace('_', '-')} {meant}" in caught.value.remedy
    assert "fastvgg.Mode" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value", "choices", "expected"),
    [
        ("dtype", "half", STORAGE_TYPES, "float16"),
        ("dtype", "double", STORAGE_TYPES[1:], "float64"),
        ("dtype", "u8", STORAGE_TYPES, "uint8"),
        ("dtype", "u8", STORAGE_TYPES[1:], None),  # not a choice here
        ("layout", "hwc", LAYOUTS, "NHWC"),
        ("format", "JPG", ["png", "jpeg", "webp"], "jpeg"),
        ("format", "tiff", ["png", "jpeg", "webp"], "png"),
        ("rounding", "", ROUNDINGS, None),
        ("rounding", 7, ROUNDINGS, None),
        ("rounding", None, ROUNDINGS, None),
        ("mode", "xyzzy", ["caffe", "tf"], None),
    ],
)
def test_suggestion_is_a_choice_or_none(name, value, choices, expected):
    assert suggest(name, value, choices) == expected


@pytest.mark.parametrize("value", [None, 5, ["png"], np.array(["png", "jpeg"]), "svg2", b"png"])
def test_value_that_resembles_none_is_refused_with_all_values(value):
    with pytest.raises(UsageError) as caught:
        check_choice("format", value, ["png", "jpeg"])
    assert repr(value) in caught.value.problem
    assert "'png', 'jpeg'" in caught.value.remedy


def test_a_choice_is_returned():
    assert check_choice("format", "png", ["png", "jpeg"]) == "png"


# Options that are True or False

CALLS = {
    "Transform.__call__": (Transform("tf"), IMAGE),
    "batches": ("x.npy", 2),
    "plan": ("x.npy", "y.npy"),
    "preprocess": (IMAGE, "tf"),
    "verify": ("x.npy",),
}
FUNCTIONS = {name: getattr(fastvgg, name) for name in fastvgg.__all__}
FUNCTIONS["Transform.__call__"] = Transform.__call__
FLAGS = [
    (name, parameter.name)
    for name, function in FUNCTIONS.items()
    if callable(function)
    for parameter in inspect.signature(function).parameters.values()
    if parameter.annotation == "bool"
]


@pytest.mark.parametrize(("name", "flag"), FLAGS)
def test_flag_is_true_or_false(tmp_path, monkeypatch, name, flag):
    monkeypatch.chdir(tmp_path)
    np.save("x.npy", IMAGE)
    for value in ("no", 0, 1, None, np.array([True, False])):
        with pytest.raises(UsageError, match=f"{flag} is "):
            FUNCTIONS[name](*CALLS[name], **{flag: value})
    assert names_in(tmp_path) == ["x.npy"]


def test_every_public_function_with_a_flag_is_tested():
    assert {name for name, _ in FLAGS} == set(CALLS)
    assert len(FLAGS) == 19


@pytest.mark.parametrize("value", [np.True_, np.False_])
def test_flag_may_be_a_bool_of_numpy(value):
    fastvgg.preprocess(IMAGE, "tf", check_values=value)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda x: keras.preprocess_input(x), "data_format='channels_first'"),
        (lambda x: keras.preprocess_input(x[0], "channels_last"), "data_format='channels_first'"),
        (
            lambda x: keras.restore_original_image_from_array(np.moveaxis(x, 1, -1) + 0.0),
            "data_format='channels_last'",
        ),
        (lambda x: keras.deprocess_img(x[0] + 0.0), "np.moveaxis(processed_img, -3, -1)"),
    ],
)
def test_drop_in_names_its_own_option_for_channels_elsewhere(call, words):
    with pytest.raises(fastvgg.FastvggError) as caught:
        call(np.zeros((2, 3, 4, 5), np.uint8))
    assert words in caught.value.remedy
    assert "layout" not in str(caught.value)
    assert "NCHW" not in str(caught.value)
