"""Shuffles between the orders of the values of a block.

Three interleaved groups of lanes become planes by one blend and one shuffle per channel, because
the number of lanes is not a multiple of three. For groups of four lanes:

    r0 g0 b0 r1   g1 b1 r2 g2   b2 r3 g3 b3
    r0 r3 r2 r1   g1 g0 g3 g2   b2 b1 b0 b3     each channel blended
    r0 r1 r2 r3   g0 g1 g2 g3   b0 b1 b2 b3     each shuffled

The vectors of a block can also be *split*: the even values, then the odd values. Two bfloat16 in a
32-bit word then become two float32 without crossing words.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from numba.extending import intrinsic

from fastvgg.kernels import jit
from fastvgg.kernels.vector import (
    ELEMENT_BYTES,
    SHUFFLE_BYTES,
    elementwise_intrinsic,
    pack,
    permute,
    shuffle,
    unpack,
)

if TYPE_CHECKING:
    from collections.abc import Callable

LaneIndex: TypeAlias = tuple[int, int, int]
"""A lane of a block: its vector, its group in the vector, and its lane in the group."""

Permutation: TypeAlias = "Callable[[int, int, int, int, int], LaneIndex]"
"""The origin of a lane, as a function of its place, the number of groups and their lanes."""


def _permute_intrinsic(*steps: Permutation) -> Any:
    """Return an intrinsic that reorders the lanes of three vectors.

    A vector consists of groups of sixteen bytes, which most byte shuffles do not cross. A step
    consists of such shuffles and blends, or exchanges whole groups. The steps are emitted one by
    one, or composed into one permutation if the CPU permutes whole vectors.
    """

    @intrinsic
    def reorder(_context: Any, block: Any) -> Any:
        shuffles = [_shuffle_mask(step, block) for step in steps]
        composed = [
            functools.reduce(lambda first, second: [first[lane] for lane in second], shuffles)
        ]

        def emit(_: Any, b: Any, __: Any, blocks: Any) -> Any:
            vectors, firsts = unpack(b, blocks[0]), range(0, 3 * block.lanes, block.lanes)
            size = ELEMENT_BYTES[block.storage]
            for origins in composed if size >= jit.processor().min_permute_bytes else shuffles:
                vectors = [permute(b, vectors, origins[i : i + block.lanes]) for i in firsts]
            return pack(b, vectors)

        return block(block), emit

    return reorder


def _shuffle_mask(step: Permutation, block: Any) -> list[int]:
    """Return the origin of each lane of a block, both numbered through its three vectors."""
    width = min(block.lanes, SHUFFLE_BYTES // ELEMENT_BYTES[block.storage])
    groups = block.lanes // width
    lanes = [(v, g, lane) for v in range(3) for g in range(groups) for lane in range(width)]
    origins = [step(*index, groups, width) for index in lanes]
    return [(v * groups + g) * width + lane for v, g, lane in origins]


def _gather_pixels(v: int, g: int, lane: int, groups: int, _width: int) -> LaneIndex:
    """Move the three groups of the same pixels to the same place in the three vectors."""
    return *divmod(3 * g + v, groups), lane


def _scatter_pixels(v: int, g: int, lane: int, groups: int, _width: int) -> LaneIndex:
    """Move three groups at the same place of the three vectors next to each other."""
    g, v = divmod(v * groups + g, 3)
    return v, g, lane


def _gather_channel(v: int, g: int, lane: int, _groups: int, width: int) -> LaneIndex:
    """Blend the values of channel `v`; their lanes differ, as a width is not a multiple of 3."""
    return (v - lane) * width % 3, g, lane


def _scatter_channels(v: int, g: int, lane: int, _groups: int, width: int) -> LaneIndex:
    """Blend three channels whose values are in the lanes of their pixels."""
    return (v * width + lane) % 3, g, lane


def _sort_channel(v: int, g: int, lane: int, _groups: int, width: int) -> LaneIndex:
    """Shuffle the result of `_gather_channel` into the order of the pixels."""
    return v, g, (3 * lane + v) % width


def _unsort_channel(v: int, g: int, lane: int, _groups: int, width: int) -> LaneIndex:
    """Shuffle a channel into the lanes that `_scatter_channels` expects."""
    return v, g, (lane - v) * pow(3, -1, width) % width


def _reverse_pixels(v: int, g: int, lane: int, _groups: int, width: int) -> LaneIndex:
    """Reverse the channels of pixels whose three groups are at the same place."""
    value = v * width + lane
    v, lane = divmod(value + 2 - 2 * (value % 3), width)
    return v, g, lane


def _reverse_vectors(v: int, g: int, lane: int, _groups: int, _width: int) -> LaneIndex:
    return 2 - v, g, lane


reverse_channels: Final = _permute_intrinsic(_gather_pixels, _reverse_pixels, _scatter_pixels)
"""Reverse the channels of interleaved pixels: r g b r g b  ->  b g r b g r."""

reverse_planes: Final = _permute_intrinsic(_reverse_vectors)
"""Reverse the channels of planar pixels: r r, g g, b b  ->  b b, g g, r r."""

interleave: Final = _permute_intrinsic(_unsort_channel, _scatter_channels, _scatter_pixels)
"""Interleave planar pixels: r r, g g, b b  ->  r g b r g b."""

deinterleave: Final = _permute_intrinsic(_gather_pixels, _gather_channel, _sort_channel)
"""Deinterleave pixels into planes: r g b r g b  ->  r r, g g, b b."""


def even_odd_order(lanes: int) -> tuple[int, ...]:
    """Return the index of the value in each lane of a split vector: even values, then odd values.

    >>> even_odd_order(8)
    (0, 2, 4, 6, 1, 3, 5, 7)
    """
    return *range(0, lanes, 2), *range(1, lanes, 2)


def _emit_merge(b: Any, vector: Any) -> Any:
    half = vector.type.count // 2
    return shuffle(b, vector, None, [lane // 2 + lane % 2 * half for lane in range(2 * half)])


merge: Final = elementwise_intrinsic(lambda block: block, _emit_merge)
"""Merge the halves of split vectors into the original order."""
