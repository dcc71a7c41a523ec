"""Where a result was measured: what every file in results/ begins with."""

from __future__ import annotations

import datetime as dt
import os
import platform
from pathlib import Path

from fastvgg.stream.manifest import package_versions


def machine() -> dict[str, object]:
    """Return processor, cores, memory, system, versions and date."""
    pages, page_bytes = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    return {
        "date": dt.datetime.now(dt.UTC).date().isoformat(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(pages * page_bytes / 2**30, 1),
        "system": f"{platform.system()} {platform.release()}",
        "packages": package_versions(),
    }


def _processor() -> str:
    fields = dict.fromkeys(("model name", "cpu family", "model"), "")
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() in fields:
            fields[name.strip()] = value.strip()
    return "{model name} (family {cpu family}, model {model})".format(**fields)
