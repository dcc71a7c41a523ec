"""Conversions between storage types, and arithmetic of more than one instruction.

float16 and bfloat16 are 16-bit integers until `widen` converts them:

    float16    s eeeee mmmmmmmmmm              a float32 is s eeeeeeee mmmmmmmmmmmmmmmmmmmmmmm
    bfloat16   s eeeeeeee mmmmmmm              (its upper half)
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any, Final

from llvmlite import ir
from numba.extending import intrinsic

from fastvgg.kernels import jit
from fastvgg.kernels.vector import (
    DOUBLE,
    ELEMENTS,
    FLOAT,
    HALF,
    I8,
    I16,
    I32,
    I64,
    call_intrinsic,
    concat,
    elementwise_intrinsic,
    like,
    map_vectors,
    shuffle,
    splat,
)

if TYPE_CHECKING:
    from fastvgg.transform import Rounding

# Bit patterns of float32 and float16.
F32_INFINITY: Final = 0x7F800000
F32_HALF: Final = 0x3F000000  # 0.5
F32_TO_F16_EXPONENT: Final = (127 - 15) << 23
F16_INFINITY: Final = 0x7C00
F16_NAN: Final = 0x7E00
F16_OVERFLOW: Final = 0x477FF000  # 65520 as float32: rounds to infinity
F16_SMALLEST_NORMAL: Final = 0x38800000  # 2**-14 as float32
F16_SIGN: Final = 0x8000

ROUNDING_MAGIC: Final = {FLOAT: 2.0**23, DOUBLE: 2.0**52}


@functools.cache
def widen(storage: str, compute: str, *, split: bool = False) -> Any:
    """Convert stored elements to the compute type; with `split`, bfloat16 to split vectors.

    A bfloat16 is the upper half of a float32, so the two in a word become two float32 in place.
    LLVM shuffles each into its own word instead, which takes twice as long.
    """

    def emit(b: Any, stored: Any) -> Any:
        kind = like(stored, ELEMENTS[compute])
        if storage == "uint8":
            return b.sitofp(b.zext(stored, like(stored, I32)), kind)
        if storage == "float16":
            stored = _widen_float16(b, stored)
        elif storage == "bfloat16":
            stored = _split_bfloat16(b, stored) if split else _widen_bfloat16(b, stored)
        return _convert(b, stored, kind)

    return elementwise_intrinsic(lambda block: block.of(compute), emit)


@functools.cache
def narrow(storage: str, *, has_ties: bool = True, split: bool = False) -> Any:
    """Convert values to a floating storage type, rounding half to even; NaN must be canonical.

    Without `has_ties`, no value may be halfway between two bfloat16, which saves two instructions.
    With `split`, split vectors become bfloat16 in the original order.
    """

    def emit(b: Any, values: Any) -> Any:
        if storage == "float16":
            return _narrow_float16(b, _convert(b, values, like(values, FLOAT)))
        if storage == "bfloat16":
            rounded = _round_to_bfloat16(b, _convert(b, values, like(values, FLOAT)), has_ties)
            if split:
                return _merge_bfloat16(b, rounded)
            return b.trunc(b.lshr(rounded, splat(rounded.type, 16)), like(rounded, I16))
        return _convert(b, values, like(values, ELEMENTS[storage]))

    return elementwise_intrinsic(lambda block: block.of(storage), emit)


def _convert(b: Any, values: Any, kind: ir.VectorType) -> Any:
    if values.type == kind:
        return values
    return b.fpext(values, kind) if kind.element == DOUBLE else b.fptrunc(values, kind)


def _widen_float16(b: Any, halves: Any) -> Any:
    floats, words = like(halves, FLOAT), like(halves, I32)
    if jit.processor().has_f16c:
        return b.fpext(b.bitcast(halves, like(halves, HALF)), floats)
    wide = b.zext(halves, words)
    sign = b.shl(b.and_(wide, splat(words, F16_SIGN)), splat(words, 16))
    magnitude = b.shl(b.and_(wide, splat(words, 0x7FFF)), splat(words, 13))
    # The exponent is 112 too small. A multiplication corrects it, for subnormal halves too.
    number = b.bitcast(b.fmul(b.bitcast(magnitude, floats), splat(floats, 2.0**112)), words)
    is_number = b.icmp_unsigned("<", magnitude, splat(words, F16_INFINITY << 13))
    bits = b.select(is_number, number, b.or_(magnitude, splat(words, F32_INFINITY)))
    return b.bitcast(b.or_(sign, bits), floats)


def _narrow_float16(b: Any, floats: Any) -> Any:
    if jit.processor().has_f16c:
        return b.bitcast(b.fptrunc(floats, like(floats, HALF)), like(floats, I16))
    words = like(floats, I32)
    bits = b.bitcast(floats, words)
    sign = b.and_(b.lshr(bits, splat(words, 16)), splat(words, F16_SIGN))
    magnitude = b.and_(bits, splat(words, 0x7FFFFFFF))
    # Round half to even: add just under half, and the last bit that is kept.
    odd = b.and_(b.lshr(magnitude, splat(words, 13)), splat(words, 1))
    raised = b.add(b.add(magnitude, splat(words, 0x0FFF)), odd)
    half = b.lshr(b.sub(raised, splat(words, F32_TO_F16_EXPONENT)), splat(words, 13))
    # Next to 0.5 the adder rounds to multiples of 2**-24, which subnormal halves are.
    small = b.fadd(b.bitcast(magnitude, floats.type), splat(floats.type, 0.5))
    subnormal = b.sub(b.bitcast(small, words), splat(words, F32_HALF))
    is_small = b.icmp_unsigned("<", magnitude, splat(words, F16_SMALLEST_NORMAL))
    half = b.select(is_small, subnormal, half)
    overflows = b.icmp_unsigned(">=", magnitude, splat(words, F16_OVERFLOW))
    half = b.select(overflows, splat(words, F16_INFINITY), half)
    is_nan = b.icmp_unsigned(">", magnitude, splat(words, F32_INFINITY))
    half = b.select(is_nan, splat(words, F16_NAN), half)
    return b.trunc(b.or_(sign, half), like(floats, I16))


def _widen_bfloat16(b: Any, halves: Any) -> Any:
    words = like(halves, I32)
    return b.bitcast(b.shl(b.zext(halves, words), splat(words, 16)), like(halves, FLOAT))


def _split_bfloat16(b: Any, halves: Any) -> Any:
    words = b.bitcast(halves, ir.VectorType(I32, halves.type.count // 2))
    even = b.shl(words, splat(words.type, 16))
    odd = b.and_(words, splat(words.type, 0xFFFF0000))
    return b.bitcast(concat(b, (even, odd)), like(halves, FLOAT))


def _round_to_bfloat16(b: Any, floats: Any, has_ties: bool) -> Any:
    """Round floats to bfloat16, in the upper halves of the returned words."""
    words = like(floats, I32)
    bits = b.bitcast(floats, words)
    if not has_ties:
        return b.add(bits, splat(words, 0x8000))
    odd = b.and_(b.lshr(bits, splat(words, 16)), splat(words, 1))
    return b.add(b.add(bits, splat(words, 0x7FFF)), odd)


def _merge_bfloat16(b: Any, words: Any) -> Any:
    """Merge the upper halves of split words into the original order."""
    count = words.type.count
    even, odd = (shuffle(b, words, None, range(at, at + count // 2)) for at in (0, count // 2))
    even = b.lshr(even, splat(even.type, 16))
    even, odd = (b.bitcast(part, ir.VectorType(I16, count)) for part in (even, odd))
    return shuffle(b, even, odd, [at + at % 2 * count for at in range(count)])


@functools.cache
def divide(division: str) -> Any:
    """Divide by a constant: intrinsic(x, divisor, reciprocal, remainder).

    "division" divides; "none" returns x. "reciprocal" multiplies instead: the reciprocal and its
    rounding error together have twice the precision, and the products of both with x are added
    with one rounding (N. Brisebarre, J.-M. Muller, "Correctly rounded multiplication by arbitrary
    precision constants", IEEE Trans. Computers 57, 2008). `spec.is_reciprocal_exact` tests for
    which numbers the result is the exact quotient.
    """

    def emit(b: Any, x: Any, divisor: Any, reciprocal: Any, remainder: Any) -> Any:
        if division == "none":
            return x
        if division == "division":
            return b.fdiv(x, divisor)
        return _emit_multiply_add(b, x, reciprocal, b.fmul(x, remainder))

    @intrinsic
    def divide_block(_context: Any, x: Any, divisor: Any, reciprocal: Any, remainder: Any) -> Any:
        signature = x(x, divisor, reciprocal, remainder)
        return signature, lambda _, b, __, blocks: map_vectors(b, emit, *blocks)

    return divide_block


def _emit_multiply_add(b: Any, x: Any, slope: Any, intercept: Any) -> Any:
    if not jit.processor().has_fma:
        return b.fadd(b.fmul(x, slope), intercept)
    name = f"llvm.fma.v{x.type.count}{x.type.element.intrinsic_name}"
    return call_intrinsic(b, name, x.type, x, slope, intercept)


@intrinsic
def multiply_add(_context: Any, x: Any, slope: Any, intercept: Any) -> Any:
    """Compute x * slope + intercept, rounded once on CPUs with FMA, otherwise twice."""
    signature = x(x, slope, intercept)
    return signature, lambda _, b, __, blocks: map_vectors(b, _emit_multiply_add, *blocks)


def _emit_canonical_nan(b: Any, values: Any) -> Any:
    is_number = b.fcmp_ordered("ord", values, values)
    return b.select(is_number, values, splat(values.type, math.nan))


canonical_nan: Final = elementwise_intrinsic(lambda block: block, _emit_canonical_nan)
"""Replace every NaN with the canonical quiet NaN."""


@functools.cache
def round_to_uint8(rounding: Rounding) -> Any:
    """Saturate and round: NaN and values below 0 become 0, values above 255 become 255."""

    def emit(b: Any, x: Any) -> Any:
        if rounding == "truncate":
            return b.fptoui(_clamp(b, x, 0.25, 255.0), like(x, I8))
        # The minimum turns infinity into 255 and keeps NaN. The conversion rounds half to even. x86
        # converts NaN and values out of range to the smallest integer; Arm saturates and converts
        # NaN to zero. Saturating either result gives the defined byte.
        lanes, real, maximum = x.type.count, x.type.element, splat(x.type, 255.0)
        integer = I32 if real == FLOAT or jit.processor().is_x86 else I64
        x = b.select(b.fcmp_ordered("<", maximum, x), maximum, x)
        name = f"llvm.lrint.v{lanes}{integer.intrinsic_name}.v{lanes}{real.intrinsic_name}"
        return _saturate(b, call_intrinsic(b, name, like(x, integer), x))

    return elementwise_intrinsic(lambda block: block.of("uint8"), emit)


def _saturate(b: Any, integers: Any) -> Any:
    """Clamp integers to 0..255 and return them as bytes."""
    count = integers.type.count
    if count % 32 == 0 and jit.processor().name == "AVX2":
        parts = [shuffle(b, integers, None, range(at, at + 32)) for at in range(0, count, 32)]
        return concat(b, [_pack_saturated(b, part) for part in parts])
    zero, maximum = splat(integers.type, 0), splat(integers.type, 255)
    integers = b.select(b.icmp_signed(">", integers, zero), integers, zero)
    integers = b.select(b.icmp_signed("<", integers, maximum), integers, maximum)
    return b.trunc(integers, like(integers, I8))


def _pack_saturated(b: Any, integers: Any) -> Any:
    """Compute `_saturate` of 32 integers with AVX2 pack instructions.

    These pack each half of a register separately. LLVM restores the order after each instruction;
    once, after the last, is enough.
    """
    quarters = [shuffle(b, integers, None, range(at, at + 8)) for at in range(0, 32, 8)]
    words = ir.VectorType(I16, 16)
    halves = [
        call_intrinsic(b, "llvm.x86.avx2.packssdw", words, *quarters[at : at + 2]) for at in (0, 2)
    ]
    packed = call_intrinsic(b, "llvm.x86.avx2.packuswb", ir.VectorType(I8, 32), *halves)
    fours = b.bitcast(packed, ir.VectorType(I32, 8))
    ordered = shuffle(b, fours, None, [at % 2 * 4 + at // 2 for at in range(8)])
    return b.bitcast(ordered, packed.type)


@functools.cache
def round_to_float(rounding: Rounding) -> Any:
    """Saturate and round like `round_to_uint8`, in the compute type."""

    def emit(b: Any, x: Any) -> Any:
        if rounding == "truncate":
            return b.uitofp(b.fptoui(_clamp(b, x, 0.25, 255.0), like(x, I32)), x.type)
        # The sum has no fraction bits, so the addition rounds half to even.
        magic = ROUNDING_MAGIC[x.type.element]
        rounded = _clamp(b, b.fadd(x, splat(x.type, magic)), magic, magic + 255.0)
        return b.fsub(rounded, splat(x.type, magic))

    return elementwise_intrinsic(lambda block: block, emit)


def _clamp(b: Any, x: Any, low: float, high: float) -> Any:
    """Clamp; NaN becomes `low`.

    A `low` of 0 would take two instructions instead of one; 0.25 is truncated to 0 as well.
    """
    smallest, largest = splat(x.type, low), splat(x.type, high)
    x = b.select(b.fcmp_ordered(">", x, smallest), x, smallest)
    return b.select(b.fcmp_ordered("<", x, largest), x, largest)
