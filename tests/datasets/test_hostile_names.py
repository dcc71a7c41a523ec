"""Whatever names a folder or a tar contains: what is written about them can be read back."""

from __future__ import annotations

import csv
import os
import shutil
import tarfile
from contextlib import contextmanager

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import fastvgg
from fastvgg.datasets.base import ImageRecord
from fastvgg.datasets.folders import FolderImageListing
from fastvgg.datasets.image_names import kind_skipped_by_rule
from fastvgg.datasets.images import _storable
from fastvgg.datasets.index import INDEX_HEADER, format_records, index_path, read_index
from fastvgg.datasets.tar import TarListing
from fastvgg.errors import SourceError
from fastvgg.stream.journal import Commit
from fastvgg.stream.lines import decode_line
from fastvgg.stream.manifest import read_manifest
from tests.helpers.datasets_on_disk import ascii_failures, check_error, pixels
from tests.helpers.runs import run
from tests.helpers.tar_on_disk import (
    END_OF_ARCHIVE,
    header,
    member,
    pad_to_block,
    png,
    save_blocks,
    save_tar,
)


@contextmanager
def field_size_limit(limit):
    """Set the limit that the csv module has for the whole process, as another library may."""
    before = csv.field_size_limit(limit)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def check_round_trip(directory, records):
    """Check that records are read back from an index and from a line of a journal."""
    dataset = directory / "x.npy"
    text = INDEX_HEADER + format_records(records)
    index_path(dataset).write_bytes(text.encode("utf-8", "surrogateescape"))
    with field_size_limit(3):
        assert [*read_index(dataset, len(records))] == records
    commit = Commit(0, "0" * 16, "", records)
    fields = decode_line(commit.to_line())
    assert Commit.from_dict(fields) == commit


def records_of(listing):
    rows = range(len(listing))
    records = [
        ImageRecord(
            os.fsdecode(listing.name(row)), os.fsdecode(listing.label(row)), 5, 7, False, ""
        )
        for row in rows
    ]
    assert len({record.path for record in records}) == len(records)
    return records


COMPONENTS = st.binary(min_size=1, max_size=40) | st.sampled_from(
    [
        b"..",
        b".",
        b"a\nb",
        b'"',
        b'",\r\n"',
        b"\r",
        b"\xff\xfe",
        b"\x1b[2J",
        b"a,b",
        b"\xed\xa0\x80",
    ]
)
PATHS = st.lists(COMPONENTS, min_size=1, max_size=4).map(b"/".join)


def on_disk(path):
    """Whether a path can be created below a folder."""
    parts = path.split(b"/")
    return b"\0" not in path and not {b"", b".", b".."} & {*parts}


@given(st.lists(PATHS.filter(on_disk), max_size=5))
@example([b'a\n"b,\r', b"\xff/\xfe"])
@ascii_failures()
def test_names_in_a_folder_are_read_back(tmp_path_factory, paths):
    directory = tmp_path_factory.mktemp("names")
    folder = os.fsencode(directory / "photos")
    created = set()
    for path in paths:
        full = folder + b"/" + path + b".jpg"
        try:
            os.makedirs(os.path.dirname(full), exist_ok=True)  # noqa: PTH103, PTH120
            with open(full, "x"):  # noqa: PTH123
                created.add(path + b".jpg")
        except (FileExistsError, NotADirectoryError):
            continue
    os.makedirs(folder, exist_ok=True)  # noqa: PTH103
    records = records_of(FolderImageListing(directory / "photos"))
    check_round_trip(directory, records)
    visible = {path for path in created if not any(map(kind_skipped_by_rule, path.split(b"/")))}
    assert {os.fsencode(record.path) for record in records} == visible
    shutil.rmtree(directory)


def pax_entry(path, content):
    """Return the blocks of an entry whose path is any bytes."""
    text = b" path=" + path + b"\n"
    length = len(text) + 1
    while length != len(text) + len(str(length)):
        length = len(text) + len(str(length))
    record = str(length).encode() + text
    return [
        header("x", len(record), tarfile.XHDTYPE),
        pad_to_block(record),
        header("short.jpg", len(content)),
        pad_to_block(content),
    ]


@given(st.lists(PATHS, max_size=5))
@example([b"../a", b"/etc/a", b"a\0b", b"d/" * 70_000 + b"b", b"\n", b"./a", b"a", b""])
@ascii_failures()
def test_names_in_a_tar_are_read_back(tmp_path_factory, paths):
    directory = tmp_path_factory.mktemp("names")
    blocks = [block for path in paths for block in pax_entry(path + b".jpg", b"j")]
    listing = TarListing(save_blocks(directory / "a.tar", *blocks, END_OF_ARCHIVE))
    records = records_of(listing)
    check_round_trip(directory, records)
    assert len(records) + listing.skipped.counts.total() == len(paths)
    shutil.rmtree(directory)


@given(st.text(), st.binary(max_size=64))
@example("\ud800 \0\r\n", b"\r")
@example("x" * 10**6, b"")
@ascii_failures()
def test_any_reason_and_label_is_read_back(tmp_path_factory, reason, label):
    directory = tmp_path_factory.getbasetemp()
    record = ImageRecord("a.jpg", os.fsdecode(label), 5, 7, False, _storable(reason))
    check_round_trip(directory, [record])


def test_tar_with_a_huge_name_makes_a_dataset_that_can_be_read(tmp_path):
    batch = pixels(2)
    huge = "/".join(["d" * 200] * 700) + "/b.png"
    members = [
        member("cat/a.png", png(batch[0])),
        member(huge, png(batch[1])),
        member("../c.png", png(batch[1])),
        member("cat/d.png", png(batch[1])),
    ]
    path = save_tar(tmp_path / "a.tar", members, "pax")
    target = tmp_path / "x.npy"
    report = run(fastvgg.plan(path, target, direction="pack"))
    assert [failure.row for failure in report.failures] == [1, 2]
    assert [
        "longer than 4095 bytes" in report.failures[0].reason,
        "'..'" in report.failures[1].reason,
    ]
    assert read_manifest(target).counts == {"images": 4, "failed": 2}
    assert fastvgg.verify(target, full=True).recomputed_images == 4
    retried = run(fastvgg.plan(path, target, direction="pack", retry_failed=True))
    assert retried.counts["failed"] == 2
    assert np.array_equal(np.load(target)[[0, 3]], batch)
    assert [record.label for record in read_index(target, 4)] == ["cat", "", "", "cat"]


@pytest.mark.parametrize(
    "content", [b'0,"a.jpg' + b"\n" * 2**21, b"x" * 2**21, b'0,a"b.jpg,,9,7,ok,\n']
)
def test_record_of_an_index_without_an_end_is_rejected(tmp_path, content):
    dataset = tmp_path / "x.npy"
    index_path(dataset).write_bytes(INDEX_HEADER.encode() + content)
    with pytest.raises(SourceError) as caught:
        read_index(dataset, 1)
    check_error(caught.value, index_path(dataset), "line 2")


def test_index_that_a_spreadsheet_saved_is_read(tmp_path):
    dataset = tmp_path / "x.npy"
    rows = ['"0","a ""1"".jpg","","9","7","ok",""', "1,b.jpg,,9,7,ok,"]
    index_path(dataset).write_bytes("\r\n".join([INDEX_HEADER.strip(), *rows]).encode())
    assert [record.path for record in read_index(dataset, 2)] == ['a "1".jpg', "b.jpg"]
    assert read_index(dataset, 2)[1].path == "b.jpg"
