"""The index: every name round-trips, and an index that does not match its dataset is rejected."""

from __future__ import annotations

import csv
import itertools
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastvgg.datasets import index as index_module
from fastvgg.datasets.base import ImageRecord
from fastvgg.datasets.index import (
    INDEX_HEADER,
    format_records,
    index_path,
    read_index,
)
from fastvgg.datasets.npy import NpySource
from fastvgg.errors import SourceError, StoppedError
from tests.helpers.datasets_on_disk import ascii_failures, check_error, names_in, npy_bytes, pixels

HEADER = "row,path,label,width,height,status,reason"


def write_index(dataset, records):
    text = INDEX_HEADER + format_records(records)
    index_path(dataset).write_bytes(text.encode("utf-8", "surrogateescape"))


def record(path, label="", reason="", *, failed=False, width=9, height=7):
    return ImageRecord(path, label, width, height, failed, reason)


def write_lines(dataset, *lines):
    index_path(dataset).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


@pytest.fixture
def dataset(tmp_path):
    return tmp_path / "train.npy"


def test_index_path_is_a_sidecar_of_the_dataset(dataset):
    assert index_path(dataset) == dataset.with_name("train.npy.index.csv")


def test_dataset_without_index_has_no_records(dataset):
    assert len(read_index(dataset, 5)) == 0


NAMES = [
    *("a.jpg", "cat/a.jpg", "a,b.jpg", 'a"b".jpg', "'a'.jpg", "a\nb.jpg", "a\r\nb.jpg", "a\rb.jpg"),
    *(" a .jpg", "é/\U0001f600.jpg", "caf\udce9.jpg", ";.jpg", "a\\b.jpg", "...jpg", "-1.jpg"),
    *('"', '""', ",", "=1+1.jpg", "\ufeff.jpg", "a\u2028b.jpg", "a\x1cb.jpg", "a\x00b"[:1]),
]


@ascii_failures()
def test_names_and_reasons_round_trip(dataset):
    expected = [
        ImageRecord(
            name, name.partition("/")[0], row, 7, row % 2 == 1, name if row % 3 else "?" * row
        )
        for row, name in enumerate(NAMES, 1)
    ]
    write_index(dataset, expected)
    actual = read_index(dataset, len(expected))
    assert [*actual] == expected
    assert [actual[row] for row in range(len(NAMES))] == expected
    assert actual[:] == expected
    parts = INDEX_HEADER + format_records(expected[:7]) + format_records(expected[7:], 7)
    assert index_path(dataset).read_bytes() == parts.encode("utf-8", "surrogateescape")


names = st.text(
    st.characters(codec="utf-8", exclude_characters="\0/")
    | st.sampled_from([chr(0xDC80 + byte) for byte in range(128)]),
    min_size=1,
).filter(lambda name: name not in (".", ".."))


@ascii_failures()
@given(st.lists(st.tuples(st.lists(names, min_size=1, max_size=3), st.booleans()), max_size=7))
def test_any_valid_path_round_trips(tmp_path_factory, entries):
    dataset = tmp_path_factory.getbasetemp() / "any.npy"
    expected = [
        record("/".join(parts), parts[0], "torn" * bad, failed=bad) for parts, bad in entries
    ]
    write_index(dataset, expected)
    actual = read_index(dataset, len(expected))
    assert [*actual] == actual[:] == expected
    assert [actual[row] for row in range(-len(expected), 0)] == expected


def make_index(dataset, rows=11):
    """Write an index with line feeds in some names; return it and the expected records."""
    expected = [
        record(f"{row}\n,'\"\r\n.jpg" if row % 3 else f"{row}.jpg", reason="warned" * (row % 2))
        for row in range(rows)
    ]
    write_index(dataset, expected)
    return read_index(dataset, len(expected)), expected


def test_slices_return_lists_of_records(dataset):
    index, expected = make_index(dataset)
    bounds = (None, 0, 1, 5, 10, 11, 12, -1, -4, -11, -12)
    for start, stop, step in itertools.product(bounds, bounds, (None, 1, 2, 5, -1, -3)):
        actual = index[start:stop:step]
        assert type(actual) is list
        assert actual == expected[start:stop:step], (start, stop, step)


def test_index_supports_the_sequence_protocol(dataset):
    index, expected = make_index(dataset)
    assert len(index) == 11
    assert [*index] == [*index] == expected
    assert [*reversed(index)] == expected[::-1]
    two = iter(index)
    assert [next(two), next(two)] == expected[:2]
    assert index[3] == expected[3]
    assert next(two) == expected[2]
    assert index.index(expected[7]) == 7
    assert expected[9] in index


