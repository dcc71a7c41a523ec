"""What compiles loops, and what the processor that they are compiled for can do.

Loops are written in LLVM's language, through llvmlite, and Numba's code generator makes machine
code of them, with its optimisations, for this processor. They enter Python through ctypes, which
gives the interpreter lock away for as long as one runs, so they work on the engine's own threads.

- Not Numba's compiler for Python (`njit`): it comes to the same machine code, and takes 0.3 s more
  before the first loop, most of it to learn every type and function that Numba knows.
- Not `parallel`: the only threading layer that pip's Numba brings aborts the process when two
  threads enter it (https://github.com/numba/numba/issues/8563).
- No flags of fast arithmetic: reassociation, contraction and reciprocals change the bits.
- No cache: a loop compiles in less than 0.1 s, and a cache of compiled code is one more thing to go
  stale.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
from typing import TYPE_CHECKING, Final, NamedTuple

import numba
from llvmlite import ir
from numba.core.compiler_lock import global_compiler_lock
from numba.core.registry import cpu_target

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Processor", "machine_code", "processor"]

STACK_ALIGNMENT: Final = 64
"""Bytes. A spilled register that crosses a page waits behind non-temporal stores: on Zen 3 that
takes 200 ns in every block. An aligned one never crosses a page."""

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
        function.attributes.add("nounwind")  # llvmlite omits alignstack from an empty set
        function.attributes.alignstack = STACK_ALIGNMENT
        builder = ir.IRBuilder(function.append_basic_block())
        emit(builder, *function.args)
        builder.ret_void()
        library.add_ir_module(module)
        library.finalize()
        address = library.get_pointer_to_function(name)
    called = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * arguments)(address)
    called.library = library  # type: ignore[attr-defined]  # whose end is that of the code
    return called
