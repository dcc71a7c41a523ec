"""Arrays in parts: order, mismatched parts, and parts that change."""

from __future__ import annotations

import itertools
import threading
from pathlib import Path

import numpy as np
import pytest
from numpy.lib.format import open_memmap

from fastvgg.datasets import npy
from fastvgg.errors import SourceError, StoppedError
from tests.helpers.batches import dtype_of
from tests.helpers.datasets_on_disk import opened

SIZES = (3, 1, 4, 2)  # ten


def batch_of(dtype="uint8", images=10):
    values = np.random.default_rng(5).integers(0, 256, (images, 5, 7, 3))
    return values.astype(dtype_of(dtype))


def save_parts(directory, batch, sizes=SIZES, names="part-{:03d}.npy"):
    directory.mkdir()
    starts = np.cumsum([0, *sizes])
    for number, (start, stop) in enumerate(itertools.pairwise(starts)):
        np.save(directory / names.format(number), batch[start:stop])
    return directory


@pytest.fixture
def parts(tmp_path):
    return save_parts(tmp_path / "parts", batch_of())


def test_parts_are_sorted_by_name_bytes(tmp_path):
    directory = tmp_path / "parts"
    directory.mkdir()
    batch = batch_of(images=4)
    for name, row in (("part-10", 1), ("part-9", 2), ("part-B", 3), ("part-1", 0)):
        np.save(directory / f"{name}.npy", batch[row : row + 1])
    source = opened(directory)
    assert np.array_equal(source.read(0, 4).batch, batch)
    source.close()


def test_other_files_are_ignored(parts):
    (parts / "notes.txt").write_text("not an array")
    (parts / "other.npy").write_bytes(b"nor this")
    source = opened(parts)
    assert source.header.images == sum(SIZES)
    source.close()


def test_parts_mixed_with_images_are_rejected(parts):
    (parts / "cat.jpg").write_bytes(b"")
    with pytest.raises(SourceError, match=r"'part-000.npy', and images, e.g. 'cat.jpg'"):
        opened(parts)


@pytest.mark.parametrize(
    "other",
    [
        batch_of("float32", 2),
        np.zeros((2, 7, 5, 3), np.uint8),
        np.zeros((2, 5, 7, 4), np.uint8),
    ],
)
def test_parts_of_different_shapes_or_dtypes_are_rejected_with_both(parts, other):
    np.save(parts / "part-002.npy", other)
    with pytest.raises(SourceError) as raised:
        opened(parts)
    for shown in ("part-002.npy", "part-000.npy", str(other.shape[1:]), "(5, 7, 3) uint8"):
        assert shown in raised.value.problem


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY", b"not an array at all"])
def test_damaged_part_is_rejected_with_its_path(parts, content):
    (parts / "part-001.npy").write_bytes(content)
    with pytest.raises(SourceError, match=r"parts/part-001.npy"):
        opened(parts)


def test_truncated_part_is_rejected(parts):
    path = parts / "part-003.npy"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(SourceError, match=r"part-003.npy is truncated"):
        opened(parts)


@pytest.mark.parametrize(
    "change",
    [
        lambda path: path.unlink(),
        lambda path: np.save(path, batch_of(images=3)),
        lambda path: np.save(path, batch_of("float32", 4)),
    ],
    ids=["gone", "shorter", "another type"],
)
def test_part_changed_after_planning_stops_the_run(parts, change):
    source = opened(parts)
    change(parts / "part-002.npy")
    with pytest.raises(StoppedError, match=r"part-002.npy changed after the run was planned"):
        source.read(0, sum(SIZES))
    source.close()


def test_part_truncated_while_open_stops_the_run(parts):
    source = opened(parts)
    source.read(4, 5)
    with (parts / "part-002.npy").open("r+b") as file:
        file.truncate(200)
    with pytest.raises(StoppedError, match="file was truncated"):
        source.read_into(3, np.zeros((5, 5, 7, 3), np.uint8))
    source.close()


def open_parts():
    found = [path.resolve() for path in Path("/proc/self/fd").iterdir()]
    return [path for path in found if path.name.startswith("part-")]


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="no list of open files here")
def test_concurrent_reads_keep_few_parts_open(tmp_path, monkeypatch):
    monkeypatch.setattr(npy, "MAX_OPEN_PARTS", 3)
    batch = batch_of(images=60)
    source = opened(save_parts(tmp_path / "parts", batch, sizes=[1] * 60))
    wrong = []

    def read(seed):
        for row in np.random.default_rng(seed).permutation(58):
            out = np.zeros((3, 5, 7, 3), np.uint8)
            source.read_into(int(row), out)
            if not np.array_equal(out, batch[row : row + 3]):
                wrong.append(row)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert len(open_parts()) == 3
    source.close()
    assert open_parts() == []


def test_part_written_through_a_memory_map_is_read(tmp_path):
    directory = tmp_path / "parts"
    directory.mkdir()
    batch = batch_of()
    mapped = open_memmap(directory / "part-0.npy", "w+", batch.dtype, batch.shape)
    mapped[...] = batch
    mapped.flush()
    source = opened(directory)
    assert np.array_equal(source.read(0, len(batch)).batch, batch)
    source.close()
