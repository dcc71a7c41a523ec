"""What a run tells: how far it is, and what it did."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, NamedTuple

from fastvgg.notebook import table

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable

    from fastvgg.stream.plan import Plan

__all__ = ["FAILURES_KEPT", "FAILURES_SHOWN", "Failure", "Progress", "Report", "Tally"]

FAILURES_KEPT: Final = 1000
FAILURES_SHOWN: Final = 10


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
    """The first thousand: the index has them all."""
    seconds: float
    read_bytes: int
    written_bytes: int
    peak_bytes: int
    """The most memory that the process has had resident."""
    notes: list[str] = field(default_factory=list)

    def _facts(self) -> list[tuple[str, str]]:
        """Return what people are told of it, by name."""
        computed, chunks = self.counts["computed_chunks"], self.counts["chunks"]
        facts = [("done", f"{self.counts['images']:,} images in {self.seconds:.1f} s")]
        if computed < chunks:
            facts.append(("before", f"chunks there already: {chunks - computed:,} of {chunks:,}"))
        if self.counts["failed"]:
            facts.append(("failed", f"{self.counts['failed']:,} could not be read"))
        return facts

    def __str__(self) -> str:
        return f"{self.target}: {', '.join(value for _, value in self._facts())}"

    def _repr_html_(self) -> str:
        shown = self.failures[:FAILURES_SHOWN]
        failures = [(f"row {at.row}", f"{at.path}: {at.reason}") for at in shown]
        if self.counts["failed"] > len(shown):
            more = self.counts["failed"] - len(shown)
            failures.append(("and", f"{more:,} more, all listed in {self.target}.index.csv"))
        return table(self.target, self._facts() + failures)


class Tally:
    """Count what a run has committed, and tell of it.

    Parameters
    ----------
    plan
        What is carried out.
    earlier
        The chunks that earlier runs committed.
    progress
        Called after every chunk.
    begun
        When the run began, on the monotonic clock.
    """

    def __init__(
        self,
        plan: Plan,
        earlier: Collection[int],
        progress: Callable[[Progress], None] | None,
        begun: float,
    ) -> None:
        self.computed_chunks = 0
        self.computed_images = 0
        self._plan = plan
        self._progress = progress
        self._begun = begun
        rows = enumerate(plan.chunk_rows())
        self._earlier_images = sum(
            stop - start for chunk, (start, stop) in rows if chunk in earlier
        )

    @property
    def read_bytes(self) -> int:
        """How much of the source has been read for it."""
        return int(self._plan.read_bytes * self.computed_images / self._plan.header.images)

    @property
    def written_bytes(self) -> int:
        """How many bytes of pixels have been written."""
        return self.computed_images * self._plan.result.image_bytes

    def report(self, counts: dict[str, int], failures: list[Failure]) -> Report:
        """Return what the run did; `counts` are those of the manifest."""
        return Report(
            target=self._plan.target,
            counts={
                **counts,
                "chunks": self._plan.chunks,
                "computed_chunks": self.computed_chunks,
            },
            failures=failures,
            seconds=time.monotonic() - self._begun,
            read_bytes=self.read_bytes,
            written_bytes=self.written_bytes,
            peak_bytes=_peak_bytes(),
            notes=list(self._plan.notes),
        )

    def count(self, committed: Iterable[int]) -> None:
        """Count chunks, of so many images each, as they are committed."""
        for images in committed:
            self.computed_chunks += 1
            self.computed_images += images
            if self._progress is not None:
                self._progress(
                    Progress(
                        self._earlier_images + self.computed_images,
                        self._plan.header.images,
                        self.computed_images,
                        self.read_bytes,
                        self.written_bytes,
                        time.monotonic() - self._begun,
                    )
                )


def _peak_bytes() -> int:
    try:
        import resource
    except ImportError:  # not on this system
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes there, KiB elsewhere
