"""fastvgg beside its peers: the same arrays, the same threads, one process, as ratios in one run.

    python benchmarks/peers.py            # 7 minutes, 11 GiB of memory; writes peers.json
    python benchmarks/peers.py --quick    # a small batch, three rounds; writes nothing

    python -m pip install '.[bench]'      # the peers

On Linux, `torch` from PyPI brings CUDA packages of several GB: a CPU build that is installed first
satisfies the extra. Two peers are not in the extra. DALI (Linux alone) requires CUDA libraries that
its CPU operators never load; this goes without them:

    python -m pip install --no-deps nvidia-dali-cuda120
    python -m pip install astunparse gast libcst makefun nvtx optree packaging six

torchvision on PyPI belongs to the CUDA builds and does not import beside a CPU build of PyTorch, so
the operations of its v2 transforms are called here, in their order. They take the batch as
channels-last memory, where torchvision is fastest. torch.compile needs a C++ compiler.

Three tasks: uint8 to float32 in caffe mode (flip the channels, subtract the means), the same in
torch mode (divide by 255, subtract, divide), and caffe mode back to uint8 (add the means, flip,
round, saturate). NHWC on both sides, except where a name says NCHW.

Each peer is called in up to two styles, on the whole batch with its own threads, and image by image
on a pool of as many threads, its own threads set to one. The faster style counts, for fastvgg too.
A result in new memory is told apart from one in memory that was used before, and compared with
fastvgg's of the same kind. In new memory, allocation, page faults and release are in the time, and
so is whether a library asks the system for huge pages, as NumPy does for large arrays.
Image by image the result is one batch as well: a library that returns each image in new memory
has it copied into its row while it is in the cache. What an API forces is said below the table.

Every contender is called once a round, in an order drawn anew for each round; compilation, imports
and one call to warm up are not in the times. Useful bytes are those of the input and of the result,
each counted once. `differing` counts the elements whose bits are not those of Keras' NumPy path,
or, when restoring, of the original image.

With fewer threads than cores the process is confined to as many cores, because XLA has no setting
for the size of its pool.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import os
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

import fastvgg
from fastvgg import Mode
from fastvgg.bench.machine import machine
from fastvgg.threads import usable_cores

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

RESULT = Path(__file__).parent / "results" / "peers.json"
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
IMAGE = (224, 224, 3)
IMAGES = 1536  # 1.08 GiB of input and result together: no cache holds them
QUICK_IMAGES = 64
ROUNDS = 7
QUICK_ROUNDS = 3
COMPARED_TOGETHER = 64
TABLE_WIDTH = 136
SETTLE_SECONDS = 0.02  # OpenMP's threads spin for some milliseconds after they have worked
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "KERAS_BACKEND": "numpy",
    "NO_ALBUMENTATIONS_UPDATE": "1",  # else importing it asks the network for its newest version
}


@dataclass(frozen=True)
class Task:
    name: str
    mode: Mode
    restores: bool
    x: NDArray[Any]
    expected: NDArray[Any]
    out: NDArray[Any]
    """Used before, and shared by all who can be told where to write."""
    threads: int

    @property
    def useful_bytes(self) -> int:
        return self.x.nbytes + self.expected.nbytes


def no_threads_of_its_own(_threads: int) -> None:
    pass


@dataclass(frozen=True)
class Peer:
    """What a library can do for a task; a missing part is what its API does not offer."""

    whole: Callable[[], Any] | None = None
    """Return the result of the batch in new memory."""
    whole_into: Callable[[], Any] | None = None
    """Return it in memory that was used before."""
    image: Callable[[NDArray[Any], NDArray[Any]], object] | None = None
    """Write the result of one image into its row."""
    seen: Callable[[NDArray[Any]], NDArray[Any]] = np.asarray
    """Return the view of all rows that is the result."""
    set_threads: Callable[[int], object] = no_threads_of_its_own


class Contender(NamedTuple):
    name: str
    module: str
    preprocess: Callable[[Task], Peer] | None
    restore: Callable[[Task], Peer] | None
    note: str = ""


class Way(NamedTuple):
    """One contender, one style, one kind of memory."""

    contender: str
    style: str
    memory: str
    call: Callable[[], Any]
    prepare: Callable[[], object]


def means(mode, *, backwards=False):
    """Return the means in float32, in the order of y, or of x."""
    return np.array(mode.mean, np.float32)[:: -1 if backwards and mode.flips else 1]


def torch_constants(mode):
    return np.float32(mode.divide), means(mode), np.array(mode.std, np.float32)


# fastvgg


def fastvgg_preprocess(task):
    mode, x, out, threads = task.mode, task.x, task.out, task.threads
    return Peer(
        whole=lambda: fastvgg.preprocess(x, mode, threads=threads),
        whole_into=lambda: fastvgg.preprocess(x, mode, out=out, threads=threads),
        image=lambda image, row: fastvgg.preprocess(image, mode, out=row, threads=1),
    )


def fastvgg_restore(task):
    mode, x, out, threads = task.mode, task.x, task.out, task.threads
    return Peer(
        whole=lambda: fastvgg.restore(x, mode, threads=threads),
        whole_into=lambda: fastvgg.restore(x, mode, out=out, threads=threads),
        image=lambda image, row: fastvgg.restore(image, mode, out=row, threads=1),
    )


# NumPy


def keras_preprocess(task):
    from keras.applications.imagenet_utils import preprocess_input

    def in_place(images, y):
        y[...] = images
        return preprocess_input(y, mode=task.mode.name)

    return Peer(
        whole=lambda: preprocess_input(task.x, mode=task.mode.name),
        whole_into=lambda: in_place(task.x, task.out),
        image=in_place,
        seen=lambda y: y[..., ::-1] if task.mode.flips else y,
    )


def numpy_restore(task):
    mean = means(task.mode)

    def rounded(y):
        x = y.copy()
        for channel in range(3):  # faster than to add all three, broadcast
            x[..., channel] += mean[channel]
        np.rint(x, out=x)
        return np.clip(x, 0, 255, out=x)[..., ::-1]

    def image(y, row):
        row[...] = rounded(y)

    return Peer(whole=lambda: rounded(task.x).astype(np.uint8), image=image)


def deprocess_img(task):
    """Do what the function of that name in style transfer tutorials does."""
    blue, green, red = task.mode.mean

    def deprocess(y):
        x = y.copy()
        x[..., 0] += blue
        x[..., 1] += green
        x[..., 2] += red
        return np.clip(x[..., ::-1], 0, 255).astype("uint8")

    def image(y, row):
        row[...] = deprocess(y)

    return Peer(whole=lambda: deprocess(task.x), image=image)


# Numba and numexpr


def numba_preprocess(task):
    import numba

    flips, mean = task.mode.flips, tuple(means(task.mode))
    divides = task.mode.divide is not None
    divide = np.float32(task.mode.divide or 1)
    std = tuple(np.array(task.mode.std or (1, 1, 1), np.float32))

    @numba.njit(parallel=True)
    def loop(x, out):
        images, rows, columns, channels = x.shape
        for image in numba.prange(images):
            for row in range(rows):
                for column in range(columns):
                    for channel in range(channels):
                        value = np.float32(x[image, row, column, 2 - channel if flips else channel])
                        if divides:
                            value = (value / divide - mean[channel]) / std[channel]
                        else:
                            value = value - mean[channel]
                        out[image, row, column, channel] = value
        return out

    return Peer(
        whole=lambda: loop(task.x, np.empty_like(task.out)),
        whole_into=lambda: loop(task.x, task.out),
        set_threads=numba.set_num_threads,
    )


def numba_restore(task):
    import numba

    mean = tuple(means(task.mode))

    @numba.njit(parallel=True)
    def loop(y, out):
        images, rows, columns, channels = y.shape
        for image in numba.prange(images):
            for row in range(rows):
                for column in range(columns):
                    for channel in range(channels):
                        value = np.rint(y[image, row, column, channel] + mean[channel])
                        out[image, row, column, 2 - channel] = min(max(value, 0), 255)
        return out

    return Peer(
        whole=lambda: loop(task.x, np.empty_like(task.out)),
        whole_into=lambda: loop(task.x, task.out),
        set_threads=numba.set_num_threads,
    )


def numexpr_by_channel(task, expression, casting, constants):
    """Evaluate each channel by itself, faster than constants that are broadcast."""
    import numexpr

    def evaluate(out):
        for channel in range(3):
            y, x = (channel, 2 - channel) if task.mode.flips else (channel, channel)
            source, target = (y, x) if task.restores else (x, y)
            values = {name: column[y] for name, column in constants.items()}
            numexpr.evaluate(
                expression,
                {"a": task.x[..., source], **values},
                out=out[..., target],
                casting=casting,
            )
        return out

    return Peer(
        whole=lambda: evaluate(np.empty_like(task.out)),
        whole_into=lambda: evaluate(task.out),
        set_threads=numexpr.set_num_threads,
    )


def numexpr_preprocess(task):
    if task.mode.flips:
        constants = {"mean": means(task.mode)}
        return numexpr_by_channel(task, "a - mean", "same_kind", constants)
    divide, mean, std = torch_constants(task.mode)
    constants = {"divide": np.repeat(divide, 3), "mean": mean, "std": std}
    return numexpr_by_channel(task, "(a / divide - mean) / std", "same_kind", constants)


def numexpr_restore(task):
    value = "round(a + mean)"
    saturated = f"where({value} < 0, 0, where({value} > 255, 255, {value}))"
    return numexpr_by_channel(task, saturated, "unsafe", {"mean": means(task.mode)})


# OpenCV and Albumentations


def opencv_blob(layout):
    def build(task):
        import cv2

        parameters = cv2.dnn.Image2BlobParams()
        parameters.datalayout = getattr(cv2, f"DNN_LAYOUT_{layout}")
        parameters.swapRB = task.mode.flips
        if task.mode.flips:
            parameters.mean = task.mode.mean
        else:
            parameters.mean = tuple(task.mode.divide * mean for mean in task.mode.mean)
            parameters.scalefactor = tuple(1 / (task.mode.divide * std) for std in task.mode.std)

        def seen(y):
            images, height, width, channels = y.shape
            return y.reshape(images, channels, height, width) if layout == "NCHW" else y

        def image(x, row):
            cv2.dnn.blobFromImageWithParams(x, seen(row[np.newaxis]), parameters)

        images, out = list(task.x), seen(task.out)
        return Peer(
            whole=lambda: cv2.dnn.blobFromImagesWithParams(images, param=parameters),
            whole_into=lambda: cv2.dnn.blobFromImagesWithParams(images, out, parameters),
            image=image,
            seen=seen,
            set_threads=cv2.setNumThreads,
        )

    return build


def opencv_preprocess(task):
    import cv2

    mean = (*task.mode.mean, 0.0)

    def subtract(x, row):
        flipped = cv2.cvtColor(x, cv2.COLOR_RGB2BGR)
        cv2.subtract(flipped, mean, row, dtype=cv2.CV_32F)

    if task.mode.flips:
        return Peer(image=subtract, set_threads=cv2.setNumThreads)
    divide, mean, std = torch_constants(task.mode)
    table = (np.arange(256, dtype=np.float32)[None, :, None] / divide - mean) / std
    return Peer(image=lambda x, row: cv2.LUT(x, table, row), set_threads=cv2.setNumThreads)


def opencv_restore(task):
    import cv2

    mean = (*task.mode.mean, 0.0)

    def image(y, row):
        cv2.cvtColor(cv2.add(y, mean, dtype=cv2.CV_8U), cv2.COLOR_BGR2RGB, row)

    return Peer(image=image, set_threads=cv2.setNumThreads)


def albumentations_preprocess(task):
    import albumentations
    import cv2

    if task.mode.flips:
        normalize = albumentations.Normalize(task.mode.mean, (1, 1, 1), max_pixel_value=1.0)
    else:
        normalize = albumentations.Normalize(task.mode.mean, task.mode.std, task.mode.divide)

    def image(x, row):
        ordered = cv2.cvtColor(x, cv2.COLOR_RGB2BGR) if task.mode.flips else x
        row[...] = normalize(image=ordered)["image"]

    def whole():
        return normalize(images=task.x[..., ::-1] if task.mode.flips else task.x)["images"]

    return Peer(whole=whole, image=image, set_threads=cv2.setNumThreads)


# PyTorch


def torchvision_preprocess(task):
    import torch

    mean = torch.from_numpy(means(task.mode))
    std = torch.tensor(task.mode.std or (1.0, 1.0, 1.0))

    def normalized(y):
        if task.mode.divide is not None:
            y.mul_(1 / task.mode.divide)
        return y.sub_(mean).div_(std)

    def ordered(x):
        return x.flip(-1) if task.mode.flips else x

    def into(x, out):
        return normalized(out.copy_(ordered(x)))

    x, out = torch.from_numpy(task.x), torch.from_numpy(task.out)
    return Peer(
        whole=lambda: normalized(ordered(x).to(torch.float32)),
        whole_into=lambda: into(x, out),
        image=lambda image, row: into(torch.from_numpy(image), torch.from_numpy(row)),
        set_threads=torch.set_num_threads,
    )


def torch_restore(task):
    import torch

    mean = torch.from_numpy(means(task.mode))

    def rounded(y):
        return y.add(mean).round_().clamp_(0, 255)

    def into(y, out):
        return out.copy_(rounded(y).flip(-1))

    y, out = torch.from_numpy(task.x), torch.from_numpy(task.out)
    return Peer(
        whole=lambda: rounded(y).to(torch.uint8).flip(-1),
        whole_into=lambda: into(y, out),
        image=lambda image, row: into(torch.from_numpy(image), torch.from_numpy(row)),
        set_threads=torch.set_num_threads,
    )


def compiled_by_torch(task, formula):
    import torch

    def into(x, out):
        return out.copy_(formula(x))

    torch.set_num_threads(task.threads)  # the number becomes part of the compiled code
    fresh = torch.compile(formula, dynamic=False)
    reused = torch.compile(into, dynamic=False)
    x, out = torch.from_numpy(task.x), torch.from_numpy(task.out)
    return Peer(
        whole=lambda: fresh(x), whole_into=lambda: reused(x, out), set_threads=torch.set_num_threads
    )


def torch_compile_preprocess(task):
    import torch

    mean = torch.from_numpy(means(task.mode))
    if task.mode.flips:
        return compiled_by_torch(task, lambda x: x.flip(-1).to(torch.float32) - mean)
    std = torch.tensor(task.mode.std)
    return compiled_by_torch(task, lambda x: (x.to(torch.float32) / task.mode.divide - mean) / std)


def torch_compile_restore(task):
    import torch

    mean = torch.from_numpy(means(task.mode))
    return compiled_by_torch(
        task, lambda y: (y + mean).round().clamp(0, 255).to(torch.uint8).flip(-1)
    )


# JAX


def compiled_by_jax(task, formula):
    """Let XLA write into the last result again, by donating it."""
    import jax

    fresh = jax.jit(formula)
    reused = jax.jit(lambda x, _last: formula(x), donate_argnums=1, keep_unused=True)
    x = jax.device_put(task.x)
    last = jax.numpy.zeros(task.out.shape, task.out.dtype)

    def into():
        nonlocal last
        last = reused(x, last).block_until_ready()
        return last

    return Peer(whole=lambda: fresh(x).block_until_ready(), whole_into=into)


def jax_preprocess(task):
    from jax import numpy as jnp

    mean = means(task.mode)
    if task.mode.flips:
        return compiled_by_jax(task, lambda x: x[..., ::-1].astype(jnp.float32) - mean)
    divide, mean, std = torch_constants(task.mode)
    return compiled_by_jax(task, lambda x: (x.astype(jnp.float32) / divide - mean) / std)


def jax_restore(task):
    from jax import numpy as jnp

    mean = means(task.mode)

    def formula(y):
        return jnp.clip(jnp.round(y + mean), 0, 255).astype(jnp.uint8)[..., ::-1]

    return compiled_by_jax(task, formula)


# DALI


def dali_peer(task, graph):
    """Build a pipeline on the memory of the batch; its result lies in DALI's own buffers."""
    from nvidia.dali import Pipeline, fn

    pipeline = Pipeline(
        batch_size=len(task.x),
        num_threads=task.threads,
        device_id=None,
        prefetch_queue_depth=1,
        exec_pipelined=False,
        exec_async=False,
        exec_dynamic=False,  # it keeps its buffers from call to call
    )
    with pipeline:
        pipeline.set_outputs(graph(fn.external_source(lambda: task.x, no_copy=True, layout="HWC")))
    pipeline.build()

    def into():
        (result,) = pipeline.run()
        return result.as_tensor()

    return Peer(whole_into=into)


