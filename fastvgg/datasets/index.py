"""The index, `DST.index.csv`: one CSV record per image, including those that failed.

Names of images are kept in contiguous memory, with 8 bytes of overhead each.
"""

from __future__ import annotations

import bisect
import csv
import functools
import io
import itertools
import os
import re
from abc import abstractmethod
from array import array
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Final, overload

import numpy as np
import xxhash

from fastvgg.datasets.base import ImageRecord, changed_during_run_error
from fastvgg.datasets.files import open_regular, open_sidecar
from fastvgg.errors import SourceError
from fastvgg.storage.location import sidecar_path

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from typing import BinaryIO

    from numpy.typing import NDArray

NUMBER_PATTERN: Final = re.compile("[0-9]{1,15}")
COLUMNS: Final = ("row", "path", "label", "width", "height", "status", "reason")
# Of a line: path and label have at most 4095 bytes, twice that if they are quotes, and a reason 500
# characters.
MAX_RECORD_BYTES: Final = 2**15
FIELD_PATTERN: Final = re.compile(r'(?:"([^"]*(?:""[^"]*)*)"|([^",]*))(,|\Z)')
INDEX_HEADER: Final = ",".join(COLUMNS) + "\n"
STATUSES: Final = ("ok", "failed")
REMEDY: Final = "restore the index that was written with the dataset, or move it away"


def index_path(dataset: Path) -> Path:
    """Return the path of a dataset's index."""
    return sidecar_path(dataset, ".index.csv")


def format_records(records: Iterable[ImageRecord], start: int = 0) -> str:
    """Format records as lines of an index, from row `start` on, without the header line.

    >>> print(format_records([ImageRecord("cat/a.jpg", "cat", 500, 375, False, "")], 7), end="")
    7,cat/a.jpg,cat,500,375,ok,
    """
    rows = [
        (row, path, label, width, height, STATUSES[failed], reason)
        for row, (path, label, width, height, failed, reason) in enumerate(records, start)
    ]
    text = _format_csv(rows, "\n")
    if "\r" not in text:
        return text
    # csv.writer quotes a carriage return only if its line terminator contains one.
    return "".join(_format_csv([row], "\r\n").removesuffix("\r\n") + "\n" for row in rows)


def _format_csv(rows: Iterable[Iterable[object]], line_end: str) -> str:
    lines = io.StringIO(newline="")
    csv.writer(lines, lineterminator=line_end).writerows(rows)
    return lines.getvalue()


class RecordSequence(Sequence[ImageRecord]):
    """Records of rows that are read when they are needed, those of a slice together."""

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

    @property
    @abstractmethod
    def max_record_bytes(self) -> int:
        """The most bytes that a record has as text."""

    @abstractmethod
    def _between(self, start: int, stop: int) -> list[ImageRecord]:
        """Return the records of the rows `start` to `stop`, exclusive."""


def max_record_bytes(records: Sequence[ImageRecord]) -> int:
    """Return the most bytes that a record has as text; 0 if there is no index."""
    return records.max_record_bytes if isinstance(records, RecordSequence) else 0


class Index(RecordSequence):
    """The records of an index, read from its file on access.

    Only the offset of each line is held in memory, 8 bytes per record.

    Parameters
    ----------
    path
        The path of the index.
    file
        The same file, open at its start.
    max_images
        How many records it may have; None for any number.

    Raises
    ------
    SourceError
        If it is damaged, or names a path outside of the dataset.
    """

    def __init__(self, path: Path, file: BinaryIO, max_images: int | None = None) -> None:
        self.path = path
        lines = _lines(path, file)
        header, end = next(lines, (COLUMNS, 0))
        if tuple(header) != COLUMNS:
            raise SourceError(
                f"{path} line 1 is not the header of an index: {','.join(COLUMNS)}", REMEDY
            )
        self._offsets = array("Q", [end])
        for row, (fields, end) in enumerate(lines):
            if row == max_images:
                raise SourceError(
                    f"{path} lists more than the {max_images} images of the dataset", REMEDY
                )
            _record(path, row, fields)
            self._offsets.append(end)

    def __len__(self) -> int:
        return len(self._offsets) - 1

    @property
    def max_record_bytes(self) -> int:
        return int(np.diff(self._offsets).max(initial=0))

    def __iter__(self) -> Iterator[ImageRecord]:
        with open_regular(self.path) as file:
            file.seek(self._offsets[0])
            yield from _parse(self.path, file, 0)

    def _between(self, start: int, stop: int) -> list[ImageRecord]:
        with open_regular(self.path) as file:
            file.seek(self._offsets[start])
            data = file.read(self._offsets[stop] - self._offsets[start])
        records = [*_parse(self.path, io.BytesIO(data), start)]
        if len(records) != stop - start:
            raise changed_during_run_error(str(self.path))
        return records


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
        index = Index(path, file, images)
    if len(index) != images:
        raise SourceError(f"{path} lists {len(index)} images, but {dataset} has {images}", REMEDY)
    return index


