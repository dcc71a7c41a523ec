"""HDF5: every encoding, links and damage, and what a file with several datasets requires."""

from __future__ import annotations

import json
import os
import shutil
import signal
import struct
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import h5py
import numpy as np
import pytest

import fastvgg
from fastvgg.datasets.base import Header, bytes_of
from fastvgg.datasets.index import index_path, read_index
from fastvgg.datasets.open import open_target
from fastvgg.errors import (
    FastvggError,
    ResumeError,
    SourceError,
    StoppedError,
    TargetError,
)
from fastvgg.storage.local import Storage
from fastvgg.storage.location import Location
from fastvgg.stream.info import info
from fastvgg.stream.manifest import Provenance, manifest_path, read_manifest
from fastvgg.stream.run import run
from fastvgg.transform import STORAGE_TYPES
from tests.helpers.batches import dtype_of
from tests.helpers.datasets_on_disk import (
    commits_in,
    must_say,
    names_in,
    network_inputs,
    opened,
    pixels,
    plan_of,
    printed_by,
    python,
    save_images,
    save_npy,
    tree,
)
from tests.helpers.faults import CuttingStorage, Death
from tests.helpers.formats import check_spans
from tests.helpers.hdf5_on_disk import (
    as_h5py_reads,
    hdf5_type,
    save_h5,
    save_of_type,
    within,
)

SHAPE = (5, 7, 9, 3)
CHUNKS = (2, 3, 4, 3)  # divides no axis but the last


def of_type(name, shape=SHAPE):
    return pixels(*shape[:3]).astype(dtype_of(name))


def check_read(location, expected):
    """Check every span, and return whether batches are mapped."""
    with closing(opened(location)) as source:
        assert source.header == Header(expected.shape, str(expected.dtype), "NHWC")
        check_spans(source, expected)
        return not source.read(0, 1).batch.flags.owndata


