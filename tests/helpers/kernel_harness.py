"""Loops called by hand, on memory that a test lays out byte by byte."""

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
OWN = Mode("own", divide=2.5, mean=(10.25, -3.7, 48.1), std=(0.7, -13.0, 5.3), order="BGR")
# With FMA, no reciprocal is exact.
SMALL = Mode("small", divide=1e-39, std=(1e3, 1e-3, 7.0), order="BGR")
MODES = (Mode.CAFFE, Mode.TF, Mode.TORCH, OWN, SMALL)


class Task(NamedTuple):
    """What one compiled loop is for."""

    transform: Transform
    source: str
    reversed_input: bool = False
    in_place: bool = False
    nontemporal: bool = False

    def __str__(self):
        t = self.transform
        words = [t.direction, t.mode.name, self.source, self.target, t.layout, t.out_layout]
        words += [t.rounding] * (t.rounding == "truncate")
        words += ["reversed"] * self.reversed_input + ["in place"] * self.in_place
        return "-".join(words + ["streaming"] * self.nontemporal)

    @property
    def target(self):
        return self.transform.output_name(self.source)

    @property
    def spec(self):
        return self.spec_for(aligned_planes=False)

    def spec_for(self, *, aligned_planes):
        return KernelSpec.of(
            self.transform,
            self.source,
            reversed_input=self.reversed_input,
            in_place=self.in_place,
            nontemporal=self.nontemporal,
            aligned_planes=aligned_planes,
        )


