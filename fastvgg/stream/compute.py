"""Read and compute the chunks of a run, one after the other, each as the bytes that are stored.

An array becomes an array chunk by chunk: all threads share each. Images that are decoded, or
encoded, take their time one by one, so there every image is a piece of work by itself, and threads
that find none left of one chunk begin the next: waiting for the slowest image of each chunk would
take one in twenty from the throughput of two threads.
"""

from __future__ import annotations

import itertools
import threading
from collections import deque
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np

from fastvgg import engine
from fastvgg.datasets.base import bytes_of
from fastvgg.datasets.files import ImageFiles
from fastvgg.datasets.images import Images
from fastvgg.datasets.index import Record
from fastvgg.threads import Lots
from fastvgg.transform import storage_dtype

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from numpy.typing import NDArray

    from fastvgg.datasets.base import Source, Stored, Target
    from fastvgg.stream.plan import Plan
    from fastvgg.threads import Lot

__all__ = ["Computed", "Work", "compute"]

AHEAD: Final = 2  # chunks that are computed at a time, row by row
UNREAD: Final = Record("", "", 0, 0, True, "not read yet")
STAGINGS: Final = AHEAD + 1  # the one more is being written


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


def compute(plan: Plan, source: Source, target: Target, work: Iterable[Work]) -> Iterator[Computed]:
    """Compute chunks in the order of the work.

    An image that cannot be read has a row of zeros, or no file.
    """
    if isinstance(source, Images):
        return _row_by_row(plan, work, _Decoding(plan, source).begun)
    if isinstance(target, ImageFiles):
        return _row_by_row(plan, work, _Encoding(plan, source, target).begun)
    return _together(plan, source, work)


def _together(plan: Plan, source: Source, work: Iterable[Work]) -> Iterator[Computed]:
    """Compute an array from an array."""
    stagings = itertools.cycle([_staging(plan) for _ in range(2)])
    for chunk, start, stop, _ in work:
        out = next(stagings)[: stop - start]
        read = source.read(start, stop)
        engine.apply(
            plan.transform,
            read.batch,
            out,
            threads=plan.threads,
            backend=plan.backend,
            read_next=True,
        )
        for at, record in enumerate(read.records):
            if record.failed:
                out[at] = 0
        yield Computed(chunk, start, stop, [bytes_of(out)], read.records)


def _staging(plan: Plan) -> NDArray[Any]:
    shape = (plan.chunk_images, *plan.result.shape[1:])
    return np.empty(shape, storage_dtype(plan.result.dtype))


class _Begun(NamedTuple):
    """A chunk that is computed row by row."""

    computed: Computed
    rows: Iterable[int]
    """Within the chunk: which are to be computed."""
    work_on: Callable[[int], None]


def _row_by_row(
    plan: Plan, work: Iterable[Work], begun: Callable[[Work], _Begun]
) -> Iterator[Computed]:
    """Compute each row by itself, on all threads."""
    under_way: deque[tuple[Computed, Lot]] = deque()

    def finished() -> Computed:
        computed, lot = under_way.popleft()
        lot.wait()
        return computed

    _compile(plan)
    with Lots(plan.threads) as lots:
        for part in work:
            computed, rows, work_on = begun(part)
            under_way.append((computed, lots.begin(rows, work_on)))
            if len(under_way) == AHEAD:
                yield finished()
        while under_way:
            yield finished()


def _compile(plan: Plan) -> None:
    """Have the kernel compiled before threads need it: each of them would."""
    if plan.transform.direction != "pack":
        _apply(plan, np.zeros((3, 3, 3), storage_dtype(plan.header.dtype)), None)


def _apply(plan: Plan, image: NDArray[Any], out: NDArray[Any] | None) -> None:
    """Transform one image on the thread that calls."""
    engine.apply(plan.transform, image, out, threads=1, backend=plan.backend, read_next=True)


class _Scratch(threading.local):
    """Memory for an image, of each thread its own."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.image = np.empty(shape, np.uint8)


class _Decoding:
    """Images into rows of an array."""

    def __init__(self, plan: Plan, source: Images) -> None:
        self._plan = plan
        self._source = source
        self._stagings = itertools.cycle([_staging(plan) for _ in range(STAGINGS)])
        self._scratch = _Scratch(source.header.shape[1:])
        self._packs = plan.transform.direction == "pack"

    def begun(self, part: Work) -> _Begun:
        images = part.stop - part.start
        out = next(self._stagings)[:images]
        records = [UNREAD] * images
        rows: Sequence[int] = range(images)
        if part.keep is not None:
            kept = part.keep(out)
            records[:] = kept
            rows = [at for at, record in enumerate(kept) if record.failed]

        def work_on(at: int) -> None:
            records[at] = self._decoded(part.start + at, out[at])

        return _Begun(Computed(*part[:3], [bytes_of(out)], records), rows, work_on)

    def _decoded(self, row: int, out: NDArray[Any]) -> Record:
        if self._packs:
            return self._source.decode(row, out)
        image = self._scratch.image
        record = self._source.decode(row, image)
        if record.failed:
            out[...] = 0
        else:
            _apply(self._plan, image, out)
        return record


class _Encoding:
    """Rows of an array into image files."""

    def __init__(self, plan: Plan, source: Source, target: ImageFiles) -> None:
        self._plan = plan
        self._source = source
        self._target = target
        self._scratch = _Scratch(plan.result.shape[1:])

    def begun(self, part: Work) -> _Begun:
        batch, records = self._source.read(part.start, part.stop)
        stored = [b""] * len(batch)
        rows = [at for at in range(len(batch)) if not (records and records[at].failed)]

        def work_on(at: int) -> None:
            _apply(self._plan, batch[at], self._scratch.image)
            stored[at] = self._target.encode(self._scratch.image)

        return _Begun(Computed(*part[:3], stored, records), rows, work_on)
