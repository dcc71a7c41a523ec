"""Zarr: every encoding of zarr-python, damage, shards, and the recorded transform."""

from __future__ import annotations

import contextlib
import json
import math
import mmap
import os
import shutil

import google_crc32c
import numcodecs
import numpy as np
import pytest
import zarr
from zarr.buffer import cpu
from zarr.codecs import BloscCodec, Crc32cCodec, GzipCodec, TransposeCodec, ZstdCodec
from zarr.storage import MemoryStore

import fastvgg
from fastvgg.datasets import formats
from fastvgg.datasets.base import Header
from fastvgg.datasets.open import open_source
from fastvgg.datasets.zarr import CHUNK_OVERHEAD_BYTES, ZarrSource
from fastvgg.datasets.zarr_writer import ShardEncoder
from fastvgg.errors import (
    FastvggError,
    SourceError,
    StoppedError,
    TargetError,
    UsageError,
    VerificationError,
)
from fastvgg.storage.local import Storage
from fastvgg.storage.location import Location
from fastvgg.stream.info import info
from fastvgg.stream.manifest import Provenance, manifest_path
from tests.helpers.batches import assert_same
from tests.helpers.datasets_on_disk import (
    check_error,
    names_in,
    network_inputs,
    pixels,
    plan_of,
    save_images,
    save_npy,
    stdout_of,
    tree,
)
from tests.helpers.formats import check_spans
from tests.helpers.runs import run
from tests.helpers.zarr_on_disk import (
    change_metadata,
    chunk_files,
    flip,
    key_of,
    load_zarr,
    metadata_of,
    save_zarr,
)

# Encodings of ten images of 7x9 pixels.
V2 = {"zarr_format": 2}
DOT_KEYS = {"name": "default", "separator": "."}
ENCODINGS = {
    "plain": {},
    "one chunk": {"chunks": (10, 7, 9, 3)},
    "larger chunks than the array": {"chunks": (16, 8, 16, 4)},
    "chunks that divide no axis": {"chunks": (3, 4, 5, 2)},
    "a chunk for each row and channel": {"chunks": (4, 1, 9, 1)},
    "dots in the keys": {"chunks": (3, 4, 5, 2), "chunk_key_encoding": DOT_KEYS},
    "keys of the second version": {"chunk_key_encoding": {"name": "v2", "separator": "."}},
    "shards": {"chunks": (2, 7, 9, 3), "shards": (4, 7, 9, 3)},
    "shards that divide no axis": {"chunks": (2, 2, 3, 1), "shards": (4, 4, 6, 2)},
    "compressed shards": {"shards": (6, 7, 9, 3), "compressors": ZstdCodec()},
    "shards of blosc": {"shards": (6, 7, 9, 3), "compressors": BloscCodec()},
    "zstd": {"compressors": ZstdCodec(checksum=True)},
    "blosc": {"compressors": BloscCodec()},
    "gzip": {"compressors": GzipCodec()},
    "a checksum": {"compressors": Crc32cCodec()},
    "transposed": {"filters": TransposeCodec(order=(0, 3, 1, 2))},
    "v2": V2,
    "v2, slashes": {
        **V2,
        "chunks": (3, 4, 5, 2),
        "chunk_key_encoding": {"name": "v2", "separator": "/"},
    },
    "v2, blosc": {**V2, "compressors": numcodecs.Blosc()},
    "v2, zlib": {**V2, "compressors": numcodecs.Zlib()},
    "v2, in Fortran's order": {**V2, "order": "F"},
}
CHECKED_ENCODINGS = {  # a checksum or the compressor detects damage
    "shards": {"shards": (4, 7, 9, 3), "compressors": Crc32cCodec()},
    "zstd": {"compressors": ZstdCodec(checksum=True)},
    "gzip": {"compressors": GzipCodec()},
    "a checksum": {"compressors": Crc32cCodec()},
    "v2, zlib": {**V2, "compressors": numcodecs.Zlib()},
    "v2, lzma": {**V2, "compressors": numcodecs.LZMA()},
    "v2, bz2": {**V2, "compressors": numcodecs.BZ2()},
}


@pytest.fixture
def stored(tmp_path):
    """Ten images, in chunks of two."""
    return save_zarr(tmp_path / "x.zarr", pixels(10))


def opened(path, **settings):
    source = open_source(Location.parse(path), **settings)
    assert isinstance(source, ZarrSource)
    return source


# Sources


@pytest.mark.parametrize("name", ENCODINGS)
def test_every_encoding_is_read(tmp_path, name):
    batch = pixels(10)
    path = save_zarr(tmp_path / "x.zarr", batch, **ENCODINGS[name])
    source = opened(path)
    assert source.header == Header(batch.shape, "uint8", "NHWC")
    assert np.array_equal(load_zarr(path), batch)
    check_spans(source, batch)
    source.close()


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("dtype", ["uint8", "float16", "float32", "float64"])
def test_every_dtype_and_byte_order_is_read(tmp_path, dtype, order, version):
    batch = network_inputs(pixels(5), "torch", dtype="float64").astype(dtype)
    swapped = batch.astype(batch.dtype.newbyteorder(order))
    path = save_zarr(tmp_path / "x.zarr", swapped, zarr_format=version)
    source = opened(path)
    assert source.header.dtype == dtype
    assert_same(source.read(0, 5).batch, batch)


