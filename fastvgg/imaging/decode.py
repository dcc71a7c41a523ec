"""Encoded images to pixels, exactly as Keras' `load_img` reads them.

Pillow decodes, converts and resizes, because Keras' `load_img` is these three calls: with the same
Pillow the bytes are the same (https://keras.io/api/data_loading/image/). As there, alpha is dropped
and an EXIF orientation is not applied, unless it is asked for.

JPEGs of the usual kinds, colour or grey, are decoded by simplejpeg, which takes 0.7 of the time and
gives the same bytes: both are libjpeg-turbo. It refuses whatever libjpeg warns of; Pillow then
decides, as it does in Keras, and the warning is kept.

Greys of 16 bits are refused: Keras clips all above 255 to white.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import struct
import threading
import zlib
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any, Final, Literal, NamedTuple, TypeAlias, get_args

import numpy as np
import simplejpeg
from PIL import ExifTags, Image, ImageOps

from fastvgg.errors import UsageError
from fastvgg.imaging import resize

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from numpy.typing import NDArray

    from fastvgg.imaging.resize import Gather, NearestIndex

__all__ = [
    "DECODING_ERRORS",
    "INTERPOLATIONS",
    "MAX_PIXELS",
    "SUFFIXES",
    "DecodeOptions",
    "Decoded",
    "Decoder",
    "Gray16",
    "describe_error",
    "open_image",
]

Gray16: TypeAlias = Literal["error", "scale"]

# What keras.utils.image_dataset_from_directory reads, and what else Pillow reads by default.
SUFFIXES: Final = frozenset((".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"))

FORMATS: Final = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")

INTERPOLATIONS: Final = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "hamming": Image.Resampling.HAMMING,
    "box": Image.Resampling.BOX,
    "lanczos": Image.Resampling.LANCZOS,
}

# What Pillow's decoders raise on damaged files: its plugins parse with struct and indexing, and
# Image.open itself catches these around each of them. A warning is raised where the caller's
# filters make errors of warnings.
DECODING_ERRORS: Final = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    IndexError,
    KeyError,
    EOFError,
    OverflowError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
    Warning,
)

CHANNELS: Final = 3
JPEG_START: Final = b"\xff\xd8\xff"
# Where libjpeg keeps a whole image of coefficients. Within compressed data an ff is followed by 00.
PROGRESSIVE: Final = b"\xff\xc2"
USUAL_COLOURS: Final = ("YCbCr", "Gray")
FAST_JPEG_FACTOR: Final = 2
UPRIGHT: Final = 1  # of EXIF's orientations
SIDEWAYS: Final = (5, 6, 7, 8)
# Where Pillow begins to warn; it refuses twice as many.
MAX_PIXELS: Final = 89_478_485
# Of memory, for each pixel, as measured: a JPEG's pixels, and coefficients if it is progressive;
# Pillow's RGB, what is converted to it, and what is turned; what WebP's decoder takes beside.
JPEG_PIXEL_BYTES: Final = 3
COEFFICIENTS_BYTES: Final = 6
RGB_PIXEL_BYTES: Final = 4
CONVERTED_PIXEL_BYTES: Final = 5
TURNED_PIXEL_BYTES: Final = 4
SCALED_PIXEL_BYTES: Final = 12
WEBP_PIXEL_BYTES: Final = 18
NOT_RESIZED_PIXEL_BYTES: Final = 6
SMALL_PIXEL_BYTES: Final = 14  # and a compressed byte a pixel
# Of a file: no image of so many pixels is larger uncompressed, with 16 bits for each of 4 channels.
FILE_PIXEL_BYTES: Final = 8
FILE_HEAD_BYTES: Final = 2**20


@dataclass(frozen=True)
class DecodeOptions:
    """How images are read: what Keras' `load_img` is told, and what it cannot be told.

    Parameters
    ----------
    size
        Height and width to resize to; if None, all images must have one size.
    interpolation
        A name that Keras' `load_img` knows.
    keep_aspect_ratio
        Cut a part of the wanted shape out of the middle before resizing, as Keras does.
    fast_jpeg
        Decode JPEGs at a half of their size or less where that is not smaller than what is wanted.
        The pixels are others than Keras'.
    exif
        Turn images as their EXIF orientation says.
    gray16
        "refuse" greys of 16 bits, or "scale" them: 65535 becomes 255.
    max_pixels
        An image of more is refused before it is decoded. Beside JPEGs Pillow refuses more than
        178,956,970 in any case.

    Raises
    ------
    UsageError
        If one of them makes no sense.
    """

    size: tuple[int, int] | None = None
    interpolation: str = "nearest"
    keep_aspect_ratio: bool = False
    fast_jpeg: bool = False
    exif: bool = False
    gray16: Gray16 = "error"
    max_pixels: int = MAX_PIXELS

    def __post_init__(self) -> None:
        if self.interpolation not in INTERPOLATIONS:
            raise UsageError(
                f"interpolation is {self.interpolation!r}",
                f"give one of {', '.join(INTERPOLATIONS)}",
            )
        if self.size is not None and (len(self.size) != 2 or min(self.size) < 1):
            raise UsageError(
                f"size is {self.size}", "give height and width in pixels: --size 224 224"
            )
        if self.gray16 not in get_args(Gray16):
            raise UsageError(f"gray16 is {self.gray16!r}", "give 'error' or 'scale'")
        if type(self.max_pixels) is not int or self.max_pixels < 1:
            raise UsageError(f"max_pixels is {self.max_pixels!r}", "give a number of pixels")
        for option in ("keep_aspect_ratio", "fast_jpeg"):
            if getattr(self, option) and self.size is None:
                raise UsageError(
                    f"{option} is given and no size", "give height and width: --size 224 224"
                )

    @property
    def max_bytes(self) -> int:
        """Of what length a file is refused before it is read."""
        return FILE_HEAD_BYTES + FILE_PIXEL_BYTES * self.max_pixels

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as JSON types."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> DecodeOptions:
        """Return the settings that `to_dict` wrote, whatever stands beside them."""
        known = {name: fields[name] for name in cls.__dataclass_fields__}
        size = known["size"]
        return cls(**{**known, "size": None if size is None else tuple(size)})

    def crop(self, height: int, width: int) -> tuple[int, int, int, int]:
        """Return the part that is resized: left, upper, right, lower; Keras' own arithmetic.

        >>> DecodeOptions((100, 100), keep_aspect_ratio=True).crop(height=375, width=500)
        (62, 0, 437, 375)
        """
        if self.size is None or not self.keep_aspect_ratio:
            return 0, 0, width, height
        wanted_height, wanted_width = self.size
        crop_height = min(height, width * wanted_height // wanted_width)
        crop_width = min(width, height * wanted_width // wanted_height)
        upper, left = (height - crop_height) // 2, (width - crop_width) // 2
        return left, upper, left + crop_width, upper + crop_height


class Decoded(NamedTuple):
    """What is known of an image when it was read, or could not be."""

    width: int
    """Of the image as it is stored, like `height`; zero where that is not known."""
    height: int
    failed: bool
    reason: str
    """Why it failed; or what its decoder warned of."""


class _RefusedError(Exception):
    """An image that is not decoded, for a reason of fastvgg's own."""