@pytest.mark.parametrize(
    "settings",
    [
        {"chunks": CHUNKS},
        {"chunks": (1, 7, 9, 3)},
        {"chunks": (5, 7, 9, 3)},
        {"chunks": (8, 8, 16, 4), "maxshape": (None, None, None, None)},
        {"chunks": CHUNKS, "compression": "gzip"},
        {"chunks": CHUNKS, "compression": "lzf", "shuffle": True},
        {"chunks": CHUNKS, "compression": "gzip", "shuffle": True, "fletcher32": True},
        {"chunks": CHUNKS, "file": {"libver": "latest"}},
        {"file": {"libver": "latest"}},
        {"maxshape": SHAPE},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_every_way_to_store_a_dataset_is_read(tmp_path, settings, dtype):
    expected = of_type(dtype)
    location = save_h5(tmp_path / "x.h5", expected, **settings)
    check_read(location, expected)
    assert np.array_equal(as_h5py_reads(location), expected)


@pytest.mark.parametrize("name", ["x.hdf5", "X.H5", "d.h5.d/x.h5", "a::b/x.h5"])
def test_a_file_may_have_another_name(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    location = save_h5(tmp_path / name, pixels(), chunks=CHUNKS)
    assert not check_read(location, pixels())
    target = within(tmp_path / name.replace("x.", "y.").replace("X.", "Y."))
    plan_of(location, target, mode="caffe", together=2).run()
    assert np.array_equal(as_h5py_reads(target), network_inputs(pixels(), "caffe"))


def test_a_compact_dataset_is_read(tmp_path):
    expected = of_type("uint8")
    compact = h5py.h5d.COMPACT
    location = save_of_type(tmp_path / "x.h5", expected, hdf5_type("uint8"), layout=compact)
    check_read(location, expected)


@pytest.mark.parametrize("name", ["float16", "float32", "float64"])
@pytest.mark.parametrize("chunks", [None, CHUNKS], ids=["contiguous", "chunked"])
def test_another_byte_order_is_converted(tmp_path, name, chunks):
    expected = of_type(name)
    big = expected.astype(expected.dtype.newbyteorder(">"))
    location = save_h5(tmp_path / "x.h5", big, chunks=chunks)
    assert not check_read(location, expected)


def test_an_unusual_float_is_converted_to_the_next_wider_dtype(tmp_path):
    of_three_bytes = h5py.h5t.IEEE_F32LE.copy()
    of_three_bytes.set_fields(23, 15, 8, 0, 15)
    of_three_bytes.set_size(3)
    of_three_bytes.set_ebias(127)
    with h5py.File(tmp_path / "x.h5", "w") as file:
        space = h5py.h5s.create_simple(SHAPE)
        dataset = h5py.h5d.create(file.id, b"images", of_three_bytes, space)
        dataset.write(h5py.h5s.ALL, h5py.h5s.ALL, of_type("float32"))
    assert not check_read(within(tmp_path / "x.h5"), of_type("float32"))


def test_integers_with_names_are_read_as_integers(tmp_path):
    named = h5py.h5t.enum_create(h5py.h5t.STD_U8LE)
    for value, name in enumerate((b"dark", b"bright")):
        named.enum_insert(name, value)
    assert not check_read(save_of_type(tmp_path / "x.h5", of_type("uint8"), named), pixels())


def test_a_dataset_after_a_user_block_is_read(tmp_path):
    expected = of_type("float32")
    location = save_h5(tmp_path / "x.h5", expected, file={"userblock_size": 1024})
    with (tmp_path / "x.h5").open("r+b") as file:
        file.write(b"\xff" * 1024)
    assert check_read(location, expected)


def test_datasets_are_selected_by_name(tmp_path):
    names = ("/a/b/images", "/a/images", "/images", "/a.tar", "/\u00e4\u00f6", "/x.npy", "/a::b")
    with h5py.File(tmp_path / "x.h5", "w") as file:
        for seed, name in enumerate(names):
            file[name] = pixels(seed=seed)
    for seed, name in enumerate(names):
        check_read(within(tmp_path / "x.h5", name), pixels(seed=seed))
        check_read(within(tmp_path / "x.h5", name.removeprefix("/") + "/"), pixels(seed=seed))


def test_a_name_that_is_not_utf8_is_read_and_shown(tmp_path):
    name = "/a\u00e4"
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file[name.encode("latin-1")] = pixels()
    with pytest.raises(SourceError) as caught:
        opened(within(tmp_path / "x.h5", name))
    must_say(caught.value, r"Datasets: '/a\\xe4'")
    latin = os.fsdecode(name.encode("latin-1"))
    with closing(opened(within(tmp_path / "x.h5", latin))) as source:
        assert np.array_equal(source.read(0, 5).batch, pixels())


@pytest.fixture
def linked(tmp_path):
    """A file with every kind of link."""
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["data/real"] = pixels()
        file["data/deep/other"] = pixels(seed=2)
        file["hard"] = file["data/real"]
        file["soft"] = h5py.SoftLink("/data/real")
        file["to group"] = h5py.SoftLink("data")
        file["data/relative"] = h5py.SoftLink("deep/../other")
        file["data/beside"] = h5py.SoftLink("./real")
        file["chain"] = h5py.SoftLink("to group/beside")
        file["loop"] = h5py.SoftLink("/loop")
        file["ping"] = h5py.SoftLink("/pong")
        file["pong"] = h5py.SoftLink("/ping")
        file["growing"] = h5py.SoftLink("growing/x")
        file["dangling"] = h5py.SoftLink("/nothing")
        file["data/deep/up"] = file["data"]
    return tmp_path / "x.h5"


@pytest.mark.parametrize(
    "name",
    [
        *("/hard", "/soft", "/to group/real", "/data/beside", "/chain", "/to group/beside"),
        *("/data/deep/up/real", "/data/deep/up/deep/up/beside"),
    ],
)
def test_links_within_the_file_are_followed(linked, name):
    check_read(within(linked, name), pixels())


@pytest.mark.parametrize(
    "name", ["/loop", "/ping", "/growing", "/dangling", "/data/relative", "/soft/real", "/data"]
)
def test_a_link_that_leads_nowhere_is_refused(linked, name):
    with pytest.raises(SourceError) as caught:
        opened(within(linked, name))
    must_say(caught.value, linked, repr(name), "'/data/real'", "'/data/deep/other'")


def test_at_most_64_links_are_followed(tmp_path):
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["0"] = pixels()
        for number in range(1, 100):
            file[f"{number}"] = h5py.SoftLink(f"/{number - 1}")
    check_read(within(tmp_path / "x.h5", "/64"), pixels())
    for name in ("/65", "/65/x"):
        with pytest.raises(SourceError, match=f"has no dataset '{name}'"):
            opened(within(tmp_path / "x.h5", name))


@pytest.mark.parametrize("name", ["", "/", "/nothing", "/images/x", "/images\0", "/group", "/type"])
def test_a_name_without_a_dataset_is_refused_with_the_existing_names(tmp_path, name):
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["images"] = pixels()
        file["group/more"] = pixels()
        file["type"] = np.dtype("u1")
    with pytest.raises(SourceError) as caught:
        opened(within(tmp_path / "x.h5", name))
    must_say(caught.value, tmp_path / "x.h5", "Datasets: '/group/more', '/images'\n", "::/NAME")
    asked = name.rstrip("/")
    assert (repr(asked) if asked else "which dataset?") in str(caught.value)


def test_a_location_without_a_name_is_refused_with_the_existing_names(tmp_path):
    save_h5(tmp_path / "x.h5", pixels(), "/a\x1b[2J")
    with pytest.raises(SourceError) as caught:
        opened(tmp_path / "x.h5")
    must_say(caught.value, "which dataset?", r"'/a\x1b[2J'")


def test_an_error_lists_ten_names_at_most(tmp_path):
    with h5py.File(tmp_path / "x.h5", "w") as file:
        for number in range(100):
            file[f"{number:02d}"] = number
    with pytest.raises(SourceError) as caught:
        opened(within(tmp_path / "x.h5", "/x"))
    must_say(caught.value, "'/00', '/01'", "'/09'")
    assert "'/10'" not in str(caught.value)


def test_a_file_without_datasets_is_refused(tmp_path):
    h5py.File(tmp_path / "x.h5", "w").close()
    with pytest.raises(SourceError, match="Datasets: none"):
        opened(within(tmp_path / "x.h5"))


def test_a_closed_source_leaves_the_file_to_a_writer(tmp_path):
    location = save_h5(tmp_path / "x.h5", pixels())
    opened(location).close()
    with pytest.raises(SourceError):
        opened(within(tmp_path / "x.h5", "/nothing"))
    with h5py.File(tmp_path / "x.h5", "a") as file:
        file["more"] = 1


def test_stored_bytes_and_granularity_are_those_of_the_chunks(tmp_path):
    def of(name, **settings):
        with closing(opened(save_h5(tmp_path / f"{name}.h5", **settings))) as source:
            return source.read_granularity, source.stored_bytes

    zeros = np.zeros(SHAPE, np.uint8)
    assert of("contiguous", batch=zeros) == (1, zeros.nbytes)
    assert of("pieces", batch=zeros, chunks=CHUNKS) == (2, 3 * 3 * 3 * 2 * 3 * 4 * 3)
    together, stored_bytes = of("larger", batch=zeros, chunks=(8, 7, 9, 3), maxshape=(9, 7, 9, 3))
    assert (together, stored_bytes) == (5, 8 * 7 * 9 * 3)
    assert of("packed", batch=zeros, chunks=(5, 7, 9, 3), compression="gzip")[1] < 50


def test_a_run_reads_whole_chunks_or_asks_for_more_memory(tmp_path):
    location = save_h5(tmp_path / "x.h5", pixels(11), chunks=(4, 7, 9, 3))
    plan = plan_of(location, tmp_path / "y.npy", mode="caffe", together=5)
    assert (plan.chunk_images, plan.chunks) == (4, 3)
    with pytest.raises(TargetError) as caught:
        plan_of(location, tmp_path / "y.npy", mode="caffe", together=3)
    must_say(caught.value, "4 images, stored together", "--memory")


# References to other files


def check_external(location, *words):
    before = tree(location.parent)
    with pytest.raises(SourceError) as caught:
        opened(location)
    must_say(caught.value, location, "refers to another file", *words)
    assert tree(location.parent) == before


@pytest.fixture
def other(tmp_path):
    """Another file of images."""
    save_h5(tmp_path / "other.h5", pixels(seed=3))
    return tmp_path / "other.h5"


def test_an_external_link_is_refused(tmp_path, other):
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["images"] = h5py.ExternalLink(str(other), "/images")
        file["group"] = h5py.ExternalLink(str(other), "/")
        file["through"] = h5py.SoftLink("/images")
        file["gone"] = h5py.ExternalLink("nowhere.h5", "/images")
    check_external(within(tmp_path / "x.h5", "/images"), "'images' is a link")
    check_external(within(tmp_path / "x.h5", "/group/images"), "'group' is a link")
    check_external(within(tmp_path / "x.h5", "/through"), "'images' is a link")
    check_external(within(tmp_path / "x.h5", "/gone"), "'gone' is a link")


def test_external_storage_is_refused(tmp_path):
    with h5py.File(tmp_path / "x.h5", "w") as file:
        where = str(tmp_path / "raw.bin")
        stored = file.create_dataset("images", SHAPE, "u1", external=[(where, 0, 945)])
        stored[...] = pixels()
    check_external(within(tmp_path / "x.h5"), "its data is in", "raw.bin")


def virtual(file, name, source, **settings):
    """Create a virtual dataset that maps all of a source."""
    layout = h5py.VirtualLayout(SHAPE, "u1", **settings)
    layout[:] = source
    file.create_virtual_dataset(name, layout)


def source_in(file_name, name="/stored", **settings):
    return h5py.VirtualSource(file_name, name, SHAPE, **settings)


def test_a_virtual_dataset_is_refused(tmp_path, other):
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["stored"] = pixels()
        raw = [(str(tmp_path / "raw.bin"), 0, 945)]
        file.create_dataset("raw", SHAPE, "u1", external=raw)[...] = pixels()
        file["linked"] = h5py.SoftLink("inside")
        file.create_virtual_dataset("none", h5py.VirtualLayout(SHAPE, "u1"))
        for name, source in {
            "inside": source_in("."),
            "outside": source_in(str(other), "/images"),
            "leaving": source_in(".", "/raw"),
            "absent": source_in(".", "/absent"),
            "itself": source_in(".", "/itself"),
            "ping": source_in(".", "/pong"),
            "pong": source_in(".", "/ping"),
        }.items():
            virtual(file, name, source)
    for name in ("inside", "outside", "leaving", "absent", "itself", "ping", "linked", "none"):
        location = within(tmp_path / "x.h5", f"/{name}")
        check_refused(location, f"{location} is a virtual dataset", "h5repack -l CONTI")


# The alarm ends a process that waits: it is the end of the test, not a measurement.
OPENING = """
import signal, sys, fastvgg.datasets.open as d, fastvgg.errors as e
from fastvgg.storage.location import Location
for path in sys.argv[1:]:
    signal.alarm(5)
    try:
        d.open_source(Location.parse(path))
    except e.SourceError as error:
        print(str(error).splitlines()[0])
"""


def errors_of(*locations):
    """Return the first line of the error for each location; opening some might block for ever."""
    done = python(OPENING, *locations)
    assert done.returncode != -signal.SIGALRM, "waited for someone to write into the pipe"
    return done.stdout.splitlines()


def test_no_other_file_is_opened_even_to_list_the_names(tmp_path):
    growing = {"maxshape": (None, 7, 9, 3)}
    unlimited = h5py.h5s.UNLIMITED
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["link"] = h5py.ExternalLink("pipe", "/images")
        layout = h5py.VirtualLayout(SHAPE, "u1", **growing)
        layout[0:unlimited] = source_in("pipe", **growing)[0:unlimited]
        file.create_virtual_dataset("endless", layout)
    os.mkfifo(tmp_path / "pipe")
    names = ("/link", "/link/more", "/endless", "/nothing")
    lines = errors_of(*(within(tmp_path / "x.h5", name) for name in names))
    assert ["refers to another file" in line for line in lines] == [True, True, False, False]
    assert "is a virtual dataset" in lines[2]
    assert lines[3].endswith("Datasets: '/endless'")


# Refused files


def check_refused(location, *words):
    """Check that a source is refused with these words, and unchanged."""
    before = tree(location.parent)
    with pytest.raises(SourceError) as caught:
        opened(location)
    must_say(caught.value, *words)
    assert caught.value.exit_code == 3
    assert str(caught.value).replace("\n", "").isprintable()
    assert tree(location.parent) == before


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (pixels()[0], ("(7, 9, 3)", "of rank 3", "numpy.newaxis")),
        (pixels()[None], ("(1, 5, 7, 9, 3)", "of rank 5")),
        (np.uint8(3), ("()", "of rank 0")),
        (h5py.Empty("u1"), ("()", "of rank 0")),
        (np.zeros((0, 7, 9, 3), np.uint8), ("(0, 7, 9, 3)", "no images")),
        (of_type("int32"), ("int32", "uint8, float16, float32, float64")),
        (of_type("int8"), ("int8",)),
        (of_type("uint16"), ("uint16",)),
        (of_type("complex64"), ("complex64",)),
        (of_type("bool"), ("bool",)),
        (of_type("S4"), ("S4",)),
        (np.zeros(SHAPE, [("r", "u1"), ("g", "u1")]), ("[('r', 'u1'), ('g', 'u1')]",)),
    ],
    ids=str,
)
def test_an_array_that_is_not_of_images_is_refused(tmp_path, data, words):
    location = save_h5(tmp_path / "x.h5", data)
    check_refused(location, location, *words)


@pytest.mark.parametrize("dtype", [h5py.string_dtype(), h5py.vlen_dtype("u1"), h5py.ref_dtype])
def test_elements_of_variable_length_are_refused(tmp_path, dtype):
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file.create_dataset("images", SHAPE, dtype)
    check_refused(within(tmp_path / "x.h5"), "type object")


def test_a_type_without_a_numpy_equivalent_is_refused(tmp_path):
    with h5py.File(tmp_path / "x.h5", "w") as file:
        space = h5py.h5s.create_simple(SHAPE)
        h5py.h5d.create(file.id, b"time", h5py.h5t.UNIX_D32LE, space)
        too_wide = h5py.h5t.IEEE_F64LE.copy()
        too_wide.set_size(32)
        too_wide.set_precision(256)
        too_wide.set_fields(255, 236, 19, 0, 236)
        h5py.h5d.create(file.id, b"wide", too_wide, space)
    check_refused(within(tmp_path / "x.h5", "/time"), "unsupported dtype", "TypeTimeID")
    check_refused(within(tmp_path / "x.h5", "/wide"), "unsupported dtype", "precision")


def test_unwritten_chunks_are_refused(tmp_path):
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file.create_dataset("contiguous", SHAPE, "u1", fillvalue=7)
        file.create_dataset("chunked", SHAPE, "f4", chunks=CHUNKS)
        file.create_dataset("begun", SHAPE, "u1", chunks=CHUNKS)[1, 2, 3] = 1
        nearly = file.create_dataset("nearly", SHAPE, "u1", chunks=CHUNKS)
        nearly[:, :6] = 1
        nearly[:4, 6, :8] = 1
        grown = file.create_dataset("grown", data=pixels(), maxshape=(None, 7, 9, 3), chunks=CHUNKS)
        grown.resize(7, axis=0)
    for name, words in {
        "contiguous": ("1 of 1 chunks were never written", "read as 7"),
        "chunked": ("27 of 27 chunks were never written", "read as 0.0"),
        "begun": ("26 of 27 chunks",),
        "nearly": ("5 of 27 chunks",),
        "grown": ("9 of 36 chunks",),
    }.items():
        check_refused(within(tmp_path / "x.h5", f"/{name}"), f"x.h5::/{name}", *words)


@pytest.mark.parametrize("chunks", [None, CHUNKS], ids=["contiguous", "chunked"])
@pytest.mark.parametrize("libver", ["earliest", "latest"])
def test_a_truncated_file_is_refused(tmp_path, chunks, libver):
    location = save_h5(tmp_path / "x.h5", pixels(), chunks=chunks, file={"libver": libver})
    whole = (tmp_path / "x.h5").read_bytes()
    for nbytes in (len(whole) - 1, len(whole) // 2, 100, 8, 0):
        (tmp_path / "x.h5").write_bytes(whole[:nbytes])
        check_refused(location, tmp_path / "x.h5", "cannot be opened", "get the file again")


@pytest.mark.parametrize("content", [b"not HDF5 at all" * 100, b"\x93NUMPY", b"\x89HDF\r\n\x1a\n"])
def test_a_file_that_is_not_hdf5_is_refused(tmp_path, content):
    (tmp_path / "x.h5").write_bytes(content)
    check_refused(within(tmp_path / "x.h5"), tmp_path / "x.h5", "cannot be opened")


def test_a_link_to_a_file_is_read_as_the_file(tmp_path):
    save_h5(tmp_path / "real.h5", pixels())
    (tmp_path / "x.h5").symlink_to("real.h5")
    check_read(within(tmp_path / "x.h5"), pixels())


WRITER = """
import sys, h5py
with h5py.File(sys.argv[1], "a"):
    print("open", flush=True)
    sys.stdin.read()
"""


def test_a_file_that_is_open_for_writing_is_refused(tmp_path):
    location = save_h5(tmp_path / "x.h5", pixels())
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, tmp_path / "x.h5"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as writer:
        assert writer.stdout.readline() == b"open\n"
        with pytest.raises(SourceError) as caught:
            opened(location)
        must_say(
            caught.value, tmp_path / "x.h5", "lock", "another process is writing the file, wait"
        )
        writer.stdin.close()
        assert writer.wait() == 0
    check_read(location, pixels())


def filtered(path, batch, code, name=b""):
    """Write a dataset with an unavailable filter, which its chunks do not use."""
    made = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    made.set_chunk(CHUNKS)
    made.set_deflate(1)
    with h5py.File(path, "w") as file:
        space = h5py.h5s.create_simple(batch.shape)
        kind = h5py.h5t.py_create(batch.dtype)
        h5py.h5d.create(file.id, b"images", kind, space, made).write(
            h5py.h5s.ALL, h5py.h5s.ALL, batch
        )
    content = path.read_bytes()
    # A filter message of version 1: number, length of the name, flags, number of values.
    gzip = struct.pack("<HHHH", h5py.h5z.FILTER_DEFLATE, 8, 1, 1) + b"deflate\0"
    assert content.count(gzip) == 1
    other = struct.pack("<HHHH", code, 8, 1, 1) + name.ljust(8, b"\0")
    path.write_bytes(content.replace(gzip, other))
    return within(path)


def test_a_missing_filter_is_refused_with_its_name_and_how_to_install_it(tmp_path):
    location = filtered(tmp_path / "x.h5", pixels(), 32015, b"zstd\x1b\xff")
    words = (location, "filter 32015", r"'zstd\x1b\\xff'", "pip install hdf5plugin")
    check_refused(location, *words, "HDF5_PLUGIN_PATH")


def test_an_array_that_exceeds_the_file_is_refused(tmp_path):
    location = save_h5(tmp_path / "x.h5", pixels())
    whole = (tmp_path / "x.h5").read_bytes()
    with h5py.File(tmp_path / "x.h5") as file:
        offset = file["images"].id.get_offset()
    place = struct.pack("<QQ", offset, 945)  # in the layout message
    assert whole.count(place) == 1
    for wrong in ((offset + 1, 945), (2**40, 945), (offset, 944), (offset, 946)):
        (tmp_path / "x.h5").write_bytes(whole.replace(place, struct.pack("<QQ", *wrong)))
        check_refused(location, location, "damaged", "get the file again")


@pytest.mark.parametrize("filters", [{}, {"compression": "gzip"}], ids=["plain", "filtered"])
def test_a_damaged_index_of_chunks_is_refused(tmp_path, filters):
    location = save_h5(tmp_path / "x.h5", pixels() % 2, chunks=(2, 7, 9, 3), **filters)
    whole = (tmp_path / "x.h5").read_bytes()
    with h5py.File(tmp_path / "x.h5") as file:
        nbytes = file["images"].id.get_chunk_info(1).size

    def entry(nbytes, row, mask=0):
        """Return an entry of the chunk index: length, skipped filters, offsets in the array."""
        return struct.pack("<IIQQQQQ", nbytes, mask, row, 0, 0, 0, 0)

    assert whole.count(entry(nbytes, 2)) == 1
    wrong = [entry(0, 2), entry(nbytes, 0), entry(nbytes, 6), entry(nbytes, 2**40)]
    wrong.append(entry(nbytes, 2, mask=1) if filters else entry(nbytes - 1, 2))
    for other in wrong:
        (tmp_path / "x.h5").write_bytes(whole.replace(entry(nbytes, 2), other))
        check_refused(location, location, "damaged: 1 of 3 chunks have no data")
    (tmp_path / "x.h5").write_bytes(whole.replace(entry(nbytes, 2), entry(10**6, 2)))
    check_refused(location, location, "bytes in 3 chunks")


def test_a_chunk_that_was_stored_unfiltered_is_read(tmp_path):
    location = save_h5(tmp_path / "x.h5", pixels(), chunks=(2, 7, 9, 3), compression="gzip")
    with h5py.File(tmp_path / "x.h5", "a") as file:
        bare = pixels(seed=2)[2:4].tobytes()
        file["images"].id.write_direct_chunk((2, 0, 0, 0), bare, filter_mask=1)
    expected = pixels()
    expected[2:4] = pixels(seed=2)[2:4]
    check_read(location, expected)


def broken_chunk(path, batch, row=-1):
    """Write a dataset with a flipped bit in the chunk of a row; return the intact content, too."""
    location = save_h5(path, batch, chunks=(2, *batch.shape[1:]), fletcher32=True)
    whole = path.read_bytes()
    at = whole.index(batch[row].tobytes())
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
    return location, whole


def test_a_damaged_chunk_is_an_error_where_it_is_read(tmp_path):
    location, _ = broken_chunk(tmp_path / "x.h5", pixels())
    with closing(opened(location)) as source:
        assert np.array_equal(source.read(0, 4).batch, pixels()[:4])
        with pytest.raises(StoppedError) as caught:
            source.read(3, 5)
        must_say(caught.value, location, "images 3 to 4 ", "rerun the same command")
        assert caught.value.exit_code == 5
        assert np.array_equal(source.read(2, 4).batch, pixels()[2:4])


@pytest.mark.parametrize("is_restored", [True, False])
def test_a_run_that_a_damaged_chunk_stopped_resumes_with_the_restored_file_only(
    tmp_path, is_restored
):
    # So large that the fingerprint is of samples, none of which contains the damage.
    batch = pixels(15, 211, 223)
    location, whole = broken_chunk(tmp_path / "x.h5", batch, row=8)
    target = within(tmp_path / "y.h5")
    settings = {"mode": "tf", "dtype": "float16", "together": 4}
    with pytest.raises(StoppedError, match="images 8 to 11 ") as caught:
        plan_of(location, target, **settings).run()
    must_say(caught.value, "rerun the same command", "--restart")
    assert commits_in(tmp_path / "y.h5") == 2
    status = (tmp_path / "x.h5").stat()
    (tmp_path / "x.h5").write_bytes(whole)
    if is_restored:  # with its time
        os.utime(tmp_path / "x.h5", ns=(status.st_atime_ns, status.st_mtime_ns))
        assert plan_of(location, target, **settings).run().counts["computed_chunks"] == 2
    else:
        os.utime(tmp_path / "x.h5", ns=(0, 1))
        with pytest.raises(ResumeError, match="--restart"):
            plan_of(location, target, **settings)
        again = plan_of(location, target, restart=True, **settings).run()
        assert again.counts["computed_chunks"] == 4
    assert np.array_equal(as_h5py_reads(target), network_inputs(batch, "tf", dtype="float16"))


WITHOUT_H5PY = """
import sys
sys.modules["h5py"] = None
from tests.helpers.datasets_on_disk import plan_of
import fastvgg
for source, target in ((sys.argv[1], sys.argv[2]), (sys.argv[3], sys.argv[4])):
    try:
        plan_of(source, target, mode="caffe")
    except fastvgg.FastvggError as error:
        print(type(error).__name__, error)
print(plan_of(sys.argv[3], sys.argv[2], mode="caffe").run().counts["images"])
"""


def test_without_h5py_other_formats_work_and_the_error_names_the_extra(tmp_path):
    location = save_h5(tmp_path / "x.h5", pixels())
    source = save_npy(tmp_path / "x.npy", pixels())
    arguments = (location, tmp_path / "y.npy", source, within(tmp_path / "y.h5"))
    lines = printed_by(WITHOUT_H5PY, *arguments).splitlines()
    assert lines[0].startswith(f"SourceError {location} ")
    assert lines[2].startswith(f"SourceError {tmp_path}/y.h5::/images ")
    assert lines[1] == lines[3] == "in a clone of fastvgg: pip install '.[hdf5]'"
    assert lines[4] == "5"


# Targets


def created(tmp_path, name, shape=SHAPE, place="/images"):
    header = Header(shape, name, "NHWC")
    location = within(tmp_path / "y.h5", place)
    return open_target(Location.parse(location), header, Storage(), chunk_images=1)


@pytest.mark.parametrize("name", STORAGE_TYPES)
def test_a_target_is_one_aligned_contiguous_dataset(tmp_path, name):
    target = created(tmp_path, name, place="/some/deep/images")
    target.create()
    target.write(0, [bytes_of(of_type(name))])
    target.publish()
    assert target.stored_bytes == target.path.stat().st_size
    with h5py.File(tmp_path / "y.h5") as file:
        assert [*file] == ["some"]
        stored = file["some/deep/images"]
        assert stored.chunks is None
        assert stored.id.get_offset() % 64 == 0
        assert stored.id.get_type().equal(hdf5_type(name))
        # h5py reads bfloat16 as the next type that contains it.
        assert np.array_equal(stored[...], of_type(name).astype(stored.dtype))


def test_a_target_of_a_terabyte_takes_little_memory(tmp_path):
    target = created(tmp_path, "float64", (10**6, 224, 224, 3))
    assert target.stored_bytes - 10**6 * 224 * 224 * 3 * 8 < 4096


@pytest.mark.parametrize(
    "name",
    [
        *("a", "/a/b/c", "a b", "\u00e4\u00f6/\u65e5\u672c", "a::b", "a.npy", "x.h5", "n" * 128),
        *("n" * 128 + "/" + "m" * 128, "\u65e5" * 42, "/".join("a" * 64), "..a", "{0..3}.tar"),
    ],
)
def test_a_dataset_can_have_any_name(tmp_path, name):
    source = save_npy(tmp_path / "x.npy", pixels())
    location = Path(f"{tmp_path}/y.h5::{name}")
    plan_of(source, location, mode="caffe", together=2).run()
    assert np.array_equal(as_h5py_reads(location), network_inputs(pixels(), "caffe"))
    group, _, last = ("/" + name.strip("/")).rpartition("/")
    with h5py.File(tmp_path / "y.h5") as file:
        parent = file[group or "/"]
        link = parent.id.links.get_info(last.encode())
        assert link.cset == h5py.h5t.CSET_UTF8
    assert fastvgg.verify(location, full=True).recomputed_images == 5
    assert info(location)["dataset"] == "/" + name.strip("/")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("", "does not name a dataset"),
        ("::", "does not name a dataset"),
        ("::/", "does not name a dataset"),
        ("::a\0b", r"invalid dataset name '/a\x00b'"),
        ("::a\nb", r"invalid dataset name '/a\nb'"),
        ("::a\udcff", r"invalid dataset name '/a\udcff'"),
        ("::" + "n" * 129, "more than 128 bytes"),
        ("::a/" + "\u65e5" * 43 + "/b", "more than 128 bytes"),
        ("::" + "/".join("a" * 65), "more than 63 groups"),
    ],
)
def test_an_invalid_name_is_refused_before_anything_is_written(tmp_path, name, words):
    source = save_npy(tmp_path / "x.npy", pixels())
    with pytest.raises(TargetError) as caught:
        plan_of(source, f"{tmp_path}/y.h5{name}", mode="caffe")
    must_say(caught.value, words, f"{tmp_path}/y.h5::/images")
    assert names_in(tmp_path) == ["x.npy"]


