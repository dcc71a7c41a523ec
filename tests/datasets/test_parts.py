"""Arrays in parts: order, mismatched parts, and parts that change."""

from __future__ import annotations

import contextlib
import itertools
import threading
from pathlib import Path

import numpy as np
import pytest
from numpy.lib.format import open_memmap
from PIL import Image

import fastvgg
from fastvgg import oracle
from fastvgg.datasets import npy
from fastvgg.datasets.index import index_path, read_index
from fastvgg.errors import SourceError, StoppedError
from fastvgg.transform import Transform
from tests.helpers.batches import dtype_of
from tests.helpers.datasets_on_disk import check_error, opened, pixels, plan_of, save_images

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


# Parts that were packed from images


@pytest.fixture
def packed(tmp_path):
    """Two parts of five images; the third of the first part and the last of the second failed."""
    (tmp_path / "packed").mkdir()
    for number, failed in enumerate(("a/04.png", "b/03.png")):
        photos = save_images(tmp_path / f"photos{number}", pixels(5, seed=number))
        (photos / failed).write_bytes(b"no image")
        target = tmp_path / "packed" / f"part-{number}.npy"
        plan_of(photos, target, direction="pack", size=(7, 9)).run()
    return tmp_path / "packed"


def test_records_of_parts_are_joined(packed):
    expected = [
        record._replace(path=f"part-{number}/{record.path}")
        for number in range(2)
        for record in read_index(packed / f"part-{number}.npy", 5)
    ]
    with contextlib.closing(opened(packed)) as source:
        assert [*source.records] == source.records[:] == expected
        for start, stop in itertools.combinations(range(11), 2):
            assert source.records[start:stop] == expected[start:stop]
        assert [source.records[row] for row in range(-10, 10)] == expected * 2
        assert source.records[8:1:-3] == expected[8:1:-3]
    with contextlib.closing(opened(packed, use_index=False)) as source:
        assert len(source.records) == 0


def test_failed_images_of_parts_stay_rows_of_zeros_and_are_left_out_of_batches(packed, tmp_path):
    plan_of(packed, tmp_path / "y.npy", mode="caffe", images_per_chunk=3).run()
    stored = np.concatenate([np.load(packed / f"part-{number}.npy") for number in range(2)])
    expected = oracle.apply(Transform("caffe"), stored)
    expected[[2, 9]] = 0
    assert np.load(tmp_path / "y.npy").tobytes() == expected.tobytes()
    assert [record.failed for record in read_index(tmp_path / "y.npy", 10)].count(True) == 2
    for path in (packed, tmp_path / "y.npy"):
        batches = fastvgg.batches(path, 4)
        assert (batches.failed_rows.tolist(), batches.class_names) == ([2, 9], ["a", "b"])
        assert [row for batch in batches for row in batch.rows] == [0, 1, 3, 4, 5, 6, 7, 8]
    plan_of(tmp_path / "y.npy", tmp_path / "restored", direction="restore").run()
    restored = tmp_path / "restored"
    for number, name in enumerate(("b/01.png", "a/04.png")):
        image = np.asarray(Image.open(restored / f"part-{number}" / name))
        assert np.array_equal(image, pixels(5, seed=number)[int(name[2:4])])
    assert len([*restored.rglob("*.png")]) == 8


def test_failed_images_in_one_part_require_the_index_of_the_other(packed, tmp_path):
    index_path(packed / "part-1.npy").rename(tmp_path / "kept.csv")
    with pytest.raises(SourceError) as caught:
        opened(packed)
    check_error(caught.value, "part-0.npy.index.csv lists 1 failed", "part-1.npy has no index")
