"""`.npy` arrays, and directories of `part-*.npy`, which are concatenated in the order of names.

The header is validated before anything else is done with the file. `numpy.load` is too permissive:
it unpickles, it allocates whatever a header claims, and with ``mmap_mode="r+"`` it silently grows a
truncated file to the size that its header claims.

Format: https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html
"""

from __future__ import annotations

import ast
import bisect
import contextlib
import functools
import io
import itertools
import os
import re
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final, NamedTuple

import numpy as np
import xxhash

from fastvgg.datasets.base import (
    NUMPY_DTYPES,
    ArraySource,
    Header,
    changed_during_run_error,
    check_dtype,
    check_shape,
)
from fastvgg.datasets.contiguous import ContiguousSource, ContiguousTarget
from fastvgg.datasets.image_names import is_image_name, kind_skipped_by_rule
from fastvgg.datasets.index import PartRecords, index_path, read_index
from fastvgg.datasets.signatures import NPY_SIGNATURE
from fastvgg.errors import SourceError, option, remedy_for
from fastvgg.storage.location import Location
from fastvgg.transform import storage_dtype

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from fastvgg.datasets.base import ImageRecord
    from fastvgg.storage.local import Storage
    from fastvgg.transform import Layout

MAX_HEADER_BYTES: Final = 10_000  # NumPy's own default limit
MAX_AXIS_LENGTH: Final = 2**48
MAX_OPEN_PARTS: Final = 64  # a process may commonly have 1,024 open files
BFLOAT16_DESCR: Final = "<V2"
"""What NumPy writes for ml_dtypes.bfloat16; needs the manifest to confirm."""
# A type's code or name, perhaps after a byte order. Excluded are the structures that NumPy would
# parse, and the code "a", of which it warns.
DESCR_PATTERN: Final = re.compile(r"[<>=|]?(?!a)[A-Za-z][A-Za-z]{0,15}[0-9]{0,3}")
# What Python raises on text that is not a literal, or is nested too deeply or too large.
LITERAL_ERRORS: Final = (
    *(SyntaxError, ValueError, TypeError),
    *(MemoryError, RecursionError, OverflowError),
)
# What Python parses with a warning: an invalid escape, and "1or 2". Suppressing the warning instead
# is not thread-safe: another thread may save and restore the filters in between.
DUBIOUS_SYNTAX: Final = re.compile(rb"\\|\b[0-9][0-9A-Za-z_]*?\.?(?:and|else|for|if|in|is|not|or)")


PYTHON_2_INTEGER: Final = re.compile(rb"(?<=[(, ])([0-9]+)L(?=[,) ])")  # as in (8L, 16L)


class ArrayHeader(NamedTuple):
    """The header of a .npy file."""

    dtype: str
    """A storage dtype. "bfloat16" stands for two bytes of which the header says nothing more."""
    shape: tuple[int, ...]
    offset: int
    """Offset of the data in the file."""


def read_header(file: BinaryIO, path: Path) -> ArrayHeader:
    """Read and validate the header of an open .npy file.

    Raises
    ------
    SourceError
        If the file is not a .npy file of C-ordered, little-endian numbers of a supported dtype.
    """
    start = file.read(12)
    if not start.startswith(NPY_SIGNATURE) or len(start) < 12:
        problem = "is empty" if not start else f"begins with {start[:6]!r}"
        raise SourceError(f"{path} {problem}: it is not a .npy file", "check that it is complete")
    version = (start[6], start[7])
    if version == (1, 0):
        length, offset = struct.unpack("<H", start[8:10])[0], 10
    elif version in ((2, 0), (3, 0)):
        length, offset = struct.unpack("<I", start[8:12])[0], 12
    else:
        raise SourceError(
            f"{path} has unsupported .npy format version {version[0]}.{version[1]}",
            "rewrite the file with numpy.save; versions 1.0, 2.0 and 3.0 are supported",
        )
    if length > MAX_HEADER_BYTES:
        raise SourceError(
            f"{path} claims a header of {length} bytes; the limit is {MAX_HEADER_BYTES}",
            "the file is damaged or malicious: replace it, or rewrite it with numpy.save",
        )
    text = (start[offset:] + file.read(max(0, length - len(start[offset:]))))[:length]
    if len(text) != length:
        raise SourceError(
            f"{path} ends after {offset + len(text)} bytes, inside its header of {length} bytes",
            "the file is truncated: replace it with a complete copy",
        )
    if version != (3, 0):
        text = PYTHON_2_INTEGER.sub(rb"\1", text)  # as NumPy does
    dtype, fortran, shape = _parse(text, path)
    if fortran:
        raise SourceError(
            f"{path} is in Fortran order, in which no image is contiguous",
            "rewrite it in C order: numpy.save(new, numpy.ascontiguousarray(numpy.load(old)))",
        )
    return ArrayHeader(dtype, shape, offset + length)