class Decoder:
    """Decode images, on many threads at once, in a bounded amount of memory.

    Parameters
    ----------
    decoding
        How they are read.
    memory_bytes
        What all threads together may take. Most images fit into a thread's share of a half of it;
        larger ones are decoded one at a time in the other half, and one that does not fit there is
        refused.
    threads
        How many there are.
    gather
        The function that resizes to the nearest pixels; see `resize.gather_function`.
    """

    def __init__(
        self,
        decoding: DecodeOptions,
        *,
        memory_bytes: int,
        threads: int = 1,
        gather: Gather = resize.gather,
    ) -> None:
        self._decoding = decoding
        self._gather = gather
        self._large_bytes = memory_bytes // 2
        self._share_bytes = (memory_bytes - self._large_bytes) // threads
        self._one_large = threading.Lock()
        # Of these nothing has to be reckoned.
        self._small_pixels = min(decoding.max_pixels, self._share_bytes // SMALL_PIXEL_BYTES)
        self._indices = functools.lru_cache(maxsize=256)(self._index_for)

    def size(self, data: bytes) -> tuple[int, int] | str:
        """Return an image's height and width as it would be read, or why that cannot be told."""
        try:
            with open_image(io.BytesIO(data)) as image:
                height, width = image.height, image.width
                # Pillow turns a TIFF itself, and tells the size that it has then.
                if not self._decoding.exif or image.format == "TIFF":
                    return height, width
                # To look for an orientation Pillow may have to decode the image.
                self._check_pixel_count(height * width)
                needed_bytes = self._pillow_pixel_bytes(image, data) * height * width
                with self._memory(len(data) + needed_bytes):
                    turns = _orientation(data) in SIDEWAYS
                return (width, height) if turns else (height, width)
        except (*DECODING_ERRORS, _RefusedError) as error:
            return describe_error(error)

    def decode(self, data: bytes, out: NDArray[np.uint8]) -> Decoded:
        """Decode an image into a contiguous `out`; where it fails, that is left in any state.

        Parameters
        ----------
        data
            The file's content.
        out
            Height, width, 3.
        """
        warned = ""
        if data.startswith(JPEG_START):
            try:
                decoded = self._decode_jpeg(data, out)
            except DECODING_ERRORS as error:  # libjpeg's warnings are errors of simplejpeg's
                warned = describe_error(error)
            else:
                if decoded is not None:
                    return decoded
        width, height = 0, 0
        try:
            with open_image(io.BytesIO(data)) as image:
                width, height = image.size
                self._decode_image(image, data, out)
        except (*DECODING_ERRORS, _RefusedError) as error:
            return Decoded(width, height, True, describe_error(error))
        return Decoded(width, height, False, warned)

    def _decode_jpeg(self, data: bytes, out: NDArray[np.uint8]) -> Decoded | None:
        """Decode a JPEG of a usual kind; None if it is of another."""
        decoding = self._decoding
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        if colours not in USUAL_COLOURS or (decoding.exif and _orientation(data) != UPRIGHT):
            return None
        smaller = self._decode_scaled(data, height, width) if decoding.fast_jpeg else {}
        try:
            if height * width <= self._small_pixels and len(data) <= self._small_pixels:
                self._store_rgb(simplejpeg.decode_jpeg(data, **smaller), out)
                return Decoded(width, height, False, "")
            self._check_pixel_count(height * width)
            with self._memory(self._jpeg_bytes(data, height * width)):
                self._store_rgb(simplejpeg.decode_jpeg(data, **smaller), out)
        except _RefusedError as error:
            return Decoded(width, height, True, str(error))
        return Decoded(width, height, False, "")

    def _jpeg_bytes(self, data: bytes, pixels: int) -> int:
        """Return the memory that a JPEG takes."""
        needed_bytes = len(data) + JPEG_PIXEL_BYTES * pixels
        if self._decoding.interpolation != "nearest":
            needed_bytes += RGB_PIXEL_BYTES * pixels
        return needed_bytes + COEFFICIENTS_BYTES * pixels * (PROGRESSIVE in data)

    def _decode_scaled(self, data: bytes, height: int, width: int) -> dict[str, Any]:
        """Return how to decode a JPEG no smaller than is wanted, where that saves a half."""
        wanted_height, wanted_width = self._decoding.size or (height, width)
        left, upper, right, lower = self._decoding.crop(height, width)
        least = {
            "min_height": -(-wanted_height * height // max(1, lower - upper)),
            "min_width": -(-wanted_width * width // max(1, right - left)),
            "min_factor": FAST_JPEG_FACTOR,
        }
        if simplejpeg.decode_jpeg_header(data, **least)[:2] == (height, width):
            return {}
        return {**least, "fastdct": True, "fastupsample": True}

    def _store_rgb(self, pixels: NDArray[np.uint8], out: NDArray[np.uint8]) -> None:
        """Write decoded pixels where they belong, resized where that is asked for."""
        if pixels.shape == out.shape:
            out[...] = pixels
            return
        if self._decoding.size is None or self._decoding.interpolation != "nearest":
            self._place_image(Image.fromarray(pixels), out)
        else:
            self._gather(pixels, self._indices(*pixels.shape[:2], *out.shape[:2]), out)

    def _index_for(
        self, height: int, width: int, wanted_height: int, wanted_width: int
    ) -> NearestIndex:
        box = self._decoding.crop(height, width)
        return resize.nearest_index(height, width, box, (wanted_height, wanted_width))

    def _decode_image(self, image: Image.Image, data: bytes, out: NDArray[np.uint8]) -> None:
        """Decode with Pillow an image that it has opened."""
        pixels = image.width * image.height
        self._check_pixel_count(pixels)
        with self._memory(len(data) + self._pillow_pixel_bytes(image, data) * pixels):
            if self._decoding.exif:
                image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):
                image = self._eight_bit(image)
            self._place_image(image if image.mode == "RGB" else image.convert("RGB"), out)

    def _pillow_pixel_bytes(self, image: Image.Image, data: bytes) -> int:
        """Return what Pillow takes for each pixel of an image."""
        return (
            RGB_PIXEL_BYTES
            + CONVERTED_PIXEL_BYTES * (image.mode != "RGB")
            + TURNED_PIXEL_BYTES * self._decoding.exif
            + SCALED_PIXEL_BYTES * image.mode.startswith("I")
            + WEBP_PIXEL_BYTES * (image.format == "WEBP")
            + COEFFICIENTS_BYTES * (image.format in ("JPEG", "MPO") and PROGRESSIVE in data)
            + NOT_RESIZED_PIXEL_BYTES * (self._decoding.size in (None, (image.height, image.width)))
        )

    def _eight_bit(self, image: Image.Image) -> Image.Image:
        """Return a grey of 16 bits as one of 8, if that is asked for."""
        if self._decoding.gray16 == "error" or not image.mode.startswith("I;16"):
            depth = 16 if image.mode.startswith("I;16") else 32
            raise _RefusedError(
                f"a grey of {depth} bits, which Keras clips to white"
                + ("; --gray16 scale scales it" if depth == 16 else "")
            )
        scaled = (np.asarray(image).astype(np.uint32) * 255 + 32767) // 65535  # rounded
        return Image.fromarray(scaled.astype(np.uint8))

    def _place_image(self, rgb: Image.Image, out: NDArray[np.uint8]) -> None:
        size = self._decoding.size
        if size is not None and (rgb.height, rgb.width) != size:
            resample = INTERPOLATIONS[self._decoding.interpolation]
            box = self._decoding.crop(rgb.height, rgb.width)
            rgb = rgb.resize((size[1], size[0]), resample, box=box)
        height, width = out.shape[:2]
        if rgb.size != (width, height):
            raise _RefusedError(f"its size is {rgb.height}x{rgb.width}, not {height}x{width}")
        out[...] = np.asarray(rgb)

    def _check_pixel_count(self, pixels: int) -> None:
        if pixels > self._decoding.max_pixels:
            raise _RefusedError(
                f"it has {pixels} pixels, and --max-pixels is {self._decoding.max_pixels}"
            )

    def _memory(self, needed_bytes: int) -> AbstractContextManager[Any]:
        """Return what is to be held while so many bytes are used."""
        if needed_bytes <= self._share_bytes:
            return contextlib.nullcontext()
        if needed_bytes > self._large_bytes:
            raise _RefusedError(
                f"it takes {needed_bytes} bytes of memory to decode, and {self._large_bytes} are "
                "there for it: give more --memory"
            )
        return self._one_large


def open_image(stream: IO[bytes]) -> Image.Image:
    """Open an image of a known format, by its content.

    Pillow knows many more, and for one of them, EPS, it runs Ghostscript on the file's program.
    """
    return Image.open(stream, formats=FORMATS)


def _orientation(data: bytes) -> int:
    """Return the EXIF orientation that an image asks for, 1 if it asks for none."""
    with open_image(io.BytesIO(data)) as image:
        orientation: int = image.getexif().get(ExifTags.Base.Orientation, UPRIGHT)
        return orientation


def describe_error(error: BaseException) -> str:
    """Say in one line why an image could not be read."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if "cannot identify image file" in str(error):
        return "not an image that Pillow knows"
    return " ".join(str(error).split()) or type(error).__name__
