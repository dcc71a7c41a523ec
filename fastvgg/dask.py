"""Lazy preprocessing of Dask arrays, block by block, on the threads of the Dask scheduler.

Each block is transformed like an array in memory, so the result is bit-identical for any chunks.
Needs the extra ``dask``.

A Dask array knows nothing of the index next to a stored dataset: the images that could not be
decoded are rows of zeros in it, and are transformed as such. Leave them out by their numbers, which
`fastvgg.batches(path, 1).failed_rows` has: ``x[np.delete(np.arange(len(x)), failed_rows)]``.

>>> import dask.array as da
>>> x = da.random.default_rng(1).integers(0, 256, (20, 7, 9, 3), chunks=(6, 4, 9, 3), dtype="uint8")
>>> y = preprocess(x, "caffe", out_layout="NCHW")
>>> y.shape, y.chunks[2], str(y.dtype)
((20, 3, 7, 9), (4, 3), 'float32')
>>> bool((restore(y, "caffe", layout="NCHW", out_layout="NHWC") == x).all())
True
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING

import dask.array as da
import numpy as np
from dask.tokenize import tokenize

from fastvgg import engine
from fastvgg.backend import check_backend
from fastvgg.choices import check_flags
from fastvgg.errors import ShapeError, UsageError
from fastvgg.transform import CHANNEL_AXES, Mode, Transform, storage_dtype, storage_type

if TYPE_CHECKING:
    from numpy.typing import DTypeLike

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
    check_values: bool = True,
) -> da.Array:
    """Convert images to network inputs lazily; see `fastvgg.preprocess`.

    Parameters
    ----------
    x
        A Dask array with all channels in one chunk. The other axes may have any chunks, even of
        unknown sizes.
    mode, layout, out_layout, dtype, backend
        As for `fastvgg.preprocess`.
    check_values
        As for `fastvgg.preprocess`, in each block when it is computed.

    Returns
    -------
    dask.array.Array
        Lazy, with the chunks of `x` in the order of `out_layout`.

    Raises
    ------
    ShapeError, DtypeError, ModeError, BackendError, UsageError
        Before the graph is built.
    """
    transform = Transform(mode, "preprocess", layout, out_layout, dtype)
    return _map_blocks(transform, x, backend, check_values=check_values)


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
    """Convert network inputs back to images lazily; see `fastvgg.restore` and `preprocess`."""
    return _map_blocks(Transform(mode, "restore", layout, out_layout, dtype, rounding), y, backend)


def _map_blocks(
    transform: Transform, x: da.Array, backend: Backend, *, check_values: bool = False
) -> da.Array:
    if not isinstance(x, da.Array):
        raise UsageError(
            f"got {type(x).__name__}, which is not a Dask array",
            "convert it with dask.array.from_array; for arrays in memory use the fastvgg functions",
        )
    check_backend(backend)
    check_flags(check_values=check_values)
    input_type = storage_type(x.dtype)
    # Unknown lengths, which are NaN, are valid: only the number of channels is fixed.
    transform.check_input(tuple(1 if math.isnan(n) else n for n in x.shape), input_type)
    axis = x.ndim + CHANNEL_AXES[transform.layout]
    if len(x.chunks[axis]) != 1:
        raise ShapeError(
            f"the channel axis has chunks {x.chunks[axis]}, expected one chunk",
            f"give x.rechunk({{{axis}: -1}})",
        )
    dtype = storage_dtype(transform.output_type(input_type))
    axes = tuple(range(x.ndim))
    return da.blockwise(
        functools.partial(
            engine.apply, transform, threads=1, backend=backend, check_values=check_values
        ),
        transform.output_shape(axes),
        x,
        axes,
        name=f"{transform.direction}-{tokenize(x, transform, backend, check_values)}",
        dtype=dtype,
        meta=np.empty((0,) * x.ndim, dtype),
    )
