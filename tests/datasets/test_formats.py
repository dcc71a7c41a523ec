"""Every format into every other: the bits are those of a .npy, and they come back."""

from __future__ import annotations

import h5py
import numpy as np
import pytest
import zarr

import fastvgg
from fastvgg import oracle
from fastvgg.datasets.open import open_source
from fastvgg.storage.location import Location
from tests.helpers.datasets_on_disk import images_in, pixels, plan_of, save_npy

BATCH = pixels(7, height=5, width=9)
INPUTS = oracle.apply(fastvgg.Transform("caffe"), BATCH)


def parts(directory, data):
    directory.mkdir()
    for number, part in enumerate((data[:2], data[2:3], data[3:])):
        np.save(directory / f"part-{number}.npy", part)
    return directory


def hdf5(path, data):
    with h5py.File(path, "w") as file:
        file["x"] = data
    return f"{path}::/x"


def chunked(path, data):
    with h5py.File(path, "w") as file:
        file.create_dataset("x", data=data, chunks=(3, 5, 9, 3), compression="gzip")
    return f"{path}::/x"


def zarr_of(path, data, **settings):
    zarr.create_array(path, data=data, config={"write_empty_chunks": True}, **settings)
    return path


SOURCES = {
    "npy": lambda place, data: save_npy(place / "s.npy", data),
    "parts": lambda place, data: parts(place / "parts", data),
    "zarr": lambda place, data: zarr_of(place / "s.zarr", data, chunks=(2, 5, 9, 3)),
    "zarr 2": lambda place, data: zarr_of(
        place / "s.zarr", data, chunks=(3, 5, 4, 3), zarr_format=2
    ),
    "hdf5": lambda place, data: hdf5(place / "s.h5", data),
    "chunked hdf5": lambda place, data: chunked(place / "s.h5", data),
    "a store": lambda place, data: zarr_of(f"memory://{place}/s.zarr", data, chunks=(3, 5, 9, 3)),
}
TARGETS = {
    "npy": "t.npy",
    "zarr": "t.zarr",
    "hdf5": "t.h5::/a/x",
}


def read(target):
    source = open_source(Location.parse(target))
    batch = np.array(source.read(0, len(BATCH)).batch)
    source.close()
    return batch


@pytest.mark.parametrize("target", [*TARGETS, "a store"])
@pytest.mark.parametrize("source", SOURCES)
def test_the_bits_are_the_same_in_every_format_and_come_back(tmp_path, source, target):
    names = {**{kind: f"{tmp_path}/{name}" for kind, name in TARGETS.items()}}
    names["a store"] = f"memory://{tmp_path}/t.zarr"
    there, back = names[target], names[target].replace("/t.", "/back.")
    plan_of(SOURCES[source](tmp_path, BATCH), there, mode="caffe", together=3).run()
    actual = read(there)
    assert actual.dtype == np.float32
    assert actual.tobytes() == INPUTS.tobytes()
    plan_of(there, back, direction="restore", together=3).run()
    assert read(back).tobytes() == BATCH.tobytes()
    for name in (there, back):
        assert fastvgg.verify(name, full=True).recomputed_images == len(BATCH)


@pytest.mark.parametrize("source", SOURCES)
def test_network_inputs_of_others_are_restored_to_files(tmp_path, source):
    inputs = SOURCES[source](tmp_path, INPUTS)
    plan_of(inputs, tmp_path / "out", mode="caffe", direction="restore", together=3).run()
    images = images_in(tmp_path / "out")
    assert np.stack([images[name] for name in sorted(images)]).tobytes() == BATCH.tobytes()
