"""Read the headers of a tar, skipping the data between them.

Plain headers are parsed here, which takes 5 s for a million entries; `tarfile` takes 20 s. Rare
header fields, such as a number in base 256, are left to `tarfile`. A tar with a sparse file is
rejected: the bytes of its content are not contiguous.
"""

from __future__ import annotations

import re
import shlex
import struct
import tarfile
from typing import TYPE_CHECKING, Final, TypeAlias
from zlib import adler32

from fastvgg.datasets.files import read_at
from fastvgg.datasets.image_names import image_suffix
from fastvgg.errors import SourceError

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

TarEntry: TypeAlias = tuple[bytes, int, int, int]
"""Path, state, offset of the data, and number of bytes of it that the shard contains."""

# The state of an entry, as known from its headers.
COMPLETE, LINK, DEVICE, UNKNOWN, TRUNCATED, UPWARD_PATH, NUL_PATH, LONG_PATH = range(8)
UNUSUAL_PATH_PATTERN: Final = re.compile(rb"^[./]|/[./]|\0")
MAX_PATH_BYTES: Final = 4095  # of Linux; an entry with a longer path cannot be restored to a file

COMPRESSION_MAGIC: Final = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\x04\x22\x4d\x18": "lz4",
}
BLOCK_BYTES: Final = tarfile.BLOCKSIZE
ADLER_MODULUS: Final = 65521
# Name, size, checksum, type, magic, prefix.
HEADER_STRUCT: Final = struct.Struct("100s24x12s12x8sc100x6s82x155s12x")
POSIX_MAGIC: Final = b"ustar\0"  # GNU tar has a different magic, and times in place of the prefix
PAX_EXTENSIONS: Final = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE)
GNU_EXTENSIONS: Final = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
EXTENSION_TYPES: Final = frozenset((*PAX_EXTENSIONS, *GNU_EXTENSIONS))
# A path has at most 4096 bytes; an extended attribute in the same header at most 65,536.
MAX_EXTENSION_BYTES: Final = 2**20
PAX_RECORD_PATTERN: Final = re.compile(rb"([0-9]{1,7}) ([^=]+)=")
PAX_SIZE_PATTERN: Final = re.compile(rb"[0-9]{1,20}")
PAX_KEYWORDS: Final = (b"path=", b"size=", b"GNU.sparse.")  # other keywords are irrelevant here
LINK_TYPES: Final = (tarfile.LNKTYPE, tarfile.SYMTYPE)
DEVICE_TYPES: Final = (tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE)
TYPES_WITHOUT_DATA: Final = frozenset((*LINK_TYPES, *DEVICE_TYPES, tarfile.DIRTYPE))
STATE_BY_TYPE: Final = {
    **dict.fromkeys((tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE), COMPLETE),
    **dict.fromkeys(LINK_TYPES, LINK),
    **dict.fromkeys(DEVICE_TYPES, DEVICE),
}
GNU_DIRECTORY_TYPE: Final = b"D"  # its data lists the directory's content
DIRECTORY_TYPES: Final = frozenset((tarfile.DIRTYPE, GNU_DIRECTORY_TYPE))

# Read size if the next header is near, and if it is not.
NEAR_READ_BYTES: Final = 64 * 2**10
FAR_READ_BYTES: Final = 4 * 2**10
MAX_NEAR_GAP_BYTES: Final = 16 * 2**10


