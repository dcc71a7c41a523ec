"""Directories of images: all files with an image suffix, sorted bytewise by relative path.

Symbolic links are followed, of files and of folders, as Keras (files), torchvision and timm (both)
do: whoever may read a file may read what a link in their own folder leads to. The name of a link
decides, not that of its target, which in a Hugging Face cache or in git-annex has no suffix.
"""

from __future__ import annotations

import errno
import os
import stat
from array import array
from bisect import bisect_left
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

import xxhash

from fastvgg.datasets.base import changed_during_run_error
from fastvgg.datasets.files import read_regular
from fastvgg.datasets.image_names import (
    DANGLING,
    LINKS,
    LOOPS,
    OTHER_FILES,
    SPECIAL,
    is_image_name,
    kind_skipped_by_rule,
)
from fastvgg.datasets.images import ImageListing, ImageSource
from fastvgg.errors import SourceError, option, remedy_for

if TYPE_CHECKING:
    from collections.abc import Iterator

FolderIdentity = tuple[int, int]
"""Device and inode."""

# The last byte of a path that is a link. No name contains it, and it sorts before all others, so
# that marked paths have the order of their names.
LINK_MARK: Final = b"\0"
# The number of paths through folders that contain links to each other is the factorial of theirs,
# most of them through many links. Elsewhere, hardly any path leads through more than three.
MANY_LINKS: Final = 4
MAX_REPEATS: Final = 1000
DANGLING_ERRORS: Final = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)


class _OpenFolder(NamedTuple):
    """A folder that is being listed."""

    paths: Iterator[bytes]
    """What remains of it."""
    identity: FolderIdentity | None
    links: int
    """Number of links to folders in its path."""


