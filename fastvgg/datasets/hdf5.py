"""HDF5: a dataset within a file, `FILE.h5::/path/to/dataset`, through h5py.

A contiguous dataset consists of bytes at an offset: it is read and written like a .npy. A
chunked dataset is read by h5py. References to other files are never followed: an untrusted link
could name any file that the user can read. Virtual datasets are rejected for the same reason, and
because HDF5 hangs on some damaged ones.

Format: https://support.hdfgroup.org/documentation/hdf5/latest/_f_m_t3.html
"""

from __future__ import annotations

import contextlib
import io
from typing import TYPE_CHECKING, Any, Final

import h5py

from fastvgg.choices import suggest
from fastvgg.datasets.base import Header, check_dtype, check_shape
from fastvgg.datasets.contiguous import ContiguousSource, ContiguousTarget
from fastvgg.datasets.files import open_regular
from fastvgg.datasets.hdf5_chunks import ChunkError, StoredChunks
from fastvgg.datasets.hdf5_file import open_hdf5
from fastvgg.datasets.index import read_index
from fastvgg.errors import SourceError, StoppedError, TargetError, option
from fastvgg.transform import storage_dtype

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from fastvgg.datasets.base import MissingChunks
    from fastvgg.storage.local import Storage
    from fastvgg.storage.location import Location
    from fastvgg.transform import Layout

MAX_LINKS: Final = 64
# A longer name does not fit into a new group; HDF5 would then write it after the array.
MAX_NAME_BYTES: Final = 128
MAX_GROUPS: Final = 64
MAX_NAMES_SHOWN: Final = 10
MAX_VALUE_CHARACTERS: Final = 40
# What h5py raises for HDF5 errors. HDF5 itself barely validates what a damaged file claims.
HDF5_ERRORS: Final = (KeyError, OSError, RuntimeError, ValueError)
# Alignment of the array in a new file, which speeds up kernels and disk writes.
ALIGNMENT_BYTES: Final = 64


