"""Sample batches, bitwise comparison, and scripts run in a separate process."""

from __future__ import annotations

import contextlib
import subprocess
import sys

import ml_dtypes
import numpy as np

from tests.helpers.checkout import checkout_environment

LAYOUTS = ("NHWC", "NCHW")
LAYOUT_PAIRS = tuple((layout, out_layout) for layout in LAYOUTS for out_layout in LAYOUTS)
KERAS_MODES = ("caffe", "tf", "torch")
FLOATS = ("float16", "bfloat16", "float32", "float64")
CHANNEL_AXIS = {"NHWC": -1, "NCHW": -3}
DATA_FORMATS = {"NHWC": "channels_last", "NCHW": "channels_first"}


def dtype_of(name):
    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)


def frozen(array):
    """Make an array read-only and return it."""
    array.flags.writeable = False
    return array


def in_layout(batch, layout):
    """Convert a channels-last batch to a contiguous batch in `layout`."""
    return np.ascontiguousarray(np.moveaxis(batch, -1, CHANNEL_AXIS[layout]))


def view_in_memory(batch, layout, transposed, reverses, start):
    """Return a view equal to a batch, and its base, which has another memory order.

    The base starts `start` bytes past an aligned address.
    """
    axis = CHANNEL_AXIS[layout]
    x = np.flip(batch, axis) if reverses else batch
    x = np.moveaxis(x, axis, -4 - axis) if transposed else x
    stored = np.zeros(start + x.nbytes, np.uint8)[start:].view(x.dtype).reshape(x.shape)
    stored[...] = x
    view = np.moveaxis(stored, -4 - axis, axis) if transposed else stored
    return (np.flip(view, axis) if reverses else view), stored


def every_pattern(count, shape):
    """Return all integers below `count`, a power of two, in each of three channels (last axis).

    The order differs between channels, so that swapped channels are detected.
    """
    pixels = np.arange(int(np.prod(shape)))
    assert len(pixels) >= count
    # An odd step visits every value once before it repeats.
    channels = [(pixels * step + start) % count for step, start in ((1, 0), (77, 13), (201, 100))]
    return np.stack(channels, axis=-1).reshape((*shape, 3))


def every_value(layout="NHWC", rank=4):
    """Return a read-only uint8 batch, or one image, with all 256 values in each channel."""
    shape = (2, 5, 27) if rank == 4 else (10, 27)
    return frozen(in_layout(every_pattern(256, shape).astype(np.uint8), layout))


def every_half(name):
    """Return a read-only batch with all 65,536 bit patterns of a half type in each channel."""
    patterns = every_pattern(65536, (2, 128, 256)).astype(np.uint16)
    return frozen(patterns.view(dtype_of(name)))


def filled_with(values, layout="NHWC"):
    """Return a read-only batch (2, H, 7, 3) with all of `values` in each of the three channels."""
    rows = -(-len(values) // (2 * 7))
    pixels = np.resize(values, 2 * rows * 7)
    batch = np.stack([pixels, np.roll(pixels, 1), np.roll(pixels, 2)], axis=-1)
    return frozen(in_layout(batch.reshape(2, rows, 7, 3), layout))


def unaligned(array):
    """Copy an array to an address one byte past an aligned address."""
    memory = np.zeros(array.nbytes + 1, np.uint8)
    copy = memory[1:].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def byte_swapped(array):
    """Copy an array with the opposite byte order."""
    return array.astype(array.dtype.newbyteorder("S"))


def cast(array, name):
    """Cast as NumPy does, without warnings for NaN and infinity; NaN is canonical."""
    with np.errstate(over="ignore", invalid="ignore"):
        return with_canonical_nan(array.astype(dtype_of(name)))


def with_canonical_nan(array):
    """Replace every NaN by the canonical quiet NaN of the dtype, in place."""
    if array.dtype != np.uint8:
        with np.errstate(invalid="ignore"):  # isnan of a signaling NaN raises the invalid flag
            array[np.isnan(array)] = np.nan
    return array


def bits(array):
    """Return the elements as unsigned integers."""
    native = np.array(array, array.dtype.newbyteorder("="), order="C")
    return native.view(f"u{native.dtype.itemsize}")


def assert_same(actual, expected):
    """Check that dtype, shape and bits are equal, and that `actual` is C-contiguous."""
    assert type(actual) is np.ndarray
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    assert actual.flags.c_contiguous
    assert actual.size == 0 or all(stride > 0 for stride in actual.strides)
    different = np.argwhere(bits(actual) != bits(expected))
    some = [(*map(int, at), actual[tuple(at)], expected[tuple(at)]) for at in different[:5]]
    assert not some, f"{len(different)} of {actual.size} differ; at, actual, expected: {some}"


@contextlib.contextmanager
def unchanged(*arrays):
    """Check that no byte of the arrays or of their base arrays changes."""
    memories = []
    for array in arrays:
        while isinstance(array.base, np.ndarray):
            array = array.base
        memories.append(array)
    before = [memory.tobytes() for memory in memories]
    yield
    assert [memory.tobytes() for memory in memories] == before


def run_script(source, **environment):
    """Run Python source in a separate process; return its standard output.

    The timeout detects a hanging process, not a slow one.
    """
    done = subprocess.run(
        [sys.executable, "-c", source],
        env=checkout_environment(**environment),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


class OnlyArray:
    """An array that only offers `__array__`."""

    def __init__(self, array, error=None):
        self._array = array
        self._error = error

    def __array__(self, dtype=None, copy=None):
        if self._error is not None:
            raise self._error
        return self._array
