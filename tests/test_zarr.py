"""Zarr arrays in directories: which are read, which are damaged, and what is written."""

from __future__ import annotations

import concurrent.futures
import itertools
import json
import os
import shutil

import numpy as np
import pytest
import zarr
from batches import KERAS_MODES, dtype_of, in_layout
from datasets_on_disk import (
    must_say,
    names_in,
    permissions,
    pixels,
    plan_of,
    printed_by,
    python,
    save_images,
    save_npy,
    tree,
)
from faults import CuttingStorage, Death

import fastvgg
from fastvgg import datasets, oracle
from fastvgg.datasets.base import Header, piece_images
from fastvgg.datasets.zarr import ZarrSource
from fastvgg.errors import (
    ResumeError,
    SourceError,
    StoppedError,
    TargetError,
    UsageError,
    VerificationError,
)
from fastvgg.stream.info import info
from fastvgg.stream.run import run
from fastvgg.stream.storage import Storage

IMAGES, TOGETHER = 11, 2
SHARDS = -(-IMAGES // TOGETHER)
BATCH = pixels(IMAGES, height=5, width=7)
EXPECTED = oracle.apply(fastvgg.Transform("caffe"), BATCH)
PLAIN = ("uint8", "float16", "float32", "float64")


def written(path, data=BATCH, **settings):
    """Write an array by zarr-python, all of it."""
    settings = {"chunks": (3, 5, 7, 3), "config": {"write_empty_chunks": True}, **settings}
    zarr.create_array(path, data=data, **settings)
    return path


def check_reads(path, expected, dtype, layout="NHWC"):
    """Check that an array is read as it is, from any row to any."""
    source = datasets.open_source(path, layout=layout)
    assert isinstance(source, ZarrSource)
    assert source.header == Header(expected.shape, dtype, layout)
    for start, stop in itertools.combinations(range(0, len(expected) + 1, 2), 2):
        batch, records = source.read(start, stop)
        assert batch.dtype == dtype_of(dtype)
        assert batch.tobytes() == expected[start:stop].tobytes()
        assert records == []
        out = np.zeros_like(batch)
        source.read_into(start, out)
        assert out.tobytes() == batch.tobytes()
    source.close()


WAYS_TO_STORE = {
    "chunks of an image": {"chunks": (1, 5, 7, 3), "compressors": None},
    "chunks that divide nothing": {"chunks": (4, 2, 3, 2)},
    "shards": {"chunks": (2, 5, 7, 3), "shards": (4, 5, 7, 3), "compressors": None},
    "compressed shards": {"chunks": (1, 5, 4, 3), "shards": (3, 5, 8, 3)},
    "checksums": {"compressors": zarr.codecs.Crc32cCodec()},
    "gzip": {"compressors": zarr.codecs.GzipCodec()},
    "blosc": {"compressors": zarr.codecs.BloscCodec()},
    "dots": {"chunk_key_encoding": {"name": "default", "separator": "."}},
    "version 2": {"zarr_format": 2},
    "version 2 in folders": {
        "zarr_format": 2,
        "chunk_key_encoding": {"name": "v2", "separator": "/"},
        "compressors": None,
    },
}


@pytest.mark.parametrize("stored", WAYS_TO_STORE)
def test_an_array_is_read_however_it_is_stored(tmp_path, stored):
    check_reads(written(tmp_path / "x.zarr", **WAYS_TO_STORE[stored]), BATCH, "uint8")


@pytest.mark.parametrize("dtype", PLAIN)
@pytest.mark.parametrize("order", ["<", ">"])
def test_every_type_is_read_in_either_byte_order(tmp_path, dtype, order):
    expected = BATCH.astype(dtype)
    data = expected.astype(expected.dtype.newbyteorder(order))
    serializer = zarr.codecs.BytesCodec(endian={"<": "little", ">": "big"}[order])
    path = written(tmp_path / "3.zarr", expected, serializer=serializer)
    check_reads(path, expected, dtype)
    check_reads(written(tmp_path / "2.zarr", data, zarr_format=2), expected, dtype)


def test_channels_may_come_first(tmp_path):
    expected = in_layout(BATCH, "NCHW")
    path = written(tmp_path / "x.zarr", expected, chunks=(4, 3, 5, 7))
    check_reads(path, expected, "uint8", layout="NCHW")


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_an_array_within_a_group_is_read(tmp_path, zarr_format):
    group = zarr.create_group(tmp_path / "g.zarr", zarr_format=zarr_format)
    group.create_array("images", data=BATCH, chunks=(3, 5, 7, 3))
    group.create_array("labels", data=np.arange(IMAGES))
    check_reads(tmp_path / "g.zarr" / "images", BATCH, "uint8")
    with pytest.raises(SourceError) as caught:
        datasets.open_source(tmp_path / "g.zarr")
    must_say(caught.value, tmp_path / "g.zarr", "images", "labels", f"{tmp_path}/g.zarr/NAME")
    with pytest.raises(SourceError) as caught:
        datasets.open_source(tmp_path / "g.zarr" / "labels")
    must_say(caught.value, tmp_path / "g.zarr" / "labels", (IMAGES,))


def test_a_directory_of_another_name_is_an_array_by_what_is_in_it(tmp_path):
    for number, zarr_format in enumerate((2, 3)):
        path = written(tmp_path / f"array{number}", zarr_format=zarr_format)
        check_reads(path, BATCH, "uint8")


@pytest.mark.parametrize("stored", ["shards", "gzip"])
def test_many_threads_read_at_once(tmp_path, stored):
    source = datasets.open_source(written(tmp_path / "x.zarr", **WAYS_TO_STORE[stored]))

    def read(start):
        out = np.zeros_like(BATCH[start : start + 3])
        source.read_into(start, out)
        return out.tobytes() == BATCH[start : start + 3].tobytes()

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, [number % IMAGES for number in range(100)]))


