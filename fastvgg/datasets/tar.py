"""Tar shards of images, read in place without extracting them.

The headers of each shard are read once, in sequence; images are then read at their offsets.

Rows follow the order of the shards, and of the entries in each shard. As in WebDataset, adjacent
entries with the same key (the path up to the first dot of the file name) form a sample, and its
`.cls` entry contains the label of its images. Any other image is labeled by the folder of its
path.

If a name occurs several times, only its first image is read. The others become failed rows with
unique names, because an index must not repeat a name: the row number is inserted before the suffix,
as in `cat/a#12.jpg`.
"""

from __future__ import annotations

import itertools
import os
import re
import shlex
from array import array
from bisect import bisect_left, bisect_right
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np
import xxhash

from fastvgg.datasets.base import changed_during_run_error
from fastvgg.datasets.files import READ_FLAGS, open_regular, read_at, read_unchanged
from fastvgg.datasets.image_names import (
    INVALID,
    LINKS,
    OTHER_FILES,
    SPECIAL,
    is_image_name,
    parent_folder,
    path_kind_skipped_by_rule,
)
from fastvgg.datasets.images import ImageListing, ImageSource
from fastvgg.datasets.index import PackedNames, find_duplicates, hash_names
from fastvgg.datasets.labels import is_class_number
from fastvgg.datasets.tar_headers import (
    COMPLETE,
    DEVICE,
    LINK,
    LONG_PATH,
    MAX_PATH_BYTES,
    NUL_PATH,
    TRUNCATED,
    UNKNOWN,
    UPWARD_PATH,
    TarHeaderReader,
)
from fastvgg.errors import SourceError
from fastvgg.storage.descriptors import above_standard_streams

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

COMPRESSION_SUFFIXES: Final = {
    **dict.fromkeys((".tgz", ".tar.gz", ".tar.z"), "gzip"),
    **dict.fromkeys((".tbz", ".tbz2", ".tar.bz2"), "bzip2"),
    **dict.fromkeys((".txz", ".tar.xz", ".tar.lzma"), "xz"),
    **dict.fromkeys((".tzst", ".tar.zst"), "zstd"),
    ".tar.lz4": "lz4",
    ".tar.lz": "lzip",
}
BRACE_RANGE: Final = re.compile(r"\{([0-9]+)\.\.([0-9]+)\}")
MAX_SHARDS: Final = 1_000_000
MAX_DIGITS: Final = 18
MAX_MISSING_SHOWN: Final = 5
LABEL_SUFFIX: Final = b".cls"
MAX_LABEL_BYTES: Final = 64

# States of a row, in addition to those of an entry.
LABEL_TRUNCATED, REPEATED = LONG_PATH + 1, LONG_PATH + 2
FAILURE_REASONS: Final = {
    LINK: "a link: links in a tar are not followed",
    DEVICE: "a device or a pipe, not a regular file",
    UNKNOWN: "an entry of unknown type, not a regular file",
    TRUNCATED: "truncated: the shard ends inside the image",
    UPWARD_PATH: "its path in the tar contains '..' and could lead out of the dataset",
    NUL_PATH: "its path in the tar contains a null byte",
    LONG_PATH: f"its path in the tar is longer than {MAX_PATH_BYTES} bytes",
    LABEL_TRUNCATED: "truncated: the shard ends inside the image's .cls",
}
SKIPPED_KINDS: Final = {
    LINK: LINKS,
    DEVICE: SPECIAL,
    **dict.fromkeys((UPWARD_PATH, NUL_PATH, LONG_PATH), INVALID),
}


class _TarShard(NamedTuple):
    """The state of a tar file when it was listed."""

    path: str
    prefix: bytes
    """Prepended to the names of its entries; empty if there is a single shard."""
    size: int
    changed_ns: int

    def matches(self, status: os.stat_result) -> bool:
        """Whether the file is unchanged since it was listed."""
        return (status.st_size, status.st_mtime_ns) == (self.size, self.changed_ns)


