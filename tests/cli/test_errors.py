"""Failures of the command line: as JSON for programs, without control characters for people."""

from __future__ import annotations

import json
import os
import re
import sys
import tarfile
import unicodedata

import pytest
from typer.testing import CliRunner

from fastvgg.cli import app
from fastvgg.stream.manifest import manifest_path
from tests.helpers.checkout import checkout_environment
from tests.helpers.datasets_on_disk import pixels, plan_of, python, save_images, save_npy
from tests.helpers.runs import interrupt_run
from tests.helpers.terminals import run_on_terminal

FIELDS = ["error", "exit_code", "problem", "remedy"]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A directory with an array in it, to which paths are relative."""
    monkeypatch.chdir(tmp_path)
    save_npy(tmp_path / "x.npy", pixels(5))
    save_images(tmp_path / "torn", pixels(2), ["a.png", "c.png"])
    (tmp_path / "torn" / "b.png").write_bytes(b"torn")
    return tmp_path


def invoke(*arguments):
    result = CliRunner().invoke(app, list(arguments), prog_name="fastvgg")
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


# JSON

FAILURES = {
    "no such command": (["nonsense"], "UsageError", 2),
    "no argument": (["pack"], "UsageError", 2),
    "no such option": (["pack", "x", "y", "--moed", "tf"], "UsageError", 2),
    "an option of two values": (["pack", "x", "y.npy", "--size", "224x224"], "UsageError", 2),
    "no source": (["pack", "missing", "y.npy"], "SourceError", 3),
    "no mode": (["preprocess", "x.npy", "y.npy"], "UsageError", 2),
    "an unknown mode": (["preprocess", "x.npy", "y.npy", "--mode", "x"], "ModeError", 2),
    "an unknown dtype": (
        ["preprocess", "x.npy", "y.npy", "--mode", "tf", "--dtype", "int8"],
        "UsageError",
        2,
    ),
    "a dtype of images": (
        ["preprocess", "x.npy", "y.npy", "--mode", "tf", "--dtype", "uint8"],
        "UsageError",
        2,
    ),
    "an unknown layout": (
        ["preprocess", "x.npy", "y.npy", "--mode", "tf", "--layout", "HWC"],
        "UsageError",
        2,
    ),
    "no directory": (["preprocess", "x.npy", "no/y.npy", "--mode", "tf"], "TargetError", 3),
    "nothing to verify": (["verify", "x.npy"], "SourceError", 3),
    "a changed file": (["verify", "changed.npy"], "VerificationError", 4),
    "a failed image": (["pack", "torn", "y.npy", "--strict"], "StoppedError", 5),
    "an array to pack": (["pack", "x.npy", "y.npy"], "UsageError", 2),
    "nothing to restore": (["restore", "x.npy", "out", "--mode", "tf"], "SourceError", 3),
    "no memory": (["verify", "x.npy", "--memory", "much"], "UsageError", 2),
    "an argument too many": (["models", "x"], "UsageError", 2),
    "nothing to describe": (["info", "missing"], "SourceError", 3),
    "a plot of another kind": (["bench", "--plot", "x.txt"], "UsageError", 2),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_failure_is_printed_as_json_and_for_people(place, failure):
    arguments, kind, code = FAILURES[failure]
    if "changed.npy" in arguments:
        plan_of("x.npy", "changed.npy", mode="tf").run()
        with (place / "changed.npy").open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"\x01")
    result = invoke(*arguments, "--json")
    assert result.exit_code == code
    record = json.loads(result.stdout)
    details = ["damaged", "differences"] if kind == "VerificationError" else []
    assert list(record) == FIELDS + details
    assert (record["error"], record["exit_code"]) == (kind, code)
    shown = " ".join(result.stderr.split())
    assert " ".join(record["problem"].split()) in shown
    assert record["remedy"].removeprefix("run ").strip("'") in shown
    assert invoke(*arguments).stdout == ""


@pytest.mark.parametrize("finished", [False, True])
def test_settings_that_differ_from_those_of_the_target_are_printed_as_json(place, finished):
    settings = {"mode": "caffe", "dtype": "float16"}
    if finished:
        plan_of("x.npy", "y.npy", **settings).run()
    else:
        interrupt_run("x.npy", "y.npy", **settings)
    result = invoke("preprocess", "x.npy", "y.npy", "--mode", "tf", "--json")
    record = json.loads(result.stdout)
    assert record["error"] == ("TargetError" if finished else "ResumeError")
    modes = record["settings"].pop("mode")
    assert (modes["then"]["name"], modes["now"]["name"]) == ("caffe", "tf")
    assert record["settings"] == {"dtype": {"then": "float16", "now": "float32"}}


def test_internal_error_is_printed_as_json():
    script = "import sys, fastvgg\nfrom fastvgg import cli\nfastvgg.plan = None\ncli.main()"
    done = python(script, "preprocess", "a", "b.npy", "--mode", "tf", "--json")
    assert done.returncode == 70
    record = json.loads(done.stdout)
    assert list(record) == FIELDS
    assert (record["error"], record["exit_code"]) == ("TypeError", 70)
    assert record["problem"] in done.stderr


@pytest.mark.parametrize(
    "interrupted",
    ["fastvgg.plan", "cli.errors.Command.parse_args", "cli.errors.Commands.main"],
)
def test_interruption_is_printed_as_json_whenever_it_comes(interrupted):
    script = f"""
