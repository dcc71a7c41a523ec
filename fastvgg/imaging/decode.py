"""Decode images to exactly the pixels that Keras' `load_img` returns.

Pillow decodes, converts and resizes, because Keras' `load_img` consists of these three calls: with
the same Pillow version the bytes are the same (https://keras.io/api/data_loading/image/). As in
Keras, alpha is dropped, and the EXIF orientation is applied only on request.

YCbCr and grayscale JPEGs are decoded by simplejpeg, which takes 0.7 of the time and returns the
same bytes, as both use libjpeg-turbo. simplejpeg fails wherever libjpeg warns; Pillow then decodes
the image, as in Keras, and the warning is recorded.

Grayscale of more than 8 bits is refused or scaled: see `modes`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import numbers
import operator
import re
import threading
import warnings
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile

from fastvgg.choices import check_choice
from fastvgg.errors import UsageError, option
from fastvgg.imaging import memory, modes, orientation, resize
from fastvgg.imaging.formats import HEAD_BYTES, describe_content, supported_formats
from fastvgg.imaging.memory import (
    COEFFICIENT_PIXEL_BYTES,
    JPEG_PIXEL_BYTES,
    JPEG_SIGNATURE,
    MAX_JPEG_PIXEL_BYTES,
    RGB_PIXEL_BYTES,
    has_coefficients,
)
from fastvgg.imaging.modes import RejectedError
from fastvgg.interop import PILLOW_ERRORS

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from contextlib import AbstractContextManager

    from numpy.typing import NDArray

    from fastvgg.imaging.resize import Gather

INTERPOLATIONS: Final = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "hamming": Image.Resampling.HAMMING,
    "box": Image.Resampling.BOX,
    "lanczos": Image.Resampling.LANCZOS,
}

MEMORY_LIMIT: Final = "bytes of memory, but only"  # in a reason that more memory removes

DECODING_ERRORS: Final = (*PILLOW_ERRORS, Image.DecompressionBombError)

SIMPLEJPEG_COLORS: Final = ("YCbCr", "Gray")
FAST_JPEG_FACTOR: Final = 2
# Pillow's threshold for a warning; it rejects images of more than twice as many.
MAX_PIXELS: Final = 89_478_485
# Limit of the file size: an uncompressed image with four channels of 16 bits, and its headers.
FILE_PIXEL_BYTES: Final = 8
FILE_HEADER_BYTES: Final = 2**20

# A file can have thousands of damaged tags, of each of which Pillow warns with a text of its own.
# Appended, the filter gives way to those of the caller.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.", append=True)


@dataclass(frozen=True)
class DecodeOptions:
    """Options for decoding images: the options of Keras' `load_img`, and some that it lacks.

    Parameters
    ----------
    size
        Height and width to resize to. If None, all images must have the same size.
    interpolation
        The name of an interpolation of Keras' `load_img`.
    keep_aspect_ratio
        Center-crop to the target aspect ratio before resizing, as Keras does.
    fast_jpeg
        Decode JPEGs with DCT scaling, at half their size or less, if the result is not smaller than
        `size`. Faster, but the pixels differ from Keras'.
    exif
        Apply the EXIF orientation.
    scale_to_uint8
        Scale grayscale of 16 bits, so that 65535 becomes 255, and of floats from 0 to 1; otherwise
        such images are rejected. See `modes.to_rgb`.
    max_pixels
        Larger images are rejected before they are decoded. Except for JPEGs, Pillow always rejects
        images of more than 178,956,970 pixels.

    Raises
    ------
    UsageError
        If an option is invalid.
    """

    size: tuple[int, int] | None = None
    interpolation: str = "nearest"
    keep_aspect_ratio: bool = False
    fast_jpeg: bool = False
    exif: bool = False
    scale_to_uint8: bool = False
    max_pixels: int = MAX_PIXELS

    def __post_init__(self) -> None:
        check_choice("interpolation", self.interpolation, INTERPOLATIONS)
        if self.size is not None:
            object.__setattr__(self, "size", _parse_size(self.size))
        for flag in ("keep_aspect_ratio", "fast_jpeg", "exif", "scale_to_uint8"):
            object.__setattr__(self, flag, bool(getattr(self, flag)))
        is_count = isinstance(self.max_pixels, numbers.Integral)
        if not is_count or isinstance(self.max_pixels, bool) or self.max_pixels < 1:
            raise UsageError(
                f"invalid {option('max_pixels', self.max_pixels)}",
                "give a positive number of pixels",
            )
        object.__setattr__(self, "max_pixels", int(self.max_pixels))

    @property
    def max_bytes(self) -> int:
        """Maximum size of an encoded file; longer ones are rejected before they are read."""
        return FILE_HEADER_BYTES + FILE_PIXEL_BYTES * self.max_pixels

    def to_dict(self) -> dict[str, Any]:
        """Return the options as JSON types."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> DecodeOptions:
        """Return the options that `to_dict` wrote, ignoring other fields."""
        return cls(**{name: fields[name] for name in cls.__dataclass_fields__})

    def crop(self, height: int, width: int) -> tuple[int, int, int, int]:
        """Return the box to resize, computed as Keras does: left, upper, right, lower.

        >>> DecodeOptions((100, 100), keep_aspect_ratio=True).crop(height=375, width=500)
        (62, 0, 437, 375)
        """
        if self.size is None or not self.keep_aspect_ratio:
            return 0, 0, width, height
        target_height, target_width = self.size
        crop_height = min(height, width * target_height // target_width)
        crop_width = min(width, height * target_width // target_height)
        upper, left = (height - crop_height) // 2, (width - crop_width) // 2
        return left, upper, left + crop_width, upper + crop_height


def _parse_size(size: Iterable[Any]) -> tuple[int, int]:
    """Return a height and a width as positive ints."""
    try:
        height, width = (0 if isinstance(side, bool) else operator.index(side) for side in size)
    except (TypeError, ValueError):
        height = width = 0
    if min(height, width) >= 1:
        return height, width
    found = re.fullmatch(r"\(?(\d{1,5})(?:[x*, ]+(\d{1,5}))?(?:[x*, ]+[13])?\)?", str(size).lower())
    meant = (0, 0) if found is None else (int(found[1]), int(found[2] or found[1]))
    meant = meant if min(meant) >= 1 else (224, 224)
    raise UsageError(
        f"invalid {option('size', size)}",
        f"give height and width in pixels: {option('size', meant)}",
    )


class DecodeResult(NamedTuple):
    """The outcome of decoding an image."""

    width: int
    """Width as stored, before any resize; zero if unknown. The same applies to `height`."""
    height: int
    failed: bool
    reason: str
    """Why decoding failed, or the decoder's warning if it succeeded."""


class Decoder:
    """A thread-safe image decoder with bounded memory.

    Parameters
    ----------
    decoding
        Decoding options.
    memory_bytes
        Memory limit for all threads together. Half of it is divided evenly among the threads, which
        is enough for most images. Larger images are decoded one at a time in the other half, and
        images that do not fit there are rejected.
    threads
        Number of threads that decode.
    gather
        Nearest-neighbor resize function; see `resize.gather_function`.
    """

    def __init__(
        self,
        decoding: DecodeOptions,
        *,
        memory_bytes: int,
        threads: int = 1,
        gather: Gather = resize.gather,
    ) -> None:
        for flag in ("keep_aspect_ratio", "fast_jpeg"):
            if getattr(decoding, flag) and decoding.size is None:
                raise UsageError(
                    f"{option(flag)} requires a size",
                    f"give height and width: {option('size', (224, 224))}",
                )
        self._decoding = decoding
        self._gather = gather
        self._large_bytes = memory_bytes // 2
        self._share_bytes = (memory_bytes - self._large_bytes) // threads
        self._large_image_lock = threading.RLock()
        self._nearest_index = functools.lru_cache(maxsize=256)(resize.nearest_index)

    def size(self, data: bytes) -> tuple[int, int] | str:
        """Return the height and width that an image decodes to, or why they are unknown."""
        try:
            with self._opened(data) as (image, opened_bytes):
                height, width = image.height, image.width
                # Pillow transposes a TIFF itself, and reports the resulting size.
                if not self._decoding.exif or image.format == "TIFF":
                    return height, width
                # Pillow may have to decode the image to find its orientation.
                with self._pillow_memory(image, data, opened_bytes):
                    swaps_sides = orientation.swaps_sides(image)
                return (width, height) if swaps_sides else (height, width)
        except (*DECODING_ERRORS, RejectedError) as error:
            return describe_error(error)

    def decode(self, data: bytes, out: NDArray[np.uint8]) -> DecodeResult:
        """Decode an image into `out`, whose content is undefined if decoding fails.

        Parameters
        ----------
        data
            The encoded image.
        out
            A contiguous array of shape (height, width, 3).
        """
        warning = ""
        if data.startswith(JPEG_SIGNATURE):
            try:
                decoded = self._decode_jpeg(data, out)
            except DECODING_ERRORS as error:  # simplejpeg raises libjpeg's warnings
                warning = describe_error(error)
            else:
                if decoded is not None:
                    return decoded
        width, height = 0, 0
        try:
            with self._opened(data) as (image, opened_bytes):
                width, height = image.size
                with self._pillow_memory(image, data, opened_bytes):
                    self._decode_image(image, out)
        except (*DECODING_ERRORS, RejectedError) as error:
            return DecodeResult(width, height, True, describe_error(error))
        return DecodeResult(width, height, False, warning)

    def _decode_jpeg(self, data: bytes, out: NDArray[np.uint8]) -> DecodeResult | None:
        """Decode a JPEG with simplejpeg; return None if only Pillow can decode it."""
        decoding = self._decoding
        height, width, colors, _ = simplejpeg.decode_jpeg_header(data)
        if colors not in SIMPLEJPEG_COLORS:
            return None
        scaling = self._dct_scaling(data, height, width) if decoding.fast_jpeg else {}
        is_gathered = decoding.interpolation == "nearest"
        resize_bytes = 0 if is_gathered else self._resize_bytes(height, width)
        max_bytes = MAX_JPEG_PIXEL_BYTES * max(height * width, len(data)) + resize_bytes
        held: AbstractContextManager[Any] = contextlib.nullcontext()
        try:
            if decoding.exif:
                with self._opened(data) as (image, _):
                    if orientation.is_transposed(image):
                        return None
            self._check_pixels(height * width)
            if max_bytes > self._share_bytes:  # to search 70 kB for coefficients takes 160 us
                pixel_bytes = (
                    JPEG_PIXEL_BYTES
                    + RGB_PIXEL_BYTES * (not is_gathered)
                    + COEFFICIENT_PIXEL_BYTES * has_coefficients(data, 1 if colors == "Gray" else 3)
                )
                held = self._memory(len(data) + pixel_bytes * height * width + resize_bytes)
            with held:
                self._store_rgb(simplejpeg.decode_jpeg(data, **scaling), out)
        except RejectedError as error:
            return DecodeResult(width, height, True, str(error))
        return DecodeResult(width, height, False, "")

    def _dct_scaling(self, data: bytes, height: int, width: int) -> dict[str, Any]:
        """Return simplejpeg's options for DCT scaling by at least 2, or none if not possible."""
        target_height, target_width = self._decoding.size or (height, width)
        left, upper, right, lower = self._decoding.crop(height, width)
        limits = {
            "min_height": -(-target_height * height // max(1, lower - upper)),
            "min_width": -(-target_width * width // max(1, right - left)),
            "min_factor": FAST_JPEG_FACTOR,
        }
        if simplejpeg.decode_jpeg_header(data, **limits)[:2] == (height, width):
            return {}
        return {**limits, "fastdct": True, "fastupsample": True}

    def _store_rgb(self, pixels: NDArray[np.uint8], out: NDArray[np.uint8]) -> None:
        """Copy decoded pixels to `out`, resizing them if the shapes differ."""
        if pixels.shape == out.shape:
            out[...] = pixels
            return
        if self._decoding.size is None or self._decoding.interpolation != "nearest":
            self._store_image(Image.fromarray(pixels), out)
        else:
            height, width = pixels.shape[:2]
            box = self._decoding.crop(height, width)
            self._gather(pixels, self._nearest_index(height, width, box, out.shape[:2]), out)

    def _decode_image(self, image: Image.Image, out: NDArray[np.uint8]) -> None:
        """Decode, convert and store an image that Pillow has opened."""
        image_format = image.format
        if isinstance(image, TiffImageFile):
            modes.check_tiff(image)
        if self._decoding.exif and image_format != "TIFF":  # which Pillow transposes itself
            image = orientation.upright(image)
        rgb = modes.to_rgb(image, image_format, scale_to_uint8=self._decoding.scale_to_uint8)
        self._store_image(rgb, out)

    @contextlib.contextmanager
    def _opened(self, data: bytes) -> Iterator[tuple[Image.Image, int]]:
        """Open an image with Pillow; yield it, and what the file and its metadata take in memory.

        So much is held meanwhile.
        """
        opened_bytes = len(data) + memory.metadata_bytes(data)
        with self._memory(opened_bytes), open_image(io.BytesIO(data)) as image:
            yield image, opened_bytes

    def _pillow_memory(
        self, image: Image.Image, data: bytes, opened_bytes: int
    ) -> AbstractContextManager[Any]:
        """Return the context manager to hold while Pillow decodes an image."""
        self._check_pixels(image.height * image.width)
        is_resized = self._decoding.size not in (None, (image.height, image.width))
        pixel_bytes = memory.pixel_bytes(
            image, data, exif=self._decoding.exif, is_resized=is_resized
        )
        pixel_bytes += self._resize_bytes(image.height, image.width)
        return self._memory(opened_bytes + pixel_bytes)

    def _resize_bytes(self, height: int, width: int) -> int:
        """Return how much memory resizing takes, also if the EXIF swaps height and width."""
        decoding = self._decoding
        if decoding.size in (None, (height, width)):
            return 0
        return max(
            memory.resize_bytes(source, decoding.size, decoding.interpolation)
            for source in ((height, width), (width, height))
        )

    def _store_image(self, rgb: Image.Image, out: NDArray[np.uint8]) -> None:
        size = self._decoding.size
        if size is not None and (rgb.height, rgb.width) != size:
            resample = INTERPOLATIONS[self._decoding.interpolation]
            box = self._decoding.crop(rgb.height, rgb.width)
            rgb = rgb.resize((size[1], size[0]), resample, box=box)
        height, width = out.shape[:2]
        if rgb.size != (width, height):
            raise RejectedError(f"the image is {rgb.height}x{rgb.width}, expected {height}x{width}")
        out[...] = np.asarray(rgb)

    @property
    def max_bytes(self) -> int:
        """Maximum size of an encoded file; longer ones are rejected before they are read."""
        return min(self._decoding.max_bytes, self._large_bytes)

    def reading(self, nbytes: int) -> AbstractContextManager[Any]:
        """Return the context manager to hold while a file of `nbytes` is read and decoded."""
        is_large = self._share_bytes < nbytes
        return self._large_image_lock if is_large else contextlib.nullcontext()

    def _check_pixels(self, pixels: int) -> None:
        if pixels > self._decoding.max_pixels:
            raise RejectedError(
                f"the image has {pixels} pixels, more than the limit of {self._decoding.max_pixels}"
            )

    def _memory(self, needed_bytes: int) -> AbstractContextManager[Any]:
        """Return the context manager to hold while an image that takes so much is decoded."""
        if needed_bytes <= self._share_bytes:
            return contextlib.nullcontext()
        if needed_bytes > self._large_bytes:
            raise RejectedError(
                f"decoding takes {needed_bytes} {MEMORY_LIMIT} {self._large_bytes} are available"
            )
        return self._large_image_lock


def open_image(stream: IO[bytes]) -> Image.Image:
    """Open an image in a supported format, which is detected from its content."""
    try:
        return Image.open(stream, formats=supported_formats())
    except UnidentifiedImageError:
        stream.seek(0)
        raise UnidentifiedImageError(describe_content(stream.read(HEAD_BYTES))) from None


def describe_error(error: BaseException) -> str:
    """Return a one-line reason why an image could not be read."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__
