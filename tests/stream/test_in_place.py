"""A file that becomes its own result: the same bytes as a new one, or a refusal, or a way on."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest

import fastvgg
from fastvgg import oracle
from fastvgg.errors import ResumeError, SourceError, TargetError, UsageError
from fastvgg.storage import local
from fastvgg.storage.local import Storage, file_system, is_networked
from fastvgg.stream import planner
from fastvgg.stream.info import info
from fastvgg.stream.journal import journal_path
from fastvgg.stream.manifest import Provenance, manifest_path, read_manifest
from fastvgg.stream.plan import RUN_BYTES
from fastvgg.stream.redo_log import read_redo_log_header
from fastvgg.stream.run import run
from fastvgg.transform import Transform
from tests.helpers.batches import FLOATS, KERAS_MODES
from tests.helpers.datasets_on_disk import (
    must_say,
    names_in,
    permissions,
    pixels,
    plan_of,
    printed_by,
    save_images,
    save_npy,
    tree,
)
from tests.helpers.faults import CuttingStorage, Death
from tests.helpers.samples import parts


def stored(path, dtype="float32", layout="NHWC", images=11):
    """Save images as floats; return them."""
    batch = pixels(images)
    batch = batch if layout == "NHWC" else np.ascontiguousarray(batch.transpose(0, 3, 1, 2))
    x = oracle.apply(Transform("identity", layout=layout, dtype=dtype), batch)
    save_npy(path, x)
    return x


def change(path, *, storage=None, **settings):
    return run(plan_of(path, None, in_place=True, **settings), storage=storage)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "x.npy"
    stored(path)
    return path


@pytest.fixture
def unfinished(file):
    """A file of which two chunks of six are done."""
    with pytest.raises(Death):
        change(file, mode="caffe", together=2, storage=CuttingStorage(2))
    assert read_redo_log_header(file).file_layout.chunks == 6
    return file


def expected_of(path, mode="caffe"):
    x = pixels(11).astype(np.float32)
    return oracle.apply(Transform(mode), x)


@pytest.mark.parametrize("together", [1, 4, 11])
@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
@pytest.mark.parametrize("dtype", [name for name in FLOATS if name != "bfloat16"])
@pytest.mark.parametrize("mode", KERAS_MODES)
def test_a_file_becomes_what_the_oracle_makes_of_it_and_back(
    tmp_path, mode, dtype, layout, together
):
    path = tmp_path / "x.npy"
    x = stored(path, dtype, layout)
    header, inode = path.read_bytes()[: -x.nbytes], path.stat().st_ino
    report = change(path, mode=mode, layout=layout, together=together)
    assert (report.counts["images"], report.counts["failed"]) == (11, 0)
    assert report.counts["computed_chunks"] == report.counts["chunks"] == -(-11 // together)
    assert report.written_bytes == x.nbytes
    expected = oracle.apply(Transform(mode, layout=layout), x)
    assert path.read_bytes() == header + expected.tobytes()
    assert names_in(tmp_path) == ["x.npy", "x.npy.fastvgg.json"]
    assert fastvgg.verify(path).chunks == report.counts["chunks"]
    change(path, direction="restore", together=together)  # the manifest knows mode and layout
    assert path.read_bytes() == header + x.tobytes()
    assert path.stat().st_ino == inode
    assert read_manifest(path).job.transform.direction == "restore"


@pytest.mark.parametrize("threads", [1, 3])
def test_pages_larger_than_one_and_any_backend_give_the_same(tmp_path, backend, threads):
    path = tmp_path / "x.npy"
    x = pixels(7, height=61, width=43).astype(np.float32)  # 31,476 bytes an image
    save_npy(path, x)
    change(path, mode="torch", together=2, backend=backend, threads=threads)
    assert np.load(path).tobytes() == oracle.apply(Transform("torch"), x).tobytes()


def test_a_file_that_is_resumed_becomes_the_same(unfinished):
    plan = plan_of(unfinished, None, in_place=True, mode="caffe")
    assert (plan.committed_chunks, plan.chunks, plan.chunk_images) == (2, 6, 2)
    report = run(plan)
    assert report.counts["computed_chunks"] == 4
    assert np.load(unfinished).tobytes() == expected_of(unfinished).tobytes()
    assert names_in(unfinished.parent) == ["x.npy", "x.npy.fastvgg.json"]
    fastvgg.verify(unfinished)


def test_a_restore_in_place_resumes_without_being_told_the_mode_again(file):
    change(file, mode="torch")
    with pytest.raises(Death):
        change(file, direction="restore", together=2, storage=CuttingStorage(3))
    manifest_path(file).unlink()  # what it says is of what was there before
    change(file, direction="restore")
    assert np.load(file).tobytes() == pixels(11).astype(np.float32).tobytes()


def test_nothing_is_done_twice(file):
    change(file, mode="caffe")
    before = tree(file.parent)
    for _ in range(2):
        with pytest.raises(SourceError) as caught:
            change(file, mode="caffe")
        must_say(caught.value, file, "already preprocessed", "caffe")
    manifest_path(file).unlink()  # then the values tell
    with pytest.raises(SourceError) as caught:
        change(file, mode="caffe")
    must_say(caught.value, file, "already preprocessed")
    assert file.read_bytes() == before[b"x.npy"]


@pytest.mark.parametrize("kind", ["file", "unfinished"])
def test_a_plan_that_another_run_has_overtaken_does_nothing(request, kind):
    file = request.getfixturevalue(kind)
    late = plan_of(file, None, in_place=True, mode="caffe")
    change(file, mode="caffe")
    before = tree(file.parent)
    with pytest.raises(SourceError, match="has changed since"):
        run(late)
    assert tree(file.parent) == before


def test_a_file_that_another_process_is_changing_is_left_alone(file):
    before = tree(file.parent)
    plan = plan_of(file, None, in_place=True, mode="caffe")
    storage = Storage()
    held = storage.open(file)
    assert storage.lock(held)
    with pytest.raises(TargetError) as caught:
        run(plan)
    storage.close(held)
    must_say(caught.value, file, "another process", "info")
    assert tree(file.parent) == before


def refused(error_type, path, *words, **settings):
    before = tree(path.parent)
    with pytest.raises(error_type) as caught:
        change(path, mode="caffe", **settings)
    must_say(caught.value, path, *words)
    assert tree(path.parent) == before


def test_a_foreign_file_of_the_name_of_the_journal_is_refused(file):
    file.with_name(f"{file.name}.fastvgg-journal").write_text("precious")
    for restart in (False, True):
        refused(TargetError, file, ".fastvgg-journal exists", "move it away", restart=restart)


def test_a_foreign_file_that_takes_the_name_of_the_journal_is_refused(file):
    plan = plan_of(file, None, in_place=True, mode="caffe")
    file.with_name(f"{file.name}.fastvgg-journal").write_text("precious")
    before = tree(file.parent)
    with pytest.raises(TargetError, match="exists, but is not a journal"):
        run(plan)
    assert tree(file.parent) == before


def test_links_and_holes_are_refused(file):
    link = file.with_name("link.npy")
    link.symlink_to(file)
    refused(TargetError, link, "symbolic link", str(file))
    link.unlink()
    os.link(file, link)
    refused(TargetError, file, "2 hard links")
    link.unlink()
    batch = np.zeros((64, 128, 128, 3), np.float32)
    save_npy(file, batch)
    with file.open("r+b") as stream:
        stream.truncate(128)
        stream.truncate(128 + batch.nbytes)
    refused(TargetError, file, str(128 + batch.nbytes), "holes")


def test_a_file_system_of_other_machines_is_refused(file, monkeypatch):
    for system in ("nfs4", "cifs", "fuse.sshfs", "9p"):
        monkeypatch.setattr(local, "file_system", lambda path, system=system: system)
        refused(TargetError, file, system, "another machine")
    monkeypatch.setattr(local, "file_system", lambda path: "")  # nobody knows
    change(file, mode="caffe")


def test_file_systems_are_known_by_their_names(tmp_path):
    assert file_system(Path("/proc/self/stat")) == "proc"
    assert file_system(Path("/proc")) == "proc"
    assert file_system(Path("/dev/shm")) == "tmpfs"  # noqa: S108
    assert not any(map(is_networked, ("", "ext4", "tmpfs", "xfs", "btrfs", "fuseblk", "overlay")))
    assert all(map(is_networked, ("nfs", "nfs4", "smb3", "ceph", "fuse.glusterfs", "lustre")))


def test_what_cannot_be_written_is_refused(file):
    source = f"""
