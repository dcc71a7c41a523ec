"""Sources of encoded images: the base of directories and tar shards, and directories.

The images of a directory are all files with an image suffix, sorted bytewise by relative path.
"""

from __future__ import annotations

import errno
import os
from abc import ABC, abstractmethod
from array import array
from collections import Counter
from typing import TYPE_CHECKING, Final

import numpy as np
import xxhash

from fastvgg.datasets.base import (
    Chunk,
    Header,
    ImageRecord,
    Source,
    changed_during_run_error,
    read_regular,
)
from fastvgg.datasets.index import PackedNames
from fastvgg.errors import SourceError
from fastvgg.imaging.decode import IMAGE_SUFFIXES, DecodeOptions, Decoder, describe_error
from fastvgg.parallel import parallel_for
from fastvgg.storage.location import Location

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator
    from pathlib import Path

    from numpy.typing import NDArray

MAX_SIZES_SHOWN: Final = 5
SIZES_PER_TASK: Final = 64
ENCODED_SUFFIXES: Final = frozenset(suffix.encode() for suffix in IMAGE_SUFFIXES)


def is_image_name(name: bytes) -> bool:
    """Whether a file's name has an image suffix.

    >>> is_image_name(b"cat/a.JPG"), is_image_name(b".jpg"), is_image_name(b"a.jpg.txt")
    (True, False, False)
    """
    dot = name.rfind(b".")
    return name[dot:].lower() in ENCODED_SUFFIXES and dot > 0 and name[dot - 1 : dot] != b"/"


def first_folder(path: bytes) -> bytes:
    """Return the first folder of a path, or nothing.

    >>> first_folder(b"cat/a/b.jpg"), first_folder(b"b.jpg")
    (b'cat', b'')
    """
    folder, slash, _ = path.partition(b"/")
    return folder if slash else b""


class ImageListing(ABC):
    """The images at `path`, listed once without reading them; about 50 bytes for each.

    Raises
    ------
    SourceError
        If they cannot be listed.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._names = PackedNames()
        self._sizes = array("q")
        self.skipped = 0
        """Number of files skipped because they have no image suffix."""

    def __len__(self) -> int:
        return len(self._names)

    @property
    def stored_bytes(self) -> int:
        """Size of all encoded images in bytes."""
        return sum(self._sizes)

    @property
    def notes(self) -> list[str]:
        """Notes to show the user before the run."""
        return [f"skipped files without an image suffix: {self.skipped}"] if self.skipped else []

    @abstractmethod
    def fingerprint(self) -> str:
        """Return a hash of the images' current state; lists them again if they have changed."""

    def name(self, row: int) -> bytes:
        """Return the relative path of an image, with forward slashes."""
        return self._names[row]

    def label(self, row: int) -> bytes:
        """Return the class label of an image: the first folder of its path, or nothing."""
        return first_folder(self._names[row])

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
    ) -> None:
        super().__init__(Location(path))
        if not isinstance(listing, self.listing_class):  # None, or of another kind of source
            listing = self.listing_class(path)
        self.listing = listing
        self.decoding = decoding
        self._decoder = decoder
        self.settings = decoding.to_dict()
        self.stored_bytes = listing.stored_bytes
        self.notes = listing.notes
        if not len(listing):
            raise SourceError(
                f"{path} contains no images ({listing.skipped} other files)",
                f"give images with one of the suffixes {', '.join(sorted(IMAGE_SUFFIXES))}",
            )
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
            data = self.listing.read(row, self.decoding.max_bytes)
        except OSError as error:
            failed, reason = True, describe_error(error)
        else:
            width, height, failed, reason = self._decoder.decode(data, out)
        if failed:
            out[...] = 0
        return ImageRecord(os.fsdecode(name), os.fsdecode(label), width, height, failed, reason)

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
                    size = self._decoder.size(self.listing.read(row, self.decoding.max_bytes))
                except OSError as error:
                    size = describe_error(error)
                sizes[row] = distinct.setdefault(size, size)  # a row takes 8 bytes

        tasks = [range(start, min(start + step, images)) for start in range(0, images, step)]
        parallel_for(tasks, inspect, threads)
        counts = Counter(size for size in sizes if not isinstance(size, str))
        if not counts:
            raise SourceError(
                f"none of the {images} images in {self.path} can be read; the first is "
                f"{self._display_name(0)}: {sizes[0]}",
                "check that the files are images",
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
            "choose one size for all images: --size 224 224",
        )

    def _display_name(self, row: int) -> str:
        return os.fsdecode(self.listing.name(row))


