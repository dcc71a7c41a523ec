"""The redo ring: how a file is changed where it lies, so that a crash anywhere loses nothing.

The new bytes of each chunk are durable in a ring of slots beside the file before the old bytes are
overwritten, and a slot is used again only when what it held is durable in the file. Here nothing
is known of pixels. The journal, `SRC.fastvgg-journal`, in whole pages:

    header            which file, which job; written once, before the journal gets its name
    checkpoint        twice: how many chunks are durable in the file itself
    records           512 bytes for each chunk: the checksums of its old and its new bytes
    slots             for each of the last chunks a record, and its new bytes in whole pages

Whole pages of the file are written, so that a write that is cut off damages nothing that is not in
its slot. All but the new bytes is JSON, each line with its checksum.

The order of operations, and why each sync is needed, was checked by enumerating the states that a
crash can leave: tests/crash_states.py.
"""

from __future__ import annotations

import math
import os
import secrets
import shlex
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple

import xxhash

from fastvgg.datasets.base import open_regular, read_sidecar
from fastvgg.errors import ResumeError, SourceError, TargetError
from fastvgg.storage.local import StoredFile, file_system, is_networked
from fastvgg.storage.location import is_remote
from fastvgg.stream.job import check_fields, check_job, check_sizes
from fastvgg.stream.journal import decode_line, encode_line, journal_path
from fastvgg.transform import storage_dtype

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
MARK: Final = "fastvgg-in-place"  # the first field of a header
HEADER: Final[Schema] = {
    MARK: int,
    "job": dict,
    "chunk_images": int,
    "run": str,
    "inode": int,
    "file_bytes": int,
}
CHECKPOINT: Final[Schema] = {"run": str, "generation": int, "chunks": int}
RECORD: Final[Schema] = {"chunk": int, "run": str, "old": str, "new": str, "edges": str}
PAGE_BYTES: Final = 4096
RECORD_BYTES: Final = 512  # a sector: one that is torn damages no other
CHUNKS_PER_CHECKPOINT: Final = 3  # chunks of the file, with one checkpoint
# What a checkpoint counts is durable with the next commit, and while that is under way the slot of
# the chunk after it is written.
SLOTS: Final = CHUNKS_PER_CHECKPOINT + 2
MAX_HEADER_BYTES: Final = 1024 * 1024
MAX_NAME_BYTES: Final = 40  # of the first field of a line, and the checksum before it


