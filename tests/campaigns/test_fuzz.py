"""A short fuzz campaign, and a check that it fails if a parser is broken."""

from __future__ import annotations

import os
import re
from types import SimpleNamespace
from unittest.mock import ANY

import pytest
import xxhash
from zarr.storage import WrapperStore

from fastvgg.datasets import contiguous, npy, zarr, zarr_store
from fastvgg.errors import SourceError
from fastvgg.stream import job, journal, lines, manifest, redo_log, redo_log_layout, redo_log_reader
from tests.campaigns import fuzz
from tests.campaigns.fuzz_kinds import redo_logs
from tests.campaigns.fuzz_kinds.arrays import NpyFiles, NpyHeaders, ZarrArrays
from tests.campaigns.fuzz_kinds.records import ChecksummedLines, Journals, Manifests
from tests.campaigns.fuzz_kinds.redo_logs import RedoLogHeaders, RedoLogs

SIZE = 20_000


@pytest.mark.parametrize("size", [SIZE // 4, pytest.param(SIZE, marks=pytest.mark.slow)])
def test_damaged_files_are_read_correctly_or_rejected_with_a_message(size):
    counts = fuzz.campaign(seed=5, size=size)
    assert counts["inputs"] == size
    assert counts["wrong"] == 0
    assert counts["accepted"] > size // 10
    assert counts["refused"] > size // 2


def test_same_seed_generates_the_same_inputs():
    first, second = (fuzz.campaign(seed=3, size=1000) for _ in range(2))
    measured = {"slowest_us": 0, "largest_kib": 0}
    assert {**first, **measured} == {**second, **measured}


class FakeFaulthandler:
    """A stand-in for `faulthandler`, the campaign's watchdog against hangs."""

    is_on = False

    def dump_traceback_later(self, seconds, **settings):
        assert seconds > 0
        self.is_on = True

    def cancel_dump_traceback_later(self):
        self.is_on = False


def test_watchdog_is_cancelled_after_a_failed_campaign(monkeypatch):
    faulthandler = FakeFaulthandler()
    monkeypatch.setattr(fuzz, "faulthandler", faulthandler)
    monkeypatch.setattr(fuzz, "KINDS", (NpyHeaders,))
    accept_fortran_order(monkeypatch)
    with pytest.raises(fuzz.WrongError):
        fuzz.campaign(seed=5, size=SIZE)
    assert not faulthandler.is_on


class EqualToAny(str):
    """A checksum that equals any other."""

    __slots__ = ()
    __hash__ = str.__hash__

    def __eq__(self, other):
        return True

    def __ne__(self, other):
        return False


def accept_any_checksum(patch):
    def checksum(text):
        return EqualToAny(xxhash.xxh3_64_hexdigest(text))

    patch.setattr(lines, "xxhash", SimpleNamespace(xxh3_64_hexdigest=checksum))


def accept_any_header_length(patch):
    patch.setattr(npy, "MAX_HEADER_BYTES", 2**32)


def accept_fortran_order(patch):
    parse = npy._parse

    def parsed(text, path):
        descr, _, shape = parse(text, path)
        return descr, False, shape

    patch.setattr(npy, "_parse", parsed)


def accept_big_endian(patch):
    dtype_of = npy._dtype_of
    patch.setattr(npy, "_dtype_of", lambda descr: dtype_of(str(descr).replace(">", "<")))


def raise_overflow_error(patch):
    errors = tuple(error for error in npy.LITERAL_ERRORS if error is not OverflowError)
    patch.setattr(npy, "LITERAL_ERRORS", errors)


def allow_parser_warnings(patch):
    patch.setattr(npy, "DUBIOUS_SYNTAX", re.compile(b"nothing that there is"))


def accept_extra_bytes(patch):
    check = npy.NpySource._validate

    def checked(source, *arguments):
        try:
            check(source, *arguments)
        except SourceError as error:
            if "followed by extra bytes" not in str(error):
                raise

    patch.setattr(npy.NpySource, "_validate", checked)


def grow_files(patch):
    opened = contiguous.open_regular

    def grown(path):
        os.truncate(path, path.stat().st_size + 1)
        return opened(path)

    patch.setattr(contiguous, "open_regular", grown)


def accept_missing_chunks(patch):
    patch.setattr(zarr_store.StrictStore, "get", WrapperStore.get)


def raise_metadata_type_error(patch):
    errors = tuple(error for error in zarr.METADATA_ERRORS if error is not TypeError)
    patch.setattr(zarr, "METADATA_ERRORS", errors)


def raise_chunk_runtime_error(patch):
    errors = tuple(error for error in zarr.CHUNK_ERRORS if error is not RuntimeError)
    patch.setattr(zarr, "CHUNK_ERRORS", errors)


def accept_any_field_type(patch):
    for module in (job, journal, manifest, redo_log, redo_log_layout):
        patch.setattr(module, "check_fields", lambda fields, kinds: None)


def run_campaigns(seeds):
    """Run a campaign for each seed; a record of many fields needs more than the first."""
    for seed in seeds:
        fuzz.campaign(seed=seed, size=SIZE)


def accept_bool_sizes(patch):
    def check_sizes(sizes, *, minimum=1, maximum=job.MAX_COUNT):
        if any(not isinstance(size, int) or not minimum <= size <= maximum for size in sizes):
            raise ValueError(sizes)

    for module in (job, journal, manifest, redo_log, redo_log_layout):
        patch.setattr(module, "check_sizes", check_sizes)


def accept_any_size(patch):
    for module in (job, journal, manifest, redo_log, redo_log_layout):
        patch.setattr(module, "check_sizes", lambda sizes, **limits: None)


def accept_any_result_shape(patch):
    patch.setattr(job, "result_header", lambda header, transform: ANY)


def ignore_damaged_redo_log_headers(patch):
    patch.setattr(
        redo_log_reader, "_is_redo_log", lambda start: b'{"fastvgg-in-place"' in start[:40]
    )


def accept_any_redo_log_length(patch):
    patch.setattr(redo_logs, "check_lengths", lambda header, path: None)


def accept_torn_records(patch):
    def from_bytes(data, chunk, run):
        fields = journal.json.loads(data.partition(b"\n")[0][17:] or "{}")
        record = redo_log.RedoRecord(**fields) if fields else None
        return record if record and (record.chunk, record.run) == (chunk, run) else None

    patch.setattr(redo_log.RedoRecord, "from_bytes", from_bytes)


@pytest.mark.parametrize(
    ("kind", "broken"),
    [
        (NpyHeaders, accept_any_header_length),
        (NpyHeaders, accept_fortran_order),
        (NpyHeaders, raise_overflow_error),
        (NpyHeaders, allow_parser_warnings),
        (NpyFiles, accept_fortran_order),
        (NpyFiles, accept_big_endian),
        (NpyFiles, accept_extra_bytes),
        (NpyFiles, grow_files),
        (ZarrArrays, accept_missing_chunks),
        (ZarrArrays, raise_metadata_type_error),
        (ZarrArrays, raise_chunk_runtime_error),
        (ChecksummedLines, accept_any_checksum),
        (Journals, accept_any_checksum),
        (Journals, accept_any_field_type),
        (Journals, accept_bool_sizes),
        (Journals, accept_any_size),
        (Journals, accept_any_result_shape),
        (Manifests, accept_any_field_type),
        (Manifests, accept_bool_sizes),
        (Manifests, accept_any_result_shape),
        (RedoLogHeaders, accept_any_field_type),
        (RedoLogHeaders, accept_any_size),
        (RedoLogHeaders, accept_any_result_shape),
        (RedoLogHeaders, ignore_damaged_redo_log_headers),
        (RedoLogs, accept_any_field_type),
        (RedoLogs, accept_any_size),
        (RedoLogs, accept_any_redo_log_length),
        (RedoLogs, accept_torn_records),
    ],
)
def test_fuzz_campaign_detects_a_broken_parser(monkeypatch, kind, broken):
    monkeypatch.setattr(fuzz, "KINDS", (kind,))
    broken(monkeypatch)
    with pytest.raises(fuzz.WrongError, match=f"{kind.name}, input "):
        run_campaigns(seeds=range(5, 10))
