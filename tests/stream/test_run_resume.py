"""Runs that resume, restart, find a target, or run concurrently."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys

import pytest

import fastvgg
from fastvgg.datasets.base import ImageRecord
from fastvgg.datasets.index import INDEX_HEADER, format_records, index_path
from fastvgg.errors import ResumeError, SourceError, StoppedError, TargetError
from fastvgg.storage.local import Storage
from fastvgg.stream.journal import journal_path
from fastvgg.stream.manifest import manifest_path, read_manifest
from fastvgg.transform import Mode
from tests.helpers.checkout import checkout_environment
from tests.helpers.datasets_on_disk import (
    check_error,
    commits_in,
    data_tree,
    images_in,
    names_in,
    network_inputs,
    npy_bytes,
    pixels,
    plan_of,
    python,
    save_images,
    save_npy,
    tree,
)
from tests.helpers.faults import InterruptedStorage, SimulatedCrash
from tests.helpers.runs import (
    folder_with_failures,
    interrupt_run,
    preprocessed,
    run,
    run_with_event,
)

# Killed and resumed runs

KILL_SCRIPT = """
import os, signal, sys
from tests.helpers.datasets_on_disk import plan_of
from tests.helpers.faults import InterruptedStorage
from tests.helpers.runs import run
source, target, direction, commits = sys.argv[1:]
def kill():
    os.kill(os.getpid(), signal.SIGKILL)
