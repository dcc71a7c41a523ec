"""The benchmarks run, and their tables show what was measured."""

import importlib
import json
import runpy
import subprocess
import sys

import pytest

from tests.helpers.checkout import CHECKOUT

QUICKLY_IMPORTED = "fastvgg or Keras or NumPy or StackOverflow or Dask"


@pytest.fixture(scope="module")
def tables():
    return runpy.run_path(str(CHECKOUT / "benchmarks" / "tables.py"))


def test_peer_benchmarks_run_and_fastvgg_matches_keras():
    command = [sys.executable, "-m", "pytest", "benchmarks", "--benchmark-disable", "--images=3"]
    command += ["-p", "no:cacheprovider", "-p", "no:xdist", "-k", QUICKLY_IMPORTED]
    ran = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_every_peer_belongs_to_one_library_of_the_overview(tables, monkeypatch):
    monkeypatch.syspath_prepend(CHECKOUT / "benchmarks")
    peers = importlib.import_module("peers").PEERS
    listed = [name for names, *_ in tables["LIBRARIES"].values() for name in names]
    does_less = ["DALI, without the flip"]
    assert sorted(listed + does_less) == sorted(peer.name for peer in peers)


@pytest.mark.parametrize(
    ("share", "expected"),
    [
        (0, "0"),
        (1e-9, "<0.1%"),
        (0.004, "0.4%"),
        (0.42, "42%"),
        (0.9999, ">99.9%"),
        (1, "100%"),
    ],
)
def test_percent_is_0_or_100_only_if_exact(tables, share, expected):
    assert tables["percent"](share) == expected


def row(peer, task, images_per_second, differing, memory="new"):
    return {
        "contender": peer,
        "task": task,
        "images_per_second": images_per_second,
        "differing": differing,
        "memory": memory,
    }


def test_overview_shows_the_fastest_call_and_the_worst_difference(tables):
    function = "deprocess_img (StackOverflow)"
    elements = 10 * tables["ELEMENTS_OF_AN_IMAGE"]
    rows = [
        row(function, "restore, caffe", 1000, 0),
        row(function, "restore, caffe", 2000, 0, "reused"),
        row(function, "restore, caffe, stored in float16", 1500, elements // 2),
    ]
    lines = tables["overview"]({"images": 10, "rows": rows})
    (line,) = [line for line in lines if line.startswith("| StackOverflow")]
    assert line.startswith("| StackOverflow |  |  | 2,000 | 50% |")


def test_peers_with_small_differences_are_not_shown_as_exact(tables):
    record = json.loads((CHECKOUT / "benchmarks" / "results" / "peers.json").read_text("utf-8"))
    for one in record["rows"]:
        one["differing"] += one["contender"] == "Keras"
    lines = tables["peers"](record)
    assert [line.split(" | ")[-1] for line in lines if line.startswith("| Keras |")] == [
        "<0.1% |",
        "<0.1% |",
    ]


def test_missing_table_marker_is_named(tables):
    with pytest.raises(SystemExit, match=r"0 places .*'bench'.*<!-- table: bench -->"):
        tables["with_tables"](["no table"])


@pytest.mark.parametrize("rounds", ["1", "0", "-3", "two"])
@pytest.mark.parametrize(
    "name", ["cluster", "formats", "growth", "images", "loading", "startup", "streams"]
)
def test_too_few_rounds_for_quartiles_are_rejected(name, rounds, monkeypatch, capsys):
    monkeypatch.syspath_prepend(CHECKOUT / "benchmarks")
    # An unknown option, so that nothing is measured if the rounds are accepted.
    monkeypatch.setattr(sys, "argv", [name, "--rounds", rounds, "--unknown"])
    with pytest.raises(SystemExit) as caught:
        importlib.import_module(name).main()
    assert caught.value.code == 2
    message = f"argument --rounds: {rounds!r} is not an integer of at least 2"
    assert capsys.readouterr().err.endswith(f"{message}\n")


def test_missing_backend_only_affects_keras(monkeypatch):
    monkeypatch.syspath_prepend(CHECKOUT / "benchmarks")
    monkeypatch.setitem(sys.modules, "torch", None)  # as if it were not installed
    present, _, missing = importlib.import_module("peers").import_peers("torch")
    assert [peer.name for peer in present] == ["fastvgg"]
    assert list(missing) == ["Keras on PyTorch"]
