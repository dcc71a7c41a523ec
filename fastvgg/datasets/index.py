"""`DST.index.csv`: one line for each image, failures too."""

from __future__ import annotations

import csv
import io
import re
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Final, NamedTuple

from fastvgg.datasets.base import read_beside
from fastvgg.errors import SourceError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

__all__ = ["Record", "index_path", "index_text", "read_index"]

NUMBER: Final = re.compile("[0-9]{1,15}")
COLUMNS: Final = ("row", "path", "label", "width", "height", "status", "reason")


class Record(NamedTuple):
    """What is known of one image: where it came from, its size, whether it could be read."""

    path: str
    """Relative to the source, with forward slashes."""
    label: str
    """The first folder of the path."""
    width: int
    height: int
    reason: str
    """Why the image could not be read; empty if it could."""

    @property
    def failed(self) -> bool:
        """Whether the image could not be read, so that its row is zeros."""
        return bool(self.reason)


def index_path(dataset: Path) -> Path:
    """Return where the index of a dataset is."""
    return dataset.with_name(dataset.name + ".index.csv")


def index_text(records: Iterable[Record]) -> Iterator[str]:
    """Return the lines of an index.

    >>> print(*index_text([Record("cat/a.jpg", "cat", 500, 375, "")]), sep="", end="")
    row,path,label,width,height,status,reason
    0,cat/a.jpg,cat,500,375,ok,
    """
    line = io.StringIO(newline="")
    writer = csv.writer(line)  # its own line end, or a name with a carriage return is not quoted

    def flushed() -> str:
        text = line.getvalue().removesuffix("\r\n") + "\n"
        line.seek(0)
        line.truncate()
        return text

    writer.writerow(COLUMNS)
    yield flushed()
    for row, record in enumerate(records):
        status = "failed" if record.failed else "ok"
        writer.writerow([row, *record[:4], status, record.reason])
        yield flushed()


def read_index(dataset: Path, images: int) -> list[Record]:
    """Read the index of a dataset of `images` rows; an empty list where it has none.

    Raises
    ------
    SourceError
        If the index is damaged, does not fit the dataset, or names a path outside of it.
    """
    path = index_path(dataset)
    data = read_beside(path)
    if data is None:
        return []
    lines = _lines(path, data.decode("utf-8", "surrogateescape"))
    if tuple(next(lines, COLUMNS)) != COLUMNS:
        raise SourceError(
            f"{path} line 1 is not the head of an index: {','.join(COLUMNS)}",
            "put back the index that was written with the dataset, or remove it",
        )
    records = [_record(path, row, fields) for row, fields in enumerate(lines)]
    if len(records) != images:
        raise SourceError(
            f"{path} lists {len(records)} images, and {dataset} has {images}",
            "put back the index that was written with the dataset, or remove it",
        )
    return records


def _lines(path: Path, text: str) -> Iterator[list[str]]:
    reader = csv.reader(io.StringIO(text, newline=""))
    try:
        yield from reader
    except csv.Error as error:
        raise SourceError(
            f"{path} line {reader.line_num} cannot be read: {error}",
            "put back the index that was written with the dataset, or remove it",
        ) from None


def _record(path: Path, expected_row: int, fields: list[str]) -> Record:
    line = expected_row + 2
    row, name, label, width, height, status, reason = fields if len(fields) == 7 else [""] * 7
    numbers = all(NUMBER.fullmatch(field) for field in (row, width, height))
    if not numbers or int(row) != expected_row or status != ("failed" if reason else "ok"):
        raise SourceError(
            f"{path} line {line} is not the index line of row {expected_row}: {str(fields)[:200]}",
            "put back the index that was written with the dataset, or remove it",
        )
    record = Record(name, label, int(width), int(height), reason)
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or ".." in parts or "\0" in name:
        raise SourceError(
            f"{path} line {line} names {name!r}, which is outside of the dataset",
            "names are relative paths without '..'; do not use an index that you do not trust",
        )
    return record
