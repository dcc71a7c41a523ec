"""The order of the values of a block.

Three interleaved groups of lanes become planes by one blend and one shuffle for each channel, as
the number of lanes is no multiple of three. For groups of four lanes:

    r0 g0 b0 r1   g1 b1 r2 g2   b2 r3 g3 b3
    r0 r3 r2 r1   g1 g0 g3 g2   b2 b1 b0 b3     each channel blended
    r0 r1 r2 r3   g0 g1 g2 g3   b0 b1 b2 b3     each shuffled

Besides interleaved and planar, vectors of a block can be *split*: the even values, then the odd
ones. A word that holds two bfloat16 then becomes two float32 without moving them to other words.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from numba.extending import intrinsic

from fastvgg.kernels import jit
from fastvgg.kernels.vector import (
    ELEMENT_BYTES,
    SHUFFLE_BYTES,
    on_each_vector,
    pack,
    permute,
    shuffle,
    unpack,
)

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = [
    "deinterleave",
    "interleave",
    "merge",
    "reverse_channels",
    "reverse_planes",
    "split_order",
]

Place: TypeAlias = tuple[int, int, int]
"""A lane of a block: the vector, the group in that, and the lane in the group."""

Step: TypeAlias = "Callable[[int, int, int, int, int], Place]"
"""Where a lane comes from: a function of its place and of the numbers of groups and lanes."""


def _reordering(*steps: Step) -> Any:
    """Return an intrinsic that reorders the lanes of three vectors.

    A vector consists of groups of sixteen bytes, which most byte shuffles do not cross. A step
    consists of such shuffles and blends, or exchanges whole groups. The steps are taken in turn, or
    at once where the processor permutes whole vectors.
    """

    @intrinsic
    def reorder(_context: Any, block: Any) -> Any:
        moves = [_origins(step, block) for step in steps]
        at_once = [functools.reduce(lambda first, then: [first[at] for at in then], moves)]

        def emit(_: Any, b: Any, __: Any, blocks: Any) -> Any:
            vectors, firsts = unpack(b, blocks[0]), range(0, 3 * block.lanes, block.lanes)
            size = ELEMENT_BYTES[block.storage]
            for origins in at_once if size >= jit.processor().permuted_bytes else moves:
                vectors = [permute(b, vectors, origins[i : i + block.lanes]) for i in firsts]
            return pack(b, vectors)

        return block(block), emit

    return reorder


def _origins(step: Step, block: Any) -> list[int]:
    """Return where each lane of a block comes from, both counted through its three vectors."""
    width = min(block.lanes, SHUFFLE_BYTES // ELEMENT_BYTES[block.storage])
    groups = block.lanes // width
    places = [(v, g, at) for v in range(3) for g in range(groups) for at in range(width)]
    found = [step(*place, groups, width) for place in places]
    return [(v * groups + g) * width + at for v, g, at in found]


def _gather_pixels(v: int, g: int, at: int, groups: int, _width: int) -> Place:
    """Bring the three groups of the same pixels to the same place in the three vectors."""
    return *divmod(3 * g + v, groups), at


def _scatter_pixels(v: int, g: int, at: int, groups: int, _width: int) -> Place:
    """Bring three groups at the same place of the three vectors next to each other."""
    g, v = divmod(v * groups + g, 3)
    return v, g, at


def _gather_channel(v: int, g: int, at: int, _groups: int, width: int) -> Place:
    """Blend the values of channel `v`: each is in another lane, as a width is no multiple of 3."""
    return (v - at) * width % 3, g, at


def _scatter_channels(v: int, g: int, at: int, _groups: int, width: int) -> Place:
    """Blend three channels whose values are in the lanes of their pixels."""
    return (v * width + at) % 3, g, at


def _sort_channel(v: int, g: int, at: int, _groups: int, width: int) -> Place:
    """Bring the values that `_gather_channel` leaves into the order of the pixels."""
    return v, g, (3 * at + v) % width


def _unsort_channel(v: int, g: int, at: int, _groups: int, width: int) -> Place:
    """Bring the values of a channel to the lanes where `_scatter_channels` expects them."""
    return v, g, (at - v) * pow(3, -1, width) % width


def _reverse_pixels(v: int, g: int, at: int, _groups: int, width: int) -> Place:
    """Reverse the channels of pixels whose three groups are at the same place."""
    value = v * width + at
    v, at = divmod(value + 2 - 2 * (value % 3), width)
    return v, g, at


def _reverse_vectors(v: int, g: int, at: int, _groups: int, _width: int) -> Place:
    return 2 - v, g, at


reverse_channels: Final = _reordering(_gather_pixels, _reverse_pixels, _scatter_pixels)
"""Reverse the channels of interleaved pixels: r g b r g b  ->  b g r b g r."""

reverse_planes: Final = _reordering(_reverse_vectors)
"""Reverse the channels of planar pixels: r r, g g, b b  ->  b b, g g, r r."""

interleave: Final = _reordering(_unsort_channel, _scatter_channels, _scatter_pixels)
"""Make planar pixels interleaved: r r, g g, b b  ->  r g b r g b."""

deinterleave: Final = _reordering(_gather_pixels, _gather_channel, _sort_channel)
"""Make interleaved pixels planar: r g b r g b  ->  r r, g g, b b."""


def split_order(lanes: int) -> tuple[int, ...]:
    """Return which value each lane of a split vector holds: the even ones, then the odd ones.

    >>> split_order(8)
    (0, 2, 4, 6, 1, 3, 5, 7)
    """
    return *range(0, lanes, 2), *range(1, lanes, 2)


def _emit_merge(b: Any, vector: Any) -> Any:
    half = vector.type.count // 2
    return shuffle(b, vector, None, [at // 2 + at % 2 * half for at in range(2 * half)])


merge: Final = on_each_vector(lambda block: block, _emit_merge)
"""Bring the values of split vectors into their order."""
