"""Send SIGKILL at random times: to one process, and to four that compete for the same target.

    python -m tests.campaigns.random_kills             # takes minutes; prints counts
    python -m tests.campaigns.random_kills --size 100  # approximate number of kills

A process is killed between its start and shortly after the time that an uninterrupted run takes,
possibly in the middle of a call. If there are four, one holds the lock and the others retry until
they acquire it: when one is killed, another takes over. Finally the command reruns to completion.
"""

from __future__ import annotations

import gc
import os
import random
import shutil
import signal
import statistics
import tempfile
import time
import traceback
from pathlib import Path

from fastvgg.errors import ResumeError, SourceError, TargetError
from tests.campaigns.command import main
from tests.helpers.faults import memory_directory
from tests.helpers.jobs import IncorrectStateError, jobs

SETTINGS = (
    {"in_place": True, "images": 120, "images_per_chunk": 1, "width": 577},
    {"in_place": False, "images": 120, "images_per_chunk": 1, "width": 577},
    {"kind": "folder", "images": 120, "images_per_chunk": 1},
    {"kind": "tar", "images": 120, "images_per_chunk": 1},
    {"kind": "failed", "images": 120, "images_per_chunk": 120},
)
CONCURRENT_PROCESSES = 4
MAX_LIFETIME_RATIO = 1.2  # of a process, relative to an uninterrupted run
MEASUREMENTS = 5
# Messages of a command that has not acquired the lock while another runs.
CONCURRENT_RUN_MESSAGES = "by another process", "has changed since the run was planned"


def start_process(work):
    """Fork a child that calls `work`, wait until it runs, and return its PID."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writing, b"!")
        try:
            work()
        except BaseException:  # noqa: BLE001  # the child exits here
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    os.read(reading, 1)
    os.close(reading)
    os.close(writing)
    return child


def was_killed(child):
    """Wait for a process; return whether it was killed, and raise if it failed."""
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return True
    if status:
        raise IncorrectStateError(
            f"a process failed with exit code {os.waitstatus_to_exitcode(status)}, see above"
        )
    return False


def median_seconds(job):
    """Return the median duration of an uninterrupted run."""
    durations_seconds = []
    for _ in range(MEASUREMENTS):
        job.reset()
        child = start_process(job.command)
        start_seconds = time.monotonic()
        was_killed(child)
        durations_seconds.append(time.monotonic() - start_seconds)
    job.check_final_state()
    return statistics.median(durations_seconds)


def run_until_unlocked(job):
    """Rerun a command until no other process holds the lock of its target."""
    while True:
        try:
            job.command()
        except (ResumeError, SourceError, TargetError) as error:
            if not any(words in error.problem for words in CONCURRENT_RUN_MESSAGES):
                raise
        else:
            return


def kill_after(lifetimes, work):
    """Kill processes after their lifetimes; return how many were still running."""
    deadlines = []
    for seconds in lifetimes:
        child = start_process(work)
        deadlines.append((time.monotonic() + seconds, child))
    for deadline, child in sorted(deadlines):
        time.sleep(max(0, deadline - time.monotonic()))
        os.kill(child, signal.SIGKILL)  # an exited child remains a zombie until waited for
    return sum([was_killed(child) for _, child in deadlines])


def kill_and_rerun(job, lifetimes):
    """Kill processes, then rerun; return how many were killed and whether a run was unfinished."""
    job.reset()
    killed = kill_after(
        lifetimes, job.command if len(lifetimes) == 1 else lambda: run_until_unlocked(job)
    )
    contents = job.contents()
    job.check_intermediate_state(contents)
    journal = contents.get(f"{job.target.name}.fastvgg-journal", b"")
    job.command()
    job.check_final_state()
    return killed, bool(journal)


def campaign(seed, size):
    """Kill about `size` processes, half of them with concurrent ones."""
    draw = random.Random(seed)  # noqa: S311  # not for secrets
    directory = Path(tempfile.mkdtemp(prefix="fastvgg-random-", dir=memory_directory()))
    counts = dict.fromkeys(
        ("kills", "with four concurrent processes", "runs", "runs left unfinished"), 0
    )
    try:
        timed_jobs = [(job, median_seconds(job)) for job in jobs(directory, settings=SETTINGS)]
        gc.freeze()  # garbage collection in a child would copy every page
        while counts["kills"] < size:
            job, seconds = draw.choice(timed_jobs)
            processes = (
                CONCURRENT_PROCESSES
                if counts["with four concurrent processes"] < counts["kills"] / 2
                else 1
            )
            lifetimes = [draw.uniform(0, MAX_LIFETIME_RATIO * seconds) for _ in range(processes)]
            killed, unfinished = kill_and_rerun(job, lifetimes)
            counts["kills"] += killed
            counts["with four concurrent processes"] += killed if processes > 1 else 0
            counts["runs"] += 1
            counts["runs left unfinished"] += unfinished
    finally:
        shutil.rmtree(directory)
    return {**counts, "wrong": 0}


if __name__ == "__main__":
    main(campaign, __doc__, size=2_500)