def dali_preprocess(task, *, flips=True):
    from nvidia.dali import fn, types

    flips = flips and task.mode.flips
    scale = task.mode.divide or 1.0
    mean = means(task.mode) if flips else means(task.mode, backwards=True)

    def graph(x):
        if flips:
            x = fn.color_space_conversion(x, image_type=types.RGB, output_type=types.BGR)
        return fn.crop_mirror_normalize(
            x,
            dtype=types.FLOAT,
            output_layout="HWC",
            mean=(scale * mean.astype(float)).tolist(),
            std=[scale * std for std in task.mode.std or (1.0, 1.0, 1.0)],
        )

    return dali_peer(task, graph)


def dali_preprocess_without_flip(task):
    if not task.mode.flips:
        return Peer()  # the other one is this one
    peer = dali_preprocess(task, flips=False)
    return Peer(whole_into=lambda: np.asarray(peer.whole_into())[..., ::-1])


def dali_restore(task):
    from nvidia.dali import fn, types

    def graph(y):
        bgr = fn.crop_mirror_normalize(
            y, dtype=types.UINT8, output_layout="HWC", mean=[-mean for mean in task.mode.mean]
        )
        return fn.color_space_conversion(bgr, image_type=types.BGR, output_type=types.RGB)

    return dali_peer(task, graph)


