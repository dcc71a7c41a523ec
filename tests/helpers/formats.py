"""A description of every dataset format, for the contract tests of all sources and targets.

A new format needs one entry in `SOURCES` or `TARGETS`.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np
from PIL import Image

from fastvgg.datasets.base import ArraySource, byte_view
from fastvgg.datasets.image_writer import ImageFolderTarget
from fastvgg.storage import objects
from fastvgg.storage.location import Location
from tests.helpers.batches import assert_same
from tests.helpers.datasets_on_disk import load, save_images, save_npy
from tests.helpers.hdf5_on_disk import (
    hdf5_type,
    load_h5,
    load_h5_bits,
    save_h5,
    save_of_type,
)
from tests.helpers.tar_on_disk import png, save_tar
from tests.helpers.zarr_on_disk import load_zarr, save_zarr

if TYPE_CHECKING:
    from collections.abc import Callable

ARRAYS = ("uint8", "float16", "float32", "float64")
WITH_BFLOAT16 = (*ARRAYS, "bfloat16")
SECOND_NS = 10**9


@dataclass(frozen=True)
class SourceFormat:
    """A source format, and how to write it without fastvgg."""

    kind: str
    write: Callable[[Path, Any], Any]
    """Write a batch below a directory, and return the location to open."""
    stored_bytes: Callable[[Any], int]
    """The size of the pixel data of a location on disk."""
    dtypes: tuple[str, ...] = ARRAYS
    granularity: int = 1
    notes: tuple[str, ...] = ()
    has_index: bool = False
    """Whether an index next to the array gives its records."""

    @property
    def is_array(self) -> bool:
        return self.kind not in ("images", "tar")


@dataclass(frozen=True)
class TargetFormat:
    """A target format, and how to read it without fastvgg."""

    kind: str
    name: str
    """The location below a directory, or below the directory of a store."""
    load: Callable[[Any, str], Any]
    """Read a location as an array of a dtype, with the format's own library."""
    save: Callable[[Any, Any], Any]
    """Write a batch to a location as a foreign program would."""
    dtypes: tuple[str, ...] = ARRAYS
    is_remote: bool = False
    is_sharded: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    damages: dict[str, Callable[[Any], Any]] = field(default_factory=dict)
    """Damage to a partial target that a rerun must reject."""
    repairable_damages: dict[str, Callable[[Any], Any]] = field(default_factory=dict)
    """Damage to a partial target that a rerun must repair by recomputing."""

    @property
    def is_array(self) -> bool:
        return self.kind != "images"

    def location(self, directory: Path, name: str = "y") -> str:
        parent = f"memory://{directory}" if self.is_remote else f"{directory}"
        return f"{parent}/{self.name.replace('y', name, 1)}"


def container(location):
    """Return the file, directory or object store prefix that a location names."""
    return Location.parse(location).container


def files_of(location):
    """Return all files or objects of a dataset, sorted by name."""
    path = container(location)
    if Location.parse(location).is_remote:
        return [path / key for key in sorted(objects.list_objects(path))]
    if "{" in path.name:
        return sorted(path.parent.glob(path.name.replace("{0..1}", "[01]")))
    return sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]


def data_files(location):
    """Return the files that contain pixels."""
    metadata = ("zarr.json", ".zarray", ".zattrs")
    return [file for file in files_of(location) if file.name not in metadata]


def contents_of(location):
    return {str(file): file.read_bytes() for file in files_of(location)}


def replace_content(file, content):
    """Replace the content of a file and give it a later mtime, even if the clock is coarse."""
    changed_ns = file.stat().st_mtime_ns if isinstance(file, Path) else None
    file.write_bytes(content)
    if changed_ns is not None:
        os.utime(file, ns=(0, changed_ns + SECOND_NS))


def change_byte(file, at=-1):
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    replace_content(file, bytes(content))


def shorten(file, nbytes):
    replace_content(file, file.read_bytes()[:nbytes])


def overwrite_with_zeros(file, nbytes):
    replace_content(file, bytes(nbytes) + file.read_bytes()[nbytes:])


def grow(file):
    before_ns = file.stat().st_mtime_ns if isinstance(file, Path) else None
    file.write_bytes(file.read_bytes() + b"\0")
    if before_ns is not None:
        os.utime(file, ns=(0, before_ns))


CHANGES = {  # of a file
    "another byte": change_byte,
    "another mtime": lambda file: replace_content(file, file.read_bytes()),
    "one byte fewer": lambda file: shorten(file, -1),
    "one byte more with the same mtime": grow,
    "one byte more": lambda file: replace_content(file, file.read_bytes() + b"\0"),
}

