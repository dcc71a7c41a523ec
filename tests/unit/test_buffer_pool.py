"""Pooled memory: every view keeps the memory of its array, and nothing else does."""

from __future__ import annotations

import copy
import ctypes
import gc
import pickle
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from fastvgg.buffer_pool import BufferPool
from tests.helpers.batches import dtype_of

NBYTES = 4096
SHAPE = (2, 5, 7, 3)


def address_of(array):
    return array.ctypes.data


def everything(pool):
    return pool.empty((NBYTES,), "uint8")


def as_bytes(images):
    return images.view(np.uint8)


def pickled(value):
    return pickle.loads(pickle.dumps(value))  # noqa: S301


VIEWS = {
    "slice": lambda images: images[1:],
    "view of a view": lambda images: images[1:][..., 0].T,
    "reshape": lambda images: images.reshape(-1),
    "bytes": as_bytes,
    "base": lambda images: images.base,
    "base of bytes": lambda images: as_bytes(images).base,
    "asarray": lambda images: np.asarray(images, copy=False)[1:],
    "broadcast": lambda images: np.broadcast_to(images[:1], (4, *images.shape[1:])),
    "strided": lambda images: np.lib.stride_tricks.as_strided(images, (2, 3), (105, 1)),
    "DLPack": lambda images: np.from_dlpack(as_bytes(images)),
    "memoryview": lambda images: memoryview(as_bytes(images)),
    "slice of a memoryview": lambda images: memoryview(as_bytes(images))[1:],
    "buffer": lambda images: np.frombuffer(as_bytes(images), np.uint8),
    "iterator": lambda images: images.flat,
    "record": lambda images: as_bytes(images).reshape(-1)[:6].view("u1,u1")[1],
}


@pytest.mark.parametrize("dtype", ["uint8", "float32", "bfloat16"])
@pytest.mark.parametrize("name", VIEWS)
def test_memory_is_reused_when_the_last_view_is_dropped(dtype, name):
    pool = BufferPool(NBYTES, max_free=3)
    everything(pool)[...] = 7  # in memory that is then reused, and of which `images` is a part
    images = pool.empty(SHAPE, dtype_of(dtype))
    address, view = address_of(images), VIEWS[name](images)
    del images
    others = [everything(pool) for _ in range(5)]
    assert address not in map(address_of, others)
    for other in others:
        other[...] = 9
    assert set(np.asarray(view).tobytes()) == {7}
    del view
    gc.collect()  # a memoryview of a slice, and an iterator, may be part of a cycle
    assert address_of(everything(pool)) == address


def test_pointer_keeps_the_memory_of_an_array():
    pool = BufferPool(NBYTES, max_free=3)
    pointer = pool.empty(SHAPE, "uint8").ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
    assert address_of(everything(pool)) != ctypes.addressof(pointer.contents)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickled])
def test_copy_of_an_array_has_memory_of_its_own(copied):
    pool = BufferPool(NBYTES, max_free=1)
    images = pool.empty(SHAPE, "uint8")
    images[...] = 7
    address, another = address_of(images), copied(images)
    del images
    reused = everything(pool)
    assert address_of(reused) == address
    reused[...] = 9
    assert (another == 7).all()


@pytest.mark.parametrize("dtype", ["uint8", "float16", "bfloat16", "float64"])
def test_arrays_are_contiguous_aligned_and_writable(dtype):
    images = BufferPool(NBYTES, max_free=1).empty(SHAPE, dtype_of(dtype))
    assert (images.shape, images.dtype, type(images)) == (SHAPE, dtype_of(dtype), np.ndarray)
    assert images.flags.carray
    images[...] = 3
    assert (images == 3).all()


def test_free_memory_is_bounded():
    pool = BufferPool(NBYTES, max_free=3)
    arrays = [everything(pool) for _ in range(20)]
    assert len(set(map(address_of, arrays))) == 20
    memory = [weakref.ref(owner_of(array)._memory) for array in arrays]
    arrays.clear()
    assert sum(each() is not None for each in memory) == 3


def owner_of(array):
    while isinstance(array, np.ndarray):
        array = array.base
    return array


def test_array_outlives_its_pool():
    images = BufferPool(NBYTES, max_free=3).empty(SHAPE, "uint8")
    images[...] = 7
    everything(BufferPool(NBYTES, max_free=3))[...] = 9
    assert (images == 7).all()


def test_pool_is_pickled_without_its_memory():
    pool = BufferPool(2**20, max_free=3)
    everything(BufferPool(2**20, max_free=3))
    pool.empty((2**20,), "uint8")
    assert len(pickle.dumps(pool)) < 200
    assert pickled(pool).empty((2**20,), "uint8").nbytes == 2**20


def test_threads_never_share_memory():
    pool = BufferPool(NBYTES, max_free=3)

    def use(number):
        array = everything(pool)
        for _ in range(50):
            array[...] = number
            assert (array == number).all()
            array = everything(pool)

    with ThreadPoolExecutor(8) as threads:
        assert [*threads.map(use, range(32))] == [None] * 32
