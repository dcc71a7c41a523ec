"""Every state that a crash can leave on the disk, and the shipped code run on each.

    python tests/crash_states.py                # some minutes; prints its counts
    python tests/crash_states.py --size 500     # no more than so many runs for each job

A run is recorded: every call of `stream.storage` that changes the disk. A power cut between two of
them may keep or lose anything that was not synced:

- of each sector of 512 bytes of the data that is changed in place any version since the last sync,
  or one half of a version and the other half of the one before;
- of each other write all, nothing, its first or its second half, or garbage;
- of the changes of names any, in their order, where a rename is one change.

Only the moments before a sync and after the last call are looked at: what can be lost at any other
is a part of what can be lost then. Each state is made for real, in memory, and the same command is
run on it, and recorded in turn: crashes while recovering from a crash are covered to any depth.
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
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import xxhash
from campaigning import main
from faults import quick_directory
from jobs import DATA, Job, Wrong, jobs

from fastvgg.errors import FastvggError
from fastvgg.stream import manifest, ring
from fastvgg.stream.storage import Storage

SECTOR_BYTES = 512
GARBAGE = 0xEE


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


class Place(NamedTuple):
    """Where in the code a sync is called."""

    function: str
    line: int
    """Counted from where the function begins."""


class RecordingStorage(Storage):
    """Real storage that records what changes the disk.

    Parameters
    ----------
    names
        Which file, by number, each name is of.
    forgets
        Where a sync is called that does nothing, to see what it is for.
    """

    def __init__(self, names, forgets=None):
        super().__init__()
        self.log = []
        self.places = set()
        self._names = dict(names)
        self._files = {}
        self._next = itertools.count(max(names.values(), default=0) + 1)
        self._forgets = forgets

    def _opened(self, path, flags, call):
        if path.name not in self._names:
            self._names[path.name] = next(self._next)
            self.log.append(Name(path.name, self._names[path.name]))
        elif flags & os.O_TRUNC:
            self.log.append(Write(self._names[path.name], 0, None))
        file = super()._opened(path, flags, call)
        self._files[file.descriptor] = self._names[path.name]
        return file

    def reserve(self, file, nbytes):
        super().reserve(file, nbytes)
        self.log.append(Write(self._files[file.descriptor], nbytes, None))

    def write(self, file, data, offset):
        super().write(file, data, offset)
        self.log.append(Write(self._files[file.descriptor], offset, bytes(data)))

    def truncate(self, file, nbytes):
        super().truncate(file, nbytes)
        self.log.append(Write(self._files[file.descriptor], nbytes, None))

    def _syncs_here(self):
        """Whether the call is not one to be forgotten."""
        frame = sys._getframe(2)
        function = f"{Path(frame.f_code.co_filename).stem}.{frame.f_code.co_name}"
        place = Place(function, frame.f_lineno - frame.f_code.co_firstlineno)
        self.places.add(place)
        return place != self._forgets

    def sync(self, file):
        if self._syncs_here():
            self.log.append(Sync(self._files[file.descriptor]))

    def sync_directory(self, path):
        if self._syncs_here():
            self.log.append(Sync(None))

    def rename(self, old, new):
        super().rename(old, new)
        file = self._names.pop(old.name)
        self._names[new.name] = file
        self.log.append(Name(new.name, file, old.name))

    def remove(self, path):
        super().remove(path)
        if self._names.pop(path.name, None) is not None:
            self.log.append(Name(path.name, None))


class State(NamedTuple):
    """What lies on a disk: the names of a directory, and the bytes of each file."""

    names: tuple[tuple[str, int], ...]
    contents: tuple[tuple[int, bytes], ...]


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
    most_at_once
        How many ways of losing something are looked at in one moment; of more, so many are drawn.
    """

    def __init__(self, state, seed, most_at_once):
        self.names = dict(state.names)
        self.contents = dict(state.contents)
        self.writes = {}
        self.changes = []
        self._seed = seed
        self._most_at_once = most_at_once
        self._kept = {}  # one copy of bytes that many states have
        self.data = self.names.get(DATA)

    def happens(self, event):
        """Let something happen that is not a sync."""
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
        self.names = self._named(self.changes)
        self.changes = []

    def _named(self, changes):
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
            file: self._sectors(file) if file == self.data else self._lost_writes(file)
            for file in self.writes
        }
        axes = [axis for _, found, _ in files.values() for axis in found]
        ways = math.prod(count for _, _, count in files.values()) * 2 ** len(self.changes)
        choices = itertools.product(*map(range, map(len, axes)))
        if math.prod(map(len, axes)) > self._most_at_once:
            ways = self._most_at_once
            draw = random.Random(self._seed)  # noqa: S311  # not for secrets
            choices = [[draw.randrange(len(axis)) for axis in axes] for _ in range(ways)]
        every_named = {tuple(sorted(self._named(some).items())) for some in _subsets(self.changes)}
        states = set()
        for choice in choices:
            chosen = iter([axis[index] for axis, index in zip(axes, choice, strict=True)])
            contents = dict(self.contents)
            for file, (make, found, _) in files.items():
                content = make(file, [next(chosen) for _ in found])
                contents[file] = self._kept.setdefault(content, content)
            for named in every_named:
                left = tuple(sorted((file, contents.get(file, b"")) for _, file in named))
                states.add(State(named, left))
        return states, ways

    def _lost_writes(self, file):
        """How to make a file of its writes, each of which may be lost, or lost in part."""
        axes = [self._parts(write) for write in self.writes[file]]
        ways = math.prod(2 if write.data is None else 5 for write in self.writes[file])
        return self._with, axes, ways

    def _with(self, file, writes):
        content = self.contents.get(file, b"")
        for write in writes:
            content = content if write is None else written(content, write)
        return content

    def _parts(self, write):
        if write.data is None:
            return [None, write]
        half = len(write.data) // 2
        broken = [
            write._replace(data=write.data[:half]),
            write._replace(data=bytes(half) + write.data[half:]),
            write._replace(data=bytes([GARBAGE]) * len(write.data)),
        ]
        which = xxhash.xxh3_64_intdigest(write.data, self._seed) % len(broken)
        return [None, write, broken[which]]

    def _sectors(self, file):
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


