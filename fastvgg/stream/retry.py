"""Take a finished array of images up again, for those that could not be read.

It becomes an unfinished run: the journal says that its good chunks are done, then it loses its
name, and from there on all is as after a crash. Of a chunk with failures the good rows are kept, if
the images that they were made of are still the same, and a checksum proves what is kept.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
from typing import TYPE_CHECKING, Any

from fastvgg.datasets.base import bytes_of
from fastvgg.datasets.index import index_path, index_text, read_index
from fastvgg.errors import ResumeError, TargetError
from fastvgg.stream.compute import ChunkTask
from fastvgg.stream.journal import Commit, check_same_job
from fastvgg.stream.manifest import checksum, read_manifest
from fastvgg.stream.state import with_committed
from fastvgg.stream.target import destination_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from fastvgg.datasets.base import ImageRecord
    from fastvgg.datasets.contiguous import ContiguousTarget
    from fastvgg.datasets.images import ImageSource
    from fastvgg.stream.manifest import Manifest
    from fastvgg.stream.plan import Plan

__all__ = ["FailureRetry", "plan_retry"]


def plan_retry(plan: Plan, source: ImageSource) -> Plan:
    """Return the plan with the chunks of the finished target; refuse what does not fit it.

    Raises
    ------
    ResumeError
        If it is of another job, or the source's names are others.
    """
    again = FailureRetry(plan, source)
    again.check_same_names()
    failed = again.manifest.counts["failed"]
    noted = dataclasses.replace(
        plan, notes=(*plan.notes, f"images that failed and are tried again: {failed}")
    )
    return with_committed(noted, again.manifest.chunk_images, sum(1 for _ in again.done()))


class FailureRetry:
    """What is known of a finished target that is taken up again.

    Raises
    ------
    TargetError
        If it is not there.
    ResumeError
        If it is of another job.
    """

    def __init__(self, plan: Plan, source: ImageSource) -> None:
        self.target = destination_of(plan).path
        self.plan = plan
        self.source = source
        self.manifest = self._manifest()
        self.records = read_index(self.target, plan.header.images)

    def _manifest(self) -> Manifest:
        """Return the target's manifest; other images may be refused now, but no more of them."""
        manifest = read_manifest(self.target)
        if manifest is None:
            raise TargetError(
                f"{self.target} is not finished, or was not made by fastvgg: nothing failed in it",
                "run the command without --retry-failed",
            )
        found, wanted = manifest.job, self.plan.job()
        source = {**found["source"], "fingerprint": wanted["source"]["fingerprint"]}
        if found["source"].get("gray16") == "error":
            source["gray16"] = wanted["source"]["gray16"]
        if found["source"].get("max_pixels", 0) < wanted["source"]["max_pixels"]:
            source["max_pixels"] = wanted["source"]["max_pixels"]
        check_same_job({**found, "source": source}, wanted, self.plan.target)
        return manifest

    def check_same_names(self) -> None:
        """Refuse a source whose images have other names than the rows have.

        Raises
        ------
        ResumeError
            Naming the first.
        """
        for row, record in enumerate(self.records):
            name = os.fsdecode(self.source.listing.name(row))
            if name != record.path:
                raise ResumeError(
                    f"{self.source.path} has {name!r} where {index_path(self.target)} has "
                    f"{record.path!r} (row {row})",
                    "put back what was renamed or removed, or give --restart",
                )

    def done(self) -> Iterator[Commit]:
        """Return the chunks that stay as they are."""
        for chunk, records in self._chunks():
            if not any(record.failed for record in records) and self._same(chunk, records):
                sums = self.manifest.checksums[chunk], self.manifest.source_checksums[chunk]
                first = chunk * self.manifest.chunk_images
                yield Commit(chunk, *sums, index_text(records, first), failed=0)

    def work(self, chunk: int, start: int, stop: int, target: ContiguousTarget) -> ChunkTask:
        """Return what is to be done again of a chunk."""
        records = [*self.records[start:stop]]
        if not self._same(chunk, records):
            return ChunkTask(chunk, start, stop)
        return ChunkTask(
            chunk, start, stop, functools.partial(self._keep, chunk, start, target, records)
        )

    def _keep(
        self,
        chunk: int,
        start: int,
        target: ContiguousTarget,
        records: list[ImageRecord],
        out: NDArray[Any],
    ) -> list[ImageRecord]:
        """Read what a chunk's good rows hold.

        Raises
        ------
        ResumeError
            If it is not what was written.
        """
        target.read_partial(start, out)
        for at, record in enumerate(records):
            if record.failed:  # or an attempt that was cut off may have written into it
                out[at] = 0
        if checksum([bytes_of(out)]) != self.manifest.checksums[chunk]:
            raise ResumeError(
                f"{target.partial}: images {start} to {start + len(out) - 1} are not what was "
                "written",
                "the file was changed or damaged since: give --restart",
            )
        return records

    def _same(self, chunk: int, records: list[ImageRecord]) -> bool:
        """Whether the images that the good rows of a chunk were made of are still the same."""
        first = chunk * self.manifest.chunk_images
        failed = {row for row, record in enumerate(records, first) if record.failed}
        found = self.source.checksum_of(first, first + len(records), failed)
        return found == self.manifest.source_checksums[chunk]

    def _chunks(self) -> Iterator[tuple[int, list[ImageRecord]]]:
        records = iter(self.records)
        for chunk in range(len(self.manifest.checksums)):
            yield chunk, list(itertools.islice(records, self.manifest.chunk_images))
