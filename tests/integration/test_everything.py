"""The command that runs every benchmark forgets none, and says what was not done."""

import runpy

import pytest

from tests.helpers.checkout import CHECKOUT

BENCHMARKS = CHECKOUT / "benchmarks"


@pytest.fixture
def everything():
    return runpy.run_path(str(BENCHMARKS / "everything.py"))


@pytest.fixture
def said(everything, tmp_path):
    """Return what is said of a program that was written for it."""

    def run(program):
        path = tmp_path / "program.py"
        path.write_text(program)
        return everything["shortcomings"]("this", path)

    return run


def test_all_that_can_be_run_is_run(everything):
    expected = {
        path.name for path in BENCHMARKS.glob("*.py") if "def main()" in path.read_text()
    } - {"everything.py", "image_peers.py"}  # images.py starts the latter
    listed = {**everything["BENCHMARKS"], **everything["FROM_RESULTS"]}
    assert expected
    assert expected <= {script for script, *_ in listed.values()}


def test_a_program_that_does_all_is_not_mentioned(said, capfd):
    assert said("print('1.0 of the limit')") == []
    assert "1.0 of the limit" in capfd.readouterr().out


def test_what_is_not_installed_is_named(said):
    (line,) = said("import no_such_peer")
    assert line.endswith("exit code 1: ModuleNotFoundError: No module named 'no_such_peer'")


def test_a_part_that_a_benchmark_leaves_out_is_named(said):
    assert said("print('FFCV: not measured: no compiler')\nprint('the rest')") == [
        "this: FFCV: not measured: no compiler"
    ]


def test_a_program_that_is_not_there_is_named(everything):
    (line,) = everything["shortcomings"]("this", "no_such_file.py")
    assert "exit code 2" in line
    assert "No such file" in line
