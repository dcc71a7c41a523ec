"""Carry a plan out: read, apply, write, commit, chunk by chunk, then publish.

The order is what makes a crash harmless. A chunk's bytes are durable before the journal says so,
the journal is complete before the data gets its name, and the manifest is written after that. A
run that was cut off anywhere is taken up by running it again.
"""

from __future__ import annotations

import datetime as dt
import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np
import xxhash

from fastvgg import engine
from fastvgg.datasets import open_target
from fastvgg.datasets.base import Chunk
from fastvgg.datasets.index import index_path, index_text, read_index
from fastvgg.errors import ResumeError, SourceError, StoppedError, TargetError
from fastvgg.stream.journal import Commit, Journal
from fastvgg.stream.manifest import Manifest, manifest_path, package_versions, read_manifest
from fastvgg.stream.prepare import changed, known_ledger, reopen_source
from fastvgg.stream.state import (
    find_state,
    refuse_occupied,
    replaceable,
    replaced_path,
    resumed,
)
from fastvgg.stream.storage import Storage
from fastvgg.transform import storage_dtype

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from fastvgg.datasets.base import Source
    from fastvgg.datasets.index import Record
    from fastvgg.stream.plan import Plan

__all__ = ["Failure", "Progress", "Report", "checksum", "run"]

IMAGES_LOOKED_AT: Final = 16


class Progress(NamedTuple):
    """How far a run is, after every chunk."""

    images: int
    """Done, with those of earlier runs."""
    of_images: int
    computed_images: int
    """Done by this run."""
    read_bytes: int
    written_bytes: int
    seconds: float


@dataclass(frozen=True)
class Failure:
    """An image that could not be read: its row is zeros."""

    row: int
    path: str
    reason: str


@dataclass(frozen=True)
class Report:
    """What a run did."""

    target: str
    counts: dict[str, int]
    """images, failed, chunks, computed_chunks: this run's; the rest was there before."""
    failures: list[Failure]
    seconds: float
    read_bytes: int
    written_bytes: int
    peak_bytes: int
    """The most memory that the process has had resident."""
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        images, failed = self.counts["images"], self.counts["failed"]
        computed, chunks = self.counts["computed_chunks"], self.counts["chunks"]
        earlier = f", chunks there already: {chunks - computed} of {chunks}"
        earlier = earlier if computed < chunks else ""
        bad = f", {failed} could not be read" if failed else ""
        return f"{self.target}: {images} images in {self.seconds:.1f} s{earlier}{bad}"


def checksum(batch: NDArray[Any]) -> str:
    """Return the xxh3-64 of a contiguous batch's bytes."""
    return xxhash.xxh3_64_hexdigest(batch.view(np.uint8).reshape(-1).data)