def _parse(text: bytes, path: Path) -> tuple[str, bool, tuple[int, ...]]:
    """Return dtype, fortran_order and shape. Only Python literals are evaluated."""
    try:
        if DUBIOUS_SYNTAX.search(text):
            raise ValueError("Python would warn about it")
        fields = ast.literal_eval(text.decode("utf-8"))
    except LITERAL_ERRORS as error:
        raise _damaged_error(
            path, f"a header that cannot be read: {type(error).__name__}"
        ) from None
    if not isinstance(fields, dict) or set(fields) != {"descr", "fortran_order", "shape"}:
        raise _damaged_error(
            path, "a header whose fields are not exactly descr, fortran_order and shape"
        )
    descr, fortran, shape = fields["descr"], fields["fortran_order"], fields["shape"]
    if type(fortran) is not bool or not isinstance(shape, tuple):
        raise _damaged_error(path, f"a header with fields of the wrong types: {_display(fields)}")
    if any(type(axis) is not int or not 0 <= axis <= MAX_AXIS_LENGTH for axis in shape):
        raise _damaged_error(
            path, f"shape {_display(shape)}; an axis must be an integer from 0 to {MAX_AXIS_LENGTH}"
        )
    return _parse_descr(descr, path, shape), fortran, shape


def _damaged_error(path: Path, problem: str) -> SourceError:
    return SourceError(
        f"{path} has {problem}", "the file is damaged: replace it with an intact copy"
    )


def _parse_descr(descr: object, path: Path, shape: tuple[int, ...]) -> str:
    """Return the storage dtype that a header describes, in any spelling that NumPy reads."""
    dtype = _dtype_of(descr)
    if dtype is not None and dtype.hasobject:
        raise SourceError(
            f"{path} contains pickled Python objects, which are never loaded",
            f"store it as one of {', '.join(NUMPY_DTYPES)}; if all images have one shape, save "
            "numpy.stack(list(array))",
            shape=list(shape),
            dtype="object",
        )
    if dtype == np.dtype(BFLOAT16_DESCR) and not str(descr).startswith(">"):
        return "bfloat16"
    if dtype is not None and not dtype.isnative and dtype.newbyteorder().name in NUMPY_DTYPES:
        raise SourceError(
            f"{path} is big-endian ({_display(descr)})",
            "rewrite it as little-endian: a = numpy.load(old, mmap_mode='r'); "
            "numpy.save(new, a.astype(a.dtype.newbyteorder('<')))",
        )
    return check_dtype(path, "" if dtype is None else dtype.name, _display(descr), shape)


def _dtype_of(descr: object) -> np.dtype[Any] | None:
    """Return the dtype that NumPy reads for the name or the code of a type; None for all else."""
    if not (isinstance(descr, str) and DESCR_PATTERN.fullmatch(descr)):
        return None
    try:
        return np.dtype(descr)
    except TypeError:
        return None


def _display(value: object) -> str:
    """Return a header value, truncated for a message."""
    try:
        return ascii(value)[:100]
    except ValueError:  # an integer of more digits than Python converts
        return "with an integer too long to print"


