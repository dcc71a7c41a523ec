"""Vector blocks: several LLVM vectors as one Numba value.

For example, sixteen pixels are a block of three vectors of sixteen lanes:

    interleaved (NHWC)   rgbrgbrgbrgbrgbr  gbrgbrgbrgbrgbrg  brgbrgbrgbrgbrgb
    planar (NCHW)        rrrrrrrrrrrrrrrr  gggggggggggggggg  bbbbbbbbbbbbbbbb

LLVM splits vectors evenly into registers of 4 (SSE, NEON), 8 (AVX) or 16 (AVX-512) float32 values.
The number of lanes is a power of two: LLVM 22 shuffles and spills vectors of 48 lanes badly.

The operations on blocks are in `memory`, `order` and `arithmetic`: intrinsics, and functions that
return an intrinsic for given types. Python's operators add, subtract, multiply and divide blocks.

To add a storage type, extend `ELEMENTS`, `ELEMENT_BYTES`, `arithmetic.widen` and
`arithmetic.narrow`.
"""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any, Final

from llvmlite import ir
from numba import types
from numba.extending import intrinsic, lower_builtin, models, register_model, type_callable

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

SHUFFLE_BYTES: Final = 16  # the reach of a byte shuffle on every CPU

I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
HALF, FLOAT, DOUBLE = ir.HalfType(), ir.FloatType(), ir.DoubleType()

ELEMENTS: Final[dict[str, ir.Type]] = {
    "uint8": I8,
    "float16": I16,
    "bfloat16": I16,
    "float32": FLOAT,
    "float64": DOUBLE,
}
ELEMENT_BYTES: Final = {"uint8": 1, "float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}


class Block(types.Type):
    """The Numba type of a block: vectors of the same storage type and length."""

    def __init__(self, storage: str, lanes: int, vectors: int) -> None:
        self.storage = storage
        self.lanes = lanes
        self.vectors = vectors
        super().__init__(name=f"Block({storage}, {lanes}, {vectors})")

    def of(self, storage: str) -> Block:
        """Return the block type of the same shape with another storage type."""
        return Block(storage, self.lanes, self.vectors)


@register_model(Block)
class BlockModel(models.PrimitiveModel):
    """The LLVM type of a block: an array of vectors, which LLVM keeps in registers."""

    def __init__(self, manager: Any, kind: Block) -> None:
        vector = ir.VectorType(ELEMENTS[kind.storage], kind.lanes)
        super().__init__(manager, kind, ir.ArrayType(vector, kind.vectors))


def unpack(b: Any, block: Any) -> list[Any]:
    """Return the vectors of a block."""
    return [b.extract_value(block, number) for number in range(block.type.count)]


def pack(b: Any, vectors: Sequence[Any]) -> Any:
    """Return a block of vectors."""
    block = ir.Constant(ir.ArrayType(vectors[0].type, len(vectors)), ir.Undefined)
    for number, vector in enumerate(vectors):
        block = b.insert_value(block, vector, number)
    return block


def map_vectors(b: Any, emit: Callable[..., Any], *blocks: Any) -> Any:
    """Apply `emit` to the vectors of blocks, one by one."""
    vectors = zip(*(unpack(b, block) for block in blocks), strict=True)
    return pack(b, [emit(b, *each) for each in vectors])


def _define_operator(function: Callable[..., Any], emit: Callable[..., Any]) -> None:
    """Lower a Python operator between two blocks of the same type to an LLVM instruction."""

    @type_callable(function)
    def type_operator(_context: Any) -> Callable[[Any, Any], Any]:
        return lambda first, second: first if isinstance(first, Block) and first == second else None

    @lower_builtin(function, Block, Block)
    def lower_operator(_context: Any, b: Any, _signature: Any, blocks: Any) -> Any:
        return map_vectors(b, emit, *blocks)


_define_operator(operator.add, ir.IRBuilder.fadd)
_define_operator(operator.sub, ir.IRBuilder.fsub)
_define_operator(operator.mul, ir.IRBuilder.fmul)
_define_operator(operator.truediv, ir.IRBuilder.fdiv)


def elementwise_intrinsic(result: Callable[[Block], Block], emit: Callable[[Any, Any], Any]) -> Any:
    """Return an intrinsic from a block to a block of type `result`."""

    @intrinsic
    def elementwise_intrinsic(_context: Any, block: Any) -> Any:
        return result(block)(block), lambda _, b, __, blocks: map_vectors(b, emit, *blocks)

    return elementwise_intrinsic


def like(vector: Any, element: ir.Type) -> ir.VectorType:
    """Return the vector type of `element` with as many lanes as `vector`."""
    return ir.VectorType(element, vector.type.count)


def splat(kind: ir.VectorType, number: float) -> ir.Constant:
    """Return a vector with the same number in all lanes."""
    return ir.Constant(kind, [number] * kind.count)


def shuffle(b: Any, first: Any, second: Any, lanes: Sequence[int]) -> Any:
    """Shuffle one vector, or two whose lanes are numbered consecutively."""
    mask = ir.Constant(ir.VectorType(I32, len(lanes)), list(lanes))
    return b.shuffle_vector(first, first if second is None else second, mask)


def call_intrinsic(b: Any, name: str, result: ir.Type, *arguments: Any) -> Any:
    """Call an LLVM intrinsic, whose name includes the suffixes of its types."""
    kind = ir.FunctionType(result, [argument.type for argument in arguments])
    return b.call(b.module.declare_intrinsic(name, fnty=kind), arguments)


def concat(b: Any, parts: Sequence[Any]) -> Any:
    """Concatenate vectors of the same length; their number must be a power of two."""
    while len(parts) > 1:
        pairs = zip(parts[::2], parts[1::2], strict=True)
        lanes = range(2 * parts[0].type.count)
        parts = [shuffle(b, first, second, lanes) for first, second in pairs]
    return parts[0]


def permute(b: Any, vectors: Sequence[Any], origins: Sequence[int]) -> Any:
    """Return a vector of lanes of three vectors, which are numbered consecutively.

    LLVM shuffles two vectors at a time, so the vectors are merged one after the other. A lane that
    comes from a later vector is arbitrary until then.
    """
    lanes = vectors[0].type.count
    used = sorted({origin // lanes for origin in origins})
    result = vectors[used[0]]
    lane_of = {used[0] * lanes + lane: lane for lane in range(lanes)}
    if len(used) == 1:
        return shuffle(b, result, None, [lane_of[origin] for origin in origins])
    for number in used[1:]:
        lane_of |= {number * lanes + lane: lanes + lane for lane in range(lanes)}
        mask = [lane_of.get(origin, lane) for lane, origin in enumerate(origins)]
        result = shuffle(b, result, vectors[number], mask)
        lane_of = {origin: lane for lane, origin in enumerate(origins) if origin in lane_of}
    return result
