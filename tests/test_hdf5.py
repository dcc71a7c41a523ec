"""Datasets in HDF5 files: which are read, what leaves a file, and what is written."""

from __future__ import annotations

import concurrent.futures
import contextlib
import itertools
import os
import subprocess
import sys

import h5py
import numpy as np
import pytest
from batches import KERAS_MODES, dtype_of, in_layout
from datasets_on_disk import (
    must_say,
    names_in,
    pixels,
    plan_of,
    printed_on_small_disk,
    python,
    save_images,
    save_npy,
    tree,
)
from h5py import h5d, h5p, h5s, h5t

import fastvgg
from fastvgg import datasets, oracle
from fastvgg.datasets.base import Header
from fastvgg.datasets.hdf5 import Hdf5Source
from fastvgg.errors import (
    FastvggError,
    SourceError,
    StoppedError,
    TargetError,
    UsageError,
    VerificationError,
)
from fastvgg.stream.info import info
from fastvgg.transform import STORAGE_TYPES

IMAGES = 11
BATCH = pixels(IMAGES, height=5, width=7)
PLAIN = [name for name in STORAGE_TYPES if name != "bfloat16"]


def of_type(name):
    return BATCH.astype(dtype_of(name))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "x.h5"


def written(path, name="x", data=BATCH, **settings):
    """Write a dataset by h5py, and return what fastvgg calls it."""
    with h5py.File(path, "a") as file:
        file.create_dataset(name, data=data, **settings)
    return datasets_name(path, name)


def datasets_name(path, name="x"):
    return path.with_name(f"{path.name}::") / name


def check_reads(name, expected, dtype, layout="NHWC"):
    """Check that a dataset is read as it is, from any row to any."""
    source = datasets.open_source(name, layout=layout)
    assert isinstance(source, Hdf5Source)
    assert source.header == Header(expected.shape, dtype, layout)
    for start, stop in itertools.combinations(range(len(expected) + 1), 2):
        batch, records = source.read(start, stop)
        assert batch.dtype == dtype_of(dtype)
        assert batch.tobytes() == expected[start:stop].tobytes()
        assert records == []
        out = np.zeros_like(batch)
        source.read_into(start, out)
        assert out.tobytes() == batch.tobytes()
    source.close()


LAYOUTS_ON_DISK = {
    "contiguous": {},
    "chunks of an image": {"chunks": (1, 5, 7, 3)},
    "chunks that divide nothing": {"chunks": (4, 2, 3, 2)},
    "compressed": {"chunks": (3, 5, 7, 3), "compression": "gzip", "shuffle": True},
    "with checksums": {"chunks": (3, 5, 7, 3), "fletcher32": True},
    "chunks larger than the array": {"chunks": (64, 5, 7, 3), "maxshape": (None, 5, 7, 3)},
}


@pytest.mark.parametrize("stored", LAYOUTS_ON_DISK)
@pytest.mark.parametrize("dtype", PLAIN)
def test_a_dataset_is_read_as_it_is_stored(path, dtype, stored):
    expected = of_type(dtype)
    check_reads(written(path, data=expected, **LAYOUTS_ON_DISK[stored]), expected, dtype)


def compact(path, data):
    made = h5p.create(h5p.DATASET_CREATE)
    made.set_layout(h5d.COMPACT)
    with h5py.File(path, "w") as file:
        kind, space = h5t.py_create(data.dtype), h5s.create_simple(data.shape)
        h5d.create(file.id, b"x", kind, space, made).write(h5s.ALL, h5s.ALL, data)


def test_a_dataset_within_its_header_is_read(path):
    compact(path, BATCH)
    check_reads(datasets_name(path), BATCH, "uint8")


def test_a_dataset_after_a_block_of_others_is_read(path):
    with h5py.File(path, "w", userblock_size=1024) as file:
        file["x"] = BATCH
    with path.open("r+b") as file:
        file.write(b"something else" * 70)
    check_reads(datasets_name(path), BATCH, "uint8")


@pytest.mark.parametrize("stored", ["contiguous", "with checksums"])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_numbers_of_the_other_byte_order_are_turned_round(path, dtype, stored):
    expected = of_type(dtype)
    data = expected.astype(expected.dtype.newbyteorder(">"))
    check_reads(written(path, data=data, **LAYOUTS_ON_DISK[stored]), expected, dtype)


