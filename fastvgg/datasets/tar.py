"""Tar shards of images, read in place without extracting them.

The headers of each shard are read once, in sequence; images are then read at their offsets.

Rows follow the order of the shards, and of the entries in each shard. As in WebDataset, adjacent
entries with the same key (the path up to the first dot of the file name) form a sample, and its
`.cls` entry contains the label of its images. Any other image is labelled by the first folder of
its path.

If a name occurs several times, only its first image is read. The others become failed rows with
unique names, because an index must not repeat a name: the row number is inserted before the suffix,
as in `cat/a#12.jpg`.
"""

from __future__ import annotations

import os
from array import array
from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np
import xxhash

from fastvgg.datasets.base import READ_FLAGS, changed_during_run_error, open_regular, read_at
from fastvgg.datasets.images import ImageSource, is_image_name, skipped_note
from fastvgg.datasets.packed import PackedNames, name_hashes
from fastvgg.datasets.shards import names_tar, shard_paths
from fastvgg.datasets.tar_headers import (
    COMPLETE,
    DEVICE,
    LINK,
    SPARSE,
    TRUNCATED,
    UNKNOWN,
    TarHeaderReader,
)
from fastvgg.errors import SourceError

if TYPE_CHECKING:
    from numpy.typing import NDArray


__all__ = ["TarListing", "TarShards", "names_tar"]

LABEL_SUFFIX: Final = b".cls"
MAX_LABEL_BYTES: Final = 64

# States of a row, in addition to those of an entry.
LABEL_TRUNCATED, REPEATED = TRUNCATED + 1, TRUNCATED + 2
REASONS: Final = {
    LINK: "a link: links in a tar are not followed",
    DEVICE: "a device or a pipe, not a regular file",
    SPARSE: "a sparse file: these are not supported",
    UNKNOWN: "an entry of unknown type, not a regular file",
    TRUNCATED: "truncated: the shard ends inside the image",
    LABEL_TRUNCATED: "truncated: the shard ends inside the image's .cls",
}


class _Shard(NamedTuple):
    """The state of a tar file when it was listed."""

    path: str
    prefix: bytes
    """Prepended to the names of its entries; empty if there is a single shard."""
    size: int
    changed_ns: int

    def matches(self, status: os.stat_result) -> bool:
        """Whether the file is unchanged since it was listed."""
        return (status.st_size, status.st_mtime_ns) == (self.size, self.changed_ns)


class TarListing:
    """The images in tar shards, listed from the headers.

    Every entry with an image suffix is a row. If it is not a complete regular file, reading it
    fails.

    Parameters
    ----------
    path
        A tar, or a range of them: `shards/{0000..0099}.tar`. An existing file of exactly that name
        takes precedence.

    Raises
    ------
    SourceError
        If shards are missing, compressed or damaged, or an entry's path escapes the dataset.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.skipped = 0
        self.unterminated: list[str] = []
        """Shards without an end-of-archive marker, which may be truncated."""
        self._shards: list[_Shard] = []
        self._ends = array("q")
        """Total number of rows up to the end of each shard."""
        self._names = PackedNames()
        self._offsets = array("q")
        self._sizes = array("q")
        self._states = array("B")
        self._labelled_rows = array("q")
        self._labels = PackedNames()
        for shard, prefix in shard_paths(path):
            self._list(shard, prefix)
        hashes = name_hashes(self._names)
        self._fingerprint = self._hash(hashes)
        self._repeated_rows, self._first_rows = _find_repeated(hashes)
        if self._repeated_rows:
            for row in self._repeated_rows:
                self._states[row] = REPEATED
            self._names = _rename(self._names, self._repeated_rows, hashes)

    def __len__(self) -> int:
        return len(self._names)

    @property
    def stored_bytes(self) -> int:
        """Size of all encoded images in bytes."""
        return sum(self._sizes)

    @property
    def notes(self) -> list[str]:
        """Notes about skipped entries and possibly truncated shards, if there are any."""
        notes = skipped_note(self.skipped)
        if self.unterminated:
            notes.append(
                f"shards without an end-of-archive marker, possibly truncated: "
                f"{len(self.unterminated)}, the first is {self.unterminated[0]}"
            )
        return notes

    def name(self, row: int) -> bytes:
        """Return the path of an image in its tar, prefixed if there are several shards."""
        return self._names[row]

    def label(self, row: int) -> bytes:
        """Return the content of the sample's .cls, or else the first folder of the path."""
        index = bisect_left(self._labelled_rows, row)
        if index < len(self._labelled_rows) and self._labelled_rows[index] == row:
            return self._labels[index]
        path = self._names[row].removeprefix(self._shard(row).prefix)
        folder, slash, _ = path.partition(b"/")
        return folder if slash else b""

    def identity(self, row: int) -> bytes:
        """Return an image's name, size and offset, and its shard's size and modification time."""
        shard = self._shard(row)
        numbers = self._sizes[row], self._offsets[row], shard.size, shard.changed_ns
        return b"%d %d %d %d %b\0" % (*numbers, self._names[row])

    def read(self, row: int, max_bytes: int) -> bytes:
        """Read an encoded image; thread-safe.

        Raises
        ------
        OSError
            If it cannot be read, is not a complete regular file, or is longer than `max_bytes`.
        StoppedError
            If its shard has changed since it was listed, or no longer exists.
        """
        shard, size = self._shard(row), self._sizes[row]
        try:
            descriptor = os.open(shard.path, READ_FLAGS)
        except (FileNotFoundError, NotADirectoryError):
            raise changed_during_run_error(shard.path) from None
        try:
            if not shard.matches(os.fstat(descriptor)):
                raise changed_during_run_error(shard.path)
            if self._states[row] != COMPLETE:
                raise OSError(self._reason(row))
            if size > max_bytes:
                raise OSError(f"the image has {size} bytes; the limit is {max_bytes}")
            data = read_at(descriptor, size, self._offsets[row])
        finally:
            os.close(descriptor)
        if len(data) != size:
            raise changed_during_run_error(shard.path)
        return data

    def fingerprint(self) -> str:
        """Return a hash of the shards' names, sizes and modification times, and of all images.

        If a shard has changed, all are listed again.
        """
        try:
            unchanged = all(shard.matches(os.stat(shard.path)) for shard in self._shards)
        except OSError:  # listing again names the shard
            unchanged = False
        return self._fingerprint if unchanged else TarListing(self.path).fingerprint()

    def _shard(self, row: int) -> _Shard:
        return self._shards[bisect_right(self._ends, row)]

    def _reason(self, row: int) -> str:
        """Return the reason why reading a row fails."""
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
        """Add the images of a shard to the listing."""
        try:
            with open_regular(Path(path)) as file:
                status = os.fstat(file.fileno())
                self._shards.append(_Shard(path, prefix, status.st_size, status.st_mtime_ns))
                entries = TarHeaderReader(path, file.fileno(), status.st_size)
                self._add(entries, prefix)
        except OSError as error:
            raise SourceError(
                f"{path} cannot be read: {error.strerror or error}",
                "check that it is a tar file, and check its permissions and its disk",
            ) from None
        self._ends.append(len(self._names))
        if not entries.is_ended:
            self.unterminated.append(path)

    def _add(self, entries: TarHeaderReader, prefix: bytes) -> None:
        """Add a row for each image, sample by sample, and count the skipped entries."""
        sample = _Sample(b"", len(self))
        for path, state, offset, available_bytes in entries:
            key = _key(path)
            if key != sample.key:
                self._label_sample(sample)
                sample = _Sample(key, len(self))
            if is_image_name(path):
                self._names.append(prefix + path)
                self._offsets.append(offset)
                self._sizes.append(available_bytes)
                self._states.append(state)
            elif sample.label is None and _is_label(path, key, state, available_bytes):
                sample.is_truncated = state == TRUNCATED
                sample.label = entries.bytes_at(offset, available_bytes).strip()
            else:
                self.skipped += 1
        self._label_sample(sample)

    def _label_sample(self, sample: _Sample) -> None:
        """Label the images of a finished sample; a .cls without images counts as skipped."""
        if sample.label is None:
            return
        rows = range(sample.first_row, len(self))
        self.skipped += not rows
        for row in rows:
            if sample.is_truncated:
                self._states[row] = self._states[row] or LABEL_TRUNCATED
            elif sample.label:
                self._labelled_rows.append(row)
                self._labels.append(sample.label)


