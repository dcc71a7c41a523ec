"""Measure this machine: memory bandwidth, kernels, the NumPy reference, decoding and a disk.

Every result is compared with the oracle in the same run, so a fast but wrong kernel is an error.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NamedTuple

from fastvgg.backend import check_backend
from fastvgg.parallel import check_threads
from fastvgg.storage.location import Location
from fastvgg.stream.source import check_exists

if TYPE_CHECKING:
    import os
    from collections.abc import Callable
    from pathlib import Path


class BenchConfig(NamedTuple):
    """The extent of a benchmark."""

    working_set_bytes: int
    """Input and result together; larger than any cache."""
    rounds: int
    images: int
    """The maximum number of images to decode."""
    file_bytes: int
    has_all_paths: bool
    """Measure every mode, storage type and pair of layouts instead of the common ones."""


FULL: Final = BenchConfig(400 * 2**20, 11, 2000, 2**30, has_all_paths=True)
QUICK: Final = BenchConfig(192 * 2**20, 3, 100, 256 * 2**20, has_all_paths=False)


def measure(
    config: BenchConfig = FULL,
    *,
    images: str | os.PathLike[str] | None = None,
    disk: Path | None = None,
    threads: int | None = None,
    on_figure: Callable[[str, dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Measure this machine: `FULL` takes a few minutes, `QUICK` about 15 seconds.

    `images`, a directory or tar shards of images, adds a measurement of decoding. `disk`, a
    directory, adds one of its disk, with a temporary file. `on_figure` is called with "memory",
    "kernels", "decoding" or "disk", and each figure as it is measured.

    The record has machine, instruction_set, threads and rounds; memory and kernels, lists of a row
    for each loop and path; call_overhead_us; decoding and disk, if requested. A wrong result raises
    `VerificationError`, and a processor without usable kernels `BackendError`.
    """
    images_location = None if images is None else Location.parse(images)
    if images_location is not None:
        check_exists(images_location)
    check_backend("numba")
    from fastvgg.bench import io, kernels, memory
    from fastvgg.bench.timing import machine
    from fastvgg.kernels.jit import processor

    threads = check_threads(threads)
    record: dict[str, Any] = {"machine": machine(), "instruction_set": processor().name}
    record |= {"threads": threads, "rounds": config.rounds}

    def report(section: str, row: dict[str, Any]) -> dict[str, Any]:
        if on_figure is not None:
            on_figure(section, row)
        return row

    if disk is not None:
        figures = io.measure_disk(disk, config.file_bytes, config.rounds)
        record["disk"] = report("disk", figures)
    if images_location is not None:
        figures = io.measure_decoding(images_location, config.images, config.rounds, threads)
        record["decoding"] = report("decoding", figures)
    arena = memory.Arena(config.working_set_bytes)
    bandwidths = memory.measure_bandwidth(arena, config.rounds, threads)
    record["memory"] = [report("memory", row) for row in bandwidths]
    paths = kernels.PATHS if config.has_all_paths else kernels.COMMON_PATHS
    rows = (kernels.measure_path(path, arena, config.rounds, threads) for path in paths)
    record["kernels"] = [report("kernels", row) for row in rows]
    return {**record, "call_overhead_us": kernels.call_overhead_us(config.rounds)}
