"""The command line: output, exit codes, and errors without tracebacks."""

from __future__ import annotations

import json
import os
import pty
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import fastvgg
from fastvgg import models, oracle
from fastvgg.cli import output
from fastvgg.datasets.index import index_path
from fastvgg.stream.manifest import manifest_path
from fastvgg.stream.plan import RUN_BYTES
from fastvgg.stream.report import MAX_FAILURES_KEPT, MAX_FAILURES_SHOWN
from fastvgg.transform import Transform
from tests.helpers.bad_arrays import INVALID
from tests.helpers.commands import WITHOUT_NUMBA_SCRIPT, invoke, options_for_chunks
from tests.helpers.datasets_on_disk import (
    ascii_failures,
    images_in,
    names_in,
    network_inputs,
    npy_bytes,
    permissions,
    pixels,
    plan_of,
    python,
    save_images,
    save_npy,
    stdout_of,
    stdout_on_small_disk,
    tree,
)
from tests.helpers.faults import FaultyOs, InterruptedStorage, SimulatedCrash, system_calls
from tests.helpers.runs import run


@pytest.fixture
def array(tmp_path):
    return save_npy(tmp_path / "x.npy", pixels(11))


@pytest.fixture
def photos(tmp_path):
    return save_images(tmp_path / "photos", pixels(11))


