"""Compare Zarr and HDF5 with the limits of their packages and of the disk; measure memory.

    python benchmarks/formats.py            # takes minutes, 12 GB of disk; writes a result
    python benchmarks/formats.py --quick    # 256 MiB, which fits in caches; writes nothing

The Zarr limit is zarr-python only: the same number of threads reads the same uint8 shards and
writes the same float32 shards from one buffer, without arithmetic. It is measured twice: with a
sync after each shard, as in a run, and without syncs, which guarantees less than a run. The limit
of HDF5 to .npy is also measured twice: reading the source and writing a new file of the result's
size as a run does, concurrently on two threads; and each separately, of which the longer counts, as
if the disk overlapped both perfectly.

See benchmarks/streams.py for the interleaving of path and limit and for the memory measurement.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import shutil
import signal
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import h5py
import numpy as np
import zarr
from arrays import batch
from rows import number_of_rounds, print_row
from streams import (
    FILE_BYTES,
    QUICK_BYTES,
    READ_BYTES,
    SMALL_IMAGES,
    Files,
    TimedCall,
    chunk_buffer,
    fetch,
    image_bytes,
    measure_peak,
    read_file,
    throughput,
    time_interleaved,
    write_new,
)

import fastvgg
from fastvgg.bench.kernels import HEIGHT, WIDTH
from fastvgg.bench.timing import compare, machine
from fastvgg.parallel import available_cpus

RESULT = Path(__file__).parent / "results" / "formats.json"
MIN_ZARR_SHARE, MIN_HDF5_SHARE = 0.90, 0.85
IMAGE = (HEIGHT, WIDTH, 3)
SHARD_IMAGES, INNER_CHUNK_IMAGES = 39, 13  # as in a run with these images


def remove(files, name):
    """Remove a dataset and its sidecars."""
    for path in files.directory.glob(f"{name}*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def create_sharded(path, images, dtype, shard, inner_chunk):
    """Create a sharded array as a run creates it."""
    return zarr.create_array(
        path,
        shape=(images, *IMAGE),
        chunks=(inner_chunk, *IMAGE),
        shards=(shard, *IMAGE),
        dtype=dtype,
        compressors=zarr.codecs.Crc32cCodec(),
        fill_value=0,
        chunk_key_encoding={"name": "default", "separator": "."},
        config={"write_empty_chunks": True},
    )


def shard_rows(array):
    """Return the start and stop row of each shard."""
    images, shard = array.shape[0], array.shards[0]
    return [(start, min(start + shard, images)) for start in range(0, images, shard)]


def copy_with_zarr_only(source_path, path, template, values, *, threads, syncs):
    """Read and write all shards with zarr-python only."""
    source = zarr.open_array(source_path, mode="r")
    target = create_sharded(
        path, source.shape[0], "float32", template.shards[0], template.chunks[0]
    )

    def copy_shard(rows):
        start, stop = rows
        source[start:stop]
        target[start:stop] = values[: stop - start]
        if syncs:
            key = target.metadata.encode_chunk_key((start // target.shards[0], 0, 0, 0))
            file = os.open(path / key, os.O_RDONLY)
            os.fsync(file)
            os.close(file)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(copy_shard, shard_rows(target)))


def create_zarr(files, images):
    """Create a Zarr array of uint8 images."""
    source = files.array("packed.npy", images, "uint8")
    path = files.path("source.zarr")
    pixels = np.load(source, mmap_mode="r")
    array = create_sharded(path, images, "uint8", SHARD_IMAGES, INNER_CHUNK_IMAGES)
    for start, stop in shard_rows(array):
        array[start:stop] = pixels[start:stop]
    files.remove("packed.npy")
    return path


def measure_zarr(files, arguments):
    """Measure uint8 Zarr in the page cache to float32 Zarr."""
    images, threads = arguments.bytes // image_bytes("float32"), arguments.threads
    source = create_zarr(files, images)
    make_plan = functools.partial(
        fastvgg.plan, source, files.path("ours.zarr"), mode="caffe", threads=threads
    )
    plan = make_plan()
    plan.run()
    template, memory = zarr.open_array(str(plan.target), mode="r"), bytearray(READ_BYTES)
    values = batch(plan.chunk_images, "NHWC", "float32")
    copy_chunks = functools.partial(
        copy_with_zarr_only, source, files.path("plain.zarr"), template, values, threads=threads
    )

    def prepare():
        for name in ("ours.zarr", "plain.zarr"):
            remove(files, name)
        files.settle(plan.write_bytes * 3 // 2)
        for path in source.iterdir():
            fetch(path, "in memory", memory)

    calls = (
        lambda: make_plan().run(),
        functools.partial(copy_chunks, syncs=True),
        functools.partial(copy_chunks, syncs=False),
    )
    ours, *limits = time_interleaved([TimedCall(prepare, call) for call in calls], arguments.rounds)
    for name, limit in zip(("which syncs as well", "which syncs nothing"), limits, strict=True):
        share, spread, seconds = compare(ours, limit)
        figures = throughput(plan.write_bytes, seconds, zarr=(plan.write_bytes, limit))
        path = f"Zarr uint8 to Zarr float32, zarr-python {name}"
        yield print_row(path, MIN_ZARR_SHARE, share, spread, **figures)
    for name in ("ours.zarr", "plain.zarr", "source.zarr"):
        remove(files, name)


def create_hdf5(files, name, images):
    """Create a contiguous dataset of float32 images."""
    shard = fastvgg.preprocess(batch(SMALL_IMAGES, "NHWC", "uint8"), "caffe")
    path = files.path(name)
    with h5py.File(path, "w") as file:
        dataset = file.create_dataset("images", (images, *IMAGE), "float32")
        for start in range(0, images, SMALL_IMAGES):
            dataset[start : start + SMALL_IMAGES] = shard[: images - start]
    return path


def run_concurrently(*calls):
    """Run calls concurrently, each on its own thread."""
    with ThreadPoolExecutor(len(calls)) as pool:
        for future in [pool.submit(call) for call in calls]:
            future.result()


def measure_hdf5(files, arguments):
    """Measure a contiguous float32 dataset to a new uint8 .npy."""
    images = arguments.bytes // image_bytes("float32")
    source = create_hdf5(files, "source.h5", images)
    settings = {"mode": "caffe", "direction": "restore", "threads": arguments.threads}
    make_plan = functools.partial(
        fastvgg.plan, f"{source}::/images", files.path("ours.npy"), **settings
    )
    plan = make_plan()
    nbytes, buffer, memory = plan.write_bytes, chunk_buffer(plan), bytearray(READ_BYTES)

    def prepare(cache_state):
        files.remove("ours.npy")
        files.remove("plain.npy")
        files.settle(source.stat().st_size)
        fetch(source, cache_state, memory)

    for cache_state in ("in memory", "on disk"):
        prepare_call = functools.partial(prepare, cache_state)
        write = functools.partial(write_new, files.path("plain.npy"), nbytes, buffer)
        read = functools.partial(read_file, source, memory)
        calls = (
            lambda: make_plan().run(),
            write,
            read,
            functools.partial(run_concurrently, write, read),
        )
        timed_calls = [TimedCall(prepare_call, call) for call in calls]
        ours, write_seconds, read_seconds, concurrent_seconds = time_interleaved(
            timed_calls, arguments.rounds
        )
        longer_seconds = [max(pair) for pair in zip(write_seconds, read_seconds, strict=True)]
        source_bytes = source.stat().st_size
        limits = {"writing": (nbytes, write_seconds), "reading": (source_bytes, read_seconds)}
        for name, limit in (
            ("reading and writing at once", concurrent_seconds),
            ("the longer of both", longer_seconds),
        ):
            share, spread, seconds = compare(ours, limit)
            figures = throughput(source_bytes, seconds, **limits)
            path = f"HDF5 float32 {cache_state} to .npy uint8, {name}"
            yield print_row(path, MIN_HDF5_SHARE, share, spread, **figures)
    for name in ("source.h5", "ours.npy", "plain.npy"):
        files.remove(name)


def measure_memory(files, arguments):
    """Measure the memory of runs with both formats."""
    images = arguments.bytes // image_bytes("float32")
    options = {"memory": "512MiB", "threads": arguments.threads}
    large, small = create_zarr(files, images), files.path("small.zarr")
    zarr.save_array(small, batch(SMALL_IMAGES, "NHWC", "uint8"))
    targets = [files.path("small_y.zarr"), files.path("large_y.zarr")]
    pairs = zip((small, large), targets, strict=True)
    yield measure_peak("Zarr uint8 to Zarr float32", *pairs, mode="caffe", **options)
    for name in ("small", "large", "source"):
        remove(files, name)
    sources = [create_hdf5(files, "small.h5", SMALL_IMAGES), create_hdf5(files, "large.h5", images)]
    names = [f"{path}::/images" for path in sources]
    pairs = zip(names, [files.path("small.npy"), files.path("large.npy")], strict=True)
    yield measure_peak(
        "HDF5 float32 to .npy uint8", *pairs, mode="caffe", direction="restore", **options
    )
    for name in ("small", "large"):
        remove(files, name)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--threads", type=int, default=available_cpus())
    parser.add_argument("--rounds", type=number_of_rounds, default=5)
    parser.add_argument(
        "--directory", type=Path, default=Path(), help="directory on the disk to measure"
    )
    arguments = parser.parse_args()
    arguments.bytes = QUICK_BYTES if arguments.quick else FILE_BYTES
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # removes the files
    with tempfile.TemporaryDirectory(prefix="formats-", dir=arguments.directory) as directory:
        files = Files(Path(directory).absolute(), arguments.threads)
        measurements = (measure_zarr, measure_hdf5)
        rows = [row for measure in measurements for row in measure(files, arguments)]
        memory = list(measure_memory(files, arguments))
    missed = [row["path"] for row in rows if row["share"] < row["wanted"]]
    print("below target:", ", ".join(missed) or "none")
    if not arguments.quick:
        record = {"machine": machine(), "threads": arguments.threads, "rounds": arguments.rounds}
        RESULT.write_text(json.dumps(record | {"rows": rows, "memory": memory}, indent=1) + "\n")


if __name__ == "__main__":
    main()
