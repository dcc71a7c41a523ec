"""Run the command line on containers in forked processes, and measure each process' memory."""

from __future__ import annotations

import contextlib
import io
import os
import re
import resource
import shutil
import sys
import tempfile
import traceback
from pathlib import Path

from fastvgg.cli import main
from tests.helpers.hostile_containers import HOSTILE, ORDINARY

MEMORY = "64MiB"
ALLOWED_BYTES = 64 * 2**20 * 11 // 10
ALLOWED_CODES = (0, 1, 3, 5)
SECONDS = 60  # of CPU time; ends a process that hangs


def high_water_bytes():
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s*([0-9]+) kB", status)[1]) * 1024


def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def preprocess(location, directory):
    """Run the command line in this process, silently; return its exit code."""
    sys.argv = ["fastvgg", "preprocess", str(location), str(directory / "y.npy"), "--mode", "tf"]
    sys.argv += ["--memory", MEMORY, "--threads", "1", "--quiet"]
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            main()
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else 0 if ended.code is None else 70
    return 0


def run_forked(write, directory):
    """Write a container and preprocess it, each in a process; return code, memory and message."""
    code, _, location = in_child(lambda: str(write(directory)))
    assert code == 0, location
    return in_child(lambda: preprocess(location, directory))


def in_child(function):
    """Call a function in a forked process.

    Returns its result if that is an exit code, or else 0; how far its memory grew; its messages.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        code = 70
        try:
            os.close(reading)
            os.dup2(writing, 1)
            os.dup2(writing, 2)
            resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
            Path("/proc/self/clear_refs").write_text("5")  # restarts the high-water mark
            before = resident_bytes()
            result = function()
            sys.stdout.flush()
            if isinstance(result, str):
                os.write(2, result.encode())
                result = 0
            os.write(writing, f"\0{high_water_bytes() - before}".encode())
            code = result
        except BaseException:  # noqa: BLE001  # whatever the command line did not catch
            traceback.print_exc()
        finally:
            with contextlib.suppress(OSError):
                sys.stderr.flush()
            os._exit(code)
    os.close(writing)
    with os.fdopen(reading, "rb") as output:
        text = output.read().decode(errors="replace")
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    message, _, grown = text.partition("\0")
    return code, int(grown or 0), message


def run_all(directory, names):
    """Return exit code, growth of the memory in bytes, and message for each hostile container."""
    for name, write in ORDINARY.items():  # imports what the formats need, and allocates its memory
        place = directory / name
        place.mkdir()
        code = preprocess(write(place), place)
        assert code == 0, (name, code)
    results = {}
    for name in names:
        place = Path(tempfile.mkdtemp(dir=directory))
        results[name] = run_forked(HOSTILE[name], place)
        shutil.rmtree(place)
    return results
