"""ProgressTracker: counts what a run commits, and reports it."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

from fastvgg.stream.report import Progress, Report

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable

    from fastvgg.stream.plan import Plan
    from fastvgg.stream.report import Failure

__all__ = ["ProgressTracker"]


class ProgressTracker:
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
