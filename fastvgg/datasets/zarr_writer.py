"""Zarr arrays that are written: shards, in a directory or in a store.

A shard is a chunk of the run, a file of its own, and holds pieces of a few MiB that can be read
alone. Each piece has its crc32c, and so has the index of a shard. Every shard is written, also one
that is full of the fill value.
"""

from __future__ import annotations

import mmap
from collections import deque
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import google_crc32c
import numpy as np
import zarr
from zarr.codecs import BytesCodec, Crc32cCodec, ShardingCodec
from zarr.storage import MemoryStore

from fastvgg.datasets.base import Header, bytes_of, inner_chunk_images
from fastvgg.datasets.zarr import ATTRIBUTE_KEY, DamagedChunkError, ZarrArray
from fastvgg.errors import ResumeError, SourceError, VerificationError
from fastvgg.storage.location import sidecar_path
from fastvgg.transform import storage_dtype

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray
    from zarr.core.buffer import Buffer

    from fastvgg.datasets.base import PartialPages, Payload
    from fastvgg.storage.local import Storage
    from fastvgg.storage.objects import StoreStorage
    from fastvgg.transform import Transform

__all__ = ["StoreZarrTarget", "ZarrTarget"]

AXES: Final = {
    "NHWC": ("image", "height", "width", "channel"),
    "NCHW": ("image", "channel", "height", "width"),
}
CHECKSUM_BYTES: Final = 4
INDEX_BYTES: Final = 16  # of a piece


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
        stored: dict[str, Buffer] = {}
        image = header.shape[1:]
        piece = _inner_chunk_images(header, chunk_images)
        codecs = BytesCodec(endian="little"), Crc32cCodec()
        self._array = zarr.create_array(
            MemoryStore(stored),
            shape=header.shape,
            chunks=(chunk_images, *image),
            dtype=header.dtype,
            serializer=ShardingCodec(
                chunk_shape=(piece, *image), codecs=codecs, index_codecs=codecs
            ),
            filters=None,
            compressors=None,
            fill_value=0,
            chunk_key_encoding={"name": "default", "separator": "."},
            dimension_names=AXES[header.layout],
            attributes={ATTRIBUTE_KEY: {"transform": transform.to_dict()}} if transform else {},
            config={"write_empty_chunks": True},
        )
        self.metadata = {name: data.to_bytes() for name, data in stored.items()}
        self._chunk_images = chunk_images
        self._pieces = chunk_images // piece
        self._piece_bytes = piece * header.image_bytes

    def key(self, start: int) -> str:
        """Return the name of the shard that begins with a row."""
        number = start // self._chunk_images
        key: str = self._array.metadata.encode_chunk_key((number, 0, 0, 0))
        return key

    @property
    def shard_bytes(self) -> int:
        """How many bytes a shard has, with checksums and index."""
        sealed_bytes = self._piece_bytes + CHECKSUM_BYTES
        return self._pieces * (sealed_bytes + INDEX_BYTES) + CHECKSUM_BYTES

    def encode(self, data: bytes | memoryview, out: NDArray[np.uint8]) -> None:
        """Write the shard of some rows; the last one's is as long as the others.

        That is each piece and its crc32c, and at the end the offset and length of each and the
        crc32c of those: https://zarr-specs.readthedocs.io/en/latest/v3/codecs/sharding-indexed
        zarr's own codec copies each byte three times, into new memory. In memory that was used
        before 22 MiB take 4 ms here, and 15 ms there.
        """
        rows = np.frombuffer(data, np.uint8)
        sealed_bytes = self._piece_bytes + CHECKSUM_BYTES
        begins = np.arange(self._pieces, dtype="<u8") * sealed_bytes
        for number, begin in enumerate(begins.tolist()):
            piece = rows[number * self._piece_bytes :][: self._piece_bytes]
            sealed = out[begin : begin + sealed_bytes]
            sealed[: len(piece)] = piece
            sealed[len(piece) : self._piece_bytes] = 0
            _append_crc32c(sealed)
        index = np.stack([begins, np.full_like(begins, sealed_bytes)], axis=1)
        end = out[self._pieces * sealed_bytes :]
        end[:-CHECKSUM_BYTES] = index.reshape(-1).view(np.uint8)
        _append_crc32c(end)


