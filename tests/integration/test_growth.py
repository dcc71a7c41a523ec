"""The growth benchmark: its tables and figures show every measurement."""

import copy
import importlib
import sys
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from fastvgg.bench.timing import machine
from tests.helpers.checkout import CHECKOUT

BENCHMARKS = CHECKOUT / "benchmarks"
pytestmark = pytest.mark.compiled  # the benchmarks measure what is compiled

TEXT = "{http://www.w3.org/2000/svg}text"


@pytest.fixture(scope="module")
def import_benchmark():
    """Return a function that imports a benchmark module."""
    with pytest.MonkeyPatch.context() as patched:
        patched.syspath_prepend(BENCHMARKS)
        before = set(sys.modules)
        yield importlib.import_module
        for name in set(sys.modules) - before:
            if Path(getattr(sys.modules[name], "__file__", None) or "").parent == BENCHMARKS:
                del sys.modules[name]


@pytest.fixture(scope="module")
def record(import_benchmark, tmp_path_factory):
    """Return a record of one run in a child process, whose row is used for all points."""
    growth = import_benchmark("growth")
    files = import_benchmark("streams").Files(tmp_path_factory.mktemp("growth"), 2)
    run = growth.Run(files, 300, 32, threads=2, memory="4MiB")
    run.call()
    line = run.line([0.02, 0.03], [0.01, 0.02])
    lines = [
        {**line, "images": count, "seconds": count / 1e4, "middle_half": [count / 1e4] * 2}
        for count in (300, 600, 1200)
    ]
    quick_sizes = growth.quick_sweep_sizes(2)._replace(threads=(1,), working_set_bytes=10**6)
    return {
        "machine": machine(),
        "threads": 2,
        "rounds": 2,
        "sweeps": {"images": lines, "side": [line], "threads": [line], "chunk": [line]},
        "line": growth.add_deviations_from_linear_fit(lines),
        "in_memory": list(growth.measure_in_memory(quick_sizes, 2)),
    }


@pytest.fixture
def above(record):
    """Return a record whose peak memory exceeds the plan."""
    changed = copy.deepcopy(record)
    row = changed["sweeps"]["side"][0]
    row["peak_mib"] = row["planned_mib"] + 1
    return changed


def figure_texts(import_benchmark, record, path):
    import_benchmark("plots").growth(record, path)
    return {text.text for text in ET.parse(path).iter(TEXT)}  # noqa: S314  # our own


def test_child_process_uses_no_more_memory_than_planned(record):
    row = record["sweeps"]["side"][0]
    assert 0 < row["peak_mib"] <= row["planned_mib"] <= row["memory_limit_mib"] == 4
    assert row["chunk_images"] < row["images"] == 300
    assert row["written_bytes"] == 300 * 32 * 32 * 3 * 4
    assert row["idle_mib"] > row["peak_mib"]


def test_linear_growth_has_no_deviation_from_the_fit(record):
    assert record["line"] == {"start_ms": 0.0, "microseconds_an_image": 100.0}
    assert [row["deviation"] for row in record["sweeps"]["images"]] == [0, 0, 0]


def test_tables_have_a_row_per_point(record, import_benchmark):
    text = "\n".join(import_benchmark("tables").growth(record))
    assert "| 1,200 | 0.120 | 100.0 | " in text
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert len(rows) == 4 + 3 + 1 + 1 + 1  # headers first
    assert all(line.count("|") == 9 for line in rows[:4])


def test_figure_labels_are_text(record, import_benchmark, tmp_path):
    texts = figure_texts(import_benchmark, record, tmp_path / "growth.svg")
    assert {
        "images of 32x32",
        "height and width of an image, pixels",
        "threads",
        "written at once, MiB",
        "seconds",
        "seconds for a GB written",
        "peak memory above idle, MiB",
        "planned",
        "used at most",
        "to the disk: the limit",
        "in memory",
        "1,200",
    } <= texts


def test_figure_of_a_record_is_reproducible(record, import_benchmark, tmp_path):
    first, second = tmp_path / "first.svg", tmp_path / "second.svg"
    figure_texts(import_benchmark, record, first)
    figure_texts(import_benchmark, record, second)
    assert first.read_bytes() == second.read_bytes()
    assert b"<dc:date>" not in first.read_bytes()


def test_memory_above_the_plan_is_reported(record, above, import_benchmark, tmp_path):
    tables, path = import_benchmark("tables"), tmp_path / "growth.svg"
    assert "above the plan" not in figure_texts(import_benchmark, record, path)
    assert "above the plan" not in "\n".join(tables.growth(record))
    assert "above the plan" in figure_texts(import_benchmark, above, path)
    assert "above the plan" in "\n".join(tables.growth(above))
