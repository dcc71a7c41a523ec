"""Read and compute the chunks of a run, one after the other, each as the bytes that are stored.

An array becomes an array chunk by chunk: all threads share each. Images that are decoded, or
encoded, take their time one by one, so there every image is a piece of work by itself, and threads
that find none left of one chunk begin the next: waiting for the slowest image of each chunk would
take one in twenty from the throughput of two threads.
"""

from __future__ import annotations

import itertools
import mmap
from collections import deque
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np

from fastvgg import engine
from fastvgg.datasets.base import ImageRecord, bytes_of
from fastvgg.datasets.image_writer import ImageFolderTarget
from fastvgg.datasets.images import ImageSource
from fastvgg.datasets.index import index_text
from fastvgg.errors import StoppedError
from fastvgg.parallel import TaskQueue, ThreadSlot
from fastvgg.stream.journal import Commit
from fastvgg.stream.manifest import checksum
from fastvgg.transform import storage_dtype

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Sequence

    from numpy.typing import NDArray

    from fastvgg.datasets.base import Chunk, Payload, Source, Target
    from fastvgg.parallel import TaskGroup
    from fastvgg.stream.plan import Plan

__all__ = ["BufferRing", "ChunkResult", "ChunkTask", "check_no_failures", "compute", "make_commit"]

MAX_IN_FLIGHT: Final = 2  # chunks that are computed at a time, row by row
UNREAD: Final = ImageRecord("", "", 0, 0, True, "not read yet")


class ChunkTask(NamedTuple):
    """A chunk that is to be computed."""

    chunk: int
    start: int
    stop: int
    keep: Callable[[NDArray[Any]], list[ImageRecord]] | None = None
    """Writes what there is of it already, and returns the records: only what failed is computed."""


class ChunkResult(NamedTuple):
    """A chunk that is computed; valid until the next but one is asked for."""

    chunk: int
    start: int
    stop: int
    stored: Payload
    records: list[ImageRecord]


class BufferRing:
    """Memory for the rows of chunks, which take turns in it; new memory is slow.

    Parameters
    ----------
    plan
        Whose chunks.
    count
        How many of them are computed or written at a time.
    """

    def __init__(self, plan: Plan, count: int) -> None:
        self._shape = (plan.chunk_images, *plan.result.shape[1:])
        self._dtype = storage_dtype(plan.result.dtype)
        self._nbytes = plan.chunk_images * plan.result.image_bytes
        nbytes = self._nbytes + mmap.PAGESIZE
        self._memory = itertools.cycle([np.empty(nbytes, np.uint8) for _ in range(count)])

    @classmethod
    def of(cls, plan: Plan, source: Source) -> BufferRing:
        """Return as many as a run has under way at a time."""
        return cls(plan, MAX_IN_FLIGHT + 1 if isinstance(source, ImageSource) else 2)

    def rows(self, offset: int) -> NDArray[Any]:
        """Return rows that lie within a page as they will at an offset of a file."""
        memory = next(self._memory)
        skipped = (offset - memory.ctypes.data) % mmap.PAGESIZE
        lying = memory[skipped : skipped + self._nbytes]
        return lying.view(self._dtype).reshape(self._shape)


def compute(
    plan: Plan,
    source: Source,
    target: Target,
    work: Iterable[ChunkTask],
    buffers: BufferRing | None = None,
) -> Generator[ChunkResult, None, None]:
    """Compute chunks in the order of the work, in memory of its own where none is given.

    An image that cannot be read has a row of zeros, or no file.
    """
    if isinstance(target, ImageFolderTarget):
        return _compute_rows(plan, work, _EncodeTask(plan, source, target).begun)
    buffers = buffers or BufferRing.of(plan, source)
    if isinstance(source, ImageSource):
        return _compute_rows(plan, work, _DecodeTask(plan, source, target, buffers).begun)
    return _compute_batches(plan, source, target, work, buffers)


def make_commit(plan: Plan, source: Source, computed: ChunkResult) -> Commit:
    """Return what the journal is to say of a chunk; refuse what failed, where the plan is strict.

    Raises
    ------
    StoppedError
        Naming the first image that could not be read.
    """
    chunk, start, stop, stored, records = computed
    failures = [(row, record) for row, record in enumerate(records, start) if record.failed]
    check_no_failures(plan, failures)
    identity = ""
    if isinstance(source, ImageSource):
        identity = source.checksum_of(start, stop, {row for row, _ in failures})
    return Commit(chunk, checksum(stored), identity, index_text(records, start), len(failures))


