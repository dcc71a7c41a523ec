"""One chunk of a run as a task of its own, for a process that knows nothing else of the run.

A task may be carried out twice, by two processes at once, and long after its run has ended: whoever
has tasks done elsewhere cannot prevent it. So a task writes nothing but its chunk, whose bytes are
the same whoever writes them, and only into what its own run began: the directory, or the file, is
opened first, the journal is read then, and what is opened stays that of this run whatever gets its
name later. Bytes that share a page with another chunk's are not written but returned, for one
process to write all of them.
"""

from __future__ import annotations

import pickle
import threading
import weakref
from collections import OrderedDict
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from fastvgg.datasets import open_target
from fastvgg.datasets.base import SharedTarget
from fastvgg.datasets.locations import located
from fastvgg.errors import StoppedError
from fastvgg.stream.compute import Stagings, Work, commit_of, compute
from fastvgg.stream.destination import destination_of
from fastvgg.stream.journal import journal_path, read_begun
from fastvgg.stream.manifest import checksum
from fastvgg.stream.prepare import reopen_source

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    from fastvgg.datasets.base import Edges
    from fastvgg.stream.journal import Commit
    from fastvgg.stream.plan import Plan

__all__ = ["Done", "Task", "join", "leave", "stored_checksum", "work_on"]

RUNS_KEPT: Final = 2  # that a process has tasks of


@dataclass(frozen=True)
class Task:
    """A chunk that is to be computed and written."""

    plan: bytes
    """Pickled, with a number that no other run has."""
    chunk: int
    start: int
    stop: int


@dataclass(frozen=True)
class Done:
    """A chunk that is durable, but for its edges."""

    commit: Commit
    images: int
    edges: Edges


def work_on(
    task: Task, writing: Callable[[int], AbstractContextManager[object]] = nullcontext
) -> Done:
    """Compute a chunk, write it, and make it durable.

    Parameters
    ----------
    task
        Which chunk of which run.
    writing
        Entered while the chunk is written, and told how many may be, for each thread, while
        another is computed: so many are within the plan's memory.

    Raises
    ------
    SourceError
        If the source cannot be read here, or is not the one that was planned.
    ResumeError, StoppedError
        If the run's unfinished target is not here, or no longer, or a system call fails.
    """
    return _joined(task.plan).work_on(task, writing)


def stored_checksum(task: Task) -> tuple[int, str | None]:
    """Return a chunk and the checksum of what is stored of it; see `Run.stored_checksums`."""
    stored = _joined(task.plan).target.read_unfinished(task.start, task.stop)
    return task.chunk, None if stored is None else checksum(stored)


class _Joined:
    """A run that this process takes part in."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._source = reopen_source(plan)
        weakref.finalize(self, self._source.close)
        self._destination = destination_of(plan)
        self._storage = self._destination.shared_storage(plan.durability)
        self._stagings: list[Stagings] = []
        self.target = self._opened()

    def _opened(self) -> SharedTarget:
        plan = self._plan
        target = open_target(
            located(plan.target),
            plan.result,
            self._storage,
            chunk_images=plan.chunk_images,
            transform=plan.transform,
        )
        if not isinstance(target, SharedTarget):
            raise TypeError(f"{target.kind} is not written by tasks")
        target.join()
        weakref.finalize(self, target.close)
        self._refuse_other_run()
        return target

    def _refuse_other_run(self) -> None:
        """Refuse to write what is not, or no longer, this run's."""
        path = journal_path(self._destination.path)
        begun = read_begun(path)
        mine = self._plan.job(), self._plan.chunk_images
        if begun is None or (begun.job, begun.chunk_images) != mine:
            raise StoppedError(
                f"{path} is {'not there' if begun is None else 'of another run'}",
                "run the same command again, where every worker can reach the target's directory",
            )

    def work_on(self, task: Task, writing: Callable[[int], AbstractContextManager[object]]) -> Done:
        work = [Work(task.chunk, task.start, task.stop)]
        with self._staging() as staging:
            (computed,) = compute(self._plan, self._source, self.target, work, staging)
            commit = commit_of(self._plan, self._source, computed)
            if self._destination.is_remote:  # nothing that is open there stays what it was
                self._refuse_other_run()
            with writing(self._plan.written_at_once):
                edges = self.target.write_own(task.start, computed.stored)
        return Done(commit, task.stop - task.start, edges)

    @contextmanager
    def _staging(self) -> Iterator[Stagings]:
        """Lend memory for a chunk, which is kept for the next."""
        try:
            staging = self._stagings.pop()
        except IndexError:
            staging = Stagings(self._plan, 1)
        yield staging
        self._stagings.append(staging)


_lock = threading.Lock()
_runs: OrderedDict[bytes, _Joined] = OrderedDict()


def _joined(plan: bytes) -> _Joined:
    with _lock:
        if plan not in _runs:
            _runs[plan] = _Joined(pickle.loads(plan)[1])  # noqa: S301  # from whom the task came
        _runs.move_to_end(plan)
        while len(_runs) > RUNS_KEPT:
            _runs.popitem(last=False)
        return _runs[plan]


def join(plan: bytes) -> None:
    """Open the files of a run, before its first task is done.

    Raises
    ------
    SourceError, ResumeError, StoppedError
        As for `work_on`.
    """
    _joined(plan)


def leave(plan: bytes) -> None:
    """Let go of the files and the memory of a run, once its last task is done."""
    with _lock:
        _runs.pop(plan, None)
