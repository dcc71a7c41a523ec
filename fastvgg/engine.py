"""A Transform on a batch in memory: checks once, picks a kernel or the oracle, splits over threads.

The batch is cut into tiles, whole images or whole rows of one image. The same bits come out for any
cut, thread count and backend. A tile is worked on where it lies when it is contiguous, and is first
copied into a small buffer when it is not, so no temporary has the size of the batch.
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

# A kernel takes 100 us or more for this; to wake a second thread for less costs more (20 to 60 us)
# than it saves.
MIN_TILE_BYTES: Final = 4 * 1024 * 1024
# A tile that is copied is read twice; 1 MiB stays in the second-level cache between the two.
COPIED_TILE_BYTES: Final = 1024 * 1024
TILES_PER_THREAD: Final = 4
# About a last-level cache. Of results that were used before, those of 24 MiB took 0.55 of the time
# when written through the caches, 32 MiB 0.8, 48 MiB 1.1, 64 MiB 1.4. New memory has just been
# zeroed by the system, and is in the caches already.
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
    x: Any,  # whatever is an array, and as such comes back
    mode: Mode | str,
    *,
    layout: Layout = "NHWC",
    out_layout: Layout | None = None,
    dtype: DTypeLike | None = None,
    out: Any = None,
    threads: int | None = None,
    backend: Backend = "auto",
) -> Any:
    """Turn images into network input, bit-equal to Keras' `preprocess_input`.

    Parameters
    ----------
    x
        Images with values 0..255 in RGB order: uint8 or any floating storage type, shape
        (N, H, W, 3) or (H, W, 3), or channels first where `layout` is "NCHW". Any strides, byte
        order and alignment. Not changed, unless it is also `out`. NumPy arrays, and what offers the
        array interface or DLPack on the CPU: PyTorch, JAX and TensorFlow tensors, Pillow's images;
        or a list of images of one size.
    mode
        "caffe", "tf", "torch", "identity", or a `Mode`.
    layout, out_layout
        "NHWC" or "NCHW", of `x` and of the result; `out_layout` is `layout` if not given.
    dtype
        float16, bfloat16, float32 or float64. If not given: float32 for uint8, else the type of x.
    out
        Where to write: a NumPy array or PyTorch tensor, C-contiguous, of the result's shape and
        type. ``out=x`` works in place.
    threads
        How many to use; all usable cores if not given.
    backend
        "numba", "numpy", or "auto": NumPy until a kernel pays off, then Numba.

    Returns
    -------
    ndarray or torch.Tensor
        `out`, or a new C-contiguous array; a PyTorch tensor for one, or for a list of them.

    Raises
    ------
    ShapeError, DtypeError, OutputError, ModeError, BackendError, UsageError
        Before a byte is written.

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
    """Turn network input back into images: ``restore(preprocess(x)) == x``, every byte.

    Any float is allowed, as optimised images hold them: NaN and what is below 0 become 0, what is
    above 255 becomes 255, the rest is rounded half to even.

    Parameters
    ----------
    y
        Network inputs of a floating storage type, shape (N, H, W, 3) or (H, W, 3), or channels
        first where `layout` is "NCHW". Not changed, unless it is also `out`. Arrays of whatever
        kind `preprocess` takes.
    mode
        The mode that made `y`.
    layout, out_layout
        "NHWC" or "NCHW", of `y` and of the result; `out_layout` is `layout` if not given.
    dtype
        uint8 if not given; a floating type holds the same whole numbers 0..255.
    out
        Where to write: a NumPy array or PyTorch tensor, C-contiguous, of the result's shape and
        type. ``out=y``, with the type of y for `dtype`, works in place.
    rounding
        "nearest", or "truncate" as the widely copied `deprocess_img` does, which loses values.
    threads, backend
        As for `preprocess`.

    Returns
    -------
    ndarray or torch.Tensor
        `out`, or a new C-contiguous array; a PyTorch tensor for one, or for a list of them.

    Raises
    ------
    ShapeError, DtypeError, OutputError, ModeError, BackendError, UsageError
        Before a byte is written.

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


_kept_transform = functools.lru_cache(maxsize=64)(Transform)


def _transform(*arguments: Any) -> Transform:  # those of Transform
    """Return a transform, kept from an earlier call: making one takes 2 us."""
    try:  # contextlib.suppress takes 0.4 us
        return _kept_transform(*arguments)
    except TypeError:  # an argument has no hash, or is refused: again below, with one traceback
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
    """Apply a transform to a batch or an image; equal to `oracle.apply`, bit for bit.

    Parameters, result and errors are those of `preprocess` and `restore`. `cached_output` says that
    the result is read at once, and should not be written past the caches.
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
    if threads is None:  # to ask the system for the cores takes 1 us
        threads = 1 if plan.nbytes <= COPIED_TILE_BYTES else check_threads(None)
    chosen = backends.choose(backend, plan.work, plan.nbytes, threads)
    if plan.nbytes and chosen == "numba":
        streams = out is not None and not cached_output and result.nbytes >= MIN_NONTEMPORAL_BYTES
        _apply_kernel(plan, batch, result, threads, streams)
    elif plan.nbytes:
        with plan.work.on_numpy(plan.nbytes):
            _apply_oracle(plan, batch, result, threads)
    if out is not None:
        return out
    return as_torch(result) if is_torch(x[0] if isinstance(x, list | tuple) else x) else result


