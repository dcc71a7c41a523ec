"""The command line in odd environments: limits, locales, variables, missing directories."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.checkout import checkout_environment
from tests.helpers.datasets_on_disk import network_inputs, npy_bytes, pixels, save_images, save_npy

# Numba is used for the smallest work.
WITH_NUMBA_SCRIPT = """
import fastvgg.backend as backend
backend.NUMBA_START_SECONDS = backend.COMPILE_SECONDS = -1.0
from fastvgg.cli import main
main()
"""
MAX_THREADS_SCRIPT = """
import sys, threading
start, left = threading.Thread.start, iter(range(int(sys.argv.pop(1))))
def start_if_allowed(thread):
    if next(left, None) is None:
        raise RuntimeError("can't start new thread")
    start(thread)
threading.Thread.start = start_if_allowed
from fastvgg.cli import main
main()
"""
# A user of its own, who may read all files: the limit does not apply to root, and counts the
# processes and threads of a user.
NO_THREADS_SCRIPT = """
import ctypes, os, resource, threading
from tests.helpers.datasets_on_disk import keep_permission_override
ctypes.CDLL(None).prctl(8, 1, 0, 0, 0)  # PR_SET_KEEPCAPS
os.setuid(2**20 + os.getpid())
keep_permission_override()
resource.setrlimit(resource.RLIMIT_NPROC, (1, 1))
try:
    threading.Thread(target=print).start()
except RuntimeError:
    from fastvgg.cli import main
    main()
raise SystemExit("a thread has started")
"""


@pytest.fixture
def place(tmp_path):
    save_npy(tmp_path / "x.npy", pixels(11))
    return tmp_path


def run_command(*arguments, script=None, python=(), limits=(), cwd=None, unset=(), **environment):
    """Run a command in a process with limits, variables and options of Python."""
    program = ["-m", "fastvgg"] if script is None else ["-c", script]
    inherited = checkout_environment(**environment)

    def set_limits():
        for limit, value in limits:
            resource.setrlimit(limit, (value, value))

    return subprocess.run(
        [sys.executable, *python, *program, *map(os.fspath, arguments)],
        env={name: value for name, value in inherited.items() if name not in unset},
        preexec_fn=set_limits,  # a single thread, before exec
        cwd=cwd,
        capture_output=True,
        text=True,
        errors="surrogateescape",
        timeout=120,
        check=False,
    )


def check_exit(done, *codes):
    """Check that a command ends with one of the codes, and without a traceback."""
    assert done.returncode in codes, (done.returncode, done.stderr)
    assert "Traceback (most" not in done.stderr
    assert "internal error" not in done.stderr
    if done.returncode:
        assert done.stderr.startswith(("fastvgg: ", "note: "))


def preprocess(place, **settings):
    command = ["preprocess", place / "x.npy", place / "y.npy", "--mode", "caffe"]
    return run_command(*command, **settings)


def check_result(place):
    assert (place / "y.npy").read_bytes() == npy_bytes(network_inputs(pixels(11), "caffe"))


@pytest.mark.parametrize("megabytes", [130, 160, 220, 500])
def test_limit_of_addresses_ends_in_a_typed_error_or_the_result(place, megabytes):
    limits = [(resource.RLIMIT_AS, megabytes * 10**6)]
    done = preprocess(place, limits=limits, script=WITH_NUMBA_SCRIPT)
    check_exit(done, 0, 3, 5)
    if done.returncode == 0:
        check_result(place)
    else:
        assert "ulimit -v" in done.stderr


@pytest.mark.parametrize("files", [5, 8, 12])
def test_limit_of_open_files_ends_in_a_typed_error_or_the_result(place, files):
    done = preprocess(place, limits=[(resource.RLIMIT_NOFILE, files)])
    check_exit(done, 0, 3, 5)
    if done.returncode == 0:
        check_result(place)


@pytest.mark.parametrize("threads", [0, 1, 2])
@pytest.mark.parametrize("kind", ["array", "images"])
def test_limit_of_threads_leaves_the_work_to_those_that_start(place, kind, threads):
    if kind == "images":
        save_images(place / "photos", pixels(11))
        command = ["pack", place / "photos", place / "y.npy", "--threads", "4"]
    else:
        command = ["preprocess", place / "x.npy", place / "y.npy", "--mode", "caffe"]
    done = run_command(str(threads), *command, script=MAX_THREADS_SCRIPT)
    check_exit(done, 0)
    if kind == "array":
        check_result(place)
    else:
        assert len(np.load(place / "y.npy")) == 11


@pytest.mark.skipif(os.geteuid() != 0, reason="counts the processes of a user that only root has")
def test_limit_of_processes_that_allows_no_thread_leaves_the_work_to_one():
    with tempfile.TemporaryDirectory(dir="/tmp") as directory:  # others may not enter `tmp_path`
        place = Path(directory)
        place.chmod(0o777)
        save_npy(place / "x.npy", pixels(11))
        check_exit(preprocess(place, script=NO_THREADS_SCRIPT), 0)
        check_result(place)
        save_images(place / "photos", pixels(11))
        command = ["pack", place / "photos", place / "z.npy", "--threads", "4"]
        check_exit(run_command(*command, script=NO_THREADS_SCRIPT), 0)
        assert len(np.load(place / "z.npy")) == 11


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("NUMBA_NUM_THREADS", "0"),
        ("NUMBA_NUM_THREADS", "x"),
        ("NUMBA_CPU_FEATURES", "foo"),
        ("NUMBA_DISABLE_JIT", "1"),
    ],
)
def test_variables_of_numba_that_it_refuses_leave_the_numpy_backend(place, name, value):
    done = preprocess(place, script=WITH_NUMBA_SCRIPT, **{name: value})
    check_exit(done, 0)
    check_result(place)
    assert name in done.stderr
    assert len(done.stderr.splitlines()) <= 2


@pytest.mark.parametrize(
    "environment",
    [
        {"COLUMNS": "0", "TERM": ""},
        {"COLUMNS": "1", "TERM": "nonsense"},
        {"HOME": "", "TMPDIR": "/nonexistent"},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        {"LC_ALL": "C", "PYTHONIOENCODING": "ascii"},
        {"PYTHONOPTIMIZE": "2", "OMP_NUM_THREADS": "0", "OPENBLAS_NUM_THREADS": "x"},
        {"PYTHONWARNINGS": "error"},
    ],
    ids=str,
)
def test_odd_variables_change_no_result(place, environment):
    check_exit(preprocess(place, **environment), 0)
    check_result(place)
    done = run_command("pack", "--help", **environment)
    check_exit(done, 0)
    assert "--size" in done.stdout


def test_no_home_and_a_read_only_or_removed_directory_change_no_result(place):
    removed = place / "removed"
    removed.mkdir()
    script = f"import os; os.rmdir({str(removed)!r})\nfrom fastvgg.cli import main; main()"
    done = preprocess(place, script=script, cwd=removed, unset=("HOME", "TMPDIR", "TERM"))
    check_exit(done, 0)
    check_result(place)
    removed.mkdir()
    relative = run_command("info", "x.npy", script=script, cwd=removed)
    check_exit(relative, 3)
    assert "x.npy is relative to the current directory" in relative.stderr


def test_warnings_that_python_makes_errors_are_notes(place):
    command = ["preprocess", place / "x.npy", place / "y.npy", "--model", "EfficientNetB0"]
    done = run_command(*command, python=["-W", "error"])
    check_exit(done, 0)
    assert "note: EfficientNetB0 scales pixels itself" in done.stderr
