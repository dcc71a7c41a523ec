"""Tar shards: the same members in the same order as tarfile; damage is reported with its offset."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import subprocess
import tarfile
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastvgg.datasets.folders import ImageFolder
from fastvgg.datasets.image_names import is_image_name
from fastvgg.datasets.tar import TarListing, TarShards, is_tar_name
from fastvgg.errors import SourceError, StoppedError
from fastvgg.imaging.decode import DecodeOptions, Decoder
from tests.helpers.datasets_on_disk import ascii_failures, check_error, pixels, save_images
from tests.helpers.faults import overwrite_while_read
from tests.helpers.tar_on_disk import (
    BLOCK_BYTES,
    END_OF_ARCHIVE,
    FORMATS,
    header,
    member,
    pad_to_block,
    png,
    save_blocks,
    save_tar,
    tar_bytes,
    with_checksum,
)

UNLIMITED_BYTES = 2**40
LONG_NAME = "x" * 60
# In a header's own name; in its prefix too; in a header before it; too long for any file system.
LONG_NAMES = {
    "ustar": [
        f"{'n' * 96}.jpg",
        f"{LONG_NAME}/{LONG_NAME}/a.jpg",
        f"{LONG_NAME}/{'y' * 90}/{'z' * 90}.jpg",
    ],
    "gnu": [
        f"{LONG_NAME}/{LONG_NAME}/a.jpg",
        "/".join([LONG_NAME] * 9) + "/a.jpg",
        f"{'w' * 3000}.png",
    ],
    "pax": [
        f"{LONG_NAME}/{LONG_NAME}/a.jpg",
        "/".join([LONG_NAME] * 9) + "/a.jpg",
        f"{'w' * 3000}.png",
    ],
}
ODD_NAMES = [
    "\u00e9.jpg",
    "cat/\U0001f600.png",
    os.fsdecode(b"\xff\xfe/\x80.jpg"),
    "a b\n.jpg",
    "#1.jpg",
    "a../b..jpg",
]


def names_of(listing):
    return [os.fsdecode(listing.name(row)) for row in range(len(listing))]


def labels_of(listing):
    return [os.fsdecode(listing.label(row)) for row in range(len(listing))]


def contents_of(listing):
    return [listing.read(row, UNLIMITED_BYTES) for row in range(len(listing))]


def reason(listing, row, max_bytes=UNLIMITED_BYTES):
    """Return the reason why a row cannot be read; empty if it can."""
    try:
        listing.read(row, max_bytes)
    except OSError as error:
        return str(error)
    return ""


def open_shards(path, size=None, **settings):
    decoding = DecodeOptions(size=size)
    return TarShards(path, decoding, Decoder(decoding, memory_bytes=2**28), **settings)


def rejection_of(path):
    with pytest.raises(SourceError) as caught:
        TarListing(path)
    return caught.value


FEW_MEMBERS = [
    ("cat/b.jpg", b"first"),
    ("cat/a.png", b"2" * 700),
    ("dog/c.JPEG", b""),
    ("d.gif", b"3"),
]


@pytest.mark.parametrize("kind", FORMATS)
def test_images_are_listed_in_member_order(tmp_path, kind):
    listing = TarListing(save_tar(tmp_path / "a.tar", FEW_MEMBERS, kind))
    assert names_of(listing) == [name for name, _ in FEW_MEMBERS]
    assert labels_of(listing) == ["cat", "cat", "dog", ""]
    assert contents_of(listing) == [content for _, content in FEW_MEMBERS]
    assert (len(listing), listing.skipped.counts.total()) == (4, 0)
    assert listing.stored_bytes == sum(len(content) for _, content in FEW_MEMBERS)


@pytest.mark.parametrize("kind", FORMATS)
@ascii_failures()
def test_names_can_be_long_or_arbitrary_bytes(tmp_path, kind):
    names = [*LONG_NAMES[kind], *ODD_NAMES]
    members = [(name, os.fsencode(name)[::-1]) for name in names]
    listing = TarListing(save_tar(tmp_path / "a.tar", members, kind))
    assert names_of(listing) == names
    assert contents_of(listing) == [content for _, content in members]


@pytest.mark.parametrize("kind", FORMATS)
def test_pixels_match_the_same_images_in_a_folder(tmp_path, kind):
    expected = pixels(6)
    folder = save_images(tmp_path / "photos", expected)
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    shards = [tmp_path / "s" / f"{number}.tar" for number in range(2)]
    for shard, part in zip(shards, (paths[:4], paths[4:]), strict=True):
        save_tar(shard, [(str(p.relative_to(folder)), p.read_bytes()) for p in part], kind)
    decoding = DecodeOptions()
    decoder = Decoder(decoding, memory_bytes=2**28)
    in_folder = ImageFolder(folder, decoding, decoder)
    in_tar = open_shards(tmp_path / "s" / "{0..1}.tar", threads=2)
    assert in_tar.kind == "tar"
    assert in_tar.header == in_folder.header
    assert in_tar.stored_bytes == in_folder.stored_bytes
    assert in_tar.notes == []
    actual, expected = in_tar.read(0, 6), in_folder.read(0, 6)
    assert actual.batch.tobytes() == expected.batch.tobytes()
    for row, (found, known) in enumerate(zip(actual.records, expected.records, strict=True)):
        assert found == known._replace(path=f"{row // 4}/{known.path}")


def test_given_listing_is_reused(tmp_path, monkeypatch):
    path = save_tar(tmp_path / "a.tar", [("a.png", png(pixels(1)[0]))])
    listing = TarListing(path)
    monkeypatch.setattr(TarListing, "__init__", None)
    assert open_shards(path, listing=listing).listing is listing


@pytest.mark.parametrize("size", [None, (5, 5)])
def test_tar_without_images_is_rejected(tmp_path, size):
    path = save_tar(tmp_path / "a.tar", [("README", b"hello"), ("a.txt", b"")])
    with pytest.raises(SourceError) as caught:
        open_shards(path, size)
    check_error(caught.value, path, "contains no images", "skipped")


def test_skipped_files_are_counted_without_directories(tmp_path):
    members = [
        member("photos/", kind=tarfile.DIRTYPE),
        member("photos/deep.jpg/", kind=tarfile.DIRTYPE),
        member("photos/of an incremental backup/", b"Ya.jpg\0", b"D"),
        member("v7 directory/", kind=tarfile.AREGTYPE),
        member("photos/a.png", png(pixels(1)[0])),
        member("photos/a.json", b"{}"),
        member("photos/.jpg", b"no stem"),
        member("photos/b.jpg.txt"),
        member("to.txt", kind=tarfile.SYMTYPE, linkname="photos/a.png"),
        member("pipe", kind=tarfile.FIFOTYPE),
        member("__MACOSX/photos/._a.png"),
        member("photos/@eaDir/a.png/x.png"),
        member("./.git/a.png"),
        member("../a.txt"),
    ]
    source = open_shards(save_tar(tmp_path / "a.tar", members))
    assert names_of(source.listing) == ["photos/a.png"]
    assert source.notes == [
        "skipped entries with an invalid path: 1",
        "skipped files without an image suffix: 2 (1 .json, 1 .txt)",
        "skipped hidden files and folders: 2",
        "skipped links: 1",
        "skipped macOS resource files: 1",
        "skipped sockets, pipes and devices: 1",
        "skipped thumbnails: 1",
    ]


LABEL_CASES = {
    "after": ([("0.jpg", b"i"), ("0.cls", b"7")], ["7"], 0),
    "before": ([("0.cls", b"7"), ("0.jpg", b"i")], ["7"], 0),
    "between": ([("0.jpg", b"i"), ("0.cls", b"7"), ("0.b.png", b"j")], ["7", "7"], 0),
    "missing": ([("0.jpg", b"i"), ("1.jpg", b"i"), ("1.cls", b"7")], ["", "7"], 0),
    "missing in a folder": ([("x/0.jpg", b"i"), ("x/1.jpg", b"i"), ("x/1.cls", b"7")], "x7", 0),
    "with spaces": ([("0.jpg", b"i"), ("0.cls", b" 7\r\n")], ["7"], 0),
    "with spaces only": ([("x/0.jpg", b"i"), ("x/0.cls", b" \n")], ["x"], 0),
    "in capitals": ([("0.JPG", b"i"), ("0.CLS", b"7")], ["7"], 0),
    "no text": ([("0.jpg", b"i"), ("0.cls", b"\xff")], ["\udcff"], 0),
    "of 64 bytes": ([("0.jpg", b"i"), ("0.cls", b"k" * 64)], ["k" * 64], 0),
    "of 65 bytes": ([("x/0.jpg", b"i"), ("x/0.cls", b"k" * 65)], ["x"], 1),
    "twice": ([("0.jpg", b"i"), ("0.cls", b"7"), ("0.cls", b"8")], ["7"], 1),
    "not adjacent": ([("0.jpg", b"i"), ("1.jpg", b"i"), ("0.cls", b"7")], ["", ""], 1),
    "without an image": ([("0.cls", b"7"), ("1.jpg", b"i")], [""], 1),
    "without an image at the end": ([("1.jpg", b"i"), ("0.cls", b"7")], [""], 1),
    "of another folder": ([("x/0.jpg", b"i"), ("y/0.cls", b"7")], ["x"], 1),
    "of a longer key": ([("0.jpg", b"i"), ("01.cls", b"7")], [""], 1),
    "with dots": ([("x.y/0.l.jpg", b"i"), ("x.y/0.r.jpg", b"i"), ("x.y/0.cls", b"7")], "77", 0),
    "in a deep folder": ([("x/y/0.jpg", b"i"), ("x/y/1.jpg", b"i")], ["x/y", "x/y"], 0),
    "hidden": ([("a.jpg", b"i"), (".a.cls", b"7")], [""], 1),
    "a field that is no label": ([("0.jpg", b"i"), ("0.x.cls", b"7")], [""], 1),
    "with other fields": ([("0.json", b"{}"), ("0.jpg", b"i"), ("0.cls", b"7")], ["7"], 1),
    "next to a folder": (
        [member("0.jpg", b"i"), member("d/", kind=tarfile.DIRTYPE), member("0.cls", b"7")],
        ["7"],
        0,
    ),
    "that is a link": (
        [member("0.jpg", b"i"), member("0.cls", kind=tarfile.SYMTYPE, linkname="x")],
        [""],
        1,
    ),
}


@pytest.mark.parametrize("case", LABEL_CASES)
@pytest.mark.parametrize("kind", FORMATS)
@ascii_failures()
def test_label_is_the_cls_member_or_the_folder(tmp_path, case, kind):
    members, labels, skipped = LABEL_CASES[case]
    listing = TarListing(save_tar(tmp_path / "a.tar", members, kind))
    assert labels_of(listing) == list(labels)
    assert listing.skipped.counts.total() == skipped


def test_cls_member_does_not_apply_to_another_shard(tmp_path):
    save_tar(tmp_path / "0.tar", [("x/a.jpg", b"i"), ("y/b.jpg", b"i")])
    save_tar(tmp_path / "1.tar", [("y/b.cls", b"7"), ("z/c.jpg", b"j")])
    listing = TarListing(tmp_path / "{0..1}.tar")
    assert labels_of(listing) == ["x", "y", "z"]
    assert listing.skipped.counts.total() == 1


def test_many_samples_have_the_right_labels(tmp_path):
    members = []
    for number in range(300):
        fields = [
            (f"{number:04d}.jpg", b"%d" % number * 500),
            (f"{number:04d}.cls", b"%d" % number),
        ]
        if number % 3 == 0:
            fields.reverse()
        members += fields[:1] if number % 7 == 1 else fields
    listing = TarListing(save_tar(tmp_path / "a.tar", members, "pax"))
    images = {name: content for name, content in members if name.endswith(".jpg")}
    labeled = {name[:4] for name, _ in members if name.endswith(".cls")}
    assert names_of(listing) == [*images]
    assert contents_of(listing) == [*images.values()]
    expected = [str(int(name[:4])) if name[:4] in labeled else "" for name in images]
    assert labels_of(listing) == expected
    assert len({*expected}) > 200


def test_names_of_multiple_shards_are_prefixed_and_labels_are_not(tmp_path):
    for number in (9, 10):
        save_tar(tmp_path / f"im-{number:03d}.tar", [("cat/a.jpg", b"%d" % number), ("b.jpg", b"")])
    listing = TarListing(tmp_path / "im-{009..010}.tar")
    expected = ["im-009/cat/a.jpg", "im-009/b.jpg", "im-010/cat/a.jpg", "im-010/b.jpg"]
    assert names_of(listing) == expected
    assert labels_of(listing) == ["cat", "", "cat", ""]
    assert contents_of(listing) == [b"9", b"", b"10", b""]
    assert names_of(TarListing(tmp_path / "im-{010..010}.tar")) == ["cat/a.jpg", "b.jpg"]


def test_shards_in_different_folders_are_prefixed_with_the_folder(tmp_path):
    for number in (1, 2):
        save_tar(tmp_path / f"part{number}" / "all.tar", [("a.jpg", b"%d" % number)])
    listing = TarListing(tmp_path / "part{1..2}" / "all.tar")
    assert names_of(listing) == ["part1/a.jpg", "part2/a.jpg"]
    assert contents_of(listing) == [b"1", b"2"]


NORMALIZED = {
    "./a.jpg": "a.jpg",
    "/a.jpg": "a.jpg",
    "//x//b.jpg": "x/b.jpg",
    "x/./c.jpg": "x/c.jpg",
    "/./.././d.jpg": None,
    "././x/e.jpg": "x/e.jpg",
    "x/f..g.jpg": "x/f..g.jpg",
    "../a.jpg": None,
    "x/../a.jpg": None,
    "/..": None,
    "x/..": None,
    "../labels.txt": None,
    "./": None,
    "/": None,
}

INVALID_NOTE = "skipped entries with an invalid path: 1"


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("name", NORMALIZED)
def test_name_that_escapes_the_dataset_is_a_failed_row(tmp_path, name, kind):
    members = [member("0.jpg", b"zero"), member(name, b"one", uname="x" * 9)]
    listing = TarListing(save_tar(tmp_path / "a.tar", members, kind))
    if NORMALIZED[name] is not None:
        assert names_of(listing) == ["0.jpg", NORMALIZED[name]]
        assert contents_of(listing) == [b"zero", b"one"]
    elif is_image_name(name.encode()):
        assert names_of(listing) == ["0.jpg", f"invalid-path-at-{2 * BLOCK_BYTES}.jpg"]
        assert "'..'" in reason(listing, 1)
    else:
        assert names_of(listing) == ["0.jpg"]
        assert listing.notes == [INVALID_NOTE]


def test_directory_above_the_dataset_has_no_effect(tmp_path):
    top = [member("./", kind=tarfile.DIRTYPE), member("./cat/a.jpg", b"a")]
    assert labels_of(TarListing(save_tar(tmp_path / "a.tar", top))) == ["cat"]
    above = save_tar(tmp_path / "b.tar", [member("a/../..", kind=tarfile.DIRTYPE), *top])
    assert names_of(TarListing(above)) == ["cat/a.jpg"]


def test_name_with_a_nul_is_a_failed_row(tmp_path):
    members = [
        member("a.jpg", b"a", pax_headers={"path": "x/a.jpg\0.PNG"}),
        member("b.jpg", b"b", pax_headers={"path": "b.jpg\0.txt"}),
    ]
    listing = TarListing(save_tar(tmp_path / "a.tar", members, "pax"))
    assert names_of(listing) == [f"invalid-path-at-{2 * BLOCK_BYTES}.png"]
    assert "null byte" in reason(listing, 0)
    assert listing.notes == [INVALID_NOTE]


@pytest.mark.parametrize(("length", "is_valid"), [(4095, True), (4096, False), (140_000, False)])
def test_name_that_no_file_can_have_is_a_failed_row(tmp_path, length, is_valid):
    name = "/".join(["d" * 99] * 1400)[: length - 6].rstrip("/")
    name += "d" * (length - 6 - len(name)) + "/b.png"
    path = save_tar(tmp_path / "a.tar", [(name, b"b"), ("cat/a.png", b"a")], "pax")
    listing = TarListing(path)
    if is_valid:
        assert names_of(listing) == [name, "cat/a.png"]
        assert contents_of(listing) == [b"b", b"a"]
    else:
        assert re.fullmatch("invalid-path-at-[0-9]+.png", names_of(listing)[0])
        assert "longer than 4095 bytes" in reason(listing, 0)
        assert labels_of(listing) == ["", "cat"]


NON_FILE_MEMBERS = [
    (member("a.jpg", kind=tarfile.SYMTYPE, linkname="good.jpg"), "a link"),
    (member("b.jpg", kind=tarfile.SYMTYPE, linkname="/etc/passwd"), "a link"),
    (member("c.jpg", kind=tarfile.LNKTYPE, linkname="good.jpg"), "a link"),
    (member("d.jpg", kind=tarfile.CHRTYPE), "a device"),
    (member("e.jpg", kind=tarfile.BLKTYPE), "a device"),
    (member("f.jpg", kind=tarfile.FIFOTYPE), "a pipe"),
    (member("g.jpg", b"what is it", kind=b"Z"), "unknown type"),
    (member("h.jpg", kind=tarfile.LNKTYPE, linkname="l" * 300), "a link"),
]


@pytest.mark.parametrize("kind", ["gnu", "pax"])
def test_link_or_device_is_a_failed_row(tmp_path, kind):
    members = [entry for entry, _ in NON_FILE_MEMBERS]
    # A link has no data regardless of its size field.
    members[0][0].size = 0
    good = png(pixels(1)[0])
    path = save_tar(tmp_path / "a.tar", [("good.png", good), *members, ("end.png", good)], kind)
    source = open_shards(path)
    batch, records = source.read(0, len(members) + 2)
    assert [record.path for record in records[1:-1]] == [info.name for info, _ in members]
    for image, record, (_, expected) in zip(
        batch[1:-1], records[1:-1], NON_FILE_MEMBERS, strict=True
    ):
        assert record.failed
        assert expected in record.reason
        assert not image.any()
    for row in (0, -1):
        assert not records[row].failed
        assert batch[row].tobytes() == pixels(1).tobytes()


def test_size_of_a_link_is_ignored(tmp_path):
    blocks = [
        header("a.jpg", 5000, tarfile.LNKTYPE),
        header("b.jpg", 1),
        pad_to_block(b"b"),
        END_OF_ARCHIVE,
    ]
    listing = TarListing(save_blocks(tmp_path / "a.tar", *blocks))
    assert names_of(listing) == ["a.jpg", "b.jpg"]
    assert listing.read(1, UNLIMITED_BYTES) == b"b"
    assert listing.stored_bytes == 1


def gnu_sparse(blocks):
    """Return a sparse file in GNU's old format, with a number of map blocks after the header."""
    data = b"sparse data"
    block = bytearray(header("s.jpg", len(data), tarfile.GNUTYPE_SPARSE))
    block[482] = blocks > 0
    block[483:495] = b"%011o\0" % 10**6
    maps = [bytes(504) + bytes([number < blocks - 1]) + bytes(7) for number in range(blocks)]
    return b"".join([with_checksum(bytes(block)), *maps, pad_to_block(data)])


