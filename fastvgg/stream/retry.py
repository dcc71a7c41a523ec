"""Retry the images that failed to decode in a finished dataset.

The target becomes an unfinished run: a new journal records its good chunks as committed, then the
data is renamed to its partial name, and the run proceeds as after a crash. In a chunk with failures
the good rows are kept if their source images are unchanged; a checksum verifies what is kept.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
from typing import TYPE_CHECKING, Any

from fastvgg.datasets.base import byte_view
from fastvgg.datasets.index import index_path, read_index
from fastvgg.errors import ResumeError, SourceError, TargetError, option
from fastvgg.stream.compute import ChunkTask
from fastvgg.stream.journal import Commit
from fastvgg.stream.manifest import checksum
from fastvgg.stream.ownership import Written, find_change
from fastvgg.stream.target import with_committed

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from fastvgg.datasets.base import ImageRecord
    from fastvgg.datasets.contiguous import ContiguousTarget
    from fastvgg.datasets.images import ImageSource
    from fastvgg.storage.location import Location
    from fastvgg.stream.manifest import Manifest
    from fastvgg.stream.plan import Plan


def plan_retry(plan: Plan, source: ImageSource, manifest: Manifest | None) -> Plan:
    """Return the plan with the chunk size and good chunks of the finished target.

    Raises what `FailureRetry` does, and ResumeError if the source's file names have changed.
    """
    retry = FailureRetry(plan, source, manifest)
    for row, record in enumerate(retry.records):
        name = os.fsdecode(source.listing.name(row))
        if name != record.path:
            raise ResumeError(
                f"row {row} is {name!r} in {source.location}, but {record.path!r} in "
                f"{index_path(retry.target)}",
                f"restore the renamed or removed images, or give {option('restart')} to start over",
            )
    failed = retry.manifest.counts["failed"]
    with_note = dataclasses.replace(plan, notes=(*plan.notes, f"failed images to retry: {failed}"))
    return with_committed(
        with_note, retry.manifest.chunk_images, sum(1 for _ in retry.good_commits())
    )


def check_nothing_failed(target: Location, manifest: Manifest) -> None:
    """Check that no image of a finished target failed."""
    failed = manifest.counts["failed"]
    if failed:
        records = read_index(target.container, manifest.header.images)
        row, record = next((row, record) for row, record in enumerate(records) if record.failed)
        raise SourceError(
            f"{failed} of the images of {target} failed; the first is row {row}, {record.path}: "
            f"{record.reason}",
            f"fix them and rerun with {option('retry_failed')}, or rerun without "
            f"{option('strict')}",
        )


class FailureRetry:
    """A retry of the failed images of a finished target.

    Raises TargetError if the target is not finished, ResumeError if it has other settings.
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
                f"rerun without {option('retry_failed')}",
            )
        job = self.plan.job
        recorded, requested = manifest.job.decoding, job.decoding
        if recorded is not None and requested is not None:
            if not recorded.scale_to_uint8:
                scale = requested.scale_to_uint8
                recorded = dataclasses.replace(recorded, scale_to_uint8=scale)
            if recorded.max_pixels < requested.max_pixels:
                recorded = dataclasses.replace(recorded, max_pixels=requested.max_pixels)
        comparable = dataclasses.replace(
            manifest.job, fingerprint=job.fingerprint, decoding=recorded
        )
        comparable.check_same(job, str(self.plan.target), is_finished=True)
        return manifest

    def check_unchanged(self) -> None:
        """Check that the finished target is as it was written; raise TargetError otherwise.

        The retry renames it, overwrites its failed rows, and keeps the others.
        """
        change = find_change(self.target, Written.by_manifest(self.manifest), read=True)
        if change is not None:
            raise TargetError(
                f"{self.target} was changed since fastvgg wrote it: {change}",
                "move it away, or choose another name: a run makes all rows again",
            )

    def good_commits(self) -> Iterator[Commit]:
        """Yield the commits of the chunks that need no retry."""
        rows = iter(self.records)
        checksums = zip(self.manifest.checksums, self.manifest.source_checksums, strict=True)
        for chunk, sums in enumerate(checksums):
            records = list(itertools.islice(rows, self.manifest.chunk_images))
            if not any(record.failed for record in records) and self._is_unchanged(chunk, records):
                yield Commit(chunk, *sums, records)

    def task(self, chunk: int, start: int, stop: int, target: ContiguousTarget) -> ChunkTask:
        """Return the task that recomputes a chunk, or only its failed rows."""
        records = [*self.records[start:stop]]

        def load_existing(out: NDArray[Any]) -> list[ImageRecord]:
            target.read_partial(start, out)
            for row, record in enumerate(records):
                if record.failed:  # an interrupted retry may have written here
                    out[row] = 0
            if checksum([byte_view(out)]) != self.manifest.checksums[chunk]:
                raise ResumeError(
                    f"{target.partial}: images {start} to {stop - 1} do not match their checksum",
                    f"move it away, and start over with {option('restart')}",
                )
            return records

        is_unchanged = self._is_unchanged(chunk, records)
        return ChunkTask(chunk, start, stop, load_existing if is_unchanged else None)

    def _is_unchanged(self, chunk: int, records: list[ImageRecord]) -> bool:
        """Return whether the source images of a chunk's good rows are unchanged."""
        first = chunk * self.manifest.chunk_images
        failed = {row for row, record in enumerate(records, first) if record.failed}
        found = self.source.identity_checksum(first, first + len(records), failed)
        return found == self.manifest.source_checksums[chunk]
