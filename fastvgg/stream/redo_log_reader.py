"""Read what an unfinished run in place left: to plan its resumption, or to refuse another use.

Nothing here needs the lock of the file, or changes it.
"""

from __future__ import annotations

import functools
import itertools
import os
from typing import TYPE_CHECKING, Final

from xxhash import xxh3_64

from fastvgg.datasets.files import open_regular, open_sidecar, read_sidecar
from fastvgg.errors import ResumeError, SourceError, TargetError, command
from fastvgg.storage.location import is_remote, temporary_path
from fastvgg.stream.job import check_version
from fastvgg.stream.journal import check_is_journal, journal_path
from fastvgg.stream.manifest import SPAN_BYTES, manifest_path
from fastvgg.stream.redo_log_layout import (
    FORMAT_VERSION,
    RECORD_BYTES,
    VERSION_FIELD,
    RedoLogHeader,
    RedoRecord,
    decode_first_line,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path
    from typing import BinaryIO

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
        raise damaged_error(file_path, f"its header ({str(error)[:200]})") from None


def _is_redo_log(start: bytes) -> bool:
    """Return whether a journal is a redo log, by its first field or, if damaged, by zero bytes.

    A redo log is zero-padded to whole pages. The journal of a run into a new file has no zeros,
    unless a crash left them after valid lines, in which case its first field is readable.
    """
    line, _, rest = start.partition(b"\n")
    name = line[:MAX_NAME_BYTES]
    return VERSION_FIELD.encode() in name or (b"\0" in rest and b"fastvgg-journal" not in name)


def check_lengths(header: RedoLogHeader, path: Path) -> None:
    """Check that a file, and its redo log, have the lengths that the log records."""
    nbytes, journal = path.stat().st_size, journal_path(path)
    if nbytes != header.file_bytes:
        raise other_file_error(path, f"it has {nbytes} bytes, not {header.file_bytes}")
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

    Raises ResumeError for a restart unless the file's content proves that no chunk is converted:
    part would be done twice.
    """
    header = read_redo_log_header(path)
    if header is None or not restart:
        return header
    if not is_unconverted(header, path):
        raise ResumeError(
            f"{path} may be partly converted, so its run cannot start over",
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
    is_temporary = os.path.lexists(temporary)  # before the log, which another run may create
    is_log = check_is_journal(journal_path(path))
    if is_temporary and not is_log and os.path.lexists(temporary):
        raise TargetError(
            f"{temporary} exists, but no journal shows that fastvgg wrote it", "move it away"
        )


def committed_chunks(header: RedoLogHeader, file_path: Path) -> int:
    """Count the committed chunks of a run in place; raise ResumeError if a record is damaged."""
    return sum(1 for _ in itertools.takewhile(bool, _records(header, file_path)))


def _records(header: RedoLogHeader, file_path: Path) -> Iterator[RedoRecord | None]:
    """Yield the record of each chunk, None if it has none, without the lock of the file."""
    with open_sidecar(journal_path(file_path)) as journal:
        if journal is None:
            return
        for chunk in range(header.chunks):
            yield find_record(header, chunk, functools.partial(_read, journal), file_path)


def find_record(
    header: RedoLogHeader, chunk: int, read: Callable[[int, int], bytes], file_path: Path
) -> RedoRecord | None:
    """Return a chunk's record, from the table or its slot; None if neither is valid."""
    for offset in (header.record_offset(chunk), header.slot_offset(chunk)):
        try:
            record = RedoRecord.from_bytes(read(offset, RECORD_BYTES), chunk, header.run)
        except ValueError:
            raise damaged_error(file_path, f"a record of chunk {chunk}") from None
        if record is not None:
            return record
    return None


def is_unconverted(header: RedoLogHeader, path: Path) -> bool:
    """Return whether every committed chunk is as it was before the run; the others always are.

    If a record is missing among others, nothing is known of its chunk.
    """
    records = [*_records(header, path)]
    committed = [record for record in records if record is not None]
    if path.stat().st_size != header.file_bytes or committed != records[: len(committed)]:
        return False
    with open_regular(path) as file:
        read = functools.partial(_read, file)
        return all(
            checksum_of_range(read, *header.image_span(record.chunk)) == record.old
            for record in committed
        )


def _read(file: BinaryIO, offset: int, nbytes: int) -> bytes:
    file.seek(offset)
    return file.read(nbytes)


def checksum_of_range(read: Callable[[int, int], bytes], begin: int, end: int) -> str:
    """Return the checksum of the bytes of a file from `begin` to `end`."""
    digest = xxh3_64()
    for offset in range(begin, end, SPAN_BYTES):
        digest.update(read(offset, min(SPAN_BYTES, end - offset)))
    return digest.hexdigest()


def other_file_error(file: Path, what: str) -> ResumeError:
    """Return the error for a file that does not belong to the redo log next to it."""
    journal = journal_path(file)
    return ResumeError(
        f"{file} is not what the unfinished run in place left: {what}",
        f"restore the file that {journal} belongs to; or, if this is another file, move that "
        "journal away",
    )


def damaged_error(file: Path, what: str) -> ResumeError:
    """Return the error for a redo log that does not tell the state of its file."""
    return ResumeError(
        f"{journal_path(file)} is damaged ({what}): it is unknown which bytes of {file} are old "
        "and which are new",
        "restore both files from the same backup; or recreate the file from its source and "
        "remove the journal",
    )
