"""Retry the images that failed to decode in a finished dataset.

The target becomes an unfinished run: a new journal records its good chunks as committed, then the
data is renamed to its partial name, and the run proceeds as after a crash. In a chunk with failures
the good rows are kept if their source images are unchanged; a checksum verifies what is kept.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
from typing import TYPE_CHECKING, Any

from fastvgg.datasets.base import bytes_of
from fastvgg.datasets.index import index_path, read_index
from fastvgg.errors import ResumeError, TargetError
from fastvgg.stream.compute import ChunkTask
from fastvgg.stream.journal import Commit
from fastvgg.stream.manifest import checksum
from fastvgg.stream.target import with_committed

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from fastvgg.datasets.base import ImageRecord
    from fastvgg.datasets.contiguous import ContiguousTarget
    from fastvgg.datasets.images import ImageSource
    from fastvgg.stream.manifest import Manifest
    from fastvgg.stream.plan import Plan


def plan_retry(plan: Plan, source: ImageSource, manifest: Manifest | None) -> Plan:
    """Return the plan with the chunk size and good chunks of the finished target.

    Raises
    ------
    ResumeError
        If the target was made with other settings, or the source's file names have changed.
    """
    retry = FailureRetry(plan, source, manifest)
    retry.check_same_names()
    failed = retry.manifest.counts["failed"]
    with_note = dataclasses.replace(plan, notes=(*plan.notes, f"failed images to retry: {failed}"))
    return with_committed(
        with_note, retry.manifest.chunk_images, sum(1 for _ in retry.good_commits())
    )


class FailureRetry:
    """A retry of the failed images of a finished target.

    Raises
    ------
    TargetError
        If the target is not finished.
    ResumeError
        If it was made with other settings.
    """

    def __init__(self, plan: Plan, source: ImageSource, manifest: Manifest | None) -> None:
        self.target = plan.target.container
        self.plan = plan
        self.source = source
        self.manifest = self._check_manifest(manifest)
        self.records = read_index(self.target, plan.header.images)

    def _check_manifest(self, manifest: Manifest | None) -> Manifest:
        """Return the target's manifest; only settings that accept more images may differ."""
        if manifest is None:
            raise TargetError(
                f"{self.target} is not a finished dataset of fastvgg: there is nothing to retry",
                "rerun the command without --retry-failed",
            )
        found, expected = manifest.job, self.plan.job()
        then, now = found.decoding, expected.decoding
        if then is not None and now is not None:
            if then.gray16 == "error":
                then = dataclasses.replace(then, gray16=now.gray16)
            if then.max_pixels < now.max_pixels:
                then = dataclasses.replace(then, max_pixels=now.max_pixels)
        comparable = dataclasses.replace(found, fingerprint=expected.fingerprint, decoding=then)
        comparable.check_same(expected, str(self.plan.target))
        return manifest

    def check_same_names(self) -> None:
        """Check that the source's image names match the target's index.

        Raises
        ------
        ResumeError
            Naming the first mismatch.
        """
        for row, record in enumerate(self.records):
            name = os.fsdecode(self.source.listing.name(row))
            if name != record.path:
                raise ResumeError(
                    f"row {row} is {name!r} in {self.source.location}, but {record.path!r} in "
                    f"{index_path(self.target)}",
                    "restore the renamed or removed images, or give --restart to start over",
                )

    def good_commits(self) -> Iterator[Commit]:
        """Yield the commits of the chunks that need no retry."""
        for chunk, records in self._chunks():
            if not any(record.failed for record in records) and self._is_unchanged(chunk, records):
                sums = self.manifest.checksums[chunk], self.manifest.source_checksums[chunk]
                yield Commit(chunk, *sums, records)

    def task(self, chunk: int, start: int, stop: int, target: ContiguousTarget) -> ChunkTask:
        """Return the task that recomputes a chunk, or only its failed rows."""
        records = [*self.records[start:stop]]
        if not self._is_unchanged(chunk, records):
            return ChunkTask(chunk, start, stop)
        return ChunkTask(
            chunk,
            start,
            stop,
            functools.partial(self._load_existing, chunk, start, target, records),
        )

    def _load_existing(
        self,
        chunk: int,
        start: int,
        target: ContiguousTarget,
        records: list[ImageRecord],
        out: NDArray[Any],
    ) -> list[ImageRecord]:
        """Read the stored rows of a chunk into `out`; return its records.

        Raises
        ------
        ResumeError
            If the rows do not match their checksum.
        """
        target.read_partial(start, out)
        for row, record in enumerate(records):
            if record.failed:  # an interrupted retry may have written here
                out[row] = 0
        if checksum([bytes_of(out)]) != self.manifest.checksums[chunk]:
            raise ResumeError(
                f"{target.partial}: images {start} to {start + len(out) - 1} do not match their "
                "checksum",
                "the file was changed or damaged: give --restart to start over",
            )
        return records

    def _is_unchanged(self, chunk: int, records: list[ImageRecord]) -> bool:
        """Return whether the source images of a chunk's good rows are unchanged."""
        first = chunk * self.manifest.chunk_images
        failed = {row for row, record in enumerate(records, first) if record.failed}
        found = self.source.checksum_of(first, first + len(records), failed)
        return found == self.manifest.source_checksums[chunk]

    def _chunks(self) -> Iterator[tuple[int, list[ImageRecord]]]:
        records = iter(self.records)
        for chunk in range(len(self.manifest.checksums)):
            yield chunk, list(itertools.islice(records, self.manifest.chunk_images))
