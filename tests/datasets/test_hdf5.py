"""HDF5: encodings, links, damage, and files with several datasets."""

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
from fastvgg.datasets.base import Header, byte_view
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
from fastvgg.transform import STORAGE_TYPES
from tests.helpers.batches import dtype_of
from tests.helpers.datasets_on_disk import (
    check_error,
    commits_in,
    names_in,
    network_inputs,
    opened,
    pixels,
    plan_of,
    python,
    save_images,
    save_npy,
    stdout_of,
    tree,
)
from tests.helpers.faults import InterruptedStorage, SimulatedCrash
from tests.helpers.formats import check_spans
from tests.helpers.hdf5_on_disk import (
    dataset_path,
    hdf5_type,
    load_h5,
    save_h5,
    save_of_type,
)
from tests.helpers.runs import run

SHAPE = (5, 7, 9, 3)
CHUNKS = (2, 3, 4, 3)  # divides no axis but the last


def pixels_as(name, shape=SHAPE):
    return pixels(*shape[:3]).astype(dtype_of(name))


def check_read(location, expected):
    """Check every span, and return whether any rows can be read at no extra cost."""
    with closing(opened(location)) as source:
        assert source.header == Header(expected.shape, str(expected.dtype), "NHWC")
        check_spans(source, expected)
        return source.has_random_access


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
def test_every_storage_layout_is_read(tmp_path, settings, dtype):
    expected = pixels_as(dtype)
    location = save_h5(tmp_path / "x.h5", expected, **settings)
    check_read(location, expected)
    assert np.array_equal(load_h5(location), expected)


