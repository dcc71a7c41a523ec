"""The command that runs every benchmark omits none, and reports what was not measured."""

import runpy

import pytest

from tests.helpers.checkout import CHECKOUT

BENCHMARKS = CHECKOUT / "benchmarks"


@pytest.fixture
def everything():
    return runpy.run_path(str(BENCHMARKS / "everything.py"))


@pytest.fixture
def failures_of(everything, tmp_path):
    """Return a function that runs a program as a benchmark and returns its failures."""

    def run(program):
        path = tmp_path / "program.py"
        path.write_text(program)
        return everything["run_and_list_failures"]("this", path)

    return run


def test_every_benchmark_script_is_run(everything):
    expected = {
        path.name for path in BENCHMARKS.glob("*.py") if "def main()" in path.read_text()
    } - {"everything.py", "image_peers.py"}  # images.py starts the latter
    listed = {**everything["BENCHMARKS"], **everything["FROM_RESULTS"]}
    assert expected
    assert expected <= {script for script, *_ in listed.values()}


def test_complete_benchmark_is_not_reported(failures_of, capfd):
    assert failures_of("print('1.0 of the limit')") == []
    assert "1.0 of the limit" in capfd.readouterr().out


def test_missing_package_is_reported(failures_of):
    (line,) = failures_of("import no_such_peer")
    assert line.endswith("exit code 1: ModuleNotFoundError: No module named 'no_such_peer'")


def test_unmeasured_part_of_a_benchmark_is_reported(failures_of):
    assert failures_of("print('FFCV: not measured: no compiler')\nprint('the rest')") == [
        "this: FFCV: not measured: no compiler"
    ]


def test_missing_script_is_reported(everything):
    (line,) = everything["run_and_list_failures"]("this", "no_such_file.py")
    assert "exit code 2" in line
    assert "No such file" in line
