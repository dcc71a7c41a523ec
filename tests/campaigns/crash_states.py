"""Enumerate every state that a crash can leave on the disk, and run the command on each.

    python -m tests.campaigns.crash_states             # takes minutes; prints counts
    python -m tests.campaigns.crash_states --size 500  # maximum number of runs per job

Each run records every call of `storage.local` that changes the disk. A power cut between two calls
may keep or lose anything that was not synced:

- each 512-byte sector of data changed in place has any version since the last sync, or one half of
  a version and the other half of the previous one;
- each other write persists fully, not at all, as its first or second half, without its middle, or
  as garbage;
- any subset of the directory changes persists, in order; a rename is one change.

The threads of a run are recorded one chunk at a time and replayed in randomly chosen legal
interleavings. Power cuts are simulated only before a sync and after the last call: what can be lost
at any other point is a subset of what can be lost there. A process killed between two calls leaves
everything it wrote, and the next power cut may still lose what was not synced. Each state is
restored to an in-memory file system; the same command runs on it and is recorded again, so that
crashes during recovery are covered to any depth.

For a partially lost write, only one of these variants is tried, because every journal line and redo
log slot has a checksum.

`states` counts the enumerated states, `runs` the distinct states that were run.
"""

from __future__ import annotations

import itertools
import math
import os
import random
import shutil
import tempfile
from collections import deque
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import xxhash

from fastvgg.errors import FastvggError
from fastvgg.executors import threads
from fastvgg.storage.local import Storage
from fastvgg.stream import in_place, manifest, redo_log_layout
from tests.campaigns.command import main
from tests.helpers.faults import frame_that_syncs, memory_directory
from tests.helpers.jobs import DATA, LARGER, SETTINGS, IncorrectStateError, Job, jobs

SECTOR_BYTES = 512
PAGE_BYTES = 4096
GARBAGE = 0xEE
MAX_WAITING = 1000  # queued states per kind


class Write(NamedTuple):
    """A write at an offset; without `data`, a change of the file size to `offset`."""

    file: int
    offset: int
    data: bytes | None


class Name(NamedTuple):
    """A directory change: a created, removed (`file` is None) or renamed (`old` is set) name."""

    name: str
    file: int | None
    old: str | None = None


class Sync(NamedTuple):
    """A sync of a file's content, or of the directory if `file` is None."""

    file: int | None

    def makes_durable(self, event):
        """Return whether the sync makes an earlier event durable."""
        if isinstance(event, Name):
            return self.file is None
        return event.file == self.file


class CallSite(NamedTuple):
    """Where in the code a sync is called."""

    function: str
    line: int
    """Relative to the first line of the function."""


class Step(NamedTuple):
    """The thread (writer or committer) and the chunk of a recorded event."""

    is_commit: bool
    chunk: int
    after: int
    """How many chunks are committed when the work is submitted."""


class SerialCommitPipeline:
    """A `CommitPipeline` that works on the submitting thread, so that recordings are repeatable."""

    step = None
    has_late_commits = False
    """Whether `drain`, not `submit`, commits a chunk."""

    def __class_getitem__(cls, _):
        return cls

    def __init__(self):
        self._submitted = 0
        self._drained = 0
        self._to_commit = deque()
        self._results = deque()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        SerialCommitPipeline.step = None

    def submit(self, write, commit):
        """Write a chunk; commit it now or later."""
        self._do(Step(False, self._submitted, self._drained), write)
        self._to_commit.append((Step(True, self._submitted, self._drained), commit))
        self._submitted += 1
        if not SerialCommitPipeline.has_late_commits:
            self._commit()

    def _do(self, step, work):
        SerialCommitPipeline.step = step
        result = work()
        SerialCommitPipeline.step = None
        return result

    def _commit(self):
        self._results.append(self._do(*self._to_commit.popleft()))

    def drain(self, max_pending):
        """Yield commit results until at most `max_pending` chunks are pending."""
        while len(self._to_commit) + len(self._results) > max_pending:
            if not self._results:
                self._commit()
            self._drained += 1
            yield self._results.popleft()


