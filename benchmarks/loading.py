"""Compare training batches with the kernel only, and with PyTorch's DataLoader.

    python benchmarks/loading.py            # takes minutes, 2 GB of disk; writes a result
    python benchmarks/loading.py --quick    # a few batches; writes nothing

Stored uint8 images of 224x224, in the page cache, become float32 NCHW in torch mode, in batches
that are discarded. A call is one epoch; the first is not counted. The limit is the kernel only: the
same batches of an array in memory, into the same number of reused buffers, on the same threads.

The DataLoader has two workers that do the same arithmetic on a memory map of the file. It is
measured as its documentation shows it, image by image, and with a dataset that yields whole
batches, and omitted if PyTorch cannot be imported. The results of the loaders are not compared.

Rows of a batch are compared with the oracle. See streams.py for the interleaving of the parts.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import signal
import statistics
import sys
import tempfile
from pathlib import Path

import numpy as np
from rows import number_of_rounds, print_row
from streams import READ_BYTES, Files, TimedCall, fetch, time_interleaved

import fastvgg
from fastvgg import Transform, engine, oracle
from fastvgg.bench.kernels import HEIGHT, WIDTH
from fastvgg.bench.timing import compare, machine
from fastvgg.parallel import available_cpus

RESULT = Path(__file__).parent / "results" / "loading.json"
IMAGES, QUICK_IMAGES = 8192, 1024
BATCH = 256
RING_BUFFERS = 3
RING_BYTES = RING_BUFFERS * BATCH * HEIGHT * WIDTH * 3 * np.dtype(np.float32).itemsize
WORKERS = 2
TRANSFORM = Transform("torch", out_layout="NCHW")
MEAN, STD = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])
MIN_SHARE = 0.9
MIN_LOADER_SPEEDUP = 4.0


def fastvgg_batches(path, threads, *, shuffle=False):
    """Return batches; one object, because their memory is reused across epochs."""
    return fastvgg.batches(path, BATCH, transform=TRANSFORM, shuffle=shuffle, threads=threads)


def drain(batches):
    """Consume all batches of an epoch."""
    for _ in batches:
        pass


def run_kernel_only(x, ring, threads):
    """Transform an array in memory, batch by batch, into reused buffers."""
    outs = itertools.cycle(ring)
    for start in range(0, len(x), BATCH):
        engine.apply(TRANSFORM, x[start : start + BATCH], next(outs), threads=threads)


def check(path):
    """Raise if a checked row of a batch differs from the oracle."""
    x = np.load(path, mmap_mode="r")
    for shuffle in (False, True):
        for images, _, rows in fastvgg.batches(path, BATCH, transform=TRANSFORM, shuffle=shuffle):
            for index in (0, len(rows) // 2, len(rows) - 1):
                expected = oracle.apply(TRANSFORM, x[rows[index]])
                if images[index].tobytes() != expected.tobytes():
                    raise RuntimeError(f"row {rows[index]} differs from the oracle")


def data_loaders(path, workers):
    """Return PyTorch's loaders of the same batches, by kind of dataset."""
    import torch
    from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

    mean, std = (torch.from_numpy(each)[:, None, None] for each in (MEAN, STD))

    def arithmetic(x):
        return x.to(torch.float32).div_(255).sub_(mean).div_(std)

    class Images(Dataset):
        """One image at a time."""

        def __init__(self):
            self.x = np.load(path, mmap_mode="r")

        def __len__(self):
            return len(self.x)

        def __getitem__(self, index):
            return arithmetic(torch.from_numpy(np.array(self.x[index])).permute(2, 0, 1))

    class WholeBatches(IterableDataset):
        """One batch at a time, a different one in each worker."""

        def __iter__(self):
            torch.set_num_threads(1)
            x, worker = np.load(path, mmap_mode="r"), get_worker_info()
            for start in range(worker.id * BATCH, len(x), worker.num_workers * BATCH):
                images = torch.from_numpy(np.array(x[start : start + BATCH]))
                yield arithmetic(images.permute(0, 3, 1, 2)).contiguous()

    return {
        "image by image": DataLoader(Images(), batch_size=BATCH, num_workers=workers),
        "whole batches": DataLoader(WholeBatches(), batch_size=None, num_workers=workers),
    }


