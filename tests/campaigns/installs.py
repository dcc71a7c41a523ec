"""Install the wheel on every available Python, with the lowest and the newest dependencies.

    PATH=...:$PATH python -m tests.campaigns.installs  # takes minutes; prints counts
    python -m tests.campaigns.installs --size 1        # on one Python only

Uses those of python3.11 to python3.14 that are on PATH. Only binary packages are installed, so no
compiler is needed; `uv` resolves the lowest versions that the metadata allows. Installed packages
do not see the checkout.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import venv
from pathlib import Path

from tests.campaigns.command import main
from tests.helpers.archives import (
    MAX_PACKAGES,
    TYPED_PROGRAM,
    build_archives,
    names_in,
    requirements_of,
)

PYTHONS = ("python3.11", "python3.12", "python3.13", "python3.14")
RESOLUTIONS = ("lowest-direct", "highest")
EXTRAS = ("zarr", "hdf5", "dask", "demo")

ROUND_TRIP = """
import sys
import numpy as np
import fastvgg
from PIL import Image
from fastvgg import oracle
x = np.random.default_rng(0).integers(0, 256, (3, 5, 7, 3), np.uint8)
for mode in ("caffe", "tf", "torch"):
    for dtype in ("float16", "bfloat16", "float32", "float64"):
        for layout in ("NHWC", "NCHW"):
            transform = fastvgg.Transform(mode, out_layout=layout, dtype=dtype)
            y = fastvgg.preprocess(x, mode, out_layout=layout, dtype=dtype, backend="numba")
            assert y.tobytes() == oracle.apply(transform, x).tobytes()
            back = fastvgg.restore(y, mode, layout=layout, out_layout="NHWC", backend="numba")
            assert (back == x).all()
for number, image in enumerate(x):
    Image.fromarray(image).save(f"photos/{number}.png")
"""
COMMANDS = (
    ("--version",),
    ("--help",),
    ("preprocess", "photos", "there.npy", "--mode", "torch", "--quiet"),
    ("verify", "there.npy", "--full"),
    ("restore", "there.npy", "back.npy", "--quiet"),
    ("verify", "back.npy"),
)


def run_command(*command, cwd):
    """Run a command without this process's Python environment; return its output."""
    environment = {n: v for n, v in os.environ.items() if not n.startswith(("PYTHON", "VIRTUAL"))}
    done = subprocess.run(
        [*map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{command}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


def check_archives(directory, tool):
    """Check that the checkout and the sdist build the same wheel, with only the package in it."""
    archives = build_archives(tool, directory)
    wheel = archives["wheel"]
    names = names_in(wheel)
    assert "fastvgg/py.typed" in names
    assert all(name.startswith(("fastvgg/", "fastvgg-")) for name in names), names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    shutil.unpack_archive(archives["sdist"], directory / "unpacked", filter="data")
    (unpacked,) = (directory / "unpacked").iterdir()
    assert (
        build_archives(tool, directory / "again", unpacked)["wheel"].read_bytes()
        == wheel.read_bytes()
    )
    return wheel


class Install:
    """A virtual environment with a wheel and its requirements."""

    def __init__(self, directory, uv, python):
        self.directory = directory
        self.uv = uv
        self.python = directory / "venv" / "bin" / "python"
        (directory / "photos").mkdir(parents=True)
        run_command(uv, "venv", "--quiet", "--python", python, directory / "venv", cwd=directory)

    def add(self, wheel, resolution, extra=None):
        """Install a wheel with the lowest or newest versions of its requirements."""
        requirements = self.directory / "requirements.txt"
        requirements.write_text("\n".join(requirements_of(wheel, extra)) + "\n")
        install = (self.uv, "pip", "install", "--quiet", "--python", self.python)
        binary = ("--only-binary", ":all:")
        options = (*binary, "--resolution", resolution, "-r", requirements)
        run_command(*install, *options, cwd=self.directory)
        run_command(*install, "--no-deps", "--reinstall", wheel, cwd=self.directory)

    def packages(self):
        """Return the installed packages."""
        freeze = (self.uv, "pip", "freeze", "--quiet", "--python", self.python)
        return run_command(*freeze, cwd=self.directory).splitlines()

    def smoke_test(self):
        """Use the package in memory and on the command line; warnings are errors."""
        run_command(self.python, "-W", "error", "-c", ROUND_TRIP, cwd=self.directory)
        for command in COMMANDS:
            run_command(self.python, "-W", "error", "-m", "fastvgg", *command, cwd=self.directory)

    def check_types(self):
        """Type-check a program against the installed package."""
        install = (self.uv, "pip", "install", "--quiet", "--python", self.python, "mypy>=1.14")
        run_command(*install, cwd=self.directory)
        program = shutil.copy(TYPED_PROGRAM, self.directory)
        run_command(self.python, "-m", "mypy", "--strict", program, cwd=self.directory)

    def import_extra(self, extra):
        """Import the module that needs an extra."""
        modules = {"zarr": "datasets.zarr", "hdf5": "datasets.hdf5", "dask": "dask", "demo": "demo"}
        run_command(self.python, "-c", f"import fastvgg.{modules[extra]}", cwd=self.directory)


def campaign(_seed, size):
    """Install on at most `size` Pythons."""
    counts = dict.fromkeys(("Pythons", "installs", "installs with extras", "packages at most"), 0)
    with tempfile.TemporaryDirectory(prefix="fastvgg-installs-") as name:
        directory = Path(name)
        venv.create(directory / "tool", with_pip=True)
        tool = directory / "tool" / "bin" / "python"
        run_command(tool, "-m", "pip", "install", "--quiet", "hatchling>=1.26", "uv", cwd=directory)
        wheel = check_archives(directory / "archives", tool)
        pythons = [path for python in PYTHONS if (path := shutil.which(python))][:size]
        for python in pythons:
            counts["Pythons"] += 1
            for resolution in RESOLUTIONS:
                environment = directory / Path(python).name / resolution
                install = Install(environment, tool.with_name("uv"), python)
                install.add(wheel, resolution)
                packages = install.packages()
                assert len(packages) <= MAX_PACKAGES, packages
                counts["packages at most"] = max(counts["packages at most"], len(packages))
                install.smoke_test()
                install.check_types()
                counts["installs"] += 1
                for extra in EXTRAS:
                    install.add(wheel, resolution, extra)
                    install.import_extra(extra)
                    counts["installs with extras"] += 1
    return counts


if __name__ == "__main__":
    main(campaign, __doc__, size=len(PYTHONS))
