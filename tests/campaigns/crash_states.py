"""Enumerate every state that a crash can leave on the disk, and run the command on each.

    python -m tests.campaigns.crash_states             # some minutes; prints its counts
    python -m tests.campaigns.crash_states --size 500  # no more than so many runs for each job

A run is recorded: every call of `stream.storage` that changes the disk. A power cut between two of
them may keep or lose anything that was not synced:

- of each sector of 512 bytes of the data that is changed in place any version since the last sync,
  or one half of a version and the other half of the one before;
- of each other write all, nothing, its first or its second half, all but its middle, or garbage;
- of the changes of names any, in their order, where a rename is one change.

What the threads of a run do is recorded one chunk after another, and then replayed in orders drawn
from those that there can be. Only the moments before a sync and after the last call are looked at:
what can be lost at any other is a part of what can be lost then. A process that is killed, between
any two calls, leaves all it did, and the next power cut may still lose what it did not sync. Each
state is made for real, in memory, and the same command is run on it, and recorded in turn: crashes
while recovering from a crash are covered to any depth.

Writes that are lost in part are run once for all ways of losing a part: every line of a journal and
every slot of a ring has a checksum.

`states` counts what was enumerated, `runs` what was different and therefore run.
"""

from __future__ import annotations

import itertools
import math
import os
import random
import shutil
import sys
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
from tests.helpers.faults import memory_directory
from tests.helpers.jobs import DATA, LARGER, SETTINGS, IncorrectStateError, Job, jobs

SECTOR_BYTES = 512
PAGE_BYTES = 4096
GARBAGE = 0xEE
MAX_WAITING = 1000  # states of one kind that a command may be run on yet


class Write(NamedTuple):
    """Bytes that were written, or where there are none the length that a file was given."""

    file: int
    offset: int
    data: bytes | None


class Name(NamedTuple):
    """A name that was given to a file, or taken away; with `old`, the one it had before."""

    name: str
    file: int | None
    old: str | None = None


class Sync(NamedTuple):
    """A file whose bytes last from now on, or all names if None."""

    file: int | None

    def makes_durable(self, event):
        """Whether what happened before lasts from now on."""
        if isinstance(event, Name):
            return self.file is None
        return event.file == self.file


class Place(NamedTuple):
    """Where in the code a sync is called."""

    function: str
    line: int
    """Counted from where the function begins."""


class Turn(NamedTuple):
    """On which of two threads something is done, and of which chunk."""

    is_commit: bool
    chunk: int
    after: int
    """How many pieces are committed when it is given."""


class SerialCommitPipeline:
    """`CommitPipeline` on the thread that gives the work, so that every recording is the same."""

    turn = None
    has_late_commits = False
    """Whether a chunk is committed when it is waited for, and not when it is given."""

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
        SerialCommitPipeline.turn = None

    def submit(self, write, commit):
        """Write a chunk, and commit it now or later."""
        self._do(Turn(False, self._submitted, self._drained), write)
        self._to_commit.append((Turn(True, self._submitted, self._drained), commit))
        self._submitted += 1
        if not SerialCommitPipeline.has_late_commits:
            self._commit()

    def _do(self, turn, work):
        SerialCommitPipeline.turn = turn
        result = work()
        SerialCommitPipeline.turn = None
        return result

    def _commit(self):
        self._results.append(self._do(*self._to_commit.popleft()))

    def drain(self, max_pending):
        """Return what was committed, as far as it would be waited for."""
        while len(self._to_commit) + len(self._results) > max_pending:
            if not self._results:
                self._commit()
            self._drained += 1
            yield self._results.popleft()


def interleave(log, draw):
    """Return the events of a log in an order that two threads may take.

    A chunk is written when the one before it is, and as many are committed as were waited for; it
    is committed when it is written, and the one before it is committed.
    """
    writes = deque((turn, event) for turn, event in log if turn and not turn.is_commit)
    commits = deque((turn, event) for turn, event in log if turn and turn.is_commit)
    first = next((at for at, (turn, _) in enumerate(log) if turn), len(log))
    merged = [event for _, event in log[:first]]
    write_probability = draw.choice((0, 0.5, 1))
    while writes or commits:
        may_write = writes and (not commits or commits[0][0].chunk >= writes[0][0].after)
        may_commit = commits and (not writes or writes[0][0].chunk > commits[0][0].chunk)
        write = may_write and (not may_commit or draw.random() < write_probability)
        merged.append((writes if write else commits).popleft()[1])
    return merged + [event for turn, event in log[first:] if not turn]


