"""Write sharded Zarr arrays, to a directory or to a store.

Each chunk of the run becomes one shard, a separate file, with inner chunks of about 8 MiB that can
be read individually. Every inner chunk and every shard index has a CRC32C. Shards that are full of
the fill value are written as well.
"""

from __future__ import annotations

import functools
import mmap
from abc import abstractmethod
from collections import deque
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Self

import google_crc32c
import numpy as np
import zarr
from zarr.codecs import BytesCodec, Crc32cCodec, ShardingCodec
from zarr.storage import MemoryStore

from fastvgg.datasets.base import DiskTarget, Header, SharedTarget, byte_view
from fastvgg.datasets.files import open_regular
from fastvgg.datasets.formats import inner_chunk_images
from fastvgg.datasets.zarr import ATTRIBUTE_KEY, DamagedChunkError, ZarrArray
from fastvgg.datasets.zarr_store import CHECKSUM_BYTES, INDEX_ENTRY_BYTES
from fastvgg.errors import ResumeError, SourceError, StoppedError, VerificationError, option

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from numpy.typing import NDArray
    from zarr.core.buffer import Buffer

    from fastvgg.datasets.base import PartialPages, Payload
    from fastvgg.storage.objects import ObjectStorage
    from fastvgg.transform import Transform

DIMENSION_NAMES: Final = {
    "NHWC": ("image", "height", "width", "channel"),
    "NCHW": ("image", "channel", "height", "width"),
}


class ShardEncoder:
    """Encode the metadata and the shards of a new array in memory.

    Parameters
    ----------
    header
        Shape, dtype and layout of the array.
    chunk_images
        Number of images per shard.
    transform
        The transform to record in the array's attributes.
    """

    def __init__(self, header: Header, chunk_images: int, transform: Transform | None) -> None:
        stored: dict[str, Buffer] = {}
        image = header.shape[1:]
        limit = min(chunk_images, inner_chunk_images(header.image_bytes))
        # The number of images per inner chunk must divide that of a shard.
        inner_images = next(count for count in range(limit, 0, -1) if chunk_images % count == 0)
        codecs = BytesCodec(endian="little"), Crc32cCodec()
        self._array = zarr.create_array(
            MemoryStore(stored),
            shape=header.shape,
            chunks=(chunk_images, *image),
            dtype=header.dtype,
            serializer=ShardingCodec(
                chunk_shape=(inner_images, *image), codecs=codecs, index_codecs=codecs
            ),
            filters=None,
            compressors=None,
            fill_value=0,
            chunk_key_encoding={"name": "default", "separator": "."},
            dimension_names=DIMENSION_NAMES[header.layout],
            attributes={ATTRIBUTE_KEY: {"transform": transform.to_dict()}} if transform else {},
            config={"write_empty_chunks": True},
        )
        self.metadata = {name: data.to_bytes() for name, data in stored.items()}
        self._chunk_images = chunk_images
        self._inner_chunks = chunk_images // inner_images
        self._inner_bytes = inner_images * header.image_bytes

    def key(self, start: int) -> str:
        """Return the key of the shard that starts at a row."""
        number = start // self._chunk_images
        key: str = self._array.metadata.encode_chunk_key((number, 0, 0, 0))
        return key

    def keys(self) -> Iterator[str]:
        """Yield the keys of all objects of the array: its metadata and its shards."""
        yield from self.metadata
        for start in range(0, self._array.shape[0], self._chunk_images):
            yield self.key(start)

    @property
    def shard_bytes(self) -> int:
        """Size of a shard in bytes, including checksums and index."""
        checked_bytes = self._inner_bytes + CHECKSUM_BYTES
        return self._inner_chunks * (checked_bytes + INDEX_ENTRY_BYTES) + CHECKSUM_BYTES

    def encode(self, data: bytes | memoryview, out: NDArray[np.uint8]) -> None:
        """Encode rows as a shard; a shorter last shard is padded with zeros.

        A shard consists of the inner chunks, each followed by its CRC32C, and an index of their
        offsets and lengths with a CRC32C of its own:
        https://zarr-specs.readthedocs.io/en/latest/v3/codecs/sharding-indexed
        zarr's codec copies each byte three times into newly allocated memory: for 22 MiB it takes
        15 ms, and this 4 ms in a reused buffer.
        """
        rows = np.frombuffer(data, np.uint8)
        checked_bytes = self._inner_bytes + CHECKSUM_BYTES
        offsets = np.arange(self._inner_chunks, dtype="<u8") * checked_bytes
        for number, offset in enumerate(offsets.tolist()):
            chunk = rows[number * self._inner_bytes :][: self._inner_bytes]
            checked = out[offset : offset + checked_bytes]
            checked[: len(chunk)] = chunk
            checked[len(chunk) : self._inner_bytes] = 0
            _append_crc32c(checked)
        index = np.stack([offsets, np.full_like(offsets, checked_bytes)], axis=1)
        end = out[self._inner_chunks * checked_bytes :]
        end[:-CHECKSUM_BYTES] = index.reshape(-1).view(np.uint8)
        _append_crc32c(end)


