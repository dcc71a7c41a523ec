"""The crash model in short, and that it sees each sync of the protocol that is left out."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import crash_states
import pytest
from crash_states import Exploration, Left, explored, run_on
from faults import quick_directory
from jobs import DATA, Wrong

from fastvgg.stream import manifest, ring
from fastvgg.stream.ring import Ring

# What the model cannot see to be needed, and why it is there.
SPARE = {
    # What was durable before the command was given; of the rest see the test below.
    ("ring.begin", 0),
    # Where the file lies on another disk than the names beside it, which the model has not.
    ("ring.reopen", 0),
    # The checksums of old and new bytes tell as much; without them it is needed: see below.
    ("ring.recover", 1),
}


@pytest.fixture
def place(monkeypatch, tmp_path):
    for module, name in ((ring, "secrets"), (manifest, "dt"), (manifest, "package_versions")):
        monkeypatch.setattr(module, name, getattr(module, name))  # to be put back at the end
    crash_states.freeze()
    directory = Path(tempfile.mkdtemp(prefix="fastvgg-test-", dir=quick_directory() or tmp_path))
    yield directory
    shutil.rmtree(directory)


def seen_without(job, place):
    try:
        Exploration(job, 1, most_at_once=300, forgets=place).run(700)
    except Wrong:
        return True
    return False


def numbered(places):
    """The syncs of each function, in the order of their lines."""
    by_function = {}
    for function, line in sorted(places):
        by_function.setdefault(function, []).append(line)
    return {
        (function, number): crash_states.Place(function, line)
        for function, lines in by_function.items()
        for number, line in enumerate(lines)
    }


def test_no_state_that_a_crash_leaves_leads_to_wrong_bytes(place):
    for job in explored(place):
        counts = Exploration(job, 1, most_at_once=2000).run(150)
        assert counts["runs"] == 150
        assert counts["states"] > 5000


def test_without_any_one_sync_some_crash_leads_to_wrong_bytes(place):
    found, seen = set(), set()
    for job in explored(place)[1:]:
        exploration = Exploration(job, 1, most_at_once=300)
        exploration.run(60)
        syncs = numbered(exploration.places)
        found |= set(syncs)
        seen |= {name for name in syncs if name not in seen and seen_without(job, syncs[name])}
    assert len(found) > 15
    assert found - seen == SPARE


def test_a_checkpoint_after_recovery_is_synced_for_where_checksums_do_not_help(place, monkeypatch):
    real = Ring.checksum_in_file

    def as_if_old(self, chunk):
        record = self.record(chunk)
        return real(self, chunk) if record is None else record.old

    monkeypatch.setattr(Ring, "checksum_in_file", as_if_old)
    monkeypatch.setattr(ring, "SLOTS", 2)  # full sooner
    job = explored(place)[0]
    exploration = Exploration(job, 1, most_at_once=300)
    exploration.run(100)
    assert seen_without(job, numbered(exploration.places)["ring.recover", 1])


def test_what_is_to_be_changed_is_durable_before_anything_else_is(place):
    job = explored(place)[0]
    storage = run_on(job, Left(job.start))
    assert storage.log[0] == crash_states.Sync(dict(job.start.names)[DATA])
