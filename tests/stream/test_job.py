"""Jobs: the settings that determine the output, and the validation of recorded jobs."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

import fastvgg
from fastvgg.datasets.formats import SOURCES, TARGETS, Format
from fastvgg.errors import ResumeError, UsageError
from fastvgg.stream.job import Job
from fastvgg.stream.journal import Commit, JournalState, journal_path, read_journal
from tests.helpers.datasets_on_disk import pixels, save_images, save_npy


@pytest.fixture
def photos(tmp_path):
    return save_images(tmp_path / "photos", pixels(3))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"size": (np.int64(8), np.uint8(5))},
        {"size": [8, 5], "keep_aspect_ratio": np.True_},
        {"size": np.array([8, 5]), "exif": True, "fast_jpeg": False},
        {"size": (8, 5), "max_pixels": np.int32(10_000)},
    ],
)
def test_job_round_trips_for_any_option_types(tmp_path, photos, options):
    plan = fastvgg.plan(photos, tmp_path / "y.npy", mode="torch", **options)
    assert Job.from_dict(plan.job.to_dict()) == plan.job
    plan.run()
    assert fastvgg.verify(tmp_path / "y.npy").recomputed_images == 3


@pytest.mark.parametrize(
    "size", ["22", 8, (8.0, 8), (True, 8), (0, 3), (1, 2, 3), (True, 8, 8), np.array(8)]
)
def test_invalid_size_is_rejected(tmp_path, photos, size):
    with pytest.raises(UsageError, match="invalid size="):
        fastvgg.plan(photos, tmp_path / "y.npy", mode="torch", size=size)


@pytest.fixture
def fields(tmp_path):
    source = save_npy(tmp_path / "x.npy", pixels(3))
    return fastvgg.plan(source, tmp_path / "y.npy", mode="torch").job.to_dict()


@pytest.mark.parametrize(
    ("section", "change"),
    [
        ("source", {"kind": "jpeg"}),
        ("source", {"kind": ""}),
        ("result", {"kind": "parts"}),
        ("result", {"kind": "zarr", "in_place": True}),
        ("result", {"kind": "hdf5", "dataset": ""}),
    ],
)
def test_inconsistent_record_fields_are_rejected(fields, section, change):
    assert Job.from_dict(fields).to_dict() == fields
    with pytest.raises(ValueError, match=r"format|in place|dataset"):
        Job.from_dict({**fields, section: {**fields[section], **change}})


def test_record_of_a_format_added_to_the_table_is_accepted(fields, monkeypatch):
    fields = {**fields, "source": {**fields["source"], "kind": "new"}}
    fields["result"] = {**fields["result"], "kind": "new", "dataset": "/x"}
    with pytest.raises(ValueError, match="fields"):
        Job.from_dict(fields)
    for table in (SOURCES, TARGETS):
        monkeypatch.setitem(table, "new", Format("file", result_fields=("dataset",)))
    assert Job.from_dict(fields).to_dict() == fields


def test_journal_that_retries_arrays_is_rejected(tmp_path, fields):
    job, path = Job.from_dict(fields), journal_path(tmp_path / "y.npy")
    state = JournalState(path, job, 1, None, retries=False)
    path.write_bytes(state.header_line())
    assert read_journal(path) == dataclasses.replace(state, valid_bytes=path.stat().st_size)
    path.write_bytes(dataclasses.replace(state, retries=True).header_line())
    with pytest.raises(ResumeError, match="only images can be retried"):
        read_journal(path)


@pytest.mark.parametrize("checksum", ["", "x", "0" * 15, "0" * 17, "G" * 16])
def test_commit_with_an_invalid_checksum_is_rejected(tmp_path, fields, checksum):
    path = journal_path(tmp_path / "y.npy")
    header = JournalState(path, Job.from_dict(fields), 1, None, retries=False).header_line()
    path.write_bytes(header + Commit(0, checksum, "", []).to_line())
    with pytest.raises(ResumeError, match="is not a checksum"):
        read_journal(path)
