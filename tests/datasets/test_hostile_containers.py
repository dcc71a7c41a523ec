"""Hostile containers, through the real command line: refused, or read within the memory limit.

Each is read in a process of its own, forked from one that has imported the command line and read
an ordinary array of every format, so that the memory measured is that of the container alone.
"""

from __future__ import annotations

import json

import pytest

from tests.helpers.datasets_on_disk import stdout_of
from tests.helpers.hostile_containers import HOSTILE
from tests.helpers.hostile_runs import ALLOWED_BYTES, ALLOWED_CODES

PROGRAM = """
import json, sys
from pathlib import Path
from tests.helpers.hostile_runs import run_all
print(json.dumps(run_all(Path(sys.argv[1]), sys.argv[2:])))
"""
GROUPS = 2


@pytest.mark.parametrize("group", range(GROUPS))
def test_hostile_container_is_refused_or_read_within_the_memory_limit(tmp_path, group):
    names = [*HOSTILE][group::GROUPS]
    results = json.loads(stdout_of(PROGRAM, tmp_path, *names).splitlines()[-1])
    assert [*results] == names
    wrong = {
        name: (code, f"{grown_bytes / 2**20:.0f} MiB", message)
        for name, (code, grown_bytes, message) in results.items()
        if code not in ALLOWED_CODES or "Traceback" in message or grown_bytes > ALLOWED_BYTES
    }
    assert not wrong, json.dumps(wrong, indent=1)


def test_there_are_enough_hostile_containers():
    assert len(HOSTILE) >= 30