class TarListing(ImageListing):
    """The images in tar shards, listed from the headers.

    Every entry with an image suffix is a row. Reading it fails if it is not a complete regular
    file, or if its path does not name a file below the dataset.

    Parameters
    ----------
    path
        A tar, or a range of them: `shards/{0000..0099}.tar`. An existing file of exactly that name
        takes precedence.

    Raises
    ------
    SourceError
        If shards are missing, compressed or damaged.
    """

    def __init__(self, path: Path, *, follow_links: bool = True) -> None:
        super().__init__(path, follow_links=follow_links)
        self.unterminated: list[str] = []
        """Shards without an end-of-archive marker, which may be truncated."""
        self._shards: list[_TarShard] = []
        self._ends = array("q")
        """Total number of rows up to the end of each shard."""
        self._offsets = array("q")
        self._states = array("B")
        self._labeled_rows = array("q")
        self._labels = PackedNames()
        self._are_numbers = True
        for shard, prefix in shard_paths(path):
            self._list(shard, prefix)
        hashes = hash_names(self._names)
        self._fingerprint = self._hash(hashes)
        self._repeated_rows, self._first_rows = find_duplicates(hashes)
        if len(self._repeated_rows):
            for row in self._repeated_rows:
                self._states[row] = REPEATED
            self._names = _make_unique(self._names, self._states, hashes)

    @property
    def notes(self) -> list[str]:
        """Notes about skipped entries and possibly truncated shards, if there are any."""
        notes = super().notes
        if self.unterminated:
            notes.append(
                f"shards without an end-of-archive marker, possibly truncated: "
                f"{len(self.unterminated)}, the first is {self.unterminated[0]}"
            )
        return notes

    @property
    def has_class_numbers(self) -> bool:
        return len(self._labels) > 0 and self._are_numbers

    def label(self, row: int) -> bytes:
        """Return the content of the sample's .cls, or else the folder of the path."""
        index = bisect_left(self._labeled_rows, row)
        if index < len(self._labeled_rows) and self._labeled_rows[index] == row:
            return self._labels[index]
        return parent_folder(self._names[row].removeprefix(self._shard(row).prefix))

    def identity(self, row: int) -> bytes:
        """Return an image's name, size and offset, and its shard's size and time."""
        shard = self._shard(row)
        numbers = self._sizes[row], self._offsets[row], shard.size, shard.changed_ns
        return b"%d %d %d %d %b\0" % (*numbers, self._names[row])

    def read(self, row: int, max_bytes: int) -> bytes:
        shard, size = self._shard(row), self._sizes[row]

        def read_image(status: os.stat_result) -> bytes:
            if not shard.matches(status):
                raise changed_during_run_error(shard.path)
            if self._states[row] != COMPLETE:
                raise OSError(self._reason(row))
            if size > max_bytes:
                raise OSError(f"the image has {size} bytes; the limit is {max_bytes}")
            return read_at(descriptor, size, self._offsets[row])

        try:
            descriptor = above_standard_streams(os.open(shard.path, READ_FLAGS))
        except (FileNotFoundError, NotADirectoryError):
            raise changed_during_run_error(shard.path) from None
        try:
            data, _ = read_unchanged(descriptor, read_image)
        finally:
            os.close(descriptor)
        if len(data) != size:
            raise changed_during_run_error(shard.path)
        return data

    def fingerprint(self) -> str:
        try:
            unchanged = all(shard.matches(os.stat(shard.path)) for shard in self._shards)
        except OSError:  # listing again names the shard
            unchanged = False
        return self._fingerprint if unchanged else TarListing(self._path).fingerprint()

    def _shard(self, row: int) -> _TarShard:
        return self._shards[bisect_right(self._ends, row)]

    def _reason(self, row: int) -> str:
        """Return the reason why reading a row fails."""
        if self._states[row] == REPEATED:
            first = self._first_rows[np.searchsorted(self._repeated_rows, row)]
            return f"the name occurs twice, first in row {first}"
        return FAILURE_REASONS[self._states[row]]

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
        """Add the images of a shard to the listing."""
        try:
            with open_regular(Path(path)) as file:
                status = os.fstat(file.fileno())
                self._shards.append(_TarShard(path, prefix, status.st_size, status.st_mtime_ns))
                entries = TarHeaderReader(path, file.fileno(), status.st_size)
                self._add(entries, prefix)
        except OSError as error:
            raise SourceError(
                f"{path} cannot be read: {error.strerror or error}",
                "check that it is a tar file, and check its permissions and its disk",
            ) from None
        self._ends.append(len(self._names))
        if not entries.has_end_marker:
            self.unterminated.append(path)

    def _add(self, entries: TarHeaderReader, prefix: bytes) -> None:
        """Add a row for each image, sample by sample, and count the skipped entries."""
        for key, sample in itertools.groupby(entries, lambda entry: _key(entry[0])):
            first_row, label, is_label_truncated = len(self), None, False
            label_path = b""
            for path, state, offset, available_bytes in sample:
                if kind := path_kind_skipped_by_rule(path):
                    self.skipped.add(kind, path)
                elif is_image_name(path):
                    self._names.append(prefix + path)
                    self._offsets.append(offset)
                    self._sizes.append(available_bytes)
                    self._states.append(state)
                elif label is None and _is_label(path, key, state, available_bytes):
                    is_label_truncated, label_path = state == TRUNCATED, path
                    label = entries.bytes_at(offset, available_bytes).strip()
                else:
                    self.skipped.add(SKIPPED_KINDS.get(state, OTHER_FILES), path)
            rows = range(first_row, len(self))
            if label is not None and not rows:  # a .cls without images
                self.skipped.add(OTHER_FILES, label_path)
            for row in rows:
                if is_label_truncated:
                    self._states[row] = self._states[row] or LABEL_TRUNCATED
                elif label:
                    self._labeled_rows.append(row)
                    self._labels.append(label)
                    self._are_numbers &= is_class_number(os.fsdecode(label))


