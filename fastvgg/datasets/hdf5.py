"""HDF5: a dataset within a file, `FILE.h5::/path/to/dataset`, through h5py.

A contiguous dataset is bytes at an offset, which are read through maps and written as those of a
.npy are; a chunked one is read by h5py. What leaves the file is never followed: a link or a virtual
dataset that somebody else wrote could name any file of whoever opens it.

Format: https://support.hdfgroup.org/documentation/hdf5/latest/_f_m_t3.html
"""

from __future__ import annotations

import contextlib
import io
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from fastvgg.datasets.base import Chunk, Header, check_array, open_regular
from fastvgg.datasets.index import read_index
from fastvgg.datasets.locations import dataset_of, file_of
from fastvgg.datasets.mapped import MappedArray
from fastvgg.datasets.reserved import ReservedArray
from fastvgg.errors import SourceError, StoppedError, TargetError
from fastvgg.transform import storage_dtype

if TYPE_CHECKING:
    from pathlib import Path
    from types import ModuleType
    from typing import BinaryIO

    import h5py
    from numpy.typing import NDArray

    from fastvgg.stream.storage import Storage
    from fastvgg.transform import Layout

__all__ = ["Hdf5Source", "Hdf5Target"]

PLAIN: Final = ("uint8", "float16", "float32", "float64")
MOST_LINKS: Final = 64
NAMES_SHOWN: Final = 10
# Where the array begins in a new file: kernels and the disk like it better than any byte.
ALIGNMENT: Final = 64


def _h5py(path: Path) -> ModuleType:
    try:
        import h5py
    except ImportError:
        raise SourceError(
            f"{path} is in an HDF5 file, and h5py, which reads and writes them, is not installed",
            "install it: pip install 'fastvgg[hdf5]'",
        ) from None
    module: ModuleType = h5py
    return module


