"""Chunks that an array does not store: an error, or its fill value if the user says so."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import closing

import h5py
import numpy as np
import pytest
import zarr

import fastvgg
from fastvgg.errors import SourceError, StoppedError, UsageError
from fastvgg.stream.info import info
from fastvgg.stream.manifest import read_manifest
from tests.helpers.batches import assert_same
from tests.helpers.checkout import checkout_environment
from tests.helpers.datasets_on_disk import (
    check_error,
    names_in,
    network_inputs,
    opened,
    pixels,
    plan_of,
    save_npy,
)
from tests.helpers.faults import InterruptedStorage, SimulatedCrash
from tests.helpers.hdf5_on_disk import dataset_path
from tests.helpers.runs import run
from tests.helpers.zarr_on_disk import change_metadata, chunk_files

FILL = 7


def sparse_pixels():
    """Return ten images, of which those of some chunks are full of the fill value."""
    batch = pixels(10)
    batch[2:4] = FILL
    batch[8:, :4] = FILL
    return batch


def save_sparse_zarr(path, *, fill_value=FILL, **settings):
    """Write an array as zarr does by default, without the chunks that equal the fill value."""
    settings = {"chunks": (2, 7, 9, 3), **settings}
    array = zarr.create_array(
        path, shape=(10, 7, 9, 3), dtype="uint8", fill_value=fill_value, **settings
    )
    array[...] = sparse_pixels()
    return path


def save_sparse_h5(path):
    with h5py.File(path, "w") as file:
        array = file.create_dataset(
            "images", (10, 7, 9, 3), "u1", chunks=(2, 7, 9, 3), fillvalue=FILL, compression="gzip"
        )
        for start in (0, 4, 6, 8):
            array[start : start + 2] = sparse_pixels()[start : start + 2]
    return dataset_path(path)


@pytest.mark.parametrize("save", [save_sparse_zarr, save_sparse_h5])
def test_batches_read_missing_chunks_on_request(tmp_path, save):
    save(tmp_path / "x.zarr" if save is save_sparse_zarr else tmp_path / "x.h5")
    location = f"{tmp_path}/x.zarr" if save is save_sparse_zarr else f"{tmp_path}/x.h5::/images"
    with pytest.raises(SourceError, match="chunks"):
        fastvgg.batches(location, 4)
    with pytest.raises(UsageError, match="missing_chunks"):
        fastvgg.batches(location, 4, missing_chunks="fil")
    for shuffle in (False, True):
        for images, _, rows in fastvgg.batches(location, 4, missing_chunks="fill", shuffle=shuffle):
            assert_same(images, sparse_pixels()[rows])


ARRAYS = {
    "zarr": lambda place: save_sparse_zarr(place / "x.zarr"),
    "zarr, v2": lambda place: save_sparse_zarr(place / "x.zarr", zarr_format=2),
    "zarr, split images": lambda place: save_sparse_zarr(place / "x.zarr", chunks=(2, 4, 9, 3)),
    "zarr, missing shards": lambda place: save_sparse_zarr(place / "x.zarr", shards=(2, 7, 9, 3)),
    "zarr, missing inner chunks": lambda place: save_sparse_zarr(
        place / "x.zarr", shards=(10, 7, 9, 3)
    ),
    "zarr, split shards": lambda place: save_sparse_zarr(
        place / "x.zarr", chunks=(2, 4, 9, 3), shards=(4, 8, 9, 3)
    ),
    "hdf5": lambda place: save_sparse_h5(place / "x.h5"),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_missing_chunks_are_rejected_or_read_as_the_fill_value(tmp_path, name):
    source, target = ARRAYS[name](tmp_path), tmp_path / "y.npy"
    with pytest.raises(SourceError) as caught:
        plan_of(source, target, mode="tf")
    check_error(caught.value, source, "7", "missing_chunks='fill'")
    assert "missing" in str(caught.value) or "never written" in str(caught.value)
    plan = plan_of(source, target, mode="tf", missing_chunks="fill", images_per_chunk=2)
    assert any("fill value 7" in note for note in plan.notes)
    plan.run()
    assert_same(np.load(target), network_inputs(sparse_pixels(), "tf"))
    assert read_manifest(target).job.missing_chunks == "fill"
    verified = fastvgg.verify(target, full=True)
    assert (verified.recomputed_images, verified.note) == (10, "")
    assert any("fill value 7" in note for note in info(source)["notes"])


@pytest.mark.parametrize("name", ["zarr", "hdf5"])
def test_command_line_fills_missing_chunks(tmp_path, name):
    paths = ARRAYS[name](tmp_path), tmp_path / "y.npy"

    def command(*options):
        return subprocess.run(
            [sys.executable, "-m", "fastvgg", "preprocess", *paths, "--mode", "tf", *options],
            env=checkout_environment(),
            capture_output=True,
            text=True,
            check=False,
        )

    refused = command()
    assert refused.returncode == 3
    assert "--missing-chunks fill" in refused.stderr
    assert command("--missing-chunks", "fill", "--quiet").returncode == 0
    assert_same(np.load(tmp_path / "y.npy"), network_inputs(sparse_pixels(), "tf"))


def test_unfinished_run_resumes_only_with_the_same_policy(tmp_path):
    source, target = ARRAYS["zarr"](tmp_path), tmp_path / "y.npy"
    settings = {"mode": "tf", "images_per_chunk": 2, "missing_chunks": "fill"}
    with pytest.raises(SimulatedCrash):
        run(plan_of(source, target, **settings), storage=InterruptedStorage(commits=2))
    with pytest.raises(SourceError, match="chunks are missing"):
        plan_of(source, target, mode="tf")
    resumed = plan_of(source, target, **settings)
    assert resumed.committed_chunks == 2
    resumed.run()
    assert_same(np.load(target), network_inputs(sparse_pixels(), "tf"))


def test_policy_is_recorded_only_if_something_is_missing(tmp_path):
    zarr.save_array(tmp_path / "x.zarr", pixels())
    plan = plan_of(tmp_path / "x.zarr", tmp_path / "y.npy", mode="tf", missing_chunks="fill")
    assert (plan.job.missing_chunks, plan.notes) == ("error", ())


def test_chunk_that_vanishes_during_the_run_is_never_filled(tmp_path):
    source = ARRAYS["zarr"](tmp_path)
    plan = plan_of(source, tmp_path / "y.npy", mode="tf", missing_chunks="fill", fsync=False)
    storage_removes = chunk_files(source)[-1]

    def remove(_progress):
        storage_removes.unlink(missing_ok=True)

    with pytest.raises(StoppedError) as caught:
        plan.run(remove)
    check_error(caught.value, source)
    assert not (tmp_path / "y.npy").exists()


def test_empty_chunk_is_damaged_and_not_filled(tmp_path):
    source = ARRAYS["zarr"](tmp_path)
    chunk_files(source)[0].write_bytes(b"")
    with pytest.raises(StoppedError, match="missing or empty"):
        plan_of(source, tmp_path / "y.npy", mode="tf", missing_chunks="fill").run()


def test_inner_chunk_that_vanishes_is_an_error(tmp_path):
    complete = tmp_path / "x.zarr"
    array = zarr.create_array(
        complete, shape=(10, 7, 9, 3), dtype="u1", chunks=(2, 7, 9, 3), shards=(10, 7, 9, 3)
    )
    array[...] = pixels(10)
    source = opened(complete)
    array[2:4] = 0
    with pytest.raises(StoppedError, match="1 of its inner chunks are missing"):
        source.read(0, 10)
    with pytest.raises(StoppedError, match="1 of its inner chunks are missing"):
        source.read(0, 2)


def test_null_fill_value_is_undefined(tmp_path):
    source = save_sparse_zarr(tmp_path / "x.zarr", zarr_format=2)
    change_metadata(source, fill_value=None)
    with pytest.raises(SourceError) as caught:
        plan_of(source, tmp_path / "y.npy", mode="tf", missing_chunks="fill")
    check_error(caught.value, source, "null", '"fill_value": 0')
    change_metadata(source, fill_value=0)  # as the message says
    plan_of(source, tmp_path / "y.npy", mode="tf", missing_chunks="fill").run()


def test_array_of_a_consolidated_group_is_filled(tmp_path):
    group = zarr.create_group(tmp_path / "g.zarr", zarr_format=2)
    save_sparse_zarr(tmp_path / "g.zarr" / "x", zarr_format=2)
    zarr.consolidate_metadata(group.store, zarr_format=2)
    source = opened(tmp_path / "g.zarr" / "x", missing_chunks="fill")
    assert_same(source.read(0, 10).batch, sparse_pixels())


@pytest.mark.parametrize("chunks", [None, (2, 7, 9, 3)])
def test_hdf5_without_any_data_is_its_fill_value(tmp_path, chunks):
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file.create_dataset("images", (3, 7, 9, 3), "u1", chunks=chunks, fillvalue=FILL)
    with closing(opened(dataset_path(tmp_path / "x.h5"), missing_chunks="fill")) as source:
        assert_same(source.read(0, 3).batch, np.full((3, 7, 9, 3), FILL, np.uint8))


def test_hdf5_without_a_fill_value_is_rejected(tmp_path):
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_chunk((2, 7, 9, 3))
    properties.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    with h5py.File(tmp_path / "x.h5", "w") as file:
        space = h5py.h5s.create_simple((4, 7, 9, 3))
        h5py.h5d.create(file.id, b"images", h5py.h5t.STD_U8LE, space, properties)
    with pytest.raises(SourceError) as caught:
        opened(dataset_path(tmp_path / "x.h5"), missing_chunks="fill")
    check_error(caught.value, "no fill value")


def test_option_is_rejected_where_there_are_no_chunks(tmp_path):
    save_npy(tmp_path / "x.npy", pixels())
    with pytest.raises(SourceError) as caught:
        plan_of(tmp_path / "x.npy", tmp_path / "y.npy", mode="tf", missing_chunks="fill")
    check_error(caught.value, "missing_chunks='fill'", "omit")
    with pytest.raises(UsageError, match="did you mean missing_chunks='fill'"):
        plan_of(tmp_path / "x.npy", tmp_path / "y.npy", mode="tf", missing_chunks="Fill")
    assert names_in(tmp_path) == ["x.npy"]


def test_manifest_with_another_policy_is_rejected(tmp_path):
    source, target = ARRAYS["zarr"](tmp_path), tmp_path / "y.npy"
    plan_of(source, target, mode="tf", missing_chunks="fill").run()
    path = tmp_path / "y.npy.fastvgg.json"
    fields = json.loads(path.read_bytes())
    fields["job"]["source"]["missing_chunks"] = "guess"
    path.write_text(json.dumps(fields))
    with pytest.raises(SourceError, match="neither error nor fill"):
        fastvgg.verify(target)
