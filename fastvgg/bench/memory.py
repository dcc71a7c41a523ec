"""What the memory allows: the same bytes moved by as many threads, with no arithmetic."""

from __future__ import annotations

import mmap
import statistics
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from fastvgg.bench.timing import time_interleaved
from fastvgg.kernels import bandwidth
from fastvgg.kernels.memory import CACHE_LINE_BYTES
from fastvgg.parallel import parallel_for

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

__all__ = ["Arena", "copy", "fill", "measured", "scale", "zeroed_by_the_system"]

PAGE_BYTES: Final = 4096
PIECES_PER_THREAD: Final = 4
HUGE_PAGE_BYTES: Final = 2 * 1024 * 1024


class Arena:
    """Memory that all paths use again: new memory is slower than any kernel."""

    def __init__(self, nbytes: int) -> None:
        self._bytes = np.ones(nbytes + 2 * PAGE_BYTES, np.uint8)
        self._start = -self._bytes.ctypes.data % PAGE_BYTES

    @property
    def nbytes(self) -> int:
        """What a batch and its result may take together."""
        return len(self._bytes) - 2 * PAGE_BYTES

    def pair(
        self, images: int, one: NDArray[Any], result: NDArray[Any]
    ) -> tuple[NDArray[Any], NDArray[Any]]:
        """Return a batch of one image again and again, and room for as many results."""
        x = self._batch(0, images, one)
        out = self._batch(-(-x.nbytes // PAGE_BYTES) * PAGE_BYTES, images, result)
        x[:] = one
        return x, out

    def _batch(self, offset: int, images: int, one: NDArray[Any]) -> NDArray[Any]:
        start = self._start + offset
        taken = self._bytes[start : start + images * one.nbytes]
        return taken.view(one.dtype).reshape(images, *one.shape)


def measured(arena: Arena, rounds: int, threads: int) -> list[dict[str, Any]]:
    """Return the gigabytes a second, read and written, of the plainest loops there are."""
    pixel = np.ones(3, np.float32)
    x, out = arena.pair(arena.nbytes // (2 * pixel.nbytes), pixel, pixel)
    size = out.nbytes
    loops: tuple[tuple[str, int, Callable[[], None]], ...] = (
        ("copy", 2 * size, partial(copy, x, out, threads, fetches=False)),
        ("copy, memory asked for ahead", 2 * size, partial(copy, x, out, threads, fetches=True)),
        ("in place", 2 * size, partial(scale, out, threads, fetches=False)),
        ("in place, asked for ahead", 2 * size, partial(scale, out, threads, fetches=True)),
        ("fill", size, partial(fill, out, threads)),
        ("fill memory that is new", size, partial(zeroed_by_the_system, size, threads)),
    )
    taken = time_interleaved([call for _, _, call in loops], rounds)
    return [
        {"loop": name, "gigabytes_per_second": round(nbytes / statistics.median(each) / 1e9, 1)}
        for (name, nbytes, _), each in zip(loops, taken, strict=True)
    ]


def copy(x: NDArray[Any], out: NDArray[Any], threads: int, *, fetches: bool) -> None:
    """Move the bytes of a batch into those of another, past the caches."""
    pixels = x.size // 3
    loop = bandwidth.streaming_copy(x.nbytes // pixels, out.nbytes // pixels, prefetches=fetches)
    source, (target, steps) = x.ctypes.data, _whole_lines(out)
    taken = bandwidth.STEP_BYTES * x.nbytes // out.nbytes

    def work_on(first: int, count: int) -> None:
        loop(source + first * taken, target + first * bandwidth.STEP_BYTES, count)

    _on_threads(steps, threads, work_on)


def scale(y: NDArray[Any], threads: int, *, fetches: bool) -> None:
    """Multiply a batch of float32 numbers where it is."""
    loop, target = bandwidth.scale_in_place(prefetches=fetches), y.ctypes.data
    factors = np.full(CACHE_LINE_BYTES // 4, 1.0000001, np.float32)

    def work_on(first: int, count: int) -> None:
        loop(target + first * bandwidth.STEP_BYTES, factors.ctypes.data, count)

    _on_threads(y.nbytes // bandwidth.STEP_BYTES, threads, work_on)


def fill(out: NDArray[Any], threads: int) -> None:
    """Write a batch full, past the caches."""
    loop, (target, steps) = bandwidth.fill(), _whole_lines(out)
    line = np.ones(CACHE_LINE_BYTES, np.uint8)

    def work_on(first: int, count: int) -> None:
        loop(line.ctypes.data, target + first * bandwidth.STEP_BYTES, count)

    _on_threads(steps, threads, work_on)


def zeroed_by_the_system(nbytes: int, threads: int, *, huge: bool = True) -> None:
    """Ask for new memory, have every page of it zeroed, and give it back."""
    memory = mmap.mmap(-1, nbytes + HUGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):  # Linux alone
        memory.madvise(mmap.MADV_HUGEPAGE if huge else mmap.MADV_NOHUGEPAGE)
    page_bytes = HUGE_PAGE_BYTES if huge else mmap.PAGESIZE
    array = np.frombuffer(memory, np.uint8)
    start = array.ctypes.data + -array.ctypes.data % HUGE_PAGE_BYTES
    loop, byte = bandwidth.touch(), np.ones(1, np.uint8)

    def work_on(first: int, count: int) -> None:
        loop(byte.ctypes.data, start + first * page_bytes, count, page_bytes)

    _on_threads(-(-nbytes // page_bytes), threads, work_on)
    del array
    memory.close()


def _whole_lines(out: NDArray[Any]) -> tuple[int, int]:
    """Return where the first whole cache line of a batch is, and how many steps follow."""
    lead = -out.ctypes.data % CACHE_LINE_BYTES
    return out.ctypes.data + lead, (out.nbytes - lead) // bandwidth.STEP_BYTES


def _on_threads(steps: int, threads: int, work_on: Callable[[int, int], None]) -> None:
    """Call ``work_on(first, count)`` for pieces of so many steps, on so many threads."""
    size = -(-steps // (threads * PIECES_PER_THREAD))
    pieces = [(first, min(size, steps - first)) for first in range(0, steps, size)]
    parallel_for(pieces, lambda piece: work_on(*piece), threads)
