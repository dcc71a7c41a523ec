"""The factory of datasets: `open_source` and `open_target` choose a format by its path.

A path decides so: a directory holds images, or
an array in parts, a name that ends in .tar, or a range of such names, is tar shards of images, and
one that ends in .npy or .zarr is an array, as is FILE.h5::/NAME.
"""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, Any, Final

from fastvgg.datasets.image_writer import FileFormat, ImageFolderTarget
from fastvgg.datasets.images import FolderImageListing, ImageFolder
from fastvgg.datasets.npy import NpySource, NpyTarget
from fastvgg.datasets.parts import PartitionedNpySource, part_names
from fastvgg.datasets.tar import TarListing, TarShards, names_tar
from fastvgg.errors import SourceError, TargetError
from fastvgg.imaging import resize
from fastvgg.imaging.decode import DecodeOptions, Decoder
from fastvgg.storage.location import container_of, is_remote
from fastvgg.storage.objects import StoreStorage

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from fastvgg.datasets.base import ArraySource, Header, ImageRecord, Target
    from fastvgg.datasets.images import ImageListing, ImageSource
    from fastvgg.imaging.resize import Gather
    from fastvgg.storage.local import Storage
    from fastvgg.transform import Layout, Transform

__all__ = [
    "check_target",
    "embedded_transform",
    "open_source",
    "open_target",
    "target_format",
]

DECODING_BYTES: Final = 512 * 2**20
ARRAY_FORMATS: Final = {".npy": "npy", ".h5": "hdf5", ".hdf5": "hdf5", ".zarr": "zarr"}
ZARR_METADATA: Final = ("zarr.json", ".zarray", ".zgroup")


def open_source(
    path: Path,
    *,
    layout: Layout = "NHWC",
    dtype_hint: str | None = None,
    decoding: DecodeOptions | None = None,
    decoding_bytes: int = DECODING_BYTES,
    threads: int = 1,
    gather: Gather = resize.gather,
    listing: ImageListing | None = None,
    use_index: bool = True,
) -> ImageSource | ArraySource:
    """Open a dataset for reading; headers are read, pixels are not.

    Parameters
    ----------
    path
        A directory of images, tar shards of them, a .npy file, a directory of part-*.npy, a Zarr
        array, or a dataset in an HDF5 file.
    layout
        The layout of an array; images are NHWC.
    dtype_hint
        The storage type of an array whose own header cannot name it (bfloat16), from its manifest.
    decoding
        How images are read; nothing may be said of that for an array.
    decoding_bytes
        How much memory may be taken for it.
    threads
        How many threads decode.
    gather
        The function that resizes to the nearest pixels; see `imaging.resize.gather_function`.
    listing
        Which images there are, where that is known from before.
    indexed
        Whether the index beside an HDF5 file is of this dataset in it.

    Raises
    ------
    SourceError
        If the path is missing, empty, damaged, or of no format that fastvgg reads.
    """
    if is_remote(path):
        if _array_format(path) not in (None, "zarr"):
            raise SourceError(
                f"{path}: of a store, Zarr arrays alone are read", "fetch it, and give the file"
            )
        return _array(path, "zarr", layout, dtype_hint, decoding)
    is_directory = _is_directory(path)
    if _is_zarr(path):
        return _array(path, "zarr", layout, dtype_hint, decoding)
    parts = part_names(path) if is_directory else []
    if not parts and (is_directory or names_tar(container_of(path))):
        if layout != "NHWC":
            raise SourceError(f"{path}: images have no layout {layout}", "leave --layout away")
        decoding = decoding or DecodeOptions()
        decoder = Decoder(decoding, memory_bytes=decoding_bytes, threads=threads, gather=gather)
        if is_directory:
            found = listing if isinstance(listing, FolderImageListing) else None
            return ImageFolder(path, decoding, decoder, threads=threads, listing=found)
        members = listing if isinstance(listing, TarListing) else None
        return TarShards(path, decoding, decoder, threads=threads, listing=members)
    if not os.path.lexists(container_of(path)):
        raise SourceError(f"{path} does not exist", "check the path; nothing was written")
    kind = "parts" if parts else _array_format(path)
    if kind is None:
        raise SourceError(
            f"{path} is neither a directory of images nor a .npy, .zarr or HDF5 file, "
            "nor tar shards",
            "for a single image give the directory that it is in",
        )
    return _array(path, kind, layout, dtype_hint, decoding, use_index=use_index)


