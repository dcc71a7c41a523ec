"""Headers and files of .npy arrays, and files of Zarr arrays."""

from __future__ import annotations

import contextlib
import io
import math
import struct
import warnings
from pathlib import Path

import numcodecs
import numpy as np
from zarr.codecs import BloscCodec, Crc32cCodec, ZstdCodec

from fastvgg.datasets.npy import NpySource, read_header
from fastvgg.datasets.zarr import METADATA_KEYS, ZarrSource
from fastvgg.errors import SourceError
from tests.campaigns.fuzz_kinds.base import Kind, check_info
from tests.helpers.bad_arrays import MAX_HEADER_BYTES, header_text, npy_of
from tests.helpers.batches import dtype_of
from tests.helpers.damage import corrupt_json, damaged
from tests.helpers.datasets_on_disk import npy_bytes, pixels
from tests.helpers.zarr_on_disk import chunk_files, load_zarr, metadata_of, save_zarr


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
        *("'<u1'", "'>u1'", "'=u1'", "'f'", "'half'", "'uint8'", "'|f4'", "'a3'", "'>V2'", "'|V2'"),
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

    def __init__(self, directory, random):
        super().__init__(directory, random)
        texts = [header_text(f"'{descr}'") for descr in ("<f4", "|u1", "<f2", "<f8", "<V2")]
        self.valid_inputs = [npy_of(text, data=b"") for text in texts]
        self.valid_inputs += [npy_of(texts[0], version, b"") for version in ((2, 0), (3, 0))]
        self.valid_inputs += [npy_bytes(np.zeros((1, 2, 1, 3), np.float16))[:128]]

    def mutated(self):
        random = self.random
        roll = random.random()
        if roll < 0.2:
            return damaged(random, random.choice(self.valid_inputs))
        text = self._text()
        if roll < 0.35:
            text = damaged(random, text)
        version = random.choice(self.VERSIONS)
        if len(text) > 65_000:
            version = (2, 0)
        content = npy_of(text, version, b"")
        if roll > 0.9:  # a length other than that of the text
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

    def check(self, content, result, error):
        if result is None:
            return
        stream = io.BytesIO(content)
        shape, fortran, dtype = read_header_with_numpy(stream)
        assert (result.shape, False) == (shape, fortran)
        assert all(type(axis) is int and axis >= 0 for axis in result.shape)
        assert np.dtype("V2" if result.dtype == "bfloat16" else result.dtype) == dtype
        assert result.offset == stream.tell()


def read_header_with_numpy(stream):
    """Return shape, Fortran order and dtype as NumPy reads them, or raise as NumPy does."""
    version = np.lib.format.read_magic(stream)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about integers of Python 2
        if version == (1, 0):
            return np.lib.format.read_array_header_1_0(stream, max_header_size=MAX_HEADER_BYTES)
        if version == (2, 0):
            return np.lib.format.read_array_header_2_0(stream, max_header_size=MAX_HEADER_BYTES)
        # NumPy has no public reader of version 3.0; its two public readers share this one.
        read = np.lib.format.read_array_header_1_0.__globals__["_read_array_header"]
        return read(stream, version, max_header_size=MAX_HEADER_BYTES)


class NpyFiles(Kind):
    """Whole .npy files, opened as sources and read."""

    name, share = "npy files", 0.07
    error_type = SourceError

    def __init__(self, directory, random):
        super().__init__(directory, random)
        self.path = directory / "x.npy"
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
        if random.random() < 0.3:  # a shape, and as many bytes as it needs, or nearly
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

    def check(self, content, result, error):
        assert self._file.get() == content
        if len(content) % 8 == 0:
            check_info(self.path, expected=error is None and self._stored_as is None)
        if result is None:
            return
        header, batch = result
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about integers of Python 2
            expected = np.load(io.BytesIO(content), allow_pickle=False)
        assert header.shape == batch.shape == expected.shape
        if expected.dtype.kind == "V":
            expected = expected.view(dtype_of("bfloat16"))
        assert batch.dtype == expected.dtype == dtype_of(header.dtype)
        assert batch.tobytes() == expected.tobytes() == content[len(content) - batch.nbytes :]


class ZarrArrays(Kind):
    """Zarr arrays with one damaged file, opened as sources and read."""

    name, share = "zarr arrays", 0.02
    path = Path("x.zarr")

    CHECKED_ENCODINGS = ("shards", "zstd")  # two-bit errors can pass zlib's Adler-32 of short data
    MAX_BYTES = 2**16  # larger arrays are not read: metadata may claim more than exists

    def __init__(self, directory, random):
        super().__init__(directory, random)
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
            path = save_zarr(directory / name / self.path, batch, chunks=(1, 2, 2, 3), **stored)
            files = [metadata_of(path)] * 3 + chunk_files(path)
            self._files += [(name, path, file, file.read_bytes()) for file in files]

    def inputs(self):
        """Yield an array, one of its files, and the intact and damaged content of the file."""
        while True:
            name, path, file, intact = self.random.choice(self._files)
            content = self._changed(intact, is_text=file.name in METADATA_KEYS)
            yield name, path, file, intact, content

    def _changed(self, intact, *, is_text):
        random = self.random
        roll = random.random()
        if roll < 0.05:
            return intact
        if roll < 0.15:
            return intact[: random.choice([0, random.randrange(len(intact))])]
        if roll < 0.25:
            begin = random.randrange(len(intact))
            end = min(len(intact), begin + random.randint(1, 40))
            return intact[:begin] + bytes(end - begin) + intact[end:]
        return corrupt_json(random, intact) if is_text and roll < 0.8 else damaged(random, intact)

    def read(self, case):
        _, path, file, intact, content = case
        file.write_bytes(content)
        try:
            # If metadata say that a shard index has no checksum, zarr sums unchecked entries.
            with warnings.catch_warnings(), contextlib.closing(ZarrSource(path)) as source:
                warnings.filterwarnings("ignore", "overflow encountered", RuntimeWarning)
                if source.header.nbytes > self.MAX_BYTES:
                    return (None, None)
                batch = source.read(0, source.header.images).batch
                warnings.simplefilter("ignore")
                return batch, load_zarr(path)
        finally:
            file.write_bytes(intact)

    def check(self, case, result, error):
        name, _, file, intact, content = case
        if content == intact:
            assert result is not None
        if result is None or result[0] is None:
            return
        batch, expected = result
        assert batch.shape == expected.shape
        assert batch.dtype == expected.dtype.newbyteorder("=")
        assert np.array_equal(batch, expected, equal_nan=batch.dtype.kind == "f")
        if content == intact or (name in self.CHECKED_ENCODINGS and file.name not in METADATA_KEYS):
            assert np.array_equal(batch, self._batch)
