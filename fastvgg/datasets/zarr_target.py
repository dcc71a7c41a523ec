"""Zarr arrays that are written: shards, in a directory or in a store.

A shard is a chunk of the run, a file of its own, and holds pieces of a few MiB that can be read
alone. Each piece has its crc32c, and so has the index of a shard. Every shard is written, also one
that is full of the fill value.
"""

from __future__ import annotations

import asyncio
import itertools
import mmap
from collections import deque
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import zarr
from zarr.buffer import default_buffer_prototype
from zarr.buffer.cpu import NDBuffer
from zarr.codecs import BytesCodec, Crc32cCodec, ShardingCodec
from zarr.storage import MemoryStore

from fastvgg.datasets.base import Header, bytes_of, piece_images
from fastvgg.datasets.locations import beside_path
from fastvgg.datasets.zarr import SAID, DamagedChunkError, ZarrArray
from fastvgg.errors import ResumeError, SourceError, VerificationError
from fastvgg.transform import storage_dtype

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from numpy.typing import NDArray
    from zarr.core.buffer import Buffer

    from fastvgg.datasets.base import Edges, Stored
    from fastvgg.stream.remote import StoreStorage
    from fastvgg.stream.storage import Storage
    from fastvgg.transform import Transform

__all__ = ["StoreZarrTarget", "ZarrTarget"]

AXES: Final = {
    "NHWC": ("image", "height", "width", "channel"),
    "NCHW": ("image", "channel", "height", "width"),
}
WAITING: Final = 3  # shards: one is on its way to the disk, one waits, and one is encoded


class ShardEncoder:
    """What the files of a new array hold: each is made in memory.

    Parameters
    ----------
    header
        What will be in it.
    chunk_images
        How many images make a shard.
    transform
        What was done to the images, which the array's attributes say.
    """

    def __init__(self, header: Header, chunk_images: int, transform: Transform | None) -> None:
        self._stored: dict[str, Buffer] = {}
        image = header.shape[1:]
        pieces = _piece_images(header, chunk_images)
        codecs = BytesCodec(endian="little"), Crc32cCodec()
        self._array = zarr.create_array(
            MemoryStore(self._stored),
            shape=header.shape,
            chunks=(chunk_images, *image),
            dtype=header.dtype,
            serializer=ShardingCodec(
                chunk_shape=(pieces, *image), codecs=codecs, index_codecs=codecs
            ),
            filters=None,
            compressors=None,
            fill_value=0,
            chunk_key_encoding={"name": "default", "separator": "."},
            dimension_names=AXES[header.layout],
            attributes={SAID: {"transform": transform.to_dict()}} if transform else {},
            config={"write_empty_chunks": True},
        )
        self._shape = chunk_images, *image
        self._spec = self._array.metadata.get_chunk_spec(
            (0, 0, 0, 0), self._array.async_array.config, default_buffer_prototype()
        )
        self.metadata = {name: data.to_bytes() for name, data in self._stored.items()}
        self._stored.clear()

    def key(self, start: int) -> str:
        """Return the name of the shard that begins with a row."""
        number = start // self._shape[0]
        key: str = self._array.metadata.encode_chunk_key((number, 0, 0, 0))
        return key

    def shard(self, batch: NDArray[Any]) -> memoryview:
        """Return the content of the shard of a batch; the last one's is as long as the others.

        Here, and not on zarr's own thread, which is one for all that is read and written, twice as
        much is encoded in a second.
        """
        if len(batch) < self._shape[0]:
            whole = np.zeros(self._shape, batch.dtype)
            whole[: len(batch)] = batch
            batch = whole
        pieces = [(NDBuffer.from_numpy_array(batch), self._spec)]
        (encoded,) = asyncio.run(self._array.async_array.codec_pipeline.encode(pieces))
        if encoded is None:
            raise RuntimeError("zarr leaves a chunk away, and was told not to")
        content: NDArray[np.uint8] = encoded.as_numpy_array()
        return content.data


def _piece_images(header: Header, chunk_images: int) -> int:
    """Return how many images of a shard make a piece that is read alone: a part without rest."""
    most = min(chunk_images, piece_images(header.image_bytes))
    return next(images for images in range(most, 0, -1) if chunk_images % images == 0)


