"""Read and compute the chunks of a run, in order, into the bytes to be stored.

Array to array: all threads share one chunk, tile by tile. Decoding or encoding images: each image
is one item of a task queue, and idle threads start on the next chunk, because waiting for the
slowest image of each chunk would cost two threads 5 % of their throughput.
"""

from __future__ import annotations

import itertools
import mmap
from collections import deque
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeAlias

import numpy as np

from fastvgg import engine
from fastvgg.datasets.base import ArraySource, ImageRecord, byte_view
from fastvgg.datasets.image_writer import ImageFolderTarget
from fastvgg.datasets.images import ImageSource
from fastvgg.errors import FastvggError, StoppedError, option
from fastvgg.parallel import TaskQueue, ThreadSlot
from fastvgg.storage.location import is_remote
from fastvgg.stream.journal import Commit
from fastvgg.stream.manifest import SPAN_BYTES, checksum
from fastvgg.stream.tiles import TileTransform
from fastvgg.transform import storage_dtype

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Sequence

    from numpy.typing import NDArray

    from fastvgg.datasets.base import Payload, Source, Target
    from fastvgg.parallel import TaskGroup
    from fastvgg.stream.plan import Plan

MAX_IN_FLIGHT: Final = 2  # chunks that are computed row by row at the same time
UNREAD_RECORD: Final = ImageRecord("", "", 0, 0, True, "not read yet")


class ChunkTask(NamedTuple):
    """A chunk to be computed."""

    chunk: int
    start: int
    stop: int
    load_existing: Callable[[NDArray[Any]], list[ImageRecord]] | None = None
    """Fills in the rows stored earlier and returns their records; only failed rows are computed."""


class ChunkResult(NamedTuple):
    """A computed chunk. Valid until two more chunks have been requested."""

    chunk: int
    start: int
    stop: int
    stored: Payload
    records: list[ImageRecord]


RowTransform: TypeAlias = "Callable[[int, NDArray[Any]], None]"
"""Transforms the rows of a source, from a row on, into an array."""

RowTasks: TypeAlias = "tuple[ChunkResult, Iterable[int], Callable[[int], None]]"
"""A chunk to be computed row by row, the rows to compute, and the function that computes one."""


class ChunkBufferRing:
    """A ring of reusable output buffers; page-faulting fresh memory is slow.

    It has one buffer for each chunk that is computed or written at the same time.
    """

    def __init__(self, plan: Plan, source: Source) -> None:
        count = MAX_IN_FLIGHT + 1 if isinstance(source, ImageSource) else 2
        self._shape = (plan.chunk_images, *plan.result.shape[1:])
        self._dtype = storage_dtype(plan.result.dtype)
        self._nbytes = plan.chunk_images * plan.result.image_bytes
        nbytes = self._nbytes + mmap.PAGESIZE
        self._memory = itertools.cycle([np.empty(nbytes, np.uint8) for _ in range(count)])

    def rows(self, offset: int) -> NDArray[Any]:
        """Return the next buffer, aligned to the page offset that `offset` has in the file."""
        memory = next(self._memory)
        skipped_bytes = (offset - memory.ctypes.data) % mmap.PAGESIZE
        aligned = memory[skipped_bytes : skipped_bytes + self._nbytes]
        return aligned.view(self._dtype).reshape(self._shape)


def compute(
    plan: Plan,
    source: Source,
    target: Target,
    tasks: Iterable[ChunkTask],
    buffers: ChunkBufferRing | None = None,
) -> Generator[ChunkResult, None, None]:
    """Compute chunks in order, into `buffers` or a new ring.

    An image that cannot be read becomes a row of zeros, or no file.
    """
    if isinstance(target, ImageFolderTarget):
        return _compute_rows(plan, tasks, _encoder(plan, source, target))
    buffers = buffers or ChunkBufferRing(plan, source)
    if isinstance(source, ArraySource):
        return _compute_batches(plan, source, target, tasks, buffers)
    if not isinstance(source, ImageSource):
        raise TypeError(f"{source.location} contains neither images nor an array")
    return _compute_rows(plan, tasks, _decoder(plan, source, target, buffers))


def transform_batch(plan: Plan, batch: NDArray[Any], out: NDArray[Any]) -> None:
    """Transform a batch into `out` on all threads of the plan."""
    engine.apply(
        plan.transform,
        batch,
        out,
        threads=plan.threads,
        backend=plan.choose_backend(),
        cached_output=True,
    )


def make_commit(plan: Plan, source: Source, computed: ChunkResult) -> Commit:
    """Return the record of a computed chunk; raise StoppedError if strict and an image failed."""
    chunk, start, stop, stored, records = computed
    failures = [(row, record) for row, record in enumerate(records, start) if record.failed]
    check_no_failures(plan, failures)
    identity = ""
    if isinstance(source, ImageSource):
        identity = source.identity_checksum(start, stop, {row for row, _ in failures})
    return Commit(chunk, checksum(stored), identity, records)


def stored_checksum(target: Target, task: ChunkTask) -> str:
    """Return the checksum of what an unfinished run stored; "" if it cannot be read."""
    try:
        return checksum(target.unfinished().stored_spans(task.start, task.stop, SPAN_BYTES))
    except (FastvggError, OSError) as error:
        if isinstance(error, StoppedError) and is_remote(target.path):
            raise  # the connection failed, which says nothing about the data
        return ""