import os, signal, fastvgg
from fastvgg import cli
{interrupted} = lambda *arguments, **options: os.kill(os.getpid(), signal.SIGINT)
cli.main()
"""
    done = python(script, "preprocess", "a", "b.npy", "--mode", "tf", "--json")
    assert done.returncode == 130
    error = json.loads(done.stdout)
    assert (error["error"], error["exit_code"]) == ("KeyboardInterrupt", 130)
    assert "interrupted" in done.stderr


# The size, written in other ways


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        (["--size", "224x112"], "--size 224 112"),
        (["--size", "224X112", "--mode", "tf"], "--size 224 112"),
        (["--size=224,112", "--mode", "tf"], "--size 224 112"),
        (["--mode", "tf", "--size", "224"], "--size 224 224"),
        (["--size", "224", "--mode", "tf"], "--size 224 224"),
        (["--size=64", "--mode", "tf"], "--size 64 64"),
    ],
)
def test_size_written_otherwise_is_refused_with_the_spelling_to_use(place, written, meant):
    result = invoke("preprocess", ".", "y.npy", *written)
    assert result.exit_code == 2
    assert f"Did you mean '{meant}'?" in result.stderr


def test_size_without_numbers_is_refused_without_a_suggestion(place):
    result = invoke("preprocess", ".", "y.npy", "--size", "big", "small")
    assert result.exit_code == 2
    assert "mean" not in result.stderr


# --strict on a finished dataset


def test_strict_reports_the_failures_of_a_finished_dataset(place):
    save_images(place / "photos", pixels(4))
    (place / "photos" / "bad.png").write_bytes(b"nothing")
    command = ["pack", "photos", "y.npy", "--size", "7", "9"]
    assert invoke(*command).exit_code == 1
    assert invoke(*command).exit_code == 1
    before = (place / "y.npy").read_bytes()
    result = invoke(*command, "--strict")
    assert result.exit_code == 3
    assert "row 4, bad.png" in result.stderr
    assert "--retry-failed" in result.stderr
    assert (place / "y.npy").read_bytes() == before


# Names and records that anyone may have chosen

HOSTILE = "a\x1b[2J\x07\r\x9b31m\u202egpj\x7f\n\u2028é"


def control_characters(text):
    """Return the characters other than a line feed that a terminal acts upon."""
    return {
        character
        for character in text.replace("\n", "")
        if unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp")
        or unicodedata.bidirectional(character) in ("RLO", "LRO", "RLE", "LRE", "RLI", "LRI")
    }


def hostile_place(place):
    """Make datasets of all kinds whose names and records contain control characters."""
    folder = place / f"photos {HOSTILE}"
    save_images(folder, pixels(3), [f"{HOSTILE}{n}.png" for n in range(3)])
    (folder / f"{HOSTILE}bad.png").write_bytes(b"nothing")
    (folder / f"{HOSTILE}.txt").touch()
    with tarfile.open(place / f"{HOSTILE}.tar", "w") as archive:
        archive.add(folder / f"{HOSTILE}0.png", f"in {HOSTILE}/a.png")
        archive.add(folder / f"{HOSTILE}bad.png", f"in {HOSTILE}/b.png")
    save_npy(place / f"{HOSTILE}.npy", pixels(3))
    plan_of(place / f"{HOSTILE}.npy", place / f"{HOSTILE}y.npy", mode="tf").run()
    manifest = manifest_path(place / f"{HOSTILE}y.npy")
    text = json.loads(manifest.read_text())
    text["packages"] = {HOSTILE: HOSTILE}
    manifest.write_text(json.dumps(text))
    (place / f"{HOSTILE}b.npy").write_bytes(b"\x93NUMPY\x01\x00\x20\x00" + HOSTILE.encode() * 3)
    (place / f"{HOSTILE}.gif").write_bytes(b"GIF")
    return folder


HOSTILE_COMMANDS = [
    ["pack", f"photos {HOSTILE}", f"{HOSTILE}z.npy", "--size", "7", "9"],
    ["pack", f"photos {HOSTILE}", f"{HOSTILE}d.npy", "--size", "7", "9", "--dry-run"],
    ["pack", f"photos {HOSTILE}", f"{HOSTILE}s.npy", "--size", "7", "9", "--strict"],
    ["pack", f"{HOSTILE}.tar", f"{HOSTILE}t.npy", "--size", "7", "9"],
    ["preprocess", f"{HOSTILE}.npy", f"{HOSTILE}y.npy", "--mode", "torch"],
    ["preprocess", f"{HOSTILE}.npy", f"{HOSTILE}w.npy", "--mode", HOSTILE],
    ["preprocess", f"{HOSTILE}.npy", f"{HOSTILE}w.npy", "--model", HOSTILE],
    ["preprocess", f"{HOSTILE}b.npy", f"{HOSTILE}w.npy", "--mode", "tf"],
    ["preprocess", f"{HOSTILE}.gif", f"{HOSTILE}w.npy", "--mode", "tf"],
    ["restore", f"{HOSTILE}y.npy", f"{HOSTILE}out", "--traceback"],
    ["verify", f"{HOSTILE}y.npy"],
    ["info", f"{HOSTILE}y.npy"],
    ["info", f"missing {HOSTILE}"],
    ["info", "x.npy", HOSTILE],
    [HOSTILE],
]


def test_no_control_character_of_a_name_reaches_the_terminal(place):
    hostile_place(place)
    escaped = 0
    for command in HOSTILE_COMMANDS:
        for arguments in (command, [*command, "--json"]):
            result = invoke(*arguments)
            text = result.stdout + result.stderr
            assert not control_characters(text), (arguments, text)
            escaped += "\\x1b" in text
    assert escaped > 20


def test_no_control_character_of_a_name_reaches_a_terminal_with_a_progress_bar(place):
    hostile_place(place)
    command = [sys.executable, "-m", "fastvgg", "pack", f"photos {HOSTILE}", f"{HOSTILE}z.npy"]
    shown = run_on_terminal([*command, "--size", "7", "9"], 120, **checkout_environment())
    text = re.sub(rb"\x1b\[[0-9;?]*[A-Za-z]", b"", shown.written).decode().replace("\r", "")
    assert shown.returncode == 1, shown.lines
    assert "\\x1b[2J" in text
    assert not control_characters(text)
    assert b"\x1b[2J" not in shown.written


def test_plans_and_reports_show_controls_escaped_in_python_too(place):
    folder = hostile_place(place)
    plan = plan_of(folder, place / f"{HOSTILE}q.npy", direction="pack", size=(7, 9))
    report = plan.run()
    for value in (plan, report):
        for text in (str(value), value._repr_html_()):
            assert not control_characters(text)
            assert "\\x1b" in text


def test_warnings_are_notes_without_control_characters():
    script = f"""
