"""FinishedDataset: a dataset that fastvgg wrote, with all that its manifest and index say of it."""

from __future__ import annotations

import functools
import itertools
import os
import threading
import time
from bisect import bisect_left
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Self

import numpy as np
import xxhash

from fastvgg.datasets.formats import TARGETS
from fastvgg.datasets.index import index_path, read_index
from fastvgg.datasets.open import open_target
from fastvgg.errors import DamagedChunk, FastvggError, SourceError, StoppedError, command, option
from fastvgg.formatting import format_bytes
from fastvgg.parallel import parallel_for
from fastvgg.storage import objects
from fastvgg.stream.journal import journal_path, read_journal
from fastvgg.stream.manifest import SPAN_BYTES, Provenance, read_manifest
from fastvgg.stream.redo_log_reader import check_not_in_place
from fastvgg.stream.report import Progress
from fastvgg.stream.source import check_exists, unfinished_error
from fastvgg.transform import storage_dtype

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from numpy.typing import NDArray

    from fastvgg.datasets.base import ImageRecord, Target
    from fastvgg.storage.local import Storage
    from fastvgg.storage.location import Location
    from fastvgg.storage.objects import ObjectStorage
    from fastvgg.stream.manifest import Manifest

MAX_REASON_CHARACTERS: Final = 500  # an error of a library may quote any amount of a file


class CheckCounter:
    """Count checked images, and report them to `progress`; thread-safe.

    An image counts once for its checksum, once more if it is compared with its source, and once
    more if its chunk is repaired. `is_resumed` if a run then computes the others.
    """

    def __init__(
        self,
        progress: Callable[[Progress], None] | None,
        total: int,
        *,
        is_resumed: bool = False,
    ) -> None:
        self._is_resumed = is_resumed
        self._progress = progress
        self._total = total
        self._images = self._bytes = 0
        self._started_at = time.monotonic()
        self._lock = threading.Lock()

    def expect(self, images: int) -> None:
        """Expect more images."""
        self._total += images

    def count(self, images: int, nbytes: int) -> None:
        """Count images that were checked by reading so many bytes."""
        with self._lock:
            self._images += images
            self._bytes += nbytes
            if self._progress is not None and images:
                seconds = time.monotonic() - self._started_at
                done, computed = self._images, 0 if self._is_resumed else self._images
                self._progress(Progress(done, self._total, computed, self._bytes, 0, seconds))