def _pages(nbytes: int) -> int:
    """Return a length, rounded up to whole pages."""
    return -(-nbytes // PAGE_BYTES) * PAGE_BYTES


class RedoLogLayout(NamedTuple):
    """Where everything is: in the file, and in the journal."""

    file_bytes: int
    data_offset: int
    image_bytes: int
    images: int
    chunk_images: int
    header_bytes: int
    """Of the journal."""

    @property
    def chunks(self) -> int:
        """How many chunks there are."""
        return -(-self.images // self.chunk_images)

    def image_span(self, chunk: int) -> tuple[int, int]:
        """Return where in the file a chunk's images begin and end."""
        first, last = chunk * self.chunk_images, min((chunk + 1) * self.chunk_images, self.images)
        return (
            self.data_offset + first * self.image_bytes,
            self.data_offset + last * self.image_bytes,
        )

    def page_span(self, chunk: int) -> tuple[int, int]:
        """Return where the whole pages begin and end that hold a chunk's images."""
        begin, end = self.image_span(chunk)
        return begin - begin % PAGE_BYTES, min(_pages(end), self.file_bytes)

    def checkpoint(self, copy: int) -> int:
        """Return where in the journal a copy of the checkpoint is."""
        return self.header_bytes + copy * PAGE_BYTES

    def record(self, chunk: int) -> int:
        """Return where in the journal a chunk's record is."""
        return self.checkpoint(2) + chunk * RECORD_BYTES

    def slot(self, chunk: int) -> int:
        """Return where in the journal a chunk's slot is: a page with its record, and its pages."""
        first = self.checkpoint(2) + _pages(self.chunks * RECORD_BYTES)
        return first + chunk % SLOTS * (PAGE_BYTES + self.slot_bytes)

    @property
    def slot_bytes(self) -> int:
        """How many bytes the pages of a chunk take at most."""
        return _pages(self.chunk_images * self.image_bytes) + PAGE_BYTES

    @property
    def journal_bytes(self) -> int:
        """How long the journal is."""
        return self.slot(0) + SLOTS * (PAGE_BYTES + self.slot_bytes)


class RedoLogHeader(NamedTuple):
    """What a journal says of the run that began it."""

    job: dict[str, Any]
    chunk_images: int
    run: str
    """Drawn at random, in every record, so that no other run's is taken for one of this."""
    inode: int
    """What tells the file from another of its name; a device's number changes with a reboot."""
    file_bytes: int

    @classmethod
    def new(cls, job: dict[str, Any], chunk_images: int, status: os.stat_result) -> RedoLogHeader:
        """Return the header of a new run."""
        run = secrets.token_hex(8)
        return cls(job, chunk_images, run, status.st_ino, status.st_size)

    @property
    def file_layout(self) -> RedoLogLayout:
        """Where everything is."""
        result = self.job["result"]
        images, *image = result["shape"]
        image_bytes = math.prod(image) * storage_dtype(result["dtype"]).itemsize
        return RedoLogLayout(
            self.file_bytes,
            self.file_bytes - images * image_bytes,
            image_bytes,
            images,
            self.chunk_images,
            _pages(len(self.to_bytes())),
        )

    def command(self, path: Path) -> str:
        """Return the command that finishes the run."""
        transform = self.job["transform"]
        rounding = transform["rounding"]
        other = "" if rounding == "nearest" else f" --rounding {rounding}"
        return f"fastvgg {transform['direction']} {shlex.quote(str(path))} --in-place{other}"

    def to_bytes(self) -> bytes:
        """Return the first line of the journal."""
        return encode_line({MARK: FORMAT, **self._asdict()})


class RedoRecord(NamedTuple):
    """The checksums of a chunk, all xxh3-64."""

    chunk: int
    run: str
    old: str
    """Of its images before."""
    new: str
    """Of its images afterwards."""
    edges: str
    """Of what its slot holds beside its images: the rest of their first and last page."""

    @classmethod
    def from_bytes(cls, data: bytes) -> RedoRecord | None:
        """Return the record that was written at the start of `data`; None if it is not whole.

        Raises
        ------
        ValueError
            If it is whole, and yet no record.
        """
        fields = decode_line(_first_line(data))
        if fields is None:
            return None
        check_fields(fields, RECORD)
        return cls(**fields)


def read_redo_log_header(file_path: Path) -> RedoLogHeader | None:
    """Read the header of a file's journal; None where there is none, or not of a ring.

    Raises
    ------
    ResumeError
        If it is damaged, or of a format that this version does not know.
    """
    if is_remote(file_path):  # where nothing is changed in place
        return None
    path = journal_path(file_path)
    start = read_sidecar(path, at_most=MAX_HEADER_BYTES)
    if start is None or not _is_redo_log(start):
        return None
    try:
        return _header_of(path, _first_line(start))
    except ValueError as error:
        raise _damaged(path, file_path, f"its header ({str(error)[:200]})") from None


def _is_redo_log(start: bytes) -> bool:
    """Whether a journal is of a run in place: by its first field, or if that is damaged by zeros.

    A ring is filled up with them to whole pages. The journal of a run into a new file has none,
    unless a crash left them after lines that are whole, and then its own first field can be read.
    """
    line, _, rest = start.partition(b"\n")
    name = line[:MAX_NAME_BYTES]
    return MARK.encode() in name or (b"\0" in rest and b"fastvgg-journal" not in name)


def _header_of(path: Path, line: bytes) -> RedoLogHeader:
    fields = decode_line(line) or {}
    found = fields.get(MARK)
    if type(found) is int and found != FORMAT:
        raise ResumeError(
            f"{path} has format {str(found)[:20]}, and this version reads {FORMAT}",
            "finish the run with the version that began it",
        )
    check_fields(fields, HEADER)
    header = RedoLogHeader(**{name: fields[name] for name in RedoLogHeader._fields})
    check_job(header.job)
    check_sizes([header.chunk_images, header.file_bytes])
    if line != header.to_bytes() or header.file_layout.data_offset < 0:
        raise ValueError("its parts do not fit together")
    return header


def _first_line(data: bytes) -> bytes:
    line, end, _ = data.partition(b"\n")
    return line + end


def _damaged(journal: Path, file: Path, what: str) -> ResumeError:
    return ResumeError(
        f"{journal} is damaged in {what}: nothing tells which bytes of {file} are old and which "
        "are new",
        "put back both from a copy of one time; or make the file again from its source, and "
        "remove the journal",
    )


def check_in_place_supported(path: Path) -> None:
    """Refuse a file that cannot be changed where it lies without a danger to someone.

    Raises
    ------
    TargetError
        Saying what it is.
    """
    status, system = path.lstat(), file_system(path)
    if path.is_symlink():
        problem, remedy = "is a symbolic link", f"give the file itself: {path.resolve()}"
    elif status.st_nlink > 1:
        problem = f"has {status.st_nlink} names (hard links), and would change under all of them"
        remedy = "copy it, or remove the other names"
    elif status.st_blocks * 512 < status.st_size:
        problem = f"has {status.st_size} bytes, and {status.st_blocks * 512} on the disk: holes"
        remedy = "make a copy without: cp --sparse=never"
    elif is_networked(system):
        problem = f"lies on {system}, where another machine may write it at the same time"
        remedy = "write a new file: give a DST"
    elif not os.access(path, os.R_OK | os.W_OK):
        problem, remedy = "cannot be written to", "check its permissions"
    else:
        return
    raise TargetError(f"{path} {problem}", remedy)


def check_same_file(header: RedoLogHeader, path: Path) -> None:
    """Refuse a file that is not the one that a run in place began with.

    Raises
    ------
    ResumeError
        Saying what to do with the journal.
    """
    status = path.stat()
    if (status.st_ino, status.st_size) != (header.inode, header.file_bytes):
        raise ResumeError(
            f"{path} is not the file that the unfinished run in place was changing: "
            f"{journal_path(path)} is of another",
            "put back that file; or, if this one is whole as it was before, give --restart",
        )


def check_restart(header: RedoLogHeader, path: Path) -> None:
    """Refuse to begin again with a file of which a part is new already.

    Raises
    ------
    ResumeError
        If it is the one that the unfinished run was changing, or begins as that does.
    """
    if path.stat().st_ino == header.inode or _starts_new_run(header, path):
        raise ResumeError(
            f"{path} is partly old and partly new, and cannot be begun again",
            f"finish it: {header.command(path)}",
        )


def unfinished_error(header: RedoLogHeader, path: Path) -> SourceError:
    """Return the error of who would read a file that is neither old nor new."""
    return SourceError(
        f"{path} is being changed in place: a part of it is old, and a part new",
        f"finish that: {header.command(path)}",
    )


def _padded(fields: dict[str, Any] | RedoRecord, nbytes: int) -> bytes:
    """Return fields as a sealed line, followed by zeros."""
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
    """The ring of one file, whose lock is held.

    Parameters
    ----------
    storage
        What carries out the system calls.
    data
        The file that is changed.
    journal
        The open journal.
    places
        Where everything is.
    run
        The run that began it.
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
        # Chunks of the file that a checkpoint counts: one that is durable, and one that will be
        # with the next sync of the journal.
        self._durable = 0
        self._checkpointed = 0
        self._generation = 0
        self._next_copy = 0

    @classmethod
    def begin(
        cls, storage: Storage, data: StoredFile, job: dict[str, Any], chunk_images: int
    ) -> RedoLog:
        """Make the journal of a file that is as it was.

        Raises
        ------
        TargetError
            If there is no room for it.
        """
        header = RedoLogHeader.new(job, chunk_images, os.fstat(data.descriptor))
        file_layout = header.file_layout
        storage.sync(data)  # or a power cut may take what the next chunks are computed from
        path = journal_path(data.path)
        temporary = path.with_name(path.name + ".tmp")
        file = storage.create(temporary)
        try:
            storage.reserve(file, file_layout.journal_bytes)
            ring = cls(storage, data, StoredFile(file.descriptor, path), file_layout, header.run)
            storage.write(file, header.to_bytes().ljust(file_layout.header_bytes, b"\0"), 0)
            ring._write_checkpoint(0)
            storage.sync(file)
            storage.rename(temporary, path)
            storage.sync_directory(path.parent)
        except BaseException as error:
            storage.close(file)
            if isinstance(error, TargetError):  # no room: as if nothing had been begun
                storage.remove(temporary)
            raise
        return ring

    @classmethod
    def reopen(cls, storage: Storage, data: StoredFile, header: RedoLogHeader) -> RedoLog:
        """Open the journal that an earlier run left; both files are then what the disk has.

        A killed run may have synced no part of it: a power cut could take the slot of which this
        run, or that one, had begun to write the file. And where a sync failed, the slot that can be
        read may be nowhere but in memory.

        Raises
        ------
        ResumeError
            If it is not as long as it was made.
        """
        journal = storage.open(journal_path(data.path))
        try:
            _check_length(journal.path, storage.size(journal), header)
            storage.syncfs(journal.path.parent)  # its name among it
            for file in (data, journal):
                storage.sync(file)  # what that did not tell; the file may lie on another disk
                storage.drop_cache(file)
        except BaseException:
            storage.close(journal)
            raise
        return cls(storage, data, journal, header.file_layout, header.run)

    def recover(self) -> int:
        """Write again what the ring holds and the file may not; return how many chunks are done.

        Raises
        ------
        ResumeError
            If the journal is damaged where nothing else tells what the file holds.
        """
        self._read_checkpoints()
        ahead = self._uncheckpointed()
        for chunk in ahead:
            if ahead[chunk] == "in its slot":
                begin, _ = self.file_layout.page_span(chunk)
                self._storage.write(self._data, self._pages(chunk), begin)
        done = self._durable + len(ahead)
        if ahead:
            self._storage.sync(self._data)
            self._write_checkpoint(done)
            self._storage.sync(self._journal)
            self._durable = done
        return done

    def _read_checkpoints(self) -> None:
        found = []
        for copy in range(2):
            fields = self._checkpoint(copy)
            if fields is not None and fields["run"] == self._run:
                found.append((fields["generation"], fields["chunks"], copy))
        if not found:
            raise self._damaged("both copies of its checkpoint")
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
            raise self._damaged(f"copy {copy} of its checkpoint") from None
        return fields

    def _uncheckpointed(self) -> dict[int, Literal["in its slot", "in the file"]]:
        """Return the chunks that were committed after the checkpoint, and where each is whole.

        Of a slot that is not whole the write was cut off, before anything of the chunk was written
        to the file; or the file has the chunk, and the slot was used again. Its bytes tell.
        """
        ahead: dict[int, Literal["in its slot", "in the file"]] = {}
        for chunk in range(self._durable, self.file_layout.chunks):
            record = self.record(chunk)
            if record is None:
                break
            if self._is_in_its_slot(record):
                ahead[chunk] = "in its slot"
                continue
            found = self.checksum_in_file(chunk)
            if found == record.old:
                break
            # What is written again before it would put old bytes into the page that both share.
            if found != record.new or "in its slot" in ahead.values():
                raise self._damaged(f"what it holds of chunk {chunk}")
            ahead[chunk] = "in the file"
        return ahead

    def _is_in_its_slot(self, record: RedoRecord) -> bool:
        images, edges = self._split_edges(record.chunk, memoryview(self._pages(record.chunk)))
        return _checksum(images) == record.new and _checksum(edges) == record.edges

    def _split_edges(self, chunk: int, pages: memoryview) -> tuple[memoryview, bytes]:
        """Return the images in a chunk's pages, and what is around them."""
        (begin, _), (first, last) = (
            self.file_layout.page_span(chunk),
            self.file_layout.image_span(chunk),
        )
        images = slice(first - begin, last - begin)
        return pages[images], bytes(pages[: images.start]) + bytes(pages[images.stop :])

    def _pages(self, chunk: int) -> bytes:
        """Return what a chunk's slot holds."""
        begin, end = self.file_layout.page_span(chunk)
        place = self.file_layout.slot(chunk) + PAGE_BYTES
        return self._storage.read(self._journal, place, end - begin)

    def _damaged(self, what: str) -> ResumeError:
        return _damaged(self._journal.path, self._data.path, what)

    def record(self, chunk: int) -> RedoRecord | None:
        """Return a chunk's record, or the copy of it that its slot has; None if it has none."""
        for offset in (self.file_layout.record(chunk), self.file_layout.slot(chunk)):
            data = self._storage.read(self._journal, offset, RECORD_BYTES)
            try:
                record = RedoRecord.from_bytes(data)
            except ValueError:
                raise self._damaged(f"a record of chunk {chunk}") from None
            if record is not None and (record.chunk, record.run) == (chunk, self._run):
                return record
        return None

    def checksum_in_file(self, chunk: int) -> str:
        """Return the checksum of a chunk's images as the file has them."""
        begin, end = self.file_layout.image_span(chunk)
        return _checksum(self._storage.read(self._data, begin, end - begin))

    def record_of(self, chunk: int, pages: memoryview, *, old: str, new: str) -> RedoRecord:
        """Return the record of a chunk; `old` and `new` are the checksums of its images."""
        _, edges = self._split_edges(chunk, pages)
        return RedoRecord(chunk, self._run, old, new, _checksum(edges))

    def put(self, chunk: int, pages: memoryview) -> None:
        """Write a chunk's new pages into its slot, while the one before may be being committed."""
        if self._durable < chunk - SLOTS + 1:
            raise RuntimeError(f"chunk {chunk} would take a slot that is still needed")
        self._storage.write(self._journal, pages, self.file_layout.slot(chunk) + PAGE_BYTES)

    def commit(self, record: RedoRecord, pages: memoryview) -> None:
        """Make a chunk's new pages durable in its slot, then write them to the file.

        Chunks come in order.
        """
        checkpointed, chunk = self._checkpointed, record.chunk
        slot, begin = self.file_layout.slot(chunk), self.file_layout.page_span(chunk)[0]
        self._storage.write(self._journal, _padded(record, PAGE_BYTES), slot)
        self._storage.write(
            self._journal, _padded(record, RECORD_BYTES), self.file_layout.record(chunk)
        )
        self._storage.sync(self._journal)  # the commit, also of the checkpoint
        self._durable = checkpointed
        self._storage.write(self._data, pages, begin)
        if chunk + 1 - checkpointed == CHUNKS_PER_CHECKPOINT:
            self._storage.sync(self._data)
            self._write_checkpoint(chunk + 1)

    def _write_checkpoint(self, chunks: int) -> None:
        """Write the older copy of the checkpoint, which a write that is cut off may destroy."""
        self._generation += 1
        fields = {"run": self._run, "generation": self._generation, "chunks": chunks}
        place = self.file_layout.checkpoint(self._next_copy)
        self._storage.write(self._journal, _padded(fields, PAGE_BYTES), place)
        self._next_copy = 1 - self._next_copy
        self._checkpointed = chunks

    def finish(self) -> list[str]:
        """Make all of the file durable; return the checksums of its chunks."""
        self._storage.sync(self._data)
        records = (self.record(chunk) for chunk in range(self.file_layout.chunks))
        return [
            self.checksum_in_file(chunk) if record is None else record.new
            for chunk, record in enumerate(records)
        ]

    def remove(self) -> None:
        """Remove the journal of a file that is finished and described."""
        self._storage.remove(self._journal.path)
        self._storage.sync_directory(self._journal.path.parent)

    def close(self) -> None:
        """Close the journal."""
        self._storage.close(self._journal)


def committed_chunks(header: RedoLogHeader, file_path: Path) -> int:
    """Return how many chunks a run in place had committed, as far as its records tell.

    Raises
    ------
    ResumeError
        If one of them is damaged.
    """
    return sum(1 for _ in _records(header, file_path))


def _records(header: RedoLogHeader, file_path: Path) -> Iterator[RedoRecord]:
    file_layout, path = header.file_layout, journal_path(file_path)
    journal = read_sidecar(path, at_most=file_layout.slot(0)) or b""
    for chunk in range(file_layout.chunks):
        begin = file_layout.record(chunk)
        try:
            record = RedoRecord.from_bytes(journal[begin : begin + RECORD_BYTES])
        except ValueError:
            raise _damaged(path, file_path, f"the record of chunk {chunk}") from None
        if record is None or (record.chunk, record.run) != (chunk, header.run):
            return
        yield record


def _starts_new_run(header: RedoLogHeader, path: Path) -> bool:
    """Whether the first chunk of a file, which may be a copy, is what a run in place made of it."""
    first = next(_records(header, path), None)
    if first is None or first.new == first.old:
        return False
    begin, end = header.file_layout.image_span(0)
    with open_regular(path) as file:
        file.seek(begin)
        return _checksum(file.read(end - begin)) == first.new
