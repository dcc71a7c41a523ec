"""Compare every kernel with the oracle, bit for bit, on an emulated aarch64 machine.

    python -m tests.campaigns.arm                           # create the machine, run all cases
    python -m tests.campaigns.arm --cpu max                 # SVE2 instead of NEON
    python -m tests.campaigns.arm --every 7                 # 1 in 7: every mode, type and layout
    python -m tests.campaigns.arm --quick                   # 12 cases; writes no record
    python -m tests.campaigns.arm --only "restore float64"  # cases by name; writes no record

Requires root, Debian's qemu-user-static and debootstrap, and pip. The first run installs Debian and
the packages of the core install in `--machine DIR` (0.7 GB, about 7 minutes); later runs reuse it
and start in seconds. A full run takes about an hour on two cores, `--every 7` eight minutes,
`--quick` one. Emulation checks bits, and that no compilation aborts; it does not measure speed.

A case is a mode, a direction, two storage types and two layouts, run through the public functions
with both backends. Its inputs contain all bytes, all bit patterns of a half type, or ties,
infinities, NaNs, subnormals and out-of-range numbers, in shapes with and without a tail. It writes
to a new array, into `out` at several alignments, and in place, and must not change the bytes around
`out`. Large cases write 33 MiB into `out`, for which kernels use non-temporal stores.

A failed LLVM assertion aborts the process. Worker processes run the cases; a new worker replaces
one that aborts and starts with the next case. The exit code is 1 if a case differs or aborts.
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
DEBIAN, PYTHON = "bookworm", "3.11"  # the Python of this Debian release
GLIBC_MINORS = range(17, 37)  # of the wheels that it can load: 2.17 to its own glibc 2.36
HANDLERS = Path("/proc/sys/fs/binfmt_misc")
HANDLER = Path("/usr/lib/binfmt.d/qemu-aarch64.conf")
BIND = 0x1000  # MS_BIND of mount(2)
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))

# /proc/cpuinfo of an Arm Ltd. processor, which LLVM reads to detect the host. LLVM does not know
# QEMU's `max`; a Neoverse V2 has the extensions that matter.
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
CASE_SECONDS = 600  # SIGALRM ends the process of a case that takes longer
QUICK_STEP = 77  # yields 12 cases that cover every mode and layout


@dataclass(frozen=True)
class Case:
    """A transform from one storage type to another: one kernel and any in-place variant."""

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
    """Return every case in a fixed order; workers refer to cases by number."""
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
    """Return the input elements of a case, shuffled."""
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
    """Return random bit patterns, numbers of all magnitudes, and ties of the narrower types."""
    unsigned = f"u{dtype.itemsize}"
    patterns = random.integers(0, np.iinfo(unsigned).max, 4000, unsigned, endpoint=True)
    numbers = random.uniform(-1, 1, 4000) * 10.0 ** random.uniform(-9, 6, 4000)
    numbers = numbers.astype(dtype).view(unsigned)
    mantissa_bits = np.finfo(dtype).nmant
    dropped = [mantissa_bits - kept - 1 for kept in (7, 10, 23) if kept < mantissa_bits]
    ties = [numbers >> bits << bits for bits in dropped]
    return np.concatenate([patterns, numbers, *ties]).view(dtype)


def values_near_ties(case):
    """Return inputs whose results are the multiples of 0.5 from -4 to 260, and their neighbors."""
    dtype = dtype_of(case.source)
    values = np.repeat(np.arange(-8, 520) / 2, 3).reshape(1, -1, 3).astype(dtype)
    if case.direction == "restore":
        values = fastvgg.preprocess(values, case.mode, backend="numpy")
    values = values.ravel()
    down, up = (np.nextafter(values, dtype.type(end)) for end in (-np.inf, np.inf))
    return np.concatenate([down, values, up])


def batches_of(case):
    """Yield read-only inputs: one with all values, then images and batches of unusual sizes."""
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
    """Yield the kernel's results for one input, each with a description of the call."""
    for offset in (0, 1, 5):
        yield (
            f"out {offset} elements past a cache line boundary",
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
    """Return a result written to `out`, `offset` elements past a cache line, between guards."""
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
                if text := difference(actual, expected):
                    yield f"{text}; shape {x.shape}, {how}"


def difference(actual, expected):
    """Describe the first differing element of two arrays and the number of differences."""
    actual, expected = (each.view(f"u{each.itemsize}").ravel() for each in (actual, expected))
    (indices,) = np.nonzero(actual != expected)
    if not len(indices):
        return ""
    first = f"{actual[indices[0]]:#x} instead of {expected[indices[0]]:#x}"
    return f"{len(indices)} of {len(actual)} elements, first {first}"


def run_in_worker(numbers):
    """Run cases in this process, on the emulated machine; print a line before and after each."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for number in numbers:
        signal.alarm(CASE_SECONDS)
        print_line(f"begin {number}")
        for text in differences(CASES[number]):
            print_line(f"differs {number} {text}")
        print_line(f"end {number}")


def print_versions():
    """Print the architecture and the versions of Python and packages, as JSON."""
    packages = {
        name: metadata.version(name) for name in ("numba", "llvmlite", "numpy", "ml_dtypes")
    }
    print_line(
        json.dumps({"machine": platform.machine(), "python": platform.python_version()} | packages)
    )


def print_line(line):
    """Print a line and flush."""
    print(line, flush=True)  # noqa: T201  # the output of a campaign


class Machine:
    """A Debian for aarch64 in a directory, whose programs run under QEMU user-mode emulation.

    Parameters
    ----------
    directory
        Where to install Debian; later runs reuse it.
    cpu
        The emulated processor: one of `CPUS`.
    """

    def __init__(self, directory, cpu):
        self.root = directory / f"{DEBIAN}-arm64"
        self._cpu = cpu
        self._cpuinfo = directory / f"cpuinfo-{cpu}"
        self._installed = directory / "installed.txt"

    def set_up(self):
        """Create the missing parts of the machine, and copy the checkout to a tmpfs in it.

        All mounts are private to this process and its children, and disappear with them.
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
            ["chroot", self.root, *command],  # noqa: S607  # found on root's PATH
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )

    def python(self, source):
        """Run Python source on the machine; return the finished process."""
        return self.run("/venv/bin/python", "-c", source)

    def versions(self):
        """Return the architecture and the versions on the machine."""
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
        print_line("installing the packages of the core install on it")
        wheels = self.root / "wheels"
        shutil.rmtree(wheels, ignore_errors=True)
        platforms = [f"--platform=manylinux_2_{minor}_aarch64" for minor in GLIBC_MINORS]
        kind = ("--only-binary=:all:", f"--python-version={PYTHON}", "--implementation=cp")
        names = requirements.splitlines()
        options = (*platforms, "--platform=manylinux2014_aarch64", *kind)
        output_of(sys.executable, "-m", "pip", "download", f"--dest={wheels}", *options, *names)
        check_output(self.run("python3", "-m", "venv", "--clear", "/venv"))
        offline = ("--no-index", "--find-links=/wheels")
        check_output(self.run("/venv/bin/pip", "install", *offline, *names))
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
    """Return the output of a command; exit with its output if it fails."""
    return check_output(subprocess.run(command, capture_output=True, text=True, check=False))


