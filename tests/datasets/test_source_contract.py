"""The contract of every source; `tests.helpers.formats` describes the formats."""

from __future__ import annotations

import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import numpy as np
import pytest

import fastvgg
from fastvgg.datasets.base import Header, ImageRecord
from fastvgg.datasets.index import INDEX_HEADER, format_records, index_path
from fastvgg.datasets.open import open_source
from fastvgg.errors import SourceError, StoppedError, UsageError
from fastvgg.imaging.decode import DecodeOptions
from fastvgg.storage.location import Location
from fastvgg.stream.info import info
from tests.helpers.batches import assert_same, dtype_of, in_layout
from tests.helpers.datasets_on_disk import (
    check_error,
    images_in,
    names_in,
    network_inputs,
    pixels,
    plan_of,
    time_limit,
    tree,
)
from tests.helpers.faults import InterruptedStorage, SimulatedCrash
from tests.helpers.formats import (
    CHANGES,
    REPLACEMENTS,
    SOURCES,
    TARGETS,
    change_byte,
    check_spans,
    container,
    contents_of,
    data_files,
    files_of,
    replace_content,
    shorten,
)
from tests.helpers.runs import run

BATCH = pixels(11)
DTYPES = [(name, dtype) for name, source in SOURCES.items() for dtype in source.dtypes]
ARRAYS = [name for name, source in SOURCES.items() if source.is_array]
ON_DISK = [name for name in SOURCES if "store" not in name]

every_format = pytest.mark.parametrize("name", SOURCES)
every_array = pytest.mark.parametrize("name", ARRAYS)


def opened(location, dtype="uint8", **options):
    return closing(open_source(Location.parse(location), dtype_hint=dtype, **options))


def batch_of(dtype, images=11):
    return pixels(images).astype(dtype_of(dtype))


def check_names(error, *locations):
    """Check that an error names one of the locations, and what to do."""
    check_error(error)
    assert any(str(container(location)) in str(error) for location in locations)
    assert error.exit_code == (5 if isinstance(error, StoppedError) else 3)


@pytest.mark.parametrize(("name", "dtype"), DTYPES)
def test_every_span_is_read_back_as_written(tmp_path, name, dtype):
    expected = batch_of(dtype)
    with opened(SOURCES[name].write(tmp_path, expected), dtype) as source:
        assert source.kind == SOURCES[name].kind
        assert source.header == Header(expected.shape, dtype, "NHWC")
        check_spans(source, expected)
        assert len(source.read(2, 5).records) == (0 if SOURCES[name].is_array else 3)


@every_format
def test_source_attributes_describe_the_dataset(tmp_path, name):
    location = SOURCES[name].write(tmp_path, BATCH)
    expected_bytes = SOURCES[name].stored_bytes(location)
    with opened(location) as source:
        assert source.stored_bytes == expected_bytes
        assert source.read_granularity == SOURCES[name].granularity
        assert source.notes == [*SOURCES[name].notes]
        assert source.settings == ({} if SOURCES[name].is_array else DecodeOptions().to_dict())
        assert len(source.records) == 0
        assert source.path == container(location)
    described = {
        "path": str(Location.parse(location)),
        "state": "source",
        "kind": SOURCES[name].kind,
        "bytes": expected_bytes,
        "notes": [*SOURCES[name].notes],
    }
    if SOURCES[name].is_array:
        described |= {"shape": [11, 7, 9, 3], "dtype": "uint8"}
    else:
        described |= {"images": 11, "formats": {".png": 11}, "images_by_label": {"a": 6, "b": 5}}
    actual = info(location)
    assert {field: actual[field] for field in described} == described


@pytest.mark.parametrize("name", [name for name in SOURCES if SOURCES[name].has_index])
def test_index_sidecar_of_an_array_provides_its_records(tmp_path, name):
    location = SOURCES[name].write(tmp_path, BATCH)
    records = [ImageRecord(f"cat/{row}.jpg", "cat", 9, 7, False, "") for row in range(11)]
    records[4] = records[4]._replace(failed=True, reason="truncated")
    index_path(container(location)).write_text(
        INDEX_HEADER + format_records(records), encoding="utf-8"
    )
    with opened(location) as source:
        assert [*source.records] == records
        assert source.read(3, 6).records == records[3:6]
    with opened(location, use_index=False) as source:
        assert len(source.records) == 0
    batches = fastvgg.batches(location, 4)
    assert (batches.failed_rows.tolist(), batches.class_names) == ([4], ["cat"])