REPLACEMENTS = {  # for a removed file
    "nothing": lambda path: None,
    "an empty file": lambda path: path.touch(),
    "a pipe": os.mkfifo,
    "a directory": lambda path: path.mkdir(),
    "a dangling link": lambda path: path.symlink_to("nowhere"),
    "a circular link": lambda path: path.symlink_to(path.name),
}


def total_bytes(location):
    return sum(len(content) for content in contents_of(location).values())


def _partitioned(directory, batch):
    parts = directory / "parts"
    parts.mkdir()
    for number, rows in enumerate((batch[:2], batch[2:3], batch[3:])):
        np.save(parts / f"part-{number}.npy", rows)
    return parts


def _contiguous(directory, batch):
    return save_of_type(directory / "x.h5", batch, hdf5_type(str(batch.dtype)))


def _chunked(directory, batch):
    chunks = (3, min(4, batch.shape[1]), *batch.shape[2:])
    return save_of_type(directory / "x.h5", batch, hdf5_type(str(batch.dtype)), chunks=chunks)


def _hdf5_bytes(location):
    with h5py.File(container(location)) as file:
        return file["images"].id.get_storage_size()


def _names(batch):
    return [f"{'ab'[2 * row // len(batch)]}/{row:02d}.png" for row in range(len(batch))]


def _folder(directory, batch):
    return save_images(directory / "photos", batch, _names(batch))


def _tar(directory, batch):
    images = map(png, batch)
    return save_tar(directory / "x.tar", [*zip(_names(batch), images, strict=True)])


def _shards(directory, batch):
    half = len(batch) // 2
    for number, rows in enumerate((batch[:half], batch[half:])):
        _tar(directory, rows).rename(directory / f"x-{number}.tar")
    return directory / "x-{0..1}.tar"