def check_no_failures(plan: Plan, failures: list[tuple[int, ImageRecord]]) -> None:
    """Stop at an image that could not be read, where the plan is strict."""
    for row, record in failures:
        if plan.strict:
            raise StoppedError(
                f"{plan.source}/{record.path} (row {row}) cannot be read: {record.reason}",
                "repair or remove it and give --restart, or go on without --strict",
            )


def _compute_batches(
    plan: Plan, source: Source, target: Target, work: Iterable[ChunkTask], buffers: BufferRing
) -> Generator[ChunkResult, None, None]:
    """Compute an array from an array."""
    for chunk, start, stop, _ in work:
        out = buffers.rows(target.offset(start))[: stop - start]
        records = _compute_chunk(plan, source.read(start, stop), out)
        yield ChunkResult(chunk, start, stop, [bytes_of(out)], records)


def _compute_chunk(plan: Plan, read: Chunk, out: NDArray[Any]) -> list[ImageRecord]:
    """Compute a chunk, and let go of what was read before the next is; return its records."""
    threads, backend = plan.threads, plan.choose_backend()
    engine.apply(
        plan.transform, read.batch, out, threads=threads, backend=backend, cached_output=True
    )
    for at, record in enumerate(read.records):
        if record.failed:
            out[at] = 0
    return read.records


class _InFlight(NamedTuple):
    """A chunk that is computed row by row."""

    computed: ChunkResult
    rows: Iterable[int]
    """Within the chunk: which are to be computed."""
    compute_row: Callable[[int], None]


def _compute_rows(
    plan: Plan, work: Iterable[ChunkTask], begun: Callable[[ChunkTask], _InFlight]
) -> Generator[ChunkResult, None, None]:
    """Compute each row by itself, on all threads."""
    under_way: deque[tuple[ChunkResult, TaskGroup]] = deque()

    def finished() -> ChunkResult:
        computed, group = under_way.popleft()
        group.wait()
        return computed

    with TaskQueue(plan.threads) as tasks:
        for part in work:
            computed, rows, compute_row = begun(part)
            under_way.append((computed, tasks.submit(rows, compute_row)))
            if len(under_way) == MAX_IN_FLIGHT:
                yield finished()
        while under_way:
            yield finished()


class _DecodeTask:
    """Images into rows of an array."""

    def __init__(
        self, plan: Plan, source: ImageSource, target: Target, buffers: BufferRing
    ) -> None:
        self._plan = plan
        self._source = source
        self._target = target
        self._images = np.empty((plan.threads, *source.header.shape[1:]), np.uint8)
        self._thread_slot = ThreadSlot()
        self._buffers = buffers
        self._packs = plan.transform.direction == "pack"

    def begun(self, part: ChunkTask) -> _InFlight:
        images = part.stop - part.start
        staging = self._buffers.rows(self._target.offset(part.start))
        transform = engine.bind_rows(
            self._plan.transform, self._images, staging, backend=self._plan.choose_backend()
        )
        out = staging[:images]
        records = [UNREAD] * images
        rows: Sequence[int] = range(images)
        if part.keep is not None:
            records = part.keep(out)
            rows = [at for at, record in enumerate(records) if record.failed]

        def pack(at: int) -> None:
            records[at] = self._source.decode(part.start + at, out[at])

        def preprocess(at: int) -> None:
            slot = self._thread_slot()
            records[at] = self._source.decode(part.start + at, self._images[slot])
            if records[at].failed:
                out[at] = 0
            else:
                transform(slot, at)

        computed = ChunkResult(*part[:3], [bytes_of(out)], records)
        return _InFlight(computed, rows, pack if self._packs else preprocess)


class _EncodeTask:
    """Rows of an array into image files."""

    def __init__(self, plan: Plan, source: Source, target: ImageFolderTarget) -> None:
        self._plan = plan
        self._source = source
        self._target = target
        self._images = np.empty((plan.threads, *plan.result.shape[1:]), np.uint8)
        self._thread_slot = ThreadSlot()

    def begun(self, part: ChunkTask) -> _InFlight:
        batch, records = self._source.read(part.start, part.stop)
        stored = [b""] * len(batch)
        rows = [at for at in range(len(batch)) if not (records and records[at].failed)]
        plan, images = self._plan, self._images
        transform = engine.bind_rows(plan.transform, batch, images, backend=plan.choose_backend())

        def compute_row(at: int) -> None:
            slot = self._thread_slot()
            transform(at, slot)
            stored[at] = self._target.encode(images[slot])

        return _InFlight(ChunkResult(*part[:3], stored, records), rows, compute_row)