@pytest.mark.parametrize("name", [name for name in SOURCES if not SOURCES[name].is_array])
def test_images_have_records(tmp_path, name):
    with opened(SOURCES[name].write(tmp_path, BATCH)) as source:
        records = source.read(0, 11).records
        assert source.read(4, 7).records == records[4:7]
        assert len({record.path for record in records}) == 11
        assert {record[1:] for record in records} <= {
            ("a", 9, 7, False, ""),
            ("b", 9, 7, False, ""),
        }


@every_array
def test_array_has_the_given_layout(tmp_path, name):
    location = SOURCES[name].write(tmp_path, in_layout(BATCH, "NCHW"))
    with opened(location, layout="NCHW") as source:
        assert source.header == Header((11, 3, 7, 9), "uint8", "NCHW")
    layouts = {"layout": "NCHW", "out_layout": "NHWC"}
    plan_of(location, tmp_path / "y.npy", mode="tf", images_per_chunk=3, **layouts).run()
    assert_same(np.load(tmp_path / "y.npy"), network_inputs(BATCH, "tf"))
    with pytest.raises(SourceError, match="NCHW"):
        plan_of(location, tmp_path / "z.npy", mode="tf")


@every_format
def test_concurrent_reads_of_one_source_are_correct(tmp_path, name):
    expected = pixels(37)
    with opened(SOURCES[name].write(tmp_path, expected), threads=2) as source:

        def wrong_rows(seed):
            rows = np.random.default_rng(seed).permutation(34).tolist()
            return [row for row in rows if not is_right(row)]

        def is_right(row):
            out = np.zeros_like(expected[:3])
            if SOURCES[name].is_array:
                source.read_into(row, out)
            else:
                for offset, image in enumerate(out):
                    source.decode(row + offset, image)
            batch = source.read(row, row + 3).batch
            return batch.tobytes() == out.tobytes() == expected[row : row + 3].tobytes()

        with ThreadPoolExecutor(4) as pool:
            assert [*pool.map(wrong_rows, range(4))] == [[]] * 4


@every_format
def test_batch_outlives_its_source(tmp_path, name):
    with opened(SOURCES[name].write(tmp_path, BATCH)) as source:
        batches = [source.read(start, start + 2).batch for start in range(10)]
    for start, batch in enumerate(batches):
        assert batch.tobytes() == BATCH[start : start + 2].tobytes()


@every_array
def test_batches_yield_all_images_in_order_or_shuffled(tmp_path, name):
    location = SOURCES[name].write(tmp_path, BATCH)
    batches = [*fastvgg.batches(location, 4, threads=1)]
    assert_same(np.concatenate([batch.images for batch in batches]), BATCH)
    assert [row for batch in batches for row in batch.rows] == [*range(11)]
    seen = []
    for images, _, rows in fastvgg.batches(location, 3, shuffle=True, seed=3, threads=1):
        assert_same(images, BATCH[[*rows]])
        seen += [*rows]
    assert sorted(seen) == [*range(11)]


# Changes


def fingerprint_or_none(location):
    """The fingerprint, or None if the dataset is refused."""
    try:
        with opened(location, decoding=None) as source:
            return source.fingerprint()
    except SourceError:
        return None


@every_format
def test_fingerprint_is_stable(tmp_path, name):
    location = SOURCES[name].write(tmp_path, BATCH)
    with opened(location) as source:
        expected = source.fingerprint()
        source.read(0, 11)
        assert source.fingerprint() == expected == fingerprint_or_none(location)


@pytest.mark.parametrize("change", CHANGES)
@every_format
def test_fingerprint_covers_every_file(tmp_path, name, change):
    location = SOURCES[name].write(tmp_path, BATCH)
    seen = {fingerprint_or_none(location)}
    files = files_of(location)
    refused = 0
    for file in files:
        CHANGES[change](file)
        found = fingerprint_or_none(location)
        refused += found is None
        seen.add(found or refused)
    assert len(seen) == 1 + len(files)
    # The same size and date do not hide another byte where the format reads samples of the data.
    if change == "another byte" and SOURCES[name].kind in ("npy", "parts", "hdf5"):
        before = fingerprint_or_none(location)
        dates = files[0].stat().st_mtime_ns
        change_byte(files[0], -7)
        os.utime(files[0], ns=(0, dates))
        assert fingerprint_or_none(location) != before


@pytest.mark.parametrize("name", ["parts", "zarr", "images", "zarr in a store"])
def test_fingerprint_changes_if_a_file_is_added_removed_or_renamed(tmp_path, name):
    location = SOURCES[name].write(tmp_path, BATCH)
    file = data_files(location)[-1]
    content = file.read_bytes()
    other = file.with_name(file.name.replace(file.suffix or file.name, f"-other{file.suffix}"))
    if container(location).is_dir() and name in ON_DISK:
        for directory in [container(location), *container(location).rglob("*/")]:
            os.utime(directory, ns=(0, 0))  # long ago: file system clocks are coarse
    with opened(location) as source:
        seen = [source.fingerprint()]
        other.write_bytes(content)
        if name in ON_DISK:  # with its date
            file.rename(other)
        else:
            file.unlink()
        seen.append(source.fingerprint())
        file.write_bytes(content)
        seen.append(source.fingerprint())
    assert len({*seen}) == 3


