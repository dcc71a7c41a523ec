"""A call on a batch in memory: planned once per type, shape and strides, and run on many threads.

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
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np

from fastvgg import backend, oracle
from fastvgg.fork_lock import fork_lock
from fastvgg.interop import address_of, check_array_dtype
from fastvgg.parallel import parallel_for
from fastvgg.tiling import (
    CACHE_LINE_BYTES,
    Strides,
    Tile,
    find_base,
    partition,
    pixels_to_cache_line,
)
from fastvgg.transform import storage_dtype

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from fastvgg.tiling import ContiguousBase
    from fastvgg.transform import Transform

# A 4 MiB tile takes at least 100 us. Waking a thread costs 20-60 us, so smaller tiles do not pay
# off.
MIN_TILE_BYTES: Final = 4 * 1024 * 1024
# A copied tile is read twice; 1 MiB stays in the L2 cache between the two reads.
COPIED_TILE_BYTES: Final = 1024 * 1024
TILES_PER_THREAD: Final = 4


@dataclass(frozen=True, eq=False, slots=True)  # without eq its hash is its identity: 0.1 us
class CallPlan:
    """What all calls with the same transform, input dtype, shape and strides have in common."""

    transform: Transform
    input_type: str
    shape: tuple[int, ...]
    """The shape of the result."""
    dtype: np.dtype[Any]
    """The dtype of the result."""
    nbytes: int
    """The size of the input and the result together."""
    has_float_images: bool
    """Whether the input are images as floats, whose values may have been scaled."""
    images: int
    image_pixels: int
    base: ContiguousBase | None
    out_strides: Strides
    workload: backend.Workload


@functools.lru_cache(maxsize=256)
def plan_call(
    transform: Transform, dtype: np.dtype[Any], shape: tuple[int, ...], strides: tuple[int, ...]
) -> CallPlan:
    """Check an input, and plan the calls for inputs of the same type, shape and strides."""
    input_type = check_array_dtype(dtype)
    transform.check_input(shape, input_type)
    out_shape = transform.output_shape(shape)
    out_dtype = storage_dtype(transform.output_type(input_type))
    has_kernel = transform.direction != "pack"  # packing has no arithmetic
    return CallPlan(
        transform=transform,
        input_type=input_type,
        shape=out_shape,
        dtype=out_dtype,
        nbytes=math.prod(shape) * (dtype.itemsize + out_dtype.itemsize),
        has_float_images=transform.direction == "preprocess" and input_type != "uint8",
        images=shape[0] if len(shape) == 4 else 1,
        image_pixels=math.prod(shape[-3:]) // 3,
        base=find_base(transform.layout, dtype, shape, strides),
        out_strides=Strides.contiguous(out_shape, out_dtype.itemsize, transform.out_layout),
        workload=backend.workload(transform, input_type)
        if has_kernel
        else backend.Workload(has_kernel=False),
    )


class Kernel(NamedTuple):
    """A compiled kernel and the constants that it reads."""

    loop: Callable[..., None]
    constants: NDArray[Any]
    constants_address: int


@functools.lru_cache(maxsize=256)
def bind_kernel(plan: CallPlan, *, in_place: bool, nontemporal: bool) -> Kernel:
    """Return the kernel for the contiguous base of a plan, or for copied tiles if it has none."""
    transform, has_reversed_input = plan.transform, False
    if plan.base is not None:
        transform = dataclasses.replace(transform, layout=plan.base.layout)
        has_reversed_input = plan.base.is_reversed
    kernel = _compile(
        transform,
        plan.input_type,
        has_reversed_input=has_reversed_input,
        in_place=in_place,
        nontemporal=nontemporal,
        has_aligned_planes=plan.out_strides.plane % CACHE_LINE_BYTES == 0,
    )
    plan.workload.is_compiled = True
    return kernel


@functools.lru_cache(maxsize=256)
def _compile(transform: Transform, input_type: str, **options: bool) -> Kernel:
    with fork_lock:
        from fastvgg.kernels import convert
        from fastvgg.kernels.spec import KernelSpec, constant_table

        spec = KernelSpec.of(transform, input_type, **options)
        table = constant_table(transform.mode, spec)
        return Kernel(convert.compile_kernel(spec), table, table.ctypes.data)


def run_kernel(
    plan: CallPlan, x: NDArray[Any], out: NDArray[Any], threads: int, *, nontemporal: bool
) -> None:
    """Run a kernel on the contiguous base of `x`, or on copied tiles if it has none."""
    base, out_strides = plan.base, plan.out_strides
    if base is None:
        _run_kernel_on_copies(plan, x, out, threads, nontemporal=nontemporal)
        return
    address, out_address = address_of(x) + base.offset, address_of(out)
    in_place = address == out_address
    kernel = bind_kernel(plan, in_place=in_place, nontemporal=nontemporal and not in_place)
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


def _run_kernel_on_copies(
    plan: CallPlan, x: NDArray[Any], out: NDArray[Any], threads: int, *, nontemporal: bool
) -> None:
    """Copy each tile into a contiguous buffer, which stays in the cache, and run a kernel on it."""
    kernel = bind_kernel(plan, in_place=False, nontemporal=nontemporal)
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


def run_oracle(plan: CallPlan, x: NDArray[Any], out: NDArray[Any], threads: int) -> None:
    """Run the oracle on tiles, because its temporaries are larger than a tile."""
    transform, source, target = plan.transform, _batch(x), _batch(out)

    def convert(tile: Tile) -> None:
        result = oracle.apply(transform, tile.view(source, transform.layout))
        tile.view(target, transform.out_layout)[...] = result

    parallel_for(_copied_tiles(plan, threads), convert, threads)


def _batch(x: NDArray[Any]) -> NDArray[Any]:
    """Return a batch or an image as a plain array of rank 4."""
    array = np.asarray(x)
    return array if array.ndim == 4 else array[np.newaxis]


def _copied_tiles(plan: CallPlan, threads: int) -> list[Tile]:
    rows = plan.shape[-3 if plan.transform.out_layout == "NHWC" else -2]
    tile_bytes = min(_tile_bytes(plan.nbytes, threads), COPIED_TILE_BYTES)
    return partition(plan.images, rows, plan.nbytes // (plan.images * rows), tile_bytes)


def _tile_bytes(nbytes: int, threads: int) -> int:
    """Return the tile size that gives every thread `TILES_PER_THREAD` tiles."""
    return max(MIN_TILE_BYTES, -(-nbytes // (threads * TILES_PER_THREAD)))
