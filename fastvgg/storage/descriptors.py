"""File descriptors above those of the standard streams.

A process may start with its standard streams closed, as under cron or a daemon. The next file that
it opens then has descriptor 2, and what a C library, such as libtiff, prints on its standard error
ends up in that file.
"""

from __future__ import annotations

import os
from typing import Final

MIN_DESCRIPTOR: Final = 3


def above_standard_streams(descriptor: int) -> int:
    """Return a descriptor that is no standard stream's; the given one, if it already is not.

    Otherwise, the given descriptor is closed. It must be newly opened, and not inheritable.
    """
    if descriptor >= MIN_DESCRIPTOR:
        return descriptor
    try:
        import fcntl
    except ImportError:  # not a POSIX system
        return descriptor
    try:
        return fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, MIN_DESCRIPTOR)
    finally:
        os.close(descriptor)


def open_standard_streams() -> None:
    """Open the null device as each standard stream that is closed.

    After this, no file that a library opens gets the descriptor of a standard stream.
    """
    descriptor = os.open(os.devnull, os.O_RDWR)
    while descriptor < MIN_DESCRIPTOR:
        descriptor = os.open(os.devnull, os.O_RDWR)
    os.close(descriptor)
