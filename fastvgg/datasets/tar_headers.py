"""The members of a tar, found by their headers; what lies between is not read.

Plain headers are parsed here: on a million of them `tarfile` takes 20 s, and this 5. What is rare
in a header, such as a number in base 256, `tarfile` reads.
"""

from __future__ import annotations

import os
import re
import shlex
import struct
import tarfile
from typing import TYPE_CHECKING, Final, NamedTuple, TypeAlias
from zlib import adler32

from fastvgg.datasets.base import read_at
from fastvgg.errors import SourceError

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = [
    "BLOCK",
    "CUT",
    "DEVICE",
    "LINK",
    "SPARSE",
    "UNKNOWN",
    "WHOLE",
    "TarEntry",
    "TarHeaderReader",
]

TarEntry: TypeAlias = tuple[bytes, int, int, int]
"""The path, the state, where the data begin, and how many bytes of them the shard holds."""

# What is known of a member before it is read.
WHOLE, LINK, DEVICE, SPARSE, UNKNOWN, CUT = range(6)

COMPRESSED_STARTS: Final = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\x04\x22\x4d\x18": "lz4",
}
BLOCK: Final = tarfile.BLOCKSIZE
ADLER_MODULUS: Final = 65521
# Name, size, checksum, type, magic, prefix.
HEADER: Final = struct.Struct("100s24x12s12x8sc100x6s82x155s12x")
POSIX_MAGIC: Final = b"ustar\0"  # GNU's is another, and keeps times where this has the prefix
EXTENSIONS: Final = frozenset(
    (
        tarfile.XHDTYPE,
        tarfile.XGLTYPE,
        tarfile.SOLARIS_XHDTYPE,
        tarfile.GNUTYPE_LONGNAME,
        tarfile.GNUTYPE_LONGLINK,
    )
)
# A path has at most 4096 bytes; an extended attribute, which may stand beside it, 65,536.
MAX_EXTENSION_BYTES: Final = 2**20
PAX_RECORD: Final = re.compile(rb"([0-9]{1,7}) ([^=]+)=")
PAX_SIZE: Final = re.compile(rb"[0-9]{1,20}")
PAX_KINDS: Final = (b"path=", b"size=", b"GNU.sparse.")  # other fields change nothing here
# Where a GNU sparse file's header, and a block of its map, say that another block of map follows.
HEADER_CONTINUES: Final = 482
MAP_CONTINUES: Final = 504
WITHOUT_DATA: Final = frozenset(
    (
        tarfile.LNKTYPE,
        tarfile.SYMTYPE,
        tarfile.CHRTYPE,
        tarfile.BLKTYPE,
        tarfile.DIRTYPE,
        tarfile.FIFOTYPE,
    )
)
GNU_DIRECTORY: Final = b"D"  # with a list of what was in it
DIRECTORIES: Final = frozenset((tarfile.DIRTYPE, GNU_DIRECTORY))

# How much is read at once where the next header is near, and where it is not.
NEAR_BYTES: Final = 64 * 2**10
FAR_BYTES: Final = 4 * 2**10
NEAR_GAP_BYTES: Final = 16 * 2**10
STATES: Final = {
    tarfile.REGTYPE: WHOLE,
    tarfile.AREGTYPE: WHOLE,
    tarfile.CONTTYPE: WHOLE,
    tarfile.LNKTYPE: LINK,
    tarfile.SYMTYPE: LINK,
    tarfile.CHRTYPE: DEVICE,
    tarfile.BLKTYPE: DEVICE,
    tarfile.FIFOTYPE: DEVICE,
    tarfile.GNUTYPE_SPARSE: SPARSE,
}


class _Extension(NamedTuple):
    """What headers before a member's own say of it."""

    path: bytes | None = None
    size: int | None = None
    is_sparse: bool = False

    def then(self, later: _Extension) -> _Extension:
        """Return what two say together; where both say something the first counts, as in tarfile.

        >>> _Extension(b"a", None).then(_Extension(b"b", 7))
        _Extension(path=b'a', size=7, is_sparse=False)
        """
        if self is NOTHING or later is NOTHING:
            return self if later is NOTHING else later
        return _Extension(
            later.path if self.path is None else self.path,
            later.size if self.size is None else self.size,
            self.is_sparse or later.is_sparse,
        )

    def applied(self, name: bytes, kind: bytes, size: int) -> tuple[bytes, bytes, int]:
        """Return what a header says, with this instead where this says something."""
        return (
            name if self.path is None else self.path,
            tarfile.GNUTYPE_SPARSE if self.is_sparse else kind,
            size if self.size is None else self.size,
        )


