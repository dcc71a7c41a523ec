"""Compare every kernel with the oracle on an emulated aarch64 machine, bit for bit.

    python -m tests.campaigns.arm                           # the machine once, then every kernel
    python -m tests.campaigns.arm --cpu max                 # SVE2 instead of NEON
    python -m tests.campaigns.arm --every 7                 # a seventh: every mode, type and layout
    python -m tests.campaigns.arm --quick                   # 12 cases; keeps no record
    python -m tests.campaigns.arm --only "restore float64"  # cases by name; keeps no record

Needs root, Debian's qemu-user-static and debootstrap, and pip. The first run creates a Debian with
the packages of the core install in `--machine DIR` (0.7 GB, about 7 minutes); later runs find it
there and start in seconds. Every case takes about an hour on two cores, `--every 7` eight minutes,
`--quick` one. Emulation proves bits, and that no compilation aborts; it says nothing about speed.

A case is a mode, a direction, two storage types and two layouts, called through the public
functions with both backends. Its inputs hold all bytes, all bit patterns of a half type, or ties,
infinities, NaNs, subnormals and numbers out of range, in shapes with and without a tail. It writes
new results, into `out` at several alignments, and in place; the bytes around `out` must keep their
values. Large cases write 33 MiB into `out`, where kernels use non-temporal stores.

LLVM ends the process where one of its assertions fails. Worker processes run the cases, and one
that ends early is replaced by another that starts with the next case. The exit code is 1 if a
case differs or ends its process.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import os
import platform
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path

import numpy as np

import fastvgg
from fastvgg.bench.timing import machine
from fastvgg.parallel import available_cpus
from tests.campaigns.command import RESULTS, format_counts
from tests.helpers.batches import (
    FLOATS,
    KERAS_MODES,
    LAYOUT_PAIRS,
    dtype_of,
    filled_with,
    frozen,
    in_layout,
    unaligned,
    unchanged,
)
from tests.helpers.checkout import CHECKOUT
from tests.helpers.private_disks import mount, use_private_mounts

# The machine.
DEBIAN, PYTHON = "bookworm", "3.11"  # the Python of this Debian
GLIBC_MINORS = range(17, 37)  # of the wheels that it can load: 2.17 to its own 2.36
HANDLERS = Path("/proc/sys/fs/binfmt_misc")
HANDLER = Path("/usr/lib/binfmt.d/qemu-aarch64.conf")
BIND = 0x1000  # of mount(2)
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))

# What Linux says of an Arm Ltd. processor in /proc/cpuinfo, from where LLVM takes what to compile
# for. QEMU's `max` is no processor that LLVM knows; a Neoverse V2 has the extensions that matter.
CPUINFO = "Features\t: {}\nCPU implementer\t: 0x41\nCPU part\t: {}\n"
NEON = "fp asimd aes pmull sha1 sha2 crc32 atomics fphp asimdhp asimdrdm lrcpc dcpop asimddp"
SVE2 = "sha3 sm3 sm4 sha512 asimdfhm sve sve2 sveaes svepmull svebitperm svesha3 i8mm bf16"
CPUS = {
    "neoverse-n1": CPUINFO.format(NEON, "0xd0c"),
    "max": CPUINFO.format(f"{NEON} {SVE2}", "0xd4f"),
}

# The cases.
CUSTOM = fastvgg.Mode("own", 3.0, mean=(-0.25, 11.5, 70.7), std=(0.75, -2.5, 17.3), order="BGR")
MODES = (*KERAS_MODES, "identity", CUSTOM)
LARGE = (
    ("torch", "preprocess", "uint8", "float32", "NHWC", "NCHW"),
    ("tf", "preprocess", "uint8", "float16", "NHWC", "NHWC"),
    ("caffe", "restore", "float32", "uint8", "NHWC", "NHWC"),
)
SHAPES = ((1, 1), (3, 1), (2, 1, 3), (2, 7, 9), (4, 16), (2, 5, 13), (3, 3, 43), (2, 11, 37))
LARGE_BYTES = 33 * 2**20
LARGE_WIDTH = 1999
LINE_BYTES = 64
GUARD = 0xA5

CASES_PER_WORKER = 40
CASE_SECONDS = 600  # a case that takes longer hangs, and SIGALRM ends its process
QUICK_STEP = 77  # for 12 cases, of every mode and layout


@dataclass(frozen=True)
class Case:
    """A transform from one storage type to another: one kernel, or its in-place variant too."""

    mode: fastvgg.Mode | str
    direction: str
    source: str
    target: str
    layout: str
    out_layout: str
    rounding: str = "nearest"
    is_large: bool = False

    def __str__(self):
        mode = getattr(self.mode, "name", self.mode)
        size = ["large"] if self.is_large else []
        rounding = [self.rounding] if self.rounding != "nearest" else []
        types = f"{self.source} -> {self.target} {self.layout} -> {self.out_layout}"
        return " ".join([self.direction, types, mode, *rounding, *size])

    def apply(self, x, *, backend="numba", out=None):
        """Call the public function."""
        settings = {"layout": self.layout, "out_layout": self.out_layout, "dtype": self.target}
        settings |= {"threads": 3 if self.is_large else 1, "backend": backend, "out": out}
        if self.direction == "preprocess":
            return fastvgg.preprocess(x, self.mode, **settings)
        return fastvgg.restore(x, self.mode, rounding=self.rounding, **settings)


def all_cases():
    """Return every case, in an order that never changes: workers know them by number."""
    nearest, truncate = ["nearest"], ["truncate"]
    forward = itertools.product(["preprocess"], ("uint8", *FLOATS), FLOATS, nearest)
    inverse = itertools.product(["restore"], FLOATS, ("uint8", *FLOATS), nearest)
    truncated = itertools.product(["restore"], FLOATS, ["uint8"], truncate)
    small = [
        Case(mode, direction, source, target, *layouts, rounding)
        for direction, source, target, rounding in (*forward, *inverse, *truncated)
        for layouts in LAYOUT_PAIRS
        for mode in MODES
    ]
    return small + [Case(*large, is_large=True) for large in LARGE]


CASES = all_cases()


def values_of(case):
    """Return the elements that a case is tried on, in an order of no meaning."""
    dtype, random = dtype_of(case.source), np.random.default_rng(1)
    if case.source == "uint8":
        values = np.arange(256, dtype=dtype)
    elif dtype.itemsize == 2:
        values = np.arange(2**16, dtype=np.uint16).view(dtype)
    else:
        values = np.concatenate(
            [special_values(dtype), random_values(dtype, random), values_near_ties(case)]
        )
    return values[random.permutation(len(values))]


def special_values(dtype):
    """Return zeros, subnormals, limits, infinities, and quiet and signalling NaNs of both signs."""
    limits = np.finfo(dtype)
    numbers = [0, limits.smallest_subnormal, limits.tiny, 255, 255.5, 256, 65504, 65520, 3.4e38]
    numbers += [limits.max, np.inf, np.nan]
    infinity = np.array([np.inf], dtype).view(f"u{dtype.itemsize}")
    patterns = [
        np.array(numbers, dtype),
        (infinity + 1).view(dtype),
        (infinity + 12345).view(dtype),
    ]
    positive = np.concatenate(patterns)
    return np.concatenate([positive, -positive])


def random_values(dtype, random):
    """Return random bit patterns, and numbers of all sizes that are ties of the narrower types."""
    unsigned = f"u{dtype.itemsize}"
    patterns = random.integers(0, np.iinfo(unsigned).max, 4000, unsigned, endpoint=True)
    numbers = random.uniform(-1, 1, 4000) * 10.0 ** random.uniform(-9, 6, 4000)
    numbers = numbers.astype(dtype).view(unsigned)
    mantissa_bits = np.finfo(dtype).nmant
    dropped = [mantissa_bits - kept - 1 for kept in (7, 10, 23) if kept < mantissa_bits]
    ties = [numbers >> bits << bits for bits in dropped]
    return np.concatenate([patterns, numbers, *ties]).view(dtype)


def values_near_ties(case):
    """Return what becomes whole and half numbers from -4 to 260, and its neighbours."""
    dtype = dtype_of(case.source)
    values = np.repeat(np.arange(-8, 520) / 2, 3).reshape(1, -1, 3).astype(dtype)
    if case.direction == "restore":
        values = fastvgg.preprocess(values, case.mode, backend="numpy")
    values = values.ravel()
    down, up = (np.nextafter(values, dtype.type(end)) for end in (-np.inf, np.inf))
    return np.concatenate([down, values, up])


def batches_of(case):
    """Yield read-only inputs: one with all values, then images and batches of odd sizes."""
    values = values_of(case)
    if case.is_large:
        row_bytes = LARGE_WIDTH * 3 * dtype_of(case.target).itemsize
        shapes = [(-(-LARGE_BYTES // row_bytes), LARGE_WIDTH)]
    else:
        shapes = SHAPES
        yield filled_with(values, case.layout)
    for number, shape in enumerate(shapes):
        pixels = np.resize(np.roll(values, number), (*shape, 3))
        yield frozen(in_layout(pixels, case.layout))


def results(case, x, expected):
    """Yield the kernel's results for one input, each with how it was called."""
    for offset in (0, 1, 5):
        yield (
            f"out {offset} elements after a cache line begins",
            apply_to_guarded(case, x, expected, offset),
        )
    if case.is_large:
        return
    yield "new result", case.apply(x)
    yield "unaligned input", case.apply(unaligned(x))
    yield "strided input", case.apply(np.repeat(x, 2, axis=-1)[..., ::2])
    if (case.source, case.layout) == (case.target, case.out_layout):
        y = x.copy()
        yield "in place", case.apply(y, out=y)