def check_output(process):
    """Return the output of a finished process; exit with its last lines if it failed."""
    if process.returncode:
        tail = (process.stdout + process.stderr)[-2000:]
        raise SystemExit(f"{process.args}: exit code {process.returncode}\n{tail}")
    return process.stdout


def register_handler():
    """Register QEMU with binfmt_misc as the interpreter of aarch64 programs."""
    if not (HANDLERS / "register").exists():
        mount("none", HANDLERS, "binfmt_misc")
    if not (HANDLERS / HANDLER.stem).exists():
        (HANDLERS / "register").write_text(HANDLER.read_text())


def debian_mirror():
    """Return a Debian mirror that apt uses on this machine."""
    filters = ("Created-By: Packages", "Label: Debian", "Component: main")
    mirrors = output_of("apt-get", "indextargets", "--format", "$(REPO_URI)", *filters).split()
    if not mirrors:
        raise SystemExit("apt has no Debian mirror: run apt-get update")
    return mirrors[0]


def core_requirements():
    """Return the requirements of the core install, one per line."""
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]
    return "\n".join(project["dependencies"])


def check_prerequisites():
    """Exit if a prerequisite of the campaign is missing."""
    if os.geteuid() != 0:
        raise SystemExit("arm.py calls chroot: run it as root")
    if not HANDLER.exists() or not shutil.which("debootstrap"):
        raise SystemExit("install the emulator: apt-get install qemu-user-static debootstrap")
    if not importlib.util.find_spec("pip"):
        raise SystemExit(f"install pip: {sys.executable} -m ensurepip")


