"""The backend of a piece of work: NumPy until a kernel pays off, then Numba.

Both have the same bits. Numba's import and start take about a second, and each kernel a quarter of
one, while the oracle preprocesses a 224x224 image in about a millisecond. So "auto" works on NumPy,
without importing Numba, until the work of this process would have paid for a kernel; from then on
the total is about twice that of the better choice at most. Work of a known size compiles at once.
"""

from __future__ import annotations

import concurrent.futures.thread
import functools
import importlib
import importlib.util
import logging
import os
import sys
import threading
import time
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal, TypeAlias

from fastvgg.errors import BackendError, UsageError

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterator

__all__ = [
    "Backend",
    "Chosen",
    "Workload",
    "check_backend",
    "choose",
    "choose_for",
    "compile_lock",
    "workload",
]

Backend: TypeAlias = Literal["auto", "numba", "numpy"]
Chosen: TypeAlias = Literal["numba", "numpy"]

# Of a 2-core AMD EPYC (Zen 3): 0.4 s to import Numba, 0.7 s until it compiles its first function.
START_SECONDS: Final = 1.0
KERNEL_SECONDS: Final = 0.25
# Read and written, on one thread: from 0.4 (uint8 to float32) to 4 (halves). Used until measured.
ORACLE_SECONDS_PER_BYTE: Final = 1e-9
KERNELS: Final = "fastvgg.kernels.convert"
# A Numba that refuses this NumPy or must not compile, an LLVM that cannot be loaded or is too old.
BROKEN_IMPORT: Final = (ImportError, OSError, AttributeError)

compile_lock: Final = threading.RLock()
"""Held while Numba is imported and while a kernel is compiled. A fork waits for it, up to a second
or two: a child that inherits a lock held by a thread that it does not have could never compile."""

# A fork calls the hook that was registered last first. It has to be this one: a compilation may
# need the locks of these modules, which their hooks take and keep.
HOOKS_BEFORE_OURS: Final = (logging, concurrent.futures.thread)

if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=compile_lock.acquire,
        after_in_parent=compile_lock.release,
        after_in_child=compile_lock.release,
    )


@dataclass(eq=False, slots=True)
class Workload:
    """Work that one kernel does: what it has cost on NumPy, and whether its kernel is compiled."""

    has_kernel: bool = True
    """Whether there is a kernel for it at all."""
    seconds: float = 0.0
    nbytes: int = 0
    is_compiled: bool = False

    def expected_seconds(self, nbytes: int, threads: int) -> float:
        """Return how long NumPy takes for more of this work."""
        if self.nbytes:
            return self.seconds / self.nbytes * nbytes
        return ORACLE_SECONDS_PER_BYTE * nbytes / threads

    @contextmanager
    def on_numpy(self, nbytes: int) -> Iterator[None]:
        """Record how long NumPy takes for some of this work."""
        begun = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - begun
        self.nbytes += nbytes


_works: dict[Hashable, Workload] = {}


def workload(*key: Hashable) -> Workload:
    """Return the work that a key stands for: what distinguishes it from that of other kernels."""
    return _works.setdefault(key, Workload())


def check_backend(backend: Backend) -> None:
    """Check that a backend exists and is installed.

    Raises
    ------
    BackendError
        If Numba is asked for by name and is not usable.
    UsageError
        If there is no such backend.
    """
    if backend not in ("auto", "numba", "numpy"):
        raise UsageError(f"backend is {backend!r}", "give 'auto', 'numba' or 'numpy'")
    if backend == "numba" and (problem := _problem_of_numba()):
        reason, remedy = problem
        raise BackendError(f"Numba is not usable: {reason}", remedy)


def choose(backend: Backend, work: Workload, nbytes: int, threads: int) -> Chosen:
    """Return the backend for a call.

    Parameters
    ----------
    backend
        As the caller gave it.
    work
        What the call does.
    nbytes
        What the call reads and writes.
    threads
        How many threads it uses.

    Raises
    ------
    BackendError, UsageError
        As `check_backend`.
    """
    if backend == "auto" and work.is_compiled:
        return "numba"
    check_backend(backend)
    if not work.has_kernel:
        return "numpy"
    if backend != "auto":
        return backend
    expected = work.expected_seconds(nbytes, threads)
    own, all_work = (seconds + expected for seconds in (work.seconds, _total()))
    pays = own >= KERNEL_SECONDS and (_has_started() or all_work >= START_SECONDS + KERNEL_SECONDS)
    return _numba_if(pays)


def choose_for(backend: Backend, nbytes: int, threads: int) -> Chosen:
    """Return the backend for work whose whole size is known; see `choose`.

    What NumPy has done before counts too, so that many epochs of a small dataset pay for a kernel.
    """
    check_backend(backend)
    if backend != "auto":
        return backend
    cost = KERNEL_SECONDS + (0.0 if _has_started() else START_SECONDS)
    return _numba_if(_total() + nbytes * ORACLE_SECONDS_PER_BYTE / threads >= cost)


def _total() -> float:
    return sum(work.seconds for work in list(_works.values()))  # a copy: other threads add to it


def _has_started() -> bool:
    return KERNELS in sys.modules


def _numba_if(pays: bool) -> Chosen:
    """Return Numba where it pays off and is usable; where it is not usable, warn once."""
    if not pays and _is_installed():
        return "numpy"  # without importing it
    problem = _problem_of_numba()
    if problem is not None:
        _warn_numpy_fallback(*problem)
    return "numba" if pays and problem is None else "numpy"


@functools.cache
def _is_installed() -> bool:
    return importlib.util.find_spec("numba") is not None


@functools.cache
def _problem_of_numba() -> tuple[str, str] | None:
    """Import Numba; return why it is not usable and the remedy, or None."""
    with compile_lock:
        if not _is_installed():
            return "it is not installed", "pip install numba"
        try:
            importlib.import_module(KERNELS)
        except BROKEN_IMPORT as error:
            return str(error), "fix the cause, or 'pip install --upgrade numba'"
        return None


@functools.cache
def _warn_numpy_fallback(reason: str, remedy: str) -> None:
    warnings.warn(
        f"Numba is not usable ({reason}): working on the NumPy backend, with the same results, "
        f"slower. To change that: {remedy}",
        stacklevel=2,
    )
