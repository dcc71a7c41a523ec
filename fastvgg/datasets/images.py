"""Images that are read one by one into rows: what a directory and tar shards have in common.

And the directory: every file whose name ends like an image's, in the order of the bytes of the
paths below it.
"""

from __future__ import annotations

import errno
import os
from array import array
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Protocol

import numpy as np
import xxhash

from fastvgg.datasets.base import Chunk, Header, ImageRecord, changed_during_run_error, read_regular
from fastvgg.datasets.packed import PackedNames
from fastvgg.errors import SourceError
from fastvgg.imaging.decode import SUFFIXES, DecodeOptions, Decoder, describe_error
from fastvgg.parallel import parallel_for

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

__all__ = [
    "FolderImageListing",
    "ImageFolder",
    "ImageListing",
    "ImageSource",
    "is_image_name",
    "skipped_note",
]

CHANNELS: Final = 3
SIZES_SHOWN: Final = 5
STATS_PER_TASK: Final = 64
ENDINGS: Final = frozenset(suffix.encode() for suffix in SUFFIXES)


def is_image_name(name: bytes) -> bool:
    """Whether a file's name ends like an image's.

    >>> is_image_name(b"cat/a.JPG"), is_image_name(b".jpg"), is_image_name(b"a.jpg.txt")
    (True, False, False)
    """
    at = name.rfind(b".")
    return name[at:].lower() in ENDINGS and at > 0 and name[at - 1 : at] != b"/"


def skipped_note(skipped: int) -> list[str]:
    """Return a note of how many files are no images; none if there are none."""
    return [f"left out, because not named like images: {skipped}"] if skipped else []


class ImageListing(Protocol):
    """Which images there are, found once without reading them; some 50 bytes for each."""

    @property
    def stored_bytes(self) -> int:
        """How many bytes all images take."""

    @property
    def skipped(self) -> int:
        """How many files were left out because they are not named like images."""

    @property
    def notes(self) -> list[str]:
        """What a person should know before the run."""

    def fingerprint(self) -> str:
        """Return a hash that changes when the images do, of what is there now."""

    def __len__(self) -> int: ...

    def name(self, row: int) -> bytes:
        """Return an image's path: relative, with forward slashes."""

    def label(self, row: int) -> bytes:
        """Return what kind of image it is said to be."""

    def identity(self, row: int) -> bytes:
        """Return what changes when an image does: its name, its size, the time of its change."""

    def read(self, row: int, max_bytes: int) -> bytes:
        """Read an encoded image.

        Raises
        ------
        OSError
            If it cannot be read, or is longer than `max_bytes`.
        StoppedError
            If it has changed since it was listed.
        """