@pytest.mark.parametrize("version", [2, 3])
def test_array_in_a_group_is_read_and_a_group_is_rejected_with_its_names(tmp_path, version):
    group = zarr.create_group(tmp_path / "x.zarr", zarr_format=version)
    group.create_group("more").create_group("empty")
    for name in ("labels", "images", "more/images", "damaged"):
        save_zarr(tmp_path / "x.zarr" / name, pixels(3), zarr_format=version)
    metadata_of(tmp_path / "x.zarr" / "damaged").write_text('{"shape": "')
    assert_same(opened(tmp_path / "x.zarr" / "images").read(0, 3).batch, pixels(3))
    with pytest.raises(SourceError) as caught:
        opened(tmp_path / "x.zarr")
    names = "its arrays are: damaged, images, labels, more/images\n"
    check_error(caught.value, tmp_path / "x.zarr", "group", names, "x.zarr/NAME")
    with pytest.raises(SourceError) as caught:
        opened(tmp_path / "x.zarr" / "more" / "empty")
    check_error(caught.value, tmp_path / "x.zarr" / "more" / "empty", "none")


def test_array_path_needs_no_suffix(tmp_path):
    path = save_zarr(tmp_path / "images", pixels(3))
    assert opened(path).header.images == 3


@pytest.mark.parametrize(
    ("settings", "images_per_chunk"),
    [
        ({}, 2),
        ({"chunks": (3, 4, 5, 2)}, 3),
        ({"chunks": (64, 7, 9, 3)}, 40),
        ({"chunks": (4, 7, 9, 3), "shards": (12, 7, 9, 3)}, 4),
    ],
    ids=["chunks", "in pieces", "larger than the array", "shards"],
)
def test_run_reads_whole_chunks(tmp_path, settings, images_per_chunk):
    batch = pixels(40)
    path = save_zarr(tmp_path / "x.zarr", batch, **settings)
    assert opened(path).read_granularity == images_per_chunk
    plan = plan_of(path, tmp_path / "y.npy", mode="caffe", images_per_chunk=images_per_chunk)
    assert plan.chunk_images == images_per_chunk
    assert plan.chunks == -(-40 // images_per_chunk)
    if images_per_chunk < 40:
        more = plan_of(
            path, tmp_path / "y.npy", mode="caffe", images_per_chunk=2 * images_per_chunk + 1
        )
        assert more.chunk_images == 2 * images_per_chunk
    plan.run()
    assert_same(np.load(tmp_path / "y.npy"), network_inputs(batch, "caffe"))


def test_memory_limit_below_a_chunk_is_rejected_with_a_sufficient_one(tmp_path):
    path = save_zarr(tmp_path / "x.zarr", pixels(3000, 9, 19), chunks=(2500, 9, 19, 3))
    with pytest.raises(TargetError) as caught:
        plan_of(path, tmp_path / "y.npy", mode="caffe", memory="6MiB")
    check_error(caught.value, "2500 images, stored together", "6.0 MiB", "give memory=")
    sufficient = caught.value.remedy.split("'")[1]
    plan = plan_of(path, tmp_path / "y.npy", mode="caffe", memory=sufficient)
    assert plan.chunk_images == 2500


def test_plan_memory_includes_the_copies_of_zarr(tmp_path):
    save_npy(tmp_path / "x.npy", pixels(10))
    path = save_zarr(tmp_path / "x.zarr", pixels(10))
    image, result = 7 * 9 * 3, 7 * 9 * 3 * 4
    decoded = image + CHUNK_OVERHEAD_BYTES // 2  # of a chunk of two images
    needs = {
        (source.suffix, target): plan_of(
            source, tmp_path / f"y{target}", mode="tf"
        ).image_memory_bytes
        for source in (path, tmp_path / "x.npy")
        for target in (".npy", ".zarr")
    }
    assert needs == {
        (".npy", ".npy"): image + 2 * result,
        (".npy", ".zarr"): image + 5 * result,
        (".zarr", ".npy"): image + 2 * decoded + 2 * result,
        (".zarr", ".zarr"): image + 2 * decoded + 5 * result,
    }


# Refused arrays


def assert_rejected(path, *words, error=SourceError, **settings):
    """Check that a source and a plan reject an array with a message that contains `words`."""
    with pytest.raises(error) as caught:
        open_source(Location.parse(path), **settings)
    check_error(caught.value, path, *words)
    assert caught.value.exit_code == 3
    assert str(caught.value).replace("\n", "").isprintable()
    assert len(str(caught.value)) < 1000
    with pytest.raises(FastvggError):
        plan_of(path, path.parent / "y.npy", mode="caffe")


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.zeros((7, 9, 3), np.uint8), ("(7, 9, 3)", "rank 3")),
        (np.zeros((2, 2, 7, 9, 3), np.uint8), ("rank 5",)),
        (np.zeros((0, 7, 9, 3), np.uint8), ("no images",)),
        (np.zeros((2, 7, 9, 3), np.int32), ("int32", "uint8, float16, float32, float64")),
        (np.zeros((2, 7, 9, 3), np.complex64), ("complex64",)),
        (np.zeros((2, 7, 9, 3), bool), ("bool",)),
        (np.zeros((2, 7, 9, 3), "datetime64[s]"), ("datetime64",)),
    ],
    ids=lambda value: str(value.dtype) if isinstance(value, np.ndarray) else "",
)
@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.filterwarnings("ignore::zarr.errors.UnstableSpecificationWarning")
def test_non_image_array_is_rejected(tmp_path, array, words, version):
    path = tmp_path / "x.zarr"
    zarr.create_array(path, shape=array.shape, dtype=array.dtype, zarr_format=version)
    assert_rejected(path, *words)


