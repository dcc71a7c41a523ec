"""Which names below a source are images, which are skipped by rule, and what was skipped.

Skipped by rule is what people do not put there themselves: hidden files, and what operating systems
leave behind. A class folder would otherwise gain an image for every thumbnail.
"""

from __future__ import annotations

import functools
import os
import re
from collections import Counter
from typing import Final

from fastvgg.imaging.formats import IMAGE_SUFFIXES

ENCODED_SUFFIXES: Final = frozenset(suffix.encode() for suffix in IMAGE_SUFFIXES)

# What is skipped, as notes call it.
OTHER_FILES: Final = "files without an image suffix"
HIDDEN: Final = "hidden files and folders"
MACOS: Final = "macOS resource files"
THUMBNAILS: Final = "thumbnails"
SYSTEM: Final = "system folders"
DANGLING: Final = "dangling links"
LOOPS: Final = "links to a folder that contains them"
LINKS: Final = "links"
SPECIAL: Final = "sockets, pipes and devices"
INVALID: Final = "entries with an invalid path"
NAMED_KINDS: Final = (DANGLING, LOOPS)  # the note names the first: a class may be behind it

MACOS_PREFIX: Final = b"._"
KIND_BY_NAME: Final = {  # in lower case
    **dict.fromkeys((b".ds_store", b".appledouble", b"__macosx", b"icon\r"), MACOS),
    **dict.fromkeys((b"thumbs.db", b"ehthumbs.db", b"@eadir", b".@__thumb"), THUMBNAILS),
    **dict.fromkeys((b".thumbnails", b".thumbs"), THUMBNAILS),
    **dict.fromkeys((b"$recycle.bin", b"system volume information", b"lost+found"), SYSTEM),
}
SUFFIX_PATTERN: Final = re.compile(rb"\.[0-9a-z_]{1,8}")
MAX_SUFFIXES: Final = 1000  # that are counted apart
MAX_SUFFIXES_SHOWN: Final = 3


def image_suffix(name: bytes) -> bytes:
    """Return the image suffix of a file's name, in lower case, or nothing.

    >>> image_suffix(b"cat/a.JPG"), image_suffix(b".jpg"), image_suffix(b"a.jpg.txt")
    (b'.jpg', b'', b'')
    """
    dot = name.rfind(b".")
    suffix = name[dot:].lower()
    is_image = suffix in ENCODED_SUFFIXES and dot > 0 and name[dot - 1 : dot] != b"/"
    return suffix if is_image else b""


def is_image_name(name: bytes) -> bool:
    """Whether a file's name has an image suffix."""
    return image_suffix(name) != b""


def kind_skipped_by_rule(name: bytes) -> str | None:
    """Return what a file or folder of this name is, if the rule skips it, or None.

    >>> kind_skipped_by_rule(b"._a.jpg"), kind_skipped_by_rule(b".git")
    ('macOS resource files', 'hidden files and folders')
    >>> kind_skipped_by_rule(b"@eaDir"), kind_skipped_by_rule(b"a.jpg")
    ('thumbnails', None)
    """
    kind = KIND_BY_NAME.get(name.lower())
    if kind is None and name.startswith(b"."):
        return MACOS if name.startswith(MACOS_PREFIX) else HIDDEN
    return kind


def path_kind_skipped_by_rule(path: bytes) -> str | None:
    """Return what the rule calls the first component of a path that it skips, or None.

    >>> path_kind_skipped_by_rule(b"__MACOSX/cat/a.jpg")
    'macOS resource files'
    """
    folder, _, name = path.rpartition(b"/")
    return _folder_kind(folder) or kind_skipped_by_rule(name)


@functools.lru_cache(maxsize=1024)
def _folder_kind(folder: bytes) -> str | None:
    return next(filter(None, map(kind_skipped_by_rule, folder.split(b"/"))), None)


def parent_folder(path: bytes) -> bytes:
    """Return the folder of a path, or nothing.

    >>> parent_folder(b"train/cat/b.jpg"), parent_folder(b"b.jpg")
    (b'train/cat', b'')
    """
    return path.rpartition(b"/")[0]


class SkippedFiles:
    """What lies below a source and is not a row, counted by kind.

    >>> skipped = SkippedFiles()
    >>> skipped.add(OTHER_FILES, b"a.heic"), skipped.add(HIDDEN, b".git")
    (None, None)
    >>> skipped.notes()
    ['skipped files without an image suffix: 1 (1 .heic)', 'skipped hidden files and folders: 1']
    """

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        """Number of files and folders of each kind."""
        self.suffixes: Counter[bytes] = Counter()
        """Number of files of each suffix, of those without an image suffix."""
        self._first: dict[str, bytes] = {}

    def add(self, kind: str, path: bytes) -> None:
        """Count a file or folder."""
        self.counts[kind] += 1
        if kind == OTHER_FILES:
            suffix = os.path.splitext(path)[1].lower()
            if SUFFIX_PATTERN.fullmatch(suffix) and len(self.suffixes) < MAX_SUFFIXES:
                self.suffixes[suffix] += 1
        elif kind in NAMED_KINDS:
            self._first[kind] = min(path, self._first.get(kind, path))

    def notes(self) -> list[str]:
        """Return a note for every kind, in alphabetical order."""
        return [
            f"skipped {kind}: {count}{self._details(kind)}"
            for kind, count in sorted(self.counts.items())
        ]

    def _details(self, kind: str) -> str:
        if kind in self._first:
            return f", e.g. {os.fsdecode(self._first[kind])}"
        if kind != OTHER_FILES or not self.suffixes:
            return ""
        suffixes = sorted(self.suffixes.items(), key=lambda item: (-item[1], item[0]))
        shown = [f"{count} {suffix.decode()}" for suffix, count in suffixes[:MAX_SUFFIXES_SHOWN]]
        return f" ({', '.join(shown)}{', ...' if len(suffixes) > len(shown) else ''})"
