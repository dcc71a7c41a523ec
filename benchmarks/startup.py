"""Startup time: imports, the command line, the first call; and the installed size.

    python benchmarks/startup.py            # a minute; writes results/startup.json
    python benchmarks/startup.py --quick    # few rounds; writes nothing

In an environment of its own with the core install alone, made with pip: no SciPy, which Numba
imports where it is installed. Every program runs in a new process, all of them in turn; the figures
are medians over the rounds and the middle half of them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

from fastvgg.bench.timing import machine
from fastvgg.parallel import available_cpus

CHECKOUT = Path(__file__).parents[1]
RESULT = Path(__file__).parent / "results" / "startup.json"

# Programs of the environment. One that prints says the seconds of what it is named for; of the
# others the whole process is meant.
FIRST_CALL = """
import time
import numba
import numpy as np
x = np.zeros((1, 224, 224, 3), np.uint8)
begun = time.perf_counter()
import fastvgg
fastvgg.preprocess(x, "caffe", backend="numba")
print(time.perf_counter() - begun)
"""
CALLS = """
import sys, time
import numpy as np
x = np.zeros((1, 224, 224, 3), np.uint8)
begun = time.perf_counter()
import fastvgg
for _ in range({calls}):
    fastvgg.preprocess(x, "caffe", backend="{backend}")
print(time.perf_counter() - begun)
assert {calls} > 1 or "numba" not in sys.modules
"""
IMPORT = """
import time
begun = time.perf_counter()
import {name}
print(time.perf_counter() - begun)
"""
PROGRAMS = {
    "python -c pass": ["python", "-c", "pass"],
    "fastvgg --help": ["fastvgg", "--help"],
    "process that imports numpy": ["python", "-c", "import numpy"],
    "process that imports fastvgg": ["python", "-c", "import fastvgg"],
    "import typer": ["python", "-c", IMPORT.format(name="typer")],
    "import numpy": ["python", "-c", IMPORT.format(name="numpy")],
    "import fastvgg": ["python", "-c", IMPORT.format(name="fastvgg")],
    "import numba": ["python", "-c", IMPORT.format(name="numba")],
    "first compiled call above import numba": ["python", "-c", FIRST_CALL],
    "one image above import numpy": ["python", "-c", CALLS.format(calls=1, backend="auto")],
    **{
        f"a thousand images one by one, {backend}": [
            *("python", "-c", CALLS.format(calls=1000, backend=backend))
        ]
        for backend in ("auto", "numpy", "numba")
    },
}
THOUSAND = "a thousand images one by one, "
RATIOS = (
    ("import fastvgg", ("import numpy",), 1.15),
    ("process that imports fastvgg", ("process that imports numpy",), 1.15),
    (f"{THOUSAND}auto", (f"{THOUSAND}numpy", f"{THOUSAND}numba"), 1.5),
)
MAX_SECONDS = {
    "fastvgg --help": 0.35,
    "first compiled call above import numba": 0.9,
    "one image above import numpy": 0.06,
}
MAX_PACKAGES = 18


def installed(place):
    """Install fastvgg; return the bin directory, the number of packages and their bytes."""
    venv.create(place, with_pip=True)
    programs = place / "bin"
    pip = [str(programs / "python"), "-m", "pip", "--quiet", "--disable-pip-version-check"]
    before = size_of(place)
    subprocess.run([*pip, "install", str(CHECKOUT)], check=True)
    listed = subprocess.run([*pip, "freeze"], capture_output=True, text=True, check=True).stdout
    return programs, len(listed.splitlines()), size_of(place) - before


def size_of(place):
    """Return the bytes of all files of packages."""
    files = (path for path in place.rglob("site-packages/**/*") if path.is_file())
    return sum(path.stat().st_size for path in files)


def seconds_of(programs, command):
    """Return the seconds that a program prints, else those of its process."""
    name, *arguments = command
    started = time.perf_counter()
    done = subprocess.run(
        [programs / name, *arguments], cwd=programs, capture_output=True, text=True, check=True
    )
    whole = time.perf_counter() - started
    return float(done.stdout) if "print" in arguments[-1] else whole


def time_interleaved(programs, rounds):
    """Return the seconds of every program in every round; the first of each is not counted."""
    taken = {name: [] for name in PROGRAMS}
    for number in range(rounds + 1):
        for name, command in PROGRAMS.items():
            seconds = seconds_of(programs, command)
            if number:
                taken[name].append(seconds)
    return taken


def row(name, values, wanted):
    """Return a line of the result, printed as well."""
    low, middle, high = statistics.quantiles(values, n=4)
    line = {"what": name, "median": round(middle, 4), "wanted": wanted}
    line["middle_half"] = [round(low, 4), round(high, 4)]
    print(f"{name:60s} {middle:7.3f} ({low:.3f} to {high:.3f})", flush=True)
    return line


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rounds", type=int, default=21)
    arguments = parser.parse_args()
    rounds = 5 if arguments.quick else arguments.rounds
    with tempfile.TemporaryDirectory(prefix="fastvgg-startup-") as place:
        programs, packages, size = installed(Path(place))
        taken = time_interleaved(programs, rounds)
    seconds = [row(name, taken[name], MAX_SECONDS.get(name)) for name in PROGRAMS]
    ratios = [
        row(
            f"{ours} / {' or '.join(theirs)}",
            [a / min(b) for a, *b in zip(taken[ours], *map(taken.get, theirs), strict=True)],
            wanted,
        )
        for ours, theirs, wanted in RATIOS
    ]
    print(f"{packages} packages, {size / 2**20:.0f} MiB")
    rows = [line for line in seconds + ratios if line["wanted"]]
    missed = [line["what"] for line in rows if line["median"] > line["wanted"]]
    missed += ["packages"] if packages > MAX_PACKAGES else []
    print("above what is wanted:", ", ".join(missed) or "none")
    if not arguments.quick:
        record = {"machine": machine(), "threads": available_cpus(), "rounds": rounds}
        record |= {"python": sys.version.split()[0], "packages": packages, "bytes": size}
        RESULT.write_text(
            json.dumps(record | {"seconds": seconds, "ratios": ratios}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
