"""Where something was measured: processor, cores, memory, system, versions and date."""

from __future__ import annotations

import datetime as dt
import os
import platform
from pathlib import Path

from fastvgg.parallel import available_cpus
from fastvgg.stream.manifest import package_versions

__all__ = ["machine"]


def machine() -> dict[str, object]:
    """Return where this process runs, as JSON can hold it."""
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
    listed = Path("/proc/cpuinfo")
    if not listed.exists():  # Linux alone has it
        return platform.processor() or platform.machine()
    fields = dict.fromkeys(("model name", "cpu family", "model"), "")
    for line in listed.read_text(encoding="utf-8").splitlines():
        name, _, value = line.partition(":")
        if name.strip() in fields:
            fields[name.strip()] = value.strip()
    return "{model name} (family {cpu family}, model {model})".format(**fields)
