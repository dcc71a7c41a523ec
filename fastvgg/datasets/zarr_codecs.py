"""Decode Zarr chunks into bounded memory, whatever a damaged or malicious chunk claims.

zarr-python and numcodecs decode a chunk to whatever length it has: 2 MB of zlib are 2 GB of zeros.
Therefore `bounded_metadata` replaces the compressors in the metadata of an array, as zarr-python
reads it, by one codec that decodes the same formats up to the length of a chunk.
"""

from __future__ import annotations

import asyncio
import bz2
import lzma
import math
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numcodecs  # type: ignore[import-untyped]
import numcodecs.abc  # type: ignore[import-untyped]
import numpy as np
from zarr.abc.codec import BytesBytesCodec
from zarr.registry import register_codec

from fastvgg.datasets.base import max_encoded_bytes

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Self

    from zarr.core.array_spec import ArraySpec
    from zarr.core.buffer import Buffer

NAME: Final = "fastvgg.bounded"
NUMCODECS_PREFIX: Final = "numcodecs."
# Codecs that run code, or make Python objects of each element; images need none of them.
OBJECT_CODECS: Final = frozenset(
    (
        *("pickle", "json", "json2", "msgpack", "msgpack2", "categorize"),
        *("vlen-utf8", "vlen-bytes", "vlen-array"),
    )
)
DTYPE_FIELDS: Final = ("dtype", "astype", "encode_dtype", "decode_dtype")
MAX_ITEM_BYTES: Final = 16
ZSTD_MAGIC: Final = b"\x28\xb5\x2f\xfd"
ZSTD_SKIPPABLE: Final = range(0x184D2A50, 0x184D2A60)
ZSTD_MAX_BLOCK_BYTES: Final = 128 * 1024
ZSTD_RAW, ZSTD_RLE, ZSTD_COMPRESSED = range(3)


def decode(config: dict[str, Any], data: bytes, max_bytes: int) -> Any:  # noqa: ANN401  # a buffer
    """Decode bytes with a codec of numcodecs, described by its configuration.

    Raises
    ------
    ValueError
        If the result would have more than `max_bytes`.
    EOFError, zlib.error, lzma.LZMAError, OSError, RuntimeError
        If the data is damaged.
    """
    name = config["id"]
    if name in STREAMS:
        return _decode_streams(lambda: STREAMS[name](config), data, max_bytes, name)
    check_claimed_bytes(CLAIMED_BYTES[name](data), max_bytes)
    return numcodecs.get_codec(config).decode(data)


def check_claimed_bytes(claimed_bytes: int, max_bytes: int) -> None:
    """Raise ValueError if data decodes to more than `max_bytes`."""
    if claimed_bytes > max_bytes:
        raise ValueError(f"it decodes to more than the {max_bytes} bytes that a chunk can have")


def _decode_streams(start: Callable[[], Any], data: bytes, max_bytes: int, name: str) -> bytes:
    """Decode concatenated streams, as `gzip`, `bz2` and `lzma` do; zlib has only one."""
    blocks: list[bytes] = []
    left_bytes = max_bytes
    while data and (not blocks or name != "zlib"):
        stream = start()
        try:
            block = stream.decompress(data, left_bytes + 1)
        except (OSError, lzma.LZMAError):
            if not blocks:
                raise
            break  # bz2 and lzma ignore what follows the last stream
        left_bytes -= len(block)
        check_claimed_bytes(max_bytes - left_bytes, max_bytes)
        if not stream.eof:
            raise EOFError("the compressed data is truncated")
        blocks.append(block)
        data = stream.unused_data.lstrip(b"\0") if name == "gzip" else stream.unused_data
    if not blocks:
        raise EOFError("the compressed data is empty")
    return blocks[0] if len(blocks) == 1 else b"".join(blocks)


def _lzma(config: dict[str, Any]) -> lzma.LZMADecompressor:
    return lzma.LZMADecompressor(config.get("format", lzma.FORMAT_XZ), None, config.get("filters"))


STREAMS: Final[dict[str, Callable[[dict[str, Any]], Any]]] = {
    "zlib": lambda _: zlib.decompressobj(),
    "gzip": lambda _: zlib.decompressobj(zlib.MAX_WBITS | 16),
    "bz2": lambda _: bz2.BZ2Decompressor(),
    "lzma": _lzma,
}