def test_chunks_of_a_run_hold_whole_chunks_of_the_array(tmp_path):
    for name, settings in {
        "chunked": {"chunks": (4, 5, 7, 3)},
        "sharded": {"chunks": (4, 5, 7, 3), "shards": (8, 5, 7, 3)},
    }.items():
        path = written(tmp_path / f"{name}.zarr", **settings)
        plan = fastvgg.plan(path, tmp_path / "y.npy", mode="tf")
        image_bytes, least = plan.image_memory_bytes, plan.least_scratch_bytes
        plan = fastvgg.plan(path, tmp_path / "y.npy", mode="tf", memory=least + 9 * image_bytes)
        assert plan.chunk_images == 8
        too_little = least + 4 * image_bytes - 1
        with pytest.raises(TargetError) as caught:
            fastvgg.plan(path, tmp_path / "y.npy", mode="tf", memory=too_little)
        must_say(caught.value, "4 images, stored together", "--memory")


def metadata_of(path):
    return json.loads((path / "zarr.json").read_text())


def edited(path, **fields):
    """Write other metadata."""
    (path / "zarr.json").write_text(json.dumps({**metadata_of(path), **fields}))
    return path


EDITS = {
    "no json": "{",
    "no object": "[]",
    "nothing": "{}",
    "another version": {"zarr_format": 9},
    "an unknown codec": {"codecs": [{"name": "made-up"}]},
    "no codec": {"codecs": []},
    "an unknown type": {"data_type": "made-up"},
    "no type": {"data_type": None},
    "a negative shape": {"shape": [-1, 5, 7, 3]},
    "a shape of texts": {"shape": ["a", 5, 7, 3]},
    "no shape": {"shape": None},
    "chunks of nothing": {
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [0, 5, 7, 3]}}
    },
    "chunks of another rank": {
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [3, 5, 7]}}
    },
    "an unknown grid": {"chunk_grid": {"name": "made-up", "configuration": {}}},
    "unknown keys": {"chunk_key_encoding": {"name": "made-up", "configuration": {}}},
    "a transformer": {"storage_transformers": [{"name": "made-up"}]},
    "an unknown node": {"node_type": "made-up"},
    "a fill value of another type": {"fill_value": "x"},
}


@pytest.mark.parametrize("edit", EDITS)
def test_damaged_metadata_are_refused(tmp_path, edit):
    path = written(tmp_path / "x.zarr")
    if isinstance(EDITS[edit], str):
        (path / "zarr.json").write_text(EDITS[edit])
    else:
        edited(path, **EDITS[edit])
    before = tree(path)
    with pytest.raises(SourceError) as caught:
        datasets.open_source(path)
    must_say(caught.value, path)
    assert tree(path) == before


