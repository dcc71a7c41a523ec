"""Directories of image files: read as Keras' `load_img` reads them, written as PNG.

Pillow decodes, converts and resizes, because Keras' `load_img` is these three calls: with the same
Pillow the bytes are the same (https://keras.io/api/data_loading/image/). As there, alpha is
dropped, 16-bit greys are clipped, and an EXIF orientation is not applied.
"""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np
import xxhash
from PIL import Image

from fastvgg.datasets.base import Chunk, Header, open_regular
from fastvgg.datasets.index import Record
from fastvgg.errors import ResumeError, SourceError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from fastvgg.stream.storage import Storage

__all__ = ["INTERPOLATIONS", "ImageFolder", "ImageFolderTarget"]

# What keras.utils.image_dataset_from_directory reads, and what else Pillow reads by default.
SUFFIXES: Final = frozenset((".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"))

FORMATS: Final = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")

INTERPOLATIONS: Final = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "hamming": Image.Resampling.HAMMING,
    "box": Image.Resampling.BOX,
    "lanczos": Image.Resampling.LANCZOS,
}

# What Pillow's decoders raise on damaged files: its plugins parse with struct and indexing, and
# Image.open itself catches these around each of them.
DECODING_ERRORS: Final = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    IndexError,
    KeyError,
    EOFError,
    OverflowError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)

CHANNELS: Final = 3
# Decoding keeps the file, the image as it is, and the image as RGB.
DECODED_COPIES: Final = 2
SIZES_SHOWN: Final = 5


class ImageFolder:
    """The images below a directory, in the order of the bytes of their relative paths.

    A file, or anything else, whose name ends like an image's is a row; one that cannot be read
    becomes a row of zeros, and its record says why. Directories are walked; links to directories
    are not.

    Parameters
    ----------
    path
        The directory.
    size
        Height and width to resize to; if None, all images must have one size.
    interpolation
        A name that Keras' `load_img` knows.
    threads
        How many threads decode.

    Raises
    ------
    SourceError
        If there is no image, a directory cannot be listed, or sizes differ and none was given.
    UsageError
        If size or interpolation make no sense.
    """

    kind = "images"

    def __init__(
        self,
        path: Path,
        *,
        size: tuple[int, int] | None = None,
        interpolation: str = "nearest",
        threads: int = 1,
    ) -> None:
        _check_resizing(size, interpolation)
        self.path = path
        self.settings: dict[str, Any] = {"size": size, "interpolation": interpolation}
        self.notes: list[str] = []
        self.records: list[Record] = []
        self._files, others = _list_images(path)
        if not self._files:
            raise SourceError(
                f"{path} holds no images ({others} other files)",
                f"give a directory of files that end in {', '.join(sorted(SUFFIXES))}",
            )
        if others:
            self.notes.append(f"left out, because not named like images: {others}")
        self.stored_bytes = sum(file.nbytes for file in self._files)
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="fastvgg-decode")
        try:
            height, width = size or self._only_size()
        except SourceError:
            self.close()
            raise
        self.header = Header((len(self._files), height, width, CHANNELS), "uint8", "NHWC")
        self.scratch_bytes = threads * self._largest_decoded_bytes()

    def _only_size(self) -> tuple[int, int]:
        """Return the height and width that all readable images have."""
        found: dict[tuple[int, int], str] = {}
        counts: Counter[tuple[int, int]] = Counter()
        reason = ""
        for file, header in zip(self._files, self._pool.map(self._size, self._files), strict=True):
            if isinstance(header, str):
                reason = reason or f"{file.name}: {header}"
                continue
            counts[header] += 1
            found.setdefault(header, file.name)
        if not counts:
            raise SourceError(
                f"none of the {len(self._files)} images in {self.path} can be read, the first: "
                f"{reason}",
                "check that the files are images",
            )
        if len(counts) > 1:
            shown = counts.most_common(SIZES_SHOWN)
            sizes = ", ".join(
                f"{height}x{width} ({count}, as {found[height, width]})"
                for (height, width), count in shown
            )
            more = f" and {len(counts) - len(shown)} more" if len(counts) > len(shown) else ""
            raise SourceError(
                f"{self.path} holds images of {len(counts)} sizes (height x width): {sizes}{more}",
                "choose one size for all: --size 224 224",
            )
        return next(iter(counts))

    def _size(self, file: _File) -> tuple[int, int] | str:
        """Return height and width, or why they cannot be read."""
        try:
            with open_regular(self.path / file.name) as stream, _open_image(stream) as image:
                return image.height, image.width
        except DECODING_ERRORS as error:
            return _reason(error)

    def _largest_decoded_bytes(self) -> int:
        """Return what decoding takes on one thread, judged by the largest file."""
        largest = self._size(max(self._files, key=lambda file: file.nbytes))
        height, width = self.header.shape[1:3] if isinstance(largest, str) else largest
        return DECODED_COPIES * height * width * CHANNELS

    def fingerprint(self) -> str:
        """Return a hash of every path, size and time of change."""
        digest = xxhash.xxh3_128()
        for file in _list_images(self.path)[0]:
            digest.update(f"{file.nbytes} {file.changed_ns} ".encode())
            digest.update(os.fsencode(file.name) + b"\0")
        return digest.hexdigest()

    def read(self, start: int, stop: int) -> Chunk:
        """Decode images into a new batch; rows that cannot be read are zeros."""
        batch = np.zeros((stop - start, *self.header.shape[1:]), np.uint8)
        records = list(self._pool.map(self._decode, self._files[start:stop], batch))
        return Chunk(batch, records)

    def _decode(self, file: _File, row: NDArray[np.uint8]) -> Record:
        """Decode one image into its row; return what is known of it."""
        width, height, reason = 0, 0, ""
        try:
            with open_regular(self.path / file.name) as stream:
                data = io.BytesIO(stream.read())
            with _open_image(data) as image:
                width, height = image.size
                pixels = self._as_keras_loads(image)
            if pixels.shape == row.shape:
                row[...] = pixels
            else:
                reason = f"its size is {height}x{width}, not {row.shape[0]}x{row.shape[1]}"
        except DECODING_ERRORS as error:
            reason = _reason(error)
        label = PurePosixPath(file.name).parts[0] if "/" in file.name else ""
        return Record(file.name, label, width, height, reason)

    def _as_keras_loads(self, image: Image.Image) -> NDArray[np.uint8]:
        rgb = image if image.mode == "RGB" else image.convert("RGB")
        if self.settings["size"] is not None:
            height, width = self.settings["size"]
            if rgb.size != (width, height):
                resample = INTERPOLATIONS[self.settings["interpolation"]]
                rgb = rgb.resize((width, height), resample)
        return np.asarray(rgb)

    def close(self) -> None:
        """End the decoding threads."""
        self._pool.shutdown()