def run_command(*arguments, **settings):
    """Run a command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "fastvgg", *map(os.fspath, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        **settings,
    )


def run_without_numba(*arguments, **settings):
    """Run a command in a process of its own that has no Numba."""
    return python(WITHOUT_NUMBA_SCRIPT, *arguments, **settings)


# Commands


def test_essential_commands_work_in_a_subprocess(tmp_path, photos):
    stored, back = tmp_path / "y.npy", tmp_path / "back"
    done = run_command("preprocess", photos, stored, "--model", "vgg19")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"{stored}: 11 images in ")
    done = run_command("verify", stored, "--full")
    assert done.returncode == 0
    assert "11 images matched the NumPy reference" in done.stdout
    done = run_command("restore", stored, back)
    assert (done.returncode, done.stderr) == (0, "")
    for name, expected in images_in(photos).items():
        assert images_in(back)[name].tobytes() == expected.tobytes()


def test_preprocess_passes_every_option(tmp_path, photos):
    target = tmp_path / "y.npy"
    options = ["--mode", "torch", "--size", "5", "11", "--interpolation", "box"]
    options += ["--out-layout", "NCHW", "--dtype", "float16", "--memory", "32MiB", "--threads", "2"]
    options += ["--keep-aspect-ratio", "--fast-jpeg", "--exif", "--scale-to-uint8"]
    options += ["--max-pixels", "12345"]
    assert run_without_numba("preprocess", photos, target, *options).returncode == 0
    job = json.loads(manifest_path(target).read_bytes())["job"]
    assert job["source"]["size"] == [5, 11]
    assert job["source"]["interpolation"] == "box"
    assert job["source"]["keep_aspect_ratio"] is True
    assert job["source"]["fast_jpeg"] is True
    assert job["source"]["exif"] is True
    assert job["source"]["scale_to_uint8"] is True
    assert job["source"]["max_pixels"] == 12345
    assert job["transform"]["mode"]["name"] == "torch"
    assert job["result"]["layout"] == "NCHW"
    assert job["result"]["dtype"] == "float16"
    assert np.load(target).shape == (11, 3, 5, 11)


def test_restore_passes_every_option(tmp_path):
    stored = save_npy(tmp_path / "y.npy", network_inputs(pixels(5), "tf", out_layout="NCHW"))
    options = ["--mode", "tf", "--layout", "NCHW", "--out-layout", "NHWC", "--rounding", "truncate"]
    options += ["--dtype", "float32", "--memory", "3MiB", "--threads", "2"]
    assert run_without_numba("restore", stored, tmp_path / "z.npy", *options).returncode == 0
    job = json.loads(manifest_path(tmp_path / "z.npy").read_bytes())["job"]
    assert job["transform"]["rounding"] == "truncate"
    assert job["result"] == {
        "kind": "npy",
        "shape": [5, 7, 9, 3],
        "dtype": "float32",
        "layout": "NHWC",
        "in_place": False,
    }


def test_source_layout_can_be_given(tmp_path):
    source = save_npy(tmp_path / "x.npy", np.ascontiguousarray(np.moveaxis(pixels(5), -1, 1)))
    arguments = ["preprocess", source, tmp_path / "y.npy", "--mode", "caffe"]
    assert invoke(*arguments).exit_code == 3
    assert run_without_numba(*arguments, "--layout", "NCHW").returncode == 0


@pytest.mark.parametrize("model", ["vgg19", "VGG-19", "ResNet50"])
def test_model_selects_its_mode(tmp_path, array, model):
    assert invoke("preprocess", array, tmp_path / "y.npy", "--model", model).exit_code == 0
    assert json.loads(manifest_path(tmp_path / "y.npy").read_bytes())["job"]["transform"]["mode"][
        "name"
    ] == models.mode_name(model)
    expected = network_inputs(pixels(11), models.mode_name(model))
    assert (tmp_path / "y.npy").read_bytes() == npy_bytes(expected)


def test_consistent_mode_and_model_are_accepted(tmp_path, array):
    result = invoke("preprocess", array, tmp_path / "y.npy", "--model", "vgg16", "--mode", "caffe")
    assert result.exit_code == 0


@pytest.mark.parametrize("as_json", [False, True])
@pytest.mark.parametrize("command", ["preprocess", "restore"])
def test_dry_run_prints_the_plan_and_writes_nothing(tmp_path, array, command, as_json):
    stored = tmp_path / "y.npy"
    plan_of(array, stored, mode="caffe").run()
    source, options = (array, ["--mode", "caffe"]) if command == "preprocess" else (stored, [])
    before = tree(tmp_path)
    result = invoke(
        command, source, tmp_path / "z.npy", "--dry-run", *options, *(["--json"] if as_json else [])
    )
    assert result.exit_code == 0
    assert result.stderr == ""
    assert tree(tmp_path) == before
    if as_json:
        plan = json.loads(result.stdout)
        assert (plan["images"], plan["chunks"]) == (11, 1)
        assert plan["projected_bytes"] <= plan["memory_bytes"]
        assert plan["write_bytes"] == 11 * 189 * (4 if command == "preprocess" else 1)
    else:
        assert "images   11" in result.stdout
        assert str(tmp_path / "z.npy") in result.stdout


@pytest.mark.parametrize("command", ["preprocess", "restore", "verify", "info", "models"])
def test_json_is_the_only_output_on_stdout(tmp_path, array, monkeypatch, command):
    monkeypatch.setattr(output, "SECONDS_BETWEEN_LINES", 0.0)
    stored = tmp_path / "y.npy"
    plan_of(array, stored, mode="caffe").run()
    arguments = {
        "preprocess": [array, tmp_path / "z.npy", "--mode", "caffe", *options_for_chunks(4)],
        "restore": [stored, tmp_path / "z.npy", *options_for_chunks(4, "restore")],
        "models": [],
    }.get(command, [stored])
    result = invoke(command, *arguments, "--json")
    assert result.exit_code == 0
    answer = json.loads(result.stdout)
    if command in ("preprocess", "restore"):
        assert answer["counts"] == {"images": 11, "failed": 0, "chunks": 3, "computed_chunks": 3}
        assert answer["target"] == str(tmp_path / "z.npy")
        assert len(result.stderr.splitlines()) == 3
    elif command == "verify":
        assert result.stderr.splitlines()[-1].startswith("22 of 22 checks")
    else:
        assert result.stderr == ""


def test_json_of_verify_info_and_models_is_complete(tmp_path, array):
    stored = tmp_path / "y.npy"
    plan_of(array, stored, mode="caffe", images_per_chunk=4).run()
    verified = json.loads(invoke("verify", stored, "--json").stdout)
    assert (verified["images"], verified["chunks"], verified["recomputed_images"]) == (11, 3, 11)
    known = json.loads(invoke("info", stored, "--json").stdout)
    assert (known["state"], known["mode"], known["images"]) == ("finished", "caffe", 11)
    listed = json.loads(invoke("models", "--json").stdout)
    assert listed == models.MODES_BY_MODEL


def test_progress_is_printed_line_by_line_without_a_terminal(tmp_path, array, monkeypatch):
    monkeypatch.setattr(output, "SECONDS_BETWEEN_LINES", 0.0)
    result = invoke(
        "preprocess", array, tmp_path / "y.npy", "--mode", "caffe", *options_for_chunks(4)
    )
    lines = result.stderr.splitlines()
    assert [line.split(" images")[0] for line in lines] == ["4 of 11", "8 of 11", "11 of 11"]
    assert all(re.search(r"\d+ images/s, \d+ MB/s, \d+:\d\d:\d\d left$", line) for line in lines)


def test_short_run_prints_no_progress_without_a_terminal(tmp_path, array):
    result = invoke("preprocess", array, tmp_path / "y.npy", "--mode", "caffe")
    assert result.stderr == ""


def test_quiet_prints_nothing_on_stderr(tmp_path, photos, monkeypatch):
    monkeypatch.setattr(output, "SECONDS_BETWEEN_LINES", 0.0)
    (photos / "labels.csv").touch()
    arguments = ["preprocess", photos, tmp_path / "y.npy", "--mode", "caffe"]
    verbose = invoke(*arguments, "--restart")
    assert "note: " in verbose.stderr
    result = invoke(*arguments, "--restart", "--quiet")
    assert result.exit_code == 0
    assert result.stderr == ""


def run_on_pty(*arguments):
    """Run a command whose standard error is a terminal; return its end and what it wrote there."""
    ours, slave = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", WITHOUT_NUMBA_SCRIPT, *map(os.fspath, arguments)],
        env={**os.environ, "TERM": "xterm-256color", "COLUMNS": "120"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=slave,
    )
    os.close(slave)
    written = b""
    while True:
        try:
            some = os.read(ours, 65536)
        except OSError:  # EIO on Linux: the other end is closed
            some = b""
        if not some:
            break
        written += some
    stdout, _ = process.communicate()
    os.close(ours)
    return process.returncode, stdout.decode(), written.decode()


def test_terminal_shows_a_progress_bar_with_images_per_second(tmp_path, array):
    code, stdout, shown = run_on_pty(
        "preprocess", array, tmp_path / "y.npy", "--mode", "caffe", *options_for_chunks(2), "--json"
    )
    assert code == 0
    assert json.loads(stdout)["counts"]["images"] == 11
    assert "━" in shown
    assert "11/11" in shown
    assert "images/s" in shown
    assert "MB/s" in shown
    assert "preprocess" in shown
    assert "Traceback" not in shown


def test_quiet_shows_nothing_on_a_terminal(tmp_path, array):
    target = tmp_path / "y.npy"
    code, _, shown = run_on_pty("preprocess", array, target, "--mode", "caffe", "--quiet")
    assert (code, shown) == (0, "")


def test_info_describes_source_unfinished_and_finished_datasets(tmp_path, array):
    target = tmp_path / "y.npy"
    result = invoke("info", array)
    assert result.exit_code == 0
    assert re.search(r"state +source", result.stdout)
    assert re.search(r"shape +11 x 7 x 9 x 3", result.stdout)
    with pytest.raises(SimulatedCrash):
        run(plan_of(array, target, mode="torch", images_per_chunk=4), storage=InterruptedStorage(1))
    result = invoke("info", target)
    assert re.search(r"state +unfinished", result.stdout)
    assert re.search(r"committed_chunks +1", result.stdout)
    assert re.search(r"chunks +3", result.stdout)
    assert re.search(r"mode +torch", result.stdout)
    assert "--restart" in result.stdout
    plan_of(array, target, mode="torch", images_per_chunk=4).run()
    result = invoke("info", target)
    assert re.search(r"state +finished", result.stdout)
    assert re.search(r"mode +torch", result.stdout)
    assert f"numpy {np.__version__}" in result.stdout
    assert str(array) in result.stdout
    result = invoke("info", tmp_path / "nothing.npy")
    assert result.exit_code == 3
    assert str(tmp_path / "nothing.npy") in result.stderr


def test_info_writes_a_size_as_it_writes_a_shape(tmp_path, photos):
    target = tmp_path / "y.npy"
    plan_of(photos, target, direction="pack", size=(5, 11)).run()
    shown = invoke("info", target).stdout
    assert re.search(r"shape +11 x 5 x 11 x 3\n", shown)
    assert re.search(r"size +5 x 11\n", shown)


def test_one_image_in_one_chunk_is_not_called_images_in_chunks(tmp_path):
    array, stored = save_npy(tmp_path / "x.npy", pixels(1)), tmp_path / "y.npy"
    command = ["preprocess", array, stored, "--mode", "tf"]
    printed = [invoke(*command, "--dry-run"), invoke(*command), invoke(*command)]
    printed += [invoke("verify", stored), invoke("info", stored)]
    with stored.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x01")
    printed += [invoke("verify", stored), invoke("verify", stored, "--repair")]
    assert [result.exit_code for result in printed] == [0, 0, 0, 0, 0, 4, 4]
    for result in printed:
        assert "1 " in result.output
        assert not re.search(r"\b1 (image|chunk|thread)s\b", result.output), result.output


def test_models_lists_every_model_with_its_mode():
    result = invoke("models")
    assert dict(line.split() for line in result.stdout.splitlines()) == models.MODES_BY_MODEL


def test_demo_runs_to_the_end(tmp_path):
    result = invoke("demo", tmp_path / "demo")
    assert result.exit_code == 0
    assert "every byte was restored" in result.stdout
    assert "0 differ" in result.stdout
    assert (tmp_path / "demo" / "contact-sheet.png").exists()


def test_version_matches_the_package():
    assert invoke("--version").stdout == f"fastvgg {fastvgg.__version__}\n"


@pytest.mark.parametrize(
    "command", [None, "preprocess", "restore", "verify", "info", "bench", "demo"]
)
def test_help_contains_an_example(command):
    result = invoke(*([command] if command else []), "--help")
    assert result.exit_code == 0
    assert command is None or f"Example: fastvgg {command} " in result.stdout


# In place


def floats_of(batch):
    """Return the images as float32, which can be converted in place."""
    return batch.astype(np.float32)


@pytest.fixture
def floats(tmp_path):
    return save_npy(tmp_path / "floats.npy", floats_of(pixels(11)))


def in_place(transform):
    """Return the expected file content: the floats transformed by the oracle."""
    return npy_bytes(oracle.apply(transform, floats_of(pixels(11))))


@pytest.mark.parametrize("mode", ["caffe", "tf", "torch"])
def test_file_is_preprocessed_and_restored_in_place(floats, mode):
    before = floats.read_bytes()
    options = ["--in-place", "--json", *options_for_chunks(4, "in place")]
    changed = invoke("preprocess", floats, "--mode", mode, *options)
    assert changed.exit_code == 0
    answer = json.loads(changed.stdout)
    assert answer["counts"] == {"images": 11, "failed": 0, "chunks": 3, "computed_chunks": 3}
    assert answer["target"] == str(floats)
    assert floats.read_bytes() == in_place(Transform(mode))
    assert names_in(floats.parent) == ["floats.npy", "floats.npy.fastvgg.json"]
    manifest = json.loads(manifest_path(floats).read_bytes())
    assert manifest["job"]["result"]["in_place"] is True
    verified = invoke("verify", floats)
    assert verified.exit_code == 0
    assert "11 images in 3 chunks matched the checksums" in verified.stdout
    assert "overwritten in place" in verified.stdout
    restored = invoke("restore", floats, *options)  # the manifest knows the mode
    assert restored.exit_code == 0
    assert json.loads(restored.stdout)["counts"] == answer["counts"]
    assert floats.read_bytes() == before
    assert names_in(floats.parent) == ["floats.npy", "floats.npy.fastvgg.json"]


def test_foreign_file_is_restored_in_place_in_the_given_mode(tmp_path):
    values = np.random.default_rng(1).normal(0, 200, (5, 7, 9, 3)).astype(np.float32)
    path = save_npy(tmp_path / "y.npy", values)
    options = ["--mode", "torch", "--rounding", "truncate", "--in-place"]
    assert invoke("restore", path, *options).exit_code == 0
    transform = Transform("torch", "restore", dtype="float32", rounding="truncate")
    assert path.read_bytes() == npy_bytes(oracle.apply(transform, values))


def test_in_place_preprocess_works_in_a_subprocess(floats):
    done = run_command("preprocess", floats, "--in-place", "--model", "vgg19")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"{floats}: 11 images in ")
    assert floats.read_bytes() == in_place(Transform("caffe"))


@pytest.mark.parametrize("command", ["preprocess", "restore"])
def test_second_in_place_run_exits_with_3_and_changes_nothing(floats, command):
    assert invoke("preprocess", floats, "--mode", "caffe", "--in-place").exit_code == 0
    if command == "restore":
        assert invoke("restore", floats, "--in-place").exit_code == 0
    before, applied = (
        tree(floats.parent),
        {"preprocess": "preprocessed", "restore": "restored"}[command],
    )
    # In the same mode, another mode, or none.
    for options in ([], ["--mode", "caffe"], ["--mode", "tf"], ["--restart"]):
        result = invoke(command, floats, "--in-place", *options)
        result.returncode = result.exit_code
        check_refused(3, contains=[floats, f"already {applied}"], result=result)
        assert tree(floats.parent) == before


@pytest.mark.parametrize("command", ["preprocess", "restore"])
def test_in_place_dry_run_writes_nothing(floats, command):
    if command == "restore":
        assert invoke("preprocess", floats, "--mode", "caffe", "--in-place").exit_code == 0
    before, times = tree(floats.parent), floats.stat().st_mtime_ns
    options = ["--mode", "caffe", "--in-place", "--dry-run"]
    result = invoke(command, floats, *options)
    assert (result.exit_code, result.stderr) == (0, "")
    assert f"{floats} -> {floats}" in result.stdout
    assert "twice, in place" in result.stdout
    plan = json.loads(invoke(command, floats, *options, "--json").stdout)
    assert (plan["images"], plan["result"]["in_place"]) == (11, True)
    assert plan["projected_bytes"] == RUN_BYTES + 11 * 3 * 756
    assert (tree(floats.parent), floats.stat().st_mtime_ns) == (before, times)


@pytest.mark.parametrize(
    ("command", "rounding"),
    [("preprocess", "nearest"), ("restore", "nearest"), ("restore", "truncate")],
)
def test_info_shows_the_command_that_finishes_an_in_place_run(tmp_path, command, rounding):
    path = tmp_path / "some floats.npy"  # a name that needs shell quoting
    values = pixels(11).astype(np.float32) - (40 if command == "restore" else 0)
    save_npy(path, values)
    transform = Transform("torch", command, dtype="float32", rounding=rounding)
    settings = {"mode": "torch", "direction": command, "rounding": rounding, "in_place": True}
    with pytest.raises(SimulatedCrash):
        run(plan_of(path, None, images_per_chunk=4, **settings), storage=InterruptedStorage(2))
    before = tree(tmp_path)
    reported = invoke("info", path)
    assert reported.exit_code == 0
    assert re.search(r"state +unfinished in place\n", reported.stdout)
    assert re.search(r"committed_chunks +2\n", reported.stdout)
    assert re.search(r"chunks +3\n", reported.stdout)
    assert re.search(r"mode +torch\n", reported.stdout)
    known = json.loads(invoke("info", path, "--json").stdout)
    assert (known["state"], known["committed_chunks"]) == ("unfinished in place", 2)
    # Until then other commands reject it.
    for arguments in (["verify", path], ["restore", path, tmp_path / "z.npy", "--mode", "tf"]):
        result = invoke(*arguments)
        result.returncode = result.exit_code
        check_refused(3, contains=[path, "in place", "finish it"], result=result)
    assert tree(tmp_path) == before
    name, *arguments = shlex.split(known["next"].partition("using the file: ")[2])
    assert name == "fastvgg"
    finished = invoke(*arguments, "--json")
    assert json.loads(finished.stdout)["counts"]["computed_chunks"] == 1
    assert path.read_bytes() == npy_bytes(oracle.apply(transform, values))
    assert "finished" in invoke("info", path).stdout


# Durability


@pytest.mark.parametrize("kind", ["preprocess", "restore", "in place"])
@pytest.mark.parametrize("options", [[], ["--fsync"], ["--no-fsync"]])
def test_no_fsync_disables_syncing(tmp_path, array, floats, options, kind):
    stored = tmp_path / "y.npy"
    plan_of(array, stored, mode="caffe").run()
    arguments = {
        "preprocess": ["preprocess", array, tmp_path / "z.npy", "--mode", "caffe"],
        "restore": ["restore", stored, tmp_path / "z.npy"],
        "in place": ["preprocess", floats, "--in-place", "--mode", "caffe"],
    }[kind]
    with system_calls(FaultyOs()) as system:
        assert invoke(*arguments, *options).exit_code == 0
    assert "pwrite" in system.calls
    assert ("fsync" in system.calls) == (options != ["--no-fsync"])
    expected = {
        "preprocess": npy_bytes(network_inputs(pixels(11), "caffe")),
        "restore": array.read_bytes(),
        "in place": in_place(Transform("caffe")),
    }
    assert (floats if kind == "in place" else tmp_path / "z.npy").read_bytes() == expected[kind]


# Exit codes


def check_refused(code, *arguments, contains=(), result=None):
    """Check the exit code and that the error is a problem and a remedy, without a traceback."""
    result = run_command(*arguments) if result is None else result
    assert result.returncode == code, result.stderr
    assert "Traceback" not in result.stderr + result.stdout
    for word in contains:
        assert str(word) in result.stderr
    problem, _, remedy = result.stderr.partition("\n  ")
    assert problem.startswith("fastvgg: ")
    assert remedy.strip()
    return result.stderr


def make_bad_inputs(place):
    """Make the files that the commands of `bad_inputs` name."""
    save_npy(place / "x.npy", pixels(5))
    photos = save_images(place / "photos", pixels(5))
    (place / "empty").mkdir()
    (place / "there.npy").write_text("precious")
    plan_of(photos, place / "stored.npy", mode="caffe").run()
    plan_of(place / "stored.npy", place / "back", direction="restore").run()
    save_npy(place / "floats.npy", pixels(5).astype(np.float32))
    save_npy(place / "negative.npy", network_inputs(pixels(5), "caffe"))
    save_images(place / "torn", pixels(2))
    (place / "torn" / "bad.jpg").write_bytes(b"torn")
    plan_of(place / "torn", place / "failed.npy", mode="caffe").run()
    save_images(place / "sizes" / "small", pixels(2))
    save_images(place / "sizes" / "large", pixels(2, height=9))


def bad_inputs(place):
    """Return (arguments, exit code, words of the message) by description."""
    array, photos, floats = place / "x.npy", place / "photos", place / "floats.npy"
    stored, back, negative = place / "stored.npy", place / "back", place / "negative.npy"
    with_failures, new, caffe = place / "failed.npy", place / "new.npy", ["--mode", "caffe"]
    return {
        "a missing source": (
            ["preprocess", place / "missing", new, *caffe],
            3,
            [place / "missing", "does not exist"],
        ),
        "an empty source": (
            ["preprocess", place / "empty", new, *caffe],
            3,
            [place / "empty", "contains no images"],
        ),
        "a target that exists": (
            ["preprocess", array, place / "there.npy", *caffe],
            3,
            [place / "there.npy", "exists", "move it away"],
        ),
        "a target inside the source": (
            ["preprocess", photos, photos / "y.npy", *caffe],
            3,
            [photos / "y.npy", photos],
        ),
        "a missing directory": (
            ["preprocess", array, place / "missing" / "y.npy", *caffe],
            3,
            [place / "missing", "mkdir -p"],
        ),
        "no mode": (["preprocess", array, new], 2, ["--mode"]),
        "an empty mode": (["preprocess", array, new, "--mode", ""], 2, ["''"]),
        "an unknown mode": (["preprocess", array, new, "--mode", "vgg"], 2, ["'vgg'", "caffe"]),
        "an unknown model": (
            ["preprocess", array, new, "--model", "vgg20"],
            2,
            ["'vgg20'", "fastvgg models"],
        ),
        "a mode and a model that disagree": (
            ["preprocess", array, new, "--mode", "tf", "--model", "vgg19"],
            2,
            ["tf", "vgg19", "caffe"],
        ),
        "an unknown type": (
            ["preprocess", array, new, *caffe, "--dtype", "int8"],
            2,
            ["int8", "float16"],
        ),
        "an unknown layout": (
            ["preprocess", array, new, *caffe, "--layout", "HWC"],
            2,
            ["'HWC'", "NHWC"],
        ),
        "an impossible size": (
            ["preprocess", photos, new, *caffe, "--size", "0", "5"],
            2,
            ["invalid --size 0 5", "--size 224 224"],
        ),
        "an unknown interpolation": (
            ["preprocess", photos, new, *caffe, "--interpolation", "cubic"],
            2,
            ["'cubic'", "bicubic"],
        ),
        "no amount of memory": (
            ["preprocess", array, new, *caffe, "--memory", "much"],
            2,
            ["'much'", "512MiB"],
        ),
        "too little memory": (
            ["preprocess", array, new, *caffe, "--memory", "100"],
            3,
            ["2.0 MiB", "100 B", "--memory"],
        ),
        "no threads": (
            ["preprocess", array, new, *caffe, "--threads", "0"],
            2,
            ["invalid --threads 0"],
        ),
        "an unknown rounding": (
            ["restore", stored, new, "--rounding", "up"],
            2,
            ["'up'", "nearest"],
        ),
        "restoring images": (
            ["restore", array, new, *caffe],
            3,
            [array, "nothing to restore"],
        ),
        "restoring images that are floats": (
            ["restore", floats, new, *caffe],
            3,
            [floats, "never preprocessed"],
        ),
        "restoring twice": (["restore", back, new], 3, [back, "already restored"]),
        "restoring a folder": (["restore", photos, new], 3, [photos, "network inputs", "array"]),
        "restoring a folder of several sizes": (
            ["restore", place / "sizes", new, *caffe],
            3,
            [place / "sizes", "network inputs", "array"],
        ),
        "restoring failed images with --strict": (
            ["restore", with_failures, new, "--strict"],
            3,
            [f"row 2 of {with_failures}", "bad.jpg", "without --strict", "--retry-failed"],
        ),
        "restoring failed images to files with --strict": (
            ["restore", with_failures, place / "files", "--strict"],
            3,
            [f"row 2 of {with_failures}", "bad.jpg", "without --strict", "--retry-failed"],
        ),
        "fast decoding of an array": (
            ["preprocess", array, new, *caffe, "--fast-jpeg"],
            3,
            [array, "is an array", "omit"],
        ),
        "cropping of an array": (
            ["preprocess", array, new, *caffe, "--keep-aspect-ratio"],
            3,
            [array, "is an array", "omit"],
        ),
        "fast decoding without a size": (
            ["preprocess", photos, new, *caffe, "--fast-jpeg"],
            2,
            ["--fast-jpeg requires a size", "--size 224 224"],
        ),
        "cropping without a size": (
            ["pack", photos, new, "--keep-aspect-ratio"],
            2,
            ["--keep-aspect-ratio requires a size", "--size 224 224"],
        ),
        "retrying an array": (
            ["preprocess", array, new, *caffe, "--retry-failed"],
            2,
            [array, "is an array", "omit --retry-failed"],
        ),
        "retrying and restarting": (
            ["pack", photos, new, "--retry-failed", "--restart"],
            2,
            ["--retry-failed", "--restart", "omit one of them"],
        ),
        "no target": (["preprocess", array, *caffe], 2, ["no DST", "--in-place"]),
        "no target to restore to": (["restore", stored], 2, ["no DST", "--in-place"]),
        "a target in place": (
            ["preprocess", floats, new, "--in-place", *caffe],
            2,
            ["both a DST", "--in-place"],
        ),
        "a target to restore to in place": (
            ["restore", stored, new, "--in-place"],
            2,
            ["both a DST", "--in-place"],
        ),
        "a folder in place": (
            ["preprocess", photos, "--in-place", *caffe],
            2,
            [photos, "not a .npy file"],
        ),
        "bytes in place": (
            ["preprocess", array, "--in-place", *caffe],
            2,
            [array, "uint8", "float32", "DST"],
        ),
        "another type in place": (
            ["preprocess", floats, "--in-place", "--dtype", "float16", *caffe],
            2,
            [floats, "float32", "float16", "DST"],
        ),
        "another layout in place": (
            ["preprocess", floats, "--in-place", "--out-layout", "NCHW", *caffe],
            2,
            [floats, "DST"],
        ),
        "preprocessing twice in place": (
            ["preprocess", stored, "--in-place", *caffe],
            3,
            [stored, "already preprocessed"],
        ),
        "preprocessing twice in place without a manifest": (
            ["preprocess", negative, "--in-place", *caffe],
            3,
            [negative, "may be already preprocessed"],
        ),
        "restoring images in place": (
            ["restore", floats, "--in-place", *caffe],
            3,
            [floats, "never preprocessed"],
        ),
        "restoring in another mode": (
            ["restore", stored, new, "--mode", "tf"],
            2,
            [stored, "caffe", "tf"],
        ),
        "preprocessing twice": (
            ["preprocess", stored, new, *caffe],
            3,
            [stored, "already preprocessed"],
        ),
        "preprocessing twice without a manifest": (
            ["preprocess", negative, new, *caffe],
            3,
            [negative, "may be already preprocessed"],
        ),
        "verifying what has no manifest": (["verify", array], 3, [array, "fastvgg info"]),
        "telling of nothing": (["info", place / "missing.npy"], 3, [place / "missing.npy"]),
        "a demo among other things": (["demo", place], 3, [place, "new directory"]),
    }


@pytest.fixture(scope="module")
def bad_place(tmp_path_factory):
    place = tmp_path_factory.mktemp("bad")
    make_bad_inputs(place)
    return place


# What an error must not suggest: the command has no such option, or it was not given.
NOT_SUGGESTED = {
    "restoring a folder": "--size",
    "restoring a folder of several sizes": "--size",
    "fast decoding of an array": "requires a size",
    "cropping of an array": "requires a size",
    "retrying an array": "--restart",
}


@pytest.mark.parametrize("wrong", bad_inputs(Path()))
def test_bad_input_is_rejected_with_a_message_and_nothing_is_written(bad_place, wrong):
    arguments, code, words = bad_inputs(bad_place)[wrong]
    before = tree(bad_place)
    result = invoke(*arguments)
    result.returncode = result.exit_code
    message = check_refused(code, contains=words, result=result)
    assert NOT_SUGGESTED.get(wrong, "\0") not in message
    assert tree(bad_place) == before


@pytest.mark.parametrize("wrong", sorted(bad_inputs(Path()).keys() - {"a demo among other things"}))
def test_error_is_one_object_of_json_with_the_exit_code_of_the_process(bad_place, wrong):
    arguments, code, words = bad_inputs(bad_place)[wrong]
    result = invoke(*arguments, "--json")
    error = json.loads(result.stdout)
    assert error["exit_code"] == result.exit_code == code
    text = error["problem"] + error["remedy"]
    assert all(str(word) in text for word in words)


@pytest.mark.parametrize(
    ("wrong", "code"),
    [("a missing source", 3), ("no mode", 2), ("preprocessing twice", 3)],
)
def test_subprocess_returns_the_same_exit_code(bad_place, wrong, code):
    arguments, expected, words = bad_inputs(bad_place)[wrong]
    assert code == expected
    check_refused(code, *arguments, contains=words)


@pytest.mark.parametrize("wrong", INVALID)
def test_bad_array_is_rejected_with_a_message_and_unchanged(tmp_path, wrong):
    content, words = INVALID[wrong]
    path = tmp_path / "x.npy"
    path.write_bytes(content)
    result = invoke("preprocess", path, tmp_path / "y.npy", "--mode", "caffe")
    result.returncode = result.exit_code
    check_refused(3, contains=[path, *words], result=result)
    assert tree(tmp_path) == {b"x.npy": content}


@pytest.mark.parametrize(
    "arguments",
    [["--nonsense"], ["preprocess"], ["restore"], ["nonsense"], ["verify", "--full"]],
)
def test_invalid_command_exits_with_2(arguments):
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert "Usage:" in result.stderr


@pytest.mark.parametrize("size", [["224"], ["224", "x"], ["2.5", "7"]])
def test_invalid_size_exits_with_2(tmp_path, photos, size):
    result = invoke("preprocess", photos, tmp_path / "y.npy", "--mode", "caffe", "--size", *size)
    assert result.exit_code == 2


@pytest.mark.parametrize("bad", ["truncated", "text", "empty", "dangling"])
def test_unreadable_image_exits_with_1_and_is_listed(tmp_path, photos, bad):
    path = photos / "a" / "bad.jpg"
    if bad == "dangling":
        path.symlink_to("nowhere.jpg")
    else:
        whole = (photos / "a" / "00.png").read_bytes()
        path.write_bytes({"truncated": whole[:-50], "text": b"not an image", "empty": b""}[bad])
    target = tmp_path / "y.npy"
    result = invoke("preprocess", photos, target, "--mode", "caffe")
    assert result.exit_code == 1
    assert "a/bad.jpg" in result.stderr
    assert "row 6" in result.stderr
    assert "1 could not be read" in result.stdout
    assert "a/bad.jpg" in index_path(target).read_text(encoding="utf-8")
    assert not np.load(target)[6].any()
    rerun = invoke("preprocess", photos, target, "--mode", "caffe")
    assert rerun.exit_code == 1
    assert "a/bad.jpg" in rerun.stderr
    assert rerun.stderr.endswith("rerun the same command with --retry-failed\n")
    back = invoke("restore", target, tmp_path / "back")
    assert back.exit_code == 1
    assert "--retry-failed" not in back.stderr


@pytest.mark.parametrize("count", [17, MAX_FAILURES_KEPT + 17])
def test_long_failure_list_is_truncated_and_names_the_index(tmp_path, photos, count):
    for row in range(count):
        (photos / f"bad{row:04d}.jpg").touch()
    result = invoke("preprocess", photos, tmp_path / "y.npy", "--mode", "caffe")
    assert result.exit_code == 1
    assert result.stderr.count("failed: row") == MAX_FAILURES_SHOWN
    assert f"and {count - MAX_FAILURES_SHOWN:,} more" in result.stderr
    assert str(index_path(tmp_path / "y.npy")) in result.stderr


def test_strict_exits_with_5_at_the_first_unreadable_image(tmp_path, photos):
    (photos / "bad.jpg").touch()
    target = tmp_path / "y.npy"
    result = invoke("preprocess", photos, target, "--mode", "caffe", "--strict")
    assert result.exit_code == 5
    assert str(photos / "bad.jpg") in result.stderr
    assert not target.exists()


def test_another_job_exits_with_3_and_with_0_after_restart(tmp_path, array):
    arguments = ["preprocess", array, tmp_path / "y.npy", "--mode"]
    assert invoke(*arguments, "caffe").exit_code == 0
    assert invoke(*arguments, "tf").exit_code == 3
    assert invoke(*arguments, "tf", "--restart").exit_code == 0
    rerun = invoke(*arguments, "tf")
    assert rerun.exit_code == 0
    assert "already" in rerun.stdout


def test_wrong_byte_exits_with_4(tmp_path, array):
    target = tmp_path / "y.npy"
    plan_of(array, target, mode="caffe").run()
    with target.open("r+b") as file:
        file.seek(-7, os.SEEK_END)
        file.write(b"\x77")
    message = check_refused(4, "verify", target, contains=[target, "images 0 to 10"])
    assert "checksum" in message


def test_full_disk_exits_with_3_before_and_with_5_during_the_run(tmp_path):
    plan_of(save_npy(tmp_path / "x.npy", pixels(11, 37, 41)), tmp_path / "y.npy", mode="tf").run()
    (tmp_path / "small").mkdir()
    actual = stdout_on_small_disk(
        tmp_path / "small",
        disk_bytes=512 * 1024,
        source=f"""
