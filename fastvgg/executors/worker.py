"""Compute and write chunks in a worker process.

A scheduler may run a task twice, in two processes at once, or long after its run has ended. So a
task writes only its own chunks, whose bytes are the same whichever process writes them, and only
into the target of its own run: it opens the file or directory first and reads the journal second,
and the open handle keeps referring to this run's target even if the name is reused. Bytes on a page
shared with another chunk are returned rather than written, and the coordinator writes them.
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
from fastvgg.stream.commit_pipeline import CommitPipeline
from fastvgg.stream.compute import ChunkBufferRing, compute, make_commit, stored_checksum
from fastvgg.stream.destinations import make_destination
from fastvgg.stream.journal import journal_path, read_journal
from fastvgg.stream.source import reopen_source

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from fastvgg.datasets.base import PartialPages, Source
    from fastvgg.stream.compute import ChunkResult, ChunkTask
    from fastvgg.stream.journal import Commit
    from fastvgg.stream.plan import Plan

MAX_OPEN_RUNS: Final = 2  # in one process at a time


@dataclass(frozen=True)
class Task:
    """Chunks to be computed and written in one call, pipelined."""

    plan: bytes
    """Pickled plan with a random id of the run."""
    chunks: tuple[ChunkTask, ...]


@dataclass(frozen=True)
class ChunkCommit:
    """A chunk that is durable except for its partial pages."""

    commit: Commit
    images: int
    edges: PartialPages


def run_task(task: Task) -> list[ChunkCommit]:
    """Compute chunks, write them, and make them durable.

    Raises
    ------
    SourceError
        If this process cannot read the source, or the source has changed since planning.
    ResumeError, StoppedError
        If the run's unfinished target is missing here, or a system call fails.
    """
    with _worker_run(task.plan).slot() as slot:
        return slot.run_task(task.chunks)


def stored_checksums(task: Task) -> list[tuple[ChunkTask, str]]:
    """Return chunks with the checksums of their stored bytes; see `stored_checksum`."""
    with _worker_run(task.plan).slot() as slot:
        return [(chunk, stored_checksum(slot.target, chunk)) for chunk in task.chunks]


class _WorkerSlot:
    """The buffers, threads and open target of one task at a time."""

    def __init__(self, plan: Plan, source: Source) -> None:
        self._plan = plan
        self._source = source
        self._destination = make_destination(plan)
        target = open_target(
            plan.target,
            plan.result,
            self._destination.shared_storage(),
            chunk_images=plan.chunk_images,
            transform=plan.transform,
        )
        if not isinstance(target, SharedTarget):
            raise TypeError(f"{plan.job.target_format} cannot be written by several processes")
        target.attach()
        weakref.finalize(self, target.close)
        self._check_same_run()
        self.target = target
        self._buffers = ChunkBufferRing(plan, source)
        self.pipeline = CommitPipeline[ChunkCommit]()

    def _check_same_run(self) -> None:
        path = journal_path(self._destination.path)
        header = read_journal(path, header_only=True)
        expected = self._plan.job, self._plan.chunk_images
        if header is None or (header.job, header.chunk_images) != expected:
            raise StoppedError(
                f"{path} {'does not exist' if header is None else 'belongs to another run'}",
                "make the target accessible to every worker, and rerun the same command",
            )

    def run_task(self, tasks: Iterable[ChunkTask]) -> list[ChunkCommit]:
        """Write each chunk while the next is computed, as a local run does."""
        commits: list[ChunkCommit] = []
        chunks = compute(self._plan, self._source, self.target, tasks, self._buffers)
        with contextlib.closing(chunks):
            for computed in chunks:
                commits += self.pipeline.drain(max_pending=2)
                self._submit(computed, make_commit(self._plan, self._source, computed))
        commits += self.pipeline.drain(max_pending=0)
        return commits

    def _submit(self, computed: ChunkResult, commit: Commit) -> None:
        edges: PartialPages = []

        def write() -> None:
            if self._plan.target.is_remote:  # a store has no open handles that pin the target
                self._check_same_run()
            edges.extend(self.target.write_aligned(computed.start, computed.stored))

        def sync() -> ChunkCommit:
            self.target.sync()
            return ChunkCommit(commit, computed.stop - computed.start, edges)

        self.pipeline.submit(write, sync)


class _WorkerRun:
    """The state of a run in a worker process: its source and its slots."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._source = reopen_source(plan)
        weakref.finalize(self, self._source.close)
        self._slots = [_WorkerSlot(plan, self._source)]

    @contextlib.contextmanager
    def slot(self) -> Iterator[_WorkerSlot]:
        """Lend a free slot; after an error the slot is discarded."""
        try:
            slot = self._slots.pop()
        except IndexError:
            slot = _WorkerSlot(self._plan, self._source)
        try:
            yield slot
        except BaseException:
            with slot.pipeline:  # finishes the chunks that were submitted before the error
                pass
            raise
        self._slots.append(slot)


_lock = threading.Lock()
_runs: OrderedDict[bytes, _WorkerRun] = OrderedDict()


def _worker_run(plan: bytes) -> _WorkerRun:
    with _lock:
        if plan not in _runs:
            _runs[plan] = _WorkerRun(pickle.loads(plan)[1])  # noqa: S301  # from the client
        _runs.move_to_end(plan)
        while len(_runs) > MAX_OPEN_RUNS:
            _runs.popitem(last=False)
        return _runs[plan]


def open_run(plan: bytes) -> None:
    """Open the files of a run before its first task; raises what `run_task` raises."""
    _worker_run(plan)


def close_run(plan: bytes) -> None:
    """Release the files and buffers of a run after its last task."""
    with _lock:
        _runs.pop(plan, None)
