"""The README does what it says: its code runs, its commands exist, its rooms are there."""

import json
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree as ET

import pytest
import skimage
import zarr
from typer.testing import CliRunner

import fastvgg
from fastvgg import bench
from fastvgg.cli import app
from fastvgg.errors import BackendError

TOP = Path(__file__).parent.parent
README = (TOP / "README.md").read_text(encoding="utf-8")
BENCHMARKS = (TOP / "benchmarks" / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


@pytest.fixture
def photographs(tmp_path, monkeypatch):
    (tmp_path / "photos").mkdir()
    for name in ("rocket.jpg", "coffee.png"):
        content = (Path(skimage.__file__).parent / "data" / name).read_bytes()
        (tmp_path / "photos" / name).write_bytes(content)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_python_example_runs(photographs):
    (example,) = blocks("python")
    ran = subprocess.run(
        [sys.executable, "-W", "error", "-c", example], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    assert "224" in ran.stdout
    assert (photographs / "train.npy.fastvgg.json").exists()


def test_python_example_has_ten_lines_of_code():
    (example,) = blocks("python")
    lines = [line for line in example.splitlines() if line.strip()]
    assert len(lines) <= 12


@pytest.mark.parametrize("number", range(3))
def test_a_cluster_is_three_lines_away(number, tmp_path, monkeypatch):
    import numpy as np
    from distributed import LocalCluster, default_client

    class Cluster(LocalCluster):
        def __init__(self, *_, **__):
            super().__init__(n_workers=1, threads_per_worker=1, dashboard_address=":0")

        def scale(self, n=0, *, jobs=0):
            super().scale(n or min(1, jobs))

    jobqueue, kubernetes = ModuleType("dask_jobqueue"), ModuleType("dask_kubernetes.operator")
    jobqueue.SLURMCluster = kubernetes.KubeCluster = Cluster
    monkeypatch.setattr("dask.distributed.SSHCluster", Cluster)
    for module in (jobqueue, kubernetes):  # which need a SLURM, and a Kubernetes
        monkeypatch.setitem(sys.modules, module.__name__, module)
    images = np.random.default_rng(0).integers(0, 256, (5, 5, 7, 3), np.uint8)
    example = re.sub(r"/shared|/scratch|s3://bucket", str(tmp_path), blocks("py")[number])
    np.save(tmp_path / "x.npy", images)
    zarr.save_array(tmp_path / "x.zarr", images)
    found = {"fastvgg": fastvgg}
    exec(example, found)  # noqa: S102  # our own
    with found["cluster"], default_client():
        made = zarr.open_array(tmp_path / "y.zarr", mode="r")[:]
    assert np.array_equal(made, fastvgg.preprocess(images, "caffe"))


def test_commands_run_in_the_order_they_are_listed(photographs, monkeypatch):
    import numpy as np

    monkeypatch.setattr(bench, "QUICK", bench.BenchConfig(2**23, 2, 1, 2**20, every_path=False))

    images = np.random.default_rng(0).integers(0, 256, (2, 5, 7, 3), np.uint8)
    np.save("images.npy", images)
    np.save("floats.npy", images.astype(np.float32))
    listed = next(block for block in blocks("sh") if "fastvgg preprocess" in block)
    commands = [shlex.split(line, comments=True) for line in listed.splitlines()]
    assert {command[1] for command in commands} == {
        command.name or command.callback.__name__ for command in app.registered_commands
    }
    for command in commands:
        if command[1:4] == ["preprocess", "images.npy", "train.npy"]:
            command[3] = "from_array.npy"  # the line before wrote train.npy
        if command[1:] == ["restore", "train.npy", "images.npy"]:
            command[3] = "images_again.npy"
        assert command[0] == "fastvgg"
        actual = CliRunner().invoke(app, command[1:])
        without_kernels = command[1] == "bench" and sys.modules.get("numba", True) is None
        assert actual.exit_code == (BackendError.exit_code if without_kernels else 0), (
            command,
            actual.output,
        )


@pytest.mark.parametrize("name", ["demo", "test"])
def test_setup_commands_are_single_lines_that_need_only_python(name):
    (command,) = re.findall(rf"^<!-- {name} command -->\n```sh\n(.*?)\n```$", README, re.MULTILINE)
    assert command.startswith("python3 -m venv .venv && ")


def test_tables_are_what_the_results_say():
    tables = runpy.run_path(str(TOP / "benchmarks" / "tables.py"))
    texts = [document.read_text(encoding="utf-8") for document in tables["DOCUMENTS"]]
    assert tables["written_into"](texts) == texts
    marked = re.findall(r"<!-- table: (\w+) -->", "".join(texts))
    assert sorted(marked) == sorted(tables["TABLES"])


def test_pictures_are_what_the_results_say(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(TOP / "benchmarks")
    plots = runpy.run_path(str(TOP / "benchmarks" / "plots.py"))
    shown = re.findall(r"\]\((?:benchmarks/)?results/([\w-]+)\.svg\)", README + BENCHMARKS)
    assert set(shown) == set(plots["PLOTS"])
    for name, draw in plots["PLOTS"].items():
        kept = TOP / "benchmarks" / "results" / f"{name}.svg"
        draw(json.loads(kept.with_suffix(".json").read_text("utf-8")), tmp_path / kept.name)
        assert texts_of(tmp_path / kept.name) == texts_of(kept)  # curves vary with the version


def texts_of(picture):
    root = ET.parse(picture).getroot()  # noqa: S314  # our own
    return [text.strip() for text in root.itertext() if text.strip()]


def test_layout_lists_exactly_the_files_there_are():
    architecture = (TOP / "docs" / "architecture.md").read_text("utf-8")
    (tree,) = re.findall(r"^```\n(fastvgg/.*?)^```$", architecture, re.MULTILINE | re.DOTALL)
    expected = {
        path.name
        for path in (TOP / "fastvgg").rglob("*.py")
        if path.name not in ("__init__.py", "__main__.py")
    }
    actual = set(re.findall(r"^ +(\w+\.py) ", tree, re.MULTILINE))
    assert actual == expected


def test_exit_codes_are_those_of_the_errors():
    from fastvgg import errors
    from fastvgg.cli import errors as exits

    listed = {int(code) for code in re.findall(r"^\| (\d+) \|", README, re.MULTILINE)}
    raised = {getattr(errors, name).exit_code for name in errors.__all__}
    assert listed == raised | {0, exits.SOME_INPUTS_FAILED, exits.INTERRUPTED, exits.INTERNAL_ERROR}
