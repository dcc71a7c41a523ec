"""The campaign of damaged files in short, and that it goes red where reading them is broken."""

from __future__ import annotations

import os
import re
from types import SimpleNamespace
from unittest.mock import ANY

import pytest
import xxhash
from zarr.storage import WrapperStore

from fastvgg.datasets import contiguous, npy, zarr
from fastvgg.errors import SourceError
from fastvgg.stream import job, journal, lines, manifest, redo_log, redo_log_layout
from tests.campaigns import fuzz

SIZE = 20_000


@pytest.mark.parametrize("size", [SIZE // 4, pytest.param(SIZE, marks=pytest.mark.slow)])
def test_whatever_is_on_the_disk_is_read_as_what_it_is_or_refused_in_words(size):
    counts = fuzz.campaign(seed=5, size=size)
    assert counts["inputs"] == size
    assert counts["wrong"] == 0
    assert counts["accepted"] > size // 10
    assert counts["refused"] > size // 2


def test_the_same_seed_reads_the_same_inputs():
    first, second = (fuzz.campaign(seed=3, size=1000) for _ in range(2))
    measured = {"slowest_us": 0, "largest_kib": 0}
    assert {**first, **measured} == {**second, **measured}


class Watch:
    """The watchdog that ends the process of a campaign that hangs, as the campaign sees it."""

    is_on = False

    def dump_traceback_later(self, seconds, **settings):
        assert seconds > 0
        self.is_on = True

    def cancel_dump_traceback_later(self):
        self.is_on = False


def test_a_campaign_that_ended_by_what_it_saw_is_watched_no_longer(monkeypatch):
    watch = Watch()
    monkeypatch.setattr(fuzz, "faulthandler", watch)
    monkeypatch.setattr(fuzz, "KINDS", (fuzz.NpyHeaders,))
    fortran_order(monkeypatch)
    with pytest.raises(fuzz.WrongError):
        fuzz.campaign(seed=5, size=SIZE)
    assert not watch.is_on


class EqualToAll(str):
    """A checksum that is right for every line."""

    __slots__ = ()
    __hash__ = str.__hash__

    def __eq__(self, other):
        return True

    def __ne__(self, other):
        return False


def no_checksums(patch):
    def checksum(text):
        return EqualToAll(xxhash.xxh3_64_hexdigest(text))

    patch.setattr(lines, "xxhash", SimpleNamespace(xxh3_64_hexdigest=checksum))


def headers_of_any_length(patch):
    patch.setattr(npy, "MAX_HEADER_BYTES", 2**32)


def fortran_order(patch):
    parse = npy._parse

    def parsed(text, path):
        descr, _, shape = parse(text, path)
        return descr, False, shape

    patch.setattr(npy, "_parse", parsed)


def big_endian(patch):
    patch.setattr(npy, "DTYPES", {**npy.DTYPES, ">f4": "float32"})


def numbers_that_overflow(patch):
    errors = tuple(error for error in npy.LITERAL_ERRORS if error is not OverflowError)
    patch.setattr(npy, "LITERAL_ERRORS", errors)


def warnings_of_the_parser(patch):
    patch.setattr(npy, "DUBIOUS_SYNTAX", re.compile(b"nothing that there is"))


def files_of_any_length(patch):
    check = npy.NpySource._validate

    def checked(source, *arguments):
        try:
            check(source, *arguments)
        except SourceError as error:
            if "followed by extra bytes" not in str(error):
                raise

    patch.setattr(npy.NpySource, "_validate", checked)


def files_that_grow(patch):
    opened = contiguous.open_regular

    def grown(path):
        os.truncate(path, path.stat().st_size + 1)
        return opened(path)

    patch.setattr(contiguous, "open_regular", grown)


def chunks_that_may_be_missing(patch):
    patch.setattr(zarr._StrictStore, "get", WrapperStore.get)


def metadata_of_any_kind(patch):
    errors = tuple(error for error in zarr.METADATA_ERRORS if error is not TypeError)
    patch.setattr(zarr, "METADATA_ERRORS", errors)


def chunks_of_any_kind(patch):
    errors = tuple(error for error in zarr.CHUNK_ERRORS if error is not RuntimeError)
    patch.setattr(zarr, "CHUNK_ERRORS", errors)


def fields_of_any_type(patch):
    for room in (job, journal, manifest, redo_log, redo_log_layout):
        patch.setattr(room, "check_fields", lambda fields, kinds: None)


def sizes_that_are_true(patch):
    def check_sizes(sizes, *, minimum=1, maximum=job.MAX_COUNT):
        if any(not isinstance(size, int) or not minimum <= size <= maximum for size in sizes):
            raise ValueError(sizes)

    for room in (job, journal, manifest, redo_log, redo_log_layout):
        patch.setattr(room, "check_sizes", check_sizes)


def sizes_of_any_value(patch):
    for room in (job, journal, manifest, redo_log, redo_log_layout):
        patch.setattr(room, "check_sizes", lambda sizes, **limits: None)


def results_of_any_shape(patch):
    patch.setattr(job, "result_header", lambda header, transform: ANY)


def headers_of_rings_that_are_passed_over(patch):
    patch.setattr(redo_log, "_is_redo_log", lambda start: b'{"fastvgg-in-place"' in start[:40])


def rings_of_any_length(patch):
    patch.setattr(fuzz, "check_same_file", lambda header, path: None)


def records_that_are_torn(patch):
    def from_bytes(data, chunk, run):
        fields = journal.json.loads(data.partition(b"\n")[0][17:] or "{}")
        record = redo_log.RedoRecord(**fields) if fields else None
        return record if record and (record.chunk, record.run) == (chunk, run) else None

    patch.setattr(redo_log.RedoRecord, "from_bytes", from_bytes)


def memory_for_all_that_is_claimed(patch):
    read = redo_log.read_sidecar

    def read_sidecar(path, max_bytes=-1):
        if read(path) is None:
            return None
        with path.open("rb") as file:
            return file.read(max_bytes)

    patch.setattr(redo_log, "read_sidecar", read_sidecar)


@pytest.mark.parametrize(
    ("kind", "broken"),
    [
        (fuzz.NpyHeaders, headers_of_any_length),
        (fuzz.NpyHeaders, fortran_order),
        (fuzz.NpyHeaders, numbers_that_overflow),
        (fuzz.NpyHeaders, warnings_of_the_parser),
        (fuzz.NpyFiles, fortran_order),
        (fuzz.NpyFiles, big_endian),
        (fuzz.NpyFiles, files_of_any_length),
        (fuzz.NpyFiles, files_that_grow),
        (fuzz.ZarrArrays, chunks_that_may_be_missing),
        (fuzz.ZarrArrays, metadata_of_any_kind),
        (fuzz.ZarrArrays, chunks_of_any_kind),
        (fuzz.Sealed, no_checksums),
        (fuzz.Ledgers, no_checksums),
        (fuzz.Ledgers, fields_of_any_type),
        (fuzz.Ledgers, sizes_that_are_true),
        (fuzz.Ledgers, sizes_of_any_value),
        (fuzz.Ledgers, results_of_any_shape),
        (fuzz.Manifests, fields_of_any_type),
        (fuzz.Manifests, sizes_that_are_true),
        (fuzz.Manifests, results_of_any_shape),
        (fuzz.RingHeaders, fields_of_any_type),
        (fuzz.RingHeaders, sizes_of_any_value),
        (fuzz.RingHeaders, results_of_any_shape),
        (fuzz.RingHeaders, headers_of_rings_that_are_passed_over),
        (fuzz.RingHeaders, memory_for_all_that_is_claimed),
        (fuzz.Rings, no_checksums),
        (fuzz.Rings, fields_of_any_type),
        (fuzz.Rings, sizes_of_any_value),
        (fuzz.Rings, rings_of_any_length),
        (fuzz.Rings, records_that_are_torn),
    ],
)
def test_the_campaign_sees_what_is_broken(monkeypatch, kind, broken):
    monkeypatch.setattr(fuzz, "KINDS", (kind,))
    broken(monkeypatch)
    with pytest.raises(fuzz.WrongError, match=f"{kind.name}, input "):
        fuzz.campaign(seed=5, size=SIZE)