# Runs


def test_an_unfinished_file_is_known_with_and_without_the_name_of_its_dataset(tmp_path):
    source = save_npy(tmp_path / "x.npy", pixels(11))
    location = within(tmp_path / "y.h5")
    with pytest.raises(Death):
        run(plan_of(source, location, mode="caffe", together=4), storage=CuttingStorage(2))
    assert info(location)["state"] == info(tmp_path / "y.h5")["state"] == "unfinished"
    assert info(location)["dataset"] == "/images"
    with pytest.raises(ResumeError) as caught:
        plan_of(source, within(tmp_path / "y.h5", "/other"), mode="caffe", together=4)
    must_say(caught.value, "/other", "--restart")


def test_equivalent_spellings_of_a_location_are_one_job(tmp_path, monkeypatch):
    save_h5(tmp_path / "x.h5", pixels(), "/a/b")
    plan_of(tmp_path / "x.h5::/a/b", tmp_path / "y.h5::/c/d", mode="caffe").run()
    monkeypatch.chdir(tmp_path)
    again = plan_of("x.h5::a/b/", "./y.h5::c//d", mode="caffe").run()
    assert again.counts["computed_chunks"] == 0


@pytest.fixture
def packed(tmp_path):
    """A file that a run wrote from images, one of them torn, with two datasets added since."""
    folder = save_images(tmp_path / "photos", pixels(6))
    torn = folder / "b" / "03.png"
    torn.write_bytes(torn.read_bytes()[:50])
    plan_of(folder, within(tmp_path / "p.h5"), direction="pack", together=2).run()
    with h5py.File(tmp_path / "p.h5", "a") as file:
        file["six"] = pixels(6)
        file["eleven"] = pixels(11)
    return tmp_path / "p.h5"