def _tar_bytes(location):
    """Return the total size of the images in tars without long names, from their headers."""
    total = 0
    for file in files_of(location):
        content, at = file.read_bytes(), 0
        while content[at : at + 1] != b"\0":
            nbytes = int(content[at + 124 : at + 135], 8)
            total, at = total + nbytes, at + 512 + -(-nbytes // 512) * 512
    return total


def _zarr(directory, batch, **settings):
    return save_zarr(directory / "x.zarr", batch, **settings)


SOURCES = {
    "npy": SourceFormat(
        "npy",
        lambda directory, batch: save_npy(directory / "x.npy", batch),
        total_bytes,
        WITH_BFLOAT16,
        has_index=True,
    ),
    "parts": SourceFormat("parts", _partitioned, total_bytes, WITH_BFLOAT16, notes=("3 parts",)),
    "hdf5": SourceFormat("hdf5", _contiguous, _hdf5_bytes, WITH_BFLOAT16, has_index=True),
    "chunked hdf5": SourceFormat(
        "hdf5", _chunked, _hdf5_bytes, WITH_BFLOAT16, granularity=3, has_index=True
    ),
    "zarr": SourceFormat("zarr", _zarr, total_bytes, granularity=2, has_index=True),
    "zarr version 2": SourceFormat(
        "zarr",
        lambda directory, batch: _zarr(
            directory, batch, zarr_format=2, chunks=(3, batch.shape[1], 2, batch.shape[3])
        ),
        total_bytes,
        granularity=3,
        has_index=True,
    ),
    "zarr in a store": SourceFormat(
        "zarr",
        lambda directory, batch: save_zarr(f"memory://{directory}/x.zarr", batch),
        total_bytes,
        granularity=2,
        has_index=True,
    ),
    "images": SourceFormat("images", _folder, total_bytes, ("uint8",)),
    "tar": SourceFormat("tar", _tar, _tar_bytes, ("uint8",)),
    "tar shards": SourceFormat("tar", _shards, _tar_bytes, ("uint8",)),
}


def _load_hdf5(location, dtype):
    return load_h5_bits(location) if dtype == "bfloat16" else load_h5(location)


def _load_images(location, dtype):
    return np.stack([np.asarray(Image.open(path)) for path in files_of(location)])


def _load_zarr(location, dtype):
    return load_zarr(location)


def _save_hdf5(location, batch):
    return save_h5(container(location), batch, Location.parse(location).inner)


FILE_DAMAGES = {
    "missing": lambda partial: partial.unlink(),
    "empty": lambda partial: os.truncate(partial, 0),
    "shorter": lambda partial: os.truncate(partial, partial.stat().st_size - 1),
}
ARRAY_BYTES = 11 * 7 * 9 * 3 * 4  # at the end of a file
ROW_DAMAGES = {
    "a flipped bit": lambda partial: change_byte(partial, 5 - ARRAY_BYTES),
    "a flipped bit of the last committed byte": lambda partial: change_byte(
        partial, 6 * ARRAY_BYTES // 11 - ARRAY_BYTES - 1
    ),
    "zeros at the start": lambda partial: overwrite_with_zeros(
        partial, partial.stat().st_size - ARRAY_BYTES + 9
    ),
}
IMAGE_DAMAGES = {
    "a missing file": lambda partial: sorted(partial.iterdir())[2].unlink(),
    "an empty file": lambda partial: os.truncate(sorted(partial.iterdir())[3], 0),
    "a shorter file": lambda partial: shorten(sorted(partial.iterdir())[5], -1),
    "a flipped bit": lambda partial: change_byte(min(partial.iterdir()), 40),
}
SHARD_DAMAGES = {
    "a missing shard": lambda partial: (partial / "c.0.0.0.0").unlink(),
    "an empty shard": lambda partial: (partial / "c.1.0.0.0").write_bytes(b""),
    "a shorter shard": lambda partial: shorten(partial / "c.0.0.0.0", -1),
    "zeros": lambda partial: (partial / "c.1.0.0.0").write_bytes(
        bytes(len((partial / "c.1.0.0.0").read_bytes()))
    ),
    "a flipped bit of the last byte": lambda partial: change_byte(partial / "c.1.0.0.0"),
    "a flipped bit": lambda partial: change_byte(partial / "c.1.0.0.0", 99),
    "another shard": lambda partial: (partial / "c.1.0.0.0").write_bytes(
        (partial / "c.0.0.0.0").read_bytes()
    ),
}
METADATA_DAMAGES = {
    "missing": shutil.rmtree,
    "missing metadata": lambda partial: (partial / "zarr.json").unlink(),
    "changed metadata": lambda partial: change_byte(partial / "zarr.json"),
}


def _images(file_format):
    return TargetFormat(
        "images",
        "y",
        _load_images,
        lambda location, batch: save_images(container(location), batch),
        ("uint8",),
        options={"file_format": file_format},
        damages={"missing": lambda partial: partial.rename(partial.with_name("moved"))},
        repairable_damages=IMAGE_DAMAGES,
    )


TARGETS = {
    "npy": TargetFormat(
        "npy",
        "y.npy",
        load,
        lambda location, batch: save_npy(container(location), batch),
        WITH_BFLOAT16,
        damages=FILE_DAMAGES,
        repairable_damages=ROW_DAMAGES,
    ),
    "hdf5": TargetFormat(
        "hdf5",
        "y.h5::/deep/images",
        _load_hdf5,
        _save_hdf5,
        WITH_BFLOAT16,
        damages=FILE_DAMAGES,
        repairable_damages=ROW_DAMAGES,
    ),
    "zarr": TargetFormat(
        "zarr",
        "y.zarr",
        _load_zarr,
        save_zarr,
        is_sharded=True,
        damages=METADATA_DAMAGES,
        repairable_damages=SHARD_DAMAGES,
    ),
    "zarr in a store": TargetFormat(
        "zarr",
        "y.zarr",
        _load_zarr,
        save_zarr,
        is_remote=True,
        is_sharded=True,
        repairable_damages=SHARD_DAMAGES,
    ),
    "png": _images("png"),
    "webp": _images("webp"),
}


def payload_of(target, batch):
    """Return the payload that a run passes to `Target.write` for a batch."""
    is_encoded = isinstance(target, ImageFolderTarget)
    return [*map(target.encode, batch)] if is_encoded else [byte_view(batch)]


def check_spans(source, expected):
    """Check reads of every span, into a new batch and into rows of a larger batch."""
    for start in range(len(expected)):
        for stop in range(start + 1, len(expected) + 1):
            assert_same(source.read(start, stop).batch, expected[start:stop])
            if isinstance(source, ArraySource):
                memory = np.full((stop - start + 2, *expected.shape[1:]), 77).astype(expected.dtype)
                source.read_into(start, memory[1:-1])
                assert_same(memory[1:-1], expected[start:stop])
                assert (memory[[0, -1]].astype(np.float32) == 77).all()
