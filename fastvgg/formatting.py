"""HTML representations for notebooks."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable


def html_table(caption: str, rows: Iterable[tuple[str, str]]) -> str:
    """Return an HTML table with a row for each pair of a name and a value; escapes all text.

    >>> html_table("a & b", [("images", "11")])
    '<table><caption>a &amp; b</caption><tr><th>images</th><td>11</td></tr></table>'
    """
    body = "".join(
        f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in rows
    )
    return f"<table><caption>{escape(caption)}</caption>{body}</table>"
