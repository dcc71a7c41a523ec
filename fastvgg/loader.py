"""A multithreaded, prefetching loader: batches of a stored dataset, for training.

Worker threads read and transform spans of a batch into memory that no one uses any more. While the
caller uses one batch, the workers build the next.
"""

from __future__ import annotations

import contextlib
import copy
import os
from collections import deque
from typing import TYPE_CHECKING, Any, Final, NamedTuple, get_args

import numpy as np
import xxhash

from fastvgg.batch_builder import BatchBuilder
from fastvgg.buffer_pool import BufferPool
from fastvgg.choices import check_choice, check_flags
from fastvgg.datasets.base import MissingChunks
from fastvgg.datasets.images import ImageSource
from fastvgg.datasets.index import index_path
from fastvgg.datasets.labels import MAX_INT64, check_labels, read_columns
from fastvgg.datasets.open import open_source
from fastvgg.errors import (
    SourceError,
    StoppedError,
    UsageError,
    command,
    option,
    os_errors_refused,
)
from fastvgg.formatting import format_count
from fastvgg.parallel import TaskQueue, check_threads
from fastvgg.storage.location import Location
from fastvgg.stream.manifest import Provenance
from fastvgg.stream.preflight import plan_result
from fastvgg.stream.redo_log_reader import check_not_in_place
from fastvgg.stream.source import check_exists, check_not_already_done, check_sampled_values
from fastvgg.transform import Transform, storage_dtype

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from numpy.typing import ArrayLike, NDArray

    from fastvgg.datasets.base import ArraySource
    from fastvgg.parallel import TaskGroup
    from fastvgg.stream.manifest import Manifest
    from fastvgg.transform import Layout

# The batch requested now, and the next one. One more buffer holds the batch yielded last.
MAX_IN_FLIGHT: Final = 2
MAX_FREE_BUFFERS: Final = MAX_IN_FLIGHT + 1


class Batch(NamedTuple):
    """Images, their labels, and their row numbers in the dataset: arrays of the caller's own."""

    images: NDArray[Any]
    labels: NDArray[Any] | None
    """int64 positions in `Batches.class_names`, or labels of the caller's; None without labels."""
    rows: NDArray[np.int64]