def interleave(log, draw):
    """Return the events of a log in a random order that two threads can produce.

    A chunk is written after the previous one, and after the commits that the writer waited for. It
    is committed after it is written and the previous one is committed.
    """
    writes = deque((step, event) for step, event in log if step and not step.is_commit)
    commits = deque((step, event) for step, event in log if step and step.is_commit)
    first = next((at for at, (step, _) in enumerate(log) if step), len(log))
    merged = [event for _, event in log[:first]]
    write_probability = draw.choice((0, 0.5, 1))
    while writes or commits:
        may_write = writes and (not commits or commits[0][0].chunk >= writes[0][0].after)
        may_commit = commits and (not writes or writes[0][0].chunk > commits[0][0].chunk)
        write = may_write and (not may_commit or draw.random() < write_probability)
        merged.append((writes if write else commits).popleft()[1])
    return merged + [event for step, event in log[first:] if not step]


class RecordingStorage(Storage):
    """Real storage that records each change of the disk and its `Step`.

    Parameters
    ----------
    names
        The file number of each name.
    last_file
        The highest number of a file, also of one that has lost its name.
    omitted_sync
        The call site of a sync that is omitted, to test that the omission is detected.
    """

    def __init__(self, names, last_file=0, omitted_sync=None, *, fsync=True):
        super().__init__(fsync=fsync)
        self.log = []
        self.call_sites = set()
        self.is_done = False  # whether the command finished
        self._names = dict(names)
        self._files = {}
        self._next = itertools.count(last_file + 1)
        self._omitted_sync = omitted_sync

    def _record(self, event):
        self.log.append((SerialCommitPipeline.step, event))

    def _open(self, path, flags, call):
        if path.name not in self._names:
            self._names[path.name] = next(self._next)
            self._record(Name(path.name, self._names[path.name]))
        elif flags & os.O_TRUNC:  # the name is given to a new file
            self._record(Name(path.name, None))
            self._names[path.name] = next(self._next)
            self._record(Name(path.name, self._names[path.name]))
        file = super()._open(path, flags, call)
        self._files[file.descriptor] = self._names[path.name]
        return file

    def reserve(self, file, nbytes):
        super().reserve(file, nbytes)
        self._record(Write(self._files[file.descriptor], nbytes, None))

    def write(self, file, data, offset):
        super().write(file, data, offset)
        self._record(Write(self._files[file.descriptor], offset, bytes(data)))

    def truncate(self, file, nbytes):
        super().truncate(file, nbytes)
        self._record(Write(self._files[file.descriptor], nbytes, None))

    def _is_synced(self):
        """Return whether the calling sync is to be performed."""
        frame = frame_that_syncs()
        function = f"{Path(frame.f_code.co_filename).stem}.{frame.f_code.co_name}"
        call_site = CallSite(function, frame.f_lineno - frame.f_code.co_firstlineno)
        self.call_sites.add(call_site)
        return self.fsync and call_site != self._omitted_sync

    def sync(self, file):
        if self._is_synced():
            self._record(Sync(self._files[file.descriptor]))

    def sync_directory(self, path):
        if self._is_synced():
            self._record(Sync(None))

    def syncfs(self, directory):
        if self._is_synced():
            for file in (*sorted(set(self._names.values())), None):
                self._record(Sync(file))

    def rename(self, old, new):
        super().rename(old, new)
        file = self._names.pop(old.name)
        self._names[new.name] = file
        self._record(Name(new.name, file, old.name))

    def remove(self, path):
        super().remove(path)
        if self._names.pop(path.name, None) is not None:
            self._record(Name(path.name, None))


class State(NamedTuple):
    """The content of a disk: the names in a directory, and the bytes of each file."""

    names: tuple[tuple[str, int], ...]
    contents: tuple[tuple[int, bytes], ...]

    def digest(self):
        """Return a digest that identifies the state."""
        digest = xxhash.xxh3_128(repr(self.names).encode())
        for _, content in self.contents:
            digest.update(xxhash.xxh3_64_digest(content))
        return digest.digest()


