"""A folder with every kind of unreadable file, packed from the command line and retried."""

from __future__ import annotations

import io
import json
import os
import socket
import subprocess
import sys
import warnings
import zlib

import keras
import numpy as np
import pytest
from PIL import Image

from fastvgg.datasets.index import read_index
from fastvgg.stream.manifest import manifest_path
from tests.helpers.datasets_on_disk import PHOTOGRAPHS, failing_in_ascii, names_in, plan_of

SIZE = (37, 53)
KINDS = {
    "jpg": {"format": "jpeg", "quality": 90},
    "progressive.jpg": {"format": "jpeg", "progressive": True},
    "png": {"format": "png"},
    "webp": {"format": "webp", "lossless": True},
    "gif": {"format": "gif"},
    "tif": {"format": "tiff", "compression": "tiff_deflate"},
    "bmp": {"format": "bmp"},
}


def encoded(kind, **options):
    with Image.open(PHOTOGRAPHS / "chelsea.png") as photograph:
        image = photograph.convert("RGB").resize((61, 47))
    written = io.BytesIO()
    image.save(written, **KINDS[kind], **options)
    return written.getvalue()


def bomb():
    """A PNG of a few bytes that claims a billion pixels."""
    png = bytearray(encoded("png"))
    png[16:24] = (40_001).to_bytes(4) + (30_001).to_bytes(4)
    png[29:33] = zlib.crc32(png[12:29]).to_bytes(4)
    return bytes(png)


def put(folder, name, content):
    """Create a file, or what a function creates, of a name in bytes."""
    path = os.fsencode(folder) + b"/" + name
    if content is socket:
        here = os.open(folder, os.O_RDONLY)  # the address of a socket must be short
        try:
            with socket.socket(socket.AF_UNIX) as listener:
                listener.bind(b"/proc/self/fd/%d/" % here + name)
        finally:
            os.close(here)
    elif isinstance(content, bytes):
        with open(path, "wb") as file:  # noqa: PTH123  # a name that is not text
            file.write(content)
    else:
        content(path)


@pytest.fixture
def bad(tmp_path):
    """A folder, and the repaired contents of its unreadable files by name."""
    folder = tmp_path / "photos"
    folder.mkdir()
    repaired = {}
    for kind in KINDS:
        whole = encoded(kind)
        put(folder, f"good.{kind}".encode(), whole)
        for tenth in range(10):
            name = f"{tenth}-tenths.{kind}".encode()
            put(folder, name, whole[: len(whole) * tenth // 10])
            repaired[name] = whole
    for name, content in {
        b"text.jpg": b"a text",
        b"bomb.png": bomb(),
        b"socket.jpg": socket,
        b"dangling.png": lambda path: os.symlink("nowhere.png", path),  # noqa: PTH211
        b"outside.png": lambda path: os.symlink("/etc/hostname", path),  # noqa: PTH211
        b"directory.gif": os.mkdir,
        b'caf\xe9 \n,".jpg': b"torn",
    }.items():
        put(folder, name, content)
        repaired[name] = encoded("png")
    put(folder, b"a png in truth.jpg", encoded("png"))
    put(folder, b"caf\xe8.png", encoded("png"))
    return folder, repaired


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "fastvgg", *map(os.fspath, arguments)],
        capture_output=True,
        timeout=120,
        check=False,
    )


def as_keras_reads(path):
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow only warns of some damage
            image = keras.utils.load_img(io.BytesIO(path.read_bytes()), target_size=SIZE)
    except Exception:  # noqa: BLE001  # whatever Pillow raises
        return None
    return np.asarray(image)


@failing_in_ascii()
def test_unreadable_files_are_in_the_index_and_are_retried_once_repaired(tmp_path, bad):
    folder, repaired = bad
    target = tmp_path / "x.npy"
    options = ["--size", *map(str, SIZE), "--threads", "2", "--json", "--quiet"]
    done = command("pack", folder, target, *options)
    assert done.returncode == 1, done.stderr
    stored, records = np.load(target), list(read_index(target, len(np.load(target))))
    assert [os.fsencode(r.path) for r in records] == sorted(
        os.listdir(os.fsencode(folder))  # noqa: PTH208
    )
    failed = {os.fsencode(record.path) for record in records if record.failed}
    assert json.loads(done.stdout)["counts"]["failed"] == len(failed) > 60
    assert {b"socket.jpg", b"dangling.png", b"outside.png", b"bomb.png", b"text.jpg"} < failed
    for image, record in zip(stored, records, strict=True):
        path = folder / record.path
        if record.failed:
            assert record.reason
            assert "\n" not in record.reason
            assert not image.any()
        else:
            expected = as_keras_reads(path)
            assert expected is not None, record
            assert image.tobytes() == expected.tobytes()
        if path.is_file() and not path.is_symlink():
            assert record.failed == (as_keras_reads(path) is None), record

    for name, content in repaired.items():
        path = os.fsencode(folder) + b"/" + name
        os.rmdir(path) if os.path.isdir(path) else os.unlink(path)  # noqa: PTH106, PTH108, PTH112
        put(folder, name, content)
    done = command("pack", folder, target, *options, "--retry-failed")
    assert done.returncode == 0, done.stderr
    fresh = tmp_path / "fresh" / "x.npy"
    fresh.parent.mkdir()
    plan_of(folder, fresh, direction="pack", size=SIZE).run()
    assert target.read_bytes() == fresh.read_bytes()
    assert (tmp_path / "x.npy.index.csv").read_bytes() == (
        fresh.parent / "x.npy.index.csv"
    ).read_bytes()
    assert names_in(tmp_path) == ["fresh", "photos", *names_in(fresh.parent)]
    assert json.loads(manifest_path(target).read_bytes())["counts"]["failed"] == 0
