"""Vector blocks: some LLVM vectors as one Numba value, and what kernels do with them.

A block is, for example, sixteen pixels, 48 values, in three vectors of sixteen lanes:

    interleaved (NHWC)   rgbrgbrgbrgbrgbr  gbrgbrgbrgbrgbrg  brgbrgbrgbrgbrgb
    planar (NCHW)        rrrrrrrrrrrrrrrr  gggggggggggggggg  bbbbbbbbbbbbbbbb

LLVM splits vectors evenly into registers of 4 (SSE, NEON), 8 (AVX) or 16 (AVX-512) float32 values.
The number of lanes is a power of two: LLVM 22 shuffles and spills vectors of 48 lanes badly.

Each function returns an intrinsic for given types; arithmetic is written with Python's operators.
float16 and bfloat16 are 16-bit integers until `widen` converts them:

    float16    s eeeee mmmmmmmmmm              a float32 is s eeeeeeee mmmmmmmmmmmmmmmmmmmmmmm
    bfloat16   s eeeeeeee mmmmmmm              (its upper half)

A new storage type is an entry of `ELEMENTS` and `ELEMENT_BYTES` and a case of `widen` and `narrow`.
"""

from __future__ import annotations

import functools
import operator
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from llvmlite import ir
from numba import types
from numba.extending import intrinsic, lower_builtin, models, register_model, type_callable

from fastvgg.kernels.jit import processor

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from fastvgg.transform import Rounding

__all__ = [
    "CACHE_LINE_BYTES",
    "ELEMENT_BYTES",
    "MIN_LANES",
    "TABLE_COLUMNS",
    "Block",
    "Constants",
    "align_stack",
    "canonical_nan",
    "compiler_barrier",
    "deinterleave",
    "divide",
    "interleave",
    "load",
    "load_bytes",
    "load_channel",
    "load_channel_constants",
    "load_int64",
    "load_interleaved_constants",
    "load_lines",
    "multiply_add",
    "narrow",
    "prefetch",
    "reverse_channels",
    "reverse_planes",
    "round_to_float",
    "round_to_uint8",
    "store",
    "store_fence",
    "widen",
]

MIN_LANES: Final = 16
TABLE_COLUMNS: Final = 18
"""Of a constant table: sixteen lanes that start at column 0, 1 or 2."""
CACHE_LINE_BYTES: Final = 64
PREFETCH_DISTANCE_BYTES: Final = 3072
STACK_ALIGNMENT_BYTES: Final = 64
WINDOW_BYTES: Final = 16  # what a byte shuffle reaches on every processor

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

# Bit patterns of float32 and of halves.
F32_INFINITY: Final = 0x7F800000
F32_HALF: Final = 0x3F000000  # 0.5
F32_TO_F16_EXPONENT: Final = (127 - 15) << 23
F16_INFINITY: Final = 0x7C00
F16_NAN: Final = 0x7E00
F16_OVERFLOW: Final = 0x477FF000  # 65520 as float32: rounds to infinity
F16_SMALLEST_NORMAL: Final = 0x38800000  # 2**-14 as float32
SIGN: Final = 0x8000

ROUNDING_MAGIC: Final = {"float32": 2.0**23, "float64": 2.0**52}


class Block(types.Type):
    """The Numba type of a block: some vectors of one storage type and length."""

    def __init__(self, storage: str, lanes: int, vectors: int) -> None:
        self.storage = storage
        self.lanes = lanes
        self.vectors = vectors
        super().__init__(name=f"Block({storage}, {lanes}, {vectors})")

    def of(self, storage: str) -> Block:
        """Return the type of a block of the same shape that holds another storage type."""
        return Block(storage, self.lanes, self.vectors)


@register_model(Block)
class BlockModel(models.PrimitiveModel):
    """The LLVM type of a block: an array of vectors, which LLVM keeps in registers."""

    def __init__(self, manager: Any, kind: Block) -> None:
        vector = ir.VectorType(ELEMENTS[kind.storage], kind.lanes)
        super().__init__(manager, kind, ir.ArrayType(vector, kind.vectors))


