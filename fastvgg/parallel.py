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

__all__ = [
    "TaskGroup",
    "TaskQueue",
    "ThreadSlot",
    "available_cpus",
    "check_threads",
    "parallel_for",
]

Item = TypeVar("Item")


def available_cpus() -> int:
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
        return available_cpus()
    if isinstance(threads, bool) or not hasattr(threads, "__index__") or threads < 1:
        raise UsageError(f"threads is {threads!r}", "give a whole number, at least 1")
    return operator.index(threads)


def parallel_for(items: Sequence[Item], fn: Callable[[Item], object], threads: int) -> None:
    """Work on every piece once, on this thread and up to `threads` - 1 others.

    An error in any of them ends the work and is raised here. Many threads may call at once, and a
    forked child too.
    """
    if threads == 1 or len(items) == 1:
        for item in items:
            fn(item)
        return
    remaining = deque(items)
    helpers: list[Future[None]] = []
    # No thread can be started while the interpreter shuts down, nor beyond the system's limit.
    with contextlib.suppress(RuntimeError):
        helpers.extend(
            _pool().submit(_drain, remaining, fn) for _ in range(min(threads, len(items)) - 1)
        )
    try:
        _drain(remaining, fn)
    finally:
        for helper in helpers:
            if not helper.cancel():  # it may never have started: the pool is shared
                helper.result()


def _drain(remaining: deque[Item], fn: Callable[[Item], object]) -> None:
    while remaining:
        try:
            item = remaining.popleft()
        except IndexError:  # another thread took the last one
            return
        try:
            fn(item)
        except BaseException:
            remaining.clear()
            raise


class ThreadSlot:
    """A number for each thread that asks, counted from 0; the same one when it asks again.

    >>> number = ThreadSlot()
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


class TaskGroup:
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

    def cancel(self) -> None:
        """Begin no more pieces."""
        self._remaining.clear()


class TaskQueue:
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
    >>> with TaskQueue(2) as lots:
    ...     first = lots.submit(range(3), lambda item: doubled.update({item: 2 * item}))
    ...     second = lots.submit([3, 4], lambda item: doubled.update({item: 2 * item}))
    ...     first.wait()
    ...     second.wait()
    >>> sorted(doubled.items())
    [(0, 0), (1, 2), (2, 4), (3, 6), (4, 8)]
    """

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="fastvgg-tasks")
        self._groups: list[TaskGroup] = []

    def __enter__(self) -> Self:
        return self

    def submit(self, items: Iterable[Item], fn: Callable[[Item], object]) -> TaskGroup:
        """Have all pieces worked on, after those of earlier lots."""
        remaining = deque(items)
        workers = min(self._threads, len(remaining))
        group = TaskGroup(
            remaining, [self._pool.submit(_drain, remaining, fn) for _ in range(workers)]
        )
        self._groups = [*(group for group in self._groups if not group.is_done()), group]
        return group

    def __exit__(self, *_error: object) -> None:
        for group in self._groups:
            group.cancel()
        self._pool.shutdown(cancel_futures=True)


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max_workers=max(32, available_cpus()), thread_name_prefix="fastvgg")


if hasattr(os, "register_at_fork"):  # a forked child has none of its parent's threads
    os.register_at_fork(after_in_child=_pool.cache_clear)
