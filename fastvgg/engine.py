"""A Transform on a batch in memory: checks once, picks a kernel or the oracle, splits over threads.

The batch is cut into pieces, whole images or whole rows of one image. The same bits come out for
any cut, thread count and backend. A piece is worked on where it lies when it is contiguous, and is
first gathered into a small buffer when it is not, so no temporary has the size of the batch.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.util
import os
import warnings
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple, TypeAlias

import numpy as np

from fastvgg import oracle
from fastvgg.errors import BackendError, DtypeError, OutputError, UsageError
from fastvgg.transform import CHANNEL_AXES, Mode, Transform, storage_dtype, storage_name

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import DTypeLike, NDArray

    from fastvgg.transform import Layout, Rounding

__all__ = [
    "Backend",
    "apply",
    "backend_in_use",
    "check_array",
    "check_threads",
    "preprocess",
    "restore",
    "usable_cores",
]

Backend: TypeAlias = Literal["auto", "numba", "numpy"]

# A kernel takes 100 us or more for this; to wake a second thread for less costs more (20 to 60 us)
# than it saves.
SMALLEST_PIECE_BYTES: Final = 4 * 1024 * 1024
# A gathered piece is read twice; 1 MiB stays in the second-level cache between the two.
GATHERED_PIECE_BYTES: Final = 1024 * 1024
PIECES_PER_THREAD: Final = 4
OVERLAP_SEARCH_STEPS: Final = 100_000


def preprocess(
    x: NDArray[Any],
    mode: Mode | str,
    *,
    layout: Layout = "NHWC",
    out_layout: Layout | None = None,
    dtype: DTypeLike | None = None,
    out: NDArray[Any] | None = None,
    threads: int | None = None,
    backend: Backend = "auto",
) -> NDArray[Any]:
    """Turn images into network input, bit-equal to Keras' `preprocess_input`.

    Parameters
    ----------
    x
        Images with values 0..255 in RGB order: uint8 or any floating storage type, shape
        (N, H, W, 3) or (H, W, 3), or channels first where `layout` is "NCHW". Any strides, byte
        order and alignment. Not changed, unless it is also `out`.
    mode
        "caffe", "tf", "torch", "identity", or a `Mode`.
    layout, out_layout
        "NHWC" or "NCHW", of `x` and of the result; `out_layout` is `layout` if not given.
    dtype
        float16, bfloat16, float32 or float64. If not given: float32 for uint8, else the type of x.
    out
        Where to write: C-contiguous, of the result's shape and type. ``out=x`` works in place.
    threads
        How many to use; all usable cores if not given.
    backend
        "numba", "numpy", or "auto": Numba where it is installed.

    Returns
    -------
    ndarray
        `out`, or a new C-contiguous array.

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
    transform = Transform(mode, "preprocess", layout, out_layout, dtype)
    return apply(transform, x, out, threads=threads, backend=backend)


