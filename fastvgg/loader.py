"""Batches of a stored dataset for training: read ahead, preprocessed on the way, in reused memory.

Threads read and transform pieces of a batch; while one batch is used the next is made.
"""

from __future__ import annotations

import contextlib
from collections import deque
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np

from fastvgg import engine
from fastvgg.backend import choose_for
from fastvgg.datasets.images import ImageSource
from fastvgg.datasets.open import open_source
from fastvgg.errors import SourceError, UsageError
from fastvgg.parallel import TaskQueue, ThreadSlot, check_threads
from fastvgg.storage.location import parse_location
from fastvgg.stream.manifest import describes_other_dataset, read_manifest, read_transform
from fastvgg.stream.planner import plan_result
from fastvgg.stream.redo_log import read_redo_log_header, unfinished_error
from fastvgg.stream.values import check_not_already_done
from fastvgg.transform import storage_dtype

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator, Mapping

    from numpy.typing import NDArray

    from fastvgg.datasets.base import ArraySource
    from fastvgg.parallel import TaskGroup
    from fastvgg.transform import Layout, Transform

__all__ = ["Batch", "Batches", "batches"]

# What a thread reads at a time. Taking turns with another thread costs 30 us a piece: of the kernel
# alone 8 MiB reach 0.99, 4 MiB 0.87, 1 MiB 0.82.
READ_BYTES: Final = 8 * 1024 * 1024
# Batches that are made at a time: the one that is asked for, and the next. The memory of one more
# holds the batch that was given last.
MAX_IN_FLIGHT: Final = 2
MAX_INT64: Final = 2**63 - 1


class Batch(NamedTuple):
    """Some images, and which they are."""

    images: NDArray[Any]
    rows: NDArray[np.int64]


