"""Compiled loops: the oracle's bits for any length and address, no byte beside, vectors inside."""

from __future__ import annotations

import ctypes
import itertools
import re
from pathlib import Path

import numpy as np
import pytest
from batches import FLOATS, LAYOUT_PAIRS, LAYOUTS, run_script
from by_hand import (
    LINE,
    MODES,
    OWN,
    TYPE_PAIRS,
    Steps,
    Task,
    at_a_line,
    call,
    check,
    rotating_tasks,
)

from fastvgg.kernels import loops
from fastvgg.kernels.blocks import ELEMENT_BYTES
from fastvgg.kernels.compile import processor
from fastvgg.transform import Mode, Transform

TESTS = str(Path(__file__).parent)
TILE = loops.TILE_PIXELS
AROUND_TILES = (TILE - 1, TILE, TILE + 1, TILE + 37, 2 * TILE - 30, 2 * TILE, 2 * TILE + 63)


def block_of(task):
    """How many pixels one block writes."""
    return LINE // ELEMENT_BYTES[task.target]


def check_everywhere(task):
    """Every length of what comes before, in and after whole blocks, at every place in a line."""
    size = ELEMENT_BYTES[task.target]
    check(task, 1, range(LINE + 2 * block_of(task)), range(0, LINE, size))
    check(task, 3, range(0, LINE + block_of(task), 5), range(0, LINE, max(8, size)))
    check(task, 1, AROUND_TILES, (0, size, 32, LINE - size))
    check(task, 256, [1], [0])  # where no block is long enough, every value too


@pytest.mark.parametrize("number", range(len(TYPE_PAIRS)), ids=lambda n: "-".join(TYPE_PAIRS[n]))
def test_a_loop_has_the_bits_of_the_oracle_for_any_length_and_any_address(number):
    for task in rotating_tasks(number):
        check_everywhere(task)


def test_the_tasks_meet_every_mode_layout_and_way_of_writing():
    tasks = [task for number in range(len(TYPE_PAIRS)) for task in rotating_tasks(number)]
    for direction in ("preprocess", "restore"):
        among = [task for task in tasks if task.transform.direction == direction]
        modes = {
            (t.transform.mode, t.transform.layout, t.transform.out_layout, t.streams) for t in among
        }
        assert len(modes) == len(MODES) * len(LAYOUT_PAIRS) * 2
        views = {(t.reverses, t.transform.layout, t.transform.out_layout, t.streams) for t in among}
        assert len(views) == 2 * len(LAYOUT_PAIRS) * 2
    rounded = {(t.transform.rounding, t.target, t.streams) for t in tasks if t.source in FLOATS}
    assert len(rounded) >= 2 * 5 * 2
    recipes = [task.recipe for task in tasks]
    for divisions in ({r.divides for r in recipes}, {r.scales for r in recipes}):
        assert divisions >= {"none", "division"}
        assert "reciprocal" in divisions or not processor().fuses


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.name)
def test_the_commonest_types_are_exact_in_every_mode_and_layout(mode):
    for number, layouts in enumerate(LAYOUT_PAIRS):
        transform = Transform(mode, "preprocess", *layouts, "float32")
        check_everywhere(Task(transform, "uint8", streams=number % 2 == 0))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("storage", FLOATS)
@pytest.mark.parametrize("direction", ["preprocess", "restore"])
def test_a_loop_works_in_place_for_any_length_and_any_address(direction, storage, layout):
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
import sys
sys.path.insert(0, {tests!r})
import by_hand
from by_hand import OWN, Task, Transform