class CrashState(NamedTuple):
    """What a crash leaves: the durable state and unsynced changes in the page cache."""

    durable: State
    unsynced: tuple[Write | Name, ...] = ()
    fsync: bool = True
    """Whether its commits survive a power cut, even before everything is synced."""

    def digest(self):
        """Return a digest that identifies the crash state."""
        return self.durable.digest() + xxhash.xxh3_128_digest(repr(self.unsynced).encode())

    def visible(self):
        """Return the state that the next command sees."""
        disk = Disk(self.durable, 0, 0)
        for event in self.unsynced:
            disk.apply(event)
        for file in [*disk.writes, None]:
            disk.sync(file)
        return disk.state(disk.names, disk.contents)

    @property
    def last_file(self):
        """The highest number of a file, also of one that has lost its name."""
        durable = (file for _, file in self.durable.names)
        unsynced = (event.file for event in self.unsynced if event.file is not None)
        return max(*durable, *unsynced, *(file for file, _ in self.durable.contents), 0, 0)


def written(content, write):
    """Return the content of a file after a write."""
    if write.data is None:
        return content[: write.offset].ljust(write.offset, b"\0")
    end = write.offset + len(write.data)
    return content[: write.offset].ljust(write.offset, b"\0") + write.data + content[end:]


class Disk:
    """The durable state of a disk, and the changes since.

    Parameters
    ----------
    state
        The initial durable state.
    seed
        Selects which part of a partially lost write is lost.
    max_states_per_crash
        How many combinations of lost changes to enumerate at one crash point if files have at most
        a page, and fewer for longer files. If there are more, that many are sampled.
    """

    def __init__(self, state, seed, max_states_per_crash):
        self.names = dict(state.names)
        self.contents = dict(state.contents)
        self.writes = {}
        self.changes = []
        self._seed = seed
        self._max_states_per_crash = max_states_per_crash
        self.data = self.names.get(DATA)

    def apply(self, event):
        """Apply an event that is not a sync."""
        if isinstance(event, Name):
            self.changes.append(event)
        else:
            self.writes.setdefault(event.file, []).append(event)

    def sync(self, file):
        """Make the changes of a file durable, or those of the directory."""
        if file is not None:
            for write in self.writes.pop(file, ()):
                self.contents[file] = written(self.contents.get(file, b""), write)
            return
        self.names = self._apply_names(self.changes)
        self.changes = []

    def durable(self):
        """Return the durable state, including files whose names are not durable."""
        return State(tuple(sorted(self.names.items())), tuple(sorted(self.contents.items())))

    def state(self, names, contents):
        """Return a state with these names, without files that have no name."""
        names = tuple(sorted(names.items()))
        return State(names, tuple(sorted((file, contents.get(file, b"")) for _, file in names)))

    def _apply_names(self, changes):
        names = dict(self.names)
        for change in changes:
            if change.file is None:
                names.pop(change.name, None)
                continue
            names[change.name] = change.file
            if change.old is not None and names.get(change.old) == change.file:
                del names[change.old]
        return names

    def crashes(self):
        """Return the states that a power cut can leave, and how many combinations were tried."""
        files = {
            file: self._sector_axes(file) if file == self.data else self._lost_write_axes(file)
            for file in self.writes
        }
        axes = [axis for _, file_axes, _ in files.values() for axis in file_axes]
        combinations = math.prod(count for _, _, count in files.values()) * 2 ** len(self.changes)
        choices = itertools.product(*map(range, map(len, axes)))
        max_bytes = max(map(len, self.contents.values()), default=0)
        max_states_per_crash = max(
            100, self._max_states_per_crash * PAGE_BYTES // max(PAGE_BYTES, max_bytes)
        )
        if math.prod(map(len, axes)) > max_states_per_crash:
            combinations = max_states_per_crash
            draw = random.Random(self._seed)  # noqa: S311  # not for secrets
            choices = [[draw.randrange(len(axis)) for axis in axes] for _ in range(combinations)]
        every_names = [self._apply_names(subset) for subset in _subsets(self.changes)]
        states, interned = set(), {}  # states share equal contents
        for choice in choices:
            chosen = iter([axis[index] for axis, index in zip(axes, choice, strict=True)])
            contents = dict(self.contents)
            for file, (make, file_axes, _) in files.items():
                content = make(file, [next(chosen) for _ in file_axes])
                contents[file] = interned.setdefault(content, content)
            states |= {self.state(names, contents) for names in every_names}
        return states, combinations

    def _lost_write_axes(self, file):
        """Return how to build a file from its writes, each of which may be lost or partly lost."""
        axes = [self._parts(write) for write in self.writes[file]]
        combinations = math.prod(2 if write.data is None else 6 for write in self.writes[file])
        return self._apply_writes, axes, combinations

    def _apply_writes(self, file, writes):
        content = self.contents.get(file, b"")
        for write in writes:
            content = content if write is None else written(content, write)
        return content

    def _parts(self, write):
        if write.data is None:
            return [None, write]
        half, quarter = len(write.data) // 2, len(write.data) // 4
        broken = [
            write._replace(data=write.data[:half]),
            write._replace(data=bytes(half) + write.data[half:]),
            write._replace(data=write.data[:quarter] + bytes(half) + write.data[quarter + half :]),
            write._replace(data=bytes([GARBAGE]) * len(write.data)),
        ]
        index = xxhash.xxh3_64_intdigest(write.data, self._seed) % len(broken)
        return [None, write, broken[index]]

    def _sector_axes(self, file):
        """Return how to build a file from its sectors, each of any version, or torn."""
        versions = [self.contents[file]]
        for write in self.writes[file]:
            versions.append(written(versions[-1], write))
        axes = []
        half = SECTOR_BYTES // 2
        for begin in range(0, len(versions[0]), SECTOR_BYTES):
            intact = [version[begin : begin + SECTOR_BYTES] for version in versions]
            torn = [
                sector
                for old, new in itertools.pairwise(intact)
                for sector in (new[:half] + old[half:], old[:half] + new[half:])
            ]
            axes.append(list(dict.fromkeys(intact + torn)))
        return (lambda _, sectors: b"".join(sectors)), axes, math.prod(map(len, axes))