@pytest.mark.parametrize("name", ["x.hdf5", "X.H5", "d.h5.d/x.h5", "a::b/x.h5"])
def test_other_file_names_are_supported(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    location = save_h5(tmp_path / name, pixels(), chunks=CHUNKS)
    assert not check_read(location, pixels())
    target = dataset_path(tmp_path / name.replace("x.", "y.").replace("X.", "Y."))
    plan_of(location, target, mode="caffe", images_per_chunk=2).run()
    assert np.array_equal(load_h5(target), network_inputs(pixels(), "caffe"))


def test_compact_dataset_is_read(tmp_path):
    expected = pixels_as("uint8")
    compact = h5py.h5d.COMPACT
    location = save_of_type(tmp_path / "x.h5", expected, hdf5_type("uint8"), layout=compact)
    check_read(location, expected)


@pytest.mark.parametrize("name", ["float16", "float32", "float64"])
@pytest.mark.parametrize("chunks", [None, CHUNKS], ids=["contiguous", "chunked"])
def test_non_native_byte_order_is_converted(tmp_path, name, chunks):
    expected = pixels_as(name)
    big = expected.astype(expected.dtype.newbyteorder(">"))
    location = save_h5(tmp_path / "x.h5", big, chunks=chunks)
    assert not check_read(location, expected)


def test_unusual_float_is_converted_to_the_next_wider_dtype(tmp_path):
    three_byte_float = h5py.h5t.IEEE_F32LE.copy()
    three_byte_float.set_fields(23, 15, 8, 0, 15)
    three_byte_float.set_size(3)
    three_byte_float.set_ebias(127)
    with h5py.File(tmp_path / "x.h5", "w") as file:
        space = h5py.h5s.create_simple(SHAPE)
        dataset = h5py.h5d.create(file.id, b"images", three_byte_float, space)
        dataset.write(h5py.h5s.ALL, h5py.h5s.ALL, pixels_as("float32"))
    assert not check_read(dataset_path(tmp_path / "x.h5"), pixels_as("float32"))


def test_enum_is_read_as_integers(tmp_path):
    named = h5py.h5t.enum_create(h5py.h5t.STD_U8LE)
    for value, name in enumerate((b"dark", b"bright")):
        named.enum_insert(name, value)
    assert not check_read(save_of_type(tmp_path / "x.h5", pixels_as("uint8"), named), pixels())


def test_dataset_after_a_user_block_is_read(tmp_path):
    expected = pixels_as("float32")
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
        check_read(dataset_path(tmp_path / "x.h5", name), pixels(seed=seed))
        check_read(dataset_path(tmp_path / "x.h5", name.removeprefix("/") + "/"), pixels(seed=seed))


def test_non_utf8_name_is_read_and_escaped_in_errors(tmp_path):
    name = "/a\u00e4"
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file[name.encode("latin-1")] = pixels()
    with pytest.raises(SourceError) as caught:
        opened(dataset_path(tmp_path / "x.h5", name))
    check_error(caught.value, r"Datasets: '/a\\xe4'")
    latin = os.fsdecode(name.encode("latin-1"))
    with closing(opened(dataset_path(tmp_path / "x.h5", latin))) as source:
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
def test_internal_links_are_followed(linked, name):
    check_read(dataset_path(linked, name), pixels())


@pytest.mark.parametrize(
    "name", ["/loop", "/ping", "/growing", "/dangling", "/data/relative", "/soft/real", "/data"]
)
def test_unresolvable_link_is_rejected(linked, name):
    with pytest.raises(SourceError) as caught:
        opened(dataset_path(linked, name))
    check_error(caught.value, linked, repr(name), "'/data/real'", "'/data/deep/other'")


def test_at_most_64_links_are_followed(tmp_path):
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["0"] = pixels()
        for number in range(1, 100):
            file[f"{number}"] = h5py.SoftLink(f"/{number - 1}")
    check_read(dataset_path(tmp_path / "x.h5", "/64"), pixels())
    for name in ("/65", "/65/x"):
        with pytest.raises(SourceError, match=f"has no dataset '{name}'"):
            opened(dataset_path(tmp_path / "x.h5", name))


@pytest.mark.parametrize("name", ["", "/", "/nothing", "/images/x", "/images\0", "/group", "/type"])
def test_name_without_a_dataset_is_rejected_with_the_existing_names(tmp_path, name):
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["images"] = pixels()
        file["group/more"] = pixels()
        file["type"] = np.dtype("u1")
    with pytest.raises(SourceError) as caught:
        opened(dataset_path(tmp_path / "x.h5", name))
    check_error(caught.value, tmp_path / "x.h5", "Datasets: '/group/more', '/images'\n", "::/NAME")
    asked = name.rstrip("/")
    assert (repr(asked) if asked else "which dataset?") in str(caught.value)


def test_location_without_a_name_is_rejected_with_the_existing_names(tmp_path):
    save_h5(tmp_path / "x.h5", pixels(), "/a\x1b[2J")
    with pytest.raises(SourceError) as caught:
        opened(tmp_path / "x.h5")
    check_error(caught.value, "which dataset?", r"'/a\x1b[2J'")


def test_error_lists_at_most_ten_names(tmp_path):
    with h5py.File(tmp_path / "x.h5", "w") as file:
        for number in range(100):
            file[f"{number:02d}"] = number
    with pytest.raises(SourceError) as caught:
        opened(dataset_path(tmp_path / "x.h5", "/x"))
    check_error(caught.value, "'/00', '/01'", "'/09'")
    assert "'/10'" not in str(caught.value)


def test_file_without_datasets_is_rejected(tmp_path):
    h5py.File(tmp_path / "x.h5", "w").close()
    with pytest.raises(SourceError, match="Datasets: none"):
        opened(dataset_path(tmp_path / "x.h5"))


def test_closed_source_does_not_lock_the_file(tmp_path):
    location = save_h5(tmp_path / "x.h5", pixels())
    opened(location).close()
    with pytest.raises(SourceError):
        opened(dataset_path(tmp_path / "x.h5", "/nothing"))
    with h5py.File(tmp_path / "x.h5", "a") as file:
        file["more"] = 1


def test_stored_bytes_and_granularity_match_the_chunks(tmp_path):
    def of(name, **settings):
        with closing(opened(save_h5(tmp_path / f"{name}.h5", **settings))) as source:
            return source.read_granularity, source.stored_bytes

    zeros = np.zeros(SHAPE, np.uint8)
    assert of("contiguous", batch=zeros) == (1, zeros.nbytes)
    assert of("pieces", batch=zeros, chunks=CHUNKS) == (2, 3 * 3 * 3 * 2 * 3 * 4 * 3)
    images_per_chunk, stored_bytes = of(
        "larger", batch=zeros, chunks=(8, 7, 9, 3), maxshape=(9, 7, 9, 3)
    )
    assert (images_per_chunk, stored_bytes) == (5, 8 * 7 * 9 * 3)
    assert of("packed", batch=zeros, chunks=(5, 7, 9, 3), compression="gzip")[1] < 50


def test_run_reads_whole_chunks_or_requests_more_memory(tmp_path):
    location = save_h5(tmp_path / "x.h5", pixels(11), chunks=(4, 7, 9, 3))
    plan = plan_of(location, tmp_path / "y.npy", mode="caffe", images_per_chunk=5)
    assert (plan.chunk_images, plan.chunks) == (4, 3)
    with pytest.raises(TargetError) as caught:
        plan_of(location, tmp_path / "y.npy", mode="caffe", images_per_chunk=3)
    check_error(caught.value, "4 images, stored together", "memory")


# References to other files


def check_external(location, *words):
    before = tree(location.parent)
    with pytest.raises(SourceError) as caught:
        opened(location)
    check_error(caught.value, location, "refers to another file", *words)
    assert tree(location.parent) == before


@pytest.fixture
def other(tmp_path):
    """Another file of images."""
    save_h5(tmp_path / "other.h5", pixels(seed=3))
    return tmp_path / "other.h5"


def test_external_link_is_rejected(tmp_path, other):
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["images"] = h5py.ExternalLink(str(other), "/images")
        file["group"] = h5py.ExternalLink(str(other), "/")
        file["through"] = h5py.SoftLink("/images")
        file["gone"] = h5py.ExternalLink("nowhere.h5", "/images")
    check_external(dataset_path(tmp_path / "x.h5", "/images"), "'images' is a link")
    check_external(dataset_path(tmp_path / "x.h5", "/group/images"), "'group' is a link")
    check_external(dataset_path(tmp_path / "x.h5", "/through"), "'images' is a link")
    check_external(dataset_path(tmp_path / "x.h5", "/gone"), "'gone' is a link")


def test_external_storage_is_rejected(tmp_path):
    with h5py.File(tmp_path / "x.h5", "w") as file:
        where = str(tmp_path / "raw.bin")
        stored = file.create_dataset("images", SHAPE, "u1", external=[(where, 0, 945)])
        stored[...] = pixels()
    check_external(dataset_path(tmp_path / "x.h5"), "its data is in", "raw.bin")


def virtual(file, name, source, **settings):
    """Create a virtual dataset that maps all of a source."""
    layout = h5py.VirtualLayout(SHAPE, "u1", **settings)
    layout[:] = source
    file.create_virtual_dataset(name, layout)


def virtual_source(file_name, name="/stored", **settings):
    return h5py.VirtualSource(file_name, name, SHAPE, **settings)


def test_virtual_dataset_is_rejected(tmp_path, other):
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["stored"] = pixels()
        raw = [(str(tmp_path / "raw.bin"), 0, 945)]
        file.create_dataset("raw", SHAPE, "u1", external=raw)[...] = pixels()
        file["linked"] = h5py.SoftLink("inside")
        file.create_virtual_dataset("none", h5py.VirtualLayout(SHAPE, "u1"))
        for name, source in {
            "inside": virtual_source("."),
            "outside": virtual_source(str(other), "/images"),
            "leaving": virtual_source(".", "/raw"),
            "absent": virtual_source(".", "/absent"),
            "itself": virtual_source(".", "/itself"),
            "ping": virtual_source(".", "/pong"),
            "pong": virtual_source(".", "/ping"),
        }.items():
            virtual(file, name, source)
    for name in ("inside", "outside", "leaving", "absent", "itself", "ping", "linked", "none"):
        location = dataset_path(tmp_path / "x.h5", f"/{name}")
        check_refused(location, f"{location} is a virtual dataset", "h5repack -l CONTI")


# The alarm ends a process that blocks, and the test with it; it measures nothing.
OPEN_SCRIPT = """
import signal, sys, fastvgg.datasets.open as d, fastvgg.errors as e
from fastvgg.storage.location import Location
for path in sys.argv[1:]:
    signal.alarm(5)
    try:
        d.open_source(Location.parse(path))
    except e.SourceError as error:
        print(str(error).splitlines()[0])
"""


def first_error_lines(*locations):
    """Return the first line of each location's error. Runs in a process, as opening may block."""
    done = python(OPEN_SCRIPT, *locations)
    assert done.returncode != -signal.SIGALRM, "blocked on opening the pipe"
    return done.stdout.splitlines()


def test_listing_names_opens_no_other_file(tmp_path):
    growing = {"maxshape": (None, 7, 9, 3)}
    unlimited = h5py.h5s.UNLIMITED
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["link"] = h5py.ExternalLink("pipe", "/images")
        layout = h5py.VirtualLayout(SHAPE, "u1", **growing)
        layout[0:unlimited] = virtual_source("pipe", **growing)[0:unlimited]
        file.create_virtual_dataset("endless", layout)
    os.mkfifo(tmp_path / "pipe")
    names = ("/link", "/link/more", "/endless", "/nothing")
    lines = first_error_lines(*(dataset_path(tmp_path / "x.h5", name) for name in names))
    assert ["refers to another file" in line for line in lines] == [True, True, False, False]
    assert "is a virtual dataset" in lines[2]
    assert lines[3].endswith("Datasets: '/endless'")


# Refused files


def check_refused(location, *words):
    """Check that a source is refused with these words, and unchanged."""
    before = tree(location.parent)
    with pytest.raises(SourceError) as caught:
        opened(location)
    check_error(caught.value, *words)
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
        (pixels_as("int32"), ("int32", "uint8, float16, float32, float64")),
        (pixels_as("int8"), ("int8",)),
        (pixels_as("uint16"), ("uint16",)),
        (pixels_as("complex64"), ("complex64",)),
        (pixels_as("bool"), ("bool",)),
        (pixels_as("S4"), ("S4",)),
        (np.zeros(SHAPE, [("r", "u1"), ("g", "u1")]), ("[('r', 'u1'), ('g', 'u1')]",)),
    ],
    ids=str,
)
def test_non_image_array_is_rejected(tmp_path, data, words):
    location = save_h5(tmp_path / "x.h5", data)
    check_refused(location, location, *words)


