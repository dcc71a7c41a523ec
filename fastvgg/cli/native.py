"""What libraries in C print, such as libtiff for every damaged image."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Final, TextIO, cast

from fastvgg.cli.streams import SteadyStream

STDERR: Final = 2


@contextmanager
def hidden_native_messages() -> Iterator[None]:
    """Hide what C libraries print to standard error; messages of Python are printed as before.

    A failed image is listed with its reason, so that a line for each would only flood the terminal
    and break its progress bar. Descriptor 2 leads to /dev/null meanwhile, and `sys.stderr` to a
    duplicate.
    """
    try:
        import fcntl  # not on Windows

        is_shown = sys.stderr.fileno() == STDERR
        kept = fcntl.fcntl(STDERR, fcntl.F_DUPFD_CLOEXEC, STDERR + 1) if is_shown else None
    except (AttributeError, ImportError, OSError, ValueError):  # closed, or not a file
        kept = None
    if kept is None:
        yield
        return
    before = sys.stderr
    before.flush()
    stream = os.fdopen(kept, "w", 1, before.encoding, before.errors)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, STDERR)
    os.close(null)
    steady = SteadyStream(stream)
    sys.stderr = cast("TextIO", steady)
    try:
        yield
    finally:
        steady.flush()
        sys.stderr = before
        os.dup2(kept, STDERR)
        with suppress(OSError):  # of what the stream could not print
            stream.close()
