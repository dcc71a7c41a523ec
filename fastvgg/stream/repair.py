"""Repair a finished dataset: recompute its damaged chunks from the source and overwrite them.

The manifest has the checksum of every chunk. A chunk is written only if its recomputed bytes have
that checksum, so the manifest and the index stay as they are, and no journal is needed: a crash
leaves a chunk damaged or repaired, and the same command repairs the rest. The dataset keeps its
name, and readers of its other chunks are not disturbed.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np

from fastvgg.datasets.open import embedded_transform
from fastvgg.errors import FastvggError, SourceError, StoppedError, TargetError
from fastvgg.storage.location import Location
from fastvgg.storage.objects import ObjectStorage
from fastvgg.stream.compute import ChunkTask, compute
from fastvgg.stream.finished import problem_of
from fastvgg.stream.journal import check_is_journal, journal_path
from fastvgg.stream.journal_writer import FileJournal, StoreJournal
from fastvgg.stream.manifest import checksum
from fastvgg.stream.plan import Plan
from fastvgg.stream.preflight import check_directory
from fastvgg.stream.source import open_job_source, unfinished_error
from fastvgg.stream.target import with_committed

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from fastvgg.datasets.base import Payload, Source
    from fastvgg.errors import DamagedChunk
    from fastvgg.storage.local import Storage
    from fastvgg.stream.compute import ChunkResult
    from fastvgg.stream.finished import CheckCounter, FinishedDataset
    from fastvgg.stream.journal_writer import Journal

FOREIGN: Final = (
    "no chunk matches its checksum, and no image its recomputed one: this may be another dataset "
    "than the manifest describes"
)


class Repaired(NamedTuple):
    """The outcome of a repair."""

    chunks: int
    """Number of chunks that were repaired."""
    damaged: list[DamagedChunk]
    """The others, with the reason why each was not."""
    differences: list[str]
    """What is still wrong with the header and the length."""
    refusal: str = ""
    """Why nothing was repaired; empty if anything was, or could have been."""


@contextlib.contextmanager
def locked(location: Location, storage: Storage | ObjectStorage) -> Iterator[None]:
    """Hold the lock of a dataset, so that no run writes it; a store has no locks.

    Raises
    ------
    TargetError, SourceError
        If it cannot be overwritten, or a run or another repair is writing it.
    """
    path = location.container
    journal: Journal
    check_is_journal(journal_path(path))
    if isinstance(storage, ObjectStorage):
        journal = StoreJournal(path, storage, restart=False)
    else:
        if path.is_symlink():
            raise TargetError(
                f"{path} is a symbolic link", f"give the file itself: {path.resolve()}"
            )
        check_directory(path)
        journal = FileJournal(path, storage, restart=False)
    with contextlib.closing(journal):
        if journal.state is not None:
            raise unfinished_error(location)
        yield


def repair(
    dataset: FinishedDataset,
    damaged: list[DamagedChunk],
    differences: list[str],
    counter: CheckCounter,
) -> Repaired:
    """Recompute damaged chunks and overwrite them; then restore the header, if all are intact.

    The caller holds the lock. `damaged` and `differences` were found before.

    Raises
    ------
    StoppedError
        If a system call fails; rerun the command to resume.
    """
    job = dataset.manifest.job
    if job.in_place:
        return Repaired(0, damaged, differences, "its source was overwritten in place")
    try:
        plan = _plan(dataset, len(damaged))
        source = open_job_source(job, plan.decoding_bytes, dataset.threads)
    except (FastvggError, OSError) as error:
        return Repaired(0, damaged, differences, problem_of(error))
    with contextlib.closing(source):
        if source.header != job.header:
            refusal = f"{source.location} has changed: it has shape {source.header.shape}"
            return Repaired(0, damaged, differences, refusal)
        repairing = _Repair(dataset, plan, source)
        if not repairing.is_proven(damaged):
            return Repaired(0, damaged, differences, FOREIGN)
        counter.expect(sum(chunk.stop - chunk.start for chunk in damaged))
        remaining = []
        for chunk in damaged:
            problem = repairing.repair(chunk)
            if problem:
                reason = f"{chunk.reason}; not repaired: {problem}"
                remaining.append(chunk._replace(reason=reason))
            counter.count(chunk.stop - chunk.start, 0)
    # Only complete rows make it a dataset: a header would let others read it before.
    if differences and not remaining:
        differences = dataset.stored.repair_header()
    return Repaired(len(damaged) - len(remaining), remaining, differences)


def _plan(dataset: FinishedDataset, damaged_chunks: int) -> Plan:
    """Return the plan of the run that wrote a dataset; raise TargetError if it does not fit."""
    manifest = dataset.manifest
    plan = Plan(
        source=Location.parse(manifest.job.source),
        target=dataset.location,
        job=manifest.job,
        read_bytes=0,
        notes=(),
        memory_bytes=dataset.memory_bytes,
        threads=dataset.threads,
        backend="auto",
        strict=False,
        restart=False,
        retry_failed=False,
        fsync=True,
    )
    return with_committed(plan, manifest.chunk_images, dataset.chunks - damaged_chunks)


class _Repair:
    """Recompute and overwrite chunks of a dataset, from its open source."""

    def __init__(self, dataset: FinishedDataset, plan: Plan, source: Source) -> None:
        self._dataset = dataset
        self._plan = plan
        self._source = source

    def is_proven(self, damaged: Sequence[DamagedChunk]) -> bool:
        """Return whether what is stored is what the manifest describes, apart from the damage.

        An intact chunk proves it, an intact image, or the transform in the attributes of an array.
        """
        dataset = self._dataset
        if len(damaged) < dataset.chunks:
            return True
        with contextlib.suppress(SourceError):
            if embedded_transform(dataset.location) == dataset.manifest.job.transform.to_dict():
                return True
        return any(self._has_intact_image(chunk) for chunk in damaged)

    def _has_intact_image(self, chunk: DamagedChunk) -> bool:
        try:
            computed = self._recompute(chunk)
        except (FastvggError, OSError):
            return False
        rows = range(chunk.start, chunk.stop)
        images: Iterable[Any] = computed.stored
        if not self._plan.job.is_encoded:
            images = np.frombuffer(computed.stored[0], np.uint8).reshape(len(rows), -1)
        return any(map(self._is_intact, rows, map(bytes, images)))

    def _is_intact(self, row: int, expected: bytes) -> bool:
        """Return whether a row is stored as expected; one of zeros proves nothing."""
        if not any(expected):
            return False
        try:
            stored = self._dataset.stored.stored_spans(row, row + 1, len(expected))
            return b"".join(map(bytes, stored)) == expected
        except (FastvggError, OSError):
            return False

    def repair(self, chunk: DamagedChunk) -> str:
        """Recompute a chunk and overwrite it; return why that is impossible, or ""."""
        try:
            computed = self._recompute(chunk)
        except (FastvggError, OSError) as error:
            return problem_of(error)
        try:
            self._dataset.stored.repair(chunk.start, computed.stored)
        except StoppedError:
            raise
        except FastvggError as error:
            return error.problem
        still = self._dataset.damaged_chunks([chunk.chunk], lambda _images, _nbytes: None)
        return still[0].reason if still else ""

    def _recompute(self, chunk: DamagedChunk) -> ChunkResult:
        """Compute a chunk from the source; raise SourceError if it is not what was written."""
        number, (start, stop) = chunk.chunk, self._dataset.chunk_rows(chunk.chunk)
        target, task = self._dataset.stored, ChunkTask(number, start, stop)
        with contextlib.closing(compute(self._plan, self._source, target, [task])) as results:
            computed = next(results)
        stored = self._as_recorded(computed)
        actual, expected = checksum(stored), self._dataset.manifest.checksums[number]
        if actual != expected:
            raise SourceError(
                f"recomputed from {self._source.location} {self._unlike(computed)}",
                "restore the source as it was, or use the versions of the packages that the "
                "manifest names",
            )
        return computed._replace(stored=stored)

    def _as_recorded(self, computed: ChunkResult) -> Payload:
        """Return a payload in which the rows that the index lists as failed are empty."""
        failed = self._dataset.failed_rows(computed.start, computed.stop)
        rows = [row - computed.start for row in failed]
        if self._plan.job.is_encoded:
            return [b"" if row in rows else data for row, data in enumerate(computed.stored)]
        (data,) = computed.stored
        images = np.frombuffer(data, np.uint8).reshape(computed.stop - computed.start, -1)
        images[rows] = 0
        return computed.stored

    def _unlike(self, computed: ChunkResult) -> str:
        """Return why recomputed images differ from those that were written."""
        listed = self._dataset.records[computed.start : computed.stop]
        for row, (then, now) in enumerate(
            zip(listed, computed.records, strict=False), computed.start
        ):
            if now.failed and not then.failed:
                return f"image {row} cannot be read any more: {now.path}: {now.reason}"
            if now.path != then.path:
                return f"image {row} is {now.path!r}, not {then.path!r}"
        return "they have another checksum: the source, or a library, has changed"
