"""Kernels: the oracle's bits for any length and address, and no byte beside."""

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
    LINE,
    MODES,
    OWN,
    TYPE_PAIRS,
    Task,
    check,
    rotating_tasks,
)
from tests.helpers.samples import parts, sampled

TILE = convert.TILE_PIXELS
AROUND_TILES = (TILE - 1, TILE, TILE + 1, TILE + 37, 2 * TILE - 30, 2 * TILE, 2 * TILE + 63)


def check_everywhere(task):
    """Every length of what comes before, in and after whole blocks, at every place in a line.

    Of the pairs of a length and a place every third: the places are a power of two, so that each of
    them meets every third length.
    """
    size = ELEMENT_BYTES[task.target]
    check(task, 1, range(LINE + 3 * task.spec.lanes), range(0, LINE, size), every=3)
    check(task, 3, range(0, LINE + task.spec.lanes, 5), range(0, LINE, max(8, size)))
    check(task, 1, AROUND_TILES, (0, size, 32, LINE - size))
    if task.spec_for(aligned_planes=True).two_streams:
        apart = convert.TWO_STREAMS_BYTES // (3 * ELEMENT_BYTES[task.source])
        check(task, 1, (2 * apart - 1, 4 * apart + 70, 6 * apart, 7 * apart + 30), (0, size))
    check(task, 256, [1], [0])  # where no block is long enough, every value too