NOTHING: Final = _Extension()


class TarHeaderReader:
    """The members of a shard, in their order, without reading what lies between headers far apart.

    Raises
    ------
    SourceError
        If the headers are damaged, or a path leads out of the dataset.
    OSError
        As the system gives it.
    """

    def __init__(self, shard: str, descriptor: int, size: int) -> None:
        self.is_ended = False
        """Whether the zeros that end a tar were there."""
        self._shard = shard
        self._descriptor = descriptor
        self._size = size
        self._begin = 0
        self._held = b""

    def __iter__(self) -> Iterator[TarEntry]:
        at, extended_at, told = 0, -1, NOTHING
        while (header := self._header(at)) is not None:
            name, kind, size = header
            offset = at + BLOCK
            if kind in EXTENSIONS:
                told = told.then(self._parse_extension(kind, self._extension(at, size), at))
                at, extended_at = offset + _padded(size), at
                continue
            if kind == tarfile.GNUTYPE_SPARSE:
                offset = self._behind_map(at)
            if told is not NOTHING:
                name, kind, size = told.applied(name, kind, size)
                told = NOTHING
            if kind in WITHOUT_DATA:
                size = 0
            if not name or name[0] in b"./" or b"/." in name or b"//" in name or b"\0" in name:
                name = self._contained(name, kind, at)
            if kind not in DIRECTORIES:
                state, held_bytes = STATES.get(kind, UNKNOWN), size
                if offset + size > self._size:
                    state, held_bytes = state or CUT, max(0, self._size - offset)
                yield name, state, offset, held_bytes
            at, extended_at = offset + _padded(size), -1
        if extended_at >= 0:
            raise self._damaged(extended_at, "no member follows this header")

    def bytes_at(self, at: int, count: int) -> bytes:
        """Return so many bytes, fewer only at the shard's end; more are read ahead."""
        start = at - self._begin
        if not 0 <= start <= len(self._held) - count:
            if at >= self._size:
                return b""
            is_near = 0 <= start - len(self._held) <= NEAR_GAP_BYTES
            ahead_bytes = NEAR_BYTES if is_near else FAR_BYTES
            self._held = read_at(self._descriptor, max(count, ahead_bytes), at)
            self._begin, start = at, 0
        return self._held[start : start + count]

    def _header(self, at: int) -> tuple[bytes, bytes, int] | None:
        """Return the name, type and size that a header says; None at the end."""
        block = self.bytes_at(at, BLOCK)
        if len(block) < BLOCK:
            if any(block):
                raise self._damaged(at, "it ends inside a header")
            return None
        name, size_text, sum_text, kind, magic, prefix = HEADER.unpack(block)
        size = _plain_size(block, size_text, sum_text)
        if size is None:
            rare = self._rare_size(block, at)
            if rare is None:
                return None
            size = rare
        name = name.partition(b"\0")[0]
        if kind == tarfile.AREGTYPE and name.endswith(b"/"):  # as it was before DIRTYPE
            kind = tarfile.DIRTYPE
        if magic == POSIX_MAGIC and prefix[0]:
            name = prefix.partition(b"\0")[0] + b"/" + name
        return name, kind, size

    def _rare_size(self, block: bytes, at: int) -> int | None:
        """Return the size that an unusual header says; None if it is the zeros at the end."""
        if not any(block):
            self.is_ended = True
            return None
        try:
            size = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape").size
        except tarfile.HeaderError as error:
            if at == 0:
                raise self._not_tar_error(block) from None
            raise self._damaged(at, f"no header of a member is there ({error})") from None
        if size < 0:
            raise self._damaged(at, f"a member has {size} bytes")
        return size

    def _extension(self, at: int, size: int) -> bytes:
        """Return what a header says that is only there for the next."""
        if size > MAX_EXTENSION_BYTES:
            raise self._damaged(
                at, f"a header of {size} bytes, and {MAX_EXTENSION_BYTES} are the most"
            )
        extension = self.bytes_at(at + BLOCK, size)
        if len(extension) < size:
            raise self._damaged(at, "it ends inside a header")
        return extension

    def _parse_extension(self, kind: bytes, extension: bytes, at: int) -> _Extension:
        """Return what a header says of the next member."""
        if kind == tarfile.GNUTYPE_LONGNAME:
            return _Extension(extension.partition(b"\0")[0])
        if kind == tarfile.GNUTYPE_LONGLINK or not any(word in extension for word in PAX_KINDS):
            return NOTHING
        records = self._records(extension, at)
        path = records.get(b"GNU.sparse.name") or records.get(b"path") or None
        size = records.get(b"size") or None
        is_sparse = any(keyword.startswith(b"GNU.sparse.") for keyword in records)
        if path is None and size is None and not is_sparse:
            return NOTHING
        if kind == tarfile.XGLTYPE:
            raise self._damaged(at, "a header gives all members one path or size")
        if size is not None and not PAX_SIZE.fullmatch(size):
            raise self._damaged(at, f"a member has {size[:40]!r} bytes")
        return _Extension(path, None if size is None else int(size), is_sparse)

    def _records(self, extension: bytes, at: int) -> dict[bytes, bytes]:
        """Return the fields of a pax header."""
        records, begin = {}, 0
        while begin < len(extension):
            match = PAX_RECORD.match(extension, begin)
            end = begin + int(match[1]) if match else 0
            if match is None or end <= match.end() or extension[end - 1 : end] != b"\n":
                raise self._damaged(at, "a pax header cannot be read")
            records[match[2]] = extension[match.end() : end - 1]
            begin = end
        return records

    def _behind_map(self, at: int) -> int:
        """Return where the data of a GNU sparse file begin."""
        goes_on = self.bytes_at(at, BLOCK)[HEADER_CONTINUES]
        at += BLOCK
        while goes_on:
            block = self.bytes_at(at, BLOCK)
            if len(block) < BLOCK:
                raise self._damaged(at, "it ends inside the map of a sparse file")
            goes_on = block[MAP_CONTINUES]
            at += BLOCK
        return at

    def _contained(self, name: bytes, kind: bytes, at: int) -> bytes:
        """Return a member's path with nothing in it but names; refuse one that leads elsewhere."""
        parts = [part for part in name.split(b"/") if part not in (b"", b".")]
        if b".." in parts or b"\0" in name or (not parts and kind not in DIRECTORIES):
            raise SourceError(
                f"{self._shard}: the member at offset {at} has the path {os.fsdecode(name)!r}",
                "paths name files below the dataset; do not use a tar that you do not trust",
            )
        return b"/".join(parts)

    def _damaged(self, at: int, what: str) -> SourceError:
        return SourceError(
            f"{self._shard} is damaged at offset {at}: {what}",
            f"get it again; what can be read of it: tar -tvf {shlex.quote(self._shard)}",
        )

    def _not_tar_error(self, block: bytes) -> SourceError:
        path = shlex.quote(self._shard)
        for start, program in COMPRESSED_STARTS.items():
            if block.startswith(start):
                return SourceError(
                    f"{self._shard} is compressed by {program}: members have no fixed offsets",
                    f"decompress it and give that: {program} -dc < {path} > NEW.tar",
                )
        return SourceError(
            f"{self._shard} is not a tar: no member's header is at offset 0",
            f"check what it is: file {path}",
        )


def _plain_size(block: bytes, size_text: bytes, sum_text: bytes) -> int | None:
    """Return the size that a header says; None if it is no plain header with the right checksum.

    The checksum is the sum of all bytes, with spaces for its own. Adler-32's lower half is the sum
    and 1, modulo 65,521, in a tenth of the time of `sum`.
    """
    try:
        size, told = int(size_text.rstrip(b"\0"), 8), int(sum_text.rstrip(b"\0 "), 8)
    except ValueError:
        return None
    expected = told - 8 * ord(" ") + sum(sum_text) + 1
    return size if size >= 0 and (adler32(block) & 0xFFFF) == expected % ADLER_MODULUS else None


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK
