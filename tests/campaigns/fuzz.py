"""Damaged files are read correctly or rejected with a typed error.

    python -m tests.campaigns.fuzz --seed 1      # a million inputs, some minutes; prints its counts
    python -m tests.campaigns.fuzz --size 20000  # so many inputs in all

What is read: headers and files of .npy arrays, files of Zarr arrays, journals of runs into a new
file, redo logs of runs in place, manifests. An input is a valid file that was truncated at some
byte, or of which some bit was flipped; or that was edited in several places; or whose fields were
exchanged for others and sealed again, with the right checksum, as someone does who means harm. Of
each input is asked:

- it is accepted, or refused with an error of fastvgg that names the file and says what to do, on
  lines that a terminal shows as they are; nothing else is raised, and nothing is warned of;
- what numpy refuses in a .npy file is refused, and what both accept is the same to both;
- what zarr-python reads of an array is what is read of it, and no damage that a checksum or a
  compressor notices is passed over;
- of a journal only the lines before the first incomplete one are accepted;
- accepted numbers are integers in their range, not true or 1.0;
- a redo log with one wrong bit is rejected, or recovers the right bytes;
- nothing on the disk grows, and what is read stays as it is;
- it takes little time, and little memory.

One input in `SAMPLED` is read with every allocation counted; the time of the others is measured,
and what would take more than `ADDRESS_SPACE_BYTES` is refused by the system.
"""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import io
import json
import math
import os
import resource
import struct
import sys
import tempfile
import time
import tracemalloc
import warnings
from itertools import islice
from pathlib import Path, PosixPath
from random import Random
from types import SimpleNamespace

import numcodecs
import numpy as np
import xxhash
from zarr.codecs import BloscCodec, Crc32cCodec, ZstdCodec

import fastvgg
from fastvgg.datasets.base import ImageRecord
from fastvgg.datasets.npy import NpySource, read_header
from fastvgg.datasets.zarr import METADATA_KEYS, ZarrSource
from fastvgg.errors import FastvggError, ResumeError, SourceError
from fastvgg.imaging.decode import INTERPOLATIONS
from fastvgg.storage.local import Storage
from fastvgg.stream import redo_log_layout
from fastvgg.stream.info import info
from fastvgg.stream.journal import Commit, journal_path, read_journal
from fastvgg.stream.lines import decode_line, encode_line
from fastvgg.stream.manifest import Manifest, read_manifest
from fastvgg.stream.redo_log import (
    RedoLog,
    check_same_file,
    committed_chunks,
    read_redo_log_header,
)
from fastvgg.stream.target import inspect_target, make_destination, with_committed
from tests.campaigns.command import main
from tests.helpers.bad_arrays import MAX_HEADER_BYTES, header_text, npy_of
from tests.helpers.batches import dtype_of
from tests.helpers.damage import (
    RUN,
    TOKENS,
    VALUES,
    corrupt_json,
    damaged,
    interleave_inputs,
    line_with_checksum,
    truncations_and_bit_flips,
    valid_prefix_bytes,
)
from tests.helpers.datasets_on_disk import (
    check_error,
    names_in,
    npy_bytes,
    pixels,
    plan_of,
    save_images,
    save_npy,
)
from tests.helpers.faults import memory_directory
from tests.helpers.zarr_on_disk import chunk_files, load_zarr, metadata_of, save_zarr

SIZE = 1_000_000
SAMPLED = 64
MEMORY_BYTES = 8 * 2**20  # at most, for any input; the longest has some tens of kilobytes
ADDRESS_SPACE_BYTES = 2**30  # for all that is allocated in the campaign
MAX_SECONDS = 1.0  # of one core's time, at most
HANG_SECONDS = 120
MAX_MESSAGE_CHARACTERS = 1000
FINGERPRINT = "f" * 32


class ReusedFile:
    """A file that stays open and is rewritten for each input."""

    def __init__(self, path):
        self.descriptor = os.open(path, os.O_RDWR | os.O_CREAT)

    def put(self, content):
        os.pwrite(self.descriptor, content, 0)
        os.ftruncate(self.descriptor, len(content))

    def get(self):
        return os.pread(self.descriptor, os.fstat(self.descriptor).st_size, 0)

    def close(self):
        os.close(self.descriptor)


class Kind:
    """A kind of input: how inputs are generated, read and checked.

    Parameters
    ----------
    place
        An empty directory.
    random
        Where all choices come from.
    """

    valid_inputs = ()  # must be accepted
    error_type = FastvggError  # what the others may be refused with

    def __init__(self, place, random):
        self.place = place
        self.random = random
        self._opened = []

    def reused(self, path):
        self._opened.append(ReusedFile(path))
        return self._opened[-1]

    def close(self):
        for file in self._opened:
            file.close()

    def inputs(self):
        return interleave_inputs(
            self.random, truncations_and_bit_flips(self.random, self.valid_inputs), self._input
        )

    def _input(self):
        return (
            self.random.choice(self.valid_inputs) if self.random.random() < 0.05 else self.mutated()
        )


