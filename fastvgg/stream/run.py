"""Execute a plan: read, transform, write and commit each chunk, then publish.

The order makes crashes harmless: a chunk's bytes are durable before its journal line is written,
the journal is complete before the data is renamed into place, and the manifest is written after
that. An interrupted run resumes when it is rerun.
"""

from __future__ import annotations

import dataclasses
import time
from abc import ABC, abstractmethod
from contextlib import ExitStack, closing, contextmanager, suppress
from typing import TYPE_CHECKING, Any

import xxhash

from fastvgg.datasets.contiguous import ContiguousTarget
from fastvgg.datasets.images import ImageSource
from fastvgg.datasets.index import index_path, read_index
from fastvgg.datasets.open import open_target
from fastvgg.errors import (
    FastvggError,
    ResumeError,
    StoppedError,
    TargetError,
    option,
    os_errors_refused,
)
from fastvgg.formatting import format_count
from fastvgg.stream.compute import ChunkTask, check_no_failures
from fastvgg.stream.destinations import make_destination
from fastvgg.stream.finished import CheckCounter, FinishedDataset
from fastvgg.stream.journal import check_is_journal, journal_path
from fastvgg.stream.manifest import Manifest, manifest_path
from fastvgg.stream.ownership import Written, find_change, index_content
from fastvgg.stream.progress import ProgressTracker
from fastvgg.stream.report import first_failures
from fastvgg.stream.retry import FailureRetry
from fastvgg.stream.source import (
    check_decodable,
    check_sampled_values,
    describe_change,
    is_changed,
    reopen_source,
)
from fastvgg.stream.target import (
    check_names,
    check_not_occupied,
    inspect_target,
    inspect_unlocked_target,
    with_committed,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from fastvgg.datasets.base import Source
    from fastvgg.storage.local import Storage
    from fastvgg.storage.objects import ObjectStorage
    from fastvgg.stream.destination import Destination
    from fastvgg.stream.journal import JournalState
    from fastvgg.stream.journal_writer import Journal
    from fastvgg.stream.plan import Plan
    from fastvgg.stream.report import Progress, Report
    from fastvgg.stream.target import TargetState


class Executor(ABC):
    """Compute the chunks of a run. The run decides which, and publishes the result."""

    def prepare(self, plan: Plan) -> Plan:
        """Check that the executor can run a plan, and return the plan that it runs."""
        return plan

    def open(self, run: Run) -> None:  # noqa: B027  # threads use the files of the run
        """Prepare for the chunks of a run whose target is open.

        Raises
        ------
        ClusterError
            If that fails; no chunk has been written.
        """

    @abstractmethod
    def compute(self, run: Run, tasks: Iterable[ChunkTask]) -> None:
        """Compute, write and commit every chunk of `tasks`, and count it in the run's tracker."""

    def damaged_chunks(self, run: Run, count: Callable[[int, int], None]) -> Iterator[int]:
        """Yield the committed chunks whose stored bytes do not match their checksum.

        `count` is called with the images and bytes that were read.
        """
        for damaged in run.stored_dataset().damaged_chunks(sorted(run.journal.commits), count):
            yield damaged.chunk

    def close(self) -> None:  # noqa: B027
        """Release what `open` acquired."""


def run(
    plan: Plan,
    executor: Executor,
    progress: Callable[[Progress], None] | None = None,
    storage: Storage | ObjectStorage | None = None,
) -> Report:
    """Execute a plan, or resume an interrupted run of it.

    Parameters
    ----------
    plan
        From `fastvgg.plan`, and not in place.
    executor
        Computes the chunks.
    progress
        Called after every committed chunk, and before while those of an earlier run are checked.
    storage
        Performs the durable I/O.

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
    plan = executor.prepare(plan)
    started_at = time.monotonic()
    with ExitStack() as opened:
        source = opened.enter_context(closing(reopen_source(plan)))
        destination = make_destination(plan, storage, source.records)
        if not (plan.restart or destination.exists(journal_path(destination.path))):
            found = inspect_unlocked_target(plan, destination)
            if found.name == "complete":  # reported without creating a journal
                destination.sync_existing()
                return _report_complete(found, started_at)
        journal = opened.enter_context(closing(destination.open_journal(restart=plan.restart)))
        opened.enter_context(closing(executor))
        return Run(plan, source, destination, journal, executor, progress, started_at).finish()


class Run:
    """A run of a plan that holds the journal's lock.

    The source is open, and unchanged since planning. `started_at` is the start of the run, in
    seconds of the monotonic clock.
    """

    def __init__(
        self,
        plan: Plan,
        source: Source,
        destination: Destination,
        journal: Journal,
        executor: Executor,
        progress: Callable[[Progress], None] | None,
        started_at: float,
    ) -> None:
        self.found = inspect_target(plan, destination, journal.state)
        self.plan = self.found.plan
        self.source = source
        self.destination = destination
        self.journal = journal
        self.storage = destination.storage
        self.executor = executor
        self.retry = self._failure_retry()
        if self.found.name == "failed" and self.retry is not None:
            self.plan = with_committed(plan, self.retry.manifest.chunk_images, 0)
        self.progress = progress
        self.started_at = started_at
        self.tracker = self._new_tracker()
        self.damaged: set[int] = set()
        """Chunks that were committed, and whose stored bytes were changed since."""
        self.target = open_target(
            plan.target,
            plan.result,
            destination.storage,
            chunk_images=self.plan.chunk_images,
            transform=plan.transform,
            records=source.records,
            file_format=plan.job.file_format,
        )

    def _new_tracker(self) -> ProgressTracker:
        return ProgressTracker(self.plan, self.journal.commits, self.progress, self.started_at)

    def _failure_retry(self) -> FailureRetry | None:
        """Return the retry of a finished target's failures, if this run is one."""
        state = self.journal.state
        # Once every chunk is committed, the old manifest and index may be gone.
        resumes = state is not None and state.retries and not state.complete
        if self.found.name != "failed" and not resumes:
            return None
        if not isinstance(self.source, ImageSource):
            raise TypeError(f"{self.source.location} is not an image source")
        return FailureRetry(self.plan, self.source, self.found.manifest)

    def finish(self) -> Report:
        """Execute the remaining steps and return the report."""
        if self.found.name != "fresh":  # a killed run may not have synced anything
            self.destination.sync_existing()
        if self.found.name == "complete":
            return _report_complete(self.found, self.started_at)
        with os_errors_refused():
            check_sampled_values(
                self.source, self.plan.transform, is_enabled=self.plan.check_values
            )
        resumes = self.found.name == "resumable" and self._journal_state.complete
        if resumes and self.destination.is_published():  # without its manifest
            self._check_published()
        else:
            check_decodable(self.plan, self.source)
            try:
                self._open_target()
                self.executor.compute(self, self._tasks())
                self._check_complete()
                self._publish()  # while the target is open, and so known to be the one written
            finally:
                self.target.close()
        return self._finalize()

    def _check_published(self) -> None:
        """Check that the published data is what the unfinished run wrote."""
        written = Written.by_journal(self._journal_state)
        change = find_change(self.target.path, written, read=True)
        if change is not None:
            raise ResumeError(
                f"{self.plan.target} is not what the unfinished run wrote: {change}",
                f"move it away, and start over with {option('restart')}",
            )

    def _publish(self) -> None:
        if is_changed(self.plan, self.source):
            raise StoppedError(
                f"{self.plan.source} changed while it was read, so the result may mix both "
                f"versions{describe_change(self.plan)}",
                f"keep the source unchanged, and rerun with {option('restart')}",
            )
        journal = self.journal.path
        if not (self.plan.target.is_remote or check_is_journal(journal)):
            raise StoppedError(
                f"{journal} was moved or removed while the run used it",
                f"move it back, or move {self.target.partial} away; then rerun the same command",
            )
        try:  # other programs may have changed or added files since the run began
            check_names(self.destination, self.plan.job, self._journal_state)
            check_not_occupied(self.destination, self.plan.job, self._journal_state.replaces)
        except TargetError as error:
            remedy = "move it away, and rerun the same command: it publishes the finished data"
            raise StoppedError(error.problem, remedy) from error
        self.destination.set_aside()
        try:
            self.target.publish()
        except FastvggError:
            self.destination.put_back()
            raise

    @property
    def _journal_state(self) -> JournalState:
        if self.journal.state is None:
            raise RuntimeError(f"{self.journal.path} is read before its header is written")
        return self.journal.state

    def _open_target(self) -> None:
        """Create the target, or reopen it to resume."""
        if self.retry is not None:
            if self.destination.is_published():
                self.retry.check_unchanged()
            if self.found.name == "failed":
                self._begin(committed=self.retry.good_commits())
                with self._undoing():
                    self.destination.check_movable()
            self.destination.reopen_published()
        if self.retry is not None or (self.found.name == "resumable" and self.journal.commits):
            self.target.reopen()
            if self.found.name == "resumable":
                self._discard_damaged()
            self.executor.open(self)
            return
        if self.found.name == "fresh":
            if self.found.replaces is not None:
                self.destination.check_replaceable(read=True)
            self.destination.discard_unfinished()  # while its journal proves what wrote it
            self._begin(replaces=self.found.replaces)
        with self._undoing():
            self.destination.check_movable()
            self.target.create()
            self.executor.open(self)

    def _begin(self, **options: Any) -> None:
        self.journal.begin(self.plan.job, self.plan.chunk_images, **options)

    @contextmanager
    def _undoing(self) -> Iterator[None]:
        """Refuse a run that fails before its first chunk, and leave nothing of it."""
        try:
            yield
        except FastvggError as error:
            if self.plan.target.is_remote and isinstance(error, StoppedError):
                raise  # part of what it replaces may be gone
            with suppress(FastvggError):
                self.target.close()
                self.storage.remove(self.target.partial)
                self.journal.remove()
            if isinstance(error, StoppedError):
                raise error.as_refusal() from error
            raise

    def stored_dataset(self) -> FinishedDataset:
        """Return what is stored in the partial, to be compared with the commits."""
        plan, commits = self.plan, self.journal.commits
        sums = [commits[chunk].checksum if chunk in commits else "" for chunk in range(plan.chunks)]
        manifest = Manifest.new(plan.job, plan.chunk_images, checksums=sums, counts={})
        stored = self.target.unfinished()
        return FinishedDataset(plan.target, manifest, (), stored, plan.threads, plan.memory_bytes)

    def _discard_damaged(self) -> None:
        """Drop the commits of chunks whose stored bytes do not match their checksum."""
        counter = CheckCounter(self.progress, self.plan.header.images, is_resumed=True)
        self.damaged = {*self.executor.damaged_chunks(self, counter.count)}
        for chunk in self.damaged:
            del self.journal.commits[chunk]
        self.tracker = self._new_tracker()

    def _check_complete(self) -> None:
        """Check that no other process truncated the target while it was written.

        On a disk that compresses, every target has fewer blocks than bytes: the bytes decide.
        """
        if not self.target.has_holes():
            return
        damaged = [*self.executor.damaged_chunks(self, lambda _images, _nbytes: None)]
        if damaged:
            raise StoppedError(
                f"{self.target.partial} was truncated by another process while it was written: "
                f"{format_count(len(damaged), 'chunk')} of {self.plan.chunks:,} are lost",
                "keep other programs out of it, and rerun the same command, or start over with "
                f"{option('restart')}",
            )

    def _tasks(self) -> Iterator[ChunkTask]:
        """Yield every chunk that is not durable yet."""
        for chunk, (start, stop) in enumerate(self.plan.chunk_rows()):
            ref, retry, target = self.journal.commits.get(chunk), self.retry, self.target
            if ref is None:
                is_kept = chunk not in self.damaged  # so that only its failed rows are computed
                if is_kept and retry is not None and isinstance(target, ContiguousTarget):
                    yield retry.task(chunk, start, stop, target)
                else:
                    yield ChunkTask(chunk, start, stop)
            elif ref.failed and self.plan.strict:
                check_no_failures(self.plan, self._journal_state.failures(chunk))

    def _finalize(self) -> Report:
        """Write the index and the manifest of the published data, and remove the journal."""
        refs = [self.journal.commits[chunk] for chunk in range(self.plan.chunks)]
        path = self.target.path
        index_checksum = self._write_index()
        rows_of = self._journal_state.failures
        failures = first_failures(row for chunk in range(len(refs)) for row in rows_of(chunk))
        manifest = Manifest.new(
            self.plan.job,
            self.plan.chunk_images,
            checksums=[ref.checksum for ref in refs],
            counts={"images": self.plan.header.images, "failed": sum(ref.failed for ref in refs)},
            source_checksums=[ref.source_checksum for ref in refs],
            index_checksum=index_checksum,
        )
        self.storage.write_atomic(manifest_path(path), [manifest.to_json()])
        self.destination.remove_set_aside()
        self.journal.remove()
        report = self.tracker.report(manifest.counts, failures)
        return dataclasses.replace(report, damaged_chunks=len(self.damaged))

    def _write_index(self) -> str:
        """Write the index, if the source has image records; return its checksum, or ""."""
        if not self._journal_state.commit(0).records:
            return ""
        digest = xxhash.xxh3_64()

        def counted(content: Iterable[bytes]) -> Iterator[bytes]:
            for data in content:
                digest.update(data)
                yield data

        content = counted(index_content(self._journal_state))
        self.storage.write_atomic(index_path(self.target.path), content)
        return digest.hexdigest()


def _report_complete(found: TargetState, started_at: float) -> Report:
    """Return the report of a target that this job finished; raise SourceError if it changed."""
    plan, manifest = found.plan, found.manifest
    if manifest is None:
        raise RuntimeError(f"{plan.target} is complete but has no manifest")
    if not plan.job.is_encoded:
        target = open_target(plan.target, plan.result, chunk_images=manifest.chunk_images)
        target.read_back(0, 1)
    failures = first_failures(enumerate(read_index(plan.target.container, plan.header.images)))
    return ProgressTracker(plan, (), None, started_at).report(manifest.counts, failures)
