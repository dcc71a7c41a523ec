"""`.npy` arrays: strict header validation, memory-mapped reads, writes at fixed offsets.

The header is validated before anything else is done with the file. `numpy.load` is too permissive:
it unpickles, it allocates whatever a header claims, and with ``mmap_mode="r+"`` it silently grows a
truncated file to the size that its header claims.

Format: https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html
"""

from __future__ import annotations

import ast
import io
import os
import re
import struct
from typing import TYPE_CHECKING, Any, BinaryIO, Final, NamedTuple

import numpy as np

from fastvgg.datasets.base import Chunk, Header, check_array, open_regular
from fastvgg.datasets.contiguous import ContiguousTarget
from fastvgg.datasets.index import read_index
from fastvgg.datasets.mapped import MappedNpy
from fastvgg.errors import SourceError

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from fastvgg.storage.local import Storage
    from fastvgg.transform import Layout

__all__ = ["NpySource", "NpyTarget"]

MAGIC: Final = b"\x93NUMPY"
MAX_HEADER_BYTES: Final = 10_000  # NumPy's own default limit
MAX_AXIS: Final = 2**48
STORED_TYPES: Final = {
    "|u1": "uint8",
    "<f2": "float16",
    "<f4": "float32",
    "<f8": "float64",
    "<V2": "bfloat16",  # what NumPy writes for ml_dtypes.bfloat16; needs the manifest to confirm
}
# What Python raises on text that is not a literal, or is nested too deeply or too large.
LITERAL_ERRORS: Final = (
    *(SyntaxError, ValueError, TypeError),
    *(MemoryError, RecursionError, OverflowError),
)
# What Python parses with a warning: an invalid escape, and "1or 2". Suppressing the warning instead
# is not thread-safe: another thread may save and restore the filters in between.
DUBIOUS_SYNTAX: Final = re.compile(rb"\\|\b[0-9][0-9A-Za-z_]*?\.?(?:and|else|for|if|in|is|not|or)")


class ArrayHeader(NamedTuple):
    """The header of a .npy file."""

    descr: str
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
    if not start.startswith(MAGIC) or len(start) < 12:
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
            "the file is damaged or malicious: get it again, or rewrite it with numpy.save",
        )
    text = (start[offset:] + file.read(max(0, length - len(start[offset:]))))[:length]
    if len(text) != length:
        raise SourceError(
            f"{path} ends after {offset + len(text)} bytes, inside its header of {length} bytes",
            "the file is truncated: get it again",
        )
    descr, fortran, shape = _parse(text, path)
    if fortran:
        raise SourceError(
            f"{path} is in Fortran order, in which no image is contiguous",
            "rewrite it in C order: numpy.save(new, numpy.ascontiguousarray(numpy.load(old)))",
        )
    return ArrayHeader(descr, shape, offset + length)


def _parse(text: bytes, path: Path) -> tuple[str, bool, tuple[int, ...]]:
    """Return descr, fortran_order and shape. Only Python literals are evaluated."""
    try:
        fields = _literal(text)
    except LITERAL_ERRORS as error:
        raise SourceError(
            f"{path} has a header that cannot be read: {type(error).__name__}",
            "the file is damaged: get it again",
        ) from None
    if not isinstance(fields, dict) or set(fields) != {"descr", "fortran_order", "shape"}:
        raise SourceError(
            f"{path} has a header whose fields are not exactly descr, fortran_order and shape",
            "the file is damaged: get it again",
        )
    descr, fortran, shape = fields["descr"], fields["fortran_order"], fields["shape"]
    if type(fortran) is not bool or not isinstance(shape, tuple):
        raise SourceError(
            f"{path} has a header with fields of the wrong types: {_display(fields)}",
            "the file is damaged: get it again",
        )
    if any(type(axis) is not int or not 0 <= axis <= MAX_AXIS for axis in shape):
        raise SourceError(
            f"{path} claims shape {_display(shape)}; an axis must be an integer from 0 to "
            f"{MAX_AXIS}",
            "the file is damaged: get it again",
        )
    return _validate_descr(descr, path), fortran, shape


def _literal(text: bytes) -> object:
    if DUBIOUS_SYNTAX.search(text):
        raise ValueError("Python would warn about it")
    fields: object = ast.literal_eval(text.decode("utf-8"))
    return fields