class NpySource(ContiguousSource):
    """A .npy array.

    Parameters
    ----------
    path
        The file.
    layout
        The layout of the array.
    dtype_hint
        "bfloat16" if a manifest declares that the two-byte elements are bfloat16.
    use_index
        Whether to read the index next to the file.

    Raises
    ------
    SourceError
        If `read_header` rejects the file, the array is empty or not of rank 4, or the file is
        longer or shorter than its header implies.
    """

    kind = "npy"

    def __init__(
        self,
        path: Path,
        *,
        layout: Layout = "NHWC",
        dtype_hint: str | None = None,
        use_index: bool = True,
    ) -> None:
        super().__init__(Location(path))
        try:
            self._validate(read_header(self._file, path), layout, dtype_hint)
            self.records = read_index(path, self.header.images) if use_index else ()
        except SourceError:
            self.close()
            raise

    def _validate(self, npy: ArrayHeader, layout: Layout, dtype_hint: str | None) -> None:
        path = self.path
        dtype = npy.dtype
        if dtype == "bfloat16" and dtype_hint != "bfloat16":
            raise SourceError(
                f"{path} has two-byte elements whose dtype its header does not name",
                "if they are bfloat16, put the manifest (.fastvgg.json) that was written with the "
                "file next to it",
            )
        check_shape(path, npy.shape, npy.dtype)
        self.header = Header(npy.shape, dtype, layout)
        self._offset = npy.offset
        self.stored_bytes = self._file_bytes()
        expected = npy.offset + self.header.nbytes
        if self.stored_bytes != expected:
            state = "truncated" if self.stored_bytes < expected else "followed by extra bytes"
            raise SourceError(
                f"{path} is {state}: expected {expected} bytes for shape {npy.shape} of {dtype} "
                f"and the header, but the file has {self.stored_bytes}",
                "replace the file with an intact copy, or rewrite it with numpy.save",
            )


class NpyTarget(ContiguousTarget):
    """A .npy array being written."""

    def __init__(self, path: Path, header: Header, storage: Storage) -> None:
        dtype = storage_dtype(header.dtype)
        descr = BFLOAT16_DESCR if header.dtype == "bfloat16" else dtype.newbyteorder("<").str
        preamble = io.BytesIO()
        np.lib.format.write_array_header_1_0(  # pads it to a multiple of 64 bytes
            preamble, {"descr": descr, "fortran_order": False, "shape": header.shape}
        )
        super().__init__(path, header, storage, preamble.getvalue())

    def open_published(self) -> NpySource:
        return NpySource(self.path, layout=self.header.layout, dtype_hint=self.header.dtype)


def part_names(directory: Path) -> list[str]:
    """Return the names of the parts in a directory, sorted bytewise; empty if there are none.

    Raises
    ------
    SourceError
        If the directory cannot be listed, or also contains images.
    """
    return _list_parts(directory)[0]


def _list_parts(directory: Path) -> tuple[list[str], int]:
    """Return the names of the parts, and how many other files there are, without sidecars."""
    try:
        names = os.listdir(os.fsencode(directory))  # noqa: PTH208  # sorted as bytes, as images are
    except OSError as error:
        problem = f"{directory} cannot be listed: {error.strerror}"
        raise SourceError(problem, remedy_for(error)) from None
    parts = sorted(name for name in names if name.startswith(b"part-") and name.endswith(b".npy"))
    if not parts:
        return [], len(names)
    others = [name for name in names if not (name.startswith(b"part-") and b".npy" in name)]
    image = next((name for name in others if _is_image(name)), None)
    if image is not None:
        raise SourceError(
            f"{directory} contains both parts of an array, e.g. {os.fsdecode(parts[0])!r}, and "
            f"images, e.g. {os.fsdecode(image)!r}",
            "move the images or the parts to a separate directory",
        )
    return [os.fsdecode(name) for name in parts], len(others)


def _is_image(name: bytes) -> bool:
    return is_image_name(name) and kind_skipped_by_rule(name) is None


