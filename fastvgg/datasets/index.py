"""`DST.index.csv`: one line for each image, failures too."""

from __future__ import annotations

import csv
import io
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Final, NamedTuple

from fastvgg.errors import SourceError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

__all__ = ["Record", "index_path", "index_text", "read_index"]

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
    writer = csv.writer(line, lineterminator="\n")

    def flushed() -> str:
        text = line.getvalue()
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
    try:
        text = path.read_bytes().decode("utf-8", "surrogateescape")
    except FileNotFoundError:
        return []
    records = []
    for line, fields in enumerate(csv.reader(io.StringIO(text, newline="")), start=1):
        if line == 1 and tuple(fields) == COLUMNS:
            continue
        records.append(_record(path, line, fields, expected_row=line - 2))
    if len(records) != images:
        raise SourceError(
            f"{path} lists {len(records)} images, and {dataset} has {images}",
            "put back the index that was written with the dataset, or remove it",
        )
    return records


def _record(path: Path, line: int, fields: list[str], expected_row: int) -> Record:
    row, name, label, width, height, status, reason = fields if len(fields) == 7 else [""] * 7
    numbers = row.isdecimal() and width.isdecimal() and height.isdecimal()
    if not numbers or int(row) != expected_row or status != ("failed" if reason else "ok"):
        raise SourceError(
            f"{path} line {line} is not the index line of row {expected_row}: {fields}",
            "put back the index that was written with the dataset, or remove it",
        )
    record = Record(name, label, int(width), int(height), reason)
    parts = PurePosixPath(name).parts
    if not parts or parts[0] == "/" or ".." in parts or "\0" in name:
        raise SourceError(
            f"{path} line {line} names {name!r}, which is outside of the dataset",
            "names are relative paths without '..'; do not use an index that you do not trust",
        )
    return record
