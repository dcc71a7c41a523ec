"""Kill a run before every call that changes the disk, and two runs that resume it.

    python -m tests.campaigns.kills              # takes minutes; prints counts
    python -m tests.campaigns.kills --size 1000  # approximate number of kills

A process is killed before a call of `storage.local`, or halfway through one. Its earlier effects
persist, as after a real kill. Every first crash point is combined with every second; the third is
random.
"""

from __future__ import annotations

import itertools
import random
import shutil
import tempfile
from pathlib import Path

from tests.campaigns.command import main
from tests.helpers.faults import CrashingStorage, SimulatedCrash, memory_directory
from tests.helpers.jobs import FORMAT_SETTINGS, IMAGE_SETTINGS, LARGER, SETTINGS, jobs


def crashes(job, number, *, partially_done, fsync):
    """Run the command; return whether it was killed at its `number`-th call before finishing."""
    storage = CrashingStorage(number, partially_done=partially_done, fsync=fsync)
    try:
        job.command(storage)
    except SimulatedCrash:
        return True
    else:
        return False
    finally:
        storage.finish_crash()


def count_calls(job):
    """Return the number of calls of an uninterrupted run."""
    job.reset()
    storage = CrashingStorage()
    job.command(storage)
    storage.finish_crash()
    job.check_final_state()
    return len(storage.calls)


ALL_SETTINGS = SETTINGS + LARGER + IMAGE_SETTINGS + FORMAT_SETTINGS


def campaign(seed, size, parent=None, settings=ALL_SETTINGS):
    """Kill about `size` processes, spread evenly over jobs and pairs of crash points.

    They write below `parent`, or to memory by default.
    """
    draw = random.Random(seed)  # noqa: S311  # not for secrets
    directory = Path(tempfile.mkdtemp(prefix="fastvgg-kills-", dir=parent or memory_directory()))
    try:
        all_jobs = jobs(directory, settings=settings)
        pairs = [
            (job, first, second)
            for job in all_jobs
            for calls in (count_calls(job),)
            for first, second in itertools.product(range(1, calls + 1), repeat=2)
        ]
        kills = 0
        chosen = pairs[:: max(1, 3 * len(pairs) // size)]
        for number in range(max(len(chosen), size // 3)):
            job, first, second = chosen[number % len(chosen)]
            kills += kill(job, (first, second, draw.randrange(1, first + second)), draw)
    finally:
        shutil.rmtree(directory)
    return {"kills": kills, "pairs of boundaries": len(chosen), "wrong": 0}


def kill(job, crash_points, draw):
    """Kill several runs in a row, then run to completion; return the number of kills."""
    job.reset()
    killed = 0
    for crash_point in crash_points:
        settings = {"partially_done": draw.random() < 0.5}
        settings["fsync"] = draw.choice((True, False))
        if not crashes(job, crash_point, **settings):
            break
        killed += 1
        job.check_intermediate_state(job.contents())
    job.command()
    job.check_final_state()
    return killed


if __name__ == "__main__":
    main(campaign, __doc__, size=40_000)
