"""What is installed: the package alone, few packages with it, types that hold outside."""

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
from tests.helpers.archives import MAX_PACKAGES, TYPED_PROGRAM, built, names_in, requirements_of
from tests.helpers.checkout import CHECKOUT


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    return built(sys.executable, tmp_path_factory.mktemp("archives"))


def test_the_wheel_holds_the_package_and_nothing_else(archives):
    names = names_in(archives["wheel"])
    rooms = {path.relative_to(CHECKOUT).as_posix() for path in rooms_of(CHECKOUT / "fastvgg")}
    described = {name for name in names if name.startswith("fastvgg-") and ".dist-info/" in name}
    assert set(names) - described == rooms
    assert {name.split(".dist-info/")[1] for name in described} == {
        *("METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE"),
    }


def rooms_of(package):
    return [path for path in package.rglob("*") if path.suffix == ".py" or path.name == "py.typed"]


def test_the_source_archive_makes_the_same_wheel(archives, tmp_path):
    names = {name.split("/", 1)[1] for name in names_in(archives["sdist"])}
    assert {"CHANGELOG.md", "LICENSE", "README.md", "fastvgg/py.typed", "pyproject.toml"} <= names
    assert {"tests/integration/test_packaging.py", "benchmarks/startup.py", "conftest.py"} <= names
    shutil.unpack_archive(archives["sdist"], tmp_path, filter="data")
    (unpacked,) = tmp_path.iterdir()
    again = built(sys.executable, tmp_path / "again", unpacked)
    assert again["wheel"].read_bytes() == archives["wheel"].read_bytes()


def test_the_core_install_is_few_packages(archives):
    found, following = {"fastvgg"}, requirements_of(archives["wheel"])
    while following:
        needed = packaging.requirements.Requirement(following.pop())
        name = packaging.utils.canonicalize_name(needed.name)
        if name in found or (needed.marker and not needed.marker.evaluate({"extra": ""})):
            continue
        found.add(name)
        following += requires(name) or []
    assert "llvmlite" in found
    assert len(found) <= MAX_PACKAGES, sorted(found)


def test_a_typed_program_outside_of_the_checkout_is_checked_against_the_installed_package(
    archives, tmp_path
):
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


def test_the_command_says_its_version():
    done = subprocess.run(
        [sys.executable, "-m", "fastvgg", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"fastvgg {fastvgg.__version__}\n"


def test_the_changelog_has_an_entry_for_this_version():
    text = (CHECKOUT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(rf"^## \[{re.escape(fastvgg.__version__)}\]", text, re.MULTILINE)