def check_never_wrong(source, expected, *locations):
    """Check that every image is correct or a failed row, or that the run stops with a path."""
    try:
        batch, records = source.read(0, len(expected))
    except StoppedError as error:
        check_names(error, *locations, *files_of(locations[0]))
        return True
    failed = [record.failed for record in records] or [False] * len(expected)
    for actual, image, is_failed in zip(batch, expected, failed, strict=True):
        assert actual.tobytes() == (np.zeros_like(image) if is_failed else image).tobytes()
    return False


@pytest.mark.parametrize("nbytes", [0, 0.5, -1])
@every_format
def test_source_truncated_after_opening_stops_the_run(tmp_path, name, nbytes):
    expected = pixels(11, 37, 41)
    location = SOURCES[name].write(tmp_path, expected)
    for file in [data_files(location)[0], data_files(location)[-1]]:
        content = file.read_bytes()
        with opened(location) as source:
            shorten(file, int(len(content) * nbytes) if nbytes == 0.5 else nbytes)
            assert check_never_wrong(source, expected, location)
        file.write_bytes(content)


@every_format
def test_source_removed_after_opening_never_returns_wrong_bytes(tmp_path, name):
    location = SOURCES[name].write(tmp_path, BATCH)
    with opened(location) as source:
        data_files(location)[0].unlink()
        check_never_wrong(source, BATCH, tmp_path)


@pytest.mark.parametrize("change", [*CHANGES, *REPLACEMENTS])
@pytest.mark.parametrize("name", ["images", "tar", "tar shards"])
def test_encoded_image_changed_after_listing_stops_the_run(tmp_path, name, change):
    location = SOURCES[name].write(tmp_path, BATCH)
    file = data_files(location)[-1]
    with opened(location) as source:
        if change in REPLACEMENTS:
            file.unlink()
        (CHANGES | REPLACEMENTS)[change](file)
        if name != "tar":  # whose only file has changed
            assert source.read(0, 1).batch.tobytes() == BATCH[:1].tobytes()
        with time_limit(10):
            is_stopped = check_never_wrong(source, BATCH, location, file)
        # A file that cannot be opened is a failed row.
        is_unreadable = change in REPLACEMENTS if name == "images" else change == "a circular link"
        assert is_stopped or is_unreadable


@every_format
def test_source_changed_after_planning_is_rejected(tmp_path, name):
    location = SOURCES[name].write(tmp_path, BATCH)
    plan = plan_of(location, tmp_path / "y.npy", mode="caffe")
    replace_content(files_of(location)[0], files_of(location)[0].read_bytes())
    before = names_in(tmp_path)
    with pytest.raises((SourceError, StoppedError), match="changed") as caught:
        plan.run()
    check_names(caught.value, location, *files_of(location))
    assert names_in(tmp_path) == before


@every_format
def test_source_changed_during_a_run_is_not_published(tmp_path, name):
    location = SOURCES[name].write(tmp_path, BATCH)
    plan = plan_of(location, tmp_path / "y.npy", mode="caffe", images_per_chunk=3)
    file = data_files(location)[-1]

    def change(progress):
        if progress.images < 9 and file.exists():
            # A file that was read already is detected only by a changed name.
            file.unlink() if SOURCES[name].kind == "images" else change_byte(file)

    with pytest.raises(StoppedError) as caught:
        run(plan, change)
    check_error(caught.value, "restart")
    check_names(caught.value, location, file)
    assert not (tmp_path / "y.npy").exists()


# Wrong paths


def remove(path):
    shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.mark.parametrize(
    ("name", "kind"),
    # An empty file is an empty shard, which `test_tar` covers.
    [
        (name, kind)
        for name in ON_DISK
        for kind in REPLACEMENTS
        if (name, kind) != ("tar shards", "an empty file")
    ],
)
def test_non_dataset_is_rejected_with_its_path(tmp_path, name, kind):
    location = SOURCES[name].write(tmp_path, BATCH)
    path = container(location)
    path = files_of(location)[-1] if "{" in path.name else path
    remove(path)
    REPLACEMENTS[kind](path)
    before = tree(tmp_path)
    with time_limit(10), pytest.raises(SourceError) as caught:
        open_source(Location.parse(location))
    check_names(caught.value, path)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("kind", REPLACEMENTS)
