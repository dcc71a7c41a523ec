"""Typed errors: what a program can catch, and the exit codes of the command line."""

from __future__ import annotations

import errno

import pytest

from fastvgg import errors

EXIT_CODES = {
    "FastvggError": 3,
    "UsageError": 2,
    "ArrayError": 3,
    "ShapeError": 3,
    "DtypeError": 3,
    "OutputError": 3,
    "ModeError": 2,
    "BackendError": 3,
    "ClusterError": 3,
    "SourceError": 3,
    "TargetError": 3,
    "ResumeError": 3,
    "VerificationError": 4,
    "StoppedError": 5,
}


@pytest.mark.parametrize("name", sorted(EXIT_CODES))
def test_every_error_has_its_documented_exit_code(name):
    error = getattr(errors, name)("what is wrong", "the way out")
    assert isinstance(error, errors.FastvggError)
    assert error.exit_code == EXIT_CODES[name]
    assert (error.problem, error.remedy) == ("what is wrong", "the way out")
    assert str(error) == "what is wrong\nthe way out"


def test_every_public_error_is_in_the_table():
    classes = {name for name in vars(errors) if name.endswith("Error")}
    assert classes == set(EXIT_CODES)


@pytest.mark.parametrize(
    ("name", "builtin"),
    [
        ("UsageError", ValueError),
        ("ArrayError", ValueError),
        ("ShapeError", ValueError),
        ("DtypeError", ValueError),
        ("DtypeError", TypeError),
        ("OutputError", ValueError),
        ("ModeError", ValueError),
        ("BackendError", RuntimeError),
    ],
)
def test_errors_subclass_builtin_exceptions(name, builtin):
    assert issubclass(getattr(errors, name), builtin)


@pytest.mark.parametrize("name", ["ShapeError", "DtypeError", "OutputError"])
def test_batch_errors_subclass_array_error(name):
    assert issubclass(getattr(errors, name), errors.ArrayError)


def test_stopped_error_reports_call_file_offset_and_reason():
    cause = OSError(errno.ENOSPC, "No space left on device")
    error = errors.StoppedError.from_os_error(cause, "pwrite", "train.npy", 4096)
    assert "train.npy: pwrite at offset 4096 failed" in error.problem
    assert "No space left on device (ENOSPC)" in error.problem
    assert "rerun the same command" in error.remedy


def test_stopped_error_without_errno_reports_call_and_file():
    error = errors.StoppedError.from_os_error(OSError("torn"), "fsync", "train.npy", 0)
    assert "train.npy: fsync at offset 0 failed" in error.problem