@pytest.mark.parametrize("row", [11, -12, 10**9])
def test_out_of_range_row_raises_index_error(dataset, row):
    index, _ = make_index(dataset)
    with pytest.raises(IndexError):
        index[row]


def test_large_index_uses_a_few_bytes_per_row(dataset):
    expected = [record(f"class {row % 77}/{row:07d}.jpg", reason="w" * 40) for row in range(20_000)]
    write_index(dataset, expected)
    # Only allocations of the index module: pathlib interns path components.
    own_traces = tracemalloc.Filter(True, index_module.__file__)
    tracemalloc.start()
    try:
        index = read_index(dataset, 20_000)
        read = index[19_999], index[10_000:10_003], sum(found.width for found in index)
        snapshot = tracemalloc.take_snapshot().filter_traces([own_traces])
    finally:
        tracemalloc.stop()
    assert sum(trace.size for trace in snapshot.traces) < 20_000 * 20
    assert read == (expected[-1], expected[10_000:10_003], 20_000 * 9)


def test_index_damaged_after_opening_raises_on_read(dataset):
    index, expected = make_index(dataset)
    text = index_path(dataset).read_bytes()
    index_path(dataset).write_bytes(text.replace(b"\n9.jpg", b"\n9,jpg").replace(b"\n9,", b"\nx,"))
    assert index[0] == expected[0]
    for read in (lambda: index[9], lambda: index[8:10], lambda: [*index]):
        with pytest.raises(SourceError) as caught:
            read()
        check_error(caught.value, index_path(dataset), "row 9")


def test_successful_image_can_have_a_reason(dataset):
    expected = [
        record("a.jpg", reason="Corrupt JPEG data"),
        record("b.jpg", reason="?", failed=True),
    ]
    write_index(dataset, expected)
    lines = index_path(dataset).read_text().splitlines()
    assert lines[1:] == ["0,a.jpg,,9,7,ok,Corrupt JPEG data", "1,b.jpg,,9,7,failed,?"]
    assert read_index(dataset, 2)[:] == expected


def test_index_is_readable_by_the_csv_module(dataset):
    records = [
        record('a,"b"\n.jpg'),
        record("cat/c.jpg", "cat", "it is torn", failed=True, width=0, height=0),
    ]
    write_index(dataset, records)
    with index_path(dataset).open(newline="", encoding="utf-8") as file:
        actual = list(csv.DictReader(file))
    assert [row["path"] for row in actual] == ['a,"b"\n.jpg', "cat/c.jpg"]
    assert [row["status"] for row in actual] == ["ok", "failed"]
    assert [row["row"] for row in actual] == ["0", "1"]
    assert actual[1]["reason"] == "it is torn"
    assert list(actual[0]) == HEADER.split(",")


