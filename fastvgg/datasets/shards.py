"""Expand a path into tar shards: a single one, or a range."""

from __future__ import annotations

import os
import re
import shlex
from typing import TYPE_CHECKING, Final

from fastvgg.errors import SourceError

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["names_tar", "shard_paths"]

COMPRESSED: Final = {
    ".tgz": "gzip",
    ".tbz": "bzip2",
    ".tbz2": "bzip2",
    ".txz": "xz",
    ".tzst": "zstd",
    ".tar.gz": "gzip",
    ".tar.z": "gzip",
    ".tar.bz2": "bzip2",
    ".tar.xz": "xz",
    ".tar.lzma": "xz",
    ".tar.zst": "zstd",
    ".tar.lz4": "lz4",
    ".tar.lz": "lzip",
}
RANGE: Final = re.compile(r"\{([0-9]+)\.\.([0-9]+)\}")
MAX_SHARDS: Final = 1_000_000
MAX_DIGITS: Final = 18
MISSING_SHOWN: Final = 5


def names_tar(path: Path) -> bool:
    """Whether a path names tar shards, including compressed ones, which `TarListing` rejects.

    >>> from pathlib import Path
    >>> [names_tar(Path(name)) for name in ("a.tar", "{00..99}.TAR", "a.tar.gz", "a.npy")]
    [True, True, True, False]
    """
    return path.name.lower().endswith((".tar", *COMPRESSED))


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
    start, end, numbers = parsed
    paths = [text[:start] + number + text[end:] for number in numbers]
    missing = [shard for shard in paths if not os.path.lexists(shard)]
    if missing:
        shown = ", ".join(missing[:MISSING_SHOWN])
        more = f" and {len(missing) - MISSING_SHOWN} more" if len(missing) > MISSING_SHOWN else ""
        raise SourceError(
            f"{path}: {len(missing)} of {len(paths)} shards are missing: {shown}{more}",
            "get the missing shards, or give the range that exists",
        )
    if len(paths) == 1:
        return [(paths[0], b"")]
    begin = text.rfind("/", 0, start) + 1
    return [(shard, _prefix(shard[begin:])) for shard in paths]


def _parse_range(text: str) -> tuple[int, int, list[str]] | None:
    """Return the position of a range in a path, and its numbers; None if there is no range.

    >>> _parse_range("shards/{08..11}.tar")
    (7, 15, ['08', '09', '10', '11'])
    """
    ranges = [*RANGE.finditer(text)]
    if not ranges:
        return None
    if len(ranges) > 1:
        raise SourceError(
            f"{text} has {len(ranges)} ranges", "give one range, and use a run for each"
        )
    first, last = ranges[0].groups()
    is_short = max(len(first), len(last)) <= MAX_DIGITS
    if not is_short or not 0 <= int(last) - int(first) < MAX_SHARDS:
        raise SourceError(
            f"{text}: {ranges[0][0]} is not a range of at most {MAX_SHARDS} increasing numbers",
            "give the first and the last number: 'shards/{0000..0099}.tar'",
        )
    numbers = [f"{number:0{len(first)}}" for number in range(int(first), int(last) + 1)]
    return *ranges[0].span(), numbers


def _check_not_compressed(path: Path, *, is_range: bool) -> None:
    name = path.name.lower()
    program = next((COMPRESSED[suffix] for suffix in COMPRESSED if name.endswith(suffix)), None)
    if program is not None:
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