def _writable(out: Any) -> NDArray[Any]:  # noqa: ANN401
    """Return what a result may be written into as an array."""
    if type(out) is np.ndarray:  # the usual case, and fast
        return out
    if isinstance(out, np.ndarray) and not isinstance(out, np.ma.MaskedArray):
        return out
    if not is_torch(out):
        raise OutputError(
            f"out is {type(out).__name__}", "give a plain NumPy array or a PyTorch tensor"
        )
    try:
        return as_numpy(out)
    except DtypeError as error:
        raise OutputError(f"out cannot be written: {error.problem}", error.remedy) from error


def bind_rows(
    transform: Transform, x: NDArray[Any], out: NDArray[Any], *, backend: Backend = "auto"
) -> Callable[..., None]:
    """Return what transforms images of `x` into images of `out`, on the thread that calls.

    ``bind_rows(transform, x, out)(i, j)`` is ``apply(transform, x[i], out[j])``, checked once for
    all rows: that takes 10 us a call, and an image of 224x224 takes 25. A third argument is how
    many rows, from there on. Rows may be read and written by many threads at once.

    Parameters
    ----------
    transform
        What to do.
    x, out
        Contiguous batches, whose images the transform fits.

    Raises
    ------
    ShapeError, DtypeError, OutputError, BackendError, UsageError
        Before a byte is written.

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
        raise UsageError("the rows of x do not lie one after the other", "use fastvgg.preprocess")
    chosen = backends.choose(backend, plan.work, x.nbytes + out.nbytes, 1)
    if chosen == "numpy":

        def apply_oracle(row: int, out_row: int, count: int = 1) -> None:
            with plan.work.on_numpy(count * (x[0].nbytes + out[0].nbytes)):
                out[out_row : out_row + count] = oracle.apply(transform, x[row : row + count])

        return apply_oracle
    kernel = _kernel(plan, False, out.nbytes >= MIN_NONTEMPORAL_BYTES)
    return _RowKernel(kernel, plan, x, out)


class _RowKernel:
    """A kernel on rows. It holds the batches: the loop knows addresses alone."""

    def __init__(
        self, kernel: _Kernel, plan: _CallPlan, x: NDArray[Any], out: NDArray[Any]
    ) -> None:
        self._held = kernel, x, out
        self._loop = kernel.loop
        self._constants_address = kernel.constants_address
        self._first, self._out_first = address_of(x), address_of(out)
        steps, out_strides = (
            Strides.contiguous(x.shape, x.itemsize, plan.transform.layout),
            plan.out_strides,
        )
        self._image_bytes, self._out_image_bytes = steps.image, out_strides.image
        self._rest = plan.image_pixels, *steps[:2], *out_strides[:2]

    def __call__(self, row: int, out_row: int, count: int = 1) -> None:
        self._loop(
            self._first + row * self._image_bytes,
            self._out_first + out_row * self._out_image_bytes,
            self._constants_address,
            count,
            *self._rest,
        )


@dataclass(frozen=True, eq=False, slots=True)  # without eq its hash is its identity: 0.1 us
class _CallPlan:
    """What all calls share that apply one transform to batches of one type, shape and strides."""

    transform: Transform
    input_name: str
    shape: tuple[int, ...]
    """Of the result."""
    dtype: np.dtype[Any]
    nbytes: int
    """Of the input and the result."""
    images: int
    image_pixels: int
    base: ContiguousBase | None
    out_strides: Strides
    work: backends.Workload


@functools.lru_cache(maxsize=256)
def _plan_call(
    transform: Transform, dtype: np.dtype[Any], shape: tuple[int, ...], strides: tuple[int, ...]
) -> _CallPlan:
    """Check an input, and plan the calls for inputs like it."""
    input_name = storage_name(dtype)
    transform.check_input(shape, input_name)
    out_shape = transform.output_shape(shape)
    out_dtype = storage_dtype(transform.output_name(input_name))
    packs = transform.direction == "pack"  # no arithmetic, and so no kernel
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
        work=backends.Workload(has_kernel=False)
        if packs
        else backends.workload(transform, input_name),
    )


def _check_out(
    out: NDArray[Any],
    x: NDArray[Any],
    transform: Transform,
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
) -> None:
    """Refuse an `out` that cannot take the result, before anything is written."""
    if out.shape != shape or out.dtype != dtype:
        raise OutputError(
            f"out has shape {out.shape} and type {out.dtype}, the result {shape} and {dtype}",
            f"give np.empty({shape}, {dtype.name!r}), or no out",
        )
    flags = out.flags
    if not flags.writeable:
        raise OutputError("out is read-only", "give a writable array")
    if not flags.carray:
        lacks = "aligned" if flags.c_contiguous else f"contiguous: its strides are {out.strides}"
        raise OutputError(
            f"out is not {lacks}",
            f"give np.empty({shape}, {dtype.name!r}), or no out",
        )
    if not np.may_share_memory(out, x):  # a comparison of bounds: the usual case, and cheap
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
            "to work in place give out=x, with the same type and layout; else give separate memory",
        )


def _overlap(a: NDArray[Any], b: NDArray[Any]) -> bool:
    try:
        # NumPy's stubs know only -1 and 0 for max_work.
        return np.shares_memory(a, b, max_work=OVERLAP_SEARCH_STEPS)  # type: ignore[arg-type]
    except np.exceptions.TooHardError:
        return True


class _Kernel(NamedTuple):
    """A compiled loop, and the constants that it reads."""

    loop: Callable[..., None]
    constants: NDArray[Any]
    constants_address: int


@functools.lru_cache(maxsize=256)
def _kernel(plan: _CallPlan, in_place: bool, streams: bool) -> _Kernel:
    """Return the kernel for the base of a plan's batches; for copied tiles if it has none."""
    transform, reverses = plan.transform, False
    if plan.base is not None:
        transform = dataclasses.replace(transform, layout=plan.base.layout)
        reverses = plan.base.is_reversed
    aligned_planes = plan.out_strides.plane % CACHE_LINE_BYTES == 0
    kernel = _compiled(transform, plan.input_name, reverses, in_place, streams, aligned_planes)
    plan.work.is_compiled = True
    return kernel


