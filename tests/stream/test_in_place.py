"""In-place conversion: correct bytes, rejections, crashes and resumption."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

import fastvgg
from fastvgg import oracle
from fastvgg.errors import ResumeError, SourceError, StoppedError, TargetError, UsageError
from fastvgg.storage import file_systems
from fastvgg.storage.file_systems import file_system_type, is_network_file_system
from fastvgg.storage.local import Storage
from fastvgg.storage.location import temporary_path
from fastvgg.stream import planner
from fastvgg.stream.info import info
from fastvgg.stream.journal import journal_path
from fastvgg.stream.manifest import Provenance, manifest_path, read_manifest
from fastvgg.stream.plan import RUN_BYTES
from fastvgg.stream.redo_log_reader import read_header_to_resume, read_redo_log_header
from fastvgg.transform import Transform
from tests.helpers.batches import FLOATS, KERAS_MODES
from tests.helpers.damage import line_with_checksum
from tests.helpers.datasets_on_disk import (
    check_error,
    names_in,
    npy_bytes,
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
from tests.helpers.samples import parts
from tests.helpers.tar_on_disk import png, save_tar


def save_floats(path, dtype="float32", layout="NHWC", images=11):
    """Save images as floats; return them."""
    batch = pixels(images)
    batch = batch if layout == "NHWC" else np.ascontiguousarray(batch.transpose(0, 3, 1, 2))
    x = oracle.apply(Transform("identity", layout=layout, dtype=dtype), batch)
    save_npy(path, x)
    return x


def convert_in_place(path, *, storage=None, **settings):
    return run(plan_of(path, None, in_place=True, **settings), storage=storage)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "x.npy"
    save_floats(path)
    return path


@pytest.fixture
def unfinished(file):
    """A file of which two chunks of six are done."""
    with pytest.raises(SimulatedCrash):
        convert_in_place(file, mode="caffe", images_per_chunk=2, storage=InterruptedStorage(2))
    assert read_redo_log_header(file).chunks == 6
    return file


def expected_of(path, mode="caffe"):
    x = pixels(11).astype(np.float32)
    return oracle.apply(Transform(mode), x)


@pytest.mark.parametrize("images_per_chunk", [1, 4, 11])
@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
@pytest.mark.parametrize("dtype", [name for name in FLOATS if name != "bfloat16"])
@pytest.mark.parametrize("mode", KERAS_MODES)
def test_in_place_conversion_matches_oracle_and_round_trips(
    tmp_path, mode, dtype, layout, images_per_chunk
):
    path = tmp_path / "x.npy"
    x = save_floats(path, dtype, layout)
    header, inode = path.read_bytes()[: -x.nbytes], path.stat().st_ino
    report = convert_in_place(path, mode=mode, layout=layout, images_per_chunk=images_per_chunk)
    assert (report.counts["images"], report.counts["failed"]) == (11, 0)
    assert report.counts["computed_chunks"] == report.counts["chunks"] == -(-11 // images_per_chunk)
    assert report.written_bytes == x.nbytes
    expected = oracle.apply(Transform(mode, layout=layout), x)
    assert path.read_bytes() == header + expected.tobytes()
    assert names_in(tmp_path) == ["x.npy", "x.npy.fastvgg.json"]
    assert fastvgg.verify(path).chunks == report.counts["chunks"]
    convert_in_place(
        path, direction="restore", images_per_chunk=images_per_chunk
    )  # the manifest knows mode and layout
    assert path.read_bytes() == header + x.tobytes()
    assert path.stat().st_ino == inode
    assert read_manifest(path).job.transform.direction == "restore"


def test_interrupted_conversion_in_place_keeps_the_numbers_of_cls_entries(tmp_path):
    image, path = png(pixels(1)[0]), tmp_path / "x.npy"
    members = [
        (f"{number}/x.{suffix}", content)
        for number in (3, 11, 10)
        for suffix, content in (("png", image), ("cls", b"%d" % number))
    ]
    archive = save_tar(tmp_path / "a.tar", members)
    plan_of(archive, path, mode="identity", dtype="float32").run()
    plan_of(path, None, in_place=True, direction="restore", dtype="float32").run()
    options = {"mode": "caffe", "images_per_chunk": 1}
    with pytest.raises(SimulatedCrash):
        convert_in_place(path, storage=InterruptedStorage(2), **options)
    convert_in_place(path, **options)
    (batch,) = fastvgg.batches(path, 9)
    assert batch.labels.tolist() == [3, 11, 10]


@pytest.mark.parametrize("threads", [1, 3])
def test_in_place_conversion_is_correct_for_large_images_and_any_backend(
    tmp_path, backend, threads
):
    path = tmp_path / "x.npy"
    x = pixels(7, height=61, width=43).astype(np.float32)  # 31,476 bytes an image
    save_npy(path, x)
    convert_in_place(path, mode="torch", images_per_chunk=2, backend=backend, threads=threads)
    assert np.load(path).tobytes() == oracle.apply(Transform("torch"), x).tobytes()


def test_resumed_in_place_run_matches_an_uninterrupted_one(unfinished):
    plan = plan_of(unfinished, None, in_place=True, mode="caffe")
    assert (plan.committed_chunks, plan.chunks, plan.chunk_images) == (2, 6, 2)
    report = run(plan)
    assert report.counts["computed_chunks"] == 4
    assert np.load(unfinished).tobytes() == expected_of(unfinished).tobytes()
    assert names_in(unfinished.parent) == ["x.npy", "x.npy.fastvgg.json"]
    fastvgg.verify(unfinished)


def test_in_place_restore_resumes_without_the_mode(file):
    convert_in_place(file, mode="torch")
    with pytest.raises(SimulatedCrash):
        convert_in_place(
            file, direction="restore", images_per_chunk=2, storage=InterruptedStorage(3)
        )
    manifest_path(file).unlink()  # it describes the content before the run
    convert_in_place(file, direction="restore")
    assert np.load(file).tobytes() == pixels(11).astype(np.float32).tobytes()


def test_in_place_conversion_is_never_applied_twice(file):
    convert_in_place(file, mode="caffe")
    before = tree(file.parent)
    for _ in range(2):
        with pytest.raises(SourceError) as caught:
            convert_in_place(file, mode="caffe")
        check_error(caught.value, file, "already preprocessed", "caffe")
    manifest_path(file).unlink()  # now only the values show it
    with pytest.raises(SourceError) as caught:
        convert_in_place(file, mode="caffe")
    check_error(caught.value, file, "already preprocessed")
    assert file.read_bytes() == before[b"x.npy"]


@pytest.mark.parametrize("kind", ["file", "unfinished"])
def test_stale_plan_changes_nothing_after_another_run_finished(request, kind):
    file = request.getfixturevalue(kind)
    late = plan_of(file, None, in_place=True, mode="caffe")
    convert_in_place(file, mode="caffe")
    before = tree(file.parent)
    with pytest.raises(SourceError, match="has changed since"):
        run(late)
    assert tree(file.parent) == before


def test_file_locked_by_another_process_is_rejected_and_unchanged(file):
    before = tree(file.parent)
    plan = plan_of(file, None, in_place=True, mode="caffe")
    storage = Storage()
    locked = storage.open(file)
    assert storage.lock(locked)
    with pytest.raises(TargetError) as caught:
        run(plan)
    storage.close(locked)
    check_error(caught.value, file, "another process", "info")
    assert tree(file.parent) == before


def assert_rejected(error_type, path, *words, **settings):
    before = tree(path.parent)
    with pytest.raises(error_type) as caught:
        convert_in_place(path, mode="caffe", **settings)
    check_error(caught.value, path, *words)
    assert tree(path.parent) == before


FOREIGN = [".fastvgg-journal", ".fastvgg-journal.tmp", ".fastvgg.json.tmp"]


@pytest.mark.parametrize("suffix", FOREIGN)
def test_foreign_file_with_the_name_of_the_journal_is_rejected(file, suffix):
    file.with_name(f"{file.name}{suffix}").write_text("precious")
    for restart in (False, True):
        assert_rejected(TargetError, file, f"{suffix} exists", "move it away", restart=restart)


@pytest.mark.parametrize("suffix", FOREIGN)
def test_foreign_journal_file_created_after_planning_is_rejected(file, suffix):
    plan = plan_of(file, None, in_place=True, mode="caffe")
    file.with_name(f"{file.name}{suffix}").write_text("precious")
    before = tree(file.parent)
    with pytest.raises(TargetError, match=f"{suffix} exists, but"):
        run(plan)
    assert tree(file.parent) == before


def test_redo_log_of_another_format_version_is_rejected_and_kept(file):
    with pytest.raises(SimulatedCrash):
        run(plan_of(file, None, in_place=True, mode="caffe"), storage=InterruptedStorage(1))
    journal = journal_path(file)
    line, rest = journal.read_bytes().split(b"\n", 1)
    fields = json.loads(line[17:])
    for version in (fields["fastvgg-in-place"] - 1, fields["fastvgg-in-place"] + 1):
        text = json.dumps({**fields, "fastvgg-in-place": version}).encode()
        journal.write_bytes(line_with_checksum(text) + rest)
        assert_rejected(
            ResumeError, file, f"format version {version}", "the fastvgg version that started it"
        )


def test_links_and_sparse_files_are_rejected(file):
    link = file.with_name("link.npy")
    link.symlink_to(file)
    assert_rejected(TargetError, link, "symbolic link", str(file))
    link.unlink()
    os.link(file, link)
    assert_rejected(TargetError, file, "2 hard links")
    link.unlink()
    batch = np.zeros((64, 128, 128, 3), np.float32)
    save_npy(file, batch)
    with file.open("r+b") as stream:
        stream.truncate(128)
        stream.truncate(128 + batch.nbytes)
    assert_rejected(TargetError, file, str(128 + batch.nbytes), "holes")


def test_network_file_system_is_rejected(file, monkeypatch):
    for system in ("nfs4", "cifs", "fuse.sshfs", "9p"):
        monkeypatch.setattr(file_systems, "file_system_type", lambda path, system=system: system)
        assert_rejected(TargetError, file, system, "another machine")
    monkeypatch.setattr(file_systems, "file_system_type", lambda path: "")  # nobody knows
    convert_in_place(file, mode="caffe")


def test_file_system_types_are_detected(tmp_path):
    assert file_system_type(Path("/proc/self/stat")) == "proc"
    assert file_system_type(Path("/proc")) == "proc"
    assert file_system_type(Path("/dev/shm")) == "tmpfs"  # noqa: S108
    assert not any(
        map(is_network_file_system, ("", "ext4", "tmpfs", "xfs", "btrfs", "fuseblk", "overlay"))
    )
    assert all(
        map(is_network_file_system, ("nfs", "nfs4", "smb3", "ceph", "fuse.glusterfs", "lustre"))
    )


def test_read_only_file_or_directory_is_rejected(file):
    source = f"""
