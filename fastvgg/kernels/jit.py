"""Compile kernels with Numba, for the features of this CPU.

The options and their reasons:

- `nogil`: kernels run on the engine's own threads without holding the interpreter lock.
- Not `parallel`: the only threading layer of Numba's wheels aborts the process if two threads enter
  it (https://github.com/numba/numba/issues/8563).
- Not `fastmath`: reassociation, contraction and reciprocals change the bits.
- Not `cache`: loading from a cache takes as long as compiling, because most of the first call is
  Numba's own initialization, and a cache on disk can go stale.
- `error_model="numpy"`: a division never raises, so no kernel has an error path.
- An explicit signature: a kernel is compiled when it is defined, never inside a call.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numba
from llvmlite import binding

if TYPE_CHECKING:
    from collections.abc import Callable

if numba.config.DISABLE_JIT:  # type: ignore[attr-defined]  # read from the environment
    raise ImportError("NUMBA_DISABLE_JIT is set")

if any(name[:1] not in "+-" for name in (numba.config.CPU_FEATURES or "").split(",")):  # type: ignore[attr-defined]
    raise ImportError("NUMBA_CPU_FEATURES has a feature without + or -")  # LLVM ends the process

always_inline: Final[Any] = numba.njit(inline="always")
"""Decorate a part of a kernel; it is inlined into each kernel that calls it."""


class Processor(NamedTuple):
    """The CPU features that vector blocks depend on."""

    is_x86: bool
    has_f16c: bool
    """Whether instructions convert between float16 and float32."""
    has_fma: bool
    """Whether an instruction computes a * b + c with one rounding."""
    vector_bytes: int
    """The size of the widest vector register: 16, 32 or 64."""
    min_permute_bytes: int
    """The size of the smallest elements that one instruction permutes across two vectors.

    16 if there is no such instruction for elements of one or two bytes.
    """

    @property
    def store_bytes(self) -> int:
        """The size of a non-temporal store; Arm's STNP stores two registers."""
        return self.vector_bytes if self.is_x86 else 2 * self.vector_bytes

    @property
    def block_bytes(self) -> int:
        """The maximum size of a block on x86: three quarters of the vector registers."""
        return (24 if self.vector_bytes == 64 else 12) * self.vector_bytes

    @property
    def name(self) -> str:
        """The common name of the instruction set.

        >>> avx2 = Processor(True, True, True, vector_bytes=32, min_permute_bytes=16)
        >>> avx2.name
        'AVX2'
        """
        if not self.is_x86:
            return "NEON"
        return {16: "SSE", 32: "AVX2", 64: "AVX-512"}[self.vector_bytes]


@functools.cache
def processor() -> Processor:
    """Return the features of this CPU, or those in NUMBA_CPU_FEATURES."""
    features = _features()
    triple = binding.get_process_triple()
    is_arm = triple.startswith(("aarch64", "arm64"))
    permutes_bytes = is_arm or "avx512vbmi" in features  # tbl, vpermi2b
    permutes_words = "avx512bw" in features  # vpermi2w
    return Processor(
        is_x86=triple.startswith("x86_64"),
        has_f16c=is_arm or "f16c" in features,
        has_fma=is_arm or "fma" in features,
        vector_bytes=64 if "avx512f" in features else 32 if "avx2" in features else 16,
        min_permute_bytes=1 if permutes_bytes else 2 if permutes_words else 16,
    )


def _features() -> frozenset[str]:
    """Return the names of the features that Numba compiles for."""
    listed = numba.config.CPU_FEATURES  # type: ignore[attr-defined]
    if listed is not None:
        names = [name for name in listed.split(",") if name]
        return frozenset(name[1:] for name in names if name.startswith("+"))
    host = binding.get_host_cpu_features()
    has_avx = numba.config.ENABLE_AVX  # type: ignore[attr-defined]
    return frozenset(
        name for name, is_enabled in host.items() if is_enabled and (has_avx or "avx" not in name)
    )


def kernel(arguments: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Return a decorator that compiles a function of `arguments` int64 addresses and sizes."""
    signature = numba.void(*[numba.int64] * arguments)
    compile_now: Callable[[Callable[..., None]], Callable[..., None]] = numba.njit(
        signature, nogil=True, error_model="numpy"
    )
    return compile_now