class Batches:
    """The batches of a stored dataset, and which rows they are; each iteration is an epoch.

    Files are open while one iterates.

    Parameters
    ----------
    path
        An array: a .npy file, a directory of part-*.npy, a Zarr array, or FILE.h5::/NAME.
    size
        How many images make a batch.
    transform
        What is done to each batch, such as ``Transform("torch", out_layout="NCHW")`` to stored
        images. If not given, rows come as they are stored.
    shuffle
        Give rows in another order in every epoch, which `seed` and the epoch's number decide.
    seed
        Of the orders.
    shard
        ``(i, n)``: the i-th of n parts of the order, which differ by a row at most. All parts
        together are the dataset.
    drop_last
        Leave out a last batch that is not full.
    threads
        How many read and transform; all usable cores if not given.
    copy
        Give each batch memory of its own. Else the memory of a batch is used again: it is valid
        until the next but one is asked for.

    Raises
    ------
    SourceError, ShapeError, DtypeError
        If there is no such dataset, or the transform does not fit it.
    UsageError
        If an argument is out of range, or the dataset is preprocessed already.
    StoppedError
        While iterating, if the dataset becomes shorter or cannot be read.

    Examples
    --------
    >>> x = np.arange(5 * 4 * 4 * 3, dtype=np.uint8).reshape(5, 4, 4, 3)
    >>> np.save("images.npy", x)
    >>> for images, rows in batches("images.npy", 2):
    ...     print(images.shape, rows, (images == x[rows]).all())
    (2, 4, 4, 3) [0 1] True
    (2, 4, 4, 3) [2 3] True
    (1, 4, 4, 3) [4] True
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        size: int,
        *,
        transform: Transform | None = None,
        shuffle: bool = False,
        seed: int = 0,
        shard: tuple[int, int] = (0, 1),
        drop_last: bool = False,
        threads: int | None = None,
        copy: bool = False,
    ) -> None:
        _check_whole("size", size, least=1)
        _check_whole("seed", seed)
        _check_shard(shard)
        self.path = parse_location(path)
        self.size = size
        self.transform = transform
        self.shuffle = shuffle
        self.seed = seed
        self.shard = shard
        self.drop_last = drop_last
        self.threads = check_threads(threads)
        self.copy = copy
        self._epoch = -1
        self._given = 0
        self._continues = False
        self._memory: _BufferRing | None = None
        with contextlib.closing(self._open()) as source:
            self.header = source.header
            self.result = source.header if transform is None else plan_result(source, transform)

    def __getstate__(self) -> dict[str, Any]:
        """Return what is pickled: all but the memory."""
        return {**self.__dict__, "_memory": None}

    def __len__(self) -> int:
        """Return how many batches an epoch has."""
        rows = self._last_row() - self._first_row()
        return rows // self.size if self.drop_last else -(-rows // self.size)

    def __iter__(self) -> Iterator[Batch]:
        """Begin the next epoch, or go on with the one of a state that was loaded."""
        if not self._continues:
            self._epoch, self._given = self._epoch + 1, 0
        self._continues = False
        return self._epoch_from(self._epoch, self._given)

    def set_epoch(self, epoch: int) -> None:
        """Have the next iteration be the epoch of a number, from its beginning."""
        _check_whole("epoch", epoch)
        self._epoch, self._given, self._continues = epoch, 0, True

    def state_dict(self) -> dict[str, Any]:
        """Return where the iteration is that gave a batch last, and of what, as JSON types."""
        return {**self._identity(), "epoch": max(0, self._epoch), "given": self._given}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Have the next iteration go on after the batches that had been given.

        Raises
        ------
        UsageError
            If the state is of other batches.
        """
        for name, here in self._identity().items():
            if state.get(name) != here:
                raise UsageError(
                    f"the state is of batches with {name} {state.get(name)!r}, and these have "
                    f"{name} {here!r}",
                    "make them as they were when the state was saved",
                )
        epoch = _check_whole("epoch", state.get("epoch"))
        given = _check_whole("given", state.get("given"), most=len(self))
        self._epoch, self._given, self._continues = epoch, given, True

    def _identity(self) -> dict[str, Any]:
        return {
            "shape": list(self.header.shape),
            "dtype": self.header.dtype,
            "size": self.size,
            "shuffle": self.shuffle,
            "seed": self.seed,
            "shard": list(self.shard),
            "drop_last": self.drop_last,
        }

    def _first_row(self) -> int:
        return self.header.images * self.shard[0] // self.shard[1]

    def _last_row(self) -> int:
        return self.header.images * (self.shard[0] + 1) // self.shard[1]

    def _order(self, epoch: int) -> NDArray[np.int64]:
        """Return the rows of an epoch, in order."""
        images = self.header.images
        order = np.arange(images)
        if self.shuffle:
            order = np.random.default_rng((self.seed, epoch)).permutation(images)
        return order[self._first_row() : self._last_row()].astype(np.int64)

    def _open(self) -> ArraySource:
        """Open the dataset, in the layout that the transform reads."""
        ring = read_redo_log_header(self.path)
        if ring is not None:
            raise unfinished_error(ring, self.path)
        manifest, done = read_manifest(self.path), read_transform(self.path)
        layout: Layout = "NHWC" if done is None else done.out_layout
        if self.transform is not None:
            if done is not None:
                check_not_already_done(self.path, done, self.transform.direction)
            layout = self.transform.layout
        dtype_hint = None if manifest is None else manifest.header.dtype
        use_index = not describes_other_dataset(self.path)
        source = open_source(self.path, layout=layout, dtype_hint=dtype_hint, use_index=use_index)
        if isinstance(source, ImageSource):
            source.close()
            raise SourceError(
                f"{self.path} holds image files, which are decoded slower than networks learn",
                "make an array of them once: fastvgg pack",
            )
        return source

    @contextlib.contextmanager
    def _borrowed_buffers(self) -> Iterator[_BufferRing]:
        """Return the memory of an earlier iteration, if no other has it."""
        memory, self._memory = self._memory, None
        if memory is None:
            shape = (self.size, *self.result.shape[1:])
            memory = _BufferRing(shape, storage_dtype(self.result.dtype), is_new=self.copy)
        try:
            yield memory
        finally:
            self._memory = memory

    def _epoch_from(self, epoch: int, given: int) -> Iterator[Batch]:
        order, count, size = self._order(epoch), len(self), self.size
        with (
            contextlib.closing(self._open()) as source,
            self._borrowed_buffers() as memory,
            TaskQueue(self.threads) as tasks,
        ):
            if source.header != self.header:
                raise SourceError(f"{self.path} is another than it was", "make the batches again")
            making = _BatchBuilder(self, source, tasks)
            under_way: deque[tuple[Batch, TaskGroup]] = deque()
            for number in range(given, count):
                for ahead in range(number + len(under_way), min(number + MAX_IN_FLIGHT, count)):
                    rows = order[ahead * size : (ahead + 1) * size]
                    under_way.append(making.submit(rows, memory.ahead(ahead - number)))
                batch, group = under_way.popleft()
                group.wait()
                memory.advance()
                self._epoch, self._given = epoch, number + 1
                yield batch


