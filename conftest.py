"""How the examples in docstrings run, and which are left out."""

import importlib.util

import pytest

collect_ignore = [] if importlib.util.find_spec("torch") else ["fastvgg/torch.py"]


@pytest.fixture(autouse=True)
def _examples_write_elsewhere(request, tmp_path_factory, monkeypatch):
    if isinstance(request.node, pytest.DoctestItem):
        monkeypatch.chdir(tmp_path_factory.mktemp("example"))
