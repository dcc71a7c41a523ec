"""Every Numba option, and why.

- `nogil`: kernels are serial and run on the engine's own threads. Not `parallel`: the only
  threading layer that pip's Numba brings aborts the process when two threads enter it
  (https://github.com/numba/numba/issues/8563).
- `error_model="numpy"`: division follows IEEE-754. Python's model tests every divisor for zero,
  which keeps the loop from being vectorised.
- No `fastmath`: reassociation, contraction and reciprocals change the bits.
- No `cache`: a loop compiles in 0.2 to 0.5 s, and a cache of compiled code is one more thing to go
  stale.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar, cast

import numba

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["block", "loop"]

Function = TypeVar("Function", bound="Callable[..., Any]")


def loop(function: Function) -> Function:
    """Compile a pass over memory, called from Python."""
    return cast("Function", numba.njit(nogil=True, error_model="numpy")(function))


def block(function: Function) -> Function:
    """Compile a piece of a loop; LLVM inlines it."""
    return cast("Function", numba.njit(error_model="numpy")(function))
