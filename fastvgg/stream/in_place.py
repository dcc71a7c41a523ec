"""Execute a plan in place: overwrite a .npy file with its result.

All checks come first. Each chunk is computed in a separate buffer and written through the redo log.
The manifest is written once the whole file is durable, and the log is removed last: while it
exists, the file is neither the source nor the result.
"""

from __future__ import annotations

import contextlib
import functools
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fastvgg.datasets.base import byte_view
from fastvgg.datasets.npy import NpySource
from fastvgg.errors import TargetError, command, os_errors_refused
from fastvgg.storage.file_systems import check_in_place_supported
from fastvgg.storage.local import Storage
from fastvgg.stream.commit_pipeline import CommitPipeline
from fastvgg.stream.compute import transform_batch
from fastvgg.stream.finished import CheckCounter
from fastvgg.stream.manifest import Manifest, checksum, manifest_path
from fastvgg.stream.progress import ProgressTracker
from fastvgg.stream.redo_log import RedoLog
from fastvgg.stream.redo_log_reader import (
    check_lengths,
    check_sidecars_in_place,
    read_header_to_resume,
)
from fastvgg.stream.report import first_failures
from fastvgg.stream.source import changed_error, check_sampled_values, is_changed
from fastvgg.tiling import CACHE_LINE_BYTES
from fastvgg.transform import storage_dtype

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from fastvgg.storage.local import OpenFile
    from fastvgg.stream.plan import Plan
    from fastvgg.stream.redo_log_layout import RedoLogHeader, RedoRecord
    from fastvgg.stream.report import Progress, Report


class _Pages(NamedTuple):
    """The new bytes of the pages of a chunk, with its images aligned to a cache line."""

    begin: int
    """Offset of the first page in the file."""
    bytes: NDArray[np.uint8]
    images: NDArray[Any]


def run(
    plan: Plan,
    progress: Callable[[Progress], None] | None = None,
    storage: Storage | None = None,
) -> Report:
    """Execute a plan in place, or resume an interrupted run of it.

    Parameters, result and errors are those of `fastvgg.stream.run.run`.
    """
    storage = storage or Storage(fsync=plan.fsync)
    started_at = time.monotonic()
    path = plan.target.container
    layout, dtype = plan.header.layout, plan.header.dtype
    with contextlib.ExitStack() as opened:
        with os_errors_refused(TargetError):
            check_in_place_supported(path)
            data = storage.open(path)
            opened.callback(storage.close, data)
            if not storage.lock(data):
                raise TargetError(
                    f"{path} is being changed by another process",
                    f"wait for it to finish; its progress: {command('info', path)}",
                )
            source = NpySource(path, layout=layout, dtype_hint=dtype)
            opened.callback(source.close)
        return _InPlaceRun(plan, source, data, storage, progress, started_at).finish()


