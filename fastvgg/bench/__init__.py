"""What this machine reaches: its memory, every kernel beside it, the oracle, decoding and a disk.

Correctness is checked in the same run: what is fast and wrong is an error.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NamedTuple

from fastvgg.backend import check_backend
from fastvgg.parallel import check_threads

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

__all__ = ["FULL", "QUICK", "BenchConfig", "measure"]


class BenchConfig(NamedTuple):
    """How much is measured."""

    working_set_bytes: int
    """Of a batch and its result together: no cache holds them."""
    rounds: int
    images: int
    """Decoded at most."""
    file_bytes: int
    every_path: bool
    """Whether every mode, storage type and pair of layouts is measured, or the common ones."""


FULL: Final = BenchConfig(400 * 2**20, 11, 2000, 2**30, every_path=True)
QUICK: Final = BenchConfig(192 * 2**20, 3, 100, 256 * 2**20, every_path=False)


def measure(
    config: BenchConfig = FULL,
    *,
    images: Path | None = None,
    disk: Path | None = None,
    threads: int | None = None,
    tell: Callable[[str, dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Measure this machine.

    Parameters
    ----------
    extent
        `FULL`, a few minutes, or `QUICK`, a quarter of one.
    images
        A directory or tar shards of images, if decoding is to be measured as well.
    disk
        A directory, if its disk is to be measured: a file is written there, and removed.
    threads
        All usable cores if not given.
    tell
        Called with "memory", "kernels", "decoding" or "disk" and each figure when it is known.

    Returns
    -------
    dict
        machine, instruction_set, threads, rounds; memory and kernels, lists of a row for each loop
        and path; call_overhead_us; decoding and disk, if they were asked for.

    Raises
    ------
    BackendError
        If Numba is not usable: there are no kernels to measure then.
    SourceError, UsageError, TargetError
        If there are no images, or the disk cannot be written to.
    VerificationError
        If a result is wrong.
    """
    check_backend("numba")
    from fastvgg.bench import decoding, kernels, memory
    from fastvgg.bench import disk as disks
    from fastvgg.bench.machine import machine
    from fastvgg.kernels.jit import processor

    threads = check_threads(threads)
    record: dict[str, Any] = {"machine": machine(), "instruction_set": processor().name}
    record |= {"threads": threads, "rounds": config.rounds}

    def found(part: str, row: dict[str, Any]) -> dict[str, Any]:
        if tell is not None:
            tell(part, row)
        return row

    if disk is not None:
        record["disk"] = found("disk", disks.measured(disk, config.file_bytes, config.rounds))
    if images is not None:
        decoded = decoding.measured(images, config.images, config.rounds, threads)
        record["decoding"] = found("decoding", decoded)
    arena = memory.Arena(config.working_set_bytes)
    limits = memory.measured(arena, config.rounds, threads)
    record["memory"] = [found("memory", row) for row in limits]
    wanted = kernels.PATHS if config.every_path else kernels.COMMON_PATHS
    paths = kernels.measured(arena, config.rounds, threads, wanted)
    record["kernels"] = [found("kernels", row) for row in paths]
    return {**record, "call_overhead_us": kernels.call_overhead_us(config.rounds)}