def bfloat16():
    kind = h5t.IEEE_F16LE.copy()
    kind.set_fields(15, 7, 8, 0, 7)
    kind.set_ebias(127)
    return kind


@pytest.mark.parametrize("chunks", [None, (3, 5, 7, 3)])
def test_halves_of_bfloat16_are_known_by_their_fields(path, chunks):
    expected = of_type("bfloat16")
    made = h5p.create(h5p.DATASET_CREATE)
    if chunks:
        made.set_chunk(chunks)
    with h5py.File(path, "w") as file:
        space = h5s.create_simple(expected.shape)
        dataset = h5d.create(file.id, b"x", bfloat16(), space, made)
        dataset.write(h5s.ALL, h5s.ALL, expected.view(np.uint16), bfloat16())
    check_reads(datasets_name(path), expected, "bfloat16")


def test_floats_of_fewer_bits_are_what_h5py_makes_of_them(path):
    kind = h5t.IEEE_F32LE.copy()
    kind.set_fields(23, 15, 8, 0, 15)  # 24 of 32 bits
    kind.set_precision(24)
    kind.set_ebias(127)
    values = of_type("float32")
    with h5py.File(path, "w") as file:
        dataset = h5d.create(file.id, b"x", kind, h5s.create_simple(values.shape))
        dataset.write(h5s.ALL, h5s.ALL, values)
        expected = file["x"][:]
    check_reads(datasets_name(path), expected, str(expected.dtype))


def test_channels_may_come_first(path):
    expected = in_layout(BATCH, "NCHW")
    check_reads(written(path, data=expected), expected, "uint8", layout="NCHW")


def test_a_dataset_is_found_by_groups_and_links_within_the_file(path):
    written(path, "a/b/x")
    with h5py.File(path, "a") as file:
        file["a/hard"] = file["a/b/x"]
        file["absolute"] = h5py.SoftLink("/a/b/x")
        file["a/relative"] = h5py.SoftLink("b/x")
        file["group"] = h5py.SoftLink("a/./b")
    for name in ("a/b/x", "a/hard", "absolute", "a/relative", "group/x"):
        check_reads(datasets_name(path, name), BATCH, "uint8")


def test_windows_stay_valid_and_cannot_be_written(path):
    source = datasets.open_source(written(path))
    window = source.read(2, 7).batch
    source.close()
    assert not window.flags.writeable
    assert window.tobytes() == BATCH[2:7].tobytes()


@pytest.mark.parametrize("stored", ["contiguous", "compressed"])
def test_many_threads_read_at_once(path, stored):
    source = datasets.open_source(written(path, **LAYOUTS_ON_DISK[stored]))

    def read(start):
        out = np.zeros_like(BATCH[start : start + 3])
        source.read_into(start, out)
        return out.tobytes() == BATCH[start : start + 3].tobytes()

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, [number % IMAGES for number in range(200)]))
    source.close()


def test_chunks_of_a_run_hold_whole_chunks_of_the_dataset(path, tmp_path):
    name = written(path, chunks=(4, 5, 7, 3))
    image_bytes = fastvgg.plan(name, tmp_path / "y.npy", mode="tf").image_memory_bytes
    plan = fastvgg.plan(name, tmp_path / "y.npy", mode="tf", memory=9 * image_bytes)
    assert plan.chunk_images == 8
    with pytest.raises(TargetError) as caught:
        fastvgg.plan(name, tmp_path / "y.npy", mode="tf", memory=4 * image_bytes - 1)
    must_say(caught.value, "4 images, stored together", "--memory")