class Hdf5Source:
    """An array within an HDF5 file.

    Parameters
    ----------
    path
        The file, ``::``, and the dataset's name.
    layout
        Which axis of it holds the channels.

    Raises
    ------
    SourceError
        If the file is damaged or open for writing elsewhere, if the name leads nowhere or out of
        the file, or if what it names is no array of rank 4 that was written whole.
    """

    kind = "hdf5"

    def __init__(self, path: Path, *, layout: Layout = "NHWC") -> None:
        self.path = path
        self.settings: dict[str, Any] = {}
        self.notes: list[str] = []
        self._h5py = _h5py(path)
        with contextlib.ExitStack() as opened:
            self._file: BinaryIO = opened.enter_context(_opened(path))
            self._hdf5 = opened.enter_context(self._opened_by_h5py())
            self._dataset = self._found(dataset_of(path))
            self._check(layout)
            self.records = read_index(path, self.header.images)
            self._opened = opened.pop_all()

    def _opened_by_h5py(self) -> h5py.File:
        """Open the file once more; HDF5 locks it against writers."""
        try:
            file: h5py.File = self._h5py.File(file_of(self.path), "r")
        except OSError as error:
            raise SourceError(
                f"{file_of(self.path)} cannot be opened: {error}",
                "if another process writes it, wait for that to end; else get the file again",
            ) from None
        return file

    def _found(self, name: str) -> h5py.Dataset:
        """Return a dataset, by links that stay within the file.

        Raises
        ------
        SourceError
            If there is none of that name.
        """
        found: object = self._hdf5
        parts = [part for part in name.split("/") if part not in ("", ".")]
        for _ in range(MOST_LINKS + len(parts)):
            if not parts:
                break
            part = parts.pop(0)
            link = found.get(part, getlink=True) if isinstance(found, self._h5py.Group) else None
            if isinstance(link, self._h5py.ExternalLink):
                raise self._leaves(f"{part!r} is a link into {link.filename!r}")
            if isinstance(link, self._h5py.SoftLink):
                parts[:0] = [step for step in link.path.split("/") if step not in ("", ".")]
                found = self._hdf5 if link.path.startswith("/") else found
            else:
                found = None if link is None else found[part]  # type: ignore[index]
        if parts or not isinstance(found, self._h5py.Dataset):
            file, names = file_of(self.path), ", ".join(self._names()) or "none"
            problem = f"{file} has no dataset {name!r}." if name else f"{file}: which dataset?"
            raise SourceError(f"{problem} There are: {names}", f"give one of them: {file}::/NAME")
        return found

    def _names(self) -> list[str]:
        """Return the names of the first datasets that there are."""
        names: list[str] = []

        def visit(name: str, found: object) -> bool | None:
            if isinstance(found, self._h5py.Dataset):
                names.append(f"/{name} {found.shape} {found.dtype}")
            return len(names) == NAMES_SHOWN or None

        self._hdf5.visititems(visit)
        return names

    def _leaves(self, how: str) -> SourceError:
        return SourceError(
            f"{self.path} leaves its file: {how}",
            "give the dataset where it is stored, or copy it into a file of its own: "
            "h5repack, or h5py's copy(..., expand_external=True)",
        )

    def _check(self, layout: Layout) -> None:
        dataset, path = self._dataset, self.path
        check_array(path, dataset.shape or ())
        self.header = Header(dataset.shape, self._type_name(), layout)
        self._refuse_outside(dataset, MOST_LINKS)
        self._refuse_unreadable()
        self._refuse_holes()
        self.stored_bytes = dataset.id.get_storage_size()
        self.stored_together = min(dataset.chunks[0], dataset.shape[0]) if dataset.chunks else 1
        offset = dataset.id.get_offset()
        self._mapped = MappedArray(self._file, path, self.header, offset or 0)
        self._is_mapped = offset is not None and self._is_plain()

    def _type_name(self) -> str:
        """Return the storage type; numbers of another byte order are converted when read."""
        if self._is_bfloat16():
            return "bfloat16"
        name = self._dataset.dtype.newbyteorder("=").name
        if name not in PLAIN:
            raise SourceError(
                f"{self.path} holds numbers of type {self._dataset.dtype}",
                f"store it as one of {', '.join(PLAIN)}",
            )
        return str(name)

    def _is_bfloat16(self) -> bool:
        return bool(self._dataset.id.get_type().equal(_hdf5_type("bfloat16")))

    def _is_plain(self) -> bool:
        """Whether the stored bytes are those of the array in memory."""
        return bool(self._dataset.id.get_type().equal(_hdf5_type(self.header.dtype)))

    def _refuse_outside(self, dataset: h5py.Dataset, depth: int) -> None:
        """Refuse a dataset whose bytes are in other files, or in datasets whose bytes are."""
        made = dataset.id.get_create_plist()
        if made.get_external_count():
            name = made.get_external(0)[0].decode(errors="replace")
            raise self._leaves(f"its bytes are in {name!r}")
        if not dataset.is_virtual:
            return
        if not depth:
            raise self._leaves("virtual datasets of virtual datasets have no end")
        for source in dataset.virtual_sources():
            if source.file_name != ".":
                raise self._leaves(f"it is virtual, of {source.file_name!r}")
            self._refuse_outside(self._found(source.dset_name), depth - 1)

    def _refuse_unreadable(self) -> None:
        """Refuse chunks that are compressed in a way that HDF5 does not know here."""
        made = self._dataset.id.get_create_plist()
        for code, _, _, name in map(made.get_filter, range(made.get_nfilters())):
            if not self._h5py.h5z.filter_avail(code):
                raise SourceError(
                    f"{self.path} is compressed by filter {code} ({name.decode()}), which HDF5 "
                    "does not have here",
                    "install it, as by pip install hdf5plugin, and let HDF5_PLUGIN_PATH be "
                    "hdf5plugin.PLUGIN_PATH; or store the dataset without it",
                )

    def _refuse_holes(self) -> None:
        """Refuse what was never written, which HDF5 reads as if it had been."""
        dataset = self._dataset
        wanted, written = 1, 1
        if dataset.chunks:
            counts = (-(-a // b) for a, b in zip(dataset.shape, dataset.chunks, strict=True))
            wanted, written = int(np.prod([*counts])), dataset.id.get_num_chunks()
        elif not dataset.is_virtual:
            written = int(dataset.id.get_storage_size() > 0)
        if written < wanted:
            raise SourceError(
                f"{self.path}: {wanted - written} of {wanted} chunks were never written, and would "
                f"be read as {dataset.fillvalue}",
                "finish writing it; where that is what it should hold, write it",
            )

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
        shape = (stop - start, *self.header.shape[1:])
        batch = np.empty(shape, storage_dtype(self.header.dtype))
        self.read_into(start, batch)
        return Chunk(batch, [*self.records[start:stop]])

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
        memory = self._h5py.h5s.create_simple(out.shape)
        bits, bits_type = out, None
        if self.header.dtype == "bfloat16":  # which h5py has no NumPy type for
            bits, bits_type = out.view(np.uint16), self._dataset.id.get_type()
        try:
            self._dataset.id.read(memory, chosen, bits, bits_type)
        except OSError as error:
            raise StoppedError(
                f"{self.path}: images {start} to {start + len(out) - 1} cannot be read: {error}",
                "a chunk of them is damaged: get the file again, and run the same command again",
            ) from None

    def close(self) -> None:
        """Close the file; windows that were returned stay valid."""
        self._opened.close()


class Hdf5Target(ReservedArray):
    """A contiguous dataset, alone in a new HDF5 file.

    Parameters
    ----------
    path
        The name that the file gets when it is complete, ``::``, and the dataset's name.
    header
        What will be in it.
    storage
        What carries out the system calls.

    Raises
    ------
    TargetError
        If no name is given to the dataset.
    """

    kind = "hdf5"

    def __init__(self, path: Path, header: Header, storage: Storage) -> None:
        self._dataset_path = path
        name = dataset_of(path)
        if not name:
            raise TargetError(
                f"{path}: the dataset in the file has no name", f"give it one: {path}::/images"
            )
        super().__init__(file_of(path), header, storage, _start_bytes(path, header, name))

    def published(self) -> Hdf5Source:
        """Open the published file."""
        return Hdf5Source(self._dataset_path, layout=self.header.layout)


def _opened(path: Path) -> BinaryIO:
    try:
        return open_regular(file_of(path))
    except OSError as error:
        raise SourceError(
            f"{file_of(path)} cannot be opened: {error.strerror or error}",
            "check its path and permissions",
        ) from None


def _hdf5_type(name: str) -> h5py.h5t.TypeID:
    from h5py import h5t

    if name != "bfloat16":
        return h5t.py_create(storage_dtype(name).newbyteorder("<"))
    bfloat16 = h5t.IEEE_F16LE.copy()
    sign, exponent, exponent_bits, mantissa, mantissa_bits = 15, 7, 8, 0, 7
    bfloat16.set_fields(sign, exponent, exponent_bits, mantissa, mantissa_bits)
    bfloat16.set_ebias(127)
    return bfloat16


def _start_bytes(path: Path, header: Header, name: str) -> bytes:
    """Return what HDF5 writes before the array of a file that holds nothing else.

    It reserves the array's place, and never writes into it.
    """
    h5py = _h5py(path)
    written = io.BytesIO()
    aligned = {"alignment_threshold": 1, "alignment_interval": ALIGNMENT}
    with h5py.File(written, "w", libver=("v108", "v108"), **aligned) as file:
        made = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        made.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
        made.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
        made.set_obj_track_times(False)  # the same bytes at any time
        linked = h5py.h5p.create(h5py.h5p.LINK_CREATE)
        linked.set_create_intermediate_group(True)
        space = h5py.h5s.create_simple(header.shape)
        dataset = h5py.h5d.create(
            file.id, name.encode(), _hdf5_type(header.dtype), space, made, linked
        )
        offset = int(dataset.get_offset())
    start = written.getvalue()
    if len(start) > offset:
        raise RuntimeError(f"HDF5 wrote {len(start)} bytes, and the array begins at {offset}")
    return start.ljust(offset, b"\0")
