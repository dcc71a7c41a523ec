"""Plans: chunk and memory arithmetic, early rejection, and no writes."""

from __future__ import annotations

import re
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import fastvgg
from fastvgg.datasets.base import Header
from fastvgg.errors import ModeError, SourceError, TargetError, UsageError
from fastvgg.formatting import format_bytes, parse_bytes
from fastvgg.storage.location import Location
from fastvgg.stream.job import MAX_CHUNKS, Job, result_header
from fastvgg.stream.plan import CHUNK_BYTES, RUN_BYTES, Plan, choose_chunk_images
from fastvgg.transform import Transform
from tests.helpers.datasets_on_disk import (
    check_error,
    names_in,
    permissions,
    pixels,
    plan_of,
    save_images,
    save_npy,
    stdout_of,
    tree,
)
from tests.helpers.faults import InterruptedStorage, SimulatedCrash
from tests.helpers.runs import run

pytestmark = pytest.mark.pixels


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (4096, 4096),
        ("4096", 4096),
        ("4096B", 4096),
        ("1K", 1024),
        ("1KiB", 1024),
        ("1kB", 1000),
        ("512MiB", 512 * 2**20),
        ("512 mib", 512 * 2**20),
        (" 2M ", 2 * 2**20),
        ("2MB", 2_000_000),
        ("1.5GB", 1_500_000_000),
        ("1.5G", 3 * 2**29),
        ("3GiB", 3 * 2**30),
    ],
)
def test_memory_sizes_are_parsed(text, expected):
    assert parse_bytes(text) == expected


@pytest.mark.parametrize(
    "text", ["", "MiB", "much", "1 MiB 2", "-1", "1e9", "0x10", "1,5GB", "5 apples", "nan", "1..5"]
)
def test_invalid_memory_size_is_rejected(text):
    with pytest.raises(UsageError) as caught:
        parse_bytes(text)
    check_error(caught.value, repr(text), "512MiB")


@pytest.mark.parametrize("count", [0, 1, 1023, 1024, 10**6, 2**30, 2**40, 10**15])
def test_formatted_size_is_close_to_the_number_of_bytes(count):
    number, unit = format_bytes(count).split()
    factor = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}[unit]
    assert float(number) * factor == pytest.approx(count, rel=0.06)


@pytest.mark.parametrize("unit", ["B", "KiB", "MiB", "GiB", "TiB"])
def test_every_printed_unit_can_be_parsed(unit):
    factor = 1024 ** ["B", "KiB", "MiB", "GiB", "TiB"].index(unit)
    assert format_bytes(2 * factor).split()[1] == unit
    assert parse_bytes(format_bytes(2 * factor)) == 2 * factor


counts = st.integers(1, 10**9)


@given(
    counts,
    st.integers(1, 10**9),
    st.integers(0, 10**9),
    st.integers(0, 10**11),
    st.one_of(st.just(1), st.integers(2, 10**4)),
)
def test_chunk_fits_the_memory_limit_and_the_dataset(images, image, scratch, limit, stored):
    read_unit_bytes = image * min(stored, images)
    try:
        actual = choose_chunk_images(images, image, scratch, limit, read_granularity=stored)
    except TargetError as error:
        assert scratch + read_unit_bytes > limit
        check_error(error, format_bytes(scratch + read_unit_bytes), format_bytes(limit), "memory")
        return
    assert scratch + read_unit_bytes <= limit
    assert 1 <= actual <= images
    assert scratch + actual * image <= limit
    # A read unit is never split.
    assert actual == images or actual % stored == 0
    # As large as possible: one more read unit would exceed a limit.
    more = actual * image + read_unit_bytes
    assert actual == images or scratch + more > limit or more > CHUNK_BYTES


