"""Apply a Transform to a batch in memory: check it, choose a backend, and run on many threads.

The batch is partitioned into tiles: whole images, or whole rows of one image. The result has the
same bits for any partition, thread count and backend. Contiguous batches, and transposed or
channel-reversed views of them, are processed without a copy. Tiles of other batches are copied into
small buffers first, so no temporary has the size of the batch.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NamedTuple, overload

import numpy as np

from fastvgg import backend as backends
from fastvgg import oracle
from fastvgg.errors import DtypeError, OutputError, UsageError
from fastvgg.interop import address_of, as_numpy, as_torch, is_torch
from fastvgg.parallel import check_threads, parallel_for
from fastvgg.tiling import (
    CACHE_LINE_BYTES,
    Strides,
    Tile,
    find_base,
    partition,
    pixels_to_cache_line,
)
from fastvgg.transform import Transform, storage_dtype, storage_name

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import DTypeLike, NDArray

    from fastvgg.backend import Backend
    from fastvgg.tiling import ContiguousBase
    from fastvgg.transform import Layout, Mode, Rounding

__all__ = [
    "apply",
    "bind_rows",
    "preprocess",
    "restore",
]

# A 4 MiB tile takes at least 100 us. Waking a thread costs 20-60 us, so smaller tiles do not pay
# off.
MIN_TILE_BYTES: Final = 4 * 1024 * 1024
# A copied tile is read twice; 1 MiB stays in the L2 cache between the two reads.
COPIED_TILE_BYTES: Final = 1024 * 1024
TILES_PER_THREAD: Final = 4
# About the size of a last-level cache. With memory that was used before, ordinary stores took 0.55
# of the time of non-temporal stores for 24 MiB, 0.8 for 32 MiB, 1.1 for 48 MiB and 1.4 for 64 MiB.
# Fresh memory is in the caches already, because the system has just zeroed it.
MIN_NONTEMPORAL_BYTES: Final = 32 * 1024 * 1024
OVERLAP_SEARCH_STEPS: Final = 100_000


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
) -> Any:
    """Convert images to network inputs, bit-identical to Keras' `preprocess_input`.

    Parameters
    ----------
    x
        RGB images with values 0..255: uint8 or a floating storage type, of shape (N, H, W, 3) or
        (H, W, 3), or channels first if `layout` is "NCHW". Any strides, byte order and alignment.
        Not modified unless it is also `out`. Accepts NumPy arrays; objects on the CPU with the
        array interface or DLPack, such as PyTorch, JAX and TensorFlow tensors and Pillow images;
        and lists of images of the same size.
    mode
        "caffe", "tf", "torch", "identity", or a `Mode`.
    layout, out_layout
        The layout of `x` and of the result, "NHWC" or "NCHW"; `out_layout` defaults to `layout`.
    dtype
        float16, bfloat16, float32 or float64; by default float32 for uint8, else the dtype of `x`.
    out
        The array to write to: a C-contiguous NumPy array or PyTorch tensor of the shape and dtype
        of the result. ``out=x`` works in place.
    threads
        The number of threads; by default all available CPUs.
    backend
        "numba", "numpy", or "auto", which uses NumPy until a kernel pays off and then Numba.

    Returns
    -------
    ndarray or torch.Tensor
        `out`, or a new C-contiguous array; a PyTorch tensor if `x` is one, or a list of them.

    Raises
    ------
    ShapeError, DtypeError, OutputError, ModeError, BackendError, UsageError
        Before anything is written.

    Examples
    --------
    >>> x = np.array([[[10, 20, 30]]], np.uint8)
    >>> preprocess(x, "caffe").tolist()
    [[[-73.93900299072266, -96.77899932861328, -113.68000030517578]]]
    """
    transform = _transform(mode, "preprocess", layout, out_layout, dtype)
    return apply(transform, x, out, threads=threads, backend=backend)


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

    Any float is valid, for example in images found by optimization: values below 0 and NaN become
    0, values above 255 become 255, and the rest is rounded half to even.

    Parameters
    ----------
    y
        Network inputs of a floating storage type, of shape (N, H, W, 3) or (H, W, 3), or channels
        first if `layout` is "NCHW". Not modified unless it is also `out`. Accepts the same kinds of
        arrays as `preprocess`.
    mode
        The mode with which `y` was preprocessed.
    layout, out_layout
        The layout of `y` and of the result, "NHWC" or "NCHW"; `out_layout` defaults to `layout`.
    dtype
        uint8 by default; a floating dtype stores the same integers 0..255.
    out
        The array to write to: a C-contiguous NumPy array or PyTorch tensor of the shape and dtype
        of the result. ``out=y`` works in place and keeps the dtype of `y`.
    rounding
        "nearest", or "truncate", which loses values, like the widely copied `deprocess_img`.
    threads, backend
        As for `preprocess`.

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
) -> Any:  # noqa: ANN401
    """Apply a transform to a batch or an image; bit-identical to `oracle.apply`.

    Parameters, result and errors are those of `preprocess` and `restore`. `cached_output`: the
    caller reads the result immediately, so use ordinary stores.
    """
    batch = as_numpy(x)
    plan = _plan_call(transform, batch.dtype, batch.shape, batch.strides)
    if threads is not None:
        threads = check_threads(threads)
    if out is None:
        result = np.empty(plan.shape, plan.dtype)
    else:
        result = _writable(out)
        _check_out(result, batch, transform, plan.shape, plan.dtype)
    if threads is None:  # asking the system for the CPUs takes 1 us
        threads = 1 if plan.nbytes <= COPIED_TILE_BYTES else check_threads(None)
    resolved = backends.choose(backend, plan.workload, plan.nbytes, threads)
    if plan.nbytes and resolved == "numba":
        nontemporal = (
            out is not None and not cached_output and result.nbytes >= MIN_NONTEMPORAL_BYTES
        )
        _apply_kernel(plan, batch, result, threads, nontemporal=nontemporal)
    elif plan.nbytes:
        with plan.workload.time_numpy(plan.nbytes):
            _apply_oracle(plan, batch, result, threads)
    if out is not None:
        return out
    return as_torch(result) if is_torch(x[0] if isinstance(x, list | tuple) else x) else result


def _writable(out: Any) -> NDArray[Any]:  # noqa: ANN401
    """Return `out` as a NumPy array that the result may be written to."""
    if type(out) is np.ndarray:  # fast path
        return out
    if isinstance(out, np.ndarray) and not isinstance(out, np.ma.MaskedArray):
        return out
    if not is_torch(out):
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

    Parameters
    ----------
    transform
        The transform to apply.
    x, out
        Contiguous batches of the input and the output shape of the transform.

    Raises
    ------
    ShapeError, DtypeError, OutputError, BackendError, UsageError
        Before anything is written.

    Examples
    --------
    >>> x, out = np.full((2, 1, 1, 3), 9, np.uint8), np.zeros((4, 1, 1, 3), np.float32)
    >>> bind_rows(Transform("tf"), x, out)(1, 3)
    >>> (out == apply(Transform("tf"), x[1])).all(axis=(1, 2, 3)).tolist()
    [False, False, False, True]
    """
    plan = _plan_call(transform, x.dtype, x.shape, x.strides)
    _check_out(out, x, transform, (len(out), *plan.shape[1:]), plan.dtype)
    if not (x.flags.c_contiguous and x.dtype.isnative):
        raise UsageError("x is not C-contiguous in native byte order", "use fastvgg.preprocess")
    resolved = backends.choose(backend, plan.workload, x.nbytes + out.nbytes, 1)
    if resolved == "numpy":

        def apply_oracle(row: int, out_row: int, count: int = 1) -> None:
            with plan.workload.time_numpy(count * (x[0].nbytes + out[0].nbytes)):
                out[out_row : out_row + count] = oracle.apply(transform, x[row : row + count])

        return apply_oracle
    kernel = _kernel(plan, in_place=False, nontemporal=out.nbytes >= MIN_NONTEMPORAL_BYTES)
    return _RowTransform(kernel, plan, x, out)


