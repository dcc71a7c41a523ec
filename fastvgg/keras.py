"""Drop-ins for the three functions that people copy: the same values, bit for bit.

Where they differ from the originals, they differ in what they refuse and in what they leave alone:
an argument is never changed, and a result is C-contiguous.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias

import numpy as np

from fastvgg import engine, oracle
from fastvgg.errors import DtypeError, ShapeError, UsageError
from fastvgg.transform import CHANNEL_AXES, Mode, Transform, storage_dtype, storage_name

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from fastvgg.transform import Layout

__all__ = ["deprocess_img", "preprocess_input", "restore_original_image_from_array"]

DataFormat: TypeAlias = Literal["channels_first", "channels_last"]

LAYOUTS: Final[dict[str, Layout]] = {"channels_first": "NCHW", "channels_last": "NHWC"}

# Flipping and subtracting the negated means is adding the means and flipping: x - (-m) is x + m.
_ADD_MEANS: Final = Mode("add the caffe means", mean=(-123.68, -116.779, -103.939), order="BGR")


def preprocess_input(
    x: NDArray[Any],
    data_format: DataFormat | None = None,
    mode: Literal["caffe", "tf", "torch"] = "caffe",
) -> NDArray[Any]:
    """Do what `keras.applications.imagenet_utils.preprocess_input` does to a NumPy array.

    Where it differs from the original:

    - `x` is not changed. The original writes into a floating `x`, a memory map on disk included.
    - The result is C-contiguous. The original gives a view with negative strides in caffe mode.
    - Anything but rank 3 or 4 with 3 channels is refused before work begins. The original treats
      two dimensions as an image of its columns, and fails on one channel after changing it.
    - long double is refused: it has no place in the contract.
    - Tensors of other frameworks are refused: the original computes other bits for them.

    Parameters
    ----------
    x
        Images with values 0..255 in RGB order, rank 3 or 4, any real type.
    data_format
        "channels_last" or "channels_first". If None: the setting of Keras where Keras has been
        imported, else "channels_last".
    mode
        "caffe", "tf" or "torch".

    Returns
    -------
    ndarray
        float16, float32 and float64 keep their type, and the arithmetic happens in it; all else
        becomes Keras' `floatx`, float32 unless Keras has been imported and set otherwise.

    Examples
    --------
    >>> preprocess_input(np.array([[[10, 20, 30]]]), mode="tf").tolist()
    [[[-0.9215686321258545, -0.843137264251709, -0.7647058963775635]]]
    """
    if mode not in ("caffe", "tf", "torch"):
        raise UsageError(f"mode is {mode!r}", "give 'caffe', 'tf' or 'torch'")
    layout = _layout(_keras_setting("image_data_format", "channels_last"), data_format)
    _check_no_others(x)
    if not issubclass(x.dtype.type, np.floating):
        x = x.astype(storage_dtype(_keras_setting("floatx", "float32")))
    return _apply(Transform(mode, layout=layout), x, _channel_by_channel)


def restore_original_image_from_array(
    x: NDArray[Any], data_format: DataFormat = "channels_first"
) -> NDArray[Any]:
    """Add the caffe means and reverse the channels, as the StackOverflow function does.

    The result is floating, neither rounded nor clipped. `fastvgg.restore` gives uint8 images, for
    every mode. Where it differs from https://stackoverflow.com/q/55987302:

    - `x` is not changed; the original adds the means to it in place.
    - The result is C-contiguous; the original returns a view with negative strides.
    - Anything but rank 3 or 4 with 3 channels, in a floating type, is refused.

    Parameters
    ----------
    x
        What `preprocess_input` returned in caffe mode, float16, float32 or float64, rank 3 or 4.
    data_format
        "channels_first" or "channels_last".

    Examples
    --------
    >>> y = preprocess_input(np.array([[[10, 20, 30]]]))
    >>> restore_original_image_from_array(y, "channels_last").tolist()
    [[[10.0, 20.0, 30.0]]]
    """
    transform = Transform(_ADD_MEANS, layout=_layout("channels_first", data_format))
    return _apply(transform, _floating(x), _channel_by_channel)


def deprocess_img(processed_img: NDArray[Any]) -> NDArray[np.uint8]:
    """Turn caffe network input into a uint8 image by truncating, as neural style tutorials do.

    Truncation loses one grey value wherever the arithmetic lands just below a whole number;
    `fastvgg.restore` rounds and loses none. Where it differs from the widely copied original:

    - The result is C-contiguous.
    - NaN becomes 0; the original leaves it to the processor.
    - Wrong shapes and integer types raise before work begins, with what was found.

    Parameters
    ----------
    processed_img
        Shape (H, W, 3) or (1, H, W, 3), channels last in BGR order, float16, float32 or float64.

    Returns
    -------
    ndarray
        uint8, shape (H, W, 3), RGB.

    Examples
    --------
    >>> deprocess_img(preprocess_input(np.array([[[10, 20, 30]]]))).tolist()
    [[[10, 20, 30]]]
    """
    y = _floating(processed_img)
    if y.ndim == 4:
        if len(y) != 1:
            raise ShapeError(
                f"shape {y.shape} is a batch of {len(y)}, and this function takes one image",
                "fastvgg.restore(y, 'caffe') takes any batch",
            )
        y = y[0]
    return _apply(Transform("caffe", "restore", rounding="truncate"), y, _truncated)


def _channel_by_channel(x: NDArray[Any], mode: Mode) -> NDArray[Any]:
    """Return y of x, channels last, with Keras' own in-place operations.

    In bfloat16 they are not those of the oracle: a constant is not rounded to that type first.
    """
    y = x[..., ::-1].copy() if mode.is_bgr else x.copy()
    if mode.divide is not None:
        y /= mode.divide
    for channel in range(3):
        if mode.mean is not None:
            y[..., channel] -= mode.mean[channel]
        if mode.std is not None:
            y[..., channel] /= mode.std[channel]
    return y


def _truncated(y: NDArray[Any], mode: Mode) -> NDArray[Any]:
    return oracle.saturate(oracle.inverse(y, mode), "truncate").astype(np.uint8)


def _apply(
    transform: Transform,
    x: NDArray[Any],
    arithmetic: Callable[[NDArray[Any], Mode], NDArray[Any]],
) -> NDArray[Any]:
    """Apply a transform; compute halves as halves, as the originals do and the engine does not."""
    name = storage_name(x.dtype)
    if name not in ("float16", "bfloat16"):
        applied: NDArray[Any] = engine.apply(transform, x)
        return applied
    transform.check_input(x.shape, name)
    axis = CHANNEL_AXES[transform.layout]
    with np.errstate(all="ignore"):
        result = arithmetic(np.moveaxis(x, axis, -1).astype(storage_dtype(name)), transform.mode)
    return np.ascontiguousarray(np.moveaxis(result, -1, axis))


def _check_no_others(x: NDArray[Any]) -> None:
    """Refuse what is not a NumPy array, or does not have a value everywhere."""
    if not isinstance(x, np.ndarray):
        raise DtypeError(f"got {type(x).__name__}, not a NumPy array", "convert it: np.asarray(x)")
    if isinstance(x, np.ma.MaskedArray):
        raise DtypeError("a masked array has no bytes for its masked values", "use x.filled(...)")


def _floating(x: NDArray[Any]) -> NDArray[Any]:
    """Refuse integers: adding means to them is an error in the originals too."""
    _check_no_others(x)
    if not issubclass(x.dtype.type, np.floating):
        raise DtypeError(
            f"type {x.dtype} is not what preprocess_input returns",
            "give float16, float32 or float64; fastvgg.restore takes bfloat16 too",
        )
    return x


def _layout(default: str, data_format: str | None) -> Layout:
    name = default if data_format is None else data_format
    if name not in LAYOUTS:
        raise UsageError(f"data_format is {name!r}", "give 'channels_first' or 'channels_last'")
    return LAYOUTS[name]


def _keras_setting(name: str, default: str) -> str:
    """Return a setting of Keras, which is never imported for it."""
    keras = sys.modules.get("keras")
    return default if keras is None else str(getattr(keras.config, name)())
