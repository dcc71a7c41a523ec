"""Tar shards of images: read where they lie, nothing is extracted.

Each shard's headers are read once, from one to the next; after that an image is read at its offset.
Plain headers are parsed here: on a million of them `tarfile` takes 20 s, and this 5. What is
rare in a header, such as a number in base 256, `tarfile` reads.

Images are in the order of the shards, and in a shard in that of its members. Members that stand
next to each other and have one key, which is the path up to the first dot in the file's name, are a
sample, as in WebDataset: its `.cls` says the label of its images. All other images have the first
folder of their path for a label.

Of several images of one name the first is read. The others are rows that fail, each with a name of
its own, as an index names an image once: with the row's number before the ending, `cat/a#12.jpg`.
"""

from __future__ import annotations

import os
import re
import shlex
import struct
import tarfile
from array import array
from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple, TypeAlias
from zlib import adler32

import numpy as np
import xxhash

from fastvgg.datasets.base import open_regular
from fastvgg.datasets.images import Images, is_image_name
from fastvgg.datasets.names import Names, hashes_of
from fastvgg.errors import SourceError, StoppedError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from fastvgg.datasets.decode import Decoder, Decoding

__all__ = ["TarListing", "TarShards", "names_tar"]

_Member: TypeAlias = tuple[bytes, int, int, int]
"""The path, the state, where the data begin, and how many bytes of them the shard holds."""

COMPRESSED: Final = {
    ".tgz": "gzip",
    ".tbz": "bzip2",
    ".tbz2": "bzip2",
    ".txz": "xz",
    ".tzst": "zstd",
    ".tar.gz": "gzip",
    ".tar.z": "gzip",
    ".tar.bz2": "bzip2",
    ".tar.xz": "xz",
    ".tar.lzma": "xz",
    ".tar.zst": "zstd",
    ".tar.lz4": "lz4",
    ".tar.lz": "lzip",
}
COMPRESSED_STARTS: Final = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\x04\x22\x4d\x18": "lz4",
}
RANGE: Final = re.compile(r"\{([0-9]+)\.\.([0-9]+)\}")
MOST_SHARDS: Final = 1_000_000
MOST_DIGITS: Final = 18
MISSING_SHOWN: Final = 5

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
MOST_EXTENSION_BYTES: Final = 2**20
PAX_RECORD: Final = re.compile(rb"([0-9]{1,7}) ([^=]+)=")
PAX_SIZE: Final = re.compile(rb"[0-9]{1,20}")
TELLING: Final = (b"path=", b"size=", b"GNU.sparse.")  # other fields change nothing here
# Where a GNU sparse file's header, and a block of its map, say that another block of map follows.
HEADER_GOES_ON: Final = 482
MAP_GOES_ON: Final = 504
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

LABEL_ENDING: Final = b".cls"
MOST_LABEL_BYTES: Final = 64

# What is known of a row before it is read, and why it fails.
WHOLE, LINK, DEVICE, SPARSE, UNKNOWN, CUT, LABEL_CUT, REPEATED = range(8)
REASONS: Final = {
    LINK: "a link: links in a tar are not followed",
    DEVICE: "a device or a pipe, not a file",
    SPARSE: "a sparse file, whose holes are not stored",
    UNKNOWN: "not a file: its type is not known",
    CUT: "the shard ends inside it",
    LABEL_CUT: "the shard ends inside its .cls",
}
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


def names_tar(path: Path) -> bool:
    """Whether a path names tar shards, also compressed ones, which `TarListing` refuses.

    >>> [names_tar(Path(name)) for name in ("a.tar", "{00..99}.TAR", "a.tar.gz", "a.npy")]
    [True, True, True, False]
    """
    return path.name.lower().endswith((".tar", *COMPRESSED))


