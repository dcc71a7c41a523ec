"""The installed package: its files, few dependencies, and types for other programs."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from importlib.metadata import requires

import packaging.requirements
import packaging.utils
import pytest

import fastvgg
from tests.helpers.archives import (
    MAX_PACKAGES,
    TYPED_PROGRAM,
    build_archives,
    names_in,
    requirements_of,
)
from tests.helpers.checkout import CHECKOUT


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    return build_archives(sys.executable, tmp_path_factory.mktemp("archives"))


def test_wheel_contains_only_the_package(archives):
    names = names_in(archives["wheel"])
    expected = {
        path.relative_to(CHECKOUT).as_posix() for path in package_files(CHECKOUT / "fastvgg")
    }
    metadata_names = {
        name for name in names if name.startswith("fastvgg-") and ".dist-info/" in name
    }
    assert set(names) - metadata_names == expected
    assert {name.split(".dist-info/")[1] for name in metadata_names} == {
        *("METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE"),
    }


def package_files(package):
    return [path for path in package.rglob("*") if path.suffix == ".py" or path.name == "py.typed"]


def test_source_archive_builds_the_same_wheel(archives, tmp_path):
    names = {name.split("/", 1)[1] for name in names_in(archives["sdist"])}
    assert {"CHANGELOG.md", "LICENSE", "README.md", "fastvgg/py.typed", "pyproject.toml"} <= names
    assert {"tests/integration/test_packaging.py", "benchmarks/startup.py", "conftest.py"} <= names
    shutil.unpack_archive(archives["sdist"], tmp_path, filter="data")
    (unpacked,) = tmp_path.iterdir()
    rebuilt = build_archives(sys.executable, tmp_path / "rebuilt", unpacked)
    assert rebuilt["wheel"].read_bytes() == archives["wheel"].read_bytes()


def test_core_install_has_few_packages(archives):
    found, pending = {"fastvgg"}, requirements_of(archives["wheel"])
    while pending:
        needed = packaging.requirements.Requirement(pending.pop())
        name = packaging.utils.canonicalize_name(needed.name)
        if name in found or (needed.marker and not needed.marker.evaluate({"extra": ""})):
            continue
        found.add(name)
        pending += requires(name) or []
    assert "llvmlite" in found
    assert len(found) <= MAX_PACKAGES, sorted(found)


def test_typed_program_outside_the_checkout_passes_mypy_strict(archives, tmp_path):
    venv.create(tmp_path / "venv", symlinks=True)
    python = tmp_path / "venv" / "bin" / "python"
    (site,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    shutil.unpack_archive(archives["wheel"], site, "zip")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    program = shutil.copy(TYPED_PROGRAM, tmp_path)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "mypy", "--strict", "--python-executable", str(python)),
            *("--cache-dir", str(tmp_path / "cache"), program),
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_command_prints_its_version():
    done = subprocess.run(
        [sys.executable, "-m", "fastvgg", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"fastvgg {fastvgg.__version__}\n"


def test_changelog_has_an_entry_for_this_version():
    text = (CHECKOUT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(rf"^## \[{re.escape(fastvgg.__version__)}\]", text, re.MULTILINE)
