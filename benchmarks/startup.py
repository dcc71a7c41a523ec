"""Measure startup time (imports, the command line, the first call) and the installed size.

    python benchmarks/startup.py            # takes a minute; writes results/startup.json
    python benchmarks/startup.py --quick    # few rounds; writes nothing

Runs in a new virtual environment with only the core install, so without SciPy, which Numba imports
if it is installed. Every program runs in a new process, in interleaved rounds; the figures are the
median and the interquartile range over the rounds.
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

from rows import number_of_rounds

from fastvgg.bench.timing import machine
from fastvgg.parallel import available_cpus

CHECKOUT = Path(__file__).parents[1]
RESULT = Path(__file__).parent / "results" / "startup.json"

# Programs of the environment. One that prints reports the seconds of what it is named for; for the
# others, the whole process is timed.
FIRST_CALL = """
import time
import numba
import numpy as np
x = np.zeros((1, 224, 224, 3), np.uint8)
start_seconds = time.perf_counter()
import fastvgg
fastvgg.preprocess(x, "caffe", backend="numba")
print(time.perf_counter() - start_seconds)
"""
REPEATED_CALLS = """
import sys, time
import numpy as np
x = np.zeros((1, 224, 224, 3), np.uint8)
start_seconds = time.perf_counter()
import fastvgg
for _ in range({calls}):
    fastvgg.preprocess(x, "caffe", backend="{backend}")
print(time.perf_counter() - start_seconds)
assert {calls} > 1 or "numba" not in sys.modules
"""
TIMED_IMPORT = """
import time
start_seconds = time.perf_counter()
import {name}
print(time.perf_counter() - start_seconds)
"""
PROGRAMS = {
    "python -c pass": ["python", "-c", "pass"],
    "fastvgg --help": ["fastvgg", "--help"],
    "process that imports numpy": ["python", "-c", "import numpy"],
    "process that imports fastvgg": ["python", "-c", "import fastvgg"],
    "import typer": ["python", "-c", TIMED_IMPORT.format(name="typer")],
    "import numpy": ["python", "-c", TIMED_IMPORT.format(name="numpy")],
    "import fastvgg": ["python", "-c", TIMED_IMPORT.format(name="fastvgg")],
    "import numba": ["python", "-c", TIMED_IMPORT.format(name="numba")],
    "first compiled call above import numba": ["python", "-c", FIRST_CALL],
    "one image above import numpy": [
        "python",
        "-c",
        REPEATED_CALLS.format(calls=1, backend="auto"),
    ],
    **{
        f"a thousand images one by one, {backend}": [
            *("python", "-c", REPEATED_CALLS.format(calls=1000, backend=backend))
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


def install(directory):
    """Install fastvgg; return the bin directory, the number of packages and their size."""
    venv.create(directory, with_pip=True)
    programs = directory / "bin"
    pip = [str(programs / "python"), "-m", "pip", "--quiet", "--disable-pip-version-check"]
    before = size_of(directory)
    subprocess.run([*pip, "install", str(CHECKOUT)], check=True)
    listed = subprocess.run([*pip, "freeze"], capture_output=True, text=True, check=True).stdout
    return programs, len(listed.splitlines()), size_of(directory) - before


def size_of(directory):
    """Return the size of all package files in bytes."""
    files = (path for path in directory.rglob("site-packages/**/*") if path.is_file())
    return sum(path.stat().st_size for path in files)


def seconds_of(programs, command):
    """Return the seconds that a program prints, or those of its process."""
    name, *arguments = command
    start_seconds = time.perf_counter()
    process = subprocess.run(
        [programs / name, *arguments], cwd=programs, capture_output=True, text=True, check=True
    )
    process_seconds = time.perf_counter() - start_seconds
    return float(process.stdout) if "print" in arguments[-1] else process_seconds


def time_interleaved(programs, rounds):
    """Return the seconds of every program in every round but the first, which is a warm-up."""
    durations = {name: [] for name in PROGRAMS}
    for number in range(rounds + 1):
        for name, command in PROGRAMS.items():
            seconds = seconds_of(programs, command)
            if number:
                durations[name].append(seconds)
    return durations


def print_row(name, values, target_value):
    """Print and return a row of the result."""
    low, median, high = statistics.quantiles(values, n=4)
    row = {"what": name, "median": round(median, 4), "wanted": target_value}
    row["middle_half"] = [round(low, 4), round(high, 4)]
    print(f"{name:60s} {median:7.3f} ({low:.3f} to {high:.3f})", flush=True)
    return row


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rounds", type=number_of_rounds, default=21)
    arguments = parser.parse_args()
    rounds = 5 if arguments.quick else arguments.rounds
    with tempfile.TemporaryDirectory(prefix="fastvgg-startup-") as directory:
        programs, packages, size = install(Path(directory))
        durations = time_interleaved(programs, rounds)
    seconds = [print_row(name, durations[name], MAX_SECONDS.get(name)) for name in PROGRAMS]
    ratios = [
        print_row(
            f"{ours} / {' or '.join(theirs)}",
            [
                a / min(b)
                for a, *b in zip(durations[ours], *map(durations.get, theirs), strict=True)
            ],
            target_value,
        )
        for ours, theirs, target_value in RATIOS
    ]
    print(f"{packages} packages, {size / 2**20:.0f} MiB")
    rows = [row for row in seconds + ratios if row["wanted"]]
    missed = [row["what"] for row in rows if row["median"] > row["wanted"]]
    missed += ["packages"] if packages > MAX_PACKAGES else []
    print("above target:", ", ".join(missed) or "none")
    if not arguments.quick:
        record = {"machine": machine(), "threads": available_cpus(), "rounds": rounds}
        record |= {"python": sys.version.split()[0], "packages": packages, "bytes": size}
        RESULT.write_text(
            json.dumps(record | {"seconds": seconds, "ratios": ratios}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
