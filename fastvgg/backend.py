"""Choose the backend of a workload: NumPy until compiling a kernel pays off, then Numba.

Both backends give the same bits. Importing and starting Numba takes about a second and compiling a
kernel a quarter of a second, while the oracle preprocesses a 224x224 image in about a millisecond.
So "auto" uses NumPy, without importing Numba, until NumPy has spent as long as a kernel costs. The
total time is then at most about twice that of the better choice. Work of known size is compiled at
once if it is large enough.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import sys
import time
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal, TypeAlias, get_args

from fastvgg.choices import check_choice
from fastvgg.errors import BackendError
from fastvgg.fork_lock import fork_lock

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterator

Backend: TypeAlias = Literal["auto", "numba", "numpy"]
ResolvedBackend: TypeAlias = Literal["numba", "numpy"]
BACKENDS: Final = get_args(Backend)

# Measured on a 2-core AMD EPYC (Zen 3): importing Numba takes 0.4 s, its first compilation 0.7 s.
NUMBA_START_SECONDS: Final = 1.0
COMPILE_SECONDS: Final = 0.25
# The assumption until a workload is measured, per byte read or written on one thread. Measured: 0.4
# to 4 ns (uint8 to float32; float16 and bfloat16).
ORACLE_SECONDS_PER_BYTE: Final = 1e-9
KERNELS_MODULE: Final = "fastvgg.kernels.convert"
# Raised if Numba does not support this NumPy, is disabled, or refuses a variable of the
# environment, or if LLVM fails to load or is too old.
IMPORT_ERRORS: Final = (
    *(ImportError, OSError, AttributeError, MemoryError),
    *(KeyError, RuntimeError, TypeError, ValueError),
)
# Where LLVM gets no memory it ends the process, or searches for some for ever. Starting Numba and
# compiling takes 250 MiB of addresses, and each thread has a stack and a heap.
NUMBA_ADDRESS_BYTES: Final = 768 * 2**20


@dataclass(eq=False, slots=True)
class Workload:
    """The calls that share one kernel: what they have cost on NumPy, and whether it is compiled."""

    has_kernel: bool = True
    """Whether a kernel exists for this workload."""
    numpy_seconds: float = 0.0
    numpy_bytes: int = 0
    is_compiled: bool = False

    def estimate_seconds(self, nbytes: int, threads: int) -> float:
        """Estimate how long NumPy takes to process `nbytes` more."""
        if self.numpy_bytes:
            return self.numpy_seconds / self.numpy_bytes * nbytes
        return ORACLE_SECONDS_PER_BYTE * nbytes / threads

    @contextlib.contextmanager
    def time_numpy(self, nbytes: int) -> Iterator[None]:
        """Measure how long NumPy takes to process `nbytes`."""
        start = time.perf_counter()
        yield
        seconds = time.perf_counter() - start
        for each in (self, _total) if self.has_kernel else (self,):
            each.numpy_seconds += seconds
            each.numpy_bytes += nbytes


_total: Final = Workload()
"""All calls that have a kernel."""


@functools.lru_cache(maxsize=256)
def workload(*_key: Hashable) -> Workload:
    """Return the workload of a key, which identifies a kernel."""
    return Workload()


def check_backend(backend: Backend) -> None:
    """Check that a backend is known, and that Numba is usable if it is "numba"."""
    check_choice("backend", backend, BACKENDS)
    if backend == "numba" and (problem := _find_numba_problem()):
        reason, remedy = problem
        raise BackendError(f"Numba is not usable: {reason}", remedy)


def choose(backend: Backend, workload: Workload, nbytes: int, threads: int) -> ResolvedBackend:
    """Return the backend for a call that reads and writes `nbytes` bytes; see `check_backend`."""
    if backend == "auto" and workload.is_compiled:
        return "numba"
    check_backend(backend)
    if not workload.has_kernel:
        return "numpy"
    if backend != "auto":
        return backend
    call_seconds = workload.estimate_seconds(nbytes, threads)
    pays_off = workload.numpy_seconds + call_seconds >= COMPILE_SECONDS and (
        _has_started()
        or _total.numpy_seconds + call_seconds >= NUMBA_START_SECONDS + COMPILE_SECONDS
    )
    return _resolve(pays_off=pays_off)


def choose_for_size(backend: Backend, nbytes: int, threads: int) -> ResolvedBackend:
    """Return the backend for work of known total size; see `choose`.

    Earlier NumPy time counts too, so a kernel pays off after many epochs of a small dataset.
    """
    check_backend(backend)
    if backend != "auto":
        return backend
    cost = COMPILE_SECONDS + (0.0 if _has_started() else NUMBA_START_SECONDS)
    work_seconds = nbytes * ORACLE_SECONDS_PER_BYTE / threads
    return _resolve(pays_off=_total.numpy_seconds + work_seconds >= cost)


def _has_started() -> bool:
    return KERNELS_MODULE in sys.modules


def _resolve(*, pays_off: bool) -> ResolvedBackend:
    """Return "numba" if it pays off and is usable, else "numpy"; warn once if it is not usable."""
    if not pays_off and _is_installed():
        return "numpy"  # without importing it
    problem = _find_numba_problem()
    if problem is not None:
        _warn_numpy_fallback(*problem)
    return "numba" if pays_off and problem is None else "numpy"


@functools.cache
def _is_installed() -> bool:
    return importlib.util.find_spec("numba") is not None


@functools.cache
def _find_numba_problem() -> tuple[str, str] | None:
    """Import Numba; if that fails, return the problem and its remedy."""
    with fork_lock:
        if not _is_installed():
            return "it is not installed", "pip install numba"
        left_bytes = _address_bytes_left()
        if left_bytes is not None and left_bytes < NUMBA_ADDRESS_BYTES:
            return (
                f"{left_bytes // 2**20} MiB of addresses are left, and it needs "
                f"{NUMBA_ADDRESS_BYTES // 2**20}"
            ), "raise the limit (ulimit -v)"
        try:
            import fastvgg.kernels.convert  # noqa: F401  # imports Numba and loads LLVM
        except IMPORT_ERRORS as error:
            variables = sorted(name for name in os.environ if name.startswith("NUMBA_"))
            if variables:
                return str(error), f"check or unset {', '.join(variables)}"
            return str(error), "fix the cause, or 'pip install -U numba'"
        return None


def _address_bytes_left() -> int | None:
    """Return how many addresses this process may still take; None if there is no limit."""
    try:
        import resource

        limit_bytes = resource.getrlimit(resource.RLIMIT_AS)[0]
        if limit_bytes == resource.RLIM_INFINITY:
            return None
        with open("/proc/self/statm") as file:  # noqa: PTH123
            used_bytes = int(file.read().split()[0]) * resource.getpagesize()
    except (ImportError, OSError):  # not on Windows, and not on macOS
        return None
    return max(0, limit_bytes - used_bytes)


@functools.cache
def _warn_numpy_fallback(reason: str, remedy: str) -> None:
    warnings.warn(
        f"Numba is not usable ({reason}): falling back to the NumPy backend, which gives the same "
        f"results more slowly. To use Numba: {remedy}",
        stacklevel=2,
    )