def run(
    plan: Plan,
    progress: Callable[[Progress], None] | None = None,
    storage: Storage | None = None,
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
    storage = storage or Storage()
    begun = time.monotonic()
    target_path = Path(plan.target)
    source = reopen_source(plan)
    try:
        if find_state(plan, known_ledger(plan)) == "complete":
            return _report_of_complete(plan, begun)
        _refuse_wrong_values(plan, source)
        journal = Journal(target_path, storage, restart=plan.restart)
        try:
            return _Run(plan, source, journal, storage, progress, begun).finish()
        finally:
            journal.close()
    finally:
        source.close()


class _Run:
    """One run of a plan, holding the journal's lock."""

    def __init__(
        self,
        plan: Plan,
        source: Source,
        journal: Journal,
        storage: Storage,
        progress: Callable[[Progress], None] | None,
        begun: float,
    ) -> None:
        # Between the first look and the lock another run may have begun or ended.
        self.state = find_state(plan, journal.ledger)
        self.plan = plan
        if self.state == "resumable" and journal.ledger is not None:
            self.plan = resumed(plan, journal.ledger)
        self.source = source
        self.journal = journal
        self.storage = storage
        self.progress = progress
        self.begun = begun
        self.computed_chunks = 0
        self.computed_images = 0
        self.target = open_target(Path(plan.target), plan.result, storage, source.records)

    def finish(self) -> Report:
        """Do what is left to do."""
        if self.state == "complete":
            return _report_of_complete(self.plan, self.begun)
        if self._published():
            self._refuse_wrong_checksums()
        else:
            try:
                self._open_target()
                self._compute()
            finally:
                self.target.close()
            self._publish()
        return self._describe()

    def _published(self) -> bool:
        """Whether an earlier run gave the data its name, and was cut off before the manifest."""
        return (
            self.state == "resumable"
            and not self.target.partial.exists()
            and self.target.path.exists()
            and len(self._commits()) == self.plan.chunks
        )

    def _refuse_wrong_checksums(self) -> None:
        for chunk, (start, stop) in enumerate(self.plan.chunk_rows()):
            if checksum(self.target.read_back(start, stop)) != self._commits()[chunk].checksum:
                raise ResumeError(
                    f"{self.plan.target} is not what the unfinished run wrote: images {start} to "
                    f"{stop - 1} differ",
                    "give --restart to replace it, or another name",
                )

    def _publish(self) -> None:
        if changed(self.plan, self.source):
            raise StoppedError(
                f"{self.plan.source} changed while it was read: the result may be a mixture",
                "let it be still, and run again with --restart",
            )
        refuse_occupied(self.plan, self.journal.ledger.replaces if self.journal.ledger else None)
        for described in (manifest_path, index_path):  # what is said of the data that is replaced
            self.storage.remove(described(self.target.path))
        self._make_way()
        self.target.publish()

    def _make_way(self) -> None:
        """Move away a directory that has the name: one cannot be renamed over another."""
        path, replaced = self.target.path, replaced_path(self.target.path)
        if self.plan.target_kind == "images" and os.path.lexists(path):
            self.storage.remove(replaced)
            self.storage.rename(path, replaced)
            self.storage.sync_directory(path.parent)

    def _commits(self) -> dict[int, Commit]:
        return self.journal.ledger.commits if self.journal.ledger is not None else {}

    def _open_target(self) -> None:
        if self.state == "resumable" and self._commits():
            self.target.reopen()
            return
        if self.state == "fresh":
            replaces = replaceable(self.plan) if self.plan.restart else None
            self.journal.begin(self.plan.job(), self.plan.chunk_images, replaces=replaces)
        try:
            self.target.create()
        except TargetError:  # no room: as if nothing had been begun
            self.journal.remove()
            raise

    def _compute(self) -> None:
        """Compute, write and commit every chunk that is not durable yet."""
        shape = (self.plan.chunk_images, *self.plan.result.shape[1:])
        staging = np.empty(shape, storage_dtype(self.plan.result.dtype))
        for chunk, (start, stop) in enumerate(self.plan.chunk_rows()):
            if chunk in self._commits():
                self._refuse_failed(start, self._commits()[chunk].records)
                continue
            read = self.source.read(start, stop)
            self._refuse_failed(start, read.records)
            out = staging[: stop - start]
            engine.apply(
                self.plan.transform,
                read.batch,
                out,
                threads=self.plan.threads,
                backend=self.plan.backend,
                read_next=True,
            )
            for row, record in enumerate(read.records):
                if record.failed:
                    out[row] = 0
            self.target.write(start, Chunk(out, read.records))
            self.target.sync()
            self.journal.commit(Commit(chunk, checksum(out), read.records))
            self.computed_chunks += 1
            self.computed_images += stop - start
            del read  # before the next window is mapped, or two would be resident
            self._tell_progress()

    def _refuse_failed(self, start: int, records: list[Record]) -> None:
        for row, record in enumerate(records, start):
            if record.failed and self.plan.strict:
                raise StoppedError(
                    f"{self.plan.source}/{record.path} (row {row}) cannot be read: {record.reason}",
                    "repair or remove it and give --restart, or go on without --strict",
                )

    def _tell_progress(self) -> None:
        if self.progress is not None:
            header, result = self.plan.header, self.plan.result
            images = min(len(self._commits()) * self.plan.chunk_images, header.images)
            share = self.computed_images / header.images
            self.progress(
                Progress(
                    images,
                    header.images,
                    self.computed_images,
                    int(self.plan.read_bytes * share),
                    self.computed_images * result.image_bytes,
                    time.monotonic() - self.begun,
                )
            )

    def _describe(self) -> Report:
        """Write index and manifest beside the published data, and forget the journal."""
        commits = [self._commits()[chunk] for chunk in range(self.plan.chunks)]
        records = [record for commit in commits for record in commit.records]
        failures = _failures(records)
        path = self.target.path
        if records:
            text = "".join(index_text(records))
            self.storage.write_whole(index_path(path), text.encode("utf-8", "surrogateescape"))
        else:
            self.storage.remove(index_path(path))
        manifest = Manifest(
            job=self.plan.job(),
            chunk_images=self.plan.chunk_images,
            checksums=[commit.checksum for commit in commits],
            counts={"images": self.plan.header.images, "failed": len(failures)},
            created=dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
            packages=package_versions(),
        )
        self.storage.write_whole(manifest_path(path), manifest.to_json())
        self.storage.remove(replaced_path(path))
        self.journal.remove()
        share = self.computed_images / self.plan.header.images
        return Report(
            target=self.plan.target,
            counts={
                **manifest.counts,
                "chunks": self.plan.chunks,
                "computed_chunks": self.computed_chunks,
            },
            failures=failures,
            seconds=time.monotonic() - self.begun,
            read_bytes=int(self.plan.read_bytes * share),
            written_bytes=self.computed_images * self.plan.result.image_bytes,
            peak_bytes=_peak_bytes(),
            notes=list(self.plan.notes),
        )


def _report_of_complete(plan: Plan, begun: float) -> Report:
    """Report a target that this job finished before, after a look at whether it is whole.

    Raises
    ------
    SourceError
        If its header, or its length, is no longer what was written.
    """
    if plan.target_kind == "npy":
        open_target(Path(plan.target), plan.result, Storage()).read_back(0, 1)
    manifest = read_manifest(Path(plan.target))
    counts = {} if manifest is None else manifest.counts
    records = read_index(Path(plan.target), plan.header.images)
    return Report(
        target=plan.target,
        counts={**counts, "chunks": plan.chunks, "computed_chunks": 0},
        failures=_failures(records),
        seconds=time.monotonic() - begun,
        read_bytes=0,
        written_bytes=0,
        peak_bytes=_peak_bytes(),
        notes=list(plan.notes),
    )


def _failures(records: list[Record]) -> list[Failure]:
    return [
        Failure(row, record.path, record.reason)
        for row, record in enumerate(records)
        if record.failed
    ]


def _refuse_wrong_values(plan: Plan, source: Source) -> None:
    """Look at some images of a floating source before anything is written.

    Images have values 0..255. Network inputs are negative in all but bright images, and hold
    fractions; in tf mode an all white image is all ones.

    Raises
    ------
    SourceError
        If network inputs would be preprocessed again, or images restored.
    """
    if plan.header.dtype == "uint8" or read_manifest(Path(plan.source)) is not None:
        return  # the type, or the manifest, has told already
    images, looked_at = plan.header.images, min(IMAGES_LOOKED_AT, plan.header.images)
    rows = sorted({image * images // looked_at for image in range(looked_at)})
    values = [source.read(row, row + 1).batch.astype(np.float64) for row in rows]
    least = float(np.min([image.min() for image in values]))  # NaN wins, unlike with min()
    most = float(np.max([image.max() for image in values]))
    is_image = least >= 0 and most <= 255  # false for NaN
    found = (
        f"{plan.source}: {len(rows)} images looked at hold values from {least:.6g} to {most:.6g}"
    )
    if plan.transform.direction == "preprocess" and not is_image:
        raise SourceError(
            f"{found}: not images (0 to 255), but perhaps preprocessed already",
            "preprocess the images themselves, or restore this dataset first",
        )
    whole = all(np.array_equal(image, np.trunc(image)) for image in values)
    if plan.transform.direction == "restore" and is_image and whole and most > 1:
        raise SourceError(
            f"{found}, all whole numbers: images, which were never preprocessed",
            "there is nothing to restore; to store images as uint8 convert their type",
        )


def _peak_bytes() -> int:
    try:
        import resource
    except ImportError:  # not on this system
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes there, KiB elsewhere
