"""Write one image file per row: PNG, lossless WebP, or JPEG."""

from __future__ import annotations

import io
import itertools
import os
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias, get_args
from unicodedata import normalize

import numpy as np
import simplejpeg
from PIL import Image

from fastvgg.choices import check_choice
from fastvgg.datasets.base import DiskTarget
from fastvgg.datasets.files import open_regular
from fastvgg.datasets.index import find_duplicates, hash_names
from fastvgg.errors import ResumeError, SourceError, StoppedError, TargetError, option
from fastvgg.imaging.decode import DECODING_ERRORS, describe_error, open_image

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from numpy.typing import NDArray

    from fastvgg.datasets.base import Header, ImageRecord, Payload
    from fastvgg.storage.local import Storage

FileFormat: TypeAlias = Literal["png", "jpeg", "webp"]

FORMAT_SUFFIXES: Final[dict[str, str]] = {"png": ".png", "jpeg": ".jpg", "webp": ".webp"}
MAX_SIDE_PIXELS: Final = {"png": 2**31 - 1, "jpeg": 65_500, "webp": 16_383}
MAX_NAME_BYTES: Final = 255
JPEG_QUALITY: Final = 95
MAX_PROBED_NAMES: Final = 64


def check_format(name: str, height: int, width: int) -> None:
    """Check that a format is supported, and supports images of a size.

    Raises
    ------
    UsageError, TargetError
        If the format is unknown, or the images are too large for it.
    """
    check_choice("format", name, get_args(FileFormat))
    if max(height, width) > MAX_SIDE_PIXELS[name]:
        raise TargetError(
            f"images of {height}x{width} are too large for {name}, whose maximum is "
            f"{MAX_SIDE_PIXELS[name]} pixels per side",
            f"give {option('format', 'png')}",
        )


def is_lossy(name: str) -> bool:
    """Whether images in a format may differ when they are read back."""
    return name == "jpeg"


