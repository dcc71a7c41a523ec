"""Bit-identical drop-in replacements for three widely copied functions.

Unlike the originals, they check their arguments, never modify them, and return C-contiguous arrays.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias

import numpy as np

from fastvgg import engine, oracle
from fastvgg.choices import check_choice
from fastvgg.errors import DtypeError, ShapeError, option
from fastvgg.interop import check_unmasked
from fastvgg.transform import CHANNEL_AXES, CHANNELS, Mode, Transform, storage_dtype, storage_type

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from fastvgg.transform import Layout

__all__ = ["deprocess_img", "preprocess_input", "restore_original_image_from_array"]

DataFormat: TypeAlias = Literal["channels_first", "channels_last"]

LAYOUTS: Final[dict[str, Layout]] = {"channels_first": "NCHW", "channels_last": "NHWC"}

# Subtracting the negated means adds the means, because x - (-m) equals x + m exactly.
_ADD_MEANS: Final = Mode("add the caffe means", mean=(-123.68, -116.779, -103.939), order="BGR")


def preprocess_input(
    x: NDArray[Any],
    data_format: DataFormat | None = None,
    mode: Literal["caffe", "tf", "torch"] = "caffe",
) -> NDArray[Any]:
    """Replace `keras.applications.imagenet_utils.preprocess_input` for NumPy arrays.

    Differences from the original:

    - `x` is not modified. The original overwrites a floating `x`, even a memory map on disk.
    - The result is C-contiguous. The original returns a view with negative strides in caffe mode.
    - Only rank 3 or 4 with 3 channels is accepted, which is checked first. The original treats
      two dimensions as an image of its columns, and fails on one channel after modifying it.
    - long double is rejected, because it is not a storage type.
    - Tensors of other frameworks are rejected, because the original computes other bits for them.

    Parameters
    ----------
    x
        RGB images with values 0..255, of rank 3 or 4 and any real dtype.
    data_format
        "channels_last" or "channels_first". By default the Keras setting if Keras is imported, else
        "channels_last".
    mode
        "caffe", "tf" or "torch".

    Returns
    -------
    ndarray
        float16, float32 and float64 are computed and returned in their own dtype. Other dtypes are
        converted to Keras' `floatx` if Keras is imported, else to float32.

    Examples
    --------
    >>> preprocess_input(np.array([[[10, 20, 30]]]), mode="tf").tolist()
    [[[-0.9215686321258545, -0.843137264251709, -0.7647058963775635]]]
    """
    check_choice("mode", mode, ("caffe", "tf", "torch"))
    layout = _layout(_keras_setting("image_data_format", "channels_last"), data_format)
    _check_plain_array(x)
    if not issubclass(x.dtype.type, np.floating):
        x = x.astype(storage_dtype(_keras_setting("floatx", "float32")))
    return _apply(Transform(mode, layout=layout), x, _compute_per_channel)


def restore_original_image_from_array(
    x: NDArray[Any], data_format: DataFormat = "channels_first"
) -> NDArray[Any]:
    """Add the caffe means and reverse the channels, like the StackOverflow function.

    The result is floating, neither rounded nor clipped; `fastvgg.restore` returns uint8 images for
    every mode. Differences from https://stackoverflow.com/q/55987302:

    - `x` is not modified; the original adds the means in place.
    - The result is C-contiguous; the original returns a view with negative strides.
    - Only floating arrays of rank 3 or 4 with 3 channels are accepted.

    Parameters
    ----------
    x
        The result of `preprocess_input` in caffe mode: float16, float32 or float64, rank 3 or 4.
    data_format
        "channels_first" or "channels_last".

    Examples
    --------
    >>> y = preprocess_input(np.array([[[10, 20, 30]]]))
    >>> restore_original_image_from_array(y, "channels_last").tolist()
    [[[10.0, 20.0, 30.0]]]
    """
    transform = Transform(_ADD_MEANS, layout=_layout("channels_first", data_format))
    return _apply(transform, _check_floating(x), _compute_per_channel)


def deprocess_img(processed_img: NDArray[Any]) -> NDArray[np.uint8]:
    """Convert a caffe network input to a uint8 image by truncation, like style transfer tutorials.

    Truncation is off by one wherever the arithmetic lands just below an integer; `fastvgg.restore`
    rounds and is exact. Differences from the widely copied original:

    - The result is C-contiguous.
    - NaN becomes 0; in the original it depends on the CPU.
    - Wrong shapes and integer dtypes are rejected before anything is computed.

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
    y = _check_floating(processed_img)
    if y.ndim == 4:
        if len(y) != 1:
            raise ShapeError(
                f"shape {y.shape} is a batch of {len(y)} images, expected one image",
                "for batches use fastvgg.restore(y, 'caffe')",
            )
        y = y[0]
    if y.ndim == 3 and y.shape[-1] != CHANNELS and y.shape[0] == CHANNELS:
        raise ShapeError(
            f"shape {y.shape} read as channels_last: the channel axis has length {y.shape[-1]}, "
            "expected 3",
            "axis -3 has length 3: give np.moveaxis(processed_img, -3, -1)",
        )
    return _apply(Transform("caffe", "restore", rounding="truncate"), y, _truncate)


