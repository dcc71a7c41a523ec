"""Every Numba option, and why; and what the processor that Numba compiles for can do.

- `nogil`: loops are serial and run on the engine's own threads. Not `parallel`: the only
  threading layer that pip's Numba brings aborts the process when two threads enter it
  (https://github.com/numba/numba/issues/8563).
- `error_model="numpy"`: Python's model would test every divisor for zero.
- `no_cfunc_wrapper`: no C code calls a loop, and to compile that way in takes 0.02 s.
- No `fastmath`: reassociation, contraction and reciprocals change the bits.
- No `cache`: a loop compiles in 0.1 to 0.2 s, and a cache of compiled code is one more thing to go
  stale.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, NamedTuple

import numba
from numba.core.registry import cpu_target
from numba.extending import intrinsic

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Processor", "block", "loop", "processor"]

if numba.config.DISABLE_JIT:  # type: ignore[attr-defined]  # read from the environment
    raise ImportError("NUMBA_DISABLE_JIT is set")


class Processor(NamedTuple):
    """What blocks ask about the processor."""

    is_x86: bool
    converts_halves: bool
    """Whether it has instructions from float16 to float32 and back."""
    fuses: bool
    """Whether it has an instruction for a * b + c that rounds once."""
    moves_bytes: int
    """Among how many bytes an instruction moves each to any place; 0 if there is none."""


@functools.cache
def processor() -> Processor:
    """Return what the processor can do: this one, or what NUMBA_CPU_FEATURES says."""
    triple, _, features = cpu_target.target_context.codegen().magic_tuple()
    named = features.split(",")
    is_arm = triple.startswith(("aarch64", "arm64"))
    return Processor(
        is_x86=triple.startswith("x86_64"),
        converts_halves=is_arm or "+f16c" in named,
        fuses=is_arm or "+fma" in named,
        moves_bytes=64 if "+avx512vbmi" in named else 16 if "+ssse3" in named else 0,
    )


def loop(function: Callable[..., None]) -> Callable[..., None]:
    """Compile a pass over memory, whose arguments are all addresses or sizes, at once."""
    signature = numba.types.void(*[numba.types.intp] * function.__code__.co_argcount)
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy", "no_cfunc_wrapper": True}
    compile_at_once = numba.njit(signature, **options)
    compiled: Callable[..., None] = compile_at_once(function)
    return compiled


def block(emit: Callable[..., None]) -> Callable[..., None]:
    """Make a function of a loop out of one that adds instructions to an LLVM builder.

    `emit` takes the builder and five addresses or sizes, as LLVM values.
    """

    def typed(_types: Any, _1: Any, _2: Any, _3: Any, _4: Any, _5: Any) -> Any:
        def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
            emit(builder, *arguments)
            return context.get_dummy_value()

        return numba.types.void(*[numba.types.intp] * 5), generate

    called: Callable[..., None] = intrinsic(typed)
    return called
