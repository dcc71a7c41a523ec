"""The journal, `DST.fastvgg-journal`: which chunks are durable, one line per chunk.

The first line records the job; each further line is a commit with the records of the chunk's
images, which are read back when the index is written. Reading stops at the first line that a crash
truncated, and the chunks after it are recomputed.

In an object store each line is an object.
"""

from __future__ import annotations

import itertools
import os
import re
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import NoneType
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from fastvgg.datasets.base import ImageRecord
from fastvgg.datasets.files import open_regular, open_sidecar, read_sidecar
from fastvgg.datasets.index import is_valid_name
from fastvgg.errors import ResumeError, SourceError, TargetError, command, option
from fastvgg.storage import objects
from fastvgg.storage.location import is_remote, sidecar_path, temporary_path
from fastvgg.stream.job import Job, check_chunks, check_fields, check_sizes, check_version
from fastvgg.stream.lines import decode_line, encode_line

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from fastvgg.stream.job import Schema

FORMAT_VERSION: Final = 3
VERSION_FIELD: Final = "fastvgg-journal"
JOURNAL_SUFFIX: Final = ".fastvgg-journal"
HEADER_NAME: Final = "job"
"""Name of the header object in a store."""
HEADER_SCHEMA: Final[Schema] = {
    VERSION_FIELD: int,
    "job": dict,
    "chunk_images": int,
    "replaces": (str, NoneType),
    "retries": bool,
}
COMMIT_SCHEMA: Final[Schema] = {
    "chunk": int,
    "checksum": str,
    "source_checksum": str,
    "records": list,
}
CHECKSUM_PATTERN: Final = re.compile("[0-9a-f]{16}")
LINE_NAME_PATTERN: Final = re.compile("[0-9]{9}")  # see `line_name`
HEADER_START_BYTES: Final = 27
HEADER_START_PATTERN: Final = re.compile(rb'[0-9a-f]{16} \{"fastvgg-')  # also of a redo log
MAX_HEADER_BYTES: Final = 1024 * 1024
# Of the records of a chunk. A longer line is read as several, of which none has a valid checksum.
MAX_LINE_BYTES: Final = 256 * 1024 * 1024
RECORD_TYPES: Final = (str, str, int, int, bool, str)  # the types of the fields of an `ImageRecord`


@dataclass(frozen=True)
class Commit:
    """The journal record of a durable chunk."""

    chunk: int
    checksum: str
    """xxh3-64 of the chunk's bytes in the target."""
    source_checksum: str
    """xxh3-64 of the identities of the images that were read; empty for an array source."""
    records: list[ImageRecord]
    """One per image; empty if the source has no image records."""

    @property
    def failed(self) -> int:
        """Number of images that could not be read."""
        return sum(record.failed for record in self.records)

    def to_line(self) -> bytes:
        """Encode the commit as a line of the journal."""
        return encode_line({name: getattr(self, name) for name in COMMIT_SCHEMA})

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Commit:
        """Return the commit of a decoded line; raise ValueError if a field is wrong."""
        check_fields(fields, COMMIT_SCHEMA)
        if not CHECKSUM_PATTERN.fullmatch(fields["checksum"]):
            raise ValueError(f"{ascii(fields['checksum'])[:40]} is not a checksum")
        return cls(**{**fields, "records": [_parse_record(record) for record in fields["records"]]})


class CommitRef(NamedTuple):
    """A commit without its image records, which stay in the journal to save memory."""

    checksum: str
    source_checksum: str
    failed: int
    offset: int
    """Offset of its line in the journal, in bytes."""

    @classmethod
    def of(cls, commit: Commit, offset: int) -> CommitRef:
        """Return the reference to a commit whose line starts at `offset`."""
        return cls(commit.checksum, commit.source_checksum, commit.failed, offset)


