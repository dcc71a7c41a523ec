"""The layout of a redo log, `SRC.fastvgg-journal`: its regions, its header and its records.

In whole pages:

    header            the file and the job; written once, before the log is renamed into place
    checkpoint        two copies: the number of chunks that are durable in the data file
    records           512 bytes per chunk: the checksums of its old and new bytes
    slots             for each of the latest chunks, its record and its new bytes in whole pages

Everything but the new bytes is JSON lines with checksums.
"""

from __future__ import annotations

import dataclasses
import secrets
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from fastvgg.errors import command
from fastvgg.stream.job import Job, check_fields, check_sizes
from fastvgg.stream.lines import decode_line, encode_line

if TYPE_CHECKING:
    import os
    from pathlib import Path

    from fastvgg.stream.job import Schema

FORMAT_VERSION: Final = 3
VERSION_FIELD: Final = "fastvgg-in-place"  # the first field of the header
HEADER_SCHEMA: Final[Schema] = {
    VERSION_FIELD: int,
    "job": dict,
    "chunk_images": int,
    "run": str,
    "inode": int,
    "file_bytes": int,
}
RECORD_SCHEMA: Final[Schema] = {"chunk": int, "run": str, "old": str, "new": str, "edges": str}
PAGE_BYTES: Final = 4096
RECORD_BYTES: Final = 512  # one sector: a torn write damages one record
CHUNKS_PER_CHECKPOINT: Final = 3  # chunks written to the data file per checkpoint
# A checkpoint becomes durable with the next commit, and during that commit the slot of the chunk
# after it is already being written.
SLOTS: Final = CHUNKS_PER_CHECKPOINT + 2


def round_up_to_pages(nbytes: int) -> int:
    """Round a length up to whole pages."""
    return -(-nbytes // PAGE_BYTES) * PAGE_BYTES


def padded_line(fields: dict[str, Any], nbytes: int) -> bytes:
    """Encode fields as a line with a checksum, padded with zeros."""
    line = encode_line(fields)
    if len(line) > nbytes:
        raise ValueError(f"{len(line)} bytes do not fit into {nbytes}")
    return line.ljust(nbytes, b"\0")


def decode_first_line(data: bytes) -> dict[str, Any] | None:
    """Decode the line at the start of `data`; see `decode_line`."""
    line, end, _ = data.partition(b"\n")
    return decode_line(line + end)


@dataclass(frozen=True)
class RedoLogHeader:
    """The header of a redo log: which file, which job; its fields determine all offsets."""

    job: Job
    chunk_images: int
    run: str
    """Random id, repeated in every record to reject records of another run."""
    inode: int
    """Of the data file, if it was not moved. Device numbers are omitted: a reboot changes them."""
    file_bytes: int

    @classmethod
    def new(cls, job: Job, chunk_images: int, status: os.stat_result) -> RedoLogHeader:
        """Return the header for a new run."""
        run = secrets.token_hex(8)
        return cls(job, chunk_images, run, status.st_ino, status.st_size)

    @classmethod
    def from_bytes(cls, data: bytes) -> RedoLogHeader:
        """Decode the header at the start of `data`; raise ValueError if a field is inconsistent."""
        fields = decode_first_line(data) or {}
        check_fields(fields, HEADER_SCHEMA)
        recorded = {name: fields[name] for name in HEADER_SCHEMA if name != VERSION_FIELD}
        header = cls(**{**recorded, "job": Job.from_dict(fields["job"])})
        check_sizes([header.chunk_images, header.file_bytes])
        if not data.startswith(header.to_bytes()) or header.data_offset < 0:
            raise ValueError("its fields are inconsistent")
        return header

    def to_bytes(self) -> bytes:
        """Encode the header line."""
        fields = {name: getattr(self, name) for name in HEADER_SCHEMA if name != VERSION_FIELD}
        return encode_line({VERSION_FIELD: FORMAT_VERSION, **fields, "job": self.job.to_dict()})

    @cached_property  # encoding takes 0.2 ms, and every offset depends on it
    def header_bytes(self) -> int:
        """Length of the header in the log, in whole pages."""
        return round_up_to_pages(len(self.to_bytes()))

    @property
    def data_offset(self) -> int:
        """Offset of the images in the data file, in bytes."""
        return self.file_bytes - self.job.result.nbytes

    @property
    def chunks(self) -> int:
        """Number of chunks."""
        return -(-self.job.result.images // self.chunk_images)

    def image_span(self, chunk: int) -> tuple[int, int]:
        """Return the byte range of a chunk's images in the data file."""
        result, first = self.job.result, chunk * self.chunk_images
        last = min(first + self.chunk_images, result.images)
        begin = self.data_offset + first * result.image_bytes
        return begin, begin + (last - first) * result.image_bytes

    def page_span(self, chunk: int) -> tuple[int, int]:
        """Return the byte range of the whole pages that contain a chunk's images."""
        begin, end = self.image_span(chunk)
        return begin - begin % PAGE_BYTES, min(round_up_to_pages(end), self.file_bytes)

    def checkpoint_offset(self, copy: int) -> int:
        """Return the log offset of a copy of the checkpoint."""
        return self.header_bytes + copy * PAGE_BYTES

    def record_offset(self, chunk: int) -> int:
        """Return the log offset of a chunk's record."""
        return self.checkpoint_offset(2) + chunk * RECORD_BYTES

    def slot_offset(self, chunk: int) -> int:
        """Return the log offset of a chunk's slot: a page with its record, then its pages."""
        first = self.checkpoint_offset(2) + round_up_to_pages(self.chunks * RECORD_BYTES)
        return first + chunk % SLOTS * (PAGE_BYTES + self.slot_bytes)

    @property
    def slot_bytes(self) -> int:
        """Maximum size of the pages of a chunk, in bytes."""
        return round_up_to_pages(self.chunk_images * self.job.result.image_bytes) + PAGE_BYTES

    @property
    def journal_bytes(self) -> int:
        """Length of the log, in bytes."""
        return self.slot_offset(0) + SLOTS * (PAGE_BYTES + self.slot_bytes)

    def check_job(self, job: Job, path: Path) -> None:
        """Check that the run's job is the one wanted now; its file may have been moved since."""
        dataclasses.replace(self.job, source=job.source).check_same(job, str(path))

    def command(self, path: Path) -> str:
        """Return the command that finishes the run, as the caller writes it."""
        transform = self.job.transform
        options = {} if transform.rounding == "nearest" else {"rounding": transform.rounding}
        return command(transform.direction, path, in_place=True, **options)


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
    def from_bytes(cls, data: bytes, chunk: int, run: str) -> RedoRecord | None:
        """Decode the record at the start of `data`.

        Returns None if its checksum is wrong, or if it is of another chunk or run. Raises
        ValueError if the checksum is valid but the contents are not a record.
        """
        fields = decode_first_line(data)
        if fields is None:
            return None
        check_fields(fields, RECORD_SCHEMA)
        record = cls(**fields)
        return record if (record.chunk, record.run) == (chunk, run) else None
