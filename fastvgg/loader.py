"""A multithreaded, prefetching loader: batches of a stored dataset, for training.

Worker threads read and transform spans of a batch into a ring of reusable buffers. While the caller
uses one batch, the workers build the next.
"""

from __future__ import annotations

import contextlib
from collections import deque
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np

from fastvgg import engine
from fastvgg.backend import choose_for_size
from fastvgg.datasets.images import ImageSource
from fastvgg.datasets.open import open_source
from fastvgg.errors import SourceError, StoppedError, UsageError
from fastvgg.parallel import TaskQueue, ThreadSlot, check_threads
from fastvgg.storage.location import Location
from fastvgg.stream.manifest import Provenance
from fastvgg.stream.preflight import plan_result
from fastvgg.stream.redo_log import check_not_in_place
from fastvgg.stream.source import check_exists, check_not_already_done
from fastvgg.stream.tiles import TileTransform
from fastvgg.transform import Transform, storage_dtype

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator, Mapping

    from numpy.typing import NDArray

    from fastvgg.datasets.base import ArraySource
    from fastvgg.parallel import TaskGroup
    from fastvgg.transform import Layout

# The size of one read. Switching threads costs 30 us a read: 8 MiB reach 0.99 of the kernel's own
# throughput, 4 MiB 0.87, 1 MiB 0.82.
READ_BYTES: Final = 8 * 1024 * 1024
# The batch requested now, and the next one. One more buffer holds the batch yielded last.
MAX_IN_FLIGHT: Final = 2
MAX_INT64: Final = 2**63 - 1


class Batch(NamedTuple):
    """Images, and their row numbers in the dataset."""

    images: NDArray[Any]
    rows: NDArray[np.int64]