class TarShards(ImageSource):
    """The images in tar shards."""

    kind = "tar"
    listing_class = TarListing


def _key(path: bytes) -> bytes:
    """Return the path up to the first dot of the file name, not counting a leading dot.

    >>> _key(b"a.b/c.seg.png"), _key(b"a.b/.c.png"), _key(b"a.b/c")
    (b'a.b/c', b'a.b/.c', b'a.b/c')
    """
    dot = path.find(b".", path.rfind(b"/") + 2)
    return path if dot < 0 else path[:dot]


def _is_label(path: bytes, key: bytes, state: int, available_bytes: int) -> bool:
    has_suffix = path[len(key) :].lower() == LABEL_SUFFIX
    return has_suffix and state in (COMPLETE, TRUNCATED) and available_bytes <= MAX_LABEL_BYTES


def _make_unique(names: PackedNames, states: array[int], hashes: NDArray[np.uint64]) -> PackedNames:
    """Return the names, made unique by inserting the row number into those that are repeated.

    >>> names = PackedNames([b"cat/a.jpg", b"cat/a.jpg"])
    >>> _make_unique(names, array("B", [COMPLETE, REPEATED]), hash_names(names))[:]
    [b'cat/a.jpg', b'cat/a#1.jpg']
    """
    used = np.sort(hashes)
    return PackedNames(
        _unique_name(name, row, used) if state == REPEATED else name
        for row, (name, state) in enumerate(zip(names, states, strict=True))
    )


