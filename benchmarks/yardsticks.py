"""What the memory allows: the same bytes moved with no arithmetic.

Yardsticks are measured in the process, on the pages and with the threads of what they judge, in
turn with it.
"""

from __future__ import annotations

import functools
import mmap

import numpy as np
from llvmlite import ir

from fastvgg.kernels import blocks
from fastvgg.kernels.compile import block, loop
from fastvgg.threads import work_on_all

STEP_BYTES = 192  # written at a time: three cache lines, sixteen pixels of float32
PIECES_PER_THREAD = 4
HUGE_PAGE_BYTES = 2 * 1024 * 1024


@functools.cache
def streaming_copy(read_bytes, written_bytes, *, fetches):
    """Return a loop that reads and writes so many bytes a pixel, past the caches.

    Every byte is read: where more is read than written the parts are laid over one another, where
    less is, what was read is repeated. Whether it pays to ask for memory ahead depends on the ratio
    of the two: the faster of both is the limit.
    """
    taken = STEP_BYTES * read_bytes // written_bytes
    parts = max(1, taken // STEP_BYTES)

    def emit(b, source, target, _1, _2, _3):
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

    step, done = block(emit), block(lambda b, *_: blocks.fence(b))

    @loop
    def copy(source, target, steps):
        for _ in range(steps):
            step(source, target, 0, 0, 0)
            source += taken
            target += STEP_BYTES
        done(0, 0, 0, 0, 0)

    return copy


@functools.cache
def scale_in_place(*, fetches):
    """Return a loop that multiplies float32 numbers where they are."""

    def emit(b, target, _1, _2, _3, _4):
        if fetches:
            blocks.fetch_ahead(b, target, STEP_BYTES)
        values = blocks.load(b, target, "float32", STEP_BYTES // 4)
        factor = ir.Constant(values.type, [1.0000001] * values.type.count)
        blocks.store(b, b.fmul(values, factor), target)

    step = block(emit)

    @loop
    def scale(target, steps):
        for _ in range(steps):
            step(target, 0, 0, 0, 0)
            target += STEP_BYTES

    return scale


def on_threads(steps, threads, work_on):
    """Call ``work_on(first, count)`` for pieces of so many steps, on so many threads."""
    size = -(-steps // (threads * PIECES_PER_THREAD))
    pieces = [(first, min(size, steps - first)) for first in range(0, steps, size)]
    work_on_all(pieces, lambda piece: work_on(*piece), threads)


def copy_on_threads(x, out, threads, *, fetches):
    """Move the bytes of one array into another, with no arithmetic."""
    pixels = x.size // 3
    copy = streaming_copy(x.nbytes // pixels, out.nbytes // pixels, fetches=fetches)
    source, target = x.ctypes.data, out.ctypes.data
    lead = -target % blocks.LINE_BYTES
    steps = (out.nbytes - lead) // STEP_BYTES
    taken = STEP_BYTES * x.nbytes // out.nbytes

    def work_on(first, count):
        copy(source + first * taken, target + lead + first * STEP_BYTES, count)

    on_threads(steps, threads, work_on)


def scale_on_threads(y, threads, *, fetches):
    """Multiply an array of float32 numbers in place."""
    scale = scale_in_place(fetches=fetches)
    target = y.ctypes.data

    def work_on(first, count):
        scale(target + first * STEP_BYTES, count)

    on_threads(y.nbytes // STEP_BYTES, threads, work_on)


@functools.cache
def touch():
    """Return a loop that writes one byte of every so many."""

    def emit(b, target, _1, _2, _3, _4):
        blocks.store(b, ir.Constant(ir.VectorType(ir.IntType(8), 1), [1]), target)

    step = block(emit)

    @loop
    def touched(target, count, step_bytes):
        for _ in range(count):
            step(target, 0, 0, 0, 0)
            target += step_bytes

    return touched


def zeroed_by_the_system(size, threads, *, huge=True):
    """Ask for new memory, have every page of it zeroed, and give it back."""
    memory = mmap.mmap(-1, size + HUGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE if huge else mmap.MADV_NOHUGEPAGE)
    page = HUGE_PAGE_BYTES if huge else mmap.PAGESIZE
    array = np.frombuffer(memory, np.uint8)
    start = array.ctypes.data + -array.ctypes.data % HUGE_PAGE_BYTES
    loop_over = touch()
    on_threads(
        -(-size // page), threads, lambda first, count: loop_over(start + first * page, count, page)
    )
    del array
    memory.close()