SPARSE = {
    "no map": lambda: gnu_sparse(0),
    "map": lambda: gnu_sparse(1),
    "long map": lambda: gnu_sparse(30),
}


@pytest.mark.parametrize("case", SPARSE)
def test_gnu_sparse_member_is_rejected(tmp_path, case):
    blocks = [
        header("0.jpg", 1),
        pad_to_block(b"0"),
        SPARSE[case](),
        header("2.jpg", 1),
        pad_to_block(b"2"),
    ]
    path = save_blocks(tmp_path / "a.tar", *blocks, END_OF_ARCHIVE)
    check_error(rejection_of(path), path, "offset 1024", "a sparse file", "without sparse files")


PAX_SPARSE = {
    "1.0, no size": {"GNU.sparse.major": "1", "GNU.sparse.minor": "0"},
    "0.0": {"GNU.sparse.size": "1000000", "GNU.sparse.numblocks": "1"},
    "0.1": {"GNU.sparse.name": "x/s.jpg", "GNU.sparse.map": "0,1", "GNU.sparse.size": "1000000"},
    "1.0": {
        "GNU.sparse.major": "1",
        "GNU.sparse.minor": "0",
        "GNU.sparse.name": "x/s.jpg",
        "GNU.sparse.realsize": "1000000",
    },
}