def test_a_shape_that_claims_more_than_there_is_is_refused_at_once(tmp_path):
    path = edited(written(tmp_path / "x.zarr"), shape=[2**40, 5, 7, 3])
    with pytest.raises(SourceError) as caught:
        datasets.open_source(path)
    must_say(caught.value, path, "are missing", "c/4/0/0/0")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (BATCH.astype(np.int32), ["int32", "float32"]),
        (BATCH.astype(np.complex64), ["complex64"]),
        (BATCH.astype(np.bool_), ["bool"]),
        (BATCH[0], [(5, 7, 3), "numpy.newaxis"]),
        (np.zeros((0, 5, 7, 3), np.uint8), [(0, 5, 7, 3), "no images"]),
    ],
)
def test_other_types_and_shapes_are_refused(tmp_path, data, words):
    path = written(tmp_path / "x.zarr", data, chunks=data.shape if data.size else (1, 5, 7, 3))
    with pytest.raises(SourceError) as caught:
        datasets.open_source(path)
    must_say(caught.value, path, *words)


def test_what_would_be_unpickled_is_refused(tmp_path):
    path = written(tmp_path / "x.zarr", zarr_format=2, compressors=None)
    fields = json.loads((path / ".zarray").read_text())
    fields["filters"] = [{"id": "pickle", "protocol": 5}]
    (path / ".zarray").write_text(json.dumps(fields))
    with pytest.raises(SourceError) as caught:
        datasets.open_source(path)
    must_say(caught.value, path, "pickle")


def test_chunks_that_are_missing_are_refused(tmp_path):
    path = written(tmp_path / "x.zarr")
    for name in ("1", "2"):
        shutil.rmtree(path / "c" / name)
    with pytest.raises(SourceError) as caught:
        datasets.open_source(path)
    must_say(caught.value, path, "2 of 4 chunks are missing", "c/1/0/0/0", "write_empty_chunks")
    (path / "c" / "others").write_bytes(b"")
    (path / "c" / "more").write_bytes(b"")
    with pytest.raises(SourceError) as caught:
        datasets.open_source(path)
    must_say(caught.value, "2 of 4 chunks are missing", "c/1/0/0/0, c/2/0/0/0")


def test_chunks_of_the_fill_value_that_zarr_left_away_are_refused(tmp_path):
    zarr.create_array(tmp_path / "x.zarr", data=np.zeros_like(BATCH), chunks=(3, 5, 7, 3))
    with pytest.raises(SourceError) as caught:
        datasets.open_source(tmp_path / "x.zarr")
    must_say(caught.value, "4 of 4 chunks are missing")


def test_what_is_no_file_among_the_chunks_is_refused(tmp_path):
    path = written(tmp_path / "x.zarr")
    (path / "c/1/0/0/0").unlink()
    os.mkfifo(path / "c/1/0/0/0")
    with pytest.raises(SourceError) as caught:
        datasets.open_source(path)
    must_say(caught.value, path / "c/1/0/0/0", "no file")
    (path / "c/1/0/0/0").unlink()
    (path / "c/1/0/0/0").mkdir()
    with pytest.raises(SourceError) as caught:
        datasets.open_source(path)
    must_say(caught.value, "1 of 4 chunks are missing")


def test_what_may_not_be_read_is_refused(tmp_path):
    path = written(tmp_path / "x.zarr")
    script = """
import sys
from datasets_on_disk import obey_permissions
from fastvgg import datasets, errors
from pathlib import Path
obey_permissions()
try:
    datasets.open_source(Path(sys.argv[1]))
except errors.SourceError as error:
    print(error)
"""
    for name in ("c", "zarr.json", "."):
        with permissions(path / name, 0):
            assert str(path) in printed_by(script, path)


def test_a_name_without_an_array_is_refused(tmp_path):
    (tmp_path / "empty.zarr").mkdir()
    (tmp_path / "file.zarr").write_bytes(b"a file")
    for name, word in (("missing", "exist"), ("empty", "no Zarr array"), ("file", "Zarr")):
        with pytest.raises(SourceError) as caught:
            datasets.open_source(tmp_path / f"{name}.zarr")
        must_say(caught.value, tmp_path / f"{name}.zarr", word)