@pytest.mark.parametrize("dtype", [h5py.string_dtype(), h5py.vlen_dtype("u1"), h5py.ref_dtype])
def test_variable_length_elements_are_rejected(tmp_path, dtype):
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file.create_dataset("images", SHAPE, dtype)
    check_refused(dataset_path(tmp_path / "x.h5"), "type object")


def test_dtype_without_a_numpy_equivalent_is_rejected(tmp_path):
    with h5py.File(tmp_path / "x.h5", "w") as file:
        space = h5py.h5s.create_simple(SHAPE)
        h5py.h5d.create(file.id, b"time", h5py.h5t.UNIX_D32LE, space)
        too_wide = h5py.h5t.IEEE_F64LE.copy()
        too_wide.set_size(32)
        too_wide.set_precision(256)
        too_wide.set_fields(255, 236, 19, 0, 236)
        h5py.h5d.create(file.id, b"wide", too_wide, space)
    check_refused(dataset_path(tmp_path / "x.h5", "/time"), "unsupported dtype", "TypeTimeID")
    check_refused(dataset_path(tmp_path / "x.h5", "/wide"), "unsupported dtype", "precision")


def test_unwritten_chunks_are_rejected(tmp_path):
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file.create_dataset("contiguous", SHAPE, "u1", fillvalue=7)
        file.create_dataset("chunked", SHAPE, "f4", chunks=CHUNKS)
        file.create_dataset("begun", SHAPE, "u1", chunks=CHUNKS)[1, 2, 3] = 1
        almost_full = file.create_dataset("almost_full", SHAPE, "u1", chunks=CHUNKS)
        almost_full[:, :6] = 1
        almost_full[:4, 6, :8] = 1
        grown = file.create_dataset("grown", data=pixels(), maxshape=(None, 7, 9, 3), chunks=CHUNKS)
        grown.resize(7, axis=0)
    for name, words in {
        "contiguous": ("1 of 1 chunks were never written", "read as 7"),
        "chunked": ("27 of 27 chunks were never written", "read as 0.0"),
        "begun": ("26 of 27 chunks",),
        "almost_full": ("5 of 27 chunks",),
        "grown": ("9 of 36 chunks",),
    }.items():
        check_refused(dataset_path(tmp_path / "x.h5", f"/{name}"), f"x.h5::/{name}", *words)


