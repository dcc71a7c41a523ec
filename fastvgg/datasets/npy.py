"""`.npy` arrays: a strict header, reads through bounded memory maps, writes at fixed offsets.

The header is checked before anything else is done with the file. `numpy.load` accepts what fastvgg
must not: it unpickles, it allocates what a header claims, and with ``mmap_mode="r+"`` it grows a
truncated file to the size that its header claims, without a word.

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
MAX_HEADER_BYTES: Final = 10_000  # numpy's own limit for what it parses without being told to
MAX_AXIS: Final = 2**48
STORED_TYPES: Final = {
    "|u1": "uint8",
    "<f2": "float16",
    "<f4": "float32",
    "<f8": "float64",
    "<V2": "bfloat16",  # what NumPy writes for ml_dtypes.bfloat16; only a manifest can tell
}
# What Python raises on a text that is no literal, or too deep or too large a one.
LITERAL_ERRORS: Final = (
    *(SyntaxError, ValueError, TypeError),
    *(MemoryError, RecursionError, OverflowError),
)
# What it reads with a warning: an escape that there is not, and "1or 2". No filter of warnings is
# set for that: while one thread has it, another that saves and restores the filters would keep it.
WARNED_OF: Final = re.compile(rb"\\|\b[0-9][0-9A-Za-z_]*?\.?(?:and|else|for|if|in|is|not|or)")


class ArrayHeader(NamedTuple):
    """What the header of a .npy file says."""

    descr: str
    shape: tuple[int, ...]
    offset: int
    """Where the data begins."""


def read_header(file: BinaryIO, path: Path) -> ArrayHeader:
    """Read and check the header of an open .npy file.

    Raises
    ------
    SourceError
        If the file is not a .npy file of plain C-ordered little-endian numbers, or its length is
        not what the header says.
    """
    start = file.read(12)
    if not start.startswith(MAGIC) or len(start) < 12:
        found = "is empty" if not start else f"begins with {start[:6]!r}"
        raise SourceError(f"{path} {found}: it is not a .npy file", "check that it is complete")
    version = (start[6], start[7])
    if version == (1, 0):
        length, offset = struct.unpack("<H", start[8:10])[0], 10
    elif version in ((2, 0), (3, 0)):
        length, offset = struct.unpack("<I", start[8:12])[0], 12
    else:
        raise SourceError(
            f"{path} has .npy format version {version[0]}.{version[1]}",
            "versions 1.0, 2.0 and 3.0 can be read: write the file again with numpy.save",
        )
    if length > MAX_HEADER_BYTES:
        raise SourceError(
            f"{path} claims a header of {length} bytes, of at most {MAX_HEADER_BYTES}",
            "it is damaged, or made to do harm: get it again, or write it again with numpy.save",
        )
    text = (start[offset:] + file.read(max(0, length - len(start[offset:]))))[:length]
    if len(text) != length:
        raise SourceError(
            f"{path} ends after {offset + len(text)} bytes, inside its header of {length}",
            "the file is truncated: get it again",
        )
    descr, fortran, shape = _parse(text, path)
    if fortran:
        raise SourceError(
            f"{path} is in Fortran order, so that no image lies in one piece",
            "write it in C order: numpy.save(new, numpy.ascontiguousarray(numpy.load(old)))",
        )
    return ArrayHeader(descr, shape, offset + length)


def _parse(text: bytes, path: Path) -> tuple[str, bool, tuple[int, ...]]:
    """Return descr, fortran_order and shape; a literal of Python, and nothing else, is read."""
    try:
        fields = _literal(text)
    except LITERAL_ERRORS as error:
        raise SourceError(
            f"{path} has a header that cannot be read: {type(error).__name__}",
            "the file is damaged: get it again",
        ) from None
    if not isinstance(fields, dict) or set(fields) != {"descr", "fortran_order", "shape"}:
        raise SourceError(
            f"{path} has a header without exactly descr, fortran_order and shape",
            "the file is damaged: get it again",
        )
    descr, fortran, shape = fields["descr"], fields["fortran_order"], fields["shape"]
    if type(fortran) is not bool or not isinstance(shape, tuple):
        raise SourceError(
            f"{path} has a header of wrong types: {_shown(fields)}",
            "the file is damaged: get it again",
        )
    if any(type(axis) is not int or not 0 <= axis <= MAX_AXIS for axis in shape):
        raise SourceError(
            f"{path} claims the shape {_shown(shape)}, and an axis is 0 to {MAX_AXIS} long",
            "the file is damaged: get it again",
        )
    return _checked_descr(descr, path), fortran, shape


def _literal(text: bytes) -> object:
    if WARNED_OF.search(text):
        raise ValueError("Python would warn of it")
    fields: object = ast.literal_eval(text.decode("utf-8"))
    return fields


def _checked_descr(descr: object, path: Path) -> str:
    if isinstance(descr, str) and descr in STORED_TYPES:
        return descr
    plain = ", ".join(name for name in STORED_TYPES.values() if name != "bfloat16")
    remedy = f"store it as one of {plain}"
    if isinstance(descr, str) and descr.endswith("O"):
        problem, remedy = (
            "holds pickled Python objects, which are never loaded",
            f"{remedy} instead",
        )
    elif isinstance(descr, str) and descr.startswith(">"):
        problem = f"is big-endian ({_shown(descr)})"
        remedy = (
            "write it in native order: a = numpy.load(old, mmap_mode='r'); "
            "numpy.save(new, a.astype(a.dtype.newbyteorder('<')))"
        )
    else:
        problem = f"holds numbers of type {_shown(descr)}"
    raise SourceError(f"{path} {problem}", remedy)


def _shown(value: object) -> str:
    """Return what a header says, short enough for a message."""
    try:
        return ascii(value)[:100]
    except ValueError:  # a whole number of more digits than Python prints
        return "of a number too long to print"


class NpySource:
    """A .npy array, read in windows.

    Parameters
    ----------
    path
        The file.
    layout
        Which axis of it holds the channels.
    dtype_hint
        "bfloat16" where a manifest says that the two-byte elements are that.

    Raises
    ------
    SourceError
        If the file is not what `read_header` accepts, is not of rank 4, holds no image, or is
        longer or shorter than its header says.
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
            self._check(read_header(self._file, path), layout, dtype_hint)
            self.records = read_index(path, self.header.images)
        except SourceError:
            self._file.close()
            raise

    def _check(self, found: ArrayHeader, layout: Layout, dtype_hint: str | None) -> None:
        path = self.path
        dtype = STORED_TYPES[found.descr]
        if dtype == "bfloat16" and dtype_hint != "bfloat16":
            raise SourceError(
                f"{path} holds two-byte elements that its header does not name",
                "if they are bfloat16, put the manifest (.fastvgg.json) that was written with them "
                "beside the file",
            )
        check_array(path, found.shape)
        self.header = Header(found.shape, dtype, layout)
        self.stored_bytes = os.fstat(self._file.fileno()).st_size
        expected = found.offset + self.header.nbytes
        if self.stored_bytes != expected:
            what = "truncated" if self.stored_bytes < expected else "followed by other bytes"
            raise SourceError(
                f"{path} is {what}: shape {found.shape} of {dtype} is {expected} bytes with the "
                f"header, and the file has {self.stored_bytes}",
                "get the file again, or write it again with numpy.save",
            )
        self._mapped = MappedNpy(self._file, path, self.header, found.offset)

    def fingerprint(self) -> str:
        """Return a hash of size, time of change, header, and samples, as the file is now."""
        return self._mapped.fingerprint()

    def read(self, start: int, stop: int) -> Chunk:
        """Return images as a read-only view of a mapped window of the file.

        Raises
        ------
        StoppedError
            If the file has become shorter since it was opened, or cannot be read.
        """
        return Chunk(self._mapped.read(start, stop), [*self.records[start:stop]])

    def read_into(self, start: int, out: NDArray[Any]) -> None:
        """Read as many images as `out` has, from row `start` on; many threads may.

        Raises
        ------
        StoppedError
            If the file has become shorter since it was opened, or cannot be read.
        """
        self._mapped.read_into(start, out)

    def close(self) -> None:
        """Close the file; windows that were returned stay valid."""
        self._file.close()


class NpyTarget(ContiguousTarget):
    """A .npy array that is written.

    Parameters
    ----------
    path
        The name that the array gets when it is complete.
    header
        What will be in it.
    storage
        What carries out the system calls.
    """

    kind = "npy"

    def __init__(self, path: Path, header: Header, storage: Storage) -> None:
        super().__init__(path, header, storage, _header_bytes(header))

    def published(self) -> NpySource:
        """Open the published file."""
        return NpySource(self.path, layout=self.header.layout, dtype_hint=self.header.dtype)


def _header_bytes(header: Header) -> bytes:
    """Return the first bytes of the file: a version 1.0 header, padded to 64."""
    descr = next(descr for descr, name in STORED_TYPES.items() if name == header.dtype)
    text = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        text, {"descr": descr, "fortran_order": False, "shape": header.shape}
    )
    return text.getvalue()