def _subsets(changes):
    for count in range(len(changes) + 1):
        yield from itertools.combinations(changes, count)


def _by_name(state):
    contents = dict(state.contents)
    return {name: contents[file] for name, file in state.names}


class ExploredJob(Job):
    """A job whose directory can be restored to any state."""

    def __init__(self, directory, **settings):
        super().__init__(directory, **settings)
        self.start = self.state()

    def state(self):
        """Return the state of the directory; files are numbered in the order of their names."""
        paths = sorted(self.directory.iterdir())
        return State(
            tuple((path.name, number) for number, path in enumerate(paths)),
            tuple((number, path.read_bytes()) for number, path in enumerate(paths)),
        )

    def restore(self, state):
        """Restore the directory to a state; the file changed in place keeps its inode."""
        contents = dict(state.contents)
        for path in list(self.directory.iterdir()):
            if path.name != DATA:
                path.unlink()
        for name, file in state.names:
            mode = "r+b" if name == DATA else "wb"
            with (self.directory / name).open(mode) as stream:
                stream.write(contents[file])
                stream.truncate()

    def check_crash_state(self, state):
        """Check a state that a reader may see after a crash."""
        names, contents = dict(state.names), dict(state.contents)
        self.check_intermediate_state({name: contents[file] for name, file in names.items()})


