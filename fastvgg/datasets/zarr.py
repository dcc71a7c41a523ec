"""Read Zarr arrays with zarr-python: https://zarr-specs.readthedocs.io.

A missing chunk is an error, unless the caller asked for the fill value. Links to files and to
directories are followed: the keys of an array determine what is read, wherever it lies.
"""

from __future__ import annotations

import collections
import functools
import itertools
import lzma
import math
import os
import warnings
import zlib
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

import xxhash
import zarr
from zarr.buffer.cpu import NDBuffer
from zarr.storage import FsspecStore, LocalStore

from fastvgg.datasets.base import (
    MAX_ELEMENTS,
    MAX_SHAPE_CHARACTERS,
    ArraySource,
    Header,
    check_dtype,
    check_shape,
    max_encoded_bytes,
)
from fastvgg.datasets.files import open_regular, read_at
from fastvgg.datasets.index import read_index
from fastvgg.datasets.zarr_codecs import widest_item_bytes
from fastvgg.datasets.zarr_store import (
    METADATA_KEYS,
    MissingChunkError,
    ShardLayout,
    StrictStore,
)
from fastvgg.errors import SourceError, StoppedError, option
from fastvgg.storage import objects
from fastvgg.storage.location import Location, is_remote

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from numpy.typing import NDArray
    from zarr.abc.store import Store

    from fastvgg.datasets.base import MissingChunks
    from fastvgg.transform import Layout

ARRAY_METADATA_SUFFIXES: Final = ("/zarr.json", "/.zarray")
ATTRIBUTE_KEY: Final = "fastvgg"
"""The attribute that records the transform applied to the images."""
MAX_NAMES_SHOWN: Final = 10
MAX_COUNTED_CHUNKS: Final = 10**6  # metadata may claim any number
# Links can form cycles, and a tree of links to the same directories grows exponentially.
MAX_VISITS: Final = 1000
INDEX_COPIES: Final = 4  # of the index of a shard, while zarr-python decodes it
CHUNK_OVERHEAD_BYTES: Final = 2048  # of zarr-python, per copy of a chunk that is read
# What zarr-python and its codecs raise on damaged metadata and damaged chunks.
METADATA_ERRORS: Final = (
    *(ValueError, TypeError, KeyError, AttributeError),
    *(ArithmeticError, RecursionError, OSError),
)
CHUNK_ERRORS: Final = (
    *(ValueError, TypeError, RuntimeError, OverflowError, SystemError, MemoryError),
    *(OSError, EOFError, zlib.error, lzma.LZMAError),
)


