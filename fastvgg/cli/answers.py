"""What a verb answers: a plan, a report, what is known of a dataset; for people, or as JSON."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from fastvgg.stream.plan import Plan
    from fastvgg.stream.report import Report

__all__ = ["FAILURES_SHOWN", "plan_record", "print_json", "print_known", "print_report"]

FAILURES_SHOWN: Final = 10


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
    print(report)
    for failure in report.failures[:FAILURES_SHOWN]:
        print(f"  failed: row {failure.row}, {failure.path}: {failure.reason}", file=sys.stderr)
    if len(report.failures) > FAILURES_SHOWN:
        more = len(report.failures) - FAILURES_SHOWN
        print(f"  and {more} more, all listed in {report.target}.index.csv", file=sys.stderr)


def print_json(value: object) -> None:
    """Print a value for programs."""
    print(json.dumps(value, indent=1))


def print_known(known: dict[str, Any]) -> None:
    """Print what is known of a dataset, a line for each thing."""
    for name, value in known.items():
        if value not in (None, [], ""):
            print(f"{name:<17}{_readable(value)}")


def _readable(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {version}" for name, version in value.items())
    if isinstance(value, list):
        return " x ".join(str(item) for item in value)
    return str(value)
