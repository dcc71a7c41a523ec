"""Lines for people: broken between words where a terminal would break them anywhere."""

from __future__ import annotations

import os
import textwrap
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing import TextIO

__all__ = ["echo"]


def echo(text: str, stream: TextIO) -> None:
    """Print a line, in several that fit if the stream is a terminal; paths stay whole."""
    if stream.isatty():
        columns = os.get_terminal_size(stream.fileno()).columns or 80
        indent = " " * (len(text) - len(text.lstrip()))
        text = textwrap.fill(
            text,
            columns,
            subsequent_indent=indent or "  ",
            break_long_words=False,
            break_on_hyphens=False,
        )
    print(text, file=stream)
