"""A row of a result: a path and its share of the limit."""

from __future__ import annotations


def row(path, wanted, share, spread, **figures):
    """Print and return a row of the result."""
    line = {"path": path, "wanted": wanted, "share": share, "spread": spread, **figures}
    print(f"{path:36s} {share:6.3f} of the limit ({spread[0]}..{spread[1]})", figures, flush=True)
    return line
