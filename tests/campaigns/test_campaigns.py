"""The long campaigns in short: the same functions as their commands, with less to do."""

from __future__ import annotations

import json

import pytest

from tests.campaigns import cluster_kills, failing_calls, kills
from tests.helpers.datasets_on_disk import python
from tests.helpers.private_disks import NO


@pytest.mark.parametrize("size", [100, pytest.param(330, marks=pytest.mark.slow)])
def test_processes_that_are_killed_lose_nothing(size):
    counts = kills.campaign(seed=5, size=size)
    assert counts["kills"] > size * 0.6


@pytest.mark.parametrize("size", [100, pytest.param(400, marks=pytest.mark.slow)])
def test_a_system_call_that_fails_ends_a_run_in_words_and_loses_nothing(size):
    counts = failing_calls.campaign(seed=5, size=size)
    assert counts["runs"] >= size
    assert all(counts[name] for name in ("ended well", "stopped"))


def found(source):
    """What a campaign in a process of its own returns, where this machine allows what it needs."""
    name = source.split(".")[0]
    done = python(f"import json\nfrom tests.campaigns import {name}\nprint(json.dumps({source}))")
    if NO in done.stderr:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return json.loads(done.stdout)


def test_real_power_cuts_lose_nothing():
    assert found("power_cuts.campaign(seed=5, size=60)")["power cuts"] >= 60


def test_real_power_cuts_are_seen_where_a_sync_is_left_out():
    wrong = found("power_cuts.teeth(seed=5, size=300, enough=1)")
    assert wrong.keys() >= {
        "redo_log.commit",
        "redo_log.finish",
        "contiguous.sync",
        "zarr_writer._write",
    }
    assert all(wrong.values()), wrong


def test_a_disk_of_any_size_is_enough_or_refused_before_anything_is_changed():
    counts = found("full_disks.campaign(seed=5, size=20)")
    assert counts["sizes"] >= 60
    assert all(counts[name] for name in ("ended well", "refused", "stopped at the manifest"))


@pytest.mark.parametrize("size", [10, pytest.param(50, marks=pytest.mark.slow)])
def test_processes_killed_at_any_time_lose_nothing_alone_or_beside_each_other(size):
    counts = found(f"random_kills.campaign(seed=5, size={size})")
    assert counts["kills"] >= size
    assert counts["runs left unfinished"] > size // 10


@pytest.mark.slow
def test_workers_and_coordinators_of_a_cluster_that_are_killed_lose_nothing():
    counts = cluster_kills.campaign(seed=5, size=8)
    assert counts["workers killed"] >= 8
    assert counts["coordinators killed"] >= 2
    assert counts["chunks computed twice"] >= 8