def restore(
    y: NDArray[Any],
    mode: Mode | str,
    *,
    layout: Layout = "NHWC",
    out_layout: Layout | None = None,
    dtype: DTypeLike | None = None,
    out: NDArray[Any] | None = None,
    rounding: Rounding = "nearest",
    threads: int | None = None,
    backend: Backend = "auto",
) -> NDArray[Any]:
    """Turn network input back into images: ``restore(preprocess(x)) == x``, every byte.

    Any float is allowed, as optimised images hold them: NaN and what is below 0 become 0, what is
    above 255 becomes 255, the rest is rounded half to even.

    Parameters
    ----------
    y
        Network inputs of a floating storage type, shape (N, H, W, 3) or (H, W, 3), or channels
        first where `layout` is "NCHW". Not changed, unless it is also `out`.
    mode
        The mode that made `y`.
    layout, out_layout
        "NHWC" or "NCHW", of `y` and of the result; `out_layout` is `layout` if not given.
    dtype
        uint8 if not given; a floating type holds the same whole numbers 0..255.
    out
        Where to write: C-contiguous, of the result's shape and type. ``out=y``, with the type of
        y for `dtype`, works in place.
    rounding
        "nearest", or "truncate" as the widely copied `deprocess_img` does, which loses values.
    threads, backend
        As for `preprocess`.

    Returns
    -------
    ndarray
        `out`, or a new C-contiguous array.

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
        dtype = y.dtype
    transform = Transform(mode, "restore", layout, out_layout, dtype, rounding)
    return apply(transform, y, out, threads=threads, backend=backend)


def apply(
    transform: Transform,
    x: NDArray[Any],
    out: NDArray[Any] | None = None,
    *,
    threads: int | None = None,
    backend: Backend = "auto",
) -> NDArray[Any]:
    """Apply a transform to a batch or an image; equal to `oracle.apply`, bit for bit.

    Parameters, result and errors are those of `preprocess` and `restore`.
    """
    input_name = _check_input(transform, x)
    threads = check_threads(threads)
    shape = transform.output_shape(x.shape)
    dtype = _result_dtype(transform.output_name(input_name))
    if out is None:
        result = np.empty(shape, dtype)
    else:
        _check_out(out, x, transform, shape, dtype)
        result = out
    make_job = _kernel_job if backend_in_use(backend) == "numba" else _oracle_job
    if x.size:
        source, target = _read_only(x), np.asarray(result)
        if x.ndim == 3:
            source, target = source[np.newaxis], target[np.newaxis]
        if not source.flags.c_contiguous:
            transform, source = _as_it_lies(transform, source)
        job = make_job(transform, source, target)
        _run(job, _pieces(transform, source, target, job.gathers, threads), threads)
    return result


def usable_cores() -> int:
    """Return how many cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def backend_in_use(backend: Backend) -> Literal["numba", "numpy"]:
    """Return the backend that `backend` means on this machine.

    Raises
    ------
    BackendError
        If Numba is asked for by name and cannot be imported.
    UsageError
        If there is no such backend.
    """
    if backend == "numpy":
        return "numpy"
    if backend not in ("auto", "numba"):
        raise UsageError(f"backend is {backend!r}", "give 'auto', 'numba' or 'numpy'")
    problem = _numba_problem()
    if problem is None:
        return "numba"
    if backend == "numba":
        raise BackendError(f"Numba is not usable: {problem}", "pip install numba")
    _warn_slow(problem)
    return "numpy"


@functools.cache
def _numba_problem() -> str | None:
    if importlib.util.find_spec("numba") is None:
        return "it is not installed"
    try:
        importlib.import_module("fastvgg.kernels.loops")
    except ImportError as error:  # a Numba that refuses this NumPy, say
        return str(error)
    return None


@functools.cache
def _warn_slow(problem: str) -> None:
    warnings.warn(
        f"Numba is not usable ({problem}): working on the NumPy backend, with the same results, "
        "slower. 'pip install numba' gets it.",
        stacklevel=2,
    )


def _read_only(x: NDArray[Any]) -> NDArray[Any]:
    """Return a view that nothing can write through; it also spares Numba a second compilation."""
    view = np.asarray(x).view()
    view.flags.writeable = False
    return view


def _as_it_lies(transform: Transform, source: NDArray[Any]) -> tuple[Transform, NDArray[Any]]:
    """Take a transposed view of a contiguous batch as the batch that it is a view of."""
    layout: Layout = "NCHW" if transform.layout == "NHWC" else "NHWC"
    turned = np.moveaxis(source, CHANNEL_AXES[transform.layout], CHANNEL_AXES[layout])
    if not turned.flags.c_contiguous:
        return transform, source
    return dataclasses.replace(transform, layout=layout), turned


def check_array(x: NDArray[Any]) -> None:
    """Refuse what is not an array, or does not have a value everywhere.

    Raises
    ------
    DtypeError
        Saying how to make an array of it.
    """
    if not isinstance(x, np.ndarray):
        raise DtypeError(f"got {type(x).__name__}, not a NumPy array", "convert it: np.asarray(x)")
    if isinstance(x, np.ma.MaskedArray):
        raise DtypeError("a masked array has no bytes for its masked values", "use x.filled(...)")