class FolderImageListing(ImageListing):
    """The images below a directory, sorted bytewise by path.

    Every file with an image suffix is listed, even if it is a pipe, a device or a dangling link,
    which cannot be read. A folder that is reached by two names is listed under both. A link back to
    a folder that contains it is not followed, and counted. A file that changed after it was listed
    is only detected when it is read.

    Parameters
    ----------
    path
        The directory.
    follow_links
        Whether links below `path` are followed; otherwise they are skipped and counted.

    Raises
    ------
    SourceError
        If a folder cannot be listed, or links lead to each other in too many ways.
    """

    def __init__(self, path: Path, *, follow_links: bool = True) -> None:
        super().__init__(path)
        self._root = os.fsencode(path) + b"/"
        self._follow_links = follow_links
        self._changed_ns = array("q")
        self._linked_rows = array("q")
        self._link_hashes = array("Q")
        """Hashes of where the links of `_linked_rows` lead: they may lead to files of equal size
        and time."""
        self._folders: dict[bytes, int] = {}
        """The modification time of every directory."""
        self._linked_folders: list[bytes] = []
        digest = xxhash.xxh3_128()
        for name, is_link in self._walk():
            size, changed_ns = _size_and_change(self._root + name)
            if is_link:
                self._linked_rows.append(len(self))
                self._link_hashes.append(xxhash.xxh3_64_intdigest(self._link_text(name)))
            self._names.append(name)
            self._sizes.append(size)
            self._changed_ns.append(changed_ns)
            digest.update(self.identity(len(self) - 1))
        for folder in self._linked_folders:
            digest.update(b"%b\0%b\0" % (folder, self._link_text(folder)))
        self._fingerprint = digest.hexdigest()

    @property
    def linked_paths(self) -> list[Path]:
        folders = (os.path.realpath(self._root + folder) for folder in self._linked_folders)
        return [Path(os.fsdecode(folder)) for folder in folders]

    def identity(self, row: int) -> bytes:
        """Return an image's name, size, modification time, and a hash of where its link leads."""
        index = bisect_left(self._linked_rows, row) if self._linked_rows else 0
        is_link = index < len(self._linked_rows) and self._linked_rows[index] == row
        link = b"%d " % self._link_hashes[index] if is_link else b""
        return b"%d %d %b%b\0" % (self._sizes[row], self._changed_ns[row], link, self._names[row])

    def read(self, row: int, max_bytes: int) -> bytes:
        path = self._root + self._names[row]
        try:
            data, status = read_regular(path, max_bytes, follow_links=self._follow_links)
        except OSError as error:
            if error.errno == errno.ELOOP and not self._follow_links:  # it was no link
                raise changed_during_run_error(os.fsdecode(path)) from None
            raise
        if (len(data), status.st_mtime_ns) != (self._sizes[row], self._changed_ns[row]):
            raise changed_during_run_error(os.fsdecode(path))
        return data

    def fingerprint(self) -> str:
        for folder, changed_ns in self._folders.items():
            if _size_and_change(self._root + folder)[1] != changed_ns:
                relisted = FolderImageListing(self._path, follow_links=self._follow_links)
                return relisted.fingerprint()
        return self._fingerprint

    def _walk(self) -> Iterator[tuple[bytes, bool]]:
        """Yield the paths with an image suffix in bytewise order, and whether each is a link.

        A directory sorts as if its name ended in a slash, because the paths below it continue with
        one. So only the names within one directory need sorting at a time.
        """
        stack = [_OpenFolder(iter([b""]), None, links=0)]
        deep_folders: set[FolderIdentity] = set()
        repeats = 0
        while stack:
            marked = next(stack[-1].paths, None)
            if marked is None:
                stack.pop()
                continue
            path = marked.removesuffix(LINK_MARK)
            is_link = len(path) < len(marked)
            if path and not path.endswith(b"/"):
                yield path, is_link
                continue
            identity, paths = self._scan(path, [folder.identity for folder in stack])
            if identity is None:
                continue
            links = stack[-1].links + is_link
            if is_link:
                self._linked_folders.append(path)
            if links >= MANY_LINKS:
                repeats += is_link and identity in deep_folders
                if repeats > MAX_REPEATS:
                    raise self._entangled_error(path)
                deep_folders.add(identity)
            stack.append(_OpenFolder(iter(paths), identity, links))

    def _scan(
        self, folder: bytes, path_folders: list[FolderIdentity | None]
    ) -> tuple[FolderIdentity | None, list[bytes]]:
        """Return a folder's identity, or None if it is one of `path_folders`; and its paths.

        The paths are sorted. Those of folders end in a slash, and those of links in LINK_MARK.
        """
        paths = []
        try:
            status = os.stat(self._root + folder)
            identity = status.st_dev, status.st_ino
            if status.st_ino and identity in path_folders:
                self.skipped.add(LOOPS, folder[:-1])
                return None, []
            self._folders[folder] = status.st_mtime_ns
            with os.scandir(self._root + folder) as entries:
                for entry in entries:
                    path = self._path_to_list(folder + entry.name, entry)
                    if path is not None:
                        paths.append(path)
        except OSError as error:
            raise SourceError(
                f"{os.fsdecode(error.filename or self._root + folder)} cannot be listed: "
                f"{error.strerror}",
                remedy_for(error),
            ) from None
        paths.sort()
        return identity, paths

    def _path_to_list(self, path: bytes, entry: os.DirEntry[bytes]) -> bytes | None:
        """Return the path of a row or of a folder, marked as such, or None if it is skipped.

        Only links need a system call: the type of other entries comes with their names.
        """
        kind = kind_skipped_by_rule(entry.name)
        if kind is None:
            if entry.is_symlink():
                return self._link_to_list(path, entry)
            if entry.is_dir(follow_symlinks=False):
                return path + b"/"
            if is_image_name(path):
                return path
            kind = OTHER_FILES if entry.is_file(follow_symlinks=False) else SPECIAL
        self.skipped.add(kind, path)
        return None

    def _link_to_list(self, path: bytes, entry: os.DirEntry[bytes]) -> bytes | None:
        is_image = is_image_name(path)
        try:
            mode = entry.stat().st_mode
        except OSError as error:
            # A folder that may not be searched may contain images.
            if error.errno not in DANGLING_ERRORS and self._follow_links and not is_image:
                raise
            mode = 0
        if not self._follow_links:
            kind = LINKS if mode else DANGLING
        elif stat.S_ISDIR(mode):
            return path + b"/" + LINK_MARK
        elif is_image:
            return path + LINK_MARK
        elif not mode:
            kind = DANGLING
        else:
            kind = OTHER_FILES if stat.S_ISREG(mode) else SPECIAL
        self.skipped.add(kind, path)
        return None

    def _entangled_error(self, folder: bytes) -> SourceError:
        return SourceError(
            f"{os.fsdecode(self._root + folder[:-1])}: links to folders that contain more such "
            f"links lead to the same folders again, more than {MAX_REPEATS} times",
            "move links between these folders elsewhere; or, if no image is behind a link, give "
            f"{option('follow_links', value=False)}",
        )

    def _link_text(self, path: bytes) -> bytes:
        try:
            return os.readlink(self._root + path.removesuffix(b"/"))
        except OSError:  # no link anymore
            return b""


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
