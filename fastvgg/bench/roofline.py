"""A picture of what was measured: each kernel as a bar that ends at, or before, what limits it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from fastvgg.errors import TargetError, UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

__all__ = ["check", "draw", "limit"]

# Of Okabe and Ito, told apart by colour-blind eyes: https://jfly.uni-koeln.de/color/
BLUE: Final = "#0072B2"
ORANGE: Final = "#E69F00"
BLACK: Final = "#000000"
WIDTH_INCHES: Final = 9.0
ROW_INCHES: Final = 0.27
MARGIN_INCHES: Final = 1.6
BAR: Final = 0.62
STYLE: Final[Any] = {"font.size": 9, "svg.fonttype": "none", "svg.hashsalt": "fastvgg"}


def check(path: Path) -> None:
    """Refuse what cannot be drawn, before anything is measured.

    Raises
    ------
    UsageError
        If matplotlib is not installed, or the name ends in nothing that it writes.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UsageError(
            f"--plot needs a package that is not installed: {error.name}",
            "install it: pip install 'fastvgg[plot]'",
        ) from None
    endings = sorted(Figure().canvas.get_supported_filetypes())
    if path.suffix.removeprefix(".") not in endings:
        raise UsageError(
            f"--plot {path} ends in none of {', '.join(endings)}", "give it the ending .png or .svg"
        )
    if not path.parent.is_dir():
        raise UsageError(
            f"--plot {path}: {path.parent} is no directory", f"make it: mkdir {path.parent}"
        )


def draw(record: dict[str, Any], path: Path) -> None:
    """Draw what `measure` returned, as a picture of the kind that the path ends in.

    Kernels that read or write NCHW are omitted. The same record gives the same bytes.

    Raises
    ------
    TargetError
        If it cannot be written.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    rows = [row for row in record["kernels"] if "NCHW" not in row["path"]]
    with mpl.rc_context(STYLE):
        figure = Figure(
            (WIDTH_INCHES, MARGIN_INCHES + ROW_INCHES * len(rows)), layout="constrained"
        )
        _draw_bars(figure.subplots(), rows)
        figure.supxlabel(_place(record), size="small", color="#444444")
        metadata = {"Date": None} if path.suffix == ".svg" else {}
        try:
            figure.savefig(path, dpi=150, metadata=metadata)
        except OSError as error:
            raise TargetError(
                f"{path} cannot be written: {error.strerror}", "give --plot another path"
            ) from error


def _draw_bars(axes: Any, rows: Sequence[dict[str, Any]]) -> None:  # noqa: ANN401  # untyped
    places = range(len(rows))
    speeds = [row["gigabytes_per_second"] for row in rows]
    limits = [limit(row) for row in rows]
    numpy = [
        row["gigabytes_per_second"] * row["numpy_images_per_second"] / row["images_per_second"]
        for row in rows
    ]
    axes.barh(places, speeds, BAR, color=BLUE, label="fastvgg")
    axes.barh(places, numpy, BAR, color=ORANGE, label="NumPy, on as many threads")
    ends = ([place - BAR / 2 for place in places], [place + BAR / 2 for place in places])
    axes.vlines(limits, *ends, color=BLACK, linewidth=2.5, label="what the memory allows")
    for place, row, most in zip(places, rows, limits, strict=True):
        end = max(most, row["gigabytes_per_second"])
        text = f"  {row['images_per_second']:,} images/s"
        axes.text(end, place, text, va="center", size="small")
    axes.set_yticks(places, [row["path"] for row in rows])
    axes.invert_yaxis()
    axes.margins(y=0.01)
    axes.set_xlim(0, 1.22 * max(*limits, *speeds))
    axes.set_xlabel("GB/s, read and written")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower center", bbox_to_anchor=(0.4, 1), ncols=3, frameon=False)


def limit(row: dict[str, Any]) -> float:
    """Return the gigabytes a second that the memory allows a kernel.

    Examples
    --------
    >>> limit({"gigabytes_per_second": 40.0, "share": 0.8})
    50.0
    """
    return float(row["gigabytes_per_second"] / row["share"])


def _place(record: dict[str, Any]) -> str:
    machine = record["machine"]
    return (
        f"{machine['processor']}, {record['instruction_set']}, {record['threads']} threads, "
        f"images of 224x224, {machine['date']}"
    )
