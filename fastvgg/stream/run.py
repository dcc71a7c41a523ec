"""Carry a plan out: read, apply, write, commit, chunk by chunk, then publish.

The order is what makes a crash harmless. A chunk's bytes are durable before the journal says so,
the journal is complete before the data gets its name, and the manifest is written after that. A
run that was cut off anywhere is taken up by running it again.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import time
from typing import TYPE_CHECKING

from fastvgg.datasets.contiguous import ContiguousTarget
from fastvgg.datasets.images import ImageSource
from fastvgg.datasets.index import INDEX_HEAD, index_path, read_index
from fastvgg.datasets.open import open_target
from fastvgg.errors import ResumeError, StoppedError, TargetError, VerificationError
from fastvgg.storage.local import Storage
from fastvgg.storage.location import parse_location
from fastvgg.stream import in_place
from fastvgg.stream.commit_pipeline import CommitPipeline
from fastvgg.stream.compute import ChunkTask, check_no_failures, compute, make_commit
from fastvgg.stream.journal import journal_path
from fastvgg.stream.manifest import (
    Manifest,
    checksum,
    manifest_path,
    read_manifest,
)
from fastvgg.stream.planner import changed, read_state_of, reopen_source
from fastvgg.stream.progress import ProgressTracker
from fastvgg.stream.report import FAILURES_KEPT, Failure
from fastvgg.stream.retry import FailureRetry
from fastvgg.stream.state import check_not_occupied, inspect_target, with_committed
from fastvgg.stream.target import destination_of, open_journal
from fastvgg.stream.values import check_values

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from fastvgg.datasets.base import ImageRecord, Source
    from fastvgg.stream.journal import Commit, CommitRef, Journal, JournalState
    from fastvgg.stream.plan import Plan
    from fastvgg.stream.report import Progress, Report
    from fastvgg.stream.store_journal import StoreJournal

__all__ = ["Run", "run"]


def run(
    plan: Plan,
    progress: Callable[[Progress], None] | None = None,
    storage: Storage | None = None,
    begin: Callable[..., Run] | None = None,
) -> Report:
    """Carry a plan out, or take it up where an earlier run was cut off.

    Parameters
    ----------
    plan
        From `fastvgg.plan`.
    progress
        Called after every chunk that was committed.
    storage
        What carries out the system calls that make data last.
    begin
        What takes the arguments of a `Run` and makes it, where that is not done in this process.

    Returns
    -------
    Report
        What was done, and which images could not be read.

    Raises
    ------
    SourceError, TargetError, ResumeError
        Before anything is written.
    StoppedError
        If a system call fails later on; what is committed is kept.
    """
    if plan.in_place:
        return in_place.run(plan, progress, storage)
    destination = destination_of(plan)
    storage = storage or destination.storage(fsync=plan.fsync)
    begun = time.monotonic()
    source = reopen_source(plan)
    try:
        complete = inspect_target(plan, read_state_of(plan)) == "complete"
        # One that was killed while it had a look leaves a journal, which says nothing and goes.
        if complete and not destination.exists(journal_path(destination.path)):
            storage.syncfs(destination.path.parent)
            return _report_of_complete(plan, begun)
        check_values(plan, source)
        journal = open_journal(destination.path, storage, restart=plan.restart)
        try:
            return (begin or Run)(plan, source, journal, storage, progress, begun).finish()
        finally:
            journal.close()
    finally:
        source.close()


class Run:
    """One run of a plan, holding the journal's lock; its chunks are computed in this process.

    Parameters
    ----------
    plan, progress, storage
        As for `run`.
    source
        Open, and still the one that was planned.
    journal
        Open.
    begun
        When the run began, on the monotonic clock.
    """

    def __init__(
        self,
        plan: Plan,
        source: Source,
        journal: Journal | StoreJournal,
        storage: Storage,
        progress: Callable[[Progress], None] | None,
        begun: float,
    ) -> None:
        # Between the first look and the lock another run may have begun or ended.
        self.state = inspect_target(plan, journal.state)
        self.plan = plan
        if self.state == "resumable" and journal.state is not None:
            self.plan = with_committed(plan, journal.state.chunk_images, len(journal.state.commits))
        self.source = source
        self.destination = destination_of(plan)
        self.journal = journal
        self.storage = storage
        self.begun = begun
        self.again = self._again()
        if self.state == "failed" and self.again is not None:
            self.plan = with_committed(plan, self.again.manifest.chunk_images, 0)
        self.progress = progress
        self.tally = ProgressTracker(self.plan, self._commits(), progress, begun)
        self.target = open_target(
            parse_location(plan.target),
            plan.result,
            storage,
            chunk_images=self.plan.chunk_images,
            transform=plan.transform,
            records=source.records,
            file_format=plan.file_format,
        )

    def _again(self) -> FailureRetry | None:
        """Return what is known of a finished target that is taken up again for its failures."""
        journal_state = self.journal.state
        retries = self.state == "failed" or (journal_state is not None and journal_state.retries)
        # Once all is done again, what was said of the target may be gone.
        if not retries or (journal_state is not None and journal_state.complete):
            return None
        if not isinstance(self.source, ImageSource):
            raise TypeError(f"{self.source.path} holds no images that can be read again")
        return FailureRetry(self.plan, self.source)

    def finish(self) -> Report:
        """Do what is left to do."""
        if self.state != "fresh":  # a run that was killed may have synced no part of it
            self.storage.syncfs(self.target.path.parent)
        if self.state == "complete":
            return _report_of_complete(self.plan, self.begun)
        if self._published():
            self._check_checksums()
        else:
            try:
                self.open_target()
                self.compute(self._work())
            finally:
                self.target.close()
            self._publish()
        return self._describe()

    def _published(self) -> bool:
        """Whether an earlier run gave the data its name, and was cut off before the manifest."""
        return (
            self.state == "resumable"
            and self.destination.is_published()
            and len(self._commits()) == self.plan.chunks
        )

    def _check_checksums(self) -> None:
        for chunk, (start, stop) in enumerate(self.plan.chunk_rows()):
            why = f"images {start} to {stop - 1} differ"
            try:
                stored = self.target.read_stored(start, stop)
            except VerificationError as error:  # of what has checksums of its own
                stored, why = [], error.problem
            if checksum(stored) != self._commits()[chunk].checksum:
                raise ResumeError(
                    f"{self.plan.target} is not what the unfinished run wrote: {why}",
                    "give --restart to replace it, or another name",
                )

    def _publish(self) -> None:
        if changed(self.plan, self.source):
            raise StoppedError(
                f"{self.plan.source} changed while it was read: the result may be a mixture",
                "let it be still, and run again with --restart",
            )
        check_not_occupied(self.plan, self.journal.state.replaces if self.journal.state else None)
        for described in (manifest_path, index_path):  # what is said of the data that is replaced
            self.storage.remove(described(self.target.path))
        self.destination.move_aside(self.storage)
        self.target.publish()

    def _commits(self) -> dict[int, CommitRef]:
        return self.journal.state.commits if self.journal.state is not None else {}

    @property
    def _journal_state(self) -> JournalState:
        if self.journal.state is None:
            raise RuntimeError(f"{self.journal.path} is read before it is begun")
        return self.journal.state

    def open_target(self) -> None:
        """Begin the target, or reopen it."""
        if self.again is not None:
            self._reopen_published(self.again)
        if self.again is not None or (self.state == "resumable" and self._commits()):
            self.target.reopen()
            self._discard_torn()
            return
        if self.state == "fresh":
            replaces = self.destination.replaceable() if self.plan.restart else None
            self.journal.begin(self.plan.job(), self.plan.chunk_images, replaces=replaces)
        try:
            self.target.create()
        except TargetError:  # no room: as if nothing had been begun
            self.journal.remove()
            raise

    def _discard_torn(self) -> None:
        """Do those chunks again whose bytes, where looked at, are not what was committed."""
        rows = enumerate(self.plan.chunk_rows())
        committed = [ChunkTask(chunk, *span) for chunk, span in rows if chunk in self._commits()]
        for chunk, found in self.stored_checksums(committed):
            if found is not None and found != self._commits()[chunk].checksum:
                del self._commits()[chunk]
        self.tally = ProgressTracker(self.plan, self._commits(), self.progress, self.begun)

    def stored_checksums(self, work: Iterable[ChunkTask]) -> Iterator[tuple[int, str | None]]:
        """Read what is stored of chunks that an unfinished run committed.

        None where the journal is believed without a look.
        """
        for chunk, start, stop, _ in work:
            stored = self.target.read_unfinished(start, stop)
            yield chunk, None if stored is None else checksum(stored)

    def _reopen_published(self, again: FailureRetry) -> None:
        """Make a finished target an unfinished one, of which the good chunks are done."""
        if self.state == "failed":
            self.journal.begin(self.plan.job(), self.plan.chunk_images, done=again.done())
        self.destination.reopen_published(self.storage)

    def compute(self, work: Iterable[ChunkTask]) -> None:
        """Compute, write and commit every chunk that is not durable yet."""
        # Closed by itself, so that no thread computes on while the target is closed after an error.
        chunks = compute(self.plan, self.source, self.target, work)
        with contextlib.closing(chunks), CommitPipeline[int]() as behind:
            for computed in chunks:
                self.tally.count(behind.drain(2))
                commit = make_commit(self.plan, self.source, computed)
                behind.submit(
                    functools.partial(self.target.write, computed.start, computed.stored),
                    functools.partial(self._commit, commit, computed.stop - computed.start),
                )
            self.tally.count(behind.drain(0))

    def _work(self) -> Iterator[ChunkTask]:
        """Return every chunk that is not durable yet."""
        for chunk, (start, stop) in enumerate(self.plan.chunk_rows()):
            mark = self._commits().get(chunk)
            if (
                mark is None
                and self.again is not None
                and isinstance(self.target, ContiguousTarget)
            ):
                yield self.again.work(chunk, start, stop, self.target)
            elif mark is None:
                yield ChunkTask(chunk, start, stop)
            elif mark.failed and self.plan.strict:
                check_no_failures(self.plan, self._journal_state.failures(chunk))

    def _commit(self, commit: Commit, images: int) -> int:
        """Make a chunk that is written durable, and return its images."""
        self.target.sync()
        self.journal.commit(commit)
        return images

    def _describe(self) -> Report:
        """Write index and manifest beside the published data, and forget the journal."""
        refs = [self._commits()[chunk] for chunk in range(self.plan.chunks)]
        path = self.target.path
        self._write_index()
        failures = self._failures()
        manifest = Manifest.of_now(
            self.plan.job(),
            self.plan.chunk_images,
            checksums=[mark.checksum for mark in refs],
            counts={
                "images": self.plan.header.images,
                "failed": sum(mark.failed for mark in refs),
            },
            source_checksums=[mark.source_checksum for mark in refs],
        )
        self.storage.write_atomic(manifest_path(path), [manifest.to_json()])
        self.storage.remove(self.destination.replaced)
        self.journal.remove()
        return self.tally.report(manifest.counts, failures)

    def _write_index(self) -> None:
        """Write the index, if there is anything to say."""
        path, journal_state = index_path(self.target.path), self._journal_state
        lines = (journal_state.commit(chunk).index for chunk in range(self.plan.chunks))
        first = next(lines)
        if not first:
            self.storage.remove(path)
            return
        texts = itertools.chain([INDEX_HEAD, first], lines)
        self.storage.write_atomic(path, (text.encode("utf-8", "surrogateescape") for text in texts))

    def _failures(self) -> list[Failure]:
        """Return the first images that could not be read."""
        rows = (
            row for chunk in range(self.plan.chunks) for row in self._journal_state.failures(chunk)
        )
        return _first_failures(rows)


def _first_failures(rows: Iterable[tuple[int, ImageRecord]]) -> list[Failure]:
    failures = (Failure(row, record.path, record.reason) for row, record in rows if record.failed)
    return list(itertools.islice(failures, FAILURES_KEPT))


def _report_of_complete(plan: Plan, begun: float) -> Report:
    """Report a target that this job finished before, after a look at whether it is whole.

    Raises
    ------
    SourceError
        If its header, or its length, is no longer what was written.
    """
    manifest = read_manifest(parse_location(plan.target))
    if manifest is None:
        raise RuntimeError(f"{plan.target} is complete, and has no manifest")
    if plan.target_format != "images":
        together = manifest.chunk_images
        target = open_target(
            parse_location(plan.target), plan.result, Storage(), chunk_images=together
        )
        target.read_back(0, 1)
    failures = _first_failures(
        enumerate(read_index(parse_location(plan.target), plan.header.images))
    )
    return ProgressTracker(plan, (), None, begun).report(manifest.counts, failures)