from tests.helpers.datasets_on_disk import obey_permissions
import fastvgg
obey_permissions()
try:
    fastvgg.plan({str(file)!r}, mode="caffe", in_place=True)
except fastvgg.errors.TargetError as error:
    print(error.problem)
"""
    with permissions(file, 0o444):
        assert printed_by(source) == f"{file} is not writable"
    with permissions(file.parent, 0o555):
        assert printed_by(source) == f"{file.parent} is not writable"


def test_another_type_or_layout_or_kind_is_refused(tmp_path, file):
    refused(UsageError, file, "float32", "float16", "DST", dtype="float16")
    refused(SourceError, file, "axis", layout="NCHW")
    integers = save_npy(tmp_path / "integers.npy", pixels(3))
    refused(UsageError, integers, "uint8", "float32", "DST")
    y = tmp_path / "y.npy"
    stored(y, "float64")
    change(y, mode="caffe")
    with pytest.raises(UsageError, match="DST"):
        change(y, direction="restore", dtype="uint8")
    with pytest.raises(UsageError, match="DST"):
        change(file, mode="caffe", out_layout="NCHW")
    folder = tmp_path / "photos"
    folder.mkdir()
    with pytest.raises(SourceError):
        change(folder, mode="caffe")


def test_a_target_and_in_place_contradict_each_other(file):
    with pytest.raises(UsageError, match="a target and --in-place"):
        fastvgg.plan(file, file.with_name("y.npy"), mode="caffe", in_place=True)
    with pytest.raises(UsageError, match="no target"):
        fastvgg.plan(file, mode="caffe")


def test_a_file_that_ends_early_is_refused_and_does_not_grow(file):
    content = file.read_bytes()
    for missing in (1, 4, 756):
        file.write_bytes(content[:-missing])
        refused(SourceError, file, str(len(content) - missing))


def test_nobody_else_may_use_an_unfinished_file(unfinished):
    before = tree(unfinished.parent)
    finish = f"fastvgg preprocess {unfinished} --in-place"
    with pytest.raises(SourceError) as caught:
        fastvgg.plan(unfinished, unfinished.with_name("y.npy"), mode="caffe")
    must_say(caught.value, unfinished, "partly converted", finish)
    with pytest.raises(SourceError) as caught:
        fastvgg.verify(unfinished)
    must_say(caught.value, unfinished, "partly converted", finish)
    known = info(unfinished)
    assert (known["state"], known["committed_chunks"], known["chunks"]) == (
        "unfinished in place",
        2,
        6,
    )
    assert finish in known["next"]
    assert tree(unfinished.parent) == before


def test_an_unfinished_file_is_not_begun_again(unfinished):
    before = tree(unfinished.parent)
    with pytest.raises(ResumeError) as caught:
        change(unfinished, mode="caffe", restart=True)
    must_say(caught.value, unfinished, "cannot start over", "--in-place")
    for other in ({"mode": "tf"}, {"mode": "caffe", "direction": "restore"}):
        with pytest.raises(ResumeError) as caught:
            change(unfinished, **other)
        must_say(caught.value, unfinished, "with other settings", "then", "now")
    assert tree(unfinished.parent) == before
    change(unfinished, mode="caffe")
    assert np.load(unfinished).tobytes() == expected_of(unfinished).tobytes()


def test_the_journal_of_another_file_is_not_applied(unfinished):
    replaced = unfinished.with_name("new.npy")
    stored(replaced)
    replaced.rename(unfinished)
    before = tree(unfinished.parent)
    with pytest.raises(ResumeError) as caught:
        change(unfinished, mode="caffe")
    must_say(caught.value, unfinished, "not the file", "--restart")
    assert tree(unfinished.parent) == before
    change(unfinished, mode="caffe", restart=True)
    assert np.load(unfinished).tobytes() == expected_of(unfinished).tobytes()
    assert names_in(unfinished.parent) == ["x.npy", "x.npy.fastvgg.json"]


def test_a_copy_of_an_unfinished_file_is_not_begun_again(unfinished):
    copy = unfinished.with_name("copy.npy")
    copy.write_bytes(unfinished.read_bytes())
    copy.rename(unfinished)  # as a backup is put back: the same bytes, another inode
    before = tree(unfinished.parent)
    with pytest.raises(ResumeError) as caught:
        change(unfinished, mode="caffe", restart=True)
    must_say(caught.value, unfinished, "cannot start over")
    assert tree(unfinished.parent) == before


def test_the_journal_says_nothing_of_the_device_whose_number_a_reboot_may_change(unfinished):
    kept = {"job", "chunk_images", "run", "inode", "file_bytes"}
    assert set(read_redo_log_header(unfinished)._fields) == kept


def test_an_unfinished_file_needs_the_memory_that_it_was_begun_with(unfinished):
    plan = plan_of(unfinished, None, in_place=True, mode="caffe")
    with pytest.raises(TargetError) as caught:
        plan_of(unfinished, None, in_place=True, mode="caffe", memory=plan.projected_bytes - 1)
    must_say(caught.value, unfinished, "--memory")


def test_a_journal_that_is_shorter_is_refused(unfinished):
    journal = journal_path(unfinished)
    content = journal.read_bytes()
    for length in (len(content) - 1, len(content) // 2, 5000):
        journal.write_bytes(content[:length])
        before = tree(unfinished.parent)
        with pytest.raises(ResumeError) as caught:
            change(unfinished, mode="caffe")
        must_say(caught.value, journal)
        assert tree(unfinished.parent) == before


@parts(8)
@pytest.mark.parametrize("stage", ["committed", "written", "finished"])
def test_a_journal_with_any_damage_gives_the_right_bytes_or_is_refused(tmp_path, stage, part):
    """One byte of everything that is not padding, at three moments: never wrong bytes."""
    path = tmp_path / "x.npy"
    stored(path)
    place = tmp_path / "place"
    place.mkdir()
    with pytest.raises(Death):
        change(path, mode="caffe", together=2, storage=Ending(stage))
    header = read_redo_log_header(path)
    content, journal = path.read_bytes(), journal_path(path).read_bytes()
    places = header.file_layout
    right, refusals = 0, 0
    spots = [at for at in range(len(journal)) if journal[at]]
    damages = [*spots[::31], *range(places.checkpoint(0), places.checkpoint(0) + 100, 5)]
    for at in damages[part::8]:
        damaged = bytearray(journal)
        damaged[at] ^= 1 << at % 8
        with path.open("r+b") as stream:
            stream.write(content)
        journal_path(path).write_bytes(damaged)
        manifest_path(path).unlink(missing_ok=True)
        try:
            change(path, mode="caffe")
        except (ResumeError, SourceError) as error:
            must_say(error, path)
            refusals += 1
            assert path.read_bytes() == content
            continue
        right += 1
        assert np.load(path).tobytes() == expected_of(path).tobytes(), at
    assert right > refusals


class Ending(Storage):
    """Real storage whose process dies at a stage: a chunk committed, written, or all of them."""

    def __init__(self, stage):
        super().__init__()
        self._stage = stage
        self._synced = 0

    def sync(self, file):
        super().sync(file)
        self._synced += file.path.name.endswith("-journal")
        if self._stage == "committed" and self._synced == 5:
            raise Death

    def write(self, file, data, offset):
        super().write(file, data, offset)
        if self._stage == "written" and self._synced == 5 and file.path.name == "x.npy":
            raise Death

    def write_atomic(self, path, data):
        raise Death


def test_an_index_stays_with_its_rows(tmp_path):
    photos = tmp_path / "photos"
    save_images(photos, pixels(5))
    y = tmp_path / "y.npy"
    plan_of(photos, y, mode="caffe").run()
    index = (tmp_path / "y.npy.index.csv").read_bytes()
    change(y, direction="restore")
    assert (tmp_path / "y.npy.index.csv").read_bytes() == index
    assert np.load(y).dtype == np.float32


def test_memory_and_room_are_known_before(file, monkeypatch):
    plan = plan_of(file, None, in_place=True, mode="caffe", together=2)
    image_bytes = plan.header.image_bytes
    assert plan.projected_bytes == RUN_BYTES + 2 * 3 * image_bytes
    assert "twice, in place" in str(plan)
    usage = shutil.disk_usage(file.parent)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    refused(TargetError, file, "1000 bytes", "--memory")


def test_what_another_process_has_come_to_the_end_of_meanwhile_is_not_done_twice(file, monkeypatch):
    class ReadBeforeAnotherEnds(Provenance):
        @classmethod
        def read(cls, location):
            found = Provenance.read(location)
            monkeypatch.setattr(planner, "Provenance", Provenance)
            change(file, mode="caffe")
            return found

    monkeypatch.setattr(planner, "Provenance", ReadBeforeAnotherEnds)
    with pytest.raises(SourceError) as caught:
        change(file, mode="caffe")
    must_say(caught.value, file, "already preprocessed")
    assert np.load(file).tobytes() == expected_of(file).tobytes()


def test_what_another_process_has_begun_meanwhile_is_planned_again(file, monkeypatch):
    def read_before_another_begins(path):
        found = read_redo_log_header(path)
        monkeypatch.setattr(planner, "read_redo_log_header", read_redo_log_header)
        with pytest.raises(Death):
            change(file, mode="caffe", together=2, storage=CuttingStorage(2))
        return found

    os.utime(file, ns=(1, 1))  # so that writing to it changes that
    monkeypatch.setattr(planner, "read_redo_log_header", read_before_another_begins)
    late = plan_of(file, None, in_place=True, mode="caffe")
    with pytest.raises(SourceError, match="has changed since"):
        run(late)
    change(file, mode="caffe", together=2)
    assert np.load(file).tobytes() == expected_of(file).tobytes()
