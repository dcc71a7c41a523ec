"""Configure pytest for test_peers.py."""

import os

from peers.task import ENVIRONMENT

os.environ.update(ENVIRONMENT)
os.environ.setdefault("KERAS_BACKEND", "numpy")  # read once, when Keras is first imported

collect_ignore_glob = ["[!t]*", "tables.py"]


def pytest_addoption(parser):
    parser.addoption("--images", type=int, default=256, help="images in a batch")
    parser.addoption("--threads", type=int, default=2)