def run_cases(emulated, numbers):
    """Run cases in a worker process; start another after a case that aborts it.

    Returns
    -------
    differing, aborts : dict
        By case number, the first difference, or the exit status and last error line.
    """
    differing, aborts, remaining = {}, {}, list(numbers)
    while remaining:
        process = emulated.python(
            f"from tests.campaigns import arm; arm.run_in_worker({remaining})"
        )
        lines = [line.split(" ", 2) for line in process.stdout.splitlines()]
        for _, number, text in (line for line in lines if line[0] == "differs"):
            differing.setdefault(int(number), text)
        remaining = [number for number in remaining if ["end", str(number)] not in lines]
        if remaining and ["begin", str(remaining[0])] not in lines:
            check_output(process)
        if remaining:
            aborts[remaining.pop(0)] = (
                f"{describe_exit(process.returncode)} {last_error_line(process.stderr)}".strip()
            )
    return differing, aborts


def describe_exit(returncode):
    """Describe how a process ended."""
    return signal.Signals(-returncode).name if returncode < 0 else f"exit code {returncode}"


def last_error_line(errors):
    """Return the last stderr line that is not QEMU's, without directory names."""
    lines = [line for line in errors.splitlines() if not line.startswith("qemu: ")]
    return re.sub(r"\S*/", "", lines[-1]) if lines else ""


def campaign(emulated, numbers):
    """Run cases on one worker per core; return the differing ones and the aborts."""
    differing, aborts, ran = {}, {}, 0
    starts = range(0, len(numbers), CASES_PER_WORKER)
    shares = [numbers[start : start + CASES_PER_WORKER] for start in starts]
    with ThreadPoolExecutor(available_cpus()) as workers:
        results = workers.map(partial(run_cases, emulated), shares)
        for share, (new_differing, new_aborts) in zip(shares, results, strict=True):
            differing |= new_differing
            aborts |= new_aborts
            ran += len(share)
            print_line(
                f"{ran} of {len(numbers)} cases: {len(differing)} differing, {len(aborts)} aborts"
            )
    return by_case_name(differing), by_case_name(aborts)


def by_case_name(by_number):
    """Replace case numbers by case names, in the order of the cases."""
    return {str(CASES[number]): by_number[number] for number in sorted(by_number)}


def parse_arguments():
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--machine",
        type=Path,
        default=CACHE / "fastvgg-arm",
        metavar="DIR",
        help="directory of the emulated machine",
    )
    parser.add_argument("--cpu", choices=CPUS, default="neoverse-n1")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="run one case in N")
    parser.add_argument("--quick", action="store_true", help="run 12 cases; write no record")
    parser.add_argument(
        "--only", default="", metavar="TEXT", help="run cases whose name has TEXT; write no record"
    )
    return parser.parse_args()


def main():
    """Set up the machine, run the cases on it, and print the results."""
    arguments = parse_arguments()
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
