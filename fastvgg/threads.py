"""Work shared between threads: each takes the next piece when it is done with one."""

from __future__ import annotations

import contextlib
import functools
import itertools
import operator
import os
import threading
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Self, TypeVar

from fastvgg.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from concurrent.futures import Future

__all__ = ["Lot", "Lots", "ThreadNumber", "check_threads", "usable_cores", "work_on_all"]

Piece = TypeVar("Piece")


def usable_cores() -> int:
    """Return how many cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def check_threads(threads: int | None) -> int:
    """Return how many threads to use: all usable cores if None.

    Raises
    ------
    UsageError
        If that is not a whole number, or less than 1.
    """
    if threads is None:
        return usable_cores()
    if isinstance(threads, bool) or not hasattr(threads, "__index__") or threads < 1:
        raise UsageError(f"threads is {threads!r}", "give a whole number, at least 1")
    return operator.index(threads)


def work_on_all(pieces: Sequence[Piece], work_on: Callable[[Piece], object], threads: int) -> None:
    """Work on every piece once, on this thread and up to `threads` - 1 others.

    An error in any of them ends the work and is raised here. Many threads may call at once, and a
    forked child too.
    """
    if threads == 1 or len(pieces) == 1:
        for piece in pieces:
            work_on(piece)
        return
    remaining = deque(pieces)
    helpers: list[Future[None]] = []
    # No thread can be started while the interpreter shuts down, nor beyond the system's limit.
    with contextlib.suppress(RuntimeError):
        helpers.extend(
            _pool().submit(_drain, remaining, work_on) for _ in range(min(threads, len(pieces)) - 1)
        )
    try:
        _drain(remaining, work_on)
    finally:
        for helper in helpers:
            if not helper.cancel():  # it may never have started: the pool is shared
                helper.result()


def _drain(remaining: deque[Piece], work_on: Callable[[Piece], object]) -> None:
    while remaining:
        try:
            piece = remaining.popleft()
        except IndexError:  # another thread took the last one
            return
        try:
            work_on(piece)
        except BaseException:
            remaining.clear()
            raise


class ThreadNumber:
    """A number for each thread that asks, counted from 0; the same one when it asks again.

    >>> number = ThreadNumber()
    >>> number(), number()
    (0, 0)
    """

    def __init__(self) -> None:
        self._taken = itertools.count()
        self._own = threading.local()

    def __call__(self) -> int:
        """Return the number of the thread that calls."""
        try:
            number: int = self._own.number
        except AttributeError:
            number = self._own.number = next(self._taken)
        return number


class Lot:
    """Pieces of work that are under way."""

    def __init__(self, remaining: deque[Any], workers: list[Future[None]]) -> None:
        self._remaining = remaining
        self._workers = workers

    def wait(self) -> None:
        """Wait until all pieces are done, or raise the error that ended them."""
        for worker in self._workers:
            worker.result()

    def is_done(self) -> bool:
        """Whether no piece is under way any more."""
        return all(worker.done() for worker in self._workers)

    def abandon(self) -> None:
        """Begin no more pieces."""
        self._remaining.clear()


class Lots:
    """Threads that work on one lot of pieces after another.

    No thread waits for the slowest piece of a lot: when none is left to begin, it goes on with the
    next lot. Leaving the block ends the work after the pieces that are under way.

    Parameters
    ----------
    threads
        How many there are.

    Examples
    --------
    >>> doubled = {}
    >>> with Lots(2) as lots:
    ...     first = lots.begin(range(3), lambda piece: doubled.update({piece: 2 * piece}))
    ...     second = lots.begin([3, 4], lambda piece: doubled.update({piece: 2 * piece}))
    ...     first.wait()
    ...     second.wait()
    >>> sorted(doubled.items())
    [(0, 0), (1, 2), (2, 4), (3, 6), (4, 8)]
    """

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="fastvgg-lots")
        self._lots: list[Lot] = []

    def __enter__(self) -> Self:
        return self

    def begin(self, pieces: Iterable[Piece], work_on: Callable[[Piece], object]) -> Lot:
        """Have all pieces worked on, after those of earlier lots."""
        remaining = deque(pieces)
        workers = min(self._threads, len(remaining))
        lot = Lot(
            remaining, [self._pool.submit(_drain, remaining, work_on) for _ in range(workers)]
        )
        self._lots = [*(lot for lot in self._lots if not lot.is_done()), lot]
        return lot

    def __exit__(self, *_error: object) -> None:
        for lot in self._lots:
            lot.abandon()
        self._pool.shutdown(cancel_futures=True)


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max_workers=max(32, usable_cores()), thread_name_prefix="fastvgg")


if hasattr(os, "register_at_fork"):  # a forked child has none of its parent's threads
    os.register_at_fork(after_in_child=_pool.cache_clear)
