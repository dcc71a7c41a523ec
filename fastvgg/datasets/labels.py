"""Labels as numbers: those of an index, and those that the caller gives."""

from __future__ import annotations

import re
from array import array
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np

from fastvgg.errors import DtypeError, UsageError
from fastvgg.formatting import format_count
from fastvgg.interop import EXPORT_ERRORS, without_mask

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import ArrayLike, NDArray

    from fastvgg.datasets.base import ImageRecord

MAX_INT64: Final = 2**63 - 1
CLASS_NUMBER: Final = re.compile("[+-]?[0-9]{1,18}")
MAX_CLASS_NAMES: Final = 10**6


class IndexColumns(NamedTuple):
    """What training needs of an index, in a few bytes per image."""

    failed_rows: NDArray[np.int64]
    """The rows of the images that could not be decoded, in ascending order."""
    labels: NDArray[Any] | None
    """The number of each row's label; None if no image has a label."""
    class_names: list[str] | None
    """The name of each number that is not negative; None if there are no labels, or more than
    `MAX_CLASS_NAMES` numbers."""


def is_class_number(label: str) -> bool:
    """Whether a label is a whole number, as WebDataset reads .cls entries.

    >>> is_class_number("10"), is_class_number("007"), is_class_number("-1"), is_class_number("7a")
    (True, True, True, False)
    """
    return CLASS_NUMBER.fullmatch(label) is not None


def read_columns(
    records: Iterable[ImageRecord], *, has_class_numbers: bool = False
) -> IndexColumns:
    """Collect the failed rows and the labels of records.

    Folders are numbered in sorted order; images in no folder come last, so that they do not change
    the number of any folder. If the .cls entries of a WebDataset are numbers, they are the labels,
    and what other images have in their place is numbered after the largest.

    Parameters
    ----------
    records
        The records of all rows.
    has_class_numbers
        Whether .cls entries are known to be numbers. Otherwise, a label that is not the folder of
        its image came from one.

    Examples
    --------
    >>> from fastvgg.datasets.base import ImageRecord
    >>> names = [("dog/b.jpg", "dog"), ("cat/a.jpg", "cat"), ("x.jpg", "")]
    >>> records = [ImageRecord(path, label, 5, 7, False, "") for path, label in names]
    >>> columns = read_columns(records)
    >>> columns.labels.tolist(), columns.class_names
    ([1, 0, 2], ['cat', 'dog', ''])
    """
    failed_rows, codes, code_of = array("q"), array("i"), dict[str, int]()
    from_entries = set[str]()
    for row, record in enumerate(records):
        codes.append(code_of.setdefault(record.label, len(code_of)))
        folder = record.path.rpartition("/")[0]
        if record.label and not f"/{folder}".endswith(f"/{record.label}"):
            from_entries.add(record.label)
        if record.failed:
            failed_rows.append(row)
    failed = np.array(failed_rows, np.int64)
    if not any(code_of):
        return IndexColumns(failed, None, None)
    has_class_numbers |= bool(from_entries) and all(map(is_class_number, from_entries))
    numbers = {name: int(name) for name in code_of if has_class_numbers and is_class_number(name)}
    first = max([-1, *numbers.values()]) + 1
    others = sorted(code_of.keys() - numbers.keys(), key=lambda name: (not name, name))
    numbers |= {name: number for number, name in enumerate(others, first)}
    low, high = min(numbers.values()), max(numbers.values())
    dtype = np.min_scalar_type(high) if low >= 0 else np.dtype(np.int64)
    number_of_code = np.array([numbers[name] for name in code_of], dtype)
    labels = number_of_code[np.frombuffer(codes, np.intc)]
    if high >= MAX_CLASS_NAMES:
        return IndexColumns(failed, labels, None)
    return IndexColumns(failed, labels, [*map(str, range(first)), *others])


def check_labels(labels: ArrayLike, images: int) -> NDArray[Any]:
    """Return a copy of the caller's labels, after checking that there is one for every image.

    Raises
    ------
    UsageError
        If there is not, or they are masked, or neither integers nor floats.
    """
    try:
        values = np.array(without_mask(labels))
    except DtypeError:
        raise UsageError("labels are masked", "replace masked values: labels.filled(-1)") from None
    except EXPORT_ERRORS as error:
        raise UsageError(
            f"labels are not an array: {error}", "give one label for every row"
        ) from None
    if values.dtype.kind not in "biuf":
        raise UsageError(
            f"labels are of type {values.dtype}, expected integers or floats",
            "number them: classes, labels = numpy.unique(names, return_inverse=True)",
        )
    if values.ndim == 0 or len(values) != images:
        raise UsageError(
            f"labels have shape {values.shape}, but the dataset has {format_count(images, 'row')}",
            "give one label for every row, in the order of the rows, also for failed images",
        )
    if values.dtype.kind == "u" and values.max() > MAX_INT64:
        raise UsageError(
            f"a label is {values.max()}, more than {MAX_INT64}", "give labels of int64"
        )
    return values.astype(values.dtype.newbyteorder("="), copy=False)