def apply_to_guarded(case, x, expected, offset):
    """Return a result in `out`, so many elements after a cache line begins, between guards."""
    memory = np.full(expected.nbytes + 4 * LINE_BYTES, GUARD, np.uint8)
    start = -memory.ctypes.data % LINE_BYTES + LINE_BYTES + offset * expected.itemsize
    stop = start + expected.nbytes
    out = memory[start:stop].view(expected.dtype).reshape(expected.shape)
    case.apply(x, out=out)
    assert (memory[:start] == GUARD).all(), "bytes before out have changed"
    assert (memory[stop:] == GUARD).all(), "bytes after out have changed"
    return out


def differences(case):
    """Yield a description of each difference from the oracle."""
    for x in batches_of(case):
        expected = case.apply(x, backend="numpy")
        with unchanged(x):
            for how, actual in results(case, x, expected):
                if found := difference(actual, expected):
                    yield f"{found}; shape {x.shape}, {how}"


def difference(actual, expected):
    """Describe the first differing element of two arrays and the number of differences."""
    actual, expected = (each.view(f"u{each.itemsize}").ravel() for each in (actual, expected))
    (at,) = np.nonzero(actual != expected)
    if not len(at):
        return ""
    first = f"{actual[at[0]]:#x} instead of {expected[at[0]]:#x}"
    return f"{len(at)} of {len(actual)} elements, first {first}"


