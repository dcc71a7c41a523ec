"""Runs that crash anywhere, by kill, power cut or system call error, and are resumed.

After every crash the target is absent or complete, a manifest exists only next to the target
that it describes, and a rerun of the same command produces the same files as an uninterrupted
run.
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
from tests.helpers.datasets_on_disk import (
    check_error,
    commits_in,
    data_tree,
    memory_for,
    pixels,
    plan_of,
    save_images,
    save_npy,
    tree,
)
from tests.helpers.faults import (
    CrashingStorage,
    FailingStorage,
    FaultyOs,
    InterruptedStorage,
    SimulatedCrash,
    memory_directory,
    system_calls,
)
from tests.helpers.runs import run
from tests.helpers.samples import parts


class Scenario:
    """A run that can be repeated, each time in a new directory.

    The sources are created once; the initial content of the directory is copied from a template.
    """

    def __init__(self, place, name):
        self.name = name
        self.place = place
        (place / "template").mkdir()
        (place / "snapshot_directory").mkdir()
        self._memory = None
        self.restarts = name.startswith("replacing")
        self.settings = {"mode": "caffe", "images_per_chunk": 2}
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
            self.settings = {"direction": "restore", "images_per_chunk": 2}
            photos = save_images(place / "photos", batch)
            plan_of(photos, self.source, mode="caffe").run()
        self._earlier_target = None
        if self.restarts:
            self._prepare_replaced_result()
        if name == "failed":
            self._prepare_failed_result(batch)
        self.expected = self._run_uninterrupted()

    def _prepare_replaced_result(self):
        """Create a finished result of other data, to be replaced."""
        older = save_npy(self.place / "older.npy", pixels(4, seed=5))
        target = self.place / "template" / self.target_name
        if self.name.endswith("images"):
            inputs = self.place / "older-inputs.npy"
            plan_of(older, inputs, mode="tf").run()
            plan_of(inputs, target, direction="restore").run()
        else:
            plan_of(older, target, mode="tf").run()
        self._earlier_target = self._target_contents(self.place / "template")

    def _prepare_failed_result(self, batch):
        """Create a finished result with failures, and repair its source."""
        self.source = save_images(self.place / "photos", batch)
        torn = [self.source / name for name in ("a/02.png", "b/03.png")]
        whole = [path.read_bytes() for path in torn]
        for path in torn:
            path.write_bytes(b"not an image")
        report = self.begin(self.place / "template")
        assert report.counts["failed"] == 2
        for path, content in zip(torn, whole, strict=True):
            path.write_bytes(content)
        self._earlier_target = self._target_contents(self.place / "template")
        self.settings = {**self.settings, "retry_failed": True}

    def _run_uninterrupted(self):
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
        images_per_chunk = settings.pop("images_per_chunk")
        if self._memory is None:  # the same for all runs
            self._memory = memory_for(images_per_chunk, self.source, target, **settings)
        return plan_of(self.source, target, memory=self._memory, **settings)

    def begin(self, directory, storage=None):
        return run(self.plan(directory, restart=self.restarts), storage=storage)

    def resume(self, directory, storage=None):
        """Rerun; use --restart only if the first command crashed before its restart took effect."""
        try:
            plan = self.plan(directory)
        except TargetError:
            assert self.restarts
            plan = self.plan(directory, restart=True)
        return run(plan, storage=storage)

    def _target_contents(self, directory):
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
        return self._target_contents(directory) == self._expected_target()

    def check_intermediate_state(self, directory):
        """Check what must hold at any time."""
        actual = self._target_contents(directory)
        complete = self._expected_target()
        if self._earlier_target is None:
            assert actual in (None, complete)
        elif self.name == "failed":
            assert actual in (self._earlier_target, None, complete)
        elif self.target_name.endswith(".npy"):
            assert actual in (self._earlier_target, complete)
        else:  # a directory cannot be replaced atomically
            assert actual in (None, self._earlier_target, complete)
        manifest = read_manifest(directory / self.target_name)
        is_retry_in_progress = self.name == "failed" and actual is None
        if manifest is not None and not is_retry_in_progress:
            assert actual is not None
            fastvgg.verify(f"{directory / self.target_name}{self.within}")

    def check_final_state(self, directory):
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
            prefix="fastvgg-test-", dir=memory_directory() or tmp_path_factory.getbasetemp()
        )
    )
    yield Scenario(place, request.param)
    shutil.rmtree(place)


def crashes(scenario, directory, storage, what="begin"):
    """Run and return whether the process crashed."""
    try:
        getattr(scenario, what)(directory, storage)
    except SimulatedCrash:
        return True
    else:
        return False
    finally:
        storage.finish_crash()


def crash_points(scenario, *, partially_done=False):
    """Return the numbers of all storage calls of a run, or of those that can be half done."""
    with scenario.directory() as directory:
        storage = CrashingStorage()
        assert not crashes(scenario, directory, storage)
    assert len(storage.calls) > 30
    assert len(storage.divisible_calls) > 5
    return storage.divisible_calls if partially_done else range(1, len(storage.calls) + 1)


# Whether the call is partially done, whether the power is cut, and whether fsync is enabled.
CRASH_MODES = {
    "before, power stays": (False, False, True),
    "half way through, power stays": (True, False, True),
    "before, power stays and nothing is synced": (False, False, False),
    "half way through, power stays and nothing is synced": (True, False, False),
    "before, power is cut": (False, True, True),
    "half way through, power is cut": (True, True, True),
}


@parts(6)
@pytest.mark.parametrize("crash_mode", CRASH_MODES)
def test_crash_at_any_storage_call_loses_nothing(scenario, crash_mode, part):
    partially_done, has_power_cut, fsync = CRASH_MODES[crash_mode]
    snapshot_directory = scenario.place / "snapshot_directory" if has_power_cut else None
    settings = {
        "partially_done": partially_done,
        "snapshot_directory": snapshot_directory,
        "fsync": fsync,
    }
    # The offset differs between crash modes, so that the first parts cover every call.
    numbers = crash_points(scenario, partially_done=partially_done)
    numbers = [n for n in numbers if (n + [*CRASH_MODES].index(crash_mode)) % 6 == part]
    # A run started with --restart can be resumed with or without it.
    methods = ("resume", "begin") if scenario.restarts else ("resume",)
    for number, method in itertools.product(numbers, methods):
        with scenario.directory() as directory:
            assert crashes(scenario, directory, CrashingStorage(number, **settings))
            scenario.check_intermediate_state(directory)
            committed = committed_chunks(directory / scenario.target_name)
            report = getattr(scenario, method)(directory)
            scenario.check_final_state(directory)
        # Undoing the rename of a directory changes the inode by which it is recognized.
        is_known = not (has_power_cut and scenario.restarts)
        if committed is not None and method == "resume" and is_known:
            assert report.counts["computed_chunks"] == report.counts["chunks"] - committed
            assert report.counts["images"] in (5, 6)
        if snapshot_directory is not None:
            shutil.rmtree(snapshot_directory)
            snapshot_directory.mkdir()


def committed_chunks(target):
    """Return the number of committed chunks, or None without a journal."""
    journal = read_journal(journal_path(target))
    return len(journal.commits) if journal is not None else None


@parts(8)
def test_second_crash_while_resuming_loses_nothing(scenario, part):
    for number in crash_points(scenario)[part::8]:
        # Every seventeenth second call, with an offset that depends on the first call.
        second = 1 + number % 17
        while True:
            with scenario.directory() as directory:
                assert crashes(scenario, directory, CrashingStorage(number))
                if not crashes(scenario, directory, CrashingStorage(second), "resume"):
                    break
                scenario.check_intermediate_state(directory)
                scenario.resume(directory)
                scenario.check_final_state(directory)
            second += 17


def test_result_changed_after_publish_gets_no_manifest(scenario):
    changed = 0
    for number in reversed(crash_points(scenario)):
        with scenario.directory() as directory:
            target = directory / scenario.target_name
            assert crashes(scenario, directory, CrashingStorage(number))
            if manifest_path(target).exists():
                continue
            if not scenario.is_complete(directory):
                break  # nor after any earlier call
            changed += 1
            data = max(target.rglob("[0-9c]*.*")) if target.is_dir() else target
            content = bytearray(data.read_bytes())
            content[-20] ^= 1
            data.write_bytes(content)
            before = tree(directory)
            with pytest.raises((ResumeError, SourceError)) as caught:
                scenario.resume(directory)
            check_error(caught.value, target)
            assert tree(directory) == before
    assert changed > 3


def check_exit_code(error, before, directory):
    """Check the code of a failed run: 3 if nothing was written, and nothing is left; else 5."""
    if error.exit_code == 5:
        return
    assert error.exit_code == 3
    assert "nothing was written" in error.problem
    if directory is not None:
        assert tree(directory) == before


@parts(4)
@pytest.mark.parametrize("persistent", [False, True], ids=["once", "for ever"])
@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC], ids=["EIO", "ENOSPC"])
def test_failed_system_call_stops_the_run_which_can_be_resumed(scenario, number, persistent, part):
    with scenario.directory() as directory, system_calls(FaultyOs()) as system:
        scenario.begin(directory)
        calls = [*enumerate(system.calls, 1)]
    # The offset differs between failures, so that the first parts cover every call.
    first = (part + 2 * (number == errno.EIO) + persistent) % 4
    for fails_at, name in calls[first::4]:
        with scenario.directory() as directory:
            before = tree(directory)
            with (
                system_calls(FaultyOs(fails_at, number, persistent=persistent)),
                pytest.raises((StoppedError, TargetError)) as caught,
            ):
                scenario.begin(directory)
            check_error(caught.value, directory)
            if name != "posix_fallocate" or number == errno.EIO:
                assert errno.errorcode[number] in str(caught.value)
            check_exit_code(caught.value, before, None if persistent else directory)
            scenario.check_intermediate_state(directory)
            scenario.resume(directory)
            scenario.check_final_state(directory)


@pytest.mark.parametrize("name", ["remove", "rename", "make_directory"])
def test_failed_name_change_stops_the_run_which_can_be_resumed(scenario, name):
    counting = FailingStorage(name, 0)
    with scenario.directory() as directory:
        scenario.begin(directory, counting)
    for fails_at in range(1, counting.calls + 1):
        with scenario.directory() as directory:
            before = tree(directory)
            with pytest.raises((StoppedError, TargetError), match=name) as caught:
                scenario.begin(directory, FailingStorage(name, fails_at))
            check_exit_code(caught.value, before, directory)
            scenario.check_intermediate_state(directory)
            scenario.resume(directory)
            scenario.check_final_state(directory)


@contextlib.contextmanager
def interrupted_run(scenario):
    """Yield a directory in which a run crashed with two committed chunks, and its journal."""
    with scenario.directory() as directory:
        with pytest.raises(SimulatedCrash):  # a retry starts with one committed chunk
            scenario.begin(directory, InterruptedStorage(1 if scenario.name == "failed" else 2))
        target = directory / scenario.target_name
        assert commits_in(target) == 2
        yield directory, journal_path(target)


def remove_journal_and_partial(directory, name):
    """Remove the journal and the partial of a target."""
    journal_path(directory / name).unlink()
    partial = directory / f"{name}.partial"
    shutil.rmtree(partial) if partial.is_dir() else partial.unlink()


def check_correct_or_rejected(scenario, directory):
    """Check that a rerun writes the right bytes, or is rejected and a restart succeeds."""
    refusal = None
    try:
        run(scenario.plan(directory))
    except FastvggError as error:
        refusal = error
    if refusal is not None:
        check_error(refusal, directory)
        assert not isinstance(refusal, StoppedError)
        scenario.check_intermediate_state(directory)
        try:
            run(scenario.plan(directory, restart=True))
        except TargetError as error:  # nothing proves that the partial is fastvgg's
            check_error(error, directory, "move it away")
            remove_journal_and_partial(directory, scenario.target_name)
            run(scenario.plan(directory, restart=True))
    scenario.check_final_state(directory)


@parts(6)
def test_truncated_journal_resumes_correctly_or_is_rejected(scenario, part):
    with interrupted_run(scenario) as (_, journal):
        whole = journal.read_bytes()
    ends = [0] + [at + 1 for at, byte in enumerate(whole) if byte == ord("\n")]
    assert len(ends) == 4
    # Every byte near the ends of a line, and a sample in between.
    lengths = [n for n in range(len(whole)) if n % 17 == 0 or min(abs(n - e) for e in ends) < 4]
    for length in lengths[part::6]:
        with interrupted_run(scenario) as (directory, journal):
            content = journal.read_bytes()[:length]
            journal.write_bytes(content)
            lines = content.count(b"\n")
            if lines == 0:
                check_correct_or_rejected(scenario, directory)
                continue
            report = scenario.resume(directory)
            assert report.counts["computed_chunks"] == report.counts["chunks"] - (lines - 1)
            scenario.check_final_state(directory)


@parts(6)
def test_bit_flipped_journal_resumes_correctly_or_is_rejected(scenario, part):
    with interrupted_run(scenario) as (_, journal):
        length = len(journal.read_bytes())
    for at in range(11 * part, length, 66):
        with interrupted_run(scenario) as (directory, journal):
            content = bytearray(journal.read_bytes())
            content[at] ^= 1 << at % 8
            journal.write_bytes(content)
            check_correct_or_rejected(scenario, directory)


@pytest.mark.parametrize(
    "tail",
    [b"\0" * 4096, b"\xff" * 777, b"0123456789abcdef {}\n", b"\n\n\n", b"half a line", "again"],
    ids=["zeros", "ones", "a wrong sum", "empty lines", "half a line", "the first line again"],
)
def test_garbage_after_the_last_complete_journal_line_is_ignored(scenario, tail):
    with interrupted_run(scenario) as (directory, journal):
        whole = journal.read_bytes()
        if tail == "again":
            tail = whole.splitlines(keepends=True)[0][:-2]
        journal.write_bytes(whole + tail)
        report = scenario.resume(directory)
        assert report.counts["computed_chunks"] == report.counts["chunks"] - 2
        scenario.check_final_state(directory)


def test_journal_of_another_version_is_rejected_and_restart_replaces_it(scenario):
    text = json.dumps({"fastvgg-journal": 99}).encode()
    line = xxhash.xxh3_64_hexdigest(text).encode() + b" " + text + b"\n"
    with interrupted_run(scenario) as (directory, journal):
        journal.write_bytes(line)
        with pytest.raises(ResumeError) as caught:
            scenario.resume(directory)
        check_error(caught.value, journal, "99", "restart")
        run(scenario.plan(directory, restart=True))
        scenario.check_final_state(directory)


def test_missing_partial_target_is_rejected_and_restart_recreates_it(scenario):
    with interrupted_run(scenario) as (directory, _):
        partial = directory / f"{scenario.target_name}.partial"
        shutil.rmtree(partial) if partial.is_dir() else partial.unlink()
        with pytest.raises(ResumeError) as caught:
            scenario.resume(directory)
        check_error(caught.value, partial, "restart")
        assert re.search("does not exist|No such file or directory", caught.value.problem)
        run(scenario.plan(directory, restart=True))
        scenario.check_final_state(directory)


def test_interrupted_run_resumes_with_less_memory_only_if_its_chunks_fit(scenario):
    with interrupted_run(scenario) as (directory, _):
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
        check_error(caught.value, plan.target, "memory", "restart")
        settings = {**scenario.settings, "images_per_chunk": 3}
        target = f"{directory / scenario.target_name}{scenario.within}"
        report = run(plan_of(scenario.source, target, **settings))
        assert report.counts["computed_chunks"] == report.counts["chunks"] - 2
        scenario.check_final_state(directory)
