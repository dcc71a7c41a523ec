"""Progress and Report: how far a run is, and what it did."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final, NamedTuple

from fastvgg.formatting import html_table

__all__ = ["FAILURES_KEPT", "FAILURES_SHOWN", "Failure", "Progress", "Report"]

FAILURES_KEPT: Final = 1000
FAILURES_SHOWN: Final = 10


class Progress(NamedTuple):
    """How far a run is, after every chunk."""

    images: int
    """Done, with those of earlier runs."""
    total_images: int
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
    """The first thousand: the index has them all."""
    seconds: float
    read_bytes: int
    written_bytes: int
    peak_bytes: int
    """The most memory that the process has had resident."""
    notes: list[str] = field(default_factory=list)

    def _summary_rows(self) -> list[tuple[str, str]]:
        """Return what people are told of it, by name."""
        computed, chunks = self.counts["computed_chunks"], self.counts["chunks"]
        facts = [("done", f"{self.counts['images']:,} images in {self.seconds:.1f} s")]
        if computed < chunks:
            facts.append(("before", f"chunks there already: {chunks - computed:,} of {chunks:,}"))
        if self.counts["failed"]:
            facts.append(("failed", f"{self.counts['failed']:,} could not be read"))
        return facts

    def __str__(self) -> str:
        return f"{self.target}: {', '.join(value for _, value in self._summary_rows())}"

    def _repr_html_(self) -> str:
        shown = self.failures[:FAILURES_SHOWN]
        failures = [(f"row {at.row}", f"{at.path}: {at.reason}") for at in shown]
        if self.counts["failed"] > len(shown):
            more = self.counts["failed"] - len(shown)
            failures.append(("and", f"{more:,} more, all listed in {self.target}.index.csv"))
        return html_table(self.target, self._summary_rows() + failures)