def test_sidecars_describe_only_the_dataset_that_was_written(tmp_path, packed):
    manifest = read_manifest(packed)
    for location in (packed, within(packed)):
        recorded = Provenance.read(Location.parse(location))
        assert recorded == Provenance(manifest, manifest.job.transform, has_index=True)
    for name, images in (("/six", 6), ("/eleven", 11)):
        location = within(packed, name)
        assert Provenance.read(Location.parse(location)) == Provenance(None, None, has_index=False)
        assert info(location)["state"] == "source"
        assert info(location)["shape"] == [images, 7, 9, 3]
        plan_of(location, tmp_path / f"y{name[1:]}.npy", mode="caffe", together=2).run()
        assert not index_path(tmp_path / f"y{name[1:]}.npy").exists()
        assert fastvgg.verify(tmp_path / f"y{name[1:]}.npy").recomputed_images == images
        with pytest.raises(SourceError, match="no checksums to compare"):
            fastvgg.verify(location)
        batches = [batch.copy() for batch, _ in fastvgg.batches(location, 4, threads=1)]
        assert np.array_equal(np.concatenate(batches), pixels(images))
    plan_of(within(packed), tmp_path / "y.npy", mode="caffe", together=2).run()
    assert read_index(tmp_path / "y.npy", 6)[4].failed