def _check_input(transform: Transform, x: NDArray[Any]) -> str:
    check_array(x)
    name = _stored_name(x.dtype)
    transform.check_input(x.shape, name)
    return name


def check_threads(threads: int | None) -> int:
    """Return how many threads to use: all usable cores if None.

    Raises
    ------
    UsageError
        If that is not a whole number, or less than 1.
    """
    if threads is None:
        return usable_cores()
    if type(threads) is not int or threads < 1:
        raise UsageError(f"threads is {threads!r}", "give a whole number, at least 1")
    return threads


def _check_out(
    out: NDArray[Any],
    x: NDArray[Any],
    transform: Transform,
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
) -> None:
    """Refuse an `out` that cannot take the result, before anything is written."""
    if not isinstance(out, np.ndarray) or isinstance(out, np.ma.MaskedArray):
        raise OutputError(f"out is {type(out).__name__}", "give a plain NumPy array")
    if out.shape != shape or out.dtype != dtype:
        raise OutputError(
            f"out has shape {out.shape} and type {out.dtype}, the result {shape} and {dtype}",
            f"give np.empty({shape}, {dtype.name!r}), or no out",
        )
    if not out.flags.writeable:
        raise OutputError("out is read-only", "give a writable array")
    if not (out.flags.c_contiguous and out.flags.aligned):
        raise OutputError(
            f"out has strides {out.strides}: it is not contiguous and aligned",
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


# Asking NumPy for a type's name takes a microsecond; a thumbnail takes two.
_stored_name = functools.lru_cache(maxsize=64)(storage_name)
_result_dtype = functools.lru_cache(maxsize=64)(storage_dtype)


class _Piece(NamedTuple):
    """Some whole images, or some whole rows of one image."""

    image: int
    images: int
    row: int
    rows: int

    def of(self, batch: NDArray[Any], layout: Layout) -> NDArray[Any]:
        """Return the piece's view of a batch."""
        images = slice(self.image, self.image + self.images)
        rows = slice(self.row, self.row + self.rows)
        return batch[images, rows] if layout == "NHWC" else batch[images, :, rows]


def _cut(images: int, rows: int, row_bytes: int, piece_bytes: int) -> Iterator[_Piece]:
    """Cut a batch into pieces of at most `piece_bytes`, but no less than a row.

    >>> [tuple(piece) for piece in _cut(images=3, rows=4, row_bytes=10, piece_bytes=80)]
    [(0, 2, 0, 4), (2, 1, 0, 4)]
    >>> [tuple(piece) for piece in _cut(images=1, rows=4, row_bytes=10, piece_bytes=30)]
    [(0, 1, 0, 3), (0, 1, 3, 1)]
    """
    together = piece_bytes // max(1, rows * row_bytes)
    if together:
        for image in range(0, images, together):
            yield _Piece(image, min(together, images - image), 0, rows)
        return
    rows_together = max(1, piece_bytes // max(1, row_bytes))
    for image in range(images):
        for row in range(0, rows, rows_together):
            yield _Piece(image, 1, row, min(rows_together, rows - row))


class _Job(NamedTuple):
    work_on: Callable[[_Piece], None]
    gathers: bool
    """Whether a piece passes through memory of its own, which should then stay in the cache."""


def _oracle_job(transform: Transform, source: NDArray[Any], target: NDArray[Any]) -> _Job:
    def work_on(piece: _Piece) -> None:
        result = oracle.apply(transform, piece.of(source, transform.layout))
        piece.of(target, transform.out_layout)[...] = result

    return _Job(work_on, gathers=True)


def _kernel_job(transform: Transform, source: NDArray[Any], target: NDArray[Any]) -> _Job:
    loop, constants = _kernel(transform, _stored_name(source.dtype))
    width = source.shape[2 if transform.layout == "NHWC" else 3]
    ready = source.flags.c_contiguous and source.flags.aligned and source.dtype.isnative
    whole_source = _for_kernel(source, transform.layout) if ready else None
    whole_target = _for_kernel(target, transform.out_layout)

    def work_on(piece: _Piece) -> None:
        at = (piece.image, piece.row * width)
        count = (piece.images, piece.rows * width)
        if whole_source is not None:
            loop(whole_source, whole_target, at, at, count, *constants)
            return
        part = piece.of(source, transform.layout)
        gathered = _read_only(np.array(part, source.dtype.newbyteorder("="), order="C"))
        loop(_for_kernel(gathered, transform.layout), whole_target, (0, 0), at, count, *constants)

    return _Job(work_on, gathers=whole_source is None)


@functools.lru_cache(maxsize=256)
def _kernel(transform: Transform, input_name: str) -> tuple[Callable[..., None], tuple[Any, ...]]:
    """Return the loop of a transform, and the constants to call it with."""
    from fastvgg.kernels import loops

    mode, restores = transform.mode, transform.direction == "restore"
    compute = transform.compute_name(input_name)
    recipe = loops.Recipe(
        restores=restores,
        source=input_name,
        target=transform.output_name(input_name),
        compute=compute,
        planar_source=transform.layout == "NCHW",
        planar_target=transform.out_layout == "NCHW",
        flips=mode.flips,
        divides=mode.divide is not None,
        scales=mode.std is not None,
        rounding=transform.rounding if restores else "nearest",
    )
    return loops.compiled(recipe), _constants(mode, compute, in_order_of_x=restores)


def _constants(mode: Mode, compute: str, *, in_order_of_x: bool) -> tuple[Any, ...]:
    """Return divide, mean and std in the compute type; a missing part changes nothing."""
    scalar = np.dtype(compute).type
    step = -1 if mode.flips and in_order_of_x else 1
    mean = tuple(scalar(value) for value in mode.mean or (0.0, 0.0, 0.0))[::step]
    std = tuple(scalar(value) for value in mode.std or (1.0, 1.0, 1.0))[::step]
    return scalar(1.0 if mode.divide is None else mode.divide), mean, std


def _for_kernel(batch: NDArray[Any], layout: Layout) -> NDArray[Any]:
    """Return a contiguous batch as (images, pixels, 3) or (images, 3, pixels), halves as bits."""
    images = batch.shape[0]
    flat = batch.reshape((images, -1, 3) if layout == "NHWC" else (images, 3, -1))
    return flat.view(np.uint16) if batch.dtype.itemsize == 2 else flat


def _pieces(
    transform: Transform, source: NDArray[Any], target: NDArray[Any], gathers: bool, threads: int
) -> list[_Piece]:
    """Cut a batch into even shares for the threads, small ones where pieces are gathered."""
    images, rows = source.shape[0], source.shape[1 if transform.layout == "NHWC" else 2]
    total_bytes = source.nbytes + target.nbytes
    share_bytes = -(-total_bytes // (threads * PIECES_PER_THREAD))
    piece_bytes = max(SMALLEST_PIECE_BYTES, share_bytes)
    if gathers:
        piece_bytes = min(piece_bytes, GATHERED_PIECE_BYTES)
    return list(_cut(images, rows, total_bytes // (images * rows), piece_bytes))


def _run(job: _Job, pieces: list[_Piece], threads: int) -> None:
    """Work on all pieces, on this thread and `threads` - 1 others."""
    if threads == 1 or len(pieces) == 1:
        for piece in pieces:
            job.work_on(piece)
        return
    remaining = deque(pieces)

    def drain() -> None:
        while remaining:
            try:
                piece = remaining.popleft()
            except IndexError:  # another thread took the last one
                return
            job.work_on(piece)

    helpers = [_pool().submit(drain) for _ in range(min(threads, len(pieces)) - 1)]
    try:
        drain()
    finally:
        remaining.clear()
        for helper in helpers:
            if not helper.cancel():  # it may never have started: the pool is shared
                helper.result()


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max_workers=max(32, usable_cores()), thread_name_prefix="fastvgg")


if hasattr(os, "register_at_fork"):  # a forked child has none of its parent's threads
    os.register_at_fork(after_in_child=_pool.cache_clear)