class _RowTransform:
    """A kernel bound to two batches; keeps them alive, because the kernel takes only addresses."""

    def __init__(
        self, kernel: _Kernel, plan: _CallPlan, x: NDArray[Any], out: NDArray[Any]
    ) -> None:
        self._references = kernel, x, out
        self._loop = kernel.loop
        self._constants_address = kernel.constants_address
        self._address, self._out_address = address_of(x), address_of(out)
        strides = Strides.contiguous(x.shape, x.itemsize, plan.transform.layout)
        self._image_bytes, self._out_image_bytes = strides.image, plan.out_strides.image
        self._arguments = plan.image_pixels, *strides[:2], *plan.out_strides[:2]

    def __call__(self, row: int, out_row: int, count: int = 1) -> None:
        self._loop(
            self._address + row * self._image_bytes,
            self._out_address + out_row * self._out_image_bytes,
            self._constants_address,
            count,
            *self._arguments,
        )


@dataclass(frozen=True, eq=False, slots=True)  # without eq its hash is its identity: 0.1 us
class _CallPlan:
    """What all calls with the same transform, input dtype, shape and strides have in common."""

    transform: Transform
    input_name: str
    shape: tuple[int, ...]
    """The shape of the result."""
    dtype: np.dtype[Any]
    """The dtype of the result."""
    nbytes: int
    """The size of the input and the result together."""
    images: int
    image_pixels: int
    base: ContiguousBase | None
    out_strides: Strides
    workload: backends.Workload


