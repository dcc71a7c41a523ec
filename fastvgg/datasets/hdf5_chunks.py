"""The chunks of an HDF5 dataset: which are stored, and whether they decode to bounded memory.

HDF5 trusts what a file claims. For a chunk without data it returns uninitialized memory, or crashes
the process, and it inflates a chunk into a buffer that grows until the memory is full. Therefore
deflated chunks are inflated here.
"""

from __future__ import annotations

import itertools
import math
import zlib
from array import array
from typing import TYPE_CHECKING, Any, Final

import h5py
import numpy as np

from fastvgg.datasets.base import max_encoded_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

INFLATED_BLOCK_BYTES: Final = 1024 * 1024
CHECKSUM_BYTES: Final = 4
SHUFFLE: Final = h5py.h5z.FILTER_SHUFFLE
DEFLATE: Final = h5py.h5z.FILTER_DEFLATE
MAX_LEVEL: Final = 9  # of deflate; zlib needs none to inflate, but HDF5 refuses a larger one
# Filters whose chunks say, or show, how long they are once decoded.
SELF_SIZED: Final = (DEFLATE, h5py.h5z.FILTER_SZIP)
COMPRESSORS: Final = (*SELF_SIZED, h5py.h5z.FILTER_LZF)
# Filters whose parameters repeat the number and the size of the elements of a chunk.
SIZED_FILTERS: Final = (h5py.h5z.FILTER_NBIT, h5py.h5z.FILTER_SCALEOFFSET)
COUNT_PARAMETER, SIZE_PARAMETER = 2, 4


class ChunkError(Exception):
    """A chunk index or a chunk that is damaged."""