import json, pathlib, subprocess, sys
small = pathlib.Path({str(tmp_path / "small")!r})
(small / "other").write_bytes(bytes(490 * 1024))
reported = []
def fastvgg(*arguments):
    done = subprocess.run(
        [sys.executable, "-c", {WITHOUT_NUMBA_SCRIPT!r}, *map(str, arguments)],
        capture_output=True, text=True, check=False)
    reported.append((done.returncode, done.stderr))
fastvgg("preprocess", {str(tmp_path / "x.npy")!r}, small / "z.npy", "--mode", "caffe")
fastvgg("restore", {str(tmp_path / "y.npy")!r}, small / "out", "--threads", "1")
(small / "other").unlink()
fastvgg("restore", {str(tmp_path / "y.npy")!r}, small / "out", "--threads", "1")
print(json.dumps(reported))
""",
    )
    (before, refusal), (middle, stop), (after, silence) = json.loads(actual)
    assert (before, middle, after) == (3, 5, 0), actual
    assert "free space" in refusal
    assert "No space left on device" in stop
    assert "rerun the same command" in stop
    assert "Traceback" not in refusal + stop + silence


UNPRIVILEGED_SCRIPT = """
from tests.helpers.datasets_on_disk import drop_permission_override
from fastvgg.cli import main
drop_permission_override()
main()
"""


@pytest.mark.parametrize("closed", ["source", "its directory", "target directory", "photos"])
def test_missing_permission_exits_with_3(tmp_path, photos, closed):
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    source = save_npy(tmp_path / "in" / "x.npy", pixels(5))
    place = {
        "source": source,
        "its directory": tmp_path / "in",
        "target directory": tmp_path / "out",
        "photos": photos,
    }[closed]
    given = photos if closed == "photos" else source
    arguments = ["preprocess", given, tmp_path / "out" / "y.npy", "--mode", "caffe"]
    with permissions(place, 0o555 if closed == "target directory" else 0):
        check_refused(3, contains=[place], result=python(UNPRIVILEGED_SCRIPT, *arguments))
    assert names_in(tmp_path / "out") == []


# Internal errors


def test_traceback_option_shows_the_traceback_and_keeps_the_exit_code(tmp_path):
    arguments = ["preprocess", tmp_path / "missing", tmp_path / "y.npy", "--mode", "caffe"]
    plain, traced = run_command(*arguments), run_command(*arguments, "--traceback")
    assert "Traceback" not in plain.stderr
    assert "Traceback (most recent call last)" in traced.stderr
    assert "SourceError" in traced.stderr
    assert plain.returncode == traced.returncode == 3


FAILING_PLAN_SCRIPT = """
import sys
import fastvgg
from fastvgg import cli
def plan(*arguments, **options):
    raise {error}
