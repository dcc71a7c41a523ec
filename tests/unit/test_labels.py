"""Labels: the same numbers whatever else lies next to a class; and labels of the caller's own."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from fastvgg.datasets.base import ImageRecord
from fastvgg.datasets.labels import check_labels, read_columns
from fastvgg.errors import UsageError
from tests.helpers.batches import OnlyArray
from tests.helpers.datasets_on_disk import check_error


def record(path, label="", reason="", *, failed=False):
    return ImageRecord(path, label, 9, 7, failed, reason)


def test_labels_and_failed_rows_take_few_bytes_per_image():
    names, images = [f"c{number:03d}" for number in range(300)], 20_000
    records = [record("a.jpg", name) for name in reversed(names)]
    failed = record("b.jpg", names[0], "damaged", failed=True)
    rows = (failed if row % 1000 == 0 else records[row % 300] for row in range(images))
    tracemalloc.start()
    try:
        columns = read_columns(rows)
        held_bytes, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert columns.class_names == names
    assert columns.failed_rows.tolist() == [*range(0, images, 1000)]
    expected = [0 if row % 1000 == 0 else 299 - row % 300 for row in range(images)]
    assert columns.labels.tolist() == expected
    assert held_bytes < 2 * images + 50_000  # and the table of classes
    assert peak_bytes < 20 * images


@pytest.mark.parametrize(
    ("paths", "labels", "expected", "class_names"),
    [
        # As WebDataset decodes .cls entries.
        (["a.jpg", "b.jpg", "c.jpg"], ["10", "2", "10"], [10, 2, 10], [*map(str, range(11))]),
        (["a.jpg", "b.jpg", "c.jpg"], ["10", "x", "2"], [0, 2, 1], ["10", "2", "x"]),
        (["a.jpg", "b.jpg", "c.jpg"], ["4", "03", "3"], [4, 3, 3], [*map(str, range(5))]),
        (["a.jpg", "b.jpg", "c.jpg"], ["9999999", "2", "2"], [9999999, 2, 2], None),
        # Images without a class: a negative number, or no .cls.
        (["a.jpg", "b.jpg", "c.jpg"], ["3", "-1", "1"], [3, -1, 1], [*map(str, range(4))]),
        (["a.jpg", "b.jpg", "c.jpg"], ["-1", "-1", ""], [-1, -1, 0], [""]),
        (["a.jpg", "b.jpg", "c.jpg"], ["3", "", "1"], [3, 4, 1], [*map(str, range(4)), ""]),
        (["a.jpg", "x/b.jpg", "c.jpg"], ["3", "x", ""], [3, 4, 5], [*map(str, range(4)), "x", ""]),
        # As torchvision and Keras number folders.
        (["10/a.jpg", "2/b.jpg", "1/c.jpg"], ["10", "2", "1"], [1, 2, 0], ["1", "10", "2"]),
        (["part-0/10/a.jpg", "2/b.jpg"], ["10", "2"], [0, 1], ["10", "2"]),
        (["part-0/10/a.jpg", "part-1/b.jpg"], ["10", ""], [0, 1], ["10", ""]),
        # Images in no folder come last.
        (["a.jpg", "dog/b.jpg", "cat/c.jpg"], ["", "dog", "cat"], [2, 1, 0], ["cat", "dog", ""]),
    ],
)
def test_labels_are_numbered(paths, labels, expected, class_names):
    columns = read_columns(map(record, paths, labels))
    assert columns.labels.tolist() == expected
    assert columns.class_names == class_names


MASKED = np.ma.masked_array([5, 6, 7], mask=[False, True, False])


@pytest.mark.parametrize(
    "labels",
    [MASKED, np.ma.masked_array([5, 6, 7]), [MASKED] * 3, [5, np.ma.masked, 7], OnlyArray(MASKED)],
    ids=["masked", "without a mask", "masked rows", "a masked value", "converted"],
)
def test_masked_labels_are_rejected(labels):
    with pytest.raises(UsageError) as caught:
        check_labels(labels, 3)
    check_error(caught.value, "labels are masked", "filled(-1)")
    assert check_labels(MASKED.filled(-1), 3).tolist() == [5, -1, 7]


def test_labels_that_cannot_be_converted_are_rejected():
    with pytest.raises(UsageError, match="not an array: it requires a gradient"):
        check_labels(OnlyArray(None, RuntimeError("it requires a gradient")), 3)


@pytest.mark.parametrize("dtype", ["int64", "uint8", "float32", "bool"])
def test_labels_are_copied(dtype):
    labels = np.ones(3, dtype)
    for given in (labels, memoryview(labels), OnlyArray(labels)):
        assert not np.shares_memory(check_labels(given, 3), labels)
