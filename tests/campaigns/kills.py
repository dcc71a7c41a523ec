"""Kills at every boundary between durable calls, three deep: the run, and two that resume it.

    python -m tests.campaigns.kills              # some minutes; prints its counts
    python -m tests.campaigns.kills --size 1000  # about so many kills

A process dies before a call of `stream.storage`, or half way through it, where half of it can be
done. What it did until then stays, as it does when a process is killed. Every first death is taken
with every second; the third is drawn.
"""

from __future__ import annotations

import itertools
import random
import shutil
import tempfile
from pathlib import Path

from tests.campaigns.command import main
from tests.helpers.faults import Death, MortalStorage, quick_directory
from tests.helpers.jobs import LARGER, OF_FORMATS, OF_IMAGES, SETTINGS, jobs


def dies(job, number, *, half_done, fsync):
    """Whether the command dies at its `number`-th call, and does not come to its end before."""
    storage = MortalStorage(number, half_done=half_done, fsync=fsync)
    try:
        job.command(storage)
    except Death:
        return True
    else:
        return False
    finally:
        storage.bury()


def calls_of(job):
    """How many calls an uninterrupted run makes."""
    job.reset()
    storage = MortalStorage()
    job.command(storage)
    storage.bury()
    job.check_end()
    return len(storage.calls)


def campaign(seed, size):
    """Kill about `size` processes, spread evenly over jobs and pairs of deaths."""
    draw = random.Random(seed)  # noqa: S311  # not for secrets
    place = Path(tempfile.mkdtemp(prefix="fastvgg-kills-", dir=quick_directory()))
    try:
        made = jobs(place, settings=SETTINGS + LARGER + OF_IMAGES + OF_FORMATS)
        pairs = [
            (job, first, second)
            for job in made
            for calls in (calls_of(job),)
            for first, second in itertools.product(range(1, calls + 1), repeat=2)
        ]
        kills = 0
        chosen = pairs[:: max(1, 3 * len(pairs) // size)]
        for number in range(max(len(chosen), size // 3)):
            job, first, second = chosen[number % len(chosen)]
            kills += kill(job, (first, second, draw.randrange(1, first + second)), draw)
    finally:
        shutil.rmtree(place)
    return {"kills": kills, "pairs of boundaries": len(chosen), "wrong": 0}


def kill(job, deaths, draw):
    """Let commands die one after another, then one come to its end; return how many died."""
    job.reset()
    died = 0
    for death in deaths:
        settings = {"half_done": draw.random() < 0.5}
        settings["fsync"] = draw.choice((True, False))
        if not dies(job, death, **settings):
            break
        died += 1
        job.check_in_between(job.contents())
    job.command()
    job.check_end()
    return died


if __name__ == "__main__":
    main(campaign, __doc__, size=40_000)
