"""A redo log for overwriting a file in place: no crash loses data.

The new bytes of each chunk are durable in a ring of slots before the old bytes are overwritten. A
slot is reused only after its contents are durable in the data file. Writes to the data file cover
whole pages, so a torn write damages only bytes that are in the slot.

The order of operations and the need for each sync are verified by enumerating the states that a
crash can leave: tests/campaigns/crash_states.py.
"""

from __future__ import annotations

import functools
import os
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from xxhash import xxh3_64_hexdigest

from fastvgg.errors import FastvggError, ResumeError, StoppedError, option
from fastvgg.parallel import parallel_for
from fastvgg.storage.local import OpenFile
from fastvgg.storage.location import temporary_path
from fastvgg.stream.job import check_fields, check_sizes
from fastvgg.stream.journal import journal_path
from fastvgg.stream.manifest import manifest_path
from fastvgg.stream.redo_log_layout import (
    CHUNKS_PER_CHECKPOINT,
    PAGE_BYTES,
    RECORD_BYTES,
    SLOTS,
    RedoLogHeader,
    RedoRecord,
    decode_first_line,
    padded_line,
)
from fastvgg.stream.redo_log_reader import (
    checksum_of_range,
    damaged_error,
    find_record,
    is_unconverted,
    other_file_error,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from fastvgg.storage.local import Storage
    from fastvgg.stream.job import Job, Schema

CHECKPOINT_SCHEMA: Final[Schema] = {"run": str, "generation": int, "chunks": int}


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

    def recover(self, threads: int, count: Callable[[int], None]) -> int:
        """Redo committed chunks that the file may lack; return the number of committed chunks.

        First, `threads` threads compare every chunk that the file must have with its checksum, and
        call `count` for each.

        Raises
        ------
        ResumeError
            If the file is not what the run left, or the log is damaged and the state of the file
            cannot be determined.
        """
        checkpoints = filter(None, map(self._read_checkpoint, range(2)))
        self._generation, self._durable = max(checkpoints, default=(0, 0))
        if self._generation == 0:
            raise damaged_error(self._data.path, "both copies of its checkpoint")
        self._checkpointed = self._durable
        parallel_for(range(self._durable), functools.partial(self._check_durable, count), threads)
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
            raise damaged_error(self._data.path, f"copy {copy} of its checkpoint") from None
        return (
            (fields["generation"], fields["chunks"]) if fields["run"] == self.header.run else None
        )

    def _check_durable(self, count: Callable[[int], None], chunk: int) -> None:
        """Check that the data file has what was written to it, as far as a record tells."""
        record = self.record(chunk)
        if record is not None and self.checksum_in_file(chunk) != record.new:
            raise self._foreign_error(chunk)
        count(chunk)

    def _foreign_error(self, chunk: int) -> ResumeError:
        """Return the error for a data file that is not what the run left, as a chunk shows."""
        path = self._data.path
        if is_unconverted(self.header, path):
            return ResumeError(
                f"{path} is as it was before the unfinished run in place: none of the chunks that "
                "were converted is so any more",
                f"start over with {option('restart')}",
            )
        return other_file_error(path, f"chunk {chunk} differs")

    def _slots_intact(self) -> list[bool]:
        """Return whether the slot of each chunk committed after the checkpoint is intact.

        An invalid slot means that its write was interrupted before the chunk was written to the
        file, or that the file has the chunk and the slot was reused. The bytes of the file decide.
        Raises ResumeError if these show that it is another file, which a redo would overwrite.
        """
        slots_intact: list[bool] = []
        is_known = self._durable > 0 or self._has_same_inode()
        for chunk in range(self._durable, self.header.chunks):
            record = self.record(chunk)
            if record is None:
                break
            found = self.checksum_in_file(chunk)
            is_intact = self.make_record(chunk, self._pages(chunk), old=record.old) == record
            if not is_intact:
                if found == record.old:
                    break
                # Redoing an earlier chunk would put old bytes into the page that both share.
                if found != record.new or any(slots_intact):
                    raise damaged_error(self._data.path, f"chunk {chunk}")
            is_known |= found in (record.old, record.new)
            slots_intact.append(is_intact)
        if slots_intact and slots_intact[-1]:
            self._check_tail(self._durable + len(slots_intact) - 1, is_known=is_known)
        return slots_intact

    def _has_same_inode(self) -> bool:
        return os.fstat(self._data.descriptor).st_ino == self.header.inode

    def _check_tail(self, chunk: int, *, is_known: bool) -> None:
        """Check that the last committed chunk is followed by the bytes that its slot contains.

        These are the first of the next chunk, which are not converted. A crash may have torn the
        chunks before them, so that nothing else may tell the file from another one.
        """
        _, begin = self.header.image_span(chunk)
        first, end = self.header.page_span(chunk)
        tail = self._pages(chunk)[begin - first :]
        is_same = tail == self._storage.read(self._data, begin, end - begin)
        if not (is_same and (is_known or tail)):
            raise self._foreign_error(chunk)

    def _pages(self, chunk: int) -> memoryview:
        begin, end = self.header.page_span(chunk)
        offset = self.header.slot_offset(chunk) + PAGE_BYTES
        return memoryview(self._storage.read(self._journal, offset, end - begin))

    def record(self, chunk: int) -> RedoRecord | None:
        """Return a chunk's record, from the table or its slot; None if neither is valid."""
        read = functools.partial(self._storage.read, self._journal)
        return find_record(self.header, chunk, read, self._data.path)

    def make_record(self, chunk: int, pages: memoryview, *, old: str) -> RedoRecord:
        """Return the record of a chunk with these new pages; `old` is of its images in the file."""
        begin, _ = self.header.page_span(chunk)
        first, last = self.header.image_span(chunk)
        new = xxh3_64_hexdigest(pages[first - begin : last - begin])
        edges = bytes(pages[: first - begin]) + bytes(pages[last - begin :])
        return RedoRecord(chunk, self.header.run, old, new, xxh3_64_hexdigest(edges))

    def checksum_in_file(self, chunk: int) -> str:
        """Return the checksum of a chunk's images in the data file."""
        read = functools.partial(self._storage.read, self._data)
        return checksum_of_range(read, *self.header.image_span(chunk))

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
