"""Vector blocks: each adds the instructions of one idea to a loop, for many values at once.

A block takes an LLVM builder (`b`) and vectors, and returns a vector. Nothing here names a
processor: LLVM cuts a vector of 48 lanes into the registers that there are. Some pixels lie in
memory as

    woven (NHWC)     r g b r g b r g b r g b        one vector
    planar (NCHW)    r r r r    g g g g    b b b b  three vectors

and keep that order of lanes from where they are read to where they are written. Halves are their
bits (16-bit integers) until they are widened:

    float16    s eeeee mmmmmmmmmm              a float32 is s eeeeeeee mmmmmmmmmmmmmmmmmmmmmmm
    bfloat16   s eeeeeeee mmmmmmm              (its upper half)

A new storage type is a line in `ELEMENTS` and one in `ELEMENT_BYTES`, and a case of `widen` and of
`narrow`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from llvmlite import ir

from fastvgg.kernels.compile import processor

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fastvgg.transform import Rounding

__all__ = [
    "ELEMENT_BYTES",
    "LINE_BYTES",
    "divide_by_reciprocal",
    "fence",
    "fetch_ahead",
    "flip",
    "join",
    "keep_order",
    "load",
    "load_every_third",
    "load_everywhere",
    "narrow",
    "past",
    "round_to_bytes",
    "round_to_floats",
    "store",
    "store_past_caches",
    "weave",
    "widen",
]

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
BYTES_OF: Final = {ELEMENTS[name]: size for name, size in ELEMENT_BYTES.items()}
LINE_BYTES: Final = 64  # of the caches: what a streaming store should fill as a whole
AHEAD_BYTES: Final = 3072

F32_INFINITY: Final = 0x7F800000  # as bits, like all that follow
F32_HALF: Final = 0x3F000000  # 0.5
F32_TO_F16_EXPONENT: Final = (127 - 15) << 23
F16_INFINITY: Final = 0x7C00
F16_NAN: Final = 0x7E00
F16_OVERFLOW: Final = 0x477FF000  # 65520, in float32: rounds to infinity
F16_SMALLEST_NORMAL: Final = 0x38800000  # 2**-14, in float32
BF16_NAN: Final = 0x7FC0
SIGN: Final = 0x8000  # of a half


# Addresses and memory


def past(b: Any, address: Any, count: int) -> Any:
    """Return the address `count` bytes further on."""
    return b.add(address, ir.Constant(address.type, count)) if count else address


def load(b: Any, address: Any, storage: str, lanes: int) -> Any:
    """Read neighbouring elements, wherever they begin."""
    kind = ir.VectorType(ELEMENTS[storage], lanes)
    return b.load(b.inttoptr(address, kind.as_pointer()), align=1, typ=kind)


def load_everywhere(b: Any, address: Any, storage: str, lanes: int) -> Any:
    """Read one element into every lane."""
    return _pick(b, load(b, address, storage, 1), [0] * lanes)


def load_every_third(b: Any, address: Any, storage: str, lanes: int) -> Any:
    """Read one channel of woven pixels: every third element from `address` on.

    In three pieces, the last of which begins two elements early: the two elements after the last
    one that is wanted may lie outside of the array. Four pixels, green:

        r[g b r g][b r g b][r g b]x      reads too far
        r[g b r g][b r[g b]r g]b         does not
    """
    if lanes == 1:
        return load(b, address, storage, 1)
    size = ELEMENT_BYTES[storage]
    first, second, third = (
        load(b, past(b, address, start * size), storage, lanes)
        for start in (0, lanes, 2 * lanes - 2)
    )
    wanted = range(0, 3 * lanes, 3)
    lanes_of_all = [at if at < 2 * lanes else at + 2 for at in wanted]
    return _pick(b, join(b, [join(b, [first, second]), join(b, [third, third])]), lanes_of_all)


def fetch_ahead(b: Any, address: Any, count: int) -> None:
    """Ask the memory for `count` bytes further on, which may lie outside of the array.

    The more instructions stand between two loads, the fewer are under way at once, and what the
    processor fetches by itself falls behind: float32 to uint8 went at 0.61 to 0.90 of the memory's
    limit, and at 0.92 to 0.99 with this. From 2 to 6 KiB ahead are as good.
    """
    pointer = I8.as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [pointer, I32, I32, I32])
    fetch = b.module.declare_intrinsic("llvm.prefetch.p0", fnty=kind)
    to_read, once, data = (ir.Constant(I32, number) for number in (0, 0, 1))
    for at in range(AHEAD_BYTES, AHEAD_BYTES + count, LINE_BYTES):
        b.call(fetch, [b.inttoptr(past(b, address, at), pointer), to_read, once, data])


def store(b: Any, stored: Any, address: Any) -> None:
    """Write elements, wherever they begin."""
    b.store(stored, b.inttoptr(address, stored.type.as_pointer()), align=1)


def store_past_caches(b: Any, stored: Any, address: Any) -> None:
    """Write whole cache lines without reading them first; the address begins a line.

    Line by line and in order: left alone the compiler writes three lines as first, third, second,
    which cost up to a tenth of the throughput.
    """
    element_bytes = BYTES_OF[stored.type.element]
    lanes = LINE_BYTES // element_bytes
    for first in range(0, stored.type.count, lanes):
        line = _pick(b, stored, range(first, first + lanes))
        place = b.inttoptr(past(b, address, first * element_bytes), line.type.as_pointer())
        written = b.store(line, place, align=LINE_BYTES)
        written.set_metadata("nontemporal", b.module.add_metadata([ir.Constant(I32, 1)]))
        keep_order(b)


def keep_order(b: Any) -> None:
    """Have the compiler move nothing that touches memory across this place; emits nothing.

    Left alone it collects the loads of many pixels and what asks for memory ahead at the beginning
    of a block. In their places, float32 to uint8 in tf mode went from 0.91 of the memory's limit to
    1.00.
    """
    b.asm(ir.FunctionType(ir.VoidType(), []), "", "~{memory}", [], side_effect=True)


def fence(b: Any) -> None:
    """Let nobody see what is written next without what was written past the caches.

    On x86 that takes an instruction which LLVM's own fences leave out
    (https://github.com/llvm/llvm-project/issues/64521).
    """
    if processor().is_x86:
        kind = ir.FunctionType(ir.VoidType(), [])
        b.call(b.module.declare_intrinsic("llvm.x86.sse.sfence", fnty=kind), [])


# The order of lanes


def _pick(b: Any, values: Any, lanes: Sequence[int]) -> Any:
    mask = ir.Constant(ir.VectorType(I32, len(lanes)), list(lanes))
    return b.shuffle_vector(values, values, mask)


def join(b: Any, parts: Sequence[Any]) -> Any:
    """Put vectors of one length behind one another; their number is a power of two."""
    while len(parts) > 1:
        count = 2 * parts[0].type.count
        mask = ir.Constant(ir.VectorType(I32, count), list(range(count)))
        pairs = zip(parts[::2], parts[1::2], strict=True)
        parts = [b.shuffle_vector(first, second, mask) for first, second in pairs]
    return parts[0]


def weave(b: Any, planes: Sequence[Any]) -> Any:
    """Make pixels of three planes:  r r r r, g g g g, b b b b  ->  r g b r g b r g b r g b."""
    lanes = planes[0].type.count
    behind_one_another = join(b, [*planes, planes[2]])
    return _pick(b, behind_one_another, [at % 3 * lanes + at // 3 for at in range(3 * lanes)])


def flip(b: Any, pixels: Any) -> Any:
    """Reverse the channels of woven pixels:  r g b r g b  ->  b g r b g r."""
    return _pick(b, pixels, [at + 2 - 2 * (at % 3) for at in range(pixels.type.count)])


# Types


def _like(values: Any, element: ir.Type) -> ir.VectorType:
    return ir.VectorType(element, values.type.count)


def _all(kind: ir.VectorType, number: float) -> ir.Constant:
    return ir.Constant(kind, [number] * kind.count)


def widen(b: Any, stored: Any, storage: str, compute: str) -> Any:
    """Turn stored elements into values of the compute type."""
    kind = _like(stored, ELEMENTS[compute])
    if storage == "uint8":
        return b.uitofp(stored, kind)
    if storage == "float16":
        return _convert(b, _widen_float16(b, stored), kind)
    if storage == "bfloat16":
        return _convert(b, _widen_bfloat16(b, stored), kind)
    return _convert(b, stored, kind)


def narrow(b: Any, values: Any, storage: str, *, may_be_nan: bool = True) -> Any:
    """Turn values into elements of a floating storage type, rounded once, half to even."""
    if storage == "float16":
        return _narrow_float16(b, _convert(b, values, _like(values, FLOAT)))
    if storage == "bfloat16":
        return _narrow_bfloat16(b, _convert(b, values, _like(values, FLOAT)), may_be_nan)
    return _convert(b, values, _like(values, ELEMENTS[storage]))


def _convert(b: Any, values: Any, kind: ir.VectorType) -> Any:
    if values.type == kind:
        return values
    return b.fpext(values, kind) if kind.element == DOUBLE else b.fptrunc(values, kind)


def _widen_float16(b: Any, halves: Any) -> Any:
    floats, words = _like(halves, FLOAT), _like(halves, I32)
    if processor().converts_halves:
        return b.fpext(b.bitcast(halves, _like(halves, HALF)), floats)
    wide = b.zext(halves, words)
    sign = b.shl(b.and_(wide, _all(words, SIGN)), _all(words, 16))
    magnitude = b.shl(b.and_(wide, _all(words, 0x7FFF)), _all(words, 13))
    # The exponent is 112 too small. To multiply mends that, for subnormal halves too.
    number = b.bitcast(b.fmul(b.bitcast(magnitude, floats), _all(floats, 2.0**112)), words)
    is_number = b.icmp_unsigned("<", magnitude, _all(words, F16_INFINITY << 13))
    bits = b.select(is_number, number, b.or_(magnitude, _all(words, F32_INFINITY)))
    return b.bitcast(b.or_(sign, bits), floats)


def _narrow_float16(b: Any, floats: Any) -> Any:
    if processor().converts_halves:
        return b.bitcast(b.fptrunc(floats, _like(floats, HALF)), _like(floats, I16))
    words = _like(floats, I32)
    bits = b.bitcast(floats, words)
    sign = b.and_(b.lshr(bits, _all(words, 16)), _all(words, SIGN))
    magnitude = b.and_(bits, _all(words, 0x7FFFFFFF))
    # Half to even: up by just under half, and by the last bit that stays.
    odd = b.and_(b.lshr(magnitude, _all(words, 13)), _all(words, 1))
    raised = b.add(b.add(magnitude, _all(words, 0x0FFF)), odd)
    half = b.lshr(b.sub(raised, _all(words, F32_TO_F16_EXPONENT)), _all(words, 13))
    # Next to 0.5 the adder rounds to multiples of 2**-24, which subnormal halves are.
    small = b.fadd(b.bitcast(magnitude, floats.type), _all(floats.type, 0.5))
    subnormal = b.sub(b.bitcast(small, words), _all(words, F32_HALF))
    is_small = b.icmp_unsigned("<", magnitude, _all(words, F16_SMALLEST_NORMAL))
    half = b.select(is_small, subnormal, half)
    overflows = b.icmp_unsigned(">=", magnitude, _all(words, F16_OVERFLOW))
    half = b.select(overflows, _all(words, F16_INFINITY), half)
    is_nan = b.icmp_unsigned(">", magnitude, _all(words, F32_INFINITY))
    half = b.select(is_nan, _all(words, F16_NAN), half)
    return b.trunc(b.or_(sign, half), _like(floats, I16))


def _widen_bfloat16(b: Any, halves: Any) -> Any:
    words = _like(halves, I32)
    return b.bitcast(b.shl(b.zext(halves, words), _all(words, 16)), _like(halves, FLOAT))


def _narrow_bfloat16(b: Any, floats: Any, may_be_nan: bool) -> Any:
    words = _like(floats, I32)
    bits = b.bitcast(floats, words)
    odd = b.and_(b.lshr(bits, _all(words, 16)), _all(words, 1))
    rounded = b.add(b.add(bits, _all(words, 0x7FFF)), odd)
    if may_be_nan:  # rounding would make infinities and zeros of some
        nan = b.or_(b.and_(bits, _all(words, SIGN << 16)), _all(words, BF16_NAN << 16))
        rounded = b.select(b.fcmp_ordered("ord", floats, floats), rounded, nan)
    # One instruction for two registers, where to shift and to truncate takes five.
    halves = b.bitcast(rounded, ir.VectorType(I16, 2 * words.count))
    return _pick(b, halves, range(1, 2 * words.count, 2))


# Arithmetic that takes more than one instruction

NO_FRACTIONS: Final = {FLOAT: 2.0**23, DOUBLE: 2.0**52}


def divide_by_reciprocal(b: Any, x: Any, reciprocal: Any, rest: Any) -> Any:
    """Divide in two cheap operations, with the bits of a division.

    The reciprocal and what rounding took from it are together one of twice the places; their
    products with x are added with one rounding (N. Brisebarre, J.-M. Muller, "Correctly rounded
    multiplication by arbitrary precision constants", IEEE Trans. Computers 57, 2008).
    `recipe.reciprocal_is_exact` finds out for which numbers that gives the quotient.
    """
    bits = {FLOAT: 32, DOUBLE: 64}[x.type.element]
    kind = ir.FunctionType(x.type, [x.type] * 3)
    fused = b.module.declare_intrinsic(f"llvm.fma.v{x.type.count}f{bits}", fnty=kind)
    return b.call(fused, [x, reciprocal, b.fmul(x, rest)])


def round_to_bytes(b: Any, x: Any, rounding: Rounding) -> Any:
    """Make bytes of any values: what is below 0 and NaN become 0, what is above 255 becomes 255."""
    if rounding == "truncate":
        return b.fptoui(_clamp(b, x, 0.25, 255.0), _like(x, I8))
    integers = _like(x, I32 if x.type.element == FLOAT else I64)
    return b.trunc(b.bitcast(_without_fractions(b, x), integers), _like(x, I8))


def round_to_floats(b: Any, x: Any, rounding: Rounding) -> Any:
    """Make whole numbers in the compute type, otherwise as `round_to_bytes`."""
    if rounding == "truncate":
        return b.uitofp(b.fptoui(_clamp(b, x, 0.25, 255.0), _like(x, I32)), x.type)
    return b.fsub(_without_fractions(b, x), _all(x.type, NO_FRACTIONS[x.type.element]))


def _without_fractions(b: Any, x: Any) -> Any:
    """Add what leaves no place for a fraction, and clamp to 0..255 above that.

    The adder rounds half to even, and the whole number stands in the lowest bits.
    """
    zero = NO_FRACTIONS[x.type.element]
    return _clamp(b, b.fadd(x, _all(x.type, zero)), zero, zero + 255.0)


def _clamp(b: Any, x: Any, least: float, most: float) -> Any:
    """Clamp; NaN is not above the least and becomes it.

    A least of 0 would take two instructions instead of one. 0.25 is truncated to 0 as well.
    """
    low, high = _all(x.type, least), _all(x.type, most)
    x = b.select(b.fcmp_ordered(">", x, low), x, low)
    return b.select(b.fcmp_ordered("<", x, high), x, high)
