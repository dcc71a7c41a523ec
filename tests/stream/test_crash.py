"""Runs that end anywhere: killed, out of power, refused by the disk; then taken up again.

After every one of these ends: the target's name holds nothing or a complete result, there is a
manifest only beside what it describes, and the same command makes the same files as a run that
nothing interrupted.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import re
import shutil
import tarfile
import tempfile
from pathlib import Path

import pytest
import xxhash

import fastvgg
from fastvgg.errors import FastvggError, ResumeError, SourceError, StoppedError, TargetError
from fastvgg.stream.journal import journal_path, read_journal
from fastvgg.stream.manifest import manifest_path, read_manifest
from fastvgg.stream.run import run
from tests.helpers.datasets_on_disk import (
    commits_in,
    data_tree,
    memory_for,
    must_say,
    pixels,
    plan_of,
    save_images,
    save_npy,
    tree,
)
from tests.helpers.faults import (
    CuttingStorage,
    Death,
    FaultyOs,
    MortalStorage,
    RefusingStorage,
    quick_directory,
    system_calls,
)
from tests.helpers.samples import parts


class Scenario:
    """A run that can be made again and again, each time into a new directory.

    Its sources are made once, and all that the run finds in its directory is copied there.
    """

    def __init__(self, place, name):
        self.name = name
        self.place = place
        (place / "template").mkdir()
        (place / "graveyard").mkdir()
        self._memory = None
        self.restarts = name.startswith("replacing")
        self.settings = {"mode": "caffe", "together": 2}
        batch = pixels(5, seed=4)
        self.source, self.target_name = save_npy(place / "x.npy", batch), "y.npy"
        self.within = ""
        if name == "zarr":
            self.target_name = "y.zarr"
        if name == "hdf5":
            self.target_name, self.within = "y.h5", "::/x"
        if name == "folder":
            self.source = save_images(place / "photos", batch)
            (self.source / "a" / "torn.png").write_bytes(b"not an image")
        if name == "tar":
            save_images(place / "photos", batch)
            self.source = place / "shard.tar"
            with tarfile.open(self.source, "w") as shard:
                shard.add(place / "photos", ".")
        if name.endswith("images"):
            self.source, self.target_name = place / "inputs.npy", "out"
            self.settings = {"direction": "restore", "together": 2}
            photos = save_images(place / "photos", batch)
            plan_of(photos, self.source, mode="caffe").run()
        self._older = None
        if self.restarts:
            self._make_older()
        if name == "failed":
            self._make_failed(batch)
        self.expected = self._uninterrupted()

    def _make_older(self):
        """Put a finished result of other data in the way."""
        older = save_npy(self.place / "older.npy", pixels(4, seed=5))
        target = self.place / "template" / self.target_name
        if self.name.endswith("images"):
            inputs = self.place / "older-inputs.npy"
            plan_of(older, inputs, mode="tf").run()
            plan_of(inputs, target, direction="restore").run()
        else:
            plan_of(older, target, mode="tf").run()
        self._older = self._of_target(self.place / "template")

    def _make_failed(self, batch):
        """Put a finished result with failures in the way, and mend its source."""
        self.source = save_images(self.place / "photos", batch)
        torn = [self.source / name for name in ("a/02.png", "b/03.png")]
        whole = [path.read_bytes() for path in torn]
        for path in torn:
            path.write_bytes(b"not an image")
        report = self.begin(self.place / "template")
        assert report.counts["failed"] == 2
        for path, content in zip(torn, whole, strict=True):
            path.write_bytes(content)
        self._older = self._of_target(self.place / "template")
        self.settings = {**self.settings, "retry_failed": True}

    def _uninterrupted(self):
        with self.directory() as directory:
            self.begin(directory)
            expected = data_tree(directory)
            assert manifest_path(directory / self.target_name).exists()
            assert not any(b"partial" in name or b"journal" in name for name in expected)
            return expected

    @contextlib.contextmanager
    def directory(self):
        directory = Path(tempfile.mkdtemp(dir=self.place))
        shutil.copytree(self.place / "template", directory, dirs_exist_ok=True)
        try:
            yield directory
        finally:
            shutil.rmtree(directory)

    def plan(self, directory, *, restart=False):
        target = f"{directory / self.target_name}{self.within}"
        settings = {**self.settings, "restart": restart}
        if restart:
            settings.pop("retry_failed", None)
        together = settings.pop("together")
        if self._memory is None:  # the same for all runs
            self._memory = memory_for(together, self.source, target, **settings)
        return plan_of(self.source, target, memory=self._memory, **settings)

    def begin(self, directory, storage=None):
        return run(self.plan(directory, restart=self.restarts), storage=storage)

    def resume(self, directory, storage=None):
        """Go on; say --restart only where the first command never came to say it."""
        try:
            plan = self.plan(directory)
        except TargetError:
            assert self.restarts
            plan = self.plan(directory, restart=True)
        return run(plan, storage=storage)

    def _of_target(self, directory):
        target = directory / self.target_name
        if target.is_dir():
            return tree(target)
        return target.read_bytes() if target.exists() else None

    def _expected_target(self):
        if self.target_name.endswith((".npy", ".h5")):
            return self.expected[self.target_name.encode()]
        start = self.target_name.encode() + b"/"
        return {
            name.removeprefix(start): content
            for name, content in self.expected.items()
            if name.startswith(start)
        }

    def is_complete(self, directory):
        return self._of_target(directory) == self._expected_target()

    def check_in_between(self, directory):
        """Check what anyone may find at any time."""
        actual = self._of_target(directory)
        complete = self._expected_target()
        if self._older is None:
            assert actual in (None, complete)
        elif self.name == "failed":
            assert actual in (self._older, None, complete)
        elif self.target_name.endswith(".npy"):
            assert actual in (self._older, complete)
        else:  # a directory cannot take the name of another at once
            assert actual in (None, self._older, complete)
        manifest = read_manifest(directory / self.target_name)
        taken_up_again = self.name == "failed" and actual is None
        if manifest is not None and not taken_up_again:
            assert actual is not None
            fastvgg.verify(f"{directory / self.target_name}{self.within}")

    def check_at_the_end(self, directory):
        actual = data_tree(directory)
        assert sorted(actual) == sorted(self.expected)
        assert actual == self.expected


SCENARIOS = (
    *("array", "folder", "tar", "failed"),
    *("images", "replacing an array", "replacing images", "zarr", "hdf5"),
)


@pytest.fixture(scope="module", params=SCENARIOS)
def scenario(request, tmp_path_factory):
    place = Path(
        tempfile.mkdtemp(
            prefix="fastvgg-test-", dir=quick_directory() or tmp_path_factory.getbasetemp()
        )
    )
    yield Scenario(place, request.param)
    shutil.rmtree(place)


def dies(scenario, directory, storage, what="begin"):
    """Whether the run died before it ended."""
    try:
        getattr(scenario, what)(directory, storage)
    except Death:
        return True
    else:
        return False
    finally:
        storage.bury()


def every_death(scenario, *, half_done=False):
    """The number of every storage call of an uninterrupted run, or of those that can be halved."""
    with scenario.directory() as directory:
        storage = MortalStorage()
        assert not dies(scenario, directory, storage)
    assert len(storage.calls) > 30
    assert len(storage.divisible) > 5
    return storage.divisible if half_done else range(1, len(storage.calls) + 1)


# Whether half of a call is done, whether the power is cut, and whether anything is synced.
DEATHS = {
    "before, power stays": (False, False, True),
    "half way through, power stays": (True, False, True),
    "before, power stays and nothing is synced": (False, False, False),
    "half way through, power stays and nothing is synced": (True, False, False),
    "before, power is cut": (False, True, True),
    "half way through, power is cut": (True, True, True),
}


@parts(6)
@pytest.mark.parametrize("death", DEATHS)
def test_dying_at_any_storage_call_loses_nothing(scenario, death, part):
    half_done, power_is_cut, fsync = DEATHS[death]
    graveyard = scenario.place / "graveyard" if power_is_cut else None
    settings = {"half_done": half_done, "graveyard": graveyard, "fsync": fsync}
    # The parts differ from death to death, so that the first parts have every call.
    numbers = every_death(scenario, half_done=half_done)
    numbers = [n for n in numbers if (n + [*DEATHS].index(death)) % 6 == part]
    # A run that was begun with --restart may be taken up with or without it.
    ways_on = ("resume", "begin") if scenario.restarts else ("resume",)
    for number, way_on in itertools.product(numbers, ways_on):
        with scenario.directory() as directory:
            assert dies(scenario, directory, MortalStorage(number, **settings))
            scenario.check_in_between(directory)
            committed = committed_chunks(directory / scenario.target_name)
            report = getattr(scenario, way_on)(directory)
            scenario.check_at_the_end(directory)
        # Undoing the rename of a directory gives it another inode, by which it is not known.
        is_known = not (power_is_cut and scenario.restarts)
        if committed is not None and way_on == "resume" and is_known:
            assert report.counts["computed_chunks"] == report.counts["chunks"] - committed
            assert report.counts["images"] in (5, 6)
        if graveyard is not None:
            shutil.rmtree(graveyard)
            graveyard.mkdir()


def committed_chunks(target):
    """How many chunks the journal of a target has, where there is a journal."""
    journal = read_journal(journal_path(target))
    return len(journal.commits) if journal is not None else None


@parts(8)
def test_dying_again_while_resuming_loses_nothing(scenario, part):
    for number in every_death(scenario)[part::8]:
        # One pair of calls in seventeen; the pairs move on with the first of the two.
        second = 1 + number % 17
        while True:
            with scenario.directory() as directory:
                assert dies(scenario, directory, MortalStorage(number))
                if not dies(scenario, directory, MortalStorage(second), "resume"):
                    break
                scenario.check_in_between(directory)
                scenario.resume(directory)
                scenario.check_at_the_end(directory)
            second += 17


def test_a_result_that_was_changed_between_name_and_manifest_is_not_described(scenario):
    changed = 0
    for number in reversed(every_death(scenario)):
        with scenario.directory() as directory:
            target = directory / scenario.target_name
            assert dies(scenario, directory, MortalStorage(number))
            if manifest_path(target).exists():
                continue
            if not scenario.is_complete(directory):
                break  # nor was it at any call before
            changed += 1
            data = max(target.rglob("[0-9c]*.*")) if target.is_dir() else target
            content = bytearray(data.read_bytes())
            content[-20] ^= 1
            data.write_bytes(content)
            before = tree(directory)
            with pytest.raises((ResumeError, SourceError)) as caught:
                scenario.resume(directory)
            must_say(caught.value, target)
            assert tree(directory) == before
    assert changed > 3


@parts(4)
@pytest.mark.parametrize("for_ever", [False, True], ids=["once", "for ever"])
@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC], ids=["EIO", "ENOSPC"])
def test_any_system_call_that_fails_stops_the_run_and_it_can_be_resumed(
    scenario, number, for_ever, part
):
    with scenario.directory() as directory, system_calls(FaultyOs()) as system:
        scenario.begin(directory)
        calls = [*enumerate(system.calls, 1)]
    # The parts differ from failure to failure, so that the first parts have every call.
    first = (part + 2 * (number == errno.EIO) + for_ever) % 4
    for fails_at, name in calls[first::4]:
        with scenario.directory() as directory:
            with (
                system_calls(FaultyOs(fails_at, number, for_ever=for_ever)),
                pytest.raises(FastvggError) as caught,
            ):
                scenario.begin(directory)
            must_say(caught.value, directory)
            if name != "posix_fallocate" or number == errno.EIO:
                assert isinstance(caught.value, StoppedError), (name, caught.value)
                assert caught.value.exit_code == 5
                assert errno.errorcode[number] in str(caught.value)
            scenario.check_in_between(directory)
            scenario.resume(directory)
            scenario.check_at_the_end(directory)


@pytest.mark.parametrize("name", ["remove", "rename", "make_directory"])
def test_any_change_of_a_name_that_fails_stops_the_run_and_it_can_be_resumed(scenario, name):
    counting = RefusingStorage(name, 0)
    with scenario.directory() as directory:
        scenario.begin(directory, counting)
    for fails_at in range(1, counting.calls + 1):
        with scenario.directory() as directory:
            with pytest.raises(StoppedError, match=name) as caught:
                scenario.begin(directory, RefusingStorage(name, fails_at))
            assert caught.value.exit_code == 5
            scenario.check_in_between(directory)
            scenario.resume(directory)
            scenario.check_at_the_end(directory)


@contextlib.contextmanager
def cut_off(scenario):
    """A directory in which a run died with two chunks committed, and its journal."""
    with scenario.directory() as directory:
        with pytest.raises(Death):  # of what is taken up again one chunk had no failure
            scenario.begin(directory, CuttingStorage(1 if scenario.name == "failed" else 2))
        target = directory / scenario.target_name
        assert commits_in(target) == 2
        yield directory, journal_path(target)


def move_away(directory, name):
    """Remove the journal and the partial of a target."""
    journal_path(directory / name).unlink()
    partial = directory / f"{name}.partial"
    shutil.rmtree(partial) if partial.is_dir() else partial.unlink()


def check_right_or_refused(scenario, directory):
    """Check that a command ends with the right bytes, or in words and with --restart a way out."""
    refusal = None
    try:
        run(scenario.plan(directory))
    except FastvggError as error:
        refusal = error
    if refusal is not None:
        must_say(refusal, directory)
        assert not isinstance(refusal, StoppedError)
        scenario.check_in_between(directory)
        try:
            run(scenario.plan(directory, restart=True))
        except TargetError as error:  # nothing proves that the partial is fastvgg's
            must_say(error, directory, "move it away")
            move_away(directory, scenario.target_name)
            run(scenario.plan(directory, restart=True))
    scenario.check_at_the_end(directory)


@parts(6)
def test_a_journal_cut_off_at_any_byte_gives_the_right_bytes_or_is_refused(scenario, part):
    with cut_off(scenario) as (_, journal):
        whole = journal.read_bytes()
    ends = [0] + [at + 1 for at, byte in enumerate(whole) if byte == ord("\n")]
    assert len(ends) == 4
    # Within a line some bytes will do, but near its ends every one.
    lengths = [n for n in range(len(whole)) if n % 17 == 0 or min(abs(n - e) for e in ends) < 4]
    for length in lengths[part::6]:
        with cut_off(scenario) as (directory, journal):
            content = journal.read_bytes()[:length]
            journal.write_bytes(content)
            lines = content.count(b"\n")
            if lines == 0:
                check_right_or_refused(scenario, directory)
                continue
            report = scenario.resume(directory)
            assert report.counts["computed_chunks"] == report.counts["chunks"] - (lines - 1)
            scenario.check_at_the_end(directory)


@parts(6)
def test_a_journal_with_any_flipped_bit_gives_the_right_bytes_or_is_refused(scenario, part):
    with cut_off(scenario) as (_, journal):
        length = len(journal.read_bytes())
    for at in range(11 * part, length, 66):
        with cut_off(scenario) as (directory, journal):
            content = bytearray(journal.read_bytes())
            content[at] ^= 1 << at % 8
            journal.write_bytes(content)
            check_right_or_refused(scenario, directory)


@pytest.mark.parametrize(
    "tail",
    [b"\0" * 4096, b"\xff" * 777, b"0123456789abcdef {}\n", b"\n\n\n", b"half a line", "again"],
    ids=["zeros", "ones", "a wrong sum", "empty lines", "half a line", "the first line again"],
)
def test_garbage_after_the_journals_last_whole_line_is_ignored(scenario, tail):
    with cut_off(scenario) as (directory, journal):
        whole = journal.read_bytes()
        if tail == "again":
            tail = whole.splitlines(keepends=True)[0][:-2]
        journal.write_bytes(whole + tail)
        report = scenario.resume(directory)
        assert report.counts["computed_chunks"] == report.counts["chunks"] - 2
        scenario.check_at_the_end(directory)


def test_a_journal_of_another_version_is_refused_and_replaced_by_a_restart(scenario):
    text = json.dumps({"fastvgg-journal": 99}).encode()
    line = xxhash.xxh3_64_hexdigest(text).encode() + b" " + text + b"\n"
    with cut_off(scenario) as (directory, journal):
        journal.write_bytes(line)
        with pytest.raises(ResumeError) as caught:
            scenario.resume(directory)
        must_say(caught.value, journal, "99", "--restart")
        run(scenario.plan(directory, restart=True))
        scenario.check_at_the_end(directory)


def test_a_partial_that_is_gone_is_refused_and_made_anew_by_a_restart(scenario):
    with cut_off(scenario) as (directory, _):
        partial = directory / f"{scenario.target_name}.partial"
        shutil.rmtree(partial) if partial.is_dir() else partial.unlink()
        with pytest.raises(ResumeError) as caught:
            scenario.resume(directory)
        must_say(caught.value, partial, "--restart")
        assert re.search("does not exist|No such file or directory", caught.value.problem)
        run(scenario.plan(directory, restart=True))
        scenario.check_at_the_end(directory)


def test_a_run_that_was_cut_off_goes_on_with_less_memory_only_if_its_chunks_fit(scenario):
    with cut_off(scenario) as (directory, _):
        plan = scenario.plan(directory)
        with pytest.raises(TargetError) as caught:
            fastvgg.plan(
                plan.source,
                plan.target,
                mode=scenario.settings.get("mode"),
                direction=plan.transform.direction,
                threads=1,
                backend="numpy",
                memory=plan.projected_bytes - 1,
            )
        must_say(caught.value, plan.target, "--memory", "--restart")
        settings = {**scenario.settings, "together": 3}
        target = f"{directory / scenario.target_name}{scenario.within}"
        report = run(plan_of(scenario.source, target, **settings))
        assert report.counts["computed_chunks"] == report.counts["chunks"] - 2
        scenario.check_at_the_end(directory)
