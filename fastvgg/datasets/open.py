"""Open datasets: `open_source` and `open_target` select the format from the path.

A directory contains images, or an array in parts (part-*.npy). A name ending in .tar, or a range of
such names, is one or more tar shards of images. A name ending in .npy or .zarr is an array, and so
is FILE.h5::/NAME.
"""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, Any, Final

from fastvgg.datasets.image_writer import FileFormat, ImageFolderTarget
from fastvgg.datasets.images import ImageFolder, ImageSource
from fastvgg.datasets.npy import NpySource, NpyTarget, PartitionedNpySource, part_names
from fastvgg.datasets.tar import TarShards, names_tar
from fastvgg.errors import SourceError, TargetError
from fastvgg.imaging import resize
from fastvgg.imaging.decode import DecodeOptions, Decoder
from fastvgg.storage.location import container_of, is_remote
from fastvgg.storage.objects import StoreStorage

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from fastvgg.datasets.base import ArraySource, Header, ImageRecord, Target
    from fastvgg.datasets.images import ImageListing
    from fastvgg.imaging.resize import Gather
    from fastvgg.storage.local import Storage
    from fastvgg.transform import Layout, Transform

IMAGE_SOURCES: Final[dict[str, type[ImageSource]]] = {"images": ImageFolder, "tar": TarShards}
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
    """Open a dataset for reading. Reads headers but no pixels.

    Parameters
    ----------
    path
        A directory of images, tar shards of images, a .npy file, a directory of part-*.npy, a Zarr
        array, or a dataset in an HDF5 file.
    layout
        The layout of an array; images are always NHWC.
    dtype_hint
        The storage dtype from the manifest, for a .npy header that cannot name it (bfloat16).
    decoding
        Decoding options for images; must be None or the defaults for an array.
    decoding_bytes
        Memory limit for decoding.
    threads
        Number of decoding threads.
    gather
        Nearest-neighbor resize function; see `imaging.resize.gather_function`.
    listing
        The listing of the images, if it is already known.
    use_index
        Whether the index next to an HDF5 file describes this dataset of the file.

    Raises
    ------
    SourceError
        If the path is missing, empty, damaged, or in an unsupported format.
    """
    kind = _source_format(path)
    if kind not in IMAGE_SOURCES:
        return _open_array(path, kind, layout, dtype_hint, decoding, use_index=use_index)
    if layout != "NHWC":
        raise SourceError(f"{path} contains images, which are NHWC, not {layout}", "omit --layout")
    decoding = decoding or DecodeOptions()
    decoder = Decoder(decoding, memory_bytes=decoding_bytes, threads=threads, gather=gather)
    return IMAGE_SOURCES[kind](path, decoding, decoder, threads=threads, listing=listing)


def _source_format(path: Path) -> str:
    """Return the format of an existing dataset: that of a source's `kind`."""
    kind = _array_format(path)
    if is_remote(path) and kind not in (None, "zarr"):
        raise SourceError(
            f"{path}: only Zarr arrays can be read from a store",
            "download the file and give its local path",
        )
    if is_remote(path) or _is_zarr(path):
        return "zarr"
    if _is_directory(path):
        return "parts" if part_names(path) else "images"
    if names_tar(container_of(path)):
        return "tar"
    if not os.path.lexists(container_of(path)):
        raise SourceError(f"{path} does not exist", "check the path; nothing was written")
    if kind is None:
        raise SourceError(
            f"{path} is not a directory of images, a .npy, .zarr or HDF5 array, or a tar shard",
            "for a single image, give the directory that contains it",
        )
    return kind


def _open_array(
    path: Path,
    kind: str,
    layout: Layout,
    dtype_hint: str | None,
    decoding: DecodeOptions | None,
    *,
    use_index: bool,
) -> ArraySource:
    if decoding not in (None, DecodeOptions()):
        raise SourceError(
            f"{path} is an array, but decoding options such as --size apply only to image files",
            "omit them, or give the directory of images",
        )
    if kind == "hdf5":
        with _installed("hdf5", path):
            from fastvgg.datasets.hdf5 import Hdf5Source
        return Hdf5Source(path, layout=layout, use_index=use_index)
    if kind == "zarr":
        with _installed("zarr", path):
            from fastvgg.datasets.zarr import ZarrSource
        return ZarrSource(path, layout=layout)
    if kind == "parts":
        return PartitionedNpySource(path, part_names(path), layout=layout, dtype_hint=dtype_hint)
    return NpySource(path, layout=layout, dtype_hint=dtype_hint)


def embedded_transform(path: Path) -> Any:  # noqa: ANN401  # any JSON value
    """Return the transform recorded in an array's own metadata, as JSON types, or None.

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
    """Check that a target's package is installed and that its format allows its name.

    Raises
    ------
    SourceError, TargetError
        If either is not the case.
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
    """Convert an ImportError of a format's package into an error that names the extra."""
    try:
        yield
    except ImportError as error:
        raise SourceError(
            f"{path} requires a package that cannot be imported: {error}",
            f"in a clone of fastvgg: pip install '.[{extra}]'",
        ) from None


def _is_directory(path: Path) -> bool:
    return os.path.isdir(path)  # noqa: PTH112  # Path.is_dir raises where a name is too long


def _is_zarr(path: Path) -> bool:
    """Whether a path is the directory of a Zarr array or group."""
    if not _is_directory(path):
        return False
    names = [os.path.join(path, name) for name in ZARR_METADATA]  # noqa: PTH118
    return path.suffix.lower() == ".zarr" or any(map(os.path.exists, names))


def target_format(path: Path) -> str:
    """Return the format that a target's name selects: "npy", "hdf5", "zarr" or "images"."""
    kind = _array_format(path)
    if kind is not None:
        return kind
    if path.suffix == "" or path.is_dir():
        return "images"
    raise TargetError(
        f"{path}: unsupported suffix {path.suffix!r}",
        "use a name ending in .npy or .zarr, or FILE.h5::/NAME, or a directory for restored "
        "image files",
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
    """Return the target at a path. Nothing is written before its `create`.

    Parameters
    ----------
    path, header, storage
        Where the target is, its shape and dtype, and the I/O layer that writes it.
    chunk_images
        Number of images in a chunk of the run; a Zarr shard holds as many.
    transform
        Recorded in the array's metadata if the format supports that.
    records
        One per row, or none; they name the image files.
    file_format
        Format of the image files.
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
