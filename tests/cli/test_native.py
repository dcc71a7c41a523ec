"""Libraries in C do not print to the terminal of a run; Python still does."""

from __future__ import annotations

import os
import sys

from tests.helpers.datasets_on_disk import python
from tests.helpers.tiff import COMPLAINT, save_damaged_tiffs

COMMAND = "from fastvgg.cli import main\nmain()"


def test_complaints_of_libtiff_are_not_printed_and_failures_are(tmp_path):
    folder = save_damaged_tiffs(tmp_path / "in")
    shown = python(COMMAND, "pack", folder, tmp_path / "y.npy", "--traceback")
    assert COMPLAINT in shown.stderr  # or else this test proves nothing
    done = python(COMMAND, "pack", folder, tmp_path / "x.npy", errors="replace")
    assert done.returncode == 1
    assert "Decode:" not in done.stderr
    assert ".tif: decoder error" in done.stderr
    assert "--retry-failed" in done.stderr


def test_python_prints_to_the_same_place_while_native_messages_are_hidden():
    source = """
import os, sys
from fastvgg.cli.native import hidden_native_messages
with hidden_native_messages():
    os.write(2, b"native")
    print("python", os.isatty(2), sys.stderr.fileno() > 2, file=sys.stderr)
os.write(2, b"after")
"""
    assert python(source).stderr == "python False True\nafter"


def test_captured_stderr_is_left_alone(capsys):
    from fastvgg.cli.native import hidden_native_messages

    before = sys.stderr
    with hidden_native_messages():
        assert sys.stderr is before
        sys.stderr.write("shown")
    assert capsys.readouterr().err == "shown"
    os.fstat(2)
