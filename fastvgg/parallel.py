"""Dynamic work sharing: idle threads pull the next item from a queue."""

from __future__ import annotations

import functools
import itertools
import operator
import os
import threading
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Self, TypeVar

from fastvgg.errors import UsageError, option

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

Item = TypeVar("Item")
Result = TypeVar("Result")


def available_cpus() -> int:
    """Return the number of CPUs that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def check_threads(threads: int | None) -> int:
    """Check that `threads` is an integer of at least 1; None stands for all available CPUs."""
    if threads is None:
        return available_cpus()
    if isinstance(threads, bool) or not hasattr(threads, "__index__") or threads < 1:
        raise UsageError(f"invalid {option('threads', threads)}", "give an integer of at least 1")
    return operator.index(threads)


def parallel_for(items: Sequence[Item], fn: Callable[[Item], object], threads: int) -> None:
    """Call `fn` once for every item, on the calling thread and up to `threads` - 1 workers.

    The first exception cancels the items that have not started and is raised here. Safe to call
    from many threads at once, from within `fn`, and in a forked child.
    """
    if threads == 1 or len(items) == 1:
        for item in items:
            fn(item)
        return
    remaining = deque(items)
    workers = _start_workers(_pool(), min(threads, len(items)) - 1, remaining, fn)
    try:
        _worker(remaining, fn)
    finally:
        for worker in workers:
            if not worker.cancel():  # in the shared pool it may not have started
                worker.result()


def try_submit(
    pool: ThreadPoolExecutor, fn: Callable[..., Result], *arguments: Any, **options: Any
) -> Future[Result] | None:
    """Call `fn` on a thread of a pool; return None if the system allows no thread to start.

    That happens at a limit of the user or the container, and during interpreter shutdown. The pool
    has already queued the call then: it is cancelled, so that no other thread makes it later,
    unless one has just begun to.
    """
    future: Future[Result] = Future()

    def call() -> None:
        if not future.set_running_or_notify_cancel():
            return
        try:
            future.set_result(fn(*arguments, **options))
        except BaseException as error:  # noqa: BLE001  # raised by `future.result`
            future.set_exception(error)

    try:
        queued = pool.submit(call)
    except RuntimeError:
        return None if future.cancel() else future
    # A pool that shuts down cancels the calls that it has not made: others wait for this future.
    queued.add_done_callback(lambda done: done.cancelled() and future.cancel())
    return future


def _start_workers(
    pool: ThreadPoolExecutor, count: int, remaining: deque[Item], fn: Callable[[Item], object]
) -> list[Future[None]]:
    """Have up to `count` threads of a pool work through a queue; fewer if no more can start."""
    workers: list[Future[None]] = []
    while len(workers) < count and (worker := try_submit(pool, _worker, remaining, fn)) is not None:
        workers.append(worker)
    return workers


def _worker(remaining: deque[Item], fn: Callable[[Item], object]) -> None:
    """Call `fn` for items of a shared queue until it is empty; on an exception empty it."""
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
    """Number the threads that call it from 0 to `threads` - 1; each thread keeps its number.

    More threads would share memory, or use memory that they do not have: RuntimeError.

    >>> slot = ThreadSlot(2)
    >>> slot(), slot()
    (0, 0)
    """

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._counter = itertools.count()
        self._local = threading.local()

    def __call__(self) -> int:
        """Return the number of the calling thread."""
        try:
            number: int = self._local.number
        except AttributeError:
            number = next(self._counter)
            if number >= self._threads:
                raise RuntimeError(f"more than {self._threads} threads") from None
            self._local.number = number
        return number


class TaskGroup:
    """The items of one `TaskQueue.submit` call."""

    def __init__(
        self, remaining: deque[Any], fn: Callable[[Any], object], workers: list[Future[None]]
    ) -> None:
        self._remaining = remaining
        self._workers = workers
        # Only without workers: what a function refers to, such as a chunk, should not outlive it.
        self._work = None if workers else functools.partial(_worker, remaining, fn)

    def wait(self) -> None:
        """Wait until all items are done; raise the first exception of a worker.

        Without workers, the calling thread does the work.
        """
        if self._work is not None:
            self._work()
            self._work = None
        for worker in self._workers:
            worker.result()

    def is_done(self) -> bool:
        """Return whether all workers of the group have finished."""
        is_waiting = not self._workers and bool(self._remaining)
        return not is_waiting and all(worker.done() for worker in self._workers)

    def cancel(self) -> None:
        """Drop the items that have not started."""
        self._remaining.clear()


class TaskQueue:
    """A thread pool that works through groups of items in the order of their submission.

    Threads do not wait at group boundaries; an idle thread starts on the next group. Exiting the
    context cancels the items that have not started and waits for those that have.

    >>> doubled = {}
    >>> with TaskQueue(2) as tasks:
    ...     first = tasks.submit(range(3), lambda item: doubled.update({item: 2 * item}))
    ...     second = tasks.submit([3, 4], lambda item: doubled.update({item: 2 * item}))
    ...     first.wait()
    ...     second.wait()
    >>> sorted(doubled.items())
    [(0, 0), (1, 2), (2, 4), (3, 6), (4, 8)]
    """

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="fastvgg-tasks")
        self._groups: list[TaskGroup] = []
        self._is_closed = False

    def __enter__(self) -> Self:
        return self

    def submit(self, items: Iterable[Item], fn: Callable[[Item], object]) -> TaskGroup:
        """Call `fn` once for every item, after the items of earlier groups have started."""
        if self._is_closed:
            raise RuntimeError("the task queue is closed")
        remaining = deque(items)
        count = min(self._threads, len(remaining))
        group = TaskGroup(remaining, fn, _start_workers(self._pool, count, remaining, fn))
        self._groups = [*(group for group in self._groups if not group.is_done()), group]
        return group

    def __exit__(self, *_error: object) -> None:
        self._is_closed = True
        for group in self._groups:
            group.cancel()
        self._pool.shutdown(cancel_futures=True)


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max_workers=max(32, available_cpus()), thread_name_prefix="fastvgg")


if hasattr(os, "register_at_fork"):  # a forked child does not inherit the pool's threads
    os.register_at_fork(after_in_child=_pool.cache_clear)
