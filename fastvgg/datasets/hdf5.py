"""HDF5: a dataset within a file, `FILE.h5::/path/to/dataset`, through h5py.

A contiguous dataset is bytes at an offset, which are read through maps and written as those of a
.npy are; a chunked one is read by h5py. What leaves the file is never followed: a link or a virtual
dataset that somebody else wrote could name any file of whoever opens it.

Format: https://support.hdfgroup.org/documentation/hdf5/latest/_f_m_t3.html
"""

from __future__ import annotations

import contextlib
import io
import math
import os
from typing import TYPE_CHECKING, Any, Final

import h5py

from fastvgg.datasets.base import Chunk, Header, check_array, open_regular, read_copy
from fastvgg.datasets.contiguous import ContiguousTarget
from fastvgg.datasets.index import read_index
from fastvgg.datasets.mapped import MappedNpy
from fastvgg.errors import SourceError, StoppedError, TargetError
from fastvgg.storage.location import container_of, inner_name
from fastvgg.transform import storage_dtype

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from typing import BinaryIO

    from numpy.typing import NDArray

    from fastvgg.storage.local import Storage
    from fastvgg.transform import Layout

__all__ = ["Hdf5Source", "Hdf5Target", "check_name"]

PLAIN: Final = ("uint8", "float16", "float32", "float64")
MAX_LINKS: Final = 64
# A longer name takes more than a new group has room for, and that would come after the array.
MAX_NAME_BYTES: Final = 128
MAX_GROUPS: Final = 64
NAMES_SHOWN: Final = 10
# What h5py makes of the errors of HDF5, which takes a damaged file for what it says that it is.
DAMAGED: Final = (KeyError, OSError, RuntimeError, ValueError)
# Where the array begins in a new file: kernels and the disk like it better than any byte.
ALIGNMENT: Final = 64


