"""Nearest-neighbor resizing matches Pillow pixel for pixel."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from fastvgg.imaging import resize
from fastvgg.imaging.resize import nearest_index
from tests.helpers.batches import frozen, unchanged

CANARY = 77


def noise(height, width, seed=1):
    shape = height, width, 3
    return frozen(np.random.default_rng(seed).integers(0, 256, shape, np.uint8))


def as_pillow_resizes(pixels, box, target_size):
    """The oracle: Pillow itself, on the image."""
    image = Image.fromarray(pixels)
    return np.asarray(
        image.resize((target_size[1], target_size[0]), Image.Resampling.NEAREST, box=box)
    )


def cases(count, longest, seed):
    """Yield random sizes, boxes and target sizes: smaller, larger and both."""
    random = np.random.default_rng(seed)
    for _ in range(count):
        height, width, *target_size = (int(side) for side in random.integers(1, longest, 4))
        left, upper = int(random.integers(0, width)), int(random.integers(0, height))
        right, lower = random.integers(left, width) + 1, random.integers(upper, height) + 1
        whole = random.random() < 0.4
        box = (0, 0, width, height) if whole else (left, upper, int(right), int(lower))
        yield height, width, box, tuple(target_size)


def check(height, width, box, target_size):
    pixels = noise(height, width)
    expected = as_pillow_resizes(pixels, box, target_size)
    index = nearest_index(height, width, box, target_size)
    assert pixels[index.rows][:, index.columns].tobytes() == expected.tobytes()
    memory = np.full((target_size[0] + 2, target_size[1], 3), CANARY, np.uint8)
    with unchanged(pixels):
        resize.gather(pixels, index, memory[1:-1])
    assert memory[1:-1].tobytes() == expected.tobytes()
    assert (memory[[0, -1]] == CANARY).all()


@pytest.mark.parametrize("longest", [4, 30, 400])
def test_nearest_index_matches_pillow_for_random_boxes_and_sizes(longest):
    for case in cases(150, longest, seed=longest):
        check(*case)


@pytest.mark.parametrize("target_size", [(1, 1), (2, 3), (224, 224), (375, 500), (1000, 999)])
@pytest.mark.parametrize("size", [(1, 1), (1, 500), (375, 1), (375, 500), (500, 375)])
def test_nearest_index_matches_pillow_for_photographs_and_lines(size, target_size):
    height, width = size
    check(height, width, (0, 0, width, height), target_size)
    check(height, width, (width // 3, height // 4, width, height), target_size)


def test_nearest_index_follows_pillow_where_the_usual_formula_differs():
    """The usual formula differs for some pixels, which is why Pillow is the reference."""
    different = 0
    for length in range(1, 400):
        index = nearest_index(1, length, (0, 0, length, 1), (1, 224)).columns
        assert index.min() >= 0
        assert index.max() < length
        assert (np.diff(index) >= 0).all()
        formula = np.floor((np.arange(224) + 0.5) * (length / 224)).astype(int)
        different += int((index != formula).sum())
    assert 0 < different < 400 * 224 // 100


def test_nearest_index_is_exact_for_lengths_above_16_bits():
    for length in (257, 65_537, 70_001):
        index = nearest_index(3, length, (0, 0, length, 3), (3, length)).columns
        assert (index == np.arange(length)).all()
        assert nearest_index(length, 3, (0, 1, 3, length), (length - 1, 3)).rows[-1] == length - 1


def test_empty_boxes_match_pillow():
    """Keras crops such boxes from lines, and Pillow repeats one pixel."""
    for box in ((3, 0, 3, 7), (0, 2, 9, 2), (4, 3, 4, 3)):
        for target_size in ((5, 5), (1, 20)):
            check(7, 9, box, target_size)


def test_boxes_of_equal_size_are_not_confused():
    for case in (
        (7, 9, (0, 0, 5, 5), (3, 3)),
        (7, 9, (2, 1, 7, 6), (3, 3)),
        (9, 7, (2, 1, 7, 6), (3, 3)),
    ):
        check(*case)
        check(*case)
