"""The interface that every dataset format implements: `Header`, `Source` and `Target`."""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple, Self, TypeAlias

import numpy as np

from fastvgg.datasets.published import PublishedDataset
from fastvgg.errors import SourceError, StoppedError, rank_remedy
from fastvgg.storage.location import sidecar_path
from fastvgg.transform import storage_dtype

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from fastvgg.storage.local import Storage
    from fastvgg.storage.location import Location
    from fastvgg.transform import Layout

# Compressed data may be longer than what it decodes to, by less than this and an eighth.
ENCODED_SLACK_BYTES: Final = 64 * 1024
NUMPY_DTYPES: Final = ("uint8", "float16", "float32", "float64")
MAX_ELEMENTS: Final = 2**63 - 1
MAX_SHAPE_CHARACTERS: Final = 100  # of a shape in a message: a damaged header may claim any shape
MissingChunks: TypeAlias = Literal["error", "fill"]
"""What a chunk that an array does not store is: an error, or its fill value."""


def changed_during_run_error(path: str) -> StoppedError:
    """Return the error for a source file that changed after the run was planned."""
    return StoppedError(
        f"{path} changed after the run was planned: the result may mix old and new data",
        "make sure that nothing writes to the source, then start over",
    )


def max_encoded_bytes(decoded_bytes: int) -> int:
    """Return the most bytes that a chunk of `decoded_bytes` may have after it was encoded."""
    return decoded_bytes + decoded_bytes // 8 + ENCODED_SLACK_BYTES


def check_shape(path: Location | Path, shape: tuple[int, ...], dtype: str) -> None:
    """Check that an array has the shape of a batch of images; the error records `dtype`, too.

    Raises
    ------
    SourceError
        If the rank is not 4, or the array is empty or too large.
    """
    shown = str(shape)[:MAX_SHAPE_CHARACTERS]
    if len(shape) != 4:
        raise SourceError(
            f"{path} has shape {shown}, of rank {len(shape)}",
            "store a batch, (images, height, width, 3) or (images, 3, height, width); "
            f"{rank_remedy(shape, 'array')}",
            shape=list(shape),
            dtype=dtype,
        )
    if math.prod(shape) == 0:
        raise SourceError(f"{path} has shape {shown}: no images", "give a dataset with images")
    if math.prod(shape) > MAX_ELEMENTS:
        raise SourceError(
            f"{path} has shape {shown}: more elements than an array can have",
            "the file is damaged: replace it with an intact copy",
        )


def check_dtype(path: Location | Path, name: str, described: object, shape: tuple[int, ...]) -> str:
    """Return the name of a storage dtype, after checking that it is supported.

    Raises
    ------
    SourceError
        If it is not; the message quotes `described`.
    """
    if name not in NUMPY_DTYPES:
        raise SourceError(
            f"{path} has unsupported dtype {described}",
            f"store images as one of {', '.join(NUMPY_DTYPES)}"
            + ("" if len(shape) == 4 else f"; {rank_remedy(shape, 'array')}"),
            shape=list(shape),
            dtype=str(described).strip("'"),
        )
    return name


def byte_view(batch: NDArray[Any]) -> memoryview:
    """Return a view of the bytes of a contiguous batch of any dtype."""
    return batch.view(np.uint8).reshape(-1).data


@dataclass(frozen=True)
class Header:
    """Shape, storage dtype and layout of a dataset, known without reading its pixels.

    >>> header = Header((10, 5, 7, 3), "float32", "NHWC")
    >>> header.images, header.image_bytes, header.nbytes
    (10, 420, 4200)
    """

    shape: tuple[int, ...]
    dtype: str
    layout: Layout

    @property
    def images(self) -> int:
        """Number of images."""
        return self.shape[0]

    @property
    def image_bytes(self) -> int:
        """Size of one image in bytes."""
        return math.prod(self.shape[1:]) * storage_dtype(self.dtype).itemsize

    @property
    def nbytes(self) -> int:
        """Size of all images in bytes."""
        return self.images * self.image_bytes


class ImageRecord(NamedTuple):
    """Origin, size and decoding status of one image."""

    path: str
    """Relative to the source, with forward slashes."""
    label: str
    """The folder of the path, or the content of a tar's .cls entry."""
    width: int
    height: int
    failed: bool
    """Whether the image could not be decoded; its row is then zeros."""
    reason: str
    """Why it failed, or a decoder's warning about an image that did not."""


class Chunk(NamedTuple):
    """Consecutive images read from a source."""

    batch: NDArray[Any]
    """Valid for as long as it is referenced."""
    records: list[ImageRecord]
    """One per image; empty for an array without an index."""


Payload: TypeAlias = "Sequence[bytes | memoryview]"
"""Data to store for consecutive images: the bytes of a batch, or one encoded file per image."""

PartialPages: TypeAlias = "list[tuple[int, bytes]]"
"""File offsets and the bytes that belong there."""


