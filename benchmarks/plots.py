"""Draw the figures of README.md and benchmarks/README.md next to their results.

python benchmarks/plots.py
"""

from __future__ import annotations

import json

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, NullLocator, StrMethodFormatter
from tables import RESULTS

from fastvgg.bench.report import draw_roofline

# Okabe and Ito's palette, which is safe for color blindness.
OURS, IN_MEMORY, ABOVE, LIMIT = "#0072B2", "#009E73", "#D55E00", "#666666"
# The output is deterministic; text is searchable and accessible to screen readers.
STYLE = {
    "svg.hashsalt": "fastvgg",
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
}


def growth(record, path):
    """Draw a row for images, their size, threads and chunks: time on the left, memory right."""
    side = record["sweeps"]["images"][0]["side"]
    rows_of_axes = (
        ("images", "images", f"images of {side}x{side}", 10),
        ("side", "side", "height and width of an image, pixels", 2),
        ("threads", "threads", "threads", 2),
        ("chunk", "chunk_mib", "written at once, MiB", 2),
    )
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9, 11), layout="constrained")
        for (time, memory), (sweep, key, label, base) in zip(
            figure.subplots(4, 2), rows_of_axes, strict=True
        ):
            rows = record["sweeps"][sweep]
            positions = [row[key] for row in rows]
            if sweep == "images":
                draw_seconds(time, positions, rows)
            else:
                in_memory = record["in_memory"] if sweep == "threads" else []
                draw_seconds_per_gigabyte(time, positions, rows, in_memory)
            draw_memory(memory, positions, rows)
            for ax in (time, memory):
                ax.set_xlabel(label)
                scale(ax, positions, base)
                ax.legend(fontsize=8)
        figure.savefig(path, format="svg", metadata={"Date": None})


def scale(ax, positions, base):
    """Give an axis a logarithmic scale with an integer tick label at each position."""
    ax.set_xscale("log", base=base)
    ax.set_xticks(positions)
    ax.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_minor_formatter(NullFormatter())


def draw_seconds(ax, positions, rows):
    """Draw the seconds of runs and their linear fit."""
    draw_with_limit(ax, positions, rows, [1] * len(rows), "a run", OURS)
    line = [row["seconds"] / (1 + row["deviation"]) for row in rows]
    ax.plot(positions, line, color=OURS, linewidth=0.8, linestyle="--", label="a straight line")
    ax.set_yscale("log")
    ax.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    ax.set_ylabel("seconds")


def draw_seconds_per_gigabyte(ax, positions, rows, in_memory):
    """Draw the seconds per gigabyte of the result, to disk and in memory."""
    for measured_rows, label, color in (
        (rows, "to the disk", OURS),
        (in_memory, "in memory", IN_MEMORY),
    ):
        if measured_rows:
            units = [row["written_bytes"] / 1e9 for row in measured_rows]
            draw_with_limit(ax, positions, measured_rows, units, label, color)
    if in_memory:
        ax.set_yscale("log")
        ax.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    else:
        ax.set_ylim(bottom=0)
    ax.set_ylabel("seconds for a GB written")


def draw_with_limit(ax, positions, rows, units, label, color):
    """Draw the median and interquartile range of seconds per unit, and the limit's median."""
    medians = [row["seconds"] / unit for row, unit in zip(rows, units, strict=True)]
    quartiles = [
        [side / unit for side in row["middle_half"]] for row, unit in zip(rows, units, strict=True)
    ]
    errors = [
        [median - low for median, (low, _) in zip(medians, quartiles, strict=True)],
        [high - median for median, (_, high) in zip(medians, quartiles, strict=True)],
    ]
    limits = [row["limit_seconds"] / unit for row, unit in zip(rows, units, strict=True)]
    ax.errorbar(positions, medians, errors, color=color, marker="o", markersize=4, label=label)
    ax.plot(positions, limits, color=LIMIT, linestyle=":", label=f"{label}: the limit")


def draw_memory(ax, positions, rows):
    """Draw peak memory, the planned memory, and the memory limit of each run."""
    used = [row["peak_mib"] for row in rows]
    planned = [row["planned_mib"] for row in rows]
    limits = [row["memory_limit_mib"] for row in rows]
    ax.plot(positions, limits, color=LIMIT, linestyle=":", label="the limit it was given")
    ax.plot(positions, planned, color=OURS, linestyle="--", label="planned")
    ax.plot(positions, used, color=OURS, marker="o", markersize=4, label="used at most")
    above = [
        (at, peak) for at, peak, plan in zip(positions, used, planned, strict=True) if peak > plan
    ]
    if above:
        ax.plot(*zip(*above, strict=True), "X", color=ABOVE, markersize=8, label="above the plan")
    ax.set_yscale("log", base=2)
    ax.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    ax.set_ylabel("peak memory above idle, MiB")


PLOTS = {path.stem: draw_roofline for path in RESULTS.glob("bench-*.json")} | {"growth": growth}


def main():
    for name, draw in PLOTS.items():
        record = RESULTS / f"{name}.json"
        if record.exists():
            draw(json.loads(record.read_text(encoding="utf-8")), record.with_suffix(".svg"))


if __name__ == "__main__":
    main()