class TarHeaderReader:
    """Iterate over the entries of a shard in order; data between distant headers is not read.

    A shard may be several archives, one after the other, as `cat a.tar b.tar` makes. As for `tar
    --ignore-zeros`, the blocks of zeros that end an archive do not end the shard: what follows it
    would be omitted silently.

    Raises
    ------
    SourceError
        If the headers are damaged, an entry is a sparse file, or what follows an archive is none.
    OSError
        From the operating system.
    """

    def __init__(self, shard: str, descriptor: int, size: int) -> None:
        self.has_end_marker = False
        """Whether the end-of-archive marker (a block of zeros) of the last archive was found."""
        self._shard = shard
        self._descriptor = descriptor
        self._size = size
        self._archive_offset = 0
        self._buffer_offset = 0
        self._buffer = b""

    def __iter__(self) -> Iterator[TarEntry]:
        offset: int | None = 0
        while offset is not None:
            self._archive_offset, self.has_end_marker = offset, False
            offset = self._skip_zeros((yield from self._archive(offset)))

    def _archive(self, at: int) -> Generator[TarEntry, None, int]:
        """Yield the entries of the archive at offset `at`; return the offset of its end."""
        extended_at = -1
        extension: dict[bytes, bytes] = {}
        while (header := self._header(at)) is not None:
            name, typeflag, size = header
            offset = at + BLOCK_BYTES
            if typeflag in EXTENSION_TYPES:
                data = self._extension_data(at, size)
                # The first of several headers takes precedence, as in tarfile.
                extension = self._parse_extension(typeflag, data, at) | extension
                at, extended_at = offset + _padded(size), at
                continue
            if typeflag == tarfile.GNUTYPE_SPARSE:
                raise self._sparse_error(at)
            if extension:
                name, size = extension.get(b"path", name), int(extension.get(b"size", size))
                extension = {}
            if typeflag in TYPES_WITHOUT_DATA:
                size = 0
            state, available_bytes = STATE_BY_TYPE.get(typeflag, UNKNOWN), size
            if not name or UNUSUAL_PATH_PATTERN.search(name) or len(name) > MAX_PATH_BYTES:
                name, state = _normalize(name, state, at)
            if typeflag not in DIRECTORY_TYPES:
                if offset + size > self._size:
                    state, available_bytes = state or TRUNCATED, max(0, self._size - offset)
                yield name, state, offset, available_bytes
            at, extended_at = offset + _padded(size), -1
        if extended_at >= 0:
            raise self._damaged_error(extended_at, "no entry follows this extension header")
        return at

    def _skip_zeros(self, at: int) -> int | None:
        """Return the offset of the first block from `at` on that is not zeros; None if all are."""
        while data := self.bytes_at(at, NEAR_READ_BYTES):
            zeros = len(data) - len(data.lstrip(b"\0"))
            if zeros < len(data):
                return at + zeros // BLOCK_BYTES * BLOCK_BYTES
            at += zeros
        return None

    def bytes_at(self, at: int, count: int) -> bytes:
        """Return `count` bytes at offset `at`, fewer only at the shard's end; reads ahead."""
        start = at - self._buffer_offset
        if not 0 <= start <= len(self._buffer) - count:
            if at >= self._size:
                return b""
            is_near = 0 <= start - len(self._buffer) <= MAX_NEAR_GAP_BYTES
            buffer_bytes = NEAR_READ_BYTES if is_near else FAR_READ_BYTES
            self._buffer = read_at(self._descriptor, max(count, buffer_bytes), at)
            self._buffer_offset, start = at, 0
        return self._buffer[start : start + count]

    def _header(self, at: int) -> tuple[bytes, bytes, int] | None:
        """Return the name, type and size in a header, or None at the end of the tar."""
        block = self.bytes_at(at, BLOCK_BYTES)
        if len(block) < BLOCK_BYTES:
            if any(block):
                raise self._header_error(at, block, "the file ends inside a header")
            return None
        name, size_text, sum_text, typeflag, magic, prefix = HEADER_STRUCT.unpack(block)
        size = _plain_size(block, size_text, sum_text)
        if size is None:
            size = self._rare_size(block, at)
            if size is None:
                return None
        name = name.partition(b"\0")[0]
        if typeflag == tarfile.AREGTYPE and name.endswith(b"/"):  # the convention before DIRTYPE
            typeflag = tarfile.DIRTYPE
        if magic == POSIX_MAGIC and prefix[0]:
            name = prefix.partition(b"\0")[0] + b"/" + name
        return name, typeflag, size

    def _rare_size(self, block: bytes, at: int) -> int | None:
        """Return the size in an unusual header, or None for the end-of-archive marker."""
        if not any(block):
            self.has_end_marker = True
            return None
        try:
            size = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape").size
        except tarfile.HeaderError as error:
            problem = f"expected the header of an entry ({error})"
            raise self._header_error(at, block, problem) from None
        if size < 0:
            raise self._damaged_error(at, f"an entry has {size} bytes")
        return size

    def _extension_data(self, at: int, size: int) -> bytes:
        """Return the data of an extension header."""
        if MAX_EXTENSION_BYTES < size <= self._size - at - BLOCK_BYTES:
            raise SourceError(
                f"{self._shard}: the extension header at offset {at} has {size} bytes; the limit "
                f"is {MAX_EXTENSION_BYTES}",
                "extract the tar, and create it without extended attributes",
            )
        data = self.bytes_at(at + BLOCK_BYTES, min(size, MAX_EXTENSION_BYTES))
        if len(data) < size:
            raise self._damaged_error(at, "the file ends inside a header")
        return data

    def _parse_extension(self, typeflag: bytes, data: bytes, at: int) -> dict[bytes, bytes]:
        """Return the path and the size that an extension header sets for the next entry."""
        if typeflag == tarfile.GNUTYPE_LONGNAME:
            return {b"path": data.partition(b"\0")[0]}
        if typeflag == tarfile.GNUTYPE_LONGLINK or not any(key in data for key in PAX_KEYWORDS):
            return {}
        records = self._parse_pax(data, at)
        if any(keyword.startswith(b"GNU.sparse.") for keyword in records):
            raise self._sparse_error(at)
        extension = {key: records[key] for key in (b"path", b"size") if records.get(key)}
        if extension and typeflag == tarfile.XGLTYPE:
            raise self._damaged_error(at, "a global header sets the path or size of all entries")
        if not PAX_SIZE_PATTERN.fullmatch(extension.get(b"size", b"0")):
            raise self._damaged_error(at, f"an entry has {extension[b'size'][:40]!r} bytes")
        return extension

    def _parse_pax(self, data: bytes, at: int) -> dict[bytes, bytes]:
        """Return the records of a pax header by keyword."""
        records, begin = {}, 0
        while begin < len(data):
            match = PAX_RECORD_PATTERN.match(data, begin)
            end = begin + int(match[1]) if match else 0
            if match is None or end <= match.end() or data[end - 1 : end] != b"\n":
                raise self._damaged_error(at, "a pax header cannot be read")
            records[match[2]] = data[match.end() : end - 1]
            begin = end
        return records

    def _sparse_error(self, at: int) -> SourceError:
        return SourceError(
            f"{self._shard}: the entry at offset {at} is a sparse file, which is not supported",
            "extract the tar, and create it without sparse files (no -S)",
        )

    def _header_error(self, at: int, block: bytes, problem: str) -> SourceError:
        """Return the error for a block that should be the header of an entry."""
        if at > self._archive_offset:
            return self._damaged_error(at, problem)
        if at == 0:
            return self._not_tar_error(block)
        return SourceError(
            f"{self._shard}: what follows the end of the archive, at offset {at}, is not a tar",
            f"give the archive without it: head -c {at} {shlex.quote(self._shard)} > NEW.tar",
        )

    def _damaged_error(self, at: int, problem: str) -> SourceError:
        return SourceError(
            f"{self._shard} is damaged at offset {at}: {problem}",
            f"replace the file; to list its readable part: tar -tvf {shlex.quote(self._shard)}",
        )

    def _not_tar_error(self, block: bytes) -> SourceError:
        path = shlex.quote(self._shard)
        for start, program in COMPRESSION_MAGIC.items():
            if block.startswith(start):
                return SourceError(
                    f"{self._shard} is compressed with {program}: entries have no fixed offsets",
                    f"decompress it, and give the result: {program} -dc < {path} > NEW.tar",
                )
        return SourceError(
            f"{self._shard} is not a tar: there is no entry header at offset 0",
            f"check the file's type: file {path}",
        )