@pytest.mark.parametrize("case", PAX_SPARSE)
def test_pax_sparse_member_is_rejected(tmp_path, case):
    info, data = member("y/s.jpg", pad_to_block(b"1\n0\n1\n") + b"s", pax_headers=PAX_SPARSE[case])
    path = save_tar(tmp_path / "a.tar", [("1.jpg", b"1"), (info, data)], "pax")
    check_error(rejection_of(path), path, "offset 1024", "a sparse file", "without sparse files")


@pytest.mark.skipif(shutil.which("tar") is None, reason="there is no tar command")
@pytest.mark.parametrize("kind", ["v7", "oldgnu", "gnu", "ustar", "posix"])
def test_archives_of_the_tar_command_are_read(tmp_path, kind):
    folder = tmp_path / "photos"
    save_images(folder, pixels(4))
    with (folder / "hole.jpg").open("wb") as file:
        file.truncate(10**6)
    os.link(folder / "a" / "00.png", folder / "z.png")
    (folder / "y.png").symlink_to("z.png")
    if kind in ("gnu", "posix", "oldgnu"):
        save_images(
            folder, pixels(1), [f"{LONG_NAME}/{LONG_NAME}/{LONG_NAME}/{LONG_NAME}/{LONG_NAME}.png"]
        )
    path = tmp_path / "a.tar"
    command = ["tar", f"--format={kind}", "--sort=name", "-cf", path, "-C", folder, "."]
    done = subprocess.run(command, capture_output=True, check=False)
    if done.returncode:
        pytest.skip(f"tar cannot: {done.stderr[:100]}")
    listing = TarListing(path)
    assert listing.skipped.counts.total() == 0
    assert listing.unterminated == []
    files = {str(p.relative_to(folder)): p for p in folder.rglob("*") if p.suffix}
    assert sorted(names_of(listing)) == sorted(files)
    for row, name in enumerate(names_of(listing)):
        if name in ("y.png", "z.png"):
            assert "a link" in reason(listing, row)
        else:
            assert listing.read(row, UNLIMITED_BYTES) == files[name].read_bytes()
    if kind in ("gnu", "posix", "oldgnu"):
        subprocess.run([*command, "-S"], check=True)
        check_error(rejection_of(path), path, "a sparse file")


