"""Recompute images of a finished dataset from its source, with the oracle, and compare them."""

from __future__ import annotations

import contextlib
import math
import threading
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

from fastvgg import oracle
from fastvgg.datasets.formats import SOURCES
from fastvgg.datasets.image_writer import is_lossy
from fastvgg.errors import DamagedChunk, FastvggError
from fastvgg.parallel import parallel_for
from fastvgg.stream.finished import problem_of
from fastvgg.stream.manifest import SPAN_BYTES
from fastvgg.stream.source import open_job_source
from fastvgg.transform import storage_dtype

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from fastvgg.datasets.base import ImageRecord, Source
    from fastvgg.stream.finished import FinishedDataset
    from fastvgg.stream.job import Job

SAMPLED_IMAGES: Final = 16
ORACLE_COPIES: Final = 5  # of one image in its compute type


class Recomputation:
    """The rows of a dataset to recompute, and the source to recompute them from.

    Parameters
    ----------
    dataset
        The dataset.
    full
        Recompute all rows instead of a sample.
    """

    def __init__(self, dataset: FinishedDataset, *, full: bool) -> None:
        self.source: Source | None = None
        self._dataset = dataset
        self._differences: dict[int, _Difference] = {}
        self._unreadable: dict[int, ImageRecord] = {}
        self._recomputed = 0
        self._lock = threading.Lock()
        job = dataset.manifest.job
        problem = ""
        if job.in_place:
            problem = ", which was overwritten in place"
        elif is_lossy(job.file_format):
            problem = ": JPEG is lossy"
        elif dataset.index_differences:
            problem = ": the index does not say which images failed"
        else:
            problem = self._open(job, full=full)
        self.note = f"not compared with the source{problem}" if problem else ""
        """Why the source is not compared; empty if it is."""
        self._spans: list[range] = []
        if self.source is not None:
            self._spans = self._choose_spans(self.source, full=full)

    def _open(self, job: Job, *, full: bool) -> str:
        """Open the source; return why it cannot be compared, or "" if it can."""
        threads = self._dataset.threads
        with contextlib.ExitStack() as opened:
            try:
                source = open_job_source(job, self._dataset.memory_bytes // 2, threads)
                opened.callback(source.close)
                # A copy of the source has another modification time and so another fingerprint,
                # but the same pixels: `full` compares them anyway.
                is_same = full or source.fingerprint() == job.fingerprint
            except (FastvggError, OSError) as error:
                return f": {problem_of(error)}"
            if source.header != job.header or not is_same:
                return f": {source.location} has changed"
            opened.pop_all()
        self.source = source
        return ""

    def _choose_spans(self, source: Source, *, full: bool) -> list[range]:
        """Return the ranges of rows to recompute, each by one thread."""
        dataset, job = self._dataset, self._dataset.manifest.job
        images = job.result.images
        if not full and images > SAMPLED_IMAGES:  # a sample at equal distances
            last = SAMPLED_IMAGES - 1
            rows = [image * (images - 1) // last for image in range(SAMPLED_IMAGES)]
            return [range(row, row + 1) for row in rows]
        # Whole units of the source, each of which is read only once.
        unit = min(source.read_granularity, images)
        image_bytes = max(job.header.image_bytes, job.result.image_bytes)
        wanted_bytes = max(SPAN_BYTES, dataset.stored.min_span_bytes)
        size = max(1, wanted_bytes // (image_bytes * unit)) * unit
        return [range(row, min(row + size, images)) for row in range(0, images, size)]

    @property
    def images(self) -> int:
        """Number of images that will be recomputed."""
        return sum(map(len, self._spans))

    def run(self, damaged: Collection[int], count: Callable[[int, int], None]) -> int:
        """Compare all rows but those of chunks known to be damaged; return how many.

        `count` is called with the images and bytes that were compared.
        """
        if self.source is None:
            return 0
        source, threads = self.source, self._dataset.threads_within(self._thread_bytes(self.source))

        def compare(rows: range) -> None:
            count(len(rows), self._compare(source, rows, damaged))

        try:
            parallel_for(self._spans, compare, threads)
            if self._unreadable:
                row, record = min(self._unreadable.items())
                self.note = (
                    f"not compared with the source: {len(self._unreadable)} images that cannot be "
                    f"read any more; the first is image {row}, {record.path}: {record.reason}"
                )
        except (FastvggError, OSError) as error:
            self.note = f"not all compared with the source: {problem_of(error)}"
        return self._recomputed

    def _thread_bytes(self, source: Source) -> int:
        job = self._dataset.manifest.job
        rows = max(map(len, self._spans))
        copies = 1 + SOURCES[job.source_kind].read_copies
        unit = min(source.read_granularity, job.header.images)
        stored_bytes = max(rows * job.result.image_bytes, self._dataset.stored.min_span_bytes)
        compute_type = storage_dtype(job.transform.compute_type(job.header.dtype))
        oracle_bytes = ORACLE_COPIES * compute_type.itemsize * math.prod(job.header.shape[1:])
        return max(rows, unit) * job.header.image_bytes * copies + 2 * stored_bytes + oracle_bytes

    def _compare(self, source: Source, rows: range, damaged: Collection[int]) -> int:
        """Compare a span of rows, chunk by chunk; return the bytes that were read."""
        dataset, nbytes = self._dataset, 0
        size = dataset.manifest.chunk_images
        for chunk in range(rows.start // size, (rows.stop - 1) // size + 1):
            first, end = dataset.chunk_rows(chunk)
            if chunk not in damaged:
                start, stop = max(rows.start, first), min(rows.stop, end)
                nbytes += self._compare_rows(source, start, stop)
        return nbytes

    def _compare_rows(self, source: Source, start: int, stop: int) -> int:
        dataset, transform = self._dataset, self._dataset.manifest.job.transform
        (inputs, records), stored = source.read(start, stop), dataset.read(start, stop)
        failed = {*dataset.failed_rows(start, stop)}
        for row, (image, actual) in enumerate(zip(inputs, stored, strict=True), start):
            expected = oracle.apply(transform, image)
            if row in failed:
                expected = np.zeros_like(expected)
            elif records and records[row - start].failed:
                with self._lock:
                    self._unreadable[row] = records[row - start]
                continue
            differing = int((actual.view(np.uint8) != expected.view(np.uint8)).sum())
            amount = f"{differing} of {expected.nbytes} bytes"
            result = f"the result recomputed from {source.location}"
            self._record(row, f"differs in {amount} from {result}" if differing else "")
        return inputs.nbytes + stored.nbytes

    def _record(self, row: int, reason: str) -> None:
        """Count a row that was recomputed, and record why it differs, if it does."""
        chunk = row // self._dataset.manifest.chunk_images
        with self._lock:
            self._recomputed += 1
            if reason:
                found = _Difference(row, row, 1, reason)
                earlier = self._differences.get(chunk)
                self._differences[chunk] = found if earlier is None else earlier.with_row(found)

    def differing_chunks(self) -> list[DamagedChunk]:
        """Return the chunks with images that differ from the recomputed ones, in order."""
        return [
            DamagedChunk(chunk, found.first, found.last + 1, str(found))
            for chunk, found in sorted(self._differences.items())
        ]

    def close(self) -> None:
        """Close the source."""
        if self.source is not None:
            with contextlib.suppress(FastvggError):
                self.source.close()


class _Difference(NamedTuple):
    """Images of a chunk that differ from the recomputed ones."""

    first: int
    last: int
    images: int
    reason: str
    """Of the first image."""

    def with_row(self, other: _Difference) -> _Difference:
        """Return both as one."""
        earlier = self if self.first < other.first else other
        return earlier._replace(last=max(self.last, other.last), images=self.images + other.images)

    def __str__(self) -> str:
        if self.images == 1:
            return self.reason
        return f"{self.images} of them differ; image {self.first} {self.reason}"
