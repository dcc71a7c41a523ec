"""The store from which zarr-python reads an array: strict about missing chunks, and bounded.

Zarr reads a missing chunk, or a missing inner chunk of a shard, as if it were full of the fill
value. Here it is an error, unless the caller asked for the fill value.
"""

from __future__ import annotations

import json
import math
import re
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np
from zarr.abc.store import RangeByteRequest, Store
from zarr.buffer import default_buffer_prototype
from zarr.storage import WrapperStore

from fastvgg.datasets.base import max_encoded_bytes
from fastvgg.datasets.zarr_codecs import bounded_metadata
from fastvgg.errors import SourceError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from zarr.abc.store import ByteRequest
    from zarr.core.buffer import Buffer, BufferPrototype

ARRAY_METADATA_KEYS: Final = ("zarr.json", ".zarray")
METADATA_KEYS: Final = (*ARRAY_METADATA_KEYS, ".zgroup", ".zattrs", ".zmetadata")
MAX_METADATA_BYTES: Final = 2 * 1024 * 1024  # parsed, it has up to 20 times the size
NO_CHUNK: Final = 2**64 - 1  # offset and length of a missing inner chunk
INDEX_ENTRY_BYTES: Final = 16
INDEX_PART: Final = 2**16  # entries
CHECKSUM_BYTES: Final = 4
# Codecs of an index whose encoded size and position are fixed, as the specification demands.
INDEX_CODECS: Final = ({"bytes"}, {"bytes", "crc32c"})


class MissingChunkError(Exception):
    """A missing or empty chunk, identified by its key, and why it is one."""