@pytest.mark.parametrize("dtype", ["U3", "S3", [("a", "f4"), ("b", "u1")], str])
@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.filterwarnings("ignore::zarr.errors.UnstableSpecificationWarning")
def test_strings_and_structured_dtypes_are_rejected(tmp_path, dtype, version):
    path = tmp_path / "x.zarr"
    zarr.create_array(path, shape=(2, 7, 9, 3), dtype=dtype, zarr_format=version)
    assert_rejected(path, "Python objects" if dtype is str else "unsupported dtype")


def test_pickles_are_never_loaded(tmp_path):
    path = save_zarr(tmp_path / "x.zarr", pixels(3), **V2)
    change_metadata(path, filters=[{"id": "pickle", "protocol": 5}])
    assert_rejected(path, "pickle")
    change_metadata(path, filters=None, compressor={"id": "pickle", "protocol": 5})
    assert_rejected(path, "pickle")
    change_metadata(path, filters=[{"id": "pickle"}], compressor=None, dtype="|O", fill_value=None)
    assert_rejected(path)


def test_word_pickle_in_attributes_is_not_a_codec(tmp_path):
    path = save_zarr(tmp_path / "x.zarr", pixels(3), attributes={"shown": "Pickles, in a jar"})
    assert_same(opened(path).read(0, 3).batch, pixels(3))


def changing_metadata(**fields):
    return lambda path: change_metadata(path, **fields)


def damage_shards(path, **fields):
    """Store an array in shards, and change fields of the configuration of their codec."""
    save_zarr(path, pixels(10), shards=(4, 7, 9, 3), overwrite=True)
    (codec,) = json.loads(metadata_of(path).read_bytes())["codecs"]
    codec["configuration"].update(fields)
    change_metadata(path, codecs=[codec])


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: metadata_of(path).unlink(),
        lambda path: metadata_of(path).write_bytes(b""),
        lambda path: metadata_of(path).write_bytes(b"\0\xff"),
        lambda path: metadata_of(path).write_text("[" * 100_000),
        lambda path: metadata_of(path).write_text("[]"),
        lambda path: metadata_of(path).write_text("null"),
        lambda path: metadata_of(path).write_text("{}"),
        lambda path: (metadata_of(path).unlink(), os.mkfifo(path / "zarr.json")),
        lambda path: (metadata_of(path).unlink(), (path / "zarr.json").mkdir()),
        changing_metadata(zarr_format=4),
        changing_metadata(shape="many"),
        changing_metadata(shape=[-1, 7, 9, 3]),
        changing_metadata(data_type="uint7"),
        changing_metadata(data_type={"name": "\x1b[2J"}),
        changing_metadata(codecs=[{"name": "\x1b[2J", "configuration": {}}]),
        changing_metadata(codecs=[{"name": "bytes"}, {"name": "zpaq", "configuration": {}}]),
        changing_metadata(codecs=[]),
        changing_metadata(codecs=7),
        changing_metadata(fill_value=2**70),
        changing_metadata(fill_value="x"),
        changing_metadata(
            chunk_grid={"name": "regular", "configuration": {"chunk_shape": [0, 7, 9, 3]}}
        ),
        changing_metadata(
            chunk_grid={"name": "regular", "configuration": {"chunk_shape": [2, 7, 9]}}
        ),
        changing_metadata(chunk_grid={"name": "irregular"}),
        lambda path: damage_shards(path, chunk_shape=[0, 7, 9, 3]),
        lambda path: damage_shards(path, chunk_shape=[-2, 7, 9, 3]),
        changing_metadata(storage_transformers="\x1b[2J"),
        changing_metadata(storage_transformers="x" * 5000),
        changing_metadata(node_type="grope"),
        changing_metadata(something={"must_understand": True}),
    ],
)
def test_damaged_metadata_is_rejected(stored, damage):
    damage(stored)
    assert_rejected(stored)


def test_truncated_metadata_is_rejected(stored):
    intact = metadata_of(stored).read_bytes()
    for length in range(0, len(intact), 7):
        metadata_of(stored).write_bytes(intact[:length])
        with pytest.raises(SourceError) as caught:
            opened(stored)
        check_error(caught.value, stored)