def measure_shares(files, arguments, path, x):
    """Measure batches in order, and shuffled, against the kernel only."""
    memory = bytearray(READ_BYTES)
    ring = [np.zeros((BATCH, 3, HEIGHT, WIDTH), np.float32) for _ in range(RING_BUFFERS)]
    threads = arguments.threads

    def prepare():
        files.settle(RING_BYTES)
        fetch(path, "in memory", memory)

    calls = (
        functools.partial(drain, fastvgg_batches(path, threads)),
        functools.partial(drain, fastvgg_batches(path, threads, shuffle=True)),
        functools.partial(run_kernel_only, x, ring, threads),
    )
    *ours, limit = time_interleaved([TimedCall(prepare, call) for call in calls], arguments.rounds)
    for name, seconds in zip(("in order", "shuffled"), ours, strict=True):
        share, spread, median_seconds = compare(seconds, limit)
        figures = {
            "images_per_second": round(len(x) / median_seconds),
            "limit_images_per_second": round(len(x) / statistics.median(limit)),
        }
        target_value = MIN_SHARE if name == "in order" else None
        yield print_row(
            f"batches of uint8 to float32 NCHW, {name}", target_value, share, spread, **figures
        )


def measure_loaders(files, arguments, path, images):
    """Measure batches against PyTorch's loaders."""
    memory = bytearray(READ_BYTES)

    def prepare():
        files.settle(RING_BYTES)
        fetch(path, "in memory", memory)

    loaders = data_loaders(path, WORKERS)
    calls = [functools.partial(drain, loader) for loader in loaders.values()]
    calls.append(functools.partial(drain, fastvgg_batches(path, arguments.threads)))
    *theirs, ours = time_interleaved([TimedCall(prepare, call) for call in calls], arguments.rounds)
    for name, seconds in zip(loaders, theirs, strict=True):
        times, spread, median_seconds = compare(ours, seconds)
        row = {
            "path": f"PyTorch DataLoader, {name}",
            "wanted": MIN_LOADER_SPEEDUP,
            "times": times,
            "spread": spread,
            "images_per_second": round(images / median_seconds),
            "other_images_per_second": round(images / statistics.median(seconds)),
        }
        print(f"{row['path']:44s} {times:6.2f} times as fast ({spread[0]}..{spread[1]})", row)
        yield row


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--threads", type=int, default=available_cpus())
    parser.add_argument("--rounds", type=number_of_rounds, default=7)
    parser.add_argument("--directory", type=Path, default=Path(), help="directory for the file")
    arguments = parser.parse_args()
    count = QUICK_IMAGES if arguments.quick else IMAGES
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # removes the files
    with tempfile.TemporaryDirectory(prefix="loading-", dir=arguments.directory) as directory:
        files = Files(Path(directory).absolute(), arguments.threads)
        path = files.array("images.npy", count, "uint8")
        x = np.load(path)
        check(path)
        rows = list(measure_shares(files, arguments, path, x))
        times, versions = [], {}
        try:
            import torch
        except ImportError as error:
            print(f"PyTorch is not measured: {error}")
        else:
            versions["torch"] = torch.__version__
            times = list(measure_loaders(files, arguments, path, count))
    if not arguments.quick:
        record = {"machine": machine(), "threads": arguments.threads, "rounds": arguments.rounds}
        record |= {"images": count, "batch": BATCH, "peers": versions}
        RESULT.write_text(json.dumps(record | {"rows": rows, "times": times}, indent=1) + "\n")


if __name__ == "__main__":
    main()
