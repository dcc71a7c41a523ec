"""bind_rows: single rows match `apply`, from any number of threads."""

from __future__ import annotations

import gc
import itertools
import weakref

import numpy as np
import pytest

from fastvgg import engine, oracle
from fastvgg.engine import bind_rows
from fastvgg.errors import DtypeError, OutputError, ShapeError, UsageError
from fastvgg.parallel import parallel_for
from fastvgg.transform import Transform
from tests.helpers.batches import (
    FLOATS,
    LAYOUT_PAIRS,
    assert_same,
    dtype_of,
    frozen,
    in_layout,
    unaligned,
)
from tests.helpers.datasets_on_disk import pixels

pytestmark = pytest.mark.pixels


def images(layout="NHWC"):
    return frozen(np.ascontiguousarray(in_layout(pixels(5, height=7, width=11), layout)))


def empty_rows(transform, x, count=4):
    name = transform.output_type(x.dtype.name)
    out = np.empty((count, *transform.output_shape(x.shape)[1:]), dtype_of(name))
    out.view(np.uint8)[...] = 0xA5
    return out


@pytest.mark.parametrize(("layout", "out_layout"), LAYOUT_PAIRS)
@pytest.mark.parametrize("mode", ["caffe", "torch"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_row_matches_oracle_and_other_rows_are_not_written(
    backend, layout, out_layout, mode, dtype
):
    transform = Transform(mode, "preprocess", layout, out_layout, dtype)
    x = images(layout)
    out = empty_rows(transform, x)
    before = out.view(np.uint8).copy()
    bind_rows(transform, x, out, backend=backend)(3, 1)
    assert_same(out[1], oracle.apply(transform, x[3]))
    touched = out.view(np.uint8) != before
    assert not touched[[0, 2, 3]].any()


@pytest.mark.parametrize("dtype", FLOATS)
def test_rows_are_restored_from_unaligned_memory(backend, dtype):
    forward = Transform("tf", out_layout="NCHW", dtype=dtype)
    y = frozen(unaligned(oracle.apply(forward, images())))
    back = forward.inverse()
    out = empty_rows(back, y)
    bind_rows(back, y, out, backend=backend)(4, 0)
    assert_same(out[0], images()[4])


def test_packed_rows_equal_the_images(backend):
    transform = Transform("identity", "pack")
    out = empty_rows(transform, images())
    bind_rows(transform, images(), out, backend=backend)(2, 3)
    assert_same(out[3], images()[2])


@pytest.mark.parametrize("streams", [False, True])
def test_rows_can_be_written_concurrently(monkeypatch, streams):
    monkeypatch.setattr(engine, "MIN_NONTEMPORAL_BYTES", 0 if streams else 2**40)
    x = frozen(pixels(60, height=13, width=17))
    transform = Transform("caffe")
    out = empty_rows(transform, x, count=60)
    apply = bind_rows(transform, x, out)
    parallel_for(range(60), lambda row: apply(row, 59 - row), 8)
    assert_same(out[::-1].copy(), oracle.apply(transform, x))


@pytest.mark.compiled
def test_nontemporal_stores_are_used_only_for_large_row_outputs(monkeypatch):
    seen = []
    kernel_of = engine.bind_kernel

    def recording(plan, *, in_place, nontemporal):
        seen.append(nontemporal)
        return kernel_of(plan, in_place=in_place, nontemporal=nontemporal)

    monkeypatch.setattr(engine, "bind_kernel", recording)
    monkeypatch.setattr(engine, "MIN_NONTEMPORAL_BYTES", 5 * 7 * 11 * 3 * 4)
    for count in (4, 5):
        x, transform = images(), Transform("caffe")
        bind_rows(transform, x, empty_rows(transform, x, count), backend="numba")
    assert seen == [False, True]


class WeakReferableArray(np.ndarray):
    """An array that supports weak references."""


@pytest.mark.parametrize("side", [0, 1])
def test_bound_rows_keep_their_batches_alive(side):
    batches = [pixels(2), np.zeros((2, 7, 9, 3), np.float32)]
    batches = [batch.view(WeakReferableArray) for batch in batches]
    apply = bind_rows(Transform("caffe"), *batches)
    reference = weakref.ref(batches[side])
    del batches
    gc.collect()
    assert reference() is not None
    apply(0, 1)
    del apply
    gc.collect()
    assert reference() is None


def test_bind_rows_rejects_invalid_arguments_before_writing():
    transform, x = Transform("caffe"), images()
    out = empty_rows(transform, x)
    for refused, arguments in {
        ShapeError: (transform, x[..., :2].copy(), out),
        DtypeError: (transform, x.astype(np.int16), out),
        OutputError: (transform, x, out[:, :5].copy()),
        UsageError: (transform, x[:, ::2], np.empty((1, 4, 11, 3), np.float32)),
    }.items():
        with pytest.raises(refused):
            bind_rows(*arguments)
    read_only = out.copy()
    read_only.flags.writeable = False
    with pytest.raises(OutputError):
        bind_rows(transform, x, read_only)
    assert (out.view(np.uint8) == 0xA5).all()


def test_any_row_can_be_written_to_any_output_row():
    transform, x = Transform("torch", out_layout="NCHW"), images()
    out = empty_rows(transform, x, count=3)
    apply, expected = bind_rows(transform, x, out), oracle.apply(transform, x)
    for row, out_row in itertools.product(range(5), range(3)):
        apply(row, out_row)
        assert_same(out[out_row], expected[row])
