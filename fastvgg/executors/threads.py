"""Compute the chunks of a run in this process, on its threads."""

from __future__ import annotations

import contextlib
import functools
from typing import TYPE_CHECKING

from fastvgg.stream.commit_pipeline import CommitPipeline
from fastvgg.stream.compute import compute, make_commit
from fastvgg.stream.run import Executor

if TYPE_CHECKING:
    from collections.abc import Iterable

    from fastvgg.stream.compute import ChunkTask
    from fastvgg.stream.journal import Commit
    from fastvgg.stream.run import Run


class ThreadExecutor(Executor):
    """The executor of a run on one machine: chunks are computed, written and committed at once."""

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
