"""Execute a plan: read, transform, write and commit each chunk, then publish.

The order makes crashes harmless: a chunk's bytes are durable before its journal line is written,
the journal is complete before the data is renamed into place, and the manifest is written after
that. An interrupted run resumes when it is rerun.
"""

from __future__ import annotations

import itertools
import time
from typing import TYPE_CHECKING, Protocol, cast

from fastvgg.datasets.contiguous import ContiguousTarget
from fastvgg.datasets.images import ImageSource
from fastvgg.datasets.index import INDEX_HEAD, index_path, index_text, read_index
from fastvgg.datasets.open import open_target
from fastvgg.errors import ClusterError, ResumeError, StoppedError, TargetError, VerificationError
from fastvgg.stream import in_place
from fastvgg.stream.compute import ChunkTask, check_no_failures
from fastvgg.stream.destination import destination_of
from fastvgg.stream.manifest import (
    Manifest,
    checksum,
    manifest_path,
)
from fastvgg.stream.progress import ProgressTracker
from fastvgg.stream.report import FAILURES_KEPT, Failure
from fastvgg.stream.retry import FailureRetry
from fastvgg.stream.source import changed, reopen_source
from fastvgg.stream.target import check_not_occupied, inspect_target, with_committed
from fastvgg.stream.values import check_values

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from fastvgg.datasets.base import ImageRecord, Source
    from fastvgg.storage.local import Storage
    from fastvgg.storage.objects import StoreStorage
    from fastvgg.stream.destination import Destination
    from fastvgg.stream.journal import CommitRef, Journal, JournalState
    from fastvgg.stream.plan import Plan
    from fastvgg.stream.report import Progress, Report
    from fastvgg.stream.store_journal import StoreJournal


class Executor(Protocol):
    """Compute the chunks of a run. The run decides which, and publishes the result."""

    def prepare(self, plan: Plan) -> Plan:
        """Check that the executor can run a plan, and return the plan that it runs."""

    def open(self, run: Run) -> None:
        """Prepare for the chunks of a run whose target is open.

        Raises
        ------
        ClusterError
            If that fails; no chunk has been written.
        """

    def compute(self, run: Run, tasks: Iterable[ChunkTask]) -> None:
        """Compute, write and commit every chunk of `tasks`, and count it in the run's tracker."""

    def stored_checksums(
        self, run: Run, tasks: Iterable[ChunkTask]
    ) -> Iterator[tuple[int, str | None]]:
        """Yield the checksums of the stored bytes of committed chunks.

        None for formats whose committed bytes need no check.
        """

    def close(self) -> None:
        """Release what `open` acquired."""


def run(
    plan: Plan,
    progress: Callable[[Progress], None] | None = None,
    storage: Storage | StoreStorage | None = None,
    executor: Executor | None = None,
) -> Report:
    """Execute a plan, or resume an interrupted run of it.

    Parameters
    ----------
    plan
        From `fastvgg.plan`.
    progress
        Called after every committed chunk.
    storage
        Performs the durable I/O.
    executor
        Computes the chunks. Default: the threads of this process.

    Returns
    -------
    Report
        The outcome, with the images that could not be read.

    Raises
    ------
    SourceError, TargetError, ResumeError
        Before anything is written.
    StoppedError
        If a system call fails later; committed chunks are kept.
    """
    if executor is None:
        from fastvgg.executors.threads import ThreadExecutor

        executor = ThreadExecutor()
    plan = executor.prepare(plan)
    if plan.in_place:
        return in_place.run(plan, progress, cast("Storage | None", storage))
    started_at = time.monotonic()
    destination = destination_of(plan, storage)
    source = reopen_source(plan)
    try:
        journal = destination.open_journal(restart=plan.restart)
        try:
            return Run(plan, source, destination, journal, executor, progress, started_at).finish()
        finally:
            executor.close()
            journal.close()
    finally:
        source.close()