class StoredChunks:
    """The stored chunks of a dataset, of which some may never have been written.

    Parameters
    ----------
    dataset
        A chunked dataset.
    file_bytes
        The size of its file.

    Raises
    ------
    ChunkError
        If the chunk index or the parameters of the filters are damaged.
    """

    def __init__(self, dataset: h5py.Dataset, file_bytes: int) -> None:
        self._dataset = dataset
        properties = dataset.id.get_create_plist()
        self._filters = [
            properties.get_filter(number) for number in range(properties.get_nfilters())
        ]
        self._lengths: tuple[int, ...] = dataset.chunks
        self._counts = [-(-a // b) for a, b in zip(dataset.shape, self._lengths, strict=True)]
        self.expected = math.prod(self._counts)
        self.chunk_bytes: int = math.prod(self._lengths) * dataset.id.get_type().get_size()
        self.max_stored_bytes = max_encoded_bytes(self.chunk_bytes)
        self._check_filters()
        self._numbers = self._find_stored(file_bytes)

    @property
    def missing(self) -> int:
        """Number of chunks that were never written."""
        return int(self.expected - len(self._numbers))

    def _check_filters(self) -> None:
        codes = [code for code, *_ in self._filters]
        if sum(code in COMPRESSORS for code in codes) > 1:
            raise ChunkError("its chunks are compressed twice")
        for code, _, values, _ in self._filters:
            is_sized = code in SIZED_FILTERS and len(values) > SIZE_PARAMETER
            if is_sized and values[COUNT_PARAMETER] * values[SIZE_PARAMETER] > self.chunk_bytes:
                raise ChunkError(f"filter {code} claims more elements than a chunk has")

    def _find_stored(self, file_bytes: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        """Return the numbers of the stored chunks in C order, ascending."""
        dataset = self._dataset
        listed, claimed_bytes = dataset.id.get_num_chunks(), dataset.id.get_storage_size()
        if max(listed, claimed_bytes) > file_bytes:
            raise ChunkError(
                f"it claims {claimed_bytes} bytes in {listed} chunks; the file has {file_bytes}"
            )
        offsets = array("Q")
        unfiltered = (1 << len(self._filters)) - 1
        max_size = 0

        def visit(chunk: h5py.h5d.StoreInfo) -> None:
            nonlocal max_size
            is_plain = chunk.filter_mask & unfiltered == unfiltered
            has_data = chunk.byte_offset is not None and chunk.size >= (
                self.chunk_bytes if is_plain else 1
            )
            max_size = max(max_size, chunk.size)
            if has_data:
                offsets.extend(chunk.chunk_offset)

        dataset.id.chunk_iter(visit)
        # A damaged chunk index may list one chunk twice and omit another.
        indices = np.array(offsets, np.uint64).reshape(-1, len(self._lengths))
        indices //= np.array(self._lengths, np.uint64)
        indices = indices[(indices < np.array(self._counts, np.uint64)).all(axis=1)]
        stored = np.unique(np.ravel_multi_index(indices.T.astype(np.int64), self._counts))
        if len(stored) < min(listed, self.expected):
            missing = min(listed, self.expected) - len(stored)
            raise ChunkError(f"{missing} of {self.expected} chunks have no data")
        if max_size > self.max_stored_bytes:
            raise ChunkError(f"a chunk of {self.chunk_bytes} bytes is stored in {max_size}")
        return stored

    @property
    def is_inflatable(self) -> bool:
        """Whether `inflate` can decode the chunks, and HDF5 does not refuse their description."""
        codes = [code for code, *_ in self._filters]
        levels = [values for code, _, values, _ in self._filters if code == DEFLATE]
        is_valid = all(len(level) == 1 and level[0] <= MAX_LEVEL for level in levels)
        return is_valid and codes in ([DEFLATE], [SHUFFLE, DEFLATE])

    def inflate(self, start: int, out: NDArray[Any]) -> None:
        """Fill `out` with images, starting at row `start`; its dtype is the stored one.

        Raises
        ------
        ChunkError
            If a chunk does not decode to the bytes of a chunk.
        OSError
            If HDF5 cannot read one.
        """
        if self.missing:
            out[...] = self._dataset.fillvalue
        item_bytes = out.dtype.itemsize
        bytes_of = out.view(np.uint8).reshape(*out.shape, item_bytes)
        for offset in self._offsets(start, start + len(out)):
            at = (offset[0] - start, *offset[1:])  # in `out`, perhaps before it
            ends = zip(at, self._lengths, out.shape, strict=True)
            within = tuple(slice(max(0, -a), min(length, size - a)) for a, length, size in ends)
            target = bytes_of[
                tuple(slice(max(0, a), a + n) for a, n in zip(at, self._lengths, strict=True))
            ]
            data, is_shuffled = self._inflated(offset)
            if is_shuffled:  # the first bytes of all elements, then the second ones
                planes = data.reshape(item_bytes, *self._lengths)
                for byte in range(item_bytes):
                    target[..., byte] = planes[byte][within]
            else:
                target[...] = data.reshape(*self._lengths, item_bytes)[within]

    def _inflated(self, offset: tuple[int, ...]) -> tuple[NDArray[np.uint8], bool]:
        """Read and inflate a chunk; return its bytes, and whether they are shuffled."""
        mask, data = self._read_chunk(offset)
        codes = [code for number, (code, *_) in enumerate(self._filters) if not mask >> number & 1]
        if DEFLATE in codes:
            stream = zlib.decompressobj()
            try:
                data = stream.decompress(data, self.chunk_bytes + 1)
            except zlib.error as error:
                raise ChunkError(f"chunk {offset}: {error}") from None
        if len(data) > self.chunk_bytes:
            raise ChunkError(f"chunk {offset} decodes to more than {self.chunk_bytes} bytes")
        if len(data) < self.chunk_bytes or (DEFLATE in codes and not stream.eof):
            raise ChunkError(f"chunk {offset} is truncated after {len(data)} bytes")
        return np.frombuffer(data, np.uint8), SHUFFLE in codes

    def check_decoded_bytes(self, start: int, stop: int) -> None:
        """Check that the chunks of the images `start` to `stop` do not decode to more than a chunk.

        Raises
        ------
        ChunkError
            If one does.
        OSError
            If HDF5 cannot read one.
        """
        codes = [code for code, *_ in self._filters]
        position = next((at for at, code in enumerate(codes) if code in SELF_SIZED), None)
        if position is None:
            return
        outer = range(position + 1, len(codes))
        if any(codes[number] != h5py.h5z.FILTER_FLETCHER32 for number in outer):
            return  # a filter of another package is applied after it
        for offset in self._offsets(start, stop):
            mask, data = self._read_chunk(offset)
            if mask >> position & 1:
                continue
            checksums = sum(not mask >> number & 1 for number in outer)
            encoded = data[: len(data) - CHECKSUM_BYTES * checksums]
            if self._decodes_to_more(codes[position], encoded):
                raise ChunkError(f"chunk {offset} decodes to more than {self.chunk_bytes} bytes")

    def _decodes_to_more(self, code: int, encoded: bytes) -> bool:
        if code == h5py.h5z.FILTER_SZIP:
            return int.from_bytes(encoded[:4], "little") > self.max_stored_bytes
        return _inflates_to_more(encoded, self.max_stored_bytes)

    def _read_chunk(self, offset: tuple[int, ...]) -> tuple[int, bytes]:
        """Return the mask of the filters that were not applied to a chunk, and its stored bytes."""
        try:
            mask, data = self._dataset.id.read_direct_chunk(offset)
        except RuntimeError as error:
            raise ChunkError(f"chunk {offset}: {error}") from None
        return mask, data

    def _offsets(self, start: int, stop: int) -> Iterator[tuple[int, ...]]:
        """Yield the offsets of the stored chunks that contain the images `start` to `stop`."""
        rows = range(start // self._lengths[0], -(-stop // self._lengths[0]))
        for index in itertools.product(rows, *map(range, self._counts[1:])):
            number = np.ravel_multi_index(index, self._counts)
            at = int(np.searchsorted(self._numbers, number))
            if at < len(self._numbers) and self._numbers[at] == number:
                yield tuple(a * b for a, b in zip(index, self._lengths, strict=True))


def _inflates_to_more(data: bytes, max_bytes: int) -> bool:
    """Whether a zlib stream has more than `max_bytes`, without storing them."""
    stream, total = zlib.decompressobj(), 0
    while data and not stream.eof and total <= max_bytes:
        try:
            total += len(stream.decompress(data, INFLATED_BLOCK_BYTES))
        except zlib.error:  # HDF5 reports it
            return False
        data = stream.unconsumed_tail
    return total > max_bytes
