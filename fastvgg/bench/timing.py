"""Interleaved timing, and a description of the machine."""

from __future__ import annotations

import datetime as dt
import os
import platform
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING

from fastvgg.formatting import package_versions
from fastvgg.parallel import available_cpus

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


def time_interleaved(calls: Sequence[Callable[[], object]], rounds: int) -> list[list[float]]:
    """Return the seconds of each call in each round; one warm-up round is not counted.

    Every round makes each call once, so a disturbance of the machine affects all calls
    equally.
    """
    seconds: list[list[float]] = [[] for _ in calls]
    for call in calls:
        call()
    for _ in range(rounds):
        for call, call_seconds in zip(calls, seconds, strict=True):
            start = time.perf_counter()
            call()
            call_seconds.append(time.perf_counter() - start)
    return seconds


def compare(
    own_seconds: Sequence[float], limit_seconds: Sequence[float]
) -> tuple[float, tuple[float, float], float]:
    """Compare timings with those of a limit in the same rounds.

    Returns the share of the limit, which is the median over the rounds of limit seconds / own
    seconds; the interquartile range of that ratio; and the median of the own seconds.

    >>> compare([2.0, 2.0, 4.0], [1.0, 1.0, 1.0])
    (0.5, (0.25, 0.5), 2.0)
    """
    shares = [limit / own for own, limit in zip(own_seconds, limit_seconds, strict=True)]
    low, middle, high = statistics.quantiles(shares, n=4)
    spread = round(low, 3), round(high, 3)
    return round(middle, 3), spread, statistics.median(own_seconds)


def machine() -> dict[str, object]:
    """Return processor, cores, memory, system, package versions and date, as JSON types."""
    pages, page_bytes = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    return {
        "date": dt.datetime.now(dt.UTC).date().isoformat(),
        "processor": _processor(),
        "cores": available_cpus(),
        "memory_gib": round(pages * page_bytes / 2**30, 1),
        "system": f"{platform.system()} {platform.release()}",
        "packages": package_versions(),
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():  # only Linux has it
        return platform.processor() or platform.machine()
    fields = dict.fromkeys(("model name", "cpu family", "model"), "")
    for line in cpuinfo.read_text(encoding="utf-8").splitlines():
        name, _, value = line.partition(":")
        if name.strip() in fields:
            fields[name.strip()] = value.strip()
    return "{model name} (family {cpu family}, model {model})".format(**fields)
