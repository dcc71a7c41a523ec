"""Compute the chunks of a run in this process, on its threads."""

from __future__ import annotations

import contextlib
import functools
from typing import TYPE_CHECKING

from fastvgg.stream.commit_pipeline import CommitPipeline
from fastvgg.stream.compute import compute, make_commit
from fastvgg.stream.manifest import checksum

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from fastvgg.stream.compute import ChunkTask
    from fastvgg.stream.journal import Commit
    from fastvgg.stream.plan import Plan
    from fastvgg.stream.run import Run


class ThreadExecutor:
    """The executor of a run on one machine: chunks are computed, written and committed at once."""

    def prepare(self, plan: Plan) -> Plan:
        """Return the plan as it is: it was made for this process."""
        return plan

    def open(self, run: Run) -> None:
        """Do nothing: the run has opened its source and target in this process."""

    def compute(self, run: Run, tasks: Iterable[ChunkTask]) -> None:
        """Compute chunks; write each while the next is computed, then commit it."""

        def commit(record: Commit, images: int) -> int:
            run.target.sync()
            run.journal.commit(record)
            return images

        # Closing the generator stops its threads before the target is closed after an error.
        chunks = compute(run.plan, run.source, run.target, tasks)
        with contextlib.closing(chunks), CommitPipeline[int]() as pipeline:
            for computed in chunks:
                run.tracker.count(pipeline.drain(max_pending=2))
                record = make_commit(run.plan, run.source, computed)
                pipeline.submit(
                    functools.partial(run.target.write, computed.start, computed.stored),
                    functools.partial(commit, record, computed.stop - computed.start),
                )
            run.tracker.count(pipeline.drain(max_pending=0))

    def stored_checksums(
        self, run: Run, tasks: Iterable[ChunkTask]
    ) -> Iterator[tuple[int, str | None]]:
        """Read the stored bytes of committed chunks in this process."""
        for chunk, start, stop, _ in tasks:
            stored = run.target.read_unfinished(start, stop)
            yield chunk, None if stored is None else checksum(stored)

    def close(self) -> None:
        """Do nothing: the run closes its source and target."""
