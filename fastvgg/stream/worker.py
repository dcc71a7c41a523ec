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

from fastvgg.datasets.base import SharedTarget
from fastvgg.datasets.open import open_target
from fastvgg.errors import StoppedError
from fastvgg.storage.location import parse_location
from fastvgg.stream.commit_pipeline import CommitPipeline
from fastvgg.stream.compute import BufferRing, compute, make_commit
from fastvgg.stream.journal import journal_path, read_journal_header
from fastvgg.stream.manifest import checksum
from fastvgg.stream.planner import reopen_source
from fastvgg.stream.target import destination_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from fastvgg.datasets.base import PartialPages, Source
    from fastvgg.stream.compute import ChunkResult, ChunkTask
    from fastvgg.stream.journal import Commit
    from fastvgg.stream.plan import Plan
    from fastvgg.stream.target import Destination

__all__ = ["ChunkCommit", "Task", "close_run", "join", "run_task", "stored_checksums"]

RUNS_KEPT: Final = 2  # that a process has tasks of


@dataclass(frozen=True)
class Task:
    """Some chunks that are to be computed and written, one behind the other."""

    plan: bytes
    """Pickled, with a number that no other run has."""
    work: tuple[ChunkTask, ...]


@dataclass(frozen=True)
class ChunkCommit:
    """A chunk that is durable, but for its edges."""

    commit: Commit
    images: int
    edges: PartialPages


def run_task(task: Task) -> list[ChunkCommit]:
    """Compute chunks, write them, and make them durable.

    Raises
    ------
    SourceError
        If the source cannot be read here, or is not the one that was planned.
    ResumeError, StoppedError
        If the run's unfinished target is not here, or no longer, or a system call fails.
    """
    with _worker_run(task.plan).slot() as slot:
        return slot.run_task(task.work)


def stored_checksums(task: Task) -> list[tuple[int, str | None]]:
    """Return chunks and the checksums of what is stored of them; see `Run.stored_checksums`."""
    with _worker_run(task.plan).slot() as slot:
        return [(part.chunk, slot.stored_checksum(part)) for part in task.work]


class _WorkerSlot:
    """What one task at a time computes and writes with: memory, threads, and a target."""

    def __init__(self, plan: Plan, source: Source, destination: Destination) -> None:
        self._plan = plan
        self._source = source
        self._destination = destination
        self._target = self._open()
        self._buffers = BufferRing.of(plan, source)
        self._behind = CommitPipeline[ChunkCommit]()

    def _open(self) -> SharedTarget:
        plan = self._plan
        target = open_target(
            parse_location(plan.target),
            plan.result,
            self._destination.shared_storage(fsync=plan.fsync),
            chunk_images=plan.chunk_images,
            transform=plan.transform,
        )
        if not isinstance(target, SharedTarget):
            raise TypeError(f"{target.kind} is not written by tasks")
        target.attach()
        weakref.finalize(self, target.close)
        self._check_same_run()
        return target

    def _check_same_run(self) -> None:
        """Refuse to write what is not, or no longer, this run's."""
        path = journal_path(self._destination.path)
        begun = read_journal_header(path)
        mine = self._plan.job(), self._plan.chunk_images
        if begun is None or (begun.job, begun.chunk_images) != mine:
            raise StoppedError(
                f"{path} is {'not there' if begun is None else 'of another run'}",
                "run the same command again, where every worker can reach the target's directory",
            )

    def run_task(self, work: Iterable[ChunkTask]) -> list[ChunkCommit]:
        """Have each chunk written while the next is computed, as a run in one process does."""
        dones: list[ChunkCommit] = []
        chunks = compute(self._plan, self._source, self._target, work, self._buffers)
        with contextlib.closing(chunks):
            for computed in chunks:
                dones += self._behind.drain(2)
                self._submit(computed, make_commit(self._plan, self._source, computed))
        dones += self._behind.drain(0)
        return dones

    def _submit(self, computed: ChunkResult, commit: Commit) -> None:
        edges: PartialPages = []

        def write() -> None:
            if self._destination.is_remote:  # nothing that is open there stays what it was
                self._check_same_run()
            edges.extend(self._target.write_aligned(computed.start, computed.stored))

        def make_durable() -> ChunkCommit:
            self._target.sync()
            return ChunkCommit(commit, computed.stop - computed.start, edges)

        self._behind.submit(write, make_durable)

    def stored_checksum(self, part: ChunkTask) -> str | None:
        """Return the checksum of what is stored of a chunk."""
        stored = self._target.read_unfinished(part.start, part.stop)
        return None if stored is None else checksum(stored)

    def finish(self) -> None:
        """Finish what was given before something failed."""
        with self._behind:
            pass


class _WorkerRun:
    """A run that this process takes part in."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._source = reopen_source(plan)
        weakref.finalize(self, self._source.close)
        self._slots = [self._new()]

    def _new(self) -> _WorkerSlot:
        return _WorkerSlot(self._plan, self._source, destination_of(self._plan))

    @contextlib.contextmanager
    def slot(self) -> Iterator[_WorkerSlot]:
        """Lend a lane; one in which something failed is not used again."""
        try:
            slot = self._slots.pop()
        except IndexError:
            slot = self._new()
        try:
            yield slot
        except BaseException:
            slot.finish()
            raise
        self._slots.append(slot)


_lock = threading.Lock()
_runs: OrderedDict[bytes, _WorkerRun] = OrderedDict()


def _worker_run(plan: bytes) -> _WorkerRun:
    with _lock:
        if plan not in _runs:
            _runs[plan] = _WorkerRun(pickle.loads(plan)[1])  # noqa: S301  # from whom the task came
        _runs.move_to_end(plan)
        while len(_runs) > RUNS_KEPT:
            _runs.popitem(last=False)
        return _runs[plan]


def join(plan: bytes) -> None:
    """Open the files of a run, before its first task is done.

    Raises
    ------
    SourceError, ResumeError, StoppedError
        As for `run_task`.
    """
    _worker_run(plan)


def close_run(plan: bytes) -> None:
    """Let go of the files and the memory of a run, once its last task is done."""
    with _lock:
        _runs.pop(plan, None)