def _blosc_bytes(data: bytes) -> int:
    """Return the decoded length; Blosc trusts the encoded length, and would read beyond it."""
    expected = int.from_bytes(data[12:16], "little")
    if len(data) < 16 or expected != len(data):
        raise ValueError(f"it has {len(data)} bytes; its header says {expected}")
    return int.from_bytes(data[4:8], "little")


def _zstd_bytes(data: bytes) -> int:
    """Return an upper bound of the decoded length from the headers of all frames and blocks.

    The length in a frame's header is optional. A compressed block decodes to at most 128 KiB.
    https://www.rfc-editor.org/rfc/rfc8878
    """
    at, total = 0, 0
    while at < len(data):
        magic = data[at : at + 4]
        if int.from_bytes(magic, "little") in ZSTD_SKIPPABLE:
            at += 8 + int.from_bytes(data[at + 4 : at + 8], "little")
            continue
        if magic != ZSTD_MAGIC or len(data) < at + 6:
            raise ValueError("it is not a Zstandard frame")
        descriptor = data[at + 4]
        is_single, has_checksum = descriptor >> 5 & 1, descriptor >> 2 & 1
        size_bytes = (is_single, 2, 4, 8)[descriptor >> 6]
        at += 5 + (not is_single) + (0, 1, 2, 4)[descriptor & 3]
        claimed = int.from_bytes(data[at : at + size_bytes], "little") + 256 * (size_bytes == 2)
        at, blocks_bytes, is_last = at + size_bytes, 0, False
        while not is_last:
            if at + 3 > len(data):
                raise EOFError("the compressed data is truncated")
            header = int.from_bytes(data[at : at + 3], "little")
            is_last, kind, length = bool(header & 1), header >> 1 & 3, header >> 3
            blocks_bytes += length if kind in (ZSTD_RAW, ZSTD_RLE) else ZSTD_MAX_BLOCK_BYTES
            at += 3 + (1 if kind == ZSTD_RLE else length)
        at += 4 * has_checksum
        total += claimed if size_bytes else max(0, blocks_bytes - ZSTD_MAX_BLOCK_BYTES)
    return total


CLAIMED_BYTES: Final[dict[str, Callable[[bytes], int]]] = {
    "blosc": _blosc_bytes,
    "lz4": lambda data: int.from_bytes(data[:4], "little"),
    "zstd": _zstd_bytes,
}
BOUNDED: Final = (*STREAMS, *CLAIMED_BYTES)


