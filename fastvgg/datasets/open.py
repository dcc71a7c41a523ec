"""Open datasets: `open_source` and `open_target` select the format from the location.

A directory contains images, a Zarr array, or an array in parts (part-*.npy). A name ending in .tar,
or a range of such names, is one or more tar shards of images. Any other file is a .npy or HDF5 file
if it begins like one, whatever its name. The suffix of a target selects its format.
"""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, Any, Final, cast

from fastvgg.datasets import signatures
from fastvgg.datasets.folders import ImageFolder
from fastvgg.datasets.formats import SOURCES
from fastvgg.datasets.image_writer import FileFormat, ImageFolderTarget
from fastvgg.datasets.npy import NpySource, NpyTarget, PartitionedNpySource, part_names
from fastvgg.datasets.tar import TarShards, is_tar_name
from fastvgg.errors import SourceError, TargetError, option, option_name
from fastvgg.fork_lock import fork_lock
from fastvgg.imaging import resize
from fastvgg.imaging.decode import DecodeOptions, Decoder
from fastvgg.storage.local import Storage
from fastvgg.storage.location import Location
from fastvgg.storage.objects import ObjectStorage

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from fastvgg.datasets.base import ArraySource, Header, ImageRecord, MissingChunks, Target
    from fastvgg.datasets.images import ImageListing, ImageSource
    from fastvgg.imaging.resize import Gather
    from fastvgg.transform import Layout, Transform

IMAGE_SOURCES: Final[dict[str, type[ImageSource]]] = {"images": ImageFolder, "tar": TarShards}
DEFAULT_DECODING_BYTES: Final = 512 * 2**20
ARRAY_FORMATS: Final = {".npy": "npy", ".h5": "hdf5", ".hdf5": "hdf5", ".zarr": "zarr"}
ZARR_METADATA: Final = ("zarr.json", ".zarray", ".zgroup")


def open_source(
    location: Location,
    *,
    layout: Layout = "NHWC",
    dtype_hint: str | None = None,
    decoding: DecodeOptions | None = None,
    decoding_bytes: int = DEFAULT_DECODING_BYTES,
    threads: int = 1,
    gather: Gather = resize.gather,
    listing: ImageListing | None = None,
    use_index: bool = True,
    follow_links: bool = True,
    missing_chunks: MissingChunks = "error",
) -> ImageSource | ArraySource:
    """Open a dataset for reading. Reads headers but no pixels.

    Parameters
    ----------
    location
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
        Whether to read the index next to an array. The one next to an HDF5 file may describe
        another dataset of the file.
    follow_links
        Whether links below a directory of images or of part-*.npy are followed.
    missing_chunks
        Whether chunks that a Zarr or HDF5 array does not store are an error, or its fill value.

    Raises
    ------
    SourceError
        If the path is missing, empty, damaged, or in an unsupported format.
    """
    kind = source_format(location)
    if missing_chunks != "error" and not SOURCES[kind].has_chunks:
        raise SourceError(
            f"{location} has no chunks, but {option('missing_chunks', missing_chunks)} applies to "
            "Zarr and HDF5 arrays",
            "omit it",
        )
    if kind not in IMAGE_SOURCES:
        return _open_array(
            location,
            kind,
            layout,
            dtype_hint,
            decoding,
            missing_chunks,
            use_index=use_index,
            follow_links=follow_links,
        )
    if layout != "NHWC":
        raise SourceError(
            f"{location} contains images, which are NHWC, not {layout}",
            f"omit {option_name('layout')}",
        )
    decoding = decoding or DecodeOptions()
    decoder = Decoder(decoding, memory_bytes=decoding_bytes, threads=threads, gather=gather)
    path = location.container
    return IMAGE_SOURCES[kind](
        path, decoding, decoder, threads=threads, listing=listing, follow_links=follow_links
    )


def source_format(location: Location) -> str:
    """Return the format of an existing dataset: that of a source's `kind`."""
    kind = ARRAY_FORMATS.get(location.container.suffix.lower())
    if location.is_remote and kind not in (None, "zarr"):
        raise SourceError(
            f"{location}: only Zarr arrays can be read from a store",
            "download the file and give its local path",
        )
    if location.is_remote or _is_zarr(location):
        return "zarr"
    if _is_directory(location):
        return "parts" if part_names(location.container) else "images"
    exists = os.path.lexists(location.container)
    is_tar = not location.inner and is_tar_name(location.container)
    if is_tar and (exists or "{" in str(location)):  # or a range
        return signatures.array_format(location.container) or "tar"
    if not exists:
        raise _missing_error(location)
    return _file_format(location, kind)


