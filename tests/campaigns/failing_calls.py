"""Inject errors and short I/O into every system call; commands succeed or raise a typed error.

    python -m tests.campaigns.failing_calls             # takes minutes; prints counts
    python -m tests.campaigns.failing_calls --size 500  # approximate number of runs

Each `os` call of `storage.local` fails, once or persistently, with each error that a disk can
return, or transfers half of the requested bytes. The command must write the expected bytes, or
raise a typed error that names the system error; a rerun must then write the expected bytes.
"""

from __future__ import annotations

import errno
import itertools
import shutil
import tempfile
from pathlib import Path

from fastvgg.errors import FastvggError, StoppedError, TargetError
from tests.campaigns.command import main
from tests.helpers.faults import FaultyOs, ShortIoOs, memory_directory, system_calls
from tests.helpers.jobs import (
    FORMAT_SETTINGS,
    IMAGE_SETTINGS,
    LARGER,
    SETTINGS,
    IncorrectStateError,
    jobs,
)

ERRORS = (
    *(errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ESTALE, errno.EFBIG),
    *(errno.EINTR, errno.ENOMEM, errno.EMFILE, errno.EAGAIN),
)


def count_calls(job):
    """Return the number of calls of an uninterrupted run."""
    job.reset()
    with system_calls(FaultyOs()) as system:
        job.command()
    job.check_final_state()
    return len(system.calls)


def run_and_rerun(job, system):
    """Run with injected faults, rerun without, and return the outcome of the first run."""
    job.reset()
    try:
        with system_calls(system):
            job.command()
        outcome = "completed"
    except (StoppedError, TargetError) as error:
        name = errno.errorcode[system.number]
        if isinstance(error, StoppedError) and name not in str(error):
            raise IncorrectStateError(f"{error} does not name {name}") from error
        outcome = "stopped" if isinstance(error, StoppedError) else "refused"
    except FastvggError as error:
        raise IncorrectStateError(f"{type(error).__name__} for {system}: {error}") from error
    if outcome == "completed":
        job.check_final_state()
    else:
        job.check_intermediate_state(job.contents())
    job.command()
    job.check_final_state()
    return outcome


def campaign(seed, size):
    """Run about `size` times, spread evenly over jobs, calls and errors."""
    directory = Path(tempfile.mkdtemp(prefix="fastvgg-errors-", dir=memory_directory()))
    try:
        every = []
        for job in jobs(directory, settings=SETTINGS + LARGER + IMAGE_SETTINGS + FORMAT_SETTINGS):
            numbers = range(1, count_calls(job) + 1)
            every += [
                (job, FaultyOs(number, error, persistent=persistent))
                for number, error, persistent in itertools.product(numbers, ERRORS, (False, True))
            ]
            every += [(job, ShortIoOs(number)) for number in (0, *numbers)]
        counts = {"runs": 0, "completed": 0, "stopped": 0, "refused": 0}
        for job, system in every[seed % 7 :: max(1, len(every) // size)]:
            counts["runs"] += 1
            counts[run_and_rerun(job, system)] += 1
    finally:
        shutil.rmtree(directory)
    return {**counts, "wrong": 0}


if __name__ == "__main__":
    main(campaign, __doc__, size=12_000)
