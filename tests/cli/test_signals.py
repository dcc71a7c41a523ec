"""Signals that interrupt, stop or are ignored, while a chunk is written or a finalizer runs."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys

import numpy as np
import pytest

from fastvgg import oracle
from fastvgg.stream.manifest import manifest_path
from fastvgg.transform import Transform
from tests.helpers.checkout import checkout_environment
from tests.helpers.commands import WITHOUT_NUMBA_SCRIPT, invoke, options_for_chunks, run_shell
from tests.helpers.datasets_on_disk import (
    commits_in,
    network_inputs,
    npy_bytes,
    pixels,
    python,
    save_npy,
)

# A progress callback that prints a line and waits; the next chunk may be written meanwhile.
WAITING_PROGRESS_SCRIPT = """
import contextlib, sys, warnings
from fastvgg import cli
from fastvgg.cli import commands
sys.modules["numba"] = None
warnings.simplefilter("ignore")
@contextlib.contextmanager
def progress_bar(*label, quiet):
    def on_progress(at):
        print("committed", flush=True)
        sys.stdin.readline()
    yield on_progress
commands.progress_bar = progress_bar
cli.main()
"""


def three_chunk_command(kind, tmp_path):
    """Return a command, its target, and the expected content."""
    path = tmp_path / "x.npy"
    if kind == "in place":
        values = pixels(11).astype(np.float32)
        options = ["--mode", "caffe", "--in-place", *options_for_chunks(4, kind)]
        expected = npy_bytes(oracle.apply(Transform("caffe"), values))
        return ["preprocess", save_npy(path, values), *options], path, expected
    target = tmp_path / "y.npy"
    options = [target, "--mode", "caffe", *options_for_chunks(4)]
    expected = npy_bytes(network_inputs(pixels(11), "caffe"))
    return ["preprocess", save_npy(path, pixels(11)), *options], target, expected


def reset_signals():
    """Have a process react to Ctrl-C, which a shell has its background processes ignore."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def start(script, arguments):
    """Start a command that talks with the test; its streams are pipes."""
    return subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)],
        env=checkout_environment(),
        preexec_fn=reset_signals,  # it takes no lock
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("commits", [1, 2])
def test_signal_exits_with_130_and_a_rerun_resumes(tmp_path, number, commits):
    arguments, target, expected = three_chunk_command("array", tmp_path)
    with start(WAITING_PROGRESS_SCRIPT, arguments) as process:
        for commit in range(commits):
            assert process.stdout.readline() == "committed\n"
            if commit + 1 < commits:
                process.stdin.write("\n")
                process.stdin.flush()
        process.send_signal(number)
        _, stderr = process.communicate()
    assert process.returncode == 130, stderr
    assert "interrupted" in stderr
    assert "rerun the same command" in stderr
    assert "Traceback" not in stderr
    assert not target.exists()
    committed = commits_in(target)
    assert commits <= committed <= 3
    rerun = invoke(*arguments, "--json")
    assert rerun.exit_code == 0
    assert json.loads(rerun.stdout)["counts"]["computed_chunks"] == 3 - committed
    assert target.read_bytes() == expected


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT])
def test_ignored_signal_stays_ignored(tmp_path, number):
    arguments, target, expected = three_chunk_command("array", tmp_path)
    script = (
        "import signal, os; from fastvgg.cli.signals import catch_signals; catch_signals(); "
        f"os.kill(os.getpid(), {int(number)})\n{WITHOUT_NUMBA_SCRIPT}"
    )
    ignore = f"trap '' {number.name[3:]}; exec"
    done = run_shell("", *arguments, source=script, before=ignore)
    assert done.returncode == 0, done.stderr
    assert target.read_bytes() == expected


def test_stopped_and_continued_run_completes(tmp_path):
    arguments, target, expected = three_chunk_command("array", tmp_path)
    with start(WAITING_PROGRESS_SCRIPT, arguments) as process:
        assert process.stdout.readline() == "committed\n"
        process.send_signal(signal.SIGSTOP)  # SIGTSTP stops no orphaned process group
        _, status = os.waitpid(process.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status)
        process.send_signal(signal.SIGCONT)
        _, stderr = process.communicate("\n" * 3, timeout=60)
    assert process.returncode == 0, stderr
    assert target.read_bytes() == expected


# A disk that prints a line and waits while the second of three chunks is written.
WAITING_DISK_SCRIPT = """
import os, signal, sys, threading, warnings
sys.modules["numba"] = None
warnings.simplefilter("ignore")
from fastvgg import cli
from fastvgg.cli import signals
from fastvgg.stream import destinations
from fastvgg.stream import in_place
from fastvgg.stream.commit_pipeline import CommitPipeline
from fastvgg.storage.local import Storage
first_written = ".fastvgg-journal" if "--in-place" in sys.argv else ".partial"
syncs = 0
class Waiting(Storage):
    def sync(self, file):
        global syncs
        written = file.path.name.endswith(first_written)
        syncs += written
        if written and syncs == 2:
            os.write(1, b"writing\\n")
            sys.stdin.readline()
            while not main_leaves():
                pass
        super().sync(file)
def main_leaves():
    frame = sys._current_frames()[threading.main_thread().ident]
    while frame is not None and frame.f_code is not CommitPipeline.__exit__.__code__:
        frame = frame.f_back
    return frame is not None and frame.f_locals["self"]._is_closed
destinations.Storage = in_place.Storage = Waiting
interrupt = signals.interrupt
def reported(*arguments):
    try:
        interrupt(*arguments)
    finally:
        os.write(1, b"interrupted\\n")
signals.interrupt = reported
signal.signal(signal.SIGWINCH, lambda *_: None)
cli.main()
"""