def _missing_error(location: Location) -> SourceError:
    """Return the error for a missing path, which may be a file and a name after a colon."""
    remedy = "check the path; nothing was written"
    file, colon, name = str(location.container).rpartition(":")
    path = type(location.container)(file.removesuffix(":"))
    if not location.inner and colon and os.path.isfile(path):  # noqa: PTH113  # as above
        signatures.check_not_foreign(Location(path))
        remedy = f"{path} exists, but has no datasets: give it without ::{name}"
        if signatures.array_format(path) == "hdf5":
            remedy = f"did you mean {path}::/{name.lstrip('/')}? check the path"
    return SourceError(f"{location} does not exist", remedy)


def _file_format(location: Location, named_format: str | None) -> str:
    """Return the format of an existing file by its content, or else by its name."""
    path = location.container
    if os.path.isdir(path):  # noqa: PTH112  # Path.is_dir raises where a name is too long
        raise SourceError(
            f"{path} is a directory, but {location} names a dataset in an HDF5 file",
            f"give the directory without that name: {path}",
        )
    found = signatures.array_format(path)
    if found == "hdf5" or (found == "npy" and not location.inner):
        return found
    if found == "npy":
        raise SourceError(
            f"{path} is a .npy file, which contains a single array without a name",
            f"give it without a name: {path}",
        )
    signatures.check_not_foreign(location)
    if named_format == "hdf5" or (named_format == "npy" and not location.inner):
        return named_format  # the class of the format says what is wrong with the file
    if location.inner:
        raise SourceError(
            f"{path} is not an HDF5 file: it has no HDF5 signature",
            "check that it is complete; FILE::/NAME is a dataset in an HDF5 file",
        )
    if named_format == "zarr":
        raise SourceError(
            f"{path} is a file, but a Zarr array is a directory",
            "give the directory that contains zarr.json or .zarray",
        )
    raise SourceError(
        f"{location} is not a directory of images, a .npy, .zarr or HDF5 array, or a tar shard",
        "give one of these",
    )


def _given(decoding: DecodeOptions) -> list[str]:
    """Return the options of decoding that differ from their defaults, as the caller writes them."""
    defaults = DecodeOptions().to_dict()
    return [
        option(name, value) for name, value in vars(decoding).items() if value != defaults[name]
    ]


def _open_array(
    location: Location,
    kind: str,
    layout: Layout,
    dtype_hint: str | None,
    decoding: DecodeOptions | None,
    missing_chunks: MissingChunks,
    *,
    use_index: bool,
    follow_links: bool,
) -> ArraySource:
    if decoding not in (None, DecodeOptions()):
        raise SourceError(
            f"{location} is an array, but {' and '.join(_given(decoding))} applies only to "
            "image files",
            "omit it, or give the directory of images",
        )
    if not (follow_links or kind == "parts"):
        raise SourceError(
            f"{location} is an array, but {option('follow_links', value=False)} applies only to "
            "directories of images or of part-*.npy",
            "omit it",
        )
    path = location.container
    if kind == "hdf5":
        with _require_extra("hdf5", location):
            from fastvgg.datasets.hdf5 import Hdf5Source
        return Hdf5Source(
            location, layout=layout, use_index=use_index, missing_chunks=missing_chunks
        )
    if kind == "zarr":
        with _require_extra("zarr", location):
            from fastvgg.datasets.zarr import ZarrSource
        return ZarrSource(path, layout=layout, use_index=use_index, missing_chunks=missing_chunks)
    if kind == "parts":
        return PartitionedNpySource(
            path,
            layout=layout,
            dtype_hint=dtype_hint,
            use_index=use_index,
            follow_links=follow_links,
        )
    return NpySource(path, layout=layout, dtype_hint=dtype_hint, use_index=use_index)


def hdf5_datasets(location: Location) -> tuple[list[dict[str, Any]], int]:
    """Return the first datasets of an HDF5 file as JSON types, and how many more there are.

    Raises
    ------
    SourceError
        If the file cannot be opened.
    """
    with _require_extra("hdf5", location):
        from fastvgg.datasets.hdf5 import list_datasets
    return list_datasets(location.container)