for number, (source, target) in enumerate({sizes!r}):
    direction = "restore" if target == "uint8" else "preprocess"
    transform = Transform(OWN, direction, *{layouts!r}, target)
    streams = (number + number // 4) % 2 == 0
    task = Task(transform, source, reverses=number % 3 == 0, streams=streams)
    print(task, flush=True)
    by_hand.check_between_guards(task, {counts!r})
"""

IN_PLACE_BETWEEN_GUARDS = """
import sys
sys.path.insert(0, {tests!r})
import by_hand
from by_hand import OWN, Task, Transform

for source in ("float16", "float32", "float64"):
    for layout in ("NHWC", "NCHW"):
        task = Task(Transform(OWN, "preprocess", layout, layout, source), source, in_place=True)
        print(task, flush=True)
        by_hand.check_between_guards(task, {counts!r})
"""

# Every remainder before and after a block, and where tiles end.
COUNTS = (*range(2 * LINE + LINE), TILE, TILE + 1, TILE + 63)


@pytest.mark.parametrize("layouts", LAYOUT_PAIRS, ids="-".join)
def test_a_loop_touches_nothing_before_and_after_what_it_is_given(layouts):
    run_script(BETWEEN_GUARDS.format(tests=TESTS, sizes=SIZES, layouts=layouts, counts=COUNTS))


def test_a_loop_in_place_touches_nothing_before_and_after_what_it_is_given():
    run_script(IN_PLACE_BETWEEN_GUARDS.format(tests=TESTS, counts=COUNTS))


OUTSIDE = """
import sys
sys.path.insert(0, {tests!r})
import mmap
from by_hand import between_guards

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
        run_script(OUTSIDE.format(tests=TESTS, at=at))


@pytest.mark.parametrize(("images", "count"), [(0, 40), (2, 0), (0, 0)])
@pytest.mark.parametrize("layouts", LAYOUT_PAIRS, ids="-".join)
def test_a_loop_over_nothing_writes_nothing(layouts, images, count):
    task = Task(Transform("caffe", "preprocess", *layouts), "uint8", streams=True)
    check(task, images, [count], [0, 4])


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("layouts", [("NHWC", "NHWC"), ("NCHW", "NCHW")], ids="-".join)
def test_all_but_the_ends_goes_in_blocks_of_whole_lines(layouts, streams):
    """Each pixel is written where the next is read: what a block reads at once arrives, no more."""
    task = Task(Transform("identity", "preprocess", *layouts), "float32", streams=streams)
    count, block, dtype = 2 * TILE + 37, LINE // 4, np.dtype(np.float32)
    steps = Steps.with_gaps(dtype, layouts[0], count, gap=7)
    memory = at_a_line(steps.image + 3 * LINE)
    for start in range(0, LINE, 4):
        x, y = (memory.room(start + at * steps.pixel, dtype, steps, 1, count) for at in (0, 1))
        both = memory.room(start, dtype, steps, 1, count + 1).pixels[0]
        both[...] = np.arange(both.size).reshape(both.shape)
        expected = both.copy()
        for channel in range(3):
            begins = y.address + (channel * steps.channel if layouts[1] == "NCHW" else 0)
            at_lines = (at for at in range(LINE) if (begins + at * steps.pixel) % LINE == 0)
            first = next(at_lines) if streams else 0
            last = first + (count - first) // block * block
            widths = [1] * first + [block] * ((last - first) // block) + [1] * (count - last)
            at = 0
            for width in widths:
                expected[at + 1 : at + 1 + width, channel] = expected[at : at + width, channel]
                at += width
        call(task, x, y)
        assert np.array_equal(both, expected), f"{task}: {start} bytes past a line"


def test_one_recipe_is_one_loop_and_another_recipe_is_another():
    caffe = Task(Transform("caffe"), "uint8").recipe
    torch = Task(Transform("torch"), "uint8").recipe
    assert loops.compiled(caffe) is loops.compiled(caffe._replace())
    assert loops.compiled(caffe) is not loops.compiled(torch)


# In a process of its own, where no other test has compiled anything yet.
COMPILED_ONCE = """
import sys
sys.path.insert(0, {tests!r})
from batches import every_value, frozen, in_layout, unaligned
import fastvgg
from fastvgg.kernels import loops
from fastvgg.transform import Mode

batch = in_layout(every_value().astype({source!r}), {layout!r})
inputs = [batch, frozen(batch.copy()), unaligned(batch), batch[0], batch[:1, :, :4]]
inputs += [batch[::2], batch[..., ::2, :], batch.astype(batch.dtype.newbyteorder("S"))]
for mode in (Mode.CAFFE, Mode("other means", mean=(1.0, 2.0, 3.0), order="BGR")):
    for x in inputs:
        fastvgg.preprocess(x, mode, layout={layout!r}, backend="numba")
assert loops.compiled.cache_info().currsize == 1, loops.compiled.cache_info()
if {source!r} == "float32":
    fastvgg.preprocess(batch, "caffe", layout={layout!r}, out=batch, backend="numba")
    assert loops.compiled.cache_info().currsize == 2, loops.compiled.cache_info()
"""


@pytest.mark.parametrize(("source", "layout"), [("uint8", "NHWC"), ("float32", "NCHW")])
def test_a_loop_is_compiled_once_for_whatever_input_it_is_given(source, layout):
    run_script(COMPILED_ONCE.format(tests=TESTS, source=source, layout=layout))


ARITHMETIC = r"\bv?(?:add|sub|mul|div|fn?m(?:add|sub)\d+)"
LABEL = re.compile(r"^(\.L\w+):")
JUMP = re.compile(r"^\s+j\w+\s+(\.L\w+)")
# Not to the stack: those are spilled registers.
VECTOR_STORE = re.compile(
    r"^\s+(v?mov(?:nt|[au])\w+|v?mov\w*dq\w*)\s+%([xyz])mm\d+, [^%]*\(%r(?!sp|bp)"
)
HALVES_STORE = re.compile(r"^\s+vcvtps2ph\s+\$\d, %([xyz])mm\d+, [^%]*\(%r(?!sp|bp)")
VECTOR_BYTES = {"x": 16, "y": 32, "z": 64}

needs_x86 = pytest.mark.skipif(
    not processor().is_x86, reason="reads the assembly of x86-64 processors"
)


def assembly_of(task):
    """The lines of a loop."""
    text = loops.compiled(task.recipe).library.get_asm_str()
    return text[: text.index(".Lfunc_end0")].splitlines()


def innermost_loops(lines):
    """Each stretch of instructions that is repeated and has no other such stretch inside."""
    labels = {found[1]: at for at, line in enumerate(lines) if (found := LABEL.match(line))}
    jumps = [
        (labels.get(found[1], at), at)
        for at, line in enumerate(lines)
        if (found := JUMP.match(line))
    ]
    back = [(begin, end) for begin, end in jumps if begin < end]
    inner = [
        (begin, end)
        for begin, end in back
        if not any((begin, end) != (b, e) and begin <= b and e <= end for b, e in back)
    ]
    return [lines[begin : end + 1] for begin, end in inner]


def bytes_written(lines):
    """How many bytes the stores of whole vectors write."""
    whole = [found[2] for line in lines if (found := VECTOR_STORE.match(line))]
    halves = [found[1] for line in lines if (found := HALVES_STORE.match(line))]
    return (
        sum(VECTOR_BYTES[kind] for kind in whole) + sum(VECTOR_BYTES[kind] for kind in halves) // 2
    )


SEEN = [
    ("preprocess", "uint8", "float32"),
    ("preprocess", "uint8", "float16"),
    ("preprocess", "float64", "float64"),
    ("restore", "float32", "uint8"),
    ("restore", "bfloat16", "float32"),
]


def reachable(lines, begin, without):
    """The numbers of all lines that may be executed after `begin` and before one that matches."""
    labels = {found[1]: at for at, line in enumerate(lines) if (found := LABEL.match(line))}
    seen, following = set(), [begin + 1]
    while following:
        at = following.pop()
        if at in seen or at == len(lines) or re.match(without, lines[at]):
            continue
        seen.add(at)
        if found := JUMP.match(lines[at]):
            following.append(labels[found[1]])
        if not re.match(r"\s+(jmp|ret)", lines[at]):
            following.append(at + 1)
    return seen


def matching(pattern, lines):
    """The numbers of the lines that begin with an instruction."""
    return [at for at, line in enumerate(lines) if re.match(rf"\s+{pattern}", line)]


@needs_x86
@pytest.mark.parametrize("types", SEEN, ids="-".join)
@pytest.mark.parametrize("layouts", LAYOUT_PAIRS, ids="-".join)
def test_whole_lines_are_written_from_vectors_with_the_instructions_meant(layouts, types):
    direction, source, target = types
    transform = Transform(OWN, direction, *layouts, target)
    for streams in (True, False):
        task = Task(transform, source, streams=streams)
        lines = assembly_of(task)
        block_bytes = LINE * (3 if layouts[1] == "NHWC" else 1)
        whole = [loop for loop in innermost_loops(lines) if bytes_written(loop) >= block_bytes]
        assert {bytes_written(loop) for loop in whole} == {block_bytes}, task
        for loop in whole:  # one, or one for each plane
            check_arithmetic(task, loop)
            check_stores(task, lines, loop)


def check_arithmetic(task, lines):
    """Packed and in the compute type; fused and divided where the recipe says so."""
    text = "\n".join(lines)
    kind = "d" if task.recipe.compute == "float64" else "s"
    assert re.search(rf"{ARITHMETIC}p{kind}\b", text), task
    assert not re.search(rf"{ARITHMETIC}s[sd]\b", text), task
    forwards = task.transform.direction == "preprocess"
    proven = "reciprocal" in (task.recipe.divides, task.recipe.scales)
    assert proven == (forwards and task.source == "uint8" and processor().fuses)
    everything = "\n".join(assembly_of(task))
    for instructions in (text, everything):
        assert bool(re.search(r"\bvfn?m(?:add|sub)", instructions)) == proven, task
        assert bool(re.search(r"\bv?div[ps][sd]\b", instructions)) == (forwards and not proven)
        assert not re.search(r"rcp|rsqrt", instructions), task


def check_stores(task, lines, whole):
    """Past the caches, with a fence before anything else goes on, or neither."""
    past, fences = matching("v?movnt", lines), matching("sfence", lines)
    assert bool(past) == bool(fences) == bool(matching("v?movnt", whole)) == task.streams, task
    assert not task.streams or not [
        line for line in whole if VECTOR_STORE.match(line) and "movnt" not in line
    ]
    for at in past:
        unfenced = [lines[after] for after in reachable(lines, at, without=r"\s+sfence")]
        assert not [line for line in unfenced if re.match(r"\s+ret", line)], task


def test_loops_are_compiled_with_ieee_arithmetic_and_without_the_interpreter_lock():
    for layouts in LAYOUT_PAIRS:
        recipe = Task(Transform("torch", "preprocess", *layouts), "uint8").recipe
        loop = loops.compiled(recipe)
        assert not re.search(
            r"\b(?:fast|reassoc|contract|arcp|nnan|ninf|nsz|afn)\b", loop.library.get_llvm_str()
        )
        assert not loop._flags_ & ctypes.PYFUNCTYPE(None)._flags_ & ~ctypes.CFUNCTYPE(None)._flags_
