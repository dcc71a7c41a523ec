"""Read Zarr arrays with zarr-python: https://zarr-specs.readthedocs.io.

Zarr reads a missing chunk as if it were full of the fill value. Here it is an error.
"""

from __future__ import annotations

import itertools
import lzma
import math
import os
import warnings
import zlib
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

import xxhash
import zarr
from zarr.abc.store import Store
from zarr.buffer import default_buffer_prototype
from zarr.buffer.cpu import NDBuffer
from zarr.storage import FsspecStore, LocalStore, WrapperStore

from fastvgg.datasets.base import (
    MAX_ELEMENTS,
    MAX_SHAPE_CHARACTERS,
    ArraySource,
    Header,
    check_dtype,
    check_shape,
)
from fastvgg.datasets.index import read_index
from fastvgg.errors import SourceError, StoppedError
from fastvgg.storage import objects
from fastvgg.storage.location import Location, is_remote

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray
    from zarr.abc.store import ByteRequest
    from zarr.core.buffer import Buffer, BufferPrototype

    from fastvgg.transform import Layout

ARRAY_METADATA_SUFFIXES: Final = ("/zarr.json", "/.zarray")
METADATA_KEYS: Final = ("zarr.json", ".zarray", ".zgroup", ".zattrs", ".zmetadata")
ATTRIBUTE_KEY: Final = "fastvgg"
"""The attribute that records the transform applied to the images."""
MAX_NAMES_SHOWN: Final = 10
MAX_COUNTED_CHUNKS: Final = 10**6  # metadata may claim any number
# What zarr-python and its codecs raise on damaged metadata and damaged chunks.
METADATA_ERRORS: Final = (
    *(ValueError, TypeError, KeyError, AttributeError),
    *(ArithmeticError, RecursionError, OSError),
)
CHUNK_ERRORS: Final = (
    *(ValueError, TypeError, RuntimeError, OverflowError, SystemError, MemoryError),
    *(OSError, EOFError, zlib.error, lzma.LZMAError),
)


class MissingChunkError(Exception):
    """A missing or empty chunk, identified by its key."""


class DamagedChunkError(StoppedError):
    """A chunk that is missing or cannot be decoded."""


class _StrictStore(WrapperStore[Store]):
    """A store that raises for missing chunks. `metadata` overrides keys not written yet."""

    def __init__(self, store: Store, metadata: Mapping[str, bytes]) -> None:
        super().__init__(store)
        self._metadata = metadata
        # Blosc trusts the length in a chunk's header, and would read beyond the end of the chunk.
        self.uses_blosc = False

    def _with_store(self, store: Store) -> _StrictStore:
        return _StrictStore(store, self._metadata)

    async def get(
        self,
        key: str,
        prototype: BufferPrototype | None = None,
        byte_range: ByteRequest | None = None,
    ) -> Buffer | None:
        prototype = prototype or default_buffer_prototype()
        if key in self._metadata:
            return prototype.buffer.from_bytes(self._metadata[key])
        data: Buffer | None = await self._store.get(key, prototype, byte_range)
        # zarr also treats an empty shard as one that was never written.
        if not data and not key.endswith(METADATA_KEYS):
            raise MissingChunkError(key)
        if data and self.uses_blosc and byte_range is None and not key.endswith(METADATA_KEYS):
            expected = int.from_bytes(data[12:16].to_bytes(), "little")
            if expected != len(data):
                raise ValueError(f"it has {len(data)} bytes; its header says {expected}")
        return data


