"""Some chunks of a run as a task, for a process that knows nothing else of the run.

A task may be carried out twice, by two processes at once, and long after its run has ended: whoever
has tasks done elsewhere cannot prevent it. So a task writes nothing but its chunks, whose bytes are
the same whoever writes them, and only into what its own run began: the directory, or the file, is
opened first, the journal is read then, and what is opened stays that of this run whatever gets its
name later. Bytes that share a page with another chunk's are not written but returned, for one
process to write all of them.
"""

from __future__ import annotations

import contextlib
import pickle
import threading
import weakref
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from fastvgg.datasets import open_target
from fastvgg.datasets.base import SharedTarget
from fastvgg.datasets.locations import located
from fastvgg.errors import StoppedError
from fastvgg.stream.behind import Behind
from fastvgg.stream.compute import Stagings, commit_of, compute
from fastvgg.stream.destination import destination_of
from fastvgg.stream.journal import journal_path, read_begun
from fastvgg.stream.manifest import checksum
from fastvgg.stream.prepare import reopen_source

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from fastvgg.datasets.base import Edges, Source
    from fastvgg.stream.compute import Computed, Work
    from fastvgg.stream.destination import Destination
    from fastvgg.stream.journal import Commit
    from fastvgg.stream.plan import Plan

__all__ = ["Done", "Task", "join", "leave", "stored_checksums", "work_on"]

RUNS_KEPT: Final = 2  # that a process has tasks of


@dataclass(frozen=True)
class Task:
    """Some chunks that are to be computed and written, one behind the other."""

    plan: bytes
    """Pickled, with a number that no other run has."""
    work: tuple[Work, ...]


@dataclass(frozen=True)
class Done:
    """A chunk that is durable, but for its edges."""

    commit: Commit
    images: int
    edges: Edges


def work_on(task: Task) -> list[Done]:
    """Compute chunks, write them, and make them durable.

    Raises
    ------
    SourceError
        If the source cannot be read here, or is not the one that was planned.
    ResumeError, StoppedError
        If the run's unfinished target is not here, or no longer, or a system call fails.
    """
    with _joined(task.plan).lane() as lane:
        return lane.work_on(task.work)


def stored_checksums(task: Task) -> list[tuple[int, str | None]]:
    """Return chunks and the checksums of what is stored of them; see `Run.stored_checksums`."""
    with _joined(task.plan).lane() as lane:
        return [(part.chunk, lane.stored_checksum(part)) for part in task.work]


class _Lane:
    """What one task at a time computes and writes with: memory, threads, and a target."""

    def __init__(self, plan: Plan, source: Source, destination: Destination) -> None:
        self._plan = plan
        self._source = source
        self._destination = destination
        self._target = self._opened()
        self._stagings = Stagings.of(plan, source)
        self._behind = Behind[Done]()

    def _opened(self) -> SharedTarget:
        plan = self._plan
        target = open_target(
            located(plan.target),
            plan.result,
            self._destination.shared_storage(plan.durability),
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

    def work_on(self, work: Iterable[Work]) -> list[Done]:
        """Have each chunk written while the next is computed, as a run in one process does."""
        dones: list[Done] = []
        chunks = compute(self._plan, self._source, self._target, work, self._stagings)
        with contextlib.closing(chunks):
            for computed in chunks:
                dones += self._behind.wait_for_all_but(2)
                self._give(computed, commit_of(self._plan, self._source, computed))
        dones += self._behind.wait_for_all_but(0)
        return dones

    def _give(self, computed: Computed, commit: Commit) -> None:
        edges: Edges = []

        def write() -> None:
            if self._destination.is_remote:  # nothing that is open there stays what it was
                self._refuse_other_run()
            edges.extend(self._target.write_own(computed.start, computed.stored))

        def make_durable() -> Done:
            self._target.sync()
            return Done(commit, computed.stop - computed.start, edges)

        self._behind.give(write, make_durable)

    def stored_checksum(self, part: Work) -> str | None:
        """Return the checksum of what is stored of a chunk."""
        stored = self._target.read_unfinished(part.start, part.stop)
        return None if stored is None else checksum(stored)

    def finish(self) -> None:
        """Finish what was given before something failed."""
        with self._behind:
            pass


class _Joined:
    """A run that this process takes part in."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._source = reopen_source(plan)
        weakref.finalize(self, self._source.close)
        self._lanes = [self._new()]

    def _new(self) -> _Lane:
        return _Lane(self._plan, self._source, destination_of(self._plan))

    @contextlib.contextmanager
    def lane(self) -> Iterator[_Lane]:
        """Lend a lane; one in which something failed is not used again."""
        try:
            lane = self._lanes.pop()
        except IndexError:
            lane = self._new()
        try:
            yield lane
        except BaseException:
            lane.finish()
            raise
        self._lanes.append(lane)


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