mode = "caffe" if direction == "preprocess" else None
plan = plan_of(source, target, mode=mode, direction=direction, images_per_chunk=2, threads=2)
run(plan, storage=InterruptedStorage(int(commits), end=kill))
"""


@pytest.mark.parametrize("commits", [1, 2, 5, 6])
@pytest.mark.parametrize("kind", ["array", "folder", "files"])
def test_killed_run_resumes_after_its_last_commit(tmp_path, array, photos, kind, commits):
    source, name, direction = array, "y.npy", "preprocess"
    settings = {"images_per_chunk": 2, "mode": "caffe"}
    if kind == "folder":
        source = photos
    elif kind == "files":
        source, name, direction = tmp_path / "inputs.npy", "out", "restore"
        plan_of(photos, source, mode="caffe").run()
        settings = {"images_per_chunk": 2, "direction": "restore"}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    whole.mkdir()
    cut.mkdir()
    plan_of(source, whole / name, **settings).run()

    died = python(KILL_SCRIPT, source, cut / name, direction, str(commits))
    assert died.returncode == -signal.SIGKILL, died.stderr
    assert not (cut / name).exists()
    assert not manifest_path(cut / name).exists()
    resumed = plan_of(source, cut / name, **settings)
    assert resumed.committed_chunks == commits
    reports = []
    report = resumed.run(reports.append)
    assert report.counts["chunks"] == 6
    assert report.counts["computed_chunks"] == 6 - commits
    assert len([at for at in reports if at.computed_images]) == 6 - commits
    checked = [at.images for at in reports if not at.computed_images]
    assert checked == sorted(checked)
    assert checked[-1] == min(11, 2 * commits)
    assert data_tree(cut) == data_tree(whole)


def test_run_whose_progress_callback_raised_resumes(tmp_path, array):
    target = tmp_path / "y.npy"

    def fail(progress):
        if progress.computed_images:
            raise RuntimeError("a bug in the caller")

    committed = 0
    while committed < 6:
        plan = plan_of(array, target, mode="caffe", images_per_chunk=2)
        assert plan.committed_chunks == committed
        with pytest.raises(RuntimeError, match="a bug in the caller"):
            plan.run(fail)
        # The reported chunk, and the two submitted after it.
        assert commits_in(target) - committed == 3
        committed = commits_in(target)
    report = plan_of(array, target, mode="caffe", images_per_chunk=2).run()
    assert report.counts["computed_chunks"] == 0
    assert target.read_bytes() == npy_bytes(network_inputs(pixels(11), "caffe"))


def test_resumed_run_keeps_its_chunk_size(tmp_path, array):
    target = tmp_path / "y.npy"
    python(KILL_SCRIPT, array, target, "preprocess", "2")
    plan = plan_of(array, target, mode="caffe", images_per_chunk=5)
    assert plan.chunk_images == 2
    assert plan.run().counts["computed_chunks"] == 4
    assert target.read_bytes() == npy_bytes(network_inputs(pixels(11), "caffe"))
    fastvgg.verify(target, full=True)


# What another command finds


@pytest.mark.parametrize(
    ("now", "words"),
    [
        ({"mode": "tf"}, ["mode='caffe' then, mode='tf' now"]),
        ({"mode": "caffe", "dtype": "float16"}, ["dtype='float32' then, dtype='float16' now"]),
        (
            {"mode": "caffe", "out_layout": "NCHW"},
            ["out_layout='NHWC' then, out_layout='NCHW' now"],
        ),
    ],
)
def test_unfinished_run_with_other_settings_is_rejected_with_both(tmp_path, array, now, words):
    target = interrupt_run(array, tmp_path / "y.npy", mode="caffe")
    before = tree(tmp_path)
    with pytest.raises(ResumeError) as caught:
        plan_of(array, target, **now)
    check_error(caught.value, target, *words, "restart=True")
    assert tree(tmp_path) == before
    plan_of(array, target, restart=True, **now).run()
    expected = network_inputs(
        pixels(11),
        now["mode"],
        dtype=now.get("dtype", "float32"),
        out_layout=now.get("out_layout", "NHWC"),
    )
    assert target.read_bytes() == npy_bytes(expected)
    assert not journal_path(target).exists()


def test_unfinished_run_with_another_size_is_rejected_with_both(tmp_path, photos):
    target = interrupt_run(photos, tmp_path / "y.npy", mode="caffe", size=(5, 11))
    with pytest.raises(ResumeError) as caught:
        plan_of(photos, target, mode="caffe", size=(11, 5))
    check_error(caught.value, "size=(5, 11) then, size=(11, 5) now", "restart=True")
    with pytest.raises(ResumeError, match="interpolation='nearest' then, interpolation='box' now"):
        plan_of(photos, target, mode="caffe", size=(5, 11), interpolation="box")


def test_unfinished_run_of_another_source_is_rejected_with_both(tmp_path, array):
    target = interrupt_run(array, tmp_path / "y.npy", mode="caffe")
    other = save_npy(tmp_path / "other.npy", pixels(11, seed=2))
    with pytest.raises(ResumeError) as caught:
        plan_of(other, target, mode="caffe")
    check_error(caught.value, array, other, "another content of the source")


def test_unfinished_run_of_a_changed_source_is_rejected(tmp_path, array):
    target = interrupt_run(array, tmp_path / "y.npy", mode="caffe")
    save_npy(array, pixels(11, seed=2))
    os.utime(array, ns=(0, 1))
    with pytest.raises(ResumeError) as caught:
        plan_of(array, target, mode="caffe")
    check_error(caught.value, "was started before its source changed", "restart=True")
    plan_of(array, target, mode="caffe", restart=True).run()
    assert target.read_bytes() == npy_bytes(network_inputs(pixels(11, seed=2), "caffe"))


@pytest.mark.parametrize("change", [-1, -4096])
def test_truncated_partial_target_is_rejected(tmp_path, array, change):
    target = interrupt_run(array, tmp_path / "y.npy", mode="caffe")
    partial = tmp_path / "y.npy.partial"
    size = partial.stat().st_size
    os.truncate(partial, size + change)
    with pytest.raises(ResumeError) as caught:
        plan_of(array, target, mode="caffe").run()
    check_error(caught.value, partial, size, size + change, "restart")
    assert not target.exists()
    plan_of(array, target, mode="caffe", restart=True).run()
    assert target.read_bytes() == npy_bytes(network_inputs(pixels(11), "caffe"))


def test_partial_target_without_a_journal_is_rejected_and_kept(tmp_path, array):
    partial = tmp_path / "y.npy.partial"
    partial.write_text("someone's own")
    with pytest.raises(TargetError) as caught:
        plan_of(array, tmp_path / "y.npy", mode="caffe")
    check_error(caught.value, partial, "move it away")
    assert partial.read_text() == "someone's own"


@pytest.mark.parametrize("restart", [False, True])
def test_run_that_starts_while_another_is_planned_is_resumed(tmp_path, array, monkeypatch, restart):
    target, settings = tmp_path / "y.npy", {"mode": "caffe", "images_per_chunk": 2}
    first = plan_of(array, target, **settings)
    journal, partial = str(journal_path(target)), f"{target}.partial"
    os_open, lexists = os.open, os.path.lexists
    asked = []  # a journal that does not exist yet, then a partial target that does

    def note_journal(path, *arguments, **options):
        if os.fspath(path) == journal and not asked:
            asked.append(path)
        return os_open(path, *arguments, **options)

    def start_run(path):
        if os.fspath(path) == partial and len(asked) == 1:
            asked.append(path)
            with pytest.raises(SimulatedCrash):
                run(first, storage=InterruptedStorage(3))
        return lexists(path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", note_journal)
        patch.setattr(os.path, "lexists", start_run)
        plan = plan_of(array, target, **settings, restart=restart)
    assert len(asked) == 2
    assert plan.committed_chunks == (0 if restart else 3)
    plan.run()
    assert target.read_bytes() == npy_bytes(network_inputs(pixels(11), "caffe"))


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("kind", ["file", "empty file", "link", "dangling link"])
def test_foreign_target_is_rejected_and_kept(tmp_path, array, kind, restart):
    target = tmp_path / "y.npy"
    if kind == "file":
        save_npy(target, pixels(1))
    elif kind == "empty file":
        target.touch()
    else:
        save_npy(tmp_path / "other.npy", pixels(1))
        target.symlink_to("other.npy" if kind == "link" else "nowhere")
    before = tree(tmp_path)
    with pytest.raises(TargetError) as caught:
        plan_of(array, target, mode="caffe", restart=restart)
    check_error(caught.value, target, "move it away", "another name")
    assert "restart" not in str(caught.value)
    assert tree(tmp_path) == before


FOREIGN = {
    "y.npy": (
        *("", ".partial", ".index.csv", ".fastvgg-replaced", ".fastvgg.json"),
        *(".fastvgg-journal", ".fastvgg-journal.tmp", ".fastvgg.json.tmp", ".index.csv.tmp"),
    ),
    "y.h5": ("", ".partial", ".index.csv", ".fastvgg-journal", ".fastvgg.json.tmp"),
    "y.zarr": ("", "/0.bin", ".partial/0.bin", ".index.csv", ".fastvgg-journal"),
    "out": ("", "/0.png", ".partial/0.png", ".index.csv", ".fastvgg-journal"),
}


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize(
    ("target", "suffix"), [(target, suffix) for target in FOREIGN for suffix in FOREIGN[target]]
)
def test_foreign_data_is_never_replaced(tmp_path, photos, target, suffix, restart):
    source, settings = photos, {"mode": "caffe"}
    if target == "out":
        source, settings = preprocessed(tmp_path), {"direction": "restore"}
    foreign = tmp_path / (target + suffix)
    foreign.parent.mkdir(exist_ok=True)
    foreign.write_text("precious")
    before = tree(tmp_path)
    location = f"{tmp_path / target}{'::/images' if target == 'y.h5' else ''}"
    with pytest.raises((TargetError, SourceError)) as caught:
        plan_of(source, location, restart=restart, **settings)
    check_error(caught.value, foreign.parent if "/" in suffix else foreign)
    assert "restart" not in str(caught.value)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("suffix", FOREIGN["y.npy"])
def test_foreign_file_created_after_planning_is_never_replaced(tmp_path, array, suffix, restart):
    plan = plan_of(array, tmp_path / "y.npy", mode="caffe", restart=restart)
    foreign = tmp_path / f"y.npy{suffix}"
    foreign.write_text("precious")
    before = tree(tmp_path)
    with pytest.raises((TargetError, SourceError)) as caught:
        plan.run()
    check_error(caught.value, foreign)
    assert "restart" not in str(caught.value)
    assert tree(tmp_path) == before


def test_rejected_restart_leaves_the_unfinished_run_resumable(tmp_path, array):
    target = tmp_path / "y.npy"
    with pytest.raises(SimulatedCrash):
        run(plan_of(array, target, mode="caffe", images_per_chunk=2), storage=InterruptedStorage(2))
    inputs = save_npy(tmp_path / "inputs.npy", network_inputs(pixels(11), "caffe"))
    restart = plan_of(inputs, target, mode="caffe", restart=True)
    before = tree(tmp_path)
    with pytest.raises(SourceError, match="not images"):
        restart.run()
    assert tree(tmp_path) == before
    report = plan_of(array, target, mode="caffe", images_per_chunk=2).run()
    assert report.counts["computed_chunks"] == 4


def test_damaged_journal_is_kept_if_a_run_is_rejected(tmp_path, array):
    target = tmp_path / "y.npy"
    late = plan_of(array, target, mode="caffe", images_per_chunk=2)
    with pytest.raises(SimulatedCrash):
        run(plan_of(array, target, mode="caffe", images_per_chunk=2), storage=InterruptedStorage(2))
    journal = tmp_path / "y.npy.fastvgg-journal"
    content = bytearray(journal.read_bytes())
    content[100] ^= 1  # in the header line
    journal.write_bytes(content)
    before = tree(tmp_path)
    with pytest.raises(TargetError, match="restart"):
        late.run()
    assert tree(tmp_path) == before
    plan_of(array, target, mode="caffe", restart=True).run()
    assert target.read_bytes() == npy_bytes(network_inputs(pixels(11), "caffe"))


@pytest.mark.parametrize("change", [-1, 1])
def test_finished_target_changed_later_is_not_replaced(tmp_path, array, change):
    target = tmp_path / "y.npy"
    plan_of(array, target, mode="caffe").run()
    os.truncate(target, target.stat().st_size + change)
    before = tree(tmp_path)
    for restart in (False, True):
        with pytest.raises(TargetError) as caught:
            plan_of(array, target, mode="tf", restart=restart)
        check_error(caught.value, target, "move it away")
        assert "restart" not in str(caught.value)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("kind", ["empty", "full"])
def test_directory_with_the_name_of_an_array_is_rejected_before_computing(
    tmp_path, array, kind, restart
):
    (tmp_path / "y.npy").mkdir()
    if kind == "full":
        (tmp_path / "y.npy" / "keep.txt").write_text("precious")
    before = tree(tmp_path)
    with pytest.raises(TargetError) as caught:
        plan_of(array, tmp_path / "y.npy", mode="caffe", restart=restart)
    check_error(caught.value, tmp_path / "y.npy")
    assert tree(tmp_path) == before


def test_published_target_with_a_truncated_journal_is_rejected_before_writing(tmp_path, array):
    target = interrupt_run(array, tmp_path / "y.npy", mode="caffe")
    journal = journal_path(target)
    journal.write_bytes(journal.read_bytes().splitlines(keepends=True)[0])
    target.with_name("y.npy.partial").rename(target)
    before = tree(tmp_path)
    with pytest.raises(TargetError) as caught:
        plan_of(array, target, mode="caffe", images_per_chunk=2)
    check_error(caught.value, target, "not written by fastvgg")
    assert tree(tmp_path) == before


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("suffix", [".partial", ".index.csv", ".fastvgg-replaced"])
def test_empty_journal_does_not_prove_ownership(tmp_path, array, suffix, restart):
    (tmp_path / "y.npy.fastvgg-journal").touch()
    (tmp_path / f"y.npy{suffix}").write_text("precious")
    before = tree(tmp_path)
    with pytest.raises(TargetError) as caught:
        plan_of(array, tmp_path / "y.npy", mode="caffe", restart=restart)
    check_error(caught.value, tmp_path / f"y.npy{suffix}", "move it away")
    assert tree(tmp_path) == before


@pytest.mark.parametrize("temporary", [None, b"", b"garbage"])
def test_empty_journal_is_replaced_and_proves_its_temporary_name(tmp_path, array, temporary):
    (tmp_path / "y.npy.fastvgg-journal").touch()
    if temporary is not None:
        (tmp_path / "y.npy.fastvgg-journal.tmp").write_bytes(temporary)
    plan_of(array, tmp_path / "y.npy", mode="caffe").run()
    assert names_in(tmp_path) == ["x.npy", "y.npy", "y.npy.fastvgg.json"]


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("suffix", [".fastvgg-journal", ".fastvgg-journal.tmp"])
@pytest.mark.parametrize("content", [b"42", b"deadbeef" * 9, bytes(64) + b"data", bytes(100)])
def test_foreign_file_that_resembles_a_journal_is_kept(tmp_path, array, suffix, restart, content):
    (tmp_path / f"y.npy{suffix}").write_bytes(content)
    before = tree(tmp_path)
    with pytest.raises(TargetError) as caught:
        plan_of(array, tmp_path / "y.npy", mode="caffe", restart=restart)
    check_error(caught.value, tmp_path / f"y.npy{suffix}", "move it away")
    assert tree(tmp_path) == before


def test_rejected_run_removes_what_a_crash_left_of_a_journal(tmp_path, array):
    plan = plan_of(array, tmp_path / "y.npy", mode="caffe")
    (tmp_path / "y.npy").write_text("precious")
    before = tree(tmp_path)
    for suffix in ("", ".tmp"):
        (tmp_path / f"y.npy.fastvgg-journal{suffix}").touch()
    with pytest.raises(TargetError):
        plan.run()
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    "suffix", [".partial", ".fastvgg-replaced", ".index.csv.tmp", ".fastvgg.json.tmp"]
)
def test_retry_keeps_foreign_files_with_names_of_sidecars(tmp_path, suffix):
    folder_with_failures(tmp_path / "some")
    plan_of(tmp_path / "some", tmp_path / "y.npy", mode="caffe").run()
    (tmp_path / f"y.npy{suffix}").write_text("precious")
    before = tree(tmp_path)
    with pytest.raises(TargetError) as caught:
        plan_of(tmp_path / "some", tmp_path / "y.npy", mode="caffe", retry_failed=True)
    check_error(caught.value, tmp_path / f"y.npy{suffix}", "move it away")
    assert tree(tmp_path) == before


class CrashBeforeManifestStorage(Storage):
    def write_atomic(self, path, buffers):
        raise SimulatedCrash


@pytest.mark.parametrize("restart", [False, True])
def test_file_replaced_after_publish_is_never_replaced(tmp_path, array, restart):
    target = tmp_path / "y.npy"
    with pytest.raises(SimulatedCrash):
        run(plan_of(array, target, mode="caffe"), storage=CrashBeforeManifestStorage())
    assert target.exists()
    target.write_text("precious")
    with pytest.raises(TargetError if restart else ResumeError, match="8 bytes"):
        plan_of(array, target, mode="caffe", restart=restart).run()
    assert target.read_text() == "precious"


def test_empty_directory_can_become_the_target(tmp_path, photos):
    stored, back = tmp_path / "y.npy", tmp_path / "back"
    plan_of(photos, stored, mode="caffe").run()
    back.mkdir()
    plan_of(stored, back, direction="restore").run()
    assert sorted(images_in(back)) == sorted(images_in(photos))


@pytest.mark.parametrize("restart", [False, True])
def test_foreign_directory_is_never_replaced(tmp_path, array, restart):
    stored, back = tmp_path / "y.npy", tmp_path / "back"
    plan_of(array, stored, mode="caffe").run()
    back.mkdir()
    (back / "keep.txt").write_text("precious")
    before = tree(tmp_path)
    with pytest.raises(TargetError) as caught:
        plan_of(stored, back, direction="restore", restart=restart)
    check_error(caught.value, back)
    assert tree(tmp_path) == before


def test_restart_replaces_a_directory_written_by_fastvgg(tmp_path, array):
    stored, back = tmp_path / "y.npy", tmp_path / "back"
    plan_of(array, stored, mode="caffe").run()
    plan_of(stored, back, direction="restore").run()
    report = plan_of(stored, back, direction="restore", restart=True).run()
    assert report.counts["computed_chunks"] == 1
    assert len(images_in(back)) == 11


@pytest.mark.parametrize("kind", ["array", "files"])
def test_rerun_of_a_finished_run_does_nothing(tmp_path, array, kind):
    stored, target = tmp_path / "y.npy", tmp_path / "y.npy"
    settings = {"mode": "caffe"}
    plan_of(array, stored, images_per_chunk=2, **settings).run()
    source = array
    if kind == "files":
        source, target, settings = stored, tmp_path / "back", {"direction": "restore"}
        plan_of(source, target, images_per_chunk=2, **settings).run()
    before = tree(tmp_path)
    report = plan_of(source, target, images_per_chunk=2, **settings).run()
    assert report.counts["computed_chunks"] == 0
    assert report.counts["chunks"] == 6
    assert report.counts["images"] == 11
    assert report.written_bytes == 0
    assert "already" in str(report)
    assert tree(tmp_path) == before


def test_rerun_of_a_finished_run_reports_failures(tmp_path):
    folder_with_failures(tmp_path / "some")
    expected = plan_of(tmp_path / "some", tmp_path / "y.npy", mode="caffe").run()
    actual = plan_of(tmp_path / "some", tmp_path / "y.npy", mode="caffe").run()
    assert actual.failures == expected.failures
    assert actual.counts == {**expected.counts, "computed_chunks": 0}


def test_rerun_rejects_a_truncated_result(tmp_path, array):
    target = tmp_path / "y.npy"
    plan_of(array, target, mode="caffe").run()
    os.truncate(target, target.stat().st_size // 2)
    with pytest.raises((TargetError, SourceError)):
        plan_of(array, target, mode="caffe").run()


def test_finished_target_of_another_job_is_rejected(tmp_path, array):
    target = tmp_path / "y.npy"
    plan_of(array, target, mode="caffe").run()
    before = tree(tmp_path)
    with pytest.raises(TargetError) as caught:
        plan_of(array, target, mode="tf")
    check_error(caught.value, target, "with other settings", "restart")
    assert tree(tmp_path) == before
    plan_of(array, target, mode="tf", restart=True).run()
    assert target.read_bytes() == npy_bytes(network_inputs(pixels(11), "tf"))
    assert read_manifest(target).job.transform.mode is Mode.TF


def test_restart_recomputes_every_chunk(tmp_path, array):
    target = tmp_path / "y.npy"
    plan_of(array, target, mode="caffe", images_per_chunk=2).run()
    report = plan_of(array, target, mode="caffe", images_per_chunk=2, restart=True).run()
    assert report.counts["computed_chunks"] == 6


def test_restart_removes_the_index_of_the_replaced_array(tmp_path, array, photos):
    target = tmp_path / "y.npy"
    plan_of(photos, target, mode="caffe").run()
    assert index_path(target).exists()
    plan_of(array, target, mode="caffe", restart=True).run()
    assert not index_path(target).exists()
    assert plan_of(target, tmp_path / "z.npy", direction="restore").run().failures == []


@pytest.mark.parametrize("where", ["partial", "inside partial", "replaced"])
def test_restart_never_removes_the_source(tmp_path, where):
    """The source may have the name of a sidecar."""
    place = {"partial": "y.npy.partial", "inside partial": "y.npy.partial/photos"}
    source = save_images(tmp_path / place.get(where, "y.npy.fastvgg-replaced"), pixels(5))
    before = tree(source)
    try:
        plan_of(source, tmp_path / "y.npy", mode="caffe", restart=True).run()
    except TargetError as error:
        check_error(error, tmp_path / "y.npy")
    assert tree(source) == before


def test_file_created_during_a_run_is_not_replaced(tmp_path, array):
    target = tmp_path / "y.npy"
    plan = plan_of(array, target, mode="caffe", images_per_chunk=2)
    with pytest.raises(StoppedError) as caught:
        run_with_event(plan, lambda: target.write_text("precious"))
    check_error(caught.value, target, "was not written by fastvgg", "rerun the same command")
    assert target.read_text() == "precious"
    target.unlink()
    report = plan_of(array, target, mode="caffe", images_per_chunk=2).run()
    assert report.counts["computed_chunks"] == 0
    assert target.read_bytes() == npy_bytes(network_inputs(pixels(11), "caffe"))


def test_file_created_after_an_interrupted_run_is_not_replaced(tmp_path, array):
    target = interrupt_run(array, tmp_path / "y.npy", mode="caffe")
    target.write_text("precious")
    before = tree(tmp_path)
    with pytest.raises(TargetError) as caught:
        plan_of(array, target, mode="caffe", images_per_chunk=2)
    check_error(caught.value, target, "was not written by fastvgg")
    assert tree(tmp_path) == before


def test_directory_created_during_a_run_is_never_replaced(tmp_path, array):
    stored, back = tmp_path / "y.npy", tmp_path / "back"
    plan_of(array, stored, mode="caffe").run()
    plan = plan_of(stored, back, images_per_chunk=2, direction="restore", restart=True)

    def appear():
        back.mkdir()
        (back / "keep.txt").write_text("precious")

    with pytest.raises(StoppedError):
        run_with_event(plan, appear)
    assert (back / "keep.txt").read_text() == "precious"


@pytest.mark.parametrize("restart", [False, True])
def test_directory_created_after_an_interrupted_run_is_never_replaced(tmp_path, array, restart):
    stored, back = tmp_path / "y.npy", tmp_path / "back"
    plan_of(array, stored, mode="caffe").run()
    interrupt_run(stored, back, direction="restore", restart=True)
    back.mkdir()
    (back / "keep.txt").write_text("precious")
    with pytest.raises(TargetError):
        plan_of(stored, back, direction="restore", restart=restart).run()
    assert (back / "keep.txt").read_text() == "precious"


@pytest.mark.parametrize("restart", [False, True])
def test_directory_recreated_after_an_interrupted_restart_is_never_replaced(
    tmp_path, array, restart
):
    stored, back = tmp_path / "y.npy", tmp_path / "back"
    plan_of(array, stored, mode="caffe").run()
    plan_of(stored, back, direction="restore").run()
    interrupt_run(stored, back, direction="restore", restart=True)
    shutil.rmtree(back)
    manifest_path(back).unlink()
    back.mkdir()  # may reuse the inode of the removed directory
    (back / "keep.txt").write_text("precious")
    with pytest.raises(TargetError):
        plan_of(stored, back, direction="restore", restart=restart).run()
    assert (back / "keep.txt").read_text() == "precious"


def test_index_paths_outside_the_target_directory_are_never_written(tmp_path, array):
    stored = tmp_path / "y.npy"
    plan_of(array, stored, mode="caffe").run()
    outside = tmp_path / "outside.png"
    names = [f"{row}.png" for row in range(10)]
    for escaping_path in (str(outside), f"/{outside}", "../outside.png", "x/../../outside.png"):
        records = [ImageRecord(name, "", 9, 7, False, "") for name in [*names, escaping_path]]
        index_path(stored).write_text(INDEX_HEADER + format_records(records), encoding="utf-8")
        with pytest.raises(SourceError):
            plan_of(stored, tmp_path / "back", direction="restore").run()
        assert not outside.exists()


# Concurrent runs

WAITING_RUN_SCRIPT = """
import sys
from tests.helpers.datasets_on_disk import plan_of
def progress(at):
    print("committed", flush=True)
    sys.stdin.readline()
