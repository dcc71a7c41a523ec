"""Folders and shards of JPEGs to arrays beside decoding alone, beside peers, and back to files.

    python benchmarks/images.py            # half an hour, 8 GB of disk; writes results/images.json
    python benchmarks/images.py --quick    # few photographs; writes nothing
    python benchmarks/images.py --million  # a million JPEGs, 35 GB of disk; images_million.json
    python benchmarks/images.py --planning # a folder of a million files; images_planning.json

    python benchmarks/images.py --peer-python tf=tf/bin/python --peer-python keras=tf/bin/python

The photographs are crops of those that scikit-image ships, flipped and resized, each another one,
as JPEG of quality 90 in class folders or tar shards. Their files are in memory before each call.

The limit of a result is the same files read and decoded by simplejpeg, into memory used before, on
the same threads; nothing is done with the pixels. Beside that as many bytes of one buffer are
written with the calls of a run, and its overlap: the space reserved, each chunk written past the
system's cache and synced on threads of their own, the name given at the end. An array of uint8 is
held against decoding alone as well. A shard's members are read at offsets that are known
beforehand. The limit of restored files is encoding alone, of images in memory, with the same
encoder on the same threads; beside that each thread writes the files of what it encodes, and the
disk is synced at the end. Nothing small that a run writes beside the data is in any limit.

Path and limit run in turn, in the opposite order each time, into files that are new each time; a
share is the median of (seconds of the limit / seconds of the path) over the rounds, and the spread
is the middle half of them; see streams.py for what is done against disturbance. Peers, in processes
of their own, are timed in the same way beside whole runs of fastvgg to a float32 file, although
they write nothing: see image_peers.py. One that its interpreter cannot import is not measured.

Rows of every result are compared with what Pillow decodes and resizes, as Keras does, and with the
oracle. A million images and their planning are measured in processes of their own, whose peak of
resident memory is that of the whole process.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import json
import mmap
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import simplejpeg
import skimage
from PIL import Image
from rows import row
from streams import READ_BYTES, Files, Part, chunk_of, fetch, in_turn, published, write

import fastvgg
from fastvgg import Transform, oracle
from fastvgg.bench.machine import machine
from fastvgg.bench.rounds import compared
from fastvgg.stream.behind import Behind
from fastvgg.threads import usable_cores

if TYPE_CHECKING:
    from collections.abc import Callable

RESULTS = Path(__file__).parent / "results"
PEER_PROGRAM = Path(__file__).with_name("image_peers.py")
SEED = 0
SIZE = (224, 224)
PHOTOGRAPH = (375, 500)  # the height and width of most of ImageNet
LARGE = (1500, 2000)
TILES = 4  # a large photograph is as many small ones across, and down: it is as rich in detail
SMALL = (64, 64)
QUALITY = 90
ORIGINALS = (
    *("astronaut.png", "chelsea.png", "coffee.png", "hubble_deep_field.jpg"),
    *("motorcycle_left.png", "motorcycle_right.png", "rocket.jpg"),
)
IMAGES, QUICK_IMAGES = 4000, 240
LARGE_IMAGES, QUICK_LARGE_IMAGES = 200, 16
CLASSES = 10
SHARDS = 4
TAKEN_TOGETHER = 8  # images that a thread takes at a time
WRITTEN_BEHIND = 2  # chunks
CHECKED_ROWS = 8

WANTED = 0.92
WANTED_OF_TWO_THREADS = 1.85
WANTED_OF_FAST_JPEG = 3.0
ENCODERS = {"png": ".png", "jpeg": ".jpg"}

# The name in image_peers.py and in the results, the mode that is asked for, how many times as fast.
PEERS = (
    ("torch", "PyTorch DataLoader", "torch", 3.5),
    ("webdataset", "WebDataset", "torch", None),
    ("tf", "tf.data", "caffe", 3.5),
    ("keras", "Keras image_dataset_from_directory", "caffe", 3.5),
    ("loop", "Pillow and Keras in a loop", "caffe", None),
    ("ffcv", "FFCV, its own file of JPEGs", "torch", 2.5),
)

MILLION, QUICK_MILLION = 1_000_000, 20_000
FEW, QUICK_FEW = 10_000, 2_000
DIFFERENT, QUICK_DIFFERENT = 20_000, 2_000
IN_A_SHARD, QUICK_IN_A_SHARD = 10_000, 2_000
WARMING_IMAGES = 16
FEW_ROUNDS = 3  # before the million, and as many after it
WANTED_PEAK_MIB = 512
WANTED_TIME = 1.05
WANTED_PLANNING_SECONDS = 10
WANTED_PLANNING_PEAK_MIB = 300
PLANNING_DIRECTORIES = (1, 100)
PLANNED = {"mode": "caffe", "dtype": "float16", "size": SMALL}

IN_A_PROCESS = """
import json
import sys
import time
from pathlib import Path
import fastvgg

