"""A terminal of a given size, and what stands on its screen when a program in it has ended."""

from __future__ import annotations

import fcntl
import os
import pty
import struct
import subprocess
import termios
from typing import NamedTuple

import pyte


class Shown(NamedTuple):
    """What a program left on a screen."""

    returncode: int
    lines: list[str]
    """Without the blanks at their ends, down to the last that is not empty."""
    cursor_column: int
    written: bytes
    stdout: bytes
    """Where that is not the terminal."""


def run_on_terminal(arguments, columns=80, rows=50, *, stdout=None, **environment):
    """Run a program whose streams are a terminal; or its standard output a pipe, if asked."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    inherited = {name: os.environ[name] for name in os.environ if name not in SIZED}
    with subprocess.Popen(
        [os.fspath(argument) for argument in arguments],
        env={**inherited, "TERM": "xterm-256color", **environment},
        stdin=subprocess.DEVNULL,
        stdout=theirs if stdout is None else stdout,
        stderr=theirs,
    ) as process:
        os.close(theirs)
        written = b"".join(iter(lambda: read_some(ours), b""))
        piped, _ = process.communicate()
    os.close(ours)
    screen = pyte.Screen(columns, rows)
    pyte.ByteStream(screen).feed(written)
    text = "\n".join(line.rstrip() for line in screen.display).rstrip("\n")
    lines = text.split("\n") if text else []
    return Shown(process.returncode, lines, screen.cursor.x, written, piped or b"")


SIZED = {"COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"}


def read_some(descriptor):
    try:
        return os.read(descriptor, 65536)
    except OSError:  # how Linux says that nobody has the other end any more
        return b""