@pytest.mark.parametrize(
    ("kinds", "in_place", "mib"),
    [
        # Of 1 GiB, 4 GiB and 1 TiB.
        (("npy", "npy"), False, (64, 128, 256)),
        (("zarr", "hdf5"), False, (64, 128, 256)),
        (("npy", "npy"), True, (64, 64, 64)),
        (("images", "npy"), False, (72, 72, 72)),
        (("tar", "hdf5"), False, (72, 72, 72)),
        (("images", "zarr"), False, (144, 144, 144)),
        (("npy", "zarr"), False, (144, 144, 144)),
        (("npy", "images"), False, (256, 256, 256)),
    ],
)
def test_large_arrays_use_larger_chunks(kinds, in_place, mib):
    actual = []
    for gib in (1, 4, 1024):
        one = make_plan(1, 1, kinds=kinds, in_place=in_place)
        images = gib * 2**30 // one.image_memory_bytes
        plan = make_plan(images, 1, kinds=kinds, in_place=in_place)
        actual.append(round(plan.max_chunk_bytes / 2**20))
    assert actual == list(mib)


def test_in_place_runs_use_small_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr("fastvgg.stream.plan.CHUNK_BYTES", 1)
    array = save_npy(tmp_path / "x.npy", pixels(96).astype(np.float32))
    settings = {"direction": "restore", "mode": "tf"}
    assert fastvgg.plan(array, tmp_path / "y.npy", **settings).chunk_images == 3
    assert fastvgg.plan(array, in_place=True, **settings).chunk_images == 1


@given(st.integers(1, 10**8), st.integers(0, 10**8), st.integers(1, 5))
def test_suggested_memory_limit_is_sufficient(image, scratch, stored):
    with pytest.raises(TargetError) as caught:
        choose_chunk_images(
            5, image, scratch, scratch + stored * image - 1, read_granularity=stored
        )
    wanted = caught.value.remedy.split("memory='")[1].split("'")[0]
    assert (
        choose_chunk_images(5, image, scratch, parse_bytes(wanted), read_granularity=stored)
        >= stored
    )


def make_plan(images, images_per_chunk, limit=10**12, kinds=("npy", "npy"), in_place=False):
    header = Header((images, 7, 9, 3), "uint8", "NHWC")
    transform = Transform("caffe")
    job = Job(
        source="/x.npy",
        source_kind=kinds[0],
        fingerprint="",
        header=header,
        decoding=None,
        transform=transform,
        target_format=kinds[1],
        result=result_header(header, transform),
        in_place=in_place,
    )
    return Plan(
        source=Location(Path("/x.npy")),
        target=Location(Path("/y.npy")),
        job=job,
        read_bytes=header.nbytes,
        chunk_images=images_per_chunk,
        memory_bytes=limit,
        threads=1,
        backend="numpy",
        strict=False,
        restart=False,
        fsync=True,
        notes=(),
        retry_failed=False,
    )


@given(st.integers(1, 1000), st.integers(1, 1100))
def test_chunks_partition_the_rows(images, images_per_chunk):
    plan = make_plan(images, images_per_chunk)
    chunks = list(plan.chunk_rows())
    assert len(chunks) == plan.chunks
    rows = [row for start, stop in chunks for row in range(start, stop)]
    assert rows == list(range(images))
    assert all(stop - start == images_per_chunk for start, stop in chunks[:-1])
    assert 1 <= chunks[-1][1] - chunks[-1][0] <= images_per_chunk


@given(st.integers(1, 10**7), st.integers(10**4, 10**9))
def test_projected_memory_is_within_the_limit(images, limit):
    image_bytes = 7 * 9 * 3 * (1 + 2 * 4)
    try:
        images_per_chunk = choose_chunk_images(images, image_bytes, RUN_BYTES, limit)
    except TargetError:
        return
    plan = make_plan(images, images_per_chunk, limit)
    assert plan.image_memory_bytes == image_bytes
    assert plan.projected_bytes == RUN_BYTES + images_per_chunk * image_bytes
    assert plan.projected_bytes <= limit
    assert plan.write_bytes == images * 7 * 9 * 3 * 4