def embedded_transform(location: Location) -> Any:  # noqa: ANN401  # any JSON value
    """Return the transform recorded in an array's own metadata, as JSON types, or None.

    Raises
    ------
    SourceError
        If the array cannot be opened.
    """
    if not (location.is_remote or _is_zarr(location)):
        return None
    with _require_extra("zarr", location):
        from fastvgg.datasets.zarr import ZarrArray
    return ZarrArray(location.container).transform


def check_target_name(location: Location) -> None:
    """Check that a target's package is installed and that its format allows its name.

    Raises
    ------
    SourceError, TargetError
        If either is not the case.
    """
    kind = target_format(location)
    if kind == "zarr":
        with _require_extra("zarr", location):
            import zarr  # noqa: F401
    if kind == "hdf5":
        with _require_extra("hdf5", location):
            from fastvgg.datasets.hdf5 import check_dataset_name
        check_dataset_name(location)


@contextlib.contextmanager
def _require_extra(extra: str, location: Location) -> Iterator[None]:
    """Convert an ImportError of a format's package into an error that names the extra."""
    try:
        with fork_lock:
            yield
    except ImportError as error:
        raise SourceError(
            f"{location} requires a package that cannot be imported: {error}",
            f"in a clone of fastvgg: pip install '.[{extra}]'",
        ) from None


def _is_directory(location: Location) -> bool:
    return not location.inner and os.path.isdir(location.container)  # noqa: PTH112  # Path.is_dir raises where a name is too long


def _is_zarr(location: Location) -> bool:
    """Whether a location is the directory of a Zarr array or group."""
    if not _is_directory(location):
        return False
    path = location.container
    names = [os.path.join(path, name) for name in ZARR_METADATA]  # noqa: PTH118
    return path.suffix.lower() == ".zarr" or any(map(os.path.exists, names))


def target_format(location: Location) -> str:
    """Return the format that a target's name selects, a key of `formats.TARGETS`."""
    path = location.container
    kind = ARRAY_FORMATS.get(path.suffix.lower())
    if location.inner and kind != "hdf5":
        raise TargetError(
            f"{location}: a dataset with a name is written to a file that ends in .h5 or .hdf5",
            f"give {path.with_suffix('.h5')}::{location.inner}, or omit ::{location.inner}",
        )
    if kind is not None:
        return kind
    if path.suffix == "" or path.is_dir():
        return "images"
    raise TargetError(
        f"{location}: unsupported suffix {path.suffix!r}",
        "use a name ending in .npy or .zarr, or FILE.h5::/NAME, or a directory for restored "
        "image files",
    )


def open_target(
    location: Location,
    header: Header,
    storage: Storage | ObjectStorage | None = None,
    *,
    chunk_images: int,
    transform: Transform | None = None,
    records: Sequence[ImageRecord] = (),
    file_format: FileFormat = "png",
) -> Target:
    """Return the target at a location. Nothing is written before its `create`.

    Parameters
    ----------
    location, header
        Where the target is, and its shape, dtype and layout.
    storage
        Performs the durable I/O of a disk or a store, whichever the location is on. Default: one
        that syncs.
    chunk_images
        Number of images in a chunk of the run, and in a Zarr shard.
    transform
        Recorded in the array's metadata if the format supports that.
    records
        One per row, or none; they name the image files.
    file_format
        Format of the image files.
    """
    path = location.container
    kind = target_format(location)
    shards = {"chunk_images": chunk_images, "transform": transform}
    if location.is_remote:
        with _require_extra("zarr", location):
            from fastvgg.datasets.zarr_writer import StoreZarrTarget
        return StoreZarrTarget(
            path, header, cast("ObjectStorage", storage or ObjectStorage()), **shards
        )
    disk = cast("Storage", storage or Storage())
    if kind == "npy":
        return NpyTarget(path, header, disk)
    if kind == "hdf5":
        with _require_extra("hdf5", location):
            from fastvgg.datasets.hdf5 import Hdf5Target
        return Hdf5Target(location, header, disk)
    if kind == "zarr":
        with _require_extra("zarr", location):
            from fastvgg.datasets.zarr_writer import ZarrTarget
        return ZarrTarget(path, header, disk, **shards)
    return ImageFolderTarget(path, header, disk, records, file_format)
