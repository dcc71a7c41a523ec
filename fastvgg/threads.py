"""Work shared between threads: each takes the next piece when it is done with one."""

from __future__ import annotations

import functools
import os
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

from fastvgg.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["check_threads", "usable_cores", "work_on_all"]

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
    if type(threads) is not int or threads < 1:
        raise UsageError(f"threads is {threads!r}", "give a whole number, at least 1")
    return threads


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

    def drain() -> None:
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

    helpers = [_pool().submit(drain) for _ in range(min(threads, len(pieces)) - 1)]
    try:
        drain()
    finally:
        for helper in helpers:
            if not helper.cancel():  # it may never have started: the pool is shared
                helper.result()


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max_workers=max(32, usable_cores()), thread_name_prefix="fastvgg")


if hasattr(os, "register_at_fork"):  # a forked child has none of its parent's threads
    os.register_at_fork(after_in_child=_pool.cache_clear)
