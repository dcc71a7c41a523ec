"""What a verb answers: a plan, a report, what is known of a dataset; for people, or as JSON."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

from fastvgg.cli.lines import echo
from fastvgg.stream.plan import format_bytes
from fastvgg.stream.report import FAILURES_SHOWN

if TYPE_CHECKING:
    from collections.abc import Callable

    from fastvgg.stream.plan import Plan
    from fastvgg.stream.report import Report

__all__ = ["plan_record", "print_benchmark", "print_info", "print_json", "print_report"]


def plan_record(plan: Plan) -> dict[str, Any]:
    """Return a plan as JSON types."""
    return {
        **plan.job(),
        "images": plan.header.images,
        "chunks": plan.chunks,
        "chunk_images": plan.chunk_images,
        "committed_chunks": plan.committed_chunks,
        "read_bytes": plan.read_bytes,
        "write_bytes": plan.write_bytes,
        "projected_bytes": plan.projected_bytes,
        "memory_bytes": plan.memory_bytes,
        "notes": list(plan.notes),
    }


def print_report(report: Report) -> None:
    """Print what a run did, and the first of what failed."""
    echo(str(report), sys.stdout)
    for failure in report.failures[:FAILURES_SHOWN]:
        echo(f"  failed: row {failure.row}, {failure.path}: {failure.reason}", sys.stderr)
    if len(report.failures) > FAILURES_SHOWN:
        more = len(report.failures) - FAILURES_SHOWN
        echo(f"  and {more} more, all listed in {report.target}.index.csv", sys.stderr)


def print_json(value: object) -> None:
    """Print a value for programs."""
    print(json.dumps(value, indent=1))


def print_info(known: dict[str, Any]) -> None:
    """Print what is known of a dataset, a line for each thing."""
    for name, value in known.items():
        if value in (None, [], ""):
            continue
        first, *more = _readable(name, value)
        print(f"{name:<17}{first}")
        for line in more:
            print(f"{'':<17}{line}")


def print_benchmark() -> Callable[[str, dict[str, Any]], None]:
    """Return what prints each figure of this machine, the parts below headings."""
    from fastvgg.bench.report import HEADINGS, line

    told = ""

    def tell(part: str, row: dict[str, Any]) -> None:
        nonlocal told
        if part != told:
            print(f"{HEADINGS[part]}\n{'-' * len(HEADINGS[part])}")
            told = part
        print(line(part, row), flush=True)

    return tell


def _readable(name: str, value: object) -> list[str]:
    if isinstance(value, dict):
        return [f"{package} {version}" for package, version in value.items()]
    if name == "notes" and isinstance(value, list):
        return value
    if isinstance(value, list):
        return [" x ".join(str(item) for item in value)]
    if name == "bytes" and isinstance(value, int):
        return [f"{value} ({format_bytes(value)})"]
    return [str(value)]
