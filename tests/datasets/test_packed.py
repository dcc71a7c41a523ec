"""Packed names: each is returned, and repeated ones are found."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from fastvgg.datasets.index import PackedNames, find_repeated, name_hashes

ODD = [b"", b"a", b"", b"caf\xe9.jpg", b"a\nb", b'"', b"\0", b"\xff" * 300, "é/😀".encode(), b""]


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
    for row, name in enumerate(ODD):
        names.append(name)
        assert len(names) == row + 1
        assert names[-1] == name
    assert [*names] == ODD
    assert b"\0" in names
    assert b"b" not in names
    assert names.index(b"a") == 1
    assert names.count(b"") == 3


def test_a_slice_is_a_list_of_names():
    names = PackedNames(ODD)
    for start in (None, 0, 1, -3, 7, 100, -100):
        for stop in (None, 0, 5, -1, 100, -100):
            for step in (None, 1, 3, -1, -4):
                assert names[start:stop:step] == ODD[start:stop:step]


@pytest.mark.parametrize("row", [10, -11, 10**9])
def test_an_index_out_of_range_raises(row):
    with pytest.raises(IndexError):
        PackedNames(ODD)[row]
    with pytest.raises(IndexError):
        PackedNames()[0]


def test_a_returned_name_is_a_copy():
    names = PackedNames([b"first"])
    kept = names[0]
    for number in range(1000):
        names.append(b"%d" % number)
    assert type(kept) is bytes
    assert kept == names[0] == b"first"


def test_a_name_takes_at_most_13_bytes_of_overhead():
    made = (b"class %03d/%06d.jpg" % (row % 999, row) for row in range(20_000))
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        names = PackedNames(made)
        used = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert used < 20_000 * (20 + 13)
    assert names[19_999] == b"class 019/019999.jpg"


def repeats_of(names):
    rows, firsts = find_repeated(name_hashes(names))
    return [*zip(rows.tolist(), firsts.tolist(), strict=True)]


@given(st.lists(st.sampled_from([b"a", b"b", b"c", b"", b"aa", b"d", b"e", b"f"]), max_size=8))
def test_repeated_names_are_found_with_their_first_rows(names):
    first_rows = [names.index(name) for name in names]
    expected = [(row, first) for row, first in enumerate(first_rows) if first != row]
    assert repeats_of(names) == expected


def test_one_repeated_name_of_many_is_found():
    names = [b"%d" % row for row in range(5000)]
    assert repeats_of(names) == []
    for first, second in ((0, 4999), (7, 8), (4998, 4999)):
        changed = [*names]
        changed[second] = changed[first]
        assert repeats_of(changed) == [(second, first)]


def test_hashes_are_in_the_order_of_the_names():
    expected = [xxhash.xxh3_64_intdigest(name) for name in ODD]
    actual = name_hashes(iter(ODD))
    assert actual.dtype == np.uint64
    assert actual.tolist() == expected
    assert name_hashes([]).shape == (0,)
