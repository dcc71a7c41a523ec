"""Output for people and programs: plans, reports, tables, progress and JSON."""

from __future__ import annotations

import json
import os
import sys
import textwrap
import time
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final, TextIO

from fastvgg.escaping import escape_controls
from fastvgg.formatting import format_bytes
from fastvgg.stream.report import MAX_FAILURES_SHOWN

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from fastvgg.stream.plan import Plan
    from fastvgg.stream.report import Progress, Report

SECONDS_BETWEEN_LINES: Final = 5.0
# Wide enough for the figures of a million images and a short bar.
MIN_COLUMNS_FOR_SPEED: Final = 80


def echo(text: str, stream: TextIO) -> None:
    """Print one line, wrapped between words if `stream` is a terminal.

    A terminal would wrap inside words. Paths are never split. Control characters are escaped.
    """
    text = escape_controls(text)
    if stream.isatty():
        columns = os.get_terminal_size(stream.fileno()).columns or 80
        indent = " " * (len(text) - len(text.lstrip()))
        text = textwrap.fill(
            text,
            columns,
            subsequent_indent=indent or "  ",
            break_long_words=False,
            break_on_hyphens=False,
        )
    print(text, file=stream)


def show(text: str, stream: TextIO | None = None) -> None:
    """Print lines as they are, with control characters within a line escaped."""
    for line in text.split("\n"):
        print(escape_controls(line), file=stream or sys.stdout, flush=True)


def print_json(value: object) -> None:
    """Print a value as JSON, for programs."""
    print(json.dumps(value, indent=1))


def plan_record(plan: Plan) -> dict[str, Any]:
    """Return a plan as JSON types."""
    return {
        **plan.job.to_dict(),
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
    """Print the summary of a run and its first failures."""
    echo(str(report), sys.stdout)
    for failure in report.failures[:MAX_FAILURES_SHOWN]:
        echo(f"  failed: row {failure.row}, {failure.path}: {failure.reason}", sys.stderr)
    more = report.counts["failed"] - MAX_FAILURES_SHOWN
    if more > 0:
        echo(f"  and {more:,} more, all listed in {report.target}.index.csv", sys.stderr)


def print_info(properties: dict[str, Any]) -> None:
    """Print the properties of a dataset, one per line."""
    for name, value in properties.items():
        if value in (None, [], "", {}):
            continue
        first, *more = _info_lines(name, value)
        show(escape_controls(f"{name:<17}{first}"))
        for line in more:
            show(escape_controls(f"{'':<17}{line}"))


def _info_lines(name: str, value: object) -> list[str]:
    if isinstance(value, dict):
        return [f"{package} {version}" for package, version in value.items()]
    if name in ("notes", "differences") and isinstance(value, list):
        return value
    if name == "datasets" and isinstance(value, list):
        return [_dataset_line(dataset) for dataset in value]
    if isinstance(value, list | tuple):
        return [" x ".join(str(item) for item in value)]
    if name == "bytes" and isinstance(value, int):
        return [f"{value} ({format_bytes(value)})"]
    return [str(value)]


def _dataset_line(dataset: dict[str, Any]) -> str:
    if dataset.get("virtual"):
        return f"{dataset['name']}: virtual"
    shape = " x ".join(map(str, dataset["shape"])) or "a single value"
    images = ", images" if dataset["images"] else ""
    return f"{dataset['name']}: {shape}, {dataset['dtype']}{images}"


def print_benchmark() -> Callable[[str, dict[str, Any]], None]:
    """Return a callback that prints each benchmark figure below the heading of its section."""
    from fastvgg.bench.report import HEADINGS, line

    current = ""

    def on_figure(section: str, row: dict[str, Any]) -> None:
        nonlocal current
        if section != current:
            show(f"{HEADINGS[section]}\n{'-' * len(HEADINGS[section])}")
            current = section
        show(line(section, row))

    return on_figure


@contextmanager
def progress_bar(
    label: str, total: int, unit: str, *, quiet: bool
) -> Iterator[Callable[[Progress], None] | None]:
    """Yield a progress callback: a bar on a terminal, periodic lines elsewhere, None if quiet.

    `total` is shown until the first call, and `unit` names what is counted on lines.
    """
    if quiet:
        yield None
    elif sys.stderr.isatty() and os.environ.get("TERM", "dumb") != "dumb":
        with _terminal_bar(label, total) as on_progress:
            yield on_progress
    else:
        yield _periodic_lines(unit)


@contextmanager
def _terminal_bar(label: str, images: int) -> Iterator[Callable[[Progress], None]]:
    from rich import progress as rich_progress
    from rich.console import Console, ConsoleDimensions
    from rich.table import Column

    class StderrConsole(Console):
        """A console of the size of `sys.stderr`; Rich asks descriptor 2, which a run redirects."""

        @property  # type: ignore[misc]
        def size(self) -> ConsoleDimensions:
            if "COLUMNS" not in os.environ and not self.is_dumb_terminal:
                with suppress(OSError, ValueError):  # not a terminal
                    size = os.get_terminal_size(sys.stderr.fileno())
                    if size.columns and size.lines:
                        return ConsoleDimensions(*size)
            return super().size

    def text(template: str) -> rich_progress.TextColumn:
        # Crop instead of abbreviating: an ellipsis is not ASCII.
        return rich_progress.TextColumn(
            template, markup=False, table_column=Column(no_wrap=True, overflow="crop")
        )

    console = StderrConsole(stderr=True)
    columns = [
        text(label),
        rich_progress.BarColumn(),
        text("{task.completed:,}/{task.total:,}"),
        text("{task.fields[left]}"),
        *([text("{task.fields[speed]}")] if console.width >= MIN_COLUMNS_FOR_SPEED else []),
    ]
    with rich_progress.Progress(*columns, console=console) as bar:
        task = bar.add_task("", total=images, left="", speed="")

        def on_progress(at: Progress) -> None:
            figures: dict[str, Any] = {"left": _time_left(at), "speed": _speed(at)}
            bar.update(task, completed=at.images, total=at.total_images, **figures)

        yield on_progress


def _periodic_lines(unit: str) -> Callable[[Progress], None]:
    last_line = time.monotonic()

    def on_progress(at: Progress) -> None:
        nonlocal last_line
        if time.monotonic() - last_line < SECONDS_BETWEEN_LINES:
            return
        last_line = time.monotonic()
        print(
            f"{at.images:,} of {at.total_images:,} {unit}, {_speed(at)}, {_time_left(at)}",
            file=sys.stderr,
            flush=True,
        )

    return on_progress


def _time_left(at: Progress) -> str:
    if not at.computed_images:
        return "checking what is done"
    seconds = at.seconds / at.computed_images * (at.total_images - at.images)
    return f"{timedelta(seconds=round(seconds))} left"


def _speed(at: Progress) -> str:
    seconds = max(at.seconds, 1e-9)
    megabytes = (at.read_bytes + at.written_bytes) / 1e6
    return f"{at.computed_images / seconds:,.0f} images/s, {megabytes / seconds:,.0f} MB/s"