class Exploration:
    """Crashes of a job and of the runs that resume it.

    Parameters
    ----------
    job
        The job to run.
    seed
        Selects among the crash states.
    max_states_per_crash, omitted_sync
        As for `Disk` and `RecordingStorage`.
    """

    def __init__(self, job, seed, *, max_states_per_crash=20_000, omitted_sync=None):
        self.states = self.runs = 0
        self.call_sites = set()
        self._job = job
        self._seed = seed
        self._draw = random.Random(seed)  # noqa: S311  # not for secrets
        self._max_states_per_crash = max_states_per_crash
        self._omitted_sync = omitted_sync
        self._visited = set()
        self._waiting = {}  # queued crash states, by kind of crash and visible names
        self._dropped = 0

    def run(self, max_runs):
        """Run the job on its initial state, then on crash states; return counts."""
        for fsync in (True, True, True, False):  # with different interleavings
            self._run_and_crash(CrashState(self._job.start, fsync=fsync), fsync)
        while self.runs < max_runs and any(self._waiting.values()):
            # States with lost names are few, and unweighted draws select more of them.
            kinds = [states for states in self._waiting.values() if states]
            weights = [len(states) for states in kinds] if self._draw.random() < 0.5 else None
            (waiting,) = self._draw.choices(kinds, weights)
            at = self._draw.randrange(len(waiting))
            waiting[at], waiting[-1] = waiting[-1], waiting[at]
            self._run_and_crash(waiting.pop())
        return {"states": self.states, "runs": self.runs, "not run": self.left}

    @property
    def left(self):
        """The number of states on which no command was run."""
        return sum(map(len, self._waiting.values())) + self._dropped

    def _run_and_crash(self, start, fsync=True):
        SerialCommitPipeline.has_late_commits = self._draw.random() < 0.5
        storage = run_from(self._job, start, omitted_sync=self._omitted_sync, fsync=fsync)
        self.runs += 1
        self.call_sites |= storage.call_sites
        disk = Disk(start.durable, self._seed, self._max_states_per_crash)
        for event in start.unsynced:
            disk.apply(event)
        unsynced, is_durable = list(start.unsynced), start.fsync
        for event in interleave(storage.log, self._draw):
            if isinstance(event, Sync):
                if is_durable:
                    self._cut_power(disk)
                disk.sync(event.file)
                unsynced = [change for change in unsynced if not event.makes_durable(change)]
                is_durable = is_durable or not unsynced
            else:
                disk.apply(event)
                unsynced.append(event)
            self._enqueue(CrashState(disk.durable(), tuple(unsynced), is_durable))
        if storage.is_done and fsync:
            final = _by_name(self._job.state())
            for state in self._cut_power(disk):  # the command has reported success
                self._job.check(_by_name(state) == final, "a finished run can be undone")

    def _cut_power(self, disk):
        states, combinations = disk.crashes()
        self.states += combinations
        for state in sorted(states, key=State.digest):
            self._enqueue(CrashState(state))
        return states

    def _enqueue(self, crash_state):
        """Check a crash state, and queue it for a run unless it was visited before."""
        digest = crash_state.digest()
        if digest in self._visited:
            return
        self._visited.add(digest)
        visible = crash_state.visible()
        self._job.check_crash_state(visible)
        names = tuple(name for name, _ in visible.names)
        waiting = self._waiting.setdefault((bool(crash_state.unsynced), names), [])
        if len(waiting) < MAX_WAITING:
            waiting.append(crash_state)
        else:
            waiting[self._draw.randrange(MAX_WAITING)] = crash_state
            self._dropped += 1


def run_from(job, crash_state, omitted_sync=None, fsync=True):
    """Run a job on a crash state, and check that it produces the expected bytes."""
    state = crash_state.visible()
    job.restore(state)
    last_file = crash_state.last_file
    storage = RecordingStorage(dict(state.names), last_file, omitted_sync, fsync=fsync)
    try:
        storage.is_done = job.command(storage)
        job.check_final_state()
    except (FastvggError, IncorrectStateError) as error:
        raise IncorrectStateError(f"{error}; from {str(crash_state)[:2000]}") from error
    return storage


def make_deterministic():
    """Make runs deterministic: replace threads, random numbers, dates and versions."""
    threads.CommitPipeline = in_place.CommitPipeline = SerialCommitPipeline
    redo_log_layout.secrets = SimpleNamespace(token_hex=lambda count: "0" * 2 * count)
    now = SimpleNamespace(isoformat=lambda timespec: "then")
    manifest.dt = SimpleNamespace(UTC=None, datetime=SimpleNamespace(now=lambda zone: now))
    manifest.package_versions = dict


def exploration_jobs(directory):
    """Return the jobs to explore."""
    return jobs(directory, ExploredJob, SETTINGS + LARGER[:1])


def campaign(seed, size):
    """Explore each job with at most `size` runs."""
    directory = Path(tempfile.mkdtemp(prefix="fastvgg-crash-", dir=memory_directory()))
    make_deterministic()
    total = {"states": 0, "runs": 0, "not run": 0}
    try:
        for job in exploration_jobs(directory):
            counts = Exploration(job, seed).run(size)
            total = {name: total[name] + count for name, count in counts.items()}
    finally:
        shutil.rmtree(directory)
    return {**total, "wrong": 0}


if __name__ == "__main__":
    main(campaign, __doc__, size=1_000)