class ImageSource:
    """A source of encoded images: each is a row, and one that cannot be read is a row of zeros.

    Parameters
    ----------
    path
        What they are in.
    decoding
        How they are read.
    decoder
        What decodes them.
    threads
        How many look at the images' sizes, where no size is given.
    listing
        Which there are, where that was found before.

    Raises
    ------
    SourceError
        If there is no image, they cannot be listed, or sizes differ and none was given.
    """

    kind: str
    read_granularity = 1
    lists: Callable[[Path], ImageListing]
    """What finds the images."""

    def __init__(
        self,
        path: Path,
        decoding: DecodeOptions,
        decoder: Decoder,
        *,
        threads: int = 1,
        listing: ImageListing | None = None,
    ) -> None:
        self.path = path
        self.listing = listing = type(self).lists(path) if listing is None else listing
        self.decoding = decoding
        self._decoder = decoder
        self.settings: dict[str, Any] = decoding.to_dict()
        self.stored_bytes = listing.stored_bytes
        self.records: Sequence[ImageRecord] = ()
        self.notes = listing.notes
        if not len(listing):
            raise SourceError(
                f"{path} holds no images ({listing.skipped} other files)",
                f"give files that end in {', '.join(sorted(SUFFIXES))}",
            )
        height, width = decoding.size or self._only_size(threads)
        self.header = Header((len(listing), height, width, CHANNELS), "uint8", "NHWC")

    def fingerprint(self) -> str:
        """Return a hash of all names, sizes and times of change, as they are now.

        Of a file that changed after it was listed only reading it tells.
        """
        return self.listing.fingerprint()

    def checksum_of(self, start: int, stop: int, failed: Collection[int]) -> str:
        """Return the xxh3-64 of what identifies some images, without those that failed."""
        digest = xxhash.xxh3_64()
        for row in range(start, stop):
            if row not in failed:
                digest.update(self.listing.identity(row))
        return digest.hexdigest()

    def decode(self, row: int, out: NDArray[np.uint8]) -> ImageRecord:
        """Decode one image into a contiguous `out`, zeros if it fails; many threads may.

        Raises
        ------
        StoppedError
            If it has changed since it was listed.
        """
        name, label = self.listing.name(row), self.listing.label(row)
        width = height = 0
        try:
            data = self.listing.read(row, self.decoding.max_bytes)
        except OSError as error:
            failed, reason = True, describe_error(error)
        else:
            width, height, failed, reason = self._decoder.decode(data, out)
        if failed:
            out[...] = 0
        return ImageRecord(os.fsdecode(name), os.fsdecode(label), width, height, failed, reason)

    def read(self, start: int, stop: int) -> Chunk:
        """Decode images into a new batch; rows that cannot be read are zeros."""
        batch = np.empty((stop - start, *self.header.shape[1:]), np.uint8)
        return Chunk(batch, [self.decode(row, batch[row - start]) for row in range(start, stop)])

    def close(self) -> None:
        """Nothing stays open."""

    def _only_size(self, threads: int) -> tuple[int, int]:
        """Return the height and width that all readable images have."""
        examples: dict[tuple[int, int], int] = {}
        counts: Counter[tuple[int, int]] = Counter()
        reasons: dict[int, str] = {}

        def look_at(rows: range) -> None:
            for row in rows:
                size = self._size(row)
                if isinstance(size, str):
                    reasons[row] = size
                else:
                    counts[size] += 1
                    examples[size] = min(row, examples.get(size, row))

        images, together = len(self.listing), STATS_PER_TASK
        starts = range(0, images, together)
        pieces = [range(start, min(start + together, images)) for start in starts]
        parallel_for(pieces, look_at, threads)
        if not counts:
            first = min(reasons)
            raise SourceError(
                f"none of the {images} images in {self.path} can be read, the first: "
                f"{self._shown(first)}: {reasons[first]}",
                "check that the files are images",
            )
        if len(counts) > 1:
            raise self._different_sizes(counts, examples)
        return next(iter(counts))

    def _different_sizes(
        self, counts: Counter[tuple[int, int]], examples: dict[tuple[int, int], int]
    ) -> SourceError:
        shown = sorted(counts, key=lambda size: (-counts[size], examples[size]))[:SIZES_SHOWN]
        sizes = ", ".join(
            f"{size[0]}x{size[1]} ({counts[size]}, as {self._shown(examples[size])})"
            for size in shown
        )
        more = f" and {len(counts) - len(shown)} more" if len(counts) > len(shown) else ""
        return SourceError(
            f"{self.path} holds images of {len(counts)} sizes (height x width): {sizes}{more}",
            "choose one size for all: --size 224 224",
        )

    def _size(self, row: int) -> tuple[int, int] | str:
        """Return height and width, or why they cannot be read."""
        try:
            return self._decoder.size(self.listing.read(row, self.decoding.max_bytes))
        except OSError as error:
            return describe_error(error)

    def _shown(self, row: int) -> str:
        return os.fsdecode(self.listing.name(row))


