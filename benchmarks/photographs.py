"""Photographs for the benchmarks: crops of those that scikit-image ships, in folders and shards."""

from __future__ import annotations

import contextlib
import functools
import io
import os
import shutil
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import skimage
from PIL import Image
from streams import Files

from fastvgg.parallel import available_cpus

if TYPE_CHECKING:
    from collections.abc import Callable

SEED = 0
SIZE = (224, 224)  # to which they are resized
PHOTOGRAPH = (375, 500)  # the height and width of most of ImageNet
LARGE = (1500, 2000)
TILES = 4  # a large photograph is as many small ones across, and down: it is as rich in detail
SMALL = (64, 64)
QUALITY = 90
ORIGINALS = (
    *("astronaut.png", "chelsea.png", "coffee.png", "hubble_deep_field.jpg"),
    *("motorcycle_left.png", "motorcycle_right.png", "rocket.jpg"),
)
CLASSES = 10
SHARDS = 4


class Photographs(NamedTuple):
    """JPEGs on the disk, one for each row."""

    source: Path
    """The source path for fastvgg."""
    reads: list[Callable[[], bytes]]
    shape: tuple[int, int]

    def fetch(self):
        """Load all files into the page cache; return their total size."""
        return sum(len(read()) for read in self.reads)


def originals():
    """Return the photographs that scikit-image ships, as arrays."""
    directory = Path(skimage.__file__).parent / "data"
    return [np.asarray(Image.open(directory / name).convert("RGB")) for name in ORIGINALS]


def cropped(found, index, shape):
    """Return a part of a photograph, drawn by its index, in another size."""
    drawn = np.random.default_rng((SEED, index))
    original = found[drawn.integers(len(found))]
    (height, width), (full_height, full_width) = shape, original.shape[:2]
    scale = min(full_height / height, full_width / width) * drawn.uniform(0.5, 1)
    rows, columns = int(height * scale), int(width * scale)
    top = drawn.integers(full_height - rows + 1)
    left = drawn.integers(full_width - columns + 1)
    part = original[top : top + rows, left : left + columns]
    if drawn.integers(2):
        part = part[:, ::-1]
    resized = Image.fromarray(part).resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(resized)


def tiled(found, index):
    """Return a large photograph: a sheet of smaller ones."""
    shape = LARGE[0] // TILES, LARGE[1] // TILES
    first = index * TILES**2
    parts = [cropped(found, first + part, shape) for part in range(TILES**2)]
    return np.vstack([np.hstack(parts[down::TILES]) for down in range(TILES)])


def encoded(pixels):
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "jpeg", quality=QUALITY)
    return data.getvalue()


def jpegs(count, shape):
    """Return an iterator over so many different JPEGs of a height and width."""
    found = originals()

    def one(index):
        return encoded(tiled(found, index) if shape == LARGE else cropped(found, index, shape))

    with ThreadPoolExecutor(available_cpus()) as pool:
        yield from pool.map(one, range(count))


def read_file(path, nbytes):
    """Read a file of known length in one call."""
    file = os.open(path, os.O_RDONLY)
    try:
        return os.read(file, nbytes)
    finally:
        os.close(file)


def folder(path, count, shape):
    """Write photographs into class folders; rows are in the order of the names."""
    reads = []
    for index, data in enumerate(jpegs(count, shape)):
        file = path / f"class_{index * CLASSES // count:02d}" / f"{index:07d}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
        reads.append(functools.partial(read_file, str(file), len(data)))
    return Photographs(path, reads, shape)


def write_shard(path, members):
    """Write a tar of keys and JPEGs, each with a class; return where the JPEGs begin."""
    offsets = []
    with path.open("wb") as file:
        for key, data in members:
            for ending, content in (("jpg", data), ("cls", b"%d" % (key % CLASSES))):
                entry = tarfile.TarInfo(f"{key:07d}.{ending}")
                entry.size = len(content)
                file.write(entry.tobuf(tarfile.USTAR_FORMAT))
                if ending == "jpg":
                    offsets.append(file.tell())
                file.write(content + bytes(-len(content) % tarfile.BLOCKSIZE))
        file.write(bytes(2 * tarfile.BLOCKSIZE))
        file.write(bytes(-file.tell() % tarfile.RECORDSIZE))
    return offsets


def shards_of(directory, count):
    """Return the source that is so many shards in a directory."""
    return directory / f"{{0000..{count - 1:04d}}}.tar"


@contextlib.contextmanager
def sharded(path, photographs):
    """Write the same photographs into shards, which stay open."""
    path.mkdir()
    files, reads = [], []
    count = len(photographs.reads)
    try:
        for shard in range(SHARDS):
            rows = range(count * shard // SHARDS, count * (shard + 1) // SHARDS)
            members = [(row, photographs.reads[row]()) for row in rows]
            name = path / f"{shard:04d}.tar"
            offsets = write_shard(name, members)
            files.append(os.open(name, os.O_RDONLY))
            reads += [
                functools.partial(os.pread, files[-1], len(data), offset)
                for (_, data), offset in zip(members, offsets, strict=True)
            ]
        yield Photographs(shards_of(path, SHARDS), reads, photographs.shape)
    finally:
        for file in files:
            os.close(file)


class ImageFolderTarget(Files):
    """The files of a measurement, some of which are directories."""

    def remove(self, name):
        """Remove a file or a directory, and its sidecars."""
        for path in self.directory.glob(f"{name}*"):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
