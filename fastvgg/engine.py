"""A Transform on a batch in memory: checks once, picks a kernel or the oracle, splits over threads.

The batch is cut into pieces, whole images or whole rows of one image. The same bits come out for
any cut, thread count and backend. A piece is worked on where it lies when it is contiguous, and is
first gathered into a small buffer when it is not, so no temporary has the size of the batch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeAlias, overload

import numpy as np

from fastvgg import backend as backends
from fastvgg import nearest, oracle
from fastvgg.arrays import as_numpy, as_torch, is_torch
from fastvgg.errors import DtypeError, OutputError, UsageError
from fastvgg.threads import check_threads, work_on_all
from fastvgg.transform import CHANNEL_AXES, Transform, storage_dtype, storage_name

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import DTypeLike, NDArray

    from fastvgg.backend import Backend, Chosen
    from fastvgg.nearest import Picks
    from fastvgg.transform import Layout, Mode, Rounding

__all__ = [
    "apply",
    "picker",
    "preprocess",
    "restore",
    "row_by_row",
]

# A kernel takes 100 us or more for this; to wake a second thread for less costs more (20 to 60 us)
# than it saves.
SMALLEST_PIECE_BYTES: Final = 4 * 1024 * 1024
# A gathered piece is read twice; 1 MiB stays in the second-level cache between the two.
GATHERED_PIECE_BYTES: Final = 1024 * 1024
PIECES_PER_THREAD: Final = 4
LINE_BYTES: Final = 64
# About a last-level cache. Of results that were used before, those of 24 MiB took 0.55 of the time
# when written through the caches, 32 MiB 0.8, 48 MiB 1.1, 64 MiB 1.4. New memory has just been
# zeroed by the system, and is in the caches already.
SMALLEST_STREAMED_BYTES: Final = 32 * 1024 * 1024
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
    with contextlib.suppress(TypeError):  # an argument without a hash, or refused: again below
        return _kept_transform(*arguments)
    return Transform(*arguments)


def apply(
    transform: Transform,
    x: Any,  # noqa: ANN401
    out: Any = None,  # noqa: ANN401
    *,
    threads: int | None = None,
    backend: Backend = "auto",
    read_next: bool = False,
) -> Any:  # noqa: ANN401
    """Apply a transform to a batch or an image; equal to `oracle.apply`, bit for bit.

    Parameters, result and errors are those of `preprocess` and `restore`. `read_next` says that
    the result is read at once, and should not be written past the caches.
    """
    batch = as_numpy(x)
    input_name, shape, dtype = _result_of(transform, batch.shape, batch.dtype)
    if threads is not None:
        threads = check_threads(threads)
    result = np.empty(shape, dtype) if out is None else _writable(out)
    if out is not None:
        _check_out(result, batch, transform, shape, dtype)
    nbytes = batch.nbytes + result.nbytes
    if threads is None:  # to ask the system for the cores takes 1 us
        threads = 1 if nbytes <= GATHERED_PIECE_BYTES else check_threads(None)
    work = (transform, input_name)
    packs = transform.direction == "pack"  # no arithmetic, and so no kernel
    chosen = backends.choose("numpy" if packs else backend, work, nbytes, threads)
    if batch.size and chosen == "numba":
        streams = out is not None and not read_next and result.nbytes >= SMALLEST_STREAMED_BYTES
        _apply(transform, batch, result, threads, compiled=True, streams=streams)
    elif batch.size:
        with contextlib.nullcontext() if packs else backends.on_oracle(work, nbytes):
            _apply(transform, batch, result, threads, compiled=False, streams=False)
    if out is not None:
        return out
    return as_torch(result) if is_torch(x[0] if isinstance(x, list | tuple) else x) else result


def _writable(out: Any) -> NDArray[Any]:  # noqa: ANN401
    """Return what a result may be written into as an array."""
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


def _apply(
    transform: Transform,
    x: NDArray[Any],
    out: NDArray[Any],
    threads: int,
    *,
    compiled: bool,
    streams: bool,
) -> None:
    """Carry a transform out that was checked."""
    source, target = np.asarray(x), np.asarray(out)
    if x.ndim == 3:
        source, target = source[np.newaxis], target[np.newaxis]
    if compiled:
        pieces, work_on = _kernel_work(transform, source, target, threads, streams)
    else:
        pieces, work_on = _oracle_work(transform, source, target, threads)
    work_on_all(pieces, work_on, threads)


def picker(backend: Chosen) -> Callable[[NDArray[Any], Picks, NDArray[Any]], None]:
    """Return what picks the pixels of an image that nearest neighbour resizing keeps.

    It is equal to `nearest.pick`, for contiguous, interleaved uint8 images.
    """
    backends.check_backend(backend)
    if backend == "numpy":
        return nearest.pick
    with backends.compiling:
        from fastvgg.kernels import resample

        kernel = resample.gather()

    def gather(pixels: NDArray[Any], picked: Picks, out: NDArray[Any]) -> None:
        width, columns = pixels.shape[1], len(picked.columns)
        # All columns before the last one of the source, and of the result: both are in order.
        wide = min(int(picked.columns.searchsorted(width - 1)), columns - 1)
        kernel(
            *(_address(pixels), _address(out), _address(picked.rows), _address(picked.columns)),
            *(len(picked.rows), columns, width, wide),
        )

    return gather


def row_by_row(
    transform: Transform, x: NDArray[Any], out: NDArray[Any], *, backend: Backend = "auto"
) -> Callable[..., None]:
    """Return what transforms images of `x` into images of `out`, on the thread that calls.

    ``row_by_row(transform, x, out)(i, j)`` is ``apply(transform, x[i], out[j])``, checked once for
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
    >>> row_by_row(Transform("tf"), x, out)(1, 3)
    >>> (out == apply(Transform("tf"), x[1])).all(axis=(1, 2, 3)).tolist()
    [False, False, False, True]
    """
    input_name, shape, dtype = _result_of(transform, x.shape, x.dtype)
    _check_out(out, x, transform, (len(out), *shape[1:]), dtype)
    if not (x.flags.c_contiguous and x.dtype.isnative):
        raise UsageError("the rows of x do not lie one after the other", "use fastvgg.preprocess")
    work = (transform, input_name)
    packs = transform.direction == "pack"
    chosen = backends.choose("numpy" if packs else backend, work, x.nbytes + out.nbytes, 1)
    if chosen == "numpy":

        def apply_oracle(row: int, out_row: int, count: int = 1) -> None:
            with backends.on_oracle(work, count * (x[0].nbytes + out[0].nbytes)):
                out[out_row : out_row + count] = oracle.apply(transform, x[row : row + count])

        return apply_oracle
    kernel = _kernel(
        transform,
        input_name,
        streams=out.nbytes >= SMALLEST_STREAMED_BYTES,
        aligned_planes=_Memory.of(out, transform.out_layout).has_aligned_planes,
    )
    return _KernelOnRows(kernel, transform, x, out)


class _KernelOnRows:
    """A kernel on rows. It holds the batches: the loop knows addresses alone."""

    def __init__(
        self, kernel: _Kernel, transform: Transform, x: NDArray[Any], out: NDArray[Any]
    ) -> None:
        self._held = kernel, x, out
        self._loop = kernel.loop
        self._constants_address = kernel.constants_address
        source, target = _Memory.of(x, transform.layout), _Memory.of(out, transform.out_layout)
        self._source, self._target = source, target
        self._rest = (
            x[0].size // 3,
            *(source.image_bytes, source.plane_bytes, target.image_bytes, target.plane_bytes),
        )

    def __call__(self, row: int, out_row: int, count: int = 1) -> None:
        first, out_first = self._source.at(row, 0), self._target.at(out_row, 0)
        self._loop(first, out_first, self._constants_address, count, *self._rest)


def _address(array: NDArray[Any]) -> int:
    address: int = array.__array_interface__["data"][0]  # half the time of array.ctypes.data
    return address


@functools.lru_cache(maxsize=256)
def _result_of(
    transform: Transform, shape: tuple[int, ...], dtype: np.dtype[Any]
) -> tuple[str, tuple[int, ...], np.dtype[Any]]:
    """Check an input; return its storage type, and the shape and type of its result."""
    name = storage_name(dtype)
    transform.check_input(shape, name)
    return name, transform.output_shape(shape), storage_dtype(transform.output_name(name))


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


class _Piece(NamedTuple):
    """Some whole images, or some rows of one image; to a kernel, each pixel is a row."""

    image: int
    images: int
    row: int
    rows: int

    def of(self, batch: NDArray[Any], layout: Layout) -> NDArray[Any]:
        """Return the piece's view of a batch."""
        images = slice(self.image, self.image + self.images)
        rows = slice(self.row, self.row + self.rows)
        return batch[images, rows] if layout == "NHWC" else batch[images, :, rows]


