"""Recompute images of a finished dataset from its source, with the oracle, and compare them."""

from __future__ import annotations

import contextlib
import math
import threading
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np

from fastvgg import oracle
from fastvgg.datasets.formats import SOURCES
from fastvgg.datasets.image_writer import is_lossy
from fastvgg.datasets.open import open_source
from fastvgg.errors import DamagedChunk, FastvggError, SourceError
from fastvgg.parallel import parallel_for
from fastvgg.storage.location import Location
from fastvgg.stream.manifest import SPAN_BYTES
from fastvgg.transform import storage_dtype

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from numpy.typing import NDArray

    from fastvgg.datasets.base import Source
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
        self.note = ""
        """Why the source is not compared; empty if it is."""
        self.source: Source | None = None
        self._dataset = dataset
        self._differences: dict[int, _Difference] = {}
        self._recomputed = 0
        self._lock = threading.Lock()
        job = dataset.manifest.job
        if job.in_place:
            self.note = "not compared with the source, which was overwritten in place"
        elif is_lossy(job.file_format):
            self.note = "not compared with the source: JPEG is lossy"
        elif dataset.index_differences:
            self.note = "not compared with the source: the index does not say which images failed"
        else:
            self._open(job, full=full)
        self._spans: list[range] = []
        if self.source is not None:
            self._spans = self._choose_spans(full=full)

    def _open(self, job: Job, *, full: bool) -> None:
        try:
            source = open_job_source(job, self._dataset.memory_bytes // 2, self._dataset.threads)
        except SourceError as error:
            self.note = f"not compared with the source: {error.problem}"
            return
        # A copy of the source has another modification time and so another fingerprint, but the
        # same pixels: `full` compares them anyway.
        if source.header != job.header or not (full or source.fingerprint() == job.fingerprint):
            source.close()
            self.note = f"not compared with the source: {source.location} has changed"
            return
        self.source = source

    def _choose_spans(self, *, full: bool) -> list[range]:
        """Return the ranges of rows to recompute, each by one thread."""
        images = self._dataset.manifest.header.images
        if not full and images > SAMPLED_IMAGES:  # a sample at equal distances
            last = SAMPLED_IMAGES - 1
            rows = [image * (images - 1) // last for image in range(SAMPLED_IMAGES)]
            return [range(row, row + 1) for row in rows]
        size = self._span_images
        return [range(row, min(row + size, images)) for row in range(0, images, size)]

    @property
    def _span_images(self) -> int:
        """Images of a span: whole units of the source, each of which is read only once."""
        job, dataset = self._dataset.manifest.job, self._dataset
        unit = 1 if self.source is None else min(self.source.read_granularity, job.header.images)
        image_bytes = max(job.header.image_bytes, job.result.image_bytes)
        wanted_bytes = max(SPAN_BYTES, dataset.stored.min_span_bytes)
        return max(1, wanted_bytes // (image_bytes * unit)) * unit

    @property
    def images(self) -> int:
        """Number of images that will be recomputed."""
        return sum(map(len, self._spans))

    def run(self, damaged: Collection[int], count: Callable[[int, int], None]) -> int:
        """Compare all rows but those of chunks known to be damaged; return how many.

        `count` is called with the images and bytes that were compared.
        """

        def compare(rows: range) -> None:
            nbytes = self._compare(rows, damaged)
            count(len(rows), nbytes)

        if self._spans:
            threads = self._dataset.threads_within(self._thread_bytes)
            try:
                parallel_for(self._spans, compare, threads)
            except (FastvggError, OSError) as error:
                problem = error.problem if isinstance(error, FastvggError) else str(error)
                self.note = f"not all compared with the source: {problem}"
        return self._recomputed

    @property
    def _thread_bytes(self) -> int:
        job = self._dataset.manifest.job
        rows = max(map(len, self._spans))
        copies = 1 + SOURCES[job.source_kind].read_copies
        unit = 1 if self.source is None else min(self.source.read_granularity, job.header.images)
        stored_bytes = max(rows * job.result.image_bytes, self._dataset.stored.min_span_bytes)
        compute_type = storage_dtype(job.transform.compute_type(job.header.dtype))
        oracle_bytes = ORACLE_COPIES * compute_type.itemsize * math.prod(job.header.shape[1:])
        return max(rows, unit) * job.header.image_bytes * copies + 2 * stored_bytes + oracle_bytes

    def _compare(self, rows: range, damaged: Collection[int]) -> int:
        """Compare a span of rows, chunk by chunk; return the bytes that were read."""
        dataset, nbytes = self._dataset, 0
        size = dataset.manifest.chunk_images
        for chunk in range(rows.start // size, (rows.stop - 1) // size + 1):
            first, end = dataset.chunk_rows(chunk)
            if chunk not in damaged:
                nbytes += self._compare_rows(max(rows.start, first), min(rows.stop, end))
        return nbytes

    def _compare_rows(self, start: int, stop: int) -> int:
        dataset, source = self._dataset, self.source
        if source is None:
            return 0
        inputs, stored = source.read(start, stop).batch, dataset.read(start, stop)
        failed = {*dataset.failed_rows(start, stop)}
        for row, (image, actual) in enumerate(zip(inputs, stored, strict=True), start):
            expected = oracle.apply(dataset.manifest.job.transform, image)
            self._record(row, actual, np.zeros_like(expected) if row in failed else expected)
        return inputs.nbytes + stored.nbytes

    def _record(self, row: int, actual: NDArray[Any], expected: NDArray[Any]) -> None:
        differing = int((actual.view(np.uint8) != expected.view(np.uint8)).sum())
        with self._lock:
            self._recomputed += 1
            if differing:
                chunk = row // self._dataset.manifest.chunk_images
                found = _Difference(row, row, 1, differing, expected.nbytes)
                earlier = self._differences.get(chunk)
                self._differences[chunk] = found if earlier is None else earlier.with_row(found)

    def differing_chunks(self) -> list[DamagedChunk]:
        """Return the chunks with images that differ from the recomputed ones, in order."""
        where = "" if self.source is None else f" recomputed from {self.source.location}"
        return [
            DamagedChunk(chunk, found.first, found.last + 1, found.describe() + where)
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
    bytes: int
    """Bytes of the first image that differ."""
    image_bytes: int

    def with_row(self, other: _Difference) -> _Difference:
        """Return both as one."""
        earlier = self if self.first < other.first else other
        return earlier._replace(last=max(self.last, other.last), images=self.images + other.images)

    def describe(self) -> str:
        """Return what differs."""
        amount = f"{self.bytes} of {self.image_bytes} bytes"
        if self.images == 1:
            return f"differs in {amount} from the result"
        return f"{self.images} of them differ, image {self.first} in {amount}, from the result"


def open_job_source(job: Job, decoding_bytes: int, threads: int) -> Source:
    """Open the source of a job as its run did; raise SourceError if that is impossible."""
    return open_source(
        Location.parse(job.source),
        layout=job.header.layout,
        dtype_hint=job.header.dtype,
        decoding=job.decoding,
        decoding_bytes=decoding_bytes,
        threads=threads,
        use_index=False,
        follow_links=job.follow_links,
        missing_chunks=job.missing_chunks,
    )