class NpyHeaders(Kind):
    """The first bytes of .npy files, in memory."""

    name, share = "npy headers", 0.46
    error_type = SourceError
    path = Path("x.npy")

    VERSIONS = ((1, 0), (1, 0), (2, 0), (3, 0))
    DESCRS = (
        *("'<f4'", "'<f4'", "'|u1'", "'<f2'", "'<f8'", "'<V2'", '"<f4"', "'=f4'", "'f4'", "'<i4'"),
        *("'>f4'", "'|O'", "'O'", "'<U1'", "[('a', '<f4')]", "('<f4', (3,))", "b'<f4'", "None"),
        *("'\\x3cf4'", "u'<f4'", "'<' 'f4'", "'<f4\\d'", "'\x1b[2J'", "'<f4' 'O'", "1", "'a'*9"),
        *("0x" + "f" * 999, "'" + "f" * 9000 + "'", "'|V0'", "'<c8'", "'<M8[s]'", "'?'"),
    )
    FORTRANS = (*("False",) * 30, "True", "0", "None", "'False'", "not 1", "False or True", "1==2")
    AXES = (
        *("0", "1", "2", "3", "5", "224", "-1", "-0", "+3", "True", "5.0", "'5'", "None", "1j"),
        *(str(2**31), str(2**32), str(2**48), str(2**48 + 1), str(2**63), str(2**64), "9" * 4301),
        *("9" * 4300, "0x" + "f" * 4000, "0x3", "0b11", "0o3", "3_0", "03", "1e9", "()", "[3]"),
        *("1" + "0" * 400 + "+1j", "5L", "\u0663", "--3", "~3", "3 # three\n", "(3)"),
        *("1or 2", "1.or 2", "0xfor 2", "1jif 1else 2"),
    )
    EXTRAS = (
        *("",) * 30,
        *("'x': 1", "'shape': (1, 1, 1, 3)", "'descr': '|O'", "**{}", "# \u00e9", "# 1or 2\n"),
        *(" " * 9000, " " * 11_000, "1: 1", "[]: 1", "'descr': " + "[" * 99 + "]" * 99),
    )

    def __init__(self, place, random):
        super().__init__(place, random)
        texts = [header_text(f"'{descr}'") for descr in ("<f4", "|u1", "<f2", "<f8", "<V2")]
        self.valid_inputs = [npy_of(text, data=b"") for text in texts]
        self.valid_inputs += [npy_of(texts[0], version, b"") for version in ((2, 0), (3, 0))]
        self.valid_inputs += [npy_bytes(np.zeros((1, 2, 1, 3), np.float16))[:128]]

    def mutated(self):
        random = self.random
        what = random.random()
        if what < 0.2:
            return damaged(random, random.choice(self.valid_inputs))
        text = self._text()
        if what < 0.35:
            text = damaged(random, text)
        version = random.choice(self.VERSIONS)
        if len(text) > 65_000:
            version = (2, 0)
        content = npy_of(text, version, b"")
        if what > 0.9:  # a length that is not the text's
            length = random.choice([0, 1, len(text), 9999, 10_000, 10_001, 2**16 - 1, 2**32 - 1])
            packed = struct.pack("<I", length)
            content = content[:8] + (packed[:2] if version == (1, 0) else packed) + content[12:]
        return content

    def _text(self):
        random = self.random
        axes = [
            str(random.randrange(1, 300)) if random.random() < 0.93 else random.choice(self.AXES)
            for _ in range(4 if random.random() < 0.9 else random.choice([0, 1, 2, 3, 5, 65]))
        ]
        shape = "(" + ", ".join(axes) + random.choice([*[")", ",)"] * 9, "]", ""])
        fields = [
            f"'descr': {random.choice(self.DESCRS[:4] if random.random() < 0.8 else self.DESCRS)}",
            f"'fortran_order': {random.choice(self.FORTRANS)}",
            f"'shape': {shape}",
            random.choice(self.EXTRAS),
        ]
        if random.random() < 0.3:
            random.shuffle(fields)
        if random.random() < 0.05:
            del fields[random.randrange(4)]
        separator = random.choice([", ", ", ", ",", ",\n", " , "])
        return ("{" + separator.join(filter(None, fields)) + random.choice(["}", ", }"])).encode()

    def read(self, content):
        return read_header(io.BytesIO(content), self.path)

    def check(self, content, found, error):
        if found is None:
            return
        stream = io.BytesIO(content)
        shape, fortran, dtype = read_header_with_numpy(stream)
        assert (found.shape, False) == (shape, fortran)
        assert all(type(axis) is int and axis >= 0 for axis in found.shape)
        assert np.dtype(found.descr) == dtype
        assert found.offset == stream.tell()