CONTENDERS = (
    Contender("fastvgg", "fastvgg", fastvgg_preprocess, fastvgg_restore),
    Contender(
        "Keras",
        "keras",
        keras_preprocess,
        None,
        "in caffe mode its result is a view with a negative stride, one copy short of contiguous; "
        "in used memory it works in place on the bytes converted to float32",
    ),
    Contender("NumPy", "numpy", None, numpy_restore),
    Contender("deprocess_img", "numpy", None, deprocess_img, "truncates instead of rounding"),
    Contender(
        "Numba, plain prange loop",
        "numba",
        numba_preprocess,
        numba_restore,
        "called on the whole batch alone: its default threading layer takes one caller at a time",
    ),
    Contender(
        "numexpr",
        "numexpr",
        numexpr_preprocess,
        numexpr_restore,
        "computes in float64, rounds at the end; called on the whole batch alone: it takes one "
        "caller at a time",
    ),
    Contender("OpenCV blobFromImages, NCHW", "cv2", opencv_blob("NCHW"), None),
    Contender("OpenCV blobFromImages, NHWC", "cv2", opencv_blob("NHWC"), None),
    Contender(
        "OpenCV arithmetic",
        "cv2",
        opencv_preprocess,
        opencv_restore,
        "its functions take one image, so it is called image by image alone",
    ),
    Contender("Albumentations Normalize", "albumentations", albumentations_preprocess, None),
    Contender(
        "torchvision v2's operations (torch)",
        "torch",
        torchvision_preprocess,
        None,
        "called without the package, which does not import beside every build of PyTorch",
    ),
    Contender("PyTorch", "torch", None, torch_restore),
    Contender(
        "torch.compile",
        "torch",
        torch_compile_preprocess,
        torch_compile_restore,
        "called on the whole batch alone: it is compiled for one shape and number of threads",
    ),
    Contender(
        "JAX jit",
        "jax",
        jax_preprocess,
        jax_restore,
        "called on the whole batch alone, which lies on its device before; it cannot be told where "
        "to write, but reuses the memory of a result that is donated to the next call",
    ),
    Contender(
        "DALI",
        "nvidia.dali",
        dali_preprocess,
        dali_restore,
        "batches alone, its results in buffers of its own: no new memory; the flip is an operator "
        "of its own",
    ),
    Contender(
        "DALI, without the flip",
        "nvidia.dali",
        dali_preprocess_without_flip,
        None,
        "less work than the task asks for; its bits are compared with Keras' flipped back",
    ),
)