class PartRecords(RecordSequence):
    """The records of the parts of an array, one part after the other.

    The names of images begin with that of their part, because two parts may use the same names.

    >>> records = [ImageRecord(f"{row}.jpg", "", 5, 7, False, "") for row in range(3)]
    >>> joined = PartRecords({"part-0": records[:1], "part-1": records[1:]})
    >>> len(joined), joined[-1].path, [record.path for record in joined[:2]]
    (3, 'part-1/2.jpg', ['part-0/0.jpg', 'part-1/1.jpg'])
    """

    def __init__(self, parts: Mapping[str, Sequence[ImageRecord]]) -> None:
        self._parts = [*parts.items()]
        self._starts = [0, *itertools.accumulate(map(len, parts.values()))]

    def __len__(self) -> int:
        return self._starts[-1]

    @property
    def max_record_bytes(self) -> int:
        return max(
            len(os.fsencode(name)) + 1 + max_record_bytes(each) for name, each in self._parts
        )

    def __iter__(self) -> Iterator[ImageRecord]:
        for name, records in self._parts:
            yield from _in_part(name, records)

    def _between(self, start: int, stop: int) -> list[ImageRecord]:
        found: list[ImageRecord] = []
        first = bisect.bisect_right(self._starts, start) - 1
        for number in range(first, bisect.bisect_left(self._starts, stop)):
            (name, records), offset = self._parts[number], self._starts[number]
            found += _in_part(name, records[max(0, start - offset) : stop - offset])
        return found


def _in_part(name: str, records: Iterable[ImageRecord]) -> Iterator[ImageRecord]:
    return (record._replace(path=f"{name}/{record.path}") for record in records)


def _parse(path: Path, file: BinaryIO | io.BytesIO, start: int) -> Iterator[ImageRecord]:
    for row, (fields, _) in enumerate(_lines(path, file), start):
        yield _record(path, row, fields)


def _lines(path: Path, file: BinaryIO | io.BytesIO) -> Iterator[tuple[list[str], int]]:
    """Yield CSV records, which may contain line feeds, and the offset of their end.

    Not `csv.reader`: its limit of a field's size belongs to the whole process.
    """
    end = 0
    line_number = 1  # of the first line of the record
    lines: list[bytes] = []
    length = quotes = 0
    for line in iter(functools.partial(file.readline, MAX_RECORD_BYTES), b""):
        lines.append(line)
        length += len(line)
        quotes += line.count(b'"')
        if length >= MAX_RECORD_BYTES:
            break
        if quotes % 2:
            continue
        text = b"".join(lines).decode("utf-8", "surrogateescape")
        fields = _split(text.removesuffix("\n").removesuffix("\r"))
        if fields is None:
            raise SourceError(f"{path} line {line_number} is not a line of CSV", REMEDY)
        end += length
        yield fields, end
        line_number += len(lines)
        lines, length, quotes = [], 0, 0
    if lines:
        raise SourceError(
            f"{path} line {line_number} is incomplete, or longer than {MAX_RECORD_BYTES} bytes",
            REMEDY,
        )


def _split(record: str) -> list[str] | None:
    """Return the fields of a CSV record, or None if a quote is misplaced.

    >>> _split('0,"a,""b"".jpg",cat')
    ['0', 'a,"b".jpg', 'cat']
    """
    if '"' not in record:
        return record.split(",")
    fields, at = [], 0
    while (match := FIELD_PATTERN.match(record, at)) is not None:
        quoted, plain, separator = match.groups()
        fields.append(plain if quoted is None else quoted.replace('""', '"'))
        if not separator:
            return fields
        at = match.end()
    return None


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
    numbers = all(NUMBER_PATTERN.fullmatch(field) for field in (row, width, height))
    failed = status == "failed"
    is_known = status in STATUSES and (reason or not failed)
    if not (numbers and is_known and int(row) == expected_row):
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


class PackedNames(Sequence[bytes]):
    """A sequence of byte strings with an overhead of 8 bytes each.

    The overhead of a Python list of bytes objects is 50 to 60 bytes higher.

    Examples
    --------
    >>> names = PackedNames([b"cat/a.jpg", b"dog/b.jpg"])
    >>> names.append(b"")
    >>> len(names), names[1], names[-1], names[:2]
    (3, b'dog/b.jpg', b'', [b'cat/a.jpg', b'dog/b.jpg'])
    """

    def __init__(self, names: Iterable[bytes] = ()) -> None:
        self._text = bytearray()
        self._ends = array("Q", [0])
        for name in names:
            self.append(name)

    @property
    def total_bytes(self) -> int:
        """The length of all names."""
        return len(self._text)

    @property
    def max_bytes(self) -> int:
        """The length of the longest name."""
        return int(np.diff(self._ends).max(initial=0))

    def append(self, name: bytes) -> None:
        """Append a name."""
        self._text += name
        self._ends.append(len(self._text))

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, index: int) -> bytes: ...
    @overload
    def __getitem__(self, index: slice) -> list[bytes]: ...
    def __getitem__(self, index: int | slice) -> bytes | list[bytes]:
        if isinstance(index, slice):
            return [self[row] for row in range(len(self))[index]]
        row = range(len(self))[index]
        return bytes(self._text[self._ends[row] : self._ends[row + 1]])


def find_duplicates(hashes: NDArray[np.uint64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the rows whose name occurred before, and the first row of each such name.

    Names are compared by their 64-bit hashes. For a million distinct names, the probability of a
    collision is 1 in 37 million.

    >>> rows, firsts = find_duplicates(np.array([7, 8, 7, 9, 8, 7], np.uint64))
    >>> rows.tolist(), firsts.tolist()
    ([2, 4, 5], [0, 1, 0])
    """
    _, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
    firsts = first[inverse]
    rows = np.flatnonzero(firsts != np.arange(len(hashes)))
    return rows, firsts[rows]


def hash_names(names: Iterable[bytes]) -> NDArray[np.uint64]:
    """Return the 64-bit hash of every name."""
    return np.fromiter((xxhash.xxh3_64_intdigest(name) for name in names), np.uint64)