def read_header_with_numpy(stream):
    """Shape, order and type; numpy raises where it refuses."""
    version = np.lib.format.read_magic(stream)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(stream, max_header_size=MAX_HEADER_BYTES)
    if version == (2, 0):
        return np.lib.format.read_array_header_2_0(stream, max_header_size=MAX_HEADER_BYTES)
    # numpy names no public reader of the third version, which its two others share.
    shared = np.lib.format.read_array_header_1_0.__globals__["_read_array_header"]
    return shared(stream, version, max_header_size=MAX_HEADER_BYTES)


class NpyFiles(Kind):
    """Whole .npy files, opened as sources and read."""

    name, share = "npy files", 0.07
    error_type = SourceError

    def __init__(self, place, random):
        super().__init__(place, random)
        self.path = place / "x.npy"
        self._file = self.reused(self.path)
        self._stored_as = None
        shapes = ((1, 1, 2, 3), (2, 1, 1, 3), (1, 3, 1, 1), (3, 2, 2, 3))
        arrays = [
            (np.arange(math.prod(shape)).reshape(shape) + 1).astype(name)
            for name in ("uint8", "float16", "float32", "float64")
            for shape in shapes
        ]
        arrays.append(np.zeros((1, 1, 2, 3), dtype_of("bfloat16")))
        self.valid_inputs = [npy_bytes(array) for array in arrays]
        others = (np.asfortranarray(arrays[3]), arrays[0].view(bool), arrays[9].astype(">f4"))
        self._others = [npy_bytes(array) for array in others]

    def mutated(self):
        random = self.random
        if random.random() < 0.3:  # a shape, and as many bytes as it takes, or nearly
            shape = [0 if random.random() < 0.05 else random.randint(1, 3) for _ in range(4)]
            if random.random() < 0.2:
                shape[random.randrange(4)] = True
            text = header_text("'|u1'", random.choice(["False", "True"]), str(tuple(shape)))
            data = bytes(max(0, math.prod(shape) + random.choice([-1, 0, 0, 0, 1, 64])))
            return npy_of(text, random.choice(NpyHeaders.VERSIONS), data)
        if random.random() < 0.05:
            return random.choice(self._others)
        return damaged(random, random.choice(self.valid_inputs))

    def read(self, content):
        self._file.put(content)
        self._stored_as = "bfloat16" if content[-1:] == b"\0" else None
        with contextlib.closing(NpySource(self.path, dtype_hint=self._stored_as)) as source:
            batch = source.read(0, source.header.images).batch
            return source.header, batch

    def check(self, content, found, error):
        assert self._file.get() == content
        if len(content) % 8 == 0:
            check_info(self.path, expected=error is None and self._stored_as is None)
        if found is None:
            return
        header, batch = found
        expected = np.load(io.BytesIO(content), allow_pickle=False)
        assert header.shape == batch.shape == expected.shape
        if expected.dtype.kind == "V":
            expected = expected.view(dtype_of("bfloat16"))
        assert batch.dtype == expected.dtype == dtype_of(header.dtype)
        assert batch.tobytes() == expected.tobytes() == content[len(content) - batch.nbytes :]


class ZarrArrays(Kind):
    """Arrays of Zarr, opened as sources and read; of each one file was damaged."""

    name, share = "zarr arrays", 0.02
    path = Path("x.zarr")

    CHECKED_ENCODINGS = ("shards", "zstd")  # zlib's Adler-32 of a few bytes is met by some two bits
    MAX_BYTES = 2**16  # to be read: what metadata claim may be more than there is

    def __init__(self, place, random):
        super().__init__(place, random)
        batch = pixels(3, 2, 3)
        settings = {
            "shards": {"shards": (2, 2, 4, 3), "compressors": Crc32cCodec()},
            "zstd": {"compressors": ZstdCodec(checksum=True)},
            "blosc": {"compressors": BloscCodec()},
            "v2 zlib": {"compressors": numcodecs.Zlib(), "zarr_format": 2},
            "v2 bz2": {"compressors": numcodecs.BZ2(), "zarr_format": 2},
        }
        self._batch = batch
        self._files = []
        for name, stored in settings.items():
            path = save_zarr(place / name / self.path, batch, chunks=(1, 2, 2, 3), **stored)
            files = [metadata_of(path)] * 3 + chunk_files(path)
            self._files += [(name, path, file, file.read_bytes()) for file in files]

    def inputs(self):
        """Which array, which file of it, and what the file holds instead."""
        while True:
            name, path, file, intact = self.random.choice(self._files)
            content = self._changed(intact, is_text=file.name in METADATA_KEYS)
            yield name, path, file, intact, content

    def _changed(self, intact, *, is_text):
        random = self.random
        what = random.random()
        if what < 0.05:
            return intact
        if what < 0.15:
            return intact[: random.choice([0, random.randrange(len(intact))])]
        if what < 0.25:
            begin = random.randrange(len(intact))
            end = min(len(intact), begin + random.randint(1, 40))
            return intact[:begin] + bytes(end - begin) + intact[end:]
        return corrupt_json(random, intact) if is_text and what < 0.8 else damaged(random, intact)

    def read(self, case):
        _, path, file, intact, content = case
        file.write_bytes(content)
        try:
            # Where metadata say that a shard's index has no checksum, zarr adds what is in it.
            with warnings.catch_warnings(), contextlib.closing(ZarrSource(path)) as source:
                warnings.filterwarnings("ignore", "overflow encountered", RuntimeWarning)
                if source.header.nbytes > self.MAX_BYTES:
                    return (None, None)
                batch = source.read(0, source.header.images).batch
                warnings.simplefilter("ignore")
                return batch, load_zarr(path)
        finally:
            file.write_bytes(intact)

    def check(self, case, found, error):
        name, _, file, intact, content = case
        if content == intact:
            assert found is not None
        if found is None or found[0] is None:
            return
        batch, expected = found
        assert batch.shape == expected.shape
        assert batch.dtype == expected.dtype.newbyteorder("=")
        assert np.array_equal(batch, expected, equal_nan=batch.dtype.kind == "f")
        if content == intact or (name in self.CHECKED_ENCODINGS and file.name not in METADATA_KEYS):
            assert np.array_equal(batch, self._batch)