@pytest.mark.parametrize("added", [np.uint8(1), np.zeros(SHAPE), {}], ids=["one", "many", "group"])
def test_a_restart_refuses_a_file_to_which_something_was_added(tmp_path, added):
    source = save_npy(tmp_path / "x.npy", pixels())
    plan_of(source, within(tmp_path / "y.h5"), mode="caffe").run()
    with h5py.File(tmp_path / "y.h5", "a") as file:
        if isinstance(added, dict):
            file.create_group("mine")
        else:
            file["mine"] = added
    before = tree(tmp_path)
    with pytest.raises(TargetError) as caught:
        plan_of(source, within(tmp_path / "y.h5"), mode="tf", restart=True)
    must_say(caught.value, tmp_path / "y.h5", "changed since", "move it away")
    assert tree(tmp_path) == before


def test_only_a_restart_replaces_a_file_whatever_the_name_of_the_dataset(tmp_path):
    source = save_npy(tmp_path / "x.npy", pixels())
    plan_of(source, within(tmp_path / "y.h5"), mode="caffe").run()
    for name in ("/images", "/other"):
        with pytest.raises(TargetError, match="with other settings"):
            plan_of(source, within(tmp_path / "y.h5", name), mode="tf")
        plan_of(source, within(tmp_path / "y.h5", name), mode="tf", restart=True).run()
        found = as_h5py_reads(within(tmp_path / "y.h5", name))
        assert np.array_equal(found, network_inputs(pixels(), "tf"))
        assert read_manifest(tmp_path / "y.h5").job.dataset == name
        plan_of(source, within(tmp_path / "y.h5"), mode="caffe", restart=True).run()


