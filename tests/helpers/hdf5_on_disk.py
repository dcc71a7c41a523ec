"""HDF5 files, written and read by h5py only."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np

from fastvgg.storage.location import Location


def hdf5_type(name):
    """Return the HDF5 type of a dtype, built independently of the package."""
    if name != "bfloat16":
        return h5py.h5t.py_create(np.dtype(name).newbyteorder("<"))
    bfloat16 = h5py.h5t.IEEE_F32LE.copy()
    bfloat16.set_fields(15, 7, 8, 0, 7)
    bfloat16.set_precision(16)
    bfloat16.set_size(2)
    bfloat16.set_ebias(127)
    return bfloat16


def save_of_type(path, batch, stored_type, *, chunks=None, layout=None):
    """Write the bytes of a batch as a dataset of a given HDF5 type."""
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    if chunks:
        properties.set_chunk(chunks)
    if layout is not None:
        properties.set_layout(layout)
    with h5py.File(path, "w") as file:
        space = h5py.h5s.create_simple(batch.shape)
        dataset = h5py.h5d.create(file.id, b"images", stored_type, space, properties)
        dataset.write(h5py.h5s.ALL, h5py.h5s.ALL, batch, stored_type)
    return dataset_path(path)


def save_h5(path, batch, name="/images", *, file=(), **settings):
    """Write one dataset with h5py."""
    with h5py.File(path, "w", **dict(file)) as opened:
        opened.create_dataset(name, data=batch, **settings)
    return dataset_path(path, name)


def dataset_path(path, name="/images"):
    return Path(f"{path}::{name}")


def load_h5(location):
    with h5py.File(Location.parse(location).container, "r") as opened:
        return opened[Location.parse(location).inner][...]


def load_h5_bits(location):
    """Read a dataset of two-byte elements as unsigned integers."""
    with h5py.File(Location.parse(location).container, "r") as opened:
        dataset = opened[Location.parse(location).inner]
        out = np.empty(dataset.shape, "u2")
        dataset.id.read(h5py.h5s.ALL, h5py.h5s.ALL, out, dataset.id.get_type())
        return out
