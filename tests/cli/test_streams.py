"""Standard streams that are closed, full or hung up, in processes of their own."""

from __future__ import annotations

import json
import os

import pytest

import fastvgg
from fastvgg.storage.descriptors import above_standard_streams
from tests.helpers.commands import run_shell
from tests.helpers.datasets_on_disk import network_inputs, npy_bytes, pixels, save_npy
from tests.helpers.tiff import COMPLAINT, save_damaged_tiffs


def check_is_complete(target, batch):
    assert target.read_bytes() == npy_bytes(network_inputs(batch, "tf"))
    fastvgg.verify(target)


REDIRECTIONS = {  # redirection -> exit code
    "<&-": 0,
    "--json >&-": 0,
    "2>&-": 0,
    "<&- >&- 2>&-": 0,
    "2>/dev/full": 0,
    "| head -0": 0,
    "--json | head -0": 0,
    ">/dev/full 2>&-": 5,
}


@pytest.mark.parametrize("redirected", REDIRECTIONS)
def test_work_is_complete_whatever_the_streams_are_connected_to(tmp_path, redirected):
    source, target = save_npy(tmp_path / "x.npy", pixels(11)), tmp_path / "y.npy"
    done = run_shell(redirected, "preprocess", source, target, "--mode", "tf")
    assert done.returncode == REDIRECTIONS[redirected], done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    check_is_complete(target, pixels(11))


def test_unprinted_report_exits_with_5_and_a_rerun_prints_it(tmp_path):
    source, target = save_npy(tmp_path / "x.npy", pixels(11)), tmp_path / "y.npy"
    arguments = ["preprocess", source, target, "--mode", "tf", "--json"]
    done = run_shell(">/dev/full", *arguments)
    assert done.returncode == 5
    assert "standard output" in done.stderr
    assert "ENOSPC" in done.stderr
    assert "the work is done; rerun the same command" in done.stderr
    check_is_complete(target, pixels(11))
    rerun = run_shell("", *arguments)
    assert rerun.returncode == 0
    assert json.loads(rerun.stdout)["counts"]["images"] == 11


PLAN_AND_RUN = """
import sys
sys.modules["numba"] = None
import fastvgg
fastvgg.plan(sys.argv[1], sys.argv[2], mode="tf", size=(40, 40)).run()
"""
AS_A_COMMAND = """
import sys
sys.modules["numba"] = None
sys.argv[1:] = ["preprocess", *sys.argv[1:], "--mode", "tf", "--size", "40", "40"]
from fastvgg.cli import main
main()
"""


@pytest.mark.parametrize("source", [PLAN_AND_RUN, AS_A_COMMAND], ids=["Python", "command"])
def test_libraries_print_nothing_into_our_files(tmp_path, source):
    folder = save_damaged_tiffs(tmp_path / "photos")
    reference = run_shell("", folder, tmp_path / "reference.npy", source=source)
    assert source != PLAN_AND_RUN or COMPLAINT in reference.stderr  # libtiff has something to print
    # Opened are a lock, the journal and the data, which without care would get descriptor 2.
    done = run_shell("<&- >&- 2>&-", folder, tmp_path / "y.npy", source=source)
    assert done.returncode == reference.returncode
    assert (tmp_path / "y.npy").read_bytes() == (tmp_path / "reference.npy").read_bytes()
    fastvgg.verify(tmp_path / "y.npy", full=True)


LOW_DESCRIPTORS = """
import os, sys
from pathlib import Path
from fastvgg.datasets.files import open_regular, read_regular
from fastvgg.storage.local import Storage
report = os.dup2(1, 9)
for descriptor in range(3):
    os.close(descriptor)
storage, here = Storage(), Path(sys.argv[1])
files = [
    storage.create(here / "a").descriptor, storage.hold(here).descriptor,
    storage.create(here / "b").descriptor, open_regular(here / "a").fileno(),
    storage.direct(storage.open(here / "b")).direct or 3,
]
os.write(9, repr(min(files)).encode())
"""


def test_no_file_of_ours_has_the_descriptor_of_a_standard_stream(tmp_path):
    done = run_shell("", tmp_path, source=LOW_DESCRIPTORS)
    assert int(done.stdout) >= 3, done.stderr


def test_descriptor_that_is_high_enough_is_kept():
    reading, writing = os.pipe()
    assert above_standard_streams(reading) == reading
    os.close(reading)
    os.close(writing)


def test_file_size_limit_is_refused_with_its_own_remedy(tmp_path):
    source, target = save_npy(tmp_path / "x.npy", pixels(11)), tmp_path / "y.npy"
    arguments = ["preprocess", source, target, "--mode", "tf"]
    done = run_shell("", *arguments, before="ulimit -f 5;")
    assert done.returncode == 3, done.stderr
    assert "ulimit -f" in done.stderr
    assert "free disk space" not in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.npy"]