def _array(
    path: Path,
    kind: str,
    layout: Layout,
    dtype_hint: str | None,
    decoding: DecodeOptions | None,
    *,
    use_index: bool = True,
) -> ArraySource:
    if decoding not in (None, DecodeOptions()):
        raise SourceError(
            f"{path} is an array, and --size and its like are for image files",
            "leave them away, or give the directory of images",
        )
    if kind == "parts":
        return PartitionedNpySource(path, part_names(path), layout=layout, dtype_hint=dtype_hint)
    if kind == "hdf5":
        with _installed("hdf5", path):
            from fastvgg.datasets.hdf5 import Hdf5Source
        return Hdf5Source(path, layout=layout, use_index=use_index)
    if kind == "zarr":
        with _installed("zarr", path):
            from fastvgg.datasets.zarr import ZarrSource
        return ZarrSource(path, layout=layout)
    return NpySource(path, layout=layout, dtype_hint=dtype_hint)


def embedded_transform(path: Path) -> Any:  # noqa: ANN401  # whatever is said
    """Return what an array itself says was done to it, as JSON types; None where it says nothing.

    Raises
    ------
    SourceError
        If the array cannot be opened.
    """
    if not (is_remote(path) or _is_zarr(path)):
        return None
    with _installed("zarr", path):
        from fastvgg.datasets.zarr import ZarrArray
    return ZarrArray(path).transform


def check_target(path: Path) -> None:
    """Refuse a target whose package is not installed, or whose name its format does not allow.

    Raises
    ------
    SourceError, TargetError
        Saying which it is.
    """
    kind = target_format(path)
    if kind == "zarr":
        with _installed("zarr", path):
            import zarr  # noqa: F401
    if kind == "hdf5":
        with _installed("hdf5", path):
            from fastvgg.datasets.hdf5 import check_name
        check_name(path)


@contextlib.contextmanager
def _installed(extra: str, path: Path) -> Iterator[None]:
    """Say what is to be installed where a package that a format needs cannot be imported."""
    try:
        yield
    except ImportError as error:
        raise SourceError(
            f"{path} needs a package that cannot be imported: {error}",
            f"install it: pip install 'fastvgg[{extra}]'",
        ) from None


def _is_directory(path: Path) -> bool:
    return os.path.isdir(path)  # noqa: PTH112  # Path.is_dir raises where a name is too long


def _is_zarr(path: Path) -> bool:
    """Whether a path is a directory that is an array or a group of Zarr."""
    if not _is_directory(path):
        return False
    names = [os.path.join(path, name) for name in ZARR_METADATA]  # noqa: PTH118
    return path.suffix.lower() == ".zarr" or any(map(os.path.exists, names))


def target_format(path: Path) -> str:
    """Return the format that a target's name asks for: "npy", "hdf5", "zarr" or "images"."""
    kind = _array_format(path)
    if kind is not None:
        return kind
    if path.suffix == "" or path.is_dir():
        return "images"
    raise TargetError(
        f"{path}: no format is known that ends in {path.suffix!r}",
        "give a name that ends in .npy or .zarr, or FILE.h5::/NAME, or a directory to restore "
        "image files into",
    )


def _array_format(path: Path) -> str | None:
    return ARRAY_FORMATS.get(container_of(path).suffix.lower())


def open_target(
    path: Path,
    header: Header,
    storage: Storage,
    *,
    chunk_images: int,
    transform: Transform | None = None,
    records: Sequence[ImageRecord] = (),
    file_format: FileFormat = "png",
) -> Target:
    """Return the target of a name; nothing is written before its `create`.

    `chunk_images` is how many are written together; `transform` is what was done to them, where the
    format can say it; `records` names the image files, one for each row, where they are known, and
    `file_format` is theirs.
    """
    kind = target_format(path)
    if kind == "npy":
        return NpyTarget(path, header, storage)
    if kind == "hdf5":
        with _installed("hdf5", path):
            from fastvgg.datasets.hdf5 import Hdf5Target
        return Hdf5Target(path, header, storage)
    if kind == "zarr":
        with _installed("zarr", path):
            from fastvgg.datasets.zarr_writer import StoreZarrTarget, ZarrTarget
        if isinstance(storage, StoreStorage):
            return StoreZarrTarget(
                path, header, storage, chunk_images=chunk_images, transform=transform
            )
        return ZarrTarget(path, header, storage, chunk_images=chunk_images, transform=transform)
    return ImageFolderTarget(path, header, storage, records, file_format)
