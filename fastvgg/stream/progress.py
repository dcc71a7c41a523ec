"""ProgressTracker: counts the commits of a run and reports them."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

from fastvgg.stream.report import Progress, Report

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable

    from fastvgg.stream.plan import Plan
    from fastvgg.stream.report import Failure


class ProgressTracker:
    """Count what a run commits, and call `progress` after every chunk.

    `earlier` are the chunks that earlier runs committed; `started_at` is the start of this one, in
    seconds of the monotonic clock.
    """

    def __init__(
        self,
        plan: Plan,
        earlier: Collection[int],
        progress: Callable[[Progress], None] | None,
        started_at: float,
    ) -> None:
        self.computed_chunks = 0
        self.computed_images = 0
        self._plan = plan
        self._progress = progress
        self._started_at = started_at
        rows = enumerate(plan.chunk_rows())
        self._earlier_images = sum(
            stop - start for chunk, (start, stop) in rows if chunk in earlier
        )

    @property
    def read_bytes(self) -> int:
        """Bytes of the source that were read, estimated from the images computed."""
        return int(self._plan.read_bytes * self.computed_images / self._plan.header.images)

    @property
    def written_bytes(self) -> int:
        """Bytes of pixels that were written."""
        return self.computed_images * self._plan.result.image_bytes

    def report(self, counts: dict[str, int], failures: list[Failure]) -> Report:
        """Return the report of the run; `counts` are those of the manifest."""
        return Report(
            target=str(self._plan.target),
            counts={**counts, "chunks": self._plan.chunks, "computed_chunks": self.computed_chunks},
            failures=failures,
            seconds=time.monotonic() - self._started_at,
            read_bytes=self.read_bytes,
            written_bytes=self.written_bytes,
            peak_bytes=_peak_bytes(),
            notes=list(self._plan.notes),
        )

    def count(self, committed: Iterable[int]) -> None:
        """Count committed chunks, given the number of images of each."""
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
                        time.monotonic() - self._started_at,
                    )
                )


def _peak_bytes() -> int:
    try:
        import resource
    except ImportError:  # not on Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes on macOS, KiB on Linux
