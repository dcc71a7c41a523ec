"""Zarr arrays on disk, written and read by zarr-python alone, and what becomes of their files."""

from __future__ import annotations

import json

import zarr

ALL_WRITTEN = {"write_empty_chunks": True}


def save_zarr(path, array, **settings):
    """Write an array, with chunks of two images unless told otherwise."""
    settings = {"chunks": (2, *array.shape[1:]), "compressors": None, **settings}
    made = zarr.create_array(
        path, shape=array.shape, dtype=array.dtype, config=ALL_WRITTEN, **settings
    )
    made[...] = array
    return path


def load_zarr(path):
    return zarr.open_array(path, mode="r")[...]


def metadata_of(path):
    """The file with an array's metadata."""
    return next(path / name for name in ("zarr.json", ".zarray") if (path / name).exists())


def change_metadata(path, **fields):
    """Give fields of an array's metadata other values."""
    file = metadata_of(path)
    file.write_text(json.dumps({**json.loads(file.read_bytes()), **fields}))


def chunk_files(path):
    """The files of an array that hold numbers, in the order of their names."""
    metadata = ("zarr.json", ".zarray", ".zattrs")
    files = (file for file in path.rglob("*") if file.is_file() and file.name not in metadata)
    return sorted(files)


def key_of(path, file):
    return file.relative_to(path).as_posix()


def flip(file, bit):
    """Turn over one bit of a file."""
    content = bytearray(file.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    file.write_bytes(content)
