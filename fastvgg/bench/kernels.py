"""Every kernel beside what the memory allows and beside the oracle, its result checked.

The limit of a path is the faster of two loops that read and write the same bytes past the caches
with no arithmetic, one of which asks for memory ahead; of work in place, the same with a
multiplication; of a result in new memory, the system that zeroes as many bytes. Path and limit run
in turn on the same memory with the same threads. NumPy runs the oracle in pieces on those threads,
on fewer images and in fewer rounds.
"""

from __future__ import annotations

import statistics
from functools import partial
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np

from fastvgg import engine, oracle
from fastvgg.bench import memory
from fastvgg.bench.timing import compare, time_interleaved
from fastvgg.errors import VerificationError
from fastvgg.kernels import convert
from fastvgg.kernels.spec import KernelSpec, constant_table
from fastvgg.transform import CHANNEL_AXES, Transform, storage_dtype

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray

    from fastvgg.bench.memory import Arena
    from fastvgg.transform import Layout

__all__ = [
    "COMMON_PATHS",
    "HEIGHT",
    "PATHS",
    "WIDTH",
    "KernelPath",
    "call_overhead_us",
    "example",
    "measured",
]

HEIGHT: Final = 224
WIDTH: Final = 224
ORACLE_IMAGES: Final = 32
CALLS_TOGETHER: Final = 200
NUMPY_ROUNDS: Final = 3
MODES: Final = ("caffe", "tf", "torch", "identity")
FLOATS: Final = ("float32", "float16", "bfloat16", "float64")
LAYOUTS: Final[tuple[tuple[Layout, Layout], ...]] = (
    *(("NHWC", "NHWC"), ("NHWC", "NCHW"), ("NCHW", "NHWC"), ("NCHW", "NCHW")),
)


class KernelPath(NamedTuple):
    """What is measured: a transform, and the memory that its result goes to."""

    transform: Transform
    dtype: str
    """Of the input."""
    out: str = "used"
    """Memory that was used before, "new" memory, or "in place"."""

    @property
    def name(self) -> str:
        """Types, mode and layouts.

        >>> KernelPath(Transform("tf", "restore", "NCHW", "NHWC"), "float16").name
        'float16-uint8 tf NCHW-NHWC'
        """
        t = self.transform
        layouts = t.layout if t.layout == t.out_layout else f"{t.layout}-{t.out_layout}"
        where = {"used": "", "new": ", new memory", "in place": " in place"}[self.out]
        return f"{self.dtype}-{t.output_name(self.dtype)} {t.mode.name} {layouts}{where}"


def _paths() -> Iterator[KernelPath]:
    """Yield every mode, storage type and pair of layouts, there and back."""
    for layouts in LAYOUTS:
        for mode in MODES:
            for dtype in FLOATS:
                yield KernelPath(Transform(mode, "preprocess", *layouts, dtype), "uint8")
            for dtype in FLOATS:
                yield KernelPath(Transform(mode, "restore", *layouts), dtype)
    for layout in ("NHWC", "NCHW"):
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


def measured(
    arena: Arena, rounds: int, threads: int, paths: Sequence[KernelPath] = PATHS
) -> Iterator[dict[str, Any]]:
    """Yield what each path reaches, as it is measured.

    Raises
    ------
    VerificationError
        If a result is not that of the oracle, bit for bit.
    """
    for path in paths:
        yield _measured(path, arena, rounds, threads)


def _measured(path: KernelPath, arena: Arena, rounds: int, threads: int) -> dict[str, Any]:
    one, expected = example(path.transform, path.dtype)
    images = arena.nbytes // (one.nbytes + expected.nbytes)
    x, out = arena.pair(images, one, expected)
    transform, few = path.transform, slice(min(images, ORACLE_IMAGES))
    numpy_out = np.empty_like(out[few])
    _check(path, _called(path, x, out, threads)(), expected)
    oracle_call = partial(
        engine.apply, transform, x[few], numpy_out, threads=threads, backend="numpy"
    )
    (numpy,) = time_interleaved((oracle_call,), min(rounds, NUMPY_ROUNDS))
    calls = (_called(path, x, out, threads), *_limits(path, x, out, threads))
    ours, *limits = time_interleaved(calls, rounds)
    share, spread, seconds = compare(ours, min(limits, key=statistics.median))
    moved_bytes = images * (one.nbytes + expected.nbytes)
    return {
        "path": path.name,
        "images_per_second": round(images / seconds),
        "gigabytes_per_second": round(moved_bytes / seconds / 1e9, 1),
        "share": share,
        "spread": spread,
        "numpy_images_per_second": round(len(numpy_out) / statistics.median(numpy)),
    }


def example(transform: Transform, dtype: str) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return an image as a path takes it, and what has to come of it, by the oracle.

    What is restored are network inputs, and what has to come of them are the bytes of the image.
    """
    shape = (HEIGHT, WIDTH, 3)
    image = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    if transform.direction == "restore":
        there = Transform(transform.mode, out_layout=transform.layout, dtype=dtype)
        back = np.moveaxis(image, -1, CHANNEL_AXES[transform.out_layout])
        return oracle.apply(there, image), np.ascontiguousarray(back)
    x = np.moveaxis(image, -1, CHANNEL_AXES[transform.layout]).astype(storage_dtype(dtype))
    return x, oracle.apply(transform, x)


def _called(
    path: KernelPath, x: NDArray[Any], out: NDArray[Any], threads: int
) -> Callable[[], NDArray[Any]]:
    given = {"used": out, "in place": x, "new": None}[path.out]
    return partial(engine.apply, path.transform, x, given, threads=threads, backend="numba")


def _limits(
    path: KernelPath, x: NDArray[Any], out: NDArray[Any], threads: int
) -> list[Callable[[], None]]:
    if path.out == "new":
        return [partial(memory.zeroed_by_the_system, out.nbytes, threads)]
    if path.out == "in place":
        return [partial(memory.scale, x, threads, fetches=fetches) for fetches in (False, True)]
    return [partial(memory.copy, x, out, threads, fetches=fetches) for fetches in (False, True)]


def _check(path: KernelPath, result: NDArray[Any], expected: NDArray[Any]) -> None:
    """Compare every image's bits with those of the oracle."""
    bits = np.dtype(f"u{expected.itemsize}")
    wanted = expected.view(bits)
    for index, image in enumerate(result.view(bits)):
        if not np.array_equal(image, wanted):
            raise VerificationError(
                f"{path.name}: image {index} of {len(result)} is not what the oracle computes",
                "please report it, with the processor and the versions that --json shows",
            )


def call_overhead_us(rounds: int) -> float:
    """Return the microseconds that a call takes above its kernel, for one image."""
    transform = Transform("caffe")
    x = np.zeros((1, HEIGHT, WIDTH, 3), np.uint8)
    out = np.empty(x.shape, np.float32)
    spec = KernelSpec.of(transform, "uint8")
    kernel, constants = convert.compiled(spec), constant_table(transform.mode, spec)
    addresses = (x.ctypes.data, out.ctypes.data, constants.ctypes.data)

    def whole() -> None:
        for _ in range(CALLS_TOGETHER):
            engine.preprocess(x, "caffe", out=out)

    def alone() -> None:
        for _ in range(CALLS_TOGETHER):
            kernel(*addresses, 1, HEIGHT * WIDTH, 0, 0, 0, 0)

    seconds = time_interleaved((whole, alone), rounds)
    above: float = statistics.median(a - b for a, b in zip(*seconds, strict=True))
    return round(above / CALLS_TOGETHER * 1e6, 1)