@functools.lru_cache(maxsize=256)
def _compiled(
    transform: Transform,
    input_name: str,
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
    plan: _CallPlan, x: NDArray[Any], out: NDArray[Any], threads: int, streams: bool
) -> None:
    """Work on the base of x where it lies, or on copies of its tiles if it has none."""
    base, out_strides = plan.base, plan.out_strides
    if base is None:
        _apply_kernel_to_copies(plan, x, out, threads, streams)
        return
    first, out_first = address_of(x) + base.offset, address_of(out)
    in_place = first == out_first
    kernel = _kernel(plan, in_place, streams and not in_place)
    steps = (*base.strides[:2], *out_strides[:2])
    images, pixels = plan.images, plan.image_pixels
    if base.layout == plan.transform.out_layout == "NHWC":
        images, pixels = 1, images * pixels
    tile_bytes = _tile_bytes(plan.nbytes, threads)
    if plan.nbytes <= tile_bytes:
        kernel.loop(first, out_first, kernel.constants_address, images, pixels, *steps)
        return

    def work_on(tile: Tile) -> None:
        kernel.loop(
            first + base.strides.offset(tile.image, tile.row),
            out_first + out_strides.offset(tile.image, tile.row),
            kernel.constants_address,
            tile.images,
            tile.rows,
            *steps,
        )

    lead = pixels_to_cache_line(out_first, out_strides.pixel, plan.transform.out_layout)
    pixel_bytes = plan.nbytes // (images * pixels)
    tiles = partition(images, pixels, pixel_bytes, tile_bytes, lead=lead, multiple=CACHE_LINE_BYTES)
    parallel_for(tiles, work_on, threads)