@pytest.mark.parametrize("chunks", [None, CHUNKS], ids=["contiguous", "chunked"])
@pytest.mark.parametrize("libver", ["earliest", "latest"])
def test_truncated_file_is_rejected(tmp_path, chunks, libver):
    location = save_h5(tmp_path / "x.h5", pixels(), chunks=chunks, file={"libver": libver})
    intact = (tmp_path / "x.h5").read_bytes()
    for nbytes in (len(intact) - 1, len(intact) // 2, 100, 8, 0):
        (tmp_path / "x.h5").write_bytes(intact[:nbytes])
        check_refused(location, tmp_path / "x.h5", "cannot be opened", "with an intact copy")


@pytest.mark.parametrize("content", [b"not HDF5 at all" * 100, b"\x93NUMP", b"\x89HDF\r\n\x1a\n"])
def test_non_hdf5_file_is_rejected(tmp_path, content):
    (tmp_path / "x.h5").write_bytes(content)
    check_refused(dataset_path(tmp_path / "x.h5"), tmp_path / "x.h5", "cannot be opened")


def test_symlink_to_a_file_is_followed(tmp_path):
    save_h5(tmp_path / "real.h5", pixels())
    (tmp_path / "x.h5").symlink_to("real.h5")
    check_read(dataset_path(tmp_path / "x.h5"), pixels())


WRITER_SCRIPT = """
import sys, h5py
with h5py.File(sys.argv[1], "a"):
    print("open", flush=True)
    sys.stdin.read()
"""


def test_file_open_for_writing_is_rejected(tmp_path):
    location = save_h5(tmp_path / "x.h5", pixels())
    with subprocess.Popen(
        [sys.executable, "-c", WRITER_SCRIPT, tmp_path / "x.h5"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as writer:
        assert writer.stdout.readline() == b"open\n"
        with pytest.raises(SourceError) as caught:
            opened(location)
        check_error(
            caught.value, tmp_path / "x.h5", "lock", "another process is writing the file, wait"
        )
        writer.stdin.close()
        assert writer.wait() == 0
    check_read(location, pixels())


def save_with_unknown_filter(path, batch, code, name=b""):
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
    return dataset_path(path)


def test_missing_filter_is_rejected_with_its_name_and_install_command(tmp_path):
    location = save_with_unknown_filter(tmp_path / "x.h5", pixels(), 32015, b"zstd\x1b\xff")
    words = (location, "filter 32015", r"'zstd\x1b\\xff'", "pip install hdf5plugin")
    check_refused(location, *words, "HDF5_PLUGIN_PATH")


def test_array_beyond_the_end_of_the_file_is_rejected(tmp_path):
    location = save_h5(tmp_path / "x.h5", pixels())
    intact = (tmp_path / "x.h5").read_bytes()
    with h5py.File(tmp_path / "x.h5") as file:
        offset = file["images"].id.get_offset()
    place = struct.pack("<QQ", offset, 945)  # in the layout message
    assert intact.count(place) == 1
    for wrong in ((offset + 1, 945), (2**40, 945), (offset, 944), (offset, 946)):
        (tmp_path / "x.h5").write_bytes(intact.replace(place, struct.pack("<QQ", *wrong)))
        check_refused(location, location, "damaged", "with an intact copy")


@pytest.mark.parametrize("filters", [{}, {"compression": "gzip"}], ids=["plain", "gzip"])
def test_damaged_chunk_index_is_rejected(tmp_path, filters):
    location = save_h5(tmp_path / "x.h5", pixels() % 2, chunks=(2, 7, 9, 3), **filters)
    intact = (tmp_path / "x.h5").read_bytes()
    with h5py.File(tmp_path / "x.h5") as file:
        nbytes = file["images"].id.get_chunk_info(1).size

    def entry(nbytes, row, mask=0):
        """Return an entry of the chunk index: length, skipped filters, offsets in the array."""
        return struct.pack("<IIQQQQQ", nbytes, mask, row, 0, 0, 0, 0)

    assert intact.count(entry(nbytes, 2)) == 1
    wrong = [entry(0, 2), entry(nbytes, 0), entry(nbytes, 6), entry(nbytes, 2**40)]
    wrong.append(entry(nbytes, 2, mask=1) if filters else entry(nbytes - 1, 2))
    for other in wrong:
        (tmp_path / "x.h5").write_bytes(intact.replace(entry(nbytes, 2), other))
        check_refused(location, location, "damaged: 1 of 3 chunks have no data")
    (tmp_path / "x.h5").write_bytes(intact.replace(entry(nbytes, 2), entry(10**6, 2)))
    check_refused(location, location, "bytes in 3 chunks")


def test_unfiltered_chunk_is_read(tmp_path):
    location = save_h5(tmp_path / "x.h5", pixels(), chunks=(2, 7, 9, 3), compression="gzip")
    with h5py.File(tmp_path / "x.h5", "a") as file:
        bare = pixels(seed=2)[2:4].tobytes()
        file["images"].id.write_direct_chunk((2, 0, 0, 0), bare, filter_mask=1)
    expected = pixels()
    expected[2:4] = pixels(seed=2)[2:4]
    check_read(location, expected)


def save_with_damaged_chunk(path, batch, row=-1):
    """Save a dataset with a flipped bit in one chunk; return the intact content too."""
    location = save_h5(path, batch, chunks=(2, *batch.shape[1:]), fletcher32=True)
    intact = path.read_bytes()
    at = intact.index(batch[row].tobytes())
    path.write_bytes(intact[:at] + bytes([intact[at] ^ 4]) + intact[at + 1 :])
    return location, intact


def test_deflate_level_that_hdf5_refuses_is_refused(tmp_path):
    path = tmp_path / "x.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("x", data=pixels(5), chunks=(2, 7, 9, 3), compression=7)
    content = path.read_bytes()
    described = b"deflate\0\x07"  # the name of the filter, and its level
    assert content.count(described) == 1
    path.write_bytes(content.replace(described, b"deflate\0\x0c"))
    with h5py.File(path) as file, pytest.raises(OSError, match="filter returned failure"):
        file["x"][...]
    with pytest.raises(StoppedError), closing(opened(dataset_path(path, "x"))) as source:
        source.read(0, 5)


def test_damaged_chunk_raises_only_when_it_is_read(tmp_path):
    location, _ = save_with_damaged_chunk(tmp_path / "x.h5", pixels())
    with closing(opened(location)) as source:
        assert np.array_equal(source.read(0, 4).batch, pixels()[:4])
        with pytest.raises(StoppedError) as caught:
            source.read(3, 5)
        check_error(caught.value, location, "images 3 to 4 ", "rerun the same command")
        assert caught.value.exit_code == 5
        assert np.array_equal(source.read(2, 4).batch, pixels()[2:4])


@pytest.mark.parametrize("is_restored", [True, False])
def test_run_stopped_by_a_damaged_chunk_resumes_only_after_an_exact_restore(tmp_path, is_restored):
    # Large enough for a sampled fingerprint; no sample contains the damage.
    batch = pixels(15, 211, 223)
    location, intact = save_with_damaged_chunk(tmp_path / "x.h5", batch, row=8)
    target = dataset_path(tmp_path / "y.h5")
    settings = {"mode": "tf", "dtype": "float16", "images_per_chunk": 4}
    with pytest.raises(StoppedError, match="images 8 to 11 ") as caught:
        plan_of(location, target, **settings).run()
    check_error(caught.value, "rerun the same command", "start over")
    assert commits_in(tmp_path / "y.h5") == 2
    status = (tmp_path / "x.h5").stat()
    (tmp_path / "x.h5").write_bytes(intact)
    if is_restored:  # with its mtime
        os.utime(tmp_path / "x.h5", ns=(status.st_atime_ns, status.st_mtime_ns))
        assert plan_of(location, target, **settings).run().counts["computed_chunks"] == 2
    else:
        os.utime(tmp_path / "x.h5", ns=(0, 1))
        with pytest.raises(ResumeError, match="restart"):
            plan_of(location, target, **settings)
        rerun = plan_of(location, target, restart=True, **settings).run()
        assert rerun.counts["computed_chunks"] == 4
    assert np.array_equal(load_h5(target), network_inputs(batch, "tf", dtype="float16"))


WITHOUT_H5PY_SCRIPT = """
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
    arguments = (location, tmp_path / "y.npy", source, dataset_path(tmp_path / "y.h5"))
    lines = stdout_of(WITHOUT_H5PY_SCRIPT, *arguments).splitlines()
    assert lines[0].startswith(f"SourceError {location} ")
    assert lines[2].startswith(f"SourceError {tmp_path}/y.h5::/images ")
    assert lines[1] == lines[3] == "in a clone of fastvgg: pip install '.[hdf5]'"
    assert lines[4] == "5"


# Targets


def make_target(tmp_path, name, shape=SHAPE, place="/images"):
    header = Header(shape, name, "NHWC")
    location = dataset_path(tmp_path / "y.h5", place)
    return open_target(Location.parse(location), header, Storage(), chunk_images=1)


@pytest.mark.parametrize("name", STORAGE_TYPES)
def test_target_is_one_aligned_contiguous_dataset(tmp_path, name):
    target = make_target(tmp_path, name, place="/some/deep/images")
    target.create()
    target.write(0, [byte_view(pixels_as(name))])
    target.publish()
    assert target.stored_bytes == target.path.stat().st_size
    with h5py.File(tmp_path / "y.h5") as file:
        assert [*file] == ["some"]
        stored = file["some/deep/images"]
        assert stored.chunks is None
        assert stored.id.get_offset() % 64 == 0
        assert stored.id.get_type().equal(hdf5_type(name))
        # h5py reads bfloat16 as the next type that contains it.
        assert np.array_equal(stored[...], pixels_as(name).astype(stored.dtype))


def test_terabyte_target_needs_little_memory(tmp_path):
    target = make_target(tmp_path, "float64", (10**6, 224, 224, 3))
    assert target.stored_bytes - 10**6 * 224 * 224 * 3 * 8 < 4096


@pytest.mark.parametrize(
    "name",
    [
        *("a", "/a/b/c", "a b", "\u00e4\u00f6/\u65e5\u672c", "a::b", "a.npy", "x.h5", "n" * 128),
        *("n" * 128 + "/" + "m" * 128, "\u65e5" * 42, "/".join("a" * 64), "..a", "{0..3}.tar"),
    ],
)
def test_any_valid_dataset_name_is_supported(tmp_path, name):
    source = save_npy(tmp_path / "x.npy", pixels())
    location = Path(f"{tmp_path}/y.h5::{name}")
    plan_of(source, location, mode="caffe", images_per_chunk=2).run()
    assert np.array_equal(load_h5(location), network_inputs(pixels(), "caffe"))
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
def test_invalid_name_is_rejected_before_writing(tmp_path, name, words):
    source = save_npy(tmp_path / "x.npy", pixels())
    with pytest.raises(TargetError) as caught:
        plan_of(source, f"{tmp_path}/y.h5{name}", mode="caffe")
    check_error(caught.value, words, f"{tmp_path}/y.h5::/images")
    assert names_in(tmp_path) == ["x.npy"]


# Runs


def test_unfinished_file_is_found_with_and_without_its_dataset_name(tmp_path):
    source = save_npy(tmp_path / "x.npy", pixels(11))
    location = dataset_path(tmp_path / "y.h5")
    with pytest.raises(SimulatedCrash):
        run(
            plan_of(source, location, mode="caffe", images_per_chunk=4),
            storage=InterruptedStorage(2),
        )
    assert info(location)["state"] == info(tmp_path / "y.h5")["state"] == "unfinished"
    assert info(location)["dataset"] == "/images"
    with pytest.raises(ResumeError) as caught:
        plan_of(source, dataset_path(tmp_path / "y.h5", "/other"), mode="caffe", images_per_chunk=4)
    check_error(caught.value, "/other", "restart")


def test_equivalent_locations_are_the_same_job(tmp_path, monkeypatch):
    save_h5(tmp_path / "x.h5", pixels(), "/a/b")
    plan_of(tmp_path / "x.h5::/a/b", tmp_path / "y.h5::/c/d", mode="caffe").run()
    monkeypatch.chdir(tmp_path)
    rerun = plan_of("x.h5::a/b/", "./y.h5::c//d", mode="caffe").run()
    assert rerun.counts["computed_chunks"] == 0


@pytest.fixture
def packed(tmp_path):
    """A file packed from images, one of them truncated, with two datasets added later."""
    folder = save_images(tmp_path / "photos", pixels(6))
    torn = folder / "b" / "03.png"
    torn.write_bytes(torn.read_bytes()[:50])
    plan_of(folder, dataset_path(tmp_path / "p.h5"), direction="pack", images_per_chunk=2).run()
    with h5py.File(tmp_path / "p.h5", "a") as file:
        file["six"] = pixels(6)
        file["eleven"] = pixels(11)
    return tmp_path / "p.h5"


def test_sidecars_describe_only_the_written_dataset(tmp_path, packed):
    manifest = read_manifest(packed)
    for location in (packed, dataset_path(packed)):
        recorded = Provenance.read(Location.parse(location))
        assert recorded == Provenance(manifest, manifest.job.transform, has_index=True)
    for name, images in (("/six", 6), ("/eleven", 11)):
        location = dataset_path(packed, name)
        assert Provenance.read(Location.parse(location)) == Provenance(None, None, has_index=False)
        assert info(location)["state"] == "source"
        assert info(location)["shape"] == [images, 7, 9, 3]
        plan_of(location, tmp_path / f"y{name[1:]}.npy", mode="caffe", images_per_chunk=2).run()
        assert not index_path(tmp_path / f"y{name[1:]}.npy").exists()
        assert fastvgg.verify(tmp_path / f"y{name[1:]}.npy").recomputed_images == images
        with pytest.raises(SourceError, match="no checksums to compare"):
            fastvgg.verify(location)
        batches = [batch.images for batch in fastvgg.batches(location, 4, threads=1)]
        assert np.array_equal(np.concatenate(batches), pixels(images))
    plan_of(dataset_path(packed), tmp_path / "y.npy", mode="caffe", images_per_chunk=2).run()
    assert read_index(tmp_path / "y.npy", 6)[4].failed


@pytest.mark.parametrize("added", [np.uint8(1), np.zeros(SHAPE), {}], ids=["one", "many", "group"])
def test_restart_rejects_a_file_with_added_objects(tmp_path, added):
    source = save_npy(tmp_path / "x.npy", pixels())
    plan_of(source, dataset_path(tmp_path / "y.h5"), mode="caffe").run()
    with h5py.File(tmp_path / "y.h5", "a") as file:
        if isinstance(added, dict):
            file.create_group("mine")
        else:
            file["mine"] = added
    before = tree(tmp_path)
    with pytest.raises(TargetError) as caught:
        plan_of(source, dataset_path(tmp_path / "y.h5"), mode="tf", restart=True)
    check_error(caught.value, tmp_path / "y.h5", "changed since", "move it away")
    assert tree(tmp_path) == before


def test_only_restart_replaces_the_dataset_and_no_other_one(tmp_path):
    source = save_npy(tmp_path / "x.npy", pixels())
    location = dataset_path(tmp_path / "y.h5")
    plan_of(source, location, mode="caffe").run()
    with pytest.raises(TargetError, match="mode"):
        plan_of(source, location, mode="tf")
    plan_of(source, location, mode="tf", restart=True).run()
    assert np.array_equal(load_h5(location), network_inputs(pixels(), "tf"))
    before = tree(tmp_path)
    for restart in (False, True):
        with pytest.raises(TargetError, match="dataset"):
            plan_of(source, dataset_path(tmp_path / "y.h5", "/other"), mode="tf", restart=restart)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("kind", ["a manifest of a .npy", "a dangling link"])
def test_foreign_manifest_does_not_permit_a_restart(tmp_path, kind):
    source = save_npy(tmp_path / "x.npy", pixels())
    if kind == "a dangling link":
        plan_of(source, dataset_path(tmp_path / "y.h5"), mode="caffe").run()
        (tmp_path / "y.h5").rename(tmp_path / "z.h5")
        (tmp_path / "y.h5").symlink_to("nowhere.h5")
    else:
        plan_of(source, tmp_path / "y.npy", mode="caffe").run()
        manifest_path(tmp_path / "y.npy").rename(manifest_path(tmp_path / "y.h5"))
        save_h5(tmp_path / "y.h5", pixels())
    before = tree(tmp_path)
    with pytest.raises(TargetError, match="a file that fastvgg did not write"):
        plan_of(source, dataset_path(tmp_path / "y.h5"), mode="tf", restart=True)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("kind", ["npy", "images"])
def test_directory_is_not_replaced_with_a_file(tmp_path, kind):
    source = save_npy(tmp_path / "x.npy", pixels_as("float32"))
    (tmp_path / "y.h5").mkdir()
    if kind == "images":
        save_images(tmp_path / "y.h5", pixels())
    with pytest.raises(TargetError, match="is a directory that fastvgg did not write"):
        plan_of(source, dataset_path(tmp_path / "y.h5"), mode="caffe", restart=True)


@pytest.mark.parametrize("name", ["y.npy", "y.h5::/images"])
def test_written_image_directory_is_not_replaced_with_an_array(tmp_path, name):
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


def test_target_in_the_source_file_is_rejected(tmp_path):
    location = save_h5(tmp_path / "x.h5", pixels())
    with pytest.raises(TargetError) as caught:
        plan_of(location, dataset_path(tmp_path / "x.h5", "/more"), mode="caffe")
    check_error(caught.value, tmp_path / "x.h5", "is the source itself")
    location = save_h5(tmp_path / "y.npy.h5", pixels())
    shutil.move(tmp_path / "y.npy.h5", tmp_path / "y.h5.partial.h5")
    (tmp_path / "link.h5").symlink_to("y.h5")
    save_h5(tmp_path / "y.h5", pixels())
    with pytest.raises(TargetError, match="is the source itself"):
        plan_of(dataset_path(tmp_path / "link.h5"), dataset_path(tmp_path / "y.h5"), mode="caffe")


def test_manifest_of_other_data_is_rejected(tmp_path):
    source = save_npy(tmp_path / "x.npy", pixels())
    plan_of(source, dataset_path(tmp_path / "y.h5"), mode="caffe").run()
    save_h5(tmp_path / "y.h5", pixels())
    with pytest.raises(SourceError, match="its manifest records"):
        plan_of(dataset_path(tmp_path / "y.h5"), tmp_path / "z.npy", direction="restore")


def test_finished_file_is_found_with_and_without_its_dataset_name(tmp_path):
    source = save_npy(tmp_path / "x.npy", pixels(11))
    location = dataset_path(tmp_path / "y.h5", "/deep/images")
    plan_of(source, location, mode="caffe", images_per_chunk=4).run()
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


def test_flipped_bit_before_the_data_is_rejected_or_harmless(tmp_path):
    source = save_npy(tmp_path / "x.npy", pixels())
    location = dataset_path(tmp_path / "y.h5")
    plan_of(source, location, mode="caffe").run()
    expected = (tmp_path / "y.h5").read_bytes()
    for bit in range(0, 8 * (len(expected) - 5 * 756), 31):
        content = bytearray(expected)
        content[bit // 8] ^= 1 << bit % 8
        (tmp_path / "y.h5").write_bytes(content)
        try:
            fastvgg.verify(location)
        except FastvggError as error:
            check_error(error, tmp_path / "y.h5")
        else:  # a byte that HDF5 ignores
            assert np.array_equal(load_h5(location), network_inputs(pixels(), "caffe"))


def test_manifest_records_the_dataset_names(tmp_path):
    source = save_h5(tmp_path / "x.h5", pixels(), "/a")
    plan_of(source, dataset_path(tmp_path / "y.h5", "/b"), mode="caffe").run()
    job = json.loads(manifest_path(tmp_path / "y.h5").read_bytes())["job"]
    assert job["source"]["path"] == str(source)
    assert job["source"]["kind"] == job["result"]["kind"] == "hdf5"
    assert job["result"]["dataset"] == "/b"
    assert "h5py" in read_manifest(tmp_path / "y.h5").packages


# Damage

CAMPAIGN_SCRIPT = """
import json, sys
from tests.campaigns import fuzz_hdf5
from fastvgg.datasets import hdf5
exec(sys.argv[1])
try:
    print(json.dumps(fuzz_hdf5.campaign(seed=5, size=1000)))
except AssertionError as error:
    print(json.dumps({"wrong": str(error)}))
"""


def test_fuzzed_file_is_rejected_or_matches_h5py():
    counts = json.loads(stdout_of(CAMPAIGN_SCRIPT, ""))
    assert counts["accepted"] > 200
    assert counts["refused"] > 200
    assert counts["crashes in HDF5"] < 5
    assert counts["inputs"] == sum(counts.values()) - counts["inputs"]


@pytest.mark.parametrize(
    "broken",
    [
        "hdf5.HDF5_ERRORS = (KeyError, OSError, ValueError)",
        "hdf5.HDF5_ERRORS = (OSError, RuntimeError, ValueError)",
    ],
)
def test_fuzz_campaign_detects_a_broken_reader(broken):
    assert "input " in json.loads(stdout_of(CAMPAIGN_SCRIPT, broken)).get("wrong", "")
