"""Errors and signals -> what a person reads, and exit codes.

0 done, 1 finished but some inputs failed, 2 usage, 3 refused before anything was written,
4 verification found a difference, 5 stopped by an I/O error and resumable, 130 interrupted and
resumable, 70 a defect of fastvgg itself.
"""

from __future__ import annotations

import os
import signal
import sys
from contextlib import contextmanager
from traceback import print_exc
from typing import TYPE_CHECKING, Final

import typer

from fastvgg.errors import FastvggError, StoppedError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType, TracebackType

__all__ = ["DEFECT", "INTERRUPTED", "SOME_FAILED", "catch_signals", "exits", "report_defect"]

SOME_FAILED: Final = 1
INTERRUPTED: Final = 130
DEFECT: Final = 70


@contextmanager
def exits(traceback: bool) -> Iterator[None]:
    """Turn errors into what a person reads, and into exit codes."""
    try:
        yield
    except FastvggError as error:
        if traceback:
            print_exc()
        _tell(error.problem, error.remedy)
        raise typer.Exit(error.exit_code) from None
    except KeyboardInterrupt:
        _tell("interrupted", "what was committed is kept: the same command goes on from there")
        raise typer.Exit(INTERRUPTED) from None
    except OSError as error:
        stopped = StoppedError.from_os_error(error, "a system call", str(error.filename), 0)
        if traceback:
            print_exc()
        _tell(stopped.problem, stopped.remedy)
        raise typer.Exit(stopped.exit_code) from None


def _tell(problem: str, remedy: str) -> None:
    print(f"fastvgg: {problem}\n  {remedy}", file=sys.stderr)


def report_defect(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """Say that fastvgg itself is wrong, without a traceback unless one was asked for."""
    if "--traceback" in sys.argv:
        sys.__excepthook__(kind, error, trace)
    _tell(
        f"this is a defect: {kind.__name__}: {error}",
        "please report it, with what --traceback adds; what was committed is kept",
    )
    raise SystemExit(DEFECT)


def interrupt(_signal: int, _frame: FrameType | None) -> None:
    """End a run after the call that writes or syncs; a second signal does not wait for that."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda _signal, _frame: os._exit(INTERRUPTED))
    raise KeyboardInterrupt


def catch_signals() -> None:
    """Let Ctrl-C and SIGTERM end a run in the same way."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)
