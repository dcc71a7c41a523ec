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
from tests.helpers.datasets_on_disk import PHOTOGRAPHS, ascii_failures, names_in, plan_of

SIZE = (37, 53)
SAVE_OPTIONS = {
    "jpg": {"format": "jpeg", "quality": 90},
    "progressive.jpg": {"format": "jpeg", "progressive": True},
    "png": {"format": "png"},
    "webp": {"format": "webp", "lossless": True},
    "gif": {"format": "gif"},
    "tif": {"format": "tiff", "compression": "tiff_deflate"},
    "bmp": {"format": "bmp"},
}


def encode(kind, **options):
    with Image.open(PHOTOGRAPHS / "chelsea.png") as photograph:
        image = photograph.convert("RGB").resize((61, 47))
    written = io.BytesIO()
    image.save(written, **SAVE_OPTIONS[kind], **options)
    return written.getvalue()


def bomb():
    """A PNG of a few bytes that claims a billion pixels."""
    png = bytearray(encode("png"))
    png[16:24] = (40_001).to_bytes(4) + (30_001).to_bytes(4)
    png[29:33] = zlib.crc32(png[12:29]).to_bytes(4)
    return bytes(png)


def create_entry(folder, name, content):
    """Create an entry with a name in bytes: a file, a socket, or what a function creates."""
    path = os.fsencode(folder) + b"/" + name
    if content is socket:
        here = os.open(folder, os.O_RDONLY)  # the address of a socket must be short
        try:
            with socket.socket(socket.AF_UNIX) as listener:
                listener.bind(b"/proc/self/fd/%d/" % here + name)
        finally:
            os.close(here)
    elif isinstance(content, bytes):
        with open(path, "wb") as file:  # noqa: PTH123  # the name is not text
            file.write(content)
    else:
        content(path)


@pytest.fixture
def bad_folder(tmp_path):
    """Return a folder and, by name, the repaired contents of its unreadable files."""
    folder = tmp_path / "photos"
    folder.mkdir()
    repaired = {}
    for kind in SAVE_OPTIONS:
        intact = encode(kind)
        create_entry(folder, f"good.{kind}".encode(), intact)
        for tenth in range(10):
            name = f"{tenth}-tenths.{kind}".encode()
            create_entry(folder, name, intact[: len(intact) * tenth // 10])
            repaired[name] = intact
    for name, content in {
        b"text.jpg": b"a text",
        b"bomb.png": bomb(),
        b"socket.jpg": socket,
        b"dangling.png": lambda path: os.symlink("nowhere.png", path),  # noqa: PTH211
        b"outside.png": lambda path: os.symlink("/etc/hostname", path),  # noqa: PTH211
        b'caf\xe9 \n,".jpg': b"torn",
    }.items():
        create_entry(folder, name, content)
        repaired[name] = encode("png")
    create_entry(folder, b"png with jpg suffix.jpg", encode("png"))
    create_entry(folder, b"caf\xe8.png", encode("png"))
    return folder, repaired


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "fastvgg", *map(os.fspath, arguments)],
        capture_output=True,
        timeout=120,
        check=False,
    )


def load_with_keras(path):
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow only warns of some damage
            image = keras.utils.load_img(io.BytesIO(path.read_bytes()), target_size=SIZE)
    except Exception:  # noqa: BLE001  # whatever Pillow raises
        return None
    return np.asarray(image)


@ascii_failures()
def test_unreadable_files_are_indexed_and_retried_after_repair(tmp_path, bad_folder):
    folder, repaired = bad_folder
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
            expected = load_with_keras(path)
            assert expected is not None, record
            assert image.tobytes() == expected.tobytes()
        if path.is_file() and not path.is_symlink():
            assert record.failed == (load_with_keras(path) is None), record

    for name, content in repaired.items():
        path = os.fsencode(folder) + b"/" + name
        os.rmdir(path) if os.path.isdir(path) else os.unlink(path)  # noqa: PTH106, PTH108, PTH112
        create_entry(folder, name, content)
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