class Batches:
    """Iterate over a stored dataset in batches; each iteration is one epoch.

    Every batch is an ``(images, rows)`` pair: the images, and their row numbers in the dataset. The
    dataset is open only during an iteration.

    Parameters
    ----------
    path
        An array: a .npy file, a directory of part-*.npy, a Zarr array, or FILE.h5::/NAME.
    batch_size
        The number of images in a batch. The last batch of an epoch may be smaller.
    transform
        The transform of each batch, such as ``Transform("torch", out_layout="NCHW")`` for stored
        images. By default rows are yielded as they are stored.
    shuffle
        Shuffle every epoch. The permutation depends only on `seed` and the epoch number.
    seed
        The seed of the permutations.
    shard
        ``(i, n)``: yield only the i-th of n shards of each epoch. The shards are disjoint, cover
        the dataset, and differ by at most one row.
    drop_last
        Drop the last batch if it is smaller than `batch_size`.
    threads
        The number of threads that read and transform; by default all available CPUs.
    copy
        Allocate a new buffer for every batch. By default batches are views into a ring of three
        buffers: a batch stays valid until two more batches have been requested.

    Raises
    ------
    SourceError, ShapeError, DtypeError
        If the dataset does not exist, does not fit the transform, or is already preprocessed.
    UsageError
        If an argument is out of range.
    StoppedError
        During an iteration, if the dataset was changed or cannot be read.

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
        batch_size: int,
        *,
        transform: Transform | None = None,
        shuffle: bool = False,
        seed: int = 0,
        shard: tuple[int, int] = (0, 1),
        drop_last: bool = False,
        threads: int | None = None,
        copy: bool = False,
    ) -> None:
        _check_integer("batch_size", batch_size, minimum=1)
        _check_integer("seed", seed)
        _check_shard(shard)
        if transform is not None and not isinstance(transform, Transform):
            raise UsageError(f"transform is {transform!r}", "give a Transform, or None")
        self.location = Location.parse(path)
        self.batch_size = batch_size
        self.transform = transform
        self.shuffle = shuffle
        self.seed = seed
        self.shard = shard
        self.drop_last = drop_last
        self.threads = check_threads(threads)
        self.copy = copy
        self._epoch = -1
        self._batches_yielded = 0
        self._has_start = False  # whether the next iteration starts at the two numbers above
        self._buffers: deque[NDArray[Any]] | None = None
        with contextlib.closing(self._open()) as source:
            self.header = source.header
            self.result = source.header if transform is None else plan_result(source, transform)

    def __getstate__(self) -> dict[str, Any]:
        """Return the state to pickle, without the buffers."""
        return {**self.__dict__, "_buffers": None}

    def __len__(self) -> int:
        """Return the number of batches in an epoch."""
        rows = len(self._positions())
        return rows // self.batch_size if self.drop_last else -(-rows // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        """Start the next epoch, or the one that `set_epoch` or `load_state_dict` selected."""
        if not self._has_start:
            self._epoch, self._batches_yielded = self._epoch + 1, 0
        self._has_start = False
        return self._iterate(self._epoch, self._batches_yielded)

    def set_epoch(self, epoch: int) -> None:
        """Select the epoch number of the next iteration, which starts at its first batch."""
        _check_integer("epoch", epoch)
        self._epoch, self._batches_yielded, self._has_start = epoch, 0, True

    def state_dict(self) -> dict[str, Any]:
        """Return the position of the latest iteration and the options, as JSON types."""
        return {
            **self._identity(),
            "epoch": max(0, self._epoch),
            "batches_yielded": self._batches_yielded,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume the next iteration after the batches that were already yielded.

        Raises
        ------
        UsageError
            If the state was saved from batches with other options, or is damaged.
        """
        for name, expected in self._identity().items():
            if state.get(name) != expected:
                raise UsageError(
                    f"the state was saved with {name} {state.get(name)!r}, but these batches have "
                    f"{name} {expected!r}",
                    "create the batches with the options that they had when the state was saved",
                )
        epoch = _check_integer("epoch", state.get("epoch"))
        yielded = _check_integer("batches_yielded", state.get("batches_yielded"), maximum=len(self))
        self._epoch, self._batches_yielded, self._has_start = epoch, yielded, True

    def _identity(self) -> dict[str, Any]:
        return {
            "shape": list(self.header.shape),
            "dtype": self.header.dtype,
            "batch_size": self.batch_size,
            "shuffle": self.shuffle,
            "seed": self.seed,
            "shard": list(self.shard),
            "drop_last": self.drop_last,
        }

    def _positions(self) -> range:
        """Return the positions of this shard in the order of an epoch."""
        images, (number, shards) = self.header.images, self.shard
        return range(images * number // shards, images * (number + 1) // shards)

    def _order(self, epoch: int) -> NDArray[np.int64]:
        """Return the row numbers of this shard in an epoch, in the order in which to yield them."""
        images = self.header.images
        order = np.arange(images)
        if self.shuffle:
            order = np.random.default_rng((self.seed, epoch)).permutation(images)
        positions = self._positions()
        return order[positions.start : positions.stop].astype(np.int64)

    def _open(self) -> ArraySource:
        """Open the dataset in the layout that the transform reads."""
        check_not_in_place(self.location.container)
        check_exists(self.location)
        recorded = Provenance.read(self.location)
        applied, manifest = recorded.transform, recorded.manifest
        layout: Layout = "NHWC" if applied is None else applied.out_layout
        if self.transform is not None:
            if applied is not None:
                check_not_already_done(self.location, applied, self.transform.direction)
            layout = self.transform.layout
        dtype_hint = None if manifest is None else manifest.header.dtype
        source = open_source(
            self.location, layout=layout, dtype_hint=dtype_hint, use_index=recorded.has_index
        )
        if isinstance(source, ImageSource):
            source.close()
            raise SourceError(
                f"{self.location} contains image files, and decoding them is slower than training",
                "pack them into an array once: "
                f"fastvgg pack {self.location} packed.npy --size 224 224",
            )
        return source

    @contextlib.contextmanager
    def _borrow_buffers(self) -> Iterator[deque[NDArray[Any]]]:
        """Reuse the buffers of an earlier iteration, unless another iteration has them.

        They are a ring, whose first buffer is that of the next batch: the batch that was yielded
        last stays valid while the next ones are built. Page-faulting fresh memory is slow.
        """
        buffers, self._buffers = self._buffers, None
        if buffers is None:
            count = 0 if self.copy else MAX_IN_FLIGHT + 1
            buffers = deque(self._new_buffer() for _ in range(count))
        try:
            yield buffers
        finally:
            self._buffers = buffers

    def _new_buffer(self) -> NDArray[Any]:
        shape = (self.batch_size, *self.result.shape[1:])
        return np.empty(shape, storage_dtype(self.result.dtype))

    def _iterate(self, epoch: int, start: int) -> Iterator[Batch]:
        """Yield the batches of an epoch, from batch number `start`."""
        order, count, size = self._order(epoch), len(self), self.batch_size
        with (
            contextlib.closing(self._open()) as source,
            self._borrow_buffers() as buffers,
            TaskQueue(self.threads) as tasks,
        ):
            if source.header != self.header:
                raise SourceError(
                    f"{self.location} has changed since these batches were created",
                    "create new batches",
                )
            fingerprint = source.fingerprint()
            builder = _BatchBuilder(self, source, tasks)
            in_flight: deque[tuple[Batch, TaskGroup]] = deque()
            for number in range(start, count):
                for ahead in range(number + len(in_flight), min(number + MAX_IN_FLIGHT, count)):
                    rows = order[ahead * size : (ahead + 1) * size]
                    buffer = self._new_buffer() if self.copy else buffers[ahead - number]
                    in_flight.append(builder.submit(rows, buffer))
                batch, group = in_flight.popleft()
                group.wait()
                buffers.rotate(-1)
                self._epoch, self._batches_yielded = epoch, number + 1
                yield batch
            if source.fingerprint() != fingerprint:
                raise StoppedError(
                    f"{self.location} changed while it was read: the batches of this epoch may mix "
                    "old and new data",
                    "make sure that nothing writes to it, and start the epoch again",
                )


batches = Batches


class _BatchBuilder:
    def __init__(self, options: Batches, source: ArraySource, tasks: TaskQueue) -> None:
        self._source = source
        self._tasks = tasks
        self._transform = options.transform
        self._is_shuffled = options.shuffle
        header = source.header
        epoch_bytes = 2 * header.nbytes if options.transform else 0
        self._backend = choose_for_size("auto", epoch_bytes, options.threads)
        images_per_thread = -(-options.batch_size // options.threads)
        self._images_per_read = max(1, min(images_per_thread, READ_BYTES // header.image_bytes))
        # Each thread gathers the scattered rows of a read into its own part of this memory.
        has_gather = options.transform is not None and options.shuffle
        gathered_images = options.threads * self._images_per_read if has_gather else 0
        self._gathered = np.empty((gathered_images, *header.shape[1:]), storage_dtype(header.dtype))
        self._thread_slot = ThreadSlot()
        self._tiles: TileTransform | None = None
        if options.transform and not options.shuffle and source.has_random_access:
            self._tiles = TileTransform(
                options.transform,
                source,
                threads=options.threads,
                max_images=self._images_per_read,
                backend=self._backend,
            )

    def submit(self, rows: NDArray[np.int64], buffer: NDArray[Any]) -> tuple[Batch, TaskGroup]:
        """Start to build the batch of `rows` in `buffer`.

        The batch is complete when the task group is done.
        """
        images = buffer[: len(rows)]
        build = self._build_scattered if self._is_shuffled else self._build_consecutive
        starts = range(0, len(rows), self._images_per_read)
        spans = [slice(start, min(start + self._images_per_read, len(rows))) for start in starts]
        return Batch(images, rows), self._tasks.submit(
            spans, lambda span: build(rows[span], images, span.start)
        )

    def _build_consecutive(self, rows: NDArray[np.int64], images: NDArray[Any], at: int) -> None:
        """Build consecutive rows, tile by tile where the source allows it, or with one read."""
        first, count = int(rows[0]), len(rows)
        if self._transform is None:
            self._source.read_into(first, images[at : at + count])
            return
        if self._tiles is not None:
            self._source.prefetch(first + count, min(first + 2 * count, self._source.header.images))
            self._tiles.bind(images)(first, at, count)
            return
        read = self._source.read(first, first + count).batch
        engine.bind_rows(self._transform, read, images, backend=self._backend)(0, at, count)

    def _build_scattered(self, rows: NDArray[np.int64], images: NDArray[Any], at: int) -> None:
        """Build rows in any order; a transform reads them from the thread's gather buffer."""
        if self._transform is None:
            self._gather(rows, images[at : at + len(rows)])
            return
        first = self._thread_slot() * self._images_per_read
        self._gather(rows, self._gathered[first : first + len(rows)])
        transform = engine.bind_rows(self._transform, self._gathered, images, backend=self._backend)
        transform(first, at, len(rows))

    def _gather(self, rows: NDArray[np.int64], out: NDArray[Any]) -> None:
        for at, row in enumerate(rows.tolist()):
            self._source.read_into(row, out[at : at + 1])


def _check_integer(name: str, value: object, *, minimum: int = 0, maximum: int = MAX_INT64) -> int:
    if type(value) is not int or not minimum <= value <= maximum:
        raise UsageError(f"{name} is {value!r}", f"give an integer from {minimum} to {maximum}")
    return value


def _check_shard(shard: object) -> None:
    numbers = shard if isinstance(shard, tuple) else ()
    if [type(number) for number in numbers] != [int, int] or not 0 <= numbers[0] < numbers[1]:
        raise UsageError(
            f"shard is {shard!r}", "give (i, n): shard number i, from 0 to n - 1, of n shards"
        )