def _unique_name(name: bytes, row: int, used: NDArray[np.uint64]) -> bytes:
    stem, dot, suffix = name.rpartition(b".")
    mark = b"#%d" % row
    while True:
        candidate = stem + mark + dot + suffix
        hashed = hash_names([candidate])
        index = np.searchsorted(used, hashed)[0]
        if index == len(used) or used[index] != hashed[0]:
            return candidate
        mark = b"#" + mark


def is_tar_name(path: Path) -> bool:
    """Whether a path names tar shards, including compressed ones, which `TarListing` rejects.

    >>> from pathlib import Path
    >>> [is_tar_name(Path(name)) for name in ("a.tar", "{00..99}.TAR", "a.tar.gz", "a.npy")]
    [True, True, True, False]
    """
    return path.name.lower().endswith((".tar", *COMPRESSION_SUFFIXES))


def shard_paths(path: Path) -> list[tuple[str, bytes]]:
    """Return every shard's path, and the prefix of its entries' names.

    Raises
    ------
    SourceError
        If shards are compressed or missing, or the range is invalid.
    """
    text = os.fspath(path)
    parsed = None if os.path.lexists(path) else _parse_range(text)
    _check_not_compressed(path, is_range=parsed is not None)
    if parsed is None:
        if not os.path.lexists(path):
            raise SourceError(
                f"{path} does not exist",
                "check the path; the syntax of a range of shards is 'shards/{0000..0099}.tar'",
            )
        return [(text, b"")]
    start, end, numbers, digits = parsed

    def paths() -> Iterator[str]:  # a million may be missing
        return (f"{text[:start]}{number:0{digits}}{text[end:]}" for number in numbers)

    missing = (shard for shard in paths() if not os.path.lexists(shard))
    first = [*itertools.islice(missing, MAX_MISSING_SHOWN)]
    if first:
        others = sum(1 for _ in missing)
        more = f" and {others} more" if others else ""
        raise SourceError(
            f"{path}: {len(first) + others} of {len(numbers)} shards are missing: "
            f"{', '.join(first)}{more}",
            "get the missing shards, or give the range that exists",
        )
    if len(numbers) == 1:
        return [(next(paths()), b"")]
    begin = text.rfind("/", 0, start) + 1
    return [(shard, _prefix(shard[begin:])) for shard in paths()]


def _parse_range(text: str) -> tuple[int, int, range, int] | None:
    """Return the position of a range in a path, its numbers and their digits; None without range.

    >>> _parse_range("shards/{08..11}.tar")
    (7, 15, range(8, 12), 2)
    """
    ranges = [*BRACE_RANGE.finditer(text)]
    if not ranges:
        return None
    if len(ranges) > 1:
        raise SourceError(
            f"{text} has {len(ranges)} ranges", "give one range, and start a run for each"
        )
    first, last = ranges[0].groups()
    is_short = max(len(first), len(last)) <= MAX_DIGITS
    if not is_short or not 0 <= int(last) - int(first) < MAX_SHARDS:
        raise SourceError(
            f"{text}: {ranges[0][0]} is not a range of at most {MAX_SHARDS} increasing numbers",
            "give the first and the last number: 'shards/{0000..0099}.tar'",
        )
    return *ranges[0].span(), range(int(first), int(last) + 1), len(first)


def _check_not_compressed(path: Path, *, is_range: bool) -> None:
    for suffix, program in COMPRESSION_SUFFIXES.items():
        if path.name.lower().endswith(suffix):
            shown = path if is_range else shlex.quote(os.fspath(path))
            raise SourceError(
                f"{path} is compressed: its entries have no fixed offsets",
                f"decompress it, and give the result: {program} -dk {shown}",
            )


def _prefix(path: str) -> bytes:
    """Return the prefix of a shard's entries: the first component of the path that varies.

    >>> _prefix("0003.tar"), _prefix("0003/images.tar")
    (b'0003/', b'0003/')
    """
    name = os.fsencode(path.partition("/")[0])
    return (name[:-4] if name.lower().endswith(b".tar") else name) + b"/"
