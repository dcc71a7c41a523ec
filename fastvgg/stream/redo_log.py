"""A redo log for overwriting a file in place: no crash loses data.

The new bytes of each chunk are durable in a ring of slots before the old bytes are overwritten. A
slot is reused only after its contents are durable in the data file. This module does not interpret
pixels. Layout of the log, `SRC.fastvgg-journal`, in whole pages:

    header            the file and the job; written once, before the log is renamed into place
    checkpoint        two copies: the number of chunks that are durable in the data file
    records           512 bytes per chunk: the checksums of its old and new bytes
    slots             for each of the latest chunks, its record and its new bytes in whole pages

Writes to the data file cover whole pages, so a torn write damages only bytes that are in the slot.
Everything but the new bytes is JSON lines with checksums.

The order of operations and the need for each sync are verified by enumerating the states that a
crash can leave: tests/campaigns/crash_states.py.
"""

from __future__ import annotations

import os
import secrets
import shlex
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple

import xxhash

from fastvgg.datasets.base import open_regular, read_sidecar
from fastvgg.errors import ResumeError, SourceError, TargetError
from fastvgg.storage.local import StoredFile, file_system, is_networked
from fastvgg.storage.location import is_remote
from fastvgg.stream.job import Job, check_fields, check_sizes
from fastvgg.stream.journal import decode_line, encode_line, journal_path

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from fastvgg.storage.local import Storage
    from fastvgg.stream.job import Schema

__all__ = [
    "RedoLog",
    "RedoLogHeader",
    "RedoLogLayout",
    "RedoRecord",
    "check_in_place_supported",
    "check_restart",
    "check_same_file",
    "committed_chunks",
    "read_redo_log_header",
    "unfinished_error",
]

FORMAT: Final = 1
FORMAT_FIELD: Final = "fastvgg-in-place"  # the first field of the header
HEADER: Final[Schema] = {
    FORMAT_FIELD: int,
    "job": dict,
    "chunk_images": int,
    "run": str,
    "inode": int,
    "file_bytes": int,
}
CHECKPOINT: Final[Schema] = {"run": str, "generation": int, "chunks": int}
RECORD: Final[Schema] = {"chunk": int, "run": str, "old": str, "new": str, "edges": str}
PAGE_BYTES: Final = 4096
RECORD_BYTES: Final = 512  # one sector: a torn write damages one record
CHUNKS_PER_CHECKPOINT: Final = 3  # chunks written to the data file per checkpoint
# A checkpoint becomes durable with the next commit, and during that commit the slot of the chunk
# after it is already being written.
SLOTS: Final = CHUNKS_PER_CHECKPOINT + 2
MAX_HEADER_BYTES: Final = 1024 * 1024
MAX_NAME_BYTES: Final = 40  # of the first field of a line and the preceding checksum