def image_by_image(peer, task, pool, out):
    def share(first):
        for index in range(first, len(task.x), task.threads):
            peer.image(task.x[index], out[index])

    for _ in pool.map(share, range(task.threads)):
        pass
    return peer.seen(out)


def ways(name, peer, task):
    """List the calls of a peer: two styles, each in new memory and in memory used before."""
    many = functools.partial(peer.set_threads, task.threads)
    one = functools.partial(peer.set_threads, 1)
    if peer.whole is not None:
        yield Way(name, "batch", "new", peer.whole, many)
    if peer.whole_into is not None:
        yield Way(name, "batch", "reused", peer.whole_into, many)
    if peer.image is not None:
        pool = ThreadPoolExecutor(task.threads, initializer=one)
        run = functools.partial(image_by_image, peer, task, pool)
        yield Way(name, "images", "new", lambda: run(np.empty_like(task.out)), one)
        yield Way(name, "images", "reused", lambda: run(task.out), one)


def difference(result, expected):
    """Count the elements of other bits, and return the largest distance."""
    result = np.asarray(result)
    if result.shape != expected.shape:
        result = np.moveaxis(result, 1, -1)
    assert (result.shape, result.dtype) == (expected.shape, expected.dtype)
    bits = np.dtype(f"u{expected.itemsize}")
    differing, largest = 0, 0.0
    for first in range(0, len(expected), COMPARED_TOGETHER):
        rows = slice(first, first + COMPARED_TOGETHER)
        one, other = np.ascontiguousarray(result[rows]), expected[rows]
        differing += int(np.count_nonzero(one.view(bits) != other.view(bits)))
        largest = max(largest, float(np.abs(np.subtract(one, other, dtype=np.float32)).max()))
    return differing, largest


