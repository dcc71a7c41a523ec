"""The crash model in short, and that it sees each sync of the protocol that is left out."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import pytest

from fastvgg.executors import threads
from fastvgg.stream import in_place, manifest, redo_log, redo_log_layout
from fastvgg.stream.redo_log import RedoLog, read_redo_log_header
from fastvgg.stream.redo_log_layout import PAGE_BYTES, SLOTS
from tests.campaigns import crash_states
from tests.campaigns.crash_states import Exploration, Left, Sync, Write, explored, run_on
from tests.helpers.faults import CuttingStorage, Death, quick_directory
from tests.helpers.jobs import DATA, Wrong

JOURNAL = f"{DATA}.fastvgg-journal"

# What the model cannot see to be needed, and why it is there.
SPARE = {
    # What was durable before the command was given; of the rest see the test below.
    ("redo_log.begin", 0),
    # Where the file lies on another disk than the names beside it, or a write failed before: the
    # model has neither.
    ("redo_log.reopen", 1),
    # Two crashes in a row must lose the checkpoint, and little else, to need it: see below.
    ("redo_log.recover", 1),
}


@pytest.fixture
def place(monkeypatch, tmp_path):
    frozen = [(redo_log_layout, "secrets"), (manifest, "dt"), (manifest, "package_versions")]
    frozen += [(threads, "CommitPipeline"), (in_place, "CommitPipeline")]
    for module, name in frozen:
        monkeypatch.setattr(module, name, getattr(module, name))  # to be put back at the end
    crash_states.freeze()
    directory = Path(tempfile.mkdtemp(prefix="fastvgg-test-", dir=quick_directory() or tmp_path))
    yield directory
    shutil.rmtree(directory)


def seen_without(job, place, seeds=(1,)):
    for seed in seeds:
        try:
            Exploration(job, seed, max_at_once=300, forgets=place).run(700)
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


@pytest.mark.parametrize("runs", [30, pytest.param(150, marks=pytest.mark.slow)])
def test_no_state_that_a_crash_leaves_leads_to_wrong_bytes(place, runs):
    for job in explored(place):
        counts = Exploration(job, 1, max_at_once=1000).run(runs)
        assert counts["runs"] == runs
        assert counts["states"] > runs * 30


@pytest.mark.slow
def test_without_any_one_sync_some_crash_leads_to_wrong_bytes(place):
    found, seen = set(), set()
    for job in explored(place)[1:3]:
        exploration = Exploration(job, 1, max_at_once=300)
        exploration.run(60)
        syncs = numbered(exploration.places)
        found |= set(syncs)
        unseen = {name: at for name, at in syncs.items() if name not in seen}
        # Which states are drawn hangs on the length of paths and inodes, so one draw may miss one.
        seeds = {name: (1,) if name in SPARE else (1, 2, 3, 4) for name in unseen}
        seen |= {name for name, at in unseen.items() if seen_without(job, at, seeds[name])}
    assert len(found) > 15
    assert found - seen == SPARE


def test_a_checkpoint_after_recovery_is_durable_before_anything_else_is_written(place):
    job = explored(place)[0]
    with pytest.raises(Death):
        job.command(CuttingStorage(3))
    left = Left(job.found())
    events = [event for _, event in run_on(job, left).log]
    writes = [event for event in events if isinstance(event, Write) and event.data is not None]
    checkpoint = next(event for event in writes if b'"generation"' in event.data)
    assert events[events.index(checkpoint) + 1] == Sync(dict(left.lasting.names)[JOURNAL])


@pytest.mark.parametrize("part", ["images", "edges"])
def test_a_slot_of_which_a_part_is_lost_is_not_used(place, part):
    job = explored(place)[1]
    with pytest.raises(Death):
        job.command(CuttingStorage(2))
    places = read_redo_log_header(job.source).file_layout
    begin, (first, last) = places.page_span(1)[0], places.image_span(1)
    at = places.slot(1) + PAGE_BYTES + (first if part == "images" else last) - begin
    with (job.directory / JOURNAL).open("r+b") as journal:
        journal.seek(at)
        (byte,) = journal.read(1)
        journal.seek(at)
        journal.write(bytes([byte ^ 1]))
    job.command()
    job.check_end()


@pytest.fixture
def no_checksum_helps(monkeypatch):
    """Have what is in the file taken for old bytes, whatever it is."""
    real = RedoLog.checksum_in_file

    def as_if_old(self, chunk):
        record = self.record(chunk)
        return real(self, chunk) if record is None else record.old

    monkeypatch.setattr(RedoLog, "checksum_in_file", as_if_old)


@pytest.mark.slow
@pytest.mark.usefixtures("no_checksum_helps")
def test_a_ring_has_slots_enough_where_no_checksum_helps(place):
    assert not seen_without(explored(place)[0], None)


def test_a_ring_of_one_slot_less_is_noticed(place, monkeypatch):
    for module in (redo_log, redo_log_layout):
        monkeypatch.setattr(module, "SLOTS", SLOTS - 1)
    with pytest.raises(RuntimeError, match="slot that is still needed"):
        seen_without(explored(place)[0], None)


def test_what_is_to_be_changed_is_durable_before_anything_else_is(place):
    job = explored(place)[0]
    storage = run_on(job, Left(job.start))
    assert storage.log[0] == (None, crash_states.Sync(dict(job.start.names)[DATA]))
