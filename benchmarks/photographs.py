"""Photographs for the benchmarks: crops of scikit-image's samples, in folders and shards."""

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
SIZE = (224, 224)  # of the result
PHOTOGRAPH = (375, 500)  # the most common height and width in ImageNet
LARGE = (1500, 2000)
TILES = 4  # per axis: a large photograph is a grid of small ones, which preserves their detail
SMALL = (64, 64)
QUALITY = 90
ORIGINALS = (
    *("astronaut.png", "chelsea.png", "coffee.png", "hubble_deep_field.jpg"),
    *("motorcycle_left.png", "motorcycle_right.png", "rocket.jpg"),
)
CLASSES = 10
SHARDS = 4


class Photographs(NamedTuple):
    """JPEGs on disk, one for each row."""

    source: Path
    """The source path for fastvgg."""
    readers: list[Callable[[], bytes]]
    shape: tuple[int, int]

    def fetch(self):
        """Load all files into the page cache; return their total size."""
        return sum(len(read()) for read in self.readers)


def originals():
    """Return the photographs that scikit-image ships, as arrays."""
    directory = Path(skimage.__file__).parent / "data"
    return [np.asarray(Image.open(directory / name).convert("RGB")) for name in ORIGINALS]


def random_crop(photographs, index, shape):
    """Return a random crop of a photograph, resized; `index` is the seed."""
    random = np.random.default_rng((SEED, index))
    original = photographs[random.integers(len(photographs))]
    (height, width), (full_height, full_width) = shape, original.shape[:2]
    scale = min(full_height / height, full_width / width) * random.uniform(0.5, 1)
    rows, columns = int(height * scale), int(width * scale)
    top = random.integers(full_height - rows + 1)
    left = random.integers(full_width - columns + 1)
    crop = original[top : top + rows, left : left + columns]
    if random.integers(2):
        crop = crop[:, ::-1]
    resized = Image.fromarray(crop).resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(resized)


def tile_crops(photographs, index):
    """Return a large photograph: a grid of smaller ones."""
    shape = LARGE[0] // TILES, LARGE[1] // TILES
    first = index * TILES**2
    tiles = [random_crop(photographs, first + tile, shape) for tile in range(TILES**2)]
    return np.vstack([np.hstack(tiles[row::TILES]) for row in range(TILES)])


def encode_jpeg(pixels):
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "jpeg", quality=QUALITY)
    return data.getvalue()


def jpegs(count, shape):
    """Yield `count` different JPEGs of a height and width."""
    photographs = originals()

    def create(index):
        if shape == LARGE:
            return encode_jpeg(tile_crops(photographs, index))
        return encode_jpeg(random_crop(photographs, index, shape))

    with ThreadPoolExecutor(available_cpus()) as pool:
        yield from pool.map(create, range(count))


def read_file(path, nbytes):
    """Read a file of known size in one call."""
    file = os.open(path, os.O_RDONLY)
    try:
        return os.read(file, nbytes)
    finally:
        os.close(file)


def write_folder(path, count, shape):
    """Write photographs into class folders; rows are sorted by name."""
    readers = []
    for index, data in enumerate(jpegs(count, shape)):
        file = path / f"class_{index * CLASSES // count:02d}" / f"{index:07d}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
        readers.append(functools.partial(read_file, str(file), len(data)))
    return Photographs(path, readers, shape)


def write_shard(path, members):
    """Write a tar of keys and JPEGs, each with a class; return the offsets of the JPEGs."""
    offsets = []
    with path.open("wb") as file:
        for key, data in members:
            for suffix, content in (("jpg", data), ("cls", b"%d" % (key % CLASSES))):
                entry = tarfile.TarInfo(f"{key:07d}.{suffix}")
                entry.size = len(content)
                file.write(entry.tobuf(tarfile.USTAR_FORMAT))
                if suffix == "jpg":
                    offsets.append(file.tell())
                file.write(content + bytes(-len(content) % tarfile.BLOCKSIZE))
        file.write(bytes(2 * tarfile.BLOCKSIZE))
        file.write(bytes(-file.tell() % tarfile.RECORDSIZE))
    return offsets


def shard_pattern(directory, count):
    """Return the source path of `count` shards in a directory."""
    return directory / f"{{0000..{count - 1:04d}}}.tar"


@contextlib.contextmanager
def write_shards(path, photographs):
    """Write the same photographs into shards, which stay open."""
    path.mkdir()
    files, readers = [], []
    count = len(photographs.readers)
    try:
        for shard in range(SHARDS):
            rows = range(count * shard // SHARDS, count * (shard + 1) // SHARDS)
            members = [(row, photographs.readers[row]()) for row in rows]
            name = path / f"{shard:04d}.tar"
            offsets = write_shard(name, members)
            files.append(os.open(name, os.O_RDONLY))
            readers += [
                functools.partial(os.pread, files[-1], len(data), offset)
                for (_, data), offset in zip(members, offsets, strict=True)
            ]
        yield Photographs(shard_pattern(path, SHARDS), readers, photographs.shape)
    finally:
        for file in files:
            os.close(file)


class FilesAndDirectories(Files):
    """The files of a measurement, including directories."""

    def remove(self, name):
        """Remove a file or a directory, and its sidecars."""
        for path in self.directory.glob(f"{name}*"):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