class _Shard(NamedTuple):
    """A tar file, as it was when it was listed."""

    path: str
    prefix: bytes
    """What its members' names begin with: nothing if there is one shard."""
    size: int
    changed_ns: int

    def is_like(self, status: os.stat_result) -> bool:
        """Whether a file is still the one that was listed."""
        return (status.st_size, status.st_mtime_ns) == (self.size, self.changed_ns)

    def changed(self) -> StoppedError:
        return StoppedError(
            f"{self.path} changed after the run was planned: the result may be a mixture",
            "let it be still, and run again with --restart",
        )


class TarListing:
    """The images in tar shards, found by their headers.

    What is named like an image is a row; one that is no whole file fails when it is read.

    Parameters
    ----------
    path
        A tar, or a range of them: `shards/{0000..0099}.tar`. Where there is a file of that very
        name, it is that file.

    Raises
    ------
    SourceError
        If shards are missing, compressed, or damaged, or a member's path leads out of the dataset.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.others = 0
        self.unended: list[str] = []
        """Shards without the zeros that end a tar: they may be cut short."""
        self._shards: list[_Shard] = []
        self._ends = array("q")
        """How many rows there are up to the end of each shard."""
        self._names = Names()
        self._offsets = array("q")
        self._sizes = array("q")
        self._states = array("B")
        self._labelled_rows = array("q")
        self._labels = Names()
        for shard, prefix in _shard_paths(path):
            self._list(shard, prefix)
        hashes = hashes_of(self._names)
        self._fingerprint = self._hash(hashes)
        self._repeated_rows, self._first_rows = _repeated(hashes)
        if self._repeated_rows:
            for row in self._repeated_rows:
                self._states[row] = REPEATED
            self._names = _renamed(self._names, self._repeated_rows, hashes)

    def __len__(self) -> int:
        return len(self._names)

    @property
    def stored_bytes(self) -> int:
        """How many bytes all images take."""
        return sum(self._sizes)

    def name(self, row: int) -> bytes:
        """Return the path of an image in its tar; of several shards, below the shard's name."""
        return self._names[row]

    def label(self, row: int) -> bytes:
        """Return what the sample's .cls says, or else the first folder of the path in the tar."""
        at = bisect_left(self._labelled_rows, row)
        if at < len(self._labelled_rows) and self._labelled_rows[at] == row:
            return self._labels[at]
        path = self._names[row].removeprefix(self._shard(row).prefix)
        folder, slash, _ = path.partition(b"/")
        return folder if slash else b""

    def identity(self, row: int) -> bytes:
        """Return an image's name, size and offset, and its shard's size and time of change."""
        shard = self._shard(row)
        numbers = self._sizes[row], self._offsets[row], shard.size, shard.changed_ns
        return b"%d %d %d %d %b\0" % (*numbers, self._names[row])

    def read(self, row: int, most_bytes: int) -> bytes:
        """Read an encoded image; many threads may.

        Raises
        ------
        OSError
            If it cannot be read, is no whole file, or is longer than `most_bytes`.
        StoppedError
            If its shard has changed since it was listed, or is gone.
        """
        shard, size = self._shard(row), self._sizes[row]
        try:
            descriptor = os.open(shard.path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
        except (FileNotFoundError, NotADirectoryError):
            raise shard.changed() from None
        try:
            if not shard.is_like(os.fstat(descriptor)):
                raise shard.changed()
            if self._states[row] != WHOLE:
                raise OSError(self._reason(row))
            if size > most_bytes:
                raise OSError(f"it has {size} bytes, and an image at most {most_bytes}")
            data = _read_at(descriptor, size, self._offsets[row])
        finally:
            os.close(descriptor)
        if len(data) != size:
            raise shard.changed()
        return data

    def fingerprint(self) -> str:
        """Return a hash of the shards' names, sizes and times of change, and of all images in them.

        It is of what is there now: where a shard has changed, all are listed again.
        """
        try:
            is_same = all(shard.is_like(os.stat(shard.path)) for shard in self._shards)
        except OSError:  # listing them again says which
            is_same = False
        return self._fingerprint if is_same else TarListing(self.path).fingerprint()

    def _shard(self, row: int) -> _Shard:
        return self._shards[bisect_right(self._ends, row)]

    def _reason(self, row: int) -> str:
        """Say why a row fails."""
        if self._states[row] == REPEATED:
            first = self._first_rows[bisect_left(self._repeated_rows, row)]
            return f"the name occurs twice, first in row {first}"
        return REASONS[self._states[row]]

    def _hash(self, hashes: NDArray[np.uint64]) -> str:
        digest = xxhash.xxh3_128()
        for shard in self._shards:
            name = os.fsencode(os.path.basename(shard.path))
            digest.update(b"%b\0%d %d\0" % (shard.prefix + name, shard.size, shard.changed_ns))
        digest.update(self._sizes)
        digest.update(self._offsets)
        digest.update(hashes.tobytes())
        return digest.hexdigest()

    def _list(self, path: str, prefix: bytes) -> None:
        """Find the images in a shard."""
        try:
            with open_regular(Path(path)) as file:
                status = os.fstat(file.fileno())
                self._shards.append(_Shard(path, prefix, status.st_size, status.st_mtime_ns))
                members = _Members(path, file.fileno(), status.st_size)
                self._add(members, prefix)
        except OSError as error:
            raise SourceError(
                f"{path} cannot be read: {error.strerror or error}",
                "check that it is a tar file, its permissions and its disk",
            ) from None
        self._ends.append(len(self._names))
        if not members.is_ended:
            self.unended.append(path)

    def _add(self, members: _Members, prefix: bytes) -> None:
        """Make rows of a shard's images, sample by sample, and count what is left out."""
        sample = _Sample(b"", len(self))
        for path, state, offset, held_bytes in members:
            key = _key(path)
            if key != sample.key:
                self._end(sample)
                sample = _Sample(key, len(self))
            if is_image_name(path):
                self._names.append(prefix + path)
                self._offsets.append(offset)
                self._sizes.append(held_bytes)
                self._states.append(state)
            elif sample.label is None and _is_label(path, key, state, held_bytes):
                sample.is_cut = state == CUT
                sample.label = members.bytes_at(offset, held_bytes).strip()
            else:
                self.others += 1
        self._end(sample)

    def _end(self, sample: _Sample) -> None:
        """Label the images of a sample, if it has a .cls; one without images is left out."""
        if sample.label is None:
            return
        rows = range(sample.first_row, len(self))
        self.others += not rows
        for row in rows:
            if sample.is_cut:
                self._states[row] = self._states[row] or LABEL_CUT
            elif sample.label:
                self._labelled_rows.append(row)
                self._labels.append(sample.label)


class TarShards(Images):
    """The images in tar shards.

    Parameters
    ----------
    path
        A tar, or a range of them.
    decoding
        How they are read.
    decoder
        What decodes them.
    threads
        How many look at the images' sizes, where no size is given.
    listing
        What was found in it before, not to be looked for again.

    Raises
    ------
    SourceError
        If there is no image, shards cannot be listed, or sizes differ and none was given.
    """

    kind = "tar"

    def __init__(
        self,
        path: Path,
        decoding: Decoding,
        decoder: Decoder,
        *,
        threads: int = 1,
        listing: TarListing | None = None,
    ) -> None:
        listing = TarListing(path) if listing is None else listing
        super().__init__(path, listing, decoding, decoder, threads)
        if listing.unended:
            self.notes.append(
                "shards without the zeros that end a tar, so perhaps cut short: "
                f"{len(listing.unended)}, the first is {listing.unended[0]}"
            )


@dataclass
class _Sample:
    """Members that stand next to each other and have one key."""

    key: bytes
    first_row: int
    label: bytes | None = None
    is_cut: bool = False
    """Whether the shard ends inside its .cls."""


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


class _Members:
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

    def __iter__(self) -> Iterator[_Member]:
        at, extended_at, told = 0, -1, NOTHING
        while (header := self._header(at)) is not None:
            name, kind, size = header
            offset = at + BLOCK
            if kind in EXTENSIONS:
                told = told.then(self._told(kind, self._extension(at, size), at))
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
            self._held = _read_at(self._descriptor, max(count, ahead_bytes), at)
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
                raise self._no_tar(block) from None
            raise self._damaged(at, f"no header of a member is there ({error})") from None
        if size < 0:
            raise self._damaged(at, f"a member has {size} bytes")
        return size

    def _extension(self, at: int, size: int) -> bytes:
        """Return what a header says that is only there for the next."""
        if size > MOST_EXTENSION_BYTES:
            raise self._damaged(
                at, f"a header of {size} bytes, and {MOST_EXTENSION_BYTES} are the most"
            )
        extension = self.bytes_at(at + BLOCK, size)
        if len(extension) < size:
            raise self._damaged(at, "it ends inside a header")
        return extension

    def _told(self, kind: bytes, extension: bytes, at: int) -> _Extension:
        """Return what a header says of the next member."""
        if kind == tarfile.GNUTYPE_LONGNAME:
            return _Extension(extension.partition(b"\0")[0])
        if kind == tarfile.GNUTYPE_LONGLINK or not any(word in extension for word in TELLING):
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
        goes_on = self.bytes_at(at, BLOCK)[HEADER_GOES_ON]
        at += BLOCK
        while goes_on:
            block = self.bytes_at(at, BLOCK)
            if len(block) < BLOCK:
                raise self._damaged(at, "it ends inside the map of a sparse file")
            goes_on = block[MAP_GOES_ON]
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

    def _no_tar(self, block: bytes) -> SourceError:
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


def _read_at(descriptor: int, count: int, at: int) -> bytes:
    """Read so many bytes, fewer only at the end of the file."""
    data = os.pread(descriptor, count, at)
    while 0 < len(data) < count:
        more = os.pread(descriptor, count - len(data), at + len(data))
        if not more:
            break
        data += more
    return data


def _key(path: bytes) -> bytes:
    """Return a path up to the first dot in the file's name that is not its first character.

    >>> _key(b"a.b/c.seg.png"), _key(b"a.b/.c.png"), _key(b"a.b/c")
    (b'a.b/c', b'a.b/.c', b'a.b/c')
    """
    dot = path.find(b".", path.rfind(b"/") + 2)
    return path if dot < 0 else path[:dot]


def _is_label(path: bytes, key: bytes, state: int, held_bytes: int) -> bool:
    is_named = path[len(key) :].lower() == LABEL_ENDING
    return is_named and state in (WHOLE, CUT) and held_bytes <= MOST_LABEL_BYTES


def _shard_paths(path: Path) -> list[tuple[str, bytes]]:
    """Return every shard's path, and what its members' names begin with.

    Raises
    ------
    SourceError
        If shards are compressed or missing, or their range makes no sense.
    """
    text = os.fspath(path)
    found = None if os.path.lexists(path) else _range(text)
    _refuse_compressed(path, is_range=found is not None)
    if found is None:
        if not os.path.lexists(path):
            raise SourceError(
                f"{path} does not exist",
                "check the path; a range of shards is written so: 'shards/{0000..0099}.tar'",
            )
        return [(text, b"")]
    start, end, numbers = found
    paths = [text[:start] + number + text[end:] for number in numbers]
    missing = [shard for shard in paths if not os.path.lexists(shard)]
    if missing:
        shown = ", ".join(missing[:MISSING_SHOWN])
        more = f" and {len(missing) - MISSING_SHOWN} more" if len(missing) > MISSING_SHOWN else ""
        raise SourceError(
            f"{path}: of {len(paths)} shards {len(missing)} are missing: {shown}{more}",
            "get them, or give the range that is there",
        )
    if len(paths) == 1:
        return [(paths[0], b"")]
    begin = text.rfind("/", 0, start) + 1
    return [(shard, _prefix(shard[begin:])) for shard in paths]


def _range(text: str) -> tuple[int, int, list[str]] | None:
    """Return where a range of numbers stands in a path, and the numbers; None if there is none.

    >>> _range("shards/{08..11}.tar")
    (7, 15, ['08', '09', '10', '11'])
    """
    ranges = [*RANGE.finditer(text)]
    if not ranges:
        return None
    if len(ranges) > 1:
        raise SourceError(f"{text} has {len(ranges)} ranges", "give one, for one run each")
    first, last = ranges[0].groups()
    is_short = max(len(first), len(last)) <= MOST_DIGITS
    if not is_short or not 0 <= int(last) - int(first) < MOST_SHARDS:
        raise SourceError(
            f"{text}: {ranges[0][0]} is no range of at most {MOST_SHARDS} numbers",
            "give the first and the last: 'shards/{0000..0099}.tar'",
        )
    numbers = [f"{number:0{len(first)}}" for number in range(int(first), int(last) + 1)]
    return *ranges[0].span(), numbers


def _refuse_compressed(path: Path, *, is_range: bool) -> None:
    name = path.name.lower()
    program = next((COMPRESSED[ending] for ending in COMPRESSED if name.endswith(ending)), None)
    if program is not None:
        shown = path if is_range else shlex.quote(os.fspath(path))
        raise SourceError(
            f"{path} is compressed: its members have no fixed offsets",
            f"decompress and give what comes out: {program} -dk {shown}",
        )


def _prefix(path: str) -> bytes:
    """Return what a shard's members begin with, by its path from where shards differ.

    >>> _prefix("0003.tar"), _prefix("0003/images.tar")
    (b'0003/', b'0003/')
    """
    name = os.fsencode(path.partition("/")[0])
    return (name[:-4] if name.lower().endswith(b".tar") else name) + b"/"


def _repeated(hashes: NDArray[np.uint64]) -> tuple[array[int], array[int]]:
    """Return the rows whose names others have before them, and the first row of each such name.

    >>> rows, firsts = _repeated(np.array([7, 8, 7, 9, 8, 7], np.uint64))
    >>> rows.tolist(), firsts.tolist()
    ([2, 4, 5], [0, 1, 0])
    """
    order = np.argsort(hashes, kind="stable")
    ordered = hashes[order]
    again = np.zeros(len(hashes), bool)
    again[1:] = ordered[1:] == ordered[:-1]
    if not again.any():
        return array("q"), array("q")
    begins = np.maximum.accumulate(np.where(again, 0, np.arange(len(hashes))))
    rows, firsts = order[again], order[begins[again]]
    by_row = np.argsort(rows)
    return array("q", rows[by_row].tobytes()), array("q", firsts[by_row].tobytes())


def _renamed(names: Names, rows: array[int], hashes: NDArray[np.uint64]) -> Names:
    """Return the names with the row's number in some, so that all differ.

    >>> names = Names([b"cat/a.jpg", b"cat/a.jpg"])
    >>> _renamed(names, array("q", [1]), hashes_of(names))[:]
    [b'cat/a.jpg', b'cat/a#1.jpg']
    """
    taken = np.sort(hashes)
    renamed, ahead = Names(), iter(rows)
    repeated = next(ahead, None)
    for row, name in enumerate(names):
        if row == repeated:
            renamed.append(_numbered(name, row, taken))
            repeated = next(ahead, None)
        else:
            renamed.append(name)
    return renamed


def _numbered(name: bytes, row: int, taken: NDArray[np.uint64]) -> bytes:
    stem, dot, ending = name.rpartition(b".")
    mark = b"#%d" % row
    while True:
        numbered = stem + mark + dot + ending
        sought = hashes_of([numbered])
        at = np.searchsorted(taken, sought)[0]
        if at == len(taken) or taken[at] != sought[0]:
            return numbered
        mark = b"#" + mark
