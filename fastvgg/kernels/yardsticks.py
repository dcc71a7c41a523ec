"""Loops that move bytes and compute nothing: what the memory allows, to hold kernels against."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, Final

from llvmlite import ir

from fastvgg.kernels import blocks
from fastvgg.kernels.compile import block, loop

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["STEP_BYTES", "fill", "scale_in_place", "streaming_copy", "touch"]

STEP_BYTES: Final = 192  # written at a time: three cache lines, sixteen pixels of float32


@functools.cache
def streaming_copy(read_bytes: int, written_bytes: int, *, fetches: bool) -> Callable[..., None]:
    """Return a loop that reads and writes so many bytes a pixel, past the caches.

    Every byte is read: where more is read than written the parts are laid over one another, where
    less is, what was read is repeated. Whether it pays to ask for memory ahead depends on the ratio
    of the two: the faster of both is the limit.
    """
    taken = STEP_BYTES * read_bytes // written_bytes
    parts = max(1, taken // STEP_BYTES)

    def emit(b: Any, source: Any, target: Any, *_: Any) -> None:
        size = taken // parts
        read = [
            blocks.load(b, blocks.past(b, source, part * size), "uint8", size)
            for part in range(parts)
        ]
        moved = functools.reduce(b.xor, read)
        if fetches:
            blocks.fetch_ahead(b, source, taken)
        if size < STEP_BYTES:
            moved = blocks.join(b, [moved] * (STEP_BYTES // size))
        blocks.store_past_caches(b, moved, target)

    step, done = block(emit), block(_finish)

    @loop
    def copy(source: int, target: int, steps: int) -> None:
        for _ in range(steps):
            step(source, target, 0, 0, 0)
            source += taken
            target += STEP_BYTES
        done(0, 0, 0, 0, 0)

    return copy


@functools.cache
def scale_in_place(*, fetches: bool) -> Callable[..., None]:
    """Return a loop that multiplies float32 numbers where they are."""

    def emit(b: Any, target: Any, *_: Any) -> None:
        if fetches:
            blocks.fetch_ahead(b, target, STEP_BYTES)
        values = blocks.load(b, target, "float32", STEP_BYTES // 4)
        factor = ir.Constant(values.type, [1.0000001] * values.type.count)
        blocks.store(b, b.fmul(values, factor), target)

    step = block(emit)

    @loop
    def scale(target: int, steps: int) -> None:
        for _ in range(steps):
            step(target, 0, 0, 0, 0)
            target += STEP_BYTES

    return scale


@functools.cache
def fill() -> Callable[..., None]:
    """Return a loop that writes the same bytes again and again, past the caches."""

    def emit(b: Any, target: Any, *_: Any) -> None:
        ones = ir.Constant(ir.VectorType(ir.IntType(8), STEP_BYTES), [1] * STEP_BYTES)
        blocks.store_past_caches(b, ones, target)

    step, done = block(emit), block(_finish)

    @loop
    def filled(target: int, steps: int) -> None:
        for _ in range(steps):
            step(target, 0, 0, 0, 0)
            target += STEP_BYTES
        done(0, 0, 0, 0, 0)

    return filled


@functools.cache
def touch() -> Callable[..., None]:
    """Return a loop that writes one byte of every so many."""

    def emit(b: Any, target: Any, *_: Any) -> None:
        blocks.store(b, ir.Constant(ir.VectorType(ir.IntType(8), 1), [1]), target)

    step = block(emit)

    @loop
    def touched(target: int, count: int, step_bytes: int) -> None:
        for _ in range(count):
            step(target, 0, 0, 0, 0)
            target += step_bytes

    return touched


def _finish(b: Any, *_: Any) -> None:
    blocks.fence(b)