def check_info(path, *, expected):
    """Check that `info` describes a path in JSON types."""
    try:
        described = info(path)
    except FastvggError:
        assert not expected
    else:
        json.dumps(described)
        assert described["path"] == str(path)


class ChecksummedLines(Kind):
    """Lines with a checksum, in memory."""

    name, share = "sealed lines", 0.15
    path = Path()

    def __init__(self, place, random):
        super().__init__(place, random)
        self._texts = [
            json.dumps(
                {"chunk": 1, "checksum": "1" * 16, "records": [["a.png", "", 9, 7, False, ""]]}
            ).encode(),
            json.dumps({"run": RUN, "generation": 7, "chunks": 6}).encode(),
            json.dumps({"a": [1, 2.5, None, {"b": "\u00e9"}], "c": True}).encode(),
        ]
        for text in self._texts:
            assert encode_line(json.loads(text)) == line_with_checksum(text)
        self.valid_inputs = [line_with_checksum(text) for text in self._texts]

    def mutated(self):
        random = self.random
        text = random.choice(self._texts)
        what = random.random()
        if what < 0.3:
            return damaged(random, line_with_checksum(text))
        if what < 0.35:
            return line_with_checksum(json.dumps(random.choice(VALUES)).encode())
        return line_with_checksum(
            corrupt_json(random, text) if what < 0.7 else damaged(random, text)
        )

    def read(self, content):
        try:
            return decode_line(content)
        except ValueError as error:  # its readers make their own of it
            raise FastvggError(str(self.path), "make it again") from error

    def check(self, content, found, error):
        line = content.endswith(b"\n") and content == line_with_checksum(content[17:-1])
        assert line == (found is not None or error is not None)
        assert found is None or isinstance(found, dict)


