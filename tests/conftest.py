"""The reference is Keras on NumPy, and what the engine does is tested on each backend there is."""

from __future__ import annotations

import os
import sys

from hypothesis import settings

os.environ["KERAS_BACKEND"] = "numpy"  # read once, when Keras is first imported

settings.register_profile(
    "fastvgg", deadline=None, derandomize=True, max_examples=60, database=None
)
settings.load_profile("fastvgg")


def pytest_addoption(parser):
    parser.addoption(
        "--without-numba", action="store_true", help="run as if Numba were not installed"
    )


def pytest_configure(config):
    config.addinivalue_line("markers", "compiled: looks at what is compiled, and so needs Numba")
    if not config.getoption("--without-numba"):
        return
    sys.modules["numba"] = None  # the import system's own way to say that there is no such module
    config.addinivalue_line("filterwarnings", "ignore:Numba is not usable:UserWarning")
    about_kernels = ("assembly", "bench", "convert", "jit", "spec", "vector")
    needs_numba = (
        *("fastvgg/bench", "fastvgg/kernels", "tests/by_hand.py", "tests/test_without_numba.py"),
        *(f"tests/test_{name}.py" for name in about_kernels),
    )
    config.option.ignore = [
        *(config.option.ignore or ()),
        *(str(config.rootpath / path) for path in needs_numba),
    ]


def pytest_generate_tests(metafunc):
    if "backend" in metafunc.fixturenames:
        without = metafunc.config.getoption("--without-numba")
        metafunc.parametrize("backend", ["numpy"] if without else ["numba", "numpy"])


def pytest_collection_modifyitems(config, items):
    """Start the longest test first, so that all workers end together."""
    if config.getoption("--without-numba"):
        items[:] = [item for item in items if not item.get_closest_marker("compiled")]
    items.sort(key=lambda item: item.path.name != "test_without_numba.py")
