"""The reference implementation: a Transform in plain NumPy, simple and slow.

Tests compare every kernel against this module, and this module against Keras. Every line is one
IEEE-754 operation in the compute type, in the order of
`keras.applications.imagenet_utils.preprocess_input`. It allocates freely: a batch has to fit into
memory several times.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from fastvgg.transform import CHANNEL_AXES, Mode, Transform, storage_dtype, storage_type

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from fastvgg.transform import Rounding


def apply(transform: Transform, x: NDArray[Any]) -> NDArray[Any]:
    """Apply a transform to a batch or an image; the definition of `engine.apply`.

    `x` has rank 3 or 4, the layout of the transform and any storage type; it is not modified. The
    result is a new C-contiguous array.

    >>> apply(Transform("caffe"), np.array([[[10, 20, 30]]], np.uint8)).tolist()
    [[[-73.93900299072266, -96.77899932861328, -113.68000030517578]]]
    """
    input_type = storage_type(x.dtype)
    transform.check_input(x.shape, input_type)
    compute = storage_dtype(transform.compute_type(input_type))
    target = storage_dtype(transform.output_type(input_type))
    # Infinities, NaN and subnormals are valid inputs with defined results.
    with np.errstate(all="ignore"):
        values = np.moveaxis(x, CHANNEL_AXES[transform.layout], -1).astype(compute)
        if transform.direction == "preprocess":
            values = forward(values, transform.mode)
        elif transform.direction == "restore":
            values = saturate(inverse(values, transform.mode), transform.rounding)
        values = np.moveaxis(values, -1, CHANNEL_AXES[transform.out_layout])
        result = np.ascontiguousarray(values.astype(target, copy=False))
        if transform.direction == "preprocess":
            result[np.isnan(result)] = np.nan  # canonical, because NaN payloads depend on the CPU
        return result


def forward(x: NDArray[Any], mode: Mode) -> NDArray[Any]:
    """Compute y from x, channels last; constants are rounded to the floating type of x."""
    y = _reverse_channels(x) if mode.is_bgr else x.copy()
    if mode.divide is not None:
        y /= x.dtype.type(mode.divide)
    if mode.mean is not None:
        y -= _tiled_row(mode.mean, y)
    if mode.std is not None:
        y /= _tiled_row(mode.std, y)
    return y


def inverse(y: NDArray[Any], mode: Mode) -> NDArray[Any]:
    """Compute x from y, neither clipped nor rounded: undo `forward`, last operation first."""
    x = y.copy()
    if mode.std is not None:
        x *= _tiled_row(mode.std, y)
    if mode.mean is not None:
        x += _tiled_row(mode.mean, y)
    if mode.is_bgr:
        x = _reverse_channels(x)
    if mode.divide is not None:
        x *= y.dtype.type(mode.divide)
    return x


def _reverse_channels(pixels: NDArray[Any]) -> NDArray[Any]:
    result = np.empty(pixels.shape, pixels.dtype)
    for channel in range(3):
        result[..., channel] = pixels[..., 2 - channel]
    return result


def _tiled_row(values: tuple[float, float, float], pixels: NDArray[Any]) -> NDArray[Any]:
    """Repeat three constants for each pixel of a row; NumPy is ten times as fast on whole rows."""
    return np.tile(np.array(values, pixels.dtype), (pixels.shape[-2], 1))


def saturate(x: NDArray[Any], rounding: Rounding) -> NDArray[Any]:
    """Clip to 0..255 and round to integers; NaN becomes 0."""
    clipped = np.where(x > 0, x, x.dtype.type(0))
    clipped = np.where(clipped < 255, clipped, x.dtype.type(255))
    round_ = np.rint if rounding == "nearest" else np.trunc
    return round_(clipped, out=clipped)


def unrestorable(mode: Mode, dtype: str) -> int:
    """Count the pixel values that a mode does not restore from a storage type.

    All 256 values of each of the 3 channels are tried, so the result is at most 768.

    >>> [unrestorable(Mode.TORCH, name) for name in ("float16", "bfloat16", "float32", "float64")]
    [0, 0, 0, 0]
    >>> unrestorable(Mode("washed out", divide=1e6, mean=(1.0, 1.0, 1.0)), "float16")
    762
    """
    x = np.repeat(np.arange(256, dtype=np.uint8), 3).reshape(16, 16, 3)
    preprocess = Transform(mode, dtype=dtype)
    return int((apply(preprocess.inverse(), apply(preprocess, x)) != x).sum())
