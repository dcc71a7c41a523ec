"""Convert images of any Pillow mode to 8-bit RGB, or refuse what that would distort.

`Image.convert` clips numbers of more than 8 bits: an image of 16 bits becomes white, and one of
floats from 0 to 1 becomes black. Keras' `load_img` returns these. Here they are refused, or scaled
on request; an image whose numbers are all bytes has the same pixels as in Keras.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from PIL import Image, TiffTags

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL.TiffImagePlugin import TiffImageFile

NOT_SCALED: Final = "scaling to 8 bits is off"  # the reason of an image that an option would scale
MAX_INT8: Final = 127
MAX_UINT16: Final = 65535
TAGS: Final = {tag.name: number for number, tag in TiffTags.TAGS_V2.items()}
WHITE_IS_ZERO: Final = 0
SEPARATE_PLANES: Final = 2
SIGNED: Final = 2


class RejectedError(Exception):
    """An image that fastvgg declines to decode; the message is stored, and names no option."""


def to_rgb(image: Image.Image, image_format: str | None, *, scale_to_uint8: bool) -> Image.Image:
    """Convert a decoded image to mode RGB as Keras does, unless numbers do not fit into 8 bits.

    Integers from 0 to 255 are kept, also as floats. With `scale_to_uint8`, 16-bit images are scaled
    so that 65535 becomes 255, and floats from 0 to 1 so that 1 becomes 255, rounded half to even.
    Every image that is accepted without `scale_to_uint8` has the same pixels with it, so that a
    retry can enable it.

    Raises
    ------
    RejectedError
        If the image has other numbers.
    """
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I;16"):
        image = Image.fromarray(_scale_uint16(np.asarray(image), scale_to_uint8))
    elif image.mode == "I":
        is_uint16 = image_format == "PPM"  # its integers were scaled to 16 bits
        image = Image.fromarray(_to_uint8(np.asarray(image), scale_to_uint8, is_uint16))
    elif image.mode == "F":
        image = Image.fromarray(_float_to_uint8(np.asarray(image), scale_to_uint8))
    return image.convert("RGB")


def _scale_uint16(pixels: NDArray[Any], is_enabled: bool) -> NDArray[np.uint8]:
    if not is_enabled:
        raise RejectedError(f"16-bit grayscale, and {NOT_SCALED}: Keras would clip it to white")
    scaled = pixels.astype(np.uint32)
    scaled *= 255
    scaled += MAX_UINT16 // 2
    scaled //= MAX_UINT16  # rounded; there are no ties
    return scaled.astype(np.uint8)


def _to_uint8(
    pixels: NDArray[np.int32], is_scaling_enabled: bool, is_uint16: bool
) -> NDArray[np.uint8]:
    low, high = int(pixels.min()), int(pixels.max())
    if low >= 0 and high <= 255 and not is_uint16:
        return pixels.astype(np.uint8)
    if low >= 0 and high <= MAX_UINT16:
        return _scale_uint16(pixels, is_scaling_enabled)
    raise RejectedError(f"grayscale with integers from {low} to {high}, outside of 16 bits")


def _float_to_uint8(pixels: NDArray[np.float32], is_scaling_enabled: bool) -> NDArray[np.uint8]:
    low, high = float(pixels.min()), float(pixels.max())
    if math.isnan(low):  # the minimum is NaN if any number is
        raise RejectedError("floating-point grayscale with NaN")
    is_ambiguous = high == 1  # black and white, or nearly black
    if low >= 0 and high <= 255 and not is_ambiguous:
        integers: NDArray[np.uint8] = pixels.astype(np.uint8)
        if np.array_equal(integers, pixels):
            return integers
    found = f"floating-point grayscale with numbers from {low:.6g} to {high:.6g}"
    if not (low >= 0 and high <= 1):
        raise RejectedError(f"{found}: neither 0 to 1, nor whole numbers from 0 to 255")
    if not is_scaling_enabled:
        raise RejectedError(f"{found}, and {NOT_SCALED}: Keras would make it black")
    scaled = pixels * np.float32(255)
    rounded: NDArray[np.uint8] = np.rint(scaled, out=scaled).astype(np.uint8)
    return rounded


def check_tiff(image: TiffImageFile) -> None:
    """Refuse TIFFs that Pillow opens in a mode in which their numbers mean something else.

    May decode the image.

    Raises
    ------
    RejectedError
        If the pixels would be inverted, shifted or scrambled.
    """
    tags = image.tag_v2
    bits = max(_numbers(tags.get(TAGS["BitsPerSample"], 1)), default=1)
    if image.mode.startswith(("I", "F")):
        if tags.get(TAGS["PhotometricInterpretation"], WHITE_IS_ZERO) == WHITE_IS_ZERO:
            raise RejectedError(f"{bits}-bit grayscale in which 0 is white, which Pillow inverts")
        if bits == 12:
            raise RejectedError("12-bit grayscale, which is not supported")
    is_planar = tags.get(TAGS["PlanarConfiguration"], 1) == SEPARATE_PLANES
    if is_planar and bits > 8 and not image.use_load_libtiff:
        raise RejectedError(f"{bits}-bit planes without compression, which Pillow scrambles")
    is_signed = SIGNED in _numbers(tags.get(TAGS["SampleFormat"], 1))
    if image.mode == "L" and is_signed and np.asarray(image).max() > MAX_INT8:
        raise RejectedError("8-bit grayscale with negative numbers")


def _numbers(value: Any) -> tuple[Any, ...]:  # noqa: ANN401
    return value if isinstance(value, tuple) else (value,)
