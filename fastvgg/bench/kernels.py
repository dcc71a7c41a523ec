"""Kernel throughput against memory bandwidth and the NumPy reference; every result is checked.

The limit of a path is the faster of two loops that read and write the same bytes with non-temporal
stores and no arithmetic, one of them with software prefetch. For an in-place path the loops
multiply in place, and for a result in new memory the limit is first touch. Path and limit run
interleaved, on the same memory and threads. The NumPy reference runs in tiles on those threads,
with fewer images and rounds.
"""

from __future__ import annotations

import itertools
import statistics
from functools import partial
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np

from fastvgg import engine, oracle
from fastvgg.bench import memory
from fastvgg.bench.timing import compare, time_interleaved
from fastvgg.call_plan import bind_kernel, plan_call
from fastvgg.errors import VerificationError
from fastvgg.transform import CHANNEL_AXES, LAYOUTS, Transform, storage_dtype

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

    from fastvgg.bench.memory import Arena

HEIGHT: Final = 224
WIDTH: Final = 224
ORACLE_IMAGES: Final = 32
CALLS_PER_ROUND: Final = 200
NUMPY_ROUNDS: Final = 3
MODES: Final = ("caffe", "tf", "torch", "identity")
FLOATS: Final = ("float32", "float16", "bfloat16", "float64")


class KernelPath(NamedTuple):
    """A transform, the dtype of its input and the memory of its result."""

    transform: Transform
    dtype: str
    """The dtype of the input."""
    out: str = "used"
    """The memory of the result: "used" (already mapped), "new", or "in place"."""

    @property
    def name(self) -> str:
        """Dtypes, mode and layouts.

        >>> KernelPath(Transform("tf", "restore", "NCHW", "NHWC"), "float16").name
        'float16-uint8 tf NCHW-NHWC'
        """
        t = self.transform
        layouts = t.layout if t.layout == t.out_layout else f"{t.layout}-{t.out_layout}"
        where = {"used": "", "new": ", new memory", "in place": " in place"}[self.out]
        return f"{self.dtype}-{t.output_type(self.dtype)} {t.mode.name} {layouts}{where}"


def _paths() -> Iterator[KernelPath]:
    """Yield every mode, storage type and pair of layouts, in both directions."""
    for layout, out_layout in itertools.product(LAYOUTS, repeat=2):
        for mode in MODES:
            for dtype in FLOATS:
                yield KernelPath(Transform(mode, "preprocess", layout, out_layout, dtype), "uint8")
            for dtype in FLOATS:
                yield KernelPath(Transform(mode, "restore", layout, out_layout), dtype)
    for layout in LAYOUTS:
        for dtype in ("float32", "float64"):
            yield KernelPath(Transform("caffe", layout=layout), dtype, "in place")
    yield KernelPath(Transform("caffe"), "float32")
    yield KernelPath(Transform("caffe"), "uint8", "new")


PATHS: Final = tuple(_paths())
COMMON_PATHS: Final = tuple(
    path
    for path in PATHS
    if path.out != "used"
    or (
        (path.transform.layout, path.transform.out_layout) == ("NHWC", "NHWC")
        and path.transform.mode.name in ("caffe", "torch")
        and "float64" not in (path.dtype, path.transform.dtype)
    )
)


