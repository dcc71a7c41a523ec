"""Run a program on a pseudo-terminal of a given size, and read its final screen."""

from __future__ import annotations

import fcntl
import os
import pty
import struct
import subprocess
import termios
from typing import NamedTuple

import pyte


class FinalScreen(NamedTuple):
    """The final screen of a program."""

    returncode: int
    lines: list[str]
    """Without trailing blanks, up to the last non-empty line."""
    cursor_column: int
    written: bytes
    stdout: bytes
    """Empty if standard output was the terminal."""


def run_on_terminal(arguments, columns=80, rows=50, *, stdout=None, **environment):
    """Run a program on a pseudo-terminal; `stdout` redirects its standard output."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    inherited = {name: os.environ[name] for name in os.environ if name not in TERMINAL_VARIABLES}
    with subprocess.Popen(
        [os.fspath(argument) for argument in arguments],
        env={**inherited, "TERM": "xterm-256color", **environment},
        stdin=subprocess.DEVNULL,
        stdout=slave if stdout is None else stdout,
        stderr=slave,
    ) as process:
        os.close(slave)
        written = b"".join(iter(lambda: read_some(master), b""))
        piped, _ = process.communicate()
    os.close(master)
    screen = pyte.Screen(columns, rows)
    pyte.ByteStream(screen).feed(written)
    text = "\n".join(line.rstrip() for line in screen.display).rstrip("\n")
    lines = text.split("\n") if text else []
    return FinalScreen(process.returncode, lines, screen.cursor.x, written, piped or b"")


TERMINAL_VARIABLES = {
    "COLUMNS",
    "LINES",
    "NO_COLOR",
    "FORCE_COLOR",
    "TTY_COMPATIBLE",
    "TTY_INTERACTIVE",
}


def read_some(descriptor):
    try:
        return os.read(descriptor, 65536)
    except OSError:  # EIO on Linux: the other end is closed
        return b""