def _compute_per_channel(x: NDArray[Any], mode: Mode) -> NDArray[Any]:
    """Compute y from x, channels last, with the in-place operations of Keras.

    In bfloat16 they differ from the oracle: constants are not rounded to bfloat16 first.
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


def _truncate(y: NDArray[Any], mode: Mode) -> NDArray[Any]:
    return oracle.saturate(oracle.inverse(y, mode), "truncate").astype(np.uint8)


def _apply(
    transform: Transform,
    x: NDArray[Any],
    arithmetic: Callable[[NDArray[Any], Mode], NDArray[Any]],
) -> NDArray[Any]:
    """Apply a transform; unlike the engine, compute float16 and bfloat16 in their own precision."""
    name = storage_type(x.dtype)
    _check_channels(transform.layout, x)
    if name not in ("float16", "bfloat16"):
        applied: NDArray[Any] = engine.apply(transform, x)
        return applied
    transform.check_input(x.shape, name)
    axis = CHANNEL_AXES[transform.layout]
    with np.errstate(all="ignore"):
        result = arithmetic(np.moveaxis(x, axis, -1).astype(storage_dtype(name)), transform.mode)
    return np.ascontiguousarray(np.moveaxis(result, -1, axis))


def _check_channels(layout: Layout, x: NDArray[Any]) -> None:
    """Check that the channels are where the data format says, in the words of Keras."""
    if x.ndim not in (3, 4) or x.shape[CHANNEL_AXES[layout]] == CHANNELS:
        return
    found, other = sorted(LAYOUTS, key=lambda name: LAYOUTS[name] != layout)
    remedy = "give RGB images, with 3 channels"
    if x.shape[CHANNEL_AXES[LAYOUTS[other]]] == CHANNELS:
        axis = CHANNEL_AXES[LAYOUTS[other]]
        remedy = f"axis {axis} has length 3: give {option('data_format', other)}"
    raise ShapeError(
        f"shape {x.shape} read as {found}: the channel axis has length "
        f"{x.shape[CHANNEL_AXES[layout]]}, expected 3",
        remedy,
    )


def _check_plain_array(x: NDArray[Any]) -> None:
    if not isinstance(x, np.ndarray):
        raise DtypeError(
            f"got {type(x).__name__}, which is not a NumPy array", "convert it: np.asarray(x)"
        )
    check_unmasked(x)


def _check_floating(x: NDArray[Any]) -> NDArray[Any]:
    """Return `x` if it is floating; the originals also fail to add means to integers."""
    _check_plain_array(x)
    if not issubclass(x.dtype.type, np.floating):
        raise DtypeError(
            f"dtype {x.dtype} is not floating, unlike the result of preprocess_input",
            "give float16, float32 or float64; fastvgg.restore also accepts bfloat16",
        )
    return x


def _layout(default: str, data_format: str | None) -> Layout:
    name = default if data_format is None else data_format
    return LAYOUTS[check_choice("data_format", name, LAYOUTS)]


def _keras_setting(name: str, default: str) -> str:
    """Return a Keras setting if Keras is already imported, else the default."""
    keras = sys.modules.get("keras")
    return default if keras is None else str(getattr(keras.config, name)())
