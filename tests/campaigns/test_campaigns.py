"""Short versions of the campaigns: the same functions with smaller sizes."""

from __future__ import annotations

import json

import pytest

from tests.campaigns import changing_sources, cluster_kills, failing_calls, hostile_images, kills
from tests.helpers.datasets_on_disk import python
from tests.helpers.private_disks import NOT_ALLOWED


@pytest.mark.parametrize("size", [100, pytest.param(330, marks=pytest.mark.slow)])
def test_killed_processes_lose_nothing(size):
    counts = kills.campaign(seed=5, size=size)
    assert counts["kills"] > size * 0.6


@pytest.mark.parametrize("size", [100, pytest.param(400, marks=pytest.mark.slow)])
def test_failed_system_call_stops_the_run_with_a_message_and_loses_nothing(size):
    counts = failing_calls.campaign(seed=5, size=size)
    assert counts["runs"] >= size
    assert all(counts[name] for name in ("completed", "stopped"))


def campaign_result(source):
    """Run a campaign in a child process; skip the test if this machine does not permit it."""
    name = source.split(".")[0]
    done = python(f"import json\nfrom tests.campaigns import {name}\nprint(json.dumps({source}))")
    if NOT_ALLOWED in done.stderr:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return json.loads(done.stdout)


@pytest.mark.parametrize("size", [1, pytest.param(10, marks=pytest.mark.slow)])
def test_changed_source_neither_kills_the_process_nor_gives_wrong_bytes(size):
    counts = changing_sources.campaign(seed=5, size=size)
    assert counts["runs"] == size * len(changing_sources.JOBS)
    assert counts["stopped"]


def test_power_cuts_lose_nothing():
    assert campaign_result("power_cuts.campaign(seed=5, size=60)")["power cuts"] >= 60


def test_power_cuts_detect_an_omitted_sync():
    wrong = campaign_result("power_cuts.count_detected_omissions(seed=5, size=300, stop_after=1)")
    assert wrong.keys() >= {
        "redo_log.commit",
        "redo_log.finish",
        "contiguous.sync",
        "zarr_writer._store",
    }
    assert all(wrong.values()), wrong


def test_disk_of_any_size_suffices_or_is_rejected_before_writing():
    counts = campaign_result("full_disks.campaign(seed=5, size=20)")
    assert counts["disk sizes"] >= 60
    assert all(counts[name] for name in ("completed", "refused", "stopped at the manifest"))


@pytest.mark.parametrize("size", [10, pytest.param(50, marks=pytest.mark.slow)])
def test_randomly_killed_processes_lose_nothing_alone_or_concurrently(size):
    counts = campaign_result(f"random_kills.campaign(seed=5, size={size})")
    assert counts["kills"] >= size
    assert counts["runs left unfinished"] > size // 10


@pytest.mark.parametrize("size", [60, pytest.param(500, marks=pytest.mark.slow)])
def test_mutated_images_are_read_within_the_limit_or_fail_with_a_reason(size):
    counts = hostile_images.campaign(seed=5, size=size)
    assert counts["images"] == size
    assert counts["read"] > size // 20
    assert counts["failed with a reason"] > size // 4


@pytest.mark.slow
def test_killed_workers_and_coordinators_lose_nothing():
    counts = cluster_kills.campaign(seed=5, size=8)
    assert counts["workers killed"] >= 8
    assert counts["coordinators killed"] >= 2
    assert counts["chunks computed twice"] >= 8


@pytest.mark.parametrize("size", [40, pytest.param(500, marks=pytest.mark.slow)])
def test_damaged_containers_are_refused_or_read_within_the_memory_limit(size):
    counts = campaign_result(f"hostile_containers.campaign(seed=5, size={size})")
    assert counts["containers"] == size
    assert all(counts[name] for name in ("read", "refused"))
