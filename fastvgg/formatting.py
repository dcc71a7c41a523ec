"""Values as text: counts, package versions, and tables for notebooks."""

from __future__ import annotations

import functools
import operator
import re
from html import escape
from importlib import metadata
from platform import python_version
from typing import TYPE_CHECKING, Final

from fastvgg.errors import UsageError, option
from fastvgg.escaping import escape_controls

if TYPE_CHECKING:
    from collections.abc import Iterable

UNIT_BYTES: Final = {"": 1, "B": 1, "K": 2**10, "KIB": 2**10, "M": 2**20, "MIB": 2**20}
UNIT_BYTES.update({"G": 2**30, "GIB": 2**30, "T": 2**40, "TIB": 2**40})
UNIT_BYTES.update({"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12})


def parse_bytes(text: str | int) -> int:
    """Parse a size such as "512MiB" into bytes.

    >>> parse_bytes("512MiB"), parse_bytes("1.5 GB"), parse_bytes(4096)
    (536870912, 1500000000, 4096)
    """
    if hasattr(text, "__index__") and not isinstance(text, bool):
        return operator.index(text)
    match = None
    if isinstance(text, str):
        match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2].upper() not in UNIT_BYTES:
        raise UsageError(
            f"{text!r} is not an amount of memory",
            f"write it like {option('memory', '512MiB')} or {option('memory', '2GiB')}",
        )
    return int(float(match[1]) * UNIT_BYTES[match[2].upper()])


def format_bytes(count: float) -> str:
    """Format a byte count with a binary unit.

    >>> format_bytes(999), format_bytes(602112), format_bytes(3 * 2**30)
    ('999 B', '588.0 KiB', '3.0 GiB')
    """
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def format_count(count: int, noun: str) -> str:
    """Format a count and what it counts, in the singular or the plural.

    >>> format_count(1, "image"), format_count(1200, "chunk")
    ('1 image', '1,200 chunks')
    """
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def package_versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that a result may depend on."""
    names = ("fastvgg", "numpy", "numba", "pillow", "simplejpeg", "h5py", "zarr")
    return {"python": python_version(), **{name: _installed_version(name) for name in names}}


@functools.cache  # reading the metadata takes a millisecond per package
def _installed_version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def html_table(caption: str, rows: Iterable[tuple[str, str]]) -> str:
    """Return an HTML table with a row for each pair of a name and a value; escapes all text.

    >>> html_table("a & b", [("images", "11")])
    '<table><caption>a &amp; b</caption><tr><th>images</th><td>11</td></tr></table>'
    """
    body = "".join(
        f"<tr><th>{_to_html(name)}</th><td>{_to_html(value)}</td></tr>" for name, value in rows
    )
    return f"<table><caption>{_to_html(caption)}</caption>{body}</table>"


def _to_html(text: str) -> str:
    return escape(escape_controls(text))
