"""Errors and signals -> what a person reads, and exit codes."""

from __future__ import annotations

import os
import signal
import sys
from contextlib import contextmanager
from traceback import print_exc
from typing import TYPE_CHECKING, Any, Final

import typer
from typer.core import TyperCommand

from fastvgg.cli.lines import echo
from fastvgg.errors import FastvggError, StoppedError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType, TracebackType

__all__ = [
    "EXIT_CODES",
    "INTERNAL_ERROR",
    "INTERRUPTED",
    "SOME_INPUTS_FAILED",
    "Command",
    "catch_signals",
    "report_internal_error",
    "translate_errors",
]

SOME_INPUTS_FAILED: Final = 1
INTERRUPTED: Final = 130
INTERNAL_ERROR: Final = 70

_USAGE_ERROR: Final[Any] = typer.BadParameter.__mro__[1]  # Typer exports only what is made of it

EXIT_CODES: Final = """\b
Exit codes:
  0    done
  1    finished, but some inputs failed: they are listed
  2    the command contradicts itself
  3    refused before anything was written
  4    verification found a difference
  5    stopped by an I/O error: the same command goes on
  70   a defect of fastvgg
  130  interrupted: the same command goes on"""


class Command(TyperCommand):
    """A verb that says where its help is at every usage error."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:  # noqa: ANN401  # click's or Typer's
        """Read the arguments; the parser alone forgets of which command it reads them."""
        try:
            return super().parse_args(ctx, args)
        except _USAGE_ERROR as error:
            error.ctx, error.cmd = ctx, self
            raise


@contextmanager
def translate_errors(traceback: bool) -> Iterator[None]:
    """Turn errors into what a person reads, and into exit codes."""
    try:
        yield
    except FastvggError as error:
        if traceback:
            print_exc()
        _print_error(error.problem, error.remedy)
        raise typer.Exit(error.exit_code) from None
    except KeyboardInterrupt:
        _print_error(
            "interrupted", "what was committed is kept: the same command goes on from there"
        )
        raise typer.Exit(INTERRUPTED) from None
    except OSError as error:
        stopped = StoppedError.from_os_error(error, "a system call", str(error.filename), 0)
        if traceback:
            print_exc()
        _print_error(stopped.problem, stopped.remedy)
        raise typer.Exit(stopped.exit_code) from None


def _print_error(problem: str, remedy: str) -> None:
    echo(f"fastvgg: {problem}", sys.stderr)
    echo(f"  {remedy}", sys.stderr)


def report_internal_error(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """Say that fastvgg itself is wrong, without a traceback unless one was asked for."""
    if "--traceback" in sys.argv:
        sys.__excepthook__(kind, error, trace)
    _print_error(
        f"this is a defect: {kind.__name__}: {error}",
        "please report it, with what --traceback adds; what was committed is kept",
    )
    raise SystemExit(INTERNAL_ERROR)


def interrupt(_signal: int, _frame: FrameType | None) -> None:
    """End a run after the call that writes or syncs; a second signal does not wait for that."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda _signal, _frame: os._exit(INTERRUPTED))
    raise KeyboardInterrupt


def catch_signals() -> None:
    """Let Ctrl-C and SIGTERM end a run in the same way."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)