*runs, options, is_run = json.loads(sys.argv[1])
options["size"] = tuple(options["size"])
for source, target in runs:
    begun = time.perf_counter()
    plan = fastvgg.plan(source, target, **options)
    planning_seconds = time.perf_counter() - begun
    if is_run:
        plan.run()
    seconds = time.perf_counter() - begun
status = Path("/proc/self/status").read_text()
figures = {
    "images": plan.header.images,
    "seconds": round(seconds, 3),
    "planning_seconds": round(planning_seconds, 3),
    "peak_mib": round(int(status.partition("VmHWM:")[2].split()[0]) / 1024, 1),
}
print(json.dumps(figures))
"""


# The photographs


class Photographs(NamedTuple):
    """JPEGs on the disk, one for each row."""

    source: Path
    """What fastvgg is given."""
    reads: list[Callable[[], bytes]]
    shape: tuple[int, int]

    def fetch(self):
        """Have all files in memory; return their bytes."""
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

    with ThreadPoolExecutor(usable_cores()) as pool:
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


class ImageFiles(Files):
    """The files of a measurement, some of which are directories."""

    def remove(self, name):
        """Remove a file or a directory, and all that lies beside it."""
        for path in self.directory.glob(f"{name}*"):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


# The limits


def on_threads(work, items, threads, together):
    """Work on all items on threads; yield whenever the next `together` of them are done.

    No thread waits for another, nor for what is done with what it yields.
    """

    def take(first, stop):
        for index in range(first, stop):
            work(items[index])

    count = len(items)
    with ThreadPoolExecutor(threads) as pool:
        chunks = [
            [
                pool.submit(take, first, min(first + TAKEN_TOGETHER, stop))
                for first in range(start, stop, TAKEN_TOGETHER)
            ]
            for start in range(0, count, together)
            for stop in [min(start + together, count)]
        ]
        for chunk in chunks:
            for taken in chunk:
                taken.result()
            yield


def decoded(photographs, threads, together):
    """Read and decode all photographs, into memory that each thread uses again."""
    memory = threading.local()
    nbytes = photographs.shape[0] * photographs.shape[1] * 3

    def decode(read):
        if not hasattr(memory, "pixels"):
            memory.pixels = bytearray(nbytes)
        simplejpeg.decode_jpeg(read(), "RGB", buffer=memory.pixels)

    return on_threads(decode, photographs.reads, threads, together)


def decode(photographs, threads):
    """Read and decode all photographs, and do nothing with them."""
    for _ in decoded(photographs, threads, len(photographs.reads)):
        pass


def decode_and_write(photographs, path, plan, buffer):
    """Read and decode all photographs while a new file of one buffer is written, as a run does."""
    nbytes = plan.write_bytes - plan.write_bytes % mmap.PAGESIZE
    chunks = decoded(photographs, plan.threads, plan.chunk_images)
    with published(path, nbytes) as file, Behind() as behind:
        for number, _ in enumerate(chunks):
            offset = number * len(buffer)
            data = buffer[: nbytes - offset]
            for _ in behind.wait_for_all_but(WRITTEN_BEHIND):
                pass
            behind.give(
                functools.partial(write, file, data, offset), functools.partial(os.fsync, file)
            )
        for _ in behind.wait_for_all_but(0):
            pass


def encode(pixels, image_format):
    """Return an image as the file that restoring writes of it."""
    if image_format == "jpeg":
        return simplejpeg.encode_jpeg(pixels, quality=95, colorsubsampling="444")
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "png")
    return data.getvalue()


def encode_all(images, image_format, threads):
    """Encode images, and let go of what they become."""
    for _ in on_threads(
        functools.partial(encode, image_format=image_format), images, threads, len(images)
    ):
        pass


def encode_and_write(images, image_format, threads, path):
    """Encode images on threads, of which each writes its files, and sync the disk at the end."""
    path.mkdir()
    ending = ENCODERS[image_format]

    def encode_into_file(row):
        data = encode(images[row], image_format)
        file = os.open(f"{path}/{row:08d}{ending}", os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
        try:
            write(file, data, 0)
        finally:
            os.close(file)

    for _ in on_threads(encode_into_file, range(len(images)), threads, len(images)):
        pass
    os.sync()


# Whether the results are right


def as_keras_loads(data, size):
    """Return a photograph as Keras' load_img does, decoded and resized by Pillow."""
    height, width = size
    with Image.open(io.BytesIO(data)) as image:
        resized = image.convert("RGB").resize((width, height), Image.Resampling.NEAREST)
    return np.asarray(resized)


