"""The index, `DST.index.csv`: one CSV record per image, including those that failed."""

from __future__ import annotations

import csv
import io
import re
from array import array
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Final, overload

from fastvgg.datasets.base import ImageRecord, open_regular, open_sidecar
from fastvgg.errors import SourceError
from fastvgg.storage.location import sidecar_path

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from typing import BinaryIO

__all__ = [
    "INDEX_HEAD",
    "Index",
    "index_path",
    "index_text",
    "read_index",
]

NUMBER: Final = re.compile("[0-9]{1,15}")
COLUMNS: Final = ("row", "path", "label", "width", "height", "status", "reason")
INDEX_HEAD: Final = ",".join(COLUMNS) + "\n"
STATUS: Final = ("ok", "failed")
REMEDY: Final = "restore the index that was written with the dataset, or remove it"


def index_path(dataset: Path) -> Path:
    """Return the path of a dataset's index."""
    return sidecar_path(dataset, ".index.csv")


def index_text(records: Iterable[ImageRecord], start: int = 0) -> str:
    """Format records as lines of an index, from row `start` on, without the header line.

    >>> print(index_text([ImageRecord("cat/a.jpg", "cat", 500, 375, False, "")], 7), end="")
    7,cat/a.jpg,cat,500,375,ok,
    """
    rows = [
        (row, path, label, width, height, STATUS[failed], reason)
        for row, (path, label, width, height, failed, reason) in enumerate(records, start)
    ]
    text = _csv(rows, "\n")
    if "\r" not in text:
        return text
    # csv.writer quotes a carriage return only if its line terminator contains one.
    return "".join(_csv([row], "\r\n").removesuffix("\r\n") + "\n" for row in rows)


def _csv(rows: Iterable[Iterable[object]], line_end: str) -> str:
    lines = io.StringIO(newline="")
    csv.writer(lines, lineterminator=line_end).writerows(rows)
    return lines.getvalue()


class Index(Sequence[ImageRecord]):
    """The records of an index, read from its file on access.

    Only the offset of each line is held in memory, 8 bytes per record.

    Parameters
    ----------
    path
        The path of the index.
    file
        The same file, open at its start.

    Raises
    ------
    SourceError
        If it is damaged, or names a path outside of the dataset.
    """

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path = path
        self._offsets = array("Q")
        lines = _Lines(path, file)
        if tuple(next(lines, COLUMNS)) != COLUMNS:
            raise SourceError(
                f"{path} line 1 is not the header of an index: {','.join(COLUMNS)}", REMEDY
            )
        self._offsets.append(lines.end)
        for row, fields in enumerate(lines):
            _record(path, row, fields)
            self._offsets.append(lines.end)

    def __len__(self) -> int:
        return len(self._offsets) - 1

    @overload
    def __getitem__(self, index: int) -> ImageRecord: ...
    @overload
    def __getitem__(self, index: slice) -> list[ImageRecord]: ...
    def __getitem__(self, index: int | slice) -> ImageRecord | list[ImageRecord]:
        if isinstance(index, int):
            row = range(len(self))[index]
            return self._between(row, row + 1)[0]
        start, stop, step = index.indices(len(self))
        return self._between(start, max(start, stop))[::step] if step > 0 else [*self][index]

    def __iter__(self) -> Iterator[ImageRecord]:
        with open_regular(self.path) as file:
            file.seek(self._offsets[0])
            for row, fields in enumerate(_Lines(self.path, file)):
                yield _record(self.path, row, fields)

    def _between(self, start: int, stop: int) -> list[ImageRecord]:
        with open_regular(self.path) as file:
            file.seek(self._offsets[start])
            data = file.read(self._offsets[stop] - self._offsets[start])
        lines = _Lines(self.path, io.BytesIO(data))
        return [_record(self.path, row, fields) for row, fields in enumerate(lines, start)]


def read_index(dataset: Path, images: int) -> Sequence[ImageRecord]:
    """Read the index of a dataset of `images` rows; empty if it has no index.

    Raises
    ------
    SourceError
        If the index cannot be read, is damaged, has a different number of rows, or names a path
        outside of the dataset.
    """
    path = index_path(dataset)
    with open_sidecar(path) as file:
        if file is None:
            return ()
        index = Index(path, file)
    if len(index) != images:
        raise SourceError(f"{path} lists {len(index)} images, but {dataset} has {images}", REMEDY)
    return index


class _Lines:
    """Iterate over CSV records, which may contain line feeds, and track the offset of their end."""

    def __init__(self, path: Path, file: BinaryIO | io.BytesIO) -> None:
        self.end = 0
        self._path = path
        self._reader = csv.reader(self._decode(file))

    def _decode(self, file: BinaryIO | io.BytesIO) -> Iterator[str]:
        for line in file:
            self.end += len(line)
            yield line.decode("utf-8", "surrogateescape")

    def __iter__(self) -> Iterator[list[str]]:
        return self

    def __next__(self) -> list[str]:
        try:
            return next(self._reader)
        except csv.Error as error:
            raise SourceError(
                f"{self._path} line {self._reader.line_num} cannot be read: {error}", REMEDY
            ) from None


def is_valid_name(name: str) -> bool:
    """Whether an image's name is relative, normalized and inside of its dataset.

    >>> is_valid_name("cat/a.jpg"), is_valid_name("../a.jpg"), is_valid_name("/a.jpg")
    (True, False, False)
    """
    parts = PurePosixPath(name).parts
    return bool(parts) and ".." not in parts and "\0" not in name and name == "/".join(parts)


def _record(path: Path, expected_row: int, fields: list[str]) -> ImageRecord:
    line = expected_row + 2
    row, name, label, width, height, status, reason = fields if len(fields) == 7 else [""] * 7
    numbers = all(NUMBER.fullmatch(field) for field in (row, width, height))
    failed = status == "failed"
    if (
        not numbers
        or int(row) != expected_row
        or status not in ("ok", "failed")
        or (failed and not reason)
    ):
        raise SourceError(
            f"{path} line {line} is not a valid record for row {expected_row}: {str(fields)[:200]}",
            REMEDY,
        )
    if not is_valid_name(name):
        raise SourceError(
            f"{path} line {line} names {name!r}, which is outside of the dataset or not normalized",
            "names must be relative paths without '..'; do not use an index that you do not trust",
        )
    return ImageRecord(name, label, int(width), int(height), failed, reason)
