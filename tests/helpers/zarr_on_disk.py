"""Zarr arrays, written and read by zarr-python only, and damage to their files."""

from __future__ import annotations

import json

import zarr

ALL_WRITTEN = {"write_empty_chunks": True}


def save_zarr(path, array, **settings):
    """Write an array, by default in chunks of two images."""
    settings = {"chunks": (2, *array.shape[1:]), "compressors": None, **settings}
    stored = zarr.create_array(
        path, shape=array.shape, dtype=array.dtype, config=ALL_WRITTEN, **settings
    )
    stored[...] = array
    return path


def load_zarr(path):
    return zarr.open_array(path, mode="r")[...]


def metadata_of(path):
    """Return the file with the metadata of an array."""
    return next(path / name for name in ("zarr.json", ".zarray") if (path / name).exists())


def change_metadata(path, **fields):
    """Change fields of the metadata of an array."""
    file = metadata_of(path)
    file.write_text(json.dumps({**json.loads(file.read_bytes()), **fields}))


def chunk_files(path):
    """Return the chunks and shards of an array, sorted by name."""
    metadata = ("zarr.json", ".zarray", ".zattrs")
    files = (file for file in path.rglob("*") if file.is_file() and file.name not in metadata)
    return sorted(files)


def key_of(path, file):
    return file.relative_to(path).as_posix()


def flip(file, bit):
    """Flip one bit of a file."""
    content = bytearray(file.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    file.write_bytes(content)