@sampled("pair, shift", TYPE_PAIRS, range(len(LAYOUT_PAIRS)), one_in=2 * len(LAYOUT_PAIRS))
def test_a_loop_has_the_bits_of_the_oracle_for_any_length_and_any_address(pair, shift):
    # The shifts of a pair are its layouts; the sample has all layouts, sources and targets.
    number = TYPE_PAIRS.index(pair)
    check_everywhere([*rotating_tasks(number)][(number // 8 + shift) % len(LAYOUT_PAIRS)])


def test_two_streams_are_an_odd_multiple_apart_and_hold_all_blocks_but_a_few():
    for blocks, apart in itertools.product(range(200), (4, 16)):
        each = convert.stream_blocks.py_func(blocks, apart)
        assert each % (2 * apart) == (apart if blocks >= 2 * apart else 0)
        assert 0 <= blocks - 2 * each < 4 * apart


def test_the_tasks_meet_every_mode_layout_and_way_of_writing():
    tasks = [task for number in range(len(TYPE_PAIRS)) for task in rotating_tasks(number)]
    for direction in ("preprocess", "restore"):
        among = [task for task in tasks if task.transform.direction == direction]
        modes = {
            (t.transform.mode, t.transform.layout, t.transform.out_layout, t.nontemporal)
            for t in among
        }
        assert len(modes) == len(MODES) * len(LAYOUT_PAIRS) * 2
        views = {
            (t.reversed_input, t.transform.layout, t.transform.out_layout, t.nontemporal)
            for t in among
        }
        assert len(views) == 2 * len(LAYOUT_PAIRS) * 2
    rounded = {(t.transform.rounding, t.target, t.nontemporal) for t in tasks if t.source in FLOATS}
    assert len(rounded) >= 2 * 5 * 2
    recipes = [task.spec for task in tasks]
    for divisions in ({r.divide for r in recipes}, {r.scale for r in recipes}):
        assert divisions >= {"none", "division"}
        assert "reciprocal" in divisions or not processor().has_fma


@parts(len(LAYOUT_PAIRS))
@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.name)
def test_the_commonest_types_are_exact_in_every_mode_and_layout(mode, part):
    number = (MODES.index(mode) + part) % len(LAYOUT_PAIRS)
    transform = Transform(mode, "preprocess", *LAYOUT_PAIRS[number], "float32")
    check_everywhere(Task(transform, "uint8", nontemporal=number % 2 == 0))


@parts(len(LAYOUTS))
@pytest.mark.parametrize("storage", FLOATS)
@pytest.mark.parametrize("direction", ["preprocess", "restore"])
def test_a_loop_works_in_place_for_any_length_and_any_address(direction, storage, part):
    # Either layout with either direction and storage type in the first parts.
    number = FLOATS.index(storage) // 2 + (direction == "restore") + part
    layout = LAYOUTS[number % len(LAYOUTS)]
    flips = (FLOATS.index(storage) + (direction == "restore") + (layout == "NCHW")) % 2
    transform = Transform(OWN if flips else Mode.TORCH, direction, layout, layout, storage)
    check_everywhere(Task(transform, storage, in_place=True))


SIZES = [
    pair
    for pair in itertools.product(
        ("uint8", "float16", "float32", "float64"), ("uint8", "bfloat16", "float32", "float64")
    )
    if pair != ("uint8", "uint8")
]

BETWEEN_GUARDS = """
from tests.helpers import kernel_harness
from tests.helpers.kernel_harness import OWN, Task, Transform

for number, source, target in {sizes!r}:
    direction = "restore" if target == "uint8" else "preprocess"
    transform = Transform(OWN, direction, *{layouts!r}, target)
    nontemporal = (number + number // 4) % 2 == 0
    task = Task(transform, source, reversed_input=number % 3 == 0, nontemporal=nontemporal)
    print(task, flush=True)
    kernel_harness.check_between_guards(task, {counts!r})
"""

IN_PLACE_TYPES = ("float16", "float32", "float64")
IN_PLACE_BETWEEN_GUARDS = """
from tests.helpers import kernel_harness
from tests.helpers.kernel_harness import OWN, Task, Transform

for source, layout in {cases!r}:
    task = Task(Transform(OWN, "preprocess", layout, layout, source), source, in_place=True)
    print(task, flush=True)
    kernel_harness.check_between_guards(task, {counts!r})
"""

# Every remainder before and after a block, where tiles end, and where two streams begin.
COUNTS = (*range(2 * LINE + LINE), TILE, TILE + 1, TILE + 63, 2 * TILE, 2 * TILE + 65)


@parts(8)
@pytest.mark.parametrize("layouts", LAYOUT_PAIRS, ids="-".join)
def test_a_loop_touches_nothing_before_and_after_what_it_is_given(layouts, part):
    # Other types for each pair of layouts, so that the first parts have all of them.
    first = (part + 2 * LAYOUT_PAIRS.index(layouts)) % 8
    sizes = [(number, *SIZES[number]) for number in range(first, len(SIZES), 8)]
    run_script(BETWEEN_GUARDS.format(sizes=sizes, layouts=layouts, counts=COUNTS))


@parts(2)
def test_a_loop_in_place_touches_nothing_before_and_after_what_it_is_given(part):
    cases = [(source, LAYOUTS[(number + part) % 2]) for number, source in enumerate(IN_PLACE_TYPES)]
    run_script(IN_PLACE_BETWEEN_GUARDS.format(cases=cases, counts=COUNTS))


OUTSIDE = """
import mmap
from tests.helpers.kernel_harness import between_guards

memory = between_guards(2, 3 * mmap.PAGESIZE)
run, page = 3 * mmap.PAGESIZE, mmap.PAGESIZE
memory.bytes[page] = memory.bytes[page + run - 1] = 1
memory.bytes[2 * page + run] = memory.bytes[2 * page + 2 * run - 1] = 1
print("inside", flush=True)
memory.bytes[{at}]
"""


@pytest.mark.parametrize("at", ["page - 1", "page + run", "2 * page + run - 1", "-1"])
def test_the_guards_stop_whoever_touches_them(at):
    with pytest.raises(AssertionError, match=r"exit code -(11|10|7)\ninside"):
        run_script(OUTSIDE.format(at=at))


@pytest.mark.parametrize(("images", "count"), [(0, 40), (2, 0), (0, 0)])
@pytest.mark.parametrize("layouts", LAYOUT_PAIRS, ids="-".join)
def test_a_loop_over_nothing_writes_nothing(layouts, images, count):
    task = Task(Transform("caffe", "preprocess", *layouts), "uint8", nontemporal=True)
    check(task, images, [count], [0, 4])


def test_one_spec_is_one_kernel_and_another_spec_is_another():
    caffe = Task(Transform("caffe"), "uint8").spec
    torch = Task(Transform("torch"), "uint8").spec
    assert convert.compiled(caffe) is convert.compiled(caffe._replace())
    assert convert.compiled(caffe) is not convert.compiled(torch)


# In a process of its own, where no other test has compiled anything yet.
COMPILED_ONCE = """
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
assert convert.compiled.cache_info().currsize == 1, convert.compiled.cache_info()
if {source!r} == "float32":
    fastvgg.preprocess(batch, "caffe", layout={layout!r}, out=batch, backend="numba")
    assert convert.compiled.cache_info().currsize == 2, convert.compiled.cache_info()
"""


@pytest.mark.parametrize(("source", "layout"), [("uint8", "NHWC"), ("float32", "NCHW")])
def test_a_loop_is_compiled_once_for_whatever_input_it_is_given(source, layout):
    run_script(COMPILED_ONCE.format(source=source, layout=layout))


def test_kernels_are_compiled_with_ieee_arithmetic_and_without_the_interpreter_lock():
    flags = r"\b(?:fast|reassoc|contract|arcp|nnan|ninf|nsz|afn)\b"
    for layouts in LAYOUT_PAIRS:
        kernel = convert.compiled(Task(Transform("torch", "preprocess", *layouts), "uint8").spec)
        (text,) = kernel.inspect_llvm().values()
        assert not re.search(flags, text)
        assert kernel.targetoptions["nogil"]
