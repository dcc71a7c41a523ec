"""The command line."""

import io
import sys
import warnings
from typing import Any

import typer

from fastvgg.cli.commands import app
from fastvgg.cli.errors import catch_signals, report_internal_error
from fastvgg.cli.output import echo


def main() -> None:
    """Run the command line; SIGTERM interrupts a run as Ctrl-C does."""
    warnings.showwarning = _show_warning
    catch_signals()
    if isinstance(sys.stdout, io.TextIOWrapper):  # file names are bytes, not always valid UTF-8
        sys.stdout.reconfigure(errors="backslashreplace")
    sys.excepthook = report_internal_error
    typer.main.get_command(app)(prog_name="fastvgg")


def _show_warning(message: Warning | str, *_where: Any, **_stream: Any) -> None:
    """Print a warning as a note, without the source line that issued it."""
    echo(f"note: {message}", sys.stderr)
