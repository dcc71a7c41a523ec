"""The first experience of a new user: welcome, help, typos, completion, and remedies."""

from __future__ import annotations

import ast
import inspect
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
from typer.testing import CliRunner

import fastvgg
from fastvgg import errors, models
from fastvgg.cli import app
from fastvgg.cli.commands import WELCOME
from fastvgg.cli.errors import EXIT_CODES
from fastvgg.datasets.image_writer import FileFormat
from fastvgg.imaging.decode import INTERPOLATIONS
from fastvgg.transform import LAYOUTS, ROUNDINGS, STORAGE_TYPES, Mode
from tests.helpers.datasets_on_disk import pixels, save_images

pytestmark = pytest.mark.pixels

PACKAGE = Path(fastvgg.__file__).parent
README = (PACKAGE.parent / "README.md").read_text(encoding="utf-8")
COMMANDS = [command.name or command.callback.__name__ for command in app.registered_commands]
OPTION_CHOICES = {
    "--mode": [mode.name for mode in (Mode.CAFFE, Mode.TF, Mode.TORCH, Mode.IDENTITY)],
    "--dtype": STORAGE_TYPES[1:],
    "--layout": LAYOUTS,
    "--out-layout": LAYOUTS,
    "--interpolation": INTERPOLATIONS,
}


def output_of(*arguments):
    """Run a command in this process; return its exit code, stdout and stderr."""
    result = CliRunner().invoke(app, list(arguments), prog_name="fastvgg", env={"COLUMNS": "80"})
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


# The welcome


def test_command_without_arguments_prints_the_welcome():
    assert output_of() == (0, WELCOME + "\n", "")


def test_welcome_is_short_and_lists_commands_in_order_of_use():
    lines = WELCOME.splitlines()
    assert len(lines) <= 15
    commands = [shlex.split(line) for line in lines if line.startswith("  fastvgg ")]
    assert [command[1] for command in commands] == [
        *("demo", "preprocess", "restore", "verify", "info")
    ]
    assert "--help" in WELCOME


def test_commands_in_the_welcome_run_in_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_images(tmp_path / "photos", pixels(5))
    commands = [shlex.split(line) for line in WELCOME.splitlines() if line.startswith("  fastvgg ")]
    for command in commands:
        code, stdout, stderr = output_of(*command[1:])
        assert code == 0, (command, stdout, stderr)


# Help


@pytest.mark.parametrize("command", COMMANDS)
def test_command_help_has_usage_summary_example_and_exit_code_hint(command):
    code, stdout, stderr = output_of(command, "--help")
    assert (code, stderr) == (0, "")
    paragraphs = [paragraph.strip() for paragraph in stdout.split("\n\n")]
    assert paragraphs[0].startswith(f"Usage: fastvgg {command} ")
    assert re.fullmatch(r"[A-Z][^\n]+\.", paragraphs[1])
    (example,) = [text for text in paragraphs if text.startswith("Example: ")]
    assert example.startswith(f"Example: fastvgg {command}")
    assert paragraphs[-1] == "Exit codes: 'fastvgg --help' lists them."


def test_help_lists_commands_with_full_summaries_and_exit_codes():
    code, stdout, _ = output_of("--help")
    assert code == 0
    listed = dict(re.findall(r"^  (\w+) {2,}(\S.*)$", stdout.split("Commands:")[1], re.MULTILINE))
    for command in app.registered_commands:
        name = command.name or command.callback.__name__
        assert listed[name] == inspect.getdoc(command.callback).splitlines()[0]
    codes = re.findall(r"^  (\d+) ", EXIT_CODES, re.MULTILINE)
    assert codes == re.findall(r"^\| (\d+) \|", README, re.MULTILINE)
    for line in EXIT_CODES.splitlines()[1:]:
        assert line in stdout


def test_help_groups_the_options():
    stdout = output_of("preprocess", "--help")[1]
    headings = re.findall(r"^(\w+):$", stdout, re.MULTILINE)
    assert headings == ["Arguments", "Model", "Input", "Geometry", "Output", "Run"]
    assert re.findall(r"^(\w+):$", output_of("info", "--help")[1], re.MULTILINE) == [
        "Arguments",
        "Options",
    ]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_names_arguments_as_the_messages_do_and_defaults_as_they_are_typed(command):
    stdout = output_of(command, "--help")[1]
    usage = " ".join(stdout.split("\n\n")[0].split())
    assert re.fullmatch(rf"Usage: fastvgg {command} \[OPTIONS\]( [A-Z]+| \[[A-Z]+\])*", usage)
    assert not re.search(r"default:\s\(", stdout)
    assert "--traceback" in stdout


def test_help_shows_computed_defaults():
    text = " ".join(output_of("preprocess", "--help")[1].split())
    for default in ("89478485", "float32 for uint8", "that of SRC", "all available CPUs"):
        assert f"[default: {default}]" in text
    assert "[default: uint8]" in " ".join(output_of("restore", "--help")[1].split())


@pytest.mark.parametrize("command", ["preprocess", "restore", "pack"])
def test_help_of_strict_covers_images_and_stored_arrays(command):
    text = " ".join(output_of(command, "--help")[1].split())
    assert "--strict Stop at the first failed image. --" in text


def test_help_of_an_option_that_can_be_negated_is_one_line():
    stdout = output_of("preprocess", "--help")[1]
    for option in ("follow-links", "check-values", "fsync"):
        (line,) = [line for line in stdout.splitlines() if option in line]
        assert line.startswith(f"  --[no-]{option} ")
        assert line.endswith("[default: on]")


