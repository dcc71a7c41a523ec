"""Kernels match the oracle for any length and address, and write no other byte."""

from __future__ import annotations

import itertools
import re

import pytest

from fastvgg.kernels import convert
from fastvgg.kernels.jit import processor
from fastvgg.kernels.vector import ELEMENT_BYTES
from fastvgg.transform import Mode, Transform
from tests.helpers.batches import FLOATS, LAYOUT_PAIRS, LAYOUTS, run_script
from tests.helpers.kernel_harness import (
    CUSTOM,
    LINE,
    MODES,
    TYPE_PAIRS,
    Task,
    check,
    rotating_tasks,
)
from tests.helpers.samples import parts, sampled

TILE = convert.TILE_PIXELS
TILE_BOUNDARY_COUNTS = (TILE - 1, TILE, TILE + 1, TILE + 37, 2 * TILE - 30, 2 * TILE, 2 * TILE + 63)


def check_everywhere(task):
    """Check every length before, in and after full blocks, at every offset in a cache line.

    Uses every third pair of a length and an offset: the number of offsets is a power of two, so
    every offset is combined with every third length.
    """
    size = ELEMENT_BYTES[task.target]
    check(task, 1, range(LINE + 3 * task.spec.lanes), range(0, LINE, size), every=3)
    check(task, 3, range(0, LINE + task.spec.lanes, 5), range(0, LINE, max(8, size)))
    check(task, 1, TILE_BOUNDARY_COUNTS, (0, size, 32, LINE - size))
    if task.spec_for(has_aligned_planes=True).has_two_streams:
        apart = convert.STREAM_DISTANCE_BYTES // (3 * ELEMENT_BYTES[task.source])
        check(task, 1, (2 * apart - 1, 4 * apart + 70, 6 * apart, 7 * apart + 30), (0, size))
    check(task, 256, [1], [0])  # too short for a block; covers every value


