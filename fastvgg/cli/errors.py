"""Exit codes; errors as messages, and with --json as JSON."""

from __future__ import annotations

import errno
import io
import re
import sys
from contextlib import contextmanager, suppress
from traceback import print_exc
from typing import TYPE_CHECKING, Any, Final, NoReturn

import typer
from typer.core import TyperCommand, TyperGroup

from fastvgg.cli.options import RUN_PANEL as DEFAULT_PANEL
from fastvgg.cli.output import echo, print_json, show
from fastvgg.errors import (
    FastvggError,
    StoppedError,
    command_line_vocabulary,
    describe_os_error,
    option,
    remedy_for,
)
from fastvgg.formatting import parse_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType

SOME_INPUTS_FAILED: Final = 1
REFUSED: Final = FastvggError.exit_code
INTERRUPTED: Final = 130
INTERNAL_ERROR: Final = 70
MEMORY_COMMANDS: Final = {"preprocess", "pack", "restore", "verify"}  # those with --memory
DEFAULT_MEMORY: Final = "512MiB"
LOW_MEMORY: Final = "64MiB"
NO_THREAD: Final = "can't start new thread"  # the RuntimeError of threading

# click's UsageError and Abort. Typer re-exports only a subclass of the first.
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


class Commands(TyperGroup):
    """The commands. With --json, every failure is also printed as JSON."""

    def main(self, *positional: Any, **settings: Any) -> NoReturn:
        """Run a command and exit; report errors of the parser as other errors are reported."""
        global _arguments  # also for what is reported after this call
        given = positional[0] if positional else settings.pop("args", None)
        arguments = _arguments = list(sys.argv[1:] if given is None else given)
        settings["standalone_mode"] = False
        try:
            code = super().main(arguments, **settings)
        except _CLICK_USAGE_ERROR as error:
            text = io.StringIO()
            error.show(text)
            show(text.getvalue().rstrip("\n"), sys.stderr)
            help_command = f"{error.ctx.command_path} --help" if error.ctx else "fastvgg --help"
            _print_json_error(
                "UsageError", error.exit_code, error.format_message(), f"run '{help_command}'"
            )
            code = error.exit_code
        except typer.Abort:
            code = INTERRUPTED
        sys.exit(code or 0)

    def invoke(self, ctx: Any) -> Any:  # noqa: ANN401  # click's or Typer's
        """Run a command; report an interrupt while its arguments are parsed."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:  # Typer would exit without a message
            raise typer.Exit(report_interrupt()) from None


_arguments = sys.argv[1:]  # of the command that runs in this process


class Command(TyperCommand):
    """A command whose usage errors name its own --help."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:  # noqa: ANN401  # click's or Typer's
        """Parse the arguments; attach this command to errors of the parser, which omits it."""
        given = list(args)
        try:
            return super().parse_args(ctx, args)
        except _CLICK_USAGE_ERROR as error:
            error.ctx, error.cmd = ctx, self
            if "--size" in error.format_message() and self._has_size(ctx):
                error.message += _suggest_size(given)
            raise

    def _has_size(self, ctx: Any) -> bool:  # noqa: ANN401  # click's or Typer's
        return any("--size" in param.opts for param in self.get_params(ctx))

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
                flags = re.sub(r"--(\S+) / --no-\1", r"--[no-]\1", record[0])
                text = re.sub(r"\[default: \((.+)\)\]", r"[default: \1]", record[1])
                sections.setdefault(name, []).append((flags, text))
        if not sections.keys() - {"Arguments", DEFAULT_PANEL}:  # one group needs no name
            sections["Options"] = sections.pop(DEFAULT_PANEL)
        for name, records in sections.items():
            with formatter.section(name):
                formatter.write_dl(records)


def _suggest_size(arguments: list[str]) -> str:
    """Return the spelling of a size that is written as 224x224, 224,224 or 224."""
    text = " ".join(arguments)
    found = re.search(r"--size[ =](\d+)(?:[x*,X ](\d+))?(?:px)?(?= -|$| *[^ \d])", text)
    if found is None:
        return ""
    with command_line_vocabulary():
        return f" Did you mean '{option('size', (int(found[1]), int(found[2] or found[1])))}'?"