@dataclass(frozen=True)
class FinishedDataset:
    """A finished dataset, and the threads and memory to check it with."""

    location: Location
    manifest: Manifest
    records: Sequence[ImageRecord]
    """The index; empty if there is none."""
    stored: Target
    threads: int
    memory_bytes: int

    @classmethod
    def open(
        cls,
        location: Location,
        storage: Storage | ObjectStorage,
        threads: int,
        memory_bytes: int,
    ) -> Self:
        """Open a dataset; `storage` performs the durable I/O of a repair.

        Raises
        ------
        SourceError
            If it is not a finished dataset of fastvgg, or its manifest or index is damaged.
        """
        if location.is_remote:
            check_exists(location)
        check_not_in_place(location.container)
        is_recorded = read_manifest(location.container, memory_bytes) is not None
        if not (is_recorded and exists(location)):
            check_exists(location)  # with a manifest, even one that cannot be opened is a dataset
        manifest = Provenance.read(location).manifest
        if manifest is None:
            check_exists(location)  # the file exists, but perhaps not the dataset
            raise _not_finished_error(location)
        location = location.with_inner(manifest.job.dataset)
        records = read_index(location.container, manifest.header.images)
        stored = open_target(
            location,
            manifest.header,
            storage,
            chunk_images=manifest.chunk_images,
            transform=manifest.job.transform,
            records=records,
            file_format=manifest.job.file_format,
        )
        return cls(location, manifest, records, stored, threads, memory_bytes)

    @property
    def chunks(self) -> int:
        """Number of chunks."""
        return len(self.manifest.checksums)

    def chunk_rows(self, chunk: int) -> tuple[int, int]:
        """Return the row range (start, stop) of a chunk."""
        start = chunk * self.manifest.chunk_images
        return start, min(start + self.manifest.chunk_images, self.manifest.header.images)

    def failed_rows(self, start: int, stop: int) -> list[int]:
        """Return the rows in a range that failed when the dataset was made."""
        records = self.records[start:stop]
        return [row for row, record in enumerate(records, start) if record.failed]

    @functools.cached_property
    def index_differences(self) -> list[str]:
        """How the index contradicts the manifest."""
        expected, path = self.manifest.counts["failed"], index_path(self.location.container)
        if not self.records:
            is_missing = expected or self.manifest.job.is_decoded
            return [f"the index {path} is missing"] if is_missing else []
        actual = sum(record.failed for record in self.records)
        if actual == expected:
            return []
        return [f"the index {path} lists {actual} failed images, but the manifest {expected}"]

    def damaged_chunks(
        self, chunks: Iterable[int], count: Callable[[int, int], None]
    ) -> list[DamagedChunk]:
        """Read chunks and compare their checksums; return those that are damaged, in order.

        `count` is called with the images and bytes that were read.
        """
        unit_bytes = self.stored.min_span_bytes * (1 + self._read_copies)
        threads = self.threads_within(unit_bytes)
        share_bytes = self.memory_bytes // threads // (1 + self._read_copies)
        span_bytes = max(self.stored.min_span_bytes, min(SPAN_BYTES, share_bytes))
        damaged: dict[int, str] = {}

        def check(chunk: int) -> None:
            reason = self._difference(chunk, span_bytes, count)
            if reason:
                damaged[chunk] = reason[:MAX_REASON_CHARACTERS]

        parallel_for([*chunks], check, threads)
        return [
            DamagedChunk(chunk, *self.chunk_rows(chunk), damaged[chunk])
            for chunk in sorted(damaged)
        ]

    @property
    def _read_copies(self) -> int:
        return TARGETS[self.manifest.job.target_format].read_copies

    def threads_within(self, thread_bytes: int) -> int:
        """Return how many threads fit into the memory; raise SourceError if not even one does."""
        if thread_bytes > self.memory_bytes:
            raise SourceError(
                f"checking {self.location} needs {format_bytes(thread_bytes)} of memory, but the "
                f"limit is {format_bytes(self.memory_bytes)}",
                f"give {option('memory', f'{-(-thread_bytes // 2**20)}MiB')} or more",
            )
        return min(self.threads, self.memory_bytes // max(1, thread_bytes))

    def _difference(self, chunk: int, span_bytes: int, count: Callable[[int, int], None]) -> str:
        """Return why the stored bytes of a chunk are not what was written; "" if they are."""
        start, stop = self.chunk_rows(chunk)
        image_bytes, is_encoded = self.manifest.header.image_bytes, self.manifest.job.is_encoded
        zeros = [] if is_encoded else [row - start for row in self.failed_rows(start, stop)]
        digest, position, counted, nonzero = xxhash.xxh3_64(), 0, 0, -1
        try:
            for span in self.stored.stored_spans(start, stop, span_bytes):
                digest.update(span)
                if zeros and nonzero < 0:
                    nonzero = _nonzero_row(zeros, span, position, image_bytes)
                position += len(span)
                done = min(stop - start, position // image_bytes) - counted
                count(done, len(span))
                counted += done
        except (FastvggError, OSError) as error:
            if isinstance(error, StoppedError) and self.location.is_remote:
                raise  # the connection failed, which says nothing about the data
            return problem_of(error).removeprefix(f"{self.location.container}: ")
        finally:
            count(stop - start - counted, 0)
        expected, actual = self.manifest.checksums[chunk], digest.hexdigest()
        if actual != expected:
            return f"checksum {actual}, expected {expected}"
        if nonzero >= 0:
            return f"image {start + nonzero} failed when it was made, but its row is not zeros"
        return ""

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Read rows, also where the header or the length of the dataset is damaged."""
        if self.manifest.job.is_encoded:
            return self.stored.read_back(start, stop)
        spans = self.stored.stored_spans(start, stop, SPAN_BYTES)
        header = self.manifest.header
        rows = np.frombuffer(b"".join(map(bytes, spans)), storage_dtype(header.dtype))
        return rows.reshape(-1, *header.shape[1:])


def problem_of(error: FastvggError | OSError) -> str:
    """Return what went wrong, without a remedy."""
    return error.problem if isinstance(error, FastvggError) else str(error)


def _nonzero_row(
    rows: Sequence[int], span: bytes | memoryview, first_byte: int, image_bytes: int
) -> int:
    """Return the first of these rows of a chunk that is not zeros in a span of it, or -1.

    `rows` is sorted. Rows are counted from the start of the chunk, and so is `first_byte`, the
    offset of the span.
    """
    values = np.frombuffer(span, np.uint8)
    for row in itertools.islice(rows, bisect_left(rows, first_byte // image_bytes), None):
        begin = row * image_bytes - first_byte
        if begin >= len(values):
            break
        if values[max(0, begin) : begin + image_bytes].any():
            return row
    return -1


def exists(location: Location) -> bool:
    """Return whether anything has the name of a dataset."""
    path = location.container
    return objects.exists(path) if location.is_remote else os.path.lexists(path)


def _not_finished_error(location: Location) -> SourceError:
    if read_journal(journal_path(location.container), header_only=True) is not None:
        return unfinished_error(location)
    return SourceError(
        f"{location} has no manifest: it is a source, or another program wrote it, so there are no "
        "checksums to compare with",
        f"give a dataset that fastvgg has finished; what this is: {command('info', location)}",
    )