class TarShards(ImageSource):
    """The images in tar shards."""

    kind = "tar"
    lists = TarListing


@dataclass
class _Sample:
    """Adjacent entries with the same key."""

    key: bytes
    first_row: int
    label: bytes | None = None
    is_truncated: bool = False
    """Whether the shard ends inside the sample's .cls."""


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


def _find_repeated(hashes: NDArray[np.uint64]) -> tuple[array[int], array[int]]:
    """Return the rows whose name occurred before, and the first row of each such name.

    >>> rows, firsts = _find_repeated(np.array([7, 8, 7, 9, 8, 7], np.uint64))
    >>> rows.tolist(), firsts.tolist()
    ([2, 4, 5], [0, 1, 0])
    """
    order = np.argsort(hashes, kind="stable")
    ordered = hashes[order]
    is_repeated = np.zeros(len(hashes), bool)
    is_repeated[1:] = ordered[1:] == ordered[:-1]
    if not is_repeated.any():
        return array("q"), array("q")
    begins = np.maximum.accumulate(np.where(is_repeated, 0, np.arange(len(hashes))))
    rows, firsts = order[is_repeated], order[begins[is_repeated]]
    by_row = np.argsort(rows)
    return array("q", rows[by_row].tobytes()), array("q", firsts[by_row].tobytes())


def _rename(names: PackedNames, rows: array[int], hashes: NDArray[np.uint64]) -> PackedNames:
    """Return the names, made unique by inserting the row number into those of `rows`.

    >>> names = PackedNames([b"cat/a.jpg", b"cat/a.jpg"])
    >>> _rename(names, array("q", [1]), name_hashes(names))[:]
    [b'cat/a.jpg', b'cat/a#1.jpg']
    """
    used = np.sort(hashes)
    unique, remaining = PackedNames(), iter(rows)
    next_row = next(remaining, None)
    for row, name in enumerate(names):
        if row == next_row:
            unique.append(_unique_name(name, row, used))
            next_row = next(remaining, None)
        else:
            unique.append(name)
    return unique


def _unique_name(name: bytes, row: int, used: NDArray[np.uint64]) -> bytes:
    stem, dot, suffix = name.rpartition(b".")
    mark = b"#%d" % row
    while True:
        candidate = stem + mark + dot + suffix
        hashed = name_hashes([candidate])
        index = np.searchsorted(used, hashed)[0]
        if index == len(used) or used[index] != hashed[0]:
            return candidate
        mark = b"#" + mark