def rotating_tasks(number):
    """Four tasks for the type pair of this number, in all four pairs of layouts.

    Over all type pairs, every mode meets every pair of layouts, both ways of writing, channels
    as they should lie and reversed, and both ways of rounding.
    """
    direction, source, target = TYPE_PAIRS[number]
    row = number // 5
    for at, layouts in enumerate(LAYOUT_PAIRS):
        mode = MODES[(number + row + at) % len(MODES)]
        rounding = "truncate" if direction == "restore" and (row + at) % 3 == 0 else "nearest"
        transform = Transform(mode, direction, *layouts, target, rounding)
        reversed_input, nontemporal = (number + row + at // 2) % 3 == 0, (row + at) % 2 == 0
        yield Task(transform, source, reversed_input=reversed_input, nontemporal=nontemporal)


@functools.cache
def pixels_of(direction, mode, source):
    """Pixels, channels last, at which something happens, and others: no result is NaN.

    All values there are of uint8, and of other types what images and network inputs hold, ties,
    infinities, subnormal numbers, both zeros. NaN only where it becomes a number.
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
    """What the oracle makes of `pixels_of`: channels last."""
    plain = dataclasses.replace(transform, layout="NHWC", out_layout="NHWC")
    pixels = pixels_of(transform.direction, transform.mode, source)
    return frozen(oracle.apply(plain, pixels[np.newaxis])[0])


class Steps(NamedTuple):
    """The bytes from one image, pixel and channel to the next."""

    image: int
    pixel: int
    channel: int

    @classmethod
    def with_gaps(cls, dtype, layout, count, gap):
        """For images of `count` pixels, and `gap` elements after each image or plane."""
        size = dtype.itemsize
        if layout == "NHWC":
            return cls((3 * count + gap) * size, 3 * size, size)
        plane = (count + gap) * size
        return cls(3 * plane, size, plane)

    @classmethod
    def with_a_run_each(cls, dtype, layout, run_step):
        """For images (NHWC) or planes (NCHW) that begin `run_step` bytes after one another."""
        size = dtype.itemsize
        if layout == "NHWC":
            return cls(run_step, 3 * size, size)
        return cls(3 * run_step, size, run_step)


class Room(NamedTuple):
    """Where pixels lie: an address, the steps from there, and a view with the channels last."""

    address: int
    steps: Steps
    pixels: np.ndarray


class Memory(NamedTuple):
    """Bytes, and the address at which they begin."""

    bytes: np.ndarray
    address: int

    def room(self, start, dtype, steps, images, count):
        """Room for pixels, `start` bytes from the beginning."""
        view = np.ndarray((images, count, 3), dtype, self.bytes, start, steps)
        return Room(self.address + start, steps, view)


def at_a_line(size):
    """Memory that begins where a cache line does."""
    longer = np.zeros(size + LINE, np.uint8)
    start = -longer.ctypes.data % LINE
    return Memory(longer[start : start + size], longer.ctypes.data + start)


def protect(address, size, access):
    """Say what may be done with pages: mmap.PROT_READ, for example, or nothing."""
    libc = ctypes.CDLL(None, use_errno=True)
    pages = (ctypes.c_void_p(address), ctypes.c_size_t(size), access)
    if libc.mprotect(*pages):
        raise OSError(ctypes.get_errno(), "mprotect")


def between_guards(runs, run_bytes):
    """Memory of some runs of bytes, each between two pages that nobody may touch.

    The first run begins one page from the beginning; the next, a page after its end.
    """
    step = run_bytes + mmap.PAGESIZE
    area = mmap.mmap(-1, runs * step + mmap.PAGESIZE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(area))
    for run in range(runs + 1):
        protect(address + run * step, mmap.PAGESIZE, 0)
    return Memory(np.frombuffer(area, np.uint8), address)


def call(task, x, y, numbers=None):
    """Call the loop of a task on two rooms; the constants lie where they are, or somewhere else."""
    loop, own_numbers = loop_of(task, aligned_planes=y.steps.channel % LINE == 0)
    images, count, _ = y.pixels.shape
    loop(
        *(x.address, y.address, own_numbers.ctypes.data if numbers is None else numbers),
        *(images, count),
        *(x.steps.image, x.steps.channel, y.steps.image, y.steps.channel),
    )


@functools.cache
def loop_of(task, *, aligned_planes):
    """The kernel of a task and its constants."""
    spec = task.spec_for(aligned_planes=aligned_planes)
    return convert.compiled(spec), constant_table(task.transform.mode, spec)


def check(task, images, counts, offsets, every=1):
    """Call the loop of a task on counts of pixels at offsets of the target from a line.

    Of all pairs of a count and an offset, one in `every`. The source begins at every byte of a line
    in turn. Neither its bytes change, nor those of the target that are beside the pixels.
    """
    t = task.transform
    source, target = dtype_of(task.source), dtype_of(task.target)
    have = pixels_of(t.direction, t.mode, task.source)
    want = results_of(t, task.source)
    if len(have) <= max(counts):
        have, want = (np.resize(pixels, (2 * max(counts), 3)) for pixels in (have, want))
    gap = 5
    largest = images * 3 * (max(counts) + LINE) * max(source.itemsize, target.itemsize) + 3 * LINE
    taken, given, expected = at_a_line(largest), at_a_line(largest), at_a_line(largest)
    pairs = itertools.islice(enumerate(itertools.product(counts, offsets)), 0, None, every)
    for number, (count, offset) in pairs:
        # Other pixels for each image and each count.
        starts = [(13 * count + 71 * image) % (len(have) - count) for image in range(images)]
        x_steps = Steps.with_gaps(source, t.layout, count, gap)
        # Planes that begin at the same place of a line, and others.
        y_gap = -count % LINE if number % 2 else gap
        y_steps = Steps.with_gaps(target, t.out_layout, count, y_gap)
        end = LINE + offset + images * y_steps.image + LINE
        given.bytes[:end] = expected.bytes[:end] = CANARY
        y = given.room(LINE + offset, target, y_steps, images, count)
        x = taken.room(LINE + number % LINE, source, x_steps, images, count)
        x = y if task.in_place else x
        wanted = expected.room(LINE + offset, target, y_steps, images, count)
        for image, start in enumerate(starts):
            pixels = have[start : start + count]
            x.pixels[image] = pixels[:, ::-1] if task.reversed_input else pixels
            wanted.pixels[image] = want[start : start + count]
        before = taken.bytes.tobytes()
        call(task, x, y)
        where = f"{task}: {images} x {count} pixels, {offset} bytes past a line"
        assert given.bytes[:end].tobytes() == expected.bytes[:end].tobytes(), where
        assert taken.bytes.tobytes() == before, where


def check_between_guards(task, counts):
    """Call the loop of a task where all that it reads and writes ends, or begins, at a page."""
    for ends in (True, False):
        _check_at_pages(task, counts, ends)


def _check_at_pages(task, counts, ends):
    t, images, most = task.transform, 2, max(counts)
    source, target = dtype_of(task.source), dtype_of(task.target)
    run_bytes = -(-3 * most * 8 // mmap.PAGESIZE) * mmap.PAGESIZE
    run_step = run_bytes + mmap.PAGESIZE
    x_steps = Steps.with_a_run_each(source, t.layout, run_step)
    y_steps = Steps.with_a_run_each(target, t.out_layout, run_step)
    taken, given = between_guards(3 * images, run_bytes), between_guards(3 * images, run_bytes)

    def room(memory, dtype, steps, count):
        start = mmap.PAGESIZE + (run_bytes - count * steps.pixel if ends else 0)
        return memory.room(start, dtype, steps, images, count)

    have = pixels_of(t.direction, t.mode, task.source)[: images * most].reshape(images, most, 3)
    want = results_of(t, task.source)[: images * most].reshape(images, most, 3)
    room(taken, source, x_steps, most).pixels[...] = (
        have[..., ::-1] if task.reversed_input else have
    )
    if not task.in_place:
        for run in range(3 * images):
            begins = taken.address + mmap.PAGESIZE + run * run_step
            protect(begins, run_bytes, mmap.PROT_READ)
    numbers = loop_of(task, aligned_planes=y_steps.channel % LINE == 0)[1]
    constant_bytes = -(-numbers.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    rows = between_guards(1, constant_bytes)
    start = mmap.PAGESIZE + (constant_bytes - numbers.nbytes if ends else 0)
    rows.bytes[start : start + numbers.nbytes] = numbers.view(np.uint8).ravel()
    for count in counts:
        x, y = room(taken, source, x_steps, count), room(given, target, y_steps, count)
        part = slice(most - count, most) if ends else slice(count)
        if task.in_place:
            x = y
            x.pixels[...] = have[:, part]
        call(task, x, y, rows.address + start)
        assert y.pixels.tobytes() == want[:, part].tobytes(), (task, count, ends)