class Hdf5Source(ContiguousSource):
    """An array within an HDF5 file.

    Parameters
    ----------
    location
        The file and the dataset's name.
    layout
        The layout of the array.
    use_index
        Whether the index next to the file describes this dataset.
    missing_chunks
        Whether chunks that were never written are an error, or the fill value.

    Raises
    ------
    SourceError
        If the file is damaged or open for writing elsewhere, if the name does not exist or refers
        to another file, or if it is not a completely written array of rank 4.
    """

    kind = "hdf5"

    def __init__(
        self,
        location: Location,
        *,
        layout: Layout = "NHWC",
        use_index: bool = True,
        missing_chunks: MissingChunks = "error",
    ) -> None:
        super().__init__(location)
        self._chunks: StoredChunks | None = None
        with contextlib.ExitStack() as stack:
            stack.callback(self._file.close)
            try:
                self._hdf5, reader = stack.enter_context(open_hdf5(self._file))
            except OSError as error:
                raise SourceError(
                    f"{self.path} cannot be opened: {error}",
                    "if another process is writing the file, wait for it to end; otherwise replace "
                    "the file with an intact copy",
                ) from None
            try:
                self._dataset = self._find(location.inner.encode(errors="surrogateescape"))
                self._validate(layout, missing_chunks)
                if self._chunks is not None:
                    reader.allow(self._chunks.max_stored_bytes)
            except HDF5_ERRORS as error:
                raise self._damaged_error(f"HDF5 reports {str(error)!r}") from None
            self.records = read_index(self.path, self.header.images) if use_index else ()
            self._opened_bytes = self._file_bytes()
            self._open_files = stack.pop_all()

    def _find(self, name: bytes) -> h5py.Dataset:
        """Return a dataset, following only links within the file.

        Raises
        ------
        SourceError
            If there is no dataset of that name, or a link refers to another file.
        """
        node: object = self._hdf5
        parts = _split_name(name)
        for _ in range(MAX_LINKS + len(parts)):
            if not parts:
                break
            part = parts.pop(0)
            if not isinstance(node, h5py.Group) or b"\0" in part or not node.id.links.exists(part):
                node = None
                break
            link_type, links = node.id.links.get_info(part).type, h5py.h5l
            if link_type == links.TYPE_HARD:
                node = node[part]
            elif link_type == links.TYPE_SOFT:
                target = node.id.links.get_val(part)
                parts[:0] = _split_name(target)
                node = self._hdf5 if target.startswith(b"/") else node
            else:
                raise self._external_error(f"{_display(part)} is a link to another file")
        if parts or not isinstance(node, h5py.Dataset):
            first = _dataset_names(self._hdf5, max_names=MAX_NAMES_SHOWN)
            file, names = self.path, ", ".join(map(_display, first)) or "none"
            problem = (
                f"{file} has no dataset {_display(name)}." if name else f"{file}: which dataset?"
            )
            known = [each.decode(errors="backslashreplace") for each in first]
            meant = suggest("dataset", name.decode(errors="backslashreplace"), known)
            remedy = f"give one of them: {file}::/NAME"
            if meant is not None:
                remedy = f"did you mean {file}::{meant}? {remedy}"
            raise SourceError(f"{problem} Datasets: {names}", remedy)
        return node

    def _external_error(self, reason: str) -> SourceError:
        return SourceError(
            f"{self.location} refers to another file: {reason}",
            "give the dataset in the file that stores it, or copy it into a separate file: "
            "h5repack, or h5py's copy(..., expand_external=True)",
        )

    def _validate(self, layout: Layout, missing_chunks: MissingChunks) -> None:
        dataset = self._dataset
        self._check_stored_here()  # first: HDF5 opens other files to determine a virtual shape
        check_shape(self.location, dataset.shape or (), self._displayed_dtype())
        self.header = Header(dataset.shape, self._dtype_name(), layout)
        self._check_filters()
        self._check_written(missing_chunks)
        self.stored_bytes = dataset.id.get_storage_size()
        if self._chunks is not None:
            self.read_granularity = min(dataset.chunks[0], dataset.shape[0])
            self.decoded_image_bytes = -(-self._chunks.chunk_bytes // self.read_granularity)
        offset = dataset.id.get_offset()
        # Elements of a different byte order are converted by HDF5.
        self.has_random_access = offset is not None and self._has_type(self.header.dtype)
        self._offset = offset or 0
        if self.has_random_access and self.stored_bytes != self.header.nbytes:
            raise self._damaged_error(
                f"it claims {self.stored_bytes} bytes for an array of {self.header.nbytes}"
            )

    def _dtype_name(self) -> str:
        if self._has_type("bfloat16"):
            return "bfloat16"
        try:
            dtype, name = self._dataset.dtype, self._dataset.dtype.name
        except (TypeError, ValueError) as error:  # NumPy has no equivalent
            return check_dtype(self.location, "", error, self._dataset.shape)
        return check_dtype(self.location, name, dtype, self._dataset.shape)

    def _displayed_dtype(self) -> str:
        try:
            return str(self._dataset.dtype)
        except (TypeError, ValueError):  # NumPy has no equivalent
            return "unknown"

    def _has_type(self, name: str) -> bool:
        """Whether stored elements have the same representation as those of a dtype in memory."""
        return bool(self._dataset.id.get_type().equal(_hdf5_type(name)))

    def _check_stored_here(self) -> None:
        """Check that the dataset stores its elements itself."""
        properties = self._dataset.id.get_create_plist()
        if properties.get_external_count():
            name = properties.get_external(0)[0]
            raise self._external_error(f"its data is in {_display(name)}")
        if properties.get_layout() == h5py.h5d.VIRTUAL:
            raise SourceError(
                f"{self.location} is a virtual dataset: other datasets store its images",
                "give these datasets, or copy the images into a regular one: h5repack -l CONTI",
            )

    def _check_filters(self) -> None:
        """Check that the filters which compress the chunks are available."""
        properties = self._dataset.id.get_create_plist()
        for code, _, _, name in map(properties.get_filter, range(properties.get_nfilters())):
            if not h5py.h5z.filter_avail(code):
                raise SourceError(
                    f"{self.location} is compressed with filter {code}, {_display(name)}, which is "
                    "not available to HDF5",
                    "install it, for example with pip install hdf5plugin, and set HDF5_PLUGIN_PATH "
                    "to hdf5plugin.PLUGIN_PATH; or store the dataset without it",
                )

    def _check_written(self, missing_chunks: MissingChunks) -> None:
        """Check that all chunks were written: HDF5 reads missing ones as the fill value."""
        dataset, expected = self._dataset, 1
        missing = int(dataset.id.get_storage_size() == 0)
        if dataset.chunks:
            try:
                self._chunks = StoredChunks(dataset, self._file_bytes())
            except ChunkError as error:
                raise self._damaged_error(str(error)) from None
            missing, expected = self._chunks.missing, self._chunks.expected
        if not missing:
            return
        value = str(dataset.fillvalue)[:MAX_VALUE_CHARACTERS]
        found = f"{missing} of {expected} chunks were never written"
        if missing_chunks == "error":
            raise SourceError(
                f"{self.location}: {found}, and would be read as {value}",
                "finish writing the dataset; or, if all of their pixels should be "
                f"{value}, give {option('missing_chunks', 'fill')}",
            )
        properties = dataset.id.get_create_plist()
        is_undefined = properties.fill_value_defined() == h5py.h5d.FILL_VALUE_UNDEFINED
        if is_undefined or properties.get_fill_time() == h5py.h5d.FILL_TIME_NEVER:
            raise SourceError(
                f"{self.location}: {found}, and the dataset has no fill value for them",
                "finish writing the dataset",
            )
        self.missing_chunks = missing_chunks
        self.notes = [f"{found}: their pixels are the fill value {value}"]

    def _damaged_error(self, problem: str) -> SourceError:
        return SourceError(
            f"{self.location} is damaged: {problem}", "replace the file with an intact copy"
        )

    def read_into(self, start: int, out: NDArray[Any]) -> None:
        if self.has_random_access:
            super().read_into(start, out)
            return
        try:
            chunks = self._chunks
            if chunks is not None and chunks.is_inflatable and self._has_type(self.header.dtype):
                chunks.inflate(start, out)
            else:
                self._read_with_hdf5(start, out)
        except (OSError, ChunkError) as error:
            raise StoppedError(
                f"{self.location}: images {start} to {start + len(out) - 1} cannot be read: "
                f"{error}",
                "fix the cause and rerun the same command; if a chunk is damaged, replace the file "
                "with an intact copy and start over",
            ) from None
        if self._file_bytes() < self._opened_bytes:  # HDF5 reads zeros beyond the end of the file
            raise self._truncated_error(self._file_bytes())

    def _read_with_hdf5(self, start: int, out: NDArray[Any]) -> None:
        if self._chunks is not None:
            self._chunks.check_decoded_bytes(start, start + len(out))
        selection = self._dataset.id.get_space()
        selection.select_hyperslab((start, 0, 0, 0), out.shape)
        memory_space = h5py.h5s.create_simple(out.shape)
        # h5py has no in-memory type for bfloat16; the type in the file is identical.
        memory_type = self._dataset.id.get_type() if self.header.dtype == "bfloat16" else None
        self._dataset.id.read(memory_space, selection, out, memory_type)

    def close(self) -> None:
        self._open_files.close()


def list_datasets(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Return name, shape and dtype of the first datasets of a file, and how many more there are.

    Links are not followed, and the shape of a virtual dataset is not read, because HDF5 opens other
    files for that.

    Raises
    ------
    SourceError
        If HDF5 cannot read the file.
    """
    try:
        with open_regular(path) as opened, open_hdf5(opened) as (file, _):
            names = _dataset_names(file)
            shown = [_describe_dataset(file[name], name) for name in names[:MAX_NAMES_SHOWN]]
    except HDF5_ERRORS as error:
        raise SourceError(
            f"{path} cannot be read: HDF5 reports {str(error)!r}",
            "if another process is writing the file, wait for it to end; otherwise replace the "
            "file with an intact copy",
        ) from None
    return shown, len(names) - len(shown)


def _dataset_names(file: h5py.File, max_names: int | None = None) -> list[bytes]:
    """Return the names of the datasets of a file, or of the first few."""
    names: list[bytes] = []

    def visit(name: bytes) -> bool | None:
        if h5py.h5o.get_info(file.id, name).type == h5py.h5o.TYPE_DATASET:
            names.append(b"/" + name)
        return len(names) == max_names or None

    h5py.h5o.visit(file.id, visit)
    return names


def _describe_dataset(dataset: h5py.Dataset, name: bytes) -> dict[str, Any]:
    described = {"name": name.decode(errors="replace")}
    if dataset.id.get_create_plist().get_layout() == h5py.h5d.VIRTUAL:
        return {**described, "virtual": True, "images": False}
    shape = [int(length) for length in dataset.shape or ()]
    is_image_batch = len(shape) == 4 and 3 in (shape[1], shape[3])
    try:
        dtype = "bfloat16" if dataset.id.get_type().equal(_hdf5_type("bfloat16")) else dataset.dtype
    except (TypeError, ValueError):  # NumPy has no equivalent
        dtype = "unknown"
    return {**described, "shape": shape, "dtype": str(dtype), "images": is_image_batch}


class Hdf5Target(ContiguousTarget):
    """A contiguous dataset, `FILE.h5::/NAME`, in a new HDF5 file that contains nothing else."""

    def __init__(self, location: Location, header: Header, storage: Storage) -> None:
        self._location = location
        super().__init__(location.container, header, storage, _preamble(location.inner, header))

    def open_published(self) -> Hdf5Source:
        return Hdf5Source(self._location, layout=self.header.layout)


def check_dataset_name(location: Location) -> None:
    """Check that a new dataset can have the name in a location.

    Raises
    ------
    TargetError
        If it is missing, not printable, too long, or nested too deeply.
    """
    name = location.inner
    if not name:
        problem = "the location does not name a dataset in the file"
    elif "\0" in name or not name.isprintable():
        problem = f"invalid dataset name {name!r}"
    elif max(len(part.encode()) for part in name.split("/")) > MAX_NAME_BYTES:
        problem = f"a component of the dataset's name has more than {MAX_NAME_BYTES} bytes"
    elif name.count("/") > MAX_GROUPS:
        problem = f"the dataset is nested in more than {MAX_GROUPS - 1} groups"
    else:
        return
    file = location.container
    raise TargetError(f"{file}: {problem}", f"give a valid name, for example {file}::/images")


def _hdf5_type(name: str) -> h5py.h5t.TypeID:
    if name != "bfloat16":
        return h5py.h5t.py_create(storage_dtype(name).newbyteorder("<"))
    bfloat16 = h5py.h5t.IEEE_F16LE.copy()
    sign, exponent, exponent_bits, mantissa, mantissa_bits = 15, 7, 8, 0, 7
    bfloat16.set_fields(sign, exponent, exponent_bits, mantissa, mantissa_bits)
    bfloat16.set_ebias(127)
    return bfloat16


def _split_name(name: bytes) -> list[bytes]:
    return [part for part in name.split(b"/") if part not in (b"", b".")]


def _display(name: bytes) -> str:
    """Return a name escaped for a message: it may contain arbitrary bytes."""
    return repr(name.decode(errors="backslashreplace"))


def _preamble(name: str, header: Header) -> bytes:
    """Return what HDF5 writes before the array of a file that contains nothing else.

    HDF5 allocates the array's space here, and never writes to it.
    """
    buffer = io.BytesIO()
    alignment = {"alignment_threshold": 1, "alignment_interval": ALIGNMENT_BYTES}
    with h5py.File(buffer, "w", libver=("v108", "v108"), **alignment) as file:
        properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        properties.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
        properties.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
        properties.set_obj_track_times(False)  # for reproducible bytes
        links = h5py.h5p.create(h5py.h5p.LINK_CREATE)
        links.set_create_intermediate_group(True)
        links.set_char_encoding(h5py.h5t.CSET_UTF8)
        space = h5py.h5s.create_simple(header.shape)
        dtype = _hdf5_type(header.dtype)
        dataset = h5py.h5d.create(file.id, name.encode(), dtype, space, properties, links)
        offset = int(dataset.get_offset())
    preamble = buffer.getvalue()
    if len(preamble) > offset:
        raise RuntimeError(f"HDF5 wrote {len(preamble)} bytes, but the array starts at {offset}")
    return preamble.ljust(offset, b"\0")