def seconds(way):
    way.prepare()
    begun = time.perf_counter()
    way.call()  # and the release of what it returns
    return time.perf_counter() - begun


def measure(task, contenders, rounds):
    """Return a row for each way of each contender."""
    entered = []
    for contender in contenders:
        build = contender.restore if task.restores else contender.preprocess
        if build is not None:
            entered += ways(contender.name, build(task), task)
    differences = []
    for way in entered:
        way.prepare()
        task.out.fill(0)
        differences.append(difference(way.call(), task.expected))
    taken = [[] for _ in entered]
    order = np.random.default_rng(0)
    for _ in range(rounds):
        for index in order.permutation(len(entered)):
            time.sleep(SETTLE_SECONDS)
            taken[index].append(seconds(entered[index]))
    return judged(
        [row(task, *measured) for measured in zip(entered, taken, differences, strict=True)]
    )


def row(task, way, taken, differing_and_largest):
    median = statistics.median(taken)
    differing, largest = differing_and_largest
    return {
        "task": task.name,
        "contender": way.contender,
        "memory": way.memory,
        "style": way.style,
        "median_ms": round(median * 1e3, 2),
        "least_ms": round(min(taken) * 1e3, 2),
        "most_ms": round(max(taken) * 1e3, 2),
        "images_per_second": round(len(task.x) / median),
        "useful_gb_per_second": round(task.useful_bytes / median / 1e9, 2),
        "differing": differing,
        "largest_difference": largest,
    }