class Journals(Kind):
    """Journals of runs into a new file."""

    name, share = "journals", 0.12
    error_type = ResumeError

    def __init__(self, place, random):
        super().__init__(place, random)
        self._plans = plans(place)
        self.dataset = place / "y.npy"
        self.path = place / "y.npy.fastvgg-journal"
        self._file = self.reused(self.path)
        self.valid_inputs = []
        for plan, records in zip(self._plans, ([], RECORDS, RECORDS), strict=True):
            first = {"fastvgg-journal": 2, "job": plan.job.to_dict(), "chunk_images": 2}
            first |= {"replaces": None, "retries": bool(records)}
            commits = [
                make_commit(chunk, records[2 * chunk : 2 * chunk + 2])
                for chunk in range(plan.chunks)
            ]
            self.valid_inputs.append(
                encode_line(first) + b"".join(each.to_line() for each in commits)
            )

    def mutated(self):
        random = self.random
        intact = random.choice(self.valid_inputs)
        what = random.random()
        if what < 0.15:
            return damaged(random, intact)
        lines = intact.splitlines(keepends=True)
        at = random.choice([0, 0, *range(len(lines))])
        if what < 0.2:
            lines[0] = line_with_checksum(consistent_changes(random, lines[0][17:-1]))
        elif what < 0.8:
            lines[at] = line_with_checksum(corrupt_json(random, lines[at][17:-1]))
        elif what < 0.9:
            lines[at] = line_with_checksum(damaged(random, lines[at][17:-1]))
        elif what < 0.95:
            lines.insert(random.randrange(len(lines)), lines[at])
        else:
            del lines[at]
        return b"".join(lines)

    def read(self, content):
        self._file.put(content)
        journal_state = read_journal(self.path)
        if journal_state is not None:
            for plan in self._plans:
                with contextlib.suppress(FastvggError):
                    assert (
                        inspect_target(plan, make_destination(plan), journal_state).name
                        == "resumable"
                    )
                with contextlib.suppress(FastvggError):
                    with_committed(plan, journal_state.chunk_images, len(journal_state.commits))
        return journal_state

    def check(self, content, found, error):
        assert self._file.get() == content
        length = valid_prefix_bytes(content)
        if any(intact.startswith(content[:length]) for intact in self.valid_inputs):
            assert error is None
        if error is None:
            assert length == (0 if found is None else found.valid_bytes)
        if found is not None or len(content) % 8 == 0:
            check_info(self.dataset, expected=found is not None)
        if found is None:
            return
        images = check_job(found.job)
        check_counts(found.chunk_images)
        chunks = -(-images // found.chunk_images)
        assert found.complete == (len(found.commits) == chunks)
        for chunk, commit in found.commits.items():
            assert type(chunk) is int
            assert 0 <= chunk < chunks
            assert {type(commit.checksum), type(commit.source_checksum)} == {str}
            chunk_image_count = (
                min(images, (chunk + 1) * found.chunk_images) - chunk * found.chunk_images
            )
            intact = found.commit(chunk)
            assert (intact.chunk, intact.checksum) == (chunk, commit.checksum)
            assert len(intact.records) in (0, chunk_image_count)
            assert commit.failed == intact.failed == len(found.failures(chunk))


RECORDS = [
    ImageRecord(f"a/{row}.png", "a", 9, 7, row == 3, "torn" * (row == 3)) for row in range(5)
]


def make_commit(chunk, records):
    return Commit(chunk, *[f"{chunk:016x}"] * 2, records)


def plans(place):
    """Plans of which nothing depends on where and when they were made but the target."""
    batch = pixels(5, height=1)  # so that true equals a valid size
    arrays, photos = save_npy(place / "a.npy", batch), save_images(place / "photos", batch)
    target = place / "y.npy"
    own = fastvgg.Mode("own", divide=2.0, mean=(1.5, 2.0, 3.0), std=(0.5, 0.25, 1.0), order="BGR")
    made = (
        plan_of(arrays, target, mode=own, dtype="float16", images_per_chunk=2),
        plan_of(photos, target, mode="torch", out_layout="NCHW", size=(1, 6), images_per_chunk=2),
        plan_of(photos, target, direction="pack", gray16="scale", exif=True, images_per_chunk=2),
    )
    jobs = [
        dataclasses.replace(
            plan.job, source=f"/data/{Path(plan.source).name}", fingerprint=FINGERPRINT
        )
        for plan in made
    ]
    return [
        dataclasses.replace(plan, job=job, chunk_images=2)
        for plan, job in zip(made, jobs, strict=True)
    ]


def check_counts(*numbers):
    for number in numbers:
        assert type(number) is int
        assert number >= 1


def check_job(typed):
    """Check the numbers of a job that was believed; return how many images it has."""
    job = typed.to_dict()
    for part in ("source", "result"):
        check_counts(*job[part]["shape"])
        assert len(job[part]["shape"]) == 4
    check_counts(*(job["source"].get("size") or ()))
    assert job["source"]["shape"][0] == job["result"]["shape"][0]
    source, transform = job["source"], fastvgg.Transform.from_dict(job["transform"])
    transform.check_input(source["shape"], source["dtype"])
    assert transform.layout == source["layout"]
    assert json.loads(json.dumps(transform.to_dict())) == job["transform"]
    assert source.get("interpolation", "nearest") in INTERPOLATIONS
    assert source.get("size") is None or len(source["size"]) == 2
    return job["result"]["shape"][0]


def consistent_changes(random, text):
    """Fields with a job that was changed in several places at once, so that they still fit."""
    fields = json.loads(text)
    source, transform, result = (fields["job"][part] for part in ("source", "transform", "result"))
    what = random.choice([0, 0, 0, 1, 2, 3, 4, 5])
    if what == 0:
        images = 2 ** random.choice([10, 20, 30, 34, 36, 47, 49])
        source["shape"][0] = result["shape"][0] = images
        fields["chunk_images"] = random.choice([1, 2, images, 2 * images])
        if "file_bytes" in fields:
            fields["file_bytes"] = 128 + images * RedoLogFiles.IMAGE_BYTES
    elif what == 1:
        shapes = ([5, 9, 3], [5, 1, 9, 4], [5, 3, 1, 9], [5, 1, 9, 3, 1], [5] * 4)
        source["shape"] = result["shape"] = random.choice(shapes)
    elif what == 2:
        layout = random.choice(["NHWC", "NCHW", "NCWH"])
        transform["layout"] = transform["out_layout"] = result["layout"] = layout
    elif what == 3:
        transform["dtype"], result["dtype"] = random.choice(
            [("<f4", "float32"), ("single", "float32"), ("f2", "float16"), (None, "uint8")]
        )
    elif what == 4:
        part = random.choice(["mean", "std"])
        transform["mode"][part] = random.choice(
            ["123", [1, 2, 3], [True] * 3, [1.0] * 4, [0.0] * 3]
        )
    else:
        source["size"] = random.choice([[1], [1, 6, 3], [True, 6], [0, 6], [], "ab"])
        source["interpolation"] = random.choice(["nearest", "NEAREST", ""])
        source["gray16"] = random.choice(["scale", "error", "clip"])
        source["max_pixels"] = random.choice([1, 0, -1, True, 2**70])
    return json.dumps(fields).encode()


class Manifests(Kind):
    """Manifests of finished datasets."""

    name, share = "manifests", 0.08
    error_type = SourceError

    def __init__(self, place, random):
        super().__init__(place, random)
        self.dataset = place / "y.npy"
        self.path = place / "y.npy.fastvgg.json"
        self.valid_inputs = [
            Manifest(
                job=plan.job,
                chunk_images=2,
                checksums=[f"{chunk:016x}" for chunk in range(plan.chunks)],
                source_checksums=[""] * plan.chunks,
                counts={"images": 5, "failed": failed},
                created="2026-01-01T00:00:00+00:00",
                packages={"python": "3.11.7", "fastvgg": "0.1.0"},
            ).to_json()
            for failed, plan in enumerate(plans(place))
        ]
        self._file = self.reused(self.path)

    def mutated(self):
        intact = self.random.choice(self.valid_inputs)
        what = self.random.random()
        change = consistent_changes if what < 0.05 else corrupt_json if what < 0.7 else damaged
        return change(self.random, intact)

    def read(self, content):
        self._file.put(content)
        return read_manifest(self.dataset)

    def check(self, content, found, error):
        assert self._file.get() == content
        if found is not None or len(content) % 8 == 0:
            check_info(self.dataset, expected=found is not None)
        if found is None:
            assert error is not None
            return
        assert json.loads(found.to_json()) == json.loads(content)
        images = check_job(found.job)
        check_counts(found.chunk_images, found.counts["images"], found.counts["failed"] + 1)
        assert found.counts["images"] == images >= found.counts["failed"]
        chunks = -(-images // found.chunk_images)
        assert len(found.checksums) == len(found.source_checksums) == chunks
        texts = [*found.checksums, *found.source_checksums, *found.packages.values()]
        assert {type(text) for text in texts} <= {str}
        assert found.header.shape == tuple(found.job.transform.output_shape(found.job.header.shape))


class FixedInodePath(PosixPath):
    """A path whose `stat` has a fixed inode and the true size."""

    def stat(self, **settings):
        return SimpleNamespace(st_dev=1, st_ino=2, st_size=super().stat(**settings).st_size)


class RedoLogFiles:
    """A partly converted .npy file and its redo log, after each chunk."""

    SHAPE = (15, 11, 11, 3)
    IMAGE_BYTES = 11 * 11 * 3 * 4
    TOGETHER = 2

    def __init__(self, place):
        self.path = FixedInodePath(place / "r.npy")
        self.storage = Storage(fsync=False)
        old = np.arange(math.prod(self.SHAPE), dtype=np.float32).reshape(self.SHAPE)
        save_npy(self.path, old)
        self.old = self.path.read_bytes()
        job = plan_of(self.path, None, in_place=True, mode="caffe").job
        self.job = dataclasses.replace(job, source="/data/r.npy", fingerprint=FINGERPRINT)
        self.data = self.storage.open(self.path)
        self._record()
        self.journal = ReusedFile(journal_path(self.path))

    def split(self, content):
        """A journal's header, and the rest of it."""
        return content[: self.header.header_bytes], content[self.header.header_bytes :]

    def _record(self):
        """Run the conversion, and record both files after each commit."""
        original_secrets = redo_log_layout.secrets
        redo_log_layout.secrets = SimpleNamespace(token_hex=lambda count: RUN)
        try:
            ring = RedoLog.begin(self.storage, self.data, self.job, self.TOGETHER)
        finally:
            redo_log_layout.secrets = original_secrets
        self.header = dataclasses.replace(read_redo_log_header(self.path), inode=2)
        first = self.header.to_bytes().ljust(self.header.header_bytes, b"\0")
        journal = journal_path(self.path)
        self.states = []
        for chunk in range(self.header.chunks + 1):
            content = first + self.split(journal.read_bytes())[1]
            if chunk in (0, 1, 3, 6, self.header.chunks):
                self.states.append((content, self.file_after(chunk), chunk))
            if chunk in (1, 2, 5):  # committed, and not in the file yet: no checkpoint counts it
                self.states.append((content, self.file_after(chunk - 1), chunk))
            if chunk < self.header.chunks:
                self._put(ring, chunk)
        ring.close()

    def file_after(self, chunks):
        """Return the content of the file after a number of converted chunks."""
        begin = self.header.data_offset
        end = self.header.image_span(chunks - 1)[1] if chunks else begin
        new = np.bitwise_not(np.frombuffer(self.old[begin:end], np.uint8)).tobytes()
        return self.old[:begin] + new + self.old[end:]

    def _put(self, ring, chunk):
        before, after = self.file_after(chunk), self.file_after(chunk + 1)
        begin, end = self.header.page_span(chunk)
        first, last = self.header.image_span(chunk)
        old = xxhash.xxh3_64_hexdigest(before[first:last])
        pages = memoryview(after[begin:end])
        ring.stage(chunk, pages)
        ring.commit(ring.make_record(chunk, pages, old=old), pages)

    def close(self):
        self.storage.close(self.data)
        self.journal.close()


class RedoLogKind(Kind):
    """A redo log, or a part of one, next to the file that it changes."""

    error_type = ResumeError

    def __init__(self, place, random):
        super().__init__(place, random)
        self._files = RedoLogFiles(place)
        self.path = self._files.path
        self.close = self._files.close


class RedoLogHeaders(RedoLogKind):
    """Header lines of redo logs, followed by a valid rest."""

    name, share = "ring headers", 0.05

    def __init__(self, place, random):
        super().__init__(place, random)
        self._line = self._files.header.to_bytes()
        first, self._rest = self._files.split(self._files.states[-1][0])
        self.valid_inputs = [first]

    def inputs(self):
        lines = truncations_and_bit_flips(self.random, [self._line])
        return interleave_inputs(self.random, map(self._pad, lines), self._input)

    def _pad(self, line):
        return line.ljust(self._files.header.header_bytes, b"\0")

    def mutated(self):
        random, text = self.random, self._line[17:-1]
        what = random.random()
        if what < 0.2:
            return self._pad(damaged(random, self._line))
        change = consistent_changes if what < 0.4 else corrupt_json if what < 0.9 else damaged
        return self._pad(line_with_checksum(change(random, text)))

    def read(self, content):
        self._files.journal.put(content + self._rest)
        header = read_redo_log_header(self.path)
        if header is not None:
            assert committed_chunks(header, self.path) <= header.chunks
            assert str(self.path) in header.command(self.path)
            with contextlib.suppress(FastvggError):
                header.job.check_same(self._files.job, str(self.path))
            with contextlib.suppress(FastvggError):
                check_same_file(header, self.path)
        return header

    def check(self, content, found, error):
        assert self._files.journal.get() == content + self._rest
        length = valid_prefix_bytes(content.partition(b"\n")[0] + b"\n")
        if length == 0:  # only a header of another kind is not an error
            assert error is not None or b"fastvgg-journal" in content[:40]
        if content[:length] == self._line:
            assert found == self._files.header
        if found is not None or len(content) % 8 == 0:
            check_info(self.path, expected=found is not None)
        if found is None:
            return
        assert found.to_bytes() == content[:length]
        images = check_job(found.job)
        check_counts(found.chunk_images, found.file_bytes, found.chunks)
        assert found.chunks == -(-images // found.chunk_images)
        assert 0 <= found.data_offset < found.file_bytes


class RedoLogs(RedoLogKind):
    """Complete redo logs, opened and recovered."""

    name, share = "rings", 0.05

    def __init__(self, place, random):
        super().__init__(place, random)
        header = self._files.header
        self._checkpoints = [header.checkpoint_offset(copy) for copy in range(2)]
        self._slots = [header.slot_offset(chunk) for chunk in range(redo_log_layout.SLOTS)]
        self._records = [
            header.record_offset(chunk) for chunk in range(header.chunks)
        ] + self._slots

    def inputs(self):
        """Whether a single bit is wrong, both files, and how many chunks were committed."""
        while True:
            content, data, committed = self.random.choice(self._files.states)
            what = self.random.random()
            if what < 0.5:
                content = self._flip_bit(content)
            elif what < 0.6:
                content = self._change_length(content)
            else:
                content = self._changed(content)
            yield what < 0.5, content, data, committed

    def _flip_bit(self, content):
        random = self.random
        if random.random() < 0.3:
            begin = random.choice(self._slots) + redo_log_layout.PAGE_BYTES
            length = self._files.header.slot_bytes
        else:
            begin, length = random.choice([0, *self._checkpoints, *self._records]), 200
        at = begin + random.randrange(length)
        return content[:at] + bytes([content[at] ^ 1 << random.randrange(8)]) + content[at + 1 :]

    def _change_length(self, content):
        if self.random.random() < 0.2:
            return content + self.random.choice(TOKENS)
        return content[: self.random.randrange(len(content))]

    def _changed(self, content):
        """Change the fields of a line; where there is none, write that of the first checkpoint."""
        random = self.random
        place = random.choice(self._checkpoints if random.random() < 0.4 else self._records)
        found = place if content[place] else self._checkpoints[0]
        text = content[found : found + redo_log_layout.RECORD_BYTES].partition(b"\n")[0][17:]
        change = corrupt_json if random.random() < 0.8 else damaged
        line = line_with_checksum(change(random, text))[: redo_log_layout.RECORD_BYTES]
        return content[:place] + line + content[place + len(line) :]

    def read(self, case):
        _, content, data, _ = case
        self._files.journal.put(content)
        os.pwrite(self._files.data.descriptor, data, 0)
        header = read_redo_log_header(self.path)
        if header is None:
            return None
        check_same_file(header, self.path)
        header.job.check_same(self._files.job, str(self.path))
        with contextlib.suppress(ResumeError):
            assert committed_chunks(header, self.path) <= header.chunks
        ring = RedoLog.reopen(self._files.storage, self._files.data, header)
        try:
            return ring.recover(), ring.finish()
        finally:
            ring.close()

    def check(self, case, found, error):
        single, content, data, committed = case
        after = self.path.read_bytes()
        assert len(after) == len(data)
        assert len(self._files.journal.get()) == len(content)
        if len(content) != self._files.header.journal_bytes:
            assert found is None
            assert error is not None or len(content) < 40  # too short to say what it is
            return
        assert (found is None) == (error is not None)
        if found is None:
            return
        done, checksums = found
        header = self._files.header
        assert type(done) is int
        assert 0 <= done <= header.chunks == len(checksums)
        if single:
            assert committed - 1 <= done <= committed
            assert after == self._files.file_after(done)
            spans = [slice(*header.image_span(chunk)) for chunk in range(done)]
            assert checksums[:done] == [xxhash.xxh3_64_hexdigest(after[span]) for span in spans]


KINDS = (
    NpyHeaders,
    NpyFiles,
    ZarrArrays,
    ChecksummedLines,
    Journals,
    Manifests,
    RedoLogHeaders,
    RedoLogs,
)


# The campaign


class WrongError(AssertionError):
    """An input that was not handled correctly."""


class Reader:
    """Reads inputs of one kind, one after another, and keeps count."""

    def __init__(self, kind):
        self._kind = kind
        self.inputs = 0
        self.accepted = 0
        self.slowest_ns = 0
        self.largest_bytes = 0

    def read(self, content):
        """Read an input; raise `WrongError` with the input if a check fails."""
        self.inputs += 1
        try:
            if self.inputs % SAMPLED:
                self._check(content, *self._read_timed(content))
            else:
                self._check(content, *self._read_traced(content))
        except Exception as error:
            which = f"{self._kind.name}, input {self.inputs}"
            raise WrongError(f"{which}: {error!r}: {content!r}"[:20_000]) from error

    def _try_read(self, content):
        try:
            return self._kind.read(content), None
        except self._kind.error_type as error:
            return None, error

    def _read_timed(self, content):
        begun = time.thread_time_ns()
        found, error = self._try_read(content)
        took_ns = time.thread_time_ns() - begun
        self.slowest_ns = max(self.slowest_ns, took_ns)
        assert took_ns < MAX_SECONDS * 1e9
        return found, error

    def _read_traced(self, content):
        tracemalloc.start()
        try:
            found, error = self._try_read(content)
            peak_bytes = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        self.largest_bytes = max(self.largest_bytes, peak_bytes)
        assert peak_bytes < MEMORY_BYTES
        return found, error

    def _check(self, content, found, error):
        assert error is None or content not in self._kind.valid_inputs
        self._kind.check(content, found, error)
        self.accepted += found is not None
        if error is not None:
            check_error(error, self._kind.path.name)
            message = str(error)
            assert len(message) < MAX_MESSAGE_CHARACTERS
            assert message.replace("\n", "").isprintable(), ascii(message)


def raise_warning(message, category, filename, lineno, file=None, line=None):
    raise AssertionError(f"warned: {category.__name__}: {message}")


def read_all(kind, share):
    """Read so many inputs of a kind."""
    reader = Reader(kind)
    with contextlib.closing(kind):
        names = names_in(kind.place)
        try:
            for number, content in enumerate(islice(kind.inputs(), share)):
                if number % 1000 == 0:
                    faulthandler.dump_traceback_later(HANG_SECONDS, exit=True, file=sys.__stderr__)
                reader.read(content)
        finally:  # or what calls this is ended after a reading that went wrong
            faulthandler.cancel_dump_traceback_later()
        assert names_in(kind.place) == names
    return reader


@contextlib.contextmanager
def limited_memory():
    """Limit the address space to `ADDRESS_SPACE_BYTES` more than is in use."""
    before, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(
        resource.RLIMIT_AS, (pages * resource.getpagesize() + ADDRESS_SPACE_BYTES, hard)
    )
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (before, hard))


def campaign(seed, size):
    """Read inputs of every kind, `size` in all; raise at the first that goes wrong."""
    counts = {"inputs": 0}
    readers = []
    with warnings.catch_warnings(), limited_memory():
        warnings.simplefilter("always")
        warnings.showwarning = raise_warning
        for kind in KINDS:
            with tempfile.TemporaryDirectory(dir=memory_directory()) as directory:
                random = Random(f"{seed} {kind.name}")  # noqa: S311  # not for secrets
                readers.append(read_all(kind(Path(directory), random), round(size * kind.share)))
            counts[kind.name] = readers[-1].inputs
            counts["inputs"] += readers[-1].inputs
    accepted = sum(reader.accepted for reader in readers)
    return {
        **counts,
        "accepted": accepted,
        "refused": counts["inputs"] - accepted,
        "slowest_us": max(reader.slowest_ns for reader in readers) // 1000,
        "largest_kib": max(reader.largest_bytes for reader in readers) // 1024,
        "wrong": 0,
    }


if __name__ == "__main__":
    main(campaign, __doc__, size=SIZE)
