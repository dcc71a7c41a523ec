"""Containers of arrays and images that claim, or decode to, far more than they hold.

`HOSTILE` maps a name to a function that writes one into a directory, and returns the location to
preprocess; the target is ``y.npy`` in the same directory. What is large is sparse on disk.
"""

from __future__ import annotations

import bz2
import json
import lzma
import os
import struct
import tarfile
import zlib

import h5py
import numcodecs
import numpy as np
import zarr

from tests.helpers.bad_arrays import header_text, npy_of
from tests.helpers.tar_on_disk import png
from tests.helpers.zarr_on_disk import ALL_WRITTEN, change_metadata, chunk_files, metadata_of

GIB = 2**30
SHAPE = (8, 64, 64, 3)
BATCH = np.random.default_rng(3).integers(0, 256, SHAPE, np.uint8)
ONE_CHUNK = {"chunks": SHAPE}
DECODED_BYTES = GIB // 8  # twice the memory limit


def sparse(path, nbytes, content=b""):
    """Write a file that starts with `content` and claims `nbytes` without using the disk."""
    path.write_bytes(content)
    os.truncate(path, nbytes)
    return path


def stream(compressor, nbytes=DECODED_BYTES):
    """Return what a compressor object makes of zeros."""
    block = bytes(2**20)
    blocks = [compressor.compress(block) for _ in range(nbytes // len(block))]
    return b"".join([*blocks, compressor.flush()])


BOMBS = {
    "zlib": lambda: stream(zlib.compressobj(9)),
    "gzip": lambda: stream(zlib.compressobj(9, zlib.DEFLATED, 31)),
    "bz2": lambda: stream(bz2.BZ2Compressor()),
    "lzma": lambda: stream(lzma.LZMACompressor()),
    "zstd": lambda: numcodecs.Zstd().encode(np.zeros(DECODED_BYTES, np.uint8)),
    "blosc": lambda: numcodecs.Blosc("zstd").encode(np.zeros(DECODED_BYTES, np.uint8)),
    "lz4": lambda: numcodecs.LZ4().encode(np.zeros(DECODED_BYTES, np.uint8)),
}
BOMBS_V3 = ("gzip", "zstd", "blosc")
CODECS_V2 = {
    "zlib": numcodecs.Zlib(),
    "gzip": numcodecs.GZip(),
    "bz2": numcodecs.BZ2(),
    "lzma": numcodecs.LZMA(),
    "zstd": numcodecs.Zstd(),
    "blosc": numcodecs.Blosc(),
    "lz4": numcodecs.LZ4(),
}


def save_zarr(directory, **settings):
    path = directory / "x.zarr"
    array = zarr.create_array(path, shape=SHAPE, dtype="u1", config=ALL_WRITTEN, **settings)
    array[...] = BATCH
    return path


def zarr_bomb(directory, name, version=2):
    if version == 2:
        path = save_zarr(directory, zarr_format=2, compressors=CODECS_V2[name], **ONE_CHUNK)
    else:
        codec = {"gzip": zarr.codecs.GzipCodec(), "zstd": zarr.codecs.ZstdCodec()}.get(name)
        path = save_zarr(directory, compressors=codec or zarr.codecs.BloscCodec(), **ONE_CHUNK)
    chunk_files(path)[0].write_bytes(BOMBS[name]())
    return path


def zstd_without_length(directory):
    """A Zstandard frame of unknown length: many blocks of one repeated byte."""
    path = save_zarr(directory, zarr_format=2, compressors=numcodecs.Zstd(), **ONE_CHUNK)
    block = ((128 * 1024) << 3 | 1 << 1).to_bytes(3, "little") + b"\0"
    last = (1 << 3 | 1 << 1 | 1).to_bytes(3, "little") + b"\0"
    frame = b"\x28\xb5\x2f\xfd" + bytes([0x00, 0x58]) + block * (DECODED_BYTES >> 17) + last
    chunk_files(path)[0].write_bytes(frame)
    return path


def shard_bomb(directory):
    settings = {"chunks": (2, *SHAPE[1:]), "shards": SHAPE}
    path = save_zarr(directory, compressors=zarr.codecs.GzipCodec(), **settings)
    without_index_checksum(path)
    bomb = stream(zlib.compressobj(9, zlib.DEFLATED, 31), 80 * 2**20)
    chunk_files(path)[0].write_bytes(bomb + np.array([[0, len(bomb)]] * 4, "<u8").tobytes())
    return path


def without_index_checksum(path):
    (codec,) = json.loads(metadata_of(path).read_bytes())["codecs"]
    codec["configuration"]["index_codecs"] = codec["configuration"]["index_codecs"][:1]
    change_metadata(path, codecs=[codec])


def absurd_index(directory, offset, length):
    path = save_zarr(directory, chunks=(2, *SHAPE[1:]), shards=SHAPE, compressors=None)
    without_index_checksum(path)
    index = np.array([[offset, length]] * 4, "<u8").tobytes()
    chunk_files(path)[0].write_bytes(BATCH.tobytes() + index)
    return path


def changed(directory, version=3, **fields):
    path = save_zarr(directory, zarr_format=version, compressors=None, **ONE_CHUNK)
    change_metadata(path, **fields)
    return path


def grid(*shape):
    return {"name": "regular", "configuration": {"chunk_shape": shape}}


def filtered(directory, *filters):
    return changed(directory, 2, filters=[*filters])


def long_metadata(directory, name, text, nbytes=GIB // 16):
    version = 2 if name.startswith(".") else 3
    path = save_zarr(directory, zarr_format=version, compressors=None, **ONE_CHUNK)
    content = (path / name).read_bytes() if (path / name).exists() else b"{}"
    with (path / name).open("wb") as file:
        file.write(content.rstrip()[:-1] + (b"," if len(content) > 2 else b"") + b'"x": ')
        for _ in range(nbytes // len(text)):
            file.write(text)
    return path


def large_index(directory, shape, shard_shape, inner_shape, location="end"):
    """A sparse shard with an index of many inner chunks, none of which is missing."""
    path = save_zarr(directory, compressors=None, chunks=SHAPE, shards=SHAPE)
    without_index_checksum(path)
    (codec,) = json.loads(metadata_of(path).read_bytes())["codecs"]
    codec["configuration"] |= {"chunk_shape": inner_shape, "index_location": location}
    change_metadata(path, shape=shape, chunk_grid=grid(*shard_shape), codecs=[codec])
    inner_chunks = np.prod(shard_shape, dtype=int) // np.prod(inner_shape, dtype=int)
    sparse(chunk_files(path)[0], 16 * int(inner_chunks) + 2**20)
    return path


def nested_shards(directory):
    path = save_zarr(directory, chunks=(2, *SHAPE[1:]), shards=SHAPE, compressors=None)
    (codec,) = json.loads(metadata_of(path).read_bytes())["codecs"]
    inner = {"name": codec["name"], "configuration": dict(codec["configuration"])}
    inner["configuration"]["chunk_shape"] = [1, *SHAPE[1:]]
    codec["configuration"]["codecs"] = [inner]
    change_metadata(path, codecs=[codec])
    return path


def many_chunks(directory):
    return changed(directory, shape=[8, 2000, 2000, 3], chunk_grid=grid(1, 1, 1, 1))


def long_chunk(directory):
    path = save_zarr(directory, compressors=None, **ONE_CHUNK)
    os.truncate(chunk_files(path)[0], 4 * GIB)
    return path


def h5_bomb(directory, *, fletcher32=False, shuffle=False):
    path = directory / "x.h5"
    with h5py.File(path, "w") as file:
        settings = {"compression": "gzip", "fletcher32": fletcher32, "shuffle": shuffle}
        dataset = file.create_dataset("x", SHAPE, "u1", chunks=SHAPE, **settings)
        content = BOMBS["zlib"]()
        if fletcher32:
            content = with_fletcher32(file, content)
        dataset.id.write_direct_chunk((0, 0, 0, 0), content)
    return f"{path}::/x"


def with_fletcher32(file, content):
    """Append the checksum that HDF5 computes: with a wrong one, it would decode nothing."""
    data = np.frombuffer(content, np.uint8)
    checked = file.create_dataset("checked", data=data, chunks=data.shape, fletcher32=True)
    return checked.id.read_direct_chunk((0,))[1]


def h5_with(directory, write):
    path = directory / "x.h5"
    with h5py.File(path, "w") as file:
        write(file)
    return f"{path}::/x"


def h5_huge_chunk(directory):
    def write(file):
        shape = (8, 20_000, 20_000, 3)
        dataset = file.create_dataset(
            "x", SHAPE, "u1", chunks=(1, *shape[1:]), maxshape=(None,) * 4, compression="gzip"
        )
        for row in range(8):
            dataset.id.write_direct_chunk((row, 0, 0, 0), BOMBS["zlib"]())

    return h5_with(directory, write)


def h5_external(directory, *, raw):
    if raw:
        secret = [("/etc/passwd", 0, BATCH.nbytes)]
        return h5_with(
            directory, lambda file: file.create_dataset("x", SHAPE, "u1", external=secret)
        )
    link = h5py.ExternalLink("/etc/passwd", "/x")
    return h5_with(directory, lambda file: file.__setitem__("x", link))


def h5_loop(directory):
    def write(file):
        file["x"] = h5py.SoftLink("/y")
        file["y"] = h5py.SoftLink("/x")

    return h5_with(directory, write)


def h5_attributes(directory):
    def write(file):
        file["x"] = BATCH
        file["x"].attrs.create("big", np.zeros(8000, np.uint8))
        group = file.create_group("many")
        for number in range(3000):
            group.create_group(f"{number}")

    return h5_with(directory, write)


def h5_names(directory):
    location = h5_attributes(directory)
    return location.replace("::/x", "::/missing")


def h5_nested(directory):
    def write(file):
        group = file
        for _ in range(400):
            group = group.create_group("g")

    return h5_with(directory, write)


def h5_user_block(directory):
    path = directory / "x.h5"
    with h5py.File(path, "w", userblock_size=2**20) as file:
        file["x"] = BATCH
    return f"{path}::/x"


def h5_claim(directory, change):
    """A sparse file of 4 GiB, of which `change` edits the structures."""
    path = directory / "x.h5"
    with h5py.File(path, "w", libver="earliest") as file:
        file["x"] = BATCH
    content = bytearray(path.read_bytes())
    change(content)
    struct.pack_into("<Q", content, 40, 4 * GIB)  # the end of the file in the superblock
    sparse(path, 4 * GIB, content)
    return f"{path}::/x"


def claim_local_heap(content):
    struct.pack_into("<Q", content, content.index(b"HEAP") + 8, 2 * GIB)


def claim_object_header(content):
    (root,) = struct.unpack_from("<Q", content, 64)
    struct.pack_into("<I", content, root + 8, 3 * GIB)


def tar_with(directory, *members):
    path = directory / "x.tar"
    with path.open("wb") as file:
        for member in members:
            file.write(member)
        file.write(bytes(1024))
    return path


def tar_header(name, size, kind=b"0", *, base_256=False):
    entry = tarfile.TarInfo(name)
    entry.type, entry.size = kind, 0 if base_256 else size
    header = bytearray(entry.tobuf(tarfile.USTAR_FORMAT))
    if base_256:
        header[124:136] = b"\x80" + size.to_bytes(11, "big")
        header[148:156] = b"        "
        header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


def tar_image():
    content = png(BATCH[0])
    return tar_header("a.png", len(content)) + content + bytes(-len(content) % 512)


def tar_sparse_extension(directory, kind, nbytes):
    path = directory / "x.tar"
    path.write_bytes(tar_header("x", nbytes % 2**33, kind))
    os.truncate(path, nbytes + 4096)
    return path


def with_npy(directory, name, nbytes, content):
    """A good array with a hostile sidecar."""
    np.save(directory / "x.npy", BATCH)
    sparse(directory / name, nbytes, content)
    return directory / "x.npy"


def repeated(path, start, text, nbytes):
    with path.open("wb") as file:
        file.write(start)
        block = text * (2**20 // len(text))
        for _ in range(nbytes // len(block)):
            file.write(block)


def sidecar_of(directory, name, start, text, nbytes=GIB // 16):
    np.save(directory / "x.npy", BATCH)
    repeated(directory / name, start, text, nbytes)
    return directory / "x.npy"


def index_with(directory, images, record):
    """An array of pixels, and an index in which every row ends in `record`."""
    np.save(directory / "x.npy", np.zeros((images, 1, 1, 3), np.uint8))
    lines = (b"%d,%d.png,%b\n" % (row, row, record) for row in range(images))
    (directory / f"x.npy{INDEX}").write_bytes(INDEX_HEADER + b"".join(lines))
    return directory / "x.npy"


def tar_of_long_names(directory, images, name_bytes):
    """A tar of empty images, each in a folder of its own."""
    members = []
    for row in range(images):
        name = (b"%d/%b/a.png" % (row, b"d" * name_bytes)).ljust(-(-name_bytes // 512) * 512, b"\0")
        name += bytes(-len(name) % 512)
        members += [tar_header("@LongLink", len(name), b"L"), name, tar_header("x", 0)]
    content = png(BATCH[0, :1, :1])
    image = tar_header("a.png", len(content)) + content + bytes(-len(content) % 512)
    return tar_with(directory, image, *members)


def manifest_of_values(directory):
    np.save(directory / "x.npy", BATCH)
    fields = {"fastvgg-manifest": 3, "checksums": ["0123456789abcdef"] * 700_000}
    (directory / f"x.npy{MANIFEST}").write_text(json.dumps(fields))
    return directory / "x.npy"


def npy_with(directory, text, version=(1, 0), data=b""):
    path = directory / "x.npy"
    path.write_bytes(npy_of(text, version, data))
    return path


def npy_header_of_4_gib(directory):
    return sparse(
        directory / "x.npy", 5 * GIB, b"\x93NUMPY\x02\0" + struct.pack("<I", 2**32 - 16) + b"{"
    )


def parts_of_claims(directory):
    parts = directory / "parts"
    parts.mkdir()
    np.save(parts / "part-0.npy", BATCH)
    (parts / "part-1.npy").write_bytes(npy_of(header_text("'|u1'", shape=f"({2**40}, 64, 64, 3)")))
    return parts


def links_to_itself(directory):
    path = save_zarr(directory, compressors=None, **ONE_CHUNK)
    for name in ("a", "b", "d", "e"):
        (path / name).symlink_to(".")
    return path


JOURNAL, MANIFEST, INDEX = ".fastvgg-journal", ".fastvgg.json", ".index.csv"
DEEP = b"[" * 4096
INDEX_HEADER = b"row,path,label,width,height,status,reason\n"
HOSTILE = {
    **{f"zarr v2, {name}": lambda d, n=name: zarr_bomb(d, n) for name in BOMBS},
    **{
        f"zarr v3, {name}": lambda d, n=name: zarr_bomb(d, n, 3)
        for name in ("gzip", "zstd", "blosc")
    },
    "zarr v2, zstd of unknown length": zstd_without_length,
    "zarr, a bomb in a shard": shard_bomb,
    "zarr, an index of 2**60 bytes": lambda d: absurd_index(d, 0, 2**60),
    "zarr, an index that points nowhere": lambda d: absurd_index(d, 2**62, 6144),
    "zarr, a long index at the end": lambda d: large_index(
        d, [8, 600, 600, 3], [8, 600, 600, 3], [1, 1, 1, 1]
    ),
    "zarr, a long index at the start": lambda d: large_index(
        d, [8, 500, 500, 3], [8, 500, 500, 3], [1, 1, 1, 1], "start"
    ),
    "zarr, a long index of few images": lambda d: large_index(
        d, [4000, 4, 4, 3], [4_000_000, 4, 4, 3], [1, 4, 4, 3]
    ),
    "zarr, nested shards": nested_shards,
    "zarr, a chunk of 4 GiB": long_chunk,
    "zarr, chunks larger than the array": lambda d: changed(
        d, chunk_grid=grid(8, 40_000, 40_000, 3)
    ),
    "zarr, chunks of more rows": lambda d: changed(d, chunk_grid=grid(10**6, 64, 64, 3)),
    "zarr, chunks of one element": many_chunks,
    "zarr, an absurd shape": lambda d: changed(d, shape=[2**40, 2**20, 3, 3]),
    "zarr, an absurd fill value": lambda d: changed(d, fill_value=10**400),
    "zarr, an absurd dtype": lambda d: changed(d, 2, dtype="|V" + "9" * 9),
    "zarr, nested dtypes": lambda d: changed(d, 2, dtype=json.loads("[" * 500 + "]" * 500)),
    "zarr, pickles": lambda d: filtered(d, {"id": "pickle"}),
    "zarr, objects of JSON": lambda d: filtered(d, {"id": "json2"}),
    "zarr, a filter to long strings": lambda d: filtered(
        d, {"id": "fixedscaleoffset", "scale": 1, "offset": 0, "dtype": "S1000000", "astype": "u1"}
    ),
    "zarr, packed bits": lambda d: filtered(d, {"id": "packbits"}),
    "zarr.json of 64 MiB": lambda d: long_metadata(d, "zarr.json", b"[" * 4096),
    ".zarray of 64 MiB": lambda d: long_metadata(d, ".zarray", b'"a' * 2048),
    ".zattrs of 64 MiB": lambda d: long_metadata(d, ".zattrs", b"[],"),
    "zarr, links to itself": links_to_itself,
    "hdf5, deflate": h5_bomb,
    "hdf5, deflate and fletcher32": lambda d: h5_bomb(d, fletcher32=True),
    "hdf5, shuffle and deflate": lambda d: h5_bomb(d, shuffle=True),
    "hdf5, chunks larger than the array": h5_huge_chunk,
    "hdf5, external raw data": lambda d: h5_external(d, raw=True),
    "hdf5, an external link": lambda d: h5_external(d, raw=False),
    "hdf5, a loop of links": h5_loop,
    "hdf5, many attributes and groups": h5_attributes,
    "hdf5, many groups without the dataset": h5_names,
    "hdf5, nested groups": h5_nested,
    "hdf5, a user block": h5_user_block,
    "hdf5, a heap of 2 GiB": lambda d: h5_claim(d, claim_local_heap),
    "hdf5, an object header of 3 GiB": lambda d: h5_claim(d, claim_object_header),
    "npy, a header of 4 GiB": npy_header_of_4_gib,
    "npy, 2**48 images": lambda d: npy_with(d, header_text("'|u1'", shape=f"({2**48}, 9, 9, 3)")),
    "npy, nested": lambda d: npy_with(d, "(" * 3000 + ")" * 3000),
    "parts of many claimed images": parts_of_claims,
    "tar, a pax header of 4 GiB": lambda d: tar_sparse_extension(d, b"x", 4 * GIB),
    "tar, a global pax header of 4 GiB": lambda d: tar_sparse_extension(d, b"g", 4 * GIB),
    "tar, a name of 4 GiB": lambda d: tar_sparse_extension(d, b"L", 4 * GIB),
    "tar, an image of 2**80 bytes": lambda d: tar_with(
        d, tar_image(), tar_header("b.png", 2**80, base_256=True)
    ),
    "tar, a negative size": lambda d: tar_with(
        d, tar_image(), tar_header("b.png", 2**88 - 1, base_256=True)
    ),
    "tar of long names": lambda d: tar_of_long_names(d, 6_000, 1_500),
    "tar, a range of missing shards": lambda d: f"{d}/{{000000..999999}}.tar",
    "manifest of many values": manifest_of_values,
    "manifest of 2 GiB": lambda d: with_npy(d, f"x.npy{MANIFEST}", 2 * GIB, b'{"fastvgg-manifest'),
    "manifest of many lists": lambda d: sidecar_of(d, f"x.npy{MANIFEST}", b"[", b"[],", 32 * 2**20),
    "manifest, nested": lambda d: sidecar_of(d, f"x.npy{MANIFEST}", b"", DEEP, 8 * 2**20),
    "journal of a line of 2 GiB": lambda d: with_npy(
        d, f"y.npy{JOURNAL}", 2 * GIB, b'0123456789abcdef {"fastvgg-journal": 1'
    ),
    "journal, nested": lambda d: sidecar_of(
        d, f"y.npy{JOURNAL}", b'0123456789abcdef {"fastvgg-journal": ', DEEP
    ),
    "redo log of 2 GiB": lambda d: with_npy(
        d, f"x.npy{JOURNAL}", 2 * GIB, b'0123456789abcdef {"fastvgg-redo-log": 1}\n'
    ),
    "index of a line of 1 GiB": lambda d: with_npy(d, f"x.npy{INDEX}", GIB, INDEX_HEADER + b'0,"'),
    "index with long reasons": lambda d: index_with(d, 40, b",1,1,failed," + b"r" * 1_000_000),
    "index with long labels": lambda d: index_with(d, 80, b"l" * 1_000_000 + b",1,1,ok,"),
    "index of many images": lambda d: index_with(d, 30_000, b"l,1,1,ok," + b"r" * 600),
    "index of many lines": lambda d: sidecar_of(
        d, f"x.npy{INDEX}", INDEX_HEADER, b"0,a.png,,1,1,ok,\n"
    ),
}
ORDINARY = {
    "zarr": lambda d: save_zarr(d, compressors=zarr.codecs.GzipCodec(), **ONE_CHUNK),
    "hdf5": lambda d: h5_with(
        d, lambda file: file.create_dataset("x", data=BATCH, compression="gzip")
    ),
    "npy": lambda d: npy_with(d, header_text("'|u1'", shape=str(SHAPE)), data=BATCH.tobytes()),
    "tar": lambda d: tar_with(d, tar_image()),
}
