"""Everything works without Numba: the tests run once more, as if it were not installed."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from tests.helpers.checkout import CHECKOUT


@pytest.mark.compiled
@pytest.mark.parametrize(
    ("tests", "at_least"),
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
def test_the_tests_of_pixels_pass_as_if_numba_were_not_installed(tests, at_least):
    # What pytest and its plugins tell their own processes is not meant for this one.
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
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= at_least
    skipped = re.findall(r"^SKIPPED .*", done.stdout, re.MULTILINE)
    assert not [line for line in skipped if "PyTorch is not installed" not in line]
