"""The index: every name comes back, and one that does not fit its dataset is refused."""

from __future__ import annotations

import csv

import pytest
from datasets_on_disk import failing_in_ascii, must_say, names_in, npy_bytes, pixels
from hypothesis import given
from hypothesis import strategies as st

from fastvgg.datasets.index import Record, index_path, index_text, read_index
from fastvgg.datasets.npy import NpySource
from fastvgg.errors import SourceError

HEADER = "row,path,label,width,height,status,reason"


def write_index(dataset, records):
    text = "".join(index_text(records))
    index_path(dataset).write_bytes(text.encode("utf-8", "surrogateescape"))


def write_lines(dataset, *lines):
    index_path(dataset).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


@pytest.fixture
def dataset(tmp_path):
    return tmp_path / "train.npy"


def test_the_index_lies_beside_the_dataset(dataset):
    assert index_path(dataset) == dataset.with_name("train.npy.index.csv")


def test_a_dataset_without_an_index_has_no_records(dataset):
    assert read_index(dataset, 5) == []


NAMES = [
    *("a.jpg", "cat/a.jpg", "a,b.jpg", 'a"b".jpg', "'a'.jpg", "a\nb.jpg", "a\r\nb.jpg", "a\rb.jpg"),
    *(" a .jpg", "é/\U0001f600.jpg", "caf\udce9.jpg", ";.jpg", "a\\b.jpg", "...jpg", "-1.jpg"),
    *('"', '""', ",", "=1+1.jpg", "\ufeff.jpg", "a\u2028b.jpg", "a\x1cb.jpg", "a\x00b"[:1]),
]


@failing_in_ascii()
def test_every_name_and_reason_comes_back_as_it_was(dataset):
    expected = [
        Record(name, name.partition("/")[0], row, 7, name if row % 2 else "")
        for row, name in enumerate(NAMES)
    ]
    write_index(dataset, expected)
    actual = read_index(dataset, len(expected))
    assert actual == expected
    assert [record.failed for record in actual] == [row % 2 == 1 for row in range(len(NAMES))]


names = st.text(
    st.characters(codec="utf-8", exclude_characters="\0/")
    | st.sampled_from([chr(0xDC80 + byte) for byte in range(128)]),
    min_size=1,
).filter(lambda name: name not in (".", ".."))


@failing_in_ascii()
@given(st.lists(st.tuples(st.lists(names, min_size=1, max_size=3), st.booleans()), max_size=7))
def test_any_path_that_a_file_system_can_hold_comes_back(tmp_path_factory, entries):
    dataset = tmp_path_factory.getbasetemp() / "any.npy"
    expected = [Record("/".join(parts), parts[0], 9, 7, "torn" * bad) for parts, bad in entries]
    write_index(dataset, expected)
    assert read_index(dataset, len(expected)) == expected


def test_another_program_reads_the_index_as_csv(dataset):
    records = [Record('a,"b"\n.jpg', "", 9, 7, ""), Record("cat/c.jpg", "cat", 0, 0, "it is torn")]
    write_index(dataset, records)
    with index_path(dataset).open(newline="", encoding="utf-8") as file:
        actual = list(csv.DictReader(file))
    assert [row["path"] for row in actual] == ['a,"b"\n.jpg', "cat/c.jpg"]
    assert [row["status"] for row in actual] == ["ok", "failed"]
    assert [row["row"] for row in actual] == ["0", "1"]
    assert actual[1]["reason"] == "it is torn"
    assert list(actual[0]) == HEADER.split(",")