class Hdf5Source:
    """An array within an HDF5 file.

    Parameters
    ----------
    path
        The file, ``::``, and the dataset's name.
    layout
        Which axis of it holds the channels.
    indexed
        Whether the index beside the file is of this dataset.

    Raises
    ------
    SourceError
        If the file is damaged or open for writing elsewhere, if the name leads nowhere or out of
        the file, or if what it names is no array of rank 4 that was written whole.
    """

    kind = "hdf5"

    def __init__(self, path: Path, *, layout: Layout = "NHWC", use_index: bool = True) -> None:
        self.path = path
        self.settings: dict[str, Any] = {}
        self.notes: list[str] = []
        with contextlib.ExitStack() as opened:
            self._file: BinaryIO = opened.enter_context(_open(path))
            self._hdf5 = opened.enter_context(self._opened_by_h5py())
            with self._damage_told():
                self._dataset = self._found(_name_of(path))
                self._check(layout)
            self.records = read_index(path, self.header.images) if use_index else ()
            self._open = opened.pop_all()

    def _opened_by_h5py(self) -> h5py.File:
        """Open the file once more; HDF5 locks it against writers."""
        try:
            file: h5py.File = h5py.File(container_of(self.path), "r")
        except OSError as error:
            raise SourceError(
                f"{container_of(self.path)} cannot be opened: {error}",
                "if another process writes it, wait for that to end; else get the file again",
            ) from None
        return file

    @contextlib.contextmanager
    def _damage_told(self) -> Iterator[None]:
        try:
            yield
        except DAMAGED as error:
            raise self._damaged(f"HDF5 says {str(error)!r}") from None

    def _found(self, name: bytes) -> h5py.Dataset:
        """Return a dataset, by links that stay within the file; no other is even looked at.

        Raises
        ------
        SourceError
            If there is none of that name.
        """
        found: object = self._hdf5
        parts = _parts_of(name)
        for _ in range(MAX_LINKS + len(parts)):
            if not parts:
                break
            part = parts.pop(0)
            if not isinstance(found, h5py.Group) or not _has_link(found, part):
                found = None
                break
            kind, value = found.id.links.get_info(part).type, h5py.h5l
            if kind == value.TYPE_HARD:
                found = found[part]
            elif kind == value.TYPE_SOFT:
                linked = found.id.links.get_val(part)
                parts[:0] = _parts_of(linked)
                found = self._hdf5 if linked.startswith(b"/") else found
            else:
                raise self._leaves(f"{_shown(part)} is a link that leads out of it")
        if parts or not isinstance(found, h5py.Dataset):
            file, names = container_of(self.path), ", ".join(self._names()) or "none"
            problem = (
                f"{file} has no dataset {_shown(name)}." if name else f"{file}: which dataset?"
            )
            raise SourceError(f"{problem} There are: {names}", f"give one of them: {file}::/NAME")
        return found

    def _names(self) -> list[str]:
        """Return the names of the first datasets that there are."""
        names: list[str] = []

        def visit(name: bytes) -> bool | None:
            if h5py.h5o.get_info(self._hdf5.id, name).type == h5py.h5o.TYPE_DATASET:
                names.append(_shown(b"/" + name))
            return len(names) == NAMES_SHOWN or None

        h5py.h5o.visit(self._hdf5.id, visit)
        return names

    def _leaves(self, how: str) -> SourceError:
        return SourceError(
            f"{self.path} leaves its file: {how}",
            "give the dataset where it is stored, or copy it into a file of its own: "
            "h5repack, or h5py's copy(..., expand_external=True)",
        )

    def _check(self, layout: Layout) -> None:
        dataset, path = self._dataset, self.path
        pieces = self._pieces(dataset)  # first: HDF5 looks into other files to tell a shape
        check_array(path, dataset.shape or ())
        self.header = Header(dataset.shape, self._type_name(), layout)
        for piece in pieces:
            self._check_readable(piece)
            self._check_no_holes(piece)
        self.stored_bytes = sum(piece.id.get_storage_size() for piece in pieces)
        self.read_granularity = min(dataset.chunks[0], dataset.shape[0]) if dataset.chunks else 1
        offset = dataset.id.get_offset()
        self._mapped = MappedNpy(self._file, path, self.header, offset or 0)
        self._is_mapped = offset is not None and self._is_plain()
        if self._is_mapped and self.stored_bytes != self.header.nbytes:
            raise self._damaged(f"{self.header.nbytes} bytes are said to be {self.stored_bytes}")

    def _type_name(self) -> str:
        """Return the storage type; numbers of another byte order are converted when read."""
        if self._is_bfloat16():
            return "bfloat16"
        try:
            dtype: object = self._dataset.dtype
            name = self._dataset.dtype.name
        except (TypeError, ValueError) as error:  # NumPy has none like it
            dtype, name = error, ""
        if name not in PLAIN:
            raise SourceError(
                f"{self.path} holds numbers of type {dtype}",
                f"store it as one of {', '.join(PLAIN)}",
            )
        return str(name)

    def _is_bfloat16(self) -> bool:
        return bool(self._dataset.id.get_type().equal(_hdf5_type("bfloat16")))

    def _is_plain(self) -> bool:
        """Whether the stored bytes are those of the array in memory."""
        return bool(self._dataset.id.get_type().equal(_hdf5_type(self.header.dtype)))

    def _pieces(self, dataset: h5py.Dataset) -> list[h5py.Dataset]:
        """Return the datasets that hold the bytes of one: itself, or what a virtual one is of.

        Raises
        ------
        SourceError
            If any of the bytes are in another file, or if some of them are nowhere.
        """
        made = dataset.id.get_create_plist()
        if made.get_external_count():
            raise self._leaves(f"its bytes are in {_shown(made.get_external(0)[0])}")
        if made.get_layout() != h5py.h5d.VIRTUAL:
            return [dataset]
        pieces: dict[bytes, h5py.Dataset] = {}
        mapped = 0
        for number in range(made.get_virtual_count()):
            file_name = made.get_virtual_filename(number)
            if file_name != ".":
                raise self._leaves(f"it is virtual, of {file_name!r}")
            name = made.get_virtual_dsetname(number).encode(errors="surrogateescape")
            if name not in pieces:
                pieces[name] = self._piece(name)
            if not self._holds(pieces[name], made, number):
                raise self._gaps(f"more of {_shown(name)} than there is")
            mapped += made.get_virtual_vspace(number).get_select_npoints()
        if mapped < math.prod(dataset.shape):
            raise self._gaps(f"{mapped} of its {math.prod(dataset.shape)} elements")
        return [*pieces.values()]

    def _piece(self, name: bytes) -> h5py.Dataset:
        """Return a dataset that a virtual one is of; one of these that is virtual may be a loop."""
        piece = self._found(name)
        if piece.is_virtual:
            raise SourceError(
                f"{self.path} is virtual, of {_shown(name)}, which is virtual too",
                "store one of them: h5repack -l CONTI",
            )
        return self._pieces(piece)[0]

    def _holds(self, piece: h5py.Dataset, made: h5py.h5p.PropDCID, number: int) -> bool:
        """Whether a dataset has all that is mapped of it, which may be without end."""
        spaces, of = h5py.h5s, made.get_virtual_srcspace(number)
        if of.get_select_type() == spaces.SEL_ALL:
            chosen: int = made.get_virtual_vspace(number).get_select_npoints()
            return bool(chosen == piece.size)
        is_slab = of.get_select_type() == spaces.SEL_HYPERSLABS and of.is_regular_hyperslab()
        if is_slab and spaces.UNLIMITED in sum(of.get_regular_hyperslab(), ()):
            return False
        _, last = of.get_select_bounds()
        return len(last) == len(piece.shape) and all(
            index < length for index, length in zip(last, piece.shape, strict=True)
        )

    def _gaps(self, what: str) -> SourceError:
        return SourceError(
            f"{self.path} is virtual, of {what}: the rest would be read as "
            f"{self._dataset.fillvalue}",
            "store the whole of it: h5repack -l CONTI",
        )

    def _check_readable(self, piece: h5py.Dataset) -> None:
        """Refuse chunks that are compressed in a way that HDF5 does not know here."""
        made = piece.id.get_create_plist()
        for code, _, _, name in map(made.get_filter, range(made.get_nfilters())):
            if not h5py.h5z.filter_avail(code):
                raise SourceError(
                    f"{self.path} is compressed by filter {code}, {_shown(name)}, which HDF5 does "
                    "not have here",
                    "install it, as by pip install hdf5plugin, and let HDF5_PLUGIN_PATH be "
                    "hdf5plugin.PLUGIN_PATH; or store the dataset without it",
                )

    def _check_no_holes(self, piece: h5py.Dataset) -> None:
        """Refuse what was never written, which HDF5 reads as if it had been."""
        wanted, written = 1, int(piece.id.get_storage_size() > 0)
        if piece.chunks:
            wanted, written = self._chunks(piece)
        if written < wanted:
            raise SourceError(
                f"{self.path}: {wanted - written} of {wanted} chunks were never written, and would "
                f"be read as {piece.fillvalue}",
                "finish writing it; where that is what it should hold, write it",
            )

    def _chunks(self, piece: h5py.Dataset) -> tuple[int, int]:
        """Return how many chunks there should be, and how many there are."""
        counts = [-(-a // b) for a, b in zip(piece.shape, piece.chunks, strict=True)]
        wanted, written = math.prod(counts), piece.id.get_num_chunks()
        if written < wanted:
            return wanted, written
        file_bytes, said_bytes = self._file_bytes(), piece.id.get_storage_size()
        if max(wanted, said_bytes) > file_bytes:
            raise self._damaged(
                f"{wanted} chunks are said to be {said_bytes} of {file_bytes} bytes"
            )
        # A damaged index may have one chunk twice and another not at all. Of one without bytes HDF5
        # reads what happens to be in memory, or ends the process.
        is_there = bytearray(wanted)
        whole = math.prod(piece.chunks) * piece.id.get_type().get_size()
        lengths = tuple(zip(piece.chunks, counts, strict=True))
        unfiltered = (1 << piece.id.get_create_plist().get_nfilters()) - 1

        def visit(chunk: h5py.h5d.StoreInfo) -> None:
            least = whole if chunk.filter_mask & unfiltered == unfiltered else 1
            if chunk.byte_offset is None or chunk.size < least:
                return
            number = 0
            for start, (length, count) in zip(chunk.chunk_offset, lengths, strict=True):
                if start >= length * count:
                    return
                number = number * count + start // length
            is_there[number] = 1

        piece.id.chunk_iter(visit)
        if not all(is_there):
            raise self._damaged(f"{is_there.count(0)} of {wanted} chunks are nowhere")
        return wanted, written

    def _file_bytes(self) -> int:
        return os.fstat(self._file.fileno()).st_size

    def _damaged(self, how: str) -> SourceError:
        return SourceError(f"{self.path} is damaged: {how}", "get the file again")

    def fingerprint(self) -> str:
        """Return a hash of size, time of change, and samples of the file, as it is now."""
        return self._mapped.fingerprint()

    def read(self, start: int, stop: int) -> Chunk:
        """Return images: of a contiguous dataset a mapped window, and otherwise a copy.

        Raises
        ------
        StoppedError
            If they cannot be read, as where a chunk is damaged.
        """
        if self._is_mapped:
            return Chunk(self._mapped.read(start, stop), [*self.records[start:stop]])
        return read_copy(self, start, stop)

    def read_into(self, start: int, out: NDArray[Any]) -> None:
        """Read as many images as `out` has, from row `start` on; many threads may.

        Raises
        ------
        StoppedError
            If they cannot be read, as where a chunk is damaged.
        """
        if self._is_mapped:
            self._mapped.read_into(start, out)
            return
        chosen = self._dataset.id.get_space()
        chosen.select_hyperslab((start, 0, 0, 0), out.shape)
        memory = h5py.h5s.create_simple(out.shape)
        # h5py knows no type for bfloat16 in memory: that in the file is the same.
        in_memory = self._dataset.id.get_type() if self.header.dtype == "bfloat16" else None
        try:
            self._dataset.id.read(memory, chosen, out, in_memory)
        except OSError as error:
            raise StoppedError(
                f"{self.path}: images {start} to {start + len(out) - 1} cannot be read: {error}",
                "mend the cause, then run the same command again; where a chunk is damaged, get "
                "the file again and give --restart",
            ) from None

    def close(self) -> None:
        """Close the file; windows that were returned stay valid."""
        self._open.close()


class Hdf5Target(ContiguousTarget):
    """A contiguous dataset, alone in a new HDF5 file.

    Parameters
    ----------
    path
        The name that the file gets when it is complete, ``::``, and the dataset's name.
    header
        What will be in it.
    storage
        What carries out the system calls.

    """

    kind = "hdf5"

    def __init__(self, path: Path, header: Header, storage: Storage) -> None:
        self._dataset_path = path
        super().__init__(container_of(path), header, storage, _start_bytes(path, header))

    def published(self) -> Hdf5Source:
        """Open the published file."""
        return Hdf5Source(self._dataset_path, layout=self.header.layout)


def _open(path: Path) -> BinaryIO:
    try:
        return open_regular(container_of(path))
    except OSError as error:
        raise SourceError(
            f"{container_of(path)} cannot be opened: {error.strerror or error}",
            "check its path and permissions",
        ) from None


def check_name(path: Path) -> None:
    """Refuse a name that a new dataset cannot have.

    Raises
    ------
    TargetError
        Saying why.
    """
    name = inner_name(path)
    if not name:
        problem = "the dataset in the file has no name"
    elif "\0" in name or not name.isprintable():
        problem = f"a dataset cannot be called {name!r}"
    elif max(len(part.encode()) for part in name.split("/")) > MAX_NAME_BYTES:
        problem = f"a part of the dataset's name has more than {MAX_NAME_BYTES} bytes"
    elif name.count("/") > MAX_GROUPS:
        problem = f"the dataset is within more than {MAX_GROUPS - 1} groups"
    else:
        return
    file = container_of(path)
    raise TargetError(f"{file}: {problem}", f"give it another: {file}::/images")


def _hdf5_type(name: str) -> h5py.h5t.TypeID:
    if name != "bfloat16":
        return h5py.h5t.py_create(storage_dtype(name).newbyteorder("<"))
    bfloat16 = h5py.h5t.IEEE_F16LE.copy()
    sign, exponent, exponent_bits, mantissa, mantissa_bits = 15, 7, 8, 0, 7
    bfloat16.set_fields(sign, exponent, exponent_bits, mantissa, mantissa_bits)
    bfloat16.set_ebias(127)
    return bfloat16


def _name_of(path: Path) -> bytes:
    """Return the name within a file as HDF5 has it: bytes, mostly UTF-8."""
    return inner_name(path).encode(errors="surrogateescape")


def _parts_of(name: bytes) -> list[bytes]:
    return [part for part in name.split(b"/") if part not in (b"", b".")]


def _has_link(group: h5py.Group, name: bytes) -> bool:
    return b"\0" not in name and bool(group.id.links.exists(name))


def _shown(name: bytes) -> str:
    """Return a name to be printed, whatever is in it."""
    return repr(name.decode(errors="backslashreplace"))


def _start_bytes(path: Path, header: Header) -> bytes:
    """Return what HDF5 writes before the array of a file that holds nothing else.

    It reserves the array's place, and never writes into it.
    """
    written = io.BytesIO()
    aligned = {"alignment_threshold": 1, "alignment_interval": ALIGNMENT}
    with h5py.File(written, "w", libver=("v108", "v108"), **aligned) as file:
        made = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        made.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
        made.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
        made.set_obj_track_times(False)  # the same bytes at any time
        linked = h5py.h5p.create(h5py.h5p.LINK_CREATE)
        linked.set_create_intermediate_group(True)
        linked.set_char_encoding(h5py.h5t.CSET_UTF8)
        name = inner_name(path).encode()
        space = h5py.h5s.create_simple(header.shape)
        dataset = h5py.h5d.create(file.id, name, _hdf5_type(header.dtype), space, made, linked)
        offset = int(dataset.get_offset())
    start = written.getvalue()
    if len(start) > offset:
        raise RuntimeError(f"HDF5 wrote {len(start)} bytes, and the array begins at {offset}")
    return start.ljust(offset, b"\0")