class _File(NamedTuple):
    name: str
    """Relative to the directory, with forward slashes."""
    nbytes: int
    changed_ns: int


def _list_images(directory: Path) -> tuple[list[_File], int]:
    """Return what is named like an image, in the order of the names' bytes, and count the rest."""
    files = []
    others = 0
    remaining = [""]
    while remaining:
        below = remaining.pop()
        try:
            with os.scandir(directory / below) as entries:
                for entry in entries:
                    name = below + entry.name
                    is_directory = entry.is_dir(follow_symlinks=False)
                    if is_directory:
                        remaining.append(name + "/")
                    if Path(entry.name).suffix.lower() in SUFFIXES:
                        files.append(_file(entry, name))
                    elif not is_directory:
                        others += 1
        except OSError as error:
            raise SourceError(
                f"{directory / below} cannot be listed: {error.strerror}", "check its permissions"
            ) from None
    files.sort(key=lambda file: os.fsencode(file.name))
    return files, others


def _file(entry: os.DirEntry[str], name: str) -> _File:
    try:
        status = entry.stat()
    except OSError:  # a link to nothing: a row that fails, with its reason, when it is read
        return _File(name, 0, 0)
    return _File(name, status.st_size, status.st_mtime_ns)


def _open_image(stream: IO[bytes]) -> Image.Image:
    """Open an image of a known format, by its content.

    Pillow knows many more, and for one of them, EPS, it runs Ghostscript on the file's program.
    """
    return Image.open(stream, formats=FORMATS)