def virtual(path, *sources, name="virtual"):
    """Make a virtual dataset of some files' datasets, or of this file's own."""
    layout = h5py.VirtualLayout(shape=BATCH.shape, dtype=BATCH.dtype)
    for number, (file, source) in enumerate(sources):
        part = slice(number * IMAGES // len(sources), (number + 1) * IMAGES // len(sources))
        layout[part] = h5py.VirtualSource(file, source, shape=BATCH.shape)[part]
    with h5py.File(path, "a") as file:
        file.create_virtual_dataset(name, layout)
    return datasets_name(path, name)


def test_a_virtual_dataset_of_the_same_file_is_read(path):
    written(path)
    written(path, "z")
    check_reads(virtual(path, (".", "x"), (".", "z")), BATCH, "uint8")


def outside(path, name):
    """Make a dataset that leaves its file in one way or another."""
    other = path.with_name("other.h5")
    written(other)
    written(path)
    if name == "external storage":
        return written(path, "raw", external=[(path.with_name("raw"), 0, h5py.h5f.UNLIMITED)])
    with h5py.File(path, "a") as file:
        file["out"] = h5py.ExternalLink("other.h5", "/x")
        file["to_out"] = h5py.SoftLink("/out")
        file["group_out"] = h5py.ExternalLink("other.h5", "/")
    if name == "virtual":
        return virtual(path, (".", "x"), ("other.h5", "x"))
    if name == "virtual of a link":
        return virtual(path, (".", "x"), (".", "out"))
    if name == "virtual of a virtual":
        virtual(path, ("other.h5", "x"), name="inner")
        return virtual(path, (".", "inner"))
    named = {"link": "out", "link to a link": "to_out", "link to a group": "group_out/x"}
    return datasets_name(path, named[name])


WAYS_OUT_OF_A_FILE = (
    *("link", "link to a link", "link to a group", "external storage", "virtual"),
    *("virtual of a link", "virtual of a virtual"),
)


@pytest.mark.parametrize("way", WAYS_OUT_OF_A_FILE)
def test_what_leaves_the_file_is_refused(path, way):
    name = outside(path, way)
    with h5py.File(path) as file:
        assert file[str(name).partition("::")[2]].shape == BATCH.shape
    with pytest.raises(SourceError) as caught:
        datasets.open_source(name)
    must_say(caught.value, name, "leaves its file", "raw" if "storage" in way else "other.h5")


@pytest.mark.parametrize("links", [{"x": "/x"}, {"x": "y", "y": "x"}, {"x": "x/x"}])
def test_links_in_a_circle_are_refused(path, links):
    with h5py.File(path, "w") as file:
        for name, to in links.items():
            file[name] = h5py.SoftLink(to)
    with pytest.raises(SourceError) as caught:
        datasets.open_source(datasets_name(path))
    must_say(caught.value, path, "/x")


def test_virtual_datasets_in_a_circle_are_refused(path):
    virtual(path, (".", "b"), name="a")
    virtual(path, (".", "a"), name="b")
    with pytest.raises(SourceError) as caught:
        datasets.open_source(datasets_name(path, "a"))
    must_say(caught.value, path, "no end")


@pytest.mark.parametrize("name", ["", "nothing", "a", "a/nothing", "x/below", "dangling"])
def test_what_is_no_dataset_is_refused_with_those_that_there_are(path, name):
    written(path)
    written(path, "a/other", data=np.zeros((2, 3), np.int16))
    with h5py.File(path, "a") as file:
        file["dangling"] = h5py.SoftLink("/gone")
    with pytest.raises(SourceError) as caught:
        datasets.open_source(datasets_name(path, name) if name else path)
    must_say(caught.value, path, f"/{name}", f"/x {BATCH.shape} uint8", "/a/other (2, 3) int16")


def test_of_very_many_datasets_some_are_named(path):
    with h5py.File(path, "w") as file:
        for number in range(30):
            file[f"{number:02d}"] = 0
    with pytest.raises(SourceError) as caught:
        datasets.open_source(path)
    assert caught.value.problem.count("int64") == 10


TYPES_OF_OTHERS = {
    "int32": np.int32,
    "signed bytes": np.int8,
    "complex": np.complex64,
    "strings": "S3",
    "booleans": np.bool_,
    "a structure": [("r", "f4"), ("g", "f4")],
    "long doubles": np.longdouble,
    "texts": h5py.string_dtype(),
}


@pytest.mark.parametrize("kind", TYPES_OF_OTHERS)
def test_other_types_are_refused(path, kind):
    with h5py.File(path, "w") as file:
        file.create_dataset("x", BATCH.shape, TYPES_OF_OTHERS[kind])
    with pytest.raises(SourceError) as caught:
        datasets.open_source(datasets_name(path))
    must_say(caught.value, datasets_name(path), "float32")


@pytest.mark.parametrize("shape", [(), (5,), (5, 7, 3), (2, 2, 5, 7, 3), (0, 5, 7, 3)])
def test_other_shapes_are_refused(path, shape):
    name = written(path, data=np.zeros(shape, np.uint8))
    with pytest.raises(SourceError) as caught:
        datasets.open_source(name)
    must_say(caught.value, name, shape)


def test_a_dataset_without_a_shape_is_refused(path):
    name = written(path, data=h5py.Empty("f4"))
    with pytest.raises(SourceError):
        datasets.open_source(name)


@pytest.mark.parametrize("chunks", [None, (2, 5, 7, 3)])
def test_a_dataset_that_was_never_written_is_refused(path, chunks):
    with h5py.File(path, "w") as file:
        dataset = file.create_dataset("x", BATCH.shape, "uint8", chunks=chunks, fillvalue=9)
        if chunks:
            dataset[2:6] = BATCH[2:6]
    with pytest.raises(SourceError) as caught:
        datasets.open_source(datasets_name(path))
    counts = "4 of 6" if chunks else "1 of 1"
    must_say(caught.value, datasets_name(path), counts, "never written", "9")


def test_a_truncated_file_is_refused_at_any_length(path):
    name = written(path)
    content = path.read_bytes()
    for length in range(0, len(content), 37):
        path.write_bytes(content[:length])
        with pytest.raises(SourceError) as caught:
            datasets.open_source(name)
        must_say(caught.value, path)


@pytest.mark.parametrize("content", [b"", b"text", b"\x93NUMPY" + b"\0" * 999])
def test_what_is_no_hdf5_is_refused(path, content):
    path.write_bytes(content)
    with pytest.raises(SourceError) as caught:
        datasets.open_source(datasets_name(path))
    must_say(caught.value, path)


def test_what_is_no_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "fifo.h5")
    (tmp_path / "directory.h5").mkdir()
    for name in ("fifo.h5", "directory.h5", "missing.h5"):
        with pytest.raises(SourceError) as caught:
            datasets.open_source(datasets_name(tmp_path / name))
        must_say(caught.value, tmp_path / name)


