"""Carry a plan out: read, apply, write, commit, chunk by chunk, then publish.

The order is what makes a crash harmless. A chunk's bytes are durable before the journal says so,
the journal is complete before the data gets its name, and the manifest is written after that. A
run that was cut off anywhere is taken up by running it again.
"""

from __future__ import annotations

import functools
import itertools
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastvgg import engine
from fastvgg.datasets import open_target
from fastvgg.datasets.base import Chunk
from fastvgg.datasets.index import index_path, index_text, read_index
from fastvgg.errors import ResumeError, StoppedError, TargetError
from fastvgg.stream import inplace
from fastvgg.stream.behind import Behind
from fastvgg.stream.journal import Commit, Journal, journal_path
from fastvgg.stream.manifest import (
    Manifest,
    checksum,
    manifest_path,
    read_manifest,
)
from fastvgg.stream.prepare import changed, known_ledger, reopen_source
from fastvgg.stream.report import Failure, Tally
from fastvgg.stream.state import (
    find_state,
    refuse_occupied,
    replaceable,
    replaced_path,
    resumed,
)
from fastvgg.stream.storage import Storage
from fastvgg.stream.values import refuse_wrong_values
from fastvgg.transform import storage_dtype

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from fastvgg.datasets.base import Source
    from fastvgg.datasets.index import Record
    from fastvgg.stream.plan import Plan
    from fastvgg.stream.report import Progress, Report

__all__ = ["run"]


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
    if plan.in_place:
        return inplace.run(plan, progress, storage)
    storage = storage or Storage(plan.durability)
    begun = time.monotonic()
    target_path = Path(plan.target)
    source = reopen_source(plan)
    try:
        complete = find_state(plan, known_ledger(plan)) == "complete"
        # One that was killed while it had a look leaves a journal, which says nothing and goes.
        if complete and not os.path.lexists(journal_path(target_path)):
            storage.sync_disk(target_path.parent)
            return _report_of_complete(plan, begun)
        refuse_wrong_values(plan, source)
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
            self.plan = resumed(plan, journal.ledger.chunk_images, len(journal.ledger.commits))
        self.source = source
        self.journal = journal
        self.storage = storage
        self.begun = begun
        self.tally = Tally(self.plan, self._commits(), progress, begun)
        self.target = open_target(Path(plan.target), plan.result, storage, source.records)

    def finish(self) -> Report:
        """Do what is left to do."""
        if self.state != "fresh":  # a run that was killed may have synced no part of it
            self.storage.sync_disk(self.target.path.parent)
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
        stagings = itertools.cycle(
            [np.empty(shape, storage_dtype(self.plan.result.dtype)) for _ in range(2)]
        )
        with Behind[int]() as behind:
            for chunk, (start, stop) in enumerate(self.plan.chunk_rows()):
                if chunk in self._commits():
                    self._refuse_failed(start, self._commits()[chunk].records)
                    continue
                self.tally.count(behind.wait_for_all_but(2))
                out = next(stagings)[: stop - start]  # written, or `give` would not have returned
                computed = Chunk(out, self._apply(start, stop, out))
                commit = Commit(chunk, checksum(out), computed.records)
                behind.give(
                    functools.partial(self.target.write, start, computed),
                    functools.partial(self._commit, commit, stop - start),
                )
            self.tally.count(behind.wait_for_all_but(0))

    def _apply(self, start: int, stop: int, out: NDArray[Any]) -> list[Record]:
        """Read images and transform them; what cannot be read becomes zeros."""
        read = self.source.read(start, stop)
        self._refuse_failed(start, read.records)
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
        return read.records

    def _commit(self, commit: Commit, images: int) -> int:
        """Make a chunk that is written durable, and return its images."""
        self.target.sync()
        self.journal.commit(commit)
        return images

    def _refuse_failed(self, start: int, records: list[Record]) -> None:
        for row, record in enumerate(records, start):
            if record.failed and self.plan.strict:
                raise StoppedError(
                    f"{self.plan.source}/{record.path} (row {row}) cannot be read: {record.reason}",
                    "repair or remove it and give --restart, or go on without --strict",
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
        manifest = Manifest.of_now(
            self.plan.job(),
            self.plan.chunk_images,
            checksums=[commit.checksum for commit in commits],
            counts={"images": self.plan.header.images, "failed": len(failures)},
        )
        self.storage.write_whole(manifest_path(path), manifest.to_json())
        self.storage.remove(replaced_path(path))
        self.journal.remove()
        return self.tally.report(manifest.counts, failures)


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
    return Tally(plan, (), None, begun).report(counts, _failures(records))


def _failures(records: list[Record]) -> list[Failure]:
    return [
        Failure(row, record.path, record.reason)
        for row, record in enumerate(records)
        if record.failed
    ]