@pytest.mark.parametrize("kind", ["a manifest of a .npy", "a dangling link"])
def test_a_foreign_manifest_does_not_permit_a_restart(tmp_path, kind):
    source = save_npy(tmp_path / "x.npy", pixels())
    if kind == "a dangling link":
        plan_of(source, within(tmp_path / "y.h5"), mode="caffe").run()
        (tmp_path / "y.h5").rename(tmp_path / "z.h5")
        (tmp_path / "y.h5").symlink_to("nowhere.h5")
    else:
        plan_of(source, tmp_path / "y.npy", mode="caffe").run()
        manifest_path(tmp_path / "y.npy").rename(manifest_path(tmp_path / "y.h5"))
        save_h5(tmp_path / "y.h5", pixels())
    before = tree(tmp_path)
    with pytest.raises(TargetError, match="a file that fastvgg did not write"):
        plan_of(source, within(tmp_path / "y.h5"), mode="tf", restart=True)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("kind", ["npy", "images"])
def test_a_directory_is_not_replaced_by_a_file(tmp_path, kind):
    source = save_npy(tmp_path / "x.npy", of_type("float32"))
    (tmp_path / "y.h5").mkdir()
    if kind == "images":
        save_images(tmp_path / "y.h5", pixels())
    with pytest.raises(TargetError, match="is a directory that fastvgg did not write"):
        plan_of(source, within(tmp_path / "y.h5"), mode="caffe", restart=True)