@pytest.mark.parametrize("shape", [[10**12, 7, 9, 3], [10, 10**6, 10**6, 3], [10**18, 1, 3, 3]])
@pytest.mark.parametrize("chunks", [[1, 1, 1, 1], [2, 7, 9, 3]])
def test_missing_chunks_are_counted_without_listing_them(stored, shape, chunks):
    grid = {"name": "regular", "configuration": {"chunk_shape": chunks}}
    change_metadata(stored, shape=shape, chunk_grid=grid)
    expected = math.prod(-(-a // b) for a, b in zip(shape, chunks, strict=True))
    assert_rejected(stored, f"of {expected} chunks are missing")


@pytest.mark.parametrize("images", [2**63 // (7 * 9 * 3) + 1, 10**18, 10**400])
def test_shape_with_too_many_elements_is_rejected(stored, images):
    change_metadata(stored, shape=[images, 7, 9, 3])
    assert_rejected(stored, f"has shape ({images}"[:100], "more elements than an array can have")


@pytest.mark.parametrize("size", [2**63, 10**400])
def test_oversized_chunk_shape_is_rejected(stored, size):
    for chunks in ([size, 7, 9, 3], [2**21, 2**21, 2**21, 3], [1, 7, 9, size]):
        grid = {"name": "regular", "configuration": {"chunk_shape": chunks}}
        change_metadata(stored, chunk_grid=grid)
        assert_rejected(stored, f"has invalid chunk shape ({chunks[0]}"[:100])


def test_missing_chunks_are_counted_and_the_first_are_listed(tmp_path, stored):
    for number in (1, 3):
        shutil.rmtree(stored / "c" / str(number))
    assert_rejected(stored, "2 of 5 chunks", "c/1/0/0/0", "missing_chunks='fill'")
    (stored / "notes.txt").write_text("of no chunk")
    assert_rejected(stored, "2 of 5 chunks", "c/1/0/0/0, c/3/0/0/0")
    for number in range(20):  # other files are not counted as chunks
        (stored / f"c.{number}").write_bytes(b"")
    assert_rejected(stored, "2 of 5 chunks", "c/1/0/0/0, c/3/0/0/0")


def test_chunks_omitted_by_zarr_are_missing(tmp_path):
    batch = pixels(10)
    batch[4:6] = 0
    made = zarr.create_array(
        tmp_path / "x.zarr", shape=batch.shape, dtype="uint8", chunks=(2, 7, 9, 3)
    )
    made[...] = batch
    assert_rejected(tmp_path / "x.zarr", "1 of 5 chunks", "c/2/0/0/0", "fill value 0")
    with zarr.config.set({"array.write_empty_chunks": True}):
        zarr.open_array(tmp_path / "x.zarr")[...] = batch
    assert_same(opened(tmp_path / "x.zarr").read(0, 10).batch, batch)


def test_chunk_that_is_not_a_regular_file_is_rejected(stored):
    chunk = chunk_files(stored)[2]
    chunk.unlink()
    chunk.mkdir()
    assert_rejected(stored, "c/2/0/0/0")
    chunk.rmdir()
    os.mkfifo(chunk)
    assert_rejected(stored, "c/2/0/0/0", "not a regular file")
    chunk.unlink()
    chunk.symlink_to("nowhere")
    assert_rejected(stored, "c/2/0/0/0")


def test_unreadable_file_is_rejected(tmp_path):
    script = (
        "import sys; from pathlib import Path\n"
        "from tests.helpers.datasets_on_disk import *; drop_permission_override()\n"
        "from tests.helpers.zarr_on_disk import *; from fastvgg.errors import *\n"
        "from fastvgg.datasets.open import open_source\n"
        "from fastvgg.storage.location import Location\n"
        "place = Path(sys.argv[1])\n"
        "path = save_zarr(place / 'x.zarr', pixels(10))\n"
        "def assert_rejected(what, *words):\n"
        "    with permissions(what, 0):\n"
        "        try: open_source(Location(path)).read(0, 10)\n"
        "        except FastvggError as error: check_error(error, *words); print(error.exit_code)\n"
        "assert_rejected(path, path, 'Permission')\n"
        "assert_rejected(path / 'zarr.json', path, 'Permission')\n"
        "assert_rejected(path / 'c', path / 'c', 'permissions')\n"
        "assert_rejected(path / 'c' / '3' / '0', path / 'c' / '3' / '0', 'permissions')\n"
        "assert_rejected(path / 'c' / '3' / '0' / '0' / '0', 'c/3/0/0/0', 'EACCES')\n"
    )
    assert stdout_of(script, tmp_path).split() == ["3", "3", "3", "3", "5"]


def test_without_zarr_the_error_names_the_extra_and_nothing_is_written(tmp_path, stored):
    save_npy(tmp_path / "x.npy", pixels(3))
    script = (
        "import sys; sys.modules['zarr'] = None\n"
        "import fastvgg\n"
        "from fastvgg.stream.info import info\n"
        "from fastvgg.errors import FastvggError\n"
        "stored, array, target = sys.argv[1:]\n"
        "for attempt in (\n"
        "    lambda: fastvgg.plan(stored, 'y.npy', mode='caffe'),\n"
        "    lambda: fastvgg.plan(array, target, mode='caffe'),\n"
        "    lambda: fastvgg.batches(stored, 2),\n"
        "):\n"
        "    try: attempt()\n"
        "    except FastvggError as error: print(error.exit_code, error.remedy)\n"
        "print(3, info(stored)['next'])\n"
    )
    printed = stdout_of(script, stored, tmp_path / "x.npy", tmp_path / "y.zarr")
    assert printed.splitlines() == ["3 in a clone of fastvgg: pip install '.[zarr]'"] * 4
    assert names_in(tmp_path) == ["x.npy", "x.zarr"]


# Damaged chunks


def assert_read_stops(source, *words):
    with pytest.raises(StoppedError) as caught:
        source.read(0, 10)
    check_error(caught.value, *words, "start over")
    assert caught.value.exit_code == 5
    assert str(caught.value).replace("\n", "").isprintable()


@pytest.mark.parametrize("name", CHECKED_ENCODINGS)
def test_truncated_or_bit_flipped_chunk_stops_the_run(tmp_path, name):
    path = save_zarr(tmp_path / "x.zarr", pixels(10), **CHECKED_ENCODINGS[name])
    source = opened(path)
    for file in chunk_files(path)[1::3]:
        intact = file.read_bytes()
        for at in range(0, len(intact), 1 + len(intact) // 11):
            file.write_bytes(intact[:at])
            assert_read_stops(source, path, f"chunk {key_of(path, file)} is damaged")
            file.write_bytes(intact)
            flip(file, 8 * at + at % 8)
            if name == "gzip" and at < 10:  # the date and the system in the header of gzip
                with contextlib.suppress(StoppedError):
                    assert_same(source.read(0, 10).batch, pixels(10))
            else:
                assert_read_stops(source, path, f"chunk {key_of(path, file)} is damaged")
            file.write_bytes(intact)
    assert_same(source.read(0, 10).batch, pixels(10))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        V2,
        {"compressors": BloscCodec()},
        {**V2, "compressors": numcodecs.Blosc()},
        {"compressors": [Crc32cCodec(), BloscCodec(cname="zstd", shuffle="bitshuffle")]},
        {"compressors": [BloscCodec(), Crc32cCodec()]},
    ],
    ids=["v3", "v2", "blosc", "v2, blosc", "blosc of a checksum", "a checksum of blosc"],
)
def test_chunk_of_wrong_length_stops_the_run(tmp_path, settings):
    batch = pixels(10) // 64
    path = save_zarr(tmp_path / "x.zarr", batch, **settings)
    source = opened(path)
    file = chunk_files(path)[3]
    intact = file.read_bytes()
    for length in [*range(0, len(intact), 19), 1, 15, 16, len(intact) - 1, len(intact) + 1]:
        file.write_bytes((intact + b"\0")[:length])
        assert_read_stops(source, path, f"chunk {key_of(path, file)} is damaged")
    file.write_bytes(intact)
    assert_same(source.read(0, 10).batch, batch)


def test_damaged_chunk_among_many_is_reported_by_key(tmp_path):
    settings = {"chunks": (3, 4, 5, 2), "compressors": Crc32cCodec()}
    path = save_zarr(tmp_path / "x.zarr", pixels(10), **settings)
    source = opened(path)
    for file in chunk_files(path):
        flip(file, 77)
        assert_read_stops(
            source, path, f"chunk {key_of(path, file)} is damaged: Stored and computed"
        )
        flip(file, 77)
    flip(path / "c" / "3" / "1" / "1" / "1", 9)
    assert_same(source.read(0, 9).batch, pixels(10)[:9])  # does not need that chunk


def test_missing_chunk_is_never_read_as_the_fill_value(tmp_path):
    path = save_zarr(tmp_path / "x.zarr", pixels(10), chunks=(3, 4, 5, 2))
    source = opened(path)
    for file in chunk_files(path):
        moved = file.rename(tmp_path / "moved")
        assert_read_stops(
            source, path, f"chunk {key_of(path, file)} is damaged: it is missing or empty"
        )
        moved.rename(file)


# Targets


class RecordingStorage(Storage):
    """Storage that records which files are created, opened for direct I/O, and how aligned."""

    def __init__(self):
        super().__init__(fsync=False)
        self.created = []
        self.direct_files = []
        self.alignments = {}

    def create(self, path, *, exclusive=False):
        self.created.append(path.name)
        return super().create(path, exclusive=exclusive)

    def direct(self, file):
        self.direct_files.append(file.path.name)
        return super().direct(file)

    def write(self, file, data, offset):
        address = np.frombuffer(data, np.uint8).ctypes.data
        self.alignments[file.path.name] = (address - offset) % mmap.PAGESIZE
        super().write(file, data, offset)


def set_inner_chunk_bytes(monkeypatch, nbytes):
    """Limit the size of inner chunks, so that a small shard has several."""
    monkeypatch.setattr(formats, "INNER_CHUNK_BYTES", nbytes)


def write_zarr(directory, images=10, images_per_chunk=4, **settings):
    """Preprocess images into y.zarr."""
    source = save_npy(directory / "x.npy", pixels(images))
    settings = {"mode": "caffe", "fsync": False, **settings}
    plan_of(source, directory / "y.zarr", images_per_chunk=images_per_chunk, **settings).run()
    return directory / "y.zarr"


def test_target_is_sharded_with_checksums_and_records_its_transform(tmp_path, monkeypatch):
    set_inner_chunk_bytes(monkeypatch, 2 * 756)
    path = write_zarr(tmp_path, out_layout="NCHW")
    assert sorted(names_in(path)) == ["c.0.0.0.0", "c.1.0.0.0", "c.2.0.0.0", "zarr.json"]
    array = zarr.open_array(path, mode="r")
    assert array.shape == (10, 3, 7, 9)
    assert array.shards == (4, 3, 7, 9)
    assert array.chunks == (2, 3, 7, 9)
    assert array.dtype == np.float32
    assert array.fill_value == 0
    assert array.metadata.dimension_names == ("image", "channel", "height", "width")
    (shards,) = json.loads((path / "zarr.json").read_bytes())["codecs"]
    assert shards["name"] == "sharding_indexed"
    for codecs in (shards["configuration"]["codecs"], shards["configuration"]["index_codecs"]):
        assert [codec["name"] for codec in codecs] == ["bytes", "crc32c"]
        assert codecs[0]["configuration"] == {"endian": "little"}
    recorded = array.attrs["fastvgg"]
    expected = fastvgg.Transform("caffe", out_layout="NCHW")
    assert recorded == {"transform": json.loads(json.dumps(expected.to_dict()))}
    assert Provenance.read(Location(path)).transform == expected


def test_inner_chunks_divide_a_shard_and_are_consecutive(tmp_path, monkeypatch):
    set_inner_chunk_bytes(monkeypatch, 4 * 756)
    batch = network_inputs(pixels(14), "caffe")
    encoder = ShardEncoder(Header(batch.shape, "float32", "NHWC"), 6, None)
    shards = [encoded(encoder, batch[start : start + 6]) for start in (0, 6, 12)]
    assert [encoder.key(start) for start in (0, 6, 12)] == [f"c.{n}.0.0.0" for n in range(3)]
    inner_chunk_bytes = 3 * 756 + 4
    assert [len(shard) for shard in shards] == [2 * inner_chunk_bytes + 2 * 16 + 4] * 3
    last = np.zeros((6, 7, 9, 3), np.float32)
    last[:2] = batch[12:]
    for shard, images in zip(shards, (batch[:6], batch[6:12], last), strict=True):
        assert is_crc_valid(shard[-36:])
        index = np.frombuffer(shard[-36:-4], "<u8").reshape(2, 2)
        assert index.tolist() == [[0, inner_chunk_bytes], [inner_chunk_bytes, inner_chunk_bytes]]
        for number, (offset, nbytes) in enumerate(index.tolist()):
            inner_chunk = shard[offset : offset + nbytes]
            assert is_crc_valid(inner_chunk)
            assert inner_chunk[:-4] == images[3 * number : 3 * number + 3].tobytes()


def encoded(encoder, batch):
    """Encode a shard into a buffer with a guard, and check that the guard is not overwritten."""
    memory = np.full(encoder.shard_bytes + 9, 171, np.uint8)
    encoder.encode(batch.data.cast("B"), memory[:-9])
    assert (memory[-9:] == 171).all()
    return memory[:-9].tobytes()


@pytest.mark.parametrize("dtype", ["uint8", "float16", "float32", "float64"])
@pytest.mark.parametrize("images_per_chunk", [1, 5, 6, 14, 20])
def test_shard_bytes_match_zarr(monkeypatch, dtype, images_per_chunk):
    set_inner_chunk_bytes(monkeypatch, 2 * 189 * np.dtype(dtype).itemsize)
    intact = (
        -(-14 // images_per_chunk) * images_per_chunk
    )  # zarr omits inner chunks after the last image
    batch = np.zeros((intact, 7, 9, 3), dtype)
    batch[:14] = pixels(14)
    encoder = ShardEncoder(Header(batch.shape, dtype, "NHWC"), images_per_chunk, None)
    stored = {name: cpu.Buffer.from_bytes(data) for name, data in encoder.metadata.items()}
    with zarr.config.set({"array.write_empty_chunks": True}):
        zarr.open_array(MemoryStore(stored))[:] = batch
    assert len(stored) == 1 + intact // images_per_chunk
    for start in range(0, intact, images_per_chunk):
        expected = stored[encoder.key(start)].to_bytes()
        assert encoded(encoder, batch[start : min(14, start + images_per_chunk)]) == expected


def is_crc_valid(content):
    return google_crc32c.value(content[:-4]) == int.from_bytes(content[-4:], "little")


@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
def test_dimensions_are_named(layout):
    shape = (5, 7, 9, 3) if layout == "NHWC" else (5, 3, 7, 9)
    encoder = ShardEncoder(Header(shape, "uint8", layout), 2, None)
    metadata = json.loads(encoder.metadata["zarr.json"])
    axes = {"NHWC": ["image", "height", "width", "channel"]}
    axes["NCHW"] = ["image", "channel", "height", "width"]
    assert metadata["dimension_names"] == axes[layout]
    assert metadata["attributes"] == {}


def test_plan_rounds_shards_to_whole_inner_chunks(tmp_path, monkeypatch):
    set_inner_chunk_bytes(monkeypatch, 4 * 756)
    source = save_npy(tmp_path / "x.npy", pixels(40))
    plans = [
        plan_of(source, tmp_path / "y.zarr", mode="tf", images_per_chunk=n) for n in (3, 7, 8, 11)
    ]
    assert [plan.chunk_images for plan in plans] == [3, 4, 8, 8]
    stored = save_zarr(tmp_path / "x.zarr", pixels(40), chunks=(3, 7, 9, 3))
    plans = [
        plan_of(stored, tmp_path / "y.zarr", mode="tf", images_per_chunk=n) for n in (6, 14, 39)
    ]
    assert [plan.chunk_images for plan in plans] == [6, 12, 36]


def test_images_that_equal_the_fill_value_are_written(tmp_path, monkeypatch):
    set_inner_chunk_bytes(monkeypatch, 756)
    source = save_npy(tmp_path / "x.npy", np.zeros((10, 7, 9, 3), np.float32))
    plan_of(
        source, tmp_path / "y.zarr", mode="identity", direction="restore", images_per_chunk=4
    ).run()
    path = tmp_path / "y.zarr"
    assert len(chunk_files(path)) == 3
    assert len({file.stat().st_size for file in chunk_files(path)}) == 1
    assert min(file.stat().st_size for file in chunk_files(path)) > 4 * 189
    assert_same(opened(path).read(0, 10).batch, np.zeros((10, 7, 9, 3), np.uint8))
    fastvgg.verify(path)
    chunk_files(path)[1].unlink()
    with pytest.raises(VerificationError):
        fastvgg.verify(path)


@pytest.mark.parametrize("images", [1, 8, 9, 11])
@pytest.mark.parametrize("images_per_chunk", [1, 4, 100])
def test_every_shard_is_written_once(tmp_path, images, images_per_chunk):
    source = save_npy(tmp_path / "x.npy", pixels(images))
    plan = plan_of(source, tmp_path / "y.zarr", mode="torch", images_per_chunk=images_per_chunk)
    storage = RecordingStorage()
    run(plan, storage=storage)
    made = [name for name in storage.created if name.startswith(("c.", "zarr"))]
    assert made == ["zarr.json", *(f"c.{number}.0.0.0" for number in range(plan.chunks))]
    assert sorted(made) == names_in(tmp_path / "y.zarr")
    assert zarr.open_array(tmp_path / "y.zarr", mode="r").shards[0] == plan.chunk_images
    assert_same(load_zarr(tmp_path / "y.zarr"), network_inputs(pixels(images), "torch"))


def test_shards_are_written_with_direct_io_from_aligned_buffers(tmp_path):
    source = save_npy(tmp_path / "x.npy", pixels(10))
    storage = RecordingStorage()
    run(plan_of(source, tmp_path / "y.zarr", mode="torch", images_per_chunk=2), storage=storage)
    shards = [f"c.{number}.0.0.0" for number in range(5)]
    assert storage.direct_files == ["zarr.json", *shards]
    assert [storage.alignments[name] for name in shards] == [0] * 5


def test_image_larger_than_an_inner_chunk_is_its_own_chunk(tmp_path, monkeypatch):
    set_inner_chunk_bytes(monkeypatch, 755)
    path = write_zarr(tmp_path)
    assert zarr.open_array(path, mode="r").chunks == (1, 7, 9, 3)
    assert_same(load_zarr(path), network_inputs(pixels(10), "caffe"))


def test_shard_size_respects_the_memory_limit(tmp_path):
    large = np.lib.format.open_memmap(tmp_path / "x.npy", "w+", np.uint8, (20_000, 31, 33, 3))
    del large  # a sparse file
    plan = plan_of(tmp_path / "x.npy", tmp_path / "y.zarr", mode="tf", memory="4GiB")
    assert 72 * 2**20 < plan.chunk_images * plan.image_memory_bytes <= 144 * 2**20
    photos = save_images(tmp_path / "photos", pixels(5))
    plan = plan_of(photos, tmp_path / "y.zarr", mode="tf")
    assert plan.image_memory_bytes == (3 + 3) * 756 + plan.record_bytes


# The recorded transform


@pytest.fixture
def without_manifest(tmp_path):
    """A preprocessed array without its manifest."""
    path = write_zarr(tmp_path, out_layout="NCHW")
    manifest_path(path).unlink()
    return path


def test_recorded_transform_suffices_to_restore(tmp_path, without_manifest):
    plan = plan_of(without_manifest, tmp_path / "back.npy", direction="restore")
    assert plan.transform.mode.name == "caffe"
    assert plan.transform.layout == "NCHW"
    plan.run()
    assert_same(np.load(tmp_path / "back.npy"), pixels(10))
    with pytest.raises(UsageError, match="was preprocessed in mode caffe"):
        plan_of(without_manifest, tmp_path / "z.npy", direction="restore", mode="tf")
    with pytest.raises(UsageError, match="has layout NCHW"):
        plan_of(without_manifest, tmp_path / "z.npy", direction="restore", layout="NHWC")


def test_recorded_transform_prevents_repeated_preprocessing_or_restoring(
    tmp_path, without_manifest
):
    with pytest.raises(SourceError) as caught:
        plan_of(without_manifest, tmp_path / "z.npy", mode="caffe")
    check_error(caught.value, without_manifest)
    plan_of(without_manifest, tmp_path / "back.zarr", direction="restore").run()
    manifest_path(tmp_path / "back.zarr").unlink()
    with pytest.raises(SourceError) as caught:
        plan_of(tmp_path / "back.zarr", tmp_path / "z.npy", direction="restore", mode="caffe")
    check_error(caught.value, tmp_path / "back.zarr")
    transform = fastvgg.Transform("caffe", layout="NCHW")
    with pytest.raises(SourceError, match="already preprocessed"):
        fastvgg.batches(without_manifest, 2, transform=transform)
    assert len([*fastvgg.batches(without_manifest, 2, transform=transform.inverse())]) == 5


def test_image_like_inputs_are_restored_with_the_recorded_transform(tmp_path):
    path = write_zarr(tmp_path, mode=fastvgg.Mode("mine"))
    manifest_path(path).unlink()
    plan_of(path, tmp_path / "back.npy", direction="restore").run()
    assert_same(np.load(tmp_path / "back.npy"), pixels(10))


def test_info_shows_the_recorded_transform(without_manifest):
    summary = info(without_manifest)
    assert summary["state"] == "source"
    assert (summary["layout"], summary["direction"], summary["mode"]) == (
        "NCHW",
        "preprocess",
        "caffe",
    )


def test_batches_have_the_recorded_layout(without_manifest):
    batches = fastvgg.batches(without_manifest, 4)
    expected = network_inputs(pixels(10), "caffe", out_layout="NCHW")
    actual = np.concatenate([batch.images for batch in batches])
    assert_same(actual, expected)


def test_manifest_takes_precedence_over_the_recorded_transform(tmp_path):
    path = write_zarr(tmp_path)
    change_metadata(path, attributes={"fastvgg": {"transform": "nonsense"}})
    assert Provenance.read(Location(path)).transform == fastvgg.Transform("caffe")


@pytest.mark.parametrize(
    "change",
    [
        lambda recorded: recorded.update(mode="caffe"),
        lambda recorded: recorded.pop("mode"),
        lambda recorded: recorded.update(more=1),
        lambda recorded: recorded.update(direction="sideways"),
        lambda recorded: recorded.update(out_layout="CHWN"),
        lambda recorded: recorded.update(dtype="float8"),
        lambda recorded: recorded["mode"].update(mean=["x"]),
        lambda recorded: recorded["mode"].update(mean=[1.0]),
        lambda recorded: recorded["mode"].update(divide=0.0),
        lambda recorded: recorded["mode"].update(channel_order="\x1b[2J"),
        lambda recorded: recorded.clear(),
        None,
        7,
        "caffe",
        [],
    ],
)
def test_invalid_recorded_transform_is_rejected(tmp_path, without_manifest, change):
    recorded = Provenance.read(Location(without_manifest)).transform.to_dict()
    if callable(change):
        change(recorded)
    attributes = {"fastvgg": {"transform": recorded} if callable(change) else change}
    change_metadata(without_manifest, attributes=attributes)
    if change is None:  # nothing is recorded
        assert Provenance.read(Location(without_manifest)).transform is None
        return
    for attempt in (
        lambda: plan_of(without_manifest, tmp_path / "z.npy", direction="restore", mode="caffe"),
        lambda: fastvgg.batches(without_manifest, 2),
    ):
        with pytest.raises(SourceError) as caught:
            attempt()
        check_error(caught.value, without_manifest, "'fastvgg'", "its mode")
        assert str(caught.value).replace("\n", "").isprintable()
    assert info(without_manifest)["reason"] == caught.value.problem


# Existing directories


def test_empty_directory_is_replaced(tmp_path):
    (tmp_path / "y.zarr").mkdir()
    assert_same(load_zarr(write_zarr(tmp_path)), network_inputs(pixels(10), "caffe"))


def test_target_inside_the_source_is_rejected(tmp_path, stored):
    for target in (stored, stored / "y.zarr"):
        with pytest.raises(TargetError):
            plan_of(stored, target, mode="caffe")


# Retries


def test_retry_of_a_damaged_shard_is_refused_and_changes_nothing(tmp_path):
    folder = save_images(tmp_path / "photos", pixels(11))
    torn = folder / "a" / "04.png"
    intact = torn.read_bytes()
    torn.write_bytes(intact[:60])
    path = tmp_path / "packed.zarr"
    plan_of(folder, path, direction="pack", images_per_chunk=3).run()
    flip(chunk_files(path)[3], 99)
    torn.write_bytes(intact)
    before = tree(path)
    with pytest.raises(TargetError) as caught:
        plan_of(folder, path, direction="pack", retry_failed=True).run()
    check_error(caught.value, path, "was changed", "move")
    assert tree(path) == before


# Verification


def test_verify_reports_the_shard_of_a_flipped_bit(tmp_path, monkeypatch):
    set_inner_chunk_bytes(monkeypatch, 2 * 756)
    path = write_zarr(tmp_path, images=12)
    for file in chunk_files(path):
        length = file.stat().st_size
        for at in [*range(0, length, 211), *range(length - 36, length, 5), length - 1]:
            flip(file, 8 * at + at % 8)
            with pytest.raises(VerificationError) as caught:
                fastvgg.verify(path)
            check_error(caught.value, path, file.name)
            assert caught.value.exit_code == 4
            flip(file, 8 * at + at % 8)
    fastvgg.verify(path, full=True)


@pytest.mark.parametrize(
    "fields",
    [
        {"shape": [9, 7, 9, 3]},
        {"shape": [10, 9, 7, 3]},
        {"data_type": "float16"},
        {"data_type": "int32"},
        {"zarr_format": 9},
    ],
)
def test_verify_detects_changed_metadata(tmp_path, fields):
    path = write_zarr(tmp_path)
    change_metadata(path, **fields)
    with pytest.raises(FastvggError) as caught:
        fastvgg.verify(path)
    check_error(caught.value, path)
    with pytest.raises(FastvggError):
        plan_of(tmp_path / "x.npy", path, mode="caffe", images_per_chunk=4).run()