@dataclass
class FolderImageListing:
    """The images below a directory, in the order of the bytes of their paths.

    A file, or anything else, whose name ends like an image's is listed. Directories are walked;
    links to directories are not.

    Raises
    ------
    SourceError
        If a directory cannot be listed.
    """

    directory: Path
    names: PackedNames = field(default_factory=PackedNames)
    sizes: array[int] = field(default_factory=lambda: array("q"))
    changed_ns: array[int] = field(default_factory=lambda: array("q"))
    folders: dict[bytes, int] = field(default_factory=dict)
    """Every directory, and when a name in it was last changed."""
    skipped: int = 0

    def __post_init__(self) -> None:
        self._root = os.fsencode(self.directory) + b"/"
        digest = xxhash.xxh3_128()
        for name in self._walk():
            size, changed_ns = _size_and_change(self._root + name)
            self.names.append(name)
            self.sizes.append(size)
            self.changed_ns.append(changed_ns)
            digest.update(b"%d %d %b\0" % (size, changed_ns, name))
        self._fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return len(self.names)

    @property
    def stored_bytes(self) -> int:
        """How many bytes all images take."""
        return sum(self.sizes)

    @property
    def notes(self) -> list[str]:
        """How many files were left out, if some were."""
        return skipped_note(self.skipped)

    def name(self, row: int) -> bytes:
        """Return an image's path below the directory."""
        return self.names[row]

    def label(self, row: int) -> bytes:
        """Return the first folder of an image's path."""
        folder, slash, _ = self.names[row].partition(b"/")
        return folder if slash else b""

    def identity(self, row: int) -> bytes:
        """Return an image's name, size and time of change."""
        return b"%d %d %b\0" % (self.sizes[row], self.changed_ns[row], self.names[row])

    def read(self, row: int, max_bytes: int) -> bytes:
        """Read an image's file; one that is a link has to lead to a file below the directory."""
        path = self._root + self.names[row]
        try:
            data, status = read_regular(path, max_bytes)
        except OSError as error:
            if error.errno != errno.ELOOP:
                raise
            data, status = read_regular(self._target_below(path), max_bytes)
        if (len(data), status.st_mtime_ns) != (self.sizes[row], self.changed_ns[row]):
            raise changed_during_run_error(os.fsdecode(path))
        return data

    def fingerprint(self) -> str:
        """Return a hash of all identities; where a name came or went since, looked for again."""
        for folder, changed_ns in self.folders.items():
            if _size_and_change(self._root + folder)[1] != changed_ns:
                return FolderImageListing(self.directory).fingerprint()
        return self._fingerprint

    def _target_below(self, path: bytes) -> bytes:
        target, root = os.path.realpath(path), os.path.realpath(self._root)
        if not target.startswith(root + b"/"):
            raise OSError("a link that leads out of the directory")
        return target

    def _walk(self) -> Iterator[bytes]:
        """Return the paths of what is named like an image, and count the rest.

        A directory takes its place among the names as if it ended in a slash, as all paths below it
        go on with one: so no more than the names of one directory are sorted at a time.
        """
        ahead = [iter([b""])]
        while ahead:
            path = next(ahead[-1], None)
            if path is None:
                ahead.pop()
            elif path == b"" or path.endswith(b"/"):
                ahead.append(iter(self._listed(path)))
            elif is_image_name(path):
                yield path
            else:
                self.skipped += 1

    def _listed(self, folder: bytes) -> list[bytes]:
        """Return the sorted paths in a directory; those of directories end in a slash.

        One that is named like an image is there both ways.
        """
        found = []
        try:
            self.folders[folder] = os.stat(self._root + folder).st_mtime_ns
            with os.scandir(self._root + folder) as entries:
                for entry in entries:
                    path = folder + entry.name
                    is_folder = entry.is_dir(follow_symlinks=False)
                    if is_folder:
                        found.append(path + b"/")
                    if not is_folder or is_image_name(path):
                        found.append(path)
        except OSError as error:
            raise SourceError(
                f"{os.fsdecode(self._root + folder)} cannot be listed: {error.strerror}",
                "check its permissions",
            ) from None
        found.sort()
        return found


def _size_and_change(path: bytes) -> tuple[int, int]:
    try:
        status = os.stat(path)
    except OSError:  # a link to nothing: a row that fails, with its reason, when it is read
        return 0, 0
    return status.st_size, status.st_mtime_ns


class ImageFolder(ImageSource):
    """The images below a directory."""

    kind = "images"
    lists = FolderImageListing
