"""What compiles loops, and what the processor that they are compiled for can do.

Loops are written in LLVM's language, through llvmlite, and Numba's code generator makes machine
code of them: with its optimisations, for this processor. They enter Python through ctypes, which
gives the interpreter lock away for as long as one runs, so they work on the engine's own threads.

Numba's own compiler, for loops written in Python, comes to the same machine code. It takes 0.3 s
more before the first one: most of it goes into learning every type and function that Numba knows.
`loop` and `block` are for it.

- `nogil`: as above. Not `parallel`: the only threading layer that pip's Numba brings aborts the
  process when two threads enter it (https://github.com/numba/numba/issues/8563).
- `error_model="numpy"`: Python's model would test every divisor for zero.
- `no_cfunc_wrapper`: no C code calls a loop, and to compile that way in takes 0.02 s.
- No `fastmath`: reassociation, contraction and reciprocals change the bits.
- No `cache`: a cache of compiled code is one more thing to go stale.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
from typing import TYPE_CHECKING, Any, NamedTuple

import numba
from llvmlite import ir
from numba.core.compiler_lock import global_compiler_lock
from numba.core.registry import cpu_target
from numba.extending import intrinsic

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Processor", "block", "loop", "machine_code", "processor"]

_numbers = itertools.count()

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


def machine_code(emit: Callable[..., None], arguments: int) -> Callable[..., None]:
    """Compile a pass over memory, whose arguments are all addresses or sizes.

    `emit` writes it: it is called with an LLVM builder and with the arguments, as LLVM values.
    """
    name = f"fastvgg.{next(_numbers)}"
    # Outside of the compiler's lock, which is taken while the context's own lock is held.
    code_generator = cpu_target.target_context.codegen()
    with global_compiler_lock:
        library = code_generator.create_library(name)
        module = library.create_ir_module(name)
        signature = ir.FunctionType(ir.VoidType(), [ir.IntType(64)] * arguments)
        function = ir.Function(module, signature, name)
        builder = ir.IRBuilder(function.append_basic_block())
        emit(builder, *function.args)
        builder.ret_void()
        library.add_ir_module(module)
        library.finalize()
        address = library.get_pointer_to_function(name)
    called = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * arguments)(address)
    called.library = library  # type: ignore[attr-defined]  # whose end is that of the code
    return called


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
