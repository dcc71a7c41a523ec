"""One chunk is written, and the one before it committed, while the next is read and computed."""

from __future__ import annotations

import concurrent.futures
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock
from typing import TYPE_CHECKING, Any, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from types import TracebackType

__all__ = ["CommitPipeline"]

Step = TypeVar("Step")
Result = TypeVar("Result")


class CommitPipeline(Generic[Result]):
    """Two threads: one writes, piece after piece, and the other commits what is written.

    Handing bytes to the system and waiting for the disk need nothing of each other.

    After an error nothing that was given later is begun. Leaving the block finishes what was given
    before the error, so that it need not be computed again; an interruption waits for what is under
    way alone. Nothing is under way afterwards, so that no file is closed under a thread that writes
    it.

    Examples
    --------
    >>> with CommitPipeline() as behind:
    ...     behind.submit(lambda: print("written"), lambda: "committed")
    ...     print(*behind.drain(0))
    written
    committed
    """

    def __init__(self) -> None:
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="fastvgg-writer")
        self._committer = ThreadPoolExecutor(1, thread_name_prefix="fastvgg-committer")
        self._writing, self._committing = Lock(), Lock()
        self._written: Future[None] | None = None
        self._committed: Future[Result] | None = None
        self._given: deque[Future[Result]] = deque()
        self._error: BaseException | None = None
        self._is_left = False

    def __enter__(self) -> CommitPipeline[Result]:
        return self

    def submit(self, write: Callable[[], None], commit: Callable[[], Result]) -> None:
        """Have a piece written, and then committed, after all that was given before.

        Returns when what was given before is written, or raises the error that kept it from that.
        """
        if self._written is not None:
            concurrent.futures.wait([self._written])
        if self._error is not None:
            raise self._error
        self._written = self._writer.submit(self._do, self._writing, write)
        self._committed = self._committer.submit(
            self._do, self._committing, commit, after=(self._written, self._committed)
        )
        self._given.append(self._committed)

    def _do(
        self, under_way: Lock, work: Callable[[], Step], after: Iterable[Future[Any] | None] = ()
    ) -> Step:
        """Do a piece of work, unless something that comes before it has failed."""
        for earlier in after:
            if earlier is not None:
                earlier.result()
        with under_way:
            if self._is_left:
                raise concurrent.futures.CancelledError
            try:
                return work()
            except BaseException as error:
                self._error = self._error or error
                raise

    def drain(self, count: int) -> Iterator[Result]:
        """Return what was committed, until no more than `count` pieces are left; or raise an error.

        As an iterator: nothing is waited for before its next is asked for.
        """
        while len(self._given) > count:
            yield self._given.popleft().result()

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        finishes = error is None or isinstance(error, Exception)
        interruption = None
        while True:
            # Joining the threads would not do: a join that is interrupted takes its thread for
            # ended, up to Python 3.12 (https://github.com/python/cpython/issues/90882).
            try:
                if finishes and interruption is None:
                    concurrent.futures.wait(self._given)
                self._is_left = True
                with self._writing, self._committing:
                    break
            except BaseException as signalled:  # noqa: BLE001  # not to go yet
                interruption = signalled
        self._writer.shutdown(cancel_futures=True)
        self._committer.shutdown(cancel_futures=True)
        if interruption is not None:
            raise interruption
        if isinstance(error, Exception) and self._error not in (None, error):
            raise self._error  # a disk that failed, and not what came of it or after it
