"""Mode and Transform: immutable descriptions of what happens to pixels.

Both can be compared, hashed, pickled and written to JSON. `oracle` defines what a transform
computes, and `engine` computes it fast.
"""

from __future__ import annotations

import dataclasses
import json
import math
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Final, Literal, TypeAlias, get_args

import numpy as np
import xxhash

from fastvgg import models
from fastvgg.choices import check_choice
from fastvgg.errors import (
    DtypeError,
    ModeError,
    ShapeError,
    UsageError,
    option,
    option_name,
    rank_remedy,
)
from fastvgg.formatting import html_table

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import DTypeLike

Layout: TypeAlias = Literal["NHWC", "NCHW"]
Direction: TypeAlias = Literal["preprocess", "restore", "pack"]
Rounding: TypeAlias = Literal["nearest", "truncate"]
ChannelOrder: TypeAlias = Literal["RGB", "BGR"]
Triple: TypeAlias = tuple[float, float, float]

INVERSES: Final[dict[Direction, Direction]] = {
    "preprocess": "restore",
    "restore": "preprocess",
    "pack": "pack",
}
LAYOUTS: Final[tuple[Layout, ...]] = get_args(Layout)
ROUNDINGS: Final[tuple[Rounding, ...]] = get_args(Rounding)
CUSTOM: Final = ", or a custom fastvgg.Mode"
CHANNELS: Final = 3
CHANNEL_AXES: Final[dict[Layout, int]] = {"NHWC": -1, "NCHW": -3}
STORAGE_TYPES: Final = ("uint8", "float16", "bfloat16", "float32", "float64")


def storage_dtype(name: str) -> np.dtype[Any]:
    """Return the NumPy dtype of a storage type.

    >>> storage_dtype("bfloat16").itemsize
    2
    """
    if name not in STORAGE_TYPES:
        raise DtypeError(
            f"{name!r} is not a storage type", f"give one of {', '.join(STORAGE_TYPES)}"
        )
    if name == "bfloat16":
        import ml_dtypes  # noqa: F401  # registers the name with NumPy

    return np.dtype(name)


def storage_type(dtype: DTypeLike) -> str:
    """Return the name of the storage type of a dtype, in any byte order.

    >>> storage_type(">f4")
    'float32'
    """
    name = _dtype_name(dtype)
    if name not in STORAGE_TYPES:
        raise DtypeError(
            f"unsupported dtype {name}", f"convert it to one of {', '.join(STORAGE_TYPES)} first"
        )
    return name


def _check_dtype(dtype: DTypeLike, direction: Direction) -> str:
    """Return the storage type that an option requests, one that the direction stores."""
    name = _dtype_name(dtype)
    accepted = STORAGE_TYPES[1:] if direction == "preprocess" else STORAGE_TYPES
    return name if name in STORAGE_TYPES else check_choice("dtype", name, accepted)


def _dtype_name(dtype: DTypeLike) -> str:
    """Return NumPy's name of a dtype, or if it has none the text that was given."""
    try:
        return str(np.dtype(dtype).name)
    except TypeError:
        return str(dtype)


def _to_float(number: float) -> float:
    """Convert a number, but not a string, which `float` would parse."""
    if isinstance(number, str):
        raise TypeError(f"{number!r} is a string")
    return float(number)