def test_duplicate_name_is_a_failed_row_with_a_unique_name(tmp_path):
    members = [
        ("x/a.jpg", b"0"),
        ("x/b.jpg", b"1"),
        ("./x/a.jpg", b"2"),
        ("x/a#4.jpg", b"3"),
        ("x//a.jpg", b"4"),
        ("x/b.jpg", b"5"),
        ("a.jpg", b"6"),
        ("x/a#4.jpg", b"7"),
    ]
    listing = TarListing(save_tar(tmp_path / "a.tar", members))
    assert names_of(listing) == [
        *("x/a.jpg", "x/b.jpg", "x/a#2.jpg", "x/a#4.jpg"),
        *("x/a##4.jpg", "x/b#5.jpg", "a.jpg", "x/a#4#7.jpg"),
    ]
    assert [reason(listing, row) for row in range(8)] == [
        *("", "", "the name occurs twice, first in row 0", ""),
        "the name occurs twice, first in row 0",
        "the name occurs twice, first in row 1",
        "",
        "the name occurs twice, first in row 3",
    ]
    assert [listing.read(row, UNLIMITED_BYTES) for row in (0, 1, 3, 6)] == [b"0", b"1", b"3", b"6"]
    assert labels_of(listing) == ["x"] * 6 + ["", "x"]


def test_same_name_in_two_shards_is_two_images(tmp_path):
    for number in range(2):
        save_tar(tmp_path / f"{number}.tar", [("a.jpg", b"%d" % number)])
    listing = TarListing(tmp_path / "{0..1}.tar")
    assert contents_of(listing) == [b"0", b"1"]


def test_many_duplicate_names_are_listed_quickly(tmp_path):
    rows, unique_names = 20_000, 7
    blocks = [header(f"{number}.jpg") for number in range(unique_names)]
    listing = TarListing(save_blocks(tmp_path / "a.tar", *(blocks * rows)[:rows], END_OF_ARCHIVE))
    assert len({*names_of(listing)}) == rows
    for row in range(unique_names, rows):
        assert reason(listing, row) == f"the name occurs twice, first in row {row % unique_names}"


# Contents of a block and of other lengths, an empty one, and extension headers.
TRUNCATION_CASES = {
    "ustar": [
        ("cat/a.jpg", b"a" * 700),
        ("cat/b.jpg", b"b" * 512),
        ("c.jpg", b""),
        ("d.jpg", b"d"),
    ],
    "gnu": [
        ("0.jpg", b"a" * 700),
        (f"{LONG_NAME}/{LONG_NAME}/b.jpg", b"b" * 9),
        ("c.jpg", b"c" * 1025),
    ],
    "pax": [
        ("0.jpg", b"a" * 700),
        (f"{LONG_NAME}/{LONG_NAME}/b.jpg", b"b" * 9),
        ("\u00e9.jpg", b"c" * 1025),
    ],
    "samples": [("0.cls", b"7"), ("0.jpg", b"a" * 600), ("1.jpg", b"b" * 600), ("1.cls", b"8")],
}


