"""Memory-bandwidth probes (as in STREAM), the roofline against which kernels are compared."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Final

from fastvgg.kernels import memory
from fastvgg.kernels.jit import kernel
from fastvgg.kernels.memory import align_stack, prefetch_distance, store_fence
from fastvgg.tiling import CACHE_LINE_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable

LINES_PER_STEP: Final = 3
STEP_BYTES: Final = LINES_PER_STEP * CACHE_LINE_BYTES
"""The bytes that a step writes: sixteen float32 pixels."""


@functools.cache
def streaming_copy(
    read_bytes: int, written_bytes: int, *, has_prefetch: bool
) -> Callable[..., None]:
    """Return a loop that copies with a ratio of bytes read to bytes written; non-temporal stores.

    Its arguments are the addresses of source and target, and a number of steps. Every byte is read:
    excess bytes are combined, and missing bytes are repeated. Whether prefetching pays off depends
    on the ratio; the faster of the two loops is the limit.

    Copying one line at a time keeps the loads in order: three lines at a time took 8 to 13 % longer
    if more is read than written.
    """
    source_bytes = CACHE_LINE_BYTES * read_bytes // written_bytes
    prefetch = memory.prefetch(source_bytes, 1, prefetch_distance(read_bytes, written_bytes))
    load, store = memory.load_line(source_bytes), memory.store(nontemporal=True)

    @kernel(3)
    def copy(source, target, steps):
        align_stack()
        for _ in range(LINES_PER_STEP * steps):
            if has_prefetch:
                prefetch(source, 0)
            store(target, 0, load(source, 0))
            source += source_bytes
            target += CACHE_LINE_BYTES
        store_fence()

    return copy


@functools.cache
def scale_in_place(*, has_prefetch: bool) -> Callable[..., None]:
    """Return a loop that multiplies float32 values in place.

    Its arguments are the addresses of the values and of a cache line of factors, and a number of
    steps.
    """
    prefetch = memory.prefetch(STEP_BYTES, 1, prefetch_distance(1, 1))
    load = memory.load("float32", 16, LINES_PER_STEP)
    store = memory.store(nontemporal=False)

    @kernel(3)
    def scale(target, factors, steps):
        align_stack()
        factor = load(factors, 0)
        for _ in range(steps):
            if has_prefetch:
                prefetch(target, 0)
            store(target, CACHE_LINE_BYTES, load(target, CACHE_LINE_BYTES) * factor)
            target += STEP_BYTES

    return scale


@functools.cache
def fill(step_bytes: int = STEP_BYTES) -> Callable[..., None]:
    """Return a loop that fills memory with copies of a cache line, with non-temporal stores.

    Its arguments are the addresses of the line and of the target, and a number of steps. Of a
    step longer than `STEP_BYTES` only the beginning is filled, which is enough to map its page.
    """
    load = memory.load("uint8", CACHE_LINE_BYTES, LINES_PER_STEP)
    store = memory.store(nontemporal=True)

    @kernel(3)
    def fill_lines(line, target, steps):
        align_stack()
        lines = load(line, 0)
        for _ in range(steps):
            store(target, CACHE_LINE_BYTES, lines)
            target += step_bytes
        store_fence()

    return fill_lines