class ZarrTarget:
    """A directory with a file for each shard; while unfinished, it has another name.

    Parameters
    ----------
    path
        The directory that the array gets when it is complete.
    header
        What will be in it.
    storage
        What carries out the system calls.
    chunk_images
        How many images make a shard.
    transform
        What was done to the images.
    """

    kind = "zarr"

    def __init__(
        self,
        path: Path,
        header: Header,
        storage: Storage,
        *,
        chunk_images: int,
        transform: Transform | None,
    ) -> None:
        self.path = path
        self.header = header
        self.partial = beside_path(path, ".partial")
        self._storage = storage
        self._encoder = ShardEncoder(header, chunk_images, transform)
        self._encoded: deque[tuple[str, memoryview]] = deque()
        self._memory: Iterator[NDArray[np.uint8]] | None = None
        self._unfinished: ZarrArray | None = None
        self._published: ZarrArray | None = None

    def create(self) -> None:
        """Make the directory, and the array's metadata in it."""
        self._storage.remove(self.partial)
        self._storage.make_directory(self.partial)
        self._encoded.extend(
            (name, memoryview(data)) for name, data in self._encoder.metadata.items()
        )
        self.sync()
        self._storage.sync_directory(self.path.parent)

    def reopen(self) -> None:
        """Go on with the directory that is there."""
        for name, expected in self._encoder.metadata.items():
            try:
                found = (self.partial / name).read_bytes()
            except OSError as error:
                raise ResumeError(
                    f"{self.partial / name} is gone: {error.strerror}", "start again with --restart"
                ) from None
            if found != expected:
                raise ResumeError(
                    f"{self.partial / name} is not what the unfinished run wrote",
                    "it was changed in between: start again with --restart",
                )

    def join(self) -> None:
        """Go on with the directory that another process has made."""
        self.reopen()

    def offset(self, start: int) -> int:  # noqa: ARG002  # a shard's file begins with it
        """Return 0."""
        return 0

    def write(self, start: int, stored: Stored) -> None:
        """Encode the shard of some rows, for `sync` to write it.

        So that one is encoded while the one before it is on its way to the disk.
        """
        (data,) = stored
        rows = np.frombuffer(data, storage_dtype(self.header.dtype))
        shard = self._encoder.shard(rows.reshape(-1, *self.header.shape[1:]))
        self._encoded.append((self._encoder.key(start), self._kept(shard)))

    def write_own(self, start: int, stored: Stored) -> Edges:
        """Encode the shard of some rows; no other has a part of it."""
        self.write(start, stored)
        return []

    def write_edges(self, edges: Edges) -> None:
        """Write nothing: there are no edges."""

    def _kept(self, shard: memoryview) -> memoryview:
        """Return the same bytes at the beginning of a page, which the disk takes from there."""
        if self._memory is None:
            nbytes = len(shard) + mmap.PAGESIZE
            self._memory = itertools.cycle([np.empty(nbytes, np.uint8) for _ in range(WAITING)])
        memory = next(self._memory)
        lying = memory[-memory.ctypes.data % mmap.PAGESIZE :][: len(shard)]
        lying[:] = np.frombuffer(shard, np.uint8)
        return lying.data

    def sync(self) -> None:
        """Write what is encoded, and make it survive a power cut, and its names."""
        for _ in range(len(self._encoded)):  # of now: the next one is its own commit's
            name, data = self._encoded.popleft()
            file = self._storage.create(self.partial / name)
            file = self._storage.direct(file)
            try:
                self._storage.write(file, data, 0)
                self._storage.sync(file)
            finally:
                self._storage.close(file)
        self._storage.sync_directory(self.partial)

    def read_unfinished(self, start: int, stop: int) -> Stored:
        """Read rows of the partial; nothing where their shard is missing or damaged."""
        if self._unfinished is None:
            written = self._encoder.metadata
            self._unfinished = ZarrArray(self.partial, layout=self.header.layout, metadata=written)
        try:
            return [bytes_of(self._rows(self._unfinished, start, stop))]
        except DamagedChunkError:
            return []

    def read_stored(self, start: int, stop: int) -> Stored:
        """Read rows of the published array."""
        return [bytes_of(self.read_back(start, stop))]

    def read_back(self, start: int, stop: int) -> NDArray[Any]:
        """Read rows of the published array."""
        if self._published is None:
            self._published = ZarrArray(self.path, layout=self.header.layout)
        if self._published.header != self.header:
            found = self._published.header
            raise SourceError(
                f"{self.path} holds {found.shape} of {found.dtype}, and was written as "
                f"{self.header.shape} of {self.header.dtype}",
                "it was changed since: make it again from its source",
            )
        try:
            return self._rows(self._published, start, stop)
        except DamagedChunkError as error:
            raise VerificationError(error.problem, "make it again from its source") from None

    def _rows(self, array: ZarrArray, start: int, stop: int) -> NDArray[Any]:
        batch = np.empty((stop - start, *self.header.shape[1:]), storage_dtype(self.header.dtype))
        array.read_into(start, batch)
        return batch

    def publish(self) -> None:
        """Rename the complete directory to its name."""
        self._storage.rename(self.partial, self.path)
        self._storage.sync_directory(self.path.parent)

    def close(self) -> None:
        """Nothing stays open."""


class StoreZarrTarget(ZarrTarget):
    """The same in a store, where shards have their names at once, and the metadata come last."""

    _storage: StoreStorage

    def __init__(
        self,
        path: Path,
        header: Header,
        storage: StoreStorage,
        *,
        chunk_images: int,
        transform: Transform | None,
    ) -> None:
        super().__init__(path, header, storage, chunk_images=chunk_images, transform=transform)
        self.partial = path

    def create(self) -> None:
        """Remove what has the name; first what makes it an array."""
        for name in self._encoder.metadata:
            self._storage.remove(self.path / name)
        self._storage.remove(self.path)

    def reopen(self) -> None:
        """Go on with the shards that are there; a finished array is one no longer."""
        for name in self._encoder.metadata:
            self._storage.remove(self.path / name)

    def join(self) -> None:
        """Do nothing: there is nothing but shards before the end."""

    def sync(self) -> None:
        """Put what is encoded."""
        for _ in range(len(self._encoded)):
            name, data = self._encoded.popleft()
            self._storage.put(self.path / name, data)

    def publish(self) -> None:
        """Put the metadata."""
        for name, data in self._encoder.metadata.items():
            self._storage.put(self.path / name, data)