@pytest.mark.parametrize("case", TRUNCATION_CASES)
def test_truncated_shard_is_rejected_or_yields_its_complete_rows(tmp_path, case):
    members = TRUNCATION_CASES[case]
    whole = tar_bytes(members, "ustar" if case == "samples" else case)
    with tarfile.open(fileobj=io.BytesIO(whole)) as tar:
        found = list(tar)
    headers = [range(info.offset + 1, info.offset_data) for info in found]
    ends = found[-1].offset_data + -(-found[-1].size // BLOCK_BYTES) * BLOCK_BYTES
    images = [info for info in found if info.name.endswith(".jpg")]
    path = tmp_path / "a.tar"
    for length in sorted({*range(0, ends + 1025, 61), *range(0, len(whole) + 1, BLOCK_BYTES)}):
        path.write_bytes(whole[:length])
        if any(length in inside for inside in headers):
            check_error(rejection_of(path), path)
            continue
        listing = TarListing(path)
        there = [info for info in images if info.offset < length]
        assert names_of(listing) == [info.name for info in there]
        for row, info in enumerate(there):
            if info.offset_data + info.size > length:
                assert reason(listing, row) == "truncated: the shard ends inside the image"
            elif case == "samples" and info.name == "1.jpg" and length == found[3].offset_data:
                assert reason(listing, row) == "truncated: the shard ends inside the image's .cls"
            else:
                assert listing.read(row, UNLIMITED_BYTES) == dict(members)[info.name]
        assert listing.unterminated == ([str(path)] if length < ends + BLOCK_BYTES else [])
        assert listing.stored_bytes == sum(
            max(0, min(info.size, length - info.offset_data)) for info in there
        )


def test_truncated_image_is_a_failed_row(tmp_path):
    expected = pixels(3)
    images = [(f"{row}.png", png(image)) for row, image in enumerate(expected)]
    whole = tar_bytes(images)
    (tmp_path / "a.tar").write_bytes(
        whole[: 2 * (BLOCK_BYTES + len(pad_to_block(images[0][1]))) + BLOCK_BYTES + 7]
    )
    source = open_shards(tmp_path / "a.tar", (7, 9))
    batch, records = source.read(0, 3)
    assert [record.failed for record in records] == [False, False, True]
    assert records[2].reason == "truncated: the shard ends inside the image"
    assert batch[:2].tobytes() == expected[:2].tobytes()
    assert not batch[2].any()
    (note,) = source.notes
    assert "truncated: 1, the first is" in note
    assert str(tmp_path / "a.tar") in note


def test_truncated_entry_of_unknown_type_is_reported_as_unknown(tmp_path):
    listing = TarListing(save_blocks(tmp_path / "a.tar", header("a.jpg", 9, b"Z")))
    assert "unknown" in reason(listing, 0)


@pytest.mark.parametrize("case", FORMATS)
def test_flipped_header_bit_is_rejected_or_harmless(tmp_path, case):
    members = [("cat/a.jpg", b"a" * 600), ("cat/b.jpg", b"b"), ("0.cls", b"7"), ("0.jpg", b"c")]
    whole = tar_bytes(members, case)
    path = save_blocks(tmp_path / "a.tar", whole)
    expected = TarListing(path)
    expected = names_of(expected), labels_of(expected), contents_of(expected)
    with tarfile.open(fileobj=io.BytesIO(whole)) as tar:
        places = [info.offset_data - BLOCK_BYTES for info in tar]
    refusals = 0
    for place in places:
        for at in range(place, place + BLOCK_BYTES, 3):
            damaged = bytearray(whole)
            damaged[at] ^= 1 << at % 8
            path.write_bytes(damaged)
            try:
                listing = TarListing(path)
            except SourceError as error:
                refusals += 1
                check_error(error, path, "offset 0" if place == 0 else f"offset {place}")
            else:
                assert (names_of(listing), labels_of(listing), contents_of(listing)) == expected
    assert refusals > 600


@pytest.mark.parametrize("kind", ["gnu", "pax"])
def test_changed_extension_header_byte_is_rejected_or_read(tmp_path, kind):
    name = f"{LONG_NAME}/{LONG_NAME}/a.jpg"
    info, content = member(name, b"a" * 600, pax_headers={"size": "600"})
    whole = tar_bytes([(info, content), ("b.jpg", b"b")], kind)
    path = tmp_path / "a.tar"
    outcomes = set()
    for at in range(BLOCK_BYTES, BLOCK_BYTES + 160):
        for byte in b"\0\n =/.0:\xff":
            path.write_bytes(whole[:at] + bytes([byte]) + whole[at + 1 :])
            try:
                listing = TarListing(path)
            except SourceError as error:
                check_error(error, path, "offset")
                outcomes.add("rejected")
            else:
                outcomes.add(len(listing))
                for row in range(len(listing)):
                    reason(listing, row)
    assert 2 in outcomes
    assert len(outcomes) > 1


def test_wrong_checksum_is_rejected(tmp_path):
    """The sum is modulo 65,521, so the stated checksum must be far off to fit by accident."""
    block = header("a.jpg")
    total = int(block[148:154], 8)
    for wrong in (total - 1, total + 1, total + 256, total + 512, 0, 0o777777):
        path = save_blocks(
            tmp_path / "a.tar", block[:148] + b"%06o\0 " % wrong + block[156:], END_OF_ARCHIVE
        )
        check_error(rejection_of(path), path, "offset 0")


def test_signed_checksum_is_accepted_like_in_tarfile(tmp_path):
    signed = with_checksum(header("\u00e9\u00e8.jpg", 1), "b")
    assert signed != header("\u00e9\u00e8.jpg", 1)
    listing = TarListing(
        save_blocks(tmp_path / "a.tar", signed, pad_to_block(b"a"), END_OF_ARCHIVE)
    )
    assert names_of(listing) == ["\u00e9\u00e8.jpg"]
    assert contents_of(listing) == [b"a"]


def test_gnu_header_times_are_not_part_of_the_name(tmp_path):
    block = header("a.jpg")
    block = with_checksum(block[:345] + b"14000000000\0" * 2 + block[369:])
    assert names_of(TarListing(save_blocks(tmp_path / "a.tar", block, END_OF_ARCHIVE))) == ["a.jpg"]


SIZE_ENCODINGS = {
    "octal, space": b"       1130 ",
    "octal of 12 digits": b"000000001130",
    "octal, NUL and more": b"1130\0junk\0\0\0",
    "base 256": b"\x80" + (600).to_bytes(11, "big"),
}


@pytest.mark.parametrize("case", SIZE_ENCODINGS)
def test_every_size_encoding_is_read(tmp_path, case):
    block = header("a.jpg")
    block = with_checksum(block[:124] + SIZE_ENCODINGS[case] + block[136:])
    blocks = [
        block,
        pad_to_block(b"a" * 600),
        header("b.jpg", 1),
        pad_to_block(b"b"),
        END_OF_ARCHIVE,
    ]
    listing = TarListing(save_blocks(tmp_path / "a.tar", *blocks))
    assert contents_of(listing) == [b"a" * 600, b"b"]


@pytest.mark.parametrize(
    "size_text",
    [b"-0000000001\0", b"\xff" * 12, b"0000000000x\0", b"9\0\0\0\0\0\0\0\0\0\0\0"],
    ids=["negative", "negative, base 256", "letter", "nine"],
)
@pytest.mark.parametrize("at", [0, 1])
def test_invalid_size_is_rejected(tmp_path, size_text, at):
    block = header("a.jpg")
    blocks = [block] * at + [
        with_checksum(block[:124] + size_text + block[136:]),
        block,
        END_OF_ARCHIVE,
    ]
    path = save_blocks(tmp_path / "a.tar", *blocks)
    check_error(rejection_of(path), path, f"offset {at * BLOCK_BYTES}")


@pytest.mark.parametrize("size", [2**33 + 1, 2**62, 2**63, 2**80])
def test_size_beyond_the_shard_is_a_failed_row(tmp_path, size):
    path = save_blocks(
        tmp_path / "a.tar", header("0.jpg", 1), pad_to_block(b"0"), header("a.jpg", size), b"abc"
    )
    listing = TarListing(path)
    assert [reason(listing, row) for row in range(2)] == [
        "",
        "truncated: the shard ends inside the image",
    ]
    assert listing.stored_bytes == 4


def test_pax_size_takes_precedence(tmp_path):
    info, content = member("a.jpg", b"a" * 600, pax_headers={"size": "600"})
    whole = bytearray(tar_bytes([(info, content), ("b.jpg", b"b")], "pax"))
    block = bytes(whole[1024:1536])
    assert block.startswith(b"a.jpg\0")
    whole[1024:1536] = with_checksum(block[:124] + b"%011o\0" % 0 + block[136:])
    listing = TarListing(save_blocks(tmp_path / "a.tar", whole))
    assert names_of(listing) == ["a.jpg", "b.jpg"]
    assert contents_of(listing) == [b"a" * 600, b"b"]


def pax(records, kind=tarfile.XHDTYPE):
    return header("PaxHeader", len(records), kind) + pad_to_block(records)


def test_global_header_with_only_a_comment_is_accepted(tmp_path):
    comment = b"52 comment=0123456789abcdef0123456789abcdef01234567\n"
    good = [pax(comment, tarfile.XGLTYPE), header("a.jpg", 1), pad_to_block(b"a"), END_OF_ARCHIVE]
    assert contents_of(TarListing(save_blocks(tmp_path / "a.tar", *good))) == [b"a"]
    for records in (b"14 path=b.jpg\n", b"9 size=5\n"):
        path = save_blocks(tmp_path / "b.tar", pax(records, tarfile.XGLTYPE), *good[1:])
        check_error(rejection_of(path), path, "offset 0", "all entries")


def test_extension_header_precedence_matches_tarfile(tmp_path):
    long = header("././@LongLink", 6, tarfile.GNUTYPE_LONGNAME) + pad_to_block(b"l.jpg\0")
    for number, (first, second) in enumerate([(b"b", b"c"), (b"c", b"b")]):
        x = [pax(b"14 path=%b.jpg\n" % name) for name in (first, second)]
        for blocks in (x, [*x, long], [long, *x], [pax(b"9 size=1\n"), *x]):
            path = tmp_path / f"{number}.tar"
            save_blocks(path, *blocks, header("a.jpg", 1), pad_to_block(b"a"), END_OF_ARCHIVE)
            with tarfile.open(path) as tar:
                expected = tar.getnames()
            listing = TarListing(path)
            assert names_of(listing) == expected
            assert contents_of(listing) == [b"a"]


DAMAGED_EXTENSIONS = {
    "no member after a header": ([pax(b"14 path=b.jpg\n")], "no entry follows"),
    "the end after a header": ([pax(b"6 a=b\n"), END_OF_ARCHIVE], "no entry follows"),
    "a record too short": ([pax(b"2 path=b.jpg\n"), header("a.jpg")], "pax header"),
    "a record of no length": ([pax(b"0 path=b.jpg\n"), header("a.jpg")], "pax header"),
    "a second record of no length": (
        [pax(b"6 a=b\n0 path=b.jpg\n"), header("a.jpg")],
        "pax header",
    ),
    "a record too long": ([pax(b"99 path=b.jpg\n"), header("a.jpg")], "pax header"),
    "a record without an end": ([pax(b"13 path=b.jpgx"), header("a.jpg")], "pax header"),
    "no record": ([pax(b"hello path="), header("a.jpg")], "pax header"),
    "a size that is not a number": ([pax(b"12 size=1_0\n"), header("a.jpg")], "1_0"),
    "a size of many digits": (
        [pax(b"5008 size=" + b"9" * 4997 + b"\n"), header("a.jpg")],
        "99999",
    ),
    "a long name without end": (
        [header("x", 2**60, tarfile.GNUTYPE_LONGNAME)],
        "ends inside",
    ),
    "a long link cut short": ([header("x", 600, tarfile.GNUTYPE_LONGLINK), b"x"], "ends inside"),
    "a sparse file, cut short": ([gnu_sparse(9)[: 4 * BLOCK_BYTES]], "a sparse file"),
}


@pytest.mark.parametrize("case", DAMAGED_EXTENSIONS)
def test_damaged_extension_header_is_rejected_with_its_offset(tmp_path, case):
    blocks, words = DAMAGED_EXTENSIONS[case]
    path = save_blocks(tmp_path / "a.tar", header("0.jpg", 1), pad_to_block(b"0"), *blocks)
    check_error(rejection_of(path), path, f"offset {2 * BLOCK_BYTES}", words)


def test_extension_header_of_megabytes_is_refused_with_a_remedy_that_works(tmp_path):
    path, attribute = tmp_path / "a.tar", "x" * 2**21
    image = png(pixels(1)[0])
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        entry = tarfile.TarInfo("a.png")
        entry.size, entry.pax_headers = len(image), {"SCHILY.xattr.user.a": attribute}
        tar.addfile(entry, io.BytesIO(image))
    error = rejection_of(path)
    check_error(error, path, "offset 0", "limit is 1048576", "without extended attributes")
    assert "damaged" not in error.problem
    commands = f"mkdir out; tar -xf {path} -C out; tar -cf new.tar -C out a.png"
    subprocess.run(commands, shell=True, cwd=tmp_path, check=True)  # noqa: S602
    assert contents_of(TarListing(tmp_path / "new.tar")) == [image]


def test_sparse_keyword_in_any_extension_header_is_rejected(tmp_path):
    headers = [pax(b"22 GNU.sparse.major=1\n"), pax(b"22 GNU.sparse.size=12\n"), pax(b"9 size=1\n")]
    for blocks in (headers, headers[::-1], headers[:2], headers[1:]):
        path = save_blocks(tmp_path / "a.tar", *blocks, header("a.jpg"), END_OF_ARCHIVE)
        check_error(rejection_of(path), path, "a sparse file")


def test_thousands_of_extension_headers_are_read(tmp_path):
    blocks = [pax(b"14 path=b.jpg\n")] * 3000
    listing = TarListing(save_blocks(tmp_path / "a.tar", *blocks, header("a.jpg"), END_OF_ARCHIVE))
    assert names_of(listing) == ["b.jpg"]


def test_garbage_between_entries_is_rejected_with_its_offset(tmp_path):
    whole = tar_bytes(FEW_MEMBERS)
    path = save_blocks(tmp_path / "a.tar", whole[:1024], b"garbage " * 64, whole[1024:])
    check_error(rejection_of(path), path, "damaged", "offset 1024", "tar -tvf")


@pytest.mark.parametrize("zeros", [1, 2, 20, 128, 300])
def test_archives_that_follow_each_other_are_one_dataset(tmp_path, zeros):
    parts = [[("cat/a.jpg", b"a" * 700), ("b.jpg", b"")], [("c.jpg", b"c"), ("c.cls", b"7")]]
    archives = [tar_bytes(parts[0], "gnu"), tar_bytes(parts[1], "pax")]
    first, second = (archive.rstrip(b"\0") for archive in archives)
    path = save_blocks(
        tmp_path / "a.tar", pad_to_block(first), bytes(zeros * BLOCK_BYTES), archives[1]
    )
    listing = TarListing(path)
    assert names_of(listing) == ["cat/a.jpg", "b.jpg", "c.jpg"]
    assert contents_of(listing) == [b"a" * 700, b"", b"c"]
    assert labels_of(listing) == ["cat", "", "7"]
    assert listing.unterminated == []
    save_blocks(path, archives[0], pad_to_block(second))
    assert names_of(TarListing(path)) == names_of(listing)
    assert TarListing(path).unterminated == [str(path)]


@pytest.mark.parametrize("tail", [b"garbage" * 999, b"x", b"\x1f\x8b\x08" + b"x" * 2000])
def test_data_after_the_end_that_is_no_archive_is_rejected(tmp_path, tail):
    whole = tar_bytes(FEW_MEMBERS)
    path = save_blocks(tmp_path / "a b.tar", whole, tail)
    error = rejection_of(path)
    check_error(error, path, f"offset {len(whole)}", "is not a tar", f"'{path}'")
    command = error.remedy.partition(": ")[2]
    subprocess.run(["/bin/sh", "-c", command], check=True, cwd=tmp_path)
    assert (tmp_path / "NEW.tar").read_bytes() == whole


def test_damage_in_a_second_archive_is_reported_with_its_offset(tmp_path):
    whole = tar_bytes(FEW_MEMBERS)
    path = save_blocks(tmp_path / "a.tar", whole, whole[:1024], b"garbage " * 64, whole[1024:])
    check_error(rejection_of(path), path, "damaged", f"offset {len(whole) + 1024}")
    save_blocks(path, whole, pax(b"14 path=b.jpg\n"), whole)
    assert TarListing(path).name(len(FEW_MEMBERS)) == b"b.jpg"
    save_blocks(path, pax(b"14 path=b.jpg\n"), END_OF_ARCHIVE, whole)
    check_error(rejection_of(path), path, "no entry follows")


@pytest.mark.parametrize("zeros", [0, 1, 511, 512, 513, 1024])
def test_missing_end_marker_is_noted(tmp_path, zeros):
    image = png(pixels(1)[0])
    path = save_blocks(
        tmp_path / "a.tar", header("a.png", len(image)), pad_to_block(image), bytes(zeros)
    )
    source = open_shards(path)
    assert source.header.images == 1
    assert len(source.notes) == (zeros < BLOCK_BYTES)


def test_empty_shard_among_others_is_noted(tmp_path):
    image = png(pixels(1)[0])
    save_tar(tmp_path / "0.tar", [("a.png", image)])
    (tmp_path / "1.tar").touch()
    save_tar(tmp_path / "2.tar", [])
    save_tar(tmp_path / "3.tar", [("b.png", image)])
    source = open_shards(tmp_path / "{0..3}.tar")
    assert names_of(source.listing) == ["0/a.png", "3/b.png"]
    assert contents_of(source.listing) == [image, image]
    (note,) = source.notes
    assert f"1, the first is {tmp_path / '1.tar'}" in note


def test_empty_tar_is_rejected(tmp_path):
    for path in (save_blocks(tmp_path / "a.tar"), save_tar(tmp_path / "b.tar", [])):
        with pytest.raises(SourceError) as caught:
            open_shards(path)
        check_error(caught.value, path, "contains no images")


@pytest.mark.parametrize(
    ("start", "word"),
    [
        (b"\x1f\x8b\x08", "gzip -dc"),
        (b"BZh9", "bzip2 -dc"),
        (b"\xfd7zXZ\0", "xz -dc"),
        (b"\x28\xb5\x2f\xfd", "zstd -dc"),
        (b"hello", "not a tar"),
        (b"\x89PNG", "not a tar"),
    ],
)
def test_non_tar_file_is_rejected(tmp_path, start, word):
    path = save_blocks(tmp_path / "a b.tar", start, b"x" * 4000)
    check_error(rejection_of(path), path, word, f"'{path}'")


@pytest.mark.parametrize("suffix", [".tar.gz", ".tgz", ".TAR.ZST", ".tar.xz", ".tbz2", ".tar.lz4"])
@pytest.mark.parametrize("name", ["a", "{00..99}"])
def test_compressed_shards_are_rejected_with_the_decompression_command(tmp_path, name, suffix):
    path = tmp_path / (name + suffix)
    assert is_tar_name(path)
    programs = {".tar.xz": "xz", ".TAR.ZST": "zstd", ".tbz2": "bzip2", ".tar.lz4": "lz4"}
    check_error(
        rejection_of(path), path, f"{programs.get(suffix, 'gzip')} -dk {path}", "fixed offsets"
    )


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.tar", True),
        ("A.TAR", True),
        ("{0000..0099}.tar", True),
        ("imagenet-{000..146}.tar", True),
        ("x{0..1}/a.tar", True),
        ("a.tar.gz", True),
        ("a.tgz", True),
        ("a.tar.zip", False),
        ("a.npy", False),
        ("tar", False),
        ("a.tar/b", False),
    ],
)
def test_tar_suffix_is_recognized(name, expected):
    assert is_tar_name(Path(name)) is expected


