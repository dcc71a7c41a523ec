"""Exit codes; errors and signals as messages."""

from __future__ import annotations

import os
import re
import signal
import sys
from contextlib import contextmanager
from traceback import print_exc
from typing import TYPE_CHECKING, Any, Final

import typer
from typer.core import TyperCommand

from fastvgg.cli.options import RUN_PANEL as DEFAULT_PANEL
from fastvgg.cli.output import echo
from fastvgg.errors import FastvggError, StoppedError, command_line_vocabulary

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType, TracebackType

SOME_INPUTS_FAILED: Final = 1
INTERRUPTED: Final = 130
INTERNAL_ERROR: Final = 70

# click's UsageError. Typer re-exports only its subclass BadParameter.
_CLICK_USAGE_ERROR: Final[Any] = typer.BadParameter.__mro__[1]

EXIT_CODES: Final = """\b
Exit codes:
  0    done
  1    finished, but some inputs failed (listed)
  2    usage error: invalid or conflicting arguments
  3    refused before anything was written
  4    verification found a difference
  5    I/O error: rerun the same command to resume
  70   internal error (a bug in fastvgg): please report
  130  interrupted: rerun the same command to resume"""


class Command(TyperCommand):
    """A command whose usage errors name its own --help."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:  # noqa: ANN401  # click's or Typer's
        """Parse the arguments; attach this command to errors of the parser, which omits it."""
        try:
            return super().parse_args(ctx, args)
        except _CLICK_USAGE_ERROR as error:
            error.ctx, error.cmd = ctx, self
            raise

    def format_usage(self, ctx: Any, formatter: Any) -> None:  # noqa: ANN401  # click's or Typer's
        """Write the usage line, without Typer's braces around required arguments."""
        usage = " ".join(self.collect_usage_pieces(ctx))
        formatter.write_usage(ctx.command_path, re.sub("[{}]", "", usage))

    def format_options(self, ctx: Any, formatter: Any) -> None:  # noqa: ANN401  # click's or Typer's
        """Write the arguments, then the options in a section for each help panel.

        Typer groups options only with Rich markup, whose boxes are not ASCII.
        """
        sections: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            panel = getattr(param, "rich_help_panel", None) or DEFAULT_PANEL
            name = "Arguments" if param.param_type_name == "argument" else panel
            record = param.get_help_record(ctx)
            if record is not None:
                text = re.sub(r"\[default: \((.+)\)\]", r"[default: \1]", record[1])
                sections.setdefault(name, []).append((record[0], text))
        if not sections.keys() - {"Arguments", DEFAULT_PANEL}:  # one group needs no name
            sections["Options"] = sections.pop(DEFAULT_PANEL)
        for name, records in sections.items():
            with formatter.section(name):
                formatter.write_dl(records)


@contextmanager
def translate_errors(traceback: bool) -> Iterator[None]:
    """Turn exceptions into messages on stderr and exit codes."""
    try:
        with command_line_vocabulary():
            yield
    except (FastvggError, OSError) as error:
        if traceback:
            print_exc()
        if isinstance(error, OSError):
            error = StoppedError.from_os_error(error, "a system call", str(error.filename), 0)
        _print_error(error.problem, error.remedy)
        raise typer.Exit(error.exit_code) from None
    except KeyboardInterrupt:
        _print_error("interrupted", "committed chunks are kept: rerun the same command to resume")
        raise typer.Exit(INTERRUPTED) from None


def _print_error(problem: str, remedy: str) -> None:
    echo(f"fastvgg: {problem}", sys.stderr)
    echo(f"  {remedy}", sys.stderr)


def report_internal_error(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """Report an unexpected exception as a bug and exit with `INTERNAL_ERROR`.

    This is `sys.excepthook`. The traceback is printed only with --traceback.
    """
    if "--traceback" in sys.argv:
        sys.__excepthook__(kind, error, trace)
    _print_error(
        f"internal error (a bug in fastvgg): {kind.__name__}: {error}",
        "please report it with the output of --traceback; committed chunks are kept",
    )
    raise SystemExit(INTERNAL_ERROR)


def interrupt(_signal: int, _frame: FrameType | None) -> None:
    """Interrupt the run after its current write or sync; exit at once on a second signal."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda _signal, _frame: os._exit(INTERRUPTED))
    raise KeyboardInterrupt


def catch_signals() -> None:
    """Install `interrupt` as the handler of SIGINT and SIGTERM."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)