def _reason(error: BaseException) -> str:
    """Say in one line why an image could not be read."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if "cannot identify image file" in str(error):
        return "not an image that Pillow knows"
    return " ".join(str(error).split()) or type(error).__name__


def _check_resizing(size: tuple[int, int] | None, interpolation: str) -> None:
    if interpolation not in INTERPOLATIONS:
        raise UsageError(
            f"interpolation is {interpolation!r}", f"give one of {', '.join(INTERPOLATIONS)}"
        )
    if size is not None and (len(size) != 2 or min(size) < 1):
        raise UsageError(f"size is {size}", "give height and width in pixels: --size 224 224")


class ImageFolderTarget:
    """A directory of PNG files, one for each row, named by the records where there are any.

    PNG is lossless: what is read back is what was written. A row that failed in the source has no
    file. While unfinished, the directory has another name.

    Parameters
    ----------
    path
        The directory that the images get when they are complete.
    header
        What will be in it: uint8 images, NHWC.
    storage
        What carries out the system calls.
    records
        One for each row, or none: then files are named by row.
    """

    kind = "images"

    def __init__(
        self, path: Path, header: Header, storage: Storage, records: Sequence[Record] = ()
    ) -> None:
        self.path = path
        self.header = header
        self.partial = path.with_name(path.name + ".partial")
        self._storage = storage
        self._names = _file_names(header.images, records)
        self._left_out = {row for row, record in enumerate(records) if record.failed}
        self._unsynced: deque[set[Path]] = deque()  # directories, of each write

    def create(self) -> None:
        """Make the empty directory."""
        self._storage.remove(self.partial)
        self._storage.make_directory(self.partial)
        self._storage.sync_directory(self.path.parent)

    def reopen(self) -> None:
        """Go on with the directory that is there."""
        if not self.partial.is_dir():
            raise ResumeError(f"{self.partial} is gone", "start again with --restart")

    def write(self, start: int, chunk: Chunk) -> None:
        """Encode a chunk's rows as PNG files."""
        directories: set[Path] = set()
        for row, image in enumerate(chunk.batch):
            if chunk.records and chunk.records[row].failed:
                continue
            path = self.partial / self._names[start + row]
            encoded = io.BytesIO()
            Image.fromarray(image).save(encoded, "png")
            self._storage.make_directory(path.parent)
            file = self._storage.create(path)
            self._storage.write(file, encoded.getbuffer(), 0)
            self._storage.sync(file)
            self._storage.close(file)
            directories.update(self._directories_of(path))
        self._unsynced.append(directories)

    def _directories_of(self, path: Path) -> Iterator[Path]:
        for directory in path.parents:
            yield directory
            if directory == self.partial:
                return

    def sync(self) -> None:
        """Make the names of the files written so far survive a power cut."""
        while self._unsynced:
            for directory in sorted(self._unsynced.popleft()):
                self._storage.sync_directory(directory)

    def read_back(self, start: int, stop: int) -> NDArray[Any]:
        """Decode rows of the published directory; rows that failed have no file, and are zeros."""
        batch = np.zeros((stop - start, *self.header.shape[1:]), np.uint8)
        for row, name in enumerate(self._names[start:stop]):
            path = self.path / name
            if start + row in self._left_out:
                continue
            try:
                with open_regular(path) as stream, _open_image(stream) as image:
                    batch[row] = np.asarray(image)
            except DECODING_ERRORS as error:
                raise SourceError(
                    f"{path} cannot be read: {_reason(error)}", "restore the dataset again"
                ) from None
        return batch

    def publish(self) -> None:
        """Rename the complete directory to its name."""
        self._storage.rename(self.partial, self.path)
        self._storage.sync_directory(self.path.parent)

    def close(self) -> None:
        """Nothing stays open."""


def _file_names(images: int, records: Sequence[Record]) -> list[str]:
    """Name the file of every row: the record's path, ending in .png; else the row's number.

    Where two paths differ only in how they end, or a file would take a folder's name, all keep
    their ends.

    >>> _file_names(2, [Record(path, "", 1, 1, "") for path in ("a.jpg", "b.jpg")])
    ['a.png', 'b.png']
    >>> _file_names(2, [Record(path, "", 1, 1, "") for path in ("a.jpg", "a.bmp")])
    ['a.jpg.png', 'a.bmp.png']
    >>> _file_names(2, [])
    ['00000000.png', '00000001.png']
    """
    if not records:
        return [f"{row:08d}.png" for row in range(images)]
    paths = [record.path for record in records]
    if len(set(paths)) < images:
        twice = next(path for path, count in Counter(paths).items() if count > 1)
        raise SourceError(
            f"the index names {twice!r} twice", "put back the index as it was written"
        )
    names = [str(PurePosixPath(path).with_suffix(".png")) for path in paths]
    folders = {str(folder) for path in paths for folder in PurePosixPath(path).parents}
    while len(set(names)) < images or not folders.isdisjoint(names):
        names = paths = [path + ".png" for path in paths]
    return names