@functools.lru_cache(maxsize=256)
def _plan_call(
    transform: Transform, dtype: np.dtype[Any], shape: tuple[int, ...], strides: tuple[int, ...]
) -> _CallPlan:
    """Check an input, and plan the calls for inputs of the same type, shape and strides."""
    input_name = storage_name(dtype)
    transform.check_input(shape, input_name)
    out_shape = transform.output_shape(shape)
    out_dtype = storage_dtype(transform.output_name(input_name))
    has_kernel = transform.direction != "pack"  # packing has no arithmetic
    return _CallPlan(
        transform=transform,
        input_name=input_name,
        shape=out_shape,
        dtype=out_dtype,
        nbytes=math.prod(shape) * (dtype.itemsize + out_dtype.itemsize),
        images=shape[0] if len(shape) == 4 else 1,
        image_pixels=math.prod(shape[-3:]) // 3,
        base=find_base(transform.layout, dtype, shape, strides),
        out_strides=Strides.contiguous(out_shape, out_dtype.itemsize, transform.out_layout),
        workload=backends.workload(transform, input_name)
        if has_kernel
        else backends.Workload(has_kernel=False),
    )


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
    if not in_place and _overlap(out, x):
        raise OutputError(
            "out overlaps the input without being the same array",
            "to work in place give out=x with the same dtype and layout; else give separate memory",
        )


def _overlap(a: NDArray[Any], b: NDArray[Any]) -> bool:
    try:
        # NumPy's stubs know only -1 and 0 for max_work.
        return np.shares_memory(a, b, max_work=OVERLAP_SEARCH_STEPS)  # type: ignore[arg-type]
    except np.exceptions.TooHardError:
        return True


class _Kernel(NamedTuple):
    """A compiled kernel and the constants that it reads."""

    loop: Callable[..., None]
    constants: NDArray[Any]
    constants_address: int


@functools.lru_cache(maxsize=256)
def _kernel(plan: _CallPlan, *, in_place: bool, nontemporal: bool) -> _Kernel:
    """Return the kernel for the contiguous base of a plan, or for copied tiles if it has none."""
    transform, reversed_input = plan.transform, False
    if plan.base is not None:
        transform = dataclasses.replace(transform, layout=plan.base.layout)
        reversed_input = plan.base.is_reversed
    kernel = _compile(
        transform,
        plan.input_name,
        reversed_input=reversed_input,
        in_place=in_place,
        nontemporal=nontemporal,
        aligned_planes=plan.out_strides.plane % CACHE_LINE_BYTES == 0,
    )
    plan.workload.is_compiled = True
    return kernel


@functools.lru_cache(maxsize=256)
def _compile(
    transform: Transform,
    input_name: str,
    *,
    reversed_input: bool,
    in_place: bool,
    nontemporal: bool,
    aligned_planes: bool,
) -> _Kernel:
    with backends.compile_lock:
        from fastvgg.kernels import convert
        from fastvgg.kernels.spec import KernelSpec, constant_table

        spec = KernelSpec.of(
            transform,
            input_name,
            reversed_input=reversed_input,
            in_place=in_place,
            nontemporal=nontemporal,
            aligned_planes=aligned_planes,
        )
        table = constant_table(transform.mode, spec)
        return _Kernel(convert.compiled(spec), table, table.ctypes.data)