def measure_path(path: KernelPath, arena: Arena, rounds: int, threads: int) -> dict[str, Any]:
    """Return the figures of a path; a result that differs from the oracle in any bit raises."""
    one, expected = example(path.transform, path.dtype)
    images = arena.nbytes // (one.nbytes + expected.nbytes)
    x, out = arena.pair(images, one, expected)
    transform, sample = path.transform, slice(min(images, ORACLE_IMAGES))
    numpy_out = np.empty_like(out[sample])
    _check_result(path, _bind_call(path, x, out, threads)(), expected)
    oracle_call = partial(
        engine.apply, transform, x[sample], numpy_out, threads=threads, backend="numpy"
    )
    (numpy_seconds,) = time_interleaved((oracle_call,), min(rounds, NUMPY_ROUNDS))
    calls = (_bind_call(path, x, out, threads), *_bind_limits(path, x, out, threads))
    own_seconds, *limits = time_interleaved(calls, rounds)
    share, spread, seconds = compare(own_seconds, min(limits, key=statistics.median))
    moved_bytes = images * (one.nbytes + expected.nbytes)
    return {
        "path": path.name,
        "images_per_second": round(images / seconds),
        "gigabytes_per_second": round(moved_bytes / seconds / 1e9, 1),
        "share": share,
        "spread": spread,
        "numpy_images_per_second": round(len(numpy_out) / statistics.median(numpy_seconds)),
    }


def example(transform: Transform, dtype: str) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return one input image of a path, and the expected result.

    To restore, the input is the oracle's network input of an image, and that image is the expected
    result; to preprocess, the expected result is the oracle's.
    """
    shape = (HEIGHT, WIDTH, 3)
    image = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    if transform.direction == "restore":
        preprocess = Transform(transform.mode, out_layout=transform.layout, dtype=dtype)
        expected = np.moveaxis(image, -1, CHANNEL_AXES[transform.out_layout])
        return oracle.apply(preprocess, image), np.ascontiguousarray(expected)
    x = np.moveaxis(image, -1, CHANNEL_AXES[transform.layout]).astype(storage_dtype(dtype))
    return x, oracle.apply(transform, x)


def _bind_call(
    path: KernelPath, x: NDArray[Any], out: NDArray[Any], threads: int
) -> Callable[[], NDArray[Any]]:
    result = {"used": out, "in place": x, "new": None}[path.out]
    return partial(engine.apply, path.transform, x, result, threads=threads, backend="numba")


def _bind_limits(
    path: KernelPath, x: NDArray[Any], out: NDArray[Any], threads: int
) -> list[Callable[[], None]]:
    if path.out == "new":
        return [partial(memory.first_touch, out.nbytes, threads)]
    if path.out == "in place":
        return [partial(memory.scale, x, threads, prefetch=prefetch) for prefetch in (False, True)]
    return [partial(memory.copy, x, out, threads, prefetch=prefetch) for prefetch in (False, True)]


def _check_result(path: KernelPath, actual: NDArray[Any], expected: NDArray[Any]) -> None:
    """Compare the bits of every image with the oracle's."""
    bits = np.dtype(f"u{expected.itemsize}")
    expected_bits = expected.view(bits)
    for index, image in enumerate(actual.view(bits)):
        if not np.array_equal(image, expected_bits):
            raise VerificationError(
                f"{path.name}: image {index} of {len(actual)} differs from the NumPy reference",
                "please report it with the processor and versions in the benchmark's record",
            )


def call_overhead_us(rounds: int) -> float:
    """Return the microseconds that a call for one image takes beyond its kernel."""
    x = np.zeros((1, HEIGHT, WIDTH, 3), np.uint8)
    out = np.empty(x.shape, np.float32)
    plan = plan_call(Transform("caffe"), x.dtype, x.shape, x.strides)
    kernel = bind_kernel(plan, in_place=False, nontemporal=False)
    addresses = (x.ctypes.data, out.ctypes.data, kernel.constants_address)

    def run_calls() -> None:
        for _ in range(CALLS_PER_ROUND):
            engine.preprocess(x, "caffe", out=out)

    def run_kernels() -> None:
        for _ in range(CALLS_PER_ROUND):
            kernel.loop(*addresses, 1, HEIGHT * WIDTH, 0, 0, 0, 0)

    seconds = time_interleaved((run_calls, run_kernels), rounds)
    overhead: float = statistics.median(a - b for a, b in zip(*seconds, strict=True))
    return round(overhead / CALLS_PER_ROUND * 1e6, 1)