@pytest.mark.parametrize("extra_bytes", [1701, 1702, 2 * 1701 - 1, 2 * 1701, 9000, 2**29])
def test_plan_respects_the_given_memory_limit(tmp_path, array, extra_bytes):
    memory = RUN_BYTES + extra_bytes
    plan = fastvgg.plan(array, tmp_path / "y.npy", mode="caffe", memory=memory)
    assert plan.memory_bytes == memory
    assert plan.projected_bytes <= plan.memory_bytes
    assert plan.chunk_images == min(11, extra_bytes // (189 + 2 * 756))


def test_plan_of_a_folder_includes_decoding_memory(tmp_path):
    save_images(tmp_path / "photos", pixels(5, height=47, width=61))
    row_bytes, memory = 11 * 23 * 3, 2**26
    plan = fastvgg.plan(
        tmp_path / "photos", tmp_path / "y.npy", mode="tf", size=(11, 23), memory=memory
    )
    # Two chunks are computed while a third is written; a thread decodes into a row of its own.
    assert plan.image_memory_bytes == 3 * 4 * row_bytes + plan.record_bytes
    assert plan.projected_bytes == memory
    rest = memory - RUN_BYTES - 5 * plan.image_memory_bytes - plan.threads * row_bytes
    rest -= plan.listed_bytes
    assert plan.decoding_bytes == rest


def test_chunks_leave_half_of_the_memory_for_decoding(tmp_path):
    save_images(tmp_path / "photos", pixels(50, height=47, width=61))
    memory = 2**24 + 2 * 7 * 3 * 101 * 203 * 3 * 4
    plan = fastvgg.plan(
        tmp_path / "photos", tmp_path / "y.npy", mode="tf", size=(101, 203), memory=memory
    )
    assert plan.chunk_images * plan.image_memory_bytes <= memory // 2
    assert (plan.chunk_images + 1) * plan.image_memory_bytes > memory // 2


def test_folder_is_rejected_if_its_threads_do_not_fit_into_memory(tmp_path):
    save_images(tmp_path / "photos", pixels(5, height=47, width=61))
    with pytest.raises(TargetError) as caught:
        fastvgg.plan(tmp_path / "photos", tmp_path / "y.npy", mode="tf", threads=2, memory="10MiB")
    check_error(caught.value, "2 threads need 10.1 MiB", "threads=1", "memory='11MiB'")


@pytest.mark.parametrize(
    ("memory", "limit"), [(944, "944 B"), (RUN_BYTES + 1700, "2.0 MiB"), (1700, "1.7 KiB")]
)
def test_insufficient_memory_is_rejected_with_both_numbers_and_a_remedy(
    tmp_path, array, memory, limit
):
    with pytest.raises(TargetError) as caught:
        fastvgg.plan(array, tmp_path / "y.npy", mode="caffe", memory=memory)
    check_error(caught.value, "needs 2.0 MiB", f"the limit is {limit}", "memory='3MiB'")
    assert names_in(tmp_path) == ["x.npy"]


@pytest.mark.parametrize("memory", [0, "0", -1])
def test_zero_or_negative_memory_is_rejected(tmp_path, array, memory):
    with pytest.raises((TargetError, UsageError)):
        fastvgg.plan(array, tmp_path / "y.npy", mode="caffe", memory=memory)


def snapshot(directory):
    """Return names, contents, sizes, modes and times: everything that a write would change."""
    facts = {}
    for path in [directory, *sorted(directory.rglob("*"))]:
        status = path.lstat()
        facts[path] = (status.st_mode, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    return facts, tree(directory)


@pytest.mark.parametrize("kind", ["array", "folder"])
def test_planning_writes_nothing(tmp_path, kind):
    save_npy(tmp_path / "x.npy", pixels(11))
    save_images(tmp_path / "photos", pixels(5))
    (tmp_path / "out").mkdir()
    source = tmp_path / ("x.npy" if kind == "array" else "photos")
    before = snapshot(tmp_path)
    for _ in range(2):
        assert str(plan_of(source, tmp_path / "out" / "y.npy", mode="caffe", images_per_chunk=2))
    assert snapshot(tmp_path) == before


def test_read_only_source_can_be_planned_and_run(tmp_path):
    (tmp_path / "source").mkdir()
    source = save_npy(tmp_path / "source" / "x.npy", pixels(11))
    with permissions(source, 0o444), permissions(source.parent, 0o555):
        before = snapshot(source.parent)
        stdout_of(
            "import sys\n"
            "from tests.helpers.datasets_on_disk import drop_permission_override, plan_of\n"
            "drop_permission_override()\n"
            "plan_of(sys.argv[1], sys.argv[2], mode='tf').run()",
            source,
            tmp_path / "y.npy",
        )
        assert snapshot(source.parent) == before
    assert (tmp_path / "y.npy.fastvgg.json").exists()


def sparse_array(path, images):
    """Make an array of zeros that takes no space on the disk."""
    np.lib.format.open_memmap(path, "w+", np.uint8, (images, 8, 8, 3))
    return path


def test_a_million_chunks_are_planned_in_little_memory(tmp_path):
    source = sparse_array(tmp_path / "x.npy", MAX_CHUNKS)
    tracemalloc.start()
    try:
        plan = plan_of(source, tmp_path / "y.npy", mode="caffe", images_per_chunk=1)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert plan.chunks == MAX_CHUNKS
    assert peak_bytes < 2**21
    assert names_in(tmp_path) == ["x.npy"]


def test_more_than_a_million_chunks_are_refused_with_the_memory_for_fewer(tmp_path):
    source, target = sparse_array(tmp_path / "x.npy", MAX_CHUNKS + 1), tmp_path / "y.npy"
    with pytest.raises(TargetError) as caught:
        plan_of(source, target, mode="caffe", images_per_chunk=1)
    check_error(caught.value, target, MAX_CHUNKS + 1, MAX_CHUNKS, "memory=")
    memory = re.search(r"memory='(\d+MiB)'", caught.value.remedy)[1]
    assert plan_of(source, target, mode="caffe", memory=memory).chunks <= MAX_CHUNKS
    assert names_in(tmp_path) == ["x.npy"]


def test_plan_text_shows_all_figures(tmp_path, array):
    plan = plan_of(array, tmp_path / "y.npy", mode="torch", dtype="float16", images_per_chunk=2)
    text = str(plan)
    assert str(array) in text
    assert str(tmp_path / "y.npy") in text
    for expected in (
        r"preprocess (torch)",
        "images   11",
        "(7, 9, 3) uint8 NHWC",
        "(7, 9, 3) float16 NHWC",
        "chunks   6 of 2 images",
        format_bytes(array.stat().st_size),
        format_bytes(11 * 7 * 9 * 3 * 2),
        f"{format_bytes(RUN_BYTES + 2 * 189 * 5)} of {format_bytes(RUN_BYTES + 2 * 189 * 5)}",
        "threads  1",
    ):
        assert expected in text
    assert "note" not in text


def test_plan_notes_skipped_files(tmp_path):
    save_images(tmp_path / "photos", pixels(5))
    (tmp_path / "photos" / "labels.csv").touch()
    plan = plan_of(tmp_path / "photos", tmp_path / "y.npy", mode="caffe")
    assert "note" in str(plan)
    assert "skipped files" in str(plan)


def test_plan_notes_how_many_values_a_custom_mode_loses(tmp_path, array):
    mode = fastvgg.Mode("washed out", divide=1e6, mean=(1.0, 1.0, 1.0))
    plan = plan_of(array, tmp_path / "y.npy", mode=mode, dtype="float16")
    assert any("762" in note for note in plan.notes)


def test_plan_text_shows_completed_chunks(tmp_path, array):
    plan = plan_of(array, tmp_path / "y.npy", mode="caffe", images_per_chunk=2)
    with pytest.raises(SimulatedCrash):
        run(plan, storage=InterruptedStorage(1))
    resumed = plan_of(array, tmp_path / "y.npy", mode="caffe", images_per_chunk=2)
    assert resumed.committed_chunks == 1
    assert "chunks   6 of 2 images, 1 done" in str(resumed)


def test_job_does_not_depend_on_memory_threads_backend_or_fsync(tmp_path, array):
    target = tmp_path / "y.npy"
    expected = plan_of(array, target, mode="caffe").job
    assert plan_of(array, target, mode="caffe", images_per_chunk=2, threads=2).job == expected
    assert plan_of(array, target, mode="caffe", strict=True, restart=True).job == expected
    assert plan_of(array, target, mode="caffe", backend="auto").job == expected
    assert plan_of(array, target, mode="caffe", fsync=False).job == expected


@pytest.mark.parametrize(
    "settings",
    [
        {"mode": "tf"},
        {"mode": "caffe", "dtype": "float16"},
        {"mode": "caffe", "out_layout": "NCHW"},
    ],
)
def test_job_depends_on_every_setting_that_changes_the_output(tmp_path, array, settings):
    target = tmp_path / "y.npy"
    assert plan_of(array, target, **settings).job != plan_of(array, target, mode="caffe").job


def test_job_of_a_folder_depends_on_size_and_interpolation(tmp_path):
    photos, target = save_images(tmp_path / "photos", pixels(5)), tmp_path / "y.npy"
    jobs = [
        plan_of(photos, target, mode="caffe", **settings).job
        for settings in (
            {},
            {"size": (7, 9)},
            {"size": (9, 7)},
            {"size": (9, 7), "interpolation": "box"},
        )
    ]
    assert all(one != other for row, one in enumerate(jobs) for other in jobs[:row])


INVALID = {
    "no mode": ({}, UsageError, ["the mode is not given", "mode=", "model="]),
    "an empty mode": ({"mode": ""}, ModeError, ["''"]),
    "an unknown mode": ({"mode": "vgg"}, ModeError, ["'vgg'", "'caffe', 'tf', 'torch'"]),
    "an unknown type": ({"mode": "tf", "dtype": "int8"}, UsageError, ["int8", "float16"]),
    "a type of images": ({"mode": "tf", "dtype": "uint8"}, UsageError, ["uint8", "float16"]),
    "an unknown layout": ({"mode": "tf", "layout": "HWC"}, UsageError, ["'HWC'", "'NCHW'"]),
    "an unknown out_layout": ({"mode": "tf", "out_layout": "CHW"}, UsageError, ["'CHW'", "NCHW"]),
    "the wrong layout": ({"mode": "tf", "layout": "NCHW"}, SourceError, ["x.npy", "'NHWC'"]),
    "an unknown direction": ({"mode": "tf", "direction": "back"}, UsageError, ["'back'"]),
    "an unknown rounding": ({"mode": "tf", "rounding": "up"}, UsageError, ["'up'", "'nearest'"]),
    "an unknown backend": ({"mode": "tf", "backend": "cuda"}, UsageError, ["'cuda'", "'numpy'"]),
    "no threads": ({"mode": "tf", "threads": 0}, UsageError, ["invalid threads=0"]),
    "a size for an array": ({"mode": "tf", "size": (7, 9)}, SourceError, ["x.npy", "size=(7, 9)"]),
    "no amount": ({"mode": "tf", "memory": "lots"}, UsageError, ["'lots'"]),
    "images to restore": ({"mode": "tf", "direction": "restore"}, SourceError, ["x.npy", "uint8"]),
}


@pytest.mark.parametrize("wrong", INVALID)
def test_invalid_settings_are_rejected_before_writing(tmp_path, array, wrong):
    settings, kind, words = INVALID[wrong]
    with pytest.raises(kind) as caught:
        fastvgg.plan(array, tmp_path / "y.npy", **settings)
    check_error(caught.value, *words)
    assert names_in(tmp_path) == ["x.npy"]


@pytest.mark.parametrize("name", ["photos", "x.npy", "file/x.npy", "file/photos", "n" * 300])
def test_missing_source_is_rejected(tmp_path, name):
    (tmp_path / "file").write_text("a file, and no directory")
    with pytest.raises(SourceError) as caught:
        fastvgg.plan(tmp_path / name, tmp_path / "y.npy", mode="caffe")
    check_error(caught.value, tmp_path / name)


@pytest.mark.parametrize("name", ["missing/y.npy", "file/y.npy", "n" * 251 + ".npy"])
def test_target_that_cannot_be_created_is_rejected(tmp_path, array, name):
    (tmp_path / "file").write_text("a file, and no directory")
    before = tree(tmp_path)
    with pytest.raises(TargetError) as caught:
        fastvgg.plan(array, tmp_path / name, mode="caffe")
    check_error(caught.value, (tmp_path / name).parent)
    assert tree(tmp_path) == before


def test_missing_target_directory_is_rejected_with_the_mkdir_command(tmp_path, array):
    with pytest.raises(TargetError) as caught:
        fastvgg.plan(array, tmp_path / "new" / "y.npy", mode="caffe")
    check_error(caught.value, f"mkdir -p {tmp_path / 'new'}")


def test_unknown_target_format_is_rejected(tmp_path, array):
    with pytest.raises(TargetError) as caught:
        fastvgg.plan(array, tmp_path / "y.zip", mode="caffe")
    check_error(caught.value, tmp_path / "y.zip", ".npy")


def test_network_inputs_cannot_be_written_as_image_files(tmp_path, array):
    with pytest.raises(TargetError) as caught:
        fastvgg.plan(array, tmp_path / "out", mode="caffe")
    check_error(caught.value, tmp_path / "out", "which only restore writes", ".npy")


def test_channels_first_images_cannot_be_written_as_image_files(tmp_path):
    save_npy(tmp_path / "y.npy", np.zeros((5, 3, 7, 9), np.float32))
    settings = {"mode": "caffe", "direction": "restore", "layout": "NCHW"}
    with pytest.raises(TargetError, match="NCHW"):
        fastvgg.plan(tmp_path / "y.npy", tmp_path / "out", **settings)
    plan = fastvgg.plan(tmp_path / "y.npy", tmp_path / "out", out_layout="NHWC", **settings)
    assert plan.result == Header((5, 7, 9, 3), "uint8", "NHWC")


def test_relative_paths_are_resolved_when_planning(tmp_path, monkeypatch):
    save_npy(tmp_path / "x.npy", pixels(5))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    plan = plan_of("x.npy", "./elsewhere/../y.npy", mode="caffe")
    monkeypatch.chdir(tmp_path / "elsewhere")
    plan.run()
    assert (str(plan.source), str(plan.target)) == (f"{tmp_path}/x.npy", f"{tmp_path}/y.npy")
    assert (tmp_path / "y.npy").exists()


@pytest.mark.parametrize("direction", ["preprocess", "restore", "pack"])
@pytest.mark.parametrize("name", ["none.npy", "none", "none.tar", "none.h5::/images"])
def test_missing_source_is_reported_before_other_errors(tmp_path, direction, name):
    with pytest.raises(SourceError, match="does not exist"):
        fastvgg.plan(tmp_path / name, tmp_path / "y.npy", direction=direction)


def test_unfinished_source_is_reported_as_unfinished(tmp_path, array):
    unfinished = tmp_path / "y.npy"
    with pytest.raises(SimulatedCrash):
        run(
            plan_of(array, unfinished, mode="caffe", images_per_chunk=2),
            storage=InterruptedStorage(2),
        )
    for read in (
        lambda: fastvgg.plan(unfinished, tmp_path / "z.npy", direction="restore"),
        lambda: fastvgg.verify(unfinished),
        lambda: fastvgg.batches(unfinished, 2),
    ):
        with pytest.raises(SourceError) as caught:
            read()
        check_error(caught.value, unfinished, "is unfinished", "rerun the command")
