"""What distinguishes one compiled loop from another, and the constants that it reads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple, TypeAlias

import numpy as np

from fastvgg.kernels.blocks import ELEMENT_BYTES
from fastvgg.kernels.compile import processor

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from fastvgg.transform import Mode, Rounding, Transform

__all__ = ["ROWS", "ROW_LANES", "Division", "Recipe", "constants", "reciprocal_is_exact"]

Division: TypeAlias = Literal["none", "division", "reciprocal"]

ROWS: Final = (
    *("divide", "1 / divide", "rest of 1 / divide"),
    "mean",
    *("std", "1 / std", "rest of 1 / std"),
)
ROW_LANES: Final = 48  # sixteen pixels


class Recipe(NamedTuple):
    """What distinguishes one compiled loop from another."""

    restores: bool
    source: str
    """The storage type read."""
    target: str
    """The storage type written."""
    compute: str
    planar_source: bool
    planar_target: bool
    flips: bool
    divides: Division
    """How the divisor of all channels is applied forwards."""
    scales: Division
    """How the std of each channel is applied forwards."""
    rounding: Rounding
    in_place: bool
    streams: bool
    """Whether whole lines are written past the caches."""

    @classmethod
    def of(
        cls,
        transform: Transform,
        input_name: str,
        *,
        reverses: bool = False,
        in_place: bool = False,
        streams: bool = False,
    ) -> Recipe:
        """Return the recipe of a transform, for inputs of one type.

        Parameters
        ----------
        transform, input_name
            What to do, and the storage type of what it is done to.
        reverses
            Whether the channels lie in memory in the reverse of the order that the transform
            takes them to have.
        in_place, streams
            How the result is written.
        """
        mode, restores = transform.mode, transform.direction == "restore"
        compute = transform.compute_name(input_name)
        divides, scales = _divisions(
            mode, bytes_only=input_name == "uint8" and compute == "float32"
        )
        return cls(
            restores=restores,
            source=input_name,
            target=transform.output_name(input_name),
            compute=compute,
            planar_source=transform.layout == "NCHW",
            planar_target=transform.out_layout == "NCHW",
            flips=mode.flips != reverses,
            divides=divides,
            scales=scales,
            rounding=transform.rounding if restores else "nearest",
            in_place=in_place,
            streams=streams,
        )

    @property
    def flips_late(self) -> bool:
        """Whether woven pixels are flipped as results: where those are the smaller elements."""
        woven = not (self.planar_source or self.planar_target)
        return self.flips and woven and ELEMENT_BYTES[self.source] > ELEMENT_BYTES[self.target]


@np.errstate(all="ignore")
def constants(mode: Mode, recipe: Recipe) -> NDArray[Any]:
    """Return a row of 48 lanes for each of `ROWS`, in the compute type.

    Channels come in the order of the target, or reversed where the loop flips late. A part that
    the mode does not have changes nothing.
    """
    scalar = np.dtype(recipe.compute).type
    reverses = (mode.flips and recipe.restores) != recipe.flips_late
    step = -1 if reverses else 1
    divide = np.full(3, 1.0 if mode.divide is None else mode.divide, scalar)
    mean = np.array(mode.mean or (0.0, 0.0, 0.0), scalar)[::step]
    std = np.array(mode.std or (1.0, 1.0, 1.0), scalar)[::step]
    rows = (divide, *_reciprocal(divide), mean, std, *_reciprocal(std))
    return np.stack([np.tile(row, ROW_LANES // len(row)) for row in rows])


@np.errstate(all="ignore")
def _divisions(mode: Mode, *, bytes_only: bool) -> tuple[Division, Division]:
    """Return how a mode divides by its divisor and by its std.

    `bytes_only` says that x is one of 256 whole numbers, which can all be looked at.
    """
    x = np.arange(256, dtype=np.float32)
    divides: Division = "none"
    scales: Division = "none"
    if mode.divide is not None:
        divisor = np.float32(mode.divide)
        divides = "reciprocal" if bytes_only and reciprocal_is_exact(x, divisor) else "division"
        x = x / divisor
    if mode.std is not None:
        means = mode.mean or (0.0, 0.0, 0.0)
        channels = [
            (x - np.float32(m), np.float32(s)) for m, s in zip(means, mode.std, strict=True)
        ]
        proven = bytes_only and all(reciprocal_is_exact(y, divisor) for y, divisor in channels)
        scales = "reciprocal" if proven else "division"
    return divides, scales


def reciprocal_is_exact(x: NDArray[np.float32], divisor: np.float32) -> bool:
    """Return whether `blocks.divide_by_reciprocal` has the bits of a division, for every x.

    Its two operations are carried out on each, and compared with the quotient.

    Examples
    --------
    >>> reciprocal_is_exact(np.arange(256, dtype=np.float32), np.float32(127.5))
    True
    >>> reciprocal_is_exact(np.arange(256, dtype=np.float32), np.float32(3e38))
    False
    """
    if not processor().fuses:
        return False
    with np.errstate(all="ignore"):
        reciprocal, rest = _reciprocal(divisor)
        quotient = _fused(x, reciprocal, x * rest)
        return quotient.tobytes() == (x / divisor).tobytes()


def _reciprocal(divisor: Any) -> tuple[Any, Any]:
    """Return 1 / divisor, and what rounding took from it, which is infinite where it is."""
    reciprocal = 1 / divisor
    residual = 1 - np.multiply(reciprocal, divisor, dtype=np.float64)
    return reciprocal, (residual / divisor).astype(divisor.dtype)


def _fused(a: NDArray[np.float32], b: np.float32, c: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return a * b + c, rounded once.

    In float64 the product is exact. The sum is rounded to odd, from where rounding to float32 is as
    good as from the exact sum (S. Boldo, G. Melquiond, "Emulation of FMA and correctly rounded
    sums: proved algorithms using rounding to odd", IEEE Trans. Computers 57, 2008).
    """
    product = a.astype(np.float64) * np.float64(b)
    total = product + c
    of_c = total - product
    lost = (product - (total - of_c)) + (c - of_c)
    is_even = total.view(np.int64) & 1 == 0
    other = np.nextafter(total, np.copysign(np.inf, lost))
    return np.where((lost != 0) & is_even, other, total).astype(np.float32)