class RecordingStorage(Storage):
    """Real storage that records what changes the disk, and whose turn it is.

    Parameters
    ----------
    names
        Which file, by number, each name is of.
    omitted_sync
        The call site of a sync that is omitted, to test that the omission is detected.
    """

    def __init__(self, names, omitted_sync=None, *, fsync=True):
        super().__init__(fsync=fsync)
        self.log = []
        self.places = set()
        self.is_done = False  # whether the command finished
        self._names = dict(names)
        self._files = {}
        self._next = itertools.count(max(names.values(), default=0) + 1)
        self._omitted_sync = omitted_sync

    def _record(self, event):
        self.log.append((SerialCommitPipeline.turn, event))

    def _open(self, path, flags, call):
        if path.name not in self._names:
            self._names[path.name] = next(self._next)
            self._record(Name(path.name, self._names[path.name]))
        elif flags & os.O_TRUNC:
            self._record(Write(self._names[path.name], 0, None))
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
        """Whether a sync at this call site is not omitted."""
        frame = sys._getframe(2)
        function = f"{Path(frame.f_code.co_filename).stem}.{frame.f_code.co_name}"
        place = Place(function, frame.f_lineno - frame.f_code.co_firstlineno)
        self.places.add(place)
        return self.fsync and place != self._omitted_sync

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
    """The content of a disk: the names of a directory, and the bytes of each file."""

    names: tuple[tuple[str, int], ...]
    contents: tuple[tuple[int, bytes], ...]

    def digest(self):
        """Return what tells it from others."""
        digest = xxhash.xxh3_128(repr(self.names).encode())
        for _, content in self.contents:
            digest.update(xxhash.xxh3_64_digest(content))
        return digest.digest()


class CrashState(NamedTuple):
    """What a crash leaves: the durable state, and unsynced changes in the page cache."""

    durable: State
    unsynced: tuple[Write | Name, ...] = ()
    fsync: bool = True
    """What the commits in it survive, before all of it is synced."""

    def digest(self):
        """Return what tells it from others."""
        return self.durable.digest() + xxhash.xxh3_128_digest(repr(self.unsynced).encode())

    def visible(self):
        """Return the state that the next command finds."""
        disk = Disk(self.durable, 0, 0)
        for event in self.unsynced:
            disk.apply(event)
        for file in [*disk.writes, None]:
            disk.sync(file)
        return disk.state(disk.names, disk.contents)


def written(content, write):
    """Return a file's bytes after a write."""
    if write.data is None:
        return content[: write.offset].ljust(write.offset, b"\0")
    end = write.offset + len(write.data)
    return content[: write.offset].ljust(write.offset, b"\0") + write.data + content[end:]


