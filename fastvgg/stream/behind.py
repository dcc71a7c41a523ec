"""One chunk is written and committed while the next is read and computed."""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import TracebackType

__all__ = ["Behind"]

Result = TypeVar("Result")


class Behind(Generic[Result]):
    """A thread that does what it is given, one piece after another, in that order.

    After an error nothing that was given later is begun. Leaving the block waits for the piece
    under way, whatever happens, so that no file is closed under a thread that writes it.

    Examples
    --------
    >>> with Behind() as behind:
    ...     behind.give(lambda: "first")
    ...     behind.give(lambda: "second")
    ...     print(*behind.wait_for_all_but(0))
    first second
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="fastvgg-behind")
        self._given: deque[Future[Result]] = deque()
        self._at_work = Lock()
        self._ended = False  # by an error, or because the block is left

    def __enter__(self) -> Behind[Result]:
        return self

    def give(self, work: Callable[[], Result]) -> None:
        """Have something done after all that was given before."""
        self._given.append(self._thread.submit(self._do, work))

    def _do(self, work: Callable[[], Result]) -> Result:
        with self._at_work:
            if self._ended:
                raise RuntimeError("not begun: something that was given earlier has failed")
            try:
                return work()
            except BaseException:
                self._ended = True
                raise

    def wait_for_all_but(self, count: int) -> Iterator[Result]:
        """Return results in order, until no more than `count` pieces are left; or raise the error.

        As an iterator: nothing is waited for before its next is asked for.
        """
        while len(self._given) > count:
            yield self._given.popleft().result()

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        self._ended = True
        interruption = None
        while True:
            # Joining the thread would not do: a join that is interrupted takes it for ended, up to
            # Python 3.12 (https://github.com/python/cpython/issues/90882).
            try:
                with self._at_work:
                    break
            except BaseException as error:  # noqa: BLE001  # of a signal: not to go yet
                interruption = error
        self._thread.shutdown(cancel_futures=True)
        if interruption is not None:
            raise interruption
