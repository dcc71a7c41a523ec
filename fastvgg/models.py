"""The preprocessing mode of each model in `keras.applications`.

Source: the `preprocess_input` of every module of `keras.applications` (Keras 3.15); a test compares
this table against them. Models that scale the pixels in their own first layers have mode
`identity`.
"""

from __future__ import annotations

import re
from typing import Final

from fastvgg.choices import normalize, suggest
from fastvgg.errors import ModeError, command, option, option_name

MODELS_BY_MODE: Final = {
    "caffe": "VGG16 VGG19 ResNet50 ResNet101 ResNet152",
    "tf": (
        "ResNet50V2 ResNet101V2 ResNet152V2 InceptionV3 InceptionResNetV2 Xception "
        "MobileNet MobileNetV2 NASNetMobile NASNetLarge"
    ),
    "torch": "DenseNet121 DenseNet169 DenseNet201",
    "identity": (
        "MobileNetV3Small MobileNetV3Large "
        "EfficientNetB0 EfficientNetB1 EfficientNetB2 EfficientNetB3 "
        "EfficientNetB4 EfficientNetB5 EfficientNetB6 EfficientNetB7 "
        "EfficientNetV2B0 EfficientNetV2B1 EfficientNetV2B2 EfficientNetV2B3 "
        "EfficientNetV2S EfficientNetV2M EfficientNetV2L "
        "ConvNeXtTiny ConvNeXtSmall ConvNeXtBase ConvNeXtLarge ConvNeXtXLarge"
    ),
}
MODES_BY_MODEL: Final = {
    model: mode for mode, models in MODELS_BY_MODE.items() for model in models.split()
}


# Families that keras.applications does not have, without dashes.
OTHER_FAMILIES: Final = re.compile(
    r"^(alexnet|deit|dinov2|googlenet|maxvit|mnasnet|regnet|resnet(18|34)|resnext|shufflenet|"
    r"squeezenet|swin|vgg1[13]|vit|wideresnet)|^vgg\d+bn"
)


_MODES_BY_NAME: Final = {normalize(model): mode for model, mode in MODES_BY_MODEL.items()}


def _digits(name: object) -> str:
    return re.sub(r"\D", "", str(name))


def is_known(name: str) -> bool:
    """Return whether a name is that of a published model, as `mode_name` accepts it."""
    return normalize(name) in _MODES_BY_NAME


def mode_name(model: str) -> str:
    """Return the name of the preprocessing mode of a published model.

    Case, spaces, dashes and underscores are ignored. Raises `ModeError` for an unknown model.

    >>> mode_name("vgg-19"), mode_name("DenseNet121")
    ('caffe', 'torch')
    """
    if isinstance(model, str) and is_known(model):
        return _MODES_BY_NAME[normalize(model)]
    name = "mode" if str(model).lower() in MODELS_BY_MODE else "model"
    meant = suggest(name, model, MODELS_BY_MODE if name == "mode" else MODES_BY_MODEL)
    is_other = OTHER_FAMILIES.search(normalize(str(model))) is not None
    if is_other or _digits(model) != _digits(meant):  # another number is another model
        meant = None
    question = f"did you mean {option(name, meant)}? " if meant else ""
    known = ": only those of Keras are known, not those of torchvision or timm" if is_other else ""
    raise ModeError(
        f"unknown model {model!r}{known}",
        f"{question}the known models: {command('models')}; for another one give "
        f"{option_name('mode')} instead",
    )