def check_no_failures(plan: Plan, failures: list[tuple[int, ImageRecord]]) -> None:
    """Raise StoppedError for the first failed image if the plan is strict."""
    for row, record in failures:
        if plan.strict:
            raise StoppedError(
                f"{plan.source}/{record.path} (row {row}) cannot be read: {record.reason}",
                f"repair or remove it and rerun with {option('restart')}, or rerun without "
                f"{option('strict')}",
            )


def _compute_batches(
    plan: Plan,
    source: ArraySource,
    target: Target,
    tasks: Iterable[ChunkTask],
    buffers: ChunkBufferRing,
) -> Generator[ChunkResult, None, None]:
    """Compute chunks of an array, one at a time."""
    with TaskQueue(plan.threads) as queue:
        transform_rows = _row_transform(plan, source, queue)
        for chunk, start, stop, _ in tasks:
            out = buffers.rows(target.offset(start))[: stop - start]
            transform_rows(start, out)
            records = [*source.records[start:stop]]
            for row, record in enumerate(records):
                if record.failed:
                    out[row] = 0
            yield ChunkResult(chunk, start, stop, [byte_view(out)], records)


def _row_transform(plan: Plan, source: ArraySource, queue: TaskQueue) -> RowTransform:
    """Return a function that reads and transforms the rows of a chunk, on all threads.

    It reads tile by tile, in the memory that is planned for the chunk, or else the whole chunk.
    """
    max_images = plan.chunk_images // plan.threads
    if not (source.has_random_access and max_images):
        return lambda start, out: transform_batch(
            plan, source.read(start, start + len(out)).batch, out
        )
    tiles = TileTransform(
        plan.transform,
        source,
        threads=plan.threads,
        max_images=max_images,
        backend=plan.choose_backend(),
    )

    def transform_tiles(start: int, out: NDArray[Any]) -> None:
        stop = start + len(out)
        source.prefetch(stop, min(stop + len(out), source.header.images))
        transform = tiles.bind(out)

        def transform_tile(row: int) -> None:
            transform(start + row, row, min(tiles.images, len(out) - row))

        queue.submit(range(0, len(out), tiles.images), transform_tile).wait()

    return transform_tiles


def _compute_rows(
    plan: Plan, tasks: Iterable[ChunkTask], start: Callable[[ChunkTask], RowTasks]
) -> Generator[ChunkResult, None, None]:
    """Compute rows independently, on all threads."""
    in_flight: deque[tuple[ChunkResult, TaskGroup]] = deque()

    def finished() -> ChunkResult:
        computed, group = in_flight.popleft()
        group.wait()
        return computed

    with TaskQueue(plan.threads) as queue:
        for task in tasks:
            computed, rows, compute_row = start(task)
            in_flight.append((computed, queue.submit(rows, compute_row)))
            if len(in_flight) == MAX_IN_FLIGHT:
                yield finished()
        while in_flight:
            yield finished()


def _decoder(
    plan: Plan, source: ImageSource, target: Target, buffers: ChunkBufferRing
) -> Callable[[ChunkTask], RowTasks]:
    """Return a function that starts to decode the images of a chunk into rows of an array."""
    images = np.empty((plan.threads, *source.header.shape[1:]), np.uint8)
    thread_slot = ThreadSlot(plan.threads)

    def start(task: ChunkTask) -> RowTasks:
        buffer = buffers.rows(target.offset(task.start))
        backend = plan.choose_backend()
        transform = engine.bind_rows(plan.transform, images, buffer, backend=backend)
        out = buffer[: task.stop - task.start]
        records = [UNREAD_RECORD] * len(out)
        rows: Sequence[int] = range(len(out))
        if task.load_existing is not None:
            records = task.load_existing(out)
            rows = [row for row, record in enumerate(records) if record.failed]

        def pack(row: int) -> None:
            records[row] = source.decode(task.start + row, out[row])

        def preprocess(row: int) -> None:
            slot = thread_slot()
            records[row] = source.decode(task.start + row, images[slot])
            if records[row].failed:
                out[row] = 0
            else:
                transform(slot, row)

        computed = ChunkResult(*task[:3], [byte_view(out)], records)
        return computed, rows, pack if plan.transform.direction == "pack" else preprocess

    return start


def _encoder(
    plan: Plan, source: Source, target: ImageFolderTarget
) -> Callable[[ChunkTask], RowTasks]:
    """Return a function that starts to encode the rows of a chunk as image files."""
    images = np.empty((plan.threads, *plan.result.shape[1:]), np.uint8)
    thread_slot = ThreadSlot(plan.threads)

    def start(task: ChunkTask) -> RowTasks:
        batch, records = source.read(task.start, task.stop)
        stored = [b""] * len(batch)
        rows = [row for row in range(len(batch)) if not (records and records[row].failed)]
        transform = engine.bind_rows(plan.transform, batch, images, backend=plan.choose_backend())

        def compute_row(row: int) -> None:
            slot = thread_slot()
            transform(row, slot)
            stored[row] = target.encode(images[slot])

        return ChunkResult(*task[:3], stored, records), rows, compute_row

    return start