class Run:
    """A run of a plan that holds the journal's lock.

    Parameters
    ----------
    plan, progress, executor
        As for `run`.
    source
        Open, and unchanged since planning.
    destination, journal
        Of the target; the journal is open.
    started_at
        Start of the run, in seconds of the monotonic clock.
    """

    def __init__(
        self,
        plan: Plan,
        source: Source,
        destination: Destination,
        journal: Journal | StoreJournal,
        executor: Executor,
        progress: Callable[[Progress], None] | None,
        started_at: float,
    ) -> None:
        self.state, self.manifest = inspect_target(plan, journal.state)
        self.plan = plan
        if self.state == "resumable" and journal.state is not None:
            self.plan = with_committed(plan, journal.state.chunk_images, len(journal.state.commits))
        self.source = source
        self.destination = destination
        self.journal = journal
        self.storage = destination.storage
        self.executor = executor
        self.started_at = started_at
        self.retry = self._failure_retry()
        if self.state == "failed" and self.retry is not None:
            self.plan = with_committed(plan, self.retry.manifest.chunk_images, 0)
        self.progress = progress
        self.tracker = ProgressTracker(self.plan, self._commits(), progress, started_at)
        self.target = open_target(
            plan.target,
            plan.result,
            destination.storage,
            chunk_images=self.plan.chunk_images,
            transform=plan.transform,
            records=source.records,
            file_format=plan.file_format,
        )

    def _failure_retry(self) -> FailureRetry | None:
        """Return the retry of a finished target's failures, if this run is one."""
        journal_state = self.journal.state
        retries = self.state == "failed" or (journal_state is not None and journal_state.retries)
        # Once every chunk is committed, the old manifest and index may be gone.
        if not retries or (journal_state is not None and journal_state.complete):
            return None
        if not isinstance(self.source, ImageSource):
            raise TypeError(f"{self.source.location} is not an image source")
        return FailureRetry(self.plan, self.source, self.manifest)

    def finish(self) -> Report:
        """Execute the remaining steps and return the report."""
        if self.state != "fresh":  # a killed run may not have synced anything
            self.destination.sync_existing()
        if self.state == "complete":
            return self._report_of_complete()
        check_values(self.plan, self.source)
        if self._published():
            self._check_checksums()
        else:
            try:
                self._open_target()
                self.executor.compute(self, self._tasks())
            finally:
                self.target.close()
            self._publish()
        return self._describe()

    def _published(self) -> bool:
        """Return whether an earlier run published the data but did not write the manifest."""
        return (
            self.state == "resumable"
            and self.destination.is_published()
            and len(self._commits()) == self.plan.chunks
        )

    def _check_checksums(self) -> None:
        for chunk, (start, stop) in enumerate(self.plan.chunk_rows()):
            reason = f"images {start} to {stop - 1} differ"
            try:
                stored = self.target.read_stored(start, stop)
            except VerificationError as error:  # from a format that has checksums of its own
                stored, reason = [], error.problem
            if checksum(stored) != self._commits()[chunk].checksum:
                raise ResumeError(
                    f"{self.plan.target} is not what the unfinished run wrote: {reason}",
                    "give --restart to replace it, or choose another name",
                )

    def _publish(self) -> None:
        if changed(self.plan, self.source):
            raise StoppedError(
                f"{self.plan.source} changed while it was read: the result may mix both versions",
                "keep the source unchanged, and rerun with --restart",
            )
        check_not_occupied(self.plan, self.journal.state.replaces if self.journal.state else None)
        for sidecar in (manifest_path, index_path):  # they describe the data that is replaced
            self.storage.remove(sidecar(self.target.path))
        self.destination.move_aside()
        self.target.publish()

    def _commits(self) -> dict[int, CommitRef]:
        return self.journal.state.commits if self.journal.state is not None else {}

    @property
    def _journal_state(self) -> JournalState:
        if self.journal.state is None:
            raise RuntimeError(f"{self.journal.path} is read before its header is written")
        return self.journal.state

    def _open_target(self) -> None:
        """Create the target, or reopen it to resume."""
        if self.retry is not None:
            self._reopen_published(self.retry)
        if self.retry is not None or (self.state == "resumable" and self._commits()):
            self.target.reopen()
            self._discard_damaged()
            self.executor.open(self)
            return
        if self.state == "fresh":
            replaces = self.destination.replaceable() if self.plan.restart else None
            self.journal.begin(self.plan.job(), self.plan.chunk_images, replaces=replaces)
        try:
            self.target.create()
        except TargetError:  # no space: undo the start of the run
            self.journal.remove()
            raise
        try:
            self.executor.open(self)
        except ClusterError:
            if self.state == "fresh":
                self.target.close()
                self.storage.remove(self.target.partial)
                self.journal.remove()
            raise

    def _discard_damaged(self) -> None:
        """Drop the commits of chunks whose stored bytes do not match their checksum."""
        rows = enumerate(self.plan.chunk_rows())
        committed = [ChunkTask(chunk, *span) for chunk, span in rows if chunk in self._commits()]
        for chunk, found in self.executor.stored_checksums(self, committed):
            if found is not None and found != self._commits()[chunk].checksum:
                del self._commits()[chunk]
        self.tracker = ProgressTracker(self.plan, self._commits(), self.progress, self.started_at)

    def _reopen_published(self, retry: FailureRetry) -> None:
        """Turn a finished target into an unfinished run whose good chunks are committed."""
        if self.state == "failed":
            self.journal.begin(
                self.plan.job(), self.plan.chunk_images, committed=retry.good_commits()
            )
        self.destination.reopen_published()

    def _tasks(self) -> Iterator[ChunkTask]:
        """Yield every chunk that is not durable yet."""
        for chunk, (start, stop) in enumerate(self.plan.chunk_rows()):
            ref = self._commits().get(chunk)
            if ref is None and self.retry is not None and isinstance(self.target, ContiguousTarget):
                yield self.retry.task(chunk, start, stop, self.target)
            elif ref is None:
                yield ChunkTask(chunk, start, stop)
            elif ref.failed and self.plan.strict:
                check_no_failures(self.plan, self._journal_state.failures(chunk))

    def _describe(self) -> Report:
        """Write the index and the manifest of the published data, and remove the journal."""
        refs = [self._commits()[chunk] for chunk in range(self.plan.chunks)]
        path = self.target.path
        self._write_index()
        failures = self._failures()
        manifest = Manifest.of_now(
            self.plan.job(),
            self.plan.chunk_images,
            checksums=[ref.checksum for ref in refs],
            counts={
                "images": self.plan.header.images,
                "failed": sum(ref.failed for ref in refs),
            },
            source_checksums=[ref.source_checksum for ref in refs],
        )
        self.storage.write_atomic(manifest_path(path), [manifest.to_json()])
        self.storage.remove(self.destination.replaced)
        self.journal.remove()
        return self.tracker.report(manifest.counts, failures)

    def _write_index(self) -> None:
        """Write the index, if the source has image records."""
        path = index_path(self.target.path)
        if self._journal_state.commit(0).records:
            self.storage.write_atomic(path, self._index_pieces())
        else:
            self.storage.remove(path)

    def _index_pieces(self) -> Iterator[bytes]:
        """Yield the encoded header of the index and the lines of each chunk."""
        yield INDEX_HEAD.encode()
        for chunk, (start, _) in enumerate(self.plan.chunk_rows()):
            text = index_text(self._journal_state.commit(chunk).records, start)
            yield text.encode("utf-8", "surrogateescape")

    def _failures(self) -> list[Failure]:
        """Return the first images that could not be read."""
        rows = (
            row for chunk in range(self.plan.chunks) for row in self._journal_state.failures(chunk)
        )
        return _first_failures(rows)

    def _report_of_complete(self) -> Report:
        """Return the report of a target that this job finished before.

        Raises
        ------
        SourceError
            If its header or length has changed since.
        """
        if self.manifest is None:
            raise RuntimeError(f"{self.plan.target} is complete but has no manifest")
        if self.plan.target_format != "images":
            self.target.read_back(0, 1)
        failures = _first_failures(enumerate(read_index(self.target.path, self.plan.header.images)))
        return self.tracker.report(self.manifest.counts, failures)


def _first_failures(rows: Iterable[tuple[int, ImageRecord]]) -> list[Failure]:
    failures = (Failure(row, record.path, record.reason) for row, record in rows if record.failed)
    return list(itertools.islice(failures, FAILURES_KEPT))
