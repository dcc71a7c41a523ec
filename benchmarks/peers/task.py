"""The tasks of the peers, and the interface of their implementations."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fastvgg import Mode

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

IMAGE = (224, 224, 3)
IMAGES_PER_COMPARISON = 64
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "NO_ALBUMENTATIONS_UPDATE": "1",  # no network request for the newest version at import
    "TF_CPP_MIN_LOG_LEVEL": "3",
}
"""Must be set before importing any of the libraries, like KERAS_BACKEND."""


@dataclass(frozen=True)
class Task:
    name: str
    mode: Mode
    restores: bool
    x: NDArray[Any]
    expected: NDArray[Any]
    out: NDArray[Any]
    """The reused result, shared by all peers that have an output argument."""
    threads: int

    @property
    def useful_bytes(self) -> int:
        return self.x.nbytes + self.expected.nbytes


def ignore_threads(_threads: int) -> None:
    pass


@dataclass(frozen=True)
class Implementation:
    """The implementation of a task in a library; None if its API does not support a call."""

    batch: Callable[[], Any] | None = None
    """Return the result of the batch in new memory."""
    batch_into: Callable[[], Any] | None = None
    """Return the result of the batch in reused memory."""
    image: Callable[[NDArray[Any], NDArray[Any]], object] | None = None
    """Write the result of one image into its row."""
    view: Callable[[NDArray[Any]], NDArray[Any]] = np.asarray
    """Return the view of all rows that is the result."""
    set_threads: Callable[[int], object] = ignore_threads


class Peer(NamedTuple):
    """A library, or one way to use it, and its implementations of the tasks."""

    name: str
    module: str
    preprocess: Callable[[Task], Implementation] | None
    restore: Callable[[Task], Implementation] | None
    note: str = ""
    backend: str = "numpy"
    """Keras' backend in the process, which is fixed at import."""

    def implementation_for(self, task: Task) -> Implementation | None:
        """Return the implementation of a task, or None if the library does not support it."""
        build = self.restore if task.restores else self.preprocess
        return build(task) if build is not None else None


def means(mode: Mode, *, backwards: bool = False) -> NDArray[np.float32]:
    """Return the means in float32, in the channel order of y, or of x if `backwards`."""
    return np.array(mode.mean, np.float32)[:: -1 if backwards and mode.is_bgr else 1]


def torch_constants(mode: Mode) -> tuple[np.float32, NDArray[np.float32], NDArray[np.float32]]:
    """Return the divisor, the means and the standard deviations in float32."""
    return np.float32(mode.divide), means(mode), np.array(mode.std, np.float32)


def preprocess_with_keras(x: NDArray[Any], mode: Mode) -> NDArray[Any]:
    """Return Keras' result for NumPy arrays, which does not depend on its backend."""
    from keras.applications.imagenet_utils import preprocess_input

    return np.ascontiguousarray(preprocess_input(x, mode=mode.name))


def create_preprocess_task(mode: Mode, name: str, x: NDArray[Any], threads: int) -> Task:
    y = preprocess_with_keras(x, mode)
    return Task(name, mode, False, x, y, np.empty_like(y), threads)


def create_restore_task(
    storage_dtype: type[np.floating], name: str, x: NDArray[Any], threads: int
) -> Task:
    """Return the task of restoring float32 that was stored as `storage_dtype`."""
    y = preprocess_with_keras(x, Mode.CAFFE).astype(storage_dtype).astype(np.float32)
    return Task(name, Mode.CAFFE, True, y, x, np.empty_like(x), threads)


TASKS: dict[str, Callable[[str, NDArray[Any], int], Task]] = {
    "preprocess, caffe": partial(create_preprocess_task, Mode.CAFFE),
    "preprocess, torch": partial(create_preprocess_task, Mode.TORCH),
    "restore, caffe": partial(create_restore_task, np.float32),
    "restore, caffe, stored in float16": partial(create_restore_task, np.float16),
}


def images(count: int) -> NDArray[np.uint8]:
    """Return random images, the same in every process."""
    return np.random.default_rng(0).integers(0, 256, (count, *IMAGE), dtype=np.uint8)


def tasks(count: int, threads: int) -> Iterator[Task]:
    """Yield one task at a time, so that only one is in memory."""
    x = images(count)
    for name, create_task in TASKS.items():
        yield create_task(name, x, threads)


def difference(result: Any, expected: NDArray[Any]) -> tuple[int, float]:
    """Return the number of elements with different bits, and the largest difference."""
    result = np.asarray(result)
    if result.shape != expected.shape:
        result = np.moveaxis(result, 1, -1)
    assert (result.shape, result.dtype) == (expected.shape, expected.dtype)
    bits = np.dtype(f"u{expected.itemsize}")
    differing, largest = 0, 0.0
    for first in range(0, len(expected), IMAGES_PER_COMPARISON):
        rows = slice(first, first + IMAGES_PER_COMPARISON)
        one, other = np.ascontiguousarray(result[rows]), expected[rows]
        differing += int(np.count_nonzero(one.view(bits) != other.view(bits)))
        largest = max(largest, float(np.abs(np.subtract(one, other, dtype=np.float32)).max()))
    return differing, largest
