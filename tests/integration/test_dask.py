"""Dask arrays: lazy, and the in-memory results for any chunks."""

from __future__ import annotations

import dask
import dask.array as da
import numpy as np
import pytest

import fastvgg
import fastvgg.dask
from fastvgg.errors import DtypeError, ModeError, ShapeError, UsageError
from tests.helpers.batches import FLOATS, dtype_of
from tests.helpers.datasets_on_disk import check_error, network_inputs, pixels
from tests.helpers.samples import sampled

pytestmark = pytest.mark.pixels

CHUNKS = ((2, 3), (4, 3), (1, 8), (3,))


@pytest.fixture(autouse=True)
def _two_threads():
    with dask.config.set(scheduler="threads", num_workers=2):
        yield


def as_dask_array(batch, chunks=CHUNKS):
    batch.flags.writeable = False
    return da.from_array(batch, chunks=chunks)


@sampled("mode, dtype", ["caffe", "tf", "torch", "identity"], FLOATS, one_in=2)
def test_computed_dask_array_matches_the_in_memory_result(mode, dtype, backend):
    batch = pixels()
    actual = fastvgg.dask.preprocess(as_dask_array(batch), mode, dtype=dtype, backend=backend)
    expected = network_inputs(batch, mode, dtype=dtype)
    assert (actual.shape, actual.dtype, actual.chunks) == (batch.shape, dtype_of(dtype), CHUNKS)
    assert actual._meta.dtype == dtype_of(dtype)
    computed = actual.compute()
    assert computed.dtype == expected.dtype
    assert computed.tobytes() == expected.tobytes()
    if dtype in ("float32", "float64"):
        back = fastvgg.dask.restore(actual, mode, backend=backend)
        assert (back.dtype, back.chunks) == (np.uint8, CHUNKS)
        assert back.compute().tobytes() == batch.tobytes()


@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
@pytest.mark.parametrize("out_layout", ["NHWC", "NCHW"])
def test_chunks_follow_the_layout(layout, out_layout):
    interleaved = pixels()
    axes = {"NHWC": (0, 1, 2, 3), "NCHW": (0, 3, 1, 2)}
    batch = np.ascontiguousarray(interleaved.transpose(axes[layout]))
    chunks = tuple(CHUNKS[axis] for axis in axes[layout])
    options = {"layout": layout, "out_layout": out_layout}
    actual = fastvgg.dask.preprocess(as_dask_array(batch, chunks), "caffe", **options)
    assert actual.chunks == tuple(CHUNKS[axis] for axis in axes[out_layout])
    expected = fastvgg.preprocess(batch, "caffe", **options)
    assert actual.compute().tobytes() == expected.tobytes()
    back = fastvgg.dask.restore(actual, "caffe", layout=out_layout, out_layout=layout)
    assert back.compute().tobytes() == batch.tobytes()


def test_single_image_and_both_roundings_match_the_in_memory_result():
    image = pixels()[0] + np.float32(0.5)
    for rounding in ("nearest", "truncate"):
        actual = fastvgg.dask.restore(as_dask_array(image, (4, 5, 3)), "tf", rounding=rounding)
        assert actual.shape == image.shape
        expected = fastvgg.restore(image, "tf", rounding=rounding)
        assert actual.compute().tobytes() == expected.tobytes()


def test_unknown_chunk_lengths_are_supported():
    batch = pixels()
    lazy = as_dask_array(batch)
    some = lazy[da.from_array(np.array([True, False, True, True, False]), chunks=2)]
    assert np.isnan(some.shape[0])
    actual = fastvgg.dask.preprocess(some, "caffe").compute()
    assert actual.tobytes() == network_inputs(batch[[0, 2, 3]], "caffe").tobytes()


def test_nothing_is_computed_until_compute():
    def computed(block):
        raise AssertionError("computed")

    lazy = as_dask_array(pixels()).map_blocks(
        computed, dtype=np.uint8, meta=np.empty((0,) * 4, np.uint8)
    )
    fastvgg.dask.restore(fastvgg.dask.preprocess(lazy, "caffe"), "caffe")


def test_task_name_depends_on_input_and_arguments():
    lazy = as_dask_array(pixels())
    one = fastvgg.dask.preprocess(lazy, "caffe")
    assert one.name == fastvgg.dask.preprocess(lazy, "caffe").name
    assert one.name.startswith("preprocess-")
    others = [
        fastvgg.dask.preprocess(lazy, "tf"),
        fastvgg.dask.preprocess(lazy, "caffe", dtype="float64"),
        fastvgg.dask.preprocess(lazy, "caffe", out_layout="NCHW"),
        fastvgg.dask.preprocess(lazy + 1, "caffe"),
    ]
    assert len({one.name, *(other.name for other in others)}) == 5


def test_invalid_arguments_are_rejected_when_the_graph_is_built():
    batch = pixels()
    with pytest.raises(ShapeError) as caught:
        fastvgg.dask.preprocess(as_dask_array(batch, (5, 7, 9, 2)), "caffe")
    check_error(caught.value, "(2, 1)", "x.rechunk({3: -1})")
    with pytest.raises(ShapeError) as caught:
        fastvgg.dask.preprocess(
            as_dask_array(batch.transpose(0, 3, 1, 2), (5, 1, 7, 9)), "tf", layout="NCHW"
        )
    check_error(caught.value, "x.rechunk({1: -1})")
    with pytest.raises(ShapeError):
        fastvgg.dask.preprocess(as_dask_array(batch), "tf", layout="NCHW")
    with pytest.raises(DtypeError):
        fastvgg.dask.restore(as_dask_array(batch), "caffe")
    with pytest.raises(DtypeError):
        fastvgg.dask.preprocess(as_dask_array(batch.astype(np.int64)), "caffe")
    with pytest.raises(ModeError):
        fastvgg.dask.preprocess(as_dask_array(batch), "coffee")
    with pytest.raises(UsageError, match="ndarray"):
        fastvgg.dask.preprocess(batch, "caffe")
    with pytest.raises(UsageError, match="check_values is 'no'"):
        fastvgg.dask.preprocess(as_dask_array(batch), "caffe", check_values="no")


def test_suggested_rechunk_works():
    lazy = as_dask_array(pixels(), (5, 7, 9, 2)).rechunk({3: -1})
    assert fastvgg.dask.preprocess(lazy, "caffe").compute().tobytes() == (
        network_inputs(pixels(), "caffe").tobytes()
    )