class PartitionedNpySource(ArraySource):
    """An array that is partitioned by rows into the part-*.npy of a directory.

    `follow_links` says whether a part may be a link; the other parameters are those of `NpySource`.
    The records are those of all parts, if each part has an index.

    Raises
    ------
    SourceError
        If `NpySource` rejects a part, its image shape or dtype differs from that of the first, it
        is a link that may not be followed, or an index lists failed images and others are missing.
    """

    kind = "parts"
    has_random_access = True

    def __init__(
        self,
        path: Path,
        *,
        layout: Layout = "NHWC",
        dtype_hint: str | None = None,
        use_index: bool = True,
        follow_links: bool = True,
    ) -> None:
        super().__init__(Location(path))
        names, others = _list_parts(path)
        self.notes = [f"{len(names)} parts"]
        if others:
            self.notes.append(f"skipped files and folders not named part-*.npy: {others}")
        self._names = names
        self.follow_links = follow_links
        # Path.resolve raises where links form a loop.
        self.linked_paths = [Path(os.path.realpath(path / name)) for name in self._links()]
        self._layout = layout
        self._dtype_hint = dtype_hint
        self._part = functools.lru_cache(MAX_OPEN_PARTS)(self._reopen)
        self.stored_bytes = 0
        headers: list[Header] = []
        records: dict[str, Sequence[ImageRecord]] = {}
        for name in names:
            with contextlib.closing(self._open_part(name, use_index=use_index)) as part:
                headers.append(part.header)
                records[name] = part.records
                self.stored_bytes += part.stored_bytes
            header, first = headers[-1], headers[0]
            if (header.shape[1:], header.dtype) != (first.shape[1:], first.dtype):
                raise SourceError(
                    f"{path / name} contains images of {header.shape[1:]} {header.dtype}, but "
                    f"{names[0]} of {first.shape[1:]} {first.dtype}",
                    "all parts must have the same image shape and dtype; move the others elsewhere",
                )
        self._starts = [0, *itertools.accumulate(header.images for header in headers)]
        self.header = Header((self._starts[-1], *first.shape[1:]), first.dtype, layout)
        self.records = self._join(records)

    def _join(self, records: dict[str, Sequence[ImageRecord]]) -> Sequence[ImageRecord]:
        """Return the records of all parts; none if a part has no index."""
        without = next((name for name, each in records.items() if not each), None)
        if without is None:
            return PartRecords({name.removesuffix(".npy"): each for name, each in records.items()})
        for name, each in records.items():
            failed = sum(record.failed for record in each)
            if failed:
                raise SourceError(
                    f"{index_path(self.path / name)} lists {failed} failed images, whose rows are "
                    f"zeros, but {without} has no index: there is none for all parts",
                    f"restore the index of {without}, or move the part to a separate directory",
                )
        return ()

    def fingerprint(self) -> str:
        digest = xxhash.xxh3_128()
        for name in part_names(self.path):
            with contextlib.closing(self._open_part(name)) as part:
                digest.update(f"{part.fingerprint()} {name}\0".encode(errors="surrogateescape"))
        for name in self._links():
            text = f"{name}\0{(self.path / name).readlink()}\0"
            digest.update(text.encode(errors="surrogateescape"))
        return digest.hexdigest()

    def _links(self) -> list[str]:
        """Return the names of parts that are links; raise SourceError if they are not followed."""
        links = [name for name in self._names if (self.path / name).is_symlink()]
        if links and not self.follow_links:
            raise SourceError(
                f"{self.path / links[0]} is a link, and an array cannot omit the rows of a part",
                f"follow links: omit {option('follow_links', value=False)}",
            )
        return links

    def read_into(self, start: int, out: NDArray[Any]) -> None:
        number, row, stop = self._find_part(start), start, start + len(out)
        while row < stop:
            first, end = self._starts[number], min(stop, self._starts[number + 1])
            self._part(number).read_into(row - first, out[row - start : end - start])
            row, number = end, number + 1

    def close(self) -> None:
        self._part.cache_clear()

    def _find_part(self, row: int) -> int:
        """Return the number of the part that contains a row."""
        return bisect.bisect_right(self._starts, row) - 1

    def _reopen(self, number: int) -> NpySource:
        """Open a part, after checking that its header is unchanged.

        Another thread may read a part that leaves the cache; it closes with its last reference.
        """
        name, images = self._names[number], self._starts[number + 1] - self._starts[number]
        path = str(self.path / name)
        try:
            part = self._open_part(name)
        except SourceError as error:
            raise changed_during_run_error(path) from error
        if part.header != Header((images, *self.header.shape[1:]), self.header.dtype, self._layout):
            part.close()
            raise changed_during_run_error(path)
        part.close_with_last_reference()
        return part

    def _open_part(self, name: str, *, use_index: bool = False) -> NpySource:
        return NpySource(
            self.path / name,
            layout=self._layout,
            dtype_hint=self._dtype_hint,
            use_index=use_index,
        )
