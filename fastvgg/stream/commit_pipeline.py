"""Write a chunk and commit the one before it, while the next is read and computed."""

from __future__ import annotations

import concurrent.futures
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from fastvgg.parallel import try_submit

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

Step = TypeVar("Step")
Result = TypeVar("Result")


class CommitPipeline(Generic[Result]):
    """A two-stage pipeline: a writer thread, then a committer thread.

    Copying bytes to the kernel and waiting for the disk (fsync) overlap.

    After an error, no later item is started. Leaving the ``with`` block finishes the items that
    were submitted before the error, which saves recomputing them; an interruption waits only for
    the calls in progress. No call is in progress afterwards, so that files can be closed safely.

    Examples
    --------
    >>> with CommitPipeline() as pipeline:
    ...     pipeline.submit(lambda: print("written"), lambda: "committed")
    ...     print(*pipeline.drain(max_pending=0))
    written
    committed
    """

    def __init__(self) -> None:
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="fastvgg-writer")
        self._committer = ThreadPoolExecutor(1, thread_name_prefix="fastvgg-committer")
        self._writing, self._committing = Lock(), Lock()
        self._written: Future[None] | None = None
        self._committed: Future[Result] | None = None
        self._pending: deque[Future[Result]] = deque()
        self._error: BaseException | None = None
        self._is_closed = False

    def __enter__(self) -> CommitPipeline[Result]:
        return self

    def submit(self, write: Callable[[], None], commit: Callable[[], Result]) -> None:
        """Queue an item to be written and then committed, in submission order.

        Blocks until the previous item is written; raises the error of an earlier item.
        """
        if self._written is not None:
            concurrent.futures.wait([self._written])
        if self._error is not None:
            raise self._error
        self._written = _submit(self._writer, self._run_step, self._writing, write)
        after = self._written, self._committed
        self._committed = _submit(
            self._committer, self._run_step, self._committing, commit, after=after
        )
        self._pending.append(self._committed)

    def _run_step(
        self, busy: Lock, step: Callable[[], Step], after: Iterable[Future[Any] | None] = ()
    ) -> Step:
        """Run a step after its predecessors, unless one of them failed."""
        for earlier in after:
            if earlier is not None:
                earlier.result()
        with busy:
            if self._is_closed:
                raise concurrent.futures.CancelledError
            try:
                return step()
            except BaseException as error:
                self._error = self._error or error
                raise

    def drain(self, max_pending: int) -> Iterator[Result]:
        """Yield results of commits until at most `max_pending` items are left; raise their errors.

        The iterator is lazy: each step waits for one commit.
        """
        while len(self._pending) > max_pending:
            yield self._pending.popleft().result()

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        finish_pending = error is None or isinstance(error, Exception)
        interruption = None
        while True:
            # Joining the threads is not enough: up to Python 3.12, an interrupted join marks its
            # thread as ended (https://github.com/python/cpython/issues/90882).
            try:
                if finish_pending and interruption is None:
                    concurrent.futures.wait(self._pending)
                self._is_closed = True
                with self._writing, self._committing:
                    break
            except BaseException as raised:  # noqa: BLE001  # deferred until both threads are idle
                interruption = raised
        self._writer.shutdown(cancel_futures=True)
        self._committer.shutdown(cancel_futures=True)
        if interruption is not None:
            raise interruption
        if isinstance(error, Exception) and self._error not in (None, error):
            raise self._error  # the first error, not one that it caused


def _submit(
    pool: ThreadPoolExecutor, fn: Callable[..., Step], *arguments: Any, **options: Any
) -> Future[Step]:
    """Call `fn` on the thread of a pool, or on this one if the system allows no other."""
    future = try_submit(pool, fn, *arguments, **options)
    if future is None:
        future = Future()
        try:
            future.set_result(fn(*arguments, **options))
        except BaseException as error:  # noqa: BLE001  # raised by `future.result`
            future.set_exception(error)
    return future