def _validate_descr(descr: object, path: Path) -> str:
    if isinstance(descr, str) and descr in STORED_TYPES:
        return descr
    plain = ", ".join(name for name in STORED_TYPES.values() if name != "bfloat16")
    remedy = f"store it as one of {plain}"
    if isinstance(descr, str) and descr.endswith("O"):
        problem, remedy = (
            "contains pickled Python objects, which are never loaded",
            f"{remedy} instead",
        )
    elif isinstance(descr, str) and descr.startswith(">"):
        problem = f"is big-endian ({_display(descr)})"
        remedy = (
            "rewrite it as little-endian: a = numpy.load(old, mmap_mode='r'); "
            "numpy.save(new, a.astype(a.dtype.newbyteorder('<')))"
        )
    else:
        problem = f"has unsupported dtype {_display(descr)}"
    raise SourceError(f"{path} {problem}", remedy)


def _display(value: object) -> str:
    """Return a header value, truncated for a message."""
    try:
        return ascii(value)[:100]
    except ValueError:  # an integer of more digits than Python converts
        return "with an integer too long to print"


class NpySource:
    """A .npy array, read through memory-mapped windows.

    Parameters
    ----------
    path
        The file.
    layout
        The layout of the array.
    dtype_hint
        "bfloat16" if a manifest declares that the two-byte elements are bfloat16.

    Raises
    ------
    SourceError
        If `read_header` rejects the file, the array is empty or not of rank 4, or the file is
        longer or shorter than its header implies.
    """

    kind = "npy"
    read_granularity = 1

    def __init__(
        self, path: Path, *, layout: Layout = "NHWC", dtype_hint: str | None = None
    ) -> None:
        self.path = path
        self.settings: dict[str, Any] = {}
        self.notes: list[str] = []
        try:
            self._file = open_regular(path)
        except OSError as error:
            raise SourceError(
                f"{path} cannot be opened: {error.strerror or error}",
                "check its path and permissions",
            ) from None
        try:
            self._validate(read_header(self._file, path), layout, dtype_hint)
            self.records = read_index(path, self.header.images)
        except SourceError:
            self._file.close()
            raise

    def _validate(self, npy: ArrayHeader, layout: Layout, dtype_hint: str | None) -> None:
        path = self.path
        dtype = STORED_TYPES[npy.descr]
        if dtype == "bfloat16" and dtype_hint != "bfloat16":
            raise SourceError(
                f"{path} has two-byte elements whose dtype its header does not name",
                "if they are bfloat16, put the manifest (.fastvgg.json) that was written with the "
                "file next to it",
            )
        check_array(path, npy.shape)
        self.header = Header(npy.shape, dtype, layout)
        self.stored_bytes = os.fstat(self._file.fileno()).st_size
        expected = npy.offset + self.header.nbytes
        if self.stored_bytes != expected:
            state = "truncated" if self.stored_bytes < expected else "followed by extra bytes"
            raise SourceError(
                f"{path} is {state}: expected {expected} bytes for shape {npy.shape} of {dtype} "
                f"and the header, but the file has {self.stored_bytes}",
                "get the file again, or rewrite it with numpy.save",
            )
        self._mapped = MappedNpy(self._file, path, self.header, npy.offset)

    def fingerprint(self) -> str:
        """Return a hash of the file's current size, modification time, header and samples."""
        return self._mapped.fingerprint()

    def read(self, start: int, stop: int) -> Chunk:
        """Return images as a read-only view of a memory-mapped window of the file.

        Raises
        ------
        StoppedError
            If the file was truncated since it was opened, or cannot be read.
        """
        return Chunk(self._mapped.read(start, stop), [*self.records[start:stop]])

    def read_into(self, start: int, out: NDArray[Any]) -> None:
        """Fill `out` with images, starting at row `start`; thread-safe.

        Raises
        ------
        StoppedError
            If the file was truncated since it was opened, or cannot be read.
        """
        self._mapped.read_into(start, out)

    def close(self) -> None:
        """Close the file; views that were returned stay valid."""
        self._file.close()


class NpyTarget(ContiguousTarget):
    """A .npy array being written.

    Parameters
    ----------
    path
        The path of the published file.
    header
        Shape, dtype and layout of the array.
    storage
        Performs the system calls.
    """

    kind = "npy"

    def __init__(self, path: Path, header: Header, storage: Storage) -> None:
        super().__init__(path, header, storage, _header_bytes(header))

    def published(self) -> NpySource:
        """Open the published file."""
        return NpySource(self.path, layout=self.header.layout, dtype_hint=self.header.dtype)


def _header_bytes(header: Header) -> bytes:
    """Return a version 1.0 header, padded to a multiple of 64 bytes."""
    descr = next(descr for descr, name in STORED_TYPES.items() if name == header.dtype)
    text = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        text, {"descr": descr, "fortran_order": False, "shape": header.shape}
    )
    return text.getvalue()