def _apply_kernel_to_copies(
    plan: _CallPlan, x: NDArray[Any], out: NDArray[Any], threads: int, streams: bool
) -> None:
    """Copy each tile into memory of its own first, where it stays in the cache."""
    kernel = _kernel(plan, False, streams)
    source, out_first = _batch(x), address_of(out)
    layout, out_strides = plan.transform.layout, plan.out_strides
    width = source.shape[2 if layout == "NHWC" else 3]
    native = source.dtype.newbyteorder("=")

    def work_on(tile: Tile) -> None:
        copy = np.array(tile.view(source, layout), native, order="C")
        steps = Strides.contiguous(copy.shape, copy.itemsize, layout)
        kernel.loop(
            address_of(copy),
            out_first + out_strides.offset(tile.image, tile.row * width),
            kernel.constants_address,
            tile.images,
            tile.rows * width,
            *(*steps[:2], *out_strides[:2]),
        )

    parallel_for(_copied_tiles(plan, threads), work_on, threads)


def _apply_oracle(plan: _CallPlan, x: NDArray[Any], out: NDArray[Any], threads: int) -> None:
    transform, source, target = plan.transform, _batch(x), _batch(out)

    def work_on(tile: Tile) -> None:
        result = oracle.apply(transform, tile.view(source, transform.layout))
        tile.view(target, transform.out_layout)[...] = result

    parallel_for(_copied_tiles(plan, threads), work_on, threads)


def _batch(x: NDArray[Any]) -> NDArray[Any]:
    """Return a batch or an image as a batch, and a plain array."""
    plain = np.asarray(x)
    return plain if plain.ndim == 4 else plain[np.newaxis]


def _copied_tiles(plan: _CallPlan, threads: int) -> list[Tile]:
    rows = plan.shape[-3 if plan.transform.out_layout == "NHWC" else -2]
    tile_bytes = min(_tile_bytes(plan.nbytes, threads), COPIED_TILE_BYTES)
    return partition(plan.images, rows, plan.nbytes // (plan.images * rows), tile_bytes)


def _tile_bytes(nbytes: int, threads: int) -> int:
    """Return the size of even shares for the threads."""
    return max(MIN_TILE_BYTES, -(-nbytes // (threads * TILES_PER_THREAD)))
