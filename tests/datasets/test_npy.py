""".npy files: headers, damage, mapped windows, and samples for the fingerprint."""

from __future__ import annotations

import errno
import io
import os
from contextlib import closing

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastvgg.datasets import contiguous, npy
from fastvgg.datasets.base import Header, byte_view
from fastvgg.datasets.npy import NpySource, NpyTarget
from fastvgg.datasets.open import open_source
from fastvgg.errors import SourceError, StoppedError
from fastvgg.storage.local import Storage
from fastvgg.storage.location import Location
from fastvgg.transform import STORAGE_TYPES
from tests.helpers.bad_arrays import INVALID, MAX_HEADER_BYTES, SHAPE, VALID, header_text, npy_of
from tests.helpers.batches import dtype_of
from tests.helpers.datasets_on_disk import (
    check_error,
    load,
    names_in,
    npy_bytes,
    pixels,
    save_npy,
)


def values(name, shape=SHAPE):
    return pixels(*shape[:3]).astype(dtype_of(name)) if shape[3] == 3 else np.zeros(shape, name)


def load_with_numpy(content):
    """Return what numpy.load reads from a file in memory; None if it refuses."""
    try:
        return np.load(io.BytesIO(content), allow_pickle=False)
    except Exception:  # noqa: BLE001  # five exception types have been observed
        return None


@pytest.mark.parametrize("name", STORAGE_TYPES)
def test_target_matches_numpy_save(tmp_path, name):
    expected = values(name)
    target = NpyTarget(tmp_path / "y.npy", Header(SHAPE, name, "NHWC"), Storage())
    target.create()
    for start, stop in ((4, 5), (0, 2), (2, 4)):  # in any order
        target.write(start, [byte_view(expected[start:stop])])
        target.sync()
    assert not target.path.exists()
    target.publish()
    assert not target.partial.exists()
    assert target.path.read_bytes() == npy_bytes(expected)
    assert load(target.path, name).tobytes() == expected.tobytes()
    assert target.read_back(1, 4).tobytes() == expected[1:4].tobytes()


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
def test_every_format_version_is_read(tmp_path, version):
    expected = values("float32")
    path = tmp_path / "x.npy"
    with path.open("wb") as file:
        np.lib.format.write_array(file, expected, version)
    assert path.read_bytes()[6:8] == bytes(version)
    with closing(NpySource(path)) as source:
        assert source.read(0, 5).batch.tobytes() == expected.tobytes()


@pytest.mark.parametrize("wrong", INVALID)
def test_invalid_file_is_rejected_and_unchanged(tmp_path, wrong):
    content, words = INVALID[wrong]
    path = tmp_path / "x.npy"
    path.write_bytes(content)
    with pytest.raises(SourceError) as caught:
        open_source(Location.parse(path))
    check_error(caught.value, path, *words)
    assert path.read_bytes() == content
    assert names_in(tmp_path) == ["x.npy"]


def test_longest_allowed_header_is_read(tmp_path):
    text = header_text()
    path = tmp_path / "x.npy"
    path.write_bytes(npy_of(text + " " * (MAX_HEADER_BYTES - 1 - 64 - len(text))))
    with closing(NpySource(path)) as source:
        assert source.header.shape == SHAPE


def test_void_dtype_is_not_read_as_bfloat16_with_a_float16_hint(tmp_path):
    path = save_npy(tmp_path / "x.npy", values("bfloat16"))
    with pytest.raises(SourceError, match="two-byte elements"):
        NpySource(path, dtype_hint="float16")


def test_truncated_file_is_rejected_and_not_extended(tmp_path):
    path = tmp_path / "x.npy"
    path.write_bytes(VALID[:-100])
    with pytest.raises(SourceError):
        NpySource(path)
    assert path.read_bytes() == VALID[:-100]
    np.load(path, mmap_mode="r+")
    assert path.stat().st_size == len(VALID)