@sampled("pair, shift", TYPE_PAIRS, range(len(LAYOUT_PAIRS)), one_in=2 * len(LAYOUT_PAIRS))
def test_kernel_matches_oracle_for_any_length_and_alignment(pair, shift):
    # The shifts of a pair are its layouts; the sample has all layouts, sources and targets.
    number = TYPE_PAIRS.index(pair)
    check_everywhere([*rotating_tasks(number)][(number // 8 + shift) % len(LAYOUT_PAIRS)])


def test_two_streams_are_an_odd_multiple_apart_and_cover_most_blocks():
    for blocks, apart in itertools.product(range(200), (4, 16)):
        stream_size = convert.stream_blocks.py_func(blocks, apart)
        assert stream_size % (2 * apart) == (apart if blocks >= 2 * apart else 0)
        assert 0 <= blocks - 2 * stream_size < 4 * apart


def test_rotating_tasks_cover_every_mode_layout_and_store_type():
    tasks = [task for number in range(len(TYPE_PAIRS)) for task in rotating_tasks(number)]
    for direction in ("preprocess", "restore"):
        among = [task for task in tasks if task.transform.direction == direction]
        modes = {
            (t.transform.mode, t.transform.layout, t.transform.out_layout, t.nontemporal)
            for t in among
        }
        assert len(modes) == len(MODES) * len(LAYOUT_PAIRS) * 2
        views = {
            (t.has_reversed_input, t.transform.layout, t.transform.out_layout, t.nontemporal)
            for t in among
        }
        assert len(views) == 2 * len(LAYOUT_PAIRS) * 2
    rounded = {(t.transform.rounding, t.target, t.nontemporal) for t in tasks if t.source in FLOATS}
    assert len(rounded) >= 2 * 5 * 2
    specs = [task.spec for task in tasks]
    for divisions in ({r.divide for r in specs}, {r.scale for r in specs}):
        assert divisions >= {"none", "division"}
        assert "reciprocal" in divisions or not processor().has_fma


@parts(len(LAYOUT_PAIRS))
@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.name)
def test_uint8_to_float32_is_exact_in_every_mode_and_layout(mode, part):
    number = (MODES.index(mode) + part) % len(LAYOUT_PAIRS)
    transform = Transform(mode, "preprocess", *LAYOUT_PAIRS[number], "float32")
    check_everywhere(Task(transform, "uint8", nontemporal=number % 2 == 0))


@parts(len(LAYOUTS))
@pytest.mark.parametrize("storage", FLOATS)
@pytest.mark.parametrize("direction", ["preprocess", "restore"])
def test_kernel_works_in_place_for_any_length_and_alignment(direction, storage, part):
    # The first parts cover both layouts with every direction and storage type.
    number = FLOATS.index(storage) // 2 + (direction == "restore") + part
    layout = LAYOUTS[number % len(LAYOUTS)]
    uses_custom = (FLOATS.index(storage) + (direction == "restore") + (layout == "NCHW")) % 2
    transform = Transform(CUSTOM if uses_custom else Mode.TORCH, direction, layout, layout, storage)
    check_everywhere(Task(transform, storage, in_place=True))


SIZES = [
    pair
    for pair in itertools.product(
        ("uint8", "float16", "float32", "float64"), ("uint8", "bfloat16", "float32", "float64")
    )
    if pair != ("uint8", "uint8")
]

GUARDED_SCRIPT = """
from tests.helpers import kernel_harness
from tests.helpers.kernel_harness import CUSTOM, Task, Transform

for number, source, target in {sizes!r}:
    direction = "restore" if target == "uint8" else "preprocess"
    transform = Transform(CUSTOM, direction, *{layouts!r}, target)
    nontemporal = (number + number // 4) % 2 == 0
    task = Task(transform, source, has_reversed_input=number % 3 == 0, nontemporal=nontemporal)
    print(task, flush=True)
    kernel_harness.check_between_guards(task, {counts!r})
"""

IN_PLACE_TYPES = ("float16", "float32", "float64")
IN_PLACE_GUARDED_SCRIPT = """
from tests.helpers import kernel_harness
from tests.helpers.kernel_harness import CUSTOM, Task, Transform

for source, layout in {cases!r}:
    task = Task(Transform(CUSTOM, "preprocess", layout, layout, source), source, in_place=True)
    print(task, flush=True)
    kernel_harness.check_between_guards(task, {counts!r})
"""

# Every remainder before and after a block, ends of tiles, and the start of two streams.
COUNTS = (*range(2 * LINE + LINE), TILE, TILE + 1, TILE + 63, 2 * TILE, 2 * TILE + 65)


@parts(8)
@pytest.mark.parametrize("layouts", LAYOUT_PAIRS, ids="-".join)
def test_kernel_does_not_access_memory_outside_its_arguments(layouts, part):
    # Types rotate with the pair of layouts, so that the first parts cover all types.
    first = (part + 2 * LAYOUT_PAIRS.index(layouts)) % 8
    sizes = [(number, *SIZES[number]) for number in range(first, len(SIZES), 8)]
    run_script(GUARDED_SCRIPT.format(sizes=sizes, layouts=layouts, counts=COUNTS))


@parts(2)
def test_in_place_kernel_does_not_access_memory_outside_its_arguments(part):
    cases = [(source, LAYOUTS[(number + part) % 2]) for number, source in enumerate(IN_PLACE_TYPES)]
    run_script(IN_PLACE_GUARDED_SCRIPT.format(cases=cases, counts=COUNTS))


GUARD_ACCESS_SCRIPT = """
import mmap
from tests.helpers.kernel_harness import guarded_memory

memory = guarded_memory(2, 3 * mmap.PAGESIZE)
run, page = 3 * mmap.PAGESIZE, mmap.PAGESIZE
memory.bytes[page] = memory.bytes[page + run - 1] = 1
memory.bytes[2 * page + run] = memory.bytes[2 * page + 2 * run - 1] = 1
print("inside", flush=True)
memory.bytes[{at}]
"""


@pytest.mark.parametrize("at", ["page - 1", "page + run", "2 * page + run - 1", "-1"])
def test_access_to_a_guard_page_crashes_the_process(at):
    with pytest.raises(AssertionError, match=r"exit code -(11|10|7)\ninside"):
        run_script(GUARD_ACCESS_SCRIPT.format(at=at))


@pytest.mark.parametrize(("images", "count"), [(0, 40), (2, 0), (0, 0)])
@pytest.mark.parametrize("layouts", LAYOUT_PAIRS, ids="-".join)
def test_kernel_writes_nothing_for_an_empty_batch(layouts, images, count):
    task = Task(Transform("caffe", "preprocess", *layouts), "uint8", nontemporal=True)
    check(task, images, [count], [0, 4])


def test_each_spec_is_compiled_to_one_kernel():
    caffe = Task(Transform("caffe"), "uint8").spec
    torch = Task(Transform("torch"), "uint8").spec
    assert convert.compile_kernel(caffe) is convert.compile_kernel(caffe._replace())
    assert convert.compile_kernel(caffe) is not convert.compile_kernel(torch)


# In a separate process, where no other test has compiled anything.
COMPILED_ONCE_SCRIPT = """
from tests.helpers.batches import every_value, frozen, in_layout, unaligned
import fastvgg
from fastvgg.kernels import convert
from fastvgg.transform import Mode

batch = in_layout(every_value().astype({source!r}), {layout!r})
inputs = [batch, frozen(batch.copy()), unaligned(batch), batch[0], batch[:1, :, :4]]
inputs += [batch[::2], batch[..., ::2, :], batch.astype(batch.dtype.newbyteorder("S"))]
for mode in (Mode.CAFFE, Mode("other means", mean=(1.0, 2.0, 3.0), order="BGR")):
    for x in inputs:
        fastvgg.preprocess(x, mode, layout={layout!r}, backend="numba")
assert convert.compile_kernel.cache_info().currsize == 1, convert.compile_kernel.cache_info()
if {source!r} == "float32":
    fastvgg.preprocess(batch, "caffe", layout={layout!r}, out=batch, backend="numba")
    assert convert.compile_kernel.cache_info().currsize == 2, convert.compile_kernel.cache_info()
"""


@pytest.mark.parametrize(("source", "layout"), [("uint8", "NHWC"), ("float32", "NCHW")])
def test_one_kernel_serves_inputs_of_any_shape_and_strides(source, layout):
    run_script(COMPILED_ONCE_SCRIPT.format(source=source, layout=layout))


def test_kernels_use_ieee_arithmetic_and_release_the_gil():
    flags = r"\b(?:fast|reassoc|contract|arcp|nnan|ninf|nsz|afn)\b"
    for layouts in LAYOUT_PAIRS:
        kernel = convert.compile_kernel(
            Task(Transform("torch", "preprocess", *layouts), "uint8").spec
        )
        (text,) = kernel.inspect_llvm().values()
        assert not re.search(flags, text)
        assert kernel.targetoptions["nogil"]