@pytest.mark.parametrize(
    ("pattern", "numbers"),
    [
        ("{0..3}", ["0", "1", "2", "3"]),
        ("{8..11}", ["8", "9", "10", "11"]),
        ("{08..11}", ["08", "09", "10", "11"]),
        ("im-{098..101}-x", ["im-098-x", "im-099-x", "im-100-x", "im-101-x"]),
        ("{007..7}", ["007"]),
    ],
)
def test_brace_range_is_padded_like_its_first_number(tmp_path, pattern, numbers):
    for number in [*numbers, "5", "005", "12"]:
        save_tar(tmp_path / f"{number}.tar", [("a.jpg", number.encode())])
    listing = TarListing(tmp_path / f"{pattern}.tar")
    assert contents_of(listing) == [number.encode() for number in numbers]


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("{3..1}", ["{3..1}"]),
        ("{0..1000000}", ["1000000 increasing numbers"]),
        ("{0..99999999999999999999}", ["1000000 increasing numbers"]),
        ("{0.." + "9" * 5000 + "}", ["1000000 increasing numbers"]),
        ("{0..1}-{0..1}", ["2 ranges"]),
        ("{a..c}", ["does not exist", "{0000..0099}.tar"]),
        ("{0..2..2}", ["does not exist"]),
        ("{0,1}", ["does not exist"]),
        ("{\u0660..\u0661}", ["does not exist"]),
    ],
)
def test_invalid_brace_range_is_rejected(tmp_path, pattern, words):
    path = tmp_path / f"{pattern}.tar"
    check_error(rejection_of(path), path, *words)