@dataclass(frozen=True)
class Mode:
    """The arithmetic between an image x (0..255) and a network input y.

    Preprocessing computes ``y = (x / divide - mean) / std`` and restoring computes
    ``x = (y * std + mean) * divide``. Each operation is rounded separately in the compute type, and
    omitted if its constant is None. ``Mode.CAFFE``, ``Mode.TF`` and ``Mode.TORCH`` are the modes of
    Keras; they restore every byte from every storage type. A custom mode restores what its
    constants allow: `oracle.unrestorable` counts the values that it loses.

    Parameters
    ----------
    name
        The name in messages and manifests.
    divide
        The divisor of all channels, or None.
    mean, std
        Three numbers each, in the channel order of y, or None. Minus zero becomes zero, so that
        equal modes compute equal bits.
    order
        The channel order of y: "RGB", which is the order of x, or "BGR".

    Raises
    ------
    ModeError
        If a constant is not finite in float32, or a divisor is zero.

    References
    ----------
    The NumPy path of `keras.applications.imagenet_utils.preprocess_input`.

    Examples
    --------
    >>> Mode("half", divide=255.0, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)).order
    'RGB'
    >>> Mode.for_model("vgg19") is Mode.CAFFE
    True
    """

    name: str
    divide: float | None = None
    mean: Triple | None = None
    std: Triple | None = None
    order: ChannelOrder = "RGB"

    CAFFE: ClassVar[Mode]
    TF: ClassVar[Mode]
    TORCH: ClassVar[Mode]
    IDENTITY: ClassVar[Mode]

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise ModeError(f"the name of a mode is {self.name!r}", "give a string")
        if self.order not in get_args(ChannelOrder):
            raise ModeError(f"{self.name}: order is {self.order!r}", "give 'RGB' or 'BGR'")
        try:
            for field in ("mean", "std"):
                if getattr(self, field) is not None:
                    values = tuple(_to_float(value) + 0.0 for value in getattr(self, field))
                    object.__setattr__(self, field, values)
            if self.divide is not None:
                object.__setattr__(self, "divide", _to_float(self.divide))
        except (OverflowError, TypeError, ValueError) as error:
            raise ModeError(
                f"{self.name}: a constant is not a number: {error}",
                "give a number for divide, and three numbers each for mean and std, or None",
            ) from None
        for field in ("mean", "std"):
            values = getattr(self, field)
            if values is not None and len(values) != CHANNELS:
                raise ModeError(
                    f"{self.name}: {field} has {len(values)} values",
                    f"give {CHANNELS} values, one for each channel",
                )
        self._check_constants()

    def _check_constants(self) -> None:
        divisors = (() if self.divide is None else (self.divide,)) + (self.std or ())
        for value in divisors + (self.mean or ()):
            with np.errstate(over="ignore", under="ignore"):
                rounded = float(np.float32(value))
            if not math.isfinite(rounded) or (value in divisors and rounded == 0.0):
                raise ModeError(
                    f"{self.name}: the constant {value!r} becomes {rounded!r} in float32",
                    "give constants that are finite, and divisors that are not zero, in float32",
                )

    @staticmethod
    def from_name(name: str) -> Mode:
        """Return a built-in mode: caffe, tf, torch or identity."""
        if isinstance(name, str) and name not in _MODES and models.is_known(name):
            mode = models.mode_name(name)
            raise ModeError(
                f"{name!r} is a model, not a mode",
                f"its mode is {mode}: give {option('mode', mode)}",
            )
        return _MODES[check_choice("mode", name, _MODES, error=ModeError, other=CUSTOM)]

    @staticmethod
    def for_model(model: str) -> Mode:
        """Return the mode of a model of `keras.applications`; warn if it is the identity.

        EfficientNet, ConvNeXt and MobileNetV3 scale the pixels in their own first layers. Their
        mode is `Mode.IDENTITY`, which only converts the dtype.
        """
        mode = Mode.from_name(models.mode_name(model))
        if mode is Mode.IDENTITY:
            warnings.warn(
                f"{model} scales pixels itself: its mode, identity, changes no value",
                stacklevel=2,
            )
        return mode

    @property
    def is_bgr(self) -> bool:
        """Whether y is BGR, the reverse of the channel order of x."""
        return self.order == "BGR"

    def to_dict(self) -> dict[str, Any]:
        """Return the mode as JSON types."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Mode:
        """Return the mode that `to_dict` wrote; a built-in mode is the same object."""
        mode = cls(**record)
        known = _MODES.get(mode.name)
        return known if known == mode else mode


Mode.CAFFE = Mode("caffe", mean=(103.939, 116.779, 123.68), order="BGR")
Mode.TF = Mode("tf", divide=127.5, mean=(1.0, 1.0, 1.0))
Mode.TORCH = Mode("torch", divide=255.0, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
Mode.IDENTITY = Mode("identity")

_MODES: Final = {m.name: m for m in (Mode.CAFFE, Mode.TF, Mode.TORCH, Mode.IDENTITY)}


def _formula(mode: Mode, direction: Direction) -> str:
    """Return the arithmetic of a mode as a readable formula.

    >>> _formula(Mode.TF, "preprocess"), _formula(Mode.TF, "restore")
    ('y = x / 127.5 - (1.0, 1.0, 1.0)', 'x = (y + (1.0, 1.0, 1.0)) * 127.5')
    """
    forward, inverse = "x", "y"
    if mode.divide is not None:
        forward = f"{forward} / {mode.divide}"
    if mode.mean is not None:
        forward = f"{forward} - {mode.mean}"
    if mode.std is not None:
        forward, inverse = f"({forward}) / {mode.std}", f"{inverse} * {mode.std}"
    if mode.mean is not None:
        inverse = f"{inverse} + {mode.mean}"
    if mode.divide is not None:
        inverse = f"({inverse}) * {mode.divide}"
    return f"x = {inverse}" if direction == "restore" else f"y = {forward}"


@dataclass(frozen=True, init=False, repr=False)
class Transform:
    """A complete conversion of a batch: mode, direction, layouts, dtype and rounding.

    Parameters
    ----------
    mode
        A `Mode`, or the name of a built-in one.
    direction
        "preprocess" converts images to network inputs, "restore" converts network inputs to images,
        and "pack" keeps images unchanged, to be preprocessed later.
    layout, out_layout
        The layout of the input and of the result, "NHWC" or "NCHW"; `out_layout` defaults to
        `layout`. An array of rank 3 is one image, without the N axis.
    dtype
        The storage type of the result. By default preprocess returns float32 for uint8 and keeps a
        floating type, and restore returns uint8.
    rounding
        How restore rounds: "nearest" (half to even) or "truncate".

    Examples
    --------
    >>> t = Transform("caffe", out_layout="NCHW")
    >>> t.inverse()
    Transform('caffe', 'restore', 'NCHW' -> 'NHWC')
    >>> image = np.zeros((2, 4, 3), np.uint8)
    >>> t(image).shape, t.inverse()(t(image)).tolist() == image.tolist()
    ((3, 2, 4), True)
    """

    mode: Mode
    direction: Direction
    layout: Layout
    out_layout: Layout
    dtype: str | None
    rounding: Rounding

    def __init__(
        self,
        mode: Mode | str,
        direction: Direction = "preprocess",
        layout: Layout = "NHWC",
        out_layout: Layout | None = None,
        dtype: DTypeLike | None = None,
        rounding: Rounding = "nearest",
    ) -> None:
        out_layout = layout if out_layout is None else out_layout
        check_choice("direction", direction, get_args(Direction))
        check_choice("layout", layout, LAYOUTS)
        check_choice("out_layout", out_layout, LAYOUTS)
        check_choice("rounding", rounding, ROUNDINGS)
        set_field = object.__setattr__
        set_field(self, "mode", mode if isinstance(mode, Mode) else Mode.from_name(mode))
        set_field(self, "direction", direction)
        set_field(self, "layout", layout)
        set_field(self, "out_layout", out_layout)
        set_field(self, "dtype", None if dtype is None else _check_dtype(dtype, direction))
        set_field(self, "rounding", rounding)
        is_unchanged = self.mode.name == "identity" and self.dtype in (None, "uint8")
        if direction == "pack" and not is_unchanged:
            raise UsageError(
                f"direction is 'pack', but mode is {self.mode.name!r} and dtype "
                f"{self.dtype or 'uint8'!r}",
                f"packing keeps images unchanged: give {option('mode', 'identity')} and omit "
                f"{option_name('dtype')}",
            )
        if direction == "preprocess" and self.dtype == "uint8":
            raise UsageError(
                "network inputs cannot be stored as uint8",
                f"give a floating {option_name('dtype')} {', '.join(STORAGE_TYPES[1:])}",
            )

    def __call__(self, x: Any, out: Any = None, *, check_values: bool = True) -> Any:  # noqa: ANN401
        """Apply the transform to an array in memory; see `engine.preprocess` and `restore`."""
        from fastvgg import engine

        return engine.apply(self, x, out, check_values=check_values)

    def __repr__(self) -> str:
        parts = [repr(self.mode.name if self.mode in _MODES.values() else self.mode)]
        parts += [repr(self.direction), f"{self.layout!r} -> {self.out_layout!r}"]
        parts += [] if self.dtype is None else [f"dtype={self.dtype!r}"]
        parts += [] if self.rounding == "nearest" else [f"rounding={self.rounding!r}"]
        return f"Transform({', '.join(parts)})"

    def _repr_html_(self) -> str:
        default = {"preprocess": "float32 for uint8, else unchanged", "restore": "uint8"}
        rows = [
            ("mode", self.mode.name),
            ("formula", _formula(self.mode, self.direction)),
            ("channels of y", self.mode.order),
            ("layout", f"{self.layout} -> {self.out_layout}"),
            ("type", self.dtype or default.get(self.direction, "uint8")),
            *([("rounding", self.rounding)] if self.direction == "restore" else []),
        ]
        return html_table(self.direction, rows)

    def inverse(self) -> Transform:
        """Return the transform that undoes this one, with the layouts swapped."""
        return Transform(self.mode, INVERSES[self.direction], self.out_layout, self.layout)

    def output_type(self, input_type: str) -> str:
        """Return the storage type of the result for an input of type `input_type`.

        >>> Transform("tf").output_type("uint8"), Transform("tf").output_type("float16")
        ('float32', 'float16')
        """
        if self.dtype is not None:
            return self.dtype
        if self.direction != "preprocess":
            return "uint8"
        return "float32" if input_type == "uint8" else input_type

    def compute_type(self, input_type: str) -> str:
        """Return the compute type: float64 if every floating side is float64, else float32."""
        sides = {input_type, self.output_type(input_type)} - {"uint8"}
        return "float64" if sides == {"float64"} else "float32"

    def check_input(self, shape: tuple[int, ...], input_type: str) -> None:
        """Check the shape and the storage type of an input.

        Raises
        ------
        ShapeError
            If the rank is neither 3 nor 4, or the length of the channel axis is not 3.
        DtypeError
            If the network inputs to restore are uint8, or the images to pack are not.
        """
        if len(shape) not in (3, 4):
            remedy = f"give a batch, of rank 4, or one image, of rank 3; {rank_remedy(shape, 'x')}"
            raise ShapeError(f"shape {shape} has rank {len(shape)}", remedy)
        channels = shape[CHANNEL_AXES[self.layout]]
        if channels != CHANNELS:
            other: Layout = "NCHW" if self.layout == "NHWC" else "NHWC"
            remedy = "give RGB images, with 3 channels"
            if shape[CHANNEL_AXES[other]] == CHANNELS:
                remedy = f"axis {CHANNEL_AXES[other]} has length 3: give {option('layout', other)}"
            elif channels == 4:  # RGBA
                alpha = "[..., :3]" if self.layout == "NHWC" else "[..., :3, :, :]"
                remedy += f"; without an alpha channel: x{alpha}"
            elif channels == 1:  # grayscale
                remedy += f"; from grayscale: numpy.repeat(x, 3, axis={CHANNEL_AXES[self.layout]})"
            raise ShapeError(
                f"shape {shape} read as {self.layout[4 - len(shape) :]}: the channel axis has "
                f"length {channels}, expected 3",
                remedy,
            )
        if self.direction == "restore" and input_type == "uint8":
            raise DtypeError(
                "uint8 is the dtype of images, not of network inputs: there is nothing to restore",
                "give the network inputs that preprocess returned, in a floating dtype",
            )
        if self.direction == "pack" and input_type != "uint8":
            raise DtypeError(
                f"cannot pack {input_type}: packed images are uint8",
                "give uint8 images, or convert them with astype",
            )

    def output_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of the result for an input of `shape`.

        >>> Transform("torch", out_layout="NCHW").output_shape((8, 5, 7, 3))
        (8, 3, 5, 7)
        """
        if self.layout == self.out_layout:
            return shape
        axes = list(shape)
        channels = axes.pop(CHANNEL_AXES[self.layout])
        axes.insert(len(shape) + CHANNEL_AXES[self.out_layout], channels)
        return tuple(axes)

    def to_dict(self) -> dict[str, Any]:
        """Return the transform as JSON types."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Transform:
        """Return the transform that `to_dict` wrote."""
        return cls(**{**record, "mode": Mode.from_dict(record["mode"])})

    def fingerprint(self) -> str:
        """Return a hash that is equal exactly for equal transforms."""
        canonical = json.dumps(self.to_dict(), sort_keys=True)
        return xxhash.xxh3_128_hexdigest(canonical.encode())