@dataclass(frozen=True)
class BoundedCodec(BytesBytesCodec):
    """A compressor of Zarr version 3; a chunk's shape and dtype limit what it decodes to."""

    is_fixed_size = False
    config: dict[str, Any]

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Return the codec for what `bounded_metadata` wrote."""
        return cls(data["configuration"])

    def to_dict(self) -> dict[str, Any]:
        """Return the codec as JSON types."""
        return {"name": NAME, "configuration": self.config}

    def compute_encoded_size(self, input_byte_length: int, chunk_spec: ArraySpec) -> int:
        """Raise NotImplementedError: the size depends on the data."""
        raise NotImplementedError

    async def _decode_single(self, chunk_bytes: Buffer, chunk_spec: ArraySpec) -> Buffer:
        item_bytes = chunk_spec.dtype.to_native_dtype().itemsize
        limit = max_encoded_bytes(math.prod(chunk_spec.shape) * item_bytes)
        data = chunk_bytes.to_bytes()
        decoded = await asyncio.to_thread(decode, self.config, data, limit)
        return chunk_spec.prototype.buffer.from_bytes(decoded)


class BoundedNumcodec(numcodecs.abc.Codec):  # type: ignore[misc]  # numcodecs has no types
    """A compressor of Zarr version 2, which decodes to at most `max_bytes`."""

    codec_id = NAME

    def __init__(self, config: dict[str, Any], max_bytes: int) -> None:
        self.config = config
        self.max_bytes = max_bytes

    def encode(self, buf: object) -> object:
        """Raise NotImplementedError: arrays are only read."""
        raise NotImplementedError

    def decode(self, buf: Any, out: object = None) -> Any:  # noqa: ANN401, ARG002  # a buffer
        """Decode a chunk."""
        return decode(self.config, bytes(memoryview(buf).cast("B")), self.max_bytes)


register_codec(NAME, BoundedCodec)
numcodecs.register_codec(BoundedNumcodec)


def bounded_metadata(fields: dict[str, Any]) -> dict[str, Any]:
    """Return the metadata of an array with compressors that decode to bounded memory.

    Metadata that is not as the specification says is returned unchanged: zarr-python rejects it.

    Raises
    ------
    ValueError
        If a codec makes Python objects, or changes the dtype to one of no number, or if shards
        are within shards or encoded once more.
    """
    if fields.get("zarr_format") == 2:
        return _bounded_v2(fields)
    codecs = fields.get("codecs")
    return {**fields, "codecs": _bounded_v3(codecs)} if isinstance(codecs, list) else fields


def widest_item_bytes(fields: Any) -> int:  # noqa: ANN401  # JSON
    """Return the size of the largest number in a chunk while its codecs are applied, in bytes."""
    if isinstance(fields, list | tuple):
        return max(map(widest_item_bytes, fields), default=1)
    if not isinstance(fields, dict):
        return 1
    dtypes = (fields[field] for field in DTYPE_FIELDS if isinstance(fields.get(field), str))
    nested = map(fields.get, ("codecs", "filters", "compressor", "configuration", "config"))
    sizes = [int(np.dtype(dtype).itemsize) for dtype in dtypes]
    return max(*sizes, *map(widest_item_bytes, nested))


def _bounded_v3(codecs: list[Any], *, in_shard: bool = False) -> list[Any]:
    bounded = []
    for codec in codecs:
        name = codec.get("name") if isinstance(codec, dict) else codec
        config = codec.get("configuration", {}) if isinstance(codec, dict) else {}
        if not (isinstance(name, str) and isinstance(config, dict)):
            bounded.append(codec)
            continue
        plain = name.removeprefix(NUMCODECS_PREFIX)
        _check_codec(plain, config)
        if name == "sharding_indexed":
            if in_shard or len(codecs) > 1:
                raise ValueError("its shards are encoded once more, which is not supported")
            inner = config.get("codecs")
            if isinstance(inner, list):
                config = {**config, "codecs": _bounded_v3(inner, in_shard=True)}
            bounded.append({"name": name, "configuration": config})
        elif plain in BOUNDED and (name != plain or name in ("gzip", "zstd", "blosc")):
            decoder = {"id": plain, **(config if plain == "lzma" else {})}
            bounded.append({"name": NAME, "configuration": decoder})
        else:
            bounded.append(codec)
    return bounded


def _bounded_v2(fields: dict[str, Any]) -> dict[str, Any]:
    filters, compressor = fields.get("filters") or [], fields.get("compressor")
    for codec in (*filters, compressor):
        if isinstance(codec, dict):
            _check_codec(str(codec.get("id")), codec)
    try:
        nbytes = math.prod(map(int, fields["chunks"])) * widest_item_bytes(fields)
        limit = max_encoded_bytes(nbytes)
    except (TypeError, ValueError, KeyError):
        return fields

    def bounded(codec: Any) -> Any:  # noqa: ANN401  # JSON
        if isinstance(codec, dict) and codec.get("id") in BOUNDED:
            return {"id": NAME, "config": codec, "max_bytes": limit}
        return codec

    filters = [*map(bounded, filters)] or fields.get("filters")
    return {**fields, "filters": filters, "compressor": bounded(compressor)}


def _check_codec(name: str, config: dict[str, Any]) -> None:
    """Check that a codec makes numbers."""
    if name in OBJECT_CODECS:
        raise ValueError(f"its codec {name!r} makes Python objects, which is never done")
    dtypes = [np.dtype(config[field]) for field in DTYPE_FIELDS if config.get(field) is not None]
    if any(dtype.kind not in "?buif" or dtype.itemsize > MAX_ITEM_BYTES for dtype in dtypes):
        raise ValueError(f"its codec {name[:40]!r} has a dtype of no number")
