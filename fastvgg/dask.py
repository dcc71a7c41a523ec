"""Dask arrays, lazily: every block by itself, on the thread that Dask computes it with.

Each block goes through the same function as an array in memory, so that the result is the same for
any chunks, bit for bit. Needs ``pip install 'fastvgg[dask]'``.

>>> import dask.array as da
>>> x = da.random.default_rng(1).integers(0, 256, (20, 7, 9, 3), chunks=(6, 4, 9, 3), dtype="uint8")
>>> y = preprocess(x, "caffe", out_layout="NCHW")
>>> y.shape, y.chunks[2], str(y.dtype)
((20, 3, 7, 9), (4, 3), 'float32')
>>> bool((restore(y, "caffe", layout="NCHW", out_layout="NHWC") == x).all())
True
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import dask.array as da
import numpy as np
from dask.tokenize import tokenize

from fastvgg import engine
from fastvgg.backend import check_backend
from fastvgg.errors import ShapeError, UsageError
from fastvgg.transform import CHANNEL_AXES, Mode, Transform, storage_dtype, storage_name

if TYPE_CHECKING:
    from numpy.typing import DTypeLike, NDArray

    from fastvgg.backend import Backend
    from fastvgg.transform import Layout, Rounding

__all__ = ["preprocess", "restore"]


def preprocess(
    x: da.Array,
    mode: Mode | str,
    *,
    layout: Layout = "NHWC",
    out_layout: Layout | None = None,
    dtype: DTypeLike | None = None,
    backend: Backend = "auto",
) -> da.Array:
    """Turn images into network input, lazily; see `fastvgg.preprocess`.

    Parameters
    ----------
    x
        A Dask array whose channels are in one chunk; images, heights and widths may be in many, of
        sizes that need not be known.
    mode, layout, out_layout, dtype, backend
        As for `fastvgg.preprocess`.

    Returns
    -------
    dask.array.Array
        With the chunks of `x`, in the order of `out_layout`. Nothing is computed yet.

    Raises
    ------
    ShapeError, DtypeError, ModeError, BackendError, UsageError
        Before the graph is built.
    """
    return _mapped(Transform(mode, "preprocess", layout, out_layout, dtype), x, backend)


def restore(
    y: da.Array,
    mode: Mode | str,
    *,
    layout: Layout = "NHWC",
    out_layout: Layout | None = None,
    dtype: DTypeLike | None = None,
    rounding: Rounding = "nearest",
    backend: Backend = "auto",
) -> da.Array:
    """Turn network input back into images, lazily; see `fastvgg.restore` and `preprocess`."""
    return _mapped(Transform(mode, "restore", layout, out_layout, dtype, rounding), y, backend)


def _mapped(transform: Transform, x: da.Array, backend: Backend) -> da.Array:
    if not isinstance(x, da.Array):
        raise UsageError(
            f"the array is {type(x).__name__}, and no Dask array",
            "give one in memory to the function of this name in fastvgg, or dask.array.from_array",
        )
    check_backend(backend)
    input_name = storage_name(x.dtype)
    # A length that is not known yet is that of images, rows or columns, of which any is right.
    transform.check_input(tuple(1 if math.isnan(n) else n for n in x.shape), input_name)
    axis = x.ndim + CHANNEL_AXES[transform.layout]
    if len(x.chunks[axis]) != 1:
        raise ShapeError(
            f"the channels are in chunks of {x.chunks[axis]}, and a pixel needs all of its own",
            f"put them together: x.rechunk({{{axis}: -1}})",
        )
    dtype = storage_dtype(transform.output_name(input_name))
    axes = tuple(range(x.ndim))
    return da.blockwise(
        _apply,
        transform.output_shape(axes),
        x,
        axes,
        transform=transform,
        backend=backend,
        name=f"{transform.direction}-{tokenize(x, transform, backend)}",
        dtype=dtype,
        meta=np.empty((0,) * x.ndim, dtype),
    )


def _apply(block: NDArray[Any], transform: Transform, backend: Backend) -> NDArray[Any]:
    result: NDArray[Any] = engine.apply(transform, block, threads=1, backend=backend)
    return result
