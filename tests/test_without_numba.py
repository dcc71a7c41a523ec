"""Everything works without Numba: the tests run once more, as if it were not installed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]

# What happens to files, stores, screens and installations, with whatever computes the pixels; it
# takes minutes to try.
SAME_ON_ANY_BACKEND = (
    *("bad_files", "behind", "benchmarks", "campaigns", "cluster", "crash", "crash_states"),
    *("decode", "files", "formats", "fuzz", "hdf5", "images", "index", "inplace", "npy"),
    *("packaging", "parts", "readme", "retry", "screen", "storage", "stores", "tar"),
    *("tiling", "verify", "zarr"),
)


def test_the_suite_passes_as_if_numba_were_not_installed():
    # What pytest and its plugins tell their own processes is not meant for this one.
    environment = {name: value for name, value in os.environ.items() if "PYTEST" not in name}
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "--without-numba", "-q", "--tb=short"),
            *("-p", "no:cacheprovider", "-p", "no:xdist", "tests"),
            *(f"--ignore=tests/test_{room}.py" for room in SAME_ON_ANY_BACKEND),
        ],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-10_000:] + done.stderr[-2_000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 1000
    skipped = re.findall(r"^SKIPPED .*", done.stdout, re.MULTILINE)
    assert not [line for line in skipped if "PyTorch is not installed" not in line]