def _apply_kernel(
    plan: _CallPlan, x: NDArray[Any], out: NDArray[Any], threads: int, *, nontemporal: bool
) -> None:
    """Run a kernel on the contiguous base of `x`, or on copied tiles if it has none."""
    base, out_strides = plan.base, plan.out_strides
    if base is None:
        _apply_kernel_to_copies(plan, x, out, threads, nontemporal=nontemporal)
        return
    address, out_address = address_of(x) + base.offset, address_of(out)
    in_place = address == out_address
    kernel = _kernel(plan, in_place=in_place, nontemporal=nontemporal and not in_place)
    strides = (*base.strides[:2], *out_strides[:2])
    images, pixels = plan.images, plan.image_pixels
    if base.layout == plan.transform.out_layout == "NHWC":
        images, pixels = 1, images * pixels
    tile_bytes = _tile_bytes(plan.nbytes, threads)
    if plan.nbytes <= tile_bytes:
        kernel.loop(address, out_address, kernel.constants_address, images, pixels, *strides)
        return

    def convert(tile: Tile) -> None:
        kernel.loop(
            address + base.strides.offset(tile.image, tile.row),
            out_address + out_strides.offset(tile.image, tile.row),
            kernel.constants_address,
            tile.images,
            tile.rows,
            *strides,
        )

    lead = pixels_to_cache_line(out_address, out_strides.pixel, plan.transform.out_layout)
    pixel_bytes = plan.nbytes // (images * pixels)
    tiles = partition(images, pixels, pixel_bytes, tile_bytes, lead=lead, multiple=CACHE_LINE_BYTES)
    parallel_for(tiles, convert, threads)


def _apply_kernel_to_copies(
    plan: _CallPlan, x: NDArray[Any], out: NDArray[Any], threads: int, *, nontemporal: bool
) -> None:
    """Copy each tile into a contiguous buffer, which stays in the cache, and run a kernel on it."""
    kernel = _kernel(plan, in_place=False, nontemporal=nontemporal)
    source, out_address = _batch(x), address_of(out)
    layout, out_strides = plan.transform.layout, plan.out_strides
    width = source.shape[2 if layout == "NHWC" else 3]
    native = source.dtype.newbyteorder("=")

    def convert(tile: Tile) -> None:
        copy = np.array(tile.view(source, layout), native, order="C")
        strides = Strides.contiguous(copy.shape, copy.itemsize, layout)
        kernel.loop(
            address_of(copy),
            out_address + out_strides.offset(tile.image, tile.row * width),
            kernel.constants_address,
            tile.images,
            tile.rows * width,
            *(*strides[:2], *out_strides[:2]),
        )

    parallel_for(_copied_tiles(plan, threads), convert, threads)


def _apply_oracle(plan: _CallPlan, x: NDArray[Any], out: NDArray[Any], threads: int) -> None:
    transform, source, target = plan.transform, _batch(x), _batch(out)

    def convert(tile: Tile) -> None:
        result = oracle.apply(transform, tile.view(source, transform.layout))
        tile.view(target, transform.out_layout)[...] = result

    parallel_for(_copied_tiles(plan, threads), convert, threads)


def _batch(x: NDArray[Any]) -> NDArray[Any]:
    """Return a batch or an image as a plain array of rank 4."""
    array = np.asarray(x)
    return array if array.ndim == 4 else array[np.newaxis]


def _copied_tiles(plan: _CallPlan, threads: int) -> list[Tile]:
    rows = plan.shape[-3 if plan.transform.out_layout == "NHWC" else -2]
    tile_bytes = min(_tile_bytes(plan.nbytes, threads), COPIED_TILE_BYTES)
    return partition(plan.images, rows, plan.nbytes // (plan.images * rows), tile_bytes)


def _tile_bytes(nbytes: int, threads: int) -> int:
    """Return the tile size that gives every thread `TILES_PER_THREAD` tiles."""
    return max(MIN_TILE_BYTES, -(-nbytes // (threads * TILES_PER_THREAD)))
