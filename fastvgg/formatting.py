"""What values look like in a notebook: a caption, and a small table of names and facts."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["html_table"]


def html_table(caption: str, facts: Iterable[tuple[str, str]]) -> str:
    """Return a table in HTML, with all that has a meaning in HTML escaped.

    >>> html_table("a & b", [("images", "11")])
    '<table><caption>a &amp; b</caption><tr><th>images</th><td>11</td></tr></table>'
    """
    rows = "".join(
        f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in facts
    )
    return f"<table><caption>{escape(caption)}</caption>{rows}</table>"
