"""One pass over memory, made of blocks, for every pair of types and layouts, there and back.

A loop goes from the first pixel to the last and moves each byte once: read, widened, computed,
narrowed and written in registers. Most pixels go in blocks whose results fill whole cache lines;
those before the first whole line and after the last go one by one, through the same blocks with
fewer lanes.

A woven (NHWC) target is written in one stretch. A planar (NCHW) one is written plane by plane, a
tile of pixels at a time, so that each plane can be aligned by itself; the source of a tile is read
again for each plane, from the caches. In place, plane by plane would overwrite what another plane
still needs where channels are flipped: there the three planes go together.
"""

from __future__ import annotations

import contextlib
import functools
from typing import TYPE_CHECKING, Any, Final

from llvmlite import ir
from numba.core.cgutils import for_range

from fastvgg.kernels import blocks
from fastvgg.kernels.blocks import ELEMENT_BYTES, LINE_BYTES
from fastvgg.kernels.compile import machine_code
from fastvgg.kernels.recipe import ROW_LANES, ROWS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from fastvgg.kernels.recipe import Division, Recipe

__all__ = ["TILE_PIXELS", "compiled"]

TILE_PIXELS: Final = 4096  # of uint8: 12 KiB, of float32: 48 KiB
TOGETHER: Final = ROW_LANES // 3  # pixels in registers at a time


@functools.cache
def compiled(recipe: Recipe) -> Callable[..., None]:
    """Return the loop of a recipe.

    It is called with addresses, of the source, the target and the constants; then how many images
    and how many pixels of each; then the bytes from one image to the next and from one plane to the
    next, of the source and of the target. Planes mean nothing where a side is woven.
    """
    return machine_code(functools.partial(_pass_over, recipe), 9)


def _pass_over(
    recipe: Recipe,
    b: Any,
    source: Any,
    target: Any,
    constants: Any,
    images: Any,
    pixels: Any,
    source_image: Any,
    source_plane: Any,
    target_image: Any,
    target_plane: Any,
) -> None:
    """Emit what goes over images, tiles of them, and planes of a tile."""
    number = functools.partial(ir.Constant, pixels.type)
    by_plane = recipe.planar_target and not recipe.in_place
    tiles = b.sdiv(b.add(pixels, number(TILE_PIXELS - 1)), number(TILE_PIXELS))
    source_bytes = number(ELEMENT_BYTES[recipe.source])
    channel_step = source_plane if recipe.planar_source else source_bytes
    compute_bytes = number(ELEMENT_BYTES[recipe.compute])
    with (
        for_range(b, images) as image,
        for_range(b, tiles if by_plane else number(1)) as tile,
        for_range(b, number(3 if by_plane else 1)) as plane,
    ):
        channel = plane.index
        if recipe.flips and by_plane:
            channel = b.sub(number(2), channel)
        x = b.add(source, b.mul(image.index, source_image))
        x = b.add(x, b.mul(channel, channel_step))
        y = b.add(target, b.mul(image.index, target_image))
        y = b.add(y, b.mul(plane.index, target_plane))
        here = b.add(constants, b.mul(plane.index, compute_bytes))
        at, end = number(0), pixels
        if by_plane:
            at, end = _tile(b, recipe, tile.index, y, pixels)
        _stretch(b, recipe, (x, y, here, source_plane), at, end)
    if recipe.streams:
        blocks.fence(b)


def _tile(b: Any, recipe: Recipe, tile: Any, y: Any, pixels: Any) -> tuple[Any, Any]:
    """Return where a tile begins and ends: where a line of this plane does, if that matters."""
    number = functools.partial(ir.Constant, pixels.type)
    start = at = b.mul(tile, number(TILE_PIXELS))
    if recipe.streams:
        before_a_line = b.and_(b.neg(y), number(LINE_BYTES - 1))
        shift = b.udiv(before_a_line, number(ELEMENT_BYTES[recipe.target]))
        at = b.add(start, shift)
    end = b.add(at, number(TILE_PIXELS))
    is_first = b.icmp_signed("==", tile, number(0))
    is_last = b.icmp_signed(">", end, pixels)
    return b.select(is_first, start, at), b.select(is_last, pixels, end)


