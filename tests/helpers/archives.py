"""Build the wheel and the sdist of a checkout, and inspect them."""

from __future__ import annotations

import subprocess
import tarfile
import zipfile
from email.parser import Parser

from tests.helpers.checkout import CHECKOUT

TYPED_PROGRAM = CHECKOUT / "tests/helpers/typed_program.py"
MAX_PACKAGES = 18  # of the core install, including dependencies
BUILD = """
import sys
from hatchling import build
print(build.build_wheel(sys.argv[1]))
print(build.build_sdist(sys.argv[1]))
"""


def build_archives(python, directory, source=CHECKOUT):
    """Build the wheel and the sdist with a Python's hatchling; return their paths by kind."""
    directory.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        [python, "-c", BUILD, str(directory)],
        cwd=source,
        capture_output=True,
        text=True,
        check=True,
    )
    wheel, sdist = done.stdout.split()
    return {"wheel": directory / wheel, "sdist": directory / sdist}


def names_in(archive):
    """Return the names of the files in a wheel or an sdist."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            return wheel.namelist()
    with tarfile.open(archive) as sdist:
        return sdist.getnames()


def requirements_of(wheel, extra=None):
    """Return the requirements in the metadata of a wheel, with those of an extra."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
        metadata = Parser().parsestr(archive.read(name).decode())
    lines = [line.replace("'", '"') for line in metadata.get_all("Requires-Dist")]
    core = [line for line in lines if "extra ==" not in line]
    return core + [line.split(";")[0] for line in lines if extra and f'== "{extra}"' in line]
