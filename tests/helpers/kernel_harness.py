"""Direct kernel calls on memory with a byte-exact layout."""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import itertools
import mmap
from typing import NamedTuple

import numpy as np

from fastvgg import oracle
from fastvgg.kernels import convert
from fastvgg.kernels.spec import KernelSpec, constant_table
from fastvgg.transform import Mode, Transform
from tests.helpers.batches import FLOATS, LAYOUT_PAIRS, cast, dtype_of, every_pattern, frozen

CANARY = 0xA5
LINE = 64
TYPE_PAIRS = (
    *(("preprocess", *pair) for pair in itertools.product(("uint8", *FLOATS), FLOATS)),
    *(("restore", *pair) for pair in itertools.product(FLOATS, ("uint8", *FLOATS))),
)
CUSTOM = Mode("own", divide=2.5, mean=(10.25, -3.7, 48.1), std=(0.7, -13.0, 5.3), order="BGR")
# None of its reciprocals is exact, even with FMA.
SMALL = Mode("small", divide=1e-39, std=(1e3, 1e-3, 7.0), order="BGR")
MODES = (Mode.CAFFE, Mode.TF, Mode.TORCH, CUSTOM, SMALL)


class Task(NamedTuple):
    """The specification of one compiled kernel."""

    transform: Transform
    source: str
    has_reversed_input: bool = False
    in_place: bool = False
    nontemporal: bool = False

    def __str__(self):
        t = self.transform
        words = [t.direction, t.mode.name, self.source, self.target, t.layout, t.out_layout]
        words += [t.rounding] * (t.rounding == "truncate")
        words += ["reversed"] * self.has_reversed_input + ["in place"] * self.in_place
        return "-".join(words + ["streaming"] * self.nontemporal)

    @property
    def target(self):
        return self.transform.output_type(self.source)

    @property
    def spec(self):
        return self.spec_for(has_aligned_planes=False)

    def spec_for(self, *, has_aligned_planes):
        return KernelSpec.of(
            self.transform,
            self.source,
            has_reversed_input=self.has_reversed_input,
            in_place=self.in_place,
            nontemporal=self.nontemporal,
            has_aligned_planes=has_aligned_planes,
        )


