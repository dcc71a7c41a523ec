"""Check the documents: code, commands, options, figures, pictures and links."""

import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from importlib.util import find_spec
from types import ModuleType
from xml.etree import ElementTree as ET

import numpy as np
import pytest
import typer.main
import zarr
from PIL import Image
from typer.testing import CliRunner

import fastvgg
from fastvgg import bench
from fastvgg.cli import app
from fastvgg.demo import CAPTION_HEIGHT, MARGIN, SIZE, run_demo
from fastvgg.errors import BackendError
from tests.helpers.checkout import CHECKOUT

RESULTS = CHECKOUT / "benchmarks" / "results"
PATHS = (
    *(CHECKOUT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")),
    *sorted((CHECKOUT / "docs").glob("*.md")),
    CHECKOUT / "benchmarks" / "README.md",
)
DOCUMENTS = {
    path.relative_to(CHECKOUT).as_posix(): path.read_text(encoding="utf-8")
    for path in PATHS
    if path.exists()
}
README = DOCUMENTS["README.md"]


def blocks(language, document):
    """The code blocks of a document in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", DOCUMENTS[document], re.MULTILINE | re.DOTALL)


def result(name):
    return json.loads((RESULTS / f"{name}.json").read_text("utf-8"))


def examples(document):
    """The Python code and the commands of fastvgg in a document, in order."""
    found = re.findall(
        r"^```(python|sh)\n(.*?)^```$", DOCUMENTS[document], re.MULTILINE | re.DOTALL
    )
    return [
        (language, block)
        for language, block in found
        if language == "python" or re.search(r"^fastvgg ", block, re.MULTILINE)
    ]


# Of docs/cluster.md, which needs SSH, SLURM and Kubernetes, see `test_cluster_examples_run`.
WITH_EXAMPLES = [name for name in DOCUMENTS if examples(name) and name != "docs/cluster.md"]


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """A directory in which `fastvgg demo demo/` was run."""
    directory = tmp_path_factory.mktemp("shown")
    run_demo(directory / "demo", lambda line: None)
    return directory


@pytest.fixture
def in_demo_directory(shown, tmp_path, monkeypatch):
    """A new current directory with nothing but the demo in it."""
    shutil.copytree(shown / "demo", tmp_path / "demo")
    monkeypatch.chdir(tmp_path)
    return tmp_path


# Code


def check_python(example):
    if "torch.utils" in example and find_spec("torch") is None:
        return
    ran = subprocess.run(
        [sys.executable, "-W", "error", "-c", example], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr


def check_commands(block):
    for command in parse_commands(block):
        actual = CliRunner().invoke(app, command[1:])
        without_kernels = command[1] == "bench" and sys.modules.get("numba", True) is None
        expected = BackendError.exit_code if without_kernels else 0
        assert actual.exit_code == expected, (command, actual.output)


@pytest.mark.parametrize("document", WITH_EXAMPLES)
def test_examples_run_as_they_stand_and_in_order(document, in_demo_directory, monkeypatch):
    monkeypatch.setattr(bench, "QUICK", bench.BenchConfig(2**23, 2, 1, 2**20, has_all_paths=False))
    for language, block in examples(document):
        check_python(block) if language == "python" else check_commands(block)


def test_quickstarts_are_short_and_print_the_documented_results(in_demo_directory):
    undo, to_batches = blocks("python", "README.md")
    for example in (undo, to_batches):
        assert len([line for line in example.splitlines() if line.strip()]) <= 12
    ran = subprocess.run(
        [sys.executable, "-c", undo + to_batches], capture_output=True, text=True, check=True
    )
    with Image.open("optimized.png") as image:
        assert image.size == (640, 427)
    assert "(2, 3, 224, 224) float16" in ran.stdout
    for label in ("'cat'", "'food'", "'people'", "'rocket'"):
        assert label in ran.stdout
    assert "''" not in ran.stdout


@pytest.mark.parametrize("number", range(3))
def test_cluster_examples_run(number, tmp_path, monkeypatch):
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
    example = blocks("python", "docs/cluster.md")[number]
    example = re.sub(r"/shared|/scratch|s3://bucket", str(tmp_path), example)
    np.save(tmp_path / "x.npy", images)
    zarr.save_array(tmp_path / "x.zarr", images)
    found = {}
    exec(example, found)  # noqa: S102  # our own
    with found["cluster"], default_client():
        actual = zarr.open_array(tmp_path / "y.zarr", mode="r")[:]
    assert np.array_equal(actual, fastvgg.preprocess(images, "caffe"))


# Commands


def parse_commands(block):
    """The commands of a block that are of fastvgg."""
    lines = [line for line in block.splitlines() if line.startswith("fastvgg ")]
    return [shlex.split(line, comments=True) for line in lines]


def test_every_command_is_documented():
    shown = {
        command[1] for block in blocks("sh", "docs/usage.md") for command in parse_commands(block)
    }
    assert shown == {
        command.name or command.callback.__name__ for command in app.registered_commands
    }


@pytest.mark.parametrize("document", [name for name in DOCUMENTS if "benchmarks" not in name])
def test_mentioned_options_exist(document):
    known = {
        option
        for command in typer.main.get_command(app).commands.values()
        for parameter in command.params
        for option in (*parameter.opts, *parameter.secondary_opts)
    }
    known |= {"--help", "--version", "--install-completion"}
    code = re.findall(
        r"`([^`\n]+)`",
        re.sub(r"^```.*?^```$", "", DOCUMENTS[document], flags=re.MULTILINE | re.DOTALL),
    )
    other_programs = ("python", ".ci/", "pytest", "git", "ruff", "mypy", "tar")
    mentioned = {
        option
        for text in code
        if not text.startswith(other_programs)
        for option in re.findall(r"(?<!\S)--[a-z][a-z0-9-]*", text)
    }
    assert mentioned <= known


@pytest.mark.parametrize("name", ["demo", "test"])
def test_setup_commands_are_single_lines_that_need_only_python(name):
    (command,) = re.findall(rf"^<!-- {name} command -->\n```sh\n(.*?)\n```$", README, re.MULTILINE)
    assert command.startswith("python3 -m venv .venv && ")


def test_documented_exit_codes_match_the_errors():
    from fastvgg import errors
    from fastvgg.cli import errors as exits

    listed = {int(code) for code in re.findall(r"^\| (\d+) \|", README, re.MULTILINE)}
    types = [value for value in vars(errors).values() if isinstance(value, type)]
    raised = {kind.exit_code for kind in types if issubclass(kind, errors.FastvggError)}
    assert listed == raised | {0, exits.SOME_INPUTS_FAILED, exits.INTERRUPTED, exits.INTERNAL_ERROR}


# Figures


def test_tables_match_the_results():
    tables = runpy.run_path(str(CHECKOUT / "benchmarks" / "tables.py"))
    texts = [document.read_text(encoding="utf-8") for document in tables["DOCUMENTS"]]
    assert tables["with_tables"](texts) == texts
    marked = re.findall(r"<!-- table: (\w+) -->", "".join(texts))
    assert sorted(marked) == sorted(tables["TABLES"])


def figures():
    """Sentences of the README, with the figures that the results say."""
    tables = runpy.run_path(str(CHECKOUT / "benchmarks" / "tables.py"))
    rates = tables["libraries"](result("peers"))
    ours, keras = (
        [int(rate.replace(",", "")) for rate in rates[name][:2]] for name in ("fastvgg", "Keras")
    )
    caffe, torch = (our / their for our, their in zip(ours, keras, strict=True))
    counts = {name: result(name)["counts"] for name in ("crash_states", "kills", "power_cuts")}
    assert all(of["wrong"] == 0 for of in counts.values())
    values = result("inverses")["values"]
    assert {
        wrong
        for row in result("inverses")["rows"]
        if "fastvgg.restore" in row["inverse"]
        for wrong in row["wrong"].values()
    } == {0}
    rows = result("images_million")["rows"]
    (peak_mib,) = (row["peak_mib"] for row in rows if row["path"].endswith("64x64 JPEGs to uint8"))
    (loader,) = [row for row in result("loading")["times"] if "image by image" in row["path"]]
    startup = result("startup")
    return [
        f"All {values} values (256 in each channel) come back",
        f"{caffe:.1f} times as many images/s as Keras in caffe mode and {torch:.1f} times in torch",
        f"Tests enumerated {counts['crash_states']['states']:,} crash states",
        f"crash states and resumed from {counts['crash_states']['runs']:,} of them",
        f"killed runs {counts['kills']['kills']:,} times",
        f"cut the power {counts['power_cuts']['power cuts']:,} times",
        f"A million 64x64 JPEGs in tar shards, stored as uint8, peak at {peak_mib:.0f} MiB",
        f"{loader['times']:.0f} times a PyTorch `DataLoader`",
        f"torchvision v2 differs in {rates['torchvision v2'][-1]} of the values",
        f"{startup['packages']} packages and {startup['bytes'] / 2**20:.0f} MiB",
    ]


@pytest.mark.parametrize("sentence", figures())
def test_figures_in_prose_match_the_results(sentence):
    assert sentence in " ".join(README.split())


# Pictures and links


def test_pictures_match_the_results(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(CHECKOUT / "benchmarks")
    plots = runpy.run_path(str(CHECKOUT / "benchmarks" / "plots.py"))
    shown = re.findall(r"\]\([./\w]*results/([\w-]+)\.svg\)", "".join(DOCUMENTS.values()))
    assert set(shown) == set(plots["PLOTS"])
    for name, draw in plots["PLOTS"].items():
        kept = RESULTS / f"{name}.svg"
        draw(json.loads(kept.with_suffix(".json").read_text("utf-8")), tmp_path / kept.name)
        assert picture_texts(tmp_path / kept.name) == picture_texts(
            kept
        )  # curves vary with the version


def picture_texts(picture):
    root = ET.parse(picture).getroot()  # noqa: S314  # our own
    return [text.strip() for text in root.itertext() if text.strip()]


def test_demo_picture_matches_the_demo(shown):
    picture = np.asarray(Image.open(CHECKOUT / "docs" / "demo.png"))
    sheet = np.asarray(Image.open(shown / "demo" / "contact-sheet.png"))
    height = SIZE[0] + MARGIN + CAPTION_HEIGHT
    for row, row_of_sheet in enumerate((0, 4)):  # both are the bytes of scikit-image's files
        top, expected_top = (MARGIN + CAPTION_HEIGHT + at * height for at in (row, row_of_sheet))
        actual = picture[top : top + SIZE[0]]
        assert np.array_equal(actual, sheet[expected_top : expected_top + SIZE[0]])


def anchors(document):
    """The anchors that GitHub gives the headings of a document."""
    headings = re.findall(r"^#+ (.+)$", document, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in headings}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_resolve(document):
    links = re.findall(r"\]\((?!https?:)([^)\s]*)\)", DOCUMENTS[document])
    for link in links:
        name, _, anchor = link.partition("#")
        path = (CHECKOUT / document).parent / name if name else CHECKOUT / document
        assert path.exists(), link
        if anchor:
            assert anchor in anchors(path.read_text("utf-8")), link


def test_every_document_is_linked_from_the_readme():
    linked = set(re.findall(r"\]\(([\w./-]+\.md)", README))
    assert linked >= set(DOCUMENTS) - {"README.md"}


def test_readme_is_short():
    assert len(README.splitlines()) <= 200


def test_documented_layout_matches_the_package_files():
    architecture = DOCUMENTS["docs/architecture.md"]
    (tree,) = re.findall(r"^```\n(fastvgg/.*?)^```$", architecture, re.MULTILINE | re.DOTALL)
    expected = {
        path.name
        for path in (CHECKOUT / "fastvgg").rglob("*.py")
        if path.name not in ("__init__.py", "__main__.py")
    }
    actual = set(re.findall(r"^ +(\w+\.py) ", tree, re.MULTILINE))
    assert actual == {*expected, "__init__.py"}
