"""Packed names: each is returned, and repeated ones are found."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from fastvgg.datasets.index import PackedNames, find_duplicates, hash_names

UNUSUAL_NAMES = [
    b"",
    b"a",
    b"",
    b"caf\xe9.jpg",
    b"a\nb",
    b'"',
    b"\0",
    b"\xff" * 300,
    "é/😀".encode(),
    b"",
]


@given(st.lists(st.binary(max_size=20)))
def test_every_name_is_returned(expected):
    names = PackedNames(expected)
    assert len(names) == len(expected)
    assert [*names] == expected
    assert [names[row] for row in range(len(expected))] == expected
    assert [names[row - len(expected)] for row in range(len(expected))] == expected


def test_names_are_appended_one_by_one():
    names = PackedNames()
    assert len(names) == 0
    for row, name in enumerate(UNUSUAL_NAMES):
        names.append(name)
        assert len(names) == row + 1
        assert names[-1] == name
    assert [*names] == UNUSUAL_NAMES
    assert b"\0" in names
    assert b"b" not in names
    assert names.index(b"a") == 1
    assert names.count(b"") == 3


def test_slices_return_lists_of_names():
    names = PackedNames(UNUSUAL_NAMES)
    for start in (None, 0, 1, -3, 7, 100, -100):
        for stop in (None, 0, 5, -1, 100, -100):
            for step in (None, 1, 3, -1, -4):
                assert names[start:stop:step] == UNUSUAL_NAMES[start:stop:step]


@pytest.mark.parametrize("row", [10, -11, 10**9])
def test_out_of_range_index_raises(row):
    with pytest.raises(IndexError):
        PackedNames(UNUSUAL_NAMES)[row]
    with pytest.raises(IndexError):
        PackedNames()[0]


def test_returned_name_is_a_copy():
    names = PackedNames([b"first"])
    first = names[0]
    for number in range(1000):
        names.append(b"%d" % number)
    assert type(first) is bytes
    assert first == names[0] == b"first"


def test_name_takes_at_most_13_bytes_of_overhead():
    generated = (b"class %03d/%06d.jpg" % (row % 999, row) for row in range(20_000))
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        names = PackedNames(generated)
        used = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert used < 20_000 * (20 + 13)
    assert names[19_999] == b"class 019/019999.jpg"


def duplicates_of(names):
    rows, firsts = find_duplicates(hash_names(names))
    return [*zip(rows.tolist(), firsts.tolist(), strict=True)]


@given(st.lists(st.sampled_from([b"a", b"b", b"c", b"", b"aa", b"d", b"e", b"f"]), max_size=8))
def test_duplicate_names_are_found_with_their_first_rows(names):
    first_rows = [names.index(name) for name in names]
    expected = [(row, first) for row, first in enumerate(first_rows) if first != row]
    assert duplicates_of(names) == expected


def test_single_duplicate_among_many_names_is_found():
    names = [b"%d" % row for row in range(5000)]
    assert duplicates_of(names) == []
    for first, second in ((0, 4999), (7, 8), (4998, 4999)):
        changed = [*names]
        changed[second] = changed[first]
        assert duplicates_of(changed) == [(second, first)]


def test_hashes_are_in_name_order():
    expected = [xxhash.xxh3_64_intdigest(name) for name in UNUSUAL_NAMES]
    actual = hash_names(iter(UNUSUAL_NAMES))
    assert actual.dtype == np.uint64
    assert actual.tolist() == expected
    assert hash_names([]).shape == (0,)