def rotating_tasks(number):
    """Yield four tasks for a type pair, given by its number: one for each pair of layouts.

    Over all type pairs, every mode is combined with every pair of layouts, both store types,
    reversed and non-reversed input channels, and both roundings.
    """
    direction, source, target = TYPE_PAIRS[number]
    row = number // 5
    for at, layouts in enumerate(LAYOUT_PAIRS):
        mode = MODES[(number + row + at) % len(MODES)]
        rounding = "truncate" if direction == "restore" and (row + at) % 3 == 0 else "nearest"
        transform = Transform(mode, direction, *layouts, target, rounding)
        has_reversed_input, nontemporal = (number + row + at // 2) % 3 == 0, (row + at) % 2 == 0
        yield Task(
            transform, source, has_reversed_input=has_reversed_input, nontemporal=nontemporal
        )


@functools.cache
def pixels_of(direction, mode, source):
    """Return channels-last pixels with special and ordinary values; no result is NaN.

    For uint8, all values; for other types, values of images and network inputs, ties, infinities,
    subnormals and both zeros. NaN only where the result is a number.
    """
    count = 5 * convert.TILE_PIXELS
    if source == "uint8":
        return frozen(every_pattern(256, (count,)).astype(np.uint8))
    random = np.random.default_rng(len(source))
    info = np.finfo(np.float32)
    special = [np.inf, -np.inf, 0.0, -0.0, 1e-7, -6e-8, info.smallest_subnormal, 65519.9, 65520]
    special += [info.max, -info.max, 3.5, -3.5, *range(256)]
    x = np.concatenate(
        [special, random.uniform(-300, 600, 1500), 2.0 ** random.uniform(-30, 20, 400)]
    )
    if direction == "restore":
        near = oracle.forward(np.stack([np.arange(-2, 258, 0.25)] * 3, axis=-1), mode)
        x = np.concatenate([[np.nan, -np.nan], special, near.ravel(), random.uniform(-3, 3, 500)])
    order = [random.permutation(np.resize(x, count)) for _ in range(3)]
    return frozen(cast(np.stack(order, axis=-1), source))


@functools.cache
def results_of(transform, source):
    """Return the channels-last results of the oracle for `pixels_of`."""
    plain = dataclasses.replace(transform, layout="NHWC", out_layout="NHWC")
    pixels = pixels_of(transform.direction, transform.mode, source)
    return frozen(oracle.apply(plain, pixels[np.newaxis])[0])


class Strides(NamedTuple):
    """The strides of images, pixels and channels, in bytes."""

    image: int
    pixel: int
    channel: int

    @classmethod
    def with_gaps(cls, dtype, layout, count, gap):
        """Return strides for images of `count` pixels, `gap` elements between images or planes."""
        size = dtype.itemsize
        if layout == "NHWC":
            return cls((3 * count + gap) * size, 3 * size, size)
        plane = (count + gap) * size
        return cls(3 * plane, size, plane)

    @classmethod
    def with_separate_runs(cls, dtype, layout, run_step):
        """Return strides for images (NHWC) or planes (NCHW) that start `run_step` bytes apart."""
        size = dtype.itemsize
        if layout == "NHWC":
            return cls(run_step, 3 * size, size)
        return cls(3 * run_step, size, run_step)


class PixelBuffer(NamedTuple):
    """Pixels in memory: their address, their strides, and a channels-last view."""

    address: int
    strides: Strides
    pixels: np.ndarray


class Memory(NamedTuple):
    """Bytes and their address."""

    bytes: np.ndarray
    address: int

    def pixel_buffer(self, start, dtype, strides, images, count):
        """Return a buffer for pixels that starts `start` bytes into the memory."""
        view = np.ndarray((images, count, 3), dtype, self.bytes, start, strides)
        return PixelBuffer(self.address + start, strides, view)


def line_aligned_memory(size):
    """Allocate memory aligned to a cache line."""
    longer = np.zeros(size + LINE, np.uint8)
    start = -longer.ctypes.data % LINE
    return Memory(longer[start : start + size], longer.ctypes.data + start)


def protect(address, size, access):
    """Set the access to pages, for example mmap.PROT_READ, or 0 for none."""
    libc = ctypes.CDLL(None, use_errno=True)
    pages = (ctypes.c_void_p(address), ctypes.c_size_t(size), access)
    if libc.mprotect(*pages):
        raise OSError(ctypes.get_errno(), "mprotect")


def guarded_memory(runs, run_bytes):
    """Allocate `runs` runs of bytes, each between two inaccessible guard pages.

    The first run starts one page into the memory; each later run, one page after the previous one.
    """
    step = run_bytes + mmap.PAGESIZE
    area = mmap.mmap(-1, runs * step + mmap.PAGESIZE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(area))
    for run in range(runs + 1):
        protect(address + run * step, mmap.PAGESIZE, 0)
    return Memory(np.frombuffer(area, np.uint8), address)


def call(task, x, y, numbers=None):
    """Call the kernel of a task on two buffers; `numbers` is the address of the constants."""
    loop, own_numbers = compiled_kernel(task, has_aligned_planes=y.strides.channel % LINE == 0)
    images, count, _ = y.pixels.shape
    loop(
        *(x.address, y.address, own_numbers.ctypes.data if numbers is None else numbers),
        *(images, count),
        *(x.strides.image, x.strides.channel, y.strides.image, y.strides.channel),
    )


@functools.cache
def compiled_kernel(task, *, has_aligned_planes):
    """Return the kernel of a task and its constants."""
    spec = task.spec_for(has_aligned_planes=has_aligned_planes)
    return convert.compile_kernel(spec), constant_table(task.transform.mode, spec)


def check(task, images, counts, offsets, every=1):
    """Check a task's kernel for pixel counts and for offsets of the target from a cache line.

    Checks one in `every` pairs of a count and an offset. The offset of the source cycles through
    all bytes of a line. The kernel must change neither the source nor bytes around the target.
    """
    t = task.transform
    source, target = dtype_of(task.source), dtype_of(task.target)
    inputs = pixels_of(t.direction, t.mode, task.source)
    results = results_of(t, task.source)
    if len(inputs) <= max(counts):
        inputs, results = (np.resize(pixels, (2 * max(counts), 3)) for pixels in (inputs, results))
    gap = 5
    max_bytes = images * 3 * (max(counts) + LINE) * max(source.itemsize, target.itemsize) + 3 * LINE
    source_memory, target_memory, expected = (
        line_aligned_memory(max_bytes),
        line_aligned_memory(max_bytes),
        line_aligned_memory(max_bytes),
    )
    pairs = itertools.islice(enumerate(itertools.product(counts, offsets)), 0, None, every)
    for number, (count, offset) in pairs:
        # Different pixels for each image and each count.
        starts = [(13 * count + 71 * image) % (len(inputs) - count) for image in range(images)]
        x_strides = Strides.with_gaps(source, t.layout, count, gap)
        # Planes with equal and with different alignment to a cache line.
        y_gap = -count % LINE if number % 2 else gap
        y_strides = Strides.with_gaps(target, t.out_layout, count, y_gap)
        end = LINE + offset + images * y_strides.image + LINE
        target_memory.bytes[:end] = expected.bytes[:end] = CANARY
        y = target_memory.pixel_buffer(LINE + offset, target, y_strides, images, count)
        x = source_memory.pixel_buffer(LINE + number % LINE, source, x_strides, images, count)
        x = y if task.in_place else x
        expected_pixels = expected.pixel_buffer(LINE + offset, target, y_strides, images, count)
        for image, start in enumerate(starts):
            pixels = inputs[start : start + count]
            x.pixels[image] = pixels[:, ::-1] if task.has_reversed_input else pixels
            expected_pixels.pixels[image] = results[start : start + count]
        before = source_memory.bytes.tobytes()
        call(task, x, y)
        label = f"{task}: {images} x {count} pixels, {offset} bytes past a line"
        assert target_memory.bytes[:end].tobytes() == expected.bytes[:end].tobytes(), label
        assert source_memory.bytes.tobytes() == before, label


def check_between_guards(task, counts):
    """Check the kernel of a task on memory that ends, or starts, at a guard page."""
    for ends in (True, False):
        _check_at_pages(task, counts, ends)


def _check_at_pages(task, counts, ends):
    t, images, max_count = task.transform, 2, max(counts)
    source, target = dtype_of(task.source), dtype_of(task.target)
    run_bytes = -(-3 * max_count * 8 // mmap.PAGESIZE) * mmap.PAGESIZE
    run_step = run_bytes + mmap.PAGESIZE
    x_strides = Strides.with_separate_runs(source, t.layout, run_step)
    y_strides = Strides.with_separate_runs(target, t.out_layout, run_step)
    source_memory, target_memory = (
        guarded_memory(3 * images, run_bytes),
        guarded_memory(3 * images, run_bytes),
    )

    def pixel_buffer(memory, dtype, strides, count):
        start = mmap.PAGESIZE + (run_bytes - count * strides.pixel if ends else 0)
        return memory.pixel_buffer(start, dtype, strides, images, count)

    inputs = pixels_of(t.direction, t.mode, task.source)[: images * max_count].reshape(
        images, max_count, 3
    )
    results = results_of(t, task.source)[: images * max_count].reshape(images, max_count, 3)
    pixel_buffer(source_memory, source, x_strides, max_count).pixels[...] = (
        inputs[..., ::-1] if task.has_reversed_input else inputs
    )
    if not task.in_place:
        for run in range(3 * images):
            run_address = source_memory.address + mmap.PAGESIZE + run * run_step
            protect(run_address, run_bytes, mmap.PROT_READ)
    numbers = compiled_kernel(task, has_aligned_planes=y_strides.channel % LINE == 0)[1]
    constant_bytes = -(-numbers.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    rows = guarded_memory(1, constant_bytes)
    start = mmap.PAGESIZE + (constant_bytes - numbers.nbytes if ends else 0)
    rows.bytes[start : start + numbers.nbytes] = numbers.view(np.uint8).ravel()
    for count in counts:
        x, y = (
            pixel_buffer(source_memory, source, x_strides, count),
            pixel_buffer(target_memory, target, y_strides, count),
        )
        part = slice(max_count - count, max_count) if ends else slice(count)
        if task.in_place:
            x = y
            x.pixels[...] = inputs[:, part]
        call(task, x, y, rows.address + start)
        assert y.pixels.tobytes() == results[:, part].tobytes(), (task, count, ends)