plan_of(sys.argv[1], sys.argv[2], mode="caffe", images_per_chunk=2).run(progress)
"""


def running_process(source, target):
    """Start a process, and wait until it is in the middle of a run."""
    process = subprocess.Popen(
        [sys.executable, "-c", WAITING_RUN_SCRIPT, source, target],
        env=checkout_environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "committed\n"
    return process


def test_concurrent_run_of_the_same_target_is_rejected(tmp_path, array):
    target = tmp_path / "y.npy"
    with running_process(array, target) as first:
        for settings in ({}, {"restart": True}):
            with pytest.raises(TargetError) as caught:
                plan_of(array, target, mode="caffe", images_per_chunk=2, **settings).run()
            check_error(caught.value, target, "another process")
        first.communicate("\n" * 6)
    assert first.returncode == 0
    assert target.read_bytes() == npy_bytes(network_inputs(pixels(11), "caffe"))
    assert not journal_path(target).exists()
    fastvgg.verify(target, full=True)


def test_rerun_resumes_after_a_concurrent_run_is_killed(tmp_path, array):
    target = tmp_path / "y.npy"
    with running_process(array, target) as first:
        first.kill()
        first.communicate()
    committed = commits_in(target)
    assert 1 <= committed <= 3  # one was reported, and up to two more were in the pipeline
    report = plan_of(array, target, mode="caffe", images_per_chunk=2).run()
    assert report.counts["computed_chunks"] == 6 - committed
    assert target.read_bytes() == npy_bytes(network_inputs(pixels(11), "caffe"))


def test_two_targets_can_be_written_concurrently(tmp_path, array):
    with running_process(array, tmp_path / "y.npy") as first:
        plan_of(array, tmp_path / "z.npy", mode="caffe").run()
        first.communicate("\n" * 6)
    assert (tmp_path / "y.npy").read_bytes() == (tmp_path / "z.npy").read_bytes()