def _append_crc32c(buffer: NDArray[np.uint8]) -> None:
    """Store the CRC32C of the bytes of a buffer in its last 4 bytes."""
    checksum = google_crc32c.value(buffer[:-CHECKSUM_BYTES])
    buffer[-CHECKSUM_BYTES:] = np.array([checksum], "<u4").view(np.uint8)


class _EncodedShard(NamedTuple):
    """An encoded shard, its key, and the buffer that contains it."""

    key: str
    memory: bytearray
    content: NDArray[np.uint8]


class _ShardTarget(SharedTarget):
    """A Zarr array with one file, or object, per shard.

    Parameters
    ----------
    path, header
        As for `Target`.
    chunk_images
        Number of images per shard.
    transform
        The transform to record in the array's attributes.
    """

    _alignment_bytes = 1
    """Alignment of a shard's buffer."""

    def __init__(
        self, path: Path, header: Header, *, chunk_images: int, transform: Transform | None
    ) -> None:
        super().__init__(path, header)
        self._encoder = ShardEncoder(header, chunk_images, transform)
        self._encoded: deque[_EncodedShard] = deque()
        self._memory: list[bytearray] = []

    def write(self, start: int, stored: Payload) -> None:
        """Encode rows as a shard in a buffer from the pool; `sync` writes it.

        This encodes a shard while the previous one is being written.
        """
        nbytes = self._encoder.shard_bytes
        try:
            memory = self._memory.pop()
        except IndexError:
            memory = bytearray(nbytes + self._alignment_bytes - 1)
        whole = np.frombuffer(memory, np.uint8)
        content = whole[-whole.ctypes.data % self._alignment_bytes :][:nbytes]
        (data,) = stored
        self._encoder.encode(data, content)
        self._encoded.append(_EncodedShard(self._encoder.key(start), memory, content))

    def write_aligned(self, start: int, stored: Payload) -> PartialPages:
        self.write(start, stored)
        return []  # a shard has a single writer

    def file_names(self) -> Iterator[str]:
        return self._encoder.keys()

    def metadata(self) -> dict[str, bytes]:
        return self._encoder.metadata

    def write_unaligned(self, edges: PartialPages) -> None:
        """Do nothing: there are no partial pages."""

    @abstractmethod
    def _store(self, shard: _EncodedShard) -> None:
        """Write an encoded shard durably."""

    def sync(self) -> None:
        """Write the encoded shards."""
        for _ in range(len(self._encoded)):  # not shards that `write` adds in the meantime
            shard = self._encoded.popleft()
            self._store(shard)
            self._memory.append(shard.memory)

    def unfinished(self) -> Self:
        metadata = self._encoder.metadata  # a store gets it at the end
        view = super().unfinished()
        view._published = ZarrArray(  # noqa: SLF001  # of the same class
            self.partial, layout=self.header.layout, metadata=metadata
        )
        return view

    def read_back(self, start: int, stop: int) -> NDArray[Any]:
        self._check_published(self._published.header)
        try:
            return self._published.read(start, stop).batch
        except DamagedChunkError as error:
            remedy = "move it away, and recreate it from its source"
            raise VerificationError(error.problem, remedy) from None

    def inspect_published(self) -> list[str]:
        try:
            self._check_published(self._published.header)
        except SourceError as error:
            metadata = self._encoder.metadata  # as it was written
            self._published = ZarrArray(self.path, layout=self.header.layout, metadata=metadata)
            return [f"its metadata differs: {error.problem.removeprefix(f'{self.path} ')}"]
        return []

    @property
    def min_span_bytes(self) -> int:
        return self._published.read_granularity * self.header.image_bytes

    def stored_spans(self, start: int, stop: int, max_bytes: int) -> Iterator[memoryview]:
        granularity = self._published.read_granularity
        rows = max(1, max_bytes // self.min_span_bytes) * granularity
        for row in range(start, stop, rows):
            yield byte_view(self.read_back(row, min(row + rows, stop)))

    def repair_header(self) -> list[str]:
        for name, data in self._encoder.metadata.items():
            self._replace(name, data)
        del self._published
        return self.inspect_published()

    def repair(self, start: int, stored: Payload) -> None:
        self.write(start, stored)
        shard = self._encoded.pop()
        self._replace(shard.key, shard.content.data)
        self._memory.append(shard.memory)

    @abstractmethod
    def _replace(self, key: str, data: bytes | memoryview) -> None:
        """Replace a shard, or metadata, of the published array atomically and durably."""

    @functools.cached_property
    def _published(self) -> ZarrArray:
        return ZarrArray(self.path, layout=self.header.layout)


class ZarrTarget(DiskTarget, _ShardTarget):
    """A Zarr array in a directory, with one file per shard."""

    _alignment_bytes = mmap.PAGESIZE  # for direct I/O

    def create(self) -> None:
        self._storage.remove(self.partial)
        self._storage.make_directory(self.partial)
        self._storage.hold(self.partial)
        for name, data in self._encoder.metadata.items():
            self._storage.write_file(self.partial / name, [data], direct=True)
        self._storage.sync_directory(self.partial)
        self._storage.sync_directory(self.path.parent)

    def reopen(self) -> None:
        self._check_metadata()
        self._storage.hold(self.partial)

    def close(self) -> None:
        self._storage.release(self.partial)

    def publish(self) -> None:
        """Give the partial its name, after checking that it holds every file that was written."""
        expected = sum(1 for _ in self.file_names())
        found = self._storage.count_files(self.partial)
        if found != expected:
            raise StoppedError(
                f"{self.partial} contains {found} files, but {expected} were written",
                f"move what others added to it away, and start over with {option('restart')}",
            )
        self._storage.check_same(self._storage.hold(self.partial))
        super().publish()

    def _check_metadata(self) -> None:
        for name, expected in self._encoder.metadata.items():
            try:
                with open_regular(self.partial / name) as file:
                    actual = file.read(len(expected) + 1)
            except OSError as error:
                raise ResumeError(
                    f"{self.partial / name} cannot be read: {error.strerror}",
                    f"start over with {option('restart')}",
                ) from None
            if actual != expected:
                raise ResumeError(
                    f"{self.partial / name} differs from what the unfinished run wrote",
                    f"the file was changed in the meantime: start over with {option('restart')}",
                )

    def _store(self, shard: _EncodedShard) -> None:
        self._storage.write_file(self.partial / shard.key, [shard.content.data], direct=True)

    def _replace(self, key: str, data: bytes | memoryview) -> None:
        self._storage.replace_file(self.path / key, [data])

    def sync(self) -> None:
        """Write the encoded shards, and make their directory entries durable."""
        super().sync()
        self._storage.sync_directory(self.partial)


class StoreZarrTarget(_ShardTarget):
    """A Zarr array in a store. Shards get their final keys; the metadata is written last."""

    def __init__(self, path: Path, header: Header, storage: ObjectStorage, **options: Any) -> None:
        super().__init__(path, header, **options)
        self._storage = storage

    def create(self) -> None:
        """Remove what exists at the path, its array metadata first."""
        self.reopen()
        self._storage.remove(self.path)

    def reopen(self) -> None:
        """Keep the existing shards, and remove the metadata of a finished array."""
        for name in self._encoder.metadata:
            self._storage.remove(self.path / name)

    def attach(self) -> None:
        """Do nothing: until it is published, the array consists of shards only."""

    def _store(self, shard: _EncodedShard) -> None:
        self._storage.put(self.path / shard.key, shard.memory)

    def _replace(self, key: str, data: bytes | memoryview) -> None:
        self._storage.put(self.path / key, bytes(data))

    def publish(self) -> None:
        for name, data in self._encoder.metadata.items():
            self._storage.put(self.path / name, data)
