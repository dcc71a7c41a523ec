"""The table of published models against the `preprocess_input` of each Keras module."""

from __future__ import annotations

import sys
import warnings

import keras
import numpy as np
import pytest

import fastvgg
from fastvgg.errors import FastvggError, ModeError
from fastvgg.models import MODES_BY_MODEL, mode_name
from fastvgg.transform import Mode
from tests.helpers.batches import assert_same, every_value, frozen, unchanged

pytestmark = pytest.mark.pixels

PUBLISHED = sorted(
    name
    for name, value in vars(keras.applications).items()
    if callable(value) and name[0].isupper()
)


@pytest.mark.parametrize("model", sorted(MODES_BY_MODEL))
def test_model_mode_matches_keras_preprocess_input(model):
    build = getattr(keras.applications, model)
    preprocess_input = sys.modules[build.__module__].preprocess_input
    x = frozen(every_value().astype(np.float32))
    expected = preprocess_input(x.copy())
    with unchanged(x):
        actual = fastvgg.preprocess(x, MODES_BY_MODEL[model])
    assert_same(actual, expected)


def test_table_lists_exactly_the_keras_models():
    assert len(PUBLISHED) > 30
    assert sorted(MODES_BY_MODEL) == PUBLISHED


def test_model_names_are_unique_ignoring_case():
    bare = {name.lower() for name in MODES_BY_MODEL}
    assert len(bare) == len(MODES_BY_MODEL)


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("VGG19", "caffe"),
        ("vgg19", "caffe"),
        ("vgg-19", "caffe"),
        ("Vgg_19", "caffe"),
        ("VGG 16", "caffe"),
        ("resnet50", "caffe"),
        ("resnet-50-v2", "tf"),
        ("ResNet50_V2", "tf"),
        ("nasnet mobile", "tf"),
        ("densenet_201", "torch"),
        ("efficientnet-b0", "identity"),
        ("efficientnet_v2_b0", "identity"),
        ("convnext-tiny", "identity"),
    ],
)
def test_model_lookup_ignores_case_dashes_and_underscores(written, expected):
    assert mode_name(written) == expected


@pytest.mark.parametrize("written", ["", "resnet", "vgg", "vgg191", "resnet50v3", "caffe"])
def test_an_unknown_model_is_rejected_by_name_with_a_remedy(written):
    with pytest.raises(ModeError) as caught:
        mode_name(written)
    assert repr(written) in caught.value.problem
    assert "fastvgg.models.MODES_BY_MODEL" in caught.value.remedy
    assert isinstance(caught.value, FastvggError)
    assert isinstance(caught.value, ValueError)
    assert caught.value.exit_code == 2
    with pytest.raises(ModeError):
        Mode.for_model(written)


@pytest.mark.parametrize(
    ("model", "expected"),
    [("vgg16", Mode.CAFFE), ("xception", Mode.TF), ("densenet169", Mode.TORCH)],
)
def test_for_model_returns_the_mode_without_a_warning(model, expected):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        actual = Mode.for_model(model)
    assert actual is expected


@pytest.mark.parametrize("model", ["EfficientNetB0", "convnext_tiny", "MobileNetV3Large"])
def test_for_model_warns_if_the_network_rescales_its_input(model):
    with pytest.warns(UserWarning, match=f"{model}.*identity") as caught:
        actual = Mode.for_model(model)
    assert actual is Mode.IDENTITY
    assert [warning.filename for warning in caught] == [__file__]


def test_every_mode_in_the_table_exists():
    assert {Mode.from_name(name).name for name in set(MODES_BY_MODEL.values())} == {
        "caffe",
        "tf",
        "torch",
        "identity",
    }


@pytest.mark.parametrize(
    "written",
    ["resnet18", "resnet34", "resnext50_32x4d", "vit_b_16", "vgg16_bn", "wide_resnet50_2"],
)
def test_model_of_another_library_is_not_taken_for_one_of_keras(written):
    with pytest.raises(ModeError) as caught:
        mode_name(written)
    assert "only those of Keras are known, not those of torchvision" in caught.value.problem
    assert "did you mean" not in caught.value.remedy


@pytest.mark.parametrize(
    ("written", "meant"), [("resnt50", "ResNet50"), ("vgg-91", None), ("efficientnetb8", None)]
)
def test_only_a_model_of_the_same_number_is_suggested(written, meant):
    with pytest.raises(ModeError) as caught:
        mode_name(written)
    assert (f"did you mean model='{meant}'" in caught.value.remedy) == (meant is not None)
    assert ("did you mean" in caught.value.remedy) == (meant is not None)