def _stretch(b: Any, recipe: Recipe, where: tuple[Any, ...], begin: Any, end: Any) -> None:
    """Emit what goes over the pixels of a stretch: in blocks where it can, else one by one."""
    x, y, constants, source_plane = where
    number = functools.partial(ir.Constant, begin.type)
    count = LINE_BYTES // ELEMENT_BYTES[recipe.target]
    by_plane = recipe.planar_target and not recipe.in_place
    make = _plane if by_plane else _planes if recipe.planar_target else _pixels
    before = b.block
    check, body, done = (b.append_basic_block() for _ in range(3))
    b.branch(check)
    b.position_at_end(check)
    at = b.phi(begin.type)
    at.add_incoming(begin, before)
    b.cbranch(b.icmp_signed("<", at, end), body, done)
    b.position_at_end(body)
    p = b.add(x, b.mul(at, number(_pixel_bytes(recipe.source, recipe.planar_source))))
    q = b.add(y, b.mul(at, number(_pixel_bytes(recipe.target, recipe.planar_target))))
    fits = b.icmp_signed("<=", b.add(at, number(count)), end)
    if recipe.streams:
        in_line = b.and_(q, number(LINE_BYTES - 1))
        fits = b.and_(fits, b.icmp_signed("==", in_line, number(0)))
    with b.if_else(fits) as (many, one):
        with many:
            times = b.udiv(b.sub(end, at), number(count))
            make(recipe, count)(b, p, q, constants, source_plane, times)
            after_many, many_done = b.add(at, b.mul(times, number(count))), b.block
        with one:
            make(recipe, 1)(b, p, q, constants, source_plane, number(1))
            after_one, one_done = b.add(at, number(1)), b.block
    following = b.phi(begin.type)
    following.add_incoming(after_many, many_done)
    following.add_incoming(after_one, one_done)
    b.branch(check)
    at.add_incoming(following, b.block)
    b.position_at_end(done)


def _pixels(recipe: Recipe, count: int) -> Callable[..., None]:
    """Return what emits blocks from any layout to `count` woven pixels."""
    together = min(count, TOGETHER)

    def emit(
        b: Any, source: Any, target: Any, constants: Any, plane_bytes: Any, times: Any
    ) -> None:
        rows = _rows(b, recipe, blocks.load, constants, 3 * together)
        with _each_block(b, recipe, count, source, target, times) as (x, y):
            results = []
            for start in range(0, count, together):
                blocks.keep_order(b)
                if recipe.planar_source:
                    address = blocks.past(b, x, start * ELEMENT_BYTES[recipe.source])
                    planes = _three_planes(b, recipe, address, plane_bytes, together)
                    stored = blocks.weave(b, planes)
                else:
                    address = blocks.past(b, x, start * 3 * ELEMENT_BYTES[recipe.source])
                    stored = blocks.load(b, address, recipe.source, 3 * together)
                    if recipe.flips and not recipe.flips_late:
                        stored = blocks.flip(b, stored)
                if count > 1:
                    _fetch_ahead(b, recipe, address, plane_bytes, together)
                result = _computed(b, recipe, stored, rows)
                results.append(blocks.flip(b, result) if recipe.flips_late else result)
            _write(b, recipe, blocks.join(b, results), y, whole_lines=count > 1)

    return emit


def _plane(recipe: Recipe, count: int) -> Callable[..., None]:
    """Return what emits blocks from any layout to `count` pixels of one plane."""
    together = min(count, TOGETHER)
    load = blocks.load if recipe.planar_source else blocks.load_every_third
    step = _pixel_bytes(recipe.source, recipe.planar_source)

    def emit(
        b: Any, source: Any, target: Any, constants: Any, _plane_bytes: Any, times: Any
    ) -> None:
        rows = _rows(b, recipe, blocks.load_everywhere, constants, together)
        with _each_block(b, recipe, count, source, target, times) as (x, y):
            results = []
            for start in range(0, count, together):
                blocks.keep_order(b)
                address = blocks.past(b, x, start * step)
                stored = load(b, address, recipe.source, together)
                if count > 1:
                    blocks.fetch_ahead(b, address, together * step)
                results.append(_computed(b, recipe, stored, rows))
            _write(b, recipe, blocks.join(b, results), y, whole_lines=count > 1)

    return emit


def _planes(recipe: Recipe, count: int) -> Callable[..., None]:
    """Return what emits blocks that work on `count` pixels of three planes in place."""

    def emit(
        b: Any, source: Any, target: Any, constants: Any, plane_bytes: Any, times: Any
    ) -> None:
        rows_of_channels = []
        for channel in range(3):
            address = blocks.past(b, constants, channel * ELEMENT_BYTES[recipe.compute])
            rows_of_channels.append(_rows(b, recipe, blocks.load_everywhere, address, count))
        with _each_block(b, recipe, count, source, target, times) as (x, y):
            planes = _three_planes(b, recipe, x, plane_bytes, count)
            if count > 1:
                _fetch_ahead(b, recipe, x, plane_bytes, count)
            for stored, rows in zip(planes, rows_of_channels, strict=True):
                blocks.store(b, _computed(b, recipe, stored, rows), y)
                y = b.add(y, plane_bytes)

    return emit


