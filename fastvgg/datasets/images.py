"""Sources of encoded images: the base of directories and of tar shards."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from array import array
from collections import Counter
from typing import TYPE_CHECKING, Final

import numpy as np
import xxhash

from fastvgg.datasets.base import Chunk, Header, ImageRecord, Source
from fastvgg.datasets.image_names import LINKS, SkippedFiles, parent_folder
from fastvgg.datasets.index import PackedNames, max_record_bytes
from fastvgg.errors import SourceError, option
from fastvgg.imaging.decode import MEMORY_LIMIT, DecodeOptions, Decoder, describe_error
from fastvgg.imaging.formats import IMAGE_SUFFIXES
from fastvgg.parallel import parallel_for
from fastvgg.storage.location import Location

if TYPE_CHECKING:
    from collections.abc import Collection
    from pathlib import Path

    from numpy.typing import NDArray

MAX_SIZES_SHOWN: Final = 5
SIZES_PER_TASK: Final = 64
MAX_REASON_CHARACTERS: Final = 500
# Of a record in the chunks in flight, one of which is encoded as a line of the journal: 1.2 kB were
# measured for 150,000 failed images with names of 90 bytes.
RECORD_BYTES: Final = 1536
RECORD_COPIES: Final = 10
# Of an image that is listed, besides its name, and of one in an index; arrays grow by an eighth.
LISTED_BYTES: Final = 36
INDEXED_BYTES: Final = 9


class ImageListing(ABC):
    """The images at `path`, listed once without reading them; about 50 bytes for each.

    Parameters
    ----------
    path
        The directory or tar shards that contain the images.
    follow_links
        Whether links below a directory are followed; those in a tar never are.

    Raises
    ------
    SourceError
        If they cannot be listed.
    """

    def __init__(self, path: Path, *, follow_links: bool = True) -> None:  # noqa: ARG002
        self._path = path
        self._names = PackedNames()
        self._sizes = array("q")
        self.skipped = SkippedFiles()

    def __len__(self) -> int:
        return len(self._names)

    def encoded_bytes(self, row: int) -> int:
        """Return the size of an encoded image when it was listed."""
        return self._sizes[row]

    @property
    def stored_bytes(self) -> int:
        """Size of all encoded images in bytes."""
        return sum(self._sizes)

    @property
    def has_class_numbers(self) -> bool:
        """Whether labels come from .cls entries, and are numbers."""
        return False

    @property
    def notes(self) -> list[str]:
        """Notes to show the user before the run."""
        return self.skipped.notes()

    @property
    def linked_paths(self) -> list[Path]:
        """The folders that links lead to, resolved."""
        return []

    @abstractmethod
    def fingerprint(self) -> str:
        """Return a hash of the images' current state; lists them again if they have changed."""

    def describe_change(self, later: ImageListing) -> str:
        """Return the first difference between this listing and a later one."""
        images = min(len(self), len(later))
        rows = (row for row in range(images) if self.identity(row) != later.identity(row))
        row = next(rows, images)
        if row == len(self) == len(later):
            return "a link to a folder was changed"
        then, now = (
            os.fsdecode(listing.name(row)) if row < len(listing) else "no image"
            for listing in (self, later)
        )
        if then == now:
            return f"{then} was changed"
        return f"it had {len(self)} images and has {len(later)}; row {row} was {then} and is {now}"

    @property
    def memory_bytes(self) -> int:
        """The memory of the listing."""
        return LISTED_BYTES * len(self) + self._names.total_bytes * 9 // 8

    @property
    def max_record_bytes(self) -> int:
        """The most bytes that the record of an image can have: its path, label and reason."""
        return 2 * self._names.max_bytes + MAX_REASON_CHARACTERS

    def name(self, row: int) -> bytes:
        """Return the relative path of an image, with forward slashes."""
        return self._names[row]

    def label(self, row: int) -> bytes:
        """Return the class label of an image: the folder of its path, or nothing."""
        return parent_folder(self._names[row])

    @abstractmethod
    def identity(self, row: int) -> bytes:
        """Return an image's name, size and modification time, as bytes to be hashed."""

    @abstractmethod
    def read(self, row: int, max_bytes: int) -> bytes:
        """Read an encoded image; thread-safe.

        Raises
        ------
        OSError
            If it cannot be read, is not a complete regular file, or is longer than `max_bytes`.
        StoppedError
            If it has changed since it was listed.
        """