class Source(ABC):
    """A dataset opened for reading."""

    kind: str
    header: Header
    stored_bytes: int
    """Size on disk."""
    read_granularity = 1
    """Images per stored unit, which is read only as a whole."""
    decoded_image_bytes = 0
    """Memory per image of the stored units that a library decodes, if more than the image's."""
    index_bytes = 0
    """Memory of the indexes of stored units that a library reads, however few images it reads."""
    records: Sequence[ImageRecord] = ()
    """Records known without reading any image; empty if there are none."""
    linked_paths: Sequence[Path] = ()
    """Resolved paths that are read because links below `path` lead there."""
    follow_links: bool = True
    """Whether links below `path` are followed."""
    missing_chunks: MissingChunks = "error"
    """What chunks that an array does not store are."""
    has_class_numbers: bool = False
    """Whether labels come from .cls entries, and are numbers."""

    def __init__(self, location: Location) -> None:
        self.location = location
        self.path = location.container
        self.settings: dict[str, Any] = {}
        """Options that affect the pixels, as JSON types."""
        self.notes: list[str] = []
        """Notes to show the user before the run."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Return a hash of the source's current state, which changes when the source does."""

    @abstractmethod
    def read(self, start: int, stop: int) -> Chunk:
        """Read the images `start` to `stop`, exclusive.

        Raises
        ------
        StoppedError
            If the source was changed or truncated since it was opened, or cannot be read.
        """

    def close(self) -> None:  # noqa: B027  # most formats keep nothing open
        """Release files; batches that were returned stay valid."""


class ArraySource(Source):
    """An array opened for reading."""

    has_random_access = False
    """Whether any rows can be read at no extra cost, at any size."""

    @abstractmethod
    def read_into(self, start: int, out: NDArray[Any]) -> None:
        """Fill the contiguous `out` with images, starting at row `start`; thread-safe.

        Raises
        ------
        StoppedError
            If the source was changed or truncated since it was opened, or cannot be read.
        """

    def prefetch(self, start: int, stop: int) -> None:
        """Ask the system to read the images `start` to `stop`, exclusive, in the background."""

    def read(self, start: int, stop: int) -> Chunk:
        shape = (stop - start, *self.header.shape[1:])
        batch = np.empty(shape, storage_dtype(self.header.dtype))
        self.read_into(start, batch)
        return Chunk(batch, [*self.records[start:stop]])


class Target(PublishedDataset):
    """A dataset being written, under a temporary name until it is published.

    Parameters
    ----------
    path
        The path of the published dataset.
    header
        Shape, dtype and layout of the dataset.
    """

    def __init__(self, path: Path, header: Header) -> None:
        self.path = path
        self.header = header
        self.partial = path
        """The name of the unfinished target: temporary where there is a rename."""

    @abstractmethod
    def create(self) -> None:
        """Create an empty partial and reserve its space, replacing any existing one."""

    @abstractmethod
    def reopen(self) -> None:
        """Open the existing partial to resume a run, after checking that it matches."""

    def offset(self, start: int) -> int:  # noqa: ARG002  # every row, or shard, is a file
        """Return the offset of a row in its file; 0 if each row, or shard, has its own file.

        A buffer whose address has the same offset within a page may be written without a copy.
        """
        return 0

    @abstractmethod
    def write(self, start: int, stored: Payload) -> None:
        """Write the payload of the images from row `start` on."""

    @abstractmethod
    def sync(self) -> None:
        """Make everything written so far durable; other threads may keep writing."""

    def unfinished(self) -> Self:
        """Return a view of this target that reads its partial as if it were published."""
        view = copy.copy(self)
        view.path = self.partial
        return view

    def has_holes(self) -> bool:
        """Whether part of the open partial may be lost, as another process truncated it."""
        return False

    def file_names(self) -> Iterable[str | None]:
        """Return the names of the files of a target that has several; None for a row without."""
        return ()

    def metadata(self) -> dict[str, bytes]:
        """Return the content of the files, by name, that describe the array."""
        return {}

    @abstractmethod
    def publish(self) -> None:
        """Give the finished target its name, atomically and durably."""

    def close(self) -> None:  # most formats keep nothing open
        """Close files."""

    def _check_published(self, actual: Header) -> None:
        if actual != self.header:
            raise SourceError(
                f"{self.path} contains {actual.shape} of {actual.dtype}, but was written as "
                f"{self.header.shape} of {self.header.dtype}",
                "the dataset was changed since then: move it away, and recreate it from its source",
            )


class DiskTarget(Target):
    """A target on disk, renamed when it is finished; `storage` performs the system calls."""

    def __init__(self, path: Path, header: Header, storage: Storage, **options: Any) -> None:
        super().__init__(path, header, **options)
        self.partial = sidecar_path(path, ".partial")
        self._storage = storage

    def publish(self) -> None:
        self.close()
        self._storage.rename(self.partial, self.path)
        self._storage.sync_directory(self.path.parent)


class SharedTarget(Target):
    """A target that many processes write concurrently, each a part of it."""

    def attach(self) -> None:
        """Open the partial that another process created, after checking that it matches."""
        self.reopen()

    @abstractmethod
    def write_aligned(self, start: int, stored: Payload) -> PartialPages:
        """Write the whole pages of a payload, and return the partial pages at its ends.

        A partial page is shared with rows that another process, or machine, writes. If both wrote
        it, each could overwrite the other's part with stale data. A single process must write all
        of them with `write_unaligned`.
        """

    @abstractmethod
    def write_unaligned(self, edges: PartialPages) -> None:
        """Write partial pages that `write_aligned` returned, for any rows."""
