"""Loops that move bytes and compute nothing: what the memory allows, to hold kernels against."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, Final

from llvmlite import ir
from numba.core.cgutils import for_range

from fastvgg.kernels import blocks
from fastvgg.kernels.compile import machine_code

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["STEP_BYTES", "fill", "scale_in_place", "streaming_copy", "touch"]

STEP_BYTES: Final = 192  # written at a time: three cache lines, sixteen pixels of float32


@functools.cache
def streaming_copy(read_bytes: int, written_bytes: int, *, fetches: bool) -> Callable[..., None]:
    """Return a loop that reads and writes so many bytes a pixel, past the caches.

    It takes the addresses of what is read and written, and a number of steps. Every byte is read:
    where more is read than written the parts are laid over one another, where less is, what was
    read is repeated. Whether it pays to ask for memory ahead depends on the ratio of the two: the
    faster of both is the limit.
    """
    taken = STEP_BYTES * read_bytes // written_bytes
    parts = max(1, taken // STEP_BYTES)
    size = taken // parts

    def emit(b: Any, source: Any, target: Any, steps: Any) -> None:
        with for_range(b, steps) as step:
            x = b.add(source, b.mul(step.index, ir.Constant(steps.type, taken)))
            read = [
                blocks.load(b, blocks.past(b, x, part * size), "uint8", size)
                for part in range(parts)
            ]
            moved = functools.reduce(b.xor, read)
            if fetches:
                blocks.fetch_ahead(b, x, taken)
            if size < STEP_BYTES:
                moved = blocks.join(b, [moved] * (STEP_BYTES // size))
            blocks.store_past_caches(b, moved, _at(b, target, step.index))
        blocks.fence(b)

    return machine_code(emit, 3)


@functools.cache
def scale_in_place(*, fetches: bool) -> Callable[..., None]:
    """Return a loop that multiplies float32 numbers at an address, for a number of steps."""

    def emit(b: Any, target: Any, steps: Any) -> None:
        with for_range(b, steps) as step:
            y = _at(b, target, step.index)
            if fetches:
                blocks.fetch_ahead(b, y, STEP_BYTES)
            values = blocks.load(b, y, "float32", STEP_BYTES // 4)
            factor = ir.Constant(values.type, [1.0000001] * values.type.count)
            blocks.store(b, b.fmul(values, factor), y)

    return machine_code(emit, 2)


@functools.cache
def fill() -> Callable[..., None]:
    """Return a loop that writes ones to an address, past the caches, for a number of steps."""

    def emit(b: Any, target: Any, steps: Any) -> None:
        ones = ir.Constant(ir.VectorType(ir.IntType(8), STEP_BYTES), [1] * STEP_BYTES)
        with for_range(b, steps) as step:
            blocks.store_past_caches(b, ones, _at(b, target, step.index))
        blocks.fence(b)

    return machine_code(emit, 2)


@functools.cache
def touch() -> Callable[..., None]:
    """Return a loop that writes single bytes: an address, how many, and how far apart."""

    def emit(b: Any, target: Any, count: Any, step_bytes: Any) -> None:
        one = ir.Constant(ir.VectorType(ir.IntType(8), 1), [1])
        with for_range(b, count) as step:
            blocks.store(b, one, b.add(target, b.mul(step.index, step_bytes)))

    return machine_code(emit, 3)


def _at(b: Any, target: Any, step: Any) -> Any:
    return b.add(target, b.mul(step, ir.Constant(target.type, STEP_BYTES)))
