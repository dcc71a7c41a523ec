"""Sample batches for the benchmarks: 224x224 images with deterministic pixels."""

from __future__ import annotations

import numpy as np

from fastvgg.bench.kernels import HEIGHT, WIDTH
from fastvgg.transform import storage_dtype


def batch(images, layout, dtype):
    """Return deterministic images in a dtype and layout."""
    shape = (HEIGHT, WIDTH, 3) if layout == "NHWC" else (3, HEIGHT, WIDTH)
    one = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    x = np.empty((images, *shape), storage_dtype(dtype))
    x[:] = one.astype(x.dtype)
    return x
