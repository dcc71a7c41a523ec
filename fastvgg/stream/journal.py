"""Which chunks are durable: `DST.fastvgg-journal`, one line for each.

The first line names the job; each further line is a commit, with what is known of the chunk's
images, which is read again when the index is written. A line is the xxh3 of its text, a space, the
text (JSON) and a line feed, so that a line that a crash cut off is told from a whole one: reading
ends at the first line that is not whole, and the chunks after it are done again.

The journal is also the lock: the process that holds it writes the target, and no other.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass, field
from types import NoneType
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import xxhash

from fastvgg.datasets.base import open_regular, open_sidecar
from fastvgg.datasets.index import index_records
from fastvgg.errors import FastvggError, ResumeError, SourceError, TargetError
from fastvgg.storage import objects
from fastvgg.storage.location import is_remote, sidecar_path
from fastvgg.stream.job import check_fields, check_job, check_sizes

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from fastvgg.datasets.base import ImageRecord
    from fastvgg.storage.local import Storage, StoredFile
    from fastvgg.stream.job import Schema

__all__ = [
    "HEADER_NAME",
    "Commit",
    "CommitRef",
    "Journal",
    "JournalState",
    "StoreJournalState",
    "check_same_job",
    "decode_line",
    "encode_line",
    "journal_path",
    "line_name",
    "read_journal",
    "read_journal_header",
]

FORMAT: Final = 1
VERSION: Final = "fastvgg-journal"
HEADER_NAME: Final = "job"
"""Of the first line, where each is an object."""
HEADER_SCHEMA: Final[Schema] = {
    VERSION: int,
    "job": dict,
    "chunk_images": int,
    "replaces": (str, NoneType),
    "retries": bool,
}
COMMIT: Final[Schema] = {
    "chunk": int,
    "checksum": str,
    "source_checksum": str,
    "index": str,
    "failed": int,
}


@dataclass(frozen=True)
class Commit:
    """A chunk whose bytes are durable."""

    chunk: int
    checksum: str
    """xxh3-64 of the chunk's bytes in the target."""
    source_checksum: str
    """xxh3-64 of what identifies the images that were read; empty where the source is an array."""
    index: str
    """The chunk's lines of the index; empty where nothing is known of the images."""
    failed: int
    """How many of the images could not be read."""

    def to_dict(self) -> dict[str, Any]:
        """Return the commit as JSON types."""
        return {name: getattr(self, name) for name in COMMIT}


class CommitRef(NamedTuple):
    """A commit, without what it says of each image: that stays in the journal."""

    checksum: str
    source_checksum: str
    failed: int
    offset: int
    """Where its line begins."""

    @classmethod
    def of(cls, commit: Commit, offset: int) -> CommitRef:
        """Return the mark of a commit whose line begins at an offset."""
        return cls(commit.checksum, commit.source_checksum, commit.failed, offset)