def _plain_size(block: bytes, size_text: bytes, sum_text: bytes) -> int | None:
    """Return the size in a plain header; None if it is not plain or its checksum is wrong.

    The checksum is the sum of all bytes, counting its own field as spaces. The lower half of
    Adler-32 is that sum plus 1, modulo 65,521, in a tenth of the time of `sum`.
    """
    try:
        size, checksum = int(size_text.rstrip(b"\0"), 8), int(sum_text.rstrip(b"\0 "), 8)
    except ValueError:
        return None
    expected = checksum - 8 * ord(" ") + sum(sum_text) + 1
    return size if size >= 0 and (adler32(block) & 0xFFFF) == expected % ADLER_MODULUS else None


def _normalize(path: bytes, state: int, at: int) -> tuple[bytes, int]:
    """Return an entry's path without empty and "." components, and its state.

    A path that does not name a file below the dataset is substituted.

    >>> _normalize(b"./x//a.jpg", COMPLETE, 512), _normalize(b"../a.jpg", COMPLETE, 512)
    ((b'x/a.jpg', 0), (b'invalid-path-at-512.jpg', 5))
    """
    parts = [part for part in path.split(b"/") if part not in (b"", b".")]
    if b"\0" in path:
        return _substitute(path, at), NUL_PATH
    if b".." in parts or not parts:
        return _substitute(path, at), UPWARD_PATH
    normalized = b"/".join(parts)
    if len(normalized) > MAX_PATH_BYTES:
        return _substitute(path, at), LONG_PATH
    return normalized, state


def _substitute(path: bytes, at: int) -> bytes:
    """Return the name of a row whose path an index cannot contain; it keeps an image suffix."""
    name = path.rpartition(b"/")[2]
    return b"invalid-path-at-%d%b" % (at, image_suffix(name))


def _padded(size: int) -> int:
    return -(-size // BLOCK_BYTES) * BLOCK_BYTES
