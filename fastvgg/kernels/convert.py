"""The preprocess and restore kernels, for all types and layouts.

Each kernel is a single pass: every pixel is loaded once, converted in registers and stored once.
Most pixels are converted in blocks. Non-temporal stores need cache-line-aligned blocks, so the
pixels before the first aligned block and after the last block are converted one at a time.

All arguments are addresses and sizes in bytes, which `engine` has checked.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, Final

from fastvgg.kernels import arithmetic, memory, order
from fastvgg.kernels.jit import always_inline, kernel
from fastvgg.kernels.memory import align_stack, compiler_barrier, store_fence
from fastvgg.kernels.vector import ELEMENT_BYTES
from fastvgg.tiling import CACHE_LINE_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable

    from fastvgg.kernels.spec import KernelSpec

TILE_PIXELS: Final = 1024  # 3 KiB of uint8, 12 KiB of float32
ARGUMENT_COUNT: Final = 9
STREAM_DISTANCE_BYTES: Final = 6144
"""The distance between two streams is an odd multiple of this: a page and a half, and whole blocks.
Loads at the same offset in two pages compete for cache lines and reach 0.89 of the limit; this
distance reaches 1."""


@functools.cache
def compile_kernel(spec: KernelSpec) -> Callable[..., None]:
    """Return the kernel of a spec. A spec has no constants of modes, so there are finitely many.

    Its arguments are the addresses of source, target and constant table; the number of images, and
    of pixels in each; then the strides in bytes between images and between planes, of the source
    and of the target. The plane stride of an interleaved side is not used.
    """
    return _plane_by_plane(spec) if spec.is_plane_by_plane else _pixel_by_pixel(spec)


def _pixel_by_pixel(spec: KernelSpec) -> Callable[..., None]:
    """Return a kernel that writes the three channels of a block together."""
    lanes, nontemporal = spec.lanes, spec.nontemporal
    convert_run = _run_converter(spec)
    is_source_planar, is_target_planar = spec.is_source_planar, spec.is_target_planar
    source_element, element = ELEMENT_BYTES[spec.source], ELEMENT_BYTES[spec.target]
    pixel = element * (1 if is_target_planar else 3)

    @kernel(ARGUMENT_COUNT)
    def convert_pixels(
        source, target, table, images, pixels, source_image, source_plane, image_bytes, plane_bytes
    ):
        align_stack()
        source_step = source_plane if is_source_planar else source_element
        step = plane_bytes if is_target_planar else element
        source_block_step = source_plane if is_source_planar else lanes * source_element
        block_step = plane_bytes if is_target_planar else lanes * element
        for image in range(images):
            x = source + image * source_image
            y = target + image * image_bytes
            end = y + pixels * pixel
            convert_run(x, source_block_step, source_step, y, block_step, step, end, table)
        if nontemporal:
            store_fence()

    return convert_pixels


def _plane_by_plane(spec: KernelSpec) -> Callable[..., None]:
    """Return a kernel that writes planes one after the other, so that each is aligned separately.

    Interleaved images are split into tiles that stay in the cache until all planes are written.
    """
    nontemporal, is_source_planar = spec.nontemporal, spec.is_source_planar
    convert_run = _run_converter(spec)
    has_reversed_channels, constant = spec.has_reversed_channels, ELEMENT_BYTES[spec.compute]
    source_element, element = ELEMENT_BYTES[spec.source], ELEMENT_BYTES[spec.target]
    source_pixel = source_element * (1 if is_source_planar else 3)

    @kernel(ARGUMENT_COUNT)
    def convert_planes(
        source, target, table, images, pixels, source_image, source_plane, image_bytes, plane_bytes
    ):
        align_stack()
        channel_bytes = source_plane if is_source_planar else source_element
        tile_pixels = max(1, pixels) if is_source_planar else TILE_PIXELS
        for image in range(images):
            for tile in range(0, pixels, tile_pixels):
                for plane in range(3):
                    channel = 2 - plane if has_reversed_channels else plane
                    x = source + image * source_image + channel * channel_bytes
                    y = target + image * image_bytes + plane * plane_bytes
                    # All tiles except the first start at a cache line of their plane.
                    shift = -y % CACHE_LINE_BYTES // element if nontemporal else 0
                    end = y + min(tile + tile_pixels + shift, pixels) * element
                    begin = tile + shift if tile else 0
                    x += begin * source_pixel
                    y += begin * element
                    convert_run(x, 0, 0, y, 0, 0, end, table + plane * constant)
        if nontemporal:
            store_fence()

    return convert_planes


def _run_converter(spec: KernelSpec) -> Any:
    """Return the part of a kernel that converts consecutive pixels, or a channel of them.

    Its arguments are the address of the source and its vector strides, in a block and in a pixel;
    those of the target, and the address after it; and the address of the first channel's constants.
    """
    lanes, nontemporal = spec.lanes, spec.nontemporal
    convert_blocks, convert_pixel = _blocks_converter(spec), _converter(spec, 1)
    channels = 1 if spec.is_plane_by_plane else 3
    load_block_constants = (
        memory.load_channel_constants(spec.compute, lanes, channels)
        if spec.is_compute_planar
        else memory.load_interleaved_constants(spec.compute, lanes, split=spec.is_split)
    )
    load_pixel_constants = memory.load_channel_constants(spec.compute, 1, channels)
    source_pixel = ELEMENT_BYTES[spec.source] * (1 if spec.is_source_planar else 3)
    pixel = ELEMENT_BYTES[spec.target] * (1 if spec.is_target_planar else 3)

    @always_inline
    def convert_run(x, source_block_step, source_step, y, block_step, step, end, table):
        while y < end:
            if not nontemporal or y % CACHE_LINE_BYTES == 0:
                constants = load_block_constants(table)
                blocks = (end - y) // (lanes * pixel)
                x, y = convert_blocks(x, source_block_step, y, block_step, constants, blocks)
            if y < end:
                convert_pixel(x, source_step, y, step, load_pixel_constants(table))
                x += source_pixel
                y += pixel

    return convert_run


@always_inline
def stream_blocks(blocks: int, distance_blocks: int) -> int:
    """Return the blocks in each of two streams: an odd multiple of `distance_blocks`, or 0."""
    return max(0, (blocks // (2 * distance_blocks) - 1) | 1) * distance_blocks


def _blocks_converter(spec: KernelSpec) -> Any:
    """Return the part of a kernel that converts many blocks.

    Its arguments are those of `_converter` and the number of blocks; it returns the addresses after
    them.
    """
    convert_block = _converter(spec, spec.lanes)
    source_block = spec.lanes * ELEMENT_BYTES[spec.source] * (1 if spec.is_source_planar else 3)
    block = spec.lanes * ELEMENT_BYTES[spec.target] * (1 if spec.is_target_planar else 3)
    distance_blocks = STREAM_DISTANCE_BYTES // source_block

    @always_inline
    def convert_stream(x, source_step, y, step, constants, blocks):
        for _ in range(blocks):
            convert_block(x, source_step, y, step, constants)
            x += source_block
            y += block
        return x, y

    @always_inline
    def convert_two_streams(x, source_step, y, step, constants, blocks):
        pairs = stream_blocks(blocks, distance_blocks)
        # Hop to the other stream, then back to the next block of this one.
        hop, target_hop = pairs * source_block, pairs * block
        for _ in range(2 * pairs):
            convert_block(x, source_step, y, step, constants)
            x += hop
            y += target_hop
            hop, target_hop = source_block - hop, block - target_hop
        x += pairs * source_block
        y += pairs * block
        return convert_stream(x, source_step, y, step, constants, blocks - 2 * pairs)

    return convert_two_streams if spec.has_two_streams else convert_stream


def _converter(spec: KernelSpec, lanes: int) -> Any:
    """Return the part of a kernel that converts `lanes` pixels, or one channel of them.

    Its arguments are the address and the vector stride of the source, those of the target, and the
    constants. It loads everything before it stores anything. A single pixel is not prefetched.
    """
    split, places = spec.is_split and lanes > 1, _source_places(spec)
    pixel = ELEMENT_BYTES[spec.source] * (1 if spec.is_source_planar else 3)
    prefetch_bytes = lanes * pixel if lanes > 1 else 0
    distance = memory.prefetch_distance(ELEMENT_BYTES[spec.source], ELEMENT_BYTES[spec.target])
    prefetch = memory.prefetch(prefetch_bytes, places, distance)
    read, calculate = _reader(spec, lanes, split), _calculation(spec, split=split)
    shuffle, is_result_shuffled = _shuffle(spec), spec.is_result_shuffled
    store = memory.store(nontemporal=spec.nontemporal and lanes > 1)

    @always_inline
    def convert(x, source_step, y, step, constants):
        compiler_barrier()
        prefetch(x, source_step)
        result = calculate(read(x, source_step), constants)
        store(y, step, shuffle(result) if is_result_shuffled else result)

    return convert


def _source_places(spec: KernelSpec) -> int:
    """Return at how many places a kernel reads: in each plane if it reads planes together."""
    return 3 if spec.is_source_planar and not spec.is_plane_by_plane else 1


def _reader(spec: KernelSpec, lanes: int, split: bool) -> Any:
    """Return the function that loads what `_converter` converts.

    The values have the type and the order of the arithmetic.
    """
    interleaved, by_plane = not spec.is_source_planar and lanes > 1, spec.is_plane_by_plane
    if spec.source == "uint8" and (interleaved or split):
        block_bytes = 3 * lanes if interleaved else lanes
        if interleaved and by_plane:
            block_bytes -= 2  # it starts at its channel, and ends with it
        offsets = _byte_offsets(spec, lanes)
        return memory.load_bytes(offsets, lanes, block_bytes, spec.compute, _source_places(spec))
    if interleaved and by_plane:
        load = memory.load_channel(spec.source, lanes)
    else:
        load = memory.load(spec.source, lanes, 1 if by_plane else 3)
    widen = arithmetic.widen(spec.source, spec.compute, split=split)
    shuffle, shuffles_first = _shuffle(spec), not (by_plane or spec.is_result_shuffled)

    @always_inline
    def read(x, step):
        block = load(x, step)
        return widen(shuffle(block) if shuffles_first else block)

    return read


def _byte_offsets(spec: KernelSpec, lanes: int) -> tuple[int, ...]:
    """Return the source offset of each value of a block, in the order of the arithmetic."""
    values = order.even_odd_order(lanes) if spec.is_split else tuple(range(lanes))
    if spec.is_source_planar:
        return values
    if spec.is_plane_by_plane:
        return tuple(range(0, 3 * lanes, 3))
    channels = (2, 1, 0) if spec.has_reversed_channels else (0, 1, 2)
    if spec.is_target_planar:
        return tuple(3 * pixel + channel for channel in channels for pixel in range(lanes))
    values = tuple(lanes * number + value for number in range(3) for value in values)
    return tuple(value // 3 * 3 + channels[value % 3] for value in values)


def _shuffle(spec: KernelSpec) -> Any:
    """Return the function that shuffles a block from the order of the source to the target's."""
    is_source_planar, reverses = spec.is_source_planar, spec.has_reversed_channels
    interleaves = is_source_planar and not spec.is_target_planar
    deinterleaves = spec.is_target_planar and not is_source_planar
    reverses_planes = reverses and (is_source_planar or deinterleaves)

    @always_inline
    def shuffle(block):
        if deinterleaves:
            block = order.deinterleave(block)
        if reverses_planes:
            block = order.reverse_planes(block)
        elif reverses:
            block = order.reverse_channels(block)
        return order.interleave(block) if interleaves else block

    return shuffle