batches = Batches


class _BufferRing:
    """A ring of memory for batches, or new memory for each."""

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype[Any], *, is_new: bool) -> None:
        self._shape = shape
        self._dtype = dtype
        self._ring = [] if is_new else [np.empty(shape, dtype) for _ in range(MAX_IN_FLIGHT + 1)]
        self._given = 0

    def ahead(self, count: int) -> NDArray[Any]:
        """Return the memory of the batch that is given after so many others."""
        if not self._ring:
            return np.empty(self._shape, self._dtype)
        return self._ring[(self._given + count) % len(self._ring)]

    def advance(self) -> None:
        """Go on by one, as a batch was given; the one before it stays valid."""
        self._given += 1


class _BatchBuilder:
    """What makes batches."""

    def __init__(self, wanted: Batches, source: ArraySource, tasks: TaskQueue) -> None:
        self._source = source
        self._tasks = tasks
        self._transform = wanted.transform
        self._consecutive = not wanted.shuffle
        held = source.header
        epoch_bytes = 2 * held.nbytes if wanted.transform else 0
        self._backend = choose_for("auto", epoch_bytes, wanted.threads)
        fair_share = -(-wanted.size // wanted.threads)
        self._images_per_read = max(1, min(fair_share, READ_BYTES // held.image_bytes))
        slots = wanted.threads * self._images_per_read if self._transform and wanted.shuffle else 0
        self._slots = np.empty((slots, *held.shape[1:]), storage_dtype(held.dtype))
        self._thread_slot = ThreadSlot()

    def submit(self, rows: NDArray[np.int64], memory: NDArray[Any]) -> tuple[Batch, TaskGroup]:
        """Begin to make the batch of some rows."""
        images = memory[: len(rows)]
        make = self._make_consecutive if self._consecutive else self._make_scattered
        starts = range(0, len(rows), self._images_per_read)
        pieces = [slice(start, min(start + self._images_per_read, len(rows))) for start in starts]
        return Batch(images, rows), self._tasks.submit(
            pieces, lambda piece: make(rows[piece], images, piece.start)
        )

    def _make_consecutive(self, rows: NDArray[np.int64], images: NDArray[Any], at: int) -> None:
        """Make a piece of rows that follow one another, where the source shows them."""
        first, count = int(rows[0]), len(rows)
        if self._transform is None:
            self._source.read_into(first, images[at : at + count])
            return
        read = self._source.read(first, first + count).batch
        engine.bind_rows(self._transform, read, images, backend=self._backend)(0, at, count)

    def _make_scattered(self, rows: NDArray[np.int64], images: NDArray[Any], at: int) -> None:
        """Make a piece of rows from here and there, gathered in memory of the thread."""
        if self._transform is None:
            self._gather(rows, images[at : at + len(rows)])
            return
        slot = self._thread_slot() * self._images_per_read
        self._gather(rows, self._slots[slot : slot + len(rows)])
        transform = engine.bind_rows(self._transform, self._slots, images, backend=self._backend)
        transform(slot, at, len(rows))

    def _gather(self, rows: NDArray[np.int64], into: NDArray[Any]) -> None:
        for at, row in enumerate(rows.tolist()):
            self._source.read_into(row, into[at : at + 1])


def _check_whole(name: str, value: object, *, least: int = 0, most: int = MAX_INT64) -> int:
    if type(value) is not int or not least <= value <= most:
        raise UsageError(f"{name} is {value!r}", f"give a whole number from {least} to {most}")
    return value


def _check_shard(shard: object) -> None:
    numbers = shard if isinstance(shard, tuple) else ()
    if [type(number) for number in numbers] != [int, int] or not 0 <= numbers[0] < numbers[1]:
        raise UsageError(f"shard is {shard!r}", "give (i, n), the i-th of n parts, from 0")