def _unpack(b: Any, block: Any) -> list[Any]:
    return [b.extract_value(block, number) for number in range(block.type.count)]


def _pack(b: Any, vectors: Sequence[Any]) -> Any:
    block = ir.Constant(ir.ArrayType(vectors[0].type, len(vectors)), ir.Undefined)
    for number, vector in enumerate(vectors):
        block = b.insert_value(block, vector, number)
    return block


def _map(b: Any, emit: Callable[..., Any], *blocks: Any) -> Any:
    """Apply `emit` to the vectors of blocks, one by one."""
    vectors = zip(*(_unpack(b, block) for block in blocks), strict=True)
    return _pack(b, [emit(b, *each) for each in vectors])


def _define_operator(function: Callable[..., Any], instruction: str) -> None:
    """Compile a Python operator between two blocks of one type to an LLVM instruction."""

    def emit(b: Any, first: Any, second: Any) -> Any:
        return getattr(b, instruction)(first, second)

    @type_callable(function)
    def type_operator(_context: Any) -> Callable[[Any, Any], Any]:
        return lambda first, second: first if isinstance(first, Block) and first == second else None

    @lower_builtin(function, Block, Block)
    def lower_operator(_context: Any, b: Any, _signature: Any, blocks: Any) -> Any:
        return _map(b, emit, *blocks)


for _function, _instruction in (
    (operator.add, "fadd"),
    (operator.sub, "fsub"),
    (operator.mul, "fmul"),
    (operator.truediv, "fdiv"),
):
    _define_operator(_function, _instruction)


def _on_each_vector(result: Callable[[Block], Block], emit: Callable[[Any, Any], Any]) -> Any:
    """Return an intrinsic from a block to a block of type `result`."""

    @intrinsic
    def on_each_vector(_context: Any, block: Any) -> Any:
        return result(block)(block), lambda _, b, __, blocks: _map(b, emit, *blocks)

    return on_each_vector


# Memory


def _past(b: Any, address: Any, count: int) -> Any:
    return b.add(address, ir.Constant(I64, count)) if count else address


def _addresses(b: Any, first_and_step: Sequence[Any], count: int) -> list[Any]:
    """Return addresses that are some bytes apart."""
    address, step = first_and_step
    addresses = [address]
    for _ in range(count - 1):
        addresses.append(b.add(addresses[-1], step))
    return addresses


def _load(b: Any, address: Any, storage: str, lanes: int) -> Any:
    pointer = b.inttoptr(address, ir.PointerType())
    return b.load(pointer, align=1, typ=ir.VectorType(ELEMENTS[storage], lanes))


@functools.cache
def load(storage: str, lanes: int, vectors: int) -> Any:
    """Load vectors that are `step` bytes apart: intrinsic(address, step). Any alignment will do."""
    kind = Block(storage, lanes, vectors)

    @intrinsic
    def load_block(_context: Any, _address: Any, _step: Any) -> Any:
        def emit(_: Any, b: Any, __: Any, arguments: Any) -> Any:
            addresses = _addresses(b, arguments, vectors)
            return _pack(b, [_load(b, address, storage, lanes) for address in addresses])

        return kind(types.int64, types.int64), emit

    return load_block


def _loader(kind: Any, emit: Callable[[Any, Any], Any]) -> Any:
    """Return an intrinsic from an address to `kind`."""

    @intrinsic
    def load_block(_context: Any, _address: Any) -> Any:
        return kind(types.int64), lambda _, b, __, arguments: emit(b, arguments[0])

    return load_block