def test_options_for_image_files_and_work_in_place_are_refused(tmp_path):
    path = written(tmp_path / "x.zarr")
    with pytest.raises(SourceError) as caught:
        fastvgg.plan(path, tmp_path / "y.npy", mode="tf", size=(3, 3))
    must_say(caught.value, path, "--size")
    with pytest.raises(UsageError) as caught:
        fastvgg.plan(path, in_place=True, mode="tf")
    must_say(caught.value, "in place")


def test_the_package_that_is_missing_is_named(tmp_path):
    script = """
import sys
sys.modules["zarr"] = None
import fastvgg
for paths in ((sys.argv[1], "y.npy"), (sys.argv[2], "y.zarr")):
    try:
        fastvgg.plan(*paths, mode="tf").run()
    except fastvgg.errors.FastvggError as error:
        print(error.exit_code, error.remedy)
"""
    paths = written(tmp_path / "x.zarr"), save_npy(tmp_path / "x.npy", BATCH)
    done = python(script, *paths, cwd=tmp_path)
    assert done.stdout.count("3 install it: pip install 'fastvgg[zarr]'") == 2, done.stderr


CHECKED = ("checksums", "shards with checksums", "gzip")


def damaged_while_open(tmp_path, damage, stored):
    """An open source, and the key of its chunk that was damaged after it was opened."""
    settings = {
        "checksums": WAYS_TO_STORE["checksums"],
        "gzip": WAYS_TO_STORE["gzip"],
        "shards with checksums": {
            "chunks": (1, 5, 7, 3),
            "shards": (3, 5, 7, 3),
            "compressors": zarr.codecs.Crc32cCodec(),
        },
    }[stored]
    path = written(tmp_path / "x.zarr", **settings)
    source = datasets.open_source(path)
    chunk = path / "c/1/0/0/0"
    content = bytearray(chunk.read_bytes())
    if damage == "gone":
        chunk.unlink()
    elif damage == "flipped":
        content[len(content) // 3] ^= 1
        chunk.write_bytes(content)
    else:
        chunk.write_bytes(content[: {"empty": 0, "short": 60, "a byte short": -1}[damage]])
    return source


@pytest.mark.parametrize("stored", CHECKED)
@pytest.mark.parametrize("damage", ["gone", "flipped", "empty", "short", "a byte short"])
def test_a_damaged_chunk_is_named_and_the_others_are_read(tmp_path, damage, stored):
    source = damaged_while_open(tmp_path, damage, stored)
    assert source.read(0, 3).batch.tobytes() == BATCH[:3].tobytes()
    assert source.read(6, 11).batch.tobytes() == BATCH[6:].tobytes()
    for start, stop in ((3, 6), (0, 11), (2, 7)):
        with pytest.raises(StoppedError) as caught:
            source.read(start, stop)
        must_say(caught.value, tmp_path / "x.zarr", "c/1/0/0/0")
        assert caught.value.exit_code == 5


def test_a_chunk_that_is_short_is_noticed_without_a_checksum(tmp_path):
    path = written(tmp_path / "x.zarr", compressors=None)
    source = datasets.open_source(path)
    content = (path / "c/1/0/0/0").read_bytes()
    for length in (0, 1, len(content) // 2, len(content) - 1, len(content) + 1):
        (path / "c/1/0/0/0").write_bytes((content + b"\0")[:length])
        with pytest.raises(StoppedError) as caught:
            source.read(0, 11)
        must_say(caught.value, "c/1/0/0/0")


def test_a_source_that_changes_under_a_run_is_seen(tmp_path):
    path = written(tmp_path / "x.zarr")
    plan = plan_of(path, tmp_path / "y.npy", mode="tf")
    zarr.open_array(path, mode="r+")[3] = 0
    with pytest.raises(SourceError) as caught:
        plan.run()
    must_say(caught.value, "has changed")


@pytest.fixture
def array(tmp_path):
    return save_npy(tmp_path / "x.npy", BATCH)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("mode", KERAS_MODES)
def test_a_result_is_the_same_bits_as_in_a_npy_and_comes_back(array, tmp_path, mode, dtype):
    path = tmp_path / "y.zarr"
    plan_of(array, path, mode=mode, dtype=dtype, together=TOGETHER).run()
    expected = oracle.apply(fastvgg.Transform(mode, dtype=dtype), BATCH)
    check_reads(path, expected, dtype)
    read = zarr.open_array(path, mode="r")[:]
    assert read.dtype == np.dtype(dtype)
    assert read.tobytes() == expected.tobytes()
    plan_of(path, tmp_path / "back.zarr", direction="restore", together=3).run()
    check_reads(tmp_path / "back.zarr", BATCH, "uint8")


def test_a_shard_is_a_chunk_of_the_run_with_checksums_and_names(array, tmp_path):
    path = tmp_path / "y.zarr"
    plan = plan_of(array, path, mode="caffe", together=TOGETHER)
    plan.run()
    assert names_in(path) == [*[f"c.{number}.0.0.0" for number in range(SHARDS)], "zarr.json"]
    stored = zarr.open_array(path, mode="r")
    assert stored.shards == (TOGETHER, 5, 7, 3)
    fields = metadata_of(path)
    (sharding,) = fields["codecs"]
    for codecs in ("codecs", "index_codecs"):
        assert [codec["name"] for codec in sharding["configuration"][codecs]] == ["bytes", "crc32c"]
    assert fields["dimension_names"] == ["image", "height", "width", "channel"]
    said = json.loads(json.dumps(plan.transform.to_dict()))
    assert fields["attributes"] == {"fastvgg": {"transform": said}}
    assert names_in(tmp_path) == ["x.npy", "y.zarr", "y.zarr.fastvgg.json"]


def test_dimensions_are_named_by_the_layout(array, tmp_path):
    plan_of(array, tmp_path / "y.zarr", mode="caffe", out_layout="NCHW").run()
    names = metadata_of(tmp_path / "y.zarr")["dimension_names"]
    assert names == ["image", "channel", "height", "width"]


def test_large_shards_hold_pieces_that_are_read_alone():
    together = piece_images(602_112)
    assert 4 < together < 20
    assert piece_images(10**9) == 1


@pytest.mark.parametrize(("images", "pieces"), [(60, 5), (47, 1), (12, 6)])
def test_a_piece_is_a_part_of_a_shard_without_rest(tmp_path, images, pieces, monkeypatch):
    monkeypatch.setattr(datasets.base, "PIECE_BYTES", 6 * 5 * 7 * 3 * 4)
    array = save_npy(tmp_path / "x.npy", pixels(images, height=5, width=7))
    plan = plan_of(array, tmp_path / "y.zarr", mode="caffe", memory="1GiB")
    plan.run()
    stored = zarr.open_array(tmp_path / "y.zarr", mode="r")
    assert stored.shards[0] == images
    expected = max(count for count in range(1, 7) if images % count == 0)
    assert stored.chunks[0] == expected
    assert pieces in (expected, 5)
    fastvgg.verify(tmp_path / "y.zarr", full=True)


def test_shards_that_are_full_of_the_fill_value_are_written_too(tmp_path):
    array = save_npy(tmp_path / "x.npy", np.zeros((7, 5, 7, 3), np.float32))
    plan_of(array, tmp_path / "y.zarr", mode="identity", together=2).run()
    assert len(names_in(tmp_path / "y.zarr")) == 5
    check_reads(tmp_path / "y.zarr", np.zeros((7, 5, 7, 3), np.float32), "float32")


class CreatingStorage(Storage):
    """Storage that keeps the name of every file that it makes."""

    def __init__(self):
        super().__init__()
        self.created = []

    def create(self, path):
        self.created.append(path.name)
        return super().create(path)


def test_no_file_is_written_twice(array, tmp_path):
    storage = CreatingStorage()
    run(plan_of(array, tmp_path / "y.zarr", mode="tf", together=TOGETHER), storage=storage)
    assert len(storage.created) == len(set(storage.created)) == SHARDS + 2


def test_halves_of_bfloat16_are_refused(array, tmp_path):
    with pytest.raises(TargetError) as caught:
        plan_of(array, tmp_path / "y.zarr", mode="tf", dtype="bfloat16")
    must_say(caught.value, tmp_path / "y.zarr", "bfloat16", "float16")


@pytest.fixture
def stored(array, tmp_path):
    """A finished array without a manifest."""
    plan_of(array, tmp_path / "y.zarr", mode="torch", out_layout="NCHW", together=3).run()
    (tmp_path / "y.zarr.fastvgg.json").unlink()
    return tmp_path / "y.zarr"


def test_what_was_done_is_known_without_a_manifest(stored, tmp_path):
    known = info(stored)
    assert (known["state"], known["mode"], known["layout"]) == ("source", "torch", "NCHW")
    plan_of(stored, tmp_path / "back.npy", direction="restore").run()
    assert np.load(tmp_path / "back.npy").tobytes() == BATCH.tobytes()
    with pytest.raises(SourceError) as caught:
        plan_of(stored, tmp_path / "z.npy", mode="torch")
    must_say(caught.value, stored, "preprocessed already")
    with pytest.raises(UsageError) as caught:
        plan_of(stored, tmp_path / "z.npy", mode="tf", direction="restore")
    must_say(caught.value, "torch", "tf")
    with pytest.raises(SourceError):
        list(fastvgg.batches(stored, 4, transform=fastvgg.Transform("tf")))
    for images, rows in fastvgg.batches(stored, 4, threads=1):
        expected = oracle.apply(fastvgg.Transform("torch", out_layout="NCHW"), BATCH[rows])
        assert images.tobytes() == expected.tobytes()


@pytest.mark.parametrize("said", [7, {}, "torch", {"transform": {}}, {"transform": [1]}])
def test_attributes_that_are_damaged_are_refused(stored, tmp_path, said):
    edited(stored, attributes={"fastvgg": said})
    with pytest.raises(SourceError) as caught:
        plan_of(stored, tmp_path / "z.npy", direction="restore")
    must_say(caught.value, stored, "no transform", "--mode")


def test_attributes_of_others_say_nothing(stored, tmp_path):
    edited(stored, attributes={"others": 3})
    with pytest.raises(UsageError) as caught:
        plan_of(stored, tmp_path / "z.npy", direction="restore")
    must_say(caught.value, "mode")


def test_a_directory_that_is_there_is_not_replaced_unless_fastvgg_wrote_it(array, tmp_path):
    path = written(tmp_path / "y.zarr")
    before = tree(path)
    for restart in (False, True):
        with pytest.raises(TargetError) as caught:
            plan_of(array, path, mode="tf", restart=restart)
        must_say(caught.value, path)
    assert tree(path) == before
    shutil.rmtree(path)
    plan_of(array, path, mode="tf").run()
    with pytest.raises(TargetError) as caught:
        plan_of(array, path, mode="caffe")
    must_say(caught.value, "another job", "--restart")
    plan_of(array, path, mode="caffe", restart=True, together=TOGETHER).run()
    check_reads(path, EXPECTED, "float32")
    assert names_in(tmp_path) == ["x.npy", "y.zarr", "y.zarr.fastvgg.json"]


def test_images_are_packed_with_their_index_and_tried_again(tmp_path):
    photos = save_images(tmp_path / "photos", BATCH, [f"{row:02d}.png" for row in range(IMAGES)])
    whole = (photos / "03.png").read_bytes()
    (photos / "03.png").write_bytes(whole[:50])
    path = tmp_path / "y.zarr"
    assert plan_of(photos, path, direction="pack", together=2).run().counts["failed"] == 1
    expected = BATCH.copy()
    expected[3] = 0
    assert zarr.open_array(path, mode="r")[:].tobytes() == expected.tobytes()
    assert [record.failed for record in datasets.open_source(path).records][2:5] == [0, 1, 0]
    fastvgg.verify(path, full=True)
    before = tree(path)
    (photos / "03.png").write_bytes(whole)
    plan_of(photos, path, direction="pack", retry_failed=True, together=2).run()
    check_reads_images(path)
    after = tree(path)
    assert [name for name in after if after[name] != before[name]] == [b"c.1.0.0.0"]
    fastvgg.verify(path, full=True)


def check_reads_images(path):
    assert zarr.open_array(path, mode="r")[:].tobytes() == BATCH.tobytes()


@pytest.mark.parametrize("damage", ["a flipped bit", "a flipped bit of the index", "gone", "empty"])
def test_damage_is_found_by_verifying(array, tmp_path, damage):
    path = tmp_path / "y.zarr"
    plan_of(array, path, mode="caffe", together=TOGETHER).run()
    assert fastvgg.verify(path, full=True).recomputed_images == IMAGES
    shard = path / "c.2.0.0.0"
    content = bytearray(shard.read_bytes())
    content[-3 if "index" in damage else 5] ^= 2
    shard.write_bytes(b"" if damage == "empty" else content)
    if damage == "gone":
        shard.unlink()
    with pytest.raises(VerificationError) as caught:
        fastvgg.verify(path)
    must_say(caught.value, path, "c.2.0.0.0")
    assert caught.value.exit_code == 4


def test_shards_that_took_each_others_place_are_found_by_verifying(array, tmp_path):
    path = tmp_path / "y.zarr"
    plan_of(array, path, mode="caffe", together=TOGETHER).run()
    shutil.copy(path / "c.1.0.0.0", path / "c.2.0.0.0")
    with pytest.raises(VerificationError) as caught:
        fastvgg.verify(path)
    must_say(caught.value, path, "images 4 to 5")


def test_other_metadata_are_found_by_verifying(array, tmp_path):
    path = tmp_path / "y.zarr"
    plan_of(array, path, mode="caffe", together=TOGETHER).run()
    edited(path, shape=[IMAGES - 1, 5, 7, 3])
    with pytest.raises(SourceError) as caught:
        fastvgg.verify(path)
    must_say(caught.value, path, (IMAGES - 1, 5, 7, 3), (IMAGES, 5, 7, 3))


@pytest.fixture
def cut_off(array, tmp_path):
    """The directory of a run that died with four chunks committed."""
    with pytest.raises(Death):
        run(
            plan_of(array, tmp_path / "y.zarr", mode="caffe", together=2), storage=CuttingStorage(4)
        )
    assert info(tmp_path / "y.zarr")["committed_chunks"] == 4
    assert not (tmp_path / "y.zarr").exists()
    return tmp_path / "y.zarr.partial"


@pytest.mark.parametrize("damage", ["cut", "flipped", "gone", "another", "empty"])
def test_a_shard_that_is_not_what_was_committed_is_done_again(cut_off, array, tmp_path, damage):
    shard = cut_off / "c.2.0.0.0"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 4
    if damage == "gone":
        shard.unlink()
    else:
        others = (cut_off / "c.1.0.0.0").read_bytes()
        shard.write_bytes(
            {"cut": content[:-7], "flipped": content, "another": others}.get(damage, b"")
        )
    report = plan_of(array, tmp_path / "y.zarr", mode="caffe").run()
    assert report.counts["computed_chunks"] == SHARDS - 3
    check_reads(tmp_path / "y.zarr", EXPECTED, "float32")
    fastvgg.verify(tmp_path / "y.zarr", full=True)


def test_an_unfinished_run_goes_on_with_what_it_has(cut_off, array, tmp_path):
    report = plan_of(array, tmp_path / "y.zarr", mode="caffe").run()
    assert report.counts["computed_chunks"] == SHARDS - 4
    check_reads(tmp_path / "y.zarr", EXPECTED, "float32")
    assert not cut_off.exists()


@pytest.mark.parametrize("damage", ["gone", "changed"])
def test_metadata_that_are_not_what_was_written_are_refused(cut_off, array, tmp_path, damage):
    if damage == "gone":
        (cut_off / "zarr.json").unlink()
    else:
        edited(cut_off, fill_value=1.0)
    with pytest.raises(ResumeError) as caught:
        plan_of(array, tmp_path / "y.zarr", mode="caffe").run()
    must_say(caught.value, cut_off / "zarr.json", "--restart")
    plan_of(array, tmp_path / "y.zarr", mode="caffe", restart=True).run()
    check_reads(tmp_path / "y.zarr", EXPECTED, "float32")


def test_shards_are_rounded_to_pieces(tmp_path):
    array = save_npy(tmp_path / "x.npy", np.zeros((100, 224, 224, 3), np.uint8))
    plan = fastvgg.plan(array, tmp_path / "y.zarr", mode="tf", memory="512MiB")
    assert plan.chunk_images % piece_images(224 * 224 * 3 * 4) == 0
    assert plan.projected_bytes <= plan.memory_bytes