@pytest.mark.parametrize("name", ON_DISK)
def test_replaced_data_file_is_rejected_or_fails_on_read(tmp_path, name, kind):
    location = SOURCES[name].write(tmp_path, BATCH)
    file = data_files(location)[-1]
    file.unlink()
    REPLACEMENTS[kind](file)
    try:
        with time_limit(10), opened(location) as source:
            assert kind != "nothing" or SOURCES[name].kind in ("images", "parts")
            check_never_wrong(source, BATCH[: source.header.images], location)
    except SourceError as error:
        check_names(error, location, file)


@pytest.mark.parametrize("content", [None, b""], ids=["missing", "empty"])
@pytest.mark.parametrize("key", ["zarr.json", "c/2/0/0/0"])
def test_missing_or_empty_object_is_rejected_or_stops_the_run(tmp_path, key, content):
    location = SOURCES["zarr in a store"].write(tmp_path, BATCH)
    file = container(location) / key
    file.unlink() if content is None else file.write_bytes(content)
    try:
        with opened(location) as source:
            assert (key, content) == ("c/2/0/0/0", b"")
            assert check_never_wrong(source, BATCH, location)
    except SourceError as error:
        check_names(error, location)


@pytest.mark.parametrize("name", [*ON_DISK, "zarr in a store"])
def test_missing_path_is_rejected(tmp_path, name):
    location = SOURCES[name].write(tmp_path, BATCH)
    for file in files_of(location):
        file.unlink()
    if container(location).is_dir():
        remove(container(location))
    attempts = [open_source, lambda path: plan_of(path, tmp_path / "y.npy", mode="tf")]
    if name in ON_DISK:  # a store has no directories: there is just no dataset
        attempts.append(info)
    for attempt in attempts:
        with pytest.raises(SourceError) as caught:
            attempt(Location.parse(location))
        check_names(caught.value, location)


@every_array
def test_image_options_are_rejected_for_arrays(tmp_path, name):
    location = SOURCES[name].write(tmp_path, BATCH)
    for decoding in (DecodeOptions((5, 7)), DecodeOptions(exif=True), DecodeOptions(max_pixels=5)):
        with pytest.raises(SourceError, match="applies only to image files"):
            open_source(Location.parse(location), decoding=decoding)
    with pytest.raises(SourceError, match="applies only to image files"):
        plan_of(location, tmp_path / "y.npy", mode="caffe", size=(5, 7))
    with pytest.raises(UsageError, match="already an array"):
        plan_of(location, tmp_path / "y.npy", direction="pack")
    if name != "npy":
        with pytest.raises(UsageError, match=r"is not a .npy file"):
            fastvgg.plan(location, in_place=True, mode="caffe")


# Runs


@pytest.mark.parametrize("target", [name for name in TARGETS if TARGETS[name].is_array])
@every_format
def test_run_matches_oracle_and_round_trips(tmp_path, name, target):
    form = TARGETS[target]
    there, back = form.location(tmp_path), form.location(tmp_path, "back")
    plan_of(SOURCES[name].write(tmp_path, BATCH), there, mode="caffe", images_per_chunk=3).run()
    assert_same(form.load(there, "float32"), network_inputs(BATCH, "caffe"))
    plan_of(there, back, direction="restore", images_per_chunk=3).run()
    assert_same(form.load(back, "uint8"), BATCH)
    for location in (there, back):
        assert fastvgg.verify(location, full=True).recomputed_images == len(BATCH)


@every_array
def test_network_inputs_are_restored_to_image_files(tmp_path, name):
    location = SOURCES[name].write(tmp_path, network_inputs(BATCH, "caffe"))
    plan_of(location, tmp_path / "out", mode="caffe", direction="restore", images_per_chunk=3).run()
    images = images_in(tmp_path / "out")
    assert_same(np.stack([images[name] for name in sorted(images)]), BATCH)


@every_format
def test_interrupted_run_resumes_from_every_source_format(tmp_path, name):
    location = SOURCES[name].write(tmp_path, BATCH)

    def planned():
        return plan_of(location, tmp_path / "y.npy", mode="torch", images_per_chunk=3)

    with pytest.raises(SimulatedCrash):
        run(planned(), storage=InterruptedStorage(2))
    assert not (tmp_path / "y.npy").exists()
    before = contents_of(location)
    plan = planned()
    assert (plan.committed_chunks, plan.chunks) == (2, -(-11 // plan.chunk_images))
    assert plan.run().counts["computed_chunks"] == plan.chunks - 2
    assert_same(np.load(tmp_path / "y.npy"), network_inputs(BATCH, "torch"))
    assert contents_of(location) == before
