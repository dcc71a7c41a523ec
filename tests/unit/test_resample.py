"""gather on each backend matches NumPy indexing and writes nothing else."""

from __future__ import annotations

import numpy as np
import pytest

from fastvgg.errors import UsageError
from fastvgg.imaging import resize
from tests.helpers.batches import frozen, run_script, unchanged
from tests.unit.test_resize import cases, noise

pytestmark = pytest.mark.pixels

CANARY = 77
LINE = 64


def expected_of(pixels, index):
    return pixels[index.rows][:, index.columns]


def at_line_offset(pixels, start):
    """Copy pixels to an address `start` bytes into a cache line; read-only."""
    memory = np.full(pixels.nbytes + 2 * LINE, CANARY, np.uint8)
    begin = -memory.ctypes.data % LINE + start
    part = memory[begin : begin + pixels.nbytes].reshape(pixels.shape)
    part[...] = pixels
    return frozen(part)


@pytest.fixture(params=["numpy", pytest.param("numba", marks=pytest.mark.compiled)])
def gather(request):
    """The gather function of each backend."""
    return resize.gather_function(request.param)


def check(pixels, index, start, gather):
    shape = (len(index.rows), len(index.columns), 3)
    length = 3 * shape[0] * shape[1]
    memory = np.full(length + 3 * LINE, CANARY, np.uint8)
    begin = -memory.ctypes.data % LINE + start
    out = memory[begin : begin + length].reshape(shape)
    with unchanged(pixels):
        gather(pixels, index, out)
    assert out.tobytes() == expected_of(pixels, index).tobytes()
    assert (memory[:begin] == CANARY).all()
    assert (memory[begin + length :] == CANARY).all()


def test_gather_matches_numpy_indexing(gather):
    for case in cases(200, 60, seed=3):
        check(noise(*case[:2]), resize.nearest_index(*case), 0, gather)


def test_gather_result_does_not_depend_on_alignment(gather):
    pixels = noise(13, 17)
    for start in range(LINE):
        for box, target_size in (((0, 0, 17, 13), (6, 11)), ((3, 2, 16, 13), (5, 7))):
            index = resize.nearest_index(13, 17, box, target_size)
            check(at_line_offset(pixels, start), index, (7 * start + 3) % LINE, gather)
            check(at_line_offset(pixels, (5 * start) % LINE), index, start, gather)


@pytest.mark.parametrize("target_size", [(1, 1), (1, 7), (7, 1), (9, 11)])
@pytest.mark.parametrize("size", [(1, 1), (1, 5), (5, 1), (2, 2), (3, 4)])
def test_gather_supports_tiny_images_and_results(gather, size, target_size):
    index = resize.nearest_index(*size, (0, 0, size[1], size[0]), target_size)
    for start in (0, 1, 2, 3):
        check(at_line_offset(noise(*size), start), index, start, gather)


def test_gather_resizes_photograph_sizes_correctly(gather):
    pixels = noise(375, 500)
    for target_size in ((224, 224), (375, 499), (700, 300)):
        check(pixels, resize.nearest_index(375, 500, (0, 0, 500, 375), target_size), 1, gather)


def test_unknown_gather_backend_is_rejected():
    with pytest.raises(UsageError, match="unknown backend 'cuda'"):
        resize.gather_function("cuda")


GUARDED_SCRIPT = """
import mmap
import numpy as np
from tests.helpers.kernel_harness import guarded_memory, protect
from tests.unit.test_resize import cases
from fastvgg import engine
from fastvgg.imaging import resize

run = 2 * mmap.PAGESIZE
taken, given = (guarded_memory(1, run) for _ in range(2))
random = np.random.default_rng(1)
noise = random.integers(0, 256, run, np.uint8)
taken.bytes[mmap.PAGESIZE : mmap.PAGESIZE + run] = noise
protect(taken.address + mmap.PAGESIZE, run, mmap.PROT_READ)

def guarded(memory, shape, ends):
    length = int(np.prod(shape))
    start = mmap.PAGESIZE + (run - length if ends else 0)
    return memory.bytes[start : start + length].reshape(shape)

gather = resize.gather_function("numba")
fixed = [(1, 1, (0, 0, 1, 1), (1, 1)), (1, 9, (0, 0, 9, 1), (1, 4)), (9, 1, (0, 0, 1, 9), (4, 1)),
         (2, 2, (0, 0, 2, 2), (2, 2)), (52, 52, (0, 0, 52, 52), (52, 52)),
         (3, 2, (0, 0, 2, 3), (5, 9))]
for height, width, box, target_size in [*fixed, *cases(300, 50, seed=9)]:
    index = resize.nearest_index(height, width, box, target_size)
    for ends in (True, False):
        pixels = guarded(taken, (height, width, 3), ends)
        out = guarded(given, (*target_size, 3), ends)
        out[...] = 255
        print(height, width, box, target_size, ends, flush=True)
        gather(pixels, index, out)
        assert out.tobytes() == pixels[index.rows][:, index.columns].tobytes()
print("done")
"""


@pytest.mark.compiled
def test_gather_kernel_does_not_access_memory_outside_its_arguments():
    assert run_script(GUARDED_SCRIPT).endswith("done\n")