def work(numbers):
    """Run cases in this process on the emulated machine; print a line before and after each."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for number in numbers:
        signal.alarm(CASE_SECONDS)
        print_line(f"begin {number}")
        for found in differences(CASES[number]):
            print_line(f"differs {number} {found}")
        print_line(f"end {number}")


def print_versions():
    """Print what this process, on the emulated machine, runs on."""
    packages = {
        name: metadata.version(name) for name in ("numba", "llvmlite", "numpy", "ml_dtypes")
    }
    print_line(
        json.dumps({"machine": platform.machine(), "python": platform.python_version()} | packages)
    )


def print_line(line):
    """Print a line and flush."""
    print(line, flush=True)  # noqa: T201  # what a campaign is for


class Machine:
    """A Debian for aarch64 in a directory, whose programs QEMU runs in user mode.

    Parameters
    ----------
    place
        The directory, which later runs use again.
    cpu
        What QEMU emulates: one of `CPUS`.
    """

    def __init__(self, place, cpu):
        self.root = place / f"{DEBIAN}-arm64"
        self._cpu = cpu
        self._cpuinfo = place / f"cpuinfo-{cpu}"
        self._installed = place / "installed.txt"

    def set_up(self):
        """Create what is missing of the machine, and copy the checkout into its memory.

        All mounts are private to this process and its children, and vanish with them.
        """
        use_private_mounts()
        register_handler()
        if not self.root.exists():
            self._bootstrap()
        mount("none", self.root / "proc", "proc")
        self._cpuinfo.write_text(CPUS[self._cpu])
        mount(self._cpuinfo, self.root / "proc" / "cpuinfo", "none", BIND)
        requirements = core_requirements()
        if not self._installed.exists() or self._installed.read_text() != requirements:
            self._install(requirements)
        self._copy_checkout()

    def run(self, *command):
        """Run a command on the machine; return the finished process."""
        environment = {
            "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
            "HOME": "/root",
            "LANG": "C.UTF-8",
            "PYTHONPATH": "/checkout",
            "QEMU_CPU": self._cpu,
        }
        return subprocess.run(
            ["chroot", self.root, *command],  # noqa: S607  # where root has it
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )

    def python(self, source):
        """Run Python source on the machine; return the finished process."""
        return self.run("/venv/bin/python", "-c", source)

    def versions(self):
        """Return what Python runs on there."""
        return json.loads(
            check_output(self.python("from tests.campaigns import arm; arm.print_versions()"))
        )

    def _bootstrap(self):
        print_line("creating the emulated machine")
        self._installed.unlink(missing_ok=True)
        unfinished = self.root.with_suffix(".unfinished")
        if unfinished.exists():
            shutil.rmtree(unfinished)
        unfinished.mkdir(parents=True)
        options = ("--arch=arm64", "--variant=minbase", "--include=python3,python3-venv")
        output_of("debootstrap", *options, DEBIAN, unfinished, debian_mirror())
        (unfinished / "checkout").mkdir()
        unfinished.rename(self.root)

    def _install(self, requirements):
        print_line("installing the packages of the core install there")
        wheels = self.root / "wheels"
        shutil.rmtree(wheels, ignore_errors=True)
        platforms = [f"--platform=manylinux_2_{minor}_aarch64" for minor in GLIBC_MINORS]
        kind = ("--only-binary=:all:", f"--python-version={PYTHON}", "--implementation=cp")
        wanted = (*platforms, "--platform=manylinux2014_aarch64", *kind, *requirements.splitlines())
        output_of(sys.executable, "-m", "pip", "download", f"--dest={wheels}", *wanted)
        found = ("--no-index", "--find-links=/wheels", *requirements.splitlines())
        check_output(self.run("python3", "-m", "venv", "--clear", "/venv"))
        check_output(self.run("/venv/bin/pip", "install", *found))
        self._installed.write_text(requirements)

    def _copy_checkout(self):
        mount("none", self.root / "checkout", "tmpfs")
        listed = ("--cached", "--others", "--exclude-standard", "fastvgg", "tests")
        for name in output_of("git", "-C", CHECKOUT, "ls-files", "-z", *listed).split("\0"):
            if (CHECKOUT / name).is_file():
                copy = self.root / "checkout" / name
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(CHECKOUT / name, copy)


def output_of(*command):
    """Return what a command prints; stop with its output if it fails."""
    return check_output(subprocess.run(command, capture_output=True, text=True, check=False))


def check_output(done):
    """Return what a process printed; stop with its last lines if it failed."""
    if done.returncode:
        last = (done.stdout + done.stderr)[-2000:]
        raise SystemExit(f"{done.args}: exit code {done.returncode}\n{last}")
    return done.stdout


def register_handler():
    """Let Linux start programs for aarch64 with QEMU."""
    if not (HANDLERS / "register").exists():
        mount("none", HANDLERS, "binfmt_misc")
    if not (HANDLERS / HANDLER.stem).exists():
        (HANDLERS / "register").write_text(HANDLER.read_text())


def debian_mirror():
    """Return a mirror of Debian from which apt installs on this machine."""
    wanted = ("Created-By: Packages", "Label: Debian", "Component: main")
    found = output_of("apt-get", "indextargets", "--format", "$(REPO_URI)", *wanted).split()
    if not found:
        raise SystemExit("apt knows no mirror of Debian: run apt-get update")
    return found[0]


def core_requirements():
    """Return the requirements of the core install, one per line."""
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]
    return "\n".join(project["dependencies"])


def check_prerequisites():
    """Stop where something is missing that the campaign needs."""
    if os.geteuid() != 0:
        raise SystemExit("arm.py enters another root directory: run it as root")
    if not HANDLER.exists() or not shutil.which("debootstrap"):
        raise SystemExit("install what emulates: apt-get install qemu-user-static debootstrap")
    if not importlib.util.find_spec("pip"):
        raise SystemExit(f"install pip: {sys.executable} -m ensurepip")


def run_cases(emulated, numbers):
    """Run cases in a worker, and in another one after a case that ended it.

    Returns
    -------
    differing, aborts : dict
        By the number of a case, its first difference, or the last words of its process.
    """
    differing, aborts, left = {}, {}, list(numbers)
    while left:
        done = emulated.python(f"from tests.campaigns import arm; arm.work({left})")
        lines = [line.split(" ", 2) for line in done.stdout.splitlines()]
        for _, number, found in (line for line in lines if line[0] == "differs"):
            differing.setdefault(int(number), found)
        left = [number for number in left if ["end", str(number)] not in lines]
        if left and ["begin", str(left[0])] not in lines:
            check_output(done)
        if left:
            aborts[left.pop(0)] = (
                f"{describe_exit(done.returncode)} {last_error_line(done.stderr)}".strip()
            )
    return differing, aborts


def describe_exit(returncode):
    """Describe how a process ended."""
    return signal.Signals(-returncode).name if returncode < 0 else f"exit code {returncode}"


def last_error_line(errors):
    """Return the last line of a process's errors that is its own, without names of folders."""
    lines = [line for line in errors.splitlines() if not line.startswith("qemu: ")]
    return re.sub(r"\S*/", "", lines[-1]) if lines else ""


