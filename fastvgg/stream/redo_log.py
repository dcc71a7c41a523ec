"""A redo log for overwriting a file in place: no crash loses data.

The new bytes of each chunk are durable in a ring of slots before the old bytes are overwritten. A
slot is reused only after its contents are durable in the data file. Writes to the data file cover
whole pages, so a torn write damages only bytes that are in the slot.

The order of operations and the need for each sync are verified by enumerating the states that a
crash can leave: tests/campaigns/crash_states.py.
"""

from __future__ import annotations

import os
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from xxhash import xxh3_64_hexdigest

from fastvgg.datasets.base import open_regular, open_sidecar, read_sidecar
from fastvgg.errors import (
    FastvggError,
    ResumeError,
    SourceError,
    StoppedError,
    TargetError,
    command,
    option,
)
from fastvgg.storage.local import OpenFile
from fastvgg.storage.location import is_remote, temporary_path
from fastvgg.stream.job import check_fields, check_sizes, check_version
from fastvgg.stream.journal import check_is_journal, journal_path
from fastvgg.stream.manifest import manifest_path
from fastvgg.stream.redo_log_layout import (
    CHUNKS_PER_CHECKPOINT,
    FORMAT_VERSION,
    PAGE_BYTES,
    RECORD_BYTES,
    SLOTS,
    VERSION_FIELD,
    RedoLogHeader,
    RedoRecord,
    decode_first_line,
    padded_line,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from fastvgg.storage.local import Storage
    from fastvgg.stream.job import Job, Schema

CHECKPOINT_SCHEMA: Final[Schema] = {"run": str, "generation": int, "chunks": int}
MAX_HEADER_BYTES: Final = 1024 * 1024
MAX_NAME_BYTES: Final = 40  # of the first field of a line and the preceding checksum


def read_redo_log_header(file_path: Path) -> RedoLogHeader | None:
    """Read the header of a file's redo log; return None if it has none.

    Raises ResumeError if it is damaged, or has an unknown format version.
    """
    if is_remote(file_path):  # objects cannot be changed in place
        return None
    path = journal_path(file_path)
    start = read_sidecar(path, max_bytes=MAX_HEADER_BYTES)
    if start is None or not _is_redo_log(start):
        return None
    try:
        found = (decode_first_line(start) or {}).get(VERSION_FIELD)
        remedy = "finish the run with the fastvgg version that started it"
        check_version(path, found, FORMAT_VERSION, remedy)
        return RedoLogHeader.from_bytes(start)
    except ValueError as error:
        raise _damaged_error(file_path, f"its header ({str(error)[:200]})") from None


def _is_redo_log(start: bytes) -> bool:
    """Return whether a journal is a redo log, by its first field or, if damaged, by zero bytes.

    A redo log is zero-padded to whole pages. The journal of a run into a new file has no zeros,
    unless a crash left them after valid lines, in which case its first field is readable.
    """
    line, _, rest = start.partition(b"\n")
    name = line[:MAX_NAME_BYTES]
    return VERSION_FIELD.encode() in name or (b"\0" in rest and b"fastvgg-journal" not in name)


def check_same_file(header: RedoLogHeader, path: Path) -> None:
    """Check that a file, and its redo log, have the inode and the lengths that the log records."""
    status, journal = path.stat(), journal_path(path)
    if (status.st_ino, status.st_size) != (header.inode, header.file_bytes):
        raise ResumeError(
            f"{path} is not the file that the unfinished run in place was changing: "
            f"{journal} belongs to another file",
            f"restore that file; or, if this file is intact, give {option('restart')}",
        )
    try:
        found, expected = journal.stat().st_size, header.journal_bytes
    except FileNotFoundError:
        raise SourceError(
            f"{path} has been changed by another process, which finished its run meanwhile",
            f"see what it is now: {command('info', path)}",
        ) from None
    if found != expected:
        raise ResumeError(
            f"{journal} has {found} bytes, expected {expected}",
            "restore the journal that the run left",
        )


def read_header_to_resume(path: Path, *, restart: bool) -> RedoLogHeader | None:
    """Read the header of the run in place to resume; None if there is none, or it is restarted.

    Raises ResumeError for a restart whose file is that of the unfinished run, or a copy of it: part
    would be done twice.
    """
    header = read_redo_log_header(path)
    if header is None or not restart:
        return header
    if path.stat().st_ino == header.inode or _is_first_chunk_converted(header, path):
        raise ResumeError(
            f"{path} is partly converted, so its run cannot start over",
            f"finish it: {header.command(path)}",
        )
    return None


def check_not_in_place(path: Path) -> None:
    """Check that a dataset is not partly converted by an unfinished run in place."""
    header = read_redo_log_header(path)
    if header is not None:
        raise SourceError(
            f"{path} is partly converted by an unfinished run in place",
            f"finish it: {header.command(path)}",
        )


def check_sidecars_in_place(path: Path) -> None:
    """Check that the files that a run in place writes or replaces were written by fastvgg."""
    temporary = temporary_path(manifest_path(path))
    if not check_is_journal(journal_path(path)) and os.path.lexists(temporary):
        raise TargetError(
            f"{temporary} exists, but no journal shows that fastvgg wrote it", "move it away"
        )


def committed_chunks(header: RedoLogHeader, file_path: Path) -> int:
    """Count the committed chunks of a run in place; raise ResumeError if a record is damaged."""
    return sum(1 for _ in _records(header, file_path))


def _records(header: RedoLogHeader, file_path: Path) -> Iterator[RedoRecord]:
    """Yield the records of the committed chunks, without the lock of the file."""
    with open_sidecar(journal_path(file_path)) as journal:
        if journal is None:
            return
        for chunk in range(header.chunks):
            journal.seek(header.record_offset(chunk))
            try:
                record = RedoRecord.from_bytes(journal.read(RECORD_BYTES), chunk, header.run)
            except ValueError:
                raise _damaged_error(file_path, f"the record of chunk {chunk}") from None
            if record is None:
                return
            yield record


def _is_first_chunk_converted(header: RedoLogHeader, path: Path) -> bool:
    """Return whether the first chunk of a file, perhaps a copy, is already converted."""
    first = next(_records(header, path), None)
    if first is None or first.new == first.old:
        return False
    begin, end = header.image_span(0)
    with open_regular(path) as file:
        file.seek(begin)
        return xxh3_64_hexdigest(file.read(end - begin)) == first.new


def _damaged_error(file: Path, what: str) -> ResumeError:
    return ResumeError(
        f"{journal_path(file)} is damaged ({what}): it is unknown which bytes of {file} are old "
        "and which are new",
        "restore both files from the same backup; or recreate the file from its source and "
        "remove the journal",
    )


class RedoLog:
    """The open redo log, `journal`, of a data file; the caller holds the lock of that file."""

    def __init__(
        self, storage: Storage, data: OpenFile, journal: OpenFile, header: RedoLogHeader
    ) -> None:
        self.header = header
        self._storage = storage
        self._data = data
        self._journal = journal
        # Chunks counted by the durable checkpoint, and by the one that the next sync of the log
        # makes durable.
        self._durable = 0
        self._checkpointed = 0
        self._generation = 0

    @classmethod
    def begin(cls, storage: Storage, data: OpenFile, job: Job, chunk_images: int) -> RedoLog:
        """Create the log for an unchanged data file; raise TargetError if that fails."""
        header = RedoLogHeader.new(job, chunk_images, os.fstat(data.descriptor))
        path = journal_path(data.path)
        is_new = not os.path.lexists(path)
        try:
            return cls._create(storage, data, header)
        except FastvggError as error:
            with suppress(StoppedError):
                storage.remove(temporary_path(path))
                if is_new:
                    storage.remove(path)
                storage.sync_directory(path.parent)
            if isinstance(error, StoppedError):
                raise error.as_refusal() from error
            raise

    @classmethod
    def _create(cls, storage: Storage, data: OpenFile, header: RedoLogHeader) -> RedoLog:
        path, manifest = journal_path(data.path), manifest_path(data.path)
        temporary = temporary_path(path)
        storage.sync(data)  # a power failure must not lose the input of later chunks
        storage.close(storage.open(path, create=True))
        storage.sync_directory(path.parent)  # proves that what has the temporary name is ours
        storage.remove(temporary)
        if os.path.lexists(manifest):
            storage.check_movable(manifest, temporary)
        file = storage.create(temporary)
        try:
            storage.reserve(file, header.journal_bytes)
            log = cls(storage, data, OpenFile(file.descriptor, path), header)
            storage.write(file, header.to_bytes().ljust(header.header_bytes, b"\0"), 0)
            log._write_checkpoint(0)
            storage.sync(file)
            storage.rename(temporary, path)
            storage.sync_directory(path.parent)
        except BaseException:
            storage.close(file)
            raise
        return log

    @classmethod
    def reopen(cls, storage: Storage, data: OpenFile, header: RedoLogHeader) -> RedoLog:
        """Open the log of an earlier run, and make the page cache agree with the disk.

        A killed run may not have synced the log: a power failure could then lose a slot whose
        chunk is partly written to the data file. After a failed sync, a readable slot may exist
        only in memory.
        """
        journal = storage.open(journal_path(data.path))
        try:
            storage.syncfs(journal.path.parent)  # also the name of the log
            for file in (data, journal):
                storage.sync(file)  # reports errors, unlike syncfs; the file may be on another disk
                storage.drop_cache(file)
        except BaseException:
            storage.close(journal)
            raise
        return cls(storage, data, journal, header)

    def recover(self) -> int:
        """Redo committed chunks that the file may lack; return the number of committed chunks.

        Raises
        ------
        ResumeError
            If the log is damaged and the state of the file cannot be determined.
        """
        checkpoints = filter(None, map(self._read_checkpoint, range(2)))
        self._generation, self._durable = max(checkpoints, default=(0, 0))
        if self._generation == 0:
            raise _damaged_error(self._data.path, "both copies of its checkpoint")
        self._checkpointed = self._durable
        slots_intact = self._slots_intact()
        for chunk, is_intact in enumerate(slots_intact, self._durable):
            if is_intact:
                begin, _ = self.header.page_span(chunk)
                self._storage.write(self._data, self._pages(chunk), begin)
        committed = self._durable + len(slots_intact)
        if slots_intact:
            self._storage.sync(self._data)
            self._write_checkpoint(committed)
            self._storage.sync(self._journal)
            self._durable = committed
        return committed

    def _read_checkpoint(self, copy: int) -> tuple[int, int] | None:
        """Return the generation and the number of chunks of a copy; None if it is torn."""
        page = self._storage.read(self._journal, self.header.checkpoint_offset(copy), PAGE_BYTES)
        try:
            fields = decode_first_line(page)
            if fields is None:
                return None
            check_fields(fields, CHECKPOINT_SCHEMA)
            check_sizes([fields["generation"]])
            check_sizes([fields["chunks"]], minimum=0, maximum=self.header.chunks)
        except ValueError:
            raise _damaged_error(self._data.path, f"copy {copy} of its checkpoint") from None
        return (
            (fields["generation"], fields["chunks"]) if fields["run"] == self.header.run else None
        )

    def _slots_intact(self) -> list[bool]:
        """Return whether the slot of each chunk committed after the checkpoint is intact.

        An invalid slot means that its write was interrupted before the chunk was written to the
        file, or that the file has the chunk and the slot was reused. The bytes of the file decide.
        """
        slots_intact: list[bool] = []
        for chunk in range(self._durable, self.header.chunks):
            record = self.record(chunk)
            if record is None:
                break
            is_intact = self.make_record(chunk, self._pages(chunk), old=record.old) == record
            if not is_intact:
                found = self.checksum_in_file(chunk)
                if found == record.old:
                    break
                # Redoing an earlier chunk would put old bytes into the page that both share.
                if found != record.new or any(slots_intact):
                    raise _damaged_error(self._data.path, f"chunk {chunk}")
            slots_intact.append(is_intact)
        return slots_intact

    def _pages(self, chunk: int) -> memoryview:
        begin, end = self.header.page_span(chunk)
        offset = self.header.slot_offset(chunk) + PAGE_BYTES
        return memoryview(self._storage.read(self._journal, offset, end - begin))

    def record(self, chunk: int) -> RedoRecord | None:
        """Return a chunk's record, from the table or its slot; None if neither is valid."""
        for offset in (self.header.record_offset(chunk), self.header.slot_offset(chunk)):
            data = self._storage.read(self._journal, offset, RECORD_BYTES)
            try:
                record = RedoRecord.from_bytes(data, chunk, self.header.run)
            except ValueError:
                raise _damaged_error(self._data.path, f"a record of chunk {chunk}") from None
            if record is not None:
                return record
        return None

    def make_record(self, chunk: int, pages: memoryview, *, old: str) -> RedoRecord:
        """Return the record of a chunk with these new pages; `old` is of its images in the file."""
        begin, _ = self.header.page_span(chunk)
        first, last = self.header.image_span(chunk)
        new = xxh3_64_hexdigest(pages[first - begin : last - begin])
        edges = bytes(pages[: first - begin]) + bytes(pages[last - begin :])
        return RedoRecord(chunk, self.header.run, old, new, xxh3_64_hexdigest(edges))

    def checksum_in_file(self, chunk: int) -> str:
        """Return the checksum of a chunk's images in the data file."""
        begin, end = self.header.image_span(chunk)
        return xxh3_64_hexdigest(self._storage.read(self._data, begin, end - begin))

    def stage(self, chunk: int, pages: memoryview) -> None:
        """Write a chunk's new pages into its slot; may overlap the commit of the previous chunk."""
        if self._durable < chunk - SLOTS + 1:
            raise RuntimeError(f"chunk {chunk} would overwrite a slot that is still needed")
        self._storage.write(self._journal, pages, self.header.slot_offset(chunk) + PAGE_BYTES)

    def commit(self, record: RedoRecord, pages: memoryview) -> None:
        """Make a chunk's new pages durable in its slot, then write them to the file.

        Chunks must be committed in order.
        """
        checkpointed, chunk = self._checkpointed, record.chunk
        for offset, nbytes in (
            (self.header.slot_offset(chunk), PAGE_BYTES),
            (self.header.record_offset(chunk), RECORD_BYTES),
        ):
            self._storage.write(self._journal, padded_line(record._asdict(), nbytes), offset)
        self._storage.sync(self._journal)  # commits the record, and an earlier checkpoint
        self._durable = checkpointed
        self._storage.write(self._data, pages, self.header.page_span(chunk)[0])
        if chunk + 1 - checkpointed == CHUNKS_PER_CHECKPOINT:
            self._storage.sync(self._data)
            self._write_checkpoint(chunk + 1)

    def _write_checkpoint(self, chunks: int) -> None:
        """Overwrite the older copy of the checkpoint; a torn write leaves the newer one."""
        self._generation += 1
        fields = {"run": self.header.run, "generation": self._generation, "chunks": chunks}
        offset = self.header.checkpoint_offset(1 - self._generation % 2)
        self._storage.write(self._journal, padded_line(fields, PAGE_BYTES), offset)
        self._checkpointed = chunks

    def finish(self) -> list[str]:
        """Make the data file durable; return the checksums of its chunks.

        Raises
        ------
        StoppedError
            If another process truncated the file: what lies behind the end of the rest is lost.
        """
        self._storage.sync(self._data)
        if self._storage.has_holes(self._data, self.header.file_bytes):
            raise StoppedError(
                f"{self._data.path} was truncated by another process while it was converted",
                "move it away, copy the original file to this name, and rerun with "
                f"{option('restart')}",
            )
        records = (self.record(chunk) for chunk in range(self.header.chunks))
        return [
            self.checksum_in_file(chunk) if record is None else record.new
            for chunk, record in enumerate(records)
        ]

    def remove(self) -> None:
        """Remove the log, after the manifest is written."""
        temporary = temporary_path(self._journal.path)
        if os.path.lexists(temporary):  # left by a crash; only the log proves it ours
            self._storage.remove(temporary)
            self._storage.sync_directory(temporary.parent)
        self._storage.remove(self._journal.path)
        self._storage.sync_directory(self._journal.path.parent)

    def close(self) -> None:
        """Close the log."""
        self._storage.close(self._journal)
