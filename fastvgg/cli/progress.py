"""How far a run is: a bar on a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from fastvgg.stream.plan import Plan
    from fastvgg.stream.report import Progress

__all__ = ["SECONDS_BETWEEN_LINES", "shown"]

SECONDS_BETWEEN_LINES: Final = 5.0


@contextmanager
def shown(plan: Plan, *, quiet: bool) -> Iterator[Callable[[Progress], None] | None]:
    """Show how far a run is: a bar on a terminal, a line every few seconds elsewhere."""
    if quiet:
        yield None
    elif sys.stderr.isatty():
        with _bar(plan) as tell:
            yield tell
    else:
        yield _lines()


@contextmanager
def _bar(plan: Plan) -> Iterator[Callable[[Progress], None]]:
    from rich import progress as rich_progress
    from rich.console import Console

    columns = (
        rich_progress.TextColumn(plan.transform.direction),
        rich_progress.BarColumn(),
        rich_progress.MofNCompleteColumn(),
        rich_progress.TextColumn("{task.fields[speed]}"),
        rich_progress.TimeRemainingColumn(),
    )
    with rich_progress.Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=plan.header.images, speed="")

        def tell(at: Progress) -> None:
            bar.update(task, completed=at.images, speed=_speed(at))

        yield tell


def _lines() -> Callable[[Progress], None]:
    last_told = time.monotonic()

    def tell(at: Progress) -> None:
        nonlocal last_told
        if time.monotonic() - last_told < SECONDS_BETWEEN_LINES:
            return
        last_told = time.monotonic()
        left_seconds = at.seconds / at.computed_images * (at.of_images - at.images)
        print(
            f"{at.images} of {at.of_images} images, {_speed(at)}, {left_seconds:.0f} s left",
            file=sys.stderr,
            flush=True,
        )

    return tell


def _speed(at: Progress) -> str:
    seconds = max(at.seconds, 1e-9)
    megabytes = (at.read_bytes + at.written_bytes) / 1e6
    return f"{at.computed_images / seconds:.0f} images/s, {megabytes / seconds:.0f} MB/s"