class ShardLayout(NamedTuple):
    """Where the inner chunks of the shards of an array are."""

    shape: tuple[int, ...]
    """Shape of the array."""
    shard_shape: tuple[int, ...]
    inner_shape: tuple[int, ...]
    index_dtype: str
    is_index_at_start: bool
    index_bytes: int
    max_inner_bytes: int
    """Most bytes that an inner chunk can have."""

    @classmethod
    def of(
        cls,
        config: dict[str, Any],
        shape: tuple[int, ...],
        shard_shape: tuple[int, ...],
        item_bytes: int,
    ) -> ShardLayout:
        """Return the layout that the configuration of `sharding_indexed` describes.

        Raises
        ------
        ValueError
            If its index has other codecs than those of the specification.
        """
        inner_shape = tuple(config["chunk_shape"])
        codecs = {
            codec["name"]: codec.get("configuration") or {} for codec in config["index_codecs"]
        }
        if codecs.keys() not in INDEX_CODECS:
            raise ValueError("the index of its shards has codecs of variable size")
        endian = codecs["bytes"].get("endian", "little")
        count = math.prod(a // b for a, b in zip(shard_shape, inner_shape, strict=True))
        index_bytes = count * INDEX_ENTRY_BYTES + CHECKSUM_BYTES * (len(codecs) == 2)
        return cls(
            shape,
            shard_shape,
            inner_shape,
            ">u8" if endian == "big" else "<u8",
            config.get("index_location", "end") == "start",
            index_bytes,
            max_encoded_bytes(math.prod(inner_shape) * item_bytes),
        )

    @property
    def counts(self) -> list[int]:
        """The number of inner chunks along each axis of a shard."""
        return [a // b for a, b in zip(self.shard_shape, self.inner_shape, strict=True)]

    @property
    def max_bytes(self) -> int:
        """Most bytes that a shard can have."""
        return math.prod(self.counts) * self.max_inner_bytes + self.index_bytes

    def is_index(self, byte_range: RangeByteRequest) -> bool:
        """Whether a range of a shard is its index; one at the end is requested as a suffix."""
        return self.is_index_at_start and byte_range == RangeByteRequest(0, self.index_bytes)

    def index_of(self, data: Buffer) -> Callable[[int, int], bytes]:
        """Return a function that reads the index in the bytes of a shard, or of its start or end.

        It takes a number of bytes and an offset in the index.
        """
        start = 0 if self.is_index_at_start else max(0, len(data) - self.index_bytes)

        def read(nbytes: int, offset: int) -> bytes:
            part: bytes = data[start + offset : start + offset + nbytes].to_bytes()
            return part

        return read

    def count_missing(self, key: str, index: bytes, first: int = 0) -> int:
        """Count the inner chunks that a shard lacks, in its index or a part of it from `first` on.

        What lies beyond the end of the array is never stored.
        """
        entries = np.frombuffer(index, self.index_dtype).reshape(-1, 2)
        absent = first + np.flatnonzero((entries == NO_CHUNK).all(axis=1))
        numbers = re.findall("[0-9]+", key)[-len(self.shape) :]  # of the shard along each axis
        is_within = np.ones(len(absent), bool)
        for number, end, size, inner, at in zip(
            numbers,
            self.shape,
            self.shard_shape,
            self.inner_shape,
            np.unravel_index(absent, self.counts),
            strict=True,
        ):
            is_within &= int(number) * size + at * inner < end
        return int(is_within.sum())

    def count_missing_in(self, key: str, read: Callable[[int, int], bytes]) -> int:
        """Count the inner chunks that a shard lacks, from its index, a part at a time.

        `read` returns a number of bytes at an offset in the index.
        """
        entries, missing = math.prod(self.counts), 0
        for first in range(0, entries, INDEX_PART):
            nbytes = min(INDEX_PART, entries - first) * INDEX_ENTRY_BYTES
            part = read(nbytes, first * INDEX_ENTRY_BYTES)
            if len(part) < nbytes:
                return 1
            missing += self.count_missing(key, part, first)
        return missing


class StrictStore(WrapperStore[Store]):
    """A store that raises for missing chunks, and reads no more than an array can need.

    `metadata` overrides keys that are not written yet.
    """

    def __init__(self, store: Store, path: Path, metadata: Mapping[str, bytes]) -> None:
        super().__init__(store)
        self._path = path
        self._metadata = metadata
        self.shards: ShardLayout | None = None
        self.fills_missing = False
        """Whether missing chunks are read as the fill value."""

    def _with_store(self, store: Store) -> StrictStore:
        copied = StrictStore(store, self._path, self._metadata)
        copied.shards, copied.fills_missing = self.shards, self.fills_missing
        return copied

    async def get(
        self,
        key: str,
        prototype: BufferPrototype | None = None,
        byte_range: ByteRequest | None = None,
    ) -> Buffer | None:
        prototype = prototype or default_buffer_prototype()
        if key in self._metadata:
            return prototype.buffer.from_bytes(self._metadata[key])
        if key.endswith(METADATA_KEYS):
            return await self._get_metadata(key, prototype)
        is_inner_chunk = False
        if isinstance(byte_range, RangeByteRequest) and self.shards is not None:
            is_inner_chunk = not self.shards.is_index(byte_range)
            nbytes = byte_range.end - byte_range.start
            if is_inner_chunk and nbytes > self.shards.max_inner_bytes:
                raise ValueError(f"its index claims an inner chunk of {nbytes} bytes")
        data: Buffer | None = await self._store.get(key, prototype, byte_range)
        if data is None and self.fills_missing:
            return None
        if not data:  # zarr treats an empty chunk as one that was never written
            raise MissingChunkError(key, "it is missing or empty")
        if self.shards is not None and not (is_inner_chunk or self.fills_missing):
            missing = self.shards.count_missing_in(key, self.shards.index_of(data))
            if missing:
                raise MissingChunkError(key, f"{missing} of its inner chunks are missing")
        return data

    async def _get_metadata(self, key: str, prototype: BufferPrototype) -> Buffer | None:
        """Read metadata, if it is not too long, and limit the memory of the codecs in it."""
        try:
            nbytes = await self._store.getsize(key)
        except FileNotFoundError:
            return None
        if nbytes > MAX_METADATA_BYTES:
            raise SourceError(
                f"{self._path}/{key} has {nbytes} bytes; the limit is {MAX_METADATA_BYTES}",
                "move what other programs need out of the metadata, or replace the array",
            )
        data: Buffer | None = await self._store.get(key, prototype)
        if data is None or not key.endswith(ARRAY_METADATA_KEYS):
            return data
        try:
            fields = json.loads(data.to_bytes())
        except ValueError:  # zarr reports it
            return data
        if not isinstance(fields, dict):
            return data
        return prototype.buffer.from_bytes(json.dumps(bounded_metadata(fields)).encode())