@dataclass
class JournalState:
    """What a journal says."""

    path: Path
    job: dict[str, Any]
    chunk_images: int
    replaces: str | None
    """What identifies the thing that the target's name may be taken from."""
    retries: bool
    """Whether a finished target is taken up again for what failed in it."""
    commits: dict[int, CommitRef] = field(default_factory=dict)
    whole_bytes: int = 0
    """The length of the journal's whole lines."""

    @property
    def images(self) -> int:
        """How many images the job has."""
        return int(self.job["result"]["shape"][0])

    @property
    def chunks(self) -> int:
        """How many chunks the job has."""
        return -(-self.images // self.chunk_images)

    @property
    def complete(self) -> bool:
        """Whether every chunk is durable."""
        return len(self.commits) == self.chunks

    def failures(self, chunk: int) -> list[tuple[int, ImageRecord]]:
        """Read which rows of a chunk failed, and what is known of them."""
        if not self.commits[chunk].failed:
            return []
        start = chunk * self.chunk_images
        records = index_records(self.commit(chunk).index, start)
        return [(row, record) for row, record in enumerate(records, start) if record.failed]

    def commit(self, chunk: int) -> Commit:
        """Read all that a chunk's line says.

        Raises
        ------
        ResumeError
            If it is no longer there.
        """
        with open_regular(self.path) as file:
            file.seek(self.commits[chunk].offset)
            fields = decode_line(file.readline())
        if fields is None:
            raise self.changed()
        return Commit(**fields)

    def changed(self) -> ResumeError:
        """Return the error that says so of the journal."""
        return ResumeError(
            f"{self.path} was changed by something else while the run held it",
            "put it back as the run left it, or give --restart to begin again",
        )

    def header_fields(self) -> dict[str, Any]:
        """Return the fields of the first line."""
        header_fields = {name: getattr(self, name) for name in HEADER_SCHEMA if name != VERSION}
        return {VERSION: FORMAT, **header_fields}


def journal_path(target: Path) -> Path:
    """Return where the journal of a target is."""
    return sidecar_path(target, ".fastvgg-journal")


class StoreJournalState(JournalState):
    """What a journal in a store says, each line of which is an object."""

    def commit(self, chunk: int) -> Commit:
        """Read all that a chunk's object says.

        Raises
        ------
        ResumeError
            If it is no longer there.
        """
        fields = decode_line(objects.read(self.path / line_name(chunk)) or b"")
        if fields is None:
            raise self.changed()
        return Commit(**fields)


def line_name(chunk: int) -> str:
    """Return the name of the object in a store that is a chunk's line of the journal.

    >>> line_name(12)
    '000000012'
    """
    return f"{chunk:09d}"


def read_journal(path: Path) -> JournalState | None:
    """Read a journal; None where there is none, or none with a whole first line.

    Raises
    ------
    ResumeError
        If a line is whole and yet not one of ours.
    SourceError
        If it cannot be read.
    """
    if is_remote(path):
        return _read_store(path)
    with open_sidecar(path) as lines:
        return None if lines is None else _read(path, JournalState, lines)


def read_journal_header(path: Path) -> JournalState | None:
    """Read the first line of a journal, which says what was begun; see `read_journal`."""
    if is_remote(path):
        first = objects.read(path / HEADER_NAME)
        return None if first is None else _read(path, StoreJournalState, [first])
    with open_sidecar(path) as lines:
        return None if lines is None else _read(path, JournalState, itertools.islice(lines, 1))


def _read_store(path: Path) -> JournalState | None:
    try:
        lines = objects.read_all(path)
    except OSError as error:
        raise SourceError(
            f"{path} cannot be read: {error.strerror or error}",
            "check the connection and its permissions",
        ) from None
    first = lines.pop(HEADER_NAME, None)
    # A line that is not whole is that of a chunk to be done again; those after it stay.
    whole = [lines[name] for name in sorted(lines) if decode_line(lines[name]) is not None]
    return None if first is None else _read(path, StoreJournalState, [first, *whole])


def _read(path: Path, kind: type[JournalState], lines: Iterable[bytes]) -> JournalState | None:
    journal_state = None
    for number, line in enumerate(lines, 1):
        try:
            fields = decode_line(line)
            if fields is None:
                break
            if journal_state is None:
                journal_state = _open(path, kind, fields)
            else:
                _add(journal_state, fields)
        except ValueError as error:
            raise ResumeError(
                f"{path} is damaged: line {number} has the right checksum, and is no line of a "
                f"journal: {str(error)[:200]}",
                "put it back as the run left it, or give --restart to begin again",
            ) from None
        journal_state.whole_bytes += len(line)
    return journal_state


def decode_line(line: bytes) -> dict[str, Any] | None:
    """Return the fields of a line that `encode_line` made; None if it is not whole.

    Raises
    ------
    ValueError
        If it is whole, and yet `encode_line` did not make it.
    """
    checksum, _, text = line.removesuffix(b"\n").partition(b" ")
    if not line.endswith(b"\n") or checksum.decode("latin-1") != xxhash.xxh3_64_hexdigest(text):
        return None
    try:
        fields = json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(fields, dict):
        raise ValueError(f"it holds no fields, but {type(fields).__name__}")  # noqa: TRY004
    return fields


def encode_line(fields: dict[str, Any]) -> bytes:
    """Return JSON types as a line that begins with the checksum of the rest."""
    text = json.dumps(fields).encode()
    return f"{xxhash.xxh3_64_hexdigest(text)} ".encode() + text + b"\n"


def _open(path: Path, kind: type[JournalState], fields: dict[str, Any]) -> JournalState:
    if VERSION not in fields:
        raise ResumeError(
            f"{path} is of another kind of run",
            "finish that first: 'fastvgg info' tells how; or give --restart",
        )
    found = fields[VERSION]
    if type(found) is int and found != FORMAT:
        raise ResumeError(
            f"{path} has format {str(found)[:20]}, and this version reads {FORMAT}",
            "finish the run with the version that began it, or give --restart",
        )
    check_fields(fields, HEADER_SCHEMA)
    check_job(fields["job"])
    journal_state = kind(
        path, fields["job"], fields["chunk_images"], fields["replaces"], fields["retries"]
    )
    check_sizes([journal_state.chunk_images])
    return journal_state


def _add(journal_state: JournalState, fields: dict[str, Any]) -> None:
    """Count a commit; one that the job cannot have is a ValueError."""
    check_fields(fields, COMMIT)
    commit = Commit(**fields)
    check_sizes([commit.chunk], least=0, most=journal_state.chunks - 1)
    start = commit.chunk * journal_state.chunk_images
    images = min(journal_state.chunk_images, journal_state.images - start)
    try:
        records = index_records(commit.index, start)
    except SourceError as error:
        raise ValueError(ascii(error.problem)) from None
    if len(records) not in (0, images):
        raise ValueError(f"{len(records)} images in a chunk of {images}")
    if commit.failed != sum(record.failed for record in records):
        raise ValueError(f"{commit.failed} images are said to have failed, and others have")
    journal_state.commits[commit.chunk] = CommitRef.of(commit, journal_state.whole_bytes)


def check_same_job(found: dict[str, Any], wanted: dict[str, Any], target: str) -> None:
    """Refuse to go on with a job that was begun with other settings.

    Raises
    ------
    ResumeError
        Naming every setting that differs, and both values.
    """
    differences = [
        f"{part}.{key}: {found[part].get(key)!r} then, {wanted[part].get(key)!r} now"
        for part in wanted
        for key in sorted(set(found[part]) | set(wanted[part]))
        if found[part].get(key) != wanted[part].get(key)
    ]
    if differences:
        raise ResumeError(
            f"{target} was begun as another job: {'; '.join(differences)}",
            "give the same settings to go on with it"
            + (", or --restart to begin again" if not found["result"]["in_place"] else ""),
        )


class Journal:
    """The journal of one target, open and locked.

    Parameters
    ----------
    target
        The dataset that is being written.
    storage
        What carries out the system calls.
    restart
        Begin again, whatever the journal says.

    Raises
    ------
    TargetError
        If another process is writing the same target.
    """

    def __init__(self, target: Path, storage: Storage, *, restart: bool) -> None:
        self.path = journal_path(target)
        self._storage = storage
        self._file: StoredFile = storage.open(self.path, create=True)
        try:
            if not storage.lock(self._file):
                raise TargetError(
                    f"{target} is being written by another process",
                    "wait for it to end; 'fastvgg info' tells how far it is",
                )
            self.state = None if restart else read_journal(self.path)
        except FastvggError:
            storage.close(self._file)
            raise
        self._end = self.state.whole_bytes if self.state else 0

    def begin(
        self,
        job: dict[str, Any],
        chunk_images: int,
        *,
        replaces: str | None = None,
        done: Iterable[Commit] | None = None,
    ) -> None:
        """Write the first line, in place of whatever was there.

        Parameters
        ----------
        job, chunk_images
            What is begun.
        replaces
            What identifies the thing that the target's name may be taken from.
        done
            The chunks of a finished target, taken up again, that stay as they are.
        """
        self.state = JournalState(self.path, job, chunk_images, replaces, retries=done is not None)
        self._end = 0
        self._append(encode_line(self.state.header_fields()))
        for commit in done or ():
            self.state.commits[commit.chunk] = self._appended(commit)
        self._storage.sync(self._file)
        self._storage.sync_directory(self.path.parent)

    def commit(self, *commits: Commit) -> None:
        """Record, durably, that the bytes of some chunks are durable."""
        refs = {commit.chunk: self._appended(commit) for commit in commits}
        self._storage.sync(self._file)
        if self.state is not None:
            self.state.commits.update(refs)

    def _appended(self, commit: Commit) -> CommitRef:
        return CommitRef.of(commit, self._append(encode_line(commit.to_dict())))

    def _append(self, line: bytes) -> int:
        """Write a line after those that are whole; return where it begins."""
        offset = self._end
        self._storage.truncate(self._file, offset)
        self._storage.write(self._file, line, offset)
        self._end += len(line)
        return offset

    def remove(self) -> None:
        """Remove the journal of a finished run."""
        self._storage.remove(self.path)
        self._storage.sync_directory(self.path.parent)

    def close(self) -> None:
        """Close the journal and let go of the lock; one that says nothing is removed."""
        if self.state is None:
            self._storage.remove(self.path)
        self._storage.close(self._file)
