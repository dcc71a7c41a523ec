"""Standard streams that never interrupt the work, whatever they are connected to.

A command runs to its end if its output cannot be printed: because the streams are closed, as under
cron, because the disk that they are redirected to is full, or because a pipe's reader has gone.
"""

from __future__ import annotations

import errno
import io
import os
import sys
from typing import Any, TextIO, cast

from fastvgg.storage.descriptors import open_standard_streams


class SteadyStream:
    """A text stream that keeps its first error in `error`, and from then on discards what it gets.

    Parameters
    ----------
    stream
        The stream to write to; None discards everything.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self.error: OSError | None = None
        self._stream = open(os.devnull, "w") if stream is None else stream  # noqa: SIM115, PTH123

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401  # that of the stream
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write text, unless an earlier write failed."""
        try:
            return self._stream.write(text) if self.error is None else len(text)
        except OSError as error:
            self.error = error
            return len(text)

    def flush(self) -> None:
        """Flush the stream, unless an earlier write failed."""
        try:
            if self.error is None:
                self._stream.flush()
        except OSError as error:
            self.error = error

    def unprinted(self) -> OSError | None:
        """Flush, and return why some of the output was not printed; None if its reader has gone.

        A reader that closes a pipe has read all that it wants, as `head` does.
        """
        self.flush()
        is_failed = self.error is not None and self.error.errno != errno.EPIPE
        return self.error if is_failed else None


def install_steady_streams() -> SteadyStream:
    """Replace the standard streams, first opening those that are closed; return that of output."""
    open_standard_streams()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # file names are bytes, not always valid UTF-8
            stream.reconfigure(errors="backslashreplace")
    output = SteadyStream(sys.stdout)
    sys.stdout, sys.stderr = cast("TextIO", output), cast("TextIO", SteadyStream(sys.stderr))
    return output