class ImageFolderTarget(DiskTarget):
    """A directory with one image file per row. Rows that failed in the source have no file.

    Parameters
    ----------
    path, header, storage
        As for `Target`. Images are uint8 and NHWC.
    records
        One per row, which name the files; without records, files are named by row number.
    file_format
        "png" and "webp" are lossless; "jpeg" is lossy.

    Raises
    ------
    SourceError
        If the records contain a name twice.
    TargetError
        If a file name would be too long.
    """

    def __init__(
        self,
        path: Path,
        header: Header,
        storage: Storage,
        records: Sequence[ImageRecord] = (),
        file_format: FileFormat = "png",
    ) -> None:
        super().__init__(path, header, storage)
        self._records = records
        self._format = file_format
        self._suffix = FORMAT_SUFFIXES[file_format]
        self._repeats = _suffix_repeats(self._paths, self._suffix) if records else 0
        self._last_directory: Path | None = None
        self._syncs_each = False
        self._written: set[int] = set()
        """First rows of the chunks whose files may exist."""

    def _paths(self) -> Iterator[str]:
        return (record.path for record in self._records)

    def create(self) -> None:
        self._make_partial()
        names = self._similar_names()
        if not names:
            return
        try:
            self._check_distinct(names)
        except TargetError:
            self.close()
            self._storage.remove(self.partial)
            raise
        self.close()
        self._make_partial()

    def _make_partial(self) -> None:
        self._storage.remove(self.partial)
        self._storage.make_directory(self.partial)
        self._hold()
        self._storage.sync_directory(self.path.parent)

    def reopen(self) -> None:
        if not self.partial.is_dir():
            raise ResumeError(
                f"{self.partial} does not exist", f"start over with {option('restart')}"
            )
        self._hold()
        self._written.update(range(self.header.images))  # by the interrupted run, perhaps

    def _hold(self) -> None:
        self._directory = self._storage.hold(self.partial)
        self._syncs_each = not self._storage.has_syncfs(self.partial)

    def close(self) -> None:
        self._storage.release(self.partial)

    def _similar_names(self) -> list[str]:
        """Return names that differ only in case or Unicode normalization from another one.

        Or from the folder of another one, which is then returned, too.
        """
        if not self._records:
            return []

        def folded() -> Iterator[str]:
            names = enumerate(self.file_names())
            return (f"\0{row}" if name is None else _fold(name) for row, name in names)

        hashes = hash_names(map(os.fsencode, folded()))
        repeated, first = (rows[:MAX_PROBED_NAMES] for rows in find_duplicates(hashes))
        rows = {*repeated.tolist(), *first.tolist()}
        like_folders = np.flatnonzero(np.isin(hashes, _hash_folders(folded())))[:MAX_PROBED_NAMES]
        if len(like_folders):
            rows |= {*like_folders.tolist()}
            wanted = {*hashes[like_folders].tolist()}
            for row, name in enumerate(folded()):
                found = wanted.intersection(_hash_folders([name]).tolist())
                if found:
                    rows.add(row)
                    wanted -= found
        return [name for row in sorted(rows) for name in self._names(row, row + 1) if name]

    def _check_distinct(self, names: list[str]) -> None:
        """Check that the file system distinguishes names, by creating them in the empty partial.

        Whether case and normalization matter depends on its type, options and version of Unicode.
        """
        for name in names:
            path = self.partial / name
            try:
                self._storage.make_directory(path.parent)
                self._storage.write_file(path, [], sync=False, exclusive=True)
            except StoppedError as error:
                if not isinstance(error.__cause__, FileExistsError | NotADirectoryError):
                    raise
                raise TargetError(
                    f"{self.path} is on a file system that does not distinguish {name!r}, or its "
                    "folder, from another name in the index, which differs only in case or "
                    "normalization",
                    "choose a target on another disk; or move the index of the source away, so "
                    "that files are named by row number",
                ) from None

    def encode(self, image: NDArray[np.uint8]) -> bytes:
        """Encode an image in the file format; thread-safe."""
        if self._format == "jpeg":
            encoded: bytes = simplejpeg.encode_jpeg(
                image, quality=JPEG_QUALITY, colorsubsampling="444"
            )
            return encoded
        buffer = io.BytesIO()
        options = {"lossless": True} if self._format == "webp" else {}
        Image.fromarray(image).save(buffer, self._format, **options)
        return buffer.getvalue()

    def write(self, start: int, stored: Payload) -> None:
        """Write the encoded images of rows; an empty one marks a failed row, which has no file.

        Only the files of a chunk that was written before are replaced.
        """
        is_new = start not in self._written
        self._written.add(start)
        for name, data in zip(self._names(start, start + len(stored)), stored, strict=True):
            if name is None or not len(data):
                continue
            path = self.partial / name
            if path.parent != self._last_directory:
                self._storage.make_directory(path.parent)
                self._last_directory = path.parent
            self._storage.write_file(path, [data], sync=self._syncs_each, exclusive=is_new)

    def sync(self) -> None:
        self._storage.syncfs(self.partial)

    def publish(self) -> None:
        """Give the partial its name, after checking that it contains a file for every image."""
        expected = sum(name is not None for name in self.file_names())
        found = self._storage.count_files(self.partial)
        if found != expected:
            raise StoppedError(
                f"{self.partial} contains {found} files, but {expected} were written: files were "
                "removed or added, or have the same name on this file system",
                f"move what others added to it away, and start over with {option('restart')}",
            )
        self._storage.check_same(self._directory)
        super().publish()

    def file_names(self) -> Iterator[str | None]:
        return self._names(0, self.header.images)

    def read_back(self, start: int, stop: int) -> NDArray[Any]:
        """Decode rows; failed rows are zeros."""
        batch = np.zeros((stop - start, *self.header.shape[1:]), np.uint8)
        for image, name in zip(batch, self._names(start, stop), strict=True):
            if name is None:
                continue
            try:
                with open_image(io.BytesIO(self._content(name))) as decoded:
                    image[...] = np.asarray(decoded)
            except DECODING_ERRORS as error:
                raise self._unreadable_error(name, error) from None
        return batch

    def stored_spans(self, start: int, stop: int, max_bytes: int) -> Iterator[bytes | memoryview]:
        for name in self._names(start, stop):
            if name is None:
                continue
            try:
                with open_regular(self.path / name) as file:
                    while data := file.read(max_bytes):
                        yield data
            except OSError as error:
                raise self._unreadable_error(name, error) from None

    def repair(self, start: int, stored: Payload) -> None:
        """Replace each file that differs, atomically."""
        for name, data in zip(self._names(start, start + len(stored)), stored, strict=True):
            if name is None or self._is_stored(self.path / name, data):
                continue
            path = self.path / name
            self._storage.make_directory(path.parent)
            self._storage.replace_file(path, [data])

    def _is_stored(self, path: Path, data: bytes | memoryview) -> bool:
        try:
            with open_regular(path) as file:
                return file.read(len(data) + 1) == data
        except OSError:
            return False

    def _content(self, name: str) -> bytes:
        try:
            with open_regular(self.path / name) as file:
                return file.read()
        except OSError as error:
            raise self._unreadable_error(name, error) from None

    def _unreadable_error(self, name: str, error: BaseException) -> SourceError:
        return SourceError(
            f"{self.path / name} cannot be read: {describe_error(error)}",
            "move the dataset away, and rerun the restore",
        )

    def _names(self, start: int, stop: int) -> Iterator[str | None]:
        """Return the file name of each row; None for failed rows."""
        if not self._records:
            return (f"{row:08d}{self._suffix}" for row in range(start, stop))
        return (
            None if record.failed else _with_suffix(record.path, self._suffix, self._repeats)
            for record in self._records[start:stop]
        )