class ZarrArray(ArraySource):
    """A Zarr array opened for reading, whose chunks need not all be present.

    Parameters
    ----------
    path
        A directory, or a location in a store.
    layout
        The layout of the array.
    metadata
        Metadata documents that are not written yet, by key.

    Raises
    ------
    SourceError
        If the metadata cannot be read, or does not describe an array of images.
    """

    kind = "zarr"

    def __init__(
        self,
        path: Path,
        *,
        layout: Layout = "NHWC",
        metadata: Mapping[str, bytes] = MappingProxyType({}),
    ) -> None:
        super().__init__(Location(path))
        _check_metadata_regular(path)
        try:
            with objects.os_errors(), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about deviations that zarr tolerates
                opened: Store = (
                    FsspecStore.from_url(str(path), read_only=True)
                    if is_remote(path)
                    else LocalStore(path, read_only=True)
                )
                store = _StrictStore(opened, metadata)
                array = zarr.open(store, mode="r")
        except FileNotFoundError:
            raise SourceError(
                f"{path} contains no Zarr array: neither zarr.json nor .zarray exists",
                "check the name, and that the array is complete",
            ) from None
        except METADATA_ERRORS as error:
            raise SourceError(
                f"{path} cannot be opened as Zarr: {type(error).__name__}: {_display(error)}",
                "check the connection, or replace the array with an intact copy",
            ) from None
        if isinstance(array, zarr.Group):
            raise SourceError(
                f"{path} is a Zarr group; its arrays are: {', '.join(_arrays(path)) or 'none'}",
                f"give one of its arrays: {path}/NAME",
            )
        codecs = [] if array.shards else [type(codec).__name__ for codec in array.compressors]
        store.uses_blosc = "Blosc" in "".join(codecs[-1:])
        self._array = array
        check_shape(path, array.shape)
        # zarr converts elements of a different byte order.
        dtype = check_dtype(path, array.dtype.name if array.dtype.kind in "uf" else "", array.dtype)
        self.header = Header(array.shape, dtype, layout)
        self._check_no_pickle()
        self._chunk_shape: tuple[int, ...] = array.shards or array.chunks
        # For chunks larger than memory can be, zarr returns uninitialized memory.
        if min(self._chunk_shape) < 1 or math.prod(self._chunk_shape) > MAX_ELEMENTS:
            shown = str(self._chunk_shape)[:MAX_SHAPE_CHARACTERS]
            raise SourceError(f"{path} has invalid chunk shape {shown}", "replace the array")
        counts = (-(-a // b) for a, b in zip(array.shape, self._chunk_shape, strict=True))
        self._counts = tuple(counts)
        self.read_granularity = min(array.chunks[0], array.shape[0])

    def _check_no_pickle(self) -> None:
        """Reject codecs that unpickle: a pickle can run arbitrary code."""
        fields = self._array.metadata.to_dict()
        codecs = [fields.get(name) for name in ("codecs", "filters", "compressor")]
        if "pickle" in str(codecs).lower():
            raise SourceError(
                f"{self.path} uses a pickle codec, which is never loaded",
                "store it with another codec",
            )

    def fingerprint(self) -> str:
        digest = xxhash.xxh3_128()
        for key, (size, version) in sorted(_list_files(self.path).items()):
            digest.update(f"{size} {version} {key}\0".encode(errors="surrogateescape"))
        return digest.hexdigest()

    @property
    def transform(self) -> object:
        """The transform recorded in the array's attributes, as JSON types, or None."""
        value = self._array.attrs.get(ATTRIBUTE_KEY)
        return value.get("transform", value) if isinstance(value, dict) else value

    def keys(self, start: int, stop: int) -> Iterator[str]:
        """Yield the keys of the chunks, or shards, that contain a range of images."""
        for coordinates in self._chunk_coordinates(start, stop):
            yield self._array.metadata.encode_chunk_key(coordinates)

    def _chunk_coordinates(self, start: int, stop: int) -> Iterator[tuple[int, ...]]:
        first, last = start // self._chunk_shape[0], -(-stop // self._chunk_shape[0])
        return _product([range(first, last), *map(range, self._counts[1:])])

    def read_into(self, start: int, out: NDArray[Any]) -> None:
        rows = slice(start, start + len(out))
        first_key = next(self.keys(start, start + 1))
        try:
            self._select((rows,), first_key, out=NDBuffer.from_numpy_array(out))
        except DamagedChunkError:
            self._locate_damaged_chunk(rows.start, rows.stop)
            raise

    def _select(self, selection: tuple[slice, ...], key: str, **options: Any) -> None:
        """Read a selection; attribute an error to the chunk `key`, unless it names its chunk."""
        try:
            with objects.os_errors():
                self._array.get_basic_selection(selection, **options)
        except MissingChunkError as error:
            raise self._damaged_error(str(error), "it is missing or empty") from None
        except CHUNK_ERRORS as error:
            # A disk or a connection failed, rather than a codec, whose errors have no errno.
            is_access_error = isinstance(error, PermissionError | ConnectionError | TimeoutError)
            if isinstance(error, OSError) and (is_access_error or error.errno is not None):
                where = str(error.filename or self.path)
                raise StoppedError.from_os_error(
                    error, "read", where, selection[0].start
                ) from error
            raise self._damaged_error(key, _display(error)) from None

    def _locate_damaged_chunk(self, start: int, stop: int) -> None:
        """Read the chunks one by one, and raise an error that names the first damaged one."""
        shape = self._chunk_shape
        for coordinates in self._chunk_coordinates(start, stop):
            begins = [number * size for number, size in zip(coordinates, shape, strict=True)]
            ends = [begin + size for begin, size in zip(begins, shape, strict=True)]
            begins[0], ends[0] = max(begins[0], start), min(ends[0], stop)
            key = self._array.metadata.encode_chunk_key(coordinates)
            self._select(tuple(map(slice, begins, ends)), key)

    def _damaged_error(self, key: str, why: str) -> DamagedChunkError:
        return DamagedChunkError(
            f"{self.path}: chunk {key} is damaged: {why}",
            "replace the array, or recreate it from its source; then rerun with --restart",
        )


class ZarrSource(ZarrArray):
    """A complete Zarr array as a source.

    Raises
    ------
    SourceError
        If `ZarrArray` rejects it, or chunks are missing.
    """

    def __init__(self, path: Path, *, layout: Layout = "NHWC", use_index: bool = True) -> None:
        super().__init__(path, layout=layout)
        files = _list_files(path)
        self._check_no_missing_chunks(files)
        self.stored_bytes = sum(size for size, _ in files.values())
        self.records = read_index(path, self.header.images) if use_index else ()

    def _check_no_missing_chunks(self, files: Mapping[str, tuple[int, str]]) -> None:
        expected = math.prod(self._counts)
        missing = expected - sum(not key.endswith(METADATA_KEYS) for key in files)
        absent = (key for key in self.keys(0, self.header.images) if key not in files)
        first = list(itertools.islice(absent, MAX_NAMES_SHOWN))
        if missing < MAX_COUNTED_CHUNKS:  # count exactly: unrelated files may have been counted
            missing = len(first) + sum(1 for _ in absent)
        if missing:
            shown = ", ".join(first)
            raise SourceError(
                f"{self.path}: {missing} of {expected} chunks are missing, e.g. {shown}; zarr "
                "would read them as the fill value",
                "finish writing the array, or replace it; zarr omits chunks that equal the fill "
                "value, unless zarr.config.set({'array.write_empty_chunks': True})",
            )


def _product(ranges: Sequence[range]) -> Iterator[tuple[int, ...]]:
    """Yield the Cartesian product lazily; `itertools.product` first stores every range."""
    if not ranges:
        yield ()
        return
    for number in ranges[0]:
        for rest in _product(ranges[1:]):
            yield number, *rest


def _display(error: Exception) -> str:
    """Return an error's text, truncated and escaped: it may quote arbitrary bytes of a file."""
    return ascii(str(error)[:200])[1:-1]


def _check_metadata_regular(path: Path) -> None:
    """Check that metadata keys are regular files: opening a pipe could block forever."""
    if is_remote(path):
        return
    for name in METADATA_KEYS:
        file = path / name
        if os.path.exists(file) and not os.path.isfile(file):  # noqa: PTH110, PTH113  # may raise
            raise SourceError(f"{file} is not a regular file", "replace the array")


def _list_files(path: Path) -> dict[str, tuple[int, str]]:
    """Return the size and a version string of every file of an array, by key.

    Raises
    ------
    SourceError
        If they cannot be listed, or one is not a regular file.
    """
    try:
        return objects.list_objects(path) if is_remote(path) else _list_directory(path)
    except OSError as error:
        raise SourceError(
            f"{error.filename or path} cannot be read: {error.strerror or error}",
            "check its permissions",
        ) from None


def _list_directory(path: Path) -> dict[str, tuple[int, str]]:
    files: dict[str, tuple[int, str]] = {}
    folders = [""]
    while folders:
        folder = folders.pop()
        with os.scandir(path / folder) as entries:
            for entry in entries:
                key = folder + entry.name
                if entry.is_dir():
                    folders.append(f"{key}/")
                elif entry.is_file():
                    status = entry.stat()
                    files[key] = status.st_size, str(status.st_mtime_ns)
                else:
                    raise SourceError(f"{path / key} is not a regular file", "replace the array")
    return files


def _arrays(path: Path) -> list[str]:
    """Return the names of the first few arrays in a group."""
    arrays = sorted(key for key in _list_files(path) if key.endswith(ARRAY_METADATA_SUFFIXES))
    return [key.rpartition("/")[0] for key in arrays[:MAX_NAMES_SHOWN]]
