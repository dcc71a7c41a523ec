"""How far a run is: a bar on a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import os
import sys
import time
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from fastvgg.stream.plan import Plan
    from fastvgg.stream.report import Progress

__all__ = ["SECONDS_BETWEEN_LINES", "shown"]

SECONDS_BETWEEN_LINES: Final = 5.0
# The figures of a million images, and some of the bar.
COLUMNS_FOR_SPEED: Final = 80


@contextmanager
def shown(plan: Plan, *, quiet: bool) -> Iterator[Callable[[Progress], None] | None]:
    """Show how far a run is, unless it is to be quiet."""
    if quiet:
        yield None
    elif sys.stderr.isatty() and os.environ.get("TERM", "dumb") != "dumb":
        with _bar(plan.transform.direction, plan.header.images) as tell:
            yield tell
    else:
        yield _lines()


@contextmanager
def _bar(verb: str, images: int) -> Iterator[Callable[[Progress], None]]:
    from rich import progress as rich_progress
    from rich.console import Console
    from rich.table import Column

    def text(shown: str) -> rich_progress.TextColumn:
        # Where it does not fit it is cropped: an ellipsis is no ASCII.
        return rich_progress.TextColumn(
            shown, markup=False, table_column=Column(no_wrap=True, overflow="crop")
        )

    console = Console(stderr=True)
    columns = [
        text(verb),
        rich_progress.BarColumn(),
        text("{task.completed:,}/{task.total:,}"),
        text("{task.fields[left]}"),
        *([text("{task.fields[speed]}")] if console.width >= COLUMNS_FOR_SPEED else []),
    ]
    with rich_progress.Progress(*columns, console=console) as bar:
        task = bar.add_task("", total=images, left="", speed="")

        def tell(at: Progress) -> None:
            bar.update(task, completed=at.images, left=_left(at), speed=_speed(at))

        yield tell


def _lines() -> Callable[[Progress], None]:
    last_told = time.monotonic()

    def tell(at: Progress) -> None:
        nonlocal last_told
        if time.monotonic() - last_told < SECONDS_BETWEEN_LINES:
            return
        last_told = time.monotonic()
        print(
            f"{at.images:,} of {at.total_images:,} images, {_speed(at)}, {_left(at)}",
            file=sys.stderr,
            flush=True,
        )

    return tell


def _left(at: Progress) -> str:
    seconds = at.seconds / at.computed_images * (at.total_images - at.images)
    return f"{timedelta(seconds=round(seconds))} left"


def _speed(at: Progress) -> str:
    seconds = max(at.seconds, 1e-9)
    megabytes = (at.read_bytes + at.written_bytes) / 1e6
    return f"{at.computed_images / seconds:,.0f} images/s, {megabytes / seconds:,.0f} MB/s"