def _pages(nbytes: int) -> int:
    """Round a length up to whole pages."""
    return -(-nbytes // PAGE_BYTES) * PAGE_BYTES


class RedoLogLayout(NamedTuple):
    """Offsets in the data file and in the log."""

    file_bytes: int
    data_offset: int
    image_bytes: int
    images: int
    chunk_images: int
    header_bytes: int
    """Length of the log's header, in whole pages."""

    @property
    def chunks(self) -> int:
        """Number of chunks."""
        return -(-self.images // self.chunk_images)

    def image_span(self, chunk: int) -> tuple[int, int]:
        """Return the byte range of a chunk's images in the data file."""
        first, last = chunk * self.chunk_images, min((chunk + 1) * self.chunk_images, self.images)
        return (
            self.data_offset + first * self.image_bytes,
            self.data_offset + last * self.image_bytes,
        )

    def page_span(self, chunk: int) -> tuple[int, int]:
        """Return the byte range of the whole pages that contain a chunk's images."""
        begin, end = self.image_span(chunk)
        return begin - begin % PAGE_BYTES, min(_pages(end), self.file_bytes)

    def checkpoint(self, copy: int) -> int:
        """Return the log offset of a copy of the checkpoint."""
        return self.header_bytes + copy * PAGE_BYTES

    def record(self, chunk: int) -> int:
        """Return the log offset of a chunk's record."""
        return self.checkpoint(2) + chunk * RECORD_BYTES

    def slot(self, chunk: int) -> int:
        """Return the log offset of a chunk's slot: a page with its record, then its pages."""
        first = self.checkpoint(2) + _pages(self.chunks * RECORD_BYTES)
        return first + chunk % SLOTS * (PAGE_BYTES + self.slot_bytes)

    @property
    def slot_bytes(self) -> int:
        """Maximum size of the pages of a chunk, in bytes."""
        return _pages(self.chunk_images * self.image_bytes) + PAGE_BYTES

    @property
    def journal_bytes(self) -> int:
        """Length of the log, in bytes."""
        return self.slot(0) + SLOTS * (PAGE_BYTES + self.slot_bytes)


class RedoLogHeader(NamedTuple):
    """The header of a redo log: which file, which job."""

    job: Job
    chunk_images: int
    run: str
    """Random id, repeated in every record to reject records of another run."""
    inode: int
    """Identifies the data file. Device numbers are not stored: they change at reboot."""
    file_bytes: int

    @classmethod
    def new(cls, job: Job, chunk_images: int, status: os.stat_result) -> RedoLogHeader:
        """Return the header for a new run."""
        run = secrets.token_hex(8)
        return cls(job, chunk_images, run, status.st_ino, status.st_size)

    @property
    def file_layout(self) -> RedoLogLayout:
        """Offsets in the data file and in the log."""
        result = self.job.result
        return RedoLogLayout(
            self.file_bytes,
            self.file_bytes - result.nbytes,
            result.image_bytes,
            result.images,
            self.chunk_images,
            _pages(len(self.to_bytes())),
        )

    def command(self, path: Path) -> str:
        """Return the shell command that finishes the run."""
        direction, rounding = self.job.transform.direction, self.job.transform.rounding
        option = "" if rounding == "nearest" else f" --rounding {rounding}"
        return f"fastvgg {direction} {shlex.quote(str(path))} --in-place{option}"

    def to_bytes(self) -> bytes:
        """Encode the header line."""
        return encode_line({FORMAT_FIELD: FORMAT, **self._asdict(), "job": self.job.to_dict()})


class RedoRecord(NamedTuple):
    """The checksums (xxh3-64) of a chunk."""

    chunk: int
    run: str
    old: str
    """Of its images before the transform."""
    new: str
    """Of its images after the transform."""
    edges: str
    """Of the other bytes of its first and last page, which its slot also contains."""

    @classmethod
    def from_bytes(cls, data: bytes) -> RedoRecord | None:
        """Decode the record at the start of `data`; return None if its checksum is wrong.

        Raises
        ------
        ValueError
            If the checksum is valid but the contents are not a record.
        """
        fields = decode_line(_first_line(data))
        if fields is None:
            return None
        check_fields(fields, RECORD)
        return cls(**fields)


def read_redo_log_header(file_path: Path) -> RedoLogHeader | None:
    """Read the header of a file's redo log; return None if it has none.

    Raises
    ------
    ResumeError
        If it is damaged, or has an unknown format version.
    """
    if is_remote(file_path):  # objects cannot be changed in place
        return None
    path = journal_path(file_path)
    start = read_sidecar(path, max_bytes=MAX_HEADER_BYTES)
    if start is None or not _is_redo_log(start):
        return None
    try:
        return _parse_header(path, _first_line(start))
    except ValueError as error:
        raise _damaged_error(path, file_path, f"its header ({str(error)[:200]})") from None


def _is_redo_log(start: bytes) -> bool:
    """Return whether a journal is a redo log, by its first field or, if damaged, by zero bytes.

    A redo log is zero-padded to whole pages. The journal of a run into a new file has no zeros,
    unless a crash left them after valid lines, in which case its first field is readable.
    """
    line, _, rest = start.partition(b"\n")
    name = line[:MAX_NAME_BYTES]
    return FORMAT_FIELD.encode() in name or (b"\0" in rest and b"fastvgg-journal" not in name)


def _parse_header(path: Path, line: bytes) -> RedoLogHeader:
    fields = decode_line(line) or {}
    found = fields.get(FORMAT_FIELD)
    if type(found) is int and found != FORMAT:
        raise ResumeError(
            f"{path} has format version {str(found)[:20]}, but this fastvgg reads {FORMAT}",
            "finish the run with the fastvgg version that started it",
        )
    check_fields(fields, HEADER)
    recorded = {name: fields[name] for name in RedoLogHeader._fields}
    header = RedoLogHeader(**{**recorded, "job": Job.from_dict(fields["job"])})
    check_sizes([header.chunk_images, header.file_bytes])
    if line != header.to_bytes() or header.file_layout.data_offset < 0:
        raise ValueError("its fields are inconsistent")
    return header


def _first_line(data: bytes) -> bytes:
    line, end, _ = data.partition(b"\n")
    return line + end


def _damaged_error(journal: Path, file: Path, what: str) -> ResumeError:
    return ResumeError(
        f"{journal} is damaged ({what}): it is unknown which bytes of {file} are old and which "
        "are new",
        "restore both files from the same backup; or create the file again from its source and "
        "remove the journal",
    )


def check_in_place_supported(path: Path) -> None:
    """Check that a file can be overwritten in place safely.

    Raises
    ------
    TargetError
        Naming the reason why not.
    """
    status, system = path.lstat(), file_system(path)
    if path.is_symlink():
        problem, remedy = "is a symbolic link", f"give the file itself: {path.resolve()}"
    elif status.st_nlink > 1:
        problem = f"has {status.st_nlink} hard links, and would change under all of their names"
        remedy = "copy it, or remove the other links"
    elif status.st_blocks * 512 < status.st_size:
        problem = (
            f"is sparse: it has {status.st_size} bytes, but only {status.st_blocks * 512} of them "
            "are allocated on disk"
        )
        remedy = "make a copy without holes: cp --sparse=never"
    elif is_networked(system):
        problem = f"is on {system}, where another machine may write it at the same time"
        remedy = "write a new file: give a DST"
    elif not os.access(path, os.R_OK | os.W_OK):
        problem, remedy = "is not writable", "check its permissions"
    else:
        return
    raise TargetError(f"{path} {problem}", remedy)


def check_same_file(header: RedoLogHeader, path: Path) -> None:
    """Check that a file is the one that the redo log belongs to.

    Raises
    ------
    ResumeError
        If its inode or length differs.
    """
    status = path.stat()
    if (status.st_ino, status.st_size) != (header.inode, header.file_bytes):
        raise ResumeError(
            f"{path} is not the file that the unfinished run in place was changing: "
            f"{journal_path(path)} belongs to another file",
            "put back that file; or, if this file is intact, give --restart",
        )


def check_restart(header: RedoLogHeader, path: Path) -> None:
    """Check that a restart would not transform part of a file twice.

    Raises
    ------
    ResumeError
        If this is the file of the unfinished run, or a copy of it.
    """
    if path.stat().st_ino == header.inode or _starts_converted(header, path):
        raise ResumeError(
            f"{path} is partly converted, so its run cannot start over",
            f"finish it: {header.command(path)}",
        )


def unfinished_error(header: RedoLogHeader, path: Path) -> SourceError:
    """Return the error for reading a file that is partly converted."""
    return SourceError(
        f"{path} is partly converted by an unfinished run in place",
        f"finish it: {header.command(path)}",
    )


def _padded(fields: dict[str, Any] | RedoRecord, nbytes: int) -> bytes:
    """Encode fields as a line with a checksum, padded with zeros."""
    line = encode_line(fields._asdict() if isinstance(fields, RedoRecord) else fields)
    if len(line) > nbytes:
        raise ValueError(f"{len(line)} bytes do not fit into {nbytes}")
    return line.ljust(nbytes, b"\0")


def _checksum(data: bytes | memoryview) -> str:
    return xxhash.xxh3_64_hexdigest(data)


def _check_length(journal: Path, found_bytes: int, header: RedoLogHeader) -> None:
    if found_bytes != header.file_layout.journal_bytes:
        raise ResumeError(
            f"{journal} has {found_bytes} bytes, expected {header.file_layout.journal_bytes}",
            "put it back as the run left it",
        )


class RedoLog:
    """The open redo log of a data file; the caller holds the lock of that file.

    Parameters
    ----------
    storage
        Performs the system calls.
    data
        The data file.
    journal
        The open log.
    file_layout
        Offsets in both files.
    run
        Random id of the run that started the log.
    """

    def __init__(
        self,
        storage: Storage,
        data: StoredFile,
        journal: StoredFile,
        file_layout: RedoLogLayout,
        run: str,
    ) -> None:
        self.file_layout = file_layout
        self._storage = storage
        self._data = data
        self._journal = journal
        self._run = run
        # Chunks counted by the durable checkpoint, and by the one that the next sync of the log
        # makes durable.
        self._durable = 0
        self._checkpointed = 0
        self._generation = 0
        self._next_copy = 0

    @classmethod
    def begin(cls, storage: Storage, data: StoredFile, job: Job, chunk_images: int) -> RedoLog:
        """Create the log for an unchanged data file.

        Raises
        ------
        TargetError
            If there is not enough disk space.
        """
        header = RedoLogHeader.new(job, chunk_images, os.fstat(data.descriptor))
        file_layout = header.file_layout
        storage.sync(data)  # a power failure must not lose the input of later chunks
        path = journal_path(data.path)
        temporary = path.with_name(path.name + ".tmp")
        file = storage.create(temporary)
        try:
            storage.reserve(file, file_layout.journal_bytes)
            log = cls(storage, data, StoredFile(file.descriptor, path), file_layout, header.run)
            storage.write(file, header.to_bytes().ljust(file_layout.header_bytes, b"\0"), 0)
            log._write_checkpoint(0)
            storage.sync(file)
            storage.rename(temporary, path)
            storage.sync_directory(path.parent)
        except BaseException as error:
            storage.close(file)
            if isinstance(error, TargetError):  # no space: undo the start of the run
                storage.remove(temporary)
            raise
        return log

    @classmethod
    def reopen(cls, storage: Storage, data: StoredFile, header: RedoLogHeader) -> RedoLog:
        """Open the log of an earlier run, and make the page cache agree with the disk.

        A killed run may not have synced the log: a power failure could then lose a slot whose
        chunk is partly written to the data file. After a failed sync, a readable slot may exist
        only in memory.

        Raises
        ------
        ResumeError
            If the length of the log is wrong.
        """
        journal = storage.open(journal_path(data.path))
        try:
            _check_length(journal.path, storage.size(journal), header)
            storage.syncfs(journal.path.parent)  # also the name of the log
            for file in (data, journal):
                storage.sync(file)  # reports errors, unlike syncfs; the file may be on another disk
                storage.drop_cache(file)
        except BaseException:
            storage.close(journal)
            raise
        return cls(storage, data, journal, header.file_layout, header.run)

    def recover(self) -> int:
        """Redo committed chunks that the file may lack; return the number of committed chunks.

        Raises
        ------
        ResumeError
            If the log is damaged and the state of the file cannot be determined.
        """
        self._read_checkpoints()
        uncheckpointed = self._uncheckpointed()
        for chunk in uncheckpointed:
            if uncheckpointed[chunk] == "slot":
                begin, _ = self.file_layout.page_span(chunk)
                self._storage.write(self._data, self._pages(chunk), begin)
        committed = self._durable + len(uncheckpointed)
        if uncheckpointed:
            self._storage.sync(self._data)
            self._write_checkpoint(committed)
            self._storage.sync(self._journal)
            self._durable = committed
        return committed

    def _read_checkpoints(self) -> None:
        found = []
        for copy in range(2):
            fields = self._checkpoint(copy)
            if fields is not None and fields["run"] == self._run:
                found.append((fields["generation"], fields["chunks"], copy))
        if not found:
            raise self._damaged_error("both copies of its checkpoint")
        self._generation, self._durable, newest = max(found)
        self._checkpointed = self._durable
        self._next_copy = 1 - newest

    def _checkpoint(self, copy: int) -> dict[str, Any] | None:
        page = self._storage.read(self._journal, self.file_layout.checkpoint(copy), PAGE_BYTES)
        try:
            fields = decode_line(_first_line(page))
            if fields is not None:
                check_fields(fields, CHECKPOINT)
                check_sizes([fields["generation"]])
                check_sizes([fields["chunks"]], minimum=0, maximum=self.file_layout.chunks)
        except ValueError:
            raise self._damaged_error(f"copy {copy} of its checkpoint") from None
        return fields

    def _uncheckpointed(self) -> dict[int, Literal["slot", "file"]]:
        """Return the chunks committed after the checkpoint, and where each is intact.

        An invalid slot means that its write was interrupted before the chunk was written to the
        file, or that the file has the chunk and the slot was reused. The bytes of the file decide.
        """
        uncheckpointed: dict[int, Literal["slot", "file"]] = {}
        for chunk in range(self._durable, self.file_layout.chunks):
            record = self.record(chunk)
            if record is None:
                break
            if self._is_slot_intact(record):
                uncheckpointed[chunk] = "slot"
                continue
            found = self.checksum_in_file(chunk)
            if found == record.old:
                break
            # Redoing an earlier chunk would put old bytes into the page that both share.
            if found != record.new or "slot" in uncheckpointed.values():
                raise self._damaged_error(f"chunk {chunk}")
            uncheckpointed[chunk] = "file"
        return uncheckpointed

    def _is_slot_intact(self, record: RedoRecord) -> bool:
        images, edges = self._split_edges(record.chunk, memoryview(self._pages(record.chunk)))
        return _checksum(images) == record.new and _checksum(edges) == record.edges

    def _split_edges(self, chunk: int, pages: memoryview) -> tuple[memoryview, bytes]:
        """Split a chunk's pages into its images and the bytes around them."""
        (begin, _), (first, last) = (
            self.file_layout.page_span(chunk),
            self.file_layout.image_span(chunk),
        )
        images = slice(first - begin, last - begin)
        return pages[images], bytes(pages[: images.start]) + bytes(pages[images.stop :])

    def _pages(self, chunk: int) -> bytes:
        """Read the pages in a chunk's slot."""
        begin, end = self.file_layout.page_span(chunk)
        offset = self.file_layout.slot(chunk) + PAGE_BYTES
        return self._storage.read(self._journal, offset, end - begin)

    def _damaged_error(self, what: str) -> ResumeError:
        return _damaged_error(self._journal.path, self._data.path, what)

    def record(self, chunk: int) -> RedoRecord | None:
        """Return a chunk's record, from the table or its slot; None if neither is valid."""
        for offset in (self.file_layout.record(chunk), self.file_layout.slot(chunk)):
            data = self._storage.read(self._journal, offset, RECORD_BYTES)
            try:
                record = RedoRecord.from_bytes(data)
            except ValueError:
                raise self._damaged_error(f"a record of chunk {chunk}") from None
            if record is not None and (record.chunk, record.run) == (chunk, self._run):
                return record
        return None

    def checksum_in_file(self, chunk: int) -> str:
        """Return the checksum of a chunk's images in the data file."""
        begin, end = self.file_layout.image_span(chunk)
        return _checksum(self._storage.read(self._data, begin, end - begin))

    def record_of(self, chunk: int, pages: memoryview, *, old: str, new: str) -> RedoRecord:
        """Return a new record of a chunk; `old` and `new` are the checksums of its images."""
        _, edges = self._split_edges(chunk, pages)
        return RedoRecord(chunk, self._run, old, new, _checksum(edges))

    def stage(self, chunk: int, pages: memoryview) -> None:
        """Write a chunk's new pages into its slot; may overlap the commit of the previous chunk."""
        if self._durable < chunk - SLOTS + 1:
            raise RuntimeError(f"chunk {chunk} would overwrite a slot that is still needed")
        self._storage.write(self._journal, pages, self.file_layout.slot(chunk) + PAGE_BYTES)

    def commit(self, record: RedoRecord, pages: memoryview) -> None:
        """Make a chunk's new pages durable in its slot, then write them to the file.

        Chunks must be committed in order.
        """
        checkpointed, chunk = self._checkpointed, record.chunk
        slot, begin = self.file_layout.slot(chunk), self.file_layout.page_span(chunk)[0]
        self._storage.write(self._journal, _padded(record, PAGE_BYTES), slot)
        self._storage.write(
            self._journal, _padded(record, RECORD_BYTES), self.file_layout.record(chunk)
        )
        self._storage.sync(self._journal)  # commits the record, and an earlier checkpoint
        self._durable = checkpointed
        self._storage.write(self._data, pages, begin)
        if chunk + 1 - checkpointed == CHUNKS_PER_CHECKPOINT:
            self._storage.sync(self._data)
            self._write_checkpoint(chunk + 1)

    def _write_checkpoint(self, chunks: int) -> None:
        """Overwrite the older copy of the checkpoint; a torn write leaves the newer one."""
        self._generation += 1
        fields = {"run": self._run, "generation": self._generation, "chunks": chunks}
        offset = self.file_layout.checkpoint(self._next_copy)
        self._storage.write(self._journal, _padded(fields, PAGE_BYTES), offset)
        self._next_copy = 1 - self._next_copy
        self._checkpointed = chunks

    def finish(self) -> list[str]:
        """Make the data file durable; return the checksums of its chunks."""
        self._storage.sync(self._data)
        records = (self.record(chunk) for chunk in range(self.file_layout.chunks))
        return [
            self.checksum_in_file(chunk) if record is None else record.new
            for chunk, record in enumerate(records)
        ]

    def remove(self) -> None:
        """Remove the log, after the manifest is written."""
        self._storage.remove(self._journal.path)
        self._storage.sync_directory(self._journal.path.parent)

    def close(self) -> None:
        """Close the log."""
        self._storage.close(self._journal)


def committed_chunks(header: RedoLogHeader, file_path: Path) -> int:
    """Count the chunks that a run in place has committed, by its records.

    Raises
    ------
    ResumeError
        If a record is damaged.
    """
    return sum(1 for _ in _records(header, file_path))


def _records(header: RedoLogHeader, file_path: Path) -> Iterator[RedoRecord]:
    file_layout, path = header.file_layout, journal_path(file_path)
    journal = read_sidecar(path, max_bytes=file_layout.slot(0)) or b""
    for chunk in range(file_layout.chunks):
        begin = file_layout.record(chunk)
        try:
            record = RedoRecord.from_bytes(journal[begin : begin + RECORD_BYTES])
        except ValueError:
            raise _damaged_error(path, file_path, f"the record of chunk {chunk}") from None
        if record is None or (record.chunk, record.run) != (chunk, header.run):
            return
        yield record


def _starts_converted(header: RedoLogHeader, path: Path) -> bool:
    """Return whether the first chunk of a file, perhaps a copy, is already converted."""
    first = next(_records(header, path), None)
    if first is None or first.new == first.old:
        return False
    begin, end = header.file_layout.image_span(0)
    with open_regular(path) as file:
        file.seek(begin)
        return _checksum(file.read(end - begin)) == first.new