def some_rows(count):
    return np.linspace(0, count - 1, CHECKED_ROWS).astype(int).tolist()


def check_rows(path, reads, size, transform=None):
    """Refuse an array of which a row has other bits than Keras' pixels, transformed by the oracle.

    There may be more rows than photographs, which then begin again.
    """
    result = np.load(path, mmap_mode="r")
    for index in some_rows(len(result)):
        pixels = as_keras_loads(reads[index % len(reads)](), size)
        expected = pixels if transform is None else oracle.apply(transform, pixels)
        if result[index].tobytes() != expected.tobytes():
            raise RuntimeError(f"{path}: row {index} is not what Keras' would be")


def mean_difference(path, reads):
    """Return by how many of 256 levels an array in caffe mode is off Keras' pixels, in the mean."""
    result = np.load(path, mmap_mode="r")
    distances = [
        np.abs(
            fastvgg.restore(result[index], "caffe").astype(int)
            - as_keras_loads(reads[index](), SIZE)
        ).mean()
        for index in some_rows(len(result))
    ]
    return round(float(np.mean(distances)), 2)


def check_files(path, images, image_format):
    """Refuse restored files of which one is not its image, encoded."""
    files = sorted(path.rglob(f"*{ENCODERS[image_format]}"))
    if len(files) != len(images):
        raise RuntimeError(f"{path} has {len(files)} files of {len(images)} images")
    for index in some_rows(len(images)):
        if files[index].read_bytes() != encode(images[index], image_format):
            raise RuntimeError(f"{files[index]} is not what its image is encoded as")


# The measurements


def rate(images, seconds):
    return round(images / seconds)


def per_second(images, seconds, **others):
    """Return images a second, ours and those of what it is compared with."""
    figures = {"images_per_second": rate(images, seconds)}
    for name, taken in others.items():
        figures[f"{name}_images_per_second"] = rate(images, statistics.median(taken))
    return figures


def times_row(path, wanted, times, spread, **figures):
    """Return a line of how many times as fast something is, printed as well."""
    line = {"path": path, "wanted": wanted, "times": times, "spread": spread, **figures}
    print(f"{path:44s} {times:6.2f} times as fast ({spread[0]}..{spread[1]})", figures, flush=True)
    return line


