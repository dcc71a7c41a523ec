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
from fastvgg.datasets.base import bytes_of
from fastvgg.datasets.files import ImageFiles
from fastvgg.datasets.images import Images
from fastvgg.datasets.index import Record, index_text
from fastvgg.errors import StoppedError
from fastvgg.stream.journal import Commit
from fastvgg.stream.manifest import checksum
from fastvgg.threads import Lots, ThreadNumber
from fastvgg.transform import storage_dtype

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Sequence

    from numpy.typing import NDArray

    from fastvgg.datasets.base import Chunk, Source, Stored, Target
    from fastvgg.stream.plan import Plan
    from fastvgg.threads import Lot

__all__ = ["Computed", "Stagings", "Work", "commit_of", "compute", "refuse_failed"]

AHEAD: Final = 2  # chunks that are computed at a time, row by row
UNREAD: Final = Record("", "", 0, 0, True, "not read yet")


class Work(NamedTuple):
    """A chunk that is to be computed."""

    chunk: int
    start: int
    stop: int
    keep: Callable[[NDArray[Any]], list[Record]] | None = None
    """Writes what there is of it already, and returns the records: only what failed is computed."""


class Computed(NamedTuple):
    """A chunk that is computed; valid until the next but one is asked for."""

    chunk: int
    start: int
    stop: int
    stored: Stored
    records: list[Record]


class Stagings:
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
    def of(cls, plan: Plan, source: Source) -> Stagings:
        """Return as many as a run has under way at a time."""
        return cls(plan, AHEAD + 1 if isinstance(source, Images) else 2)

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
    work: Iterable[Work],
    stagings: Stagings | None = None,
) -> Generator[Computed, None, None]:
    """Compute chunks in the order of the work, in memory of its own where none is given.

    An image that cannot be read has a row of zeros, or no file.
    """
    if isinstance(target, ImageFiles):
        return _row_by_row(plan, work, _Encoding(plan, source, target).begun)
    stagings = stagings or Stagings.of(plan, source)
    if isinstance(source, Images):
        return _row_by_row(plan, work, _Decoding(plan, source, target, stagings).begun)
    return _together(plan, source, target, work, stagings)


def commit_of(plan: Plan, source: Source, computed: Computed) -> Commit:
    """Return what the journal is to say of a chunk; refuse what failed, where the plan is strict.

    Raises
    ------
    StoppedError
        Naming the first image that could not be read.
    """
    chunk, start, stop, stored, records = computed
    failures = [(row, record) for row, record in enumerate(records, start) if record.failed]
    refuse_failed(plan, failures)
    identity = ""
    if isinstance(source, Images):
        identity = source.checksum_of(start, stop, {row for row, _ in failures})
    return Commit(chunk, checksum(stored), identity, index_text(records, start), len(failures))


def refuse_failed(plan: Plan, failures: list[tuple[int, Record]]) -> None:
    """Stop at an image that could not be read, where the plan is strict."""
    for row, record in failures:
        if plan.strict:
            raise StoppedError(
                f"{plan.source}/{record.path} (row {row}) cannot be read: {record.reason}",
                "repair or remove it and give --restart, or go on without --strict",
            )


def _together(
    plan: Plan, source: Source, target: Target, work: Iterable[Work], stagings: Stagings
) -> Generator[Computed, None, None]:
    """Compute an array from an array."""
    for chunk, start, stop, _ in work:
        out = stagings.rows(target.offset(start))[: stop - start]
        records = _computed(plan, source.read(start, stop), out)
        yield Computed(chunk, start, stop, [bytes_of(out)], records)


def _computed(plan: Plan, read: Chunk, out: NDArray[Any]) -> list[Record]:
    """Compute a chunk, and let go of what was read before the next is; return its records."""
    threads, backend = plan.threads, plan.choose_backend()
    engine.apply(plan.transform, read.batch, out, threads=threads, backend=backend, read_next=True)
    for at, record in enumerate(read.records):
        if record.failed:
            out[at] = 0
    return read.records


class _Begun(NamedTuple):
    """A chunk that is computed row by row."""

    computed: Computed
    rows: Iterable[int]
    """Within the chunk: which are to be computed."""
    work_on: Callable[[int], None]


def _row_by_row(
    plan: Plan, work: Iterable[Work], begun: Callable[[Work], _Begun]
) -> Generator[Computed, None, None]:
    """Compute each row by itself, on all threads."""
    under_way: deque[tuple[Computed, Lot]] = deque()

    def finished() -> Computed:
        computed, lot = under_way.popleft()
        lot.wait()
        return computed

    with Lots(plan.threads) as lots:
        for part in work:
            computed, rows, work_on = begun(part)
            under_way.append((computed, lots.begin(rows, work_on)))
            if len(under_way) == AHEAD:
                yield finished()
        while under_way:
            yield finished()


class _Decoding:
    """Images into rows of an array."""

    def __init__(self, plan: Plan, source: Images, target: Target, stagings: Stagings) -> None:
        self._plan = plan
        self._source = source
        self._target = target
        self._images = np.empty((plan.threads, *source.header.shape[1:]), np.uint8)
        self._thread_number = ThreadNumber()
        self._stagings = stagings
        self._packs = plan.transform.direction == "pack"

    def begun(self, part: Work) -> _Begun:
        images = part.stop - part.start
        staging = self._stagings.rows(self._target.offset(part.start))
        transform = engine.row_by_row(
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
            slot = self._thread_number()
            records[at] = self._source.decode(part.start + at, self._images[slot])
            if records[at].failed:
                out[at] = 0
            else:
                transform(slot, at)

        computed = Computed(*part[:3], [bytes_of(out)], records)
        return _Begun(computed, rows, pack if self._packs else preprocess)


class _Encoding:
    """Rows of an array into image files."""

    def __init__(self, plan: Plan, source: Source, target: ImageFiles) -> None:
        self._plan = plan
        self._source = source
        self._target = target
        self._images = np.empty((plan.threads, *plan.result.shape[1:]), np.uint8)
        self._thread_number = ThreadNumber()

    def begun(self, part: Work) -> _Begun:
        batch, records = self._source.read(part.start, part.stop)
        stored = [b""] * len(batch)
        rows = [at for at in range(len(batch)) if not (records and records[at].failed)]
        plan, images = self._plan, self._images
        transform = engine.row_by_row(plan.transform, batch, images, backend=plan.choose_backend())

        def work_on(at: int) -> None:
            slot = self._thread_number()
            transform(at, slot)
            stored[at] = self._target.encode(images[slot])

        return _Begun(Computed(*part[:3], stored, records), rows, work_on)
