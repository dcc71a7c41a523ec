"""What happens to one value: load from a storage type, saturate, store to a storage type.

Half types are handled as their 16 bits (uint16), because Numba has no half arithmetic on the CPU
(https://github.com/numba/numba/issues/4402). Their bits, from the top:

    float16    s eeeee mmmmmmmmmm              a float32 is s eeeeeeee mmmmmmmmmmmmmmmmmmmmmmm
    bfloat16   s eeeeeeee mmmmmmm              (its upper half)

A new storage type is one `load` and one `store` more.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from fastvgg.kernels.compile import block

if TYPE_CHECKING:
    from collections.abc import Callable

    from fastvgg.transform import Rounding

__all__ = ["load", "saturate", "store"]

F16_SMALLEST_NORMAL: Final = np.uint32(0x38800000)  # 2**-14, as the bits of a float32
F16_OVERFLOW: Final = np.uint32(0x477FF000)  # 65520: rounds to infinity
F32_INFINITY: Final = np.uint32(0x7F800000)
F32_HALF: Final = np.uint32(0x3F000000)  # 0.5
F16_REBIAS: Final = np.uint32((127 - 15) << 23)  # between the exponents of the two types


@block
def _float_from_bits(bits: Any) -> Any:
    return np.uint32(bits).view(np.float32)


@block
def _bits_of_float(value: Any) -> Any:
    return np.float32(value).view(np.uint32)


@block
def _widen_float16(half: Any) -> Any:
    sign = np.uint32(half & 0x8000) << np.uint32(16)
    magnitude = np.uint32(half & 0x7FFF)
    shifted = magnitude << np.uint32(13)
    if magnitude >= np.uint32(0x7C00):  # infinity, NaN
        bits = shifted | F32_INFINITY
    elif magnitude < np.uint32(0x0400):  # subnormal: a multiple of 2**-24
        bits = _bits_of_float(np.float32(magnitude) * np.float32(2.0**-24))
    else:
        bits = shifted + F16_REBIAS
    return _float_from_bits(sign | bits)


@block
def _narrow_float16(value: Any) -> Any:
    bits = _bits_of_float(value)
    sign = (bits >> np.uint32(16)) & np.uint32(0x8000)
    magnitude = bits & np.uint32(0x7FFFFFFF)
    if magnitude > F32_INFINITY:  # NaN: made quiet, upper payload kept
        half = np.uint32(0x7E00) | ((magnitude >> np.uint32(13)) & np.uint32(0x03FF))
    elif magnitude >= F16_OVERFLOW:
        half = np.uint32(0x7C00)
    elif magnitude < F16_SMALLEST_NORMAL:  # next to 0.5 the adder rounds to multiples of 2**-24
        half = _bits_of_float(_float_from_bits(magnitude) + np.float32(0.5)) - F32_HALF
    else:  # half to even: up by just under half, and by the last bit that stays
        odd = (magnitude >> np.uint32(13)) & np.uint32(1)
        half = (magnitude - F16_REBIAS + np.uint32(0x0FFF) + odd) >> np.uint32(13)
    return np.uint16(sign | half)


@block
def _widen_bfloat16(half: Any) -> Any:
    return _float_from_bits(np.uint32(half) << np.uint32(16))


@block
def _narrow_bfloat16(value: Any) -> Any:
    bits = _bits_of_float(value)
    if (bits & np.uint32(0x7FFFFFFF)) > F32_INFINITY:  # NaN, as ml_dtypes stores it
        return np.uint16(((bits >> np.uint32(16)) & np.uint32(0x8000)) | np.uint32(0x7FC0))
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    return np.uint16((bits + np.uint32(0x7FFF) + odd) >> np.uint32(16))


def load(storage: str, compute: str) -> Callable[[Any], Any]:
    """Return the block that turns a stored element into the compute type."""
    if storage == "float16":
        return _widen_float16
    if storage == "bfloat16":
        return _widen_bfloat16
    return _cast(compute)


def store(storage: str) -> Callable[[Any], Any]:
    """Return the block that turns a computed value into a stored element.

    For uint8 the value is a whole number 0..255 already, which `saturate` sees to: what LLVM does
    with any other is undefined.
    """
    if storage == "float16":
        return _narrow_float16
    if storage == "bfloat16":
        return _narrow_bfloat16
    return _cast(storage)


@functools.cache
def _cast(name: str) -> Callable[[Any], Any]:
    scalar = np.dtype(name).type

    @block
    def cast(value: Any) -> Any:
        return scalar(value)

    return cast


@functools.cache
def saturate(compute: str, rounding: Rounding) -> Callable[[Any], Any]:
    """Return the block that makes a whole number 0..255: NaN and below 0 become 0."""
    scalar = np.dtype(compute).type
    zero, most = scalar(0), scalar(255)
    whole = np.rint if rounding == "nearest" else np.floor

    @block
    def saturated(value: Any) -> Any:
        # Not max() and min(), which leave it open what becomes of NaN.
        value = value if value > zero else zero  # noqa: FURB136
        value = value if value < most else most  # noqa: FURB136
        return whole(value)

    return saturated