@functools.cache
def load_bytes(offsets: tuple[int, ...], lanes: int, block_bytes: int, compute: str) -> Any:
    """Load bytes at given offsets from an address, and convert them to the compute type.

    Four neighbouring lanes come from one window of sixteen bytes, by one byte shuffle that also
    extends them to 32 bits. No window reaches beyond `block_bytes` from the address.
    """
    words, values = ir.VectorType(I32, lanes), ir.VectorType(ELEMENTS[compute], lanes)

    def load_four(b: Any, address: Any, first: int) -> Any:
        start = min(_window_start(offsets, first), block_bytes - WINDOW_BYTES)
        window = _load(b, _past(b, address, start), "uint8", WINDOW_BYTES)
        zeros, zero = ir.Constant(window.type, None), WINDOW_BYTES  # the first lane of `zeros`
        four = offsets[first : first + 4]
        origins = [lane for offset in four for lane in (offset - start, zero, zero, zero)]
        return _shuffle(b, window, zeros, origins)

    def load_vector(b: Any, address: Any, first: int) -> Any:
        fours = [load_four(b, address, at) for at in range(first, first + lanes, 4)]
        return b.sitofp(b.bitcast(_concat(b, fours), words), values)

    def emit(b: Any, address: Any) -> Any:
        return _pack(b, [load_vector(b, address, at) for at in range(0, len(offsets), lanes)])

    return _loader(Block(compute, lanes, len(offsets) // lanes), emit)


def _window_start(offsets: Sequence[int], first: int) -> int:
    """Return where the window of four lanes starts: at a pixel, so that channels share windows.

    Eight lanes share one where it reaches all of them: AVX2 then loads it into both halves.

    >>> [_window_start((2, 1, 0, 5, 4, 3, 8, 7), first) for first in (0, 4)]
    [0, 0]
    >>> [_window_start((1, 4, 7, 10, 13, 16, 19, 22), first) for first in (0, 4)]
    [0, 12]
    """
    eight = offsets[first // 8 * 8 : first // 8 * 8 + 8]
    start = min(eight) // 3 * 3
    if max(eight) - start < WINDOW_BYTES:
        return start
    return min(offsets[first : first + 4]) // 3 * 3


@functools.cache
def load_channel(storage: str, lanes: int) -> Any:
    """Load one channel of interleaved pixels: every third element from the address on.

    The last of three loads starts two elements early, because the two elements after the last one
    wanted may lie outside of the array.
    """
    size = ELEMENT_BYTES[storage]

    def emit(b: Any, address: Any) -> Any:
        starts = (0, lanes, 2 * lanes - 2)
        vectors = [_load(b, _past(b, address, start * size), storage, lanes) for start in starts]
        wanted = range(0, 3 * lanes, 3)
        return _pack(b, [_permute(b, vectors, [at if at < 2 * lanes else at + 2 for at in wanted])])

    return _loader(Block(storage, lanes, 1), emit)


@functools.cache
def load_lines(lines: int, line_bytes: int) -> Any:
    """Load cache lines, each from `line_bytes`: fewer are repeated, more are combined."""

    def load_line(b: Any, address: Any) -> Any:
        if line_bytes < CACHE_LINE_BYTES:
            part = _load(b, address, "uint8", line_bytes)
            return _concat(b, [part] * (CACHE_LINE_BYTES // line_bytes))
        starts = range(0, line_bytes, CACHE_LINE_BYTES)
        parts = [_load(b, _past(b, address, at), "uint8", CACHE_LINE_BYTES) for at in starts]
        return functools.reduce(b.xor, parts)

    def emit(b: Any, address: Any) -> Any:
        return _pack(b, [load_line(b, _past(b, address, n * line_bytes)) for n in range(lines)])

    return _loader(Block("uint8", CACHE_LINE_BYTES, lines), emit)


def _emit_load_int64(b: Any, address: Any) -> Any:
    return b.load(b.inttoptr(address, ir.PointerType()), align=8, typ=I64)


load_int64: Final = _loader(types.int64, _emit_load_int64)
"""Load an aligned 64-bit integer."""


class Constants(NamedTuple):
    """The constants of a mode, each as a block."""

    divide: Any
    divide_reciprocal: Any
    divide_remainder: Any
    mean: Any
    std: Any
    std_reciprocal: Any
    std_remainder: Any
    slope: Any
    intercept: Any


def _constants_loader(kind: Block, load_one: Callable[[Any, Any], Any]) -> Any:
    """Return an intrinsic from the address of a constant table to `Constants`."""
    count = len(Constants._fields)
    row_bytes = TABLE_COLUMNS * ELEMENT_BYTES[kind.storage]

    @intrinsic
    def load_constants(_context: Any, _table: Any) -> Any:
        def emit(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
            rows = [_past(b, arguments[0], row * row_bytes) for row in range(count)]
            blocks = [load_one(b, address) for address in rows]
            return context.make_tuple(b, signature.return_type, blocks)

        return types.NamedUniTuple(kind, count, Constants)(types.int64), emit

    return load_constants


@functools.cache
def load_interleaved_constants(compute: str, lanes: int) -> Any:
    """Load the constants of interleaved pixels from a table.

    Each row holds three values that repeat: a b c a b c ... A register starts with a, b or c, so
    three registers hold those of a whole block. LLVM would spill nine or more.
    """
    size = ELEMENT_BYTES[compute]
    width = min(lanes, processor().vector_bytes // size)

    def load_one(b: Any, address: Any) -> Any:
        phases = [_load(b, _past(b, address, phase * size), compute, width) for phase in range(3)]
        registers = [phases[start % 3] for start in range(0, 3 * lanes, width)]
        each = lanes // width
        firsts = range(0, len(registers), each)
        return _pack(b, [_concat(b, registers[first : first + each]) for first in firsts])

    return _constants_loader(Block(compute, lanes, 3), load_one)


@functools.cache
def load_channel_constants(compute: str, lanes: int, vectors: int) -> Any:
    """Load the constants of neighbouring channels from a table, each into all lanes of a vector."""
    size = ELEMENT_BYTES[compute]

    def load_one(b: Any, address: Any) -> Any:
        values = [_load(b, _past(b, address, at * size), compute, 1) for at in range(vectors)]
        return _pack(b, [_shuffle(b, value, None, [0] * lanes) for value in values])

    return _constants_loader(Block(compute, lanes, vectors), load_one)


@functools.cache
def store(*, nontemporal: bool) -> Any:
    """Store the vectors of a block `step` bytes apart: intrinsic(address, step, block).

    With `nontemporal`, avoid read-for-ownership; each address must then be a multiple of the size
    of a vector, or of a cache line if that is smaller. Otherwise any alignment will do.
    """

    @intrinsic
    def store_block(_context: Any, _address: Any, _step: Any, block: Any) -> Any:
        nbytes = ELEMENT_BYTES[block.storage] * block.lanes
        align = min(nbytes, CACHE_LINE_BYTES) if nontemporal else 1

        def emit(_: Any, b: Any, __: Any, arguments: Any) -> None:
            *place, value = arguments
            addresses = _addresses(b, place, block.vectors)
            for address, vector in zip(addresses, _unpack(b, value), strict=True):
                written = b.store(vector, b.inttoptr(address, ir.PointerType()), align=align)
                if nontemporal:
                    one = b.module.add_metadata([ir.Constant(I32, 1)])
                    written.set_metadata("nontemporal", one)

        return types.void(types.int64, types.int64, block), emit

    return store_block


@functools.cache
def prefetch(nbytes: int, count: int) -> Any:
    """Prefetch `nbytes` in each of `count` places `step` bytes apart: intrinsic(address, step).

    What is prefetched lies `PREFETCH_DISTANCE_BYTES` ahead, and may lie outside of the array.
    Instructions between two loads reduce the loads in flight, and the hardware prefetcher falls
    behind: float32 to uint8 ran at 0.61 to 0.90 of the memory bandwidth without prefetching, at
    0.92 to 0.99 with it. Distances from 2 to 6 KiB are equally good.
    """
    kind = ir.FunctionType(ir.VoidType(), [ir.PointerType(), I32, I32, I32])
    read, streaming, data = (ir.Constant(I32, number) for number in (0, 0, 1))
    end = PREFETCH_DISTANCE_BYTES + nbytes

    @intrinsic
    def prefetch_bytes(_context: Any, _address: Any, _step: Any) -> Any:
        def emit(_: Any, b: Any, __: Any, arguments: Any) -> None:
            declared = b.module.declare_intrinsic("llvm.prefetch.p0", fnty=kind)
            for address in _addresses(b, arguments, count):
                for distance in range(PREFETCH_DISTANCE_BYTES, end, CACHE_LINE_BYTES):
                    pointer = b.inttoptr(_past(b, address, distance), ir.PointerType())
                    b.call(declared, [pointer, read, streaming, data])

        return types.void(types.int64, types.int64), emit

    return prefetch_bytes


def _effect(emit: Callable[[Any], None]) -> Any:
    """Return an intrinsic without arguments or result."""

    @intrinsic
    def effect(_context: Any) -> Any:
        def emit_effect(_: Any, b: Any, __: Any, ___: Any) -> None:
            emit(b)

        return types.void(), emit_effect

    return effect


def _emit_compiler_barrier(b: Any) -> None:
    b.asm(ir.FunctionType(ir.VoidType(), []), "", "~{memory}", [], side_effect=True)


def _emit_store_fence(b: Any) -> None:
    if processor().is_x86:
        kind = ir.FunctionType(ir.VoidType(), [])
        b.call(b.module.declare_intrinsic("llvm.x86.sse.sfence", fnty=kind), [])


def _emit_align_stack(b: Any) -> None:
    b.function.attributes.add("nounwind")  # llvmlite omits alignstack from an empty set
    b.function.attributes.alignstack = STACK_ALIGNMENT_BYTES


compiler_barrier: Final = _effect(_emit_compiler_barrier)
"""Compiler-only memory barrier; emits no instruction.

LLVM otherwise moves the loads and prefetches of a block to its beginning, which costs up to 0.1 of
the throughput, and needs registers for all of them at once.
"""

store_fence: Final = _effect(_emit_store_fence)
"""Order non-temporal stores before later stores. On x86 that takes an `sfence`, which LLVM's own
fences omit (https://github.com/llvm/llvm-project/issues/64521)."""

align_stack: Final = _effect(_emit_align_stack)
"""Align the stack of the calling kernel to 64 bytes.

A spilled register that crosses a page waits behind non-temporal stores, which takes 200 ns a block
on Zen 3. An aligned one never crosses a page.
"""


# Lane order


def _shuffle(b: Any, first: Any, second: Any, lanes: Sequence[int]) -> Any:
    mask = ir.Constant(ir.VectorType(I32, len(lanes)), list(lanes))
    return b.shuffle_vector(first, first if second is None else second, mask)


def _concat(b: Any, parts: Sequence[Any]) -> Any:
    """Concatenate vectors of one length; their number is a power of two."""
    while len(parts) > 1:
        pairs = zip(parts[::2], parts[1::2], strict=True)
        lanes = range(2 * parts[0].type.count)
        parts = [_shuffle(b, first, second, lanes) for first, second in pairs]
    return parts[0]


def _permute(b: Any, vectors: Sequence[Any], origins: Sequence[int]) -> Any:
    """Return a vector of lanes taken from three vectors, whose lanes are numbered consecutively.

    LLVM shuffles two vectors at a time, so vectors are added one after the other. A lane that a
    later vector supplies holds any value until then.
    """
    lanes = vectors[0].type.count
    used = sorted({origin // lanes for origin in origins})
    result = vectors[used[0]]
    lane_of = {used[0] * lanes + lane: lane for lane in range(lanes)}
    if len(used) == 1:
        return _shuffle(b, result, None, [lane_of[origin] for origin in origins])
    for number in used[1:]:
        lane_of |= {number * lanes + lane: lanes + lane for lane in range(lanes)}
        mask = [lane_of.get(origin, lane) for lane, origin in enumerate(origins)]
        result = _shuffle(b, result, vectors[number], mask)
        lane_of = {origin: lane for lane, origin in enumerate(origins) if origin in lane_of}
    return result


def _permutation(origin: Callable[[int, int], int]) -> Any:
    """Return an intrinsic that permutes the lanes of three vectors.

    Lane i of the result is lane `origin(i, lanes)` of the block, counted through its vectors.
    """

    @intrinsic
    def permute(_context: Any, block: Any) -> Any:
        def emit(_: Any, b: Any, __: Any, blocks: Any) -> Any:
            lanes, vectors = block.lanes, _unpack(b, blocks[0])
            origins = [origin(at, lanes) for at in range(3 * lanes)]
            firsts = range(0, 3 * lanes, lanes)
            return _pack(b, [_permute(b, vectors, origins[at : at + lanes]) for at in firsts])

        return block(block), emit

    return permute


reverse_channels: Final = _permutation(lambda at, _: at + 2 - 2 * (at % 3))
"""Reverse the channels of interleaved pixels: r g b r g b  ->  b g r b g r."""

reverse_planes: Final = _permutation(lambda at, lanes: (2 - at // lanes) * lanes + at % lanes)
"""Reverse the channels of planar pixels: r r, g g, b b  ->  b b, g g, r r."""

interleave: Final = _permutation(lambda at, lanes: at % 3 * lanes + at // 3)
"""Make planar pixels interleaved: r r, g g, b b  ->  r g b r g b."""

deinterleave: Final = _permutation(lambda at, lanes: at % lanes * 3 + at // lanes)
"""Make interleaved pixels planar: r g b r g b  ->  r r, g g, b b."""


# Types


def _like(vector: Any, element: ir.Type) -> ir.VectorType:
    return ir.VectorType(element, vector.type.count)


def _splat(kind: ir.VectorType, number: float) -> ir.Constant:
    return ir.Constant(kind, [number] * kind.count)


@functools.cache
def widen(storage: str, compute: str) -> Any:
    """Convert stored elements to the compute type."""

    def emit(b: Any, stored: Any) -> Any:
        kind = _like(stored, ELEMENTS[compute])
        if storage == "uint8":
            return b.sitofp(b.zext(stored, _like(stored, I32)), kind)
        if storage == "float16":
            return _convert(b, _widen_float16(b, stored), kind)
        if storage == "bfloat16":
            return _convert(b, _widen_bfloat16(b, stored), kind)
        return _convert(b, stored, kind)

    return _on_each_vector(lambda block: block.of(compute), emit)


@functools.cache
def narrow(storage: str, *, may_tie: bool = True) -> Any:
    """Convert values to a floating storage type, rounding half to even; NaN must be canonical.

    Without `may_tie`, no value lies halfway between two of bfloat16, which saves two instructions.
    """

    def emit(b: Any, values: Any) -> Any:
        if storage == "float16":
            return _narrow_float16(b, _convert(b, values, _like(values, FLOAT)))
        if storage == "bfloat16":
            return _narrow_bfloat16(b, _convert(b, values, _like(values, FLOAT)), may_tie)
        return _convert(b, values, _like(values, ELEMENTS[storage]))

    return _on_each_vector(lambda block: block.of(storage), emit)


def _convert(b: Any, values: Any, kind: ir.VectorType) -> Any:
    if values.type == kind:
        return values
    return b.fpext(values, kind) if kind.element == DOUBLE else b.fptrunc(values, kind)


def _widen_float16(b: Any, halves: Any) -> Any:
    floats, words = _like(halves, FLOAT), _like(halves, I32)
    if processor().has_f16c:
        return b.fpext(b.bitcast(halves, _like(halves, HALF)), floats)
    wide = b.zext(halves, words)
    sign = b.shl(b.and_(wide, _splat(words, SIGN)), _splat(words, 16))
    magnitude = b.shl(b.and_(wide, _splat(words, 0x7FFF)), _splat(words, 13))
    # The exponent is 112 too small. A multiplication corrects it, for subnormal halves too.
    number = b.bitcast(b.fmul(b.bitcast(magnitude, floats), _splat(floats, 2.0**112)), words)
    is_number = b.icmp_unsigned("<", magnitude, _splat(words, F16_INFINITY << 13))
    bits = b.select(is_number, number, b.or_(magnitude, _splat(words, F32_INFINITY)))
    return b.bitcast(b.or_(sign, bits), floats)


def _narrow_float16(b: Any, floats: Any) -> Any:
    if processor().has_f16c:
        return b.bitcast(b.fptrunc(floats, _like(floats, HALF)), _like(floats, I16))
    words = _like(floats, I32)
    bits = b.bitcast(floats, words)
    sign = b.and_(b.lshr(bits, _splat(words, 16)), _splat(words, SIGN))
    magnitude = b.and_(bits, _splat(words, 0x7FFFFFFF))
    # Half to even: add just under half, and the last bit that remains.
    odd = b.and_(b.lshr(magnitude, _splat(words, 13)), _splat(words, 1))
    raised = b.add(b.add(magnitude, _splat(words, 0x0FFF)), odd)
    half = b.lshr(b.sub(raised, _splat(words, F32_TO_F16_EXPONENT)), _splat(words, 13))
    # Next to 0.5 the adder rounds to multiples of 2**-24, which subnormal halves are.
    small = b.fadd(b.bitcast(magnitude, floats.type), _splat(floats.type, 0.5))
    subnormal = b.sub(b.bitcast(small, words), _splat(words, F32_HALF))
    is_small = b.icmp_unsigned("<", magnitude, _splat(words, F16_SMALLEST_NORMAL))
    half = b.select(is_small, subnormal, half)
    overflows = b.icmp_unsigned(">=", magnitude, _splat(words, F16_OVERFLOW))
    half = b.select(overflows, _splat(words, F16_INFINITY), half)
    is_nan = b.icmp_unsigned(">", magnitude, _splat(words, F32_INFINITY))
    half = b.select(is_nan, _splat(words, F16_NAN), half)
    return b.trunc(b.or_(sign, half), _like(floats, I16))


def _widen_bfloat16(b: Any, halves: Any) -> Any:
    words = _like(halves, I32)
    return b.bitcast(b.shl(b.zext(halves, words), _splat(words, 16)), _like(halves, FLOAT))


def _narrow_bfloat16(b: Any, floats: Any, may_tie: bool) -> Any:
    words = _like(floats, I32)
    bits = b.bitcast(floats, words)
    if may_tie:
        odd = b.and_(b.lshr(bits, _splat(words, 16)), _splat(words, 1))
        rounded = b.add(b.add(bits, _splat(words, 0x7FFF)), odd)
    else:
        rounded = b.add(bits, _splat(words, 0x8000))
    return b.trunc(b.lshr(rounded, _splat(words, 16)), _like(floats, I16))


# Arithmetic that takes more than one instruction


@functools.cache
def divide(division: str) -> Any:
    """Divide by a constant: intrinsic(x, divisor, reciprocal, remainder).

    "division" divides; "none" returns x. "reciprocal" takes two cheap operations instead: the
    reciprocal and its rounding error together have twice the precision, and the products of both
    with x are added with one rounding (N. Brisebarre, J.-M. Muller, "Correctly rounded
    multiplication by arbitrary precision constants", IEEE Trans. Computers 57, 2008).
    `spec.reciprocal_is_exact` decides for which numbers that is the quotient.
    """

    def emit(b: Any, x: Any, divisor: Any, reciprocal: Any, remainder: Any) -> Any:
        if division == "none":
            return x
        if division == "division":
            return b.fdiv(x, divisor)
        return _fma(b, x, reciprocal, b.fmul(x, remainder))

    @intrinsic
    def divide_block(_context: Any, x: Any, divisor: Any, reciprocal: Any, remainder: Any) -> Any:
        signature = x(x, divisor, reciprocal, remainder)
        return signature, lambda _, b, __, blocks: _map(b, emit, *blocks)

    return divide_block


def _fma(b: Any, x: Any, y: Any, z: Any) -> Any:
    bits = {FLOAT: 32, DOUBLE: 64}[x.type.element]
    kind = ir.FunctionType(x.type, [x.type] * 3)
    fused = b.module.declare_intrinsic(f"llvm.fma.v{x.type.count}f{bits}", fnty=kind)
    return b.call(fused, [x, y, z])


def _emit_multiply_add(b: Any, x: Any, slope: Any, intercept: Any) -> Any:
    if processor().has_fma:
        return _fma(b, x, slope, intercept)
    return b.fadd(b.fmul(x, slope), intercept)


@intrinsic
def multiply_add(_context: Any, x: Any, slope: Any, intercept: Any) -> Any:
    """Compute x * slope + intercept, rounded once on processors with FMA, otherwise twice."""
    signature = x(x, slope, intercept)
    return signature, lambda _, b, __, blocks: _map(b, _emit_multiply_add, *blocks)


def _emit_canonical_nan(b: Any, values: Any) -> Any:
    kind = values.type
    quiet = {
        FLOAT: ir.Constant(ir.VectorType(I32, kind.count), [0x7FC00000] * kind.count),
        DOUBLE: ir.Constant(ir.VectorType(I64, kind.count), [0x7FF8 << 48] * kind.count),
    }[kind.element]
    return b.select(b.fcmp_ordered("ord", values, values), values, b.bitcast(quiet, kind))


canonical_nan: Final = _on_each_vector(lambda block: block, _emit_canonical_nan)
"""Replace every NaN by the canonical quiet NaN."""


@functools.cache
def round_to_uint8(rounding: Rounding) -> Any:
    """Saturate and round: NaN and values below 0 become 0, values above 255 become 255."""

    def emit(b: Any, x: Any) -> Any:
        if rounding == "truncate":
            return b.fptoui(_clamp(b, x, 0.25, 255.0), _like(x, I8))
        # The minimum turns infinity into 255 and keeps NaN. The conversion rounds half to even. x86
        # converts NaN and values out of range to the smallest integer; Arm saturates and converts
        # NaN to zero. Clamping either result to 0..255 gives the byte of the contract, and on x86
        # the clamp is part of the instructions that pack.
        integer, bits = (I32, 32) if x.type.element == FLOAT or processor().is_x86 else (I64, 64)
        integers, maximum = _like(x, integer), _splat(x.type, 255.0)
        x = b.select(b.fcmp_ordered("<", maximum, x), maximum, x)
        real = {FLOAT: "f32", DOUBLE: "f64"}[x.type.element]
        lanes = x.type.count
        name = f"llvm.lrint.v{lanes}i{bits}.v{lanes}{real}"
        convert = b.module.declare_intrinsic(name, fnty=ir.FunctionType(integers, [x.type]))
        rounded = b.call(convert, [x])
        zero, maximum = _splat(integers, 0), _splat(integers, 255)
        rounded = b.select(b.icmp_signed(">", rounded, zero), rounded, zero)
        rounded = b.select(b.icmp_signed("<", rounded, maximum), rounded, maximum)
        return b.trunc(rounded, _like(x, I8))

    return _on_each_vector(lambda block: block.of("uint8"), emit)


@functools.cache
def round_to_float(rounding: Rounding) -> Any:
    """Saturate and round as `round_to_uint8` does, in the compute type."""

    def emit(b: Any, x: Any) -> Any:
        if rounding == "truncate":
            return b.uitofp(b.fptoui(_clamp(b, x, 0.25, 255.0), _like(x, I32)), x.type)
        # The sum has no bit for a fraction, so the adder rounds half to even.
        magic = ROUNDING_MAGIC[{FLOAT: "float32", DOUBLE: "float64"}[x.type.element]]
        rounded = _clamp(b, b.fadd(x, _splat(x.type, magic)), magic, magic + 255.0)
        return b.fsub(rounded, _splat(x.type, magic))

    return _on_each_vector(lambda block: block, emit)


def _clamp(b: Any, x: Any, low: float, high: float) -> Any:
    """Clamp; NaN becomes `low`.

    A `low` of 0 would take two instructions instead of one; 0.25 is truncated to 0 as well.
    """
    smallest, largest = _splat(x.type, low), _splat(x.type, high)
    x = b.select(b.fcmp_ordered(">", x, smallest), x, smallest)
    return b.select(b.fcmp_ordered("<", x, largest), x, largest)
