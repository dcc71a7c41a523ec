"""From every format into every other: the same bytes as from .npy into .npy."""

from __future__ import annotations

import h5py
import numpy as np
import pytest
from batches import assert_same, every_value
from datasets_on_disk import images_in, load, plan_of, save_npy
from zarr_on_disk import load_zarr, save_zarr

import fastvgg

IMAGES = every_value()
ARRAYS = ("x.npy", "x.h5::/a/x", "x.zarr")
SOURCES = (*ARRAYS, "parts", "x-v2.zarr")


def save(directory, name, array):
    """Write an array as a source of a format, without fastvgg."""
    path = directory / name
    if name == "parts":
        path.mkdir()
        for row in range(len(array)):
            np.save(path / f"part-{row}.npy", array[row : row + 1])
    elif name.endswith(".zarr"):
        version = 2 if "v2" in name else 3
        save_zarr(path, array, chunks=(1, 3, 20, 3), zarr_format=version)
    elif "::/" in name:
        file, _, dataset = str(path).partition("::/")
        with h5py.File(file, "w") as made:
            made.create_dataset(dataset, data=array, chunks=(1, 3, 20, 3))
    else:
        save_npy(path, array)
    return path


def read(path):
    """Read an array without fastvgg."""
    if path.suffix == ".zarr":
        return load_zarr(path)
    if "::/" in str(path):
        file, _, dataset = str(path).partition("::/")
        with h5py.File(file) as made:
            return made[dataset][...]
    return load(path, "float32")


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """What a run from .npy into .npy makes of the images."""
    directory = tmp_path_factory.mktemp("npy")
    target = directory / "y.npy"
    source = save(directory, "x.npy", IMAGES)
    plan_of(source, target, mode="torch", out_layout="NCHW", together=1).run()
    return np.load(target)


@pytest.mark.parametrize("target", ["y.npy", "y.h5::/b/y", "y.zarr"])
@pytest.mark.parametrize("source", SOURCES)
def test_every_format_goes_into_every_other_and_comes_back(tmp_path, expected, source, target):
    settings = {"durability": "process", "together": 1}
    held = save(tmp_path, source, IMAGES)
    inputs = tmp_path / target
    plan_of(held, inputs, mode="torch", out_layout="NCHW", **settings).run()
    assert_same(read(inputs), expected)
    fastvgg.verify(inputs, full=True)
    for name in (*ARRAYS, "photos"):
        back = tmp_path / f"back-{name}"
        plan_of(inputs, back, direction="restore", **settings).run()
        if name == "photos":
            assert_same(np.stack([*images_in(back).values()]), IMAGES)
        else:
            assert_same(read(back), IMAGES)
