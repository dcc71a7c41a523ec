"""Benchmark figures as lines of text of 80 columns, and as a roofline plot."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Final

from fastvgg.errors import TargetError, UsageError, creation_remedy, option, option_name
from fastvgg.formatting import format_count

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

MIN_SHARE: Final = 0.9

HEADINGS: Final = {
    "memory": f"{'memory':<36} {'GB/s':>6}",
    "kernels": f"{'kernel':<36} {'images/s':>9} {'GB/s':>6} {'of limit':>9} {'NumPy':>8}",
    "decoding": f"{'images':<36} {'images/s':>9} {'failed':>6}",
    "disk": f"{'disk':<36} {'GB/s':>6}",
}

BAR_HEIGHT: Final = 0.62
STYLE: Final[Any] = {"font.size": 9, "svg.fonttype": "none", "svg.hashsalt": "fastvgg"}


def low_paths(record: dict[str, Any]) -> list[str]:
    """Return the kernel paths below `MIN_SHARE` of their limit.

    Paths that write to new memory are omitted: the system, which zeroes it, limits them.
    """
    return [row["path"] for row in record["kernels"] if _is_low(row)]


def _is_low(row: dict[str, Any]) -> bool:
    return bool(row["share"] < MIN_SHARE and not row["path"].endswith("new memory"))


def line(section: str, row: dict[str, Any]) -> str:
    """Return one figure as a line below the heading of its section, or as several lines.

    >>> line("memory", {"loop": "copy", "gigabytes_per_second": 47.3})
    'copy                                   47.3'
    """
    if section == "memory":
        return f"{row['loop']:<36} {row['gigabytes_per_second']:>6.1f}"
    if section == "kernels":
        mark = " <" if _is_low(row) else ""
        return (
            f"{row['path']:<36} {row['images_per_second']:>9,} "
            f"{row['gigabytes_per_second']:>6.1f} {row['share']:>9.0%} "
            f"{row['numpy_images_per_second']:>8,}{mark}"
        )
    if section == "decoding":
        count = f"{row['images']:,} decoded to 224x224"
        return f"{count:<36} {row['images_per_second']:>9,} {row['failed']:>6,}"
    size = f"{row['bytes'] / 2**20:,.0f} MiB"
    return "\n".join(
        f"{f'{size} {label}':<36} {row[f'{operation}_gigabytes_per_second']:>6.2f}"
        for operation, label in (("write", "written, each chunk synced"), ("read", "read"))
    )


def check_plot_path(path: Path) -> None:
    """Check that matplotlib can draw to `path`, before anything is measured."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise UsageError(
            f"{option('plot', str(path))} needs a package that is not installed: {error.name}",
            "in a clone of fastvgg: pip install '.[plot]'",
        ) from None
    if path.suffix not in (".png", ".svg"):
        raise UsageError(
            f"{option('plot', str(path))}: the suffix is not one of .png, .svg",
            "give a name that ends in .png or .svg",
        )
    if os.path.lexists(path):
        raise UsageError(f"{path} exists, and is not replaced", "give another name")
    if not path.parent.is_dir():
        raise UsageError(
            f"{option('plot', str(path))}: {path.parent} is not a directory",
            creation_remedy(path.parent),
        )


def draw_roofline(record: dict[str, Any], path: Path) -> None:
    """Draw the kernels of a record of `measure` as bars against their limit.

    The suffix of `path` selects the format. Kernels that read or write NCHW are omitted. The same
    record gives the same bytes.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    rows = [row for row in record["kernels"] if "NCHW" not in row["path"]]
    with mpl.rc_context(STYLE):
        figure = Figure((9.0, 1.6 + 0.27 * len(rows)), layout="constrained")  # inches
        _draw_bars(figure.subplots(), rows)
        caption = (
            f"{record['machine']['processor']}, {record['instruction_set']}, "
            f"{format_count(record['threads'], 'thread')}, images of 224x224, "
            f"{record['machine']['date']}"
        )
        figure.supxlabel(caption, size="small", color="#444444")
        metadata = {"Date": None} if path.suffix == ".svg" else {}
        try:
            figure.savefig(path, dpi=150, metadata=metadata)
        except OSError as error:
            raise TargetError(
                f"{path} cannot be written: {error.strerror}",
                f"give {option_name('plot')} another path",
            ) from error


def _draw_bars(axes: Any, rows: Sequence[dict[str, Any]]) -> None:  # noqa: ANN401  # untyped
    import numpy as np

    positions = np.arange(len(rows))
    speeds = [row["gigabytes_per_second"] for row in rows]
    limits = [row["gigabytes_per_second"] / row["share"] for row in rows]
    numpy_speeds = [
        row["gigabytes_per_second"] * row["numpy_images_per_second"] / row["images_per_second"]
        for row in rows
    ]
    # Okabe and Ito's palette, distinguishable with color blindness: https://jfly.uni-koeln.de/color/
    axes.barh(positions, speeds, BAR_HEIGHT, color="#0072B2", label="fastvgg")
    axes.barh(positions, numpy_speeds, BAR_HEIGHT, color="#E69F00", label="NumPy, same threads")
    ends = positions - BAR_HEIGHT / 2, positions + BAR_HEIGHT / 2
    axes.vlines(limits, *ends, color="#000000", linewidth=2.5, label="memory bandwidth")
    for position, row, limit in zip(positions, rows, limits, strict=True):
        end = max(limit, row["gigabytes_per_second"])
        text = f"  {row['images_per_second']:,} images/s"
        axes.text(end, position, text, va="center", size="small")
    axes.set_yticks(positions, [row["path"] for row in rows])
    axes.invert_yaxis()
    axes.margins(y=0.01)
    axes.set_xlim(0, 1.22 * max(*limits, *speeds))
    axes.set_xlabel("GB/s, read and written")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower center", bbox_to_anchor=(0.4, 1), ncols=3, frameon=False)