def _append_crc32c(sealed: NDArray[np.uint8]) -> None:
    """Write the crc32c of some bytes behind them."""
    checksum = google_crc32c.value(sealed[:-CHECKSUM_BYTES])
    sealed[-CHECKSUM_BYTES:] = np.array([checksum], "<u4").view(np.uint8)


def _inner_chunk_images(header: Header, chunk_images: int) -> int:
    """Return how many images of a shard make a piece that is read alone: a part without rest."""
    most = min(chunk_images, inner_chunk_images(header.image_bytes))
    return next(images for images in range(most, 0, -1) if chunk_images % images == 0)


class _Shard(NamedTuple):
    """A shard that is encoded, and the memory that it is in."""

    memory: bytearray
    content: NDArray[np.uint8]


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
    _aligned_bytes = mmap.PAGESIZE  # where a shard begins, for the disk to take it from there

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
        self.partial = sidecar_path(path, ".partial")
        self._storage = storage
        self._encoder = ShardEncoder(header, chunk_images, transform)
        self._encoded: deque[tuple[str, _Shard]] = deque()
        self._memory: list[bytearray] = []
        self._unfinished: ZarrArray | None = None
        self._published: ZarrArray | None = None

    def create(self) -> None:
        """Make the directory, and the array's metadata in it."""
        self._storage.remove(self.partial)
        self._storage.make_directory(self.partial)
        for name, data in self._encoder.metadata.items():
            self._store(name, memoryview(data))
        self._storage.sync_directory(self.partial)
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

    def attach(self) -> None:
        """Go on with the directory that another process has made."""
        self.reopen()

    def offset(self, start: int) -> int:  # noqa: ARG002  # a shard's file begins with it
        """Return 0."""
        return 0

    def write(self, start: int, stored: Payload) -> None:
        """Encode the shard of some rows, for `sync` to write it.

        So that one is encoded while the one before it is on its way to the disk.
        """
        self._encoded.append((self._encoder.key(start), self._shard(stored)))

    def write_aligned(self, start: int, stored: Payload) -> PartialPages:
        """Encode the shard of some rows; no other has a part of it."""
        self.write(start, stored)
        return []

    def write_unaligned(self, edges: PartialPages) -> None:
        """Write nothing: there are no edges."""

    def _shard(self, stored: Payload) -> _Shard:
        """Return the shard of some rows, in memory that goes back once it is stored."""
        nbytes = self._encoder.shard_bytes
        try:
            memory = self._memory.pop()
        except IndexError:
            memory = bytearray(nbytes + self._aligned_bytes - 1)
        whole = np.frombuffer(memory, np.uint8)
        content = whole[-whole.ctypes.data % self._aligned_bytes :][:nbytes]
        (data,) = stored
        self._encoder.encode(data, content)
        return _Shard(memory, content)

    def _store_shard(self, name: str, shard: _Shard) -> None:
        self._store(name, shard.content.data)
        self._memory.append(shard.memory)

    def _store(self, name: str, data: memoryview) -> None:
        file = self._storage.create(self.partial / name)
        file = self._storage.direct(file)
        try:
            self._storage.write(file, data, 0)
            self._storage.sync(file)
        finally:
            self._storage.close(file)

    def sync(self) -> None:
        """Write what is encoded, and make it survive a power cut, and its names."""
        for _ in range(len(self._encoded)):  # of now: the next one is its own commit's
            self._store_shard(*self._encoded.popleft())
        self._storage.sync_directory(self.partial)

    def read_unfinished(self, start: int, stop: int) -> Payload:
        """Read rows of the partial; nothing where their shard is missing or damaged."""
        if self._unfinished is None:
            written = self._encoder.metadata
            self._unfinished = ZarrArray(self.partial, layout=self.header.layout, metadata=written)
        try:
            return [bytes_of(self._rows(self._unfinished, start, stop))]
        except DamagedChunkError:
            return []

    def read_stored(self, start: int, stop: int) -> Payload:
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
    _aligned_bytes = 1

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

    def attach(self) -> None:
        """Do nothing: there is nothing but shards before the end."""

    def _store_shard(self, name: str, shard: _Shard) -> None:
        self._storage.put(self.path / name, shard.memory)
        self._memory.append(shard.memory)

    def publish(self) -> None:
        """Put the metadata."""
        for name, data in self._encoder.metadata.items():
            self._storage.put(self.path / name, data)
