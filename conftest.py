"""Configure doctests: where examples run, and which modules are skipped."""

import importlib.util

import pytest

collect_ignore = [] if importlib.util.find_spec("torch") else ["fastvgg/torch.py"]


@pytest.fixture(autouse=True)
def _run_examples_in_a_temporary_directory(request, tmp_path_factory, monkeypatch):
    if isinstance(request.node, pytest.DoctestItem):
        monkeypatch.chdir(tmp_path_factory.mktemp("example"))
