"""Run every benchmark, then generate the tables and figures from the results.

    python benchmarks/everything.py                       # takes hours, 40 GB of disk
    python benchmarks/everything.py --only streams growth
    python benchmarks/everything.py --quick               # benchmarks that have a quick mode

A benchmark that fails or lacks a dependency is listed at the end with the last line of its output,
as is every part that a benchmark omitted; the others still run.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

BENCHMARKS = {
    "bench": ("bench.py",),
    "c_roofline": ("c_roofline.py",),
    "stack": ("stack.py",),
    "against_numpy": ("against_numpy.py",),
    "peers": ("compare_peers.py",),
    "startup": ("startup.py",),
    "streams": ("streams.py",),
    "formats": ("formats.py",),
    "images": ("images.py",),
    "images_million": ("images.py", "--million"),
    "images_planning": ("images.py", "--planning"),
    "loading": ("loading.py",),
    "cluster": ("cluster.py",),
    "growth": ("growth.py",),
    "store_requests": ("store_requests.py",),
    "billion": ("billion.py",),
    "inverses": ("inverses.py",),
}
WITHOUT_QUICK_MODE = ("store_requests", "billion", "inverses")
FROM_RESULTS = {"tables": ("tables.py",), "plots": ("plots.py",)}
NOT_MEASURED = "not measured"


def run_and_list_failures(name, script, *options):
    """Run a program, forward its output, and return a line for each failure or omission."""
    command = [sys.executable, Path(__file__).parent / script, *options]
    last_line, failures = "no output", []
    start_seconds = time.perf_counter()
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    ) as process:
        for line in process.stdout:
            print(line, end="", flush=True)
            last_line = line.strip() or last_line
            if NOT_MEASURED in line:
                failures.append(f"{name}: {last_line}")
    print(f"{name}: {time.perf_counter() - start_seconds:.0f} s", flush=True)
    if process.returncode:
        failures.append(f"{name}: failed with exit code {process.returncode}: {last_line}")
    return failures


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=BENCHMARKS, default=[*BENCHMARKS])
    parser.add_argument("--quick", action="store_true", help="passed to each benchmark")
    arguments = parser.parse_args()
    failures = []
    for name in arguments.only:
        if arguments.quick and name in WITHOUT_QUICK_MODE:
            failures.append(f"{name}: not run, it has no quick mode")
            continue
        failures += run_and_list_failures(name, *BENCHMARKS[name], *["--quick"] * arguments.quick)
    for name, command in FROM_RESULTS.items():
        failures += run_and_list_failures(name, *command)
    print("not done:", *(failures or ["nothing"]), sep="\n  ")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