class Bench:
    """What all measurements of this run share."""

    def __init__(self, files, arguments):
        self.files = files
        self.arguments = arguments
        self.photographs = folder(files.path("photos"), arguments.images, PHOTOGRAPH)
        self.versions = {}
        self.missing = {}

    def planned(self, photographs, *, target="ours.npy", threads=None, **options):
        """Plan a run into a new file."""
        return fastvgg.plan(
            photographs.source,
            self.files.path(target),
            size=SIZE,
            threads=threads or self.arguments.threads,
            **options,
        )

    def in_turn(self, photographs, nbytes, transform, *calls, wait=lambda: None):
        """Time calls that write so many bytes of what is read of files in memory.

        What is to be waited for before each is not timed. Each result that has the name is checked,
        and all are removed before the next call.
        """

        def check_and_remove():
            result = self.files.path("ours.npy")
            if result.exists():
                check_rows(result, photographs.reads, SIZE, transform)
            for name in ("ours", "plain", "fast"):
                self.files.remove(name)

        def prepare():
            wait()
            check_and_remove()
            self.files.settle(nbytes * 3 // 2)
            photographs.fetch()

        seconds = in_turn([Part(prepare, call) for call in calls], self.arguments.rounds)
        check_and_remove()
        return seconds


def measured_arrays(bench, photographs, called):
    """Measure both kinds of array from a folder, or from shards."""
    images, threads = len(photographs.reads), bench.arguments.threads
    plain = bench.files.path("plain.npy")

    plan = bench.planned(photographs, mode="caffe")
    ours, limit = bench.in_turn(
        photographs,
        plan.write_bytes,
        Transform("caffe"),
        lambda: bench.planned(photographs, mode="caffe").run(),
        functools.partial(decode_and_write, photographs, plain, plan, chunk_of(plan)),
    )
    share, spread, seconds = compared(ours, limit)
    figures = per_second(images, seconds, limit=limit)
    yield row(f"{called} to float32", WANTED, share, spread, **figures)

    plan = bench.planned(photographs, direction="pack")
    ours, alone, written = bench.in_turn(
        photographs,
        plan.write_bytes,
        None,
        lambda: bench.planned(photographs, direction="pack").run(),
        lambda: decode(photographs, threads),
        functools.partial(decode_and_write, photographs, plain, plan, chunk_of(plan)),
    )
    for against, limit, wanted in (
        ("decoding", alone, WANTED),
        ("decoding, writing", written, None),
    ):
        share, spread, seconds = compared(ours, limit)
        figures = per_second(images, seconds, limit=limit)
        yield row(f"{called} to uint8, against {against}", wanted, share, spread, **figures)


def measured_folder(bench):
    yield from measured_arrays(bench, bench.photographs, "folder")


def measured_shards(bench):
    with sharded(bench.files.path("shards"), bench.photographs) as photographs:
        yield from measured_arrays(bench, photographs, "shards")
    bench.files.remove("shards")


def measured_restoring(bench):
    """Measure float32 back to files, beside encoding alone, and encoding and writing files."""
    images = len(bench.photographs.reads)
    source, target = bench.files.path("restorable.npy"), bench.files.path("ours")
    plain = bench.files.path("plain")
    threads, memory = bench.arguments.threads, bytearray(READ_BYTES)
    fastvgg.plan(bench.photographs.source, source, mode="caffe", size=SIZE).run()
    pixels = fastvgg.restore(np.load(source, mmap_mode="r"), "caffe")

    def check_and_remove(image_format):
        if target.exists():
            check_files(target, pixels, image_format)
        for name in ("ours", "plain"):
            bench.files.remove(name)

    def prepare(image_format):
        check_and_remove(image_format)
        bench.files.settle(pixels.nbytes)
        fetch(source, "in memory", memory)

    for image_format in ENCODERS:
        before = functools.partial(prepare, image_format)
        planned = functools.partial(
            fastvgg.plan, source, target, direction="restore", format=image_format, threads=threads
        )
        encoding = (pixels, image_format, threads)
        calls = (
            lambda planned=planned: planned().run(),
            functools.partial(encode_all, *encoding),
            functools.partial(encode_and_write, *encoding, plain),
        )
        ours, alone, written = in_turn(
            [Part(before, call) for call in calls], bench.arguments.rounds
        )
        check_and_remove(image_format)
        for against, limit, wanted in (
            ("encoding", alone, WANTED),
            ("encoding, writing", written, None),
        ):
            share, spread, seconds = compared(ours, limit)
            figures = per_second(images, seconds, limit=limit)
            name = f"float32 to {image_format.upper()} files, against {against}"
            yield row(name, wanted, share, spread, **figures)
    bench.files.remove("restorable")


def measured_threads(bench):
    """Measure what a second thread gains, and what it gains where there is nothing but decoding."""
    photographs = bench.photographs
    images = len(photographs.reads)
    two, one, two_decoding, one_decoding = bench.in_turn(
        photographs,
        bench.planned(photographs, mode="caffe").write_bytes,
        Transform("caffe"),
        lambda: bench.planned(photographs, mode="caffe", threads=2).run(),
        lambda: bench.planned(photographs, mode="caffe", threads=1).run(),
        lambda: decode(photographs, 2),
        lambda: decode(photographs, 1),
    )
    for name, wanted, ours, other in (
        ("folder to float32", WANTED_OF_TWO_THREADS, two, one),
        ("decoding alone", None, two_decoding, one_decoding),
    ):
        times, spread, seconds = compared(ours, other)
        figures = per_second(images, seconds, other=other)
        yield times_row(f"{name}, two threads against one", wanted, times, spread, **figures)


def measured_fast_jpeg(bench):
    """Measure decoding to no more pixels than are needed, beside all of them."""
    arguments = bench.arguments
    photographs = folder(bench.files.path("large"), arguments.large_images, LARGE)
    planned = functools.partial(bench.planned, photographs, mode="caffe")

    def fast_run():
        planned(target="fast.npy", fast_jpeg=True).run()

    fast, whole = bench.in_turn(
        photographs,
        planned().write_bytes,
        Transform("caffe"),
        fast_run,
        lambda: planned().run(),
    )
    times, spread, seconds = compared(fast, whole)
    figures = per_second(len(photographs.reads), seconds, other=whole)
    fast_run()
    figures["mean_difference"] = mean_difference(bench.files.path("fast.npy"), photographs.reads)
    name = f"fast_jpeg, {LARGE[1]}x{LARGE[0]} to {SIZE[1]}x{SIZE[0]}"
    yield times_row(name, WANTED_OF_FAST_JPEG, times, spread, **figures)
    bench.files.remove("large")


class PeerError(Exception):
    """A peer cannot be measured."""


class Peer:
    """A peer in a process of its own, which does an epoch when it is told to."""

    def __init__(self, name, python, photographs, scratch, threads):
        self.images = len(photographs.reads)
        self._busy = False
        self._log = (scratch / "log").open("w+", encoding="utf-8")
        self._process = subprocess.Popen(
            [python, PEER_PROGRAM, name, photographs.source, scratch, str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            bufsize=1,
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        with contextlib.suppress(BrokenPipeError):  # it has ended, and its answer will say so
            self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
        self._log.close()

    def begun(self):
        """Return the versions of what the peer consists of, when it can begin."""
        answer = self._answer()
        if "missing" in answer:
            raise PeerError(answer["missing"])
        return answer["versions"]

    def epoch(self):
        """Have the peer produce all of its batches."""
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write("\n")
        images = self._answer()["images"]
        self._busy = True
        if images != self.images:
            raise PeerError(f"it produced {images} images of {self.images}")

    def wait(self):
        """Wait until the peer has let go of what an epoch left."""
        if self._busy:
            self._answer()
        self._busy = False

    def _answer(self):
        line = self._process.stdout.readline()
        if line:
            return json.loads(line)
        self._log.seek(0)
        said = self._log.read().strip().splitlines()
        raise PeerError(said[-1] if said else "it ended without a word")


def measured_peer(bench, name, called, mode, wanted):
    """Measure one peer beside runs of fastvgg, or note why that cannot be."""
    photographs, arguments = bench.photographs, bench.arguments
    scratch = bench.files.path("scratch")
    scratch.mkdir()
    python = arguments.peer_pythons.get(name, sys.executable)
    try:
        with Peer(name, python, photographs, scratch, arguments.threads) as peer:
            versions = peer.begun()
            ours, theirs = bench.in_turn(
                photographs,
                bench.planned(photographs, mode=mode).write_bytes,
                Transform(mode),
                lambda: bench.planned(photographs, mode=mode).run(),
                peer.epoch,
                wait=peer.wait,
            )
    except PeerError as error:
        print(f"{called}: not measured: {error}", flush=True)
        bench.missing[called] = str(error)
        return
    finally:
        bench.files.remove("scratch")
    bench.versions |= versions
    times, spread, seconds = compared(ours, theirs)
    figures = per_second(arguments.images, seconds, other=theirs)
    yield times_row(f"{called}, {mode} mode", wanted, times, spread, **figures)


def measured_peers(bench):
    for peer in PEERS:
        yield from measured_peer(bench, *peer)


SHARES = {"folder": measured_folder, "shards": measured_shards, "restoring": measured_restoring}
TIMES = {"threads": measured_threads, "fast_jpeg": measured_fast_jpeg, "peers": measured_peers}


def measured(directory, arguments):
    """Measure all that is compared in turn, and return the record of it."""
    bench = Bench(ImageFiles(directory, arguments.threads), arguments)
    nbytes = bench.photographs.fetch()
    lines = {
        kind: [
            line
            for name, measurement in measurements.items()
            if name in arguments.only
            for line in measurement(bench)
        ]
        for kind, measurements in (("rows", SHARES), ("times", TIMES))
    }
    missed = [
        line["path"]
        for kind, figure in (("rows", "share"), ("times", "times"))
        for line in lines[kind]
        if line["wanted"] and line[figure] < line["wanted"]
    ]
    print("below what is wanted:", ", ".join(missed) or "none")
    return {
        "threads": arguments.threads,
        "rounds": arguments.rounds,
        "images": arguments.images,
        "kilobytes_of_a_file": round(nbytes / arguments.images / 1e3, 1),
        "large_images": arguments.large_images,
        "peers": bench.versions,
        "not_measured": bench.missing,
        **lines,
    }


# A million


def in_a_process(*runs, options, is_run):
    """Plan, and perhaps run, in a new process; return what the last of it took."""
    arguments = json.dumps((*runs, options, is_run), default=str)
    command = [sys.executable, "-c", IN_A_PROCESS, arguments]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    if ran.returncode:
        raise RuntimeError(f"{runs}: {ran.stderr}")
    return json.loads(ran.stdout)


def million_shards(directory, count, different, in_a_shard):
    """Write shards of so many JPEGs, of which some are different; return those."""
    found = list(jpegs(different, SMALL))
    directory.mkdir()
    write_shard(directory / "warming.tar", enumerate(found[:WARMING_IMAGES]))
    for shard in range(count // in_a_shard):
        rows = range(shard * in_a_shard, (shard + 1) * in_a_shard)
        members = ((row, found[row % different]) for row in rows)
        write_shard(directory / f"{shard:04d}.tar", members)
    return found


def million(directory, arguments):
    """Measure a million images, end to end, beside ten thousand of them."""
    quick = arguments.quick
    count, few = (QUICK_MILLION, QUICK_FEW) if quick else (MILLION, FEW)
    different = QUICK_DIFFERENT if quick else DIFFERENT
    in_a_shard = QUICK_IN_A_SHARD if quick else IN_A_SHARD
    files, shards = ImageFiles(directory, arguments.threads), directory / "shards"
    found = million_shards(shards, count, different, in_a_shard)
    reads = [functools.partial(bytes, data) for data in found]

    def ran(shard_count, name, options):
        for left in ("ours", "warmed"):
            files.remove(left)
        os.sync()
        return in_a_process(
            (shards / "warming.tar", directory / "warmed.npy"),
            (shards_of(shards, shard_count), directory / name),
            options={**options, "size": SMALL, "threads": arguments.threads},
            is_run=True,
        )

    rows = []
    for called, options, transform in (
        ("uint8", {"direction": "pack"}, None),
        ("float16", {"mode": "caffe", "dtype": "float16"}, Transform("caffe", dtype="float16")),
    ):
        short = [ran(few // in_a_shard, "ours.npy", options) for _ in range(FEW_ROUNDS)]
        long = ran(count // in_a_shard, "ours.npy", options)
        check_rows(directory / "ours.npy", reads, SMALL, transform)
        short += [ran(few // in_a_shard, "ours.npy", options) for _ in range(FEW_ROUNDS)]
        rows.append(million_row(called, long, short))
    return {
        "threads": arguments.threads,
        "images": count,
        "different": different,
        "kilobytes_of_a_file": round(sum(map(len, found)) / different / 1e3, 2),
        "rows": rows,
    }


def million_row(called, long, short):
    """Return a line of what many images take, beside few, printed as well."""
    each = statistics.median(one["seconds"] / one["images"] for one in short)
    line = {
        "path": f"shards of {SMALL[1]}x{SMALL[0]} JPEGs to {called}",
        "wanted_peak_mib": WANTED_PEAK_MIB,
        "wanted_time": WANTED_TIME,
        **long,
        "images_per_second": rate(long["images"], long["seconds"]),
        "few_images": short[0]["images"],
        "few_images_per_second": rate(1, each),
        "few_peak_mib": max(one["peak_mib"] for one in short),
        "time_of_an_image": round(long["seconds"] / long["images"] / each, 3),
    }
    print(line, flush=True)
    missed = line["peak_mib"] > WANTED_PEAK_MIB or line["time_of_an_image"] > WANTED_TIME
    print(f"{line['path']}: {'not ' if missed else ''}as is wanted")
    return line


def many_files(directory, count, directories):
    """Make a folder of files that have a length and nothing in them, but for one JPEG.

    The JPEG is the longest, which is the one that planning looks into.
    """
    (data,) = jpegs(1, SMALL)
    for below in range(directories):
        (directory / f"class_{below:02d}").mkdir(parents=True)
    for index in range(count):
        path = directory / f"class_{index % directories:02d}" / f"{index:07d}.jpg"
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        if index:
            os.ftruncate(file, 1 + index % (len(data) - 1))
        else:
            os.write(file, data)
        os.close(file)


def planning(directory, arguments):
    """Measure planning alone, in folders of a million files whose inodes are in memory."""
    count = QUICK_MILLION if arguments.quick else MILLION
    rows = []
    for directories in PLANNING_DIRECTORIES:
        source = directory / f"photos_{directories}"
        many_files(source, count, directories)
        os.sync()
        taken = [
            in_a_process((source, directory / "ours.npy"), options=PLANNED, is_run=False)
            for _ in range(arguments.rounds + 1)
        ][1:]
        shutil.rmtree(source)
        seconds = sorted(one["planning_seconds"] for one in taken)
        line = {
            "path": f"folder, directories: {directories}",
            "files": count,
            "wanted_seconds": WANTED_PLANNING_SECONDS,
            "wanted_peak_mib": WANTED_PLANNING_PEAK_MIB,
            "seconds": round(statistics.median(seconds), 2),
            "least_and_most_seconds": (round(seconds[0], 2), round(seconds[-1], 2)),
            "peak_mib": max(one["peak_mib"] for one in taken),
        }
        print(line, flush=True)
        missed = (
            line["seconds"] > WANTED_PLANNING_SECONDS or line["peak_mib"] > WANTED_PLANNING_PEAK_MIB
        )
        print(f"{line['path']}: {'not ' if missed else ''}as is wanted")
        rows.append(line)
    return {"threads": usable_cores(), "rounds": arguments.rounds, "rows": rows}


def options():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--million", action="store_true")
    parser.add_argument("--planning", action="store_true")
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int)
    parser.add_argument("--directory", type=Path, default=Path(), help="on the disk to measure")
    parser.add_argument(
        "--only", nargs="+", choices=[*SHARES, *TIMES], help="a part of it; writes nothing"
    )
    parser.add_argument(
        "--peer-python",
        action="append",
        default=[],
        metavar="PEER=PYTHON",
        help=f"an interpreter for one of {', '.join(peer[0] for peer in PEERS)}",
    )
    given = parser.parse_args()
    given.writes = not (given.quick or given.only)
    given.only = given.only or [*SHARES, *TIMES]
    given.images = given.images or (QUICK_IMAGES if given.quick else IMAGES)
    given.large_images = QUICK_LARGE_IMAGES if given.quick else LARGE_IMAGES
    given.peer_pythons = dict(one.partition("=")[::2] for one in given.peer_python)
    for name, python in given.peer_pythons.items():
        if name not in [peer[0] for peer in PEERS] or shutil.which(python) is None:
            parser.error(f"--peer-python is {name}={python}: no such peer, or no such program")
    return given


def main():
    given = options()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # files are removed
    measurement, name = measured, "images"
    if given.million:
        measurement, name = million, "images_million"
    elif given.planning:
        measurement, name = planning, "images_planning"
    with tempfile.TemporaryDirectory(prefix="images-", dir=given.directory) as directory:
        begun = time.perf_counter()
        record = measurement(Path(directory).absolute(), given)
        print(f"{time.perf_counter() - begun:.0f} s")
    if given.writes:
        RESULTS.mkdir(exist_ok=True)
        text = json.dumps({"machine": machine()} | record, indent=1) + "\n"
        (RESULTS / f"{name}.json").write_text(text)


if __name__ == "__main__":
    main()