class Batches:
    """Iterate over a stored dataset in batches; each iteration is one epoch.

    Every batch is an ``(images, labels, rows)`` tuple: the images, their labels, and their row
    numbers in the dataset. Its arrays may be kept and modified: the memory of a batch is reused
    when nothing refers to it any more. The dataset is open only during an iteration.

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
    labels
        Labels of the caller's, integers or floats: one for every row of the dataset, or an array of
        them. Batches contain integers as int64. By default labels come from the index of the
        dataset, which `fastvgg.plan` writes for images: positions in `class_names`.
    include_failed
        Also yield the rows of images that could not be decoded, which are zeros. By default they
        are left out, and `shard` and the length of an epoch refer to the other rows.
    missing_chunks
        "fill" reads the chunks that a Zarr array or an HDF5 dataset does not store as its fill
        value; by default they are an error.
    check_values
        Check a sample of stored floats before they are transformed: images of 0..1 would be black.

    Attributes
    ----------
    labels : ndarray or None
        The label of every row of the dataset, whatever the shard, as small integers if they come
        from the index.
    class_names : list of str or None
        The distinct labels in the index: the folders that directly contain images, sorted, and
        last "", if there are images in none. Keras and torchvision give the same numbers if every
        class is one folder with images. Numbers in the .cls entries of a WebDataset are the labels
        themselves; negative ones have no name. None if the index has no labels, or a label above
        999,999, or `labels` is given.
    failed_rows : ndarray of int64
        The rows of the images that could not be decoded.

    Raises
    ------
    SourceError, ShapeError, DtypeError
        If the dataset does not exist, does not fit the transform, or is already preprocessed, or
        its floats are no images.
    UsageError
        If an argument is out of range, or an iteration continues in a forked process.
    StoppedError
        During an iteration, if the dataset was changed or cannot be read.

    Examples
    --------
    >>> x = np.arange(5 * 4 * 4 * 3, dtype=np.uint8).reshape(5, 4, 4, 3)
    >>> np.save("images.npy", x)
    >>> for images, labels, rows in batches("images.npy", 2, labels=[7, 8, 7, 8, 9]):
    ...     print(images.shape, labels, rows, (images == x[rows]).all())
    (2, 4, 4, 3) [7 8] [0 1] True
    (2, 4, 4, 3) [7 8] [2 3] True
    (1, 4, 4, 3) [9] [4] True
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
        labels: ArrayLike | None = None,
        include_failed: bool = False,
        missing_chunks: MissingChunks = "error",
        check_values: bool = True,
    ) -> None:
        self.location = Location.parse(path)
        recorded = self._read_provenance()
        _check_integer("batch_size", batch_size, minimum=1)
        _check_integer("seed", seed)
        check_flags(
            shuffle=shuffle,
            drop_last=drop_last,
            include_failed=include_failed,
            check_values=check_values,
        )
        _check_shard(shard)
        check_choice("missing_chunks", missing_chunks, get_args(MissingChunks))
        if transform is not None and not isinstance(transform, Transform):
            raise UsageError(f"transform is {transform!r}", "give a Transform, or None")
        self.batch_size = batch_size
        self.transform = transform
        self.shuffle = shuffle
        self.seed = seed
        self.shard = shard
        self.drop_last = drop_last
        self.threads = check_threads(threads)
        self.include_failed = include_failed
        self.missing_chunks = missing_chunks
        self._epoch = -1
        self._batches_yielded = 0
        self._has_start = False  # whether the next iteration starts at the two numbers above
        self._version = _version(recorded.manifest)
        with contextlib.closing(self._open(recorded, use_index=recorded.has_index)) as source:
            self.header = source.header
            self.result = source.header if transform is None else plan_result(source, transform)
            has_numbers = recorded.manifest is not None and recorded.manifest.class_numbers
            columns = read_columns(source.records, has_class_numbers=has_numbers)
            self.failed_rows, self.labels, self.class_names = columns
            self._check_index(recorded.manifest, has_records=len(source.records) > 0)
            if transform is not None:
                with os_errors_refused():
                    check_sampled_values(source, transform, is_enabled=check_values)
        if labels is not None:
            self.labels, self.class_names = check_labels(labels, self.header.images), None
        if not self._row_count():
            raise SourceError(
                f"{self.location}: no image could be decoded when it was made",
                f"recreate it from its source; {option('include_failed')} yields rows of zeros",
            )
        batch_bytes = min(batch_size, self.header.images) * self.result.image_bytes
        self._pool = BufferPool(batch_bytes, MAX_FREE_BUFFERS)

    def _check_index(self, manifest: Manifest | None, *, has_records: bool) -> None:
        """Check that it is known which images failed."""
        failed = 0 if manifest is None else manifest.counts["failed"]
        if failed and not (has_records or self.include_failed):
            path = index_path(self.location.container)
            raise SourceError(
                f"{format_count(failed, 'image')} failed when {self.location} was made, and "
                f"{path}, which says which, is missing",
                f"restore the index; {option('include_failed')} yields their rows, which are zeros",
            )

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

    def with_shard(self, shard: tuple[int, int], *, threads: int | None = None) -> Batches:
        """Return a copy that iterates over another shard, by default on all available CPUs.

        Unlike new batches, the copy does not read the index of the dataset again.
        """
        _check_shard(shard)
        other = copy.copy(self)
        other.shard, other.threads = shard, check_threads(threads)
        return other

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
        wrong = {name: now for name, now in self._identity().items() if state.get(name) != now}
        if wrong.keys() == {"failed_rows"}:
            raise UsageError(
                f"the state was saved when other images of {self.location} had failed",
                "start an epoch at its first batch, with set_epoch; or save and load with "
                f"{option('include_failed')}",
            )
        if wrong:
            saved = ", ".join(f"{name} {state.get(name)!r}" for name in wrong)
            raise UsageError(
                f"the state was saved with {saved}, but these batches have "
                f"{', '.join(f'{name} {now!r}' for name, now in wrong.items())}",
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
            "include_failed": self.include_failed,
            "failed_rows": "" if self.include_failed else _digest(self.failed_rows.tobytes()),
        }

    def _row_count(self) -> int:
        """Return the number of rows in all shards."""
        return self.header.images - (0 if self.include_failed else len(self.failed_rows))

    def _positions(self) -> range:
        """Return the positions of this shard in the order of an epoch."""
        count, (number, shards) = self._row_count(), self.shard
        return range(count * number // shards, count * (number + 1) // shards)

    def _order(self, epoch: int) -> NDArray[np.int64]:
        """Return the row numbers of this shard in an epoch, in the order in which to yield them."""
        order = np.arange(self.header.images)
        if not self.include_failed:
            order = np.delete(order, self.failed_rows)
        if self.shuffle:
            np.random.default_rng((self.seed, epoch)).shuffle(order)
        positions = self._positions()
        return order[positions.start : positions.stop].astype(np.int64)

    def _read_provenance(self) -> Provenance:
        """Check that the dataset is finished, and read what is recorded about it."""
        check_not_in_place(self.location.container)
        check_exists(self.location)
        return Provenance.read(self.location)

    def _reopen(self) -> ArraySource:
        """Open the dataset for an epoch, after checking that it was not replaced.

        Reading an index takes seconds for a million images, and is not repeated.
        """
        recorded = self._read_provenance()
        source = self._open(recorded, use_index=False)
        if source.header != self.header or _version(recorded.manifest) != self._version:
            source.close()
            now, then = vars(source.header), vars(self.header)
            differences = [
                f"{name} {then[name]!r} then, {now[name]!r} now"
                for name in then
                if then[name] != now[name]
            ]
            raise SourceError(
                f"{self.location} has changed since these batches were created: "
                f"{'; '.join(differences) or 'it was written again'}",
                "create new batches",
            )
        return source

    def _open(self, recorded: Provenance, *, use_index: bool) -> ArraySource:
        """Open the dataset in the layout that the transform reads."""
        applied, manifest = recorded.transform, recorded.manifest
        layout: Layout = "NHWC" if applied is None else applied.out_layout
        if self.transform is not None:
            if applied is not None:
                check_not_already_done(self.location, applied, self.transform.direction)
            layout = self.transform.layout
        dtype_hint = None if manifest is None else manifest.header.dtype
        source = open_source(
            self.location,
            layout=layout,
            dtype_hint=dtype_hint,
            use_index=use_index,
            missing_chunks=self.missing_chunks,
        )
        if isinstance(source, ImageSource):
            source.close()
            raise SourceError(
                f"{self.location} contains image files, and decoding them is slower than training",
                "pack them into an array once: "
                + command("pack", self.location, "packed.npy", size=(224, 224)),
            )
        return source

    def _iterate(self, epoch: int, start: int) -> Iterator[Batch]:
        """Yield the batches of an epoch, from batch number `start`."""
        order, count, size = self._order(epoch), len(self), self.batch_size
        process = os.getpid()
        with contextlib.closing(self._reopen()) as source, TaskQueue(self.threads) as tasks:
            fingerprint = source.fingerprint()
            builder = BatchBuilder(
                source, tasks, self.transform, size, self.threads, is_shuffled=self.shuffle
            )
            in_flight: deque[tuple[Batch, TaskGroup]] = deque()
            for number in range(start, count):
                for ahead in range(number + len(in_flight), min(number + MAX_IN_FLIGHT, count)):
                    in_flight.append(self._submit(builder, order[ahead * size :][:size]))
                try:
                    in_flight[0][1].wait()
                except StoppedError as error:  # whose remedy is that of a run
                    raise StoppedError(
                        error.problem,
                        "fix the cause, and iterate again; load_state_dict resumes after the "
                        "batches already yielded",
                    ) from error
                self._epoch, self._batches_yielded = epoch, number + 1
                yield in_flight.popleft()[0]  # without a name, which would keep its memory
                if os.getpid() != process:
                    raise UsageError(
                        f"the iteration over {self.location} was started in another process, whose "
                        "threads a forked process does not have",
                        "start an iteration in the process that uses it",
                    )
            if source.fingerprint() != fingerprint:
                raise StoppedError(
                    f"{self.location} changed while it was read: the batches of this epoch may mix "
                    "old and new data",
                    "make sure that nothing writes to it, and start the epoch again",
                )

    def _submit(self, builder: BatchBuilder, rows: NDArray[np.int64]) -> tuple[Batch, TaskGroup]:
        """Start to build the batch of `rows`, which is complete when the task group is done."""
        rows = rows.copy()  # a view would keep the order of the whole epoch
        labels = None if self.labels is None else self.labels[rows]
        if labels is not None and labels.dtype.kind != "f":
            labels = labels.astype(np.int64)
        images = self._pool.empty(
            (len(rows), *self.result.shape[1:]), storage_dtype(self.result.dtype)
        )
        return Batch(images, labels, rows), builder.submit(rows, images)


batches = Batches


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


def _version(manifest: Manifest | None) -> str:
    """Return a hash of a manifest, which every run that finishes writes anew."""
    return "" if manifest is None else _digest(manifest.to_json())


def _digest(data: bytes) -> str:
    return xxhash.xxh3_64_hexdigest(data)