def judged(rows):
    """Mark the faster style of each contender and memory, and add the ratio to fastvgg."""
    best = {}
    for one in rows:
        key = one["contender"], one["memory"]
        best[key] = min(best.get(key, one), one, key=lambda each: each["median_ms"])
    for one in rows:
        one["best"] = one is best[one["contender"], one["memory"]]
        own = best["fastvgg", one["memory"]]
        one["ratio"] = round(one["median_ms"] / own["median_ms"], 2)
    return rows


def importable():
    """Return the contenders whose library can be imported, versions, and why others cannot."""
    present, versions, missing = [], {}, {}
    for contender in CONTENDERS:
        try:
            module = importlib.import_module(contender.module)
        except ImportError as error:
            missing[contender.name] = str(error)
        else:
            present.append(contender)
            versions[contender.module] = module.__version__
    return present, versions, missing


def tasks(images, threads):
    """Yield one task after the other, so that no two lie in memory together."""
    from keras.applications.imagenet_utils import preprocess_input

    x = np.random.default_rng(0).integers(0, 256, (images, *IMAGE), dtype=np.uint8)
    for mode in (Mode.CAFFE, Mode.TORCH):
        y = np.ascontiguousarray(preprocess_input(x, mode=mode.name))
        yield Task(f"preprocess, {mode.name}", mode, False, x, y, np.empty_like(y), threads)
    y = np.ascontiguousarray(preprocess_input(x, mode=Mode.CAFFE.name))
    yield Task("restore, caffe", Mode.CAFFE, True, y, x, np.empty_like(x), threads)