def campaign(emulated, numbers):
    """Run cases on as many workers as there are cores; return the differing ones and the aborts."""
    differing, aborts, ran = {}, {}, 0
    starts = range(0, len(numbers), CASES_PER_WORKER)
    shares = [numbers[start : start + CASES_PER_WORKER] for start in starts]
    with ThreadPoolExecutor(available_cpus()) as workers:
        for share, found in zip(
            shares, workers.map(partial(run_cases, emulated), shares), strict=True
        ):
            differing |= found[0]
            aborts |= found[1]
            ran += len(share)
            print_line(
                f"{ran} of {len(numbers)} cases: {len(differing)} differing, {len(aborts)} aborts"
            )
    return by_case_name(differing), by_case_name(aborts)


def by_case_name(found):
    """Return what was found by the name of its case, in the order of the cases."""
    return {str(CASES[number]): found[number] for number in sorted(found)}


def parsed_arguments():
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--machine",
        type=Path,
        default=CACHE / "fastvgg-arm",
        metavar="DIR",
        help="where the emulated machine is",
    )
    parser.add_argument("--cpu", choices=CPUS, default="neoverse-n1")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="one case in N")
    parser.add_argument("--quick", action="store_true", help="some cases; keep no record")
    parser.add_argument(
        "--only", default="", metavar="TEXT", help="the cases whose name has this; keep no record"
    )
    return parser.parse_args()