@pytest.mark.parametrize("name", ["y.npy", "y.h5::/images"])
def test_a_directory_of_images_that_was_written_is_not_replaced_by_an_array(tmp_path, name):
    source = save_npy(tmp_path / "x.npy", network_inputs(pixels(), "tf"))
    images = save_npy(tmp_path / "images.npy", pixels())
    file = Location.parse(tmp_path / name).container
    plan_of(source, tmp_path / "out", direction="restore", mode="tf").run()
    (tmp_path / "out").rename(file)
    manifest_path(tmp_path / "out").rename(manifest_path(file))
    before = tree(tmp_path)
    with pytest.raises(TargetError, match="is a directory that fastvgg did not write"):
        plan_of(images, tmp_path / name, mode="caffe", restart=True)
    assert tree(tmp_path) == before


def test_a_target_in_the_source_file_is_refused(tmp_path):
    location = save_h5(tmp_path / "x.h5", pixels())
    with pytest.raises(TargetError) as caught:
        plan_of(location, within(tmp_path / "x.h5", "/more"), mode="caffe")
    must_say(caught.value, tmp_path / "x.h5", "is the source itself")
    location = save_h5(tmp_path / "y.npy.h5", pixels())
    shutil.move(tmp_path / "y.npy.h5", tmp_path / "y.h5.partial.h5")
    (tmp_path / "link.h5").symlink_to("y.h5")
    save_h5(tmp_path / "y.h5", pixels())
    with pytest.raises(TargetError, match="is the source itself"):
        plan_of(within(tmp_path / "link.h5"), within(tmp_path / "y.h5"), mode="caffe")


