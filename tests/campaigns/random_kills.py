"""SIGKILL at random times, of one process and of four at once that want the same target.

    python -m tests.campaigns.random_kills             # some minutes; prints its counts
    python -m tests.campaigns.random_kills --size 100  # about so many kills

A process is killed at a time between its beginning and a little after the end of an uninterrupted
run, which may be in the middle of a call. Of four at once one has the lock, and the others try
again until they have it: whoever is killed, another takes over. Then the command is given once
more, to its end.
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
from tests.helpers.faults import quick_directory
from tests.helpers.jobs import Wrong, jobs

SETTINGS = (
    {"in_place": True, "images": 120, "together": 1, "width": 577},
    {"in_place": False, "images": 120, "together": 1, "width": 577},
    {"kind": "folder", "images": 120, "together": 1},
    {"kind": "tar", "images": 120, "together": 1},
    {"kind": "failed", "images": 120, "together": 120},
)
TOGETHER = 4
LONGER = 1.2  # than an uninterrupted run: how long a process may live
MEASURED = 5
# What a command may find while another goes on, before it has the lock.
OVERTAKEN = (
    *("by another process", "has changed since the run was planned"),
    *("no journal shows", "with other settings", "was not written by fastvgg"),
)


def started(work):
    """The number of a process that has begun to do something; its exit says how that ended."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writing, b"!")
        try:
            work()
        except BaseException:  # noqa: BLE001  # it ends here
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    os.read(reading, 1)
    os.close(reading)
    os.close(writing)
    return child


def was_killed(child):
    """Whether a process was killed, or else ended well; waits for its end."""
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return True
    if status:
        raise Wrong(f"a process ended with {os.waitstatus_to_exitcode(status)}, as it said above")
    return False


def usual_seconds(job):
    """How long an uninterrupted run takes."""
    taken = []
    for _ in range(MEASURED):
        job.reset()
        child = started(job.command)
        begun = time.monotonic()
        was_killed(child)
        taken.append(time.monotonic() - begun)
    job.check_end()
    return statistics.median(taken)


def insist(job):
    """Give a command until no other process has its target."""
    while True:
        try:
            job.command()
        except (ResumeError, SourceError, TargetError) as error:
            if not any(words in error.problem for words in OVERTAKEN):
                raise
        else:
            return


def kill_after(lives, work):
    """Let processes work for so many seconds each; return how many had not ended before."""
    ends = []
    for seconds in lives:
        child = started(work)
        ends.append((time.monotonic() + seconds, child))
    for end, child in sorted(ends):
        time.sleep(max(0, end - time.monotonic()))
        os.kill(child, signal.SIGKILL)  # there until it is waited for, even if it has ended
    return sum([was_killed(child) for _, child in ends])


def outcome(job, lives):
    """Kill processes after so many seconds each; return how many, and whether they left work."""
    job.reset()
    killed = kill_after(lives, job.command if len(lives) == 1 else lambda: insist(job))
    contents = job.contents()
    job.check_in_between(contents)
    journal = contents.get(f"{job.target.name}.fastvgg-journal", b"")
    job.command()
    job.check_end()
    return killed, bool(journal)


def campaign(seed, size):
    """Kill about `size` processes, half of them with others beside them."""
    draw = random.Random(seed)  # noqa: S311  # not for secrets
    place = Path(tempfile.mkdtemp(prefix="fastvgg-random-", dir=quick_directory()))
    counts = {"kills": 0, "of one in four": 0, "runs": 0, "runs left unfinished": 0}
    try:
        made = [(job, usual_seconds(job)) for job in jobs(place, settings=SETTINGS)]
        gc.freeze()  # a child that collects garbage copies all of it
        while counts["kills"] < size:
            job, seconds = draw.choice(made)
            together = TOGETHER if counts["of one in four"] < counts["kills"] / 2 else 1
            lives = [draw.uniform(0, LONGER * seconds) for _ in range(together)]
            killed, unfinished = outcome(job, lives)
            counts["kills"] += killed
            counts["of one in four"] += killed if together > 1 else 0
            counts["runs"] += 1
            counts["runs left unfinished"] += unfinished
    finally:
        shutil.rmtree(place)
    return {**counts, "wrong": 0}


if __name__ == "__main__":
    main(campaign, __doc__, size=2_500)
