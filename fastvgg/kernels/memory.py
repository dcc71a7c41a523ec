"""Loads, stores and prefetches of blocks, fences and barriers."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from fastvgg.kernels import jit
from fastvgg.kernels.order import even_odd_order
from fastvgg.kernels.vector import (
    ELEMENT_BYTES,
    ELEMENTS,
    I32,
    I64,
    SHUFFLE_BYTES,
    Block,
    call_intrinsic,
    concat,
    pack,
    permute,
    shuffle,
    unpack,
)
from fastvgg.tiling import CACHE_LINE_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

STACK_ALIGNMENT_BYTES: Final = 64
TABLE_COLUMNS: Final = 18
"""The columns of a constant table: sixteen lanes from column 0, 1 or 2."""


def _offset(b: Any, address: Any, nbytes: int) -> Any:
    return b.add(address, ir.Constant(I64, nbytes)) if nbytes else address


def _addresses(b: Any, address: Any, step: Any, count: int) -> list[Any]:
    """Return `count` addresses, `step` bytes apart."""
    addresses = [address]
    for _ in range(count - 1):
        addresses.append(b.add(addresses[-1], step))
    return addresses


def _load(b: Any, address: Any, storage: str, lanes: int) -> Any:
    pointer = b.inttoptr(address, ir.PointerType())
    return b.load(pointer, align=1, typ=ir.VectorType(ELEMENTS[storage], lanes))


def _strided_intrinsic(kind: Any, emit: Callable[[Any, Any, Any], Any]) -> Any:
    """Return an intrinsic(address, step) whose result is of type `kind`."""

    @intrinsic
    def access(_context: Any, _address: Any, _step: Any) -> Any:
        signature = kind(types.int64, types.int64)
        return signature, lambda _, b, __, arguments: emit(b, *arguments)

    return access


@functools.cache
def load(storage: str, lanes: int, vectors: int) -> Any:
    """Load vectors `step` bytes apart, with any alignment: intrinsic(address, step)."""

    def emit(b: Any, address: Any, step: Any) -> Any:
        starts = _addresses(b, address, step, vectors)
        return pack(b, [_load(b, start, storage, lanes) for start in starts])

    return _strided_intrinsic(Block(storage, lanes, vectors), emit)


@functools.cache
def load_bytes(
    offsets: tuple[int, ...], lanes: int, block_bytes: int, compute: str, places: int = 1
) -> Any:
    """Load the bytes at given offsets and convert them to the compute type.

    The intrinsic(address, step) does so at each of `places` places `step` bytes apart. One byte
    shuffle of a window of sixteen bytes fills four neighboring lanes and extends them to 32 bits.
    No window extends beyond `block_bytes` from the address, which must be at least sixteen.
    """
    if block_bytes < SHUFFLE_BYTES:
        raise ValueError(f"{block_bytes} bytes are less than a window of {SHUFFLE_BYTES}")
    for first in range(0, len(offsets), 4):
        four = offsets[first : first + 4]
        if max(four) >= min(four) // 3 * 3 + SHUFFLE_BYTES:
            raise ValueError(
                f"four lanes come from {SHUFFLE_BYTES} bytes that begin at a pixel, "
                f"not from offsets {', '.join(map(str, four))}"
            )
    words, values = ir.VectorType(I32, lanes), ir.VectorType(ELEMENTS[compute], lanes)

    def load_four(b: Any, address: Any, first: int) -> Any:
        start = min(_window_start(offsets, first), block_bytes - SHUFFLE_BYTES)
        window = _load(b, _offset(b, address, start), "uint8", SHUFFLE_BYTES)
        zeros, zero = ir.Constant(window.type, None), SHUFFLE_BYTES  # the first lane of `zeros`
        four = offsets[first : first + 4]
        origins = [lane for offset in four for lane in (offset - start, zero, zero, zero)]
        return shuffle(b, window, zeros, origins)

    def load_vector(b: Any, address: Any, first: int) -> Any:
        fours = [load_four(b, address, at) for at in range(first, first + lanes, 4)]
        return b.sitofp(b.bitcast(concat(b, fours), words), values)

    def emit(b: Any, address: Any, step: Any) -> Any:
        starts, firsts = _addresses(b, address, step, places), range(0, len(offsets), lanes)
        return pack(b, [load_vector(b, start, at) for start in starts for at in firsts])

    return _strided_intrinsic(Block(compute, lanes, places * len(offsets) // lanes), emit)


def _window_start(offsets: Sequence[int], first: int) -> int:
    """Return the start of the window of four lanes: a whole pixel, so that channels share windows.

    Eight lanes share a window if it contains all of them; AVX2 then loads it into both halves.

    >>> [_window_start((2, 1, 0, 5, 4, 3, 8, 7), first) for first in (0, 4)]
    [0, 0]
    >>> [_window_start((1, 4, 7, 10, 13, 16, 19, 22), first) for first in (0, 4)]
    [0, 12]
    """
    eight = offsets[first // 8 * 8 : first // 8 * 8 + 8]
    start = min(eight) // 3 * 3
    if max(eight) - start < SHUFFLE_BYTES:
        return start
    return min(offsets[first : first + 4]) // 3 * 3


@functools.cache
def load_channel(storage: str, lanes: int) -> Any:
    """Load one channel of interleaved pixels: every third element, starting at the address.

    The last of three loads starts two elements early, because the two elements after the last one
    may be outside the array. The intrinsic(address, step) ignores the step.
    """
    size = ELEMENT_BYTES[storage]

    def emit(b: Any, address: Any, _step: Any) -> Any:
        starts = (0, lanes, 2 * lanes - 2)
        vectors = [_load(b, _offset(b, address, start * size), storage, lanes) for start in starts]
        wanted = range(0, 3 * lanes, 3)
        return pack(b, [permute(b, vectors, [at if at < 2 * lanes else at + 2 for at in wanted])])

    return _strided_intrinsic(Block(storage, lanes, 1), emit)


@functools.cache
def load_line(nbytes: int) -> Any:
    """Load `nbytes` into a cache line: repeat fewer bytes, combine more with xor.

    The intrinsic(address, step) ignores the step.
    """

    def emit(b: Any, address: Any, _step: Any) -> Any:
        if nbytes < CACHE_LINE_BYTES:
            part = _load(b, address, "uint8", nbytes)
            return pack(b, [concat(b, [part] * (CACHE_LINE_BYTES // nbytes))])
        starts = range(0, nbytes, CACHE_LINE_BYTES)
        parts = [_load(b, _offset(b, address, at), "uint8", CACHE_LINE_BYTES) for at in starts]
        return pack(b, [functools.reduce(b.xor, parts)])

    return _strided_intrinsic(Block("uint8", CACHE_LINE_BYTES, 1), emit)


@intrinsic
def load_int64(_context: Any, _address: Any) -> Any:
    """Load an aligned 64-bit integer."""

    def emit(_: Any, b: Any, __: Any, arguments: Any) -> Any:
        return b.load(b.inttoptr(arguments[0], ir.PointerType()), align=8, typ=I64)

    return types.int64(types.int64), emit


class Constants(NamedTuple):
    """The constants of a mode, each as a block."""

    divide: Any
    divide_reciprocal: Any
    divide_reciprocal_low: Any
    mean: Any
    std: Any
    std_reciprocal: Any
    std_reciprocal_low: Any
    slope: Any
    intercept: Any


SHARED_ROWS: Final = 3
"""The first constants are the same for all channels, so each takes only one register."""


def _load_splat(b: Any, address: Any, kind: Block) -> Any:
    return shuffle(b, _load(b, address, kind.storage, 1), None, [0] * kind.lanes)


def _constants_loader(kind: Block, load_one: Callable[[Any, Any], Any]) -> Any:
    """Return an intrinsic from the address of a constant table to `Constants`."""
    count = len(Constants._fields)
    row_bytes = TABLE_COLUMNS * ELEMENT_BYTES[kind.storage]

    @intrinsic
    def load_constants(_context: Any, _table: Any) -> Any:
        def emit(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
            rows = [_offset(b, arguments[0], row * row_bytes) for row in range(count)]
            shared = [_load_splat(b, address, kind) for address in rows[:SHARED_ROWS]]
            blocks = [pack(b, [vector] * kind.vectors) for vector in shared]
            blocks += [load_one(b, address) for address in rows[SHARED_ROWS:]]
            return context.make_tuple(b, signature.return_type, blocks)

        return types.NamedUniTuple(kind, count, Constants)(types.int64), emit

    return load_constants


@functools.cache
def load_interleaved_constants(compute: str, lanes: int, *, split: bool = False) -> Any:
    """Load the constants of interleaved pixels from a table, for blocks that are split or not.

    Each row repeats three values: a b c a b c ... A register starts with a, b or c, so three
    registers are enough for a whole block; LLVM would spill nine or more. Every second value gives
    the same sequence in reverse: a c b a c b ...
    """
    size = ELEMENT_BYTES[compute]
    width = min(lanes, jit.processor().vector_bytes // size)
    each = lanes // width
    values = even_odd_order(lanes) if split else range(lanes)
    starts = [lanes * number + values[at] for number in range(3) for at in range(0, lanes, width)]

    def load_one(b: Any, address: Any) -> Any:
        phases = [_load(b, _offset(b, address, phase * size), compute, width) for phase in range(3)]
        if split:
            backwards = [shuffle(b, phase, None, range(width)[::-1]) for phase in phases]
            phases = [backwards[(phase + 1 - width) % 3] for phase in range(3)]
        registers = [phases[start % 3] for start in starts]
        firsts = range(0, len(registers), each)
        return pack(b, [concat(b, registers[first : first + each]) for first in firsts])

    return _constants_loader(Block(compute, lanes, 3), load_one)


@functools.cache
def load_channel_constants(compute: str, lanes: int, vectors: int) -> Any:
    """Load the constants of `vectors` channels from a table, each splatted across a vector."""
    kind, size = Block(compute, lanes, vectors), ELEMENT_BYTES[compute]

    def load_one(b: Any, address: Any) -> Any:
        addresses = [_offset(b, address, at * size) for at in range(vectors)]
        return pack(b, [_load_splat(b, channel, kind) for channel in addresses])

    return _constants_loader(kind, load_one)


@functools.cache
def store(*, nontemporal: bool) -> Any:
    """Store the vectors of a block `step` bytes apart: intrinsic(address, step, block).

    With `nontemporal`, avoid read-for-ownership; each address must then be aligned to the size of a
    vector, or of a cache line if that is smaller. Otherwise any alignment is valid.
    """

    @intrinsic
    def store_block(_context: Any, _address: Any, _step: Any, block: Any) -> Any:
        nbytes = ELEMENT_BYTES[block.storage] * block.lanes
        align = min(nbytes, CACHE_LINE_BYTES) if nontemporal else 1

        def emit(_: Any, b: Any, __: Any, arguments: Any) -> None:
            address, step, value = arguments
            addresses = _addresses(b, address, step, block.vectors)
            for start, vector in zip(addresses, unpack(b, value), strict=True):
                written = b.store(vector, b.inttoptr(start, ir.PointerType()), align=align)
                if nontemporal:
                    one = b.module.add_metadata([ir.Constant(I32, 1)])
                    written.set_metadata("nontemporal", one)

        return types.void(types.int64, types.int64, block), emit

    return store_block


def prefetch_distance(read_bytes: int, written_bytes: int) -> int:
    """Return the prefetch distance in bytes for a ratio of bytes read to bytes written.

    If almost all memory traffic is reads, more prefetches in flight than the CPU has miss buffers
    (24 on Zen 3) delay the loads that follow: at a distance of 1024, float32 to uint8 ran
    6 % faster than at 3072, float64 10 %. Other ratios were as fast or up to 4 % slower.
    """
    return 1024 if read_bytes >= 4 * written_bytes else 3072


@functools.cache
def prefetch(nbytes: int, count: int, distance: int) -> Any:
    """Prefetch `nbytes` at `count` places `step` bytes apart: intrinsic(address, step).

    The prefetch is `distance` bytes ahead. The address may be out of bounds: prefetches never
    fault. Arithmetic between two loads reduces the loads in flight, and the hardware prefetcher
    lags: float32 to uint8 ran at 0.80 to 0.89 of the memory bandwidth without prefetching,
    at 0.94 with it.
    """
    hints = [ir.Constant(I32, number) for number in (0, 0, 1)]  # read, streaming, data

    def emit(b: Any, address: Any, step: Any) -> None:
        for start in _addresses(b, address, step, count):
            for ahead in range(distance, distance + nbytes, CACHE_LINE_BYTES):
                pointer = b.inttoptr(_offset(b, start, ahead), ir.PointerType())
                call_intrinsic(b, "llvm.prefetch.p0", ir.VoidType(), pointer, *hints)

    return _strided_intrinsic(types.void, emit)


def _void_intrinsic(emit: Callable[[Any], None]) -> Any:
    """Decorate a function that emits an intrinsic without arguments or result."""

    @intrinsic
    def effect(_context: Any) -> Any:
        return types.void(), lambda _, b, __, ___: emit(b)

    return effect


@_void_intrinsic
def compiler_barrier(b: Any) -> None:
    """Compiler-only memory barrier; emits no instruction.

    LLVM otherwise moves the loads and prefetches of a block to its beginning, which costs up to 0.1
    of the throughput, and needs registers for all of them at once.
    """
    b.asm(ir.FunctionType(ir.VoidType(), []), "", "~{memory}", [], side_effect=True)


@_void_intrinsic
def store_fence(b: Any) -> None:
    """Order non-temporal stores before later stores.

    x86 needs an `sfence`, which LLVM's own fences omit
    (https://github.com/llvm/llvm-project/issues/64521).
    """
    if jit.processor().is_x86:
        call_intrinsic(b, "llvm.x86.sse.sfence", ir.VoidType())


@_void_intrinsic
def align_stack(b: Any) -> None:
    """Align the stack of the calling kernel to 64 bytes.

    A spilled register that crosses a page waits for the non-temporal stores before it, 200 ns a
    block on Zen 3. An aligned register never crosses a page.
    """
    b.function.attributes.add("nounwind")  # llvmlite omits alignstack from an empty set
    b.function.attributes.alignstack = STACK_ALIGNMENT_BYTES
