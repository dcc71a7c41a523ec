"""Tar shards of images: read where they lie, nothing is extracted.

Each shard's headers are read once, from one to the next; after that an image is read at its offset.

Images are in the order of the shards, and in a shard in that of its members. Members that stand
next to each other and have one key, which is the path up to the first dot in the file's name, are a
sample, as in WebDataset: its `.cls` says the label of its images. All other images have the first
folder of their path for a label.

Of several images of one name the first is read. The others are rows that fail, each with a name of
its own, as an index names an image once: with the row's number before the ending, `cat/a#12.jpg`.
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
from fastvgg.datasets.tar_headers import CUT, DEVICE, LINK, SPARSE, UNKNOWN, WHOLE, TarHeaderReader
from fastvgg.errors import SourceError

if TYPE_CHECKING:
    from numpy.typing import NDArray


__all__ = ["TarListing", "TarShards", "names_tar"]

LABEL_ENDING: Final = b".cls"
MAX_LABEL_BYTES: Final = 64

# What is known of a row before it is read, beside what is known of a member.
LABEL_CUT, REPEATED = CUT + 1, CUT + 2
REASONS: Final = {
    LINK: "a link: links in a tar are not followed",
    DEVICE: "a device or a pipe, not a file",
    SPARSE: "a sparse file, whose holes are not stored",
    UNKNOWN: "not a file: its type is not known",
    CUT: "the shard ends inside it",
    LABEL_CUT: "the shard ends inside its .cls",
}


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
        self.skipped = 0
        self.unended: list[str] = []
        """Shards without the zeros that end a tar: they may be cut short."""
        self._shards: list[_Shard] = []
        self._ends = array("q")
        """How many rows there are up to the end of each shard."""
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

    @property
    def notes(self) -> list[str]:
        """How many files were left out, and which shards may be cut short, if some are."""
        cut = len(self.unended)
        about = (
            f"shards without the zeros that end a tar, so perhaps cut short: {cut}, the first is"
        )
        return [*skipped_note(self.skipped), *(f"{about} {shard}" for shard in self.unended[:1])]

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

    def read(self, row: int, max_bytes: int) -> bytes:
        """Read an encoded image; many threads may.

        Raises
        ------
        OSError
            If it cannot be read, is no whole file, or is longer than `max_bytes`.
        StoppedError
            If its shard has changed since it was listed, or is gone.
        """
        shard, size = self._shard(row), self._sizes[row]
        try:
            descriptor = os.open(shard.path, READ_FLAGS)
        except (FileNotFoundError, NotADirectoryError):
            raise changed_during_run_error(shard.path) from None
        try:
            if not shard.is_like(os.fstat(descriptor)):
                raise changed_during_run_error(shard.path)
            if self._states[row] != WHOLE:
                raise OSError(self._reason(row))
            if size > max_bytes:
                raise OSError(f"it has {size} bytes, and an image at most {max_bytes}")
            data = read_at(descriptor, size, self._offsets[row])
        finally:
            os.close(descriptor)
        if len(data) != size:
            raise changed_during_run_error(shard.path)
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
                members = TarHeaderReader(path, file.fileno(), status.st_size)
                self._add(members, prefix)
        except OSError as error:
            raise SourceError(
                f"{path} cannot be read: {error.strerror or error}",
                "check that it is a tar file, its permissions and its disk",
            ) from None
        self._ends.append(len(self._names))
        if not members.is_ended:
            self.unended.append(path)

    def _add(self, members: TarHeaderReader, prefix: bytes) -> None:
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
                self.skipped += 1
        self._end(sample)

    def _end(self, sample: _Sample) -> None:
        """Label the images of a sample, if it has a .cls; one without images is left out."""
        if sample.label is None:
            return
        rows = range(sample.first_row, len(self))
        self.skipped += not rows
        for row in rows:
            if sample.is_cut:
                self._states[row] = self._states[row] or LABEL_CUT
            elif sample.label:
                self._labelled_rows.append(row)
                self._labels.append(sample.label)


class TarShards(ImageSource):
    """The images in tar shards."""

    kind = "tar"
    lists = TarListing


@dataclass
class _Sample:
    """Members that stand next to each other and have one key."""

    key: bytes
    first_row: int
    label: bytes | None = None
    is_cut: bool = False
    """Whether the shard ends inside its .cls."""


def _key(path: bytes) -> bytes:
    """Return a path up to the first dot in the file's name that is not its first character.

    >>> _key(b"a.b/c.seg.png"), _key(b"a.b/.c.png"), _key(b"a.b/c")
    (b'a.b/c', b'a.b/.c', b'a.b/c')
    """
    dot = path.find(b".", path.rfind(b"/") + 2)
    return path if dot < 0 else path[:dot]


def _is_label(path: bytes, key: bytes, state: int, held_bytes: int) -> bool:
    is_named = path[len(key) :].lower() == LABEL_ENDING
    return is_named and state in (WHOLE, CUT) and held_bytes <= MAX_LABEL_BYTES


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


def _renamed(names: PackedNames, rows: array[int], hashes: NDArray[np.uint64]) -> PackedNames:
    """Return the names with the row's number in some, so that all differ.

    >>> names = PackedNames([b"cat/a.jpg", b"cat/a.jpg"])
    >>> _renamed(names, array("q", [1]), name_hashes(names))[:]
    [b'cat/a.jpg', b'cat/a#1.jpg']
    """
    taken = np.sort(hashes)
    renamed, ahead = PackedNames(), iter(rows)
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
        sought = name_hashes([numbered])
        at = np.searchsorted(taken, sought)[0]
        if at == len(taken) or taken[at] != sought[0]:
            return numbered
        mark = b"#" + mark