def _cut(
    images: int, rows: int, row_bytes: int, piece_bytes: int, *, lead: int = 0, multiple: int = 1
) -> list[_Piece]:
    """Cut a batch into pieces of about `piece_bytes`, but no less than `multiple` rows.

    An image that is larger is cut `lead` rows past the multiples of `multiple`.

    >>> [tuple(piece) for piece in _cut(images=3, rows=4, row_bytes=10, piece_bytes=80)]
    [(0, 2, 0, 4), (2, 1, 0, 4)]
    >>> [tuple(piece) for piece in _cut(images=1, rows=4, row_bytes=10, piece_bytes=30)]
    [(0, 1, 0, 3), (0, 1, 3, 1)]
    >>> [tuple(piece) for piece in _cut(1, 20, 10, piece_bytes=90, lead=3, multiple=4)]
    [(0, 1, 0, 11), (0, 1, 11, 8), (0, 1, 19, 1)]
    """
    together = piece_bytes // max(1, rows * row_bytes)
    if together:
        return [
            _Piece(image, min(together, images - image), 0, rows)
            for image in range(0, images, together)
        ]
    step = max(1, piece_bytes // (row_bytes * multiple)) * multiple
    starts = [0, *range(lead + step, rows, step)]
    stretches = [*zip(starts, [*starts[1:], rows], strict=True)]
    return [
        _Piece(image, 1, start, stop - start)
        for image in range(images)
        for start, stop in stretches
    ]


_Work: TypeAlias = "tuple[list[_Piece], Callable[[_Piece], None]]"


def _oracle_work(
    transform: Transform, source: NDArray[Any], target: NDArray[Any], threads: int
) -> _Work:
    def work_on(piece: _Piece) -> None:
        result = oracle.apply(transform, piece.of(source, transform.layout))
        piece.of(target, transform.out_layout)[...] = result

    return _gathered_pieces(transform, source, target, threads), work_on


class _Memory(NamedTuple):
    """Where the pixels of a contiguous batch are."""

    address: int
    image_bytes: int
    plane_bytes: int
    pixel_bytes: int

    @classmethod
    def of(cls, batch: NDArray[Any], layout: Layout) -> _Memory:
        """Describe the memory of a contiguous batch."""
        return cls(_address(batch), *_steps(batch.shape, batch.dtype.itemsize, layout))

    @property
    def has_aligned_planes(self) -> bool:
        """Whether all planes begin at the same place of a cache line."""
        return self.plane_bytes % LINE_BYTES == 0

    def at(self, image: int, pixel: int) -> int:
        """Return the address of a pixel; where planes differ, in the first plane."""
        return self.address + image * self.image_bytes + pixel * self.pixel_bytes


@functools.lru_cache(maxsize=256)
def _steps(shape: tuple[int, ...], element_bytes: int, layout: Layout) -> tuple[int, int, int]:
    """Return the bytes from image to image, plane to plane and pixel to pixel."""
    image_bytes = math.prod(shape[1:]) * element_bytes
    return image_bytes, image_bytes // 3, element_bytes * (3 if layout == "NHWC" else 1)


def _kernel_work(
    transform: Transform,
    source: NDArray[Any],
    target: NDArray[Any],
    threads: int,
    streams: bool,
) -> _Work:
    lying = _as_it_lies(transform.layout, source)
    if lying is None:
        return _gathering_work(transform, source, target, threads, streams)
    layout, reverses, x = lying
    if layout != transform.layout:
        transform = _with_layout(transform, layout)
    y = _Memory.of(target, transform.out_layout)
    in_place = x.address == y.address
    kernel = _kernel(
        transform,
        _stored_name(source.dtype),
        reverses=reverses,
        in_place=in_place,
        streams=streams and not in_place,
        aligned_planes=y.has_aligned_planes,
    )
    images, pixels = source.shape[0], source.size // (3 * source.shape[0])
    if layout == transform.out_layout == "NHWC":
        images, pixels = 1, images * pixels
    steps = (x.image_bytes, x.plane_bytes, y.image_bytes, y.plane_bytes)

    def work_on(piece: _Piece) -> None:
        kernel.loop(
            x.at(piece.image, piece.row),
            y.at(piece.image, piece.row),
            kernel.constants_address,
            piece.images,
            piece.rows,
            *steps,
        )

    total_bytes = source.nbytes + target.nbytes
    piece_bytes = _piece_bytes(total_bytes, threads)
    if total_bytes <= piece_bytes:
        return [_Piece(0, images, 0, pixels)], work_on
    lead = _pixels_before_a_line(y, transform.out_layout)
    pixel_bytes = total_bytes // (images * pixels)
    pieces = _cut(images, pixels, pixel_bytes, piece_bytes, lead=lead, multiple=LINE_BYTES)
    return pieces, work_on


def _gathering_work(
    transform: Transform,
    source: NDArray[Any],
    target: NDArray[Any],
    threads: int,
    streams: bool,
) -> _Work:
    """Copy each piece into memory of its own first, where it stays in the cache."""
    y = _Memory.of(target, transform.out_layout)
    kernel = _kernel(
        transform,
        _stored_name(source.dtype),
        streams=streams,
        aligned_planes=y.has_aligned_planes,
    )
    width = source.shape[2 if transform.layout == "NHWC" else 3]
    native = source.dtype.newbyteorder("=")

    def work_on(piece: _Piece) -> None:
        gathered = np.array(piece.of(source, transform.layout), native, order="C")
        x = _Memory.of(gathered, transform.layout)
        kernel.loop(
            x.address,
            y.at(piece.image, piece.row * width),
            kernel.constants_address,
            piece.images,
            piece.rows * width,
            x.image_bytes,
            x.plane_bytes,
            y.image_bytes,
            y.plane_bytes,
        )

    return _gathered_pieces(transform, source, target, threads), work_on


class _Lying(NamedTuple):
    """A contiguous batch, of which the one that was given may be a view."""

    layout: Layout
    reverses: bool
    """Whether its channels are in the reverse of the order that the view shows."""
    memory: _Memory


def _as_it_lies(layout: Layout, batch: NDArray[Any]) -> _Lying | None:
    """Find the contiguous batch of which this one is a turned or a channel-reversed view."""
    found = _lying(layout, batch.dtype, batch.shape, batch.strides)
    if found is None:
        return None
    lying, reverses, offset, steps = found
    return _Lying(lying, reverses, _Memory(_address(batch) + offset, *steps))


@functools.lru_cache(maxsize=256)
def _lying(
    layout: Layout, dtype: np.dtype[Any], shape: tuple[int, ...], strides: tuple[int, ...]
) -> tuple[Layout, bool, int, tuple[int, int, int]] | None:
    """Return how the batch lies of which one with these strides is a view; None if it is scattered.

    That is its layout, whether its channels are reversed, the offset of its first byte from that of
    the view, and its `_steps`.
    """
    if not dtype.isnative:
        return None
    element, last = dtype.itemsize, CHANNEL_AXES[layout] % 4
    channel = strides[last]
    images, rows, columns = (size for axis, size in enumerate(shape) if axis != last)
    others = [stride for axis, stride in enumerate(strides) if axis != last]
    plane = rows * columns * element
    turned: Layout = "NCHW" if layout == "NHWC" else "NHWC"
    for lying in (layout, turned):
        pixel, between = (3 * element, element) if lying == "NHWC" else (element, plane)
        wanted = (3 * plane, columns * pixel, pixel)
        sizes = (images, rows, columns)
        if abs(channel) == between and all(
            size == 1 or stride == step
            for size, stride, step in zip(sizes, others, wanted, strict=True)
        ):
            return lying, channel < 0, min(0, 2 * channel), (3 * plane, plane, pixel)
    return None


@functools.lru_cache(maxsize=64)
def _with_layout(transform: Transform, layout: Layout) -> Transform:
    return dataclasses.replace(transform, layout=layout)


class _Kernel(NamedTuple):
    """A compiled loop, and the constants that it reads."""

    loop: Callable[..., None]
    constants: NDArray[Any]
    constants_address: int


@functools.lru_cache(maxsize=256)
def _kernel(
    transform: Transform,
    input_name: str,
    *,
    reverses: bool = False,
    in_place: bool = False,
    streams: bool,
    aligned_planes: bool,
) -> _Kernel:
    with backends.compiling:
        from fastvgg.kernels import convert
        from fastvgg.kernels.spec import KernelSpec, constant_table

        spec = KernelSpec.of(
            transform,
            input_name,
            reversed_input=reverses,
            in_place=in_place,
            nontemporal=streams,
            aligned_planes=aligned_planes,
        )
        table = constant_table(transform.mode, spec)
        kernel = _Kernel(convert.compiled(spec), table, table.ctypes.data)
    backends.has_kernel((transform, input_name))
    return kernel


def _pixels_before_a_line(memory: _Memory, layout: Layout) -> int:
    """Return after how many pixels one begins where a cache line does."""
    channels = 3 if layout == "NHWC" else 1
    element_bytes = memory.pixel_bytes // channels
    elements_in_line = LINE_BYTES // element_bytes
    elements_before = -memory.address // element_bytes
    return elements_before * pow(channels, -1, elements_in_line) % elements_in_line


def _gathered_pieces(
    transform: Transform, source: NDArray[Any], target: NDArray[Any], threads: int
) -> list[_Piece]:
    images, rows = source.shape[0], source.shape[1 if transform.layout == "NHWC" else 2]
    total_bytes = source.nbytes + target.nbytes
    piece_bytes = min(_piece_bytes(total_bytes, threads), GATHERED_PIECE_BYTES)
    return _cut(images, rows, total_bytes // (images * rows), piece_bytes)


def _piece_bytes(total_bytes: int, threads: int) -> int:
    """Return the size of even shares for the threads."""
    return max(SMALLEST_PIECE_BYTES, -(-total_bytes // (threads * PIECES_PER_THREAD)))