WRITER = """
import sys, h5py
file = h5py.File(sys.argv[1], "a")
print("open", flush=True)
sys.stdin.readline()
"""


def test_a_file_that_another_process_writes_is_refused(path):
    name = written(path)
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with writer:
        assert writer.stdout.readline() == b"open\n"
        with pytest.raises(SourceError) as caught:
            datasets.open_source(name)
        must_say(caught.value, path, "lock", "wait")
        writer.communicate(b"\n")
    check_reads(name, BATCH, "uint8")


def test_a_filter_that_is_not_installed_is_named(path):
    name = written(path, chunks=(3, 5, 7, 3), compression="gzip")
    content = path.read_bytes()
    assert content.count(b"deflate") == 1
    at = content.index(b"deflate") - 8
    path.write_bytes(content[:at] + (32015).to_bytes(2, "little") + content[at + 2 :])
    with pytest.raises(SourceError) as caught:
        datasets.open_source(name)
    must_say(caught.value, name, "32015", "hdf5plugin")


def flip(path, data, bit=3):
    """Flip a bit within some bytes of a file."""
    content = bytearray(path.read_bytes())
    content[content.index(data) + len(data) // 2] ^= 1 << bit
    path.write_bytes(content)


def test_a_damaged_chunk_stops_the_run(path, tmp_path):
    name = written(path, chunks=(2, 5, 7, 3), fletcher32=True)
    plan = plan_of(name, tmp_path / "y.npy", mode="caffe", together=2)
    before = path.stat()
    whole = path.read_bytes()
    flip(path, BATCH[6:8].tobytes())
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(FastvggError):
        plan.run()
    path.write_bytes(whole)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    source = datasets.open_source(name)
    flip(path, BATCH[6:8].tobytes())
    assert source.read(0, 6).batch.tobytes() == BATCH[:6].tobytes()
    with pytest.raises(StoppedError) as caught:
        source.read(5, 9)
    must_say(caught.value, name, "images 5 to 8")
    assert caught.value.exit_code == 5
    source.close()


def test_options_for_image_files_are_refused(path, tmp_path):
    name = written(path)
    with pytest.raises(SourceError) as caught:
        fastvgg.plan(name, tmp_path / "y.npy", mode="tf", size=(3, 3))
    must_say(caught.value, name, "--size")
    with pytest.raises(UsageError):
        fastvgg.plan(name, tmp_path / "y.npy", direction="pack")


def test_nothing_is_done_in_place(path):
    with pytest.raises(UsageError) as caught:
        fastvgg.plan(written(path, data=of_type("float32")), in_place=True, mode="caffe")
    must_say(caught.value, "in place")


def test_the_package_that_is_missing_is_named(path):
    name = written(path)
    done = python(
        """
import sys
sys.modules["h5py"] = None
import fastvgg
for paths in ((sys.argv[1], "y.npy"), (sys.argv[2], "y.h5::/x")):
    try:
        fastvgg.plan(*paths, mode="tf").run()
    except fastvgg.errors.FastvggError as error:
        print(error.exit_code, error.remedy)
""",
        name,
        save_npy(path.with_name("x.npy"), BATCH),
    )
    assert done.stdout.count("3 install it: pip install 'fastvgg[hdf5]'") == 2, done.stderr


@pytest.fixture
def array(tmp_path):
    return save_npy(tmp_path / "x.npy", BATCH)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("mode", KERAS_MODES)
def test_a_result_is_the_same_bits_as_in_a_npy_and_comes_back(array, tmp_path, mode, dtype):
    name, plain = tmp_path / "y.h5::" / "a" / "y", tmp_path / "y.npy"
    for target in (name, plain):
        plan_of(array, target, mode=mode, dtype=dtype, together=3).run()
    expected = oracle.apply(fastvgg.Transform(mode, dtype=dtype), BATCH)
    check_reads(name, expected, dtype)
    assert plain.read_bytes().endswith(expected.tobytes())
    assert (tmp_path / "y.h5").read_bytes().endswith(expected.tobytes())
    with h5py.File(tmp_path / "y.h5") as file:
        dataset = file["a/y"]
        assert list(file) == ["a"]
        assert dataset.shape == BATCH.shape
        assert dataset.chunks is None
        assert dataset.id.get_offset() % 64 == 0
        read = expected.astype(np.float32) if dtype == "bfloat16" else expected
        assert dataset.dtype == read.dtype
        assert dataset[:].tobytes() == read.tobytes()
    plan_of(name, tmp_path / "back.h5::" / "x", direction="restore", together=4).run()
    check_reads(tmp_path / "back.h5::" / "x", BATCH, "uint8")


def test_the_file_is_the_same_in_any_chunks_and_at_any_time(array, tmp_path):
    for number, together in enumerate((1, 4, 11)):
        plan_of(array, tmp_path / f"{number}.h5::" / "x", mode="tf", together=together).run()
    first, *others = [(tmp_path / f"{number}.h5").read_bytes() for number in range(3)]
    assert others == [first, first]


def test_what_lies_beside_is_named_by_the_file(array, tmp_path):
    plan_of(array, tmp_path / "y.h5::" / "a" / "x", mode="tf").run()
    assert names_in(tmp_path) == ["x.npy", "y.h5", "y.h5.fastvgg.json"]


def test_images_are_packed_with_their_index_and_tried_again(tmp_path):
    photos = save_images(tmp_path / "photos", BATCH, [f"{row:02d}.png" for row in range(IMAGES)])
    whole = (photos / "03.png").read_bytes()
    (photos / "03.png").write_bytes(whole[:50])
    name = tmp_path / "y.h5::" / "x"
    assert plan_of(photos, name, direction="pack", together=2).run().counts["failed"] == 1
    expected = BATCH.copy()
    expected[3] = 0
    with h5py.File(tmp_path / "y.h5") as file:
        assert file["x"][:].tobytes() == expected.tobytes()
    with contextlib.closing(datasets.open_source(name)) as source:
        assert [record.path for record in source.records[:2]] == ["00.png", "01.png"]
    (photos / "03.png").write_bytes(whole)
    plan_of(photos, name, direction="pack", retry_failed=True, together=2).run()
    with h5py.File(tmp_path / "y.h5") as file:
        assert file["x"][:].tobytes() == BATCH.tobytes()
    fastvgg.verify(name, full=True)


def test_a_target_has_a_name_within_its_file(array, tmp_path):
    with pytest.raises(TargetError) as caught:
        plan_of(array, tmp_path / "y.h5", mode="tf").run()
    must_say(caught.value, tmp_path / "y.h5", "no name", "::/images")


def test_a_file_that_is_there_is_not_replaced_unless_fastvgg_wrote_it(array, tmp_path):
    written(tmp_path / "y.h5", "mine")
    name, before = tmp_path / "y.h5::" / "x", (tmp_path / "y.h5").read_bytes()
    for restart in (False, True):
        with pytest.raises(TargetError) as caught:
            plan_of(array, name, mode="tf", restart=restart)
        must_say(caught.value, tmp_path / "y.h5")
    assert (tmp_path / "y.h5").read_bytes() == before
    (tmp_path / "y.h5").unlink()
    plan_of(array, name, mode="tf").run()
    with pytest.raises(TargetError) as caught:
        plan_of(array, name, mode="caffe")
    must_say(caught.value, "another job", "--restart")
    plan_of(array, tmp_path / "y.h5::" / "z", mode="caffe", restart=True).run()
    with h5py.File(tmp_path / "y.h5") as file:
        assert list(file) == ["z"]


def test_a_manifest_is_believed_of_the_dataset_that_it_was_written_with(array, tmp_path):
    name = tmp_path / "y.h5::" / "x"
    plan_of(array, name, mode="caffe").run()
    written(tmp_path / "y.h5", "other", data=of_type("float32") - 100)
    assert info(name)["mode"] == "caffe"
    assert info(tmp_path / "y.h5::" / "other")["state"] == "source"
    with pytest.raises(UsageError) as caught:
        plan_of(tmp_path / "y.h5::" / "other", tmp_path / "z.npy", direction="restore")
    must_say(caught.value, "mode")
    with pytest.raises(SourceError) as caught:
        plan_of(name, tmp_path / "z.npy", mode="caffe")
    must_say(caught.value, "preprocessed already")


def test_it_is_described_and_verified(array, tmp_path):
    name = tmp_path / "y.h5::" / "x"
    plan_of(array, name, mode="torch").run()
    for path in (name, tmp_path / "y.h5"):
        known = info(path)
        assert (known["state"], known["kind"], known["dataset"]) == ("finished", "hdf5", "/x")
    assert fastvgg.verify(name, full=True).recomputed_images == IMAGES
    flip(tmp_path / "y.h5", oracle.apply(fastvgg.Transform("torch"), BATCH)[5].tobytes())
    with pytest.raises(VerificationError) as caught:
        fastvgg.verify(name)
    must_say(caught.value, tmp_path / "y.h5")


def test_a_source_is_described(path):
    known = info(written(path, data=of_type("float16")))
    assert (known["state"], known["kind"]) == ("source", "hdf5")
    assert (known["shape"], known["dtype"]) == ([*BATCH.shape], "float16")
    with pytest.raises(SourceError) as caught:
        info(path)
    must_say(caught.value, "/x")


def test_it_gives_batches(path):
    for settings in ({}, {"chunks": (4, 5, 7, 3)}):
        path.unlink(missing_ok=True)
        for images, rows in fastvgg.batches(written(path, **settings), 4, threads=2, shuffle=True):
            assert images.tobytes() == BATCH[rows].tobytes()


def test_a_dataset_that_changes_under_a_run_is_seen(path, tmp_path):
    name = written(path)
    plan = plan_of(name, tmp_path / "y.npy", mode="tf")
    with h5py.File(path, "a") as file:
        file["x"][3] = 0
    with pytest.raises(SourceError) as caught:
        plan.run()
    must_say(caught.value, "has changed")
    assert not (tmp_path / "y.npy").exists()


def test_the_source_itself_is_not_written(path):
    name = written(path)
    before = tree(path.parent)
    for target in (name, datasets_name(path, "y")):
        with pytest.raises(TargetError) as caught:
            plan_of(name, target, mode="tf")
        must_say(caught.value, path)
    assert tree(path.parent) == before


def test_without_room_nothing_is_written(tmp_path):
    printed = printed_on_small_disk(
        tmp_path,
        300_000,
        f"""
from pathlib import Path
from datasets_on_disk import *
from fastvgg.errors import TargetError
small = Path({str(tmp_path)!r})
save_npy(small / "x.npy", pixels(11, 47, 61))
try:
    plan_of(small / "x.npy", small / "y.h5::" / "x", mode="tf").run()
except TargetError as error:
    print(names_in(small), "free" in error.problem)
""",
    )
    assert printed == "['x.npy'] True"