def _encode_name(name: str) -> bytes:
    """Return the bytes of a file name, after checking the length of its components."""
    encoded = os.fsencode(name)
    if len(encoded) > MAX_NAME_BYTES and max(map(len, encoded.split(b"/"))) > MAX_NAME_BYTES:
        raise TargetError(
            f"the file name {name!r} would be longer than {MAX_NAME_BYTES} bytes",
            "give a name that ends in .npy, to restore an array instead",
        )
    return encoded


def _fold(name: str) -> str:
    """Return a name without its case and its Unicode normalization.

    >>> _fold("Caf\N{LATIN SMALL LETTER E WITH ACUTE}") == _fold("CAFE\N{COMBINING ACUTE ACCENT}")
    True
    """
    return name.lower() if name.isascii() else normalize("NFD", normalize("NFD", name).casefold())


def _with_suffix(path: str, suffix: str, repeats: int) -> str:
    """Return a path with its suffix replaced, or with `suffix` appended `repeats` times."""
    if repeats:
        return path + suffix * repeats
    folder, slash, name = path.rpartition("/")
    stem = name.rpartition(".")[0] or name
    return folder + slash + stem + suffix


def _suffix_repeats(paths: Callable[[], Iterable[str]], suffix: str) -> int:
    """Return how often to append the suffix to all paths; 0 if theirs can be replaced.

    They cannot if two paths differ only in their suffix, or if a file would have a folder's name.

    >>> _suffix_repeats(lambda: ["cat/a.jpg", "cat/b.jpg"], ".png")
    0
    >>> _suffix_repeats(lambda: ["a.jpg", "a.bmp"], ".png")
    1
    """
    repeated, _ = find_duplicates(hash_names(os.fsencode(path) for path in paths()))
    if len(repeated):
        path = next(itertools.islice(paths(), repeated[0], None))
        raise SourceError(
            f"the index names {path!r} twice", "restore the index that was written with the dataset"
        )
    folders = _hash_folders(paths())
    repeats = 0
    while True:
        names = hash_names(_encode_name(_with_suffix(path, suffix, repeats)) for path in paths())
        if len(np.unique(names)) == len(names) and not np.isin(names, folders).any():
            return repeats
        repeats += 1


def _hash_folders(paths: Iterable[str]) -> NDArray[np.uint64]:
    """Return the distinct hashes of all folders that contain the paths."""
    nearest = itertools.groupby(path.rpartition("/")[0] for path in paths)
    folders = (PurePosixPath(folder) for folder, _ in nearest)
    return np.unique(
        hash_names(os.fsencode(str(each)) for path in folders for each in (path, *path.parents))
    )
