"""Libraries in C do not print to the terminal of a run; Python still does."""

from __future__ import annotations

import io
import os
import sys

import numpy as np
import pytest
from PIL import Image

from tests.helpers.datasets_on_disk import python

COMMAND = "from fastvgg.cli import main\nmain()"


@pytest.fixture
def damaged_tiffs(tmp_path):
    """Save compressed TIFFs of which libtiff complains on descriptor 2."""
    batch = np.random.default_rng(1).integers(0, 40, (9, 64, 64, 3), np.uint8)
    (tmp_path / "in").mkdir()
    Image.fromarray(batch[8]).save(tmp_path / "in/good.png")
    for number, compression in enumerate(["tiff_lzw"] * 8):
        written = io.BytesIO()
        Image.fromarray(batch[number]).save(written, "tiff", compression=compression)
        data = bytearray(written.getvalue())
        data[len(data) // 2 - 15 : len(data) // 2 + 15] = bytes(30)
        (tmp_path / f"in/{number}.tif").write_bytes(data)
    return tmp_path / "in"


def test_complaints_of_libtiff_are_not_printed_and_failures_are(tmp_path, damaged_tiffs):
    shown = python(COMMAND, "pack", damaged_tiffs, tmp_path / "y.npy", "--traceback")
    assert "LZWDecode:" in shown.stderr  # or else this test proves nothing
    done = python(COMMAND, "pack", damaged_tiffs, tmp_path / "x.npy", errors="replace")
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