@st.composite
def damaged_files(draw):
    """A valid file after one to four edits, most of them in the header."""
    name = draw(st.sampled_from(["uint8", "float16", "float32"]))
    content = bytearray(npy_bytes(np.zeros((1, 1, 2, 3), name)))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(content) - 1) | st.integers(0, min(70, len(content) - 1)))
        edit = draw(st.sampled_from(["set", "flip", "insert", "delete", "swap", "cut"]))
        if edit == "set":
            content[at : at + 1] = draw(st.binary(min_size=1, max_size=1))
        elif edit == "flip":
            content[at] ^= 1 << draw(st.integers(0, 7))
        elif edit == "insert":
            tokens = [b"-", b"0", b"9" * 30, b"(", b"'", b"True", b"1e9", b"0x", b"\0", b"[", b","]
            content[at:at] = draw(st.sampled_from(tokens))
        elif edit == "delete":
            del content[at : at + draw(st.integers(1, 9))]
        elif edit == "swap":
            digits = [i for i, byte in enumerate(content[:70]) if chr(byte).isdigit()]
            if digits:
                content[draw(st.sampled_from(digits))] = draw(st.sampled_from(b"0123456789"))
        else:
            del content[at:]
        if not content:
            break
    return bytes(content)


@settings(max_examples=500)
@given(damaged_files())
def test_damaged_file_is_rejected_or_matches_numpy(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "damaged.npy"
    path.write_bytes(content)
    try:
        source = NpySource(path)
    except SourceError as error:
        check_error(error, path)
    else:
        expected = load_with_numpy(content)
        assert expected is not None
        assert source.header.shape == expected.shape
        assert source.header.dtype == expected.dtype.name
        assert source.read(0, source.header.images).batch.tobytes() == expected.tobytes()
        source.close()
    assert path.read_bytes() == content


def test_flipped_header_bit_never_changes_the_data(tmp_path):
    path = tmp_path / "x.npy"
    intact = npy_bytes(values("float32"))
    accepted = 0
    for bit in range(128 * 8):
        content = bytearray(intact)
        content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)
        try:
            source = NpySource(path)
        except SourceError:
            continue
        accepted += 1
        assert load_with_numpy(bytes(content)) is not None
        assert source.read(0, 5).batch.tobytes() == intact[128:]
        source.close()
    assert accepted < 20  # other white space


@pytest.mark.parametrize("kept", [0, 128, 128 + 30 * 37 * 41 * 3 * 4 - 5, -1])
def test_file_truncated_while_it_is_open_raises(tmp_path, kept):
    expected = values("float32", (66, 37, 41, 3))
    path = save_npy(tmp_path / "x.npy", expected)
    kept = kept % path.stat().st_size
    image = 37 * 41 * 3 * 4
    with closing(NpySource(path)) as source:
        source.read(0, 5)
        os.truncate(path, kept)
        for start in (0, 29, 64):
            begin, end = 128 + start * image, 128 + (start + 2) * image
            if end <= kept:
                rows = source.read(start, start + 2).batch
                assert rows.tobytes() == expected[start : start + 2].tobytes()
                continue
            with pytest.raises(StoppedError) as caught:
                source.read(start, start + 2)
            assert f"{path}: read at offset {max(begin, kept)} failed" in caught.value.problem
            assert "rerun the same command" in caught.value.remedy


def test_prefetch_advises_the_system_of_the_bytes_of_the_rows(tmp_path, monkeypatch):
    advised = []
    monkeypatch.setattr(os, "posix_fadvise", lambda file, *advice: advised.append(advice))
    path = save_npy(tmp_path / "x.npy", values("float32", (66, 37, 41, 3)))
    with closing(NpySource(path)) as source:
        source.prefetch(29, 58)
    image = 37 * 41 * 3 * 4
    assert advised == [(128 + 29 * image, 29 * image, os.POSIX_FADV_WILLNEED)]


@pytest.mark.parametrize("reason", ["no such call in Python", "no such call in the kernel"])
def test_source_works_without_fadvise(tmp_path, monkeypatch, reason):
    def unknown(*arguments):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    if reason == "no such call in Python":
        monkeypatch.delattr(os, "posix_fadvise")
    else:
        monkeypatch.setattr(os, "posix_fadvise", unknown)
    expected = values("uint8")
    with closing(NpySource(save_npy(tmp_path / "x.npy", expected))) as source:
        source.prefetch(1, 4)
        assert source.read(1, 4).batch.tobytes() == expected[1:4].tobytes()


def fingerprint(path):
    with closing(NpySource(path)) as source:
        return source.fingerprint()


