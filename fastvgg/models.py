"""The preprocessing mode of each model in `keras.applications`.

Source: the `preprocess_input` of every module of `keras.applications` (Keras 3.15); a test compares
this table against them. Models that scale the pixels in their own first layers have mode
`identity`.
"""

from __future__ import annotations

from typing import Final

from fastvgg.errors import ModeError

MODES_BY_MODEL: Final[dict[str, str]] = {
    "VGG16": "caffe",
    "VGG19": "caffe",
    "ResNet50": "caffe",
    "ResNet101": "caffe",
    "ResNet152": "caffe",
    "ResNet50V2": "tf",
    "ResNet101V2": "tf",
    "ResNet152V2": "tf",
    "InceptionV3": "tf",
    "InceptionResNetV2": "tf",
    "Xception": "tf",
    "MobileNet": "tf",
    "MobileNetV2": "tf",
    "NASNetMobile": "tf",
    "NASNetLarge": "tf",
    "DenseNet121": "torch",
    "DenseNet169": "torch",
    "DenseNet201": "torch",
    "MobileNetV3Small": "identity",
    "MobileNetV3Large": "identity",
    "EfficientNetB0": "identity",
    "EfficientNetB1": "identity",
    "EfficientNetB2": "identity",
    "EfficientNetB3": "identity",
    "EfficientNetB4": "identity",
    "EfficientNetB5": "identity",
    "EfficientNetB6": "identity",
    "EfficientNetB7": "identity",
    "EfficientNetV2B0": "identity",
    "EfficientNetV2B1": "identity",
    "EfficientNetV2B2": "identity",
    "EfficientNetV2B3": "identity",
    "EfficientNetV2S": "identity",
    "EfficientNetV2M": "identity",
    "EfficientNetV2L": "identity",
    "ConvNeXtTiny": "identity",
    "ConvNeXtSmall": "identity",
    "ConvNeXtBase": "identity",
    "ConvNeXtLarge": "identity",
    "ConvNeXtXLarge": "identity",
}


def _normalize(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "").replace(" ", "")


_MODES_BY_NAME: Final = {_normalize(model): mode for model, mode in MODES_BY_MODEL.items()}


def mode_name(model: str) -> str:
    """Return the name of the preprocessing mode of a published model.

    Parameters
    ----------
    model
        A model of `keras.applications`. Case, spaces, dashes and underscores are ignored.

    Raises
    ------
    ModeError
        If there is no such model.

    Examples
    --------
    >>> mode_name("vgg-19"), mode_name("DenseNet121")
    ('caffe', 'torch')
    """
    try:
        return _MODES_BY_NAME[_normalize(model)]
    except KeyError:
        raise ModeError(
            f"unknown model {model!r}",
            "list the known models with 'fastvgg models'; for another model give a mode instead",
        ) from None