class Disk:
    """What is durable, and what happened since.

    Parameters
    ----------
    state
        What is durable at first.
    seed
        Chooses how a write that is lost in part is lost.
    max_states_per_crash
        How many ways of losing something are looked at in one moment, where files are of a page or
        less, and fewer where they are longer; of more, so many are drawn.
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
        """Make durable what happened to a file, or to names."""
        if file is not None:
            for write in self.writes.pop(file, ()):
                self.contents[file] = written(self.contents.get(file, b""), write)
            return
        self.names = self._apply_names(self.changes)
        self.changes = []

    def durable(self):
        """Return what no power cut can change any more, also of files whose names it can."""
        return State(tuple(sorted(self.names.items())), tuple(sorted(self.contents.items())))

    def state(self, names, contents):
        """Return a state of these names, and no bytes of files that have none."""
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
        """Return states that a power cut can leave, and how many ways to them were looked at."""
        files = {
            file: self._sector_axes(file) if file == self.data else self._lost_write_axes(file)
            for file in self.writes
        }
        axes = [axis for _, found, _ in files.values() for axis in found]
        ways = math.prod(count for _, _, count in files.values()) * 2 ** len(self.changes)
        choices = itertools.product(*map(range, map(len, axes)))
        longest = max(map(len, self.contents.values()), default=0)
        max_states_per_crash = max(
            100, self._max_states_per_crash * PAGE_BYTES // max(PAGE_BYTES, longest)
        )
        if math.prod(map(len, axes)) > max_states_per_crash:
            ways = max_states_per_crash
            draw = random.Random(self._seed)  # noqa: S311  # not for secrets
            choices = [[draw.randrange(len(axis)) for axis in axes] for _ in range(ways)]
        every_named = [self._apply_names(some) for some in _subsets(self.changes)]
        states, kept = set(), {}  # one copy of bytes that many states have
        for choice in choices:
            chosen = iter([axis[index] for axis, index in zip(axes, choice, strict=True)])
            contents = dict(self.contents)
            for file, (make, found, _) in files.items():
                content = make(file, [next(chosen) for _ in found])
                contents[file] = kept.setdefault(content, content)
            states |= {self.state(named, contents) for named in every_named}
        return states, ways

    def _lost_write_axes(self, file):
        """How to make a file of its writes, each of which may be lost, or lost in part."""
        axes = [self._parts(write) for write in self.writes[file]]
        ways = math.prod(2 if write.data is None else 6 for write in self.writes[file])
        return self._apply_writes, axes, ways

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
        which = xxhash.xxh3_64_intdigest(write.data, self._seed) % len(broken)
        return [None, write, broken[which]]

    def _sector_axes(self, file):
        """How to make a file of its sectors, each of which may be of any version, or torn."""
        versions = [self.contents[file]]
        for write in self.writes[file]:
            versions.append(written(versions[-1], write))
        axes = []
        half = SECTOR_BYTES // 2
        for begin in range(0, len(versions[0]), SECTOR_BYTES):
            found = [version[begin : begin + SECTOR_BYTES] for version in versions]
            torn = [
                part
                for old, new in itertools.pairwise(found)
                for part in (new[:half] + old[half:], old[:half] + new[half:])
            ]
            axes.append(list(dict.fromkeys(found + torn)))
        return (lambda _, sectors: b"".join(sectors)), axes, math.prod(map(len, axes))


def _subsets(changes):
    for count in range(len(changes) + 1):
        yield from itertools.combinations(changes, count)


def _by_name(state):
    contents = dict(state.contents)
    return {name: contents[file] for name, file in state.names}


class ExploredJob(Job):
    """A job of which every state of its directory can be made for real."""

    def __init__(self, directory, **settings):
        super().__init__(directory, **settings)
        self.start = self.found()

    def found(self):
        """The state of the directory, files numbered in the order of their names."""
        paths = sorted(self.directory.iterdir())
        return State(
            tuple((path.name, number) for number, path in enumerate(paths)),
            tuple((number, path.read_bytes()) for number, path in enumerate(paths)),
        )

    def restore(self, state):
        """Make a state for real; what is changed in place keeps its inode, as on a disk."""
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
        """Check what anyone may find after a crash."""
        names, contents = dict(state.names), dict(state.contents)
        self.check_intermediate_state({name: contents[file] for name, file in names.items()})


class Exploration:
    """The crashes of a job, and of what comes after them.

    Parameters
    ----------
    job
        What is run.
    seed
        Chooses among what is left by crashes.
    max_states_per_crash, omitted_sync
        As for `Disk` and `RecordingStorage`.
    """

    def __init__(self, job, seed, *, max_states_per_crash=20_000, omitted_sync=None):
        self.states = self.runs = 0
        self.places = set()
        self._job = job
        self._seed = seed
        self._draw = random.Random(seed)  # noqa: S311  # not for secrets
        self._max_states_per_crash = max_states_per_crash
        self._omitted_sync = omitted_sync
        self._seen = set()
        self._waiting = {}  # for each cause and names that are left, what a command may be run on
        self._dropped = 0

    def run(self, max_runs):
        """Run the job on what it begins with, and then on what crashes leave; return counts."""
        for fsync in (True, True, True, False):  # in different orders
            self._run_and_crash(CrashState(self._job.start, fsync=fsync), fsync)
        while self.runs < max_runs and any(self._waiting.values()):
            # Where names are lost there is little else to lose, and little of it would be drawn.
            kinds = [some for some in self._waiting.values() if some]
            weights = [len(some) for some in kinds] if self._draw.random() < 0.5 else None
            (waiting,) = self._draw.choices(kinds, weights)
            at = self._draw.randrange(len(waiting))
            waiting[at], waiting[-1] = waiting[-1], waiting[at]
            self._run_and_crash(waiting.pop())
        return {"states": self.states, "runs": self.runs, "left": self.left}

    @property
    def left(self):
        """How many states no command was run on."""
        return sum(map(len, self._waiting.values())) + self._dropped

    def _run_and_crash(self, left, fsync=True):
        SerialCommitPipeline.has_late_commits = self._draw.random() < 0.5
        storage = run_from(self._job, left, omitted_sync=self._omitted_sync, fsync=fsync)
        self.runs += 1
        self.places |= storage.places
        disk = Disk(left.durable, self._seed, self._max_states_per_crash)
        for event in left.unsynced:
            disk.apply(event)
        unsynced, is_durable = list(left.unsynced), left.fsync
        for event in interleave(storage.log, self._draw):
            if isinstance(event, Sync):
                if is_durable:
                    self._cut_power(disk)
                disk.sync(event.file)
                unsynced = [of for of in unsynced if not event.makes_durable(of)]
                is_durable = is_durable or not unsynced
            else:
                disk.apply(event)
                unsynced.append(event)
            self._enqueue(CrashState(disk.durable(), tuple(unsynced), is_durable))
        if storage.is_done and fsync:
            done = _by_name(self._job.found())
            for state in self._cut_power(disk):  # the command has said that it is done
                self._job.check(_by_name(state) == done, "what is done can be undone")

    def _cut_power(self, disk):
        states, ways = disk.crashes()
        self.states += ways
        for state in sorted(states, key=State.digest):
            self._enqueue(CrashState(state))
        return states

    def _enqueue(self, left):
        """Check a crash state, and queue it for a run unless it was seen before."""
        digest = left.digest()
        if digest in self._seen:
            return
        self._seen.add(digest)
        visible = left.visible()
        self._job.check_crash_state(visible)
        names = tuple(name for name, _ in visible.names)
        waiting = self._waiting.setdefault((bool(left.unsynced), names), [])
        if len(waiting) < MAX_WAITING:
            waiting.append(left)
        else:
            waiting[self._draw.randrange(MAX_WAITING)] = left
            self._dropped += 1


def run_from(job, left, omitted_sync=None, fsync=True):
    """Run a job on a crash state, and check that it ends with the right bytes."""
    state = left.visible()
    job.restore(state)
    storage = RecordingStorage(dict(state.names), omitted_sync, fsync=fsync)
    try:
        storage.is_done = job.command(storage)
        job.check_final_state()
    except (FastvggError, IncorrectStateError) as error:
        raise IncorrectStateError(f"{error}; from {str(left)[:2000]}") from error
    return storage


def make_deterministic():
    """Make runs deterministic: no threads, random numbers, dates or versions."""
    threads.CommitPipeline = in_place.CommitPipeline = SerialCommitPipeline
    redo_log_layout.secrets = SimpleNamespace(token_hex=lambda count: "0" * 2 * count)
    moment = SimpleNamespace(isoformat=lambda timespec: "then")
    manifest.dt = SimpleNamespace(UTC=None, datetime=SimpleNamespace(now=lambda zone: moment))
    manifest.package_versions = dict


def exploration_jobs(place):
    """Return the jobs to explore."""
    return jobs(place, ExploredJob, SETTINGS + LARGER[:1])


def campaign(seed, size):
    """Explore each job with no more than `size` runs."""
    place = Path(tempfile.mkdtemp(prefix="fastvgg-crash-", dir=memory_directory()))
    make_deterministic()
    total = {"states": 0, "runs": 0, "left": 0}
    try:
        for job in exploration_jobs(place):
            counts = Exploration(job, seed).run(size)
            total = {name: total[name] + count for name, count in counts.items()}
    finally:
        shutil.rmtree(place)
    return {**total, "wrong": 0}


if __name__ == "__main__":
    main(campaign, __doc__, size=1_000)