def _rows(
    b: Any, recipe: Recipe, load: Callable[..., Any], constants: Any, lanes: int
) -> dict[str, Any]:
    """Read the constants, once for all blocks of a stretch."""
    row_bytes = ROW_LANES * ELEMENT_BYTES[recipe.compute]
    return {
        row: load(b, blocks.past(b, constants, number * row_bytes), recipe.compute, lanes)
        for number, row in enumerate(ROWS)
    }


@contextlib.contextmanager
def _each_block(
    b: Any, recipe: Recipe, count: int, source: Any, target: Any, times: Any
) -> Iterator[tuple[Any, Any]]:
    """Emit a loop over neighbouring blocks, at least one, and yield the addresses of one.

    Nothing is asked before the first one: LLVM then keeps the constants in registers. Else it takes
    them together anew for each block, with up to 170 more instructions.
    """
    before, again, done = b.block, b.append_basic_block(), b.append_basic_block()
    b.branch(again)
    b.position_at_end(again)
    block = b.phi(times.type)
    block.add_incoming(ir.Constant(times.type, 0), before)

    def here(start: Any, pixel_bytes: int) -> Any:
        return b.add(start, b.mul(block, ir.Constant(start.type, count * pixel_bytes)))

    yield (
        here(source, _pixel_bytes(recipe.source, recipe.planar_source)),
        here(target, _pixel_bytes(recipe.target, recipe.planar_target)),
    )
    following = b.add(block, ir.Constant(times.type, 1))
    block.add_incoming(following, b.block)
    b.cbranch(b.icmp_signed("<", following, times), again, done)
    b.position_at_end(done)


def _pixel_bytes(storage: str, planar: bool) -> int:
    """Return the bytes from one pixel to the next."""
    return ELEMENT_BYTES[storage] * (1 if planar else 3)


def _three_planes(b: Any, recipe: Recipe, address: Any, plane_bytes: Any, count: int) -> list[Any]:
    """Read pixels of three planes, in the order that the target wants them."""
    planes = []
    for _ in range(3):
        planes.append(blocks.load(b, address, recipe.source, count))
        address = b.add(address, plane_bytes)
    return planes[::-1] if recipe.flips else planes


def _fetch_ahead(b: Any, recipe: Recipe, source: Any, plane_bytes: Any, count: int) -> None:
    """Ask for what a later block reads where this one reads `count` pixels."""
    row_bytes = count * ELEMENT_BYTES[recipe.source]
    if not recipe.planar_source:
        blocks.fetch_ahead(b, source, 3 * row_bytes)
        return
    for _ in range(3):
        blocks.fetch_ahead(b, source, row_bytes)
        source = b.add(source, plane_bytes)


def _write(b: Any, recipe: Recipe, result: Any, target: Any, *, whole_lines: bool) -> None:
    if recipe.streams and whole_lines:
        blocks.store_past_caches(b, result, target)
    else:
        blocks.store(b, result, target)


def _computed(b: Any, recipe: Recipe, stored: Any, rows: dict[str, Any]) -> Any:
    """Turn source elements into target elements, with the operations of the oracle."""
    values = blocks.widen(b, stored, recipe.source, recipe.compute)
    if recipe.restores:
        return _image(b, recipe, values, rows)
    y = _divided(b, values, recipe.divides, rows, "divide")
    y = b.fsub(y, rows["mean"])
    y = _divided(b, y, recipe.scales, rows, "std")
    return blocks.narrow(b, y, recipe.target, may_be_nan=recipe.source != "uint8")


def _divided(b: Any, x: Any, division: Division, rows: dict[str, Any], row: str) -> Any:
    if division == "none":
        return x
    if division == "division":
        return b.fdiv(x, rows[row])
    return blocks.divide_by_reciprocal(b, x, rows[f"1 / {row}"], rows[f"rest of 1 / {row}"])


def _image(b: Any, recipe: Recipe, y: Any, rows: dict[str, Any]) -> Any:
    if recipe.scales != "none":
        y = b.fmul(y, rows["std"])
    x = b.fadd(y, rows["mean"])
    if recipe.divides != "none":
        x = b.fmul(x, rows["divide"])
    if recipe.target == "uint8":
        return blocks.round_to_bytes(b, x, recipe.rounding)
    whole = blocks.round_to_floats(b, x, recipe.rounding)
    return blocks.narrow(b, whole, recipe.target, may_be_nan=False)
