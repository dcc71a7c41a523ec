"""Zarr arrays that are read, by zarr-python: https://zarr-specs.readthedocs.io.

Zarr reads a chunk that is missing as if it had been written, full of the fill value. Here that is
an error.
"""

from __future__ import annotations

import itertools
import lzma
import math
import os
import warnings
import zlib
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, TypeGuard

import xxhash
import zarr
from zarr.abc.store import Store
from zarr.buffer import default_buffer_prototype
from zarr.buffer.cpu import NDBuffer
from zarr.storage import FsspecStore, LocalStore, WrapperStore

from fastvgg.datasets.base import (
    MAX_ELEMENTS,
    SHOWN_CHARACTERS,
    Header,
    check_array,
    read_copy,
)
from fastvgg.datasets.index import read_index
from fastvgg.errors import SourceError, StoppedError
from fastvgg.storage import objects
from fastvgg.storage.location import is_remote

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray
    from zarr.abc.store import ByteRequest
    from zarr.core.buffer import Buffer, BufferPrototype

    from fastvgg.datasets.base import Chunk
    from fastvgg.transform import Layout

__all__ = ["ATTRIBUTE_KEY", "DamagedChunkError", "ZarrArray", "ZarrSource"]

ARRAY_METADATA: Final = ("/zarr.json", "/.zarray")
METADATA: Final = ("zarr.json", ".zarray", ".zgroup", ".zattrs", ".zmetadata")
PLAIN: Final = ("uint8", "float16", "float32", "float64")
ATTRIBUTE_KEY: Final = "fastvgg"
"""The attribute that says what was done to the images."""
NAMES_SHOWN: Final = 10
COUNTED: Final = 10**6  # chunks, as metadata may claim any number
# What zarr-python, and what it calls, raise on metadata and on chunks that are damaged.
METADATA_ERRORS: Final = (
    *(ValueError, TypeError, KeyError, AttributeError),
    *(ArithmeticError, RecursionError, OSError),
)
CHUNK_ERRORS: Final = (
    *(ValueError, TypeError, RuntimeError, OverflowError, SystemError, MemoryError),
    *(OSError, EOFError, zlib.error, lzma.LZMAError),
)


class MissingChunkError(Exception):
    """A chunk that is not there, or empty, by its key."""


class DamagedChunkError(StoppedError):
    """A chunk that is missing, or cannot be decoded."""


class _StrictStore(WrapperStore[Store]):
    """A store in which no chunk may be missing, and whose metadata may not be written yet."""

    def __init__(self, store: Store, metadata: Mapping[str, bytes]) -> None:
        super().__init__(store)
        self._metadata = metadata
        # Whether a chunk says how long it is. Blosc believes that, and reads on beyond its end.
        self.holds_blosc = False

    def _with_store(self, store: Store) -> _StrictStore:
        return _StrictStore(store, self._metadata)

    async def get(
        self,
        key: str,
        prototype: BufferPrototype | None = None,
        byte_range: ByteRequest | None = None,
    ) -> Buffer | None:
        wanted = prototype or default_buffer_prototype()
        if key in self._metadata:
            return wanted.buffer.from_bytes(self._metadata[key])
        found: Buffer | None = await self._store.get(key, wanted, byte_range)
        # An empty shard, too, is one that was never written to zarr.
        if not found and not key.endswith(METADATA):
            raise MissingChunkError(key)
        if found and self.holds_blosc and byte_range is None and not key.endswith(METADATA):
            said = int.from_bytes(found[12:16].to_bytes(), "little")
            if said != len(found):
                raise ValueError(f"it has {len(found)} bytes, and was written with {said}")
        return found