def _digest(state):
    digest = xxhash.xxh3_128(repr(state.names).encode())
    for _, content in state.contents:
        digest.update(xxhash.xxh3_64_digest(content))
    return digest.digest()


class Explored(Job):
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

    def put(self, state):
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

    def check_left(self, state):
        """Check what anyone may find after a crash."""
        names, contents = dict(state.names), dict(state.contents)
        self.check_in_between({name: contents[file] for name, file in names.items()})


def explore(job, seed, *, most_runs, most_at_once=20_000, forgets=None):
    """Run a job on every state that crashes of it can leave; return counts and sync places."""
    counts = {"states": 0, "runs": 0}
    draw = random.Random(seed)  # noqa: S311  # not for secrets
    seen = {_digest(job.start)}
    waiting = [job.start]
    places = set()
    while waiting and counts["runs"] < most_runs:
        at = draw.randrange(len(waiting))
        waiting[at], waiting[-1] = waiting[-1], waiting[at]
        state = waiting.pop()
        storage = _run_on(job, state, forgets)
        counts["runs"] += 1
        places |= storage.places
        disk = Disk(state, seed, most_at_once)
        for event in [*storage.log, None]:
            if isinstance(event, Sync) or event is None:
                left, ways = disk.crashes()
                counts["states"] += ways
                new = {_digest(state): state for state in left}
                for digest in sorted(new.keys() - seen):
                    job.check_left(new[digest])
                    waiting.append(new[digest])
                seen |= new.keys()
            if event is None:  # the command has said that it is done
                done = _by_name(job.found())
                for last in left:
                    job.expect(_by_name(last) == done, "what is done can be undone")
            elif isinstance(event, Sync):
                disk.sync(event.file)
            else:
                disk.happens(event)
    return {**counts, "left": len(waiting)}, places


def _run_on(job, state, forgets):
    job.put(state)
    storage = RecordingStorage(dict(state.names), forgets)
    try:
        job.command(storage)
        job.check_end()
    except (FastvggError, Wrong) as error:
        raise Wrong(f"{error}; from {str(state)[:2000]}") from error
    return storage


def freeze():
    """Have every run write the same bytes: no random numbers, no date, no versions."""
    ring.secrets = SimpleNamespace(token_hex=lambda count: "0" * 2 * count)
    moment = SimpleNamespace(isoformat=lambda timespec: "then")
    manifest.dt = SimpleNamespace(UTC=None, datetime=SimpleNamespace(now=lambda zone: moment))
    manifest.package_versions = dict


def explored(place):
    """The jobs that are explored: chunks of one and two images, that share sectors and pages."""
    return jobs(place, Explored)


def campaign(seed, size):
    """Explore each job with no more than `size` runs."""
    place = Path(tempfile.mkdtemp(prefix="fastvgg-crash-", dir=quick_directory()))
    freeze()
    total = {"states": 0, "runs": 0, "left": 0}
    try:
        for job in explored(place):
            counts, _ = explore(job, seed, most_runs=size)
            total = {name: total[name] + count for name, count in counts.items()}
    finally:
        shutil.rmtree(place)
    return {**total, "wrong": 0}


if __name__ == "__main__":
    main(campaign, __doc__, size=20_000)