GOOD = ["0,a.jpg,,9,7,ok,", "1,b.jpg,,9,7,failed,torn", "2,c.jpg,,9,7,ok,"]
REFUSED = {
    "too few": ([HEADER, *GOOD[:2]], ["lists 2 images", "has 3"]),
    "too many": ([HEADER, *GOOD, "3,d.jpg,,9,7,ok,"], ["lists 4 images", "has 3"]),
    "nothing": ([], ["lists 0 images", "has 3"]),
    "a header alone": ([HEADER], ["lists 0 images", "has 3"]),
    "no header": (GOOD, ["line 1"]),
    "another header": (["row,path", *GOOD], ["line 1"]),
    "rows in another order": ([HEADER, GOOD[1], GOOD[0], GOOD[2]], ["line 2", "row 0", "b.jpg"]),
    "a row twice": ([HEADER, GOOD[0], GOOD[0], GOOD[2]], ["line 3", "row 1"]),
    "a row left out": ([HEADER, GOOD[0], GOOD[2]], ["line 3", "row 1", "c.jpg"]),
    "a row that is no number": ([HEADER, "x,a.jpg,,9,7,ok,", *GOOD[1:]], ["line 2", "row 0"]),
    "a negative row": ([HEADER, "-0,a.jpg,,9,7,ok,", *GOOD[1:]], ["line 2", "row 0"]),
    "a width that is no number": ([HEADER, "0,a.jpg,,w,7,ok,", *GOOD[1:]], ["line 2", "'w'"]),
    "a negative height": ([HEADER, "0,a.jpg,,9,-7,ok,", *GOOD[1:]], ["line 2", "'-7'"]),
    "a width of 5000 digits": ([HEADER, f"0,a.jpg,,{'9' * 5000},7,ok,", *GOOD[1:]], ["line 2"]),
    "too few columns": ([HEADER, "0,a.jpg,,9,7,ok", *GOOD[1:]], ["line 2"]),
    "too many columns": ([HEADER, "0,a.jpg,,9,7,ok,,", *GOOD[1:]], ["line 2"]),
    "an empty line": ([HEADER, "", *GOOD], ["line 2"]),
    "another status": ([HEADER, "0,a.jpg,,9,7,fine,", *GOOD[1:]], ["line 2", "fine"]),
    "ok with a reason": ([HEADER, "0,a.jpg,,9,7,ok,torn", *GOOD[1:]], ["line 2", "torn"]),
    "failed without a reason": ([HEADER, "0,a.jpg,,9,7,failed,", *GOOD[1:]], ["line 2", "failed"]),
    "an absolute path": ([HEADER, "0,/etc/a.jpg,,9,7,ok,", *GOOD[1:]], ["/etc/a.jpg", "outside"]),
    "two slashes": ([HEADER, "0,//etc/a.jpg,,9,7,ok,", *GOOD[1:]], ["etc/a.jpg", "outside"]),
    "a path upwards": ([HEADER, "0,../a.jpg,,9,7,ok,", *GOOD[1:]], ["../a.jpg", "outside"]),
    "a path down and up": ([HEADER, "0,x/../../a.jpg,,9,7,ok,", *GOOD[1:]], ["..", "outside"]),
    "a path that ends upwards": ([HEADER, "0,x/..,,9,7,ok,", *GOOD[1:]], ["x/..", "outside"]),
    "no path": ([HEADER, "0,,,9,7,ok,", *GOOD[1:]], ["''", "outside"]),
    "a dot": ([HEADER, "0,.,,9,7,ok,", *GOOD[1:]], ["'.'", "outside"]),
    "a zero byte": ([HEADER, "0,a\0.jpg,,9,7,ok,", *GOOD[1:]], ["outside"]),
    # A quote that came to stand in front of a name takes the rest of the file for one field.
    "a stray quote": ([HEADER, '0,"a.jpg,,9,7,ok,', *GOOD[1:]], ["line 2"]),
    "a stray quote before very much": (
        [HEADER, '0,"a.jpg,,9,7,ok,', *(f"{row},{'x' * 90},,9,7,ok," for row in range(2000))],
        [],
    ),
}


@pytest.mark.parametrize("wrong", REFUSED)
def test_an_index_that_does_not_fit_is_refused_and_left_as_it_is(dataset, wrong):
    lines, words = REFUSED[wrong]
    write_lines(dataset, *lines)
    before = index_path(dataset).read_bytes()
    with pytest.raises(SourceError) as caught:
        read_index(dataset, 3)
    must_say(caught.value, index_path(dataset), *words)
    assert index_path(dataset).read_bytes() == before


def test_the_index_that_the_refused_ones_were_made_from_is_read(dataset):
    write_lines(dataset, HEADER, *GOOD)
    assert [record.path for record in read_index(dataset, 3)] == ["a.jpg", "b.jpg", "c.jpg"]


def test_an_index_that_cannot_be_read_is_refused(dataset):
    index_path(dataset).mkdir()
    with pytest.raises(SourceError) as caught:
        read_index(dataset, 3)
    must_say(caught.value, index_path(dataset))


def test_an_array_brings_the_records_of_its_index(dataset):
    dataset.write_bytes(npy_bytes(pixels(5)))
    expected = [Record(f"{row}.jpg", "", 9, 7, "") for row in range(5)]
    write_index(dataset, expected)
    source = NpySource(dataset)
    assert source.records == expected
    assert source.read(1, 4).records == expected[1:4]
    source.close()


def test_an_array_with_an_index_of_another_is_refused(dataset):
    dataset.write_bytes(npy_bytes(pixels(5)))
    write_index(dataset, [Record("a.jpg", "", 9, 7, "")])
    with pytest.raises(SourceError) as caught:
        NpySource(dataset)
    must_say(caught.value, index_path(dataset), "lists 1 images", "has 5")
    assert names_in(dataset.parent) == ["train.npy", "train.npy.index.csv"]
