"""preprocess, restore, and any Transform, applied to a batch in memory.

Arguments are checked before anything is written. `call_plan` describes what a call computes and
runs it; `backend` chooses between a kernel and the oracle.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, Final, overload

import numpy as np

from fastvgg import backend as backends
from fastvgg import call_plan, oracle
from fastvgg.call_plan import bind_kernel, plan_call, run_kernel, run_oracle
from fastvgg.choices import check_flags
from fastvgg.errors import DtypeError, OutputError, UsageError
from fastvgg.interop import address_of, as_numpy, as_torch, is_torch
from fastvgg.parallel import check_threads
from fastvgg.tiling import Strides
from fastvgg.transform import Transform
from fastvgg.values import check_image_values

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import DTypeLike, NDArray

    from fastvgg.backend import Backend
    from fastvgg.transform import Layout, Mode, Rounding

# About the size of a last-level cache. With memory that was used before, ordinary stores took 0.55
# of the time of non-temporal stores for 24 MiB, 0.8 for 32 MiB, 1.1 for 48 MiB and 1.4 for 64 MiB.
# Fresh memory is in the caches already, because the system has just zeroed it.
MIN_NONTEMPORAL_BYTES: Final = 32 * 1024 * 1024
MAX_OVERLAP_WORK: Final = 100_000


@overload
def preprocess(
    x: NDArray[Any],
    mode: Mode | str,
    *,
    layout: Layout = ...,
    out_layout: Layout | None = ...,
    dtype: DTypeLike | None = ...,
    out: None = ...,
    threads: int | None = ...,
    backend: Backend = ...,
    check_values: bool = ...,
) -> NDArray[Any]: ...


@overload
def preprocess(
    x: Any,  # noqa: ANN401
    mode: Mode | str,
    *,
    layout: Layout = ...,
    out_layout: Layout | None = ...,
    dtype: DTypeLike | None = ...,
    out: Any = ...,  # noqa: ANN401
    threads: int | None = ...,
    backend: Backend = ...,
    check_values: bool = ...,
) -> Any: ...  # noqa: ANN401


def preprocess(
    x: Any,
    mode: Mode | str,
    *,
    layout: Layout = "NHWC",
    out_layout: Layout | None = None,
    dtype: DTypeLike | None = None,
    out: Any = None,
    threads: int | None = None,
    backend: Backend = "auto",
    check_values: bool = True,
) -> Any:
    """Convert images to network inputs, bit-identical to Keras' `preprocess_input`.

    Parameters
    ----------
    x
        RGB images with values 0..255: uint8 or a floating storage type, of shape (N, H, W, 3) or
        (H, W, 3), or channels first if `layout` is "NCHW". Any strides, byte order and alignment.
        A NumPy array; an object on the CPU with the array interface or DLPack, such as a PyTorch,
        JAX or TensorFlow tensor or a Pillow image; or a list of images of the same size. Not
        modified unless it is also `out`.
    mode
        "caffe", "tf", "torch", "identity", or a `Mode`.
    layout, out_layout
        The layout of `x` and of the result, "NHWC" or "NCHW"; `out_layout` defaults to `layout`.
    dtype
        float16, bfloat16, float32 or float64; by default float32 for uint8, else the dtype of `x`.
    out
        A C-contiguous array or PyTorch tensor of the result's shape and dtype; or `x`, in place.
    threads, backend
        The number of threads, by default all available CPUs; and "numba", "numpy", or "auto", which
        uses NumPy until a kernel pays off and then Numba.
    check_values
        Reject floats that were scaled to 0..1 or -1..1: all lie there, and one is not zero.

    Returns
    -------
    ndarray or torch.Tensor
        `out`, or a new C-contiguous array; a PyTorch tensor if `x` is one, or a list of them.

    Raises
    ------
    ArrayError, ModeError, BackendError, UsageError
        Before anything is written. ShapeError, DtypeError and OutputError are kinds of ArrayError.

    Examples
    --------
    >>> preprocess(np.array([[[10, 20, 30]]], np.uint8), "caffe").tolist()
    [[[-73.93900299072266, -96.77899932861328, -113.68000030517578]]]
    """
    transform = _transform(mode, "preprocess", layout, out_layout, dtype)
    return apply(transform, x, out, threads=threads, backend=backend, check_values=check_values)


@overload
def restore(
    y: NDArray[Any],
    mode: Mode | str,
    *,
    layout: Layout = ...,
    out_layout: Layout | None = ...,
    dtype: None = ...,
    out: None = ...,
    rounding: Rounding = ...,
    threads: int | None = ...,
    backend: Backend = ...,
) -> NDArray[np.uint8]: ...


@overload
def restore(
    y: Any,  # noqa: ANN401
    mode: Mode | str,
    *,
    layout: Layout = ...,
    out_layout: Layout | None = ...,
    dtype: DTypeLike | None = ...,
    out: Any = ...,  # noqa: ANN401
    rounding: Rounding = ...,
    threads: int | None = ...,
    backend: Backend = ...,
) -> Any: ...  # noqa: ANN401


def restore(
    y: Any,
    mode: Mode | str,
    *,
    layout: Layout = "NHWC",
    out_layout: Layout | None = None,
    dtype: DTypeLike | None = None,
    out: Any = None,
    rounding: Rounding = "nearest",
    threads: int | None = None,
    backend: Backend = "auto",
) -> Any:
    """Convert network inputs back to images: ``restore(preprocess(x)) == x``, for every byte.

    Any float is valid: values below 0 and NaN become 0, and values above 255 become 255.

    Parameters
    ----------
    y
        Network inputs of a floating storage type, of the shapes, layouts and kinds of arrays that
        `preprocess` accepts. Not modified unless it is also `out`.
    mode
        The mode with which `y` was preprocessed.
    dtype
        uint8 by default; a floating dtype stores the same integers 0..255.
    rounding
        "nearest" (half to even), or "truncate", which loses values, as many `deprocess_img` do.
    layout, out_layout, out, threads, backend
        As for `preprocess`. ``out=y`` keeps the dtype of `y`.

    Returns
    -------
    ndarray or torch.Tensor
        `out`, or a new C-contiguous array; a PyTorch tensor for one, or for a list of them.

    Raises
    ------
    ShapeError, DtypeError, OutputError, ModeError, BackendError, UsageError
        Before anything is written.

    Examples
    --------
    >>> x = np.array([[[10, 20, 30]]], np.uint8)
    >>> restore(preprocess(x, "torch", dtype="float16"), "torch").tolist()
    [[[10, 20, 30]]]
    """
    if dtype is None and out is y:
        dtype = as_numpy(y).dtype
    transform = _transform(mode, "restore", layout, out_layout, dtype, rounding)
    return apply(transform, y, out, threads=threads, backend=backend)


_cached_transform = functools.lru_cache(maxsize=64)(Transform)


def _transform(*arguments: Any) -> Transform:
    """Return a cached transform; creating one takes 2 us."""
    try:  # contextlib.suppress takes 0.4 us
        return _cached_transform(*arguments)
    except TypeError:  # unhashable or invalid: raise below, without a chained traceback
        pass
    return Transform(*arguments)


def apply(
    transform: Transform,
    x: Any,  # noqa: ANN401
    out: Any = None,  # noqa: ANN401
    *,
    threads: int | None = None,
    backend: Backend = "auto",
    cached_output: bool = False,
    check_values: bool = False,
) -> Any:  # noqa: ANN401
    """Apply a transform to a batch or an image; bit-identical to `oracle.apply`.

    Parameters, result and errors are those of `preprocess` and `restore`. `cached_output`: the
    caller reads the result immediately, so use ordinary stores.
    """
    if check_values is not True and check_values is not False:  # a call takes 0.5 us
        check_flags(check_values=check_values)
    batch = as_numpy(x)
    plan = plan_call(transform, batch.dtype, batch.shape, batch.strides)
    if threads is None and plan.nbytes <= call_plan.COPIED_TILE_BYTES:
        threads = 1  # asking the system for the CPUs takes 1 us
    else:
        threads = check_threads(threads)
    if out is None:
        result = np.empty(plan.shape, plan.dtype)
    else:
        result = _writable(out)
        _check_out(result, batch, transform, plan.shape, plan.dtype)
    if plan.has_float_images and check_values:
        check_image_values(batch, transform.layout)
    resolved = backends.choose(backend, plan.workload, plan.nbytes, threads)
    if plan.nbytes and resolved == "numba":
        nontemporal = (
            out is not None and not cached_output and result.nbytes >= MIN_NONTEMPORAL_BYTES
        )
        run_kernel(plan, batch, result, threads, nontemporal=nontemporal)
    elif plan.nbytes:
        with plan.workload.time_numpy(plan.nbytes):
            run_oracle(plan, batch, result, threads)
    if out is not None:
        return out
    return as_torch(result) if is_torch(x[0] if isinstance(x, list | tuple) else x) else result


def _writable(out: Any) -> NDArray[Any]:  # noqa: ANN401
    """Return `out` as a NumPy array that the result may be written to."""
    if type(out) is np.ndarray:  # fast path
        return out
    is_array = isinstance(out, np.ndarray) and not isinstance(out, np.ma.MaskedArray)
    if not (is_array or is_torch(out)):
        raise OutputError(
            f"out is a {type(out).__name__}", "give a plain NumPy array or a PyTorch tensor"
        )
    try:
        return as_numpy(out)
    except DtypeError as error:
        raise OutputError(f"cannot write to out: {error.problem}", error.remedy) from error


def bind_rows(
    transform: Transform, x: NDArray[Any], out: NDArray[Any], *, backend: Backend = "auto"
) -> Callable[..., None]:
    """Return a function that transforms rows of `x` into rows of `out`, on the calling thread.

    ``bind_rows(transform, x, out)(i, j, count=1)`` is
    ``apply(transform, x[i : i + count], out[j : j + count])`` without its checks, which are made
    only once. They take 10 us a call, and the kernel takes 25 us for an image of 224x224. Many
    threads may call the function at once.

    Both batches are contiguous, with images of the input and the output shape of the transform.

    >>> x, out = np.full((2, 1, 1, 3), 9, np.uint8), np.zeros((4, 1, 1, 3), np.float32)
    >>> bind_rows(Transform("tf"), x, out)(1, 3)
    >>> (out == apply(Transform("tf"), x[1])).all(axis=(1, 2, 3)).tolist()
    [False, False, False, True]
    """
    plan = plan_call(transform, x.dtype, x.shape, x.strides)
    _check_out(out, x, transform, (len(out), *plan.shape[1:]), plan.dtype)
    if not (x.flags.c_contiguous and x.dtype.isnative):
        raise UsageError("x is not C-contiguous in native byte order", "use fastvgg.preprocess")
    resolved = backends.choose(backend, plan.workload, x.nbytes + out.nbytes, 1)
    if resolved == "numpy":

        def apply_oracle(row: int, out_row: int, count: int = 1) -> None:
            with plan.workload.time_numpy(count * (x[0].nbytes + out[0].nbytes)):
                out[out_row : out_row + count] = oracle.apply(transform, x[row : row + count])

        return apply_oracle
    kernel = bind_kernel(plan, in_place=False, nontemporal=out.nbytes >= MIN_NONTEMPORAL_BYTES)
    address, out_address = address_of(x), address_of(out)
    strides = Strides.contiguous(x.shape, x.itemsize, transform.layout)
    arguments = plan.image_pixels, *strides[:2], *plan.out_strides[:2]

    def apply_kernel(row: int, out_row: int, count: int = 1) -> None:
        kernel.loop(
            address + row * x.strides[0],  # keeps x and out alive: the kernel takes only addresses
            out_address + out_row * out.strides[0],
            kernel.constants_address,
            count,
            *arguments,
        )

    return apply_kernel


def _check_out(
    out: NDArray[Any],
    x: NDArray[Any],
    transform: Transform,
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
) -> None:
    """Check that `out` can hold the result, before anything is written."""
    if out.shape != shape or out.dtype != dtype:
        raise OutputError(
            f"out has shape {out.shape} and dtype {out.dtype}, expected {shape} and {dtype}",
            f"give np.empty({shape}, {dtype.name!r}), or omit out",
        )
    flags = out.flags
    if not flags.writeable:
        raise OutputError("out is read-only", "give a writable array")
    if not flags.carray:
        missing = "aligned" if flags.c_contiguous else f"contiguous: its strides are {out.strides}"
        raise OutputError(
            f"out is not {missing}",
            f"give np.empty({shape}, {dtype.name!r}), or omit out",
        )
    if not np.may_share_memory(out, x):  # compares only bounds, which is cheap
        return
    in_place = (
        out.ctypes.data == x.ctypes.data
        and out.dtype == x.dtype
        and out.strides == x.strides
        and transform.layout == transform.out_layout
    )
    if not in_place and _has_overlap(out, x):
        raise OutputError(
            "out overlaps the input without being the same array",
            "to work in place give out=x with the same dtype and layout; else give separate memory",
        )


def _has_overlap(a: NDArray[Any], b: NDArray[Any]) -> bool:
    try:
        # NumPy's stubs know only -1 and 0 for max_work.
        return np.shares_memory(a, b, max_work=MAX_OVERLAP_WORK)  # type: ignore[arg-type]
    except np.exceptions.TooHardError:
        return True