@dataclass(frozen=True)
class _InPlaceRun:
    """An in-place run, which holds the lock of the file."""

    plan: Plan
    source: NpySource
    data: OpenFile
    storage: Storage
    progress: Callable[[Progress], None] | None
    started_at: float

    def finish(self) -> Report:
        """Execute the remaining steps and return the report."""
        header = read_header_to_resume(self.data.path, restart=self.plan.restart)
        log = self._begin() if header is None else self._reopen(header)
        with contextlib.closing(log):
            committed = 0 if header is None else self._recover(log)
            tracker = ProgressTracker(self.plan, range(committed), self.progress, self.started_at)
            self._compute(log, committed, tracker)
            failed = sum(record.failed for record in self.source.records)
            manifest = Manifest.new(
                self.plan.job,
                self.plan.chunk_images,
                checksums=log.finish(),
                counts={"images": self.plan.header.images, "failed": failed},
            )
            self.storage.write_atomic(manifest_path(self.data.path), [manifest.to_json()])
            log.remove()
        return tracker.report(manifest.counts, first_failures(enumerate(self.source.records)))

    @os_errors_refused(TargetError)
    def _begin(self) -> RedoLog:
        if self.plan.committed_chunks or is_changed(self.plan, self.source):
            raise changed_error(self.plan)
        self._check_values()
        check_sidecars_in_place(self.data.path)
        return RedoLog.begin(self.storage, self.data, self.plan.job, self.plan.chunk_images)

    def _reopen(self, header: RedoLogHeader) -> RedoLog:
        check_lengths(header, self.data.path)
        if header.job.fingerprint != self.plan.job.fingerprint:
            raise changed_error(self.plan)  # another run started after this one was planned
        header.check_job(self.plan.job, self.data.path)
        if header.chunk_images != self.plan.chunk_images:
            raise changed_error(self.plan)
        return RedoLog.reopen(self.storage, self.data, header)

    def _recover(self, log: RedoLog) -> int:
        """Check what an earlier run converted; return the number of committed chunks."""
        rows, image_bytes = list(self.plan.chunk_rows()), self.plan.header.image_bytes
        counter = CheckCounter(self.progress, self.plan.header.images, is_resumed=True)

        def count(chunk: int) -> None:
            start, stop = rows[chunk]
            counter.count(stop - start, (stop - start) * image_bytes)

        committed = log.recover(self.plan.threads, count)
        if not committed:
            self._check_values()  # there is no checksum to compare
        return committed

    @os_errors_refused(TargetError)
    def _check_values(self) -> None:
        check_sampled_values(self.source, self.plan.transform, is_enabled=self.plan.check_values)

    def _compute(self, log: RedoLog, committed: int, tracker: ProgressTracker) -> None:
        """Compute the remaining chunks; write each to the redo log, then to the file."""
        nbytes = log.header.slot_bytes + CACHE_LINE_BYTES
        buffers = [np.empty(nbytes, np.uint8) for _ in range(2)]
        rows = list(self.plan.chunk_rows())
        shape = (self.plan.chunk_images, *self.plan.header.shape[1:])
        chunk_images = np.empty(shape, storage_dtype(self.plan.header.dtype))
        before = None
        with CommitPipeline[int]() as pipeline:
            for chunk in range(committed, len(rows)):
                tracker.count(pipeline.drain(max_pending=1))  # frees one of the two buffers
                new = self._lay_out_pages(log.header, chunk, buffers[chunk % 2], before)
                start, stop = rows[chunk]
                batch = chunk_images[: stop - start]
                self.source.read_into(start, batch)
                self.source.prefetch(stop, min(stop + len(batch), self.plan.header.images))
                transform_batch(self.plan, batch, new.images)
                for row, image in enumerate(self.source.records[start:stop]):
                    if image.failed:
                        new.images[row] = 0
                old = checksum([byte_view(batch)])
                record = log.make_record(chunk, new.bytes.data, old=old)
                pipeline.submit(
                    functools.partial(log.stage, chunk, new.bytes.data),
                    functools.partial(self._commit, log, record, new.bytes.data, stop - start),
                )
                before = new
            tracker.count(pipeline.drain(max_pending=0))

    def _lay_out_pages(
        self, header: RedoLogHeader, chunk: int, buffer: NDArray[np.uint8], before: _Pages | None
    ) -> _Pages:
        """Lay out a chunk's pages in `buffer`; fill in what they contain besides its images.

        These bytes are read from the file, or, as the new bytes of the previous chunk may not be in
        the file yet, from the pages of that chunk, `before`.
        """
        begin, end = header.page_span(chunk)
        first, last = header.image_span(chunk)
        head, tail = first - begin, end - last
        shift = -(buffer.ctypes.data + head) % CACHE_LINE_BYTES
        pages = buffer[shift : shift + end - begin]
        if before is None:
            pages[:head] = np.frombuffer(self.storage.read(self.data, begin, head), np.uint8)
        else:
            pages[:head] = before.bytes[begin - before.begin :][:head]
        image_bytes = pages[head : len(pages) - tail]
        pages[len(pages) - tail :] = np.frombuffer(
            self.storage.read(self.data, last, tail), np.uint8
        )
        result = self.plan.result
        images = image_bytes.view(storage_dtype(result.dtype)).reshape(-1, *result.shape[1:])
        return _Pages(begin, pages, images)

    def _commit(self, log: RedoLog, record: RedoRecord, pages: memoryview, images: int) -> int:
        log.commit(record, pages)
        return images
