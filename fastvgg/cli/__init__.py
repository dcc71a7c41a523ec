"""The command line: verbs and options -> calls."""

import io
import sys
import warnings
from typing import Any

import typer

from fastvgg.cli.exits import catch_signals, report_defect
from fastvgg.cli.lines import say
from fastvgg.cli.verbs import app

__all__ = ["app", "main"]


def main() -> None:
    """Run the command line; SIGTERM ends a run as Ctrl-C does."""
    warnings.showwarning = _show_warning
    catch_signals()
    if isinstance(sys.stdout, io.TextIOWrapper):  # names on disk need not be Unicode
        sys.stdout.reconfigure(errors="backslashreplace")
    sys.excepthook = report_defect
    typer.main.get_command(app)(prog_name="fastvgg")


def _show_warning(message: Warning | str, *_where: Any, **_stream: Any) -> None:
    """Print a warning for a person, who did not write the line of code that it came from."""
    say(f"note: {message}", sys.stderr)