def test_existing_file_with_braces_takes_precedence(tmp_path):
    for name in ("{0..1}", "{1..0}", "{0..1}{0..1}"):
        listing = TarListing(save_tar(tmp_path / f"{name}.tar", [("a.jpg", name.encode())]))
        assert names_of(listing) == ["a.jpg"]
        assert contents_of(listing) == [name.encode()]


def test_missing_shards_are_counted_and_the_first_are_listed(tmp_path):
    for number in (0, 3, 4):
        save_tar(tmp_path / f"{number:02d}.tar", FEW_MEMBERS)
    error = rejection_of(tmp_path / "{00..11}.tar")
    shown = ", ".join(str(tmp_path / f"{number:02d}.tar") for number in (1, 2, 5, 6, 7))
    check_error(error, "9 of 12 shards are missing", f"{shown} and 4 more")
    check_error(
        rejection_of(tmp_path / "{03..05}.tar"),
        f"1 of 3 shards are missing: {tmp_path / '05.tar'}\n",
    )


def test_changed_shard_stops_the_run_even_at_failed_rows(tmp_path):
    path = save_blocks(tmp_path / "a.tar", header("a.jpg", 999), b"abc")
    listing = TarListing(path)
    assert reason(listing, 0) == "truncated: the shard ends inside the image"
    save_blocks(path, header("a.jpg", 999), bytes(999))
    with pytest.raises(StoppedError):
        listing.read(0, UNLIMITED_BYTES)


@pytest.mark.parametrize("keeps_time", [False, True])
def test_shard_overwritten_while_it_is_read_yields_no_mixture(tmp_path, monkeypatch, keeps_time):
    old, new = (tar_bytes([("a.jpg", letter * 5000)]) for letter in (b"a", b"b"))
    path = save_blocks(tmp_path / "a.tar", old)
    listing = TarListing(path)
    overwrite_while_read(monkeypatch, path, [new], keeps_time=keeps_time)
    if keeps_time:
        assert listing.read(0, UNLIMITED_BYTES) == b"b" * 5000
    else:
        with pytest.raises(StoppedError):
            listing.read(0, UNLIMITED_BYTES)


def test_short_reads_are_continued_and_an_early_end_stops_the_run(tmp_path, monkeypatch):
    listing = TarListing(save_tar(tmp_path / "a.tar", FEW_MEMBERS))
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda file, count, at: pread(file, min(count, 3), at))
    assert listing.read(0, UNLIMITED_BYTES) == b"first"
    monkeypatch.setattr(os, "pread", lambda file, count, at: b"")
    with pytest.raises(StoppedError):
        listing.read(0, UNLIMITED_BYTES)


def test_io_error_is_a_failed_row_or_rejects_the_shard(tmp_path, monkeypatch):
    path = save_tar(tmp_path / "a.tar", FEW_MEMBERS)
    listing = TarListing(path)

    def failing(file, count, at):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "pread", failing)
    assert "Input/output error" in reason(listing, 0)
    check_error(rejection_of(path), path, "Input/output error")


def test_image_above_max_bytes_is_not_read(tmp_path):
    listing = TarListing(save_tar(tmp_path / "a.tar", FEW_MEMBERS))
    assert reason(listing, 1, 699) == "the image has 700 bytes; the limit is 699"
    assert reason(listing, 1, 700) == ""


def test_identity_depends_on_name_size_offset_and_mtime(tmp_path):
    path = tmp_path / "a.tar"
    variants = [
        [("a.jpg", b"1")],
        [("b.jpg", b"1")],
        [("a.jpg", b"12")],
        [("x", b""), ("a.jpg", b"1")],
        [("a.jpg", b"1"), *[("x.txt", bytes(9999))] * 2],
    ]
    seen = set()
    for members in variants:
        save_tar(path, members)
        os.utime(path, ns=(10**18, 10**18))
        seen.add(TarListing(path).identity(0))
    assert len(seen) == len(variants)
    save_tar(path, variants[0])
    os.utime(path, ns=(10**18, 10**18))
    assert TarListing(path).identity(0) in seen
    os.utime(path, ns=(10**18, 10**18 + 1))
    assert TarListing(path).identity(0) not in seen