fastvgg.plan = plan
sys.argv = ["fastvgg", "preprocess", "a", "b.npy", "--mode", "caffe", *sys.argv[1:]]
cli.main()
"""


def test_internal_error_has_a_remedy_and_exits_with_70():
    done = python(FAILING_PLAN_SCRIPT.format(error="ZeroDivisionError('an unforeseen thing')"))
    assert done.returncode == 70
    assert "Traceback" not in done.stderr
    assert "internal error (a bug in fastvgg)" in done.stderr
    assert "ZeroDivisionError: an unforeseen thing" in done.stderr
    assert "--traceback" in done.stderr
    assert len(done.stderr.splitlines()) == 2


def test_internal_error_shows_its_traceback_on_request():
    done = python(
        FAILING_PLAN_SCRIPT.format(error="ZeroDivisionError('an unforeseen thing')"), "--traceback"
    )
    assert done.returncode == 70
    assert "Traceback (most recent call last)" in done.stderr


@pytest.mark.parametrize("traceback", [[], ["--traceback"]])
def test_system_error_before_a_run_exits_with_3(traceback):
    done = python(
        FAILING_PLAN_SCRIPT.format(error="OSError(5, 'Input/output error', 'disk.npy')"), *traceback
    )
    assert done.returncode == 3
    assert "disk.npy" in done.stderr
    assert "EIO" in done.stderr
    assert ("Traceback" in done.stderr) == bool(traceback)


def test_closed_stdout_prints_no_traceback():
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "fastvgg", "models"],
        stdout=writing,
        stderr=subprocess.PIPE,
        text=True,
        timeout=120,
        check=False,
    )
    os.close(writing)
    assert "Traceback" not in done.stderr
    assert "internal error" not in done.stderr


@ascii_failures()
def test_undecodable_names_are_printed(tmp_path):
    photos = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    save_images(photos, pixels(5))
    (photos / "bad.jpg").touch()
    environment = {"PYTHONIOENCODING": "ascii"}
    target = photos.with_name(photos.name + ".npy")
    done = run_without_numba("preprocess", photos, target, "--mode", "caffe", env=environment)
    assert done.returncode == 1, done.stderr
    assert "bad.jpg" in done.stderr
    done = run_without_numba("info", target, env=environment)
    assert done.returncode == 0
    assert "caf" in done.stdout
    done = run_without_numba("verify", target, "--full", "--json", env=environment)
    assert done.returncode == 0


def test_warning_is_printed_as_a_note_without_source_lines(tmp_path, array):
    done = run_without_numba("preprocess", array, tmp_path / "y.npy", "--model", "EfficientNetB0")
    assert done.returncode == 0
    assert "identity" in done.stderr
    assert "warn" not in done.stderr
    assert ".py" not in done.stderr


def test_module_and_script_are_the_same_program():
    assert stdout_of("import fastvgg.__main__", "--version") == f"fastvgg {fastvgg.__version__}"
