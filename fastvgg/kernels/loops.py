"""One pass over memory, made of blocks, for every pair of types and layouts, there and back.

A loop reads and writes each pixel once, needs no more memory than a tile, and may run in place: it
takes what it is about to overwrite first. Arrays come as (images, pixels, 3), or where a
side is planar (NCHW) as (images, 3, pixels); `Recipe` says which loop is meant.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np

from fastvgg.kernels import blocks
from fastvgg.kernels.compile import block, loop

if TYPE_CHECKING:
    from collections.abc import Callable

    from fastvgg.transform import Rounding

__all__ = ["Recipe", "compiled"]

TILE_PIXELS: Final = 2048  # a tile of three float32 planes, read and written, stays in L1 and L2


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
    value = _inverse(recipe) if recipe.restores else _forward(recipe)
    if recipe.planar_source and recipe.planar_target:
        return _plane_by_plane(value, recipe.flips)
    return _pixel_by_pixel(value, recipe)


def _pixel_by_pixel(value: Callable[..., Any], recipe: Recipe) -> Callable[..., None]:
    """Return the loop that takes a pixel's three channels together."""
    read, _ = _pixel_access(recipe.planar_source)
    _, write = _pixel_access(recipe.planar_target)
    first, last = (2, 0) if recipe.flips else (0, 2)

    @loop
    def pixel_by_pixel(
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

    return pixel_by_pixel


def _plane_by_plane(value: Callable[..., Any], flips: bool) -> Callable[..., None]:
    """Return the loop that goes along one plane at a time, in tiles.

    A loop over all three planes at once has twelve pairs of pointers that might overlap. LLVM
    tests at most eight before it gives up vectorising, which costs a factor of three. In place,
    two planes change places: the first tile waits in a buffer until its own has been read.
    """
    first, last = (2, 0) if flips else (0, 2)

    @block
    def along(source: Any, target: Any, divide: Any, mean: Any, std: Any) -> None:
        for p in range(source.size):
            target[p] = value(source[p], divide, mean, std)

    @loop
    def plane_by_plane(
        source: Any,
        target: Any,
        source_at: Any,
        target_at: Any,
        count: Any,
        divide: Any,
        mean: Any,
        std: Any,
    ) -> None:
        waiting = np.empty(TILE_PIXELS, target.dtype)
        for image in range(count[0]):
            i, j = source_at[0] + image, target_at[0] + image
            for start in range(0, count[1], TILE_PIXELS):
                size = min(TILE_PIXELS, count[1] - start)
                p, q = source_at[1] + start, target_at[1] + start
                x0 = source[i, first, p : p + size]
                x1 = source[i, 1, p : p + size]
                x2 = source[i, last, p : p + size]
                along(x0, waiting[:size], divide, mean[0], std[0])
                along(x1, target[j, 1, q : q + size], divide, mean[1], std[1])
                along(x2, target[j, 2, q : q + size], divide, mean[2], std[2])
                target[j, 0, q : q + size] = waiting[:size]

    return plane_by_plane


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
