"""Arrays over pooled memory, which returns to its pool with the last reference to it."""

from __future__ import annotations

import math
from collections import deque
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import DTypeLike, NDArray


class BufferPool:
    """Memory of one size for arrays that their users may keep.

    The memory of an array is reused only when nothing refers to it any more: no array, view, tensor
    or memoryview. Page-faulting fresh memory takes longer than a kernel that fills memory that was
    used before.

    Safe to call from many threads. It has no lock, because the last reference may be dropped
    anywhere: by the garbage collector, or in a forked child.

    Parameters
    ----------
    nbytes
        The maximum size of an array.
    max_free
        The number of buffers that are kept while no array uses them. Arrays in use are not limited.

    Examples
    --------
    >>> pool = BufferPool(96, max_free=1)
    >>> array = pool.empty((2, 3), "float32")
    >>> address, view = array.ctypes.data, array[1:]
    >>> del array
    >>> pool.empty((4, 6), "float32").ctypes.data == address
    False
    >>> del view
    >>> pool.empty((4, 6), "float32").ctypes.data == address
    True
    """

    def __init__(self, nbytes: int, max_free: int) -> None:
        self._nbytes = nbytes
        self._free: deque[NDArray[np.uint8]] = deque(maxlen=max_free)  # a full one drops the oldest

    def __reduce__(self) -> tuple[type[BufferPool], tuple[int, int | None]]:
        """Pickle the pool without its memory."""
        return BufferPool, (self._nbytes, self._free.maxlen)

    def empty(self, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        """Return an uninitialized, writable, C-contiguous array."""
        try:
            memory = self._free.pop()
        except IndexError:
            memory = np.empty(self._nbytes, np.uint8)
        data: NDArray[np.uint8] = np.asarray(_Lease(memory, self._free))
        nbytes = math.prod(shape) * np.dtype(dtype).itemsize
        return data[:nbytes].view(dtype).reshape(shape)


class _Lease:
    """The owner of an array's memory, as far as NumPy knows.

    NumPy may skip arrays when it sets the base of a view, but never an owner that is not an array.
    """

    def __init__(self, memory: NDArray[np.uint8], free: deque[NDArray[np.uint8]]) -> None:
        self._memory = memory
        self._free = free

    @property
    def __array_interface__(self) -> dict[str, Any]:
        return self._memory.__array_interface__

    def __del__(self) -> None:
        self._free.append(self._memory)
