"""The screen of a terminal: wide, narrow, without color, without Unicode."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from fastvgg.cli import app
from fastvgg.stream.plan import RUN_BYTES
from tests.helpers.datasets_on_disk import pixels, plan_of, save_images, save_npy
from tests.helpers.samples import sampled
from tests.helpers.terminals import run_on_terminal

# The command line without Numba, which takes a second to compile a kernel.
WITHOUT_NUMBA_SCRIPT = """
import sys, warnings
sys.modules["numba"] = None
warnings.filterwarnings("ignore", "Numba is not usable")
from fastvgg.cli import main
main()
"""
# The progress bar at the end of a run that is too long for a test.
LONG_RUN_SCRIPT = """
import sys
from fastvgg.cli.output import _terminal_bar
from fastvgg.stream.report import Progress
with _terminal_bar("preprocess", 1_281_167) as on_progress:
    on_progress(Progress(1_281_166, 1_281_167, 1_281_166, 192_863_360_000, 771_453_440_000, 4321.0))
print("after", file=sys.stderr)
"""
TERMINALS = {
    "common": {},
    "no colour": {"NO_COLOR": "1"},
    "dumb": {"TERM": "dumb"},
    "ASCII": {"LC_ALL": "C", "PYTHONIOENCODING": "ascii"},
}


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A directory with short names in it, to which paths are relative."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def fastvgg(*arguments, columns=80, stdout=None, **environment):
    command = [sys.executable, "-c", WITHOUT_NUMBA_SCRIPT, *arguments]
    return run_on_terminal(command, columns, stdout=stdout, **environment)


def check_screen(shown, columns):
    """Check that no line is cut or wrapped inside a word, and that the cursor is at column 0."""
    assert shown.cursor_column == 0
    # The terminal may have wrapped a line as long as the screen is wide.
    assert max(len(line) for line in shown.lines) <= columns
    text = shown.written.decode()
    assert "Traceback" not in text
    assert "\ufffd" not in "".join(shown.lines)
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).replace("\r", "\n").split("\n")
    assert all(len(line) <= columns for line in lines if "/" not in line.split(" ")[0]), lines


@sampled("kind, columns", TERMINALS, [80, 60], one_in=2)
def test_progress_bar_and_report_take_one_line_each_on_any_terminal(place, kind, columns):
    save_npy(place / "x.npy", pixels(11))
    memory = ["--memory", str(RUN_BYTES + 2 * (189 + 2 * 756)), "--threads", "1"]
    command = ["preprocess", "x.npy", "y.npy", "--mode", "caffe", *memory]
    shown = fastvgg(*command, columns=columns, stdout=subprocess.PIPE, **TERMINALS[kind])
    assert shown.returncode == 0, shown.lines
    assert b"11 images in" in shown.stdout
    assert b"\x1b" not in shown.stdout
    if kind == "dumb":  # which cannot redraw a line
        assert shown.lines == []
        return
    check_screen(shown, columns)
    (line,) = shown.lines
    bar = "-" if kind == "ASCII" else "━"
    speed = r" [\d,]+ images/s, \d+ MB/s" if columns == 80 else ""
    found = re.fullmatch(rf"preprocess ({bar}+) 11/11 0:00:00 left{speed}", line)
    assert found, line
    assert len(found[1]) >= 5
    assert shown.written.endswith(b"\r\n") or shown.written.endswith(b"\x1b[?25h")
    is_colored = re.search(rb"\x1b\[[0-9;]*3[0-9]", shown.written) is not None
    assert is_colored == (kind != "no colour")
    if kind == "ASCII":
        shown.written.decode("ascii")


@pytest.mark.parametrize("columns", [80, 60])
@pytest.mark.parametrize("kind", ["common", "ASCII"])
def test_progress_bar_of_a_long_run_fits_on_one_line(kind, columns):
    command = [sys.executable, "-c", LONG_RUN_SCRIPT]
    shown = run_on_terminal(command, columns, **TERMINALS[kind])
    assert shown.returncode == 0, shown.lines
    check_screen(shown, columns)
    line, after = shown.lines
    assert after == "after"
    assert "1,281,166/1,281,167 0:00:00 left" in line
    assert ("296 images/s, 223 MB/s" in line) == (columns == 80), line
    assert "…" not in line


@pytest.mark.parametrize("columns", [80, 60])
def test_plan_fits_the_screen_with_aligned_figures(place, columns):
    save_npy(place / "x.npy", pixels(11))
    shown = fastvgg("preprocess", "x.npy", "y.npy", "--mode", "tf", "--dry-run", columns=columns)
    assert shown.returncode == 0
    figures = [line for line in shown.lines if re.match(r"  [a-z]+ ", line)]
    assert [line.split()[0] for line in figures] == [
        *("images", "from", "to", "chunks", "reads", "writes", "memory", "threads")
    ]
    assert {re.match(r"  [a-z]+ +", line).end() for line in figures} == {11}
    assert "  images   11" in figures


@pytest.mark.parametrize("columns", [80, 60])
def test_info_prints_one_field_per_line_that_fits(place, columns):
    save_npy(place / "x.npy", pixels(11))
    plan_of("x.npy", "y.npy", mode="caffe").run()
    shown = fastvgg("info", "y.npy", columns=columns)
    assert shown.returncode == 0
    for line in shown.written.decode().splitlines():
        assert re.match(r"[a-z_]+ +| {17}", line)
        assert len(line) <= columns or str(place) in line
    packages = [line.strip() for line in shown.lines[shown.lines.index(first_package(shown)) :]]
    assert packages[0].startswith("packages         python ")
    known = json.loads(CliRunner().invoke(app, ["info", "y.npy", "--json"]).stdout)["packages"]
    assert len(packages) == len(known)
    shown = fastvgg("info", "x.npy", columns=columns)
    assert f"bytes            {128 + 11 * 189} (2.2 KiB)" in shown.lines


def first_package(shown):
    return next(line for line in shown.lines if line.startswith("packages"))


def test_long_path_is_not_wrapped(place):
    path = place / "-".join(["photos"] * 20)
    shown = fastvgg("info", str(path), columns=60)
    assert shown.returncode == 3
    assert os.fsencode(path) in shown.written


@sampled("kind, columns", TERMINALS, [80, 60], one_in=2)
def test_failures_notes_and_errors_are_wrapped_between_words(place, kind, columns):
    save_images(place / "photos", pixels(5))
    (place / "photos" / "bad.jpg").write_text("x" * 1000)
    (place / "photos" / "labels.csv").touch()
    arguments = ["preprocess", "photos", "y.npy", "--mode", "caffe", "--size", "9", "9"]
    shown = fastvgg(*arguments, columns=columns, **TERMINALS[kind])
    assert shown.returncode == 1, shown.lines
    message = " ".join(line.strip() for line in shown.lines)
    assert "note: skipped files without an image suffix: 1" in message
    assert "failed: row 5, bad.jpg: not an image in a supported format" in message
    arguments[arguments.index("caffe")] = "vgg"
    shown = fastvgg(*arguments, columns=columns, **TERMINALS[kind])
    check_screen(shown, columns)
    message = " ".join(line.strip() for line in shown.lines)
    assert message == (
        "fastvgg: unknown mode 'vgg' "
        "did you mean --mode caffe? give one of caffe, tf, torch, identity"
    )
    assert len(shown.lines) == (2 if columns == 80 else 3)


@pytest.mark.parametrize("columns", [80, 60])
@pytest.mark.parametrize(
    "command", ["", "preprocess", "pack", "restore", "verify", "info", "bench", "demo"]
)
def test_help_fits_the_screen(command, columns):
    shown = fastvgg(*([command] if command else []), "--help", columns=columns)
    check_screen(shown, columns)
    assert "..." not in " ".join(shown.lines).replace("[ARGS]...", "")


def test_welcome_fits_the_smallest_screen():
    shown = fastvgg()
    assert shown.returncode == 0
    check_screen(shown, 80)
    assert len(shown.lines) <= 24 - 1  # and the prompt


def test_models_fit_in_two_columns():
    shown = fastvgg("models", columns=60)
    check_screen(shown, 60)
    assert all(re.fullmatch(r"\w+ +[a-z]+", line) for line in shown.lines)
