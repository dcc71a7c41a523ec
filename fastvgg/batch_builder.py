"""Build batches of a stored dataset: threads read and transform spans of consecutive rows."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np

from fastvgg import engine
from fastvgg.backend import choose_for_size
from fastvgg.parallel import ThreadSlot
from fastvgg.stream.tiles import TileTransform
from fastvgg.transform import storage_dtype

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from fastvgg.datasets.base import ArraySource
    from fastvgg.parallel import TaskGroup, TaskQueue
    from fastvgg.transform import Transform

# The size of a span: what a thread builds before it takes the next. Switching threads costs 30 us:
# on a 2-core AMD EPYC, 8 MiB reach 0.99 of the kernel's own throughput, 4 MiB 0.87, 1 MiB 0.82.
READ_BYTES: Final = 8 * 1024 * 1024


class _Span(NamedTuple):
    """Rows of a batch that one thread builds at a time."""

    rows: NDArray[np.int64]
    images: NDArray[Any]
    """The batch."""
    at: int
    """The position of the first of the rows in the batch."""
    build_tiles: Callable[[int, int, int], None] | None
    """Builds rows tile by tile, where the source allows it; see `TileTransform.bind`."""


class BatchBuilder:
    """Builds batches of an open dataset on the threads of a task queue.

    Parameters
    ----------
    source
        The dataset.
    tasks
        A queue of `threads` threads.
    transform
        The transform of each batch; None for rows as they are stored.
    batch_size
        The maximum number of rows of a batch.
    is_shuffled
        Whether rows are read in any order rather than in ascending order.
    """

    def __init__(
        self,
        source: ArraySource,
        tasks: TaskQueue,
        transform: Transform | None,
        batch_size: int,
        threads: int,
        *,
        is_shuffled: bool,
    ) -> None:
        self._source = source
        self._tasks = tasks
        self._transform = transform
        self._is_shuffled = is_shuffled
        header = source.header
        epoch_bytes = 2 * header.nbytes if transform else 0
        self._backend = choose_for_size("auto", epoch_bytes, threads)
        images_per_thread = -(-batch_size // threads)
        self._images_per_read = max(1, min(images_per_thread, READ_BYTES // header.image_bytes))
        # Each thread gathers the scattered rows of a read into its own part of this memory.
        has_gather = transform is not None and is_shuffled
        gathered_images = threads * self._images_per_read if has_gather else 0
        self._gathered = np.empty((gathered_images, *header.shape[1:]), storage_dtype(header.dtype))
        self._thread_slot = ThreadSlot(threads)
        self._tiles: TileTransform | None = None
        if transform and not is_shuffled and source.has_random_access:
            self._tiles = TileTransform(
                transform,
                source,
                threads=threads,
                max_images=self._images_per_read,
                backend=self._backend,
            )

    def submit(self, rows: NDArray[np.int64], images: NDArray[Any]) -> TaskGroup:
        """Start to build the batch of `rows` in `images`.

        Only the spans refer to `images`, not the function that builds them: a thread may still
        refer to that when the group is done.
        """
        build = self._build_scattered if self._is_shuffled else self._build_consecutive
        gaps = [] if self._is_shuffled else (np.flatnonzero(np.diff(rows) != 1) + 1).tolist()
        build_tiles = None if self._tiles is None else self._tiles.bind(images)
        spans = [
            _Span(rows[at : min(at + self._images_per_read, stop)], images, at, build_tiles)
            for start, stop in itertools.pairwise([0, *gaps, len(rows)])
            for at in range(start, stop, self._images_per_read)
        ]
        return self._tasks.submit(spans, build)

    def _build_consecutive(self, span: _Span) -> None:
        """Build consecutive rows, tile by tile or with one read."""
        first, count = int(span.rows[0]), len(span.rows)
        if self._transform is None:
            self._source.read_into(first, span.images[span.at : span.at + count])
            return
        if span.build_tiles is not None:
            self._source.prefetch(first + count, min(first + 2 * count, self._source.header.images))
            span.build_tiles(first, span.at, count)
            return
        read = self._source.read(first, first + count).batch
        transform = engine.bind_rows(self._transform, read, span.images, backend=self._backend)
        transform(0, span.at, count)

    def _build_scattered(self, span: _Span) -> None:
        """Build rows in any order; a transform reads them from the thread's gather buffer."""
        count = len(span.rows)
        if self._transform is None:
            self._gather(span.rows, span.images[span.at : span.at + count])
            return
        first = self._thread_slot() * self._images_per_read
        gathered = self._gathered
        self._gather(span.rows, gathered[first : first + count])
        transform = engine.bind_rows(self._transform, gathered, span.images, backend=self._backend)
        transform(first, span.at, count)

    def _gather(self, rows: NDArray[np.int64], out: NDArray[Any]) -> None:
        for at, row in enumerate(rows.tolist()):
            self._source.read_into(row, out[at : at + 1])
