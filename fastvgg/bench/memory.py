"""Memory bandwidth: the limit of a kernel that moves the same bytes on as many threads."""

from __future__ import annotations

import mmap
import statistics
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from fastvgg.bench.timing import time_interleaved
from fastvgg.fork_lock import fork_lock
from fastvgg.kernels import bandwidth
from fastvgg.kernels.bandwidth import STEP_BYTES
from fastvgg.parallel import parallel_for
from fastvgg.tiling import CACHE_LINE_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

TASKS_PER_THREAD: Final = 4
HUGE_PAGE_BYTES: Final = 2 * 1024 * 1024


class Arena:
    """Memory that all paths reuse, because page-faulting fresh memory is slower than any kernel."""

    def __init__(self, nbytes: int) -> None:
        self._bytes = np.ones(nbytes + 2 * mmap.PAGESIZE, np.uint8)
        self._start = -self._bytes.ctypes.data % mmap.PAGESIZE

    @property
    def nbytes(self) -> int:
        """The size that a batch and its result may have together."""
        return len(self._bytes) - 2 * mmap.PAGESIZE

    def pair(
        self, images: int, one: NDArray[Any], result: NDArray[Any]
    ) -> tuple[NDArray[Any], NDArray[Any]]:
        """Return a batch that repeats one image, and an array for as many results."""
        x = self._batch(0, images, one)
        out = self._batch(-(-x.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE, images, result)
        x[:] = one
        return x, out

    def _batch(self, offset: int, images: int, one: NDArray[Any]) -> NDArray[Any]:
        start = self._start + offset
        data = self._bytes[start : start + images * one.nbytes]
        return data.view(one.dtype).reshape(images, *one.shape)


def measure_bandwidth(arena: Arena, rounds: int, threads: int) -> list[dict[str, Any]]:
    """Return the GB/s, read and written, of copy, scale, fill and first touch."""
    pixel = np.ones(3, np.float32)
    x, out = arena.pair(arena.nbytes // (2 * pixel.nbytes), pixel, pixel)
    size = out.nbytes
    loops: tuple[tuple[str, int, Callable[[], None]], ...] = (
        ("copy", 2 * size, partial(copy, x, out, threads, prefetch=False)),
        ("copy, prefetched", 2 * size, partial(copy, x, out, threads, prefetch=True)),
        ("in place", 2 * size, partial(scale, out, threads, prefetch=False)),
        ("in place, prefetched", 2 * size, partial(scale, out, threads, prefetch=True)),
        ("fill", size, partial(fill, out, threads)),
        ("first touch", size, partial(first_touch, size, threads)),
    )
    seconds = time_interleaved([call for _, _, call in loops], rounds)
    return [
        {"loop": name, "gigabytes_per_second": round(nbytes / statistics.median(each) / 1e9, 1)}
        for (name, nbytes, _), each in zip(loops, seconds, strict=True)
    ]


def copy(x: NDArray[Any], out: NDArray[Any], threads: int, *, prefetch: bool) -> None:
    """Copy a batch into another with non-temporal stores."""
    pixels = x.size // 3
    bytes_per_pixel = x.nbytes // pixels, out.nbytes // pixels
    with fork_lock:
        loop = bandwidth.streaming_copy(*bytes_per_pixel, has_prefetch=prefetch)
    target, steps = _cache_lines(out)
    source = x.ctypes.data, STEP_BYTES * x.nbytes // out.nbytes
    _run_steps(loop, steps, threads, source, (target, STEP_BYTES))


def scale(y: NDArray[Any], threads: int, *, prefetch: bool) -> None:
    """Multiply a batch of float32 in place."""
    with fork_lock:
        loop = bandwidth.scale_in_place(has_prefetch=prefetch)
    factors = np.full(CACHE_LINE_BYTES // 4, 1.0000001, np.float32)
    target, steps = y.ctypes.data, y.nbytes // STEP_BYTES
    _run_steps(loop, steps, threads, (target, STEP_BYTES), (factors.ctypes.data, 0))


def fill(out: NDArray[Any], threads: int) -> None:
    """Fill a batch with non-temporal stores."""
    _fill(*_cache_lines(out), STEP_BYTES, threads)


def first_touch(nbytes: int, threads: int) -> None:
    """Map fresh memory, touch every page, which the system then zeroes, and unmap it."""
    memory = mmap.mmap(-1, nbytes + HUGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):  # only Linux has it
        memory.madvise(mmap.MADV_HUGEPAGE)
    array = np.frombuffer(memory, np.uint8)
    start = array.ctypes.data + -array.ctypes.data % HUGE_PAGE_BYTES
    _fill(start, -(-nbytes // HUGE_PAGE_BYTES), HUGE_PAGE_BYTES, threads)
    del array
    memory.close()


def _cache_lines(out: NDArray[Any]) -> tuple[int, int]:
    """Return the address of the first whole cache line of a batch, and the number of steps."""
    lead = -out.ctypes.data % CACHE_LINE_BYTES
    return out.ctypes.data + lead, (out.nbytes - lead) // STEP_BYTES


def _fill(target: int, steps: int, step_bytes: int, threads: int) -> None:
    line = np.ones(CACHE_LINE_BYTES, np.uint8)
    with fork_lock:
        loop = bandwidth.fill(step_bytes)
    _run_steps(loop, steps, threads, (line.ctypes.data, 0), (target, step_bytes))


def _run_steps(
    loop: Callable[..., None], steps: int, threads: int, *operands: tuple[int, int]
) -> None:
    """Run a loop on consecutive ranges of steps, on several threads.

    An operand is an address, and the bytes from one step to the next.
    """
    size = -(-steps // (threads * TASKS_PER_THREAD))

    def run(first: int) -> None:
        addresses = [address + first * step_bytes for address, step_bytes in operands]
        loop(*addresses, min(size, steps - first))

    parallel_for(range(0, steps, size), run, threads)