def test_fingerprint_depends_on_offsets_and_the_shard_name(tmp_path):
    path, other = tmp_path / "a.tar", ("x.txt", b"")
    seen = set()
    for members in ([other, *FEW_MEMBERS], [*FEW_MEMBERS, other]):
        os.utime(save_tar(path, members), ns=(10**18, 10**18))
        seen.add(TarListing(path).fingerprint())
    seen.add(TarListing(path.rename(tmp_path / "b.tar")).fingerprint())
    assert len(seen) == 3


def test_removed_shard_has_no_fingerprint(tmp_path):
    for number in range(2):
        save_tar(tmp_path / f"{number}.tar", FEW_MEMBERS)
    listing = TarListing(tmp_path / "{0..1}.tar")
    (tmp_path / "0.tar").unlink()
    with pytest.raises(SourceError):
        listing.fingerprint()


def test_fingerprint_does_not_depend_on_the_directory(tmp_path):
    for folder in ("here", "there"):
        os.utime(save_tar(tmp_path / folder / "a.tar", FEW_MEMBERS), ns=(10**18, 10**18))
    seen = {TarListing(tmp_path / folder / "a.tar").fingerprint() for folder in ("here", "there")}
    assert len(seen) == 1


def test_listing_does_not_read_image_data(tmp_path, monkeypatch):
    members = [(f"{number:03d}.jpg", bytes(200_000)) for number in range(50)]
    members += [(f"{number:03d}.cls", b"1") for number in range(50)]
    path = save_tar(tmp_path / "a.tar", members, "pax")
    read_bytes = []
    pread = os.pread

    def counted(file, count, at):
        data = pread(file, count, at)
        read_bytes.append(len(data))
        return data

    monkeypatch.setattr(os, "pread", counted)
    assert len(TarListing(path)) == 50
    assert sum(read_bytes) < 500_000
    assert path.stat().st_size > 10**7


def test_small_members_are_listed_with_few_reads(tmp_path, monkeypatch):
    path = save_tar(tmp_path / "a.tar", [(f"{number:04d}.jpg", b"a") for number in range(2000)])
    reads = []
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda *a: reads.append(a) or pread(*a))
    assert len(TarListing(path)) == 2000
    assert len(reads) < 60


def test_entry_takes_less_than_90_bytes(tmp_path):
    blocks = [header(f"n{n // 1000:08d}/n{n // 1000:08d}_{n:08d}.JPEG") for n in range(50_000)]
    path = save_blocks(tmp_path / "a.tar", *blocks, END_OF_ARCHIVE)
    del blocks
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        listing = TarListing(path)
        after, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(listing) == 50_000
    assert (after - before) / 50_000 < 90
    assert (peak - before) / 50_000 < 150


def open_descriptors():
    return sorted(path.name for path in Path("/proc/self/fd").iterdir())


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="no list of open files here")
def test_no_file_is_left_open(tmp_path):
    save_tar(tmp_path / "good.tar", FEW_MEMBERS)
    save_blocks(tmp_path / "bad.tar", b"x" * 4000)
    save_blocks(tmp_path / "cut.tar", tar_bytes(FEW_MEMBERS)[:1500])
    save_tar(tmp_path / "changed.tar", FEW_MEMBERS)
    before = open_descriptors()
    for name in ("good", "bad", "cut", "changed"):
        path = tmp_path / f"{name}.tar"
        with contextlib.suppress(SourceError, StoppedError):
            listing = TarListing(path)
            if name == "changed":
                path.write_bytes(b"")
            listing.fingerprint()
            for row in range(len(listing)):
                reason(listing, row, 5)
    assert open_descriptors() == before


PATH_PARTS = st.sampled_from(["cat", "dog", "\u00e9", "h.", "x.y", "q" * 70, "\udcff", "z.."])
SUFFIXES = st.sampled_from([".jpg", ".PNG", ".json", ".tar", "", ".b.gif", ".txt"])
PATHS = st.builds(
    lambda folders, stem, suffix: "/".join([*folders, stem]) + suffix,
    st.lists(PATH_PARTS, max_size=3),
    PATH_PARTS,
    SUFFIXES,
)
MEMBER_TYPES = st.sampled_from(
    [tarfile.REGTYPE] * 6
    + [tarfile.AREGTYPE, tarfile.CONTTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE]
)
MEMBERS = st.lists(
    st.tuples(
        PATHS,
        st.binary(max_size=3) | st.sampled_from([bytes(512), bytes(700), b"z" * 70_000]),
        MEMBER_TYPES,
        st.sampled_from([{}, {"mtime": 1.5}, {"uname": "\u00e9"}, {"linkname": "l" * 120}]),
    ),
    max_size=12,
)


@given(members=MEMBERS, kind=st.sampled_from([*FORMATS]))
@ascii_failures()
def test_random_archives_match_tarfile(tmp_path_factory, members, kind):
    path = tmp_path_factory.getbasetemp() / "random.tar"
    written = []
    for name, content, typeflag, fields in members:
        data = content if typeflag in tarfile.REGULAR_TYPES else b""
        try:
            member(name, data, typeflag, **fields)[0].tobuf(FORMATS[kind])
        except ValueError:  # too long for this format
            continue
        written.append(member(name, data, typeflag, **fields))
    save_tar(path, written, kind)
    with tarfile.open(path, errors="surrogateescape") as tar:
        found = [info for info in tar if not info.isdir()]
        images = [info for info in found if is_image_name(os.fsencode(info.name))]
        contents = [tar.extractfile(info).read() if info.isreg() else None for info in images]
    listing = TarListing(path)
    first = {info.name: row for row, info in reversed([*enumerate(images)])}
    assert len(listing) == len(images)
    assert listing.skipped.counts.total() == len(found) - len(images)
    for row, (info, content) in enumerate(zip(images, contents, strict=True)):
        if first[info.name] != row:
            assert reason(listing, row) == f"the name occurs twice, first in row {first[info.name]}"
            continue
        assert listing.name(row) == os.fsencode(info.name)
        assert listing.label(row) == os.fsencode(os.path.dirname(info.name))  # noqa: PTH120
        if content is None:
            assert "a link" in reason(listing, row)
        else:
            assert listing.read(row, UNLIMITED_BYTES) == content


@given(
    base=st.sampled_from([*FORMATS]),
    edits=st.lists(st.tuples(st.integers(0, 8000), st.binary(min_size=1, max_size=12)), max_size=4),
    has_valid_checksums=st.booleans(),
)
def test_damaged_archive_raises_only_typed_errors(
    tmp_path_factory, base, edits, has_valid_checksums
):
    damaged = bytearray(
        tar_bytes([*FEW_MEMBERS, (f"{LONG_NAME}/{LONG_NAME[:20]}/z.jpg", b"z" * 600)], base)
    )
    for at, content in edits:
        damaged[at : at + len(content)] = content
    if has_valid_checksums:  # as an attacker could
        for at in range(0, len(damaged) - BLOCK_BYTES, BLOCK_BYTES):
            if damaged[at + 257 : at + 262] == b"ustar":
                damaged[at : at + BLOCK_BYTES] = with_checksum(
                    bytes(damaged[at : at + BLOCK_BYTES])
                )
    path = save_blocks(tmp_path_factory.getbasetemp() / "damaged.tar", damaged)
    try:
        listing = TarListing(path)
    except SourceError as error:
        check_error(error, path)
        return
    for row in range(len(listing)):
        assert b".." not in listing.name(row).split(b"/")
        assert isinstance(listing.label(row), bytes)
        reason(listing, row, 10**6)