@dataclass
class JournalState:
    """The contents of a journal."""

    path: Path
    job: Job
    chunk_images: int
    replaces: str | None
    """Identity of the existing file or directory that publishing may replace."""
    retries: bool
    """Whether the run retries the failed images of a finished target."""
    commits: dict[int, CommitRef] = field(default_factory=dict)
    valid_bytes: int = 0
    """Length of the journal up to its last valid line, in bytes."""

    @property
    def chunks(self) -> int:
        """Number of chunks of the job."""
        return -(-self.job.result.images // self.chunk_images)

    @property
    def complete(self) -> bool:
        """Whether every chunk is durable."""
        return len(self.commits) == self.chunks

    def failures(self, chunk: int) -> list[tuple[int, ImageRecord]]:
        """Read the rows of a chunk that failed, with their records."""
        if not self.commits[chunk].failed:
            return []
        start = chunk * self.chunk_images
        records = enumerate(self.commit(chunk).records, start)
        return [(row, record) for row, record in records if record.failed]

    def commit(self, chunk: int) -> Commit:
        """Read the commit of a chunk back from its line; raise ResumeError if it was changed."""
        if is_remote(self.path):
            line = objects.read(self.path / line_name(chunk)) or b""
        else:
            with open_regular(self.path) as file:
                file.seek(self.commits[chunk].offset)
                line = file.readline(MAX_LINE_BYTES)
        fields = decode_line(line)
        if fields is None:
            raise ResumeError(
                f"{self.path} was modified by another program while the run held its lock",
                "put it back as the run left it, or start over: rerun the command that writes "
                f"the target with {option('restart')}",
            )
        return Commit.from_dict(fields)

    def header_line(self) -> bytes:
        """Encode the header line."""
        fields = {name: getattr(self, name) for name in HEADER_SCHEMA if name != VERSION_FIELD}
        return encode_line({VERSION_FIELD: FORMAT_VERSION, **fields, "job": self.job.to_dict()})


def journal_path(target: Path) -> Path:
    """Return the path of the journal of a target."""
    return sidecar_path(target, JOURNAL_SUFFIX)


def line_name(chunk: int) -> str:
    """Return the name of the object, in a store, that is a chunk's journal line."""
    return f"{chunk:09d}"


def read_journal(path: Path, *, header_only: bool = False) -> JournalState | None:
    """Read a journal; return None if it does not exist or its header line is incomplete.

    With `header_only`, the commits are not read.

    Raises
    ------
    ResumeError
        If a line has a valid checksum but invalid contents.
    SourceError
        If the journal cannot be read.
    """
    max_lines = 1 if header_only else None
    journal_state = None
    for number, line in enumerate(itertools.islice(_lines(path), max_lines), 1):
        try:
            fields = decode_line(line)
            if fields is None:
                break
            if journal_state is None:
                journal_state = _parse_header(path, fields)
            else:
                _add_commit(journal_state, fields)
        except ValueError as error:
            raise ResumeError(
                f"{path} is damaged: line {number} has a valid checksum but is not a journal "
                f"record: {str(error)[:200]}",
                "put it back as the run left it, or start over: rerun the command that writes "
                f"the target with {option('restart')}",
            ) from None
        journal_state.valid_bytes += len(line)
    return journal_state


def _lines(path: Path) -> Iterator[bytes]:
    """Yield the lines of a journal, its header first; none if it does not exist."""
    if not is_remote(path):
        with open_sidecar(path) as file:
            max_bytes = MAX_HEADER_BYTES
            while file is not None and (line := file.readline(max_bytes)):
                yield line
                max_bytes = MAX_LINE_BYTES
        return
    with _store_errors(path):
        header = objects.read(path / HEADER_NAME)
    if header is None:
        return
    yield header
    with _store_errors(path):
        lines = objects.read_all(path)
    # The chunk of an invalid line is recomputed; unlike in a file, the lines after it stay valid.
    for name in sorted(lines.keys() - {HEADER_NAME}):
        if decode_line(lines[name]) is not None:
            yield lines[name]


@contextmanager
def _store_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise SourceError(
            f"{path} cannot be read: {error.strerror or error}",
            "check the connection and the permission to read there",
        ) from None


def check_is_journal(path: Path) -> bool:
    """Check that the file or prefix with the name of a journal, if any, was written by fastvgg.

    Returns whether there is a header, even a damaged one. A crash before the header is durable
    leaves an empty file. What has the temporary name is ours only if the journal exists.

    Raises
    ------
    TargetError
        If it, or what has its temporary name, is something else.
    """
    if is_remote(path):
        with _store_errors(path):
            names = objects.list_objects(path)
        if not all(name == HEADER_NAME or LINE_NAME_PATTERN.fullmatch(name) for name in names):
            raise _foreign_error(path)
        return HEADER_NAME in names
    temporary = temporary_path(path)
    is_temporary = os.path.lexists(temporary)  # before the journal, which another run may create
    start = read_sidecar(path, max_bytes=HEADER_START_BYTES)
    if start is None and is_temporary and os.path.lexists(temporary):
        raise _foreign_error(temporary)
    if path.is_symlink() or (start and not HEADER_START_PATTERN.fullmatch(start)):
        raise _foreign_error(path)
    return bool(start)


def _foreign_error(path: Path) -> TargetError:
    return TargetError(
        f"{path} exists, but is not a journal of fastvgg",
        "move it away, or choose another name for the target",
    )


def _parse_header(path: Path, fields: dict[str, Any]) -> JournalState:
    if VERSION_FIELD not in fields:
        target = path.with_name(path.name.removesuffix(JOURNAL_SUFFIX))
        raise ResumeError(
            f"{path} belongs to a run in place",
            f"finish that run first; its command is in the result of {command('info', target)}",
        )
    remedy = (
        "finish the run with the fastvgg version that started it, or start over: rerun the "
        f"command that writes the target with {option('restart')}"
    )
    check_version(path, fields[VERSION_FIELD], FORMAT_VERSION, remedy)
    check_fields(fields, HEADER_SCHEMA)
    job = Job.from_dict(fields["job"])
    journal_state = JournalState(
        path, job, fields["chunk_images"], fields["replaces"], fields["retries"]
    )
    check_sizes([journal_state.chunk_images])
    check_chunks(job.result.images, journal_state.chunk_images)
    if journal_state.retries and not job.is_decoded:
        raise ValueError("only images can be retried")
    return journal_state


def _add_commit(journal_state: JournalState, fields: dict[str, Any]) -> None:
    """Add a commit to the state; raise ValueError if it does not fit the job."""
    commit = Commit.from_dict(fields)
    check_sizes([commit.chunk], minimum=0, maximum=journal_state.chunks - 1)
    start = commit.chunk * journal_state.chunk_images
    images = min(journal_state.chunk_images, journal_state.job.result.images - start)
    if len(commit.records) not in (0, images):
        raise ValueError(f"{len(commit.records)} records for a chunk of {images} images")
    journal_state.commits[commit.chunk] = CommitRef.of(commit, journal_state.valid_bytes)


def _parse_record(fields: object) -> ImageRecord:
    if isinstance(fields, list) and tuple(map(type, fields)) == RECORD_TYPES:
        record = ImageRecord(*fields)
        check_sizes([record.width, record.height], minimum=0)
        if is_valid_name(record.path) and (record.reason or not record.failed):
            return record
    raise ValueError(f"{ascii(fields)[:200]} is not a record of an image")
