"""Progress and Report: the progress of a run and its outcome."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, NamedTuple

from fastvgg.errors import option
from fastvgg.escaping import escape_controls
from fastvgg.formatting import format_count, html_table

if TYPE_CHECKING:
    from collections.abc import Iterable

    from fastvgg.datasets.base import ImageRecord

MAX_FAILURES_KEPT: Final = 1000
MAX_FAILURES_SHOWN: Final = 10


class Progress(NamedTuple):
    """Progress of a run, after every chunk that it checks or commits."""

    images: int
    """Images committed, including those of earlier runs; or so far checked of those."""
    total_images: int
    computed_images: int
    """Images committed by this run."""
    read_bytes: int
    written_bytes: int
    seconds: float


@dataclass(frozen=True)
class Failure:
    """An image that could not be read: its row is zeros."""

    row: int
    path: str
    reason: str


def first_failures(rows: Iterable[tuple[int, ImageRecord]]) -> list[Failure]:
    """Return the first of the rows that failed."""
    failures = (Failure(row, record.path, record.reason) for row, record in rows if record.failed)
    return list(itertools.islice(failures, MAX_FAILURES_KEPT))


@dataclass(frozen=True)
class Report:
    """The outcome of a run."""

    target: str
    counts: dict[str, int]
    """images, failed, chunks, computed_chunks (by this run; earlier runs computed the rest)."""
    failures: list[Failure]
    """The first thousand; the index lists all."""
    seconds: float
    read_bytes: int
    written_bytes: int
    peak_bytes: int
    """Peak resident memory of the process."""
    notes: list[str] = field(default_factory=list)
    damaged_chunks: int = 0
    """Chunks of an earlier run whose stored bytes were changed since; this run replaced them."""

    @property
    def remedy(self) -> str:
        """What to do about images that failed to decode."""
        from fastvgg.imaging.modes import NOT_SCALED  # which imports NumPy, and help does not

        retry = f"fix these files, then rerun the same command with {option('retry_failed')}"
        if any(NOT_SCALED in failure.reason for failure in self.failures):
            retry += f"; 16-bit and floating-point images need {option('scale_to_uint8')}"
        return retry

    def _summary_rows(self) -> list[tuple[str, str]]:
        computed, chunks = self.counts["computed_chunks"], self.counts["chunks"]
        rows = [("done", f"{format_count(self.counts['images'], 'image')} in {self.seconds:.1f} s")]
        if computed < chunks:
            done = f"{chunks - computed:,} of {format_count(chunks, 'chunk')} already done"
            rows.append(("resumed", done))
        if self.damaged_chunks:
            found = f"{format_count(self.damaged_chunks, 'chunk')} changed since, computed again"
            rows.append(("damaged", found))
        if self.counts["failed"]:
            rows.append(("failed", f"{self.counts['failed']:,} could not be read"))
        return rows

    def __str__(self) -> str:
        values = ", ".join(value for _, value in self._summary_rows())
        return escape_controls(f"{self.target}: {values}")

    def _repr_html_(self) -> str:
        shown = self.failures[:MAX_FAILURES_SHOWN]
        failures = [
            (f"row {failure.row}", f"{failure.path}: {failure.reason}") for failure in shown
        ]
        if self.counts["failed"] > len(shown):
            more = self.counts["failed"] - len(shown)
            failures.append(("and", f"{more:,} more, all listed in {self.target}.index.csv"))
        return html_table(self.target, self._summary_rows() + failures)