class ZarrArray:
    """An array in a directory, whose chunks are read.

    Parameters
    ----------
    path
        The directory, or the name of it in a store.
    layout
        Which axis holds the channels.
    metadata
        What of it is not written yet.

    Raises
    ------
    SourceError
        If its metadata are not those of an array of images, or cannot be read.
    """

    def __init__(
        self,
        path: Path,
        *,
        layout: Layout = "NHWC",
        metadata: Mapping[str, bytes] = MappingProxyType({}),
    ) -> None:
        self.path = path
        _check_regular(path)
        try:
            with objects.os_errors(), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what is not right, and is read all the same
                store = _StrictStore(_open(path), metadata)
                found = zarr.open(store, mode="r")
        except FileNotFoundError:
            raise SourceError(
                f"{path} holds no Zarr array: there is no zarr.json, and no .zarray",
                "check the name, and that the array is complete",
            ) from None
        except METADATA_ERRORS as error:
            raise SourceError(
                f"{path} cannot be opened as Zarr: {type(error).__name__}: {_shown(error)}",
                "check the connection, or get the array again",
            ) from None
        if isinstance(found, zarr.Group):
            raise SourceError(
                f"{path} is a group of arrays; there are: {', '.join(_arrays(path)) or 'none'}",
                f"give one of them: {path}/NAME",
            )
        codecs = [] if found.shards else [type(codec).__name__ for codec in found.compressors]
        store.holds_blosc = "Blosc" in "".join(codecs[-1:])
        self._array = found
        check_array(path, found.shape)
        self.header = Header(found.shape, self._type_name(), layout)
        self._check_safe()
        self._stored: tuple[int, ...] = found.shards or found.chunks
        # Of chunks larger than memory can be, zarr reads what happens to be in it.
        if min(self._stored) < 1 or math.prod(self._stored) > MAX_ELEMENTS:
            shown = str(self._stored)[:SHOWN_CHARACTERS]
            raise SourceError(f"{path} has chunks of {shown}", "get the array again")
        counts = (-(-a // b) for a, b in zip(found.shape, self._stored, strict=True))
        self._counts = tuple(counts)
        self.read_granularity = min(found.chunks[0], found.shape[0])

    def _type_name(self) -> str:
        """Return the storage type; numbers of another byte order are converted when read."""
        found = self._array.dtype
        name = found.name if found.kind in "uf" else ""
        if name not in PLAIN:
            raise SourceError(
                f"{self.path} holds numbers of type {found}",
                f"store it as one of {', '.join(PLAIN)}",
            )
        return str(name)

    def _check_safe(self) -> None:
        """Refuse to unpickle what comes from a file: that would run any code in it."""
        fields = self._array.metadata.to_dict()
        codecs = [fields.get(name) for name in ("codecs", "filters", "compressor")]
        if "pickle" in str(codecs).lower():
            raise SourceError(
                f"{self.path} is stored by way of Python's pickle, which is never loaded",
                "store it with another codec",
            )

    @property
    def chunks(self) -> int:
        """How many chunks, or shards, there are."""
        return math.prod(self._counts)

    @property
    def transform(self) -> object:
        """What the array's attributes say was done to the images; None where they say nothing."""
        said = self._array.attrs.get(ATTRIBUTE_KEY)
        return said.get("transform", said) if isinstance(said, dict) else said

    def keys(self, start: int, stop: int) -> Iterator[str]:
        """Return the names of the chunks, or shards, that hold some images."""
        for numbers in self._numbers(start, stop):
            yield self._array.metadata.encode_chunk_key(numbers)

    def _numbers(self, start: int, stop: int) -> Iterator[tuple[int, ...]]:
        first, last = start // self._stored[0], -(-stop // self._stored[0])
        return _combined([range(first, last), *map(range, self._counts[1:])])

    def read_into(self, start: int, out: NDArray[Any]) -> None:
        """Read as many images as `out` has, from row `start` on; many threads may.

        Raises
        ------
        StoppedError
            Naming the chunk that is missing or damaged.
        """
        try:
            self._read_into(start, out)
        except MissingChunkError as error:
            raise self._damaged(str(error), "it is missing, or empty") from None
        except CHUNK_ERRORS as error:
            if _is_of_the_system(error):
                where = str(error.filename or self.path)
                raise StoppedError.from_os_error(error, "read", where, start) from error
            self._locate_damaged_chunk(start, start + len(out))
            raise self._damaged(next(self.keys(start, start + 1)), _shown(error)) from None

    def _read_into(self, start: int, out: NDArray[Any]) -> None:
        rows = slice(start, start + len(out))
        with objects.os_errors():
            self._array.get_basic_selection((rows,), out=NDBuffer.from_numpy_array(out))

    def _locate_damaged_chunk(self, start: int, stop: int) -> None:
        """Read the chunks one after the other, and raise an error that names the damaged one."""
        for numbers in self._numbers(start, stop):
            begins = [number * size for number, size in zip(numbers, self._stored, strict=True)]
            ends = [begin + size for begin, size in zip(begins, self._stored, strict=True)]
            begins[0], ends[0] = max(begins[0], start), min(ends[0], stop)
            key = self._array.metadata.encode_chunk_key(numbers)
            try:
                with objects.os_errors():
                    self._array.get_basic_selection(tuple(map(slice, begins, ends)))
            except MissingChunkError as error:
                raise self._damaged(str(error), "it is missing, or empty") from None
            except CHUNK_ERRORS as error:
                raise self._damaged(key, _shown(error)) from None

    def _damaged(self, key: str, why: str) -> DamagedChunkError:
        return DamagedChunkError(
            f"{self.path}: chunk {key} is damaged: {why}",
            "get the array again, or make it again from its source; then run again with --restart",
        )


class ZarrSource:
    """A Zarr array, all of whose chunks are there.

    Parameters
    ----------
    path
        The directory.
    layout
        Which axis holds the channels.

    Raises
    ------
    SourceError
        If it is no `ZarrArray`, or chunks of it are missing.
    """

    kind = "zarr"

    def __init__(self, path: Path, *, layout: Layout = "NHWC") -> None:
        self.path = path
        self.settings: dict[str, Any] = {}
        self.notes: list[str] = []
        self._array = ZarrArray(path, layout=layout)
        self.header = self._array.header
        self.read_granularity = self._array.read_granularity
        files = _files(path)
        self._check_no_missing_chunks(files)
        self.stored_bytes = sum(size for size, _ in files.values())
        self.records = read_index(path, self.header.images)

    def _check_no_missing_chunks(self, files: Mapping[str, tuple[int, str]]) -> None:
        expected = self._array.chunks
        missing = expected - sum(not key.endswith(METADATA) for key in files)
        keys = self._array.keys(0, self.header.images)
        absent = (key for key in keys if key not in files)
        first = list(itertools.islice(absent, NAMES_SHOWN))
        if missing < COUNTED:  # other files may be among those that are there
            missing = len(first) + sum(1 for _ in absent)
        if missing:
            shown = ", ".join(first)
            raise SourceError(
                f"{self.path}: {missing} of {expected} chunks are missing, as {shown}: they would "
                "be read as if they had been written",
                "finish writing it, or get it again; zarr leaves chunks away that are full of the "
                "fill value, unless zarr.config.set({'array.write_empty_chunks': True})",
            )

    def fingerprint(self) -> str:
        """Return a hash of the names, sizes and times of change of all files, as they are now."""
        digest = xxhash.xxh3_128()
        for key, (size, changed) in sorted(_files(self.path).items()):
            digest.update(f"{size} {changed} {key}\0".encode(errors="surrogateescape"))
        return digest.hexdigest()

    def read(self, start: int, stop: int) -> Chunk:
        """Return images.

        Raises
        ------
        StoppedError
            Naming the chunk that is missing or damaged.
        """
        return read_copy(self, start, stop)

    def read_into(self, start: int, out: NDArray[Any]) -> None:
        """Read as many images as `out` has, from row `start` on; many threads may.

        Raises
        ------
        StoppedError
            Naming the chunk that is missing or damaged.
        """
        self._array.read_into(start, out)

    def close(self) -> None:
        """Nothing stays open."""


def _open(path: Path) -> Store:
    """Return where zarr-python reads, and does not write."""
    if is_remote(path):
        return FsspecStore.from_url(str(path), read_only=True)
    return LocalStore(path, read_only=True)


def _combined(ranges: Sequence[range]) -> Iterator[tuple[int, ...]]:
    """Return a number of each range in all combinations, of which there may be any number."""
    if not ranges:
        yield ()
        return
    for number in ranges[0]:
        for others in _combined(ranges[1:]):
            yield number, *others


def _is_of_the_system(error: BaseException) -> TypeGuard[OSError]:
    """Whether an error is of a disk or a connection, and not of a codec: those have no number."""
    lost = isinstance(error, PermissionError | ConnectionError | TimeoutError)
    return lost or (isinstance(error, OSError) and error.errno is not None)


def _shown(error: Exception) -> str:
    """Return what an error says, as a terminal shows it: it may quote anything from a file."""
    return ascii(str(error)[:200])[1:-1]


def _check_regular(path: Path) -> None:
    """Refuse metadata that are in no file: a pipe would be waited for, for ever."""
    if is_remote(path):
        return
    for name in METADATA:
        file = path / name
        if os.path.exists(file) and not os.path.isfile(file):  # noqa: PTH110, PTH113  # may raise
            raise SourceError(f"{file} is no file", "get the array again")


def _files(path: Path) -> dict[str, tuple[int, str]]:
    """Return the size of every file of an array, and what tells when it changes, by its key.

    Raises
    ------
    SourceError
        If they cannot be listed, or one is no file.
    """
    try:
        return objects.listing(path) if is_remote(path) else _listed(path)
    except OSError as error:
        raise SourceError(
            f"{error.filename or path} cannot be read: {error.strerror or error}",
            "check its permissions",
        ) from None


def _listed(path: Path) -> dict[str, tuple[int, str]]:
    found: dict[str, tuple[int, str]] = {}
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
                    found[key] = status.st_size, str(status.st_mtime_ns)
                else:
                    raise SourceError(f"{path / key} is no file", "get the array again")
    return found


def _arrays(path: Path) -> list[str]:
    """Return the names of the first arrays in a group."""
    arrays = sorted(key for key in _files(path) if key.endswith(ARRAY_METADATA))
    return [key.rpartition("/")[0] for key in arrays[:NAMES_SHOWN]]
