"""A plan is shown or carried out, here or on a cluster."""

from __future__ import annotations

import dataclasses
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

import typer

from fastvgg.cli import progress
from fastvgg.cli.errors import SOME_INPUTS_FAILED
from fastvgg.cli.lines import echo
from fastvgg.cli.output import plan_record, print_json, print_report
from fastvgg.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from distributed import Client

    from fastvgg.stream.plan import Plan

__all__ = ["execute"]


def execute(plan: Plan, dask: str | None, *, dry_run: bool, as_json: bool, quiet: bool) -> None:
    """Print or run a plan, and exit with 1 if some inputs failed."""
    if dry_run:
        print_json(plan_record(plan)) if as_json else print(plan)
        return
    for note in plan.notes if not quiet else ():
        echo(f"note: {note}", sys.stderr)
    with _connect(dask) as client, progress.shown(plan, quiet=quiet) as tell:
        report = plan.run(tell, client=client)
    print_json(dataclasses.asdict(report)) if as_json else print_report(report)
    if report.counts["failed"]:
        if plan.transform.direction != "restore":
            echo("  when they are mended, give the same command with --retry-failed", sys.stderr)
        raise typer.Exit(SOME_INPUTS_FAILED)


@contextmanager
def _connect(dask: str | None) -> Iterator[Client | None]:
    if dask is None:
        yield None
        return
    try:
        from fastvgg import cluster
    except ImportError as error:
        raise UsageError(
            f"--dask needs a package that is not installed: {error.name}",
            "install it: pip install 'fastvgg[dask]'",
        ) from None
    with cluster.connect(dask) as client:
        yield client
