"""Escape what a terminal or a viewer of text would act upon rather than show.

Names of files, members of archives, attributes and records are bytes that anyone may have chosen:
an escape sequence in them could rewrite a terminal, and a right-to-left override what it shows.
"""

from __future__ import annotations

import re
from typing import Final

# Control characters of ASCII and Latin-1, marks that change the direction of text, separators of
# lines and paragraphs, and surrogates, which stand for bytes that are not UTF-8.
CONTROLS: Final = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]"
)


def escape_controls(text: str) -> str:
    r"""Return text with every control character, also a line feed, as Python would write it.

    >>> print(escape_controls("a\x1b[2Jb\n" + chr(0x202E) + "gpj.exe"))
    a\x1b[2Jb\n\u202egpj.exe
    """
    return CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)
