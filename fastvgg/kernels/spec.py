"""The specification of a kernel, and the table of constants that it reads."""

from __future__ import annotations

import functools
import itertools
import math
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple, TypeAlias

import numpy as np

from fastvgg import oracle
from fastvgg.kernels import jit
from fastvgg.kernels.memory import TABLE_COLUMNS, Constants
from fastvgg.kernels.vector import ELEMENT_BYTES
from fastvgg.tiling import CACHE_LINE_BYTES
from fastvgg.transform import storage_dtype

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from fastvgg.transform import Mode, Rounding, Transform

Division: TypeAlias = Literal["none", "division", "reciprocal"]

MIN_LANES: Final = 16


class KernelSpec(NamedTuple):
    """Everything that distinguishes one kernel from another."""

    is_restore: bool
    source: str
    """The storage type of the input."""
    target: str
    """The storage type of the result."""
    compute: str
    is_source_planar: bool
    is_target_planar: bool
    has_reversed_channels: bool
    is_affine: bool
    """Whether one multiplication and one addition give the result, as tested for all inputs."""
    divide: Division
    """How preprocessing divides by the divisor of all channels."""
    scale: Division
    """How preprocessing divides by the std of each channel."""
    has_ties: bool
    """Whether a result can lie halfway between two values of bfloat16."""
    rounding: Rounding
    nontemporal: bool
    """Whether results bypass the caches."""
    is_plane_by_plane: bool
    """Whether the planes of the result are written one after the other, each aligned separately."""

    @classmethod
    def of(
        cls,
        transform: Transform,
        input_type: str,
        *,
        has_reversed_input: bool = False,
        in_place: bool = False,
        nontemporal: bool = False,
        has_aligned_planes: bool = False,
    ) -> KernelSpec:
        """Return the spec of a transform for an input storage type.

        `has_reversed_input`: the channels are stored in reverse of the order that the transform
        assumes. `in_place`: the result overwrites the input. `nontemporal`: it bypasses the caches.
        `has_aligned_planes`: the distance between its planes is a multiple of a cache line.
        """
        mode, is_restore = transform.mode, transform.direction == "restore"
        compute, target = transform.compute_type(input_type), transform.output_type(input_type)
        is_byte_input = input_type == "uint8" and compute == "float32"
        is_affine = _is_affine(transform, input_type, target)
        divide, scale = _choose_divisions(mode, compute, is_byte_input=input_type == "uint8")
        is_source_planar = transform.layout == "NCHW"
        is_target_planar = transform.out_layout == "NCHW"
        shrinks = ELEMENT_BYTES[target] < ELEMENT_BYTES[input_type]
        return cls(
            is_restore=is_restore,
            source=input_type,
            target=target,
            compute=compute,
            is_source_planar=is_source_planar,
            is_target_planar=is_target_planar,
            has_reversed_channels=mode.is_bgr != has_reversed_input,
            is_affine=is_affine,
            divide="none" if is_affine else divide,
            scale="none" if is_affine else scale,
            has_ties=target == "bfloat16"
            and (not is_byte_input or _has_ties(mode, is_affine=is_affine)),
            rounding=transform.rounding if is_restore else "nearest",
            nontemporal=nontemporal,
            is_plane_by_plane=is_target_planar
            and not in_place
            and not (has_aligned_planes and shrinks)
            and (is_source_planar or nontemporal),
        )

    @property
    def lanes(self) -> int:
        """The lanes of a vector: a result fills at least one store, or a cache line of a plane.

        On x86 three vectors have to fit into registers, or LLVM spills; Arm has no smaller store.
        Registers of sixteen bytes are too small for whole cache lines.
        """
        processor = jit.processor()
        filled = processor.store_bytes
        if self.is_plane_by_plane and processor.vector_bytes > 16:
            filled = CACHE_LINE_BYTES
        lanes = filled // ELEMENT_BYTES[self.target]
        if processor.is_x86:
            lanes = min(lanes, processor.block_bytes // (3 * ELEMENT_BYTES[self.compute]))
        return max(MIN_LANES, lanes)

    @property
    def has_two_streams(self) -> bool:
        """Whether blocks are read alternately from two streams.

        That keeps more loads in flight: float32 to uint8 ran 7 to 10 % faster, 16-bit floats 4 %.
        It does not pay off unless at least twice as many bytes are read as written. Planar input
        has three streams already. 16-bit floats to planes lose 30 %: they write six lines at a
        time.
        """
        if self.is_source_planar or self.is_plane_by_plane:
            return False
        min_ratio = 4 if self.is_target_planar else 2
        return ELEMENT_BYTES[self.source] >= min_ratio * ELEMENT_BYTES[self.target]

    @property
    def is_result_shuffled(self) -> bool:
        """Whether lanes are shuffled after the arithmetic instead of before.

        That pays off if results are smaller than inputs. 16-bit floats are interleaved in half as
        many registers as float32, and planes of bytes are widened by their loads.
        """
        if self.is_plane_by_plane:
            return False
        interleaves = self.is_source_planar and not self.is_target_planar
        size, source_size = ELEMENT_BYTES[self.target], ELEMENT_BYTES[self.source]
        return size < source_size or (interleaves and (source_size, size) == (1, 2))

    @property
    def is_split(self) -> bool:
        """Whether blocks are split into even and odd values; see `order`.

        That does not pay off if the CPU permutes the elements of whole vectors. In interleaved
        pixels the bytes of a channel are too far apart for it.
        """
        if jit.processor().min_permute_bytes <= 2:
            return False
        if (self.source, self.target) == ("uint8", "bfloat16"):
            return not self.is_target_planar or (self.is_source_planar and self.is_plane_by_plane)
        return (self.source, self.target) == ("bfloat16", "uint8")

    @property
    def is_compute_planar(self) -> bool:
        """Whether the arithmetic is applied to planes."""
        return self.is_source_planar if self.is_result_shuffled else self.is_target_planar


def _is_affine(transform: Transform, source: str, target: str) -> bool:
    """Return whether one multiplication and addition replace a transform from or to uint8."""
    mode, is_restore = transform.mode, transform.direction == "restore"
    image, half = (target, source) if is_restore else (source, target)
    if image != "uint8" or ELEMENT_BYTES[half] != 2:
        return False
    if is_restore and transform.rounding != "nearest":
        return False
    return affine_constants(mode, half, is_restore=is_restore) is not None


@np.errstate(all="ignore")
def constant_table(mode: Mode, spec: KernelSpec) -> NDArray[Any]:
    """Return a row for each of `memory.Constants`: the values of three channels, repeated.

    Channels are in the order in which the kernel computes. Constants that the mode lacks have their
    neutral values.
    """
    scalar = np.dtype(spec.compute).type
    reverses_results = spec.has_reversed_channels and spec.is_result_shuffled
    is_reversed = (mode.is_bgr and spec.is_restore) != reverses_results
    step = -1 if is_reversed else 1
    divide = np.full(3, 1.0 if mode.divide is None else mode.divide, scalar)
    mean = np.array(mode.mean or (0.0, 0.0, 0.0), scalar)[::step]
    std = np.array(mode.std or (1.0, 1.0, 1.0), scalar)[::step]
    half = spec.source if spec.is_restore else spec.target
    found = affine_constants(mode, half, is_restore=spec.is_restore) if spec.is_affine else None
    slope, intercept = found or (np.ones(3, scalar), np.zeros(3, scalar))
    rows = Constants(
        *(divide, *_reciprocal(divide), mean, std, *_reciprocal(std)),
        slope[::step],
        intercept[::step],
    )
    return np.stack([np.tile(row, TABLE_COLUMNS // len(row)) for row in rows])


ALL_BYTES: Final = np.arange(256, dtype=np.float32)
NEIGHBOR_STEPS: Final = sorted(
    itertools.product(range(-3, 4), repeat=2), key=lambda steps: abs(steps[0]) + abs(steps[1])
)
"""Steps of a slope and of an intercept, the nearest first."""


@functools.lru_cache(maxsize=64)
@np.errstate(all="ignore")
def affine_constants(
    mode: Mode, half: str, *, is_restore: bool
) -> tuple[NDArray[np.float32], NDArray[np.float32]] | None:
    """Return the slope and intercept of a mode between bytes and a 16-bit float type.

    One multiplication and addition differ from the operations of a mode in the last bits of
    float32, which rounding to a 16-bit float, or to a byte, nearly always removes. All 256 bytes,
    or all 65,536 floats, are tried, with the constants and their neighbors. The result is None if
    no candidate is exact for every input, or if the mode is already a single operation.

    >>> from fastvgg.transform import Mode
    >>> slope, intercept = affine_constants(Mode.TORCH, "float16", is_restore=False)
    >>> [f"{a:.4f} x {b:+.4f}" for a, b in zip(slope, intercept)]
    ['0.0171 x -2.1179', '0.0175 x -2.0357', '0.0174 x -1.8044']
    """
    if mode.divide is None and mode.std is None:
        return None
    divide = float(np.float32(1.0 if mode.divide is None else mode.divide))
    mean = np.array(mode.mean or (0.0, 0.0, 0.0), np.float32).astype(np.float64)
    std = np.array(mode.std or (1.0, 1.0, 1.0), np.float32).astype(np.float64)
    slopes, intercepts = (
        (std * divide, mean * divide) if is_restore else (1 / (divide * std), -mean / std)
    )
    halves = np.arange(65536, dtype=np.uint16).view(storage_dtype(half))
    x = halves.astype(np.float32) if is_restore else ALL_BYTES
    y = _apply_to_channels(x, mode, is_restore=is_restore)

    def round_to_result(values: NDArray[np.float32]) -> NDArray[Any]:
        if is_restore:
            return oracle.saturate(values, "nearest")
        return values.astype(halves.dtype).view(np.uint16)

    found = []
    for channel in range(3):
        slope, intercept = np.float32(slopes[channel]), np.float32(intercepts[channel])
        expected = round_to_result(y[:, channel])
        for i, j in NEIGHBOR_STEPS:
            a, b = _add_ulps(slope, i), _add_ulps(intercept, j)
            if (round_to_result(_multiply_add(x, a, b)) == expected).all():
                found.append((a, b))
                break
        else:
            return None
    slope, intercept = np.array(found, np.float32).T
    return slope, intercept


def _multiply_add(x: NDArray[Any], slope: Any, intercept: Any) -> NDArray[Any]:
    """Emulate `arithmetic.multiply_add` in NumPy."""
    return _fma(x, slope, intercept) if jit.processor().has_fma else x * slope + intercept


def _add_ulps(number: np.float32, steps: int) -> np.float32:
    """Return the float32 `steps` steps from a number, towards larger magnitudes if positive."""
    stepped: np.float32 = (number.view(np.int32) + np.int32(steps)).view(np.float32)
    return stepped


def _apply_to_channels(
    numbers: NDArray[np.float32], mode: Mode, *, is_restore: bool
) -> NDArray[np.float32]:
    """Preprocess or restore numbers in every channel; return a column for each channel of y."""
    pixels = np.repeat(numbers[:, np.newaxis], 3, axis=1)
    if not is_restore:
        return oracle.forward(pixels, mode)
    x: NDArray[np.float32] = oracle.inverse(pixels, mode)
    return x[:, ::-1] if mode.is_bgr else x


@functools.lru_cache(maxsize=64)
@np.errstate(all="ignore")
def _has_ties(mode: Mode, *, is_affine: bool) -> bool:
    """Return whether any byte becomes a float32 halfway between two bfloat16 values."""
    constants = affine_constants(mode, "bfloat16", is_restore=False) if is_affine else None
    if constants is None:
        y = _apply_to_channels(ALL_BYTES, mode, is_restore=False)
    else:
        y = _multiply_add(ALL_BYTES[:, np.newaxis], *constants)
    return bool((y.view(np.uint32) & 0xFFFF == 0x8000).any())


@np.errstate(all="ignore")
def _choose_divisions(
    mode: Mode, compute: str, *, is_byte_input: bool
) -> tuple[Division, Division]:
    """Return how to divide by the divisor of a mode and by its std.

    With `is_byte_input`, x is one of 256 integers, which are all tried.
    """
    scalar = np.dtype(compute).type
    x = np.arange(256, dtype=compute)
    divide: Division = "none"
    scale: Division = "none"
    if mode.divide is not None:
        divisor = scalar(mode.divide)
        divide = "reciprocal" if is_byte_input and is_reciprocal_exact(x, divisor) else "division"
        x = x / divisor
    if mode.std is not None:
        means = mode.mean or (0.0, 0.0, 0.0)
        channels = [(x - scalar(m), scalar(s)) for m, s in zip(means, mode.std, strict=True)]
        proven = is_byte_input and all(is_reciprocal_exact(y, divisor) for y, divisor in channels)
        scale = "reciprocal" if proven else "division"
    return divide, scale


def is_reciprocal_exact(x: NDArray[Any], divisor: Any) -> bool:
    """Return whether the reciprocal of `arithmetic.divide` gives the exact quotient for every x.

    Both arguments are float32, or both float64.

    >>> is_reciprocal_exact(np.arange(256, dtype=np.float32), np.float32(127.5))
    True
    >>> is_reciprocal_exact(np.arange(256, dtype=np.float32), np.float32(3e38))
    False
    """
    with np.errstate(all="ignore"):
        reciprocal, remainder = _reciprocal(divisor)
        if not np.isfinite(remainder):
            return False
        quotient = _multiply_add(x, reciprocal, x * remainder)
        expected: bytes = (x / divisor).tobytes()
        return quotient.tobytes() == expected


def _reciprocal(divisor: Any) -> tuple[Any, Any]:
    """Return 1 / divisor and its rounding error, which is infinite if the reciprocal is.

    Without FMA the reciprocal has eight bits fewer, so that its product with a byte is exact. In
    both cases 1 - divisor * reciprocal has no rounding error.
    """
    reciprocal = 1 / divisor
    if not jit.processor().has_fma:
        bits = np.int64 if divisor.dtype == np.float64 else np.int32
        reciprocal = (reciprocal.view(bits) & ~bits(0xFF)).view(divisor.dtype)
    return reciprocal, _fma(-reciprocal, divisor, divisor.dtype.type(1)) / divisor


def _fma(a: NDArray[Any], b: Any, c: Any) -> NDArray[Any]:
    """Return a * b + c, rounded once.

    For float32 the product is exact in float64. The sum is rounded to odd, from which rounding to
    float32 is the same as from the exact sum (S. Boldo, G. Melquiond, "Emulation of FMA and
    correctly rounded sums: proved algorithms using rounding to odd", IEEE Trans. Computers 57,
    2008). float64 is computed with fractions.
    """
    if a.dtype == np.float64:
        exact: NDArray[np.float64] = _fma_float64(a, b, c)
        return exact
    product = a.astype(np.float64) * np.asarray(b, np.float64)
    total = product + c
    of_c = total - product
    lost = (product - (total - of_c)) + (c - of_c)
    is_even = total.view(np.int64) & 1 == 0
    other = np.nextafter(total, np.copysign(np.inf, lost))
    odd: NDArray[np.float64] = np.where((lost != 0) & is_even, other, total)
    return odd.astype(np.float32)


def _exact_fma(a: float, b: float, c: float) -> float:
    if not all(map(math.isfinite, (a, b, c))) or a == 0:
        return a * b + c  # exact, with the sign of a zero
    return float(Fraction(a) * Fraction(b) + Fraction(c))


_fma_float64 = np.vectorize(_exact_fma, otypes=[np.float64])