def main():
    """Set up the machine, run the cases on it, and print the results."""
    arguments = parsed_arguments()
    check_prerequisites()
    emulated = Machine(arguments.machine.absolute(), arguments.cpu)
    emulated.set_up()
    numbers = range(len(CASES))[:: QUICK_STEP if arguments.quick else arguments.every]
    numbers = [number for number in numbers if arguments.only in str(CASES[number])]
    start_seconds = time.monotonic()
    differing, aborts = campaign(emulated, numbers)
    seconds = round(time.monotonic() - start_seconds, 1)
    counts = {"cases": len(numbers), "differing": len(differing), "aborts": len(aborts)}
    for name, what in (differing | aborts).items():
        print_line(f"{name}: {what}")
    print_line(f"arm {arguments.cpu}: {format_counts(counts)}, {seconds} s")
    if not (arguments.quick or arguments.only):
        record = {"machine": machine(), "QEMU_CPU": arguments.cpu, "emulated": emulated.versions()}
        record |= {"every": arguments.every}
        record |= {"counts": counts, "differing": differing, "aborts": aborts, "seconds": seconds}
        (RESULTS / "arm.json").write_text(json.dumps(record, indent=1) + "\n")
    sys.exit(1 if differing or aborts else 0)


if __name__ == "__main__":
    main()
