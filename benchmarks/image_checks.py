"""Check a sample of the rows computed from photographs."""

from __future__ import annotations

import io

import numpy as np
from image_limits import ENCODERS, encode
from photographs import SIZE
from PIL import Image

import fastvgg
from fastvgg import oracle

CHECKED_ROWS = 8


def load_like_keras(data, size):
    """Return a photograph as Keras' load_img does, decoded and resized by Pillow."""
    height, width = size
    with Image.open(io.BytesIO(data)) as image:
        resized = image.convert("RGB").resize((width, height), Image.Resampling.NEAREST)
    return np.asarray(resized)


def sample_rows(count):
    return np.linspace(0, count - 1, CHECKED_ROWS).astype(int).tolist()


def check_rows(path, readers, size, transform=None):
    """Raise if a checked row differs from Keras' pixels, transformed by the oracle.

    If there are more rows than photographs, the photographs repeat.
    """
    result = np.load(path, mmap_mode="r")
    for index in sample_rows(len(result)):
        pixels = load_like_keras(readers[index % len(readers)](), size)
        expected = pixels if transform is None else oracle.apply(transform, pixels)
        if result[index].tobytes() != expected.tobytes():
            raise RuntimeError(f"{path}: row {index} differs from Keras' result")


def mean_difference(path, readers):
    """Return the mean absolute difference from Keras' pixels, in levels, of a caffe mode array."""
    result = np.load(path, mmap_mode="r")
    distances = [
        np.abs(
            fastvgg.restore(result[index], "caffe").astype(int)
            - load_like_keras(readers[index](), SIZE)
        ).mean()
        for index in sample_rows(len(result))
    ]
    return round(float(np.mean(distances)), 2)


def check_files(path, images, image_format):
    """Raise if a checked file differs from its encoded image."""
    files = sorted(path.rglob(f"*{ENCODERS[image_format]}"))
    if len(files) != len(images):
        raise RuntimeError(f"{path} has {len(files)} files of {len(images)} images")
    for index in sample_rows(len(images)):
        if files[index].read_bytes() != encode(images[index], image_format):
            raise RuntimeError(f"{files[index]} differs from its encoded image")
