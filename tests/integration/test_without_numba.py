"""The pixel tests pass in a process in which Numba cannot be imported."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from tests.helpers.checkout import CHECKOUT


@pytest.mark.compiled
@pytest.mark.parametrize(
    ("tests", "min_passed"),
    [
        pytest.param(
            [
                "unit/test_backend.py",
                "unit/test_rows.py",
                "cli",
                "stream",
                "integration/test_demo.py",
            ],
            100,
            id="some",
        ),
        pytest.param([""], 1000, id="all", marks=pytest.mark.slow),
    ],
)
def test_pixel_tests_pass_without_numba(tests, min_passed):
    # Environment variables of pytest and its plugins are not meant for this process.
    environment = {name: value for name, value in os.environ.items() if "PYTEST" not in name}
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "--without-numba", "-q", "--tb=short"),
            *("-m", "pixels and not slow", "-p", "no:cacheprovider", "-p", "no:xdist"),
            *(f"tests/{each}" for each in tests),
        ],
        cwd=CHECKOUT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-10_000:] + done.stderr[-2_000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= min_passed
    skipped = re.findall(r"^SKIPPED .*", done.stdout, re.MULTILINE)
    assert not [line for line in skipped if "PyTorch is not installed" not in line]