def restore_mtime(path, status):
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_fingerprint_of_a_small_file_covers_every_byte(tmp_path):
    content = npy_bytes(values("uint8"))
    path = tmp_path / "x.npy"
    path.write_bytes(content)
    status = path.stat()
    seen = {fingerprint(path)}
    changed = range(128, len(content), 7)
    for at in changed:
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        restore_mtime(path, status)
        seen.add(fingerprint(path))
    assert len(seen) == len(changed) + 1


def test_fingerprint_of_a_large_file_samples_its_start_middle_and_end(tmp_path):
    path = save_npy(tmp_path / "x.npy", np.zeros((5, 1001, 1003, 3), np.uint8))
    status = path.stat()
    seen = {fingerprint(path)}
    last_sample = status.st_size - contiguous.SAMPLE_BYTES
    places = [128, last_sample * 7 // (contiguous.SAMPLE_COUNT - 1) + 11, status.st_size - 1]
    for at in places:
        with path.open("r+b") as file:
            file.seek(at)
            file.write(b"\1")
        restore_mtime(path, status)
        seen.add(fingerprint(path))
    assert len(seen) == 1 + len(places)


def test_target_must_be_created_before_writing(tmp_path):
    target = NpyTarget(tmp_path / "y.npy", Header(SHAPE, "uint8", "NHWC"), Storage())
    with pytest.raises(RuntimeError, match="created or reopened before"):
        target.write(0, [byte_view(values("uint8"))])
    target.close()
    assert names_in(tmp_path) == []


def test_bfloat16_descr_matches_numpy():
    assert (
        npy_bytes(np.zeros(SHAPE, ml_dtypes.bfloat16))[:40].count(
            ascii(npy.BFLOAT16_DESCR).encode()
        )
        == 1
    )


@pytest.mark.parametrize(
    "descr",
    [
        *("<u1", ">u1", "=u1", "|u1", "u1", "B", "uint8", "ubyte", "<f4", "=f4", "|f4", "f4", "f"),
        *("float32", "single", "<f2", "=f2", "e", "half", "<f8", "d", "double", "float"),
    ],
)
def test_every_spelling_that_numpy_reads_as_a_storage_dtype_is_read(tmp_path, descr):
    expected = pixels().astype(np.dtype(descr))
    path = tmp_path / "x.npy"
    path.write_bytes(npy_of(header_text(ascii(descr)), data=expected.tobytes()))
    assert np.array_equal(np.load(path), expected)
    with closing(NpySource(path)) as source:
        assert source.header.dtype == expected.dtype.name
        assert source.read(0, 5).batch.tobytes() == expected.tobytes()


@pytest.mark.parametrize("descr", ["<V2", "|V2", "V2", "=V2"])
def test_every_spelling_of_two_bytes_is_bfloat16_if_the_manifest_says_so(tmp_path, descr):
    expected = values("bfloat16")
    path = tmp_path / "x.npy"
    path.write_bytes(npy_of(header_text(ascii(descr)), data=expected.tobytes()))
    with closing(NpySource(path, dtype_hint="bfloat16")) as source:
        assert source.read(0, 5).batch.tobytes() == expected.tobytes()


@pytest.mark.parametrize("descr", [">f2", ">f4", ">f8"])
def test_remedy_for_big_endian_files_makes_them_readable(tmp_path, monkeypatch, descr):
    monkeypatch.chdir(tmp_path)
    np.save("x.npy", pixels().astype(np.dtype(descr)))
    with pytest.raises(SourceError) as caught:
        NpySource(tmp_path / "x.npy")
    check_error(caught.value, "big-endian", descr)
    command = caught.value.remedy.partition(": ")[2]
    exec(command, {"numpy": np, "old": "x.npy", "new": "y.npy"})  # noqa: S102
    with closing(NpySource(tmp_path / "y.npy")) as source:
        assert np.array_equal(source.read(0, 5).batch, pixels())


def test_header_that_python_2_wrote_is_read(tmp_path):
    text, data = header_text(shape="(5L, 7L, 9L, 3L)"), pixels(5).astype("<f4").tobytes()
    (tmp_path / "x.npy").write_bytes(npy_of(text, data=data))
    with pytest.warns(UserWarning, match="Python 2"):  # what NumPy says
        expected = np.load(tmp_path / "x.npy")
    with closing(NpySource(tmp_path / "x.npy")) as source:
        assert np.array_equal(source.read(0, 5).batch, expected)
