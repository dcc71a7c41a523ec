"""Install the wheel on every available Python, with the lowest and the newest dependencies.

    PATH=...:$PATH python -m tests.campaigns.installs  # some minutes; prints its counts
    python -m tests.campaigns.installs --size 1        # on one Python alone

Of python3.11 to python3.14 those are taken that PATH has. Only binary packages are installed, so
that no compiler is needed; `uv` finds the lowest versions that the metadata allows. Nothing that is
installed sees the checkout.
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


def check_archives(place, tool):
    """The same wheel from the checkout and from the source archive, with the package alone."""
    made = build_archives(tool, place)
    wheel = made["wheel"]
    names = names_in(wheel)
    assert "fastvgg/py.typed" in names
    assert all(name.startswith(("fastvgg/", "fastvgg-")) for name in names), names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    shutil.unpack_archive(made["sdist"], place / "unpacked", filter="data")
    (unpacked,) = (place / "unpacked").iterdir()
    assert (
        build_archives(tool, place / "again", unpacked)["wheel"].read_bytes() == wheel.read_bytes()
    )
    return wheel


class Install:
    """An environment of its own, with a wheel and what it needs."""

    def __init__(self, place, uv, python):
        self.place = place
        self.uv = uv
        self.python = place / "venv" / "bin" / "python"
        (place / "photos").mkdir(parents=True)
        run_command(uv, "venv", "--quiet", "--python", python, place / "venv", cwd=place)

    def add(self, wheel, resolution, extra=None):
        """Install a wheel with its requirements, at their lowest or newest."""
        wanted = self.place / "requirements.txt"
        wanted.write_text("\n".join(requirements_of(wheel, extra)) + "\n")
        install = (self.uv, "pip", "install", "--quiet", "--python", self.python)
        binary = ("--only-binary", ":all:")
        run_command(*install, *binary, "--resolution", resolution, "-r", wanted, cwd=self.place)
        run_command(*install, "--no-deps", "--reinstall", wheel, cwd=self.place)

    def packages(self):
        """What is installed, by name."""
        freeze = (self.uv, "pip", "freeze", "--quiet", "--python", self.python)
        return run_command(*freeze, cwd=self.place).splitlines()

    def smoke_test(self):
        """Use what is installed, in memory and on the command line; warnings are errors."""
        run_command(self.python, "-W", "error", "-c", ROUND_TRIP, cwd=self.place)
        for command in COMMANDS:
            run_command(self.python, "-W", "error", "-m", "fastvgg", *command, cwd=self.place)

    def check_types(self):
        """Check a typed program against what is installed."""
        install = (self.uv, "pip", "install", "--quiet", "--python", self.python, "mypy>=1.14")
        run_command(*install, cwd=self.place)
        program = shutil.copy(TYPED_PROGRAM, self.place)
        run_command(self.python, "-m", "mypy", "--strict", program, cwd=self.place)

    def import_extra(self, extra):
        """Import the module that needs an extra."""
        modules = {"zarr": "datasets.zarr", "hdf5": "datasets.hdf5", "dask": "dask", "demo": "demo"}
        run_command(self.python, "-c", f"import fastvgg.{modules[extra]}", cwd=self.place)


def campaign(_seed, size):
    """Install on at most `size` Pythons."""
    counts = dict.fromkeys(("Pythons", "installs", "with extras", "most packages"), 0)
    with tempfile.TemporaryDirectory(prefix="fastvgg-installs-") as name:
        place = Path(name)
        venv.create(place / "tool", with_pip=True)
        tool = place / "tool" / "bin" / "python"
        run_command(tool, "-m", "pip", "install", "--quiet", "hatchling>=1.26", "uv", cwd=place)
        wheel = check_archives(place / "archives", tool)
        pythons = [found for python in PYTHONS if (found := shutil.which(python))][:size]
        for python in pythons:
            counts["Pythons"] += 1
            for resolution in RESOLUTIONS:
                where = place / Path(python).name / resolution
                install = Install(where, tool.with_name("uv"), python)
                install.add(wheel, resolution)
                packages = install.packages()
                assert len(packages) <= MAX_PACKAGES, packages
                counts["most packages"] = max(counts["most packages"], len(packages))
                install.smoke_test()
                install.check_types()
                counts["installs"] += 1
                for extra in EXTRAS:
                    install.add(wheel, resolution, extra)
                    install.import_extra(extra)
                    counts["with extras"] += 1
    return counts


if __name__ == "__main__":
    main(campaign, __doc__, size=len(PYTHONS))