def test_a_manifest_of_other_data_is_refused(tmp_path):
    source = save_npy(tmp_path / "x.npy", pixels())
    plan_of(source, within(tmp_path / "y.h5"), mode="caffe").run()
    save_h5(tmp_path / "y.h5", pixels())
    with pytest.raises(SourceError, match="its manifest records"):
        plan_of(within(tmp_path / "y.h5"), tmp_path / "z.npy", direction="restore")


def test_a_finished_file_is_known_with_and_without_the_name_of_its_dataset(tmp_path):
    source = save_npy(tmp_path / "x.npy", pixels(11))
    location = within(tmp_path / "y.h5", "/deep/images")
    plan_of(source, location, mode="caffe", together=4).run()
    summary = info(location)
    assert summary["path"] == str(location)
    assert (summary["kind"], summary["dataset"], summary["state"]) == (
        "hdf5",
        "/deep/images",
        "finished",
    )
    assert {**info(tmp_path / "y.h5"), "path": ""} == {**summary, "path": ""}
    for path in (location, tmp_path / "y.h5"):
        verified = fastvgg.verify(path, full=True)
        assert (verified.images, verified.chunks, verified.recomputed_images) == (11, 3, 11)
        assert verified.path == str(location)


def test_a_flipped_bit_before_the_data_is_refused_or_harmless(tmp_path):
    source = save_npy(tmp_path / "x.npy", pixels())
    location = within(tmp_path / "y.h5")
    plan_of(source, location, mode="caffe").run()
    expected = (tmp_path / "y.h5").read_bytes()
    for bit in range(0, 8 * (len(expected) - 5 * 756), 31):
        content = bytearray(expected)
        content[bit // 8] ^= 1 << bit % 8
        (tmp_path / "y.h5").write_bytes(content)
        try:
            fastvgg.verify(location)
        except FastvggError as error:
            must_say(error, tmp_path / "y.h5")
        else:  # a byte that HDF5 ignores
            assert np.array_equal(as_h5py_reads(location), network_inputs(pixels(), "caffe"))


def test_the_manifest_names_the_datasets(tmp_path):
    source = save_h5(tmp_path / "x.h5", pixels(), "/a")
    plan_of(source, within(tmp_path / "y.h5", "/b"), mode="caffe").run()
    job = json.loads(manifest_path(tmp_path / "y.h5").read_bytes())["job"]
    assert job["source"]["path"] == str(source)
    assert job["source"]["kind"] == job["result"]["kind"] == "hdf5"
    assert job["result"]["dataset"] == "/b"
    assert "h5py" in read_manifest(tmp_path / "y.h5").packages


# Damage

CAMPAIGN = """
import json, sys
from tests.campaigns import fuzz_hdf5
from fastvgg.datasets import hdf5
exec(sys.argv[1])
try:
    print(json.dumps(fuzz_hdf5.campaign(seed=5, size=1000)))
except AssertionError as error:
    print(json.dumps({"wrong": str(error)}))
"""


def test_a_fuzzed_file_is_read_as_h5py_reads_it_or_refused():
    counts = json.loads(printed_by(CAMPAIGN, ""))
    assert counts["accepted"] > 200
    assert counts["refused"] > 200
    assert counts["ended by HDF5"] < 5
    assert counts["inputs"] == sum(counts.values()) - counts["inputs"]


@pytest.mark.parametrize(
    "broken",
    [
        "hdf5.DAMAGED = (KeyError, OSError, ValueError)",
        "hdf5.DAMAGED = (OSError, RuntimeError, ValueError)",
    ],
)
def test_the_campaign_notices_a_broken_reader(broken):
    assert "input " in json.loads(printed_by(CAMPAIGN, broken)).get("wrong", "")