def test_help_of_the_demo_accepts_its_own_directory():
    text = " ".join(output_of("demo", "--help")[1].split())
    assert "DIR A directory, new or of a demo." in text


@pytest.mark.parametrize("command", ["preprocess", "restore", "pack"])
def test_help_lists_the_choices_of_each_option(command):
    text = " ".join(output_of(command, "--help")[1].split())
    choices = {**OPTION_CHOICES, "--rounding": ROUNDINGS, "--format": get_args(FileFormat)}
    for flag in set(re.findall(r" (--[a-z-]+) [A-Z]", text)) & set(choices):
        description = text.split(f" {flag} ")[1].split(" --")[0]
        for value in choices[flag]:
            assert value in description, flag


# Mistyped commands


@pytest.mark.parametrize(
    ("arguments", "command", "expected"),
    [
        (["nonsense"], "", "No such command 'nonsense'"),
        (["preproces"], "", "Did you mean 'preprocess'?"),
        (["--nonsense"], "", "No such option: --nonsense"),
        (["preprocess"], " preprocess", "Missing argument 'SRC'"),
        (["pack", "photos"], " pack", "Missing argument 'DST'"),
        (["preprocess", "a", "b", "--moed", "tf"], " preprocess", "--mode"),
        (["preprocess", "a", "b", "--mode"], " preprocess", "'--mode' requires an argument"),
        (["preprocess", "a", "b", "--size", "5"], " preprocess", "'--size' requires 2 arguments"),
        (["preprocess", "a", "b", "--size", "5", "x"], " preprocess", "valid int"),
        (["restore", "a", "b", "--threads", "x"], " restore", "valid int"),
        (["verify", "a", "b"], " verify", "unexpected extra argument"),
        (["info"], " info", "Missing argument 'PATH'"),
    ],
)
def test_usage_error_names_the_problem_and_the_help_command(arguments, command, expected):
    code, stdout, stderr = output_of(*arguments)
    assert (code, stdout) == (2, "")
    assert expected in stderr
    assert f"Try 'fastvgg{command} --help' for help." in stderr


# Remedies


def find_error_calls():
    """Yield the module and the constructor call of every error."""
    kinds = {name for name in dir(errors) if name.endswith("Error")}
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in kinds:
                yield path.relative_to(PACKAGE).as_posix(), node


def test_every_error_has_a_remedy():
    found = list(find_error_calls())
    assert len(found) > 100
    for module, node in found:
        problem, remedy = node.args
        is_empty = isinstance(remedy, ast.Constant) and len(remedy.value.split()) < 2
        assert not is_empty, (module, node.lineno)
        assert ast.unparse(problem) != ast.unparse(remedy), (module, node.lineno)


# Completion


def completions_of(*words):
    """Return bash's completions of the last word, by the protocol of Typer's script."""
    line = shlex.join(words) if words[-1] else shlex.join(words[:-1]) + " "
    done = subprocess.run(
        [sys.executable, "-m", "fastvgg"],
        env={
            **os.environ,
            "_FASTVGG_COMPLETE": "complete_bash",
            "COMP_WORDS": line,
            "COMP_CWORD": str(len(words) - 1),
        },
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stderr == ""
    return done.stdout.split()


def test_commands_are_completed():
    assert completions_of("fastvgg", "") == COMMANDS
    assert completions_of("fastvgg", "pre") == ["preprocess"]


def test_options_are_completed():
    assert completions_of("fastvgg", "preprocess", "--m") == [
        "--model",
        "--mode",
        "--max-pixels",
        "--missing-chunks",
        "--memory",
    ]
    assert completions_of("fastvgg", "restore", "--form") == ["--format"]


@pytest.mark.parametrize("flag", OPTION_CHOICES)
def test_option_values_are_completed(flag):
    assert sorted(completions_of("fastvgg", "preprocess", "a", "b", flag, "")) == sorted(
        OPTION_CHOICES[flag]
    )


@pytest.mark.parametrize(
    ("flag", "values"),
    [("--rounding", ROUNDINGS), ("--format", get_args(FileFormat)), ("--dtype", STORAGE_TYPES)],
)
def test_values_of_restore_options_are_completed(flag, values):
    assert sorted(completions_of("fastvgg", "restore", "a", "b", flag, "")) == sorted(values)


def test_models_are_completed():
    assert completions_of("fastvgg", "preprocess", "a", "b", "--model", "") == list(
        models.MODES_BY_MODEL
    )
    assert completions_of("fastvgg", "preprocess", "a", "b", "--model", "VGG") == ["VGG16", "VGG19"]
    assert completions_of("fastvgg", "preprocess", "a", "b", "--mode", "x") == []


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
def test_bash_completion_works(tmp_path):
    command = tmp_path / "fastvgg"
    command.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m fastvgg "$@"\n')
    command.chmod(0o755)
    script = subprocess.run(
        [command],
        env={**os.environ, "_FASTVGG_COMPLETE": "source_bash"},
        capture_output=True,
        text=True,
        check=False,
    ).stdout
    assert "complete -o default -F _fastvgg_completion fastvgg" in script
    ask = """
COMP_WORDS=(fastvgg preprocess a b --mode t) COMP_CWORD=5
_fastvgg_completion fastvgg
printf '%s\\n' "${COMPREPLY[@]}"
"""
    done = subprocess.run(
        [shutil.which("bash"), "--norc", "-c", script + ask],
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.split() == ["tf", "torch"], done.stderr
