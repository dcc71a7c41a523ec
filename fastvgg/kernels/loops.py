"""One pass over memory, made of blocks, for every pair of types and layouts, there and back.

A loop reads and writes each pixel once, needs no memory of its own, and may run in place: it takes
all three channels of a pixel before it stores one. Arrays come as (images, pixels, 3), or where a
side is planar (NCHW) as (images, 3, pixels); `Recipe` says which loop is meant.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, NamedTuple

from fastvgg.kernels import blocks
from fastvgg.kernels.compile import block, loop

if TYPE_CHECKING:
    from collections.abc import Callable

    from fastvgg.transform import Rounding

__all__ = ["Recipe", "compiled"]


class Recipe(NamedTuple):
    """What distinguishes one compiled loop from another."""

    restores: bool
    source: str
    """The storage type read; half types come as uint16."""
    target: str
    """The storage type written."""
    compute: str
    planar_source: bool
    planar_target: bool
    flips: bool
    divides: bool
    """Whether the mode has a divisor for all channels."""
    scales: bool
    """Whether the mode has a std for each channel."""
    rounding: Rounding


@functools.cache
def compiled(recipe: Recipe) -> Callable[..., None]:
    """Return the loop of a recipe.

    It is called as ``loop(source, target, source_at, target_at, count, divide, mean, std)``:
    `source_at` and `target_at` are the first (image, pixel), `count` is how many (images, pixels).
    The constants are scalars of the compute type; `mean` and `std` have three, in the channel
    order of the target.
    """
    read, _ = _pixel_access(recipe.planar_source)
    _, write = _pixel_access(recipe.planar_target)
    value = _inverse(recipe) if recipe.restores else _forward(recipe)
    first, last = (2, 0) if recipe.flips else (0, 2)

    @loop
    def one_pass(
        source: Any,
        target: Any,
        source_at: Any,
        target_at: Any,
        count: Any,
        divide: Any,
        mean: Any,
        std: Any,
    ) -> None:
        for image in range(count[0]):
            i, j = source_at[0] + image, target_at[0] + image
            for pixel in range(count[1]):
                p, q = source_at[1] + pixel, target_at[1] + pixel
                v0 = read(source, i, p, first)
                v1 = read(source, i, p, 1)
                v2 = read(source, i, p, last)
                write(target, j, q, 0, value(v0, divide, mean[0], std[0]))
                write(target, j, q, 1, value(v1, divide, mean[1], std[1]))
                write(target, j, q, 2, value(v2, divide, mean[2], std[2]))

    return one_pass


def _forward(recipe: Recipe) -> Callable[..., Any]:
    load, store = blocks.load(recipe.source, recipe.compute), blocks.store(recipe.target)
    divides, scales = recipe.divides, recipe.scales

    @block
    def network_input(x: Any, divide: Any, mean: Any, std: Any) -> Any:
        y = load(x)
        if divides:
            y = y / divide
        y = y - mean
        if scales:
            y = y / std
        return store(y)

    return network_input


def _inverse(recipe: Recipe) -> Callable[..., Any]:
    load, store = blocks.load(recipe.source, recipe.compute), blocks.store(recipe.target)
    saturate = blocks.saturate(recipe.compute, recipe.rounding)
    divides, scales = recipe.divides, recipe.scales

    @block
    def image(y: Any, divide: Any, mean: Any, std: Any) -> Any:
        x = load(y)
        if scales:
            x = x * std
        x = x + mean
        if divides:
            x = x * divide
        return store(saturate(x))

    return image


@functools.cache
def _pixel_access(planar: bool) -> tuple[Callable[..., Any], Callable[..., None]]:
    """Return how channel c of pixel p of image i is read and written."""
    if planar:

        @block
        def read(array: Any, i: Any, p: Any, c: Any) -> Any:
            return array[i, c, p]

        @block
        def write(array: Any, i: Any, p: Any, c: Any, value: Any) -> None:
            array[i, c, p] = value
    else:

        @block
        def read(array: Any, i: Any, p: Any, c: Any) -> Any:
            return array[i, p, c]

        @block
        def write(array: Any, i: Any, p: Any, c: Any, value: Any) -> None:
            array[i, p, c] = value

    return read, write