class FolderImageListing(ImageListing):
    """The images below a directory, sorted bytewise by path.

    Everything with an image suffix is listed, whether or not it is a regular file. Symbolic links
    to directories are not followed. A file that changed after it was listed is only detected when
    it is read.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._root = os.fsencode(path) + b"/"
        self._changed_ns = array("q")
        self._folders: dict[bytes, int] = {}
        """The modification time of every directory."""
        digest = xxhash.xxh3_128()
        for name in self._walk():
            size, changed_ns = _size_and_change(self._root + name)
            self._names.append(name)
            self._sizes.append(size)
            self._changed_ns.append(changed_ns)
            digest.update(b"%d %d %b\0" % (size, changed_ns, name))
        self._fingerprint = digest.hexdigest()

    def identity(self, row: int) -> bytes:
        return b"%d %d %b\0" % (self._sizes[row], self._changed_ns[row], self._names[row])

    def read(self, row: int, max_bytes: int) -> bytes:
        path = self._root + self._names[row]
        try:
            data, status = read_regular(path, max_bytes)
        except OSError as error:
            if error.errno != errno.ELOOP:
                raise
            data, status = read_regular(self._target_below(path), max_bytes)
        if (len(data), status.st_mtime_ns) != (self._sizes[row], self._changed_ns[row]):
            raise changed_during_run_error(os.fsdecode(path))
        return data

    def fingerprint(self) -> str:
        for folder, changed_ns in self._folders.items():
            if _size_and_change(self._root + folder)[1] != changed_ns:
                return FolderImageListing(self._path).fingerprint()
        return self._fingerprint

    def _target_below(self, path: bytes) -> bytes:
        """Resolve a symbolic link, which must lead to a file below the directory."""
        target, root = os.path.realpath(path), os.path.realpath(self._root)
        if not target.startswith(root + b"/"):
            raise OSError("a symbolic link to a file outside of the directory")
        return target

    def _walk(self) -> Iterator[bytes]:
        """Yield the paths with an image suffix in bytewise order, and count the others.

        A directory sorts as if its name ended in a slash, because the paths below it continue with
        one. So only the names within one directory need sorting at a time.
        """
        stack = [iter([b""])]
        while stack:
            path = next(stack[-1], None)
            if path is None:
                stack.pop()
            elif path == b"" or path.endswith(b"/"):
                stack.append(iter(self._scan(path)))
            elif is_image_name(path):
                yield path
            else:
                self.skipped += 1

    def _scan(self, folder: bytes) -> list[bytes]:
        """Return the sorted paths in a directory; those of subdirectories end in a slash.

        A subdirectory with an image suffix appears both with and without the slash.
        """
        paths = []
        try:
            self._folders[folder] = os.stat(self._root + folder).st_mtime_ns
            with os.scandir(self._root + folder) as entries:
                for entry in entries:
                    path = folder + entry.name
                    is_folder = entry.is_dir(follow_symlinks=False)
                    if is_folder:
                        paths.append(path + b"/")
                    if not is_folder or is_image_name(path):
                        paths.append(path)
        except OSError as error:
            raise SourceError(
                f"{os.fsdecode(self._root + folder)} cannot be listed: {error.strerror}",
                "check its permissions",
            ) from None
        paths.sort()
        return paths


def _size_and_change(path: bytes) -> tuple[int, int]:
    try:
        status = os.stat(path)
    except OSError:  # e.g. a dangling link: reading the row fails, with the reason
        return 0, 0
    return status.st_size, status.st_mtime_ns


class ImageFolder(ImageSource):
    """The images below a directory."""

    kind = "images"
    listing_class = FolderImageListing