def send_until(process, number, happens):
    """Send a signal to a process, and wait for its effect."""
    process.send_signal(number)
    for _ in range(600):
        if happens(0.1):
            return
        # A signal just before the main thread blocks is handled only after the next signal.
        process.send_signal(signal.SIGWINCH)
    raise AssertionError(f"nothing happens at signal {number}")


@contextlib.contextmanager
def interrupted(arguments, number):
    """Run a command and send a signal while it writes its second chunk."""
    with start(WAITING_DISK_SCRIPT, arguments) as process:
        try:
            assert process.stdout.readline() == "writing\n"
            is_readable = lambda limit: select.select([process.stdout], [], [], limit)[0]  # noqa: E731
            send_until(process, number, is_readable)
            assert process.stdout.readline() == "interrupted\n"
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("kind", ["array", "in place"])
def test_signal_during_a_write_exits_with_130_after_the_commit(tmp_path, kind, number):
    arguments, target, expected = three_chunk_command(kind, tmp_path)
    with interrupted(arguments, number) as process:
        assert process.poll() is None
        stdout, stderr = process.communicate("\n", timeout=60)
    assert process.returncode == 130, stderr
    assert stdout == ""
    assert "interrupted" in stderr
    assert "same command" in stderr
    assert "Traceback" not in stderr
    assert json.loads(invoke("info", target, "--json").stdout)["committed_chunks"] == 2
    written = target if kind == "in place" else tmp_path / "y.npy.partial"
    two_chunk_bytes = 128 + 2 * 4 * 756
    assert written.read_bytes()[:two_chunk_bytes] == expected[:two_chunk_bytes]
    rerun = invoke(*arguments, "--json")
    assert rerun.exit_code == 0
    assert json.loads(rerun.stdout)["counts"]["computed_chunks"] == 1
    assert target.read_bytes() == expected


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (signal.SIGINT, signal.SIGINT),
        (signal.SIGTERM, signal.SIGTERM),
        (signal.SIGINT, signal.SIGTERM),
        (signal.SIGTERM, signal.SIGINT),
    ],
)
@pytest.mark.parametrize("kind", ["array", "in place"])
def test_second_signal_exits_with_130_immediately_and_a_rerun_resumes(
    tmp_path, kind, first, second
):
    arguments, target, expected = three_chunk_command(kind, tmp_path)

    def ends(limit):
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=limit)
        return process.returncode is not None

    with interrupted(arguments, first) as process:
        send_until(process, second, ends)  # while the chunk still waits for the disk
        assert process.returncode == 130
        stdout, stderr = process.communicate()
    assert set(stdout.splitlines()) <= {"interrupted"}  # again, where a finalizer lost the first
    assert stderr == ""
    assert (kind == "in place") == target.exists()
    assert not manifest_path(target).exists()
    rerun = invoke(*arguments, "--json")
    assert rerun.exit_code == 0
    # In place, a chunk is committed before it is written; otherwise after.
    left = {"array": 2, "in place": 1}[kind]
    assert json.loads(rerun.stdout)["counts"]["computed_chunks"] == left
    assert target.read_bytes() == expected


# A run whose array of pixels is finalized while a signal arrives, and which then waits.
FINALIZER_SCRIPT = """
import os, signal, sys, threading, weakref
import fastvgg
from fastvgg import cli
class Finalized:
    def __del__(self):
        os.kill(os.getpid(), signal.{number})
def signalled(reference):
    os.kill(os.getpid(), signal.{number})
def plan(*arguments, **options):
    {loses}
    threading.Event().wait({seconds})
    raise ZeroDivisionError
fastvgg.plan = plan
sys.argv = ["fastvgg", "preprocess", "a", "b.npy", "--mode", "caffe"]
cli.main()
"""


@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM", "SIGHUP"])
@pytest.mark.parametrize(
    "loses",
    [
        "Finalized()",
        "dropped = set(); reference = weakref.ref(dropped, signalled); del dropped",
    ],
)
def test_signal_during_a_finalizer_interrupts(number, loses):
    done = python(FINALIZER_SCRIPT.format(number=number, loses=loses, seconds=60))
    assert done.returncode == 130, done.stderr
    assert done.stderr.startswith("fastvgg: interrupted\n")
    assert len(done.stderr.splitlines()) == 2


# The hook returns only after the thread that sends the signal again has looked for it there.
SLOW_HOOK_SCRIPT = """
import threading, time
from fastvgg.cli import signals
start, looked, sleep = signals.start_new_thread, threading.Event(), time.sleep
def start_and_wait(*arguments):
    start(*arguments)
    looked.wait(60)
def look(seconds):
    looked.set()
    sleep(seconds)
signals.start_new_thread, time.sleep = start_and_wait, look
"""


def test_lost_signal_is_resent_only_after_the_hook():
    script = FINALIZER_SCRIPT.format(number="SIGINT", loses="Finalized()", seconds=60)
    done = python(SLOW_HOOK_SCRIPT + script)
    assert done.returncode == 130, done.stderr
    assert done.stderr.startswith("fastvgg: interrupted\n")


def test_exception_of_a_finalizer_is_still_printed():
    lost = 'class Failing:\n        __del__ = lambda self: {}["lost"]\n    Failing()'
    done = python(FINALIZER_SCRIPT.format(number="SIGINT", loses=lost, seconds=0))
    assert done.returncode == 70
    assert "KeyError: 'lost'" in done.stderr
    assert "ZeroDivisionError" in done.stderr