def table(task, rows):
    result = Table(title=f"{task.name}: {len(task.x)} images, {task.threads} threads")
    for heading in ("contender", "memory", "style"):
        result.add_column(heading, no_wrap=True)
    for heading in ("images/s", "GB/s", "ms (least - most)", "ratio", "differing", "by up to"):
        result.add_column(heading, justify="right", no_wrap=True)
    order = sorted(rows, key=lambda one: (one["memory"], one["median_ms"]))
    for last, one in zip([None, *order], order, strict=False):
        if last is not None and last["memory"] != one["memory"]:
            result.add_section()
        result.add_row(
            one["contender"],
            one["memory"],
            one["style"],
            f"{one['images_per_second']:,}",
            f"{one['useful_gb_per_second']:.1f}",
            f"{one['median_ms']:.1f} ({one['least_ms']:.1f} - {one['most_ms']:.1f})",
            f"{one['ratio']:.2f}",
            f"{one['differing']:,}",
            f"{one['largest_difference']:.2g}",
        )
    return result


def options():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--images", type=int)
    parser.add_argument("--rounds", type=int)
    given = parser.parse_args()
    given.images = given.images or (QUICK_IMAGES if given.quick else IMAGES)
    given.rounds = given.rounds or (QUICK_ROUNDS if given.quick else ROUNDS)
    cores = usable_cores()
    if not 1 <= given.threads <= cores:
        parser.error(f"--threads is {given.threads}, and this process may use {cores} cores")
    return given


def confine(threads):
    """Take as many cores as threads, before any library counts them."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])


def main():
    given = options()
    where = machine()
    confine(given.threads)
    os.environ.update(ENVIRONMENT)
    console = Console(width=max(TABLE_WIDTH, Console().width))
    contenders, versions, missing = importable()
    rows = []
    for task in tasks(given.images, given.threads):
        measured = measure(task, contenders, given.rounds)
        console.print(table(task, [one for one in measured if one["best"]]))
        rows += measured
    console.print("The ratio is a peer's time over fastvgg's in the same kind of memory.")
    for contender in contenders:
        if contender.note:
            console.print(f"{contender.name}: {contender.note}", highlight=False)
    for name, reason in missing.items():
        console.print(f"{name}: not measured, it cannot be imported: {reason}", highlight=False)
    if not given.quick:
        RESULT.parent.mkdir(exist_ok=True)
        record = {
            "machine": where,
            "transparent_huge_pages": HUGE_PAGES.read_text().strip() if HUGE_PAGES.exists() else "",
            "peers": versions,
            "threads": given.threads,
            "images": given.images,
            "rounds": given.rounds,
            "not_measured": missing,
            "notes": {one.name: one.note for one in contenders if one.note},
            "rows": rows,
        }
        RESULT.write_text(json.dumps(record, indent=0) + "\n")


if __name__ == "__main__":
    sys.exit(main())