GOOD = ["0,a.jpg,,9,7,ok,", "1,b.jpg,,9,7,failed,torn", "2,c.jpg,,9,7,ok,"]
INVALID = {
    "too few": ([HEADER, *GOOD[:2]], ["lists 2 images", "has 3"]),
    "too many": ([HEADER, *GOOD, "3,d.jpg,,9,7,ok,"], ["lists more than the 3 images"]),
    "an empty file": ([], ["lists 0 images", "has 3"]),
    "only a header": ([HEADER], ["lists 0 images", "has 3"]),
    "no header": (GOOD, ["line 1"]),
    "another header": (["row,path", *GOOD], ["line 1"]),
    "rows in another order": ([HEADER, GOOD[1], GOOD[0], GOOD[2]], ["line 2", "row 0", "b.jpg"]),
    "a duplicate row": ([HEADER, GOOD[0], GOOD[0], GOOD[2]], ["line 3", "row 1"]),
    "a missing row": ([HEADER, GOOD[0], GOOD[2]], ["line 3", "row 1", "c.jpg"]),
    "a row that is not a number": ([HEADER, "x,a.jpg,,9,7,ok,", *GOOD[1:]], ["line 2", "row 0"]),
    "a negative row": ([HEADER, "-0,a.jpg,,9,7,ok,", *GOOD[1:]], ["line 2", "row 0"]),
    "a width that is not a number": ([HEADER, "0,a.jpg,,w,7,ok,", *GOOD[1:]], ["line 2", "'w'"]),
    "a negative height": ([HEADER, "0,a.jpg,,9,-7,ok,", *GOOD[1:]], ["line 2", "'-7'"]),
    "a width of 5000 digits": ([HEADER, f"0,a.jpg,,{'9' * 5000},7,ok,", *GOOD[1:]], ["line 2"]),
    "too few columns": ([HEADER, "0,a.jpg,,9,7,ok", *GOOD[1:]], ["line 2"]),
    "too many columns": ([HEADER, "0,a.jpg,,9,7,ok,,", *GOOD[1:]], ["line 2"]),
    "an empty line": ([HEADER, "", *GOOD], ["line 2"]),
    "another status": ([HEADER, "0,a.jpg,,9,7,fine,", *GOOD[1:]], ["line 2", "fine"]),
    "failed without a reason": ([HEADER, "0,a.jpg,,9,7,failed,", *GOOD[1:]], ["line 2", "failed"]),
    "an absolute path": ([HEADER, "0,/etc/a.jpg,,9,7,ok,", *GOOD[1:]], ["/etc/a.jpg", "outside"]),
    "two slashes": ([HEADER, "0,//etc/a.jpg,,9,7,ok,", *GOOD[1:]], ["etc/a.jpg", "outside"]),
    "two slashes within": (
        [HEADER, "0,x//a.jpg,,9,7,ok,", *GOOD[1:]],
        ["x//a.jpg", "not normalized"],
    ),
    "a dot within": ([HEADER, "0,x/./a.jpg,,9,7,ok,", *GOOD[1:]], ["x/./a.jpg", "not normalized"]),
    "a path upwards": ([HEADER, "0,../a.jpg,,9,7,ok,", *GOOD[1:]], ["../a.jpg", "outside"]),
    "a path down and up": ([HEADER, "0,x/../../a.jpg,,9,7,ok,", *GOOD[1:]], ["..", "outside"]),
    "a path that ends upwards": ([HEADER, "0,x/..,,9,7,ok,", *GOOD[1:]], ["x/..", "outside"]),
    "no path": ([HEADER, "0,,,9,7,ok,", *GOOD[1:]], ["''", "outside"]),
    "a dot": ([HEADER, "0,.,,9,7,ok,", *GOOD[1:]], ["'.'", "outside"]),
    "a zero byte": ([HEADER, "0,a\0.jpg,,9,7,ok,", *GOOD[1:]], ["outside"]),
    # A stray quote before a name turns the rest of the file into one field.
    "a stray quote": ([HEADER, '0,"a.jpg,,9,7,ok,', *GOOD[1:]], ["line 2"]),
    "a stray quote before a long file": (
        [HEADER, '0,"a.jpg,,9,7,ok,', *(f"{row},{'x' * 90},,9,7,ok," for row in range(2000))],
        [],
    ),
}


@pytest.mark.parametrize("wrong", INVALID)
def test_invalid_index_is_rejected_and_not_modified(dataset, wrong):
    lines, words = INVALID[wrong]
    write_lines(dataset, *lines)
    before = index_path(dataset).read_bytes()
    with pytest.raises(SourceError) as caught:
        read_index(dataset, 3)
    check_error(caught.value, index_path(dataset), *words)
    assert index_path(dataset).read_bytes() == before


def test_unmodified_index_is_accepted(dataset):
    write_lines(dataset, HEADER, *GOOD)
    expected = [record("a.jpg"), record("b.jpg", reason="torn", failed=True), record("c.jpg")]
    assert [*read_index(dataset, 3)] == expected


def test_unreadable_index_is_rejected(dataset):
    index_path(dataset).mkdir()
    with pytest.raises(SourceError) as caught:
        read_index(dataset, 3)
    check_error(caught.value, index_path(dataset))


def test_npy_source_returns_the_records_of_its_index(dataset):
    dataset.write_bytes(npy_bytes(pixels(5)))
    expected = [record(f"{row}.jpg") for row in range(5)]
    write_index(dataset, expected)
    source = NpySource(dataset)
    assert [*source.records] == expected
    assert source.read(1, 4).records == expected[1:4]
    source.close()


def test_npy_source_rejects_an_index_of_another_length(dataset):
    dataset.write_bytes(npy_bytes(pixels(5)))
    write_index(dataset, [record("a.jpg")])
    with pytest.raises(SourceError) as caught:
        NpySource(dataset)
    check_error(caught.value, index_path(dataset), "lists 1 images", "has 5")
    assert names_in(dataset.parent) == ["train.npy", "train.npy.index.csv"]


def test_index_that_is_shortened_after_it_was_read_is_an_error(tmp_path):
    path = index_path(tmp_path / "train.npy")
    path.write_text("\n".join([HEADER, *GOOD]) + "\n")
    index = read_index(tmp_path / "train.npy", 3)
    path.write_text(HEADER + "\n")
    for rows in (2, slice(0, 3)):
        with pytest.raises(StoppedError, match="changed after the run was planned"):
            index[rows]
