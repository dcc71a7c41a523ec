"""The command line."""

import os
import sys
import warnings
from typing import Any, cast

import typer

from fastvgg.cli.commands import app
from fastvgg.cli.errors import exit_code, report_internal_error
from fastvgg.cli.output import echo
from fastvgg.cli.signals import catch_signals
from fastvgg.cli.streams import install_steady_streams


def main() -> None:
    """Run the command line; SIGTERM and a closed terminal interrupt a run as Ctrl-C does."""
    output = install_steady_streams()
    sys.excepthook = report_internal_error
    catch_signals()
    warnings.showwarning = _show_warning
    _reset_warnings()
    # No result depends on BLAS, whose threads would take memory and processes.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    try:
        typer.main.get_command(app)(prog_name="fastvgg")
    except SystemExit as ended:
        raise SystemExit(exit_code(ended.code, output.unprinted())) from None


def _reset_warnings() -> None:
    """Show warnings as notes, also with `python -W error`, which would make them failures.

    Pillow's are not shown: there may be one for each image, whose row has a reason if it fails.
    """
    kept = [entry for entry in warnings.filters if entry[0] != "error"]
    warnings.resetwarnings()
    cast("list[Any]", warnings.filters).extend(kept)
    warnings.filterwarnings("ignore", module=r"PIL\.")


def _show_warning(message: Warning | str, *_where: Any, **_stream: Any) -> None:
    """Print a warning as a note, without the source line that issued it."""
    echo(f"note: {str(message).strip().partition(chr(10))[0]}", sys.stderr)