import fastvgg, warnings
from fastvgg import cli
def plan(*arguments, **options):
    warnings.warn({HOSTILE!r})
    raise ZeroDivisionError({HOSTILE!r})
fastvgg.plan = plan
cli.main()
"""
    done = python(script, "preprocess", "a", "b.npy")
    assert done.returncode == 70
    assert not control_characters(done.stderr)
    assert done.stderr.count("\\x1b") == 2


@pytest.mark.parametrize(
    "command", [["info", "x.npy"], ["restore", "x.npy", "out"], ["verify", "x.npy"]]
)
def test_no_option_is_recommended_that_the_command_lacks(place, command):
    result = invoke(*command, "--size", "3", "3")
    assert result.exit_code == 2
    assert "No such option: --size" in result.stderr
    assert "Did you mean '--size" not in result.stderr


# Memory


@pytest.mark.parametrize(
    ("arguments", "is_lower"),
    [
        (["verify", "x.npy", "--memory", "64MiB"], False),
        (["verify", "x.npy", "--memory=32MiB"], False),
        (["verify", "x.npy", "--memory", "much"], False),
        (["verify", "x.npy", "--memory", "1GiB"], True),
        (["verify", "x.npy"], True),
        (["info", "x.npy"], False),  # has no such option
    ],
)
def test_exhausted_memory_suggests_only_a_limit_lower_than_the_given_one(
    place, monkeypatch, arguments, is_lower
):
    def fail(*_arguments, **_options):
        raise MemoryError

    monkeypatch.setattr("fastvgg.verify", fail)
    monkeypatch.setattr("fastvgg.stream.info.info", fail)
    result = invoke(*arguments)
    assert result.exit_code == 3
    assert ("--memory 64MiB" in result.stderr) == is_lower
    assert "ulimit -v" in result.stderr