from tests.helpers.datasets_on_disk import drop_permission_override
import fastvgg
drop_permission_override()
try:
    fastvgg.plan({str(file)!r}, mode="caffe", in_place=True)
except fastvgg.errors.TargetError as error:
    print(error.problem)
"""
    with permissions(file, 0o444):
        assert stdout_of(source) == f"{file} is not writable"
    with permissions(file.parent, 0o555):
        assert stdout_of(source) == f"{file.parent} is not writable"


def test_dtype_layout_or_kind_change_is_rejected_in_place(tmp_path, file):
    assert_rejected(UsageError, file, "float32", "float16", "a target", dtype="float16")
    assert_rejected(SourceError, file, "axis", layout="NCHW")
    integers = save_npy(tmp_path / "integers.npy", pixels(3))
    assert_rejected(UsageError, integers, "uint8", "float32", "a target")
    y = tmp_path / "y.npy"
    save_floats(y, "float64")
    convert_in_place(y, mode="caffe")
    with pytest.raises(UsageError, match="give a target"):
        convert_in_place(y, direction="restore", dtype="uint8")
    with pytest.raises(UsageError, match="give a target"):
        convert_in_place(file, mode="caffe", out_layout="NCHW")
    folder = tmp_path / "photos"
    folder.mkdir()
    with pytest.raises(SourceError):
        convert_in_place(folder, mode="caffe")


def test_target_and_in_place_are_mutually_exclusive(file):
    with pytest.raises(UsageError, match="a target and in_place=True"):
        fastvgg.plan(file, file.with_name("y.npy"), mode="caffe", in_place=True)
    with pytest.raises(UsageError, match="no target"):
        fastvgg.plan(file, mode="caffe")


def test_truncated_file_is_rejected_and_not_extended_in_place(file):
    content = file.read_bytes()
    for missing in (1, 4, 756):
        file.write_bytes(content[:-missing])
        assert_rejected(SourceError, file, str(len(content) - missing))


@pytest.mark.parametrize("chunk", range(6))
def test_file_truncated_during_an_in_place_run_stops_it(tmp_path, chunk):
    path = tmp_path / "x.npy"
    x = pixels(12, 61, 67).astype(np.float32)
    save_npy(path, x)
    intact, converted = path.read_bytes(), oracle.apply(Transform("caffe"), x).tobytes()
    committed = 0

    def truncate(_progress):
        nonlocal committed
        committed += 1
        if committed == chunk + 1:
            os.truncate(path, 4096)

    plan = plan_of(path, None, in_place=True, mode="caffe", images_per_chunk=2)
    if chunk == 5:  # every chunk is in the file
        with pytest.raises(StoppedError, match="truncated by another process") as caught:
            run(plan, truncate)
        assert "restart=True" in caught.value.remedy
    else:
        with pytest.raises(StoppedError, match="truncated"):
            run(plan, truncate)
    assert not manifest_path(path).exists()
    path.rename(tmp_path / "damaged.npy")
    path.write_bytes(intact)
    run(plan_of(path, None, in_place=True, mode="caffe", restart=True))
    assert path.read_bytes()[128:] == converted


def test_unfinished_file_is_rejected_by_other_commands(unfinished):
    before = tree(unfinished.parent)
    finish = f"fastvgg.plan({str(unfinished)!r}, in_place=True).run()"
    with pytest.raises(SourceError) as caught:
        fastvgg.plan(unfinished, unfinished.with_name("y.npy"), mode="caffe")
    check_error(caught.value, unfinished, "partly converted", finish)
    with pytest.raises(SourceError) as caught:
        fastvgg.verify(unfinished)
    check_error(caught.value, unfinished, "partly converted", finish)
    known = info(unfinished)
    assert (known["state"], known["committed_chunks"], known["chunks"]) == (
        "unfinished in place",
        2,
        6,
    )
    assert finish in known["next"]
    assert tree(unfinished.parent) == before


def test_unfinished_file_cannot_be_restarted_or_converted_otherwise(unfinished):
    before = tree(unfinished.parent)
    with pytest.raises(ResumeError) as caught:
        convert_in_place(unfinished, mode="caffe", restart=True)
    check_error(caught.value, unfinished, "cannot start over", "in_place=True")
    for other in ({"mode": "tf"}, {"mode": "caffe", "direction": "restore"}):
        with pytest.raises(ResumeError) as caught:
            convert_in_place(unfinished, **other)
        check_error(caught.value, unfinished, "with other settings", "then", "now")
    assert tree(unfinished.parent) == before
    convert_in_place(unfinished, mode="caffe")
    assert np.load(unfinished).tobytes() == expected_of(unfinished).tobytes()


def interrupted(path, commits):
    """Save 22 images, and convert them in place until some of 11 chunks are committed."""
    save_floats(path, images=22)
    original = path.read_bytes()
    with pytest.raises(SimulatedCrash):
        convert_in_place(
            path, mode="caffe", images_per_chunk=2, storage=InterruptedStorage(commits)
        )
    if not commits:  # the log is complete, but has no name yet
        temporary_path(journal_path(path)).replace(journal_path(path))
    return original


def assert_converted(path):
    expected = oracle.apply(Transform("caffe"), pixels(22).astype(np.float32))
    assert np.load(path).tobytes() == expected.tobytes()
    assert names_in(path.parent) == [path.name, f"{path.name}.fastvgg.json"]
    fastvgg.verify(path)


def overwrite(path, content):
    """Give a file other contents, and keep its inode, as `cp` does."""
    with path.open("r+b") as stream:
        stream.write(content)


@pytest.mark.parametrize("commits", [0, 1, 2, 4, 5, 8, 11])
def test_original_restored_over_an_unfinished_file_is_converted_once(tmp_path, commits):
    path = tmp_path / "x.npy"
    original = interrupted(path, commits)
    overwrite(path, original)
    before = tree(tmp_path)
    try:
        convert_in_place(path, mode="caffe")
    except ResumeError as error:
        check_error(error, path, "as it was before", "restart=True")
        assert tree(tmp_path) == before
        assert commits > 3  # else every converted chunk is in the redo log, too
        convert_in_place(path, mode="caffe", restart=True)
    assert_converted(path)


@pytest.mark.parametrize("commits", [1, 4, 8])
def test_restart_converts_a_restored_original_once(tmp_path, commits):
    path = tmp_path / "x.npy"
    original = interrupted(path, commits)
    for content in (original, original[:-9] + b"edited at"):
        overwrite(path, content)
        convert_in_place(path, mode="caffe", restart=True)
        assert read_redo_log_header(path) is None
        manifest_path(path).unlink()
        path.unlink()
        interrupted(path, commits)
    overwrite(path, original)
    convert_in_place(path, mode="caffe", restart=True)
    assert_converted(path)


def test_backup_of_another_time_is_rejected_and_kept(tmp_path):
    path = tmp_path / "x.npy"
    interrupted(path, 4)
    partly = path.read_bytes()
    path.unlink()
    journal_path(path).unlink()
    interrupted(path, 8)
    overwrite(path, partly)
    before = tree(tmp_path)
    for restart, words in ((False, ["chunk", "differs"]), (True, ["cannot start over"])):
        with pytest.raises(ResumeError) as caught:
            convert_in_place(path, mode="caffe", restart=restart)
        check_error(caught.value, path, *words)
        assert tree(tmp_path) == before


def test_edit_of_a_converted_chunk_is_detected(tmp_path):
    path = tmp_path / "x.npy"
    interrupted(path, 8)
    content = bytearray(path.read_bytes())
    content[5000] ^= 1
    path.write_bytes(content)
    before = tree(tmp_path)
    with pytest.raises(ResumeError) as caught:
        convert_in_place(path, mode="caffe")
    check_error(caught.value, path, "chunk 3 differs")
    assert tree(tmp_path) == before


@pytest.mark.parametrize("commits", [0, 1, 2, 3, 4, 7, 10, 11])
@pytest.mark.parametrize("name", ["x.npy", "renamed.npy"])
def test_unfinished_file_and_journal_moved_together_resume(tmp_path, name, commits):
    path = tmp_path / "x.npy"
    interrupted(path, commits)
    (tmp_path / "moved").mkdir()
    moved = tmp_path / "moved" / name
    shutil.copy(path, moved)
    shutil.copy(journal_path(path), journal_path(moved))
    path.unlink()
    plan = plan_of(moved, None, in_place=True, mode="caffe")
    assert plan.committed_chunks == commits
    report = run(plan)
    assert report.counts["computed_chunks"] == 11 - commits
    assert_converted(moved)
    assert read_manifest(moved).job.source == str(moved)


def test_moved_file_resumes_whose_chunk_was_torn(tmp_path):
    path = tmp_path / "x.npy"
    original = interrupted(path, 1)
    expected = oracle.apply(Transform("caffe"), pixels(22).astype(np.float32)).tobytes()
    path.unlink()
    path.write_bytes(original[:128] + expected[:700] + original[828:])
    before = tree(tmp_path)
    with pytest.raises(ResumeError, match="cannot start over"):
        convert_in_place(path, mode="caffe", restart=True)
    assert tree(tmp_path) == before
    convert_in_place(path, mode="caffe")
    assert_converted(path)


@pytest.mark.parametrize("keeps_inode", [False, True])
@pytest.mark.parametrize("commits", [1, 3, 4, 8])
def test_redo_log_is_not_applied_to_another_file(tmp_path, commits, keeps_inode):
    path = tmp_path / "x.npy"
    original = interrupted(path, commits)
    other = npy_bytes(pixels(22, seed=9).astype(np.float32))
    assert len(other) == len(original)
    if not keeps_inode:
        path.unlink()
        (tmp_path / "taken").touch()  # the inode number
        path.touch()
    overwrite(path, other)
    before = tree(tmp_path)
    for restart, words in ((False, ["differs", "move that journal away"]), (True, ["start over"])):
        with pytest.raises(ResumeError) as caught:
            convert_in_place(path, mode="caffe", restart=restart)
        check_error(caught.value, path, *words)
        assert tree(tmp_path) == before
    journal_path(path).rename(tmp_path / "journal")
    convert_in_place(path, mode="caffe")
    expected = oracle.apply(Transform("caffe"), pixels(22, seed=9).astype(np.float32))
    assert np.load(path).tobytes() == expected.tobytes()


def test_redo_log_is_not_applied_to_a_file_of_another_length(tmp_path):
    path = tmp_path / "x.npy"
    interrupted(path, 4)
    save_floats(path, images=23)
    assert_rejected(ResumeError, path, "bytes", "move that journal away")


def test_file_converted_elsewhere_before_the_first_commit_is_not_converted_twice(tmp_path):
    path = tmp_path / "x.npy"
    interrupted(path, 0)
    overwrite(path, npy_bytes(oracle.apply(Transform("caffe"), pixels(22).astype(np.float32))))
    assert_rejected(SourceError, path, "already preprocessed")


@pytest.mark.parametrize("damaged", range(4))
def test_restart_needs_the_record_of_every_converted_chunk(tmp_path, damaged):
    path = tmp_path / "x.npy"
    original = interrupted(path, 11)
    overwrite(path, original)
    header = read_redo_log_header(path)
    with journal_path(path).open("r+b") as journal:
        journal.seek(header.record_offset(damaged))
        journal.write(b"0" * 16)
    before = tree(tmp_path)
    with pytest.raises(ResumeError, match="cannot start over"):
        convert_in_place(path, mode="caffe", restart=True)
    assert tree(tmp_path) == before


def test_check_of_converted_chunks_is_reported(tmp_path):
    path = tmp_path / "x.npy"
    interrupted(path, 8)
    reports = []
    run(plan_of(path, None, in_place=True, mode="caffe"), reports.append)
    assert {at.total_images for at in reports} == {22}
    images = [at.images for at in reports]
    assert images == sorted(images)
    assert images[0] == 2
    assert images[-1] == 22


def test_copy_of_an_unfinished_file_cannot_be_restarted(unfinished):
    copy = unfinished.with_name("copy.npy")
    copy.write_bytes(unfinished.read_bytes())
    copy.rename(unfinished)  # like a restored backup: the same bytes, another inode
    before = tree(unfinished.parent)
    with pytest.raises(ResumeError) as caught:
        convert_in_place(unfinished, mode="caffe", restart=True)
    check_error(caught.value, unfinished, "cannot start over")
    assert tree(unfinished.parent) == before


def test_redo_log_header_does_not_record_the_device_number(unfinished):
    kept = {"job", "chunk_images", "run", "inode", "file_bytes"}
    fields = dataclasses.fields(read_redo_log_header(unfinished))
    assert {field.name for field in fields} == kept


def test_resume_requires_the_memory_of_the_first_run(unfinished):
    plan = plan_of(unfinished, None, in_place=True, mode="caffe")
    with pytest.raises(TargetError) as caught:
        plan_of(unfinished, None, in_place=True, mode="caffe", memory=plan.projected_bytes - 1)
    check_error(caught.value, unfinished, "memory")


def test_truncated_redo_log_is_rejected(unfinished):
    journal = journal_path(unfinished)
    content = journal.read_bytes()
    for length in (len(content) - 1, len(content) // 2, 5000):
        journal.write_bytes(content[:length])
        before = tree(unfinished.parent)
        with pytest.raises(ResumeError) as caught:
            convert_in_place(unfinished, mode="caffe")
        check_error(caught.value, journal)
        assert tree(unfinished.parent) == before


@parts(8)
@pytest.mark.parametrize("stage", ["committed", "written", "finished"])
def test_damaged_redo_log_resumes_correctly_or_is_rejected(tmp_path, stage, part):
    """Flip bits outside of the padding at three stages; the result is never wrong."""
    path = tmp_path / "x.npy"
    save_floats(path)
    place = tmp_path / "place"
    place.mkdir()
    with pytest.raises(SimulatedCrash):
        convert_in_place(path, mode="caffe", images_per_chunk=2, storage=StoppingStorage(stage))
    header = read_redo_log_header(path)
    content, journal = path.read_bytes(), journal_path(path).read_bytes()
    checkpoint = header.checkpoint_offset(0)
    right, refusals = 0, 0
    offsets = [at for at in range(len(journal)) if journal[at]]
    damages = [*offsets[::31], *range(checkpoint, checkpoint + 100, 5)]
    for at in damages[part::8]:
        damaged = bytearray(journal)
        damaged[at] ^= 1 << at % 8
        with path.open("r+b") as stream:
            stream.write(content)
        journal_path(path).write_bytes(damaged)
        manifest_path(path).unlink(missing_ok=True)
        try:
            convert_in_place(path, mode="caffe")
        except (ResumeError, SourceError) as error:
            check_error(error, path)
            refusals += 1
            assert path.read_bytes() == content
            continue
        right += 1
        assert np.load(path).tobytes() == expected_of(path).tobytes(), at
    assert right > refusals


class StoppingStorage(Storage):
    """Real storage that crashes after a chunk is committed, after it is written, or at the end."""

    def __init__(self, stage):
        super().__init__()
        self._stage = stage
        self._synced = 0

    def sync(self, file):
        super().sync(file)
        self._synced += file.path.name.endswith("-journal")
        if self._stage == "committed" and self._synced == 5:
            raise SimulatedCrash

    def write(self, file, data, offset):
        super().write(file, data, offset)
        if self._stage == "written" and self._synced == 5 and file.path.name == "x.npy":
            raise SimulatedCrash

    def write_atomic(self, path, data):
        raise SimulatedCrash


def test_index_is_kept_after_an_in_place_run(tmp_path):
    photos = tmp_path / "photos"
    save_images(photos, pixels(5))
    y = tmp_path / "y.npy"
    plan_of(photos, y, mode="caffe").run()
    index = (tmp_path / "y.npy.index.csv").read_bytes()
    convert_in_place(y, direction="restore")
    assert (tmp_path / "y.npy.index.csv").read_bytes() == index
    assert np.load(y).dtype == np.float32


@pytest.mark.parametrize("commits", [0, 1, 3])
def test_failed_images_stay_rows_of_zeros(tmp_path, commits):
    save_images(tmp_path / "photos", pixels(6))
    for name in ("00", "04"):  # rows 0 and 2
        (tmp_path / "photos" / "a" / f"{name}.png").write_bytes(b"no image")
    path = tmp_path / "y.npy"
    plan_of(tmp_path / "photos", path, mode="caffe", size=(7, 9)).run()
    expected = oracle.apply(Transform("caffe", "restore", dtype="float32"), np.load(path))
    expected[[0, 2]] = 0
    settings = {"direction": "restore", "dtype": "float32", "images_per_chunk": 2}
    with pytest.raises(SimulatedCrash):
        convert_in_place(path, **settings, storage=InterruptedStorage(commits))
    report = convert_in_place(path, **settings)
    assert np.load(path).tobytes() == expected.tobytes()
    assert report.counts["failed"] == 2
    assert [failure.row for failure in report.failures] == [0, 2]
    assert fastvgg.verify(path).failed == 2


def test_memory_and_disk_space_are_checked_when_planning(file, monkeypatch):
    plan = plan_of(file, None, in_place=True, mode="caffe", images_per_chunk=2)
    image_bytes = plan.header.image_bytes
    assert plan.projected_bytes == RUN_BYTES + 2 * 3 * image_bytes
    assert "twice, in place" in str(plan)
    usage = shutil.disk_usage(file.parent)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert_rejected(TargetError, file, "1000 bytes", "memory=")


def test_run_finished_concurrently_during_planning_is_not_repeated(file, monkeypatch):
    class ReadBeforeConcurrentRun(Provenance):
        @classmethod
        def read(cls, location, memory_bytes):
            found = Provenance.read(location, memory_bytes)
            monkeypatch.setattr(planner, "Provenance", Provenance)
            convert_in_place(file, mode="caffe")
            return found

    monkeypatch.setattr(planner, "Provenance", ReadBeforeConcurrentRun)
    with pytest.raises(SourceError) as caught:
        convert_in_place(file, mode="caffe")
    check_error(caught.value, file, "already preprocessed")
    assert np.load(file).tobytes() == expected_of(file).tobytes()


def test_run_started_concurrently_during_planning_requires_a_new_plan(file, monkeypatch):
    def read_before_concurrent_run(path, *, restart):
        found = read_header_to_resume(path, restart=restart)
        monkeypatch.setattr(planner, "read_header_to_resume", read_header_to_resume)
        with pytest.raises(SimulatedCrash):
            convert_in_place(file, mode="caffe", images_per_chunk=2, storage=InterruptedStorage(2))
        return found

    os.utime(file, ns=(1, 1))  # so that a write changes the mtime
    monkeypatch.setattr(planner, "read_header_to_resume", read_before_concurrent_run)
    late = plan_of(file, None, in_place=True, mode="caffe")
    with pytest.raises(SourceError, match="has changed since"):
        run(late)
    convert_in_place(file, mode="caffe", images_per_chunk=2)
    assert np.load(file).tobytes() == expected_of(file).tobytes()
