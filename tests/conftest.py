"""Configure pytest: Keras on NumPy is the reference; engine tests run on every backend."""

from __future__ import annotations

import os
import sys

import pytest
from hypothesis import settings

os.environ["KERAS_BACKEND"] = "numpy"  # read once, when Keras is first imported

settings.register_profile(
    "fastvgg", deadline=None, derandomize=True, max_examples=60, database=None
)
settings.load_profile("fastvgg")

collect_ignore = ["helpers"]  # has no tests and no examples

# Folders whose modules cannot be imported without Numba.
NEED_NUMBA = ("fastvgg/bench", "fastvgg/kernels", "tests/unit/bench", "tests/unit/kernels")


def pytest_addoption(parser):
    parser.addoption(
        "--without-numba", action="store_true", help="run as if Numba were not installed"
    )


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """Give each worker consecutive tests, so that shared fixtures are created only once.

    Otherwise every worker would compile the same kernels (about a second each) and start its own
    object store server and cluster.
    """
    if getattr(config.option, "numprocesses", None) and config.option.dist == "no":
        config.option.dist = "worksteal"


def pytest_configure(config):
    if not config.getoption("--without-numba"):
        return
    sys.modules["numba"] = None  # makes `import numba` raise ImportError
    config.addinivalue_line("filterwarnings", "ignore:Numba is not usable:UserWarning")
    paths = [config.rootpath / folder for folder in NEED_NUMBA]
    if missing := [str(path) for path in paths if not path.is_dir()]:
        raise pytest.UsageError(f"tests/conftest.py lists missing folders: {missing}")
    config.option.ignore = [*(config.option.ignore or ()), *map(str, paths)]


def pytest_generate_tests(metafunc):
    if "backend" in metafunc.fixturenames:
        without = metafunc.config.getoption("--without-numba")
        metafunc.parametrize("backend", ["numpy"] if without else ["numba", "numpy"])


def pytest_collection_modifyitems(config, items):
    """Start the longest test first, so that all workers finish at about the same time."""
    if config.getoption("--without-numba"):
        items[:] = [item for item in items if not item.get_closest_marker("compiled")]
    items.sort(key=lambda item: item.path.name != "test_without_numba.py")