class DamagedChunkError(StoppedError):
    """A chunk that is missing or cannot be decoded."""


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
                store = StrictStore(opened, path, metadata)
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
            names = ", ".join(_arrays(path, array)) or "none"
            raise SourceError(
                f"{path} is a Zarr group; its arrays are: {names}",
                f"give one of its arrays: {path}/NAME",
            )
        if not isinstance(array.metadata.attributes, dict):
            raise SourceError(
                f"{path}: its attributes are not a JSON object",
                "repair the attributes, or give an intact copy",
            )
        self._array = array
        check_shape(path, array.shape, str(array.dtype))
        # zarr converts elements of a different byte order.
        name = array.dtype.name if array.dtype.kind in "uf" else ""
        dtype = check_dtype(path, name, array.dtype, array.shape)
        self.header = Header(array.shape, dtype, layout)
        self._store = store
        self._chunk_shape: tuple[int, ...] = array.shards or array.chunks
        # For chunks larger than memory can be, zarr returns uninitialized memory.
        if min(self._chunk_shape) < 1 or math.prod(self._chunk_shape) > MAX_ELEMENTS:
            shown = str(self._chunk_shape)[:MAX_SHAPE_CHARACTERS]
            raise SourceError(f"{path} has invalid chunk shape {shown}", "replace the array")
        counts = (-(-a // b) for a, b in zip(array.shape, self._chunk_shape, strict=True))
        self._counts = tuple(counts)
        self.read_granularity = min(array.chunks[0], array.shape[0])
        self._measure_chunks()

    def _measure_chunks(self) -> None:
        """Determine what a chunk, or a shard, can have at most, and what decoding one takes.

        Raises
        ------
        SourceError
            If the index of shards cannot be read.
        """
        array: Any = self._array
        fields: dict[str, Any] = array.metadata.to_dict()
        item_bytes = max(array.dtype.itemsize, widest_item_bytes(fields))
        self._max_stored_bytes = max_encoded_bytes(math.prod(array.chunks) * item_bytes)
        if array.shards:
            (codec,) = fields["codecs"]
            config = codec["configuration"]
            try:
                shards = ShardLayout.of(config, array.shape, array.shards, item_bytes)
            except (ValueError, KeyError, TypeError) as error:
                raise SourceError(
                    f"{self.path}: {_display(error)}", "store it with zarr-python's own settings"
                ) from None
            self._store.shards, self._max_stored_bytes = shards, shards.max_bytes
            # zarr-python reads the whole index of a shard, however few inner chunks are needed.
            across = math.prod(self._counts[1:])
            self.index_bytes = INDEX_COPIES * shards.index_bytes * across
        inner = [-(-a // b) for a, b in zip(array.shape[1:], array.chunks[1:], strict=True)]
        padded = math.prod(a * b for a, b in zip(inner, array.chunks[1:], strict=True))
        unit_bytes = array.chunks[0] * padded * item_bytes
        unit_bytes += math.prod(inner) * CHUNK_OVERHEAD_BYTES
        self.decoded_image_bytes = -(-unit_bytes // self.read_granularity)
        self.decoded_image_bytes += self.index_bytes // self._chunk_shape[0]

    def fingerprint(self) -> str:
        digest = xxhash.xxh3_128()
        files, links = _list_files(self.path)
        for key, (size, version) in sorted(files.items()):
            digest.update(f"{size} {version} {key}\0".encode(errors="surrogateescape"))
        for key, text in sorted(links.items()):
            digest.update(f"{text}\0{key}\0".encode(errors="surrogateescape"))
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
            raise self._damaged_error(*error.args) from None
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
            "replace the array, or recreate it from its source, and start over",
        )


class ZarrSource(ZarrArray):
    """A complete Zarr array as a source.

    With `missing_chunks` "fill", chunks that are not stored are read as the fill value.

    Raises
    ------
    SourceError
        If `ZarrArray` rejects it, chunks are missing, or one is longer than it can be.
    """

    def __init__(
        self,
        path: Path,
        *,
        layout: Layout = "NHWC",
        use_index: bool = True,
        missing_chunks: MissingChunks = "error",
    ) -> None:
        super().__init__(path, layout=layout)
        files, links = _list_files(path)
        # Path.resolve raises where links form a loop. Of links to files there may be millions.
        folders = (key for key in links if key.endswith("/"))
        self.linked_paths = [Path(os.path.realpath(path / key)) for key in folders]
        self._check_lengths(files)
        self._check_missing_chunks(files, missing_chunks)
        self.stored_bytes = sum(size for size, _ in files.values())
        self.records = read_index(path, self.header.images) if use_index else ()

    def _check_lengths(self, files: Mapping[str, tuple[int, str]]) -> None:
        """Check that no chunk is longer than what it decodes to allows."""
        for key, (nbytes, _) in files.items():
            if nbytes > self._max_stored_bytes and not key.endswith(METADATA_KEYS):
                raise SourceError(
                    f"{self.path}: {key} has {nbytes} bytes; a chunk of {self._chunk_shape} has at "
                    f"most {self._max_stored_bytes}",
                    "move files that are no chunks elsewhere, or replace the array",
                )

    def _check_missing_chunks(
        self, files: Mapping[str, tuple[int, str]], missing_chunks: MissingChunks
    ) -> None:
        expected = math.prod(self._counts)
        missing = expected - sum(not key.endswith(METADATA_KEYS) for key in files)
        absent = (key for key in self.keys(0, self.header.images) if key not in files)
        first = list(itertools.islice(absent, MAX_NAMES_SHOWN))
        if missing < MAX_COUNTED_CHUNKS:  # count exactly: unrelated files may have been counted
            missing = len(first) + sum(1 for _ in absent)
        found = f"{missing} of {expected} chunks are missing, e.g. {', '.join(first)}"
        if not missing:
            if self._store.shards is not None and is_remote(self.path):
                # To find missing inner chunks would take a request per shard.
                self._store.fills_missing = missing_chunks == "fill"
                self.missing_chunks = missing_chunks
                return
            found = self._find_missing_inner_chunks(files)
            if not found:
                return
        if missing_chunks == "error":
            raise SourceError(
                f"{self.path}: {found}; zarr reads them as the fill value {self._fill_value}",
                "finish writing the array, or replace it; or, if zarr did not store them because "
                f"all of their pixels are {self._fill_value}, give "
                f"{option('missing_chunks', 'fill')}",
            )
        if self._array.fill_value is None:
            raise SourceError(
                f"{self.path}: {found}; their value is undefined: the fill value is null",
                'put the value of their pixels into .zarray, for example "fill_value": 0',
            )
        self._store.fills_missing, self.missing_chunks = True, missing_chunks
        self.notes = [f"{found}: their pixels are the fill value {self._fill_value}"]

    @property
    def _fill_value(self) -> str:
        return str(self._array.fill_value)[:MAX_SHAPE_CHARACTERS]

    def _find_missing_inner_chunks(self, files: Mapping[str, tuple[int, str]]) -> str:
        """Describe the first shard on disk that lacks inner chunks; empty if there is none."""
        shards = self._store.shards
        if shards is None:
            return ""
        for key in self.keys(0, self.header.images):
            if key not in files:
                continue
            try:
                with open_regular(self.path / key) as file:
                    begin = 0 if shards.is_index_at_start else files[key][0] - shards.index_bytes
                    read = functools.partial(_read_part, file.fileno(), max(0, begin))
                    missing = shards.count_missing_in(key, read)
            except OSError:  # reading the chunk will report it
                continue
            if missing:
                return f"{missing} inner chunks of the shard {key} are missing"
        return ""


def _read_part(descriptor: int, begin: int, nbytes: int, offset: int) -> bytes:
    return read_at(descriptor, nbytes, begin + offset)


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


def _list_files(path: Path) -> tuple[dict[str, tuple[int, str]], dict[str, str]]:
    """Return the size and a version string of every file of an array, and the text of every link.

    Both by key; that of a link to a directory ends in a slash.

    Raises
    ------
    SourceError
        If they cannot be listed, or one is not a regular file.
    """
    try:
        return (objects.list_objects(path), {}) if is_remote(path) else _list_directory(path)
    except OSError as error:
        raise SourceError(
            f"{error.filename or path} cannot be read: {error.strerror or error}",
            "check its permissions",
        ) from None


def _list_directory(path: Path) -> tuple[dict[str, tuple[int, str]], dict[str, str]]:
    files: dict[str, tuple[int, str]] = {}
    links: dict[str, str] = {}
    folders = [""]
    visits: collections.Counter[tuple[int, int]] = collections.Counter()
    while folders:
        folder = folders.pop()
        status = os.stat(path / folder)  # noqa: PTH116
        visits[status.st_dev, status.st_ino] += 1
        if visits[status.st_dev, status.st_ino] > MAX_VISITS:
            raise SourceError(
                f"{path / folder} is reached by more than {MAX_VISITS} links",
                "move the links out of the array",
            )
        with os.scandir(path / folder) as entries:
            for entry in entries:
                key = folder + entry.name
                is_folder = entry.is_dir()
                if entry.is_symlink():
                    links[f"{key}/" if is_folder else key] = os.readlink(entry)  # noqa: PTH115
                if is_folder:
                    folders.append(f"{key}/")
                elif entry.is_file():
                    status = entry.stat()
                    files[key] = status.st_size, str(status.st_mtime_ns)
                else:
                    raise SourceError(f"{path / key} is not a regular file", "replace the array")
    return files, links


def _arrays(path: Path, group: zarr.Group) -> list[str]:
    """Return the names of the first few arrays in a group."""
    keys = sorted(key for key in _list_files(path)[0] if key.endswith(ARRAY_METADATA_SUFFIXES))
    names = (key.rpartition("/")[0] for key in keys)
    arrays = (name for name in names if not _is_group(group, name))
    return [*itertools.islice(arrays, MAX_NAMES_SHOWN)]


def _is_group(group: zarr.Group, name: str) -> bool:
    try:
        return isinstance(group.get(name), zarr.Group)
    except (*METADATA_ERRORS, SourceError):  # opening it says what is wrong
        return False