@contextmanager
def translate_errors(traceback: bool) -> Iterator[None]:
    """Turn exceptions into messages and exit codes.

    Outside of `stop_run`, errors of the system have the exit code of what was refused before
    anything was written.
    """
    with command_line_vocabulary():  # also for an error of the system, described here
        try:
            yield
        except (FastvggError, OSError, MemoryError, ImportError, RuntimeError) as error:
            described = error if isinstance(error, FastvggError) else describe_system_error(error)
            if described is None:
                raise
            if traceback:
                print_exc()
            code, name = described.exit_code, type(error).__name__
            report_error(name, code, described.problem, described.remedy, **described.details)
            raise typer.Exit(described.exit_code) from None
        except KeyboardInterrupt:
            remedy = "committed chunks are kept: rerun the same command to resume"
            report_error("KeyboardInterrupt", INTERRUPTED, "interrupted", remedy)
            raise typer.Exit(INTERRUPTED) from None


@contextmanager
def stop_run() -> Iterator[None]:
    """Raise StoppedError where the system refuses what a run, which may have written, needs."""
    try:
        yield
    except (OSError, MemoryError, RuntimeError) as error:
        described = None if isinstance(error, FastvggError) else describe_system_error(error)
        if described is None:
            raise
        remedy = f"{described.remedy}; rerunning the same command resumes"
        raise StoppedError(described.problem, remedy) from error


def describe_system_error(error: Exception) -> FastvggError | None:
    """Describe what the system, or a package, refused; None for any other error."""
    if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
        return FastvggError(
            f"no more memory can be allocated: {error}".removesuffix(": "),
            "free memory, or raise its limit (ulimit -v)" + _lower_memory(),
        )
    if isinstance(error, ImportError):
        return FastvggError(
            f"{error.name or 'a package'} cannot be imported: {error}",
            "install it again, or raise the limits of memory and open files (ulimit -v, -n)",
        )
    if isinstance(error, OSError):
        return FastvggError(describe_os_error(error), remedy_for(error))
    if NO_THREAD in str(error):
        return FastvggError(
            "the system starts no more threads",
            "end other processes, or raise the limit of processes (ulimit -u)",
        )
    return None


def _lower_memory() -> str:
    """Return the advice to lower the memory limit, if the command has a high one."""
    given = re.search(r"--memory[ =](\S+)", " ".join(_arguments))
    with suppress(FastvggError):  # its value has not been checked yet
        limit_bytes = parse_bytes(given[1] if given else DEFAULT_MEMORY)
        if limit_bytes > parse_bytes(LOW_MEMORY) and {*_arguments[:1]} & MEMORY_COMMANDS:
            return f", or lower that of the run: {option('memory', LOW_MEMORY)}"
    return ""


def report_error(name: str, exit_code: int, problem: str, remedy: str, **details: Any) -> None:
    """Print an error on stderr, and with --json also as JSON on stdout."""
    echo(f"fastvgg: {problem}", sys.stderr)
    echo(f"  {remedy}", sys.stderr)
    _print_json_error(name, exit_code, problem, remedy, **details)


def _print_json_error(
    name: str, exit_code: int, problem: str, remedy: str, **details: object
) -> None:
    if "--json" in _arguments:
        record = {"error": name, "exit_code": exit_code, "problem": problem, "remedy": remedy}
        print_json(record | details)


def report_interrupt() -> int:
    """Report an interrupt before a command, or after it; return the exit code."""
    report_error("KeyboardInterrupt", INTERRUPTED, "interrupted", "rerun the same command")
    return INTERRUPTED


def exit_code(code: str | int | None, unprinted: OSError | None) -> str | int | None:
    """Return the exit code of a command whose output could not all be printed.

    The work is done, and what it wrote is complete: a rerun finds that, and prints the output.
    """
    if unprinted is None or code not in (None, 0, SOME_INPUTS_FAILED):
        return code
    echo(f"fastvgg: standard output: {describe_os_error(unprinted)}", sys.stderr)
    echo("  the work is done; rerun the same command to print its output", sys.stderr)
    return StoppedError.exit_code


def report_internal_error(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """Report an unexpected exception as a bug and exit with `INTERNAL_ERROR`.

    This is `sys.excepthook`. The traceback is printed only with --traceback.
    """
    if kind is KeyboardInterrupt:
        raise SystemExit(report_interrupt())
    if "--traceback" in sys.argv:
        sys.__excepthook__(kind, error, trace)
    report_error(
        kind.__name__,
        INTERNAL_ERROR,
        f"internal error (a bug in fastvgg): {kind.__name__}: {error}",
        "please report it with the output of --traceback; committed chunks are kept",
    )
    raise SystemExit(INTERNAL_ERROR)