class ImageSource(Source):
    """A source of encoded images, one per row; images that fail to decode become rows of zeros.

    Parameters
    ----------
    path
        The directory or tar shards that contain the images.
    decoding
        Decoding options.
    decoder
        Decodes the images.
    threads
        Number of threads that read image sizes if `decoding` gives none.
    listing
        The listing of the images, if it is already known; a listing of another class is ignored.
    follow_links
        Whether links below a directory are followed.

    Raises
    ------
    SourceError
        If there are no images, they cannot be listed, or sizes differ and `decoding` gives none.
    """

    listing_class: type[ImageListing]
    """The listing of the images at a path."""

    def __init__(
        self,
        path: Path,
        decoding: DecodeOptions,
        decoder: Decoder,
        *,
        threads: int = 1,
        listing: ImageListing | None = None,
        follow_links: bool = True,
    ) -> None:
        super().__init__(Location(path))
        if not isinstance(listing, self.listing_class):  # None, or of another kind of source
            listing = self.listing_class(path, follow_links=follow_links)
        self.listing = listing
        self.linked_paths = listing.linked_paths
        self.has_class_numbers = listing.has_class_numbers
        self.follow_links = follow_links
        self.decoding = decoding
        self._decoder = decoder
        self.settings = decoding.to_dict()
        self.stored_bytes = listing.stored_bytes
        self.notes = listing.notes
        if not len(listing):
            raise _no_images_error(path, listing.skipped)
        height, width = decoding.size or self._common_size(threads)
        self.header = Header((len(listing), height, width, 3), "uint8", "NHWC")

    def fingerprint(self) -> str:
        return self.listing.fingerprint()

    def identity_checksum(self, start: int, stop: int, failed: Collection[int]) -> str:
        """Return the xxh3-64 of the identities of the images that did not fail."""
        digest = xxhash.xxh3_64()
        for row in range(start, stop):
            if row not in failed:
                digest.update(self.listing.identity(row))
        return digest.hexdigest()

    def decode(self, row: int, out: NDArray[np.uint8]) -> ImageRecord:
        """Decode one image into a contiguous `out`, or fill it with zeros on failure; thread-safe.

        Raises
        ------
        StoppedError
            If it has changed since it was listed.
        """
        name, label = self.listing.name(row), self.listing.label(row)
        width = height = 0
        try:
            with self._decoder.reading(self.listing.encoded_bytes(row)):
                data = self.listing.read(row, self._decoder.max_bytes)
                width, height, failed, reason = self._decoder.decode(data, out)
        except OSError as error:
            failed, reason = True, describe_error(error)
        if failed:
            out[...] = 0
        stored = _storable(reason)
        return ImageRecord(os.fsdecode(name), os.fsdecode(label), width, height, failed, stored)

    def read(self, start: int, stop: int) -> Chunk:
        batch = np.empty((stop - start, *self.header.shape[1:]), np.uint8)
        return Chunk(batch, [self.decode(row, batch[row - start]) for row in range(start, stop)])

    def _common_size(self, threads: int) -> tuple[int, int]:
        """Return the height and width of all readable images, which must be equal."""
        images, step = len(self.listing), SIZES_PER_TASK
        # The height and width of every image, or the reason why they cannot be read.
        sizes: list[tuple[int, int] | str] = [""] * images
        distinct: dict[tuple[int, int] | str, tuple[int, int] | str] = {}

        def inspect(rows: range) -> None:
            for row in rows:
                try:
                    with self._decoder.reading(self.listing.encoded_bytes(row)):
                        size = self._decoder.size(self.listing.read(row, self._decoder.max_bytes))
                except OSError as error:
                    size = describe_error(error)
                sizes[row] = distinct.setdefault(size, size)  # a row takes 8 bytes

        tasks = [range(start, min(start + step, images)) for start in range(0, images, step)]
        parallel_for(tasks, inspect, threads)
        counts = Counter(size for size in sizes if not isinstance(size, str))
        if not counts:
            smallest_bytes = min(map(self.listing.encoded_bytes, range(images)))
            is_too_long = self._decoder.max_bytes < smallest_bytes <= self.decoding.max_bytes
            is_limited = is_too_long or MEMORY_LIMIT in str(sizes[0])
            more = f"{max(512, -(-4 * self._decoder.max_bytes // 2**20))}MiB"
            raise SourceError(
                f"no image in {self.path} can be read; the first is "
                f"{self._display_name(0)}: {sizes[0]}",
                f"give more memory: {option('memory', more)}"
                if is_limited
                else "check that the files are images",
            )
        if len(counts) == 1:
            return next(iter(counts))
        shown = ", ".join(
            f"{size[0]}x{size[1]} ({count}, e.g. {self._display_name(sizes.index(size))})"
            for size, count in counts.most_common(MAX_SIZES_SHOWN)
        )
        more = f" and {len(counts) - MAX_SIZES_SHOWN} more" if len(counts) > MAX_SIZES_SHOWN else ""
        raise SourceError(
            f"{self.path} contains images of {len(counts)} sizes (height x width): {shown}{more}",
            f"choose one size for all images: {option('size', (224, 224))}",
        )

    def _display_name(self, row: int) -> str:
        return os.fsdecode(self.listing.name(row))


def listed_memory_bytes(source: Source) -> int:
    """Return the memory of the names of all images, or of the positions of what is read."""
    if isinstance(source, ImageSource):
        return source.listing.memory_bytes
    return INDEXED_BYTES * len(source.records) + source.index_bytes


def record_memory_bytes(source: Source) -> int:
    """Return the memory per image of the records of the chunks in flight; 0 if it has none."""
    if isinstance(source, ImageSource):
        nbytes = source.listing.max_record_bytes
    else:
        nbytes = max_record_bytes(source.records)
    return RECORD_BYTES + RECORD_COPIES * nbytes if nbytes else 0


def _no_images_error(path: Path, skipped: SkippedFiles) -> SourceError:
    found = "; ".join(skipped.notes()) or "no files"
    remedy = f"give images with one of the suffixes {', '.join(sorted(IMAGE_SUFFIXES))}"
    if skipped.suffixes[b".npy"]:
        remedy = (
            "give one .npy, or for an array in parts name them part-*.npy, all in one directory"
        )
    elif skipped.counts[LINKS]:
        remedy = f"omit {option('follow_links', value=False)}, to follow the links"
    return SourceError(f"{path} contains no images: {found}", remedy)


def _storable(reason: str) -> str:
    """Return a reason, which may quote a damaged file, as text that an index can contain."""
    return reason[:MAX_REASON_CHARACTERS].encode("utf-8", "backslashreplace").decode()
