"""What was measured, as lines of text that fit into 80 columns."""

from __future__ import annotations

from typing import Any, Final

__all__ = ["HEADINGS", "LOW_SHARE", "line", "low_paths"]

LOW_SHARE: Final = 0.9

HEADINGS: Final = {
    "memory": f"{'memory':<36} {'GB/s':>6}",
    "kernels": f"{'kernel':<36} {'images/s':>9} {'GB/s':>6} {'of limit':>9} {'NumPy':>8}",
    "decoding": f"{'images':<36} {'images/s':>9} {'failed':>6}",
    "disk": f"{'disk':<36} {'GB/s':>6}",
}


def low_paths(record: dict[str, Any]) -> list[str]:
    """Return the kernels that stay below `LOW_SHARE` of their limit.

    New memory is left to the system, which zeroes it.
    """
    return [row["path"] for row in record["kernels"] if _is_low(row)]


def _is_low(row: dict[str, Any]) -> bool:
    return bool(row["share"] < LOW_SHARE and not row["path"].endswith("new memory"))


def line(part: str, row: dict[str, Any]) -> str:
    """Return one figure of a part as a line below its heading, or as several.

    Examples
    --------
    >>> line("memory", {"loop": "copy", "gigabytes_per_second": 47.3})
    'copy                                   47.3'
    """
    if part == "memory":
        return f"{row['loop']:<36} {row['gigabytes_per_second']:>6.1f}"
    if part == "kernels":
        mark = " <" if _is_low(row) else ""
        return (
            f"{row['path']:<36} {row['images_per_second']:>9,} "
            f"{row['gigabytes_per_second']:>6.1f} {row['share']:>9.0%} "
            f"{row['numpy_images_per_second']:>8,}{mark}"
        )
    if part == "decoding":
        count = f"{row['images']:,} decoded to 224x224"
        return f"{count:<36} {row['images_per_second']:>9,} {row['failed']:>6,}"
    size = f"{row['bytes'] / 2**20:,.0f} MiB"
    return "\n".join(
        f"{f'{size} {done}':<36} {row[f'{verb}_gigabytes_per_second']:>6.2f}"
        for verb, done in (("write", "written, each chunk synced"), ("read", "read"))
    )