def _calculation(spec: KernelSpec, *, split: bool) -> Any:
    """Return the function that computes results from values of the compute type."""
    divide, scale = arithmetic.divide(spec.divide), arithmetic.divide(spec.scale)
    is_affine, divides, scales = spec.is_affine, spec.divide != "none", spec.scale != "none"
    may_be_nan, to_uint8 = spec.source != "uint8", spec.target == "uint8"
    narrow = arithmetic.narrow(spec.target, has_ties=spec.has_ties, split=split)
    round_to_uint8 = arithmetic.round_to_uint8(spec.rounding)
    round_to_float = arithmetic.round_to_float(spec.rounding)
    multiply_add: Any = arithmetic.multiply_add

    @always_inline
    def preprocess(x, c):
        if is_affine:
            return narrow(multiply_add(x, c.slope, c.intercept))
        y = divide(x, c.divide, c.divide_reciprocal, c.divide_reciprocal_low) - c.mean
        y = scale(y, c.std, c.std_reciprocal, c.std_reciprocal_low)
        return narrow(arithmetic.canonical_nan(y) if may_be_nan else y)

    @always_inline
    def saturate(x):
        if not to_uint8:
            return narrow(round_to_float(x))
        return order.merge(round_to_uint8(x)) if split else round_to_uint8(x)

    @always_inline
    def restore(y, c):
        if is_affine:
            return saturate(multiply_add(y, c.slope, c.intercept))
        x = (y * c.std if scales else y) + c.mean
        return saturate(x * c.divide if divides else x)

    return restore if spec.is_restore else preprocess
